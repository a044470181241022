"""The slider's picture: the curve, the confusion matrix over the recall of each vertebra, and the rates.

It changes many times a second: what stays is drawn once, what moves is drawn over it (blitting). It is three
images in a row, which a narrow window breaks.
"""

import struct
import zlib
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, Protocol

import matplotlib
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import Collection, LineCollection, PolyCollection
from matplotlib.colors import to_hex, to_rgba
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont
from matplotlib.lines import Line2D
from matplotlib.text import Text
from matplotlib.transforms import IdentityTransform
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageDraw, ImageFont

from cspine_helpers.figures.curves import RATE_NAMES, RATE_STYLES, draw_pr, ink_over, level_name
from cspine_helpers.figures.style import FRACTURED, GREY, INCONCLUSIVE, INK, INTACT, PALE, PINK, STYLE
from cspine_helpers.metrics import pr_curve
from cspine_helpers.slider.operating_point import (
    Estimate,
    OperatingPoint,
    OperatingPoints,
    TriagePoint,
    rounded,
)

BARS = {  # rate → how it is called, and its colour
    "recall": (RATE_NAMES["recall"], FRACTURED),
    "precision": (RATE_NAMES["precision"], INTACT),
    "specificity": (RATE_NAMES["specificity"], RATE_STYLES["specificity"]["color"]),
    "npv": ("negative predictive value", PINK),
    "f1": (RATE_NAMES["f1"], GREY),
}
TRIAGE_BARS = {  # the same, of cases some of which are inconclusive
    "coverage": ("coverage", GREY),
    "inconclusive_rate": ("inconclusive", INCONCLUSIVE),
    "recall_deferred_found": ("recall, deferred found", FRACTURED),
    "recall_deferred_lost": ("recall, deferred lost", FRACTURED),
    "precision": (RATE_NAMES["precision"], INTACT),
    "npv": BARS["npv"],
}
_CALLED = {"predicted\nfractured": ("tp", "fp"), "predicted\nintact": ("fn", "tn")}
_ANSWERED = {
    label: (f"fractured_{answer}", f"intact_{answer}")
    for answer, label in {
        "positive": "positive",
        "inconclusive": "incon-\nclusive",
        "negative": "negative",
    }.items()
}
WIDTHS = {"curve": 296, "counts": 292, "rates": 372}  # image → pixels; a row of them fits most notebooks
_HEIGHT = 430
_DPI = 100
_STYLE = STYLE | {"axes.titlesize": 10, "figure.constrained_layout.w_pad": 0.08}
_POINTS = 300  # of the piece of the curve between two thresholds
_BLUES = matplotlib.colormaps["Blues"]
_MARKERS = ("D", "^", "s")
_ANCHORS = {"left": "ls", "center": "ms", "right": "rs"}  # of text that stands on its baseline


def ink_on(share: float) -> str:
    """`ink_over`, but black for INK, which a dark theme would turn into too dim a grey."""
    return "black" if (colour := ink_over(share)) == INK else colour


def written(estimate: Estimate, decimals: int = 3) -> str:
    """A number with its interval; a dash where it is undefined."""
    value, low, high = (f"{number:.{decimals}f}" for number in estimate)
    return "–" if np.isnan(estimate.value) else value if np.isnan(estimate.low) else f"{value} ({low}–{high})"


