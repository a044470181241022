"""The classifier: a CNN on every slice, a bidirectional LSTM along them, attention over their states."""

from dataclasses import dataclass
from itertools import cycle, islice
from typing import NamedTuple, Self

import timm
import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, max_pool2d

from cspine_helpers.files.paths import listing
from cspine_helpers.files.records import TRUE_OR_FALSE, Check, check_settings, one_of, setting, whole, within
from cspine_helpers.labels import VERTEBRAE
from cspine_helpers.model.encoders import (
    INTENSITIES,
    STRIDES,
    backbone,
    feature_maps,
    is_backbone,
    mask_encoder,
)
from cspine_helpers.model.pretrained import SOURCE, pretrained_weights, without_package
from cspine_helpers.packed import CHANNELS

POOLINGS = {"avg": 1, "avgmax": 2, "avgmax_mask": 4, "avgmax_inside": 2}  # with values of each feature
_MOST, _MOST_LAYERS = 4096, 16  # features, pixels or slices, and layers: more is a damaged record or a slip


@dataclass(frozen=True)
class ModelConfig:
    """What is needed to build a `FractureClassifier`; saved whole in `run.json`.

    Attributes:
        backbone: a CNN of timm that gives feature maps, with its pretrained tag where it has one.
        pretrained: weights that the backbone begins with: "hub", those that timm downloads; "package", those
            of an installed weight package (`pretrained.PACKAGES`); the path of a `.safetensors` file; None,
            random ones. Pixels are normalised as pretrained weights had it, and to -1 … 1 for random ones.
        slices: T, slices of a sequence.
        size: H = W, pixels of a slice.
        feature_stride: pixels to one cell of the features that are pooled, one that the backbone has. 32 is
            the whole backbone; at a smaller stride the deeper blocks are not built, and thin lines survive in
            small images.
        pooling: features of a slice: "avg" their mean over the slice, "avgmax" their mean and maximum;
            "avgmax_mask" these, and beside them the same inside the vertebra's mask dilated by a cell of the
            maps; "avgmax_inside" the latter alone. Over the whole slice where it shows nothing of the mask.
        mask_features: features of the mask encoder.
        lstm_hidden: features of the LSTM in each direction.
        lstm_layers: layers of the LSTM.
        dropout: share of features dropped before the LSTM, between its layers and before the head.
        vertebra_embedding: features that tell the network which vertebra it sees; 0 tells it nothing.
        slice_evidence: the slices' own logits, weighed by attention, are added to the vertebra's: what
            slice-level pretraining has learned counts from the first sequence on.
    """

    backbone: str = setting(
        "tf_efficientnetv2_s.in21k_ft_in1k",
        Check("a CNN of timm that gives feature maps, such as tf_efficientnetv2_s", is_backbone),
    )
    pretrained: str | None = setting(None, SOURCE)
    slices: int = setting(15, whole(1, _MOST))
    size: int = setting(224, whole(32, _MOST))
    feature_stride: int = setting(32, one_of(*STRIDES))
    pooling: str = setting("avg", one_of(*POOLINGS))
    mask_features: int = setting(64, whole(1, _MOST))
    lstm_hidden: int = setting(256, whole(1, _MOST))
    lstm_layers: int = setting(2, whole(1, _MOST_LAYERS))
    dropout: float = setting(0.3, within("[0, 1)"))
    vertebra_embedding: int = setting(0, whole(0, _MOST))
    slice_evidence: bool = setting(False, TRUE_OR_FALSE)

    def __post_init__(self) -> None:
        check_settings(self)
        strides = [each for each in feature_maps(self.backbone) if each in STRIDES]
        if self.feature_stride not in strides:
            raise ValueError(
                f"ModelConfig cannot have feature_stride = {self.feature_stride} with backbone = "
                f"{self.backbone!r}, which gives feature maps at {listing(strides)}. Choose one of these."
            )
        if problem := without_package(self.backbone, self.pretrained):
            raise ValueError(f"ModelConfig cannot have {problem}")

    @property
    def normalisation(self) -> dict[str, list[float]]:
        """Mean and standard deviation of each of the five channels, of pixels from 0 to 1.

        Pretrained weights had three channels; the five take theirs in turn, as timm repeats the weights.

        Example:
            >>> ModelConfig.small().normalisation["mean"]
            [0.5, 0.5, 0.5, 0.5, 0.5]
        """
        cfg = timm.get_pretrained_cfg(self.backbone) if self.pretrained else None
        mean, deviation = (cfg.mean, cfg.std) if cfg else ((0.5,), (0.5,))
        of_channels = {"mean": cycle(mean), "deviation": cycle(deviation)}
        return {name: list(islice(values, INTENSITIES)) for name, values in of_channels.items()}

    @classmethod
    def small(cls) -> Self:
        """For the built-in cohort's 64 × 64 pixels: trains from scratch on a laptop's CPU."""
        return cls(
            backbone="tf_efficientnetv2_b0",
            size=64,
            feature_stride=4,
            pooling="avgmax_inside",
            mask_features=16,
            lstm_hidden=64,
            lstm_layers=1,
            dropout=0.2,
        )

    @classmethod
    def rsna(cls) -> Self:
        """For RSNA 2022 at 224 × 224 pixels: begins with the ImageNet weights of the `pretrained` extra."""
        return cls(
            backbone="tf_efficientnet_lite0", pretrained="package", pooling="avgmax", slice_evidence=True
        )


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

    @property
    def probability(self) -> Tensor:
        """`(B,)` float64, of the vertebra being fractured."""
        return self.logit.double().sigmoid()


