import math

import matplotlib
import numpy as np
import pandas as pd
import pytest
from drawn import colours, line, picture, table_to_draw, texts
from matplotlib.figure import Figure
from scipy.stats import binomtest
from simulated import patients_of

from cspine_helpers import metrics
from cspine_helpers.evaluation.cases import Cases, cleared_by_vertebrae
from cspine_helpers.evaluation.intervals import bootstrap, curve_bands
from cspine_helpers.figures import curves, style
from cspine_helpers.labels import UID, VERTEBRAE


@pytest.fixture
def table():
    return table_to_draw()


def test_pr_curves_are_those_of_metrics_and_carry_the_operating_point(table):
    pooled, single, patients = curves.pr_curves(Cases.of(table), threshold=0.3, patient_threshold=0.5).axes
    expected = metrics.pr_curve(table["label"], table["probability"])
    np.testing.assert_array_equal(pooled.lines[0].get_ydata(), expected["precision"])
    point = metrics.rates(metrics.confusion(table["label"], table["probability"], 0.3)).iloc[0]
    assert pooled.lines[2].get_xydata().tolist() == [[point["recall"], point["precision"]]]
    assert pooled.lines[1].get_ydata()[0] == table["label"].mean()
    assert "threshold 0.300" in texts(pooled)
    assert "threshold 0.500" in texts(patients)
    assert [label.get_text()[:2] for label in single.get_yticklabels()] == list(VERTEBRAE)


def test_every_panel_shows_the_curve_and_the_area_of_its_rows(table):
    pooled, single, patients = curves.pr_curves(Cases.of(table), threshold=0.3, patient_threshold=0.5).axes
    rows = {name: table[table["vertebra"] == name] for name in VERTEBRAE}
    rows |= {"patients": Cases.of(table, level="patient").table(), "all": table}
    drawn = {"patients": patients.lines[0], "all": pooled.lines[0]}
    for name, drawn_line in drawn.items():
        expected = metrics.pr_curve(rows[name]["label"], rows[name]["probability"])
        np.testing.assert_array_equal(drawn_line.get_xdata(), expected["recall"])
        np.testing.assert_array_equal(drawn_line.get_ydata(), expected["precision"])
        assert drawn_line.get_drawstyle() == "steps-post"
    areas = {name: metrics.average_precision(its["label"], its["probability"]) for name, its in rows.items()}
    dots = {round(line.get_ydata()[0]): line for line in single.lines if line.get_marker() == "o"}
    assert [dots[row].get_xdata()[0] for row in range(7)] == pytest.approx([areas[n] for n in VERTEBRAE])
    bars = {round(line.get_ydata()[0]): line for line in single.lines if len(line.get_xdata()) == 2}
    for row, name in enumerate(VERTEBRAE):
        many = rows[name]["label"].sum() >= style.FEW_FRACTURES
        assert (row in bars) == (dots[row].get_markerfacecolor() != "white") == many
        if many:
            low, high = bars[row].get_xdata()
            assert low < areas[name] <= high
    chance = [line.get_xdata()[0] for line in single.lines if line.get_marker() == "|"]
    assert chance == [rows[name]["label"].mean() for name in VERTEBRAE]
    assert pooled.get_title(loc="left") == f"All vertebrae: AP {areas['all']:.2f}"
    assert patients.get_title(loc="left") == f"Patients by max: AP {areas['patients']:.2f}"
    for axes, name in ((pooled, "all"), (patients, "patients")):
        prevalence = rows[name]["label"].mean()
        assert set(axes.lines[1].get_ydata()) == {prevalence}
        assert f"chance {prevalence:.2f}" in texts(axes)
    assert {axes.get_xlabel() + axes.get_ylabel() for axes in (pooled, patients)} == {"recallprecision"}


