"""What each part of the radiographs' recipe buys on FracAtlas, and how much a leaky split flatters.

Runs that differ from the recipe in one thing, and two that differ in what they were trained on: half of the
images of some groups are judged; the clean training sees none of these groups, the leaky one the other
halves, in the place of as many other images of the same labels.

    python benchmarks/fracatlas.py train seed_0 no_ema    an hour each on two cores; resumed where it stopped
    python benchmarks/fracatlas.py measure                writes ablation.csv and leakage.csv of a run

Radiographs are predicted as they are, without mirrored views but for one row, and by the default blend of
class and mask, so that no row owes anything to a search.
"""

import argparse
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from cspine_helpers.files import paths
from cspine_helpers.files.tables import write_table
from cspine_helpers.labels import UID
from cspine_helpers.radiographs.cohort import RadiographCohort, read_radiograph_cohort
from cspine_helpers.radiographs.evaluation import ablation, compare, evaluate
from cspine_helpers.radiographs.groups import leakage
from cspine_helpers.radiographs.image_table import read_images, read_pairs, read_regions
from cspine_helpers.radiographs.images import read_radiograph
from cspine_helpers.radiographs.mask_cases import MaskCases
from cspine_helpers.radiographs.prediction import Predictor
from cspine_helpers.radiographs.task import radiograph_preset, train_radiographs
from cspine_helpers.splits import write_split
from cspine_helpers.training.settings import Settings

COHORT, RUN = "fracatlas", "fracatlas"
SEEDS = ("seed_0", "seed_1", "seed_2")
ALONE = {"no_pretraining": "no pretraining", "no_masks": "no masks", "no_ema": "no EMA"}
TRAINED_ON = ("clean", "leaky")
NAMES = (*SEEDS, *ALONE, *TRAINED_ON)
LEAK_SEED, LEAK_SHARE = 7, 0.4  # of the groups of two images or more that are judged
METRICS = ("auroc", "average_precision", "dice_pos")


def settings_of(name: str) -> Settings:
    """The recipe, and what is different in a run of this name."""
    its = radiograph_preset()
    model, train = its.model, its.train
    if name in SEEDS:
        train = replace(train, seed=SEEDS.index(name))
    elif name == "no_pretraining":
        model = replace(model, pretrained=None, frozen_blocks=0)
    elif name == "no_masks":
        model = replace(model, mask_evidence=0.0)
        train = replace(train, loss=replace(train.loss, pixels=0.0, dice=0.0))
    elif name == "no_ema":
        train = replace(train, ema=0.0)
    return replace(its, model=model, train=train)


