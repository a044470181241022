from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from simulated import image_table, patients, table_of

from cspine_helpers.decisions.confidence import (
    CONFIDENCES,
    Confidence,
    cross_fitted_confidence,
    disagreement,
    fit_confidence,
    map_features,
    p_values,
)
from cspine_helpers.evaluation.cases import Cases
from cspine_helpers.labels import UID

P_LOW = 0.1


@pytest.fixture(scope="module")
def table():
    return table_of(*patients(np.random.default_rng(0), 200))


@pytest.fixture(scope="module")
def cases(table):
    return Cases.of(table, split="validation")


@pytest.fixture(scope="module")
def features(table):
    rng = np.random.default_rng(1)
    maps = rng.gamma(0.3 + table["label"].to_numpy()[:, None, None], size=(len(table), 4, 4))
    maps[5] = 0
    found = pd.concat([table[[UID, "vertebra"]], map_features(maps)], axis=1)
    masks = map_features(rng.gamma(0.2, size=(len(table), 5, 5))).add_prefix("mask_")
    return pd.concat([found, masks], axis=1).assign(disagreement=rng.random(len(table)) / 10)


# ---------------------------------------------------------------------------------------------- features


def test_entropy_is_that_of_scipy_and_depends_on_the_grid():
    from scipy.stats import entropy

    maps = np.random.default_rng(0).normal(size=(6, 3, 5, 4))
    found = map_features(maps)
    cells = np.maximum(maps.reshape(6, -1), 0)
    assert np.allclose(found["entropy"], entropy(cells, axis=1) / np.log(60))
    assert (found["grid"] == "3×5×4").all()
    blobs = {}
    for size in (7, 224):  # one Gaussian blob, as the same picture on two grids
        y, x = (np.mgrid[:size, :size] + 0.5) / size - 0.5
        blobs[size] = map_features(np.exp(-(x**2 + y**2) / (2 * 0.12**2))[None])["entropy"].iloc[0]
    assert blobs[224] - blobs[7] > 0.2


def test_area_counts_cells_above_a_share_of_the_highest_of_the_raw_map():
    one = np.array([[[-9.0, 1.0], [2.0, 4.0]]])  # not stretched from −9 to 4
    found = map_features(one, alphas=[0.0, 0.25, 0.5]).iloc[0]
    assert found[["area_0", "area_0.25", "area_0.5", "peak", "total", "flat"]].tolist() == [
        0.75,
        0.5,
        0.25,
        4,
        7,
        0,
    ]


def test_attention_weighs_slices():
    maps = np.ones((1, 2, 2, 2))
    maps[0, :, 0, 0] = 3
    alone = map_features(maps, [[1.0, 0.0]]).iloc[0]
    assert alone[["peak", "total"]].tolist() == [3, 6]
    assert alone["entropy"] < map_features(maps, [[0.5, 0.5]]).iloc[0]["entropy"]
    assert map_features(maps, [[0.0, 0.0]]).iloc[0]["flat"] == 1


@pytest.mark.parametrize("level", [0.0, 1.0, -1.0, 0.1])
def test_zero_constant_and_negative_maps_are_flat(level):
    flat = map_features(np.full((1, 3, 3), level, dtype=np.float32)).iloc[0]
    assert flat[["flat", "entropy", "area_0.4"]].tolist() == [1, 1, 1]
    assert map_features(-np.random.default_rng(0).random((1, 3, 3)))["flat"].iloc[0] == 1


@pytest.mark.parametrize(
    ("maps", "attention", "alphas", "says"),
    [
        (np.ones((2, 3)), None, [0.4], "Maps are .* found shape \\(2, 3\\)"),
        (np.ones((0, 3, 3)), None, [0.4], "at least one case"),
        (np.full((2, 3, 3), np.nan), None, [0.4], "2 of 2 maps hold values that are not finite"),
        (np.ones((2, 3, 3)), None, [1.0], "in \\[0, 1\\); found '?1.0"),
        (np.ones((2, 3, 3)), np.ones((2, 3)), [0.4], "Leave it out for radiographs"),
        (np.ones((2, 2, 3, 3)), -np.ones((2, 2)), [0.4], "none below 0"),
        (np.ones((2, 2, 3, 3)), np.full((2, 2), np.inf), [0.4], "finite and none below 0"),
    ],
)
def test_unusable_maps_are_refused(maps, attention, alphas, says):
    with pytest.raises(ValueError, match=says):
        map_features(maps, attention, alphas=alphas)


