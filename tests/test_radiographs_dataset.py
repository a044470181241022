import json

import numpy as np
import pytest
import torch
from radiograph_folders import SMALL
from torch.utils.data import DataLoader

from cspine_helpers.radiographs.augment import ImageAugment
from cspine_helpers.radiographs.dataset import RadiographDataset, image_loader, image_order
from cspine_helpers.radiographs.image_table import read_images
from cspine_helpers.radiographs.packing import pack_images

# Items.


def test_without_augmentation_items_are_as_packed_in_every_epoch(packed):
    table = read_images(packed.parent)
    dataset = RadiographDataset(table, packed)
    for index, row in enumerate(table.itertuples()):
        item = dataset[7, index]
        pixels = np.load(packed / "images" / f"{row.image}.npy")
        np.testing.assert_array_equal(item["image"], pixels)
        mask = np.zeros_like(pixels)
        if row.label:
            mask = np.load(packed / "masks" / f"{row.image}.npy")
        cells = mask.reshape(pixels.shape[0] // 4, 4, -1, 4).mean(axis=(1, 3))
        assert np.abs(item["mask"].numpy() - cells).max() <= 0.5
        assert item["label"] == row.label
        assert item["index"] == index
        assert item["annotated"]
        assert torch.equal(dataset[index]["image"], item["image"])


def test_a_mask_has_any_stride_that_divides_the_frame(packed):
    table = read_images(packed.parent)
    whole = RadiographDataset(table, packed, stride=1)[0]["mask"]
    assert whole.shape == (96, 64)
    assert set(whole.unique().tolist()) == {0, 255}
    with pytest.raises(ValueError, match="stride of masks divides all sides of an image; found 5"):
        RadiographDataset(table, packed, stride=5)


def test_variation_depends_on_seed_epoch_and_index_alone(packed):
    table = read_images(packed.parent)
    make = [RadiographDataset(table, packed, augment=ImageAugment(), seed=seed) for seed in (1, 1, 2)]
    one, again, other = (dataset[3, 0]["image"] for dataset in make)
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert not torch.equal(one, make[0][4, 0]["image"])
    together = make[0].__getitems__([(3, 1), (3, 0)])["image"][1]
    assert torch.equal(together, one)


def test_a_fracture_without_an_outline_is_not_annotated_and_refused_where_patches_need_it(own_packed):
    annotations = json.loads((own_packed.parent / "annotations.json").read_text())
    lost = annotations["annotations"].pop()["image_id"]
    annotations["annotations"] = [each for each in annotations["annotations"] if each["image_id"] != lost]
    (own_packed.parent / "annotations.json").write_text(json.dumps(annotations))
    pack_images(own_packed.parent, SMALL)
    table = read_images(own_packed.parent)
    dataset = RadiographDataset(table, own_packed)
    (index,) = np.flatnonzero(~dataset.annotated)
    item = dataset[int(index)]
    assert item["label"] == 1
    assert not item["annotated"]
    assert item["mask"].max() == 0
    name = table["image"][index]
    with pytest.raises(ValueError, match=f"1 fractured images have no outline.*'{name}'. Leave them out"):
        RadiographDataset(table, own_packed, patch=32)


def test_a_file_that_is_cut_off_after_the_check_is_named(own_packed):
    table = read_images(own_packed.parent)
    dataset = RadiographDataset(table, own_packed)
    path = own_packed / "images" / f"{table['image'][0]}.npy"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="is not whole any more"):
        dataset[0]
    with pytest.raises(ValueError, match=r"1 of 24 packed images in .*\(not whole\)"):
        RadiographDataset(table, own_packed)


def test_no_images_are_refused(packed):
    with pytest.raises(ValueError, match="There are no images"):
        RadiographDataset(read_images(packed.parent).iloc[:0], packed)
    with pytest.raises(ValueError, match=r"lacks the column\(s\) 'label'"):
        RadiographDataset(read_images(packed.parent).drop(columns="label"), packed)


# Patches.


