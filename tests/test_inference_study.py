"""One study's answer: its numbers by hand, its thresholds by their source, its file, and what is refused."""

import hashlib
import json
import shutil
from dataclasses import asdict, replace

import numpy as np
import pytest
import scans
import torch
from ct_cohort import CONFIG, scanned, write_cohort
from scipy.special import expit, logit
from test_evaluation_cases import toy
from toy_cohort import make_toy_cohort, tiny_model

from cspine_helpers import checkpoints
from cspine_helpers.__main__ import main
from cspine_helpers.checkpoints import Run
from cspine_helpers.cohort import read_cohort
from cspine_helpers.decisions.test_split import freeze
from cspine_helpers.decisions.thresholds import Rule, choose_decision, choose_per_vertebra
from cspine_helpers.evaluation.calibration import fit_calibrator
from cspine_helpers.evaluation.cases import Aggregation, Cases
from cspine_helpers.inference import study as studies
from cspine_helpers.inference.study import predict_study, study_path, write_study
from cspine_helpers.labels import UID, VERTEBRAE
from cspine_helpers.model.classifier import FractureClassifier
from cspine_helpers.packed import (
    PROVENANCE_COLUMNS,
    open_sequence,
    read_manifest,
    sequence_path,
    write_manifest,
)
from cspine_helpers.packing.cohort import pack_cohort
from cspine_helpers.predictions import write_predictions
from cspine_helpers.splits import k_folds, write_split

TOP = Aggregation("top_k", k=3)


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    return read_cohort(make_toy_cohort(tmp_path_factory.mktemp("toy")))


@pytest.fixture(scope="module")
def uid(cohort):
    return cohort.samples["test"][UID].iloc[0]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    torch.manual_seed(0)
    config = tiny_model()
    record = {"weights_sha256": "1" * 64, "decision": {"threshold": 0.5, "reason": "made up."}}
    return Run(tmp_path_factory.mktemp("run"), FractureClassifier(config).eval(), config, 0.5, record)


@pytest.fixture
def freezing(run, tmp_path):
    """Freezes decisions of many patients in a folder of the run; returns the run there and what is frozen."""
    table, folder = toy(150), tmp_path / "checkpoints" / "toy"
    folder.mkdir(parents=True)
    write_predictions(table, folder / "predictions.csv")

    def freezes(*decisions, calibrators=()):
        return replace(run, folder=folder), freeze(folder, decisions, table, calibrators=calibrators)

    return freezes


def decided(level="vertebra", aggregation=None):
    return choose_decision(toy(150), Rule("max_f1", level=level, aggregation=aggregation))


def fitted(level="vertebra", aggregation=None):
    return fit_calibrator(Cases.of(toy(150), level=level, aggregation=aggregation), kind="platt")


def strict(path):
    """What a JSON file holds; NaN and infinity, which Python alone reads, are refused."""

    def refuse(name):
        pytest.fail(f"{name} is not JSON")

    return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)


@torch.inference_mode()
def by_hand(run, cohort, uid, vertebra) -> float:
    sequence = np.array(open_sequence(sequence_path(cohort.packed, uid, vertebra)))
    return run.model(torch.from_numpy(sequence).permute(0, 3, 1, 2)[None]).logit.sigmoid().item()


def test_a_study_is_answered_for_each_vertebra(run, cohort, uid):
    answer = predict_study(run, cohort.packed, uid)
    assert tuple(answer.probability) == VERTEBRAE
    for vertebra in VERTEBRAE:
        assert answer.probability[vertebra] == pytest.approx(by_hand(run, cohort, uid, vertebra), abs=1e-5)
    assert answer.complete
    assert answer.missing == ()
    assert answer.run == run.folder.name


