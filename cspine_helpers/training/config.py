"""The recipe of a training: its settings, its optimizer, its learning rate, and which epoch it keeps."""

import math
from dataclasses import dataclass, field
from typing import Any, Literal, Self, get_args

import pandas as pd
import torch
from torch import nn

from cspine_helpers.dataset.augment import AugmentConfig
from cspine_helpers.dataset.sequence import Sampling
from cspine_helpers.files.records import (
    TRUE_OR_FALSE,
    Check,
    check_settings,
    one_of,
    optional,
    setting,
    whole,
    within,
)
from cspine_helpers.labels import VERTEBRAE

Schedule = Literal["cosine", "plateau"]
Tracker = Literal["none", "tensorboard"]
Precision = Literal["no", "bf16", "fp16", "auto"]
Keep = Literal["best", "last"]
BY_PREVALENCE, EQUAL = "prevalence", "equal"  # weights of the vertebrae in the loss; or seven numbers
_WEIGHT = within("(0, inf)")


def _are_weights(value: object) -> bool:
    if isinstance(value, tuple | list):
        return len(value) == len(VERTEBRAE) and all(map(_WEIGHT.holds, value))
    return value in (BY_PREVALENCE, EQUAL)


@dataclass(frozen=True)
class TrainerConfig:
    """What the trainer needs to know of a training, whatever is trained; a task's own settings come on top.

    Attributes:
        epochs: most passes over the training split.
        batch_size: samples in a batch of each process.
        fit_memory: on a GPU, the batch is the largest divisor of `batch_size · accumulate` that fits its
            memory, and `accumulate` makes up the rest; the record holds both.
        learning_rate: of AdamW, after the warm-up (Loshchilov and Hutter, ICLR 2019).
        weight_decay: of AdamW, on weight matrices and kernels (not on biases and norms).
        warmup_epochs: epochs in which the rate rises from 0; may be a fraction.
        schedule: after the warm-up: "cosine" falls to 0 at the last epoch (Loshchilov and Hutter, ICLR 2017),
            "plateau" falls by a factor after some epochs without a better validation average precision, as
            torch's `ReduceLROnPlateau` does.
        plateau_patience: epochs without a better one before the "plateau" schedule lowers the rate.
        plateau_factor: by which it multiplies the rate then.
        freeze_epochs: first epochs of the training, of all its stages, in which the backbone stays as it is,
            its BatchNorm statistics too.
        backbone_rate: learning rate of the backbone, as a share of that of the rest; 0.1 is usual for
            pretrained weights.
        ema: decay a step of the exponential moving average of the weights, such as 0.999, which is then
            validated and kept (timm's `ModelEmaV3`, see `trainer.Training`); 0 turns it off.
        accumulate: batches of each process whose gradients make one step, in every stage.
        clip_norm: largest norm of the gradient.
        mixed_precision: "auto" is bf16 on a GPU that has it, else float32 (a CPU without units for bf16 takes
            ten times as long with it, see benchmarks/RESULTS.md).
        gradient_checkpointing: the backbone's inner values are computed again for the gradients instead of
            kept: less memory, more time, the same result.
        keep: the epoch whose weights are kept: "best" by the validation split, see `best_epoch`; "last".
        patience: epochs without a new best epoch before training stops.
        seed: of weights, order, augmentation and dropout.
        tracker: "tensorboard" writes the history for TensorBoard, too, below the run's folder; "none".
        workers: processes that load training data; 0 loads in the training process.
    """

    epochs: int = setting(20, whole(1))
    batch_size: int = setting(8, whole(1))
    fit_memory: bool = setting(True, TRUE_OR_FALSE)
    learning_rate: float = setting(3e-4, within("(0, inf)"))
    weight_decay: float = setting(0.02, within("[0, inf)"))
    warmup_epochs: float = setting(1.0, within("[0, inf)"))
    schedule: Schedule = setting("cosine", one_of(*get_args(Schedule)))
    plateau_patience: int = setting(3, whole(1))
    plateau_factor: float = setting(0.5, within("(0, 1)"))
    freeze_epochs: int = setting(0, whole(0))
    backbone_rate: float = setting(1.0, within("(0, inf)"))
    ema: float = setting(0.0, within("[0, 1)"))
    accumulate: int = setting(2, whole(1))
    clip_norm: float = setting(1.0, within("(0, inf)"))
    mixed_precision: Precision = setting("auto", one_of(*get_args(Precision)))
    gradient_checkpointing: bool = setting(False, TRUE_OR_FALSE)
    keep: Keep = setting("best", one_of(*get_args(Keep)))
    patience: int = setting(6, whole(1))
    seed: int = setting(0, whole(0, 2**63 - 1))
    tracker: Tracker = setting("none", one_of(*get_args(Tracker)))
    workers: int = setting(8, whole(0))

    def __post_init__(self) -> None:
        check_settings(self)
        name = type(self).__name__
        if self.warmup_epochs >= self.epochs:
            raise ValueError(
                f"{name} cannot have warmup_epochs = {self.warmup_epochs} in {self.epochs} epochs. "
                "Warm up for fewer."
            )
        if self.freeze_epochs > self.all_epochs:
            raise ValueError(
                f"{name} cannot have freeze_epochs = {self.freeze_epochs} in a training of "
                f"{self.all_epochs} epochs. Freeze for fewer."
            )

    @property
    def all_epochs(self) -> int:
        """Epochs of all stages."""
        return self.epochs


