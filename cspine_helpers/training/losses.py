"""What training minimises: focal loss, class and vertebra weights, and the slice-level term."""

from dataclasses import dataclass
from typing import Self

import numpy as np
import pandas as pd
from torch import Tensor
from torch.nn import functional

from cspine_helpers.dataset.sequence import draw_probabilities
from cspine_helpers.labels import VERTEBRAE
from cspine_helpers.model.classifier import ClassifierOutput
from cspine_helpers.training.config import EQUAL, TrainConfig


@dataclass(frozen=True)
class Loss:
    """The loss of a run, with the weights that the training split gives it.

    Example:
        >>> loss = Loss(alpha=0.9, slice_alpha=0.9, slice_weight=0.5, vertebra_weights=(1.0,) * 7)
        >>> loss.slice_weight
        0.5

    Attributes:
        alpha: weight of fractured vertebrae.
        slice_alpha: weight of fractured slices.
        slice_weight: weight of the slice-level term.
        vertebra_weights: weight of each vertebra, C1 … C7.
        gamma: of both terms.
    """

    alpha: float
    slice_alpha: float
    slice_weight: float
    vertebra_weights: tuple[float, ...]
    gamma: float = 2.0

    @classmethod
    def of(cls, samples: pd.DataFrame, slice_truth: np.ndarray, config: TrainConfig) -> Self:
        """Weights from the training split's samples and their slice truth `(N, T)`.

        Prevalences are those that training sees: balanced and weighted sampling show as many fractured as
        intact vertebrae, so alpha is 1/2; weighted sampling does so at each vertebra, so their weights by
        prevalence are 1.
        """
        labels, vertebrae = samples["label"].to_numpy(), samples["vertebra"].map(VERTEBRAE.index).to_numpy()
        drawn = draw_probabilities(labels, vertebrae, config.sampling)
        alpha = balanced_alpha(labels) if drawn is None else 0.5
        share = 0.5
        if np.nansum(slice_truth) > 0:
            known = np.isfinite(slice_truth)
            weights = None if drawn is None else np.broadcast_to(drawn[:, None], known.shape)[known]
            share = float(np.average(slice_truth[known], weights=weights))
        return cls(
            alpha=alpha if config.alpha is None else config.alpha,
            slice_alpha=1 - share,
            slice_weight=config.slice_weight,
            vertebra_weights=_vertebra_weights(samples, config),
            gamma=config.gamma,
        )

    def __call__(self, output: ClassifierOutput, batch: dict[str, Tensor]) -> Tensor:
        """Focal loss of the vertebrae plus the weighted slice-level term."""
        weights = output.logit.new_tensor(self.vertebra_weights)[batch["vertebra"]]  # (B,)
        loss = focal_loss(output.logit, batch["label"], alpha=self.alpha, gamma=self.gamma, weight=weights)
        term = slice_loss(output.slice_logit, batch["slice_truth"], alpha=self.slice_alpha, gamma=self.gamma)
        return loss + self.slice_weight * term  # also where that is 0: each parameter is in the graph


def _vertebra_weights(samples: pd.DataFrame, config: TrainConfig) -> tuple[float, ...]:
    """What the config asks for, as numbers."""
    asked = config.vertebra_weights
    if not isinstance(asked, str):
        return asked
    if asked == EQUAL or config.sampling == "weighted":
        return (1.0,) * len(VERTEBRAE)
    return tuple(vertebra_weights(samples).values())


