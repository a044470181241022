"""Intervals: resampled patients.

All headline numbers of 2,019 studies (14,133 vertebrae, as many as RSNA 2022 labels), 1,000 resamples,
against scikit-learn on such resamples: one call a metric, with the patients' weights on their rows.
"""

import statistics
from collections.abc import Iterator
from functools import partial

import numpy as np
import pandas as pd
from sklearn import metrics as sklearn

from benchmarks.measure import Row, in_fresh_process, interleaved, seconds
from benchmarks.tables import ROWS, scores
from cspine_helpers.evaluation.cases import Cases
from cspine_helpers.evaluation.intervals import bootstrap, compare, curve_bands, per_vertebra
from cspine_helpers.evaluation.resampling import patient_weights
from cspine_helpers.labels import UID, VERTEBRAE

RESAMPLES, THRESHOLD = 1000, 0.3
PEER_RESAMPLES = 20  # scikit-learn's time is proportional to them
MEMORY = """
from benchmarks.intervals import Cases, predictions, bootstrap, THRESHOLD
from benchmarks.measure import peak_mib
bootstrap(Cases.of(predictions()), threshold=THRESHOLD)
print(peak_mib())
"""


def predictions() -> pd.DataFrame:
    """A predictions table of whole studies."""
    labels, probabilities = scores(ROWS)
    studies = [f"1.{number}" for number in range(ROWS // 7)]
    keys = pd.MultiIndex.from_product([studies, VERTEBRAE], names=[UID, "vertebra"]).to_frame(index=False)
    return keys.assign(split="validation", label=labels, probability=probabilities)


def with_scikit_learn(table: pd.DataFrame) -> None:
    """The same numbers of a few resamples, the competition's loss left out."""
    y, p = table["label"].to_numpy(), table["probability"].to_numpy()
    called, patient = p >= THRESHOLD, np.repeat(np.arange(ROWS // 7), 7)
    for weights in next(patient_weights(ROWS // 7, PEER_RESAMPLES, 0)).T:
        each = weights[patient]
        sklearn.confusion_matrix(y, called, sample_weight=each)  # all rates come of it
        sklearn.roc_auc_score(y, p, sample_weight=each)
        sklearn.average_precision_score(y, p, sample_weight=each)
        sklearn.log_loss(y, p, sample_weight=each)
        sklearn.brier_score_loss(y, p, sample_weight=each)


def rows() -> Iterator[Row]:
    table = predictions()
    cases = Cases.of(table)
    calls = {
        "ours": partial(bootstrap, cases, threshold=THRESHOLD, resamples=RESAMPLES),
        "peer": partial(with_scikit_learn, table),
    }
    times = interleaved(calls, repeats=5)
    took = statistics.median(times["ours"])
    faster = statistics.median(times["peer"]) * RESAMPLES / PEER_RESAMPLES / took
    what = f"`intervals.bootstrap`, all headline numbers, {RESAMPLES:,} resamples, {ROWS:,} rows"
    yield Row(what, "5 s", f"{took:.2f} s", "≤ 5 s", took <= 5)
    yield Row("the same", "scikit-learn with weights", f"{faster:.0f} times as fast", "≥ 10", faster >= 10)
    memory = float(in_fresh_process(MEMORY))
    yield Row(
        "the same",
        "peak memory of a process that does only this",
        f"{memory:.0f} MiB",
        "≤ 512 MiB",
        memory <= 512,
    )
    others = {
        "`intervals.per_vertebra`": partial(per_vertebra, cases, threshold=THRESHOLD),
        "`intervals.compare`, two thresholds": partial(
            compare, cases, threshold=THRESHOLD, other_threshold=0.2
        ),
        "`intervals.curve_bands`, precision–recall": partial(curve_bands, cases, kind="pr"),
        "`intervals.curve_bands`, ROC": partial(curve_bands, cases, kind="roc"),
    }
    for name, call in others.items():
        found = min(seconds(call) for _ in range(3))
        yield Row(
            f"{name}, {RESAMPLES:,} resamples, {ROWS:,} rows", "5 s", f"{found:.2f} s", "≤ 5 s", found <= 5
        )
