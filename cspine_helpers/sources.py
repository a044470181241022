"""Where a cohort's CT, masks, labels and boxes lie, study by study."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import pandas as pd

from cspine_helpers.dicom import series_in
from cspine_helpers.labels import BOX_COLUMNS, UID, VERTEBRAE, exclusions, read_boxes, read_labels
from cspine_helpers.nifti import NIFTI
from cspine_helpers.packer import StudyFiles
from cspine_helpers.paths import cohort_remedy, listing


@dataclass(frozen=True)
class PackSource:
    """Where a cohort's CT and masks lie, and how they are read.

    Attributes:
        images: folder of studies: a folder with a DICOM series, or a NIfTI file, for each StudyInstanceUID.
        masks: folder of masks: `<uid>.nii[.gz]`, or a folder `<uid>` with one file a vertebra.
        scheme: what the masks' labels mean, see `masks.read_label_map`.
        series: StudyInstanceUID → SeriesInstanceUID, of studies that hold several series.
        exclude: studies that are left out, such as scans known to be bad.
    """

    images: Path
    masks: Path
    scheme: str | Mapping[int, str] = "rsna"
    series: Mapping[str, str] = field(default_factory=dict)
    exclude: tuple[str, ...] = ()

    @classmethod
    def of(cls, folder: Path, **others: Any) -> Self:
        """As RSNA 2022 lays them out in a cohort's folder: `train_images/` and `segmentations/`.

        Without the studies of its `exclude.txt`, where there is one.
        """
        others = {"exclude": tuple(exclusions(folder))} | others
        return cls(folder / "train_images", folder / "segmentations", **others)

    def studies(self, only: Collection[str] | None = None) -> dict[str, Path]:
        """StudyInstanceUID → its folder or file, in order: of these studies, or of all that are not left out.

        Raises:
            FileNotFoundError: there are none.
            ValueError: one is there twice, asked for and not there, or all are left out.
        """
        there = self._there()
        found = {uid: path for uid, path in there.items() if uid not in self.exclude}
        if there and not found:
            raise ValueError(
                f"All {len(there)} studies in {self.images} are left out: {listing(there)}. Shorten the list "
                "(exclude.txt in the cohort's folder, or the one of --exclude)."
            )
        if not found:
            raise FileNotFoundError(
                f"No study in {self.images}: it needs a folder with a DICOM series, or a NIfTI file, for "
                f"each StudyInstanceUID. {_remedy(self.images.parent)}"
            )
        if gone := {*(only or ())} - {*found}:
            raise ValueError(f"No CT in {self.images} of {listing(sorted(gone))}. Check the names.")
        return found if only is None else {uid: path for uid, path in found.items() if uid in only}

    def _there(self) -> dict[str, Path]:
        found: dict[str, Path] = {}
        for path in sorted(self.images.iterdir()) if self.images.is_dir() else ():
            suffix = next((s for s in NIFTI if path.name.endswith(s)), "")
            is_study = (
                path.is_dir() or suffix or path.is_symlink()
            )  # one that leads nowhere is not passed over
            if not path.name.startswith(".") and is_study:
                uid = path.name.removesuffix(suffix)
                if uid in found:
                    raise ValueError(f"{path.name} and {found[uid].name} are one study. Keep one of them.")
                found[uid] = path
        return found

    def excluded(self, folder: Path) -> tuple[list[str], list[str]]:
        """Studies of the list that are left out, and those that neither images nor label table hold."""
        known = {*self._there(), *_labelled(folder)}
        return [uid for uid in self.exclude if uid in known], [u for u in self.exclude if u not in known]


def _remedy(folder: Path) -> str:
    """What to do where a cohort has no CT; one of phantoms that has been made has none on disk."""
    if not (folder / "cohort.json").is_file():
        return cohort_remedy(folder)
    return (
        f"The phantom cohort {folder.name} has no CT on disk. Notebook 00 exports some of it to "
        f"data/{folder.name}_ct and packs them; again by `make pack COHORT={folder.name}_ct`."
    )


def study_files(source: PackSource, folder: Path) -> Iterator[StudyFiles]:
    """What each study of a cohort's folder is packed from; `mask` is the folder of masks, where it is found.

    Raises:
        FileNotFoundError: there are no studies, or no folder of masks.
        ValueError: a study is there twice, or a table breaks its schema.
    """
    studies = source.studies()
    if not source.masks.is_dir():
        raise FileNotFoundError(
            f"No folder of masks at {source.masks}. README says how to make masks, or name their folder."
        )
    labels, boxes = folder / "train.csv", folder / "train_bounding_boxes.csv"
    known = read_labels(labels).set_index(UID)[list(VERTEBRAE)].T.to_dict() if labels.is_file() else {}
    none = pd.DataFrame(columns=list(BOX_COLUMNS))
    drawn = dict(iter(read_boxes(boxes).groupby(UID))) if boxes.is_file() else {}
    for uid, path in studies.items():
        series, its = source.series.get(uid), drawn.get(uid, none)
        yield StudyFiles(uid, path, source.masks, source.scheme, series, known.get(uid), its)


def choose_series(studies: Mapping[str, Path], wanted: Collection[str]) -> dict[str, str]:
    """Study → which of the wanted series is in its folder; see `PackSource`.

    Args:
        studies: StudyInstanceUID → folder or file.
        wanted: series as `dicom.read_series` takes them; their files are looked for in all headers.

    Raises:
        ValueError: a series is nowhere, or a study holds several of them; names these.
    """
    chosen: dict[str, str] = {}
    for uid, folder in studies.items():
        try:
            found = series_in(folder) if folder.is_dir() else set()
        except (OSError, ValueError):
            continue  # packing it says why
        its = sorted(one for one in wanted if one.partition("#")[0] in found)
        if len(its) > 1:
            raise ValueError(f"Study {uid} holds {len(its)} of these series: {listing(its)}. Choose one.")
        if its:
            chosen[uid] = its[0]
    if lost := sorted({*wanted} - {*chosen.values()}):
        raise ValueError(f"Series that no study holds ({len(lost)}): {listing(lost)}. Check their UIDs.")
    return chosen


def without_ct(source: PackSource, folder: Path) -> list[str]:
    """Studies of the label table that have no CT among the images."""
    return sorted(_labelled(folder) - {*source.studies(), *source.exclude})


def _labelled(folder: Path) -> set[str]:
    table = folder / "train.csv"
    return set(read_labels(table)[UID]) if table.is_file() else set()
