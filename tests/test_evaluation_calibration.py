import json

import numpy as np
import pandas as pd
import pytest
from conftest import RSNA, needs_rsna
from simulated import patients_of
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression

from cspine_helpers.evaluation import calibration
from cspine_helpers.evaluation.calibration import choose_calibrator, cross_fitted
from cspine_helpers.evaluation.cases import Aggregation, Cases
from cspine_helpers.evaluation.reliability import calibration_scores
from cspine_helpers.labels import UID, VERTEBRAE, read_labels
from cspine_helpers.metrics import auroc, log_losses
from cspine_helpers.predictions import from_wide

KINDS = ("temperature", "platt", "isotonic")


def made(patients=300, *, seed=0, split="validation", slope=0.5, intercept=-1.0):
    """Predictions whose true log odds are slope · logit(score) + intercept."""
    rng = np.random.default_rng(seed)
    logit = rng.normal(-1, 1.5, patients * 7)
    truth = 1 / (1 + np.exp(-(slope * logit + intercept)))
    rows = [(f"1.{study}", name, split) for study in range(patients) for name in VERTEBRAE]
    table = pd.DataFrame(rows, columns=[UID, "vertebra", "split"])
    label = (rng.random(len(table)) < truth).astype(int)
    return table.assign(label=label, probability=1 / (1 + np.exp(-logit)))


def logit(p):
    return np.log(p / (1 - p))


@pytest.fixture(scope="module")
def table():
    return made()


@pytest.fixture(scope="module")
def cases(table):
    return Cases.of(table)


def fitted(table, kind, level="vertebra"):
    return calibration.fit_calibrator(Cases.of(table, level=level), kind=kind)


@pytest.fixture(scope="module")
def halves():
    """The real predictions of vertebrae, patients dealt into two halves."""
    wide = pd.read_csv(RSNA / "oof_predictions.csv", dtype={"uid": str}).drop(columns="Overall")
    labels = read_labels(RSNA / "train.csv")
    dealt = np.random.default_rng(0).permutation(len(labels)) % 2
    split = labels[[UID]].assign(split=np.where(dealt == 0, "validation", "test"))
    table = from_wide(wide, labels, split, missing="drop")
    return Cases.of(table, split="validation"), Cases.of(table, split="test")


def test_platt_and_temperature_are_logistic_regressions_without_penalty(table):
    x, y = logit(table["probability"].to_numpy())[:, None], table["label"]
    platt = fitted(table, "platt")
    oracle = LogisticRegression(C=np.inf, tol=1e-10, max_iter=1000).fit(x, y)
    assert platt.slope == pytest.approx(oracle.coef_[0, 0], rel=1e-5)
    assert platt.intercept == pytest.approx(oracle.intercept_[0], rel=1e-5)
    found = calibration.apply(platt, Cases.of(table)).probability
    np.testing.assert_allclose(found, oracle.predict_proba(x)[:, 1], atol=1e-6)
    temperature = fitted(table, "temperature")
    oracle = LogisticRegression(C=np.inf, tol=1e-10, max_iter=1000, fit_intercept=False).fit(x, y)
    assert temperature.slope == pytest.approx(oracle.coef_[0, 0], rel=1e-5)
    assert temperature.intercept == 0


def test_platt_finds_the_slope_and_intercept_that_made_the_labels():
    found = fitted(made(20_000), "platt")
    assert (found.slope, found.intercept) == pytest.approx((0.5, -1.0), abs=0.03)


def test_isotonic_is_that_of_scikit_learn_but_for_certain_steps(table):
    found = fitted(table, "isotonic")
    oracle = IsotonicRegression(y_min=0, y_max=1).fit(table["probability"], table["label"])
    assert found.scores == tuple(oracle.X_thresholds_.tolist())
    expected, values = oracle.y_thresholds_, np.array(found.probabilities)
    inner = (expected > 0) & (expected < 1)
    np.testing.assert_array_equal(values[inner], expected[inner])
    assert 0 < values.min() <= values.max() < 1
    scores = np.linspace(0, 1, 500)
    inside = (scores > np.array(found.scores)[inner].min()) & (scores < np.array(found.scores)[inner].max())
    mapped = calibration.calibrated(found, scores)
    np.testing.assert_allclose(
        mapped[inside], oracle.predict(scores[inside].clip(*found.scores[:: len(found.scores) - 1]))
    )


