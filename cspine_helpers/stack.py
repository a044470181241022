"""The slices of one CT series, put in order by their positions into a volume: what is repaired, what refused.

- Positions along the slices' normal give the order. Two slices at one position, a gap beyond 1.5 times the
  usual step (slices are missing), other sizes, pixel spacings or orientations than most: refused. The usual
  step is the lower quartile, as a missing slice makes steps longer.
- Steps below 0.6 times the usual one, acquisitions that interleave, and slices shifted unevenly within their
  plane: refused, as two acquisitions in one series.
- Instance numbers that jump to and fro along the slices: warned of, as acquisitions may interleave unseen.
- Steps that are uneven, but not that far: repaired, linear between neighbours, on even steps.
- Slices shifted against each other within their plane (a tilted gantry): repaired, moved back by linear
  interpolation on a larger field; what no slice saw is air.
- Slices whose values jump against their neighbours', as where a rescale is wrong: refused. Each may have a
  rescale of its own.
"""

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import cv2
import numpy as np

from cspine_helpers.paths import listing
from cspine_helpers.volume import AIR_HU, Volume, in_frame

EVEN_MM, EVEN_STEP = 0.02, 0.01  # off an even grid, in mm and of a step: what rounded headers make of one
CLOSE_STEP, MISSING_STEP = 0.6, 1.5  # of the usual step
SAME_STEPS = 1e-3  # of a pixel, that pixel spacing and orientation may differ
MIN_STEP_MM = 0.01  # closer than that, two slices are at one position
MAX_DRIFT_PIXELS = 0.1  # over the whole series, before it is repaired
MAX_TILT_DEG = 35.0
MAX_BENT_PIXELS = 1.0  # off a straight line
# A rescale is wrong where a slice lies so many times and HU nearer to its neighbour under the neighbour's,
# or lies so many HU from it and so many times nearer once it is shifted.
JUMP_RESCALED, MIN_RESCALED_HU = 1.5, 20.0
JUMP_SHIFTED, MIN_SHIFT_HU = 4.0, 150.0


@dataclass(frozen=True)
class Slice:
    """One slice without its pixels: file name, size as (rows, columns), header texts."""

    name: str
    shape: tuple[int, ...]
    tags: dict[str, str | None]

    def numbers(self, tag: str, count: int) -> np.ndarray | None:
        """The numbers of a header; None where it has not so many finite ones."""
        try:
            values = np.array([float(part) for part in (self.tags[tag] or "").split("\\")])
        except ValueError:
            return None
        return values if values.shape == (count,) and np.isfinite(values).all() else None

    @cached_property
    def frame(self) -> np.ndarray | None:
        """(3, 3) rows: patient coordinates of the first pixel's middle, step per column, per row; or None.

        Source: DICOM PS3.3 section C.7.6.2.1.1 (Image Position, Image Orientation, Pixel Spacing).
        """
        position, axes = self.numbers("position", 3), self.numbers("orientation", 6)
        spacing = self.numbers("pixel_spacing", 2)
        if position is None or axes is None or spacing is None or spacing.min() <= 0:
            return None
        row, column = axes[:3], axes[3:]
        if (
            abs(np.linalg.norm(row) - 1) > 0.01
            or abs(np.linalg.norm(column) - 1) > 0.01
            or abs(row @ column) > 0.01
        ):
            return None
        return np.array([position, row * spacing[1], column * spacing[0]])


@dataclass(frozen=True)
class _Geometry:
    """Of slices in order: (N, Y, X) values, their positions along the normal, in-plane offsets in pixels."""

    hu: np.ndarray
    along_mm: np.ndarray  # (N,)
    offsets: np.ndarray  # (N, 2): columns, rows
    frame: np.ndarray  # of the first slice
    normal: np.ndarray
    warnings: list[str] = field(default_factory=list)