def test_operating_points_are_at_the_rates_of_their_own_level_and_threshold(table):
    pooled, single, patients = curves.pr_curves(Cases.of(table), threshold=0.3, patient_threshold=0.5).axes
    for point, its in ((pooled.lines[2], table), (patients.lines[2], None)):
        its, at = (Cases.of(table, level="patient").table(), 0.5) if its is None else (its, 0.3)
        called = its["probability"] >= at
        hits = (called & (its["label"] == 1)).sum()
        assert point.get_marker() == "o"
        assert point.get_xydata()[0] == pytest.approx([hits / its["label"].sum(), hits / called.sum()])
    assert "threshold" not in texts(single)
    plain = curves.pr_curves(Cases.of(table)).axes
    assert [len(axes.lines) for axes in (plain[0], plain[2])] == [2, 2]
    assert "threshold" not in texts(plain[0]) + texts(plain[2])


@pytest.mark.parametrize(
    ("labels", "probabilities", "side"),
    [
        ([1, 1, 0, 0], [0.9, 0.8, 0.2, 0.1], "right"),  # recall and precision 1: the words lie below
        ([1, 1, 1, 0, 0], [0.9, 0.3, 0.3, 0.2, 0.1], "left"),  # recall a third
        ([1, *[0] * 9], [0.9] * 10, "left"),  # precision a tenth
    ],
)
def test_words_of_an_operating_point_lie_on_the_empty_side(labels, probabilities, side):
    axes = Figure().subplots()
    rows = patients_of(probabilities, labels)
    curves._operating_point(axes, rows, 0.5, colour="k", named=True)
    (words,) = axes.texts
    assert (words.get_ha(), words.get_va()) == ((side, "top") if side == "right" else (side, "bottom"))
    x, y = words.xyann
    assert (x < 0) == (y < 0) == (side == "right")
    curves._operating_point(axes, rows, 0.95, colour="k", named=True)  # calls none: no precision, no words
    assert len(axes.texts) == 1


def test_pr_curves_leave_out_vertebrae_with_one_class(table):
    table.loc[table["vertebra"] == "C3", "label"] = 0
    single = curves.pr_curves(Cases.of(table)).axes[1]
    shown = [label.get_text()[:2] for label in single.get_yticklabels()]
    assert shown == [name for name in VERTEBRAE if name != "C3"]


def test_pr_curves_say_where_patients_are_all_alike(table):
    table.loc[table["vertebra"] == "C1", "label"] = 1
    assert "one class only" in curves.pr_curves(Cases.of(table)).axes[2].get_title(loc="left")


def test_pr_curves_refuse_one_class(table):
    with pytest.raises(ValueError, match="All 350 labels are 0"):
        curves.pr_curves(Cases.of(table.assign(label=0)))


def test_curves_of_vertebrae_and_patients_carry_the_bands_of_bands(table):
    pooled, single, patients = curves.pr_curves(Cases.of(table)).axes
    roc_pooled, roc_patients = curves.roc_curves(Cases.of(table)).axes
    assert not single.collections
    drawn = {
        ("pr", "all"): pooled,
        ("pr", "patient"): patients,
        ("roc", "all"): roc_pooled,
        ("roc", "patient"): roc_patients,
    }
    for (kind, level), axes in drawn.items():
        band = curve_bands(Cases.of(table).of_unit(level), kind=kind)
        corners = axes.collections[0].get_paths()[0].vertices
        across = band["recall" if kind == "pr" else "false_positive_rate"]
        for edge in ("low", "high"):
            edges = np.column_stack([across, band[edge]])
            assert {tuple(point) for point in edges} <= {tuple(point) for point in corners}


