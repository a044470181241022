import io
import json
import logging
import math
import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file, save_file
from sklearn.metrics import f1_score, recall_score, roc_auc_score
from toy_cohort import half_marked, make_toy_cohort, tiny_model

from cspine_helpers.checkpoints import load_run
from cspine_helpers.cohort import read_cohort
from cspine_helpers.decisions.thresholds import Rule, choose_threshold
from cspine_helpers.files import paths
from cspine_helpers.inference.prediction import predict
from cspine_helpers.labels import UID, VERTEBRAE, read_labels, write_labels
from cspine_helpers.metrics import auroc, average_precision
from cspine_helpers.model.classifier import FractureClassifier
from cspine_helpers.packed import sequence_path
from cspine_helpers.runs import HISTORY_COLUMNS, read_history, read_record, write_record
from cspine_helpers.training import sequence_task
from cspine_helpers.training import trainer as stages
from cspine_helpers.training.config import TrainConfig
from cspine_helpers.training.losses import Loss
from cspine_helpers.training.run import RULE, beside, interrupted, set_aside, train
from cspine_helpers.training.sequence_task import SequenceTask
from cspine_helpers.training.settings import Settings, settings_of

CONFIG = TrainConfig(
    epochs=2,
    batch_size=8,
    learning_rate=4e-3,
    accumulate=1,
    workers=0,
    vertebra_weights="equal",
)
FILES = {"history.csv", "model.safetensors", "run.json", "train.log"}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def own_accelerator():
    """Accelerate's settings hold for the whole process: what the test chooses ends with it."""
    AcceleratorState._reset_state(reset_partial_state=True)  # other tests have chosen theirs
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    return make_toy_cohort(tmp_path_factory.mktemp("toy") / "toy")


@pytest.fixture(scope="module")
def run(cohort):
    """A run of two epochs: its folder and the history that `train` returned."""
    torch.set_num_threads(1)
    folder = cohort.parent / "run"
    return folder, train(cohort, folder, model=tiny_model(), config=CONFIG)


def test_training_fills_the_run_folder_and_returns_its_history(run):
    folder, history = run
    assert {path.name for path in folder.iterdir()} == FILES
    assert list(history["epoch"]) == [1, 2]
    assert tuple(history.columns) == HISTORY_COLUMNS
    pd.testing.assert_frame_equal(read_history(folder), history, check_dtype=False)
    assert history["seconds"].tolist() == read_record(folder)["epoch_seconds"][-2:]


def test_the_log_says_what_is_trained_and_a_line_an_epoch(run):
    folder, history = run
    lines = (folder / "train.log").read_text(encoding="utf-8").splitlines()
    said = [line[len("2026-01-01 00:00:00  ") :] for line in lines]
    record = read_record(folder)
    assert said[0] == "Training of run: it begins"
    for name in ("model", "train", "rule", "data", "device", "cohort", "versions"):
        assert f"{name}: {json.dumps(record[name])}" in said
    epochs = [line for line in said if ", epoch " in line]
    for line, (_, row) in zip(epochs, history.iterrows(), strict=True):
        loss = f"train_loss {row['train_loss']:.4g}"
        assert line.startswith(f"sequences, epoch {row['epoch']:.0f} of 2: {loss}, ")
        assert f", validation_auroc {row['validation_auroc']:.4g}, " in line
    assert said[-1].endswith(f"epoch {record['best_epoch']} is kept.")
    assert not logging.getLogger("cspine_helpers.training").handlers


