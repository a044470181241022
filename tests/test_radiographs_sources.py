"""Radiographs as they are published, read strictly, and joined into a cohort."""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import REAL_DATA
from PIL import Image, ImageOps
from radiograph_folders import fracatlas_folder, mura_folder, radiograph_cohort, yolo_folder

from cspine_helpers.radiographs.sources import (
    read_fracatlas,
    read_images,
    read_regions,
    read_sources,
)

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


def test_several_parts_are_joined(fracatlas):
    change(fracatlas / "dataset.csv", "IMG0000010.jpg,0,0,0,1", "IMG0000010.jpg,1,0,0,1")
    table = read_fracatlas(fracatlas).table.set_index("image")
    assert table.loc["IMG0000010", "part"] == "hand+shoulder"


def test_without_a_column_the_split_is_that_of_the_published_files(tmp_path):
    folder = fracatlas_folder(tmp_path, images=9, fractured=3, split=False)
    table = read_fracatlas(folder).table
    assert table.loc[table["label"] == 1, "split"].tolist() == ["train", "val", "test"]
    assert (table.loc[table["label"] == 0, "split"] == "").all()


def test_polygons_come_from_vgg_or_else_from_coco(fracatlas):
    vgg = read_fracatlas(fracatlas)
    shutil.rmtree(fracatlas / "Annotations" / "VGG JSON")
    coco = read_fracatlas(fracatlas)
    assert vgg.regions.keys() == coco.regions.keys()
    shutil.rmtree(fracatlas / "Annotations" / "COCO JSON")
    with pytest.raises(FileNotFoundError, match=r"VGG or COCO JSON"):
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


FRACATLAS_FAULTS = {
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
