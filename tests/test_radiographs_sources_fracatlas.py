"""FracAtlas as it is published, read strictly."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import REAL_DATA
from PIL import Image
from radiograph_folders import change, fracatlas_folder

from cspine_helpers.radiographs.consolidation import consolidate
from cspine_helpers.radiographs.image_table import read_regions
from cspine_helpers.radiographs.images import read_radiograph
from cspine_helpers.radiographs.sources.fracatlas import read_fracatlas

FRACATLAS = REAL_DATA / "fracatlas"


def test_fracatlas_is_read_as_its_table_says(published):
    source = read_fracatlas(published / "source")
    rows = pd.read_csv(published / "source" / "dataset.csv").sort_values("image_id")
    table = source.table
    assert (table["image"] + ".jpg").tolist() == rows["image_id"].tolist()
    assert table["label"].tolist() == rows["fractured"].tolist()
    assert table["hardware"].tolist() == rows["hardware"].tolist()
    assert table["multiscan"].tolist() == rows["multiscan"].tolist()
    assert table["split"].tolist() == rows["split"].tolist()
    assert table["part"].tolist() == rows[["hand", "leg", "hip", "shoulder"]].idxmax(axis=1).tolist()
    assert set(table["view"]) == {"frontal", "lateral", "oblique", "frontal+lateral"}
    assert (table["patient"] == "").all()  # FracAtlas names none
    assert all(Path(path).is_file() for path in table["path"])
    assert source.licence == "CC BY 4.0"
    assert "s41597-023-02432-4" in source.citation
    assert source.notes == []


def test_counts_that_differ_from_the_polygons_are_a_note_and_the_polygons_count(fracatlas):
    change(fracatlas / "dataset.csv", "IMG0000003.jpg,0,1,0,0,0,0,0,1,1", "IMG0000003.jpg,0,1,0,0,0,0,0,1,2")
    (fracatlas / "Annotations" / "YOLO" / "IMG0000006.txt").write_text("")
    source = read_fracatlas(fracatlas)
    assert source.notes == [
        "fracture_count of dataset.csv: other numbers than of polygons in 1 images: "
        "IMG0000003.jpg (2 for 1).",
        "YOLO boxes: other numbers than of polygons in 1 images: IMG0000006.jpg (0 for 1).",
    ]
    assert len(source.regions["IMG0000003"]) == len(source.regions["IMG0000006"]) == 1


def test_several_parts_are_joined_and_mixed_must_agree(fracatlas):
    path = fracatlas / "dataset.csv"
    change(path, "IMG0000010.jpg,0,0,0,1,0", "IMG0000010.jpg,1,0,0,1,1")
    source = read_fracatlas(fracatlas)
    assert source.table.set_index("image").loc["IMG0000010", "part"] == "hand+shoulder"
    assert source.notes == []
    change(path, "IMG0000010.jpg,1,0,0,1,1", "IMG0000010.jpg,1,0,0,1,0")
    (note,) = read_fracatlas(fracatlas).notes
    assert note == "mixed: other than the number of parts says in 1 images: 'IMG0000010.jpg'."


def test_without_a_column_the_split_is_that_of_the_published_files(tmp_path):
    folder = fracatlas_folder(tmp_path, images=9, fractured=3, split=False)
    table = read_fracatlas(folder).table
    assert table.loc[table["label"] == 1, "split"].tolist() == ["train", "val", "test"]
    assert (table.loc[table["label"] == 0, "split"] == "").all()


def test_regions_come_from_the_best_file_that_is_there_and_all_four_agree(fracatlas):
    found = []
    for folder in ("VGG JSON", "COCO JSON", "PASCAL VOC", "YOLO"):
        found.append(read_fracatlas(fracatlas).regions)
        shutil.rmtree(fracatlas / "Annotations" / folder)
    vgg, coco, voc, yolo = found
    assert [len(each) for each in found] == [8] * 4
    for image, regions in vgg.items():
        for one, same, *boxes in zip(regions, coco[image], voc[image], yolo[image], strict=True):
            assert np.allclose(one.points, same.points)
            for box in boxes:
                assert box.is_box
                assert np.allclose(box.points.min(0), one.points.min(0), atol=0.6)
                assert np.allclose(box.points.max(0), one.points.max(0), atol=0.6)
    with pytest.raises(FileNotFoundError, match="has no annotations of fractures"):
        read_fracatlas(fracatlas)


@pytest.mark.parametrize(
    ("ending", "text"),
    [("BOM", lambda text: "\ufeff" + text), ("semicolons", lambda text: text.replace(",", ";"))],
)
def test_a_table_with_bom_or_semicolons_is_read_right(fracatlas, ending, text):
    before = read_fracatlas(fracatlas).table
    path = fracatlas / "dataset.csv"
    path.write_text(text(path.read_text()), encoding="utf-8")
    assert read_fracatlas(fracatlas).table.equals(before)


def move(folder: Path, name: str, to: str) -> None:
    (path,) = folder.glob(f"images/*/{name}")
    path.rename(folder / to)


VGG = "Annotations/VGG JSON/VGG_fracture_masks.json"


def cut_a_polygon_short(folder: Path, *, without: str = "") -> None:
    """The polygon of IMG0000003 has two points, in the VGG file or, without it, in the COCO file."""
    if without:
        (folder / without).unlink()
        path = folder / "Annotations/COCO JSON/COCO_fracture_masks.json"
        content = json.loads(path.read_text())
        (image,) = (its["id"] for its in content["images"] if its["file_name"] == "IMG0000003.jpg")
        annotation = next(its for its in content["annotations"] if its["image_id"] == image)
        annotation["segmentation"] = [annotation["segmentation"][0][:4]]
    else:
        path = folder / VGG
        content = json.loads(path.read_text())
        entry = next(its for its in content.values() if its["filename"] == "IMG0000003.jpg")
        its = next(iter(entry["regions"].values()))["shape_attributes"]
        its["all_points_x"], its["all_points_y"] = its["all_points_x"][:2], its["all_points_y"][:2]
    path.write_text(json.dumps(content))


SHORT = (
    r"images with regions that cannot be used \(1\): 'IMG0000003.jpg': "
    "polygons of fewer than three points: IMG0000003.jpg "
)
FRACATLAS_FAULTS = {
    "a polygon of two points": (cut_a_polygon_short, SHORT, "IMG0000003.jpg"),
    "a polygon of two points in COCO": (
        lambda f: cut_a_polygon_short(f, without=VGG),
        SHORT,
        "IMG0000003.jpg",
    ),
    "folder": (
        lambda f: (f / "images/Fractured/more").mkdir(),
        r"folders among the images, which are not looked into \(1\): 'images/Fractured/more'",
        "images/Fractured/more",
    ),
    "image without row": (
        lambda f: change(f / "dataset.csv", "IMG0000001.jpg", "IMG9.jpg"),
        r"images without a row in dataset.csv \(1\): 'IMG0000001.jpg'",
        "IMG0000001.jpg",
    ),
    "row without image": (
        lambda f: move(f, "IMG0000001.jpg", "aside.jpg"),
        r"rows without an image \(1\): 'IMG0000001.jpg'",
        "IMG0000001.jpg",
    ),
    "in both folders": (
        lambda f: shutil.copy(f / "images/Fractured/IMG0000000.jpg", f / "images/Non_fractured"),
        r"images in both folders, Fractured and Non_fractured \(1\): 'IMG0000000.jpg'",
        "IMG0000000.jpg",
    ),
    "in the wrong folder": (
        lambda f: move(f, "IMG0000000.jpg", "images/Non_fractured/IMG0000000.jpg"),
        r"images whose folder contradicts dataset.csv \(1\): 'IMG0000000.jpg'",
        "IMG0000000.jpg",
    ),
    "count of an intact one": (
        lambda f: change(
            f / "dataset.csv", "IMG0000001.jpg,1,0,0,0,0,1,0,0,0", "IMG0000001.jpg,1,0,0,0,0,1,0,0,2"
        ),
        r"rows whose fracture_count contradicts fractured \(1\): 'IMG0000001.jpg'",
        "IMG0000001.jpg",
    ),
    "intact with polygons": (
        lambda f: change(f / VGG, '"filename": "IMG0000003.jpg"', '"filename": "IMG0000001.jpg"'),
        r"intact images with polygons \(1\): 'IMG0000001.jpg'\n- fractured images without a polygon \(1\): ",
        "IMG0000003.jpg",
    ),
    "another class": (
        lambda f: change(f / VGG, '"label": "fractured"', '"label": "metal"'),
        r"images with regions of another class than fractured \(1\): 'IMG0000000.jpg'",
        "IMG0000000.jpg",
    ),
    "names that differ in capitals": (
        lambda f: change(f / "dataset.csv", "IMG0000002.jpg", "img0000001.jpg"),
        r"rows whose names differ in capitals only \(2\): 'IMG0000001.jpg', 'img0000001.jpg'",
        "IMG0000001.jpg",
    ),
}


@pytest.mark.parametrize("fault", FRACATLAS_FAULTS)
def test_what_does_not_fit_in_fracatlas_is_named_and_left_out_only_when_asked(fracatlas, fault):
    damage, says, name = FRACATLAS_FAULTS[fault]
    damage(fracatlas)
    with pytest.raises(ValueError, match=says) as error:
        read_fracatlas(fracatlas)
    assert "skip_unusable" in str(error.value)
    source = read_fracatlas(fracatlas, skip_unusable=True)
    assert name in source.left_out
    assert Path(name).stem not in set(source.table["image"])


def test_an_image_is_in_one_published_split(fracatlas):
    table = pd.read_csv(fracatlas / "dataset.csv", dtype=str).drop(columns="split")
    table.to_csv(fracatlas / "dataset.csv", index=False)
    train, test = (fracatlas / "Utilities" / "Fracture Split" / f"{name}.csv" for name in ("train", "test"))
    test.write_text(train.read_text())
    with pytest.raises(ValueError, match=r"share images \(3\): 'IMG0000000.jpg', "):
        read_fracatlas(fracatlas)


def test_polygons_of_an_image_that_is_not_there_are_refused(fracatlas):
    change(fracatlas / VGG, '"filename": "IMG0000003.jpg"', '"filename": "IMG0000777.jpg"')
    with pytest.raises(ValueError, match=r"images that are not there \(1\): 'IMG0000777.jpg'"):
        read_fracatlas(fracatlas, skip_unusable=True)


def test_more_than_ten_offenders_are_ten_and_their_number(fracatlas):
    for path in sorted((fracatlas / "images" / "Non_fractured").iterdir())[:13]:
        path.unlink()
    with pytest.raises(
        ValueError, match=r"rows without an image \(13\): (('IMG\d+.jpg'(, )?){10}) and 3 more"
    ):
        read_fracatlas(fracatlas)


@pytest.mark.parametrize("kind", ["TIFF", "PNG", "16-bit"])
def test_images_of_other_kinds_have_their_polygons_where_they_are_displayed(fracatlas, tmp_path, kind):
    path = fracatlas / "images" / "Fractured" / "IMG0000003.jpg"  # turned by its EXIF
    pixels = read_radiograph(path)
    if kind == "16-bit":
        Image.fromarray(pixels.astype(np.uint16) * 16).save(path, format="PNG")
    else:
        exif = Image.Exif()
        exif[0x0112] = 6
        Image.fromarray(pixels).transpose(Image.Transpose.ROTATE_90).save(path, format=kind, exif=exif)
    table = consolidate([read_fracatlas(fracatlas)], tmp_path / "cohort").set_index("image")
    assert tuple(table.loc["IMG0000003", ["height", "width"]]) == pixels.shape
    (points,) = read_regions(tmp_path / "cohort")["IMG0000003"]
    (before,) = read_fracatlas(fracatlas).regions["IMG0000003"]
    assert np.allclose(points, before.points, atol=0.001)


def test_the_right_folder_is_named_where_another_was_given(published):
    with pytest.raises(FileNotFoundError, match=r"Did you mean .*source\?"):
        read_fracatlas(published)


# The real one


@pytest.mark.skipif(not FRACATLAS.is_dir(), reason=f"no FracAtlas at {FRACATLAS}")
def test_fracatlas_itself_is_read_as_it_was_counted(tmp_path):
    source = read_fracatlas(FRACATLAS)
    table = source.table.set_index("image")
    assert table["label"].value_counts().to_dict() == {0: 2811, 1: 610}
    of_split = table.groupby("split")["label"].agg(["size", "sum"])
    assert of_split.to_numpy().tolist() == [[2811, 502], [610, 108]]
    assert sum(map(len, source.regions.values())) == 781
    assert table["hardware"].sum() == 76
    assert table.loc[table["hardware"] == 1, "label"].sum() == 74
    assert len(source.notes) == 2
    assert all(name in note for note in source.notes for name in ("IMG0002471", "IMG0000851", "IMG0002395"))
    turned = replace(source, table=source.table[source.table["image"].isin(["IMG0002588", "IMG0002628"])])
    table = consolidate([turned], tmp_path)
    for row in table.itertuples():
        boxes = np.loadtxt(FRACATLAS / "Annotations" / "YOLO" / f"{row.image}.txt", ndmin=2)[:, 1:]
        for points, (x, y, width, height) in zip(read_regions(tmp_path)[row.image], boxes, strict=True):
            shown, size = np.array([row.width, row.height]), np.ptp(points, axis=0)
            assert np.abs(points.min(0) + size / 2 - shown * [x, y]).max() < 3
            assert np.abs(size - shown * [width, height]).max() < 6
