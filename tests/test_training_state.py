import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from cspine_helpers.training.state import STATE, TrainingState, read_state, restore, save_state

SETTING = {"model": {"size": 32}, "train": {"seed": 0}, "data": {}, "processes": 1, "left_out": {}}


def trained(seed: int, steps: int = 3):
    torch.manual_seed(seed)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.Flatten(), torch.nn.Linear(32, 1)
    ).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    go_on(model, optimizer, steps)
    return model, optimizer


def go_on(model, optimizer, steps):
    torch.manual_seed(1)
    for _ in range(steps):
        model(torch.randn(16, 3, 4, 4)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_what_was_saved_goes_on_exactly(tmp_path):
    model, optimizer = trained(0)
    state = TrainingState(SETTING, stage="sequences", epoch=3, rows=[{"epoch": 1, "threshold": math.nan}])
    save_state(tmp_path, state, model, optimizer)
    go_on(model, optimizer, 2)
    found, tensors = read_state(tmp_path)
    other, other_optimizer = trained(5, steps=1)
    restore(tensors, other, other_optimizer)
    go_on(other, other_optimizer, 2)
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name
    assert found.epoch == 3
    assert found.setting == SETTING
    assert math.isnan(found.history["threshold"][0])


def test_a_history_without_rows_has_its_columns():
    assert list(TrainingState(SETTING).history.columns) == [
        "epoch",
        "validation_recall",
        "validation_average_precision",
    ]


def test_a_state_that_is_missing_or_damaged_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"state\.safetensors is missing"):
        read_state(tmp_path)
    save_state(tmp_path, TrainingState(SETTING), *trained(0))
    whole = (tmp_path / STATE).read_bytes()
    for damaged in (whole[:-10], whole[:100], b"", b"\x80\x04pickle", b"\xff" * 64):
        (tmp_path / STATE).write_bytes(damaged)
        with pytest.raises(ValueError, match=r"not the whole state of a training .*set_aside"):
            read_state(tmp_path)


def test_a_state_without_its_header_or_of_another_format_is_refused(tmp_path):
    save_state(tmp_path, TrainingState(SETTING), *trained(0))
    tensors = load_file(tmp_path / STATE)
    save_file(tensors, tmp_path / STATE)
    with pytest.raises(ValueError, match="not the whole state"):
        read_state(tmp_path)
    later = {"format": 99, "setting": SETTING, "a field of its own": 1}
    save_file(tensors, tmp_path / STATE, metadata={"state": json.dumps(later)})
    with pytest.raises(ValueError, match="format 99; this version reads"):
        read_state(tmp_path)


@pytest.mark.parametrize("place", [0.3, 0.6, 0.99])
def test_a_single_changed_byte_is_noticed(tmp_path, place):
    save_state(tmp_path, TrainingState(SETTING), *trained(0))
    content = bytearray((tmp_path / STATE).read_bytes())
    content[int(place * len(content))] ^= 4
    (tmp_path / STATE).write_bytes(content)
    with pytest.raises(ValueError, match="not the whole state of a training"):
        read_state(tmp_path)


def test_a_state_that_says_another_epoch_is_noticed(tmp_path):
    save_state(tmp_path, TrainingState(SETTING, epoch=3), *trained(0))
    content = (tmp_path / STATE).read_bytes()
    (tmp_path / STATE).write_bytes(content.replace(b'\\"epoch\\": 3', b'\\"epoch\\": 7'))
    assert (tmp_path / STATE).read_bytes() != content
    with pytest.raises(ValueError, match="its content is not what was written"):
        read_state(tmp_path)
