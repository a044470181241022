"""The command line, in this process; the options and statuses of `pack` are tested with the packing."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from toy_cohort import make_toy_cohort, tiny_model

from cspine_helpers import __main__ as cli
from cspine_helpers import __version__
from cspine_helpers.checkpoints import load_run
from cspine_helpers.cohort import read_cohort
from cspine_helpers.inference.prediction import predict
from cspine_helpers.labels import UID
from cspine_helpers.packing.crop import PackConfig
from cspine_helpers.predictions import read_predictions
from cspine_helpers.runs import read_ensemble, read_history, write_record
from cspine_helpers.training.config import TrainConfig

CONFIG = TrainConfig(epochs=2, batch_size=8, accumulate=1, workers=0, vertebra_weights="equal")


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A project with the toy cohort, trained by the command line with settings of a JSON file."""
    root = tmp_path_factory.mktemp("project")
    make_toy_cohort(root / "data" / "toy")
    settings = {"model": asdict(tiny_model()), "train": asdict(CONFIG)}
    (root / "settings.json").write_text(json.dumps(settings))
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CSPINE_ROOT", str(root))
        assert cli.main(["train", "--cohort", "toy", "--settings", str(root / "settings.json")]) == 0
    return root


@pytest.mark.slow
def test_a_run_is_trained_again_with_the_settings_of_its_record(root, command):
    folder = root / "checkpoints" / "toy"
    options = ("--cohort", "toy", "--run", "again", "--skip-unusable")
    status, out, _ = command(root, "train", *options, "--settings", str(folder / "run.json"))
    assert status == 0
    assert "validation_recall" in out
    once, again = (read_history(place).drop(columns="seconds") for place in (folder, folder.parent / "again"))
    pd.testing.assert_frame_equal(again, once, check_exact=True)


def test_a_run_is_predicted_and_its_card_written(root, command):
    folder = root / "checkpoints" / "toy"
    status, out, _ = command(root, "predict", "--cohort", "toy", "--device", "cpu", "--replace")
    assert (status, out) == (0, f"{folder / 'predictions.csv'}: 28 sequences of 4 studies.\n")
    table, cohort = read_predictions(folder / "predictions.csv"), read_cohort(root / "data" / "toy")
    assert table["split"].unique().tolist() == ["validation", "test"]
    again = predict(load_run(folder), cohort.samples["test"], cohort.packed, split="test")
    found = table.loc[table["split"] == "test", "probability"]
    np.testing.assert_allclose(found, again["probability"], rtol=0, atol=1e-6)
    status, out, _ = command(root, "card", "--run", "toy")
    assert status == 0
    assert Path(out.strip()).read_text(encoding="utf-8").startswith("# Model card: `toy`")


@pytest.mark.slow
def test_a_page_is_written_for_one_patient_and_says_that_there_is_no_ct(root, command):
    samples = read_cohort(root / "data" / "toy").samples
    uid = samples["validation"][UID].iloc[0]
    own = root / "data" / "mine" / "packed"
    own.mkdir(parents=True, exist_ok=True)
    for each in (root / "data" / "toy" / "packed").glob(f"{uid}_*.npy"):
        shutil.copy(each, own / each.name.replace(uid, "patient1"))
    status, out, _ = command(root, "report", "--run", "toy", "--cohort", "mine", "--study", "patient1")
    assert status == 0
    assert str(root / "figures" / "mine" / "patient_patient1.png") in out
    shutil.rmtree(own.parent)  # others count the cohorts
    status, out, _ = command(root, "report", "--run", "toy", "--study", uid, "--truth")
    said, *paths = out.splitlines()
    assert status == 0
    assert said.startswith(f"No CT of {uid} in ")
    assert [Path(path).name for path in paths] == [f"patient_{uid}.pdf", f"patient_{uid}.png"]
    assert [Path(path).read_bytes()[:4] for path in paths] == [b"%PDF", b"\x89PNG"]
    for other, options, sentence in (
        (samples["test"][UID].iloc[0], ("--truth",), "is a patient of the test split"),
        ("1.2.nobody", (), "has no packed sequence in"),
    ):
        status, _, err = command(root, "report", "--run", "toy", "--study", other, *options)
        assert status == 100
        assert sentence in err
        assert not list((root / "figures").rglob(f"patient_{other}*"))


