import numpy as np
import pandas as pd
import pytest
from test_slider_widget import made_table

from cspine_helpers.decisions.triage import evaluate_triage, patient_answers
from cspine_helpers.evaluation.cases import LEVELS, Aggregation, Cases
from cspine_helpers.evaluation.clinical_utility import predictive_curve, predictive_values
from cspine_helpers.evaluation.intervals import bootstrap
from cspine_helpers.evaluation.resampling import score_interval
from cspine_helpers.labels import UID, VERTEBRAE
from cspine_helpers.metrics import confusion, rates
from cspine_helpers.slider.operating_point import OperatingPoints, weigh


def operating(table, level="all", aggregation=None):
    cases = Cases.of(table)
    at_level = cases.patients(aggregation) if level == "patient" else cases.of_unit(level)
    return OperatingPoints(at_level, cases, weigh(cases))


def copied(table, which, times):
    """The table with the patients of one kind (their label) there so many times."""
    kind = table.groupby(UID)["label"].transform("max") == which
    copies = [table[kind].assign(**{UID: table[UID][kind] + f".{n}"}) for n in range(times - 1)]
    return pd.concat([table, *copies], ignore_index=True)


@pytest.mark.slow
@pytest.mark.parametrize("level", LEVELS)
def test_counts_and_rates_are_those_of_metrics_at_every_score_and_beside_it(level):
    table = made_table(studies=60)
    table["probability"] = table["probability"].round(2)  # ties
    rows, explored = Cases.of(table).of_unit(level).table(), operating(table, level)
    scores = np.unique(rows["probability"])
    thresholds = [0, *scores, *(scores + 1e-9), 1]
    table_of_rates = rates(confusion(rows["label"], rows["probability"], thresholds))
    for threshold, (_, expected) in zip(thresholds, table_of_rates.iterrows(), strict=True):
        point = explored.at(threshold)
        assert point.counts == expected[["tp", "fp", "fn", "tn"]].to_dict()
        for name, found in point.found.items():
            assert found == pytest.approx(expected[name], nan_ok=True)
            assert point.rates[name].value == pytest.approx(expected[name], nan_ok=True)


@pytest.mark.parametrize("level", ["all", "C2", "patient"])
def test_intervals_are_those_of_the_bootstrap(level):
    table = made_table(studies=120)
    explored = operating(table, level)
    for threshold in (0.1, 0.3):
        expected = bootstrap(Cases.of(table).of_unit(level), threshold=threshold, keep_undefined=True)
        expected = expected.set_index("metric")
        for name, found in explored.at(threshold).rates.items():
            value, low, high, undefined = expected.loc[name]
            limits = (low, high) if undefined <= 50 else (np.nan, np.nan)  # of 1,000 resamples
            assert found == pytest.approx((value, *limits), abs=1e-6, nan_ok=True)


@pytest.mark.parametrize("level", ["all", "C2"])
def test_another_prevalence_is_as_if_there_were_more_patients_of_one_kind(level):
    table = made_table(studies=80)
    for which in (0, 1):
        more = copied(table, which, 3)
        prevalence = more.groupby(UID)["label"].max().mean()
        restated, counted = operating(table, level).at(0.3, prevalence), operating(more, level).at(0.3)
        for name in counted.rates:
            assert restated.rates[name].value == pytest.approx(counted.rates[name].value)
        assert restated.missed.value == pytest.approx(counted.missed.value)
        assert restated.counts != counted.counts  # they stay what was found


def test_predictive_values_of_patients_follow_bayes():
    explored = operating(made_table(studies=120), "patient")
    point = explored.at(0.3, 0.07)
    expected = predictive_values(point.found["recall"], point.found["specificity"], 0.07).iloc[0]
    assert point.rates["precision"].value == pytest.approx(expected["ppv"])
    assert point.rates["npv"].value == pytest.approx(expected["npv"])
    assert point.rates["recall"] == pytest.approx(explored.at(0.3).rates["recall"])
    low, high = point.rates["precision"][1:]
    assert low < expected["ppv"] < high < explored.at(0.3).rates["precision"].value


@pytest.mark.parametrize("level", ["patient", "all"])
@pytest.mark.parametrize("silent", ["no false alarm", "no miss"])
def test_no_error_among_few_patients_is_no_certainty_where_fractures_are_rare(level, silent):
    table = made_table(studies=60)
    label = table["label"] if level == "all" else table.groupby(UID)["label"].transform("max")
    apart = table.assign(probability=0.2 + 0.6 * label)  # so that nothing is called, or missed, wrongly
    if silent == "no false alarm":
        apart.loc[label.eq(1) & (np.arange(len(table)) < 70), "probability"] = 0.2
        name, rate = "precision", "specificity"
    else:
        apart.loc[label.eq(0) & (np.arange(len(table)) < 70), "probability"] = 0.8
        name, rate = "npv", "recall"
    explored = operating(apart, level)
    observed, restated = explored.at(0.5), explored.at(0.5, 0.02)
    assert observed.rates[name].value == restated.rates[name].value == observed.found[rate] == 1
    assert restated.rates[name].high == 1
    if silent == "no false alarm":  # 2 of 100 are fractured; some of the others may well be called
        assert restated.rates[name].low < 0.5 < observed.rates[name].low
    else:  # hardly anybody is fractured, so that hardly anybody can be missed
        assert observed.rates[name].low < restated.rates[name].low < 1


