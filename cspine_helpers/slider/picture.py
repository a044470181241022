"""The slider's picture: the curve, the rates, the confusion matrix, and the recall of each vertebra if any.

It changes many times a second: what stays is drawn once, what moves is drawn over it (blitting).
"""

import struct
import zlib
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import matplotlib
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection, PolyCollection
from matplotlib.colors import to_hex, to_rgba
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont
from matplotlib.lines import Line2D
from matplotlib.text import Text
from matplotlib.transforms import IdentityTransform
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageDraw, ImageFont

from cspine_helpers.figures.curves import RATE_NAMES, RATE_STYLES, draw_pr, ink_over, level_name
from cspine_helpers.figures.style import FRACTURED, GREY, INK, INTACT, PALE, STYLE
from cspine_helpers.slider.operating_point import Estimate, OperatingPoint, OperatingPoints, digits

BARS = {  # rate → how it is called, and its colour
    "recall": (RATE_NAMES["recall"], FRACTURED),
    "precision": (RATE_NAMES["precision"], INTACT),
    "specificity": (RATE_NAMES["specificity"], RATE_STYLES["specificity"]["color"]),
    "npv": ("negative predictive value", "#CC79A7"),
    "f1": (RATE_NAMES["f1"], GREY),
}
CELLS = {"tp": (0, 1), "fn": (1, 1), "fp": (0, 0), "tn": (1, 0)}  # column and row (from below) of each count
_BLUES = matplotlib.colormaps["Blues"]
_MARKERS = ("D", "^", "s")
_ANCHORS = {"left": "ls", "center": "ms", "right": "rs"}  # of text that stands on its baseline


def written(estimate: Estimate, decimals: int = 3) -> str:
    """A number with its interval; a dash where it is undefined."""
    value, low, high = (f"{number:.{decimals}f}" for number in estimate)
    return "–" if np.isnan(estimate.value) else value if np.isnan(estimate.low) else f"{value} ({low}–{high})"


