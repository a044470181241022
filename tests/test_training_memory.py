from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from toy_cohort import tiny_model

from cspine_helpers.training import memory
from cspine_helpers.training.config import TrainConfig
from cspine_helpers.training.memory import fitted

CONFIG = TrainConfig(batch_size=8, accumulate=3)
GPU = SimpleNamespace(device=torch.device("cuda"))


@pytest.fixture
def room(monkeypatch):
    """A GPU whose memory holds so many sequences; which batches were tried."""

    def holds(most: int) -> list[int]:
        tried = []

        def one_step(batch_size, *_):
            tried.append(batch_size)
            if batch_size > most:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

        monkeypatch.setattr(memory, "_one_step", one_step)
        return tried

    return holds


@pytest.mark.parametrize(
    ("most", "found", "tried"), [(100, 24, [24]), (9, 8, [24, 12, 8]), (7, 6, [24, 12, 8, 6])]
)
def test_the_largest_batch_that_fits_divides_the_step(room, most, found, tried):
    seen = room(most)
    config = fitted(CONFIG, tiny_model(), GPU, {})
    assert (config.batch_size, config.accumulate) == (found, 24 // found)
    assert replace(config, batch_size=8, accumulate=3) == CONFIG
    assert seen == tried


def test_a_resumed_training_keeps_its_batches_and_another_step_is_tried(room):
    tried = room(100)
    config = fitted(CONFIG, tiny_model(), GPU, {"batch_size": 4, "accumulate": 6})
    assert (config.batch_size, config.accumulate, tried) == (4, 6, [])
    assert fitted(CONFIG, tiny_model(), GPU, {"batch_size": 4, "accumulate": 1}).batch_size == 24


def test_where_nothing_fits_it_says_what_to_do(room):
    room(0)
    with pytest.raises(ValueError, match=r"^Not even one sequence of 5 slices of 32 × 32 .*checkpointing"):
        fitted(CONFIG, tiny_model(), GPU, {})


def test_another_error_is_not_taken_for_a_lack_of_memory(monkeypatch):
    def broken(*_):
        raise TypeError("no such thing")

    monkeypatch.setattr(memory, "_one_step", broken)
    with pytest.raises(TypeError, match="no such thing"):
        fitted(CONFIG, tiny_model(), GPU, {})


def test_a_cpu_and_who_wants_none_of_it_keep_what_is_said(room):
    tried = room(1)
    assert fitted(CONFIG, tiny_model(), Accelerator(cpu=True), {}) is CONFIG
    exact = replace(CONFIG, fit_memory=False)
    assert fitted(exact, tiny_model(), GPU, {}) is exact
    assert tried == []


@pytest.mark.parametrize("checkpointing", [False, True])
def test_what_is_tried_is_a_step_of_training(checkpointing):
    steps, step = [], torch.optim.AdamW.step

    def counted(optimizer, *arguments, **options):
        steps.append([p.grad is not None for group in optimizer.param_groups for p in group["params"]])
        return step(optimizer, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", counted)
        config = replace(CONFIG, gradient_checkpointing=checkpointing)
        memory._one_step(2, config, tiny_model(), Accelerator(cpu=True))
    assert len(steps) == 1
    assert all(steps[0])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA device's memory is tried")
def test_a_gpus_memory_is_tried():
    accelerator = Accelerator()
    config = fitted(CONFIG, tiny_model(), accelerator, {})
    assert config.batch_size * config.accumulate == 24
