import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from conftest import RSNA, needs_rsna
from hypothesis import given, settings
from hypothesis import strategies as st
from test_evaluation_cases import toy

from cspine_helpers.decisions import test_split as room
from cspine_helpers.decisions.guarantees import RecallTarget, guarantee_on_validation, guarantee_recall
from cspine_helpers.decisions.test_split import evaluate_on_test, freeze, read_decision, read_openings
from cspine_helpers.decisions.thresholds import (
    Rule,
    choose_decision,
    choose_per_vertebra,
    choose_threshold,
    state_threshold,
)
from cspine_helpers.evaluation.calibration import calibrated, fit_calibrator
from cspine_helpers.evaluation.cases import Aggregation, Cases, fit_logistic
from cspine_helpers.files.paths import sha256_of
from cspine_helpers.files.records import write_sealed
from cspine_helpers.files.tables import write_table
from cspine_helpers.labels import UID, VERTEBRAE, read_labels
from cspine_helpers.metrics import confusion, rates
from cspine_helpers.predictions import from_wide, predictions_sha256, read_predictions, write_predictions
from cspine_helpers.splits import split_hash, split_patients

WHOLE = pd.concat([toy(150), toy(80, seed=7, split="test")], ignore_index=True)
LEARNED = fit_logistic(Cases.of(WHOLE, split="validation"))
VERTEBRA = choose_decision(WHOLE, Rule(precision_floor=0.5))
PATIENT = choose_decision(WHOLE, Rule("max_youden", level="patient", aggregation=Aggregation("noisy_or")))
BOTH = [VERTEBRA, PATIENT]
SPLIT = WHOLE[[UID, "split"]].drop_duplicates()
NOISY_OR, MAX = Aggregation("noisy_or"), Aggregation("max")
OTHER = WHOLE.assign(probability=WHOLE["probability"] ** 2)
ON_TEST = WHOLE.assign(split=WHOLE["split"].map({"test": "validation", "validation": "test"}))


@pytest.fixture
def clock(monkeypatch):
    """A clock that goes on by a day at each look."""
    days = iter(range(1, 29))

    def now():
        return f"2026-11-{next(days):02d}T12:00:00+00:00"

    monkeypatch.setattr(room, "now_utc", now)


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def change(folder, **changes):
    """Change the record, and its seal with it."""
    record = json.loads((folder / "decision.json").read_text()) | changes
    write_sealed(folder / "decision.json", record)


@pytest.mark.parametrize(
    "decision",
    [
        VERTEBRA,
        PATIENT,
        choose_per_vertebra(WHOLE, Rule("max_f1"), min_positives=5),
        choose_decision(WHOLE, Rule("max_f1", level="patient", aggregation=LEARNED)),
    ],
    ids=["vertebra", "patient", "each vertebra", "learned"],
)
def test_a_frozen_decision_comes_back(tmp_path, decision):
    run = tmp_path / "run"
    made = freeze(run, decision, WHOLE)
    found = read_decision(run)
    assert made == found
    assert (found.decisions, found.guarantees, found.folder) == ({decision.rule.level: decision}, (), run)
    assert found.record["predictions_sha256"] == predictions_sha256(WHOLE)
    assert found.record["split_sha256"] == split_hash(SPLIT)
    assert found.record["chosen_on"] == {"split": "validation", "patients": 150, "vertebrae": 1050}
    assert found.said(decision.rule.level, "test_openings_before") == 0
    freeze(run, next(each for each in BOTH if each.rule.level != decision.rule.level), WHOLE)
    results = evaluate_on_test(run, WHOLE)
    assert results["level"].tolist() == ["all", *VERTEBRAE, "patient"]


def test_both_levels_are_chosen_before_the_test_split_is_opened(tmp_path):
    for first, second in (BOTH, BOTH[::-1]):
        folder = tmp_path / first.rule.level
        freeze(folder, first, WHOLE)
        with pytest.raises(ValueError, match=f"No decision at {second.rule.level} level .*freeze that"):
            evaluate_on_test(folder, WHOLE)
        assert read_openings(folder).empty
        freeze(folder, second, WHOLE)  # beside the other, which stays
        assert read_decision(folder).decisions == {each.rule.level: each for each in BOTH}
        evaluate_on_test(folder, WHOLE)
        assert read_openings(folder)[["level", "objective"]].to_numpy().tolist() == [
            ["vertebra and patient", "max_recall and max_youden"]
        ]
    with pytest.raises(ValueError, match="Each level has one Decision; found several for 'vertebra'"):
        freeze(tmp_path, [VERTEBRA, VERTEBRA], WHOLE)
    with pytest.raises(ValueError, match="No decision is handed in"):
        freeze(tmp_path, [], WHOLE)


