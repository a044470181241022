import io

import matplotlib
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from cspine_helpers import labels, splits
from cspine_helpers.figures import cohorts as figures_cohorts
from cspine_helpers.figures import curves as figures_curves
from cspine_helpers.figures import style as plots
from cspine_helpers.labels import PATIENT, TARGETS, UID, VERTEBRAE


@pytest.fixture
def table():
    labels = (np.random.default_rng(0).random((120, 7)) < 0.15).astype(int)
    table = pd.DataFrame(labels, columns=list(VERTEBRAE))
    return table.assign(**{PATIENT: table.max(axis=1), UID: [f"1.{n}" for n in range(len(table))]})


@pytest.fixture
def history():
    epochs = np.arange(1, 6)
    columns = ["train_loss", "validation_loss", "validation_recall", "validation_precision"]
    columns += ["validation_average_precision", "validation_auroc", "threshold", "learning_rate", "seconds"]
    return pd.DataFrame({"epoch": epochs} | dict.fromkeys(columns, 1 / epochs))


def picture(figure) -> np.ndarray:
    """The pixels `(H, W, 3)` that a notebook shows, 110 to the inch; nothing written in them is cut off."""
    image = Image.open(io.BytesIO(figure._repr_png_()))
    assert image.format == "PNG"
    assert image.size == tuple(np.rint(figure.get_size_inches() * 110).astype(int))
    figure.draw_without_rendering()
    for text in figure.findobj(Text):
        if text.get_text() and text.get_visible() and text.axes is not None:
            box = text.get_window_extent().transformed(figure.transFigure.inverted())
            assert -0.005 < box.min.min() < box.max.max() < 1.005, text.get_text()
    return np.asarray(image.convert("RGB"))


def colours(pixels: np.ndarray) -> set[str]:
    """Every colour that covers more than 30 pixels."""
    found, counts = np.unique(pixels.reshape(-1, 3), axis=0, return_counts=True)
    return {matplotlib.colors.to_hex(one / 255).upper() for one in found[counts > 30]}


