"""Pictures of maps that are measured: beside the truth, against trivial maps, and under sanity checks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from numpy.typing import NDArray

from cspine_helpers.figures import style
from cspine_helpers.figures.radiographs import TRUTH, Overlay, draw_image, draw_marks, write_call
from cspine_helpers.figures.style import FRACTURED, GREY, INK, INTACT, Picture, canvas, in_style, whole_inches
from cspine_helpers.files.paths import listing
from cspine_helpers.files.tables import require_columns
from cspine_helpers.labels import VERTEBRAE

MAP = style.SKY  # what a map says, as a predicted mask does
NAMES = {  # of methods, as pictures write them; any other with spaces for underscores
    "grad_cam": "Grad-CAM",
    "grad_cam_plus_plus": "Grad-CAM++",
    "hires_cam": "HiResCAM",
    "layer_cam": "LayerCAM",
    "eigen_cam": "Eigen-CAM",
    "gradient_input": "gradient × input",
    "integrated_gradients": "integrated gradients",
}
TRIVIAL = ("uniform", "centre", "edges", "mask")  # maps that know nothing of the network
METRICS = {  # as panels name them
    "pointing": "Pointing game",
    "energy": "Energy inside the fracture",
    "auroc": "AUROC of pixels",
    "auroc_inside": "AUROC inside the bone",
    "iou": "IoU at validation's threshold",
}
MASK_METRICS = {
    "probability_fractured": "Mean probability of fractured vertebrae",
    "probability_intact": "Mean probability of intact vertebrae",
    "auroc": "AUROC of the probabilities",
    "map_auroc": "AUROC of the maps' pixels",
    "map_similarity": "Rank correlation of the maps",
}
# One look for each line of a comparison, colour, dashes and marker together, so that none rests on colour.
_LOOKS = (
    (style.BLUE, "-", "o"),
    (style.VERMILION, "--", "s"),
    (style.GREEN, "-.", "^"),
    (style.PINK, ":", "D"),
    (INK, "-", "v"),
    (style.AMBER, "--", "P"),
    (style.SKY, "-.", "X"),
)
_WIDEST = 10.8  # inches
_TABLE = "The table to draw"


def method_name(method: str) -> str:
    """A method of maps in the words of pictures."""
    return NAMES.get(method, method.replace("_", " "))


@dataclass(frozen=True, eq=False)
class Explained(Overlay):
    """One slice, or one radiograph, with the truth and the maps that explain the fracture's probability.

    Attributes:
        maps: method → (h, w) on any grid that covers the image, such as its pixels; raw and signed.
        bone: (H, W) of 0/1: the vertebra that is asked about; None where there is none.
        notes: method → a few words below its map, such as "hit, AUROC 0.93".

    Example:
        >>> Explained(np.zeros((8, 8), np.uint8), 1, 0.2, False, maps={"grad_cam": np.eye(2)}).call
        'miss'
    """

    maps: Mapping[str, NDArray] = field(default_factory=dict)
    bone: NDArray | None = None
    notes: Mapping[str, str] = field(default_factory=dict)


@in_style
def maps_sheet(cases: Sequence[Explained], *, title: str = "") -> Picture:
    """A row for each case: the image with the true outline, then each method's map over it.

    Only the positive part of a map is drawn, from 0 to its own maximum, which a cross marks; a map without
    a positive part, or with NaN, says so. So shades of two panels do not compare: the numbers below them do.
    Shades grow with the square root, so that weak parts of a narrow map are seen.

    Raises:
        ValueError: there is no case, cases differ in their methods, a mask in shape from its image, or a
            map is not of one slice.

    Example:
        >>> case = Explained(np.zeros((64, 64), np.uint8), 1, 0.9, True, truth=np.eye(64),
        ...                  maps={"grad_cam": np.eye(16)}, notes={"grad_cam": "hit, AUROC 0.98"})
        >>> figure = maps_sheet([case], title="One hit")
    """
    if not cases:
        raise ValueError("There is no map to draw. Pass one case or more.")
    methods = list(cases[0].maps)
    if any(list(each.maps) != methods for each in cases):
        raise ValueError(
            f"Each row shows the same methods, in one order; the first has {listing(methods)}. "
            "Draw the others apart."
        )
    columns = 1 + len(methods)
    tallest = min(max(each.image.shape[0] / each.image.shape[1] for each in cases), 1.35)
    width = min(2.1, _WIDEST / columns)
    shape = whole_inches(width * columns), whole_inches(len(cases) * (width * tallest + 0.42) + 1.1)
    figure, grid = canvas(*shape, len(cases), columns, squeeze=False)
    for row, each in zip(grid, cases, strict=True):
        draw_image(row[0], each)
        draw_marks(row[0], each)
        _bone(row[0], each)
        write_call(row[0], each)
        for axes, (method, values) in zip(row[1:], each.maps.items(), strict=True):
            _map(axes, each, np.asarray(values, dtype=float))
            axes.set_xlabel(each.notes.get(method, ""), fontsize=8, labelpad=3)
    for axes, method in zip(grid[0, 1:], methods, strict=True):
        axes.set_title(method_name(method).replace(" ", "\n", 1), fontsize=9, pad=5)
    handles: list = [
        Line2D([], [], color=TRUTH, linewidth=1.6, label="true outline"),
        Patch(facecolor=MAP, alpha=0.8, label="map, up to its own maximum (×)"),
        Patch(facecolor="none", edgecolor=FRACTURED, linewidth=2, label="called wrongly"),
    ]
    if any(each.bone is not None for each in cases):
        handles.insert(1, Line2D([], [], color=GREY, linewidth=1, linestyle=":", label="vertebra's mask"))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=9)
    figure.colours = 256
    figure.head(title)
    return figure


def _bone(axes: Axes, each: Explained) -> None:
    """The border of the vertebra's mask."""
    if each.bone is None or not np.any(each.bone):
        return
    if np.shape(each.bone) != each.image.shape:
        raise ValueError(
            f"The bone of {each.caption or 'an image'} is of shape {np.shape(each.bone)}, the image of "
            f"{each.image.shape}. Bring it into the frame of the image."
        )
    axes.contour(np.asarray(each.bone, float), levels=[0.5], colors="white", linewidths=0.8, linestyles=":")


