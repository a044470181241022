"""The built-in cohort: studies rendered and packed a second, on one process and on two.

Workers are warm: what starting them takes (a Python with its imports, once a cohort) is stated by itself.
"""

import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from benchmarks.measure import Row, interleaved, ratio, seconds, spread
from cspine_helpers.phantom import cohort as phantom

STUDIES = 32
WHOLE = phantom.COHORTS["builtin"].studies


def make(studies: int, workers: int) -> None:
    """The first studies of the built-in cohort, into a folder that goes away."""
    with tempfile.TemporaryDirectory() as folder:
        config = replace(phantom.COHORTS["builtin"], studies=studies)
        phantom.make_cohort(Path(folder) / "cohort", config, workers=workers)


def rows() -> Iterator[Row]:
    start = seconds(lambda: make(2, 2)) - seconds(lambda: make(2, 2))
    times = interleaved({"1": lambda: make(STUDIES, 1), "2": lambda: make(STUDIES, 2)}, repeats=3, warm_up=0)
    found = ratio(times["1"], times["2"])
    each = {name: statistics.median(took) / STUDIES for name, took in times.items()}
    yield Row(
        f"{STUDIES} studies of the built-in cohort, two processes",
        "one process",
        f"{1 / each['2']:.2f} against {1 / each['1']:.2f} studies a second: {spread(found)} × as many",
        "≥ 1.8 ×",
        found[0] >= 1.8,
        f"starting two workers takes {start:.1f} s more; all {WHOLE} studies take "
        f"{WHOLE * each['2'] / 60:.1f} min on two, {WHOLE * each['1'] / 60:.1f} on one.",
    )