@pytest.mark.parametrize("threshold", [0.3, 0.45, 0.6])
def test_predictive_values_of_patients_are_those_of_notebook_06(threshold):
    table = made_table(studies=120)
    for prevalence in (0.02, 0.4):
        point = operating(table, "patient").at(threshold, prevalence)
        expected = predictive_curve(Cases.of(table, level="patient"), threshold, prevalence).iloc[0]
        for ours, theirs in (("precision", "ppv"), ("npv", "npv")):
            ends = [expected[f"{theirs}{end}"] for end in ("", "_low", "_high")]
            assert point.rates[ours] == pytest.approx(ends, abs=2e-6)


def test_patients_missed_are_the_fractured_who_are_not_called():
    table = made_table(studies=120)
    patients = table.groupby(UID).agg(label=("label", "max"), probability=("probability", "max"))
    missed = ((patients["label"] == 1) & (patients["probability"] < 0.45)).sum()
    fractured = patients["label"].sum()
    for level in ("all", "patient"):
        low, high = score_interval(missed / 120, 120)
        point = operating(table, level).at(0.45)
        assert point.missed == pytest.approx((1000 * missed / 120, 1000 * low, 1000 * high))
        low, high = score_interval(missed / fractured, fractured)
        restated = operating(table, level).at(0.45, 0.07).missed
        assert restated == pytest.approx((70 * missed / fractured, 70 * low, 70 * high))
    one = table[table["vertebra"] == "C5"]
    missed = ((one["label"] == 1) & (one["probability"] < 0.45)).sum()
    assert operating(table, "C5").at(0.45).missed.value == pytest.approx(1000 * missed / 120)


def test_patients_called_back_are_called_without_a_fracture():
    table = made_table(studies=120)
    patients = table.groupby(UID).agg(label=("label", "max"), probability=("probability", "max"))
    called = ((patients["label"] == 0) & (patients["probability"] >= 0.45)).sum()
    intact = (patients["label"] == 0).sum()
    for level in ("all", "patient"):
        low, high = score_interval(called / 120, 120)
        point = operating(table, level).at(0.45)
        assert point.called_back == pytest.approx((1000 * called / 120, 1000 * low, 1000 * high))
        low, high = score_interval(called / intact, intact)
        restated = operating(table, level).at(0.45, 0.07).called_back
        assert restated == pytest.approx((930 * called / intact, 930 * low, 930 * high))


def test_patients_called_back_at_one_vertebra_may_be_fractured_elsewhere():
    table = made_table(studies=120)
    one = table[table["vertebra"] == "C5"]
    ill = (table.groupby(UID)["label"].max()[one[UID]] == 1).to_numpy()
    called = ((one["label"] == 0) & (one["probability"] >= 0.2)).to_numpy()
    explored = operating(table, "C5")
    assert explored.at(0.2).called_back.value == pytest.approx(1000 * called.mean())
    restated = explored.at(0.2, 0.07).called_back
    assert restated.value == pytest.approx(70 * called[ill].mean() + 930 * called[~ill].mean())
    assert restated.low < restated.value < restated.high
    same = explored.at(0.2, ill.mean()).called_back
    assert same == pytest.approx(explored.at(0.2).called_back, rel=0.1)  # as observed, the width too


def test_recall_of_each_vertebra_and_of_the_patients_with_it():
    table = made_table(studies=120)
    highest = table.groupby(UID)["probability"].transform("max")
    for level, scores in (("all", table["probability"]), ("C2", table["probability"]), ("patient", highest)):
        recalls = operating(table, level).at(0.4).recalls
        for name in VERTEBRAE:
            here = (table["vertebra"] == name) & (table["label"] == 1)
            value = (scores[here] >= 0.4).mean()
            assert recalls[name] == pytest.approx((value, *score_interval(value, here.sum())))


def test_a_vertebra_without_fractures_has_no_recall():
    table = made_table()
    table.loc[table["vertebra"] == "C3", "label"] = 0
    explored = operating(table)
    assert explored.positives["C3"] == 0
    assert np.isnan(explored.at(0.3).recalls["C3"]).all()


