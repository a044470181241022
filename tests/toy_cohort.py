"""A tiny cohort that a network can learn in seconds: fractured slices have a bright bar."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from cspine_helpers.labels import PATIENT, UID, VERTEBRAE, write_labels
from cspine_helpers.packed import MANIFEST_COLUMNS, read_manifest, write_manifest, write_sequence
from cspine_helpers.splits import split_patients, write_split

if TYPE_CHECKING:
    from cspine_helpers.model.classifier import ModelConfig

SLICES, SIZE = 5, 32


def tiny_model() -> "ModelConfig":
    """A model for the toy cohort; asked for, so that tests without a model need not import torch."""
    from cspine_helpers.model.classifier import ModelConfig

    return ModelConfig(
        backbone="tf_efficientnetv2_b0",
        slices=SLICES,
        size=SIZE,
        feature_stride=4,
        pooling="avgmax",
        mask_features=4,
        lstm_hidden=8,
        lstm_layers=1,
    )


def make_toy_cohort(
    folder: Path, *, studies: int = 10, seed: int = 0, uids: Sequence[str] | None = None
) -> Path:
    """Labels, split, packed sequences and manifest of a few studies, three of them without a fracture."""
    rng = np.random.default_rng(seed)
    labels = (rng.random((studies, len(VERTEBRAE))) < 0.4).astype(int)
    labels[:3] = 0
    table = pd.DataFrame(labels, columns=list(VERTEBRAE))
    table.insert(0, PATIENT, labels.max(axis=1))
    table.insert(0, UID, uids or [f"1.2.826.{study}" for study in range(studies)])
    write_labels(table, folder / "train.csv")
    write_split(split_patients(table, seed=seed), folder / "split.csv")
    rows = []
    for uid, values in zip(table[UID], labels, strict=True):
        for vertebra, fractured in zip(VERTEBRAE, values, strict=True):
            array, truth = toy_sequence(rng, fractured=bool(fractured))
            write_sequence(folder / "packed", uid, vertebra, array)
            rows.append([uid, vertebra, *[1.0] * (len(MANIFEST_COLUMNS) - 3), truth])
    write_manifest(pd.DataFrame(rows, columns=list(MANIFEST_COLUMNS)), folder / "packed")
    return folder


def half_marked(cohort: Path, folder: Path) -> Path:
    """A copy of a cohort in which nobody marked the slices of every other fractured vertebra."""
    shutil.copytree(cohort, folder)
    manifest = read_manifest(folder / "packed")
    marked = manifest.index[manifest["slice_truth"].str.contains("x", na=False)]
    manifest.loc[marked[::2], "slice_truth"] = None
    write_manifest(manifest, folder / "packed")
    return folder


def toy_sequence(rng: np.random.Generator, *, fractured: bool) -> tuple[np.ndarray, str]:
    """A noisy `(T, H, W, 6)` sequence with a square mask, and its slice truth."""
    array = rng.integers(60, 120, (SLICES, SIZE, SIZE, 6), dtype=np.uint8)
    array[..., 5] = 0
    array[:, 8:24, 8:24, 5] = 255
    if not fractured:
        return array, "." * SLICES
    array[1:3, 10:22, 14:18, :5] = 240
    return array, ".xx" + "." * (SLICES - 3)
