import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import RSNA, needs_rsna
from simulated import cohort
from sklearn.metrics import log_loss, roc_auc_score

from cspine_helpers import __version__
from cspine_helpers.decisions.guarantees import RecallTarget, guarantee_on_validation
from cspine_helpers.decisions.test_split import evaluate_on_test, freeze, read_openings
from cspine_helpers.decisions.thresholds import (
    Decision,
    Rule,
    choose_decision,
    choose_per_vertebra,
    state_threshold,
)
from cspine_helpers.evaluation.calibration import fit_calibrator
from cspine_helpers.evaluation.cases import Aggregation, Cases
from cspine_helpers.evaluation.intervals import bootstrap, per_vertebra, rsna_loss
from cspine_helpers.evaluation.reliability import calibration_scores, written_scores
from cspine_helpers.files.paths import sha256_of
from cspine_helpers.files.records import write_sealed
from cspine_helpers.labels import UID, VERTEBRAE, read_labels
from cspine_helpers.metrics import auroc, confusion
from cspine_helpers.model_card import results as findings
from cspine_helpers.model_card.card import write_card
from cspine_helpers.model_card.results import TITLES, number
from cspine_helpers.phantom.cohort import MADE_BY
from cspine_helpers.predictions import from_wide, read_predictions, write_predictions
from cspine_helpers.runs import write_ensemble

BUILTIN = Path(__file__).parents[1] / "checkpoints" / "builtin"
VALIDATION = cohort(1, 60)
TEST = cohort(2, 40).assign(split="test")
VALIDATION[UID], TEST[UID] = "9.8.7." + VALIDATION[UID], "9.8.6." + TEST[UID]
WHOLE = pd.concat([VALIDATION, TEST], ignore_index=True)
CHOSEN = choose_decision(WHOLE, Rule(precision_floor=0.3))
PATIENT = choose_decision(WHOLE, Rule("max_youden", level="patient", aggregation=Aggregation("noisy_or")))
RECORD = {
    "format": 1,
    "record_sha256": "",
    "model": {
        "backbone": "tf_efficientnetv2_b0",
        "pretrained": "/home/somebody/weights/b0.safetensors",
        "slices": 5,
        "size": 32,
        "feature_stride": 4,
        "pooling": "avg",
        "lstm_hidden": 8,
        "lstm_layers": 1,
        "vertebra_embedding": 0,
    },
    "train": {"epochs": 7, "seed": 3, "slice_epochs": 2, "precision_floor": 0.3},
    "pretrained": {"source": "file", "name": "b0.safetensors", "sha256": "aa11"},
    "parameters": 11,
    "loss": {"alpha": 0.875},
    "data": {"cohort": "hospital", "labels_sha256": "a" * 64, "split_sha256": "b" * 64},
    "versions": {"torch": "2.9.1"},
    "decision": CHOSEN.record(),
    "metrics": {"validation": {"auroc": 0.8125}},
    "best_epoch": 2,
    "left_out": {"train": {"1.2.3": ["C1: missing"], "1.2.4": ["C1: missing"]}},
}


def write_run(folder, *, table=WHOLE, **changes):
    """A run as training and inference leave it, without the network that it would take."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.safetensors").write_bytes(b"weights: by their hash alone")
    (folder / "history.csv").write_text("epoch,train_loss\n1,0.5\n2,0.25\n3,0.25\n")
    hashes = {
        "weights_sha256": sha256_of(folder / "model.safetensors"),
        "history_sha256": sha256_of(folder / "history.csv"),
    }
    write_sealed(folder / "run.json", RECORD | hashes | changes)
    if table is not None:
        write_predictions(table, folder / "predictions.csv")
    return folder


@pytest.fixture(scope="module", autouse=True)
def few_resamples():
    """Fewer resamples, in the card and in what it is compared with: a card in a moment."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(findings, "RESAMPLES", 100)
        yield


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path / "toy")


def text_of(folder):
    text = write_card(folder).read_text(encoding="utf-8")
    check_form(text, folder)
    return text


@pytest.fixture(scope="module")
def card(tmp_path_factory):
    """The card of a run, for the tests that only read it."""
    return text_of(write_run(tmp_path_factory.mktemp("card") / "toy"))


