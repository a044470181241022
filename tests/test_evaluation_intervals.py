import numpy as np
import pandas as pd
import pytest
from conftest import RSNA, needs_rsna
from scipy import stats
from simulated import calibrated, calibration_truth, cases_of, cohort, patients, shaken, table_of
from sklearn import metrics as sk
from test_metrics import as_participants_scored

from cspine_helpers import metrics
from cspine_helpers.evaluation import intervals
from cspine_helpers.evaluation.cases import Aggregation, Cases
from cspine_helpers.evaluation.intervals import bootstrap, compare, curve_bands, per_vertebra, rsna_loss
from cspine_helpers.evaluation.resampling import RATES, Ranking, estimates, patient_weights, quantiles
from cspine_helpers.labels import PATIENT, UID, VERTEBRAE, read_labels
from cspine_helpers.predictions import from_wide

NAMES = [*RATES, "log_loss", "brier", "rsna_loss", "rsna_loss_per_patient", "auroc", "average_precision"]
AT = 0.3  # threshold


@pytest.fixture(scope="module")
def real_wide():
    return pd.read_csv(RSNA / "oof_predictions.csv", dtype={"uid": str})


@pytest.fixture(scope="module")
def real(real_wide):
    return Cases.of(from_wide(real_wide, read_labels(RSNA / "train.csv"), "validation", missing="drop"))


def slowly(table, threshold):
    """All headline numbers by the functions of `metrics` on the rows as they are."""
    cases = Cases.of(table)
    y, p = cases.label, cases.probability
    found = metrics.rates(metrics.confusion(y, p, threshold)).iloc[0][list(RATES)].to_dict()
    clipped = np.clip(p, 1e-16, 1 - 2.3e-16)
    found["log_loss"] = -np.mean(np.where(y == 1, np.log(clipped), np.log1p(-clipped)))
    found["brier"] = np.mean((y - p) ** 2)
    found["rsna_loss"] = rsna_loss(cases)
    found["rsna_loss_per_patient"] = rsna_loss(cases, per_patient=True)
    found["auroc"], found["average_precision"] = metrics.auroc(y, p), metrics.average_precision(y, p)
    return found


def test_values_are_those_of_metrics():
    table = cohort()
    found = bootstrap(Cases.of(table), threshold=AT, resamples=200)
    assert found["metric"].tolist() == NAMES
    assert found["value"].tolist() == pytest.approx([*slowly(table, AT).values()], abs=1e-12)
    assert (found["low"] <= found["value"]).all()
    assert (found["value"] <= found["high"]).all()


def test_draws_are_those_of_a_slow_bootstrap_that_repeats_rows():
    table = cohort(many=25)
    studies = table[UID].unique()
    numbers = intervals._headline_numbers(Cases.of(table), AT)
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
    cases = Cases.of(table).of_unit(level)
    found = bootstrap(cases, threshold=AT, resamples=100, keep_undefined=True)
    expected = metrics.rates(metrics.confusion(cases.label, cases.probability, AT)).iloc[0]
    assert found["value"][: len(RATES)].tolist() == expected[list(RATES)].tolist()
    assert "rsna_loss" not in set(found["metric"])


def test_one_seed_gives_one_result_and_order_of_rows_none():
    table = cohort()
    first, again, other = (bootstrap(Cases.of(table), threshold=AT, resamples=50, seed=s) for s in (1, 1, 2))
    pd.testing.assert_frame_equal(first, again)
    assert (first["low"] != other["low"]).any()
    mixed = table.groupby(UID, sort=False).sample(frac=1, random_state=0)
    found = bootstrap(Cases.of(mixed), threshold=AT, resamples=50, seed=1)
    pd.testing.assert_frame_equal(first, found)


