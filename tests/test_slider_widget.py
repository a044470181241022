import io
import re
import shutil
from base64 import b64decode
from html import unescape
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import numpy as np
import pandas as pd
import pytest
from conftest import RSNA, needs_rsna
from matplotlib.colors import to_rgb
from nbconvert.filters.widgetsdatatypefilter import WidgetsDataTypeFilter
from PIL import Image, ImageFilter
from scipy.special import expit, logit
from test_evaluation_cases import toy, with_own

from cspine_helpers.decisions.confidence import Confidence
from cspine_helpers.decisions.guarantees import RecallTarget, guarantee_on_validation
from cspine_helpers.decisions.test_split import evaluate_on_test, freeze, read_decision
from cspine_helpers.decisions.thresholds import Rule, choose_decision, choose_per_vertebra, choose_threshold
from cspine_helpers.decisions.triage import Triage
from cspine_helpers.evaluation.cases import LEVELS, Aggregation, Cases
from cspine_helpers.evaluation.intervals import bootstrap
from cspine_helpers.figures.style import FRACTURED, GREY, INCONCLUSIVE, INK, INTACT, PINK
from cspine_helpers.labels import UID, VERTEBRAE, read_labels
from cspine_helpers.metrics import confusion, rates
from cspine_helpers.predictions import from_wide, read_predictions, write_predictions
from cspine_helpers.slider import widget
from cspine_helpers.slider.operating_point import digits, rounded
from cspine_helpers.slider.picture import ink_on, written
from cspine_helpers.slider.widget import ThresholdExplorer, practise


def made_table(studies=40, seed=0):
    """Predictions with both classes at every level; the probabilities know something of the labels."""
    rng = np.random.default_rng(seed)
    label = (rng.random((studies, 7)) < 0.1).astype(int)
    label[0], label[1] = 1, 0
    probability = np.clip(rng.beta(1.5, 6, label.shape) + 0.3 * label * rng.random(label.shape), 0, 1)
    table = pd.DataFrame(
        [(f"1.{study}", name, "validation") for study in range(studies) for name in VERTEBRAE],
        columns=[UID, "vertebra", "split"],
    )
    return table.assign(label=label.ravel(), probability=probability.ravel())


@pytest.fixture(scope="module")
def standing():
    """An explorer at threshold 0.2 for the tests that only look at it."""
    return ThresholdExplorer(made_table(), threshold=0.2)


def promised(table, recall=0.5, level="vertebra", by=None):
    if level == "patient":
        by = by or Aggregation("max")
    return guarantee_on_validation(table, RecallTarget(recall, level=level, aggregation=by))


def shown(explorer):
    """The picture as the notebook would store it."""
    return b64decode(explorer._repr_mimebundle_()["image/png"])


def said(explorer):
    return explorer._repr_mimebundle_()["text/plain"]


def note(explorer):
    return next(
        part.value for part in explorer.widget.children if 'role="note"' in getattr(part, "value", "")
    )


def pixels(png):
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)


def texts(explorer):
    """What changes in the picture and is written."""
    return [text.get_text() for one in explorer._panels["all"].images.values() for text in one._texts]


def assert_summary_is_metrics(explorer, table):
    rows = Cases.of(table).of_unit(explorer.level).table()
    expected = rates(confusion(rows["label"], rows["probability"], explorer.threshold)).iloc[0].to_dict()
    summary = explorer.summary()
    assert {name: summary[name] for name in expected} == pytest.approx(expected, abs=1e-12, nan_ok=True)


@pytest.mark.slow
@pytest.mark.parametrize("level", LEVELS)
def test_the_numbers_are_those_of_metrics_at_every_level(level, undrawn):
    table = made_table()
    explorer = ThresholdExplorer(table, threshold=0.25)
    explorer.level = level
    for threshold in (0.0, 0.1, 0.25, 0.8, 1.0):
        explorer.threshold = threshold
        assert_summary_is_metrics(explorer, table)


def test_the_intervals_are_those_of_the_bootstrap(undrawn):
    table = made_table(studies=80)
    summary = ThresholdExplorer(table, threshold=0.2).summary()
    expected = bootstrap(Cases.of(table), threshold=0.2).set_index("metric")
    for name in ("recall", "precision", "specificity", "npv", "f1"):
        found = [summary[name + end] for end in ("", "_low", "_high")]
        assert found == pytest.approx(expected.loc[name, ["value", "low", "high"]].tolist(), abs=1e-6)


@needs_rsna
def test_real_predictions_with_the_decision_that_was_made_on_them(undrawn):
    wide = pd.read_csv(RSNA / "oof_predictions.csv", dtype={"uid": str})
    table = from_wide(wide, read_labels(RSNA / "train.csv"), "validation", missing="drop")
    decision = choose_decision(table, Rule(precision_floor=0.3))
    explorer = ThresholdExplorer(table, decision)
    assert explorer.decision == decision
    assert explorer.summary()["recall"] == decision.recall
    assert explorer.summary()["precision"] == decision.precision
    explorer.level = "patient"
    assert_summary_is_metrics(explorer, table)


def test_starts_at_the_threshold_it_was_given_and_writes_it_in_four_decimals(undrawn):
    explorer = ThresholdExplorer(made_table(), threshold=0.123456789)
    assert explorer.threshold == 0.1235
    assert "Starts at the threshold it was given, 0.1235." in note(explorer)


@pytest.mark.parametrize("scores", [(0.40996, 0.40991), (0.409912346, 0.409912345), (0.1 + 0.2, 0.3)])
def test_what_is_shown_is_what_is_counted_though_thresholds_are_scores(scores, undrawn):
    table = made_table()
    table.loc[[3, 4], "probability"] = scores
    for threshold in scores:
        explorer = ThresholdExplorer(table, threshold=threshold)
        explorer.threshold = 0.9
        explorer.threshold = threshold
        text = said(explorer).split("threshold ")[1].split(":")[0]
        assert f"given, {text}." in note(explorer)
        assert explorer._box.value == float(text)
        assert explorer._slider.value == round(threshold, 3)
        called = explorer.summary()["tp"] + explorer.summary()["fp"]
        assert called == (table["probability"] >= float(text)).sum()
        assert called == (table["probability"] >= threshold).sum()