def check_form(text, folder):
    """What holds of every card."""
    assert text.startswith(f"# Model card: `{folder.name}`\n")
    assert "Research software, not a medical device" in text
    assert "Copyright RSNA, 2023" in text
    assert not re.search(r"\b(nan|inf|None|NaN|TODO|TBD)\b", text)
    assert not re.search(r"[{}]|<[a-z]", text)
    assert str(folder.parent) not in text
    assert not re.search(r"(?<![\w.`])/(home|tmp|work|root|Users)/", text)
    assert text.endswith("\n")
    assert "\n\n\n" not in text
    tables_of(text)


def tables_of(text):
    """Section and first two columns of each table → its rows; a block with a bar must be a whole table."""
    found, section = {}, ""
    for block in text.split("\n\n"):
        lines = block.strip("\n").split("\n")
        if lines[0].startswith("## "):
            section = lines[0].removeprefix("## ")
        if "|" not in re.sub(r"\\\|", "", block):
            continue
        cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)] for line in lines]
        assert all(row[0] == row[-1] == "" for row in cells), block
        assert {len(row) for row in cells} == {len(cells[0])}, block
        assert set(cells[1][1:-1]) == {"---"}, block
        assert all(cell for row in cells for cell in row[1:-1]), block
        header, _, *rows = [row[1:-1] for row in cells]
        assert (section, *header[:2]) not in found
        found[section, *header[:2]] = [dict(zip(header, row, strict=True)) for row in rows]
    return found


def written(row):
    low, high = number(row["low"]), number(row["high"])
    return f"{number(row['value'])} ({low}{' to ' if '−' in low + high else '–'}{high})"


VALUE = "value (95 % interval)"
NAMES = {title: name for name, title in TITLES.items()}


def test_every_result_is_that_of_the_modules(card):
    tables, section = tables_of(card), "Results on validation"
    counts = confusion(VALIDATION["label"], VALIDATION["probability"], CHOSEN.require()).iloc[0]
    cells = [
        [row["predicted fractured"], row["predicted intact"]]
        for row in tables[section, "vertebrae", "predicted fractured"]
    ]
    assert cells == [[f"{counts[name]:.0f}" for name in pair] for pair in (("tp", "fn"), ("fp", "tn"))]

    cases = {"vertebrae": Cases.of(VALIDATION), "patients": Cases.of(VALIDATION, level="patient")}
    vertebrae = bootstrap(cases["vertebrae"], threshold=CHOSEN.require(), resamples=100).set_index("metric")
    patients = bootstrap(cases["patients"], threshold=None, resamples=100).set_index("metric")
    title = "vertebrae at the threshold"
    rates = {NAMES[row[title]]: row[VALUE] for row in tables[section, title, VALUE]}
    assert rates == {name: written(vertebrae.loc[name]) for name in rates}
    assert list(rates) == ["recall", "precision", "specificity", "npv", "f1", "accuracy"]

    ranking = {(row["level"], NAMES[row["metric"]]): row for row in tables[section, "level", "metric"]}
    assert len(ranking) == 4
    for (level, name), row in ranking.items():
        assert row[VALUE] == written({"vertebrae": vertebrae, "patients": patients}[level].loc[name])
    shares = {level: of.label.mean() for level, of in cases.items()}
    for level, prevalence in shares.items():
        assert ranking[level, "auroc"]["chance"] == "0.500"
        assert ranking[level, "average_precision"]["chance"] == number(prevalence)

    calibration = {(row["level"], NAMES[row["score"]]): row for row in tables[section, "level", "score"]}
    assert len(calibration) == 10
    for level, name in calibration:
        source = {"vertebrae": vertebrae, "patients": patients}[level]
        expected = written(source.loc[name]) if name in source.index else None
        if name in ("bias", "slope", "ece"):
            expected = written_scores(calibration_scores(cases[level], resamples=100))[name].replace("-", "−")
        assert calibration[level, name][VALUE] == expected, (level, name)
    p = shares["vertebrae"]
    constants = {
        name: calibration["vertebrae", name]["always saying the share of fractures"]
        for name in ("brier", "log_loss")
    }
    assert constants == {
        "brier": number(p * (1 - p)),
        "log_loss": number(log_loss(VALIDATION["label"], [p] * len(VALIDATION))),
    }

    losses = {NAMES[row["loss"]]: row for row in tables[section, "loss", VALUE]}
    assert list(losses) == ["rsna_loss", "rsna_loss_per_patient"]
    constant = [of.with_probability(shares[level]) for level, of in cases.items()]
    for name, row in losses.items():
        assert row[VALUE] == written(vertebrae.loc[name])
        always = rsna_loss(*constant, per_patient=name != "rsna_loss")
        assert row["always saying the share of fractures"] == number(always)


