import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import REAL_DATA
from PIL import Image
from radiograph_folders import radiograph_cohort
from scipy import ndimage
from torch.utils.data import DataLoader

from cspine_helpers.radiographs import dataset as room
from cspine_helpers.radiographs.annotations import rasterise
from cspine_helpers.radiographs.dataset import (
    ImageAugment,
    ImagePackConfig,
    RadiographDataset,
    Variation,
    image_loader,
    image_order,
    pack_images,
    read_packing,
)
from cspine_helpers.radiographs.images import Frame, read_radiograph
from cspine_helpers.radiographs.sources import consolidate, read_fracatlas, read_images, read_regions

FRACATLAS = REAL_DATA / "fracatlas"
needs_fracatlas = pytest.mark.skipif(not FRACATLAS.is_dir(), reason=f"FracAtlas is not at {FRACATLAS}")
SMALL = ImagePackConfig(long=96, short=64)
OFF = {"flip": 0, "vertical_flip": 0, "affine": 0, "gamma": 0, "contrast": 0, "noise": 0, "blur": 0}
FIXED = {"rotate_degrees": 0, "shrink": 0, "enlarge": 0, "shift": 0}


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Path:
    return pack_images(radiograph_cohort(tmp_path_factory.mktemp("radiographs")), SMALL)


@pytest.fixture
def own(packed, tmp_path) -> Path:
    """A packed cohort that a test may damage."""
    return shutil.copytree(packed.parent, tmp_path / "cohort", symlinks=True) / "packed"


def table_of(packed: Path) -> pd.DataFrame:
    return read_images(packed.parent)


def only(**steps) -> Variation:
    return Variation(ImageAugment(**{**OFF, **steps}))


# Packing.


def test_a_packed_radiograph_is_its_frame_and_masks_are_its_outlines_there(packed):
    table, regions = table_of(packed), read_regions(packed.parent)
    assert sorted(path.stem for path in (packed / "images").iterdir()) == table["image"].tolist()
    marked = [image for image, polygons in regions.items() if polygons]
    assert sorted(path.stem for path in (packed / "masks").iterdir()) == sorted(marked)
    for row in table.itertuples():
        frame = Frame.of(row.height, row.width, long=96, short=64)
        pixels = np.load(packed / "images" / f"{row.image}.npy")
        np.testing.assert_array_equal(pixels, frame.pixels(read_radiograph(packed.parent / row.file)))
        assert pixels.shape == ((96, 64) if row.height >= row.width else (64, 96))
        if regions[row.image]:
            mask = np.load(packed / "masks" / f"{row.image}.npy")
            assert set(np.unique(mask)) == {0, 255}
            # oracle: drawn in the radiograph's own pixels, and that picture brought into the frame
            drawn = frame.pixels(255 * rasterise(regions[row.image], row.height, row.width))
            assert np.abs(mask.astype(float) - drawn).mean() < 0.25 * mask.mean() + 0.5


