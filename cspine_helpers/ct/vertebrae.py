"""The vertebrae of a label map: where each lies, whether it is whole, and in one piece.

A mask that cannot be right is refused, and what was tidied is said:

- C1 … C7 follow each other downwards; else the mask is upside down, or its labels run the other way.
- Pieces up to 10 mm from the main one stay, as a displaced fragment may lie. Farther ones are removed where
  they are small, as they would stretch the box; else the mask is wrong.
- Of a binary mask, one label is the whole spine: it is taller or larger than any cervical vertebra.
- A vertebra has cortical bone: where less than a tenth of its voxels reach 150 HU, the mask lies beside it,
  and less than a third is warned of.
"""

import itertools
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from cspine_helpers.ct.masks import LabelMap
from cspine_helpers.ct.volume import Box, Volume, slices_of
from cspine_helpers.labels import VERTEBRAE

SMALL = 0.05  # of a vertebra's voxels
MAX_APART_MM = 10.0
BONE_HU = 150.0
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
            "way. Look at both in a viewer, and mend the mask's header or the scheme."
        )
    return found


def _examine(level: str, box: Box, label_map: LabelMap, volume: Volume) -> Vertebra:
    here = label_map.array[slices_of(box)]
    number = VERTEBRAE.index(level) + 1
    mask = here == number
    warnings, problem = [], ""
    middle = sum(box[0]) / 2
    pieces, count = ndimage.label(mask, structure=np.ones((3, 3, 3)))
    if count > 1:
        sizes, apart_mm = _pieces(pieces, count, volume.spacing_mm)
        largest = ndimage.find_objects(pieces)[sizes.argmax()][0]
        middle = box[0][0] + (largest.start + largest.stop) / 2
        far, small = apart_mm > MAX_APART_MM, sizes < SMALL * sizes.sum()
        if (far & ~small).any():
            problem = f"its mask is in {count} pieces, up to {apart_mm.max():.0f} mm apart; mend the mask"
        elif (~small).sum() > 1:
            warnings.append(f"in {(~small).sum()} pieces, up to {apart_mm[~small].max():.0f} mm apart")
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
    if size_mm3 > MAX_VOLUME_MM3 or (height_mm > MAX_HEIGHT_MM and not problem):
        raise ValueError(
            f"{level} is {height_mm:.0f} mm high and {size_mm3 / 1000:.0f} cm³ in the mask, as large as "
            "several vertebrae: it looks like a binary mask of the whole spine. Take one with a label each."
        )
    if size_mm3 < MIN_VOLUME_MM3:
        problem = problem or f"its mask holds {size_mm3:.0f} mm³, a tenth of a vertebra at most"
    bone = float((volume.hu[slices_of(box)][mask] >= BONE_HU).mean())
    if bone < MIN_BONE:
        problem = problem or (
            f"its mask does not lie on bone ({bone:.0%} of its voxels reach {BONE_HU:g} HU); it is of "
            "another series, or one of the headers is wrong"
        )
    elif bone < LITTLE_BONE:
        warnings.append(
            f"{bone:.0%} of its voxels reach {BONE_HU:g} HU, which is little; is the mask this CT's?"
        )
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
