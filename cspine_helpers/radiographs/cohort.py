"""A cohort of radiographs: its image table with each image's split, read together and checked."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from cspine_helpers.files.paths import listing, sha256_of
from cspine_helpers.files.records import parse_json
from cspine_helpers.labels import SPLITS, UID
from cspine_helpers.radiographs.sources import ANNOTATIONS, IMAGES, read_images, read_sources
from cspine_helpers.splits import read_split, split_hash, split_settings

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
