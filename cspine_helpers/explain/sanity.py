"""Whether a map depends on what the network has learned: its layers randomised, its labels, its seed.

A map that stays the same while the network's weights are shuffled shows the image, not the network: so does
an edge filter, which has to fail. Shapes: N cases; maps (N, T, h, w) or (N, h, w), on their own grid.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations

import numpy as np
import pandas as pd
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.stats import rankdata
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d

from cspine_helpers.evaluation.resampling import mean_by_patient
from cspine_helpers.explain.localisation import AnyMaps, localise
from cspine_helpers.files.paths import listing
from cspine_helpers.files.tables import require_columns

LIMIT = 0.5  # highest similarity to the trained network's maps that one without its weights may keep
TOP = 0.05  # share of the cells that count as a map's top
TRAINED = "trained"
Mapper = Callable[[nn.Module], AnyMaps]  # network → maps of the same cases


# ------------------------------------------------------------------------------------- randomised weights


def parts(network: nn.Module) -> list[str]:
    """Parts of a network that hold weights, from its head down to its first layer.

    Those are its children, the last first; in the place of its `backbone` stand the backbone's own, and in
    that of a sequence of blocks each block.

    Example:
        >>> parts(run.model)
        ['head', 'attention', 'lstm', 'slice_head', 'mask_encoder', 'backbone.blocks.1', 'backbone.blocks.0',
         'backbone.bn1', 'backbone.conv_stem']
    """
    found: list[str] = []
    for name, child in network.named_children():
        if name != "backbone":
            found.append(name)
            continue
        for inner, block in child.named_children():
            if isinstance(block, nn.Sequential):
                found += [f"{name}.{inner}.{each}" for each, _ in block.named_children()]
            else:
                found.append(f"{name}.{inner}")
    return [name for name in reversed(found) if any(True for _ in network.get_submodule(name).parameters())]


def randomised(network: nn.Module, names: Sequence[str], *, seed: int = 0) -> nn.Module:
    """A copy of a network in which each tensor of some parts has its values in random order.

    So nothing of what they had learned is left, but each tensor keeps its scale: a map that changes does so
    for what the weights were, not because values vanish or saturate. Parts named first are shuffled alike,
    whatever follows them.

    Args:
        network: stays as it is.
        names: of modules, as `parts` gives them.
        seed: of the order.

    Raises:
        ValueError: the network has no such part.

    Source:
        Adebayo et al., Sanity checks for saliency maps, NeurIPS 2018, who draw new initial weights instead.

    Example:
        >>> other = randomised(run.model, ["head"])
        >>> torch.equal(other.head.weight.sort().values, run.model.head.weight.sort().values)
        True
    """
    known = dict(network.named_modules())
    if unknown := [name for name in names if not name or name not in known]:
        raise ValueError(
            f"{type(network).__name__} has no part {listing(unknown)}. sanity.parts(network) lists those "
            "with weights, from the head down."
        )
    twin, rng = copy.deepcopy(network), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name in names:
            module = twin.get_submodule(name)
            for tensor in (*module.parameters(), *module.buffers()):
                order = torch.randperm(tensor.numel(), generator=rng).to(tensor.device)
                tensor.copy_(tensor.reshape(-1)[order].view_as(tensor))
    return twin


def cascade(
    network: nn.Module,
    mapped: Mapping[str, Mapper],
    *,
    truth: ArrayLike | None = None,
    steps: Sequence[str] | None = None,
    seeds: Sequence[int] = (0, 1, 2),
) -> pd.DataFrame:
    """Maps of a network whose parts are randomised one after the other, each on top of those before it.

    Args:
        network: trained, in eval mode; stays as it is.
        mapped: method → what gives its maps of the same N cases by any network of this kind: `Maps`, or an
            array.
        truth: 0/1 on the pixels, of each case; None: no AUROC.
        steps: parts in the order in which they are randomised; None: all `parts`, from the head down.
        seeds: of the shuffling; the whole cascade is computed with each.

    Returns:
        One row a method, step, seed and case: `method`; `step`, 0 for the trained network, whose seed is −1;
        `layer`, the part that is randomised in this step; `seed`; `case`, its place; `similarity`, absolute
        rank correlation of the map with the trained network's, over all cells of the case; `auroc` of its
        pixels against the truth, NaN without one.

    Raises:
        ValueError: a part is unknown, or the truth does not fit; see `localise`.

    Example:
        >>> from cspine_helpers.explain.maps import map_sequences
        >>> from dataclasses import replace
        >>> samples = cohort.samples["test"]
        >>> def grad_cam(model):
        ...     return map_sequences(replace(run, model=model), samples, cohort.packed)
        >>> rows = cascade(run.model, {"grad_cam": grad_cam}, steps=["head"], seeds=[0])
        >>> rows.groupby("step")["similarity"].mean()[0]
        np.float64(1.0)
    """
    if not mapped:
        raise ValueError("A cascade needs a method or more; found none. Pass one, and what gives its maps.")
    order = parts(network) if steps is None else list(steps)
    tables = []
    for method, maps_of in mapped.items():
        trained = maps_of(network)
        tables.append(_step(trained, trained, truth).assign(method=method, step=0, layer=TRAINED, seed=-1))
        for seed in seeds:
            for step, layer in enumerate(order, start=1):
                maps = maps_of(randomised(network, order[:step], seed=seed))
                rows = _step(trained, maps, truth)
                tables.append(rows.assign(method=method, step=step, layer=layer, seed=seed))
    columns = ["method", "step", "layer", "seed", "case", "similarity", "auroc"]
    return pd.concat(tables, ignore_index=True)[columns]


def _step(trained: AnyMaps, maps: AnyMaps, truth: ArrayLike | None) -> pd.DataFrame:
    similarity = np.abs(rank_correlation(_cells(trained), _cells(maps)))
    known = np.nan if truth is None else localise(maps, truth)["auroc"].to_numpy()
    return pd.DataFrame({"case": np.arange(len(similarity)), "similarity": similarity, "auroc": known})


def _cells(maps: AnyMaps) -> NDArray[np.float32]:
    """Values on the map's own grid."""
    return np.asarray(getattr(maps, "values", maps), dtype=np.float32)


