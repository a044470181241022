"""Every threshold of a run in one table: what it is for, who chose it on what, and whether it is frozen.

Several thresholds of one run differ because they answer different questions. Side by side, with level, rule
and status, none is taken for another.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.special import expit, logit

from cspine_helpers.decisions.frozen_triage import TRIAGE, FrozenTriage, triage_as_written
from cspine_helpers.decisions.guarantees import Guarantee
from cspine_helpers.decisions.test_split import DECISION, Frozen, check_belongs, read_decision
from cspine_helpers.decisions.thresholds import STATED, Decision
from cspine_helpers.evaluation.calibration import Calibrator, calibrated
from cspine_helpers.evaluation.cases import PLURALS, Aggregation
from cspine_helpers.files.records import read_sealed
from cspine_helpers.predictions import predictions_sha256
from cspine_helpers.runs import RECORD, read_record

BLEND = "blend.json"  # written by radiographs.blend
COLUMNS = ("name", "level", "scale", "threshold", "calibrated", "purpose", "chosen_on", "status")
NOT_FROZEN = "not frozen"
_ON = "validation"
Row = tuple[str, str, str, float, str, str, str]  # COLUMNS without `calibrated`


def threshold_table(
    run_folder: str | Path,
    predictions: pd.DataFrame,
    *,
    others: Mapping[str, Decision | Guarantee] | None = None,
) -> pd.DataFrame:
    """All thresholds that a run folder holds, one a row, and those of a notebook beside them.

    Args:
        run_folder: `checkpoints/<run>`; `run.json`, `blend.json`, `decision.json` and `triage.json` are read
            where they exist.
        predictions: the whole predictions table of the run; a frozen threshold says so where it was frozen
            with another one.
        others: name → decision or guarantee that is not frozen.

    Returns:
        `name`; `level`, and how vertebrae become patients; `scale` of the threshold: a probability as
        predicted, or a triage's confidence; `threshold`, NaN where none qualified; `calibrated`: the same
        threshold as a calibrated probability, where a calibrator for that level is frozen; `purpose`: the
        rule, or what is guaranteed; `chosen_on`; `status`: since when it is frozen, or that it is not.

    Raises:
        ValueError: a file is there and damaged, or a threshold in `others` is no decision and no guarantee.

    Example:
        >>> threshold_table(run_folder, predictions)["threshold"].round(4).tolist()
        [0.1592, 0.1592, 0.1592, 0.1592, 0.7341]
    """
    folder = Path(run_folder)
    frozen = read_decision(folder) if (folder / DECISION).is_file() else None
    triage = triage_as_written(folder) if (folder / TRIAGE).is_file() else None
    rows = [*_of_training(folder)]
    rows += _of_decisions(frozen, predictions) if frozen else []
    rows += _of_triage(triage, frozen, predictions) if triage else []
    for name, each in (others or {}).items():
        if not isinstance(each, Decision | Guarantee):
            raise ValueError(
                f"{name!r} is a {type(each).__name__}. Pass a decision of choose_decision(...) or a "
                "guarantee of guarantee_on_validation(...)."
            )
        rows += _rows(name, each, NOT_FROZEN)
    usable = frozen.calibrators if frozen and not _other(frozen, predictions) else {}
    columns = [each for each in COLUMNS if each != "calibrated"]
    table = pd.DataFrame(rows, columns=columns)
    twins = [
        _twin(usable, *each) for each in zip(table["level"], table["scale"], table["threshold"], strict=True)
    ]
    return table.assign(calibrated=np.array(twins, dtype=float))[[*COLUMNS]]


def _of_training(folder: Path) -> Iterator[Row]:
    """What a training, and the search for a blend, chose on their way."""
    if (folder / RECORD).is_file() and (chosen := read_record(folder).get("decision")):
        for row in _rows("training, best epoch", Decision.from_record(chosen), NOT_FROZEN):
            blended = (folder / BLEND).is_file()  # the table's probabilities are others, then
            yield (*row[:2], "probability before the blend", *row[3:]) if blended else row
    if (folder / BLEND).is_file():
        words = {"missing": f"{folder / BLEND} is missing.", "again": "search the blend again"}
        record = read_sealed(folder / BLEND, version=1, **words, writer="radiographs.blend.freeze_blend(...)")
        decision = Decision.from_record(record["decision"])
        yield from _rows("blend", decision, "frozen with the blend; replaced by a frozen decision")


def _of_decisions(frozen: Frozen, predictions: pd.DataFrame) -> Iterator[Row]:
    other = _other(frozen, predictions)
    for level, decision in frozen.decisions.items():
        yield from _rows("decision", decision, f"frozen {frozen.said(level, 'frozen_utc')[:10]}{other}")
    for each in frozen.guarantees:
        since = frozen.said(each.target.decision_level, "frozen_utc")[:10]
        yield from _rows("guarantee", each, f"frozen {since}{other}")


def _of_triage(triage: FrozenTriage, frozen: Frozen | None, predictions: pd.DataFrame) -> Iterator[Row]:
    """p_low, and the confidence from which a suspected case is positive."""
    record, made = triage.record, triage.triage
    status = f"frozen {record['frozen_utc'][:10]}"
    if frozen is None or record["decision_sha256"] != frozen.sha256:
        status += ", beside another decision"
    elif record["predictions_sha256"] != predictions_sha256(predictions):
        status += ", for other predictions"
    for name, level, scale, mark, rule, on, _ in _rows("triage, p_low", made.guarantee, status):
        yield name, level, scale, mark, f"negative below it: {rule}", on, status
    if made.confidence is not None and made.cut is not None:
        purpose = f"at or above p_low, positive from this {made.confidence}, else inconclusive"
        if made.confidence == "distance":  # of logits, see `confidence`
            purpose += f"; the same as from a probability of {expit(logit(made.p_low) + made.cut):.4f}"
        answered = _level(made.answered, None if made.by_vertebra else made.aggregation)
        plural = PLURALS[made.answered]
        on = f"{_ON}: {record['chosen_on'][plural]:,} {plural}"
        yield "triage, cut", answered, made.confidence, made.cut, purpose, on, status


def _rows(name: str, found: Decision | Guarantee, status: str) -> Iterator[Row]:
    """One row; of a decision with a threshold for each vertebra, one for each."""
    if isinstance(found, Guarantee):
        level = _level(found.target.level, found.target.aggregation)
        on = f"{_ON}: {found.patients} fractured patients"
        yield name, level, "probability", _number(found.threshold), found.target.phrase, on, status
        return
    rule = found.rule
    floors = ", ".join(f"{rate} ≥ {floor:.4g}" for rate, floor in rule.floors.items())
    purpose = found.reason if rule.objective == STATED else rule.title + (f", {floors}" if floors else "")
    cases = (
        "" if found.cases is None else f": {found.cases:,} {PLURALS[rule.level]}, {found.positives} fractured"
    )
    marks: Mapping[str, float | None] = found.thresholds or {"": found.threshold}
    for vertebra, mark in marks.items():
        level = vertebra or _level(rule.level, rule.aggregation)
        yield name, level, "probability", _number(mark), purpose, f"{_ON}{cases}", status


def _level(level: str, aggregation: Aggregation | None) -> str:
    return f"{level} by {aggregation.name}" if aggregation else level


def _number(threshold: float | None) -> float:
    return np.nan if threshold is None else threshold


def _other(frozen: Frozen, predictions: pd.DataFrame) -> str:
    """Empty where what is frozen belongs to these predictions and their split; else what is different."""
    if frozen.record["predictions_sha256"] != predictions_sha256(predictions):
        return ", for other predictions"
    try:
        check_belongs(frozen, predictions)
    except ValueError:
        return ", for another split"
    return ""


def _twin(calibrators: Mapping[str, Calibrator], level: str, scale: str, threshold: Any) -> float:
    """The threshold as a calibrated probability; NaN where no calibrator for its level is frozen."""
    of_patient = level.startswith("patient")
    calibrator = calibrators.get("patient" if of_patient else "all")
    if calibrator is None or scale != "probability" or np.isnan(threshold):
        return np.nan
    if of_patient and level != f"patient by {calibrator.aggregation}":
        return np.nan
    return float(calibrated(calibrator, [threshold])[0])
