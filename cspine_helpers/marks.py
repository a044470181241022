"""The chosen and the guaranteed threshold of each level, and the decision that any other one makes."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd

from cspine_helpers.aggregation import aggregate, default_aggregation
from cspine_helpers.decisions import Decision, choose_threshold, state_threshold
from cspine_helpers.guarantees import Guarantee, checked_guarantees
from cspine_helpers.labels import VERTEBRAE
from cspine_helpers.metrics import at_level, defined_levels
from cspine_helpers.objectives import few_called

DECIMALS = 4  # of a threshold, at least
NAMES = {"all": "all vertebrae", "patient": "patients"}  # of levels within a sentence; C1 … C7 as they are


def digits(threshold: float) -> str:
    """All decimals of a threshold, four at least."""
    return np.format_float_positional(threshold, unique=True, min_digits=DECIMALS)


class Marks:
    """What is marked on the slider.

    Args:
        predictions: predictions table, checked.
        decision: marked as chosen at its level; thresholds of single vertebrae at theirs.
        threshold: marked as start at every level, without a decision; None: the highest F1 of the first.
        guarantees: marked at their levels; made on the validation rows of these predictions, and for patients
            by the decision's aggregation.

    Attributes:
        levels: those of `metrics.LEVELS` that can be looked at.
        aggregation: how vertebrae become patients.
        level: to start at.
        start: threshold there.
        note: why there; and apart from it, what is guaranteed.

    Raises:
        ValueError: there is one class only, no threshold, one outside [0, 1], or one beside a decision; or a
            guarantee is of other predictions or another aggregation.
    """

    def __init__(
        self,
        predictions: pd.DataFrame,
        decision: Decision | None,
        threshold: float | None,
        guarantees: Guarantee | Iterable[Guarantee],
    ) -> None:
        if decision is not None and threshold is not None:
            raise ValueError("A decision has its threshold. Leave out the one or the other.")
        self._predictions, self._given = predictions, decision
        self.levels = defined_levels(predictions)
        if not self.levels:
            raise ValueError(
                f"All {len(predictions)} labels are alike, so no threshold can be judged. Use more studies."
            )
        chosen = decision.aggregation if decision else None
        self.aggregation = chosen or default_aggregation(predictions)
        patients = aggregate(predictions, self.aggregation)["probability"]
        self._scores = np.sort(np.concatenate([predictions["probability"], patients]))
        self.level, start, why = self._beginning(threshold)
        self.start = self.readable(start)

        self._guarantees = checked_guarantees(guarantees, predictions)
        for each in self._guarantees:
            if each.level == "patient" and each.aggregation != self.aggregation:
                raise ValueError(
                    f"The guarantee is for patients by {each.aggregation and each.aggregation.name}, those "
                    f"here are by {self.aggregation.name}. Make one by the same aggregation."
                )
        reasons = []
        for each in self._guarantees:
            highest = self.at(_shown(each.level)).get("guaranteed")
            mark = "none" if highest is None else digits(highest)
            reasons.append(
                f"Guaranteed for {NAMES.get(_shown(each.level), each.level)}: {mark}. {each.reason}"
            )
        few = few_called((self._rows(self.level)["probability"] >= self.start).sum())
        self.note = " ".join([f"{why}, {digits(self.start)}.{few}", *reasons])

    def _rows(self, level: str) -> pd.DataFrame:
        """Labels and probabilities at a level; patients by the aggregation."""
        if level == "patient":
            return aggregate(self._predictions, self.aggregation)
        return at_level(self._predictions, level)

    def _beginning(self, threshold: float | None) -> tuple[str, float, str]:
        """Level and threshold to start at, and why there."""
        first, given = self.levels[0], self._given
        if given is None and threshold is not None:
            return first, threshold, "Starts at the threshold it was given"
        if given is None:
            rows = at_level(self._predictions, first)
            best = choose_threshold(rows["label"], rows["probability"], objective="max_f1").require()
            return (
                first,
                best,
                f"No threshold is chosen. Starts at the highest F1 of {NAMES.get(first, first)}",
            )
        if given.thresholds is not None:
            level = next(level for level in self.levels if level in VERTEBRAE)
            return level, given.thresholds[level], f"Starts at the threshold chosen for {level}"
        level = _shown(given.level)
        if level not in self.levels:
            raise ValueError(
                f"The decision is of {given.level} level, where all labels are alike here. Use more studies."
            )
        return level, given.require(), "Starts at the chosen threshold"

    def readable(self, threshold: float) -> float:
        """The threshold in the fewest decimals that call the same, so that what is shown is counted.

        A chosen threshold is itself a score as a rule: rounded up, it would leave its own case out.

        Raises:
            ValueError: it is not in [0, 1].
        """
        if not 0 <= threshold <= 1:
            raise ValueError(f"A threshold lies in [0, 1]; found {threshold}. Choose it again.")
        below = np.searchsorted(self._scores, threshold)
        rounded = (round(float(threshold), decimals) for decimals in range(DECIMALS, 18))
        alike = (value for value in rounded if np.searchsorted(self._scores, value) == below)
        return next(alike, float(threshold))

    def at(self, level: str) -> dict[str, float]:
        """Name → threshold, of what is marked at a level."""
        marks: dict[str, float | None] = {}
        if self._given is None:
            marks["start"] = self.start
        elif (self._given.level == "patient") == (level == "patient"):
            marks["chosen"] = (self._given.thresholds or {}).get(level, self._given.threshold)
        if promise := self._promise(level):
            marks["guaranteed"] = promise.threshold
        return {name: self.readable(mark) for name, mark in marks.items() if mark is not None}

    def guarantee(self, level: str, threshold: float) -> Guarantee | None:
        """The guarantee that holds for a threshold at a level; None: none does."""
        highest = self.at(level).get("guaranteed")
        return None if highest is None or threshold > highest else self._promise(level)

    def standing(self, level: str, threshold: float) -> str:
        """Whether a threshold is a guaranteed one, and apart from it which is; empty without a guarantee."""
        if not self._guarantees:
            return ""
        promise, highest = self._promise(level), self.at(level).get("guaranteed")
        now = f"Now {digits(threshold)}, {NAMES.get(level, level)}"
        if promise is None:
            return f"{now}: no guarantee, which is for {' and '.join(self._guaranteed_levels())}."
        if highest is None:
            return f"{now}: no guarantee. Guaranteed: none."
        held = "no guarantee" if self.guarantee(level, threshold) is None else "guaranteed"
        return f"{now}: {held}. Guaranteed: {digits(highest)}."

    def _guaranteed_levels(self) -> list[str]:
        """Levels with a guarantee, in words."""
        return [NAMES.get(_shown(each.level), each.level) for each in self._guarantees]

    def decision(self, level: str, threshold: float) -> Decision:
        """The decision that a threshold makes: the one given where it is that one's, else a stated one.

        Raises:
            ValueError: the level is a single vertebra.
        """
        if level in VERTEBRAE:
            raise ValueError("A decision is for all vertebrae, or for patients. Choose that level.")
        if self._given is not None and self.at(level).get("chosen") == threshold:
            return self._given
        rows, options = self._rows(level), dict[str, Any]()
        if level == "patient":
            options = {"level": "patient", "aggregation": self.aggregation}
        reason = "Set by hand on the slider."
        return state_threshold(rows["label"], rows["probability"], threshold, reason=reason, **options)

    def _promise(self, level: str) -> Guarantee | None:
        return next((each for each in self._guarantees if _shown(each.level) == level), None)


def _shown(level: str) -> str:
    """Level of the slider, for one of a decision or a guarantee."""
    return "all" if level == "vertebra" else level