def sanity_table(rows: pd.DataFrame, patients: ArrayLike, *, confidence: float = 0.95) -> pd.DataFrame:
    """Means of a `cascade` over cases, the mean of the seeds counting for each, with intervals over patients.

    Args:
        rows: of `cascade`.
        patients: (N,) of each case.
        confidence: of the intervals.

    Returns:
        One row a method and step: `method, step, layer, similarity, similarity_low, similarity_high, auroc,
        auroc_low, auroc_high, cases`.

    Example:
        >>> rows = pd.DataFrame({"method": "edges", "step": [0, 0], "layer": "trained", "seed": -1,
        ...                      "case": [0, 1], "similarity": 1.0, "auroc": [0.7, 0.9]})
        >>> sanity_table(rows, ["a", "b"])["auroc"].tolist()
        [0.8]
    """
    whose, found = _whose(rows, patients, ("method", "step", "layer", "case", "similarity", "auroc")), []
    for (method, step, layer), its in rows.groupby(["method", "step", "layer"], sort=False):
        row = {"method": method, "step": step, "layer": layer}
        of_cases = its.groupby("case")[["similarity", "auroc"]].mean()
        for name in ("similarity", "auroc"):
            limits = mean_by_patient(of_cases[name], whose[of_cases.index], confidence)
            row |= dict(zip((name, f"{name}_low", f"{name}_high"), limits, strict=True))
        found.append(row | {"cases": len(of_cases)})
    return pd.DataFrame(found).sort_values(["method", "step"], kind="stable", ignore_index=True)