def test_every_number_of_the_file_follows_from_the_probabilities_and_what_is_frozen(
    freezing, cohort, uid, tmp_path
):
    vertebrae, patients = fitted(), fitted("patient", TOP)
    run, frozen = freezing(decided(), decided("patient", TOP), calibrators=[vertebrae, patients])
    path = write_study(predict_study(run, cohort.packed, uid), study_path(run.folder, uid))
    assert path == run.folder / "studies" / f"{uid}.json"
    found = strict(path)
    raw = {name: by_hand(run, cohort, uid, name) for name in VERTEBRAE}
    threshold = frozen.decisions["vertebra"].threshold
    assert list(found["vertebrae"]) == list(VERTEBRAE)
    for name, said in found["vertebrae"].items():
        assert said["probability"] == pytest.approx(raw[name], abs=1e-5)
        p = said["probability"]
        expected = expit(vertebrae.slope * logit(p) + vertebrae.intercept)
        assert said == {
            "probability": p,
            "calibrated": pytest.approx(expected, abs=1e-9),
            "threshold": threshold,
            "called": p >= threshold,
        }
    ordered = sorted((said["probability"] for said in found["vertebrae"].values()), reverse=True)
    of_patient = sum(ordered[:3]) / 3
    assert found["patient"] == {
        "highest": ordered[0],
        "aggregation": "mean of top 3",
        "probability": pytest.approx(of_patient, abs=1e-12),
        "calibrated": pytest.approx(expit(patients.slope * logit(of_patient) + patients.intercept), abs=1e-9),
        "threshold": frozen.decisions["patient"].threshold,
        "called": of_patient >= frozen.decisions["patient"].threshold,
    }
    assert (found["study"], found["run"], found["missing"]) == (uid, "toy", [])
    assert found["threshold_source"] == "frozen decision"
    assert found["notice"] == "Research software, not a medical device."
    assert found["hashes"]["weights"] == "1" * 64
    assert found["hashes"]["decision"] == frozen.sha256


def test_hashes_are_those_of_the_packed_files(run, cohort, uid):
    found = predict_study(run, cohort.packed, uid).hashes["packed"]
    assert found == {
        f"{uid}_{number}.npy": hashlib.sha256(
            (cohort.packed / f"{uid}_{number}.npy").read_bytes()
        ).hexdigest()
        for number in range(1, 8)
    }


def test_the_threshold_is_the_one_given_else_the_frozen_else_that_of_training(freezing, run, cohort, uid):
    answer = predict_study(run, cohort.packed, uid)
    assert (answer.threshold, answer.threshold_source) == (0.5, "run.json")
    own, frozen = freezing(decided())
    answer = predict_study(own, cohort.packed, uid)
    assert (answer.threshold, answer.threshold_source) == (
        frozen.decisions["vertebra"].threshold,
        "frozen decision",
    )
    answer = predict_study(own, cohort.packed, uid, threshold=0.123)
    assert (answer.threshold, answer.threshold_source) == (0.123, "given")
    assert answer.record()["vertebrae"]["C1"]["threshold"] == 0.123


def test_a_threshold_of_each_vertebra_calls_that_vertebra(freezing, cohort, uid):
    run, frozen = freezing(choose_per_vertebra(toy(150), Rule("max_f1"), min_positives=10))
    answer = predict_study(run, cohort.packed, uid)
    thresholds = frozen.decisions["vertebra"].thresholds
    assert answer.threshold is None
    assert answer.called == {name: p >= thresholds[name] for name, p in answer.probability.items()}
    assert {name: v["threshold"] for name, v in answer.record()["vertebrae"].items()} == thresholds


def test_the_patient_is_called_at_the_patient_threshold_or_not_at_all(freezing, run, cohort, uid):
    answer = predict_study(run, cohort.packed, uid, threshold=0.0)
    assert all(answer.called.values())
    assert answer.patient_called is None
    assert answer.patient_probability == max(answer.probability.values())
    assert "no patient threshold is frozen" in answer.summary()
    own, frozen = freezing(decided(), decided("patient", TOP))
    answer = predict_study(own, cohort.packed, uid, threshold=0.0)
    assert answer.patient_threshold == frozen.decisions["patient"].threshold
    at = replace(answer, patient_threshold=answer.patient_aggregated)
    above = replace(answer, patient_threshold=np.nextafter(answer.patient_aggregated, 1))
    assert (at.patient_called, above.patient_called) == (True, False)


