"""One study's answer: each vertebra and the patient, each called at its threshold, and where that is from."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from cspine_helpers import __version__
from cspine_helpers.checkpoints import Run
from cspine_helpers.decisions.test_split import DECISION, Frozen, check_belongs, read_decision
from cspine_helpers.decisions.thresholds import at_level_of, check_threshold
from cspine_helpers.evaluation.cases import Cases
from cspine_helpers.files.paths import check_uids, inside, listing, seal_of, sha256_of
from cspine_helpers.files.records import differences, parse_json, write_sealed
from cspine_helpers.inference.prediction import PREDICTIONS, predict
from cspine_helpers.labels import PATIENT, UID, VERTEBRAE
from cspine_helpers.packed import PROVENANCE_COLUMNS, read_manifest, sequence_path
from cspine_helpers.predictions import read_predictions
from cspine_helpers.runs import packing_settings, recorded_cohort
from cspine_helpers.splits import FOLDS, fold_split, read_split, split_hash, studies_of

FORMAT = 1  # of <uid>.json
NOTICE = "Research software, not a medical device."
NO_PATIENT_THRESHOLD = "no patient threshold is frozen"
FROZEN, CHOSEN, GIVEN = "frozen decision", "run.json", "given"  # where the threshold of vertebrae comes from


@dataclass(frozen=True)
class StudyPrediction:
    """What a run says about one study. Vertebrae and the patient are called at different thresholds.

    Thresholds are for probabilities as predicted; calibrated ones are to be read.

    Attributes:
        uid: StudyInstanceUID.
        probability: vertebra → probability of a fracture as predicted, for the vertebrae present.
        calibrated: vertebra → calibrated probability; empty where no calibrator of vertebrae is frozen.
        threshold: probability from which a vertebra is called fractured; None: each has its own.
        threshold_source: `frozen decision`, `run.json` (chosen by training) or `given` (by the user).
        missing: vertebrae without a packed sequence.
        patient_probability: the highest of the vertebrae.
        patient_aggregated: the patient's probability by the aggregation of the frozen decision about
            patients; None where none is frozen.
        patient_aggregation: that aggregation's name.
        patient_calibrated: `patient_aggregated`, calibrated; None where no calibrator of patients is frozen.
        patient_threshold: `patient_aggregated` from which a patient is called; None where none is frozen.
        warnings: of packing, each with its vertebrae; that it was another than the run's; that the run was
            trained on this study.
        run: the run's name.
        hashes: SHA-256 of `weights`, `decision` (what is frozen; None: nothing), `packed` (file → its own)
            and, where the manifest says them, of the CT (`source`) and the mask (`mask`).
        thresholds: vertebra → its own threshold, where the frozen decision has one for each.
    """

    uid: str
    probability: dict[str, float]
    calibrated: dict[str, float]
    threshold: float | None
    threshold_source: str
    missing: tuple[str, ...]
    patient_probability: float
    patient_aggregated: float | None
    patient_aggregation: str | None
    patient_calibrated: float | None
    patient_threshold: float | None
    warnings: tuple[str, ...]
    run: str
    hashes: dict[str, Any]
    thresholds: dict[str, float] | None = None

    @property
    def called(self) -> dict[str, bool]:
        """Vertebra → whether its probability reaches its threshold."""
        return {
            vertebra: value >= self.threshold_of(vertebra) for vertebra, value in self.probability.items()
        }

    @property
    def patient_called(self) -> bool | None:
        """Whether the patient's probability reaches the patient threshold; None where none is frozen."""
        if self.patient_aggregated is None or self.patient_threshold is None:
            return None
        return self.patient_aggregated >= self.patient_threshold

    @property
    def complete(self) -> bool:
        """Whether all seven vertebrae were seen; if not, the absence of a call is no all-clear."""
        return not self.missing

    def threshold_of(self, vertebra: str) -> float:
        """Probability from which this vertebra is called fractured."""
        if self.thresholds is not None:
            return self.thresholds[vertebra]
        assert self.threshold is not None
        return self.threshold

    def record(self) -> dict[str, Any]:
        """Plain values for `<uid>.json`; None where something is not known or not frozen.

        Returns:
            `notice`; `study`, its UID; `run`, its name; `vertebrae`, for each that is present: `probability`
            as predicted, `calibrated`, `threshold` and `called`; `threshold_source`; `missing`, vertebrae
            without a packed sequence; `patient`: `highest` (of the vertebrae), `aggregation` of the frozen
            decision, `probability` by it, `calibrated`, `threshold` and `called`; `sentences`, what these
            say and do not say; `warnings` of packing; `hashes` (SHA-256), and `versions`.
        """
        called = self.called
        return {
            "format": FORMAT,
            "notice": NOTICE,
            "study": self.uid,
            "run": self.run,
            "vertebrae": {
                name: {
                    "probability": value,
                    "calibrated": self.calibrated.get(name),
                    "threshold": self.threshold_of(name),
                    "called": called[name],
                }
                for name, value in self.probability.items()
            },
            "threshold_source": self.threshold_source,
            "missing": list(self.missing),
            "patient": {
                "highest": self.patient_probability,
                "aggregation": self.patient_aggregation,
                "probability": self.patient_aggregated,
                "calibrated": self.patient_calibrated,
                "threshold": self.patient_threshold,
                "called": self.patient_called,
            },
            "sentences": self.sentences,
            "warnings": list(self.warnings),
            "hashes": self.hashes,
            "versions": {"cspine_helpers": __version__},
        }

    @property
    def sentences(self) -> list[str]:
        """What is called, at which threshold, and what that does not say."""
        called = [name for name, is_called in self.called.items() if is_called]
        found = [f"Called fractured: {', '.join(called)}." if called else "No vertebra is called fractured."]
        if self.missing:
            found.append(
                f"Not packed: {', '.join(self.missing)}; the absence of a call there is no all-clear."
            )
        if not called:
            found.append("The absence of a call is no all-clear.")
        if self.patient_called is None:
            found.append(f"The patient is not called: {NO_PATIENT_THRESHOLD}.")
        else:
            said = "is called fractured" if self.patient_called else "is not called"
            found.append(f"The patient {said}, by the {self.patient_aggregation} of the vertebrae.")
        return found

    def summary(self) -> str:
        """The answer as lines of text: a table of the vertebrae and the patient, then what it does not say.

        Example:
            >>> answer = predict_study(run, cohort.packed, cohort.samples["test"]["StudyInstanceUID"][0])
            >>> print(answer.summary())
            Study 1.2.826..., run untrained. Research software, not a medical device.
            ...
        """
        called = self.called
        rows: list[tuple[str, float, float | None, float | None, bool | None]] = [
            (name, value, self.calibrated.get(name), self.threshold_of(name), called[name])
            for name, value in self.probability.items()
        ]
        patient = self.patient_probability if self.patient_aggregated is None else self.patient_aggregated
        rows.append(
            ("patient", patient, self.patient_calibrated, self.patient_threshold, self.patient_called)
        )
        words = {True: "fractured", False: "not called", None: NO_PATIENT_THRESHOLD}
        lines = [
            f"Study {self.uid}, run {self.run}. {NOTICE}",
            f"{'':8}  probability  calibrated  threshold  call",
        ]
        for name, *values, is_called in rows:
            cells = (_cell(value, width) for value, width in zip(values, (11, 10, 9), strict=True))
            lines.append("  ".join((f"{name:8}", *cells, words[is_called])))
        lines += self.sentences
        lines.append(f"Threshold of vertebrae: {self.threshold_source}.")
        return "\n".join([*lines, *(f"Warning: {text}" for text in self.warnings)])