class Panels:
    """The picture of one level, in the images of `WIDTHS`.

    Args:
        operating: the level's numbers.
        marks: name → threshold, marked on the curve.
        triage: whether it is of two thresholds, with inconclusive cases between them.

    Attributes:
        images: as they were last drawn.
    """

    def __init__(
        self, operating: OperatingPoints, marks: Mapping[str, float], *, triage: bool = False
    ) -> None:
        bars, columns, colours = BARS, _CALLED, [FRACTURED]
        lines = _patients(operating, triage=triage)
        if triage:
            bars, columns, colours = TRIAGE_BARS | _keyed(TRIAGE_BARS), _ANSWERED, [INCONCLUSIVE, FRACTURED]
            lines = {"inconclusive": "a reader decides about"} | lines
        with matplotlib.rc_context(_STYLE):
            curve, counts, rates = (
                Figure(figsize=(width / _DPI, _HEIGHT / _DPI), dpi=_DPI) for width in WIDTHS.values()
            )
            self._curve = _Curve(curve.subplots(), operating, marks, triage=triage)
            several = bool(operating.positives)  # vertebrae, each with a recall
            parts = counts.subfigures(1 + several, squeeze=False)[:, 0]  # which share no left edge
            matrix, *recalls = (part.subplots() for part in parts)
            self._threshold = matrix.set_title(" ", y=1, x=-0.34)  # above the rows' names
            self._matrix = _Matrix(matrix, operating, columns)
            self._towers = [_Towers(axes, operating, colours) for axes in recalls]
            self._bars = _Bars(rates.subplots(), bars, lines)
            self._place = rates.axes[0].set_title(" ", y=1)
            self.images = {
                "curve": _MovingPicture(curve, [self._curve], []),
                "counts": _MovingPicture(counts, [self._matrix, *self._towers], [self._threshold]),
                "rates": _MovingPicture(rates, [self._bars], [self._place]),
            }

    def pngs(
        self, point: OperatingPoint | TriagePoint, place: str, *, restated: bool = False
    ) -> dict[str, bytes]:
        """The images of one point, or of two.

        Args:
            point: of the level's `OperatingPoints`.
            place: which prevalence the rates hold at, in words.
            restated: whether that is another than found; a hollow point then shows precision there.
        """
        self._fill(point, place, restated=restated)
        return {name: _png(image.pixels()) for name, image in self.images.items()}

    def png(self, point: OperatingPoint | TriagePoint, place: str, *, restated: bool = False) -> bytes:
        """The same as one image, all in a row."""
        self._fill(point, place, restated=restated)
        return _png(np.concatenate([image.pixels() for image in self.images.values()], axis=1))

    def _fill(self, point: OperatingPoint | TriagePoint, place: str, *, restated: bool) -> None:
        ends, patients = [point.low, point.high], [point.low.missed, point.high.called_back]
        if isinstance(point, TriagePoint):
            patients = [point.workload, *patients]
            words = f"inconclusive {rounded(point.low.threshold)} – {rounded(point.high.threshold)}"
        else:
            ends, words = [point], f"threshold {rounded(point.threshold)}"
        self._threshold.set_text(words)
        self._place.set_text(f"○ {place}" if restated else place)  # the key to the hollow point
        self._curve.fill(ends, restated=restated)
        self._matrix.fill(point.counts)
        self._bars.fill(point.rates, patients)
        for towers in self._towers:
            towers.fill(*(end.recalls for end in ends))


def _keyed(bars: Mapping[str, tuple[str, str]]) -> dict[str, tuple[str, str]]:
    """The bars of the two recalls with the signs of their points on the curve."""
    signs = {"recall_deferred_found": "●", "recall_deferred_lost": "■"}
    return {name: (f"{sign} {bars[name][0]}", bars[name][1]) for name, sign in signs.items()}


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


