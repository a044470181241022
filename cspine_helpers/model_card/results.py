"""What predictions of one split show, with 95 % intervals, as the Markdown tables of a model card."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd

from cspine_helpers.decisions.thresholds import MIN_POSITIVES, Decision, apply_decision
from cspine_helpers.evaluation.cases import Aggregation, Cases
from cspine_helpers.evaluation.intervals import MOST_UNDEFINED, bootstrap, per_vertebra, rsna_loss
from cspine_helpers.evaluation.reliability import calibration_scores, written_scores
from cspine_helpers.evaluation.resampling import AREAS, RATES
from cspine_helpers.metrics import clip_note, confusion

RESAMPLES, BINS = 1000, 10
UNDEFINED = "undefined"
UNITS = {"vertebra": "vertebrae", "patient": "patients"}  # level of a decision → what it calls
TITLES = {
    "recall": "recall (sensitivity)",
    "precision": "precision (positive predictive value)",
    "specificity": "specificity",
    "npv": "negative predictive value",
    "f1": "F1",
    "accuracy": "accuracy",
    "auroc": "AUROC",
    "average_precision": "average precision",
    "brier": "Brier score",
    "log_loss": "log loss",
    "bias": "bias (mean probability − share of fractures)",
    "slope": "calibration slope",
    "ece": "expected calibration error (ECE), debiased",
    "rsna_loss": "pooled over all terms",
    "rsna_loss_per_patient": "mean over patients",
}


def number(value: float) -> str:
    """Three decimals, more where they would hide that it is not 0; a word where it is undefined."""
    if not np.isfinite(value):
        return UNDEFINED
    small = 0 < abs(value) < 0.0005
    return f"{value:.1g}".replace("-", "−") if small else f"{value:.3f}".replace("-", "−")


def share(some: int, of: int) -> str:
    """A count with its share: 12 (0.300)."""
    return f"{some:,} ({number(some / of)})" if of else "0"


def cell(text: object) -> str:
    """Text in one line of Markdown, so that nothing in it ends a table's cell or starts a tag."""
    return " ".join(str(text).split()).replace("|", "\\|").replace("<", "&lt;")


