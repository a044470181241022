"""The command that predicts, with runs of radiographs; with a run of CT it is tried in `test_main`."""

import re
import shutil

import pandas as pd
import pytest
from radiograph_runs import Runs, packed_cohort

from cspine_helpers.predictions import read_predictions
from cspine_helpers.radiographs import blend, prediction

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def of_radiographs(tmp_path_factory):
    """A project with a cohort of radiographs and three runs that were not trained, but predict."""
    root = tmp_path_factory.mktemp("radiographs")
    cohort = packed_cohort(root / "made")
    (root / "data").mkdir()
    cohort.rename(root / "data" / "limbs")
    runs = Runs(root / "data" / "limbs", root / "checkpoints")
    for name, bright in (("one", 200.0), ("two", 150.0), ("three", 180.0)):
        runs(name, bright=bright)
    with runs.loaded():
        yield root


def test_radiographs_are_predicted_by_the_task_of_their_run(of_radiographs, command):
    folder = of_radiographs / "checkpoints" / "one"
    status, out, err = command(of_radiographs, "predict", "--run", "one", "--device", "cpu")
    assert (status, out) == (0, f"{folder / 'predictions.csv'}: 12 images of 12 groups.\n"), err
    assert set(read_predictions(folder / "predictions.csv")["vertebra"]) == {"image"}
    assert (folder / "masks.csv").is_file()


def test_an_ensemble_of_radiographs_is_blended_and_predicted_again_by_its_name(
    of_radiographs, command, monkeypatch
):
    monkeypatch.setattr(
        prediction, "search_blend", lambda outputs, folds: blend.search_blend(outputs, folds=2)
    )
    ensemble = ("predict", "--ensemble", "one", "two", "--run", "mean", "--device", "cpu", "--blend", "--tta")
    status, out, _ = command(of_radiographs, *ensemble)
    assert status == 0
    assert "chosen out of fold" in out
    assert re.search(r"Weights: one \d\.\d\d, two \d\.\d\d\. Views: 4\.", out)
    table = read_predictions(of_radiographs / "checkpoints" / "mean" / "predictions.csv")
    again = ("predict", "--run", "mean", "--device", "cpu")
    assert command(of_radiographs, *again)[0] == 100  # it is there
    assert command(of_radiographs, *again, "--replace")[0] == 0
    pd.testing.assert_frame_equal(
        read_predictions(of_radiographs / "checkpoints" / "mean" / "predictions.csv"), table
    )


def test_a_folder_of_radiographs_is_answered_and_damage_is_a_status(of_radiographs, command, tmp_path):
    images = tmp_path / "xrays"
    shutil.copytree(of_radiographs / "data" / "limbs" / "images", images)
    asked = ("predict", "--run", "three", "--images", str(images), "--device", "cpu")
    status, out, _ = command(of_radiographs, *asked)
    answers = of_radiographs / "checkpoints" / "three" / "images" / "xrays"
    assert status == 0
    assert out.startswith("36 radiographs, ")
    assert str(answers) in out
    assert len(pd.read_csv(answers / "predictions.csv")) == 36
    (images / "torn.png").write_bytes(b"")
    status, out, _ = command(of_radiographs, *asked, "--out", str(tmp_path / "again"), "--threshold", "0.2")
    assert status == 3
    assert "Not readable (1), see unreadable.csv: 'torn.png'" in out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("--run one --images x --study 1", "--study cannot be used with --images"),
        ("--run one --images x --blend --cohort limbs", "--cohort and --blend cannot be used with --images"),
        ("--run one --images nowhere", "No folder at nowhere"),
        ("--run two --study 1", "--study cannot be used with a run of radiographs"),
        ("--run two --threshold 0.5", "--threshold is for --images"),
        ("--run two --inverted", "--inverted is for --images"),
        ("--run two --skip-unusable", "--skip-unusable cannot be used with a run of radiographs"),
        ("--ensemble one two", "--ensemble needs --run"),
        ("--run nobody --images x", "No run at"),
    ],
)
def test_what_radiographs_cannot_be_asked_is_one_sentence(of_radiographs, command, arguments, sentence):
    (of_radiographs / "x").mkdir(exist_ok=True)
    shutil.copyfile(
        next((of_radiographs / "data" / "limbs" / "images").iterdir()), of_radiographs / "x" / "1.jpg"
    )
    before = sorted(of_radiographs.rglob("*"))
    arguments = arguments.replace("--images x", f"--images {of_radiographs / 'x'}")
    status, out, err = command(of_radiographs, "predict", *arguments.split())
    assert (status, out) == (100, "")
    assert sentence in err
    assert sorted(of_radiographs.rglob("*")) == before
