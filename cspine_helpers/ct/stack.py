"""The slices of one CT series, ordered by their positions into a volume: what is repaired, and what refused.

- Positions along the slices' normal give the order. Two slices at one position, a gap beyond 1.5 times the
  usual step (slices are missing), other sizes, pixel spacings or orientations than most: refused. The usual
  step is the lower quartile, as a missing slice makes steps longer.
- Kernels, thicknesses, image types, series times or numbers that interleave (two reconstructions), steps
  below 0.6 times the usual one, slices shifted unevenly within their plane (two acquisitions): refused. One
  odd value here and there, acquisition numbers that alternate, instance numbers to and fro: warned of.
- Positions that are even but for their rounding: taken as even, with the mean step. Steps that are uneven,
  but not that far, one odd step, or one change of step: repaired, linear between neighbours.
- Slices shifted against each other within their plane (a tilted gantry): repaired, moved back by linear
  interpolation on a larger field; what no slice saw is air.
- Slices whose values cannot be those of their place: shifted, negated, noise, swapped bytes, one constant
  value from some row on: refused. Each may have a rescale of its own.
"""

import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import cv2
import numpy as np

from cspine_helpers.ct.volume import AIR_HU, Volume, in_frame
from cspine_helpers.files.paths import listing

# Off an even grid, in mm a coordinate and of a step: what headers make of one that round to 0.1 mm.
EVEN_MM, EVEN_STEP = 0.06, 0.2
CLOSE_STEP, MISSING_STEP = 0.6, 1.5  # of the usual step
SAME_STEPS = 1e-3  # of a pixel, that pixel spacing and orientation may differ
MAX_CHANGE, MIN_RUN = 2.1, 3  # from one step to another: so many times as long, so many of each
MIN_STEP_MM = 0.01  # closer than that, two slices are at one position
MAX_TILT_DEG = 35.0
MAX_BENT_PIXELS = 1.0  # off a straight line
MAX_VALUES = 8  # of a tag; more of them count images or rotations, not series
_TELLING = {  # tags that a series has one of
    "kernel": "convolution kernels",
    "image_type": "image types",
    "series_time": "series times",
    "series_number": "series numbers",
    "thickness": "slice thicknesses",
}
# A rescale is wrong where a slice lies so many times and HU nearer to its neighbour under the neighbour's,
# or lies so many HU from it and so many times nearer once it is shifted.
JUMP_RESCALED, MIN_RESCALED_HU = 1.5, 20.0
JUMP_SHIFTED, MIN_SHIFT_HU = 4.0, 150.0
ALIKE, UNLIKE, MIN_SPREAD_HU = 0.7, 0.1, 0.01  # correlation of neighbours, of slices that are not constant
WILD_HU, MAX_WILD = (-4096, 32000), 0.005  # beyond what CT measures; share of a slice
FILL_AIR_HU, FILL_APART_HU = -900, 50  # what air lies below; an image differs from its fill by


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
        if np.abs([np.linalg.norm(row) - 1, np.linalg.norm(column) - 1, row @ column]).max() > 0.01:
            return None
        return np.array([position, row * spacing[1], column * spacing[0]])


def stack(slices: Sequence[Slice], pixels: Sequence[np.ndarray] | np.ndarray) -> Volume:
    """A volume from the slices of one series, in any order.

    Args:
        slices: their headers.
        pixels: (Y, X) Hounsfield units of each, or all in one array, which is used as it is where it can be.

    Raises:
        ValueError: they make no volume; says which and why, as a clause without a full stop.
    """
    # 1. In the order of their places along the normal.
    frames = _checked_frames(slices)
    normal = _normal(frames)
    along_mm = frames[:, 0] @ normal
    if along_mm[0] > along_mm[-1]:
        normal, along_mm = -normal, -along_mm  # as they came, if that is an order: no pixel is moved
    order = np.argsort(along_mm, kind="stable")
    ordered, along_mm, frames = [slices[i] for i in order], along_mm[order], frames[order]
    if not _is_even(along_mm, normal):
        _check_steps([its.name for its in ordered], along_mm)
    is_in_order = isinstance(pixels, np.ndarray) and (np.diff(order) == 1).all()
    hu = np.asarray(pixels) if is_in_order else np.stack([pixels[i] for i in order])
    # 2. With values that fit those beside them.
    _check_values(ordered, hu)
    # 3. Straight, and at even steps.
    hu, (origin, column, row), tilted = _straight(hu, along_mm, frames, normal)
    hu, step_mm, uneven = _even(hu, along_mm, normal)
    volume = in_frame(hu, np.stack([normal * step_mm, row, column], axis=1), origin)
    # 4. With what is odd about the headers.
    odd = ["instance numbers do not run"] if _to_and_fro(ordered) else []
    counted = {"acquisition": "acquisition numbers"} | _one_of_few(ordered)
    odd += [f"{what} alternate" for tag, what in counted.items() if _alternate(ordered, tag)]
    found = "its {} along the slices, as where two acquisitions interleave; look at the sheet"
    warnings = (*tilted, *uneven, *map(found.format, odd), *volume.warnings)
    return replace(volume, frames=_numbered(ordered), warnings=warnings)


