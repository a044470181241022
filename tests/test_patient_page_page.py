"""What a page says, against tables and sums made by other means."""

import re
import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.special import expit, logit
from simulated import patients, table_of
from toy_cohort import make_toy_cohort, tiny_model

from cspine_helpers import checkpoints
from cspine_helpers.__main__ import main
from cspine_helpers.checkpoints import Run
from cspine_helpers.cohort import read_cohort
from cspine_helpers.decisions.test_split import freeze
from cspine_helpers.decisions.thresholds import Rule, choose_decision
from cspine_helpers.evaluation.calibration import fit_calibrator
from cspine_helpers.evaluation.cases import Cases
from cspine_helpers.figures import patient, style
from cspine_helpers.figures.patient import percent
from cspine_helpers.files.records import write_sealed
from cspine_helpers.inference.study import predict_study
from cspine_helpers.labels import UID, VERTEBRAE
from cspine_helpers.model.classifier import FractureClassifier
from cspine_helpers.packed import sequence_path
from cspine_helpers.packing.study import FORMAT, record_path
from cspine_helpers.patient_page.cases import choose_cases
from cspine_helpers.patient_page.chooser import CaseChooser
from cspine_helpers.patient_page.page import PatientPages
from cspine_helpers.predictions import write_predictions


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    return read_cohort(make_toy_cohort(tmp_path_factory.mktemp("data") / "toy", studies=12))


@pytest.fixture(scope="module")
def table():
    """Predictions of 120 validation patients that the toy model never made, near where it lies (0.5)."""
    return table_of(*patients(np.random.default_rng(3), 120, separation=3.0))


@pytest.fixture(scope="module")
def untrained(tmp_path_factory):
    torch.manual_seed(0)
    model = FractureClassifier(tiny_model()).eval()
    return Run(tmp_path_factory.mktemp("run"), model, model.config, 0.4, {"weights_sha256": "0" * 64})


def frozen_run(untrained, folder, table, *, levels=("vertebra", "patient"), calibrate=True):
    """The same model in a folder with these predictions, and what is frozen with them."""
    folder.mkdir()
    write_predictions(table, folder / "predictions.csv")
    decisions = [choose_decision(table, Rule("max_f1", level=level)) for level in levels]
    cases = Cases.of(table, split="validation")
    fitted = [fit_calibrator(each, kind="platt") for each in (cases, cases.patients())] if calibrate else []
    freeze(folder, decisions, table, calibrators=fitted)
    return replace(untrained, folder=folder)


@pytest.fixture(scope="module")
def pages(untrained, cohort, table, tmp_path_factory):
    return PatientPages(frozen_run(untrained, tmp_path_factory.mktemp("runs") / "frozen", table), cohort)


@pytest.fixture(scope="module")
def uid(cohort):
    """A validation patient with a fracture."""
    samples = cohort.samples["validation"]
    return samples.loc[samples["label"] == 1, UID].iloc[0]


@pytest.fixture(scope="module")
def page(pages, uid):
    return pages.page(uid)


def platt(record, p):
    return expit(record["slope"] * logit(p) + record["intercept"])


def calibrators(pages):
    return {level: part["calibrator"] for level, part in pages.frozen.record["calibrators"].items()}


def test_rows_have_the_calibrated_probabilities_and_raw_calls_of_the_prediction(pages, page, uid, table):
    answer, fit = predict_study(pages.run, pages.cohort.packed, uid), calibrators(pages)
    raw = np.array([answer.probability[name] for name in VERTEBRAE])
    shown = [row.probability for row in page.rows]
    np.testing.assert_allclose(shown, platt(fit["all"], raw), rtol=1e-5)
    threshold = pages.frozen.decisions["vertebra"].threshold
    assert [row.called for row in page.rows] == (raw >= threshold).tolist()
    np.testing.assert_allclose([row.threshold for row in page.rows], platt(fit["all"], threshold))
    decision = pages.frozen.decisions["patient"].threshold
    assert page.patient.probability == pytest.approx(platt(fit["patient"], raw.max()), rel=1e-5)
    assert page.patient.threshold == pytest.approx(platt(fit["patient"], decision))
    assert page.patient.called == (raw.max() >= decision)
    assert page.patient.threshold != pytest.approx(page.rows[0].threshold)
    rows = table[table["vertebra"] == "C4"]
    np.testing.assert_allclose(
        page.rows[3].fractured, platt(fit["all"], rows.loc[rows["label"] == 1, "probability"])
    )
    assert len(page.rows[3].intact) == (rows["label"] == 0).sum()


