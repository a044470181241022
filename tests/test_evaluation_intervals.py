import numpy as np
import pandas as pd
import pytest
from conftest import RSNA, needs_rsna
from scipy import stats
from simulated import cohort, patients, table_of

from cspine_helpers import metrics
from cspine_helpers.evaluation import cases as evaluation_cases
from cspine_helpers.evaluation import intervals
from cspine_helpers.evaluation.competition import rsna_weighted_log_loss
from cspine_helpers.evaluation.intervals import bootstrap, per_vertebra
from cspine_helpers.evaluation.resampling import RATES, Sample, estimates, patient_weights, quantiles
from cspine_helpers.labels import UID, VERTEBRAE, read_labels
from cspine_helpers.predictions import from_wide

NAMES = [*RATES, "log_loss", "brier", "rsna_loss", "rsna_loss_per_patient", "auroc", "average_precision"]
AT = 0.3  # threshold


def slowly(table, threshold):
    """All headline numbers by the functions of `metrics` on the rows as they are."""
    y, p = table["label"].to_numpy(), table["probability"].to_numpy()
    found = metrics.rates(metrics.confusion(y, p, threshold)).iloc[0][list(RATES)].to_dict()
    clipped = np.clip(p, 1e-16, 1 - 2.3e-16)
    found["log_loss"] = -np.mean(np.where(y == 1, np.log(clipped), np.log1p(-clipped)))
    found["brier"] = np.mean((y - p) ** 2)
    found["rsna_loss"] = rsna_weighted_log_loss(table)
    found["rsna_loss_per_patient"] = rsna_weighted_log_loss(table, per_patient=True)
    found["auroc"], found["average_precision"] = metrics.auroc(y, p), metrics.average_precision(y, p)
    return found


def test_values_are_those_of_metrics():
    table = cohort()
    found = bootstrap(table, threshold=AT, resamples=200)
    assert found["metric"].tolist() == NAMES
    assert found["value"].tolist() == pytest.approx([*slowly(table, AT).values()], abs=1e-12)
    assert (found["low"] <= found["value"]).all()
    assert (found["value"] <= found["high"]).all()


def test_draws_are_those_of_a_slow_bootstrap_that_repeats_rows():
    table = cohort(many=25)
    studies = table[UID].unique()
    numbers = intervals.headline_numbers(table, "all", AT, pd.Index(studies))
    weights = next(patient_weights(25, 20, 0))
    draws = numbers.under(weights)
    for drawn, times in zip(draws.T, weights.T, strict=True):
        copies = [
            table[table[UID] == uid].assign(**{UID: f"{uid}.{copy}"})
            for uid, many in zip(studies, times, strict=True)
            for copy in range(int(many))
        ]
        assert drawn.tolist() == pytest.approx([*slowly(pd.concat(copies), AT).values()], abs=1e-12)


@pytest.mark.parametrize("level", ["patient", "C5"])
def test_levels_are_those_of_metrics(level):
    table = cohort(many=200)
    found = bootstrap(table, threshold=AT, level=level, resamples=100, keep_undefined=True)
    rows = evaluation_cases.at_level(table, level)
    expected = metrics.rates(metrics.confusion(rows["label"], rows["probability"], AT)).iloc[0]
    assert found["value"][: len(RATES)].tolist() == expected[list(RATES)].tolist()
    assert "rsna_loss" not in set(found["metric"])


def test_one_seed_gives_one_result_and_order_of_rows_none():
    table = cohort()
    first, again, other = (bootstrap(table, threshold=AT, resamples=50, seed=s) for s in (1, 1, 2))
    pd.testing.assert_frame_equal(first, again)
    assert (first["low"] != other["low"]).any()
    mixed = table.groupby(UID, sort=False).sample(frac=1, random_state=0)
    found = bootstrap(mixed, threshold=AT, resamples=50, seed=1)
    pd.testing.assert_frame_equal(first, found)


