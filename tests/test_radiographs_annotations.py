"""Annotation files to regions in the displayed frame, regions to masks, masks to run lengths and back."""

import re
from pathlib import Path

import numpy as np
import pytest
from conftest import REAL_DATA
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from radiograph_folders import fracatlas_folder

from cspine_helpers.radiographs.annotations import (
    Region,
    decode_rle,
    encode_rle,
    parse_coco,
    parse_vgg,
    parse_voc,
    parse_yolo,
    rasterise,
)
from cspine_helpers.radiographs.images import read_radiograph

FRACATLAS = REAL_DATA / "fracatlas"
VGG, COCO = ("VGG JSON/VGG_fracture_masks.json", "COCO JSON/COCO_fracture_masks.json")


def sizes_in(folder: Path) -> dict[str, tuple[int, int]]:
    return {path.name: read_radiograph(path).shape for path in sorted((folder / "images").rglob("*.jpg"))}


def files_of(names, folder: Path, suffix: str) -> dict[str, Path]:
    return {name: folder / f"{Path(name).stem}.{suffix}" for name in names}


def box_of(region: Region) -> np.ndarray:
    return np.concatenate([region.points.min(axis=0), region.points.max(axis=0)])


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
    return fracatlas_folder(tmp_path_factory.mktemp("made"))


def test_the_four_formats_of_one_set_tell_the_same(published):
    sizes, notes = sizes_in(published), published / "Annotations"
    vgg, coco = parse_vgg(notes / VGG, sizes), parse_coco(notes / COCO, sizes)
    yolo = parse_yolo(files_of(sizes, notes / "YOLO", "txt"), sizes, ["fractured"])
    voc = parse_voc(files_of(sizes, notes / "PASCAL VOC", "xml"), sizes)
    assert set(yolo) == set(voc) == set(sizes) > set(vgg)
    assert (
        {name for name, its in yolo.items() if its} == {name for name, its in voc.items() if its} == set(vgg)
    )
    for name, regions in vgg.items():
        assert {region.label for region in regions} == {"fractured"}
        for of_vgg, of_coco, of_yolo, of_voc in zip(regions, coco[name], yolo[name], voc[name], strict=True):
            assert of_vgg.points.shape == (4, 2)
            np.testing.assert_array_equal(of_vgg.points, of_coco.points)
            assert [its.is_box for its in (of_vgg, of_coco, of_yolo, of_voc)] == [False, False, True, True]
            np.testing.assert_allclose(box_of(of_yolo), box_of(of_vgg), atol=1e-3)
            np.testing.assert_allclose(box_of(of_voc), box_of(of_vgg), atol=0.5)


@pytest.mark.skipif(not FRACATLAS.is_dir(), reason=f"FracAtlas is not at {FRACATLAS}")
def test_real_polygons_and_boxes_agree_in_the_displayed_frame_alone():
    """Counted apart from this package: 781 polygons in 610 images, none without; 607 have as many boxes."""
    folder, turned, displayed = FRACATLAS / "images" / "Fractured", {}, {}
    for path in folder.glob("*.jpg"):
        with Image.open(path) as image:
            turned[path.name] = image.size[::-1]
            is_turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)
            displayed[path.name] = image.size if is_turned else image.size[::-1]
    regions = parse_vgg(FRACATLAS / "Annotations" / VGG, displayed)
    assert len(regions) == 610
    assert sum(map(len, regions.values())) == 781
    assert all(regions.values())

    def differing(sizes: dict) -> tuple[int, set[str]]:
        boxes = parse_yolo(files_of(sizes, FRACATLAS / "Annotations" / "YOLO", "txt"), sizes, ["fractured"])
        alike = [name for name in regions if len(regions[name]) == len(boxes[name])]
        ends = {
            name: [sorted(map(tuple, map(box_of, its[name]))) for its in (regions, boxes)] for name in alike
        }
        return len(alike), {
            name for name, (one, other) in ends.items() if np.abs(np.subtract(one, other)).max() > 3
        }

    assert differing(turned) == (607, {"IMG0002628.jpg"})
    assert differing(displayed) == (607, set())


# Masks.


