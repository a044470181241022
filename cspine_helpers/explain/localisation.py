"""How well maps localise what is true: pointing game, energy, AUROC and IoU, beside trivial maps.

Maps are judged on the pixels of the image, bilinear between their cells, so that maps of different grids are
comparable; signed values stay as they are. Whatever cannot tell one place from another scores what chance
scores: ties are averaged, never broken in a map's favour. Shapes: N cases; maps (N, T, h, w) or (N, h, w) on
their own grid, truth (N, T, H, W) or (N, H, W).
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy.ndimage import sobel
from scipy.spatial import KDTree

from cspine_helpers.evaluation.resampling import check_confidence, mean_by_patient, share_by_patient
from cspine_helpers.files.paths import listing
from cspine_helpers.files.tables import require_columns

TRIVIAL = ("uniform", "centre", "edges", "mask")  # maps that know nothing of the fracture
METRICS = ("pointing", "energy", "auroc", "auroc_inside", "iou")
TOLERANCE = 3.0  # pixels of a packed sequence: half the diagonal of a cell at stride 4
QUANTILES = (0.8, 0.85, 0.9, 0.925, 0.95, 0.96, 0.97, 0.975, 0.98, 0.985, 0.99, 0.9925, 0.995, 0.9975, 0.999)
_CENTRE = 0.25  # standard deviation of the centre prior, as a share of each side
_SAME = 1e-9


@runtime_checkable
class OfPixels(Protocol):
    """Maps that know the size of the image they are of, such as `explain.maps.Maps`."""

    def pixels(self) -> NDArray[np.float32]:
        """Raw and signed, on the image's pixels: between the centres of their cells, wherever these lie."""

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) of the image, pixels."""


AnyMaps = ArrayLike | OfPixels


# 1. Maps that know nothing.


def trivial_maps(pixels: ArrayLike, *, inside: ArrayLike | None = None) -> dict[str, NDArray[np.float32]]:
    """Maps that no explanation deserves its name without beating.

    Args:
        pixels: uint8 (N, T, H, W), the central channel of each position, or radiographs (N, H, W).
        inside: where the vertebra is, of the same shape; None: no such map.

    Returns:
        "uniform", the same everywhere; "centre", a Gaussian about the middle of the slice and of the
        sequence, a quarter of each side wide; "edges", the gradient's length by Sobel's filter in the slice;
        and, where it is known, "mask", 1 inside and 0 outside. float32, of the pixels' shape.

    Raises:
        ValueError: other shapes.

    Example:
        >>> maps = trivial_maps(np.zeros((2, 15, 64, 64), np.uint8))
        >>> list(maps), maps["edges"].shape
        (['uniform', 'centre', 'edges'], (2, 15, 64, 64))
    """
    image = np.asarray(pixels)
    if image.ndim not in (3, 4) or not image.size:
        raise ValueError(
            f"Trivial maps are of pixels (N, T, H, W), or (N, H, W) of radiographs; found {image.shape}. "
            "Take one channel of each position."
        )
    each = [np.linspace(-0.5, 0.5, n) if n > 1 else np.zeros(1) for n in image.shape[1:]]
    squared = sum(axis**2 for axis in np.meshgrid(*each, indexing="ij", sparse=True))
    found = {
        "uniform": np.ones(image.shape, np.float32),
        "centre": np.broadcast_to(np.exp(-squared / (2 * _CENTRE**2)).astype(np.float32), image.shape),
        "edges": np.hypot(*(sobel(image.astype(np.float32), axis, mode="nearest") for axis in (-2, -1))),
    }
    if inside is not None:
        mask = _binary(inside, "The mask")
        if mask.shape != image.shape:
            raise ValueError(
                f"The mask has shape {mask.shape}, the pixels {image.shape}. Take them of the same cases."
            )
        found["mask"] = mask.astype(np.float32)
    return found


def attention_maps(attention: ArrayLike, height: int, width: int) -> NDArray[np.float32]:
    """Attention weights (N, T) as maps that are constant in a slice, (N, T, height, width).

    Example:
        >>> attention_maps([[0.25, 0.75]], 4, 4)[0, :, 0, 0].tolist()
        [0.25, 0.75]
    """
    weights = np.asarray(attention, dtype=np.float32)
    return np.broadcast_to(weights[..., None, None], (*weights.shape, height, width))


def at_pixels(maps: ArrayLike, height: int, width: int) -> NDArray[np.float32]:
    """Maps (…, h, w) on the image's pixels (…, height, width): bilinear, edges held, as torch interpolates.

    What is constant stays so to the last bit, which a sum of weights would not keep.
    """
    values = np.asarray(maps, dtype=np.float32)
    for axis, many in ((-2, height), (-1, width)):
        if (cells := values.shape[axis]) != many:
            at = np.clip((np.arange(many) + 0.5) * cells / many - 0.5, 0, cells - 1)
            below = np.floor(at).astype(np.intp)
            share = (at - below).astype(np.float32).reshape((-1, 1) if axis == -2 else (-1,))
            low = values.take(below, axis)
            values = low + share * (values.take(np.minimum(below + 1, cells - 1), axis) - low)
    return values


# 2. Scores of each case.


def localise(
    maps: AnyMaps,
    truth: ArrayLike,
    *,
    inside: ArrayLike | None = None,
    tolerance: float = TOLERANCE,
    iou_quantile: float | None = None,
) -> pd.DataFrame:
    """How well each case's map localises what is true of it.

    Args:
        maps: (N, T, h, w) or (N, h, w), raw and signed, on their own grid; or a `Maps` of them.
        truth: 0/1 on the pixels, (N, T, H, W) or (N, H, W); each case has a 1.
        inside: where the vertebra is, of the truth's shape; without it `auroc_inside` is NaN.
        tolerance: pixels that the maximum may lie beside the truth, in its own slice.
        iou_quantile: share of a case's pixels below its threshold, chosen on other cases by
            `best_iou_quantile`; without it `iou` is NaN.

    Returns:
        One row a case, in order. `pointing`: 1 where the centre of the map's highest cell lies on the truth
        or within the tolerance, the mean over cells that share the highest value. `energy`: share of the
        positive part of the map that lies on the truth. `auroc`: of all pixels, and `auroc_inside`: of those
        of the vertebra. `iou`: of the truth with the pixels above the threshold. `chance`: the share of
        pixels that are true. A constant map, and one without positive values in `energy`, has what chance
        has.

    Raises:
        ValueError: truth on another grid, without a 1, or not 0/1; NaN or infinite values in maps; a
            tolerance below 0, or a quantile outside (0, 1). Names the cases.

    Source: the pointing game, Zhang et al., IJCV 126 (2018) 1084–1102; energy inside, Wang et al.,
        Score-CAM, CVPR Workshops 2020.

    Example:
        >>> truth = np.zeros((1, 2, 8, 8), int)
        >>> truth[0, 1, 2, 2] = 1
        >>> localise(truth.astype(float), truth)[["pointing", "energy", "auroc"]].values.tolist()
        [[1.0, 1.0, 1.0]]
        >>> localise(np.zeros((1, 2, 4, 4)), truth)["auroc"].tolist()
        [0.5]
    """
    values, true = _checked(maps, truth)
    within = None if inside is None else _binary(inside, "The mask")
    if within is not None and within.shape != true.shape:
        raise ValueError(
            f"The mask has shape {within.shape}, the truth {true.shape}. Take them of the same cases."
        )
    if not tolerance >= 0:
        raise ValueError(f"tolerance is a distance in pixels from 0; found {tolerance}. Correct it.")
    if iou_quantile is not None:
        _check_quantiles([iou_quantile])
    rows = []
    for n in range(len(values)):
        on_pixels = at_pixels(values[n], *true.shape[-2:])
        positive = np.maximum(on_pixels, 0)
        chance = float(true[n].mean())
        total = float(positive.sum(dtype=np.float64))
        energy = float(positive[true[n]].sum(dtype=np.float64)) / total if total > 0 else chance
        order = _Order.of(on_pixels, true[n])
        of_bone = np.nan if within is None else _Order.of(on_pixels[within[n]], true[n][within[n]]).auroc()
        iou = np.nan if iou_quantile is None else float(order.ious(np.array([iou_quantile]))[0])
        pointing = _pointing(values[n], true[n], tolerance)
        rows.append((pointing, energy, order.auroc(), of_bone, iou, chance))
    return pd.DataFrame(rows, columns=[*METRICS, "chance"])


def best_iou_quantile(maps: AnyMaps, truth: ArrayLike, *, quantiles: Sequence[float] = QUANTILES) -> float:
    """The quantile whose threshold gives the highest mean IoU, to be chosen on validation.

    Args:
        maps: see `localise`.
        truth: see `localise`.
        quantiles: shares of a case's pixels below its threshold, that are tried; the first of equals wins.

    Raises:
        ValueError: see `localise`.

    Example:
        >>> truth = np.zeros((1, 10, 10), int)
        >>> truth[0, :2, :5] = 1
        >>> best_iou_quantile(truth.astype(float), truth, quantiles=(0.8, 0.9, 0.95))
        0.9
    """
    return float(quantiles[iou_at(maps, truth, quantiles=quantiles).mean(axis=0).argmax()])


def iou_at(maps: AnyMaps, truth: ArrayLike, *, quantiles: Sequence[float] = QUANTILES) -> NDArray[np.float64]:
    """IoU of each case at each quantile, (N, quantiles); see `best_iou_quantile`.

    Example:
        >>> truth = np.eye(4, dtype=int)[None]
        >>> iou_at(truth * 1.0, truth, quantiles=(0.5, 0.75)).tolist()
        [[0.5, 1.0]]
    """
    values, true = _checked(maps, truth)
    tried, size = _check_quantiles(quantiles), true.shape[-2:]
    pairs = zip(values, true, strict=True)
    return np.stack([_Order.of(at_pixels(one, *size), its).ious(tried) for one, its in pairs])


class _Order(NamedTuple):
    """Values of a case's pixels in order, (n,), and those of its true pixels, (m,)."""

    all: NDArray[np.float32]
    true: NDArray[np.float32]

    @classmethod
    def of(cls, values: NDArray[np.float32], true: NDArray[np.bool_]) -> "_Order":
        return cls(np.sort(values, axis=None), np.sort(values[true]))

    def auroc(self) -> float:
        """Share of pairs of a true and another pixel that are in order, ties half; NaN of one class."""
        m = len(self.true)
        others = len(self.all) - m
        if not m or not others:
            return np.nan
        below, up_to = (np.searchsorted(self.all, self.true, side) for side in ("left", "right"))
        return (float((below + up_to).sum()) / 2 - m * m / 2) / (m * others)

    def ious(self, quantiles: NDArray[np.float64]) -> NDArray[np.float64]:
        """IoU of the truth with the pixels above each quantile; those equal to it count in part."""
        n, m = len(self.all), len(self.true)
        marked = np.clip(np.rint((1 - quantiles) * n), 1, n)
        cut = self.all[(n - marked).astype(np.intp)]

        def above_and_tied(values: NDArray[np.float32]) -> tuple[NDArray, NDArray]:
            left, right = (np.searchsorted(values, cut, side) for side in ("left", "right"))
            return len(values) - right, right - left

        above, tied = above_and_tied(self.all)
        hit, hit_tied = above_and_tied(self.true)
        both = hit + hit_tied * (marked - above) / tied
        return both / (marked + m - both)


