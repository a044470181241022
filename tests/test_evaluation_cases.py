import json
from dataclasses import asdict
from functools import partial

import numpy as np
import pandas as pd
import pytest
from conftest import RSNA, needs_rsna
from scipy.special import expit, logit
from simulated import cohort
from sklearn.linear_model import LogisticRegression

from cspine_helpers.decisions.thresholds import (
    Decision,
    Rule,
    apply_decision,
    choose_decision,
    choose_per_vertebra,
)
from cspine_helpers.evaluation.calibration import apply, cross_fitted, fit_calibrator
from cspine_helpers.evaluation.cases import (
    MIN_PATIENTS,
    Aggregation,
    Cases,
    cleared_by_vertebrae,
    compare_aggregations,
    defined_levels,
    fit_logistic,
    sorted_logits,
)
from cspine_helpers.evaluation.intervals import bootstrap, compare, per_vertebra
from cspine_helpers.evaluation.reliability import calibration_scores
from cspine_helpers.labels import PATIENT, UID, VERTEBRAE, read_labels
from cspine_helpers.model_card.results import find
from cspine_helpers.predictions import from_wide
from cspine_helpers.slider.operating_point import OperatingPoints, weigh

LEARNED = Aggregation(
    "logistic", intercept=-0.5, weights=(1.0, 0.5, 0.25, 0, 0, 0, 0), fitted_on={"split": "validation"}
)


def toy(patients=120, seed=0, split="validation"):
    """Predictions of patients whose fractured vertebrae score higher."""
    rng = np.random.default_rng(seed)
    labels = (rng.random((patients, 7)) < 0.1).astype(int)
    scores = expit(rng.normal(2.5 * labels - 2, 1))
    uids = [f"1.{split == 'test':d}.{number}" for number in range(patients)]
    return pd.DataFrame(
        {
            UID: np.repeat(uids, 7),
            "vertebra": VERTEBRAE * patients,
            "split": split,
            "label": labels.ravel(),
            "probability": scores.ravel(),
        }
    )


def patient(*probabilities, labels=None):
    """One patient with the first vertebrae only."""
    n = len(probabilities)
    return pd.DataFrame(
        {
            UID: "1.2",
            "vertebra": VERTEBRAE[:n],
            "split": "validation",
            "label": labels or [0] * n,
            "probability": probabilities,
        }
    )


def aggregate(table, aggregation):
    return Cases.of(table, level="patient", aggregation=aggregation).table()


def learned(table, **options):
    return fit_logistic(Cases.of(table, split="validation"), **options)


def side_by_side(table):
    return compare_aggregations(Cases.of(table))


@pytest.mark.parametrize(
    ("aggregation", "expected"),
    [
        (Aggregation(), 0.5),
        (Aggregation("noisy_or"), 1 - 0.5 * 0.9 * 0.8),
        (Aggregation("top_k", k=2), 0.35),
        (Aggregation("top_k", k=7), (0.5 + 0.1 + 0.2) / 3),
        # sorted: 0.5, 0.2, 0.1, and 0.1 for each that is missing
        (LEARNED, expit(-0.5 + logit(0.5) + 0.5 * logit(0.2) + 0.25 * logit(0.1))),
    ],
)
def test_worked_by_hand_with_four_vertebrae_missing(aggregation, expected):
    found = aggregate(patient(0.5, 0.1, 0.2, labels=[0, 1, 0]), aggregation)
    assert list(found.columns) == [UID, "split", "label", "probability", "missing"]
    assert found["probability"].item() == pytest.approx(expected, rel=1e-12)
    assert (found["label"].item(), found["missing"].item()) == (1, 4)


@pytest.mark.parametrize(
    "aggregation", [Aggregation(), Aggregation("noisy_or"), Aggregation("top_k", k=3), LEARNED], ids=str
)
def test_probabilities_of_0_and_1_stay_in_the_unit_interval(aggregation):
    for p in ((0.0,) * 7, (1.0,) * 7, (0.0, 1.0), (1e-300, 1 - 1e-16)):
        assert 0 <= aggregate(patient(*p), aggregation)["probability"].item() <= 1


