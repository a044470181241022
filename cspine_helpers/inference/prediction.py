"""A run applied to packed sequences: a table of a cohort, resumed where it was stopped."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from tqdm.auto import tqdm

from cspine_helpers.checkpoints import Run
from cspine_helpers.cohort import Cohort
from cspine_helpers.dataset.sequence import SequenceDataset, make_loader
from cspine_helpers.decisions.test_split import Frozen, check_belongs, read_decision
from cspine_helpers.files.paths import exclusive, inside, listing, remove_unfinished
from cspine_helpers.files.records import append, differences, whole_records
from cspine_helpers.files.tables import write_table
from cspine_helpers.labels import UID
from cspine_helpers.model.forward import mean_probability
from cspine_helpers.packed import check_sequences
from cspine_helpers.predictions import read_predictions, validate_predictions, write_predictions

PREDICTIONS, CALIBRATED = "predictions.csv", "calibrated.csv"


def predict(
    run: Run,
    samples: pd.DataFrame,
    packed_dir: str | Path,
    *,
    split: str,
    batch_size: int = 16,
    workers: int = 0,
    calibrate: bool = False,
) -> pd.DataFrame:
    """Predictions table of a run for labelled samples.

    Args:
        run: of `checkpoints.load_run`; `run.to("cuda")` predicts on a GPU.
        samples: StudyInstanceUID, vertebra and label, as `labels.expand` makes them.
        packed_dir: the cohort's `packed` folder.
        split: name of the split that the samples belong to.
        batch_size: sequences computed at once.
        workers: processes that load; 0 loads in this one.
        calibrate: apply the calibrators that are frozen in the run folder, see `Frozen.calibrate`.

    Returns:
        StudyInstanceUID, vertebra, split, label, probability; rows as in `samples`. With `calibrate`, a row
        for each patient as well, and the column `calibrated`.

    Raises:
        FileNotFoundError: no decision is frozen in the run folder to calibrate with.
        ValueError: packed sequences are missing or cannot be used (names them), or there is no calibrator.

    Example:
        >>> table = predict(run, cohort.samples["test"], cohort.packed, split="test")
        >>> table["probability"].between(0, 1).all()
        np.True_
    """
    frozen = _calibrating(run.folder) if calibrate else None
    table = samples[[UID, "vertebra"]].assign(split=split, label=samples["label"])
    table["probability"] = list(
        chain.from_iterable(_batches((run,), samples, packed_dir, batch_size, workers))
    )
    return frozen.calibrate(table) if frozen else validate_predictions(table)


def _calibrating(folder: Path) -> Frozen:
    """What is frozen in a run folder, if it belongs to the predictions there and holds a calibrator."""
    frozen = read_decision(folder)
    check_belongs(frozen, read_predictions(folder / PREDICTIONS))
    frozen.require_calibrators()
    return frozen


def predict_cohort(
    run: Run,
    cohort: Cohort,
    path: str | Path,
    *,
    splits: Sequence[str] = ("validation", "test"),
    batch_size: int = 16,
    workers: int = 0,
    skip_unusable: bool = False,
    replace: bool = False,
) -> pd.DataFrame:
    """Predictions table of a run for splits of a cohort, written to `path`.

    Every batch is noted in `<path>.partial` as soon as it is computed. Stopped at any moment and called
    again, the prediction resumes behind the last whole batch, and the table has the same bytes.

    Args:
        run: of `checkpoints.load_run`.
        cohort: of `cohort.read_cohort`.
        path: where the table goes, in one step, when it is complete.
        splits: which samples, in this order.
        batch_size: sequences computed at once.
        workers: processes that load; 0 loads in this one.
        skip_unusable: do without the studies whose packed sequences cannot be used, and print them; else they
            are an error.
        replace: replace a table that is there; decisions frozen with it are refused from then on.

    Raises:
        FileExistsError: there is a whole table already, and `replace` is not set.
        BlockingIOError: another process predicts or trains in that folder.
        ValueError: packed sequences are missing or cannot be used; or the partial file is of another run,
            other data or other settings; says which.

    Example:
        >>> len(predict_cohort(run, cohort, "predictions.csv", splits=["test"]))
        7
    """
    path = Path(path)
    check_free(path, replace=replace)
    cohort, left_out = usable(run, cohort, splits, skip_unusable=skip_unusable)
    rows = [samples_of(cohort, name, split=name) for name in splits]
    made_of = {
        "weights_sha256": run.record["weights_sha256"],
        **cohort.fingerprint(),
        "splits": list(splits),
        "left_out": left_out,
        "batch_size": batch_size,  # another size, version or device rounds otherwise
        "computed_by": computed_by(run),
    }
    part = sequences(pd.concat(rows, ignore_index=True), (run,), cohort.packed, batch_size, workers)
    return write_parts([part], path, made_of=made_of)


def check_free(path: Path, *, replace: bool) -> None:
    """Refuse to write over a whole predictions table unasked; one that is not whole is resumed.

    Raises:
        FileExistsError: there is one.
    """
    if is_whole(path) and not replace:
        raise FileExistsError(
            f"{path} is there already, and a decision may rest on it. Move it, or replace it with "
            "replace=True (on the command line, --replace)."
        )


def is_whole(path: Path) -> bool:
    """Whether there is a predictions table whose prediction has ended."""
    return path.exists() and not _partial(path).exists()


def _partial(path: Path) -> Path:
    return path.with_name(f"{path.name}.partial")


def usable(
    run: Run, cohort: Cohort, splits: Sequence[str], *, skip_unusable: bool
) -> tuple[Cohort, list[str]]:
    """The cohort whose sequences in these splits a run can use, and the studies left out, which are printed.

    Raises:
        ValueError: sequences are missing or cannot be used, and `skip_unusable` is not set; names them.
    """
    cohort, bad = cohort.usable(
        slices=run.config.slices, size=run.config.size, splits=splits, skip_unusable=skip_unusable
    )
    left_out = sorted(uid for studies in bad.values() for uid in studies)
    if skip_unusable:
        print(f"{len(left_out)} studies skipped, whose sequences are unusable: {listing(left_out) or 'none'}")
    return cohort, left_out


def samples_of(cohort: Cohort, name: str, *, split: str) -> pd.DataFrame:
    """A predictions table's rows of a part of a cohort, without probabilities; patients where it names them.

    Args:
        cohort: of which.
        name: of the part, in `cohort.samples`.
        split: that the table says.
    """
    rows = cohort.samples[name].assign(split=split)
    if "patient" in cohort.split.columns:
        rows["patient"] = rows[UID].map(cohort.split.set_index(UID)["patient"])
    return rows


def computed_by(run: Run) -> str:
    """What computes a run's probabilities: version and device, which round in their own way."""
    return f"torch {torch.__version__} on {next(run.model.parameters()).device.type}"