def test_competition_loss_only_where_every_study_is_whole():
    table = cohort()
    overall = pd.Series(0.4, index=table[UID].unique())
    found = bootstrap(table, threshold=None, patient=overall, resamples=50).set_index("metric")["value"]
    assert found["rsna_loss"] == pytest.approx(rsna_weighted_log_loss(table, patient=overall), abs=1e-12)
    assert "recall" not in found.index
    assert "rsna_loss" not in set(bootstrap(table[1:], threshold=AT, resamples=50)["metric"])
    with pytest.raises(ValueError, match=r"all seven vertebrae .*'all' and 419 vertebrae of 60"):
        bootstrap(table[1:], threshold=AT, patient=overall)
    with pytest.raises(ValueError, match="found level 'patient'"):
        bootstrap(table, threshold=AT, level="patient", patient=overall)


@pytest.mark.slow
def test_unclustered_intervals_agree_with_scipys_bootstrap():
    labels, probabilities = patients(np.random.default_rng(0), 800, shared=0.0, prevalence_logit=-1.5)
    table = table_of(labels, probabilities)
    one = table[table["vertebra"] == "C4"]
    found = bootstrap(one, threshold=AT, resamples=2000).set_index("metric")
    y, p = one["label"].to_numpy(), one["probability"].to_numpy()
    statistics = {
        "log_loss": lambda y, p, axis: -np.mean(np.where(y == 1, np.log(p), np.log1p(-p)), axis=axis),
        "brier": lambda y, p, axis: np.mean((y - p) ** 2, axis=axis),
        "recall": lambda y, p, axis: np.sum(y * (p >= AT), axis=axis) / np.sum(y, axis=axis),
        "precision": lambda y, p, axis: np.sum(y * (p >= AT), axis=axis) / np.sum(p >= AT, axis=axis),
        "specificity": lambda y, p, axis: np.sum((1 - y) * (p < AT), axis=axis) / np.sum(1 - y, axis=axis),
    }
    for name, statistic in statistics.items():
        for method in ("percentile", "bca"):
            peer = stats.bootstrap(
                (y, p), statistic, paired=True, n_resamples=2000, method=method, rng=np.random.default_rng(1)
            )
            width = peer.confidence_interval.high - peer.confidence_interval.low
            limits = found.loc[name, ["low", "high"]].tolist()
            assert limits == pytest.approx(list(peer.confidence_interval), abs=0.1 * width), name
    peer = stats.bootstrap(
        (y, p),
        metrics.auroc,
        paired=True,
        n_resamples=400,
        vectorized=False,
        method="percentile",
        rng=np.random.default_rng(1),
    )
    low, high = peer.confidence_interval
    assert found.loc["auroc", ["low", "high"]].tolist() == pytest.approx([low, high], abs=0.15 * (high - low))


def simulate(many, sims, **options):
    """How often intervals hold the truth: by patients, by rows as if each were a patient, by percentiles.

    Returns:
        One row a metric; how many of the simulations, by `patients`, `rows`, `percentiles`.
    """
    rng, studies = np.random.default_rng(0), 100_000

    def numbers(labels, probabilities, patient):
        found = estimates(Sample(labels.ravel(), probabilities.ravel(), patient, patient[-1] + 1), AT)
        return found, found.under(np.ones((patient[-1] + 1, 1)))[:, 0]

    whole, truth = numbers(*patients(rng, studies, **options), np.repeat(np.arange(studies), 7))
    held = np.zeros((len(truth), 3), int)
    for sim in range(sims):
        drawn = patients(rng, many, **options)
        found, value = numbers(*drawn, np.repeat(np.arange(many), 7))
        alone, _ = numbers(*drawn, np.arange(7 * many))
        draws = found.under(next(patient_weights(many, 250, sim)))
        naive = np.concatenate([alone.under(part) for part in patient_weights(7 * many, 250, sim)], axis=1)
        percentiles = quantiles(np.where(np.isnan(draws), value[:, None], draws), 0.95)
        limits = found.limits(value, draws, 0.95), alone.limits(value, naive, 0.95), percentiles
        held += np.column_stack([(low <= truth) & (truth <= high) for low, high in limits])
    return pd.DataFrame(held, whole.names, ["patients", "rows", "percentiles"])


