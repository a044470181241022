"""Pictures of a whole CT: sagittal, coronal and one axial slice a vertebra, before anything is packed."""

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
    """One study: midsagittal and coronal slices with the vertebrae named, then C1 … C7 in axial slices.

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
    middle_x = round(float(np.mean([np.mean(box[2]) for box in boxes.values()])))
    bodies = [box[1][0] + 0.25 * (box[1][1] - box[1][0]) for box in boxes.values()]
    figure = Picture(figsize=(10.5, 7.4))
    top, bottom = np.asarray(figure.subfigures(2, 1, height_ratios=[2.1, 1])).flat
    sagittal, coronal = top.subplots(1, 2)
    z, y, x = spacing_mm
    planes: dict[str, tuple[Axes, Any, float, int]] = {
        "Midsagittal (front on the left)": (sagittal, np.s_[:, :, middle_x], z / y, 1),
        "Coronal, through the bodies": (coronal, np.s_[:, round(float(np.median(bodies))), :], z / x, 2),
    }
    for name, (axes, plane, aspect, axis) in planes.items():
        _draw(axes, volume_hu[plane], broken[plane], aspect)
        axes.set_title(name)
        for n in there:
            rows, columns = np.nonzero(label_map[plane] == n)
            if rows.size and axis == 1:
                axes.text(columns.min() - 3, np.median(rows), VERTEBRAE[n - 1], ha="right", va="center",
                          color="white", size=9)  # fmt: skip
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


def _draw(axes: Axes, plane_hu: np.ndarray, broken: np.ndarray, aspect: float) -> None:
    low, high = BONE_WINDOW_HU
    axes.imshow(plane_hu, cmap="gray", vmin=low, vmax=high, aspect=aspect, interpolation="nearest")
    if broken.any():
        axes.contour(broken, levels=[0.5], colors=FRACTURED, linewidths=0.9)
    axes.set_axis_off()
