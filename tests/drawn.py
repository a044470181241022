"""Predictions to draw, and what a picture of them says."""

import numpy as np
import pandas as pd

from cspine_helpers.labels import UID, VERTEBRAE


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
