"""The CT that a page shows: handed in, rendered again (phantoms) or read from disk, and what is cut from it.

The side view is a curved planar reformat: in each axial slice, the sagittal line through the middle of the
spinal canal there, so that a neck that leans or twists is still cut in its middle.
"""

import ast
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import ndimage

from cspine_helpers.ct.masks import find_mask, find_vertebrae, read_label_map
from cspine_helpers.ct.reading import read_ct
from cspine_helpers.ct.volume import AIR_HU, bounding_box
from cspine_helpers.figures.patient import AxialSlice, SideView
from cspine_helpers.files.paths import cohort_remedy
from cspine_helpers.files.records import parse_json
from cspine_helpers.files.tables import read_columns
from cspine_helpers.labels import UID, VERTEBRAE
from cspine_helpers.packed import open_sequence, sequence_path

LESION_COLUMNS = ("vertebra", "z", "x", "y", "width", "height")
_AROUND_MM = 6.0  # shown around a vertebra in an axial slice
_FRONT = 0.35  # of a vertebra's depth in the sheet: its body, or the arch of C1


class Rendered(Protocol):
    """A phantom's CT, as `phantom.rendering.Study` has it."""

    @property
    def volume_hu(self) -> NDArray[Any]:
        """As in `Scan`."""

    @property
    def label_map(self) -> NDArray[Any]:
        """As in `Scan`."""

    @property
    def fracture_map(self) -> NDArray[Any]:
        """Same shape; the vertebra's number where its bone is fractured."""

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """As in `Scan`."""