def test_the_patient_is_called_by_the_patients_threshold(pages, page):
    called = [row.name for row in page.rows if row.called]
    if page.patient.called:
        assert page.verdict == "called"
        assert page.headline == f"Fracture suspected: {', '.join(called)}"
    else:
        assert (page.verdict, page.headline) == ("not called", "Not called (no all-clear)")
    value, threshold = page.patient.probability, page.patient.threshold
    assert page.subline == (
        f"Probability that this patient has a fracture: {percent(value, apart=threshold)} (calibrated); "
        f"a patient is called from {percent(threshold, apart=value)}"
    )
    assert page.rule == (
        "Threshold: highest F1 in validation; "
        "the patient's probability is the max of the vertebrae, calibrated for patients."
    )


def test_the_footer_counts_what_validation_has(pages, page, table):
    threshold = pages.frozen.decisions["patient"].threshold
    by_study = table.groupby(UID).agg({"label": "max", "probability": "max"})
    ill, called = by_study["label"] == 1, by_study["probability"] >= threshold
    precision, recall, specificity = (
        called[ill].sum() / called.sum(),
        called[ill].mean(),
        (~called)[~ill].mean(),
    )
    rare = 0.07 * recall / (0.07 * recall + 0.93 * (1 - specificity))
    text = " ".join(page.footer["What a call is worth"])
    assert f"Of 100 patients called, {100 * precision:.0f} (" in text
    assert re.search(rf"; {100 * rare:.0f} \([^)]+\) where 7 % do", text)
    assert f"where {100 * ill.mean():.0f} % of patients do, as in validation" in text
    assert f"Of 100 patients with a fracture, {100 * (1 - recall):.0f} (" in text
    assert f"{len(ill)} validation patients, {ill.sum()} of them with a fracture" in text
    if not page.patient.called:
        left = (ill & ~called).sum() / (~called).sum()
        assert f"not called, {100 * left:.0f} (" in text
    care = " ".join(page.footer["Read with care"])
    assert "Attention ranks slices; it marks no place within one." in care
    assert f"patient {threshold:.3f}" in care


def test_false_calls_beside_a_fracture_are_counted(pages, uid, table):
    answer = predict_study(pages.run, pages.cohort.packed, uid)
    wide = {name: table.pivot_table(name, UID, "vertebra").to_numpy() for name in ("label", "probability")}
    label, wrong, near = wide["label"], 0, 0
    for study, vertebra in np.argwhere((wide["probability"] >= answer.threshold) & (label == 0)):
        wrong += 1
        near += label[study, max(vertebra - 1, 0) : vertebra + 2].any()
    values = dict(zip(VERTEBRAE, [0.9, 0.8, 0.0, 0.0, 0.0, 0.0, 0.0], strict=True))
    (said,) = pages._neighbours(replace(answer, probability=values))
    assert said.startswith("C2 beside C1: a crop shows part of its neighbours")
    assert said.endswith(f"In validation, {near} of {wrong} false calls lay beside a fractured vertebra.")
    apart = dict(zip(VERTEBRAE, [0.9, 0.0, 0.8, 0.0, 0.0, 0.0, 0.0], strict=True))
    assert pages._neighbours(replace(answer, probability=apart)) == []


def test_the_slices_of_most_attention_are_shown_and_named(page):
    for look in page.looks:
        order = np.argsort(-look.attention)[:3]
        assert list(look.shown) == order.tolist()
        assert look.attention.sum() == pytest.approx(1, abs=1e-5)
        top = f"slice {order[0] + 1}/5 · {100 * look.attention[order[0]]:.0f} %"
        assert look.slices[0].caption.endswith(top)
        assert look.profile.sum() == pytest.approx(1, abs=1e-5)
    ranked = sorted(page.rows, key=lambda row: -row.probability)
    assert [look.title.split()[1].rstrip(":") for look in page.looks] == [row.name for row in ranked[:2]]


