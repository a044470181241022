"""Fracture boxes of a DICOM series, mapped through the packing: which packed slices are fractured, and where.

Boxes of RSNA 2022 name a slice of the series by its InstanceNumber and hold pixels of it, but no vertebra.

- Pixel i covers [i, i + 1), so that a box's edge x lies at x - 0.5 where pixels' middles have whole numbers.
  The box's corners go through `Volume.frames` to the patient, and through `Volume.indices` to the volume,
  whose axes may be flipped or swapped against the slice's.
- A box lies on the volume's nearest slice, and on each that its own is the nearest to: a volume resampled to
  even steps has no holes between boxes.
- A box belongs to the vertebra with most voxels inside it on the nearest slice of the label map (of equals,
  the upper one). Vertebrae labelled as intact cannot have it. A box without such voxels belongs to none.
- Slice truth has a mark for each packed position: 'x' where its slice has a box of the vertebra, else '.'.
  A vertebra labelled as intact is '.' throughout. One without boxes is unknown (""), as most studies have
  none; so is one whose boxes all lie between its packed positions.
- Packed boxes are in pixels of the packed image, edges as above, clipped to it. A box outside the crop is
  no packed box; its slice stays 'x', for it is fractured.

Readers drew boxes on slices where they saw a fracture. A slice that they skipped counts as intact.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from cspine_helpers.ct.volume import Volume
from cspine_helpers.files.paths import listing
from cspine_helpers.files.tables import Column, checked, read_columns, require_columns, write_table
from cspine_helpers.labels import BOX_COLUMNS, PATIENT, UID, VERTEBRAE, validate_boxes, validate_labels
from cspine_helpers.packed import PackedVertebra

_PACKED_BOXES = (
    Column(UID, "id"),
    Column("vertebra", among=VERTEBRAE),
    Column("slice", "whole", low=0),
    *(Column(name, "number", low=0) for name in ("x", "y")),
    *(Column(name, "number", above=0) for name in ("width", "height")),
)
_SLICES = (
    Column(UID, "id"),
    Column("SliceNumber", "whole", low=0),
    *(Column(name, "whole", among=(0, 1)) for name in VERTEBRAE),
)
PACKED_BOX_COLUMNS = tuple(column.name for column in _PACKED_BOXES)


@dataclass(frozen=True)
class Truth:
    """What the boxes of a study say about its packed sequences.

    Attributes:
        slices: vertebra → its slice truth, T characters '.' or 'x', or "" where that is unknown.
        boxes: `PACKED_BOX_COLUMNS`, one row for each box and packed position (`slice`, from 0) that shows it.
        warnings: what became of boxes that could not be used; each names them all.
    """

    slices: dict[str, str]
    boxes: pd.DataFrame
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Placed:
    """A box in the volume.

    Attributes:
        name: the box as its table has it, for messages.
        nearest: the volume's nearest slice.
        slices: those that it lies on.
        low, high: its edges (y, x) in voxel indices, whole at the voxels' middles.
    """

    name: str
    nearest: int
    slices: frozenset[int]
    low: np.ndarray
    high: np.ndarray


def packed_truth(
    boxes: pd.DataFrame,
    volume: Volume,
    label_map: np.ndarray,
    pieces: Mapping[str, PackedVertebra],
    *,
    uid: str,
    fractured: Mapping[str, int] | None,
) -> Truth:
    """Slice truth and packed boxes of one study, by the rules above.

    Args:
        boxes: fracture boxes of any studies (`labels.BOX_COLUMNS`).
        volume: the study's CT. Without `frames` (NIfTI) no box can be mapped; only the labels count.
        label_map: (Z, Y, X) on the volume's grid; 1–7 mark C1–C7.
        pieces: vertebra → its packed sequence, cut from this volume.
        uid: the study.
        fractured: vertebra → 0 or 1; None, and a vertebra that is not there, are unknown.

    Raises:
        ValueError: the boxes break their schema or are on slices that the series does not have; the label
            map is not on the volume's grid.
    """
    require_columns(boxes, BOX_COLUMNS, what="The table of boxes")
    boxes = validate_boxes(boxes[boxes[UID] == uid], what=f"The table of boxes of {uid}")
    if label_map.shape != volume.hu.shape:
        raise ValueError(
            f"{uid}: the label map must be on the volume's grid; found shapes {label_map.shape} and "
            f"{volume.hu.shape}. Resample the label map to the CT first."
        )
    warnings: list[str] = []
    if volume.frames is None and len(boxes):
        warnings.append(
            f"its boxes ({len(boxes)}) cannot be mapped, as the volume's slices have no numbers (NIfTI) or "
            "share them; read the DICOM series that the boxes were drawn on"
        )
    intact = {vertebra for vertebra in VERTEBRAE if (fractured or {}).get(vertebra) == 0}
    candidates = [vertebra for vertebra in VERTEBRAE if vertebra not in intact]
    owned: dict[str, list[_Placed]] = {}
    for box in _place(boxes, volume, uid):
        owned.setdefault(_owner(box, label_map, candidates), []).append(box)
    strays, slices, rows = owned.pop("", []), {}, []
    for vertebra, piece in pieces.items():
        mine = owned.pop(vertebra, [])
        positions = piece.slice_indices.tolist()
        marks = "".join(".x"[any(z in box.slices for box in mine)] for z in positions)
        slices[vertebra] = marks if vertebra in intact or "x" in marks else ""
        if "x" not in marks:
            warnings += _warning(f"boxes lie between the packed positions of {vertebra}", mine)
        edges = [_packed_edges(box, piece) for box in mine]
        outside = [box for box, its in zip(mine, edges, strict=True) if its is None]
        warnings += _warning(f"boxes lie outside the packed crop of {vertebra}", outside)
        for t, z in enumerate(positions):
            shown = (its for box, its in zip(mine, edges, strict=True) if its and z in box.slices)
            rows += [(uid, vertebra, t, *its) for its in shown]
    who = " or ".join(candidates) or "a vertebra, as all are labelled intact,"
    warnings += _warning(f"boxes belong to none, as they hold no voxel of {who} on their axial slice", strays)
    for vertebra, others in owned.items():
        warnings += _warning(f"boxes belong to {vertebra}, which was not packed", others)
    table = pd.DataFrame(rows, columns=list(PACKED_BOX_COLUMNS))
    return Truth(slices, _validate(table, "The table of packed boxes"), tuple(warnings))


def _place(boxes: pd.DataFrame, volume: Volume, uid: str) -> list[_Placed]:
    """The boxes of a study in the volume; none where it has no `frames`.

    Raises:
        ValueError: lists the slice numbers that the series does not have.
    """
    if volume.frames is None or boxes.empty:
        return []
    series = list(volume.frames)
    if unknown := sorted(set(boxes["slice_number"]) - set(series)):
        raise ValueError(
            f"{uid}: its boxes are on slices that the series does not have ({len(unknown)}): "
            f"{listing(unknown)}; found slices {min(series)} to {max(series)}. "
            "Give the whole series that the boxes were drawn on."
        )
    values = boxes[list(BOX_COLUMNS[1:])].to_numpy(dtype=float)
    frames = np.stack([volume.frames[number] for number in boxes["slice_number"]])  # (N, 3, 3)
    x, y, width, height = values.T[:4, :, None]
    columns, rows = x - 0.5 + width * [0, 1, 0, 1], y - 0.5 + height * [0, 0, 1, 1]  # (N, 4): the corners
    steps = np.stack([np.ones_like(columns), columns, rows], axis=-1)  # (N, 4, 3)
    corners = volume.indices((steps @ frames).reshape(-1, 3)).reshape(-1, 4, 3)[..., 1:]
    corners = corners.round(6)  # less is lost on the way; boxes of sagittal slices stay without a voxel
    z = volume.indices([frame[0] for frame in volume.frames.values()])[:, 0]  # of the series' slices
    closest = np.abs(z - np.arange(len(volume.hu))[:, None]).argmin(axis=1)  # to each slice of the volume
    placed = []
    for (*edges, number), four in zip(values.tolist(), corners, strict=True):
        name = "slice {4:g} (x {0:g}, y {1:g}, {2:g} × {3:g})".format(*edges, number)
        own = series.index(int(number))
        slices = frozenset({round(z[own]), *np.flatnonzero(closest == own).tolist()})
        placed.append(_Placed(name, round(z[own]), slices, four.min(axis=0), four.max(axis=0)))
    return placed


def _owner(box: _Placed, label_map: np.ndarray, candidates: list[str]) -> str:
    """The vertebra that a box belongs to; "" for none."""
    if not 0 <= box.nearest < len(label_map):
        return ""
    (top, left), (bottom, right) = (np.ceil(edge).clip(0).astype(int) for edge in (box.low, box.high))
    inside = label_map[box.nearest, top:bottom, left:right]
    voxels = {name: np.count_nonzero(inside == VERTEBRAE.index(name) + 1) for name in candidates}
    best = max(voxels, key=lambda name: voxels[name], default="")
    return best if voxels.get(best) else ""


def _packed_edges(box: _Placed, piece: PackedVertebra) -> tuple[float, float, float, float] | None:
    """x, y, width and height in the packed image, clipped to it; None outside it."""
    crop = np.array([piece.rows, piece.columns], dtype=float)  # (2, 2): first and stop of y and x
    size = np.array(piece.array.shape[1:3])
    scale = size / (crop[:, 1] - crop[:, 0])
    ends = (np.array([box.low, box.high]) + 0.5 - crop[:, 0]) * scale
    (top, left), (bottom, right) = ends.clip(0, size).tolist()
    return (left, top, right - left, bottom - top) if left < right and top < bottom else None


def _warning(what: str, boxes: list[_Placed]) -> list[str]:
    """One sentence that names the boxes, if there are any."""
    return [f"{what} ({len(boxes)}): {', '.join(box.name for box in boxes)}"] if boxes else []


def known_truth(
    table: pd.DataFrame, boxes: pd.DataFrame, slice_vertebrae: pd.DataFrame | None = None
) -> pd.DataFrame:
    """How much of a cohort's slices its tables know, before anything is packed.

    A fractured vertebra has truth where it is the only fractured one of a study with boxes, or where a slice
    with a box shows no other fractured one. Packing finds more, as it sees which vertebra a box lies on.

    Args:
        table: label table.
        boxes: fracture boxes, `labels.BOX_COLUMNS`; of studies that the table lacks they do not count.
        slice_vertebrae: StudyInstanceUID, SliceNumber, and C1 … C7 (1 where the slice shows it), of any
            studies; None: not known of any.

    Returns:
        One row a fact: `what`, `known` and `of`, how many of how many.

    Raises:
        ValueError: a table breaks its schema.

    Example:
        >>> uid = labels["StudyInstanceUID"][labels["patient_overall"] == 1].iloc[0]
        >>> boxes = pd.DataFrame([(uid, 3, 4, 5, 6, 70)], columns=BOX_COLUMNS)
        >>> known_truth(labels, boxes)["known"].tolist()[:2]
        [1, 133]
    """
    table, boxes = validate_labels(table), validate_boxes(boxes)
    names, by_study = list(VERTEBRAE), table.set_index(UID)
    fractured = by_study[by_study[PATIENT] == 1]
    slices = boxes.loc[boxes[UID].isin(by_study.index), [UID, "slice_number"]].drop_duplicates()
    boxed = fractured[fractured.index.isin(slices[UID])]
    broken = int(fractured[names].to_numpy().sum())
    certain = {(uid, names[row.argmax()]) for uid, row in _alone(boxed[names])}
    shown = 0
    if slice_vertebrae is not None:
        there = checked(slice_vertebrae, _SLICES, what="The table of slices", key=(UID, "SliceNumber"))
        seen = slices.merge(there.rename(columns={"SliceNumber": "slice_number"}))
        shown = len(seen)
        of_study = by_study[names].reindex(seen[UID]).to_numpy()
        broken_there = pd.DataFrame(seen[names].to_numpy() * of_study, index=seen[UID], columns=names)
        certain |= {(uid, names[row.argmax()]) for uid, row in _alone(broken_there)}
    intact = table[names].size - broken
    facts = (
        ("fractured studies with boxes", len(boxed), len(fractured)),
        ("fractured studies without boxes", len(fractured) - len(boxed), len(fractured)),
        ("boxed slices whose vertebrae are named", shown, len(slices)),
        ("fractured vertebrae in studies with boxes", int(boxed[names].to_numpy().sum()), broken),
        ("fractured vertebrae that these tables settle", len(certain), broken),
        ("intact vertebrae, each slice known as intact", intact, intact),
        ("vertebrae with any truth, at least", intact + len(certain), table[names].size),
    )
    return pd.DataFrame(facts, columns=["what", "known", "of"])


def _alone(rows: pd.DataFrame) -> list[tuple[str, np.ndarray]]:
    """Study and row of those rows that hold exactly one 1."""
    return [(uid, row) for uid, row in zip(rows.index, rows.to_numpy(), strict=True) if row.sum() == 1]


def write_packed_boxes(table: pd.DataFrame, path: str | Path) -> None:
    """Check a table of packed boxes and put it in place in one step, with its SHA-256 beside it."""
    write_table(_validate(table, Path(path).name), path, sealed=True)


def read_packed_boxes(path: str | Path) -> pd.DataFrame:
    """Packed boxes of a file, `packed/boxes.csv`: `PACKED_BOX_COLUMNS`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the table breaks the schema, or is not the one that was written.

    Example:
        >>> row = ("1.2.3", "C4", 7, 10.0, 12.0, 30.0, 25.0)
        >>> write_packed_boxes(pd.DataFrame([row], columns=PACKED_BOX_COLUMNS), "boxes.csv")
        >>> len(read_packed_boxes("boxes.csv"))
        1
    """
    source = "Packing a cohort of CT that has fracture boxes makes it."
    table = read_columns(path, what="table of packed boxes", source=source, text=(UID, "vertebra"))
    return _validate(table, Path(path).name)


def _validate(table: pd.DataFrame, what: str) -> pd.DataFrame:
    key = (UID, "vertebra")
    return checked(table, _PACKED_BOXES, what=what, key=key, unique=False, may_be_empty=True)
