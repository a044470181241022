"""A disk that is full or may not be written to: one error names the file, the old one stays, no litter."""

import errno
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from toy_cohort import make_toy_cohort, tiny_model, toy_sequence

from cspine_helpers import checkpoints, labels, packed, predictions, runs, splits
from cspine_helpers.decisions.test_split import record_opening
from cspine_helpers.figures import cohorts as figures_cohorts
from cspine_helpers.figures import style as plots
from cspine_helpers.files import paths
from cspine_helpers.files import records as journal
from cspine_helpers.files.records import write_sealed
from cspine_helpers.files.tables import write_table
from cspine_helpers.labels import BOX_COLUMNS, UID
from cspine_helpers.model.classifier import FractureClassifier
from cspine_helpers.packed import read_manifest, write_manifest
from cspine_helpers.packing import cohort as studies
from cspine_helpers.packing.slice_truth import PACKED_BOX_COLUMNS, write_packed_boxes
from cspine_helpers.phantom import scanner as export
from cspine_helpers.training.trainer import TrainingState, save_state


def history(rows: int) -> pd.DataFrame:
    numbers = np.linspace(0.1, 0.9, rows * len(runs.HISTORY_COLUMNS)).reshape(rows, -1)
    return pd.DataFrame(numbers, columns=list(runs.HISTORY_COLUMNS)).assign(epoch=range(1, rows + 1))


def a_state(run: Path, epoch: int) -> None:
    model = torch.nn.Linear(3, 2)
    save_state(run, TrainingState({}, epoch=epoch), model, torch.optim.AdamW(model.parameters()))


def some_boxes(table: pd.DataFrame) -> pd.DataFrame:
    return pd.DataFrame([[table[UID].iloc[0], 1.0, 2.0, 3.0, 4.0, 5]] * 9, columns=list(BOX_COLUMNS))


def some_predictions(table: pd.DataFrame) -> pd.DataFrame:
    return labels.expand(table, table[UID]).assign(split="test", probability=0.25)


def save_bars(table: pd.DataFrame) -> Path:
    return plots.save_figure(figures_cohorts.prevalence_bars(labels.prevalence(table)), "bars", cohort="toy")


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    """A folder with each artefact."""
    root = tmp_path_factory.mktemp("written")
    folder, run = make_toy_cohort(root / "toy"), root / "run"
    table = labels.read_labels(folder / "train.csv")
    labels.write_boxes(some_boxes(table), folder / "train_bounding_boxes.csv")
    predictions.write_predictions(some_predictions(table), run / "predictions.csv")
    checkpoints.save_weights(run, FractureClassifier(tiny_model()))
    a_state(run, epoch=1)
    write_table(history(2), run / "history.csv")
    runs.write_record(run, {"note": "the first"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CSPINE_ROOT", str(root))
        save_bars(table)
    paths.write_checksums(folder / "packed")
    return root


@pytest.fixture
def writers(written, tmp_path, monkeypatch) -> dict[str, tuple[Path, Callable[[], object]]]:
    """Each artefact in a test's own copy: its path, and what writes it anew with other content."""
    monkeypatch.setenv("CSPINE_ROOT", str(tmp_path))
    shutil.copytree(written, tmp_path, dirs_exist_ok=True)
    folder, run = tmp_path / "toy", tmp_path / "run"
    table = labels.read_labels(folder / "train.csv")
    boxes, made = some_boxes(table), some_predictions(table)
    manifest = read_manifest(folder / "packed")
    other_split = splits.split_patients(table, fractions=(0.4, 0.3, 0.3))
    array = toy_sequence(np.random.default_rng(1), fractured=False)[0]

    def another_model() -> None:
        checkpoints.save_weights(run, FractureClassifier(tiny_model()))

    return {
        "labels": (folder / "train.csv", lambda: labels.write_labels(table[1:], folder / "train.csv")),
        "boxes": (
            folder / "train_bounding_boxes.csv",
            lambda: labels.write_boxes(boxes[1:], folder / "train_bounding_boxes.csv"),
        ),
        "split": (
            folder / "split.csv",
            lambda: splits.write_split(other_split, folder / "split.csv", replace=True),
        ),
        "sequence": (
            folder / "packed" / "1.2.826.0_1.npy",
            lambda: packed.write_sequence(folder / "packed", "1.2.826.0", "C1", array),
        ),
        "manifest": (
            folder / "packed" / "manifest.csv",
            lambda: write_manifest(manifest[1:], folder / "packed"),
        ),
        "checksums": (
            folder / "packed" / paths.CHECKSUMS,
            lambda: paths.write_checksums(folder / "packed"),
        ),
        "weights": (run / "model.safetensors", another_model),
        "state": (run / "state.safetensors", lambda: a_state(run, epoch=2)),
        "history": (run / "history.csv", lambda: write_table(history(3), run / "history.csv")),
        "record": (run / "run.json", lambda: runs.write_record(run, {"note": "the second"})),
        "predictions": (
            run / "predictions.csv",
            lambda: predictions.write_predictions(made.assign(probability=0.5), run / "predictions.csv"),
        ),
        "figure": (
            tmp_path / "figures" / "toy" / "bars.png",
            lambda: save_bars(table),
        ),
    }


@pytest.fixture
def all_writers(writers, tmp_path) -> dict[str, tuple[Path, Callable[[], object]]]:
    """The same with what is written in place, and what only a later step of a cohort or a run writes."""
    run, made = tmp_path / "run", tmp_path / "toy" / "packed"
    report = pd.DataFrame([["1.2", "packed", 7, ""]], columns=list(studies.REPORT_COLUMNS))
    box = pd.DataFrame([["1.2", "C1", 1, 2, 3, 4, 5]], columns=list(PACKED_BOX_COLUMNS))
    opening = {"level": "patient", "objective": "recall"}
    opening |= {"decision_sha256": "a" * 64, "predictions_sha256": "b" * 64}
    grid = np.zeros((2, 4, 4), dtype=np.int16), (1.0, 1.0, 1.0)

    def locked() -> None:
        with paths.exclusive(run / ".lock", "working"):
            pass

    return writers | {
        "seal of predictions": (run / "predictions.csv.sha256", writers["predictions"][1]),
        "partial predictions": (
            run / "predictions.csv.partial",
            lambda: journal.append(run / "predictions.csv.partial", [{"of": "a run"}, [0.5]]),
        ),
        "torn predictions": (
            run / "predictions.csv.partial",
            lambda: journal.whole_records(run / "predictions.csv.partial"),
        ),
        "lock": (run / ".lock", locked),
        "decision": (run / "decision.json", lambda: write_sealed(run / "decision.json", {"format": 1})),
        "openings": (run / "test_openings.csv", lambda: record_opening(run, **opening)),
        "packed boxes": (made / "boxes.csv", lambda: write_packed_boxes(box, made / "boxes.csv")),
        "report": (made / "report.csv", lambda: studies.write_report(report, made)),
        "slice": (
            tmp_path / "ct" / "1.dcm",
            lambda: export.write_series(tmp_path / "ct", *grid, study_uid="1.2"),
        ),
        "label map": (
            tmp_path / "ct" / "mask.nii.gz",
            lambda: export.write_label_map(tmp_path / "ct" / "mask.nii.gz", *grid),
        ),
    }


ARTEFACTS = ("labels", "boxes", "split", "sequence", "manifest", "checksums", "weights", "state", "history",
             "record", "predictions", "figure")  # fmt: skip
ALL = (*ARTEFACTS, "seal of predictions", "partial predictions", "torn predictions", "lock",
       "decision", "openings", "packed boxes", "report", "slice", "label map")  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("link", ["symbolic", "hard"])
@pytest.mark.parametrize("name", ALL)
def test_no_write_follows_a_link(all_writers, tmp_path, name, link):
    path, write = all_writers[name]
    theirs = tmp_path / "elsewhere"
    theirs.write_bytes(b"nobody's business")
    path.unlink(missing_ok=True)
    path.parent.mkdir(exist_ok=True)
    path.symlink_to(theirs) if link == "symbolic" else path.hardlink_to(theirs)
    try:
        write()
    except ValueError as error:
        assert "link" in str(error) or "is not the file" in str(error)  # noqa: PT017  # replaced is as good
    assert theirs.read_bytes() == b"nobody's business"


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o400])
@pytest.mark.parametrize("name", ["labels", "sequence", "weights", "record", "predictions", "figure"])
def test_a_file_that_others_may_not_read_stays_so_when_it_is_replaced(writers, name, mode):
    path, write = writers[name]
    path.chmod(mode)
    write()
    assert stat.S_IMODE(path.stat().st_mode) == mode


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def refused(path: Path, write: Callable[[], object], kind: type[OSError], reason: str) -> None:
    before = contents(path.parent)
    with pytest.raises(kind, match=f"was not written .*{reason}.*the old file is unchanged") as caught:
        write()
    assert str(path) in str(caught.value)
    assert str(caught.value).count("was not written") == 1
    assert contents(path.parent) == before


