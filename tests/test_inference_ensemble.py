import json
import shutil
from dataclasses import asdict, replace

import numpy as np
import pandas as pd
import pytest
import torch
from toy_cohort import make_toy_cohort, tiny_model

from cspine_helpers.checkpoints import load_run, save_weights
from cspine_helpers.cohort import read_cohort
from cspine_helpers.dataset.augment import Augment, AugmentConfig
from cspine_helpers.decisions.test_split import evaluate_on_test, freeze, read_decision, read_openings
from cspine_helpers.decisions.thresholds import Rule, choose_decision
from cspine_helpers.files.paths import fold_dir, sha256_of
from cspine_helpers.inference import ensemble as ensembles
from cspine_helpers.inference import prediction as inference
from cspine_helpers.inference.ensemble import predict_ensemble, predict_folds
from cspine_helpers.inference.prediction import predict, predict_cohort
from cspine_helpers.labels import UID, VERTEBRAE
from cspine_helpers.model.classifier import FractureClassifier
from cspine_helpers.model.forward import flipped, folded
from cspine_helpers.packed import open_sequence, sequence_path
from cspine_helpers.predictions import read_predictions
from cspine_helpers.runs import read_ensemble, read_record, write_record
from cspine_helpers.splits import k_folds, write_split


def make_run(folder, data, *, seed=0, **changes):
    """A run of random weights, with the record of a training on these data."""
    torch.manual_seed(seed)
    config = replace(tiny_model(), **changes)
    save_weights(folder, FractureClassifier(config))
    decision = {"threshold": 0.5, "reason": "made up.", "precision_floor": 0.3}
    record = {"classes": list(VERTEBRAE), "model": asdict(config), "data": data, "decision": decision}
    write_record(folder, record)
    return folder


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    return read_cohort(make_toy_cohort(tmp_path_factory.mktemp("toy") / "toy", studies=14))


@pytest.fixture(scope="module")
def members(cohort, tmp_path_factory):
    """Folders of three seeds."""
    root = tmp_path_factory.mktemp("members")
    return [make_run(root / f"seed_{seed}", cohort.fingerprint(), seed=seed) for seed in range(3)]


@pytest.fixture(scope="module")
def in_folds(cohort, tmp_path_factory):
    """A run of three folds: its folder, and the table of folds."""
    folder = tmp_path_factory.mktemp("folds") / "run"
    folds = k_folds(cohort.labels, folds=3, split=cohort.split)
    write_split(folds, folder / "folds.csv")
    for fold in range(3):
        make_run(fold_dir(folder, fold), cohort.of_fold(folds, fold).fingerprint(), seed=10 + fold)
    predict_folds(folder, cohort)
    return folder, folds


def test_an_ensemble_is_the_mean_of_what_its_members_say_alone(members, cohort, tmp_path):
    table = predict_ensemble(members, cohort, tmp_path / "mean")
    alone = [predict_cohort(load_run(each), cohort, tmp_path / each.name / "p.csv") for each in members]
    keys = [UID, "vertebra", "split", "label"]
    pd.testing.assert_frame_equal(table[keys], alone[0][keys])
    each = np.stack([found["probability"] for found in alone])
    assert np.ptp(each, axis=0).min() > 0
    np.testing.assert_allclose(table["probability"], each.mean(axis=0), rtol=1e-15)
    pd.testing.assert_frame_equal(read_predictions(tmp_path / "mean" / "predictions.csv"), table)


def test_the_record_names_members_with_their_weights_and_the_table(members, cohort, tmp_path):
    predict_ensemble(members[:2], cohort, tmp_path, tta=True)
    record = read_ensemble(tmp_path)
    assert [each["run"] for each in record["members"]] == ["seed_0", "seed_1"]
    for folder, each in zip(members, record["members"], strict=False):
        assert each["weights_sha256"] == sha256_of(folder / "model.safetensors")
    assert record["views"] == ["as packed", "left and right exchanged"]
    assert record["data"] == cohort.fingerprint()
    assert record["predictions_sha256"] == sha256_of(tmp_path / "predictions.csv")
    cohort.check_run(record)
    text = (tmp_path / "ensemble.json").read_text()
    (tmp_path / "ensemble.json").write_text(text.replace("seed_1", "seed_2"))
    with pytest.raises(ValueError, match="not the record that was written"):
        read_ensemble(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        *("ensemble.json", "predictions.csv", "predictions.csv.sha256")
    }


