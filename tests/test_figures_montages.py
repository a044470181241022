import matplotlib.colors
import matplotlib.text
import numpy as np
import pandas as pd
import pytest

from cspine_helpers.figures import montages
from cspine_helpers.figures.style import FRACTURED
from cspine_helpers.labels import VERTEBRAE


def blob(slices=15, size=32):
    """A bright disc on grey; channel t of slice s is one value, so that the channel shown can be told."""
    y, x = np.mgrid[:size, :size]
    disc = (x - size / 2) ** 2 + (y - size / 2) ** 2 < (size / 4) ** 2
    array = np.zeros((slices, size, size, 6), np.uint8)
    array[..., :5] = np.where(disc, 180, 60)[..., None] + np.arange(5)
    array[..., 5] = 255 * disc
    return array


def pictures(figure):
    return [axes for axes in figure.axes if axes.images]


def framed(figure):
    return [axes.spines["left"].get_visible() for axes in pictures(figure)]


def texts(figure):
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


@pytest.mark.parametrize("slices", [1, 4, 15, 17])
def test_a_montage_shows_every_slices_central_channel_with_its_outline(slices):
    array = blob(slices)
    shown = pictures(montages.sequence_montage(array, title="C5"))
    assert len(shown) == slices
    for axes, picture in zip(shown, array, strict=True):
        np.testing.assert_array_equal(axes.images[0].get_array(), picture[..., 2])
        (outline,) = axes.collections
        points = outline.get_paths()[0].vertices - 16
        np.testing.assert_allclose(np.hypot(*points.T), 8, atol=1)


def test_fractured_slices_are_framed_and_explained():
    truth = np.array([0, 1, 1, 0])
    for figure in (
        montages.sequence_montage(blob(4), truth=truth),
        montages.attention_montage(blob(4), np.full(4, 0.25), truth=truth),
    ):
        assert framed(figure) == [False, True, True, False]
        assert "fractured slice" in texts(figure)


@pytest.mark.parametrize("truth", [None, np.full(4, np.nan)])
def test_unknown_truth_frames_nothing_and_says_nothing(truth):
    figure = montages.sequence_montage(blob(4), truth=truth)
    assert not any(framed(figure))
    assert texts(figure) == ["mask"]


def test_a_slice_without_mask_has_no_outline():
    array = blob(2)
    array[0, ..., 5] = 0
    first, second = pictures(montages.sequence_montage(array))
    assert (len(first.collections), len(second.collections)) == (0, 1)


def test_the_row_shows_the_slice_of_the_largest_mask():
    array = blob(5)
    array[3, :20, :, 5] = 255
    array[3, ..., 2] = 77
    (axes,) = pictures(montages.vertebra_row({"C4": array}, title="one"))
    assert axes.get_title() == "C4"
    assert (axes.images[0].get_array() == 77).all()


def test_the_row_shows_the_slices_that_were_asked_for():
    arrays = {name: blob(5) for name in ("C2", "C3")}
    arrays["C2"][1, ..., 2] = 77
    first, second = pictures(montages.vertebra_row(arrays, slices={"C2": 1}))
    assert (first.images[0].get_array() == 77).all()
    np.testing.assert_array_equal(second.images[0].get_array(), arrays["C3"][0, ..., 2])
    with pytest.raises(ValueError, match=r"No such slice: C2: 5, C3: -1, C9: 0.*there are C2: 5, C3: 5"):
        montages.vertebra_row(arrays, slices={"C2": 5, "C3": -1, "C9": 0})


def test_bars_are_the_attention_in_the_colour_of_the_truth():
    weights, truth = np.array([0.1, 0.2, 0.3, 0.15, 0.05, 0.05, 0.05, 0.05, 0.05]), np.eye(9)[8]
    figure = montages.attention_montage(blob(9), weights, truth=truth)
    bars = [axes.patches[0] for axes in figure.axes if axes.patches]
    assert [bar.get_height() for bar in bars] == pytest.approx(weights.tolist())
    assert len({axes.get_ylim() for axes in figure.axes if axes.patches}) == 1
    colours = [matched(bar) for bar in bars]
    assert colours == [False] * 8 + [True]


