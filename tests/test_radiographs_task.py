import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from radiograph_folders import radiograph_cohort
from radiograph_runs import TINY
from sklearn.metrics import average_precision_score, roc_auc_score
from torch.nn import functional

from cspine_helpers.checkpoints import load_run
from cspine_helpers.labels import UID
from cspine_helpers.radiographs import mask_cases, task
from cspine_helpers.radiographs.cohort import RadiographCohort, read_radiograph_cohort
from cspine_helpers.radiographs.dataset import RadiographDataset, image_loader
from cspine_helpers.radiographs.model import RadiographConfig, RadiographModel
from cspine_helpers.radiographs.packing import ImagePackConfig, pack_images
from cspine_helpers.radiographs.task import (
    MASK_THRESHOLDS,
    PRESETS,
    RadiographTask,
    RadiographTrainConfig,
    in_turn,
    load_radiograph_run,
    radiograph_guide,
    radiograph_preset,
    radiograph_settings_of,
    train_radiographs,
)
from cspine_helpers.runs import read_history, read_record, write_record
from cspine_helpers.splits import read_split, write_split
from cspine_helpers.training import trainer
from cspine_helpers.training.config import best_epoch
from cspine_helpers.training.run import RULE, interrupted
from cspine_helpers.training.settings import inner_configs

MODEL = replace(TINY, mask_cells=20)
CONFIG = RadiographTrainConfig(epochs=3, warmup_epochs=0.5, batch_size=4, workers=0, keep="best")
HARD = replace(CONFIG, intact=0.8, hard_share=0.5, hard_after=1, hard_candidates=2)
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def cohort(tmp_path_factory) -> Path:
    folder = radiograph_cohort(tmp_path_factory.mktemp("radiographs"))
    pack_images(folder, ImagePackConfig(long=MODEL.long, short=MODEL.short))
    return folder


@pytest.fixture(scope="module")
def run(cohort) -> tuple[Path, pd.DataFrame]:
    """A run with hard images: its folder, and the history that its training returned."""
    torch.set_num_threads(1)
    folder = cohort.parent / "run"
    return folder, train_radiographs(cohort, folder, model=MODEL, config=HARD)


@pytest.fixture
def own(cohort, tmp_path) -> Path:
    """A cohort that a test may change."""
    return shutil.copytree(cohort, tmp_path / "cohort", symlinks=True)


def task_of(cohort: Path, config=CONFIG, model=MODEL) -> RadiographTask:
    return RadiographTask(read_radiograph_cohort(cohort), model, config, RULE, Accelerator(cpu=True))


def outcome(folder: Path) -> tuple:
    """What two equal trainings share."""
    record = read_record(folder)
    timed = ("seconds", "epoch_seconds", "history_sha256", "record_sha256")
    return (
        read_history(folder).drop(columns="seconds").to_csv(),
        (folder / "model.safetensors").read_bytes(),
        {name: value for name, value in record.items() if name not in timed},
    )


def test_a_training_leaves_a_run_of_radiographs_that_loads_as_it_was(cohort, run):
    folder, history = run
    record, loaded = read_record(folder), load_radiograph_run(folder)
    assert not interrupted(folder)
    pd.testing.assert_frame_equal(read_history(folder), history, check_dtype=False)
    assert record["task"] == "radiographs"
    assert (loaded.config, loaded.threshold) == (MODEL, record["decision"]["threshold"])
    assert record["decision"]["level"] == record["rule"]["level"] == "image"
    assert record["train"] == json.loads(json.dumps(asdict(HARD)))
    assert record["data"] == read_radiograph_cohort(cohort).fingerprint()
    assert record["cohort"]["packing"]["frame"] == {"long": 96, "short": 64}
    assert "annotated" not in record["cohort"]["packing"]
    assert record["cohort"]["counts"]["train"] == {
        **{"images": 16, "patients": 16},
        **{"fractured": 5, "fractured_patients": 5},
    }
    assert len(history) == 3
    with pytest.raises(
        ValueError,
        match=r"was trained on radiographs, not on sequences\. Name another run, or load it with rad",
    ):
        load_run(folder)
    builtin = Path(__file__).parents[1] / "checkpoints" / "builtin"
    with pytest.raises(
        ValueError,
        match=r"was trained on sequences, not on radiographs\. Name another run, or load it with check",
    ):
        load_radiograph_run(builtin)