def test_disagreement_is_the_spread_of_runs_row_by_row(table):
    other = table.assign(probability=1 - table["probability"]).sample(frac=1, random_state=0)
    both = np.stack([table["probability"], 1 - table["probability"]])
    assert np.allclose(disagreement(table, [other]), both.std(axis=0))
    with pytest.raises(ValueError, match="two runs or more"):
        disagreement(table, [])
    with pytest.raises(ValueError, match="a list of tables; found one table"):
        disagreement(table, other)
    with pytest.raises(ValueError, match=r"other run 1 of 1 lacks rows .* \(2\): '1.0 C1', '1.0 C2'"):
        disagreement(table, [table.iloc[2:]])
    with pytest.raises(ValueError, match="other labels \\(1400\\)"):
        disagreement(table, [table.assign(label=1 - table["label"])])


# -------------------------------------------------------------------------------------------- confidences


def test_every_confidence_is_one_number_a_case_and_survives_json(cases, features):
    import json

    for name in CONFIDENCES:
        fit = fit_confidence(name, cases, features, p_low=P_LOW)
        again = Confidence.from_record(json.loads(json.dumps(fit.record())))
        sure = fit.of(cases, features)
        assert sure.shape == (len(cases),)
        assert not np.isnan(sure).any()
        assert np.array_equal(again.of(cases, features), sure)
        assert (again.title, again) == (fit.title, fit)


def test_above_p_low_distance_calibrated_and_conformal_rank_as_plain_probability(cases):
    suspected = cases.where(cases.probability >= P_LOW)
    order = np.argsort(suspected.probability)
    for name in ("distance", "calibrated", "conformal"):
        sure = fit_confidence(name, cases, p_low=P_LOW).of(suspected)[order]
        assert (np.diff(sure) >= 0).all()
        assert sure[-1] > sure[0]


def test_calibrated_confidence_is_the_share_of_right_answers(cases):
    sure = cross_fitted_confidence("calibrated", cases, p_low=P_LOW)
    right = (cases.probability >= P_LOW) == (cases.label == 1)
    assert sure.mean() == pytest.approx(right.mean(), abs=0.01)


def test_a_map_that_says_nothing_is_never_confident(cases, features):
    for name in ("map_entropy", "map_area", "combination"):
        sure = fit_confidence(name, cases, features, p_low=P_LOW).of(cases, features)
        assert np.flatnonzero(np.isneginf(sure)).tolist() == [5]
    assert np.isfinite(fit_confidence("disagreement", cases, features, p_low=P_LOW).of(cases, features)).all()


def test_the_combination_is_the_logistic_model_of_scikit_learn(cases, features):
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    columns = ["entropy", "area_0.4", "mask_entropy", "mask_area_0.4", "disagreement"]
    kept = features["flat"].to_numpy() == 0
    logit = np.log(cases.probability / (1 - cases.probability))
    x = np.column_stack([logit, features[columns]])
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000, tol=1e-8)).fit(
        x[kept], cases.label[kept]
    )
    right = model.predict_proba(x)[np.arange(len(x)), (cases.probability >= P_LOW).astype(int)]
    sure = fit_confidence("combination", cases, features, p_low=P_LOW).of(cases, features)
    assert np.allclose(sure[kept], right[kept], atol=1e-4)


def test_features_that_know_more_than_the_probability_win(cases, features):
    from cspine_helpers.metrics import auroc

    suspected = (cases.probability >= P_LOW) & (features["flat"].to_numpy() == 0)
    ranks = {
        name: auroc(
            cases.label[suspected],
            _unit(cross_fitted_confidence(name, cases, features, p_low=P_LOW)[suspected]),
        )
        for name in ("distance", "combination")
    }
    assert ranks["combination"] > ranks["distance"] + 0.05


def _unit(values):
    return (np.argsort(np.argsort(values)) + 0.5) / len(values)


def test_no_case_is_judged_by_a_fit_that_saw_its_patient(cases, features):
    whose = next(one for one in np.unique(cases.patient) if 0 < cases.label[cases.patient == one].sum() < 7)
    own = cases.patient == whose
    labels = cases.label.copy()
    labels[own] = 1 - labels[own]  # the patient stays fractured, and in the same part
    for name in ("calibrated", "conformal", "combination"):
        was, now = (
            cross_fitted_confidence(name, each, features, p_low=P_LOW)
            for each in (cases, replace(cases, label=labels))
        )
        assert np.array_equal(was[own], now[own])
        assert not np.allclose(was, now)


