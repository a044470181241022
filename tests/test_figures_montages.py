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
