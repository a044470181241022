import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_evaluation_cases import toy
from toy_cohort import make_toy_cohort, tiny_model

from cspine_helpers import checkpoints
from cspine_helpers import cohort as cohorts
from cspine_helpers.__main__ import main
from cspine_helpers.checkpoints import Run, save_weights
from cspine_helpers.cohort import read_cohort
from cspine_helpers.decisions.test_split import freeze
from cspine_helpers.decisions.thresholds import Rule, choose_decision
from cspine_helpers.evaluation.calibration import calibrated, fit_calibrator
from cspine_helpers.evaluation.cases import Aggregation, Cases
from cspine_helpers.inference import prediction as inference
from cspine_helpers.inference.prediction import predict, predict_cohort
from cspine_helpers.labels import UID, VERTEBRAE, write_labels
from cspine_helpers.model.classifier import FractureClassifier
from cspine_helpers.packed import open_sequence, sequence_path
from cspine_helpers.predictions import COLUMNS, read_predictions, write_predictions
from cspine_helpers.runs import write_record


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    return read_cohort(make_toy_cohort(tmp_path_factory.mktemp("toy")))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    torch.manual_seed(0)
    config = tiny_model()
    record = {"weights_sha256": "0" * 64, "decision": {"threshold": 0.5, "reason": "made up."}}
    return Run(tmp_path_factory.mktemp("run"), FractureClassifier(config).eval(), config, 0.5, record)


@torch.inference_mode()
def by_hand(run, cohort, uid, vertebra) -> float:
    sequence = np.array(open_sequence(sequence_path(cohort.packed, uid, vertebra)))
    return run.model(torch.from_numpy(sequence).permute(0, 3, 1, 2)[None]).logit.sigmoid().item()


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_the_table_holds_every_sample_in_order_with_its_probability(run, cohort, batch_size):
    samples = cohort.samples["test"].sample(frac=1, random_state=0)
    table = predict(run, samples, cohort.packed, split="test", batch_size=batch_size)
    assert tuple(table.columns) == COLUMNS
    assert (table["split"] == "test").all()
    for column in (UID, "vertebra", "label"):
        assert table[column].tolist() == samples[column].tolist()
    for row in (0, len(table) - 1):
        expected = by_hand(run, cohort, table[UID][row], table["vertebra"][row])
        assert table["probability"][row] == pytest.approx(expected, abs=1e-5)
    assert not run.model.training


def test_the_table_can_be_written_and_read(run, cohort, tmp_path):
    table = predict(run, cohort.samples["test"], cohort.packed, split="test")
    write_predictions(table, tmp_path / "predictions.csv")
    pd.testing.assert_frame_equal(read_predictions(tmp_path / "predictions.csv"), table, check_dtype=False)


def test_missing_sequences_stop_the_prediction_by_name(run, cohort, tmp_path):
    with pytest.raises(ValueError, match=r"14 of 14 packed sequences .*missing"):
        predict(run, cohort.samples["test"], tmp_path, split="test")


BATCH = 3  # 28 sequences of validation and test: ten batches, the last of one


class Stop(Exception):
    """Stands for whatever ends a process."""


@pytest.fixture(scope="module")
def uninterrupted(run, cohort, tmp_path_factory):
    """The table's bytes, and those of the partial file just before it went."""
    path = tmp_path_factory.mktemp("whole") / "predictions.csv"
    partial = path.with_name("predictions.csv.partial")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inference, "write_predictions", stop)
        with pytest.raises(Stop):
            predict_cohort(run, cohort, path, batch_size=BATCH)
    noted = partial.read_bytes()
    predict_cohort(run, cohort, path, batch_size=BATCH)  # nothing is left to compute
    assert not partial.exists()
    return path.read_bytes(), noted


def stop(*_):
    raise Stop