@needs_rsna
def test_noisy_or_is_the_overall_column_of_real_predictions():
    wide = pd.read_csv(RSNA / "oof_predictions.csv", dtype={"uid": str})
    real = from_wide(wide, read_labels(RSNA / "train.csv"), "validation", missing="drop")
    found = aggregate(real, Aggregation("noisy_or")).set_index(UID)["probability"]
    overall = wide.set_index("uid")["Overall"].loc[found.index]
    np.testing.assert_allclose(found, overall, atol=1e-6)


def test_the_learned_weights_are_those_of_scikit_learn_where_none_is_negative():
    rng = np.random.default_rng(1)
    wide = np.sort(expit(rng.normal(0, 1.5, (6000, 7))), axis=1)[:, ::-1]
    weights = np.array([1.0, 0.8, 0.6, 0.5, 0.4, 0.3, 0.3])
    labels = (rng.random(6000) < expit(sorted_logits(wide) @ weights - 0.5)).astype(int)
    table = pd.DataFrame(wide, columns=list(VERTEBRAE)).assign(**{UID: [f"1.{n}" for n in range(6000)]})
    long = table.melt(UID, list(VERTEBRAE), "vertebra", "probability").assign(split="validation", label=0)
    long["label"] = np.where(long["vertebra"] == "C1", np.tile(labels, 7), 0)
    found = learned(long)
    oracle = LogisticRegression(C=1.0, tol=1e-10, max_iter=10_000).fit(sorted_logits(wide), labels)
    assert oracle.coef_.min() > 0
    np.testing.assert_allclose(found.weights, oracle.coef_[0], atol=1e-4)
    assert found.intercept == pytest.approx(oracle.intercept_[0], abs=1e-4)
    assert found.fitted_on == {"split": "validation", "patients": 6000, "positives": labels.sum()}


def test_a_higher_vertebra_never_lowers_the_learned_patient():
    fitted = learned(toy())
    assert min(fitted.weights) == 0
    rng = np.random.default_rng(0)
    p = rng.random((50, 7))
    raised = p.copy()
    raised[np.arange(50), rng.integers(7, size=50)] += 0.5 * (1 - p.max(axis=1))
    before, after = (
        aggregate(toy(50).assign(label=0, probability=each.ravel()), fitted)["probability"]
        for each in (p, raised)
    )
    assert (after >= before - 1e-12).all()
    assert (after > before).any()


def test_only_validation_patients_are_fitted_on():
    both = pd.concat([toy(), toy(seed=5, split="test").assign(label=1)], ignore_index=True)
    assert learned(both) == learned(toy())


def test_side_by_side_the_learned_one_is_judged_on_patients_it_has_not_seen():
    table = side_by_side(toy().drop(index=[3]))
    assert table["aggregation"].tolist() == [
        "max", "noisy or", "mean of top 2", "mean of top 3", "logistic, cross-fitted",
    ]  # fmt: skip
    assert (table["incomplete"] == 1).all()
    assert (table["undefined"] == "").all()
    assert not table.isna().any(axis=None)
    noise = toy(60, seed=3)
    noise["probability"] = np.random.default_rng(9).random(len(noise))
    assert side_by_side(noise)["auroc"].iloc[-1] < 0.65


def test_side_by_side_too_few_patients_are_said():
    table = side_by_side(toy(30))
    assert table["auroc"].isna().tolist() == [False] * 4 + [True]
    assert table["undefined"].iloc[-1].startswith(f"A learned aggregation needs {MIN_PATIENTS} patients")


