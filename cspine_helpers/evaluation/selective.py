"""Selective prediction: does a confidence put the wrong answers last?

Cases are accepted from the highest confidence down; those that are not yet accepted are deferred. The risk is
the share of wrong answers among the accepted ones, the generalised risk their share of all cases, to which a
deferred case adds nothing. Where cases share a confidence, no order of them is better founded than another:
every number here is the mean over all orders, in closed form. A confidence may be infinite: -∞ is deferred
before all others.

Patients are resampled. In simulations of 30 to 70 patients with 1 or 7 cases each, 95 % intervals of areas
held the truth 94 to 99 times in 100; of risks and their differences 88 times or more, also at the coverage
where the first answers are wrong, and mostly 95 to 100 times.

Source: risk and coverage, Geifman and El-Yaniv, NeurIPS (2017); AURC and e-AURC, Geifman, Uziel and El-Yaniv,
ICLR (2019); AUGRC, Traub et al., NeurIPS (2024).
"""

from collections.abc import Callable

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy.sparse import csr_array
from scipy.special import digamma
from scipy.stats import norm, t

from cspine_helpers.evaluation.cases import Cases
from cspine_helpers.evaluation.resampling import (
    Floats,
    check_confidence,
    difference_limits,
    loss_interval,
    patient_weights,
    quantiles,
    score_interval,
)
from cspine_helpers.files.paths import listing

AREAS = ("aurc", "e_aurc", "augrc")
COVERAGES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)


def checked_confidences(confidence: ArrayLike, cases: int | None = None) -> Floats:
    """Confidences as floats, one a case; infinite ones are allowed.

    Raises:
        ValueError: none, another number than `cases`, or NaN: names the rows.
    """
    try:
        found = np.asarray(confidence, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"Confidences are numbers, one a case; {error}. Pass a column of them.") from None
    if found.ndim != 1 or not len(found) or (cases is not None and len(found) != cases):
        wanted = (
            "one number a case, at least one" if cases is None else f"one number for each of {cases} cases"
        )
        raise ValueError(
            f"Confidences are {wanted}; found shape {found.shape}. Pass a column of their table."
        )
    if (missing := np.isnan(found)).any():
        rows = listing(np.flatnonzero(missing).tolist())
        raise ValueError(
            f"{missing.sum()} confidences are missing (NaN), in the rows {rows}. A case without one can be "
            "neither accepted nor deferred: compute it, or give -inf, which is always deferred."
        )
    return found


def risk_coverage(confidence: ArrayLike, wrong: ArrayLike) -> pd.DataFrame:
    """The risk–coverage curve: what is wrong among the k surest cases, for each k.

    Args:
        confidence: (N,) higher is surer.
        wrong: (N,) 1 where the answer is wrong, else 0; or a loss in [0, 1].

    Returns:
        N rows, the surest first: `cases` (k), `coverage` (k / N), `confidence` (of the k-th case), `risk` and
        `generalised_risk`. Within a tie both are means over orders.

    Raises:
        ValueError: see `checked_confidences`; another number of losses, or one outside [0, 1].

    Example:
        >>> risk_coverage([0.9, 0.8, 0.7, 0.6], [0, 0, 0, 1])["risk"].tolist()
        [0.0, 0.0, 0.0, 0.25]
    """
    sure, loss = _checked(confidence, wrong)
    values, step, many = np.unique(-sure, return_inverse=True, return_counts=True)
    of_step = np.bincount(step, loss) / many  # mean loss within a tie
    each = np.sort(step)
    accepted = np.arange(1, len(sure) + 1)
    lost = np.cumsum(of_step[each])
    table = {"cases": accepted, "coverage": accepted / len(sure), "confidence": -values[each]}
    return pd.DataFrame(table | {"risk": lost / accepted, "generalised_risk": lost / len(sure)})


