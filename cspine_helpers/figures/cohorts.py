"""Pictures of labels and splits: prevalence, imbalance, co-occurrence, leakage."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch
from matplotlib.ticker import PercentFormatter

from cspine_helpers.figures import style
from cspine_helpers.figures.style import FRACTURED, GREY, INK, INTACT, Picture, canvas, in_style
from cspine_helpers.labels import PATIENT, SPLITS, TARGETS, UID, VERTEBRAE


@in_style
def prevalence_bars(
    prevalence: pd.DataFrame, *, published: dict[str, float] | None = None, title: str = ""
) -> Picture:
    """Bars of `labels.prevalence` with their intervals; `published` shares (0 … 1) as hollow diamonds.

    Example:
        >>> from cspine_helpers.labels import prevalence
        >>> figure = prevalence_bars(prevalence(labels))
    """
    figure, axes = canvas(8, 4.2)
    rows = range(len(TARGETS))
    p, low, high = prevalence[["prevalence", "low", "high"]].to_numpy().T
    axes.barh(rows, p, color=[GREY] + [INTACT] * len(VERTEBRAE), height=0.66)
    axes.errorbar(p, rows, xerr=[p - low, high - p], fmt="none", ecolor=INK, elinewidth=1.4, capsize=3)
    right = high
    if published:
        known = np.array([published[target] for target in TARGETS])
        axes.plot(known, rows, "D", mfc="white", mec=FRACTURED, mew=1.5, ms=6, label="published")
        axes.legend(loc="lower right")
        right = np.maximum(high, known)
    for row, positives in enumerate(prevalence["positives"]):
        axes.text(right[row] + 0.012, row, f"{p[row]:.1%}  ({positives:,})", va="center")
    axes.set(title=title, xlim=(0, right.max() * 1.25))
    _targets_from_top(axes)
    return figure


def _targets_from_top(axes: Axes) -> None:
    axes.set_yticks(range(len(TARGETS)), ["any, per patient", *VERTEBRAE])
    axes.set_xlabel("studies with a fracture (whiskers: 95% Wilson interval)")
    axes.invert_yaxis()
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))


@in_style
def imbalance_bars(table: pd.DataFrame, samples: pd.DataFrame, *, title: str = "") -> Picture:
    """Fractured against intact, as shares: patients of the label table above, expanded vertebrae below.

    Example:
        >>> from cspine_helpers.labels import expand
        >>> figure = imbalance_bars(labels, expand(labels, labels[UID]))
    """
    figure, axes = canvas(8, 2.6)
    for row, (name, labels) in enumerate((("patients", table[PATIENT]), ("vertebrae", samples["label"]))):
        positives, total = int(labels.sum()), len(labels)
        share = positives / total
        axes.barh(row, share, color=FRACTURED, height=0.62)
        axes.barh(row, 1 - share, left=share, color=INTACT, height=0.62)
        axes.text(share / 2, row, f"{share:.0%}", ha="center", va="center", color="white", weight="bold")
        ratio = (total - positives) / max(positives, 1)
        intact = f"{total - positives:,} intact: {ratio:.1f} for each fractured"
        axes.text(share + 0.02, row, intact, va="center", color="white")
        axes.text(0, row - 0.34, f"{positives:,} fractured {name}", color=FRACTURED, va="bottom")
        axes.text(1, row - 0.34, f"{total:,} {name}", ha="right", va="bottom")
    axes.set(title=title, xlim=(0, 1), ylim=(1.35, -0.6), yticks=[], xticks=[])
    axes.spines[:].set_visible(False)
    return figure


@in_style
def cooccurrence_heatmap(counts: pd.DataFrame, studies: int, *, title: str = "") -> Picture:
    """How often two vertebrae are fractured together: observed over expected if they broke independently.

    Args:
        counts: of `labels.cooccurrence`.
        studies: of how many studies.
        title: above it.

    Example:
        >>> from cspine_helpers.labels import cooccurrence
        >>> figure = cooccurrence_heatmap(cooccurrence(labels), len(labels))
    """
    import seaborn  # here alone, so that a second of importing is spent only where it is drawn

    figure, axes = canvas(6.6, 5.6)
    values, alone = counts.to_numpy(), np.diag(counts.to_numpy())
    expected = np.outer(alone, alone) / max(studies, 1)
    ratio = np.divide(values, expected, out=np.full(values.shape, np.nan), where=expected > 0)
    once = np.triu(np.ones(values.shape, dtype=bool))  # the other half would say the same
    written = np.array(
        [
            [f"× {r:.1f}\n{n:,}" if np.isfinite(r) else "–" for r, n in zip(*row, strict=True)]
            for row in zip(ratio, values, strict=True)
        ]
    )
    doubled = np.log2((values + 1) / (expected + 1))  # one patient more or less does not make a cell dark
    shades = {"cmap": "PuOr_r", "vmin": -3, "vmax": 3, "cbar": False}
    seaborn.heatmap(doubled, mask=once, annot=written, fmt="", square=True, ax=axes, **shades)
    for i, n in enumerate(np.diag(values)):
        axes.text(i + 0.5, i + 0.5, f"{n:,}", ha="center", va="center", color=GREY, fontsize=9)
    axes.set_xticklabels(counts.columns)
    axes.set_yticklabels([f"{name} fractured" for name in counts.index], rotation=0)
    axes.tick_params(length=0, labeltop=True, labelbottom=False)
    axes.spines[:].set_visible(False)
    axes.set(
        title=title, xlabel="patients with both: times as many as if independent, number (grey: all of one)"
    )
    return figure


@in_style
def fractures_per_patient(table: pd.DataFrame, *, title: str = "") -> Picture:
    """How many patients have 0, 1 … 7 fractured vertebrae.

    Example:
        >>> figure = fractures_per_patient(labels)
    """
    figure, axes = canvas(8, 3.6)
    counts = np.bincount(table[list(VERTEBRAE)].sum(axis=1), minlength=len(VERTEBRAE) + 1)
    axes.bar(range(len(counts)), counts, color=[INTACT] + [FRACTURED] * len(VERTEBRAE), width=0.72)
    for number, count in enumerate(counts.tolist()):
        text = f"{count:,}\n{count / len(table):.1%}" if count else "0"
        axes.text(number, count, text, ha="center", va="bottom", fontsize=9)
    axes.set(title=title, xlabel="fractured vertebrae", ylabel="patients", ylim=(0, counts.max() * 1.2))
    axes.set_xticks(range(len(counts)))
    axes.yaxis.set_major_formatter("{x:,.0f}")
    return figure


@in_style
def split_comparison(by_split: pd.DataFrame, *, title: str = "") -> Picture:
    """Prevalence of every target in each split with 95 % intervals, from `splits.split_prevalence`.

    Example:
        >>> from cspine_helpers.splits import split_patients, split_prevalence
        >>> figure = split_comparison(split_prevalence(labels, split_patients(labels)))
    """
    figure, axes = canvas(8, 4.6)
    for place, name in enumerate(SPLITS):
        part = by_split[by_split["split"] == name]
        rows = np.arange(len(TARGETS)) + (place - 1) * 0.24
        p, low, high = part[["prevalence", "low", "high"]].to_numpy().T
        label = f"{name}, {part['total'].iloc[0]:,} patients"
        axes.errorbar(
            p, rows, xerr=[p - low, high - p], fmt="o", color=style.SPLIT_COLOURS[name], ms=5.5, label=label
        )
    for row in range(1, len(TARGETS)):
        axes.axhline(row - 0.5, color=style.PALE, linewidth=0.8, zorder=0)
    axes.set(title=title, xlim=(0, None))
    _targets_from_top(axes)
    axes.legend(loc="lower right", labelcolor="linecolor")
    return figure


@in_style
def leak_picture(rows_split: pd.DataFrame, patients_split: pd.DataFrame, *, patients: int = 16) -> Picture:
    """Which split each vertebra of the first patients is in, split by rows and split by patients.

    Both tables are samples (StudyInstanceUID, vertebra) with a column `split`.

    Example:
        >>> figure = leak_picture(predictions, predictions, patients=4)
    """
    figure, (left, right) = canvas(8, 5, 1, 2)
    _split_grid(left, rows_split, patients, "Expand first, then split")
    _split_grid(right, patients_split, patients, "Split patients, then expand")
    left.set_ylabel("the first patients")
    handles = [Patch(color=colour, label=name) for name, colour in style.SPLIT_COLOURS.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=3)
    return figure


def _split_grid(axes: Axes, samples: pd.DataFrame, patients: int, title: str) -> None:
    places = samples.groupby(UID, sort=False)["split"].nunique()
    leaking = int((places > 1).sum())
    grid = samples.assign(code=samples["split"].map(SPLITS.index)).pivot_table("code", UID, "vertebra")
    cells = grid.loc[places.index[:patients], list(VERTEBRAE)].to_numpy()
    colours = ListedColormap(list(style.SPLIT_COLOURS.values()))
    axes.pcolormesh(cells, cmap=colours, vmin=0, vmax=2, edgecolors="white", linewidth=2)
    axes.set_title(f"{title}\n{leaking:,} of {len(places):,} patients in several splits")
    axes.set_xticks(np.arange(len(VERTEBRAE)) + 0.5, VERTEBRAE)
    axes.set_yticks([])
    axes.invert_yaxis()
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