def test_the_history_says_how_training_samples_and_single_vertebrae_did(cohort, tmp_path, monkeypatch):
    given, real = [], Loss.__call__

    def watched(loss, output, batch):
        given.append((batch["label"].numpy(), output.logit.detach().sigmoid().numpy()))
        return real(loss, output, batch)

    monkeypatch.setattr(Loss, "__call__", watched)
    config = replace(CONFIG, epochs=1, slice_epochs=0, warmup_epochs=0.5, backbone_rate=0.1)
    history = train(cohort, tmp_path / "run", model=tiny_model(), config=config)
    labels, probabilities = map(np.concatenate, zip(*given[:-1], strict=True))  # the last is of validation
    row, called = history.iloc[0], probabilities >= history["threshold"].iloc[0]
    assert row["train_auroc"] == pytest.approx(roc_auc_score(labels, probabilities))
    assert row["train_recall"] == pytest.approx(recall_score(labels, called))
    assert row["train_f1"] == pytest.approx(f1_score(labels, called))
    assert row["backbone_learning_rate"] == pytest.approx(row["learning_rate"] / 10)
    run, known = load_run(tmp_path / "run"), read_cohort(cohort)
    table = predict(run, known.samples["validation"], known.packed, split="validation", batch_size=8)
    called = table["probability"] >= run.threshold
    assert row["validation_f1"] == pytest.approx(f1_score(table["label"], called))
    areas = [row[f"validation_auroc_{name}"] for name in VERTEBRAE]
    assert 0 < np.isnan(areas).sum() < 7
    for area, (_, rows) in zip(areas, table.groupby("vertebra"), strict=True):
        if rows["label"].nunique() == 2:
            assert area == roc_auc_score(rows["label"], rows["probability"])
        else:
            assert np.isnan(area)


def test_a_log_that_is_a_link_is_refused(cohort, tmp_path):
    folder, theirs = tmp_path / "run", tmp_path / "theirs"
    theirs.write_text("theirs")
    folder.mkdir()
    (folder / "train.log").symlink_to(theirs)
    with pytest.raises(ValueError, match=r"train\.log is a .*link"):
        train(cohort, folder, model=tiny_model(), config=CONFIG)
    assert theirs.read_text() == "theirs"
    assert [path.name for path in folder.iterdir()] == ["train.log"]


def test_tensorboard_is_asked_for_by_name_before_anything_is_written(cohort, tmp_path, monkeypatch):
    monkeypatch.setattr("cspine_helpers.training.run.is_tensorboard_available", lambda: False)
    config = replace(CONFIG, tracker="tensorboard")
    with pytest.raises(ValueError, match=r"needs the package tensorboard, .* or set tracker to none\."):
        train(cohort, tmp_path / "run", model=tiny_model(), config=config)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_tensorboard_has_the_history(cohort, tmp_path, own_accelerator):
    reading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    config = replace(CONFIG, tracker="tensorboard", slice_epochs=1)
    history = train(cohort, tmp_path / "run", model=tiny_model(), config=config)
    events = reading.EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert "slices/train_loss" in events.Tags()["scalars"]
    for name in ("train_loss", "validation_auroc", "seconds"):
        found = [event.value for event in events.Scalars(f"sequences/{name}")]
        assert found == pytest.approx(history[name].tolist(), rel=1e-6)


def test_the_toy_cohort_is_learned(run):
    _, history = run
    assert history["train_loss"].iloc[1] < history["train_loss"].iloc[0]
    assert history["validation_auroc"].max() > 0.9


def test_the_record_says_what_the_run_was_made_of(run, cohort):
    folder, history = run
    record = read_record(folder)
    assert record["train"]["learning_rate"] == CONFIG.learning_rate
    assert record["train"]["augment"]["flip"] == 0.5
    assert record["data"]["cohort"] == "toy"
    assert record["data"] == read_cohort(cohort).fingerprint()
    assert record["cohort"] == read_cohort(cohort).facts()
    learned = sum(parameter.numel() for parameter in load_run(folder).model.parameters())
    assert record["parameters"] == learned
    assert {"torch", "timm", "cspine_helpers", "python"} <= set(record["versions"])
    assert record["seconds"] == pytest.approx(sum(record["epoch_seconds"]))
    assert min(record["epoch_seconds"]) > 0
    assert record["left_out"] == {}
    best = history.set_index("epoch").loc[record["best_epoch"]]
    for name, value in record["metrics"]["validation"].items():
        assert value == best[f"validation_{name}"]
    assert record["decision"]["threshold"] == best["threshold"]
    assert record["decision"]["precision_floor"] == 0.5