def test_the_picture_and_the_buttons_round_to_four_decimals_and_the_box_and_the_words_do_not():
    table = made_table()
    table.loc[[3, 4], "probability"] = 0.40996, 0.40991
    explorer = ThresholdExplorer(table, threshold=0.40996)
    assert explorer._box.value == explorer.threshold == 0.40996
    assert "threshold 0.40996:" in said(explorer)
    assert explorer._jumps["start"].description == "start 0.4100"
    assert "threshold 0.4100" in texts(explorer)
    assert [rounded(one) for one in (0, 1, 0.00002, 0.99998)] == ["0.0000", "1.0000", "0.00002", "0.99998"]


def test_a_dragged_slider_is_written_without_the_noise_of_its_steps_and_not_tugged_at(undrawn):
    explorer = ThresholdExplorer(made_table(), threshold=0.2)
    explorer._slider.value = 0.41600000000000004  # what a browser sends for 0.416
    assert "threshold 0.4160:" in said(explorer)
    assert explorer.threshold == explorer._box.value == 0.416
    assert explorer._slider.value == 0.41600000000000004


def test_a_slider_that_reports_its_own_step_moves_nothing(undrawn):
    explorer = ThresholdExplorer(made_table(), threshold=0.2)
    explorer.threshold = 0.32261
    assert explorer._slider.value == 0.323
    explorer._slider.value = 0.32300000000000006  # as it does when it is shown
    assert explorer.threshold == explorer._box.value == 0.3226
    explorer._slider.value = 0.324
    assert explorer.threshold == explorer._box.value == 0.324


def test_slider_and_number_box_move_each_other_and_draw_once():
    explorer = ThresholdExplorer(made_table(), threshold=0.2)
    drawn = []
    for image in explorer._images.values():
        image.observe(lambda change: drawn.append(change["owner"]), names="value")
    explorer._box.value = 0.123456
    assert explorer.threshold == 0.123456  # exactly as typed
    assert explorer._slider.value == 0.123
    explorer._slider.value = 0.3
    assert explorer._box.value == explorer.threshold == 0.3
    assert drawn == [*explorer._images.values()] * 2


def test_without_a_threshold_starts_at_the_highest_f1_and_says_so(undrawn):
    table = made_table()
    explorer = ThresholdExplorer(table)
    best = choose_threshold(table["label"], table["probability"], Rule("max_f1"))
    assert explorer.summary()["f1"] == pytest.approx(2 / (1 / best.recall + 1 / best.precision))
    assert "No threshold is chosen. Starts at the highest F1 of all vertebrae" in note(explorer)


def test_starts_at_a_decision_and_marks_it_and_the_guarantee_at_their_level(undrawn):
    table = made_table(studies=100)
    decision, promise = choose_decision(table, Rule("max_f1")), promised(table)
    explorer = ThresholdExplorer(table, decision, guarantees=promise)
    assert explorer.level == "all"
    assert promise.reason in note(explorer)
    chosen, guaranteed = (explorer._jumps[name] for name in ("chosen", "guaranteed"))
    explorer.threshold = 0.9
    for button, threshold in ((chosen, decision.threshold), (guaranteed, promise.threshold)):
        assert button.layout.display is None
        button.click()
        assert button.description.endswith(f" {explorer.threshold:.4f}")
        assert explorer.summary()["tp"] == (table["probability"][table["label"] == 1] >= threshold).sum()
    explorer.level = "C2"
    assert (chosen.layout.display, guaranteed.layout.display) == (None, "none")
    explorer.level = "patient"
    assert (chosen.layout.display, guaranteed.layout.display) == ("none", "none")


def test_patients_are_those_of_the_decision_and_its_guarantee_is_marked_there(undrawn):
    table, mean = made_table(studies=100), Aggregation("top_k", k=3)
    decision = choose_decision(table, Rule("max_youden", level="patient", aggregation=mean))
    explorer = ThresholdExplorer(table, decision, guarantees=promised(table, level="patient", by=mean))
    assert explorer.level == "patient"
    assert explorer.decision == decision
    assert explorer.summary()["recall"] == decision.recall
    assert explorer._jumps["guaranteed"].layout.display is None


@pytest.mark.slow
def test_thresholds_of_single_vertebrae_are_marked_at_theirs(undrawn):
    table = made_table(studies=150)
    decision = choose_per_vertebra(table, Rule("max_f1"), min_positives=5)
    promises = [promised(table, 0.3, name) for name in VERTEBRAE]
    explorer = ThresholdExplorer(table, decision, guarantees=promises)
    assert explorer.level == "C1"
    for name in VERTEBRAE:
        explorer.level = name
        explorer._jumps["chosen"].click()
        rows = Cases.of(table).of_unit(name).table()
        called = (rows["probability"] >= decision.thresholds[name]).sum()
        assert explorer.summary()["tp"] + explorer.summary()["fp"] == called
        assert explorer._jumps["guaranteed"].layout.display is None
    explorer.level = "all"
    assert explorer._jumps["chosen"].layout.display == "none"


def test_a_guarantee_of_other_patients_is_not_shown(undrawn):
    table = made_table(studies=100)
    decision = choose_decision(table, Rule("max_youden", level="patient", aggregation=Aggregation("max")))
    noisy = promised(table, level="patient", by=Aggregation("noisy_or"))
    for given, message in (
        (noisy, "for patients by noisy or, those here are by max"),
        (promised(made_table(studies=100, seed=1), level="patient"), "made on other rows"),
        ([{"threshold": 0.2, "level": "patient", "recall": 0.9, "delta": 0.1}], "Found dict"),
    ):
        with pytest.raises(ValueError, match=message):
            ThresholdExplorer(table, decision, guarantees=given)
        with pytest.raises(ValueError, match=message):
            ThresholdExplorer(table, threshold=0.5, guarantees=given)  # patients by the highest
    with pytest.raises(ValueError, match="no row of the split 'validation'"):
        ThresholdExplorer(table.assign(split="test"), decision, guarantees=promised(table))


