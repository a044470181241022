"""The classifier: a CNN on every slice, a bidirectional LSTM along them, attention over their states."""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

import timm
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from cspine_helpers.files.paths import listing
from cspine_helpers.labels import VERTEBRAE
from cspine_helpers.packed import CHANNELS

INTENSITIES = CHANNELS - 1  # channels 0–4 of a packed sequence; channel 5 is the vertebra mask
STRIDES = (2, 4, 8, 16, 32)
POOLINGS = ("avg", "avgmax")
_MOST, _MOST_LAYERS = 4096, 16  # features, pixels or slices, and layers: more is a damaged record or a slip
# Pixels go from [0, 255] to [-1, 1], mean and deviation 0.5, as the default backbone was pretrained: towards
# this point, which stays where it is.
_CENTRE = -1 / (1 - 2 / 255)


@dataclass(frozen=True)
class ModelConfig:
    """What is needed to build a `FractureClassifier`; saved whole in `run.json`.

    Attributes:
        backbone: a timm EfficientNetV2, with its pretrained tag where it has one.
        pretrained: start from timm's weights (downloaded, or `pretrained_file`), else from the torch seed.
        pretrained_file: a local `.safetensors` file of those weights, for machines without network.
        slices: T, slices of a sequence.
        size: H = W, pixels of a slice.
        feature_stride: pixels to one cell of the features that are pooled. 32 is the whole backbone; at a
            smaller stride the deeper blocks are not built, and thin lines survive in small images.
        pooling: features of a slice: "avg" their mean over the slice, "avgmax" their mean and maximum.
        mask_features: features of the mask encoder.
        lstm_hidden: features of the LSTM in each direction.
        lstm_layers: layers of the LSTM.
        dropout: share of features dropped before the LSTM, between its layers and before the head.
        vertebra_embedding: features that tell the network which vertebra it sees; 0 tells it nothing.
    """

    backbone: str = "tf_efficientnetv2_s.in21k_ft_in1k"
    pretrained: bool = False
    pretrained_file: str | None = None
    slices: int = 15
    size: int = 224
    feature_stride: int = 32
    pooling: str = "avg"
    mask_features: int = 64
    lstm_hidden: int = 256
    lstm_layers: int = 2
    dropout: float = 0.3
    vertebra_embedding: int = 0

    def __post_init__(self) -> None:
        count, features = f"1 to {_MOST}", f"0 to {_MOST}"
        wrong = [
            f"{name} = {listing([getattr(self, name)])} ({rule})"
            for name, holds, rule in (
                (
                    "backbone",
                    _is_backbone(self.backbone),
                    "an EfficientNet of timm, such as tf_efficientnetv2_s",
                ),
                ("pretrained", isinstance(self.pretrained, bool), "true or false"),
                ("pretrained_file", _is_weights(self.pretrained_file), "a .safetensors file, or none"),
                ("slices", _is_count(self.slices), count),
                ("size", _is_count(self.size, least=32), f"32 to {_MOST}"),
                ("feature_stride", self.feature_stride in STRIDES, f"one of {STRIDES}"),
                ("pooling", self.pooling in POOLINGS, f"one of {POOLINGS}"),
                ("mask_features", _is_count(self.mask_features), count),
                ("lstm_hidden", _is_count(self.lstm_hidden), count),
                ("lstm_layers", _is_count(self.lstm_layers, most=_MOST_LAYERS), f"1 to {_MOST_LAYERS}"),
                ("dropout", isinstance(self.dropout, int | float) and 0 <= self.dropout < 1, "in [0, 1)"),
                ("vertebra_embedding", _is_count(self.vertebra_embedding, least=0), features),
            )
            if not holds
        ]
        if wrong:
            raise ValueError(f"ModelConfig cannot have {'; '.join(wrong)}. Correct them.")

    @classmethod
    def small(cls) -> Self:
        """For the built-in cohort's 64 × 64 pixels: trains from scratch on a laptop's CPU."""
        return cls(
            backbone="tf_efficientnetv2_b0",
            size=64,
            feature_stride=4,
            pooling="avgmax",
            mask_features=16,
            lstm_hidden=64,
            lstm_layers=1,
            dropout=0.2,
        )


def _is_count(value: object, *, least: int = 1, most: int = _MOST) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _is_backbone(name: object) -> bool:
    """Whether timm has an EfficientNet of this name: its stem, strides and stages are what is built upon."""
    if not isinstance(name, str) or not timm.is_model(name):
        return False
    try:
        timm.get_pretrained_cfg(name)  # knows the tags
    except RuntimeError:
        return False
    return timm.models.is_model_in_modules(name.split(".")[0], {"efficientnet"})


