import json
from dataclasses import replace
from math import ceil, log

import numpy as np
import pandas as pd
import pytest
from conftest import RSNA, needs_rsna
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom, binomtest
from test_evaluation_cases import toy

from cspine_helpers.decisions.guarantees import (
    Guarantee,
    RecallTarget,
    _fixed_bet,
    checked_guarantees,
    guarantee_on_validation,
    guarantee_recall,
    patients_needed,
)
from cspine_helpers.decisions.thresholds import Decision, Rule
from cspine_helpers.evaluation.cases import Aggregation, Cases, fit_logistic
from cspine_helpers.labels import UID, VERTEBRAE, read_labels
from cspine_helpers.metrics import confusion, rates
from cspine_helpers.predictions import from_wide, predictions_sha256


def patients_of(scores, intact=5):
    """Rows at patient level: fractured patients with these scores, and intact ones at 0.5."""
    labels = np.repeat([1, 0], [len(scores), intact])
    return labels, np.append(scores, np.full(intact, 0.5)), np.arange(len(labels)).astype(str)


def slow_patient_threshold(scores, recall, delta):
    """Fixed-sequence testing as it is written down: up from the lowest, until a test fails."""
    chosen = None
    for threshold in np.unique(scores):
        missed = int((scores < threshold).sum())
        # The one-sided Clopper-Pearson test that more than 1 - recall of all patients are missed.
        if binomtest(missed, len(scores), 1 - recall, alternative="less").pvalue > delta:
            break
        chosen = threshold
    return chosen


def slow_vertebra_threshold(groups, recall, delta, average):
    """The bet on each patient, at every threshold from its definition."""
    largest = recall * (7 if average == "vertebrae" else 1)
    bet = min(_fixed_bet(len(groups), 1 - recall, delta), 1 / largest)
    chosen = None
    for threshold in np.unique(np.concatenate(groups)):
        owned = 1.0
        for scores in groups:
            x = (scores < threshold).sum() - (1 - recall) * len(scores)
            owned *= 1 - bet * (x if average == "vertebrae" else x / len(scores))
        if owned < 1 / delta:
            break
        chosen = threshold
    return chosen


@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=120),
    st.sampled_from([0.5, 0.8, 0.9, 0.95]),
    st.sampled_from([0.05, 0.1, 0.3]),
)
def test_patients_as_by_testing_one_threshold_after_the_other(scores, recall, delta):
    scores = np.array(scores) / 40
    found = guarantee_recall(*patients_of(scores), RecallTarget(recall, delta=delta, level="patient"))
    assert found.threshold == slow_patient_threshold(scores, recall, delta)
    assert found.found == (0 if found.threshold is None else (scores >= found.threshold).sum())
    assert (found.patients, found.positives) == (len(scores), len(scores))


@pytest.mark.parametrize("average", ["vertebrae", "patients"])
@pytest.mark.parametrize(("recall", "delta"), [(0.7, 0.1), (0.9, 0.1), (0.8, 0.3)])
@pytest.mark.parametrize("seed", range(4))
def test_vertebrae_as_by_betting_at_one_threshold_after_the_other(seed, recall, delta, average):
    rng = np.random.default_rng(seed)
    groups = [np.round(rng.beta(2, 1, size), 2) for size in rng.integers(1, 8, 80)]  # with ties
    who = np.repeat(np.arange(len(groups)), [len(scores) for scores in groups])
    scores, labels = np.concatenate(groups), np.ones(len(who), dtype=int)
    mixed = rng.permutation(len(who))
    found = guarantee_recall(
        labels[mixed],
        scores[mixed],
        who[mixed],
        RecallTarget(recall, delta=delta, level="vertebra", average=average),
    )
    assert found.threshold is not None
    assert found.threshold == slow_vertebra_threshold(groups, recall, delta, average)


def test_worked_case():
    # 59 patients at recall 0.95: 0.95^59 = 0.0485, so that none may be missed; 0.95^58 = 0.051 is too much.
    scores = np.linspace(0.2, 0.9, 59)
    found = guarantee_recall(*patients_of(scores), RecallTarget(0.95, level="patient"))
    assert (found.threshold, found.found, found.needed) == (0.2, 59, 59)
    assert "recall of patients ≥ 0.95 with confidence 0.95: 59 of 59" in found.reason
    assert found.require() == 0.2
    none = guarantee_recall(*patients_of(scores[1:]), RecallTarget(0.95, level="patient"))
    assert (none.threshold, none.found, none.needed) == (None, 0, 59)
    with pytest.raises(ValueError, match=r"58 fractured patients are too few.*takes 59.*Use more patients"):
        none.require()


