"""Shared by the tests: real inputs where they are present, and a fixture that refuses the network."""

import gc
import os
import shutil
from pathlib import Path

import pytest
from hypothesis import settings

# Tests compare bits and bytes, which only a CPU promises; the one for a GPU takes this back.
os.environ.setdefault("ACCELERATE_USE_CPU", "true")

if "PYTEST_XDIST_WORKER" in os.environ:  # each of them has one core
    os.environ.setdefault("OMP_NUM_THREADS", "1")

settings.register_profile("unhurried", deadline=None)  # a slow machine is no failure
settings.load_profile("unhurried")

REAL_DATA = Path(__file__).parents[2] / "shared" / "data"
RSNA = REAL_DATA / "rsna2022"
needs_rsna = pytest.mark.skipif(
    not RSNA.is_dir(), reason=f"the real RSNA 2022 label tables are not at {RSNA}"
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest first, so that no process is left alone with it at the end."""
    for kind in ("slow", "series"):
        items.sort(key=lambda item: item.get_closest_marker(kind) is None)  # called at once


def pytest_collection_finish() -> None:
    """The libraries stay: looking through them again for garbage would take a tenth of the time."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """Some libraries complain of what is still frozen when Python ends."""
    gc.unfreeze()


@pytest.fixture(scope="module")
def one_thread():
    """torch computes with one thread: small networks are no faster with more, and rounding stays the same."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def no_network(tmp_path, monkeypatch):
    """Python processes started in the test, kernels too, reach this machine only; none may even try.

    Returns:
        Where attempts are noted; a test that makes one on purpose deletes it.
    """
    attempts = tmp_path / "network_attempts.txt"
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent / "no_network"), prepend=os.pathsep)
    monkeypatch.setenv("NETWORK_ATTEMPTS", str(attempts))
    yield attempts
    assert not attempts.exists(), attempts.read_text()


@pytest.fixture
def command(monkeypatch, capsys):
    """The command line in a project folder: exit status, output, errors."""
    from cspine_helpers.__main__ import main

    def run(root: Path, *arguments: str) -> tuple[int, str, str]:
        monkeypatch.setenv("CSPINE_ROOT", str(root))
        capsys.readouterr()
        try:
            status = main(arguments)
        except SystemExit as error:
            status = error.code
        return status, *capsys.readouterr()

    return run


@pytest.fixture(scope="session")
def published(tmp_path_factory) -> Path:
    """`source/`, a FracAtlas folder as published, and `cohort/`, made of it; read only."""
    from radiograph_folders import radiograph_cohort

    return radiograph_cohort(tmp_path_factory.mktemp("published")).parent


@pytest.fixture
def fracatlas(published, tmp_path) -> Path:
    """A FracAtlas folder to damage."""
    return shutil.copytree(published / "source", tmp_path / "fracatlas")


@pytest.fixture(scope="session")
def packed(published, tmp_path_factory) -> Path:
    """That cohort, packed in a small frame: its folder `packed`; read only."""
    from radiograph_folders import SMALL

    from cspine_helpers.radiographs.packing import pack_images

    cohort = tmp_path_factory.mktemp("packed") / "cohort"
    return pack_images(shutil.copytree(published / "cohort", cohort, symlinks=True), SMALL)


@pytest.fixture
def own_packed(packed, tmp_path) -> Path:
    """A packed cohort that a test may damage."""
    return shutil.copytree(packed.parent, tmp_path / "cohort", symlinks=True) / "packed"
