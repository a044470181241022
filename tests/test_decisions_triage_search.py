import numpy as np
import pandas as pd
import pytest
from simulated import image_table, patients, table_of

from cspine_helpers.decisions.confidence import fit_confidence
from cspine_helpers.decisions.guarantees import RecallTarget, guarantee_on_validation
from cspine_helpers.decisions.triage import Triage, patient_answers, triage_rates
from cspine_helpers.decisions.triage_search import (
    SearchRule,
    patient_confidence,
    search_triage,
    shared_guarantees,
    winner_of,
)
from cspine_helpers.evaluation.calibration import patient_folds
from cspine_helpers.evaluation.cases import Cases
from cspine_helpers.files.tables import read_columns, write_table
from cspine_helpers.labels import UID

FAST = {"deferred": [0.2, 0.5], "alphas": [0.4]}


@pytest.fixture(scope="module")
def predictions():
    return table_of(*patients(np.random.default_rng(0), 250))


@pytest.fixture(scope="module")
def cases(predictions):
    return Cases.of(predictions, split="validation")


@pytest.fixture(scope="module")
def guarantees(predictions):
    return shared_guarantees(predictions, [0.8, 0.9], level="patient", delta=0.1)


@pytest.fixture(scope="module")
def images():
    return image_table(seed=3, splits=("validation",))


def with_features(table, seed=0, *, tells=0.0):
    """Features that know nothing, or, with `tells`, which cases are fractured."""
    rng = np.random.default_rng(seed)
    entropy = rng.random(len(table)) * 0.5 - tells * (table["label"] - 0.5) + 0.25
    features = table[[UID, "vertebra"]].assign(entropy=entropy.clip(0, 1), flat=0)
    return features.assign(**{"area_0.4": rng.random(len(table))})


def test_patients_are_ordered_as_their_vertebrae_are_answered(cases, guarantees):
    sure = np.random.default_rng(0).random(len(cases)).round(2)
    p_low = guarantees[0].require()
    of_patients = patient_confidence(cases, sure, p_low)
    highest = cases.patients().probability
    for cut in (0.3, 0.7, 0.95):
        triage = Triage(guarantees[0], "random", cut, by_vertebra=True)
        answers = patient_answers(cases, triage.answers(cases, sure))
        expected = np.where(of_patients >= cut, "positive", "inconclusive")
        assert np.array_equal(answers, np.where(highest < p_low, "negative", expected))


def test_a_row_is_what_its_triage_answers_on_validation(cases, guarantees):
    table = search_triage(cases, guarantees, names=["distance", "calibrated"], **FAST)
    assert table["kind"].value_counts().to_dict() == {"setting": 8, "no deferral": 2, "search": 1}
    labels = cases.patients().label
    for row in table[table["kind"] != "search"].to_dict("records"):
        guarantee = next(each for each in guarantees if each.threshold == row["p_low"])
        assert row["guaranteed"] == guarantee.target.recall
        triage, sure = Triage(guarantee, by_vertebra=True), None
        if row["kind"] == "setting":
            triage = Triage(guarantee, row["confidence"], row["cut"], by_vertebra=True)
            sure = fit_confidence(row["confidence"], cases, p_low=row["p_low"]).of(cases)
        answers = patient_answers(cases, triage.answers(cases, sure))
        for name, rate in triage_rates(labels, answers).items():
            if name in row:
                assert row[name] == pytest.approx(rate, nan_ok=True)
        if row["kind"] == "setting":
            suspected = (answers != "negative").sum()
            assert (answers == "inconclusive").sum() == int(row["deferred"] * suspected)


def test_the_table_is_kept_and_read_as_it_is(cases, guarantees, tmp_path):
    table = search_triage(cases, guarantees, names=["distance"], **FAST)
    write_table(table, tmp_path / "search.csv", sealed=True)
    read = read_columns(tmp_path / "search.csv", what="table", source="", text=("kind", "confidence"))
    assert winner_of(read, cases, guarantees)[0].p_low == winner_of(table, cases, guarantees)[0].p_low


def test_recall_with_deferred_found_is_that_of_no_deferral(cases, guarantees):
    table = search_triage(cases, guarantees, names=["distance", "conformal"], **FAST)
    for _, rows in table[table["kind"] != "search"].groupby("p_low"):
        for name in ("recall_deferred_found", "held_out_recall_deferred_found"):
            assert (rows[name] == rows[name].iloc[0]).all()
        assert rows["recall_deferred_lost"].max() == rows["recall_deferred_found"].iloc[0]


def test_a_map_that_knows_wins_and_one_that_knows_nothing_loses_to_plain_probability(images):
    cases = Cases.of(images, split="validation")
    guarantee = guarantee_on_validation(images, RecallTarget(0.8, level="image", delta=0.1))
    names = ["distance", "map_entropy"]
    wins = {}
    for tells in (0.0, 0.4):
        features = with_features(images, tells=tells)
        table = search_triage(cases, guarantee, features, names=names)
        best = table.groupby("confidence")["held_out_value"].max()
        wins[tells] = best["map_entropy"] - best["distance"]
        if tells:
            assert table.loc[table["winner"] == 1, "confidence"].item() == "map_entropy"
            triage, fit = winner_of(table, cases, guarantee, features)
            assert (triage.confidence, triage.cut) == (
                fit.name,
                table.loc[table["winner"] == 1, "cut"].item(),
            )
            assert triage.settings == fit.record()
    assert wins[0.0] < 0 < wins[0.4]