def test_the_history_is_what_the_kept_network_says_of_validation(cohort, run):
    folder, history = run
    known, loaded, record = read_radiograph_cohort(cohort), load_radiograph_run(folder), read_record(folder)
    row = history.set_index("epoch").loc[record["best_epoch"]]
    data = RadiographDataset(known.of("validation"), known.packed, stride=1)
    probabilities, masks, truths = np.zeros(len(data)), {}, {}
    for batch in image_loader(data, batch_size=1):
        with torch.inference_mode():
            output = loaded.model(batch["image"])
        index = int(batch["index"])
        probabilities[index] = output.probability[0]
        size = batch["image"].shape[1:]
        full = functional.interpolate(output.mask_logit[None], size, mode="bilinear")[0, 0]
        masks[index], truths[index] = full.sigmoid().numpy(), batch["mask"][0].numpy() > 127
    assert row["validation_auroc"] == pytest.approx(roc_auc_score(data.labels, probabilities))
    assert row["validation_average_precision"] == pytest.approx(
        average_precision_score(data.labels, probabilities)
    )
    order = sorted(masks)
    dice = [
        mask_cases.dice_pos([truths[n] for n in order], [masks[n] for n in order], threshold=threshold)
        for threshold in MASK_THRESHOLDS
    ]
    assert row["validation_dice_pos"] == pytest.approx(max(dice), abs=2e-3)  # pixels at the threshold
    assert record["mask"] == {
        "threshold": pytest.approx(MASK_THRESHOLDS[int(np.argmax(dice))]),
        "dice_pos": row["validation_dice_pos"],
    }
    assert row["validation_objective"] == pytest.approx(
        row["validation_average_precision"] + row["validation_dice_pos"]
    )
    assert row["validation_objective"] == history["validation_objective"].max()


@pytest.mark.parametrize(
    "stop_after", [pytest.param(0, marks=pytest.mark.slow), 1, pytest.param(2, marks=pytest.mark.slow)]
)
def test_a_stopped_training_is_resumed_to_the_same_bytes(cohort, run, tmp_path, monkeypatch, stop_after):
    done, real = [], trainer.save_state

    def stopping(*arguments):
        if len(done) == stop_after:
            raise KeyboardInterrupt
        done.append(1)
        return real(*arguments)

    folder = tmp_path / "run"
    monkeypatch.setattr(trainer, "save_state", stopping)
    with pytest.raises(KeyboardInterrupt):
        train_radiographs(cohort, folder, model=MODEL, config=HARD)
    monkeypatch.undo()
    assert interrupted(folder) == (stop_after > 0)
    train_radiographs(cohort, folder, model=MODEL, config=HARD, resume=True)
    assert outcome(folder) == outcome(run[0])


def test_a_run_is_not_overwritten_and_other_settings_do_not_resume_it(cohort, run):
    folder, history = run
    before = outcome(folder)
    with pytest.raises(FileExistsError, match="holds a run already"):
        train_radiographs(cohort, folder, model=MODEL, config=HARD)
    again = train_radiographs(cohort, folder, model=MODEL, config=HARD, resume=True)
    pd.testing.assert_frame_equal(again, history, check_dtype=False)
    with pytest.raises(ValueError, match=r"another setting: .*train\.hard_share is 0\.5, not 0\.0"):
        train_radiographs(cohort, folder, model=MODEL, config=replace(HARD, hard_share=0.0), resume=True)
    assert outcome(folder) == before


# What an epoch shows.


@pytest.mark.parametrize(("images", "wanted"), [(10, 3), (9, 3), (4, 4), (7, 5)])
def test_images_take_turns_before_one_is_shown_again(images, wanted):
    turns = images // wanted
    for first in range(1, 3 * turns, turns):
        shown = [in_turn(images, wanted, seed=1, epoch=first + n) for n in range(turns)]
        assert [len(each) for each in shown] == [wanted] * turns
        assert len(set(np.concatenate(shown).tolist())) == turns * wanted
    rounds = [in_turn(images, wanted, seed=1, epoch=1 + turns * n).tolist() for n in range(6)]
    assert len({tuple(each) for each in rounds}) > 1


def shown(task: RadiographTask, epoch: int) -> set[int]:
    (stage,) = task.stages
    stage.before_epoch(epoch)
    batches = stage.loader().batch_sampler
    batches.set_epoch(epoch)
    found = [index for batch in batches for _, index in batch]
    assert len(found) == len(set(found)) == stage.work
    return set(found)


