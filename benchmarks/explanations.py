"""What explanations of the built-in run are worth: short trainings to compare with, and what was measured.

    python benchmarks/explanations.py train reference seed_1    about six minutes each on two cores
    python benchmarks/explanations.py train                     all five, one after another

The short trainings have the recipe of the built-in run with fewer epochs, and keep the last. They differ in
one thing each: the seed, the labels (those of other patients), or the pooling of features.
"""

import argparse
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from cspine_helpers.cohort import read_cohort
from cspine_helpers.files import paths
from cspine_helpers.labels import UID, write_labels
from cspine_helpers.packed import read_manifest, write_manifest
from cspine_helpers.splits import studies_of
from cspine_helpers.training.run import train
from cspine_helpers.training.settings import Settings, preset

COHORT = "builtin"
SHORT = ("reference", "seed_1", "seed_2", "random_labels", "mask_pooling")
SLICE_EPOCHS, EPOCHS = 30, 1  # of 80 and 8
PERMUTATION_SEED = 14


def settings_of(name: str) -> Settings:
    """The recipe cut short, and what is different in a run of this name."""
    its = preset(COHORT)
    model = its.model
    train_config = replace(
        its.train, epochs=EPOCHS, slice_epochs=SLICE_EPOCHS, warmup_epochs=0.25, keep="last"
    )
    if name.startswith("seed_"):
        train_config = replace(train_config, seed=int(name.removeprefix("seed_")))
    elif name == "mask_pooling":
        model = replace(model, pooling="avgmax_mask")
    return replace(its, model=model, train=train_config)


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
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"what to train: {', '.join(SHORT)}")
    parser.add_argument(
        "--folder", type=Path, default=paths.run_dir("explain"), help="where the short trainings are"
    )
    options = parser.parse_args()
    if unknown := set(options.names) - set(SHORT):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(SHORT)}")
    for name in options.names or SHORT:
        its = settings_of(name)
        train(
            cohort_of(name),
            options.folder / name,
            model=its.model,
            config=its.train,
            rule=its.rule,
            resume=True,
        )


if __name__ == "__main__":
    main()
