"""The frozen decision of a run, with which alone the test split may be opened (see `held_out`).

`decision.json` holds a decision with the hashes of the split and of the predictions it was chosen on.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import pandas as pd

from cspine_helpers import __version__
from cspine_helpers.aggregation import validation_rows
from cspine_helpers.decisions import Decision
from cspine_helpers.guarantees import Guarantee, checked_guarantees
from cspine_helpers.labels import UID
from cspine_helpers.levels import apply_decision
from cspine_helpers.metrics import confusion, rates
from cspine_helpers.openings import now_utc, read_openings
from cspine_helpers.paths import inside, listing
from cspine_helpers.predictions import predictions_sha256
from cspine_helpers.records import (
    RECORD,
    SEAL,
    content_sha256,
    read_record,
    read_sealed,
    write_sealed,
    written_by,
)
from cspine_helpers.splits import split_hash

FORMAT = 1  # of decision.json
DECISION = "decision.json"
_AGAIN = "choose again on the validation split, and freeze that with freeze(..., replace=True)."
_NEEDED = ("decision", "guarantee", "split_sha256", "predictions_sha256", "chosen_on", "frozen_utc")


@dataclass(frozen=True)
class Frozen:
    """A decision that may be tried on the test split.

    Attributes:
        folder: of the run.
        decision: level, threshold or thresholds, aggregation, and how it was chosen.
        guarantees: what is guaranteed of its threshold, or of each of its thresholds; nothing as a rule.
        record: the whole of `decision.json`.
    """

    folder: Path
    decision: Decision
    guarantees: tuple[Guarantee, ...]
    record: dict[str, Any]

    @property
    def sha256(self) -> str:
        """SHA-256 of the record's content, by which the openings of the test split name it."""
        return self.record[SEAL]


def freeze(
    run_folder: str | Path,
    decision: Decision,
    predictions: pd.DataFrame,
    *,
    guarantees: Guarantee | Iterable[Guarantee] = (),
    replace: bool = False,
) -> Frozen:
    """Write `<run>/decision.json`, once the decision reaches on the validation split what it says.

    The same decision frozen again changes nothing, not even the date.

    Args:
        run_folder: `checkpoints/<run>`; made where it is not there yet.
        decision: with a threshold, or one for each vertebra; at patient level with its aggregation.
        predictions: the whole predictions table of the run, all of its splits.
        guarantees: of `guarantees.guarantee_on_validation`, made on these predictions and by the decision's
            aggregation: one that covers its threshold, or one for each of C1 … C7 that cover its thresholds.
        replace: put this decision in the place of another. What the test split was opened with stays on
            record, and the new decision says how often that was before it ("test_openings_before").

    Raises:
        FileExistsError: another decision is frozen there, and `replace` is not set.
        ValueError: the decision has no threshold, or does not reach what it says; a guarantee does not cover
            it, or was not made on these predictions; the table breaks the schema or has no validation rows;
            the run's record is damaged.
    """
    path = inside(Path(run_folder) / DECISION)
    rows = validation_rows(predictions)
    _check_reached(decision, rows)
    guarantees = checked_guarantees(guarantees, predictions)
    _check_covered(decision, guarantees)
    content = {
        "format": FORMAT,
        SEAL: "",
        "decision": asdict(decision),
        "guarantee": [asdict(each) for each in guarantees] or None,
        "split_sha256": _split_sha256(path.parent, predictions),
        "predictions_sha256": predictions_sha256(predictions),
        "chosen_on": {"split": "validation", "patients": rows[UID].nunique(), "vertebrae": len(rows)},
    }
    created = {
        "frozen_utc": now_utc(),
        "test_openings_before": len(read_openings(path.parent)),
        "versions": {"cspine_helpers": __version__},
    }
    if path.is_file():
        if (old := _readable(path.parent, replace)) and _same(old.record, content):
            return old
        if old and not replace:
            raise FileExistsError(
                f"{path} holds another decision: {old.decision.reason} The test split was opened "
                f"{created['test_openings_before']} time(s). Go on with it (read_decision), or put this one "
                "in its place with freeze(..., replace=True)."
            )
    write_sealed(path, content | created)
    return read_decision(path.parent)


def _readable(folder: Path, replace: bool) -> Frozen | None:
    """The decision that is frozen there; None where it is damaged and may be replaced."""
    try:
        return read_decision(folder)
    except ValueError:
        if not replace:
            raise
        return None


def _same(record: Mapping[str, Any], content: Mapping[str, Any]) -> bool:
    return content_sha256({name: record.get(name) for name in content}) == content_sha256(content)


