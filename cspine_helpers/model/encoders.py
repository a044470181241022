"""The two encoders of a slice: a timm backbone for its pixels, a small CNN for the vertebra's mask.

Another backbone is a name in `ModelConfig.backbone`: of a ResNet, ConvNeXt, RegNet, MobileNet, DenseNet, any
network of timm that gives feature maps of a slice of any size.
"""

from functools import cache
from typing import Any

import timm
import torch
from torch import Tensor, nn

from cspine_helpers.model.pretrained import Weights, network_with
from cspine_helpers.packed import CHANNELS

INTENSITIES = CHANNELS - 1  # channels 0–4 of a packed sequence; channel 5 is the vertebra mask
STRIDES = (2, 4, 8, 16, 32)
PROBE = 96  # pixels, height and width, of a slice that shows what a network does; small, yet enough for each


def is_backbone(name: object) -> bool:
    """Whether it is a network of timm, with its pretrained tag or without, that gives feature maps."""
    return isinstance(name, str) and bool(feature_maps(name))


def feature_maps(name: str) -> dict[int, int]:
    """Strides of a network's feature maps, pixels to one cell, with their numbers of features.

    Empty for what timm does not know, and for a network that has no such maps: the patches of a ViT all lie
    at one stride, and belong to one size of image.

    Example:
        >>> feature_maps("convnext_tiny")
        {4: 96, 8: 192, 16: 384, 32: 768}
    """
    return _probed(name)[0]


@cache
def _probed(name: str) -> tuple[dict[int, int], list[str]]:
    """A network's `feature_maps`, and its parts that the deepest do not need; tried with shapes alone."""
    try:
        timm.get_pretrained_cfg(name)  # knows the tags
        with torch.device("meta"):
            network, image = _random(name).eval(), torch.zeros(1, INTENSITIES, PROBE, PROBE)
            strides = [each["reduction"] for each in network.feature_info]
            if network.pretrained_cfg.get("fixed_input_size") or strides != sorted(set(strides)):
                return {}, []
            features = [each["num_chs"] for each in network.feature_info[:-1]] + [network.num_features]
            called: set[nn.Module] = set()
            for module in network.modules():
                module.register_forward_hook(lambda module, given, result: called.add(module))
            whole = network.forward_features(image)
            unused = [part for part, child in network.named_children() if called.isdisjoint(child.modules())]
            network.prune_intermediate_layers([1], prune_norm=True)
            cut = network.forward_features(image)  # HRNet's is a list
    except (RuntimeError, AssertionError, AttributeError, TypeError, ValueError, LookupError):
        return {}, []  # in so many ways timm says that it cannot
    maps = dict(zip(strides, features, strict=True))
    fits = [isinstance(found, Tensor) and found.ndim == 4 and found.shape[1] == maps[stride]
            for found, stride in ((whole, strides[-1]), (cut, strides[1]))]  # fmt: skip
    return (maps, unused) if all(fits) else ({}, [])


def _random(name: str, channels: int = INTENSITIES, **options: Any) -> Any:
    """The network with random weights, and without its classifier."""
    return timm.create_model(name, in_chans=channels, num_classes=0, global_pool="", **options)


def backbone(
    name: str,
    stride: int,
    weights: Weights | None = None,
    *,
    channels: int = INTENSITIES,
    **options: Any,
) -> tuple[Any, int]:
    """A backbone without its classifier, cut behind the chosen stride, and its number of features.

    Args:
        name: of timm, with its pretrained tag where it has one.
        stride: pixels to one cell of the features, one of its `feature_maps`; deeper blocks are not built.
        weights: what it begins with; None: the torch seed decides.
        channels: of an image.
        options: for timm's `create_model`, such as `output_stride`.

    Raises:
        ValueError: the weights are of another architecture.
    """
    if weights is None:
        network = _random(name, channels, **options)
    else:
        network = network_with(weights, name, channels, **options)
    maps, unused = _probed(name)
    stage = list(maps).index(stride)
    if stage < len(maps) - 1:
        network.prune_intermediate_layers([stage], prune_norm=True)
    else:
        for part in unused:
            setattr(network, part, nn.Identity())
    return network, maps[stride]


def mask_encoder(features: int) -> nn.Module:
    """Outline and position of the vertebra: cells of 4 × 4 pixels, then two halvings, then their mean."""
    layers: list[nn.Module] = []
    for inside, outside, kernel, stride in ((1, 16, 4, 4), (16, 32, 3, 2), (32, features, 3, 2)):
        layers += [
            nn.Conv2d(inside, outside, kernel, stride, padding=kernel // 2 if stride == 2 else 0, bias=False),
            nn.BatchNorm2d(outside),
            nn.SiLU(inplace=True),
        ]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