def test_patients_by_another_aggregation():
    table, mean = made_table(studies=60), Aggregation("top_k", k=3)
    rows = Cases.of(table, level="patient", aggregation=mean).table()
    point = operating(table, "patient", aggregation=mean).at(0.3)
    expected = confusion(rows["label"], rows["probability"], 0.3).iloc[0]
    assert point.counts == expected[["tp", "fp", "fn", "tn"]].to_dict()
    assert point.missed.value == pytest.approx(1000 * expected["fn"] / 60)
    held = rows.set_index(UID)["probability"][table[UID][(table["vertebra"] == "C1") & (table["label"] == 1)]]
    assert point.recalls["C1"].value == pytest.approx((held >= 0.3).mean())


def test_a_rate_that_few_resamples_define_has_no_interval():
    point = operating(made_table()).at(made_table()["probability"].max())
    assert point.rates["precision"].value in (0, 1)
    assert np.isnan(point.rates["precision"][1:]).all()  # one row is called, in two resamples of three
    assert not np.isnan(point.rates["recall"][1:]).any()
    assert np.isnan(operating(made_table()).at(1.0).rates["precision"]).all()


def test_a_prevalence_needs_both_kinds_of_patient_and_lies_between_0_and_1():
    table = made_table()
    with pytest.raises(ValueError, match="A prevalence lies between 0 and 1; found 1"):
        operating(table).at(0.3, 1.0)
    table = table[table.groupby(UID)["label"].transform("max") == 1]
    with pytest.raises(ValueError, match="Another prevalence needs patients with and without a fracture"):
        operating(table).at(0.3, 0.07)


def answered(cases, low, high):
    at_least = cases.probability[:, None] >= np.array([low, high])
    return np.array(["negative", "inconclusive", "positive"])[at_least.sum(axis=1)]


@pytest.mark.parametrize(
    ("level", "low", "high"), [("all", 0.2, 0.4), ("C2", 0.2, 0.4), ("patient", 0.37, 0.5)]
)
def test_two_thresholds_reach_what_evaluate_triage_says_of_their_answers(level, low, high):
    table = made_table(studies=120)
    table["probability"] = table["probability"].round(2)  # cases at both thresholds
    cases, point = Cases.of(table).of_unit(level), operating(table, level).triage(low, high)
    answers = answered(cases, low, high)
    expected = evaluate_triage(cases, answers).set_index("metric")[["value", "low", "high"]]
    for name, found in point.rates.items():
        if name != "npv":  # of one threshold alone
            assert found == pytest.approx(expected.loc[name].tolist(), abs=1e-6)
    for name, count in point.counts.items():
        label, answer = name.split("_")
        assert count == ((answers == answer) & (cases.label == (label == "fractured"))).sum() > 0


@pytest.mark.parametrize("level", ["all", "patient"])
def test_patients_a_reader_decides_about_are_those_of_evaluate_triage_at_the_stated_prevalence(level):
    table = made_table(studies=120)
    cases, explored = Cases.of(table), operating(table, level)
    patients = cases.patients(Aggregation("max"))
    whole = patient_answers(cases, answered(cases, 0.3, 0.4))
    assert (whole == answered(patients, 0.3, 0.4)).all()
    point = explored.triage(0.3, 0.4, 0.07)
    expected = evaluate_triage(patients, whole, prevalence=0.07).set_index("metric")
    for name, found in (("inconclusive", point.workload), ("missed", point.low.missed)):
        value, *limits = expected.loc[f"{name}_per_1000", ["value", "low", "high"]]
        assert found.value == pytest.approx(value)
        assert found[1:] == pytest.approx(limits, rel=0.1)  # there a score interval of resampled patients
    observed = explored.triage(0.3, 0.4).workload
    assert observed.value == pytest.approx(1000 * (whole == "inconclusive").mean())
    if level == "patient":
        assert point.inconclusive_rate.value == pytest.approx(point.workload.value / 1000)


def test_coverage_at_another_prevalence_is_as_if_there_were_more_patients_of_one_kind():
    table = made_table(studies=80)
    more = copied(table, 0, 3)
    prevalence = more.groupby(UID)["label"].max().mean()
    for level in ("all", "C2"):
        restated = operating(table, level).triage(0.2, 0.4, prevalence)
        counted = operating(more, level).triage(0.2, 0.4)
        assert restated.coverage.value == pytest.approx(counted.coverage.value)
        assert restated.workload.value == pytest.approx(counted.workload.value)
        low, high = restated.coverage[1:]
        assert low < restated.coverage.value < high
        assert restated.inconclusive_rate == pytest.approx((1 - restated.coverage.value, 1 - high, 1 - low))


def test_equal_thresholds_defer_nothing_and_crossed_ones_are_refused():
    explored = operating(made_table())
    point, one = explored.triage(0.3, 0.3), explored.at(0.3)
    assert point.coverage.value == 1
    assert point.workload.value == point.counts["fractured_inconclusive"] == 0
    assert (point.low, point.high) == (one, one)
    with pytest.raises(
        ValueError, match=r"Positive from 0\.2000, negative below 0\.3000: a case would be both"
    ):
        explored.triage(0.3, 0.2)