class Panels:
    """The picture of one level.

    Args:
        operating: the level's numbers.
        marks: name → threshold, marked on the curve.

    Attributes:
        picture: as it was last drawn.
    """

    def __init__(self, operating: OperatingPoints, marks: Mapping[str, float]) -> None:
        several = bool(operating.positives)  # vertebrae, each with a recall
        with matplotlib.rc_context(STYLE):
            figure = Figure(figsize=(8.8, 5.8), dpi=100)  # as wide as most notebooks
            panels = figure.subplot_mosaic(
                [["curve", "rates"], ["matrix", "recalls" if several else "rates"]], height_ratios=[1.2, 1]
            )
            self._point, self._elsewhere, self._cross = _curve(panels["curve"], operating, marks)
            self._level, self._title = level_name(operating.cases), panels["curve"].set_title(" ", y=1)
            self._threshold = panels["matrix"].set_title(" ", y=1)
            self._cells, self._counts = _matrix(panels["matrix"], operating)
            self._place = panels["rates"].set_title(" ", y=1)
            self._bars, self._rates, self._spread = _rates(panels["rates"])
            self._missed, self._called_back = _patients(panels["rates"], operating)
            shapes = [
                self._cross, self._elsewhere, self._point, self._cells, self._bars, self._spread,
            ]  # fmt: skip
            self._recalls: dict[str, Text] = {}
            if several:
                self._towers, self._recalls, self._recall_spread = _recalls(panels["recalls"], operating)
                shapes += [self._towers, self._recall_spread]
            texts = (
                self._threshold, self._place, self._missed, self._called_back, self._title,
                *self._counts.values(), *self._rates.values(), *self._recalls.values(),
            )  # fmt: skip
            self.picture = _MovingPicture(figure, shapes, texts)

    def png(self, point: OperatingPoint, place: str, *, restated: bool = False) -> bytes:
        """The picture of one point.

        Args:
            point: of the level's `OperatingPoints`.
            place: which prevalence the rates hold at, in words.
            restated: whether that is another than found; a hollow point then shows precision there.
        """
        self._threshold.set_text(f"threshold {digits(point.threshold)}")
        self._place.set_text(place)
        self._missed.set_text(written(point.missed, 1))
        self._called_back.set_text(written(point.called_back, 1))
        self._title.set_text(f"{self._level}; hollow: restated" if restated else self._level)

        self._point.set_data([point.found["recall"]], [point.found["precision"]])
        (x, left, right), (y, low, high) = point.rates["recall"], point.rates["precision"]
        self._elsewhere.set_data([x] if restated else [], [y] if restated else [])
        self._cross.set_segments(_defined([[(left, y), (right, y)], [(x, low), (x, high)]]))

        counts = point.counts
        totals = {"tp": counts["tp"] + counts["fn"], "fp": counts["fp"] + counts["tn"]}
        totals |= {"fn": totals["tp"], "tn": totals["fp"]}
        shares = {name: counts[name] / totals[name] for name in CELLS}
        self._cells.set_facecolor([_BLUES(share / 1.2) for share in shares.values()])
        for name, share in shares.items():
            self._counts[name].set(text=f"{counts[name]:,}", color=ink_over(share))
            self._counts[f"share of {name}"].set(text=f"{share:.1%}", color=ink_over(share))

        rates = np.array([point.rates[name] for name in BARS])  # (5, 3): value, low, high
        places = np.arange(len(rates))
        self._bars.set_verts(_boxes(0, places, rates[:, 0], 0.34))
        self._spread.set_segments(_defined(np.stack([rates[:, 1:], _twice(places + 0.17)], axis=2)))
        for name, text in self._rates.items():
            text.set_text(written(point.rates[name]))

        if self._recalls:
            recalls = np.array(list(point.recalls.values()))  # (7, 3)
            places = np.arange(len(recalls))
            self._towers.set_verts(_boxes(places - 0.32, 0, 0.64, recalls[:, 0]))
            self._recall_spread.set_segments(_defined(np.stack([_twice(places), recalls[:, 1:]], axis=2)))
        for name, text in self._recalls.items():
            value = point.recalls[name].value
            text.set_text("–" if np.isnan(value) else f"{value:.2f}")
        return self.picture.png()


def _defined(segments: ArrayLike) -> list[NDArray[np.float64]]:
    """Those of the lines (n, 2, 2) that have both ends."""
    lines = np.asarray(segments, dtype=np.float64)
    return list(lines[~np.isnan(lines).any(axis=(1, 2))])


def _twice(values: NDArray) -> NDArray:
    return np.stack([values, values], axis=1)


def _boxes(x: ArrayLike, y: ArrayLike, width: ArrayLike, height: ArrayLike) -> list[NDArray[np.float64]]:
    """Corners (n, 4, 2) of upright boxes; what is undefined has no size."""
    x, y, width, height = np.broadcast_arrays(x, y, np.nan_to_num(width), np.nan_to_num(height))
    across = np.stack([x, x + width, x + width, x], axis=1)
    return list(np.stack([across, np.stack([y, y, y + height, y + height], axis=1)], axis=2))


def _curve(
    axes: Axes, operating: OperatingPoints, marks: Mapping[str, float]
) -> tuple[Line2D, Line2D, LineCollection]:
    """The precision–recall curve in its band, with the marks; the two points and the cross to be moved."""
    band = operating.band
    if band is None:
        axes.text(0.5, 0.5, "too few patients for a band", color=GREY, ha="center", fontsize=9)
    else:
        axes.fill_between(band["recall"], band["low"], band["high"], color=INTACT, alpha=0.15, linewidth=0)
    draw_pr(axes, operating.cases)
    for marker, (name, threshold) in zip(_MARKERS, marks.items(), strict=False):
        found = operating.at(threshold).found
        style: dict[str, Any] = {"ms": 9, "mfc": "none", "mec": INK, "linestyle": "none"}
        label = f"{name} {digits(threshold)}"
        axes.plot([found["recall"]], [found["precision"]], marker, label=label, **style)
    if marks:  # off the curve
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0.2, fontsize=9)
    axes.set_xlabel("recall (curve, band and chance as observed)")
    axes.add_collection(cross := LineCollection([], color=INK, linewidth=1.2, zorder=4), autolim=False)
    (elsewhere,) = axes.plot([], [], "o", mfc="white", mec=INK, ms=9, zorder=5)
    (point,) = axes.plot([], [], "o", color=INK, ms=10, mec="white", zorder=6)
    return point, elsewhere, cross


