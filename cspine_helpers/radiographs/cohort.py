"""A cohort of radiographs: its image table with each image's split, read together and checked."""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import pandas as pd

from cspine_helpers.files.paths import listing, sha256_of
from cspine_helpers.files.records import parse_json
from cspine_helpers.labels import SPLITS, UID
from cspine_helpers.radiographs.image_table import (
    ANNOTATIONS,
    IMAGES,
    read_images,
    read_regions,
    read_sources,
    write_cohort,
)
from cspine_helpers.splits import read_split, split_hash, split_settings, write_split

SPLIT = "split.csv"
_FILES = {"labels": IMAGES, "annotations": ANNOTATIONS}
_OF_SOURCE = ("name", "label_1", "classes", "citation", "licence")


@dataclass(frozen=True)
class RadiographCohort:
    """What training and prediction read of a cohort of radiographs.

    Attributes:
        folder: `data/<cohort>`.
        images: the image table of the images that are in a split; its `split` is that of `split.csv`, as is
            `patient` where that file has one.
        split: split table.
        unsplit: images that are in no split, such as those of conflicting labels.
    """

    folder: Path
    images: pd.DataFrame
    split: pd.DataFrame
    unsplit: tuple[str, ...] = ()

    @property
    def packed(self) -> Path:
        """Folder of the packed images."""
        return self.folder / "packed"

    def of(self, split: str) -> pd.DataFrame:
        """The rows of one split, in the order of the table, with a new index.

        Raises:
            ValueError: there are none.

        Example:
            >>> read_radiograph_cohort(radiographs).of("test")["label"].tolist()
            [0, 0, 1]
        """
        rows = self.images[self.images["split"] == split]
        if rows.empty:
            raise ValueError(
                f"No image of {self.folder} is in the split {split!r}; there are "
                f"{listing(dict.fromkeys(self.images['split']))}. Divide the images again."
            )
        return rows.reset_index(drop=True)

    def fingerprint(self) -> dict[str, Any]:
        """Name and SHA-256 of what a run was trained on, for its record."""
        hashes = {f"{name}_sha256": sha256_of(self.folder / file) for name, file in _FILES.items()}
        return {"cohort": self.folder.name, **hashes, "split_sha256": split_hash(self.split)}

    def facts(self) -> dict[str, Any]:
        """What a record says of the cohort beside its hashes; None where nobody noted it.

        Returns:
            `counts`: split → images, patients (groups), and how many of each are fractured; `unsplit`: number
            of images in no split; `split`: settings of the division; `sources`: name, classes, citation and
            licence of each; `packing`: of `packed/packing.json`, without the names of images.
        """
        path = self.packed / "packing.json"
        packing = parse_json(path.read_bytes(), str(path)) if path.is_file() else None
        return {
            "counts": {name: _counts(rows) for name, rows in self.images.groupby("split", sort=False)},
            "unsplit": len(self.unsplit),
            "split": split_settings(self.folder / SPLIT),
            "sources": [
                {name: source[name] for name in _OF_SOURCE} for source in read_sources(self.folder)["sources"]
            ],
            "packing": packing and {name: packing[name] for name in packing if name != "annotated"},
        }


def _counts(rows: pd.DataFrame) -> dict[str, int]:
    fractured = rows[rows["label"] == 1]
    return {
        "images": len(rows),
        "patients": rows["patient"].nunique(),
        "fractured": len(fractured),
        "fractured_patients": fractured["patient"].nunique(),
    }


def is_radiographs(folder: str | Path) -> bool:
    """Whether a cohort's folder holds radiographs: an image table."""
    return (Path(folder) / IMAGES).is_file()