def test_a_certain_step_of_isotonic_follows_the_rule_of_succession():
    y = np.array([0] * 60 + [0, 1] * 30 + [1] * 80)
    p = np.repeat([0.1, 0.5, 0.9], [60, 60, 80])
    found = calibration.fit_calibrator(patients_of(p, y), kind="isotonic")
    assert found.scores == (0.1, 0.5, 0.9)
    assert found.probabilities == pytest.approx((1 / 62, 0.5, 81 / 82))
    few = calibration._isotonic(np.array([0, 0, 0, 1] + [0] * 9), np.array([0.1] + [0.4] * 12))
    assert few[1] == pytest.approx((1 / 12, 1 / 12))  # not 1 / 3, which would lie above its neighbour


@pytest.mark.parametrize("kind", KINDS)
def test_a_calibrator_keeps_the_order_of_the_scores(table, kind):
    found = fitted(table, kind)
    mapped = calibration.calibrated(found, np.linspace(0, 1, 301))
    assert (np.diff(mapped) >= 0).all()
    assert ((mapped >= 0) & (mapped <= 1)).all()


@pytest.mark.parametrize("kind", KINDS)
def test_apply_changes_the_probabilities_of_all_splits_and_nothing_else(table, kind):
    found = fitted(table, kind)
    both = pd.concat([table, made(40, seed=1, split="test").assign(**{UID: lambda t: "2." + t[UID]})])
    after = calibration.apply(found, Cases.of(both)).table()
    rest = [UID, "vertebra", "split", "label"]
    pd.testing.assert_frame_equal(after[rest], both[rest].reset_index(drop=True))
    np.testing.assert_array_equal(after["probability"], calibration.calibrated(found, both["probability"]))


@pytest.mark.parametrize("kind", KINDS)
def test_a_record_of_plain_numbers_brings_the_calibrator_back(table, kind):
    found = fitted(table, kind)
    record = json.loads(json.dumps(found.record()))
    assert record == found.record()
    again = calibration.Calibrator.from_record(record)
    assert again == found
    assert hash(again) == hash(found)


def test_a_calibrator_says_what_it_was_fitted_on(cases):
    found = calibration.fit_calibrator(cases, kind="platt")
    assert (found.level, found.patients, found.cases) == ("all", 300, 2100)
    assert found.prevalence == cases.label.mean()
    single = calibration.fit_calibrator(cases.of_unit("C2"), kind="platt")
    assert (single.level, single.cases, single.aggregation) == ("C2", 300, "")
    patients = calibration.fit_calibrator(cases.patients(), kind="platt")
    assert (patients.level, patients.cases, patients.aggregation) == ("patient", 300, "max")


def test_levels_and_aggregations_are_never_mixed(cases):
    vertebrae, by_max = (calibration.fit_calibrator(each, kind="platt") for each in (cases, cases.patients()))
    with pytest.raises(ValueError, match=r"fitted at level 'all'; these .* 'patient' by 'max'"):
        calibration.apply(vertebrae, cases.patients())
    with pytest.raises(ValueError, match=r"fitted at level 'all'; these cases are at level 'C2'"):
        calibration.apply(vertebrae, cases.of_unit("C2"))
    with pytest.raises(ValueError, match=r"level 'patient' by 'max'; .* level 'patient' by 'noisy or'"):
        calibration.apply(by_max, cases.patients(Aggregation("noisy_or")))
    assert calibration.apply(by_max, cases.patients()).aggregation == Aggregation("max")


@pytest.mark.parametrize("kind", KINDS)
def test_only_validation_may_fit(table, kind):
    with pytest.raises(ValueError, match=r"Only the split 'validation' .* are of 'test'"):
        fitted(table.assign(split="test"), kind)
    mixed = table.assign(split=np.where(table[UID] == "1.7", "train", "validation"))
    with pytest.raises(ValueError, match=r"of 'train', 'validation'\. Pass Cases\.of"):
        fitted(mixed, kind)


