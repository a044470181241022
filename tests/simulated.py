"""Simulated patients whose vertebrae go together: some patients break more, some are harder to read."""

import numpy as np
import pandas as pd
from scipy.special import expit
from scipy.stats import beta

from cspine_helpers.decisions.thresholds import Rule, choose_decision
from cspine_helpers.evaluation.cases import Cases
from cspine_helpers.files.paths import sha256_of
from cspine_helpers.files.records import write_sealed
from cspine_helpers.labels import UID, VERTEBRAE
from cspine_helpers.predictions import write_predictions
from cspine_helpers.runs import RADIOGRAPHS


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


def image_table(many=160, *, seed=0, unit="image", splits=("validation", "test"), prevalence=0.25):
    """A predictions table of radiographs: `many` patients a split, 1 to 4 images each that go together."""
    rng, parts = np.random.default_rng(seed), []
    for split in splits:
        images = rng.integers(1, 5, many)
        whose = np.repeat(np.arange(many), images)
        label = (rng.random(many) < prevalence)[whose] & (rng.random(len(whose)) < 0.9)
        logit = -2 + 3 * label + rng.normal(size=many)[whose] + rng.normal(size=len(whose))
        names = {UID: [f"{split}.{n}" for n in range(len(whose))], "vertebra": unit, "split": split}
        values = {"label": label.astype(int), "probability": expit(logit).round(6)}
        patient = {"patient": [f"{split}-group{n}" for n in whose]}
        parts.append(pd.DataFrame(names | values | patient))
    return pd.concat(parts, ignore_index=True)


def radiograph_run(folder, table, **changes):
    """A run of radiographs as training leaves it, without a network, and with the table's predictions."""
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"weights: by their hash alone")
    (folder / "history.csv").write_text("epoch,train_loss\n1,0.5\n2,0.25\n")
    hashes = {
        "weights_sha256": sha256_of(folder / "model.safetensors"),
        "history_sha256": sha256_of(folder / "history.csv"),
    }
    source = {"name": "limbs", "label_1": "fractured", "citation": "Doe 2023", "licence": "CC BY 4.0"}
    counts = {"images": 100, "patients": 40, "fractured": 20, "fractured_patients": 10}
    record = {
        "format": 1,
        "record_sha256": "",
        "task": RADIOGRAPHS,
        "model": {"architecture": "decoder", "backbone": "lite0", "long": 384, "short": 320},
        "train": {"epochs": 5, "seed": 3},
        "data": {"cohort": "limbs", "labels_sha256": "a" * 64, "split_sha256": "b" * 64},
        "cohort": {"counts": {"train": counts}, "sources": [source]},
        "decision": choose_decision(table, Rule(precision_floor=0.4)).record(),
        "best_epoch": 2,
        "left_out": {},
    }
    write_sealed(folder / "run.json", record | hashes | changes)
    write_predictions(table, folder / "predictions.csv")
    return folder


def cases_of(labels, probabilities, patient, patients):
    """Vertebrae of patients by their number, with no check: fast, and some patients may have none."""
    names = np.arange(patients).astype(str)
    studies = pd.DataFrame({"patient": names, "split": "validation", "label": 0}, index=names)
    count = np.bincount(patient, minlength=patients)
    whose, unit = names[patient], np.full(len(labels), "C1")
    split = np.full(len(labels), "validation")
    studies = studies.assign(own=np.nan, vertebrae=count)
    return Cases(whose, whose, unit, np.ravel(labels), np.ravel(probabilities), split, "vertebra", studies)


def patients_of(probabilities, labels, split="validation"):
    """Cases of patients from two columns."""
    columns = {UID: [f"1.{n}" for n in range(len(labels))], "vertebra": "C1", "split": split}
    table = pd.DataFrame(columns).assign(label=np.asarray(labels), probability=np.asarray(probabilities))
    return Cases.of(table.astype({"label": int}), level="patient")


def cohort(seed=0, many=60, **options):
    """A predictions table of simulated patients."""
    return table_of(*patients(np.random.default_rng(seed), many, **options))


def calibrated(rng, many, *, vertebrae=7, intercept=0.0, slope=1.0):
    """Chances of a fracture, labels and probabilities, (many, vertebrae) each.

    A patient's vertebrae share how hard they fell, and where the patient lies among all who have such
    chances. Probabilities are the chances, with the logit stretched and shifted: calibrated, unless asked.
    """
    own, middle = ((0.0, 1.5), -0.1) if vertebrae == 1 else ((1.2, 1.0), -2.2)
    logit = middle + own[0] * rng.normal(size=(many, 1)) + own[1] * rng.normal(size=(many, vertebrae))
    chance, place = expit(logit), rng.random((many, 1))
    labels = rng.random((many, vertebrae)) < beta.ppf(place, 3 * chance, 3 * (1 - chance))
    return chance, labels.astype(int), expit(intercept + slope * logit)


def calibration_truth(intercept=0.0, slope=1.0, *, vertebrae=7, many=60_000, bins=10):
    """Bias, slope, Brier score, binned calibration error (root mean square) of `calibrated`, by number."""
    rng = np.random.default_rng(99)
    chance, _, p = calibrated(rng, many, vertebrae=vertebrae, intercept=intercept, slope=slope)
    bin_of = np.searchsorted(np.quantile(p, np.arange(1, bins) / bins), p).ravel()
    gaps = np.bincount(bin_of, (p - chance).ravel()) / np.bincount(bin_of)
    other = shaken(rng, p)
    return {
        "bias": (p - chance).mean(),
        "slope": 1 / slope,
        "brier": ((p - chance) ** 2 + chance * (1 - chance)).mean(),
        "ece": np.sqrt(np.mean(gaps**2)),
        "other": ((other - chance) ** 2 - (p - chance) ** 2).mean(),
        "constant": ((chance.mean() - chance) ** 2 - (p - chance) ** 2).mean(),
        "prevalence": chance.mean(),
    }


def shaken(rng, p):
    """Another model's probabilities: the same with noise on the logit."""
    return expit(np.log(p / (1 - p)) + 0.5 * rng.normal(size=p.shape))
