"""One page for one patient: what is called, how sure, where the model looked, and what such a call is worth.

It draws a `Page` and computes nothing: `patient_page` assembles one. What is called has a shape and a word,
not only a colour, so that the page reads the same in greyscale.
"""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import matplotlib
import numpy as np
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.transforms import Transform, blended_transform_factory
from numpy.typing import NDArray

from cspine_helpers.figures import style
from cspine_helpers.figures.scans import BONE_WINDOW_HU
from cspine_helpers.figures.style import FRACTURED, GREY, INK, INTACT, PALE, SKY, STYLE, Picture

Verdict = Literal["called", "not called", "undecided"]
ICONS: dict[Verdict, tuple[str, str]] = {  # shape and colour
    "called": ("▲", FRACTURED),
    "not called": ("○", INTACT),
    "undecided": ("◇", INK),
}
TRUE = "◆ true"
ABSENT, CUT_OFF = "not packed", "not in the scan"  # the second where the scan is known to end above it
SHOWN = 3  # slices of a vertebra


@dataclass(frozen=True)
class Row:
    """One row of the dot plot: a vertebra, or the patient.

    Attributes:
        name: C1 … C7, or "patient".
        probability: as it is to be read; None: see `absent`.
        threshold: on the same scale; None: there is none.
        called: None: there is no threshold, or nothing to call.
        height_mm: of a vertebra, below the scan's first slice.
        intact, fractured: (n,) probabilities of validation cases of this level.
        true: whether it is fractured; None: unknown, or not to be shown.
        absent: what is said where it has no probability.
    """

    name: str
    probability: float | None
    threshold: float | None
    called: bool | None
    height_mm: float
    intact: NDArray[np.float64]
    fractured: NDArray[np.float64]
    true: bool | None = None
    absent: str = ABSENT

    @property
    def words(self) -> str:
        """The row in words: "97 % called", "0.4 % not called"."""
        if self.probability is None:
            return self.absent
        call = {True: " called", False: " not called", None: ""}[self.called]
        return f"{percent(self.probability, apart=self.threshold)}{call}"


@dataclass(frozen=True)
class SideView:
    """The neck from the side: one sagittal sheet, the front on the left.

    Attributes:
        plane: (Z, Y), Hounsfield units, or NaN where there is nothing to show.
        labels: (Z, Y); 1–7 mark C1–C7.
        spacing_mm: (z, y).
        height_mm: vertebra → how far below the first slice its front part is.
        name_mm: vertebra → where its name goes in front of it, mm from the sheet's first row.
        ticks_mm: called vertebra → height of its slice of most attention, mm.
        lesions_mm: (left, top, width, height) of fractured bone in the sheet, where that may be shown.
        note: what this sheet is.
    """

    plane: NDArray[np.float32]
    labels: NDArray[np.integer]
    spacing_mm: tuple[float, float]
    height_mm: dict[str, float]
    name_mm: dict[str, float]
    ticks_mm: dict[str, float] = field(default_factory=dict)
    lesions_mm: tuple[tuple[float, float, float, float], ...] = ()
    note: str = ""


@dataclass(frozen=True)
class AxialSlice:
    """One axial slice around a vertebra, square in mm, the patient's right on the left.

    Attributes:
        plane: (Y, X), Hounsfield units.
        mask: (Y, X), the vertebra.
        aspect: height of a pixel by its width.
        caption: which slice.
        boxes: (x, y, width, height) in pixels, edges between pixels at whole numbers.
        pixel_mm: width of a pixel, which gives a scale bar; None where it is not known.
    """

    plane: NDArray[np.floating]
    mask: NDArray[np.bool_]
    aspect: float
    caption: str
    boxes: tuple[tuple[float, float, float, float], ...] = ()
    pixel_mm: float | None = None


@dataclass(frozen=True)
class Look:
    """What the model looked at in one vertebra.

    Attributes:
        title: the vertebra and its call.
        slices: those of most attention, the highest first.
        attention: (T,), cranial first; sums to 1.
        shown: their positions in the sequence, as in `slices`.
        profile: (T,) mean attention in intact vertebrae of this level; None: not known.
        fractured: positions that show the fracture, where that may be shown.
    """

    title: str
    slices: tuple[AxialSlice, ...]
    attention: NDArray[np.float64]
    shown: tuple[int, ...]
    profile: NDArray[np.float64] | None = None
    fractured: tuple[int, ...] = ()


