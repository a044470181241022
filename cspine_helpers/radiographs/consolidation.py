"""Sources joined into a cohort: every image looked at, names kept apart, patients grouped."""

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from cspine_helpers.files import paths
from cspine_helpers.files.paths import listing
from cspine_helpers.radiographs.annotations import Regions
from cspine_helpers.radiographs.groups import (
    GROUP_LESS,
    GroupConfig,
    Groups,
    group_images,
    outside_published,
)
from cspine_helpers.radiographs.image_ids import file_ids
from cspine_helpers.radiographs.image_table import read_images, validate_images, write_cohort
from cspine_helpers.radiographs.images import read_radiograph, why_unusable
from cspine_helpers.radiographs.sources.source import Source, Unusable


def consolidate(
    sources: Sequence[Source],
    cohort_folder: str | Path,
    *,
    group: GroupConfig | None = None,
    published: Mapping[str, str] | None = None,
    skip_unusable: bool = False,
    copy: bool = False,
    check: Callable[[pd.DataFrame], object] | None = None,
) -> pd.DataFrame:
    """Join sources into a cohort: every image looked at, under a name of its own in one layout.

    Writes `images/`, `annotations.json`, `sources.json`, with `group` also `pairs.csv`, and, last,
    `images.csv`; or nothing, where anything is refused. A cohort that is there already is never written over.

    Args:
        sources: of different names. An id that two of them have gets the source's name before it in both.
        cohort_folder: `data/<cohort>`.
        group: what counts as one patient where none is named, see `groups.group_images`. None: identical
            pixels and copies of one original only; each other image is a patient of its own. In any case,
            images that exist with two labels are left out.
        published: splits of the sources that will stay as they are, as in `groups.split_images`; images
            outside of them, of a patient within, are refused.
        skip_unusable: leave out images that cannot be read, or are outside a published split as above.
        copy: copy the images; else `images/` holds links to where they lie.
        check: is called with the image table before anything is written; what it raises refuses the cohort.

    Returns:
        The image table, see `read_images`.

    Raises:
        ValueError: images cannot be read, or are outside a published split that has their patient, and
            `skip_unusable` is not set; names them and why. Or label 1 does not mean the same in all sources.
        FileExistsError: the folder holds another image table.

    Example:
        >>> from cspine_helpers.radiographs import read_fracatlas
        >>> source = read_fracatlas(fracatlas_folder)
        >>> consolidate([source], "bones")["label"].value_counts().tolist()
        [16, 8]
    """
    folder = Path(cohort_folder)
    names = [source.name for source in sources]
    if not sources or len(set(names)) < len(names):
        raise ValueError(
            f"A cohort is made of sources of different names; found {listing(names)}. Name them apart."
        )
    if len({source.positive for source in sources}) > 1:
        told = [f"{source.name}: {source.positive}" for source in sources]
        raise ValueError(
            f"Label 1 of these sources means different things ({listing(told, quoted=False)}). Make a "
            "cohort of each."
        )
    lock = folder.with_name(f".{folder.name}.lock")
    with paths.exclusive(lock, f"making the cohort {folder.name}"):
        # 1. Every pixel.
        sources = _apart(sources)
        table = pd.concat([source.table.assign(source=source.name) for source in sources], ignore_index=True)
        regions = {image: marks for source in sources for image, marks in source.regions.items()}
        bad = Unusable(f"The images of {listing(names, quoted=False)}")
        seen = _examined(table, bad)
        origin = table["source"] + ": " + table["original"]
        unused = bad.settle(skip=skip_unusable)
        table = table.assign(**seen)[~origin.isin(unused)].reset_index(drop=True)
        if table.empty:
            raise ValueError(
                f"No image of {listing(names, quoted=False)} can be used. Bring the files again."
            )
        groups = _grouped(table, group or GroupConfig(similarity=1, gap=0), unused)
        if published:
            groups = _within(groups, published, unused, skip=skip_unusable)
        table = groups.table
        suffix = table["path"].map(lambda path: Path(path).suffix.lower())
        table["file"] = "images/" + table["image"] + suffix
        where = dict(zip(table["file"], table["path"], strict=True))
        table = validate_images(table, f"the image table of {folder.name}")
        if check:
            check(table)

        # 2. Everything beside its place, then into it.
        annotations = _coco(table, regions)
        record = _record(sources, table, unused) | ({"groups": groups.report()} if group else {})
        write_cohort(folder, table, where, annotations, record, groups if group else None, copy=copy)
    return read_images(folder)