def test_truth_is_there_when_asked_for_and_not_else(pages, page, uid, cohort):
    labels = cohort.labels.set_index(UID).loc[uid]
    shown = pages.page(uid, truth=True)
    assert [row.true for row in shown.rows] == [bool(labels[name]) for name in VERTEBRAE]
    broken = ", ".join(name for name in VERTEBRAE if labels[name])
    assert shown.truth == f"◆ true: fracture of {broken}"
    assert page.truth is None
    assert {row.true for row in (*page.rows, page.patient)} == {None}
    assert {look.fractured for look in page.looks} == {()}
    assert page.side.lesions_mm == ()
    test = cohort.samples["test"][UID].iloc[0]
    with pytest.raises(ValueError, match="is a patient of the test split"):
        pages.page(test, truth=True)


def test_what_a_scan_lacks_is_missing(pages, uid):
    short = pages.page(uid, ending_above="C7")
    last = short.rows[-1]
    assert (last.name, last.probability, last.called, last.words) == ("C7", None, None, "not in the scan")
    assert last.height_mm > short.rows[-2].height_mm
    assert "C7 was not in the scan" in short.footer["This scan"][0]
    with pytest.raises(ValueError, match="A scan may end above one of C2"):
        pages.page(uid, ending_above="C1")


def test_a_page_is_made_of_ones_own_ct_of_which_no_label_is_known(pages, page, cohort, uid, tmp_path):
    for name in VERTEBRAE:
        shutil.copy(sequence_path(cohort.packed, uid, name), sequence_path(tmp_path, "mine", name))
    own = pages.page("mine", packed=tmp_path)
    assert [row.probability for row in own.rows] == pytest.approx([row.probability for row in page.rows])
    assert "split" not in own.about[0]
    assert own.about[0] == "study mine"
    assert own.about[2] == "research software, not a medical device"
    with pytest.raises(ValueError, match="has no study mine"):
        pages.page("mine", packed=tmp_path, truth=True)


def test_what_was_not_packed_is_not_said_to_be_outside_the_scan(pages, cohort, uid, tmp_path):
    shutil.copytree(cohort.packed, tmp_path / "packed")
    for name in ("C3", "C4"):
        sequence_path(tmp_path / "packed", uid, name).unlink()
    lacking = PatientPages(pages.run, replace(cohort, folder=tmp_path))
    page = lacking.page(uid, not_packed={"C3": "not in the mask"}, ending_above="C7")
    assert [row.words for row in page.rows if row.probability is None] == [
        "not packed",
        "not packed",
        "not in the scan",
    ]
    assert page.footer["This scan"][:2] == (
        "C3 (not in the mask), C4 were not packed: a fracture there cannot be seen.",
        "C7 was not in the scan: a fracture there cannot be seen.",
    )


def test_the_command_says_why_a_vertebra_is_not_packed(pages, cohort, uid, tmp_path, monkeypatch):
    packed, drawn = tmp_path / "data" / "toy" / "packed", []
    shutil.copytree(cohort.folder, packed.parent)
    sequence_path(packed, uid, "C3").unlink()
    write_sealed(record_path(packed, uid), {"format": FORMAT, "problems": {"C3": "not in the mask"}})
    run = replace(pages.run, record=pages.run.record | {"data": cohort.fingerprint()})
    monkeypatch.setenv("CSPINE_ROOT", str(tmp_path))
    monkeypatch.setattr(checkpoints, "load_run", lambda _: run)
    monkeypatch.setattr(patient, "patient_picture", drawn.append)
    monkeypatch.setattr(style, "write_figure", lambda _, path: path)
    assert main(["report", "--run", "toy", "--study", uid]) == 0
    (page,) = drawn
    said = "C3 (not in the mask) was not packed: a fracture there cannot be seen."
    assert page.footer["This scan"][0] == said