class _Curve:
    """The precision–recall curve in its band, with marks; a point that moves, or two and the piece between.

    Args:
        axes: that it fills.
        operating: of the level.
        marks: name → threshold.
        triage: whether there are two points.
    """

    def __init__(
        self, axes: Axes, operating: OperatingPoints, marks: Mapping[str, float], *, triage: bool = False
    ) -> None:
        band = operating.band
        if band is None:
            axes.text(0.5, 0.5, "too few patients for a band", color=GREY, ha="center", fontsize=9)
        else:
            axes.fill_between(
                band["recall"], band["low"], band["high"], color=INTACT, alpha=0.15, linewidth=0
            )
        draw_pr(axes, operating.cases)
        for marker, (name, threshold) in zip(_MARKERS, marks.items(), strict=False):
            found = operating.at(threshold).found
            style: dict[str, Any] = {"ms": 9, "mfc": "none", "mec": INK, "linestyle": "none"}
            label = f"{name} {rounded(threshold)}"
            axes.plot([found["recall"]], [found["precision"]], marker, label=label, **style)
        if marks:  # off the curve
            axes.figure.legend(loc="outside lower center", fontsize=9)
        axes.set_xlabel("recall\n(curve, band and chance as observed)", fontsize=9)
        axes.add_collection(cross := LineCollection([], color=INK, linewidth=1.2, zorder=4), autolim=False)
        (elsewhere,) = axes.plot([], [], "o", mfc="white", mec=INK, ms=9, zorder=5)
        points = [axes.plot([], [], "o", color=INK, ms=10, mec="white", zorder=6)[0]]
        self._between: list[Line2D] = []
        if triage:
            points += axes.plot([], [], "s", color=INK, ms=9, mec="white", zorder=6)
            (between,) = axes.step(
                [], [], where="post", color=INCONCLUSIVE, linewidth=4, solid_capstyle="butt"
            )
            self._between = [between]
            self._falling = pr_curve(operating.cases.label, operating.cases.probability)
        self._cross, self._elsewhere, self._points = cross, elsewhere, points
        self._title, self._level = axes.set_title(" ", y=1), level_name(operating.cases)
        self.shapes, self.texts = [*self._between, cross, elsewhere, *points], [self._title]

    def fill(self, points: Sequence[OperatingPoint], *, restated: bool) -> None:
        """Show these points."""
        self._title.set_text(self._level)
        lines, hollow = [], []
        for point, shown in zip(points, self._points, strict=True):
            shown.set_data([point.found["recall"]], [point.found["precision"]])
            (x, left, right), (y, low, high) = point.rates["recall"], point.rates["precision"]
            lines += [[(left, y), (right, y)], [(x, low), (x, high)]]
            hollow += [(x, y)] if restated else []
        self._elsewhere.set_data([x for x, _ in hollow], [y for _, y in hollow])
        self._cross.set_segments(_defined(lines))
        for line in self._between:
            first, last = np.searchsorted(self._falling["threshold"], [each.threshold for each in points])
            kept = np.unique(np.linspace(first, last, _POINTS).astype(int))
            line.set_data(self._falling["recall"].iloc[kept], self._falling["precision"].iloc[kept])


class _Matrix:
    """Shares of the observed rows, fractured above intact; columns are what was predicted.

    Args:
        axes: that it fills.
        operating: whose cases are counted.
        columns: in words → the counts in it, of the fractured and of the intact.
    """

    def __init__(
        self, axes: Axes, operating: OperatingPoints, columns: Mapping[str, tuple[str, str]]
    ) -> None:
        all_called = operating.at(0).counts
        self._of = all_called["tp"], all_called["fp"]  # fractured, intact
        axes.set(xlim=(0, len(columns)), ylim=(0, 2))
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
        axes.set_xticks(np.arange(len(columns)) + 0.5, list(columns))
        axes.set_yticks([0.5, 1.5], [f"intact\n{self._of[1]:,}", f"fractured\n{self._of[0]:,}"])
        places = {
            name: (x, 1 - row) for x, names in enumerate(columns.values()) for row, name in enumerate(names)
        }
        x, y = np.array(list(places.values())).T
        axes.add_collection(cells := PolyCollection(_boxes(x, y, 1, 1), edgecolor="white", linewidth=2))
        self.shapes, self._texts = (cells,), {}
        for name, (x, y) in places.items():
            self._texts[name] = [
                axes.text(x + 0.5, y + height, "", ha="center", fontsize=12) for height in (0.56, 0.3)
            ]
        self._rows = {name: 1 - y for name, (_, y) in places.items()}

    @property
    def texts(self) -> list[Text]:
        """What is written."""
        return [text for pair in self._texts.values() for text in pair]

    def fill(self, counts: Mapping[str, int]) -> None:
        """Show these numbers."""
        shares = {name: counts[name] / self._of[row] for name, row in self._rows.items()}
        self.shapes[0].set_facecolor([_BLUES(share / 1.2) for share in shares.values()])
        for name, share in shares.items():
            for text, words in zip(self._texts[name], (f"{counts[name]:,}", f"{share:.1%}"), strict=True):
                text.set(text=words, color=ink_on(share))


