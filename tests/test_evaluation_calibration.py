import json

import numpy as np
import pandas as pd
import pytest
from conftest import RSNA, needs_rsna
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression

from cspine_helpers.evaluation import calibration
from cspine_helpers.evaluation.calibration import choose_calibrator, cross_fitted
from cspine_helpers.evaluation.cases import Aggregation, aggregate, patient_level
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


@pytest.fixture
def table():
    return made()


@pytest.fixture(scope="module")
def halves():
    """The real predictions of vertebrae, patients dealt into two halves."""
    wide = pd.read_csv(RSNA / "oof_predictions.csv", dtype={"uid": str}).drop(columns="Overall")
    labels = read_labels(RSNA / "train.csv")
    dealt = np.random.default_rng(0).permutation(len(labels)) % 2
    split = labels[[UID]].assign(split=np.where(dealt == 0, "validation", "test"))
    table = from_wide(wide, labels, split, missing="drop")
    return table[table["split"] == "validation"], table[table["split"] == "test"]


def test_platt_and_temperature_are_logistic_regressions_without_penalty(table):
    x, y = logit(table["probability"].to_numpy())[:, None], table["label"]
    platt = calibration.fit_calibrator(table, kind="platt")
    oracle = LogisticRegression(C=np.inf, tol=1e-10, max_iter=1000).fit(x, y)
    assert platt.slope == pytest.approx(oracle.coef_[0, 0], rel=1e-5)
    assert platt.intercept == pytest.approx(oracle.intercept_[0], rel=1e-5)
    found = calibration.apply(platt, table)["probability"]
    np.testing.assert_allclose(found, oracle.predict_proba(x)[:, 1], atol=1e-6)
    temperature = calibration.fit_calibrator(table, kind="temperature")
    oracle = LogisticRegression(C=np.inf, tol=1e-10, max_iter=1000, fit_intercept=False).fit(x, y)
    assert temperature.slope == pytest.approx(oracle.coef_[0, 0], rel=1e-5)
    assert temperature.intercept == 0


def test_platt_finds_the_slope_and_intercept_that_made_the_labels():
    found = calibration.fit_calibrator(made(20_000), kind="platt")
    assert (found.slope, found.intercept) == pytest.approx((0.5, -1.0), abs=0.03)


def test_isotonic_is_that_of_scikit_learn_but_for_certain_steps(table):
    found = calibration.fit_calibrator(table, kind="isotonic")
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
    uids = [f"1.{n}" for n in range(len(y))]
    rows = pd.DataFrame({UID: uids, "split": "validation", "label": y, "probability": p})
    found = calibration.fit_calibrator(rows, kind="isotonic", level="patient", aggregation="max")
    assert found.scores == (0.1, 0.5, 0.9)
    assert found.probabilities == pytest.approx((1 / 62, 0.5, 81 / 82))
    few = calibration._isotonic(np.array([0, 0, 0, 1] + [0] * 9), np.array([0.1] + [0.4] * 12))
    assert few[1] == pytest.approx((1 / 12, 1 / 12))  # not 1 / 3, which would lie above its neighbour


@pytest.mark.parametrize("kind", KINDS)
def test_a_calibrator_keeps_the_order_of_the_scores(table, kind):
    found = calibration.fit_calibrator(table, kind=kind)
    mapped = calibration.calibrated(found, np.linspace(0, 1, 301))
    assert (np.diff(mapped) >= 0).all()
    assert ((mapped >= 0) & (mapped <= 1)).all()


@pytest.mark.parametrize("kind", KINDS)
def test_apply_changes_the_probabilities_of_all_splits_and_nothing_else(table, kind):
    found = calibration.fit_calibrator(table, kind=kind)
    both = pd.concat([table, made(40, seed=1, split="test").assign(**{UID: lambda t: "2." + t[UID]})])
    after = calibration.apply(found, both)
    rest = [UID, "vertebra", "split", "label"]
    pd.testing.assert_frame_equal(after[rest], both[rest].reset_index(drop=True))
    np.testing.assert_array_equal(after["probability"], calibration.calibrated(found, both["probability"]))


@pytest.mark.parametrize("kind", KINDS)
def test_a_record_of_plain_numbers_brings_the_calibrator_back(table, kind):
    found = calibration.fit_calibrator(table, kind=kind)
    record = json.loads(json.dumps(found.record()))
    assert record == found.record()
    again = calibration.Calibrator.from_record(record)
    assert again == found
    assert hash(again) == hash(found)
    pd.testing.assert_frame_equal(calibration.apply(again, table), calibration.apply(found, table))