def test_it_survives_json():
    for aggregation in (Aggregation(), Aggregation("top_k", k=2), learned(toy())):
        assert Aggregation(**json.loads(json.dumps(asdict(aggregation)))) == aggregation


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"method": "median"}, "Unknown aggregation 'median'. Choose one of max, noisy_or, top_k, logistic"),
        ({"method": "top_k"}, "top_k takes k, 1 to 7, and only it does; found top_k, k=None"),
        ({"method": "top_k", "k": 8}, "k=8"),
        ({"method": "top_k", "k": 2.0}, "k=2.0"),
        ({"method": "max", "k": 2}, "only it does; found max, k=2"),
        ({"method": "logistic"}, r"make it|Make it with fit_logistic"),
        ({"method": "max", "intercept": 0.0, "weights": (1,) * 7, "fitted_on": {}}, "only it does"),
        ({**asdict(LEARNED), "weights": (1.0,) * 6}, "7 finite weights"),
        ({**asdict(LEARNED), "weights": (-1.0,) * 7}, "none below 0"),
        ({**asdict(LEARNED), "intercept": float("nan")}, "finite"),
    ],
)
def test_other_aggregations_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Aggregation(**fields)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (toy(30), "needs 20 patients with a fracture and 20 without to fit on; found 1[0-9] and 1[0-9]"),
        (toy(split="test"), "no row of the split 'validation'; found 'test'"),
        (toy().assign(probability=1.5), r"no numbers in \[0, 1\]"),
        (toy().assign(probability=np.nan), r"no numbers in \[0, 1\]"),
        (toy().assign(label=2), "neither 0 nor 1"),
        (pd.concat([toy(), toy()]), "repeat StudyInstanceUID and vertebra"),
        (toy().assign(split=["validation", "test"] * 420), "more than one split"),
    ],
)
def test_tables_that_cannot_be_fitted_on_are_refused(table, message):
    with pytest.raises(ValueError, match=message):
        learned(table)


def test_one_class_cannot_be_compared_and_a_penalty_is_a_number():
    with pytest.raises(ValueError, match="All 120 labels are 0"):
        side_by_side(toy().assign(label=0))
    with pytest.raises(ValueError, match="penalty is a finite number"):
        learned(toy(), penalty=float("nan"))


def with_own(table, score):
    """The table with the model's own score of each patient: `score` of its vertebrae (7,), a row a study."""
    studies = table.groupby(UID, sort=False)
    own = (
        studies[["split", "label"]]
        .max()
        .assign(vertebra=PATIENT, probability=studies["probability"].agg(score))
    )
    return pd.concat([table, own.reset_index()[list(table.columns)]], ignore_index=True)


def test_the_models_own_score_is_an_aggregation_and_the_default_where_it_is():
    table = with_own(toy(), "min")
    assert Cases.of(toy()).patients().aggregation == Aggregation("max")
    assert Cases.of(table).patients().aggregation == Aggregation("own")
    own = aggregate(table, Aggregation("own"))
    expected = toy().groupby(UID, sort=False)["probability"].min()
    np.testing.assert_array_equal(own["probability"], expected)
    assert (own["missing"] == 0).all()
    pd.testing.assert_frame_equal(aggregate(table, Aggregation("max")), aggregate(toy(), Aggregation("max")))
    assert learned(table) == learned(toy())
    names = side_by_side(table)["aggregation"].tolist()
    assert names == ["own score", *side_by_side(toy())["aggregation"]]
    assert Aggregation("own").phrase == "the model's own score"
    assert Aggregation("noisy_or").phrase == "the noisy or of the vertebrae"


def test_the_own_score_is_refused_where_it_is_not_and_vertebrae_where_there_are_none():
    with pytest.raises(ValueError, match=r"no patient score of the model's own .*patient_overall"):
        aggregate(toy(), Aggregation("own"))
    table = with_own(toy(), "min")
    alone = table[table["vertebra"] == PATIENT]
    assert len(aggregate(alone, Aggregation("own"))) == 120
    with pytest.raises(ValueError, match="120 patients have no vertebra to make a probability of"):
        aggregate(alone, Aggregation("max"))


def test_a_fracture_of_a_vertebra_that_the_ct_does_not_show_is_the_patients_all_the_same():
    table = pd.concat([patient(0.1, 0.2), patient(0.4).assign(vertebra=PATIENT, label=1)])
    for aggregation in (Aggregation("own"), Aggregation("max")):
        assert aggregate(table, aggregation)["label"].tolist() == [1]


