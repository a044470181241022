"""The model card of radiographs: what a general card cannot know of them.

Masks and lesions, subgroups, studies of several views, and what metal or size alone would explain need the
cohort, or what was measured of it, and are left out where neither is at hand; how class, mask and members are
blended needs `blend.json`.
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pandas as pd

from cspine_helpers.labels import UID
from cspine_helpers.model_card.card import write_card
from cspine_helpers.model_card.results import TITLES, UNKNOWN, RunFiles, cell, markdown, number, share
from cspine_helpers.radiographs.blend import BLEND, SCORES, read_blend
from cspine_helpers.radiographs.cohort import (
    SPLIT,
    RadiographCohort,
    is_radiographs,
    read_radiograph_cohort,
)
from cspine_helpers.radiographs.evaluation import (
    FEW,
    How,
    evaluate,
    shortcut,
    study_metrics,
    study_scores,
    subgroups,
)
from cspine_helpers.radiographs.image_table import read_regions
from cspine_helpers.radiographs.mask_cases import (
    FRAME,
    SUBGROUPS,
    MaskCases,
    judged_images,
)
from cspine_helpers.radiographs.masks import MASKS, read_masks
from cspine_helpers.runs import member_folders, read_record, recorded_cohort

RESAMPLES = 1000
_SAME = ("labels_sha256", "annotations_sha256", "split_sha256")
_PERMISSIVE = "Apache-2.0 by its LICENSE"  # of the weight packages that this project knows
_TITLES = {
    "dice_pos": "Dice of fractured images, in their own pixels (dice_pos)",
    "dice_pos_frame": f"the same, stretched to {FRAME[0]} × {FRAME[1]} pixels as a public benchmark has it",
    "pixel_precision": "pixel precision, pooled",
    "pixel_recall": "pixel recall, pooled",
    "lesion_recall": "lesions hit",
    "false_marks": "false marks per image",
    "missed_whole": "fractured images that the mask misses entirely",
    "intact_marked": "intact images with a mark",
}
_REPORTED = """Parts of the body, views, images with metal or of several exposures, and sizes of the image are
reported below. Age, sex, device and hospital are not known of these images, so their influence must be
studied before any use on patients. A missed fracture and a false alarm do different harm, so both are
counted, and no single score replaces them."""
MEASURED = "measured"  # in a run's folder: what `MaskCases.write` keeps of each split
_NOT_OUTLINED = "Nobody outlined anything in these images, so nothing is said of the masks."
_UNSEARCHED = "A probability is that of the presence head; the mask has no part in it."
_ON_TEST = ("ablation.csv", "leakage.csv", f"{MEASURED}/maps.csv")  # comparisons, in a run's folder
_SIGNS = ("hardware", "size")  # that may tell the label without the fracture
_STUDY_TITLES = TITLES | {"kappa": "Cohen's kappa"}
_OF_SUBGROUPS = {"auroc": "AUROC", "recall": "recall", "specificity": "specificity", "dice_pos": "dice_pos"}


def write_radiograph_card(run_folder: str | Path) -> Path:
    """Write `<run>/MODEL_CARD.md` of a run, or an ensemble, of radiographs; returns its path.

    As `model_card.write_card`, with what is added here; results on test only once it was opened.

    Raises:
        FileNotFoundError: there is neither a run nor an ensemble, or a member is missing.
        ValueError: a file is damaged, or belongs to another run than those beside it; names it.
        OSError: the card cannot be written.

    Example:
        >>> write_radiograph_card("nobody")
        Traceback (most recent call last):
        ...
        FileNotFoundError: No run at nobody: run.json is missing...
    """
    folder = Path(run_folder)
    records = [read_record(member) for member in member_folders(folder)]
    cohort, why = _cohort(records[0])

    def more(run: RunFiles) -> dict[str, str]:
        """Place in the card → Markdown."""
        added = {
            "sources": "\n".join(_sources(records[0])),
            "model": "\n\n".join([*_weights(records), *_blend(folder)]),
        }
        if cohort is None and not (folder / MEASURED).is_dir():
            return added | {"subgroups": f"No subgroup is reported, and nothing of the masks: {why}."}
        added["subgroups"] = _REPORTED
        if cohort and (folder / MASKS).is_file() and not any(read_regions(cohort.folder).values()):
            added["subgroups"] += f"\n\n{_NOT_OUTLINED}"
        limits = [*_compared(folder)] if run.opened else []
        for split in run.splits:
            if split == "test" and not run.opened:
                continue
            cases = _cases(run, cohort, folder, split) if cohort else _measured(run, folder, split)
            signs = _shortcuts(cases)
            added[split] = _results(cases, _threshold(run), signs)
            limits += _told(signs, split)
        return added | {"limits": "\n".join(limits)}

    return write_card(folder, more=more)


def _cohort(record: Mapping[str, Any]) -> tuple[RadiographCohort | None, str]:
    """The cohort of the training, where it is as it was; else why not."""
    folder = recorded_cohort(record["data"])
    if folder is None or not is_radiographs(folder) or not (folder / SPLIT).is_file():
        return None, f"the cohort `{cell(record['data'].get('cohort', UNKNOWN))}` was not at hand"
    cohort = read_radiograph_cohort(folder)
    found, wanted = cohort.fingerprint(), record["data"]
    if any(found[name] != wanted.get(name) for name in _SAME):
        return None, f"the cohort `{cell(folder.name)}` is not as it was in training"
    return cohort, ""


def _sources(record: Mapping[str, Any]) -> Iterable[str]:
    """Where the images are from, under which licence, and how to cite them."""
    for source in record.get("cohort", {}).get("sources") or []:
        licence, citation = (source.get(key) or f"{key} not on record" for key in ("licence", "citation"))
        yield f"Its images are those of {cell(source['name'])} ({cell(licence)}): {cell(citation)}"


def _weights(records: Iterable[Mapping[str, Any]]) -> Iterable[str]:
    """Under which licence the weights are, and those that they began with."""
    begun = {}
    for record in records:
        if of := record.get("pretrained"):
            begun[of.get("sha256")] = of
    text = "The weights are under the licence of this project, Apache-2.0."
    for of in begun.values():
        is_package = of.get("source") == "package"
        licence = _PERMISSIVE if is_package else "of a licence that is to be looked up at their source"
        named = " ".join(str(of[key]) for key in ("name", "version") if of.get(key))
        text += f" They began with {cell(named)} ({cell(of.get('source', UNKNOWN))}), {licence}."
    yield text


def _blend(folder: Path) -> Iterable[str]:
    """How outputs become a probability and a mask, and what choosing that was worth."""
    if not (folder / BLEND).is_file():
        yield _UNSEARCHED
        return
    frozen = read_blend(folder)
    blend, on = frozen.blend, frozen.record["chosen_on"]
    weights = ", ".join(
        f"{cell(member['run'])} {number(weight)}"
        for member, weight in zip(frozen.record["members"], blend.weights, strict=True)
    )
    share_of_mask = number(1 - blend.class_share)
    yield (
        f"A probability is {number(blend.class_share)} of the class and {share_of_mask} of the mean of the "
        f"mask's {blend.top_cells} highest cells; a pixel is marked from {number(blend.mask_threshold)} on, "
        f"and marked regions of fewer than {blend.smallest_region} pixels of the network's frame are "
        f"dropped. Weights of the members: {weights}. Views of each image: {', '.join(frozen.views)}. All of "
        f"this was chosen on {on['images']:,} images of validation ({on['groups']:,} groups) and frozen in "
        "`blend.json`; out of fold, each group is judged by what was chosen on the others:"
    )
    rows = [
        [row["blend"], *("—" if row[name] is None else number(row[name]) for name in SCORES)]
        for row in frozen.record["scores"]
    ]
    yield markdown(["blend", "AUROC", "average precision", "dice_pos at the network's frame"], rows)


def _threshold(run: RunFiles) -> float | None:
    decision = run.decisions.get("image")
    return None if decision is None else decision.threshold


def _cases(run: RunFiles, cohort: RadiographCohort, folder: Path, split: str) -> MaskCases:
    """The images of a split with their true and predicted masks, where some were predicted."""
    rows = judged_images(run.splits[split], cohort.images, split=split)
    if not (folder / MASKS).is_file():
        return MaskCases.of(rows, truth={})
    if not any((truth := read_regions(cohort.folder)).values()):
        return MaskCases.of(rows, truth={})  # as of MURA: nobody outlined anything
    return MaskCases.of(rows, truth=truth, predicted=read_masks(folder))


def _measured(run: RunFiles, folder: Path, split: str) -> MaskCases:
    """The same as it was once measured and kept beside the run, without the cohort.

    Raises:
        ValueError: it was measured of other predictions.
    """
    cases = MaskCases.read(folder / MEASURED / split)
    kept = dict(zip(cases.images["image"], cases.images["probability"], strict=True))
    said = dict(zip(run.splits[split][UID], run.splits[split]["probability"], strict=True))
    if kept != said:
        raise ValueError(
            f"{folder / MEASURED / split} was measured of other predictions than those beside it. Measure "
            "them again (MaskCases.write), or move it away."
        )
    return cases


def _results(cases: MaskCases, threshold: float | None, signs: Sequence[pd.DataFrame]) -> str:
    """The results of a split that need the cohort, as Markdown."""
    parts = []
    options: dict[str, Any] = {"threshold": threshold, "resamples": RESAMPLES}
    if cases.has_masks:
        found = evaluate(cases, keep_undefined=True, **options)
        rows = [
            [_TITLES[str(row.metric)], _estimate(row), f"{row.n:,} {row.of}", f"{row.groups:,}"]
            for row in found.itertuples()
            if str(row.metric) in _TITLES
        ]
        parts += [
            "### Masks and lesions",
            f"A mark hits a lesion where {cases.rule}. Groups are resampled.",
            markdown(["mask", "value (95 % interval)", "of", "groups"], rows),
        ]
    by = [name for name in SUBGROUPS if name in cases.images.columns]
    if by and len(cases.population) > 1:
        table = subgroups(cases, by=by, **options)
        parts += [
            "### Subgroups",
            f"There is no interval where fewer than {FEW} groups bear what the number is about: of either "
            "class for the AUROC, fractured for recall and Dice, intact for specificity. An image of several "
            "views counts in each.",
            markdown(["subgroup", "images", "fractured", *_OF_SUBGROUPS.values()], _of_subgroups(table)),
        ]
    rows = [
        [str(row.sign), str(row.what), _estimate(row), f"{row.images:,}", f"{row.fractured:,}"]
        for found in signs
        for row in found.itertuples()
    ]
    if rows:
        parts += [
            "### Shortcuts",
            "AUROC of all images, of those without a sign that is no fracture, and of the sign alone, in "
            "place of the model.",
            markdown(["sign", "AUROC of", "value (95 % interval)", "images", "fractured"], rows),
        ]
    return "\n\n".join([*parts, *_studies(cases, threshold)])


def _shortcuts(cases: MaskCases) -> list[pd.DataFrame]:
    """What each sign that the images bear could explain."""
    found = []
    for sign in _SIGNS:
        with suppress(ValueError):  # not stated, or on all images or none: there is no shortcut to measure
            found.append(shortcut(cases, by=sign, resamples=RESAMPLES))
    return found


def _studies(cases: MaskCases, threshold: float | None) -> Iterable[str]:
    """Studies of several views, as of MURA: what they reach by the mean and the highest of their views."""
    table = cases.images
    if threshold is None or "study" not in table or not table["study"].duplicated().any():
        return
    if min(table["label"].nunique(), table["patient"].nunique()) < 2:
        return
    rows = [
        [how, _STUDY_TITLES[str(row.metric)], _estimate(row), f"{row.n:,}"]
        for how in get_args(How)
        for row in study_metrics(
            study_scores(table, how), threshold=threshold, resamples=RESAMPLES
        ).itertuples()
    ]
    yield "### Studies"
    yield "A study's probability is the mean, or the highest, of its views'; patients are resampled."
    yield markdown(["views", "metric", "value (95 % interval)", "studies"], rows)


def _of_subgroups(table: pd.DataFrame) -> Iterable[list[str]]:
    for (_, name), part in table.groupby(["by", "subgroup"], sort=False):
        found = {row.metric: row for row in part.itertuples()}
        images, fractured = part["images"].iloc[0], part["fractured"].iloc[0]
        cells = [_estimate(found[metric]) if metric in found else "—" for metric in _OF_SUBGROUPS]
        yield [str(name), f"{images:,}", share(fractured, images), *cells]


def _estimate(row: Any) -> str:
    """A value with its interval, where it has one."""
    if not np.isfinite(row.low) or not np.isfinite(row.value):
        return number(row.value)
    low, high = number(row.low), number(row.high)
    return f"{number(row.value)} ({low}{' to ' if '−' in low + high else '–'}{high})"


def _told(signs: Iterable[pd.DataFrame], split: str) -> Iterable[str]:
    """How much each sign tells of the label, as a limit."""
    for found in signs:
        whole, without = (found.set_index("what").loc[what] for what in ("all images", "without"))
        images, fractured = (whole[name] - without[name] for name in ("images", "fractured"))
        yield (
            f"- On {cell(split)}, {fractured:,} of {images:,} images {cell(whole['sign'])} are fractured, "
            f"and {without['fractured']:,} of the {without['images']:,} others: a model may call the sign in "
            "place of a fracture (see the table of shortcuts)."
        )


def _compared(folder: Path) -> Iterable[str]:
    """What was judged on the test split without an opening of it."""
    if found := [f"`{name}`" for name in _ON_TEST if (folder / name).is_file()]:
        yield (
            f"- Other settings or maps were judged on the test split, too ({', '.join(found)}): the record "
            "of openings does not count that."
        )