def matched(bar):
    return tuple(bar.get_facecolor()[:3]) == tuple(int(FRACTURED[i : i + 2], 16) / 255 for i in (1, 3, 5))


def test_a_bar_of_all_the_attention_is_as_high_as_its_slice():
    for weights in ([0.7, 0.3, 0, 0], [0.25] * 4):
        figure = montages.attention_montage(blob(4), weights)
        figure.draw_without_rendering()
        bars = [axes for axes in figure.axes if axes.patches]
        for axes, bar in zip(pictures(figure), bars, strict=True):
            assert bar.get_ylim() == (0, 1)
            assert bar.get_window_extent().height == pytest.approx(axes.get_window_extent().height, rel=0.02)


def test_fractures_are_outlined_where_they_are_and_those_of_neighbours_dashed():
    own, other = (np.zeros((3, 32, 32), np.uint8) for _ in range(2))
    own[1, 4:8, 10:16], other[2, 20:22, 3:9] = 1, 1
    given = {"fracture": own, "neighbours": other, "truth": [0, 1, 0]}
    for figure in (
        montages.sequence_montage(blob(3), **given),
        montages.attention_montage(blob(3), np.full(3, 1 / 3), **given),
    ):
        none, first, second = (
            [its for its in axes.collections if its.get_gid()] for axes in pictures(figure)
        )
        assert not none
        for (outline,), name, bounds in (
            (first, "own", (9.5, 3.5, 6, 4)),
            (second, "neighbour", (2.5, 19.5, 6, 2)),
        ):
            assert outline.get_gid() == name
            assert outline.get_paths()[0].get_extents().bounds == pytest.approx(bounds)
            assert matplotlib.colors.to_hex(outline.get_edgecolor()[0]) == FRACTURED.lower()
        assert first[0].get_linestyle() != second[0].get_linestyle()
        assert {"fracture", "fracture of another vertebra"} < set(texts(figure))
    silent = montages.sequence_montage(blob(3), neighbours=0 * other)
    assert texts(silent) == ["mask"]


def test_readers_boxes_lie_on_their_slices_pixel_edges():
    boxes = pd.DataFrame([(1, 8.0, 9.0, 6.0, 5.0)], columns=["slice", "x", "y", "width", "height"])
    figure = montages.sequence_montage(blob(3), boxes=boxes)
    drawn = [[box.get_bbox().bounds for box in axes.patches] for axes in pictures(figure)]
    assert drawn == [
        [],
        [(7.5, 8.5, 6, 5)],
        [],
    ]  # a box's edge x is at x - 0.5 where pixels' middles are whole
    assert "box around the fracture" in texts(figure)


def test_a_scale_bar_is_as_long_as_it_says_and_right_is_on_the_left():
    figure = montages.sequence_montage(blob(2), pixel_mm=0.8)
    for axes in pictures(figure):
        (bar,) = (line for line in axes.lines if line.get_gid() == "scale")
        assert np.ptp(bar.get_xdata()) * 0.8 == pytest.approx(10)
        letters = {text.get_text(): text.get_ha() for text in axes.texts}
        assert letters | {"R": "left", "L": "right", "10 mm": "center"} == letters
    assert not pictures(montages.sequence_montage(blob(2)))[0].lines
    row = montages.vertebra_row({"C1": blob(2), "C2": blob(2)}, pixel_mm={"C2": 0.5})
    assert [len(axes.lines) for axes in pictures(row)] == [0, 1]


def test_a_note_is_beside_the_legend_and_below_the_slices():
    given = {"truth": np.eye(15)[1], "fracture": np.ones((15, 32, 32)), "note": "a note"}
    beside = {"neighbours": given["fracture"]}
    for figure in (
        montages.sequence_montage(blob(15), **given),
        montages.attention_montage(blob(15), np.full(15, 1 / 15), **given, **beside),
        montages.vertebra_row({name: blob(2) for name in VERTEBRAE}, note="a note", title="x"),
    ):
        figure.draw_without_rendering()
        (note,) = (text for text in figure.findobj(matplotlib.text.Text) if text.get_text() == "a note")
        box = note.get_window_extent()
        others = [axes.get_window_extent() for axes in pictures(figure)]
        others += [legend.get_window_extent() for legend in figure.legends]
        assert not any(box.overlaps(other) for other in others)
        assert box.y0 >= 0


