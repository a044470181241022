import errno
import hashlib
import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from toy_cohort import make_toy_cohort

from cspine_helpers.cohort import read_cohort
from cspine_helpers.files import paths
from cspine_helpers.labels import read_labels, write_labels
from cspine_helpers.packed import check_sequences
from cspine_helpers.packing.cohort import PackSource
from cspine_helpers.phantom import cohort as phantom
from cspine_helpers.splits import split_patients, write_split


@pytest.mark.parametrize("sign", ["notebooks/01_label_prevalence.ipynb", "cspine_helpers/__init__.py"])
def test_the_root_is_the_nearest_folder_above_that_holds_this_projects_notebooks(tmp_path, monkeypatch, sign):
    monkeypatch.delenv("CSPINE_ROOT", raising=False)
    deep = tmp_path / "notebooks" / "deep" / "other" / "notebooks"  # a project of somebody else, inside
    deep.mkdir(parents=True)
    (tmp_path / sign).parent.mkdir(exist_ok=True)
    (tmp_path / sign).touch()
    monkeypatch.chdir(deep)
    assert paths.project_root() == tmp_path


def test_a_foreign_folder_with_notebooks_is_not_taken_for_the_root(tmp_path, monkeypatch):
    monkeypatch.delenv("CSPINE_ROOT", raising=False)
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path / "notebooks")
    foreign = re.escape(f"({tmp_path} has notebooks/ of another project)")
    with pytest.raises(FileNotFoundError, match=f"{foreign}.* set CSPINE_ROOT"):
        paths.project_root()


def test_the_signs_of_the_root_are_there(monkeypatch):
    root = Path(__file__).parents[1]
    assert [sign for sign in paths._SIGNS if not (root / sign).is_file()] == []


def test_a_cohort_that_is_not_there_names_those_that_are(tmp_path):
    assert set(paths.PHANTOMS) == set(phantom.COHORTS)
    assert "make cohort COHORT=quick" in paths.cohort_remedy(tmp_path / "quick")
    assert "Cohorts that are there" not in paths.cohort_remedy(tmp_path / "mine")
    for name in ("rsna2022", "quick"):
        (tmp_path / name / "train_images").mkdir(parents=True)
    said = r"where the files of RSNA 2022 go.*Cohorts that are there: 'quick', 'rsna2022'\."
    for read in (read_cohort, lambda folder: PackSource.of(folder).studies()):
        with pytest.raises(FileNotFoundError, match=said):
            read(tmp_path / "rsna")
        with pytest.raises(FileNotFoundError, match=r"`make cohort COHORT=builtin`\. Cohorts that are there"):
            read(tmp_path / "builtin")


def test_the_environment_variable_decides_where_the_root_is(tmp_path, monkeypatch):
    monkeypatch.setenv("CSPINE_ROOT", str(tmp_path))
    assert paths.cohort_dir("rsna2022") == tmp_path / "data" / "rsna2022"
    assert paths.run_dir("builtin") == tmp_path / "checkpoints" / "builtin"
    assert paths.figures_dir() == tmp_path / "figures"
    assert paths.figures_dir("quick") == paths.figures_dir("quick", "quick") == tmp_path / "figures" / "quick"
    assert paths.figures_dir("quick", "builtin") == tmp_path / "figures" / "quick" / "builtin"
    assert paths.figures_dir("builtin", "theirs") == tmp_path / "figures" / "builtin" / "theirs"


def test_without_notebooks_above_the_error_names_the_folder_and_the_way_out(tmp_path, monkeypatch):
    monkeypatch.delenv("CSPINE_ROOT", raising=False)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=f"{re.escape(str(tmp_path))}.*CSPINE_ROOT"):
        paths.project_root()