def aurc(confidence: ArrayLike, wrong: ArrayLike) -> float:
    """Area under the risk–coverage curve: the mean of the risk over all coverages; arguments as there.

    Example:
        >>> aurc([0.9, 0.8, 0.7, 0.6], [0, 0, 0, 1]) == 1 / 16
        True
    """
    return float(risk_coverage(confidence, wrong)["risk"].mean())


def e_aurc(confidence: ArrayLike, wrong: ArrayLike) -> float:
    """Excess AURC: the AURC less that of the perfect order, which has the same wrong answers last.

    Example:
        >>> e_aurc([0.9, 0.8, 0.7, 0.6], [0, 0, 0, 1])
        0.0
    """
    return aurc(confidence, wrong) - aurc(-np.asarray(wrong, dtype=np.float64), wrong)


def augrc(confidence: ArrayLike, wrong: ArrayLike) -> float:
    """Area under the generalised risk: the mean share of all cases that are accepted and wrong.

    Example:
        >>> augrc([0.9, 0.8, 0.7, 0.6], [1, 0, 0, 0])
        0.25
    """
    return float(risk_coverage(confidence, wrong)["generalised_risk"].mean())


def _checked(confidence: ArrayLike, wrong: ArrayLike, cases: int | None = None) -> tuple[Floats, Floats]:
    """Confidences and losses, one of each a case."""
    sure = checked_confidences(confidence, cases)
    loss = np.asarray(wrong, dtype=np.float64)
    if loss.shape != sure.shape:
        raise ValueError(
            f"Each case has a confidence and is right or wrong; found {len(sure)} confidences, and losses of "
            f"shape {loss.shape}. Pass two columns of one table."
        )
    if (bad := ~((loss >= 0) & (loss <= 1))).any():
        rows = listing((f"row {row}: {loss[row]}" for row in np.flatnonzero(bad)), quoted=False)
        raise ValueError(
            f"{bad.sum()} losses are missing or outside [0, 1] ({rows}). 1 is wrong, 0 is right."
        )
    return sure, loss


class Accepted:
    """Cases grouped by equal confidence, the surest first: sums over the accepted, under any patient weights.

    Args:
        cases: n of them.
        confidence: (n,), checked.
        values: (n, K), what is summed.
    """

    def __init__(self, cases: Cases, confidence: Floats, values: NDArray) -> None:
        steps, step = np.unique(-confidence, return_inverse=True)
        columns = [np.ones(len(cases)), *values.T.astype(np.float64)]
        shape = (len(steps), len(cases.population))
        self._parts = [csr_array((each, (step, cases.number)), shape=shape) for each in columns]

    def groups(self, weights: Floats) -> tuple[Floats, Floats]:
        """Cases (G, R) and sums (K, G, R) of each group under weights (P, R)."""
        many, *sums = (part @ weights for part in self._parts)
        return many, np.stack(sums)

    def at(self, coverage: Floats, weights: Floats) -> Floats:
        """Sums over the accepted at coverages (C,), (K, C, R)."""
        return self.first(coverage[:, None] * (self._parts[0] @ weights).sum(axis=0), weights)

    def first(self, count: Floats, weights: Floats) -> Floats:
        """Sums over so many of the surest, (C, R), under weights, (K, C, R); in proportion within a tie."""
        many, sums = self.groups(weights)
        accepted = np.pad(np.cumsum(many, axis=0), ((1, 0), (0, 0)))
        summed = np.pad(np.cumsum(sums, axis=1), ((0, 0), (1, 0), (0, 0)))
        found = np.empty((len(sums), *count.shape))
        for j in range(count.shape[1]):
            for k, each in enumerate(summed):
                found[k, :, j] = np.interp(count[:, j], accepted[:, j], each[:, j])
        return found


def _areas(cases: Cases, confidence: Floats, loss: Floats) -> Callable[[Floats], Floats]:
    """AURC, e-AURC and AUGRC under patient weights (P, R), (3, R)."""
    ours, perfect = (Accepted(cases, each, loss[:, None]) for each in (confidence, -loss))

    def areas(weights: Floats) -> Floats:
        (area, general), (least, _) = (_area(*each.groups(weights)) for each in (ours, perfect))
        return np.stack([area, area - least, general])

    return areas


