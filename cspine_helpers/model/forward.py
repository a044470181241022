"""The one forward pass: validation, prediction and attention run it, and so say the same."""

import copy
from collections.abc import Iterable, Iterator
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
