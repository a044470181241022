import numpy as np
import pytest
from drawn import line, table_to_draw, texts

from cspine_helpers import metrics
from cspine_helpers.evaluation import cases as evaluation_cases
from cspine_helpers.figures import curves as calls


@pytest.fixture
def table():
    return table_to_draw()


def test_sweep_draws_the_rates_at_every_threshold(table):
    labels, probabilities = table["label"], table["probability"]
    axes = calls.threshold_sweep(labels, probabilities, threshold=0.3, precision_floor=0.2).axes[0]
    expected = metrics.rates(metrics.threshold_counts(labels, probabilities))
    for name, label in calls.RATE_NAMES.items():
        np.testing.assert_array_equal(line(axes, label).get_ydata(), expected[name])
    assert "threshold 0.300" in texts(axes)
    assert "floor 0.20" in texts(axes)


def test_confusion_cells_hold_counts_and_shares_of_the_truth():
    row = metrics.confusion([1, 1, 1, 1, 0, 0], [0.9, 0.8, 0.7, 0.1, 0.6, 0.2], 0.5)
    figure = calls.confusions({"Validation": row, "Test": row})
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["Validation", "Test"]
    assert texts(figure.axes[0]) == "3 75.0% 1 25.0% 1 50.0% 1 50.0%"


def test_histograms_scale_each_class_to_one(table):
    for axes in calls.score_histograms(table, threshold=0.3).axes:
        heights = np.array([patch.get_height() for patch in axes.patches])
        np.testing.assert_allclose(heights.reshape(2, -1).sum(axis=1), 1)


def test_vertebra_against_patient_shows_the_rates_of_each(table):
    left, right = calls.vertebra_against_patient(table, threshold=0.3, patient_threshold=0.5).axes
    np.testing.assert_array_equal(
        line(left, "found").get_ydata(), evaluation_cases.cleared_by_vertebrae(table, 0.3)[0]
    )
    patients = evaluation_cases.patient_level(table)
    row = metrics.rates(metrics.confusion(patients["label"], patients["probability"], 0.3)).iloc[0]
    bars = right.containers[1]
    assert bars.get_label() == "patients at 0.3000"
    assert [bar.get_height() for bar in bars] == row[["recall", "precision", "specificity"]].tolist()
    assert len(right.containers) == 3
    assert len(calls.vertebra_against_patient(table, threshold=0.3).axes[1].containers) == 2