def test_a_level_that_validation_cannot_choose_at_needs_no_decision(tmp_path):
    patients = WHOLE.groupby(UID)["label"].transform("max")
    table = WHOLE[(patients == 1) | (WHOLE["split"] == "test")]
    freeze(tmp_path, choose_decision(table, Rule("max_f1")), table)
    assert evaluate_on_test(tmp_path, table)["level"].tolist() == ["all", *VERTEBRAE]


def test_the_predictions_hash_is_that_of_their_file(tmp_path):
    path = tmp_path / "predictions.csv"
    write_predictions(WHOLE, path)
    assert predictions_sha256(read_predictions(path)) == predictions_sha256(WHOLE) == sha256_of(path)


def test_two_scans_of_each_patient_are_counted_as_studies_of_half_as_many_patients(tmp_path):
    table = WHOLE.assign(patient=WHOLE[UID])
    table = pd.concat([table, table.assign(**{UID: table[UID] + ".9"})], ignore_index=True)
    chosen = [
        choose_decision(table, Rule("max_f1")),
        choose_decision(table, Rule("max_f1", level="patient", aggregation=MAX)),
    ]
    found = freeze(tmp_path, chosen, table).record["chosen_on"]
    assert found == {"split": "validation", "patients": 150, "vertebrae": 2100}
    results = evaluate_on_test(tmp_path, table).set_index("level")
    assert (results["patients"] == 80).all()
    assert (results["studies"] == 160).all()
    assert results.loc["patient", ["tp", "fp", "fn", "tn"]].sum() == 160


def test_results_on_the_test_split_are_those_of_its_rows_alone(tmp_path):
    table = WHOLE.drop(index=WHOLE.index[-3:])
    table = table.assign(
        label=table["label"].where((table["split"] != "test") | (table["vertebra"] != "C2"), 0)
    )
    patient = choose_decision(table, Rule("max_youden", level="patient", aggregation=Aggregation()))
    freeze(tmp_path, [VERTEBRA, patient], table)
    found = evaluate_on_test(tmp_path, table).set_index("level")
    ill = Cases.of(table, split="test", level="patient").table()
    by_patient = rates(confusion(ill["label"], ill["probability"], patient.require())).iloc[0]
    for name in ("tp", "fp", "fn", "tn", "recall", "precision", "specificity"):
        assert found.loc["patient", name] == by_patient[name], name
    assert found.loc["patient", ["patients", "incomplete"]].tolist() == [80, 1]
    found = found.drop(index="patient")
    test = table[table["split"] == "test"]
    expected = rates(confusion(test["label"], test["probability"], VERTEBRA.require())).iloc[0]
    for name in ("tp", "fp", "fn", "tn", "recall", "precision", "specificity", "f1", "accuracy"):
        assert found.loc["all", name] == expected[name], name
    assert found.loc[["all", "C1", "C7"], "patients"].tolist() == [80, 80, 79]
    assert found.loc[["all", "C1", "C7"], "incomplete"].tolist() == [1, 1, 0]
    assert np.isnan(found.loc["C2", "recall"])
    assert found.loc["C2", "undefined"] >= 1
    assert (found["undefined"] == found.isna().sum(axis=1)).all()
    counted = found.drop(index="all")[["tp", "fp", "fn", "tn"]].sum()
    assert (counted == found.loc["all", ["tp", "fp", "fn", "tn"]]).all()


def test_freezing_and_opening_again_change_no_byte(tmp_path, clock):
    first = freeze(tmp_path, BOTH, WHOLE)
    results = evaluate_on_test(tmp_path, WHOLE)
    before = files(tmp_path)
    assert set(before) == {"decision.json", "test_openings.csv"}
    for again in (False, True):
        for part in (BOTH, BOTH[::-1], PATIENT, VERTEBRA):
            assert freeze(tmp_path, part, WHOLE, replace=again).sha256 == first.sha256
        pd.testing.assert_frame_equal(evaluate_on_test(tmp_path, WHOLE), results)
        assert files(tmp_path) == before


