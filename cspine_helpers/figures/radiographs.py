"""Pictures of radiographs: true and predicted outlines, lesions found, subgroups, splits, ablations."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator, MultipleLocator
from numpy.typing import ArrayLike, NDArray

from cspine_helpers.figures import style
from cspine_helpers.figures.style import FRACTURED, GREY, INK, INTACT, Picture, canvas, in_style, whole_inches
from cspine_helpers.files.paths import listing

TRUTH, PREDICTED = style.AMBER, style.SKY
METRICS = {  # as panels name them
    "auroc": "AUROC",
    "average_precision": "Average precision",
    "recall": "Recall",
    "specificity": "Specificity",
    "precision": "Precision",
    "dice_pos": "Dice of fractured images",
    "dice_pos_frame": "Dice as the benchmark has it",
    "dice": "Dice of all images",
    "lesion_recall": "Lesions hit",
    "false_marks": "False marks per image",
    "missed_whole": "Missed whole by the mask",
    "intact_marked": "Intact images marked",
    "pixel_precision": "Pixel precision",
    "pixel_recall": "Pixel recall",
}
_COUNTED = {  # what `n` counts of a metric, where it is not all images
    **dict.fromkeys(("recall", "dice_pos", "dice_pos_frame", "missed_whole"), "fractured images"),
    **dict.fromkeys(("specificity", "intact_marked"), "intact images"),
    "precision": "images called",
    "lesion_recall": "lesions",
    "pixel_precision": "pixels marked",
    "pixel_recall": "pixels of lesions",
}
_CALLS = """hit: a fractured image that is called; miss: not called
false alarm: an intact image that is called; cleared: not called"""
_SPLITS = {"train": INTACT, "training": INTACT, "test": style.GREEN}
_SPLITS |= dict.fromkeys(("val", "valid", "validation"), style.AMBER)
_CELLS = 12  # images of a group that are drawn
_ROOM, _LEAST = 2.2, 0.3  # side of a close-up: times its marks' longer side; share of the image at least
_WRONG = ("miss", "false alarm")


@dataclass(frozen=True, eq=False)
class Overlay:
    """One radiograph with its truth and what was predicted.

    Attributes:
        image: (H, W) uint8.
        label: 1 where fractured.
        probability: of a fracture, by the model.
        called: whether it is called fractured.
        truth: (H, W) of 0/1, or outlines (N, 2) of x, y, pixel 0 being from 0 to 1; None where there is none.
        predicted: (H, W) of 0/1; None where there is none.
        caption: one line below the call, such as the image's name.

    Example:
        >>> Overlay(np.zeros((8, 8), np.uint8), label=1, probability=0.2, called=False).call
        'miss'
    """

    image: NDArray[np.uint8]
    label: int
    probability: float
    called: bool
    truth: Any = None
    predicted: NDArray | None = None
    caption: str = ""

    @property
    def call(self) -> str:
        """In words: hit, miss, false alarm or cleared."""
        words = {(1, True): "hit", (1, False): "miss", (0, True): "false alarm", (0, False): "cleared"}
        return words[int(self.label), bool(self.called)]


@in_style
def overlay_sheet(overlays: Sequence[Overlay], *, columns: int = 4, title: str = "") -> Picture:
    """Radiographs with the true outline and the predicted mask; above each, its call and probability.

    Raises:
        ValueError: there is none, or a mask is of another shape than its image.

    Example:
        >>> one = Overlay(np.zeros((40, 30), np.uint8), 1, 0.9, True, truth=np.eye(40, 30), caption="hand")
        >>> figure = overlay_sheet([one], title="One hit")
    """
    if not overlays:
        raise ValueError("There is no radiograph to draw. Pass one Overlay or more.")
    columns = min(columns, len(overlays))
    rows = -(-len(overlays) // columns)
    tallest = max(each.image.shape[0] / each.image.shape[1] for each in overlays)
    width = 2.65
    height = rows * (width * min(tallest, 1.35) + 0.45) + 0.75
    figure, grid = canvas(whole_inches(width * columns), whole_inches(height), rows, columns, squeeze=False)
    for axes, each in zip(grid.flat, overlays, strict=False):
        _draw(axes, each)
    for axes in grid.flat[len(overlays) :]:
        axes.set_axis_off()
    _legend(figure)
    figure.head(title)
    return figure


@in_style
def outlined(
    panels: Mapping[str, tuple[NDArray[np.uint8], Sequence[ArrayLike]]], *, title: str = ""
) -> Picture:
    """Radiographs side by side with outlines, such as one outline on two versions of an image.

    Args:
        panels: name, above the panel → image (H, W) uint8, and outlines (N, 2) of x, y, pixel 0 being from 0
            to 1. What lies outside of the image is not drawn.
        title: above all.

    Raises:
        ValueError: there is no panel.

    Example:
        >>> image, outline = np.zeros((40, 30), np.uint8), np.array([[5, 5], [20, 5], [20, 30]])
        >>> figure = outlined({"as stored": (image, [outline]), "as displayed": (image.T, [outline])})
    """
    if not panels:
        raise ValueError("There is no radiograph to draw. Pass one or more.")
    tallest = max(image.shape[0] / image.shape[1] for image, _ in panels.values())
    shape = whole_inches(3.6 * len(panels)), whole_inches(3.6 * min(tallest, 1.4) + 0.8)
    figure, grid = canvas(*shape, 1, len(panels), squeeze=False)
    for axes, (name, (image, outlines)) in zip(grid.flat, panels.items(), strict=True):
        each = Overlay(image, 1, 1.0, True, truth=[np.asarray(outline) for outline in outlines])
        draw_image(axes, each)
        draw_marks(axes, each)
        axes.set_title(name, fontsize=10, pad=5)
    figure.colours = 256
    figure.head(title)
    return figure


@in_style
def close_ups(overlays: Sequence[Overlay], *, title: str = "") -> Picture:
    """Each radiograph whole, and the place of its marks enlarged: bare, and with what is true and predicted.

    A row each. The place holds all lesions of the truth, else all of the predicted mask, else everything.

    Raises:
        ValueError: there is none, or a mask is of another shape than its image.

    Example:
        >>> one = Overlay(np.zeros((400, 300), np.uint8), 1, 0.9, True, truth=np.eye(400, 300))
        >>> figure = close_ups([one], title="One hit")
    """
    if not overlays:
        raise ValueError("There is no radiograph to draw. Pass one Overlay or more.")
    figure, grid = canvas(8.4, whole_inches(2.9 * len(overlays) + 0.8), len(overlays), 3, squeeze=False)
    for (whole, plain, marked), each in zip(grid, overlays, strict=True):
        left, right, top, bottom = _place(each)
        draw_image(whole, each)
        write_call(whole, each)
        frame = (left - 0.5, top - 0.5), right - left, bottom - top
        whole.add_patch(Rectangle(*frame, fill=False, edgecolor="white", linewidth=1.2, linestyle="--"))
        for axes, words in ((plain, "enlarged"), (marked, "true and predicted")):
            draw_image(axes, each)
            axes.set(xlim=(left - 0.5, right - 0.5), ylim=(bottom - 0.5, top - 0.5))
            axes.annotate(words, (0, 1), (0, 4), "axes fraction", "offset points", color=GREY, fontsize=8)
        draw_marks(marked, each)
    _legend(figure)
    figure.head(title)
    return figure


def _place(each: Overlay) -> tuple[int, int, int, int]:
    """Left, right, top and bottom of the square around the marks, within the image; pixels."""
    height, width = each.image.shape
    polygons, masks = _truth(each)
    points = [np.argwhere(mask)[:, ::-1] for mask in masks if np.any(mask)] + polygons
    if not points and each.predicted is not None and np.any(each.predicted):
        points = [np.argwhere(each.predicted)[:, ::-1]]
    if not points:
        return 0, width, 0, height
    found = np.concatenate(points)
    low, high = found.min(axis=0), found.max(axis=0)
    side = int(min(max(_ROOM * (high - low).max(), _LEAST * max(height, width)), height, width))
    left, top = (
        int(np.clip(middle - side / 2, 0, most - side))
        for middle, most in zip((low + high) / 2, (width, height), strict=True)
    )
    return left, left + side, top, top + side


def _truth(each: Overlay) -> tuple[list[NDArray], list[NDArray]]:
    """The truth as polygons (N, 2), and as masks (H, W)."""
    if each.truth is None:
        return [], []
    if isinstance(each.truth, np.ndarray) and each.truth.shape[1:] != (2,):
        _check_shape(each, each.truth)
        return [], [each.truth > 0]
    outlines = [each.truth] if isinstance(each.truth, np.ndarray) else each.truth
    return [np.asarray(outline, dtype=float) for outline in outlines], []


def _legend(figure: Picture) -> None:
    handles: list = [
        Line2D([], [], color=TRUTH, linewidth=1.6, label="true outline"),
        Patch(facecolor=(*to_rgb(PREDICTED), 0.35), edgecolor=PREDICTED, label="predicted mask"),
        Patch(facecolor="none", edgecolor=FRACTURED, linewidth=2, label="called wrongly"),
    ]
    key: dict[str, Any] = {"title": _CALLS, "title_fontsize": 9, "fontsize": 9}
    figure.legend(handles=handles, loc="outside lower center", ncols=3, **key)
    figure.colours = 256  # a smaller file


def _draw(axes: Axes, each: Overlay) -> None:
    """One panel of a sheet."""
    draw_image(axes, each)
    draw_marks(axes, each)
    write_call(axes, each)


def draw_image(axes: Axes, each: Overlay) -> None:
    """The image alone, whole, without ticks and frame."""
    height, width = each.image.shape
    axes.imshow(each.image, cmap="gray", vmin=0, vmax=255)
    axes.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5), xticks=[], yticks=[])
    axes.set_anchor("N")
    axes.spines[:].set_visible(False)


def draw_marks(axes: Axes, each: Overlay) -> None:
    """The predicted mask, shaded, and the truth's outlines; the panel's view stays."""
    view = axes.get_xlim(), axes.get_ylim()
    if each.predicted is not None and np.any(each.predicted):
        _check_shape(each, each.predicted)
        mask = np.asarray(each.predicted) > 0
        shade = np.zeros((*mask.shape, 4))
        shade[mask] = (*to_rgb(PREDICTED), 0.35)
        axes.imshow(shade)
        _outline(axes, mask, PREDICTED)
    polygons, masks = _truth(each)
    for mask in masks:
        _outline(axes, mask, TRUTH)
    for polygon in polygons:
        axes.fill(*(polygon - 0.5).T, fill=False, edgecolor=TRUTH, linewidth=1.4)
    axes.set(xlim=view[0], ylim=view[1])


def write_call(axes: Axes, each: Overlay) -> None:
    """The call and probability, the caption below them, and a frame where the call is wrong."""
    wrong = each.call in _WRONG
    axes.spines[:].set(visible=wrong, color=FRACTURED, linewidth=3)
    axes.set_title(f"{each.call}, {each.probability:.2f}", pad=16 if each.caption else 5, fontsize=10,
                   color=FRACTURED if wrong else INK)  # fmt: skip
    axes.annotate(each.caption, (0, 1), (0, 4), "axes fraction", "offset points", color=GREY, fontsize=8)


def _check_shape(each: Overlay, mask: ArrayLike) -> None:
    if np.shape(mask) != each.image.shape:
        raise ValueError(
            f"A mask of {each.caption or 'an image'} is of shape {np.shape(mask)}, the image of "
            f"{each.image.shape}. Bring it into the frame of the image."
        )


def _outline(axes: Axes, mask: NDArray[np.bool_], colour: str) -> None:
    """The border of a mask, closed also where it ends at the edge of the image."""
    if not mask.any():
        return
    padded = np.pad(mask.astype(float), 1)
    rows, columns = (np.arange(-1, many + 1) for many in mask.shape)
    axes.contour(columns, rows, padded, levels=[0.5], colors=colour, linewidths=1.4)


@in_style
def cohort_sheet(
    samples: Mapping[str, tuple[Sequence[NDArray], Sequence[NDArray]]],
    *,
    counts: Mapping[str, tuple[int, int]] | None = None,
    title: str = "",
) -> Picture:
    """Radiographs of a cohort, a row each part: intact ones at the left, fractured ones at the right.

    Args:
        samples: part → images (H, W) uint8 of intact and of fractured ones.
        counts: part → how many intact and fractured ones the cohort has.
        title: above all.

    Raises:
        ValueError: no part has an image.

    Example:
        >>> hand = [np.zeros((40, 30), np.uint8)]
        >>> figure = cohort_sheet({"hand": (hand, hand)}, counts={"hand": (1216, 251)})
    """
    most = [max((len(pair[label]) for pair in samples.values()), default=0) for label in (0, 1)]
    if not sum(most):
        raise ValueError("No part has an image to draw. Pass one or more.")
    columns, size = sum(most), min(1.55, 10.2 / sum(most))
    shape = whole_inches(size * columns + 0.7), whole_inches(size * len(samples) + 0.9)
    figure, grid = canvas(*shape, len(samples), columns, squeeze=False)
    for row, (part, pair) in zip(grid, samples.items(), strict=True):
        for label, images in enumerate(pair):
            for place in range(most[label]):
                axes = row[label * most[0] + place]
                axes.set(xticks=[], yticks=[], box_aspect=1)
                axes.spines[:].set_visible(False)
                if place < len(images):
                    axes.imshow(images[place], cmap="gray", vmin=0, vmax=255)
                    axes.set_aspect("equal", adjustable="datalim")
                    axes.set_facecolor("black")
                    axes.spines[:].set(visible=True, color=(INTACT, FRACTURED)[label], linewidth=2)
                if counts and place == 0:
                    name = ("intact", "fractured")[label]
                    axes.set_title(f"{counts[part][label]:,} {name}", fontsize=8, pad=3, weight="normal",
                                   color=(INTACT, FRACTURED)[label])  # fmt: skip
        row[0].set_ylabel(part, fontsize=10, weight="bold", labelpad=8)
    handles = [
        Patch(facecolor="none", edgecolor=colour, linewidth=2, label=name)
        for name, colour in (("intact", INTACT), ("fractured", FRACTURED))
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, fontsize=9)
    figure.colours = 256
    figure.head(title)
    return figure


@in_style
def froc_curves(
    curves: Mapping[str, pd.DataFrame],
    *,
    points: Mapping[str, pd.DataFrame] | None = None,
    rule: str = "",
    title: str = "",
) -> Picture:
    """Lesions hit against false marks per image, of one run or several, with bands.

    A curve ends at its last point that is `reached`: where the run makes no more marks, an upright stroke.

    Args:
        curves: name → table of `radiographs.froc` at many points.
        points: name → the same at the few that are read off, written beside the curve of the first name;
            those not reached are left out.
        rule: when a mark hits a lesion, as `MaskCases.rule` says it.
        title: above the axes.

    Raises:
        ValueError: there is no curve.

    Example:
        >>> table = pd.DataFrame({"false_marks": [0, 1], "lesion_recall": [0.2, 0.6], "low": [0.1, 0.5],
        ...                       "high": [0.3, 0.7], "reached": 1, "lesions": 100, "images": 600})
        >>> figure = froc_curves({"shipped run": table}, rule="a pixel in common")
    """
    if not curves:
        raise ValueError("There is no curve to draw. Pass one table or more.")
    figure, axes = canvas(9, 4.8)
    colours = (INTACT, FRACTURED, style.GREEN, style.PINK, INK)
    for place, (name, table) in enumerate(curves.items()):
        colour, found = colours[place % len(colours)], table[table["reached"] == 1]
        band = {"color": colour, "alpha": 0.13, "linewidth": 0}
        axes.fill_between(found["false_marks"], found["low"], found["high"], **band)
        axes.plot(found["false_marks"], found["lesion_recall"], color=colour, label=name)
        if 0 < len(found) < len(table):
            end = found["false_marks"].iloc[-1], found["lesion_recall"].iloc[-1]
            beyond = table["false_marks"][table["reached"] == 0].min()
            axes.plot(*end, "|", color=colour, ms=14, mew=2)
            if place == 0:
                axes.annotate(f"all marks: fewer than\n{beyond:.2f} false ones per image", end, (9, 0),
                              textcoords="offset points", va="center", fontsize=9, color=colour,
                              bbox=style.UNDER)  # fmt: skip
        read = (points or {}).get(name, table[:0])
        for row in read[read["reached"] == 1].itertuples():
            axes.plot(row.false_marks, row.lesion_recall, "o", color=colour, mec="white", ms=8, zorder=4)
            if place == 0:
                axes.annotate(f"{row.lesion_recall:.2f}\n({row.low:.2f}–{row.high:.2f})",
                              (row.false_marks, row.lesion_recall), (4, -9), textcoords="offset points",
                              ha="left", va="top", fontsize=9, color=colour, bbox=style.UNDER)  # fmt: skip
    first = next(iter(curves.values()))
    lesions, images = int(first["lesions"].iloc[0]), int(first["images"].iloc[0])
    every = pd.concat(curves.values())
    reached = every["reached"] == 1
    most = every["false_marks"][reached].max() * (1 if reached.all() else 1.35)  # room for the words
    axes.set(xlim=(0, most if most > 0 else None), ylim=(0, 1.02))
    axes.set_ylabel(f"share of {lesions:,} lesions that are hit")
    axes.set_xlabel(f"false marks per image, {images:,} images")
    style.grid_behind(axes)
    if rule:
        axes.text(0.995, 0.015, f"hit: {rule}", transform=axes.transAxes, ha="right", fontsize=9, color=GREY,
                  bbox=style.UNDER)  # fmt: skip
    axes.legend(loc="upper left", labelcolor="linecolor", bbox_to_anchor=(0, 1))
    axes.set_title(title)
    return figure


@in_style
def subgroup_dots(
    table: pd.DataFrame,
    *,
    metrics: Sequence[str] = ("auroc", "recall", "specificity", "dice_pos"),
    whole: Mapping[str, float] | None = None,
    title: str = "",
) -> Picture:
    """Metrics of subgroups with intervals and how many images they are of; few groups are hollow.

    Shares go from 0 to 1 in every panel, AUROC from 0.5 or the lowest one.

    Args:
        table: of `radiographs.subgroups`.
        metrics: one panel each.
        whole: metric → its value of all images, a dashed line.
        title: above all.

    Raises:
        ValueError: the table has none of a metric.

    Example:
        >>> row = {"by": "part", "subgroup": "hand", "images": 300, "fractured": 60, "metric": "auroc",
        ...        "value": 0.84, "low": 0.78, "high": 0.89, "few": 0}
        >>> figure = subgroup_dots(pd.DataFrame([row]), metrics=["auroc"], whole={"auroc": 0.91})
    """
    if missing := [name for name in metrics if name not in set(table["metric"])]:
        raise ValueError(f"The table of subgroups has no row of {listing(missing)}. Choose other metrics.")
    rows = table.drop_duplicates(["by", "subgroup"])
    place = {key: at for at, key in enumerate(zip(rows["by"], rows["subgroup"], strict=True))}
    shape = whole_inches(min(11, 2.9 + 2.7 * len(metrics))), whole_inches(0.42 * len(rows) + 1.5)
    figure, panels = canvas(*shape, 1, len(metrics), sharey=True, squeeze=False)
    for axes, metric in zip(panels.flat, metrics, strict=True):
        for found in table[table["metric"] == metric].to_dict("records"):
            style.interval_dot(axes, found, place[found["by"], found["subgroup"]])
        if whole and metric in whole:
            style.reference(axes, whole[metric], "x", colour=GREY)
        style.value_axis(axes, METRICS.get(metric, metric))
        if metric != "false_marks":
            shown = axes.dataLim.intervalx[0]
            least = min(0.5, np.floor(10 * shown) / 10) if metric == "auroc" else 0
            axes.set_xlim(least - 0.03 * (1 - least), 1 + 0.03 * (1 - least))
            axes.xaxis.set_major_locator(MultipleLocator(0.1 if least == 0.5 else 0.2))
        for edge in np.flatnonzero(rows["by"].to_numpy()[1:] != rows["by"].to_numpy()[:-1]):
            axes.axhline(edge + 0.5, color=GREY, linewidth=0.8)
    names = [f"{row.subgroup}\n{row.fractured:,} fractured of {row.images:,}" for row in rows.itertuples()]
    panels[0, 0].set_yticks(range(len(rows)), names, fontsize=8.5)
    panels[0, 0].set_ylim(len(rows) - 0.5, -0.5)
    handles: list = [
        Line2D([], [], color=INTACT, marker="o", label="value, 95% interval"),
        Line2D([], [], color=INTACT, marker="o", mfc="white", lw=0, label="too few groups for an interval"),
    ]
    if whole:
        handles.append(Line2D([], [], color=GREY, linewidth=1, linestyle="--", label="all images"))
    figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=9)
    figure.head(title)
    return figure


@in_style
def shortcut_dots(table: pd.DataFrame, *, title: str = "") -> Picture:
    """AUROC of all images, of those without a sign and of the sign alone, and what its absence changes.

    Args:
        table: of `radiographs.shortcut`, of one sign or of several, one below another.
        title: above all.

    Example:
        >>> what = ["all images", "without", "alone", "without − all"]
        >>> table = pd.DataFrame({"what": what, "value": [0.94, 0.92, 0.58, -0.02], "images": 600})
        >>> table = table.assign(low=table["value"] - 0.02, high=table["value"] + 0.02, fractured=107)
        >>> figure = shortcut_dots(table.assign(sign="with hardware"))
    """
    same = ["what", "value", "images", "fractured"]  # all images are drawn once, where none is left out
    rows = table[(table["what"] != "all images") | ~table.duplicated(same)].reset_index(drop=True)
    change = rows["what"] == "without − all"
    place = rows[~change].reset_index(drop=True)
    height = 1.0 + 0.55 * len(place)
    figure, (left, right) = canvas(11, height, 1, 2, width_ratios=[1.6, 1], sharey=True)
    beside = {row.sign: n for n, row in enumerate(place.itertuples()) if row.what == "without"}
    for found in rows[change].to_dict("records"):
        _written_dot(right, found, beside[found["sign"]], INTACT)
    for row, found in enumerate(place.to_dict("records")):
        _written_dot(left, found, row, FRACTURED if found["what"] == "alone" else INTACT)
    names = {"without": "without those {}", "alone": "“{}” in place of the model"}
    left.set_yticks(range(len(place)), [
        f"{names.get(row['what'], row['what']).format(row['sign'])}\n"
        f"{row['fractured']:,} fractured of {row['images']:,}"
        for row in place.to_dict("records")
    ], fontsize=8.5)  # fmt: skip
    left.set_ylim(len(place) - 0.5, -0.7)
    for axes, text in ((left, "AUROC (dashed: chance)"), (right, "Difference of AUROC, without − all")):
        axes.margins(x=0.3)
        style.value_axis(axes, text)
    left.set_xticks(np.arange(4, 11) / 10)
    left.set_xlim(min(0.45, left.get_xlim()[0]), 1.06)
    right.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
    style.reference(left, 0.5, "x", colour=GREY)
    style.reference(right, 0, "x", colour=GREY)
    figure.head(title)
    return figure


def _written_dot(axes: Axes, found: Mapping[Any, Any], row: float, colour: str) -> None:
    """A dot with its interval, and both in digits above it."""
    style.interval_dot(axes, found, row, colour)
    text = f"{found['value']:.3f} ({found['low']:.3f} to {found['high']:.3f})".replace("-", "−")
    axes.annotate(text, (found["value"], row), (0, 7), textcoords="offset points", ha="center",
                  fontsize=8.5, bbox=style.UNDER)  # fmt: skip


@in_style
def ablation_dots(
    table: pd.DataFrame,
    *,
    reference: str,
    metrics: Sequence[str] = ("auroc", "average_precision", "dice_pos"),
    title: str = "",
) -> Picture:
    """How far each run is from the reference on the same images, with paired intervals, and its own values.

    A panel's title has what the metric is of: images, fractured ones, lesions.

    Args:
        table: of `radiographs.ablation`.
        reference: the run that the others are compared with.
        metrics: one panel each.
        title: above all.

    Raises:
        ValueError: the reference is not in the table, or a metric.

    Example:
        >>> table = pd.DataFrame({"run": ["plain", "flips"], "metric": "auroc", "value": [0.91, 0.93]})
        >>> table["difference"] = [np.nan, 0.02]
        >>> table = table.assign(n=615, difference_low=0.01, difference_high=0.03)
        >>> figure = ablation_dots(table, reference="plain", metrics=["auroc"])
    """
    runs = list(dict.fromkeys(table["run"]))
    missing = [name for name in metrics if name not in set(table["metric"])]
    if missing or reference not in runs:
        raise ValueError(
            f"The table of runs has no {listing(missing or [reference])}. Choose another metric or reference."
        )
    shape = whole_inches(min(11, 2.2 + 2.9 * len(metrics))), whole_inches(0.5 * len(runs) + 1.5)
    figure, panels = canvas(*shape, 1, len(metrics), sharey=True, squeeze=False)
    for axes, metric in zip(panels.flat, metrics, strict=True):
        rows = table[table["metric"] == metric].set_index("run")
        for row, name in enumerate(runs):
            if name not in rows.index:
                axes.text(0.02, row, "no mask", transform=axes.get_yaxis_transform(), color=GREY, va="center",
                          fontsize=8.5, bbox=style.UNDER)  # fmt: skip
                continue
            found = rows.loc[name]
            names = {"value": "difference", "low": "difference_low", "high": "difference_high"}
            change = {key: found[column] for key, column in names.items()}
            if name == reference:
                axes.plot(0, row, "D", color=INK, ms=6, zorder=4)
            else:
                style.interval_dot(axes, change, row)
            axes.annotate(f"{found['value']:.3f}", (1, row), (4, 0), ("axes fraction", "data"),
                          "offset points", va="center", fontsize=9, annotation_clip=False)  # fmt: skip
        style.reference(axes, 0, "x", colour=GREY)
        of = "–".join(f"{n:,.0f}" for n in dict.fromkeys((rows["n"].min(), rows["n"].max())))
        style.value_axis(axes, f"{METRICS.get(metric, metric)}\n{of} {_COUNTED.get(metric, 'images')}")
        axes.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
        axes.margins(x=0.15)
    panels[0, 0].set_yticks(range(len(runs)), runs)
    panels[0, 0].set_ylim(len(runs) - 0.5, -0.5)
    words = f"difference from “{reference}” on the same images, 95% interval (right: the run's value)"
    figure.supxlabel(words, fontsize=9)
    figure.head(title)
    return figure


@in_style
def split_leaks(
    table: pd.DataFrame,
    *,
    published: str = "split",
    grouped: str = "grouped",
    groups: int = 18,
    title: str = "",
) -> Picture:
    """Which split each image of a group is in, by the published split and by one that keeps groups whole.

    A group is a patient, a series or duplicates. Drawn are the largest groups that the published split tears.

    Args:
        table: one row an image: `patient` (its group) and the two splits' columns.
        published: column of the published split's names; images without one are left out of its counts.
        grouped: column of the split by groups.
        groups: how many are drawn.
        title: above all.

    Raises:
        ValueError: no group has an image in the published split.

    Example:
        >>> rows = {"patient": [*"aabbc"], "split": ["train", "test", *["train"] * 3], "grouped": "train"}
        >>> figure = split_leaks(pd.DataFrame(rows))
    """
    named = table[table[published].notna() & (table[published].astype(str) != "")]
    if named.empty:
        raise ValueError(f"No image has a split in the column {published!r}. Choose a cohort that has one.")
    by_group = named.groupby("patient", sort=False)[published].agg(["nunique", "size"])
    torn = by_group[by_group["nunique"] > 1].sort_values("size", ascending=False, kind="stable")
    shown = torn.index[:groups] if len(torn) else by_group.index[:groups]
    drawn = named[named["patient"].isin(shown)]
    drawn = drawn.sort_values(published, kind="stable", ascending=False)  # training, the most, is cut off
    largest = int(drawn["patient"].value_counts().max())
    longest, more = min(largest, _CELLS), "; +n: n more, not drawn" if largest > _CELLS else ""
    figure, panels = canvas(9.5, whole_inches(0.21 * len(shown) + 1.9), 1, 2)
    names = ("Published split", "Split by group")
    for axes, column, name in zip(panels, (published, grouped), names, strict=True):
        rows = named[named[column].notna()]
        several = rows.groupby("patient", sort=False)[column].transform("nunique") > 1
        torn_groups, all_groups = (rows["patient"][kept].nunique() for kept in (several, several | True))
        axes.set_title(
            f"{name}\n{torn_groups:,} of {all_groups:,} groups in several splits ({several.sum():,} images)",
            fontsize=10,
        )
        for row, group in enumerate(shown):
            _group_row(axes, row, drawn[drawn["patient"] == group], column)
        axes.set(xlim=(0, longest + 0.8), ylim=(len(shown) - 0.4, -0.6), xticks=[], yticks=[])
        axes.set_xlabel("images of a group, coloured by split" + more, fontsize=9)
        axes.spines[:].set_visible(False)
    panels[0].set_ylabel(f"{len(shown)} groups, the largest first")
    handles: list = [
        Patch(color=colour, label=" / ".join(words))
        for colour, words in _split_words([*named[published], *named[grouped].dropna()]).items()
    ]
    if "label" in named.columns:
        handles.append(
            Line2D([], [], marker="o", color="white", mec=INK, ms=5, linestyle="", label="fractured")
        )
    figure.legend(handles=handles, loc="outside lower center", ncols=5, fontsize=9)
    figure.head(title)
    return figure


def _group_row(axes: Axes, row: int, images: pd.DataFrame, column: str) -> None:
    """The images of one group, coloured by their split, a dot on those that are fractured."""
    for place, image in enumerate(images.head(_CELLS).to_dict("records")):
        colour = _SPLITS.get(str(image[column]), style.PINK)
        axes.barh(row, 0.92, left=place, height=0.8, color=colour)
        if image.get("label") == 1:
            axes.plot(place + 0.46, row, "o", color="white", mec=INK, mew=0.6, ms=5)
    if len(images) > _CELLS:
        axes.text(_CELLS + 0.05, row, f"+{len(images) - _CELLS}", va="center", fontsize=8, color=GREY)


def _split_words(names: Sequence[object]) -> dict[str, list[str]]:
    """Colour → the names of splits that have it, in the order of training, validation, test."""
    found = {str(name) for name in names}
    colours: dict[str, list[str]] = {INTACT: [], style.AMBER: [], style.GREEN: [], style.PINK: []}
    for name in sorted(found):
        colours[_SPLITS.get(name, style.PINK)].append(name)
    return {colour: words for colour, words in colours.items() if words}
