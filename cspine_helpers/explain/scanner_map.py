"""A study's maps back where the scanner saw the patient: one volume on the CT's own grid, as NIfTI beside it.

Each map covers the square crop of its vertebra, and the native slices that were packed. Between packed slices
it is interpolated along Z, within a slice as the network's picture was cut; outside it is 0.
"""

import re
from collections.abc import Collection, Mapping
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from cspine_helpers.checkpoints import Run
from cspine_helpers.ct.nifti import Grid, write_nifti
from cspine_helpers.ct.volume import Volume
from cspine_helpers.explain.maps import Method, map_sequences
from cspine_helpers.files.paths import check_uids, listing
from cspine_helpers.labels import UID, VERTEBRAE
from cspine_helpers.packed import Crop, PackedVertebra, sequence_path

_METHOD = re.compile(r"[a-z0-9_]{1,40}")
MAP, CT = "{uid}_{method}.nii.gz", "{uid}_ct.nii.gz"


Piece = Crop | PackedVertebra  # where in the CT a sequence was cut


def study_maps(
    run: Run,
    packed_dir: str | Path,
    uid: str,
    *,
    vertebrae: Collection[str] | None = None,
    method: Method = "grad_cam",
    layer: str | None = None,
) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """Maps of one study's vertebrae, with progress; no label is known or used.

    Args:
        run: of `checkpoints.load_run`.
        packed_dir: folder of the packed sequences.
        uid: StudyInstanceUID.
        vertebrae: which; None: all that are packed.
        method: of `maps.METHODS`.
        layer: whose cells are mapped; None: see `maps.map_sequences`.

    Returns:
        Vertebra → its map (T, H, W), weighed by attention, and vertebra → its probability; cranial first.

    Raises:
        FileNotFoundError: none of the study's vertebrae is packed.
        ValueError: one that is asked for is not; method or layer are unknown; a sequence cannot be used.

    Example:
        >>> uid = cohort.samples["test"]["StudyInstanceUID"][0]
        >>> maps, probability = study_maps(run, cohort.packed, uid, vertebrae=["C2"])
        >>> maps["C2"].shape, [*probability]
        ((5, 32, 32), ['C2'])
    """
    there = [name for name in VERTEBRAE if sequence_path(packed_dir, uid, name).is_file()]
    if not there:
        raise FileNotFoundError(f"Study {uid!r} has no packed sequence in {packed_dir}. Pack it first.")
    if gone := [name for name in vertebrae or () if name not in there]:
        raise ValueError(
            f"Study {uid!r} has no packed {listing(gone, quoted=False)}; found "
            f"{listing(there, quoted=False)}. Choose of these."
        )
    maps, probability = {}, {}
    chosen = [name for name in there if vertebrae is None or name in vertebrae]
    for name in tqdm(chosen, desc=f"{method} of {uid}", unit="vertebra"):
        sample = pd.DataFrame({UID: [uid], "vertebra": [name], "label": [0]})
        found = map_sequences(run, sample, packed_dir, method=method, layer=layer)
        maps[name], probability[name] = found.pixels()[0], float(found.probability[0])
    return maps, probability