def passes(
    rows: pd.DataFrame, patients: ArrayLike, *, limit: float = LIMIT, confidence: float = 0.95
) -> pd.DataFrame:
    """Which methods pass: once all is randomised, their maps are others, and no longer know the truth.

    A method passes where, at the last step, the upper end of the similarity's interval is at or below the
    limit and, where the truth is known, the interval of what its AUROC has lost lies above 0. What does not
    depend on the network, such as an edge filter, keeps a similarity of 1 and loses nothing.

    Args:
        rows: of `cascade`.
        patients: (N,) of each case.
        limit: of the similarity.
        confidence: of the intervals.

    Returns:
        One row a method: `method, similarity, similarity_low, similarity_high, auroc` (of the trained
        network), `auroc_randomised, lost, lost_low, lost_high, limit, passes`.

    Raises:
        ValueError: nothing is randomised, or a limit outside 0 … 1.

    Example:
        >>> rows = pd.DataFrame({"method": "edges", "step": [0, 0, 1, 1], "layer": "head", "seed": 0,
        ...                      "case": [0, 1, 0, 1], "similarity": 1.0, "auroc": [0.7, 0.9, 0.7, 0.9]})
        >>> passes(rows, ["a", "b"])["passes"].tolist()
        [False]
    """
    if not 0 <= limit <= 1:
        raise ValueError(f"The limit of a similarity lies between 0 and 1; found {limit}. 0.5 is usual here.")
    whose, found = _whose(rows, patients, ("method", "step", "case", "similarity", "auroc")), []
    for method, its in rows.groupby("method", sort=False):
        means = its.groupby(["step", "case"])[["similarity", "auroc"]].mean()
        last = its["step"].max()
        if last == 0 or 0 not in set(its["step"]):
            raise ValueError(
                f"The rows of {method!r} are of one step, so that nothing is compared. Pass those of "
                "sanity.cascade whole."
            )
        trained, end = means.loc[0], means.loc[last]
        patient = whose[end.index]
        similarity = mean_by_patient(end["similarity"], patient, confidence)
        lost = mean_by_patient(trained["auroc"] - end["auroc"], patient, confidence)
        row = {"method": method}
        row |= dict(zip(("similarity", "similarity_low", "similarity_high"), similarity, strict=True))
        row |= {"auroc": trained["auroc"].mean(), "auroc_randomised": end["auroc"].mean()}
        row |= dict(zip(("lost", "lost_low", "lost_high"), lost, strict=True))
        known = trained["auroc"].notna().any()
        forgets = lost[1] > 0 if known else True
        found.append(row | {"limit": limit, "passes": bool(similarity[2] <= limit and forgets)})
    return pd.DataFrame(found)


def _whose(rows: pd.DataFrame, patients: ArrayLike, columns: Sequence[str]) -> NDArray:
    """The patient of each case, (N,).

    Raises:
        ValueError: columns are missing; other cases than patients.
    """
    require_columns(rows, columns, what="The table of cases")
    whose, cases = np.asarray(patients), rows["case"].nunique()
    if whose.shape != (cases,) or not cases:
        raise ValueError(
            f"Each case has a patient; found {cases} cases, and patients of shape {whose.shape}. Pass one "
            "for each of one case or more."
        )
    return whose


# --------------------------------------------------------------------------------------------- agreement


def agreement(maps: Mapping[str, ArrayLike], *, top: float = TOP) -> pd.DataFrame:
    """How alike two maps of the same case are, for each pair: of methods, of seeds, of labels.

    Maps of other grids are averaged over the cells of the coarsest.

    Args:
        maps: name → (N, …, h, w), of the same cases in the same order.
        top: share of a case's cells that count as its top.

    Returns:
        One row a pair and case: `first, second, case`; `spearman`, rank correlation of all cells of the case,
        signed; `iou` of the two tops (two random ones: about top / 2). 0 where a map is constant.

    Raises:
        ValueError: fewer than two maps, of different cases, or on grids that do not divide each other; a
            share outside 0 … 1.

    Example:
        >>> cells = np.arange(16.0).reshape(1, 1, 4, 4)
        >>> agreement({"one": cells, "other": -cells}, top=0.25)[["spearman", "iou"]].values.tolist()
        [[-1.0, 0.0]]
    """
    if not 0 < top < 1:
        raise ValueError(f"top is a share of the cells between 0 and 1; found {top}. 0.05 is usual here.")
    values = {name: np.asarray(each, dtype=np.float32) for name, each in maps.items()}
    shapes = {name: each.shape for name, each in values.items()}
    if len(values) < 2 or len({shape[:-2] for shape in shapes.values()}) > 1:
        raise ValueError(
            f"Two maps or more of the same cases and slices are compared; found {shapes}. Make them of the "
            "same samples."
        )
    grid = min(((shape[-2], shape[-1]) for shape in shapes.values()), key=np.prod)
    if any(n % m for shape in shapes.values() for n, m in zip(shape[-2:], grid, strict=True)):
        raise ValueError(
            f"The cells of one map do not divide those of another: {shapes}. Compare maps of one layer, or "
            "at the pixels."
        )
    common = {name: _averaged(each, grid) for name, each in values.items()}
    tables = []
    for first, second in combinations(common, 2):
        pair = common[first], common[second]
        found = {"first": first, "second": second, "case": np.arange(len(pair[0]))}
        tables.append(
            pd.DataFrame(found | {"spearman": rank_correlation(*pair), "iou": _top_iou(*pair, top)})
        )
    return pd.concat(tables, ignore_index=True)


