import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from toy_cohort import SIZE, SLICES, make_toy_cohort

from cspine_helpers.cohort import read_cohort
from cspine_helpers.dataset.augment import AugmentConfig
from cspine_helpers.dataset.sequence import SequenceDataset, collate
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
    named = SequenceDataset(samples, str(cohort.packed), slices=SLICES, size=SIZE)
    assert torch.equal(named[9]["sequence"], item["sequence"])


@pytest.mark.parametrize("augment", [None, ALWAYS])
def test_masks_of_0_and_1_make_the_items_of_masks_of_0_and_255(tmp_path, augment):
    cohort = read_cohort(make_toy_cohort(tmp_path))
    expected = make(cohort, augment=augment)[9]["sequence"].clone()
    path = sequence_path(cohort.packed, *cohort.samples["train"].iloc[9, :2])
    array = np.load(path)
    array[..., 5] = array[..., 5] > 127
    np.save(path, array)
    assert torch.equal(make(cohort, augment=augment)[9]["sequence"], expected)


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