def _cell(value: float | None, width: int) -> str:
    return f"{'—' if value is None else format(value, '.3f'):>{width}}"


def predict_study(
    run: Run, packed_dir: str | Path, uid: str, *, threshold: float | None = None
) -> StudyPrediction:
    """Predict one study, from the vertebrae that are packed.

    A vertebra is called at the threshold given, else at the frozen decision's, else at the one that training
    chose; the patient at the frozen decision's only. Calibrators that are frozen are applied.

    Args:
        run: of `checkpoints.load_run`.
        packed_dir: folder of the packed sequences.
        uid: StudyInstanceUID.
        threshold: probability from which a vertebra is called fractured, in the place of the run's.

    Raises:
        FileNotFoundError: none of the study's vertebrae is packed.
        ValueError: a packed sequence cannot be used; the threshold is outside [0, 1], or there is none; or
            what is frozen in the run folder is not of this run's predictions.

    Example:
        >>> answer = predict_study(run, cohort.packed, cohort.samples["test"]["StudyInstanceUID"][0])
        >>> len(answer.probability), answer.complete, answer.threshold_source
        (7, True, 'run.json')
    """
    # 1. What is there, and what calls it.
    if threshold is not None:
        check_threshold(threshold)
    present = [name for name in VERTEBRAE if sequence_path(packed_dir, uid, name).is_file()]
    if not present:
        names = listing(sequence_path(packed_dir, uid, name).name for name in VERTEBRAE)
        raise FileNotFoundError(
            f"Study {uid!r} has no packed sequence in {packed_dir}: none of {names}. Pack it first."
        )
    frozen = _frozen(run.folder)
    single, own, source = _threshold(run, frozen, threshold)

    # 2. The same pass as for a table; no label is known or used.
    samples = pd.DataFrame({UID: uid, "vertebra": present, "label": 0})
    table = predict(run, samples, packed_dir, split="unknown", batch_size=len(present))

    # 3. What is frozen makes of it.
    patient = frozen.decisions.get("patient") if frozen else None
    aggregated = None
    if patient is not None:
        aggregated = float(at_level_of(patient.rule, Cases.of(table)).probability[0])
    calibrated: dict[str, float] = {}
    if frozen is not None and frozen.calibrators:
        found = frozen.calibrate(table)
        calibrated = dict(zip(found["vertebra"], found["calibrated"].tolist(), strict=True))
    warnings, sources = _of_manifest(Path(packed_dir), uid, present)
    warnings += _packed_otherwise(run, Path(packed_dir))
    if _is_trained_on(run, Path(packed_dir).parent, uid):
        warnings += (
            "the run was trained on this study: what it says here is better than it would be on another",
        )
    files = [sequence_path(packed_dir, uid, name) for name in present]
    return StudyPrediction(
        uid=uid,
        probability=dict(zip(present, table["probability"].tolist(), strict=True)),
        calibrated={name: value for name, value in calibrated.items() if name != PATIENT},
        threshold=single,
        threshold_source=source,
        missing=tuple(name for name in VERTEBRAE if name not in present),
        patient_probability=float(table["probability"].max()),
        patient_aggregated=aggregated,
        patient_aggregation=patient.rule.aggregation.name if patient and patient.rule.aggregation else None,
        patient_calibrated=calibrated.get(PATIENT),
        patient_threshold=patient.threshold if patient else None,
        warnings=warnings,
        run=run.folder.name,
        hashes={
            "weights": run.record.get("weights_sha256"),
            "decision": frozen.sha256 if frozen else None,
            "packed": {path.name: sha256_of(path) for path in files},
            **sources,
        },
        thresholds=own,
    )


