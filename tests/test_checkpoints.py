import hashlib
import json
import pickle
import re
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file

from cspine_helpers import __version__, checkpoints, runs
from cspine_helpers.files.tables import write_table
from cspine_helpers.labels import VERTEBRAE
from cspine_helpers.model.classifier import FractureClassifier, ModelConfig

BUILTIN = Path(__file__).parents[1] / "checkpoints" / "builtin"
CONFIG = replace(ModelConfig.small(), slices=3, size=32, feature_stride=4, lstm_hidden=4)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return FractureClassifier(CONFIG)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run as it is saved, of the weights of `model`."""
    folder = tmp_path_factory.mktemp("saved")
    torch.manual_seed(0)
    checkpoints.save_weights(folder, FractureClassifier(CONFIG))
    record = {"model": asdict(CONFIG), "classes": list(VERTEBRAE), "decision": {"threshold": 0.25}}
    runs.write_record(folder, record)
    return folder


@pytest.fixture
def run(saved, tmp_path):
    """A test's own copy of it."""
    return shutil.copytree(saved, tmp_path, dirs_exist_ok=True)


def content_sha256(record) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def edit(run, *, without=(), **changes):
    """Change the record, and its own hash with it."""
    record = json.loads((run / "run.json").read_text()) | changes
    record = {key: value for key, value in record.items() if key not in ("record_sha256", *without)}
    (run / "run.json").write_text(json.dumps(record | {"record_sha256": content_sha256(record)}))


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
    config = replace(CONFIG, pretrained="not there any more.safetensors")
    model = FractureClassifier(CONFIG)
    model.config = config
    checkpoints.save_weights(tmp_path, model)
    record = {"model": asdict(config), "classes": list(VERTEBRAE), "decision": {"threshold": None}}
    runs.write_record(tmp_path, record)
    found = checkpoints.load_run(tmp_path)
    assert found.config == config
    assert found.threshold is None


def test_saving_twice_gives_the_same_bytes(tmp_path, model):
    first = checkpoints.save_weights(tmp_path, model).read_bytes()
    assert checkpoints.save_weights(tmp_path, model, "last").read_bytes() == first
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.safetensors", "model.safetensors"]


def test_halved_weights_are_half_the_file_and_say_nearly_the_same(run, model):
    before = (run / "model.safetensors").stat().st_size
    checkpoints.halve_weights(run)
    checkpoints.halve_weights(run)  # again changes nothing
    assert (run / "model.safetensors").stat().st_size < 0.6 * before
    loaded = checkpoints.load_run(run)
    assert {value.dtype for value in loaded.model.parameters()} == {torch.float32}
    assert loaded.record["weights_dtype"] == "float16"
    for name, value in model.state_dict().items():
        found = loaded.model.state_dict()[name]
        if value.ndim > 1:
            torch.testing.assert_close(found, value, rtol=1e-3, atol=1e-6)
        else:
            assert torch.equal(found, value), name


def test_float16_that_the_record_does_not_name_is_refused(run):
    checkpoints.halve_weights(run)
    edit(run, without=("weights_dtype",))
    with pytest.raises(ValueError, match="float16"):
        checkpoints.load_run(run)


def test_weights_are_not_halved_while_training_nor_where_float16_cannot_hold_them(run):
    (run / "state.safetensors").touch()
    with pytest.raises(ValueError, match="has not ended"):
        checkpoints.halve_weights(run)
    (run / "state.safetensors").unlink()
    edit_weights(run, lambda tensors: tensors["head.weight"].fill_(1e6))
    runs.write_record(run, runs.read_record(run))
    with pytest.raises(ValueError, match=r"stays as it is: in float16 head\.weight"):
        checkpoints.halve_weights(run)


def test_the_record_is_readable_json_and_takes_numpy_numbers(tmp_path, model):
    weights = checkpoints.save_weights(tmp_path, model)
    record = {"metrics": {"recall": np.float64(0.5), "n": np.int64(3)}, "note": "C1 – C7"}
    path = runs.write_record(tmp_path, record)
    assert "C1 – C7" in path.read_text(encoding="utf-8")
    found = runs.read_record(tmp_path)
    assert found.pop("record_sha256") == content_sha256(found)
    assert found == {
        "format": 1,
        "weights_sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
        "metrics": {"recall": 0.5, "n": 3},
        "note": "C1 – C7",
    }


