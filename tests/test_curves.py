import matplotlib
import numpy as np
import pytest
from drawn import table_to_draw, texts

from cspine_helpers import curves, metrics
from cspine_helpers.bands import curve_bands
from cspine_helpers.labels import UID, VERTEBRAE


@pytest.fixture
def table():
    return table_to_draw()


def test_pr_curves_are_those_of_metrics_and_carry_the_operating_point(table):
    pooled, single, patients = curves.pr_curves(table, threshold=0.3, patient_threshold=0.5).axes
    expected = metrics.pr_curve(table["label"], table["probability"])
    np.testing.assert_array_equal(pooled.lines[0].get_ydata(), expected["precision"])
    point = metrics.rates(metrics.confusion(table["label"], table["probability"], 0.3)).iloc[0]
    assert pooled.lines[2].get_xydata().tolist() == [[point["recall"], point["precision"]]]
    assert pooled.lines[1].get_ydata()[0] == table["label"].mean()
    assert "threshold 0.300" in texts(pooled)
    assert "threshold 0.500" in texts(patients)
    assert [text.get_text()[:2] for text in single.get_legend().get_texts()] == list(VERTEBRAE)


def test_pr_curves_leave_out_vertebrae_with_one_class(table):
    table.loc[table["vertebra"] == "C3", "label"] = 0
    single = curves.pr_curves(table).axes[1]
    assert "C3" not in [text.get_text()[:2] for text in single.get_legend().get_texts()]


def test_pr_curves_say_where_patients_are_all_alike(table):
    table.loc[table["vertebra"] == "C1", "label"] = 1
    assert "one class only" in curves.pr_curves(table).axes[2].get_title(loc="left")


def test_pr_curves_refuse_one_class(table):
    with pytest.raises(ValueError, match="All 350 labels are 0"):
        curves.pr_curves(table.assign(label=0))


def test_curves_of_vertebrae_and_patients_carry_the_bands_of_bands(table):
    pooled, single, patients = curves.pr_curves(table).axes
    roc_pooled, roc_patients = curves.roc_curves(table).axes
    assert not single.collections
    drawn = {
        ("pr", "all"): pooled,
        ("pr", "patient"): patients,
        ("roc", "all"): roc_pooled,
        ("roc", "patient"): roc_patients,
    }
    for (kind, level), axes in drawn.items():
        band = curve_bands(table, kind=kind, level=level)
        corners = axes.collections[0].get_paths()[0].vertices
        across = band["recall" if kind == "pr" else "false_positive_rate"]
        for edge in ("low", "high"):
            edges = np.column_stack([across, band[edge]])
            assert {tuple(point) for point in edges} <= {tuple(point) for point in corners}


def test_roc_curves_are_those_of_metrics(table):
    pooled, patients = curves.roc_curves(table).axes
    expected = metrics.roc_curve(table["label"], table["probability"])
    np.testing.assert_array_equal(pooled.lines[0].get_xdata(), expected["false_positive_rate"])
    np.testing.assert_array_equal(pooled.lines[0].get_ydata(), expected["recall"])
    rows = metrics.patient_level(table)
    area = metrics.auroc(rows["label"], rows["probability"])
    assert patients.get_title(loc="left") == f"Patients: AUROC {area:.2f}"
    table.loc[table["vertebra"] == "C1", "label"] = 1
    assert "one class only" in curves.roc_curves(table).axes[1].get_title(loc="left")


def test_curves_of_too_few_patients_say_that_they_have_no_band(table):
    few = table[table[UID].isin(["1.0", "1.1"])]
    few = few.assign(label=(few[UID] == "1.0") * 1)
    for figure in (curves.pr_curves(few), curves.roc_curves(few)):
        for axes in (figure.axes[0], figure.axes[-1]):
            assert not axes.collections
            assert "no band" in texts(axes)


def test_pictures_leave_global_settings_alone(table):
    def settings():
        return {name: value for name, value in matplotlib.rcParams.items() if name != "backend"}

    before = settings()
    curves.pr_curves(table)
    curves.roc_curves(table)
    assert settings() == before
