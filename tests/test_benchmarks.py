import importlib
from dataclasses import asdict
from itertools import product

import numpy as np
import pandas as pd
import pytest
from scipy.special import expit
from test_environment import ROOT

from benchmarks import fracatlas_sample, triage
from benchmarks.__main__ import PARTS, render
from benchmarks.explanations import permuted, pooling_rows
from benchmarks.fracatlas import leak_design
from benchmarks.measure import Row, interleaved, ratio, spread
from cspine_helpers.decisions.confidence import usable
from cspine_helpers.decisions.frozen_triage import read_triage
from cspine_helpers.decisions.triage_search import shared_guarantees, winner_of
from cspine_helpers.evaluation.cases import Cases
from cspine_helpers.files.tables import read_columns
from cspine_helpers.labels import UID, VERTEBRAE
from cspine_helpers.radiographs.mask_cases import MaskCases


@pytest.mark.parametrize("part", PARTS)
def test_every_part_can_be_imported_and_has_rows(part):
    assert callable(importlib.import_module(f"benchmarks.{part}").rows)


def test_no_part_is_forgotten():
    modules = (ROOT / "benchmarks").glob("*.py")
    assert {path.stem for path in modules if "\ndef rows(" in path.read_text()} == set(PARTS)


def test_functions_are_timed_in_turn_after_a_warm_up():
    called = []
    times = interleaved({"a": lambda: called.append("a"), "b": lambda: called.append("b")}, repeats=2)
    assert called == list("ababab")
    assert [len(found) for found in times.values()] == [2, 2]


def test_a_ratio_is_that_of_medians_with_the_quartiles_of_its_repeats():
    assert ratio([2.0, 4.0, 6.0], [1.0, 2.0, 2.0]) == (2.0, 2.0, 3.0)
    assert spread((2.0, 1.234, 3.0)) == "2.00 (1.23–3.00)"


def test_results_name_machine_date_and_what_was_missed():
    rows = [Row("a step", "a peer", "0.9", "≥ 1", False, "noisy"), Row("memory", "", "2 GiB")]
    part = {"title": "Parts", "date": "2026-01-02", "machine": {"cores": "2"}, "versions": {"torch": "3"}}
    text = render({PARTS[0]: {**part, "rows": [asdict(row) for row in rows]}})
    assert "2026-01-02. cores 2; torch 3." in text
    assert "| a step | a peer | 0.9 | ≥ 1 | **no** |" in text
    assert "- a step: noisy" in text


def test_the_leaky_training_sees_the_judged_groups_and_the_clean_one_does_not():
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, 5, 60)
    patients = np.repeat([f"p{n:02d}" for n in range(60)], sizes)
    labels = np.repeat(rng.integers(0, 2, 60), sizes)
    images = [f"i{n:03d}" for n in range(len(patients))]
    table = pd.DataFrame({"image": images, "patient": patients, "label": labels})
    roles = leak_design(table)
    of = {name: table[table["image"].isin(each)] for name, each in roles.items()}
    judged = set(of["judged"]["patient"])
    assert judged
    assert judged.isdisjoint(of["clean"]["patient"])
    assert judged <= set(of["leaky"]["patient"])
    assert set(roles["judged"]).isdisjoint(roles["leaky"])
    counts = [of[name]["label"].value_counts().to_dict() for name in ("clean", "leaky")]
    assert counts[0] == counts[1]  # only whose images they are is different