def test_each_vertebra_has_its_counts(card):
    rows = tables_of(card)["Results on validation", "vertebra", "studies"]
    expected = per_vertebra(Cases.of(VALIDATION), threshold=CHOSEN.require(), resamples=100)
    assert [row["vertebra"] for row in rows] == list(VERTEBRAE)
    for row in rows:
        part = expected[expected["vertebra"] == row["vertebra"]].set_index("metric")
        assert [row["studies"], row["fractured"]] == [
            str(part[name].iloc[0]) for name in ("studies", "positives")
        ]
        for name in ("recall", "precision", "auroc", "average_precision"):
            rare = part["undefined"][name] > 5
            value = f"{number(part['value'][name])} (no interval)" if rare else written(part.loc[name])
            assert row[TITLES[name].partition(" (")[0]] == (
                "undefined" if value.startswith("undef") else value
            )


def test_the_splits_are_counted(card):
    rows = {row["split"]: row for row in tables_of(card)["Data", "split", "patients"]}
    assert list(rows) == ["train", "validation", "test"]
    assert rows["train"]["patients"] == "not on record"
    assert rows["train"]["fractured vertebrae"] == "not on record (0.125)"  # 1 − alpha
    for name, table in (("validation", VALIDATION), ("test", TEST)):
        broken, ill = table["label"].sum(), int(table.groupby(UID)["label"].max().sum())
        assert rows[name]["patients"] == str(table[UID].nunique())
        assert rows[name]["fractured patients"] == f"{ill} ({number(ill / table[UID].nunique())})"
        assert rows[name]["fractured vertebrae"] == f"{broken} ({number(broken / len(table))})"


def test_model_training_and_inputs_are_those_of_the_record(run):
    text = text_of(run)
    record = json.loads((run / "run.json").read_text())
    for words in (
        "5 axial slices of 32 × 32 pixels", "pretrained weights, b0.safetensors of SHA-256 `aa11`)",
        "has 11 parameters",
        "3 of at most 7 epochs, seed 3. Kept: epoch 2", "a precision of 0.300 or more",
        "does not know which vertebra",
        "Cohort `hospital`", "does not say where the CT came from", "AUROC of 0.812 here", "torch 2.9.1",
        "skipped, as their files could not be used (2 of train)", "one seed (3)",
        "Trained with torch 2.9.1.", f"with cspine_helpers {__version__}",
        "--cohort hospital --run toy-again --settings checkpoints/toy/run.json",
    ):  # fmt: skip
        assert words in text, words
    hashes = {row["SHA-256 of"]: row["is"] for row in tables_of(text)["How to reproduce", "SHA-256 of", "is"]}
    assert hashes == {
        "labels of the cohort": f"`{'a' * 64}`",
        "split of the cohort": f"`{'b' * 64}`",
        "manifest of the cohort": "none",
        "weights": f"`{record['weights_sha256']}`",
        "history": f"`{record['history_sha256']}`",
        "record": f"`{record['record_sha256']}`",
        "predictions": f"`{sha256_of(run / 'predictions.csv')}`",
        "frozen decision": "none",
    }


def test_no_study_is_named(card):
    assert not [uid for uid in ("9.8.7.", "9.8.6.", "1.2.3", "1.2.4") if uid in card]


def test_the_same_files_give_the_same_bytes(run, tmp_path):
    first = write_card(run).read_bytes()
    shutil.copytree(run, tmp_path / "elsewhere" / "toy")
    assert write_card(tmp_path / "elsewhere" / "toy").read_bytes() == first
    assert sorted(path.name for path in run.iterdir() if path.name.startswith(".")) == []


def test_the_best_epoch_being_the_last_is_a_limit(run, card):
    words = "The best epoch was the last one"
    assert words not in card
    assert words in text_of(write_run(run, best_epoch=3))


