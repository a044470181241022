"""Vertebra masks from anywhere, on the grid of their CT: one label file, or one mask file a vertebra.

Both headers say where voxels lie. On the CT's own grid, in any order of axes, labels are copied; else each
voxel of the CT takes the nearest label. A mask that cannot be right is refused, and what was tidied is said:

- C1 … C7 follow each other caudally; else the mask is upside down, or its labels run the other way.
- Pieces up to 10 mm from the main one stay, as a displaced fragment may. Farther ones are removed where they
  are small, as they would stretch the box; else the mask is wrong.
- Of a binary mask, one label is the whole spine: it is taller or larger than any cervical vertebra.
- A vertebra has cortical bone: where less than a tenth of its voxels reach 150 HU, the mask lies beside it,
  and less than a third is warned of.
"""

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from scipy import ndimage

from cspine_helpers.ct.nifti import NIFTI, Grid, read_nifti
from cspine_helpers.ct.volume import Box, Volume, corners, in_frame, simpleitk, slices_of
from cspine_helpers.files.paths import listing
from cspine_helpers.files.records import parse_json
from cspine_helpers.labels import VERTEBRAE

_THORACIC = tuple(f"T{n}" for n in range(1, 13))
_OTHER = "other"
# What a file's labels mean. Source: RSNA 2022 data page; TotalSegmentator 2, task total (vertebrae_C1 is 50).
SCHEMES: dict[str, dict[int, str]] = {
    "rsna": dict(enumerate((*VERTEBRAE, *_THORACIC), start=1)),
    "totalsegmentator": dict.fromkeys(range(1, 118), _OTHER)
    | dict(zip(range(50, 31, -1), (*VERTEBRAE, *_THORACIC), strict=True)),
}
_ONE_EACH = re.compile(r"(?:vertebrae_)?(C[1-7])\.nii(?:\.gz)?")
_WHOLE = 1e-3  # what a slope in the header leaves of whole numbers
_SPECK_MM3, _NO_VERTEBRA_MM3 = 1_000, 150_000  # a tenth of a small vertebra; five times a large C7
_VERSION_1 = (
    "a mask of TotalSegmentator 1, in which C7 to C1 are 35 to 41{}. Make it again with version 2, or say "
    "what its labels mean (--labels, with 41 = C1 … 35 = C7)."
)
_NECK_1 = range(35, 42)  # in version 2, T9 to T3
_SAME_GRID = 0.05  # voxels that the two grids may lie apart anywhere, to be called one


@dataclass(frozen=True)
class LabelMap:
    """Labels on the grid of a CT.

    Attributes:
        array: (Z, Y, X) uint8; 1–7 mark C1–C7.
        field: half-open index ranges along Z, Y and X of the part of the CT that the mask's own grid covers.
        box: the same of a part that holds all labels, so that nobody need look at the rest.
    """

    array: np.ndarray
    field: Box
    box: Box


def read_label_map(path: str | Path, volume: Volume, *, scheme: str | Mapping[int, str] = "rsna") -> LabelMap:
    """The vertebrae of a mask, on the grid of their CT.

    Args:
        path: a NIfTI file of labels, or a folder with one mask file a vertebra, `vertebrae_C1.nii.gz` or
            `C1.nii.gz` and so on, in which values above 0.5 are the vertebra.
        volume: the CT.
        scheme: what labels mean: a name of `SCHEMES`, or label → name, where C1 … C7 are taken and other
            names are known to be something else. Of a folder, the file names say it.

    Raises:
        FileNotFoundError: there is no such mask.
        ValueError: it cannot be read, has labels that the scheme does not know, none of C1 … C7, or lies
            outside the CT.

    Example:
        >>> label_map = read_label_map("masks/1.2.3.nii.gz", volume)  # doctest: +SKIP
    """
    return place(read_mask(Path(path), scheme), volume)


