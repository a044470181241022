"""Whether deferral by maps, by other runs or by conformal sets beats plain probability, on two cohorts.

    python benchmarks/triage.py maps builtin     minutes: maps' entropy and area; also hard, fracatlas
    python benchmarks/triage.py members builtin FOLDER …    disagreement with the runs in these folders
    python benchmarks/triage.py measure          search, simulate, freeze, open the test split once

`maps hard` makes 200 hard phantoms, which no training has seen, and predicts them with the built-in run.
Every table goes to `checkpoints/<run>/measured/`; what is there already from another step is kept.
"""

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

import pandas as pd

from cspine_helpers.checkpoints import load_run
from cspine_helpers.decisions.confidence import disagreement, map_features
from cspine_helpers.explain.maps import map_sequences
from cspine_helpers.files import paths
from cspine_helpers.files.tables import read_columns, write_table
from cspine_helpers.inference.prediction import PREDICTIONS, predict
from cspine_helpers.labels import UID, expand, read_labels
from cspine_helpers.phantom.cohort import CohortConfig, make_cohort
from cspine_helpers.predictions import read_predictions, write_predictions

METHOD = "grad_cam"
HARD = CohortConfig(studies=200, seed=2611, difficulty="hard")
AT_ONCE = 200  # sequences whose maps are held at once
KEYS = [UID, "vertebra", "split"]
RUNS = {"builtin": "builtin", "hard": "builtin", "fracatlas": "fracatlas"}


def table_path(name: str, what: str = "confidences") -> Path:
    """Where a table about a cohort is kept, in the folder of the run that predicts it."""
    return paths.run_dir(RUNS[name]) / "measured" / f"{'hard_' if name == 'hard' else ''}{what}.csv"


def predictions_of(name: str) -> pd.DataFrame:
    """The run's predictions of a cohort."""
    return read_predictions(
        table_path(name, "predictions") if name == "hard" else paths.run_dir(RUNS[name]) / PREDICTIONS
    )


def keep(name: str, features: pd.DataFrame) -> None:
    """Write features beside those that are there already."""
    path = table_path(name)
    path.parent.mkdir(exist_ok=True)
    if path.is_file():
        old = read_columns(path, KEYS, what="table of confidences", source="", text=[UID])
        rest = old.drop(columns=[column for column in features if column not in KEYS and column in old])
        features = rest.merge(features, on=KEYS, how="left", validate="one_to_one")
    write_table(features.round(7), path, sealed=True)
    print(f"{path}: {len(features)} rows, {', '.join(features.columns)}")


def of_sequences(name: str, packed: Path) -> pd.DataFrame:
    """Features of the maps of each row of the predictions, weighed by attention, on the map's own grid."""
    run, rows = load_run(paths.run_dir(RUNS[name])), predictions_of(name)
    parts = []
    for start in range(0, len(rows), AT_ONCE):
        some = rows.iloc[start : start + AT_ONCE].reset_index(drop=True)
        maps = map_sequences(run, some, packed, method=METHOD, weigh_by_attention=False)
        parts.append(map_features(maps.values, maps.attention))
        print(f"{name}: {start + len(some)} of {len(rows)} maps", flush=True)
    return rows[KEYS].join(pd.concat(parts, ignore_index=True).assign(method=METHOD, layer=maps.layer))


def hard_cohort(folder: Path) -> Path:
    """The packed hard phantoms, made in a folder unless they are there; predicted unless they were."""
    if not (folder / "cohort.json").is_file():
        make_cohort(folder, HARD)
    path = table_path("hard", "predictions")
    if not path.is_file():
        labels = read_labels(folder / "train.csv")
        samples = expand(labels, labels[UID].tolist())
        path.parent.mkdir(exist_ok=True)
        found = predict(load_run(paths.run_dir(RUNS["hard"])), samples, folder / "packed", split="test")
        write_predictions(found, path)
    return folder / "packed"


def of_members(name: str, folders: list[Path]) -> pd.DataFrame:
    """How far the run and others, which predict the same rows, are apart."""
    rows = predictions_of(name)
    apart = disagreement(rows, [read_predictions(folder / PREDICTIONS) for folder in folders])
    return rows[KEYS].assign(disagreement=apart)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    commands = parser.add_subparsers(dest="what", required=True)
    for what in ("maps", "members"):
        command = commands.add_parser(what)
        command.add_argument("cohort", choices=tuple(RUNS))
        if what == "members":
            command.add_argument("folders", nargs="+", type=Path, help="of other runs, with predictions")
        else:
            command.add_argument("--folder", type=Path, help="of the hard cohort (default: made and deleted)")
    options = parser.parse_args()
    if options.what == "members":
        keep(options.cohort, of_members(options.cohort, options.folders))
    elif options.cohort == "builtin":
        keep("builtin", of_sequences("builtin", paths.cohort_dir("builtin") / "packed"))
    elif options.cohort == "hard":
        with TemporaryDirectory() as made:
            keep("hard", of_sequences("hard", hard_cohort(options.folder or Path(made) / "hard")))


if __name__ == "__main__":
    main()