@dataclass(frozen=True)
class Part:
    """Rows of a predictions table without probabilities, and what computes those.

    Attributes:
        rows: of the table.
        batches: what is computed for the rows from a place on, a batch at a time: a plain JSON value a row.
    """

    rows: pd.DataFrame
    batches: Callable[[int], Iterator[list[Any]]]


def sequences(
    rows: pd.DataFrame,
    runs: Sequence[Run],
    packed_dir: str | Path,
    batch_size: int,
    workers: int,
    *,
    flip: bool = False,
) -> Part:
    """A part whose rows are packed sequences; each gets the mean probability of the runs.

    Args:
        rows: of the table.
        runs: one or several, alike.
        packed_dir: the cohort's `packed` folder.
        batch_size: sequences computed at once.
        workers: processes that load.
        flip: see `forward.mean_probability`.
    """
    return Part(rows, partial(_batches, runs, rows, packed_dir, batch_size, workers, flip=flip))


def write_parts(
    parts: Sequence[Part],
    path: Path,
    *,
    made_of: Mapping[str, Any],
    probability: Callable[[Any], float] = float,
    then: Callable[[list[Any]], object] = lambda found: None,
) -> pd.DataFrame:
    """Predict the parts of a table one after the other, each batch noted, and write it when it is complete.

    Args:
        parts: of the table, in its order.
        path: where the table goes.
        made_of: what must be the same for a table that was begun to be resumed.
        probability: of what was computed for a row.
        then: called with what was computed for all rows when the table is in place; a stop before its end is
            resumed there.

    Raises:
        BlockingIOError: another process predicts or trains in that folder.
        ValueError: images cannot be used, or the partial file was begun otherwise.
    """
    noted, table = _partial(path), pd.concat([part.rows for part in parts], ignore_index=True)
    with exclusive(path.with_name(".lock"), f"writing to {path.parent}"):
        remove_unfinished(path)
        records = whole_records(noted) or [made_of]
        if differ := differences(records[0], made_of):
            raise ValueError(
                f"{noted} was begun otherwise: {listing(differ, separator='; ', quoted=False)}. Continue "
                "the way it was begun, or delete it to predict from the start."
            )
        done = sum(map(len, records[1:]))
        for part in parts:
            start, done = min(done, len(part.rows)), max(done - len(part.rows), 0)
            if start == len(part.rows):
                continue
            for batch in part.batches(start):
                records.append(batch)
                append(noted, records)
        found = list(chain.from_iterable(records[1:]))
        table["probability"] = [probability(each) for each in found]
        write_predictions(table, path)
        then(found)
        noted.unlink(missing_ok=True)
    return validate_predictions(table)


def _batches(
    runs: Sequence[Run],
    samples: pd.DataFrame,
    packed_dir: str | Path,
    batch_size: int,
    workers: int,
    start: int = 0,
    *,
    flip: bool = False,
) -> Iterator[list[float]]:
    """Mean probabilities of fracture, a batch at a time, of the samples from `start` on.

    Raises:
        ValueError: packed sequences are missing or cannot be used; names them.
    """
    slices, size, rest = runs[0].config.slices, runs[0].config.size, samples.iloc[start:]
    check_sequences(packed_dir, rest, slices=slices, size=size)
    dataset = SequenceDataset(rest, packed_dir, slices=slices, size=size)
    loader = make_loader(dataset, batch_size=batch_size, workers=workers)
    with tqdm(desc="predict", total=len(samples), initial=start, unit="sequence", leave=False) as bar:
        for probability in mean_probability([run.model for run in runs], loader, flip=flip):
            values = probability.tolist()
            bar.update(len(values))
            yield values


def write_calibrated(folder: Path) -> Path:
    """Write `calibrated.csv` of a run's predictions, with its SHA-256 beside it."""
    path = inside(folder / CALIBRATED)
    write_table(_calibrating(folder).calibrate(read_predictions(folder / PREDICTIONS)), path, sealed=True)
    return path