@pytest.mark.parametrize("name", ARTEFACTS)
def test_a_place_that_may_not_be_written_to_keeps_what_it_holds(writers, name, monkeypatch):
    def denied(source, target):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(target))

    path, write = writers[name]
    monkeypatch.setattr(os, "replace", denied)
    refused(path, write, PermissionError, "Permission denied")


@pytest.mark.parametrize("name", [name for name in ARTEFACTS if name != "sequence"])
def test_a_disk_that_turns_out_full_when_the_file_is_synced_keeps_what_it_holds(writers, name, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path, write = writers[name]
    monkeypatch.setattr(os, "fsync", full)
    refused(path, write, OSError, "No space left on device")


@pytest.mark.parametrize("name", ARTEFACTS)
def test_a_folder_in_which_nothing_can_be_made_keeps_what_it_holds(writers, name, monkeypatch):
    def denied(*_, dir, **__):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(dir))

    path, write = writers[name]
    monkeypatch.setattr(paths.tempfile, "mkstemp", denied)
    refused(path, write, PermissionError, "Permission denied")


@pytest.mark.skipif(os.name != "posix", reason="limits the size of files as POSIX does")
@pytest.mark.parametrize("name", ARTEFACTS)
def test_a_file_that_does_not_fit_leaves_the_old_one(writers, name):
    """No simulation: the system itself writes 50 bytes of each file, and refuses the rest."""
    import resource
    import signal

    path, write = writers[name]
    before = contents(path.parent)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # else it would end the process
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50, limits[1]))
    try:
        with pytest.raises(OSError, match=r"was not written .*File too large") as caught:
            write()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert str(path) in str(caught.value)
    assert contents(path.parent) == before
    write()
    assert contents(path.parent).keys() == before.keys()


@pytest.mark.parametrize("name", ["split", "manifest", "predictions"])
def test_a_stop_between_a_table_and_its_seal_is_noticed_and_mended_by_writing_again(
    writers, name, monkeypatch
):
    read = {"split": splits.read_split, "predictions": predictions.read_predictions}
    path, write = writers[name]
    replace = os.replace

    def stop(source, target):
        if Path(target) != path:
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", stop)
        with pytest.raises(KeyboardInterrupt):
            write()
    with pytest.raises(ValueError, match=f"{path.name} is not the file that was written"):
        read.get(name, lambda _: read_manifest(path.parent))(path)
    write()
    read.get(name, lambda _: read_manifest(path.parent))(path)
