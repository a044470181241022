"""The two encoders of a slice: a timm backbone for its pixels, a small CNN for the vertebra's mask.

Another EfficientNet is a name in `ModelConfig.backbone`; another family of backbones begins here, with
`is_backbone` and `backbone`, and in `forward.folded`.
"""

from typing import Any

import timm
from torch import nn

from cspine_helpers.model.pretrained import Weights, network_with
from cspine_helpers.packed import CHANNELS

INTENSITIES = CHANNELS - 1  # channels 0–4 of a packed sequence; channel 5 is the vertebra mask
STRIDES = (2, 4, 8, 16, 32)


def is_backbone(name: object) -> bool:
    """Whether timm has an EfficientNet of this name: its stem, strides and stages are what is built upon."""
    if not isinstance(name, str) or not timm.is_model(name):
        return False
    try:
        timm.get_pretrained_cfg(name)  # knows the tags
    except RuntimeError:
        return False
    return timm.models.is_model_in_modules(name.split(".")[0], {"efficientnet"})


def backbone(name: str, stride: int, weights: Weights | None = None) -> tuple[Any, int]:
    """A backbone without its classifier, cut behind the chosen stride, and its number of features.

    Args:
        name: of timm, with its pretrained tag where it has one.
        stride: pixels to one cell of the features, one of `STRIDES`; deeper blocks are not built.
        weights: what it begins with; None: the torch seed decides.

    Raises:
        ValueError: the weights are of another architecture.
    """
    if weights is None:
        network: Any = timm.create_model(name, in_chans=INTENSITIES, num_classes=0, global_pool="")
    else:
        network = network_with(weights, name, INTENSITIES)
        network.reset_classifier(0, "")
    if stride == STRIDES[-1]:
        return network, network.num_features
    stage = [each["reduction"] for each in network.feature_info].index(stride)
    features = network.feature_info[stage]["num_chs"]
    network.prune_intermediate_layers([stage], prune_norm=True)
    return network, features


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