@dataclass(frozen=True)
class Mask:
    """A mask as it was written, on grids of its own.

    Attributes:
        name: of its file or folder.
        parts: of each file that is not empty, labels (Z, Y, X) of the part that holds all of them, as 1–7
            for C1–C7; that part's grid; shape and grid of the whole.
    """

    name: str
    parts: list[tuple[np.ndarray, Grid, tuple[int, ...], Grid]]


def read_mask(path: Path, scheme: str | Mapping[int, str] = "rsna") -> Mask:
    """A mask before its CT is known; arguments and errors as of `read_label_map`."""
    meanings: dict[Path, Mapping[int, str] | str] = {path: _meanings(scheme)}
    if path.is_dir():
        matches = ((_ONE_EACH.fullmatch(file.name), file) for file in sorted(path.iterdir()))
        meanings = {file: match[1] for match, file in matches if match}
    if not meanings:
        raise FileNotFoundError(
            f"No mask of a vertebra in {path.name}. They are called vertebrae_C1.nii.gz, or C1.nii.gz, …"
        )
    parts = []
    for file, meaning in meanings.items():
        values, grid = read_nifti(file)
        box = _foreground(values)
        if box is None:
            continue  # a segmenter's file of a vertebra that it did not find
        crop = values[slices_of(box)]
        if isinstance(meaning, str):
            labels = (crop > 0.5).astype(np.uint8) * np.uint8(VERTEBRAE.index(meaning) + 1)
        else:
            labels = _translated(crop, meaning, file)
            if meaning is SCHEMES["totalsegmentator"]:
                _check_generation(crop, grid, file)
        origin = grid.origin_mm + grid.steps_mm @ np.array([low for low, _ in box])
        parts.append((labels, Grid(grid.steps_mm, origin), values.shape, grid))
    if not parts:
        raise ValueError(f"{path.name}: empty, without a voxel above 0. Make it again, or exclude the study.")
    return Mask(path.name, parts)


def place(mask: Mask, volume: Volume) -> LabelMap:
    """The mask on the grid of its CT; errors as of `read_label_map`."""
    array = np.zeros(volume.hu.shape, np.uint8)
    for labels, part, _, _ in mask.parts:
        _on_grid(labels, part, volume, array)
    ends = np.array([_field(volume, shape, grid) for _, _, shape, grid in mask.parts])
    field = tuple(zip(ends[..., 0].min(axis=0).tolist(), ends[..., 1].max(axis=0).tolist(), strict=True))
    box = _foreground(array)
    if box is None:
        raise ValueError(
            f"{mask.name}: no voxel of C1 … C7 lies inside the CT. It is the mask of another study or "
            "series, or one of the headers is wrong. Look at both in a viewer."
        )
    return LabelMap(array, field, box)