def test_each_decision_that_opened_the_test_split_stays_on_record(tmp_path, clock):
    assert read_openings(tmp_path).empty
    first = freeze(tmp_path, BOTH, WHOLE)
    evaluate_on_test(tmp_path, WHOLE)
    opened = read_decision(tmp_path)
    assert opened.sha256 == first.sha256
    other = choose_decision(WHOLE, Rule("max_f1"))
    with pytest.raises(
        FileExistsError,
        match=r"holds another decision: Highest recall .*vertebra level.*opened 1 time.*replace",
    ):
        freeze(tmp_path, [other, PATIENT], WHOLE)
    assert read_decision(tmp_path) == opened
    second = freeze(tmp_path, other, WHOLE, replace=True)
    assert second.decisions == {"vertebra": other, "patient": PATIENT}
    assert second.said("vertebra", "test_openings_before") == 1
    assert second.said("patient", "test_openings_before") == 0  # as it stood
    evaluate_on_test(tmp_path, WHOLE)
    table = read_openings(tmp_path)
    assert tuple(table.columns) == room.COLUMNS
    assert table["decision_sha256"].tolist() == [first.sha256, second.sha256]
    assert (table["predictions_sha256"] == predictions_sha256(WHOLE)).all()
    assert table["objective"].tolist() == ["max_recall and max_youden", "max_f1 and max_youden"]
    assert table["opened_utc"].is_monotonic_increasing
    assert pd.read_csv(tmp_path / "test_openings.csv").shape == (2, 6)


def test_nothing_is_told_where_the_opening_cannot_be_recorded(tmp_path):
    freeze(tmp_path, BOTH, WHOLE)
    path = tmp_path / "test_openings.csv"
    path.mkdir()
    with pytest.raises(OSError, match=r"test_openings\.csv was not written"):
        evaluate_on_test(tmp_path, WHOLE)
    path.rmdir()
    evaluate_on_test(tmp_path, WHOLE)
    path.write_text(path.read_text().replace("max_youden", "max_recall"))
    with pytest.raises(ValueError, match=r"test_openings\.csv is not the file that was written"):
        evaluate_on_test(tmp_path, WHOLE)


@pytest.fixture
def opened(tmp_path, clock):
    """A folder whose test split was opened with two decisions, and the record of openings after the first."""
    freeze(tmp_path, BOTH, WHOLE)
    evaluate_on_test(tmp_path, WHOLE)
    older = (tmp_path / "test_openings.csv").read_bytes()
    freeze(tmp_path, choose_decision(WHOLE, Rule("max_f1")), WHOLE, replace=True)
    evaluate_on_test(tmp_path, WHOLE)
    return tmp_path, older


def test_openings_that_were_deleted_cut_off_or_set_back_are_missed(opened):
    folder, older = opened
    path = folder / "test_openings.csv"
    whole, decision = path.read_bytes(), read_decision(folder)
    lines = whole.splitlines(keepends=True)
    for content in (None, older, lines[0], lines[0] + lines[2], lines[0] + lines[2] + lines[1], b""):
        path.unlink() if content is None else path.write_bytes(content)
        for act in (
            lambda: read_openings(folder),
            lambda: evaluate_on_test(folder, WHOLE),
            lambda: freeze(folder, list(decision.decisions.values()), WHOLE),
        ):
            with pytest.raises(
                ValueError, match=r"test_openings\.csv (has|is not the file that was written)"
            ):
                act()
    path.write_bytes(whole)
    assert len(read_openings(folder)) == 2
    evaluate_on_test(folder, WHOLE)


FITTED = [
    fit_calibrator(Cases.of(WHOLE, split="validation"), kind="platt"),
    fit_calibrator(Cases.of(WHOLE, split="validation").patients(Aggregation("noisy_or")), kind="temperature"),
]


def test_calibrators_are_frozen_with_the_decisions_and_applied_beside_the_predictions(tmp_path, clock):
    made = freeze(tmp_path, BOTH, WHOLE, calibrators=FITTED)
    found = read_decision(tmp_path)
    assert found == made
    assert found.calibrators == {"all": FITTED[0], "patient": FITTED[1]}
    table = found.calibrate(WHOLE)
    vertebrae, patients = (
        table[table["vertebra"] != "patient_overall"],
        Cases.of(WHOLE, level="patient", aggregation=NOISY_OR).table(),
    )
    pd.testing.assert_frame_equal(vertebrae.drop(columns="calibrated"), WHOLE)
    np.testing.assert_array_equal(vertebrae["calibrated"], calibrated(FITTED[0], WHOLE["probability"]))
    rows = table[table["vertebra"] == "patient_overall"]
    assert rows[UID].tolist() == patients[UID].tolist()
    np.testing.assert_array_equal(rows["probability"], patients["probability"])
    np.testing.assert_array_equal(rows["calibrated"], calibrated(FITTED[1], patients["probability"]))