def binomial(held, sims):
    """99.9 % interval of the coverage that so many of the simulations show."""
    return stats.binomtest(int(held), sims).proportion_ci(0.999)


@pytest.mark.slow
def test_intervals_hold_the_truth_as_often_as_they_say_and_those_of_rows_do_not():
    held = simulate(80, 200)
    for name, row in held.iterrows():
        ours, rows = binomial(row["patients"], 200), binomial(row["rows"], 200)
        assert ours.low <= 0.95 <= ours.high, name
        assert rows.high < 0.95, name


@pytest.mark.slow
def test_rates_hold_with_few_positives_where_percentiles_do_not():
    held = simulate(60, 120, prevalence_logit=-4.0, separation=3.5)
    for name in ("recall", "npv"):
        assert binomial(held.loc[name, "patients"], 120).high >= 0.95
        assert binomial(held.loc[name, "percentiles"], 120).high < 0.95


def test_per_vertebra_is_bootstrap_of_each_with_its_counts():
    table = cohort(many=300)
    found = per_vertebra(table, threshold=AT, resamples=100)
    assert found["vertebra"].unique().tolist() == list(VERTEBRAE)
    one = found[found["vertebra"] == "C3"].reset_index(drop=True)
    expected = bootstrap(table, threshold=AT, level="C3", resamples=100, keep_undefined=True)
    pd.testing.assert_frame_equal(one[list(expected.columns)], expected)
    labels = table["label"][table["vertebra"] == "C3"]
    assert set(one["studies"]) == {300}
    assert set(one["positives"]) == {labels.sum()}


def test_each_vertebra_can_have_its_threshold():
    table = cohort(many=100)
    thresholds = dict(zip(VERTEBRAE, np.arange(2, 9) / 10, strict=True))
    found = per_vertebra(table, threshold=thresholds, resamples=20).set_index(["vertebra", "metric"])["value"]
    for name, threshold in thresholds.items():
        rows = table[table["vertebra"] == name]
        expected = metrics.rates(metrics.confusion(rows["label"], rows["probability"], threshold))
        assert found[name, "specificity"] == expected.loc[0, "specificity"]
    with pytest.raises(ValueError, match="No threshold for 'C6', 'C7'"):
        per_vertebra(table, threshold=dict.fromkeys(VERTEBRAE[:5], 0.5))


def test_a_vertebra_without_fracture_is_counted_as_undefined_not_hidden():
    table = cohort()
    table.loc[table["vertebra"] == "C3", "label"] = 0
    found = per_vertebra(table[table["vertebra"] != "C4"], threshold=AT, resamples=50)
    assert "C4" not in set(found["vertebra"])
    one = found[found["vertebra"] == "C3"].set_index("metric")
    assert one.loc[["recall", "auroc", "average_precision"], "undefined"].tolist() == [50] * 3
    assert one.loc[["recall", "auroc"], ["value", "low", "high"]].isna().all(axis=None)
    assert one.loc[["specificity", "brier"], "undefined"].tolist() == [0, 0]
    assert one.loc[["specificity", "brier"], ["value", "low", "high"]].notna().all(axis=None)


def test_resamples_without_positives_are_left_out_and_counted():
    labels, probabilities = np.zeros((30, 7), int), np.full((30, 7), 0.1)
    labels[:3, 0], probabilities[:2, 0] = 1, 0.9
    found = bootstrap(table_of(labels, probabilities), threshold=AT, resamples=1000, keep_undefined=True)
    found = found.set_index("metric")
    expected = 1000 * (1 - 3 / 30) ** 30  # resamples without any of the three
    assert found.loc["recall", "undefined"] == pytest.approx(expected, abs=4 * np.sqrt(expected))
    assert found.loc["recall", "undefined"] == found.loc["auroc", "undefined"]
    assert found.loc["specificity", "undefined"] == 0
    assert found.loc["recall", "value"] == 2 / 3


