"""Annotation files to regions in the displayed frame, regions to masks, masks to run lengths and back."""

import json
import re
from collections.abc import Iterator
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
    UnusableAnnotations,
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


# What is wrong in files.

SIZES = {"a.jpg": (40, 30), "b.jpg": (20, 50), "c.jpg": (10, 10)}
CORNERS = [(5, 5), (15, 5), (10, 12)]


def vgg_region(points=CORNERS, *, kind: str = "polygon", **about: object) -> dict:
    xs, ys = ([point[axis] for point in points] for axis in (0, 1))
    shape = {"name": kind, "all_points_x": xs, "all_points_y": ys}
    return {"shape_attributes": shape, "region_attributes": {"label": "fractured"} | about}


def vgg_file(path: Path, regions: object, name: str = "a.jpg") -> Path:
    path.write_text(json.dumps({f"{name}123": {"filename": name, "regions": regions}}), encoding="utf-8")
    return path


def coco_file(path: Path, *annotations: dict, **parts: object) -> Path:
    """Annotations of a.jpg, of the category fractured, unless they say otherwise."""
    images = [
        {"id": n, "file_name": name, "height": height, "width": width}
        for n, (name, (height, width)) in enumerate(SIZES.items())
    ]
    listed = [{"id": n, "image_id": 0, "category_id": 1} | its for n, its in enumerate(annotations)]
    content = {"images": images, "annotations": listed, "categories": [{"id": 1, "name": "fractured"}]}
    path.write_text(json.dumps(content | parts), encoding="utf-8")
    return path


def yolo_file(path: Path, text: str) -> dict[str, Path]:
    path.write_text(text, encoding="utf-8")
    return {"a.jpg": path}


def voc_file(path: Path, *boxes: str, size: str = "") -> dict[str, Path]:
    objects = "".join(f"<object><name>fractured</name>{box}</object>" for box in boxes)
    path.write_text(f"<annotation>{size}{objects}</annotation>", encoding="utf-8")
    return {"a.jpg": path}


def refusal(parse, *arguments, **options) -> str:
    with pytest.raises(
        ValueError, match=r"(is|are) refused\. .* Correct that, or take the original\.$"
    ) as error:
        parse(*arguments, **options)
    return str(error.value).partition(" refused. ")[2].removesuffix(" Correct that, or take the original.")


def test_vgg_regions_may_be_a_list_an_object_or_part_of_a_project(tmp_path):
    path, listed = tmp_path / "a.json", [vgg_region(), vgg_region([*CORNERS, CORNERS[0]])]
    for regions in (listed, {"0": listed[0], "7": listed[1]}):
        found = parse_vgg(vgg_file(path, regions), SIZES)
        assert [its.points.tolist() for its in found["a.jpg"]] == [[[5, 5], [15, 5], [10, 12]]] * 2
    path.write_text(json.dumps({"_via_settings": {}, "_via_img_metadata": json.loads(path.read_text())}))
    assert len(parse_vgg(path, SIZES)["a.jpg"]) == 2
    assert parse_vgg(vgg_file(path, []), SIZES) == {"a.jpg": []}
    kinds = vgg_file(path, [vgg_region(kind_of="old")])
    assert parse_vgg(kinds, SIZES, attribute="kind_of")["a.jpg"][0].label == "old"


@pytest.mark.parametrize(
    ("region", "why"),
    [
        (vgg_region(kind="circle"), "Shapes that are no polygon (1): 'a.jpg region 0: circle'."),
        (vgg_region(CORNERS[:2]), "Polygons of fewer than three points (1): 'a.jpg region 0'."),
        (
            vgg_region([*CORNERS[:2], CORNERS[0], CORNERS[0]]),
            "Polygons of fewer than three points (1): 'a.jpg",
        ),
        (vgg_region([(1, 1), (2, 2), (5, 5)]), "Polygons that enclose nothing (1): 'a.jpg region 0'."),
        (vgg_region([*CORNERS[:2], (np.nan, 9)]), "Coordinates that are no numbers (1): 'a.jpg region 0'."),
        (vgg_region([*CORNERS[:2], ("x", 9)]), "Coordinates that are no numbers (1): 'a.jpg region 0'."),
        (vgg_region([*CORNERS[:2], (None, 9)]), "Coordinates that are no numbers (1): 'a.jpg region 0'."),
        (
            vgg_region([*CORNERS[:2], (9, 41)]),
            "Regions that reach out of their image (1): 'a.jpg region 0 of 30 × 40'",
        ),
        (vgg_region([(-9, -9), (-9, -5), (-5, -5)]), "Regions that reach out of their image (1)"),
        (vgg_region([(30, 5), (30.2, 5), (30, 9)]), "Regions that reach out of their image (1)"),
        (vgg_region(label=""), "Regions without a class in their attribute 'label' (1): 'a.jpg region 0'."),
        (vgg_region(label={"fractured": True}), "Regions without a class in their attribute 'label' (1)"),
        ("region", "Shapes that are no polygon (1): 'a.jpg region 0: None'."),
        ({"shape_attributes": 3}, "Shapes that are no polygon (1)"),
    ],
)
def test_a_vgg_region_that_is_none_is_refused(tmp_path, region, why):
    assert refusal(parse_vgg, vgg_file(tmp_path / "a.json", [region]), SIZES).startswith(why)


