"""The test split, opened with frozen decisions only, and on the record.

`decision.json` holds what was chosen on the validation split: a decision for vertebrae and one for patients,
their guarantees, and calibrators. Each part says when it was frozen, and how often the test split had been
opened before. The hashes of split and predictions belong to it.

`test_openings.csv` has a row for each set of decisions and predictions that the test split was opened with,
dated when that was first done; doing the same again changes no file. Each row ends with the SHA-256 of itself
and of the row before, so that a row changed, removed or inserted is noticed. Rows cut off at the end, an
older file, or none, are noticed as `decision.json` remembers how many there were. A file with more rows than
are remembered is one whose writer was stopped before it could say so: they count. Who deletes both files
leaves no trace in the folder; version control keeps one.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pandas as pd

from cspine_helpers import __version__
from cspine_helpers.decisions.guarantees import Guarantee, RecallTarget, checked_guarantees, one_or_several
from cspine_helpers.decisions.thresholds import Decision, Rule, apply_decision, at_level_of
from cspine_helpers.evaluation.calibration import Calibrator, calibrated, fit_calibrator
from cspine_helpers.evaluation.cases import Cases, Level
from cspine_helpers.files.paths import atomic_path, inside, listing, seal_of
from cspine_helpers.files.records import SEAL, content_sha256, read_sealed, write_sealed, written_by
from cspine_helpers.files.tables import read_columns
from cspine_helpers.labels import PATIENT, UID, VERTEBRAE
from cspine_helpers.metrics import confusion, rates
from cspine_helpers.predictions import predictions_sha256
from cspine_helpers.runs import ENSEMBLE, RECORD, read_ensemble, read_record
from cspine_helpers.splits import split_hash

DECISION = "decision.json"
FORMAT = 2  # of decision.json; in format 1 it held one decision, which is still read
MEMORY = "openings"  # what decision.json remembers of them: rows, the last one's hash, how many were lost
OPENINGS = "test_openings.csv"
COLUMNS = ("opened_utc", "decision_sha256", "predictions_sha256", "level", "objective")
CHAIN = "chain_sha256"
_NOTHING = {"rows": 0, "last_sha256": "", "lost": 0}
_NEEDED = {
    FORMAT: ("decisions", "calibrators", "split_sha256", "predictions_sha256", "chosen_on", MEMORY),
    1: ("decision", "split_sha256", "predictions_sha256", "chosen_on", "frozen_utc"),
}
_AGAIN = "choose again on the validation split, and freeze that with freeze(..., replace=True)."
Parts = dict[str, dict[str, dict[str, Any]]]  # "decisions" and "calibrators" → level → what is frozen
Row = tuple[str, ...]


@dataclass(frozen=True)
class Frozen:
    """Decisions that may be tried on the test split.

    Attributes:
        folder: of the run.
        decisions: level → decision; `vertebra`, `patient` or both; or `image` (or `study`).
        guarantees: of their thresholds; none as a rule.
        calibrators: level (`all` or `patient`) → what makes calibrated probabilities of scores there.
        record: the whole of `decision.json`.
    """

    folder: Path
    decisions: dict[str, Decision]
    guarantees: tuple[Guarantee, ...]
    calibrators: dict[str, Calibrator]
    record: dict[str, Any]

    @property
    def sha256(self) -> str:
        """SHA-256 of what is frozen, by which the openings of the test split name it."""
        return self.record["frozen_sha256"]

    def said(self, level: str, what: str) -> Any:
        """Of the decision at a level: `frozen_utc`, or `test_openings_before`."""
        return self.record["decisions"][level][what]

    def require_calibrators(self) -> None:
        """Refuse to calibrate with none.

        Raises:
            ValueError: no calibrator is frozen; says how one is.
        """
        if not self.calibrators:
            raise ValueError(
                f"No calibrator is frozen in {self.folder}. Choose one with choose_calibrator(...), and "
                "freeze it with freeze(..., calibrators=...)."
            )

    def calibrate(self, predictions: pd.DataFrame) -> pd.DataFrame:
        """Predictions of any split with calibrated probabilities beside those that the model gave.

        Thresholds are for probabilities as predicted, calibrated ones are to be read: as shares of fractures
        among patients such as those of the validation split.

        Returns:
            The predictions and the column `calibrated`: vertebrae, where a calibrator for them is frozen, and
            one row a patient, with the vertebra `patient_overall`, where one for patients is.

        Raises:
            ValueError: no calibrator is frozen, or the table breaks the schema.
        """
        self.require_calibrators()
        cases, parts = Cases.of(predictions), []
        columns = [*cases.table(), "calibrated"]
        for level, calibrator in self.calibrators.items():
            part = at_level_of(self.decisions["patient"].rule, cases) if level == "patient" else cases
            found = part.table().assign(calibrated=calibrated(calibrator, part.probability))
            parts.append(found if level == "all" else found.assign(vertebra=PATIENT)[columns])
        return pd.concat(parts, ignore_index=True)


def freeze(
    run_folder: str | Path,
    decisions: Decision | Iterable[Decision],
    predictions: pd.DataFrame,
    *,
    guarantees: Guarantee | Iterable[Guarantee] = (),
    calibrators: Calibrator | Iterable[Calibrator] = (),
    replace: bool = False,
) -> Frozen:
    """Write `<run>/decision.json`, once the decisions reach on the validation split what they say.

    What is frozen already and not handed in stays as it is: a decision at the other level, a calibrator. What
    is handed in again changes nothing, not even its date.

    Args:
        run_folder: `checkpoints/<run>`; made where it is not there yet.
        decisions: one for vertebrae, one for patients, or both, each with a threshold (or one for each
            vertebra), that of patients with its aggregation. One for images, of predictions of images.
        predictions: the whole predictions table of the run, all of its splits.
        guarantees: of `guarantee_on_validation`, made on these predictions and by the decision's aggregation:
            one that covers its threshold, or one for each of C1 … C7 that cover its thresholds.
        calibrators: of `fit_calibrator`, for level `all`, and for `patient` by the aggregation of the
            patients' decision.
        replace: put these in the place of others at their level, or of all that was frozen with other
            predictions. A decision by another aggregation takes the patients' calibrator with it. What the
            test split was opened with stays on record, and each part says how often that was before it
            ("test_openings_before").

    Example:
        >>> from cspine_helpers.decisions import choose_decision
        >>> freeze("my_run", choose_decision(predictions, Rule("max_f1")), predictions).decisions.keys()
        dict_keys(['vertebra'])

    Raises:
        FileExistsError: another decision is frozen there, and `replace` is not set.
        ValueError: a decision has no threshold, or does not reach what it says; a guarantee does not cover
            it, or was not made on these predictions; a calibrator is not what these predictions give; the
            table breaks the schema or has no validation rows; the run's record, or that of openings, is
            damaged.
    """
    path = inside(Path(run_folder) / DECISION)
    folder, cases = path.parent, Cases.of(predictions, split="validation")

    # 1. What is handed in must be true of the validation rows.
    chosen = _by_level(decisions, Decision)
    promised = checked_guarantees(guarantees, predictions)
    for decision in chosen.values():
        _check_reached(decision, cases)
    _check_covered(chosen, promised)
    new: Parts = {"decisions": {}, "calibrators": {}}
    for level, decision in chosen.items():
        kept = [each.record() for each in promised if each.target.decision_level == level]
        new["decisions"][level] = {"decision": decision.record(), "guarantees": kept}
    for level, calibrator in _by_level(calibrators, Calibrator).items():
        new["calibrators"][level] = {"calibrator": calibrator.record()}

    # 2. What is frozen already stays, or gives way.
    of = {
        "split_sha256": _split_sha256(folder, predictions),
        "predictions_sha256": predictions_sha256(predictions),
    }
    opened = times_opened(folder, whatever_is_left=replace)
    old = _readable(folder, replace) if path.is_file() else None
    same = old is not None and all(old.record[name] == value for name, value in of.items())
    if old is not None and not replace:
        _check_free(old, new, opened, same=same)
    parts: Parts = {kind: dict(old.record[kind]) if old and same else {} for kind in new}
    was, now = old.decisions.get("patient") if old else None, chosen.get("patient")
    if was and now and was.rule.aggregation != now.rule.aggregation:
        parts["calibrators"].pop("patient", None)  # it was fitted to probabilities by the other aggregation
    created = {"frozen_utc": now_utc(), "test_openings_before": opened}
    for kind, levels in new.items():
        for level, part in levels.items():
            if not _same(parts[kind].get(level, {}), part):
                parts[kind][level] = part | created
    if old is not None and same and all(parts[kind] == old.record[kind] for kind in parts):
        if replace:
            remember_openings(old)
        return read_decision(folder)
    if not parts["decisions"]:
        raise ValueError("No decision is handed in, and none is frozen there. Choose one at each level.")
    _check_fitted(parts, cases)

    # 3. All of it, with what is remembered of the openings.
    content = {
        "format": FORMAT,
        SEAL: "",
        "frozen_sha256": content_sha256(parts | of),
        **parts,
        **of,
        "chosen_on": {"split": "validation", "patients": cases.n_patients, cases.plural: len(cases)},
        MEMORY: _memory(folder),
        "versions": {"cspine_helpers": __version__},
    }
    write_sealed(path, content)
    return read_decision(folder)


def read_decision(run_folder: str | Path) -> Frozen:
    """Read `<run>/decision.json`.

    A file of format 1, with one decision and no calibrator, is read as what it is; the other level can be
    frozen beside it. What it says of a guarantee is not read: it does not say what that was made on.

    Example:
        >>> round(read_decision(run_folder).decisions["patient"].threshold, 3)
        0.159

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is not JSON, of another format, not as it was written, not whole, or a link out of the
            folder.
    """
    folder = Path(run_folder)
    path = folder / DECISION
    record = read_sealed(
        path,
        version=tuple(_NEEDED),
        missing=f"No frozen decision at {folder}: {DECISION} is missing. Choose one on the validation split "
        "and freeze it with freeze(...).",
        again="choose and freeze a decision again",
        writer="freeze(..., replace=True)",
    )
    problems = [f"{name} is missing" for name in _NEEDED[record["format"]] if name not in record]
    try:
        record = _of_format_1(record) if record["format"] == 1 and not problems else record
        parts = {} if problems else record["decisions"]
        decisions = {level: Decision.from_record(part["decision"]) for level, part in parts.items()}
        for level, part in parts.items():
            lacking = decisions[level].record().keys() - part["decision"].keys()
            problems += [f"decision.{name} is missing" for name in sorted(lacking)]
        if problems:
            raise ValueError(f"it is no whole decision: {'; '.join(problems)}. {written_by(record)}")
        promised = tuple(
            Guarantee.from_record(each) for part in parts.values() for each in part["guarantees"]
        )
        fitted = {
            level: Calibrator.from_record(part["calibrator"]) for level, part in record["calibrators"].items()
        }
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error} Choose and freeze a decision again.") from error
    return Frozen(folder, decisions, promised, fitted, record)


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
            "Pass the whole table as predictions.read_predictions(...) reads it; if the model was trained "
            f"or run again, {_AGAIN}"
        )
    stored, found = frozen.record["split_sha256"], _split_sha256(frozen.folder, predictions)
    if stored != found:
        raise ValueError(
            f"{path} was frozen with another split: its SHA-256 is {stored}, that of the run now is {found}, "
            f"so that patients it was chosen on may be test patients. Bring that split back, or {_AGAIN}"
        )
    _check_covered(frozen.decisions, checked_guarantees(frozen.guarantees, predictions))


def check_levels(frozen: Frozen, predictions: pd.DataFrame) -> None:
    """Refuse to open the test split while a level at which validation can choose has no frozen decision.

    Raises:
        ValueError: names the level, and how a decision is frozen there.
    """
    validation = Cases.of(predictions, split="validation")
    for level, cases in {each.level: each for each in (validation, validation.patients())}.items():
        if level not in frozen.decisions and len(set(cases.label)) == 2:  # validation can choose there
            raise ValueError(
                f"No decision at {level} level is frozen in {frozen.folder}: a threshold for one level says "
                "nothing about the other, and both are chosen before the test split is opened. Choose with "
                f"choose_decision(predictions, Rule(level={level!r}, …)), and freeze that as well."
            )


def evaluate_on_test(run_folder: str | Path, predictions: pd.DataFrame) -> pd.DataFrame:
    """What the frozen decisions reach on the test split; the opening is on record before that is said.

    Args:
        run_folder: `checkpoints/<run>`, with a frozen decision at each level where validation can choose one.
        predictions: the predictions table that they were frozen with.

    Returns:
        Columns `level, patients, studies, incomplete, tp, fp, fn, tn`, the `metrics.rates` and `undefined`.
        For the decision about vertebrae, one row for all (`all`) and one for each; then one for patients.
        Each study is called by itself; `patients` counts whose they are, and `incomplete` the studies with a
        vertebra missing. Of images there is the row `all`. A rate whose denominator is zero is NaN;
        `undefined` counts those.

    Example:
        >>> from cspine_helpers.predictions import read_predictions
        >>> results = evaluate_on_test(run_folder, read_predictions(run_folder / "predictions.csv"))
        >>> results["level"].tolist()
        ['all', 'C1', 'C2', 'C3', 'C4', 'C5', 'C6', 'C7', 'patient']

    Raises:
        FileNotFoundError: no decision is frozen there.
        ValueError: they were frozen with other predictions or another split; a level lacks its decision;
            there are no test rows; or the table breaks the schema.
        OSError: the opening cannot be put on record, so that no result is returned.
    """
    frozen = read_decision(run_folder)
    check_belongs(frozen, predictions)
    check_levels(frozen, predictions)
    test = Cases.of(predictions, split="test")
    decisions = [frozen.decisions[level] for level in get_args(Level) if level in frozen.decisions]
    results = pd.concat([_results(each, test) for each in decisions], ignore_index=True)
    record_opening(
        frozen.folder,
        decision_sha256=frozen.sha256,
        predictions_sha256=frozen.record["predictions_sha256"],
        level=" and ".join(each.rule.level for each in decisions),
        objective=" and ".join(each.rule.objective for each in decisions),
    )
    remember_openings(frozen)
    return results


def read_openings(run_folder: str | Path, *, whatever_is_left: bool = False) -> pd.DataFrame:
    """Every first opening of the test split, with `COLUMNS`, in order; no rows where it never was opened.

    Args:
        run_folder: `checkpoints/<run>`.
        whatever_is_left: take the file as it is, also where `decision.json` remembers rows that it lacks.

    Example:
        >>> read_openings(run_folder)["objective"].tolist()
        ['max_recall and max_recall', 'triage by distance']

    Raises:
        ValueError: the file is not the one that was written, was deleted or is an older one, is no such
            table, or a link out of the folder.
    """
    folder = Path(run_folder)
    rows, known = _rows(folder), _remembered(folder)
    if not whatever_is_left and _memory(folder)["lost"] > known["lost"]:
        raise ValueError(
            f"{folder / OPENINGS} has {len(rows)} row(s), and not the {known['rows']} that {DECISION} "
            "remembers: it was deleted, cut off, or is of another time. Bring it back. If it is lost for "
            f"good, freeze(..., replace=True) starts another, and {DECISION} says how many were lost."
        )
    return pd.DataFrame(rows, columns=list(COLUMNS), dtype=str)


def times_opened(run_folder: str | Path, *, whatever_is_left: bool = False) -> int:
    """How often the test split was opened, openings whose record was lost among them; see `read_openings`."""
    rows = read_openings(run_folder, whatever_is_left=whatever_is_left)
    return len(rows) + _memory(Path(run_folder))["lost"]


def now_utc() -> str:
    """Date and time in UTC, to the second, as ISO 8601 writes them."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _by_level(given: object, kind: type[Any]) -> dict[str, Any]:
    """Level → the one for it."""
    found: dict[str, Any] = {}
    for each in one_or_several(given):
        if not isinstance(each, kind):
            raise ValueError(f"Pass a {kind.__name__} for each level; found {type(each).__name__}.")
        level = each.rule.level if isinstance(each, Decision) else each.level
        if level in found:
            raise ValueError(f"Each level has one {kind.__name__}; found several for {level!r}.")
        found[level] = each
    return found