def test_a_calibrator_says_what_it_was_fitted_on(table):
    found = calibration.fit_calibrator(table, kind="platt")
    assert (found.level, found.patients, found.cases) == ("all", 300, 2100)
    assert found.prevalence == table["label"].mean()
    single = calibration.fit_calibrator(table, kind="platt", level="C2")
    assert (single.level, single.cases, single.aggregation) == ("C2", 300, "")
    patients = calibration.fit_calibrator(table, kind="platt", level="patient")
    assert (patients.level, patients.cases, patients.aggregation) == ("patient", 300, "max")


def test_levels_and_aggregations_are_never_mixed(table):
    vertebrae = calibration.fit_calibrator(table, kind="platt")
    patients = patient_level(table)
    with pytest.raises(ValueError, match=r"'all' is one of vertebrae.*its rows are patients"):
        calibration.apply(vertebrae, patients, aggregation="max")
    by_max = calibration.fit_calibrator(table, kind="platt", level="patient")
    expected = calibration.fit_calibrator(patients, kind="platt", level="patient", aggregation="max")
    assert by_max == expected
    after = calibration.apply(by_max, table)
    assert list(after) == [UID, "split", "label", "probability"]
    pd.testing.assert_frame_equal(calibration.apply(by_max, patients, aggregation="max"), after)
    with pytest.raises(ValueError, match="made by 'max'; these are made by 'noisy or'"):
        calibration.apply(by_max, patients, aggregation="noisy or")
    with pytest.raises(ValueError, match="found None with a table of patients"):
        calibration.apply(by_max, patients)
    with pytest.raises(ValueError, match="found None with a table of patients"):
        calibration.fit_calibrator(patients, kind="platt", level="patient")
    with pytest.raises(ValueError, match="found 'max' with a table of vertebrae"):
        calibration.fit_calibrator(table, kind="platt", aggregation="max")


@pytest.mark.parametrize("kind", KINDS)
def test_only_validation_may_fit(table, kind):
    with pytest.raises(ValueError, match=r"fitted on validation only.*rows of 'test'"):
        calibration.fit_calibrator(table.assign(split="test"), kind=kind)
    mixed = table.assign(split=np.where(table[UID] == "1.7", "train", "validation"))
    with pytest.raises(ValueError, match=r"rows of 'train'\. Pass predictions"):
        calibration.fit_calibrator(mixed, kind=kind)


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
        calibration.fit_calibrator(few, kind=kind)


@pytest.mark.parametrize("kind", KINDS)
def test_as_many_patients_as_are_needed_suffice_and_one_fewer_does_not(kind):
    least = calibration.LEAST_PATIENTS[kind]

    def of(fractured, intact):
        scores = np.random.default_rng(0).beta(np.repeat([3, 2], [fractured, intact]), 2)
        uids = [f"1.{patient}" for patient in range(fractured + intact)]
        rows = {UID: uids, "vertebra": "C1", "split": "validation", "probability": scores}
        return pd.DataFrame(rows).assign(label=np.repeat([1, 0], [fractured, intact]))

    assert calibration.fit_calibrator(of(least, least), kind=kind).positives == least
    for counts in ((least - 1, least), (least, least - 1)):
        with pytest.raises(ValueError, match=f"found {counts[0]} and {counts[1]}"):
            calibration.fit_calibrator(of(*counts), kind=kind)


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
            calibration.fit_calibrator(of_scores(fractured, intact), kind="platt")
    overlapping = of_scores(np.append(high, 0.39), low)
    assert calibration.fit_calibrator(overlapping, kind="platt").slope > 0
    low, high = np.linspace(0.1, 0.5, 25), np.linspace(0.5, 0.8, 25)
    for fractured, intact in ((high, low), (low, high)):
        with pytest.raises(ValueError, match=r"temperature has no best fit: 0\.5 parts"):
            calibration.fit_calibrator(of_scores(fractured, intact), kind="temperature")