def _pointing(cells: NDArray[np.float32], true: NDArray[np.bool_], tolerance: float) -> float:
    """Share of the highest cells (T, h, w) whose centre lies within pixels of the truth (T, H, W)."""
    highest = np.argwhere(cells == cells.max())
    scale = np.array(
        [1.0, *(whole / part for whole, part in zip(true.shape[1:], cells.shape[1:], strict=True))]
    )
    slices = np.array([1e6, 1.0, 1.0])  # so far from each other that no tolerance reaches the next
    centres = ((highest + 0.5) * scale - 0.5) * slices
    centres[:, 0] = highest[:, 0] * slices[0]
    near, _ = KDTree(np.argwhere(true) * slices).query(
        centres, distance_upper_bound=tolerance * (1 + _SAME) + _SAME
    )
    return float(np.isfinite(near).mean())


# 3. What goes in.


def _checked(maps: AnyMaps, truth: ArrayLike) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Maps (N, T, h, w) and truth (N, T, H, W) that fit; of radiographs, T = 1."""
    true = _binary(truth, "The truth")
    if isinstance(maps, OfPixels) and not isinstance(maps, np.ndarray):
        if tuple(maps.size) != true.shape[-2:]:
            raise ValueError(
                f"The truth is on another grid than the maps: {true.shape[-2:]} pixels, and images of "
                f"{tuple(maps.size)}. Take the truth in the packed frame."
            )
        maps = maps.pixels()
    values: NDArray[np.float32] = np.asarray(maps, dtype=np.float32)
    fits = values.ndim == true.ndim and values.ndim in (3, 4) and values.shape[:-2] == true.shape[:-2]
    if not fits or not values.size or values.shape[-2] * true.shape[-1] != values.shape[-1] * true.shape[-2]:
        raise ValueError(
            f"The truth is on another grid than the maps: {true.shape} and {values.shape}. Both are "
            "(N, T, H, W), or (N, H, W), of the same cases, slices and field of view."
        )
    if values.ndim == 3:
        values, true = values[:, None], true[:, None]
    axes = (1, 2, 3)
    bad = np.asarray(~np.isfinite(values).all(axis=axes))
    if bad.any():
        raise ValueError(
            f"Maps hold NaN or infinite values in {bad.sum()} of {len(bad)} cases (rows "
            f"{listing(np.flatnonzero(bad))}). Compute them again in float32."
        )
    empty = np.asarray(~true.any(axis=axes))
    if empty.any():
        raise ValueError(
            f"No pixel is true in {empty.sum()} of {len(empty)} cases (rows "
            f"{listing(np.flatnonzero(empty))}), so that nothing can be localised. Judge "
            "the cases whose fracture is outlined."
        )
    return values, true


def _binary(values: ArrayLike, what: str) -> NDArray[np.bool_]:
    array = np.asarray(values)
    if array.dtype != bool and not (known := np.isin(array, (0, 1))).all():
        found = listing(np.unique(array[~known].astype(str)).tolist())
        raise ValueError(f"{what} is 0 or 1 at each pixel; found {found}. Compare it first, such as > 127.")
    return array.astype(bool)


def _check_quantiles(quantiles: Sequence[float]) -> NDArray[np.float64]:
    tried = np.asarray(quantiles, dtype=np.float64)
    if not len(tried) or not ((tried > 0) & (tried < 1)).all():
        raise ValueError(
            f"A quantile lies between 0 and 1; found {listing(tried) or 'none'}. 0.98 marks 2 % of them."
        )
    return tried


# 4. The table.


def localisation_table(
    scores: Mapping[str, pd.DataFrame],
    *,
    patients: Sequence[object] | pd.Series,
    reference: Sequence[str] = TRIVIAL,
    metrics: Sequence[str] = METRICS,
    confidence: float = 0.95,
    seed: int = 0,
) -> pd.DataFrame:
    """Methods against the truth: means over cases, and how far above each trivial map, resampling patients.

    Args:
        scores: method → rows of `localise`, of the same cases in the same order.
        patients: of each case, (N,).
        reference: methods that the others are compared with, pair by pair; those not in `scores` are left
            out.
        metrics: columns of the tables.
        confidence: of the intervals.
        seed: of the resampling.

    Returns:
        One row a method and metric: `method`, `metric`, `value` (the mean), `low`, `high`, `cases` and
        `patients` where it is defined, and for each reference r `over_r` (the mean difference, this method −
        r), `over_r_low` and `over_r_high`; NaN for r itself. Metrics that no case has are left out.

    Raises:
        ValueError: tables of different cases, none at all, or patients that are not theirs.

    Example:
        >>> truth = np.zeros((2, 1, 8, 8), int)
        >>> truth[:, 0, 2, 2] = 1
        >>> scores = {"oracle": localise(truth.astype(float), truth), "uniform": localise(truth * 0.0, truth)}
        >>> table = localisation_table(scores, patients=["1", "2"]).set_index(["method", "metric"])
        >>> float(table.loc[("oracle", "auroc"), "over_uniform"])
        0.5
    """
    check_confidence(confidence)
    whose = pd.factorize(np.asarray(patients, dtype=object))[0]
    lengths = {name: len(rows) for name, rows in scores.items()}
    if not lengths or set(lengths.values()) != {len(whose)} or not len(whose):
        raise ValueError(
            f"Each method needs a row for each of the {len(whose)} cases, at least 1; found "
            f"{lengths or 'none'}. Score all of them on the same cases."
        )
    for name, its in scores.items():
        require_columns(its, metrics, what=f"The table of {name}")
    against = [name for name in reference if name in scores]
    rows = []
    for name, its in scores.items():
        for metric in metrics:
            value = its[metric].to_numpy(dtype=np.float64)
            if not (known := ~np.isnan(value)).any():
                continue
            found = (
                share_by_patient(value, whose, confidence, seed=seed)
                if metric == "pointing"
                else mean_by_patient(value, whose, confidence)
            )
            row = {
                "method": name,
                "metric": metric,
                **dict(zip(("value", "low", "high"), found, strict=True)),
            }
            row |= {"cases": int(known.sum()), "patients": len(np.unique(whose[known]))}
            for other in against:
                more = value - scores[other][metric].to_numpy(dtype=np.float64)
                over = (np.nan,) * 3 if other == name else mean_by_patient(more, whose, confidence)
                row |= dict(
                    zip((f"over_{other}", f"over_{other}_low", f"over_{other}_high"), over, strict=True)
                )
            rows.append(row)
    return pd.DataFrame(rows)


def over_strongest(table: pd.DataFrame, *, trivial: Sequence[str] = TRIVIAL) -> pd.DataFrame:
    """What each method has over the strongest trivial map, metric by metric, on the same cases.

    Which is strongest is read off the same cases, which is a little unfair to the methods.

    Args:
        table: of `localisation_table`, with the trivial maps as its reference.
        trivial: methods that know nothing of the fracture.

    Returns:
        One row a method that is not trivial, and metric: `method`, `metric`, `value` (the mean difference),
        `low`, `high`, and `against`, the trivial map.

    Raises:
        ValueError: the table has no trivial map.

    Example:
        >>> truth = np.zeros((2, 1, 8, 8), int)
        >>> truth[:, 0, 2, 2] = 1
        >>> scores = {"oracle": localise(truth.astype(float), truth), "uniform": localise(truth * 0.0, truth)}
        >>> over = over_strongest(localisation_table(scores, patients=["1", "2"])).set_index("metric")
        >>> float(over.loc["auroc", "value"]), over.loc["auroc", "against"]
        (0.5, 'uniform')
    """
    require_columns(table, ("method", "metric", "value"), what="The table of methods")
    is_trivial = table["method"].isin(trivial)
    if not is_trivial.any():
        raise ValueError(
            f"The table has none of {listing(trivial)} to compare with; found "
            f"{listing(table['method'].unique())}. Score trivial_maps, too."
        )
    rows = []
    for metric, its in table.groupby("metric", sort=False):
        known = its[its["method"].isin(trivial)]
        against = known["method"].iloc[int(known["value"].to_numpy().argmax())]
        for row in its[~its["method"].isin(trivial)].to_dict("records"):
            values = (row[f"over_{against}{end}"] for end in ("", "_low", "_high"))
            rows.append((row["method"], metric, *values, against))
    return pd.DataFrame(rows, columns=["method", "metric", "value", "low", "high", "against"])
