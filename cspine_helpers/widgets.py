"""The threshold slider: every number that moves when the threshold moves, while it moves."""

import struct
import zlib
from base64 import b64encode
from functools import cache
from typing import Any

import ipywidgets
import matplotlib
import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from matplotlib.transforms import IdentityTransform
from PIL import Image, ImageDraw, ImageFont

from cspine_helpers.curves import LEVEL_NAMES, RATE_NAMES, RATE_STYLES, draw_pr, ink_over
from cspine_helpers.decisions import choose_threshold
from cspine_helpers.metrics import at_level, counts_at, defined_levels, rates, threshold_counts
from cspine_helpers.plots import INK, PALE, STYLE
from cspine_helpers.predictions import validate_predictions

DECIMALS = 4  # at least, of what is written beside the slider
STEP = 0.001  # of one press of an arrow key; Page Up and Down move five
CELLS = {"tp": (0, 1), "fn": (1, 1), "fp": (0, 0), "tn": (1, 0)}  # column and row (from below) of each count
_BLUES = matplotlib.colormaps["Blues"]
_ANCHORS = {"left": "ls", "center": "ms", "right": "rs"}  # of text that stands on its baseline


class ThresholdExplorer:
    """A threshold slider over a predictions table, for all vertebrae, one of them, or patients.

    Recall, precision, specificity, F1, the confusion matrix and the point on the precision–recall curve
    follow the slider. Where no kernel runs, the notebook shows the picture of the state it was saved in.

    Args:
        predictions: predictions table, of one split as a rule.
        threshold: where the slider starts, in the fewest decimals that change no call; None: at the highest
            F1 of these data, and it says so.

    Raises:
        ValueError: the table breaks its schema or holds one class only, or the threshold is not in [0, 1].
    """

    def __init__(self, predictions: pd.DataFrame, *, threshold: float | None = None) -> None:
        self._predictions = validate_predictions(predictions)
        levels = defined_levels(self._predictions)
        if not levels:
            raise ValueError(
                f"All {len(predictions)} labels are alike, so no threshold can be judged. Use more studies."
            )
        note = "Starts at the threshold it was given"
        if threshold is None:
            rows = at_level(self._predictions, levels[0])
            threshold = choose_threshold(rows["label"], rows["probability"], objective="max_f1").require()
            note = f"No threshold is chosen. Starts at the highest F1 of {LEVEL_NAMES[levels[0]].lower()}"
        self._start = self._readable(threshold)
        self._pictures: dict[str, _Picture] = {}
        self._slider = ipywidgets.FloatSlider(
            value=self._start, min=0, max=1, step=STEP,
            readout_format=f".{len(_digits(self._start)) - 2}f",
            description="Threshold", layout={"width": "560px"},
        )  # fmt: skip
        self._levels = ipywidgets.Dropdown(
            options=[(LEVEL_NAMES[level], level) for level in levels],
            description="Level", layout={"width": "240px"},
        )  # fmt: skip
        self._image = ipywidgets.Image(format="png", layout={"max_width": "100%"})
        self.widget = ipywidgets.VBox(
            [
                ipywidgets.HBox([self._slider, self._levels]),
                ipywidgets.HTML(f"{note}, {_digits(self._start)}."),
                self._image,
            ]
        )
        for control in (self._slider, self._levels):
            control.observe(self._redraw, names="value")
        self._redraw()

    @property
    def threshold(self) -> float:
        """Where the slider stands; set it to move the slider (to the fewest decimals that change no call)."""
        return self._readable(self._slider.value)

    @threshold.setter
    def threshold(self, value: float) -> None:
        value = self._readable(value)
        self._slider.readout_format = f".{len(_digits(value)) - 2}f"
        self._slider.value = value

    @property
    def level(self) -> str:
        """One of `metrics.LEVELS`; set it to change the level."""
        return self._levels.value

    @level.setter
    def level(self, value: str) -> None:
        offered = [level for _, level in self._levels.options]
        if value not in offered:
            raise ValueError(f"Level {value!r} is not offered: these data allow {', '.join(offered)}.")
        self._levels.value = value

    def summary(self) -> dict[str, Any]:
        """What the picture shows: level, threshold, counts and rates (NaN where undefined)."""
        return {"level": self.level, **self._picture().numbers(self.threshold)}

    def _readable(self, threshold: float) -> float:
        """The threshold in the fewest decimals that call the same, so that what is shown is counted.

        A chosen threshold is itself a score as a rule: rounded up, it would leave its own case out.
        """
        if not 0 <= threshold <= 1:
            raise ValueError(f"A threshold lies in [0, 1]; found {threshold}. Choose it again.")
        scores = self._predictions["probability"]
        called = (scores >= threshold).sum()
        rounded = (round(float(threshold), decimals) for decimals in range(DECIMALS, 18))
        return next((value for value in rounded if (scores >= value).sum() == called), float(threshold))

    def _picture(self) -> "_Picture":
        if self.level not in self._pictures:
            self._pictures[self.level] = _Picture(self._predictions, self.level, self._start)
        return self._pictures[self.level]

    def _redraw(self, change: object = None) -> None:
        self._image.value = self._picture().png(self.threshold)

    def _repr_mimebundle_(self, **kwargs: object) -> dict[str, Any]:
        """The live widget for front ends with a kernel, its picture as PNG for all others."""
        numbers = self.summary()
        words = ", ".join(f"{RATE_NAMES[name]} {numbers[name]:.3f}" for name in RATE_NAMES)
        return {
            **self.widget._repr_mimebundle_(),
            "image/png": b64encode(self._image.value).decode(),
            "text/plain": f"{LEVEL_NAMES[self.level]} at threshold {_digits(self.threshold)}: {words}",
        }