def test_the_reloaded_best_epoch_gives_the_stored_metrics_again(run, cohort):
    folder, _ = run
    loaded, data = load_run(folder), read_cohort(cohort)
    table = predict(loaded, data.samples["validation"], data.packed, split="validation", batch_size=5)
    stored = loaded.record["metrics"]["validation"]
    found = choose_threshold(table["label"], table["probability"], RULE)
    assert found.threshold == pytest.approx(loaded.threshold, abs=1e-4)
    assert found.recall == pytest.approx(stored["recall"], abs=1e-4)
    assert found.precision == pytest.approx(stored["precision"], abs=1e-4)
    for name, metric in (("average_precision", average_precision), ("auroc", auroc)):
        assert metric(table["label"], table["probability"]) == pytest.approx(stored[name], abs=1e-4)


@pytest.mark.slow
def test_two_trainings_are_equal_bit_for_bit_whatever_the_workers(run, cohort, tmp_path):
    folder, history = run
    again = train(cohort, tmp_path / "run", model=tiny_model(), config=replace(CONFIG, workers=2))
    same = {"check_exact": True}
    pd.testing.assert_frame_equal(again.drop(columns="seconds"), history.drop(columns="seconds"), **same)
    weights = [(place / "model.safetensors").read_bytes() for place in (folder, tmp_path / "run")]
    assert weights[0] == weights[1]


@pytest.mark.slow
def test_workers_change_nothing_in_the_pretraining_of_slices_nor_in_its_pseudo_labels(cohort, tmp_path):
    unmarked = half_marked(cohort, tmp_path / "half_marked")
    slices = {"slice_epochs": 3, "slice_samples": 48, "pseudo_label_after": 1}
    histories = [
        train(
            unmarked,
            tmp_path / str(workers),
            model=tiny_model(),
            config=replace(CONFIG, epochs=1, warmup_epochs=0.5, workers=workers, **slices),
        ).drop(columns="seconds")
        for workers in (0, 2)
    ]
    pd.testing.assert_frame_equal(*histories, check_exact=True)
    one, two = (tmp_path / name / "model.safetensors" for name in ("0", "2"))
    assert one.read_bytes() == two.read_bytes()


def test_a_training_that_begins_with_pretrained_weights_records_them_and_reloads_without(cohort, tmp_path):
    path, folder = tmp_path / "b0.safetensors", tmp_path / "run"
    model = replace(tiny_model(), pretrained=str(path))
    config = replace(CONFIG, epochs=1, warmup_epochs=0.5)
    with pytest.raises(FileNotFoundError, match=r"b0\.safetensors' are not there"):
        train(cohort, folder, model=model, config=config)
    assert not folder.exists()
    save_file(timm.create_model(model.backbone).state_dict(), path)
    train(cohort, folder, model=model, config=config)
    sha256 = paths.sha256_of(path)
    assert read_record(folder)["pretrained"] == {"source": "file", "name": path.name, "sha256": sha256}
    assert read_record(folder)["normalisation"]["mean"] == [0.485, 0.456, 0.406, 0.485, 0.456]
    path.unlink()
    assert load_run(folder).config == model


def test_a_run_that_another_process_trains_is_refused(cohort, tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "_PATIENCE_S", 0)
    lock = paths.exclusive(tmp_path / "run" / ".lock", "training")
    with lock, pytest.raises(BlockingIOError, match=r"another process is training in .*run"):
        train(cohort, tmp_path / "run", model=tiny_model(), config=CONFIG)
    assert not (tmp_path / "run").exists()