@dataclass(frozen=True)
class Page:
    """All that is on the page.

    Attributes:
        verdict: about the patient.
        headline: the verdict in words.
        subline: with which probability, and at which threshold.
        rule: how that threshold was chosen.
        about: study, slices, spacing, and what kind of images these are, one line each.
        truth: the truth in a line; None: not shown.
        scale: what the probabilities are.
        rows: C1 … C7.
        patient: the patient's row.
        side: the side view.
        looks: up to two vertebrae.
        footer: title → sentences, three columns.
    """

    verdict: Verdict
    headline: str
    subline: str
    rule: str
    about: tuple[str, ...]
    truth: str | None
    scale: str
    rows: tuple[Row, ...]
    patient: Row
    side: SideView
    looks: tuple[Look, ...]
    footer: dict[str, tuple[str, ...]]


def percent(share: float, *, apart: float | None = None) -> str:
    """A share in per cent, with a decimal where it is small: "97 %", "2.1 %", "<0.1 %", ">99 %".

    With as many decimals more, four at most, as it takes to read unlike another that it is `apart` from.

    Example:
        >>> percent(0.0206), percent(0.0206, apart=0.0212), percent(0.97)
        ('2.1 %', '2.06 %', '97 %')
    """
    written = _percent(share)
    if apart is None or share == apart or written != _percent(apart):
        return written
    decimals = next((n for n in range(1, 4) if round(100 * share, n) != round(100 * apart, n)), 4)
    return f"{100 * share:.{decimals}f} %"


def _percent(share: float) -> str:
    if share < 0.001:
        return "<0.1 %"
    if share < 0.0995:
        return f"{100 * share:.1f} %"
    return ">99 %" if share >= 0.995 else f"{100 * share:.0f} %"


# All in inches; the grid is 12 columns wide, and 12 %, 70 % and 18 % high.
_WIDTH, _HEIGHT, _EDGE, _GAP = 13.3, 7.5, 0.22, 0.2
_COLUMN = (_WIDTH - 2 * _EDGE) / 12
_HEADER, _FOOTER = 0.12 * _HEIGHT, 0.18 * _HEIGHT
_TOP = _HEIGHT - _HEADER - 0.3  # of the panels' contents, below their titles
_BOTTOM = _FOOTER + 0.5  # above the axis' numbers
_NAMES, _WORDS = 0.56, 1.12  # room left and right of the dots
_PATIENT = 0.8  # of the patient's row and the rule above it
_TEXT, _SMALL = 8.5, 7.5  # points
_TICKS = (0, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 1)
_AROUND_MM = (9.0, 10.0, 16.0, 8.0)  # shown above, below, in front of and behind the vertebrae
_BAR_MM = 50.0
_BRIGHT: list[patheffects.AbstractPathEffect] = [patheffects.withStroke(linewidth=3.8, foreground="white")]


@matplotlib.rc_context(STYLE | {"figure.constrained_layout.use": False, "hatch.linewidth": 0.6})
def patient_picture(page: Page) -> Picture:
    """Draw the page, 13.3 × 7.5 inches: header, side view, dot plot, slices, footer.

    Example:
        >>> from cspine_helpers.patient_page import PatientPages
        >>> page = PatientPages(run, cohort).page(cohort.samples["validation"]["StudyInstanceUID"][0])
        >>> patient_picture(page).get_size_inches().tolist()
        [13.3, 7.5]
    """
    figure = Picture(figsize=(_WIDTH, _HEIGHT))
    figure.colours = 256
    _draw_header(figure, page)
    left, middle, right = (_EDGE + columns * _COLUMN for columns in (0, 4, 7))
    high = _TOP - _BOTTOM
    side = _place(figure, left, _BOTTOM, 4 * _COLUMN - _GAP, high)
    dots = _place(figure, middle + _NAMES, _BOTTOM, 3 * _COLUMN - _GAP - _NAMES - _WORDS, high)
    limits = _limits(page, 4 * _COLUMN - _GAP, high)
    _draw_side(side, page, *limits)
    _draw_dots(dots, page, limits[1])
    half = (_TOP - _FOOTER - 0.06) / 2
    for number, look in enumerate(page.looks):
        _draw_look(figure, look, right, _TOP - (number + 1) * half, 5 * _COLUMN, half)
    for letter, title, at in (
        ("A", "The neck from the side", left),
        ("B", f"Probability of a fracture, {page.scale}", middle),
        ("C", "Where the model looked most", right),
    ):
        _write(figure, at, _TOP + 0.1, f"{letter}  {title}", size=_TEXT + 1, weight="bold")
    _draw_footer(figure, page)
    return figure


