"""How many samples a GPU's memory holds at once, while a step has as many as the settings say."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import find_executable_batch_size, gather_object
from torch import Tensor

from cspine_helpers.model.classifier import FractureClassifier, ModelConfig
from cspine_helpers.packed import CHANNELS
from cspine_helpers.training.config import TrainConfig, TrainerConfig, adamw

Config = TypeVar("Config", bound=TrainerConfig)


def fitted(
    config: TrainConfig, model: ModelConfig, accelerator: Accelerator, earlier: Mapping[str, Any]
) -> TrainConfig:
    """The config with the largest batch of sequences that fits, see `largest_batch`."""
    return largest_batch(
        config,
        lambda batch_size: _one_step(batch_size, config, model, accelerator),
        accelerator,
        earlier,
        what=f"sequence of {model.slices} slices of {model.size} × {model.size} pixels",
    )


def largest_batch(
    config: Config,
    attempt: Callable[[int], object],
    accelerator: Accelerator,
    earlier: Mapping[str, Any],
    *,
    what: str,
) -> Config:
    """The config with the largest batch that fits, and as many samples a step as before.

    On a CPU, and without `fit_memory`, the config as it is.

    Args:
        config: `batch_size · accumulate` samples make a step of each process.
        attempt: a step of training with a batch of so many.
        accelerator: whose device is tried, of all processes; the smallest decides.
        earlier: training settings of what is resumed, whose batches are kept; empty at the beginning.
        what: a sample, for the error.

    Raises:
        ValueError: not even one sample fits.
    """
    step = config.batch_size * config.accumulate
    if accelerator.device.type != "cuda" or not config.fit_memory:
        return config
    size, accumulate = (earlier.get(name, 0) for name in ("batch_size", "accumulate"))
    if size * accumulate == step:
        return replace(config, batch_size=size, accumulate=accumulate)
    sizes = iter([size for size in range(step, 0, -1) if step % size == 0])

    def fits(batch_size: int) -> int:
        attempt(batch_size)
        return batch_size

    try:
        size = find_executable_batch_size(fits, next(sizes), lambda: next(sizes, 0))()
    except RuntimeError as error:
        raise ValueError(
            f"Not even one {what} fits into the memory of {accelerator.device} ({error}). Set "
            "gradient_checkpointing=True, or take smaller ones."
        ) from error
    size = min(gather_object([size]))
    return replace(config, batch_size=size, accumulate=step // size)


def _one_step(batch_size: int, config: TrainConfig, model: ModelConfig, accelerator: Accelerator) -> None:
    shape = (batch_size, model.slices, CHANNELS, model.size, model.size)
    given = [
        torch.zeros(shape, dtype=torch.uint8, device=accelerator.device),
        torch.zeros(batch_size, dtype=torch.int64, device=accelerator.device),
    ]
    take_step(FractureClassifier(model, load_pretrained=False), given, config, accelerator)


def take_step(network: Any, given: Sequence[Tensor], config: TrainerConfig, accelerator: Accelerator) -> None:
    """Forward, backward and a step of AdamW, with a network that is needed for nothing else.

    Args:
        network: its output is made of tensors, or None.
        given: what it is given.
        config: how it is trained.
        accelerator: where.
    """
    if config.gradient_checkpointing:
        network.checkpoint_gradients()
    network.to(accelerator.device)
    optimizer = adamw(network, config.learning_rate, config.weight_decay)
    with accelerator.autocast():
        loss = sum(part.sum() for part in network(*given) if part is not None)
    loss.backward()
    optimizer.step()