def test_competition_loss_only_where_every_study_is_whole():
    cases = Cases.of(cohort())
    overall = cases.patients().with_probability(0.4)
    found = bootstrap(cases, threshold=None, patients=overall, resamples=50).set_index("metric")["value"]
    assert found["rsna_loss"] == pytest.approx(rsna_loss(cases, overall), abs=1e-12)
    assert "recall" not in found.index
    part = Cases.of(cohort()[1:])
    assert "rsna_loss" not in set(bootstrap(part, threshold=AT, resamples=50)["metric"])
    with pytest.raises(ValueError, match=r"all seven vertebrae .*'all', 419 cases of 60 studies"):
        bootstrap(part, threshold=AT, patients=overall)
    with pytest.raises(ValueError, match="found level 'patient'"):
        bootstrap(overall, threshold=AT, patients=overall)


@pytest.mark.slow
def test_unclustered_intervals_agree_with_scipys_bootstrap():
    labels, probabilities = patients(np.random.default_rng(0), 800, shared=0.0, prevalence_logit=-1.5)
    one = Cases.of(table_of(labels, probabilities)).of_unit("C4")
    found = bootstrap(one, threshold=AT, resamples=2000).set_index("metric")
    y, p = one.label, one.probability
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
        found = estimates(cases_of(labels.ravel(), probabilities.ravel(), patient, patient[-1] + 1), AT)
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
    found = per_vertebra(Cases.of(table), threshold=AT, resamples=100)
    assert found["vertebra"].unique().tolist() == list(VERTEBRAE)
    one = found[found["vertebra"] == "C3"].reset_index(drop=True)
    expected = bootstrap(Cases.of(table).of_unit("C3"), threshold=AT, resamples=100, keep_undefined=True)
    pd.testing.assert_frame_equal(one[list(expected.columns)], expected)
    labels = table["label"][table["vertebra"] == "C3"]
    assert set(one["studies"]) == {300}
    assert set(one["positives"]) == {labels.sum()}


def test_each_vertebra_can_have_its_threshold():
    table = cohort(many=100)
    thresholds = dict(zip(VERTEBRAE, np.arange(2, 9) / 10, strict=True))
    found = per_vertebra(Cases.of(table), threshold=thresholds, resamples=20)
    found = found.set_index(["vertebra", "metric"])["value"]
    for name, threshold in thresholds.items():
        rows = table[table["vertebra"] == name]
        expected = metrics.rates(metrics.confusion(rows["label"], rows["probability"], threshold))
        assert found[name, "specificity"] == expected.loc[0, "specificity"]
    with pytest.raises(ValueError, match="No threshold for 'C6', 'C7'"):
        per_vertebra(Cases.of(table), threshold=dict.fromkeys(VERTEBRAE[:5], 0.5))


def test_a_vertebra_without_fracture_is_counted_as_undefined_not_hidden():
    table = cohort()
    table.loc[table["vertebra"] == "C3", "label"] = 0
    found = per_vertebra(Cases.of(table[table["vertebra"] != "C4"]), threshold=AT, resamples=50)
    assert "C4" not in set(found["vertebra"])
    one = found[found["vertebra"] == "C3"].set_index("metric")
    assert one.loc[["recall", "auroc", "average_precision"], "undefined"].tolist() == [50] * 3
    assert one.loc[["recall", "auroc"], ["value", "low", "high"]].isna().all(axis=None)
    assert one.loc[["specificity", "brier"], "undefined"].tolist() == [0, 0]
    assert one.loc[["specificity", "brier"], ["value", "low", "high"]].notna().all(axis=None)


def test_resamples_without_positives_are_left_out_and_counted():
    labels, probabilities = np.zeros((30, 7), int), np.full((30, 7), 0.1)
    labels[:3, 0], probabilities[:2, 0] = 1, 0.9
    cases = Cases.of(table_of(labels, probabilities))
    found = bootstrap(cases, threshold=AT, resamples=1000, keep_undefined=True).set_index("metric")
    expected = 1000 * (1 - 3 / 30) ** 30  # resamples without any of the three
    assert found.loc["recall", "undefined"] == pytest.approx(expected, abs=4 * np.sqrt(expected))
    assert found.loc["recall", "undefined"] == found.loc["auroc", "undefined"]
    assert found.loc["specificity", "undefined"] == 0
    assert found.loc["recall", "value"] == 2 / 3


