import numpy as np
import pandas as pd
import pytest
from drawn import colours, legible, picture

from cspine_helpers.figures import radiographs
from cspine_helpers.figures.radiographs import Overlay
from cspine_helpers.figures.style import AMBER, BLUE, FRACTURED, GREEN, INTACT

MASK = np.zeros((60, 40), bool)
MASK[20:40, 10:30] = True


def overlay(label=1, *, called=True, shape=(60, 40), **options):
    return Overlay(np.full(shape, 90, np.uint8), label, 0.87, called, **options)


def crowded(metrics=("auroc", "recall", "specificity", "dice_pos")):
    """Subgroups of every kind, in a table as `radiographs.subgroups` makes it."""
    groups = {"part": ("hand", "hip", "leg", "shoulder"), "hardware": ("without hardware", "with hardware")}
    rows = []
    for place, (by, name) in enumerate((by, name) for by, names in groups.items() for name in names):
        for metric in metrics:
            few = int(name in ("hip", "with hardware"))
            value = np.nan if name == "with hardware" and metric == "auroc" else 0.7 + place / 50
            low, high = (np.nan, np.nan) if few else (value - 0.08, value + 0.06)
            rows.append((by, name, 3000 - 500 * place, 210, metric, value, low, high, few))
    columns = ["by", "subgroup", "images", "fractured", "metric", "value", "low", "high", "few"]
    return pd.DataFrame(rows, columns=columns)


def ablated():
    names = ["shipped, three seeds", "without flips at test time", "without pretraining", "classifier only"]
    rows = [
        (
            name,
            metric,
            0.94 - place / 50,
            *((np.nan,) * 3 if not place else np.array([-2, -3, -1]) * place / 100),
        )
        for place, name in enumerate(names)
        for metric in ("auroc", "average_precision", "dice_pos")
        if (place, metric) != (3, "dice_pos")
    ]
    columns = ["run", "metric", "value", "difference", "difference_low", "difference_high"]
    table = pd.DataFrame(rows, columns=columns)
    return table.assign(n=table["metric"].map({"dice_pos": 110}).fillna(1615))


def curve(at):
    found = 0.8 - 0.5 * np.exp(-3 * np.asarray(at, dtype=float))
    columns = {"false_marks": at, "lesion_recall": found, "low": found - 0.1, "high": found + 0.08}
    return pd.DataFrame(columns).assign(reached=(np.asarray(at) < 0.8).astype(int), lesions=144, images=610)


def shortcut():
    what = ["all images", "without", "alone", "without − all"]
    first = pd.DataFrame({"what": what, "value": [0.943, 0.921, 0.574, -0.022], "images": 610})
    second = first.assign(value=[0.943, 0.95, 0.61, 0.007], sign="over 454 pixels")
    table = pd.concat([first.assign(sign="with hardware"), second])
    return table.assign(low=table["value"] - 0.02, high=table["value"] + 0.02, fractured=108)


def torn():
    rows = [("a", "train", 1), ("a", "val", 1), ("b", "train", 0), ("b", "train", 0), ("c", "val", 0)]
    rows += [("d", "train" if number else "val", 0) for number in range(15)]
    table = pd.DataFrame(rows, columns=["patient", "split", "label"])
    return table.assign(
        grouped=table["patient"].map(dict(zip("abcd", ("test", *["train"] * 3), strict=True)))
    )


