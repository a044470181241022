import numpy as np
import pandas as pd
import pytest
from conftest import RSNA, needs_rsna
from scipy.stats import binom, binomtest
from simulated import patients, table_of

from cspine_helpers.decisions.simulation import (
    Population,
    Truth,
    _World,
    simulate_guarantee,
    simulate_triage,
)
from cspine_helpers.evaluation.cases import Cases
from cspine_helpers.figures.curves import guarantee_picture
from cspine_helpers.labels import read_labels
from cspine_helpers.predictions import from_wide

TARGETS = ["patient", "vertebra", "vertebra, patient mean"]


@pytest.fixture(scope="module")
def table():
    return simulate_guarantee(
        redraws=1500, truth=Truth(separation=1.5, severity=0.0, correlation=0.85), seed=1
    )


def of(table, method):
    return table[table["method"] == method].set_index("target")


def recall_by_drawing(world, threshold, target, rng):
    fractured, probabilities = world.draw(200_000, rng)
    found = (probabilities >= threshold) & fractured
    if target == "patient":
        return (probabilities.max(axis=1) >= threshold).mean()
    if target == "vertebra":
        return found.sum() / fractured.sum()
    return (found.sum(axis=1) / fractured.sum(axis=1)).mean()


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("truth", [Truth(), Truth(2.0, 0.5, 0.9), Truth(1.0, -0.3, 0.0)])
def test_true_recall_is_that_of_many_patients(truth, target):
    rng = np.random.default_rng(0)
    for threshold in (0.4, 0.6, 0.8):
        seen = recall_by_drawing(truth, threshold, target, rng)
        assert truth.recall(threshold, target) == pytest.approx(seen, abs=0.005)


def test_true_specificity_is_that_of_many_patients():
    truth, rng = Truth(correlation=0.7), np.random.default_rng(0)
    logits = np.sqrt(0.7) * rng.standard_normal((200_000, 1)) + np.sqrt(0.3) * rng.standard_normal(
        (200_000, 7)
    )
    below = logits < np.log(0.6 / 0.4)
    assert truth.specificity(0.6, "vertebra") == pytest.approx(below.mean(), abs=0.005)
    assert truth.specificity(0.6, "patient") == pytest.approx(below.all(axis=1).mean(), abs=0.005)


@pytest.mark.slow
def test_the_guarantee_is_broken_no_more_often_than_promised(table):
    kept = of(table, "guaranteed")
    assert list(kept.index) == TARGETS
    assert (kept["no_threshold"] == 0).all()
    for broken in kept["violations"]:
        assert binomtest(broken, 1500, 0.1, alternative="greater").pvalue > 0.01
    # Scores without ties: a patient is missed or not, so that the share is known.
    assert binomtest(kept.loc["patient", "violations"], 1500, binom.cdf(14, 200, 0.1)).pvalue > 0.001


@pytest.mark.slow
def test_the_validation_threshold_is_broken_about_half_the_time(table):
    plain = of(table, "validation")
    assert plain["violation_rate"].between(0.45, 0.62).all()
    assert binomtest(plain.loc["patient", "violations"], 1500, binom.cdf(20, 200, 0.1)).pvalue > 0.001


@pytest.mark.slow
def test_vertebrae_taken_as_independent_break_it_too_often(table):
    wrong = of(table, "vertebrae as if independent").loc["vertebra"]
    assert wrong["low"] > 0.1
    assert of(table, "guaranteed").loc["vertebra", "high"] < 0.1


@pytest.mark.slow
def test_a_promise_costs_specificity(table):
    promised, plain = (
        of(table, name).loc[TARGETS[:2], "specificity"] for name in ("guaranteed", "validation")
    )
    assert (promised < plain).all()


def test_redraws_without_a_promise_are_counted_and_break_nothing():
    few = simulate_guarantee(patients=10, redraws=5)
    kept = of(few, "guaranteed")
    assert (kept["no_threshold"] == 5).all()
    assert (kept["violations"] == 0).all()
    assert kept[["recall_50", "specificity"]].isna().all(axis=None)
    with pytest.raises(
        ValueError, match=r"No redraw gave a threshold for 'patient: guaranteed'.*more patients"
    ):
        guarantee_picture(few, recall=0.9, delta=0.1)


def test_the_same_seed_gives_the_same_table():
    first, again, other = (simulate_guarantee(patients=60, redraws=4, seed=seed) for seed in (3, 3, 4))
    pd.testing.assert_frame_equal(first, again)
    assert not first.equals(other)


def test_the_picture_names_each_target_and_method():
    table = simulate_guarantee(redraws=20)
    left, right = guarantee_picture(table, recall=0.9, delta=0.1).axes
    names = [label.get_text() for label in left.get_yticklabels()]
    assert names[0] == "patients\nguaranteed"
    assert len(names) == len(table) == 6
    assert [text.get_text() for text in right.texts] == [f"{share:.1%}" for share in table["violation_rate"]]


def hand_made():
    """Three patients: a with two fractures, b with one, c with none; b lacks C2."""
    rows = [("a", "C1", 1, 0.8), ("a", "C2", 1, 0.2), ("a", "C3", 0, 0.9), ("b", "C1", 1, 0.4)]
    rows += [("b", "C3", 0, 0.1), ("c", "C1", 0, 0.3), ("c", "C2", 0, 0.5)]
    table = pd.DataFrame(rows, columns=["StudyInstanceUID", "vertebra", "label", "probability"])
    return table.assign(split="validation")


