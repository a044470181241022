"""Predictions of radiographs, a row an image, go the way of vertebrae, to the card and the slider."""

import re

import numpy as np
import pandas as pd
import pytest
from matplotlib.text import Text
from simulated import cohort, image_table, radiograph_run

from cspine_helpers import decisions, evaluation, figures, metrics
from cspine_helpers.evaluation.calibration import fit_calibrator
from cspine_helpers.evaluation.cases import Cases, defined_levels
from cspine_helpers.labels import UID
from cspine_helpers.model_card import results as findings
from cspine_helpers.model_card.card import write_card
from cspine_helpers.predictions import read_predictions, validate_predictions, write_predictions
from cspine_helpers.slider import ThresholdExplorer


@pytest.fixture(scope="module")
def table():
    return image_table()


@pytest.fixture(scope="module")
def cases(table):
    return Cases.of(table, split="validation")


def as_vertebrae(table):
    """The same rows, each said to be of C1."""
    return table.assign(vertebra="C1")


def test_a_table_of_images_is_written_and_read(table, tmp_path):
    write_predictions(table, tmp_path / "predictions.csv")
    assert read_predictions(tmp_path / "predictions.csv").equals(validate_predictions(table))


@pytest.mark.parametrize("other", ["C1", "study", "patient_overall"])
def test_images_stand_beside_nothing_else(table, other):
    mixed = table.assign(vertebra=["image", other, *table["vertebra"][2:]])
    with pytest.raises(ValueError, match=f"rows of 'image' beside rows of '{other}'"):
        validate_predictions(mixed)


def test_an_image_has_one_row(table):
    with pytest.raises(ValueError, match=r"rows that repeat StudyInstanceUID and vertebra \(1\)"):
        validate_predictions(table.assign(**{UID: ["twice", "twice", *table[UID][2:]]}))


def test_images_are_cases_of_one_level(cases):
    assert (cases.level, cases.plural, cases.name) == ("image", "images", "all")
    assert cases.patients() is cases
    assert list(cases.units()) == ["image"]
    assert defined_levels(cases) == ["all"]
    assert not cases.missing.any()
    assert cases.words == "160 patients"
    assert Cases.of(cases.table()).level == "image"
    assert Cases.of(image_table(unit="study"), split="test").plural == "studies"


@pytest.mark.parametrize(
    ("what", "said"),
    [
        (lambda cases: cases.of_unit("patient"), "judged one by one; level 'patient' is of vertebrae and"),
        (lambda cases: cases.of_unit("C2"), "level 'C2' is of vertebrae"),
        (lambda cases: cases.patients(evaluation.Aggregation("max")), "aggregation is of vertebrae"),
        (lambda cases: cases.wide(), "judged one by one"),
        (evaluation.compare_aggregations, "judged one by one"),
        (lambda cases: evaluation.cleared_by_vertebrae(cases, 0.5), "judged one by one"),
        (lambda cases: Cases.of(cases.table(), level="patient"), "are of images; cases of level 'patient'"),
        (lambda cases: Cases.of(cases.table(), level="study"), "are of images; cases of level 'study'"),
        (lambda cases: Cases.of(cohort(), level="image"), "are of vertebrae; cases of level 'image'"),
        (lambda cases: decisions.choose_per_vertebra(cases.table(), decisions.Rule("max_f1")), "are images"),
        (
            lambda cases: decisions.guarantee_on_validation(
                cases.table(), decisions.RecallTarget(0.8, level="patient")
            ),
            "are of images, and guarantee no recall at level 'patient'",
        ),
        (
            lambda cases: decisions.guarantee_on_validation(
                cohort(), decisions.RecallTarget(0.8, level="image")
            ),
            "are of vertebrae, and guarantee no recall at level 'image'",
        ),
    ],
)
def test_what_images_do_not_have_is_refused(cases, what, said):
    with pytest.raises(ValueError, match=said):
        what(cases)


def test_thresholds_and_intervals_are_those_of_the_same_rows_as_vertebrae(table):
    rule = decisions.Rule("max_f1")
    chosen, same = (decisions.choose_decision(each, rule) for each in (table, as_vertebrae(table)))
    assert (chosen.rule.level, chosen.threshold) == ("image", same.threshold)
    assert chosen.reason == same.reason
    one, two = (Cases.of(each, split="test") for each in (table, as_vertebrae(table)))
    found = [evaluation.bootstrap(each, threshold=0.4, resamples=100) for each in (one, two)]
    pd.testing.assert_frame_equal(*found)
    single = evaluation.per_vertebra(one, threshold=0.4, resamples=100)
    assert single["vertebra"].unique().tolist() == ["image"]
    np.testing.assert_allclose(single["value"], found[0]["value"])