def _split_sha256(folder: Path, predictions: pd.DataFrame) -> str:
    """SHA-256 of the split that the run was trained on; without a run, of that in the predictions."""
    if (folder / RECORD).is_file():
        data = read_record(folder).get("data")
        if not isinstance(data, dict) or "split_sha256" not in data:
            raise ValueError(
                f"{folder / RECORD} does not say which split its run was trained on. Train again."
            )
        return data["split_sha256"]
    return split_hash(predictions[[UID, "split"]].drop_duplicates())


def _check_reached(decision: Decision, rows: pd.DataFrame) -> None:
    """Refuse a decision that was made on other cases than these."""
    called = apply_decision(decision, rows, level=decision.level)
    found = rates(confusion(called["label"], called["positive"], 0.5)).fillna({"precision": 0.0})
    found = found.assign(cases=len(called), positives=called["label"].sum())
    differ = []
    for name in ("recall", "precision", "specificity", "cases", "positives"):
        said, here = getattr(decision, name), float(found[name].iloc[0])
        if said is not None and not abs(said - here) < 1e-9:
            differ.append(f"{name} is {here:.6g}, the decision says {said:.6g}")
    if differ:
        raise ValueError(
            f"The decision was not made on the validation split of these predictions: {'; '.join(differ)}. "
            "Choose on that split (levels.choose_decision), and freeze that."
        )


def _check_covered(decision: Decision, guarantees: tuple[Guarantee, ...]) -> None:
    """Refuse guarantees but one of the decision's threshold, or one of each of its thresholds."""
    if not guarantees:
        return
    thresholds = decision.thresholds or {decision.level: decision.require()}
    if sorted(each.level for each in guarantees) != sorted(thresholds):
        raise ValueError(
            f"The guarantees are for {listing(each.level for each in guarantees)}, the decision's thresholds "
            f"for {listing(thresholds)}. Hand in one for each of these, or none."
        )
    for each in guarantees:
        threshold = thresholds[each.level]
        if not each.covers(threshold, level=each.level, aggregation=decision.aggregation):
            raise ValueError(
                f"The guarantee is for thresholds up to {each.threshold} at level {_named(each)}; the "
                f"decision has {threshold} at level {_named(decision)}. Freeze a threshold that it covers."
            )


def _named(what: Decision | Guarantee) -> str:
    """Level and aggregation in words."""
    return repr(what.level) + (f" by {what.aggregation.name}" if what.aggregation else "")


def read_decision(run_folder: str | Path) -> Frozen:
    """Read `<run>/decision.json`.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is not JSON, of another format, not as it was written, not whole, or a link out of the
            folder.
    """
    folder = Path(run_folder)
    path = folder / DECISION
    record = read_sealed(
        path,
        version=FORMAT,
        missing=f"No frozen decision at {folder}: {DECISION} is missing. Choose one on the validation split "
        "and freeze it with frozen.freeze(...).",
        again="choose and freeze a decision again",
        writer="frozen.freeze(..., replace=True)",
    )
    found, known = record.get("decision"), [field.name for field in fields(Decision)]
    problems = [f"{name} is missing" for name in _NEEDED if name not in record]
    if isinstance(found, dict):
        problems += [f"decision.{name} is missing" for name in known if name not in found]
        problems += [f"decision.{name} is unknown" for name in found if name not in known]
    if problems or not isinstance(found, dict):
        raise ValueError(
            f"{path} is no whole decision: {'; '.join(problems) or 'its decision is no object'}. "
            f"{written_by(record)} Choose and freeze a decision again."
        )
    try:
        decision = Decision(**found)
        guarantees = tuple(Guarantee(**each) for each in record["guarantee"] or ())
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error
    return Frozen(folder, decision, guarantees, record)


def check_belongs(frozen: Frozen, predictions: pd.DataFrame) -> None:
    """Refuse other predictions, a run of another split, or a guarantee that these predictions do not give.

    Raises:
        ValueError: says which, and gives both hashes.
    """
    path = frozen.folder / DECISION
    stored, found = frozen.record["predictions_sha256"], predictions_sha256(predictions)
    if stored != found:
        raise ValueError(
            f"{path} was frozen with other predictions: their SHA-256 is {stored}, that of these is {found}. "
            "Hand in the whole table as predictions.read_predictions(...) reads it; if the model was trained "
            f"or run again, {_AGAIN}"
        )
    stored, found = frozen.record["split_sha256"], _split_sha256(frozen.folder, predictions)
    if stored != found:
        raise ValueError(
            f"{path} was frozen with another split: its SHA-256 is {stored}, that of the run now is {found}, "
            f"so that patients it was chosen on may be test patients. Bring that split back, or {_AGAIN}"
        )
    _check_covered(frozen.decision, checked_guarantees(frozen.guarantees, predictions))