def test_a_population_of_three_patients():
    world = Population(hand_made())
    thresholds = [0.2, 0.3, 0.5, 0.85]
    np.testing.assert_allclose(world.recall(thresholds, "patient"), [1, 1, 1 / 2, 1 / 2])
    np.testing.assert_allclose(world.recall(thresholds, "vertebra"), [1, 2 / 3, 1 / 3, 0])
    np.testing.assert_allclose(world.recall(thresholds, "vertebra, patient mean"), [1, 3 / 4, 1 / 4, 0])
    np.testing.assert_allclose(world.specificity(thresholds, "patient"), [0, 0, 0, 1])
    np.testing.assert_allclose(world.specificity(thresholds, "vertebra"), [1 / 4, 1 / 4, 1 / 2, 3 / 4])
    for target in TARGETS:
        seen = recall_by_drawing(world, 0.3, target, np.random.default_rng(0))
        assert world.recall(0.3, target) == pytest.approx(seen, abs=0.005)


@pytest.mark.slow
@needs_rsna
def test_real_patients_drawn_again_keep_the_promise():
    wide = pd.read_csv(RSNA / "oof_predictions.csv", dtype={"uid": str})
    real = from_wide(wide, read_labels(RSNA / "train.csv"), "validation", missing="drop")
    drawn = simulate_guarantee(truth=Population(real), redraws=1000)
    for broken in of(drawn, "guaranteed")["violations"]:
        assert binomtest(broken, 1000, 0.1, alternative="greater").pvalue > 0.01
    assert of(drawn, "validation")["violation_rate"].between(0.4, 0.65).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Truth(correlation=1.0), r"correlation must be in \[0, 1\); found 1.0"),
        (lambda: simulate_guarantee(patients=0), "At least one patient and one redraw; found 0 and 2000"),
        (lambda: simulate_guarantee(redraws=1, recall=1.0), "recall must be between 0 and 1"),
        (lambda: Population(hand_made()[:5]), "2 of 2 patients have a fracture; both kinds are needed"),
        (lambda: Population(hand_made()[5:]), "0 of 1 patients have a fracture"),
    ],
)
def test_unusable_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# ------------------------------------------------------------------------------------------------- triage


@pytest.mark.slow
def test_deferral_leaves_the_guarantee_as_it_is_whatever_defers():
    """An adversary can lose fractures, but not call them negative: violations, with deferral on, are few."""
    delta = 0.1
    found = simulate_triage(redraws=200, patients=60, delta=delta, names=["map_entropy"]).set_index(
        "confidence"
    )
    alone = found.loc["none"]
    assert (found["low"] <= delta).all()
    assert 0.01 < alone["violation_rate"] <= delta + 0.03  # not 0, or this would show nothing
    same = ["no_threshold", "violations", "recall_5", "recall_50", "recall_95"]
    assert (found.drop("search")[same] == alone[same]).all(axis=None)
    assert (found.drop("none")["coverage"] < 0.85).all()  # the search defers, too
    assert found.loc["adversarial", "recall_lost"] < found.loc["random", "recall_lost"] - 0.1


def test_triage_in_a_world_is_answered_as_its_recall_says():
    """One redraw by hand: recall with deferred found is that of p_low, with lost that of the cut."""
    table = table_of(*patients(np.random.default_rng(3), 300))
    world = _World(table, None, ["distance"])
    found = world.redraw(40, 0.8, 0.1, 0.5, np.random.default_rng(5))
    rng = np.random.default_rng(5)
    known, _ = world.draw(40, rng)
    highest = known.probability.reshape(80, 7).max(axis=1)
    p_low = np.sort(highest[:40])[int(binom.ppf(0.1, 40, 0.2)) - 1]  # so many misses are allowed, and no more
    assert binom.cdf(int(binom.ppf(0.1, 40, 0.2)) - 1, 40, 0.2) <= 0.1
    suspected = np.sort(highest[highest >= p_low])
    cut = suspected[len(suspected) // 2]
    ill, best = Population(table).fractured, Population(table).probabilities.max(axis=1)
    assert ill.any(axis=1).all()
    asked, recall, lost, coverage = found["distance"]
    everybody = Cases.of(table).patients().probability
    assert (asked, recall, lost) == (0.8, (best >= p_low).mean(), (best >= cut).mean())
    assert coverage == ((everybody < p_low) | (everybody >= cut)).mean()
    assert found["none"][:2] == (asked, recall)


def test_where_no_threshold_is_guaranteed_everything_is_suspected_and_nothing_violated():
    found = simulate_triage(patients=5, recall=0.99, redraws=3, names=["distance"]).set_index("confidence")
    assert (found.drop("search")[["no_threshold", "violations"]] == [3, 0]).all(axis=None)
    assert (found.drop("search")["recall_50"] == 1).all()


def test_worlds_that_cannot_be_simulated_are_refused():
    table = table_of(*patients(np.random.default_rng(0), 30))
    with pytest.raises(ValueError, match="one patient and one redraw; found 0 and 2"):
        simulate_triage(patients=0, redraws=2)
    with pytest.raises(ValueError, match="share to defer lies between 0 and 1; found 1"):
        simulate_triage(deferred=1)
    with pytest.raises(ValueError, match="30 of 30 patients have a fracture"):
        simulate_triage(table.assign(label=1))
    with pytest.raises(ValueError, match="C1 … C7 each; found 209 vertebrae of 30 studies"):
        simulate_triage(table.iloc[1:])
    with pytest.raises(ValueError, match="The table of features lacks the column"):
        simulate_triage(table, pd.DataFrame({"entropy": [0.5]}), redraws=2)