def _map(axes: Axes, each: Explained, values: NDArray) -> None:
    """The positive part over the image, in the image's frame whatever the map's grid, and its maximum."""
    if values.ndim != 2 or not values.size:
        raise ValueError(
            f"A map over an image is (h, w); found {values.shape} for {each.caption or 'an image'}. Pass "
            "that of one slice."
        )
    draw_image(axes, each)
    height, width = each.image.shape
    if not np.isfinite(values).all() or values.max() <= 0 or np.ptp(values) == 0:
        words = "constant" if values.max() > 0 else "no positive part"
        words = words if np.isfinite(values).all() else "holds NaN or infinity"
        axes.text(0.5, 0.5, words, transform=axes.transAxes, ha="center", va="center", color=INK, fontsize=8,
                  bbox=style.UNDER)  # fmt: skip
    else:
        share = np.clip(values, 0, None) / values.max()
        colour = np.broadcast_to(to_rgb(MAP), (*share.shape, 3))
        shade = np.concatenate([colour, 0.85 * np.sqrt(share)[..., None]], axis=-1)
        frame = (-0.5, width - 0.5, height - 0.5, -0.5)
        axes.imshow(shade, extent=frame, interpolation="bilinear")
        y, x = (np.array(np.unravel_index(values.argmax(), values.shape)) + 0.5) / values.shape
        at = x * width - 0.5, y * height - 0.5
        axes.plot(*at, "x", color=INK, ms=6, mew=2.4)
        axes.plot(*at, "x", color="white", ms=5.2, mew=1.1)
    bare = Explained(each.image, each.label, each.probability, each.called, each.truth, None, each.caption)
    draw_marks(axes, bare)


