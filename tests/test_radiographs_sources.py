"""Radiographs as they are published, read strictly, and joined into a cohort."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import REAL_DATA
from PIL import Image, ImageOps
from radiograph_folders import YOLO_LABELS, fracatlas_folder, mura_folder, radiograph_cohort, yolo_folder

from cspine_helpers import __main__ as cli
from cspine_helpers.files.paths import check_uids, sha256_of
from cspine_helpers.radiographs.groups import GroupConfig
from cspine_helpers.radiographs.images import read_radiograph
from cspine_helpers.radiographs.sources import (
    consolidate,
    file_ids,
    read_fracatlas,
    read_images,
    read_mura,
    read_pairs,
    read_regions,
    read_sources,
    read_yolo,
)
from cspine_helpers.splits import read_split

FRACATLAS = REAL_DATA / "fracatlas"


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """FracAtlas, YOLO and MURA folders, and a cohort of the first; read only."""
    folder = tmp_path_factory.mktemp("published")
    yolo_folder(folder / "yolo")
    mura_folder(folder / "positive MURA-v1.1")
    radiograph_cohort(folder)
    return folder


@pytest.fixture
def fracatlas(made, tmp_path) -> Path:
    """A FracAtlas folder to damage."""
    return shutil.copytree(made / "source", tmp_path / "fracatlas")


@pytest.fixture
def yolo(made, tmp_path) -> Path:
    """A YOLO folder to damage."""
    return shutil.copytree(made / "yolo", tmp_path / "yolo")


@pytest.fixture
def mura(made, tmp_path) -> Path:
    """A MURA folder to damage, under a root whose name holds its own words."""
    root = made / "positive MURA-v1.1"
    return shutil.copytree(root, tmp_path / root.name) / "MURA-v1.1"


def change(path: Path, was: str, now: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert was in text
    path.write_text(text.replace(was, now, 1), encoding="utf-8")


# FracAtlas


def test_fracatlas_is_read_as_its_table_says(made):
    source = read_fracatlas(made / "source")
    rows = pd.read_csv(made / "source" / "dataset.csv").sort_values("image_id")
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


# YOLO


def test_a_yolo_set_is_read_by_its_classes_and_its_label_files(made):
    source = read_yolo(made / "yolo", labels=YOLO_LABELS)
    table = source.table
    kinds = table["original"].str.extract(r"limb (\d)")[0]
    assert dict(zip(kinds, table["label"], strict=True)) == {"0": 1, "1": 1, "2": 0, "3": 0}
    folders = table["original"].str.partition("/")[0]
    assert dict(zip(folders, table["split"], strict=True)) == {
        "train": "train",
        "valid": "val",
        "test": "test",
    }
    marked = {image: [region.label for region in marks] for image, marks in source.regions.items()}
    assert marked["limb-0-grosse_train"] == ["elbow positive"]
    assert marked["limb-1-grosse_train"] == ["forearm fracture"]
    assert sum(map(len, marked.values())) == 6  # boxes of `humerus` are none of fractures
    for row in table.itertuples():
        lines = (made / "yolo" / row.original.replace("images", "labels")).with_suffix(".txt").read_text()
        for line, region in zip(lines.splitlines(), source.regions.get(row.image, []), strict=False):
            values = np.array(line.split()[1:], dtype=float)
            x, y = values[::2] * 128, values[1::2] * 160
            low, high = (points := region.points).min(0), points.max(0)
            if len(values) == 4:
                assert np.allclose([(low + high) / 2, high - low], np.column_stack([x, y]), atol=1e-3)
            else:
                assert np.allclose(points, np.column_stack([x, y]), atol=1e-3)


def test_names_become_ids_that_are_files_on_every_system_and_the_table_knows_both(made, tmp_path):
    table = consolidate([read_yolo(made / "yolo", labels=YOLO_LABELS)], tmp_path / "cohort")
    row = table.set_index("original").loc["test/images/limb 0 größe_test.jpg"]
    assert (row["image"], row["file"]) == ("limb-0-grosse_test", "images/limb-0-grosse_test.jpg")


@pytest.mark.parametrize("arranged", ["names by number", "with a path", "split below images"])
def test_data_yaml_is_read_as_other_programs_write_it(yolo, arranged):
    path = yolo / "data.yaml"
    before = read_yolo(yolo, labels=YOLO_LABELS).table["label"].tolist()
    if arranged == "names by number":
        lines = "".join(f"  {number}: {name}\n" for number, name in enumerate(YOLO_LABELS))
        path.write_text(f"train: train/images\nval: valid/images\ntest: test/images\nnames:\n{lines}")
    elif arranged == "with a path":
        change(path, "train: ../train/images", f"path: {yolo}\ntrain: train/images")
    else:
        for split in ("train", "valid", "test"):
            for kind in ("images", "labels"):
                (yolo / kind).mkdir(exist_ok=True)
                (yolo / split / kind).rename(yolo / kind / split)
        path.write_text(
            path.read_text()
            .replace("../train/images", "images/train")
            .replace("../valid/images", "images/valid")
            .replace("../test/images", "images/test")
        )
    assert sorted(read_yolo(yolo, labels=YOLO_LABELS).table["label"]) == sorted(before)


def write_label(folder: Path, text: str) -> None:
    (folder / "train/labels/limb 0 größe_train.txt").write_text(text)


YOLO_FAULTS = {
    "no label file": (
        lambda f: (f / "train/labels/limb 0 größe_train.txt").unlink(),
        r"images without a label file \(an empty one says intact\) \(1\)",
    ),
    "no image": (
        lambda f: (f / "train/images/limb 0 größe_train.jpg").unlink(),
        r"label files without an image \(1\): 'train/labels/limb 0 größe_train.txt'",
    ),
    "two images of one name": (
        lambda f: shutil.copy(
            f / "train/images/limb 0 größe_train.jpg", f / "train/images/limb 0 größe_train.png"
        ),
        r"images that share a label file \(2\)",
    ),
    "no image by its name": (
        lambda f: (f / "train/images/notes.docx").write_text("x"),
        r"files among the images that are no image by their name \(1\): 'train/images/notes.docx'",
    ),
    "folder": (
        lambda f: (f / "train/images/more").mkdir(),
        r"folders among the images, which are not looked into \(1\): 'train/images/more'",
    ),
    "unknown class": (lambda f: write_label(f, "4 0.5 0.5 0.1 0.1\n"), "limb 0 größe_train.jpg.*4"),
    "half a class": (lambda f: write_label(f, "0.5 0.5 0.5 0.1 0.1\n"), "limb 0 größe_train.jpg"),
    "four numbers": (lambda f: write_label(f, "0 0.5 0.5 0.1\n"), "limb 0 größe_train.jpg"),
    "six numbers": (lambda f: write_label(f, "0 0.5 0.5 0.1 0.1 0.9\n"), "limb 0 größe_train.jpg"),
    "above 1": (lambda f: write_label(f, "0 0.5 0.5 0.1 1.1\n"), "limb 0 größe_train.jpg"),
    "words": (lambda f: write_label(f, "0 a b c d\n"), "limb 0 größe_train.jpg"),
}


@pytest.mark.parametrize("fault", YOLO_FAULTS)
def test_what_does_not_fit_in_a_yolo_set_is_named_and_left_out_only_when_asked(yolo, fault):
    damage, says = YOLO_FAULTS[fault]
    damage(yolo)
    with pytest.raises(ValueError, match=says):
        read_yolo(yolo, labels=YOLO_LABELS)
    source = read_yolo(yolo, labels=YOLO_LABELS, skip_unusable=True)
    assert 1 <= len(source.left_out) <= 2
    expected = 12 if fault in ("no image by its name", "folder") else 11
    assert len(source.table) == expected
    assert len(source.regions) == 6 - (12 - expected)


def test_yolo_images_with_the_same_fault_are_listed_together(yolo):
    write_label(yolo, "4 0.5 0.5 0.1 0.1\n")
    (yolo / "valid/labels/limb 0 größe_valid.txt").write_text("7 0.5 0.5 0.1 0.1\n0 0.5 0.5 0.1 1.1\n")
    with pytest.raises(ValueError, match="refused") as error:
        read_yolo(yolo, labels=YOLO_LABELS)
    assert str(error.value).splitlines()[1:] == [
        "- label files: classes that are none of 0 to 3 (2): 'train/images/limb 0 größe_train.jpg': limb 0 "
        "größe_train.txt line 1: 4, 'valid/images/limb 0 größe_valid.jpg': limb 0 größe_valid.txt line 1: 7",
        "- label files: coordinates outside 0 to 1 (1): 'valid/images/limb 0 größe_valid.jpg': limb 0 "
        "größe_valid.txt line 2",
    ]


def test_a_yolo_image_that_cannot_be_read_is_named_with_all_others_when_a_cohort_is_made(yolo, tmp_path):
    for split, content in (("train", b""), ("valid", b"<html>")):
        (yolo / split / "images" / f"limb 0 größe_{split}.jpg").write_bytes(content)
    source = read_yolo(yolo, labels=YOLO_LABELS)
    says = r"cannot be read \(2\): 'yolo: train/images/limb 0 größe_train.jpg': .*empty.*'yolo: valid/.*"
    with pytest.raises(ValueError, match=says) as error:
        consolidate([source], tmp_path / "cohort")
    assert str(yolo) not in str(error.value)  # in a long folder, the reason would be cut off
    assert len(consolidate([source], tmp_path / "cohort", skip_unusable=True)) == 10


def test_an_empty_label_file_says_intact(yolo):
    write_label(yolo, "")
    table = read_yolo(yolo, labels=YOLO_LABELS).table.set_index("image")
    assert table.loc["limb-0-grosse_train", "label"] == 0


def test_a_class_map_may_be_a_file(made, tmp_path):
    path = tmp_path / "labels.json"
    with pytest.raises(FileNotFoundError, match=r'Write \{"elbow positive": 1, "fingers positive": 1, '):
        read_yolo(made / "yolo", labels=path)
    path.write_text("[1, 2]")
    with pytest.raises(ValueError, match="holds no labels of classes"):
        read_yolo(made / "yolo", labels=path)
    path.write_text(json.dumps(YOLO_LABELS).replace("{", '{"humerus": 1, '))
    with pytest.raises(ValueError, match=r"labels.json is not JSON \(named twice: 'humerus'\)"):
        read_yolo(made / "yolo", labels=path)
    path.write_text(json.dumps(YOLO_LABELS))
    assert read_yolo(made / "yolo", labels=path).classes == YOLO_LABELS


@pytest.mark.parametrize(
    ("labels", "says"),
    [
        ({"elbow positive": 1}, r"classes of data.yaml without a label \(3\): 'fingers positive', "),
        (YOLO_LABELS | {"wrist": 1}, r"labels of no class of data.yaml \(1\): 'wrist' \("),
        (YOLO_LABELS | {"humerus": "no"}, r"labels that are not 0 or 1 \(1\): 'humerus': 'no'"),
        (YOLO_LABELS | {"humerus": True}, r"labels that are not 0 or 1 \(1\): 'humerus': True"),
    ],
)
def test_a_class_map_is_about_every_class_and_no_other(made, labels, says):
    with pytest.raises(ValueError, match=says):
        read_yolo(made / "yolo", labels=labels)


@pytest.mark.parametrize(
    ("was", "now", "error", "says"),
    [
        ("nc: 4", "nc: 5", ValueError, "nc = 5"),
        ("names: [", "classes: [", ValueError, "has no names"),
        ("names: [", "names: [1, ", ValueError, "has no names"),
        ("names: [", "names: ]", ValueError, "is not YAML"),
        ("../train/images", "../elsewhere/images", FileNotFoundError, "'../elsewhere/images'"),
        ("../train/images", "../train/labels", FileNotFoundError, "no folder of labels"),
    ],
)
def test_a_data_yaml_that_cannot_be_used_is_refused(yolo, was, now, error, says):
    change(yolo / "data.yaml", was, now)
    with pytest.raises(error, match=says):
        read_yolo(yolo, labels=YOLO_LABELS)


def test_varied_copies_of_one_original_are_one_patients_in_whatever_split(yolo):
    for split, copies in (("train", "ab"), ("valid", "c")):
        for kind, ending in (("images", "jpg"), ("labels", "txt")):
            folder = yolo / split / kind
            path = folder / f"limb 0 größe_{split}.{ending}"
            for copy in copies:
                shutil.copy(path, folder / f"Bein 7_jpg.rf.{copy * 32}.{ending}")
            path.rename(folder / f"limb 0_jpg.rf.{split}.{ending}")
    table = read_yolo(yolo, labels=YOLO_LABELS).table.set_index("original")
    patient = {
        "train/images/limb 0_jpg.rf.train.jpg": "limb-0_jpg",
        "valid/images/limb 0_jpg.rf.valid.jpg": "limb-0_jpg",
    }
    patient |= {
        f"{split}/images/Bein 7_jpg.rf.{copy * 32}.jpg": "Bein-7_jpg"
        for split, copy in (("train", "a"), ("train", "b"), ("valid", "c"))
    }
    assert table["patient"][table["patient"] != ""].to_dict() == patient


def test_a_folder_named_as_two_splits_is_read_once_and_noted(yolo):
    change(yolo / "data.yaml", "test: ../test/images", "test: ../valid/images")
    source = read_yolo(yolo, labels=YOLO_LABELS)
    assert source.table["split"].value_counts().to_dict() == {"train": 4, "val": 4}
    assert source.notes == ["data.yaml names one folder as val and as test; its images are val."]


def test_a_data_yaml_without_folders_is_refused(yolo):
    path = yolo / "data.yaml"
    path.write_text("names: ['a']\n")
    with pytest.raises(ValueError, match="names no folder as train, val or test"):
        read_yolo(yolo, labels={"a": 1})


# MURA


def test_muras_labels_are_those_of_study_folders_whatever_the_root_is_called(made):
    source = read_mura(made / "positive MURA-v1.1" / "MURA-v1.1")
    table = source.table
    number = table["patient"].str.removeprefix("patient").astype(int)
    assert (table["label"] == (number - 1) % 2).all()
    assert set(table["label"]) == {0, 1}
    assert (table["split"] == np.where(number <= 6, "train", "valid")).all()
    assert set(table["part"]) == {"wrist", "elbow", "hand"}
    assert table.groupby("study").size().eq(2).all()  # views
    assert table.groupby("patient")["study"].nunique().tolist() == [1, 1, 1, 2, 1, 1, 1, 2]
    assert source.positive == "abnormal"
    assert "handed on" in source.licence


@pytest.mark.parametrize("ending", ["BOM", "semicolons", "\r\n"])
def test_muras_tables_are_read_right_with_bom_or_semicolons(mura, ending):
    before = read_mura(mura).table
    for path in mura.glob("*.csv"):
        text = path.read_text()
        text = {"BOM": "\ufeff" + text, "semicolons": text.replace(",", ";")}.get(
            ending, text.replace("\n", ending)
        )
        path.write_text(text, encoding="utf-8", newline="")
    assert read_mura(mura).table.equals(before)


_STUDY = "train/XR_ELBOW/patient00002/study1_positive"
MURA_FAULTS = {
    "label": (
        lambda f: change(f / "train_labeled_studies.csv", f"{_STUDY}/,1", f"{_STUDY}/,0"),
        rf"whose folder contradicts train_labeled_studies.csv \(2\): '{_STUDY}/image1.png'",
        2,
    ),
    "study without row": (
        lambda f: change(f / "train_labeled_studies.csv", f"MURA-v1.1/{_STUDY}/,1\n", ""),
        r"images of studies without a row in train_labeled_studies.csv \(2\)",
        2,
    ),
    "study without image": (
        lambda f: shutil.rmtree(f / _STUDY),
        rf"studies of train_labeled_studies.csv without an image \(1\): '{_STUDY}'",
        2,
    ),
    "image without row": (
        lambda f: change(f / "train_image_paths.csv", f"MURA-v1.1/{_STUDY}/image2.png\n", ""),
        rf"images without a row in train_image_paths.csv \(1\): '{_STUDY}/image2.png'",
        1,
    ),
    "row without image": (
        lambda f: (f / _STUDY / "image2.png").unlink(),
        rf"rows without an image \(1\): '{_STUDY}/image2.png'",
        1,
    ),
    "row twice": (
        lambda f: change(
            f / "train_image_paths.csv",
            f"MURA-v1.1/{_STUDY}/image2.png\n",
            f"MURA-v1.1/{_STUDY}/image2.png\n" * 2,
        ),
        r"rows that repeat an image or a study \(1\)",
        1,
    ),
    "another path": (
        lambda f: (f / _STUDY).rename(f / _STUDY.replace("positive", "unknown")),
        r"paths that are not like MURA's \(2\)",
        2,
    ),
}


@pytest.mark.parametrize("fault", MURA_FAULTS)
def test_what_does_not_fit_in_mura_is_named_and_left_out_only_when_asked(mura, fault):
    damage, says, gone = MURA_FAULTS[fault]
    damage(mura)
    with pytest.raises(ValueError, match=says):
        read_mura(mura)
    assert len(read_mura(mura, skip_unusable=True).table) == 20 - gone


def test_muras_tables_have_as_many_cells_as_published(mura):
    change(mura / "valid_labeled_studies.csv", "/,0", "")
    with pytest.raises(ValueError, match=r"valid_labeled_studies.csv .* other than 2 cells \(1\)"):
        read_mura(mura)


@pytest.mark.parametrize("name", ["train", "valid_image_paths.csv"])
def test_what_mura_lacks_is_said(mura, name):
    (mura / name).rename(mura / "aside")
    with pytest.raises(FileNotFoundError, match=f"has no {name}"):
        read_mura(mura)


def test_the_right_folder_is_named_where_another_was_given(made):
    with pytest.raises(FileNotFoundError, match=r"Did you mean .*MURA-v1.1\?"):
        read_mura(made / "positive MURA-v1.1")
    with pytest.raises(FileNotFoundError, match=r"Did you mean .*source\?"):
        read_fracatlas(made)


# Ids


def test_ids_are_file_names_and_no_two_are_alike():
    names = ["IMG1", "img1", "a b", "a_b", "ä", "..", "CON", "x" * 80, "nan", "骨折", "a/b", "a b"]
    ids = file_ids(names, [f"{n}{name}" for n, name in enumerate(names)])
    check_uids(ids)
    assert len({each.casefold() for each in ids}) == len(names)
    assert ids[3] == "a_b"
    assert ids[4] == "a"
    assert file_ids(["größe"]) == file_ids(["gro\u0308\u00dfe".replace("o\u0308", "ö")]) == ["grosse"]


def test_names_that_differ_in_capitals_only_are_told_apart(yolo):
    for kind, ending in (("images", "jpg"), ("labels", "txt")):
        folder = yolo / "train" / kind
        shutil.copy(folder / f"limb 0 größe_train.{ending}", folder / f"LIMB 0 größe_train.{ending}")
    table = read_yolo(yolo, labels=YOLO_LABELS).table
    assert table["image"].str.casefold().is_unique
    assert len(table) == 13


# Cohorts


def test_a_cohort_holds_what_its_source_holds(made):
    source, cohort = read_fracatlas(made / "source"), made / "cohort"
    table = read_images(cohort)
    assert table["image"].tolist() == source.table["image"].tolist()
    for row in table.itertuples():
        with Image.open(cohort / row.file) as image:
            assert np.asarray(ImageOps.exif_transpose(image)).shape == (row.height, row.width)
    regions = read_regions(cohort)
    assert list(regions) == table["image"].tolist()
    vgg = json.loads((made / "source/Annotations/VGG JSON/VGG_fracture_masks.json").read_text())
    for name, each in vgg.items():
        for region, mine in zip(each["regions"].values(), regions[Path(name).stem], strict=True):
            shape = region["shape_attributes"]
            theirs = np.column_stack([shape["all_points_x"], shape["all_points_y"]])
            assert np.allclose(mine, theirs[: len(mine)], atol=0.001)
    assert sum(map(len, regions.values())) == 9
    (told,) = read_sources(cohort)["sources"]
    assert (told["images"], told["positive"], told["licence"]) == (24, 8, "CC BY 4.0")


def test_sources_are_joined_and_equal_names_are_kept_apart(made, tmp_path):
    one, two = read_fracatlas(made / "source"), read_fracatlas(made / "source", name="again")
    only = replace(two, table=two.table[:2], regions={})
    table = consolidate([one, only], tmp_path / "cohort")
    assert len(table) == 26
    assert {"fracatlas-IMG0000000", "again-IMG0000000", "IMG0000002"} < set(table["image"])
    assert table["image"].is_unique
    regions = read_regions(tmp_path / "cohort")
    assert len(regions["fracatlas-IMG0000000"]) == 2
    assert regions["again-IMG0000000"] == []


def test_labels_of_different_meaning_are_not_joined(made, tmp_path):
    sources = [read_fracatlas(made / "source"), read_mura(made / "positive MURA-v1.1" / "MURA-v1.1")]
    with pytest.raises(ValueError, match=r"fracatlas: fractured, mura: abnormal"):
        consolidate(sources, tmp_path / "cohort")
    assert not (tmp_path / "cohort").exists()


@pytest.mark.parametrize("number", [0, 2])
def test_a_cohort_is_of_sources_of_different_names(made, tmp_path, number):
    with pytest.raises(ValueError, match="sources of different names"):
        consolidate([read_fracatlas(made / "source")] * number, tmp_path / "cohort")


def damaged(fracatlas: Path) -> list[str]:
    """Damage two intact images as downloads do: cut off, and empty."""
    cut, empty = (fracatlas / "images" / "Non_fractured" / f"IMG000000{n}.jpg" for n in (1, 2))
    cut.write_bytes(cut.read_bytes()[:-900])
    empty.write_bytes(b"")
    return [cut.stem, empty.stem]


def test_images_that_cannot_be_read_are_named_and_nothing_is_written(fracatlas, tmp_path):
    names = damaged(fracatlas)
    with pytest.raises(ValueError, match=r"images that cannot be read") as error:
        consolidate([read_fracatlas(fracatlas, skip_unusable=True)], tmp_path / "cohort")
    assert any(name in str(error.value) for name in names)
    assert not (tmp_path / "cohort").exists()


def test_images_that_cannot_be_read_are_left_out_when_asked_and_recorded_with_the_reason(fracatlas, tmp_path):
    names, cohort = damaged(fracatlas), tmp_path / "cohort"
    table = consolidate([read_fracatlas(fracatlas, skip_unusable=True)], cohort, skip_unusable=True)
    assert len(table) == 22
    assert not set(names) & set(table["image"])
    (told,) = read_sources(cohort)["sources"]
    assert {Path(name).stem for name in told["left_out"]} == set(names)
    assert all("cannot be read" in reason for reason in told["left_out"].values())
    assert sorted(path.stem for path in (cohort / "images").iterdir()) == table["image"].tolist()


def test_a_cohort_is_not_written_over_and_the_same_again_is_no_change(made, tmp_path):
    source, cohort = read_fracatlas(made / "source"), tmp_path / "cohort"
    consolidate([source], cohort)
    written = {path: path.stat().st_mtime_ns for path in cohort.iterdir()}
    consolidate([source], cohort)
    assert {path: path.stat().st_mtime_ns for path in cohort.iterdir()} == written
    fewer = replace(source, table=source.table[:20])
    with pytest.raises(FileExistsError, match="another image table is there already"):
        consolidate([fewer], cohort)
    assert len(read_images(cohort)) == 24


@pytest.mark.parametrize("name", ["images", "train.csv"])
def test_a_folder_of_something_else_is_not_touched(made, tmp_path, name):
    (tmp_path / name).mkdir()
    with pytest.raises(FileExistsError, match=f"holds '{name}', of no whole cohort of radiographs"):
        consolidate([read_fracatlas(made / "source")], tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_what_a_killed_process_left_is_made_again(made, tmp_path):
    (tmp_path / ".images").mkdir()
    (tmp_path / ".images" / "half.jpg").write_bytes(b"x")
    consolidate([read_fracatlas(made / "source")], tmp_path)
    assert len([*(tmp_path / "images").iterdir()]) == 24
    assert not (tmp_path / ".images").exists()


def test_a_failure_while_writing_leaves_no_cohort(made, tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("shutil.copyfile", full)
    with pytest.raises(OSError, match="No space left"):
        consolidate([read_fracatlas(made / "source")], tmp_path / "cohort", copy=True)
    assert [*(tmp_path / "cohort").iterdir()] == []


@pytest.mark.parametrize("copy", [True, False])
def test_images_are_linked_or_when_asked_copied(made, tmp_path, copy):
    table = consolidate([read_fracatlas(made / "source")], tmp_path / "cohort", copy=copy)
    for row in table.itertuples():
        path = tmp_path / "cohort" / row.file
        assert path.is_symlink() is not copy
        assert sha256_of(path) == row.sha256 == sha256_of(made / "source" / row.original)


def test_links_to_images_that_have_moved_are_mended(fracatlas, tmp_path):
    consolidate([read_fracatlas(fracatlas)], tmp_path / "cohort")
    moved = fracatlas.rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match="make the cohort again from where they are now"):
        read_images(tmp_path / "cohort")
    consolidate([read_fracatlas(moved)], tmp_path / "cohort")
    assert len(read_images(tmp_path / "cohort")) == 24


def test_images_that_are_gone_are_named(made, tmp_path):
    cohort = shutil.copytree(made / "cohort", tmp_path / "cohort")
    for n in range(12):
        (cohort / "images" / f"IMG{n:07d}.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"\(12\): 'images/IMG0000000.jpg', .* and 2 more"):
        read_images(cohort)


@pytest.mark.parametrize(
    ("column", "value", "says"),
    [
        ("label", 2, r"none of 0, 1 \(1\)"),
        ("height", 0, r"whole numbers from 1 \(1\)"),
        ("patient", "", r"cells without text \(1\)"),
        ("image", "img0000001", r"differ in capitals only \(2\): 'img0000001', 'IMG0000001'"),
        ("study", "IMG0000001", r"studies with two labels \(2\)"),
        ("image", "a b", "cannot be file names: 'a b'"),
    ],
)
def test_an_image_table_that_breaks_a_rule_is_refused(made, tmp_path, column, value, says):
    cohort = shutil.copytree(made / "cohort", tmp_path / "cohort", symlinks=True)
    table = pd.read_csv(cohort / "images.csv", dtype=str, keep_default_na=False)
    table.loc[0, column] = str(value)
    table.to_csv(cohort / "images.csv", index=False)
    with pytest.raises(ValueError, match=says):
        read_images(cohort)


def test_annotations_of_other_images_are_refused(made, tmp_path):
    cohort = shutil.copytree(made / "cohort", tmp_path / "cohort", symlinks=True)
    change(cohort / "annotations.json", "images/IMG0000000.jpg", "images/IMG9999999.jpg")
    with pytest.raises(ValueError, match=r"of other images than images.csv \(2\)"):
        read_regions(cohort)
    (cohort / "annotations.json").unlink()
    with pytest.raises(FileNotFoundError, match="No annotations"):
        read_regions(cohort)


def test_where_no_cohort_is_it_says_how_one_is_made(tmp_path):
    for read in (read_images, read_sources):
        with pytest.raises(FileNotFoundError, match="python -m cspine_helpers radiographs --help"):
            read(tmp_path)


# The command


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """The command line in a project folder: exit status, output, errors."""
    monkeypatch.setenv("CSPINE_ROOT", str(tmp_path))

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        return cli.main(["radiographs", "--cohort", "limbs", *map(str, arguments)]), *capsys.readouterr()

    return run


def test_the_command_joins_groups_splits_and_packs_and_leaves_what_is_done(made, tmp_path, command):
    labels = tmp_path / "labels.json"
    labels.write_text(json.dumps(YOLO_LABELS))
    sources = ["--fracatlas", made / "source", "--yolo", made / "yolo", "--labels", labels]
    status, said, errors = command(*sources, "--long", 64, "--short", 32)
    assert status == 0, errors
    assert "fracatlas: 24 images, 8 fractured." in said
    cohort = tmp_path / "data" / "limbs"
    table, split = read_images(cohort), read_split(cohort / "split.csv")
    assert len(table) == len(split) == 36
    assert dict(zip(table["image"], table["patient"], strict=True)) == dict(
        zip(split["StudyInstanceUID"], split["patient"], strict=True)
    )
    assert split.groupby("patient")["split"].nunique().eq(1).all()
    pairs, groups = read_pairs(cohort), read_sources(cohort)["groups"]
    assert groups["groups"] == table["patient"].nunique() < 36
    assert groups["pairs"] == {why: (pairs["why"] == why).sum() for why in groups["pairs"]}
    of = table.set_index("image")["patient"]
    assert (pairs["image"].map(of) == pairs["other"].map(of)).all()
    written = {path: path.read_bytes() for path in cohort.rglob("*") if path.is_file()}
    assert command(*sources, "--long", 64, "--short", 32)[:2] == (0, said)
    assert {path: path.read_bytes() for path in cohort.rglob("*") if path.is_file()} == written


@pytest.mark.parametrize("published", ["valid=test", "val=tset", "val"])
def test_a_cohort_that_cannot_be_divided_is_not_begun(made, tmp_path, command, published):
    status, _, errors = command("--fracatlas", made / "source", "--published", published)
    assert (status, list((tmp_path / "data").glob("limbs"))) == (100, []), errors
    assert command("--fracatlas", made / "source", "--long", 64, "--short", 32)[0] == 0


def test_images_of_two_labels_are_left_out_and_both_are_named(fracatlas, tmp_path):
    one, other = "Fractured/IMG0000000.jpg", "Non_fractured/IMG0000001.jpg"
    shutil.copy(fracatlas / "images" / one, fracatlas / "images" / other)
    table = consolidate([read_fracatlas(fracatlas)], tmp_path / "cohort", group=GroupConfig())
    assert len(table) == 22
    (told,) = read_sources(tmp_path / "cohort")["sources"]
    assert told["left_out"] == {
        f"images/{one}": f"label 1, and identical to fracatlas: images/{other} with label 0",
        f"images/{other}": f"label 0, and identical to fracatlas: images/{one} with label 1",
    }
    assert len([*(tmp_path / "cohort" / "images").iterdir()]) == 22


def test_muras_published_test_images_can_stay_the_test_split(made, tmp_path, command):
    folder = made / "positive MURA-v1.1" / "MURA-v1.1"
    options = ("--long", 64, "--short", 32, "--fractions", 0.4, 0.4, 0.2)
    status, said, errors = command("--mura", folder, "--published", "valid=test", *options)
    assert status == 0, errors
    assert "20 images, 12 abnormal" in said
    cohort = tmp_path / "data" / "limbs"
    table, split = (
        read_images(cohort),
        read_split(cohort / "split.csv").set_index("StudyInstanceUID")["split"],
    )
    assert ((table["split"] == "valid") == (table["image"].map(split) == "test")).all()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "No source is named"),
        (["--yolo", "yolo"], "--yolo and --labels go together"),
        (["--labels", "labels.json"], "--yolo and --labels go together"),
        (["--fracatlas", "nowhere"], "FracAtlas at nowhere has no dataset.csv"),
        (["--mura", "nowhere", "--gap", "-1"], "gap"),
    ],
)
def test_what_the_command_cannot_do_is_one_sentence(command, tmp_path, arguments, says):
    status, _, errors = command(*arguments)
    assert status == 100
    assert says in errors
    assert not (tmp_path / "data").exists()


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
