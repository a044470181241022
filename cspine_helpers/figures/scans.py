"""Pictures of a whole CT, and the contact sheet that shows whether it was packed well."""

import textwrap
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.gridspec import GridSpec
from matplotlib.patches import Rectangle

from cspine_helpers.ct.volume import Volume, bounding_box
from cspine_helpers.figures import style
from cspine_helpers.figures.montages import draw_slice
from cspine_helpers.figures.style import FRACTURED, GREY, INK, INTACT, PALE, Picture, canvas, in_style
from cspine_helpers.labels import VERTEBRAE
from cspine_helpers.packed import PackedVertebra

BONE_WINDOW_HU = (-300.0, 1200.0)
# Of `study_views`, in inches: the views' height and both widths at most, a slice, its title, gaps, and rows.
_TALL, _BESIDE, _TILE, _CAPTION, _GAP, _ROWS = 6.4, 8.6, 1.4, 0.27, 0.1, 4
_AROUND_TILE_MM = 8.0  # of both sides together


@matplotlib.rc_context(style.STYLE | {"figure.constrained_layout.use": False})  # all places are known
def study_views(
    volume_hu: np.ndarray,
    label_map: np.ndarray,
    spacing_mm: tuple[float, float, float],
    *,
    fracture_map: np.ndarray | None = None,
    title: str = "",
    note: str = "",
) -> Picture:
    """One study from the side and from the front with the vertebrae named, beside axial slices of C1 … C7.

    The front view runs through the bodies and the dens. The axial slice is the one with most broken bone,
    where that is known, else with most of the vertebra; all of them are at one scale.

    Args:
        volume_hu: (Z, Y, X), cranial to caudal, front to back, right to left.
        label_map: same shape; 1–7 mark C1–C7, as many as there are.
        spacing_mm: (z, y, x).
        fracture_map: same shape, above 0 where bone is broken; drawn in colour.
        title: above the picture.
        note: below it, such as that it shows no patient.

    Example:
        >>> block = np.zeros((9, 9, 9), int)
        >>> block[3:6, 3:6, 3:6] = 2
        >>> figure = study_views(400 * block, block, (1.0, 0.5, 0.5))
    """
    broken = np.zeros(volume_hu.shape, bool) if fracture_map is None else fracture_map > 0
    there = [n for n in range(1, 8) if (label_map == n).any()]
    boxes = {n: bounding_box(label_map, n) for n in there}
    middle = round(float(np.mean([np.mean(box[2]) for box in boxes.values()])))
    z, y, x = spacing_mm
    # 1. The frame, in inches: both views at one scale, two columns of axial slices
    tall, deep, wide = (n * mm for n, mm in zip(volume_hu.shape, spacing_mm, strict=True))
    inch = max(tall / _TALL, (deep + wide) / _BESIDE)  # mm
    height, widths = tall / inch, (deep / inch, wide / inch)
    high = max(height, _ROWS * (_TILE + _CAPTION) - _CAPTION)
    above, below = 0.62, 0.32 if note else 0.1
    size = sum(widths) + 2 * _TILE + 3 * _GAP + 0.24, high + above + below
    figure = Picture(figsize=size)
    figure.colours = 256
    figure.text(0.12 / size[0], 1 - 0.08 / size[1], title, size=11, weight="bold", va="top", parse_math=False)
    figure.text(0.12 / size[0], 0.08 / size[1], note, size=8.5, color=GREY)

    def place(left: float, top: float, across: float, down: float) -> Axes:
        return figure.add_axes((left / size[0], 1 - (top + down) / size[1], across / size[0], down / size[1]))

    # 2. From the side and from the front
    through = _body_row(label_map[:, :, middle], there, dens=True)
    cuts: tuple[tuple[str, Any, float, str], ...] = (
        ("From the side", np.s_[:, :, middle], y, "AP"),
        ("From the front, through the bodies", np.s_[np.arange(len(volume_hu)), through, :], x, "RL"),
    )
    left = 0.12
    for (name, cut, mm, ends), across in zip(cuts, widths, strict=True):
        axes = place(left, above, across, height)
        left += across + _GAP
        _draw(axes, volume_hu[cut], broken[cut], z / mm)
        axes.set_title(name, pad=4)
        style.mark_ends(axes, *ends)
        style.scale_bar(axes, mm, 20, 8)
        for n in there:
            rows, columns = np.nonzero(label_map[cut] == n)
            if rows.size:
                axes.text(columns.min() - 3, np.median(rows), VERTEBRAE[n - 1], ha="right", va="center",
                          color="white", size=9, path_effects=style.OUTLINED)  # fmt: skip
    # 3. Axial slices, squares of one width
    side = _AROUND_TILE_MM + max(
        (stop - start) * mm
        for box in boxes.values()
        for (start, stop), mm in zip(box[1:], (y, x), strict=True)
    )
    for number, n in enumerate(there):
        (z0, z1), *across_box = boxes[n]
        here = label_map[z0:z1] == n
        shown = broken[z0:z1] & here if (broken[z0:z1] & here).any() else here
        index = z0 + int(shown.sum((1, 2)).argmax())
        row, column = divmod(number, 2)
        axes = place(left + column * (_TILE + _GAP), above + row * (_TILE + _CAPTION), _TILE, _TILE)
        _draw(axes, volume_hu[index], broken[index] & (label_map[index] == n), y / x)
        y_to, x_to = (
            (sum(ends) / 2 - 0.5 - side / mm / 2, sum(ends) / 2 - 0.5 + side / mm / 2)
            for ends, mm in zip(across_box, (y, x), strict=True)
        )
        axes.set(xlim=x_to, ylim=y_to[::-1])
        style.mark_ends(axes, "R", "L", size=8)
        style.scale_bar(axes, x)
        name, colour = (" fractured", FRACTURED) if broken[label_map == n].any() else ("", INK)
        axes.set_title(VERTEBRAE[n - 1] + name, color=colour, pad=3, size=9.5)
    return figure


