"""MURA as it is published, read strictly; and judged by studies."""

import shutil
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from radiograph_folders import change, mura_folder
from sklearn.metrics import roc_auc_score

from cspine_helpers.radiographs.consolidation import consolidate
from cspine_helpers.radiographs.evaluation import study_metrics, study_scores
from cspine_helpers.radiographs.groups import GroupConfig
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
_NEGATIVE = _STUDY.replace("positive", "negative")


def both_folders(folder: Path) -> None:
    """The study is positive, and with other images negative; tables hold both."""
    (folder / _NEGATIVE).mkdir()
    for view, other in ((1, "patient00001"), (2, "patient00001")):
        shutil.copy(folder / f"train/XR_WRIST/{other}/study1_negative/image{view}.png", folder / _NEGATIVE)
    with (folder / "train_image_paths.csv").open("a") as file:
        file.writelines(f"MURA-v1.1/{_NEGATIVE}/image{view}.png\n" for view in (1, 2))
    with (folder / "train_labeled_studies.csv").open("a") as file:
        file.write(f"MURA-v1.1/{_NEGATIVE}/,0\n")


MURA_FAULTS = {
    "folders of both labels": (
        both_folders,
        rf"images of studies whose folders are positive and negative \(4\): '{_NEGATIVE}/image1.png'",
        2,
    ),
    "rows of both labels": (
        lambda f: (
            change(
                f / "train_labeled_studies.csv", f"MURA-v1.1/{_STUDY}/,1\n", f"MURA-v1.1/{_STUDY}/,0\n" * 2
            )
            or change(f / "train_labeled_studies.csv", f"{_STUDY}/,0", f"{_STUDY}/,1")
        ),
        rf"studies that train_labeled_studies.csv gives two labels \(2\): '{_STUDY}/image1.png'",
        2,
    ),
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
    source = read_mura(mura, skip_unusable=True)
    assert len(source.table) == 20 - gone
    assert not set(source.left_out) & set(source.table["original"])
    assert (source.table.groupby("study")["label"].nunique() == 1).all()


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


@pytest.mark.parametrize("decomposed", ["file", "table"])
def test_accents_composed_and_decomposed_are_the_same_name(mura, decomposed):
    image = mura / _STUDY / "image2.png"
    name = {form: unicodedata.normalize(form, "größe.png") for form in ("NFC", "NFD")}
    on_disk, listed = (name["NFD"], name["NFC"]) if decomposed == "file" else (name["NFC"], name["NFD"])
    image.rename(image.with_name(on_disk))
    change(mura / "train_image_paths.csv", f"{_STUDY}/image2.png", f"{_STUDY}/{listed}")
    table = read_mura(mura).table.set_index("image")
    path = Path(table.loc["elbow-patient00002-study1-grosse", "path"])
    assert path.is_file()
    shutil.copy(path, path.with_name(listed))
    with pytest.raises(ValueError, match=r"one name, with accents composed and decomposed \(1\)"):
        read_mura(mura)
    assert len(read_mura(mura, skip_unusable=True).table) == 19


def test_names_that_differ_in_capitals_only_are_told_apart(mura):
    image = mura / _STUDY / "image2.png"
    image.with_name("IMAGE2.png").write_bytes((mura / _STUDY / "image1.png").read_bytes())
    change(
        mura / "train_image_paths.csv",
        f"MURA-v1.1/{_STUDY}/image2.png\n",
        "".join(f"MURA-v1.1/{_STUDY}/{name}.png\n" for name in ("image2", "IMAGE2")),
    )
    table = read_mura(mura).table
    assert len(table) == 21
    assert table["image"].str.casefold().is_unique


def test_an_image_under_a_wrong_ending_or_in_cmyk_is_one_of_its_study(mura, tmp_path):
    one, two = (mura / _STUDY / f"image{view}.png" for view in (1, 2))
    with Image.open(one) as image:
        image.convert("RGB").convert("CMYK").save(one, format="TIFF")
    with Image.open(two) as image:
        image.save(two, format="JPEG")
    table = consolidate([read_mura(mura)], tmp_path / "cohort")
    assert len(table) == 20


@pytest.mark.parametrize("group", [None, GroupConfig()])
def test_the_real_layout_leads_to_scores_of_studies(mura, tmp_path, group):
    images = consolidate([read_mura(mura)], tmp_path / "cohort", group=group)
    images = images[images["split"] == "train"]
    drawn = np.random.default_rng(4).uniform(0, 0.5, len(images)) + images["label"] / 2.5
    studies = study_scores(images.assign(probability=drawn, split="validation"))
    # by the folders on disk: 6 patients, the fourth of whom has two studies
    folders = {path.parent for path in (mura / "train").rglob("*.png")}
    assert len(studies) == len(folders) == 7
    assert studies["patient"].nunique() == 6
    assert (studies["images"] == 2).all()
    assert studies["label"].sum() == sum(path.name.endswith("positive") for path in folders) == 4
    mean = drawn[images["study"] == "elbow-patient00002-study1"].mean()
    found = studies.set_index("StudyInstanceUID")["probability"]
    assert found["elbow-patient00002-study1"] == pytest.approx(mean)
    metrics = study_metrics(studies, threshold=0.5, resamples=50).set_index("metric")
    assert metrics.loc["auroc", ["n", "groups"]].tolist() == [7, 6]
    expected = roc_auc_score(studies["label"], studies["probability"])
    assert metrics.loc["auroc", "value"] == pytest.approx(expected)