@in_style
def localisation_dots(
    table: pd.DataFrame,
    *,
    metrics: Sequence[str] = ("pointing", "energy", "auroc", "auroc_inside"),
    trivial: Sequence[str] = TRIVIAL,
    title: str = "",
) -> Picture:
    """Each method against the truth with intervals, the trivial maps in grey below; dashed: their best.

    Args:
        table: `method, metric, value, low, high`, as `explain.localisation_table` makes it.
        metrics: one panel each.
        trivial: methods that know nothing of the network.
        title: above all.

    Raises:
        ValueError: the table has none of a metric.

    Example:
        >>> rows = {"method": ["grad_cam", "centre"], "metric": "auroc", "value": [0.93, 0.8]}
        >>> table = pd.DataFrame(rows).assign(low=0.7, high=0.95)
        >>> figure = localisation_dots(table, metrics=["auroc"])
    """
    _require(table, metrics, "method")
    named = list(dict.fromkeys(table["method"]))
    methods = [name for name in named if name not in trivial] + [name for name in named if name in trivial]
    return _dots(table, methods, metrics, trivial, title, best=True)


@in_style
def difference_dots(
    table: pd.DataFrame,
    *,
    metrics: Sequence[str] = ("pointing", "auroc"),
    title: str = "",
    of: str = "method",
    minus: str = "strongest trivial map",
) -> Picture:
    """Paired differences with intervals; one that holds 0 is a tie.

    Args:
        table: `method, metric, value, low, high`, the values differences on the same cases.
        metrics: one panel each.
        title: above all.
        of: the column that names the rows.
        minus: what is subtracted, in words.

    Raises:
        ValueError: the table has none of a metric.

    Example:
        >>> rows = {"method": ["grad_cam"], "metric": "auroc", "value": 0.1, "low": 0.05, "high": 0.15}
        >>> figure = difference_dots(pd.DataFrame(rows), metrics=["auroc"])
    """
    _require(table, metrics, "method")
    table = table.rename(columns={of: "method"})
    figure = _dots(table, list(dict.fromkeys(table["method"])), metrics, (), title, best=False)
    for axes in figure.axes:
        style.reference(axes, 0, "x", colour=GREY)
    figure.supxlabel(f"difference from the {minus} on the same cases, 95% interval", fontsize=9)
    return figure


def _require(table: pd.DataFrame, metrics: Sequence[str], *columns: str) -> None:
    require_columns(table, (*columns, "metric", "value", "low", "high"), what=_TABLE)
    if missing := [name for name in metrics if name not in set(table["metric"])]:
        known = listing(dict.fromkeys(table["metric"]))
        raise ValueError(f"The table has no row of {listing(missing)}; it has {known}. Choose among these.")


def _dots(
    table: pd.DataFrame,
    methods: Sequence[str],
    metrics: Sequence[str],
    trivial: Sequence[str],
    title: str,
    *,
    best: bool,
) -> Picture:
    """A row a method, a panel a metric; the numbers at the right of each panel."""
    shape = whole_inches(min(11, 2.0 + 2.7 * len(metrics))), whole_inches(0.33 * len(methods) + 1.3)
    figure, panels = canvas(*shape, 1, len(metrics), sharey=True, squeeze=False)
    for axes, metric in zip(panels.flat, metrics, strict=True):
        rows = table[table["metric"] == metric].set_index("method")
        places = rows.to_dict("index")
        for at, method in enumerate(methods):
            if method not in places:
                axes.text(0.02, at, "not measured", transform=axes.get_yaxis_transform(), color=GREY,
                          va="center", fontsize=8, bbox=style.UNDER)  # fmt: skip
                continue
            known, found = method in trivial, places[method]
            style.interval_dot(axes, found, at, GREY if known else INTACT, marker="s" if known else "o")
            if np.isfinite(found["value"]):
                number = f"{found['value']:z.2f}".replace("-", "−")
                axes.annotate(number, (1, at), (4, 0), ("axes fraction", "data"), "offset points",
                              va="center", fontsize=8.5, annotation_clip=False)  # fmt: skip
        reached = rows["value"].reindex([name for name in methods if name in trivial]).max()
        if best and np.isfinite(reached):
            style.reference(axes, float(reached), "x", colour=GREY)
        style.value_axis(axes, METRICS.get(metric, metric.replace("_", " ")))
        axes.margins(x=0.08)
    panels[0, 0].set_yticks(range(len(methods)), [method_name(name) for name in methods], fontsize=9)
    panels[0, 0].set_ylim(len(methods) - 0.5, -0.5)
    if best:
        handles = [
            Line2D([], [], color=INTACT, marker="o", label="method, 95% interval"),
            Line2D([], [], color=GREY, marker="s", label="trivial map"),
            Line2D([], [], color=GREY, linewidth=1, linestyle="--", label="best trivial map"),
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=9)
    figure.head(title)
    return figure