def test_what_would_suffice_is_counted_at_the_confidence_asked_for():
    rows = patients_of(np.linspace(0.2, 0.9, 25))
    for delta, needed in ((0.1, 22), (0.05, 29), (0.2, 16)):  # log δ / log 0.9, rounded up
        found = guarantee_recall(*rows, RecallTarget(0.9, delta=delta, level="patient"))
        assert found.needed == needed
        assert (found.threshold is None) == (needed > 25)
        assert found.threshold is not None or f"that takes {needed}, and more" in found.reason


def test_one_vertebra_is_judged_as_patients_are():
    rows = patients_of(np.linspace(0.2, 0.9, 80))
    single, whole = (guarantee_recall(*rows, RecallTarget(0.9, level=level)) for level in ("C3", "patient"))
    assert single.threshold == whole.threshold
    assert single.target.level == "C3"
    assert "recall of C3" in single.reason


def test_averages_of_patients_with_one_fracture_each_follow_hoeffdings_bound():
    scores = np.linspace(0.01, 0.99, 300)
    found = guarantee_recall(*patients_of(scores), RecallTarget(0.9, level="vertebra", average="patients"))
    missed = np.arange(1, 30) / 300
    divergence = missed * np.log(missed / 0.1) + (1 - missed) * np.log((1 - missed) / 0.9)
    assert found.positives - found.found == (300 * divergence >= log(1 / 0.05)).sum()
    exact = guarantee_recall(*patients_of(scores), RecallTarget(0.9, level="patient"))
    assert exact.threshold > found.threshold  # the exact test allows more misses
    assert found.needed == patients_needed(0.9) == 29


def test_needed_patients_suffice_and_one_fewer_do_not():
    # Patients with 1, 2 and 3 fractures in turn, all found.
    def of(patients):
        sizes = np.arange(patients) % 3 + 1
        who = np.repeat(np.arange(patients), sizes)
        return guarantee_recall(
            np.ones(len(who)), np.full(len(who), 0.7), who, RecallTarget(0.9, level="vertebra")
        )

    needed = of(30).needed
    assert of(30).threshold is None
    assert needed > 42
    enough = 3 * ceil(needed / 3)
    assert of(enough).threshold == 0.7
    assert of(enough - 3).threshold is None


@pytest.mark.parametrize(
    ("recall", "delta", "observed"), [(0.9, 0.05, 0.95), (0.8, 0.1, 0.85), (0.95, 0.2, 1)]
)
def test_patients_needed_is_the_first_number_that_passes(recall, delta, observed):
    needed = patients_needed(recall, delta=delta, observed=observed)
    numbers = np.arange(1, 2000)
    missed = np.ceil(np.round(numbers * (1 - observed), 6))
    assert needed == numbers[binom.cdf(missed, numbers, 1 - recall) <= delta][0]
    assert patients_needed(recall, delta=delta) == ceil(log(delta) / log(recall))


def test_what_a_hoped_for_threshold_would_take():
    scores = np.linspace(0.01, 1, 100)
    found = guarantee_recall(
        *patients_of(scores), RecallTarget(0.9, level="patient"), hoped=0.055
    )  # 5 missed
    assert found.needed_as_hoped == patients_needed(0.9, observed=0.95) > 100
    assert found.threshold < 0.055
    for level in ("patient", "vertebra"):
        out_of_reach = guarantee_recall(*patients_of(scores), RecallTarget(0.9, level=level), hoped=0.3)
        assert out_of_reach.needed_as_hoped is None
    vertebrae = guarantee_recall(*patients_of(scores), RecallTarget(0.9, level="vertebra"), hoped=0.055)
    assert vertebrae.needed_as_hoped > found.needed_as_hoped
    twice = np.tile(scores, 60)
    again = guarantee_recall(*patients_of(twice), RecallTarget(0.9, level="vertebra"))
    assert again.threshold >= 0.055


def test_order_of_rows_and_intact_rows_change_nothing():
    rng = np.random.default_rng(0)
    who = np.repeat(np.arange(150), 7)
    labels, scores = (rng.random(1050) < 0.3).astype(int), rng.random(1050)
    keywords = {"recall": 0.6, "level": "vertebra"}
    mixed = rng.permutation(1050)
    first = guarantee_recall(labels, scores, who, RecallTarget(**keywords))
    assert first == guarantee_recall(labels[mixed], scores[mixed], who[mixed], RecallTarget(**keywords))
    assert first == guarantee_recall(
        labels[labels == 1], scores[labels == 1], who[labels == 1], RecallTarget(**keywords)
    )


def test_a_guarantee_survives_json():
    of_arrays = guarantee_recall(*patients_of(np.linspace(0.1, 1, 90)), RecallTarget(0.9, level="patient"))
    of_table = on_table(level="patient", aggregation=Aggregation("top_k", k=2))
    for found in (of_arrays, of_table):
        assert Guarantee.from_record(json.loads(json.dumps(found.record()))) == found
    with pytest.raises(ValueError, match="must be in"):
        replace(of_arrays, threshold=1.2)


