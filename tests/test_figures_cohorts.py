import matplotlib
import numpy as np
import pandas as pd
import pytest
from drawn import colours, labels_to_draw, picture
from matplotlib.figure import Figure
from matplotlib.text import Text

from cspine_helpers import labels, splits
from cspine_helpers.figures import cohorts, style
from cspine_helpers.labels import PATIENT, TARGETS, UID, VERTEBRAE


@pytest.fixture
def table():
    return labels_to_draw()


def texts(axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


def all_pictures(table):
    """Each picture with a title of its own, and the colours that it must show."""
    samples = labels.expand(table, table[UID])
    split = splits.split_patients(table)
    dealt = samples.merge(split, on=UID)
    bars = cohorts.prevalence_bars(labels.prevalence(table), title="Its title")
    yield bars, {style.GREY, style.INTACT}
    yield cohorts.imbalance_bars(table, samples, title="Its title"), {style.FRACTURED, style.INTACT}
    yield cohorts.cooccurrence_heatmap(labels.cooccurrence(table), len(table), title="Its title"), {"#FFFFFF"}
    yield cohorts.fractures_per_patient(table, title="Its title"), {style.FRACTURED, style.INTACT}
    by_split = splits.split_prevalence(table, split)
    yield cohorts.split_comparison(by_split, title="Its title"), {*style.SPLIT_COLOURS.values()}
    yield cohorts.leak_picture(dealt, dealt), {*style.SPLIT_COLOURS.values()}


@pytest.mark.slow
def test_every_picture_shows_itself_whole_and_touches_no_global_state(table):
    before = dict(matplotlib.rcParams)
    for figure, expected in all_pictures(table):
        assert isinstance(figure, Figure)
        assert expected <= colours(picture(figure))
        written = [text.get_text() for text in figure.findobj(Text)]
        assert "Its title" in written or len(figure.axes) == 2  # the leak has a title for each half
    assert dict(matplotlib.rcParams) == before


@pytest.mark.slow
def test_pictures_of_a_cohort_without_fractures_say_so(table):
    table[list(TARGETS)] = 0
    samples = labels.expand(table, table[UID])
    bars = cohorts.prevalence_bars(labels.prevalence(table))
    assert [bar.get_width() for bar in bars.axes[0].patches] == [0] * 8
    assert texts(bars.axes[0]) == ["0.0%  (0)"] * 8
    shares = cohorts.imbalance_bars(table, samples)
    assert {"0 fractured patients", "120 intact: 120.0 for each fractured"} <= set(texts(shares.axes[0]))
    heat = cohorts.cooccurrence_heatmap(labels.cooccurrence(table), len(table))
    assert texts(heat.axes[0]).count("–") == 21
    numbers = cohorts.fractures_per_patient(table)
    assert texts(numbers.axes[0]) == ["120\n100.0%"] + ["0"] * 7
    for figure in (bars, shares, heat, numbers):
        assert len(colours(picture(figure))) > 1


def test_the_splits_are_compared_with_their_intervals_and_sizes(table):
    split = splits.split_patients(table)
    by_split = splits.split_prevalence(table, split)
    axes = cohorts.split_comparison(by_split).axes[0]
    for container, name in zip(axes.containers, labels.SPLITS, strict=True):
        part = by_split[by_split["split"] == name]
        points, _, (whiskers,) = container
        assert points.get_xdata().tolist() == part["prevalence"].tolist()
        assert points.get_color() == style.SPLIT_COLOURS[name]
        ends = np.array(whiskers.get_segments())[:, :, 0]
        assert ends == pytest.approx(part[["low", "high"]].to_numpy())
        assert container.get_label() == f"{name}, {(split['split'] == name).sum()} patients"
    rows = np.array([container[0].get_ydata() for container in axes.containers])
    assert np.rint(rows).tolist() == [list(range(8))] * 3  # beside the name of its target
    assert len(np.unique(rows)) == 24  # and apart from the other splits'
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["any, per patient", *VERTEBRAE]
    assert axes.yaxis_inverted()


def test_bars_are_as_long_as_the_prevalence_with_the_interval_around(table):
    prevalence = labels.prevalence(table)
    published = dict.fromkeys(TARGETS, 0.25)
    axes = cohorts.prevalence_bars(prevalence, published=published, title="Title").axes[0]
    assert [bar.get_width() for bar in axes.patches] == prevalence["prevalence"].tolist()
    segments = np.array(axes.collections[0].get_segments())[:, :, 0]
    assert segments == pytest.approx(prevalence[["low", "high"]].to_numpy())
    assert axes.lines[-1].get_xdata().tolist() == [0.25] * 8
    assert axes.get_title(loc="left") == "Title"
    assert texts(axes)[1] == f"{prevalence['prevalence'][1]:.1%}  ({prevalence['positives'][1]})"


def test_imbalance_counts_patients_and_vertebrae(table):
    axes = cohorts.imbalance_bars(table, labels.expand(table, table[UID])).axes[0]
    shown = " | ".join(texts(axes))
    assert f"{table[PATIENT].sum()} fractured patients" in shown
    assert f"{table[list(VERTEBRAE)].to_numpy().sum()} fractured vertebrae" in shown
    assert "840 vertebrae" in shown


def test_cells_of_the_heat_map_are_observed_over_expected():
    counts = pd.DataFrame(np.diag([10] * 7), index=list(VERTEBRAE), columns=list(VERTEBRAE))
    counts.loc["C1", "C2"] = counts.loc["C2", "C1"] = 4
    shown = texts(cohorts.cooccurrence_heatmap(counts, 50).axes[0])  # 10 · 10 / 50 = 2 are expected
    assert shown.count("10") == 7
    assert shown.count("× 2.0\n4") == 1
    assert shown.count("× 0.0\n0") == 20


def test_patients_are_counted_by_their_fractures(table):
    axes = cohorts.fractures_per_patient(table).axes[0]
    numbers = table[list(VERTEBRAE)].sum(axis=1)
    assert [bar.get_height() for bar in axes.patches] == [(numbers == n).sum() for n in range(8)]


def test_the_leak_picture_counts_patients_in_several_splits(table):
    samples = labels.expand(table, table[UID][:4])
    whole = samples.assign(split="train")
    torn = whole.copy()
    torn.loc[[0, 8, 9], "split"] = ["test", "test", "validation"]
    left, right = cohorts.leak_picture(torn, whole, patients=3).axes
    assert "2 of 4 patients in several splits" in left.get_title(loc="left")
    assert "0 of 4 patients in several splits" in right.get_title(loc="left")
    codes = left.collections[0].get_array().reshape(3, 7)
    assert codes[0].tolist() == [2, 0, 0, 0, 0, 0, 0]
    assert codes[1].tolist() == [0, 2, 1, 0, 0, 0, 0]