def reconstructions(slices: list[Slice]) -> tuple[list[list[Slice]], str]:
    """Slices of one series, divided into the series that they really are, where these interleave.

    A tag that tells reconstructions apart and alternates along the slices does it. Acquisition numbers alone
    do not, where the slices are even and numbered in their order.

    Returns:
        The series in the order of their first slices here, and what tells them apart; "" if it is one.
    """
    if len(slices) < 2 or any(its.frame is None for its in slices):
        return [slices], ""
    frames = np.array([its.frame for its in slices])
    normal = _normal(frames)
    along_mm = frames[:, 0] @ normal
    order = np.argsort(along_mm, kind="stable")
    ordered, along_mm = [slices[i] for i in order], along_mm[order]
    telling = {
        tag: what for tag, what in _one_of_few(slices).items() if _interleave(ordered, along_mm, normal, tag)
    }
    is_one = _is_even(along_mm, normal) and not _to_and_fro(ordered)
    if _alternate(ordered, "acquisition") and (telling or not is_one):
        telling["acquisition"] = "acquisition numbers"
    parts: dict[tuple[str | None, ...], list[Slice]] = {}
    for its in slices:
        parts.setdefault(tuple(its.tags[tag] for tag in telling), []).append(its)
    counted = (f"{len({its.tags[tag] for its in slices})} {what}" for tag, what in telling.items())
    return list(parts.values()), ", ".join(counted)


# Places.


def _checked_frames(slices: Sequence[Slice]) -> np.ndarray:
    """(N, 3, 3): where slices of one size, pixel spacing and orientation lie, see `Slice.frame`."""
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
    frames = np.array([s.frame for s in slices])
    usual = np.median(frames[:, 1:], axis=0)
    apart = np.abs(frames[:, 1:] - usual).max(axis=(1, 2))
    wrong = np.flatnonzero(apart > SAME_STEPS * np.linalg.norm(usual, axis=1).max())
    odd = [f"{slices[i].name!r} ({_axes(frames[i, 1:])})" for i in wrong.tolist()]
    _refuse_odd("pixel spacing or orientation", _axes(usual), odd, len(slices))
    return frames


def _refuse_odd(what: str, usual: str, odd: list[str], total: int) -> None:
    if odd:
        raise ValueError(
            f"{len(odd)} of {total} slices have another {what} than the rest ({usual}): "
            f"{listing(odd, quoted=False)}. Scouts and reformatted slices are none of the volume: move them "
            "out of the folder"
        )


def _by(shape: tuple[int, ...]) -> str:
    return " × ".join(map(str, reversed(shape)))


def _axes(steps: np.ndarray) -> str:
    lengths = np.linalg.norm(steps, axis=1)
    cosines = "\\".join(f"{value + 0.0:.3f}" for value in (steps / lengths[:, None]).ravel())
    return f"{lengths[0]:.3f} × {lengths[1]:.3f} mm, {cosines}"


def _normal(frames: np.ndarray) -> np.ndarray:
    normal = np.cross(frames[0, 1], frames[0, 2])
    return normal / np.linalg.norm(normal)


def _is_even(along_mm: np.ndarray, normal: np.ndarray) -> bool:
    """Whether positions lie on even steps, but for the rounding of each of their coordinates."""
    count = np.arange(len(along_mm))
    step, first = np.polyfit(count, along_mm, 1)
    off = np.ptp(along_mm - first - step * count) / 2
    return bool(step >= MIN_STEP_MM and off <= min(EVEN_MM * np.abs(normal).sum(), EVEN_STEP * step))


