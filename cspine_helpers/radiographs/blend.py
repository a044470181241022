"""How class and mask, and several runs, become one answer: chosen on validation, judged out of fold, frozen.

A network says whether there is a fracture (class) and where (mask). An image's probability is a share of
each, its mask what reaches a threshold. `search_blend` chooses both on the validation split, once on all of
it, and once for each part of its groups on the others, which is how well the choice does on images that did
not make it. `freeze_blend` writes `blend.json` into the run's folder, held to the members and their outputs
by hashes.

Shapes: n images, M members, h × w cells of the mask, H × W pixels of the network's frame.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from cspine_helpers import __version__
from cspine_helpers.decisions.test_split import now_utc
from cspine_helpers.decisions.thresholds import Decision, Rule, choose_threshold
from cspine_helpers.files.paths import listing
from cspine_helpers.files.records import (
    Check,
    check_settings,
    config_of,
    differences,
    read_sealed,
    setting,
    whole,
    within,
    write_sealed,
)
from cspine_helpers.radiographs.mask_cases import EPSILON

BLEND = "blend.json"
SCORES = ("auroc", "average_precision", "dice_pos")
_FORMAT = 1
_SHARES = tuple(np.linspace(0, 1, 9).tolist())
_CELLS = (20, 50, 100, 200, 400)
_THRESHOLDS = tuple(round(0.05 * n, 2) for n in range(1, 19))
_REGIONS = (0, 25, 50, 100, 200)
_PARTS = 4  # weights of members are multiples of 1/4
_COST = 0.001  # of dice_pos, that a larger `smallest_region` may have: it drops false marks instead


def _are_weights(value: Any) -> bool:
    try:
        weights = np.asarray(value, dtype=float)
    except (TypeError, ValueError):
        return False
    return weights.ndim == 1 and bool((weights >= 0).all()) and bool(np.isclose(weights.sum(), 1))


@dataclass(frozen=True)
class Blend:
    """How the outputs of members become an image's probability and its mask.

    Members, and views of one image, are combined by the mean of their probabilities, not of their logits. The
    defaults are what training itself goes by: the class alone.

    Attributes:
        class_share: of the class in the probability; the rest is the mask's.
        top_cells: the mask's part is the mean of its highest probabilities, of so many cells.
        mask_threshold: probability from which a pixel is marked.
        smallest_region: pixels of the network's frame; marked regions of fewer pixels are dropped.
        weights: of the members, in their order; their sum is 1.

    Example:
        >>> blend = Blend(class_share=0.5, top_cells=1)
        >>> blend.probability(np.array([0.8]), np.array([[[0.4, 0.0]]]))
        0.6000000000000001
    """

    class_share: float = setting(1.0, within("[0, 1]"))
    top_cells: int = setting(200, whole(1))
    mask_threshold: float = setting(0.2, within("(0, 1)"))
    smallest_region: int = setting(0, whole(0))
    weights: Sequence[float] = setting((1.0,), Check("shares whose sum is 1", _are_weights))

    def __post_init__(self) -> None:
        check_settings(self)
        object.__setattr__(self, "weights", tuple(self.weights))  # a list in JSON

    def mean(self, members: NDArray) -> NDArray[np.float64]:
        """The weighted mean of members (M, …).

        Raises:
            ValueError: there are more or fewer members than weights.
        """
        if len(members) != len(self.weights):
            raise ValueError(
                f"This blend is of {len(self.weights)} run(s), found {len(members)}. "
                "Predict with its members, or search a blend of these."
            )
        return np.tensordot(self.weights, members.astype(np.float64), axes=1)

    def probability(self, classes: NDArray, masks: NDArray | None) -> float:
        """Of one image: class probabilities (M,), mask probabilities (M, h, w) or None: the class alone."""
        of_class = float(self.mean(classes))
        if masks is None:
            return of_class
        return self.class_share * of_class + (1 - self.class_share) * _top(self.mean(masks), self.top_cells)

    def mask(self, masks: NDArray, height: int, width: int) -> NDArray[np.uint8]:
        """The marked pixels (H, W) of the network's frame, 0/1, of mask probabilities (M, h, w)."""
        marked = _at_frame(self.mean(masks), height, width) >= self.mask_threshold
        return kept_regions(marked.astype(np.uint8), self.smallest_region)