def _digits(threshold: float) -> str:
    """All decimals of a threshold, four at least."""
    return np.format_float_positional(threshold, unique=True, min_digits=DECIMALS)


class _Picture:
    """The picture of one level: what stands still is drawn once, what moves is drawn over it."""

    def __init__(self, predictions: pd.DataFrame, level: str, start: float) -> None:
        with matplotlib.rc_context(STYLE):
            figure = Figure(figsize=(10.4, 3.7))
            self._canvas = FigureCanvasAgg(figure)
            curve, matrix, bars = figure.subplots(1, 3, width_ratios=[1.15, 1, 1])
            rows = draw_pr(curve, predictions, level)
            self._counts = threshold_counts(rows["label"], rows["probability"])
            begin = self.numbers(start)
            curve.plot(
                begin["recall"],
                begin["precision"],
                "D",
                mfc="none",
                mec=INK,
                ms=9,
                label=f"start {_digits(start)}",
            )
            curve.legend(
                loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0.2, fontsize=9
            )  # off the curve
            curve.set_title(LEVEL_NAMES[level])
            (self._point,) = curve.plot([], [], "o", color=INK, ms=10, mec="white", zorder=5)
            self._title = matrix.set_title(f"threshold {_digits(start)}", y=1)
            self._cells = _empty_matrix(matrix, begin)
            self._bars = _empty_bars(bars)
            self._shapes: list[Artist] = [self._point]
            self._texts = [self._title]
            for patch, *texts in (*self._cells.values(), *self._bars.values()):
                self._shapes.append(patch)
                self._texts += texts
            for artist in (*self._shapes, *self._texts):
                artist.set_animated(True)  # left out of the still background
            self._canvas.draw()
            figure.set_layout_engine("none")  # nothing may shift from here on
            for text in self._texts:  # onto whole pixels, where Pillow's text is matplotlib's
                x, y = text.get_transform().transform(text.get_position())
                text.set(transform=IdentityTransform(), position=(round(x), round(y)))
            self._background = self._canvas.copy_from_bbox(figure.bbox)

    def numbers(self, threshold: float) -> dict[str, Any]:
        """Threshold, counts and rates as plain numbers."""
        row = rates(counts_at(self._counts, threshold))
        return {str(name): column.iloc[0].item() for name, column in row.items()}

    def png(self, threshold: float) -> bytes:
        """The picture at this threshold."""
        now = self.numbers(threshold)
        self._point.set_data([now["recall"]], [now["precision"]])
        self._title.set_text(f"threshold {_digits(threshold)}")
        for name, (patch, count, percent) in self._cells.items():
            total = now["tp"] + now["fn"] if name in ("tp", "fn") else now["fp"] + now["tn"]
            share = now[name] / total
            patch.set_facecolor(_BLUES(share / 1.2))
            count.set(text=f"{now[name]:,}", color=ink_over(share))
            percent.set(text=f"{share:.1%}", color=ink_over(share))
        for name, (patch, text) in self._bars.items():
            value = now[name]
            patch.set_width(0 if np.isnan(value) else value)
            text.set_text("–" if np.isnan(value) else f"{value:.3f}")
        return self._drawn()

    def _drawn(self) -> bytes:
        """What moves, over the background: shapes by matplotlib, texts by Pillow in a tenth of the time."""
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


def _empty_matrix(axes: Axes, numbers: dict[str, Any]) -> dict[str, tuple[Rectangle, Text, Text]]:
    """Cells of the confusion matrix, to be filled; truth in rows, call in columns."""
    axes.set(xlim=(0, 2), ylim=(0, 2), aspect="equal")
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    axes.set_xticks([0.5, 1.5], ["called\nfractured", "called\nintact"])
    fractured, intact = numbers["tp"] + numbers["fn"], numbers["fp"] + numbers["tn"]
    axes.set_yticks([0.5, 1.5], [f"intact\n{intact:,}", f"fractured\n{fractured:,}"])
    cells = {}
    for name, (x, y) in CELLS.items():
        axes.add_patch(patch := Rectangle((x, y), 1, 1, edgecolor="white", linewidth=2))
        count = axes.text(x + 0.5, y + 0.55, "", ha="center", fontsize=12)
        cells[name] = (patch, count, axes.text(x + 0.5, y + 0.4, "", ha="center", fontsize=12))
    return cells


def _empty_bars(axes: Axes) -> dict[str, tuple[Rectangle, Text]]:
    """Bars of the rates, to be filled, each over a pale track from 0 to 1."""
    axes.set(xlim=(0, 1), ylim=(3.6, -0.6))
    axes.spines[:].set_visible(False)
    axes.set_xticks([])
    axes.set_yticks([])
    bars = {}
    for y, (name, label) in enumerate(RATE_NAMES.items()):
        axes.add_patch(Rectangle((0, y), 1, 0.34, color=PALE))
        axes.text(0, y - 0.13, label)
        axes.add_patch(patch := Rectangle((0, y), 0, 0.34, color=RATE_STYLES[name]["color"], linewidth=0))
        bars[name] = (patch, axes.text(1, y - 0.13, "", ha="right", weight="bold"))
    return bars
