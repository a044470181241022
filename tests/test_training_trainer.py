import copy

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import Dataset

from cspine_helpers.dataset.sequence import EpochBatches, load_batches
from cspine_helpers.training.trainer import RunningStatistics, train_epoch


class Points(Dataset):
    """Points of the plane with a class; asked for by (epoch, index)."""

    def __init__(self, samples: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.points = torch.randn(samples, 2, generator=generator)
        self.classes = (self.points[:, 0] > 0).float()

    def __len__(self) -> int:
        return len(self.points)

    def __getitem__(self, key):
        return self.points[key[1]], self.classes[key[1]]


def entropy(network, batch):
    points, classes = batch
    return nn.functional.binary_cross_entropy_with_logits(network(points).squeeze(1), classes)


def one_epoch(network, *, batch_size, accumulate=1, samples=42, clip_norm=1e9, seed=0, rate=0.5):
    """One epoch of plain gradient descent, which unlike AdamW shows the scale of a gradient."""
    network, points = copy.deepcopy(network), Points(samples)
    accelerator = Accelerator(cpu=True)
    network, optimizer = accelerator.prepare(network, torch.optim.SGD(network.parameters(), lr=0.0))
    batches = EpochBatches(lambda _: np.arange(samples), batch_size=batch_size, accumulate=accumulate)
    loader = load_batches(points, batches, workers=0, seed=0)
    rates = [rate] * len(batches.step_sizes)
    loss = train_epoch(
        accelerator, network, optimizer, loader, entropy, rates=rates, clip_norm=clip_norm, seed=(seed,)
    )
    return network, loss


@pytest.fixture
def plain():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1))


def same(one, other, **tolerance):
    for name, value in one.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            torch.testing.assert_close(other.state_dict()[name], value, msg=name, **tolerance)


@pytest.mark.parametrize("samples", [42, 43])
def test_gradients_of_several_batches_make_one_step_like_one_large_batch(plain, samples):
    whole, loss = one_epoch(plain, batch_size=samples, samples=samples)
    parts, other = one_epoch(plain, batch_size=(samples + 2) // 3, accumulate=3, samples=samples)
    same(whole, parts, rtol=1e-5, atol=1e-7)
    assert other == pytest.approx(loss, rel=1e-6)


def test_the_step_is_that_of_gradient_descent_by_hand(plain):
    trained, loss = one_epoch(plain, batch_size=42, rate=0.5)
    points = Points(42)
    value = entropy(plain, (points.points, points.classes))
    value.backward()
    assert loss == pytest.approx(value.item(), rel=1e-6)
    for before, after in zip(plain.parameters(), trained.parameters(), strict=True):
        torch.testing.assert_close(after, before - 0.5 * before.grad)


def test_gradients_are_clipped_to_the_norm(plain):
    trained, _ = one_epoch(plain, batch_size=42, clip_norm=0.01, rate=1.0)
    moves = [a - b for a, b in zip(trained.parameters(), plain.parameters(), strict=True)]
    assert torch.cat([move.flatten() for move in moves]).norm().item() == pytest.approx(0.01, rel=1e-3)


def test_dropout_differs_between_batches_and_is_reproducible(plain):
    dropped = nn.Sequential(plain, nn.Dropout(0.5))
    torch.manual_seed(99)
    first, _ = one_epoch(dropped, batch_size=6, accumulate=2)
    torch.manual_seed(7)  # whatever was drawn before
    again, _ = one_epoch(dropped, batch_size=6, accumulate=2)
    other, _ = one_epoch(dropped, batch_size=6, accumulate=2, seed=1)
    same(first, again, rtol=0, atol=0)
    assert not torch.equal(first.state_dict()["0.0.weight"], other.state_dict()["0.0.weight"])


def test_running_statistics_advance_once_a_step_by_the_mean_of_its_batches():
    network = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4))
    norm, batches = network[1], [torch.randn(8, 4), torch.randn(8, 4) + 3]
    statistics = RunningStatistics(network)
    for batch in batches:
        with statistics.batch():
            norm(batch)
        norm(torch.randn(8, 4) * 100)  # a second pass, as gradient checkpointing makes one, leaves no trace
    statistics.advance(Accelerator(cpu=True), 2)
    mean = torch.stack([batch.mean(0) for batch in batches]).mean(0)
    variance = torch.stack([batch.var(0) for batch in batches]).mean(0)
    torch.testing.assert_close(norm.running_mean, 0.1 * mean)
    torch.testing.assert_close(norm.running_var, 0.9 + 0.1 * variance)


def test_one_batch_a_step_leaves_batchnorm_as_it_would_be():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    trained, _ = one_epoch(network, batch_size=7, rate=0.0)
    points = Points(42).points
    for chunk in points.split(7):
        network(chunk)
    same(network, trained, rtol=1e-6, atol=1e-7)


def test_a_network_without_batchnorm_has_nothing_to_advance(plain):
    statistics = RunningStatistics(plain)
    with statistics.batch():
        plain(torch.zeros(1, 2))
    statistics.advance(Accelerator(cpu=True), 1)
