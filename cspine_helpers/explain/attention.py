"""What the model attended to, and how well that localises the slices that show the fracture."""

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from cspine_helpers.checkpoints import Run
from cspine_helpers.dataset.sequence import SequenceDataset, make_loader
from cspine_helpers.evaluation.cases import Cases
from cspine_helpers.evaluation.intervals import bootstrap, compare
from cspine_helpers.evaluation.resampling import mean_by_patient, share_by_patient
from cspine_helpers.files.paths import listing
from cspine_helpers.files.tables import require_columns
from cspine_helpers.labels import UID
from cspine_helpers.metrics import auroc
from cspine_helpers.model.forward import forward_pass
from cspine_helpers.packed import read_manifest

COLUMNS = (UID, "vertebra", "label", "probability", "slice", "attention", "fractured")
_ROUNDING = 1e-4  # of a probability, between machines and batches; measured: 1e-7
SUMMARY = (
    "score", "attention", "attention_low", "attention_high",
    "profile", "uniform", "difference", "low", "high",
)  # fmt: skip
SCORES = (
    UID, "vertebra", "probability",
    "auroc", "share", "top1", "profile_auroc", "profile_share", "profile_top1", "uniform_share",
)  # fmt: skip


def attention_table(
    run: Run,
    samples: pd.DataFrame,
    packed_dir: str | Path,
    *,
    batch_size: int = 16,
    predictions: pd.DataFrame | None = None,
) -> pd.DataFrame:
    """Attention of a run's model for each slice of some samples.

    Args:
        run: of `checkpoints.load_run`.
        samples: StudyInstanceUID, vertebra and label, as `labels.expand` makes them.
        packed_dir: the cohort's `packed` folder; its manifest, where it has one, knows the truth.
        batch_size: sequences at a time.
        predictions: the run's table, to show its probabilities: computed on another machine, or in other
            batches, they round otherwise, which matters at the threshold.

    Returns:
        One row a slice, T rows a sample in the samples' order: StudyInstanceUID, vertebra, label,
        probability (of the whole vertebra), slice (0 … T − 1, cranial first), attention (sums to 1 over a
        sample's slices), fractured (1, 0, or NaN where unknown).

    Raises:
        ValueError: the predictions lack samples, or are not this run's; names them.

    Example:
        >>> table = attention_table(run, cohort.samples["test"], cohort.packed)
        >>> sorted(table["slice"].unique().tolist())
        [0, 1, 2, 3, 4]
    """
    manifest = read_manifest(packed_dir) if (Path(packed_dir) / "manifest.csv").is_file() else None
    slices, size = run.config.slices, run.config.size
    dataset = SequenceDataset(samples, packed_dir, slices=slices, size=size, manifest=manifest)
    outputs = [output for _, output in forward_pass(run.model, make_loader(dataset, batch_size=batch_size))]
    probability, weights = (
        torch.cat([getattr(output, name) for output in outputs]).double().cpu().numpy()
        for name in ("probability", "attention")
    )
    if predictions is not None:
        probability = stored_probability(predictions, samples, probability)
    each = samples[[UID, "vertebra", "label"]].assign(probability=probability)
    table = each.loc[each.index.repeat(slices)].reset_index(drop=True)
    table["slice"] = np.tile(np.arange(slices), len(samples))
    table["attention"] = weights.ravel()
    table["fractured"] = dataset.slice_truth.ravel()
    return table[list(COLUMNS)]


