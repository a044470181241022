"""What the model attended to, and how well that finds the slices that show the fracture."""

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from cspine_helpers.batches import make_loader
from cspine_helpers.checkpoints import Run
from cspine_helpers.dataset import SequenceDataset
from cspine_helpers.labels import UID
from cspine_helpers.manifest import read_manifest
from cspine_helpers.metrics import auroc
from cspine_helpers.tables import require_columns

COLUMNS = (UID, "vertebra", "label", "probability", "slice", "attention", "fractured")
SCORES = (UID, "vertebra", "probability", "auroc", "share", "uniform_share", "top1")


def attention_table(
    run: Run, samples: pd.DataFrame, packed_dir: str | Path, *, batch_size: int = 16
) -> pd.DataFrame:
    """Attention of a run's model for each slice of some samples.

    Args:
        run: of `checkpoints.load_run`.
        samples: StudyInstanceUID, vertebra and label, as `labels.expand` makes them.
        packed_dir: the cohort's `packed` folder; its manifest, where it has one, knows the truth.
        batch_size: sequences at a time.

    Returns:
        One row a slice, T rows a sample in the samples' order: StudyInstanceUID, vertebra, label,
        probability (of the whole vertebra), slice (0 … T − 1, cranial first), attention (sums to 1 over a
        sample's slices), fractured (1, 0, or NaN where unknown).
    """
    manifest = read_manifest(packed_dir) if (Path(packed_dir) / "manifest.csv").is_file() else None
    slices, device = run.config.slices, next(run.model.parameters()).device
    dataset = SequenceDataset(samples, packed_dir, slices=slices, size=run.config.size, manifest=manifest)
    probabilities, weights = [], []
    run.model.eval()
    with torch.inference_mode():
        for batch in make_loader(dataset, batch_size=batch_size):
            output = run.model(batch["sequence"].to(device), batch["vertebra"].to(device))
            probabilities.append(output.logit.double().sigmoid().cpu())
            weights.append(output.attention.double().cpu())
    each = samples[[UID, "vertebra", "label"]].assign(probability=torch.cat(probabilities).numpy())
    table = each.loc[each.index.repeat(slices)].reset_index(drop=True)
    table["slice"] = np.tile(np.arange(slices), len(samples))
    table["attention"] = torch.cat(weights).flatten().numpy()
    table["fractured"] = dataset.slice_truth.ravel()
    return table[list(COLUMNS)]


def sequence_scores(table: pd.DataFrame) -> pd.DataFrame:
    """How well attention finds the fractured slices, for each sequence that has some and not only such.

    Args:
        table: of `attention_table`.

    Returns:
        StudyInstanceUID, vertebra, probability; `auroc`, how often a fractured slice has more weight than an
        intact one (ties count half); `share`, the weight on fractured slices; `uniform_share`, what uniform
        weights would put there; `top1`, 1 where the slice of most weight is fractured. Empty where no truth
        is known.

    Raises:
        ValueError: columns are missing.
    """
    require_columns(table, COLUMNS, what="The attention table")
    rows = []
    for (uid, vertebra), slices in table.groupby([UID, "vertebra"], sort=False):
        truth, weight = slices["fractured"].to_numpy(), slices["attention"].to_numpy()
        if np.isnan(truth).any() or truth.min() == truth.max():
            continue
        rows.append(
            {
                UID: uid,
                "vertebra": vertebra,
                "probability": slices["probability"].iloc[0],
                "auroc": auroc(truth, weight),
                "share": weight[truth == 1].sum() / weight.sum(),
                "uniform_share": truth.mean(),
                "top1": truth[weight.argmax()],
            }
        )
    return pd.DataFrame(rows, columns=list(SCORES))


def attention_scores(table: pd.DataFrame) -> pd.DataFrame:
    """Summary of `sequence_scores`, beside what uniform weights would score.

    Args:
        table: of `attention_table`.

    Returns:
        Four rows, `score`, `attention`, `uniform`, `sequences` (how many it is taken over): the AUROC's mean
        over sequences; the AUROC over all their slices together; the share of weight on fractured slices;
        how often the slice of most weight is fractured.

    Raises:
        ValueError: no sequence can be scored.
    """
    each = sequence_scores(table)
    if each.empty:
        raise ValueError(
            "No sequence has both fractured and intact slices that are known, so attention cannot be scored. "
            "Use a cohort whose manifest holds slice_truth, such as the built-in one."
        )
    slices = table.merge(each[[UID, "vertebra"]], on=[UID, "vertebra"])
    uniform_share = each["uniform_share"].mean()
    rows = [
        ("AUROC, mean of sequences", each["auroc"].mean(), 0.5),
        ("AUROC, all slices together", auroc(slices["fractured"], slices["attention"]), 0.5),
        ("weight on fractured slices", each["share"].mean(), uniform_share),
        ("top slice is fractured", each["top1"].mean(), uniform_share),
    ]
    return pd.DataFrame(rows, columns=["score", "attention", "uniform"]).assign(sequences=len(each))


def without_attention(run: Run) -> Run:
    """The run with uniform weights instead of its attention, all else the same: what the attention adds."""
    model = copy.deepcopy(run.model)
    with torch.no_grad():
        for parameter in model.attention[-1].parameters():
            parameter.zero_()  # equal scores for all slices
    return replace(run, model=model)
