"""One CT study, from its files to its packed sequences and the record that lets them stay.

The record, `packed/studies/<StudyInstanceUID>.json`, is written after the sequences. Its key is the SHA-256
of all that they depend on: the CT's files, the mask, labels, boxes, options and `PACKING_VERSION`. While that
is the same, and the sequences are as they were written, the study is not packed again.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from cspine_helpers.ct.masks import OFF_BONE, WHOSE_MASK, Mask, find_vertebrae, place, read_mask
from cspine_helpers.ct.nifti import NIFTI
from cspine_helpers.ct.reading import read_ct
from cspine_helpers.ct.volume import Volume
from cspine_helpers.figures.scans import contact_sheet
from cspine_helpers.figures.style import write_figure
from cspine_helpers.files import paths
from cspine_helpers.files.records import read_sealed, write_sealed
from cspine_helpers.labels import BOX_COLUMNS, VERTEBRAE
from cspine_helpers.packed import PROVENANCE_COLUMNS, Crop, PackedVertebra, write_manifest, write_sequence
from cspine_helpers.packing.crop import PackConfig, manifest_row, pack_vertebra
from cspine_helpers.packing.slice_truth import packed_truth

FORMAT = 1
ASIDE = "aside"
_ROUNDING = 1e-3  # mm, or of a direction, by which the same headers may be read otherwise
PACKING_VERSION = 1  # raised by hand when the same study would be packed to other arrays


@dataclass(frozen=True)
class StudyFiles:
    """What one study is packed from.

    Attributes:
        uid: StudyInstanceUID.
        ct: folder of a DICOM series, or a NIfTI file.
        mask: see `masks.read_label_map`, as for `scheme`.
        series: SeriesInstanceUID, where the folder holds several.
        fractured: vertebra → 0 or 1; None: unknown.
        boxes: its fracture boxes, `labels.BOX_COLUMNS`.
    """

    uid: str
    ct: Path
    mask: Path
    scheme: str | Mapping[int, str]
    series: str | None
    fractured: Mapping[str, int] | None
    boxes: pd.DataFrame


def pack_study(
    study: StudyFiles, packed: Path, config: PackConfig, *, sheet: Path | None = None
) -> dict[str, Any]:
    """Pack a study, unless that is done.

    Args:
        study: what from.
        packed: the cohort's `packed` folder.
        config: how vertebrae are cut out.
        sheet: PNG file for its contact sheet; None draws none.

    Returns:
        Its record: `rows` of the manifest, packed `boxes`, `files` with their SHA-256, `problems` (vertebra →
        why it is not packed), `notes` on the study, and `grid` and `crops`, which lead back to the CT.

    Raises:
        ValueError, OSError: it cannot be packed; says why.
    """
    paths.check_uids([study.uid])
    done = read_study(packed, study.uid)
    beside = ThreadPoolExecutor(2)  # hashes and the mask, while the CT is decoded: that leaves Python free
    try:
        hashes = beside.submit(_hashes, study)
        is_same = done and done["key"] == _key(study, config, hashes.result()) and is_unchanged(done, packed)
        if is_same and (sheet is None or sheet.is_file()):
            return done
        forget(packed, study.uid)
        mask = beside.submit(read_mask, study.mask, study.scheme)
        content = _pack(study, packed, config, sheet, hashes, mask)
    finally:
        beside.shutdown(cancel_futures=True)
    record = {"format": FORMAT, "key": _key(study, config, hashes.result())} | content
    path = write_sealed(record_path(packed, study.uid), record)
    return json.loads(path.read_text(encoding="utf-8"))


def pack_one(
    ct: Path,
    mask: Path,
    packed: Path,
    config: PackConfig,
    *,
    scheme: str | Mapping[int, str] = "rsna",
    series: str | None = None,
) -> dict[str, Any]:
    """Pack one CT that belongs to no cohort: its sequences and their manifest.

    Args:
        ct: folder of a DICOM series, or a NIfTI file; its name is the study's.
        mask: its mask: a NIfTI file, or a folder with one a vertebra.
        packed: where they go.
        config: how vertebrae are cut out.
        scheme: what the mask's labels mean, see `masks.read_label_map`.
        series: SeriesInstanceUID, where the folder holds several.

    Returns:
        Its record, as of `pack_study`; `uid` is its name.

    Raises:
        FileNotFoundError: CT or mask are not there.
        ValueError, OSError: it cannot be packed, or the mask looks like that of another CT; says why.
    """
    ct, mask = Path(ct).resolve(), Path(mask)
    uid = next((ct.name.removesuffix(end) for end in NIFTI if ct.name.endswith(end)), ct.name)
    for path, what in ((ct, "CT"), (mask, "mask")):
        if not path.exists():
            raise FileNotFoundError(f"No {what} at {path}. Name its file or folder.")
    none = pd.DataFrame(columns=list(BOX_COLUMNS))
    record = pack_study(StudyFiles(uid, ct, mask, scheme, series, None, none), packed, config)
    try:
        _check_whose(record, mask)
    except ValueError:
        forget(packed, uid)
        raise
    write_manifest(pd.DataFrame(record["rows"]), packed)
    return record


def _check_whose(record: Mapping[str, Any], mask: Path) -> None:
    """Refuse a mask of which several vertebrae, or all, hold little bone: it is of another CT.

    One alone may be odd in a good mask; a cohort's study is then packed with a warning.

    Raises:
        ValueError: they do; names them.
    """
    warned = {row["vertebra"] for row in record["rows"] if WHOSE_MASK in row["warnings"]}
    off = {level for level, why in record["problems"].items() if why.startswith(OFF_BONE)}
    doubtful = [level for level in VERTEBRAE if level in warned | off]
    if len(doubtful) > 1 or len(warned) == len(record["rows"]):
        raise ValueError(
            f"{mask.name} does not look like this CT's mask: too little bone lies in {', '.join(doubtful)}. "
            "Name the mask of this CT."
        )


def read_study(packed: Path, uid: str) -> dict[str, Any]:
    """The record of a packed study; {} where there is none that is whole, as after a stop."""
    try:
        return read_sealed(
            record_path(packed, uid),
            version=FORMAT,
            missing="",
            again="pack again",
            writer="packing.study.pack_study",
        )
    except (FileNotFoundError, ValueError):
        return {}


Located = tuple[Volume, Mapping[str, Crop | PackedVertebra]]  # a CT, and where in it each sequence was cut


def locate(
    folder: Path,
    uid: str,
    *,
    render: Callable[[Path, str], Located] | None = None,
    series: str | None = None,
) -> Located:
    """The CT of a packed study, and where in it each sequence was cut: the way from a slice to the patient.

    Args:
        folder: `data/<cohort>`.
        uid: StudyInstanceUID.
        render: what makes the CT of a phantom again, `phantom.locate_phantom`: such a cohort keeps none.
        series: SeriesInstanceUID, where the study's folder holds several.

    Raises:
        FileNotFoundError: there is no CT of that study.
        ValueError: it cannot be read, or the study was packed from another one; says why.

    Example:
        >>> locate(Path("mine"), "1.2.3")
        Traceback (most recent call last):
        ...
        FileNotFoundError: No CT of 1.2.3 in mine/train_images. ...
    """
    paths.check_uids([uid])
    images = folder / "train_images"
    found = [images / f"{uid}{end}" for end in ("", *NIFTI) if (images / f"{uid}{end}").exists()]
    if not found and render is not None and (folder / "cohort.json").is_file():
        return render(folder, uid)
    if not found:
        raise FileNotFoundError(f"No CT of {uid} in {images}. {paths.cohort_remedy(folder)}")
    volume = read_ct(found[0], series=series)
    return volume, crops_in(volume, read_study(folder / "packed", uid))


def crops_in(volume: Volume, record: Mapping[str, Any]) -> dict[str, Crop]:
    """Vertebra → where in a CT its sequence was cut, by the study's record.

    Args:
        volume: the CT as it is read now.
        record: of `read_study`.

    Raises:
        ValueError: the record does not say where, or the study was packed from a CT on another grid.
    """
    if not (record.get("crops") and record.get("grid")):
        raise ValueError(
            "Nothing says where in the CT the study's sequences were cut. Pack it again from its CT."
        )
    names = ("spacing_mm", "origin_mm", "direction")
    apart = {name: np.abs(np.subtract(record["grid"][name], getattr(volume, name))).max() for name in names}
    if off := [name for name, by in apart.items() if by > _ROUNDING]:
        raise ValueError(
            f"The study was packed from a CT on another grid: {paths.listing(off, quoted=False)} differ from "
            "this one's. Name the CT that it was packed from, or pack it again."
        )
    return {
        name: Crop(np.array(its["slices"]), tuple(its["rows"]), tuple(its["columns"]))
        for name, its in record["crops"].items()
    }


def forget(packed: Path, uid: str) -> None:
    """Remove a study's record and sequences: its files are others now."""
    record_path(packed, uid).unlink(missing_ok=True)
    for name in _sequence_names(uid):
        (packed / name).unlink(missing_ok=True)
        (packed / ASIDE / name).unlink(missing_ok=True)


