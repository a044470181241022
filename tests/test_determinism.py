"""The cached run says today, here, what it said when it was stored: on phantoms rendered anew for the test.

Tolerance: 1e-4 of probability. Batches of another size, other numbers of threads and other processors add up
float32 in another order; on the machine of the stored run that moves a probability by less than 1e-7. Where
nothing of this differs, neither does a bit.
"""

from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch

from cspine_helpers.checkpoints import load_run
from cspine_helpers.cohort import Cohort
from cspine_helpers.inference.prediction import predict, predict_cohort
from cspine_helpers.labels import PATIENT, UID, VERTEBRAE, expand, write_labels
from cspine_helpers.packed import write_manifest
from cspine_helpers.phantom.cohort import COHORTS, draw_labels, pack_study
from cspine_helpers.phantom.rendering import render_study
from cspine_helpers.predictions import read_predictions

pytestmark = pytest.mark.slow  # full-size studies are rendered, packed and predicted many times

BUILTIN = Path(__file__).parents[1] / "checkpoints" / "builtin"
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def run():
    return load_run(BUILTIN)


@pytest.fixture(scope="module")
def stored():
    return read_predictions(BUILTIN / "predictions.csv")


@pytest.fixture(scope="module")
def cohort(stored, tmp_path_factory):
    """The built-in cohort, cut down to four of its patients: a fractured and an intact one of two splits."""
    config, folder = COHORTS["builtin"], tmp_path_factory.mktemp("cohorts") / "builtin"
    labels = draw_labels(config)
    known = stored[[UID, "split"]].drop_duplicates().merge(labels, on=UID)
    split = known.groupby(["split", PATIENT])[[UID, "split"]].head(1)
    labels = labels[labels[UID].isin(split[UID])]
    rows = []
    for index, row in labels.iterrows():
        fractured = {vertebra: int(row[vertebra]) for vertebra in VERTEBRAE}
        rows += pack_study(render_study(config.seed, index, fractured), folder / "packed", config.pack)
    write_manifest(manifest := pd.DataFrame(rows), folder / "packed")
    write_labels(labels, folder / "train.csv")
    parts = {name: expand(labels, part[UID]) for name, part in split.groupby("split")}
    return Cohort(folder, labels, split, parts, manifest)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_the_cut_has_both_classes_and_splits(cohort):
    assert {name: len(part) for name, part in cohort.samples.items()} == {"validation": 14, "test": 14}
    assert all(0 < part["label"].sum() < 14 for part in cohort.samples.values())


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("batch_size", [1, 5, 16])
def test_stored_predictions_are_reproduced(run, cohort, stored, threads, batch_size, number):
    threads(number)
    for name, samples in cohort.samples.items():
        found = predict(run, samples, cohort.packed, split=name, batch_size=batch_size)
        both = found.merge(stored, on=[UID, "vertebra", "split", "label"], suffixes=("", "_stored"))
        assert len(both) == len(samples)
        difference = (both["probability"] - both["probability_stored"]).abs()
        assert difference.max() <= TOLERANCE


def test_the_same_prediction_twice_has_the_same_bytes(cohort, tmp_path):
    tables = []
    for name, workers in (("first", 0), ("second", 0), ("workers", 2)):
        path = tmp_path / name / "predictions.csv"
        predict_cohort(load_run(BUILTIN), cohort, path, workers=workers)
        tables.append(path.read_bytes())
    assert tables[0] == tables[1] == tables[2]


def test_other_weights_would_not_pass(run, cohort, stored):
    """The tolerance is small enough to notice a hundredth more of the weights of the last layer."""
    model = load_run(BUILTIN).model
    with torch.no_grad():
        model.head.weight.mul_(1.01)
    found = predict(replace(run, model=model), cohort.samples["test"], cohort.packed, split="test")
    both = found.merge(stored, on=[UID, "vertebra"], suffixes=("", "_stored"))
    assert (both["probability"] - both["probability_stored"]).abs().max() > TOLERANCE
