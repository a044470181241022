"""All that one patient's page shows, put together: the answer, the CT, where the model looked.

The answer is that of `predict_study`. Calls are made on probabilities as predicted; the page shows calibrated
ones, and each threshold where its calibrator puts it. A calibrator never falls, so that what is called lies
at or above its threshold there as well.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from shutil import copy2
from tempfile import TemporaryDirectory

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from cspine_helpers.checkpoints import Run
from cspine_helpers.cohort import Cohort
from cspine_helpers.decisions.test_split import DECISION, Frozen, read_decision
from cspine_helpers.decisions.thresholds import Rule, at_level_of
from cspine_helpers.evaluation.calibration import calibrated
from cspine_helpers.evaluation.cases import Cases
from cspine_helpers.evaluation.clinical_utility import SCREENING_PREVALENCE, predictive_curve
from cspine_helpers.evaluation.intervals import bootstrap
from cspine_helpers.explain.attention import attention_table
from cspine_helpers.figures.patient import (
    ABSENT,
    CUT_OFF,
    SHOWN,
    AxialSlice,
    Look,
    Page,
    Row,
    Verdict,
    percent,
)
from cspine_helpers.inference.prediction import PREDICTIONS
from cspine_helpers.inference.study import StudyPrediction, predict_study
from cspine_helpers.labels import UID, VERTEBRAE
from cspine_helpers.packed import (
    open_sequence,
    read_manifest,
    sequence_path,
    slice_positions,
    unusable_sequences,
    write_manifest,
)
from cspine_helpers.patient_page.packed_view import STEP_MM, PackedView
from cspine_helpers.patient_page.scan import Scan
from cspine_helpers.predictions import read_predictions

LOOKS = 2  # vertebrae whose slices are shown
_ROUNDING = 1e-4  # of a probability, between machines and batches
_SAME_MM = 0.01  # to which two heights are one


class PatientPages:
    """The pages of one run's patients, and the validation patients that they are held against.

    Args:
        run: of `checkpoints.load_run`.
        cohort: of `cohort.read_cohort`: the one that the run was trained on.

    Example:
        >>> pages = PatientPages(run, cohort)
        >>> page = pages.page(cohort.samples["validation"]["StudyInstanceUID"][0])
        >>> page.verdict, len(page.rows)
        ('undecided', 7)
    """

    def __init__(self, run: Run, cohort: Cohort) -> None:
        self.run, self.cohort = run, cohort
        there = {name: (run.folder / name).is_file() for name in (PREDICTIONS, DECISION)}
        self.frozen: Frozen | None = read_decision(run.folder) if there[DECISION] else None
        self._predictions = read_predictions(run.folder / PREDICTIONS) if there[PREDICTIONS] else None
        self._profiles: dict[str, NDArray[np.float64] | None] = {}

    def page(
        self,
        uid: str,
        *,
        scan: Scan | None = None,
        packed: Path | None = None,
        truth: bool = False,
        ending_above: str | None = None,
        not_packed: Mapping[str, str] | None = None,
    ) -> Page:
        """All that is on the page of one study.

        Args:
            uid: StudyInstanceUID.
            scan: its CT, see `read_scan`. None: the side view and the slices are those that were packed.
            packed: folder of its packed sequences, where it is no study of the run's cohort: one's own CT, of
                which no label is known.
            truth: whether to show it, where it is known.
            ending_above: a vertebra; the page is as if the scan had ended above it, so that it and those
                below are missing. None: as it was packed.
            not_packed: vertebra → why it is not packed, as the record of its packing says. None: unknown.

        Raises:
            FileNotFoundError: none of its vertebrae is packed.
            ValueError: a sequence cannot be used; the CT is not the one that was packed; the truth is asked
                for and not known, or of a patient of the test split.
        """
        why, packed = not_packed or {}, packed or self.cohort.packed
        if ending_above is not None:
            with TemporaryDirectory() as folder:
                _copy_above(packed, Path(folder), uid, ending_above)
                cut = VERTEBRAE[VERTEBRAE.index(ending_above) :]
                return self._page(uid, scan and scan.above(ending_above), truth, Path(folder), why, cut)
        return self._page(uid, scan, truth, packed, why)

    def _page(
        self,
        uid: str,
        scan: Scan | None,
        truth: bool,
        folder: Path,
        why: Mapping[str, str],
        cut: tuple[str, ...] = (),
    ) -> Page:
        # 1. The answer, and what is known of the patient.
        answer = self._as_stored(predict_study(self.run, folder, uid))
        split = self._split_of(uid)
        labels = self._labels(uid, split) if truth else None
        samples = pd.DataFrame({UID: uid, "vertebra": [*answer.probability], "label": 0})
        attention = attention_table(self.run, samples, folder)

        # 2. Where its slices lie, and how they look.
        arrays = {name: open_sequence(sequence_path(folder, uid, name)) for name in answer.probability}
        view = PackedView(arrays, _manifest(folder, uid))
        positions = {} if scan is None else self._positions(scan, view, uid)
        side = (scan or view).side_view()
        heights = _heights(side.height_mm)

        # 3. The rows, the slices, the words.
        rows = tuple(
            replace(self._row(name, answer, heights[name], labels), absent=CUT_OFF if name in cut else ABSENT)
            for name in VERTEBRAE
        )
        looks = []
        for name in _looked_at(answer):
            its = attention[attention["vertebra"] == name]
            looks.append(self._look(name, answer, its, scan, view, positions.get(name), truth=truth))
        called = [name for name, is_called in answer.called.items() if is_called]
        ticks = {}
        for name in called:
            top = int(attention.loc[attention["vertebra"] == name, "attention"].to_numpy().argmax())
            ticks[name] = self._height(name, top, scan, view, positions)
        side = replace(side, ticks_mm=ticks, lesions_mm=side.lesions_mm if truth else ())
        subline, rule = self._subline(answer, called)
        verdict, headline = _verdict(answer.patient_called, called)
        return Page(
            verdict=verdict,
            headline=headline,
            subline=subline,
            rule=rule,
            about=_about(uid, split, scan, phantom=split is not None and self._of_phantoms),
            truth=None if labels is None else _truth(labels),
            scale=self._scale,
            rows=rows,
            patient=self._patient_row(answer, labels),
            side=side,
            looks=tuple(looks),
            footer={
                "What a call is worth": self._worth(answer),
                "Read with care": self._care(answer, split),
                "This scan": _of_scan(answer, scan, why, cut),
            },
        )

    # Of the run: its validation patients, its thresholds, its calibrators.

    @cached_property
    def _validation(self) -> Cases | None:
        """The run's validation vertebrae; None where it has no predictions of them."""
        table = self._predictions
        if table is None or not (table["split"] == "validation").any():
            return None
        return Cases.of(table, split="validation")

    @cached_property
    def _patients(self) -> Cases | None:
        """The validation patients, made as the frozen decision makes them."""
        decision = self.frozen.decisions.get("patient") if self.frozen else None
        if self._validation is None:
            return None
        return at_level_of(decision.rule, self._validation) if decision else self._validation.patients()

    def _shown(self, level: str, values: ArrayLike) -> NDArray[np.float64]:
        """Probabilities as the page shows them: calibrated, where a calibrator of that level is frozen."""
        calibrator = self.frozen.calibrators.get(level) if self.frozen else None
        found = np.atleast_1d(np.asarray(values, dtype=np.float64))
        return found if calibrator is None else calibrated(calibrator, found)

    @property
    def _scale(self) -> str:
        return "calibrated" if self.frozen and "all" in self.frozen.calibrators else "as predicted"

    def _profile(self, vertebra: str) -> NDArray[np.float64] | None:
        """Mean attention in intact validation vertebrae of a level, (T,); None where there are none."""
        if vertebra not in self._profiles:
            samples = self.cohort.samples["validation"]
            samples = samples[(samples["vertebra"] == vertebra) & (samples["label"] == 0)].reset_index(
                drop=True
            )
            config = self.run.config
            bad = unusable_sequences(self.cohort.packed, samples, slices=config.slices, size=config.size)
            usable = [uid not in {study for study, _ in bad} for uid in samples[UID]]
            samples = samples[usable].reset_index(drop=True)
            self._profiles[vertebra] = None
            if len(samples):
                table = attention_table(self.run, samples, self.cohort.packed)
                self._profiles[vertebra] = table.groupby("slice")["attention"].mean().to_numpy()
        return self._profiles[vertebra]

    # Of one study.

    def _as_stored(self, answer: StudyPrediction) -> StudyPrediction:
        """The answer with the probabilities of the run's table, where that has the study.

        Computed on another machine, or in other batches, they round otherwise, and a threshold is one of
        them: what lies at it would be called here and not there.

        Raises:
            ValueError: the table is not what the model gives.
        """
        table = self._predictions
        rows = (
            None if table is None else table[(table[UID] == answer.uid) & table["vertebra"].isin(VERTEBRAE)]
        )
        if rows is None or not {*answer.probability} <= {*rows["vertebra"]}:
            return answer
        rows = rows[rows["vertebra"].isin([*answer.probability])]
        found = rows.set_index("vertebra")["probability"]
        stored = {name: float(found[name]) for name in answer.probability}
        off = [name for name, value in answer.probability.items() if abs(value - stored[name]) > _ROUNDING]
        if off:
            raise ValueError(
                f"The run's predictions of {answer.uid} are not what the model gives: "
                f"{', '.join(off)} differ by more than {_ROUNDING:g}. Predict again "
                "(predict --replace), or restore the run's files."
            )
        decision = self.frozen.decisions.get("patient") if self.frozen else None
        aggregated = at_level_of(decision.rule, Cases.of(rows)).probability[0] if decision else None
        return replace(
            answer,
            probability=stored,
            patient_probability=max(stored.values()),
            patient_aggregated=None if aggregated is None else float(aggregated),
        )

    @property
    def _of_phantoms(self) -> bool:
        return (self.cohort.folder / "cohort.json").is_file()

    def _split_of(self, uid: str) -> str | None:
        found = self.cohort.split.loc[self.cohort.split[UID] == uid, "split"]
        return None if found.empty else str(found.iloc[0])

    def _labels(self, uid: str, split: str | None) -> dict[str, bool]:
        """Vertebra → whether it is fractured.

        Raises:
            ValueError: nobody knows, or it is a patient of the test split.
        """
        if split == "test":
            raise ValueError(
                f"{uid} is a patient of the test split, which is opened with frozen decisions and for all of "
                "its patients at once (evaluate_on_test). Ask for the page without truth."
            )
        found = self.cohort.labels[self.cohort.labels[UID] == uid]
        if found.empty:
            raise ValueError(f"The label table has no study {uid}. Ask for the page without truth.")
        return {name: bool(found[name].iloc[0]) for name in VERTEBRAE}

    def _positions(self, scan: Scan, view: PackedView, uid: str) -> dict[str, NDArray[np.int_]]:
        """Vertebra → the CT's slice that each position of its sequence shows, (T,).

        Raises:
            ValueError: the CT is not the one that was packed.
        """
        found, wrong = {}, []
        for name, array in view.arrays.items():
            if name not in scan.there:
                wrong.append(f"its label map lacks {name}")
                continue
            (first, stop), *_ = scan.box(name)
            found[name] = slice_positions(first, stop - 1, len(array))
            said = view.manifest
            if said is not None and name in said.index:
                ends = said.loc[name, ["z_first_mm", "z_last_mm"]].to_numpy(dtype=np.float64)
                here = found[name][[0, -1]] * scan.spacing_mm[0]
                if np.abs(ends - here).max() > _SAME_MM:
                    wrong.append(
                        f"{name} is at {here[0]:g} to {here[1]:g} mm, packed at {ends[0]:g} to {ends[1]:g}"
                    )
        if wrong:
            raise ValueError(
                f"The CT is not the one that {uid} was packed from: {'; '.join(wrong)}. Hand in that CT with "
                "its label map, or none: the page then shows the packed slices."
            )
        return found

    def _height(self, name: str, t: int, scan: Scan | None, view: PackedView, positions: dict) -> float:
        """Height in mm of a position of a sequence."""
        if scan is None:
            return float(view.heights_mm(name)[t])
        return float(positions[name][t] * scan.spacing_mm[0])

    def _row(
        self, name: str, answer: StudyPrediction, height_mm: float, labels: dict[str, bool] | None
    ) -> Row:
        cases = self._validation
        its = None if cases is None or not (cases.unit == name).any() else cases.of_unit(name)
        present = name in answer.probability
        return Row(
            name=name,
            probability=float(self._shown("all", answer.probability[name])[0]) if present else None,
            threshold=float(self._shown("all", answer.threshold_of(name))[0]),
            called=answer.called.get(name),
            height_mm=height_mm,
            intact=self._rug(its, "all", 0),
            fractured=self._rug(its, "all", 1),
            true=None if labels is None else labels[name],
        )

    def _patient_row(self, answer: StudyPrediction, labels: dict[str, bool] | None) -> Row:
        raw, threshold = answer.patient_aggregated, answer.patient_threshold
        value = answer.patient_probability if raw is None else self._shown("patient", raw)[0]
        return Row(
            name="patient",
            probability=float(value),
            threshold=None if threshold is None else float(self._shown("patient", threshold)[0]),
            called=answer.patient_called,
            height_mm=np.nan,
            intact=self._rug(self._patients, "patient", 0),
            fractured=self._rug(self._patients, "patient", 1),
            true=None if labels is None else any(labels.values()),
        )

    def _rug(self, cases: Cases | None, level: str, label: int) -> NDArray[np.float64]:
        return np.empty(0) if cases is None else self._shown(level, cases.probability[cases.label == label])

    def _look(
        self,
        name: str,
        answer: StudyPrediction,
        attention: pd.DataFrame,
        scan: Scan | None,
        view: PackedView,
        positions: NDArray[np.int_] | None,
        *,
        truth: bool,
    ) -> Look:
        weights = attention["attention"].to_numpy()
        shown = np.argsort(-weights, kind="stable")[:SHOWN]
        slices: list[AxialSlice] = []
        for rank, t in enumerate(shown.tolist()):
            z = (
                view.heights_mm(name)[t]
                if scan is None or positions is None
                else positions[t] * scan.spacing_mm[0]
            )
            caption = f"z −{z:.0f} mm · slice {t + 1}/{len(weights)} · {weights[t]:.0%}".replace("%", " %")
            caption = f"{name} · {caption}" if rank == 0 else caption.replace("slice ", "")
            if scan is None or positions is None:
                slices.append(view.axial(name, t, caption))
            else:
                slices.append(scan.axial(name, int(positions[t]), caption, truth=truth))
        value, threshold = self._shown("all", [answer.probability[name], answer.threshold_of(name)])
        icon, call = ("▲", "called") if answer.called[name] else ("○", "not called")
        highest = ", the highest" if not any(answer.called.values()) and name == _looked_at(answer)[0] else ""
        fractured = np.flatnonzero(attention["fractured"].to_numpy() == 1).tolist() if truth else []
        return Look(
            title=f"{icon} {name}: {call}, {percent(value, apart=threshold)}{highest}",
            slices=tuple(slices),
            attention=weights,
            shown=tuple(shown.tolist()),
            profile=self._profile(name),
            fractured=tuple(fractured),
        )

    # In words.

    def _subline(self, answer: StudyPrediction, called: list[str]) -> tuple[str, str]:
        """The patient's probability and threshold, and the rule that chose it."""
        decision = self.frozen.decisions.get("patient") if self.frozen else None
        if decision is None or answer.patient_aggregated is None or answer.patient_threshold is None:
            return (
                f"Highest probability of a vertebra: {percent(answer.patient_probability)}, as predicted",
                "No patient threshold is frozen: a threshold for vertebrae says nothing about patients.",
            )
        value, threshold = self._shown("patient", [answer.patient_aggregated, answer.patient_threshold])
        scale = "calibrated" if answer.patient_calibrated is not None else "as predicted"
        line = (
            f"Probability that this patient has a fracture: {percent(value, apart=threshold)} ({scale}); "
            f"a patient is called from {percent(threshold, apart=value)}"
        )
        rule = _rule(decision.rule, is_calibrated=answer.patient_calibrated is not None)
        if called and not answer.patient_called:
            rule = (
                f"{', '.join(called)} called as vertebra, the patient not, by a threshold of its own. {rule}"
            )
        return line, rule

    def _worth(self, answer: StudyPrediction) -> tuple[str, ...]:
        patients, threshold = self._patients, answer.patient_threshold
        if threshold is None:
            return ("No patient threshold is frozen, so that no call about the patient is made or judged.",)
        if patients is None:
            return ("The run has no predictions of validation patients to judge a call by.",)
        try:
            found = bootstrap(patients, threshold=threshold).set_index("metric")
            rare = predictive_curve(patients, threshold, SCREENING_PREVALENCE).iloc[0]
        except ValueError as error:
            return (f"What a call is worth is not known: {error}",)
        precision, recall, npv = found.loc[
            ["precision", "recall", "npv"], ["value", "low", "high"]
        ].to_numpy()
        ppv_rare, npv_rare = (
            rare[[name, f"{name}_low", f"{name}_high"]].to_numpy(dtype=np.float64) for name in ("ppv", "npv")
        )
        broken = int(patients.label.sum())
        here, rare_percent = 100 * broken / len(patients.label), 100 * SCREENING_PREVALENCE

        def have(usual: np.ndarray, rare: np.ndarray) -> str:
            of_usual = f"{_of_100(usual)} have a fracture where {here:.0f} % of patients do, as in validation"
            return f"{of_usual}; {_of_100(rare)} where {rare_percent:g} % do"

        sentences = [
            f"Of 100 patients called, {have(precision, ppv_rare)}.",
            f"Of 100 patients with a fracture, {_of_100(_rest(recall))} are not called.",
        ]
        if not answer.patient_called:
            sentences.insert(0, f"Of 100 patients not called, {have(_rest(npv), _rest(npv_rare))}.")
        basis = f"{patients.n_patients} validation patients, {broken} of them with a fracture"
        return (*sentences, f"Counted in {basis}; 95 % intervals.")

    def _care(self, answer: StudyPrediction, split: str | None) -> tuple[str, ...]:
        sentences = self._neighbours(answer)
        sentences.append("Attention ranks slices; it marks no place within one.")
        if self._scale == "calibrated":
            raw = "one each" if answer.threshold is None else f"{answer.threshold:.3f}"
            whose = f"vertebrae {raw}"
            if answer.patient_threshold is not None:
                whose += f", patient {answer.patient_threshold:.3f}"
            sentences.append(
                f"Calls are made on probabilities as predicted (from {whose}); the dashed lines are these "
                "thresholds, calibrated like the dots."
            )
        if split is None and self._of_phantoms:
            sentences.append("The run has seen phantoms only: what it says of a patient means nothing.")
        if split == "validation":  # that it was trained on is a warning of the answer
            sentences.append("This patient helped to choose the thresholds: new patients may fare worse.")
        return tuple(sentences)

    def _neighbours(self, answer: StudyPrediction) -> list[str]:
        """A warning for called vertebrae beside one that is called with a higher probability."""
        called = answer.called
        pairs = []
        for name, value in answer.probability.items():
            beside = [
                other for other in _beside(name) if called.get(other) and answer.probability[other] > value
            ]
            if called[name] and beside:
                pairs.append(f"{name} beside {' and '.join(beside)}")
        if not pairs:
            return []
        said = (
            f"{'; '.join(pairs)}: a crop shows part of its neighbours, and may be called for their fracture."
        )
        return [f"{said}{self._false_calls(answer)}"]

    def _false_calls(self, answer: StudyPrediction) -> str:
        """How many false calls of validation vertebrae lay beside a fractured one, as a sentence."""
        cases = self._validation
        if cases is None:
            return ""
        lowest = np.array([answer.threshold_of(str(unit)) for unit in cases.unit])
        broken = set(zip(cases.study[cases.label == 1], cases.unit[cases.label == 1], strict=True))
        false = (cases.probability >= lowest) & (cases.label == 0)
        wrong = list(zip(cases.study[false], cases.unit[false], strict=True))
        near = sum(any((study, other) in broken for other in _beside(unit)) for study, unit in wrong)
        return f" In validation, {near} of {len(wrong)} false calls lay beside a fractured vertebra."


