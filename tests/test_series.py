"""The whole series from fresh kernels in a temporary project: cached run, retrained, and on real tables."""

import ctypes
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pandas as pd
import pytest
import run as runner
from conftest import RSNA, needs_rsna
from simulated import image_table, radiograph_run
from test_notebooks import FAILURES, read, saved_figures, solutions

from cspine_helpers import checkpoints, labels, predictions, splits

ROOT = Path(__file__).parents[1]
COHORT_FILES = ("train.csv", "train_bounding_boxes.csv", "packed", "cohort.json")
SHIPPED, SAMPLE = ROOT / "checkpoints" / "fracatlas", ROOT / "data" / "fracatlas_sample"
LIVE = {"09_maps", "09_methods", "09_over_trivial"}  # computed in the notebook where no table is stored
PEAK_MIB = 4096  # what the series may take

pytestmark = pytest.mark.series


@pytest.fixture
def project(tmp_path, monkeypatch, no_network):
    """A copy of the notebooks; whatever they read and write stays beside it. The network is refused."""
    ignored = shutil.ignore_patterns("rendered", ".ipynb_checkpoints", "__pycache__")
    shutil.copytree(ROOT / "notebooks", tmp_path / "notebooks", ignore=ignored)
    shutil.copytree(ROOT / "checkpoints" / "slice_truth", tmp_path / "checkpoints" / "slice_truth")
    monkeypatch.setenv("CSPINE_ROOT", str(tmp_path))
    return tmp_path


def make_cohort(name: str) -> None:
    subprocess.run([sys.executable, "-m", "cspine_helpers", "phantom", "--cohort", name], check=True)


def notebooks(project: Path, numbers: tuple[str, ...]) -> list[Path]:
    """Those of these numbers, else all that are about CT."""
    found = runner.series(project / "notebooks", numbers)
    return [path for path in found if numbers or not runner.of_radiographs(path)]


def append_solutions(project: Path) -> None:
    """Let the exercises' solutions run after each notebook's last cell."""
    for path in notebooks(project, ()):
        notebook = nbformat.read(path, as_version=4)
        notebook.cells += [nbformat.v4.new_code_cell(each) for each in solutions(path.stem)]
        nbformat.write(notebook, path)


def run_series(project: Path, numbers: tuple[str, ...] = (), **parameters: object) -> dict[str, str]:
    """Run notebooks; returns the text that each shows, by number."""
    texts = {}
    for path in notebooks(project, numbers):
        out = project / "rendered" / path.name
        run = runner.execute(path, parameters, out=out)
        assert run.peak_mib < PEAK_MIB, run
        outputs = [o for cell in nbformat.read(out, as_version=4).cells for o in cell.get("outputs", [])]
        shown = [o.get("text") or o.data.get("text/html") or o.data.get("text/plain", "") for o in outputs]
        texts[path.name[:2]] = "\n".join(shown)
    return texts


def missing_figures(project: Path, folder: str, numbers: tuple[str, ...] = ()) -> list[str]:
    names = [n for path in notebooks(project, numbers) for n in saved_figures(read(path.stem))]
    paths = {name: project / folder / f"{name}.png" for name in names}
    return [name for name, path in paths.items() if not (path.is_file() and path.stat().st_size)]


def test_the_cached_run_carries_the_series(project):
    for shipped in (ROOT / "checkpoints" / "builtin", SHIPPED, SAMPLE):  # 09 looks at radiographs, too
        shutil.copytree(shipped, project / shipped.relative_to(ROOT))
    made = ROOT / "data" / "builtin"
    if (made / "cohort.json").exists():  # spare two minutes; the command below checks that it is complete
        (project / "data" / "builtin").mkdir(parents=True)
        for name in COHORT_FILES:
            (project / "data" / "builtin" / name).symlink_to(made / name)
    make_cohort("builtin")
    before = (project / "checkpoints" / "builtin" / "model.safetensors").read_bytes()
    append_solutions(project)
    run_series(project)
    assert set(missing_figures(project, "figures")) <= FAILURES
    assert (project / "checkpoints" / "builtin" / "model.safetensors").read_bytes() == before
    again = {
        path: path.read_bytes() for path in [*project.glob("rendered/01*"), *project.glob("figures/01*")]
    }
    run_series(project, ("01",))
    assert [path.name for path, content in again.items() if path.read_bytes() != content] == []


def test_retraining_makes_a_run_that_the_series_reads(project):
    make_cohort("quick")
    run_series(project, COHORT="quick", RETRAIN=True)
    folder = project / "checkpoints" / "quick"
    run = checkpoints.load_run(folder)
    assert run.record["data"]["cohort"] == "quick"
    assert len(pd.read_csv(folder / "history.csv")) == 1
    split = splits.read_split(project / "data" / "quick" / "split.csv")
    made = predictions.read_predictions(folder / "predictions.csv")
    assert set(made["split"]) >= {"validation", "test"}
    assert set(made[labels.UID]) <= set(split[labels.UID])
    no_guarantee = set(saved_figures(read("10_triage")))  # that few patients guarantee no recall
    not_measured = set(saved_figures(read("09_explanations"))) - LIVE  # of a run that is new
    assert set(missing_figures(project, "figures/quick")) <= FAILURES | no_guarantee | not_measured