@dataclass(frozen=True, repr=False)
class Scan:
    """A CT with its vertebrae marked.

    Attributes:
        volume_hu: (Z, Y, X), cranial to caudal, front to back, right to left.
        label_map: same shape; 1–7 mark C1–C7.
        spacing_mm: (z, y, x).
        lesions: boxes around fractured bone, `LESION_COLUMNS`: vertebra, slice, and edges in voxels, voxel i
            from i to i + 1; None: not known.
        warnings: what a reader should know, such as repairs.

    Raises:
        ValueError: CT and label map differ in shape, or no vertebra is marked.

    Example:
        >>> label_map = np.zeros((9, 9, 9), int)
        >>> label_map[3:6, 3:6, 3:6] = 2
        >>> Scan(400 * label_map, label_map, (1.0, 0.5, 0.5)).there
        ['C2']
    """

    volume_hu: NDArray[Any]
    label_map: NDArray[Any]
    spacing_mm: tuple[float, float, float]
    lesions: pd.DataFrame | None = None
    warnings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.label_map.shape != self.volume_hu.shape:
            raise ValueError(
                f"CT and label map must have one shape; found {self.volume_hu.shape} and "
                f"{self.label_map.shape}. Resample the label map to the CT first."
            )
        if not self.there:
            raise ValueError("The label map marks none of C1 … C7 (1 to 7). Hand in that of this CT.")

    @classmethod
    def of(cls, study: Rendered) -> Self:
        """The scan of a phantom, whose every fractured voxel is known."""
        lesions = lesions_of(study.fracture_map)
        return cls(study.volume_hu, study.label_map, study.spacing_mm, lesions)

    @property
    def there(self) -> list[str]:
        """The vertebrae that are marked, cranial first."""
        found = ndimage.find_objects(self.label_map, max_label=len(VERTEBRAE))
        return [name for name, box in zip(VERTEBRAE, found, strict=True) if box is not None]

    def above(self, vertebra: str) -> Self:
        """The scan as it were had it ended above a vertebra: with the last slice of the one before.

        Raises:
            ValueError: it is the first that is marked.
        """
        kept = self.there[: self.there.index(vertebra)]
        if not kept:
            raise ValueError(f"Nothing is left above {vertebra}, the first vertebra of this scan.")
        (_, end), *_ = self.box(kept[-1])
        numbers = [VERTEBRAE.index(name) + 1 for name in kept]
        labels = np.where(np.isin(self.label_map[:end], numbers), self.label_map[:end], 0)
        lesions = self.lesions
        if lesions is not None:
            lesions = lesions[lesions["vertebra"].isin(kept) & (lesions["z"] < end)]
        return replace(self, volume_hu=self.volume_hu[:end], label_map=labels, lesions=lesions)

    def box(self, vertebra: str) -> tuple[tuple[int, int], ...]:
        """Half-open index ranges of a vertebra along Z, Y and X."""
        return bounding_box(self.label_map, VERTEBRAE.index(vertebra) + 1)

    def canal(self) -> NDArray[np.float64]:
        """Where the canal's middle is from right to left in each slice, voxels (Z,).

        The middles of the vertebrae, which the canal runs through, straight lines between, level outside.
        """
        numbers = [VERTEBRAE.index(name) + 1 for name in self.there]
        middles = ndimage.center_of_mass(self.label_map > 0, self.label_map, numbers)
        z, _, x = np.transpose(sorted(middles))  # by height: label maps may be wrong
        return np.interp(np.arange(len(self.label_map)), z, x)

    def side_view(self) -> SideView:
        """The sagittal sheet along the canal, `SideView.plane` and `SideView.labels` with it."""
        slices, rows, _ = self.volume_hu.shape
        across = self.canal()
        z, y = np.mgrid[:slices, :rows]
        x = np.repeat(across[:, None], rows, axis=1)
        plane = ndimage.map_coordinates(self.volume_hu.astype(np.float32), [z, y, x], order=1, mode="nearest")
        labels = self.label_map[z, y, x.round().astype(int)]
        heights, fronts = {}, {}
        for name in self.there:
            number = VERTEBRAE.index(name) + 1
            found_z, found_y = np.nonzero(labels == number)
            if not found_z.size:  # beside the sheet, as a label map that is wrong may have it
                (box_z, box_y, _) = self.box(name)
                found_z, found_y = np.array(box_z), np.array(box_y)
            front = found_y <= found_y.min() + _FRONT * np.ptp(found_y)
            heights[name] = float(found_z[front].mean()) * self.spacing_mm[0]
            fronts[name] = (float(found_y.min()) - 2) * self.spacing_mm[1]
        return SideView(
            plane=plane,
            labels=labels,
            spacing_mm=self.spacing_mm[:2],
            height_mm=heights,
            name_mm=fronts,
            lesions_mm=self._lesions_in_sheet(across),
            note="CT in a bone window, cut along the middle of the spinal canal",
        )

    def _lesions_in_sheet(self, across: NDArray[np.float64]) -> tuple[tuple[float, float, float, float], ...]:
        """Boxes (left, top, width, height) in mm around what the sheet cuts of each lesion."""
        if self.lesions is None:
            return ()
        its = self.lesions
        x = across[its["z"].to_numpy(dtype=int)] + 0.5
        sheet = np.zeros(self.volume_hu.shape[:2], bool)
        for row in its[(its["x"] <= x) & (x <= its["x"] + its["width"])].itertuples():
            sheet[row.z, int(row.y) : int(np.ceil(row.y + row.height))] = True
        dz, dy, _ = self.spacing_mm
        pieces, _ = ndimage.label(sheet, structure=np.ones((3, 3)))
        return tuple(
            ((y.start - 0.5) * dy, (z.start - 0.5) * dz, (y.stop - y.start) * dy, (z.stop - z.start) * dz)
            for z, y in ndimage.find_objects(pieces)
        )

    def axial(self, vertebra: str, z: int, caption: str, *, truth: bool) -> AxialSlice:
        """One slice around a vertebra at the CT's own resolution, square in mm; air outside the CT."""
        _, *ends = self.box(vertebra)
        side = max((high - low) * step for (low, high), step in zip(ends, self.spacing_mm[1:], strict=True))
        starts, counts = [], []
        for (low, high), step in zip(ends, self.spacing_mm[1:], strict=True):
            counts.append(round((side + 2 * _AROUND_MM) / step))
            starts.append(round((low + high - counts[-1]) / 2))
        plane = np.full(counts, AIR_HU, dtype=np.float32)
        mask = np.zeros(counts, bool)
        inside = [
            slice(max(start, 0), min(start + count, size))
            for start, count, size in zip(starts, counts, self.volume_hu.shape[1:], strict=True)
        ]
        into = tuple(slice(s.start - start, s.stop - start) for s, start in zip(inside, starts, strict=True))
        plane[into] = self.volume_hu[z][tuple(inside)]
        mask[into] = self.label_map[z][tuple(inside)] == VERTEBRAE.index(vertebra) + 1
        boxes = self._lesions_at(vertebra, z, starts) if truth else ()
        _, y, x = self.spacing_mm
        return AxialSlice(plane, mask, y / x, caption, boxes, pixel_mm=x)

    def _lesions_at(
        self, vertebra: str, z: int, starts: list[int]
    ) -> tuple[tuple[float, float, float, float], ...]:
        if self.lesions is None:
            return ()
        its = self.lesions[(self.lesions["vertebra"] == vertebra) & (self.lesions["z"] == z)]
        edges = its[["x", "y", "width", "height"]].to_numpy(dtype=np.float64) - [starts[1], starts[0], 0, 0]
        return tuple((x, y, width, height) for x, y, width, height in edges.tolist())