def _matrix(axes: Axes, operating: OperatingPoints) -> tuple[PolyCollection, dict[str, Text]]:
    """Cells of the confusion matrix, to be filled; observed in rows, predicted in columns."""
    counts = operating.at(0).counts
    axes.set(xlim=(0, 2), ylim=(0, 2))
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    axes.set_xticks([0.5, 1.5], ["predicted\nfractured", "predicted\nintact"])
    fractured, intact = counts["tp"] + counts["fn"], counts["fp"] + counts["tn"]
    axes.set_yticks([0.5, 1.5], [f"intact\n{intact:,}", f"fractured\n{fractured:,}"])
    x, y = np.array(list(CELLS.values())).T
    axes.add_collection(cells := PolyCollection(_boxes(x, y, 1, 1), edgecolor="white", linewidth=2))
    texts = {}
    for name, (x, y) in CELLS.items():
        texts[name] = axes.text(x + 0.5, y + 0.56, "", ha="center", fontsize=12)
        texts[f"share of {name}"] = axes.text(x + 0.5, y + 0.3, "", ha="center", fontsize=12)
    return cells, texts


def _rates(axes: Axes) -> tuple[PolyCollection, dict[str, Text], LineCollection]:
    """Bars of the rates, to be filled, each over a pale track from 0 to 1; and their whiskers."""
    axes.set(xlim=(0, 1), ylim=(6.85, -0.55), xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    places, texts = np.arange(len(BARS)), {}
    axes.add_collection(PolyCollection(_boxes(0, places, 1, 0.34), color=PALE, linewidth=0))
    for y, (name, (label, _)) in enumerate(BARS.items()):
        axes.text(0, y - 0.13, label)
        texts[name] = axes.text(1, y - 0.13, "", ha="right", weight="bold")
    colours = [colour for _, colour in BARS.values()]
    axes.add_collection(bars := PolyCollection(_boxes(0, places, 0, 0.34), facecolor=colours, linewidth=0))
    axes.add_collection(whiskers := LineCollection([], color=INK, linewidth=1.6), autolim=False)
    return bars, texts, whiskers


def _patients(axes: Axes, operating: OperatingPoints) -> tuple[Text, Text]:
    """The two lines below the rates, to be filled."""
    level, unit = operating.level, operating.cases.level
    whose = {
        "all": (f"fractured, no {unit} flagged", f"intact, {'an' if unit == 'image' else 'a'} {unit} flagged")
    }
    whose |= {"patient": ("fractured, not flagged", "intact, flagged")}
    lines = whose.get(level, (f"with {level} fractured, not flagged", f"with {level} intact, flagged"))
    texts = []
    for y, name, line in zip((5.25, 6.35), ("missed", "called back"), lines, strict=True):
        axes.text(0, y, f"{name} per 1,000")
        axes.text(0, y + 0.45, f"patients {line}", color=GREY, fontsize=9)
        texts.append(axes.text(1, y, "", ha="right", weight="bold"))
    return texts[0], texts[1]


def _recalls(
    axes: Axes, operating: OperatingPoints
) -> tuple[PolyCollection, dict[str, Text], LineCollection]:
    """Bars of the recall of each vertebra, to be filled; and their whiskers."""
    level, names, texts = operating.level, list(operating.positives), {}
    places = np.arange(len(names))
    axes.set(xlim=(-0.5, 6.5), ylim=(0, 1.14), yticks=[0, 0.5, 1])
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    axes.grid(axis="y")
    axes.set_axisbelow(True)
    axes.set_xticks(places, [f"{name}\n{count:,}" for name, count in operating.positives.items()])
    axes.set_title("recall of patients, by fracture" if level == "patient" else "recall of each vertebra")
    chosen = [level in (name, "all", "patient") for name in names]
    for x, name in enumerate(names):
        weight = "bold" if chosen[x] else "normal"
        texts[name] = axes.text(x, 1.06, "", ha="center", weight=weight)
    colours = [to_rgba(FRACTURED, 1 if here else 0.35) for here in chosen]
    axes.add_collection(towers := PolyCollection(_boxes(places, 0, 0, 0), facecolor=colours, linewidth=0))
    axes.add_collection(whiskers := LineCollection([], color=INK, linewidth=1.6), autolim=False)
    return towers, texts, whiskers


class _MovingPicture:
    """A figure of which some artists move.

    Args:
        figure: drawn once, without these artists; its layout is settled then.
        shapes: what moves, in the order of drawing.
        texts: what moves, on one line each and without markup; they keep their places.
    """

    def __init__(self, figure: Figure, shapes: Sequence[Artist], texts: Sequence[Text]) -> None:
        self._shapes, self._texts = shapes, texts
        self._canvas = FigureCanvasAgg(figure)
        for artist in (*shapes, *texts):
            artist.set_animated(True)  # left out of the still background
        self._canvas.draw()
        figure.set_layout_engine("none")  # nothing may shift from here on
        for text in texts:  # onto whole pixels, where Pillow's text is matplotlib's
            x, y = text.get_transform().transform(text.get_position())
            text.set(transform=IdentityTransform(), position=(round(x), round(y)))
        self._background = self._canvas.copy_from_bbox(figure.bbox)

    def png(self) -> bytes:
        """The picture as it is now: shapes by matplotlib, texts by Pillow in a tenth of the time."""
        self._canvas.restore_region(self._background)
        for shape in self._shapes:
            shape.draw(self._canvas.get_renderer())
        width, height = self._canvas.get_width_height()
        pixels = self._canvas.buffer_rgba()
        image = Image.frombuffer("RGBA", (width, height), pixels, "raw", "RGBA", 0, 1)
        image.readonly = 0  # write into the canvas, not into a copy
        pen = ImageDraw.Draw(image)
        for text in self._texts:
            x, y = text.get_position()
            font = _font(text.get_fontproperties(), self._canvas.figure.dpi)
            ink, anchor = to_hex(text.get_color()), _ANCHORS[text.get_horizontalalignment()]
            pen.text((x, height - y), text.get_text(), fill=ink, font=font, anchor=anchor)
        return _png(np.asarray(pixels))


@cache
def _font(style: FontProperties, dpi: float) -> ImageFont.FreeTypeFont:
    pixels = style.get_size_in_points() * dpi / 72
    return ImageFont.truetype(findfont(style), pixels, layout_engine=ImageFont.Layout.BASIC)


def _png(pixels: np.ndarray) -> bytes:
    """(H, W, 4) uint8 as PNG with unfiltered rows: as small as Pillow's here, in a quarter of its time.

    Source: W3C, Portable Network Graphics, sections 5 and 11.
    """
    height, width, _ = pixels.shape
    rows = np.zeros((height, 1 + 4 * width), np.uint8)  # in front of each row its filter, 0: none
    rows[:, 1:] = pixels.reshape(height, -1)
    header = struct.pack(">2I5B", width, height, 8, 6, 0, 0, 0)  # 8 bits, RGBA, not interlaced
    chunks = {b"IHDR": header, b"IDAT": zlib.compress(rows.data, 1), b"IEND": b""}
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks.items()
    )