def test_a_run_of_other_data_is_not_predicted(root, command):
    folder = root / "checkpoints" / "toy"
    run = load_run(folder)
    before = (folder / "run.json").read_bytes()
    write_record(folder, {**run.record, "data": {**run.record["data"], "split_sha256": "0"}})
    status, _, err = command(root, "predict", "--cohort", "toy")
    assert status == 100
    assert "trained on other data" in err
    (folder / "run.json").write_bytes(before)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("train --cohort toy --settings bad.json", "bad.json: model: sizes is unknown (did you mean size?)"),
        ("train --cohort toy --settings none.json", "No settings at none.json. Name a JSON file as"),
        ("train --cohort toy --settings data", "No settings at data. Name"),
        ("train --cohort none", "No label table at"),
        ("predict --cohort toy --run none", "none: run.json is missing"),
        ("predict --cohort toy --run none --calibrated", "none: run.json is missing"),
        ("predict --cohort toy --replace --calibrated", "decision.json is missing"),
        ("predict --cohort toy --run ../toy", "A run name is up to 64 letters"),
        ("predict --cohort toy --replace --device nonsense", "no device that torch can use here"),
        ("predict --cohort toy --replace --batch-size 0", "found a batch size of 0"),
        ("predict --cohort toy --replace --workers -1", "and -1 workers"),
        ("link --cohort mine absent", "No cohort at absent: it is no folder, or empty. Check its name."),
        ("card --run absent", "Nothing is known of a run at"),
        ("card --run ../toy", "A run name is"),
        ("phantom --cohort ../outside", "A cohort name is"),
        ("phantom --truth rsna", "builtin is a standard cohort of full truth and 64 pixels"),
        ("phantom --cohort quick --size 96", "a name of its own, such as --cohort quick_2"),
        ("phantom --cohort mine --like none", "No label table at"),
        ("phantom --cohort mine --size 0", "slices and size must be positive"),
        ("phantom --cohort mine --studies 0", "A cohort has 1 study or more and a seed from 0 to"),
        ("phantom --cohort mine --seed -1", "A cohort has 1 study or more and a seed from 0 to"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(root, command, monkeypatch, arguments, sentence):
    monkeypatch.chdir(root)
    (root / "bad.json").write_text('{"model": {"sizes": 3}, "train": {}}')
    status, out, err = command(root, *arguments.split())
    assert (status, out) == (100, "")
    assert sentence in err
    assert "Traceback" not in err
    assert sorted(path.name for path in (root / "data").iterdir()) == ["toy"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("", "the following arguments are required: command"),
        ("dance", "invalid choice: 'dance'"),
        ("card --colour red", "unrecognized arguments: --colour red"),
        ("train --skip", "unrecognized arguments: --skip"),
        ("phantom --studies many", "invalid int value: 'many'"),
    ],
)
def test_arguments_that_are_not_known_are_named_with_the_usage(tmp_path, command, arguments, sentence):
    status, out, err = command(tmp_path, *arguments.split())
    assert (status, out) == (2, "")
    assert err.startswith("usage: python -m cspine_helpers")
    assert sentence in err


@pytest.mark.parametrize("arguments", ["card --run pack", "dance pack"])
def test_a_command_named_by_an_options_value_is_not_loaded(tmp_path, command, monkeypatch, arguments):
    def loaded(_):
        pytest.fail("the options of pack were loaded")

    monkeypatch.setitem(cli._COMMANDS, "pack", replace(cli._COMMANDS["pack"], add_options=loaded))
    status, _, err = command(tmp_path, *arguments.split())
    assert (status, "of a run at" in err) == ((2, False) if "dance" in arguments else (100, True))


@pytest.mark.parametrize("name", cli._COMMANDS)
def test_ctrl_c_ends_a_command_with_what_is_kept(tmp_path, command, monkeypatch, name):
    def stop(_):
        raise KeyboardInterrupt

    monkeypatch.setitem(cli._COMMANDS, name, replace(cli._COMMANDS[name], run=stop))
    needed = {
        "pack": ("--cohort", "toy"),
        "link": ("--cohort", "toy", "elsewhere"),
        "weights": ("--package", "mine"),
        "report": ("--study", "1.2.3"),
        "explain": ("--study", "1.2.3"),
        "radiographs": ("--cohort", "toy"),
    }
    arguments = needed.get(name, ())
    assert command(tmp_path, name, *arguments) == (130, "", f"Stopped. {cli._COMMANDS[name].stopped}\n")


HELP = """
import runpy, sys

sys.argv = ["cspine_helpers", "train", "--help"]
try:
    runpy.run_module("cspine_helpers", run_name="__main__")
finally:
    assert not {"torch", "timm", "accelerate", "pandas"} & set(sys.modules)
"""


def test_help_of_the_module_loads_no_torch():
    done = subprocess.run([sys.executable, "-c", HELP], check=True, capture_output=True, text=True)
    assert done.stderr == ""
    assert "--skip-unusable" in done.stdout