def set_aside(packed: Path, uid: str) -> None:
    """Move a study's sequences to `packed/aside`: nobody trains on them; they come back with its files."""
    for name in _sequence_names(uid):
        if (packed / name).exists():
            (packed / ASIDE).mkdir(exist_ok=True)
            (packed / name).replace(packed / ASIDE / name)


def _sequence_names(uid: str) -> list[str]:
    return [f"{uid}_{number}.npy" for number in range(1, len(VERTEBRAE) + 1)]


def hash_of(path: Path, *, named: bool = False) -> str:
    """SHA-256 of a file; of a folder, that of its files' and of those below it, in order of their values.

    Args:
        path: the file or folder.
        named: whether names matter, as of masks that say in them which vertebra they are.
    """
    if path.is_file():
        return paths.sha256_of(path)
    there = ((file, file.relative_to(path).parts) for file in path.rglob("*"))
    files = (file for file, parts in there if file.is_file() and not any(p.startswith(".") for p in parts))
    sums = sorted(paths.sha256_of(file) + (f"  {file.name}\n" if named else "") for file in files)
    return hashlib.sha256(os.fsencode("".join(sums))).hexdigest()


def packer_version() -> str:
    """`PACKING_VERSION`, as manifests and reports name it: what an earlier packing is compared by."""
    return f"packing {PACKING_VERSION}"