def read_scheme(path: str | Path) -> dict[int, str]:
    """What labels mean, from a JSON file: `{"41": "C1", "40": "C2", "42": "oesophagus"}`.

    Names may also be `vertebrae_C1` and so on, as TotalSegmentator has them.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no JSON object from whole numbers to names, C1 … C7 among them.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"No table of labels at {path}. It maps numbers to names, as JSON.")
    found = parse_json(path.read_bytes(), path.name, remedy='Write it as {"41": "C1", …}.')
    pairs = found.items() if isinstance(found, dict) else ()
    if not pairs or not all(re.fullmatch("[0-9]{1,5}", key) and isinstance(name, str) for key, name in pairs):
        raise ValueError(f'{path.name} does not map whole numbers to names. Write it as {{"41": "C1", …}}.')
    try:
        return dict(_meanings({int(key): name.removeprefix("vertebrae_") for key, name in pairs}))
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}") from None


def find_mask(folder: Path, uid: str) -> Path:
    """A study's mask in a folder of masks: `<uid>.nii`, `<uid>.nii.gz` or the folder `<uid>`.

    Raises:
        FileNotFoundError: there is none.
        ValueError: there are several.

    Example:
        >>> Path("1.2.3.nii.gz").touch()
        >>> find_mask(Path("."), "1.2.3").name
        '1.2.3.nii.gz'
    """
    candidates = [*(folder / f"{uid}{suffix}" for suffix in NIFTI), folder / uid]
    found = [path for path in candidates if path.exists()]
    if not found:
        raise FileNotFoundError(
            f"No mask at {folder.name}/{uid}.nii, .nii.gz, nor in a folder of that name. README says how to "
            "make masks."
        )
    if len(found) > 1:
        raise ValueError(
            f"Several masks in {folder.name}: {listing(path.name for path in found)}. Keep one of them."
        )
    return found[0]


def _meanings(scheme: str | Mapping[int, str]) -> Mapping[int, str]:
    if isinstance(scheme, str):
        if scheme not in SCHEMES:
            raise ValueError(
                f"A scheme is one of {listing(SCHEMES)}, or a mapping of labels to names; found {scheme!r}."
            )
        return SCHEMES[scheme]
    if 0 in scheme or not set(scheme.values()) & set(VERTEBRAE):
        raise ValueError(f"A scheme maps labels above 0 to names, C1 … C7 among them; found {dict(scheme)}.")
    return scheme


def _foreground(array: np.ndarray) -> Box | None:
    """Half-open ranges of what is not 0 along each axis; None: everything is."""
    box: list[tuple[int, int]] = []
    for axis in range(3):
        others = tuple(i for i in range(3) if i != axis)
        found = np.flatnonzero(array.any(axis=others))
        if not found.size:
            return None
        box.append((int(found[0]), int(found[-1]) + 1))
        array = array[(slice(None),) * axis + (slice(*box[-1]),)]
    return tuple(box)


def _translated(crop: np.ndarray, meanings: Mapping[int, str], path: Path) -> np.ndarray:
    """The file's labels as 1–7, everything else 0.

    Raises:
        ValueError: values that are no labels or unknown, or none of C1 … C7.
    """
    if crop.dtype.kind == "f" and np.abs(crop - np.rint(crop)).max() > _WHOLE:
        raise ValueError(
            f"{path.name}: fractions among its values; labels are whole numbers. Is it the CT itself?"
        )
    if crop.min() < 0 or crop.max() > 65535:
        raise ValueError(
            f"{path.name}: values from {crop.min():g} to {crop.max():g} are no labels. Is it the CT?"
        )
    small = crop.max() < 256
    crop = np.rint(crop) if crop.dtype.kind == "f" else crop
    crop = np.ascontiguousarray(crop, dtype=np.uint8 if small else np.uint16)
    flat, size = crop.reshape(len(crop), -1), 256 if small else 65536
    found = np.flatnonzero(cv2.calcHist([flat], [0], None, [size], [0, size]))
    unknown = sorted(set(found.tolist()) - set(meanings) - {0})
    there = [label for label in found.tolist() if meanings.get(label) in VERTEBRAE]
    if unknown or not there:
        cause = f"labels that are unknown ({listing(unknown)})" if unknown else "none of C1 … C7"
        if not unknown and meanings is SCHEMES["totalsegmentator"] and {*_NECK_1} & {*found.tolist()}:
            here = listing(found[found > 0].tolist())
            raise ValueError(f"{path.name}: {cause} among {here}. Of a neck, it is {_VERSION_1.format('')}")
        known = ", ".join(f"{label} = {name}" for label, name in meanings.items() if name in VERTEBRAE)
        raise ValueError(
            f"{path.name}: {cause} among {listing(found[found > 0].tolist())}, read with {known}. Choose "
            f"another scheme ({listing(SCHEMES)}), or say what each label means (--labels)."
        )
    table = np.zeros(size, np.uint8)
    for label in there:
        table[label] = VERTEBRAE.index(meanings[label]) + 1
    return cv2.LUT(flat, table).reshape(crop.shape) if small else table[crop]


def _check_generation(crop: np.ndarray, grid: Grid, path: Path) -> None:
    """Refuse a mask of TotalSegmentator 1, in which 35 to 41 are C7 to C1, 44 the heart and 50 the brain.

    In version 2, 42 to 50 are T2 to C1 and lie above 32 to 41, T12 to T3; C1 is not there with these but
    without all between; none is as large as a brain; and of C7 to C1 there is more than a speck.

    Source: TotalSegmentator, class map of task total in versions 1.5 and 2.
    """
    axis = int(np.abs(grid.steps_mm[2] / np.linalg.norm(grid.steps_mm, axis=0)).argmax())
    whole = crop if crop.dtype == np.uint8 else np.rint(crop).astype(np.uint8)
    planes = [np.ascontiguousarray(plane) for plane in np.moveaxis(whole, axis, 0)]
    voxels = np.stack([cv2.calcHist([plane], [0], None, [51], [0, 51]).ravel() for plane in planes])
    sizes_mm3 = voxels.sum(axis=0) * abs(np.linalg.det(grid.steps_mm))
    numbers = 32 + np.flatnonzero(sizes_mm3[32:] > _SPECK_MM3)
    heights_mm = np.arange(len(planes)) @ voxels[:, numbers] / voxels[:, numbers].sum(axis=0)
    heights_mm *= grid.steps_mm[2, axis]
    is_upper, wrong = numbers > 41, sizes_mm3[44:].max() > _NO_VERTEBRA_MM3
    wrong |= numbers.max(initial=0) < 44 and bool({*_NECK_1} & {*numbers.tolist()})
    if is_upper.any() and not is_upper.all():
        wrong |= numbers[is_upper].tolist() == [50]
        wrong |= heights_mm[is_upper].min() <= heights_mm[~is_upper].max()
    if wrong:
        raise ValueError(
            f"{path.name}: its labels 32 to 50 are not T12 to C1, one above the other, each as large as a "
            f"vertebra. It is {_VERSION_1.format(', or upside down')}"
        )


def _field(volume: Volume, shape: tuple[int, ...], grid: Grid) -> Box:
    """Half-open ranges of the volume's voxels whose middles the mask's grid covers, by its corners."""
    indices = volume.indices(grid.origin_mm + corners(shape, 0.5) @ grid.steps_mm.T)
    low, high = np.ceil(indices.min(axis=0) - 1e-6), np.floor(indices.max(axis=0) + 1e-6) + 1
    low, high = np.maximum(low, 0), np.minimum(high, volume.hu.shape)
    return tuple(zip(low.astype(int).tolist(), high.astype(int).tolist(), strict=True))


def _on_grid(labels: np.ndarray, grid: Grid, volume: Volume, array: np.ndarray) -> None:
    """Write labels into an array on the volume's grid: copied where theirs is the same, else the nearest."""
    try:
        turned = in_frame(labels, *grid)
    except ValueError:  # turned too far to be on the volume's grid
        return _nearest(labels, grid, volume, array)
    ours = corners(turned.hu.shape)
    theirs = volume.indices(turned.points(ours))
    low = np.rint(theirs[0]).astype(int)
    if np.abs(theirs - ours - low).max() > _SAME_GRID:
        return _nearest(labels, grid, volume, array)
    inside = list(zip(np.maximum(low, 0), np.minimum(low + turned.hu.shape, array.shape), strict=True))
    if all(a < b for a, b in inside):
        there = tuple(slice(a - s, b - s) for (a, b), s in zip(inside, low, strict=True))
        _fill(array[tuple(slice(a, b) for a, b in inside)], turned.hu[there])
    return None


