"""Triage beside the frozen decision, and the test split opened with it once, on the same record.

`triage.json` holds the triage, its guarantee included, and the hashes of what it was chosen with: what
`decision.json` has frozen, the predictions, the split, and the confidences of all cases, also those of the
test split. So nothing is left to choose when the test split is opened, and a triage beside another decision
is refused.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from cspine_helpers import __version__
from cspine_helpers.decisions.guarantees import checked_guarantees
from cspine_helpers.decisions.test_split import (
    check_belongs,
    check_levels,
    now_utc,
    read_decision,
    record_opening,
    remember_openings,
    times_opened,
)
from cspine_helpers.decisions.triage import Triage, evaluate_triage, patient_answers, triage_rates
from cspine_helpers.evaluation.cases import Cases
from cspine_helpers.evaluation.resampling import Floats
from cspine_helpers.evaluation.selective import checked_confidences
from cspine_helpers.files.paths import inside, listing
from cspine_helpers.files.records import SEAL, content_sha256, read_sealed, write_sealed, written_by
from cspine_helpers.files.tables import require_columns
from cspine_helpers.labels import PATIENT, UID

TRIAGE = "triage.json"
FORMAT = 1
COLUMNS = (UID, "vertebra", "confidence")
SPLITS = ("validation", "test")  # whose confidences are frozen
_NEEDED = ("triage", "decision_sha256", "predictions_sha256", "confidences_sha256", "reached", "frozen_utc")
_AGAIN = "choose a triage on the validation split, and freeze that with freeze_triage(..., replace=True)."


@dataclass(frozen=True)
class FrozenTriage:
    """A triage that may be tried on the test split.

    Attributes:
        folder: of the run.
        triage: what was frozen.
        record: the whole of `triage.json`: also what it reached on the validation split (`reached`), when it
            was frozen and how often the test split had been opened before.
    """

    folder: Path
    triage: Triage
    record: dict[str, Any]

    @property
    def sha256(self) -> str:
        """SHA-256 of the triage and what it was chosen with, by which openings of the test split name it."""
        return self.record["frozen_sha256"]


def freeze_triage(
    run_folder: str | Path,
    triage: Triage,
    predictions: pd.DataFrame,
    confidences: pd.DataFrame | None = None,
    *,
    replace: bool = False,
) -> FrozenTriage:
    """Write `<run>/triage.json`, beside the decision that is frozen there.

    What is handed in again changes nothing, not even its date.

    Args:
        run_folder: `checkpoints/<run>`, with a frozen decision.
        triage: chosen on the validation split.
        predictions: the whole predictions table that the decision was frozen with.
        confidences: `StudyInstanceUID, vertebra, confidence` of each case that is answered, of the validation
            and the test split; a patient's vertebra is `patient_overall`. They count to the last bit: hand in
            the table as a file gives it, so that it reads the same later. None where nothing is deferred.
        replace: put it in the place of another.

    Raises:
        FileExistsError: another triage is frozen there, and `replace` is not set.
        FileNotFoundError: no decision is frozen there.
        ValueError: the decision belongs to other predictions or another split; the guarantee was not made on
            these predictions; a case has no confidence; a record is damaged.

    Example:
        >>> from cspine_helpers.decisions import RecallTarget, guarantee_on_validation
        >>> from cspine_helpers.predictions import read_predictions
        >>> table = read_predictions(run_folder / "predictions.csv")
        >>> guarantee = guarantee_on_validation(table, RecallTarget(0.8, level="patient", delta=0.1))
        >>> triage = Triage(guarantee, "distance", 0.2, by_vertebra=True)
        >>> confidences = table[["StudyInstanceUID", "vertebra"]].assign(
        ...     confidence=abs(table["probability"] - triage.p_low))
        >>> freeze_triage(run_folder, triage, table, confidences, replace=True).record["test_openings_before"]
        2
    """
    # 1. What is handed in must belong to these predictions and to the frozen decision.
    path = inside(Path(run_folder) / TRIAGE)
    folder, frozen = path.parent, read_decision(run_folder)
    check_belongs(frozen, predictions)
    checked_guarantees(triage.guarantee, predictions)
    answered = _answered(triage, predictions)
    cases = answered["validation"]
    reached = triage_rates(cases.label, triage.answers(cases, _confidence(triage, cases, confidences)))
    content = {
        "triage": triage.record(),
        "decision_sha256": frozen.sha256,
        "predictions_sha256": frozen.record["predictions_sha256"],
        "split_sha256": frozen.record["split_sha256"],
        "confidences_sha256": _confidences_sha256(triage, answered, confidences),
    }

    # 2. What is frozen already stays, or gives way.
    name, opened = content_sha256(content), times_opened(folder)
    old = _readable(folder, replace)
    if old is not None and old["frozen_sha256"] == name:
        return read_triage(folder)
    if old is not None and not replace:
        raise FileExistsError(
            f"{path} holds another triage. The test split was opened {opened} time(s). Use it (read_triage), "
            "or put this one in its place with freeze_triage(..., replace=True)."
        )

    # 3. All of it.
    facts = {
        "reached": {metric: value for metric, value in reached.items() if not np.isnan(value)},
        "chosen_on": {"split": "validation", "patients": cases.n_patients, cases.plural: len(cases)},
        "frozen_utc": now_utc(),
        "test_openings_before": opened,
        "versions": {"cspine_helpers": __version__},
    }
    write_sealed(path, {"format": FORMAT, SEAL: "", "frozen_sha256": name, **content, **facts})
    return read_triage(folder)


def read_triage(run_folder: str | Path) -> FrozenTriage:
    """Read `<run>/triage.json`.

    Raises:
        FileNotFoundError: there is none, or no decision beside it.
        ValueError: it is not JSON, of another format, not as it was written, not whole, or a link out of the
            folder; it was frozen beside another decision.

    Example:
        >>> read_triage(run_folder).triage.confidence
        'distance'
    """
    stored = triage_as_written(run_folder)
    wanted, found = stored.record["decision_sha256"], read_decision(stored.folder).sha256
    if wanted != found:
        raise ValueError(
            f"{stored.folder / TRIAGE} was frozen beside another decision: the SHA-256 of that is {wanted}, "
            f"of what is frozen now {found}. Bring that decision back, or {_AGAIN}"
        )
    return stored


def triage_as_written(run_folder: str | Path) -> FrozenTriage:
    """What `<run>/triage.json` holds, whatever decision is beside it: to be listed, not to be used.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is not JSON, of another format, not as it was written, not whole, or a link out of the
            folder.
    """
    folder = Path(run_folder)
    record = _record(folder)
    try:
        if missing := [name for name in _NEEDED if name not in record]:
            raise ValueError(f"it lacks {listing(missing)}. {written_by(record)}")
        triage = Triage.from_record(record["triage"])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder / TRIAGE} is no whole triage: {error} Freeze a triage again.") from error
    return FrozenTriage(folder, triage, record)


def triage_on_test(
    run_folder: str | Path,
    predictions: pd.DataFrame,
    confidences: pd.DataFrame | None = None,
    *,
    prevalence: float | None = None,
    resamples: int = 1000,
    seed: int = 0,
    interval: float = 0.95,
) -> pd.DataFrame:
    """What the frozen triage reaches on the test split; the opening is on record before that is said.

    Args:
        run_folder: `checkpoints/<run>`, with a frozen triage, and a frozen decision at each level.
        predictions: the predictions table that it was frozen with.
        confidences: the table that it was frozen with.
        prevalence: of fractured patients (images, studies) where the triage is to be used.
        resamples: of the patients.
        seed: of the resamples.
        interval: confidence of each interval by itself.

    Returns:
        The column `level` and those of `evaluate_triage`; where vertebrae are answered, of these and then of
        the patients that they answer for (`patient_answers`).

    Raises:
        FileNotFoundError: no triage, or no decision, is frozen there.
        ValueError: it was frozen with other predictions, confidences, another split or decision; a level
            lacks its decision; there are no test rows.
        OSError: the opening cannot be put on record, so that no result is returned.

    Example:
        >>> import shutil
        >>> from cspine_helpers.decisions import RecallTarget, guarantee_on_validation
        >>> from cspine_helpers.predictions import read_predictions
        >>> folder = shutil.copytree(run_folder, run_folder.with_name("triaged"))
        >>> table = read_predictions(folder / "predictions.csv")
        >>> guarantee = guarantee_on_validation(table, RecallTarget(0.8, level="patient", delta=0.1))
        >>> frozen = freeze_triage(folder, Triage(guarantee), table, replace=True)
        >>> triage_on_test(folder, table, resamples=50)["level"].unique().tolist()
        ['patient']
    """
    frozen, decision = read_triage(run_folder), read_decision(run_folder)
    triage = frozen.triage
    check_belongs(decision, predictions)
    check_levels(decision, predictions)
    checked_guarantees(triage.guarantee, predictions)
    answered, stored = _answered(triage, predictions), frozen.record["confidences_sha256"]
    if (found := _confidences_sha256(triage, answered, confidences)) != stored:
        raise ValueError(
            f"{frozen.folder / TRIAGE} was frozen with other confidences: their SHA-256 is {stored}, that of "
            f"these is {found}. Pass the table that it was frozen with, or {_AGAIN}"
        )
    cases = answered["test"]
    answers = triage.answers(cases, _confidence(triage, cases, confidences))
    parts = {cases.level: (cases, answers)}
    if cases.level == "vertebra":
        patients = cases.patients(triage.aggregation)
        parts["patient"] = patients, patient_answers(cases, answers)
    tables = []
    for level, (judged, of_these) in parts.items():
        at = None if level == "vertebra" else prevalence
        table = evaluate_triage(
            judged, of_these, prevalence=at, resamples=resamples, seed=seed, interval=interval
        )
        table.insert(0, "level", level)
        tables.append(table)
    record_opening(
        frozen.folder,
        decision_sha256=frozen.sha256,
        predictions_sha256=frozen.record["predictions_sha256"],
        level=" and ".join(parts),
        objective=f"triage by {triage.confidence or 'its threshold alone'}",
    )
    remember_openings(decision)
    return pd.concat(tables, ignore_index=True)


def _record(folder: Path) -> dict[str, Any]:
    """The record as it was written."""
    return read_sealed(
        folder / TRIAGE,
        version=FORMAT,
        missing=f"No frozen triage at {folder}: {TRIAGE} is missing. Choose one on the validation split and "
        "freeze it with freeze_triage(...).",
        again="choose and freeze a triage again",
        writer="freeze_triage(..., replace=True)",
    )


def _readable(folder: Path, replace: bool) -> dict[str, Any] | None:
    """What is frozen there; None where nothing is, or it is damaged and may be replaced."""
    try:
        return _record(folder) if (folder / TRIAGE).is_file() else None
    except ValueError:
        if not replace:
            raise
        return None


def _answered(triage: Triage, predictions: pd.DataFrame) -> dict[str, Cases]:
    """The cases that are answered, of each of `SPLITS`."""
    found = {split: Cases.of(predictions, split=split) for split in SPLITS}
    if triage.answered != "patient":
        return found
    return {split: cases.patients(triage.aggregation) for split, cases in found.items()}


def _confidence(triage: Triage, cases: Cases, confidences: pd.DataFrame | None) -> Floats | None:
    """The confidence of each case, (n,); None where nothing is deferred."""
    if (confidences is None) != (triage.confidence is None):
        wanted = "takes no confidences" if triage.confidence is None else "needs confidences"
        found = "none" if confidences is None else "a table"
        raise ValueError(f"This triage {wanted}; found {found}. Pass what it was made for.")
    if confidences is None:
        return None
    require_columns(confidences, COLUMNS, what="The table of confidences")
    keys = [UID, "vertebra"]
    if (twice := confidences.duplicated(keys)).any():
        named = _named(confidences[twice])
        raise ValueError(f"Confidences of {twice.sum()} cases occur twice: {named}. Drop one of each.")
    units = np.where(cases.unit == "patient", PATIENT, cases.unit)
    answered = pd.MultiIndex.from_arrays([cases.study, units], names=keys)
    place = pd.MultiIndex.from_frame(confidences[keys].astype(str)).get_indexer(answered)
    if (absent := place < 0).any():
        lacking = pd.DataFrame({UID: cases.study[absent], "vertebra": units[absent]})
        raise ValueError(
            f"{absent.sum()} cases that are answered have no confidence: {_named(lacking)}. Compute it for "
            "all cases of the validation and the test split."
        )
    return checked_confidences(confidences["confidence"].to_numpy()[place], len(cases))


def _named(rows: pd.DataFrame) -> str:
    return listing(f"{uid} {unit}" for uid, unit in zip(rows[UID], rows["vertebra"], strict=True))


def _confidences_sha256(
    triage: Triage, cases: dict[str, Cases], confidences: pd.DataFrame | None
) -> str | None:
    """SHA-256 of the confidences, to the last bit, in the order of the predictions; None without any."""
    digest = hashlib.sha256()
    for each in cases.values():
        found = _confidence(triage, each, confidences)
        if found is None:
            return None
        for uid, unit, value in zip(each.study, each.unit, found.tolist(), strict=True):
            digest.update(f"{uid},{unit},{value!r}\n".encode())
    return digest.hexdigest()
