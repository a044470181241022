"""The files of a cohort of radiographs: written whole, read, checked.

`images/`, `images.csv` (the image table), `annotations.json` (COCO), `sources.json`; and
where images were grouped, `pairs.csv`.
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pandas as pd

from cspine_helpers.files.paths import atomic_path, listing
from cspine_helpers.files.records import read_sealed, write_sealed
from cspine_helpers.files.tables import Column, checked, read_columns, write_table
from cspine_helpers.radiographs.annotations import parse_coco
from cspine_helpers.radiographs.groups import Groups

IMAGES, ANNOTATIONS, SOURCES, PAIRS = "images.csv", "annotations.json", "sources.json", "pairs.csv"
IMAGE_COLUMNS = (
    Column("image", "id"),
    Column("source"),
    Column("file"),
    Column("sha256", pattern="[0-9a-f]{64}"),
    Column("study"),
    Column("patient"),
    Column("part", empty=True),
    Column("view", empty=True),
    Column("hardware", "whole", among=(0, 1), empty=True),
    Column("multiscan", "whole", among=(0, 1), empty=True),
    Column("label", "whole", among=(0, 1)),
    Column("split", empty=True),
    Column("height", "whole", low=1),
    Column("width", "whole", low=1),
    Column("original"),
)
_TEXT = [column.name for column in IMAGE_COLUMNS if column.kind in ("id", "text")]
_WORDS = ("part", "view", "split")  # empty where nothing is known
_PARTS = ("images", ANNOTATIONS, SOURCES, PAIRS)  # of a cohort, beside its image table
_UNFINISHED = ".unfinished"  # where a cohort is written before it is moved into its folder
_FORMAT = 1
_REMEDY = "`python -m cspine_helpers radiographs --help` says how such a cohort is made."


def write_cohort(
    folder: Path,
    table: pd.DataFrame,
    where: Mapping[str, str],
    annotations: Mapping[str, Any],
    record: Mapping[str, Any],
    groups: Groups | None = None,
    *,
    copy: bool,
) -> None:
    """Write a cohort, the image table last: a folder with one is whole. Links to nowhere are mended.

    All is written beside its place first and then moved there: a full disk leaves nothing behind, and the
    same call completes what a killed process had only begun to move.

    Args:
        folder: `data/<cohort>`.
        table: image table.
        where: `file` of the table → where the image is.
        annotations: COCO.
        record: of `sources.json`, but its format.
        groups: whose pairs are written, too.
        copy: copy the images, byte for byte; else link them.

    Raises:
        FileExistsError: the folder holds another image table, or part of a cohort.
        OSError: it cannot be written, for instance to a full disk.
    """
    # 1. What is there.
    staging = folder / _UNFINISHED
    if (folder / IMAGES).exists():
        if not _stored(folder).equals(table):
            raise FileExistsError(
                f"{folder / IMAGES} is kept as it is: another image table is there already. Move it aside, "
                "or make this cohort under another name."
            )
        for link, source in ((folder / name, source) for name, source in where.items()):
            if link.is_symlink() and not link.exists():  # the images have moved
                link.unlink()
                link.symlink_to(source)
        shutil.rmtree(staging, ignore_errors=True)  # of a process that was killed when all was moved
        return
    is_begun = _is_written(staging, table)  # by a process that was killed while it moved the files
    moved = {name for name in _PARTS if is_begun and not (staging / name).exists()}
    held = [name for name in (*_PARTS, "train.csv", "train_images") if (folder / name).exists()]
    if found := [name for name in held if name not in moved]:
        raise FileExistsError(
            f"{folder} holds {listing(found)}, of no whole cohort of radiographs. Move that aside, or make "
            "this cohort under another name."
        )

    # 2. Everything beside its place.
    if not is_begun:
        shutil.rmtree(staging, ignore_errors=True)  # of a process that was killed while it wrote
        try:
            (staging / "images").mkdir(parents=True)
            for name, source in where.items():
                target = staging / "images" / PurePosixPath(name).name
                if copy:
                    shutil.copyfile(source, target)
                else:
                    target.symlink_to(source)
            with atomic_path(staging / ANNOTATIONS) as file:
                file.write_text(json.dumps(annotations, ensure_ascii=False), encoding="utf-8")
            write_sealed(staging / SOURCES, {"format": _FORMAT, **record})
            if groups:
                write_table(groups.pairs, staging / PAIRS)
            write_table(table, staging / IMAGES)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise

    # 3. Into it.
    for name in (*_PARTS, IMAGES):
        if (staging / name).exists():
            (staging / name).replace(folder / name)
    shutil.rmtree(staging, ignore_errors=True)


def _is_written(staging: Path, table: pd.DataFrame) -> bool:
    """Whether a folder holds a whole cohort of this image table, but for what was moved out of it."""
    try:
        return _stored(staging).equals(table)
    except (FileNotFoundError, ValueError):
        return False


def validate_images(table: pd.DataFrame, what: str) -> pd.DataFrame:
    """The image table with its columns and types, sorted by image; missing words are empty.

    Args:
        table: as it was read or made.
        what: it is, for messages.

    Raises:
        ValueError: it breaks a rule; names the first ten offenders of each.
    """
    table = table.assign(
        **{column: table[column].replace("", np.nan) for column in _WORDS if column in table}
    )
    found = checked(table, IMAGE_COLUMNS, what=what, key=("image",), rules=_rules)
    words = {column: found[column].fillna("") for column in _WORDS}
    return found.assign(**words).sort_values("image", kind="stable", ignore_index=True)


def _rules(table: pd.DataFrame) -> Iterator[tuple[str, pd.Series]]:
    """Rules about several rows of an image table."""
    folded = table["image"].str.casefold()
    yield "images whose names differ in capitals only", folded.duplicated(keep=False)
    by_study = table.groupby("study")
    for column in ("label", "patient"):
        yield f"studies with two {column}s", by_study[column].transform("nunique") > 1


def read_images(cohort_folder: str | Path) -> pd.DataFrame:
    """The image table of a cohort of radiographs, one row an image, sorted by it.

    Returns:
        `image` (id), `source`, `file` (below the cohort's folder, or absolute), `sha256`, `study`, `patient`
        (who is resampled), `part`, `view`, `hardware`, `multiscan`, `label`, `split` (the published one),
        `height` and `width` (displayed, pixels), `original` (path in the source). Words are empty and flags
        missing where nothing is known.

    Raises:
        FileNotFoundError: there is no such table, or images that it names are gone.
        ValueError: it breaks a rule; names the first ten offenders of each.

    Example:
        >>> read_images(radiographs)["view"].unique().tolist()
        ['frontal', 'lateral', 'oblique', 'frontal+lateral']
    """
    folder = Path(cohort_folder)
    table = _stored(folder)
    if gone := [each for each in table["file"] if not (folder / each).exists()]:
        raise FileNotFoundError(
            f"Images of {folder / IMAGES} are not where it says ({len(gone)}): {listing(gone)}. Bring them "
            "back, or make the cohort again from where they are now."
        )
    return table


def _stored(folder: Path) -> pd.DataFrame:
    """The image table, wherever its images are."""
    found = read_columns(folder / IMAGES, what="image table", source=_REMEDY, text=_TEXT)
    return validate_images(found, f"{folder / IMAGES}")


def read_regions(cohort_folder: str | Path) -> dict[str, list[np.ndarray]]:
    """Image id → its marked fractures, each `(N, 2)`: x and y of the corners, pixels of the displayed image.

    Every image of the table has an entry, an empty list where nothing is marked: an intact image, or one of a
    source that marks nothing.

    Raises:
        FileNotFoundError: there are no annotations.
        ValueError: they are damaged, or not those of the image table: all that `parse_coco` refuses, and
            images that they do not name. Names them all.

    Example:
        >>> regions = read_regions(radiographs)
        >>> sum(len(marked) for marked in regions.values())
        9
    """
    folder = Path(cohort_folder)
    path, table = folder / ANNOTATIONS, read_images(folder)
    if not path.is_file():
        raise FileNotFoundError(f"No annotations at {path}. {_REMEDY}")
    sizes = zip(table["height"].tolist(), table["width"].tolist(), strict=True)
    try:
        found = parse_coco(path, dict(zip(table["file"], sizes, strict=True)))
    except ValueError as error:
        raise ValueError(f"{folder}: {error} {_REMEDY}") from None
    if missing := [file for file in table["file"] if file not in found]:
        raise ValueError(
            f"{path} does not name {len(missing)} of the images of {IMAGES}: {listing(missing)}. {_REMEDY}"
        )
    return {
        image: [region.points for region in found[file]]
        for image, file in zip(table["image"], table["file"], strict=True)
    }


def read_sources(cohort_folder: str | Path) -> dict[str, Any]:
    """What `sources.json` says of each source: classes, what was left out and why, citation, licence.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is not as it was written.

    Example:
        >>> [(source["name"], source["licence"]) for source in read_sources(radiographs)["sources"]]
        [('fracatlas', 'CC BY 4.0')]
    """
    path = Path(cohort_folder) / SOURCES
    return read_sealed(
        path,
        version=_FORMAT,
        missing=f"No {SOURCES} at {path}. {_REMEDY}",
        again="make the cohort again",
        writer="consolidate",
    )


def read_pairs(cohort_folder: str | Path) -> pd.DataFrame:
    """Images that were taken for one patient's: image, other, why, similarity, see `groups.Groups`.

    Raises:
        FileNotFoundError: the cohort was made without grouping.
        ValueError: the table lacks columns.
    """
    columns = ["image", "other", "why", "similarity"]
    path = Path(cohort_folder) / PAIRS
    return read_columns(path, columns, what="table of pairs", source=_REMEDY, text=columns[:3])