TABLE = pd.concat([toy(150), toy(80, seed=7, split="test")], ignore_index=True)
LEARNED = fit_logistic(Cases.of(TABLE, split="validation"))


def on_table(table=TABLE, **options):
    return guarantee_on_validation(table, RecallTarget(**{"recall": 0.8, "level": "vertebra"} | options))


@pytest.mark.parametrize("level", ["patient", "vertebra", "C7"])
def test_only_validation_rows_are_promised_on_and_the_guarantee_says_which(level):
    target = RecallTarget(0.5, delta=0.1, level=level, average="patients")
    if level == "patient":
        target = replace(target, aggregation=Aggregation("noisy_or"))
    found = guarantee_on_validation(TABLE, target, hoped=0.5)
    rows = TABLE[TABLE["split"] == "validation"]
    at = rows if level == "vertebra" else rows[rows["vertebra"] == level]
    at = Cases.of(rows, level="patient", aggregation=target.aggregation).table() if level == "patient" else at
    proof = guarantee_recall(at["label"], at["probability"], at[UID], target, hoped=0.5)
    assert found == replace(proof, rows_sha256=predictions_sha256(rows))
    checked_guarantees(found, TABLE)
    checked_guarantees(found, rows)
    with_other_test_rows = TABLE.assign(probability=TABLE["probability"].where(TABLE["split"] != "test", 0.5))
    checked_guarantees(found, with_other_test_rows)


def test_other_predictions_do_not_carry_a_guarantee():
    found = on_table()
    relabelled = TABLE.assign(split=TABLE["split"].map({"validation": "train", "test": "validation"}))
    for other in (TABLE.assign(probability=TABLE["probability"] / 2), relabelled):
        with pytest.raises(ValueError, match="made on other rows: their SHA-256 is"):
            checked_guarantees(found, other)
    with pytest.raises(ValueError, match="no row of the split 'validation'"):
        on_table(TABLE[TABLE["split"] == "test"])
    with pytest.raises(ValueError, match="made on arrays"):
        checked_guarantees(replace(found, rows_sha256=None), TABLE)


@pytest.mark.parametrize(
    "changes",
    [{"threshold": 0.9}, {"found": 150}, {"patients": 900}, {"recall": 0.95}, {"delta": 0.01},
     {"average": "patients"}],
    ids=str,
)  # fmt: skip
def test_a_guarantee_that_was_edited_is_noticed(changes):
    edited = Guarantee.from_record(on_table().record() | changes)
    with pytest.raises(ValueError, match=r"This one says: .* These rows say: "):
        checked_guarantees(edited, TABLE)


def test_a_guarantee_covers_thresholds_up_to_its_own_at_its_level_by_its_aggregation():
    noisy_or = Aggregation("noisy_or")
    found = on_table(level="patient", aggregation=noisy_or)

    def decision(threshold, level="patient", by=noisy_or):
        return Decision(Rule("stated", level=level, aggregation=by), threshold, 0.5, 0.5, "Stated.")

    assert all(found.covers(decision(threshold)) for threshold in (0.0, found.threshold))
    assert not found.covers(decision(np.nextafter(found.threshold, 1)))
    assert not found.covers(decision(0.0, by=Aggregation("max")))
    assert not found.covers(decision(0.0, by=None))
    assert not found.covers(decision(0.0, "vertebra", None))
    assert not replace(found, threshold=None).covers(decision(0.0))


def test_the_thresholds_of_vertebrae_are_covered_by_their_own_guarantees_alone():
    thresholds = dict.fromkeys(VERTEBRAE, 0.2) | {"C3": 0.9}
    decision = Decision(Rule("max_f1"), None, 0.5, 0.5, "Of each.", thresholds=thresholds)
    guarantees = {
        level: replace(on_table(), target=RecallTarget(0.8, level=level), threshold=0.5)
        for level in ("C1", "C3", "vertebra")
    }
    assert {level: found.covers(decision) for level, found in guarantees.items()} == {
        "C1": True, "C3": False, "vertebra": False,
    }  # fmt: skip


def test_levels_and_aggregations_that_do_not_belong_together_guarantee_nothing():
    for options, message in (
        ({"aggregation": Aggregation()}, "An aggregation belongs to the patient level"),
        ({"level": "patient", "aggregation": LEARNED}, "fitted on the validation patients"),
        ({"level": "all"}, "Unknown level 'all'"),
    ):
        with pytest.raises(ValueError, match=message):
            on_table(**options)
    assert on_table(level="patient").target.aggregation == Aggregation("max")


