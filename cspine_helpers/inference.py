"""A run applied to packed sequences: a table for many studies, or the answer for one."""

from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from tqdm.auto import tqdm

from cspine_helpers.checkpoints import Run
from cspine_helpers.dataset import SequenceDataset, make_loader
from cspine_helpers.labels import UID, VERTEBRAE
from cspine_helpers.packed import check_sequences, sequence_path
from cspine_helpers.paths import listing
from cspine_helpers.predictions import validate_predictions


def predict(
    run: Run,
    samples: pd.DataFrame,
    packed_dir: str | Path,
    *,
    split: str,
    batch_size: int = 16,
    workers: int = 0,
) -> pd.DataFrame:
    """Predictions table of a run for labelled samples.

    The model computes where it lies (`run.model.to("cuda")` moves it).

    Args:
        run: of `checkpoints.load_run`.
        samples: StudyInstanceUID, vertebra and label, as `labels.expand` makes them.
        packed_dir: the cohort's `packed` folder.
        split: name of the split that the samples belong to.
        batch_size: sequences computed at once.
        workers: processes that load; 0 loads in this one.

    Returns:
        StudyInstanceUID, vertebra, split, label, probability; rows as in `samples`.

    Raises:
        ValueError: packed sequences are missing or cannot be used; names them.
    """
    check_sequences(packed_dir, samples, slices=run.config.slices, size=run.config.size)
    table = samples[[UID, "vertebra"]].assign(split=split, label=samples["label"])
    table["probability"] = _probabilities(run, samples, packed_dir, batch_size, workers)
    return validate_predictions(table)


@torch.inference_mode()
def _probabilities(
    run: Run, samples: pd.DataFrame, packed_dir: str | Path, batch_size: int, workers: int
) -> list[float]:
    """Probability of fracture of each sample, in their order."""
    dataset = SequenceDataset(samples, packed_dir, slices=run.config.slices, size=run.config.size)
    loader = make_loader(dataset, batch_size=batch_size, workers=workers)
    model, device = run.model.eval(), next(run.model.parameters()).device
    found: list[float] = []
    for batch in tqdm(loader, desc="predict", leave=False):
        output = model(batch["sequence"].to(device), batch["vertebra"].to(device))
        found += output.logit.double().sigmoid().tolist()
    return found


@dataclass(frozen=True)
class StudyPrediction:
    """What a run says of one study.

    Attributes:
        uid: StudyInstanceUID.
        threshold: probability from which a vertebra counts as fractured.
        probability: vertebra → probability of a fracture, for the vertebrae present.
        missing: vertebrae without a packed sequence; nothing is said of them.
    """

    uid: str
    threshold: float
    probability: dict[str, float]
    missing: tuple[str, ...]

    @property
    def fractured(self) -> dict[str, bool]:
        """Vertebra → whether its probability reaches the threshold."""
        return {vertebra: value >= self.threshold for vertebra, value in self.probability.items()}

    @property
    def patient_probability(self) -> float:
        """The highest probability among the vertebrae present."""
        return max(self.probability.values())

    @property
    def patient_positive(self) -> bool:
        """Whether any vertebra present counts as fractured, at the vertebra threshold."""
        return self.patient_probability >= self.threshold

    @property
    def complete(self) -> bool:
        """Whether all seven vertebrae were seen; if not, a negative answer is no all-clear."""
        return not self.missing


def predict_study(
    run: Run, packed_dir: str | Path, uid: str, *, threshold: float | None = None
) -> StudyPrediction:
    """Answer for one study, from the vertebrae that are packed.

    Args:
        run: of `checkpoints.load_run`.
        packed_dir: folder of the packed sequences.
        uid: StudyInstanceUID.
        threshold: probability from which a vertebra counts as fractured; None: the run's.

    Raises:
        FileNotFoundError: none of the study's vertebrae is packed.
        ValueError: a packed sequence cannot be used; the threshold is outside [0, 1]; or there is none.
    """
    if threshold is None:
        threshold = run.threshold
    if threshold is None:
        raise ValueError(
            f"The run at {run.folder} has no threshold: {run.record['decision']['reason']} Pass threshold=..."
        )
    if not 0 <= threshold <= 1:
        raise ValueError(f"A threshold lies in [0, 1]; found {threshold}. Pass another.")
    present = [name for name in VERTEBRAE if sequence_path(packed_dir, uid, name).is_file()]
    if not present:
        names = listing(sequence_path(packed_dir, uid, name).name for name in VERTEBRAE)
        raise FileNotFoundError(
            f"Study {uid!r} has no packed sequence in {packed_dir}: none of {names}. Pack it first."
        )
    samples = pd.DataFrame({UID: uid, "vertebra": present, "label": 0})  # no label is known or used
    check_sequences(packed_dir, samples, slices=run.config.slices, size=run.config.size)
    values = _probabilities(run, samples, packed_dir, len(present), workers=0)
    return StudyPrediction(
        uid=uid,
        threshold=float(threshold),
        probability=dict(zip(present, values, strict=True)),
        missing=tuple(name for name in VERTEBRAE if name not in present),
    )
