"""The examples in docstrings run, and every public name that notebooks call has one."""

import copy
import doctest
import importlib
import inspect
import pkgutil
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from radiograph_folders import radiograph_cohort
from simulated import patients, table_of
from toy_cohort import make_toy_cohort, tiny_model

import cspine_helpers
from cspine_helpers.checkpoints import Run
from cspine_helpers.cohort import read_cohort
from cspine_helpers.labels import PATIENT, UID, VERTEBRAE, validate_labels
from cspine_helpers.model import FractureClassifier

ROOT = Path(__file__).parents[1]
INSIDE = [info.name for info in pkgutil.walk_packages(cspine_helpers.__path__, "cspine_helpers.")]
MODULES = ["cspine_helpers", *(name for name in INSIDE if not name.endswith("__main__"))]
WITH_EXAMPLES = [name for name in MODULES if ">>>" in inspect.getsource(importlib.import_module(name))]
FACES = sorted({name.rpartition(".")[0] for name in MODULES if name.count(".") == 2})


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> dict:
    """What examples may use without saying where it comes from."""
    folder = tmp_path_factory.mktemp("examples")
    rng = np.random.default_rng(1)
    validation, test = (table_of(*patients(rng, 200), split) for split in ("validation", "test"))
    predictions = pd.concat([validation, test.assign(**{UID: "2." + test[UID]})], ignore_index=True)
    labels = predictions.pivot_table("label", UID, "vertebra")[[*VERTEBRAE]].reset_index()
    labels.insert(1, PATIENT, labels[[*VERTEBRAE]].max(axis=1))
    torch.manual_seed(0)
    cohort = read_cohort(make_toy_cohort(folder / "toy", studies=6))
    radiographs = radiograph_cohort(folder / "radiographs")
    model = FractureClassifier(tiny_model()).eval()
    return {
        "predictions": predictions,
        "labels": validate_labels(labels),
        "run_folder": shutil.copytree(ROOT / "checkpoints" / "builtin", folder / "run"),
        "cohort": cohort,
        "fracatlas_folder": folder / "radiographs" / "source",
        "radiographs": radiographs,
        "cohort_folder": cohort.folder,
        "run": Run(folder / "untrained", model, model.config, 0.5, {"weights_sha256": "0" * 64}),
    }


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_examples_run(name, shared, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CSPINE_ROOT", str(tmp_path))
    module = importlib.import_module(name)
    options = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    runner = doctest.DocTestRunner(optionflags=options)
    tests = doctest.DocTestFinder().find(module, name)
    if any("run_folder" in test.docstring for test in tests):  # which examples freeze in
        shared = shared | {"run_folder": shutil.copytree(shared["run_folder"], tmp_path / "run")}
    for test in tests:
        test.globs |= {"np": np, "pd": pd} | copy.deepcopy(shared)
        runner.run(test)
    assert runner.summarize(verbose=False).failed == 0


def examples_skipped() -> list[str]:
    """Names whose example is not run."""
    return [
        test.name
        for name in MODULES
        for test in doctest.DocTestFinder().find(importlib.import_module(name), name)
        if any(doctest.SKIP in example.options for example in test.examples)
    ]


def test_hardly_an_example_is_skipped():
    assert len(examples_skipped()) <= 15


@pytest.mark.parametrize("face", FACES)
def test_every_public_name_on_a_face_has_an_example(face):
    module = importlib.import_module(face)
    handed_on = {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("_") and (inspect.isclass(value) or inspect.isfunction(value))
    }
    assert [name for name, value in handed_on.items() if ">>>" not in (value.__doc__ or "")] == []