def test_a_threshold_for_images_is_refused_for_vertebrae_and_the_other_way_round(table):
    chosen = decisions.choose_decision(table, decisions.Rule("max_f1"))
    with pytest.raises(ValueError, match="holds at image level, not at vertebra level"):
        decisions.apply_decision(chosen, as_vertebrae(table))
    with pytest.raises(ValueError, match="holds at vertebra level, not at image level"):
        decisions.apply_decision(
            decisions.choose_decision(as_vertebrae(table), decisions.Rule("max_f1")), table
        )


def test_the_guarantee_counts_patients_each_with_the_share_of_its_images(table):
    target = decisions.RecallTarget(0.5, level="image", delta=0.1)
    made = decisions.guarantee_on_validation(table, target)
    rows = table[(table["split"] == "validation") & (table["label"] == 1)]
    assert made.patients == rows["patient"].nunique()
    assert made.positives == len(rows)
    assert "recall of images, averaged over patients, ≥ 0.5 with confidence 0.9" in made.reason
    arrays = (rows["label"], rows["probability"], rows["patient"])
    averaged = decisions.RecallTarget(0.5, level="vertebra", delta=0.1, average="patients")
    assert made.threshold == decisions.guarantee_recall(*arrays, averaged).threshold
    assert made.threshold is not None


def test_a_patient_may_have_more_than_seven_fractured_images():
    target = decisions.RecallTarget(0.5, level="image", delta=0.1)
    patients = np.repeat(np.arange(30), 12)
    made = decisions.guarantee_recall([1] * 360, np.linspace(0.5, 1, 360), patients, target)
    assert (made.patients, made.positives) == (30, 360)


@pytest.mark.slow
def test_the_guarantee_is_kept_where_images_of_a_patient_go_together():
    """Of many redraws, the true recall (averaged over patients) falls short in no more than delta."""
    rng, short, delta, redraws = np.random.default_rng(2), 0, 0.2, 400

    def drawn(many):
        images = rng.integers(1, 6, many)
        whose = np.repeat(np.arange(many), images)
        return whose, 0.2 + 0.6 * rng.random(many)[whose] + 0.2 * rng.random(len(whose))

    whose, truth = drawn(50_000)
    for _ in range(redraws):
        patients, scores = drawn(60)
        target = decisions.RecallTarget(0.7, level="image", delta=delta)
        found = decisions.guarantee_recall(np.ones(len(scores), int), scores, patients, target).threshold
        if found is not None:
            short += np.bincount(whose, truth >= found).dot(1 / np.bincount(whose)) / 50_000 < 0.7
    assert 0 < short / redraws <= delta


def test_decisions_are_frozen_and_open_the_test_split(table, tmp_path):
    chosen = decisions.choose_decision(table, decisions.Rule("max_f1"))
    calibrator, _ = evaluation.choose_calibrator(Cases.of(table, split="validation"))
    target = decisions.RecallTarget(0.5, level="image", delta=0.1)
    guarantee = decisions.guarantee_on_validation(table, target)
    promised = [guarantee] if guarantee.covers(chosen) else []
    frozen = decisions.freeze(tmp_path, chosen, table, guarantees=promised, calibrators=calibrator)
    assert list(frozen.decisions) == ["image"]
    assert frozen.record["chosen_on"] == {
        "split": "validation",
        "patients": 160,
        "images": int((table["split"] == "validation").sum()),
    }
    again = decisions.freeze(tmp_path, chosen, table, guarantees=promised, calibrators=calibrator)
    assert again.record == frozen.record
    results = decisions.evaluate_on_test(tmp_path, table)
    assert results["level"].tolist() == ["all"]
    row, test = results.iloc[0], table[table["split"] == "test"]
    assert (row["patients"], row["studies"], row["incomplete"]) == (160, len(test), 0)
    called = test["probability"] >= chosen.threshold
    assert row["tp"] == (called & (test["label"] == 1)).sum()
    assert decisions.read_openings(tmp_path)["level"].tolist() == ["image"]
    assert frozen.calibrate(test)["calibrated"].between(0, 1).all()


def panels_of(figure):
    return [axes.get_title(loc="left") for axes in figure.axes]


def words_in(figure):
    return " ".join(text.get_text() for text in figure.findobj(Text))