class FractureClassifier(nn.Module):
    """Fracture of one vertebra, from its sequence of T slices.

    Each slice's five intensity channels go through a timm backbone and its mask through a small CNN; their
    pooled features, side by side, are scored slice by slice, and run through a bidirectional LSTM along the
    slices. Attention weighs the LSTM's states into one vector for the head. BatchNorm sees the B·T slices of
    a batch as one batch.

    Args:
        config: its shape, and the weights that its backbone begins with.
        load_pretrained: whether it begins with them; not where a run's own weights are loaded next.

    Attributes:
        config: as given.
        pretrained: source, name, version and SHA-256 of the pretrained weights; None without.
        backbone, mask_encoder: the encoders of a slice.

    Example:
        >>> model = FractureClassifier(ModelConfig.small()).eval()
        >>> model(torch.zeros(2, 15, 6, 64, 64, dtype=torch.uint8)).attention.shape
        torch.Size([2, 15])
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, config: ModelConfig, *, load_pretrained: bool = True) -> None:
        super().__init__()
        self.config = config
        weights = None
        if config.pretrained is not None and load_pretrained:
            weights = pretrained_weights(config.backbone, config.pretrained)
        self.pretrained = weights and weights.record
        self.backbone, features = backbone(config.backbone, config.feature_stride, weights)
        self.set_channels(INTENSITIES)
        self.mask_encoder = mask_encoder(config.mask_features)
        features = features * POOLINGS[config.pooling] + config.mask_features
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
        encoded = self.encode(sequences.flatten(0, 1)).unflatten(0, (batch, slices))
        return self.score(encoded, vertebrae)

    def score(self, encoded: Tensor, vertebrae: Tensor | None = None) -> ClassifierOutput:
        """Score B sequences by the features of their slices.

        Args:
            encoded: `(B, T, D)`, of `encode`.
            vertebrae: as in `forward`.
        """
        features = encoded
        if self.vertebra is not None:
            embedded = self.vertebra(vertebrae).unsqueeze(1).expand(-1, encoded.shape[1], -1)
            features = torch.cat([encoded, embedded], dim=2)
        with torch.autocast(features.device.type, enabled=False):  # on a GPU it would run in float16
            states, _ = self.lstm(self.dropout(features).float())  # (B, T, 2 · hidden)
        attention = self.attention(states).squeeze(2).float().softmax(dim=1)
        summary = (attention.unsqueeze(2) * states).sum(dim=1)  # (B, 2 · hidden)
        logit = self.head(self.dropout(summary)).squeeze(1)
        slice_logit = self.slice_head(encoded).squeeze(2)  # (B, T)
        if self.config.slice_evidence:
            logit = logit + (attention * slice_logit).sum(dim=1)
        return ClassifierOutput(logit, attention, slice_logit)

    def set_channels(self, channels: int) -> None:
        """Choose how many of the six channels the backbone is given.

        Each is normalised, (x / 255 − mean) / deviation. The factors are laid out as a row of an image, for
        then the sum runs over whole rows, and takes a fraction of the time.
        """
        mean, deviation = (
            torch.tensor([*values, *values][:channels], device="cpu")
            for values in self.config.normalisation.values()
        )
        for name, factors in (("scale", 1 / (255 * deviation)), ("shift", -mean / deviation)):
            rows = factors.expand(1, 1, self.config.size, channels).contiguous().permute(0, 3, 1, 2)
            self.register_buffer(name, rows, persistent=False)  # (1, channels, 1, W); the config decides them

    def checkpoint_gradients(self) -> None:
        """Compute the backbone's inner values again for the gradients instead of keeping them.

        Raises:
            ValueError: timm cannot do so in this backbone.
        """
        try:
            self.backbone.set_grad_checkpointing(True)
        except AssertionError as error:
            raise ValueError(
                f"timm has no gradient checkpointing for {self.config.backbone}. Set "
                "gradient_checkpointing=False, or choose another backbone."
            ) from error

    def encode(self, pixels: Tensor) -> Tensor:
        """Features `(N, D)` of single slices, uint8 `(N, 6, H, W)`; `slice_head` scores them."""
        channels = self.scale.shape[1]  # all six in a folded model
        image = pixels[:, :channels].to(torch.float32, memory_format=torch.channels_last)
        torch.addcmul(self.shift, image, self.scale, out=image)
        maps = self.backbone.forward_features(image)  # (N, D, H / stride, W / stride)
        mask = (pixels[:, INTENSITIES:] > 127).float()  # (N, 1, H, W)
        return torch.cat([*_pooled(maps, mask, self.config.pooling), self.mask_encoder(mask)], dim=1)

    def _check(self, sequences: Tensor, vertebrae: Tensor | None) -> None:
        config = self.config
        expected = (config.slices, CHANNELS, config.size, config.size)
        if sequences.dtype != torch.uint8 or sequences.ndim != 5 or sequences.shape[1:] != expected:
            raise ValueError(
                f"Sequences are uint8 of shape (B, {', '.join(map(str, expected))}) for this model; found "
                f"{str(sequences.dtype).removeprefix('torch.')} of shape {tuple(sequences.shape)}. "
                "Pack them again, or build the model with their slices and size."
            )
        if self.vertebra is not None and (vertebrae is None or vertebrae.shape != sequences.shape[:1]):
            found = "none" if vertebrae is None else f"shape {tuple(vertebrae.shape)}"
            raise ValueError(
                f"This model has a vertebra embedding and needs vertebrae of shape ({len(sequences)},), "
                f"0 for C1 to 6 for C7; found {found}. Pass them with the sequences."
            )


def _pooled(maps: Tensor, mask: Tensor, pooling: str) -> list[Tensor]:
    """Values `(N, D)` of feature maps `(N, D, h, w)`, as `ModelConfig.pooling` says.

    Args:
        maps: of N slices.
        mask: `(N, 1, H, W)`, 0 or 1.
        pooling: one of `POOLINGS`.
    """
    whole = [maps.mean((2, 3))] if pooling != "avgmax_inside" else []
    whole += [maps.amax((2, 3))] if pooling in ("avgmax", "avgmax_mask") else []
    if pooling in ("avg", "avgmax"):
        return whole
    covered = adaptive_avg_pool2d(mask, (maps.shape[2], maps.shape[3]))  # share of each cell
    weight = max_pool2d(covered, 3, stride=1, padding=1)  # dilated by one cell
    weight = torch.where(weight.amax((2, 3), keepdim=True) > 0, weight, 1.0)
    inside = (maps * weight).sum((2, 3)) / weight.sum((2, 3))
    return [*whole, inside, maps.masked_fill(weight == 0, -torch.inf).amax((2, 3))]
