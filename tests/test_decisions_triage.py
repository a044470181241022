import json
from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd
import pytest
from simulated import image_table
from sklearn.metrics import accuracy_score, f1_score, precision_score, recall_score
from test_evaluation_cases import toy

from cspine_helpers.decisions import triage as room
from cspine_helpers.decisions.guarantees import Guarantee, RecallTarget, guarantee_on_validation
from cspine_helpers.decisions.triage import (
    ANSWERS,
    PER_1000,
    RATES,
    Triage,
    compare_deferral,
    compare_triage,
    deferral_curve,
    evaluate_triage,
    patient_answers,
    triage_rates,
)
from cspine_helpers.evaluation.cases import Aggregation, Cases
from cspine_helpers.labels import UID

TABLE = toy(120)
CASES = Cases.of(TABLE)
PATIENTS = CASES.patients()
MAX = Aggregation("max")
FEW = {"resamples": 100}


def guarantee(p_low, level="vertebra", aggregation=None):
    """One as arrays would give it, with this threshold."""
    return Guarantee(RecallTarget(0.9, level=level, aggregation=aggregation), p_low, 60, 60, 60, 29)


def triage(cut=1.0, p_low=0.3, **more):
    return Triage(guarantee(p_low), "distance", cut, **more)


def of(table, answers):
    """Cases, and the answers to them, of two short columns."""
    names = pd.DataFrame(
        {UID: [f"1.{n}" for n in range(len(table))], "vertebra": "C2", "split": "validation"}
    )
    return Cases.of(names.assign(label=table, probability=0.5)), np.array(answers)


def test_three_answers_from_p_low_and_the_cut():
    cases = CASES.where(np.arange(len(CASES)) < 6).with_probability([0.1, 0.29, 0.3, 0.3, 0.9, 0.9])
    found = triage().answers(cases, [np.inf, -np.inf, 1, 0.99, 7, -np.inf])
    assert found.tolist() == [*["negative"] * 2, "positive", "inconclusive", "positive", "inconclusive"]
    alone = triage().without_deferral()
    assert (alone.confidence, alone.cut, alone.p_low) == (None, None, 0.3)
    assert alone.answers(cases).tolist() == ["negative"] * 2 + ["positive"] * 4


def test_no_cut_is_low_enough_for_a_zero_or_constant_map():
    cases = CASES.with_probability(0.9)
    answers = triage(cut=-1e300).answers(cases, np.full(len(cases), -np.inf))
    assert set(answers.tolist()) == {"inconclusive"}


def test_recall_with_deferred_fractures_found_is_that_of_p_low_whatever_the_confidence_is():
    promise = guarantee_on_validation(TABLE, RecallTarget(0.8, level="patient", delta=0.1))
    assert promise.threshold is not None
    expected = recall_score(PATIENTS.label, PATIENTS.probability >= promise.threshold)
    one = Triage(promise, "adversarial", 0.5)
    adversarial = np.where(PATIENTS.label == 1, 0.0, 1.0)
    for confidence in (adversarial, 1 - adversarial, np.random.default_rng(0).random(len(PATIENTS))):
        found = triage_rates(PATIENTS.label, one.answers(PATIENTS, confidence))
        assert found["recall_deferred_found"] == pytest.approx(expected)
    by_vertebra = Triage(promise, "any", 0.5, by_vertebra=True)
    answers = by_vertebra.answers(CASES, np.random.default_rng(0).random(len(CASES)))
    found = triage_rates(PATIENTS.label, patient_answers(CASES, answers))
    assert found["recall_deferred_found"] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("vertebrae", "patient"),
    [
        (["negative"] * 7, "negative"),
        (["negative"] * 6 + ["inconclusive"], "inconclusive"),
        (["inconclusive"] * 6 + ["positive"], "positive"),
        (["positive"] + ["negative"] * 5 + ["inconclusive"], "positive"),
        (["inconclusive", "negative", "negative"], "inconclusive"),  # C4 … C7 are missing
    ],
)
def test_one_inconclusive_vertebra_makes_the_patient_inconclusive_unless_another_is_positive(
    vertebrae, patient
):
    other = TABLE[TABLE[UID] == "1.0.1"]
    cases = Cases.of(pd.concat([TABLE.head(len(vertebrae)), other]))
    found = patient_answers(cases, [*vertebrae, *["negative"] * 7])
    assert found.tolist() == [patient, "negative"]