def _check_reached(decision: Decision, cases: Cases) -> None:
    """Refuse a decision that was made on other cases than these."""
    called = apply_decision(decision, at_level_of(decision.rule, cases))
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
            "Choose on that split (choose_decision), and freeze that."
        )


def _check_covered(decisions: Mapping[str, Decision], guarantees: tuple[Guarantee, ...]) -> None:
    """Refuse guarantees but one of a decision's threshold, or one of each of its thresholds."""
    for owner in {each.target.decision_level for each in guarantees}:
        mine = [each for each in guarantees if each.target.decision_level == owner]
        levels, decision = [each.target.level for each in mine], decisions.get(owner)
        thresholds = {} if decision is None else decision.thresholds or {owner: decision.require()}
        if decision is None or sorted(levels) != sorted(thresholds):
            raise ValueError(
                f"The guarantees are for {listing(levels)}, the thresholds at {owner} level that are frozen "
                f"with them for {listing(thresholds) or 'nothing'}. Pass one for each of these, or none."
            )
        for each in mine:
            if not each.covers(decision):
                raise ValueError(
                    f"The guarantee is for thresholds up to {each.threshold} at level {_named(each.target)}; "
                    f"the decision has {thresholds[each.target.level]} at level {_named(decision.rule)}. "
                    "Freeze a threshold that it covers."
                )


