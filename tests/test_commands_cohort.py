"""Commands that make a cohort, of phantoms and of radiographs; `link` is tested with the paths."""

import json
import shutil
from pathlib import Path

import pytest
from radiograph_folders import YOLO_LABELS, mura_folder, radiograph_cohort, yolo_folder

from cspine_helpers.labels import UID, expand, read_labels
from cspine_helpers.packed import check_sequences
from cspine_helpers.radiographs.image_table import read_images, read_pairs, read_sources
from cspine_helpers.splits import read_split


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """FracAtlas, YOLO and MURA folders; read only."""
    folder = tmp_path_factory.mktemp("published")
    yolo_folder(folder / "yolo")
    mura_folder(folder / "positive MURA-v1.1")
    radiograph_cohort(folder)
    return folder


@pytest.fixture
def radiographs(tmp_path, command):
    """The command that makes the cohort `limbs`: exit status, output, errors."""
    return lambda *arguments: command(tmp_path, "radiographs", "--cohort", "limbs", *map(str, arguments))


def test_the_command_joins_groups_splits_and_packs_and_leaves_what_is_done(made, tmp_path, radiographs):
    labels = tmp_path / "labels.json"
    labels.write_text(json.dumps(YOLO_LABELS))
    sources = ["--fracatlas", made / "source", "--yolo", made / "yolo", "--labels", labels]
    status, said, errors = radiographs(*sources, "--long", 64, "--short", 32)
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
    assert radiographs(*sources, "--long", 64, "--short", 32)[:2] == (0, said)
    assert {path: path.read_bytes() for path in cohort.rglob("*") if path.is_file()} == written


@pytest.mark.parametrize("published", ["valid=test", "val=tset", "val"])
def test_a_cohort_that_cannot_be_divided_is_not_begun(made, tmp_path, radiographs, published):
    status, _, errors = radiographs("--fracatlas", made / "source", "--published", published)
    assert (status, list((tmp_path / "data").glob("limbs"))) == (100, []), errors
    assert radiographs("--fracatlas", made / "source", "--long", 64, "--short", 32)[0] == 0


def test_muras_published_test_images_can_stay_the_test_split(made, tmp_path, radiographs):
    folder = made / "positive MURA-v1.1" / "MURA-v1.1"
    options = ("--long", 64, "--short", 32, "--fractions", 0.4, 0.4, 0.2)
    status, said, errors = radiographs("--mura", folder, "--published", "valid=test", *options)
    assert status == 0, errors
    assert "20 images, 12 abnormal" in said
    cohort = tmp_path / "data" / "limbs"
    table, split = (
        read_images(cohort),
        read_split(cohort / "split.csv").set_index("StudyInstanceUID")["split"],
    )
    assert ((table["split"] == "valid") == (table["image"].map(split) == "test")).all()


def test_a_copy_of_a_published_test_image_among_the_others_can_be_left_out(tmp_path, radiographs):
    folder = mura_folder(tmp_path / "source")
    one = folder / "train/XR_ELBOW/patient00002/study1_positive/image1.png"
    shutil.copy(one, folder / "valid/XR_ELBOW/patient00008/study1_positive/image1.png")
    options = ("--published", "valid=test", "--long", 64, "--short", 32, "--fractions", 0.4, 0.4, 0.2)
    status, _, errors = radiographs("--mura", folder, *options)
    assert status == 100
    assert "identical with mura: valid/XR_ELBOW/patient00008/study1_positive/image1.png of valid" in errors
    status, said, errors = radiographs("--mura", folder, "--skip-unusable", *options)
    assert status == 0, errors
    assert "18 images" in said


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
def test_what_the_command_cannot_do_is_one_sentence(radiographs, tmp_path, arguments, says):
    status, _, errors = radiographs(*arguments)
    assert status == 100
    assert says in errors
    assert not (tmp_path / "data").exists()


def test_a_cohort_of_phantoms_is_made_and_stays_as_it_was_made(tmp_path, command):
    options = "--studies 1 --seed 4 --workers 1 --truth rsna --size 24"
    assert command(tmp_path, "phantom", "--cohort", "tiny", *options.split())[0] == 0
    folder = tmp_path / "data" / "tiny"
    table = read_labels(folder / "train.csv")
    assert len(table) == 1
    check_sequences(folder / "packed", expand(table, table[UID]), slices=15, size=24)
    assert json.loads((folder / "cohort.json").read_text())["config"]["truth"] == "rsna"
    status, out, _ = command(tmp_path, "phantom", "--cohort", "tiny")  # made again it would be the same
    assert (status, out) == (0, "tiny: 1 studies are there already.\n")