def test_the_fit_is_found_where_whole_newton_steps_run_away():
    def scores(*groups):
        return np.concatenate([np.full(many, 1 / (1 + np.exp(-at))) for many, at in groups])

    table = of_scores(scores((1, 0.59), (45, 7.43), (1, -6.93)), scores((82, -6.93), (1241, 5.25)))
    x, y = logit(table["probability"].to_numpy())[:, None], table["label"]
    oracle = LogisticRegression(C=np.inf, tol=1e-12, max_iter=10_000, solver="newton-cholesky").fit(x, y)
    found = calibration.fit_calibrator(table, kind="platt")
    assert (found.slope, found.intercept) == pytest.approx(
        (oracle.coef_[0, 0], oracle.intercept_[0]), rel=1e-4
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("label", [0, 1])
def test_one_class_alone_is_refused(table, kind, label):
    with pytest.raises(ValueError, match="found 0 and 300" if label == 0 else "found 300 and 0"):
        calibration.fit_calibrator(table.assign(label=label), kind=kind)


@pytest.mark.parametrize("cut", [0.2, 0.5])
def test_scores_that_part_the_classes_have_no_best_fit(table, cut):
    parted = table.assign(label=(table["probability"] >= cut).astype(int))
    with pytest.raises(ValueError, match=r"platt has no best fit: a score parts all .* fractured from all"):
        calibration.fit_calibrator(parted, kind="platt")
    isotonic = calibration.fit_calibrator(parted, kind="isotonic")
    mapped = calibration.calibrated(isotonic, parted["probability"])
    assert log_losses(parted["label"], mapped).mean() < 0.01
    if cut == 0.5:
        with pytest.raises(ValueError, match=r"temperature has no best fit: 0\.5 parts all"):
            calibration.fit_calibrator(parted, kind="temperature")
    else:
        assert calibration.fit_calibrator(parted, kind="temperature").slope > 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_ranking_the_wrong_way_round_is_refused(table, kind):
    turned = table.assign(label=(table["probability"] < 0.5).astype(int) ^ (np.arange(len(table)) % 10 == 0))
    with pytest.raises(ValueError, match="Higher scores do not go with more fractures"):
        calibration.fit_calibrator(turned, kind=kind)


def test_equal_scores_are_refused(table):
    with pytest.raises(ValueError, match="platt has no best fit"):
        calibration.fit_calibrator(table.assign(probability=0.3), kind="platt")
    with pytest.raises(ValueError, match="Higher scores do not go with more fractures"):
        calibration.fit_calibrator(table.assign(probability=0.3), kind="isotonic")


def test_scores_of_0_and_1_are_taken_for_nearly_so(table):
    certain = table.assign(probability=table["probability"].round(1))
    found = calibration.fit_calibrator(certain, kind="platt")
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
    record = calibration.fit_calibrator(table, kind="platt").record()
    with pytest.raises(ValueError, match=message):
        calibration.Calibrator.from_record(record | change)


def test_a_record_that_lacks_a_field_is_refused(table):
    record = calibration.fit_calibrator(table, kind="platt").record()
    del record["level"]
    with pytest.raises(ValueError, match="missing or unknown: 'level'"):
        calibration.Calibrator.from_record(record)


def test_unknown_kinds_and_scores_out_of_range_are_refused(table):
    with pytest.raises(ValueError, match="Unknown kind 'beta'"):
        calibration.fit_calibrator(table, kind="beta")
    found = calibration.fit_calibrator(table, kind="platt")
    with pytest.raises(ValueError, match=r"outside \[0, 1\]"):
        calibration.calibrated(found, [0.2, 1.2])


@pytest.mark.parametrize("level", [pytest.param("all", marks=pytest.mark.slow), "patient"])
def test_cross_fitting_calibrates_each_patient_by_others_only(level):
    table = made(120, slope=1.0, intercept=-2.0)
    found = cross_fitted(table, kind="platt", level=level, folds=120)  # a fold for each patient
    whole = calibration.apply(calibration.fit_calibrator(table, kind="platt", level=level), table)
    pd.testing.assert_frame_equal(found.drop(columns="probability"), whole.drop(columns="probability"))
    for uid in ("1.0", "1.31"):
        one = table[UID] == uid
        others = calibration.fit_calibrator(table[~one], kind="platt", level=level)
        expected = calibration.apply(others, table[one])["probability"]
        np.testing.assert_array_equal(found["probability"][found[UID] == uid], expected)
        assert (found["probability"] != whole["probability"])[found[UID] == uid].all()


def test_cross_fitting_deals_fractured_and_intact_patients_evenly(table):
    patients = patient_level(table)
    label = (np.arange(len(patients)) < 75).astype(int)
    rows = patients.assign(label=label)  # 60 of the fractured stay in each fold of five, enough for isotonic
    found = cross_fitted(rows, kind="isotonic", level="patient", aggregation="max")
    assert len(found) == len(rows)
    with pytest.raises(ValueError, match=r"With 1 of 5 parts of the patients held out.*found 48 and"):
        cross_fitted(
            rows.assign(label=(np.arange(len(rows)) < 60).astype(int)),
            kind="isotonic",
            level="patient",
            aggregation="max",
        )


def test_cross_fitting_refuses_what_fitting_refuses_and_less_than_two_folds(table):
    with pytest.raises(ValueError, match="fitted on validation only"):
        cross_fitted(table.assign(split="test"), kind="platt")
    with pytest.raises(
        ValueError, match=r"^platt needs 20 patients with a fractured vertebra .* found 0 and 300"
    ):
        cross_fitted(table.assign(label=0), kind="platt")
    with pytest.raises(ValueError, match=r"2 folds or more.*found 1"):
        cross_fitted(table, kind="platt", folds=1)


@needs_rsna
@pytest.mark.parametrize("level", ["all", "patient"])
@pytest.mark.parametrize("kind", KINDS)
def test_calibrating_on_half_of_the_real_patients_mends_the_other_half(halves, kind, level):
    fitted, held_out = halves
    found = calibration.fit_calibrator(fitted, kind=kind, level=level)
    after = calibration.apply(found, held_out)
    before, now = (
        calibration_scores(table, level=level, resamples=1).set_index("score")["value"]
        for table in (held_out, after)
    )
    assert now["log_loss"] < before["log_loss"]
    assert now["brier"] < before["brier"]
    if kind != "temperature":  # which cannot shift
        assert now["ece"] < 0.6 * before["ece"]
        assert abs(now["bias"]) < 0.6 * abs(before["bias"])


@needs_rsna
def test_the_highest_of_calibrated_vertebrae_is_no_calibrated_patient(halves):
    fitted, held_out = halves
    vertebrae = calibration.apply(calibration.fit_calibrator(fitted, kind="platt"), held_out)
    patients = calibration.apply(calibration.fit_calibrator(fitted, kind="platt", level="patient"), held_out)
    ece = [
        calibration_scores(t, level="patient", resamples=1).set_index("score").loc["ece", "value"]
        for t in (vertebrae, patients)
    ]
    assert ece[1] < 0.25 * ece[0]
    areas = [auroc(t["label"], t["probability"]) for t in (patient_level(vertebrae), patients)]
    assert areas[0] == pytest.approx(areas[1], abs=1e-12)  # the ranking is the same


def test_the_calibrator_of_the_lowest_cross_fitted_log_loss_is_chosen_and_fitted_on_all():
    table = made(400)
    noisy_or = Aggregation("noisy_or")
    whole = pd.concat([table, made(seed=3, split="test").assign(**{UID: lambda rows: "9." + rows[UID]})])
    for level, by in (("vertebra", None), ("patient", noisy_or)):
        rows = table if by is None else aggregate(table, by)
        options = {} if by is None else {"level": "patient", "aggregation": "noisy or"}
        losses = {"as predicted": log_losses(rows["label"], rows["probability"]).mean()}
        for kind in ("temperature", "platt", "isotonic"):
            found = cross_fitted(rows, kind=kind, **options)
            losses[kind] = log_losses(found["label"], found["probability"]).mean()
        chosen, scores = choose_calibrator(whole, level=level, aggregation=by)
        assert dict(zip(scores["kind"], scores["log_loss"], strict=True)) == pytest.approx(losses)
        assert (scores["refused"] == "").all()
        best = min(losses, key=losses.get)
        assert chosen == calibration.fit_calibrator(rows, kind=best, **options)
        assert (
            log_losses(rows["label"], calibration.calibrated(chosen, rows["probability"])).mean()
            < (losses["as predicted"])
        )


def test_where_no_kind_helps_the_probabilities_stay_as_predicted():
    chosen, scores = choose_calibrator(made(patients=60, slope=1.0, intercept=0.0), level="vertebra")
    assert chosen is None
    assert scores["kind"][scores["log_loss"].idxmin()] == "as predicted"
    few = made(patients=25)
    chosen, scores = choose_calibrator(few, level="patient", aggregation=Aggregation("max"))
    refused = scores.set_index("kind")["refused"]
    assert refused["isotonic"].startswith("isotonic needs 50 fractured patients and 50 intact ones; found ")
    few["label"] = few["vertebra"].eq("C1") & few[UID].isin(few[UID].unique()[:13])
    _, scores = choose_calibrator(few.astype({"label": int}), level="vertebra")
    assert scores.set_index("kind")["refused"]["isotonic"].startswith(
        "isotonic needs 50 patients with a fractured vertebra and 50 with an intact one; found 13 and 25 of "
        "25 patients"
    )
    assert np.isnan(scores.set_index("kind")["log_loss"]["isotonic"])