def test_a_calibrator_of_later_says_so_and_another_needs_to_be_asked_for(tmp_path, clock):
    first = freeze(tmp_path, BOTH, WHOLE)
    with pytest.raises(ValueError, match=r"No calibrator is frozen in .*choose_calibrator"):
        first.calibrate(WHOLE)
    evaluate_on_test(tmp_path, WHOLE)
    second = freeze(tmp_path, BOTH, WHOLE, calibrators=FITTED[:1])
    assert second.sha256 != first.sha256
    assert second.record["calibrators"]["all"]["test_openings_before"] == 1
    assert second.said("vertebra", "test_openings_before") == 0
    assert set(second.calibrate(WHOLE)["vertebra"]) == set(VERTEBRAE)
    elsewhere = replace(FITTED[0], slope=FITTED[0].slope * (1 + 1e-12))  # another machine rounds otherwise
    assert freeze(tmp_path, BOTH, WHOLE, calibrators=[elsewhere]) == second
    other = fit_calibrator(Cases.of(WHOLE, split="validation"), kind="temperature")
    with pytest.raises(FileExistsError, match=r"holds another calibrator \('all'\)\. The test split was"):
        freeze(tmp_path, BOTH, WHOLE, calibrators=[other])
    third = freeze(tmp_path, BOTH, WHOLE, calibrators=[other], replace=True)
    assert third.calibrators == {"all": other}


@pytest.mark.parametrize(
    ("calibrator", "message"),
    [
        (replace(FITTED[0], slope=2.0), "was not fitted on the validation split of these predictions"),
        (replace(FITTED[0], patients=7), "was not fitted on the validation split of these predictions"),
        (
            fit_calibrator(Cases.of(ON_TEST, split="validation"), kind="platt"),
            "was not fitted on the validation split",
        ),
        (
            fit_calibrator(Cases.of(WHOLE, split="validation", level="patient"), kind="platt"),
            "patients by the aggregation of their decision",
        ),
        (FITTED[0].record(), "Pass a Calibrator for each level; found dict"),
    ],
    ids=["by hand", "other counts", "test split", "other aggregation", "dict"],
)
def test_a_calibrator_of_something_else_is_refused(tmp_path, calibrator, message):
    with pytest.raises(ValueError, match=message):
        freeze(tmp_path, BOTH, WHOLE, calibrators=[calibrator])
    assert not list(tmp_path.iterdir())


def test_a_calibrator_for_patients_needs_their_decision(tmp_path):
    with pytest.raises(ValueError, match=r"one for 'patient' without\. Pass that decision"):
        freeze(tmp_path, VERTEBRA, WHOLE, calibrators=FITTED)


def test_a_patient_decision_by_another_aggregation_takes_its_calibrator_with_it(tmp_path):
    freeze(tmp_path, BOTH, WHOLE, calibrators=FITTED)
    again = choose_decision(WHOLE, Rule("max_f1", level="patient", aggregation=NOISY_OR))
    assert set(freeze(tmp_path, again, WHOLE, replace=True).calibrators) == {"all", "patient"}
    other = choose_decision(WHOLE, Rule("max_f1", level="patient", aggregation=MAX))
    with pytest.raises(FileExistsError, match=r"another decision: .* \(patient level\)"):
        freeze(tmp_path, other, WHOLE)
    with pytest.raises(ValueError, match="patients by the aggregation of their decision"):
        freeze(tmp_path, other, WHOLE, calibrators=FITTED, replace=True)  # handed in, it is held to it
    found = freeze(tmp_path, other, WHOLE, replace=True)
    assert found.decisions == {"vertebra": VERTEBRA, "patient": other}
    assert found.calibrators == {"all": FITTED[0]}


@pytest.mark.parametrize("left", [0, 1])
def test_a_lost_record_can_be_started_again_but_what_was_lost_still_counts(opened, left):
    folder, older = opened
    path, standing = folder / "test_openings.csv", list(read_decision(folder).decisions.values())
    path.write_bytes(older) if left else path.unlink()
    freeze(folder, standing, WHOLE, replace=True)
    assert read_decision(folder).record["openings"]["lost"] == 2 - left
    evaluate_on_test(folder, WHOLE)
    assert len(read_openings(folder)) == 1 + left
    new = freeze(folder, BOTH, WHOLE, replace=True)
    assert new.said("vertebra", "test_openings_before") == 3