def test_three_of_three_found_is_no_certainty():
    labels, probabilities = np.zeros((80, 7), int), np.full((80, 7), 0.1)
    labels[:3, 0], probabilities[:3, 0] = 1, 0.9
    cases = Cases.of(table_of(labels, probabilities))
    found = bootstrap(cases, threshold=AT, keep_undefined=True).set_index("metric")
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
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        bootstrap(Cases.of(cohort()), **{"threshold": AT, **options})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda table: table.assign(split=np.where(table[UID] == "1.3", "test", "validation")),
            "mix the splits 'test', 'validation'",
        ),
        (lambda table: table[:7], "1 patient, which cannot be resampled"),
        (lambda table: table.assign(label=0), "recall in 1000, .*auroc in 1000"),
        (lambda table: table.assign(label=1), "specificity in 1000, .*auroc in 1000"),
        (lambda table: table.assign(probability=0.1), "1000 resamples: precision in 1000"),
    ],
)
def test_tables_that_define_no_interval_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        bootstrap(Cases.of(change(cohort())), threshold=AT)


def test_metrics_that_few_resamples_define_are_refused_with_what_to_do():
    labels, probabilities = np.zeros((30, 7), int), np.full((30, 7), 0.1)
    labels[:2, 0] = 1
    with pytest.raises(ValueError, match=r"more than 5% of 1000 resamples: recall in \d+.*keep_undefined"):
        bootstrap(Cases.of(table_of(labels, probabilities)), threshold=0.05)


@needs_rsna
@pytest.mark.parametrize(("level", "at"), [("all", 0.1), ("patient", 0.5), ("C3", 0.1)])
def test_real_values_are_those_of_metrics_and_within_their_intervals(real, level, at):
    cases = real.of_unit(level)
    found = bootstrap(cases, threshold=at, resamples=200)
    expected = metrics.rates(metrics.confusion(cases.label, cases.probability, at)).iloc[0]
    assert found["value"][: len(RATES)].tolist() == pytest.approx(expected[list(RATES)].tolist(), abs=1e-12)
    areas = [score(cases.label, cases.probability) for score in (metrics.auroc, metrics.average_precision)]
    assert found["value"][-2:].tolist() == pytest.approx(areas, abs=1e-12)
    assert ((found["low"] < found["value"]) & (found["value"] < found["high"])).all()
    assert (found["undefined"] == 0).all()


def test_a_metric_may_be_undefined_in_five_of_a_hundred_resamples_and_no_more():
    found = pd.DataFrame({"metric": ["recall"], "value": [0.5], "undefined": [50]})
    assert intervals._defined(found, 1000, "all") is found
    with pytest.raises(ValueError, match="recall in 51"):
        intervals._defined(found.assign(undefined=51), 1000, "all")


def test_curves_are_those_of_metrics():
    table = cohort(many=80)
    y, p, cases = table["label"], table["probability"], Cases.of(table)
    curve, band = metrics.pr_curve(y, p), curve_bands(cases, kind="pr", points=20, resamples=50)
    expected = [curve["precision"][curve["recall"] >= at - 1e-9].iloc[-1] for at in band["recall"]]
    np.testing.assert_allclose(band["precision"], expected, rtol=0, atol=1e-12)
    assert list(band) == ["recall", "precision", "low", "high", "undefined"]
    curve, band = metrics.roc_curve(y, p), curve_bands(cases, kind="roc", points=20, resamples=50)
    expected = [
        curve["recall"][curve["false_positive_rate"] <= at + 1e-9].max() for at in band["false_positive_rate"]
    ]
    np.testing.assert_allclose(band["recall"], expected, rtol=0, atol=1e-12)
    assert list(band) == ["false_positive_rate", "recall", "low", "high", "undefined"]