@pytest.mark.parametrize(
    ("kind", "simpler"), [("isotonic", "temperature or platt or"), ("platt", "temperature or")]
)
def test_too_few_patients_of_a_class_are_refused_with_their_counts(table, kind, simpler):
    fractured = table[UID].isin([f"1.{n}" for n in range(15 if kind == "platt" else 45)])
    few = table.assign(label=(fractured & (table["vertebra"] == "C7")).astype(int))
    least, found = calibration.LEAST_PATIENTS[kind], fractured.sum() // 7
    message = (
        f"{kind} needs {least} patients with a fractured vertebra and {least} with an intact one; "
        f"found {found} and 300 of 300 patients"
    )
    message += f".*{simpler} more"
    with pytest.raises(ValueError, match=message):
        fitted(few, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_as_many_patients_as_are_needed_suffice_and_one_fewer_does_not(kind):
    least = calibration.LEAST_PATIENTS[kind]

    def of(fractured, intact):
        scores = np.random.default_rng(0).beta(np.repeat([3, 2], [fractured, intact]), 2)
        uids = [f"1.{patient}" for patient in range(fractured + intact)]
        rows = {UID: uids, "vertebra": "C1", "split": "validation", "probability": scores}
        return pd.DataFrame(rows).assign(label=np.repeat([1, 0], [fractured, intact]))

    assert fitted(of(least, least), kind).positives == least
    for counts in ((least - 1, least), (least, least - 1)):
        with pytest.raises(ValueError, match=f"found {counts[0]} and {counts[1]}"):
            fitted(of(*counts), kind)


def of_scores(fractured, intact):
    """A predictions table of patients with one vertebra each."""
    scores = np.concatenate([fractured, intact])
    rows = {UID: [f"1.{n}" for n in range(len(scores))], "vertebra": "C1", "split": "validation"}
    labels = np.repeat([1, 0], [len(fractured), len(intact)])
    return pd.DataFrame(rows).assign(label=labels, probability=scores)


def test_classes_that_touch_in_one_score_have_no_best_fit_either_way_round():
    low, high = np.linspace(0.1, 0.4, 25), np.linspace(0.4, 0.8, 25)
    for fractured, intact in ((high, low), (low, high)):
        with pytest.raises(ValueError, match="platt has no best fit: a score parts"):
            fitted(of_scores(fractured, intact), "platt")
    overlapping = of_scores(np.append(high, 0.39), low)
    assert fitted(overlapping, "platt").slope > 0
    low, high = np.linspace(0.1, 0.5, 25), np.linspace(0.5, 0.8, 25)
    for fractured, intact in ((high, low), (low, high)):
        with pytest.raises(ValueError, match=r"temperature has no best fit: 0\.5 parts"):
            fitted(of_scores(fractured, intact), "temperature")


def test_the_fit_is_found_where_whole_newton_steps_run_away():
    def scores(*groups):
        return np.concatenate([np.full(many, 1 / (1 + np.exp(-at))) for many, at in groups])

    table = of_scores(scores((1, 0.59), (45, 7.43), (1, -6.93)), scores((82, -6.93), (1241, 5.25)))
    x, y = logit(table["probability"].to_numpy())[:, None], table["label"]
    oracle = LogisticRegression(C=np.inf, tol=1e-12, max_iter=10_000, solver="newton-cholesky").fit(x, y)
    found = fitted(table, "platt")
    assert (found.slope, found.intercept) == pytest.approx(
        (oracle.coef_[0, 0], oracle.intercept_[0]), rel=1e-4
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("label", [0, 1])
def test_one_class_alone_is_refused(table, kind, label):
    with pytest.raises(ValueError, match="found 0 and 300" if label == 0 else "found 300 and 0"):
        fitted(table.assign(label=label), kind)


@pytest.mark.parametrize("cut", [0.2, 0.5])
def test_scores_that_part_the_classes_have_no_best_fit(table, cut):
    parted = table.assign(label=(table["probability"] >= cut).astype(int))
    with pytest.raises(ValueError, match=r"platt has no best fit: a score parts all .* fractured from all"):
        fitted(parted, "platt")
    isotonic = fitted(parted, "isotonic")
    mapped = calibration.calibrated(isotonic, parted["probability"])
    assert log_losses(parted["label"], mapped).mean() < 0.01
    if cut == 0.5:
        with pytest.raises(ValueError, match=r"temperature has no best fit: 0\.5 parts all"):
            fitted(parted, "temperature")
    else:
        assert fitted(parted, "temperature").slope > 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_ranking_the_wrong_way_round_is_refused(table, kind):
    turned = table.assign(label=(table["probability"] < 0.5).astype(int) ^ (np.arange(len(table)) % 10 == 0))
    with pytest.raises(ValueError, match="Higher scores do not go with more fractures"):
        fitted(turned, kind)


def test_equal_scores_are_refused(table):
    with pytest.raises(ValueError, match="platt has no best fit"):
        fitted(table.assign(probability=0.3), "platt")
    with pytest.raises(ValueError, match="Higher scores do not go with more fractures"):
        fitted(table.assign(probability=0.3), "isotonic")


def test_scores_of_0_and_1_are_taken_for_nearly_so(table):
    certain = table.assign(probability=table["probability"].round(1))
    found = fitted(certain, "platt")
    assert np.isfinite([found.slope, found.intercept]).all()
    assert calibration.calibrated(found, [0.0, 1.0])[0] > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "beta"}, "Unknown kind 'beta'. Choose one of temperature, platt, isotonic"),
        ({"level": "C8"}, "Unknown level 'C8'"),
        ({"level": "patient"}, "has an aggregation at level 'patient' and only there; found ''"),
        ({"aggregation": "max"}, "only there; found 'max' at level 'all'"),
        ({"slope": 0.0}, "slope above 0"),
        ({"intercept": float("nan")}, "both finite"),
        ({"kind": "isotonic"}, "found 0 and 0"),
        ({"kind": "isotonic", "scores": [0.1, 0.1], "probabilities": [0.1, 0.2]}, "scores rising"),
        ({"kind": "isotonic", "scores": [0.1, 0.2], "probabilities": [0.2, 0.1]}, "never falling"),
        ({"kind": "isotonic", "scores": [0.1, 0.2], "probabilities": [0.2, 1.1]}, r"falling in \[0, 1\]"),
        ({"offset": 1.0}, "missing or unknown: 'offset'"),
    ],
)
def test_records_that_no_fit_gives_are_refused(table, change, message):
    record = fitted(table, "platt").record()
    with pytest.raises(ValueError, match=message):
        calibration.Calibrator.from_record(record | change)


