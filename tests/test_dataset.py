import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from toy_cohort import SIZE, SLICES, make_toy_cohort

from cspine_helpers.cohort import read_cohort
from cspine_helpers.dataset import Augment, AugmentConfig, SequenceDataset, collate
from cspine_helpers.labels import UID
from cspine_helpers.packed import open_sequence, sequence_path

OFF = {"flip": 0.0, "affine": 0.0, "contrast": 0.0, "noise": 0.0, "dropout": 0.0}
MAPS = Path("/proc/self/maps")  # of Linux
ALWAYS = AugmentConfig(flip=1, affine=1, contrast=1, noise=1, dropout=1)


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    return read_cohort(make_toy_cohort(tmp_path_factory.mktemp("toy")))


def make(cohort, *, split="train", **options) -> SequenceDataset:
    options = {"manifest": cohort.manifest, **options}
    return SequenceDataset(cohort.samples[split], cohort.packed, slices=SLICES, size=SIZE, **options)


def only(**steps) -> Augment:
    return Augment(AugmentConfig(**{**OFF, **steps}))


def smooth(seed: int = 0, *, size: int = 64) -> np.ndarray:
    """A smooth `(T, H, W, 6)` sequence whose slices and intensity channels are all the same picture."""
    y, x = np.mgrid[:size, :size] / size
    phase = np.random.default_rng(seed).uniform(0, 6)
    picture = 128 + 60 * np.sin(9 * x + phase) * np.cos(7 * y)
    blob = 255 * ((x - 0.4) ** 2 + (y - 0.55) ** 2 < 0.04)
    channels = np.stack([picture] * 5 + [blob], axis=-1).astype(np.uint8)  # (H, W, 6)
    return np.repeat(channels[None], 15, axis=0)


def test_an_item_is_the_packed_sequence_with_channels_first(cohort):
    dataset = make(cohort)
    samples = cohort.samples["train"]
    assert len(dataset) == len(samples)
    item = dataset[9]
    uid, vertebra, label = samples.iloc[9]
    on_disk = open_sequence(sequence_path(cohort.packed, uid, vertebra))
    assert item["sequence"].dtype == torch.uint8
    np.testing.assert_array_equal(item["sequence"].numpy(), on_disk.transpose(0, 3, 1, 2))
    assert (item["label"].item(), item["label"].dtype) == (label, torch.float32)
    assert (item["vertebra"].item(), item["vertebra"].dtype) == (int(vertebra[1]) - 1, torch.int64)
    assert (item["index"].item(), item["index"].dtype) == (9, torch.int64)


def test_slice_truth_comes_from_the_manifest_and_is_nan_without_one(cohort):
    labels = cohort.samples["train"]["label"].to_numpy()
    dataset = make(cohort)
    expected = np.where(labels[:, None] == 1, [0, 1, 1, 0, 0], 0)
    np.testing.assert_array_equal(dataset.slice_truth, expected)
    np.testing.assert_array_equal(dataset[3]["slice_truth"].numpy(), expected[3])
    assert make(cohort, manifest=None)[3]["slice_truth"].isnan().all()


def test_samples_that_the_manifest_lacks_are_named(cohort):
    gone = cohort.samples["train"].iloc[4]
    short = cohort.manifest.query(f"not ({UID} == @gone.{UID} and vertebra == 'C5')")
    with pytest.raises(ValueError, match=f"1 samples are not in the manifest: '{gone[UID]} C5'"):
        make(cohort, manifest=short)


def test_samples_without_rows_or_columns_are_refused(cohort):
    samples = cohort.samples["train"]
    with pytest.raises(ValueError, match="no samples"):
        SequenceDataset(samples.iloc[:0], cohort.packed, slices=SLICES, size=SIZE)
    with pytest.raises(ValueError, match="'label'"):
        SequenceDataset(samples.drop(columns="label"), cohort.packed, slices=SLICES, size=SIZE)


def test_a_sequence_of_another_shape_is_refused_by_name(cohort):
    dataset = SequenceDataset(cohort.samples["train"], cohort.packed, slices=SLICES, size=48)
    with pytest.raises(ValueError, match=r"_1.npy .* expected \(5, 48, 48, 6\)"):
        dataset[0]


@pytest.mark.parametrize("step", ["flip", "affine", "contrast", "noise", "dropout"])
@pytest.mark.parametrize("seed", range(4))
def test_every_step_is_one_draw_for_the_whole_sequence(step, seed):
    sequence = smooth(seed)
    varied = only(**{step: 1.0})(sequence, seed=(seed,))
    assert varied.shape == sequence.shape
    assert varied.dtype == np.uint8
    assert not np.array_equal(varied, sequence)
    assert (varied == varied[:1]).all()  # equal slices stay equal
    if step != "noise":  # noise differs from channel to channel
        assert (varied[..., :5] == varied[..., :1]).all()
    if step in ("contrast", "noise", "dropout"):
        np.testing.assert_array_equal(varied[..., 5], sequence[..., 5])