def test_a_run_is_never_overwritten_but_set_aside(run, cohort, tmp_path):
    folder, _ = run
    with pytest.raises(FileExistsError, match=r"holds a run already, .*--run"):
        train(cohort, folder, model=tiny_model(), config=CONFIG)
    for name in (*FILES - {"train.log"}, "state.safetensors"):
        run_folder = tmp_path / "only" / name.partition(".")[0]
        run_folder.mkdir(parents=True)
        (run_folder / name).touch()
        with pytest.raises(FileExistsError, match=name):
            train(cohort, run_folder, model=tiny_model(), config=CONFIG)


def test_setting_aside_keeps_every_earlier_run(tmp_path):
    folder = tmp_path / "builtin"
    assert set_aside(folder) is None
    for n in (1, 2):
        folder.mkdir()
        (folder / "run.json").write_text(str(n))
        assert set_aside(folder) == tmp_path / f"builtin-previous-{n}"
        assert not folder.exists()
        assert (tmp_path / f"builtin-previous-{n}" / "run.json").read_text() == str(n)
    folder.mkdir()
    assert set_aside(folder) is None


@pytest.mark.parametrize(
    "name",
    [
        *("predictions.csv", "decision.json", "triage.json", "test_openings.csv", "calibrated.csv"),
        *("masks.csv", "blend.json"),
    ],
)
def test_predictions_that_were_brought_are_neither_trained_over_nor_lost(cohort, tmp_path, name):
    folder = tmp_path / "theirs"
    folder.mkdir()
    (folder / name).write_text("theirs")
    for resume in (False, True):
        with pytest.raises(FileExistsError, match=f"made with one \\('{name}'\\)"):
            train(cohort, folder, model=tiny_model(), config=CONFIG, resume=resume)
    assert (set_aside(folder) / name).read_text() == "theirs"


def fake_epochs(monkeypatch, recalls, average_precisions=None, losses=None):
    """Replace the epochs' work: each one has these validation metrics."""
    scores = iter(
        zip(recalls, average_precisions or [0.5] * len(recalls), losses or [1.0] * len(recalls), strict=True)
    )
    now = {}

    def train_epoch(accelerator, network, *_, **__):
        now["row"] = next(scores)
        with torch.no_grad():
            network.head.bias.fill_(now["row"][0])  # marks the epoch in the weights
        return now["row"][2]

    def validate(*_):
        recall, score, _ = now["row"]
        decision = choose_threshold([0, 1], [0.2, 0.7], Rule(precision_floor=0.5))
        decision = replace(decision, recall=recall, threshold=0.7 if recall else None)
        values = {"loss": 1.0, "recall": recall, "precision": 0.5, "average_precision": score, "auroc": 0.5}
        row = {f"validation_{name}": value for name, value in values.items()}
        row["threshold"], row["validation_objective"] = (0.7, recall) if recall else (math.nan, math.nan)
        return row, {"decision": decision.record(), "metrics": {"validation": values}}

    monkeypatch.setattr(stages, "train_epoch", train_epoch)
    monkeypatch.setattr(SequenceTask, "validate", validate)


def test_training_stops_when_no_epoch_was_better_for_as_long_as_the_patience(cohort, tmp_path, monkeypatch):
    fake_epochs(monkeypatch, [0.1, 0.6, 0.5, 0.6, 0.4, 0.9])
    config = replace(CONFIG, epochs=6, patience=3)
    history = train(cohort, tmp_path / "run", model=tiny_model(), config=config)
    assert len(history) == 5
    record = read_record(tmp_path / "run")
    assert record["best_epoch"] == 2
    assert record["metrics"]["validation"]["recall"] == 0.6
    assert load_file(tmp_path / "run" / "model.safetensors")["head.bias"].item() == pytest.approx(0.6)
    assert not interrupted(tmp_path / "run")