@in_style
def sanity_curves(
    table: pd.DataFrame,
    *,
    limit: float | None = None,
    trivial: Sequence[str] = TRIVIAL,
    chance: float = 0.5,
    title: str = "",
) -> Picture:
    """How maps change while the network's layers are randomised, from the head down.

    Left: similarity to the map of the trained network, which a map of that network loses; an edge filter
    keeps it. Right: AUROC against the truth, which falls to chance where the training made it.

    Args:
        table: `method, step, layer, similarity, auroc`, step 0 being the trained network; `similarity_low`,
            `similarity_high`, `auroc_low`, `auroc_high` make bands.
        limit: highest similarity at the last step with which a method passes; a dashed line.
        trivial: methods that do not depend on the network, in grey.
        chance: AUROC of a map that knows nothing.
        title: above both.

    Raises:
        ValueError: more methods than can be told apart; columns are missing.

    Example:
        >>> rows = {"method": "grad_cam", "step": [0, 1], "layer": ["trained", "head"],
        ...         "similarity": [1, 0.3], "auroc": [0.9, 0.6]}
        >>> figure = sanity_curves(pd.DataFrame(rows), limit=0.5)
    """
    require_columns(table, ("method", "step", "layer", "similarity", "auroc"), what=_TABLE)
    methods = list(dict.fromkeys(table["method"]))
    looks = _looks([name for name in methods if name not in trivial])
    layers = table.drop_duplicates("step").sort_values("step")["layer"]
    shape = 11, whole_inches(4.1 + 0.045 * max(len(str(name)) for name in layers))
    figure, (left, right) = canvas(*shape, 1, 2, sharex=True)
    for axes, column, words in (
        (left, "similarity", "rank correlation with the trained map"),
        (right, "auroc", "AUROC of pixels against the truth"),
    ):
        for method in methods:
            rows = table[table["method"] == method].sort_values("step")
            colour, line, marker = looks.get(method, (GREY, "-", "s"))
            axes.plot(rows["step"], rows[column], color=colour, linestyle=line, marker=marker, ms=5,
                      label=method_name(method) + (" (no network)" if method in trivial else ""))  # fmt: skip
            if f"{column}_low" in rows.columns:
                low, high = rows[f"{column}_low"], rows[f"{column}_high"]
                axes.fill_between(rows["step"], low, high, color=colour, alpha=0.13, linewidth=0)
        axes.set_ylabel(words)
        words_of = [str(name).removeprefix("backbone.") for name in layers]
        axes.set_xticks(range(len(layers)), words_of, rotation=90, fontsize=8.5)
        style.grid_behind(axes)
    left.set(ylim=(min(-0.05, left.get_ylim()[0]), 1.05), title="Does the map depend on the weights?")
    right.set_title("Does it know the fracture?")
    if limit is not None:
        style.reference(left, limit, "y", label=f"passes at {limit:g} or below")
    style.reference(right, chance, "y", colour=GREY, label="chance")
    figure.supxlabel("randomised so far, from the head down", fontsize=10)
    handles, names = left.get_legend_handles_labels()
    more, their = right.get_legend_handles_labels()
    figure.legend([*handles, more[-1]], [*names, their[-1]], loc="outside right center", fontsize=8.5)
    figure.head(title)
    return figure