def _named(what: Rule | RecallTarget) -> str:
    """Level and aggregation in words."""
    return repr(what.level) + (f" by {what.aggregation.name}" if what.aggregation else "")


def _check_fitted(parts: Parts, cases: Cases) -> None:
    """Refuse a calibrator that the validation cases do not give, or of other patients than the decision's."""
    for level, part in parts["calibrators"].items():
        given, fitted_on = Calibrator.from_record(part["calibrator"]), cases
        if level != "all":
            if level not in parts["decisions"]:
                raise ValueError(
                    "A calibrator is frozen for level 'all', and for 'patient' with a decision there; found "
                    f"one for {level!r} without. Pass that decision as well."
                )
            fitted_on = at_level_of(Decision.from_record(parts["decisions"][level]["decision"]).rule, cases)
        again = fit_calibrator(fitted_on, kind=given.kind)
        if not _alike(given.record(), again.record()):
            raise ValueError(
                f"The calibrator at level {level!r} was not fitted on the validation split of these "
                f"predictions: it is {given.record()}, they give {again.record()}. Fit one on that split, "
                "patients by the aggregation of their decision (choose_calibrator)."
            )


def _check_free(old: Frozen, new: Parts, opened: int, *, same: bool) -> None:
    """Refuse to put anything in the place of what is frozen, with the `same` predictions and split or not."""
    others = [
        (kind, level)
        for kind, levels in new.items()
        for level, part in levels.items()
        if (found := old.record[kind].get(level)) and not _same(found, part)
    ]
    if same and not others:
        return
    decided = [old.decisions[level] for kind, level in others if kind == "decisions"]
    decided = decided or ([] if same else list(old.decisions.values()))
    found = " ".join(f"{each.reason} ({each.rule.level} level)" for each in decided)
    found = f"another decision: {found}" if found else f"another calibrator ({others[0][1]!r})."
    raise FileExistsError(
        f"{old.folder / DECISION} holds {found} The test split was opened {opened} time(s). Use it "
        "(read_decision), or put this one in its place with freeze(..., replace=True)."
    )


