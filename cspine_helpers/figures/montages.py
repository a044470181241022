"""Pictures of sequences: slices with the mask outlined, and the attention beside them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.gridspec import GridSpec
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike

from cspine_helpers.figures import style
from cspine_helpers.figures.style import FRACTURED, GREY, INK, INTACT, Picture, canvas, in_style
from cspine_helpers.files.paths import listing
from cspine_helpers.labels import VERTEBRAE
from cspine_helpers.packed import MASK

CENTRAL = MASK // 2  # the middle of the five neighbouring slices
OUTLINE = style.SKY  # of masks
_DASHED = (0, (2, 1))


@in_style
def sequence_montage(
    array: np.ndarray,
    *,
    title: str = "",
    truth: ArrayLike | None = None,
    fracture: np.ndarray | None = None,
    neighbours: np.ndarray | None = None,
    boxes: pd.DataFrame | None = None,
    pixel_mm: float | None = None,
    note: str = "",
) -> Picture:
    """All slices of one packed sequence (T, H, W, 6), cranial first, the mask outlined.

    Args:
        array: the sequence.
        title: above the picture.
        truth: (T,); where it is 1, the slice shows the fracture and is framed; None or NaN where unknown.
        fracture: (T, H, W), above 0 where the vertebra's bone is broken; outlined.
        neighbours: the same of other vertebrae that the crop shows; outlined with dashes.
        boxes: around the fracture, `packing.read_packed_boxes` of this vertebra.
        pixel_mm: side of a pixel, as in the manifest; with it each slice has a scale bar.
        note: a few words below the picture, such as that it shows no patient.

    Raises:
        ValueError: truth, fracture or neighbours are of another shape than the sequence, or a box is on a
            slice that it does not have.

    Example:
        >>> box = pd.DataFrame([(1, 8.0, 9.0, 6.0, 5.0)], columns=["slice", "x", "y", "width", "height"])
        >>> figure = sequence_montage(np.zeros((3, 32, 32, 6), np.uint8), truth=[0, 1, 0], boxes=box)
    """
    marks, columns = _marks(truth, len(array)), min(5, len(array))
    pointed = _Pointed.checked(array, fracture, neighbours, boxes)
    rows = -(-len(array) // columns)
    figure = _tight(1.6 * columns, 1.6 * rows + 0.6)
    grid = GridSpec(rows, columns, figure)
    for number, picture in enumerate(array):
        axes = figure.add_subplot(grid[number])
        draw_slice(axes, picture, fractured=marks[number] == 1, number=number, pixel_mm=pixel_mm)
        pointed.draw(axes, number)
    _legend(figure, marks, *pointed.handles(), note=note)
    figure.head(title)
    return figure


@in_style
def vertebra_row(
    arrays: Mapping[str, np.ndarray],
    *,
    slices: Mapping[str, int] | None = None,
    pixel_mm: Mapping[str, float] | None = None,
    title: str = "",
    note: str = "",
) -> Picture:
    """One slice of each packed sequence (T, H, W, 6), side by side, by name such as C1 … C7.

    `slices` says which, by name; where it does not, the slice in which the vertebra is largest.
    `pixel_mm`, the side of a pixel by name, gives scale bars; `note` is a few words below the picture.

    Raises:
        ValueError: `slices` names a sequence or a slice that does not exist; names each.

    Example:
        >>> figure = vertebra_row({"C1": np.zeros((5, 32, 32, 6), np.uint8)}, slices={"C1": 2})
    """
    slices, pixel_mm = slices or {}, pixel_mm or {}
    wrong = [f"{name}: {at}" for name, at in slices.items() if not 0 <= at < len(arrays.get(name, ()))]
    if wrong:
        known = ", ".join(f"{name}: {len(array)}" for name, array in arrays.items())
        raise ValueError(f"No such slice: {', '.join(wrong)}. Slices are counted from 0; there are {known}.")
    figure = _tight(1.42 * len(arrays), 1.67 + 0.3 * bool(title) + 0.2 * bool(note))
    grid = figure.subplots(1, len(arrays), squeeze=False)
    for axes, (name, array) in zip(grid.flat, arrays.items(), strict=True):
        largest = int(np.argmax((array[..., MASK] > 127).sum((1, 2))))
        draw_slice(axes, array[slices.get(name, largest)], pixel_mm=pixel_mm.get(name))
        axes.set_title(name, loc="center", pad=4)
    if note:
        figure.supxlabel(note, x=0.008, ha="left", fontsize=8, color=GREY)
    figure.head(title)
    return figure


@in_style
def attention_montage(
    array: np.ndarray,
    attention: ArrayLike,
    *,
    truth: ArrayLike | None = None,
    fracture: np.ndarray | None = None,
    neighbours: np.ndarray | None = None,
    boxes: pd.DataFrame | None = None,
    pixel_mm: float | None = None,
    title: str = "",
    note: str = "",
) -> Picture:
    """All slices of one packed sequence (T, H, W, 6), cranial first, each beside a bar of its attention (T,).

    A bar as high as its slice is all the attention, in every picture. The other arguments as in
    `sequence_montage`; bars of fractured slices have their colour.

    Raises:
        ValueError: attention is of another length than the sequence; as in `sequence_montage`.

    Example:
        >>> figure = attention_montage(np.zeros((4, 32, 32, 6), np.uint8), [0.1, 0.6, 0.2, 0.1])
    """
    weights, marks = np.asarray(attention, dtype=float), _marks(truth, len(array))
    if weights.shape != (len(array),):
        raise ValueError(f"Attention has one weight a slice, ({len(array)},); found {weights.shape}.")
    pointed = _Pointed.checked(array, fracture, neighbours, boxes)
    columns = min(5, len(array))
    rows = -(-len(array) // columns)
    figure = _tight(1.95 * columns, 1.62 * rows + 0.85)
    grid = GridSpec(rows, 2 * columns, figure, width_ratios=[1, 0.2] * columns)
    for number in range(len(array)):
        (row, column), fractured = divmod(number, columns), marks[number] == 1
        axes = figure.add_subplot(grid[row, 2 * column])
        draw_slice(axes, array[number], fractured=fractured, number=number, pixel_mm=pixel_mm)
        pointed.draw(axes, number)
        bars = figure.add_subplot(grid[row, 2 * column + 1])
        bars.bar(0, weights[number], width=0.9, color=FRACTURED if fractured else INTACT)
        style.reference(bars, 1 / len(array), "y")
        bars.set(xlim=(-0.6, 0.6), ylim=(0, 1), xticks=[], yticks=[], facecolor=style.PALE)
        bars.set_box_aspect(5)  # as high as its slice
        bars.spines[:].set_visible(False)
        top = max(weights[number], 1 / len(array)) if weights[number] < 0.85 else 0.0
        bars.text(0, top + 0.03, f"{weights[number]:.0%}", ha="center", va="bottom", size=8,
                  color=INK if top else "white")  # fmt: skip
    handles: list[Patch | Line2D] = [Patch(color=INTACT, label="attention, from 0 to 100% (full height)")]
    if (marks == 1).any():
        handles.append(Patch(color=FRACTURED, label="attention, fractured slice"))
    uniform = Line2D([], [], color=INK, linewidth=1, linestyle="--", label=f"uniform, 1/{len(array)}")
    _legend(figure, marks, *pointed.handles(), *handles, uniform, note=note)
    figure.head(title)
    return figure


@in_style
def attention_by_level(table: pd.DataFrame, *, title: str = "") -> Picture:
    """Mean attention along each vertebra, fractured against intact, of `explain.attention_table`.

    Where the truth is known, the shade says how often a slice of a fractured vertebra shows the fracture.

    Example:
        >>> one = {"slice": [0, 1], "attention": [0.4, 0.6], "fractured": [0, 1]}
        >>> figure = attention_by_level(pd.DataFrame(one).assign(vertebra="C1", label=1))
    """
    figure, grid = canvas(10, 4.8, 2, 4, sharex=True, sharey=True)
    names = {1: ("fractured", FRACTURED), 0: ("intact", INTACT)}
    for axes, vertebra in zip(grid.flat, VERTEBRAE, strict=False):
        rows = table[table["vertebra"] == vertebra]
        counts = rows[rows["slice"] == 0]["label"].value_counts()
        truth = rows[rows["label"] == 1].groupby("slice")["fractured"].mean()
        if truth.notna().any():
            axes.fill_between(truth.index, truth / max(truth.sum(), 1e-9), color=style.PALE, step="mid")
        for label, (_, colour) in names.items():
            mean = rows[rows["label"] == label].groupby("slice")["attention"].mean()
            few = counts.get(label, 0) < style.FEW_FRACTURES  # no firm line rests on them
            axes.plot(
                mean.index, mean, color=colour, linewidth=1.2 if few else 2, linestyle=":" if few else "-"
            )
        style.reference(axes, 1 / (table["slice"].max() + 1), "y")
        axes.set_title(vertebra, pad=4)
        axes.text(1, 1, f"{counts.get(1, 0)} fractured, {counts.get(0, 0)} intact", transform=axes.transAxes,
                  ha="right", va="bottom", size=8, color=GREY)  # fmt: skip
    grid[0, 0].set_ylim(0)
    for axes in (*grid[1, :3], grid[0, 3]):
        axes.set_xlabel("slice, cranial → caudal")
    grid[0, 3].tick_params(labelbottom=True)
    for axes in grid[:, 0]:
        axes.set_ylabel("mean attention")
    handles: list = [Line2D([], [], color=colour, label=name) for name, colour in names.values()]
    handles.append(
        Line2D([], [], color=FRACTURED, lw=1.2, ls=":", label=f"of fewer than {style.FEW_FRACTURES}")
    )
    handles.append(Line2D([], [], color=INK, linewidth=1, linestyle="--", label="uniform"))
    if table["fractured"].notna().any():
        handles.append(Patch(color=style.PALE, label="where the fractures are"))
    grid[1, 3].set_axis_off()
    grid[1, 3].legend(handles=handles, loc="center")
    figure.head(title)
    return figure


@in_style
def attention_vs_truth(scores: pd.DataFrame, *, title: str = "") -> Picture:
    """How well attention ranks fractured slices, by vertebra, against uniform: `explain.sequence_scores`.

    Raises:
        ValueError: there are no scores, because no truth is known.

    Example:
        >>> scores = {"auroc": [0.9], "share": [0.5], "uniform_share": [0.2], "top1": [1.0]}
        >>> figure = attention_vs_truth(pd.DataFrame(scores))
    """
    if scores.empty:
        raise ValueError("There are no scores to draw: no sequence's fractured slices are known.")
    figure, (left, right) = canvas(9, 4.2, 1, 2)
    mean = scores["auroc"].mean()
    left.hist(scores["auroc"], bins=np.linspace(0, 1, 21).tolist(), color=INTACT, edgecolor="white")
    style.reference(left, 0.5, "x", label="uniform, 0.50")
    left.axvline(mean, color=FRACTURED, label=f"mean, {mean:.2f}")
    left.set(xlabel="AUROC of attention against fractured slices", ylabel="fractured vertebrae", xlim=(0, 1))
    left.set_title("Ranks fractured slices higher?")
    left.yaxis.set_major_locator(MaxNLocator(integer=True))
    left.legend()
    right.plot([0, 1], [0, 1], color=INK, linewidth=1, linestyle="--", label="uniform")
    for hit, colour, name in ((1, FRACTURED, "fractured"), (0, INTACT, "not fractured")):
        some = scores[scores["top1"] == hit]
        right.plot(some["uniform_share"], some["share"], "o", color=colour, alpha=0.6, mec="none",
                   label=f"top slice {name} ({len(some)})")  # fmt: skip
    right.set(xlabel="share of slices that are fractured", ylabel="share of attention on them")
    right.set(xlim=(0, 1), ylim=(0, 1.02), title="Rests on fractured slices?")
    right.legend(loc="lower right")
    figure.head(title)
    return figure


def _tight(width: float, height: float) -> Picture:
    layout = ConstrainedLayoutEngine(w_pad=0.03, h_pad=0.03, wspace=0, hspace=0)  # pads in inches
    return Picture(figsize=(width, height), layout=layout)


def _marks(truth: ArrayLike | None, slices: int) -> np.ndarray:
    marks = np.full(slices, np.nan) if truth is None else np.asarray(truth, dtype=float)
    if marks.shape != (slices,):
        raise ValueError(f"Truth has one value a slice, ({slices},); found {marks.shape}.")
    return marks


@dataclass(frozen=True, eq=False)
class _Pointed:
    """What points at broken bone in a sequence; fields as in `sequence_montage`."""

    fracture: np.ndarray | None
    neighbours: np.ndarray | None
    boxes: pd.DataFrame | None

    @classmethod
    def checked(
        cls,
        array: np.ndarray,
        fracture: np.ndarray | None,
        neighbours: np.ndarray | None,
        boxes: pd.DataFrame | None,
    ) -> "_Pointed":
        """The marks, of the sequence's shape.

        Raises:
            ValueError: they are not.
        """
        for name, voxels in (("The fracture", fracture), ("The neighbours' fractures", neighbours)):
            if voxels is not None and np.shape(voxels) != array.shape[:3]:
                raise ValueError(
                    f"{name} is marked in every pixel of the sequence, {array.shape[:3]}; found "
                    f"{np.shape(voxels)}. Give the marks of this very sequence."
                )
        if boxes is not None and not boxes["slice"].between(0, len(array) - 1).all():
            wrong = boxes.loc[~boxes["slice"].between(0, len(array) - 1), "slice"].tolist()
            raise ValueError(
                f"Boxes are on slices 0 to {len(array) - 1} of the sequence; found {listing(wrong)}. "
                "Give the boxes of this very vertebra."
            )
        return cls(fracture, neighbours, boxes)

    def draw(self, axes: Axes, number: int) -> None:
        """The marks of one slice."""
        for voxels, line in ((self.fracture, "solid"), (self.neighbours, _DASHED)):
            if voxels is not None and voxels[number].any():
                outline = axes.contour(np.asarray(voxels[number], float), levels=[0.5], colors=FRACTURED,
                                       linewidths=1.4, linestyles=[line])  # fmt: skip
                outline.set_gid("own" if voxels is self.fracture else "neighbour")
        if self.boxes is not None:
            its = self.boxes[self.boxes["slice"] == number]
            for x, y, width, height in its[["x", "y", "width", "height"]].to_numpy(float):
                axes.add_patch(Rectangle((x - 0.5, y - 0.5), width, height, fill=False, edgecolor=FRACTURED,
                                         linewidth=1.4))  # fmt: skip

    def handles(self) -> list[Line2D]:
        """What the legend says of them; only of what is drawn."""
        named: tuple[tuple[np.ndarray | None, Any, str], ...] = (
            (self.fracture, "solid", "fracture"),
            (self.neighbours, _DASHED, "fracture of another vertebra"),
        )
        found = [
            Line2D([], [], color=FRACTURED, linewidth=1.4, linestyle=line, label=name)
            for voxels, line, name in named
            if voxels is not None and voxels.any()
        ]
        if self.boxes is not None and len(self.boxes):
            square = Line2D([], [], marker="s", mfc="none", mec=FRACTURED, mew=1.4, ms=7, linestyle="none")
            square.set_label("box around the fracture")
            found.append(square)
        return found


def draw_slice(
    axes: Axes,
    picture: np.ndarray,
    *,
    fractured: bool = False,
    number: int | None = None,
    pixel_mm: float | None = None,
) -> None:
    """The central channel of one slice `(H, W, 6)`, the mask's outline, a frame where fractured.

    Packed slices are in canonical orientation, the patient's right on the left: where they say so, there is
    a scale bar, too.
    """
    axes.imshow(picture[..., CENTRAL], cmap="gray", vmin=0, vmax=255, interpolation="bicubic")
    mask = picture[..., MASK] > 127
    if mask.any():
        axes.contour(mask.astype(float), levels=[0.5], colors=OUTLINE, linewidths=0.8)
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set(visible=bool(fractured), color=FRACTURED, linewidth=3)
    if number is not None:
        axes.text(0.04, 0.95, str(number), transform=axes.transAxes, va="top", color="white", size=8)
    if pixel_mm is not None:
        style.mark_ends(axes, "R", "L", size=8)
        style.scale_bar(axes, pixel_mm)


def _legend(figure: Picture, marks: np.ndarray, *handles: Patch | Line2D, note: str = "") -> None:
    first: list = [Line2D([], [], color=OUTLINE, linewidth=1, label="mask")]
    if np.isfinite(marks).any():
        first.append(Patch(facecolor="none", edgecolor=FRACTURED, linewidth=2, label="fractured slice"))
    both = [*first, *handles]
    figure.legend(handles=both, loc="outside lower right", ncols=5 if len(both) < 6 else 4, fontsize=8)
    figure.text(0.008, 0.012, note, fontsize=8, color=GREY)  # in the legend's strip, at its left
