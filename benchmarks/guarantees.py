"""Guarantees of recall: how often they are violated, what they cost, how long they take.

Each line of redraws draws so many fractured patients 4,000 times from a known truth (`simulation.Truth`), the
correlation of a patient's vertebrae as stated, and counts the thresholds whose true recall is too low.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from scipy.stats import binomtest

from benchmarks.measure import Row, interleaved, milliseconds
from cspine_helpers.decisions.guarantees import RecallTarget, guarantee_recall
from cspine_helpers.decisions.simulation import METHODS, Truth, simulate_guarantee
from cspine_helpers.figures.curves import guarantee_picture

REDRAWS = 4000
SETTINGS = (  # fractured patients, recall, delta, correlation
    (60, 0.8, 0.1, 0.5),
    (200, 0.9, 0.1, 0.0),
    (200, 0.9, 0.1, 0.5),
    (200, 0.9, 0.1, 0.9),
    (400, 0.95, 0.05, 0.5),
    (960, 0.9, 0.05, 0.5),
)
PICTURE = Path(__file__).with_suffix(".png")


def rows() -> Iterator[Row]:
    for patients, recall, delta, correlation in SETTINGS:
        table = simulate_guarantee(
            patients=patients,
            recall=recall,
            delta=delta,
            redraws=REDRAWS,
            truth=Truth(correlation=correlation),
            seed=1,
        )
        if (patients, correlation) == (200, 0.5):
            PICTURE.write_bytes(guarantee_picture(table, recall=recall, delta=delta)._repr_png_())
        what = f"{patients} patients, recall {recall:.0%}, correlation {correlation:.1f}"
        for line in table.itertuples():
            kept = line.method == METHODS[0]
            # A share of δ itself would be called too high in one line of a thousand.
            too_often = binomtest(line.violations, REDRAWS, delta, alternative="greater").pvalue < 0.001
            yield Row(
                f"{what}: {line.target}, {line.method}",
                f"δ = {delta:.0%}",
                f"violated {line.violation_rate:.1%} ({line.low:.1%}–{line.high:.1%}); "
                f"recall {line.recall_50:.1%}, specificity {line.specificity:.1%}"
                + (f"; {line.no_threshold:,} redraws without a threshold" if line.no_threshold else ""),
                "no more often than δ, but for chance (p ≥ 0.001)" if kept else "",
                not too_often if kept else None,
            )
    yield from times()


def times() -> Iterator[Row]:
    """Seconds of one guarantee on as many rows as RSNA 2022 labels."""
    rng = np.random.default_rng(0)
    ill = rng.random(2019) < 0.476
    labels = ((rng.random((2019, 7)) < 0.21) & ill[:, None]).astype(int)
    scores = np.clip(rng.beta(1.5, 6, labels.shape) + 0.3 * labels * rng.random(labels.shape), 0, 1)
    who = np.arange(2019).astype(str)
    calls = {
        "patient": lambda: guarantee_recall(
            labels.max(axis=1), scores.max(axis=1), who, RecallTarget(0.9, level="patient")
        ),
        "vertebra": lambda: guarantee_recall(
            labels.ravel(), scores.ravel(), np.repeat(who, 7), RecallTarget(0.9, level="vertebra")
        ),
    }
    for level, took in interleaved(calls, repeats=50, warm_up=5).items():
        limit = np.median(took) <= 0.025
        yield Row(
            f"`guarantee_recall`, level {level}, 2,019 studies",
            "25 ms (one move of the slider)",
            milliseconds(took),
            "≤ 25 ms",
            bool(limit),
        )
