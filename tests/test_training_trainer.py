import copy
import json
import math

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import Dataset

from cspine_helpers.dataset.sequence import EpochBatches, load_batches
from cspine_helpers.training.trainer import (
    STATE,
    RunningStatistics,
    TrainingState,
    read_state,
    restore,
    save_state,
    train_epoch,
)

SETTING = {"model": {"size": 32}, "train": {"seed": 0}, "data": {}, "processes": 1, "left_out": {}}


def trained(seed: int, steps: int = 3):
    torch.manual_seed(seed)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.Flatten(), torch.nn.Linear(32, 1)
    ).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    go_on(model, optimizer, steps)
    return model, optimizer


def go_on(model, optimizer, steps):
    torch.manual_seed(1)
    for _ in range(steps):
        model(torch.randn(16, 3, 4, 4)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_what_was_saved_goes_on_exactly(tmp_path):
    model, optimizer = trained(0)
    state = TrainingState(SETTING, stage="sequences", epoch=3, rows=[{"epoch": 1, "threshold": math.nan}])
    save_state(tmp_path, state, model, optimizer)
    go_on(model, optimizer, 2)
    found, tensors = read_state(tmp_path)
    other, other_optimizer = trained(5, steps=1)
    restore(tensors, other, other_optimizer)
    go_on(other, other_optimizer, 2)
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name
    assert found.epoch == 3
    assert found.setting == SETTING
    assert math.isnan(found.history["threshold"][0])


def test_a_history_without_rows_has_its_columns():
    assert list(TrainingState(SETTING).history.columns) == [
        "epoch",
        "validation_objective",
        "validation_average_precision",
    ]


def test_a_state_that_is_missing_or_damaged_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"state\.safetensors is missing"):
        read_state(tmp_path)
    save_state(tmp_path, TrainingState(SETTING), *trained(0))
    whole = (tmp_path / STATE).read_bytes()
    for damaged in (whole[:-10], whole[:100], b"", b"\x80\x04pickle", b"\xff" * 64):
        (tmp_path / STATE).write_bytes(damaged)
        with pytest.raises(ValueError, match=r"not the whole state of a training .*away"):
            read_state(tmp_path)


def test_a_state_without_its_header_or_of_another_format_is_refused(tmp_path):
    save_state(tmp_path, TrainingState(SETTING), *trained(0))
    tensors = load_file(tmp_path / STATE)
    save_file(tensors, tmp_path / STATE)
    with pytest.raises(ValueError, match="not the whole state"):
        read_state(tmp_path)
    later = {"format": 99, "setting": SETTING, "a field of its own": 1}
    save_file(tensors, tmp_path / STATE, metadata={"state": json.dumps(later)})
    with pytest.raises(ValueError, match="format 99; this version reads"):
        read_state(tmp_path)


@pytest.mark.parametrize("place", [0.3, 0.6, 0.99])
def test_a_single_changed_byte_is_noticed(tmp_path, place):
    save_state(tmp_path, TrainingState(SETTING), *trained(0))
    content = bytearray((tmp_path / STATE).read_bytes())
    content[int(place * len(content))] ^= 4
    (tmp_path / STATE).write_bytes(content)
    with pytest.raises(ValueError, match="not the whole state of a training"):
        read_state(tmp_path)


def test_a_state_that_says_another_epoch_is_noticed(tmp_path):
    save_state(tmp_path, TrainingState(SETTING, epoch=3), *trained(0))
    content = (tmp_path / STATE).read_bytes()
    (tmp_path / STATE).write_bytes(content.replace(b'\\"epoch\\": 3', b'\\"epoch\\": 7'))
    assert (tmp_path / STATE).read_bytes() != content
    with pytest.raises(ValueError, match="its content is not what was written"):
        read_state(tmp_path)


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


def one_epoch(
    network,
    *,
    batch_size,
    accumulate=1,
    samples=42,
    clip_norm=1e9,
    seed=0,
    rate=0.5,
    frozen=None,
    shares=None,
):
    """One epoch of plain gradient descent, which unlike AdamW shows the scale of a gradient."""
    network, points = copy.deepcopy(network), Points(samples)
    accelerator = Accelerator(cpu=True)
    groups = [{"params": part.parameters()} for part in network.children()]
    for group, share in zip(groups, shares or (), strict=False):
        group["share"] = share
    network, optimizer = accelerator.prepare(network, torch.optim.SGD(groups, lr=0.0))
    batches = EpochBatches(lambda _: np.arange(samples), batch_size=batch_size, accumulate=accumulate)
    loader = load_batches(points, batches, workers=0, seed=0)
    rates = [rate] * len(batches.step_sizes)
    options = {"rates": rates, "clip_norm": clip_norm, "seed": (seed,)}
    options["frozen"] = None if frozen is None else network[frozen]
    loss = train_epoch(accelerator, network, optimizer, loader, entropy, **options)
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


def test_a_frozen_part_keeps_weights_and_statistics_to_the_bit_whatever_the_batches():
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)), nn.BatchNorm1d(4), nn.Linear(4, 1)
    )
    network(Points(42).points)  # statistics that thirds do not add up to again
    network[0].requires_grad_(False)
    before = copy.deepcopy(network.state_dict())
    trained, _ = one_epoch(network, batch_size=7, accumulate=3, frozen=0)
    for name, value in trained.state_dict().items():
        assert torch.equal(value, before[name]) == name.startswith("0."), name


def test_the_rate_of_a_group_is_its_share(plain):
    once, _ = one_epoch(plain, batch_size=42, rate=0.5)
    shared, _ = one_epoch(plain, batch_size=42, rate=0.5, shares=[0.25])
    for name, before in plain.state_dict().items():
        factor = 0.25 if name.startswith("0.") else 1.0
        moved = once.state_dict()[name] - before
        torch.testing.assert_close(shared.state_dict()[name], before + factor * moved)


def test_a_network_without_batchnorm_has_nothing_to_advance(plain):
    statistics = RunningStatistics(plain)
    with statistics.batch():
        plain(torch.zeros(1, 2))
    statistics.advance(Accelerator(cpu=True), 1)
