"""Training in folds, a run each: every patient is then predicted by a model that never saw them.

The test split stays closed to all of them. `splits.fold_split` says who trains, validates and is left out.
"""

from pathlib import Path

import pandas as pd

from cspine_helpers.cohort import Cohort, read_cohort
from cspine_helpers.decisions.thresholds import Rule
from cspine_helpers.files.paths import exclusive, fold_dir, listing
from cspine_helpers.model.classifier import ModelConfig
from cspine_helpers.runs import ENSEMBLE, HISTORY, RECORD, STATE, WEIGHTS
from cspine_helpers.splits import FOLDS, k_folds, read_split, write_split
from cspine_helpers.training.config import TrainConfig
from cspine_helpers.training.run import RULE, TRAINING_SPLITS, check_classes, train

_OTHERS = (RECORD, HISTORY, STATE, f"{WEIGHTS}.safetensors")
_MADE_BY_FOLDS = ("predictions.csv", "decision.json", "test_openings.csv", ENSEMBLE)


def train_folds(
    cohort_folder: str | Path,
    run_folder: str | Path,
    *,
    model: ModelConfig,
    config: TrainConfig,
    rule: Rule = RULE,
    folds: int = 5,
    fold: int | None = None,
    skip_unusable: bool = False,
) -> dict[int, pd.DataFrame]:
    """Train one run for each fold of the patients outside the test split, or for one of them.

    A fold that was stopped is resumed, one that is trained is left as it is. Folds may be trained at the same
    time by several processes or machines that share the disk, each with its own `fold`. A fold's validation
    patients, who choose its epoch, are those of the next fold, never its own: predictions out of fold are
    then not flattered by that choice. `inference.predict_folds` makes them.

    Args:
        cohort_folder: holds `train.csv`, `split.csv` and `packed/`.
        run_folder: where `folds.csv` goes, with its hash, and each fold's run. A `folds.csv` of your own,
            put there before, is used (`splits.adopt` takes it); else `splits.k_folds` makes it with seed 0,
            so that runs of several seeds share their folds.
        model: what to train.
        config: how to train it; every fold alike.
        rule: as `train` takes it.
        folds: how many, 3 or more; a model learns from all but two of them.
        fold: which one, from 0; None: all, one after the other.
        skip_unusable: as `train` does.

    Returns:
        Number of the fold → its history.

    Raises:
        FileExistsError: the folder holds a run that was not trained in folds, or predictions.
        ValueError: there is no such fold; folds share a patient, or are of other studies than those outside
            the test split; or see `train`.

    Example:
        >>> histories = train_folds(cohort_folder, "mine", model=model, config=config)  # doctest: +SKIP
    """
    # 1. Nothing is overwritten.
    folder = Path(run_folder)
    path = folder / FOLDS
    foreign = _OTHERS if path.is_file() else (*_OTHERS, *_MADE_BY_FOLDS)
    if held := [name for name in foreign if (folder / name).exists()]:
        raise FileExistsError(
            f"{folder} holds a run that was not trained in folds, or predictions ({listing(held)}). Train "
            "the folds in another folder, or move this one away."
        )
    # 2. Every fold can be trained.
    whole = read_cohort(cohort_folder)
    table = _folds(path, whole, folds)
    chosen = range(folds) if fold is None else [fold]
    cohorts = {number: whole.of_fold(table, number) for number in chosen}
    for each in cohorts.values():
        sizes = {"slices": model.slices, "size": model.size}
        check_classes(each.usable(**sizes, splits=TRAINING_SPLITS, skip_unusable=skip_unusable)[0])
    # 3. Train them.
    if not path.is_file():
        with exclusive(folder / ".folds.lock", f"dividing patients into folds in {folder}"):
            write_split(table, path)
    return {
        number: train(
            each,
            fold_dir(folder, number),
            model=model,
            config=config,
            rule=rule,
            resume=True,
            skip_unusable=skip_unusable,
        )
        for number, each in cohorts.items()
    }


def _folds(path: Path, cohort: Cohort, folds: int) -> pd.DataFrame:
    """The folds of the run's folder; where there are none yet, those that would be made.

    Raises:
        ValueError: there are others than so many.
    """
    if not path.is_file():
        return k_folds(cohort.labels, folds=folds, split=cohort.split)
    with exclusive(path.with_name(".folds.lock"), f"dividing patients into folds in {path.parent}"):
        table = read_split(path, column="fold")  # which another process may just be writing
    if (found := table["fold"].nunique()) != folds:
        raise ValueError(
            f"{path} divides the patients into {found} folds, not {folds}. Ask for {found}, or train in "
            "another folder."
        )
    return table
