"""Tables to draw, and what a picture of them says and shows."""

import io

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
