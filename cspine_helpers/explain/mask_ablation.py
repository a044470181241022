"""Does the model answer for the vertebra that its mask names? The mask changed, and a neighbour broken.

Shapes: N samples, T slices; masks uint8 (N, T, H, W) of 0 and 1 on the pixels of the sequences.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from numpy.typing import ArrayLike, NDArray
from torch.nn.functional import max_pool2d

from cspine_helpers.checkpoints import Run
from cspine_helpers.dataset.sequence import SequenceDataset, make_loader
from cspine_helpers.decisions.thresholds import check_threshold
from cspine_helpers.evaluation.cases import Cases
from cspine_helpers.evaluation.intervals import compare
from cspine_helpers.evaluation.resampling import (
    difference_limits,
    mean_by_patient,
    resampled,
    share_limits,
)
from cspine_helpers.explain.localisation import localise
from cspine_helpers.explain.maps import ON_PIXELS, Method, compute_maps, default_layer, grid_of
from cspine_helpers.explain.sanity import rank_correlation
from cspine_helpers.files.paths import listing
from cspine_helpers.files.tables import require_columns
from cspine_helpers.labels import UID, VERTEBRAE
from cspine_helpers.model.forward import as_on_a_cpu, folded
from cspine_helpers.packed import MASK

DILATION = 4  # pixels: a cell of feature maps at stride 4
OWN = "own"  # the mask as it is
ALL = "all"  # vertebrae together
_RESAMPLES = 1000


# --------------------------------------------------------------------------------------- the mask changed


def own_masks(samples: pd.DataFrame, packed_dir: str | Path, *, slices: int, size: int) -> NDArray[np.uint8]:
    """The masks that the samples were packed with, uint8 (N, T, H, W) of 0 and 1.

    Example:
        >>> own_masks(cohort.samples["test"], cohort.packed, slices=5, size=32).mean()
        np.float64(0.25)
    """
    dataset = SequenceDataset(samples, packed_dir, slices=slices, size=size)
    found = [(dataset[n]["sequence"][:, MASK] > 127).numpy() for n in range(len(dataset))]
    return np.stack(found).astype(np.uint8)


def changed_masks(
    masks: NDArray[np.uint8], samples: pd.DataFrame, *, dilation: int = DILATION
) -> dict[str, NDArray[np.uint8]]:
    """Masks that say something else: "zeroed", "swapped" and "dilated".

    Swapped is the mask of the same vertebra in the next study that has it, so that it is a plausible one in
    the wrong place.

    Args:
        masks: see `own_masks`.
        samples: StudyInstanceUID and vertebra of the masks, in order.
        dilation: pixels in each direction, in the slice.

    Raises:
        ValueError: a vertebra is there once, so that no other study has a mask to swap; names it. Masks of
            another shape, or a dilation below 1.

    Example:
        >>> table = pd.DataFrame({UID: ["1.1", "1.2"], "vertebra": "C4"})
        >>> masks = np.zeros((2, 3, 8, 8), np.uint8)
        >>> masks[0, :, 4, 4] = 1
        >>> {name: int(mask.sum()) for name, mask in changed_masks(masks, table, dilation=1).items()}
        {'zeroed': 0, 'swapped': 3, 'dilated': 27}
    """
    if dilation < 1 or dilation != int(dilation):
        raise ValueError(f"A mask is dilated by whole pixels, 1 pixel or more; found {dilation}. Correct it.")
    if masks.ndim != 4 or len(masks) != len(samples):
        raise ValueError(
            f"Masks are (N, T, H, W), of {len(samples)} samples; found {masks.shape}. Read them with "
            "own_masks(...)."
        )
    donors, level = np.arange(len(samples)), samples["vertebra"].to_numpy()
    for name in dict.fromkeys(level):
        of_level = np.flatnonzero(level == name)
        donors[of_level] = np.roll(of_level, -1)
    if len(alone := samples[donors == np.arange(len(samples))]):
        raise ValueError(
            f"No other study has a mask of {listing(alone['vertebra'].unique())} to swap. Take the samples "
            "of several studies."
        )
    pixels = torch.from_numpy(masks).flatten(0, 1)[:, None].float()
    dilated = max_pool2d(pixels, 2 * dilation + 1, stride=1, padding=dilation).numpy()
    return {
        "zeroed": np.zeros_like(masks),
        "swapped": masks[donors],
        "dilated": dilated.astype(np.uint8).reshape(masks.shape),
    }


def ablate_masks(
    run: Run,
    samples: pd.DataFrame,
    packed_dir: str | Path,
    masks: Mapping[str, NDArray[np.uint8]],
    *,
    truth: ArrayLike | None = None,
    method: Method | None = "grad_cam",
    batch_size: int = 8,
) -> pd.DataFrame:
    """What the model says of each sample when its mask is another.

    Args:
        run: of `checkpoints.load_run`.
        samples: StudyInstanceUID, vertebra and label, as `labels.expand` makes them.
        packed_dir: the cohort's `packed` folder.
        masks: name of a change → the masks instead, see `changed_masks`.
        truth: 0/1 on the pixels of all samples, (N, T, H, W), for the maps of those that are fractured.
        method: of maps, of the fractured samples; None: no maps.
        batch_size: sequences at a time.

    Returns:
        One row a change, "own" first, and sample: `change`, StudyInstanceUID, vertebra, label, `probability`;
        of fractured samples `similarity` (rank correlation of the map with that under the own mask) and
        `map_auroc` of its pixels against the truth; else NaN.

    Raises:
        ValueError: masks or truth of another shape than the samples'.

    Example:
        >>> samples = cohort.samples["test"]
        >>> masks = {"zeroed": np.zeros((len(samples), 5, 32, 32), np.uint8)}
        >>> ablate_masks(run, samples, cohort.packed, masks)["change"].unique().tolist()
        ['own', 'zeroed']
    """
    config = run.config
    shape = (len(samples), config.slices, config.size, config.size)
    given = {**masks, **({} if truth is None else {"the truth": np.asarray(truth)})}
    if wrong := {name: each.shape for name, each in given.items() if each.shape != shape}:
        raise ValueError(
            f"Masks and truth are of shape {shape}, as the samples and the run have it; found {wrong}. "
            "Make them of the same samples."
        )
    network = folded(run.model)
    device = next(network.parameters()).device
    layer = None if method is None or method in ON_PIXELS else default_layer(network)
    dataset = SequenceDataset(samples, packed_dir, slices=config.slices, size=config.size)
    names, tables = [OWN, *masks], []
    fractured = samples["label"].to_numpy() == 1
    for batch in make_loader(dataset, batch_size=batch_size):
        rows = batch["index"].numpy()
        broken = np.flatnonzero(fractured[rows]) if method is not None else np.empty(0, np.intp)
        vertebra, own_maps = batch["vertebra"].to(device), None
        for name in names:
            sequence = batch["sequence"]
            if name != OWN:
                sequence = sequence.clone()
                sequence[:, :, MASK] = torch.from_numpy(masks[name][rows]) * 255
            with as_on_a_cpu(device):
                output = network(sequence.to(device), vertebra)
            table = samples[[UID, "vertebra", "label"]].iloc[rows].assign(change=name, similarity=np.nan)
            table["probability"] = output.probability.cpu().numpy()
            table["map_auroc"] = np.nan
            if len(broken):
                inputs = [each[broken].to(device) for each in (sequence, vertebra)]
                cells = compute_maps(network, inputs, _logit, method=method, layer=layer)  # type: ignore[arg-type]
                weight = output.attention[broken].reshape(-1, 1, 1)  # as `map_sequences` does
                maps = (cells * weight).unflatten(0, (len(broken), -1)).cpu().numpy()
                own_maps = maps if own_maps is None else own_maps
                similar, at = rank_correlation(own_maps, maps), table.columns.get_indexer(["similarity"])[0]
                table.iloc[broken, at] = similar
                if truth is not None:
                    grid = grid_of(network, layer, *(each[:1] for each in inputs))
                    on_pixels = grid.on_pixels(maps, (config.size, config.size))
                    known = localise(on_pixels, np.asarray(truth)[rows[broken]])["auroc"].to_numpy()
                    table.iloc[broken, table.columns.get_indexer(["map_auroc"])[0]] = known
            tables.append(table)
    found = pd.concat(tables, ignore_index=True)
    found["change"] = pd.Categorical(found["change"], names)
    found = found.sort_values("change", kind="stable", ignore_index=True).astype({"change": str})
    return found[["change", UID, "vertebra", "label", "probability", "similarity", "map_auroc"]]


def _logit(output: object) -> torch.Tensor:
    return output.logit  # type: ignore[attr-defined]


def mask_ablation_table(rows: pd.DataFrame, *, confidence: float = 0.95, seed: int = 0) -> pd.DataFrame:
    """How far each change of the mask moves the model, by vertebra, with intervals over patients.

    Args:
        rows: of `ablate_masks`; a study is a patient.
        confidence: of the intervals.
        seed: of the resampling.

    Returns:
        One row a change, vertebra ("all", C1 … C7) and metric: `change, vertebra, metric, value, low, high,
        own` (with the mask as it is), `n`. Values are differences from the mask as it is: of
        `probability_fractured` and `probability_intact`, the mean probability of such vertebrae; of `auroc`,
        that of all vertebrae's probabilities; of `map_auroc`, that of fractured ones' maps; of
        `map_similarity`, their rank correlation with the own mask's map, which is 1 as it is. NaN where
        undefined.

    Raises:
        ValueError: columns are missing, or rows of a change.
    """
    columns = ("change", UID, "vertebra", "label", "probability", "similarity", "map_auroc")
    require_columns(rows, columns, what="The ablation's rows")
    own, found = rows[rows["change"] == OWN].reset_index(drop=True), []
    if odd := [name for name, its in rows.groupby("change") if len(its) != len(own)]:
        raise ValueError(
            f"Each change has a row for each of the {len(own)} samples with their own mask; not so "
            f"{listing(odd)}. Pass the rows of ablate_masks(...) whole."
        )
    for change in [name for name in rows["change"].unique() if name != OWN]:
        other = rows[rows["change"] == change].reset_index(drop=True)
        for vertebra in (ALL, *VERTEBRAE):
            of_level = own["vertebra"].eq(vertebra) | (vertebra == ALL)
            for metric, label, column in (
                ("probability_fractured", 1, "probability"),
                ("probability_intact", 0, "probability"),
                ("map_auroc", 1, "map_auroc"),
                ("map_similarity", 1, "similarity"),
            ):
                kept = of_level & (own["label"] == label)
                moved = (other[column] - own[column])[kept]
                limits = mean_by_patient(moved, own[UID][kept], confidence)
                was = float(own[column][kept].mean())
                found.append((change, vertebra, metric, *limits, was, int(moved.notna().sum())))
            found.append(
                (change, vertebra, "auroc", *_areas(own[of_level], other[of_level], confidence, seed))
            )
    return pd.DataFrame(found, columns=["change", "vertebra", "metric", "value", "low", "high", "own", "n"])


def _areas(
    own: pd.DataFrame, other: pd.DataFrame, confidence: float, seed: int
) -> tuple[float, float, float, float, int]:
    """Difference of the AUROC with its limits, the own one, and how many rows; NaN where it is undefined."""
    if own["label"].nunique() < 2:
        return np.nan, np.nan, np.nan, np.nan, len(own)
    first, second = (Cases.of(each.assign(split="test")) for each in (own, other))
    table = compare(first, second, threshold=None, keep_undefined=True, confidence=confidence, seed=seed)
    row = table[table["metric"] == "auroc"].iloc[0]
    difference, low, high, value = row[["difference", "low", "high", "value"]].tolist()
    return difference, low, high, value, len(own)


# ----------------------------------------------------------------------------------------- the neighbours


def broken_neighbour(labels: pd.DataFrame) -> NDArray[np.bool_]:
    """Whether a vertebra next to a row's own is fractured, (N,).

    Args:
        labels: StudyInstanceUID, vertebra and label of all vertebrae of each study.

    Raises:
        ValueError: columns are missing, vertebrae unknown, or labels other than 0 and 1.

    Example:
        >>> table = pd.DataFrame({UID: "1.1", "vertebra": list(VERTEBRAE), "label": [0, 1, 0, 0, 0, 0, 0]})
        >>> broken_neighbour(table).tolist()
        [True, False, True, False, False, False, False]
    """
    require_columns(labels, (UID, "vertebra", "label"), what="The labels")
    if unknown := [name for name in labels["vertebra"].unique() if name not in VERTEBRAE]:
        raise ValueError(f"Neighbours are vertebrae, C1 … C7; found {listing(unknown)}. Leave them out.")
    if not (known := labels["label"].isin((0, 1))).all():
        raise ValueError(
            f"Labels are 0 or 1; {(~known).sum()} are not: {listing(labels.loc[~known, 'label'].unique())}. "
            "Leave out the studies whose truth is unknown."
        )
    uids, places = labels[UID].tolist(), labels["vertebra"].map(VERTEBRAE.index).tolist()
    broken = {(uid, place) for uid, place, label in zip(uids, places, labels["label"], strict=True) if label}
    beside = [
        (uid, place - 1) in broken or (uid, place + 1) in broken
        for uid, place in zip(uids, places, strict=True)
    ]
    return np.array(beside, dtype=bool)


def neighbour_effect(
    predictions: pd.DataFrame,
    *,
    threshold: float,
    exposed: Sequence[bool] | NDArray[np.bool_] | None = None,
    confidence: float = 0.95,
    seed: int = 0,
) -> pd.DataFrame:
    """False alarms of intact vertebrae with and without a broken neighbour, by vertebra.

    Args:
        predictions: StudyInstanceUID, vertebra, label and probability of all vertebrae of each study; a study
            is a patient.
        threshold: a vertebra is called fractured from here on.
        exposed: of each row, whether its neighbour counts as broken, such as where its sequence shows broken
            bone of another vertebra; None: the `broken_neighbour`.
        confidence: of the intervals.
        seed: of the resampling.

    Returns:
        Three rows a vertebra ("all", C1 … C7): `vertebra`, `neighbour` ("broken", "intact", and "difference",
        broken − intact), `value` (share of intact vertebrae called fractured), `low, high` over patients,
        `alarms, n, patients`. NaN where there is none.

    Raises:
        ValueError: columns or probabilities are missing, the threshold is none, or `exposed` has another
            length; see `broken_neighbour`.

    Example:
        >>> found = neighbour_effect(predictions[predictions["split"] == "test"], threshold=0.5)
        >>> found["neighbour"].unique().tolist()
        ['broken', 'intact', 'difference']
    """
    require_columns(predictions, (UID, "vertebra", "label", "probability"), what="The predictions")
    check_threshold(threshold)
    if (missing := predictions["probability"].isna()).any():
        raise ValueError(
            f"{missing.sum()} of {len(missing)} probabilities are missing. Predict these samples again."
        )
    beside = broken_neighbour(predictions) if exposed is None else np.asarray(exposed, dtype=bool)
    if beside.shape != (len(predictions),):
        raise ValueError(
            f"exposed holds one value a row, {len(predictions)}; found {beside.shape}. Make it of these rows."
        )
    alarm = (predictions["probability"] >= threshold).to_numpy()
    intact, level = (predictions["label"] == 0).to_numpy(), predictions["vertebra"].to_numpy()
    patient, uids = pd.factorize(predictions[UID])
    found = []
    for vertebra in (ALL, *VERTEBRAE):
        rows = intact & ((level == vertebra) | (vertebra == ALL))
        groups = [rows & ~beside, rows & beside]  # difference: second − first
        sums = [np.bincount(patient, each, len(uids)) for part in groups for each in (part & alarm, part)]
        alarms, n = (np.array([each.sum() for each in sums[k::2]]) for k in (0, 1))
        whose = np.array([(each > 0).sum() for each in sums[1::2]])
        drawn = resampled(np.stack(sums, axis=1).astype(float), _RESAMPLES, seed)
        with np.errstate(invalid="ignore"):  # a vertebra without such a neighbour
            value, draws = alarms / n, drawn[:, ::2].T / drawn[:, 1::2].T
        low, high = share_limits(value, draws, n, whose, confidence)
        limits = [(low[k : k + 1], high[k : k + 1]) for k in (0, 1)]
        apart = difference_limits([value[:1], value[1:]], limits, [draws[:1], draws[1:]])
        for k, name in ((1, "broken"), (0, "intact")):
            found.append((vertebra, name, value[k], low[k], high[k], alarms[k], n[k], whose[k]))
        both = value[1] - value[0], apart[0][0], apart[1][0]
        found.append((vertebra, "difference", *both, alarms.sum(), n.sum(), np.nan))
    columns = ["vertebra", "neighbour", "value", "low", "high", "alarms", "n", "patients"]
    return pd.DataFrame(found, columns=columns)