def kept_regions(mask: NDArray[np.uint8], smallest: int) -> NDArray[np.uint8]:
    """A mask 0/1 without its regions of fewer than `smallest` pixels; pixels that share a corner touch.

    Example:
        >>> kept_regions(np.array([[1, 0, 1], [1, 0, 0]], np.uint8), 2).tolist()
        [[1, 0, 0], [1, 0, 0]]
    """
    if smallest <= 1 or not mask.any():
        return mask
    _, labels, stats, _ = cv2.connectedComponentsWithStats(mask, connectivity=8)
    keep = stats[:, cv2.CC_STAT_AREA] >= smallest
    keep[0] = False  # what is not marked
    return keep[labels].astype(np.uint8)


def _top(mask: NDArray, cells: int) -> float:
    """Mean of the highest probabilities of a mask (h, w); of all where it has no more cells."""
    values = mask.ravel()
    cells = min(cells, values.size)
    return float(np.partition(values, values.size - cells)[values.size - cells :].mean())


def _at_frame(mask: NDArray, height: int, width: int) -> NDArray[np.float64]:
    """A mask (h, w) at the frame's pixels, linear between the centres of cells."""
    return np.asarray(cv2.resize(mask.astype(np.float64), (width, height), interpolation=cv2.INTER_LINEAR))


@dataclass(frozen=True)
class Outputs:
    """What members predict of the images of validation, before it is blended, and what is true.

    Attributes:
        image: (n,) ids.
        group: (n,) who is resampled, and stays in one part.
        label: (n,) 0/1.
        classes: (n, M) probabilities.
        masks: n of (M, h, w), probabilities in float16; None: the networks have no mask.
        truths: n of (H, W), 0/1, in the network's frame.
    """

    image: NDArray[np.str_]
    group: NDArray[np.str_]
    label: NDArray[np.int_]
    classes: NDArray[np.float64]
    masks: Sequence[NDArray[np.float16]] | None
    truths: Sequence[NDArray[np.uint8]]

    @property
    def sha256(self) -> str:
        """Of everything that a blend is chosen by."""
        found = hashlib.sha256()
        for column in (self.image, self.group, self.label):
            found.update("\n".join(map(str, column)).encode())
        arrays: list[NDArray[Any]] = [self.classes, *(self.masks or ()), *self.truths]
        for array in arrays:
            found.update(repr((array.dtype.str, array.shape)).encode())
            found.update(np.ascontiguousarray(array).tobytes())
        return found.hexdigest()


@dataclass(frozen=True)
class Search:
    """What `search_blend` found.

    Attributes:
        blend: chosen on all images.
        scores: a row for each way to blend, `blend` (its words), `SCORES`; the third is out of fold.
        probability: (n,), blended as was chosen.
        outputs: that it was chosen by.
        folds: parts of the groups.
        seed: of their dealing.
    """

    blend: Blend
    scores: pd.DataFrame
    probability: NDArray[np.float64]
    outputs: Outputs
    folds: int
    seed: int


def search_blend(outputs: Outputs, *, folds: int = 5, seed: int = 0) -> Search:
    """Choose a blend, and say how well such a choice does on groups that it was not made by.

    The probability's share and cells have the highest mean of AUROC and average precision; the mask's
    threshold the highest dice_pos (mean Dice of the images with a fracture outlined, at the pixels of the
    network's frame); the members' weights (multiples of 1/4 for up to three, equal for more) the highest sum
    of the two. The smallest region is the largest tried that costs less than 0.001 of dice_pos.

    Args:
        outputs: of validation, never of test.
        folds: parts of the groups; each is judged by what the others chose.
        seed: of the dealing of groups with and without a fracture.

    Raises:
        ValueError: there are too few groups with or without a fracture for so many folds.
    """
    # 1. What every blend would say of each image.
    part = _parts(outputs, folds, seed)
    members = outputs.classes.shape[1]
    each = [_Table.of(outputs, weights) for weights in _weightings(members)]

    # 2. Out of fold: chosen on the other parts.
    probability, dice = np.empty(len(part)), np.full(len(part), np.nan)
    for held_out in range(folds):
        choice = _choose(each, outputs.label, part != held_out)
        rows = part == held_out
        probability[rows] = choice.probability()[rows]
        dice[rows] = choice.dice()[rows]

    # 3. On all of them.
    chosen, plain = _choose(each, outputs.label, np.ones(len(part), bool)), _default(each[0])
    rows = {
        "class alone, not searched": (plain.probability(), plain.dice()),
        "chosen on these images": (chosen.probability(), chosen.dice()),
        "chosen out of fold": (probability, dice),
    }
    scores = [
        {
            "blend": words,
            **dict(zip(SCORES, (*areas(outputs.label, p), _mean(d)), strict=True)),
        }
        for words, (p, d) in rows.items()
    ]
    return Search(chosen.blend(), pd.DataFrame(scores), chosen.probability(), outputs, folds, seed)