def test_what_is_guaranteed_is_said_apart_from_where_the_slider_stands(undrawn):
    table = made_table(studies=100)
    decision, promise = (
        choose_decision(table, Rule("max_f1", level="patient", aggregation=Aggregation("max"))),
        promised(table, level="patient"),
    )
    explorer = ThresholdExplorer(table, decision, guarantees=promise)
    highest = explorer._presets.at("patient")["guaranteed"]
    assert f"Guaranteed for patients: {digits(highest)}. {promise.reason}" in note(explorer)
    for control in (explorer._slider, explorer._box):
        control.value = 0.9
        assert said(explorer).endswith(f"Now 0.9000, patients: no guarantee. Guaranteed: {digits(highest)}.")
        control.value = 0.01
        assert said(explorer).endswith(f"Now 0.0100, patients: guaranteed. Guaranteed: {digits(highest)}.")
        assert said(explorer) in unescape(explorer._numbers.value)
    explorer.level = "all"
    assert said(explorer).endswith("Now 0.0100, all vertebrae: no guarantee, which is for patients.")
    assert "guarantee" not in said(ThresholdExplorer(table, decision))


def test_patients_called_back_stand_beside_the_missed_with_an_interval():
    explorer = ThresholdExplorer(made_table(studies=100), threshold=0.2)
    point, summary = explorer._point(), explorer.summary()
    assert f"called back without fracture {written(point.called_back, 1)}" in said(explorer)
    assert [summary[f"called_back_per_1000{end}"] for end in ("", "_low", "_high")] == [*point.called_back]
    drawn = texts(explorer)
    assert written(point.missed, 1) in drawn
    assert written(point.called_back, 1) in drawn


def test_the_curve_is_labelled_as_observed_also_where_the_point_is_restated():
    explorer = ThresholdExplorer(made_table(studies=100), threshold=0.2)
    panels = explorer._panels["all"]
    assert panels._place.get_text().startswith("as observed: ")
    explorer.prevalence = 0.02
    assert panels._place.get_text() == "○ restated: 2% of patients fractured"
    title = panels._curve._title
    assert title.get_text() == "All vertebrae"
    axes = title.axes
    assert axes.get_xlabel() == "recall\n(curve, band and chance as observed)"


def test_a_guarantee_without_threshold_says_why(undrawn):
    table = made_table()
    explorer = ThresholdExplorer(table, threshold=0.2, guarantees=promised(table, 0.99, "patient"))
    explorer.level = "patient"
    assert "No threshold guarantees recall of patients ≥ 0.99" in note(explorer)
    assert explorer._jumps["guaranteed"].layout.display == "none"
    assert said(explorer).endswith("Now 0.2000, patients: no guarantee. Guaranteed: none.")


def test_rates_are_restated_for_another_prevalence_and_the_matrix_stays():
    explorer = ThresholdExplorer(made_table(studies=100), threshold=0.2)
    found, picture = explorer.summary(), shown(explorer)
    assert found["prevalence"] is None
    assert "As observed: 4" in said(explorer)
    explorer._other.value = True  # 7 % stands in the box
    restated = explorer.summary()
    assert restated["prevalence"] == 0.07
    assert "Restated: 7% of patients fractured" in said(explorer)
    assert shown(explorer) != picture
    assert all(restated[name] == found[name] for name in ("tp", "fp", "fn", "tn", "recall_C2"))
    assert restated["recall"] == pytest.approx(found["recall"])
    assert restated["precision"] < found["precision"]
    assert restated["npv"] > found["npv"]
    assert restated["missed_per_1000"] < found["missed_per_1000"]
    explorer.prevalence = 0.3
    assert explorer.summary()["precision"] > restated["precision"]
    explorer.prevalence = None
    assert explorer.summary() == found
    assert shown(explorer) == picture
    with pytest.raises(ValueError, match="A prevalence lies between 0 and 1"):
        explorer.prevalence = 0


@pytest.mark.parametrize("percent", [0, 100, -3, float("nan")])
def test_a_prevalence_typed_outside_0_to_100_is_refused_and_the_last_one_kept(percent, undrawn):
    explorer = ThresholdExplorer(made_table(), threshold=0.2)
    explorer.prevalence = 0.02
    before = explorer.summary()
    explorer._percent.value = percent
    assert explorer._percent.value == 2
    assert explorer.summary() == before
    refused = f"A prevalence lies between 0 and 100 %; found {percent} %. It stays at 2 %. "
    assert f"{refused}All vertebrae at" in unescape(explorer._numbers.value)
    explorer._percent.value = 0.05  # rarer than one in a thousand
    assert explorer.prevalence == 0.0005
    assert "It stays" not in explorer._numbers.value


def test_no_other_prevalence_where_all_patients_are_fractured(undrawn):
    table = made_table()
    table = table[table.groupby(UID)["label"].transform("max") == 1]
    explorer = ThresholdExplorer(table, threshold=0.2)
    explorer.prevalence = 0.07
    assert explorer._other.disabled
    assert explorer.prevalence is None


def test_the_controls_move_picture_and_numbers():
    explorer = ThresholdExplorer(made_table(), threshold=0.2)
    pictures, words = [shown(explorer)], [explorer._numbers.value]
    for control, value in ((explorer._slider, 0.4), (explorer._levels, "patient"), (explorer._box, 0.41)):
        control.value = value
        pictures.append(shown(explorer))
        words.append(explorer._numbers.value)
    assert len({*pictures}) == len({*words}) == 4
    assert (explorer.threshold, explorer.level) == (0.41, "patient")
    live = [pixels(image.value) for image in explorer._images.values()]
    assert (np.concatenate(live, axis=1) == pixels(pictures[-1])).all()
    assert said(explorer) in words[-1]


