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
from cspine_helpers.radiographs import image_table
from cspine_helpers.radiographs.cohort import copy_images
from cspine_helpers.radiographs.consolidation import consolidate
from cspine_helpers.radiographs.groups import GroupConfig
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


@pytest.mark.parametrize("name", ["images", "annotations.json", "train.csv"])
def test_a_folder_of_something_else_is_not_touched(published, tmp_path, name):
    (tmp_path / name).mkdir()
    with pytest.raises(FileExistsError, match=f"holds '{name}', of no whole cohort of radiographs"):
        consolidate([read_fracatlas(published / "source")], tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_what_a_killed_process_left_is_made_again(published, tmp_path):
    (tmp_path / ".unfinished" / "images").mkdir(parents=True)
    (tmp_path / ".unfinished" / "images" / "half.jpg").write_bytes(b"x")
    consolidate([read_fracatlas(published / "source")], tmp_path)
    assert len([*(tmp_path / "images").iterdir()]) == 24
    assert not (tmp_path / ".unfinished").exists()


@pytest.mark.parametrize("writes", ["write_table", "write_sealed", "atomic_path", "shutil.copyfile"])
def test_a_failure_while_writing_leaves_nothing_and_the_same_call_then_succeeds(
    published, tmp_path, monkeypatch, writes
):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    source, folder = read_fracatlas(published / "source"), tmp_path / "cohort"
    monkeypatch.setattr(writes if "." in writes else f"{image_table.__name__}.{writes}", full)
    with pytest.raises(OSError, match="No space left"):
        consolidate([source], folder, copy=True)
    assert [*folder.iterdir()] == []
    monkeypatch.undo()
    assert len(consolidate([source], folder, copy=True)) == 24


@pytest.mark.parametrize("moves", [0, 1, 4])
def test_a_process_killed_while_it_moves_the_files_is_continued(published, tmp_path, monkeypatch, moves):
    real, moved = Path.replace, []

    def dying(path: Path, target: Path) -> Path:
        if path.parent.name != ".unfinished":
            return real(path, target)
        if len(moved) == moves:
            raise KeyboardInterrupt
        moved.append(path.name)
        return real(path, target)

    source, folder = read_fracatlas(published / "source"), tmp_path / "cohort"
    monkeypatch.setattr(Path, "replace", dying)
    with pytest.raises(KeyboardInterrupt):
        consolidate([source], folder, group=GroupConfig())
    monkeypatch.undo()
    assert sorted(moved) == sorted(path.name for path in folder.iterdir() if path.name != ".unfinished")
    if moves:
        with pytest.raises(FileExistsError, match=r"holds 'images'.*, of no whole cohort of radiographs"):
            consolidate([replace(source, table=source.table[:20])], folder, group=GroupConfig())
    assert len(consolidate([source], folder, group=GroupConfig())) == 24
    wanted = tmp_path / "wanted"
    consolidate([source], wanted, group=GroupConfig())
    contents = [
        {path.name: path.is_dir() or path.read_bytes() for path in its.iterdir()} for its in (folder, wanted)
    ]
    assert contents[0] == contents[1]
    assert len([*(folder / "images").iterdir()]) == 24


def test_images_of_somebody_else_are_not_taken_for_those_of_a_killed_process(
    published, tmp_path, monkeypatch
):
    source, folder = read_fracatlas(published / "source"), tmp_path / "cohort"
    monkeypatch.setattr(Path, "replace", _killed)
    with pytest.raises(KeyboardInterrupt):
        consolidate([source], folder)
    monkeypatch.undo()
    (folder / "images").mkdir()
    (folder / "images" / "own.png").write_bytes(b"x")
    with pytest.raises(FileExistsError, match="holds 'images', of no whole cohort of radiographs"):
        consolidate([source], folder)
    assert [path.name for path in (folder / "images").iterdir()] == ["own.png"]


def _killed(path: Path, target: Path) -> None:
    raise KeyboardInterrupt


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
    with pytest.raises(ValueError, match=r"images that are not there \(1\): 'images/IMG9999999.jpg'"):
        read_regions(cohort)
    (cohort / "annotations.json").unlink()
    with pytest.raises(FileNotFoundError, match="No annotations"):
        read_regions(cohort)


OUTSIDE = [1000, 1000, 2000, 1000, 2000, 2000]


@pytest.mark.parametrize(
    ("part", "change", "says"),
    [
        ("file", [], "holds no object of annotations but list"),
        ("file", {"annotations": [], "categories": []}, "lacks COCO's lists of images, annotations"),
        ("images", [], r"does not name 24 of the images of images.csv: 'images/IMG0000000.jpg', .* 14 more"),
        ("image_id", 999, r"Annotations of no image \(9\): 'annotation 1: 999', "),
        ("category_id", 7, r"Annotations of no category \(9\): 'annotation 1: 7', "),
        ("segmentation", [[1, 2, 3]], r"Polygons with not as many x as y \(9\): .*IMG0000000"),
        ("segmentation", [["a", "b", "c", "d"]], r"Coordinates that are no numbers \(9\)"),
        ("segmentation", [[1, 1, 2, 1]], r"Polygons of fewer than three points \(9\)"),
        ("segmentation", [OUTSIDE], r"Regions that reach out of their image \(9\)"),
        ("segmentation", {"counts": [1]}, r"Run-length masks where polygons are read \(9\)"),
    ],
)
def test_damaged_annotations_are_refused_and_all_of_them_named(published, tmp_path, part, change, says):
    cohort = shutil.copytree(published / "cohort", tmp_path / "cohort", symlinks=True)
    path = cohort / "annotations.json"
    coco = json.loads(path.read_text())
    if part == "file":
        coco = change
    elif part == "images":
        coco |= {"images": change, "annotations": []}
    else:
        coco["annotations"] = [each | {part: change} for each in coco["annotations"]]
    path.write_text(json.dumps(coco))
    with pytest.raises(ValueError, match=f"(?s){cohort}.*{says}.*radiographs --help"):
        read_regions(cohort)
    with pytest.raises(ValueError, match=says):
        copy_images(cohort, ["IMG0000000"], tmp_path / "some", note="")
    assert not (tmp_path / "some").exists()


def test_where_no_cohort_is_it_says_how_one_is_made(tmp_path):
    for read in (read_images, read_sources):
        with pytest.raises(FileNotFoundError, match="python -m cspine_helpers radiographs --help"):
            read(tmp_path)
