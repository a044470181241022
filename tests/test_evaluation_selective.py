from functools import partial
from itertools import pairwise, permutations

import numpy as np
import pandas as pd
import pytest
from simulated import patients, table_of

from cspine_helpers.evaluation import selective
from cspine_helpers.evaluation.cases import Cases
from cspine_helpers.evaluation.selective import (
    augrc,
    aurc,
    compare_selective,
    difference_at_coverage,
    e_aurc,
    risk_bands,
    risk_coverage,
    selective_scores,
)
from cspine_helpers.labels import UID

CASES = Cases.of(table_of(*patients(np.random.default_rng(3), 60)))
WRONG = ((CASES.probability >= 0.3) != CASES.label).astype(float)
RANDOM = np.random.default_rng(4).random(len(CASES))
SURE = (RANDOM[::-1] - 0.6 * WRONG).round(1)  # wrong answers are less sure as a rule; many ties
ONE = Cases.of(table_of(np.zeros((1, 7), int), np.full((1, 7), 0.5))).of_unit("C1")
FEW = {"resamples": 200, "seed": 1}


@pytest.mark.parametrize(
    ("wrong", "area", "general"),
    [((0, 0, 0, 1), 1 / 16, 1 / 16), ((1, 0, 0, 0), 25 / 48, 1 / 4), ((0, 1, 0, 0, 1), 0.89 / 3, 0.2)],
)
def test_known_answers(wrong, area, general):
    confidence = -np.arange(len(wrong))
    assert aurc(confidence, wrong) == pytest.approx(area)
    assert augrc(confidence, wrong) == pytest.approx(general)
    assert e_aurc(confidence, np.sort(wrong)) == pytest.approx(0)
    assert aurc(np.zeros(4), (0, 0, 0, 1)) == pytest.approx(1 / 4)  # any order is as good
    assert augrc(np.zeros(4), (1, 0, 0, 0)) == pytest.approx(0.15625)


def over_orders(confidence, wrong):
    """AURC, e-AURC, AUGRC: the definitions, averaged over every order that the confidence allows."""
    n, found = len(wrong), []
    for order in permutations(range(n)):
        if all(confidence[a] >= confidence[b] for a, b in pairwise(order)):
            lost = np.cumsum([wrong[i] for i in order])
            perfect = np.cumsum(sorted(wrong)) / np.arange(1, n + 1)
            risk = lost / np.arange(1, n + 1)
            found.append((risk.mean(), risk.mean() - perfect.mean(), (lost / n).mean()))
    return np.mean(found, axis=0)


@pytest.mark.parametrize("seed", range(6))
def test_ties_are_averaged_over_all_orders(seed):
    rng = np.random.default_rng(seed)
    confidence = rng.choice([-np.inf, 0.1, 0.5, 0.9], 7)
    wrong = rng.integers(0, 2, 7) if seed % 2 else rng.random(7)
    expected = over_orders(confidence, wrong)
    found = [metric(confidence, wrong) for metric in (aurc, e_aurc, augrc)]
    np.testing.assert_allclose(found, expected)
    table = pd.DataFrame({UID: [f"1.{n}" for n in range(7)], "vertebra": "C2", "split": "validation"})
    cases = Cases.of(table.assign(label=0, probability=0.5))
    scores = selective_scores(cases, confidence, wrong, **FEW)
    np.testing.assert_allclose(scores["value"], expected)  # its own closed form


def test_a_patient_drawn_twice_counts_as_two(monkeypatch):
    """Resampling by weights gives what the rows themselves, written out, would give."""
    drawn = {}

    def record(many, *args, **kwargs):
        drawn["weights"] = np.random.default_rng(7).integers(0, 4, (many, 40)).astype(float)
        yield drawn["weights"]

    monkeypatch.setattr("cspine_helpers.evaluation.selective.patient_weights", record)
    value, draws = selective.resample([selective._areas(CASES, SURE, WRONG)], CASES, 40, 0, 0.95)
    for place in (0, 17, 39):
        times = drawn["weights"][CASES.number, place].astype(int)
        rows = np.repeat(np.arange(len(CASES)), times)
        expected = [metric(SURE[rows], WRONG[rows]) for metric in (aurc, e_aurc, augrc)]
        np.testing.assert_allclose(draws[0][:, place], expected)
    np.testing.assert_allclose(value[0], [metric(SURE, WRONG) for metric in (aurc, e_aurc, augrc)])


def test_the_curve_is_the_table_that_its_areas_are_means_of():
    curve = risk_coverage([3, 2, 2, 1], [0, 1, 0, 0])
    assert curve["cases"].tolist() == [1, 2, 3, 4]
    np.testing.assert_allclose(curve["risk"], [0, 1 / 4, 1 / 3, 1 / 4])
    np.testing.assert_allclose(curve["generalised_risk"], curve["risk"] * curve["coverage"])
    bands = risk_bands(CASES, SURE, WRONG, points=len(CASES), **FEW)
    np.testing.assert_allclose(bands["risk"], risk_coverage(SURE, WRONG)["risk"], atol=1e-12)
    assert (bands["low"] <= bands["risk"]).all()
    assert (bands["risk"] <= bands["high"]).all()
    assert (bands["high"] > 0).all()  # also where nothing is wrong yet