@pytest.mark.parametrize("kind", ["pr", "roc"])
@pytest.mark.parametrize("level", ["all", "patient", "C7"])
def test_bands_hold_their_curve_at_every_level(kind, level):
    band = curve_bands(Cases.of(cohort(many=200)).of_unit(level), kind=kind, resamples=100)
    middle = band["precision" if kind == "pr" else "recall"]
    assert len(band) == (100 if kind == "pr" else 101)
    assert ((band["low"] >= 0) & (band["low"] <= middle)).all()
    assert ((middle <= band["high"]) & (band["high"] <= 1)).all()


def test_the_band_is_not_narrower_than_rows_allow():
    labels, probabilities = np.zeros((80, 7), int), np.full((80, 7), 0.1)
    labels[:30, 0], probabilities[:30, 0] = 1, 0.9
    cases = Cases.of(table_of(labels, probabilities))
    expected = stats.binomtest(30, 30).proportion_ci(method="wilson").low
    roc = curve_bands(cases, kind="roc", resamples=50)
    assert roc["low"].iloc[0] == pytest.approx(expected, abs=1e-12)
    assert curve_bands(cases, resamples=50)["low"].iloc[-1] == pytest.approx(expected, abs=1e-12)


def test_curves_of_one_class_or_nearly_are_refused():
    table = cohort()
    with pytest.raises(ValueError, match="All 420 labels are 0"):
        curve_bands(Cases.of(table.assign(label=0)))
    rare = table.assign(label=(np.arange(len(table)) == 0).astype(int))
    with pytest.raises(ValueError, match=r"undefined in more than 5% .* precision in \d+"):
        curve_bands(Cases.of(rare))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "lift"}, "'pr' or 'roc', at 1 point or more; found 'lift', 100 points"),
        ({"points": 0}, "found 'pr', 0 points"),
        ({"resamples": 0}, "2 resamples or more"),
    ],
)
def test_curves_with_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        curve_bands(Cases.of(cohort()), **options)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["pr", "roc"])
def test_bands_hold_the_true_curve_at_each_point_as_often_as_they_say(kind):
    rng = np.random.default_rng(0)
    labels, probabilities = patients(rng, 30_000)
    rows = cases_of(labels.ravel(), probabilities.ravel(), np.repeat(np.arange(30_000), 7), 30_000)
    points = np.array([0.25, 0.5, 0.75])
    ranking = Ranking(rows)
    curve = ranking.precision_at if kind == "pr" else ranking.recall_at
    truth = curve(np.ones((30_000, 1)), points)[:, 0]
    held = []
    for sim in range(80):
        cases = Cases.of(table_of(*patients(rng, 100)))
        band = curve_bands(cases, kind=kind, points=4, resamples=200, seed=sim)
        band = band[band.iloc[:, 0].isin(points)]
        held.append((band["low"].to_numpy() <= truth) & (truth <= band["high"].to_numpy()))
    for column in np.transpose(held):
        found = stats.binomtest(int(column.sum()), len(column)).proportion_ci(0.99)
        assert found.high >= 0.95  # more often is possible: a floor keeps the band from being too narrow


def paired(*tables, level="all", **options):
    """`compare` of tables."""
    return compare(*(Cases.of(table).of_unit(level) for table in tables), **options)


def second_model(table, seed=1, noise=0.5):
    """Another model's predictions: the same with noise on the logit."""
    p = table["probability"]
    logit = np.log(p / (1 - p)) + noise * np.random.default_rng(seed).normal(size=len(table))
    return table.assign(probability=1 / (1 + np.exp(-logit)))


