"""A few small CT as RSNA 2022 lays them out: phantoms without what is around the spine, every other voxel."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd

from cspine_helpers import labels
from cspine_helpers.labels import UID, VERTEBRAE
from cspine_helpers.packed import PackedVertebra
from cspine_helpers.packing.crop import PackConfig, pack_vertebra
from cspine_helpers.phantom import cohort as phantom
from cspine_helpers.phantom import scanner as export
from cspine_helpers.phantom.rendering import Study, render_study, study_uid

CONFIG = PackConfig(slices=5, size=32)
BROKEN: tuple[tuple[str, ...], ...] = (("C2", "C5"), (), ("C6",))  # fractured vertebrae by study
SEED = 24
_AROUND, _STEP = 6, 2  # voxels


@cache
def scanned(index: int) -> Study:
    """One of the phantoms, in whole Hounsfield units as DICOM stores them."""
    study = render_study(SEED, index, {vertebra: int(vertebra in BROKEN[index]) for vertebra in VERTEBRAE})
    found = np.argwhere(study.label_map)
    low = np.maximum(found.min(axis=0) - _AROUND, 0)
    crop = tuple(slice(a, b, _STEP) for a, b in zip(low, found.max(axis=0) + _AROUND + 1, strict=True))
    z, y, x = (_STEP * length for length in study.spacing_mm)
    arrays = {name: getattr(study, name)[crop].copy() for name in ("label_map", "fracture_map")}
    hu = np.rint(study.volume_hu[crop]).astype(np.int16)
    hu.flags.writeable = arrays["label_map"].flags.writeable = False
    return replace(study, volume_hu=hu, spacing_mm=(z, y, x), **arrays)


def uids() -> list[str]:
    return [study_uid(SEED, index) for index in range(len(BROKEN))]


class Scanned(Mapping[str, Study]):
    """StudyInstanceUID → phantom, rendered when it is asked for: tests are collected without."""

    def __getitem__(self, uid: str) -> Study:
        return scanned(uids().index(uid))

    def __iter__(self) -> Iterator[str]:
        return iter(uids())

    def __len__(self) -> int:
        return len(BROKEN)


def write_study(folder: Path, study: Study) -> None:
    """Its series and its mask, below a cohort's folder."""
    series = folder / export.IMAGES / study.uid
    export.write_series(series, study.volume_hu, study.spacing_mm, study_uid=study.uid)
    mask = folder / export.SEGMENTATIONS / f"{study.uid}.nii.gz"
    export.write_label_map(mask, study.label_map, study.spacing_mm)


def write_cohort(folder: Path) -> Path:
    """All of them, with labels and boxes; InstanceNumber counts from 1."""
    studies = [scanned(index) for index in range(len(BROKEN))]
    for study in studies:
        write_study(folder, study)
    table = pd.DataFrame([study.labels for study in studies])
    table.insert(0, labels.PATIENT, table.max(axis=1))
    table.insert(0, UID, [study.uid for study in studies])
    labels.write_labels(table, folder / export.LABELS)
    boxes = pd.DataFrame([box for study in studies for box in phantom.fracture_boxes(study)])
    boxes["slice_number"] += 1
    labels.write_boxes(boxes, folder / export.BOXES)
    return folder


def in_memory(study: Study, config: PackConfig = CONFIG) -> dict[str, PackedVertebra]:
    """What packing is to make of it, without files."""
    arrays = (study.volume_hu, study.label_map, study.spacing_mm)
    return {vertebra: pack_vertebra(*arrays, vertebra, config) for vertebra in VERTEBRAE}


def contents(folder: Path) -> dict[str, bytes]:
    """The bytes of each file below a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