@pytest.mark.slow
@pytest.mark.parametrize("defer", [None, 0.4])
def test_moves_leave_no_traces_in_the_picture(defer):
    travelled, fresh = (ThresholdExplorer(made_table(), threshold=0.2, defer=defer) for _ in range(2))
    for threshold in (0.9, 0.05, 1.0, 0.3):
        travelled.threshold = threshold
    travelled.prevalence = 0.2
    travelled.level = "C2"
    travelled.level = "all"
    travelled.prevalence = None
    fresh.threshold = 0.3
    if defer:
        travelled.defer = fresh.defer = 0.6
    assert shown(travelled) == shown(fresh)


def drawn_whole(picture):
    """The picture drawn by matplotlib alone, (H, W, 3)."""
    for artist in (*picture._shapes, *picture._texts):
        artist.set_animated(False)
    picture._canvas.draw()
    return np.array(picture._canvas.buffer_rgba())[..., :3]


@pytest.mark.parametrize("defer", [None, 0.5])
@pytest.mark.parametrize("prevalence", [None, 0.07])
def test_the_quick_redraw_equals_a_whole_drawing(prevalence, defer):
    explorer = ThresholdExplorer(made_table(), threshold=0.2, defer=defer)
    explorer.threshold, explorer.prevalence = 0.35, prevalence
    quick = Image.open(io.BytesIO(shown(explorer))).convert("RGB")
    drawn = [drawn_whole(one) for one in explorer._panels["all"].images.values()]
    whole = Image.fromarray(np.concatenate(drawn, axis=1))
    soft = [np.asarray(image.filter(ImageFilter.GaussianBlur(2))).astype(int) for image in (quick, whole)]
    assert (
        np.abs(soft[0] - soft[1]).max() < 40
    )  # texts may lie a pixel apart; what is missing gives 60 or more


def handles(explorer):
    """Where the slider shows its handles, and what the boxes say."""
    return explorer._slider.value, tuple(box.value for box in explorer._boxes)


def test_a_second_handle_defers_what_lies_between(undrawn):
    table = made_table(studies=100)
    explorer = ThresholdExplorer(table, threshold=0.2, defer=0.4)
    assert handles(explorer) == ((0.2, 0.4), (0.2, 0.4))
    explorer._slider.value = (0.15000000000000002, 0.4)  # as a browser sends it
    explorer._boxes[1].value = 0.51234
    assert (explorer.threshold, explorer.defer) == (0.15, 0.51234)
    assert handles(explorer) == ((0.15, 0.512), (0.15, 0.51234))
    explorer._slider.value = (0.15, 0.5120000000000001)  # its own step, as it is first shown, moves nothing
    assert explorer.defer == 0.51234
    summary, p, y = explorer.summary(), table["probability"], table["label"] == 1
    between = (p >= 0.15) & (p < 0.51234)
    assert summary["fractured_inconclusive"] == (y & between).sum()
    assert summary["inconclusive_rate"] == pytest.approx(between.mean())
    assert summary["recall_deferred_found"] == pytest.approx((p[y] >= 0.15).mean())
    assert summary["recall_deferred_lost"] == pytest.approx((p[y] >= 0.51234).mean())
    c2 = p[y & (table["vertebra"] == "C2")]
    assert summary["recall_C2"] == pytest.approx((c2 >= 0.15).mean())
    assert summary["recall_lost_C2"] == pytest.approx((c2 >= 0.51234).mean())


def test_the_words_name_all_three_answers_and_what_the_reader_has_to_decide():
    explorer = ThresholdExplorer(made_table(studies=100), threshold=0.2, defer=0.4)
    point = explorer._point()
    assert said(explorer).startswith(
        "All vertebrae negative below 0.2000, positive from 0.4000, inconclusive between: fractured positive "
        f"{point.counts['fractured_positive']}, fractured inconclusive "
    )
    for words in (
        f"inconclusive {written(point.inconclusive_rate)}, ",
        f"recall, deferred found {written(point.low.rates['recall'])}, ",
        f"recall, deferred lost {written(point.high.rates['recall'])}, ",
        f"of 1,000 patients inconclusive {written(point.workload, 1)}, missed {written(point.low.missed, 1)}",
    ):
        assert words in said(explorer)
    drawn = texts(explorer)
    assert written(point.workload, 1) in drawn
    assert "inconclusive 0.2000 – 0.4000" in drawn
    assert pixels(shown(explorer)).shape[2] == 3


def test_the_answers_are_those_of_triage_by_the_distance_from_its_guaranteed_threshold(undrawn):
    table = made_table(studies=100)
    for level, unit in (("vertebra", "all"), ("patient", "patient")):
        triage = Triage(promised(table, level=level), "distance", 0.8)
        cases = Cases.of(table).of_unit(unit)
        answers = triage.answers(cases, Confidence("distance", triage.p_low).of(cases))
        upper = expit(logit(triage.p_low) + triage.cut)
        explorer = ThresholdExplorer(table, threshold=triage.p_low, defer=upper, guarantees=triage.guarantee)
        assert explorer.level == unit  # that of the guarantee which gives its threshold
        summary = explorer.summary()
        for answer in ("negative", "inconclusive", "positive"):
            for label, name in enumerate(("intact", "fractured")):
                assert summary[f"{name}_{answer}"] == ((answers == answer) & (cases.label == label)).sum()
        assert said(explorer).endswith("Recall is guaranteed with what is inconclusive counted as found.")
        explorer.defer = 1
        explorer.threshold = 0.9
        assert said(explorer).endswith(f"Guaranteed: {digits(explorer._presets.at(unit)['guaranteed'])}.")


def test_handles_never_cross(undrawn):
    explorer = ThresholdExplorer(made_table(), threshold=0.2, defer=0.4)
    explorer.threshold = 0.6
    assert handles(explorer) == ((0.6, 0.6), (0.6, 0.6))
    assert explorer.summary()["coverage"] == 1
    for _ in range(2):  # also where it changes nothing but the number typed
        explorer._boxes[1].value = 0.3
        assert handles(explorer) == ((0.6, 0.6), (0.6, 0.6))
    explorer.threshold = 0.1
    assert explorer.defer == 0.6
    with pytest.raises(
        ValueError, match=r"from the threshold, 0\.1000, up to defer; found 0\.0500, which lies"
    ):
        explorer.defer = 0.05
    with pytest.raises(ValueError, match=r"from the threshold, 0\.2000, up to defer; found 0\.1000"):
        ThresholdExplorer(made_table(), threshold=0.2, defer=0.1)
    with pytest.raises(ValueError, match="must be in"):
        explorer.defer = float("nan")
    assert explorer.defer == 0.6


