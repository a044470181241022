from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from toy_cohort import make_toy_cohort, tiny_model

from cspine_helpers.cohort import read_cohort
from cspine_helpers.dataset.augment import AugmentConfig
from cspine_helpers.dataset.sequence import EpochBatches, SequenceDataset, load_batches
from cspine_helpers.model.classifier import FractureClassifier
from cspine_helpers.training.config import TrainConfig, adamw
from cspine_helpers.training.slices import SliceClassifier, SliceDataset, slice_entropy, slice_schedule
from cspine_helpers.training.trainer import train_epoch

CONFIG = TrainConfig(slice_epochs=4, slice_batch_size=8, workers=0)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    return read_cohort(make_toy_cohort(tmp_path_factory.mktemp("toy") / "toy"))


def make(cohort, augment) -> SequenceDataset:
    return SequenceDataset(
        cohort.samples["train"],
        cohort.packed,
        slices=tiny_model().slices,
        size=tiny_model().size,
        manifest=cohort.manifest,
        augment=augment,
    )


@pytest.fixture(scope="module")
def sequences(cohort) -> SequenceDataset:
    return make(cohort, AugmentConfig())


def weights_after(sequences: SequenceDataset, config: TrainConfig) -> tuple[dict, list[float]]:
    torch.manual_seed(0)
    model, data, accelerator = (
        FractureClassifier(tiny_model()),
        SliceDataset(sequences),
        Accelerator(cpu=True),
    )
    network = SliceClassifier(model)
    optimizer = adamw(network, config.slice_learning_rate, config.weight_decay)
    network, optimizer = accelerator.prepare(network, optimizer)
    batches = EpochBatches(partial(data.order, seed=0), batch_size=config.slice_batch_size)
    loader, losses = load_batches(data, batches, workers=0, seed=0), []
    for epoch in range(1, config.slice_epochs + 1):
        batches.set_epoch(epoch)
        rates = [config.slice_learning_rate] * len(batches.step_sizes)
        losses.append(
            train_epoch(
                accelerator, network, optimizer, loader, slice_entropy, rates=rates, clip_norm=1.0, seed=(0,)
            )
        )
    return model.state_dict(), losses


def test_an_item_is_a_slice_and_whether_it_is_fractured(cohort):
    plain = make(cohort, None)
    data, slices = SliceDataset(plain), tiny_model().slices
    assert len(data) == len(plain) * slices
    for sequence, position in np.argwhere(~np.isnan(plain.slice_truth))[[0, 5, -1]]:
        pixels, truth = data[1, sequence * slices + position]
        torch.testing.assert_close(pixels, plain[int(sequence)]["sequence"][position])
        assert truth == plain.slice_truth[sequence, position]


def test_an_epoch_has_every_fractured_slice_and_as_many_intact_ones(sequences):
    data = SliceDataset(sequences)
    target = data.target.ravel()
    first, second = data.order(0, seed=1).tolist(), data.order(1, seed=1).tolist()
    fractured, known = set(np.flatnonzero(target == 1)), int((~np.isnan(target)).sum())
    for drawn in (first, second):
        assert fractured <= set(drawn)
        assert len(drawn) == len(set(drawn)) == min(2 * len(fractured), known)
        assert not np.isnan(target[drawn]).any()
    assert first != second
    assert first == data.order(0, seed=1).tolist()


def test_an_epoch_draws_other_intact_slices_by_its_seed_and_mixes_them_with_the_fractured(sequences):
    data = SliceDataset(sequences)
    data.target = np.array([[0, 1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 1]] * 5)  # 15 of 60 are fractured
    target = data.target.ravel()
    orders = [data.order(epoch, seed=seed) for epoch, seed in ((0, 0), (1, 0), (0, 1))]
    intact = [frozenset(order[target[order] == 0]) for order in orders]
    assert [len(drawn) for drawn in intact] == [15] * 3
    assert len(set(intact)) == 3
    assert len(frozenset.union(*intact)) > 25  # of 45
    for order in orders:
        assert 3 < target[order][:15].sum() < 12
    data.target = 1 - data.target
    assert sorted(data.order(0, seed=0)) == list(range(60))  # more fractured than intact: all of them


def test_an_epoch_of_a_size_shows_slices_as_fractured_in_proportion_to_their_targets(sequences):
    data = SliceDataset(sequences, samples=20_000)
    data.target = np.zeros_like(data.target)
    data.target[0], data.target[1, :2], data.target[2, 0] = np.nan, (1, 0.25), 0.75
    order, slices = data.order(0, seed=0), data.target.shape[1]
    shown = np.bincount(order[data.target.ravel()[order] > 0], minlength=data.target.size)
    drawn = shown[[slices, slices + 1, 2 * slices]]
    np.testing.assert_allclose(drawn / 10_000, [1 / 2, 1 / 8, 3 / 8], atol=0.02)
    assert drawn.sum() == shown.sum() == 10_000
    assert not (order < slices).any()  # nothing is known of the first sequence


def test_an_epoch_without_a_size_shows_a_pseudo_label_as_often_as_it_is_probable(sequences):
    data = SliceDataset(sequences)
    data.target = np.zeros((200, 12), np.float32)
    data.target[100:], data.target[100] = 0.25, 1
    order = data.order(0, seed=0)
    shown = order[data.target.ravel()[order] > 0]
    assert {*range(1200, 1212)} <= {*shown.tolist()}
    assert 260 < len(shown) - 12 < 335  # of 1,188, each with a probability of 1/4
    assert len(order) == 2 * len(shown)


def test_a_loader_that_began_before_a_guess_calls_what_was_chosen_fractured(sequences):
    data = SliceDataset(sequences)
    data.target[0] = np.nan  # as a loader's process keeps it
    assert data[1, 0][1] == 1


