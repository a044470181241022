"""Tables to draw, and what a picture of them says and shows."""

import io
from itertools import combinations

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.text import Text
from PIL import Image

from cspine_helpers.labels import PATIENT, UID, VERTEBRAE


def table_to_draw():
    """50 studies of the validation split; the first is all fractured, the second all intact."""
    rng = np.random.default_rng(1)
    label = (rng.random((50, 7)) < 0.15).astype(int)
    label[0], label[1] = 1, 0
    rows = [(f"1.{study}", name, "validation") for study in range(50) for name in VERTEBRAE]
    table = pd.DataFrame(rows, columns=[UID, "vertebra", "split"])
    return table.assign(label=label.ravel(), probability=np.clip(rng.beta(2, 5, 350), 0, 1))


def line(axes, label):
    """The line that the legend calls so."""
    return next(found for found in axes.lines if found.get_label() == label)


def texts(axes):
    """All texts on the axes, as one."""
    return " ".join(text.get_text() for text in axes.texts)


def labels_to_draw():
    """A label table of 120 studies."""
    labels = (np.random.default_rng(0).random((120, 7)) < 0.15).astype(int)
    table = pd.DataFrame(labels, columns=list(VERTEBRAE))
    return table.assign(**{PATIENT: table.max(axis=1), UID: [f"1.{n}" for n in range(len(table))]})


def picture(figure) -> np.ndarray:
    """The pixels `(H, W, 3)` that a notebook shows, 110 to the inch; nothing written in them is cut off."""
    image = Image.open(io.BytesIO(figure._repr_png_()))
    assert image.format == "PNG"
    assert image.size == tuple(np.rint(figure.get_size_inches() * 110).astype(int))
    figure.draw_without_rendering()
    for text in figure.findobj(Text):
        if text.get_text() and text.get_visible() and text.axes is not None:
            box = text.get_window_extent().transformed(figure.transFigure.inverted())
            assert -0.005 < box.min.min() < box.max.max() < 1.005, text.get_text()
    return np.asarray(image.convert("RGB"))


def colours(pixels: np.ndarray) -> set[str]:
    """Every colour that covers more than 30 pixels."""
    found, counts = np.unique(pixels.reshape(-1, 3), axis=0, return_counts=True)
    return {matplotlib.colors.to_hex(one / 255).upper() for one in found[counts > 30]}


def legible(figure, name: str) -> None:
    """At most 1,210 pixels wide, no text below 8 points, none cut off, none over another."""
    assert figure.get_size_inches()[0] * 110 <= 1210, name
    picture(figure)
    beyond = set()  # ticks outside of what the axes show
    for axes in (axes for axes in figure.axes if axes.axison):
        for axis, (low, high) in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, sorted(axes.get_ylim()))):
            beyond |= {tick.label1 for tick in axis.get_major_ticks() if not low <= tick.get_loc() <= high}
    every = [text for text in figure.findobj(Text) if text.get_text().strip() and text.get_visible()]
    shown = [text for text in every if text not in beyond and (text.axes is None or text.axes.axison)]
    assert min(text.get_fontsize() for text in shown) >= 8, name
    boxes = [(text.get_text(), text.get_window_extent()) for text in shown]
    over = [
        (a, b) for (a, one), (b, other) in combinations(boxes, 2) if one.padded(-1).overlaps(other.padded(-1))
    ]
    assert over == [], name