def _about(uid: str, split: str | None, scan: Scan | None, *, phantom: bool) -> tuple[str, ...]:
    kind = "synthetic phantom · research software" if phantom else "research software, not a medical device"
    size = "no CT at hand"
    if scan is not None:
        z, y, x = scan.spacing_mm
        size = f"{len(scan.volume_hu)} slices · {z:.2f} × {y:.2f} × {x:.2f} mm"
    return f"study {uid}" + (f" · {split} split" if split else ""), size, kind


def _manifest(packed: Path, uid: str) -> pd.DataFrame | None:
    """The study's rows by vertebra; None where its folder has no manifest."""
    if not (packed / "manifest.csv").is_file():
        return None
    table = read_manifest(packed)
    return table[table[UID] == uid].set_index("vertebra")


def _copy_above(packed: Path, folder: Path, uid: str, vertebra: str) -> None:
    """A copy of a study's packed sequences of the vertebrae above one, with their rows of the manifest.

    Raises:
        ValueError: it is no vertebra, or the first.
    """
    kept = VERTEBRAE[: VERTEBRAE.index(vertebra)] if vertebra in VERTEBRAE else ()
    if not kept:
        raise ValueError(f"A scan may end above one of {', '.join(VERTEBRAE[1:])}; found {vertebra!r}.")
    for path in (sequence_path(packed, uid, name) for name in kept):
        if path.is_file():
            copy2(path, folder)
    if (packed / "manifest.csv").is_file():
        table = read_manifest(packed)
        write_manifest(table[(table[UID] == uid) & table["vertebra"].isin(kept)], folder)