def test_an_epoch_shows_every_fractured_image_and_as_many_intact_ones(cohort):
    labels = read_radiograph_cohort(cohort).of("train")["label"].to_numpy()
    mine = task_of(cohort)
    epochs = [shown(mine, epoch) for epoch in (1, 2)]
    fractured, intact = set(np.flatnonzero(labels)), set(np.flatnonzero(labels == 0))
    for each in epochs:
        assert fractured < each
        assert len(each - fractured) == len(fractured)
    assert (epochs[0] & epochs[1]) == fractured  # eleven intact ones take turns, five an epoch
    assert (epochs[0] | epochs[1]) - fractured < intact


def test_an_epoch_shows_one_intact_image_at_least(cohort):
    mine = task_of(cohort, replace(CONFIG, intact=0.001))
    assert [len(shown(mine, epoch)) for epoch in (1, 2)] == [6, 6]  # five of them fractured


def metal(cohort: Path, hardware) -> RadiographCohort:
    """The cohort, with other images that have hardware: of the table's place → 0, 1 or nothing."""
    known = read_radiograph_cohort(cohort)
    values = [hardware(place, row) for place, row in enumerate(known.images.itertuples())]
    return replace(known, images=known.images.assign(hardware=pd.array(values, dtype="Int64")))


def test_without_hardware_no_image_with_metal_is_drawn_and_validation_keeps_its_own(cohort):
    known = metal(cohort, lambda place, row: int(place % 4 == 0))
    config = replace(HARD, hardware=False, hard_after=0)
    mine = RadiographTask(known, MODEL, config, RULE, Accelerator(cpu=True))
    train, names = known.of("train"), mine._seen._images.astype(str)
    drawn = {names[row] for epoch in range(1, 6) for row in shown(mine, epoch)}
    has_metal = train["hardware"] == 1
    assert 0 < train["label"][has_metal].sum() < has_metal.sum()
    assert not drawn & {*train["image"][has_metal]}
    assert {*train["image"][~has_metal & (train["label"] == 1)]} < drawn
    assert len(mine._held_out) == len(known.of("validation"))
    (row,) = np.flatnonzero(train["image"] == names[-1])  # hard images are looked for among the same
    np.testing.assert_allclose(
        mine._marks(np.array([len(names) - 1])), task_of(cohort)._marks(np.array([row])), rtol=1e-5
    )


@pytest.mark.parametrize(
    ("hardware", "said"),
    [
        (
            lambda place, row: row.label,
            r"Split 'train' holds 0 fractured of 11 images without hardware; trai",
        ),
        (lambda place, row: 1 - row.label, r"Split 'train' holds 5 fractured of 5 images without hardware"),
        (lambda place, row: None, r"of 16 of 16 training images nobody stated whether .* and 6 more\. State"),
        (
            lambda place, row: None if place == 0 else 0,
            r"of 1 of 16 training images .*: 'IMG0000000'\. State",
        ),
    ],
)
def test_what_cannot_be_trained_without_hardware_is_a_sentence(cohort, tmp_path, hardware, said):
    config = replace(CONFIG, hardware=False)
    with pytest.raises(ValueError, match=said):
        train_radiographs(metal(cohort, hardware), tmp_path / "run", model=MODEL, config=config)
    assert not (tmp_path / "run").exists()


def test_a_run_from_before_hardware_was_a_setting_is_read_and_resumed(cohort, run, tmp_path):
    folder = shutil.copytree(run[0], tmp_path / "run")
    record = read_record(folder)
    assert record["train"].pop("hardware") is True
    write_record(folder, record)
    assert load_radiograph_run(folder).config == MODEL
    assert radiograph_settings_of(folder / "run.json").train == HARD
    again = train_radiographs(cohort, folder, model=MODEL, config=HARD, resume=True)
    pd.testing.assert_frame_equal(again, run[1], check_dtype=False)
    bare = replace(HARD, hardware=False)
    with pytest.raises(ValueError, match=r"another setting: train\.hardware is True, not False\."):
        train_radiographs(cohort, folder, model=MODEL, config=bare, resume=True)