def test_a_useful_confidence_is_told_from_a_useless_one_with_an_interval():
    found = compare_selective(CASES, SURE, RANDOM, WRONG, **FEW).set_index("metric")
    assert (found["difference"] == found["other"] - found["value"]).all()
    assert (found["low"] > 0).all()
    same = compare_selective(CASES, SURE, SURE * 2, WRONG, **FEW)
    assert (same[["difference", "low", "high"]] == 0).all(axis=None)
    at = difference_at_coverage(CASES, SURE, RANDOM, WRONG, coverage=[0.5, 1], **FEW).set_index("coverage")
    assert at.loc[0.5, "low"] > 0
    assert at.loc[1, ["difference", "low", "high"]].tolist() == [0, 0, 0]  # all are accepted by both
    alike = difference_at_coverage(CASES, SURE, np.exp(SURE), WRONG, **FEW)
    assert (alike[["difference", "low", "high"]] == 0).all(axis=None)
    curve = risk_coverage(SURE, WRONG)
    assert at.loc[0.5, "risk"] == pytest.approx(curve["risk"][len(CASES) // 2 - 1])


def test_the_interval_of_no_error_at_all_says_how_many_patients_it_rests_on():
    found = selective_scores(CASES, SURE, np.zeros(len(CASES)), **FEW)
    assert (found[["value", "low"]] == 0).all(axis=None)
    assert ((found["high"] > 0.04) & (found["high"] < 0.07)).all()  # 0 of 60 patients, by Wilson: 6 %


def test_so_few_cases_that_a_resample_may_hold_none_have_wide_intervals_and_no_warning():
    few = np.flatnonzero(np.isin(CASES.patient, ["1.3", "1.8"]))[[0, 9]]
    two = CASES.where(np.isin(np.arange(len(CASES)), few))  # of 60 patients, whom a resample draws from
    for table in (
        selective_scores(two, [1, 0], [0, 1], **FEW),
        compare_selective(two, [1, 0], [0, 1], [0, 1], **FEW),
        risk_bands(two, [1, 0], [0, 1], points=2, **FEW),
        difference_at_coverage(two, [1, 0], [0, 1], [0, 1], coverage=[0.5], **FEW),
    ):
        assert not table.isna().any(axis=None)
        assert (table["high"] - table["low"] > 0.2).any()


def one_each(many):
    """So many patients with one vertebra each."""
    return Cases.of(table_of(np.zeros((many, 7), int), np.full((many, 7), 0.5))).of_unit("C1")


def test_confidences_that_err_nowhere_here_may_still_differ():
    first, other = np.arange(40.0), np.r_[np.arange(5.0), np.arange(40, 5, -1)]
    found = difference_at_coverage(one_each(40), first, other, first < 3, coverage=[0.3], **FEW)
    assert found[["risk", "other", "difference"]].to_numpy().tolist() == [[0, 0, 0]]
    assert (found["low"] < -0.1).all()
    assert (found["high"] > 0.1).all()


def test_the_band_does_not_jump_where_the_first_answer_is_wrong():
    sure = -np.arange(71)
    band = risk_bands(one_each(71), sure, sure < -35, points=71, **FEW)  # all right, then all wrong
    assert band["high"].iloc[10:].diff().abs().max() < 0.06
    assert (band["high"].iloc[10:20] < 0.3).all()
    assert (band["low"].iloc[:40] == 0).all()  # resamples in which nobody wrong is accepted are no rarity


@pytest.mark.slow  # 250 bands
def test_bands_hold_the_risk_beside_a_kink_too():
    rng, held = np.random.default_rng(0), []
    cases, coverage = one_each(70), np.arange(1, 21) / 20
    true = np.where(coverage > 0.5, 0.9 * (1 - 0.5 / coverage), 0)  # no error above the median confidence
    for seed in range(250):
        sure = rng.random(70)
        wrong = (sure < 0.5) & (rng.random(70) < 0.9)
        band = risk_bands(cases, sure, wrong, points=20, resamples=200, seed=seed)
        held.append((band["low"] <= true) & (true <= band["high"]))
    assert (np.mean(held, axis=0) > 0.92).all()


def missing(values):
    return np.where(np.arange(len(CASES)) == 5, np.nan, values)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (partial(aurc, [], []), r"at least one; found shape \(0,\)"),
        (
            partial(aurc, [1, np.nan, np.nan], [0, 0, 1]),
            r"2 confidences are missing \(NaN\), in the rows 1, 2",
        ),
        (partial(aurc, ["sure", 2], [0, 1]), "Confidences are numbers, one a case; .*'sure'"),
        (partial(difference_at_coverage, CASES, SURE, SURE, WRONG, coverage=[]), "found none"),
        (partial(aurc, [1, 2], [0]), r"found 2 confidences, and losses of shape \(1,\)"),
        (partial(aurc, [1, 2], [0, 2]), r"1 losses are missing or outside \[0, 1\] \(row 1: 2.0\)"),
        (partial(aurc, [1, 2], [0, np.nan]), r"row 1: nan"),
        (
            partial(selective_scores, CASES, missing(SURE), WRONG),
            r"1 confidences are missing \(NaN\).*rows 5",
        ),
        (partial(selective_scores, CASES, SURE[:3], WRONG), f"one number for each of {len(CASES)} cases"),
        (partial(selective_scores, CASES, SURE, WRONG, resamples=1), "2 resamples or more; found 1"),
        (partial(selective_scores, CASES, SURE, WRONG, interval=1), "between 0 and 1; found 1"),
        (partial(risk_bands, CASES, SURE, WRONG, points=0), "1 point or more; found 0"),
        (partial(difference_at_coverage, CASES, SURE, SURE, WRONG, coverage=[0, 0.5]), "found 0.0, 0.5"),
        (partial(selective_scores, ONE, [1.0], [0]), "of 1 patient, which cannot be resampled"),
    ],
)
def test_what_cannot_be_judged_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