def scanner_map(maps: Mapping[str, np.ndarray], pieces: Mapping[str, Piece], volume: Volume) -> np.ndarray:
    """The maps of a study's vertebrae as one volume on the CT's grid, their values as they are.

    Args:
        maps: vertebra → (T, h, w), of any resolution: each covers its whole crop, as `Maps.pixels` do.
        pieces: vertebra → where its sequence was cut; others than those of `maps` are not used.
        volume: the CT.

    Returns:
        float32 (Z, Y, X): 0 outside the crops, and the larger value where two crops overlap.

    Raises:
        ValueError: a map has no piece, another number of slices, a value that is no number, or lies outside
            the CT; names the vertebrae.

    Example:
        >>> volume = Volume(np.zeros((6, 8, 8)), (2.0, 1.0, 1.0), np.zeros(3), np.eye(3))
        >>> piece = Crop(np.array([1, 3]), (2, 6), (2, 6))
        >>> there = scanner_map({"C4": np.ones((2, 2, 2)) * [[[1.0]], [[3.0]]]}, {"C4": piece}, volume)
        >>> there[:, 4, 4].tolist()
        [0.0, 1.0, 2.0, 3.0, 0.0, 0.0]
    """
    _check(maps, pieces, volume)
    shape = volume.hu.shape
    result, is_covered = np.zeros(shape, np.float32), np.zeros(shape, bool)
    for vertebra, values in maps.items():
        piece = pieces[vertebra]
        block, first = _native(np.asarray(values, np.float32), piece.slice_indices)
        ends = (piece.rows, piece.columns)
        size = (piece.columns[1] - piece.columns[0], piece.rows[1] - piece.rows[0])
        kept = tuple(
            slice(max(low, 0), min(high, end)) for (low, high), end in zip(ends, shape[1:], strict=True)
        )
        inner = tuple(slice(k.start - low, k.stop - low) for k, (low, _) in zip(kept, ends, strict=True))
        for z, plane in enumerate(block, start=first):  # one at a time: a CT has hundreds of large slices
            new = cv2.resize(plane, size, interpolation=cv2.INTER_LINEAR)[inner]
            there, before = result[z][kept], is_covered[z][kept]
            there[...] = np.where(before, np.maximum(there, new), new)
            before[...] = True
    return result


def _native(values: np.ndarray, positions: np.ndarray) -> tuple[np.ndarray, int]:
    """(Z', h, w): every native slice from the first packed one to the last, and which the first is.

    A slice that was packed twice, as in thick ones, has the mean of its maps.
    """
    packed, which = np.unique(positions, return_inverse=True)
    means = np.zeros((len(packed), *values.shape[1:]), np.float32)
    np.add.at(means, which, values)
    means /= np.bincount(which)[:, None, None]
    wanted = np.arange(packed[0], packed[-1] + 1)
    above = np.searchsorted(packed, wanted, side="right") - 1
    below = np.minimum(above + 1, len(packed) - 1)
    apart = np.maximum(packed[below] - packed[above], 1)
    share = ((wanted - packed[above]) / apart).astype(np.float32)[:, None, None]
    return means[above] * (1 - share) + means[below] * share, int(packed[0])


def _check(maps: Mapping[str, np.ndarray], pieces: Mapping[str, Piece], volume: Volume) -> None:
    if not maps:
        raise ValueError("There is no map to place. Name the vertebrae of the study that are packed.")
    if gone := [name for name in maps if name not in pieces]:
        raise ValueError(
            f"Nothing says where in the CT {listing(gone, quoted=False)} was cut. Hand in a piece for each "
            "map."
        )
    if unknown := [name for name in maps if name not in VERTEBRAE]:
        raise ValueError(f"Maps are of vertebrae, C1 … C7; found {listing(unknown)}. Name them so.")
    ends = volume.hu.shape
    for name, values in maps.items():
        piece, shape = pieces[name], np.shape(values)
        if len(shape) != 3 or shape[0] != len(piece.slice_indices) or not min(shape):
            raise ValueError(
                f"{name}: a map is (T, h, w), with T = {len(piece.slice_indices)} packed slices here; found "
                f"{shape}. Hand in the map of this sequence."
            )
        if not np.isfinite(values).all():
            raise ValueError(f"{name}: its map holds NaN or infinity. Compute it again.")
        first, last = int(piece.slice_indices[0]), int(piece.slice_indices[-1])
        reach = (piece.rows, piece.columns)
        is_beside = any(high <= 0 or low >= end for (low, high), end in zip(reach, ends[1:], strict=True))
        if first < 0 or last >= ends[0] or is_beside:
            raise ValueError(
                f"{name}: it was cut outside this CT of {ends} voxels, at slices {first} to {last}, rows and "
                f"columns {reach}. Hand in the CT that it was packed from."
            )