NAMES = [
    "",
    ".",
    "..",
    "../x",
    "/etc",
    "a/b",
    "a\\b",
    "a b",
    ".hidden",
    "-rf",
    "a" * 65,
    "x\n",
    "x\0",
    "é",
    "１",
    "٣",
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("folder", [paths.cohort_dir, paths.run_dir, paths.figures_dir])
def test_names_that_are_no_plain_folder_names_are_refused(folder, name, tmp_path, monkeypatch):
    monkeypatch.setenv("CSPINE_ROOT", str(tmp_path))
    with pytest.raises(ValueError, match="name is up to 64 letters"):
        folder(name)


def test_a_run_that_is_a_link_out_of_its_folder_is_refused_and_a_cohort_is_not(tmp_path, monkeypatch):
    monkeypatch.setenv("CSPINE_ROOT", str(tmp_path / "project"))
    for name in ("data", "checkpoints", "figures"):
        (tmp_path / "disk" / name / "inner").mkdir(parents=True)
        (tmp_path / "project").mkdir(exist_ok=True)
        (tmp_path / "project" / name).symlink_to(
            tmp_path / "disk" / name
        )  # the whole folder may be elsewhere
        (tmp_path / "disk" / name / "alias").symlink_to("inner")
        (tmp_path / "disk" / name / "out").symlink_to(tmp_path)
    for folder in (paths.cohort_dir, paths.run_dir, paths.figures_dir):
        assert folder("alias").name == "alias"
    assert paths.cohort_dir("out").name == "out"
    for folder in (paths.run_dir, paths.figures_dir):
        with pytest.raises(
            ValueError, match=rf"out is a link out of its folder, to {re.escape(str(tmp_path))}"
        ):
            folder("out")


@pytest.mark.parametrize(
    "uid",
    [
        *("1.2.826.0.1.3680043.6200", "1", "1" * 64, "0001", "sub-verse004", "sub-verse004_ct", "PAT001"),
        *(
            "a",
            "a_1",
            "A.b-c_D",
            "1e5",
            "inf",
            "nanny",
            "console",
            "COM",
            "COM10",
            "a.con",
            "nul_1",
            "x" * 64,
        ),
    ],
)
def test_ids_that_can_be_file_names_on_every_system_pass(uid):
    paths.check_uids([uid])


@pytest.mark.parametrize(
    "uid",
    [
        *(
            "",
            *("nan", "NaN", "NA", "None", "NULL"),
            "../1.2",
            "/1.2",
            "1/2",
            "1\\2",
            "C:1",
            "~",
            "..",
            ".",
            ".hidden",
            ".1.2",
            "-rf",
            "_1",
            "=1",
            "+1",
        ),
        *(
            "1.2\n",
            "1.2\0",
            "１.2",
            " 1.2",
            "1.2 ",
            "1 2",
            "1.2.",
            "a..",
            "٣.٤",
            "é",
            "caf\udce9",
            "a\tb",
            "a:b",
        ),
        *("1" * 65, "x" * 250, "CON", "con", "nul.1", "NUL.tar.gz", "Aux", "PRN", "COM1", "lpt9.x"),
        *(1.2, 12, None, float("nan"), b"1.2"),
    ],
)
def test_ids_that_could_not_be_file_names_are_refused_by_name(uid):
    with pytest.raises(ValueError, match=r"^1 StudyInstanceUID that cannot be file names: ") as error:
        paths.check_uids(["1.2.3", uid])
    assert repr(uid)[:50] in str(error.value)
    assert "1.2.3" not in str(error.value)
    str(error.value).encode()  # can be written and printed


def test_bad_uids_are_counted_and_the_first_ten_named():
    with pytest.raises(ValueError, match=r"^2 StudyInstanceUID.*'x ', 'y/z'"):
        paths.check_uids(["x ", "1.2", "y/z"])
    with pytest.raises(ValueError, match=r"^20327 Study.*'/0', .*'/9' and 20,317 more\. One ") as error:
        paths.check_uids([*(f"/{number}" for number in range(20_327)), "1.2"])
    assert len(str(error.value)) < 400


def test_what_cannot_be_shown_is_written_as_an_escape():
    assert paths.printable("Zürich 7") == "Zürich 7"
    assert paths.printable("caf\udce9") == "caf\\udce9"
    assert paths.printable("a\x1b[31m\tb\n") == "a\\x1b[31m\\tb\\n"


def test_a_listing_names_the_first_ten_and_counts_the_rest():
    assert paths.listing(["a", 1]) == "'a', 1"
    assert paths.listing(range(10)) == "0, 1, 2, 3, 4, 5, 6, 7, 8, 9"
    assert paths.listing(iter(range(1012))) == "0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 1,002 more"
    assert paths.listing(["it's a", "b"], separator="; ", quoted=False) == "it's a; b"
    assert paths.listing([]) == ""


def test_a_listing_cuts_an_item_of_any_length():
    assert paths.listing(["x" * 10**6, "y"]) == f"'{'x' * 199}…, 'y'"


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


def test_a_link_is_replaced_and_what_it_leads_to_stays(tmp_path):
    (tmp_path / "target").write_text("precious")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    with paths.atomic_path(tmp_path / "link") as temporary:
        temporary.write_text("new")
    assert (tmp_path / "target").read_text() == "precious"
    assert not (tmp_path / "link").is_symlink()


@pytest.mark.parametrize("durable", [True, False])
def test_a_file_is_synced_before_it_takes_its_place_where_that_is_asked_for(tmp_path, monkeypatch, durable):
    events, replace, sync = [], os.replace, os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (events.append("fsync"), sync(file)))
    monkeypatch.setattr(os, "replace", lambda *names: (events.append("replace"), replace(*names)))
    with paths.atomic_path(tmp_path / "file", durable=durable) as temporary:
        temporary.write_text("text")
    assert events == (["fsync", "replace"] if durable else ["replace"])