def test_a_record_read_and_written_again_keeps_its_bytes():
    """The committed record is as `write_record` makes it, and describes the weights beside it."""
    folder, record = BUILTIN, runs.read_record(BUILTIN)
    text = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
    assert (folder / "run.json").read_text(encoding="utf-8") == text
    assert list(record)[:2] == ["format", "weights_sha256"]
    assert record["weights_sha256"] == hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def test_a_record_describes_the_weights_beside_it_and_needs_them(tmp_path, model):
    with pytest.raises(FileNotFoundError, match=r"save_weights\(\.\.\.\) comes before"):
        runs.write_record(tmp_path, {})
    weights = checkpoints.save_weights(tmp_path, model)
    runs.write_record(tmp_path, {"weights_sha256": "another run's"})
    found = runs.read_record(tmp_path)["weights_sha256"]
    assert found == hashlib.sha256(weights.read_bytes()).hexdigest()


def test_weights_of_another_run_with_the_same_config_are_refused(run, model):
    before = (run / "model.safetensors").read_bytes()
    with torch.no_grad():
        model.head.bias.add_(1)
    checkpoints.save_weights(run, model)
    found, stored = (
        hashlib.sha256(b).hexdigest() for b in ((run / "model.safetensors").read_bytes(), before)
    )
    message = rf"SHA-256 is {found}, run\.json says {stored} .*Put back the two files of one run, or train"
    with pytest.raises(ValueError, match=message):
        checkpoints.load_run(run)
    (run / "model.safetensors").write_bytes(before)
    checkpoints.load_run(run)


@pytest.mark.parametrize("value", [None, "", 7])
def test_a_record_that_names_no_weights_is_refused(run, value):
    edit(run, weights_sha256=value)
    with pytest.raises(ValueError, match=rf"run\.json says {value or 'nothing'} \(weights_sha256\)"):
        checkpoints.load_run(run)
    edit(run, without=["weights_sha256"])
    with pytest.raises(ValueError, match=r"run\.json says nothing \(weights_sha256\)"):
        checkpoints.load_run(run)


def test_a_record_without_json_is_refused_and_the_old_one_stays(run):
    before = (run / "run.json").read_bytes()
    with pytest.raises(ValueError, match=r"'record\.metrics\.recall', 'record\.list\[1\]'"):
        runs.write_record(run, {"metrics": {"recall": float("nan")}, "list": [0.0, float("inf")]})
    with pytest.raises(ValueError, match="found set"):
        runs.write_record(run, {"x": {1, 2}})
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
        ({"model": None}, r"run\.json: ModelConfig is made of names and values; found None"),
        ({"model": asdict(CONFIG) | {"colour": 1}}, "colour is unknown"),
        ({"model": {"size": 32}}, "ModelConfig: backbone is missing; pretrained is missing"),
        ({"model": asdict(CONFIG) | {"slices": 0}}, r"slices = 0 \(a whole number, 1 to 4096\)"),
        ({"model": asdict(CONFIG) | {"channels": 4}}, "channels is unknown"),
        ({"model": asdict(CONFIG) | {"slices": "3"}}, r"slices = '3' \(a whole number, 1 to 4096\)"),
        ({"model": asdict(CONFIG) | {"slices": 5}}, "slices is 3, not 5"),
        ({"model": asdict(CONFIG) | {"lstm_hidden": 4096}}, "lstm_hidden is 4, not 4096"),
        ({"model": asdict(CONFIG) | {"backbone": "vit_tiny_patch16_224"}}, "cannot have backbone = 'vit_"),
        (
            {"model": asdict(CONFIG) | {"backbone": "tf_efficientnetv2_b1"}},
            "backbone is 'tf_efficientnetv2_b0', not",
        ),
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


@pytest.mark.parametrize(
    "text", ["{", "", "[]", "null", "\ufeff{}", "[" * 100_000, '{"a":' * 100_000, "9" * 10_000], ids=repr
)
def test_a_damaged_record_is_refused_by_name(run, text):
    (run / "run.json").write_text(text)
    with pytest.raises(ValueError, match=r"run\.json (is not JSON|is of format None)"):
        checkpoints.load_run(run)


def test_a_number_changed_by_hand_is_noticed_and_a_new_seal_makes_it_meant(run):
    path = run / "run.json"
    path.write_text(path.read_text().replace("0.25", "0.35"))
    written = r"run\.json is not the record that was written.* through runs\.write_record\(\.\.\.\)\."
    with pytest.raises(ValueError, match=written):
        checkpoints.load_run(run)
    runs.write_record(run, json.loads(path.read_text()))
    assert checkpoints.load_run(run).threshold == 0.35


def test_a_record_laid_out_differently_reads_the_same(run):
    record = runs.read_record(run)
    text = json.dumps(dict(reversed(record.items())), indent=7).replace("\n", "\r\n")
    (run / "run.json").write_bytes(text.encode())
    assert runs.read_record(run) == record


