"""Peak memory of a training step, with and without gradient checkpointing."""

from collections.abc import Iterator

import torch

from benchmarks.measure import Row, in_fresh_process, peak_mib
from benchmarks.model import CUDA, DEVICE, batch_of, training_step
from cspine_helpers.model.classifier import FractureClassifier, ModelConfig
from cspine_helpers.training.config import TrainConfig

MEMORY = """
import sys
from benchmarks.memory import step_memory
print(step_memory(sys.argv[1] == "True", int(sys.argv[2])))
"""


def step_memory(checkpointing: bool, size: int) -> str:
    """Peak memory of two training steps of the RSNA-size model, MiB."""
    config = ModelConfig()
    network = FractureClassifier(config).to(DEVICE).train()
    network.backbone.set_grad_checkpointing(checkpointing)
    step = training_step(network, batch_of(config, size), precision="bf16" if CUDA else "no")
    before = peak_mib()
    step()
    step()
    if CUDA:
        return f"{torch.cuda.max_memory_allocated() / 2**20:.0f}"
    return f"{peak_mib() - before:.0f}"


def rows() -> Iterator[Row]:
    """Peak memory with and without gradient checkpointing, each in a process of its own."""
    size = TrainConfig().batch_size
    plain, saving = (int(in_fresh_process(MEMORY, str(on), str(size))) for on in (False, True))
    yield Row(
        f"peak memory of a training step, RSNA-size model, batch {size}",
        "with gradient checkpointing",
        f"{plain / 1024:.1f} GiB without, {saving / 1024:.1f} GiB with "
        "(TrainConfig(gradient_checkpointing=True))",
        note=f"on {DEVICE.type}, {'bfloat16' if CUDA else 'float32'}, beyond the libraries",
    )