def test_the_threshold_counts_as_reached_when_equal(run, cohort, uid):
    highest = max(predict_study(run, cohort.packed, uid).probability.values())
    at = predict_study(run, cohort.packed, uid, threshold=highest)
    assert sum(at.called.values()) == 1
    above = predict_study(run, cohort.packed, uid, threshold=np.nextafter(highest, 1))
    assert not any(above.called.values())
    assert "No vertebra is called fractured. The absence of a call is no all-clear." in " ".join(
        above.sentences
    )


def test_a_study_with_missing_vertebrae_is_answered_and_marked_incomplete(run, cohort, uid, tmp_path):
    for vertebra in ("C2", "C5"):
        path = sequence_path(cohort.packed, uid, vertebra)
        (tmp_path / path.name).write_bytes(path.read_bytes())
    answer = predict_study(run, tmp_path, uid)
    assert tuple(answer.probability) == ("C2", "C5")
    assert answer.missing == ("C1", "C3", "C4", "C6", "C7")
    assert not answer.complete
    assert answer.record()["missing"] == list(answer.missing)
    assert "Not packed: C1, C3, C4, C6, C7; the absence of a call there is no all-clear." in answer.summary()
    assert answer.warnings == (
        f"{tmp_path.name} has no manifest: nothing is known of how the study was packed.",
    )
    whole = predict_study(run, cohort.packed, uid)
    assert answer.probability["C5"] == pytest.approx(whole.probability["C5"], abs=1e-5)


def test_warnings_and_sources_come_from_the_manifest(run, cohort, uid, tmp_path):
    folder = shutil.copytree(cohort.packed, tmp_path / "packed")
    table = read_manifest(folder)
    origin = [1.0, "a" * 64, "mask.nii.gz", "b" * 64, "packing 1", "gantry tilt 5°"]
    table = table.assign(**dict(zip(PROVENANCE_COLUMNS, origin, strict=True)))
    table.loc[(table[UID] == uid) & table["vertebra"].isin(["C1", "C7"]), "warnings"] += "; cut at the edge"
    write_manifest(table, folder)
    answer = predict_study(run, folder, uid)
    assert answer.warnings == ("gantry tilt 5°", "C1, C7: cut at the edge")
    assert (answer.hashes["source"], answer.hashes["mask"]) == ("a" * 64, "b" * 64)
    assert "Warning: C1, C7: cut at the edge" in answer.summary()
    write_manifest(table[(table[UID] != uid) | (table["vertebra"] != "C3")], folder)
    (said,) = predict_study(run, folder, uid).warnings
    assert said == "C3: not in the manifest, nothing is known of how they were packed"


def test_a_packing_other_than_the_runs_is_said(run, cohort, uid, tmp_path):
    folder = shutil.copytree(cohort.packed, tmp_path / "packed")
    mine = json.loads(json.dumps(asdict(CONFIG)))
    its = replace(run, record=run.record | {"cohort": {"packing": {"config": mine}}})
    assert predict_study(its, folder, uid).warnings == ()  # nobody noted how these were packed
    (folder / "packing.json").write_text(json.dumps({"config": mine}))
    assert predict_study(its, folder, uid).warnings == ()
    (folder / "packing.json").write_text(json.dumps({"config": mine | {"margin_mm": 9.0}}))
    (said,) = predict_study(its, folder, uid).warnings
    assert (
        said == f"packed otherwise than what the run was trained on: margin_mm is 9.0, not {CONFIG.margin_mm}"
    )
    assert predict_study(run, folder, uid).warnings == ()


def test_a_study_that_the_run_was_trained_on_is_said_to_be(run, cohort, uid):
    trained_on = cohort.samples["train"][UID].iloc[0]
    its = replace(run, record=run.record | {"data": cohort.fingerprint()})
    (said,) = predict_study(its, cohort.packed, trained_on).warnings
    assert said.startswith("the run was trained on this study")
    assert predict_study(its, cohort.packed, uid).warnings == ()
    assert predict_study(run, cohort.packed, trained_on).warnings == ()  # of a run of another split


