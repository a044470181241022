"""What the run on FracAtlas ships in the place of 3,415 images: what was measured, groups, 24 images.

    python benchmarks/fracatlas_sample.py [--run NAME] [--cohort NAME] [--sample NAME] [--replace]

Needs the whole cohort, and the run's predictions, masks and frozen decision. Writes, in the run's folder,
`measured/validation`, `measured/test` (`MaskCases.write`) and `measured/groups.csv` (who is one patient, by
which split); and the sample, `data/fracatlas_sample`.
"""

import argparse
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from cspine_helpers.files import paths
from cspine_helpers.files.tables import write_table
from cspine_helpers.predictions import read_predictions
from cspine_helpers.radiographs.card import MEASURED
from cspine_helpers.radiographs.cohort import RadiographCohort, copy_images, read_radiograph_cohort
from cspine_helpers.radiographs.evaluation import examples
from cspine_helpers.radiographs.folder import image_threshold
from cspine_helpers.radiographs.image_table import read_images, read_regions
from cspine_helpers.radiographs.mask_cases import MaskCases, judged_images
from cspine_helpers.radiographs.masks import read_masks
from cspine_helpers.radiographs.prediction import Predictor

EACH = 12  # fractured images of the sample, and intact ones
ORIENTATION = 0x0112  # of EXIF


def measure(run_folder: Path, cohort: RadiographCohort) -> dict[str, MaskCases]:
    """Split → what the run's tables say of its images, held against the truth."""
    predictions, masks = read_predictions(run_folder / "predictions.csv"), read_masks(run_folder)
    truth = read_regions(cohort.folder)
    return {
        split: MaskCases.of(
            judged_images(predictions, cohort.images, split=split), truth=truth, predicted=masks
        )
        for split in ("validation", "test")
    }


def groups_of(cohort: RadiographCohort) -> pd.DataFrame:
    """Image, patient (group), label, and both splits: the published one and ours."""
    published = read_images(cohort.folder).set_index("image")["split"]
    table = cohort.images[["image", "patient", "label", "split"]]
    return table.assign(published=table["image"].map(published))


def is_turned(cohort: RadiographCohort, images: pd.Series) -> pd.Series:
    """Whether the stored pixels of each image lie on their side, by its EXIF orientation."""
    files = cohort.images.set_index("image")["file"]
    found = []
    for image in images:
        with Image.open(cohort.folder / files[image]) as file:
            found.append(file.getexif().get(ORIENTATION, 1))
    return pd.Series(np.isin(found, (5, 6, 7, 8)), images.index)