def test_the_epoch_and_the_threshold_are_those_of_the_rule(cohort, tmp_path):
    rule = Rule("min_cost", cost_miss=5, cost_false_alarm=1)
    history = train(cohort, tmp_path / "run", model=tiny_model(), config=CONFIG, rule=rule)
    record = read_record(tmp_path / "run")
    best = history.set_index("epoch").loc[record["best_epoch"]]
    assert (
        best["validation_objective"] == record["decision"]["value"] == history["validation_objective"].max()
    )
    assert settings_of(tmp_path / "run" / "run.json") == Settings(tiny_model(), CONFIG, rule)
    run, known = load_run(tmp_path / "run"), read_cohort(cohort)
    table = predict(run, known.samples["validation"], known.packed, split="validation", batch_size=8)
    assert run.threshold == pytest.approx(
        choose_threshold(table["label"], table["probability"], rule).threshold
    )


@pytest.mark.parametrize("rule", [Rule("stated"), Rule("max_f1", level="patient")])
def test_a_rule_that_chooses_no_threshold_for_vertebrae_is_refused(cohort, tmp_path, rule):
    with pytest.raises(ValueError, match=r"rule of a training chooses a threshold for vertebrae; found '"):
        train(cohort, tmp_path / "run", model=tiny_model(), config=CONFIG, rule=rule)
    assert not (tmp_path / "run").exists()


def test_a_run_without_a_qualifying_threshold_says_so(cohort, tmp_path, monkeypatch):
    fake_epochs(monkeypatch, [0.0, 0.0], [0.4, 0.3])
    history = train(cohort, tmp_path / "run", model=tiny_model(), config=CONFIG)
    assert history["threshold"].isna().all()
    assert read_record(tmp_path / "run")["decision"]["threshold"] is None
    assert read_record(tmp_path / "run")["best_epoch"] == 1


def test_a_loss_that_is_no_number_stops_with_advice_and_keeps_the_last_good_epoch(
    cohort, tmp_path, monkeypatch
):
    fake_epochs(monkeypatch, [0.5, 0.6], losses=[1.0, math.nan])
    with pytest.raises(ValueError, match=r"loss of epoch 2 \(sequences\) is nan. Lower the learning rate"):
        train(cohort, tmp_path / "run", model=tiny_model(), config=CONFIG)
    assert len(pd.read_csv(tmp_path / "run" / "history.csv")) == 1


def test_unusable_sequences_stop_training_before_anything_is_written(tmp_path):
    cohort = make_toy_cohort(tmp_path / "toy")
    samples = read_cohort(cohort).samples
    for name, vertebra in (("train", "C2"), ("validation", "C7")):
        sequence_path(cohort / "packed", samples[name][UID].iloc[0], vertebra).unlink()
    with pytest.raises(ValueError, match=r"2 of 56 .*_2.npy \(missing\); .*_7.npy \(missing\)"):
        train(cohort, tmp_path / "run", model=tiny_model(), config=CONFIG)
    assert not (tmp_path / "run").exists()


def test_an_edited_split_stops_training(tmp_path):
    cohort = make_toy_cohort(tmp_path / "toy")
    path = cohort / "split.csv"
    path.write_text(path.read_text().replace("test", "train", 1))
    with pytest.raises(ValueError, match="SHA-256"):
        train(cohort, tmp_path / "run", model=tiny_model(), config=CONFIG)


def test_a_split_with_one_class_stops_training(tmp_path):
    cohort = make_toy_cohort(tmp_path / "toy")
    table = read_labels(cohort / "train.csv")
    held_out = table[UID].isin(read_cohort(cohort).samples["validation"][UID])
    table.loc[held_out, table.columns[1:]] = 0
    write_labels(table, cohort / "train.csv")
    with pytest.raises(ValueError, match=r"Split 'validation' holds 0 fractured of 14"):
        train(cohort, tmp_path / "run", model=tiny_model(), config=CONFIG)