def middles_inside(points: np.ndarray, height: int, width: int) -> np.ndarray:
    """By the angle that the outline turns around each pixel's middle: slow, and no scan line."""
    rows, columns = np.mgrid[:height, :width] + 0.5
    arms = (points[:, 0] - columns[..., None]) + 1j * (points[:, 1] - rows[..., None])
    turns = np.angle(np.roll(arms, -1, axis=-1) / arms).sum(axis=-1) / (2 * np.pi)
    return np.rint(turns) != 0


def test_a_pixel_is_marked_where_its_middle_is_inside():
    """By hand: between 0.6 and 2.4 lies the middle of pixel 1 alone."""
    outline = [(0.6, 0.4), (2.4, 0.4), (2.4, 1.4), (4, 1.4), (4, 3), (0.6, 3)]
    assert rasterise([outline], 4, 4).tolist() == [[0, 1, 0, 0], [0, 1, 1, 1], [0, 1, 1, 1], [0, 0, 0, 0]]


def test_polygons_of_any_shape_are_filled_where_they_wind_around():
    """Convex or not, touching and crossing themselves, half outside: as the angles say, their union."""
    rng = np.random.default_rng(0)
    polygons = [rng.uniform(-6, 26, (corners, 2)) for corners in (3, 4, 5, 7, 9, 12)]
    union = np.zeros((20, 17), bool)
    for points in polygons:
        np.testing.assert_array_equal(rasterise([points], 20, 17), middles_inside(points, 20, 17))
        np.testing.assert_array_equal(rasterise([points[::-1]], 20, 17), middles_inside(points, 20, 17))
        union |= middles_inside(points, 20, 17)
    np.testing.assert_array_equal(rasterise(polygons, 20, 17), union)
    assert rasterise([], 3, 4).tolist() == np.zeros((3, 4)).tolist()


def test_a_polygon_between_the_middles_of_pixels_does_not_vanish():
    speck = np.array([(2.1, 1.1), (2.3, 1.1), (2.2, 1.3)])
    assert np.argwhere(rasterise([speck], 4, 5)).tolist() == [[1, 2]]
    crack = [(0.1, 0.6), (3.9, 0.6), (3.9, 0.8)]  # 0.1 pixels high, above every middle but the first
    assert rasterise([crack], 2, 5)[0].tolist() == [1, 1, 1, 1, 0]
    assert not rasterise([speck + 40], 4, 5).any()  # it does not touch the image


@pytest.mark.parametrize(
    "polygon", [[(0, 0), (1, 1)], [(0, 0), (1, 1), (np.nan, 2)], [1, 2, 3], [(0, 0, 0)] * 3]
)
def test_what_is_no_polygon_is_not_drawn(polygon):
    with pytest.raises(ValueError, match="three points or more of finite x, y; found"):
        rasterise([polygon], 4, 4)


def test_run_lengths_are_cocos():
    """By hand, as pycocotools counts: down the columns, zeros first, even where there are none."""
    mask = np.array([[0, 1, 1], [0, 0, 1]])
    assert encode_rle(mask) == "2 1 1 2"
    assert encode_rle(1 - mask) == "0 2 1 1 2"
    assert (encode_rle(np.zeros((2, 3))), encode_rle(np.ones((2, 3), bool))) == ("6", "0 6")
    np.testing.assert_array_equal(decode_rle("2 1 1 2", 2, 3), mask)


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**32), st.floats(0, 1))
def test_run_lengths_give_the_mask_back(height, width, seed, share):
    mask = (np.random.default_rng(seed).random((height, width)) < share).astype(np.uint8)
    np.testing.assert_array_equal(decode_rle(encode_rle(mask), height, width), mask)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("2 1 1", "Run lengths of 4 pixels are of no mask of 2 × 3"),
        ("", "Run lengths of 0 pixels"),
        ("2 1 1 x", "whole numbers between spaces; found '2 1 1 x'"),
        ("-2 8", "whole numbers between spaces"),
    ],
)
def test_run_lengths_of_another_mask_are_refused(text, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        decode_rle(text, 2, 3)


def test_what_has_no_height_and_width_is_no_mask():
    with pytest.raises(ValueError, match=re.escape("found shape (2,)")):
        encode_rle(np.ones(2))
