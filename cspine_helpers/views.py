"""Pictures of a whole CT: from the side, from the front, one axial slice a vertebra, before it is packed."""

from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes

from cspine_helpers.labels import VERTEBRAE
from cspine_helpers.packing import bounding_box
from cspine_helpers.plots import FRACTURED, INK, STYLE, Picture

BONE_WINDOW_HU = (-300.0, 1200.0)


@matplotlib.rc_context(STYLE)
def study_views(
    volume_hu: np.ndarray,
    label_map: np.ndarray,
    spacing_mm: tuple[float, float, float],
    *,
    fracture_map: np.ndarray | None = None,
    title: str = "",
) -> Picture:
    """One study from the side and from the front with the vertebrae named, then C1 … C7 in axial slices.

    The axial slice is the one with most broken bone, where that is known, else with most of the vertebra.

    Args:
        volume_hu: (Z, Y, X), cranial to caudal, front to back, right to left.
        label_map: same shape; 1–7 mark C1–C7. Vertebrae that are not there are left out.
        spacing_mm: (z, y, x).
        fracture_map: same shape, above 0 where bone is broken; drawn in colour.
        title: above the picture.
    """
    broken = np.zeros(volume_hu.shape, bool) if fracture_map is None else fracture_map > 0
    there = [n for n in range(1, 8) if (label_map == n).any()]
    boxes = {n: bounding_box(label_map, n) for n in there}
    middle = round(float(np.mean([np.mean(box[2]) for box in boxes.values()])))
    figure = Picture(figsize=(10.5, 7.4))
    top, bottom = np.asarray(figure.subfigures(2, 1, height_ratios=[2.1, 1])).flat
    z, y, x = spacing_mm
    depth = np.arange(len(volume_hu))
    through = body_row(label_map[:, :, middle], there)
    cuts: dict[str, tuple[Any, float]] = {
        "From the side (front on the left)": (np.s_[:, :, middle], z / y),
        "From the front, along the bodies' curve": (np.s_[depth, through, :], z / x),
    }
    for axes, (name, (cut, aspect)) in zip(top.subplots(1, 2), cuts.items(), strict=True):
        _draw(axes, volume_hu[cut], broken[cut], aspect)
        axes.set_title(name)
        for n in there:
            rows, columns = np.nonzero(label_map[cut] == n)
            if rows.size:
                axes.text(columns.min() - 3, np.median(rows), VERTEBRAE[n - 1],
                          ha="right", va="center", color="white", size=9)  # fmt: skip
    for axes, n in zip(np.atleast_1d(bottom.subplots(1, len(there))), there, strict=True):
        (z0, z1), (y0, y1), (x0, x1) = boxes[n]
        here = label_map[z0:z1] == n
        shown = broken[z0:z1] & here if (broken[z0:z1] & here).any() else here
        index = z0 + int(shown.sum((1, 2)).argmax())
        crop = np.s_[index, max(y0 - 5, 0) : y1 + 5, max(x0 - 5, 0) : x1 + 5]
        _draw(axes, volume_hu[crop], broken[crop] & (label_map[crop] == n), y / x)
        fractured = broken[label_map == n].any()
        axes.set_title(
            VERTEBRAE[n - 1] + (" fractured" if fractured else ""), color=FRACTURED if fractured else INK
        )
    figure.suptitle(title, x=0.01, ha="left", weight="bold")
    return figure


def body_row(sagittal_labels: np.ndarray, there: list[int]) -> np.ndarray:
    """The row (Y) through the bodies in each slice: middles of the front parts, straight lines between."""
    middles = []
    for n in there:
        zs, ys = np.nonzero(sagittal_labels == n)
        front = ys <= ys.min() + 0.35 * np.ptp(ys)
        middles.append((zs[front].mean(), ys[front].mean()))
    slices, rows = np.transpose(sorted(middles))  # by height: label maps may be wrong
    return np.interp(np.arange(len(sagittal_labels)), slices, rows).round().astype(int)


def _draw(axes: Axes, plane_hu: np.ndarray, broken: np.ndarray, aspect: float) -> None:
    low, high = BONE_WINDOW_HU
    axes.imshow(plane_hu, cmap="gray", vmin=low, vmax=high, aspect=aspect, interpolation="nearest")
    if broken.any():
        axes.contour(broken, levels=[0.5], colors=FRACTURED, linewidths=0.9)
    axes.set_axis_off()