def test_unusable_studies_are_skipped_when_asked_and_counted(tmp_path):
    cohort = make_toy_cohort(tmp_path / "toy")
    samples = read_cohort(cohort).samples
    lost, torn = (samples[name][UID].iloc[0] for name in ("train", "validation"))
    sequence_path(cohort / "packed", lost, "C2").unlink()
    path = sequence_path(cohort / "packed", torn, "C7")
    path.write_bytes(path.read_bytes()[:-1])
    history = train(
        cohort, tmp_path / "run", model=tiny_model(), config=CONFIG, skip_unusable=True, resume=True
    )
    assert len(history) == 2
    left_out = read_record(tmp_path / "run")["left_out"]
    assert left_out["train"] == {lost: ["C2: missing"]}
    assert list(left_out["validation"]) == [torn]
    assert "truncated" in left_out["validation"][torn][0]


@pytest.mark.slow
def test_gradient_checkpointing_changes_nothing_but_memory_and_time(run, cohort, tmp_path):
    _, history = run
    again = train(
        cohort, tmp_path / "run", model=tiny_model(), config=replace(CONFIG, gradient_checkpointing=True)
    )
    again, history = (each.drop(columns="seconds") for each in (again, history))
    pd.testing.assert_frame_equal(again, history, rtol=1e-5)


@pytest.mark.slow
def test_the_stored_decision_holds_for_inference_after_training_in_bf16(cohort, tmp_path, own_accelerator):
    config = replace(CONFIG, epochs=1, warmup_epochs=0.5, mixed_precision="bf16")
    train(cohort, tmp_path / "run", model=tiny_model(), config=config)
    run, known = load_run(tmp_path / "run"), read_cohort(cohort)
    again = predict(run, known.samples["validation"], known.packed, split="validation", batch_size=8)
    decision = choose_threshold(again["label"], again["probability"], RULE)
    assert (run.threshold is None) == (decision.threshold is None)
    if run.threshold is not None:
        assert run.threshold == pytest.approx(decision.threshold, abs=1e-6)
    assert run.record["metrics"]["validation"]["recall"] == decision.recall
    found = auroc(again["label"], again["probability"])
    assert run.record["metrics"]["validation"]["auroc"] == pytest.approx(found, abs=1e-9)


def test_a_run_of_before_there_was_a_choice_kept_the_best_epoch(cohort, run, tmp_path):
    folder = shutil.copytree(run[0], tmp_path / "run")
    record = read_record(folder)
    assert record["train"].pop("keep") == "best"
    write_record(folder, record)
    again = train(cohort, folder, model=tiny_model(), config=CONFIG, resume=True)
    pd.testing.assert_frame_equal(again, run[1], check_dtype=False)
    with pytest.raises(ValueError, match=r"another setting: train\.keep is 'best', not 'last'\."):
        train(cohort, folder, model=tiny_model(), config=replace(CONFIG, keep="last"), resume=True)


def test_what_needs_no_gradient_at_the_beginning_never_gets_one(cohort, tmp_path, monkeypatch):
    class Partly(FractureClassifier):
        def __init__(self, config, **options):
            super().__init__(config, **options)
            self.backbone.conv_stem.requires_grad_(False)

    monkeypatch.setattr(sequence_task, "FractureClassifier", Partly)
    config = replace(CONFIG, freeze_epochs=1, keep="last")
    train(cohort, tmp_path / "run", model=tiny_model(), config=config)
    torch.manual_seed(config.seed)
    before, after = Partly(tiny_model()).state_dict(), load_file(tmp_path / "run" / "model.safetensors")
    moved = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert "backbone.conv_stem.weight" not in moved
    assert "backbone.blocks.0.0.conv.weight" in moved


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA device trains it")
def test_a_run_trained_on_a_gpu_says_the_same_on_a_cpu(cohort, tmp_path, monkeypatch, own_accelerator):
    monkeypatch.delenv("ACCELERATE_USE_CPU")
    history = train(cohort, tmp_path / "run", model=tiny_model(), config=CONFIG)
    run, known = load_run(tmp_path / "run"), read_cohort(cohort)
    assert run.record["device"] == "cuda"
    table = predict(run, known.samples["validation"], known.packed, split="validation", batch_size=8)
    best = history.set_index("epoch").loc[run.record["best_epoch"]]
    assert auroc(table["label"], table["probability"]) == pytest.approx(best["validation_auroc"], abs=1e-3)


