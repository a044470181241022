"""What explanations of the built-in run are worth: trainings to compare with, and what was measured.

    python -m benchmarks.explanations train whole_slice seed_1        a quarter of an hour each on two cores
    python -m benchmarks.explanations train                           all of them, one after another
    python -m benchmarks.explanations measure sanity agreement        tables of the built-in run
    python -m benchmarks.explanations measure fracatlas --folder DIR  of three runs there, m0, m1 and m2
    python -m benchmarks.map_scores builtin                           maps against the truth, case by case

`whole_slice` is trained as the built-in run, but for its pooling, which was the built-in run's before;
`seed_1` differs in the seed alone. `random_labels` learns those of other patients, in fewer epochs.
"""

import argparse
import os
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pandas as pd
from torch import nn

from benchmarks.triage import HARD
from cspine_helpers.checkpoints import Run, load_run
from cspine_helpers.cohort import read_cohort
from cspine_helpers.dataset.sequence import SequenceDataset
from cspine_helpers.evaluation.cases import Cases
from cspine_helpers.evaluation.intervals import compare
from cspine_helpers.evaluation.resampling import mean_by_patient
from cspine_helpers.explain.localisation import localise, trivial_maps
from cspine_helpers.explain.maps import METHODS, Maps, Method, map_sequences
from cspine_helpers.explain.mask_ablation import (
    ablate_masks,
    broken_neighbour,
    changed_masks,
    mask_ablation_table,
    neighbour_effect,
    own_masks,
)
from cspine_helpers.explain.sanity import (
    Mapper,
    agreement,
    agreement_table,
    cascade,
    parts,
    passes,
    sanity_table,
)
from cspine_helpers.files import paths
from cspine_helpers.files.tables import write_table
from cspine_helpers.inference.prediction import predict
from cspine_helpers.labels import UID, expand, read_labels, write_labels
from cspine_helpers.packed import read_manifest, write_manifest
from cspine_helpers.phantom.cohort import CohortConfig, fracture_truth, make_cohort, neighbour_masks
from cspine_helpers.radiographs.cohort import read_radiograph_cohort
from cspine_helpers.radiographs.maps import framed, map_radiographs
from cspine_helpers.radiographs.task import load_radiograph_run
from cspine_helpers.splits import studies_of
from cspine_helpers.training.run import train
from cspine_helpers.training.settings import Settings, preset

COHORT = RUN = "builtin"
OTHERWISE: dict[str, dict[str, object]] = {  # of the recipe, what is different in a training
    "whole_slice": {"pooling": "avgmax"},
    "seed_1": {"seed": 1},
    "random_labels": {"slice_epochs": 30, "epochs": 1, "warmup_epochs": 0.25, "keep": "last"},
}
PERMUTATION_SEED = 14
CHECKED: tuple[Method, ...] = ("grad_cam", "hires_cam", "layer_cam", "gradient_input")
AGREED: tuple[Method, ...] = ("grad_cam", "hires_cam", "layer_cam", "gradient_input")
ABLATED: Method = "gradient_input"  # of these the one that knows most of the truth
RADIOGRAPH_CHECKED = ("grad_cam", "hires_cam", "gradient_input", "mask")
CASCADED = 16  # patients whose maps are computed by each randomised network
CENTRAL = 2  # of a sequence's five channels, the position's own slice
RECALL = 0.95  # that a run's threshold reaches on the validation split
UNSEEN = {"fresh": CohortConfig(studies=200, seed=4711), "hard": HARD}  # by every training


def settings_of(name: str) -> Settings:
    """The built-in run's recipe, and what is different in a training of this name."""
    its, other = preset(COHORT), OTHERWISE[name]
    of_model = {field: value for field, value in other.items() if field in asdict(its.model)}
    of_training = {field: value for field, value in other.items() if field not in of_model}
    return replace(its, model=replace(its.model, **of_model), train=replace(its.train, **of_training))


def train_other(name: str, folder: Path) -> None:
    """Train what has this name, or resume it."""
    its = settings_of(name)
    train(read_cohort(cohort_of(name)), folder, model=its.model, config=its.train, rule=its.rule, resume=True)