def test_a_stop_between_the_opening_and_its_memory_blocks_nothing(tmp_path, monkeypatch, clock):
    freeze(tmp_path, BOTH, WHOLE)
    monkeypatch.setattr(room, "remember_openings", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        evaluate_on_test(tmp_path, WHOLE)
    monkeypatch.undo()
    assert read_decision(tmp_path).record["openings"]["rows"] == 0
    assert len(read_openings(tmp_path)) == 1
    evaluate_on_test(tmp_path, WHOLE)
    assert len(read_openings(tmp_path)) == 1
    (tmp_path / "test_openings.csv").unlink()
    with pytest.raises(ValueError, match="has 0 row"):
        read_openings(tmp_path)


def of_format_1(folder, *, threshold=None):
    """A run folder as the version before left it: one decision, and openings with their hash beside them."""
    part = VERTEBRA.record() | ({} if threshold is None else {"threshold": threshold})
    record = {
        "format": 1, "decision": part, "guarantee": {"threshold": 0.9, "level": "patient", "recall": 0.9},
        "split_sha256": split_hash(SPLIT), "predictions_sha256": predictions_sha256(WHOLE),
        "chosen_on": {"split": "validation", "patients": 150, "vertebrae": 1050},
        "frozen_utc": "2026-10-01T12:00:00+00:00", "test_openings_before": 0,
        "versions": {"cspine_helpers": "0.1.0"},
    }  # fmt: skip
    write_sealed(folder / "decision.json", record)
    name = json.loads((folder / "decision.json").read_text())["record_sha256"]
    row = ("2026-10-01T12:00:01+00:00", name, predictions_sha256(WHOLE), "vertebra", "max_recall")
    table = pd.DataFrame([row], columns=list(room.COLUMNS))
    write_table(table, folder / "test_openings.csv", sealed=True)
    return name


def test_a_run_of_the_version_before_gains_the_other_level_and_keeps_its_history(tmp_path, clock):
    name = of_format_1(tmp_path)
    found = read_decision(tmp_path)
    assert (found.decisions, found.guarantees, found.sha256) == ({"vertebra": VERTEBRA}, (), name)
    with pytest.raises(ValueError, match="No decision at patient level is frozen"):
        evaluate_on_test(tmp_path, WHOLE)
    before = files(tmp_path)
    assert freeze(tmp_path, VERTEBRA, WHOLE).sha256 == name
    assert files(tmp_path) == before

    new = freeze(tmp_path, BOTH, WHOLE)
    assert new.said("vertebra", "frozen_utc") == "2026-10-01T12:00:00+00:00"
    assert [new.said(level, "test_openings_before") for level in ("vertebra", "patient")] == [0, 1]
    assert json.loads((tmp_path / "decision.json").read_text())["format"] == 2
    evaluate_on_test(tmp_path, WHOLE)
    assert set(files(tmp_path)) == {"decision.json", "test_openings.csv"}
    table = read_openings(tmp_path)
    assert table["decision_sha256"].tolist() == [name, new.sha256]
    assert table["opened_utc"][0] == "2026-10-01T12:00:01+00:00"


@pytest.mark.parametrize(
    "gone", ["decision", "split_sha256", "predictions_sha256", "chosen_on", "frozen_utc"]
)
def test_a_record_of_the_version_before_that_lacks_a_part_is_refused(tmp_path, gone):
    of_format_1(tmp_path)
    record = json.loads((tmp_path / "decision.json").read_text())
    del record[gone]
    write_sealed(tmp_path / "decision.json", record)
    with pytest.raises(ValueError, match=f"no whole decision: {gone} is missing"):
        read_decision(tmp_path)


def test_a_run_of_the_version_before_with_another_decision_is_not_replaced_unasked(tmp_path, clock):
    of_format_1(tmp_path, threshold=0.123)
    with pytest.raises(FileExistsError, match=r"holds another decision.*opened 1 time\(s\)"):
        freeze(tmp_path, BOTH, WHOLE)
    new = freeze(tmp_path, BOTH, WHOLE, replace=True)
    assert [new.said(level, "test_openings_before") for level in ("vertebra", "patient")] == [1, 1]
    evaluate_on_test(tmp_path, WHOLE)
    assert len(read_openings(tmp_path)) == 2


def test_openings_of_the_version_before_are_held_to_their_hash_until_they_are_rewritten(tmp_path, clock):
    of_format_1(tmp_path)
    path, seal = tmp_path / "test_openings.csv", tmp_path / "test_openings.csv.sha256"
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"max_recall", b"max_f1"))
    with pytest.raises(ValueError, match=r"test_openings\.csv is not the file that was written"):
        read_openings(tmp_path)
    path.unlink()
    with pytest.raises(ValueError, match=r"test_openings\.csv was deleted.*Bring it back"):
        read_openings(tmp_path)
    path.write_bytes(whole)
    old_seal = seal.read_bytes()
    seal.unlink()
    with pytest.raises(ValueError, match=r"test_openings\.csv is not the file that was written"):
        read_openings(tmp_path)
    seal.write_bytes(old_seal)
    freeze(tmp_path, BOTH, WHOLE)
    evaluate_on_test(tmp_path, WHOLE)
    seal.write_bytes(old_seal)  # an older seal beside the newer file
    assert len(read_openings(tmp_path)) == 2
    evaluate_on_test(tmp_path, WHOLE)