def drawings():
    sheet = [
        overlay(
            label, called=called, truth=MASK if label else None, predicted=MASK, caption=f"IMG000{n}, hand"
        )
        for n, (label, called) in enumerate([(1, True), (1, False), (0, True), (0, False), (1, True)])
    ]
    image = np.full((60, 40), 90, np.uint8)
    parts = {name: ([image] * 3, [image.T] * 2) for name in ("hand", "shoulder")}
    at = np.linspace(0, 1.5, 31)
    points = {"shipped": curve([0.25, 0.5, 1.0])}
    return {
        "overlays": radiographs.overlay_sheet(sheet, title="Calls"),
        "close-ups": radiographs.close_ups(sheet[:3], title="Calls"),
        "cohort": radiographs.cohort_sheet(parts, counts=dict.fromkeys(parts, (1216, 251)), title="Parts"),
        "froc": radiographs.froc_curves(
            {"shipped": curve(at), "plain": curve(at)}, points=points, rule="intersection over union ≥ 0.1"
        ),
        "subgroups": radiographs.subgroup_dots(crowded(), whole={"auroc": 0.9}, title="Where it is weak"),
        "shortcut": radiographs.shortcut_dots(shortcut(), title="Metal"),
        "ablation": radiographs.ablation_dots(
            ablated(), reference="shipped, three seeds", title="What buys what"
        ),
        "leaks": radiographs.split_leaks(torn(), title="Who leaks"),
    }


@pytest.mark.slow
def test_every_picture_is_legible_at_1200_pixels_and_no_two_labels_overlap():
    for name, figure in drawings().items():
        legible(figure, name)


def test_a_call_is_named_and_wrong_ones_are_framed():
    sheet = [overlay(label, called=called) for label in (1, 0) for called in (True, False)]
    assert [each.call for each in sheet] == ["hit", "miss", "false alarm", "cleared"]
    figure = radiographs.overlay_sheet(sheet)
    panels = [axes for axes in figure.axes if axes.images]
    assert [axes.get_title(loc="left") for axes in panels] == [
        "hit, 0.87",
        "miss, 0.87",
        "false alarm, 0.87",
        "cleared, 0.87",
    ]
    assert "a fractured image that is called" in figure.legends[0].get_title().get_text()
    assert [axes.spines["left"].get_visible() for axes in panels] == [False, True, True, False]


def test_outlines_lie_on_the_masks_border_and_polygons_on_the_pixels_they_hold():
    (panel,) = (
        axes for axes in radiographs.overlay_sheet([overlay(truth=MASK, predicted=MASK)]).axes if axes.images
    )
    shade = panel.images[1].get_array()
    np.testing.assert_array_equal(shade[..., 3] > 0, MASK)
    for outline in panel.collections:
        points = np.concatenate([path.vertices for path in outline.get_paths()])
        assert points.min(axis=0).tolist() == [9.5, 19.5]
        assert points.max(axis=0).tolist() == [29.5, 39.5]
    corners = np.array([(10, 20), (30, 20), (30, 40), (10, 40)])  # the same square in x, y
    drawn = radiographs.overlay_sheet([overlay(truth=[corners])])
    (outline,) = next(axes for axes in drawn.axes if axes.images).patches
    assert outline.get_xy().min(axis=0).tolist() == [9.5, 19.5]
    assert outline.get_xy().max(axis=0).tolist() == [29.5, 39.5]


def test_a_mask_at_the_edge_of_the_image_has_a_closed_outline():
    edge = np.zeros((60, 40), bool)
    edge[:5, :5] = True
    (panel,) = (axes for axes in radiographs.overlay_sheet([overlay(truth=edge)]).axes if axes.images)
    (outline,) = panel.collections
    (path,) = outline.get_paths()
    np.testing.assert_array_equal(path.vertices[0], path.vertices[-1])
    assert panel.get_xlim() == (-0.5, 39.5)


def test_overlays_that_cannot_be_drawn_are_refused():
    with pytest.raises(ValueError, match="no radiograph to draw"):
        radiographs.overlay_sheet([])
    for name in ("truth", "predicted"):
        with pytest.raises(ValueError, match=r"mask of IMG7 is of shape \(40, 60\)"):
            radiographs.overlay_sheet([overlay(caption="IMG7", **{name: MASK.T})])