def test_a_sample_is_half_fractured_half_wrong_one_a_patient_and_shows_every_trait():
    rng = np.random.default_rng(3)
    many = 300
    label = (rng.random(many) < 0.4).astype(int)
    names = [f"IMG{n:04}" for n in range(many)]
    table = pd.DataFrame({"image": names, "patient": [f"p{n // 2}" for n in range(many)], "label": label})
    table["probability"] = expit(rng.normal(0.7 * (2 * label - 1)))
    table["part"] = rng.choice(["hand", "leg", "hand+hip"], many, p=[0.6, 0.35, 0.05])
    table = table.assign(view="", hardware=0, multiscan=rng.random(many) < 0.1)
    odd = table.index[(label == 1)][7]
    table.loc[odd, "hardware"] = 1
    table["patient"] = table["patient"].where(table.index != odd, "alone")
    turned = pd.Series(table.index == table.index[label == 1][20])
    cases = MaskCases.of(table.astype({"multiscan": int}), truth={})
    chosen = fracatlas_sample.choose(cases, turned, threshold=0.5)
    assert chosen["kind"].value_counts().to_dict() == dict.fromkeys(
        ["hit", "miss", "false alarm", "cleared"], 6
    )
    assert chosen["patient"].is_unique
    assert chosen["turned"].sum() == (chosen["hardware"] == 1).sum() == 1
    assert (chosen["multiscan"] & chosen["label"]).any()
    shown = zip(chosen["part"], chosen["label"], strict=True)
    every = {(part, label) for words, label in shown for part in words.split("+")}
    assert every == set(product(("hand", "leg", "hip"), (0, 1)))
    again = fracatlas_sample.choose(cases, turned, threshold=0.5)
    pd.testing.assert_frame_equal(again, chosen)
    spread = chosen[chosen["kind"] == "cleared"]["probability"]
    assert spread.min() < 0.2
    assert spread.max() > 0.35
    with pytest.raises(ValueError, match="Use a larger split"):
        fracatlas_sample.choose(cases.where(table.index < 20), turned[:20], threshold=0.5)


def test_labels_of_other_patients_stay_in_their_split():
    split = pd.DataFrame({UID: [f"1.{n}" for n in range(90)], "split": ["train", "validation", "test"] * 30})
    donor = permuted(split)
    assert sorted(donor) == sorted(donor.values()) == sorted(split[UID])
    of = split.set_index(UID)["split"]
    assert all(of[uid] == of[other] for uid, other in donor.items())
    assert np.mean([uid == other for uid, other in donor.items()]) < 0.1


def test_a_run_that_answers_for_the_neighbour_is_told_from_one_that_does_not():
    rng, uids = np.random.default_rng(0), np.repeat([f"1.{n}" for n in range(60)], 7)
    table = pd.DataFrame({UID: uids, "vertebra": [*VERTEBRAE] * 60, "split": "test"})
    table["label"] = (rng.random(len(table)) < 0.1).astype(int)
    wide = np.pad(table["label"].to_numpy().reshape(-1, 7), ((0, 0), (1, 1)))
    beside = (wide[:, :-2] | wide[:, 2:]).ravel()
    noise = rng.normal(0, 1, len(table))
    right = table.assign(probability=expit(4 * table["label"] + noise))
    misled = table.assign(probability=expit(4 * np.maximum(table["label"], beside) + noise))
    found = pooling_rows((misled, 0.5), (right, 0.5)).set_index(["vertebrae", "metric"])
    told = found.loc[("neighbour told", "auroc")]
    assert told["reference"] > 0.95
    assert told["other"] == pytest.approx(0.5, abs=0.1)
    assert told["high"] < 0
    assert found.loc[("beside broken", "auroc"), "low"] > 0
    assert found.loc[("apart", "auroc"), ["low", "high"]].tolist() == [
        0,
        0,
    ]  # the same vertebrae, the same answers


@pytest.mark.parametrize("name", triage.LEVELS)
def test_the_triage_that_is_frozen_won_the_stored_search(name):
    predictions, text = triage.predictions_of(name), ("kind", "confidence")
    table = read_columns(triage.table_path(name, "triage_search"), what="search", source="", text=text)
    validation, features = Cases.of(predictions, split="validation"), triage.features_of(name)
    made = shared_guarantees(predictions, triage.RECALLS, level=triage.LEVELS[name], delta=triage.DELTA)
    found, _ = winner_of(table, validation, made, features)
    assert found == read_triage(triage.paths.run_dir(name)).triage
    settings = table[table["kind"] == "setting"]
    assert set(settings["confidence"]) == set(usable(features))