@pytest.mark.parametrize("seed", range(6))
def test_the_mask_moves_with_the_image_and_stays_binary(seed):
    sequence = smooth()
    sequence[..., 2] = sequence[..., 5]  # the mask as a picture
    varied = only(flip=0.5, affine=1.0)(sequence, seed=(seed,))
    assert set(np.unique(varied[..., 5])) == {0, 255}
    differs = (varied[..., 2] > 127) != (varied[..., 5] > 127)
    outline = (varied[..., 5] > 127)[0].astype(int)
    edge = np.abs(np.diff(outline, axis=0)).sum() + np.abs(np.diff(outline, axis=1)).sum()
    assert differs[0].sum() <= 0.3 * edge  # nearest against linear: pixels on the outline only


@pytest.mark.parametrize("step", ["flip", "affine", "contrast", "noise", "dropout"])
@pytest.mark.parametrize("seed", range(4))
def test_every_step_does_what_albumentations_would_with_the_same_draw(step, seed):
    sequence = np.stack([smooth(phase, size=48)[0] for phase in range(5)])  # slices that differ
    augment = only(**{step: 1.0})
    varied = augment(sequence, seed=(seed,))
    (ours,) = (each for each in augment._compose.transforms if each.params)
    params, theirs = dict(ours.params), type(ours).__bases__[-1]
    assert theirs.__module__.startswith("albumentations")
    if step == "noise":
        params["noise_map"] = params["brighter"][..., :5].astype(np.float32) - params["darker"][..., :5]
    for result, image in zip(varied, sequence, strict=True):
        expected = theirs.apply(ours, image[..., :5].copy(), **params)
        difference = np.abs(result[..., :5].astype(int) - expected)
        assert difference.max() <= {"affine": 8, "contrast": 1}.get(step, 0)  # rounding
        assert difference.mean() < 0.6
        mask = image[..., 5].copy()
        if step == "affine":
            mask = theirs.apply_to_mask(ours, mask, **params)  # nearest pixels; ours is interpolated
        if step == "flip":
            mask = theirs.apply(ours, mask)
        assert (result[..., 5] != mask).mean() <= (0.01 if step == "affine" else 0)


def test_noise_has_mean_zero_and_a_spread_within_its_limit():
    grey = np.full((1, 128, 128, 6), 128, np.uint8)
    augment = only(noise=1.0, noise_std=0.04)
    noise = np.stack([augment(grey, seed=(seed,))[0, ..., :5].astype(int) - 128 for seed in range(40)])
    spreads = noise.std(axis=(1, 2, 3)) / 255
    assert np.abs(noise.mean(axis=(1, 2, 3))).max() < 0.2
    assert spreads.min() < 0.008 < 0.032 < spreads.max() < 0.041  # uniform up to the limit


def test_noise_and_contrast_stop_at_black_and_white():
    sequence = np.zeros((2, 32, 32, 6), np.uint8)
    sequence[:, :16] = 255
    config = AugmentConfig(**{**OFF, "noise": 1.0, "contrast": 1.0, "noise_std": 0.04})
    for seed in range(8):
        varied = Augment(config)(sequence, seed=(seed,))[..., :5].astype(int)
        assert varied[:, :16].min() > 128 > varied[:, 16:].max()  # nothing wraps around


def test_a_draw_that_changes_nothing_copies_the_sequence():
    sequence = smooth(size=32)
    varied = only()(sequence, seed=(0,))
    np.testing.assert_array_equal(varied, sequence)
    assert not np.shares_memory(varied, sequence)


def test_a_sequence_is_varied_into_the_place_it_is_given():
    place = np.zeros((15, 32, 32, 6), np.uint8)
    sequence = smooth(size=32)
    assert Augment(ALWAYS)(sequence, seed=(0,), out=place) is place
    np.testing.assert_array_equal(place, Augment(ALWAYS)(sequence, seed=(0,)))
    np.testing.assert_array_equal(sequence, smooth(size=32))  # which is left as it was


@pytest.mark.parametrize("slices", [1, 2, 5])
def test_any_number_of_slices_and_sides_of_any_length_can_be_varied(slices):
    sequence = np.random.default_rng(1).integers(0, 256, (slices, 21, 34, 6), dtype=np.uint8)
    sequence[..., 5] = 255 * (sequence[..., 5] > 127)
    varied = Augment(ALWAYS)(sequence, seed=(2,))
    assert (varied.shape, varied.dtype) == (sequence.shape, np.uint8)


def test_a_flip_exchanges_left_and_right():
    sequence = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 6), dtype=np.uint8)
    np.testing.assert_array_equal(only(flip=1.0)(sequence, seed=(0,)), sequence[:, :, ::-1])


def test_dropout_blackens_holes_in_every_slice_and_channel():
    varied = only(dropout=1.0)(np.full((3, 64, 64, 6), 200, np.uint8), seed=(1,))
    black = varied[..., :5] == 0
    assert 0 < black.mean() < 0.1
    assert (varied[..., :5][~black] == 200).all()