def lesions_of(fracture_map: NDArray[Any]) -> pd.DataFrame:
    """A box around each vertebra's fractured bone in each axial slice, `LESION_COLUMNS`.

    Example:
        >>> fracture_map = np.zeros((3, 8, 8), int)
        >>> fracture_map[1, 2:4, 5] = 3
        >>> lesions_of(fracture_map).to_numpy().tolist()
        [['C3', 1, 5, 2, 1, 2]]
    """
    rows = []
    for z, plane in enumerate(fracture_map):
        for name, box in zip(VERTEBRAE, ndimage.find_objects(plane, len(VERTEBRAE)), strict=True):
            if box is not None:
                y, x = box
                rows.append((name, z, x.start, y.start, x.stop - x.start, y.stop - y.start))
    return pd.DataFrame(rows, columns=list(LESION_COLUMNS))


def read_scan(
    folder: Path,
    uid: str,
    *,
    render: Callable[[Path, str], Rendered] | None = None,
    series: str | None = None,
) -> Scan:
    """The CT of one study of a cohort: read from `train_images/` and `segmentations/`, or rendered again.

    Args:
        folder: `data/<cohort>`.
        uid: StudyInstanceUID.
        render: what makes the CT of a phantom again, `phantom.study_of`: such a cohort keeps none.
        series: SeriesInstanceUID, where the study's folder holds several.

    Raises:
        FileNotFoundError: there is no CT, or no mask, of that study.
        ValueError: it cannot be read; says why.

    Example:
        >>> scan = read_scan(cohort_dir("rsna2022"), uid)  # doctest: +SKIP
    """
    images = folder / "train_images"
    found = [images / f"{uid}{end}" for end in ("", ".nii", ".nii.gz") if (images / f"{uid}{end}").exists()]
    if not found and render is not None and (folder / "cohort.json").is_file():
        return Scan.of(render(folder, uid))
    if not found:
        raise FileNotFoundError(
            f"No CT of {uid} in {images}. {cohort_remedy(folder)} Without it, a page shows the packed slices."
        )
    mask = find_mask(folder / "segmentations", uid)
    volume = read_ct(found[0], series=series)
    label_map = read_label_map(mask, volume, scheme=_scheme(folder / "packed" / "packing.json"))
    find_vertebrae(label_map, volume)  # removes specks, as the packer did
    lesions = _packed_lesions(folder / "packed", uid)
    return Scan(volume.hu, label_map.array, volume.spacing_mm, lesions, volume.warnings)


def _packed_lesions(packed: Path, uid: str) -> pd.DataFrame | None:
    """The readers' boxes as packing placed them, back in the CT's voxels; None where nobody packed boxes."""
    table, record = packed / "boxes.csv", packed / "studies" / f"{uid}.json"
    if not (table.is_file() and record.is_file()):
        return None
    boxes = read_columns(
        table, what="table of packed boxes", source="Packing makes it.", text=(UID, "vertebra")
    )
    crops, rows = parse_json(record.read_bytes(), record.name)["crops"], []
    for _, box in boxes[boxes[UID] == uid].iterrows():
        crop, name = crops[box["vertebra"]], box["vertebra"]
        size = open_sequence(sequence_path(packed, uid, name)).shape[1]
        (top, bottom), (left, right) = crop["rows"], crop["columns"]
        down, across = (bottom - top) / size, (right - left) / size  # voxels a packed pixel
        x, y, width, height = (float(box[edge]) for edge in ("x", "y", "width", "height"))
        place = (left + x * across, top + y * down, width * across, height * down)
        rows.append((name, crop["slices"][int(box["slice"])], *place))
    return pd.DataFrame(rows, columns=list(LESION_COLUMNS)).drop_duplicates(ignore_index=True)


def _scheme(settings: Path) -> Any:
    """What the masks' labels mean, as the cohort was packed; RSNA's where nobody noted it."""
    if not settings.is_file():
        return "rsna"
    scheme = parse_json(settings.read_bytes(), settings.name).get("scheme", "rsna")
    return ast.literal_eval(scheme) if scheme.startswith("{") else scheme