@dataclass(frozen=True)
class TrainConfig(TrainerConfig):
    """How a run is trained; the defaults are for RSNA-size data on one GPU.

    Attributes:
        gamma: of the focal loss (Lin et al., ICCV 2017, where 2 was best); 0 is cross-entropy.
        alpha: weight of fractured vertebrae in (0, 1), intact ones weigh 1 − alpha; None: by prevalence.
        vertebra_weights: weight of each vertebra in the loss: "prevalence" lets rare fractures weigh more,
            see `losses.vertebra_weights`; "equal"; or seven numbers, C1 to C7.
        slice_weight: weight of the slice-level term of the loss; 0 turns it off.
        slice_epochs: epochs of slice-level pretraining, see `slices.SliceDataset`; 0: none.
        slice_samples: slices of such an epoch, half of them fractured; 0: each known fractured slice once,
            and as many intact ones.
        matched_slices: each fractured slice has an intact one of the same vertebra and position beside it.
        pseudo_label_after: slice epochs on known slices alone; before each later one the model labels the
            unknown slices of fractured vertebrae itself. 0: the first epoch takes the vertebra's label for
            that of each such slice. None: they are never shown.
        slice_batch_size: slices in a batch of the pretraining.
        slice_learning_rate: highest learning rate of the pretraining.
        sampling: order of the training samples, see `dataset.sequence.epoch_order`: "shuffle" each once;
            "balanced" fractured and intact ones equally often, with replacement; "weighted" those of each
            vertebra equally often, too (inverse class frequency, as for torch's `WeightedRandomSampler`).
        augment: how training sequences are varied; None leaves them as they are.
    """

    gamma: float = setting(2.0, within("[0, inf)"))
    alpha: float | None = setting(None, optional(within("(0, 1)")))
    vertebra_weights: str | tuple[float, ...] = setting(
        BY_PREVALENCE, Check(f"{BY_PREVALENCE}, {EQUAL}, or seven numbers above 0, C1 to C7", _are_weights)
    )
    slice_weight: float = setting(0.5, within("[0, inf)"))
    slice_epochs: int = setting(0, whole(0))
    slice_samples: int = setting(0, whole(0))
    matched_slices: bool = setting(False, TRUE_OR_FALSE)
    pseudo_label_after: int | None = setting(None, optional(whole(0)))
    slice_batch_size: int = setting(32, whole(1))
    slice_learning_rate: float = setting(5e-3, within("(0, inf)"))
    sampling: Sampling = setting("shuffle", one_of(*get_args(Sampling)))
    augment: AugmentConfig | None = field(default_factory=AugmentConfig)

    def __post_init__(self) -> None:
        if isinstance(self.vertebra_weights, list):  # as JSON has it
            object.__setattr__(self, "vertebra_weights", tuple(self.vertebra_weights))
        super().__post_init__()

    @property
    def all_epochs(self) -> int:
        """Epochs of slices, and then of sequences."""
        return self.slice_epochs + self.epochs

    @classmethod
    def small(cls) -> Self:
        """For the built-in cohort on a laptop's CPU."""
        return cls(
            epochs=8,
            batch_size=16,
            learning_rate=1e-3,
            accumulate=1,
            slice_weight=1.0,
            slice_epochs=80,  # without them, eight epochs of sequences teach it next to nothing
            workers=0,  # loading takes a few ms a sequence; a second process would only take a core away
        )

    @classmethod
    def rsna(cls) -> Self:
        """For RSNA 2022, where nobody marked the slices of two fractured vertebrae in three.

        The slices that are known teach the encoder first, then the model's own pseudo-labels join them.
        benchmarks/slice_truth.py measures on phantoms what each part buys.
        """
        return cls(
            epochs=4,
            learning_rate=6e-4,
            warmup_epochs=0.5,
            ema=0.99,
            slice_weight=1.0,
            slice_epochs=30,
            slice_samples=24_000,
            matched_slices=True,
            pseudo_label_after=10,
            slice_learning_rate=2e-3,
        )