def texts(axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


def all_pictures(table, history):
    """Each picture with a title of its own, and the colours that it must show."""
    samples = labels.expand(table, table[UID])
    split = splits.split_patients(table)
    dealt = samples.merge(split, on=UID)
    yield (
        figures_cohorts.prevalence_bars(labels.prevalence(table), title="Its title"),
        {plots.GREY, plots.INTACT},
    )
    yield figures_cohorts.imbalance_bars(table, samples, title="Its title"), {plots.FRACTURED, plots.INTACT}
    yield (
        figures_cohorts.cooccurrence_heatmap(labels.cooccurrence(table), title="Its title"),
        {"#08306B"},
    )  # the darkest
    yield figures_cohorts.fractures_per_patient(table, title="Its title"), {plots.FRACTURED, plots.INTACT}
    by_split = splits.split_prevalence(table, split)
    yield figures_cohorts.split_comparison(by_split, title="Its title"), {*plots.SPLIT_COLOURS.values()}
    yield figures_cohorts.leak_picture(dealt, dealt), {*plots.SPLIT_COLOURS.values()}
    yield (
        figures_curves.learning_curves(history, best_epoch=4, title="Its title"),
        {plots.FRACTURED, plots.INTACT},
    )


def test_every_picture_shows_itself_whole_and_touches_no_global_state(table, history):
    before = dict(matplotlib.rcParams)
    for figure, expected in all_pictures(table, history):
        assert isinstance(figure, Figure)
        assert expected <= colours(picture(figure))
        written = [text.get_text() for text in figure.findobj(Text)]
        assert "Its title" in written or len(figure.axes) == 2  # the leak has a title for each half
    assert dict(matplotlib.rcParams) == before


def test_pictures_of_a_cohort_without_fractures_say_so(table):
    table[list(TARGETS)] = 0
    samples = labels.expand(table, table[UID])
    bars = figures_cohorts.prevalence_bars(labels.prevalence(table))
    assert [bar.get_width() for bar in bars.axes[0].patches] == [0] * 8
    assert texts(bars.axes[0]) == ["0.0%  (0)"] * 8
    shares = figures_cohorts.imbalance_bars(table, samples)
    assert {"0 fractured patients", "120 intact: 120.0 for each fractured"} <= set(texts(shares.axes[0]))
    heat = figures_cohorts.cooccurrence_heatmap(labels.cooccurrence(table))
    assert texts(heat.axes[0]).count("0%\n0") == 42
    numbers = figures_cohorts.fractures_per_patient(table)
    assert texts(numbers.axes[0]) == ["120\n100.0%"] + ["0"] * 7
    for figure in (bars, shares, heat, numbers):
        assert len(colours(picture(figure))) > 1


def test_one_epoch_is_a_dot_and_undefined_values_are_left_out(history):
    whole = figures_curves.learning_curves(history[:1])
    undefined = figures_curves.learning_curves(history[:1].assign(validation_precision=np.nan))
    assert plots.FRACTURED in colours(picture(whole)[330:, :495])  # the panel of precision
    recall, precision = undefined.axes[2].lines
    assert recall.get_ydata().tolist() == [1.0]
    assert np.isnan(precision.get_ydata()).all()
    dots = [figure.axes[2].lines[0].get_marker() for figure in (whole, undefined)]
    assert dots == ["o", "o"]
    assert (picture(whole) != picture(undefined)).any()


def test_the_splits_are_compared_with_their_intervals_and_sizes(table):
    split = splits.split_patients(table)
    by_split = splits.split_prevalence(table, split)
    axes = figures_cohorts.split_comparison(by_split).axes[0]
    for container, name in zip(axes.containers, labels.SPLITS, strict=True):
        part = by_split[by_split["split"] == name]
        points, _, (whiskers,) = container
        assert points.get_xdata().tolist() == part["prevalence"].tolist()
        assert points.get_color() == plots.SPLIT_COLOURS[name]
        ends = np.array(whiskers.get_segments())[:, :, 0]
        assert ends == pytest.approx(part[["low", "high"]].to_numpy())
        assert container.get_label() == f"{name}, {(split['split'] == name).sum()} patients"
    rows = np.array([container[0].get_ydata() for container in axes.containers])
    assert np.rint(rows).tolist() == [list(range(8))] * 3  # beside the name of its target
    assert len(np.unique(rows)) == 24  # and apart from the other splits'
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["any, per patient", *VERTEBRAE]
    assert axes.yaxis_inverted()


def test_learning_curves_show_each_column_under_its_name(history):
    history = history.assign(
        **{name: np.arange(5) / n for n, name in enumerate(history.columns[1:], start=7)}
    )
    figure = figures_curves.learning_curves(history)
    drawn = {
        (axes.get_title(loc="left"), line.get_label()): line for axes in figure.axes for line in axes.lines
    }
    columns = {
        ("Loss", "train"): "train_loss",
        ("Loss", "validation"): "validation_loss",
        ("Ranking", "AUROC"): "validation_auroc",
        ("Ranking", "average precision"): "validation_average_precision",
        ("At the threshold", "recall"): "validation_recall",
        ("At the threshold", "precision"): "validation_precision",
        ("Learning rate", "_child0"): "learning_rate",
    }
    assert set(drawn) == set(columns)
    for key, column in columns.items():
        assert drawn[key].get_xdata().tolist() == [1, 2, 3, 4, 5]
        assert drawn[key].get_ydata().tolist() == history[column].tolist()
    assert {axes.get_xlabel() for axes in figure.axes} == {"epoch"}


def test_bars_are_as_long_as_the_prevalence_with_the_interval_around(table):
    prevalence = labels.prevalence(table)
    published = dict.fromkeys(TARGETS, 0.25)
    axes = figures_cohorts.prevalence_bars(prevalence, published=published, title="Title").axes[0]
    assert [bar.get_width() for bar in axes.patches] == prevalence["prevalence"].tolist()
    segments = np.array(axes.collections[0].get_segments())[:, :, 0]
    assert segments == pytest.approx(prevalence[["low", "high"]].to_numpy())
    assert axes.lines[-1].get_xdata().tolist() == [0.25] * 8
    assert axes.get_title(loc="left") == "Title"
    assert texts(axes)[1] == f"{prevalence['prevalence'][1]:.1%}  ({prevalence['positives'][1]})"


def test_imbalance_counts_patients_and_vertebrae(table):
    axes = figures_cohorts.imbalance_bars(table, labels.expand(table, table[UID])).axes[0]
    shown = " | ".join(texts(axes))
    assert f"{table[PATIENT].sum()} fractured patients" in shown
    assert f"{table[list(VERTEBRAE)].to_numpy().sum()} fractured vertebrae" in shown
    assert "840 vertebrae" in shown


def test_cells_of_the_heat_map_are_shares_of_the_row():
    counts = pd.DataFrame(np.diag([10] * 7), index=list(VERTEBRAE), columns=list(VERTEBRAE))
    counts.loc["C1", "C2"] = counts.loc["C2", "C1"] = 4
    shown = texts(figures_cohorts.cooccurrence_heatmap(counts).axes[0])
    assert shown.count("10") == 7
    assert shown.count("40%\n4") == 2
    assert shown.count("0%\n0") == 40


def test_patients_are_counted_by_their_fractures(table):
    axes = figures_cohorts.fractures_per_patient(table).axes[0]
    numbers = table[list(VERTEBRAE)].sum(axis=1)
    assert [bar.get_height() for bar in axes.patches] == [(numbers == n).sum() for n in range(8)]


def test_the_leak_picture_counts_patients_in_several_splits(table):
    samples = labels.expand(table, table[UID][:4])
    whole = samples.assign(split="train")
    torn = whole.copy()
    torn.loc[[0, 8, 9], "split"] = ["test", "test", "validation"]
    left, right = figures_cohorts.leak_picture(torn, whole, patients=3).axes
    assert "2 of 4 patients in several splits" in left.get_title(loc="left")
    assert "0 of 4 patients in several splits" in right.get_title(loc="left")
    codes = left.collections[0].get_array().reshape(3, 7)
    assert codes[0].tolist() == [2, 0, 0, 0, 0, 0, 0]
    assert codes[1].tolist() == [0, 2, 1, 0, 0, 0, 0]


def test_learning_curves_mark_the_best_epoch(history):
    figure = figures_curves.learning_curves(history, best_epoch=3, title="Run")
    assert all(3 in set(axes.lines[-1].get_xdata()) for axes in figure.axes)
    assert {axes.get_xlabel() for axes in figure.axes} == {"epoch (dashed: the best, 3)"}


def test_learning_curves_show_the_slice_level_pretraining_where_there_was_one(history):
    before = figures_curves.learning_curves(history, slice_losses=[0.7, 0.5, 0.3]).axes[3]
    assert before.lines[0].get_ydata().tolist() == [0.7, 0.5, 0.3]
    assert "pretraining" in before.get_title(loc="left") + before.get_title()


def test_a_saved_figure_has_the_same_bytes_every_time_and_no_version(table, tmp_path, monkeypatch):
    monkeypatch.setenv("CSPINE_ROOT", str(tmp_path))
    prevalence = labels.prevalence(table)
    first = plots.save_figure(figures_cohorts.prevalence_bars(prevalence), "01_prevalence")
    assert first == tmp_path / "figures" / "01_prevalence.png"
    second = plots.save_figure(
        figures_cohorts.prevalence_bars(prevalence), "01_prevalence", cohort="rsna2022"
    )
    assert second == tmp_path / "figures" / "rsna2022" / "01_prevalence.png"
    assert (
        first.read_bytes() == second.read_bytes() == figures_cohorts.prevalence_bars(prevalence)._repr_png_()
    )
    assert b"Matplotlib" not in first.read_bytes()


def test_a_figure_is_written_anywhere_in_one_step(table, tmp_path):
    figure = figures_cohorts.fractures_per_patient(table)
    path = tmp_path / "new" / "1.2.3.png"
    assert plots.write_figure(figure, path) == path
    assert path.read_bytes() == figure._repr_png_()
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_figure_that_cannot_be_drawn_leaves_the_old_one(table, tmp_path, monkeypatch):
    path = tmp_path / "1.2.3.png"
    path.write_bytes(b"old")
    figure = figures_cohorts.fractures_per_patient(table)

    def fail(*_, **__):
        raise ValueError("no ink")

    monkeypatch.setattr(figure, "savefig", fail)
    with pytest.raises(ValueError, match="no ink"):
        plots.write_figure(figure, path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == {path.name: b"old"}


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".."])
def test_a_figure_name_that_is_a_path_is_refused(name, table, tmp_path, monkeypatch):
    monkeypatch.setenv("CSPINE_ROOT", str(tmp_path))
    with pytest.raises(ValueError, match="figure name is up to 64 letters"):
        plots.save_figure(figures_cohorts.fractures_per_patient(table), name)


def test_each_vertebra_and_split_has_its_own_colour():
    assert len({*plots.VERTEBRA_COLOURS.values()}) == len(VERTEBRAE)
    assert len({*plots.SPLIT_COLOURS.values()}) == len(labels.SPLITS)
