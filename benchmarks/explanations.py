"""What explanations of the built-in run are worth: short trainings to compare with, and what was measured.

    python benchmarks/explanations.py train reference mask_pooling    about ten minutes each on one core
    python benchmarks/explanations.py train                           all of them, one after another

The short trainings have the recipe of the built-in run with fewer epochs, and keep the last. `seed_1` and
`random_labels` (those of other patients) begin with random weights. `reference`, `mask_pooling` and
`mask_inside` begin with the encoders of the built-in run, the rest random, and differ in the pooling alone.
"""

import argparse
import os
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pandas as pd
from accelerate import Accelerator

from cspine_helpers.checkpoints import load_run
from cspine_helpers.cohort import read_cohort
from cspine_helpers.files import paths
from cspine_helpers.labels import UID, write_labels
from cspine_helpers.packed import read_manifest, write_manifest
from cspine_helpers.splits import studies_of
from cspine_helpers.training.config import TrainConfig
from cspine_helpers.training.run import check_vacant, train, train_task
from cspine_helpers.training.sequence_task import SequenceTask
from cspine_helpers.training.settings import Settings, preset

COHORT = RUN = "builtin"
EPOCHS = {  # of slices and of sequences; the built-in run has 80 and 8
    "reference": (0, 2),
    "mask_pooling": (0, 2),
    "mask_inside": (0, 2),
    "seed_1": (60, 2),
    "random_labels": (30, 1),
}
POOLING = {"mask_pooling": "avgmax_mask", "mask_inside": "avgmax_inside"}
BEGUN = ("reference", *POOLING)  # with the built-in run's encoders
PERMUTATION_SEED = 14


def settings_of(name: str) -> Settings:
    """The recipe cut short, and what is different in a run of this name."""
    its, (slice_epochs, epochs) = preset(COHORT), EPOCHS[name]
    model = replace(its.model, pooling=POOLING.get(name, its.model.pooling))
    seed = 1 if name == "seed_1" else its.train.seed
    few = {"epochs": epochs, "slice_epochs": slice_epochs, "warmup_epochs": 0.25}
    return replace(its, model=model, train=replace(its.train, **few, seed=seed, keep="last"))


def train_short(name: str, folder: Path) -> None:
    """Train what has this name, or resume it."""
    its, cohort = settings_of(name), read_cohort(cohort_of(name))
    if name not in BEGUN:
        train(cohort, folder, model=its.model, config=its.train, rule=its.rule, resume=True)
        return
    shipped = load_run(paths.run_dir(RUN))

    def begun(config: TrainConfig, accelerator: Accelerator) -> SequenceTask:
        task = SequenceTask(cohort, its.model, config, its.rule, accelerator)
        for part in ("backbone", "mask_encoder"):
            its_own, theirs = (getattr(model, part) for model in (task.model, shipped.model))
            its_own.load_state_dict(theirs.state_dict())
        return task

    setting = {"model": asdict(its.model), "rule": asdict(its.rule), "data": cohort.fingerprint()}
    setting |= {"left_out": {}, "encoders_of": shipped.record["weights_sha256"]}
    check_vacant(folder, resume=True)
    train_task(folder, its.train, begun, setting=setting, fit=lambda accelerator, earlier: its.train)


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("what", choices=("train",))
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"what to train: {', '.join(EPOCHS)}")
    parser.add_argument(
        "--folder", type=Path, default=paths.run_dir("explain"), help="where the short trainings are"
    )
    options = parser.parse_args()
    if unknown := set(options.names) - set(EPOCHS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(EPOCHS)}")
    for name in options.names or EPOCHS:
        train_short(name, options.folder / name)


if __name__ == "__main__":
    main()