def test_a_hand_that_slips_off_the_image_is_cut_off_there(tmp_path):
    found = parse_vgg(vgg_file(tmp_path / "a.json", [vgg_region([(5, -0.3), (30.2, 5), (9, 40.3)])]), SIZES)
    assert found["a.jpg"][0].points.tolist() == [[5, 0], [30, 5], [9, 40]]


def test_all_that_is_wrong_is_named_a_sentence_a_kind_ten_places_and_the_count(tmp_path):
    regions = [vgg_region(CORNERS[:2])] * 12 + [vgg_region(kind="rect"), vgg_region()]
    said = refusal(parse_vgg, vgg_file(tmp_path / "a.json", regions), SIZES)
    assert said.startswith("Polygons of fewer than three points (12): 'a.jpg region 0', 'a.jpg region 1', ")
    assert "'a.jpg region 9' and 2 more. Shapes that are no polygon (1): 'a.jpg region 12: rect'." in said
    assert "region 10'" not in said


def test_images_that_are_not_there_come_twice_or_were_left_out(tmp_path):
    path = vgg_file(tmp_path / "a.json", [vgg_region()], name="gone.jpg")
    assert refusal(parse_vgg, path, SIZES) == "Regions of images that are not there (1): 'gone.jpg'."
    with pytest.raises(UnusableAnnotations) as error:
        parse_vgg(path, SIZES)
    assert error.value.unknown == ("gone.jpg",)
    assert error.value.sound is not None  # they put no other image in doubt
    assert parse_vgg(path, SIZES, left_out=["gone.jpg"]) == {}
    entry = {"filename": "a.jpg", "regions": []}
    path.write_text(json.dumps({"1": entry, "2": entry}))
    assert refusal(parse_vgg, path, SIZES) == "Images that come twice (1): 'a.jpg'."
    path.write_text(json.dumps({"1": 7}))
    assert refusal(parse_vgg, path, SIZES) == "Parts that describe no image (1): '1'."
    path = vgg_file(path, [vgg_region()], name="C:\\images\\a.jpg")
    assert [*parse_vgg(path, SIZES)] == ["a.jpg"]


def damaged(content: object) -> Iterator[object]:
    """The content with each of its parts in turn replaced by what does not belong there."""
    yield from (None, -1, 10**400, 1.5, "x", [], [1], {}, [[None]], {"a": 1})
    for key, part in content.items() if isinstance(content, dict) else ():
        yield from (content | {key: other} for other in damaged(part))
    for n, part in enumerate(content if isinstance(content, list) else ()):
        yield from ([*content[:n], other, *content[n + 1 :]] for other in damaged(part))


@pytest.mark.parametrize("parse", [parse_vgg, parse_coco])
def test_whatever_is_damaged_in_a_file_it_is_read_or_refused_in_a_sentence(tmp_path, parse):
    path = tmp_path / "a.json"
    if parse is parse_vgg:
        vgg_file(path, [vgg_region()])
    else:
        coco_file(path, {"segmentation": [[5, 5, 15, 5, 10, 12]]}, {"bbox": [1, 2, 3, 4]})
    refused = 0
    for content in damaged(json.loads(path.read_text())):
        path.write_text(json.dumps(content))
        try:
            assert set(parse(path, SIZES)) <= set(SIZES)
        except ValueError as error:
            refused += str(error).startswith("a.json ")
    assert refused > 100