def _area(many: Floats, sums: Floats) -> tuple[Floats, Floats]:
    """AURC and AUGRC, (R,) each, of groups of ties; whole weights, or any above 0.

    Of m tied cases that lose w together, after n₀ others that lost e₀, the j-th has the mean risk over orders
    (e₀ + j·w / m) / (n₀ + j). Summed over j: e₀·h + w / m · (m − n₀·h), where h = Σ 1 / (n₀ + j).
    """
    lost = sums[0]
    total = np.where(many.any(axis=0), many.sum(axis=0), np.nan)  # a resample may hold none of few cases
    before, lost_before = np.cumsum(many, axis=0) - many, np.cumsum(lost, axis=0) - lost
    harmonic = digamma(before + many + 1) - digamma(before + 1)
    share = lost / np.where(many > 0, many, 1)
    area = (lost_before * harmonic + share * (many - before * harmonic)).sum(axis=0) / total
    general = (many * lost_before + lost * (many + 1) / 2).sum(axis=0) / total**2
    return area, general


def _fewer(cases: Cases, loss: NDArray) -> int:
    """Patients with a wrong answer, or with a right one, the fewer of the two: an area rests on both."""
    held = [int((cases.sums(part.astype(np.float64)) > 0).sum()) for part in (loss > 0, loss < 1)]
    return max(min(held), 2)


def selective_scores(
    cases: Cases,
    confidence: ArrayLike,
    wrong: ArrayLike,
    *,
    resamples: int = 1000,
    seed: int = 0,
    interval: float = 0.95,
) -> pd.DataFrame:
    """AURC, e-AURC and AUGRC with intervals; patients are resampled.

    Args:
        cases: of one split, n of them.
        confidence: (n,) higher is surer.
        wrong: (n,) 1 where the answer is wrong, else 0; or a loss in [0, 1].
        resamples: of the patients.
        seed: of the resamples.
        interval: confidence of each interval by itself.

    Returns:
        Columns `metric, value, low, high`. Limits are Student's t on the logarithm
        (`resampling.loss_interval`), for the patients with a wrong or with a right answer, the fewer. Where
        nothing is wrong, the upper limit is that of a share of the patients.

    Raises:
        ValueError: see `checked_confidences`; cases of several splits; an option out of range.

    Example:
        >>> cases = Cases.of(predictions, split="validation")
        >>> wrong = (cases.probability >= 0.5) != cases.label
        >>> selective_scores(cases, abs(cases.probability - 0.5), wrong, resamples=50)["metric"].tolist()
        ['aurc', 'e_aurc', 'augrc']
    """
    sure, loss = _checked(confidence, wrong, len(cases))
    (value,), (draws,) = resample([_areas(cases, sure, loss)], cases, resamples, seed, interval)
    most = float(score_interval(0, cases.n_patients, interval)[1])
    limits = [
        loss_interval(float(one), drawn[~np.isnan(drawn)], _fewer(cases, loss), interval)
        if one > 0
        else (0.0, most)
        for one, drawn in zip(value, draws, strict=True)
    ]
    low, high = zip(*limits, strict=True)
    return pd.DataFrame({"metric": AREAS, "value": value, "low": low, "high": high})