def test_steps_are_drawn_independently():
    sequence = smooth(size=32)
    augment = Augment(AugmentConfig(**{**OFF, "flip": 0.5, "noise": 0.5}))
    seen = []
    for seed in range(200):
        varied = augment(sequence, seed=(seed,))
        seen.append((varied[0, 0, 0, 5], np.array_equal(varied[..., 5], sequence[..., 5]), varied))
    flipped = np.array([not same for _, same, _ in seen])
    noisy = np.array([(varied[0, ..., 0] != varied[0, ..., 1]).any() for *_, varied in seen])
    assert 70 < flipped.sum() < 130
    assert 70 < noisy.sum() < 130
    assert 30 < (flipped & noisy).sum() < 70  # a shared seed would give all or nothing


def test_the_same_seed_epoch_and_index_give_the_same_item_and_others_differ(cohort):
    one, two = (make(cohort, augment=ALWAYS, seed=3) for _ in range(2))
    first = one[4]["sequence"]
    assert not torch.equal(two[1, 4]["sequence"], first)
    assert torch.equal(two[4]["sequence"], first)
    assert torch.equal(two[0, 4]["sequence"], first)
    assert torch.equal(two[1, 4]["sequence"], one[1, 4]["sequence"])
    assert not torch.equal(make(cohort, augment=ALWAYS, seed=4)[4]["sequence"], first)


def test_a_slice_has_a_draw_of_its_own_for_its_seed_epoch_index_and_position(cohort):
    one, two = (make(cohort, augment=ALWAYS, seed=3) for _ in range(2))
    first = one.slice_at(4, 2)
    assert torch.equal(two.slice_at(4, 2, epoch=0), first)
    others = [two.slice_at(4, 2, epoch=1), two.slice_at(4, 3), one[4]["sequence"][2]]
    assert all(other.shape == first.shape == (6, SIZE, SIZE) for other in others)
    assert not any(torch.equal(other, first) for other in others)
    plain = make(cohort)
    assert torch.equal(plain.slice_at(4, 2, epoch=1), plain[4]["sequence"][2])


def test_validation_items_are_left_as_they_are_in_every_epoch(cohort):
    dataset = make(cohort, split="validation")
    assert torch.equal(dataset[7, 0]["sequence"], dataset[0]["sequence"])


@pytest.mark.parametrize("augment", [None, ALWAYS])
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_the_items_stacked_with_channels_last_in_memory(cohort, augment, workers):
    dataset = make(cohort, augment=augment)
    keys = [[(1, 3), (1, 0), (1, 8)], [(2, 3)]]
    loader = DataLoader(dataset, batch_sampler=keys, num_workers=workers, collate_fn=collate)
    for batch, wanted in zip(loader, keys, strict=True):
        items = [dataset[key] for key in wanted]
        for name in items[0]:
            assert torch.equal(batch[name], torch.stack([item[name] for item in items]))
        assert batch["sequence"].shape == (len(wanted), SLICES, 6, SIZE, SIZE)
        assert batch["sequence"].permute(0, 1, 3, 4, 2).is_contiguous()
        assert items[0]["sequence"].permute(0, 2, 3, 1).is_contiguous()
        assert batch["sequence"].flatten(0, 1).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="memory is pinned for a CUDA device")
def test_pinned_batches_and_those_on_a_gpu_keep_their_layout_in_memory(cohort):
    dataset = make(cohort)
    for batch in DataLoader(dataset, batch_size=4, num_workers=2, collate_fn=collate, pin_memory=True):
        pixels = batch["sequence"]
        assert pixels.is_pinned()
        assert pixels.permute(0, 1, 3, 4, 2).is_contiguous()
        assert pixels.to("cuda", non_blocking=True).stride() == pixels.stride()


def test_a_dataset_sent_to_a_worker_gives_the_same_items(cohort):
    dataset = make(cohort, augment=ALWAYS, seed=2)
    sent = pickle.loads(pickle.dumps(dataset))
    assert torch.equal(sent[3, 5]["sequence"], dataset[3, 5]["sequence"])


def test_files_are_only_read(cohort):
    paths = sorted(cohort.packed.iterdir())
    before = [path.read_bytes() for path in paths]
    for augment in (None, AugmentConfig(**OFF), ALWAYS):
        item = make(cohort, augment=augment)[0]["sequence"]
        item += 1
    assert [path.read_bytes() for path in paths] == before


@pytest.mark.skipif(not MAPS.is_file(), reason="the system does not list its mapped files")
def test_files_are_held_no_longer_than_an_item_is_made(cohort):
    file = sequence_path(cohort.packed, cohort.samples["train"][UID].iloc[0], "C1")
    mapped = open_sequence(file)
    assert str(file) in MAPS.read_text()
    del mapped
    for augment in (None, AugmentConfig(**OFF), ALWAYS):
        dataset = make(cohort, augment=augment)
        _batch = dataset.__getitems__([0, 1, 2]), dataset.slice_at(0, 1)
        assert str(cohort.packed) not in MAPS.read_text()


def test_impossible_augmentation_settings_are_all_named():
    with pytest.raises(ValueError, match=r"flip = 2 .*rotate_degrees = -1 .*holes = 0"):
        AugmentConfig(flip=2, rotate_degrees=-1, holes=0)
