import hashlib
import re
import stat

import pytest

from cspine_helpers import paths


def test_the_root_is_the_nearest_folder_above_that_holds_notebooks(tmp_path, monkeypatch):
    monkeypatch.delenv("CSPINE_ROOT", raising=False)
    (tmp_path / "notebooks" / "deep").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "notebooks" / "deep")
    assert paths.project_root() == tmp_path


def test_the_environment_variable_decides_where_the_root_is(tmp_path, monkeypatch):
    monkeypatch.setenv("CSPINE_ROOT", str(tmp_path))
    assert paths.cohort_dir("rsna2022") == tmp_path / "data" / "rsna2022"
    assert paths.run_dir("builtin") == tmp_path / "checkpoints" / "builtin"
    assert paths.figures_dir() == tmp_path / "figures"
    assert paths.figures_dir("quick") == tmp_path / "figures" / "quick"


def test_without_notebooks_above_the_error_names_the_folder_and_the_way_out(tmp_path, monkeypatch):
    monkeypatch.delenv("CSPINE_ROOT", raising=False)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=f"{re.escape(str(tmp_path))}.*CSPINE_ROOT"):
        paths.project_root()


@pytest.mark.parametrize("name", ["", "..", "../x", "a/b", "a b", ".hidden", "-rf", "a" * 65, "x\n"])
@pytest.mark.parametrize("folder", [paths.cohort_dir, paths.run_dir, paths.figures_dir])
def test_names_that_are_no_plain_folder_names_are_refused(folder, name, tmp_path, monkeypatch):
    monkeypatch.setenv("CSPINE_ROOT", str(tmp_path))
    with pytest.raises(ValueError, match="name is up to 64 letters"):
        folder(name)


def test_uids_of_digits_and_dots_pass():
    paths.check_uids(["1.2.826.0.1.3680043.6200", "1", "1" * 64])


@pytest.mark.parametrize(
    "uid",
    ["", "../1.2", "1/2", "1.2\n", " 1.2", "a", "..", ".", "1" * 65, "٣.٤", 1.2, 12, None, float("nan")],
)
def test_uids_that_could_not_be_file_names_are_refused_by_name(uid):
    with pytest.raises(ValueError, match=r"1 StudyInstanceUID not made of") as error:
        paths.check_uids(["1.2.3", uid])
    assert repr(uid) in str(error.value)
    assert "1.2.3" not in str(error.value)


def test_every_bad_uid_is_counted_and_named():
    with pytest.raises(ValueError, match=r"^2 StudyInstanceUID.*'x', 'y/z'"):
        paths.check_uids(["x", "1.2", "y/z"])


def test_a_listing_names_every_item_however_many():
    assert paths.listing(["a", 1]) == "'a', 1"
    assert paths.listing(range(1000)) == ", ".join(map(str, range(1000)))


def test_a_file_is_replaced_only_when_the_block_ends_well(tmp_path):
    path = tmp_path / "new" / "file.txt"
    with paths.atomic_path(path) as temporary:
        temporary.write_text("old")
        assert not path.exists()

    def fail():
        with paths.atomic_path(path) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert path.read_text() == "old"
    assert [file.name for file in path.parent.iterdir()] == ["file.txt"]


def test_a_replaced_file_has_the_rights_of_a_plainly_written_one(tmp_path):
    plain = tmp_path / "plain"
    plain.write_text("")
    with paths.atomic_path(tmp_path / "file") as temporary:
        temporary.write_text("")
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)


def test_the_hash_is_sha256_of_the_bytes(tmp_path):
    (tmp_path / "file").write_bytes(b"cervical spine")
    assert paths.sha256_of(tmp_path / "file") == hashlib.sha256(b"cervical spine").hexdigest()