def stack(slices: Sequence[Slice], pixels: Sequence[np.ndarray] | np.ndarray) -> Volume:
    """A volume from the slices of one series, in any order.

    Args:
        slices: their headers.
        pixels: (Y, X) Hounsfield units of each, or all in one array, which is used as it is where it can be.

    Raises:
        ValueError: they make no volume; says which and why, as a clause without a full stop.
    """
    _check_alike(slices)
    normal = _normal(slices[0])
    along_mm = np.array([_frame(s)[0] @ normal for s in slices])
    if along_mm[0] > along_mm[-1]:
        normal, along_mm = -normal, -along_mm  # as they came, if that is an order: no pixel is moved
    order = np.argsort(along_mm, kind="stable")
    ordered, along_mm = [slices[i] for i in order], along_mm[order]
    _check_steps(ordered, along_mm)
    origin, column, row = _frame(ordered[0])
    drift_mm = np.array([_frame(s)[0] - origin for s in ordered]) - np.outer(along_mm - along_mm[0], normal)
    offsets = np.stack([drift_mm @ step / (step @ step) for step in (column, row)], axis=1)
    if isinstance(pixels, np.ndarray) and (np.diff(order) == 1).all():
        hu = pixels
    else:
        hu = np.stack([pixels[i] for i in order])
    _check_values(ordered, hu)
    geometry = _Geometry(hu, along_mm, offsets, _frame(ordered[0]), normal)
    geometry = _even(_straight(geometry))
    step_mm = (geometry.along_mm[-1] - geometry.along_mm[0]) / (len(geometry.along_mm) - 1)
    origin, column, row = geometry.frame
    volume = in_frame(geometry.hu, np.stack([normal * step_mm, row, column], axis=1), origin)
    frames = _numbered(ordered)
    runs = np.diff(list(frames or ()))
    if (runs > 0).any() and (runs < 0).any():
        geometry.warnings.append(
            "its instance numbers do not run along the slices, as where two acquisitions interleave; look "
            "at the sheet"
        )
    warnings = (*geometry.warnings, *volume.warnings)
    return replace(volume, frames=frames, warnings=warnings)


def _frame(found: Slice) -> np.ndarray:
    assert found.frame is not None  # _check_alike
    return found.frame


def _normal(found: Slice) -> np.ndarray:
    normal = np.cross(_frame(found)[1], _frame(found)[2])
    return normal / np.linalg.norm(normal)


def _check_alike(slices: Sequence[Slice]) -> None:
    if lost := [s.name for s in slices if s.frame is None]:
        raise ValueError(
            f"{len(lost)} of {len(slices)} slices have no usable position, orientation or pixel spacing in "
            f"their headers: {listing(lost)}. Take the original files, or move these out of the folder"
        )
    if len(slices) < 2:
        raise ValueError(
            f"only one slice, {slices[0].name!r}; a volume needs two or more. Give the whole series"
        )
    size, _ = Counter(s.shape for s in slices).most_common(1)[0]
    odd = [f"{s.name!r} ({_by(s.shape)} pixels)" for s in slices if s.shape != size]
    _refuse_odd("size", f"{_by(size)} pixels", odd, len(slices))
    steps = np.array([_frame(s)[1:] for s in slices])  # (N, 2, 3) mm
    usual = np.median(steps, axis=0)
    apart = np.abs(steps - usual).max(axis=(1, 2)) > SAME_STEPS * np.linalg.norm(usual, axis=1).max()
    odd = [f"{slices[i].name!r} ({_axes(steps[i])})" for i in np.flatnonzero(apart).tolist()]
    _refuse_odd("pixel spacing or orientation", _axes(usual), odd, len(slices))


def _refuse_odd(what: str, usual: str, odd: list[str], total: int) -> None:
    if odd:
        raise ValueError(
            f"{len(odd)} of {total} slices have another {what} than the rest ({usual}): {', '.join(odd)}. "
            "Scouts and reformatted slices are none of the volume: move them out of the folder"
        )


def _by(shape: tuple[int, ...]) -> str:
    return " × ".join(map(str, reversed(shape)))


def _axes(steps: np.ndarray) -> str:
    lengths = np.linalg.norm(steps, axis=1)
    cosines = "\\".join(f"{value + 0.0:.3f}" for value in (steps / lengths[:, None]).ravel())
    return f"{lengths[0]:.3f} × {lengths[1]:.3f} mm, {cosines}"