def markdown(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [list(header), ["---"] * len(header), *([cell(value) for value in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


class Reached(NamedTuple):
    """What a decision reaches at its level.

    Attributes:
        counts: tp, fp, fn and tn.
        rates: `value, low, high, undefined` by `metric`.
    """

    counts: dict[str, int]
    rates: pd.DataFrame


@dataclass(frozen=True)
class Findings:
    """Numbers of one split; each frame has `value, low, high, undefined` by `metric`.

    Attributes:
        cases: vertebrae and patients → cases of the split.
        reached: level of a decision with a threshold → what it reaches.
        scores: vertebrae and patients → losses and areas of the probabilities.
        vertebrae: of `intervals.per_vertebra`; rates only for a decision about vertebrae.
    """

    cases: dict[str, Cases]
    reached: dict[str, Reached]
    scores: dict[str, pd.DataFrame]
    vertebrae: pd.DataFrame

    @property
    def aggregation(self) -> Aggregation | None:
        """How patients were made of vertebrae."""
        return self.cases["patients"].aggregation

    def decision_table(self, level: str) -> str:
        """Counts and rates of the decision at a level."""
        counts, rates = self.reached[level]
        tp, fp, fn, tn = (f"{counts[name]:,}" for name in ("tp", "fp", "fn", "tn"))
        what = UNITS[level]
        table = markdown(
            [what, "called fractured", "not called"], [["fractured", tp, fn], ["intact", fp, tn]]
        )
        rows = ([TITLES[name], _estimate(rates, name)] for name in RATES)
        return f"{table}\n\n{markdown([f'{what} at the threshold', 'value (95 % interval)'], rows)}"

    def ranking_table(self) -> str:
        """Areas under curves, with what chance alone gives."""
        chance = {"auroc": lambda share: 0.5, "average_precision": lambda share: share}
        rows = [
            [level, TITLES[name], _estimate(found, name), number(chance[name](self.cases[level].prevalence))]
            for level, found in self.scores.items()
            for name in AREAS
        ]
        return markdown(["level", "metric", "value (95 % interval)", "chance"], rows)

    def vertebra_table(self) -> str:
        """Each vertebra by itself."""
        names = [name for name in ("recall", "precision", *AREAS) if name in set(self.vertebrae["metric"])]
        rows = []
        for vertebra, part in self.vertebrae.groupby("vertebra", sort=False):
            found = part.set_index("metric")
            counted = [f"{found[name].iloc[0]:,}" for name in ("studies", "positives")]
            rows.append([vertebra, *counted, *(_estimate(found, name) for name in names)])
        titles = [_short(name) for name in names]
        return markdown(["vertebra", "studies", "fractured", *titles], rows)

    def calibration_table(self) -> str:
        """Scores of the probabilities as they are, beside those of always saying the share of fractures."""
        rows = []
        for level, cases in self.cases.items():
            written = written_scores(calibration_scores(cases, bins=BINS, resamples=RESAMPLES))
            p = cases.label.mean()
            with np.errstate(divide="ignore", invalid="ignore"):  # one class only: nothing is uncertain
                entropy = np.nan_to_num(-p * np.log(p) - (1 - p) * np.log1p(-p))
            constant = {"brier": number(p * (1 - p)), "log_loss": number(entropy)}
            constant |= {"bias": number(0), "slope": UNDEFINED, "ece": number(0)}
            for name, always in constant.items():
                said = self.scores[level]  # which has the losses
                text = _estimate(said, name) if name in said.index else written[name].replace("-", "−")
                rows.append([level, TITLES[name], text, always])
        return markdown(
            ["level", "score", "value (95 % interval)", "always saying the share of fractures"], rows
        )

    def clipped(self) -> str:
        """Which log losses the clip decides, of vertebrae and of patients; empty where it decides none."""
        notes = {name.title(): clip_note(of.label, of.probability) for name, of in self.cases.items()}
        return " ".join(f"{name}: {note}" for name, note in notes.items() if note)

    def competition_table(self) -> str | None:
        """The RSNA 2022 loss, beside that of always saying the shares of fractures; None: not defined."""
        if "rsna_loss" not in self.scores["vertebrae"].index:
            return None
        shares = [cases.with_probability(cases.prevalence) for cases in self.cases.values()]
        rows = []
        for name in ("rsna_loss", "rsna_loss_per_patient"):
            each = name == "rsna_loss_per_patient"
            constant = number(rsna_loss(*shares, per_patient=each))
            rows.append([TITLES[name], _estimate(self.scores["vertebrae"], name), constant])
        return markdown(["loss", "value (95 % interval)", "always saying the share of fractures"], rows)

    def prevalence(self) -> dict[str, float]:
        """Shares of vertebrae and of patients that are fractured."""
        return {level: cases.prevalence for level, cases in self.cases.items()}

    def incomplete(self) -> tuple[int, int] | None:
        """How many patients lack a vertebra, of how many; None where nobody does."""
        missing = self.cases["patients"].missing > 0
        return (int(missing.sum()), len(missing)) if missing.any() else None

    def rare(self) -> list[str]:
        """Vertebrae with few fractures, each with their number."""
        counts = self.vertebrae.drop_duplicates("vertebra")
        few = counts[counts["positives"] < MIN_POSITIVES]
        return [f"{row.vertebra} {row.positives}" for row in few.itertuples()]

    def lacking(self) -> list[str]:
        """Metrics that are undefined, or too often so in resamples for an interval, in words."""
        frames = {f"the decision about {UNITS[level]}": each.rates for level, each in self.reached.items()}
        frames |= self.scores
        frames |= {str(name): part.set_index("metric") for name, part in self.vertebrae.groupby("vertebra")}
        lines = []
        for where, frame in frames.items():
            names = [_short(str(name)) for name in frame.index if not _bounded(frame, str(name))]
            lines += [f"{', '.join(names)} of {where}"] if names else []
        return lines


def find(rows: pd.DataFrame, decisions: Mapping[str, Decision]) -> Findings:
    """All numbers of one split.

    Args:
        rows: predictions table of one split, with two patients or more.
        decisions: level → decision, applied there; one without a threshold has no rates.

    Raises:
        ValueError: see `intervals.bootstrap`.
    """
    patient = decisions.get("patient")
    vertebrae = Cases.of(rows)
    patients = vertebrae.patients(patient.rule.aggregation if patient else None)
    decisions = {
        level: each for level, each in decisions.items() if each.threshold is not None or each.thresholds
    }
    reached = {level: _reached(rows, each, patients) for level, each in decisions.items()}
    chosen = None if patients.missing.any() else patients
    scores = {"vertebrae": _bootstrap(vertebrae, patients=chosen), "patients": _bootstrap(patients)}

    vertebral = decisions.get("vertebra")
    threshold = (vertebral.thresholds or vertebral.require()) if vertebral else 0.5
    single = per_vertebra(vertebrae, threshold=threshold, resamples=RESAMPLES)
    shown = ("recall", "precision", *AREAS) if vertebral else AREAS
    single = single[single["metric"].isin(shown)]
    return Findings({"vertebrae": vertebrae, "patients": patients}, reached, scores, single)


def _reached(rows: pd.DataFrame, decision: Decision, patients: Cases) -> Reached:
    called = apply_decision(decision, rows)
    cases = patients if decision.rule.level == "patient" else Cases.of(rows)
    cases = cases.with_probability(called["positive"].astype(float))
    counted = confusion(cases.label, cases.probability, 0.5).iloc[0]
    counts = {name: int(counted[name]) for name in ("tp", "fp", "fn", "tn")}
    return Reached(counts, _bootstrap(cases, threshold=0.5).loc[[*RATES]])


def _bootstrap(
    cases: Cases, *, threshold: float | None = None, patients: Cases | None = None
) -> pd.DataFrame:
    found = bootstrap(cases, threshold=threshold, resamples=RESAMPLES, patients=patients, keep_undefined=True)
    return found.set_index("metric")


def _bounded(found: pd.DataFrame, name: str) -> bool:
    """Whether a metric is defined, in nearly all resamples, so that its interval means something."""
    value, undefined = found["value"][name], found["undefined"][name]
    return bool(np.isfinite(value) and undefined <= MOST_UNDEFINED * RESAMPLES)


def _estimate(found: pd.DataFrame, name: str) -> str:
    value, low, high = (number(found[column][name]) for column in ("value", "low", "high"))
    if _bounded(found, name):
        return f"{value} ({low}{' to ' if '−' in low + high else '–'}{high})"
    return value if value == UNDEFINED else f"{value} (no interval)"


def _short(name: str) -> str:
    return TITLES[name].partition(" (")[0]