def _same(found: Mapping[str, Any], part: Mapping[str, Any]) -> bool:
    """Whether a frozen part is this one; when it was frozen does not matter, nor which machine fitted it."""
    if "calibrator" in found and "calibrator" in part:
        return _alike(found["calibrator"], part["calibrator"])
    return content_sha256({name: found.get(name) for name in part}) == content_sha256(part)


def _alike(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two records are of one fit; numbers may differ as those of two machines do."""

    def close(value: Any, another: Any) -> bool:
        if isinstance(value, list | float) and isinstance(another, list | float):
            return np.shape(value) == np.shape(another) and np.allclose(value, another, atol=1e-6)
        return value == another

    return all(close(value, other[name]) for name, value in one.items())


def _split_sha256(folder: Path, predictions: pd.DataFrame) -> str:
    """SHA-256 of the split that the run, or runs, were trained on; without any, of that in the predictions.

    Of runs of folds, the split that the folds were made beside: their test patients are its own.
    """
    for name, read in {RECORD: read_record, ENSEMBLE: read_ensemble}.items():
        if not (folder / name).is_file():
            continue
        data = read(folder).get("data")
        if not isinstance(data, dict) or "split_sha256" not in data:
            raise ValueError(f"{folder / name} does not say which split its run was trained on. Train again.")
        return data["split_sha256"]
    return split_hash(predictions[[UID, "split"]].drop_duplicates())


def _readable(folder: Path, replace: bool) -> Frozen | None:
    """What is frozen there; None where it is damaged and may be replaced."""
    try:
        return read_decision(folder)
    except ValueError:
        if not replace:
            raise
        return None


def _of_format_1(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record as this format has it; openings name what is frozen there by the record's own hash."""
    part = {
        "decision": record["decision"],
        "guarantees": [],
        "frozen_utc": record["frozen_utc"],
        "test_openings_before": record.get("test_openings_before", 0),
    }
    level = record["decision"]["level"] if isinstance(record["decision"], dict) else "vertebra"
    return {
        "format": FORMAT,
        "frozen_sha256": record[SEAL],
        "decisions": {level: part},
        "calibrators": {},
        **{name: record[name] for name in ("split_sha256", "predictions_sha256", "chosen_on")},
        MEMORY: _NOTHING,
        "versions": record.get("versions"),
    }


def _results(decision: Decision, test: Cases) -> pd.DataFrame:
    """Rows of `evaluate_on_test` for one decision."""
    cases = at_level_of(decision.rule, test)
    called = cases.with_probability(apply_decision(decision, cases)["positive"])
    parts = {called.name: called}
    if called.level == "vertebra":
        parts |= {name: called.of_unit(name) for name in VERTEBRAE if (called.unit == name).any()}
    rows = [
        (level, part.n_patients, part.n_studies, len(np.unique(part.study[part.missing > 0])))
        for level, part in parts.items()
    ]
    counts = pd.concat([confusion(part.label, part.probability, 0.5) for part in parts.values()])
    found = rates(counts.drop(columns="threshold").reset_index(drop=True))
    head = pd.DataFrame(rows, columns=["level", "patients", "studies", "incomplete"])
    return pd.concat([head, found], axis=1).assign(undefined=found.isna().sum(axis=1))


def record_opening(folder: Path, **row: str) -> None:
    """Add a row of `COLUMNS`, dated now, unless this decision and these predictions have one."""
    known, path = read_openings(folder), folder / OPENINGS
    identity = ["decision_sha256", "predictions_sha256"]
    if (known[identity] == pd.Series(row)[identity]).all(axis=1).any():
        return
    rows = [*_rows(folder), (now_utc(), *(row[name] for name in COLUMNS[1:]))]
    with atomic_path(path) as temporary:
        temporary.write_text(_written(rows), encoding="utf-8", newline="\n")
    seal_of(path).unlink(missing_ok=True)  # of the format before, which had its hash in a second file


def remember_openings(frozen: Frozen) -> None:
    """Write to `decision.json` which openings of the test split are on record, so that none can be lost."""
    found = _memory(frozen.folder)
    if frozen.record[MEMORY] != found:
        write_sealed(frozen.folder / DECISION, frozen.record | {MEMORY: found})


def _memory(folder: Path) -> dict[str, Any]:
    """What `decision.json` is to remember: rows on file, the last one's hash, and how many were lost."""
    rows, known = _rows(folder), _remembered(folder)
    chain = ["", *_chain(rows)]
    kept = chain[min(known["rows"], len(rows))] == known["last_sha256"]
    lost = known["lost"] + (0 if kept else max(known["rows"] - len(rows), 1))
    return {"rows": len(rows), "last_sha256": chain[-1], "lost": lost}


def _remembered(folder: Path) -> dict[str, Any]:
    """What `decision.json` remembers; nothing where it cannot be read, which its own reader says."""
    try:
        record = json.loads((folder / DECISION).read_bytes())
        whole = record.get(SEAL) == content_sha256(record)
    except (OSError, ValueError, AttributeError, RecursionError):
        return _NOTHING
    return record.get(MEMORY, _NOTHING) if whole else _NOTHING


def _rows(folder: Path) -> list[Row]:
    """What the file of openings holds, whatever is remembered."""
    path = inside(folder / OPENINGS)
    if not path.is_file():
        if seal_of(path).is_file():
            raise ValueError(
                f"{path} was deleted: its SHA-256 is still there, {seal_of(path).name}. Bring it back."
            )
        return []
    content = path.read_bytes()
    head, *lines = content.decode(errors="replace").split("\n")[:-1] or [""]
    if head == ",".join(COLUMNS) and seal_of(path).is_file():  # the format before
        table = read_columns(path, COLUMNS, what="record of openings", source="", text=COLUMNS)
        return list(table.itertuples(index=False, name=None))
    rows = [tuple(line.split(",")[: len(COLUMNS)]) for line in lines]
    if _written(rows).encode() != content:
        raise ValueError(
            f"{path} is not the file that was written: its rows and their {CHAIN} do not belong together. "
            "Bring the old file back."
        )
    return rows


def _chain(rows: list[Row]) -> list[str]:
    """SHA-256 of each row and of the hash before."""
    found = [""]
    for row in rows:
        found.append(hashlib.sha256(",".join((found[-1], *row)).encode()).hexdigest())
    return found[1:]


def _written(rows: list[Row]) -> str:
    lines = [(*COLUMNS, CHAIN), *((*row, link) for row, link in zip(rows, _chain(rows), strict=True))]
    return "".join(",".join(line) + "\n" for line in lines)