def test_the_test_split_stays_shut_without_a_frozen_decision(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"decision\.json is missing\. Choose one on the validation"):
        evaluate_on_test(tmp_path, WHOLE)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (
            WHOLE.assign(probability=WHOLE["probability"].round(6)),
            r"with other predictions: their SHA-256 is ",
        ),
        (WHOLE[WHOLE["split"] == "test"], r"Pass the whole table .* choose again on the validation split"),
        (WHOLE.sample(frac=1, random_state=0), "with other predictions"),
        (WHOLE.assign(probability=2.0), r"no numbers in \[0, 1\]"),
        (pd.concat([WHOLE, WHOLE[:1]]), "repeat StudyInstanceUID and vertebra"),
        (WHOLE.assign(split=["validation", "test"] * 805), "more than one split"),
    ],
)
def test_other_predictions_do_not_open_the_test_split(tmp_path, table, message):
    freeze(tmp_path, BOTH, WHOLE)
    with pytest.raises(ValueError, match=message):
        evaluate_on_test(tmp_path, table)
    assert read_openings(tmp_path).empty


def test_predictions_without_test_rows_have_nothing_to_open(tmp_path):
    table = WHOLE[WHOLE["split"] == "validation"]
    freeze(tmp_path, BOTH, table)
    with pytest.raises(ValueError, match="no row of the split 'test'; found 'validation'"):
        evaluate_on_test(tmp_path, table)
    assert read_openings(tmp_path).empty


def test_a_run_that_was_trained_on_another_split_since_does_not_open_it(tmp_path):
    write_sealed(tmp_path / "run.json", {"format": 1, "data": {"split_sha256": "a" * 64}})
    assert freeze(tmp_path, BOTH, WHOLE).record["split_sha256"] == "a" * 64
    evaluate_on_test(tmp_path, WHOLE)
    write_sealed(tmp_path / "run.json", {"format": 1, "data": {"split_sha256": "b" * 64}})
    with pytest.raises(
        ValueError, match=r"another split: its SHA-256 is a{64}, that of the run now is b{64}"
    ):
        evaluate_on_test(tmp_path, WHOLE)


def test_a_decision_made_on_test_patients_is_not_frozen(tmp_path):
    test = WHOLE[WHOLE["split"] == "test"]
    peeked = choose_threshold(test["label"], test["probability"], Rule(precision_floor=0.5))
    with pytest.raises(
        ValueError, match=r"not made on the validation split .*recall is .*cases is 1050, the dec"
    ):
        freeze(tmp_path, peeked, WHOLE)
    with pytest.raises(ValueError, match="specificity is"):
        freeze(tmp_path, replace(VERTEBRA, specificity=0.99, cases=None, positives=None), WHOLE)
    assert not list(tmp_path.iterdir())


def test_no_threshold_no_validation_rows_and_no_aggregation_are_not_frozen(tmp_path):
    nothing = choose_threshold([0, 1, 0], [0.9, 0.5, 0.2], Rule(precision_floor=0.6))
    with pytest.raises(ValueError, match="No threshold keeps precision"):
        freeze(tmp_path, nothing, WHOLE)
    with pytest.raises(ValueError, match="no row of the split 'validation'"):
        freeze(tmp_path, VERTEBRA, WHOLE[WHOLE["split"] == "test"])
    with pytest.raises(ValueError, match="not say how the vertebrae of a patient become one probability"):
        freeze(tmp_path, replace(PATIENT, rule=Rule("max_youden", level="patient")), WHOLE)


def promise(table=WHOLE, **options):
    return guarantee_on_validation(table, RecallTarget(**{"level": "vertebra", "recall": 0.8} | options))