def _frozen(folder: Path) -> Frozen | None:
    """What is frozen in the run folder, once it belongs to the predictions there; None where nothing is."""
    if not (folder / DECISION).is_file():
        return None
    frozen = read_decision(folder)
    check_belongs(frozen, read_predictions(folder / PREDICTIONS))
    return frozen


def _threshold(
    run: Run, frozen: Frozen | None, given: float | None
) -> tuple[float | None, dict[str, float] | None, str]:
    """The threshold of vertebrae, or one for each, and where it comes from.

    Raises:
        ValueError: there is none.
    """
    if given is not None:
        return float(given), None, GIVEN
    decision = frozen.decisions.get("vertebra") if frozen else None
    if decision is not None:
        return (
            (None, decision.thresholds, FROZEN) if decision.thresholds else (decision.require(), None, FROZEN)
        )
    if run.threshold is None:
        raise ValueError(
            f"The run at {run.folder} has no threshold: {run.record['decision']['reason']} "
            "Pass threshold=... (on the command line, --threshold)."
        )
    return float(run.threshold), None, CHOSEN


def _packed_otherwise(run: Run, packed: Path) -> tuple[str, ...]:
    """What differs between the packing of these sequences and of those that the run knows, as a warning."""
    known, path = packing_settings(run.record), packed / "packing.json"
    if not known or not path.is_file():
        return ()
    found = parse_json(path.read_bytes(), str(path)).get("config")
    differ = differences(found, known) if found else []
    said = (
        f"packed otherwise than what the run was trained on: {listing(differ, separator='; ', quoted=False)}"
    )
    return (said,) if differ else ()