def test_what_lies_at_the_threshold_is_called_as_in_the_runs_table(untrained, cohort, uid, tmp_path):
    answer = predict_study(untrained, cohort.packed, uid)
    stored = {name: value + 5e-7 for name, value in answer.probability.items()}  # as another machine rounds
    rows = pd.DataFrame({UID: uid, "vertebra": [*stored], "split": "validation", "label": 0})
    write_predictions(rows.assign(probability=[*stored.values()]), tmp_path / "predictions.csv")
    run = replace(untrained, folder=tmp_path, threshold=stored["C4"])
    assert not predict_study(run, cohort.packed, uid).called["C4"]
    row = PatientPages(run, cohort).page(uid).rows[3]
    assert (row.called, row.probability) == (True, pytest.approx(stored["C4"], abs=1e-9))
    other = rows.assign(probability=[value + 0.01 for value in stored.values()])
    write_predictions(other, tmp_path / "predictions.csv")
    with pytest.raises(ValueError, match=f"predictions of {uid} are not what the model gives: C1, C2"):
        PatientPages(run, cohort).page(uid)


@pytest.mark.slow
def test_without_frozen_patient_threshold_nobody_is_called(untrained, cohort, table, uid, tmp_path):
    run = frozen_run(untrained, tmp_path / "half", table, levels=("vertebra",), calibrate=False)
    page = PatientPages(run, cohort).page(uid)
    assert page.verdict == "undecided"
    called = ", ".join(row.name for row in page.rows if row.called)
    said = f"vertebrae called: {called}" if called else "no vertebra called"
    assert page.headline == f"No patient threshold is frozen; {said}"
    assert (page.patient.called, page.patient.threshold) == (None, None)
    assert page.scale == "as predicted"
    assert page.footer["What a call is worth"] == (
        "No patient threshold is frozen, so that no call about the patient is made or judged.",
    )
    with pytest.raises(ValueError, match="No decision at patient level is frozen"):
        choose_cases(PatientPages(run, cohort).frozen, table)


def test_cases_are_what_their_names_say(pages, table):
    cases = choose_cases(pages.frozen, table)
    lowest, patient = (pages.frozen.decisions[level].threshold for level in ("vertebra", "patient"))
    assert len({case.uid for case in cases.values()}) == len(cases) >= 4
    for name, case in cases.items():
        rows = table[table[UID] == case.uid].set_index("vertebra").loc[list(VERTEBRAE)]
        true, called = rows["label"].to_numpy() == 1, rows["probability"].to_numpy() >= lowest
        alarm = rows["probability"].max() >= patient
        beside = np.convolve(true, [1, 0, 1], "same") > 0
        assert {
            "true_call": alarm and true.any() and (true == called).all(),
            "neighbour_alarm": alarm and (called & ~true & beside).any(),
            "miss": true.any() and not alarm,
            "clear_negative": not true.any() and not called.any() and not alarm,
            "missing_vertebra": true[6] and not true[:6].any() and not called[:6].any(),
        }[name]


def test_a_missing_vertebra_is_looked_for_before_one_is_taken_away(pages, cohort, table, tmp_path):
    some = pd.Series(table[UID].unique()[:3])
    (tmp_path / "packed").mkdir()
    for uid in table[UID].unique():
        for number in range(1, 8 if uid not in set(some) else 7):
            (tmp_path / "packed" / f"{uid}_{number}.npy").touch()
    case = choose_cases(pages.frozen, table, tmp_path / "packed")["missing_vertebra"]
    assert case.uid in set(some)
    assert case.ending_above is None


def test_a_new_patient_is_a_new_guess():
    asked = []

    def page(case, truth):
        asked.append((case, truth))
        return f"{case} {truth}".encode()

    chooser = CaseChooser({"a": "patient 1", "b": "patient 2"}, page)
    assert chooser.png == b"a False"
    chooser.truth = True
    assert chooser.png == b"a True"
    chooser.case = "b"
    assert (chooser.png, chooser.truth) == (b"b False", False)
    chooser.case = "a"
    assert asked == [("a", False), ("a", True), ("b", False)]
    shown = chooser._repr_mimebundle_()
    assert shown["text/plain"] == "The page of patient 1, without the truth."
    assert "image/png" in shown