def test_the_mirrored_sequence_is_that_of_training(cohort):
    uid = cohort.samples["test"][UID].iloc[0]
    array = np.array(open_sequence(sequence_path(cohort.packed, uid, "C3")))
    array[:, :5, :3, 5] = 255  # a mask that is not its own mirror image
    only = dict.fromkeys(("affine", "contrast", "noise", "dropout"), 0.0)
    expected = Augment(AugmentConfig(flip=1.0, **only))(array, seed=(0,))
    assert not np.array_equal(expected, array)
    batch = {"sequence": torch.from_numpy(array)[None].permute(0, 1, 4, 2, 3), "label": torch.ones(1)}
    found = flipped(batch)
    assert torch.equal(found["sequence"][0].permute(0, 2, 3, 1), torch.from_numpy(expected))
    assert found["label"] is batch["label"]


def test_with_tta_each_probability_is_the_mean_of_both_views(members, cohort, tmp_path):
    table = predict_ensemble(members[:1], cohort, tmp_path, tta=True, splits=["test"], batch_size=4)
    plain = predict(load_run(members[0]), cohort.samples["test"], cohort.packed, split="test", batch_size=4)
    network = folded(load_run(members[0]).model)
    mirrored = []
    for start in range(0, len(plain), 4):  # in the same batches, which round alike
        arrays = [
            np.array(open_sequence(sequence_path(cohort.packed, *row)))[:, :, ::-1].copy()
            for row in plain[[UID, "vertebra"]].iloc[start : start + 4].itertuples(index=False)
        ]
        with torch.inference_mode():
            output = network(torch.from_numpy(np.stack(arrays)).permute(0, 1, 4, 2, 3))
        mirrored += output.probability.tolist()
    assert not np.allclose(mirrored, plain["probability"], rtol=1e-6)
    np.testing.assert_array_equal(table["probability"], (plain["probability"] + mirrored) / 2)


def test_each_batch_is_loaded_once_for_all_members(members, cohort, tmp_path, monkeypatch):
    asked = []
    opened = inference.SequenceDataset.__getitems__
    monkeypatch.setattr(
        inference.SequenceDataset, "__getitems__", lambda self, keys: asked.append(1) or opened(self, keys)
    )
    table = predict_ensemble(members, cohort, tmp_path, tta=True, batch_size=7)
    assert len(asked) == len(table) / 7


def test_out_of_fold_each_study_is_predicted_by_the_model_that_never_saw_it(in_folds, cohort):
    folder, folds = in_folds
    table = read_predictions(folder / "predictions.csv")
    known = folds.set_index(UID)["fold"]
    assert set(table[UID]) == set(cohort.labels[UID])
    runs = [load_run(fold_dir(folder, fold)) for fold in range(3)]
    for fold, run in enumerate(runs):
        rows = table[table["fold"] == fold]
        assert set(rows["split"]) == {"validation"}
        assert set(rows[UID]) == set(known.index[known == fold])
        alone = predict(run, rows, cohort.packed, split="validation")
        np.testing.assert_array_equal(rows["probability"], alone["probability"])
    test = table[table["split"] == "test"]
    assert test["fold"].isna().all()
    pd.testing.assert_series_equal(
        test[UID].reset_index(drop=True), cohort.samples["test"][UID], check_dtype=False
    )
    each = [predict(run, test, cohort.packed, split="test")["probability"] for run in runs]
    np.testing.assert_allclose(test["probability"], np.mean(each, axis=0), rtol=1e-15)
    record = read_ensemble(folder)
    assert [(each["fold"], each["run"]) for each in record["members"]] == [
        *((fold, f"fold_{fold}") for fold in range(3))
    ]
    assert record["data"]["split_sha256"] == cohort.fingerprint()["split_sha256"]