def stated(threshold, aggregation=None, table=WHOLE):
    """A decision for a threshold: at patient level with an aggregation, else at that of vertebrae."""
    cases = Cases.of(table, split="validation")
    cases = cases if aggregation is None else cases.patients(aggregation)
    return state_threshold(cases, threshold, reason="By hand.")


def test_a_guarantee_that_covers_the_threshold_is_kept(tmp_path):
    found = promise()
    decision = stated(found.threshold)
    frozen_one = freeze(tmp_path, decision, WHOLE, guarantees=found)
    assert read_decision(tmp_path).guarantees == (found,)
    assert freeze(tmp_path, decision, WHOLE, guarantees=[found]) == frozen_one
    with pytest.raises(FileExistsError, match="holds another decision"):
        freeze(tmp_path, decision, WHOLE, guarantees=promise(recall=0.75))


def test_each_vertebra_has_its_own_guarantee(tmp_path):
    each = choose_per_vertebra(WHOLE, Rule("max_precision", recall_floor=1.0), min_positives=5)
    promises = [promise(level=name, recall=0.3, delta=0.3) for name in each.thresholds]
    assert freeze(tmp_path, each, WHOLE, guarantees=promises).guarantees == tuple(promises)
    with pytest.raises(ValueError, match=r"guarantees are for 'C1', 'C2', 'C4'.*'C3', 'C4'.*one for each"):
        freeze(tmp_path, each, WHOLE, guarantees=promises[:2] + promises[3:], replace=True)


BY_NOISY_OR = promise(level="patient", aggregation=NOISY_OR)


@pytest.mark.parametrize(
    ("decision", "guarantee", "message"),
    [
        (stated(0.9), promise(), r"up to 0\.\d+ at level 'vertebra'; the decision has 0\.9"),
        (stated(0.0), promise(recall=0.999), "up to None at level 'vertebra'"),
        (stated(0.0), BY_NOISY_OR, r"are for 'patient', .* at patient level .* for nothing"),
        (stated(0.0, MAX), BY_NOISY_OR, r"at level 'patient' by noisy or; the decision has 0.* by max"),
        (stated(0.0), promise(OTHER), "made on other rows"),
        (stated(0.0), promise(ON_TEST), "made on other rows"),
        (stated(0.0), replace(promise(), threshold=1.0), "This one says: .* These rows say:"),
        (stated(0.0), promise().record(), "make it with guarantee_on_validation.*Found dict"),
        (stated(0.0), [promise().record()], "make it with guarantee_on_validation.*Found dict"),
        (
            stated(0.0),
            guarantee_recall([1] * 90, [0.5] * 90, range(90), RecallTarget(0.9, level="vertebra")),
            "made on arrays",
        ),
    ],
    ids=[
        "above", "none", "other level", "other aggregation", "other predictions", "test split", "by hand",
        "one dict", "dict", "arrays",
    ],
)  # fmt: skip
def test_a_guarantee_of_something_else_is_refused(tmp_path, decision, guarantee, message):
    with pytest.raises(ValueError, match=message):
        freeze(tmp_path, decision, WHOLE, guarantees=guarantee)
    assert not list(tmp_path.iterdir())


def test_decisions_and_calibrators_that_are_no_list_of_them_are_named(tmp_path):
    with pytest.raises(ValueError, match="Pass a Decision for each level; found dict"):
        freeze(tmp_path, VERTEBRA.record(), WHOLE)
    with pytest.raises(ValueError, match="Pass a Calibrator for each level; found dict"):
        freeze(tmp_path, VERTEBRA, WHOLE, calibrators=FITTED[0].record())
    assert freeze(tmp_path, VERTEBRA, WHOLE, calibrators=FITTED[0]).calibrators == {"all": FITTED[0]}


@needs_rsna
def test_a_guarantee_for_noisy_or_is_not_frozen_with_the_highest_on_real_predictions(tmp_path):
    labels = read_labels(RSNA / "train.csv")
    wide = pd.read_csv(RSNA / "oof_predictions.csv", dtype={"uid": str})
    real = from_wide(wide, labels, split_patients(labels), missing="drop")
    found = promise(real, level="patient", aggregation=NOISY_OR, recall=0.9)
    wrong, right = (stated(found.require(), by, real) for by in (MAX, NOISY_OR))
    assert wrong.recall < 0.65 < 0.9 < right.recall
    with pytest.raises(ValueError, match=r"by noisy or; the decision has .* by max"):
        freeze(tmp_path, wrong, real, guarantees=found)
    assert freeze(tmp_path, right, real, guarantees=found).guarantees == (found,)