def cohort_of(name: str) -> Path:
    """The cohort that a run is trained on; that of random labels is made here, beside the other."""
    source = paths.cohort_dir(COHORT)
    if name != "random_labels":
        return source
    folder = paths.cohort_dir(f"{COHORT}_random_labels")
    if not (folder / "train.csv").is_file():
        cohort, manifest = read_cohort(source), read_manifest(source / "packed")
        left_out = shutil.ignore_patterns("train*.csv", "manifest*", paths.CHECKSUMS)
        shutil.copytree(source, folder, copy_function=os.link, ignore=left_out)
        donor = permuted(cohort.split)
        whose = manifest.assign(**{UID: manifest[UID].map(donor)})[[UID, "vertebra"]]
        truth = manifest.set_index([UID, "vertebra"])["slice_truth"]
        theirs = truth.reindex(pd.MultiIndex.from_frame(whose)).to_numpy()
        write_manifest(manifest.assign(slice_truth=theirs), folder / "packed")
        labels = cohort.labels.set_index(UID).loc[cohort.labels[UID].map(donor)].reset_index()
        write_labels(labels.assign(**{UID: cohort.labels[UID]}), folder / "train.csv")
    return folder


def permuted(split: pd.DataFrame) -> dict[str, str]:
    """Each study, and the one of the same split whose labels and slice truth it is given."""
    rng, donor = np.random.default_rng(PERMUTATION_SEED), {}
    for name in split["split"].unique():
        studies = studies_of(split, name)
        donor |= dict(zip(studies, rng.permutation(studies).tolist(), strict=True))
    return donor


# ------------------------------------------------------------------------------------ what is measured


def one_a_patient(samples: pd.DataFrame) -> pd.DataFrame:
    """The first fractured vertebra of each patient who has one: a sequence a patient costs least."""
    return samples[samples["label"] == 1].drop_duplicates(UID).reset_index(drop=True)


def measure_sanity(runs: Path, out: Path) -> None:
    """`sanity.csv`, the cascade; `sanity_checks.csv`, who passes, and what other patients' labels teach."""
    run, cohort = load_run(paths.run_dir(RUN)), read_cohort(paths.cohort_dir(COHORT))
    samples = one_a_patient(cohort.samples["test"])[:CASCADED]
    truth = fracture_truth(cohort.folder, samples)
    slices, size = run.config.slices, run.config.size
    dataset = SequenceDataset(samples, cohort.packed, slices=slices, size=size)
    central = np.stack([dataset[n]["sequence"][:, CENTRAL].numpy() for n in range(len(dataset))])
    edges = trivial_maps(central)["edges"]

    def mapper(method: Method) -> Mapper:
        def maps(model: nn.Module) -> Maps:
            return map_sequences(replace(run, model=model), samples, cohort.packed, method=method)

        return maps

    mapped: dict[str, Mapper] = {method: mapper(method) for method in CHECKED}
    mapped["edges"] = lambda model: edges
    steps = [part for part in parts(run.model) if part != "slice_head"]  # no part of a vertebra's logit
    rows, patients = cascade(run.model, mapped, truth=truth, steps=steps, seeds=(0, 1)), samples[UID]
    write_table(sanity_table(rows, patients), out / "sanity.csv", sealed=True)
    checks, others = passes(rows, patients), []
    other = load_run(runs / "random_labels")
    trained = rows[rows["step"] == 0].set_index("method")["auroc"]
    for method in checks["method"]:
        maps = edges if method == "edges" else mapped[method](other.model)
        found = localise(maps, truth)["auroc"].to_numpy()
        lost = mean_by_patient(trained[method].to_numpy() - found, patients)
        others.append((found.mean(), *lost))
    names = ["auroc_labels", "labels_lost", "labels_lost_low", "labels_lost_high"]
    checks[names] = others
    checks["passes"] = checks["passes"].astype(int)  # tables hold no True
    write_table(checks, out / "sanity_checks.csv", sealed=True)