def test_an_older_record_without_the_number_of_parameters_says_nothing_of_it(tmp_path):
    assert "parameters." not in text_of(write_run(tmp_path / "toy", parameters=None))


def counts(patients, ill, vertebrae, fractured):
    levels = {"patient": ill, "vertebra": fractured}
    return {"studies": patients, "patients": patients, "sequences": vertebrae, "fractured": levels}


def test_the_training_split_and_its_phantoms_are_those_of_the_record(tmp_path):
    facts = {"counts": {"train": counts(1200, 300, 8390, 839)}, "phantom": {"made_by": MADE_BY}}
    text = text_of(write_run(tmp_path / "toy", cohort=facts))
    assert "synthetic CT phantoms" in text
    row = tables_of(text)["Data", "split", "patients"][0]
    assert list(row.values()) == ["train", "1,200", "300 (0.250)", "8,390", "839 (0.100)"]


def test_of_an_older_run_the_training_split_is_not_on_record(tmp_path):
    text = text_of(write_run(tmp_path / "toy"))
    assert "does not say where the CT came from" in text
    row = tables_of(text)["Data", "split", "patients"][0]
    assert list(row.values()) == ["train", *["not on record"] * 3, "not on record (0.125)"]


@pytest.mark.parametrize(
    ("gone", "words"),
    [
        (["model.safetensors"], ["weights (`model.safetensors`) are not in the folder"]),
        (["history.csv"], ["not on record of at most 7 epochs"]),
        (["predictions.csv"], ["Without `predictions.csv`, nothing is known of validation and test"]),
        (["predictions.csv.sha256"], ["## Results on validation"]),
        (
            ["run.json", "model.safetensors", "history.csv"],
            [
                "Not known: the folder holds predictions without a run",
                "No threshold was chosen",
                "What the model was trained on is not known",
            ],
        ),
    ],
)
def test_what_is_missing_is_named(run, gone, words):
    for name in gone:
        (run / name).unlink()
    text = text_of(run)
    for each in words:
        assert each in text


def test_a_folder_with_nothing_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"run\.json and predictions\.csv are missing. Train one"):
        write_card(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["run.json", "history.csv", "model.safetensors", "predictions.csv", "decision.json", "test_openings.csv"],
)
def test_a_damaged_file_is_refused_by_its_name_and_the_old_card_stays(run, name):
    freeze(run, [CHOSEN, PATIENT], WHOLE)
    evaluate_on_test(run, WHOLE)
    before = write_card(run).read_bytes()
    content = bytearray((run / name).read_bytes())
    content[len(content) // 2] ^= 1
    (run / name).write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(name)):
        write_card(run)
    assert (run / "MODEL_CARD.md").read_bytes() == before


def test_a_record_without_a_whole_decision_is_refused(run):
    with pytest.raises(ValueError, match=r"run\.json holds no whole decision: .*threshhold.*Restore it"):
        write_card(write_run(run, decision={"threshhold": 0.5}))


def test_a_link_out_of_the_folder_is_refused(run, tmp_path):
    (run / "predictions.csv").rename(tmp_path / "predictions.csv")
    (run / "predictions.csv").symlink_to(tmp_path / "predictions.csv")
    with pytest.raises(ValueError, match="link out of its folder"):
        write_card(run)


def test_a_decision_of_other_predictions_or_another_split_is_refused(run):
    freeze(run, CHOSEN, WHOLE)
    write_run(run, data=RECORD["data"] | {"split_sha256": "c" * 64})
    with pytest.raises(
        ValueError, match=r"decision\.json was frozen with another split: its SHA-256 is b+, .* now is c+"
    ):
        write_card(run)
    write_run(run, table=WHOLE.assign(probability=WHOLE["probability"] / 2))
    with pytest.raises(ValueError, match=r"decision\.json was frozen with other predictions"):
        write_card(run)