def leak_design(images: pd.DataFrame) -> dict[str, list[str]]:
    """Which images are judged, and which train the clean and the leaky run: image ids by role.

    Args:
        images: those of the training split: image, patient, label.
    """
    rng = np.random.default_rng(LEAK_SEED)
    size = images.groupby("patient")["image"].transform("size")
    groups = images["patient"][size > 1].unique()
    picked = images["patient"].isin(rng.choice(groups, int(LEAK_SHARE * len(groups)), replace=False))
    judged: list[str] = []
    for _, rows in images[picked].groupby("patient"):
        judged += rng.permutation(rows["image"].to_numpy())[: len(rows) // 2].tolist()
    near, others = images[picked & ~images["image"].isin(judged)], images[~picked]
    dropped: list[str] = []
    for label in (0, 1):
        some = others["image"][others["label"] == label]
        dropped += rng.choice(some, int((near["label"] == label).sum()), replace=False).tolist()
    clean = others["image"].tolist()
    kept = others["image"][~others["image"].isin(dropped)].tolist()
    return {"judged": judged, "clean": clean, "leaky": [*kept, *near["image"]]}


def cohort_of(name: str, whole: RadiographCohort) -> Path:
    """The cohort that a run is trained on; of two it is made here, `data/fracatlas_<name>`."""
    if name not in TRAINED_ON:
        return whole.folder
    folder = paths.cohort_dir(f"{COHORT}_{name}")
    if not (folder / "split.csv").is_file():
        shutil.copytree(whole.folder, folder, copy_function=os.link, ignore=shutil.ignore_patterns("split.*"))
        trained = leak_design(whole.of("train"))[name]
        rows = [(image, "train") for image in trained]
        rows += [(image, "validation") for image in whole.of("validation")["image"]]
        write_split(pd.DataFrame(rows, columns=[UID, "split"]), folder / "split.csv")
    return folder


def predicted(
    members: Sequence[Path], images: pd.DataFrame, cohort: Path, *, tta: bool = False, masks: bool = True
) -> MaskCases:
    """What runs say of images, held against the truth."""
    predictor = Predictor.by(members, members[0] / "no-blend", tta=tta)
    answers = [
        predictor.predict(read_radiograph(cohort / file)) for file in tqdm(images["file"], unit="image")
    ]
    table = images.assign(probability=[answer.probability for answer in answers])
    found = {image: answer.mask for image, answer in zip(images["image"], answers, strict=True)}
    return MaskCases.of(table, truth=read_regions(cohort), predicted=found if masks else None)


def ablation_table(runs: Mapping[str, Path], whole: RadiographCohort) -> pd.DataFrame:
    """The recipe's parts, one at a time, on the test split; the reference is one run, images as they are."""
    images, single = whole.of("test"), [runs[SEEDS[0]]]
    cases = {"one run": predicted(single, images, whole.folder)}
    for name, words in ALONE.items():
        cases[words] = predicted([runs[name]], images, whole.folder, masks=name != "no_masks")
    cases["with TTA"] = predicted(single, images, whole.folder, tta=True)
    cases["three runs"] = predicted([runs[name] for name in SEEDS], images, whole.folder)
    return ablation(cases, reference="one run")


def leakage_table(runs: Mapping[str, Path], whole: RadiographCohort) -> pd.DataFrame:
    """What two splits share, and what the leaky training gains over the clean one on the same images."""
    rows = [*_shared(whole)]
    images = whole.of("train")
    judged = images[images["image"].isin(leak_design(images)["judged"])].reset_index(drop=True)
    clean, leaky = (predicted([runs[name]], judged, whole.folder) for name in TRAINED_ON)
    for name, cases in (("clean", clean), ("leaky", leaky)):
        found = evaluate(cases, threshold=None, keep_undefined=True).set_index("metric").loc[list(METRICS)]
        rows += [(name, metric, *row) for metric, *row in found[["value", "low", "high", "n"]].itertuples()]
    change = compare(clean, leaky, threshold=None).set_index("metric").loc[list(METRICS)]
    for metric, *row in change[["difference", "low", "high"]].itertuples():
        rows.append(("leaky − clean", metric, *row, len(judged)))
    return pd.DataFrame(rows, columns=["comparison", "metric", "value", "low", "high", "n"])


def _shared(whole: RadiographCohort) -> Iterator[tuple[str, str, float, float, float, int]]:
    """Rows of what any two splits have in common, by the published split and by ours."""
    table, pairs = read_images(whole.folder), read_pairs(whole.folder)
    published = table.set_index("image")["split"]
    own = whole.split.set_index(UID)["split"]
    for which, split in (("published", published[published != ""]), ("grouped", own)):
        for found in leakage(table, split.to_dict(), pairs).to_dict("records"):
            name = f"{which}: {found['split']} and {found['other']}"
            for metric in ("groups", "identical", "alike", "fractured_neighbours"):
                n = found["fractured"] if metric == "fractured_neighbours" else len(split)
                yield name, metric, float(found[metric]), np.nan, np.nan, int(n)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("what", choices=("train", "measure"))
    parser.add_argument("runs", nargs="*", metavar="NAME", help=f"runs to train: {', '.join(NAMES)}")
    parser.add_argument("--folder", type=Path, help="where the runs are (default: checkpoints/fracatlas_…)")
    parser.add_argument("--out", type=Path, default=paths.run_dir(RUN), help="where the tables go")
    options = parser.parse_args()
    if unknown := set(options.runs) - set(NAMES):
        parser.error(f"no such runs: {', '.join(sorted(unknown))}; there are {', '.join(NAMES)}")
    whole = read_radiograph_cohort(paths.cohort_dir(COHORT))
    at = {name: options.folder / name if options.folder else paths.run_dir(f"{RUN}_{name}") for name in NAMES}
    if options.what == "train":
        for name in options.runs or NAMES:
            its = settings_of(name)
            train_radiographs(
                cohort_of(name, whole),
                at[name],
                model=its.model,
                config=its.train,
                rule=its.rule,
                resume=True,
            )
        return
    for name, table in (("ablation", ablation_table(at, whole)), ("leakage", leakage_table(at, whole))):
        print(table.round(4).to_string(index=False))
        write_table(table, options.out / f"{name}.csv", sealed=True)


if __name__ == "__main__":
    main()
