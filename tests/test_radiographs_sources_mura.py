"""MURA as it is published, read strictly."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from radiograph_folders import change, mura_folder

from cspine_helpers.radiographs.sources.mura import read_mura


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A MURA folder; read only."""
    folder = tmp_path_factory.mktemp("published")
    mura_folder(folder / "positive MURA-v1.1")
    return folder


@pytest.fixture
def mura(made, tmp_path) -> Path:
    """A MURA folder to damage, under a root whose name holds its own words."""
    root = made / "positive MURA-v1.1"
    return shutil.copytree(root, tmp_path / root.name) / "MURA-v1.1"


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