def _looks(names: Sequence[str]) -> dict[str, tuple[str, str, str]]:
    """Name → colour, dashes and marker."""
    if not 1 <= len(names) <= len(_LOOKS):
        raise ValueError(
            f"1 to {len(_LOOKS)} lines can be told apart; found {len(names)} ({listing(names)}). Draw some."
        )
    return dict(zip(names, _LOOKS, strict=False))


@in_style
def perturbation_curves(table: pd.DataFrame, *, title: str = "") -> Picture:
    """Probability as pixels are blurred away (deletion) or brought back (insertion), most relevant first.

    Args:
        table: `method, curve` ("deletion", "insertion"), `share` (of pixels), `probability`; `low` and `high`
            make bands.
        title: above both.

    Raises:
        ValueError: more methods than can be told apart; no curve.

    Example:
        >>> rows = {"method": "grad_cam", "curve": "deletion", "share": [0, 1], "probability": [0.9, 0.1]}
        >>> figure = perturbation_curves(pd.DataFrame(rows))
    """
    require_columns(table, ("method", "curve", "share", "probability"), what=_TABLE)
    curves = [name for name in ("deletion", "insertion") if name in set(table["curve"])]
    if not curves:
        raise ValueError("The table has neither curve, deletion or insertion. Pass one of both.")
    methods = list(dict.fromkeys(table["method"]))
    looks = _looks([name for name in methods if name not in TRIVIAL])
    greys = dict(zip([name for name in methods if name in TRIVIAL], ("-", "--", ":", "-."), strict=False))
    figure, panels = canvas(2.2 + 4.4 * len(curves), 4.2, 1, len(curves), sharey=True, squeeze=False)
    words = {"deletion": "Deletion: lower is better", "insertion": "Insertion: higher is better"}
    for axes, curve in zip(panels.flat, curves, strict=True):
        for method in methods:
            rows = table[(table["method"] == method) & (table["curve"] == curve)].sort_values("share")
            colour, line, _ = looks.get(method, (GREY, greys.get(method, "-"), ""))
            axes.plot(rows["share"], rows["probability"], color=colour, linestyle=line,
                      label=method_name(method))  # fmt: skip
            if {"low", "high"} <= set(rows.columns) and method in looks:
                axes.fill_between(rows["share"], rows["low"], rows["high"], color=colour, alpha=0.12, lw=0)
        axes.set(xlim=(0, 1), title=words[curve])
        axes.set_xlabel("share of pixels " + ("blurred" if curve == "deletion" else "brought back"))
        style.grid_behind(axes)
    panels[0, 0].set(ylim=(0, 1.02), ylabel="mean probability of a fracture")
    style.legend_beside(panels[0, -1], fontsize=8.5)
    figure.head(title)
    return figure