def test_two_scans_of_a_patient_are_never_on_both_sides_of_a_fold():
    once = toy(200)
    table = pd.concat([once, once.assign(**{UID: once[UID] + ".9"})], ignore_index=True)
    table["patient"] = table[UID].str.removesuffix(".9")
    noise = table.assign(probability=np.tile(np.random.default_rng(0).random(len(once)), 2))
    judged = side_by_side(noise).set_index("aggregation")["auroc"]
    apart = side_by_side(noise.drop(columns="patient")).set_index("aggregation")["auroc"]
    assert judged["max"] == apart["max"]
    assert judged["logistic, cross-fitted"] != apart["logistic, cross-fitted"]


def without_rsna(found):
    return found[~found["metric"].str.startswith("rsna")]


def slider(table, level, threshold):
    cases = Cases.of(table)
    shown = OperatingPoints(cases.of_unit(level), cases, weigh(cases, resamples=50))
    return pd.Series(asdict(shown.at(threshold, 0.07)))


VERTEBRA_NUMBERS = {
    "bootstrap": lambda table: without_rsna(bootstrap(Cases.of(table), threshold=0.3, resamples=50)),
    "per_vertebra": lambda table: per_vertebra(Cases.of(table), threshold=0.3, resamples=50),
    "compare": lambda table: without_rsna(
        compare(Cases.of(table), threshold=0.3, other_threshold=0.2, resamples=50)
    ),
    "calibrator": lambda table: pd.Series(fit_calibrator(Cases.of(table), kind="platt").record()),
    "cross-fitted": lambda table: cross_fitted(Cases.of(table), kind="platt").table(),
    "decision": lambda table: pd.Series(choose_decision(table, Rule("max_f1")).record()),
    "of each": lambda table: pd.Series(choose_per_vertebra(table, Rule("max_f1"), min_positives=5).record()),
    "slider": lambda table: slider(table, "all", 0.3),
    "card": lambda table: find(table, {}).vertebrae,
}


@pytest.mark.parametrize("what", VERTEBRA_NUMBERS)
def test_no_number_about_vertebrae_changes_with_the_models_own_patient_score(what):
    table, number = toy(), VERTEBRA_NUMBERS[what]
    own = with_own(table, "min")
    without, beside = number(table), number(own)
    kind = (
        pd.testing.assert_frame_equal if isinstance(without, pd.DataFrame) else pd.testing.assert_series_equal
    )
    kind(beside.reset_index(drop=True), without.reset_index(drop=True))


PATIENT_NUMBERS = {
    "calibration": lambda table: calibration_scores(Cases.of(table, level="patient")),
    "slider": lambda table: slider(table, "patient", 0.16),
    "card": lambda table: find(table, {}).scores["patients"],
}


@pytest.mark.parametrize("what", PATIENT_NUMBERS)
def test_numbers_about_patients_are_those_of_the_own_score_where_it_is(what):
    table, number = toy(), PATIENT_NUMBERS[what]
    own = with_own(table, "median")
    medians = table.assign(probability=table.groupby(UID)["probability"].transform("median"))
    kind = pd.testing.assert_frame_equal if what != "slider" else pd.testing.assert_series_equal
    kind(number(own), number(medians))  # the max of seven equal numbers is that number
    with pytest.raises(AssertionError):
        kind(number(own), number(table))


def test_a_calibrator_of_patients_says_that_it_is_of_the_own_score():
    own = with_own(toy(), "min")
    calibrator = fit_calibrator(Cases.of(own, level="patient"), kind="temperature")
    assert calibrator.aggregation == "own score"
    with pytest.raises(ValueError, match=r"fitted at level 'patient' by 'own score'; these .* by 'max'"):
        apply(calibrator, Cases.of(toy(), level="patient"))


def test_a_patient_decision_takes_the_own_score_where_nothing_is_said_and_keeps_it():
    own = with_own(toy(), "min")
    decision = choose_decision(own, Rule("max_f1", level="patient"))
    assert decision.rule.aggregation == Aggregation("own")
    called = apply_decision(decision, own)
    assert called["probability"].tolist() == own[own["vertebra"] == PATIENT]["probability"].tolist()
    with pytest.raises(ValueError, match="no patient score of the model's own"):
        apply_decision(decision, toy())
    assert Decision.from_record(json.loads(json.dumps(decision.record()))) == decision


