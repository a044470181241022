"""Label checks, split and expand from 2,000 to 2,000,000 studies.

RSNA 2022 holds 2,019. Growth is measured from 20,000 studies on (below, what does not depend on their number
flattens it), beside that of sorting the same UIDs: n log n by definition, with the same memory to reach for.
"""

import statistics
from collections.abc import Callable, Iterator
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from benchmarks.measure import Row, peak_mib, seconds
from cspine_helpers import labels, splits
from cspine_helpers.figures.style import GREY, STYLE
from cspine_helpers.phantom.cohort import fracture_patterns

SIZES = (2_000, 20_000, 200_000, 2_000_000)
FROM, LARGEST = SIZES[1], SIZES[-1]
PEER = "sorting the UIDs"
FIGURE = Path(__file__).with_name("scale.png")


def label_table(studies: int) -> pd.DataFrame:
    """Studies in a random order whose patterns of fractures are as common as in RSNA 2022."""
    rng = np.random.default_rng(0)
    patterns = fracture_patterns()
    share = patterns["studies"] / patterns["studies"].sum()
    drawn = patterns[list(labels.VERTEBRAE)].to_numpy()[rng.choice(len(patterns), studies, p=share)]
    table = pd.DataFrame(drawn, columns=list(labels.VERTEBRAE))
    table.insert(0, labels.PATIENT, drawn.max(axis=1))
    uids = [f"1.2.826.0.1.3680043.{number + 1}" for number in rng.permutation(studies)]
    table.insert(0, labels.UID, pd.Series(uids, dtype="str"))
    return table


def calls(studies: int) -> dict[str, Callable[[], object]]:
    """What is measured, on a cohort of this size."""
    table = label_table(studies)
    split = splits.split_patients(table)
    train = splits.studies_of(split, "train")
    return {
        PEER: table[labels.UID].sort_values,
        "labels.validate_labels": lambda: labels.validate_labels(table),
        "labels.prevalence, cooccurrence": lambda: (labels.prevalence(table), labels.cooccurrence(table)),
        "labels.without (1 in 100)": lambda: labels.without(
            table, train[:: max(len(train) // (studies // 100), 1)]
        ),
        "splits.split_patients": lambda: splits.split_patients(table),
        "splits.k_folds": lambda: splits.k_folds(table),
        "splits.validate_split": lambda: splits.validate_split(split, table=table),
        "splits.split_hash": lambda: splits.split_hash(split),
        "labels.expand (all)": lambda: labels.expand(table, table[labels.UID]),
    }


@matplotlib.rc_context(STYLE)
def draw(times: dict[str, list[float]]) -> None:
    """The growth of each function, log-log, beside the slope of n log n."""
    figure = Figure(figsize=(8, 5))
    axes = figure.subplots()
    for name, found in times.items():
        axes.loglog(SIZES, found, "o-", linewidth=1.5, markersize=4, label=name)
    n = np.array(SIZES)
    limit = 60 * n * np.log(n) / (LARGEST * np.log(LARGEST))
    axes.loglog(n, limit, ":", color=GREY, label="n log n that ends at 60 s")
    axes.set(xlabel="studies", ylabel="seconds", title="Time against the number of studies")
    axes.grid(True)
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize=9)
    figure.savefig(FIGURE, dpi=STYLE["figure.dpi"], metadata={"Software": None})


def rows() -> Iterator[Row]:
    times: dict[str, list[float]] = {}
    for studies in SIZES:
        repeats = {200_000: 3, LARGEST: 1}.get(studies, 9)
        for name, function in calls(studies).items():
            took = statistics.median(seconds(function) for _ in range(repeats))
            times.setdefault(name, []).append(took)
    peak = peak_mib()
    draw(times)
    growth = {name: found[-1] / found[SIZES.index(FROM)] for name, found in times.items()}
    for name in (name for name in times if name != PEER):
        first, last = times[name][0], times[name][-1]
        yield Row(
            f"`{name}`, {FROM:,} to {LARGEST:,} studies",
            f"the growth of {PEER}, × {growth[PEER]:.0f}; 60 s",
            f"× {growth[name]:.0f}; {1000 * first:.3g} ms at {SIZES[0]:,}, {last:.3g} s at {LARGEST:,}",
            "≤ 1.1 × its growth; ≤ 60 s",
            growth[name] <= 1.1 * growth[PEER] and last <= 60,
        )
    held = label_table(LARGEST).memory_usage(deep=True).sum() / 2**30
    yield Row(
        f"peak memory of all of it at {LARGEST:,} studies, {7 * LARGEST:,} vertebrae",
        "",
        f"{peak / 1024:.2f} GiB",
        note=f"of the process, libraries and all; the label table holds {held:.2f} GiB. ![times](scale.png)",
    )