def test_values_are_those_of_each_model_alone():
    table = cohort()
    other = second_model(table)
    found = paired(table, other, threshold=AT, other_threshold=0.2, resamples=100)
    for column, (rows, threshold) in {"value": (table, AT), "other": (other, 0.2)}.items():
        alone = bootstrap(Cases.of(rows), threshold=threshold, resamples=100)
        assert found["metric"].tolist() == alone["metric"].tolist()
        assert found[column].tolist() == alone["value"].tolist()
    np.testing.assert_array_equal(found["difference"], found["other"] - found["value"])
    assert ((found["low"] <= found["difference"]) & (found["difference"] <= found["high"])).all()


def test_two_thresholds_of_one_model():
    found = paired(cohort(many=200), threshold=0.3, other_threshold=0.1, level="patient").set_index("metric")
    assert found.loc["recall", "low"] > 0
    assert found.loc["specificity", "high"] < 0
    assert found.loc["auroc", "difference"] == 0


def test_order_of_rows_says_nothing():
    table = cohort()
    other = second_model(table)
    expected = paired(table, other, threshold=AT, resamples=50)
    mixed = other.sample(frac=1, random_state=0)
    pd.testing.assert_frame_equal(paired(table, mixed, threshold=AT, resamples=50), expected)


def test_pairs_make_the_interval_narrower_than_two_cohorts_would():
    table = cohort(many=200)
    found = paired(table, second_model(table, noise=0.2), threshold=AT).set_index("metric")
    alone = bootstrap(Cases.of(table), threshold=AT).set_index("metric")
    width, alone_width = found["high"] - found["low"], alone["high"] - alone["low"]
    assert (width < 0.6 * np.sqrt(2) * alone_width).all()


def test_difference_of_two_undefined_rates_is_refused_or_counted():
    with pytest.raises(ValueError, match="precision in 200"):
        paired(cohort(), threshold=AT, other_threshold=1.0, resamples=200)
    kept = paired(cohort(), threshold=AT, other_threshold=1.0, resamples=200, keep_undefined=True)
    row = kept.set_index("metric").loc["precision"]
    assert row["undefined"] == 200
    assert row[["other", "difference", "low", "high"]].isna().all()


def test_thresholds_are_both_given_or_none():
    table = cohort()
    assert not set(RATES) & set(paired(table, second_model(table), threshold=None, resamples=20)["metric"])
    with pytest.raises(ValueError, match="Only one threshold is given"):
        paired(table, threshold=None, other_threshold=0.5)
    with pytest.raises(ValueError, match="A threshold is a number; found nan"):
        paired(table, threshold=0.5, other_threshold=np.nan)


def test_tables_of_other_vertebrae_or_labels_are_refused_by_name():
    table = cohort()
    with pytest.raises(ValueError, match=r"1 cases are not in the second table: '1\.59 C7'"):
        paired(table, table[:-1], threshold=AT)
    with pytest.raises(ValueError, match=r"7 cases are not in the first table: '1\.0 C1', '1\.0 C2'"):
        paired(table[7:], table, threshold=AT)
    relabelled = table.assign(label=np.where(np.arange(len(table)) == 8, 1 - table["label"], table["label"]))
    with pytest.raises(ValueError, match=r"1 cases are labelled differently .*: '1\.1 C2'"):
        paired(table, relabelled, threshold=AT)
    with pytest.raises(ValueError, match="mix the splits"):
        paired(table.assign(split=np.where(table[UID] == "1.3", "test", "train")), table, threshold=AT)