def test_one_handle_has_no_second_one_to_move(standing):
    assert standing.defer is None
    assert len(standing._boxes) == 1
    with pytest.raises(ValueError, match="This slider has one handle"):
        standing.defer = 0.5


def test_freezing_leaves_the_second_handle_out(tmp_path, undrawn):
    table = made_table(studies=100)
    write_predictions(table, tmp_path / "predictions.csv")
    explorer = ThresholdExplorer(table, threshold=0.2, defer=0.4, freeze=tmp_path)
    assert "What is inconclusive above it is not frozen with it." in asked_and_confirmed(explorer)
    assert read_decision(tmp_path).decisions == {"vertebra": explorer.decision}
    assert explorer.decision.threshold == 0.2


def test_the_images_have_alternative_texts_that_follow_the_slider(undrawn):
    explorer = ThresholdExplorer(made_table(), threshold=0.2)
    for level, name in (("all", "All vertebrae"), ("patient", "Patients")):
        explorer.level = level
        curve, counts, rates = (image.tooltip for image in explorer._images.values())
        assert curve == f"Precision–recall curve, {name}, with the point that the threshold gives"
        found = explorer._point().recalls
        assert (
            counts == f"Confusion matrix; recall: {', '.join(f'{c} {written(found[c])}' for c in VERTEBRAE)}"
        )
        assert rates == "Rates, and how many of 1,000 patients, with 95 % intervals"
    explorer.threshold = 0.9
    assert explorer._images["counts"].tooltip != counts
    for image in explorer._images.values():
        assert image.get_state()["description"] == ""  # without it, JupyterLab fails at a tooltip
    two = ThresholdExplorer(made_table(), threshold=0.2, defer=0.4)._images["counts"].tooltip
    assert re.search("; recall, deferred found: C1 .*; recall, deferred lost: C1 ", two)


def test_no_control_shows_null_as_its_tooltip(standing):
    """That is what JupyterLab makes of a control with a label and without one."""
    deferring = ThresholdExplorer(made_table(), threshold=0.2, defer=0.4)
    for explorer in (standing, deferring):
        for control in (explorer._slider, *explorer._boxes, explorer._percent):
            assert control.tooltip


def test_a_line_above_the_slider_says_to_re_run_the_cell(standing, capture_display):
    standing._ipython_display_()
    (line, _), (slider, options) = capture_display
    assert "Re-run this cell" in line.data
    assert (slider, options) == (standing._repr_mimebundle_(), {"raw": True})
    looks = standing.widget.children[-1].value  # hides it while the slider is there and alive
    assert re.search(
        r":has\(\.cspine-rerun\):has\(.*\.cspine-explorer:not\(\.jupyter-widgets-disconnected\)", looks
    )
    assert 'class="cspine-rerun"' in line.data


def filtered(rgb):
    """Colours (n, 3) in 0 … 1 as the dark theme's filter shows them.

    Source: W3C, Filter Effects Module Level 1, sections 13.3 (hueRotate) and 13.6 (invert).
    """
    amount = float(re.search(r"invert\(([\d.]+)\) hue-rotate\(180deg\)", widget._LOOKS)[1])
    light = np.array([0.213, 0.715, 0.072])
    turned = 2 * np.tile(light, (3, 1)) - np.eye(3)  # cos 180° = −1, sin 180° = 0
    return np.clip((amount + rgb * (1 - 2 * amount)) @ turned.T, 0, 1)


def contrast(one, other):
    """Source: WCAG 2.2, relative luminance and contrast ratio."""
    linear = [np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4) for c in (one, other)]
    bright = sorted(c @ [0.2126, 0.7152, 0.0722] for c in linear)
    return (bright[1] + 0.05) / (bright[0] + 0.05)


@pytest.mark.parametrize("look", [np.asarray, filtered], ids=["light", "dark"])
def test_texts_and_colours_stand_out_from_the_paper_in_both_themes(look):
    def on_white(colour):
        return contrast(look(np.array(to_rgb(colour))), look(np.ones(3)))

    assert on_white(INK) > 7
    assert on_white(GREY) > 3.9  # of small notes
    assert all(on_white(colour) > 2 for colour in (FRACTURED, INTACT, INCONCLUSIVE, PINK, GREY))
    for share in np.linspace(0, 1, 21):  # the large figures in the confusion matrix
        cell = np.array(matplotlib.colormaps["Blues"](share / 1.2)[:3])
        assert contrast(look(np.array(to_rgb(ink_on(share)))), look(cell)) > 3


def test_what_a_notebook_stores_shows_without_a_kernel(standing):
    bundle = standing._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in bundle
    assert pixels(b64decode(bundle["image/png"])).shape[2] == 3
    assert bundle["text/plain"].startswith("All vertebrae at threshold 0.2000: tp ")
    without_state = WidgetsDataTypeFilter(notebook_metadata={"": {}}, resources={"metadata": {}})
    assert without_state(bundle) == ["image/png"]


