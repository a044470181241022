"""Counts, rates, curves and losses of binary predictions: plain functions on arrays.

A case is called positive when its probability is at or above the threshold. Curves and counts at every
threshold come from scikit-learn, which is imported on first use (it costs a second that pictures of
labels should not pay).
"""

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from cspine_helpers.files.paths import listing

CLIP = float(np.finfo(np.float64).eps)  # how near 0 and 1 a probability comes where its logarithm is taken
RSNA_WEIGHTS = {"vertebra": 1.0, "patient": 7.0}  # of an intact one; twice as much where fractured
# An example of costs: level → what the loss of RSNA 2022 weighs a miss and a false alarm with.
RSNA_COSTS = {name: {"cost_miss": 2 * w, "cost_false_alarm": w} for name, w in RSNA_WEIGHTS.items()}


def check_scores(
    labels: ArrayLike, probabilities: ArrayLike, *, both_classes: bool = False
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Labels as 0/1 integers and probabilities as floats, or an error that says what is wrong with them.

    Args:
        labels: (N,) of 0/1 (or booleans).
        probabilities: (N,) in [0, 1].
        both_classes: also require at least one 0 and one 1.

    Raises:
        ValueError: other shapes, nothing at all, labels that are not 0/1, probabilities that are NaN or
            outside [0, 1], or one class only where both are needed.
    """
    y, p = np.asarray(labels), np.asarray(probabilities, dtype=np.float64)
    if y.ndim != 1 or y.shape != p.shape or not len(y):
        raise ValueError(
            "Labels and probabilities must be two columns of one length, at least 1; "
            f"found shapes {y.shape} and {p.shape}. Pass two columns of one table."
        )
    _refuse(~((y == 0) | (y == 1)), y, "labels are neither 0 nor 1", "Correct or drop them.")
    _refuse(
        ~((p >= 0) & (p <= 1)),
        p,
        "probabilities are missing or outside [0, 1]",
        "Turn logits into probabilities with a sigmoid, and drop missing values.",
    )
    if both_classes and (y == y[0]).all():
        raise ValueError(
            f"All {len(y)} labels are {int(y[0])}: this is defined only where both classes occur. "
            "Use more studies, or pool the vertebrae."
        )
    return y.astype(np.int64), p


def _refuse(wrong: NDArray[np.bool_], values: NDArray, what: str, advice: str) -> None:
    if wrong.any():
        rows = listing((f"row {row}: {values[row]}" for row in np.flatnonzero(wrong)), quoted=False)
        raise ValueError(f"{wrong.sum()} {what} ({rows}). {advice}")


def threshold_counts(labels: ArrayLike, probabilities: ArrayLike) -> pd.DataFrame:
    """Confusion counts at every distinct probability, from the highest to the lowest.

    Returns:
        Columns `threshold, tp, fp, fn, tn`; positive means probability ≥ threshold.

    Raises:
        ValueError: see `check_scores`.
    """
    from sklearn.metrics import confusion_matrix_at_thresholds

    y, p = check_scores(labels, probabilities)
    tn, fp, fn, tp, threshold = confusion_matrix_at_thresholds(y, p, pos_label=1)
    counts = {"tp": tp, "fp": fp, "fn": fn, "tn": tn}
    whole = {name: count.astype(np.int64) for name, count in counts.items()}
    return pd.DataFrame({"threshold": threshold} | whole, copy=False)


def confusion(labels: ArrayLike, probabilities: ArrayLike, thresholds: ArrayLike) -> pd.DataFrame:
    """Confusion counts at one threshold or several.

    Returns:
        One row for each threshold, in the order given; columns as in `threshold_counts`.

    Raises:
        ValueError: see `check_scores`; a threshold is NaN.
    """
    wanted = np.atleast_1d(np.asarray(thresholds, dtype=np.float64))
    if np.isnan(wanted).any():
        raise ValueError("A threshold is missing (NaN). Choose one with decisions.choose_threshold.")
    counts = threshold_counts(labels, probabilities)
    called = np.searchsorted(-counts["threshold"].to_numpy(), -wanted, side="right") - 1  # -1: none called
    tp, fp, fn, tn = (counts[name].to_numpy() for name in ("tp", "fp", "fn", "tn"))
    positives, negatives = tp[0] + fn[0], fp[0] + tn[0]
    tp, fp = np.where(called < 0, 0, tp[called]), np.where(called < 0, 0, fp[called])
    return pd.DataFrame({"threshold": wanted, "tp": tp, "fp": fp, "fn": positives - tp, "tn": negatives - fp})


def rates(counts: pd.DataFrame) -> pd.DataFrame:
    """The counts with `recall, precision, specificity, npv, f1, accuracy` beside them.

    A rate whose denominator is zero is NaN: precision where nothing is called positive, negative
    predictive value (npv) where nothing is called negative, recall where there are no positives,
    specificity where there are no negatives, F1 where both kinds of positive are absent.
    """
    return counts.assign(
        **rates_of(*(counts[name].to_numpy(dtype=np.float64) for name in ("tp", "fp", "fn", "tn")))
    )


def rates_of(
    tp: NDArray[np.float64], fp: NDArray[np.float64], fn: NDArray[np.float64], tn: NDArray[np.float64]
) -> dict[str, NDArray[np.float64]]:
    """Name → rates of such counts, without a table; see `rates`."""
    with np.errstate(invalid="ignore"):  # 0 / 0 is the documented NaN
        return {
            "recall": tp / (tp + fn),
            "precision": tp / (tp + fp),
            "specificity": tn / (tn + fp),
            "npv": tn / (tn + fn),
            "f1": 2 * tp / (2 * tp + fp + fn),
            "accuracy": (tp + tn) / (tp + fp + fn + tn),
        }


def pr_curve(labels: ArrayLike, probabilities: ArrayLike) -> pd.DataFrame:
    """Precision–recall curve.

    Returns:
        Columns `threshold, recall, precision`, thresholds rising; the last row, threshold infinity, is
        the end of the curve by convention: recall 0, precision 1.

    Raises:
        ValueError: see `check_scores`; also where one class is absent.
    """
    from sklearn.metrics import precision_recall_curve

    y, p = check_scores(labels, probabilities, both_classes=True)
    precision, recall, threshold = precision_recall_curve(y, p, pos_label=1)
    curve = {"threshold": np.append(threshold, np.inf), "recall": recall, "precision": precision}
    return pd.DataFrame(curve, copy=False)


def roc_curve(labels: ArrayLike, probabilities: ArrayLike) -> pd.DataFrame:
    """ROC curve at every distinct probability.

    Returns:
        Columns `threshold, false_positive_rate, recall`, thresholds falling from infinity.

    Raises:
        ValueError: see `check_scores`; also where one class is absent.
    """
    from sklearn.metrics import roc_curve as roc

    y, p = check_scores(labels, probabilities, both_classes=True)
    false_positive_rate, recall, threshold = roc(y, p, pos_label=1, drop_intermediate=False)
    curve = {"threshold": threshold, "false_positive_rate": false_positive_rate, "recall": recall}
    return pd.DataFrame(curve, copy=False)


def average_precision(labels: ArrayLike, probabilities: ArrayLike) -> float:
    """Average precision: precision summed over the steps of recall; chance level is the prevalence.

    Raises:
        ValueError: see `check_scores`; also where one class is absent.
    """
    from sklearn.metrics import average_precision_score

    return float(average_precision_score(*check_scores(labels, probabilities, both_classes=True)))


def auroc(labels: ArrayLike, probabilities: ArrayLike) -> float:
    """Area under the ROC curve: how often a positive scores above a negative (ties count half).

    Raises:
        ValueError: see `check_scores`; also where one class is absent.
    """
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(*check_scores(labels, probabilities, both_classes=True)))


def log_losses(labels: ArrayLike, probabilities: ArrayLike) -> NDArray[np.float64]:
    """−ln of the probability given to the truth, (N,); probabilities stay one rounding error off 0 and 1.

    Raises:
        ValueError: see `check_scores`.
    """
    y, p = check_scores(labels, probabilities)
    p = np.clip(p, CLIP, 1 - CLIP)
    return -np.where(y == 1, np.log(p), np.log1p(-p))


def clip_note(labels: ArrayLike, probabilities: ArrayLike) -> str:
    """How many cases' log loss is no property of the model but of the clip; empty where none is.

    A case predicted with certainty, and wrongly, has an infinite loss: what counts instead is where the
    probability is clipped. (Certain and right, it costs nothing either way.)

    Example:
        >>> clip_note([1, 0, 0], [0.0, 0.0, 0.4])
        '1 of 3 cases was predicted with certainty and wrongly: its log loss is 36.0, the clip at 2.2e-16.'

    Raises:
        ValueError: see `check_scores`.
    """
    y, p = check_scores(labels, probabilities)
    decided = int((np.where(y == 1, p, 1 - p) < CLIP).sum())
    if not decided:
        return ""
    was, its = ("was", "its log loss is") if decided == 1 else ("were", "the log loss of each is")
    return (
        f"{decided} of {len(y)} cases {was} predicted with certainty and wrongly: {its} {-np.log(CLIP):.1f}, "
        f"the clip at {CLIP:.1e}."
    )


def rsna_terms(
    labels: ArrayLike, probabilities: ArrayLike, patient_labels: ArrayLike, patient_probabilities: ArrayLike
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Each study's eight terms of the RSNA 2022 loss, weighted and summed, and the sum of the weights, (S,).

    The ratio of the two, each summed over all studies, is the competition's loss; the mean of the studies'
    ratios is what the participants' public code reported. `log_losses` says how certain mistakes are clipped.

    Args:
        labels: (S, 7), C1 … C7.
        probabilities: (S, 7).
        patient_labels: (S,).
        patient_probabilities: (S,).

    Raises:
        ValueError: see `check_scores`.

    Source: RSNA 2022 Cervical Spine Fracture Detection, competition page, "Evaluation".
    """
    y = np.column_stack([labels, patient_labels])
    p = np.column_stack([probabilities, patient_probabilities])
    weight = np.repeat([*RSNA_WEIGHTS.values()], [7, 1]) * (1 + y)
    return (weight * log_losses(y.ravel(), p.ravel()).reshape(y.shape)).sum(axis=1), weight.sum(axis=1)
