"""Thresholds that keep a promised recall on new patients, whatever the scores look like.

A threshold whose recall on the validation patients is just what was asked for falls short on new patients
about half the time. Here the most lenient threshold comes first, and it rises as long as a test rejects, at
level δ, that recall is below r: fixed-sequence testing. Recall only falls on the way, so that one δ serves
all thresholds: the promise is broken only where the threshold passes the last one with recall ≥ r, and then
the test has erred right above that one, which happens with probability δ at most. Equal scores do no harm.

Patients are drawn independently, their vertebrae are not: the tests count patients. For patients, and for
one vertebra (C1 … C7), each fractured patient is found or missed: exact binomial test. Vertebrae: `betting`.
Both take one study of each patient, seven vertebrae at most: a table with more is refused.

`guarantee_on_validation` makes a guarantee of a predictions table, which says of which rows, level and
aggregation it is: nothing else may carry it. `guarantee_recall` is the proof alone, on arrays.

The promise is for patients drawn as these were, whom neither training, nor the choice of the epoch, nor a
fitted aggregation has seen. It says nothing of another hospital. Promises for seven vertebrae hold all
together with confidence 1 − δ where each is asked for with δ/7.

Source: Angelopoulos, Bates, Candès, Jordan, Lei, "Learn then test" (2021; fixed sequences). Bates et al.,
"Distribution-free, risk-controlling prediction sets", J. ACM 68 (2021; risks that only rise). Clopper,
Pearson, Biometrika 26 (1934; the binomial test).

The test behind promises about vertebrae: a bet on each patient against the promise being broken.

A patient has several fractures, easy or hard together, so that the patient is what is drawn independently.
Recall pooled over vertebrae is a ratio, E[found] / E[fractured] for one patient; it is at least r just where
X = missed − (1 − r) · fractured has a mean of at most 0. (Averaged over patients, X is divided by fractured.)
Were the mean of X above 0, the product of 1 − λX over the patients (what a gambler owns who began with 1)
would have a mean below 1, and would reach 1/δ with probability δ at most (Markov). X is at most 7r for
pooled recall, at most r for the average over patients, and any λ from 0 to 1 over that, fixed without a look
at the scores, will do: λ decides how much is found out, never whether the promise holds. That a patient may
lose seven at once makes pooled recall costly to promise where patients are few.

Source: Waudby-Smith, Ramdas, "Estimating means of bounded random variables by betting", JRSS B 86 (2024). The
fixed λ is that of Hoeffding, JASA 58 (1963), theorem 1, at the most misses that his bound allows.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from math import ceil, log, log1p
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from cspine_helpers.evaluation.cases import Aggregation, check_choice, resampled_units, rows_at
from cspine_helpers.files.paths import listing
from cspine_helpers.labels import UID, VERTEBRAE
from cspine_helpers.metrics import check_scores
from cspine_helpers.predictions import predictions_sha256, validation_rows

MOST = len(VERTEBRAE)  # fractured vertebrae a patient can have


class PatientLosses:
    """X of each patient at any threshold.

    Attributes:
        scores: (K,) of positives, lowest first.
        codes: (K,) patient of each, 0 … n − 1.
        rank: (K,) its place among the patient's own, from 0 for the lowest.
        fractured: (n,) positives of each patient.
        weight: (n,) 1 for pooled recall, 1 / fractured for the average over patients.
        miss: share of misses that the promise allows.
        largest: the largest X that a patient could have.
    """

    def __init__(
        self, scores: NDArray[np.float64], codes: NDArray[np.intp], *, recall: float, pooled: bool
    ) -> None:
        order = np.lexsort((scores, codes))
        self.fractured = np.bincount(codes)
        starts = np.cumsum(self.fractured) - self.fractured
        rank = np.arange(len(scores)) - np.repeat(starts, self.fractured)
        by_score = np.argsort(scores[order], kind="stable")
        self.scores, self.codes = scores[order][by_score], codes[order][by_score]
        self.rank = rank[by_score]
        self.weight = np.ones(len(self.fractured)) if pooled else 1 / self.fractured
        self.miss = 1 - recall
        self.largest = recall * (MOST if pooled else 1)

    def missed(self, threshold: float) -> NDArray[np.intp]:
        """Positives of each patient below a threshold, (n,)."""
        below = self.codes[: np.searchsorted(self.scores, threshold)]
        return np.bincount(below, minlength=len(self.fractured))

    def growth(
        self, bet: float, missed: NDArray, who: NDArray[np.intp] | slice = slice(None)
    ) -> NDArray[np.float64]:
        """log(1 − λX) of the patients `who`, so many of whose positives are missed."""
        x = self.weight[who] * (missed - self.miss * self.fractured[who])
        with np.errstate(divide="ignore"):  # one patient can cost all: log 0
            return np.log(np.maximum(1 - bet * x, 0))

    def needed_if_all_found(self, delta: float) -> int:
        """How many patients such as these would do if nothing were missed: the highest bet gains most."""
        return ceil(-log(delta) / self.growth(1 / self.largest, np.zeros(len(self.fractured))).mean() - 1e-9)

    def needed(self, missed: NDArray, delta: float) -> int | None:
        """How many patients such as these would do, with the best of bets; None: no number would."""
        bets = np.linspace(0.005, 1, 200) / self.largest
        best = max(self.growth(bet, missed).mean() for bet in bets)
        return ceil(-log(delta) / best - 1e-9) if best > 0 else None


def highest_threshold(losses: PatientLosses, delta: float) -> float | None:
    """The highest score of a positive down to which the gambler owns 1/δ; None: not even at the lowest."""
    patients = len(losses.fractured)
    bet = min(fixed_bet(patients, losses.miss, delta), 1 / losses.largest)
    steps = losses.growth(
        bet, losses.rank + 1, losses.codes
    )  # the threshold passes one positive after another
    steps -= losses.growth(bet, losses.rank, losses.codes)
    at_first = losses.growth(bet, np.zeros(patients)).sum()  # none missed
    owned = at_first + np.concatenate(([0.0], np.cumsum(steps)[:-1]))  # (K,) log, those before are missed
    first = np.searchsorted(losses.scores, losses.scores)  # equal scores are missed together
    enough = owned[first] >= -log(delta) - 1e-9
    return float(losses.scores[enough][-1]) if enough.any() else None


@cache
def fixed_bet(patients: int, miss: float, delta: float) -> float:
    """λ, from the number of patients: the best where each is found or missed."""
    from scipy.optimize import brentq

    needed = -log(delta) / patients
    if needed >= -log1p(-miss):
        return 1 / (1 - miss)

    def gap(share: float) -> float:
        """Divergence of coins (Kullback–Leibler) between misses seen and allowed, less what is needed."""
        return share * log(share / miss) + (1 - share) * (log1p(-share) - log1p(-miss)) - needed

    least = 1e-12 * miss
    share = brentq(gap, least, miss) if gap(least) > 0 else 0.0
    return (miss - share) / (miss * (1 - miss))


Average = Literal["vertebrae", "patients"]
GUARANTEE_LEVELS = ("patient", "vertebra", *VERTEBRAE)
_LARGEST = 2**17  # patients; beyond that no number is worth naming


@dataclass(frozen=True)
class Guarantee:
    """A promise about recall on new patients, or why none can be made.

    Attributes:
        threshold: the highest that keeps the promise; None: only calling everything positive keeps it.
        level: what the threshold applies to, one of `GUARANTEE_LEVELS`; it holds for no other.
        average: at level `vertebra`, what recall is averaged over: `vertebrae`, all alike (pooled, as
            `metrics.rates` counts), or `patients`, the share found of each one's fractures.
        recall: the recall promised.
        delta: how often, at most, such a promise is broken; 1 − delta is the confidence.
        patients: fractured patients that it rests on.
        positives: their fractured vertebrae at level `vertebra`; at other levels the same as `patients`.
        found: those of `positives` at or above the threshold; 0 where there is none.
        needed: fractured patients that would suffice if all positives were found.
        needed_as_hoped: fractured patients that would suffice to guarantee the threshold hoped for, at the
            recall observed there; None: nothing was hoped for, or no number up to 131,072 suffices.
        aggregation: how the patients' probabilities were made of those of the vertebrae, at level `patient`.
        rows_sha256: `predictions.predictions_sha256` of the validation rows that it was made on; None: it was
            made on arrays, and no decision may carry it.
    """

    threshold: float | None
    level: str
    average: Average
    recall: float
    delta: float
    patients: int
    positives: int
    found: int
    needed: int
    needed_as_hoped: int | None
    aggregation: Aggregation | None = None
    rows_sha256: str | None = None

    def __post_init__(self) -> None:
        _check_promise(self.recall, self.delta)
        check_choice("level", self.level, GUARANTEE_LEVELS)
        check_choice("average", self.average, get_args(Average))
        if self.threshold is not None:
            _check_threshold(self.threshold)
        if isinstance(self.aggregation, dict):  # from JSON
            object.__setattr__(self, "aggregation", Aggregation(**self.aggregation))

    @property
    def reason(self) -> str:
        """One sentence that says why this threshold, or why none."""
        what = {"patient": "of patients", "vertebra": "of vertebrae"}.get(self.level, f"of {self.level}")
        over = ", averaged over patients," if self.level == "vertebra" and self.average == "patients" else ""
        promise = f"recall {what}{over} ≥ {self.recall:.4g} with confidence {1 - self.delta:.4g}"
        if self.threshold is None:
            return (
                f"No threshold guarantees {promise}: {self.patients} fractured patients are too few, even if "
                f"all is found; that takes {self.needed}, and more where some is missed."
            )
        here = f"{self.found} of {self.positives} positives in {self.patients} fractured patients are found"
        return f"Highest threshold that guarantees {promise}: {here} here."

    def require(self) -> float:
        """The threshold.

        Raises:
            ValueError: there is none; says why.
        """
        if self.threshold is None:
            raise ValueError(f"{self.reason} Use more patients, or ask for less recall or confidence.")
        return self.threshold

    def covers(self, threshold: float, *, level: str, aggregation: Aggregation | None = None) -> bool:
        """Whether a threshold is promised this recall: at this level, by this aggregation, and not above it.

        Args:
            threshold: of a decision, or where a slider stands.
            level: one of `GUARANTEE_LEVELS`.
            aggregation: how vertebrae become patients; at level `patient`, and only there.
        """
        same = (level, aggregation) == (self.level, self.aggregation)
        return same and self.threshold is not None and threshold <= self.threshold

    def check_made_on(self, predictions: pd.DataFrame) -> None:
        """Refuse a guarantee that was not made on the validation rows of this predictions table.

        It is made again from them, so that one that was written by hand is refused as well.

        Raises:
            ValueError: it is of arrays, of other rows, or not what these rows give; says which. The table
                breaks the schema or has no validation rows.
        """
        if self.rows_sha256 is None:
            raise ValueError(
                f"A guarantee {_AGAIN} This one was made on arrays, which may be of any predictions."
            )
        found = predictions_sha256(validation_rows(predictions))
        if found != self.rows_sha256:
            raise ValueError(
                f"A guarantee {_AGAIN} This one was made on other rows: their SHA-256 is {self.rows_sha256}, "
                f"that of the validation rows here is {found}."
            )
        again = guarantee_on_validation(
            predictions,
            level=self.level,
            recall=self.recall,
            delta=self.delta,
            average=self.average,
            aggregation=self.aggregation,
        )
        if replace(self, needed_as_hoped=None) != again:
            raise ValueError(
                f"A guarantee {_AGAIN} This one says: {self.reason} These rows say: {again.reason}"
            )


_AGAIN = "is for the predictions it was made on: make it with guarantees.guarantee_on_validation(...)."


def one_or_several(given: object) -> tuple[Any, ...]:
    """What was handed in, one by one; a dict or a text is one thing, which an error can name whole."""
    if isinstance(given, Iterable) and not isinstance(given, Mapping | str):
        return tuple(given)
    return (given,)


def checked_guarantees(
    guarantees: Guarantee | Iterable[Guarantee], predictions: pd.DataFrame
) -> tuple[Guarantee, ...]:
    """The guarantees, each made on the validation rows of this predictions table.

    To be asked before one is shown beside a table or kept with a decision, as the slider and `frozen.freeze`
    do; `Guarantee.covers` then says for which thresholds it holds.

    Args:
        guarantees: of `guarantee_on_validation`, one or several.
        predictions: predictions table; splits other than validation do not matter.

    Example:
        >>> (promise,) = checked_guarantees(promise, predictions)
        >>> promise.covers(0.15, level="patient", aggregation=Aggregation("max"))
        True

    Raises:
        ValueError: one is not a `Guarantee`, or see `Guarantee.check_made_on`.
    """
    found = one_or_several(guarantees)
    for each in found:
        if not isinstance(each, Guarantee):
            raise ValueError(f"A guarantee {_AGAIN} Found {type(each).__name__} {each!r}.")
        each.check_made_on(predictions)
    return found


def guarantee_on_validation(
    predictions: pd.DataFrame,
    *,
    level: str,
    recall: float,
    delta: float = 0.05,
    average: Average = "vertebrae",
    aggregation: Aggregation | None = None,
    hoped: float | None = None,
) -> Guarantee:
    """The guarantee that a decision about these predictions may carry; only validation rows are looked at.

    Args:
        predictions: predictions table; the split `validation` of it is what the guarantee rests on.
        level: one of `GUARANTEE_LEVELS`.
        recall: see `guarantee_recall`.
        delta: see there.
        average: see there.
        aggregation: how a patient's vertebrae become one probability; at level `patient`, and only there.
        hoped: see there.

    Example:
        >>> by_max = Aggregation("max")
        >>> guarantee_on_validation(table, level="patient", recall=0.9, aggregation=by_max).require()
        0.187

    Raises:
        ValueError: see `guarantee_recall`; the table breaks the schema or has no validation rows; there is no
            aggregation at level `patient`, one at another level, or one that was fitted on these patients; a
            patient has several studies.
    """
    if aggregation is not None and aggregation.fitted_on is not None:
        raise ValueError(
            "No guarantee holds with an aggregation that was fitted on the validation patients: it has seen "
            "them. Use max, noisy_or or top_k, or leave the guarantee out."
        )
    check_choice("level", level, GUARANTEE_LEVELS)
    table = validation_rows(predictions)
    _check_one_study_each(table)
    rows = rows_at(table, "patient" if level == "patient" else "vertebra", aggregation)
    if level in VERTEBRAE:
        rows = rows[rows["vertebra"] == level]
    made = guarantee_recall(
        rows["label"],
        rows["probability"],
        rows[UID],
        recall=recall,
        level=level,
        delta=delta,
        average=average,
        hoped=hoped,
    )
    return replace(made, aggregation=aggregation, rows_sha256=predictions_sha256(table))


def guarantee_recall(
    labels: ArrayLike,
    probabilities: ArrayLike,
    patients: ArrayLike,
    *,
    recall: float,
    level: str,
    delta: float = 0.05,
    average: Average = "vertebrae",
    hoped: float | None = None,
) -> Guarantee:
    """The highest threshold at which recall ≥ `recall` on new patients, with confidence 1 − `delta`.

    The proof on arrays, as simulations need it. A decision carries what `guarantee_on_validation` makes.

    Args:
        labels: (N,) of 0/1, at the level asked for.
        probabilities: (N,) in [0, 1].
        patients: (N,) study UIDs. Several rows of one patient belong to level `vertebra` alone.
        recall: what is promised, between 0 and 1.
        level: one of `GUARANTEE_LEVELS`.
        delta: how often the promise may be broken.
        average: see `Guarantee`; makes a difference at level `vertebra` only.
        hoped: a threshold one would rather have, to learn how many patients that would take.

    Raises:
        ValueError: see `metrics.check_scores`; no positives; a recall, delta, level, average or threshold
            that is none; a patient without UID, with several rows where one is due, or over seven fractures.
    """
    _check_promise(recall, delta)
    check_choice("level", level, GUARANTEE_LEVELS)
    check_choice("average", average, get_args(Average))
    if hoped is not None:
        _check_threshold(hoped)
    y, p = check_scores(labels, probabilities)
    who = _check_patients(patients, y, level)
    codes, uids = pd.factorize(who[y == 1])
    if (np.bincount(codes) > MOST).any():
        many = listing(uids[np.bincount(codes) > MOST].tolist())
        raise ValueError(
            f"A patient has {MOST} vertebrae; more are fractured in the rows of {many}. Drop repeated rows, "
            "and keep one study of each patient."
        )

    pooled = level != "vertebra" or average == "vertebrae"
    losses = PatientLosses(p[y == 1], codes, recall=recall, pooled=pooled)
    missed = None if hoped is None else losses.missed(hoped)
    if level == "vertebra":
        threshold = highest_threshold(losses, delta)
        needed = losses.needed_if_all_found(delta)
        needed_as_hoped = None if missed is None else losses.needed(missed, delta)
    else:
        allowed = _most_misses(len(uids), recall, delta)
        threshold = None if allowed < 0 else float(losses.scores[allowed])  # one more would be too many
        needed = patients_needed(recall, delta=delta)
        needed_as_hoped = None if missed is None else _least_patients(recall, delta, float(1 - missed.mean()))
    found = 0 if threshold is None else int((losses.scores >= threshold).sum())

    return Guarantee(
        threshold=threshold,
        level=level,
        average=average,
        recall=recall,
        delta=delta,
        patients=len(uids),
        positives=len(losses.scores),
        found=found,
        needed=needed,
        needed_as_hoped=needed_as_hoped,
    )


def patients_needed(recall: float, *, delta: float = 0.05, observed: float = 1.0) -> int:
    """The least number of fractured patients that guarantees `recall` where the share `observed` is found.

    For patients and single vertebrae, by the exact binomial test; log δ / log r where all are found.

    Raises:
        ValueError: recall or delta is none; `observed` is not above `recall`, so that no number suffices, or
            so close to it that more than 131,072 would be needed.
    """
    _check_promise(recall, delta)
    if not recall < observed <= 1:
        raise ValueError(
            f"To guarantee recall {recall:.4g} one must observe more than that; found {observed:.4g}. "
            "Ask for less recall, or lower the threshold."
        )
    least = _least_patients(recall, delta, observed)
    if least is None:
        raise ValueError(
            f"To guarantee recall {recall:.4g} where {observed:.4g} is observed takes more than {_LARGEST:,} "
            "patients. Ask for less recall."
        )
    return least


@cache
def _least_patients(recall: float, delta: float, observed: float) -> int | None:
    """See `patients_needed`; None: no number, or too large a one."""
    from scipy.stats import binom

    first, last = 1, 1024
    while first < _LARGEST and observed > recall:
        n = np.arange(first, last)
        missed = np.ceil(n * (1 - observed) - 1e-9)
        enough = np.flatnonzero(binom.cdf(missed, n, 1 - recall) <= _rounded_up(delta))
        if len(enough):
            return int(n[enough[0]])
        first, last = last, 2 * last
    return None


@cache
def _most_misses(patients: int, recall: float, delta: float) -> int:
    """The most misses that the binomial test allows; -1: it allows no patient to be missed, nor none."""
    from scipy.stats import binom

    allowed = int(binom.ppf(delta, patients, 1 - recall))  # the first whose probability reaches δ …
    return allowed - int(binom.cdf(allowed, patients, 1 - recall) > _rounded_up(delta))  # … or exceeds it


def _rounded_up(delta: float) -> float:
    """δ with room for the rounding of a probability that equals it."""
    return delta * (1 + 1e-12)


def _check_promise(recall: float, delta: float) -> None:
    for name, value in (("recall", recall), ("delta", delta)):
        if not 0 < value < 1:
            raise ValueError(
                f"{name} lies between 0 and 1; found {value}. Give a fraction such as 0.9 or 0.05."
            )


def _check_threshold(threshold: float) -> None:
    if not 0 <= threshold <= 1:
        raise ValueError(f"A threshold lies in [0, 1]; found {threshold}. Choose it again.")


def _check_one_study_each(table: pd.DataFrame) -> None:
    """Refuse rows of which some patients have several studies: neither test knows what these share."""
    studies = table[UID].groupby(resampled_units(table), sort=False).nunique()
    if (several := studies[studies > 1]).any():
        raise ValueError(
            f"A guarantee counts patients, and takes one study of each; found several studies of "
            f"{len(several)} patients ({listing(several.index)}). Keep one: predictions[predictions"
            f"[{UID!r}] == predictions.groupby('patient')[{UID!r}].transform('first')]"
        )


def _check_patients(patients: ArrayLike, labels: NDArray[np.int64], level: str) -> NDArray:
    who = np.asarray(patients)
    absent = pd.isna(who)
    if who.shape != labels.shape or absent.any():
        raise ValueError(
            f"Each of the {len(labels)} rows needs its patient; found shape {who.shape}, {absent.sum()} "
            "missing. Pass the column StudyInstanceUID of the same table."
        )
    if not labels.any():
        raise ValueError(
            f"None of the {len(labels)} rows at level {level!r} is positive, so that recall is not defined. "
            "Use more studies, or another level."
        )
    if level != "vertebra" and len(pd.unique(who)) < len(who):
        twice = pd.unique(who[pd.Series(who).duplicated()]).tolist()
        raise ValueError(
            f"At level {level!r} a patient has one row; found several of {len(twice)} ({listing(twice)}). "
            f"Keep one study of each patient, and pass metrics.at_level(predictions, {level!r})."
        )
    return who