@pytest.mark.parametrize(
    ("task", "remedy"),
    [
        (
            "radiographs",
            r"Name another run, or load it with radiographs\.task\.load_radiograph_run\(\.\.\.\)\.",
        ),
        ("lumbar", r"Name another run\."),
    ],
)
def test_a_run_of_another_task_is_refused_in_one_sentence(run, task, remedy):
    edit(run, task=task)
    with pytest.raises(ValueError, match=rf"was trained on {task}, not on sequences\. {remedy}$"):
        checkpoints.load_run(run)
    assert runs.task_of(runs.read_record(run)) == task


def test_a_run_of_another_version_says_which(run):
    other = {"versions": {"cspine_helpers": "0.0.9"}}
    sentence = rf"written by cspine_helpers 0\.0\.9; this is {re.escape(__version__)}"
    for changes, differs in (
        ({"format": 2}, r"of format 2; this version reads format 1\."),
        ({"classes": ["L1"]}, r"classes \['L1'\]"),
        ({"model": asdict(CONFIG) | {"colour": 1}}, "colour is unknown"),
    ):
        edit(run, **{"format": 1, "classes": list(VERTEBRAE)} | other | changes)
        with pytest.raises(ValueError, match=f"{differs}.*{sentence}"):
            checkpoints.load_run(run)
    edit(run, format=3, versions=None)
    with pytest.raises(ValueError, match="cspine_helpers of an unknown version"):
        checkpoints.load_run(run)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_neither_written_nor_read(run, model, value):
    before = (run / "model.safetensors").read_bytes()
    with torch.no_grad():
        model.head.bias.fill_(value)
    with pytest.raises(ValueError, match=r"model\.safetensors was not written: head\.bias holds NaN or inf"):
        checkpoints.save_weights(run, model)
    assert (run / "model.safetensors").read_bytes() == before
    edit_weights(run, lambda tensors: tensors["head.bias"].fill_(value))
    with pytest.raises(ValueError, match=r"head\.bias holds NaN or infinity"):
        checkpoints.load_run(run)


@pytest.mark.parametrize("name", ["run.json", "model.safetensors"])
def test_a_file_that_is_a_link_out_of_the_run_is_refused(run, tmp_path, name):
    outside = tmp_path / "elsewhere" / name
    outside.parent.mkdir()
    folder = tmp_path / "run"
    folder.mkdir()
    for file in ("run.json", "model.safetensors"):
        (run / file).rename(folder / file)
    (folder / name).rename(outside)
    (folder / name).symlink_to(outside)
    with pytest.raises(ValueError, match=rf"{name} is a link out of its folder, to .*elsewhere"):
        checkpoints.load_run(folder)


def history(epochs=3):
    columns = {name: np.linspace(0.1, 0.7, epochs) for name in runs.HISTORY_COLUMNS}
    table = pd.DataFrame(columns | {"epoch": range(1, epochs + 1), "seconds": 2.5})
    table.loc[0, "threshold"] = np.nan
    return table


def test_a_history_comes_back_and_belongs_to_its_record(run):
    write_table(history(), run / "history.csv")
    with pytest.raises(ValueError, match=r"history\.csv is not the file that run\.json .*\(history_sha256\)"):
        runs.read_history(run)
    runs.write_record(run, runs.read_record(run))
    found = runs.read_history(run)
    pd.testing.assert_frame_equal(found, history()[list(runs.HISTORY_COLUMNS)], check_exact=True)
    assert len(runs.read_history(BUILTIN)) >= runs.read_record(BUILTIN)["best_epoch"]


def test_a_history_of_radiographs_has_masks_in_the_place_of_vertebrae(run):
    table = history().assign(validation_dice_pos=[0.1, 0.2, np.nan])
    write_table(table, run / "history.csv")
    runs.write_record(run, runs.read_record(run) | {"task": "radiographs"})
    found = runs.read_history(run)
    pd.testing.assert_series_equal(found["validation_dice_pos"], table["validation_dice_pos"])
    assert set(runs.HISTORY_COLUMNS) - set(found) == {f"validation_auroc_{name}" for name in VERTEBRAE}
    runs.write_record(run, runs.read_record(run) | {"task": "sequences"})
    assert tuple(runs.read_history(run)) == runs.HISTORY_COLUMNS


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epoch": [1, 2, 4]}, "epochs are 1, 2, 3 and so on; found 1, 2, 4"),
        ({"train_loss": [0.1, np.nan, 0.1]}, r"not finite numbers \(1\): '2 train_loss: nan'"),
        ({"learning_rate": [0.1, 0.1, np.inf]}, r"not finite numbers \(1\): '3 learning_rate: inf'"),
        ({"validation_auroc": [0.1, 1.1, -0.1]}, r"from 0 to 1 \(2\): '2 validation_auroc: 1.1', '3 val"),
        ({"threshold": ["low", 0.1, 0.1]}, r"from 0 to 1 \(1\): '1 threshold: low'"),
    ],
)
def test_a_history_that_breaks_a_rule_is_refused(run, change, message):
    write_table(history().assign(**change), run / "history.csv")
    runs.write_record(run, runs.read_record(run))
    with pytest.raises(ValueError, match=f"(?s)history.csv.*{message}"):
        runs.read_history(run)


