"""What known slices buy: the RSNA preset's recipe at 64 pixels, on phantoms known in three ways.

720 phantoms of one seed: every slice known; known as RSNA 2022 is (slices of few studies, a segmenter's
masks, a few wrong labels); and so, without any marked slice. Each run is tried on a fresh cohort of another
seed with true labels, on which nothing was chosen (that of seed 4242 helped to choose the recipe). A run is
kept without its weights.

    python benchmarks/slice_truth.py full rsna none     25 to 49 minutes each on one core
"""

import argparse
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pandas as pd

from cspine_helpers.checkpoints import load_run
from cspine_helpers.cohort import read_cohort
from cspine_helpers.explain.attention import attention_scores, attention_table
from cspine_helpers.files import paths
from cspine_helpers.files.tables import write_table
from cspine_helpers.inference.prediction import predict
from cspine_helpers.labels import read_labels
from cspine_helpers.packed import read_manifest, write_manifest
from cspine_helpers.phantom.cohort import CohortConfig, make_cohort
from cspine_helpers.predictions import write_predictions
from cspine_helpers.splits import split_patients, write_split
from cspine_helpers.training.run import train
from cspine_helpers.training.settings import Settings, preset

TRUTHS = ("full", "rsna", "none")
STUDIES, SEED = 720, 2023
FRESH_STUDIES, FRESH_SEED = 200, 6151


def settings() -> Settings:
    """The RSNA preset's recipe, for 64 pixels and a CPU."""
    its = preset("rsna2022")
    sizes = {"size": 64, "feature_stride": 8, "mask_features": 16, "lstm_hidden": 64, "lstm_layers": 1}
    model = replace(its.model, **sizes, dropout=0.2)
    train_config = replace(its.train, epochs=3, batch_size=16, accumulate=1, slice_samples=4000, workers=0)
    return replace(its, model=model, train=train_config)


def cohort_of(truth: str) -> Path:
    """`data/slice_truth_<truth>`, made where it is not there; all three have the split of "rsna"."""
    folder = paths.cohort_dir(f"slice_truth_{truth}")
    if folder.is_dir():
        return folder
    if truth == "none":
        source = cohort_of("rsna")
        shutil.copytree(source, folder, copy_function=os.link, ignore=shutil.ignore_patterns("manifest*"))
        manifest = read_manifest(source / "packed")
        marked = manifest["slice_truth"].str.contains("x", na=False)
        write_manifest(manifest.assign(slice_truth=manifest["slice_truth"].mask(marked)), folder / "packed")
        return folder
    make_cohort(folder, CohortConfig(STUDIES, SEED, truth=truth))
    if truth == "rsna":
        write_split(split_patients(read_labels(folder / "train.csv")), folder / "split.csv")
    else:
        write_split(read_cohort(cohort_of("rsna")).split, folder / "split.csv")
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("truth", nargs="+", choices=TRUTHS)
    options, recipe = parser.parse_args(), settings()
    fresh = paths.cohort_dir("slice_truth_fresh")
    make_cohort(fresh, CohortConfig(FRESH_STUDIES, FRESH_SEED))
    if not (fresh / "split.csv").is_file():
        write_split(split_patients(read_labels(fresh / "train.csv")), fresh / "split.csv")
    cohort = read_cohort(fresh)
    samples = pd.concat(cohort.samples.values(), ignore_index=True)
    for truth in options.truth:
        folder, config = paths.run_dir("slice_truth") / truth, recipe.train
        if truth == "none":
            config = replace(config, pseudo_label_after=0)  # begins with the vertebra's label on each slice
        train(cohort_of(truth), folder, model=recipe.model, config=config, rule=recipe.rule, resume=True)
        run = load_run(folder)
        predictions = predict(run, samples, cohort.packed, split="test")
        write_predictions(predictions, folder / "fresh.csv")
        attention = attention_scores(attention_table(run, samples, cohort.packed))
        write_table(attention.reset_index(), folder / "fresh_attention.csv", sealed=True)
        (folder / "model.safetensors").unlink()
        print(truth, attention.round(3).to_string(), sep="\n")


if __name__ == "__main__":
    main()
