"""Simulated patients whose vertebrae go together: some patients break more, some are harder to read."""

import numpy as np
import pandas as pd
from scipy.special import expit

from cspine_helpers.labels import UID, VERTEBRAE


def patients(rng, many, *, prevalence_logit=-3.0, separation=2.0, shared=1.5):
    """Labels and probabilities (many, 7); `shared` is what a patient's vertebrae have in common."""
    common = rng.normal(size=(many, 2)) * shared
    labels = (rng.random((many, 7)) < expit(prevalence_logit + common[:, :1])).astype(int)
    logit = -2 + separation * labels + common[:, 1:] + rng.normal(size=(many, 7))
    return labels, expit(logit)


def table_of(labels, probabilities, split="validation"):
    """A predictions table of (studies, 7) arrays, studies 1.0, 1.1, …"""
    rows = [(f"1.{study}", name, split) for study in range(len(labels)) for name in VERTEBRAE]
    table = pd.DataFrame(rows, columns=[UID, "vertebra", "split"])
    return table.assign(label=np.ravel(labels), probability=np.ravel(probabilities))


def cohort(seed=0, many=60, **options):
    """A predictions table of simulated patients."""
    return table_of(*patients(np.random.default_rng(seed), many, **options))