def _beside(vertebra: str) -> list[str]:
    place = VERTEBRAE.index(vertebra)
    return [VERTEBRAE[n] for n in (place - 1, place + 1) if 0 <= n < len(VERTEBRAE)]


def _looked_at(answer: StudyPrediction) -> list[str]:
    """The most probable vertebrae: the called ones first, which they are but for thresholds of their own."""
    ranked = sorted(answer.probability, key=lambda name: (-answer.called[name], -answer.probability[name]))
    return ranked[:LOOKS]


def _heights(known: dict[str, float]) -> dict[str, float]:
    """Height of each of C1 … C7 in mm: of those missing, from their neighbours by the usual step."""
    places = np.array([VERTEBRAE.index(name) for name in known])
    values = np.array([*known.values()])
    step = np.median(np.diff(values) / np.diff(places)) if len(known) > 1 else STEP_MM
    found = {}
    for place, name in enumerate(VERTEBRAE):
        outside = place - np.clip(place, places.min(), places.max())
        found[name] = float(np.interp(place, places, values) + outside * step)
    return found


def _verdict(called: bool | None, vertebrae: list[str]) -> tuple[Verdict, str]:
    if called is None:
        which = f"vertebrae called: {', '.join(vertebrae)}" if vertebrae else "no vertebra called"
        return "undecided", f"No patient threshold is frozen; {which}"
    if called:
        return "called", f"Fracture suspected: {', '.join(vertebrae) or 'no single vertebra'}"
    return "not called", "Not called (no all-clear)"


