"""The loss of the RSNA 2022 competition, so that a run can be placed among published results."""

import numpy as np
import pandas as pd

from cspine_helpers.evaluation.cases import at_level, patient_level
from cspine_helpers.files.paths import listing
from cspine_helpers.labels import UID, VERTEBRAE
from cspine_helpers.metrics import log_losses

VERTEBRA_WEIGHT, PATIENT_WEIGHT = 1.0, 7.0  # of an intact one; twice as much where fractured


def rsna_terms(predictions: pd.DataFrame, *, patient: pd.Series | None = None) -> pd.DataFrame:
    """Each study's eight terms of the loss, summed, and the sum of their weights.

    Args:
        predictions: predictions table, all seven vertebrae of every study.
        patient: the patients' probabilities by study UID; those of `metrics.patient_level` where not given:
            the model's own where it has them (rows `patient_overall`), else the highest of the vertebrae.

    Returns:
        Columns `loss, weight` by study UID, in the order of first appearance.

    Raises:
        ValueError: a study without all seven vertebrae, or with one twice, or without a patient probability.
    """
    vertebrae = at_level(predictions, "all")
    held = vertebrae.groupby(UID)["vertebra"].agg(["nunique", "size"])
    held = held.reindex(predictions[UID].unique(), fill_value=0)
    incomplete, repeated = held["nunique"] != len(VERTEBRAE), held["size"] > held["nunique"]
    if incomplete.any():
        raise ValueError(
            f"{incomplete.sum()} studies lack some of C1…C7, so that the competition's loss is not defined: "
            f"{listing(held.index[incomplete])}. Drop them."
        )
    if repeated.any():
        raise ValueError(
            f"{repeated.sum()} studies hold a vertebra twice: {listing(held.index[repeated])}. Keep one row."
        )
    whole = patient_level(predictions).set_index(UID)
    if patient is not None:
        absent = whole.index.difference(patient.index)
        if len(absent):
            raise ValueError(
                f"{len(absent)} studies have no patient probability: {listing(absent)}. Add them."
            )
        whole["probability"] = patient.loc[whole.index]
    terms = pd.concat([vertebrae.set_index(UID), whole], keys=["vertebra", "patient"], names=["level"])
    of_patient = terms.index.get_level_values("level") == "patient"
    weight = np.where(of_patient, PATIENT_WEIGHT, VERTEBRA_WEIGHT) * (1 + terms["label"].to_numpy())
    loss = weight * log_losses(terms["label"], terms["probability"])
    studies = terms.index.get_level_values(UID)
    return pd.DataFrame({"loss": loss, "weight": weight}).groupby(studies, sort=False).sum()


def rsna_weighted_log_loss(
    predictions: pd.DataFrame, *, patient: pd.Series | None = None, per_patient: bool = False
) -> float:
    """Weighted log loss of the RSNA 2022 competition.

    Weights: a vertebra 1 where intact and 2 where fractured, the patient 7 and 14. Probabilities are kept
    one rounding error away from 0 and 1, where the loss would be infinite; `metrics.clip_note` says how many
    terms that decides.

    Args:
        predictions: predictions table, all seven vertebrae of every study.
        patient: see `rsna_terms`.
        per_patient: average each patient's eight terms by weight, then the patients alike, as the
            participants' public code did; else all terms of all patients by weight at once.

    Raises:
        ValueError: see `rsna_terms`.

    Example:
        >>> rsna_weighted_log_loss(predictions[predictions["split"] == "validation"])

    Source: RSNA 2022 Cervical Spine Fracture Detection, competition page, "Evaluation".
    """
    sums = rsna_terms(predictions, patient=patient)
    if per_patient:
        return float((sums["loss"] / sums["weight"]).mean())
    return float(sums["loss"].sum() / sums["weight"].sum())


# An example of costs: level → what the loss of RSNA 2022 weighs a miss and a false alarm with.
RSNA_COSTS = {
    level: {"cost_miss": 2 * weight, "cost_false_alarm": weight}
    for level, weight in (("vertebra", VERTEBRA_WEIGHT), ("patient", PATIENT_WEIGHT))
}