def focal_loss(
    logit: Tensor, label: Tensor, *, alpha: float, gamma: float = 2.0, weight: Tensor | None = None
) -> Tensor:
    """Mean focal loss: cross-entropy in which examples that are already right count little.

    Args:
        logit: any shape.
        label: 0 or 1, of the logit's shape.
        alpha: weight of positives in (0, 1); negatives weigh 1 − alpha.
        gamma: how fast an example's weight `(1 − p)^gamma` falls with the probability p of its own class;
            0 is plain weighted cross-entropy.
        weight: of each example, of the logit's shape. The mean divides by the number of examples, not by
            their weights, so that a batch of heavy examples counts more than one of light ones.

    Raises:
        ValueError: shapes differ, the batch is empty, `alpha` is outside (0, 1), or `gamma` below 0.

    Source: Lin et al., Focal loss for dense object detection, ICCV 2017, equation 5.

    Example:
        >>> import torch
        >>> round(focal_loss(torch.tensor([2.0]), torch.tensor([1.0]), alpha=0.5).item(), 5)
        0.0009
    """
    shapes = {tuple(tensor.shape) for tensor in (logit, label, weight) if tensor is not None}
    if len(shapes) > 1 or logit.numel() == 0:
        raise ValueError(f"Logits, labels and weights have one shape, not empty; found {sorted(shapes)}.")
    if not 0 < alpha < 1 or gamma < 0:
        raise ValueError(
            f"alpha must be in (0, 1) and gamma 0 or more; found alpha = {alpha}, gamma = {gamma}."
        )
    logit, label = logit.float(), label.float()
    entropy = functional.binary_cross_entropy_with_logits(logit, label, reduction="none")
    miss = ((1 - 2 * label) * logit).sigmoid()  # 1 − probability of the example's own class
    loss = (alpha * label + (1 - alpha) * (1 - label)) * miss**gamma * entropy
    return (loss if weight is None else loss * weight).mean()


def slice_loss(slice_logit: Tensor, slice_truth: Tensor, *, alpha: float = 0.5, gamma: float = 2.0) -> Tensor:
    """Mean focal loss over the slices whose truth is known.

    Args:
        slice_logit: `(B, T)`.
        slice_truth: `(B, T)`: 1 fractured, 0 intact, NaN unknown.
        alpha: weight of fractured slices, as in `focal_loss`.
        gamma: as in `focal_loss`.

    Returns:
        Zero, with a gradient of zero, where no slice of the batch is known.

    Raises:
        ValueError: the shapes differ, or `alpha` or `gamma` are refused by `focal_loss`.
    """
    if slice_logit.shape != slice_truth.shape:
        raise ValueError(
            f"Slice logits and truth have one shape; found {tuple(slice_logit.shape)} and "
            f"{tuple(slice_truth.shape)}."
        )
    known = ~slice_truth.isnan()
    if not known.any():
        return slice_logit.sum() * 0
    return focal_loss(slice_logit[known], slice_truth[known], alpha=alpha, gamma=gamma)


def balanced_alpha(labels: np.ndarray | pd.Series) -> float:
    """Weight of positives that balances the classes: 1 − prevalence.

    Balanced class weights n / (2 · n_class), divided by their sum, so that both lie in (0, 1). NaN labels
    (slices of unknown truth) do not count.

    Raises:
        ValueError: labels are not 0 and 1, or only one class is there.
    """
    values = np.asarray(labels, dtype=float)
    values = values[~np.isnan(values)]
    found = np.unique(values).tolist()
    if found != [0, 1]:
        raise ValueError(f"Balancing needs both labels, 0 and 1, and no others; found {found[:10]}.")
    return float(1 - values.mean())


def vertebra_weights(samples: pd.DataFrame) -> dict[str, float]:
    """Weight of each vertebra in the loss: the highest prevalence ÷ its own.

    Args:
        samples: the training split's samples, with columns `vertebra` ("C1" … "C7") and `label` (0/1).

    Raises:
        ValueError: a vertebra has no fracture among the samples; names each.
    """
    prevalence = samples.groupby("vertebra")["label"].mean().reindex(list(VERTEBRAE))
    without = [name for name in VERTEBRAE if not prevalence[name] > 0]
    if without:
        raise ValueError(
            f"No fracture among the samples of {', '.join(without)}, so their weight is undefined. "
            "Train on more studies, or set vertebra_weights to 'equal'."
        )
    return {name: float(weight) for name, weight in (prevalence.max() / prevalence).items()}
