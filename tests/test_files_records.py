import errno
import json
import math
import re
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from toy_cohort import tiny_model

from cspine_helpers import runs
from cspine_helpers.checkpoints import load_run
from cspine_helpers.ct.masks import read_scheme
from cspine_helpers.decisions.test_split import read_decision
from cspine_helpers.files import paths, records
from cspine_helpers.files.records import append, whole_records
from cspine_helpers.labels import VERTEBRAE
from cspine_helpers.model_card.results import read_run_files
from cspine_helpers.phantom import cohort as phantom
from cspine_helpers.predictions import read_predictions
from cspine_helpers.runs import write_record
from cspine_helpers.training.settings import settings_of
from cspine_helpers.training.trainer import read_state


def read(path):
    return records.read_sealed(
        path, version=1, missing="It is missing.", again="make it again", writer="write_sealed(...)"
    )


def test_a_record_comes_back_with_its_hash_where_it_stood(tmp_path):
    content = {"format": 1, records.SEAL: "", "numbers": [np.float64(0.5), np.int64(3)], "note": "C1 – C7"}
    path = records.write_sealed(tmp_path / "made" / "record.json", content)
    found = read(path)
    assert list(found) == list(content)
    assert found["numbers"] == [0.5, 3]
    assert found[records.SEAL] == records.content_sha256(found)
    assert "C1 – C7" in path.read_text(encoding="utf-8")


def test_a_record_without_a_place_for_the_hash_has_it_last(tmp_path):
    found = read(records.write_sealed(tmp_path / "record.json", {"format": 1}))
    assert list(found) == ["format", records.SEAL]