def test_a_button_freezes_the_decision_in_the_run_folder_but_asks_first(tmp_path, undrawn):
    table = made_table(studies=100)
    write_predictions(table, tmp_path / "predictions.csv")
    decision = choose_decision(table, Rule("max_f1"))
    explorer = ThresholdExplorer(table, decision, guarantees=promised(table), freeze=tmp_path)
    freezer = explorer._freezer
    freezer.confirm()
    assert not (tmp_path / "decision.json").exists()  # nothing was asked
    freezer.ask()
    assert freezer.words.startswith(f"Freeze threshold {digits(explorer.threshold)} at vertebra level?")
    assert not (tmp_path / "decision.json").exists()
    freezer.confirm()
    assert freezer.words == f"Frozen: threshold {digits(explorer.threshold)} at vertebra level."
    assert read_decision(tmp_path).decisions == {"vertebra": decision}
    explorer._jumps["guaranteed"].click()
    assert freezer.words == ""  # it was about another threshold
    freezer.ask()
    assert "The guarantee holds for it." in freezer.words
    assert f"It replaces what {tmp_path.name}/decision.json holds for that level." in freezer.words
    freezer.confirm()
    assert read_decision(tmp_path).decisions == {"vertebra": explorer.decision}
    assert explorer.decision.rule.objective == "stated"
    assert read_decision(tmp_path).guarantees == (promised(table),)


def asked_and_confirmed(explorer):
    """What the freezing button asked; it was confirmed."""
    explorer._freezer.ask()
    asked = explorer._freezer.words
    explorer._freezer.confirm()
    return asked


@pytest.fixture
def capture_display(monkeypatch):
    """What is handed to the notebook to show, with its options."""
    shown = []
    monkeypatch.setattr(widget, "display", lambda what, **options: shown.append((what, options)))
    return shown


@pytest.fixture
def undrawn(monkeypatch):
    """Explorers without a picture, for what is frozen and what is said."""
    none = SimpleNamespace(png=lambda *_, **__: b"", pngs=lambda *_, **__: {})
    monkeypatch.setattr(widget, "Panels", lambda *_, **__: none)


@pytest.fixture
def shipped(tmp_path, undrawn):
    """The built-in run as it comes: decisions at both levels, and the test split opened with them."""
    run, table = tmp_path / "builtin", made_table(studies=60)
    table["split"] = np.where(table[UID].str.slice(2).astype(int) < 40, "validation", "test")
    write_predictions(table, run / "predictions.csv")
    chosen = [
        choose_decision(table, Rule("max_f1")),
        choose_decision(table, Rule("max_f1", level="patient", aggregation=Aggregation("max"))),
    ]
    freeze(run, chosen, table)
    evaluate_on_test(run, table)
    return run


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_freezing_on_the_built_in_run_touches_nothing_but_a_copy(shipped):
    table = read_predictions(shipped / "predictions.csv")
    before, practice = contents(shipped), shipped.with_name("practice")
    explorer = ThresholdExplorer(table[table["split"] == "validation"], threshold=0.798, freeze=shipped)
    asked = asked_and_confirmed(explorer)
    assert 'The built-in run stays as it is: this goes to a copy, the run "practice".' in asked
    assert "the test split has been opened once before." in asked
    assert explorer._freezer.words == "Frozen in the copy 'practice': threshold 0.7980 at vertebra level."
    assert contents(shipped) == before
    found = read_decision(practice)
    assert found.decisions["vertebra"].threshold == 0.798
    assert found.decisions["patient"] == read_decision(shipped).decisions["patient"]
    assert found.said("vertebra", "test_openings_before") == 1
    evaluate_on_test(practice, table)  # the copy is a run of its own
    explorer.threshold = 0.5
    assert "the test split has been opened 2 times before." in asked_and_confirmed(explorer)
    assert contents(shipped) == before


def retrained(shipped):
    """The built-in run with other predictions, nothing frozen, the test split never opened."""
    table = read_predictions(shipped / "predictions.csv")
    for name in ("decision.json", "test_openings.csv"):
        (shipped / name).unlink()
    table["probability"] /= 2
    write_predictions(table, shipped / "predictions.csv")
    return table


def without_marker(folder):
    return {name: held for name, held in contents(folder).items() if name != "practice_of.sha256"}


def test_practice_begins_again_where_the_run_has_other_predictions(shipped):
    practise(shipped)
    (shipped.with_name("practice") / "decision.json").unlink()
    assert not (practise(shipped) / "decision.json").exists()  # what was done there stays
    retrained(shipped)
    copy = practise(shipped)
    assert without_marker(copy) == contents(shipped)
    with pytest.raises(FileNotFoundError, match="Predict with the run"):
        practise(shipped.parent / "elsewhere" / "builtin")


def test_the_question_about_a_copy_of_earlier_predictions_says_that_it_is_made_anew(shipped):
    copy = practise(shipped)
    table = retrained(shipped)
    explorer = ThresholdExplorer(table[table["split"] == "validation"], threshold=0.2, freeze=shipped)
    asked = asked_and_confirmed(explorer)
    assert (
        "The copy there is of earlier predictions: it is replaced, and what was done there is lost." in asked
    )
    assert "It replaces what" not in asked
    assert "the test split has not been opened yet." in asked
    assert explorer._freezer.words.startswith("Frozen in the copy 'practice'")
    assert list(read_decision(copy).decisions) == ["vertebra"]


def test_a_copy_that_was_stopped_half_way_is_finished(shipped):
    copy = practise(shipped)
    for name in ("predictions.csv", "predictions.csv.sha256"):
        (copy / name).unlink()
    assert without_marker(practise(shipped)) == contents(shipped)
    before = (copy / "practice_of.sha256").read_bytes()
    earlier = (copy / "predictions.csv").read_bytes()
    retrained(shipped)
    practise(shipped)
    assert (copy / "practice_of.sha256").read_bytes().startswith(before)
    (copy / "predictions.csv").write_bytes(earlier)  # the marker is written first, the predictions last
    assert without_marker(practise(shipped)) == contents(shipped)


def own_run(shipped):
    """A run of the user's own that is called `practice`: other predictions, a decision, one opening."""
    run, table = shipped.with_name("practice"), read_predictions(shipped / "predictions.csv")
    table["probability"] = table["probability"] ** 2
    write_predictions(table, run / "predictions.csv")
    chosen = [
        choose_decision(table, Rule("max_youden")),
        choose_decision(table, Rule("max_youden", level="patient", aggregation=Aggregation("max"))),
    ]
    freeze(run, chosen, table)
    evaluate_on_test(run, table)
    return run