def agreement_table(rows: pd.DataFrame, patients: ArrayLike, *, confidence: float = 0.95) -> pd.DataFrame:
    """Means of `agreement` over cases, with intervals over patients.

    Returns:
        One row a pair: `first, second, value, low, high` (of the rank correlation), `iou, iou_low, iou_high,
        cases`.

    Example:
        >>> cells = np.random.default_rng(0).random((3, 1, 4, 4))
        >>> agreement_table(agreement({"one": cells, "other": cells}), ["a", "b", "c"])["value"].tolist()
        [1.0]
    """
    whose, found = _whose(rows, patients, ("first", "second", "case", "spearman", "iou")), []
    for (first, second), its in rows.groupby(["first", "second"], sort=False):
        row = {"first": first, "second": second}
        for column, names in (
            ("spearman", ("value", "low", "high")),
            ("iou", ("iou", "iou_low", "iou_high")),
        ):
            limits = mean_by_patient(its[column], whose[its["case"]], confidence)
            row |= dict(zip(names, limits, strict=True))
        found.append(row | {"cases": len(its)})
    return pd.DataFrame(found)


def rank_correlation(first: ArrayLike, second: ArrayLike) -> NDArray[np.float64]:
    """Spearman's of two maps of each case, over all of its cells, (N,); 0 where one is constant.

    Raises:
        ValueError: they differ in shape.

    Example:
        >>> rank_correlation([[1.0, 2.0, 3.0]], [[1.0, 2.0, 30.0]]).tolist()
        [1.0]
    """
    a, b = np.asarray(first), np.asarray(second)
    if a.shape != b.shape or a.ndim < 2:
        raise ValueError(
            f"Maps are compared cell by cell, those of one grid and of the same cases; found {a.shape} and "
            f"{b.shape}. agreement() brings maps of several grids together."
        )
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError(
            "Maps hold NaN or infinite values, which have no rank: such maps would look like others. Compute "
            "them again in float32."
        )
    ranks = [rankdata(each.reshape(len(each), -1), axis=1) for each in (a, b)]
    x, y = (each - each.mean(axis=1, keepdims=True) for each in ranks)
    scale = np.sqrt((x**2).sum(axis=1) * (y**2).sum(axis=1))
    return np.divide((x * y).sum(axis=1), scale, out=np.zeros(len(a)), where=scale > 0)


def _averaged(values: NDArray[np.float32], grid: tuple[int, int]) -> NDArray[np.float32]:
    if values.shape[-2:] == grid:
        return values
    cells: Tensor = torch.from_numpy(np.ascontiguousarray(values)).flatten(0, -3)[:, None]
    return adaptive_avg_pool2d(cells, grid).numpy().reshape(*values.shape[:-2], *grid)


def _top_iou(first: NDArray, second: NDArray, top: float) -> NDArray[np.float64]:
    """IoU of the cells of highest value; what ties with the last of them counts, too."""
    tops, constant = [], np.zeros(len(first), dtype=bool)
    for each in (first, second):
        cells = each.reshape(len(each), -1)
        constant |= np.ptp(cells, axis=1) == 0
        many = max(1, round(top * cells.shape[1]))
        tops.append(cells >= np.partition(cells, -many, axis=1)[:, -many, None])
    both, either = (tops[0] & tops[1]).sum(axis=1), (tops[0] | tops[1]).sum(axis=1)
    return np.where(constant, 0.0, both / either)