class _Bars:
    """Bars of rates from 0 to 1, each over a pale track, with whiskers; and lines of patients below.

    Args:
        axes: that they fill.
        bars: rate → how it is called, and its colour.
        patients: what is counted of 1,000 patients → who they are.
    """

    def __init__(self, axes: Axes, bars: Mapping[str, tuple[str, str]], patients: Mapping[str, str]) -> None:
        axes.set(xlim=(0, 1), ylim=(len(bars) - 0.35 + 1.1 * len(patients), -0.55), xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
        self._places = np.arange(len(bars))
        axes.add_collection(PolyCollection(_boxes(0, self._places, 1, 0.34), color=PALE, linewidth=0))
        self._texts = {}
        for y, (name, (label, _)) in enumerate(bars.items()):
            axes.text(0, y - 0.13, label)
            self._texts[name] = axes.text(1, y - 0.13, "", ha="right", weight="bold")
        colours, nothing = [colour for _, colour in bars.values()], _boxes(0, self._places, 0, 0.34)
        axes.add_collection(bodies := PolyCollection(nothing, facecolor=colours, linewidth=0))
        axes.add_collection(whiskers := LineCollection([], color=INK, linewidth=1.6), autolim=False)
        self.shapes, self._patients = (bodies, whiskers), []
        heights = len(bars) + 0.25 + 1.1 * np.arange(len(patients))
        for y, (name, line) in zip(heights, patients.items(), strict=True):
            axes.text(0, y, f"{name} per 1,000")
            axes.text(0, y + 0.45, f"patients {line}", color=GREY, fontsize=9)
            self._patients.append(axes.text(1, y, "", ha="right", weight="bold"))

    @property
    def texts(self) -> list[Text]:
        """What is written, rates first."""
        return [*self._texts.values(), *self._patients]

    def fill(self, rates: Mapping[str, Estimate], patients: Sequence[Estimate]) -> None:
        """Show these numbers."""
        found, (bodies, whiskers) = np.array([rates[name] for name in self._texts]), self.shapes  # (n, 3)
        bodies.set_verts(_boxes(0, self._places, found[:, 0], 0.34))
        whiskers.set_segments(_defined(np.stack([found[:, 1:], _twice(self._places + 0.17)], axis=2)))
        for name, text in self._texts.items():
            text.set_text(written(rates[name]))
        for text, number in zip(self._patients, patients, strict=True):
            text.set_text(written(number, 1))


def _patients(operating: OperatingPoints, *, triage: bool = False) -> dict[str, str]:
    """What is counted of 1,000 patients → who they are; of triage those who are answered wrongly."""
    level, unit = operating.level, operating.cases.level
    none, some = (f"every {unit} negative", "positive") if triage else (f"no {unit} flagged", "flagged")
    alone = "negative" if triage else "not flagged"
    whose = {"all": (f"fractured, {none}", f"intact, {'an' if unit == 'image' else 'a'} {unit} {some}")}
    whose |= {"patient": (f"fractured, {alone}", f"intact, {some}")}
    lines = whose.get(level, (f"with {level} fractured, {alone}", f"with {level} intact, {some}"))
    return dict(zip(("missed", "called back"), lines, strict=True))


class _Towers:
    """The recall of each vertebra as bars with whiskers; those of the level bold and in full colour.

    Args:
        axes: that they fill.
        operating: of the level; their numbers of fractures stand below.
        colours: of the bars; of two, those behind take what is inconclusive as found, in front as lost.
    """

    def __init__(self, axes: Axes, operating: OperatingPoints, colours: Sequence[str]) -> None:
        level, names = operating.level, list(operating.positives)
        self._places = np.arange(len(names))
        axes.set(xlim=(-0.5, 6.5), ylim=(0, 1.02 + 0.12 * len(colours)), yticks=[0, 0.5, 1])
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
        axes.grid(axis="y")
        axes.set_axisbelow(True)
        axes.set_xticks(self._places, [f"{name}\n{count:,}" for name, count in operating.positives.items()])
        axes.set_title("recall of patients, by fracture" if level == "patient" else "recall of each vertebra")
        size = 9 if len(colours) == 1 else 8.5  # beside which "found" and "lost" stand
        chosen = [level in (name, "all", "patient") for name in names]
        weights = ["bold" if here else "normal" for here in chosen]
        self.texts: list[Text] = []
        self._bodies, self._whiskers = [], []
        for place, colour in enumerate(colours):
            faded = [to_rgba(colour, 1 if here else 0.35) for here in chosen]
            height = 1.06 + 0.12 * (len(colours) - 1 - place)
            if len(colours) > 1:
                word = "lost" if place else "found"
                axes.text(-0.6, height, word, ha="right", color=GREY, fontsize=9)
            self.texts += [
                axes.text(x, height, "", ha="center", weight=weight, fontsize=size)
                for x, weight in enumerate(weights)
            ]
            nothing = _boxes(self._places, 0, 0, 0)
            self._bodies.append(PolyCollection(nothing, facecolor=faded, linewidth=0))
            self._whiskers.append(LineCollection([], color=INK, linewidth=1.6))
        for moving in self.shapes:
            axes.add_collection(moving, autolim=False)

    @property
    def shapes(self) -> list[Collection]:
        """What is drawn, in this order."""
        return [*self._bodies, *self._whiskers]

    def fill(self, *recalls: Mapping[str, Estimate]) -> None:
        """Show these numbers, of each colour."""
        texts = iter(self.texts)
        for place, found in enumerate(recalls):
            numbers = np.array(list(found.values()))  # (7, 3)
            aside = 0.2 * (place - (len(recalls) - 1) / 2)  # whiskers beside one another
            self._bodies[place].set_verts(_boxes(self._places - 0.32, 0, 0.64, numbers[:, 0]))
            ends = np.stack([_twice(self._places + aside), numbers[:, 1:]], axis=2)
            self._whiskers[place].set_segments(_defined(ends))
            for value in numbers[:, 0]:
                next(texts).set_text("–" if np.isnan(value) else f"{value:.2f}")


class _Part(Protocol):
    """What of a panel moves."""

    @property
    def shapes(self) -> Sequence[Artist]: ...

    @property
    def texts(self) -> Sequence[Text]: ...


class _MovingPicture:
    """A figure of which some artists move.

    Args:
        figure: drawn once, without these artists; its layout is settled then.
        parts: whose shapes move, in the order of drawing, and texts, on one line each and without markup;
            they keep their places.
        texts: others that do.
    """

    def __init__(self, figure: Figure, parts: Sequence[_Part], texts: Sequence[Text]) -> None:
        self._shapes = [shape for part in parts for shape in part.shapes]
        self._texts = [*texts, *(text for part in parts for text in part.texts)]
        self._canvas = FigureCanvasAgg(figure)
        for artist in (*self._shapes, *self._texts):
            artist.set_animated(True)  # left out of the still background
        self._canvas.draw()
        figure.set_layout_engine("none")  # nothing may shift from here on
        for text in self._texts:  # onto whole pixels, where Pillow's text is matplotlib's
            x, y = text.get_transform().transform(text.get_position())
            text.set(transform=IdentityTransform(), position=(round(x), round(y)))
        self._background = self._canvas.copy_from_bbox(figure.bbox)

    def pixels(self) -> NDArray[np.uint8]:
        """The picture as it is now, (H, W, 4).

        Shapes are drawn by matplotlib, texts by Pillow in a tenth of the time.
        """
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
        return np.asarray(pixels)


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
