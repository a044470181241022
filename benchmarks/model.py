"""The model against its bare backbone: a training step, inference, precision and layout."""

import os
import shutil
from collections.abc import Callable, Iterator

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from benchmarks.measure import Row, interleaved, milliseconds, ratio, spread
from cspine_helpers.model.classifier import INTENSITIES, FractureClassifier, ModelConfig
from cspine_helpers.model.forward import folded
from cspine_helpers.training.config import adamw
from cspine_helpers.training.losses import Loss
from cspine_helpers.training.trainer import RunningStatistics

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
# name → model, sequences of a batch, repeats; the RSNA-size model takes 5 s a sequence on a CPU
MODELS = {
    "built-in": (ModelConfig.small(), 16, 15),
    "RSNA-size": (ModelConfig(), 8 if CUDA else 4, 15 if CUDA else 5),
}


def batch_of(config: ModelConfig, size: int) -> dict[str, Tensor]:
    """A batch in the loader's layout: channels last in memory."""
    generator = torch.Generator().manual_seed(0)
    shape = (size, config.slices, config.size, config.size, INTENSITIES + 1)
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    batch = {
        "sequence": pixels.permute(0, 1, 4, 2, 3),  # (B, T, 6, H, W)
        "vertebra": torch.randint(0, 7, (size,), generator=generator),
        "label": (torch.arange(size) % 2).float(),
        "slice_truth": (torch.rand(size, config.slices, generator=generator) < 0.3).float(),
    }
    return {name: tensor.to(DEVICE) for name, tensor in batch.items()}


def images_of(config: ModelConfig, size: int, *, layout: torch.memory_format) -> Tensor:
    """What the bare backbone is given: as many slices, float32, already on the device."""
    images = torch.randn(size * config.slices, INTENSITIES, config.size, config.size)
    return images.to(DEVICE, memory_format=layout)


def done(function: Callable[[], object]) -> Callable[[], object]:
    """The function, waiting until the device has finished."""

    def waited() -> None:
        function()
        if CUDA:
            torch.cuda.synchronize()

    return waited


def training_step(network: FractureClassifier, batch: dict[str, Tensor], *, precision: str) -> Callable:
    """`trainer.train_epoch` on a batch: forward, loss, backward, running statistics, optimizer."""
    accelerator, statistics = Accelerator(), RunningStatistics(network)
    optimizer = adamw(network, 1e-4, 0.02)
    loss = Loss(alpha=0.9, slice_alpha=0.9, slice_weight=1.0, vertebra_weights=(1.0,) * 7)

    def step() -> None:
        torch.manual_seed(0)
        autocast = torch.autocast(DEVICE.type, torch.bfloat16, enabled=precision == "bf16")
        with autocast, statistics.batch():
            output = network(batch["sequence"], batch["vertebra"])
        loss(output, batch).backward()
        statistics.advance(accelerator, 1)
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return done(step)


def backbone_step(backbone: nn.Module, images: Tensor, *, precision: str) -> Callable:
    """Forward and backward of the backbone alone."""

    def step() -> None:
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=precision == "bf16"):
            maps = backbone.forward_features(images)
        maps.float().mean().backward()
        for parameter in backbone.parameters():
            parameter.grad = None

    return done(step)


def forward(network: nn.Module, *inputs: Tensor, name: str = "forward") -> Callable:
    """A forward pass without gradients."""

    def step() -> None:
        with torch.inference_mode():
            getattr(network, name)(*inputs)

    return done(step)


def against_backbone() -> Iterator[Row]:
    """The whole model's throughput as a share of its backbone's."""
    precision = "bf16" if CUDA else "no"
    for name, (config, size, repeats) in MODELS.items():
        torch.manual_seed(0)
        network = FractureClassifier(config).to(DEVICE)
        bare = FractureClassifier(config).to(DEVICE).backbone
        batch = batch_of(config, size)
        images = images_of(config, size, layout=torch.channels_last)
        steps = {
            "model": training_step(network.train(), batch, precision=precision),
            "backbone": backbone_step(bare.train(), images, precision=precision),
        }
        times = interleaved(steps, repeats=repeats)
        share = ratio(times["backbone"], times["model"])
        yield Row(
            f"training step, {name} model",
            f"bare backbone forward + backward, {size} × {config.slices} × {config.size}², "
            f"{'bf16' if CUDA else 'float32'}",
            f"{spread(share)} of its throughput; {milliseconds(times['model'])} a step",
            "≥ 0.92",
            share[0] >= 0.92,
        )
        inputs = batch["sequence"], batch["vertebra"]
        passes = {
            "model": forward(folded(network), *inputs),
            "as trained": forward(network.eval(), *inputs),
            "backbone": forward(bare.eval(), images, name="forward_features"),
        }
        times = interleaved(passes, repeats=2 * repeats)
        share, plain = ratio(times["backbone"], times["model"]), ratio(times["backbone"], times["as trained"])
        yield Row(
            f"inference, {name} model",
            f"bare backbone forward, {size} × {config.slices} × {config.size}², float32",
            f"{spread(share)} of its throughput; {milliseconds(times['model'])} a batch",
            "≥ 0.95",
            share[0] >= 0.95,
            f"inference folds the BatchNorms into the convolutions; without that {spread(plain)}",
        )


def choices() -> Iterator[Row]:
    """Precision, memory layout and compilation against the same step in float32, channels last, eager."""
    config, size, repeats = MODELS["RSNA-size" if CUDA else "built-in"]
    batch = batch_of(config, size)

    def made(layout: torch.memory_format = torch.channels_last) -> FractureClassifier:
        torch.manual_seed(0)
        return FractureClassifier(config).to(DEVICE, memory_format=layout).train()

    steps = {
        "float32, channels last": training_step(made(), batch, precision="no"),
        "bfloat16": training_step(made(), batch, precision="bf16"),
        "channels first": training_step(made(torch.contiguous_format), batch, precision="no"),
    }
    if CUDA or shutil.which("g++"):
        compiled = made()
        compiled.backbone.forward_features = torch.compile(compiled.backbone.forward_features)
        steps["torch.compile of the backbone"] = training_step(compiled, batch, precision="no")
    times = interleaved(steps, repeats=repeats, warm_up=2)
    default = times.pop("float32, channels last")
    for name, found in times.items():
        yield Row(
            f"{name}, {DEVICE.type}",
            "float32, channels last, eager: the same training step",
            f"{spread(ratio(default, found))} of its throughput",
        )


def rows() -> Iterator[Row]:
    """All measurements of the model."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    yield from against_backbone()
    yield from choices()