def test_marks_of_another_sequence_are_refused():
    with pytest.raises(ValueError, match=r"The fracture is marked.*\(4, 32, 32\); found \(3, 32, 32\)"):
        montages.sequence_montage(blob(4), fracture=np.zeros((3, 32, 32)))
    with pytest.raises(ValueError, match=r"neighbours' fractures.*found \(4, 8, 8\)"):
        montages.attention_montage(blob(4), np.full(4, 0.25), neighbours=np.zeros((4, 8, 8)))
    boxes = pd.DataFrame({"slice": [1, 4], "x": 1.0, "y": 1.0, "width": 1.0, "height": 1.0})
    with pytest.raises(ValueError, match=r"slices 0 to 3 of the sequence; found '?4"):
        montages.sequence_montage(blob(4), boxes=boxes)


def test_weights_and_truth_of_another_length_are_refused():
    with pytest.raises(ValueError, match=r"\(4,\); found \(3,\)"):
        montages.attention_montage(blob(4), np.ones(3) / 3)
    with pytest.raises(ValueError, match=r"\(4,\); found \(5,\)"):
        montages.sequence_montage(blob(4), truth=np.zeros(5))


def attention(known):
    rows = [
        (f"1.{study}", vertebra, study % 2, 0.5, t, weight, float(study % 2 and t == 1) if known else np.nan)
        for study in range(4)
        for vertebra in VERTEBRAE
        for t, weight in enumerate((0.2, 0.5, 0.3))
    ]
    names = ["StudyInstanceUID", "vertebra", "label", "probability", "slice", "attention", "fractured"]
    return pd.DataFrame(rows, columns=names)


@pytest.mark.parametrize("known", [True, False])
def test_levels_show_the_mean_attention_of_fractured_and_intact(known):
    figure = montages.attention_by_level(attention(known), title="levels")
    panels = [axes for axes in figure.axes if axes.get_title(loc="left") in VERTEBRAE]
    assert len(panels) == 7
    for axes in panels:
        fractured, intact, uniform = axes.lines
        np.testing.assert_allclose(fractured.get_ydata(), [0.2, 0.5, 0.3])
        np.testing.assert_allclose(intact.get_ydata(), [0.2, 0.5, 0.3])
        np.testing.assert_allclose(uniform.get_ydata(), 1 / 3)
        assert len(axes.collections) == known


def test_the_line_of_few_fractures_is_dotted():
    table = attention(True)
    one = table[(table["StudyInstanceUID"] == "1.1") | (table["label"] == 0)]
    many = pd.concat([table.assign(StudyInstanceUID=table["StudyInstanceUID"] + f".{n}") for n in range(3)])
    for given, styles in ((one, {":"}), (many, {"-"})):
        panels = [axes for axes in montages.attention_by_level(given).axes if axes.lines]
        assert {axes.lines[0].get_linestyle() for axes in panels} == styles


def test_levels_without_fractures_draw_the_intact():
    table = attention(True)
    figure = montages.attention_by_level(table[table["label"] == 0])
    assert all(len(axes.lines[0].get_xdata()) == 0 for axes in figure.axes if axes.lines)


def test_scores_stand_beside_uniform():
    scores = pd.DataFrame(
        {"auroc": [0.9, 0.6], "share": [0.5, 0.1], "uniform_share": [0.2, 0.2], "top1": [1.0, 0.0]}
    )
    left, right = montages.attention_vs_truth(scores, title="x").axes
    assert [line.get_xdata()[0] for line in left.lines] == [0.5, 0.75]
    assert sum(bar.get_height() for bar in left.patches) == 2
    assert [len(line.get_xdata()) for line in right.lines[1:]] == [1, 1]
    with pytest.raises(ValueError, match="no scores to draw"):
        montages.attention_vs_truth(scores.iloc[:0])