def write_scanner_map(
    folder: str | Path,
    uid: str,
    values: np.ndarray,
    volume: Volume,
    *,
    method: str,
    run: str = "",
    with_ct: bool = False,
) -> list[Path]:
    """Write a study's map as NIfTI, `<uid>_<method>.nii.gz`, and if asked the CT on the same grid beside it.

    Args:
        folder: where they go; made where it is missing.
        uid: StudyInstanceUID.
        values: of `scanner_map`.
        volume: the CT; its own file may have other axes, as viewers know how to lay one over the other.
        method: of the map, for its name.
        run: the run's name, for the header.
        with_ct: whether `<uid>_ct.nii.gz` is written, for viewers that want one grid.

    Returns:
        The files that were written.

    Raises:
        ImportError: nibabel is not installed.
        OSError: a file cannot be written.
        ValueError: map and CT differ in shape, a value is no number, or UID or method cannot be in a file's
            name.

    Example:
        >>> volume = Volume(np.zeros((6, 8, 8), np.int16), (2.0, 1.0, 1.0), np.zeros(3), np.eye(3))
        >>> paths = write_scanner_map("maps", "1.2.3", np.zeros((6, 8, 8)), volume, method="grad_cam")
        >>> [path.name for path in paths]
        ['1.2.3_grad_cam.nii.gz']
    """
    check_uids([uid])
    if values.shape != volume.hu.shape:
        raise ValueError(
            f"A map lies on its CT's grid; found {values.shape} and {volume.hu.shape} voxels. Hand in the CT "
            "that it was made for."
        )
    if not _METHOD.fullmatch(method):
        raise ValueError(
            f"A method's name is part of a file's: letters, digits and '_'; found {method!r}. Correct it."
        )
    if not (np.abs(values) <= np.finfo(np.float32).max).all():
        raise ValueError(
            f"{uid}: its map holds NaN or infinity, or more than float32 does. Compute it again."
        )
    grid, folder = Grid(volume.steps_mm, volume.origin_mm), Path(folder)
    room = 79 - len(f"{method} of , research only")  # bytes that NIfTI has for a description
    of_run = f" of {run.encode()[:room].decode(errors='ignore')}" if run else ""
    files = {MAP: (values.astype(np.float32), f"{method}{of_run}, research only")}
    if with_ct:
        files[CT] = (volume.hu, "CT in Hounsfield units")
    return [
        write_nifti(folder / name.format(uid=uid, method=method), array, grid, description=text)
        for name, (array, text) in files.items()
    ]


def peaks(maps: Mapping[str, np.ndarray], pieces: Mapping[str, Piece], volume: Volume) -> pd.DataFrame:
    """Where each vertebra's map is highest, in the patient: the middle of that cell of the map's own grid.

    Args:
        maps: vertebra → (T, h, w), as of `scanner_map`.
        pieces: vertebra → where its sequence was cut.
        volume: the CT.

    Returns:
        One row a vertebra, cranial first: vertebra, peak (the value), slice (native, along Z), and right_mm,
        anterior_mm, superior_mm, patient coordinates as NIfTI viewers show them (RAS); these four are NaN
        where the map is constant, and has no highest place.

    Raises:
        ValueError: as `scanner_map`.

    Example:
        >>> volume = Volume(np.zeros((6, 8, 8)), (2.0, 1.0, 1.0), np.zeros(3), np.eye(3))
        >>> piece = Crop(np.array([1, 3]), (2, 6), (2, 6))
        >>> peaks({"C4": np.ones((2, 1, 1)) * [[[1.0]], [[3.0]]]}, {"C4": piece}, volume)["slice"].tolist()
        [3.0]
    """
    _check(maps, pieces, volume)
    rows = []
    for vertebra in sorted(maps, key=VERTEBRAE.index):
        values, piece = np.asarray(maps[vertebra]), pieces[vertebra]
        t, *cell = np.unravel_index(values.argmax(), values.shape)
        place = [float(piece.slice_indices[t])]
        for index, count, (low, high) in zip(
            cell, values.shape[1:], (piece.rows, piece.columns), strict=True
        ):
            place.append(low + (index + 0.5) / count * (high - low) - 0.5)
        left, back, head = volume.points([place])[0]
        found = [place[0], -left, -back, head] if np.ptp(values) else [np.nan] * 4
        rows.append((vertebra, float(values.max()), *found))
    return pd.DataFrame(rows, columns=["vertebra", "peak", "slice", "right_mm", "anterior_mm", "superior_mm"])