@pytest.mark.slow
def test_differences_hold_the_truth_as_often_as_they_say():
    rng, sims = np.random.default_rng(0), 100

    def pair(many):
        labels, first = patients(rng, many, prevalence_logit=-3.5, separation=3.0)
        logit = np.log(first / (1 - first)) + rng.normal(size=first.shape)
        return table_of(labels, first), table_of(labels, 1 / (1 + np.exp(-logit)))

    def truth_of(table):
        own = np.repeat(np.arange(len(table) // 7), 7)
        cases = cases_of(table["label"].to_numpy(), table["probability"].to_numpy(), own, own[-1] + 1)
        found = estimates(cases, AT)
        return pd.Series(found.under(np.ones((own[-1] + 1, 1)))[:, 0], found.names)

    first, second = pair(60_000)
    truth, held = truth_of(second) - truth_of(first), 0
    for sim in range(sims):
        found = paired(*pair(80), threshold=AT, resamples=150, seed=sim, keep_undefined=True)
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
            found = paired(*tables, threshold=None, resamples=2, seed=draw, keep_undefined=True)
            low, high = found.set_index("metric").loc["brier", ["low", "high"]]
            held[name] += low <= truth[name] <= high
    for name, count in held.items():
        assert stats.binom.cdf(count, draws, 0.93) > 0.001, (name, count / draws)


def test_each_model_is_judged_by_its_own_patient_score():
    table = cohort()
    own = table.groupby(UID, as_index=False, sort=False)[["split", "label"]].max().assign(vertebra=PATIENT)
    models = [pd.concat([table, own.assign(probability=score)]) for score in (0.2, 0.4)]
    found = paired(*models, threshold=None, resamples=20).set_index("metric").loc["rsna_loss"]
    alone = [rsna_loss(Cases.of(model)) for model in models]
    assert found[["value", "other"]].tolist() == pytest.approx(alone)
    assert alone[0] != alone[1]


@needs_rsna
def test_real_weighted_log_loss_agrees_with_scikit_learn(real):
    highest = real.patients(Aggregation("max"))
    labels = np.concatenate([real.label, highest.label])
    probabilities = np.concatenate([real.probability, highest.probability])
    weights = np.repeat([1, 7], [len(real), len(highest)]) * (1 + labels)
    oracle = sk.log_loss(labels, probabilities, sample_weight=weights)
    assert rsna_loss(real, highest) == pytest.approx(oracle, abs=1e-12)


@needs_rsna
def test_real_per_patient_loss_is_that_of_the_participants_code(real, real_wide):
    truth = read_labels(RSNA / "train.csv").set_index(UID)
    wide = real_wide.set_index("uid")
    expected = as_participants_scored(
        truth.loc[wide.index, [PATIENT, *VERTEBRAE]].to_numpy(),
        wide[["Overall", *VERTEBRAE]].clip(1e-15, 1 - 1e-15),
    )
    assert rsna_loss(real, per_patient=True) == pytest.approx(expected, abs=1e-12)


def test_the_loss_refuses_incomplete_studies_and_patients_by_name():
    whole = cohort(many=2)
    with pytest.raises(ValueError, match=r"1 studies lack some of C1…C7.*'1\.1'"):
        rsna_loss(Cases.of(whole[:-1]))
    patients = Cases.of(whole).patients()
    with pytest.raises(ValueError, match=r"1 studies have no patient probability: '1\.1'"):
        rsna_loss(Cases.of(whole), patients.where(patients.study == "1.0"))


def test_the_models_own_patient_score_enters_the_loss_where_the_table_has_it():
    table = table_of(np.eye(2, 7, dtype=int), np.full((2, 7), 0.5))
    own = pd.DataFrame({UID: ["1.0", "1.1"], "vertebra": PATIENT, "split": table["split"][0], "label": 1})
    whole = pd.concat([table, own.assign(probability=[0.9, 0.8])], ignore_index=True)
    of_vertebrae = 8 * np.log(0.5)  # six intact of weight 1, one fractured of weight 2
    expected = -(2 * of_vertebrae + 14 * np.log(0.9) + 14 * np.log(0.8)) / (2 * 22)
    assert rsna_loss(Cases.of(whole)) == pytest.approx(expected, abs=1e-12)
    assert rsna_loss(Cases.of(table)) == pytest.approx(-np.log(0.5), abs=1e-12)