def test_a_file_where_a_folder_should_be_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(OSError, match=r"inner was not written"),
        paths.atomic_path(tmp_path / "file" / "inner"),
    ):
        pass


def test_an_error_without_a_number_has_its_text(tmp_path):
    def short():
        with paths.atomic_path(tmp_path / "file"):
            raise OSError("4096 requested and 0 written")

    with pytest.raises(OSError, match=r"file was not written \(4096 requested and 0 written\)"):
        short()
    assert list(tmp_path.iterdir()) == []


def test_a_seal_is_compared_where_there_is_one(tmp_path):
    path = tmp_path / "file"
    paths.check_seal(path, b"anything")
    digest = hashlib.sha256(b"right").hexdigest()
    paths.seal_of(path).write_text(f"{digest} *file\n")
    paths.check_seal(path, b"right")
    with pytest.raises(
        ValueError, match=f"SHA-256 is {hashlib.sha256(b'wrong').hexdigest()}, .* says {digest}"
    ):
        paths.check_seal(path, b"wrong")


def test_checksums_are_those_of_sha256sum(tmp_path):
    (tmp_path / "1_1.npy").write_bytes(b"one")
    (tmp_path / "manifest.csv").write_bytes(b"table")
    (tmp_path / ".hidden").write_bytes(b"left by a killed process")
    (tmp_path / "folder").mkdir()
    for _ in range(2):  # the second time, the list is there already
        path = paths.write_checksums(tmp_path)
    assert paths.read_checksums(tmp_path) == {
        "1_1.npy": hashlib.sha256(b"one").hexdigest(),
        "manifest.csv": hashlib.sha256(b"table").hexdigest(),
    }
    if tool := shutil.which("sha256sum"):
        subprocess.run(
            [tool, "--check", "--strict", path.name], cwd=tmp_path, check=True, capture_output=True
        )
    path.write_text(path.read_text() + "garbage\n")
    with pytest.raises(ValueError, match=r"SHA256SUMS is not as sha256sum writes it in the lines 3"):
        paths.read_checksums(tmp_path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"write_checksums\(\.\.\.\) makes it"):
        paths.read_checksums(tmp_path)