def _parts(outputs: Outputs, folds: int, seed: int) -> NDArray[np.int_]:
    """(n,) The part of each image; groups stay whole, with and without a fracture are dealt evenly."""
    if folds < 2:
        raise ValueError(f"Cross-fitting needs 2 folds or more, as somebody has to be left; found {folds}.")
    groups, number = np.unique(outputs.group, return_inverse=True)
    broken = np.bincount(number, weights=outputs.label) > 0
    for found, words in ((broken.sum(), "a fracture"), ((~broken).sum(), "none")):
        if found < folds:
            raise ValueError(
                f"A blend is searched in {folds} folds, which takes as many groups with a fracture, and "
                f"without; found {found} with {words}. Search on more images, or in fewer folds."
            )
    order = np.lexsort((np.random.default_rng(seed).random(len(groups)), broken))
    place = np.empty(len(groups), dtype=np.intp)
    place[order] = np.arange(len(groups)) % folds
    return place[number]


def _weightings(members: int) -> list[tuple[float, ...]]:
    """Equal weights, and multiples of a quarter of up to three members."""
    equal = (1 / members,) * members
    if members > 3:
        return [equal]
    every = product(range(_PARTS + 1), repeat=members)
    some = [tuple(n / _PARTS for n in counts) for counts in every if sum(counts) == _PARTS]
    return [equal, *(weights for weights in some if not np.allclose(weights, equal))]


@dataclass(frozen=True)
class _Table:
    """With these weights: what each setting gives for each image."""

    weights: tuple[float, ...]
    of_class: NDArray[np.float64]  # (n,)
    tops: NDArray[np.float64] | None  # (n, cells)
    dices: NDArray[np.float64] | None  # (n, thresholds, regions), NaN without a fracture outlined

    @classmethod
    def of(cls, outputs: Outputs, weights: tuple[float, ...]) -> "_Table":
        blend = Blend(weights=weights)
        of_class = blend.mean(outputs.classes.T)
        if outputs.masks is None:
            return cls(weights, of_class, None, None)
        tops, dices = [], []
        for masks, truth in zip(outputs.masks, outputs.truths, strict=True):
            mask = blend.mean(masks)
            tops.append([_top(mask, cells) for cells in _CELLS])
            dices.append(_dices(mask, truth))
        return cls(weights, of_class, np.array(tops), np.array(dices))