def finished(folder, says):
    """What `beside` takes for a run with its predictions."""
    folder.mkdir(exist_ok=True)
    for name in ("run.json", "predictions.csv"):
        (folder / name).write_text(says)


def in_block(standing, *names, fail=None):
    """A block of `beside` that leaves these files, or fails."""
    with beside(standing) as folder:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for name in names:
            (folder / name).write_text("new")
        if fail:
            raise fail
        return folder


def test_a_new_run_replaces_an_earlier_one_only_when_it_can_be_used(tmp_path):
    standing = tmp_path / "run"
    finished(standing, "old")
    whole = ("run.json", "predictions.csv")
    with pytest.raises(OSError, match="full"):
        in_block(standing, *whole, fail=OSError("full"))
    for names in (["run.json"], ["predictions.csv"], [*whole, "state.safetensors"]):
        with pytest.raises(ValueError, match=r"run-training holds no predictions of a trained run"):
            in_block(standing, *names)
    assert (standing / "run.json").read_text() == "old"
    assert in_block(standing, *whole) == tmp_path / "run-training"
    assert (standing / "run.json").read_text() == "new"
    assert (tmp_path / "run-previous-1" / "run.json").read_text() == "old"
    assert {path.name for path in tmp_path.iterdir()} == {"run", "run-previous-1"}


def test_without_a_finished_run_the_training_is_in_its_folder(tmp_path):
    standing = tmp_path / "run"
    with beside(standing) as folder:
        assert folder == standing
        finished(folder, "first")
    (standing / "state.safetensors").touch()  # a training that stopped there
    with beside(standing) as folder:
        assert folder == standing
        (folder / "state.safetensors").unlink()
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_training_beside_a_run_that_has_gone_takes_its_name(tmp_path):
    finished(tmp_path / "run-training", "new")
    with beside(tmp_path / "run") as folder:
        assert folder == tmp_path / "run-training"
    assert (tmp_path / "run" / "run.json").read_text() == "new"


def test_a_second_training_of_a_run_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "_PATIENCE_S", 0)
    finished(tmp_path / "run", "old")
    with (
        pytest.raises(ValueError, match="no predictions"),
        beside(tmp_path / "run"),
        pytest.raises(BlockingIOError, match="another process is training run"),
        beside(tmp_path / "run"),
    ):
        pytest.fail("two trainings of one run")


@pytest.mark.slow
def test_the_progress_is_that_of_the_whole_training(cohort, tmp_path, monkeypatch):
    bars = []

    class Bar(stages.tqdm):
        def __init__(self, **options):
            super().__init__(**options | {"file": io.StringIO()})
            bars.append((self, [self.n]))

        def update(self, n=1):
            super().update(n)
            bars[-1][1].append(self.n)

    monkeypatch.setattr(stages, "tqdm", Bar)
    config = replace(CONFIG, slice_epochs=2)
    step, passed = torch.optim.AdamW.step, []

    def stop_once(optimizer, *arguments, **options):
        passed.append(1)
        if (tmp_path / "run" / "run.json").exists() and "stopped" not in passed:
            passed.append("stopped")
            raise KeyboardInterrupt
        return step(optimizer, *arguments, **options)

    monkeypatch.setattr(torch.optim.AdamW, "step", stop_once)
    with pytest.raises(KeyboardInterrupt):
        train(cohort, tmp_path / "run", model=tiny_model(), config=config)
    train(cohort, tmp_path / "run", model=tiny_model(), config=config, resume=True)
    (stopped, reached), (resumed, rest) = bars
    assert stopped.total == resumed.total
    assert reached == sorted(reached)
    assert reached[0] == 0
    assert rest[0] == reached[-1]  # at the end of the first of two epochs of sequences
    assert rest[-1] == pytest.approx(resumed.total)
    assert "left" in stopped.bar_format
    assert resumed.desc.startswith("sequences, epoch 2 of 2")