def _truth(labels: dict[str, bool]) -> str:
    broken = [name for name, is_broken in labels.items() if is_broken]
    return f"◆ true: {'fracture of ' + ', '.join(broken) if broken else 'no fracture'}"


def _rule(rule: Rule, *, is_calibrated: bool) -> str:
    """The rule in words: "Threshold: highest recall with precision at 70 % or more in validation; …"."""
    floors = " and ".join(f"{name} at {100 * floor:g} % or more" for name, floor in rule.floors.items())
    made = f"; the patient's probability is {rule.aggregation.phrase}" if rule.aggregation else ""
    made += ", calibrated for patients" if made and is_calibrated else ""
    title = f"{rule.title[0].lower()}{rule.title[1:]}"
    return f"Threshold: {title}{' with ' + floors if floors else ''} in validation{made}."


def _of_100(share: NDArray[np.float64]) -> str:
    """A share and its interval, of 100, such as "78 (62–88)"."""
    value, low, high = map(_whole, share.tolist())
    return f"{value} ({low}–{high})"


def _rest(share: NDArray[np.float64]) -> NDArray[np.float64]:
    """What is left of a share and its interval: value, low, high."""
    return 1 - share[[0, 2, 1]]


def _whole(share: float) -> str:
    return "0" if share <= 0 else "under 1" if share < 0.005 else f"{100 * share:.0f}"


def _of_scan(
    answer: StudyPrediction, scan: Scan | None, why: Mapping[str, str], cut: tuple[str, ...]
) -> tuple[str, ...]:
    sentences = []
    for said in (ABSENT, CUT_OFF):
        names = [name for name in answer.missing if (name in cut) == (said == CUT_OFF)]
        if names:
            reasons = {name: f" ({why[name]})" if said == ABSENT and name in why else "" for name in names}
            many = "was" if len(names) == 1 else "were"
            listed = ", ".join(f"{name}{reason}" for name, reason in reasons.items())
            sentences.append(f"{listed} {many} {said}: a fracture there cannot be seen.")
    warnings = dict.fromkeys((*answer.warnings, *(scan.warnings if scan else ())))
    sentences += [f"{text[0].upper()}{text[1:]}." if not text.endswith(".") else text for text in warnings]
    if scan is None:
        sentences.append("No CT was at hand: side view and slices are those that were packed for the model.")
    return tuple(sentences) or ("All seven vertebrae were packed, without a warning.",)