def test_cases_are_the_vertebrae_of_one_split_and_the_patients_made_of_them():
    test = with_own(toy(20, split="test"), "min")
    cases = Cases.of(pd.concat([toy(30).iloc[0:0], with_own(toy(30), "max"), test]), split="test")
    assert (len(cases), cases.n_patients, cases.n_studies, cases.level, cases.name) == (
        140, 20, 20, "vertebra", "all",
    )  # fmt: skip
    pd.testing.assert_frame_equal(cases.table(), toy(20, split="test"))
    patients = cases.patients()
    assert (len(patients), patients.aggregation, patients.name) == (20, Aggregation("own"), "patient")
    assert set(patients.unit) == {"patient"}
    expected = test[test["vertebra"] == PATIENT].set_index(UID)
    assert patients.probability.tolist() == expected["probability"].tolist()
    assert patients.label.tolist() == expected["label"].tolist()
    assert patients.study.tolist() == expected.index.tolist()
    highest = cases.patients(Aggregation("max"))
    assert highest.probability.tolist() == toy(20).groupby(UID, sort=False)["probability"].max().tolist()
    again = Cases.of(test, level="patient", aggregation=Aggregation("max"))
    pd.testing.assert_frame_equal(again.table(), highest.table())


def test_cases_of_a_unit():
    cases = Cases.of(toy(20).drop(index=1))
    assert cases.of_unit("all") is cases
    assert cases.of_unit("patient").level == "patient"
    second = cases.of_unit("C2")
    assert (len(second), second.name, second.level, set(second.unit)) == (19, "C2", "vertebra", {"C2"})
    assert len(second.studies) == 20
    assert cases.patients().missing.tolist() == [1] + [0] * 19
    assert np.isnan(cases.wide()).sum() == np.isnan(cases.wide()[0, 1]) == 1
    with pytest.raises(ValueError, match=r"Unknown level 'C8'\. Choose one of all, C1"):
        cases.of_unit("C8")
    with pytest.raises(ValueError, match="no row at level 'C1'"):
        cases.where(cases.unit == "C2").of_unit("C1")
    with pytest.raises(ValueError, match="These cases are patients; 'C2' is of vertebrae"):
        cases.patients().of_unit("C2")
    with pytest.raises(ValueError, match=r"patients are by .*'max'.*, not by .*noisy_or"):
        cases.patients().patients(Aggregation("noisy_or"))


def test_cases_know_whom_a_resample_draws():
    once = toy(5)
    table = pd.concat([once, once.assign(**{UID: once[UID] + ".9"})], ignore_index=True)
    table["patient"] = "p" + table[UID].str.removesuffix(".9")
    cases = Cases.of(table)
    assert (cases.n_patients, cases.n_studies, cases.patients().n_patients) == (5, 10, 5)
    assert cases.patient.tolist() == table["patient"].tolist()
    pd.testing.assert_frame_equal(cases.table(), table)


def test_cases_with_other_probabilities_make_other_patients():
    cases = Cases.of(toy(20))
    assert set(cases.with_probability(0.3).patients().probability) == {0.3}
    with pytest.raises(ValueError, match=r"outside \[0, 1\]"):
        cases.with_probability(1.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "test"}, "no row of the split 'test'; found 'validation'"),
        ({"level": "C2"}, "Unknown level 'C2'. Choose one of vertebra, patient"),
        ({"aggregation": Aggregation("max")}, "An aggregation belongs to the patient level"),
        ({"level": "patient", "aggregation": Aggregation("own")}, "no patient score of the model's own"),
    ],
)
def test_cases_that_are_not_there_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Cases.of(toy(20), **options)