def test_a_close_up_holds_the_marks_and_shows_the_bone_without_them_beside():
    polygon = np.array([(10, 20), (16, 20), (16, 27), (10, 27)])
    figure = radiographs.close_ups([overlay(truth=[polygon], predicted=MASK, caption="IMG7")])
    whole, plain, marked = (axes for axes in figure.axes if axes.images)
    assert whole.get_xlim() == (-0.5, 39.5)
    assert plain.get_xlim() == marked.get_xlim()
    (left, right), (bottom, top) = marked.get_xlim(), marked.get_ylim()
    assert (left < 9.5, right > 15.5, top < 19.5, bottom > 26.5) == (True,) * 4
    assert right - left == bottom - top == 18  # 0.3 of the image's longer side
    assert (len(plain.collections), len(plain.patches), len(plain.images)) == (0, 0, 1)
    assert (len(marked.collections), len(marked.patches), len(marked.images)) == (1, 1, 2)
    assert whole.get_title(loc="left") == "hit, 0.87"
    alarm = radiographs.close_ups([overlay(0, predicted=MASK)]).axes[2]
    assert alarm.get_ylim() == (48.5, 8.5)  # around the mask, as wide as the image
    nothing = radiographs.close_ups([overlay(0, called=False)]).axes[2]
    assert (nothing.get_xlim(), nothing.get_ylim()) == ((-0.5, 39.5), (59.5, -0.5))
    with pytest.raises(ValueError, match="no radiograph to draw"):
        radiographs.close_ups([])


def test_a_cohorts_sheet_shows_each_part_and_label_with_its_number():
    image = np.full((60, 40), 90, np.uint8)
    figure = radiographs.cohort_sheet({"hand": ([image] * 2, [image])}, counts={"hand": (1216, 251)})
    shown = [axes for axes in figure.axes if axes.images]
    assert [axes.get_title(loc="left") for axes in shown] == ["1,216 intact", "", "251 fractured"]
    assert {INTACT, FRACTURED} <= colours(picture(figure))
    with pytest.raises(ValueError, match="No part has an image"):
        radiographs.cohort_sheet({"hand": ([], [])})


def test_a_froc_curve_its_band_and_its_points_end_where_the_run_makes_no_more_marks():
    at = np.linspace(0, 1.5, 31)
    (axes,) = radiographs.froc_curves({"run": curve(at)}, points={"run": curve([0.5, 1.0])}).axes
    line, end, point = axes.lines  # none of the point at 1.0
    (band,) = axes.collections
    assert line.get_xdata().max() == end.get_xdata()[0] == band.get_paths()[0].vertices[:, 0].max() == at[15]
    assert axes.texts[0].get_text() == "all marks: fewer than\n0.80 false ones per image"
    assert point.get_xydata().tolist() == [[0.5, curve([0.5])["lesion_recall"][0]]]
    assert "144 lesions" in axes.get_ylabel()
    assert "610 images" in axes.get_xlabel()
    (axes,) = radiographs.froc_curves({"run": curve(at[:10])}).axes
    assert (len(axes.lines), len(axes.texts), axes.get_xlim()) == (1, 0, (0, at[9]))  # there may be more
    with pytest.raises(ValueError, match="no curve"):
        radiographs.froc_curves({})


def test_few_groups_are_hollow_and_have_no_interval():
    table = crowded(["auroc"])
    figure = radiographs.subgroup_dots(table, metrics=["auroc"])
    assert "too few groups for an interval" in [text.get_text() for text in figure.legends[0].texts]
    (axes,) = figure.axes
    dots = [line for line in axes.lines if line.get_marker() == "o"]
    hollow = [line.get_ydata()[0] for line in dots if line.get_markerfacecolor() == "white"]
    assert hollow == [1]  # the hip
    assert [text.get_text() for text in axes.texts] == ["not defined"]
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names[0] == "hand\n210 fractured of 3,000"
    with pytest.raises(ValueError, match="no row of 'beauty'"):
        radiographs.subgroup_dots(table, metrics=["beauty"])


def test_shares_of_subgroups_go_from_0_to_1_and_areas_from_chance_or_the_lowest():
    for lower, least in ((0, 0.5), (0.4, 0.2)):
        table = crowded()
        table[["value", "low", "high"]] -= lower
        area, *shares = radiographs.subgroup_dots(table).axes
        assert least - 0.05 < area.get_xlim()[0] < least < 1 < area.get_xlim()[1] < 1.05
        assert {axes.get_xlim() for axes in shares} == {(-0.03, 1.03)}


