"""What predictions of one split show, with 95 % intervals, as the tables and limits of a model card."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.special import entr

from cspine_helpers.decisions.test_split import (
    DECISION,
    Frozen,
    check_belongs,
    read_decision,
    read_openings,
)
from cspine_helpers.decisions.thresholds import MIN_POSITIVES, Decision, apply_decision
from cspine_helpers.evaluation.cases import PLURALS, Cases
from cspine_helpers.evaluation.intervals import MOST_UNDEFINED, bootstrap, per_vertebra, rsna_loss
from cspine_helpers.evaluation.reliability import calibration_scores, written_scores
from cspine_helpers.evaluation.resampling import AREAS, RATES
from cspine_helpers.files.paths import inside
from cspine_helpers.files.tables import read_columns
from cspine_helpers.metrics import clip_note, confusion
from cspine_helpers.predictions import SINGLE, predictions_sha256, read_predictions
from cspine_helpers.runs import (
    ENSEMBLE,
    RADIOGRAPHS,
    RECORD,
    check_described,
    other_runs,
    read_ensemble,
    read_record,
    task_of,
)

_WEIGHTS, _HISTORY, _PREDICTIONS = "model.safetensors", "history.csv", "predictions.csv"
UNKNOWN = "not on record"


@dataclass(frozen=True)
class RunFiles:
    """What is known of a run.

    Attributes:
        name: of the folder.
        record: the whole of `run.json`; empty where there is none, as for predictions made elsewhere.
        ensemble: the whole of `ensemble.json`; empty where the predictions are not of several runs.
        epochs: how many were trained, by `history.csv`; None where it is missing.
        weights: whether `model.safetensors` is there.
        predictions: predictions table; None where it is missing.
        decisions: level → the frozen decision; where none is frozen, the one that training chose, if there is
            one.
        frozen: the frozen decisions with their record; None where none is frozen.
        openings: of the test split, see `test_split.read_openings`.
    """

    name: str
    record: dict[str, Any]
    ensemble: dict[str, Any]
    epochs: int | None
    weights: bool
    predictions: pd.DataFrame | None
    decisions: dict[str, Decision]
    frozen: Frozen | None
    openings: pd.DataFrame

    def said(self, *keys: str) -> Any:
        """What `run.json` says at a place, `said("data", "cohort")`; None where it says nothing."""
        found: Any = self.record
        for key in keys:
            found = found.get(key) if isinstance(found, Mapping) else None
        return found

    def recorded(self, *keys: str) -> str:
        """The same in words, for a text."""
        found = self.said(*keys)
        return UNKNOWN if found is None else " ".join(str(found).split())

    def words(self, key: str) -> Callable[[str], str]:
        """`recorded` of one part of the record: `words("model")("size")`."""
        return partial(self.recorded, key)

    def guaranteed(self, level: str) -> str:
        """What is guaranteed of the frozen decision at a level; empty where nothing is."""
        every = self.frozen.guarantees if self.frozen is not None else ()
        reasons = [each.reason for each in every if each.target.decision_level == level]
        if reasons and self.predictions is None:
            return "not shown: without `predictions.csv` it cannot be checked"
        return " ".join(reasons)

    @property
    def splits(self) -> dict[str, pd.DataFrame]:
        """Split → its predictions; validation first, test last."""
        if self.predictions is None:
            return {}
        parts = {str(name): rows for name, rows in self.predictions.groupby("split")}
        return dict(sorted(parts.items(), key=lambda part: (part[0] == "test", part[0] != "validation")))

    @property
    def opened(self) -> bool:
        """Whether the test split was opened with what is frozen and these predictions."""
        if self.frozen is None or self.predictions is None:
            return False
        same = self.openings["decision_sha256"] == self.frozen.sha256
        return bool((same & (self.openings["predictions_sha256"] == self.predictions_sha256)).any())

    @property
    def predictions_sha256(self) -> str | None:
        """Of the predictions table, as a frozen decision names it."""
        return None if self.predictions is None else predictions_sha256(self.predictions)

    @property
    def level(self) -> str:
        """What the predictions are of: `vertebra`, `image` or `study`; without any, by the task."""
        if self.predictions is not None:
            first = str(self.predictions["vertebra"].iloc[0])
            return first if first in SINGLE else "vertebra"
        return "image" if task_of(self.record) == RADIOGRAPHS else "vertebra"

    @property
    def synthetic(self) -> bool:
        """Whether the run was trained on phantoms of this package, by its record."""
        return self.said("cohort", "phantom", "made_by") == "cspine_helpers.phantom"


def read_run_files(run_folder: str | Path) -> RunFiles:
    """Read and check what a run folder holds; every file may be missing, but not all of them.

    Raises:
        FileNotFoundError: there is neither a run nor a predictions table.
        ValueError: a file is damaged, or belongs to another run than those beside it; names it.
    """
    folder = Path(run_folder)
    record = read_record(folder) if (folder / RECORD).is_file() else {}
    ensemble = read_ensemble(folder) if (folder / ENSEMBLE).is_file() else {}
    table = inside(folder / _PREDICTIONS)
    if ensemble and table.is_file():
        check_described(table, ensemble, "predictions_sha256", by=ENSEMBLE)
    if not record and not table.is_file():
        raise FileNotFoundError(
            f"Nothing is known of a run at {folder}: {RECORD} and {_PREDICTIONS} are missing. Train one with "
            f"notebook 03, or put a predictions table there.{other_runs(folder)}"
        )
    weights = _described(folder / _WEIGHTS, record, "weights_sha256")
    history = _described(folder / _HISTORY, record, "history_sha256")
    predictions = read_predictions(table) if table.is_file() else None
    frozen = read_decision(folder) if (folder / DECISION).is_file() else None
    if frozen is not None and predictions is not None:
        check_belongs(frozen, predictions)
    return RunFiles(
        name=folder.resolve().name,
        record=record,
        ensemble=ensemble,
        epochs=len(read_columns(history, what="history", source="")) if history else None,
        weights=weights is not None,
        predictions=predictions,
        decisions=frozen.decisions if frozen else _decisions(record, folder),
        frozen=frozen,
        openings=read_openings(folder),
    )


def _described(path: Path, record: Mapping[str, Any], key: str) -> Path | None:
    """The file, if it is there and the record describes it; without a record nothing is known of it."""
    if not record or not inside(path).is_file():
        return None
    check_described(path, record, key)
    return path


def _decisions(record: Mapping[str, Any], folder: Path) -> dict[str, Decision]:
    """Level → the decision that training chose."""
    if (found := record.get("decision")) is None:
        return {}
    try:
        decision = Decision.from_record(found)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{folder / RECORD} holds no whole decision: {error} Restore it, or train again."
        ) from error
    return {decision.rule.level: decision}


RESAMPLES, BINS = 1000, 10
UNDEFINED = "undefined"
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


@dataclass(frozen=True)
class Findings:
    """Numbers of one split; each frame has `value, low, high, undefined` by `metric`; methods return rows.

    Attributes:
        cases: vertebrae and patients → cases of the split; or images alone.
        reached: level of a decision with a threshold → counts tp, fp, fn, tn, and rates.
        scores: the same → losses and areas of the probabilities.
        vertebrae: of `intervals.per_vertebra`, without rows for images; rates only for a decision about
            vertebrae.
    """

    cases: dict[str, Cases]
    reached: dict[str, tuple[dict[str, int], pd.DataFrame]]
    scores: dict[str, pd.DataFrame]
    vertebrae: pd.DataFrame

    @property
    def units(self) -> Cases:
        """The cases as they were predicted: vertebrae, or images."""
        return next(iter(self.cases.values()))

    def confusion(self, level: str) -> list[list[str]]:
        """Fractured and intact cases: how many the decision at a level calls fractured, how many not."""
        tp, fp, fn, tn = (f"{self.reached[level][0][name]:,}" for name in ("tp", "fp", "fn", "tn"))
        return [["fractured", tp, fn], ["intact", fp, tn]]

    def rates(self, level: str) -> list[list[str]]:
        """Rates of the decision at a level."""
        return [[TITLES[name], _estimate(self.reached[level][1], name)] for name in RATES]

    def ranking(self) -> list[list[str]]:
        """Areas under curves, with what chance alone gives."""
        return [
            [level, TITLES[name], _estimate(found, name), number(0.5 if name == "auroc" else prevalence)]
            for level, found in self.scores.items()
            for name, prevalence in zip(AREAS, [self.cases[level].prevalence] * 2, strict=True)
        ]

    def each_vertebra(self) -> list[list[str]]:
        """The header, then each vertebra by itself."""
        names = [name for name in ("recall", "precision", *AREAS) if name in set(self.vertebrae["metric"])]
        rows = [["vertebra", "studies", "fractured", *map(_short, names)]]
        for vertebra, part in self.vertebrae.groupby("vertebra", sort=False):
            found = part.set_index("metric")
            counted = [f"{found[name].iloc[0]:,}" for name in ("studies", "positives")]
            rows.append([str(vertebra), *counted, *(_estimate(found, name) for name in names)])
        return rows

    def calibration(self) -> list[list[str]]:
        """Scores of the probabilities as they are, beside those of always saying the share of fractures."""
        rows = []
        for level, cases in self.cases.items():
            written = written_scores(calibration_scores(cases, bins=BINS, resamples=RESAMPLES))
            p = cases.prevalence
            constant = {"brier": number(p * (1 - p)), "log_loss": number(float(entr([p, 1 - p]).sum()))}
            constant |= {"bias": number(0), "slope": UNDEFINED, "ece": number(0)}
            for name, always in constant.items():
                said = self.scores[level]  # which has the losses
                text = _estimate(said, name) if name in said.index else written[name].replace("-", "−")
                rows.append([level, TITLES[name], text, always])
        return rows

    def clipped(self) -> str:
        """Which log losses the clip decides, of vertebrae and of patients; empty where it decides none."""
        notes = {name.title(): clip_note(of.label, of.probability) for name, of in self.cases.items()}
        return " ".join(f"{name}: {note}" for name, note in notes.items() if note)

    def competition(self) -> list[list[str]]:
        """The RSNA 2022 loss, beside that of always saying the shares of fractures; empty: not defined."""
        found = self.scores[self.units.plural]
        if "rsna_loss" not in found.index:
            return []
        shares = [cases.with_probability(cases.prevalence) for cases in self.cases.values()]
        ways = {"rsna_loss": False, "rsna_loss_per_patient": True}
        return [
            [TITLES[name], _estimate(found, name), number(rsna_loss(*shares, per_patient=way))]
            for name, way in ways.items()
        ]

    def incomplete(self) -> tuple[int, int] | None:
        """How many patients lack a vertebra, of how many; None where nobody does."""
        missing = list(self.cases.values())[-1].missing > 0
        return (int(missing.sum()), len(missing)) if missing.any() else None

    def rare(self) -> list[str]:
        """Vertebrae with few fractures, each with their number."""
        counts = self.vertebrae.drop_duplicates("vertebra")
        few = counts[counts["positives"] < MIN_POSITIVES]
        return [f"{row.vertebra} {row.positives}" for row in few.itertuples()]

    def lacking(self) -> list[str]:
        """Metrics that are undefined, or too often so in resamples for an interval, in words."""
        frames = {f"the decision about {PLURALS[level]}": rates for level, (_, rates) in self.reached.items()}
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
    units = Cases.of(rows)
    patients = units.patients(patient.rule.aggregation if patient else None)
    decisions = {
        level: each for level, each in decisions.items() if each.threshold is not None or each.thresholds
    }
    reached = {level: _reached(rows, each, patients) for level, each in decisions.items()}
    if patients is units:  # images
        scores = {units.plural: _bootstrap(units)}
        none = pd.DataFrame(columns=["vertebra", "studies", "positives", "metric"])
        return Findings({units.plural: units}, reached, scores, none)
    chosen = None if patients.missing.any() else patients
    scores = {"vertebrae": _bootstrap(units, patients=chosen), "patients": _bootstrap(patients)}

    vertebral = decisions.get("vertebra")
    threshold = (vertebral.thresholds or vertebral.require()) if vertebral else 0.5
    single = per_vertebra(units, threshold=threshold, resamples=RESAMPLES)
    shown = ("recall", "precision", *AREAS) if vertebral else AREAS
    single = single[single["metric"].isin(shown)]
    return Findings({"vertebrae": units, "patients": patients}, reached, scores, single)


def _reached(rows: pd.DataFrame, decision: Decision, patients: Cases) -> tuple[dict[str, int], pd.DataFrame]:
    called = apply_decision(decision, rows)
    cases = patients if decision.rule.level == "patient" else Cases.of(rows)
    cases = cases.with_probability(called["positive"].astype(float))
    counted = confusion(cases.label, cases.probability, 0.5).iloc[0]
    counts = {name: int(counted[name]) for name in ("tp", "fp", "fn", "tn")}
    return counts, _bootstrap(cases, threshold=0.5).loc[[*RATES]]


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
