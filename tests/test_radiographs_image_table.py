"""The files of a cohort of radiographs, written and read."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image, ImageOps
from radiograph_folders import change

from cspine_helpers.files.paths import sha256_of
from cspine_helpers.radiographs.consolidation import consolidate
from cspine_helpers.radiographs.image_table import read_images, read_regions, read_sources
from cspine_helpers.radiographs.sources.fracatlas import read_fracatlas


def test_a_cohort_holds_what_its_source_holds(published):
    source, cohort = read_fracatlas(published / "source"), published / "cohort"
    table = read_images(cohort)
    assert table["image"].tolist() == source.table["image"].tolist()
    for row in table.itertuples():
        with Image.open(cohort / row.file) as image:
            assert np.asarray(ImageOps.exif_transpose(image)).shape == (row.height, row.width)
    regions = read_regions(cohort)
    assert list(regions) == table["image"].tolist()
    vgg = json.loads((published / "source/Annotations/VGG JSON/VGG_fracture_masks.json").read_text())
    for name, each in vgg.items():
        for region, mine in zip(each["regions"].values(), regions[Path(name).stem], strict=True):
            shape = region["shape_attributes"]
            theirs = np.column_stack([shape["all_points_x"], shape["all_points_y"]])
            assert np.allclose(mine, theirs[: len(mine)], atol=0.001)
    assert sum(map(len, regions.values())) == 9
    (told,) = read_sources(cohort)["sources"]
    assert (told["images"], told["positive"], told["licence"]) == (24, 8, "CC BY 4.0")


def test_a_cohort_is_not_written_over_and_the_same_again_is_no_change(published, tmp_path):
    source, cohort = read_fracatlas(published / "source"), tmp_path / "cohort"
    consolidate([source], cohort)
    written = {path: path.stat().st_mtime_ns for path in cohort.iterdir()}
    consolidate([source], cohort)
    assert {path: path.stat().st_mtime_ns for path in cohort.iterdir()} == written
    fewer = replace(source, table=source.table[:20])
    with pytest.raises(FileExistsError, match="another image table is there already"):
        consolidate([fewer], cohort)
    assert len(read_images(cohort)) == 24


@pytest.mark.parametrize("name", ["images", "train.csv"])
def test_a_folder_of_something_else_is_not_touched(published, tmp_path, name):
    (tmp_path / name).mkdir()
    with pytest.raises(FileExistsError, match=f"holds '{name}', of no whole cohort of radiographs"):
        consolidate([read_fracatlas(published / "source")], tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_what_a_killed_process_left_is_made_again(published, tmp_path):
    (tmp_path / ".images").mkdir()
    (tmp_path / ".images" / "half.jpg").write_bytes(b"x")
    consolidate([read_fracatlas(published / "source")], tmp_path)
    assert len([*(tmp_path / "images").iterdir()]) == 24
    assert not (tmp_path / ".images").exists()


def test_a_failure_while_writing_leaves_no_cohort(published, tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("shutil.copyfile", full)
    with pytest.raises(OSError, match="No space left"):
        consolidate([read_fracatlas(published / "source")], tmp_path / "cohort", copy=True)
    assert [*(tmp_path / "cohort").iterdir()] == []


@pytest.mark.parametrize("copy", [True, False])
def test_images_are_linked_or_when_asked_copied(published, tmp_path, copy):
    table = consolidate([read_fracatlas(published / "source")], tmp_path / "cohort", copy=copy)
    for row in table.itertuples():
        path = tmp_path / "cohort" / row.file
        assert path.is_symlink() is not copy
        assert sha256_of(path) == row.sha256 == sha256_of(published / "source" / row.original)


def test_links_to_images_that_have_moved_are_mended(fracatlas, tmp_path):
    consolidate([read_fracatlas(fracatlas)], tmp_path / "cohort")
    moved = fracatlas.rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match="make the cohort again from where they are now"):
        read_images(tmp_path / "cohort")
    consolidate([read_fracatlas(moved)], tmp_path / "cohort")
    assert len(read_images(tmp_path / "cohort")) == 24


def test_images_that_are_gone_are_named(published, tmp_path):
    cohort = shutil.copytree(published / "cohort", tmp_path / "cohort")
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
def test_an_image_table_that_breaks_a_rule_is_refused(published, tmp_path, column, value, says):
    cohort = shutil.copytree(published / "cohort", tmp_path / "cohort", symlinks=True)
    table = pd.read_csv(cohort / "images.csv", dtype=str, keep_default_na=False)
    table.loc[0, column] = str(value)
    table.to_csv(cohort / "images.csv", index=False)
    with pytest.raises(ValueError, match=says):
        read_images(cohort)


def test_annotations_of_other_images_are_refused(published, tmp_path):
    cohort = shutil.copytree(published / "cohort", tmp_path / "cohort", symlinks=True)
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