def test_roc_curves_are_those_of_metrics(table):
    pooled, patients = curves.roc_curves(Cases.of(table)).axes
    expected = metrics.roc_curve(table["label"], table["probability"])
    np.testing.assert_array_equal(pooled.lines[0].get_xdata(), expected["false_positive_rate"])
    np.testing.assert_array_equal(pooled.lines[0].get_ydata(), expected["recall"])
    rows = Cases.of(table, level="patient").table()
    area = metrics.auroc(rows["label"], rows["probability"])
    assert patients.get_title(loc="left") == f"Patients by max: AUROC {area:.2f}"
    expected = metrics.roc_curve(rows["label"], rows["probability"])
    np.testing.assert_array_equal(patients.lines[0].get_xdata(), expected["false_positive_rate"])
    np.testing.assert_array_equal(patients.lines[0].get_ydata(), expected["recall"])
    area = metrics.auroc(table["label"], table["probability"])
    assert pooled.get_title(loc="left") == f"All vertebrae: AUROC {area:.2f}"
    for axes in (pooled, patients):
        assert axes.lines[0].get_drawstyle() == "steps-post"
        assert axes.lines[1].get_xydata().tolist() == [[0, 0], [1, 1]]
        assert axes.get_xlim() == axes.get_ylim() == (-0.02, 1.02)
    table.loc[table["vertebra"] == "C1", "label"] = 1
    assert "one class only" in curves.roc_curves(Cases.of(table)).axes[1].get_title(loc="left")


def test_curves_of_too_few_patients_say_that_they_have_no_band(table):
    few = table[table[UID].isin(["1.0", "1.1"])]
    few = few.assign(label=(few[UID] == "1.0") * 1)
    for figure in (curves.pr_curves(Cases.of(few)), curves.roc_curves(Cases.of(few))):
        for axes in (figure.axes[0], figure.axes[-1]):
            assert not axes.collections
            assert "no band" in texts(axes)


def test_pictures_leave_global_settings_alone(table):
    def settings():
        return {name: value for name, value in matplotlib.rcParams.items() if name != "backend"}

    before = settings()
    curves.pr_curves(Cases.of(table))
    curves.roc_curves(Cases.of(table))
    assert settings() == before


def test_thresholds_are_lines_through_the_histograms_of_their_level(table):
    vertebrae, patients = curves.score_histograms(Cases.of(table), threshold=0.3, patient_threshold=0.5).axes
    assert [axes.lines[0].get_xdata()[0] for axes in (vertebrae, patients)] == [0.3, 0.5]
    assert "threshold 0.5000" in [text.get_text() for text in patients.get_legend().get_texts()]
    assert not any(axes.lines for axes in curves.score_histograms(Cases.of(table)).axes)


def test_histograms_scale_each_class_to_one(table):
    for axes in curves.score_histograms(Cases.of(table)).axes:
        heights = np.array([patch.get_height() for patch in axes.patches])
        np.testing.assert_allclose(heights.reshape(2, -1).sum(axis=1), 1)


def test_vertebra_against_patient_shows_the_rates_of_each(table):
    left, right = curves.vertebra_against_patient(Cases.of(table), threshold=0.3, patient_threshold=0.5).axes
    np.testing.assert_array_equal(
        line(left, "observed").get_ydata(), cleared_by_vertebrae(Cases.of(table), 0.3)[0]
    )
    patients = Cases.of(table, level="patient").table()
    row = metrics.rates(metrics.confusion(patients["label"], patients["probability"], 0.3)).iloc[0]
    bars = right.containers[1]
    assert bars.get_label() == "patients at 0.3000"
    assert [bar.get_height() for bar in bars] == row[["recall", "precision", "specificity"]].tolist()
    assert len(right.containers) == 3
    found = bootstrap(Cases.of(table, level="patient"), threshold=0.5).set_index("metric")
    whiskers = [path.vertices[:, 1].tolist() for path in right.collections[2].get_paths()]
    assert whiskers == found.loc[["recall", "precision", "specificity"], ["low", "high"]].to_numpy().tolist()
    intact = patients["label"].eq(0).sum()
    first = left.collections[0].get_paths()[0].vertices[:, 1]
    share = cleared_by_vertebrae(Cases.of(table), 0.3)[0][0]
    np.testing.assert_allclose(first, binomtest(round(share * intact), intact).proportion_ci(method="wilson"))
    assert left.get_ylabel() == f"share of {intact} patients without fracture"
    assert len(curves.vertebra_against_patient(Cases.of(table), threshold=0.3).axes[1].containers) == 2