@pytest.mark.slow
def test_figures_of_images_have_one_panel_and_name_no_vertebra():
    cases = Cases.of(image_table(40), split="validation")
    drawn = {
        "Images: AP": figures.pr_curves(cases, threshold=0.3),
        "Images: AUROC": figures.roc_curves(cases),
        "Images": figures.score_histograms(cases),
        "Images at threshold 0.3000": figures.predictive_value_curves(cases, 0.3),
        "Images: net benefit": figures.decision_curves({"as predicted": cases}),
    }
    for title, figure in drawn.items():
        (panel,) = panels_of(figure)
        assert panel.startswith(title)
        assert not re.search(r"[Vv]ertebra|C[1-7]|Patients", words_in(figure))
    with pytest.raises(ValueError, match="judged one by one"):
        figures.vertebra_against_patient(cases, threshold=0.3)


def test_the_slider_shows_images(table, tmp_path):
    chosen = decisions.choose_decision(table, decisions.Rule("max_f1"))
    promise = decisions.guarantee_on_validation(table, decisions.RecallTarget(0.5, level="image", delta=0.1))
    write_predictions(table, tmp_path / "predictions.csv")
    validation = table[table["split"] == "validation"]
    explorer = ThresholdExplorer(validation, chosen, guarantees=promise, freeze=tmp_path)
    assert [label for label, _ in explorer._levels.options] == ["Images"]
    words = explorer._words(explorer._point()) + explorer._presets.note + explorer._question()
    assert "Images at threshold" in words
    assert "Guaranteed for images" in words
    assert "at image level?" in words
    assert not re.search(r"[Vv]ertebra|C[1-7]\b", words)
    found = explorer.summary()
    counts = metrics.confusion(validation["label"], validation["probability"], explorer.threshold).iloc[0]
    assert [found[name] for name in ("tp", "fp", "fn", "tn")] == counts[["tp", "fp", "fn", "tn"]].tolist()
    assert not [name for name in found if name.startswith("recall_C")]
    drawn = {name: one._canvas.figure for name, one in explorer._panels["all"].images.items()}
    assert [len(figure.axes) for figure in drawn.values()] == [1, 1, 1]  # no vertebra has a recall
    assert "no image flagged" in words_in(drawn["rates"])
    assert explorer._images["counts"].tooltip == "Confusion matrix"
    explorer.threshold = promise.threshold
    assert explorer._act().endswith("at image level.")
    frozen = decisions.read_decision(tmp_path)
    assert list(frozen.decisions) == ["image"]
    assert frozen.guarantees == (promise,)


@pytest.mark.slow
def test_the_card_of_images_has_their_numbers_and_names_no_vertebra(table, tmp_path, monkeypatch):
    monkeypatch.setattr(findings, "RESAMPLES", 60)
    run = radiograph_run(tmp_path / "limbs", table)
    decisions.freeze(run, decisions.choose_decision(table, decisions.Rule("max_f1")), table)
    decisions.evaluate_on_test(run, table)
    text = write_card(run).read_text(encoding="utf-8")
    assert not re.search(r"[Vv]ertebra|C[1-7]\b|\bCT\b|RSNA|spine(?!_)|axial|LSTM", text)
    for split in ("validation", "test"):
        cases = Cases.of(table, split=split)
        ill = cases.studies.groupby("patient")["label"].max()
        row = [f"{ill.size:,}", f"{ill.sum()} ({ill.mean():.3f})"]
        row += [f"{len(cases):,}", f"{cases.label.sum()} ({cases.prevalence:.3f})"]
        assert f"| {split} | {' | '.join(row)} |" in text
        assert f"| images | AUROC | {metrics.auroc(cases.label, cases.probability):.3f} (" in text
        assert f"## Results on {split}" in text
    assert "| train | 40 | 10 (0.250) | 100 | 20 (0.200) |" in text
    assert "### The decision, at image level" in text
    assert "limbs (CC BY 4.0): Doe 2023" in text
    assert f"| labels of the cohort | `{'a' * 64}` |" in text
    assert 'read "fractured" as that' not in text


def test_the_card_says_where_label_1_is_no_fracture(table, tmp_path, monkeypatch):
    monkeypatch.setattr(findings, "RESAMPLES", 60)
    source = {"name": "mura", "label_1": "abnormal", "citation": "", "licence": ""}
    few = image_table(30, unit="study")
    run = radiograph_run(tmp_path / "limbs", few, cohort={"sources": [source]})
    text = write_card(run).read_text(encoding="utf-8")
    assert "Label 1 of mura means abnormal" in text
    assert "fractured studies |" in text
    assert "mura (licence not on record): no citation on record" in text


def test_a_calibrator_that_lacks_patients_says_images():
    few = image_table(30, prevalence=0.1)
    with pytest.raises(ValueError, match="patients with a fractured image and"):
        fit_calibrator(Cases.of(few, split="validation"), kind="isotonic")