def _apart(sources: Sequence[Source]) -> list[Source]:
    """The sources with no id, study or patient in two of them: what is gets the source's name before it."""
    shared: dict[str, set[str]] = {}
    for column in ("image", "study", "patient", "copy_of"):
        each_has = [{name.casefold() for name in source.table[column]} for source in sources]
        often = Counter(name for names in each_has for name in names)
        shared[column] = {name for name, n in often.items() if n > 1 and name}

    def named(source: Source, column: str) -> pd.Series:
        return source.table[column].map(
            lambda each: file_ids([f"{source.name}-{each}"])[0] if each.casefold() in shared[column] else each
        )

    apart = []
    for source in sources:
        table = source.table.assign(**{column: named(source, column) for column in shared})
        ids = dict(zip(source.table["image"], table["image"], strict=True))
        regions = {ids[each]: marks for each, marks in source.regions.items() if each in ids}
        apart.append(replace(source, table=table, regions=regions))
    return apart


def _examined(table: pd.DataFrame, bad: Unusable) -> dict[str, list[Any]]:
    """Height, width and SHA-256 of each image; what cannot be read goes to `bad`."""

    def examine(path: str) -> tuple[int, int, str] | str:
        try:
            return *read_radiograph(path).shape, paths.sha256_of(path)
        except (OSError, ValueError) as error:
            return why_unusable(error)

    seen = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = pool.map(examine, table["path"])
        rows = zip(table["source"] + ": " + table["original"], found, strict=True)
        for name, result in tqdm(rows, "reading images", len(table), unit="image", mininterval=1):
            if isinstance(result, str):
                bad.add("images that cannot be read", [name], result)
            seen.append((0, 0, "") if isinstance(result, str) else result)
    heights, widths, sums = zip(*seen, strict=True)
    return {"height": [*heights], "width": [*widths], "sha256": [*sums]}


def _grouped(table: pd.DataFrame, config: GroupConfig, unused: dict[str, str]) -> Groups:
    """The table with every patient filled; what two labels contradict goes to `unused`."""
    groups = group_images(table, read_radiograph, config=config)
    origin = _origins(table)
    for row in groups.left_out.itertuples():
        unused[origin[row.image]] = (
            f"label {row.label}, and {row.why} to {origin[row.other]} with label {row.other_label}"
        )
    if groups.table.empty:
        both = listing(groups.left_out["image"].unique())
        raise ValueError(f"No image is left: all exist with two labels, {both}. Correct the labels.")
    return groups


def _within(groups: Groups, published: Mapping[str, str], unused: dict[str, str], *, skip: bool) -> Groups:
    """The groups without images outside a published split that has their patient; those go to `unused`."""
    origin = _origins(groups.table)
    bad = Unusable("The published split")
    outside = outside_published(groups.table, published, groups.pairs)
    for row in outside.itertuples():
        reason = f"images outside a published split that has their patient (to group less, {GROUP_LESS})"
        bad.add(reason, [origin[row.image]], f"{row.why} with {origin[row.other]} of {row.split}")
    unused |= bad.settle(skip=skip)
    return replace(groups, table=groups.table[~groups.table["image"].isin(outside["image"])])


def _origins(table: pd.DataFrame) -> dict[Any, str]:
    """Image → its source and name there."""
    return dict(zip(table["image"], table["source"] + ": " + table["original"], strict=True))


def _coco(table: pd.DataFrame, regions: Regions) -> dict[str, Any]:
    """Images and polygons as COCO has them, ids counted from 1; `file_name` is the table's `file`."""
    kinds = sorted({region.label for image in table["image"] for region in regions.get(image, [])})
    numbers = {kind: number for number, kind in enumerate(kinds, start=1)}
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, row in enumerate(table.itertuples(), start=1):
        images.append({"id": number, "file_name": row.file, "height": row.height, "width": row.width})
        for region in regions.get(str(row.image), []):
            points, (x, y) = region.points, region.points.T
            low, size = points.min(0), np.ptp(points, axis=0)
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": numbers[region.label],
                    "segmentation": [points.round(3).ravel().tolist()],
                    "bbox": [*low.round(3).tolist(), *size.round(3).tolist()],
                    "area": round(abs(float(x @ np.roll(y, 1) - y @ np.roll(x, 1))) / 2, 3),
                    "iscrowd": 0,
                }
            )
    categories = [{"id": number, "name": kind} for kind, number in numbers.items()]
    return {"images": images, "annotations": annotations, "categories": categories}


def _record(sources: Sequence[Source], table: pd.DataFrame, unused: Mapping[str, str]) -> dict[str, Any]:
    """`sources.json`: of each source, what came from it, what did not and why, its classes, its citation."""
    told = []
    for source in sources:
        start, rows = f"{source.name}: ", table[table["source"] == source.name]
        here = {name.removeprefix(start): why for name, why in unused.items() if name.startswith(start)}
        told.append(
            {
                "name": source.name,
                "images": len(rows),
                "positive": int(rows["label"].sum()),
                "label_1": source.positive,
                "classes": source.classes,
                "left_out": source.left_out | here,
                "notes": source.notes,
                "citation": source.citation,
                "licence": source.licence,
            }
        )
    return {"sources": told}
