import numpy as np
import pandas as pd
import pytest
import torch
from toy_cohort import make_toy_cohort, tiny_model

from cspine_helpers.checkpoints import Run
from cspine_helpers.cohort import read_cohort
from cspine_helpers.inference import predict, predict_study
from cspine_helpers.labels import UID, VERTEBRAE
from cspine_helpers.model import FractureClassifier
from cspine_helpers.packed import open_sequence, sequence_path
from cspine_helpers.predictions import COLUMNS, read_predictions, write_predictions


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    return read_cohort(make_toy_cohort(tmp_path_factory.mktemp("toy")))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    torch.manual_seed(0)
    config = tiny_model()
    record = {"decision": {"threshold": 0.5, "reason": "made up."}}
    return Run(tmp_path_factory.mktemp("run"), FractureClassifier(config).eval(), config, 0.5, record)


@torch.inference_mode()
def by_hand(run, cohort, uid, vertebra) -> float:
    sequence = np.array(open_sequence(sequence_path(cohort.packed, uid, vertebra)))
    return run.model(torch.from_numpy(sequence).permute(0, 3, 1, 2)[None]).logit.sigmoid().item()


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_the_table_holds_every_sample_in_order_with_its_probability(run, cohort, batch_size):
    samples = cohort.samples["test"].sample(frac=1, random_state=0)
    table = predict(run, samples, cohort.packed, split="test", batch_size=batch_size)
    assert tuple(table.columns) == COLUMNS
    assert (table["split"] == "test").all()
    for column in (UID, "vertebra", "label"):
        assert table[column].tolist() == samples[column].tolist()
    for row in (0, len(table) - 1):
        expected = by_hand(run, cohort, table[UID][row], table["vertebra"][row])
        assert table["probability"][row] == pytest.approx(expected, abs=1e-5)
    assert not run.model.training


def test_the_table_can_be_written_and_read(run, cohort, tmp_path):
    table = predict(run, cohort.samples["test"], cohort.packed, split="test")
    write_predictions(table, tmp_path / "predictions.csv")
    pd.testing.assert_frame_equal(read_predictions(tmp_path / "predictions.csv"), table, check_dtype=False)


def test_missing_sequences_stop_the_prediction_by_name(run, cohort, tmp_path):
    with pytest.raises(ValueError, match=r"14 of 14 packed sequences .*missing"):
        predict(run, cohort.samples["test"], tmp_path, split="test")


def test_a_study_is_answered_for_each_vertebra_and_the_patient(run, cohort):
    uid = cohort.samples["test"][UID].iloc[0]
    answer = predict_study(run, cohort.packed, uid)
    assert tuple(answer.probability) == VERTEBRAE
    assert answer.probability["C4"] == pytest.approx(by_hand(run, cohort, uid, "C4"), abs=1e-5)
    assert answer.patient_probability == max(answer.probability.values())
    assert answer.threshold == 0.5
    assert answer.complete
    assert answer.missing == ()


def test_the_threshold_decides_and_counts_as_reached_when_equal(run, cohort):
    uid = cohort.samples["test"][UID].iloc[0]
    highest = predict_study(run, cohort.packed, uid).patient_probability
    at = predict_study(run, cohort.packed, uid, threshold=highest)
    assert at.patient_positive is True
    assert sum(at.fractured.values()) == 1
    above = predict_study(run, cohort.packed, uid, threshold=np.nextafter(highest, 1))
    assert above.patient_positive is False
    assert not any(above.fractured.values())
    assert all(predict_study(run, cohort.packed, uid, threshold=0.0).fractured.values())


def test_a_study_with_missing_vertebrae_is_answered_and_marked_incomplete(run, cohort, tmp_path):
    uid = cohort.samples["test"][UID].iloc[0]
    for vertebra in ("C2", "C5"):
        path = sequence_path(cohort.packed, uid, vertebra)
        (tmp_path / path.name).write_bytes(path.read_bytes())
    answer = predict_study(run, tmp_path, uid)
    assert tuple(answer.probability) == ("C2", "C5")
    assert answer.missing == ("C1", "C3", "C4", "C6", "C7")
    assert not answer.complete
    whole = predict_study(run, cohort.packed, uid)
    assert answer.probability["C5"] == pytest.approx(whole.probability["C5"], abs=1e-5)


def test_a_study_that_cannot_be_answered_is_refused(run, cohort, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no packed sequence .*9.9_7.npy"):
        predict_study(run, cohort.packed, "9.9")
    with pytest.raises(ValueError, match="digits and dots"):
        predict_study(run, cohort.packed, "../9")
    (tmp_path / "9.9_3.npy").write_bytes(b"not an array")
    with pytest.raises(ValueError, match=r"9.9_3.npy \(not a .npy file"):
        predict_study(run, tmp_path, "9.9")


@pytest.mark.parametrize("threshold", [-0.1, 1.1, np.nan])
def test_a_threshold_outside_0_1_is_refused(run, cohort, threshold):
    with pytest.raises(ValueError, match=r"lies in \[0, 1\]"):
        predict_study(run, cohort.packed, cohort.samples["test"][UID].iloc[0], threshold=threshold)


def test_a_run_without_a_threshold_needs_one_from_the_user(run, cohort):
    uid = cohort.samples["test"][UID].iloc[0]
    reason = {"decision": {"threshold": None, "reason": "No threshold keeps precision at 0.900."}}
    undecided = Run(run.folder, run.model, run.config, None, reason)
    with pytest.raises(ValueError, match=r"has no threshold: No threshold keeps precision at 0.900. Pass"):
        predict_study(undecided, cohort.packed, uid)
    assert predict_study(undecided, cohort.packed, uid, threshold=0.3).threshold == 0.3
