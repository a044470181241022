"""The one forward pass: validation, prediction and attention run it, and so say the same."""

import copy
from collections.abc import Iterable, Iterator, Sequence
from itertools import tee
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from cspine_helpers.model.classifier import ClassifierOutput, FractureClassifier


def forward_pass(
    model: FractureClassifier, batches: Iterable[dict[str, Tensor]]
) -> Iterator[tuple[Tensor, ClassifierOutput]]:
    """Score batches with the folded model, on its device, in float32 whatever it was trained in.

    Args:
        model: stays as it is.
        batches: of a `SequenceDataset`, as its loader makes them.

    Yields:
        Rows of the batch's samples in the data set, int64 `(B,)`, and what the model says of them.
    """
    network, device = folded(model), next(model.parameters()).device
    for batch in batches:
        given = (batch[name].to(device, non_blocking=True) for name in ("sequence", "vertebra"))
        with (
            torch.inference_mode(),
            torch.autocast(device.type, enabled=False),
            torch.backends.cudnn.flags(enabled=True, allow_tf32=False),  # float32 as on a CPU
        ):
            output = network(*given)
        yield batch["index"], output


def mean_probability(
    models: Sequence[FractureClassifier], batches: Iterable[dict[str, Tensor]], *, flip: bool = False
) -> Iterator[Tensor]:
    """Mean probability of several models, each by its own forward pass over the same loaded batches.

    Args:
        models: on one device.
        batches: of a `SequenceDataset`, as its loader makes them.
        flip: each model also sees the sequence with left and right exchanged, and both count alike.

    Yields:
        Probability of a fracture, float64 `(B,)`.
    """
    device = next(models[0].parameters()).device
    views = (dict, flipped) if flip else (dict,)
    moved = (
        view({**batch, "sequence": batch["sequence"].to(device, non_blocking=True)})
        for batch in batches
        for view in views
    )
    # In step with each other, so that a batch is held only until the last of them has seen it.
    passes = [forward_pass(model, own) for model, own in zip(models, tee(moved, len(models)), strict=True)]
    outputs = zip(*passes, strict=True)
    for of_batch in zip(*[outputs] * len(views), strict=True):
        found = [output.probability for of_view in of_batch for _, output in of_view]
        yield torch.stack(found).mean(dim=0)


def flipped(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """A batch with left and right exchanged, the mask with the image, as `AugmentConfig.flip` does it."""
    return {**batch, "sequence": batch["sequence"].flip(-1)}


def folded(model: FractureClassifier) -> FractureClassifier:
    """A copy for inference: each BatchNorm is folded into the weights of the convolution before it.

    The same function up to rounding, without a pass over the maps for each norm. The backbone is handed
    the mask as well, with weight 0: all bytes become floats in one go, a part of each pixel's would not.
    """
    twin = copy.deepcopy(model).eval().requires_grad_(False)
    vars(twin).pop("forward", None)  # where Accelerate trains it: a wrapper for mixed precision
    for module in list(twin.modules()):
        convolution: Any = None
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Conv2d):
                convolution = child
            elif isinstance(child, nn.BatchNorm2d) and convolution is not None:
                statistics: Any = child.running_mean, child.running_var, child.eps, child.weight, child.bias
                weight, bias = fuse_conv_bn_weights(convolution.weight, convolution.bias, *statistics)
                channels_last = weight.contiguous(memory_format=torch.channels_last)
                convolution.weight, convolution.bias = nn.Parameter(channels_last), bias
                after = [getattr(child, part) for part in ("drop", "act") if hasattr(child, part)]
                setattr(module, name, nn.Sequential(*after))  # timm's norms carry their activation
                convolution = None
    stem: Any = twin.backbone.conv_stem
    padded = nn.functional.pad(stem.weight, (0, 0, 0, 0, 0, 1))  # (features, 6, 3, 3)
    stem.weight = nn.Parameter(padded.contiguous(memory_format=torch.channels_last), requires_grad=False)
    stem.in_channels += 1
    twin.set_channels(stem.in_channels)
    twin.to(stem.weight.device)
    twin.lstm.flatten_parameters()  # copied one by one, they lie apart, which cuDNN does not like
    return twin