def stored_probability(
    predictions: pd.DataFrame, samples: pd.DataFrame, computed: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Probabilities of the samples in a table, once they are those computed, up to rounding."""
    require_columns(predictions, (UID, "vertebra", "probability"), what="The table of predictions")
    if (twice := predictions.duplicated([UID, "vertebra"])).any():
        names = listing(
            f"{uid} {vertebra}" for uid, vertebra in predictions.loc[twice, [UID, "vertebra"]].to_numpy()
        )
        raise ValueError(f"The predictions hold {twice.sum()} samples twice: {names}. Keep one row of each.")
    asked = pd.MultiIndex.from_frame(samples[[UID, "vertebra"]])
    stored = predictions.set_index([UID, "vertebra"])["probability"].reindex(asked).to_numpy()
    if (off := ~(np.abs(stored - computed) <= _ROUNDING)).any():
        names = listing(f"{uid} {vertebra}" for uid, vertebra in asked[off])
        raise ValueError(
            f"The predictions are not this run's: {off.sum()} of {len(asked)} samples are missing, or differ "
            f"by more than {_ROUNDING:g}: {names}. Predict again with notebook 03, or leave them out."
        )
    return stored


def intact_profile(table: pd.DataFrame) -> NDArray[np.float64]:
    """Mean attention over intact vertebrae of a row's level and slice: what attention has to beat.

    Fractures have favourite places, so that a model may score well by always attending there. This profile
    knows the places and no fracture.

    Args:
        table: of `attention_table`.

    Returns:
        For each row of the table, (N,); the mean of all levels where a level has no intact vertebra, NaN
        where none is intact.
    """
    intact = table[table["label"] == 0]
    overall = table["slice"].map(intact.groupby("slice")["attention"].mean())
    means = intact.groupby(["vertebra", "slice"])["attention"].mean().rename("profile").reset_index()
    own = table[["vertebra", "slice"]].merge(means, how="left", on=["vertebra", "slice"])["profile"]
    return np.where(own.notna(), own, overall.to_numpy())


def sequence_scores(table: pd.DataFrame) -> pd.DataFrame:
    """How well attention localises fractured slices, for each sequence that has fractured and intact ones.

    Args:
        table: of `attention_table`, intact vertebrae included, as the `intact_profile` is theirs.

    Returns:
        StudyInstanceUID, vertebra, probability; `auroc`, of the weights for slices being fractured; `share`,
        the weight on fractured slices; `top1`, 1 where the slice of most weight is fractured; the same three
        for the `intact_profile`, `profile_auroc` and so on; `uniform_share`, what uniform weights would put
        on fractured slices. Empty where no truth is known.

    Raises:
        ValueError: columns are missing.

    Example:
        >>> scores = sequence_scores(attention_table(run, cohort.samples["test"], cohort.packed))
        >>> scores["auroc"].between(0, 1).all()
        np.True_
    """
    require_columns(table, COLUMNS, what="The attention table")
    rows, weighed = [], table.assign(profile=intact_profile(table))
    for (uid, vertebra), slices in weighed.groupby([UID, "vertebra"], sort=False):
        truth = slices["fractured"].to_numpy()
        if np.isnan(truth).any() or truth.min() == truth.max():
            continue
        found: list[float] = []
        for weight in (slices["attention"].to_numpy(), slices["profile"].to_numpy()):
            if np.isnan(weight).any():
                found += [np.nan] * 3
            else:
                share = weight[truth == 1].sum() / weight.sum()
                found += [auroc(truth, weight), share, truth[weight.argmax()]]
        rows.append((uid, vertebra, slices["probability"].iloc[0], *found, truth.mean()))
    return pd.DataFrame(rows, columns=list(SCORES))


def attention_scores(table: pd.DataFrame, *, confidence: float = 0.95) -> pd.DataFrame:
    """Summary of `sequence_scores`, beside what the `intact_profile` and uniform weights score.

    Agreement with the slice truth is no discovery where the truth was a training target (the slice loss).

    Args:
        table: of `attention_table`, intact vertebrae included.
        confidence: of the intervals.

    Returns:
        Four rows: the AUROC's mean over sequences; the AUROC of all their slices together; the share of
        weight on fractured slices; how often the slice of most weight is fractured. Columns `score`,
        `attention`, `attention_low` and `attention_high` (its interval), `profile`, `uniform`, `difference`
        (attention − profile), `low` and `high` (that one's interval), `sequences`. Intervals resample
        patients; NaN of fewer than two patients, and of profile and difference without intact vertebrae.

    Raises:
        ValueError: no sequence can be scored.

    Example:
        >>> table = attention_table(run, cohort.samples["train"], cohort.packed)
        >>> attention_scores(table)["uniform"].round(2).tolist()
        [0.5, 0.5, 0.4, 0.4]
    """
    each = sequence_scores(table)
    if each.empty:
        raise ValueError(
            "No sequence has both fractured and intact slices that are known, so attention cannot be scored. "
            "Use a cohort whose manifest holds slice_truth, such as the built-in one."
        )
    weighed = table.assign(profile=intact_profile(table)).merge(each[[UID, "vertebra"]], on=[UID, "vertebra"])
    known = bool(each["profile_auroc"].notna().all())
    patients, uniform_share = each[UID].to_numpy(), each["uniform_share"].mean()
    rows: list[tuple[float | str, ...]] = []
    for title, name, uniform in (
        ("AUROC, mean of sequences", "auroc", 0.5),
        ("weight on fractured slices", "share", uniform_share),
        ("top slice is fractured", "top1", uniform_share),
    ):
        value, null = (each[column].to_numpy(np.float64) for column in (name, f"profile_{name}"))
        own = (share_by_patient if name == "top1" else mean_by_patient)(value, patients, confidence)
        more = mean_by_patient(value - null, patients, confidence)
        rows.append((title, *own, float(null.mean()) if known else np.nan, uniform, *more))
    rows.insert(1, ("AUROC, all slices together", *_pooled(weighed, confidence, is_known=known)))
    return pd.DataFrame(rows, columns=list(SUMMARY)).assign(sequences=len(each))


def _pooled(weighed: pd.DataFrame, confidence: float, *, is_known: bool) -> tuple[float, ...]:
    """AUROC of all slices together, as the other rows of `attention_scores` have theirs."""
    own = auroc(weighed["fractured"], weighed["attention"])
    null = auroc(weighed["fractured"], weighed["profile"]) if is_known else np.nan
    limits, over = (np.nan, np.nan), (np.nan, np.nan)
    if len(weighed[UID].unique()) > 1:
        rows = pd.DataFrame({UID: [f"slice.{n}" for n in range(len(weighed))], "vertebra": "image"})
        rows = rows.assign(
            split="all", patient=weighed[UID].to_numpy(), label=weighed["fractured"].to_numpy(int)
        )
        cases = Cases.of(rows.assign(probability=weighed["attention"].clip(0, 1).to_numpy()))
        limits = _limits(bootstrap(cases, threshold=None, confidence=confidence))
        if is_known:
            profile = cases.with_probability(weighed["profile"].clip(0, 1))
            over = _limits(compare(profile, cases, threshold=None, confidence=confidence))
    return own, *limits, null, 0.5, own - null, *over


def _limits(found: pd.DataFrame) -> tuple[float, float]:
    """Of the AUROC, in a table of `evaluation.intervals`."""
    low, high = found.loc[found["metric"] == "auroc", ["low", "high"]].to_numpy()[0]
    return float(low), float(high)


def without_attention(run: Run) -> Run:
    """The run with uniform weights instead of its attention, all else the same: what attention adds.

    Example:
        >>> table = attention_table(without_attention(run), cohort.samples["test"], cohort.packed)
        >>> np.allclose(table["attention"], 1 / 5)
        True
    """
    model = copy.deepcopy(run.model)
    with torch.no_grad():
        for parameter in model.attention[-1].parameters():
            parameter.zero_()  # equal scores for all slices
    return replace(run, model=model)