def _nearest(labels: np.ndarray, grid: Grid, volume: Volume, array: np.ndarray) -> None:
    """Write into each voxel of an array on the volume's grid the label whose voxel it lies in."""
    part = slices_of(_field(volume, labels.shape, grid))
    if any(s.start >= s.stop for s in part):
        return
    sitk = simpleitk()
    spacing = np.linalg.norm(grid.steps_mm, axis=0)
    image = sitk.GetImageFromArray(labels)
    image.SetSpacing(spacing[::-1].tolist())
    image.SetDirection((grid.steps_mm / spacing)[:, ::-1].ravel().tolist())
    image.SetOrigin(grid.origin_mm.tolist())
    resampler = sitk.ResampleImageFilter()
    resampler.SetNumberOfThreads(1)  # studies are packed in parallel, not parts of one
    resampler.SetInterpolator(sitk.sitkNearestNeighbor)
    resampler.SetSize([int(s.stop - s.start) for s in reversed(part)])
    resampler.SetOutputOrigin(volume.points([[s.start for s in part]])[0].tolist())
    resampler.SetOutputSpacing(volume.spacing_mm[::-1])
    resampler.SetOutputDirection(volume.direction[:, ::-1].ravel().tolist())
    _fill(array[part], sitk.GetArrayFromImage(resampler.Execute(image)))