def resumed(run, cohort, folder, partial: bytes) -> tuple[bytes, int]:
    """The table's bytes after going on from a partial file, and the batches that were computed for it."""
    path, computed = folder / "predictions.csv", []
    noted = folder / "predictions.csv.partial"
    noted.write_bytes(partial)
    hook = run.model.register_forward_pre_hook(lambda *_: computed.append(1))
    predict_cohort(run, cohort, path, batch_size=BATCH)
    hook.remove()
    assert not noted.exists()
    return path.read_bytes(), len(computed)


def test_a_table_that_is_there_is_replaced_only_when_asked(run, cohort, tmp_path, uninterrupted):
    path = tmp_path / "predictions.csv"
    path.write_text("theirs")
    with pytest.raises(FileExistsError, match=r"a decision may rest on it.*--replace"):
        predict_cohort(run, cohort, path, batch_size=BATCH)
    assert path.read_text() == "theirs"
    predict_cohort(run, cohort, path, batch_size=BATCH, replace=True)
    assert path.read_bytes() == uninterrupted[0]


def test_a_cohorts_table_is_that_of_its_splits(run, cohort, tmp_path):
    table = predict_cohort(run, cohort, tmp_path / "new" / "predictions.csv", batch_size=BATCH)
    parts = [predict(run, cohort.samples[name], cohort.packed, split=name) for name in ("validation", "test")]
    pd.testing.assert_frame_equal(table, pd.concat(parts, ignore_index=True), rtol=0, atol=1e-6)
    stored = read_predictions(tmp_path / "new" / "predictions.csv")
    pd.testing.assert_frame_equal(stored, table, check_exact=True)


def test_workers_change_nothing(run, cohort, tmp_path, uninterrupted):
    predict_cohort(run, cohort, tmp_path / "predictions.csv", batch_size=BATCH, workers=2)
    assert (tmp_path / "predictions.csv").read_bytes() == uninterrupted[0]


@pytest.mark.slow
def test_stopped_after_any_byte_it_goes_on_behind_the_last_whole_batch(run, cohort, tmp_path, uninterrupted):
    whole, noted = uninterrupted
    ends = [place + 1 for place, byte in enumerate(noted) if byte == ord("\n")]
    assert len(ends) == 11
    cuts = {0, 1, *ends, *(end - 1 for end in ends), *(end + 20 for end in ends[:-1])}
    for cut in sorted(cuts):
        batches = max(sum(end <= cut for end in ends) - 1, 0)
        assert resumed(run, cohort, tmp_path, noted[:cut]) == (whole, 10 - batches), cut


@pytest.mark.slow
@settings(max_examples=30)
@given(data=st.data())
def test_a_garbled_partial_file_changes_no_result(run, cohort, tmp_path_factory, uninterrupted, data):
    whole, noted = uninterrupted
    place = data.draw(st.integers(0, len(noted) - 1))
    garbage = data.draw(st.binary(min_size=1, max_size=40))
    garbled = noted[:place] + garbage + noted[place + len(garbage) :]
    found, _ = resumed(run, cohort, tmp_path_factory.mktemp("garbled"), garbled)
    assert found == whole


def test_batches_that_two_processes_noted_count_once(run, cohort, tmp_path, uninterrupted):
    whole, noted = uninterrupted
    lines = noted.splitlines(keepends=True)
    assert resumed(run, cohort, tmp_path, b"".join([*lines[:3], lines[2], *lines[3:]])) == (whole, 8)
    assert resumed(run, cohort, tmp_path, b"".join([lines[0], *lines[2:]])) == (whole, 10)


def test_an_exception_in_between_keeps_what_was_computed(run, cohort, tmp_path, uninterrupted):
    whole, noted = uninterrupted
    calls = []

    def fail(*_):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt

    hook = run.model.register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        predict_cohort(run, cohort, tmp_path / "predictions.csv", batch_size=BATCH)
    hook.remove()
    partial = tmp_path / "predictions.csv.partial"
    assert partial.read_bytes() == b"".join(noted.splitlines(keepends=True)[:5])
    assert resumed(run, cohort, tmp_path, partial.read_bytes()) == (whole, 6)