@pytest.mark.parametrize(
    "decision",
    [
        pytest.param(CHOSEN, id="vertebra"),
        pytest.param(
            choose_per_vertebra(WHOLE, Rule("max_f1"), min_positives=1), id="each", marks=pytest.mark.slow
        ),
    ],
)
def test_test_results_appear_once_the_split_was_opened_with_the_frozen_decisions(run, decision):
    section = "Results on test"
    assert section not in text_of(run)
    freeze(run, [decision, PATIENT], WHOLE)
    text = text_of(run)
    assert section not in text
    assert "never opened, by the record: no results" in text
    assert read_openings(run).empty  # the card opens nothing
    results = evaluate_on_test(run, WHOLE).set_index("level")
    text, openings = text_of(run), read_openings(run)
    assert len(openings) == 1
    tables = tables_of(text)
    for what, level in (("vertebrae", "all"), ("patients", "patient")):
        fractured, intact = tables[section, what, "predicted fractured"]
        found = [
            row[column]
            for row in (fractured, intact)
            for column in ("predicted fractured", "predicted intact")
        ]
        assert found == [str(results.loc[level, name]) for name in ("tp", "fn", "fp", "tn")]
        title = f"{what} at the threshold"
        for row in tables[section, title, VALUE]:
            assert row[VALUE].startswith(number(results.loc[level, NAMES[row[title]]]))
    (opening,) = tables["The test split", "first opened", "with"]
    assert opening["first opened"] == openings["opened_utc"].iloc[0]
    assert opening["decision"] == f"{openings['decision_sha256'].iloc[0][:12]}, those above"
    area = {(row["level"], row["metric"]): row[VALUE] for row in tables[section, "level", "metric"]}
    assert area["vertebrae", "AUROC"].startswith(number(auroc(TEST["label"], TEST["probability"])))
    patients = Cases.of(TEST, level="patient", aggregation=PATIENT.rule.aggregation)
    assert area["patients", "AUROC"].startswith(number(auroc(patients.label, patients.probability)))


def test_an_opening_with_another_decision_shows_no_results(run):
    freeze(run, [CHOSEN, PATIENT], WHOLE)
    evaluate_on_test(run, WHOLE)
    other = choose_decision(WHOLE, Rule("max_f1", level="patient", aggregation=Aggregation("max")))
    freeze(run, other, WHOLE, replace=True)
    text = text_of(run)
    assert "Results on test" not in text
    assert "No results: it was not opened with the decisions above" in text
    rows = {row["what"]: row for row in tables_of(text)["Decision", "what", "vertebrae"]}
    before = rows["openings of the test split before that"]
    assert (before["vertebrae"], before["patients"]) == ("0", "1")
    assert rows["level"]["patients"] == "patient, by the max of the vertebrae; it holds at no other"
    evaluate_on_test(run, WHOLE)
    assert "The test split was opened 2 times" in text_of(run)


def test_frozen_calibrators_are_beside_their_decisions(run):
    assert "The probabilities are not calibrated." in text_of(run)
    calibrator = fit_calibrator(Cases.of(VALIDATION), kind="platt")
    freeze(run, [CHOSEN, PATIENT], WHOLE, calibrators=[calibrator])
    text = text_of(run)
    rows = {row["what"]: row for row in tables_of(text)["Decision", "what", "vertebrae"]}
    assert rows["calibrator"]["vertebrae"].startswith("platt, fitted on 60 patients of validation; frozen 20")
    assert rows["calibrator"]["patients"] == "none"
    assert "calibrators are frozen, and `predict --calibrated` applies them." in text
    assert "The calibrators were fitted on validation" in text


def test_openings_that_were_lost_are_a_limit(run):
    freeze(run, [CHOSEN, PATIENT], WHOLE)
    evaluate_on_test(run, WHOLE)
    (run / "test_openings.csv").unlink()
    with pytest.raises(ValueError, match=r"test_openings\.csv has 0 row"):
        write_card(run)
    freeze(run, [CHOSEN, PATIENT], WHOLE, replace=True)
    assert "The record of 1 opening(s) of the test split was lost." in text_of(run)


def test_predictions_without_a_run_have_test_results_on_the_same_terms(tmp_path):
    write_predictions(WHOLE, tmp_path / "predictions.csv")
    freeze(tmp_path, [CHOSEN, PATIENT], WHOLE)
    assert "Results on test" not in text_of(tmp_path)
    evaluate_on_test(tmp_path, WHOLE)
    assert "Results on test" in text_of(tmp_path)


