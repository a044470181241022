import errno
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cspine_helpers.files.records import append, whole_records

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


def test_a_full_disk_is_told_with_the_file_and_the_remedy(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(OSError, match=r"notes could not be written .*its records are kept"):
        append(tmp_path / "notes", RECORDS)