def _check_steps(ordered: Sequence[Slice], along_mm: np.ndarray) -> None:
    steps = np.diff(along_mm)
    names = [s.name for s in ordered]
    _check_acquisitions(ordered)
    if twice := [f"{names[i]!r} and {names[i + 1]!r}" for i in np.flatnonzero(steps < MIN_STEP_MM)]:
        raise ValueError(
            f"slices at the same position: {', '.join(twice)}. Keep one of each, or one acquisition a folder"
        )
    close = np.flatnonzero(steps < CLOSE_STEP * np.median(steps))
    if close.size:
        where = ", ".join(f"{names[i]!r} and {names[i + 1]!r}" for i in close[:5])
        raise ValueError(
            f"slices lie closer together than the rest, {steps.min():.2f} mm for {np.median(steps):.2f} mm "
            f"({close.size} times, first {where}): two acquisitions in one series? Keep one a folder"
        )
    usual = float(np.quantile(steps, 0.25, method="lower"))
    gaps = np.flatnonzero(steps > MISSING_STEP * usual)
    if gaps.size:
        where = ", ".join(f"{steps[i]:.2f} mm between {names[i]!r} and {names[i + 1]!r}" for i in gaps)
        raise ValueError(
            f"slices are missing: steps of {usual:.2f} mm as a rule, but {where}. Complete the series, or "
            "keep the part above or below the gap"
        )


def _check_acquisitions(ordered: Sequence[Slice]) -> None:
    """Refuse acquisitions that interleave: each is a part of the patient, one after the other."""
    runs = [number for number, _ in itertools.groupby(s.tags["acquisition"] for s in ordered)]
    if len(runs) > len(set(runs)):
        raise ValueError(
            f"slices of {len(set(runs))} acquisitions lie between each other. Keep one acquisition a folder"
        )