def _check_steps(names: list[str], along_mm: np.ndarray) -> None:
    """Refuse steps that are no uneven spacing: slices twice, slices missing, two acquisitions."""
    steps = np.diff(along_mm)
    beside = [f"{one!r} and {other!r}" for one, other in itertools.pairwise(names)]
    if twice := [beside[i] for i in np.flatnonzero(steps < MIN_STEP_MM)]:
        raise ValueError(
            f"slices at the same position: {listing(twice, quoted=False)}. Keep one of each, or one "
            "acquisition a folder"
        )
    if _finer_step(steps):
        return
    close = np.flatnonzero(steps < CLOSE_STEP * np.median(steps))
    odd = np.abs(steps - np.median(steps)) > 2 * EVEN_MM
    if close.size and (odd.sum() > 1 or len(steps) <= MIN_RUN):  # one among even ones is uneven spacing
        raise ValueError(
            f"slices lie closer together than the rest, {steps.min():.2f} mm for {np.median(steps):.2f} mm "
            f"({close.size} times, first {', '.join(beside[i] for i in close[:5])}): two acquisitions in one "
            "series? Keep one a folder"
        )
    usual = float(np.quantile(np.delete(steps, close), 0.25, method="lower"))
    gaps = [f"{steps[i]:.2f} mm between {beside[i]}" for i in np.flatnonzero(steps > MISSING_STEP * usual)]
    if gaps:
        raise ValueError(
            f"slices are missing: steps of {usual:.2f} mm as a rule, but {listing(gaps, quoted=False)}. "
            "Complete the series, or keep the part above or below the gap"
        )


def _finer_step(steps: np.ndarray) -> float | None:
    """The smaller of two steps, where some of one length are followed by some of another; None elsewhere."""
    low, high = sorted((steps[0], steps[-1]))
    if high - low <= 2 * EVEN_MM or high > MAX_CHANGE * low:
        return None
    before, after = (np.abs(steps - end) <= 2 * EVEN_MM for end in (steps[0], steps[-1]))
    changing = np.flatnonzero(~(before | after))  # one step may lead from the one to the other
    in_order = before[: before.sum()].all() and after[len(steps) - after.sum() :].all()
    one_between = len(changing) == 0 or (len(changing) == 1 and low < steps[changing[0]] < high)
    if in_order and one_between and min(before.sum(), after.sum()) >= MIN_RUN:
        return float(min(np.median(steps[before]), np.median(steps[after])))
    return None