def test_rates_are_those_of_scikit_learn_on_the_confident_cases():
    rng = np.random.default_rng(2)
    answers = rng.choice(ANSWERS, len(CASES), p=[0.6, 0.25, 0.15])
    kept = answers != "inconclusive"
    y, called = CASES.label[kept], answers[kept] == "positive"
    found = triage_rates(CASES.label, answers)
    oracles = {
        "accuracy": accuracy_score, "precision": precision_score, "recall": recall_score, "f1": f1_score,
        "specificity": partial(recall_score, pos_label=0),
    }  # fmt: skip
    for name, oracle in oracles.items():
        assert found[name] == pytest.approx(oracle(y, called)), name
    ill = CASES.label == 1
    assert found["coverage"] == pytest.approx(kept.mean())
    assert found["recall_deferred_found"] == pytest.approx((answers[ill] != "negative").mean())
    assert found["recall_deferred_lost"] == pytest.approx((answers[ill] == "positive").mean())
    assert found["fractures_deferred"] == pytest.approx((answers[ill] == "inconclusive").mean())
    assert found["fractures_among_deferred"] == pytest.approx(ill[~kept].mean())
    table = evaluate_triage(CASES, answers, **FEW)
    assert dict(zip(table["metric"], table["value"], strict=True)) == pytest.approx(found)
    assert ((table["low"] < table["value"]) & (table["value"] < table["high"])).all()
    assert (table["why"] == "").all()


def test_workload_per_1000_at_another_prevalence_by_hand():
    """Of 4 fractured 1 is missed, 2 called, 1 deferred; of 4 intact 3 cleared, 1 deferred."""
    cases, answers = of(
        [1, 1, 1, 1, 0, 0, 0, 0],
        ["negative", "positive", "positive", "inconclusive", *["negative"] * 3, "inconclusive"],
    )
    found = evaluate_triage(cases, answers, prevalence=0.1, **FEW).set_index("metric")
    expected = {
        "negative_per_1000": 100 / 4 + 900 * 3 / 4, "positive_per_1000": 50.0,
        "inconclusive_per_1000": 25 + 900 / 4, "missed_per_1000": 25.0,
    }  # fmt: skip
    assert found["value"][[*PER_1000]].to_dict() == pytest.approx(expected)
    assert (found["low"] <= found["value"]).all()
    assert (found["value"] <= found["high"]).all()
    missed = found.loc["missed_per_1000"]
    assert 0 < missed["low"] < missed["high"] < 100  # no more than there are fractures


def test_what_is_undefined_is_empty_and_says_why_in_a_sentence():
    cases, _ = of([1, 0, 0, 1], ["negative"] * 4)
    all_deferred = evaluate_triage(cases, ["inconclusive"] * 4, **FEW).set_index("metric")
    assert all_deferred["value"][["coverage", "recall_deferred_found", "recall_deferred_lost"]].tolist() == [
        0,
        1,
        0,
    ]
    assert all_deferred["why"]["accuracy"] == "All cases are deferred."
    none_deferred = evaluate_triage(cases, ["positive"] * 4, **FEW).set_index("metric")
    assert none_deferred["why"]["fractures_among_deferred"] == "No case is deferred."
    assert none_deferred["undefined"]["fractures_among_deferred"] == FEW["resamples"]
    intact, answers = of([0, 0, 0], ["negative", "positive", "inconclusive"])
    no_fracture = evaluate_triage(intact, answers, prevalence=0.1, **FEW).set_index("metric")
    assert no_fracture["why"]["recall_deferred_lost"] == "No case is fractured."
    assert no_fracture["why"]["inconclusive_per_1000"] == "No case is fractured."
    for table in (all_deferred, none_deferred, no_fracture):
        empty = table[["value", "low", "high"]].isna()
        assert (empty.any(axis=1) == (table["why"] != "")).all()
        assert (empty.all(axis=1) == empty.any(axis=1)).all()