@pytest.mark.filterwarnings("ignore:WARNING. your conformalization dataset has less labels")  # as is meant
def test_conformal_sets_are_those_of_mapie_where_a_patient_has_one_case():
    from mapie.classification import SplitConformalClassifier
    from sklearn.base import BaseEstimator, ClassifierMixin

    class AsGiven(ClassifierMixin, BaseEstimator):
        """The probability is the only feature."""

        def __init__(self):
            self.classes_ = np.array([0, 1])

        def fit(self, x, y):
            return self

        def predict_proba(self, x):
            return np.column_stack([1 - x[:, 0], x[:, 0]])

        def predict(self, x):
            return (x[:, 0] >= 0.5).astype(int)

        def __sklearn_is_fitted__(self):
            return True

    table = image_table(seed=2)
    alone = table.drop_duplicates("patient")
    calibration, new = (Cases.of(alone, split=name) for name in ("validation", "test"))
    settings = fit_confidence("conformal", calibration, p_low=0.2).settings
    found = p_values(settings, new.probability)
    for label in (0, 1):
        rows = calibration.label == label
        for error in (0.1, 0.23):
            oracle = SplitConformalClassifier(
                AsGiven(), confidence_level=1 - error, conformity_score="lac", prefit=True
            )
            oracle.conformalize(calibration.probability[rows, None], calibration.label[rows])
            _, sets = oracle.predict_set(new.probability[:, None])
            assert np.array_equal(found[:, label] > error, sets[:, label, 0])


@pytest.mark.slow
def test_each_class_is_covered_when_patients_are_the_units():
    """Cases of a patient are alike; a patient with many of them counts once."""
    rng, error, covered = np.random.default_rng(0), 0.2, []
    for _ in range(60):
        labels, probabilities = patients(rng, 60)
        known = Cases.of(table_of(labels, probabilities), split="validation")
        settings = fit_confidence("conformal", known, p_low=0.2).settings
        labels, probabilities = patients(rng, 150)
        for own, p in zip(labels, probabilities, strict=True):
            for label in set(own.tolist()):
                one = rng.choice(p[own == label])
                covered.append((label, p_values(settings, [one])[0, label] > error))
    shares = pd.DataFrame(covered).groupby(0)[1].mean()
    assert (shares > 1 - error - 0.02).all()


@pytest.mark.parametrize("name", ["map_entropy", "map_area", "mask_area", "disagreement", "combination"])
def test_missing_features_are_named(name, cases, features):
    with pytest.raises(ValueError, match=r"needs (the )?feature.*found none"):
        fit_confidence(name, cases, p_low=P_LOW)
    holes = features.astype({"entropy": float}).copy()
    holes.loc[3, ["entropy", "area_0.4", "mask_area_0.4", "disagreement"]] = np.nan
    with pytest.raises(ValueError, match=f"Cases without finite features .* \\(1\\): '{cases.study[3]} C4'"):
        fit_confidence(name, cases, holes, p_low=P_LOW).of(cases, holes)
    with pytest.raises(ValueError, match=r"Features are a table, .* found ndarray"):
        fit_confidence(name, cases, holes.to_numpy(), p_low=P_LOW)
    known, twice = fit_confidence(name, cases, features, p_low=P_LOW), pd.concat([features, features.head(1)])
    with pytest.raises(ValueError, match=r"cases twice \(1\)"):
        known.of(cases, twice)


def test_what_no_confidence_can_be_is_refused(cases):
    with pytest.raises(ValueError, match="Unknown confidence 'entropie'"):
        fit_confidence("entropie", cases, p_low=P_LOW)
    with pytest.raises(ValueError, match="take an α, and only they do"):
        Confidence("distance", 0.1, alpha=0.4)
    for p_low in (1.5, "0.2", None):
        with pytest.raises(ValueError, match=f"threshold must be in .* found {p_low}"):
            Confidence("distance", p_low)
    with pytest.raises(ValueError, match="missing or unknown: 'settings'"):
        Confidence.from_record({"name": "distance", "p_low": 0.1, "alpha": None})
    for record in (None, [1]):
        with pytest.raises(ValueError, match="record is a mapping; found"):
            Confidence.from_record(record)
    for name, alpha in (("conformal", None), ("combination", 0.4)):
        with pytest.raises(ValueError, match=f"The fit of {name} lacks '"):
            Confidence(name, 0.1, alpha)
    words = pd.DataFrame({UID: cases.study, "vertebra": cases.unit, "entropy": "much", "flat": 0})
    with pytest.raises(ValueError, match="Cases without finite features 'entropy'"):
        Confidence("map_entropy", 0.1).of(cases, words)
    none = cases.where(cases.label == 0)
    with pytest.raises(ValueError, match="found 0 fractured of"):
        fit_confidence("conformal", none, p_low=P_LOW)
    with pytest.raises(ValueError, match="Only the split 'validation'"):
        fit_confidence("distance", Cases.of(table_of([[1] * 7], [[0.5] * 7], "test")), p_low=P_LOW)