def test_where_deferral_costs_as_much_as_a_false_alarm_it_is_not_done(cases, guarantees):
    table = search_triage(cases, guarantees, rule=SearchRule(cost_deferral=1.0), names=["distance"], **FAST)
    assert table.loc[table["winner"] == 1, "kind"].item() == "no deferral"
    assert winner_of(table, cases, guarantees)[1] is None


def test_a_search_among_noise_is_told_by_the_row_of_the_search(images):
    """The best of many settings looks better than it is; choosing and judging on others does not."""
    noise = images.assign(probability=0.5 + 0.001 * np.random.default_rng(1).random(len(images)))
    cases = Cases.of(noise, split="validation")
    guarantee = guarantee_on_validation(noise, RecallTarget(0.8, level="image", delta=0.1))
    rule = SearchRule("accuracy", coverage_floor=0.6)
    features, names = with_features(images), ["map_entropy", "map_area"]
    table = search_triage(cases, guarantee, features, rule=rule, names=names, alphas=[0.4]).set_index("kind")
    best = table.loc["setting"].query("coverage >= 0.6")["value"].max()
    assert best > table.loc["no deferral", "value"]
    assert table.loc["search", "held_out_value"] < best


def test_no_patient_is_judged_by_a_cut_that_was_chosen_on_it(images):
    cases = Cases.of(images, split="validation")
    guarantee = guarantee_on_validation(images, RecallTarget(0.8, level="image", delta=0.1))
    features = with_features(images)
    table = search_triage(cases, guarantee, features, names=["map_entropy"], deferred=[0.5])
    row = table[table["kind"] == "setting"].iloc[0]
    fold, suspected = patient_folds(cases, 5, 0), cases.probability >= guarantee.threshold
    sure, answers = -features["entropy"].to_numpy(), np.full(len(cases), "negative", dtype="<U12")
    for each in range(5):
        known = np.sort(sure[suspected & (fold != each)])
        passed = sure >= known[len(known) // 2]
        part = suspected & (fold == each)
        answers[part] = np.where(passed[part], "positive", "inconclusive")
    assert row["held_out_coverage"] == (answers != "inconclusive").mean()
    assert row["held_out_f1"] == triage_rates(cases.label, answers)["f1"]


def test_guarantees_of_a_search_share_delta(predictions):
    found = shared_guarantees(predictions, [0.9, 0.8, 0.8], level="patient", delta=0.1)
    assert [(each.target.recall, each.target.delta) for each in found] == [(0.8, 0.05), (0.9, 0.05)]
    ties = predictions.assign(probability=0.5)
    assert [each.target.recall for each in shared_guarantees(ties, [0.8, 0.9], level="patient")] == [0.9]
    few = predictions.head(70)
    with pytest.raises(ValueError, match="No threshold guarantees recall of patients"):
        shared_guarantees(few, [0.99], level="patient")
    with pytest.raises(ValueError, match="needs a recall"):
        shared_guarantees(predictions, [], level="patient")


def test_maps_that_mark_nothing_are_no_setting(images):
    cases = Cases.of(images, split="validation")
    guarantee = guarantee_on_validation(images, RecallTarget(0.8, level="image", delta=0.1))
    features = with_features(images).assign(flat=1)
    table = search_triage(cases, guarantee, features, names=["map_entropy"])
    assert table["kind"].tolist() == ["no deferral", "search"]


def test_what_cannot_be_searched_is_refused(predictions, cases, guarantees, images):
    with pytest.raises(ValueError, match=r"None of .* is fractured, so that no triage"):
        search_triage(cases.where(cases.label == 0), guarantees)
    with pytest.raises(ValueError, match="needs a guarantee"):
        search_triage(cases, [])
    with pytest.raises(ValueError, match=r"between 0 and 1; found 1\.0"):
        search_triage(cases, guarantees, deferred=[0.2, 1.0])
    with pytest.raises(ValueError, match="These cases are images; the guarantees are of level patient"):
        search_triage(Cases.of(images, split="validation"), guarantees)
    with pytest.raises(ValueError, match="needs the feature 'entropy'"):
        search_triage(cases, guarantees, names=["map_entropy"])
    for names in (["entropy"], "entropy"):
        with pytest.raises(ValueError, match="Unknown confidence 'entropy'"):
            search_triage(cases, guarantees, names=names)
    with pytest.raises(ValueError, match="found 999 folds for"):
        search_triage(cases, guarantees, names=["distance"], folds=999)
    table = pd.DataFrame({"winner": [0, 0]})
    with pytest.raises(ValueError, match="A search has one winner; found 0"):
        winner_of(table, cases, guarantees)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"objective": "auc"}, "Unknown objective 'auc'"),
        ({"cost_miss": 0}, "cost_miss is a finite number above 0"),
        ({"cost_miss": "10"}, "cost_miss is a finite number above 0; found '10'"),
        ({"objective": "f1"}, "f1 of confident cases needs a coverage_floor"),
        ({"coverage_floor": 1.2}, "coverage_floor is in"),
    ],
)
def test_rules_that_are_none_are_refused(options, says):
    with pytest.raises(ValueError, match=says):
        SearchRule(**options)


def test_a_rule_counts_what_answers_cost():
    labels = np.array([1, 1, 0, 0, 1, 0])
    answers = np.array(["negative", "positive", "positive", "negative", "inconclusive", "inconclusive"])
    assert SearchRule().value(labels, answers) == pytest.approx(-(10 + 1 + 2 * 0.5) / 6)
    assert SearchRule("accuracy", coverage_floor=0).value(labels, answers) == 0.5
    assert pd.isna(SearchRule("f1", coverage_floor=0).value(labels[-2:], answers[-2:]))