def test_differences_are_paired():
    rng = np.random.default_rng(2)
    answers = rng.choice(ANSWERS, len(CASES), p=[0.6, 0.25, 0.15])
    resolved = np.where((answers == "inconclusive") & (rng.random(len(CASES)) < 0.5), "positive", answers)
    found = compare_triage(CASES, answers, resolved, prevalence=0.07, **FEW).set_index("metric")
    assert found.index.tolist() == [*RATES, *PER_1000]
    assert found["difference"]["recall_deferred_found"] == 0
    assert found["low"]["coverage"] > 0
    assert found["high"]["inconclusive_per_1000"] < 0
    assert ((found["low"] <= found["difference"]) & (found["difference"] <= found["high"])).all()
    one = evaluate_triage(CASES, answers, prevalence=0.07, **FEW).set_index("metric")
    wide = one["high"]["precision"] - one["low"]["precision"]
    assert found["high"]["precision"] - found["low"]["precision"] < wide


PROMISE = guarantee(0.2, "patient", MAX)
SURE = np.random.default_rng(5).permutation(len(PATIENTS)).astype(float)
SUSPECTED = PATIENTS.probability >= 0.2


def test_a_deferral_curve_is_that_of_the_cuts():
    cuts = np.sort(SURE[SUSPECTED])[:: SUSPECTED.sum() // 4]
    shares = [(SURE[SUSPECTED] < cut).mean() for cut in cuts]
    curve = deferral_curve(PROMISE, PATIENTS, SURE, deferred=shares, **FEW)
    for (_, row), cut in zip(curve.iterrows(), cuts, strict=True):
        answers = Triage(PROMISE, "order", cut).answers(PATIENTS, SURE)
        assert row[[*RATES]].to_dict() == pytest.approx(triage_rates(PATIENTS.label, answers), nan_ok=True)
        at_this = evaluate_triage(PATIENTS, answers, **FEW).set_index(
            "metric"
        )  # of the cut, not of the share
        assert row["recall_deferred_found_low"] == pytest.approx(at_this["low"]["recall_deferred_found"])
    for name in RATES:
        defined = curve[curve[name].notna()]
        assert ((defined[f"{name}_low"] <= defined[name]) & (defined[name] <= defined[f"{name}_high"])).all()


def test_a_resample_defers_the_same_share_of_its_own_suspected_cases(monkeypatch):
    weights = np.random.default_rng(7).integers(0, 3, (len(PATIENTS), 2)).astype(float)
    monkeypatch.setattr("cspine_helpers.evaluation.selective.patient_weights", lambda *_, **__: [weights])
    curve, draws = room._Curve(PROMISE, PATIENTS, SURE, [0.25]), []
    _, (draws,) = room.resample([curve.rates], PATIENTS, 2, 0, 0.95)
    times = weights[PATIENTS.number, 1].astype(int)
    y, sure, suspected = (np.repeat(each, times) for each in (PATIENTS.label, SURE, SUSPECTED))
    accepted = np.argsort(-sure[suspected], kind="stable")[: round(0.75 * suspected.sum())]
    kept = ~suspected
    kept[np.flatnonzero(suspected)[accepted]] = True
    found = dict(zip(RATES, draws[:, 1], strict=True))
    assert found["coverage"] == pytest.approx(kept.mean(), abs=1 / len(y))
    lost = (kept & suspected)[y == 1].mean()
    assert found["recall_deferred_lost"] == pytest.approx(lost, abs=1 / y.sum())


def test_minus_infinity_is_deferred_at_any_share_and_ties_in_proportion():
    unsure = np.where(np.arange(len(PATIENTS)) % 2, -np.inf, 1.0)
    curve = deferral_curve(PROMISE, PATIENTS, unsure, deferred=[0, 0.1, 1], **FEW)
    share = (unsure[SUSPECTED] == -np.inf).mean()
    expected = [1 - SUSPECTED.mean() * share] * 2 + [1 - SUSPECTED.mean()]
    assert curve["coverage"].tolist() == pytest.approx(expected)
    tied = deferral_curve(PROMISE, PATIENTS, np.ones(len(PATIENTS)), deferred=[0, 0.3], **FEW)
    assert tied["precision"][1] == pytest.approx(tied["precision"][0])
    assert tied["recall_deferred_lost"][1] == pytest.approx(0.7 * tied["recall_deferred_lost"][0])


def test_confidences_are_compared_at_equal_coverage():
    wrong = PATIENTS.label == 0  # of the suspected
    useful = SURE - 1000 * wrong
    found = compare_deferral(PROMISE, PATIENTS, useful, -useful, deferred=[0.2, 0.4], **FEW)
    assert found["metric"].tolist() == [*RATES] * 2
    found = found.set_index(["deferred", "metric"])
    assert (found.loc[[(0.2, "coverage"), (0.4, "recall_deferred_found")]][["low", "high"]] == 0).all(
        axis=None
    )
    assert found["high"][0.2, "precision"] < 0
    assert found["high"][0.2, "recall_deferred_lost"] < 0
    assert found["low"][0.2, "fractures_among_deferred"] > 0


def test_confidences_that_both_err_nowhere_here_may_still_differ_elsewhere():
    order = np.arange(len(PATIENTS)) - 1000 * (PATIENTS.label == 0)  # both defer all false alarms first
    most = {"deferred": [0.9], **FEW}
    apart = compare_deferral(PROMISE, PATIENTS, order, order**3.0, **most)
    other = np.where(PATIENTS.label == 0, order, -order)
    found = compare_deferral(PROMISE, PATIENTS, order, other, **most).set_index("metric")
    assert (apart[["difference", "low", "high"]] == 0).all(axis=None)  # the same order
    assert found.loc["precision", ["value", "other", "difference"]].tolist() == [1, 1, 0]
    assert found["low"]["precision"] < 0 < found["high"]["precision"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (partial(deferral_curve, PROMISE, PATIENTS, SURE, deferred=[2]), r"in \[0, 1\]; found 2.0"),
        (partial(deferral_curve, PROMISE, PATIENTS, SURE, deferred=[]), r"in \[0, 1\]; found none"),
        (partial(deferral_curve, PROMISE, CASES, np.ones(len(CASES))), "answers at patient level"),
        (
            partial(deferral_curve, guarantee(1.0, "patient", MAX), PATIENTS, SURE),
            "No case lies at or above p_low, 1, so that none can be deferred",
        ),
        (partial(deferral_curve, PROMISE, PATIENTS, SURE * np.nan), "120 confidences are missing"),
        (partial(compare_deferral, PROMISE, PATIENTS, SURE, SURE, deferred=[0]), "Leave the share 0 out"),
    ],
)
def test_a_curve_of_what_cannot_be_deferred_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.slow
def test_intervals_hold_the_truth_as_often_as_they_say():
    """Patients of seven alike vertebrae: an interval that counted vertebrae would be far too short."""
    rng, held = (
        np.random.default_rng(8),
        {"coverage": 0, "recall_deferred_lost": 0, "inconclusive_per_1000": 0},
    )
    base, many = Cases.of(toy(60)), 200
    for seed in range(many):
        label, kind = (rng.random(60) < 0.5).astype(int), rng.random(60)
        answers = np.where(kind < 0.3, "inconclusive", np.where(kind < 0.65, "positive", "negative"))
        cases = replace(base, label=np.repeat(label, 7))
        table = evaluate_triage(
            cases, np.repeat(answers, 7), prevalence=0.1, resamples=200, seed=seed
        ).set_index("metric")
        for name, truth in (
            ("coverage", 0.7),
            ("recall_deferred_lost", 0.35),
            ("inconclusive_per_1000", 300),
        ):
            held[name] += table["low"][name] <= truth <= table["high"][name]
    assert all(0.9 * many <= count for count in held.values()), held