def compare_selective(
    cases: Cases,
    confidence: ArrayLike,
    other: ArrayLike,
    wrong: ArrayLike,
    *,
    resamples: int = 1000,
    seed: int = 0,
    interval: float = 0.95,
) -> pd.DataFrame:
    """Differences of AURC, e-AURC and AUGRC between two confidences of the same answers, with intervals.

    Both are measured on the same resamples. Intervals by Student's t from the resamples. Options as in
    `selective_scores`.

    Returns:
        Columns `metric, value, other, difference, low, high`; the difference is other − value: below 0, the
        other is better.

    Raises:
        ValueError: see `selective_scores`.

    Example:
        >>> cases = Cases.of(predictions, split="validation")
        >>> wrong = (cases.probability >= 0.5) != cases.label
        >>> sure = abs(cases.probability - 0.5)
        >>> found = compare_selective(cases, sure, -sure, wrong, resamples=50)
        >>> bool((found["difference"] > 0).all())
        True
    """
    areas = [_areas(cases, *_checked(each, wrong, len(cases))) for each in (confidence, other)]
    (value, second), draws = resample(areas, cases, resamples, seed, interval)
    patients = _fewer(cases, np.asarray(wrong))
    spread = np.nanstd(draws[1] - draws[0], axis=1) * np.sqrt(patients / (patients - 1))
    half = t.ppf((1 + interval) / 2, patients - 1) * spread
    columns = {"metric": AREAS, "value": value, "other": second, "difference": second - value}
    return pd.DataFrame(columns | {"low": second - value - half, "high": second - value + half})


def risk_bands(
    cases: Cases,
    confidence: ArrayLike,
    wrong: ArrayLike,
    *,
    points: int = 100,
    resamples: int = 1000,
    seed: int = 0,
    interval: float = 0.95,
) -> pd.DataFrame:
    """The risk–coverage curve with a band, at coverages 1/points … 1; arguments as in `selective_scores`.

    The band holds the risk at each point by itself: score limits of as many independent cases as vary as much
    as the resamples do, and the percentiles of these where they reach farther.

    Returns:
        Columns `coverage, risk, low, high`.

    Raises:
        ValueError: see `selective_scores`; no points.

    Example:
        >>> cases = Cases.of(predictions, split="validation")
        >>> wrong = (cases.probability >= 0.5) != cases.label
        >>> len(risk_bands(cases, abs(cases.probability - 0.5), wrong, points=20, resamples=50))
        20
    """
    if points < 1:
        raise ValueError(f"A curve has 1 point or more; found {points}. 100 is usual.")
    coverage = np.arange(1, points + 1) / points
    sure, loss = _checked(confidence, wrong, len(cases))
    (value,), (draws,) = resample([_risks(cases, sure, loss, coverage)], cases, resamples, seed, interval)
    low, high = _limits(cases, sure, coverage, value, draws, interval)
    return pd.DataFrame({"coverage": coverage, "risk": value, "low": low, "high": high})


def difference_at_coverage(
    cases: Cases,
    confidence: ArrayLike,
    other: ArrayLike,
    wrong: ArrayLike,
    *,
    coverage: ArrayLike = COVERAGES,
    resamples: int = 1000,
    seed: int = 0,
    interval: float = 0.95,
) -> pd.DataFrame:
    """How much less, or more, is wrong by another confidence at the same coverage, with intervals.

    Both are measured on the same resamples; the interval is made of those of the two risks and their
    correlation, as in `intervals.compare`. It is 0 where both confidences put the cases in the same order.
    Other arguments as in `selective_scores`.

    Returns:
        One row a coverage: `coverage, risk, other, difference, low, high`; the difference is other − risk.

    Raises:
        ValueError: see `selective_scores`; a coverage outside (0, 1].

    Source: Zou and Donner, Statistics in Medicine 27 (2008).

    Example:
        >>> cases = Cases.of(predictions, split="validation")
        >>> wrong = (cases.probability >= 0.5) != cases.label
        >>> sure = abs(cases.probability - 0.5)
        >>> found = difference_at_coverage(cases, sure, -sure, wrong, coverage=[0.8, 1], resamples=50)
        >>> bool(found["difference"][0] > 0), float(found["difference"][1])
        (True, 0.0)
    """
    at = checked_coverages(coverage)
    pair = [_checked(each, wrong, len(cases)) for each in (confidence, other)]
    risks = [_risks(cases, *each, at) for each in pair]
    values, draws = resample(risks, cases, resamples, seed, interval)
    limits = [
        _limits(cases, sure, at, value, drawn, interval)
        for (sure, _), value, drawn in zip(pair, values, draws, strict=True)
    ]
    same = (at == 1) | same_order(pair[0][0], pair[1][0])  # the same cases are accepted
    low, high = (np.where(same, 0, each) for each in difference_limits(values, limits, draws))
    columns = {"coverage": at, "risk": values[0], "other": values[1], "difference": values[1] - values[0]}
    return pd.DataFrame(columns | {"low": low, "high": high})