def test_the_ablation_shows_paired_differences_and_the_runs_own_values():
    figure = radiographs.ablation_dots(ablated(), reference="shipped, three seeds")
    dice = figure.axes[2]
    assert [text.get_text() for text in dice.texts] == ["0.940", "0.920", "0.900", "no mask"]
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles[0] == "AUROC\n1,615 images"
    assert titles[2] == "Dice of fractured images\n110 fractured images"
    dots = {line.get_ydata()[0]: line.get_xdata()[0] for line in dice.lines if line.get_marker() in "oD"}
    assert dots == {0: 0, 1: -0.02, 2: -0.04}
    for options in ({"reference": "best"}, {"reference": "classifier only", "metrics": ["beauty"]}):
        with pytest.raises(ValueError, match=r"The table of runs has no '(best|beauty)'"):
            radiographs.ablation_dots(ablated(), **options)


def test_a_torn_group_is_drawn_in_two_colours_and_whole_where_it_is_split_by_group():
    figure = radiographs.split_leaks(torn())
    before, after = figure.axes
    assert before.get_title(loc="left") == "Published split\n2 of 4 groups in several splits (17 images)"
    assert after.get_title(loc="left") == "Split by group\n0 of 4 groups in several splits (0 images)"

    def seen(axes, row):
        return {tuple(np.round(bar.get_facecolor(), 2)) for bar in axes.patches if round(bar.get_y()) == row}

    assert len(seen(before, 1)) == 2
    assert len(seen(before, 0)) == 2  # the one image of validation is among the 12 that are drawn
    assert len(seen(after, 1)) == 1
    assert before.get_xlabel() == "images of a group, coloured by split; +n: n more, not drawn"
    assert [text.get_text() for text in before.texts] == ["+3"]  # of 15 images, 12 are drawn
    assert {BLUE, AMBER, GREEN} <= colours(picture(figure))
    with pytest.raises(ValueError, match="No image has a split in the column 'split'"):
        radiographs.split_leaks(torn().assign(split=""))


def test_where_no_group_is_torn_the_picture_still_says_so():
    whole = torn().assign(split="train")
    before, _ = radiographs.split_leaks(whole[whole["patient"] != "d"]).axes
    assert before.get_xlabel() == "images of a group, coloured by split"
    assert "0 of 3 groups" in before.get_title(loc="left")


def test_the_shortcut_writes_each_area_with_its_interval():
    left, right = radiographs.shortcut_dots(shortcut()).axes
    assert [text.get_text() for text in left.texts] == [
        "0.943 (0.923 to 0.963)",
        "0.921 (0.901 to 0.941)",
        "0.574 (0.554 to 0.594)",
        "0.950 (0.930 to 0.970)",
        "0.610 (0.590 to 0.630)",
    ]
    assert [text.get_text() for text in right.texts] == [
        "−0.022 (−0.042 to −0.002)",
        "0.007 (−0.013 to 0.027)",
    ]
    names = [text.get_text().split("\n")[0] for text in left.get_yticklabels()]
    assert [names[row] for row in (text.xy[1] for text in right.texts)] == [
        "without those with hardware",
        "without those over 454 pixels",
    ]


def test_an_outline_is_drawn_on_each_panel_under_its_name_and_within_the_image():
    outline = np.array([[5, 5], [30, 5], [30, 50]])
    figure = radiographs.outlined(
        {
            "as stored": (np.zeros((40, 60), np.uint8), [outline]),
            "as displayed": (np.zeros((60, 40), np.uint8), [outline]),
        }
    )
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["as stored", "as displayed"]
    for axes, (height, width) in zip(figure.axes, ((40, 60), (60, 40)), strict=True):
        assert axes.get_xlim() == (-0.5, width - 0.5)
        assert axes.get_ylim() == (height - 0.5, -0.5)
        (patch,) = axes.patches
        assert patch.get_xy()[:3].tolist() == (outline - 0.5).tolist()
    with pytest.raises(ValueError, match="no radiograph to draw"):
        radiographs.outlined({})
