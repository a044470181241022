"""Trainings that are killed: at every kind of moment, and always resumed to the same end."""

import json
import multiprocessing
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import nbformat
import pandas as pd
import pytest
import torch
from nbclient import NotebookClient
from timm.utils import ModelEmaV3
from toy_cohort import half_marked, make_toy_cohort, tiny_model

from cspine_helpers import runs
from cspine_helpers.checkpoints import load_run
from cspine_helpers.cohort import read_cohort
from cspine_helpers.files import paths
from cspine_helpers.inference.prediction import predict, predict_cohort
from cspine_helpers.metrics import average_precision
from cspine_helpers.model.classifier import FractureClassifier
from cspine_helpers.runs import read_record
from cspine_helpers.training import run as training
from cspine_helpers.training import trainer
from cspine_helpers.training.config import TrainConfig
from cspine_helpers.training.run import Interrupted, beside, interrupted, train
from cspine_helpers.training.slices import SliceDataset

CONFIG = TrainConfig(
    epochs=3,
    batch_size=16,
    learning_rate=4e-3,
    accumulate=1,
    slice_epochs=2,
    workers=0,
    vertebra_weights="equal",
)
TIMED = (
    "seconds",
    "epoch_seconds",
    "history_sha256",
    "record_sha256",
)  # each time others
PROCESSES = multiprocessing.get_context("forkserver")  # a child starts in a moment, with all modules there
PROCESSES.set_forkserver_preload(["cspine_helpers.training.run", "sklearn.metrics"])