def test_an_ensemble_has_a_card_that_names_its_runs(tmp_path):
    write_predictions(WHOLE, tmp_path / "predictions.csv")
    members = [{"run": name, "weights_sha256": "0" * 64} for name in ("fold_0", "fold_1", "fold_2")]
    record = {
        "members": members,
        "views": ["as packed", "left and right exchanged"],
        "data": {"split_sha256": "1" * 64, "folds_sha256": "2" * 64},
        "predictions_sha256": sha256_of(tmp_path / "predictions.csv"),
    }
    write_ensemble(tmp_path, record)
    freeze(tmp_path, [CHOSEN, PATIENT], WHOLE)
    text = text_of(tmp_path)
    assert "the mean of what 3 run(s) of this project predict (fold_0, fold_1, fold_2)" in text
    assert "of the sequence and of its mirror image" in text
    assert "each study is predicted by the one run that never saw it" in text
    assert "Their mean, on the test split, is less spread" in text
    assert "without a run" not in text
    write_ensemble(tmp_path, record | {"predictions_sha256": "3" * 64})
    with pytest.raises(ValueError, match=r"predictions.csv is not the file that ensemble.json describes"):
        write_card(tmp_path)


def test_a_guarantee_comes_with_its_premise(run):
    promise = guarantee_on_validation(WHOLE, RecallTarget(0.3, level="vertebra"))
    decision = state_threshold(Cases.of(VALIDATION), promise.require(), reason="a | b\nc <i>")
    freeze(run, [decision, PATIENT], WHOLE, guarantees=promise)
    text = text_of(run)
    rows = {row["what"]: row for row in tables_of(text)["Decision", "what", "vertebrae"]}
    assert (rows["guarantee"]["vertebrae"], rows["guarantee"]["patients"]) == (promise.reason, "none")
    assert rows["why"]["vertebrae"] == "a \\| b c &lt;i>"
    assert rows["threshold"]["vertebrae"].startswith(f"{promise.require():.4g};")
    assert "here they have also chosen the epoch" in text
    freeze(run, decision, WHOLE, replace=True)
    assert "| guarantee | none | none |" in text_of(run)


def test_a_guarantee_that_these_predictions_do_not_give_is_not_printed(run):
    promise = guarantee_on_validation(WHOLE, RecallTarget(0.3, level="vertebra"))
    decision = state_threshold(Cases.of(VALIDATION), promise.require(), reason="Guaranteed.")
    freeze(run, decision, WHOLE, guarantees=promise)
    assert promise.reason in text_of(run)
    (run / "predictions.csv").rename(run / "elsewhere.csv")
    assert "guarantee | not shown: without `predictions.csv` it cannot be checked" in text_of(run)
    (run / "elsewhere.csv").rename(run / "predictions.csv")
    record = json.loads((run / "decision.json").read_text())
    record["decisions"]["vertebra"]["guarantees"][0]["recall"] = 0.9
    write_sealed(run / "decision.json", record)
    with pytest.raises(ValueError, match=r"This one says: .*recall of vertebrae ≥ 0\.9.* These rows say: "):
        write_card(run)


def test_a_run_whose_training_found_no_threshold_has_no_rates(run):
    reason = "No threshold keeps precision at 0.990 or above: the best reachable is 0.500."
    none = Decision(Rule(precision_floor=0.99), None, 0.0, 0.0, reason)
    text = text_of(write_run(run, decision=none.record()))
    assert reason in text
    assert "| threshold | none;" in text
    assert ("Results on validation", "vertebrae at the threshold", VALUE) not in tables_of(text)


def test_undefined_numbers_are_words(tmp_path):
    table = VALIDATION.assign(label=VALIDATION["label"].where(VALIDATION["vertebra"] != "C3", 0))
    table = table.drop(index=table.index[-2:])
    decision = replace(CHOSEN, threshold=1.0)
    folder = write_run(tmp_path / "toy", table=table, decision=decision.record())
    text = text_of(folder)
    rows = {row["vertebra"]: row for row in tables_of(text)["Results on validation", "vertebra", "studies"]}
    assert (rows["C3"]["recall"], rows["C3"]["AUROC"]) == ("undefined", "undefined")
    rates = {
        row["vertebrae at the threshold"]: row[VALUE]
        for row in tables_of(text)["Results on validation", "vertebrae at the threshold", VALUE]
    }
    assert rates["precision (positive predictive value)"] == "undefined"  # nothing is called
    assert "precision of the decision" in text
    assert "Not defined: some patients lack a vertebra." in text
    assert "1 of 60 patients lack a vertebra" in text