def test_a_table_of_patients_alone_has_cases_at_their_level():
    table = with_own(toy(20), "min")
    alone = table[table["vertebra"] == PATIENT]
    assert len(Cases.of(alone, level="patient")) == 20
    with pytest.raises(ValueError, match="no row of a vertebra, only patients: use level='patient'"):
        Cases.of(alone)
    with pytest.raises(ValueError, match="20 patients have no vertebra to make a probability of"):
        Cases.of(alone, level="patient", aggregation=Aggregation("max"))


def test_defined_levels_need_both_classes():
    table = toy(3).assign(label=0, probability=0.5)
    table.loc[1, "label"] = 1  # C2 of the first
    assert defined_levels(Cases.of(table)) == ["all", "C2", "patient"]
    assert defined_levels(Cases.of(table[table["vertebra"] == "C1"])) == []


def test_share_of_healthy_patients_cleared_falls_with_each_vertebra():
    probabilities = np.full((3, 7), 0.1)
    probabilities[0, 1] = probabilities[0, 5] = probabilities[1, 5] = 0.9
    table = toy(3).assign(label=np.repeat([0, 0, 1], 7), probability=probabilities.ravel())
    found, independent = cleared_by_vertebrae(Cases.of(table), 0.5)  # the fractured patient does not count
    assert found.tolist() == [1, 0.5, 0.5, 0.5, 0.5, 0, 0]
    assert independent.tolist() == [1, 0.5, 0.5, 0.5, 0.5, 0, 0]
    found, _ = cleared_by_vertebrae(Cases.of(table[table["vertebra"] != "C6"]), 0.5)
    assert found.tolist() == [1, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5]
    with pytest.raises(ValueError, match="Every patient has a fracture"):
        cleared_by_vertebrae(Cases.of(table.assign(label=1)), 0.5)


def test_a_vertebra_at_the_threshold_is_an_alarm():
    cases = Cases.of(toy(2).assign(label=0, probability=0.5))
    cleared, independent = cleared_by_vertebrae(cases, 0.5)
    assert cleared.tolist() == independent.tolist() == [0] * 7
    assert cleared_by_vertebrae(cases, np.nextafter(0.5, 1))[0].tolist() == [1] * 7


def test_mixed_splits_are_refused_by_what_needs_one():
    cases = Cases.of(pd.concat([toy(5), toy(5, split="test")]))
    assert cases.where(cases.split == "test").require("test").n_studies == 5
    with pytest.raises(ValueError, match="mix the splits 'test', 'validation'"):
        cases.require()
    with pytest.raises(ValueError, match=r"Only the split 'validation' may be used here; .*'test', 'valid"):
        cases.require("validation")


def test_sums_are_of_each_patient_whatever_the_order_of_the_cases():
    table = toy(4).drop(index=range(7, 14)).sample(frac=1, random_state=0)
    table = pd.concat([table, patient(0.4)])
    cases = Cases.of(table)
    for part in (cases, cases.where(cases.unit == "C1")):
        assert part.sums().tolist() == [(part.patient == name).sum() for name in cases.population]
    both = cases.sums(np.column_stack([cases.label, cases.probability]))
    expected = [table["probability"][table[UID] == name].sum() for name in cases.population]
    np.testing.assert_allclose(both[:, 1], expected)
    assert both[:, 0].tolist() == cases.sums(cases.label).tolist()


@pytest.mark.parametrize(
    "use", [fit_logistic, compare_aggregations, partial(cleared_by_vertebrae, threshold=0.5)]
)
def test_patients_are_never_taken_for_a_vertebra(use):
    with pytest.raises(ValueError, match="These cases are patients; vertebrae are needed"):
        use(Cases.of(cohort()).patients())


def test_patients_are_made_of_all_vertebrae_or_not_at_all():
    cases = Cases.of(cohort())
    for some in (cases.of_unit("C1"), cases.where(cases.unit != "C7")):
        with pytest.raises(ValueError, match="patients are made of all"):
            some.patients()
    for unit in ("all", "C2"):
        with pytest.raises(ValueError, match="These are cases of C1 only"):
            cases.of_unit("C1").of_unit(unit)
    assert cases.of_unit("C1").of_unit("C1").name == "C1"