class Moments:
    """Counts the moments of a training at which it may be killed, and kills this process at one of them.

    Moments are: before each step of the optimizer, half-way through the writing of each file, when it is
    written whole beside its place, when it has just taken its place, and around each renaming of a folder.
    """

    def __init__(self, kill_at: int | None) -> None:
        self.kinds: list[str] = []
        self._kill_at = kill_at

    def reached(self, kind: str, *, torn: Path | None = None) -> None:
        if len(self.kinds) == self._kill_at:
            if torn is not None:
                os.truncate(torn, torn.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        self.kinds.append(kind)

    def watch(self) -> None:
        """Put the moments into this process; it is one of a test's own, and ends with it."""
        step, replaced = torch.optim.AdamW.step, os.replace

        def counted_step(optimizer, *arguments, **options):
            self.reached("step")
            return step(optimizer, *arguments, **options)

        def counted_replace(source, target):
            name = Path(target).name
            self.reached(f"written {name}")
            replaced(source, target)
            self.reached(f"replaced {name}")

        rename, exchange = os.rename, paths.exchange

        def counted_rename(source, target):
            rename(source, target)
            self.reached(f"renamed {Path(target).name}")

        def counted_exchange(one, other):
            exchange(one, other)
            self.reached("exchanged")

        os.rename, paths.exchange = counted_rename, counted_exchange
        torch.optim.AdamW.step = counted_step
        paths.os.replace = counted_replace
        write_bytes = Path.write_bytes

        def torn_bytes(path, data):
            write_bytes(path, data)
            self.reached("torn weights", torn=path)

        Path.write_bytes = torn_bytes
        to_csv = pd.DataFrame.to_csv

        def torn_csv(table, path=None, **options):
            text = to_csv(table, path, **options)
            if path is not None:
                self.reached("torn history", torn=Path(path))
            return text

        pd.DataFrame.to_csv = torn_csv


def training_process(cohort, folder, kill_at, answer):
    """In a child: trains, or goes on, until it ends or is killed; writes down the moments it passed."""
    torch.set_num_threads(1)
    moments = Moments(kill_at)
    moments.watch()
    train(cohort, folder, model=tiny_model(), config=CONFIG, resume=True)
    answer.write_text(json.dumps(moments.kinds))


def retraining_process(cohort, folder, kill_at, answer):
    """In a child: trains and predicts beside the run that stands, as notebook 03 does."""
    torch.set_num_threads(1)
    moments = Moments(kill_at)
    moments.watch()
    retrain(cohort, folder)
    answer.write_text(json.dumps(moments.kinds))


def retrain(cohort, folder, config=CONFIG):
    with beside(folder) as new:
        train(cohort, new, model=tiny_model(), config=config, resume=True)
        predict_cohort(load_run(new), read_cohort(cohort), new / "predictions.csv", replace=True)


def run_child(cohort, folder, *, kill_at=None, process=training_process) -> tuple[int, list[str]]:
    answer = folder.with_suffix(".moments")
    child = PROCESSES.Process(target=process, args=(cohort, folder, kill_at, answer))
    child.start()
    child.join()
    return child.exitcode, json.loads(answer.read_text()) if answer.is_file() else []


def outcome(folder: Path) -> dict[str, object]:
    """What two equal trainings share: the bytes of the weights, history and record without times."""
    record = read_record(folder)
    return {
        "files": sorted(path.name for path in folder.iterdir()),
        "history": runs.read_history(folder).drop(columns="seconds").to_csv(),
        "weights": (folder / "model.safetensors").read_bytes(),
        "record": {name: value for name, value in record.items() if name not in TIMED},
    }


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    return make_toy_cohort(tmp_path_factory.mktemp("toy") / "toy")


@pytest.fixture(scope="module")
def whole(cohort):
    """A training that nobody stopped: its folder's outcome and the moments at which it could have been."""
    folder = cohort.parent / "whole"
    code, kinds = run_child(cohort, folder)
    assert code == 0
    return outcome(folder), kinds


KINDS = (
    ("step", 0),  # nothing is written yet
    ("torn weights", 0),  # the first state of all
    ("replaced state.safetensors", 0),
    ("step", 7),
    ("torn weights", 2),  # the first state after an epoch of sequences
    ("written state.safetensors", 2),
    ("replaced state.safetensors", 2),  # its history, weights and record are not written yet
    ("torn history", 0),
    ("written history.csv", 1),
    ("written model.safetensors", 0),
    ("replaced model.safetensors", 0),  # weights without a record
    ("written run.json", 0),
    ("replaced model.safetensors", -1),  # weights of one epoch beside the record of another
    ("step", -1),
    ("replaced run.json", -1),  # all is written; the state is not removed yet
)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "which"), KINDS, ids=lambda value: str(value).replace(" ", "-"))
def test_a_killed_training_is_resumed_to_the_same_bytes(cohort, whole, tmp_path, kind, which):
    expected, kinds = whole
    moment = [place for place, found in enumerate(kinds) if found == kind][which]
    code, _ = run_child(cohort, tmp_path / "run", kill_at=moment)
    assert code == -signal.SIGKILL
    code, again = run_child(cohort, tmp_path / "run")
    assert code == 0
    assert len(again) < len(kinds) or moment < kinds.index("replaced state.safetensors")
    assert outcome(tmp_path / "run") == expected


@pytest.fixture(scope="module")
def one_stopped(cohort):
    """A training that was interrupted in its second epoch of sequences, as from a notebook."""
    folder, step, passed = cohort.parent / "stopped", torch.optim.AdamW.step, []

    def interrupted_step(optimizer, *arguments, **options):
        passed.append(1)
        if (folder / "run.json").is_file() and len(passed) % 2:
            raise KeyboardInterrupt
        return step(optimizer, *arguments, **options)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(torch.optim.AdamW, "step", interrupted_step)
        with pytest.raises(KeyboardInterrupt):
            train(cohort, folder, model=tiny_model(), config=CONFIG)
    return folder


@pytest.fixture
def stopped(one_stopped, tmp_path):
    """A test's own copy of it."""
    return shutil.copytree(one_stopped, tmp_path / "run")