def _check_values(ordered: Sequence[Slice], hu: np.ndarray) -> None:
    """Refuse slices whose Hounsfield units jump against their neighbours', as where a rescale is wrong.

    Each slice may have a rescale of its own. It is wrong where the slice agrees with its neighbour under the
    neighbour's rescale, or once all its values are shifted, but not as it is. Between slices of real CT, cut
    along any axis, 1 to 15 mm apart, a shift explained 1.4 times as well at most; with 1024 HU too much in
    one of them, 8 times at least.
    """
    rescales = [_rescale(its) for its in ordered]
    usual, odd = Counter(rescales), dict[str, None]()
    stride = max(1, min(hu.shape[1:]) // 128)
    for k, pair in enumerate(itertools.pairwise(rescales)):
        above, below = hu[k : k + 2, ::stride, ::stride].astype(np.float32)
        seen = (above != AIR_HU) & (below != AIR_HU)  # what is AIR_HU may be padding
        if seen.any() and _jumps(above[seen], below[seen], *pair):
            rare = min(usual[its] for its in pair)
            odd |= {ordered[i].name: None for i in (k, k + 1) if usual[rescales[i]] == rare}
    if odd:
        shown = "; ".join(
            f"slope {slope:g} and intercept {intercept:g} in {count}"
            for (slope, intercept), count in usual.most_common(3)
        )
        raise ValueError(
            f"values of {len(odd)} slices jump against their neighbours', as where a rescale is wrong: "
            f"{listing(odd)}. The series has {shown} of {len(hu)} slices. Take the original files"
        )


def _jumps(
    above: np.ndarray, below: np.ndarray, its: tuple[float, float], other: tuple[float, float]
) -> bool:
    """Whether two slices' values (N,) agree under one of their rescales, or shifted, and not as they are."""
    apart = np.abs(below - above).mean()
    if its != other:
        alike = np.abs((below - other[1]) / other[0] * its[0] + its[1] - above).mean()
        if apart > max(JUMP_RESCALED * alike, alike + MIN_RESCALED_HU):
            return True
    if apart < MIN_SHIFT_HU:
        return False
    spreads = [np.abs(values - np.median(values)).mean() for values in (above, below)]
    shifted = np.abs(below - above - np.median(below - above)).mean()
    return bool(apart > JUMP_SHIFTED * shifted and shifted < 2 * min(spreads))  # else air beside the body


def _rescale(its: Slice) -> tuple[float, float]:
    """Slope and intercept as GDCM takes them: 1 and 0 where there are none."""
    slope, intercept = its.numbers("slope", 1), its.numbers("intercept", 1)
    return (1.0 if slope is None else float(slope[0]) or 1.0), (
        0.0 if intercept is None else float(intercept[0])
    )


def _straight(found: _Geometry) -> _Geometry:
    """Slices moved back within their plane, so that each lies straight below the one before."""
    low, high = found.offsets.min(axis=0), found.offsets.max(axis=0)
    if (high - low).max() <= MAX_DRIFT_PIXELS:
        return found
    drift_mm = np.hypot(*((high - low) * np.linalg.norm(found.frame[1:], axis=1)))
    tilt_deg = np.rad2deg(np.arctan2(drift_mm, found.along_mm[-1] - found.along_mm[0]))
    if tilt_deg > MAX_TILT_DEG:
        raise ValueError(
            f"its slices are shifted against each other by {tilt_deg:.0f}°, more than a gantry tilts. "
            "Take the original series, or resample it"
        )
    bent = found.offsets - np.outer(
        (found.along_mm - found.along_mm[0]) / (found.along_mm[-1] - found.along_mm[0]), found.offsets[-1]
    )
    if np.abs(bent).max() > MAX_BENT_PIXELS:
        raise ValueError(
            f"its slices are shifted against each other by up to {np.abs(bent).max():.1f} pixels, but not "
            "evenly as by a tilted gantry: two acquisitions in one series? Keep one a folder"
        )
    low, high = np.floor(low), np.ceil(high)
    (columns, rows), (_, height, width) = (high - low).astype(int), found.hu.shape
    hu = np.empty((len(found.hu), height + rows, width + columns), found.hu.dtype)
    for k, (dx, dy) in enumerate(found.offsets - low):
        move = np.array([[1, 0, dx], [0, 1, dy]])
        cv2.warpAffine(found.hu[k], move, (hu.shape[2], hu.shape[1]), dst=hu[k], borderValue=AIR_HU)
    frame = found.frame.copy()
    frame[0] += low @ frame[1:]
    note = (
        f"its slices are shifted against each other by {tilt_deg:.1f}° (gantry tilt); moved back, linear "
        "between pixels"
    )
    return replace(found, hu=hu, frame=frame, warnings=[*found.warnings, note])


def _even(found: _Geometry) -> _Geometry:
    """Slices at even steps, linear between neighbours, where they are not."""
    steps = np.diff(found.along_mm)
    first, last, usual = found.along_mm[0], found.along_mm[-1], float(np.median(steps))
    even = np.linspace(first, last, len(found.along_mm))
    if np.abs(found.along_mm - even).max() <= max(EVEN_MM, EVEN_STEP * usual):
        return found
    count = round((last - first) / usual) + 1
    along_mm = np.linspace(first, last, count)
    above = np.clip(np.searchsorted(found.along_mm, along_mm, side="right") - 1, 0, len(steps) - 1)
    share = ((along_mm - found.along_mm[above]) / steps[above]).astype(np.float32)
    hu = np.empty((count, *found.hu.shape[1:]), found.hu.dtype)
    for k, (i, w) in enumerate(zip(above, share, strict=True)):
        mixed = found.hu[i] * (1 - w) + found.hu[i + 1] * w
        hu[k] = mixed if hu.dtype.kind == "f" else np.rint(mixed)
    note = (
        f"its slices lie {steps.min():.2f} to {steps.max():.2f} mm apart; resampled to even steps, linear "
        "between slices"
    )
    return replace(found, hu=hu, along_mm=along_mm, warnings=[*found.warnings, note])


def _numbered(slices: Sequence[Slice]) -> dict[int, np.ndarray] | None:
    """InstanceNumber → frame; None where slices have none, or share one."""
    numbers = [s.numbers("number", 1) for s in slices]
    frames = {int(n[0]): _frame(s) for n, s in zip(numbers, slices, strict=True) if n is not None}
    return frames if len(frames) == len(slices) else None
