import numpy as np
import pandas as pd
import pytest
from drawn import colours, legible, picture, texts

from cspine_helpers.figures import explanations
from cspine_helpers.figures.explanations import METRICS, TRIVIAL, Explained
from cspine_helpers.figures.style import FRACTURED, GREY, INTACT, SKY
from cspine_helpers.labels import VERTEBRAE

METHODS = ("grad_cam", "grad_cam_plus_plus", "hires_cam", "integrated_gradients", "attention")


def explained(label=1, *, called=True, methods=METHODS, seed=0, **options):
    """A slice of 64 × 64 pixels, fractured at the left, and maps of 16 × 16 cells that peak there."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:16, :16]
    maps = {
        name: np.exp(-((y - 8) ** 2 + (x - 4) ** 2) / 8) - 0.2 * rng.random((16, 16)) - 0.05
        for name in methods
    }
    truth = np.zeros((64, 64), np.uint8)
    truth[28:42, 12:24] = label
    bone = np.zeros((64, 64), np.uint8)
    bone[20:50, 8:56] = 1
    notes = dict.fromkeys(methods, "hit, AUROC 0.93" if called else "miss, AUROC 0.41")
    known = {"maps": maps, "bone": bone, "notes": notes, "caption": "C5, slice 7", "truth": truth}
    return Explained(
        rng.integers(0, 200, (64, 64)).astype(np.uint8), label, 0.87, called, **(known | options)
    )


def localised(metrics=("pointing", "energy", "auroc", "auroc_inside")):
    rows = [
        (method, metric, 0.9 - place / 12, 0.85 - place / 12, 0.96 - place / 12)
        for metric in metrics
        for place, method in enumerate((*METHODS, *TRIVIAL))
    ]
    return pd.DataFrame(rows, columns=["method", "metric", "value", "low", "high"])


def randomised():
    layers = ["trained", "head", "attention", "recurrent", "blocks.5", "blocks.4", "blocks.3", "conv_stem"]
    rows = []
    for method, fall in {"grad_cam": 1.0, "hires_cam": 0.8, "gradient_input": 0.4, "edges": 0.0}.items():
        for step, layer in enumerate(layers):
            similarity = 1 - fall * step / 7
            rows.append((method, step, layer, similarity, 0.6 + 0.3 * similarity))
    table = pd.DataFrame(rows, columns=["method", "step", "layer", "similarity", "auroc"])
    for name in ("similarity", "auroc"):
        table = table.assign(**{f"{name}_low": table[name] - 0.05, f"{name}_high": table[name] + 0.05})
    return table


def perturbed():
    share = np.linspace(0, 1, 21)
    rows = [
        pd.DataFrame({"method": method, "curve": curve, "share": share, "probability": value})
        for place, method in enumerate(("grad_cam", "attention", "occlusion", "uniform", "centre"))
        for curve, value in (
            ("deletion", 0.9 - 0.8 * share ** (place + 1)),
            ("insertion", share ** (place + 1)),
        )
    ]
    table = pd.concat(rows)
    return table.assign(low=table["probability"] - 0.04, high=table["probability"] + 0.04)


def ablated():
    rows = [
        (change, vertebra, metric, -0.1 * place, -0.1 * place - 0.05, -0.1 * place + 0.05)
        for place, change in enumerate(("zeroed", "swapped", "dilated", "neighbour"))
        for vertebra in ("all", *VERTEBRAE)
        for metric in ("probability_fractured", "auroc", "map_auroc")
    ]
    table = pd.DataFrame(rows, columns=["change", "vertebra", "metric", "value", "low", "high"])
    hollow = (table["vertebra"] == "C3") & (table["metric"] == "auroc")
    return table.assign(low=table["low"].mask(hollow), high=table["high"].mask(hollow))


def neighbours():
    rows = [
        (vertebra, state, value, value - 0.04, value + 0.08, n)
        for vertebra in ("all", *VERTEBRAE)
        for state, value, n in (("broken", 0.2, 14), ("intact", 0.05, 60))
    ]
    return pd.DataFrame(rows, columns=["vertebra", "neighbour", "value", "low", "high", "n"])


def pairs(names):
    rows = [
        (a, b, 0.9 - 0.25 * abs(i - j)) for i, a in enumerate(names) for j, b in enumerate(names) if i < j
    ]
    return pd.DataFrame(rows, columns=["first", "second", "value"])


def drawings():
    sheet = [explained(), explained(called=False), explained(0), explained(0, called=False)]
    differences = localised(("pointing", "auroc")).query("method in @METHODS")
    differences[["value", "low", "high"]] -= 0.8
    return {
        "maps": explanations.maps_sheet(sheet, title="Maps beside the truth"),
        "maps, two": explanations.maps_sheet([explained(methods=METHODS[:2])], title="Maps"),
        "dots": explanations.localisation_dots(localised(), title="Against the truth"),
        "differences": explanations.difference_dots(differences, title="Better than knowing nothing?"),
        "sanity": explanations.sanity_curves(randomised(), limit=0.5, title="Randomised, layer by layer"),
        "perturbation": explanations.perturbation_curves(perturbed(), title="Deletion and insertion"),
        "mask": explanations.mask_ablation_dots(ablated(), title="Without the right mask"),
        "neighbours": explanations.neighbour_dots(
            {"shipped run": neighbours(), "mask pooling": neighbours()}, title="Who answers?"
        ),
        "agreement": explanations.agreement_heatmap(
            {"methods": pairs(METHODS), "seeds": pairs(["seed 0", "seed 1", "seed 2"])}, title="Agreement"
        ),
    }


@pytest.mark.slow
def test_every_picture_is_legible_at_1200_pixels_and_no_two_labels_overlap():
    for name, figure in drawings().items():
        legible(figure, name)


def test_a_map_covers_the_image_whatever_its_grid_and_shows_its_positive_part_only():
    values = np.full((16, 16), -1.0)
    values[4, 12] = 2
    case = explained(methods=["grad_cam"], maps={"grad_cam": values}, notes={"grad_cam": "miss"})
    image, drawn = (axes for axes in explanations.maps_sheet([case]).axes if axes.images)
    shade = drawn.images[1]
    assert tuple(shade.get_extent()) == (-0.5, 63.5, 63.5, -0.5)
    np.testing.assert_array_equal(np.asarray(shade.get_array())[..., 3] > 0, values > 0)
    assert drawn.lines[0].get_xydata().tolist() == [[49.5, 17.5]]  # the middle of that cell, in pixels
    assert drawn.get_xlabel() == "miss"
    assert (drawn.get_xlim(), drawn.get_ylim()) == (image.get_xlim(), image.get_ylim())


@pytest.mark.parametrize(
    ("values", "words"),
    [(np.zeros((4, 4)), "no positive part"), (-np.eye(4), "no positive part"), (np.ones((4, 4)), "constant")],
)
def test_a_map_that_marks_nothing_says_so_and_has_no_maximum(values, words):
    case = explained(maps={"grad_cam": values}, notes={})
    _, drawn = (axes for axes in explanations.maps_sheet([case]).axes if axes.images)
    assert texts(drawn) == words
    assert (len(drawn.images), len(drawn.lines)) == (1, 0)


def test_maps_that_cannot_be_drawn_are_refused():
    with pytest.raises(ValueError, match="no map to draw"):
        explanations.maps_sheet([])
    with pytest.raises(ValueError, match=r"same methods, in one order; the first has 'grad_cam'"):
        explanations.maps_sheet([explained(methods=["grad_cam"]), explained(methods=["occlusion"])])
    with pytest.raises(ValueError, match=r"bone of C5, slice 7 is of shape \(9, 9\)"):
        explanations.maps_sheet([explained(bone=np.ones((9, 9)))])
    with pytest.raises(ValueError, match=r"is \(h, w\); found \(2, 8, 8\) for C5, slice 7"):
        explanations.maps_sheet([explained(methods=["grad_cam"], maps={"grad_cam": np.ones((2, 8, 8))})])


def test_a_map_of_nan_says_so():
    case = explained(methods=["grad_cam"], maps={"grad_cam": np.full((8, 8), np.nan)})
    words = {text.get_text() for axes in explanations.maps_sheet([case]).axes for text in axes.texts}
    assert "holds NaN or infinity" in words


@pytest.mark.parametrize(
    ("draw", "table"),
    [
        (explanations.localisation_dots, localised),
        (explanations.sanity_curves, randomised),
        (explanations.perturbation_curves, perturbed),
        (explanations.mask_ablation_dots, ablated),
    ],
)
def test_a_table_of_something_else_is_refused_by_its_columns(draw, table):
    for gone in ("method", "change", "value", "low", "similarity", "probability", "step", "share"):
        whole = table([*explanations.METRICS]) if table is localised else table()
        if gone in whole and (draw, gone) != (explanations.perturbation_curves, "low"):
            with pytest.raises(ValueError, match=rf"table to draw lacks the column\(s\) '{gone}'"):
                draw(whole.drop(columns=gone))


def test_trivial_maps_are_grey_last_and_their_best_is_the_line_to_beat():
    table = localised(["auroc"]).iloc[::-1]  # trivial ones come first
    (axes,) = explanations.localisation_dots(table, metrics=["auroc"]).axes
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names[-4:] == [*TRIVIAL[::-1]]
    assert names[-5] == "Grad-CAM"
    (dashed,) = (line for line in axes.lines if line.get_linestyle() == "--")
    best = table[table["method"].isin(TRIVIAL)]["value"].max()
    assert dashed.get_xdata()[0] == best
    seen = {line.get_color() for line in axes.lines if line.get_marker() == "s"}
    assert seen == {GREY}
    with pytest.raises(ValueError, match="no row of 'beauty'; it has 'auroc'"):
        explanations.localisation_dots(table, metrics=["beauty"])


def test_a_method_without_a_metric_is_named_as_not_measured():
    table = localised(["auroc", "energy"]).query("not (method == 'attention' and metric == 'energy')")
    figure = explanations.localisation_dots(table, metrics=["auroc", "energy"])
    assert "not measured" in texts(figure.axes[1])
    assert [axes.get_title(loc="left") for axes in figure.axes] == [METRICS["auroc"], METRICS["energy"]]


def test_the_edge_filter_is_grey_beside_methods_that_fall():
    left, right = explanations.sanity_curves(randomised(), limit=0.5).axes
    lines = {line.get_label(): line for line in left.lines}
    assert lines["edges (no network)"].get_color() == GREY
    assert lines["Grad-CAM"].get_ydata().tolist() == pytest.approx(np.linspace(1, 0, 8))
    assert lines["passes at 0.5 or below"].get_ydata()[0] == 0.5
    assert [label.get_text() for label in right.get_xticklabels()][:2] == ["trained", "head"]
    many = pd.concat([randomised().assign(method=f"m{n}") for n in range(8)])
    with pytest.raises(ValueError, match="1 to 7 lines can be told apart; found 8"):
        explanations.sanity_curves(many)


def test_deletion_and_insertion_are_drawn_apart():
    deletion, insertion = explanations.perturbation_curves(perturbed()).axes
    assert "lower is better" in deletion.get_title(loc="left")
    assert "higher is better" in insertion.get_title(loc="left")
    assert deletion.lines[0].get_ydata()[-1] == pytest.approx(0.1)
    assert insertion.lines[0].get_ydata()[-1] == pytest.approx(1)
    with pytest.raises(ValueError, match="neither curve"):
        explanations.perturbation_curves(perturbed().assign(curve="other"))


def test_a_change_of_the_mask_has_its_colour_at_every_vertebra_and_hollow_without_interval():
    figure = explanations.mask_ablation_dots(ablated())
    probability, auroc, bottom = figure.axes
    assert [label.get_text() for label in bottom.get_xticklabels()] == ["all", *VERTEBRAE]
    solid = [line for line in probability.lines if line.get_label() == "neighbour"]
    assert len(solid[0].get_xdata()) == 8
    hollow = [line for line in auroc.lines if line.get_markerfacecolor() == "white" and len(line.get_xdata())]
    assert [round(line.get_xdata()[0]) for line in hollow] == [3] * 4


def test_an_interval_of_few_fractures_does_not_flatten_the_others():
    table = ablated()
    table.loc[0, ["low", "high"]] = (-9.0, 9.0)
    probability = explanations.mask_ablation_dots(table).axes[0]
    assert 0.3 < probability.get_ylim()[1] < 1


def test_runs_stand_in_rows_of_two():
    figure = explanations.neighbour_dots(dict.fromkeys(("a", "b", "c"), neighbours()))
    shown = [axes.get_title(loc="left") for axes in figure.axes if axes.axison]
    assert shown == ["a", "b", "c"]
    assert len({round(axes.get_position().x0, 2) for axes in figure.axes}) == 2


def test_false_alarms_beside_a_broken_neighbour_carry_how_many_they_are_of():
    figure = explanations.neighbour_dots({"shipped run": neighbours()})
    (axes,) = figure.axes
    assert axes.get_xticklabels()[0].get_text() == "all\n14"
    assert {FRACTURED, INTACT} <= colours(picture(figure))
    with pytest.raises(ValueError, match="nothing to draw"):
        explanations.neighbour_dots({})


def test_agreement_is_written_in_both_halves_and_the_diagonal_is_empty():
    (axes,) = explanations.agreement_heatmap({"seeds": pairs(["seed 0", "seed 1", "seed 2"])}).axes
    written = {text.get_position(): text.get_text() for text in axes.texts}
    assert written[(0, 1)] == written[(1, 0)] == "0.65"
    assert (0, 0) not in written
    with pytest.raises(ValueError, match="nothing to draw"):
        explanations.agreement_heatmap({})


def test_the_colour_of_maps_is_the_one_of_predicted_masks():
    assert explanations.MAP == SKY
