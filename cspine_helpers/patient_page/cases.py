"""Five patients to learn on, chosen by rule from the validation split: the test split stays closed.

A rule takes the middle one of those who fit it, by the patient's probability: a typical one, not the finest.
"""

from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from cspine_helpers.decisions.test_split import Frozen
from cspine_helpers.decisions.thresholds import apply_decision
from cspine_helpers.labels import UID, VERTEBRAE
from cspine_helpers.packed import sequence_path

TITLES = {
    "true_call": "a true call",
    "neighbour_alarm": "a neighbour's alarm",
    "miss": "a miss",
    "clear_negative": "a clear negative",
    "missing_vertebra": "a missing vertebra",
}


@dataclass(frozen=True)
class Case:
    """One patient to learn on.

    Attributes:
        name: one of `TITLES`.
        uid: StudyInstanceUID.
        why: the rule that it was chosen by, and how many fit it.
        ending_above: the vertebra above which its scan is taken to end, see `PatientPages.page`.
    """

    name: str
    uid: str
    why: str
    ending_above: str | None = None

    @property
    def title(self) -> str:
        """In words."""
        return TITLES[self.name]


def choose_cases(frozen: Frozen, predictions: pd.DataFrame, packed: Path | None = None) -> dict[str, Case]:
    """The cases, by name, of a run's validation patients; a case that no patient fits is left out.

    Args:
        frozen: of `read_decision`: the calls are those of its decisions about vertebrae and patients.
        predictions: the run's table.
        packed: the cohort's `packed` folder, where a vertebra may be missing; None: nobody looks.

    Raises:
        ValueError: a decision at one of the levels is missing; there are no validation rows.

    Example:
        >>> from cspine_helpers.decisions import read_decision
        >>> from cspine_helpers.predictions import read_predictions
        >>> table = read_predictions(run_folder / "predictions.csv")
        >>> list(choose_cases(read_decision(run_folder), table))
        ['true_call', 'neighbour_alarm', 'clear_negative', 'missing_vertebra']
    """
    if lacking := [level for level in ("vertebra", "patient") if level not in frozen.decisions]:
        raise ValueError(
            f"No decision at {' and '.join(lacking)} level is frozen in {frozen.folder}: cases are chosen by "
            "what is called. Choose and freeze it with notebook 04."
        )
    # 1. Calls and truth of each validation study.
    validation = predictions[predictions["split"] == "validation"]
    called = apply_decision(frozen.decisions["vertebra"], validation)
    patients = apply_decision(frozen.decisions["patient"], validation).set_index(UID)
    calls, truth, probability = (
        called.pivot_table(name, UID, "vertebra", aggfunc="first").reindex(
            index=patients.index, columns=[*VERTEBRAE]
        )
        for name in ("positive", "label", "probability")
    )
    calls, truth = calls == True, truth == 1  # noqa: E712  # a missing vertebra is neither
    broken, alarm = truth.any(axis=1), patients["positive"]
    beside = truth.shift(1, axis=1, fill_value=False) | truth.shift(-1, axis=1, fill_value=False)
    echoes = probability.where(calls & ~truth & beside).max(axis=1)
    others = calls.drop(columns="C7").any(axis=1) | truth.drop(columns="C7").any(axis=1)
    gaps = [uid for uid in patients.index if packed and _lacks(packed, uid)]

    # 2. Who fits which rule; nobody is taken twice.
    score = patients["probability"]
    fitting = {
        "true_call": (
            broken & alarm & (calls == truth).all(axis=1),
            score,
            "all fractured vertebrae called, no other",
        ),
        "neighbour_alarm": (
            alarm & echoes.notna(),
            echoes,
            "an intact vertebra called beside a fractured one",
        ),
        "miss": (broken & ~alarm, score, "a fracture, and the patient not called"),
        "clear_negative": (~broken & ~alarm & ~calls.any(axis=1), score, "no fracture, and nothing called"),
        "missing_vertebra": (
            (truth["C7"] & ~others) if not gaps else patients.index.isin(gaps),
            score,
            "a vertebra missing"
            if gaps
            else "only C7 fractured, the others not called; shown as if the scan ended above it",
        ),
    }
    cases: dict[str, Case] = {}
    for name, (fits, ranked, rule) in fitting.items():
        taken = {case.uid for case in cases.values()}
        ranking = sorted((float(ranked[uid]), uid) for uid in patients.index[fits] if uid not in taken)
        if ranking:
            cut = "C7" if name == "missing_vertebra" and not gaps else None
            why = f"{rule}; the middle one of {len(ranking)} by probability"
            cases[name] = Case(name, ranking[len(ranking) // 2][1], why, cut)
    return cases


def _lacks(packed: Path, uid: str) -> bool:
    return not all(sequence_path(packed, uid, name).is_file() for name in VERTEBRAE)