def test_three_of_three_found_is_no_certainty():
    labels, probabilities = np.zeros((80, 7), int), np.full((80, 7), 0.1)
    labels[:3, 0], probabilities[:3, 0] = 1, 0.9
    found = bootstrap(table_of(labels, probabilities), threshold=AT, keep_undefined=True).set_index("metric")
    expected = stats.binomtest(3, 3).proportion_ci(method="wilson")
    assert 0 < found.loc["auroc", "low"] < expected.low
    for name in ("recall", "precision", "f1"):
        assert found.loc[name, ["low", "high"]].tolist() == pytest.approx([expected.low, 1], abs=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": np.nan}, "A threshold is a number; found nan"),
        ({"threshold": np.inf}, "found inf"),
        ({"resamples": 1}, "2 resamples or more.*found 1 and 0.95"),
        ({"confidence": 1.0}, "confidence between 0 and 1; found 1000 and 1.0"),
        ({"confidence": np.nan}, "found 1000 and nan"),
        ({"level": "C8"}, "Unknown level 'C8'"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        bootstrap(cohort(), **{"threshold": AT, **options})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda table: table.assign(probability=1.5), "probabilities that are no numbers in"),
        (lambda table: table.assign(probability=np.nan), "probabilities that are no numbers in"),
        (lambda table: table.assign(label=2), "labels that are neither 0 nor 1"),
        (lambda table: pd.concat([table, table[:1]]), "rows that repeat a study and vertebra"),
        (lambda table: table.assign(split=["test", "train"] * 210), "studies in more than one split"),
        (
            lambda table: table.assign(split=np.where(table[UID] == "1.3", "test", "validation")),
            "mix the splits 'validation', 'test'",
        ),
        (lambda table: table[:7], "1 study, which cannot be resampled"),
        (lambda table: table.assign(label=0), "recall in 1000, .*auroc in 1000"),
        (lambda table: table.assign(label=1), "specificity in 1000, .*auroc in 1000"),
        (lambda table: table.assign(probability=0.1), "1000 resamples: precision in 1000"),
    ],
)
def test_tables_that_define_no_interval_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        bootstrap(change(cohort()), threshold=AT)


def test_metrics_that_few_resamples_define_are_refused_with_what_to_do():
    labels, probabilities = np.zeros((30, 7), int), np.full((30, 7), 0.1)
    labels[:2, 0] = 1
    with pytest.raises(ValueError, match=r"more than 5% of 1000 resamples: recall in \d+.*keep_undefined"):
        bootstrap(table_of(labels, probabilities), threshold=0.05)


@needs_rsna
@pytest.mark.parametrize(("level", "at"), [("all", 0.1), ("patient", 0.5), ("C3", 0.1)])
def test_real_values_are_those_of_metrics_and_lie_in_their_intervals(level, at):
    wide = pd.read_csv(RSNA / "oof_predictions.csv", dtype={"uid": str})
    real = from_wide(wide, read_labels(RSNA / "train.csv"), "validation", missing="drop")
    found = bootstrap(real, threshold=at, level=level, resamples=200)
    rows = evaluation_cases.at_level(real, level)
    expected = metrics.rates(metrics.confusion(rows["label"], rows["probability"], at)).iloc[0]
    assert found["value"][: len(RATES)].tolist() == pytest.approx(expected[list(RATES)].tolist(), abs=1e-12)
    areas = [
        score(rows["label"], rows["probability"]) for score in (metrics.auroc, metrics.average_precision)
    ]
    assert found["value"][-2:].tolist() == pytest.approx(areas, abs=1e-12)
    assert ((found["low"] < found["value"]) & (found["value"] < found["high"])).all()
    assert (found["undefined"] == 0).all()


def test_a_metric_may_be_undefined_in_five_of_a_hundred_resamples_and_no_more():
    found = pd.DataFrame({"metric": ["recall"], "value": [0.5], "undefined": [50]})
    assert intervals.defined(found, 1000, "all") is found
    with pytest.raises(ValueError, match="recall in 51"):
        intervals.defined(found.assign(undefined=51), 1000, "all")