def part(**changes):
    return {"decisions": {"patient": {"decision": PATIENT.record(), "guarantees": []} | changes}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 3}, "of format 3; this version reads format 2. It was written by"),
        (part(decision=None), "its decision is no object"),
        (part(decision={"threshold": 0.5}), "decision.objective is missing"),
        (part(decision={**PATIENT.record(), "colour": 1}), "decision.colour is unknown"),
        (
            part(decision={**PATIENT.record(), "threshold": 1.5}),
            r"decision\.json: A threshold must be in \[0, 1\]",
        ),
        (part(decision={**PATIENT.record(), "threshold": "0.5"}), r"decision\.json: "),
        (part(decision={**PATIENT.record(), "aggregation": {"method": "median"}}), "Unknown aggregation"),
        (part(decision={**PATIENT.record(), "aggregation": {"way": "max"}}), r"decision\.json: "),
        (part(guarantees=[{"threshold": 0.5}]), r"decision\.json: "),
        ({"decisions": []}, r"decision\.json: "),
        ({"calibrators": {"all": {"calibrator": {"kind": "platt"}}}}, "A calibrator's record has the fields"),
    ],
)
def test_a_record_that_is_no_decision_is_refused(tmp_path, changes, message):
    freeze(tmp_path, PATIENT, WHOLE)
    change(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        read_decision(tmp_path)
    with pytest.raises(ValueError, match=message):
        freeze(tmp_path, PATIENT, WHOLE)
    assert freeze(tmp_path, PATIENT, WHOLE, replace=True).decisions == {"patient": PATIENT}


@pytest.mark.parametrize("target", ["elsewhere.json", None])
def test_nothing_is_frozen_through_a_link_out_of_the_folder(tmp_path, target):
    run, outside = tmp_path / "run", tmp_path / "elsewhere.json"
    run.mkdir()
    if target is not None:
        outside.write_text("theirs")
    (run / "decision.json").symlink_to(outside)
    for replaced in (False, True):
        with pytest.raises(ValueError, match=r"decision\.json is a link out of its folder"):
            freeze(run, VERTEBRA, WHOLE, replace=replaced)
    assert (run / "decision.json").is_symlink()
    assert outside.read_text() == "theirs" if target else not outside.exists()


@pytest.mark.parametrize(
    "gone",
    ["decisions", "calibrators", "split_sha256", "predictions_sha256", "chosen_on", "openings"],
)
def test_a_record_that_lacks_a_part_is_refused(tmp_path, gone):
    freeze(tmp_path, PATIENT, WHOLE)
    record = json.loads((tmp_path / "decision.json").read_text())
    del record[gone]
    write_sealed(tmp_path / "decision.json", record)
    with pytest.raises(ValueError, match=f"no whole decision: {gone} is missing"):
        read_decision(tmp_path)


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return freeze(folder, PATIENT, WHOLE), (folder / "decision.json").read_bytes()


@settings(max_examples=150, derandomize=True, database=None)
@given(place=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255))
def test_any_byte_changed_is_noticed_or_means_the_same(record, place, flip):
    made, content = record
    at = int(place * len(content))
    (made.folder / "decision.json").write_bytes(
        content[:at] + bytes([content[at] ^ flip]) + content[at + 1 :]
    )
    try:
        assert read_decision(made.folder).decisions == {"patient": PATIENT}
    except ValueError as error:
        assert "decision.json" in str(error)  # noqa: PT017  # no error is as good


@needs_rsna
def test_a_decision_on_real_predictions_opens_their_test_split_once(tmp_path):
    labels = read_labels(RSNA / "train.csv")
    wide = pd.read_csv(RSNA / "oof_predictions.csv", dtype={"uid": str})
    real = from_wide(wide, labels, split_patients(labels), missing="drop")
    each = choose_per_vertebra(real, Rule("max_f1"), min_positives=10)
    assert len(each.thresholds) == 7
    decision = choose_decision(
        real, Rule("max_recall", level="patient", aggregation=Aggregation("noisy_or"), specificity_floor=0.5)
    )
    vertebra = choose_decision(real, Rule("max_f1"))
    freeze(tmp_path, [vertebra, decision], real)
    found = evaluate_on_test(tmp_path, real).set_index("level").loc["patient"]
    assert (found["patients"], found["incomplete"], found["undefined"]) == (403, 0, 0)
    assert abs(found["recall"] - decision.recall) < 0.1
    evaluate_on_test(tmp_path, real)
    assert len(read_openings(tmp_path)) == 1