def _place(figure: Picture, left: float, bottom: float, width: float, height: float) -> Axes:
    """Axes at a place in inches."""
    return figure.add_axes((left / _WIDTH, bottom / _HEIGHT, width / _WIDTH, height / _HEIGHT))


def _write(figure: Picture, x: float, y: float, text: str, **options: Any) -> None:
    figure.text(x / _WIDTH, y / _HEIGHT, text, parse_math=False, **options)


def _rule(figure: Picture, y: float) -> None:
    ends = [_EDGE / _WIDTH, 1 - _EDGE / _WIDTH]
    figure.add_artist(Line2D(ends, [y / _HEIGHT] * 2, color=GREY, linewidth=0.8))


def _draw_header(figure: Picture, page: Page) -> None:
    icon, colour = ICONS[page.verdict]
    top = _HEIGHT - 0.33
    _write(figure, _EDGE, top, f"{icon} {page.headline}", size=20, weight="bold", color=colour, va="center")
    _write(figure, _EDGE, top - 0.3, page.subline, size=10.5, va="center")
    _write(figure, _EDGE, top - 0.48, page.rule, size=_SMALL, va="center")
    if page.truth is not None:
        _write(figure, _WIDTH - _EDGE, top - 0.4, page.truth, size=11, weight="bold", va="center", ha="right",
               gid="truth")  # fmt: skip
    lines = "\n".join(page.about)
    _write(figure, _WIDTH - _EDGE, _HEIGHT - 0.12, lines, size=_SMALL, color=INK, va="top", ha="right")
    _rule(figure, _HEIGHT - _HEADER)


Range = tuple[float, float]


def _limits(page: Page, width: float, height: float) -> tuple[Range, Range]:
    """What the side view shows, from left to right and from top to bottom in mm: vertebrae, all rows."""
    above, below, front, behind = _AROUND_MM
    z, y = page.side.spacing_mm
    rows, columns = np.nonzero(page.side.labels)
    heights = [row.height_mm for row in page.rows]
    low = min([*heights, *(rows[:1] * z)]) if rows.size else min(heights)
    low, high = min(low, rows.min() * z if rows.size else low) - above, max(heights) + below
    scale = (high - low) / (height - _PATIENT)  # mm an inch; the patient's row is below all others
    sides = (columns.min() * y - front, columns.max() * y + behind) if columns.size else (0.0, 1.0)
    scale = max(scale, (sides[1] - sides[0]) / width)
    middle, top = sum(sides) / 2, low - max(0.0, scale * (height - _PATIENT) - (high - low)) / 2
    return (middle - scale * width / 2, middle + scale * width / 2), (top, top + scale * height)