def measure_agreement(runs: Path, out: Path) -> None:
    """`agreement.csv`: between methods, between seeds, and with a network of other patients' labels."""
    run, cohort = load_run(paths.run_dir(RUN)), read_cohort(paths.cohort_dir(COHORT))
    samples, tables = one_a_patient(cohort.samples["test"]), []

    def maps(its: Run, method: Method) -> np.ndarray:
        return map_sequences(its, samples, cohort.packed, method=method).values  # noqa: PD011

    methods = {name: maps(run, name) for name in METHODS if name != "occlusion"}  # takes a minute a case
    found = agreement_table(agreement(methods), samples[UID])
    tables.append(found.assign(comparison="methods", method=""))
    for comparison, names in (("seeds", ["seed_1"]), ("labels", ["random_labels"])):
        others = {name: load_run(runs / name) for name in names}
        for method in AGREED:
            each = {"seed_0": methods[method]} | {name: maps(its, method) for name, its in others.items()}
            found = agreement_table(agreement(each), samples[UID])
            tables.append(found.assign(comparison=comparison, method=method))
    write_table(pd.concat(tables, ignore_index=True), out / "agreement.csv", sealed=True)


def measure_mask_ablation(runs: Path, out: Path) -> None:
    """`mask_ablation.csv`: the built-in run when its mask is another."""
    run, cohort = load_run(paths.run_dir(RUN)), read_cohort(paths.cohort_dir(COHORT))
    samples = cohort.samples["test"]
    own = own_masks(samples, cohort.packed, slices=run.config.slices, size=run.config.size)
    masks = changed_masks(own, samples) | {"neighbour": neighbour_masks(cohort.folder, samples)}
    broken = (samples["label"] == 1).to_numpy()
    truth = np.zeros_like(own)
    truth[broken] = fracture_truth(cohort.folder, samples[broken])
    rows = ablate_masks(run, samples, cohort.packed, masks, truth=truth, method=ABLATED)
    write_table(mask_ablation_table(rows).assign(method=ABLATED), out / "mask_ablation.csv", sealed=True)


def measure_neighbours(runs: Path, out: Path) -> None:
    """`neighbours.csv`, false alarms beside broken bone; `pooling.csv`, what pooling in the mask changes.

    Each run's threshold is the highest that finds 95 % of the fractures of the validation split. Compared on
    the test split, and on phantoms that neither has seen: 200 like those of the cohort, 200 hard ones.
    """
    cohort = read_cohort(paths.cohort_dir(COHORT))
    trained = {"builtin": load_run(paths.run_dir(RUN)), "whole_slice": load_run(runs / "whole_slice")}
    thresholds, predicted, tables, rows = {}, {}, [], []
    for name, run in trained.items():
        chosen = predict(run, cohort.samples["validation"], cohort.packed, split="validation")
        found = np.sort(chosen["probability"][chosen["label"] == 1])
        thresholds[name] = float(found[int((1 - RECALL) * len(found))])
        predicted[name, "test"] = predict(run, cohort.samples["test"], cohort.packed, split="test")
    for place, config in UNSEEN.items():
        with TemporaryDirectory() as temporary:
            folder = Path(temporary) / place
            make_cohort(folder, config)
            labels = read_labels(folder / "train.csv")
            for name, run in trained.items():
                samples = expand(labels, labels[UID])
                predicted[name, place] = predict(run, samples, folder / "packed", split="test")
    for (name, place), table in predicted.items():
        effect = neighbour_effect(table, threshold=thresholds[name])
        tables.append(effect.assign(run=name, cohort=place, threshold=thresholds[name]))
    write_table(pd.concat(tables, ignore_index=True), out / "neighbours.csv", sealed=True)
    for place in ("test", *UNSEEN):
        pair = [(predicted[name, place], thresholds[name]) for name in ("whole_slice", "builtin")]
        rows.append(pooling_rows(*pair).assign(cohort=place, run="builtin", against="whole_slice"))
    write_table(pd.concat(rows, ignore_index=True), out / "pooling.csv", sealed=True)