@in_style
def mask_ablation_dots(
    table: pd.DataFrame,
    *,
    metrics: Sequence[str] = ("probability_fractured", "auroc", "map_auroc"),
    changes: Mapping[str, str] | None = None,
    title: str = "",
) -> Picture:
    """What happens when the mask is taken away, swapped, dilated, or is the neighbour's, by vertebra.

    Intervals of few fractures may be so wide that they leave the frame.

    Args:
        table: `change` (of the mask), `vertebra` ("all", C1 … C7), `metric, value, low, high`, the values
            differences from the mask as it is.
        metrics: one panel each, below each other.
        changes: name of a change → words.
        title: above all.

    Raises:
        ValueError: the table has none of a metric; more changes than can be told apart.

    Example:
        >>> row = {"change": "zeroed", "vertebra": "all", "metric": "auroc", "value": -0.1, "low": -0.2}
        >>> figure = mask_ablation_dots(pd.DataFrame([row | {"high": 0.0}]), metrics=["auroc"])
    """
    _require(table, metrics, "change", "vertebra")
    names = list(dict.fromkeys(table["change"]))
    looks, known = _looks(names), set(table["vertebra"])
    places = [name for name in ("all", *VERTEBRAE) if name in known]
    shape = 10, whole_inches(2.3 * len(metrics) + 0.9)
    figure, panels = canvas(*shape, len(metrics), 1, sharex=True, squeeze=False)
    for axes, metric in zip(panels.flat, metrics, strict=True):
        for number, name in enumerate(names):
            rows = table[(table["metric"] == metric) & (table["change"] == name)].set_index("vertebra")
            rows = rows.reindex([place for place in places if place in rows.index])
            colour, _, marker = looks[name]
            x = np.array([places.index(place) for place in rows.index], dtype=float)
            x += (number - (len(names) - 1) / 2) * 0.8 / len(names)
            _upright(axes, x, rows, colour, marker, label=(changes or {}).get(name, name.replace("_", " ")))
        its = table[table["metric"] == metric]
        spread = its[["low", "high"]].abs().max(axis=1)
        most = 1.2 * np.nanmax([0.01, its["value"].abs().max(), spread.quantile(0.85)])
        axes.set_ylim(-most, most)
        style.reference(axes, 0, "y", colour=GREY)
        words = MASK_METRICS.get(metric, metric.replace("_", " "))
        axes.set_title(f"{words}: change from the mask as it is", fontsize=10, pad=6)
        axes.grid(True, axis="y")
        axes.set_axisbelow(True)
        for edge in range(len(places) - 1):
            axes.axvline(edge + 0.5, color=style.PALE, linewidth=0.8, zorder=0)
        axes.yaxis.set_major_formatter(style.signed)
    panels[-1, 0].set_xticks(range(len(places)), places)
    panels[-1, 0].set_xlim(-0.5, len(places) - 0.5)
    style.legend_beside(panels[0, 0], fontsize=9, title="mask", alignment="left")
    figure.head(title)
    return figure


def _upright(
    axes: Axes, x: NDArray, rows: pd.DataFrame, colour: str, marker: str = "o", label: str | None = None
) -> None:
    """Dots with upright intervals; hollow where there is none."""
    value, low, high = (rows[name].to_numpy(dtype=float) for name in ("value", "low", "high"))
    axes.vlines(x, low, high, color=colour, linewidth=2)
    bare = np.isnan(low)
    axes.plot(x[~bare], value[~bare], marker, color=colour, ms=5.5, label=label)
    axes.plot(x[bare], value[bare], marker, mfc="white", mec=colour, mew=1.4, ms=5.5)


