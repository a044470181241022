"""Networks that read one radiograph: is a bone fractured, and where; chosen in `RadiographConfig`."""

import copy
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, NamedTuple, get_args

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from torchvision.models.segmentation.deeplabv3 import DeepLabHead

from cspine_helpers.files.paths import listing
from cspine_helpers.files.records import Check, check_settings, one_of, optional, setting, whole, within
from cspine_helpers.model.encoders import PROBE, backbone, feature_maps, is_backbone
from cspine_helpers.model.forward import fold_norms
from cspine_helpers.model.pretrained import SOURCE, pretrained_weights, without_package

Architecture = Literal["decoder", "classifier", "deeplabv3", "simple_cnn"]
WITH_MASK: tuple[Architecture, ...] = ("decoder", "deeplabv3")  # those that predict one
DECODED = (4, 8, 16, 32)  # strides of the maps that the decoder joins
MASK_STRIDE = DECODED[0]  # pixels to one cell of the mask
FRAME_STEP = DECODED[-1]  # height and width of a frame are multiples of it
_MOST = 4096  # pixels or features: more is a damaged record or a slip
_RARE_LOGIT = -4.0  # of every cell of the mask at the beginning


def _is_side(value: object) -> bool:
    return type(value) is int and 0 < value <= _MOST and value % FRAME_STEP == 0


def _are_widths(value: object) -> bool:
    return (
        isinstance(value, tuple | list)
        and len(value) == len(DECODED)
        and all(type(each) is int and 0 < each <= _MOST for each in value)
    )


_SIDE = Check(f"a multiple of {FRAME_STEP}, at most {_MOST}", _is_side)


@dataclass(frozen=True)
class RadiographConfig:
    """What is needed to build a `RadiographModel`; saved whole in `run.json`.

    Attributes:
        architecture: "decoder", an encoder with a light decoder for the mask and a head for presence;
            "classifier", an encoder with a head and no mask; "deeplabv3", an encoder at stride 8 with
            DeepLabV3's head for the mask and one for presence; "simple_cnn", two convolutions and two linear
            layers, without pretrained weights, as a floor.
        backbone: the encoder, a CNN of timm; None for the simple CNN alone.
        pretrained: weights that it begins with: "hub", "package", the path of a `.safetensors` file, or None,
            random ones; see `ModelConfig`.
        long, short: pixels of a frame's sides, portrait or landscape. The network takes other frames, too.
        frozen_blocks: the stem and so many blocks stay as they were pretrained, norms too, in every epoch.
        decoder_channels: features of the decoder at strides 32, 16, 8 and 4.
        dropout: share of pooled features that the presence head does not see in training.
        mask_cells: the presence head looks at the mean of so many of the mask's highest logits.
        mask_evidence: what that mean weighs in the presence logit; 0: nothing.
        head_features: of a hidden layer in the classifier's head; 0: none.
    """

    architecture: Architecture = setting("decoder", one_of(*get_args(Architecture)))
    backbone: str | None = setting(
        "tf_efficientnet_lite0",
        optional(Check("a CNN of timm that gives feature maps, such as tf_efficientnet_lite0", is_backbone)),
    )
    pretrained: str | None = setting("package", SOURCE)
    long: int = setting(448, _SIDE)
    short: int = setting(384, _SIDE)
    frozen_blocks: int = setting(3, whole(0, 64))
    decoder_channels: tuple[int, ...] = setting(
        (96, 96, 64, 32), Check("four numbers of features, at strides 32, 16, 8 and 4", _are_widths)
    )
    dropout: float = setting(0.3, within("[0, 1)"))
    mask_cells: int = setting(40, whole(1))
    mask_evidence: float = setting(0.3, within("[0, inf)"))
    head_features: int = setting(0, whole(0, _MOST))

    def __post_init__(self) -> None:
        if isinstance(self.decoder_channels, list):  # as JSON has it
            object.__setattr__(self, "decoder_channels", tuple(self.decoder_channels))
        check_settings(self)
        if problem := self._contradiction():
            raise ValueError(f"RadiographConfig cannot have {problem}")

    def _contradiction(self) -> str | None:
        """Settings that do not go together, and what to do."""
        if self.short > self.long:
            return f"short = {self.short} and long = {self.long}. Exchange them."
        if self.architecture == "simple_cnn":
            if (self.backbone, self.pretrained, self.frozen_blocks) == (None, None, 0):
                return None
            return (
                f"backbone = {self.backbone!r}, pretrained = {self.pretrained!r} and frozen_blocks = "
                f"{self.frozen_blocks} with architecture = 'simple_cnn', which has no encoder. Set them to "
                "none, none and 0."
            )
        if self.backbone is None:
            return f"no backbone with architecture = {self.architecture!r}. Name a CNN of timm."
        missing = [stride for stride in DECODED if stride not in feature_maps(self.backbone)]
        if missing and self.architecture == "decoder":
            return (
                f"backbone = {self.backbone!r} with architecture = 'decoder', which needs maps at strides "
                f"{listing(DECODED)}; it has none at {listing(missing)}. Choose another."
            )
        if problem := without_package(self.backbone, self.pretrained):
            return problem
        if self.frozen_blocks and self.pretrained is None:
            return (
                f"frozen_blocks = {self.frozen_blocks} with pretrained = None: they would stay random. Name "
                "pretrained weights, or freeze none."
            )
        return None

    @property
    def normalisation(self) -> dict[str, list[float]]:
        """Mean and standard deviation of each of three equal channels, of pixels from 0 to 1.

        Those of the pretrained weights, and ones that give -1 to 1 for random weights.

        Example:
            >>> RadiographConfig(backbone="resnet50", pretrained="hub").normalisation["mean"]
            [0.485, 0.456, 0.406]
        """
        cfg = timm.get_pretrained_cfg(self.backbone) if self.backbone and self.pretrained else None
        mean, deviation = (cfg.mean, cfg.std) if cfg else ((0.5,) * 3, (0.5,) * 3)
        return {"mean": list(mean), "deviation": list(deviation)}