def test_a_record_that_lacks_a_field_is_refused(table):
    record = fitted(table, "platt").record()
    del record["level"]
    with pytest.raises(ValueError, match="missing or unknown: 'level'"):
        calibration.Calibrator.from_record(record)


def test_unknown_kinds_and_scores_out_of_range_are_refused(table):
    with pytest.raises(ValueError, match="Unknown kind 'beta'"):
        fitted(table, "beta")
    found = fitted(table, "platt")
    with pytest.raises(ValueError, match=r"outside \[0, 1\]"):
        calibration.calibrated(found, [0.2, 1.2])


@pytest.mark.parametrize("level", ["all", "patient"])
def test_cross_fitting_calibrates_each_patient_by_others_only(level):
    cases = Cases.of(made(60, slope=1.0, intercept=-2.0)).of_unit(level)
    found = cross_fitted(cases, kind="temperature", folds=60)  # a fold for each patient
    whole = calibration.apply(calibration.fit_calibrator(cases, kind="temperature"), cases)
    assert (found.label == cases.label).all()
    assert (found.study == cases.study).all()
    for uid in ("1.0", "1.31"):
        one = cases.study == uid
        others = calibration.fit_calibrator(cases.where(~one), kind="temperature")
        expected = calibration.apply(others, cases.where(one)).probability
        np.testing.assert_array_equal(found.probability[one], expected)
        assert (found.probability != whole.probability)[one].all()


def test_cross_fitting_deals_fractured_and_intact_patients_evenly(cases):
    p = cases.patients().probability
    few, enough = (patients_of(p, (np.arange(len(p)) < many).astype(int)) for many in (60, 75))
    found = cross_fitted(enough, kind="isotonic")  # 60 of the fractured stay in each fold of five
    assert len(found) == len(enough)
    with pytest.raises(ValueError, match=r"With 1 of 5 parts of the patients held out.*found 48 and"):
        cross_fitted(few, kind="isotonic")