def _is_trained_on(run: Run, beside: Path, uid: str) -> bool:
    """Whether the study is of the training split; False where the run's split, or folds, are not found.

    Args:
        run: its cohort is looked for where its record says: a CT by itself is packed elsewhere.
        beside: folder in which `packed/` is.
        uid: StudyInstanceUID.
    """
    data = run.record.get("data", {})
    if fold := data.get("fold"):
        path = run.folder.parent / FOLDS
        folds = read_split(path, column="fold") if _is_sealed(path) else None
        if folds is None or split_hash(folds) != fold["folds_sha256"]:
            return False
        split = fold_split(folds[[UID]].assign(split="train"), folds, fold["number"])
        return uid in set(studies_of(split, "train"))
    for path in (folder / "split.csv" for folder in (beside, recorded_cohort(data)) if folder is not None):
        if _is_sealed(path) and split_hash(table := read_split(path)) == data.get("split_sha256"):
            return uid in set(studies_of(table, "train"))
    return False


def _is_sealed(path: Path) -> bool:
    return path.is_file() and seal_of(path).is_file()


def _of_manifest(packed: Path, uid: str, present: list[str]) -> tuple[tuple[str, ...], dict[str, str]]:
    """Warnings of packing, each with its vertebrae; SHA-256 of CT and mask, where the manifest has them."""
    if not (packed / "manifest.csv").is_file():
        return (f"{packed.name} has no manifest: nothing is known of how the study was packed.",), {}
    table = read_manifest(packed)
    rows = table[(table[UID] == uid) & table["vertebra"].isin(present)]
    if unknown := [name for name in present if name not in set(rows["vertebra"])]:
        said = f"{', '.join(unknown)}: not in the manifest, nothing is known of how they were packed"
        return (said,), {}
    if not set(PROVENANCE_COLUMNS) <= set(rows.columns):
        return (), {}
    by_text: dict[str, list[str]] = {}
    for vertebra, texts in zip(rows["vertebra"], rows["warnings"], strict=True):
        for text in filter(None, texts.split("; ")):
            by_text.setdefault(text, []).append(vertebra)
    warnings = tuple(
        text if names == present else f"{', '.join(names)}: {text}" for text, names in by_text.items()
    )
    sums = {name: rows[f"{name}_sha256"].dropna().unique() for name in ("source", "mask")}
    return warnings, {name: found[0] for name, found in sums.items() if len(found) == 1}


def study_path(run_folder: str | Path, uid: str) -> Path:
    """Where a study's answer goes, `checkpoints/<run>/studies/<uid>.json`; the file need not exist.

    Raises:
        ValueError: the UID cannot be a file name.
    """
    check_uids([uid])
    return Path(run_folder) / "studies" / f"{uid}.json"


def write_study(answer: StudyPrediction, path: str | Path) -> Path:
    """Write the answer's record in one step, with the SHA-256 of its content in it; returns the path."""
    return write_sealed(inside(Path(path)), answer.record())