def choose(cases: MaskCases, turned: pd.Series, *, threshold: float, each: int = EACH) -> pd.DataFrame:
    """Half fractured, half intact, of each half as many answered wrongly as rightly where there are so many.

    One image a patient (group), its first fractured one where it has one, and spread over the predicted
    probability by `evaluation.examples`. Then, for each trait that no image has, the image that has it takes
    the place of the nearest in probability of the same kind that is not needed for another trait.

    Args:
        cases: of one split.
        turned: whether each of `cases.images` lies on its side, (n,).
        threshold: of presence.
        each: fractured images, and intact ones.

    Returns:
        Rows of `cases.images` with `kind`, sorted by image.

    Raises:
        ValueError: too few images, or a trait that cannot be had.
    """
    # 1. One image a patient.
    rows = cases.images.assign(turned=turned.to_numpy() & (cases.images["label"] == 1))
    ranked = rows.sort_values(["turned", "label", "image"], ascending=[False, False, True])
    pool = cases.where(rows["image"].isin(ranked.drop_duplicates("patient")["image"]).to_numpy())
    every = examples(pool, threshold=threshold, each=len(pool)).merge(rows[["image", "turned"]], on="image")

    # 2. As many of each kind, evenly over the probability.
    many = every["kind"].value_counts()
    parts = []
    for right, wrong in (("hit", "miss"), ("cleared", "false alarm")):
        of_wrong = min(each // 2, int(many.get(wrong, 0)))
        for kind, count in ((wrong, of_wrong), (right, each - of_wrong)):
            if count:
                found = examples(pool, threshold=threshold, each=count)
                parts.append(found[found["kind"] == kind])
    chosen = set(pd.concat(parts)["image"])
    if len(chosen) < 2 * each:
        raise ValueError(f"{len(chosen)} images can be chosen, {2 * each} are wanted. Use a larger split.")

    # 3. Every trait at least once.
    traits = dict(_traits(every))
    for name, has in traits.items():
        if has[every["image"].isin(chosen)].any():
            continue
        shown = [set(every["image"][its]) & chosen for its in traits.values()]
        needed = set().union(*(images for images in shown if len(images) == 1))
        pairs = every[has].merge(
            every[every["image"].isin(chosen - needed)], on="kind", suffixes=("", "_old")
        )
        if pairs.empty:
            raise ValueError(f"No image that is {name} can be had. Use another split.")
        apart = (pairs["probability"] - pairs["probability_old"]).abs()
        best = pairs.assign(apart=apart).sort_values(["apart", "image", "image_old"]).iloc[0]
        chosen = chosen - {best["image_old"]} | {best["image"]}
    return every[every["image"].isin(chosen)].sort_values("image", ignore_index=True)


def _traits(images: pd.DataFrame) -> Iterator[tuple[str, pd.Series]]:
    """What the sample is to show, and which images do: (n,) of bool each."""
    yield "turned by its EXIF", images["turned"]
    for name in ("hardware", "multiscan"):
        yield f"fractured, with {name}", (images[name] == 1) & (images["label"] == 1)
    words = images["part"].str.split("+")
    for part in sorted(set(words.explode()) - {""}):
        for label, called in enumerate(("intact", "fractured")):
            shows = np.array([part in its for its in words])
            yield f"{called}, of {part}", shows & (images["label"] == label)


def note_of(chosen: pd.DataFrame, cohort: RadiographCohort, split: str) -> str:
    """What `sources.json` says of the sample."""
    kinds = ", ".join(f"{count} {kind}" for kind, count in chosen["kind"].value_counts(sort=False).items())
    longest = int(cohort.images[["height", "width"]].to_numpy().max())
    return (
        f"{len(chosen)} of {len(cohort.images):,} images of {cohort.folder.name}, all of its {split} split, "
        f"one per patient (group). Chosen by rule ({kinds}; spread over the predicted probability; every "
        "part, hardware, several views, one turned by its EXIF), to look at: shares in it say nothing about "
        f"the run. Changes: images over {longest} pixels reduced to that length, all saved as JPEG again."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--run", default="fracatlas", help="folder of checkpoints/")
    parser.add_argument("--cohort", default="fracatlas", help="folder of data/, the whole cohort")
    parser.add_argument("--sample", default="fracatlas_sample", help="folder of data/ that is made")
    parser.add_argument("--replace", action="store_true", help="replace what an earlier call wrote")
    options = parser.parse_args()
    if options.sample == options.cohort:
        parser.error("the sample is another folder than the cohort")
    run, sample = paths.run_dir(options.run), paths.cohort_dir(options.sample)
    cohort = read_radiograph_cohort(paths.cohort_dir(options.cohort))
    threshold, source = image_threshold(Predictor.of(run))
    measured = measure(run, cohort)
    chosen = choose(
        measured["test"], is_turned(cohort, measured["test"].images["image"]), threshold=threshold
    )
    for split, cases in measured.items():
        cases.write(run / MEASURED / split, replace=options.replace)
    write_table(groups_of(cohort), run / MEASURED / "groups.csv", sealed=True)
    if options.replace:
        shutil.rmtree(sample, ignore_errors=True)
    copy_images(cohort.folder, set(chosen["image"]), sample, note=note_of(chosen, cohort, "test"))
    columns = ["image", "kind", "probability", "label", "part", "hardware", "multiscan", "turned"]
    print(chosen[columns].to_string(index=False))
    print(f"Threshold {threshold:.4f} ({source}). {len(chosen)} images in {sample}.")


if __name__ == "__main__":
    main()