@pytest.mark.parametrize("augment", [None, ImageAugment()])
def test_a_fractured_patch_always_shows_fracture_and_all_patches_are_of_the_asked_size(packed, augment):
    dataset = RadiographDataset(read_images(packed.parent), packed, augment=augment, patch=32)
    for epoch in range(12):
        batch = dataset.__getitems__([(epoch, index) for index in range(24)])
        assert batch["image"].shape == (24, 32, 32)
        assert batch["mask"].shape == (24, 8, 8)
        shown = batch["mask"].flatten(1).amax(1) > 0
        assert torch.equal(shown, batch["label"] == 1)


def test_patches_of_intact_images_are_cut_out_about_the_models_false_marks(packed):
    dataset = RadiographDataset(read_images(packed.parent), packed, patch=32)
    intact = int(np.flatnonzero(dataset.labels == 0)[0])
    whole = RadiographDataset(read_images(packed.parent), packed)[intact]["image"].numpy()
    windows = np.lib.stride_tricks.sliding_window_view(whole, (32, 32))
    dataset.focus[intact] = torch.tensor([12.0, 80.0])
    for epoch in range(10):
        patch = dataset[epoch, intact]["image"].numpy()
        ((top, left),) = np.argwhere((windows == patch).all(axis=(2, 3)))
        assert top <= 80 < top + 32
        assert left <= 12 < left + 32
    fractured = int(np.flatnonzero(dataset.labels == 1)[0])
    dataset.focus[fractured] = torch.tensor([0.0, 0.0])
    assert all(dataset[epoch, fractured]["mask"].max() > 0 for epoch in range(10))


@pytest.mark.parametrize("patch", [16, 48, 96])
def test_patches_that_no_network_or_frame_takes_are_refused(packed, patch):
    with pytest.raises(ValueError, match=f"multiple of 32 from 32 to 64, .*found {patch}"):
        RadiographDataset(read_images(packed.parent), packed, patch=patch)


# Order and batches.


def test_an_epoch_shows_each_fracture_once_and_as_many_intact_ones():
    labels = (np.arange(500) < 40).astype(int)
    seen = np.zeros(500, int)
    for epoch in range(200):
        order = image_order(labels, seed=1, epoch=epoch)
        assert len(order) == len(set(order)) == 80
        assert labels[order].sum() == 40
        seen[order] += 1
    assert (seen[:40] == 200).all()
    np.testing.assert_allclose(seen[40:].mean(), 200 * 40 / 460)
    assert seen[40:].min() > 4
    np.testing.assert_array_equal(image_order(labels, seed=1, epoch=3), image_order(labels, seed=1, epoch=3))
    assert not np.array_equal(image_order(labels, seed=1, epoch=3), image_order(labels, seed=2, epoch=3))
    assert len(image_order(labels, intact=3, seed=1, epoch=0)) == 160
    assert len(image_order(labels, intact=30, seed=1, epoch=0)) == 500  # there are no more
    assert len(image_order(labels, intact=0.001, seed=1, epoch=0)) == 41  # one at least
    assert sorted(image_order(labels, intact=None, seed=1, epoch=0)) == list(range(500))


def test_heavier_intact_images_are_drawn_more_often_and_those_of_weight_0_never():
    labels, weights = (np.arange(500) < 40).astype(int), np.ones(500)
    weights[40:60], weights[60:80] = 5, 0
    seen = np.zeros(500, int)
    for epoch in range(100):
        seen[image_order(labels, weights=weights, seed=1, epoch=epoch)] += 1
    assert seen[60:80].max() == 0
    assert 3.5 < seen[40:60].mean() / seen[80:].mean() < 5


@pytest.mark.parametrize("label", [0, 1])
def test_an_epoch_of_one_class_is_refused_unless_all_images_are_asked_for(label):
    labels = np.full(5, label)
    with pytest.raises(ValueError, match=f"found {5 * label} fractured and {5 - 5 * label} intact ones"):
        image_order(labels, seed=0, epoch=0)
    assert len(image_order(labels, intact=None, seed=0, epoch=0)) == 5