def _is_weights(value: object) -> bool:
    return value is None or (isinstance(value, str) and value.endswith(".safetensors"))


class ClassifierOutput(NamedTuple):
    """What the classifier says of B sequences.

    Attributes:
        logit: `(B,)`, of the vertebra being fractured.
        attention: `(B, T)`, share of each slice in the sequence's features; sums to 1 over T.
        slice_logit: `(B, T)`, of each slice showing the fracture.
    """

    logit: Tensor
    attention: Tensor
    slice_logit: Tensor


class FractureClassifier(nn.Module):
    """Fracture of one vertebra, from its sequence of T slices.

    Each slice's five intensity channels go through a timm backbone and its mask through a small CNN; their
    pooled features, side by side, are scored slice by slice, and run through a bidirectional LSTM along the
    slices. Attention weighs the LSTM's states into one vector for the head. BatchNorm sees the B·T slices of
    a batch as one batch.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone, features = _backbone(config)
        self.mask_encoder = _mask_encoder(config.mask_features)
        features = features * (2 if config.pooling == "avgmax" else 1) + config.mask_features
        self.slice_head = nn.Linear(features, 1)
        self.vertebra = None
        if config.vertebra_embedding:
            self.vertebra = nn.Embedding(len(VERTEBRAE), config.vertebra_embedding)
            features += config.vertebra_embedding
        self.dropout = nn.Dropout(config.dropout)
        self.lstm = nn.LSTM(
            features,
            config.lstm_hidden,
            config.lstm_layers,
            batch_first=True,
            bidirectional=True,
            dropout=config.dropout if config.lstm_layers > 1 else 0.0,
        )
        state = 2 * config.lstm_hidden
        self.attention = nn.Sequential(nn.Linear(state, state // 2), nn.Tanh(), nn.Linear(state // 2, 1))
        self.head = nn.Linear(state, 1)
        self.to(memory_format=torch.channels_last)

    def forward(self, sequences: Tensor, vertebrae: Tensor | None = None) -> ClassifierOutput:
        """Score B sequences.

        Args:
            sequences: uint8 `(B, T, 6, H, W)` as packed.
            vertebrae: int64 `(B,)`, 0 for C1 to 6 for C7; used only with a vertebra embedding.

        Raises:
            ValueError: another dtype or shape than the config's, or no `vertebrae` where they are needed.
        """
        self._check(sequences, vertebrae)
        batch, slices = sequences.shape[:2]
        encoded = self.encode(sequences.flatten(0, 1)).unflatten(0, (batch, slices))  # (B, T, D)
        features = encoded
        if self.vertebra is not None:
            embedded = self.vertebra(vertebrae).unsqueeze(1).expand(-1, slices, -1)
            features = torch.cat([encoded, embedded], dim=2)
        with torch.autocast(features.device.type, enabled=False):  # on a GPU it would run in float16
            states, _ = self.lstm(self.dropout(features).float())  # (B, T, 2 · hidden)
        attention = self.attention(states).squeeze(2).float().softmax(dim=1)
        summary = (attention.unsqueeze(2) * states).sum(dim=1)  # (B, 2 · hidden)
        logit = self.head(self.dropout(summary)).squeeze(1)
        return ClassifierOutput(logit, attention, self.slice_head(encoded).squeeze(2))

    def encode(self, pixels: Tensor) -> Tensor:
        """Features `(N, D)` of single slices, uint8 `(N, 6, H, W)`; `slice_head` scores them."""
        channels = self.backbone.conv_stem.in_channels  # all six where `folded`
        image = pixels[:, :channels].to(torch.float32, memory_format=torch.channels_last)
        image = image.lerp_(image.new_full((), _CENTRE), 1 - 2 / 255)  # x · 2 / 255 − 1, in one pass
        maps = self.backbone.forward_features(image)  # (N, D, H / stride, W / stride)
        pooled = [maps.mean((2, 3))]
        if self.config.pooling == "avgmax":
            pooled.append(maps.amax((2, 3)))
        mask = (pixels[:, INTENSITIES:] > 127).float()  # (N, 1, H, W)
        return torch.cat([*pooled, self.mask_encoder(mask)], dim=1)

    def folded(self) -> Self:
        """A copy for inference: each BatchNorm is folded into the weights of the convolution before it.

        The same function up to rounding, without a pass over the maps for each norm. The backbone is handed
        the mask as well, with weight 0: all bytes become floats in one go, a part of each pixel's would not.
        """
        twin = copy.deepcopy(self).eval().requires_grad_(False)
        for module in list(twin.modules()):
            convolution: Any = None
            for name, child in list(module.named_children()):
                if isinstance(child, nn.Conv2d):
                    convolution = child
                elif isinstance(child, nn.BatchNorm2d) and convolution is not None:
                    convolution.weight, convolution.bias = _fold(convolution, child)
                    after = [getattr(child, part) for part in ("drop", "act") if hasattr(child, part)]
                    setattr(module, name, nn.Sequential(*after))  # timm's norms carry their activation
                    convolution = None
        stem: Any = twin.backbone.conv_stem
        padded = nn.functional.pad(stem.weight, (0, 0, 0, 0, 0, 1))  # (features, 6, 3, 3)
        stem.weight = nn.Parameter(padded.contiguous(memory_format=torch.channels_last), requires_grad=False)
        stem.in_channels += 1
        twin.lstm.flatten_parameters()  # copied one by one, they lie apart, which cuDNN does not like
        return twin

    def _check(self, sequences: Tensor, vertebrae: Tensor | None) -> None:
        config = self.config
        expected = (config.slices, CHANNELS, config.size, config.size)
        if sequences.dtype != torch.uint8 or sequences.ndim != 5 or sequences.shape[1:] != expected:
            raise ValueError(
                f"Sequences are uint8 of shape (B, {', '.join(map(str, expected))}) for this model; found "
                f"{str(sequences.dtype).removeprefix('torch.')} of shape {tuple(sequences.shape)}. "
                "Pack them anew, or build the model with their slices and size."
            )
        if self.vertebra is not None and (vertebrae is None or vertebrae.shape != sequences.shape[:1]):
            found = "none" if vertebrae is None else f"shape {tuple(vertebrae.shape)}"
            raise ValueError(
                f"This model has a vertebra embedding and needs vertebrae of shape ({len(sequences)},), "
                f"0 for C1 to 6 for C7; found {found}. Pass them with the sequences."
            )


def _backbone(config: ModelConfig) -> tuple[Any, int]:
    """The backbone without its classifier, cut behind the chosen stride, and its number of features."""
    overlay = None
    if config.pretrained_file is not None:
        if not Path(config.pretrained_file).is_file():
            raise FileNotFoundError(f"pretrained_file {config.pretrained_file!r} is not there. Correct it.")
        overlay = {"file": config.pretrained_file}
    try:
        backbone: Any = timm.create_model(
            config.backbone,
            pretrained=config.pretrained,
            pretrained_cfg_overlay=overlay,
            in_chans=INTENSITIES,
            num_classes=0,
            global_pool="",
        )
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ValueError(
            f"Weights of {config.backbone!r} could not be loaded ({str(error).splitlines()[0]}). Name a "
            "local copy as ModelConfig(pretrained_file=...), or start from scratch with pretrained=False."
        ) from error
    if config.feature_stride == STRIDES[-1]:
        return backbone, backbone.num_features
    strides = [stage["reduction"] for stage in backbone.feature_info]
    stage = strides.index(config.feature_stride)
    channels = backbone.feature_info[stage]["num_chs"]
    backbone.prune_intermediate_layers([stage], prune_norm=True)
    return backbone, channels


def _fold(convolution: nn.Conv2d, norm: Any) -> tuple[nn.Parameter, nn.Parameter]:
    """Weight and bias of a convolution that does what it and its norm did."""
    statistics = norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
    weight, bias = fuse_conv_bn_weights(convolution.weight, convolution.bias, *statistics)
    return nn.Parameter(weight.contiguous(memory_format=torch.channels_last)), bias


def _mask_encoder(features: int) -> nn.Module:
    """Outline and position of the vertebra: cells of 4 × 4 pixels, then two halvings, then their mean."""
    layers: list[nn.Module] = []
    for inside, outside, kernel, stride in ((1, 16, 4, 4), (16, 32, 3, 2), (32, features, 3, 2)):
        layers += [
            nn.Conv2d(inside, outside, kernel, stride, padding=kernel // 2 if stride == 2 else 0, bias=False),
            nn.BatchNorm2d(outside),
            nn.SiLU(inplace=True),
        ]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
