"""Several runs as one: the mean of their probabilities, of seeds or of folds, over the same loaded batches.

Predictions lie in a folder of their own, beside `ensemble.json`: which runs they are the mean of, each with
the SHA-256 of its weights, and whether each saw every sequence in the mirror as well.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from cspine_helpers import __version__
from cspine_helpers.checkpoints import Run, load_run
from cspine_helpers.cohort import Cohort
from cspine_helpers.files.paths import fold_dir, listing, sha256_of
from cspine_helpers.files.records import SEAL, differences
from cspine_helpers.inference.prediction import (
    PREDICTIONS,
    Part,
    check_free,
    computed_by,
    samples_of,
    sequences,
    usable,
    write_parts,
)
from cspine_helpers.labels import SPLITS, UID
from cspine_helpers.runs import RECORD, STATE, WEIGHTS, write_ensemble
from cspine_helpers.splits import FOLDS, OUT_OF_FOLD, read_split, split_hash

_SAME = ("labels_sha256", "split_sha256", "slices", "size")  # in all members of an ensemble
_SAME_IN_FOLDS = ("labels_sha256", "slices", "size", "model", "train", "rule")
_VIEWS = {False: ["as packed"], True: ["as packed", "left and right exchanged"]}


def predict_ensemble(
    members: Sequence[str | Path],
    cohort: Cohort,
    run_folder: str | Path,
    *,
    tta: bool = False,
    splits: Sequence[str] = ("validation", "test"),
    device: str = "cpu",
    batch_size: int = 16,
    workers: int = 0,
    skip_unusable: bool = False,
    replace: bool = False,
) -> pd.DataFrame:
    """Predictions table of the mean of several runs of one cohort, such as of several seeds.

    Stopped at any moment and called again, it resumes behind the last whole batch.

    Args:
        members: folders of the runs.
        cohort: of `cohort.read_cohort`.
        run_folder: where `predictions.csv` and `ensemble.json` go.
        tta: test-time augmentation: each run also predicts the sequence with left and right exchanged, and
            both count alike.
        splits: which samples, in this order.
        device: "cpu" or "cuda".
        batch_size: sequences computed at once.
        workers: processes that load; 0 loads in this one.
        skip_unusable: do without the studies whose packed sequences cannot be used, and print them; else they
            are an error.
        replace: replace a table that is there; decisions frozen with it are refused from then on.

    Raises:
        FileExistsError: the folder holds a run of its own or of folds, or a whole table, and `replace` is not
            set.
        FileNotFoundError: runs are missing; names them.
        ValueError: a run is named twice, its training has not ended, or it has other labels, another split,
            T or size than the others or the cohort; names it and what differs.

    Example:
        >>> predict_ensemble(["one", "two", "one"], cohort, "mean", tta=True)
        Traceback (most recent call last):
        ...
        ValueError: Each run counts once; found several times: 'one'. Name each once.
    """
    # 1. What is asked for fits together.
    folder = Path(run_folder)
    if len(members) < 2 and not tta:
        raise ValueError(f"An ensemble has two runs or more, or one with tta; found {len(members)}. Add one.")
    if held := [name for name in (RECORD, STATE, FOLDS) if (folder / name).exists()]:
        raise FileExistsError(
            f"{folder} holds a run of its own ({listing(held)}); an ensemble's predictions go elsewhere. "
            "Name another folder."
        )
    check_free(folder / PREDICTIONS, replace=replace)
    runs = load_members([Path(member) for member in members])
    check_alike(runs, _shared(_SAME), "Runs of an ensemble share labels, split, slices and size")
    cohort.check_run(runs[0].record)

    # 2. Predict.
    cohort, left_out = usable(runs[0], cohort, splits, skip_unusable=skip_unusable)
    rows = pd.concat([samples_of(cohort, name, split=name) for name in splits], ignore_index=True)
    return _predict(
        [sequences(rows, [run.to(device) for run in runs], cohort.packed, batch_size, workers, flip=tta)],
        folder,
        record={
            "mean_of": "probabilities of each run",
            "members": [member_of(run) for run in runs],
            "views": _VIEWS[tta],
            "data": cohort.fingerprint(),
            "splits": list(splits),
            "left_out": left_out,
        },
        batch_size=batch_size,
        run=runs[0],
    )


def predict_folds(
    run_folder: str | Path,
    cohort: Cohort,
    *,
    tta: bool = False,
    device: str = "cpu",
    batch_size: int = 16,
    workers: int = 0,
    skip_unusable: bool = False,
    replace: bool = False,
) -> pd.DataFrame:
    """Predictions table of a run that was trained in folds, `<run>/predictions.csv`.

    Each study outside the test split is predicted by the model of its own fold, which never saw it; its split
    is "validation" and its fold in the column `fold`. Studies of the test split are predicted by the mean of
    all folds' models. That mean is less spread than the probabilities of single models, so that a threshold
    chosen out of fold may meet other rates there than one model's would.

    Args:
        run_folder: of `training.train_folds`.
        cohort: of `cohort.read_cohort`.
        tta: as in `predict_ensemble`, out of fold as well.
        device: "cpu" or "cuda".
        batch_size: sequences computed at once.
        workers: processes that load; 0 loads in this one.
        skip_unusable: do without the studies whose packed sequences cannot be used, and print them; else they
            are an error.
        replace: replace a table that is there; decisions frozen with it are refused from then on.

    Raises:
        FileExistsError: there is a whole table, and `replace` is not set.
        FileNotFoundError: there is no table of folds, or folds are missing; names them.
        ValueError: a fold's training has not ended, or it was trained on other labels, folds, T or size.

    Example:
        >>> predict_folds("nobody", cohort)
        Traceback (most recent call last):
        ...
        FileNotFoundError: No folds.csv in nobody. Train folds first: train --folds 5 (training.train_folds).
    """
    # 1. All folds are there, and of this cohort.
    folder = Path(run_folder)
    check_free(folder / PREDICTIONS, replace=replace)
    if not (folder / FOLDS).is_file():
        raise FileNotFoundError(
            f"No {FOLDS} in {folder}. Train folds first: train --folds 5 (training.train_folds)."
        )
    folds = read_split(folder / FOLDS, column="fold")
    numbers = range(folds["fold"].nunique())
    runs = load_members([fold_dir(folder, number) for number in numbers])
    check_alike(runs, _shared(_SAME_IN_FOLDS), "Folds share labels and settings")
    for number, run in zip(numbers, runs, strict=True):
        cohort.of_fold(folds, number).check_run(run.record)

    # 2. Predict each fold by its own run, and the test split by all.
    cohort, left_out = usable(runs[0], cohort, SPLITS, skip_unusable=skip_unusable)
    runs = tuple(run.to(device) for run in runs)
    part_of = partial(sequences, packed_dir=cohort.packed, batch_size=batch_size, workers=workers, flip=tta)
    parts = []
    for number, run in zip(numbers, runs, strict=True):
        rows = samples_of(cohort.of_fold(folds, number), OUT_OF_FOLD, split="validation")
        rows = rows[~rows[UID].isin(left_out)]
        parts.append(part_of(rows.assign(fold=pd.array([number] * len(rows), "Int64")), (run,)))
    test = samples_of(cohort, "test", split="test")
    parts.append(part_of(test.assign(fold=pd.array([pd.NA] * len(test), "Int64")), runs))
    return _predict(
        parts,
        folder,
        record={
            "mean_of": "probabilities of each run, on the test split; out of fold, the run of the fold alone",
            "members": [
                {"fold": number, **member_of(run)} for number, run in zip(numbers, runs, strict=True)
            ],
            "views": _VIEWS[tta],
            "data": {**cohort.fingerprint(), "folds_sha256": split_hash(folds)},
            "splits": ["validation", "test"],
            "left_out": left_out,
        },
        batch_size=batch_size,
        run=runs[0],
    )


def _predict(
    parts: Sequence[Part], folder: Path, *, record: Mapping[str, Any], batch_size: int, run: Run
) -> pd.DataFrame:
    """Write the table and, before its partial file goes, its record."""
    path = folder / PREDICTIONS
    made_of = {
        **record,
        "batch_size": batch_size,  # another size, version or device rounds otherwise
        "computed_by": computed_by(run),
    }

    def describe(_: object) -> None:
        versions = {"cspine_helpers": __version__}
        write_ensemble(folder, {**made_of, "predictions_sha256": sha256_of(path), "versions": versions})

    return write_parts(parts, path, made_of=made_of, then=describe)


def member_of(run: Run) -> dict[str, Any]:
    """What the record says of a run."""
    hashes = {"weights_sha256": run.record["weights_sha256"], "record_sha256": run.record[SEAL]}
    return {"run": run.folder.name, **hashes}


def load_members(folders: Sequence[Path], load: Callable[[Path], Any] = load_run) -> tuple[Any, ...]:
    """The runs, all of them, each once.

    Args:
        folders: of the runs.
        load: loads one: has `folder` and `record`.

    Raises:
        FileNotFoundError, ValueError: see `predict_ensemble`.
    """
    twice = [
        folder.name for n, folder in enumerate(folders) if folder.resolve() in map(Path.resolve, folders[:n])
    ]
    if twice:
        raise ValueError(f"Each run counts once; found several times: {listing(twice)}. Name each once.")
    files = (RECORD, f"{WEIGHTS}.safetensors")
    if gone := [folder.name for folder in folders if not all((folder / name).is_file() for name in files)]:
        raise FileNotFoundError(
            f"Runs that are missing in {folders[0].parent}, or have no weights ({len(gone)}): "
            f"{listing(gone)}. Train them, or name others."
        )
    if unfinished := [folder.name for folder in folders if (folder / STATE).exists()]:
        raise ValueError(
            f"Runs whose training has not ended ({len(unfinished)}): {listing(unfinished)}. Resume it, or "
            "name others."
        )
    runs = tuple(load(folder) for folder in folders)
    by_weights: dict[str, list[str]] = {}
    for run in runs:
        by_weights.setdefault(run.record["weights_sha256"], []).append(run.folder.name)
    if same := [" and ".join(names) for names in by_weights.values() if len(names) > 1]:
        raise ValueError(f"Runs with the same weights count once: {listing(same)}. Name one of them.")
    return runs


def _shared(names: Sequence[str]) -> Callable[[Run], dict[str, Any]]:
    """What a run has under these names, of its record, the record's data and its config."""

    def shared(run: Run) -> dict[str, Any]:
        has = {**run.record, **run.record["data"], "slices": run.config.slices, "size": run.config.size}
        return {name: has.get(name) for name in names}

    return shared


def check_alike(runs: Sequence[Any], shared: Callable[[Any], dict[str, Any]], rule: str) -> None:
    """Refuse runs that differ in what all members share; the number of workers may differ.

    Args:
        runs: the members.
        shared: what a run has of that.
        rule: what is asked, for the error.

    Raises:
        ValueError: names the runs, and what they have that the first has not.
    """
    first, *others = runs
    differ = []
    for run in others:
        lines = differences(shared(run), shared(first))
        if lines := [line for line in lines if not line.startswith("train.workers ")]:
            differ.append(f"{run.folder.name}: {', '.join(lines)}")
    if differ:
        raise ValueError(
            f"{rule}; other than {first.folder.name} are {listing(differ, separator='; ', quoted=False)}. "
            "Leave them out, or train them alike."
        )