def read_radiograph_cohort(folder: str | Path) -> RadiographCohort:
    """Read a cohort of radiographs: image table and split.

    Raises:
        FileNotFoundError: one of them is missing.
        ValueError: they break their schema, the split was changed, or names images that are not in the table.

    Example:
        >>> read_radiograph_cohort(radiographs).images["split"].value_counts().to_dict()
        {'train': 16, 'validation': 5, 'test': 3}
    """
    folder = Path(folder)
    table = read_images(folder)
    if not (folder / SPLIT).is_file():
        raise FileNotFoundError(
            f"No {SPLIT} in {folder}: nobody said which images train. Divide them with "
            "groups.split_images(...); `python -m cspine_helpers radiographs` does."
        )
    if not (folder / ANNOTATIONS).is_file():
        raise FileNotFoundError(
            f"No {ANNOTATIONS} in {folder}: nobody said where the fractures are. Bring it back, or make the "
            "cohort again: `python -m cspine_helpers radiographs` does."
        )
    split = read_split(folder / SPLIT)
    if len(unknown := split[UID][~split[UID].isin(table["image"])]):
        raise ValueError(
            f"{folder / SPLIT} divides {len(unknown)} images that {IMAGES} does not list: "
            f"{listing(unknown)}. Divide the images again."
        )
    divided = split.rename(columns={UID: "image"})
    own = [name for name in divided.columns if name != "image"]
    joined = table.drop(columns=own).merge(divided, on="image", how="left", validate="one_to_one")
    inside = joined["split"].notna()
    images = joined.loc[inside, table.columns]
    images = images.assign(split=pd.Categorical(images["split"], SPLITS).astype(str))
    unsplit = tuple(joined["image"][~inside])
    return RadiographCohort(folder, images.reset_index(drop=True), split, unsplit)


def copy_images(
    cohort_folder: str | Path, images: Collection[str], target: str | Path, *, note: str
) -> RadiographCohort:
    """A cohort of some of another's images, such as a sample that may be handed on.

    Files are copied byte for byte, their EXIF with them; outlines, split, patients, citation and licence come
    along. It is not packed.

    Args:
        cohort_folder: of the whole cohort, divided.
        images: ids.
        target: folder of the new cohort.
        note: what `sources.json` says of the choice, and of changes that a licence wants named.

    Raises:
        FileExistsError: another cohort is at `target`.
        ValueError: the cohort does not hold all the images, or none is named; its annotations are damaged.

    Example:
        >>> some = copy_images(radiographs, ["IMG0000000", "IMG0000001"], "some", note="the first two")
        >>> some.images["label"].tolist(), read_sources("some")["sources"][0]["notes"]
        ([1, 0], ['the first two'])
    """
    # 1. What is copied.
    whole, folder = read_radiograph_cohort(cohort_folder), Path(target)
    if not images:
        raise ValueError(f"No images to copy from {whole.folder} are named. Name some of its split.")
    if unknown := sorted(set(images) - set(whole.images["image"])):
        raise ValueError(
            f"{whole.folder} does not hold {len(unknown)} of the images to copy: {listing(unknown)}. Name "
            "images of its split."
        )
    table = read_images(whole.folder)
    table = table[table["image"].isin(images)].reset_index(drop=True)
    names = ["images/" + PurePosixPath(file).name for file in table["file"]]
    where = {name: str(whole.folder / file) for name, file in zip(names, table["file"], strict=True)}

    # 2. Outlines and sources of these.
    read_regions(whole.folder)  # refuses damaged ones
    coco = parse_json((whole.folder / ANNOTATIONS).read_bytes(), ANNOTATIONS)
    new = dict(zip(table["file"], names, strict=True))
    entries = [
        each | {"file_name": new[each["file_name"]]} for each in coco["images"] if each["file_name"] in new
    ]
    kept = {each["id"] for each in entries}
    outlines = [each for each in coco["annotations"] if each["image_id"] in kept]
    rows = {name: part["label"] for name, part in table.groupby("source")}
    told = [
        source | {"images": len(label), "positive": int(label.sum()), "left_out": {}, "notes": [note]}
        for source in read_sources(whole.folder)["sources"]
        if (label := rows.get(source["name"])) is not None
    ]

    # 3. Into their place, the split last.
    write_cohort(
        folder,
        table.assign(file=names),
        where,
        coco | {"images": entries, "annotations": outlines},
        {"sources": told},
        copy=True,
    )
    write_split(whole.split[whole.split[UID].isin(images)], folder / SPLIT)
    return read_radiograph_cohort(folder)