def test_the_order_of_keys_and_the_hash_itself_are_not_hashed():
    record = {"a": 1, "b": [1, 2]}
    again = {"b": (1, 2), records.SEAL: "another", "a": 1}
    assert records.content_sha256(record) == records.content_sha256(again)
    assert records.content_sha256(record) != records.content_sha256(record | {"a": 2})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"a": {"b": float("nan")}, "c": [0.0, float("inf")]}, r"'record\.a\.b', 'record\.c\[1\]'"),
        ({"a": {1, 2}}, r"plain values; found set"),
    ],
)
def test_what_json_cannot_hold_is_refused_and_nothing_written(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        records.write_sealed(tmp_path / "record.json", content)
    assert not list(tmp_path.iterdir())


def test_a_damaged_record_says_what_to_do(tmp_path):
    path = tmp_path / "record.json"
    with pytest.raises(FileNotFoundError, match=r"^It is missing\.$"):
        read(path)
    records.write_sealed(path, {"format": 1, "number": 0.25})
    whole = path.read_text()
    for text, message in (
        (
            whole.replace("0.25", "0.35"),
            r"another SHA-256.*make it again.*goes through write_sealed\(\.\.\.\)",
        ),
        (
            whole.replace('"format": 1', '"format": 2'),
            r"of format 2; this version reads format 1\..*unknown ver",
        ),
        (whole[:-3], r"is not JSON .*make it again"),
        ("[1]", "of format None"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            read(path)
    path.unlink()
    outside = tmp_path / "elsewhere" / "record.json"
    records.write_sealed(outside, {"format": 1})
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "record.json").symlink_to(outside)
    with pytest.raises(ValueError, match="link out of its folder"):
        read(tmp_path / "run" / "record.json")


def test_the_version_that_wrote_a_record_is_named():
    assert "cspine_helpers 0.0.9; this is" in records.written_by({"versions": {"cspine_helpers": "0.0.9"}})
    assert "of an unknown version" in records.written_by(json.loads("null"))


def test_where_no_run_is_the_others_are_named_and_how_they_are_used(tmp_path):
    folder = tmp_path / "mine"
    assert runs.other_runs(folder) == ""
    for name in ("mine-previous-1", "mine-previous-2", "rsna"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").touch()
    (tmp_path / "brought").mkdir()
    (tmp_path / "brought" / "predictions.csv").touch()
    (tmp_path / "mine-training").mkdir()
    said = runs.other_runs(folder)
    assert (
        "there: 'brought', 'mine-previous-1', 'mine-previous-2', 'rsna'; use one with RUN = 'brought'" in said
    )
    line = "paths.run_dir('mine-previous-2').rename(paths.run_dir('mine'))"
    assert line in said
    assert "A training of it stopped in mine-training; RETRAIN = True" in said
    for read in (runs.read_record, read_run_files, lambda run: read_predictions(run / "predictions.csv")):
        with pytest.raises(FileNotFoundError, match=r"otebook 03.*mine-previous-2.*restores it"):
            read(folder)


def test_the_line_that_restores_a_run_restores_it(tmp_path, monkeypatch):
    monkeypatch.setenv("CSPINE_ROOT", str(tmp_path))
    paths.run_dir("mine-previous-1").mkdir(parents=True)
    (paths.run_dir("mine-previous-1") / "run.json").write_text("the run")
    line = re.search(r"paths\.run_dir\(\S+\)\)", runs.other_runs(paths.run_dir("mine")))[0]
    eval(line, {"paths": paths})
    assert (tmp_path / "checkpoints" / "mine" / "run.json").read_text() == "the run"


@dataclass(frozen=True)
class Settings:
    number: float = records.setting(0.5, records.within("(0, 1]"))
    count: int = records.setting(2, records.whole(1, 3))
    kind: str = records.setting("a", records.one_of("a", "b"))
    on: bool = records.setting(False, records.TRUE_OR_FALSE)

    def __post_init__(self):
        records.check_settings(self)


def test_settings_are_held_to_the_ends_of_their_ranges_and_all_that_break_them_are_named():
    assert Settings(1, 3, "b", True) == Settings(number=1.0, count=3, kind="b", on=True)
    with pytest.raises(
        ValueError, match=r"number = 0 \(in \(0, 1\]\); count = 4 .*1 to 3\); kind = 'c'.*on = 1"
    ):
        Settings(0, 4, "c", 1)
    for wrong in ({"number": True}, {"number": "1"}, {"number": math.nan}, {"count": True}, {"count": 1.0}):
        with pytest.raises(ValueError, match=f"Settings cannot have {next(iter(wrong))} = "):
            Settings(**wrong)


def test_a_config_comes_from_json_whole_or_with_defaults():
    assert records.config_of(Settings, {"count": 3}) == Settings(count=3)
    with pytest.raises(
        ValueError,
        match=r"Settings: size is unknown \(known: number, count, .*\); number is missing; kind is missing",
    ):
        records.config_of(Settings, {"count": 3, "size": 1}, whole=True)
    with pytest.raises(ValueError, match=r"made of names and values; found \['count'\]"):
        records.config_of(Settings, ["count"])


def test_differences_are_those_of_every_place():
    wanted = {"a": {"b": 1, "c": [1, 2]}, "d": None, "e": {"f": 2}}
    assert records.differences(wanted, wanted) == []
    found = {"a": {"b": 2, "c": [1]}, "e": 3, "g": 4}
    assert records.differences(found, wanted) == [
        "a.b is 2, not 1",
        "a.c is [1], not [1, 2]",
        "e is 3, not {'f': 2}",
        "g is 4, not None",
    ]


DEEP = "[" * 100_000 + "]" * 100_000


def read_header_of_weights(folder):
    save_file({"a": torch.zeros(1)}, folder / "model.safetensors", metadata={"model": DEEP})
    load_run_of(folder)


def load_run_of(folder):
    write_record(
        folder, {"classes": list(VERTEBRAE), "model": asdict(tiny_model()), "decision": {"threshold": 1}}
    )
    load_run(folder)


def read_state_of(folder):
    save_file({"a": torch.zeros(1)}, folder / "state.safetensors", metadata={"state": DEEP})
    read_state(folder)


@pytest.mark.parametrize(
    ("name", "read_it"),
    [
        ("run.json", runs.read_record),
        ("run.json", lambda folder: settings_of(folder / "run.json")),
        ("cohort.json", lambda folder: phantom.study_of(folder, "1.2")),
        ("decision.json", read_decision),
        ("scheme.json", lambda folder: read_scheme(folder / "scheme.json")),
        ("model.safetensors", read_header_of_weights),
        ("state.safetensors", read_state_of),
    ],
)
def test_json_that_is_nested_too_deep_is_refused_in_a_sentence(tmp_path, name, read_it):
    (tmp_path / name).write_text(DEEP)
    with pytest.raises(ValueError, match=r"nested too deep|holds no model config") as error:
        read_it(tmp_path)
    assert len(str(error.value)) < 600


def test_json_of_any_depth_is_read_or_refused(tmp_path):
    for depth in range(800, 1000, 7):
        (tmp_path / "run.json").write_text('{"format": 1, "a": ' + "[" * depth + "]" * depth + "}")
        with pytest.raises(ValueError, match=r"nested too deep|not the record that was written"):
            runs.read_record(tmp_path)


RECORDS = [{"of": "a run"}, [0.1, 0.2], [0.30000000000000004], []]


def written(folder: Path) -> Path:
    path = folder / "notes"
    for count in range(1, len(RECORDS) + 1):
        append(path, RECORDS[:count])
    return path


def test_records_come_back_as_they_were(tmp_path):
    assert whole_records(written(tmp_path)) == RECORDS
    assert whole_records(tmp_path / "none") == []


def test_a_new_file_gets_all_records(tmp_path):
    append(tmp_path / "new", RECORDS)
    assert (tmp_path / "new").read_bytes() == written(tmp_path).read_bytes()


@settings(derandomize=True, max_examples=60)
@given(data=st.data())
def test_whatever_happens_to_its_bytes_the_records_before_are_left(tmp_path_factory, data):
    path = written(tmp_path_factory.mktemp("notes"))
    whole = path.read_bytes()
    place = data.draw(st.integers(0, len(whole) - 1))
    value = data.draw(st.integers(0, 255).filter(lambda byte: byte != whole[place]))
    path.write_bytes(whole[:place] + bytes([value]) + whole[place + 1 :])
    before = whole[:place].count(b"\n")
    assert whole_records(path) == RECORDS[:before]
    assert not path.exists() if before == 0 else whole.startswith(path.read_bytes())


def test_a_full_disk_is_an_error_with_the_file_and_the_remedy(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(OSError, match=r"notes could not be written .*its records are kept"):
        append(tmp_path / "notes", RECORDS)
