import numpy as np
import pandas as pd
import pytest
from scipy import stats
from simulated import calibrated, calibration_truth, cohort, patients, shaken, table_of

from cspine_helpers.evaluation.intervals import bootstrap, compare
from cspine_helpers.evaluation.resampling import RATES, Sample, estimates
from cspine_helpers.labels import UID

AT = 0.3


def second_model(table, seed=1, noise=0.5):
    """Another model's predictions: the same with noise on the logit."""
    p = table["probability"]
    logit = np.log(p / (1 - p)) + noise * np.random.default_rng(seed).normal(size=len(table))
    return table.assign(probability=1 / (1 + np.exp(-logit)))


def test_values_are_those_of_each_model_alone():
    table = cohort()
    other = second_model(table)
    found = compare(table, other, threshold=AT, other_threshold=0.2, resamples=100)
    for column, (rows, threshold) in {"value": (table, AT), "other": (other, 0.2)}.items():
        alone = bootstrap(rows, threshold=threshold, resamples=100)
        assert found["metric"].tolist() == alone["metric"].tolist()
        assert found[column].tolist() == alone["value"].tolist()
    np.testing.assert_array_equal(found["difference"], found["other"] - found["value"])
    assert ((found["low"] <= found["difference"]) & (found["difference"] <= found["high"])).all()


def test_two_thresholds_of_one_model():
    found = compare(cohort(many=200), threshold=0.3, other_threshold=0.1, level="patient").set_index("metric")
    assert found.loc["recall", "low"] > 0
    assert found.loc["specificity", "high"] < 0
    assert found.loc["auroc", "difference"] == 0


def test_order_of_rows_says_nothing():
    table = cohort()
    other = second_model(table)
    expected = compare(table, other, threshold=AT, resamples=50)
    mixed = other.sample(frac=1, random_state=0)
    pd.testing.assert_frame_equal(compare(table, mixed, threshold=AT, resamples=50), expected)


def test_pairs_make_the_interval_narrower_than_two_cohorts_would():
    table = cohort(many=200)
    found = compare(table, second_model(table, noise=0.2), threshold=AT).set_index("metric")
    alone = bootstrap(table, threshold=AT).set_index("metric")
    width, alone_width = found["high"] - found["low"], alone["high"] - alone["low"]
    assert (width < 0.6 * np.sqrt(2) * alone_width).all()


def test_difference_of_two_undefined_rates_is_refused_or_counted():
    with pytest.raises(ValueError, match="precision in 200"):
        compare(cohort(), threshold=AT, other_threshold=1.0, resamples=200)
    kept = compare(cohort(), threshold=AT, other_threshold=1.0, resamples=200, keep_undefined=True)
    row = kept.set_index("metric").loc["precision"]
    assert row["undefined"] == 200
    assert row[["other", "difference", "low", "high"]].isna().all()


def test_thresholds_are_both_given_or_none():
    table = cohort()
    assert not set(RATES) & set(compare(table, second_model(table), threshold=None, resamples=20)["metric"])
    with pytest.raises(ValueError, match="Only one threshold is given"):
        compare(table, threshold=None, other_threshold=0.5)
    with pytest.raises(ValueError, match="A threshold is a number; found nan"):
        compare(table, threshold=0.5, other_threshold=np.nan)


def test_tables_of_other_vertebrae_or_labels_are_refused_by_name():
    table = cohort()
    with pytest.raises(ValueError, match=r"1 vertebrae are not in the second table: '1\.59 C7'"):
        compare(table, table[:-1], threshold=AT)
    with pytest.raises(ValueError, match=r"7 vertebrae are not in the first table: '1\.0 C1', '1\.0 C2'"):
        compare(table[7:], table, threshold=AT)
    relabelled = table.assign(label=np.where(np.arange(len(table)) == 8, 1 - table["label"], table["label"]))
    with pytest.raises(ValueError, match=r"1 vertebrae are labelled differently .*: '1\.1 C2'"):
        compare(table, relabelled, threshold=AT)
    with pytest.raises(ValueError, match="mix the splits"):
        compare(table.assign(split=np.where(table[UID] == "1.3", "test", "train")), table, threshold=AT)


@pytest.mark.slow
def test_differences_hold_the_truth_as_often_as_they_say():
    rng, sims = np.random.default_rng(0), 100

    def pair(many):
        labels, first = patients(rng, many, prevalence_logit=-3.5, separation=3.0)
        logit = np.log(first / (1 - first)) + rng.normal(size=first.shape)
        return table_of(labels, first), table_of(labels, 1 / (1 + np.exp(-logit)))

    def truth_of(table):
        own = np.repeat(np.arange(len(table) // 7), 7)
        rows = Sample(table["label"].to_numpy(), table["probability"].to_numpy(), own, own[-1] + 1)
        found = estimates(rows, AT)
        return pd.Series(found.under(np.ones((rows.patients, 1)))[:, 0], found.names)

    first, second = pair(60_000)
    truth, held = truth_of(second) - truth_of(first), 0
    for sim in range(sims):
        found = compare(*pair(80), threshold=AT, resamples=150, seed=sim, keep_undefined=True)
        found = found.set_index("metric").loc[truth.index]
        held = held + ((found["low"] <= truth) & (truth <= found["high"])).astype(int)
    for name, many in held.items():
        assert stats.binomtest(int(many), sims).proportion_ci(0.999).high >= 0.95, (name, many)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [(7, 0.0, 1.0), (7, 0.8, 0.7), (1, 0.6, 1.6)])
@pytest.mark.parametrize(("many", "draws"), [(50, 200), (200, 100), (800, 50)])
def test_differences_of_brier_scores_hold_the_truth_93_times_in_100(many, draws, kind):
    vertebrae, intercept, slope = kind
    options = {"vertebrae": vertebrae, "intercept": intercept, "slope": slope}
    truth, rng, held = calibration_truth(**options), np.random.default_rng(many), {"other": 0, "constant": 0}
    for draw in range(draws):
        _, labels, p = calibrated(rng, many, **options)
        second = {"other": shaken(rng, p), "constant": np.full_like(p, truth["prevalence"])}
        for name, probabilities in second.items():
            tables = [
                table_of(*(np.repeat(part, 8 - vertebrae, 1)[:, :7] for part in (labels, values)))
                for values in (p, probabilities)
            ]
            if vertebrae == 1:
                tables = [table[table["vertebra"] == "C1"] for table in tables]
            found = compare(*tables, threshold=None, resamples=2, seed=draw, keep_undefined=True)
            low, high = found.set_index("metric").loc["brier", ["low", "high"]]
            held[name] += low <= truth[name] <= high
    for name, count in held.items():
        assert stats.binom.cdf(count, draws, 0.93) > 0.001, (name, count / draws)