@pytest.mark.slow
def test_an_interrupt_leaves_a_usable_run_that_can_go_on(stopped, cohort, whole):
    assert interrupted(stopped)
    assert load_run(stopped).record["epochs"] == 1
    assert (stopped / "train.log").read_text().endswith("Stopped. KeyboardInterrupt\n")
    train(cohort, stopped, model=tiny_model(), config=CONFIG, resume=True)
    assert not interrupted(stopped)
    assert outcome(stopped) == whole[0]
    log = (stopped / "train.log").read_text()
    assert log.count("Training of run: it begins") == 0  # its name was another
    assert log.count("Training of run: 1 epochs of sequences are done") == 1
    assert [log.count(f"sequences, epoch {epoch} of 3: ") for epoch in (1, 2, 3)] == [1, 1, 1]


@pytest.mark.slow
def test_an_interrupt_between_weights_and_record_leaves_a_usable_run(cohort, tmp_path, monkeypatch):
    real, calls = runs.write_record, []

    def stop_once(*arguments):
        calls.append(1)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr("cspine_helpers.training.trainer.write_record", stop_once)
    with pytest.raises(KeyboardInterrupt):
        train(cohort, tmp_path / "run", model=tiny_model(), config=CONFIG)
    assert load_run(tmp_path / "run").record["epochs"] == 1


FREEZING = replace(CONFIG, epochs=2, slice_epochs=1, freeze_epochs=2, backbone_rate=0.5, ema=0.8)


@pytest.mark.parametrize("stop_after", [1, 2], ids=["while frozen", "at the unfreezing"])
def test_a_stop_around_the_unfreezing_changes_no_byte(cohort, unfrozen, tmp_path, stop_after):
    folder, real, passed = tmp_path / "run", trainer.save_state, []

    def stop(*arguments):
        real(*arguments)
        passed.append(1)
        if len(passed) == stop_after:
            raise KeyboardInterrupt  # before history, weights and record

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(trainer, "save_state", stop)
        with pytest.raises(KeyboardInterrupt):
            train(cohort, folder, model=tiny_model(), config=FREEZING)
    assert interrupted(folder)
    train(cohort, folder, model=tiny_model(), config=FREEZING, resume=True)
    assert outcome(folder) == unfrozen[0]


@pytest.fixture(scope="module")
def unfrozen(cohort):
    """A training with a frozen backbone at first, and its weights after each step."""
    folder, weights, update = cohort.parent / "unfrozen", [], ModelEmaV3.update

    def watched(averaged, model, step):
        weights.append({name: value.clone() for name, value in model.state_dict().items()})
        update(averaged, model, step)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(ModelEmaV3, "update", watched)
        train(cohort, folder, model=tiny_model(), config=FREEZING)
    return outcome(folder), weights


GUESSING = replace(
    CONFIG, epochs=2, slice_epochs=3, slice_samples=48, matched_slices=True, pseudo_label_after=1
)


@pytest.fixture(scope="module")
def unmarked(cohort):
    return half_marked(cohort, cohort.parent / "half_marked")


@pytest.mark.parametrize("stop_after", [1, 2], ids=["before the first guess", "between guesses"])
def test_a_stop_around_pseudo_labels_changes_no_byte(unmarked, tmp_path, stop_after):
    guesses, guess, real, passed = [], SliceDataset.guess, trainer.save_state, []

    def watched(data, slice_logit):
        guess(data, slice_logit)
        guesses.append(data.target.tobytes())

    def stop(*arguments):
        real(*arguments)
        passed.append(1)
        if len(passed) == stop_after:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(SliceDataset, "guess", watched)
        train(unmarked, tmp_path / "whole", model=tiny_model(), config=GUESSING)
        assert len(set(guesses)) == len(guesses) == 2  # in the second epoch and the third, and each its own
        patched.setattr(trainer, "save_state", stop)
        with pytest.raises(KeyboardInterrupt):
            train(unmarked, tmp_path / "stopped", model=tiny_model(), config=GUESSING)
        train(unmarked, tmp_path / "stopped", model=tiny_model(), config=GUESSING, resume=True)
    assert guesses[2:] == guesses[:2]
    assert outcome(tmp_path / "stopped") == outcome(tmp_path / "whole")