def _body_row(sagittal_labels: np.ndarray, there: list[int], *, dens: bool = False) -> np.ndarray:
    """The row (Y) through the bodies in each slice: middles of the front parts, straight lines between.

    With `dens`, C2 counts with its dens and its body, and the arch of C1, in front of the dens, does not.
    """
    middles = []
    for n in there:
        zs, ys = np.nonzero(sagittal_labels == n)
        if not zs.size or (dens and n == 1 and (sagittal_labels == 2).any()):
            continue
        front = ys <= ys.min() + 0.35 * np.ptp(ys)
        parts = [front]
        if dens and n == 2:
            front = ys <= ys.min() + 0.5 * np.ptp(ys)  # of a dens that leans backwards, too
            upper = zs <= zs[front].mean()
            parts = [front & upper, front & ~upper]
        middles += [(zs[part].mean(), ys[part].mean()) for part in parts if part.any()]
    if not middles:
        return np.full(len(sagittal_labels), sagittal_labels.shape[1] // 2)
    slices, rows = np.transpose(sorted(middles))  # by height: label maps may be wrong
    return np.interp(np.arange(len(sagittal_labels)), slices, rows).round().astype(int)


def _draw(axes: Axes, plane_hu: np.ndarray, broken: np.ndarray, aspect: float) -> None:
    low, high = BONE_WINDOW_HU
    axes.imshow(plane_hu, cmap="gray", vmin=low, vmax=high, aspect=aspect, interpolation="bicubic")
    if broken.any():
        axes.contour(broken, levels=[0.5], colors=FRACTURED, linewidths=1.2)
    axes.set(xticks=[], yticks=[], facecolor="black")
    axes.spines[:].set_visible(False)


Range = tuple[float, float]  # half-open, in voxels
# On a dark picture ink is lost and dark blue nearly so: the palette's yellow instead, and a lighter blue.
COLOURS = {**style.VERTEBRA_COLOURS, "C1": "#F0E442", "C5": "#7F9CFF"}
_TINT, _SHADE = np.array([(0, 0, 0), *map(to_rgb, COLOURS.values())], np.float32), 0.3
_AROUND_MM, _LEVEL_MM, _EDGE_MM = 30.0, 18.0, 3.0  # shown around boxes, for a level without one, past an edge
_PIXELS = 512  # of a cut along either axis
_WIDTH, _VIEWS, _LINE = 10.8, 5.9, 0.165  # inches: the sheet, its pictures' height, one line of notes
_LETTERS, _LINES = 155, 10  # that a line of notes holds; that notes may take


@matplotlib.rc_context(style.STYLE | {"figure.constrained_layout.use": False})  # all places are known
def contact_sheet(
    volume: Volume,
    label_map: np.ndarray,
    pieces: Mapping[str, PackedVertebra],
    *,
    title: str = "",
    notes: Sequence[str] = (),
) -> Picture:
    """One study's packing: the boxes on the CT from the side and from the front, and C1 … C7 as packed.

    Both cuts follow the spine and are drawn in mm. Their axes count voxels, voxel i from i to i + 1: a box is
    where its piece's `slice_indices`, `rows` and `columns` say. What is outside the CT is pale.

    Args:
        volume: the CT.
        label_map: (Z, Y, X) on the CT's grid; 1–7 mark C1–C7, which are tinted, packed or not.
        pieces: the packed vertebrae by name; those that are not there are named as missing.
        title: above the picture.
        notes: warnings, printed below; those that do not fit are counted.

    Raises:
        ValueError: label map and CT differ in shape, or a piece is named like no vertebra.

    Example:
        >>> volume = Volume(np.zeros((9, 9, 9), np.int16), (1.0, 1.0, 1.0), np.zeros(3), np.eye(3))
        >>> figure = contact_sheet(volume, np.zeros((9, 9, 9), int), {}, notes=["no vertebra"])
    """
    if label_map.shape != volume.hu.shape:
        raise ValueError(
            f"CT and label map must have one shape; found {volume.hu.shape} and {label_map.shape}. "
            "Resample the label map to the CT first."
        )
    if unknown := [name for name in pieces if name not in VERTEBRAE]:
        raise ValueError(f"Pieces are named {', '.join(VERTEBRAE)}; found {', '.join(map(repr, unknown))}.")
    pieces = {name: pieces[name] for name in VERTEBRAE if name in pieces}
    # 1. The frame: title above, notes below, both in inches
    heading, lines = textwrap.wrap(title, 100, max_lines=2, placeholder=" …"), _lines(notes)
    above, below = 0.12 + 0.2 * len(heading), 0.08 + _LINE * len(lines)
    height = above + _VIEWS + below
    figure = Picture(figsize=(_WIDTH, height))
    write: dict[str, Any] = {"va": "top", "parse_math": False}  # a $ in a file's name is no formula
    figure.text(0.01, 1 - 0.06 / height, "\n".join(heading), size=11, weight="bold", **write)
    figure.text(0.01, (below - 0.04) / height, "\n".join(lines), size=8.5, linespacing=1.25, **write)
    place = {"bottom": below / height, "top": 1 - above / height}
    # 2. The cuts, and the middle slice of each vertebra as packed
    _views(figure, volume, label_map, pieces, place)
    cells = GridSpec(4, 2, figure, left=0.73, right=0.99, wspace=0.03, hspace=0.03, **place)
    for number, name in enumerate(VERTEBRAE):
        axes = figure.add_subplot(cells[number])
        if name in pieces:
            piece = pieces[name]
            pixel_mm = (piece.rows[1] - piece.rows[0]) * volume.spacing_mm[1] / piece.array.shape[1]
            draw_slice(axes, piece.array[len(piece.array) // 2], pixel_mm=pixel_mm)
            axes.set_anchor("N")
            _name(axes, name, 0.04, 0.96, va="top", ha="left", transform=axes.transAxes)
        else:
            axes.set(xticks=[], yticks=[], facecolor=PALE, aspect=1, anchor="N")
            axes.spines[:].set_visible(False)
            missing: dict[str, Any] = {"ha": "center", "va": "center", "color": FRACTURED, "weight": "bold"}
            axes.text(0.5, 0.5, f"{name} missing", **missing)
    # 3. Counts
    axes = figure.add_subplot(cells[len(VERTEBRAE)])
    axes.set_axis_off()
    colour = INK if len(pieces) == len(VERTEBRAE) else FRACTURED
    counts = f"{len(pieces)} of {len(VERTEBRAE)} packed\n{len(notes)} note{'s' * (len(notes) != 1)}"
    axes.text(0.06, 0.96, counts, va="top", weight="bold", color=colour, linespacing=1.4)
    shape = " × ".join(map(str, volume.hu.shape))
    spacing = " × ".join(f"{step:.2f}" for step in volume.spacing_mm)
    about = f"{shape} voxels\n{spacing} mm\n(z × y × x)"
    axes.text(0.06, 0.56, about, va="top", size=7.5, color=GREY, linespacing=1.4)
    return figure


def _views(
    figure: Picture,
    volume: Volume,
    label_map: np.ndarray,
    pieces: Mapping[str, PackedVertebra],
    place: Mapping[str, float],
) -> None:
    """The cuts from the side and from the front, beside each other, at one scale."""
    z, y, x = volume.spacing_mm
    depth, (_, rows, columns) = np.arange(len(label_map)), label_map.shape
    across = np.full(len(depth), columns // 2)
    if pieces:
        middles = sorted((p.slice_indices.mean(), (sum(p.columns) - 1) / 2) for p in pieces.values())
        across = np.interp(depth, *np.transpose(middles)).round().astype(int).clip(0, columns - 1)
    side = np.s_[depth, :, across]
    there = [n for n in range(1, len(VERTEBRAE) + 1) if (label_map[side] == n).any()]
    along = _body_row(label_map[side], there) if there else np.full(len(depth), rows // 2)
    front = np.s_[depth, along, :]

    spans = {n: (int(p.slice_indices.min()), int(p.slice_indices.max()) + 1) for n, p in pieces.items()}
    numbers = [VERTEBRAE.index(name) for name in pieces] or [0]
    unseen = (_LEVEL_MM * numbers[0], _LEVEL_MM * (len(VERTEBRAE) - 1 - numbers[-1]))
    tall = _field(spans.values(), len(depth), z, *unseen)
    cuts: list[tuple[Any, str, dict[str, tuple[int, int]], int, float]] = [
        (side, "AP", {n: p.rows for n, p in pieces.items()}, rows, y),
        (front, "RL", {n: p.columns for n, p in pieces.items()}, columns, x),
    ]
    fields = [_field(boxes.values(), count, step) for _, _, boxes, count, step in cuts]
    widths = [(stop - start) * cut[-1] for (start, stop), cut in zip(fields, cuts, strict=True)]
    grid = GridSpec(1, 2, figure, left=0.01, right=0.72, wspace=0.03, width_ratios=widths, **place)
    for number, (field, (cut, ends, boxes, _, step)) in enumerate(zip(fields, cuts, strict=True)):
        axes = figure.add_subplot(grid[number])
        _draw_sheets(axes, volume.hu[cut], label_map[cut], ends, tall, field)
        axes.set(xlim=field, ylim=tall[::-1], aspect=z / step, anchor="N")
        axes.set(xticks=[], yticks=[], facecolor=PALE)
        axes.spines[:].set_visible(False)
        for name, (start, stop) in boxes.items():
            first, last = spans[name]
            axes.add_patch(Rectangle((start, first), stop - start, last - first, fill=False,
                                     edgecolor=COLOURS[name], linewidth=1.4))  # fmt: skip
            _name(axes, name, start, (first + last) / 2, va="center", ha="center")


def _field(
    boxes: Collection[Range], count: int, step: float, before_mm: float = 0, after_mm: float = 0
) -> Range:
    """What is shown along one axis: boxes and what is around them, past the CT's edge where boxes are."""
    low, high = min((b[0] for b in boxes), default=0), max((b[1] for b in boxes), default=count)
    edge = _EDGE_MM / step
    start = max(low - (_AROUND_MM + before_mm) / step, min(low, 0) - edge)
    return start, min(high + (_AROUND_MM + after_mm) / step, max(high, count) + edge)


def _draw_sheets(
    axes: Axes, plane_hu: np.ndarray, labels: np.ndarray, ends: str, tall: Range, wide: Range
) -> None:
    """The part of a cut that is shown, in the bone window, vertebrae tinted; large cuts are thinned out."""
    parts, edges = [], []
    for (start, stop), count in zip((tall, wide), plane_hu.shape, strict=True):
        first, last = max(int(start), 0), min(int(stop) + 1, count)
        part = range(first, last, -(-(last - first) // _PIXELS))
        parts.append(slice(part.start, part.stop, part.step))
        edges.append((first, first + len(part) * part.step))
    plane, labels = plane_hu[tuple(parts)].astype(np.float32), labels[tuple(parts)]
    low, high = BONE_WINDOW_HU
    picture = np.repeat(((plane - low) / (high - low)).clip(0, 1)[..., None], 3, axis=-1)
    tinted = (labels > 0) & (labels < len(_TINT))
    picture[tinted] = (1 - _SHADE) * picture[tinted] + _SHADE * _TINT[labels[tinted]]
    (top, bottom), sides = edges
    axes.imshow(picture, extent=(*sides, bottom, top), interpolation="auto")
    for end, at, inwards in zip(ends, (max(sides[0], wide[0]), min(sides[1], wide[1])), (4, -4), strict=True):
        axes.annotate(end, (at, min(bottom, tall[1])), (inwards, 4), textcoords="offset points",
                      ha="left" if inwards > 0 else "right", color="white", size=9)  # fmt: skip


def _name(axes: Axes, name: str, x: float, y: float, **options: Any) -> None:
    tag = {"facecolor": COLOURS[name], "edgecolor": "none", "boxstyle": "square,pad=0.15"}
    axes.text(x, y, name, color=INK, size=8, weight="bold", bbox=tag, **options)


def _lines(notes: Sequence[str]) -> list[str]:
    """The notes wrapped, as many as fit; the last line counts the others."""
    lines: list[str] = []
    for number, note in enumerate(notes):
        wrapped = textwrap.wrap(
            note, _LETTERS, initial_indent="• ", subsequent_indent="   ", max_lines=3, placeholder=" …"
        )
        room = _LINES - (number < len(notes) - 1)  # the line that counts the others
        if len(lines) + len(wrapped) > room:
            return [*lines, f"and {len(notes) - number} more"]
        lines += wrapped
    return lines


@in_style
def heights(manifest: pd.DataFrame, slices: int, *, title: str = "") -> Picture:
    """How high each vertebra's mask is, and how many native slices that is, from C1 to C7.

    Vertebrae that are truncated by the field of view are hollow. Those with fewer than T = `slices` native
    slices show some of them twice, those with more leave some out.

    Example:
        >>> row = {"z_first_mm": 0.0, "z_last_mm": 12.0, "spacing_z_mm": 1.0, "completeness": 1.0}
        >>> figure = heights(pd.DataFrame([row | {"vertebra": "C2"}]), slices=15)
    """
    figure, (left, right) = canvas(9, 3.8, 1, 2)
    height_mm = manifest["z_last_mm"] - manifest["z_first_mm"] + manifest["spacing_z_mm"]
    each = manifest.groupby("vertebra")["vertebra"]
    places = manifest["vertebra"].map({level: float(n) for n, level in enumerate(VERTEBRAE)})
    places += 0.6 * ((each.cumcount() + 0.5) / each.transform("count") - 0.5)  # side by side
    whole = (manifest["completeness"] == 1).to_numpy()
    for axes, values in ((left, height_mm), (right, height_mm / manifest["spacing_z_mm"])):
        for some, fill, name in (
            (whole, INTACT, "whole"),
            (~whole, "none", "truncated by the field of view"),
        ):
            if some.any():
                axes.plot(places[some], values[some], "o", mec=INTACT, mfc=fill, alpha=0.7, label=name)
        axes.set_xticks(range(len(VERTEBRAE)), VERTEBRAE)
        axes.set_ylim(0)
    left.set(ylabel="mm", title="Height of the mask")
    right.set(ylabel="slices", title="Native slices")
    style.reference(right, slices, "y", label=f"T = {slices} positions")
    right.legend(loc="lower right")
    figure.head(title)
    return figure