def test_freezing_reaches_into_the_sequences():
    config = TrainConfig(epochs=4, slice_epochs=1, freeze_epochs=3)
    assert slice_schedule(config).freeze_epochs == 1


def test_a_matched_slice_has_the_vertebra_and_position_of_its_partner(sequences):
    data, slices = SliceDataset(sequences, samples=400, matched=True), tiny_model().slices
    order = data.order(3, seed=1)
    is_fractured = data.target.ravel()[order] == 1
    assert (data.target.ravel()[order[~is_fractured]] == 0).all()

    def places(chosen: np.ndarray) -> np.ndarray:
        return np.sort(sequences.vertebrae[chosen // slices] * slices + chosen % slices)

    fractured, intact = places(order[is_fractured]), places(order[~is_fractured])
    possible = np.isin(fractured, places(np.flatnonzero(data.target.ravel() == 0)))
    np.testing.assert_array_equal(fractured[possible], intact)
    assert len(fractured) == 200


def test_pseudo_labels_hold_the_highest_probabilities_of_a_fractured_vertebra_for_certain(sequences):
    data = SliceDataset(sequences)
    rows = [int(np.flatnonzero(sequences.labels == 1)[0])]
    assert not len(data.unknown())  # the toy cohort marks every slice
    sequences.slice_truth = sequences.slice_truth.copy()
    before = sequences.slice_truth[rows].copy()
    try:
        sequences.slice_truth[rows] = np.nan
        assert data.unknown().tolist() == rows
        probability = np.array([[0.8, 0.9, 1 - 1e-9, 0.45, 0.0009]][:1])[:, : tiny_model().slices]
        inherited = SliceDataset(sequences, inherited=True)
        assert (inherited.target[rows] == 1).all()
        data.guess(np.log(probability / (1 - probability)))
        mean = probability[0, :3].mean()
        expected = [0.8 / mean, 1, 1, 0.45 / mean, 0.0009 / mean]
        np.testing.assert_allclose(data.target[rows[0]], expected, rtol=1e-5)
    finally:
        sequences.slice_truth[rows] = before


def test_the_slice_classifier_is_the_part_of_the_model_that_single_slices_teach(sequences):
    model = FractureClassifier(tiny_model()).eval()
    network, pixels = SliceClassifier(model), sequences[0, 0]["sequence"]
    expected = model(pixels[None]).slice_logit[0]
    torch.testing.assert_close(network(pixels), expected)
    shared = dict(model.named_parameters())
    names = [name for name in shared if name.startswith(("backbone", "mask_encoder", "slice_head"))]
    assert [name for name, _ in network.named_parameters()] == names
    assert all(value is shared[name] for name, value in network.named_parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_is_the_mean_cross_entropy_in_float32(dtype):
    logit, truth = torch.tensor([0.0, 2.0, -3.0]), torch.tensor([1.0, 0.0, 1.0])
    loss = slice_entropy(lambda pixels: pixels.to(dtype), (logit, truth))
    expected = (np.log(2) + np.log1p(np.exp(2)) + np.log1p(np.exp(3))) / 3
    torch.testing.assert_close(loss, torch.tensor(expected, dtype=torch.float32))


def test_slices_of_a_sequence_are_varied_apart_and_reproducibly(sequences):
    once, again, later = (
        [sequences.slice_at(0, position, epoch=epoch) for position in range(4)] for epoch in (0, 0, 1)
    )
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(once, later, strict=True))
    constant = np.full((1, 32, 32, 6), 100, dtype=np.uint8)
    draws = [sequences._augment(constant, seed=(0, 0, 0, position)) for position in range(4)]
    assert any(not np.array_equal(draws[0], draw) for draw in draws)


def test_pretraining_learns_and_is_the_same_each_time(sequences):
    weights, losses = weights_after(sequences, replace(CONFIG, slice_epochs=3))
    assert losses[-1] < losses[0]
    same, _ = weights_after(sequences, replace(CONFIG, slice_epochs=3))
    assert all(torch.equal(weights[name], same[name]) for name in weights)


def test_few_slices_make_one_small_batch_and_still_teach(sequences):
    after, _ = weights_after(sequences, replace(CONFIG, slice_epochs=1, slice_batch_size=500))
    torch.manual_seed(0)
    untouched = FractureClassifier(tiny_model()).state_dict()
    assert not torch.equal(after["slice_head.weight"], untouched["slice_head.weight"])


def test_pretraining_leaves_what_joins_slices_as_it_was(sequences):
    torch.manual_seed(0)
    before = FractureClassifier(tiny_model()).state_dict()
    after, _ = weights_after(sequences, CONFIG)
    for name in before:
        if name.startswith(("lstm", "attention", "head")):
            assert torch.equal(before[name], after[name]), name
    assert not torch.equal(before["slice_head.weight"], after["slice_head.weight"])


def test_the_schedule_is_that_of_the_slices():
    config = replace(CONFIG, schedule="plateau", slice_learning_rate=0.0123, weight_decay=0.07)
    assert slice_schedule(config) == replace(
        config, epochs=4, batch_size=8, learning_rate=0.0123, warmup_epochs=0.6, schedule="cosine"
    )


def test_without_known_fractured_slices_it_says_what_to_do(cohort):
    blind = make(cohort, None)
    for truth, found in (
        (np.nan, "0 fractured of 0"),
        (0, "0 fractured of"),
        (1, f"{blind.slice_truth.size} fr"),
    ):
        blind.slice_truth = np.full_like(blind.slice_truth, truth)
        with pytest.raises(ValueError, match=f"found {found}.* slice_epochs=0"):
            SliceDataset(blind)