def test_a_run_without_history_says_what_writes_it(run):
    with pytest.raises(FileNotFoundError, match=r"No history at .*notebook 03"):
        runs.read_history(run)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("head.bias"), r"head.bias is None, not 'float32 \(1,\)'"),
        (lambda tensors: tensors.update(extra=torch.zeros(1)), r"extra is 'float32 \(1,\)', not None"),
        (
            lambda tensors: tensors.update({"head.bias": torch.zeros(2)}),
            r"head.bias is 'float32 \(2,\)', not 'float32 \(1,\)'",
        ),
        (
            lambda tensors: tensors.update({"head.bias": torch.zeros(1, dtype=torch.float16)}),
            r"head.bias is 'float16 \(1,\)', not 'float32 \(1,\)'",
        ),
        (
            lambda tensors: tensors.update({"backbone.conv_stem.weight": torch.zeros(32, 4, 3, 3)}),
            r"conv_stem\.weight is 'float32 \(32, 4, 3, 3\)', not 'float32 \(32, 5, 3, 3\)'",
        ),
        (
            lambda tensors: tensors.clear(),
            r"conv_stem\.weight is None, .*bn1\.bias is None, .* and 60 more\.",
        ),
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


@pytest.mark.parametrize("kind", ["pickle", "torch", "truncated", "empty", "huge header", "long header"])
def test_a_file_that_is_not_safetensors_is_refused_unopened(run, kind):
    path = run / "model.safetensors"
    if kind == "pickle":
        path.write_bytes(pickle.dumps(Bomb()))
    elif kind == "torch":
        torch.save(Bomb(), path)
    elif kind.endswith("header"):  # its first 8 bytes say how long it is
        length = 2**60 if kind == "huge header" else 90_000_000
        path.write_bytes(length.to_bytes(8, "little") + path.read_bytes()[8:])
    else:
        path.write_bytes(path.read_bytes()[: 5000 if kind == "truncated" else 0])
    with pytest.raises(ValueError, match=re.escape("is not a whole safetensors file")):
        checkpoints.load_run(run)


@pytest.mark.parametrize(
    "changes",
    [
        {"lstm_layers": 10**6},
        {"lstm_hidden": 10**12},
        {"mask_features": 10**9},
        {"slices": 10**9},
        {"size": 10**5},
    ],
)
def test_sizes_that_no_model_has_are_refused_before_one_is_built(run, changes, monkeypatch):
    monkeypatch.setattr(checkpoints, "FractureClassifier", lambda _: pytest.fail("a model was built"))
    edit(run, model=asdict(CONFIG) | changes)
    with pytest.raises(ValueError, match=rf"ModelConfig cannot have {next(iter(changes))} = 10+ \("):
        checkpoints.load_run(run)


def test_a_config_that_is_not_that_of_the_weights_is_refused_before_a_model_is_built(run, monkeypatch):
    monkeypatch.setattr(checkpoints, "FractureClassifier", lambda _: pytest.fail("a model was built"))
    edit(run, model=asdict(CONFIG) | {"lstm_layers": 16, "lstm_hidden": 4096})
    with pytest.raises(ValueError, match=r"lstm_hidden is \d+, not 4096; lstm_layers is \d+, not 16"):
        checkpoints.load_run(run)


def test_tensors_of_another_shape_are_refused_before_they_are_read(run, monkeypatch):
    edit_weights(run, lambda tensors: tensors.update({"head.bias": torch.zeros(2)}))
    monkeypatch.setattr(checkpoints, "_not_finite_tensors", lambda _: pytest.fail("tensors were read"))
    with pytest.raises(ValueError, match=r"head.bias is 'float32 \(2,\)', not 'float32 \(1,\)'"):
        checkpoints.load_run(run)


@pytest.mark.parametrize("device", ["nonsense", "meta", "cuda:99"])
def test_a_device_that_is_not_there_is_refused_in_a_sentence(run, device):
    with pytest.raises(ValueError, match=f"'{device}' is no device that torch can use here"):
        checkpoints.load_run(run).to(device)
    assert checkpoints.load_run(run).to("cpu").model.head.weight.device.type == "cpu"