@pytest.fixture
def history():
    epochs = np.arange(1, 6)
    columns = ["train_loss", "validation_loss", "validation_recall", "validation_precision"]
    columns += ["validation_average_precision", "validation_auroc", "threshold", "learning_rate", "seconds"]
    return pd.DataFrame({"epoch": epochs} | dict.fromkeys(columns, 1 / epochs))


@pytest.mark.slow
def test_one_epoch_is_a_dot_and_undefined_values_are_left_out(history):
    whole = curves.learning_curves(history[:1])
    undefined = curves.learning_curves(history[:1].assign(validation_precision=np.nan))
    assert style.FRACTURED in colours(picture(whole)[330:, :495])  # the panel of precision
    recall, precision = undefined.axes[2].lines
    assert recall.get_ydata().tolist() == [1.0]
    assert np.isnan(precision.get_ydata()).all()
    dots = [figure.axes[2].lines[0].get_marker() for figure in (whole, undefined)]
    assert dots == ["o", "o"]
    assert (picture(whole) != picture(undefined)).any()


def test_learning_curves_show_each_column_under_its_name(history):
    history = history.assign(
        **{name: np.arange(5) / n for n, name in enumerate(history.columns[1:], start=7)}
    )
    figure = curves.learning_curves(history)
    drawn = {
        (axes.get_title(loc="left"), line.get_label()): line for axes in figure.axes for line in axes.lines
    }
    columns = {
        ("Loss", "train"): "train_loss",
        ("Loss", "validation"): "validation_loss",
        ("Ranking, validation", "AUROC"): "validation_auroc",
        ("Ranking, validation", "average precision"): "validation_average_precision",
        ("At the threshold, validation", "recall"): "validation_recall",
        ("At the threshold, validation", "precision"): "validation_precision",
        ("Learning rate", "_child0"): "learning_rate",
    }
    assert set(drawn) == set(columns)
    for key, column in columns.items():
        assert drawn[key].get_xdata().tolist() == [1, 2, 3, 4, 5]
        assert drawn[key].get_ydata().tolist() == history[column].tolist()
    assert {axes.get_xlabel() for axes in figure.axes} == {"epoch"}
    units = [axes.get_ylabel() for axes in figure.axes]
    assert units == ["loss", "area under the curve", "rate", "learning rate"]


def test_learning_curves_show_the_dice_of_masks_where_there_are_masks(history):
    shown = [0.1 * n for n in range(len(history))]
    for dice, count in ((shown, 3), (math.nan, 2)):
        axes = curves.learning_curves(history.assign(validation_dice_pos=dice)).axes[2]
        assert len(axes.lines) == count
    axes = curves.learning_curves(history.assign(validation_dice_pos=shown)).axes[2]
    assert axes.get_title(loc="left") == "Calls and masks, validation"  # Dice has nothing of the threshold
    assert axes.get_ylabel() == "rate at the threshold;\nmean Dice of masks"
    masks = axes.lines[-1]
    assert (masks.get_label(), list(masks.get_ydata())) == ("Dice of masks", shown)


def test_learning_curves_mark_the_best_epoch(history):
    figure = curves.learning_curves(history, best_epoch=3, title="Run")
    assert all(3 in set(axes.lines[-1].get_xdata()) for axes in figure.axes)
    assert {axes.get_xlabel() for axes in figure.axes} == {"epoch (dashed: kept, 3)"}


def test_learning_curves_show_the_slice_level_pretraining_where_there_was_one(history):
    before = curves.learning_curves(history, slice_losses=[0.7, 0.5, 0.3]).axes[3]
    assert before.lines[0].get_ydata().tolist() == [0.7, 0.5, 0.3]
    assert "pretraining" in before.get_title(loc="left") + before.get_title()
