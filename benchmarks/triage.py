"""Whether deferral by maps, by other runs or by conformal sets beats plain probability, on two cohorts.

    python benchmarks/triage.py maps builtin     minutes: maps' entropy and area; also hard, fracatlas
    python benchmarks/triage.py members builtin FOLDER …    disagreement with the runs in these folders
    python benchmarks/triage.py simulate         minutes: violations of the guarantee, deferral on
    python benchmarks/triage.py measure builtin fracatlas    search, freeze, open the test split once, compare

`maps hard` makes 200 hard phantoms, which no training has seen, and predicts them with the built-in run.
Every table goes to `checkpoints/<run>/measured/`; what is there already from another step is kept.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import pandas as pd
import torch
from tqdm.auto import tqdm

from cspine_helpers.checkpoints import load_run
from cspine_helpers.decisions.confidence import MASK, disagreement, fit_confidence, map_features
from cspine_helpers.decisions.frozen_triage import freeze_triage, triage_on_test
from cspine_helpers.decisions.simulation import simulate_triage
from cspine_helpers.decisions.triage_search import (
    SearchRule,
    patient_confidence,
    search_triage,
    shared_guarantees,
    winner_of,
)
from cspine_helpers.evaluation.cases import Aggregation, Cases
from cspine_helpers.evaluation.clinical_utility import SCREENING_PREVALENCE
from cspine_helpers.evaluation.selective import compare_selective, difference_at_coverage
from cspine_helpers.explain.maps import compute_maps, default_layer, map_sequences
from cspine_helpers.files import paths
from cspine_helpers.files.tables import read_columns, write_table
from cspine_helpers.inference.prediction import PREDICTIONS, predict
from cspine_helpers.labels import UID, expand, read_labels
from cspine_helpers.phantom.cohort import CohortConfig, make_cohort
from cspine_helpers.predictions import read_predictions, write_predictions
from cspine_helpers.radiographs.cohort import read_radiograph_cohort
from cspine_helpers.radiographs.maps import framed
from cspine_helpers.radiographs.model import RadiographOutput
from cspine_helpers.radiographs.task import load_radiograph_run

METHOD = "grad_cam"
HARD = CohortConfig(studies=200, seed=2611, difficulty="hard")
LEVELS = {"builtin": "patient", "fracatlas": "image"}  # at which a triage answers
PREVALENCE = {"builtin": SCREENING_PREVALENCE, "fracatlas": None}  # nobody is screened for broken limbs
RECALLS, DELTA = (0.8, 0.85, 0.9), 0.1
RULE = SearchRule()
COVERAGES, REDRAWS = (0.5, 0.7, 0.9), 1000
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


def of_radiographs(name: str) -> pd.DataFrame:
    """Features of each radiograph's map and of the network's own mask, each on its own grid in the frame.

    Both of one pass: the map's target takes the mask along.
    """
    run, cohort = load_radiograph_run(paths.run_dir(name)), read_radiograph_cohort(paths.cohort_dir(name))
    network, rows, parts = run.model.folded(gradients=True), predictions_of(name), []
    masks: list[torch.Tensor] = []

    def target(output: RadiographOutput) -> torch.Tensor:
        assert output.mask_logit is not None
        masks.append(output.mask_logit.detach().float().sigmoid())
        return output.logit

    for split in rows["split"].unique():
        for part in framed(cohort, cohort.of(split)):
            images = torch.from_numpy(part.pixels)
            layer = default_layer(network, images[:1])
            maps = [
                compute_maps(network, image[None], target, method=METHOD, layer=layer)
                for image in tqdm(images, unit="image")
            ]
            found = map_features(torch.cat(maps).numpy()).assign(method=METHOD, layer=layer)
            found = found.join(map_features(torch.cat(masks).numpy()).add_prefix(MASK))
            parts.append(found.assign(**{UID: part.rows["image"].to_numpy()}))
            masks.clear()
    return rows[KEYS].merge(pd.concat(parts), on=UID, how="left", validate="one_to_one")


def of_members(name: str, folders: list[Path], packed: Path) -> pd.DataFrame:
    """How far the run and others, which are asked for the same rows, are apart."""
    rows, others = predictions_of(name), []
    for folder in folders:
        run = load_run(folder)
        parts = [predict(run, part, packed, split=split) for split, part in rows.groupby("split", sort=False)]
        others.append(pd.concat(parts, ignore_index=True))
        print(f"{name}: predicted by {folder.name}", flush=True)
    members = " + ".join([RUNS[name], *(folder.name for folder in folders)])
    return rows[KEYS].assign(disagreement=disagreement(rows, others), members=members)


def measure(names: Sequence[str]) -> None:
    """Search, freeze and open the test split, compare at equal coverage. Tables are written."""
    for name in names:
        level = LEVELS[name]
        folder, predictions = paths.run_dir(name), predictions_of(name)
        features, validation = features_of(name), Cases.of(predictions, split="validation")
        made = shared_guarantees(predictions, RECALLS, level=level, delta=DELTA)
        found = search_triage(validation, made, features, rule=RULE)
        store(name, "triage_search", found)
        triage, confidence = winner_of(found, validation, made, features)
        everybody = Cases.of(predictions)
        values = None if confidence is None else confidence.of(everybody, features)
        sure = None if values is None else everybody.table()[[UID, "vertebra"]].assign(confidence=values)
        freeze_triage(folder, triage, predictions, sure)
        store(name, "triage_test", triage_on_test(folder, predictions, sure, prevalence=PREVALENCE[name]))
        parts = [comparison(found, triage.p_low, validation, features, name)]
        if name == "builtin":
            parts.append(comparison(found, triage.p_low, validation, features, "hard"))
        store(name, "triage_comparison", pd.concat(parts, ignore_index=True))


def store(name: str, what: str, table: pd.DataFrame) -> None:
    """Write a table beside the others, and show it."""
    shown = table[table["winner"] == 1] if "winner" in table.columns else table
    print(f"{name}, {what}", shown.round(4).to_string(index=False), sep="\n", flush=True)
    exact = table.columns.isin(["p_low", "cut"])  # thresholds are found again by their value
    rounded = dict.fromkeys(table.columns[~exact & (table.dtypes == "float64")], 7)
    write_table(table.round(rounded), table_path(name, what), sealed=True)


def features_of(name: str) -> pd.DataFrame:
    """The stored features of a cohort."""
    return read_columns(table_path(name), KEYS, what="table of confidences", source="", text=[UID])


def comparison(
    found: pd.DataFrame, p_low: float, validation: Cases, features: pd.DataFrame, name: str
) -> pd.DataFrame:
    """Each confidence against plain probability, on the suspected cases of the test split, by level.

    A confidence is fitted on validation, with the α that did best there held out. Wrong is to call an intact
    case positive. The test split is judged outside the record of openings: nothing is chosen by this.
    """
    cases, own = Cases.of(predictions_of(name), split="test"), features_of(name)
    tried = found[(found["kind"] == "setting") & (found["p_low"] == p_low)]
    tried = tried.sort_values("held_out_value", kind="stable").drop_duplicates("confidence", keep="last")
    fits = {}
    for row in tried.sort_index().to_dict("records"):
        options = {} if pd.isna(row["alpha"]) else {"alpha": row["alpha"]}
        fits[row["confidence"]] = fit_confidence(
            row["confidence"], validation, features, p_low=p_low, **options
        )
    sure = {confidence: fit.of(cases, own) for confidence, fit in fits.items()}
    levels = {cases.level: (cases, sure)}
    if cases.level == "vertebra":
        of_patients = {each: patient_confidence(cases, values, p_low) for each, values in sure.items()}
        levels["patient"] = (cases.patients(Aggregation("max")), of_patients)
    rows = []
    for level, (judged, values) in levels.items():
        suspected = judged.probability >= p_low
        some, wrong = judged.where(suspected), judged.label[suspected] == 0
        plain = values.pop("distance")[suspected]
        for confidence, value in values.items():
            head = {"cohort": name, "level": level, "cases": len(some), "wrong": int(wrong.sum())}
            head |= {"confidence": confidence, "alpha": fits[confidence].alpha}
            pair = (some, plain, value[suspected], wrong)
            areas = compare_selective(*pair).rename(columns={"value": "plain", "other": "value"})
            risks = difference_at_coverage(*pair, coverage=COVERAGES)
            risks = risks.rename(columns={"risk": "plain", "other": "value"})
            risks.insert(0, "metric", [f"risk at coverage {each:g}" for each in risks.pop("coverage")])
            rows.append(pd.concat([areas, risks]).assign(**head))
    table = pd.concat(rows, ignore_index=True)
    return table[[*head, "metric", "value", "plain", "difference", "low", "high"]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    commands = parser.add_subparsers(dest="what", required=True)
    for what in ("maps", "members"):
        command = commands.add_parser(what)
        command.add_argument("cohort", choices=tuple(RUNS) if what == "maps" else ("builtin", "hard"))
        command.add_argument("--folder", type=Path, help="of the hard cohort (default: made and deleted)")
        if what == "members":
            command.add_argument("runs", nargs="+", type=Path, help="folders of other runs")
    command = commands.add_parser("measure")
    command.add_argument("cohorts", nargs="+", choices=tuple(LEVELS))
    commands.add_parser("simulate")
    options = parser.parse_args()
    if options.what == "measure":
        measure(options.cohorts)
        return
    if options.what == "simulate":
        store("builtin", "triage_simulation", simulate_triage(redraws=REDRAWS, delta=DELTA))
        return
    name = options.cohort
    with TemporaryDirectory() as made:
        if name == "fracatlas":
            keep(name, of_radiographs(name))
            return
        packed = paths.cohort_dir(name) / "packed" if name == "builtin" else None
        packed = packed or hard_cohort(options.folder or Path(made) / "hard")
        keep(
            name,
            of_sequences(name, packed) if options.what == "maps" else of_members(name, options.runs, packed),
        )


if __name__ == "__main__":
    main()