class RadiographOutput(NamedTuple):
    """What the network says of B radiographs.

    Attributes:
        logit: `(B,)`, of a fracture being there.
        mask_logit: `(B, H / 4, W / 4)`, of each cell of 4 × 4 pixels being of a fracture; None where the
            architecture gives no mask.
    """

    logit: Tensor
    mask_logit: Tensor | None

    @property
    def probability(self) -> Tensor:
        """`(B,)` float64, of a fracture being there."""
        return self.logit.double().sigmoid()


class RadiographModel(nn.Module):
    """Whether a bone is fractured, and where, from one radiograph.

    Grey is what a network pretrained on photographs sees as three equal channels. Where it normalises all
    three alike, they are one channel, and the first layer's weights are summed: the same function.

    The frozen part of the encoder has its norms folded into its convolutions, for good, and its weights are
    buffers: no optimizer finds them, no gradient reaches them. On a CPU it runs image by image, for then the
    widest maps stay in the processor's cache, which takes a third of the time of a whole batch; in inference
    so does all of the network.

    Args:
        config: its shape, and the weights that its encoder begins with.
        load_pretrained: whether it begins with them; not where a run's own weights are loaded next.

    Attributes:
        config: as given.
        pretrained: source, name, version and SHA-256 of the pretrained weights; None without.
        backbone: the encoder.

    Example:
        >>> model = RadiographModel(RadiographConfig(pretrained=None, frozen_blocks=0)).eval()
        >>> model(torch.zeros(2, 96, 64, dtype=torch.uint8)).mask_logit.shape
        torch.Size([2, 24, 16])
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, config: RadiographConfig, *, load_pretrained: bool = True) -> None:
        super().__init__()
        self.config = config
        self._checkpointed = False
        mean, deviation = (torch.tensor(each, device="cpu") for each in config.normalisation.values())
        if len(mean.unique()) == len(deviation.unique()) == 1:
            mean, deviation = mean[:1], deviation[:1]
        for name, factors in (("scale", 1 / (255 * deviation)), ("shift", -mean / deviation)):
            self.register_buffer(name, factors.view(1, -1, 1, 1), persistent=False)  # the config decides them
        weights = None
        if config.backbone and config.pretrained and load_pretrained:
            weights = pretrained_weights(config.backbone, config.pretrained)
        self.pretrained = weights and weights.record
        self.backbone = _encoder(config, len(mean), weights)
        self._steps = _trace(self.backbone, len(mean))
        self._blocks = _blocks(self.backbone, self._steps)
        self._kept, features = self._maps_of_interest()
        self._frozen = self._freeze()
        self.decoder: nn.Module | None = None
        pooled = features[-1] if config.architecture == "classifier" else 2 * features[-1]
        if config.architecture == "decoder":
            self.decoder = Decoder(features, config.decoder_channels)
            pooled += config.decoder_channels[1]
        elif config.architecture == "deeplabv3":
            self.decoder = DeepLabHead(features[-1], 1)
        self.head = _head(config, pooled)
        if self.decoder is not None:  # at first no cell shows a fracture, and presence is an even chance
            for layer, value in (
                (self.decoder, _RARE_LOGIT),
                (self.head, -config.mask_evidence * _RARE_LOGIT),
            ):
                *_, last = layer.modules()
                nn.init.constant_(last.bias, value)  # type: ignore[arg-type]
        self.to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> RadiographOutput:
        """Score B radiographs.

        Args:
            images: uint8 `(B, H, W)`, frames of height and width that are multiples of 32.

        Raises:
            ValueError: another dtype or shape.
        """
        self._check(images)
        image = images.unsqueeze(1).float()
        image = torch.addcmul(self.shift, image, self.scale)  # (B, 1 or 3, H, W)
        image = image.contiguous(memory_format=torch.channels_last)
        if self._alone(image) and not (self.training or torch.is_grad_enabled()):
            found = [self._score(one) for one in image.split(1)]
        else:
            found = [self._score(image)]
        logits, masks = zip(*found, strict=True)
        return RadiographOutput(torch.cat(logits), None if masks[0] is None else torch.cat(masks))

    def train(self, mode: bool = True) -> "RadiographModel":
        """Into training mode, or out of it; the encoder's frozen part always computes as in inference."""
        super().train(mode)
        for name in list(self._steps)[: self._frozen]:
            self.backbone.get_submodule(name).eval()
        return self

    def checkpoint_gradients(self) -> None:
        """Compute the encoder's inner values again for the gradients instead of keeping them."""
        self._checkpointed = True

    @torch.inference_mode(False)  # gradients show which layer follows which
    @torch.no_grad()
    def folded(self, *, gradients: bool = False) -> "RadiographModel":
        """A copy for inference, the same up to rounding: norms are folded into the convolutions before.

        Args:
            gradients: whether they reach the image, also through what was frozen in training.
        """
        twin = copy.deepcopy(self).eval()
        vars(twin).pop("forward", None)  # where Accelerate trains it: a wrapper for mixed precision
        fold_norms(twin, (twin._joined, torch.zeros(1, self.scale.shape[1], PROBE, PROBE)))
        twin._frozen = 0 if gradients else twin._frozen
        return twin.requires_grad_(False)

    def _check(self, images: Tensor) -> None:
        sides = images.shape[1:]
        fits = images.ndim == 3 and all(side > 0 and side % FRAME_STEP == 0 for side in sides)
        if images.dtype != torch.uint8 or not fits:
            raise ValueError(
                f"Radiographs are uint8 of shape (B, H, W), H and W multiples of {FRAME_STEP}; found "
                f"{str(images.dtype).removeprefix('torch.')} of shape {tuple(images.shape)}. Bring them into "
                "a frame first."
            )

    def _freeze(self) -> int:
        """Fold the norms of stem and first blocks, make buffers of their weights; returns their steps."""
        if not self.config.frozen_blocks:
            return 0
        blocks = sorted(set(self._blocks.values()))
        if self.config.frozen_blocks > len(blocks):
            raise ValueError(
                f"{self.config.backbone} has {len(blocks)} blocks; frozen_blocks = "
                f"{self.config.frozen_blocks} are too many. Freeze fewer."
            )
        last = [
            name for name, number in self._blocks.items() if number == blocks[self.config.frozen_blocks - 1]
        ]
        names = list(self._steps)
        names = names[: names.index(last[-1]) + 1]
        probe = torch.zeros(1, self.scale.shape[1], PROBE, PROBE)
        fold_norms(self.backbone.eval(), (lambda image: self._run(image, names)[0], probe))
        self.backbone.train()
        for name in names:
            for module in self.backbone.get_submodule(name).modules():
                for own, value in list(module.named_parameters(recurse=False)):
                    delattr(module, own)
                    module.register_buffer(own, value.detach())
                module.eval()
        return len(names)

    def _maps_of_interest(self) -> tuple[list[str], list[int]]:
        """Names of the steps whose maps are used, the deepest last, and their numbers of features."""
        deepest = list(self._steps)[-1]
        if self.config.architecture != "decoder":
            return [deepest], [self._steps[deepest][1]]
        at_stride = {stride: name for name, (stride, _) in self._steps.items()}  # the last one of each
        kept = [at_stride[stride] for stride in DECODED]
        return kept, [self._steps[name][1] for name in kept]

    @staticmethod
    def _alone(image: Tensor) -> bool:
        """Whether images are computed one by one."""
        return image.device.type == "cpu" and len(image) > 1

    def _run(self, image: Tensor, names: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """Steps of the encoder: their result, and the maps of interest on the way."""
        maps = {}
        again = self._blocks if self._checkpointed and self.training and torch.is_grad_enabled() else {}
        for name in names:
            step = self.backbone.get_submodule(name)
            image = checkpoint(step, image, use_reentrant=False) if name in again else step(image)
            if name in self._kept:
                maps[name] = image
        return image, maps

    def _maps(self, image: Tensor) -> list[Tensor]:
        """The maps of interest, the finest first."""
        names, maps = list(self._steps), {}
        if self._frozen:
            with torch.no_grad():
                parts = [
                    self._run(part, names[: self._frozen])
                    for part in (image.split(1) if self._alone(image) else [image])
                ]
                image = torch.cat([last for last, _ in parts])
                maps = {name: torch.cat([found[name] for _, found in parts]) for name in parts[0][1]}
        maps |= self._run(image, names[self._frozen :])[1]
        return [maps[name] for name in self._kept]

    def _score(self, image: Tensor) -> tuple[Tensor, Tensor | None]:
        """Presence and mask of normalised images."""
        maps = self._maps(image)
        if self.config.architecture == "simple_cnn":
            return self.head(maps[-1]).squeeze(1), None
        pooled, mask_logit = [maps[-1].mean((2, 3))], None
        if self.config.architecture != "classifier":
            pooled.append(maps[-1].amax((2, 3)))
        if isinstance(self.decoder, Decoder):
            mask_logit, coarse = self.decoder(maps)
            pooled.append(coarse.amax((2, 3)))
        elif self.decoder is not None:
            size, deepest = [side // MASK_STRIDE for side in image.shape[2:]], maps[-1]
            if self.training and len(image) == 1:  # a norm of its pooling takes no single value
                deepest = deepest.expand(2, -1, -1, -1)
            mask_logit = functional.interpolate(self.decoder(deepest)[: len(image)], size, mode="bilinear")
        logit = self.head(torch.cat(pooled, dim=1)).squeeze(1)
        if mask_logit is None:
            return logit, None
        mask_logit = mask_logit.squeeze(1)
        cells = mask_logit.flatten(1)
        highest = cells.topk(min(self.config.mask_cells, cells.shape[1]), sorted=False).values
        return logit + self.config.mask_evidence * highest.mean(1), mask_logit

    def _joined(self, image: Tensor) -> Tensor:
        """All that the network says, in one number: what `fold_norms` follows back."""
        logit, mask_logit = self._score(image)
        return logit.sum() if mask_logit is None else logit.sum() + mask_logit.sum()


class Decoder(nn.Module):
    """From the deepest map up to stride 4: each finer map of the encoder is added, and the sum smoothed.

    Source: Lin et al., Feature pyramid networks for object detection, CVPR 2017, with one output.

    Args:
        features: of the encoder's maps at strides 4, 8, 16 and 32.
        channels: of its own maps at strides 32, 16, 8 and 4.
    """

    def __init__(self, features: Sequence[int], channels: Sequence[int]) -> None:
        super().__init__()
        self.lateral = nn.ModuleList(
            nn.Conv2d(given, own, 1) for given, own in zip(reversed(features), channels, strict=True)
        )
        self.narrow = nn.ModuleList(nn.Conv2d(above, own, 1, bias=False) for above, own in pairwise(channels))
        self.smooth = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(own, own, 3, padding=1, bias=False), nn.BatchNorm2d(own), nn.ReLU(inplace=True)
            )
            for own in channels
        )
        self.mask = nn.Conv2d(channels[-1], 1, 1)

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Logits of the mask `(B, 1, H / 4, W / 4)`, and the decoder's own map at stride 16.

        Args:
            maps: of the encoder, at strides 4, 8, 16 and 32.
        """
        own = self.smooth[0](self.lateral[0](maps[-1]))
        decoded = [own]
        for level, given in enumerate(reversed(maps[:-1])):
            above = functional.interpolate(self.narrow[level](own), scale_factor=2.0, mode="nearest")
            own = self.smooth[level + 1](above + self.lateral[level + 1](given))
            decoded.append(own)
        return self.mask(own), decoded[1]


def _encoder(config: RadiographConfig, channels: int, weights: Any) -> Any:
    """The encoder of an architecture, without what it does not use."""
    if config.backbone is None:
        return nn.Sequential(
            *(nn.Conv2d(channels, 16, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2)),
            *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2)),
        )
    options = {"output_stride": 8} if config.architecture == "deeplabv3" else {}
    deepest = max(feature_maps(config.backbone))
    network, _ = backbone(config.backbone, deepest, weights, channels=channels, **options)
    if config.architecture == "decoder":  # not the layers that widen the deepest map for a classifier
        parts = [name for name, _ in network.named_children()]
        last_block = network.feature_info[-1]["module"].split(".")[0]
        for name in parts[parts.index(last_block) + 1 :]:
            setattr(network, name, nn.Identity())
    return network


def _head(config: RadiographConfig, pooled: int) -> nn.Sequential:
    """From pooled features to the presence logit; the last layer is linear."""
    if config.architecture == "simple_cnn":  # at 224 × 224 pixels the pooling changes nothing
        cells, hidden = 56, 128
        return nn.Sequential(
            *(nn.AdaptiveAvgPool2d(cells), nn.Flatten(), nn.Linear(32 * cells * cells, hidden)),
            *(nn.ReLU(), nn.Dropout(config.dropout), nn.Linear(hidden, 1)),
        )
    layers: list[nn.Module] = [nn.Dropout(config.dropout)]
    if config.head_features:
        layers += [nn.Linear(pooled, config.head_features), nn.ReLU(), nn.Dropout(config.dropout)]
        pooled = config.head_features
    return nn.Sequential(*layers, nn.Linear(pooled, 1))


@torch.no_grad()
def _trace(network: Any, channels: int) -> dict[str, tuple[int, int]]:
    """The steps of an encoder, each of which takes what the one before gives: stride and features of its map.

    Raises:
        ValueError: it is no such chain.
    """
    # 1. Its parts, and those of its lists of blocks.
    parts: dict[str, nn.Module] = {}
    for name, child in network.named_children():
        listed = isinstance(child, nn.Sequential) and name in ("blocks", "stages", "features")
        parts |= {f"{name}.{n}": each for n, each in child.named_children()} if listed else {name: child}
    # 2. What each of them is given, and gives.
    calls: list[tuple[str, Tensor, Tensor]] = []
    hooks = [
        part.register_forward_hook(
            lambda module, given, result, name=name: calls.append((name, given[0], result))
        )
        for name, part in parts.items()
    ]
    image = torch.zeros(1, channels, PROBE, PROBE, device=next(network.parameters()).device)
    try:
        result = getattr(network.eval(), "forward_features", network)(image)
    finally:
        for hook in hooks:
            hook.remove()
        network.train()
    # 3. Whether they are a chain.
    ends = [image, *(gave for _, _, gave in calls)]
    chain = all(given is before for (_, given, _), before in zip(calls, ends, strict=False))
    if not chain or ends[-1] is not result or len({name for name, _, _ in calls}) < len(calls):
        raise ValueError(
            f"{type(network).__name__} is no chain of blocks, as radiographs need it. Name another backbone."
        )
    return {name: (PROBE // gave.shape[2], gave.shape[1]) for name, _, gave in calls}


def _blocks(network: Any, steps: Iterable[str]) -> dict[str, int]:
    """The steps of an encoder that are blocks, with the block's number; one may be several steps."""
    if not hasattr(network, "group_matcher"):
        return {}
    matcher: Any = network.group_matcher(coarse=True)["blocks"]
    pattern = matcher if isinstance(matcher, str) else matcher[0][0]
    return {name: int(found[1]) for name in steps if (found := re.match(pattern, name))}