def test_checksums_that_are_known_are_not_computed_again(tmp_path, monkeypatch):
    for name in ("1_1.npy", "1_2.npy", "manifest.csv"):
        (tmp_path / name).write_bytes(name.encode())
    computed, sha256_of = [], paths.sha256_of
    monkeypatch.setattr(paths, "sha256_of", lambda path: (computed.append(path.name), sha256_of(path))[1])
    known = {"1_1.npy": "a" * 64, "gone.npy": "b" * 64}
    paths.write_checksums(tmp_path, known=known)
    assert computed == ["1_2.npy", "manifest.csv"]
    assert paths.read_checksums(tmp_path) == {
        "1_1.npy": "a" * 64,
        "1_2.npy": hashlib.sha256(b"1_2.npy").hexdigest(),
        "manifest.csv": hashlib.sha256(b"manifest.csv").hexdigest(),
    }


def test_a_replaced_file_has_the_rights_of_a_plainly_written_one(tmp_path):
    plain = tmp_path / "plain"
    plain.write_text("")
    with paths.atomic_path(tmp_path / "file") as temporary:
        temporary.write_text("")
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)


def test_the_hash_is_sha256_of_the_bytes(tmp_path):
    (tmp_path / "file").write_bytes(b"cervical spine")
    assert paths.sha256_of(tmp_path / "file") == hashlib.sha256(b"cervical spine").hexdigest()