@needs_rsna
def test_real_predictions_at_every_level():
    wide = pd.read_csv(RSNA / "oof_predictions.csv", dtype={"uid": str})
    real = from_wide(wide, read_labels(RSNA / "train.csv"), "validation", missing="drop")
    for level, name in (("patient", "patient"), ("vertebra", "all"), ("C1", "C1"), ("C7", "C7")):
        rows = Cases.of(real).of_unit(name).table()
        found = guarantee_recall(
            rows["label"], rows["probability"], rows[UID], RecallTarget(0.8, level=level)
        )
        here = rates(confusion(rows["label"], rows["probability"], found.require())).iloc[0]
        assert (here["tp"], here["tp"] + here["fn"]) == (found.found, found.positives)
        assert 0.8 < here["recall"] < 0.9  # some way above what is promised, not far
    rows = Cases.of(real).of_unit("C3").table()
    few = guarantee_recall(rows["label"], rows["probability"], rows[UID], RecallTarget(0.97, level="C3"))
    assert few.threshold is None
    assert (few.patients, few.needed) == (rows["label"].sum(), 99)


def several(labels=(1, 0, 1), patients=("a", "b", "c"), hoped=None, **options):
    target = RecallTarget(**{"recall": 0.9, "level": "patient"} | options)
    return guarantee_recall(labels, [0.5] * len(labels), patients, target, hoped=hoped)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recall": 90}, "recall must be between 0 and 1; found 90"),
        ({"delta": 0.0}, "delta must be between 0 and 1; found 0.0"),
        ({"recall": float("nan")}, "recall must be between"),
        ({"level": "all"}, "Unknown level 'all'.*patient, vertebra, C1"),
        ({"average": "mean"}, "Unknown average 'mean'.*vertebrae, patients"),
        ({"hoped": -0.1}, r"A threshold must be in \[0, 1\]; found -0.1"),
        ({"labels": (0, 0, 0)}, "None of the 3 rows at level 'patient' is positive"),
        ({"labels": (0, 2, 1)}, "1 labels are neither 0 nor 1"),
        ({"patients": ("a", "b")}, r"Each of the 3 rows needs its patient; found shape \(2,\), 0 missing"),
        ({"patients": ("a", None, "c")}, r"found shape \(3,\), 1 missing"),
        (
            {"patients": ("a", "b", "a")},
            r"a patient has one row; found several of 1 \('a'\).*Keep one study of each",
        ),
        ({"patients": ("a", "b", "a"), "level": "C2"}, "At level 'C2' a patient has one row"),
        (
            {"labels": [1] * 8, "patients": ["a"] * 8, "level": "vertebra"},
            "has 7 vertebrae.*of 'a'.*one study of each",
        ),
    ],
)
def test_unusable_input_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        several(**options)


@pytest.mark.parametrize("observed", [0.9, 0.5, 1.1, float("nan")])
def test_no_number_of_patients_guarantees_more_than_is_observed(observed):
    with pytest.raises(ValueError, match="one must observe more than that"):
        patients_needed(0.9, observed=observed)


def test_more_than_a_hundred_thousand_patients_are_not_counted():
    with pytest.raises(ValueError, match="takes more than 131,072 patients"):
        patients_needed(0.9, observed=0.9002)


@pytest.mark.parametrize("level", ["patient", "vertebra", "C5"])
def test_a_guarantee_needs_one_study_of_each_patient_and_the_sentence_says_how_to_keep_one(level):
    once = toy(60)
    once["patient"] = once[UID]
    twice = pd.concat([once, once.assign(**{UID: once[UID] + ".9"})], ignore_index=True)
    options = {"level": level, "recall": 0.5, "delta": 0.2}
    options |= {"aggregation": Aggregation("max")} if level == "patient" else {}
    with pytest.raises(ValueError, match=r"counts patients, .* one study of each") as error:
        guarantee_on_validation(twice, RecallTarget(**options))
    first, several = once[UID].iloc[0], once[UID].nunique()
    assert f"several studies of {several} patients ({first!r}, " in str(error.value)
    call = str(error.value).partition("Keep one: ")[2]
    kept = eval(call, {"predictions": twice})
    found = guarantee_on_validation(kept, RecallTarget(**options))
    expected = guarantee_on_validation(once, RecallTarget(**options))
    assert found == replace(expected, rows_sha256=found.rows_sha256)


def test_several_studies_of_test_patients_do_not_stand_in_the_way_of_a_guarantee():
    table = TABLE.assign(patient=TABLE[UID])
    test = table[table["split"] == "test"]
    table = pd.concat([table, test.assign(**{UID: test[UID] + ".9"})], ignore_index=True)
    assert on_table(table).threshold == on_table().threshold