def test_a_frozen_backbone_stays_to_the_bit_until_its_epochs_are_over(unfrozen):
    torch.manual_seed(FREEZING.seed)
    untouched = FractureClassifier(tiny_model()).state_dict()
    _, weights = unfrozen
    steps = len(weights) // 2  # an epoch
    for name, value in untouched.items():
        frozen = [torch.equal(value, each[name]) for each in weights]
        if name.startswith("backbone."):
            assert all(frozen[:steps]), name
        assert not any(frozen[steps:]), name


def test_the_weights_that_are_kept_are_the_exponential_moving_average(unfrozen, cohort):
    _, weights = unfrozen
    kept = load_run(cohort.parent / "unfrozen")
    weights = weights[: kept.record["best_epoch"] * len(weights) // 2]
    for name, found in kept.model.state_dict().items():
        if found.is_floating_point():
            average = torch.zeros_like(found, dtype=torch.float64)
            for step, each in enumerate(weights, start=1):
                decay = min(0.8, 1 - step ** (-2 / 3))
                average = decay * average + (1 - decay) * each[name].double()
            torch.testing.assert_close(found.double(), average, rtol=1e-4, atol=1e-6)
    known = read_cohort(cohort)
    samples = known.samples["validation"]
    again = predict(kept, samples, known.packed, split="validation", batch_size=8)
    stored = kept.record["metrics"]["validation"]["average_precision"]
    assert average_precision(again["label"], again["probability"]) == stored


def test_a_training_of_another_setting_is_not_resumed(stopped, cohort):
    other = replace(CONFIG, seed=1, learning_rate=0.1)
    with pytest.raises(ValueError, match=r"train.learning_rate is 0.004, not 0.1; train.seed is 0, not 1"):
        train(cohort, stopped, model=tiny_model(), config=other, resume=True)
    with pytest.raises(ValueError, match=r"model.lstm_hidden is 8, not 9"):
        train(cohort, stopped, model=replace(tiny_model(), lstm_hidden=9), config=CONFIG, resume=True)
    with pytest.raises(FileExistsError, match="resume=True"):
        train(cohort, stopped, model=tiny_model(), config=CONFIG)


def test_other_labels_are_not_resumed_upon(stopped, tmp_path):
    other = make_toy_cohort(tmp_path / "toy", seed=3)
    with pytest.raises(ValueError, match=r"data.labels_sha256 is"):
        train(other, stopped, model=tiny_model(), config=CONFIG, resume=True)


def test_a_training_that_ended_is_not_trained_again(stopped, cohort):
    options = {"model": tiny_model(), "resume": True}
    history = train(cohort, stopped, config=CONFIG, **options)
    before = {path.name: path.stat().st_mtime_ns for path in stopped.iterdir()}
    again = train(cohort, stopped, config=replace(CONFIG, workers=1), **options)
    pd.testing.assert_frame_equal(again, history, check_exact=True)
    assert {path.name: path.stat().st_mtime_ns for path in stopped.iterdir()} == before
    with pytest.raises(ValueError, match=r"train.epochs is 3, not 4"):
        train(cohort, stopped, config=replace(CONFIG, epochs=4), **options)


def test_a_stopped_training_is_set_aside_with_all_it_has(stopped):
    target = training.set_aside(stopped)
    assert target is not None
    assert interrupted(target)
    shutil.rmtree(target)


@pytest.fixture(scope="module")
def one_standing(cohort):
    """A finished run with its predictions, of another training than `CONFIG`."""
    folder = cohort.parent / "standing"
    retrain(cohort, folder, replace(CONFIG, epochs=1, slice_epochs=0, warmup_epochs=0.5))
    return folder


@pytest.fixture
def standing(one_standing, tmp_path):
    """A test's own copy of it."""
    return shutil.copytree(one_standing, tmp_path / "run")


@pytest.fixture(scope="module")
def retrained(cohort, one_standing):
    """What a training beside it that nobody stopped leaves, and the moments at which it could have been."""
    folder = shutil.copytree(one_standing, cohort.parent / "retrained")
    code, kinds = run_child(cohort, folder, process=retraining_process)
    assert code == 0
    return outcome(folder), kinds


RETRAINING_KINDS = (
    ("step", 0),
    ("torn weights", 0),
    ("step", -1),
    ("replaced run.json", -1),
    ("torn history", -1),  # a table: here the predictions
    ("replaced predictions.csv", 0),  # its seal is not there yet
    ("replaced predictions.csv.sha256", 0),
    ("renamed retrained-previous-1", 0),
    ("exchanged", 0),
)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "which"), RETRAINING_KINDS, ids=lambda value: str(value).replace(" ", "-"))
def test_a_killed_retraining_leaves_the_earlier_run_whole_and_resumes(
    cohort, standing, retrained, kind, which
):
    (expected, kinds), before = retrained, outcome(standing)
    moment = [place for place, found in enumerate(kinds) if found == kind][which]
    code, _ = run_child(cohort, standing, kill_at=moment, process=retraining_process)
    assert code == -signal.SIGKILL
    load_run(standing)
    assert outcome(standing) == (expected if kind == "exchanged" else before)
    code, _ = run_child(cohort, standing, process=retraining_process)
    assert code == 0
    assert outcome(standing) == expected
    folders = {path.name: outcome(path) for path in standing.parent.iterdir() if path.is_dir()}
    assert before in folders.values()
    assert "run-training" not in folders
    assert not list(standing.parent.glob(".*"))