SHOWN = (  # a line of the log
    *("train_loss", "validation_loss", "validation_auroc", "validation_average_precision"),
    *("validation_dice_pos", "validation_recall", "validation_precision", "threshold"),
    *("learning_rate", "seconds"),
)
CHOSEN_BY = ("validation_objective", "validation_average_precision")  # what the best epoch has the most of


def best_epoch(history: pd.DataFrame, keep: Keep = "best") -> int:
    """The epoch whose weights are kept: the last, or the best.

    The best has the highest objective: of sequences the value of the rule's at its threshold, such as recall;
    an epoch without a threshold, whose value is missing, comes last. Ties: the higher average precision, then
    the earlier epoch. Where no epoch has a threshold, average precision alone decides.
    """
    if keep == "last":
        return int(history["epoch"].iloc[-1])
    ranked = history.sort_values([*CHOSEN_BY, "epoch"], ascending=[False, False, True], kind="stable")
    return int(ranked["epoch"].iloc[0])


def adamw(
    network: nn.Module,
    rate: float,
    weight_decay: float,
    *,
    backbone: nn.Module | None = None,
    backbone_rate: float = 1.0,
) -> torch.optim.AdamW:
    """AdamW that decays weight matrices and kernels only, not biases and norms.

    Args:
        network: whose parameters it moves, each in one group.
        rate: learning rate.
        weight_decay: of weight matrices and kernels.
        backbone: a part of the network with a rate of its own.
        backbone_rate: that rate, as a share of the rest's. Each group has its share as "share", and who sets
            "lr" later multiplies by it.
    """
    slow = set() if backbone is None else set(backbone.parameters())
    groups: list[dict[str, Any]] = [
        {
            "params": [p for p in network.parameters() if (p in slow) == is_slow and (p.ndim > 1) == decays],
            "weight_decay": weight_decay if decays else 0.0,
            "share": backbone_rate if is_slow else 1.0,
        }
        for is_slow in (False, True)
        for decays in (True, False)
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=rate, fused=True)


def learning_rate(config: TrainerConfig, position: float, history: pd.DataFrame) -> float:
    """Learning rate at a position in training.

    Args:
        config: of the training.
        position: epochs done, with fraction.
        history: rows of the complete epochs; the plateau schedule looks at them.
    """
    rate = config.learning_rate
    if position < config.warmup_epochs:
        return rate * position / config.warmup_epochs
    if config.schedule == "cosine":
        share = (position - config.warmup_epochs) / (config.epochs - config.warmup_epochs)
        return rate * (1 + math.cos(math.pi * share)) / 2
    best, waited = -math.inf, 0
    for score in history["validation_average_precision"]:
        waited = 0 if score > best else waited + 1
        best = max(best, score)
        if waited == config.plateau_patience:
            rate, waited = rate * config.plateau_factor, 0
    return rate