def with_weights(shipped):
    """The built-in run's files and weights under that name: its predictions are the same."""
    run = shipped.with_name("practice")
    run.mkdir()
    for name, held in contents(shipped).items():
        (run / name).write_bytes(held)
    (run / "model.safetensors").write_bytes(b"weights")
    return run


def put_in_the_copy(shipped):
    """Other predictions where our copy's were."""
    run = practise(shipped)
    table = read_predictions(run / "predictions.csv")
    write_predictions(table.assign(probability=table["probability"] ** 2), run / "predictions.csv")
    return run


def gone_on_with(shipped):
    """Our copy, gone on with to its model card; the built-in run was trained again since."""
    run = practise(shipped)
    (run / "MODEL_CARD.md").write_text("of the earlier predictions")
    retrained(shipped)
    return run


def a_file(shipped):
    run = shipped.with_name("practice")
    run.mkdir()
    (run / "notes.txt").write_text("mine")
    return run


@pytest.mark.slow
@pytest.mark.parametrize("make", [own_run, with_weights, put_in_the_copy, gone_on_with, a_file])
def test_a_run_of_the_users_own_called_practice_is_never_written_over(shipped, make):
    run = make(shipped)
    before, table = contents(run), read_predictions(shipped / "predictions.csv")
    explorer = ThresholdExplorer(table[table["split"] == "validation"], threshold=0.6, freeze=shipped)
    asked = asked_and_confirmed(explorer)
    assert "'practice' is where decisions that try out the built-in run are frozen, and" in asked
    assert "Rename that folder, and freeze again." in asked
    assert contents(run) == before
    with pytest.raises(ValueError, match="Rename that folder"):
        practise(shipped)
    assert contents(run) == before
    run.rename(run.with_name("mine"))
    asked_and_confirmed(explorer)
    assert explorer._freezer.words.startswith("Frozen in the copy 'practice'")
    assert contents(run.with_name("mine")) == before


def test_our_copy_that_was_gone_on_with_is_frozen_in_while_its_predictions_are_the_runs(shipped):
    copy, table = practise(shipped), read_predictions(shipped / "predictions.csv")
    (copy / "MODEL_CARD.md").write_text("a card")
    explorer = ThresholdExplorer(table[table["split"] == "validation"], threshold=0.6, freeze=shipped)
    assert "It replaces what" in asked_and_confirmed(explorer)
    assert read_decision(copy).decisions["vertebra"].threshold == 0.6
    assert (copy / "MODEL_CARD.md").read_text() == "a card"


def to_the_run(practice, shipped):
    practice.symlink_to(shipped.name)


def to_elsewhere(practice, shipped):
    elsewhere = shipped.parent / "elsewhere"
    elsewhere.mkdir()
    practice.symlink_to(elsewhere)


def to_nothing(practice, shipped):
    practice.symlink_to(shipped.parent / "nothing")


def no_folder(practice, shipped):
    practice.write_text("a file")


@pytest.mark.parametrize("lead", [to_the_run, to_elsewhere, to_nothing, no_folder])
def test_where_practice_is_a_link_or_a_file_nothing_is_frozen(shipped, lead):
    practice = shipped.with_name("practice")
    lead(practice, shipped)
    before, table = contents(shipped), read_predictions(shipped / "predictions.csv")
    explorer = ThresholdExplorer(table[table["split"] == "validation"], threshold=0.6, freeze=shipped)
    assert "is no folder of its own" in asked_and_confirmed(explorer)
    with pytest.raises(ValueError, match="is no folder of its own"):
        practise(shipped)
    assert contents(shipped) == before
    assert not (shipped.parent / "nothing").exists()


def test_a_built_in_run_without_predictions_says_so_before_anything_is_asked(shipped):
    table = read_predictions(shipped / "predictions.csv")
    explorer = ThresholdExplorer(table[table["split"] == "validation"], threshold=0.6, freeze=shipped)
    (shipped / "predictions.csv").unlink()
    assert "Predict with the run (notebook 03), then freeze." in asked_and_confirmed(explorer)
    assert not shipped.with_name("practice").exists()


def test_undo_after_the_copy_was_deleted_says_that_there_is_nothing_to_undo(shipped):
    table = read_predictions(shipped / "predictions.csv")
    explorer = ThresholdExplorer(table[table["split"] == "validation"], threshold=0.6, freeze=shipped)
    asked_and_confirmed(explorer)
    shutil.rmtree(shipped.with_name("practice"))
    explorer._freezer._back.click()
    assert explorer._freezer.words == "practice/decision.json is gone, so there is nothing to undo."
    assert not shipped.with_name("practice").exists()


def test_undo_leaves_alone_what_was_frozen_since(shipped):
    table = read_predictions(shipped / "predictions.csv")
    first, second = (
        ThresholdExplorer(table[table["split"] == "validation"], threshold=threshold, freeze=shipped)
        for threshold in (0.6, 0.7)
    )
    asked_and_confirmed(first)
    asked_and_confirmed(second)
    first._freezer._back.click()
    assert first._freezer.words.startswith("practice/decision.json was changed since.")
    assert read_decision(shipped.with_name("practice")).decisions["vertebra"].threshold == 0.7


def test_freezing_can_be_undone_until_the_test_split_is_opened(shipped):
    run = shipped.rename(shipped.with_name("mine"))
    table, before = read_predictions(run / "predictions.csv"), contents(run)
    explorer = ThresholdExplorer(table[table["split"] == "validation"], threshold=0.6, freeze=run)
    freezer = explorer._freezer
    assert freezer._back not in freezer.widget.children  # there is nothing to undo
    asked = asked_and_confirmed(explorer)
    assert "copy" not in asked
    assert "the test split has been opened once before." in asked
    assert read_decision(run).decisions["vertebra"].threshold == 0.6
    explorer.threshold = 0.7
    assert freezer._back in freezer.widget.children
    freezer._back.click()
    assert freezer.words == "Undone: decision.json is as it was before."
    assert contents(run) == before
    assert freezer._back not in freezer.widget.children
    asked_and_confirmed(explorer)
    evaluate_on_test(run, table)
    freezer._back.click()
    assert "The test split was opened since, 2 time(s) by now" in freezer.words
    assert read_decision(run).decisions["vertebra"].threshold == 0.7