HOLDER = """
import sys, time
from cspine_helpers.files.paths import exclusive
with exclusive(sys.argv[1], "training there"):
    print("in", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def another(tmp_path):
    """A process that holds the lock."""
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "run" / ".lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "in\n"
        yield process
        process.kill()


def test_a_lock_lets_no_second_process_in_and_ends_with_its_process(tmp_path, another, monkeypatch):
    lock = tmp_path / "run" / ".lock"
    monkeypatch.setattr(paths, "_PATIENCE_S", 0)
    with (
        pytest.raises(BlockingIOError, match="another process is training there"),
        paths.exclusive(lock, "training there"),
    ):
        pass
    another.kill()
    another.wait()
    with paths.exclusive(lock, "training there"):
        assert lock.exists()
    assert list(lock.parent.iterdir()) == []


def test_what_a_killed_process_was_writing_is_removed_and_nothing_else(tmp_path):
    kept = [
        tmp_path / name for name in ("table.csv", ".table.csv", ".other.csv.abc.csv", "table.csv.partial")
    ]
    for path in (*kept, tmp_path / ".table.csv.abc.csv"):
        path.touch()
    paths.remove_unfinished(tmp_path / "table.csv")
    assert sorted(tmp_path.iterdir()) == sorted(kept)


@pytest.mark.parametrize("in_one_step", [True, False])
def test_two_folders_take_each_others_name(tmp_path, monkeypatch, in_one_step):
    if not in_one_step:  # another system, or a disk that cannot
        monkeypatch.setattr(paths.ctypes, "CDLL", lambda _: object())
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "says").write_text(name)
    paths.exchange(tmp_path / "one", tmp_path / "other")
    assert (tmp_path / "one" / "says").read_text() == "other"
    assert (tmp_path / "other" / "says").read_text() == "one"
    assert len(list(tmp_path.iterdir())) == 2
    with pytest.raises(FileNotFoundError):
        paths.exchange(tmp_path / "none", tmp_path / "other")
    assert (tmp_path / "other" / "says").read_text() == "one"


def test_earlier_runs_are_found_in_their_order(tmp_path):
    assert paths.next_previous_dir(tmp_path / "run") == tmp_path / "run-previous-1"
    for name in ("run-previous-2", "run-previous-10", "run-previous-1", "run-previous-x", "runs-previous-3"):
        (tmp_path / name).mkdir()
    found = [path.name for path in paths.previous_dirs(tmp_path / "run")]
    assert found == ["run-previous-1", "run-previous-2", "run-previous-10"]
    assert paths.next_previous_dir(tmp_path / "run") == tmp_path / "run-previous-3"


@pytest.fixture
def archive(tmp_path, monkeypatch):
    """A cohort in two folders elsewhere, `scans` and `tables`, and a project without data."""
    monkeypatch.setenv("CSPINE_ROOT", str(tmp_path / "project"))
    make_toy_cohort(tmp_path / "tables", studies=5)
    for name in ("split.csv", "split.csv.sha256"):
        (tmp_path / "tables" / name).unlink()
    (tmp_path / "tables" / ".hidden").write_text("")
    (tmp_path / "scans" / "train_images" / "1.2").mkdir(parents=True)
    return tmp_path


def below(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() if path.is_file() else b"" for path in sorted(folder.rglob("*"))}


def test_a_cohort_of_links_takes_what_is_written_and_its_sources_stay_as_they_are(archive):
    before = below(archive / "tables") | below(archive / "scans")
    folder = paths.link_cohort("mine", archive / "scans", archive / "tables")
    assert folder == archive / "project" / "data" / "mine"
    assert {path.name for path in folder.iterdir()} == {"train.csv", "packed", "train_images"}
    table = read_labels(folder / "train.csv")
    write_split(split_patients(table), folder / "split.csv")
    write_labels(table.iloc[::-1], folder / "train.csv")  # takes the link's place
    with paths.exclusive(folder / ".lock", "testing"):
        pass
    cohort = read_cohort(folder)
    check_sequences(cohort.packed, cohort.samples["train"])
    assert (len(cohort.manifest), len(cohort.labels)) == (35, 5)
    assert below(archive / "tables") | below(archive / "scans") == before


def test_linking_again_adds_what_is_new_keeps_what_is_there_and_mends_dead_links(archive):
    folder = paths.link_cohort("mine", archive / "tables")
    (folder / "split.csv").write_text("mine")
    (archive / "tables" / "train_bounding_boxes.csv").write_text("")
    (archive / "tables").rename(archive / "moved")
    assert not (folder / "train.csv").exists()
    assert paths.link_cohort("mine", archive / "moved") == folder
    assert (folder / "train.csv").resolve() == archive / "moved" / "train.csv"
    assert (folder / "train_bounding_boxes.csv").is_file()
    assert (folder / "split.csv").read_text() == "mine"


@pytest.mark.parametrize(
    ("sources", "error", "sentence"),
    [
        (["absent"], FileNotFoundError, "it is no folder, or empty"),
        (["tables/train.csv"], FileNotFoundError, "it is no folder, or empty"),
        (["tables", "tables"], FileExistsError, r"files of one name \(2\): '.*packed', '.*train.csv'"),
        (["tables", "own"], FileExistsError, r"files of one name \(1\): '.*data/mine/split.csv'"),
        (["project"], ValueError, "lie in each other"),
        (["project/data/mine"], ValueError, "lie in each other"),
    ],
)
def test_what_cannot_be_linked_is_refused_and_nothing_is_linked(archive, sources, error, sentence):
    folder = archive / "project" / "data" / "mine"
    folder.mkdir(parents=True)
    (folder / "split.csv").write_text("mine")
    (archive / "own").mkdir()
    (archive / "own" / "split.csv").write_text("theirs")
    with pytest.raises(error, match=sentence):
        paths.link_cohort("mine", *(archive / source for source in sources))
    assert [path.name for path in folder.iterdir()] == ["split.csv"]


def test_a_cohort_that_is_a_link_itself_is_not_filled_with_links(archive):
    (archive / "project" / "data").mkdir(parents=True)
    (archive / "project" / "data" / "mine").symlink_to(archive / "scans")
    with pytest.raises(FileExistsError, match="is a link, and what is written there would go to"):
        paths.link_cohort("mine", archive / "tables")
    assert [path.name for path in (archive / "scans").iterdir()] == ["train_images"]


def test_a_disk_that_can_only_be_read_is_named_with_the_way_out(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("tempfile.mkstemp", refuse)
    sentence = r"split\.csv was not written \(Read-only file system\).*through links: .*cspine_helpers link"
    with pytest.raises(OSError, match=sentence), paths.atomic_path(tmp_path / "split.csv"):
        pass
    monkeypatch.setattr(paths.FileLock, "acquire", refuse)
    with (
        pytest.raises(OSError, match=r"Read-only.*through links"),
        paths.exclusive(tmp_path / ".lock", "testing"),
    ):
        pass