def _fill(array: np.ndarray, labels: np.ndarray) -> None:
    """Write labels where the array is 0: where masks overlap, the upper vertebra's came first and stays."""
    if array.any():
        np.copyto(array, labels, where=array == 0)
    else:
        array[...] = labels


SMALL = 0.05  # of a vertebra's voxels
MAX_APART_MM = 10.0
BONE_HU = 150.0
OFF_BONE, WHOSE_MASK = "its mask does not lie on bone", "is the mask this CT's?"
MIN_BONE, LITTLE_BONE = 0.1, 0.35  # real lumbar vertebrae of the elderly, in 3 mm slices: 0.45 and more
MIN_VOLUME_MM3 = 1000.0  # a tenth of the smallest cervical vertebra
MAX_HEIGHT_MM, MAX_VOLUME_MM3 = 90.0, 75_000.0  # real C2: up to 75 mm; the largest of real L1 … L5: 66 cm³
_FACES = (("cranial", "caudal"), ("anterior", "posterior"), ("right", "left"))


@dataclass(frozen=True)
class Vertebra:
    """One vertebra of a study.

    Attributes:
        box: half-open index ranges along Z, Y and X.
        middle: of its largest piece along Z, in voxels: a stray piece far away does not move it.
        completeness: 1 where the field of view holds all of it; else 1 minus its cross-section at the edge
            that truncates it, as a share of its largest cross-section along that axis.
        warnings: what is odd about it, or was tidied.
        problem: why it cannot be packed; "" where it can.
    """

    box: Box
    middle: float
    completeness: float
    warnings: tuple[str, ...] = ()
    problem: str = ""


def find_vertebrae(label_map: LabelMap, volume: Volume) -> dict[str, Vertebra]:
    """Each vertebra that the label map holds, cranial first; specks are removed from the map, in place.

    Raises:
        ValueError: the vertebrae do not follow each other from C1 downwards, or one is as large as several.

    Example:
        >>> found = find_vertebrae(label_map, volume)  # doctest: +SKIP
    """
    lows = [low for low, _ in label_map.box]
    objects = ndimage.find_objects(label_map.array[slices_of(label_map.box)], max_label=len(VERTEBRAE))
    boxes = {
        level: tuple((low + s.start, low + s.stop) for low, s in zip(lows, box, strict=True))
        for level, box in zip(VERTEBRAE, objects, strict=True)
        if box is not None
    }
    found = {level: _examine(level, box, label_map, volume) for level, box in boxes.items()}
    good = {level: its for level, its in found.items() if not its.problem}
    wrong = [f"{b} above {a}" for a, b in itertools.pairwise(good) if good[b].middle <= good[a].middle]
    if wrong:
        raise ValueError(
            f"the mask has {', '.join(wrong)}: it is upside down against the CT, or its labels run the other "
            "way. Look at both in a viewer, and correct the mask's header or the scheme."
        )
    return found