def _draw_side(axes: Axes, page: Page, wide: Range, tall: Range) -> None:
    side = page.side
    (z, y), (rows, columns) = side.spacing_mm, side.plane.shape
    extent = (-y / 2, (columns - 0.5) * y, (rows - 0.5) * z, -z / 2)
    low, high = BONE_WINDOW_HU
    axes.set(xlim=wide, ylim=tall[::-1], facecolor=PALE, xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    shown = np.ma.masked_invalid(side.plane)
    axes.imshow(shown, cmap="gray", vmin=low, vmax=high, extent=extent, aspect="auto",
                interpolation="bilinear")  # fmt: skip
    depth, height = np.arange(columns) * y, np.arange(rows) * z
    for number, row in enumerate(page.rows, start=1):
        inside = side.labels == number
        if not inside.any() or row.probability is None:
            continue
        look: dict[str, Any] = {"colors": "white", "linewidths": 0.9, "linestyles": [(0, (3, 2.2))]}
        if row.called:
            look = {"colors": FRACTURED, "linewidths": 2.0}
        outline = axes.contour(depth, height, inside.astype(float), levels=[0.5], **look)
        if row.called:
            outline.set_path_effects(_BRIGHT)  # so that they stand out in greyscale, too
        name, weight = (f"▲ {row.name}", "bold") if row.called else (row.name, "normal")
        axes.text(side.name_mm[row.name], row.height_mm, name, ha="right", va="center", size=9, color="white",
                  weight=weight, path_effects=style.OUTLINED)  # fmt: skip
    end = min(wide[1], extent[1])
    span = wide[1] - wide[0]
    inch = span / (axes.get_position().width * _WIDTH)
    free = -np.inf  # below the last name: two ticks may be closer than their names are high
    for name, at in sorted(side.ticks_mm.items(), key=lambda each: each[1]):
        axes.plot([end - 0.3 * inch, end], [at, at], color="white", linewidth=1.6, path_effects=style.CASED)
        free = max(at, free + 0.13 * inch)
        axes.text(end - 0.35 * inch, free, name, color="white", size=_SMALL, ha="right", va="center",
                  path_effects=style.OUTLINED)  # fmt: skip
    for left, top, width, tall_mm in side.lesions_mm:
        axes.add_patch(Rectangle((left, top), width, tall_mm, fill=False, edgecolor="white", linewidth=1.2,
                                 gid="truth", path_effects=style.CASED))  # fmt: skip
    ends, floor = (max(wide[0], extent[0]), end), min(tall[1], extent[2])
    below = [(x - wide[0]) / span for x in ends], (tall[1] - floor) / (tall[1] - tall[0])
    style.mark_ends(axes, "A", "P", *below)
    right, base = end - 0.3 * inch, floor - 0.14 * inch
    axes.plot([right - _BAR_MM, right], [base, base], color="white", linewidth=2.5, path_effects=style.CASED,
              solid_capstyle="butt")  # fmt: skip
    axes.text(right - _BAR_MM / 2, base - 0.05 * inch, "5 cm", color="white", size=_SMALL, ha="center",
              va="bottom", path_effects=style.OUTLINED)  # fmt: skip
    for row in page.rows:
        if row.probability is None:
            axes.text(sum(wide) / 2, row.height_mm, f"{row.name}: {row.absent}", ha="center", va="center",
                      size=_TEXT, bbox=style.UNDER)  # fmt: skip
    key = "▲ thick outline: called · thin dashed outline: not called"
    ticks = (
        "\nmark at the right edge: slice of most attention, of each called vertebra" if side.ticks_mm else ""
    )
    axes.annotate(f"{side.note}\n{key}{ticks}", (0, 0), (0, -4), "axes fraction", "offset points",
                  size=_SMALL, va="top")  # fmt: skip


def _draw_dots(axes: Axes, page: Page, tall: Range) -> None:
    axes.set_xscale("function", functions=(_root, np.square))
    axes.set(xlim=(0, 1), ylim=tall[::-1])
    mm = (tall[1] - tall[0]) / (axes.get_position().height * _HEIGHT)  # an inch
    rule = tall[1] - _PATIENT * mm
    patient = tall[1] - 0.36 * mm
    axes.set_xticks(_TICKS, [f"{100 * tick:g}" for tick in _TICKS], size=_SMALL)
    axes.set_xticks([], minor=True)
    axes.set_yticks([])
    axes.set_xlabel(
        "% (wider at the low end) · pale marks: validation vertebrae", size=_SMALL, labelpad=1, x=0.72
    )
    axes.spines["left"].set_visible(False)
    axes.grid(True, axis="x")
    axes.set_axisbelow(True)
    axes.axhline(rule, xmin=-0.35, xmax=1.6, color=INK, linewidth=1.2, clip_on=False)
    for row in page.rows:
        _draw_row(axes, row, row.height_mm, mm)
    _draw_row(axes, page.patient, patient, mm)
    known = {row.threshold for row in page.rows if row.threshold is not None}
    if len(known) == 1:
        _draw_threshold(axes, known.pop(), tall[0], rule, at=tall[0], mm=mm)
    else:
        for row in page.rows:
            if row.threshold is not None:
                _draw_threshold(axes, row.threshold, row.height_mm - 0.16 * mm, row.height_mm + 0.16 * mm)
    if page.patient.threshold is not None:
        _draw_threshold(axes, page.patient.threshold, rule, tall[1], at=rule + 0.14 * mm, mm=mm)
    if any(len(row.intact) + len(row.fractured) for row in page.rows):
        _draw_key(axes)


def _draw_key(axes: Axes) -> None:
    """What the pale marks are."""
    handles = [
        Line2D([], [], color=colour, alpha=0.6, marker="|", ls="", ms=6, label=label)
        for colour, label in ((FRACTURED, "fractured (above the line)"), (INTACT, "intact (below)"))
    ]
    axes.legend(handles=handles, fontsize=_SMALL, loc="upper center", bbox_to_anchor=(0.72, -0.062), ncols=2,
                borderpad=0, handlelength=0.8, columnspacing=0.8, handletextpad=0.2)  # fmt: skip


def _root(values: NDArray) -> NDArray:
    return np.sqrt(np.clip(values, 0, None))


def _draw_threshold(axes: Axes, threshold: float, top: float, bottom: float, *, at: float = 0,
                    mm: float | None = None) -> None:  # fmt: skip
    axes.plot([threshold] * 2, [top, bottom], color=INK, linewidth=1.3, linestyle=(0, (4, 2.5)), zorder=3)
    if mm is not None:
        axes.annotate(f"called from {percent(threshold)}", (threshold, at), (3, -2), size=_SMALL,
                      textcoords="offset points", va="top", bbox=style.UNDER, zorder=4)  # fmt: skip


def _draw_row(axes: Axes, row: Row, at: float, mm: float) -> None:
    left = blended_transform_factory(axes.transAxes, axes.transData)
    weight = "bold" if row.called else "normal"
    words: dict[str, Any] = {"transform": left, "va": "center", "weight": weight}
    axes.text(-0.05, at, row.name, ha="right", size=10, color=FRACTURED if row.called else INK, **words)
    if row.probability is None:
        size = 0.26 * mm
        axes.add_patch(Rectangle((0, at - size / 2), 1, size, facecolor="white", edgecolor=GREY, hatch="////",
                                 linewidth=0.8, zorder=2))  # fmt: skip
        axes.text(0.5, at, row.absent, transform=left, ha="center", va="center", size=_TEXT, weight="bold",
                  bbox=style.UNDER | {"alpha": 1}, zorder=4)  # fmt: skip
        _draw_truth(axes, row, at, left)
        return
    axes.axhline(at, color=GREY, linewidth=0.6, zorder=1)
    for values, colour_of, end in ((row.fractured, FRACTURED, -1), (row.intact, INTACT, 1)):
        axes.vlines(values, at, at + end * 0.13 * mm, color=colour_of, alpha=0.35, linewidth=0.8, zorder=2)
    marker: dict[str, Any] = {"marker": "^", "ms": 11, "mfc": FRACTURED, "mec": "black"}
    if not row.called:
        marker = {"marker": "o", "ms": 8.5, "mfc": "white", "mec": INK, "mew": 1.8}
    axes.plot([row.probability], [at], ls="", clip_on=False, zorder=5, **marker)
    axes.text(1.07, at, row.words, size=_TEXT, **words)
    _draw_truth(axes, row, at + 0.16 * mm, left)


def _draw_truth(axes: Axes, row: Row, at: float, left: Transform) -> None:
    if row.true:
        axes.text(1.07, at, TRUE, transform=left, va="center", size=_TEXT, weight="bold", gid="truth")


def _draw_look(figure: Picture, look: Look, left: float, bottom: float, width: float, height: float) -> None:
    title, caption, gap = 0.22, 0.2, 0.12
    large = height - title - caption - 0.06
    _write(figure, left, bottom + height - 0.1, look.title, size=10, weight="bold", va="center")
    top = bottom + height - title
    first, *others = look.slices
    _draw_axial(_place(figure, left, top - large, large, large), first, size=_SMALL, marks=11)
    rest = left + large + gap
    small, pitch = 0.58 * large, (width - large - gap) / 2
    for number, each in enumerate(others):
        _draw_axial(
            _place(figure, rest + number * pitch, top - small, small, small), each, size=_SMALL, marks=8
        )
    bars = large - small - caption - 0.18
    _draw_attention(_place(figure, rest + 0.24, top - large, width - large - gap - 0.26, bars), look)


def _draw_axial(axes: Axes, its: AxialSlice, *, size: float, marks: float) -> None:
    low, high = BONE_WINDOW_HU
    rows, columns = its.plane.shape
    axes.imshow(its.plane, cmap="gray", vmin=low, vmax=high, aspect=its.aspect, interpolation="bilinear")
    if its.mask.any():
        axes.contour(its.mask.astype(float), levels=[0.5], colors=SKY, linewidths=0.9)
    axes.set(xticks=[], yticks=[], xlim=(-0.5, columns - 0.5), ylim=(rows - 0.5, -0.5))
    axes.spines[:].set_visible(False)
    for x, y, width, height in its.boxes:
        axes.add_patch(Rectangle((x - 0.5, y - 0.5), width, height, fill=False, edgecolor="white",
                                 linewidth=1.3, gid="truth", path_effects=style.CASED))  # fmt: skip
    style.mark_ends(axes, "R", "L", size=marks)
    if its.pixel_mm is not None:
        style.scale_bar(axes, its.pixel_mm, size=min(size, 7))
    axes.annotate(its.caption, (0, 0), (0, -3), "axes fraction", "offset points", size=size, va="top")


def _draw_attention(axes: Axes, look: Look) -> None:
    count = len(look.attention)
    places = np.arange(1, count + 1)
    if look.profile is not None:
        axes.fill_between(np.r_[0.5, places + 0.5], np.r_[look.profile[:1], look.profile], step="pre",
                          color="#BFC3C9", linewidth=0, zorder=1, label="mean of intact")  # fmt: skip
    colours = [INK if place - 1 in look.shown else SKY for place in places]
    axes.bar(places, look.attention, width=0.62, color=colours, zorder=2)
    best = look.shown[0]
    value = look.attention[best]
    said = f"{100 * value:.0f} %"
    if value < 0.75:
        axes.text(best + 1, value + 0.02, said, size=7, ha="center", va="bottom")
    else:  # beside the bar, on the side with more room
        aside = -0.5 if best >= count / 2 else 0.5
        axes.text(best + 1 + aside, 0.98, said, size=7, ha="right" if aside < 0 else "left", va="top")
    for place in look.fractured:
        axes.text(place + 1, -0.02, "◆", ha="center", va="top", size=7, gid="truth")
    axes.set(xlim=(0.4, count + 0.6), ylim=(0, 1))  # of every page: attention sums to 1
    axes.set_yticks([0, 0.5, 1], ["0", "50", "100"], size=7)
    axes.set_xticks([1, count], ["1 (head)", f"{count} (feet)"], size=7)
    axes.tick_params(length=2, pad=7 if look.fractured else 2)
    axes.set_title(
        "attention %, slice by slice; grey: mean of intact vertebrae", size=7, weight="normal", pad=3
    )


def _draw_footer(figure: Picture, page: Page) -> None:
    _rule(figure, _FOOTER)
    widths = (4 * _COLUMN, 5 * _COLUMN, 3 * _COLUMN)  # the care fills most
    left = _EDGE
    for (title, sentences), width in zip(page.footer.items(), widths, strict=True):
        _write(figure, left, _FOOTER - 0.08, title, size=_TEXT + 0.5, weight="bold", va="top")
        _write(figure, left, _FOOTER - 0.27, "\n".join(_wrapped(sentences, width)), size=8, va="top",
               linespacing=1.25)  # fmt: skip
        left += width


_LINES = 7  # of the footer


def _wrapped(sentences: Sequence[str], width: float) -> list[str]:
    """Sentences in lines, as many as fit; the last line counts the others."""
    letters = int(width * 16.5)
    lines: list[str] = []
    for number, sentence in enumerate(sentences):
        its = textwrap.wrap(sentence, letters, initial_indent="• ", subsequent_indent="   ", max_lines=4,
                            placeholder=" …")  # fmt: skip
        if len(lines) + len(its) > _LINES - (number < len(sentences) - 1):
            return [*lines, f"and {len(sentences) - number} more: see the prediction's record"]
        lines += its
    return lines
