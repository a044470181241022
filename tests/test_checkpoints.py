import json
import pickle
import re
import time
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from cspine_helpers import checkpoints
from cspine_helpers.labels import VERTEBRAE
from cspine_helpers.model import FractureClassifier, ModelConfig

CONFIG = replace(ModelConfig.small(), slices=3, size=32, feature_stride=4, lstm_hidden=4)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return FractureClassifier(CONFIG)


@pytest.fixture
def run(tmp_path, model):
    checkpoints.save_weights(tmp_path, model)
    record = {"model": asdict(CONFIG), "classes": list(VERTEBRAE), "decision": {"threshold": 0.25}}
    checkpoints.write_record(tmp_path, record)
    return tmp_path


def edit(run, **changes):
    path = run / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(run, change):
    path = run / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"model": json.dumps(asdict(CONFIG))})


def test_a_run_comes_back_in_eval_mode_with_equal_outputs(run, model):
    found = checkpoints.load_run(run)
    sequences = torch.randint(0, 256, (2, 3, 6, 32, 32), dtype=torch.uint8)
    assert not found.model.training
    assert (found.config, found.threshold, found.folder) == (CONFIG, 0.25, run)
    for ours, theirs in zip(found.model(sequences), model.eval()(sequences), strict=True):
        assert torch.equal(ours, theirs)


def test_loading_leaves_the_random_state_alone(run):
    state = torch.get_rng_state()
    checkpoints.load_run(run)
    assert torch.equal(state, torch.get_rng_state())


def test_a_run_of_pretrained_weights_loads_without_them(tmp_path):
    config = replace(CONFIG, pretrained=True, pretrained_file="not there any more.safetensors")
    model = FractureClassifier(CONFIG)
    model.config = config
    checkpoints.save_weights(tmp_path, model)
    record = {"model": asdict(config), "classes": list(VERTEBRAE), "decision": {"threshold": None}}
    checkpoints.write_record(tmp_path, record)
    found = checkpoints.load_run(tmp_path)
    assert found.config == config
    assert found.threshold is None


def test_the_small_run_loads_within_a_second(tmp_path):
    config = ModelConfig.small()
    checkpoints.save_weights(tmp_path, FractureClassifier(config))
    record = {"model": asdict(config), "classes": list(VERTEBRAE), "decision": {"threshold": 0.5}}
    checkpoints.write_record(tmp_path, record)
    start = time.process_time()
    checkpoints.load_run(tmp_path)
    assert time.process_time() - start < 1


def test_saving_twice_gives_the_same_bytes(tmp_path, model):
    first = checkpoints.save_weights(tmp_path, model).read_bytes()
    assert checkpoints.save_weights(tmp_path, model, "last").read_bytes() == first
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.safetensors", "model.safetensors"]


def test_the_record_is_readable_json_and_takes_numpy_numbers(tmp_path):
    record = {"metrics": {"recall": np.float64(0.5), "n": np.int64(3)}, "note": "C1 – C7"}
    path = checkpoints.write_record(tmp_path, record)
    assert "C1 – C7" in path.read_text(encoding="utf-8")
    assert checkpoints.read_record(tmp_path) == {
        "format": 1,
        "metrics": {"recall": 0.5, "n": 3},
        "note": "C1 – C7",
    }


def test_a_record_without_json_is_refused_and_the_old_one_stays(run):
    before = (run / "run.json").read_bytes()
    with pytest.raises(ValueError, match=r"'record\.metrics\.recall', 'record\.list\[1\]'"):
        checkpoints.write_record(run, {"metrics": {"recall": float("nan")}, "list": [0.0, float("inf")]})
    with pytest.raises(ValueError, match="found set"):
        checkpoints.write_record(run, {"x": {1, 2}})
    assert (run / "run.json").read_bytes() == before
    assert len(list(run.iterdir())) == 2


def test_missing_files_say_what_makes_them(run, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"run\.json is missing\. Train one with notebook 03"):
        checkpoints.load_run(tmp_path / "none")
    (run / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors is missing"):
        checkpoints.load_run(run)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 2}, "is of format 2; this version reads format 1"),
        ({"classes": ["L1", "L2"]}, r"has classes \['L1', 'L2'\]"),
        ({"model": None}, "no model config"),
        ({"model": asdict(CONFIG) | {"colour": 1}}, "colour is unknown"),
        ({"model": {"size": 32}}, "backbone is missing; dropout is missing"),
        ({"model": asdict(CONFIG) | {"slices": 0}}, r"slices = 0 \(1 or more\)"),
        ({"model": asdict(CONFIG) | {"slices": 5}}, "slices is 3, not 5"),
        ({"model": asdict(CONFIG) | {"backbone": "resnet18"}}, "backbone is 'tf_efficientnetv2_b0', not"),
        ({"decision": None}, "no threshold"),
        ({"decision": {}}, "no threshold"),
        ({"decision": {"threshold": 1.5}}, "found {'threshold': 1.5}"),
        ({"decision": {"threshold": True}}, "no threshold"),
    ],
)
def test_another_record_is_refused(run, changes, message):
    edit(run, **changes)
    with pytest.raises(ValueError, match=message):
        checkpoints.load_run(run)


@pytest.mark.parametrize("text", ["{", "", "[]", "null"])
def test_a_damaged_record_is_refused(run, text):
    (run / "run.json").write_text(text)
    with pytest.raises(ValueError, match=r"is not JSON|is of format None"):
        checkpoints.load_run(run)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("head.bias"), "head.bias is missing"),
        (lambda tensors: tensors.update(extra=torch.zeros(1)), "extra is foreign"),
        (
            lambda tensors: tensors.update({"head.bias": torch.zeros(2)}),
            r"head.bias is float32 \(2,\), not float32 \(1,\)",
        ),
        (
            lambda tensors: tensors.update({"head.bias": torch.zeros(1, dtype=torch.float16)}),
            r"head.bias is float16 \(1,\), not float32 \(1,\)",
        ),
        (lambda tensors: tensors.clear(), r"and \d+ more"),
    ],
)
def test_other_tensors_are_refused(run, change, message):
    edit_weights(run, change)
    with pytest.raises(ValueError, match=message):
        checkpoints.load_run(run)


@pytest.mark.parametrize("header", [None, {"model": "{"}, {"model": "[]"}, {"other": "{}"}])
def test_weights_without_a_config_are_refused(run, header):
    path = run / "model.safetensors"
    save_file(load_file(path), path, metadata=header)
    with pytest.raises(ValueError, match="header holds no model config"):
        checkpoints.load_run(run)


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was opened",))


@pytest.mark.parametrize("kind", ["pickle", "torch", "truncated", "empty"])
def test_a_file_that_is_not_safetensors_is_refused_unopened(run, kind):
    path = run / "model.safetensors"
    if kind == "pickle":
        path.write_bytes(pickle.dumps(Bomb()))
    elif kind == "torch":
        torch.save(Bomb(), path)
    else:
        path.write_bytes(path.read_bytes()[: 5000 if kind == "truncated" else 0])
    with pytest.raises(ValueError, match=re.escape("is not a whole safetensors file")):
        checkpoints.load_run(run)