def _straight(
    hu: np.ndarray, along_mm: np.ndarray, frames: np.ndarray, normal: np.ndarray
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Slices (N, Y, X) moved back within their plane, so that each lies straight below the one before.

    Returns:
        The slices, the first one's frame, and what was done.
    """
    frame, down_mm = frames[0].copy(), along_mm - along_mm[0]
    drift_mm = frames[:, 0] - frame[0] - np.outer(down_mm, normal)
    sides_mm = np.linalg.norm(frame[1:], axis=1)
    offsets = drift_mm @ (frame[1:] / sides_mm[:, None] ** 2).T  # (N, 2) pixels: columns, rows
    low, high = offsets.min(axis=0), offsets.max(axis=0)
    rounding = 2 * EVEN_MM * np.abs(frame[1:]).sum(axis=1) / sides_mm**2  # in pixels
    if (high - low <= rounding).all():
        return hu, frame, []
    tilt_deg = np.rad2deg(np.arctan2(np.hypot(*((high - low) * sides_mm)), down_mm[-1]))
    if tilt_deg > MAX_TILT_DEG:
        raise ValueError(
            f"its slices are shifted against each other by {tilt_deg:.0f}°, more than a gantry tilts. "
            "Take the original series, or resample it"
        )
    bent = np.abs(offsets - np.outer(down_mm / down_mm[-1], offsets[-1])).max()
    if bent > MAX_BENT_PIXELS:
        raise ValueError(
            f"its slices are shifted against each other by up to {bent:.1f} pixels, but not evenly as by a "
            "tilted gantry: two acquisitions in one series? Keep one a folder"
        )
    low, high = np.floor(low), np.ceil(high)
    columns, rows = (high - low).astype(int)
    moved = np.empty((len(hu), hu.shape[1] + rows, hu.shape[2] + columns), hu.dtype)
    for plane, target, (dx, dy) in zip(hu, moved, offsets - low, strict=True):
        move = np.array([[1, 0, dx], [0, 1, dy]])
        cv2.warpAffine(plane, move, target.shape[::-1], dst=target, borderValue=AIR_HU)
    frame[0] += low @ frame[1:]
    note = f"its slices are shifted against each other by {tilt_deg:.1f}° (gantry tilt); moved back, linear"
    return moved, frame, [f"{note} between pixels"]


def _even(hu: np.ndarray, along_mm: np.ndarray, normal: np.ndarray) -> tuple[np.ndarray, float, list[str]]:
    """Slices (N, Y, X) at even steps, linear between neighbours where needed; the step; what was done."""
    first, last, steps = along_mm[0], along_mm[-1], np.diff(along_mm)
    if _is_even(along_mm, normal):
        return hu, (last - first) / len(steps), []
    count = round((last - first) / (_finer_step(steps) or float(np.median(steps)))) + 1
    places_mm = np.linspace(first, last, count)
    above = np.clip(np.searchsorted(along_mm, places_mm, side="right") - 1, 0, len(steps) - 1)
    share = ((places_mm - along_mm[above]) / steps[above]).astype(np.float32)
    even = np.empty((count, *hu.shape[1:]), hu.dtype)
    for k, (i, w) in enumerate(zip(above, share, strict=True)):
        mixed = hu[i] * (1 - w) + hu[i + 1] * w
        even[k] = mixed if hu.dtype.kind == "f" else np.rint(mixed)
    note = f"its slices lie {steps.min():.2f} to {steps.max():.2f} mm apart; resampled to even steps, linear"
    return even, (last - first) / (count - 1), [f"{note} between slices"]


# Values.


def _check_values(ordered: Sequence[Slice], hu: np.ndarray) -> None:
    """Refuse slices whose Hounsfield units cannot be those of the place that they lie at.

    Between slices of real CT, cut along any axis, 1 to 15 mm apart:

    - Rescale: each slice may have its own. It is wrong where the slice agrees with its neighbour under the
      neighbour's rescale, or once all its values are shifted, but not as it is. A shift explained 1.4 times
      as well at most; with 1024 HU too much in one of them, 8 times at least.
    - Likeness: beside neighbours that correlate at 0.7 or more, the next two did at 0.17 or more, but for
      air; noise did at 0.03 at most, and negated slices at -0.7. Swapped bytes throw a hundredth of it and
      more beyond what CT measures, where no right slice has any.
    - Fill: see `_filled`.
    """
    stride = max(1, min(hu.shape[1:]) // 128)
    planes = hu[:, ::stride, ::stride].astype(np.float32)
    if filled := _filled(planes):
        raise ValueError(
            f"{len(filled)} slices hold one constant value where their neighbours hold an image, as where a "
            f"download broke off: {listing([ordered[k].name for k in filled])}. Take the original files"
        )
    rescales = [_rescale(its) for its in ordered]
    usual, odd, breaks = Counter(rescales), set[int](), list[int]()
    unlike, seen = _unlike(planes), planes != AIR_HU  # what is AIR_HU may be padding
    for k, pair in enumerate(itertools.pairwise(rescales)):
        both = seen[k] & seen[k + 1]
        if not unlike[k] and not (both.any() and _jumps(planes[k][both], planes[k + 1][both], *pair)):
            continue
        if pair[0] == pair[1]:
            breaks.append(k)
        else:
            rare = min(usual[its] for its in pair)
            odd |= {i for i in (k, k + 1) if usual[rescales[i]] == rare}
    # Each break leads from right slices to wrong ones or back: these are fewer.
    wrong = np.searchsorted(breaks, np.arange(len(hu))) % 2 == 1
    wrong ^= 2 * wrong.sum() > len(hu)
    odd |= {i for k in breaks for i in (k, k + 1) if wrong[i]}
    if odd:
        shown = "; ".join(
            f"slope {slope:g} and intercept {intercept:g} in {count}"
            for (slope, intercept), count in usual.most_common(3)
        )
        cause = f", as where a rescale is wrong; the series has {shown} of {len(hu)}"
        raise ValueError(
            f"values of {len(odd)} slices jump against their neighbours'{cause if len(usual) > 1 else ''}: "
            f"{listing([ordered[i].name for i in sorted(odd)])}. Take the original files"
        )


def _filled(planes: np.ndarray) -> list[int]:
    """Indices of slices (N, Y, X) that are one constant value, wholly or from some row to their end.

    The nearest slice that is not wholly so holds other values there, in a third of the pixels or more. From
    some row on: by a sixteenth of the rows more than there. Air: only if this holds on both sides, and for a
    quarter of the rows, as it may lie beyond the head or the field of view.
    """
    height, ends = planes.shape[1], planes[:, -1, -1]
    same = (planes == planes[:, -1:, -1:]).all(axis=2)[:, ::-1]
    runs = np.where(same.all(axis=1), height, same.argmin(axis=1))
    is_air = ends <= FILL_AIR_HU

    def is_lost(k: int, other: int) -> bool:
        start, stop = height - runs[k], height - runs[other]
        apart = np.abs(planes[other, start:stop] - ends[k]) > FILL_APART_HU
        return bool(stop - start >= max(height / (4 if is_air[k] else 16), 2) and apart.mean() > 0.3)

    images, found = np.flatnonzero(runs < height), list[int]()
    for k in range(len(planes)):
        beside = images[images < k][-1:], images[images > k][:1]
        lost = [is_lost(k, int(other)) for side in beside for other in side]
        if any(lost) and (not is_air[k] or lost == [True, True]):
            found.append(k)
    return found


def _unlike(planes: np.ndarray) -> np.ndarray:
    """Whether each two neighbours of the slices (N, Y, X) are unlike, where a pair beside them is alike."""
    values = np.clip(planes, AIR_HU, 3071).reshape(len(planes), -1)
    has_body = (values > FILL_AIR_HU).mean(axis=1) > 0.02
    values -= values.mean(axis=1, keepdims=True)
    lengths = np.linalg.norm(values, axis=1)
    has_body &= lengths > MIN_SPREAD_HU * np.sqrt(values.shape[1])
    values /= np.where(has_body, lengths, 1)[:, None]
    likeness = np.full(len(planes) + 1, np.nan)  # of neighbours; at both ends there are none
    products = np.einsum("ij,ij->i", values[:-1], values[1:])
    likeness[1:-1] = np.where(has_body[:-1] & has_body[1:], products, np.nan)
    is_alike = likeness >= ALIKE
    wild = ((planes < WILD_HU[0]) | (planes > WILD_HU[1])).mean(axis=(1, 2))
    is_wild = np.diff(wild > MAX_WILD)
    return is_wild | ((likeness[1:-1] < UNLIKE) & (is_alike[:-2] | is_alike[2:]))


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
    given = its.numbers("slope", 1), its.numbers("intercept", 1)
    slope, intercept = (0.0 if number is None else number.item() for number in given)
    return slope or 1.0, intercept


# Tags along the slices.


def _one_of_few(slices: Sequence[Slice]) -> dict[str, str]:
    """The tags that a series has one of, where the slices do not have too many to be series."""
    return {
        tag: what
        for tag, what in _TELLING.items()
        if len({its.tags.get(tag) for its in slices}) <= MAX_VALUES
    }


def _interleave(ordered: Sequence[Slice], along_mm: np.ndarray, normal: np.ndarray, tag: str) -> bool:
    """Whether a tag's values come back again and again, or each has a stack by itself between the others.

    One odd slice, odd ends, or a part within another are one series. So are slices without the tag here and
    there, unless they are a stack by themselves.
    """
    values = [its.tags.get(tag) for its in ordered]
    given = _runs(value for value in values if value)
    if len(given) - len(set(given)) > len(ordered) / 4:
        return True
    if len(_runs(values)) == len(set(values)):
        return False
    parts = (along_mm[[value == its for value in values]] for its in set(values))
    return all(len(part) >= MIN_RUN and _is_even(part, normal) for part in parts)


def _alternate(ordered: Sequence[Slice], tag: str) -> bool:
    """Whether a tag comes back to a value that it had left; slices without it say nothing."""
    runs = _runs(its.tags.get(tag) for its in ordered if its.tags.get(tag))
    return len(runs) > len(set(runs))


def _runs(values: Iterable[str | None]) -> list[str | None]:
    return [value for value, _ in itertools.groupby(values)]


def _to_and_fro(ordered: Sequence[Slice]) -> bool:
    """Whether instance numbers both rise and fall along the slices."""
    steps = np.diff(list(_numbered(ordered) or ()))
    return bool((steps > 0).any() and (steps < 0).any())


def _numbered(slices: Sequence[Slice]) -> dict[int, np.ndarray] | None:
    """InstanceNumber → frame; None where slices have none, or share one."""
    numbers = [s.numbers("number", 1) for s in slices]
    frames = {int(n[0]): s.frame for n, s in zip(numbers, slices, strict=True) if n is not None}
    return frames if len(frames) == len(slices) else None  # type: ignore[return-value]  # all have a frame