def test_a_study_of_the_runs_training_is_known_wherever_it_is_packed(run, cohort, uid, tmp_path, monkeypatch):
    known, packed = cohort.samples["train"][UID].iloc[0], tmp_path / "once" / "packed"
    packed.mkdir(parents=True)
    for study in (known, uid):
        path = sequence_path(cohort.packed, study, "C1")
        shutil.copy(path, packed / path.name)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "toy").symlink_to(cohort.folder)
    data = cohort.fingerprint() | {"cohort": "toy"}

    def said(data, study):
        its = replace(run, record=run.record | {"data": data})
        return any(
            text.startswith("the run was trained on") for text in predict_study(its, packed, study).warnings
        )

    monkeypatch.setenv("CSPINE_ROOT", str(tmp_path))
    assert (said(data, known), said(data, uid)) == (True, False)
    assert not said(data | {"split_sha256": "0" * 64}, known)  # the cohort was divided anew
    assert not said(data | {"cohort": "gone"}, known)
    monkeypatch.delenv("CSPINE_ROOT")
    monkeypatch.chdir(tmp_path)  # no project
    assert not said(data, known)


def test_a_fold_knows_the_studies_that_it_was_trained_on(run, cohort, tmp_path):
    folds = k_folds(cohort.labels, folds=3, split=cohort.split)
    write_split(folds, tmp_path / "folds.csv")
    fold = cohort.of_fold(folds, 2)
    its = replace(run, folder=tmp_path / "fold_2", record=run.record | {"data": fold.fingerprint()})
    for split, samples in fold.samples.items():
        study = samples[UID].iloc[0]
        warnings = predict_study(its, cohort.packed, study).warnings
        assert any(text.startswith("the run was trained on") for text in warnings) == (split == "train"), (
            split
        )
    write_split(folds.assign(fold=(folds["fold"] + 1) % 3), tmp_path / "folds.csv", replace=True)
    study = fold.samples["train"][UID].iloc[0]
    assert predict_study(its, cohort.packed, study).warnings == ()  # other folds: not known