@in_style
def neighbour_dots(tables: Mapping[str, pd.DataFrame], *, title: str = "") -> Picture:
    """False alarms of intact vertebrae, with and without a broken neighbour, by vertebra and with intervals.

    Args:
        tables: name of a run, above its panel → `vertebra` ("all", C1 … C7), `neighbour` ("broken",
            "intact"), `value` (share called fractured), `low, high`, `n`.
        title: above all.

    Raises:
        ValueError: there is no table.

    Example:
        >>> rows = {"neighbour": ["broken", "intact"], "value": [0.3, 0.05], "n": [40, 400]}
        >>> table = pd.DataFrame(rows).assign(vertebra="all", low=0.02, high=0.4)
        >>> figure = neighbour_dots({"shipped run": table})
    """
    if not tables:
        raise ValueError("There is nothing to draw: give at least one table.")
    columns = min(2, len(tables))
    rows_of = -(-len(tables) // columns)
    shape = whole_inches(1.6 + 4.6 * columns), whole_inches(2.7 * rows_of + 1.2)
    figure, panels = canvas(*shape, rows_of, columns, sharey=True, squeeze=False)
    looks = {"intact": (INTACT, "o", -0.16), "broken": (FRACTURED, "s", 0.16)}
    for axes, (name, table) in zip(panels.flat, tables.items(), strict=False):
        known = set(table["vertebra"])
        places = [place for place in ("all", *VERTEBRAE) if place in known]
        for neighbour, (colour, marker, aside) in looks.items():
            rows = table[table["neighbour"] == neighbour].set_index("vertebra")
            rows = rows.reindex([place for place in places if place in rows.index])
            x = np.array([places.index(place) for place in rows.index]) + aside
            _upright(axes, x, rows, colour, marker, label=f"neighbour {neighbour}")
        broken = table[table["neighbour"] == "broken"].set_index("vertebra")["n"]
        ticks = [f"{place}\n{broken.get(place, 0):,.0f}" for place in places]
        axes.set_xticks(range(len(places)), ticks, fontsize=9)
        axes.set(xlim=(-0.5, len(places) - 0.5), title=name)
        axes.grid(True, axis="y")
        axes.set_axisbelow(True)
    for axes in panels.flat[len(tables) :]:
        axes.set_axis_off()
    panels[0, 0].set_ylim(-0.02, None)
    for axes in panels[:, 0]:
        axes.set_ylabel("share of intact vertebrae\ncalled fractured")
    for axes in panels.flat[: len(tables)]:
        axes.set_xlabel("vertebra; below: intact ones with a broken neighbour", fontsize=9)
    handles, names = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=2, fontsize=9)
    figure.head(title)
    return figure


@in_style
def agreement_heatmap(
    tables: Mapping[str, pd.DataFrame], *, value: str = "value", title: str = ""
) -> Picture:
    """How alike two maps of the same case are: a cell for each pair of methods, or of seeds.

    Green where they agree, purple where one is high as the other is low, white where neither knows the other.

    Args:
        tables: name, above its panel → `first, second` and the column `value`.
        value: column of the mean agreement, such as rank correlation.
        title: above all.

    Raises:
        ValueError: there is no table.

    Example:
        >>> rows = {"first": ["grad_cam"], "second": ["hires_cam"], "value": [0.8]}
        >>> figure = agreement_heatmap({"methods": pd.DataFrame(rows)})
    """
    if not tables:
        raise ValueError("There is nothing to draw: give at least one table.")
    sizes = [len(dict.fromkeys([*table["first"], *table["second"]])) for table in tables.values()]
    most = max(sizes)
    cell = min(0.75, 7.5 / sum(sizes))
    shape = whole_inches(min(11, cell * sum(sizes) + 1.9 * len(tables))), whole_inches(cell * most + 2.0)
    figure, panels = canvas(*shape, 1, len(tables), squeeze=False, width_ratios=sizes)
    for axes, (name, table) in zip(panels.flat, tables.items(), strict=True):
        names = list(dict.fromkeys([*table["first"], *table["second"]]))
        cells = np.full((len(names), len(names)), np.nan)
        for row in table.to_dict("records"):
            a, b = names.index(row["first"]), names.index(row["second"])
            cells[a, b] = cells[b, a] = row[value]
        np.fill_diagonal(cells, np.nan)
        axes.imshow(cells, cmap="PRGn", vmin=-1.1, vmax=1.1)
        for (y, x), found in np.ndenumerate(cells):
            if np.isfinite(found):
                axes.text(x, y, f"{found:z.2f}".replace("-", "−"), ha="center", va="center", fontsize=8.5,
                          color="white" if abs(found) > 0.7 else INK)  # fmt: skip
        words = [method_name(each) for each in names]
        axes.set_xticks(range(len(names)), words, rotation=90, fontsize=9)
        axes.set_yticks(range(len(names)), words, fontsize=9)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.set_title(name, fontsize=10)
        axes.set_anchor("N")
    figure.head(title)
    return figure