def test_going_on_otherwise_than_begun_is_refused_and_nothing_is_lost(run, cohort, tmp_path, uninterrupted):
    path, partial = tmp_path / "predictions.csv", tmp_path / "predictions.csv.partial"
    begun = uninterrupted[1][:-30]
    partial.write_bytes(begun)
    other_run = replace(run, record={**run.record, "weights_sha256": "1" * 64})
    with pytest.raises(
        ValueError, match=r"partial was begun otherwise: weights_sha256 is '0{64}', not '1{64}'"
    ):
        predict_cohort(other_run, cohort, path, batch_size=BATCH)
    with pytest.raises(
        ValueError, match=r"splits is \['validation', 'test'\], not \['test'\]; batch_size is 3, not 4"
    ):
        predict_cohort(run, cohort, path, splits=["test"], batch_size=4)
    other = make_toy_cohort(tmp_path / "other", seed=1)
    with pytest.raises(ValueError, match=r"labels_sha256 is .* delete it to predict from the start"):
        predict_cohort(run, read_cohort(other), path, batch_size=BATCH)
    assert partial.read_bytes().startswith(begun[: begun.rindex(b"\n") + 1])
    assert not path.exists()


def test_what_cannot_be_predicted_leaves_nothing_behind(run, cohort, tmp_path):
    elsewhere = replace(cohort, folder=tmp_path)
    write_labels(cohort.labels, tmp_path / "train.csv")
    with pytest.raises(ValueError, match=r"28 of 28 packed sequences .*missing"):
        predict_cohort(run, replace(elsewhere, manifest=None), tmp_path / "run" / "predictions.csv")
    assert not (tmp_path / "run").exists()


@pytest.fixture
def project(tmp_path, cohort, monkeypatch):
    """A project folder with the toy cohort and a run of it, both named toy."""
    monkeypatch.setenv("CSPINE_ROOT", str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "toy").symlink_to(cohort.folder)
    torch.manual_seed(0)
    model = FractureClassifier(tiny_model())
    folder = tmp_path / "checkpoints" / "toy"
    folder.mkdir(parents=True)
    save_weights(folder, model)
    record = {"model": asdict(model.config), "classes": list(VERTEBRAE), "data": cohort.fingerprint()}
    write_record(folder, {**record, "decision": {"threshold": None, "reason": "untrained."}})
    return folder


KILLED = """
import os, pathlib, signal, sys
import cspine_helpers.inference  # loaded once, before the forks
from cspine_helpers import checkpoints
from cspine_helpers import cohort as cohorts
from cspine_helpers.__main__ import main
from cspine_helpers.files import records as journal

folder = pathlib.Path(os.environ["CSPINE_ROOT"], "checkpoints", "toy")
table, partial, line = folder / "predictions.csv", folder / "predictions.csv.partial", journal._line


def killed_in_line(moment):
    def torn(number, record):
        text = line(number, record)
        if number == moment:
            with partial.open("ab") as file:
                file.write(text[: len(text) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        return text

    journal._line = torn


def predict(prepare=lambda: None):
    if not (child := os.fork()):  # torch is imported once, and has computed nothing yet
        prepare()
        main(["predict", "--cohort", "toy", "--batch-size", "3", "--device", "cpu"])
        os._exit(0)
    return os.waitpid(child, 0)[1]


for moment in (0, 2, 3, 4, 9, 10):  # the first line is written together with the second
    assert predict(lambda: killed_in_line(moment)) == signal.SIGKILL
    assert partial.read_bytes().count(b"\\n") == moment and not table.exists(), moment
assert predict() == 0
resumed = table.read_bytes()
table.unlink()
assert predict() == 0
assert table.read_bytes() == resumed
assert not partial.exists()
"""


@pytest.mark.slow
def test_a_killed_process_goes_on_and_writes_the_same_bytes(project):
    subprocess.run([sys.executable, "-c", KILLED], check=True)