@pytest.mark.slow
def test_an_interrupted_retraining_says_what_is_kept(cohort, standing, monkeypatch, request):
    handler = signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a runner in the background ignores it
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, handler))
    before, step, passed = outcome(standing), torch.optim.AdamW.step, []

    def stop_later(optimizer, *arguments, **options):
        passed.append(1)
        if len(passed) == stop_at:
            signal.raise_signal(signal.SIGINT)
        return step(optimizer, *arguments, **options)

    monkeypatch.setattr(torch.optim.AdamW, "step", stop_later)
    stop_at = 1
    with pytest.raises(
        Interrupted, match=r"^Stopped before an epoch was complete: .* The run run is as it was"
    ):
        retrain(cohort, standing)
    stop_at = len(passed) + 12
    with pytest.raises(
        Interrupted, match=r"^Stopped\. What was trained is kept in run-training; .* as it was"
    ):
        retrain(cohort, standing)
    assert interrupted(paths.staging_dir(standing))
    assert outcome(standing) == before


STOPPED_CELL = """
import os, signal, sys, threading, time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, {tests!r})
import test_training_resume

def stop():
    while not test_training_resume.interrupted(Path({staged!r})):
        time.sleep(0.1)
    os.kill(os.getpid(), signal.SIGINT)  # as Jupyter's stop button does

threading.Thread(target=stop, daemon=True).start()
config = replace(test_training_resume.CONFIG, slice_epochs=1000)
test_training_resume.retrain(Path({cohort!r}), Path({standing!r}), config)
"""


@pytest.mark.slow
def test_a_notebook_whose_training_is_stopped_shows_two_sentences(cohort, standing):
    before, staged = outcome(standing), paths.staging_dir(standing)
    places = {"tests": Path(__file__).parent, "staged": staged, "cohort": cohort, "standing": standing}
    source = STOPPED_CELL.format(**{name: str(path) for name, path in places.items()})
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
    NotebookClient(notebook, allow_errors=True).execute()
    (error,) = [output for output in notebook.cells[0].outputs if output.output_type == "error"]
    said = "Stopped. What was trained is kept in run-training; the same cell or call continues with it."
    assert error.traceback == [f"{said} The run run is as it was."]
    assert outcome(standing) == before
    assert interrupted(staged)
