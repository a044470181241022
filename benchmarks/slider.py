"""The threshold slider: what one move costs in the kernel.

The same four panels of 14,133 predictions, as many as RSNA 2022 has, for a move of the slider (numbers with
intervals, drawing, PNG, setting the widgets) and for a new matplotlib figure each time (from the same
numbers; drawing, PNG), as most notebooks do it.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from itertools import cycle

import numpy as np
import pandas as pd

from benchmarks.measure import Row, interleaved, milliseconds, ratio, spread
from cspine_helpers.evaluation.cases import Cases
from cspine_helpers.labels import UID, VERTEBRAE
from cspine_helpers.slider.operating_point import OperatingPoints, weigh
from cspine_helpers.slider.picture import Panels
from cspine_helpers.slider.widget import ThresholdExplorer

STUDIES = 2019
MOVES = np.random.default_rng(1).uniform(0.02, 0.9, 1000)  # as a hand drags: hardly a place twice


def predictions() -> pd.DataFrame:
    """A predictions table of RSNA 2022's size."""
    rng = np.random.default_rng(0)
    label = (rng.random(7 * STUDIES) < 0.1).astype(int)
    probability = np.clip(rng.beta(1.5, 6, len(label)) + 0.3 * label * rng.random(len(label)), 0, 1)
    table = pd.DataFrame({UID: np.repeat([f"1.{n + 1}" for n in range(STUDIES)], 7)})
    return table.assign(
        vertebra=VERTEBRAE * STUDIES, split="validation", label=label, probability=probability
    )


def new_figure(level: OperatingPoints, threshold: float) -> bytes:
    """The explorer's panels drawn from nothing."""
    return Panels(level, {"start": 0.2}).png(level.at(threshold), "as observed")


def move_one(explorer: ThresholdExplorer, place: float) -> None:
    """Drag the handle on whose side of 0.45 the place lies."""
    setattr(explorer, "threshold" if place < 0.45 else "defer", place)


def rows() -> Iterator[Row]:
    table = predictions()
    begun = time.perf_counter()
    explorer = ThresholdExplorer(table, threshold=0.2)
    opening = time.perf_counter() - begun
    elsewhere = ThresholdExplorer(table, threshold=0.2)
    elsewhere.prevalence = 0.02
    deferring, both = (ThresholdExplorer(table, threshold=0.2, defer=0.5) for _ in range(2))
    both.prevalence = 0.02
    cases = Cases.of(table)
    level = OperatingPoints(cases, cases, weigh(cases))
    level.band  # noqa: B018, made once, as for the slider
    places = cycle(MOVES)
    calls: dict[str, Callable[[], object]] = {
        "move": lambda: setattr(explorer, "threshold", next(places)),
        "restated": lambda: setattr(elsewhere, "threshold", next(places)),
        "deferring": lambda: move_one(deferring, next(places)),
        "both": lambda: move_one(both, next(places)),
        "new": lambda: new_figure(level, next(places)),
    }
    times = interleaved(calls, repeats=100, warm_up=3)
    found = ratio(times["new"], times["move"])
    middle, slow = statistics.median(times["move"]), statistics.quantiles(times["move"], n=20)[-1]
    yield Row(
        "a move of the slider",
        "a new figure each time",
        f"{milliseconds(times['move'])} against {milliseconds(times['new'])}: {spread(found, 1)} × faster",
        "≥ 6 ×",
        found[0] >= 6,
    )
    yield Row("a move of the slider", "25 ms", milliseconds(times["move"]), "≤ 25 ms", middle <= 0.025,
              f"one move in twenty takes {1000 * slow:.3g} ms or more.")  # fmt: skip
    others = {
        "restated": "a move of the slider at another prevalence",
        "deferring": "a move of one of two handles",
        "both": "a move of one of two handles at another prevalence",
    }
    for name, what in others.items():
        met = statistics.median(times[name]) <= 0.025
        yield Row(what, "25 ms", milliseconds(times[name]), "≤ 25 ms", met)
    yield Row("opening the slider, and the first picture of a level", "", f"{opening:.2g} s")