def test_cross_fitting_refuses_what_fitting_refuses_and_less_than_two_folds(table, cases):
    with pytest.raises(ValueError, match="Only the split 'validation'"):
        cross_fitted(Cases.of(table.assign(split="test")), kind="platt")
    with pytest.raises(
        ValueError, match=r"^platt needs 20 patients with a fractured vertebra .* found 0 and 300"
    ):
        cross_fitted(Cases.of(table.assign(label=0)), kind="platt")
    with pytest.raises(ValueError, match=r"2 folds or more.*found 1"):
        cross_fitted(cases, kind="platt", folds=1)
    with pytest.raises(ValueError, match=f"found 999 folds for {cases.n_patients} patients"):
        cross_fitted(cases, kind="platt", folds=999)


@needs_rsna
@pytest.mark.parametrize("level", ["all", "patient"])
@pytest.mark.parametrize("kind", KINDS)
def test_calibrating_on_half_of_the_real_patients_mends_the_other_half(halves, kind, level):
    validation, held_out = (half.of_unit(level) for half in halves)
    after = calibration.apply(calibration.fit_calibrator(validation, kind=kind), held_out)
    before, now = (
        calibration_scores(each, resamples=1).set_index("score")["value"] for each in (held_out, after)
    )
    assert now["log_loss"] < before["log_loss"]
    assert now["brier"] < before["brier"]
    if kind != "temperature":  # which cannot shift
        assert now["ece"] < 0.6 * before["ece"]
        assert abs(now["bias"]) < 0.6 * abs(before["bias"])


@needs_rsna
def test_the_highest_of_calibrated_vertebrae_is_no_calibrated_patient(halves):
    validation, held_out = halves
    highest = calibration.apply(calibration.fit_calibrator(validation, kind="platt"), held_out).patients()
    patients = calibration.apply(
        calibration.fit_calibrator(validation.patients(), kind="platt"), held_out.patients()
    )
    ece = [
        calibration_scores(each, resamples=1).set_index("score").loc["ece", "value"]
        for each in (highest, patients)
    ]
    assert ece[1] < 0.25 * ece[0]
    areas = [auroc(each.label, each.probability) for each in (highest, patients)]
    assert areas[0] == pytest.approx(areas[1], abs=1e-12)  # the ranking is the same


@pytest.mark.parametrize("aggregation", [None, Aggregation("noisy_or")], ids=["vertebrae", "patients"])
def test_the_calibrator_of_the_lowest_cross_fitted_log_loss_is_chosen_and_fitted_on_all(aggregation):
    cases = Cases.of(made(400))
    cases = cases.patients(aggregation) if aggregation else cases
    losses = {"as predicted": log_losses(cases.label, cases.probability).mean()}
    for kind in KINDS:
        losses[kind] = log_losses(cases.label, cross_fitted(cases, kind=kind).probability).mean()
    chosen, scores = choose_calibrator(cases)
    assert dict(zip(scores["kind"], scores["log_loss"], strict=True)) == pytest.approx(losses)
    assert (scores["refused"] == "").all()
    assert chosen == calibration.fit_calibrator(cases, kind=min(losses, key=losses.get))
    after = calibration.calibrated(chosen, cases.probability)
    assert log_losses(cases.label, after).mean() < losses["as predicted"]


def test_where_no_kind_helps_the_probabilities_stay_as_predicted():
    chosen, scores = choose_calibrator(Cases.of(made(patients=60, slope=1.0, intercept=0.0)))
    assert chosen is None
    assert scores["kind"][scores["log_loss"].idxmin()] == "as predicted"
    few = made(patients=25)
    chosen, scores = choose_calibrator(Cases.of(few, level="patient"))
    refused = scores.set_index("kind")["refused"]
    assert refused["isotonic"].startswith("isotonic needs 50 fractured patients and 50 intact ones; found ")
    few["label"] = few["vertebra"].eq("C1") & few[UID].isin(few[UID].unique()[:13])
    _, scores = choose_calibrator(Cases.of(few.astype({"label": int})))
    assert scores.set_index("kind")["refused"]["isotonic"].startswith(
        "isotonic needs 50 patients with a fractured vertebra and 50 with an intact one; found 13 and 25 of "
        "25 patients"
    )
    assert np.isnan(scores.set_index("kind")["log_loss"]["isotonic"])