def test_help_states_an_example_the_exit_statuses_and_the_defaults(tmp_path, command):
    whole = command(tmp_path, "--help")[1]
    helps = {name: command(tmp_path, name, "--help") for name in cli._COMMANDS}
    for name, (status, text, err) in helps.items():
        assert (status, err) == (0, "")
        assert f"python -m cspine_helpers {cli._COMMANDS[name].example}\n" in text
        assert "  3    pack: some studies failed; the summary and report.csv name them\n" in text
        assert "100  refused" in text
        assert name in whole
    packing = " ".join(helps["pack"][1].split())
    default = PackConfig()
    window = " ".join(f"{edge:g}" for edge in default.window_hu)
    for value in (default.slices, default.size, default.margin_mm, default.neighbour_mm, window):
        assert f"(default: {value})" in packing


def test_the_version_names_what_decides_numbers(tmp_path, command, capsys):
    status, out, _ = command(tmp_path, "--version")
    assert status == 0
    assert re.match(rf"cspine_helpers {__version__}; Python 3\.\d+\.\d+, \w+ \w+; ", out)
    assert f"torch {version('torch')}" in out


def test_an_empty_path_is_no_folder(tmp_path, command):
    every = [("predict", "--images", ""), ("pack", "--masks", " "), ("radiographs", "--fracatlas", "")]
    every += [("explain", name, "") for name in ("--images", "--ct", "--out")]
    for asked in every:
        status, _, err = command(tmp_path, *asked)
        assert status == 2
        assert f"argument {asked[1]}: it is empty; name a file or a folder" in err
    assert "argument --study: it is empty; name a study" in command(tmp_path, "explain", "--study", "")[2]


@pytest.mark.slow
def test_folds_are_trained_and_predicted_by_one_command_that_leaves_what_is_done(root, command):
    asked = ("train", "--cohort", "toy", "--run", "folds", "--settings", str(root / "settings.json"))
    status, out, _ = command(root, *asked, "--folds", "3", "--fold", "1")
    assert (status, out.split()[0]) == (0, "fold")
    folder = root / "checkpoints" / "folds"
    assert {path.name for path in folder.iterdir()} == {"folds.csv", "folds.csv.sha256", "fold_1"}
    status, out, _ = command(root, *asked, "--folds", "3")
    assert status == 0
    assert f"{folder / 'predictions.csv'}: each study by the model of its fold" in out
    table = read_predictions(folder / "predictions.csv")
    assert table.groupby("split")["fold"].nunique().to_dict() == {"test": 0, "validation": 3}
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    assert command(root, *asked, "--folds", "3")[0] == 0
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()} == before
    status, out, _ = command(root, "predict", "--run", "folds", "--tta", "--replace")
    assert status == 0
    assert len(read_ensemble(folder)["views"]) == 2
    assert not read_predictions(folder / "predictions.csv").equals(table)


def test_an_ensemble_is_predicted_from_the_cohort_of_its_runs(root, command):
    asked = ("predict", "--ensemble", "toy", "--tta")
    status, out, _ = command(root, *asked, "--run", "mirrored")
    folder = root / "checkpoints" / "mirrored"
    assert (status, out) == (0, f"{folder / 'predictions.csv'}: 28 sequences of 4 studies.\n")
    assert [each["run"] for each in read_ensemble(folder)["members"]] == ["toy"]


REFUSED_OF_SEVERAL = {
    "--fold 2 needs --folds, how many there are: --folds 5.": ("train", "--fold", "2"),
    "Folds are numbered 0 to 2; found 3. Choose one of them.": ("train", "--fold", "3", "--folds", "3"),
    "--ensemble needs --run, the folder": ("predict", "--ensemble", "toy", "toy"),
    "Each run counts once; found several times: 'toy'.": (
        "predict",
        "--ensemble",
        "toy",
        "toy",
        "--run",
        "x",
    ),
    "--tta is for an ensemble, of one run or more": ("predict", "--run", "toy", "--tta", "--replace"),
    "An ensemble has two runs or more, or one with tta": ("predict", "--ensemble", "toy", "--run", "x"),
    "have no weights (1): 'gone'. Train": ("predict", "--ensemble", "toy", "gone", "--run", "x"),
    "--tta is for the table of a cohort": ("predict", "--study", "1.2.826.0", "--run", "toy", "--tta"),
}


@pytest.mark.parametrize("sentence", REFUSED_OF_SEVERAL)
def test_folds_and_ensembles_that_make_no_sense_are_refused_in_a_sentence(sentence, root, command):
    before = sorted((root / "checkpoints").rglob("*"))
    name, *options = REFUSED_OF_SEVERAL[sentence]
    of = () if name == "predict" else ("--run", "x", "--settings", str(root / "settings.json"))
    status, _, error = command(root, name, "--cohort", "toy", *options, *of)
    assert (status, sentence in error, error.count("\n")) == (100, True, 1)
    assert sorted((root / "checkpoints").rglob("*")) == before


def test_a_blend_is_of_radiographs(root, command):
    assert command(root, "predict", "--run", "toy", "--blend")[2].startswith("--blend is for runs of radio")