def _examine(level: str, box: Box, label_map: LabelMap, volume: Volume) -> Vertebra:
    here = label_map.array[slices_of(box)]
    number = VERTEBRAE.index(level) + 1
    mask = here == number
    warnings, problem, large = [], "", 1
    middle = sum(box[0]) / 2
    pieces, count = ndimage.label(mask, structure=np.ones((3, 3, 3)))
    if count > 1:
        sizes, apart_mm = _pieces(pieces, count, volume.spacing_mm)
        largest = ndimage.find_objects(pieces)[sizes.argmax()][0]
        middle = box[0][0] + (largest.start + largest.stop) / 2
        far, small = apart_mm > MAX_APART_MM, sizes < SMALL * sizes.sum()
        large = int((~small).sum())
        if (far & ~small).any():
            problem = f"its mask is in {count} pieces, up to {apart_mm.max():.0f} mm apart; correct the mask"
        elif large > 1:
            warnings.append(f"in {large} pieces, up to {apart_mm[~small].max():.0f} mm apart")
        if (far & small).any():
            specks = np.isin(pieces, np.flatnonzero(far & small) + 1)
            here[specks], mask[specks] = 0, False
            away_mm = apart_mm[far & small].max()
            warnings.append(f"specks removed, up to {away_mm:.0f} mm away ({specks.sum()} voxels)")
            ((inner),) = ndimage.find_objects(mask.astype(np.uint8))
            box = tuple((low + s.start, low + s.stop) for (low, _), s in zip(box, inner, strict=True))
            mask = mask[inner]
    size_mm3 = float(np.count_nonzero(mask) * np.prod(volume.spacing_mm))
    height_mm = len(mask) * volume.spacing_mm[0]
    if size_mm3 > MAX_VOLUME_MM3 or (
        height_mm > MAX_HEIGHT_MM and (not problem or large > 2)  # two may be a vertebra and a mistake
    ):
        raise ValueError(
            f"{level} is {height_mm:.0f} mm high and {size_mm3 / 1000:.0f} cm³ in the mask, as large as "
            "several vertebrae: it looks like a binary mask of the whole spine. Take one with a label each."
        )
    if size_mm3 < MIN_VOLUME_MM3:
        problem = problem or f"its mask holds {size_mm3:.0f} mm³, a tenth of a vertebra at most"
    bone = float((volume.hu[slices_of(box)][mask] >= BONE_HU).mean())
    if bone < MIN_BONE:
        problem = problem or (
            f"{OFF_BONE} ({bone:.0%} of its voxels reach {BONE_HU:g} HU); it is of "
            "another series, or one of the headers is wrong"
        )
    elif bone < LITTLE_BONE:
        warnings.append(f"{bone:.0%} of its voxels reach {BONE_HU:g} HU, which is little; {WHOSE_MASK}")
    completeness, faces = _completeness(mask, box, label_map.field)
    if faces:
        warnings.append(f"truncated by the field of view ({' and '.join(faces)})")
    return Vertebra(box, middle, completeness, tuple(warnings), problem)


def _pieces(
    pieces: np.ndarray, count: int, spacing_mm: tuple[float, float, float]
) -> tuple[np.ndarray, np.ndarray]:
    """Voxels of each piece, and its distance in mm from the largest."""
    sizes = np.bincount(pieces.ravel())[1:]
    distance_mm = ndimage.distance_transform_edt(pieces != sizes.argmax() + 1, sampling=spacing_mm)
    return sizes, np.array(ndimage.minimum(distance_mm, pieces, np.arange(1, count + 1)))


def _completeness(mask: np.ndarray, box: Box, field: Box) -> tuple[float, list[str]]:
    """How much of the vertebra the field of view leaves, and which of its edges truncate it."""
    worst, faces = 0.0, []
    for axis, ((low, high), (start, stop)) in enumerate(zip(box, field, strict=True)):
        area = mask.sum(axis=tuple(i for i in range(3) if i != axis))
        for cut, end, face in ((low <= start, area[0], 0), (high >= stop, area[-1], 1)):
            if cut:
                worst = max(worst, float(end / area.max()))
                faces.append(_FACES[axis][face])
    return 1 - worst, faces