def test_a_study_that_cannot_be_answered_is_refused(run, cohort, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no packed sequence .*9.9_7.npy"):
        predict_study(run, cohort.packed, "9.9")
    with pytest.raises(ValueError, match="cannot be file names"):
        predict_study(run, cohort.packed, "../9")
    with pytest.raises(ValueError, match="cannot be file names"):
        study_path(tmp_path, "../9")
    (tmp_path / "9.9_3.npy").write_bytes(b"not an array")
    with pytest.raises(ValueError, match=r"9.9_3.npy \(not a .npy file"):
        predict_study(run, tmp_path, "9.9")


@pytest.mark.parametrize("threshold", [-0.1, 1.1, np.nan])
def test_a_threshold_outside_0_1_is_refused(run, cohort, uid, threshold):
    with pytest.raises(ValueError, match=r"must be in \[0, 1\]"):
        predict_study(run, cohort.packed, uid, threshold=threshold)


def test_a_run_without_a_threshold_needs_one_from_the_user(run, cohort, uid):
    reason = {"decision": {"threshold": None, "reason": "No threshold keeps precision at 0.900."}}
    undecided = Run(run.folder, run.model, run.config, None, reason)
    with pytest.raises(ValueError, match=r"has no threshold: No threshold keeps precision at 0.900. Pass"):
        predict_study(undecided, cohort.packed, uid)
    assert predict_study(undecided, cohort.packed, uid, threshold=0.3).threshold == 0.3


def test_what_is_frozen_for_other_predictions_answers_nothing(freezing, cohort, uid):
    run, _ = freezing(decided())
    write_predictions(toy(150, seed=1), run.folder / "predictions.csv")
    with pytest.raises(ValueError, match="was frozen with other predictions"):
        predict_study(run, cohort.packed, uid)


def test_a_file_that_cannot_be_written_leaves_none(freezing, cohort, uid, monkeypatch):
    run, _ = freezing(decided())
    answer, path = predict_study(run, cohort.packed, uid), study_path(run.folder, uid)
    with pytest.raises(ValueError, match=r"no NaN or infinity; found at 'record\.patient\.highest'"):
        write_study(replace(answer, patient_probability=np.nan), path)
    assert not path.exists()
    first = write_study(answer, path).read_bytes()
    monkeypatch.setattr(studies, "FORMAT", {1})  # no JSON
    with pytest.raises(ValueError, match="A record holds plain values"):
        write_study(answer, path)
    assert path.read_bytes() == first
    assert [each.name for each in path.parent.iterdir()] == [path.name]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder with decisions and calibrators at both levels, frozen once for all who use the command."""
    folder, table = tmp_path_factory.mktemp("whole"), toy(150)
    write_predictions(table, folder / "predictions.csv")
    calibrators = [fitted(), fitted("patient", TOP)]
    freeze(folder, [decided(), decided("patient", TOP)], table, calibrators=calibrators)
    return folder


@pytest.fixture
def project(whole, run, cohort, tmp_path, monkeypatch):
    """A project with the toy cohort and a run of it with decisions and calibrators, both named toy."""
    shutil.copytree(whole, tmp_path / "checkpoints" / "toy")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "toy").symlink_to(cohort.folder)
    monkeypatch.setenv("CSPINE_ROOT", str(tmp_path))
    run = replace(run, record=run.record | {"data": {"cohort": "toy"}})
    monkeypatch.setattr(checkpoints, "load_run", lambda folder: replace(run, folder=folder))
    return tmp_path


def test_the_command_prints_the_table_and_writes_the_file(project, run, cohort, uid, capsys):
    assert main(["predict", "--run", "toy", "--study", uid, "--device", "cpu"]) == 0
    folder = project / "checkpoints" / "toy"
    answer = predict_study(replace(run, folder=folder), cohort.packed, uid)
    path = folder / "studies" / f"{uid}.json"
    out = capsys.readouterr().out
    assert out == f"{answer.summary()}\n{path}\n"
    lines = {line.split()[0]: line.split() for line in out.splitlines()}
    for name, value in answer.probability.items():
        called = ["fractured"] if answer.called[name] else ["not", "called"]
        numbers = (value, answer.calibrated[name], answer.threshold)
        assert lines[name] == [name, *(f"{number:.3f}" for number in numbers), *called]
    numbers = (answer.patient_aggregated, answer.patient_calibrated, answer.patient_threshold)
    assert lines["patient"][1:4] == [f"{number:.3f}" for number in numbers]
    found = strict(path)
    del found["record_sha256"]
    assert found == json.loads(json.dumps(answer.record()))


def test_the_command_records_a_threshold_that_was_given_and_writes_where_it_is_told(
    project, uid, tmp_path, capsys
):
    out = tmp_path / "answers" / "one.json"
    assert main(["predict", "--run", "toy", "--study", uid, "--threshold", "0.25", "--out", str(out)]) == 0
    found = strict(out)
    assert found["threshold_source"] == "given"
    assert {each["threshold"] for each in found["vertebrae"].values()} == {0.25}
    assert found["patient"]["threshold"] != 0.25
    assert "Threshold of vertebrae: given." in capsys.readouterr().out
    assert not (project / "checkpoints" / "toy" / "studies").exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("--study 9.9", "Study '9.9' has no packed sequence in"),
        ("--study ../9.9", "cannot be file names"),
        ("--study 9.9 --cohort none", "Study '9.9' has no packed sequence in"),
        ("--study UID --threshold 1.5", "A threshold must be in [0, 1]; found 1.5."),
        ("--study UID --threshold nan", "A threshold must be in [0, 1]; found nan."),
        ("--threshold 0.5", "--threshold is for one study. Name it with --study,"),
        ("--out one.json", "--out is for one study. Name it with --study,"),
        ("--study UID --masks mask.nii", "--masks is for a CT that is not packed yet."),
        ("--ct data", "--ct needs --masks, the file or folder that says where its vertebrae are."),
        ("--masks mask.nii", "--masks is for one study."),
        ("--study UID --calibrated", "--calibrated is for the table of a cohort, not for one study"),
        ("--study UID --replace", "--replace is for the table of a cohort, not for one study"),
        ("--study UID --skip-unusable", "--skip-unusable is for the table of a cohort, not for one study"),
    ],
)
def test_what_the_command_cannot_answer_is_one_sentence_and_nothing_is_written(
    project, uid, arguments, sentence, monkeypatch, capsys
):
    monkeypatch.chdir(project)
    before = sorted(project.rglob("*"))
    assert main(["predict", "--run", "toy", *arguments.replace("UID", uid).split()]) == 100
    out, err = capsys.readouterr()
    assert (out, sentence in err) == ("", True), err
    assert sorted(project.rglob("*")) == before


@pytest.fixture(scope="module")
def ct(tmp_path_factory):
    """CT and masks of a cohort, DICOM by pydicom, packed; and a study once more as nibabel writes it."""
    folder = write_cohort(tmp_path_factory.mktemp("ct"))
    pack_cohort(folder, config=CONFIG, workers=1)
    study = scanned(0)
    scans.write_nifti(folder / f"{study.uid}.nii.gz", study.volume_hu, study.spacing_mm)
    scans.write_nifti(folder / "mask.nii.gz", study.label_map, study.spacing_mm)
    return folder


@pytest.fixture
def answering(project, monkeypatch):
    """The command line with that run, whose sequences were packed as those CT are."""
    known = checkpoints.load_run(project / "checkpoints" / "toy")
    packing = {"packing": {"config": json.loads(json.dumps(asdict(CONFIG)))}}
    run = replace(known, record=known.record | {"cohort": packing})
    monkeypatch.setattr(checkpoints, "load_run", lambda _: run)
    return run


def answered(run, uid):
    return strict(study_path(run.folder, uid))


@pytest.mark.parametrize("kind", ["dicom", "nifti"])
def test_a_ct_is_answered_in_one_go_as_it_is_when_packed_first(answering, ct, kind, tmp_path, monkeypatch):
    uid = scanned(0).uid
    images = ct / "train_images" / uid if kind == "dicom" else ct / f"{uid}.nii.gz"
    mask = ct / "segmentations" / f"{uid}.nii.gz" if kind == "dicom" else ct / "mask.nii.gz"
    before = sorted(ct.rglob("*"))
    (tmp_path / "left").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "left"))
    assert main(["predict", "--run", "toy", "--ct", str(images), "--masks", str(mask)]) == 0
    found, step = answered(answering, uid), predict_study(answering, ct / "packed", uid)
    expected = json.loads(json.dumps(step.record()))
    for part in ("vertebrae", "patient", "missing", "threshold_source", "sentences"):
        assert found[part] == expected[part]
    assert found["hashes"]["packed"] == expected["hashes"]["packed"]
    assert (found["hashes"]["source"] == expected["hashes"]["source"]) == (kind == "dicom")
    assert sorted(ct.rglob("*")) == before
    assert list((tmp_path / "left").iterdir()) == []


def test_a_vertebra_that_cannot_be_packed_is_missing_with_its_reason(answering, ct, tmp_path):
    study = scanned(0)
    without = np.where(study.label_map == 3, 0, study.label_map).astype(np.uint8)
    scans.write_nifti(tmp_path / "mask.nii.gz", without, study.spacing_mm)
    images = str(ct / f"{study.uid}.nii.gz")
    assert main(["predict", "--run", "toy", "--ct", images, "--masks", str(tmp_path / "mask.nii.gz")]) == 0
    found = answered(answering, study.uid)
    assert found["missing"] == ["C3"]
    assert "not packed: C3: not in the mask" in found["warnings"]
    assert "Not packed: C3; the absence of a call there is no all-clear." in found["sentences"]


@pytest.mark.parametrize(
    ("ct_name", "mask_name", "more", "sentence"),
    [
        ("UID.nii.gz", "none.nii.gz", "", "No mask at"),
        ("none", "mask.nii.gz", "", "No CT at"),
        ("UID.nii.gz", "elsewhere.nii.gz", "", "no voxel of C1 … C7 lies inside the CT. It is the mask of"),
        ("UID.nii.gz", "mask.nii.gz", "--scheme totalsegmentator", "mask.nii.gz"),
        ("UID.nii.gz", "mask.nii.gz", "--labels none.json", "No table of labels at none.json"),
        ("a b.nii.gz", "mask.nii.gz", "", "cannot be file names"),
        ("segmentations", "mask.nii.gz", "", "segmentations"),
    ],
)
def test_a_ct_that_cannot_be_answered_is_one_sentence_and_nothing_is_written(
    answering, ct, ct_name, mask_name, more, sentence, capsys
):
    study = scanned(0)
    (ct / "a b.nii.gz").write_bytes(b"")
    away = (4000.0, 0.0, 0.0)
    scans.write_nifti(ct / "elsewhere.nii.gz", study.label_map, study.spacing_mm, origin_mm=away)
    images, mask = ct / ct_name.replace("UID", study.uid), ct / mask_name
    assert main(["predict", "--run", "toy", "--ct", str(images), "--masks", str(mask), *more.split()]) == 100
    out, err = capsys.readouterr()
    assert (out, sentence in err) == ("", True), err
    assert not (answering.folder / "studies").exists()


@pytest.mark.parametrize(
    ("odd", "drawn", "named"),
    [((2,), VERTEBRAE, None), ((2, 3), VERTEBRAE, "C2, C3"), ((2,), ("C2",), "C2")],
    ids=["one", "several", "all"],
)
def test_a_mask_of_another_ct_is_refused_and_one_odd_vertebra_is_not(
    answering, tmp_path, odd, drawn, named, capsys
):
    study = scanned(0)
    hu, images, masks = study.volume_hu.copy(), tmp_path / f"{study.uid}.nii.gz", tmp_path / "mask.nii.gz"
    for number in odd:  # three voxels of ten on bone
        inside = np.flatnonzero(study.label_map == number)
        hu.ravel()[inside] = np.where(np.arange(inside.size) % 10 < 3, 400, 0)
    kept = np.isin(study.label_map, [VERTEBRAE.index(name) + 1 for name in drawn])
    scans.write_nifti(images, hu, study.spacing_mm)
    scans.write_nifti(masks, np.where(kept, study.label_map, 0).astype(np.uint8), study.spacing_mm)
    code = main(["predict", "--run", "toy", "--ct", str(images), "--masks", str(masks)])
    out, err = capsys.readouterr()
    if named is None:
        assert (code, "C2: 30% of its voxels" in out) == (0, True)
        return
    said = f"mask.nii.gz does not look like this CT's mask: too little bone lies in {named}."
    assert (code, out, said in err) == (100, "", True), err
    assert not (answering.folder / "studies").exists()


def test_a_run_of_unknown_packing_packs_no_ct(answering, ct, monkeypatch, capsys):
    run = replace(answering, record=answering.record | {"cohort": None})
    monkeypatch.setattr(checkpoints, "load_run", lambda _: run)
    paths = ["--ct", str(ct / f"{scanned(0).uid}.nii.gz"), "--masks", str(ct / "mask.nii.gz")]
    assert main(["predict", "--run", "toy", *paths]) == 100
    assert "does not say how its sequences were packed" in capsys.readouterr().err
    assert not (run.folder / "studies").exists()


def test_a_ct_and_a_study_together_are_wrong_arguments(project, uid, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["predict", "--run", "toy", "--study", uid, "--ct", "scan", "--masks", "mask.nii"])
    assert stopped.value.code == 2
    assert "argument --ct: not allowed with argument --study" in capsys.readouterr().err


@scans.needs_ct
@pytest.mark.slow
def test_a_real_ct_without_a_cervical_vertebra_gives_a_clear_sentence(answering, capsys):
    folder = scans.REAL_CT / "totalsegmentator_example"
    images, mask = str(folder / "dicom"), str(folder / "dicom_segmentation.nii.gz")
    options = ["--ct", images, "--masks", mask, "--scheme", "totalsegmentator"]
    assert main(["predict", "--run", "toy", *options]) == 100
    assert "dicom_segmentation.nii.gz: " in capsys.readouterr().err