def pooling_rows(first: tuple[pd.DataFrame, float], second: tuple[pd.DataFrame, float]) -> pd.DataFrame:
    """Two runs on the same vertebrae, by patient: the second less the first.

    AUROC of all vertebrae, with intact ones that have a broken neighbour alone and with the others alone; how
    well the probability of an intact vertebra tells that its neighbour is broken (0.5: it does not); rates at
    each run's threshold.
    """
    beside = broken_neighbour(first[0])
    fractured = (first[0]["label"] == 1).to_numpy()
    kinds = {
        "all": (np.ones(len(beside), dtype=bool), fractured),
        "beside broken": (fractured | beside, fractured),
        "apart": (fractured | ~beside, fractured),
        "neighbour told": (~fractured, beside),
    }
    tables = []
    for vertebrae, (kept, label) in kinds.items():
        pair = [Cases.of(table.assign(label=label.astype(int))[kept]) for table, _ in (first, second)]
        limits = {"threshold": first[1], "other_threshold": second[1]}
        found = compare(*pair, **limits, keep_undefined=True).assign(vertebrae=vertebrae, n=int(kept.sum()))
        wanted = ("auroc",) if vertebrae == "neighbour told" else ("auroc", "average_precision", "recall",
                                                                     "specificity")  # fmt: skip
        tables.append(found[found["metric"].isin(wanted)])
    found = pd.concat(tables, ignore_index=True).rename(columns={"value": "reference"})
    columns = ["vertebrae", "metric", "reference", "other", "difference", "low", "high", "n"]
    return found[columns]


def measure_fracatlas(runs: Path, out: Path) -> None:
    """`agreement.csv` of radiographs in their frames: between methods, and between runs of three seeds."""
    cohort = read_radiograph_cohort(paths.cohort_dir("fracatlas"))
    test = cohort.of("test")
    fractured = test[test["label"] == 1].drop_duplicates("patient")
    groups = framed(cohort, fractured)
    seeds = {f"seed_{n}": load_radiograph_run(folder) for n, folder in enumerate(sorted(runs.glob("m[0-2]")))}
    rows: dict[tuple[str, str], list[pd.DataFrame]] = {}
    cases = 0
    for group in groups:
        maps = {
            (seed, method): map_radiographs(run, group.pixels, method=method).values  # noqa: PD011
            for seed, run in seeds.items()
            for method in RADIOGRAPH_CHECKED
        }
        for method in RADIOGRAPH_CHECKED:
            found = agreement({seed: maps[seed, method] for seed in seeds})
            rows.setdefault(("seeds", method), []).append(found.assign(case=found["case"] + cases))
        found = agreement({method: maps["seed_0", method] for method in RADIOGRAPH_CHECKED})
        rows.setdefault(("methods", ""), []).append(found.assign(case=found["case"] + cases))
        cases += len(group.rows)
    patients = pd.concat([group.rows["patient"] for group in groups], ignore_index=True)
    epochs = " ".join(str(run.record["epochs"]) for run in seeds.values())
    tables = [
        agreement_table(pd.concat(parts), patients).assign(
            comparison=comparison, method=method, epochs=epochs
        )
        for (comparison, method), parts in rows.items()
    ]
    write_table(pd.concat(tables, ignore_index=True), out / "agreement.csv", sealed=True)


MEASURED = {
    "sanity": measure_sanity,
    "agreement": measure_agreement,
    "mask_ablation": measure_mask_ablation,
    "neighbours": measure_neighbours,
    "fracatlas": measure_fracatlas,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("what", choices=("train", "measure"))
    known = f"to train: {', '.join(OTHERWISE)}; to measure: {', '.join(MEASURED)}"
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"default: all; {known}")
    parser.add_argument(
        "--folder", type=Path, default=paths.run_dir("explain"), help="where these trainings are"
    )
    parser.add_argument("--out", type=Path, help="of the tables (default: the run's own)")
    options = parser.parse_args()
    there = OTHERWISE if options.what == "train" else MEASURED
    if unknown := set(options.names) - set(there):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(there)}")
    for name in options.names or there:
        if options.what == "train":
            train_other(name, options.folder / name)
        else:
            out = options.out or paths.run_dir("fracatlas" if name == "fracatlas" else RUN) / "measured"
            out.mkdir(parents=True, exist_ok=True)
            MEASURED[name](options.folder, out)


if __name__ == "__main__":
    main()