def _dices(mask: NDArray, truth: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Dice (thresholds, regions) of a mask's cells with the truth of one image; NaN where that is empty."""
    found = np.full((len(_THRESHOLDS), len(_REGIONS)), np.nan)
    if not (total := int(np.count_nonzero(truth))):
        return found
    values, inside = _at_frame(mask, *truth.shape), truth.astype(bool)
    for row, threshold in enumerate(_THRESHOLDS):
        marked = (values >= threshold).astype(np.uint8)
        count, labels, stats, _ = cv2.connectedComponentsWithStats(marked, connectivity=8)
        areas = stats[:, cv2.CC_STAT_AREA].astype(float)
        both = np.bincount(labels[inside], minlength=count).astype(float)
        areas[0] = both[0] = 0  # what is not marked
        for column, smallest in enumerate(_REGIONS):
            keep = areas >= smallest
            found[row, column] = (2 * both[keep].sum() + EPSILON) / (areas[keep].sum() + total + EPSILON)
    return found


@dataclass(frozen=True)
class _Choice:
    """Settings by their place in what was tried."""

    table: _Table
    share: int
    cells: int
    threshold: int
    region: int

    def probability(self) -> NDArray[np.float64]:
        if self.table.tops is None:
            return self.table.of_class
        share = _SHARES[self.share]
        return share * self.table.of_class + (1 - share) * self.table.tops[:, self.cells]

    def dice(self) -> NDArray[np.float64]:
        if self.table.dices is None:
            return np.full(len(self.table.of_class), np.nan)
        return self.table.dices[:, self.threshold, self.region]

    def blend(self) -> Blend:
        if self.table.tops is None:
            return Blend(class_share=1.0, weights=self.table.weights)
        return Blend(
            class_share=_SHARES[self.share],
            top_cells=_CELLS[self.cells],
            mask_threshold=_THRESHOLDS[self.threshold],
            smallest_region=_REGIONS[self.region],
            weights=self.table.weights,
        )


def _default(table: _Table) -> _Choice:
    """`Blend` as it is without a search."""
    plain = Blend(weights=table.weights)
    return _Choice(
        table,
        _SHARES.index(plain.class_share),
        _CELLS.index(plain.top_cells),
        _THRESHOLDS.index(plain.mask_threshold),
        _REGIONS.index(plain.smallest_region),
    )


def _choose(tables: Sequence[_Table], label: NDArray[np.int_], rows: NDArray[np.bool_]) -> _Choice:
    """The best choice for these rows; of equals the first, which is that of equal weights."""
    best, highest = None, -np.inf
    for table in tables:
        choice, score = _of_weights(table, label, rows)
        if score > highest + 1e-12:
            best, highest = choice, score
    assert best is not None
    return best


def _of_weights(table: _Table, label: NDArray, rows: NDArray[np.bool_]) -> tuple[_Choice, float]:
    """The best choice with these weights, and the sum of what it is chosen by."""

    def ranking(choice: _Choice) -> float:
        return sum(areas(label[rows], choice.probability()[rows])) / 2

    plain = _default(table)
    if table.tops is None or table.dices is None:
        return plain, ranking(plain)
    # 1. Class and mask in the probability.
    tried = [_Choice(table, share, cells, 0, 0) for share, cells in _tried(len(_SHARES), len(_CELLS))]
    ranked = [ranking(choice) for choice in tried]
    first = tried[int(np.argmax(ranked))]
    # 2. The mask, where one is outlined.
    outlined = rows & ~np.isnan(table.dices[:, 0, 0])
    if not outlined.any():
        return _Choice(table, first.share, first.cells, plain.threshold, plain.region), max(ranked)
    dice = table.dices[outlined].mean(axis=0)
    threshold = int(dice.max(axis=1).argmax())
    near = np.flatnonzero(dice[threshold] > dice[threshold].max() - _COST)
    choice = _Choice(table, first.share, first.cells, threshold, int(near[-1]))
    return choice, max(ranked) + float(dice[threshold, near[-1]])


def areas(label: NDArray[np.int_], probability: NDArray[np.float64]) -> tuple[float, float]:
    """AUROC and average precision, as `metrics` has them, in a fiftieth of the time: a search asks thousands.

    Example:
        >>> areas(np.array([0, 1, 1]), np.array([0.2, 0.2, 0.9]))
        (0.75, 0.8333333333333333)
    """
    order = np.argsort(-probability, kind="stable")
    ends = np.flatnonzero(np.diff(probability[order], append=np.nan))  # of equal probabilities
    hits = np.concatenate([[0], label[order].cumsum()[ends]]).astype(float)
    alarms = np.concatenate([[0], ends + 1]) - hits
    more = np.diff(hits)
    area = (np.diff(alarms) * (hits[1:] + hits[:-1]) / 2).sum() / (hits[-1] * alarms[-1])
    return float(area), float((more * hits[1:] / (ends + 1)).sum() / hits[-1])


def _tried(shares: int, cells: int) -> Iterator[tuple[int, int]]:
    """Places of shares and cells; of the class alone, the cells do not matter."""
    return ((a, k) for a, k in product(range(shares), range(cells)) if k == 0 or _SHARES[a] < 1)


def _mean(dice: NDArray[np.float64]) -> float | None:
    found = dice[~np.isnan(dice)]
    return float(found.mean()) if len(found) else None


@dataclass(frozen=True)
class FrozenBlend:
    """A blend as it was frozen in a run folder.

    Attributes:
        blend: itself.
        views: of each image that the members' outputs are the mean of, see `prediction.VIEWS`.
        record: the whole of `blend.json`.
    """

    blend: Blend
    views: tuple[str, ...]
    record: Mapping[str, Any]

    @property
    def threshold(self) -> float | None:
        """Probability from which an image is called, by the rule of training; None where none qualified."""
        return Decision.from_record(self.record["decision"]).threshold

    def summary(self) -> str:
        """What was chosen, and how well it does, in two lines and a table."""
        blend, on = self.blend, self.record["chosen_on"]
        weights = ", ".join(
            f"{each['run']} {weight:.2f}"
            for each, weight in zip(self.record["members"], blend.weights, strict=True)
        )
        table = pd.DataFrame(self.record["scores"]).set_index("blend").rename_axis(None)
        table = table.rename(columns={"dice_pos": "dice_pos in the network's frame"})
        return (
            f"Probability: {blend.class_share:.3g} of the class, the rest the mean of the mask's "
            f"{blend.top_cells} highest cells. Mask from {blend.mask_threshold:.3g}, regions of "
            f"{blend.smallest_region} pixels or more. Weights: {weights}. Views: {len(self.views)}.\n"
            f"On {on['images']:,} images of validation ({on['groups']:,} groups, {on['fractured']:,} "
            f"fractured):\n{table.astype(float).round(3).to_string()}"
        )

    def check_members(self, members: Sequence[Mapping[str, Any]]) -> None:
        """Refuse other members than those that the blend was chosen with.

        Raises:
            ValueError: names what differs.
        """
        wanted, found = ({str(m["run"]): dict(m) for m in each} for each in (self.record["members"], members))
        if differ := differences(found, wanted):
            raise ValueError(
                f"{BLEND} was chosen with other runs: {listing(differ, separator='; ', quoted=False)}. "
                "Put those back, or search a blend of these (predict --blend --replace)."
            )


def freeze_blend(
    folder: str | Path,
    search: Search,
    *,
    members: Sequence[Mapping[str, Any]],
    views: Sequence[str],
    rule: Rule,
    data: Mapping[str, Any],
    replace: bool = False,
) -> Path:
    """Write `blend.json`: what was chosen, by which outputs of which runs, and its scores; returns its path.

    Args:
        folder: of the run or the ensemble.
        search: of `search_blend`.
        members: in the order of the weights, each with its `run`, `weights_sha256` and `record_sha256`.
        views: of each image, see `FrozenBlend`.
        rule: chooses a threshold of the blended probabilities, until another decision is frozen.
        data: hashes of the cohort.
        replace: replace a blend that is there; predictions made with it are then of another.

    Raises:
        FileExistsError: there is one, and `replace` is not set.
    """
    path, outputs = Path(folder) / BLEND, search.outputs
    if path.exists() and not replace:
        raise FileExistsError(
            f"{path} is frozen already, and predictions rest on it. Leave it, or replace it with "
            "replace=True (on the command line, --replace)."
        )
    scores = search.scores.astype(object).where(search.scores.notna(), None)
    content = {
        "format": _FORMAT,
        "blend": asdict(search.blend),
        "mean_of": "probabilities of each run and view",
        "members": [dict(each) for each in members],
        "views": list(views),
        "chosen_on": {
            "split": "validation",
            "images": len(outputs.image),
            "groups": len(np.unique(outputs.group)),
            "fractured": int(outputs.label.sum()),
            "outputs_sha256": outputs.sha256,
            **data,
        },
        "search": {
            "folds": search.folds,
            "seed": search.seed,
            "class_share": list(_SHARES),
            "top_cells": list(_CELLS),
            "mask_threshold": list(_THRESHOLDS),
            "smallest_region": list(_REGIONS),
            "weightings": len(_weightings(outputs.classes.shape[1])),
        },
        "scores": scores.to_dict("records"),
        "decision": choose_threshold(outputs.label, search.probability, rule).record(),
        "frozen_utc": now_utc(),
        "versions": {"cspine_helpers": __version__},
    }
    return write_sealed(path, content)


def read_blend(folder: str | Path) -> FrozenBlend:
    """The blend that is frozen in a run folder; see `read_sealed`.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is not JSON, of another format, not as it was written, or holds no blend.
    """
    path = Path(folder) / BLEND
    record = read_sealed(
        path,
        version=_FORMAT,
        missing=f"No blend is frozen at {path}. Search one: python -m cspine_helpers predict --blend.",
        again="search it again",
        writer="blend.freeze_blend(...)",
    )
    try:
        blend = config_of(Blend, record.get("blend"), whole=True)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return FrozenBlend(blend, tuple(record["views"]), record)