@pytest.mark.parametrize("label", [0, 1])
def test_a_split_of_one_class_has_a_card(tmp_path, label):
    write_predictions(VALIDATION.assign(label=label), tmp_path / "predictions.csv")
    text = text_of(tmp_path)
    rows = tables_of(text)["Results on validation", "level", "metric"]
    assert {row[VALUE] for row in rows if row["metric"] == "AUROC"} == {"undefined"}
    calibration = tables_of(text)["Results on validation", "level", "score"]
    assert {row[VALUE] for row in calibration if row["score"] == "calibration slope"} == {"undefined"}


def test_a_single_patient_has_no_results(tmp_path):
    write_predictions(VALIDATION[:7], tmp_path / "predictions.csv")
    text = text_of(tmp_path)
    assert "On validation there is one patient only: no results." in text
    assert "## Results" not in text


def test_small_numbers_are_not_hidden():
    found = [number(value) for value in (0.0, 0.0004, -0.0004, -0.25, 0.99951, 1.0, np.nan)]
    assert found == ["0.000", "0.0004", "−0.0004", "−0.250", "1.000", "1.000", "undefined"]


@pytest.mark.skipif(
    not (BUILTIN / "predictions.csv").is_file(), reason="the cached run is not at checkpoints/builtin"
)
def test_the_cached_run_has_a_card_that_says_what_its_files_say(tmp_path):
    folder = shutil.copytree(BUILTIN, tmp_path / "builtin")
    text, table = text_of(folder), read_predictions(folder / "predictions.csv")
    assert "synthetic CT phantoms" in text
    rows = table[table["split"] == "validation"]
    area = tables_of(text)["Results on validation", "level", "metric"][0]
    assert area[VALUE].startswith(number(roc_auc_score(rows["label"], rows["probability"])))
    assert tables_of(text)["Data", "split", "patients"][0]["patients"].isdigit()


@needs_rsna
def test_real_predictions_have_a_card_of_aggregates(tmp_path):
    table = from_wide(
        pd.read_csv(RSNA / "oof_predictions.csv"),
        read_labels(RSNA / "train.csv"),
        "validation",
        missing="drop",
    )
    write_predictions(table, tmp_path / "predictions.csv")
    text = text_of(tmp_path)
    ranking = tables_of(text)["Results on validation", "level", "metric"]
    own = ~table["vertebra"].isin(VERTEBRAE)
    for row, part in ((ranking[0], table[~own]), (ranking[2], table[own])):
        assert row[VALUE].startswith(number(roc_auc_score(part["label"], part["probability"])))
    assert "A patient's probability is the model's own score." in text
    assert tables_of(text)["Data", "split", "patients"][0]["vertebrae"] == "14,126"
    assert not re.search(r"\d+\.\d+\.\d+\.\d+", text)  # no study UID
    assert f"{table[UID].nunique():,} | " in text


def test_log_losses_that_the_clip_decides_are_counted(tmp_path):
    table = VALIDATION.copy()
    first = table["label"].eq(1).idxmax()
    assert "with certainty and wrongly" not in text_of_table(tmp_path, table)
    table.loc[first, "probability"] = 0.0
    words = f"Vertebrae: 1 of {len(table)} cases was predicted with certainty and wrongly"
    assert words in text_of_table(tmp_path, table)


def text_of_table(folder, table):
    write_predictions(table, folder / "predictions.csv")
    return text_of(folder)


def test_two_scans_of_each_patient_are_no_two_patients(tmp_path):
    table = WHOLE.assign(patient=WHOLE[UID])
    table = pd.concat([table, table.assign(**{UID: table[UID] + ".9"})], ignore_index=True)
    once, twice = (
        text_of(write_run(tmp_path / name, table=part)) for name, part in (("a", WHOLE), ("b", table))
    )
    counted = (next(re.finditer(r"\| validation \| (\d+ \| \d+ .*?) \|", text))[1] for text in (once, twice))
    assert next(counted) == next(counted)
    assert "not patients here: validation, 120 studies of 60 patients; test, 80 studies of 40 pat" in twice
    assert "not patients here" not in once