@pytest.mark.parametrize("options", [{}, {"accumulate": 2}, {"processes": 2}])
def test_training_batches_have_one_orientation_and_steps_the_sizes_that_are_announced(packed, options):
    dataset = RadiographDataset(read_images(packed.parent), packed)
    shares = range(options.get("processes", 1))
    loaders = [
        image_loader(dataset, batch_size=3, training=True, seed=5, process=share, **options)
        for share in shares
    ]
    steps = set()
    for epoch in (1, 2, 3):
        batches = []
        for loader in loaders:
            loader.batch_sampler.set_epoch(epoch)
            batches.append(list(loader))
        sampler = loaders[0].batch_sampler
        steps.add(len(sampler.step_sizes))
        assert {tuple(batch["image"].shape[1:]) for share in batches for batch in share} == {
            (96, 64),
            (64, 96),
        }
        seen = np.concatenate([batch["index"] for share in batches for batch in share])
        assert sorted(seen) == sorted(image_order(dataset.labels, seed=5, epoch=epoch))
        sizes = np.sum([[len(batch["label"]) for batch in share] for share in batches], axis=0)
        assert sizes.reshape(-1, sampler.accumulate).sum(axis=1).tolist() == sampler.step_sizes
        assert sizes.max() <= 3 * len(shares)
    assert len(steps) == 1  # however many portraits an epoch draws


def test_weights_that_change_between_epochs_change_what_is_drawn(packed):
    dataset = RadiographDataset(read_images(packed.parent), packed)
    loader = image_loader(dataset, batch_size=4, training=True)
    hard = np.flatnonzero(dataset.labels == 0)[:8]
    dataset.weights[:] = 0
    dataset.weights[hard] = 1
    loader.batch_sampler.set_epoch(1)
    seen = np.concatenate([batch["index"] for batch in loader])
    assert set(seen[dataset.labels[seen] == 0]) == set(hard)


def test_evaluation_shows_every_image_once_whatever_the_processes(packed):
    dataset = RadiographDataset(read_images(packed.parent), packed)
    alone = [batch["index"].tolist() for batch in image_loader(dataset, batch_size=5)]
    shared = [
        [batch["index"].tolist() for batch in image_loader(dataset, batch_size=5, process=p, processes=2)]
        for p in range(2)
    ]
    assert sorted(index for batch in alone for index in batch) == list(range(24))
    assert sorted(alone) == sorted(batch for share in shared for batch in share)


def test_a_plain_loader_over_both_orientations_is_told_which_to_use(packed):
    dataset = RadiographDataset(read_images(packed.parent), packed)
    with pytest.raises(ValueError, match="A batch holds images of one orientation: load them with image_loa"):
        next(iter(DataLoader(dataset, batch_size=24)))


@pytest.mark.parametrize("wrong", [{"batch_size": 0}, {"batch_size": 1, "workers": -1}])
def test_a_batch_without_an_image_or_fewer_workers_than_none_are_refused(packed, wrong):
    with pytest.raises(ValueError, match="A batch holds 1 image or more, and 0 workers or more load it"):
        image_loader(RadiographDataset(read_images(packed.parent), packed), **wrong)


@pytest.mark.slow
def test_workers_load_the_same_batches_and_know_a_changed_focus(packed):
    loaders = [
        image_loader(
            RadiographDataset(read_images(packed.parent), packed, augment=ImageAugment(), patch=32),
            batch_size=4,
            training=True,
            workers=workers,
        )
        for workers in (0, 2)
    ]
    for epoch in (1, 2):
        for loader in loaders:
            loader.batch_sampler.set_epoch(epoch)
            loader.dataset.focus[:] = torch.tensor([20.0, 30.0 * epoch])  # its processes began before
        for one, other in zip(*loaders, strict=True):
            assert one.keys() == other.keys()
            assert all(torch.equal(one[name], other[name]) for name in one)