def test_images_are_answered_one_by_one():
    table = image_table(60)
    promise = guarantee_on_validation(table, RecallTarget(0.5, level="image", delta=0.2))
    cases = Cases.of(table, split="validation")
    answers = Triage(promise, "distance", 0.2).answers(cases, np.abs(cases.probability - 0.5))
    assert set(evaluate_triage(cases, answers, prevalence=0.1, **FEW)["why"]) == {""}
    with pytest.raises(ValueError, match="These cases are images: their answers are made of no vertebrae"):
        patient_answers(cases, answers)


def test_a_triage_comes_back_from_its_record():
    patient = guarantee(0.2, "patient", MAX)
    for one in (
        triage(settings={"alpha": 0.5, "grid": "16 × 16"}),
        Triage(patient, "map_area", 0.25, by_vertebra=True),
        Triage(patient),
    ):
        assert Triage.from_record(json.loads(json.dumps(one.record()))) == one
    with pytest.raises(ValueError, match="a triage has 'by_vertebra', 'confidence'"):
        Triage.from_record({"cut": 1.0})


NAN = np.where(np.arange(len(CASES)) == 3, np.nan, 1.0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: triage(p_low=None), "No threshold guarantees recall of vertebrae"),
        (lambda: Triage(guarantee(0.3, "C2"), "distance", 1.0), "The guarantee is for C2 alone"),
        (lambda: Triage(guarantee(0.3), "distance"), "belong together; found 'distance' and None"),
        (lambda: Triage(guarantee(0.3), None, 0.5), "belong together; found None and 0.5"),
        (lambda: triage(cut=-np.inf), "A cut is a finite number; found -inf"),
        (lambda: triage(cut=np.nan), "A cut is a finite number; found nan"),
        (lambda: triage(cut="0.5"), "A cut is a finite number; found '0.5'"),
        (lambda: triage(cut=True), "A cut is a finite number; found True"),
        (lambda: Triage(guarantee(0.3), "a,b", 0.5), "found 'a,b'"),
        (lambda: Triage(guarantee(0.3), 5, 0.5), "found 5"),
        (lambda: Triage(0.3), "rests on a Guarantee; found float"),
        (lambda: Triage.from_record(triage().record() | {"guarantee": None}), "a triage has 'by_vertebra'"),
        (lambda: triage(by_vertebra=True), "Vertebrae answer for a patient where"),
        (lambda: triage().answers(CASES, NAN), r"1 confidences are missing \(NaN\), in the rows 3"),
        (lambda: triage().answers(CASES, [1.0]), f"one number for each of {len(CASES)} cases"),
        (lambda: triage().answers(CASES), "needs 'distance'"),
        (lambda: triage().without_deferral().answers(CASES, NAN), "takes no confidence"),
        (lambda: triage().answers(PATIENTS, np.ones(120)), "answers at vertebra level, not at patient level"),
        (
            lambda: Triage(guarantee(0.3, "patient", Aggregation("noisy_or"))).answers(PATIENTS),
            "made with the aggregation .*noisy_or.*, not with .*max",
        ),
        (lambda: patient_answers(CASES, ["maybe"] * len(CASES)), "found 'maybe'. Pass triage.answers"),
        (lambda: patient_answers(CASES.of_unit("C2"), ["negative"] * 120), "patients are made of all"),
        (lambda: triage_rates([0, 1], ["negative"]), r"Each of 2 cases has an answer; found shape \(1,\)"),
        (lambda: evaluate_triage(CASES, ["negative"] * len(CASES), prevalence=7), "found 7"),
        (lambda: evaluate_triage(CASES, ["negative"] * len(CASES), resamples=0), "2 resamples or more"),
    ],
)
def test_what_makes_no_sense_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_without_a_fracture_in_validation_there_is_no_guarantee_and_so_no_triage():
    with pytest.raises(ValueError, match="None of the 840 rows at level 'vertebra' is positive"):
        guarantee_on_validation(TABLE.assign(label=0), RecallTarget(0.9, level="vertebra"))