def checked_coverages(coverage: ArrayLike) -> Floats:
    """Coverages as floats, (C,).

    Raises:
        ValueError: none, or one outside (0, 1].
    """
    at = np.atleast_1d(np.asarray(coverage, dtype=np.float64))
    if not len(at) or not ((at > 0) & (at <= 1)).all():
        raise ValueError(
            f"A coverage lies above 0, up to 1; found {listing(at.tolist()) or 'none'}. 0.9 defers a tenth."
        )
    return at


def resample(
    measures: list[Callable[[Floats], Floats]], cases: Cases, resamples: int, seed: int, interval: float
) -> tuple[list[Floats], list[Floats]]:
    """Values (M,) and draws (M, R) of measures of patient weights, all on the same resamples.

    Raises:
        ValueError: cases of several splits, or of one patient; an option out of range.
    """
    check_confidence(interval)
    if resamples < 2:
        raise ValueError(f"Intervals need 2 resamples or more; found {resamples}. 1000 is usual.")
    patients = len(cases.require().population)
    if patients < 2:
        raise ValueError("The cases are of 1 patient, which cannot be resampled. Use more studies.")
    values = [measure(np.ones((patients, 1)))[:, 0] for measure in measures]
    weights = list(patient_weights(patients, resamples, seed, rows=len(cases)))
    return values, [np.concatenate([measure(each) for each in weights], axis=1) for measure in measures]


def _risks(cases: Cases, confidence: Floats, loss: Floats, coverage: Floats) -> Callable[[Floats], Floats]:
    """Risk at coverages (C,) under patient weights (P, R), (C, R)."""
    accepted = Accepted(cases, confidence, loss[:, None])

    def risks(weights: Floats) -> Floats:
        total = cases.sums() @ weights
        total = np.where(total > 0, total, np.nan)  # a resample may hold none of few cases
        return accepted.at(coverage, weights)[0] / (coverage[:, None] * total)

    return risks


def _limits(
    cases: Cases, confidence: Floats, coverage: Floats, value: Floats, draws: Floats, interval: float
) -> tuple[Floats, Floats]:
    """Limits of risks (C,) at coverages, which rest on so many cases and their patients, from draws (C, R).

    Score limits and percentiles of the draws, the farther of the two. Where the surest are all right and the
    next ones wrong, a resample accepts some of these: percentiles reach down to the risk of 0 that is next to
    it, and the score limits' number of cases follows from how the draws vary about their own mean. It starts
    at the patients', so that the limits are those of a share of patients while hardly a draw is wrong.
    """
    found, z2 = np.full((2, len(coverage)), np.nan), norm.ppf((1 + interval) / 2) ** 2
    first = np.argsort(-confidence, kind="stable")
    for place, (one, drawn) in enumerate(zip(value, draws, strict=True)):
        if not len(some := drawn[~np.isnan(drawn)]):
            continue
        rows = coverage[place] * len(cases)
        patients = max(len(np.unique(cases.number[first[: int(np.ceil(rows - 1e-9))]])), 2)
        middle, variance = some.mean(), some.var() * patients / (patients - 1)
        floor = z2 / (4 * patients**2)  # of the variance in Wilson's formula, where nothing is wrong
        many = patients * (middle * (1 - middle) / patients + floor) / (variance + floor)
        ends = [*quantiles(some, interval), *score_interval(one, min(rows, many), interval)]
        found[:, place] = min(ends), max(ends)
    return found[0], found[1]


def same_order(confidence: Floats, other: Floats) -> bool:
    """Whether two confidences put the cases in the same order, with the same ties."""
    steps, others = (np.unique(each, return_inverse=True)[1] for each in (confidence, other))
    return bool((steps == others).all())
