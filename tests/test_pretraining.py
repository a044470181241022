from dataclasses import replace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from toy_cohort import make_toy_cohort, tiny_model

from cspine_helpers.cohort import read_cohort
from cspine_helpers.dataset import AugmentConfig, SequenceDataset
from cspine_helpers.model import FractureClassifier
from cspine_helpers.pretraining import SliceDataset, pretrain
from cspine_helpers.recipe import TrainConfig

CONFIG = TrainConfig(slice_epochs=4, slice_batch_size=8, workers=0)


@pytest.fixture(scope="module")
def sequences(tmp_path_factory) -> SequenceDataset:
    cohort = read_cohort(make_toy_cohort(tmp_path_factory.mktemp("toy") / "toy"))
    model = tiny_model()
    return SequenceDataset(
        cohort.samples["train"],
        cohort.packed,
        slices=model.slices,
        size=model.size,
        manifest=cohort.manifest,
        augment=AugmentConfig(),
    )


def weights_after(sequences: SequenceDataset, config: TrainConfig) -> tuple[dict, list[float]]:
    torch.manual_seed(0)
    model = FractureClassifier(tiny_model())
    losses = pretrain(Accelerator(cpu=True), model, sequences, config)
    return model.state_dict(), losses


def test_items_are_the_slices_of_known_truth(sequences):
    data = SliceDataset(sequences)
    assert len(data) == np.isfinite(sequences.slice_truth).sum()
    plain = SliceDataset(replace_augment(sequences))
    sequence, position = np.argwhere(~np.isnan(sequences.slice_truth))[5]
    pixels, truth = plain[5]
    torch.testing.assert_close(pixels, replace_augment(sequences)[sequence]["sequence"][position])
    assert truth == sequences.slice_truth[sequence, position]


def replace_augment(sequences: SequenceDataset) -> SequenceDataset:
    twin = SequenceDataset.__new__(SequenceDataset)
    twin.__dict__.update(sequences.__dict__, _augment=None)
    return twin


def test_an_epoch_has_every_fractured_slice_and_as_many_intact_ones(sequences):
    data = SliceDataset(sequences)
    first, second = data.draw(0, seed=1), data.draw(1, seed=1)
    fractured = set(np.flatnonzero(data.truth == 1))
    for drawn in (first, second):
        assert fractured <= set(drawn)
        assert len(drawn) == len(set(drawn)) == min(2 * len(fractured), len(data))
    assert first != second
    assert first == data.draw(0, seed=1)


def test_slices_of_a_sequence_are_varied_apart_and_reproducibly(sequences):
    sequences.set_epoch(0)
    once = [sequences.slice_at(0, position) for position in range(4)]
    again = [sequences.slice_at(0, position) for position in range(4)]
    for a, b in zip(once, again, strict=True):
        torch.testing.assert_close(a, b)
    constant = np.repeat(sequences[0]["sequence"][:1].permute(0, 2, 3, 1).numpy(), 4, axis=0)
    draws = [sequences._augment(constant[:1], seed=(0, 0, 0, position)) for position in range(4)]
    assert any(not np.array_equal(draws[0], draw) for draw in draws)
    sequences.set_epoch(1)
    assert any(not torch.equal(a, sequences.slice_at(0, i)) for i, a in enumerate(once))


def test_pretraining_learns_and_is_the_same_each_time(sequences):
    weights, losses = weights_after(sequences, replace(CONFIG, slice_epochs=8))
    assert losses[-1] < losses[0]
    same, _ = weights_after(sequences, replace(CONFIG, slice_epochs=8))
    assert all(torch.equal(weights[name], same[name]) for name in weights)


def test_few_slices_make_one_small_batch_and_still_teach(sequences):
    before, _ = weights_after(sequences, replace(CONFIG, slice_epochs=1, slice_batch_size=500))
    torch.manual_seed(0)
    untouched = FractureClassifier(tiny_model()).state_dict()
    assert not torch.equal(before["slice_head.weight"], untouched["slice_head.weight"])


def test_pretraining_leaves_what_joins_slices_as_it_was(sequences):
    torch.manual_seed(0)
    before = FractureClassifier(tiny_model()).state_dict()
    after, _ = weights_after(sequences, CONFIG)
    for name in before:
        joined = name.startswith(("lstm", "attention", "head"))
        if joined:
            assert torch.equal(before[name], after[name]), name
    assert not torch.equal(before["slice_head.weight"], after["slice_head.weight"])


def test_without_known_fractured_slices_it_says_what_to_do(sequences):
    blind = replace_augment(sequences)
    blind.slice_truth = np.full_like(sequences.slice_truth, np.nan)
    with pytest.raises(ValueError, match="slice_epochs=0"):
        weights_after(blind, CONFIG)
