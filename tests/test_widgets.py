import io
from base64 import b64decode

import numpy as np
import pandas as pd
import pytest
from conftest import RSNA, needs_rsna
from nbconvert.filters.widgetsdatatypefilter import WidgetsDataTypeFilter
from PIL import Image

from cspine_helpers.decisions import choose_threshold
from cspine_helpers.labels import UID, VERTEBRAE, read_labels
from cspine_helpers.metrics import LEVELS, at_level, confusion, rates
from cspine_helpers.predictions import from_wide
from cspine_helpers.widgets import ThresholdExplorer


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


def shown(explorer):
    """The picture as the notebook would store it."""
    return b64decode(explorer._repr_mimebundle_()["image/png"])


def pixels(png):
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)


def assert_summary_is_metrics(explorer, table):
    rows = at_level(table, explorer.level)
    expected = rates(confusion(rows["label"], rows["probability"], explorer.threshold)).iloc[0].to_dict()
    summary = explorer.summary()
    assert summary.pop("level") == explorer.level
    assert summary == pytest.approx(expected, abs=1e-12, nan_ok=True)


@pytest.mark.parametrize("level", LEVELS)
def test_the_numbers_are_those_of_metrics_at_every_level(level):
    table = made_table()
    explorer = ThresholdExplorer(table, threshold=0.25)
    explorer.level = level
    for threshold in (0.0, 0.1, 0.25, 0.8, 1.0):
        explorer.threshold = threshold
        assert_summary_is_metrics(explorer, table)


@needs_rsna
def test_real_predictions_with_the_threshold_that_was_chosen_on_them():
    wide = pd.read_csv(RSNA / "oof_predictions.csv", dtype={"uid": str})
    table = from_wide(wide, read_labels(RSNA / "train.csv"), "validation", missing="drop")
    decision = choose_threshold(table["label"], table["probability"], precision_floor=0.3)
    explorer = ThresholdExplorer(table, threshold=decision.threshold)
    assert explorer.summary()["recall"] == decision.recall
    assert explorer.summary()["precision"] == decision.precision
    explorer.level = "patient"
    assert_summary_is_metrics(explorer, table)


def test_starts_at_the_threshold_it_was_given_and_writes_it_in_four_decimals():
    explorer = ThresholdExplorer(made_table(), threshold=0.123456789)
    assert explorer.threshold == 0.1235
    assert "Starts at the threshold it was given, 0.1235." in explorer.widget.children[1].value


@pytest.mark.parametrize("scores", [(0.40996, 0.40991), (0.409912346, 0.409912345), (0.1 + 0.2, 0.3)])
def test_what_is_shown_is_what_is_counted_though_thresholds_are_scores(scores):
    table = made_table()
    table.loc[[3, 4], "probability"] = scores
    for threshold in scores:
        explorer = ThresholdExplorer(table, threshold=threshold)
        explorer.threshold = 0.9
        explorer.threshold = threshold
        words, readout = explorer._repr_mimebundle_()["text/plain"], explorer.widget.children[0].children[0]
        text = words.split("threshold ")[1].split(":")[0]
        assert f"given, {text}." in explorer.widget.children[1].value
        assert format(explorer.threshold, readout.readout_format) == text
        called = explorer.summary()["tp"] + explorer.summary()["fp"]
        assert called == (table["probability"] >= float(text)).sum()
        assert called == (table["probability"] >= threshold).sum()


def test_a_dragged_slider_is_written_without_the_noise_of_its_steps():
    explorer = ThresholdExplorer(made_table(), threshold=0.2)
    slider = explorer.widget.children[0].children[0]
    slider.value = 0.41590000000000005  # what a browser sends for 0.4159
    assert "threshold 0.4159:" in explorer._repr_mimebundle_()["text/plain"]
    assert explorer.threshold == 0.4159


def test_without_a_threshold_starts_at_the_highest_f1_and_says_so():
    table = made_table()
    explorer = ThresholdExplorer(table)
    best = choose_threshold(table["label"], table["probability"], objective="max_f1")
    assert explorer.summary()["f1"] == pytest.approx(2 / (1 / best.recall + 1 / best.precision))
    assert "No threshold is chosen. Starts at the highest F1" in explorer.widget.children[1].value


def test_the_slider_and_the_dropdown_move_picture_and_numbers():
    explorer = ThresholdExplorer(made_table(), threshold=0.2)
    slider, levels = explorer.widget.children[0].children
    first = shown(explorer)
    slider.value = 0.4
    second = shown(explorer)
    levels.value = "patient"
    assert len({first, second, shown(explorer)}) == 3
    assert (explorer.threshold, explorer.level) == (0.4, "patient")
    assert explorer.widget.children[2].value == shown(explorer)


def test_moves_leave_no_traces_in_the_picture():
    travelled, fresh = (ThresholdExplorer(made_table(), threshold=0.2) for _ in range(2))
    for threshold in (0.9, 0.05, 1.0, 0.3):
        travelled.threshold = threshold
    travelled.level = "C2"
    travelled.level = "all"
    fresh.threshold = 0.3
    assert shown(travelled) == shown(fresh)


def test_the_quick_redraw_equals_a_whole_drawing():
    explorer = ThresholdExplorer(made_table(), threshold=0.2)
    explorer.threshold = 0.35
    quick = pixels(shown(explorer))
    picture = explorer._picture()
    for artist in (*picture._shapes, *picture._texts):
        artist.set_animated(False)
    picture._canvas.draw()
    whole = np.asarray(picture._canvas.buffer_rgba())[..., :3].astype(int)
    assert (np.abs(quick - whole).max(axis=2) > 32).mean() < 0.001  # other order, half pixels


def test_what_a_notebook_stores_shows_without_a_kernel():
    explorer = ThresholdExplorer(made_table(), threshold=0.2)
    bundle = explorer._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in bundle
    assert pixels(b64decode(bundle["image/png"])).shape[2] == 3
    assert bundle["text/plain"].startswith("All vertebrae at threshold 0.2000: recall 0.")
    without_state = WidgetsDataTypeFilter(notebook_metadata={"": {}}, resources={"metadata": {}})
    assert without_state(bundle) == ["image/png"]


def test_only_levels_with_both_classes_are_offered():
    table = made_table()
    table.loc[table["vertebra"] == "C3", "label"] = 0
    explorer = ThresholdExplorer(table, threshold=0.2)
    offered = [level for _, level in explorer.widget.children[0].children[1].options]
    assert offered == [level for level in LEVELS if level != "C3"]
    with pytest.raises(ValueError, match="Level 'C3' is not offered: these data allow all, C1, C2, C4"):
        explorer.level = "C3"


def test_any_table_will_do_even_one_vertebra_of_few_studies():
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
def test_a_threshold_outside_0_to_1_is_refused(threshold):
    with pytest.raises(ValueError, match="lies in"):
        ThresholdExplorer(made_table(), threshold=threshold)
    explorer = ThresholdExplorer(made_table(), threshold=0.2)
    with pytest.raises(ValueError, match="lies in"):
        explorer.threshold = threshold