@needs_rsna
def test_real_labels_and_predictions_run_without_images(project):
    folder = project / "data" / "rsna2022"
    folder.mkdir(parents=True)
    for name in ("train.csv", "train_bounding_boxes.csv"):
        shutil.copy(RSNA / name, folder / name)
    text = run_series(project, ("01", "02"), COHORT="rsna2022")["01"]
    rows = re.findall(r"<td>(\w+)</td>\s*<td>\d+</td>\s*<td>2019</td>\s*<td>([\d.]+)</td>", text)
    published = (0.476, 0.072, 0.141, 0.036, 0.053, 0.080, 0.137, 0.195)
    assert {target: float(value) for target, value in rows} == dict(
        zip(labels.TARGETS, published, strict=True)
    )
    assert missing_figures(project, "figures/rsna2022", ("01",)) == []

    wide = pd.read_csv(RSNA / "oof_predictions.csv", dtype={"uid": str})
    table = labels.read_labels(folder / "train.csv")
    split = splits.read_split(folder / "split.csv", table)
    real = predictions.from_wide(wide, table, split, missing="drop")
    assert real[labels.UID].nunique() == 2018
    (project / "checkpoints" / "oof").mkdir(parents=True)
    predictions.write_predictions(real, project / "checkpoints" / "oof" / "predictions.csv")
    run_series(project, ("04", "06", "07"), COHORT="rsna2022", RUN="oof")
    assert missing_figures(project, "figures/rsna2022/oof", ("04", "06", "07")) == []


def unprivileged() -> None:
    """Let permissions bind this process and what it starts, even as root (prctl(2), PR_CAPBSET_DROP)."""
    if hasattr(ctypes.CDLL(None), "prctl"):
        for capability in range(64):
            ctypes.CDLL(None).prctl(24, capability, 0, 0, 0)


def test_data_that_can_only_be_read_carry_the_series_from_a_foreign_folder(project, tmp_path):
    """As where a platform mounts data read-only: code, data, outputs and the working directory lie apart."""
    archive, outputs, elsewhere = (tmp_path / name for name in ("input", "working", "elsewhere"))
    for folder in (archive, elsewhere):
        folder.mkdir()
    if not (made := ROOT / "data" / "builtin" / "cohort.json").exists():
        make_cohort("builtin")
        made = project / "data" / "builtin" / "cohort.json"
    for name in COHORT_FILES:
        (archive / name).symlink_to(made.parent / name)
    packed = (archive / "packed").resolve()
    before = {path.name: path.stat().st_mtime_ns for path in packed.iterdir()}
    shutil.copytree(ROOT / "checkpoints" / "builtin", outputs / "checkpoints" / "builtin")
    shutil.copytree(ROOT / "checkpoints" / "slice_truth", outputs / "checkpoints" / "slice_truth")
    archive.chmod(0o555)
    found = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"CSPINE_ROOT": str(outputs), "PYTHONPATH": found}

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, *arguments]
        options = {"cwd": elsewhere, "env": environment, "preexec_fn": unprivileged}
        return subprocess.run(command, capture_output=True, text=True, check=False, **options)

    refused = run("-c", f"open({str(archive / 'split.csv')!r}, 'w')")
    assert "Permission denied" in refused.stderr  # so nothing below can have been written there
    linked = run("-m", "cspine_helpers", "link", "--cohort", "archive", str(archive))
    assert linked.returncode == 0, linked.stderr
    script = str(project / "notebooks" / "run.py")
    done = run(script, "--cohort", "archive", "--run", "builtin", "01", "02", "03", "04")
    assert done.returncode == 0, done.stderr
    assert {path.name for path in archive.iterdir()} == {*COHORT_FILES}
    assert {path.name: path.stat().st_mtime_ns for path in packed.iterdir()} == before
    made = outputs / "data" / "archive"
    assert (
        splits.split_hash(splits.read_split(made / "split.csv"))
        == json.loads((outputs / "checkpoints" / "builtin" / "run.json").read_text(encoding="utf-8"))["data"][
            "split_sha256"
        ]
    )
    assert list(elsewhere.iterdir()) == []
    assert set(missing_figures(project, "working/figures/archive", ("01", "02"))) <= FAILURES
    assert set(missing_figures(project, "working/figures/archive/builtin", ("03", "04"))) <= FAILURES
    archive.chmod(0o755)


@pytest.mark.skipif(
    not (SHIPPED / "measured").is_dir() or not (SAMPLE / "images.csv").is_file(),
    reason="the run on FracAtlas and its sample are not shipped here",
)
def test_the_sample_and_the_tables_of_the_run_carry_the_notebook_of_radiographs(project):
    shutil.copytree(
        SHIPPED, project / "checkpoints" / "fracatlas", ignore=shutil.ignore_patterns("masks.csv")
    )
    shutil.copytree(SAMPLE, project / "data" / "fracatlas_sample")
    text = run_series(project, ("11",))["11"]
    assert missing_figures(project, "figures/fracatlas", ("11",)) == []
    assert "differ by at most" in text
    recorded = pd.read_csv(project / "checkpoints" / "fracatlas" / "measured" / "test" / "images.csv")
    assert f"{len(recorded):,} images" in text


def test_predictions_of_radiographs_run_through_thresholds_calibration_and_guarantees(project):
    folder = radiograph_run(project / "checkpoints" / "limbs", image_table())
    texts = run_series(project, ("04", "06", "07"), COHORT="limbs")
    assert "418 images of 160 patients" in texts["04"]
    assert "Images at threshold" in texts["04"]
    assert "The test split has been opened with 1 set(s)" in texts["04"]
    assert "recall of images, averaged over patients, ≥ 0.9" in texts["07"]
    assert "Patients by" not in "".join(texts.values())
    assert "### The decision, at image level" in (folder / "MODEL_CARD.md").read_text(encoding="utf-8")
    made = {path.name for path in (project / "figures" / "limbs").glob("*.png")}
    assert {"04_pr_curves.png", "06_calibration_images.png", "06_test_images.png"} <= made
    assert not {"06_calibration_patients.png", "07_patients.png"} & made