def sentence(problems: Mapping[str, str]) -> str:
    """Vertebrae by what is wrong with them: "C1, C2: not in the mask; C7: …"."""
    by_reason: dict[str, list[str]] = {}
    for level, why in problems.items():
        by_reason.setdefault(why, []).append(level)
    return "; ".join(f"{', '.join(levels)}: {why}" for why, levels in by_reason.items())


def _hashes(study: StudyFiles) -> dict[str, str]:
    return {"source_sha256": hash_of(study.ct), "mask_sha256": hash_of(study.mask, named=True)}


def _pack(
    study: StudyFiles,
    packed: Path,
    config: PackConfig,
    sheet: Path | None,
    hashes: Future[dict[str, str]],
    mask: Future[Mask],
) -> dict[str, Any]:
    # 1. Read and check.
    volume = read_ct(study.ct, series=study.series)
    label_map = place(mask.result(), volume)
    try:
        found = find_vertebrae(label_map, volume)
    except ValueError as error:
        raise ValueError(f"{study.mask.name}: {error}") from None
    problems = {level: "not in the mask" for level in VERTEBRAE if level not in found}
    problems |= {level: vertebra.problem for level, vertebra in found.items() if vertebra.problem}
    # 2. Cut.
    pieces = {
        level: pack_vertebra(volume.hu, label_map.array, volume.spacing_mm, level, config, box=vertebra.box)
        for level, vertebra in found.items()
        if not vertebra.problem
    }
    if not pieces:
        raise ValueError(f"{study.mask.name}: no vertebra can be packed ({sentence(problems)}).")
    truth = packed_truth(
        study.boxes, volume, label_map.array, pieces, uid=study.uid, fractured=study.fractured
    )
    # 3. Write, once the files are hashed.
    sources = hashes.result()
    rows, files = [], {}
    for level, piece in pieces.items():
        path = write_sequence(packed, study.uid, level, piece.array)
        files[path.name] = paths.sha256_of(path)
        row = manifest_row(study.uid, level, piece, volume.spacing_mm, config, truth.slices[level] or None)
        warnings = "; ".join((*volume.warnings, *found[level].warnings))
        origin = {"completeness": found[level].completeness, "mask": study.mask.name, **sources}
        origin |= {"packer": packer_version(), "warnings": warnings}
        rows.append(row | {column: origin[column] for column in PROVENANCE_COLUMNS})
    notes = [*volume.warnings, *truth.warnings]
    if sheet is not None:
        odd = [f"{level}: {text}" for level, vertebra in found.items() for text in vertebra.warnings]
        odd += [f"{level}: {why}" for level, why in problems.items()]
        picture = contact_sheet(volume, label_map.array, pieces, title=study.uid, notes=[*notes, *odd])
        write_figure(picture, sheet)
    return {
        "uid": study.uid,
        "rows": rows,
        "boxes": truth.boxes.to_dict("records"),
        "files": files,
        "problems": problems,
        "notes": notes,
        "grid": {
            "spacing_mm": list(volume.spacing_mm),
            "origin_mm": volume.origin_mm.tolist(),
            "direction": volume.direction.tolist(),
        },
        "crops": {  # where in the volume each sequence comes from, in voxels
            level: {
                "slices": its.slice_indices.tolist(),
                "rows": list(its.rows),
                "columns": list(its.columns),
            }
            for level, its in pieces.items()
        },
    }


def record_path(packed: Path, uid: str) -> Path:
    """Where the record of a packed study is."""
    return packed / "studies" / f"{uid}.json"


def _key(study: StudyFiles, config: PackConfig, hashes: Mapping[str, str]) -> str:
    """SHA-256 of all that a study's sequences depend on."""
    parts = {
        **hashes,
        "mask": study.mask.name,
        "scheme": study.scheme if isinstance(study.scheme, str) else str(sorted(study.scheme.items())),
        "series": study.series,
        "config": asdict(config),
        "fractured": study.fractured and dict(study.fractured),
        "boxes": study.boxes.to_numpy().tolist(),
        "packer": packer_version(),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def is_unchanged(record: Mapping[str, Any], packed: Path) -> bool:
    """Whether a record's sequences are there as they were written; brings back those set aside."""
    moved = {}
    for name, sha256 in record["files"].items():
        path = paths.inside(packed / name)
        found = path if path.is_file() else packed / ASIDE / name
        if not found.is_file() or paths.sha256_of(found) != sha256:
            return False
        moved[found] = path
    for found, path in moved.items():
        found.replace(path)
    return True