def test_undoing_the_first_freezing_leaves_no_decision(tmp_path, undrawn):
    write_predictions(made_table(), tmp_path / "predictions.csv")
    explorer = ThresholdExplorer(made_table(), threshold=0.2, freeze=tmp_path)
    assert "the test split has not been opened yet." in asked_and_confirmed(explorer)
    assert (tmp_path / "decision.json").exists()
    explorer._freezer._back.click()
    assert not (tmp_path / "decision.json").exists()


def test_git_ignores_the_run_that_practice_goes_to():
    rules = (Path(__file__).parents[1] / ".gitignore").read_text().splitlines()
    assert "checkpoints/*" in rules
    assert not [rule for rule in rules if rule.startswith("!checkpoints/prac")]


def test_what_is_asked_is_withdrawn_when_the_slider_moves_or_on_no(undrawn):
    explorer = ThresholdExplorer(made_table(), threshold=0.2, freeze=lambda *_, **__: pytest.fail("frozen"))
    freezer = explorer._freezer
    for withdraw in (lambda: setattr(explorer, "threshold", 0.3), freezer._cancel.click):
        freezer.ask()
        assert freezer.words
        withdraw()
        assert not freezer.words
        freezer.confirm()


def test_the_button_calls_what_it_was_given_and_says_what_is_wrong(undrawn):
    calls = []
    explorer = ThresholdExplorer(made_table(), threshold=0.2, freeze=lambda *a, **k: calls.append((a, k)))
    explorer.level = "patient"
    explorer._freezer.ask()
    explorer._freezer.confirm()
    ((decision,), options) = calls[0]
    assert (decision.threshold, decision.rule.level, decision.rule.objective) == (0.2, "patient", "stated")
    assert decision.rule.aggregation == Aggregation("max")
    assert options == {"guarantees": []}
    explorer.level = "C2"
    explorer._freezer.ask()
    assert explorer._freezer.words.startswith("A decision is for all vertebrae, or for patients.")


def test_a_decision_that_cannot_be_frozen_says_why(tmp_path, undrawn):
    explorer = ThresholdExplorer(made_table(), threshold=0.2, freeze=tmp_path)
    explorer._freezer.ask()
    explorer._freezer.confirm()
    assert "predictions.csv" in explorer._freezer.words
    write_predictions(made_table(seed=1), tmp_path / "predictions.csv")
    explorer._freezer.ask()
    explorer._freezer.confirm()
    assert "not made on the validation split of these predictions" in explorer._freezer.words


def test_without_freeze_there_is_no_such_button(standing):
    assert standing._freezer.widget not in standing.widget.children


def test_only_levels_with_both_classes_are_offered(undrawn):
    table = made_table()
    table.loc[table["vertebra"] == "C3", "label"] = 0
    explorer = ThresholdExplorer(table, threshold=0.2)
    offered = [level for _, level in explorer._levels.options]
    assert offered == [level for level in LEVELS if level != "C3"]
    with pytest.raises(ValueError, match="Level 'C3' is not offered: these data allow all, C1, C2, C4"):
        explorer.level = "C3"


def test_any_table_will_do_even_one_vertebra_of_few_studies(undrawn):
    table = made_table(studies=3)
    explorer = ThresholdExplorer(table[table["vertebra"] == "C5"].assign(split="external"))
    assert_summary_is_metrics(explorer, table[table["vertebra"] == "C5"])


def test_one_class_alone_is_refused():
    with pytest.raises(ValueError, match="All 280 labels are alike"):
        ThresholdExplorer(made_table().assign(label=0))


def test_a_broken_table_is_refused():
    with pytest.raises(ValueError, match="probabilit"):
        ThresholdExplorer(made_table().assign(probability=1.5))


@pytest.mark.parametrize("threshold", [-0.1, 1.1, float("nan")])
def test_a_threshold_outside_0_to_1_is_refused(threshold, standing):
    with pytest.raises(ValueError, match="must be in"):
        ThresholdExplorer(made_table(), threshold=threshold)
    with pytest.raises(ValueError, match="must be in"):
        standing.threshold = threshold
    assert standing.threshold == 0.2


def test_a_decision_without_threshold_or_beside_one_is_refused():
    table = made_table()
    decision = choose_decision(table, Rule(precision_floor=1.0, recall_floor=1.0))
    with pytest.raises(ValueError, match="No threshold keeps precision"):
        ThresholdExplorer(table, decision)
    with pytest.raises(ValueError, match="A decision has its threshold"):
        ThresholdExplorer(table, decision, threshold=0.2)


def test_a_decision_about_patients_needs_both_kinds_of_them():
    table = made_table()
    decision = choose_decision(table, Rule("max_f1", level="patient", aggregation=Aggregation("max")))
    with pytest.raises(ValueError, match="The decision is of patient level, where all labels are alike"):
        ThresholdExplorer(table[table.groupby(UID)["label"].transform("max") == 1], decision)


@pytest.mark.parametrize("own", [False, True])
def test_the_words_say_what_a_patients_probability_is_and_when_few_cases_carry_a_threshold(own, undrawn):
    table = with_own(toy(60), "median") if own else toy(60)
    explorer = ThresholdExplorer(table, threshold=float(table["probability"].nlargest(3).iloc[-1]))
    assert "Only 3 cases lie at or above it" in note(explorer)
    assert "by the" not in explorer._repr_mimebundle_()["text/plain"]
    explorer.level = "patient"
    explorer.threshold = 0.2
    said = explorer._repr_mimebundle_()["text/plain"]
    assert f"Patients, by {'the model' if own else 'the max of the vertebrae, at'}" in said
    patients = Cases.of(table, level="patient", aggregation=Aggregation("own" if own else "max")).table()
    assert explorer.summary()["tp"] == (patients["label"] & (patients["probability"] >= 0.2)).sum()
