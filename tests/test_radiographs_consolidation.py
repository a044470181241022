"""Sources joined into a cohort."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from radiograph_folders import mura_folder

from cspine_helpers.radiographs.consolidation import consolidate
from cspine_helpers.radiographs.groups import GroupConfig, split_images
from cspine_helpers.radiographs.image_table import read_regions, read_sources
from cspine_helpers.radiographs.sources.fracatlas import read_fracatlas
from cspine_helpers.radiographs.sources.mura import read_mura
from cspine_helpers.splits import SplitConfig


def test_sources_are_joined_and_equal_names_are_kept_apart(published, tmp_path):
    one, two = read_fracatlas(published / "source"), read_fracatlas(published / "source", name="again")
    only = replace(two, table=two.table[:2], regions={})
    table = consolidate([one, only], tmp_path / "cohort")
    assert len(table) == 26
    assert {"fracatlas-IMG0000000", "again-IMG0000000", "IMG0000002"} < set(table["image"])
    assert table["image"].is_unique
    regions = read_regions(tmp_path / "cohort")
    assert len(regions["fracatlas-IMG0000000"]) == 2
    assert regions["again-IMG0000000"] == []


def test_labels_of_different_meaning_are_not_joined(published, tmp_path):
    sources = [read_fracatlas(published / "source"), read_mura(mura_folder(tmp_path / "positive MURA-v1.1"))]
    with pytest.raises(ValueError, match=r"fracatlas: fractured, mura: abnormal"):
        consolidate(sources, tmp_path / "cohort")
    assert not (tmp_path / "cohort").exists()


@pytest.mark.parametrize("number", [0, 2])
def test_a_cohort_is_of_sources_of_different_names(published, tmp_path, number):
    with pytest.raises(ValueError, match="sources of different names"):
        consolidate([read_fracatlas(published / "source")] * number, tmp_path / "cohort")


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


@pytest.mark.parametrize("group", [None, GroupConfig()])
def test_images_of_two_labels_are_left_out_and_both_are_named(fracatlas, tmp_path, group):
    one, other = "Fractured/IMG0000000.jpg", "Non_fractured/IMG0000001.jpg"
    shutil.copy(fracatlas / "images" / one, fracatlas / "images" / other)
    table = consolidate([read_fracatlas(fracatlas)], tmp_path / "cohort", group=group)
    assert len(table) == 22
    (told,) = read_sources(tmp_path / "cohort")["sources"]
    assert told["left_out"] == {
        f"images/{one}": f"label 1, and identical to fracatlas: images/{other} with label 0",
        f"images/{other}": f"label 0, and identical to fracatlas: images/{one} with label 1",
    }
    assert len([*(tmp_path / "cohort" / "images").iterdir()]) == 22


def test_without_grouping_only_identical_pixels_are_one_patients(fracatlas, tmp_path):
    one, other = (fracatlas / f"images/Non_fractured/IMG000000{number}.jpg" for number in (1, 7))
    shutil.copy(one, other)
    table = consolidate([read_fracatlas(fracatlas)], tmp_path / "cohort").set_index("image")
    assert table["patient"].nunique() == 23
    assert table.loc["IMG0000007", "patient"] == table.loc["IMG0000001", "patient"] == "IMG0000001"
    assert not (tmp_path / "cohort" / "pairs.csv").exists()


def test_where_every_image_has_two_labels_it_is_said(fracatlas, tmp_path):
    for path in sorted(fracatlas.glob("images/*/*")):
        shutil.copy(fracatlas / "images/Non_fractured/IMG0000001.jpg", path.with_suffix(".new"))
        path.with_suffix(".new").rename(path)
    source = read_fracatlas(fracatlas, skip_unusable=True)
    with pytest.raises(ValueError, match=r"No image is left: all exist with two labels"):
        consolidate([source], tmp_path / "cohort")
    assert not (tmp_path / "cohort").exists()


def test_an_image_outside_a_published_split_that_has_it_is_named_and_left_out_when_asked(tmp_path):
    folder = mura_folder(tmp_path)
    within = "valid/XR_ELBOW/patient00008/study1_positive"
    outside = "train/XR_ELBOW/patient00002/study1_positive"
    shutil.copy(folder / outside / "image1.png", folder / within / "image1.png")
    source, options = read_mura(folder), {"group": GroupConfig(), "published": {"valid": "test"}}
    with pytest.raises(
        ValueError, match=r"outside a published split that has their patient .*\(2\)"
    ) as error:
        consolidate([source], tmp_path / "cohort", **options)
    first, second = (f"'mura: {outside}/image{view}.png': " for view in (1, 2))
    assert f"{first}identical with mura: {within}/image1.png of valid" in str(error.value)
    assert f"{second}of one patient with mura: {within}/image1.png of valid" in str(error.value)
    assert not (tmp_path / "cohort").exists()
    table = consolidate([source], tmp_path / "cohort", skip_unusable=True, **options)
    assert len(table) == 18
    assert (table["split"] == "valid").sum() == 6
    (told,) = read_sources(tmp_path / "cohort")["sources"]
    assert set(told["left_out"]) == {f"{outside}/image{view}.png" for view in (1, 2)}
    split = split_images(table, config=SplitConfig(fractions=(0.4, 0.4, 0.2)), published={"valid": "test"})
    assert (split["split"] == "test").sum() == 6