def test_unusable_studies_are_skipped_when_asked(run, cohort, tmp_path, capsys):
    packed = tmp_path / "toy" / "packed"
    shutil.copytree(cohort.folder, packed.parent)
    known = read_cohort(packed.parent)
    lost = known.samples["test"]["StudyInstanceUID"].iloc[0]
    (packed / f"{lost}_3.npy").unlink()
    with pytest.raises(ValueError, match=rf"{lost}_3.npy \(missing\)"):
        predict_cohort(run, known, tmp_path / "predictions.csv")
    table = predict_cohort(run, known, tmp_path / "predictions.csv", skip_unusable=True)
    assert lost not in set(table["StudyInstanceUID"])
    assert len(table) == len(known.samples["validation"]) + len(known.samples["test"]) - 7
    assert f"1 studies skipped, whose sequences are unusable: '{lost}'" in capsys.readouterr().out


@pytest.fixture
def calibrating(run, tmp_path):
    """The run in a folder with predictions of many patients, on which calibrators are frozen."""
    table = toy(150)
    folder = tmp_path / "checkpoints" / "toy"
    folder.mkdir(parents=True)
    write_predictions(table, folder / "predictions.csv")
    decisions = [
        choose_decision(table, Rule("max_f1")),
        choose_decision(table, Rule("max_f1", level="patient", aggregation=Aggregation("max"))),
    ]
    fitted = [fit_calibrator(Cases.of(table, level=level), kind="platt") for level in ("vertebra", "patient")]
    freeze(folder, decisions, table, calibrators=fitted)
    return replace(run, folder=folder), fitted


def test_frozen_calibrators_are_applied_on_request(calibrating, cohort):
    run, (vertebrae, patients) = calibrating
    samples = cohort.samples["test"]
    plain = predict(run, samples, cohort.packed, split="test")
    assert "calibrated" not in plain.columns
    table = predict(run, samples, cohort.packed, split="test", calibrate=True)
    of_patient = table["vertebra"] == "patient_overall"
    pd.testing.assert_frame_equal(table[~of_patient].drop(columns="calibrated"), plain)
    np.testing.assert_array_equal(
        table["calibrated"][~of_patient], calibrated(vertebrae, plain["probability"])
    )
    highest = plain.groupby(UID, sort=False)["probability"].max()
    np.testing.assert_array_equal(table["probability"][of_patient], highest)
    np.testing.assert_array_equal(table["calibrated"][of_patient], calibrated(patients, highest))


