"""Threshold counts and curves.

The predictions of 2,019 studies (14,133 vertebrae, as many as RSNA 2022 labels) against scikit-learn on the
same arrays, and the growth of the counts to ten million rows.
"""

import statistics
from collections.abc import Iterator
from functools import partial
from math import log

import numpy as np
from sklearn import metrics as sklearn

from benchmarks.measure import Row, interleaved, milliseconds, ratio, spread
from cspine_helpers import metrics

ROWS = 7 * 2019
SIZES = (10**4, 10**5, 10**6, 10**7)
PEERS = {
    "threshold_counts": (metrics.threshold_counts, sklearn.confusion_matrix_at_thresholds),
    "pr_curve": (metrics.pr_curve, sklearn.precision_recall_curve),
    "roc_curve": (metrics.roc_curve, partial(sklearn.roc_curve, drop_intermediate=False)),
    "average_precision": (metrics.average_precision, sklearn.average_precision_score),
    "auroc": (metrics.auroc, sklearn.roc_auc_score),
}


def scores(rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Labels, one in ten positive, and probabilities that know something of them."""
    rng = np.random.default_rng(0)
    labels = (rng.random(rows) < 0.1).astype(int)
    return labels, np.clip(rng.beta(1.5, 6, rows) + 0.3 * labels * rng.random(rows), 0, 1)


def rows() -> Iterator[Row]:
    y, p = scores(ROWS)
    for name, (ours, theirs) in PEERS.items():
        times = interleaved(
            {"ours": partial(ours, y, p), "peer": partial(theirs, y, p)}, repeats=200, warm_up=5
        )
        found = ratio(times["ours"], times["peer"])
        took = f"{milliseconds(times['ours'])}; {spread(found)} × its time"
        what = f"`metrics.{name}`, {ROWS:,} rows"
        yield Row(what, "scikit-learn on the same arrays", took, "≤ 1.1 ×", found[0] <= 1.1)

    counts, sorts = {}, {}
    for size in SIZES:
        y, p = scores(size)
        calls = {
            "count": partial(metrics.threshold_counts, y, p),
            "sort": partial(np.argsort, p, kind="stable"),
        }
        times = interleaved(calls, repeats=3 if size > 10**6 else 9)
        counts[size], sorts[size] = (statistics.median(times[name]) for name in ("count", "sort"))
    first, last = 10**5, SIZES[-1]
    grown, sorted_ = counts[last] / counts[first], sorts[last] / sorts[first]
    in_words = ", ".join(f"{took:.3g} s at {size:,}" for size, took in counts.items())
    yield Row(
        f"`metrics.threshold_counts`, {first:,} to {last:,} rows",
        "growth of `numpy.argsort(kind='stable')` on the same scores",
        f"× {grown:.0f}, sorting × {sorted_:.0f}",
        "no more than sorting, by 10 % at most",
        grown <= 1.1 * sorted_,
        f"{in_words}. n log n alone would grow × {last * log(last) / (first * log(first)):.0f}; "
        "the rest, for both, is memory that no longer fits the processor's cache.",
    )
    yield Row(f"the same, {last:,} rows", "10 s", f"{counts[last]:.1f} s", "≤ 10 s", counts[last] <= 10)
