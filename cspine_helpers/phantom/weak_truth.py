"""What is known of a cohort as RSNA 2022 is known: slices of few studies, a segmenter's masks, wrong labels.

The phantoms are those of full truth; only what is said of them is less, and in part wrong:

- Boxes, and from them slice truth (`packing.slice_truth`), are there for few of the fractured studies.
- Masks are a segmenter's. Now and then it gives part of a vertebra to its neighbour, or loses most of it. A
  vertebra that it loses whole has no sequence, and packing leaves it out (`not in the mask`). Training asks
  for all seven, so here a part stays that packing takes: a bad crop, as a lost vertebra is, but a sequence.
- A few vertebrae have the wrong label.
"""

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from cspine_helpers.ct.volume import FRAME, Volume
from cspine_helpers.labels import VERTEBRAE
from cspine_helpers.phantom.rendering import Study, smooth_noise

_PAD = 5  # voxels around a vertebra that its mask may grow or move into
_RAGGED_VOXELS = 4  # from one tooth of a mask's border to the next


@dataclass(frozen=True)
class WeakTruth:
    """How much is known, and how much of it is wrong.

    Attributes:
        boxed: share of studies with boxes among those with 1, 2, 3, 4, and more fractured vertebrae: 235 of
            2,019 in all. Source: label table and boxes of the Cervical Spine Fracture Detection Dataset,
            Copyright RSNA, 2023 (103 of 623, 70 of 239, 34 of 64, 21 of 26, 7 of 9 studies).
        wrong_labels: share of vertebrae whose label is the other one. Nobody has counted RSNA's; in public
            test sets it is 3 % on average (Source: Northcutt et al., NeurIPS Datasets and Benchmarks 2021).
        failed_masks: share of vertebrae of which a part is called by the neighbour's name, or is lost, as
            often. Source: "roughly 1-2% of cases" (the author of TotalSegmentator, its issue 291).
        failed_part: how much of a vertebra is then wrong, from and to.
        border_mm: mean, and standard deviation from vertebra to vertebra, by which a mask is too large.
        ragged_mm: standard deviation of its border from place to place. Both are below the voxel of 1.5 mm
            that segmenters see (Source: Wasserthal et al., Radiol Artif Intell 5(5), 2023).
        shift_voxels: standard deviation, before rounding, by which a mask is off along each axis.
    """

    boxed: tuple[float, ...] = (103 / 623, 70 / 239, 34 / 64, 21 / 26, 7 / 9)
    wrong_labels: float = 0.01
    failed_masks: float = 0.02
    failed_part: tuple[float, float] = (0.3, 0.7)
    border_mm: tuple[float, float] = (0.2, 0.4)
    ragged_mm: float = 0.5
    shift_voxels: float = 0.6


def wrong_labels(fractured: dict[str, int], weak: WeakTruth, rng: np.random.Generator) -> dict[str, int]:
    """Labels of C1–C7 as they get into the table."""
    wrong = rng.random(len(VERTEBRAE)) < weak.wrong_labels
    return {level: fractured[level] ^ int(its) for level, its in zip(VERTEBRAE, wrong, strict=True)}


def has_boxes(labelled: dict[str, int], weak: WeakTruth, rng: np.random.Generator) -> bool:
    """Whether somebody drew boxes in a study of these labels."""
    count = min(sum(labelled.values()), len(weak.boxed))
    return bool(rng.random() < (0.0, *weak.boxed)[count])


def segmented(study: Study, weak: WeakTruth, rng: np.random.Generator) -> np.ndarray:
    """The study's label map as a segmenter makes it, uint8 of its shape; each vertebra keeps some voxels."""
    true, found = _failed(study.label_map, weak, rng), np.zeros_like(study.label_map)
    for number, block in enumerate(ndimage.find_objects(true, max_label=len(VERTEBRAE)), start=1):
        low = [max(its.start - _PAD, 0) for its in block]
        high = [min(its.stop + _PAD, n) for its, n in zip(block, true.shape, strict=True)]
        block = tuple(map(slice, low, high))
        bone = true[block] == number
        inside, outside = (
            ndimage.distance_transform_edt(its, sampling=study.spacing_mm) for its in (bone, ~bone)
        )
        teeth = smooth_noise(bone.shape, _RAGGED_VOXELS, rng)
        edge = rng.normal(*weak.border_mm) + weak.ragged_mm / teeth.std() * teeth
        shift = np.rint(rng.normal(0, weak.shift_voxels, 3)).clip(-_PAD, _PAD).astype(int)
        mask = ndimage.shift(outside - inside < edge, shift, order=0)
        found[block][mask & (found[block] == 0)] = number
    return found


def _failed(label_map: np.ndarray, weak: WeakTruth, rng: np.random.Generator) -> np.ndarray:
    """A copy in which a part of some vertebrae, from one end on, is the neighbour's or nobody's."""
    label_map = label_map.copy()
    last = len(VERTEBRAE)
    for number in range(1, last + 1):
        fails, is_lost, part = rng.random(), rng.random() < 0.5, rng.uniform(*weak.failed_part)
        step = int(rng.choice([-1, 1]))
        if fails < weak.failed_masks:
            step = {1: 1, last: -1}.get(number, step)  # the neighbour is below C1, and above C7
            z, y, x = np.nonzero(label_map == number)
            taken = z * step > np.quantile(z * step, 1 - part)
            label_map[z[taken], y[taken], x[taken]] = 0 if is_lost else number + step
    return label_map


def framed(study: Study) -> Volume:
    """The study as a volume whose slices have their index as number, as its boxes have."""
    volume = Volume(study.volume_hu, study.spacing_mm, np.zeros(3), FRAME)
    steps = FRAME * np.array(study.spacing_mm)
    first = volume.points([(index, 0, 0) for index in range(len(study.volume_hu))])
    frames = {index: np.stack([point, steps[:, 2], steps[:, 1]]) for index, point in enumerate(first)}
    return Volume(study.volume_hu, study.spacing_mm, np.zeros(3), FRAME, frames)