def test_calibrators_of_other_predictions_or_none_are_not_applied(calibrating, cohort):
    run, _ = calibrating
    write_predictions(toy(150, seed=1), run.folder / "predictions.csv")
    with pytest.raises(ValueError, match="was frozen with other predictions"):
        predict(run, cohort.samples["test"], cohort.packed, split="test", calibrate=True)
    write_predictions(toy(150), run.folder / "predictions.csv")
    (run.folder / "decision.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"decision\.json is missing"):
        predict(run, cohort.samples["test"], cohort.packed, split="test", calibrate=True)
    freeze(run.folder, choose_decision(toy(150), Rule("max_f1")), toy(150))
    with pytest.raises(ValueError, match="No calibrator is frozen"):
        predict(run, cohort.samples["test"], cohort.packed, split="test", calibrate=True)


def test_the_command_line_writes_calibrated_probabilities_beside_the_predictions(
    calibrating, monkeypatch, capsys
):
    run, (vertebrae, _) = calibrating
    monkeypatch.setenv("CSPINE_ROOT", str(run.folder.parents[1]))
    before = (run.folder / "predictions.csv").read_bytes()
    assert main(["predict", "--run", "toy", "--calibrated"]) == 0
    assert "calibrated.csv: calibrated probabilities beside" in capsys.readouterr().out
    table = pd.read_csv(run.folder / "calibrated.csv", dtype={UID: str})
    rows = table[table["vertebra"] != "patient_overall"]
    np.testing.assert_allclose(rows["calibrated"], calibrated(vertebrae, rows["probability"]), rtol=1e-12)
    assert len(table) - len(rows) == 150
    assert (run.folder / "predictions.csv").read_bytes() == before
    (run.folder / "decision.json").unlink()
    assert main(["predict", "--run", "toy", "--calibrated"]) == 100
    assert "decision.json is missing" in capsys.readouterr().err


@pytest.fixture
def predicting(calibrating, monkeypatch):
    """The command line in that folder, where the run predicts `tables`, and every prediction is noted."""
    run, tables, asked = calibrating[0], [toy(150)], []
    run = replace(run, record=run.record | {"data": {"cohort": "toy"}})

    def predicted(_, __, path, **options):
        asked.append(options["replace"])
        write_predictions(tables[-1], path)
        path.with_name("predictions.csv.partial").unlink(missing_ok=True)
        return tables[-1]

    monkeypatch.setenv("CSPINE_ROOT", str(run.folder.parents[1]))
    monkeypatch.setattr(checkpoints, "load_run", lambda _: run)
    monkeypatch.setattr(cohorts, "read_cohort", lambda _: SimpleNamespace(check_run=lambda _: None))
    monkeypatch.setattr(inference, "predict_cohort", predicted)
    return run.folder, tables, asked


def lines_of(folder):
    table = toy(150)
    return (
        f"{folder / 'predictions.csv'}: {len(table)} sequences of {table[UID].nunique()} studies.\n"
        f"{folder / 'calibrated.csv'}: calibrated probabilities beside those of predictions.csv.\n"
    )


def test_a_prediction_that_was_stopped_goes_on_before_anything_is_calibrated(predicting, capsys):
    """The old table is there still; what is calibrated is the new one."""
    folder, _, asked = predicting
    assert main(["predict", "--run", "toy", "--calibrated"]) == 0
    assert (asked, capsys.readouterr().out) == ([], lines_of(folder))
    expected = (folder / "calibrated.csv").read_bytes()
    (folder / "calibrated.csv").unlink()
    write_predictions(toy(150, seed=1), folder / "predictions.csv")
    (folder / "predictions.csv.partial").touch()
    assert main(["predict", "--run", "toy", "--calibrated", "--device", "cpu"]) == 0
    assert (asked, capsys.readouterr().out) == ([False], lines_of(folder))
    assert (folder / "calibrated.csv").read_bytes() == expected


@pytest.mark.parametrize("there", ["no table", "a table to replace", "a prediction that was stopped"])
@pytest.mark.parametrize("frozen", ["nothing", "no calibrator"])
def test_whether_calibrators_are_frozen_is_asked_before_the_prediction(predicting, capsys, there, frozen):
    folder, _, asked = predicting
    (folder / "decision.json").unlink()
    if frozen == "no calibrator":
        freeze(folder, choose_decision(toy(150), Rule("max_f1")), toy(150))
    if there == "no table":
        (folder / "predictions.csv").unlink()
    if there == "a prediction that was stopped":
        (folder / "predictions.csv.partial").touch()
    more = ["--replace"] if there == "a table to replace" else []
    assert main(["predict", "--run", "toy", "--calibrated", "--device", "cpu", *more]) == 100
    out, err = capsys.readouterr()
    assert (asked, out) == ([], "")
    assert ("decision.json is missing" if frozen == "nothing" else "No calibrator is frozen in") in err


def test_a_table_that_calibrators_are_not_of_is_told_before_they_are_refused(predicting, capsys):
    folder, tables, asked = predicting
    tables.append(toy(150, seed=1))
    assert main(["predict", "--run", "toy", "--calibrated", "--replace", "--device", "cpu"]) == 100
    out, err = capsys.readouterr()
    assert (asked, out) == ([True], lines_of(folder).splitlines(keepends=True)[0])
    assert "was frozen with other predictions" in err
    assert not (folder / "calibrated.csv").exists()