def test_hard_images_are_those_that_the_model_marks_most(cohort, monkeypatch):
    mine = task_of(cohort, HARD)
    labels = mine._seen.labels
    strength = {index: (7 * index) % 16 for index in range(len(labels))}
    asked = []

    def marks(rows):
        asked.append(rows)
        return np.array([(strength[row], row, row + 1) for row in rows], float)

    monkeypatch.setattr(mine, "_marks", marks)
    assert len(shown(mine, 1)) == 9  # five fractured, four intact
    assert not asked  # the first epoch has none
    chosen = {index for index in shown(mine, 2) if labels[index] == 0}
    (candidates,) = asked
    assert len(candidates) == 4  # two for each of two
    assert (labels[candidates] == 0).all()
    hardest = sorted(candidates, key=lambda row: -strength[row])[:2]
    assert set(hardest) == chosen & set(candidates)
    assert len(chosen) == 4
    focus = mine._seen.focus.numpy()  # patches of the hard images are cut out where they are marked
    assert {row: tuple(at) for row, at in enumerate(focus) if not np.isnan(at).any()} == {
        row: (row, row + 1) for row in hardest
    }


def test_marks_are_of_the_rows_that_were_asked_for(cohort):
    mine, rows = task_of(cohort), np.array([9, 2, 11, 4])
    together, whole = mine._marks(rows), mine._whole(read_radiograph_cohort(cohort).of("train"))
    assert len(set(together[:, 0].round(9))) == 4
    for row, mark in zip(rows, together, strict=True):
        np.testing.assert_allclose(mine._marks(np.array([row]))[0], mark, rtol=1e-5)
        logit = mine.model.eval()(whole[int(row)]["image"][None]).mask_logit[0]
        x, y = mark[1:]
        assert logit[int(y // 4), int(x // 4)] == logit.max()


def test_patches_are_trained_on_and_whole_images_validated(cohort, tmp_path, monkeypatch):
    shapes, real = set(), RadiographModel.forward

    def watched(model, images):
        shapes.add((model.training, *images.shape[1:]))
        return real(model, images)

    monkeypatch.setattr(RadiographModel, "forward", watched)
    config = replace(CONFIG, epochs=1, warmup_epochs=0, patch=32)
    history = train_radiographs(cohort, tmp_path / "run", model=MODEL, config=config)
    assert shapes == {(True, 32, 32), (False, 96, 64), (False, 64, 96)}
    assert history["validation_auroc"].notna().all()


def test_a_classifier_has_no_dice_and_its_last_epoch_is_kept_where_that_is_asked(
    cohort, tmp_path, monkeypatch
):
    falling = iter([0.9, 0.1])
    monkeypatch.setattr(task, "average_precision", lambda *_: next(falling))
    model = replace(MODEL, architecture="classifier")
    config = replace(HARD, epochs=2, warmup_epochs=0, keep="last", patience=1)
    history = train_radiographs(cohort, tmp_path / "run", model=model, config=config)
    record = read_record(tmp_path / "run")
    assert read_history(tmp_path / "run")["validation_dice_pos"].isna().all()
    assert record["mask"] is None
    assert history["validation_objective"].tolist() == [0.9, 0.1]
    assert (best_epoch(history), record["best_epoch"]) == (1, 2)


def test_fractures_that_nobody_outlined_teach_presence_and_have_no_dice(own, tmp_path):
    annotations = json.loads((own / "annotations.json").read_text())
    (own / "annotations.json").write_text(json.dumps(annotations | {"annotations": []}))
    pack_images(own, ImagePackConfig(long=MODEL.long, short=MODEL.short))
    config = replace(CONFIG, epochs=1, warmup_epochs=0)
    history = train_radiographs(own, tmp_path / "run", model=MODEL, config=config)
    (row,) = history.to_dict("records")
    assert np.isnan(row["validation_dice_pos"])
    assert np.isfinite([row["train_loss"], row["validation_loss"], row["validation_objective"]]).all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA device trains it")
def test_a_run_trained_on_a_gpu_says_the_same_on_a_cpu(cohort, tmp_path, monkeypatch):
    monkeypatch.delenv("ACCELERATE_USE_CPU")
    AcceleratorState._reset_state(reset_partial_state=True)
    history = train_radiographs(cohort, tmp_path / "run", model=MODEL, config=HARD)
    AcceleratorState._reset_state(reset_partial_state=True)
    loaded, known = load_radiograph_run(tmp_path / "run"), read_radiograph_cohort(cohort)
    assert loaded.record["device"] == "cuda"
    best = history.set_index("epoch").loc[loaded.record["best_epoch"]]
    mine = task_of(cohort).predict(loaded.model, "validation")
    labels = known.of("validation")["label"]
    assert roc_auc_score(labels, mine.probability) == pytest.approx(best["validation_auroc"], abs=1e-3)
    assert mine.dice_pos().max() == pytest.approx(best["validation_dice_pos"], abs=1e-2)


# What is refused, before anything is written.


def test_what_cannot_be_trained_is_refused_in_a_sentence(own, tmp_path):
    folder, settings = tmp_path / "run", {"model": MODEL, "config": CONFIG}
    with pytest.raises(
        ValueError, match=r"a threshold for images; found 'max_recall' at patient level\. Leave"
    ):
        train_radiographs(own, folder, **settings, rule=replace(RULE, level="patient"))
    with pytest.raises(ValueError, match=r"frames of 96 × 64 pixels, the model is for 128 × 64\. Pack"):
        train_radiographs(own, folder, model=replace(MODEL, long=128), config=CONFIG)
    table, split = read_radiograph_cohort(own).images, read_split(own / "split.csv").set_index(UID)
    for path in own.glob("split.csv*"):
        path.unlink()
    split.loc[table["image"][(table["label"] == 1) & (table["split"] == "validation")], "split"] = "test"
    write_split(split.reset_index(), own / "split.csv")
    with pytest.raises(
        ValueError, match=r"Split 'validation' holds 0 fractured of \d images; training needs"
    ):
        train_radiographs(own, folder, **settings)
    shutil.rmtree(own / "packed")
    with pytest.raises(FileNotFoundError, match="No packed radiographs"):
        train_radiographs(own, folder, **settings)
    (own / "split.csv").unlink()
    with pytest.raises(FileNotFoundError, match=r"No split\.csv in"):
        train_radiographs(own, folder, **settings)
    assert not folder.exists()


@pytest.mark.parametrize(
    "wrong", [{"intact": 0.0}, {"hard_share": 1.1}, {"hard_after": -1}, {"hard_candidates": 0}, {"patch": 8}]
)
def test_impossible_settings_are_named(wrong):
    (name,) = wrong
    with pytest.raises(ValueError, match=f"RadiographTrainConfig cannot have {name} = "):
        RadiographTrainConfig(**wrong)


# Settings.


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_read_back_from_its_text_and_its_network_builds(name, tmp_path):
    settings = radiograph_preset(name)
    (tmp_path / "settings.json").write_text(settings.text())
    assert radiograph_settings_of(tmp_path / "settings.json", preset="fracatlas") == settings
    (tmp_path / "named.json").write_text(json.dumps({"preset": name, "train": {"epochs": 7, "seed": 3}}))
    found = radiograph_settings_of(tmp_path / "named.json")
    assert found == replace(settings, train=replace(settings.train, epochs=7, seed=3))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"preset": "resnet"}, r"Named settings of radiographs are .*; found 'resnet'\. Choose one\."),
        ({"train": {"seeed": 1}}, r"train: seeed is unknown \(did you mean seed\?\)"),
        ({"train": {"loss": {"pixxels": 1}}}, r"train\.loss: pixxels is unknown \(did you mean pixels\?\)"),
        ({"train": {"augment": {"flop": 1}}}, r"train\.augment: flop is unknown \(did you mean flip\?\)"),
        ({"train": {"backbone": "x"}}, r"train: backbone belongs to model\. Move it there\."),
        ({"weights_sha256": "", "model": {}}, r"was trained on sequences, not on radiographs"),
    ],
)
def test_unknown_settings_are_named(content, said, tmp_path):
    (tmp_path / "settings.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=said):
        radiograph_settings_of(tmp_path / "settings.json")


def test_a_record_is_a_settings_file(run):
    found = radiograph_settings_of(run[0] / "run.json")
    assert (found.model, found.train, found.rule) == (MODEL, HARD, radiograph_preset().rule)


def test_the_guide_has_a_row_for_every_setting_and_names_every_preset():
    page = radiograph_guide()
    for kind in (
        RadiographConfig,
        RadiographTrainConfig,
        *inner_configs(RadiographTrainConfig).values(),
    ):
        for name in kind.__dataclass_fields__:
            assert name in ("loss", "augment") or f"| `{name}` |" in page
    assert all(f"`{name}`" in page for name in PRESETS)