def test_decisions_are_frozen_on_predictions_out_of_fold_and_open_the_test_split(in_folds, cohort):
    folder, _ = in_folds
    table = read_predictions(folder / "predictions.csv")
    chosen = [choose_decision(table, Rule("max_f1", level=level)) for level in ("vertebra", "patient")]
    freeze(folder, chosen, table)
    results = evaluate_on_test(folder, table)
    assert results.set_index("level")["patients"]["all"] == table[UID][table["split"] == "test"].nunique()
    assert len(read_openings(folder)) == 1
    assert read_decision(folder).record["split_sha256"] == cohort.fingerprint()["split_sha256"]
    with pytest.raises(ValueError, match="frozen with other predictions"):
        evaluate_on_test(folder, table.assign(probability=table["probability"] / 2))


def test_a_table_that_was_begun_is_resumed_across_folds_and_its_record_comes_last(
    in_folds, cohort, tmp_path, monkeypatch
):
    whole, folder = in_folds[0], tmp_path / "run"
    shutil.copytree(whole, folder, ignore=shutil.ignore_patterns("predictions*", "*.json", "test_*"))
    for fold in range(3):
        shutil.copy(fold_dir(whole, fold) / "run.json", fold_dir(folder, fold))

    def stop_at(where, call):
        """A stop in place of this call of a function that predicting a table calls."""
        real, calls = getattr(*where), []

        def stopped(*arguments):
            calls.append(1)
            if len(calls) == call:
                raise KeyboardInterrupt
            return real(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(*where, stopped)
            with pytest.raises(KeyboardInterrupt):
                predict_folds(folder, cohort)

    stop_at((inference, "append"), 2)  # in the first fold
    stop_at((inference, "append"), 5)  # in the third
    assert not (folder / "predictions.csv").exists()
    stop_at((ensembles, "write_ensemble"), 1)
    assert (folder / "predictions.csv").is_file()
    predict_folds(folder, cohort)
    for name in ("predictions.csv", "ensemble.json"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes()
    with pytest.raises(FileExistsError, match="a decision may rest on it"):
        predict_folds(folder, cohort)


def test_patients_of_the_split_are_in_the_tables(members, cohort, tmp_path):
    known = replace(cohort, split=cohort.split.assign(patient="p" + cohort.split[UID]))
    run = load_run(members[0])
    for table in (
        predict_cohort(run, known, tmp_path / "one" / "predictions.csv", splits=["test"]),
        predict_ensemble(members, known, tmp_path / "mean", splits=["test"]),
    ):
        assert (table["patient"] == "p" + table[UID]).all()


# case → changes of the record's data and of the model, of a run beside the first; and the sentence
OTHERWISE = {
    "another split": (
        {"split_sha256": "1" * 64},
        {},
        r"^Runs of an ensemble share labels, split, slices and size; other than seed_0 are other: "
        r"split_sha256 is '1{64}', not '\w+'\. Leave them out, or train them alike\.$",
    ),
    "other labels": ({"labels_sha256": "1" * 64}, {}, r"other: labels_sha256 is '1{64}', not"),
    "other slices": ({}, {"slices": 7}, r"other: slices is 7, not 5\."),
    "another size": ({}, {"size": 64}, r"other: size is 64, not 32\."),
    "a copy": ({}, {"seed": 0}, r"same weights count once: 'seed_0 and other'"),
}


@pytest.mark.parametrize("case", OTHERWISE)
def test_a_run_that_is_made_otherwise_is_refused_and_nothing_is_written(case, members, cohort, tmp_path):
    data, model, sentence = OTHERWISE[case]
    other = make_run(tmp_path / "other", cohort.fingerprint() | data, **{"seed": 7} | model)
    with pytest.raises(ValueError, match=sentence):
        predict_ensemble([members[0], other], cohort, tmp_path / "out")
    assert not (tmp_path / "out").exists()


NAMED = {
    "missing": (
        ["seed_0", "gone", "lost"],
        r"no weights \(2\): 'gone', 'lost'\. Train them, or name others\.$",
    ),
    "twice": (
        ["seed_0", "seed_1", "../members0/seed_0"],
        r"^Each run .* several times: 'seed_0'\. Name each",
    ),
    "one alone": (["seed_0"], r"two runs or more, or one with tta; found 1\."),
    "none": ([], r"two runs or more, or one with tta; found 0\."),
}


@pytest.mark.parametrize("case", NAMED)
def test_runs_that_cannot_be_averaged_are_refused_by_name_and_nothing_is_written(
    case, members, cohort, tmp_path
):
    names, sentence = NAMED[case]
    folders = [members[0].parent / name.replace("members0", members[0].parent.name) for name in names]
    with pytest.raises((ValueError, FileNotFoundError), match=sentence):
        predict_ensemble(folders, cohort, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_members_of_another_cohort_or_in_training_or_into_a_run_are_refused(members, cohort, tmp_path):
    other = read_cohort(make_toy_cohort(tmp_path / "other", studies=14, seed=5))
    with pytest.raises(ValueError, match="trained on other data than"):
        predict_ensemble(members, other, tmp_path / "out")
    training = make_run(tmp_path / "training", cohort.fingerprint(), seed=8)
    (training / "state.safetensors").touch()
    with pytest.raises(ValueError, match=r"training has not ended \(1\): 'training'"):
        predict_ensemble([*members, training], cohort, tmp_path / "out")
    with pytest.raises(FileExistsError, match=r"a run of its own \('run.json'\)"):
        predict_ensemble(members, cohort, members[0])
    assert not (tmp_path / "out").exists()


def test_folds_that_were_trained_unlike_are_refused_but_for_their_workers(in_folds, cohort, tmp_path):
    folder = shutil.copytree(in_folds[0], tmp_path / "run", ignore=shutil.ignore_patterns("predictions*"))
    (folder / "ensemble.json").unlink()
    records = [read_record(fold_dir(folder, fold)) for fold in range(3)]
    records[0]["train"] = records[2]["train"] = {"epochs": 3, "workers": 0}
    records[1]["train"] = {"epochs": 3, "workers": 4}
    for fold, record in enumerate(records):
        write_record(fold_dir(folder, fold), record)
    predict_folds(folder, cohort)
    (folder / "predictions.csv").unlink()
    write_record(fold_dir(folder, 2), {**records[2], "train": {"epochs": 4, "workers": 0}})
    with pytest.raises(ValueError, match=r"^Folds share labels .*than fold_0 are fold_2: train\.epochs is 4"):
        predict_folds(folder, cohort)
    assert not (folder / "predictions.csv").exists()


def test_folds_that_are_missing_or_of_another_table_are_refused(in_folds, cohort, tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(FileNotFoundError, match=r"^No folds.csv in .*run\. Train folds first"):
        predict_folds(folder, cohort)
    folds = k_folds(cohort.labels, folds=3, split=cohort.split, seed=3)
    write_split(folds, folder / "folds.csv")
    make_run(fold_dir(folder, 0), cohort.of_fold(folds, 0).fingerprint(), seed=1)
    with pytest.raises(FileNotFoundError, match=r"\(2\): 'fold_1', 'fold_2'"):
        predict_folds(folder, cohort)
    for fold in (1, 2):
        make_run(fold_dir(folder, fold), cohort.of_fold(in_folds[1], fold).fingerprint(), seed=2 + fold)
    with pytest.raises(ValueError, match=r"split_sha256 differ"):
        predict_folds(folder, cohort)
    assert not (folder / "predictions.csv").exists()
    assert json.loads((fold_dir(folder, 0) / "run.json").read_text())["data"]["fold"]["number"] == 0