@pytest.mark.parametrize("parse", [parse_vgg, parse_coco])
def test_what_is_no_file_of_annotations_is_refused(tmp_path, parse):
    with pytest.raises(FileNotFoundError, match=r"No annotations at .*a\.json\. Check the name\."):
        parse(tmp_path / "a.json", SIZES)
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(ValueError, match=r"a\.json is not JSON .* Take the original\."):
        parse(tmp_path / "a.json", SIZES)
    (tmp_path / "a.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"a\.json holds no object of annotations but list\."):
        parse(tmp_path / "a.json", SIZES)


def test_coco_polygons_and_boxes(tmp_path):
    path = coco_file(
        tmp_path / "a.json",
        {"segmentation": [[5, 5, 15, 5, 10, 12], [1, 1, 3, 1, 3, 4]], "bbox": [0, 0, 1, 1]},
        {"bbox": [2, 3, 10, 20], "segmentation": [], "image_id": 1, "iscrowd": 0},
        images=[
            {"id": 0, "file_name": "images/a.jpg", "height": 30, "width": 40},  # as the pixels are stored
            {"id": 1, "file_name": "b.jpg", "height": 20, "width": 50},
        ],
    )
    with pytest.raises(ValueError, match="reach out of their image"):
        parse_coco(path, SIZES)
    found = parse_coco(path, SIZES | {"b.jpg": (23, 50)}, left_out=["b.jpg"])
    assert [its.points.tolist() for its in found["a.jpg"]] == [
        [[5, 5], [15, 5], [10, 12]],
        [[1, 1], [3, 1], [3, 4]],
    ]
    found = parse_coco(coco_file(path, {"bbox": [2, 3, 10, 20]}), SIZES)
    assert found["a.jpg"][0].points.tolist() == [[2, 3], [12, 3], [12, 23], [2, 23]]
    assert (found["b.jpg"], found["c.jpg"]) == ([], [])


@pytest.mark.parametrize(
    ("annotation", "why"),
    [
        (
            {"segmentation": {"counts": [3, 4], "size": [40, 30]}},
            "Run-length masks where polygons are read (1): 'a",
        ),
        (
            {"segmentation": [[1, 1, 5, 1, 5, 5]], "iscrowd": 1},
            "Run-length masks where polygons are read (1)",
        ),
        ({"segmentation": [[1, 1, 5, 1, 5]]}, "Polygons with not as many x as y (1): 'a.jpg annotation 0'."),
        ({"segmentation": [[1, 1, 5, 1]]}, "Polygons of fewer than three points (1)"),
        ({"segmentation": [], "bbox": [1, 2, 0, 4]}, "Boxes that enclose nothing (1): 'a.jpg annotation 0'."),
        ({"bbox": [1, 2, 3]}, "Annotations with neither polygon nor box (1): 'a.jpg annotation 0'."),
        ({"bbox": [1, 2, "x", 4]}, "Annotations with neither polygon nor box (1)"),
        ({"image_id": 9}, "Annotations of no image (1): 'annotation 0: 9'."),
        ({"category_id": 9}, "Annotations of no category (1): 'annotation 0: 9'."),
    ],
)
def test_a_coco_annotation_that_is_none_is_refused(tmp_path, annotation, why):
    assert refusal(parse_coco, coco_file(tmp_path / "a.json", annotation), SIZES).startswith(why)


def test_coco_of_other_images_is_refused(tmp_path):
    same = {"id": 0, "file_name": "a.jpg", "height": 80, "width": 60}
    said = refusal(
        parse_coco, coco_file(tmp_path / "a.json", images=[same, same | {"file_name": "c.jpg"}]), SIZES
    )
    assert said == (
        "Images drawn on in another size (2): 'a.jpg: 60 × 80, is 30 × 40', 'c.jpg: 60 × 80, is 10 × 10'. "
        "Images with the id of another (1): 'c.jpg'."
    )
    for parts in ({"categories": None}, {"annotations": [3]}):
        with pytest.raises(
            ValueError, match=r"a\.json lacks COCO's lists of images, annotations and categories\."
        ):
            parse_coco(coco_file(tmp_path / "a.json", **parts), SIZES)


def test_yolo_boxes_and_polygons(tmp_path):
    files = yolo_file(tmp_path / "a.txt", "\ufeff1 0.5 0.5 0.2 0.4\r\n\r\n0 0 0 1 0 1 1 0 0.5\r\n")
    box, polygon = parse_yolo(files, SIZES, ["sound", "fractured"])["a.jpg"]
    assert (box.label, box.is_box, polygon.label, polygon.is_box) == ("fractured", True, "sound", False)
    np.testing.assert_allclose(box.points, [[12, 12], [18, 12], [18, 28], [12, 28]])
    np.testing.assert_allclose(polygon.points, [[0, 0], [30, 0], [30, 40], [0, 20]])
    rounded = parse_yolo(yolo_file(tmp_path / "a.txt", "0 0.9 0.9 0.200002 0.200002"), SIZES, ["x"])["a.jpg"][
        0
    ]
    np.testing.assert_allclose(rounded.points.max(axis=0), [30, 40])


def test_an_empty_label_file_means_intact_and_a_missing_one_does_not(tmp_path):
    assert parse_yolo(yolo_file(tmp_path / "a.txt", "\n"), SIZES, ["fractured"]) == {"a.jpg": []}
    said = refusal(parse_yolo, {"a.jpg": tmp_path / "gone.txt"}, SIZES, ["fractured"])
    assert said == "Images without a label file (an empty one says that nothing was found) (1): 'a.jpg'."


SHORT = "Lines of other than a class with 4 numbers or with 3 points and more"


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (
            "0 0.5 0.5 0.2",
            f"{SHORT} (1): 'a.txt line 1: 4 columns'.",
        ),
        (
            "0 0.5 0.5 0.2 0.2 0.9",
            f"{SHORT} (1): 'a.txt line 1: 6 columns'.",
        ),
        ("0 0 0 1 0 1 1 0", SHORT),
        ("0", SHORT),
        ("2 0.5 0.5 0.2 0.2", "Classes that are none of 0 to 1 (1): 'a.txt line 1: 2'."),
        ("-1 0.5 0.5 0.2 0.2", "Classes that are none of 0 to 1 (1)"),
        ("0.0 0.5 0.5 0.2 0.2", "Classes that are none of 0 to 1 (1)"),
        ("0 0.5 1.2 0.2 0.2", "Coordinates outside 0 to 1 (1): 'a.txt line 1'."),
        ("0 0.5 0.5 0.2 -0.2", "Coordinates outside 0 to 1 (1)"),
        ("0 0.5 0.5 nan 0.2", "Coordinates that are no numbers (1): 'a.txt line 1'."),
        ("0 0.5 0.5 x 0.2", "Coordinates that are no numbers (1)"),
        ("0 0.5 0.5 0 0.2", "Boxes that enclose nothing (1): 'a.txt line 1'."),
        ("0 0.9 0.5 0.4 0.2", "Regions that reach out of their image (1): 'a.txt line 1 of 30 × 40'."),
        ("0 0 0 0.5 0.5 1 1", "Polygons that enclose nothing (1): 'a.txt line 1'."),
    ],
)
def test_a_yolo_line_that_is_none_is_refused(tmp_path, line, why):
    said = refusal(parse_yolo, yolo_file(tmp_path / "a.txt", line), SIZES, ["fractured", "sound"])
    assert said.startswith(why)


