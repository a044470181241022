import numpy as np
import pytest
from scipy import stats
from simulated import cohort, patients, table_of

from cspine_helpers import metrics
from cspine_helpers.evaluation.intervals import curve_bands
from cspine_helpers.evaluation.resampling import Ranking, Sample


def test_curves_are_those_of_metrics():
    table = cohort(many=80)
    y, p = table["label"], table["probability"]
    curve, band = metrics.pr_curve(y, p), curve_bands(table, kind="pr", points=20, resamples=50)
    expected = [curve["precision"][curve["recall"] >= at - 1e-9].iloc[-1] for at in band["recall"]]
    np.testing.assert_allclose(band["precision"], expected, rtol=0, atol=1e-12)
    assert list(band) == ["recall", "precision", "low", "high", "undefined"]
    curve, band = metrics.roc_curve(y, p), curve_bands(table, kind="roc", points=20, resamples=50)
    expected = [
        curve["recall"][curve["false_positive_rate"] <= at + 1e-9].max() for at in band["false_positive_rate"]
    ]
    np.testing.assert_allclose(band["recall"], expected, rtol=0, atol=1e-12)
    assert list(band) == ["false_positive_rate", "recall", "low", "high", "undefined"]


@pytest.mark.parametrize("kind", ["pr", "roc"])
@pytest.mark.parametrize("level", ["all", "patient", "C7"])
def test_bands_hold_their_curve_at_every_level(kind, level):
    band = curve_bands(cohort(many=200), kind=kind, level=level, resamples=100)
    middle = band["precision" if kind == "pr" else "recall"]
    assert len(band) == (100 if kind == "pr" else 101)
    assert ((band["low"] >= 0) & (band["low"] <= middle)).all()
    assert ((middle <= band["high"]) & (band["high"] <= 1)).all()


def test_the_band_is_not_narrower_than_rows_allow():
    labels, probabilities = np.zeros((80, 7), int), np.full((80, 7), 0.1)
    labels[:30, 0], probabilities[:30, 0] = 1, 0.9
    table = table_of(labels, probabilities)
    expected = stats.binomtest(30, 30).proportion_ci(method="wilson").low
    roc = curve_bands(table, kind="roc", resamples=50)
    assert roc["low"].iloc[0] == pytest.approx(expected, abs=1e-12)
    assert curve_bands(table, resamples=50)["low"].iloc[-1] == pytest.approx(expected, abs=1e-12)


def test_curves_of_one_class_or_nearly_are_refused():
    table = cohort()
    with pytest.raises(ValueError, match="All 420 labels are 0"):
        curve_bands(table.assign(label=0))
    rare = table.assign(label=(np.arange(len(table)) == 0).astype(int))
    with pytest.raises(ValueError, match=r"undefined in more than 5% .* precision in \d+"):
        curve_bands(rare)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "lift"}, "'pr' or 'roc', at 1 point or more; found 'lift', 100 points"),
        ({"points": 0}, "found 'pr', 0 points"),
        ({"resamples": 0}, "2 resamples or more"),
        ({"level": "T1"}, "Unknown level 'T1'"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        curve_bands(cohort(), **options)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["pr", "roc"])
def test_bands_hold_the_true_curve_at_each_point_as_often_as_they_say(kind):
    rng = np.random.default_rng(0)
    labels, probabilities = patients(rng, 30_000)
    rows = Sample(labels.ravel(), probabilities.ravel(), np.repeat(np.arange(30_000), 7), 30_000)
    points = np.array([0.25, 0.5, 0.75])
    ranking = Ranking(rows)
    curve = ranking.precision_at if kind == "pr" else ranking.recall_at
    truth = curve(np.ones((30_000, 1)), points)[:, 0]
    held = []
    for sim in range(80):
        table = table_of(*patients(rng, 100))
        band = curve_bands(table, kind=kind, points=4, resamples=200, seed=sim)
        band = band[band.iloc[:, 0].isin(points)]
        held.append((band["low"].to_numpy() <= truth) & (truth <= band["high"].to_numpy()))
    for column in np.transpose(held):
        found = stats.binomtest(int(column.sum()), len(column)).proportion_ci(0.99)
        assert found.high >= 0.95  # more often is possible: a floor keeps the band from being too narrow
