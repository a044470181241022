"""What training on radiographs minimises: presence of a fracture, its cells, their overlap, or all three."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from cspine_helpers.files.records import check_settings, optional, setting, whole, within
from cspine_helpers.radiographs.model import RadiographOutput

_WEIGHT = within("[0, inf)")
_SMOOTH = 1.0  # cells, so that the Dice of a few of them does not jump
_LEAST = 1e-6  # of 1 − Dice, where a power below 1 would have no finite slope


@dataclass(frozen=True)
class LossConfig:
    """The terms of the loss, each with a weight that 0 turns off.

    Attributes:
        presence: weight of the cross-entropy of presence.
        positive_weight: of fractured images in it, intact ones weigh 1; None: as many times as there are more
            intact than fractured images, for epochs that show all of them.
        label_smoothing: presence is taught as 1 − this and as this, instead of 1 and 0.
        pixels: weight of the cross-entropy of the mask's cells.
        dice: weight of the mask's Dice loss, over images with an outlined fracture.
        dice_power: p of the focal Dice loss (1 − Dice)^p; 1 is the Dice loss. Below 1 images that are nearly
            right count the more, above it those that are far off.
        evidence: weight of the presence-aware term: cross-entropy of presence as the mask's highest cells say
            it, so that an intact image's cells stay low, and one cell at least of a fracture is high.
        evidence_cells: how many of the highest cells say so, by the mean of their logits; 1: the highest.
    """

    presence: float = setting(1.0, _WEIGHT)
    positive_weight: float | None = setting(1.0, optional(within("(0, inf)")))
    label_smoothing: float = setting(0.02, within("[0, 0.5)"))
    pixels: float = setting(5.0, _WEIGHT)
    dice: float = setting(1.0, _WEIGHT)
    dice_power: float = setting(1.0, within("(0, inf)"))
    evidence: float = setting(0.0, _WEIGHT)
    evidence_cells: int = setting(1, whole(1))

    def __post_init__(self) -> None:
        check_settings(self)
        if not (self.presence or self.pixels or self.dice or self.evidence):
            raise ValueError("LossConfig cannot have all weights 0: nothing would be learned. Raise one.")


class RadiographLoss:
    """The loss of a run.

    Args:
        config: its terms.
        labels: `(N,)` of 0/1, of the images that an epoch shows; decides a `positive_weight` of None.

    Attributes:
        positive_weight: as it is used.

    Raises:
        ValueError: `positive_weight` is None, and one of the labels is missing.

    Example:
        >>> RadiographLoss(LossConfig(positive_weight=None), np.array([1, 0, 0, 0])).positive_weight
        3.0
    """

    def __init__(self, config: LossConfig, labels: np.ndarray) -> None:
        self.config = config
        self.positive_weight = config.positive_weight
        if self.positive_weight is None:
            fractured = int(np.count_nonzero(np.asarray(labels) == 1))
            if not 0 < fractured < len(labels):
                raise ValueError(
                    f"A positive_weight by the labels needs both of them; found {fractured} fractured of "
                    f"{len(labels)} images. Name a number."
                )
            self.positive_weight = (len(labels) - fractured) / fractured

    def __call__(self, output: RadiographOutput, batch: dict[str, Tensor]) -> Tensor:
        """The weighted sum of the terms; those of the mask are 0 for a network without one.

        Args:
            output: of the network.
            batch: `label` `(B,)` of 0/1; `mask` uint8, 255 where all is fracture, at the network's cells or
                finer; `annotated` `(B,)`, whether an image's mask is known.
        """
        config, label = self.config, batch["label"].float()
        presence = presence_loss(
            output.logit, label, positive_weight=self.positive_weight, smoothing=config.label_smoothing
        )
        loss = config.presence * presence  # also where that is 0: each parameter is in the graph
        if output.mask_logit is None:
            return loss
        mask_logit, known = output.mask_logit.float(), batch["annotated"]
        truth = share_of_cells(batch["mask"], mask_logit)
        loss = loss + config.pixels * pixel_loss(mask_logit, truth, known)
        if config.dice:
            loss = loss + config.dice * dice_loss(mask_logit, truth, known, power=config.dice_power)
        if config.evidence:
            cells = highest_cells(mask_logit, config.evidence_cells)
            loss = loss + config.evidence * presence_loss(
                cells, label, positive_weight=self.positive_weight, smoothing=config.label_smoothing
            )
        return loss


def presence_loss(
    logit: Tensor, label: Tensor, *, positive_weight: float | None = None, smoothing: float = 0.0
) -> Tensor:
    """Mean cross-entropy of presence.

    Args:
        logit: `(B,)`.
        label: `(B,)` of 0/1.
        positive_weight: of fractured images; intact ones weigh 1. None: 1.
        smoothing: s, labels are taught as 1 − s and s, which keeps logits from growing without end. The
            weight is that of the label, not of its smoothed value.

    Raises:
        ValueError: shapes differ, or the batch is empty.

    Source: label smoothing by Szegedy et al., Rethinking the Inception architecture, CVPR 2016, section 7,
    where ε is 2 s for two classes.

    Example:
        >>> round(presence_loss(torch.tensor([0.0, 0.0]), torch.tensor([1, 0]), positive_weight=3).item(), 4)
        1.3863
    """
    if logit.shape != label.shape or logit.numel() == 0:
        raise ValueError(
            f"Logits and labels have one shape, not empty; found {tuple(logit.shape)} and "
            f"{tuple(label.shape)}."
        )
    label = label.float()
    weight = None if positive_weight in (None, 1) else 1 + (positive_weight - 1) * label
    return functional.binary_cross_entropy_with_logits(
        logit.float(), smoothing + (1 - 2 * smoothing) * label, weight
    )


def share_of_cells(mask: Tensor, mask_logit: Tensor) -> Tensor:
    """How much of each cell is fracture, 0 to 1: a thin line keeps its area, and gets no wider.

    Args:
        mask: uint8 `(B, H, W)`, 255 where a pixel (or, coarser, all of a cell) is fracture.
        mask_logit: `(B, h, w)`, whose cells are meant; H = n h and W = n w.

    Raises:
        ValueError: other dtypes or shapes.

    Example:
        >>> mask = torch.zeros(1, 4, 8, dtype=torch.uint8)
        >>> mask[0, :2, :2] = 255
        >>> share_of_cells(mask, torch.zeros(1, 1, 2)).tolist()
        [[[0.25, 0.0]]]
    """
    fits = mask.ndim == mask_logit.ndim == 3 and len(mask) == len(mask_logit) and mask.dtype == torch.uint8
    step = mask.shape[1] // mask_logit.shape[1] if fits else 0
    if not fits or mask.shape[1:] != tuple(step * side for side in mask_logit.shape[1:]) or step < 1:
        raise ValueError(
            f"Masks are uint8 of the shape of their logits, or of a multiple; found "
            f"{str(mask.dtype).removeprefix('torch.')} of shape {tuple(mask.shape)} for "
            f"{tuple(mask_logit.shape)}."
        )
    share = mask.float() / 255
    return share if step == 1 else functional.avg_pool2d(share, step)


def pixel_loss(mask_logit: Tensor, truth: Tensor, known: Tensor) -> Tensor:
    """Mean cross-entropy of the cells of images whose mask is known; 0, with a gradient of 0, without any.

    Args:
        mask_logit: `(B, h, w)`.
        truth: `(B, h, w)`, share of each cell that is fracture.
        known: `(B,)` of bool. An image that is fractured nobody knows where says nothing about its cells.
    """
    if not known.any():
        return mask_logit.sum() * 0
    return functional.binary_cross_entropy_with_logits(mask_logit[known], truth[known])


def dice_loss(mask_logit: Tensor, truth: Tensor, known: Tensor, *, power: float = 1.0) -> Tensor:
    """Mean (1 − Dice)^power over images with an outlined fracture; 0, with a gradient of 0, without any.

    Dice = (2 Σ p t + s) / (Σ p + Σ t + s) of an image's cells, with p the probability, t the truth, and s one
    cell.

    Args:
        mask_logit: `(B, h, w)`.
        truth: `(B, h, w)`, share of each cell that is fracture.
        known: `(B,)` of bool, whether an image's mask is known.
        power: of the focal Dice loss.

    Source: Milletari et al., V-Net, 3DV 2016, without their squares; the power by Abraham and Khan, A novel
    focal Tversky loss function, ISBI 2019, with α = β = 1/2, where Tversky's index is Dice, and 1/γ = 0.75.

    Example:
        >>> truth = torch.tensor([[[1.0, 0.0]], [[0.0, 0.0]]])
        >>> dice_loss(torch.zeros(2, 1, 2), truth, torch.tensor([True, True])).item()  # 1 − 2 / 3
        0.3333...
    """
    outlined = known & (truth.flatten(1).sum(1) > 0)
    if not outlined.any():
        return mask_logit.sum() * 0
    probability, truth = mask_logit[outlined].sigmoid().flatten(1), truth[outlined].flatten(1)
    common, both = (probability * truth).sum(1), probability.sum(1) + truth.sum(1)
    miss = (both - 2 * common) / (both + _SMOOTH)  # 1 − Dice
    return (miss if power == 1 else miss.clamp_min(_LEAST) ** power).mean()


def highest_cells(mask_logit: Tensor, cells: int) -> Tensor:
    """Mean of the highest logits of each image's mask, `(B,)`; of all where there are fewer.

    Args:
        mask_logit: `(B, h, w)`.
        cells: how many; 1: the highest.

    Source: Pinheiro and Collobert, From image-level to pixel-level labeling, CVPR 2015, between maximum and
    mean.
    """
    flat = mask_logit.flatten(1)
    return flat.topk(min(cells, flat.shape[1]), sorted=False).values.mean(1)
