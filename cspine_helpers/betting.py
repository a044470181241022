"""The test behind promises about vertebrae: a bet on each patient against the promise being broken.

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

from functools import cache
from math import ceil, log, log1p

import numpy as np
from numpy.typing import NDArray

from cspine_helpers.labels import VERTEBRAE

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