@needs_fracatlas
def test_masks_of_fracatlas_lie_where_its_boxes_of_another_format_do(tmp_path):
    # IMG0002588 and IMG0002628 are turned by their EXIF orientation
    fractured = ["IMG0002588", "IMG0002628", "IMG0000019", "IMG0000025"]
    published, own = FRACATLAS, tmp_path / "published"
    table = pd.read_csv(published / "dataset.csv", dtype=str)
    chosen = table[table["image_id"].isin([f"{name}.jpg" for name in [*fractured, "IMG0000000"]])]
    for name, label in zip(chosen["image_id"], chosen["fractured"], strict=True):
        place = f"images/{'Fractured' if label == '1' else 'Non_fractured'}/{name}"
        (own / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(published / place, own / place)
    chosen.to_csv(own / "dataset.csv", index=False)
    (outlines,) = (published / "Annotations" / "VGG JSON").iterdir()
    (own / "Annotations" / "VGG JSON").mkdir(parents=True)
    kept = {
        key: each for key, each in json.loads(outlines.read_text()).items() if _is_one_of(each, fractured)
    }
    (own / "Annotations" / "VGG JSON" / outlines.name).write_text(json.dumps(kept))
    consolidate([read_fracatlas(own)], tmp_path / "cohort")
    packed = pack_images(tmp_path / "cohort", ImagePackConfig(long=384, short=320))
    dataset = RadiographDataset(read_images(packed.parent), packed, stride=1)
    rows = {row.image: (n, row) for n, row in enumerate(read_images(packed.parent).itertuples())}
    assert dataset.labels.sum() == 4
    for name in fractured:
        index, row = rows[name]
        lines = (published / "Annotations" / "YOLO" / f"{name}.txt").read_text().splitlines()
        boxes = np.array([line.split()[1:] for line in lines], float)  # middle and size, shares of the image
        sizes = np.array([row.width, row.height])
        corners = np.concatenate([(boxes[:, :2] + sign * boxes[:, 2:] / 2) * sizes for sign in (-1, 1)])
        frame = Frame.of(row.height, row.width, long=384, short=320)
        low, high = (find(frame.points(corners), axis=0) for find in (np.min, np.max))
        y, x = np.nonzero(dataset[index]["mask"].numpy())
        assert np.abs([x.min() - low[0], y.min() - low[1]]).max() <= 4
        assert np.abs([x.max() + 1 - high[0], y.max() + 1 - high[1]]).max() <= 4


def _is_one_of(each: dict, names: list[str]) -> bool:
    return each["filename"].removesuffix(".jpg") in names


def test_packing_again_writes_nothing_and_a_stopped_packing_goes_on(own):
    whole = {path: path.read_bytes() for path in own.rglob("*.npy")}
    first, second, *_ = sorted((own / "images").iterdir())
    mask = sorted((own / "masks").iterdir())[-1]
    first.unlink()
    for path in (second, mask):
        path.write_bytes(whole[path][:-1])  # as after a power failure
    before = {path: path.stat().st_mtime_ns for path in own.rglob("*.npy")}
    pack_images(own.parent, SMALL)
    assert {path: path.read_bytes() for path in own.rglob("*.npy")} == whole
    again = {path.stem for path in whole if path.stat().st_mtime_ns != before.get(path)}
    assert again == {first.stem, second.stem, mask.stem}


def test_another_frame_or_another_packing_begins_from_nothing(own, monkeypatch):
    pack_images(own.parent, ImagePackConfig(long=64, short=64))
    assert {np.load(path).shape for path in (own / "images").iterdir()} == {(64, 64)}
    with monkeypatch.context() as patch:
        patch.setattr(room, "PACKING_VERSION", 99)
        with pytest.raises(ValueError, match=r"was packed by another version of the package. Now pack the"):
            read_packing(own)
        (own / "images" / "left.npy").touch()
        pack_images(own.parent, SMALL)
        assert not (own / "images" / "left.npy").exists()
        assert read_packing(own)["packing"] == 99


def test_packing_of_other_images_or_outlines_is_noticed(own):
    folder = own.parent
    RadiographDataset(table_of(own), own)
    annotations = json.loads((folder / "annotations.json").read_text())
    annotations["annotations"][0]["segmentation"][0][0] += 1
    (folder / "annotations.json").write_text(json.dumps(annotations))
    with pytest.raises(ValueError, match=r"was packed with other outlines than annotations.json holds. Now"):
        RadiographDataset(table_of(own), own)
    table = pd.read_csv(folder / "images.csv")
    table.loc[0, "sha256"] = "0" * 64
    table.to_csv(folder / "images.csv", index=False)
    with pytest.raises(ValueError, match=r"of other images than images.csv lists and with other outlines"):
        read_packing(own)
    pack_images(folder, SMALL)
    assert read_packing(own)["frame"] == {"long": 96, "short": 64}


def test_another_split_or_patient_leaves_the_packing_valid(own):
    table = pd.read_csv(own.parent / "images.csv")
    table["split"] = "train"
    table.to_csv(own.parent / "images.csv", index=False)
    assert read_packing(own)["packing"] == room.PACKING_VERSION


def test_damaged_images_are_named_and_the_others_packed(own):
    folder, table = own.parent, table_of(own)
    shutil.rmtree(own)
    paths = [folder / file for file in table["file"][:3]]
    whole = [path.read_bytes() for path in paths]
    for path in paths:
        path.unlink()  # a link to the published folder, which stays as it is
    paths[0].write_bytes(whole[0][: len(whole[0]) // 2])
    paths[1].write_bytes(b"")
    Image.fromarray(np.arange(2000, dtype=np.uint8).reshape(40, 50)).save(paths[2])
    with pytest.raises(ValueError, match="3 of 24 images cannot be packed: ") as error:
        pack_images(folder, SMALL)
    assert all(f"{image} (" in str(error.value) for image in table["image"][:3])
    assert "it has 40 × 50 pixels, images.csv says 160 × 128" in str(error.value)
    assert len(list((own / "images").iterdir())) == 21
    with pytest.raises(ValueError, match=r"3 of 24 packed images in .* cannot be used: \w+ \(missing\), "):
        RadiographDataset(table, own)


def test_outlines_beside_their_image_are_refused(own):
    annotations = json.loads((own.parent / "annotations.json").read_text())
    lines = annotations["annotations"][-1]["segmentation"]
    annotations["annotations"][-1]["segmentation"] = [[at + 1000 for at in line] for line in lines]
    (own.parent / "annotations.json").write_text(json.dumps(annotations))
    with pytest.raises(ValueError, match=r"1 of 24 images cannot be packed: \w+ \(its outlines lie beside"):
        pack_images(own.parent, SMALL)


def test_a_folder_of_other_sequences_is_left_alone(own):
    (own / "packing.json").unlink()
    with pytest.raises(FileExistsError, match=r"holds what was not packed here. Move it aside"):
        pack_images(own.parent, SMALL)
    with pytest.raises(FileNotFoundError, match=r"No packed radiographs at .* First pack the cohort again"):
        read_packing(own)
    assert len(list((own / "images").iterdir())) == 24


@pytest.mark.parametrize(
    ("frame", "said"),
    [
        ({"long": 320, "short": 384}, "long not below short; found long 320, short 384"),
        ({"long": 330}, "multiples of 32"),
        ({"short": 0}, "short"),
    ],
)
def test_a_frame_that_no_network_takes_is_refused(frame, said):
    with pytest.raises(ValueError, match=said):
        ImagePackConfig(**frame)


def test_fewer_workers_than_none_are_refused(packed):
    with pytest.raises(ValueError, match="workers is a number of threads, 0 for one a core; found -1"):
        pack_images(packed.parent, SMALL, workers=-1)


# Variation.


def picture(height: int = 96, width: int = 64) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    return (110 + 60 * np.sin(x / 7) * np.cos(y / 9)).astype(np.uint8)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("patch", [None, 32])
def test_mask_and_image_move_together(seed, patch):
    image = np.zeros((96, 64), np.uint8)
    cv2.circle(image, (30, 55), 4, 255, -1)  # the same drawn point in both
    steps = {"flip": 0.5, "vertical_flip": 0.5, "affine": 1}
    moved, mask = only(**steps)(image, image.copy(), seed=(seed,), patch=patch)
    np.testing.assert_array_equal(moved, mask)
    assert mask.max() == 255


@pytest.mark.parametrize("seed", range(6))
def test_the_affine_step_is_what_scipy_makes_of_the_drawn_matrix(seed):
    image, vary = picture(), only(flip=0.5, vertical_flip=0.5, affine=1)
    moved, _ = vary(image, None, seed=(seed,))
    drawn = {type(step).__name__: step for step in vary._compose.transforms if step.params}
    expected = image.astype(float)
    if "_Flip" in drawn:
        expected = expected[:, ::-1]
    if "_VerticalFlip" in drawn:
        expected = expected[::-1]
    swap = np.array(
        [[0, 1, 0], [1, 0, 0], [0, 0, 1]]
    )  # scipy counts rows first, and asks whence a pixel comes
    back = swap @ np.linalg.inv(drawn["_Affine"].params["matrix"]) @ swap
    inner = ndimage.affine_transform(np.ones((96, 64)), back, order=1) == 1
    expected = ndimage.affine_transform(expected, back, order=1)
    assert inner.sum() > 2000
    difference = np.abs(moved - expected)[inner]
    assert difference.max() <= 6  # OpenCV interpolates in steps of 1/32 pixel
    assert difference.mean() < 0.8


def moved_points(*, seeds: int = 150, **limits) -> np.ndarray:
    """Degrees turned, size, shift across and down of each seed, from two points drawn and found again."""
    vary, found = only(affine=1, **{**FIXED, **limits}), []
    for seed in range(seeds):
        points = []
        for left in (57, 97):  # the middles of the squares are (59.5, 72.5) and (99.5, 72.5)
            image = np.zeros((160, 160), np.uint8)
            image[70:76, left : left + 6] = 250
            seen = vary(image, None, seed=(seed,))[0].astype(float)
            points.append([seen.sum(axis=axis) @ np.arange(160) / seen.sum() for axis in (0, 1)])
        line, middle = np.subtract(points[1], points[0]), np.mean(points, axis=0) - [79.5, 72.5]
        found.append((np.degrees(np.arctan2(line[1], line[0])), np.hypot(*line) / 40, *middle / 160))
    return np.array(found)


def test_turns_sizes_and_shifts_reach_their_limits_and_pass_none():
    angle, *_ = moved_points(rotate_degrees=25).T
    assert -25.5 < angle.min() < -23
    assert 23 < angle.max() < 25.5
    _, size, *_ = moved_points(shrink=0.2, enlarge=0.25).T
    assert np.exp(-0.2) - 0.01 < size.min() < 0.84
    assert 1.25 < size.max() < np.exp(0.25) + 0.01
    _, _, *shift = moved_points(shift=0.06).T
    for along in shift:
        assert -0.063 < along.min() < -0.055
        assert 0.055 < along.max() < 0.063


@pytest.mark.parametrize("step", ["gamma", "contrast", "noise", "blur"])
@pytest.mark.parametrize("seed", range(3))
def test_every_step_of_grey_levels_does_what_albumentations_would_and_leaves_the_mask(step, seed):
    image, mask, vary = picture(), 255 * (picture() > 130).astype(np.uint8), only(**{step: 1})
    varied, same = vary(image, mask, seed=(seed,))
    np.testing.assert_array_equal(same, mask)
    (ours,) = (each for each in vary._compose.transforms if each.params)
    theirs = type(ours).__bases__[-1]
    assert theirs.__module__.startswith("albumentations")
    expected = theirs.apply(ours, image.copy(), **ours.params)
    difference = np.abs(varied.astype(int) - expected)
    assert difference.max() <= 1  # rounding
    assert not np.array_equal(varied, image)


def test_steps_of_probability_0_are_off():
    image = picture()
    for seed in range(20):
        np.testing.assert_array_equal(only()(image, None, seed=(seed,))[0], image)


def test_the_same_seed_is_the_same_variation_and_another_is_another():
    always = dict.fromkeys(OFF, 1.0)
    vary, image = Variation(ImageAugment(**always)), picture()
    one, again, other = (vary(image, image, seed=seed) for seed in ((3, 1, 5), (3, 1, 5), (3, 2, 5)))
    for mine, theirs in zip(one, again, strict=True):
        np.testing.assert_array_equal(mine, theirs)
    assert not np.array_equal(one[0], other[0])


def test_steps_are_drawn_independently():
    steps = {"flip": 0.5, "vertical_flip": 0.5, "noise": 0.5}
    vary, image, seen = only(**steps), picture(), []
    for seed in range(300):
        vary(image, None, seed=(seed,))
        seen.append([bool(step.params) for step in vary._compose.transforms if step.p])
    seen = np.array(seen, float)
    np.testing.assert_allclose(seen.mean(axis=0), 0.5, atol=0.1)
    assert np.abs(np.corrcoef(seen.T) - np.eye(3)).max() < 0.2


@pytest.mark.parametrize(
    "wrong", [{"flip": 1.5}, {"noise": -0.1}, {"rotate_degrees": 200}, {"blur_std": 0}, {"shift": "much"}]
)
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        ImageAugment(**wrong)


# The data set.


def test_without_augmentation_items_are_as_packed_in_every_epoch(packed):
    table = table_of(packed)
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
    table = table_of(packed)
    whole = RadiographDataset(table, packed, stride=1)[0]["mask"]
    assert whole.shape == (96, 64)
    assert set(whole.unique().tolist()) == {0, 255}
    with pytest.raises(ValueError, match="stride of masks divides all sides of an image; found 5"):
        RadiographDataset(table, packed, stride=5)


def test_variation_depends_on_seed_epoch_and_index_alone(packed):
    table = table_of(packed)
    make = [RadiographDataset(table, packed, augment=ImageAugment(), seed=seed) for seed in (1, 1, 2)]
    one, again, other = (dataset[3, 0]["image"] for dataset in make)
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert not torch.equal(one, make[0][4, 0]["image"])
    together = make[0].__getitems__([(3, 1), (3, 0)])["image"][1]
    assert torch.equal(together, one)


def test_a_fracture_without_an_outline_is_not_annotated_and_refused_where_patches_need_it(own):
    annotations = json.loads((own.parent / "annotations.json").read_text())
    lost = annotations["annotations"].pop()["image_id"]
    annotations["annotations"] = [each for each in annotations["annotations"] if each["image_id"] != lost]
    (own.parent / "annotations.json").write_text(json.dumps(annotations))
    pack_images(own.parent, SMALL)
    table = table_of(own)
    dataset = RadiographDataset(table, own)
    (index,) = np.flatnonzero(~dataset.annotated)
    item = dataset[int(index)]
    assert item["label"] == 1
    assert not item["annotated"]
    assert item["mask"].max() == 0
    name = table["image"][index]
    with pytest.raises(ValueError, match=f"1 fractured images have no outline.*'{name}'. Leave them out"):
        RadiographDataset(table, own, patch=32)


def test_a_file_that_is_cut_off_after_the_check_is_named(own):
    table = table_of(own)
    dataset = RadiographDataset(table, own)
    path = own / "images" / f"{table['image'][0]}.npy"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="is not whole any more"):
        dataset[0]
    with pytest.raises(ValueError, match=r"1 of 24 packed images in .*\(not whole\)"):
        RadiographDataset(table, own)


def test_no_images_are_refused(packed):
    with pytest.raises(ValueError, match="There are no images"):
        RadiographDataset(table_of(packed).iloc[:0], packed)
    with pytest.raises(ValueError, match=r"lacks the column\(s\) 'label'"):
        RadiographDataset(table_of(packed).drop(columns="label"), packed)


# Patches.


@pytest.mark.parametrize("augment", [None, ImageAugment()])
def test_a_fractured_patch_always_shows_fracture_and_all_patches_are_of_the_asked_size(packed, augment):
    dataset = RadiographDataset(table_of(packed), packed, augment=augment, patch=32)
    for epoch in range(12):
        batch = dataset.__getitems__([(epoch, index) for index in range(24)])
        assert batch["image"].shape == (24, 32, 32)
        assert batch["mask"].shape == (24, 8, 8)
        shown = batch["mask"].flatten(1).amax(1) > 0
        assert torch.equal(shown, batch["label"] == 1)


@pytest.mark.parametrize("patch", [32, None])
def test_the_smallest_fracture_in_a_corner_stays_inside(patch):
    vary, brought_back = Variation(ImageAugment(affine=1, shift=0.2)), 0
    for seed in range(60):
        mask = np.zeros((96, 64), np.uint8)
        mask[(3, -4)[seed % 2], (3, -4)[seed // 2 % 2]] = 255
        image = np.where(mask, 255, 40).astype(np.uint8)
        varied, moved = vary(image, mask, seed=(seed,), patch=patch)
        assert moved.max() > 0
        # the image moved with it: what is brightest there is the fracture
        assert varied.ravel()[moved.argmax()] > np.median(varied)
        at = np.unravel_index(moved.argmax(), moved.shape)
        brought_back += min(*at, *(np.array(moved.shape) - 1 - at)) in (3, 4)
    assert brought_back > 10


def test_patches_have_the_scale_of_the_whole_image_and_lie_inside_it():
    image, corners = np.zeros((96, 64), np.uint8), set()
    image[:] = np.random.default_rng(0).integers(1, 255, image.shape)
    windows = np.lib.stride_tricks.sliding_window_view(image, (32, 32))
    for seed in range(30):
        patch, _ = only()(image, None, seed=(seed,), patch=32)
        ((top, left),) = np.argwhere((windows == patch).all(axis=(2, 3)))  # cut out, nothing else
        corners.add((int(top), int(left)))
    assert len(corners) > 20


def test_patches_of_intact_images_lie_about_the_body():
    image = np.full((96, 64), 8, np.uint8)
    image[60:80, 40:56] = 160
    for seed in range(30):
        patch, _ = only()(image, None, seed=(seed,), patch=32)
        assert patch.max() == 160
    nothing = np.zeros((96, 64), np.uint8)
    assert only()(nothing, None, seed=(0,), patch=32)[0].shape == (32, 32)


def test_patches_of_intact_images_are_cut_out_about_the_models_false_marks(packed):
    dataset = RadiographDataset(table_of(packed), packed, patch=32)
    intact = int(np.flatnonzero(dataset.labels == 0)[0])
    whole = RadiographDataset(table_of(packed), packed)[intact]["image"].numpy()
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
        RadiographDataset(table_of(packed), packed, patch=patch)


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
    dataset = RadiographDataset(table_of(packed), packed)
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
    dataset = RadiographDataset(table_of(packed), packed)
    loader = image_loader(dataset, batch_size=4, training=True)
    hard = np.flatnonzero(dataset.labels == 0)[:8]
    dataset.weights[:] = 0
    dataset.weights[hard] = 1
    loader.batch_sampler.set_epoch(1)
    seen = np.concatenate([batch["index"] for batch in loader])
    assert set(seen[dataset.labels[seen] == 0]) == set(hard)


def test_evaluation_shows_every_image_once_whatever_the_processes(packed):
    dataset = RadiographDataset(table_of(packed), packed)
    alone = [batch["index"].tolist() for batch in image_loader(dataset, batch_size=5)]
    shared = [
        [batch["index"].tolist() for batch in image_loader(dataset, batch_size=5, process=p, processes=2)]
        for p in range(2)
    ]
    assert sorted(index for batch in alone for index in batch) == list(range(24))
    assert sorted(alone) == sorted(batch for share in shared for batch in share)


def test_a_plain_loader_over_both_orientations_is_told_which_to_use(packed):
    dataset = RadiographDataset(table_of(packed), packed)
    with pytest.raises(ValueError, match="A batch holds images of one orientation: load them with image_loa"):
        next(iter(DataLoader(dataset, batch_size=24)))


@pytest.mark.parametrize("wrong", [{"batch_size": 0}, {"batch_size": 1, "workers": -1}])
def test_a_batch_without_an_image_or_fewer_workers_than_none_are_refused(packed, wrong):
    with pytest.raises(ValueError, match="A batch holds 1 image or more, and 0 workers or more load it"):
        image_loader(RadiographDataset(table_of(packed), packed), **wrong)


@pytest.mark.slow
def test_workers_load_the_same_batches_and_know_a_changed_focus(packed):
    loaders = [
        image_loader(
            RadiographDataset(table_of(packed), packed, augment=ImageAugment(), patch=32),
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