BOX = "<bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox>"


def test_voc_boxes_in_files_with_and_without_a_size(tmp_path):
    for size in (
        "",
        "<size><width>30</width><height>40</height></size>",
        "<size><width>40</width><height>30</height></size>",
    ):
        files = voc_file(tmp_path / "a.xml", BOX.format(2, 3, 12, 23), size=size)
        (found,) = parse_voc(files, SIZES)["a.jpg"]
        assert (found.label, found.is_box) == ("fractured", True)
        assert found.points.tolist() == [[2, 3], [12, 3], [12, 23], [2, 23]]


@pytest.mark.parametrize(
    ("box", "why"),
    [
        (BOX.format(9, 3, 2, 23), "Boxes that enclose nothing (1): 'a.xml object 1'."),
        (BOX.format(2, 3, "x", 23), "Coordinates that are no numbers (1): 'a.xml object 1'."),
        (BOX.format(2, 3, 12, 63), "Regions that reach out of their image (1): 'a.xml object 1 of 30 × 40'."),
        ("<bndbox><xmin>3</xmin></bndbox>", "Objects without a box (1): 'a.xml object 1'."),
        ("<name> </name>", "Objects without a box (1)"),
    ],
)
def test_a_voc_box_that_is_none_is_refused(tmp_path, box, why):
    assert refusal(parse_voc, voc_file(tmp_path / "a.xml", box), SIZES).startswith(why)


def test_voc_files_of_other_images_and_of_none_are_refused(tmp_path):
    size = "<size><width>60</width><height>80</height></size>"
    said = refusal(parse_voc, voc_file(tmp_path / "a.xml", size=size), SIZES)
    assert said == "Images drawn on in another size (1): 'a.jpg: 60 × 80, is 30 × 40'."
    (tmp_path / "b.xml").write_text("<annotation>")
    (tmp_path / "c.xml").write_text("<annotation><object><name/></object></annotation>")
    (tmp_path / "d.xml").write_text("<?xml version='1.0' encoding='none'?><annotation/>")
    files = {"a.jpg": tmp_path / "gone.xml", "b.jpg": tmp_path / "b.xml", "c.jpg": tmp_path / "c.xml"}
    assert refusal(parse_voc, {"a.jpg": tmp_path / "d.xml"}, SIZES) == "Files that are no XML (1): 'd.xml'."
    assert refusal(parse_voc, files, SIZES) == (
        "Images without an annotation file (1): 'a.jpg'. Files that are no XML (1): 'b.xml'. "
        "Objects without a class (1): 'c.xml object 1'."
    )
