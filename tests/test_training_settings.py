import json
from dataclasses import asdict, fields, replace
from pathlib import Path

import pandas as pd
import pytest

from cspine_helpers.dataset.augment import AugmentConfig
from cspine_helpers.decisions.thresholds import Rule
from cspine_helpers.labels import TARGETS, UID
from cspine_helpers.model.classifier import ModelConfig
from cspine_helpers.radiographs.task import radiograph_guide
from cspine_helpers.runs import read_record
from cspine_helpers.splits import SplitConfig, split_config, split_patients, write_split
from cspine_helpers.training.config import TrainConfig
from cspine_helpers.training.settings import SECTIONS, Settings, guide, preset, settings_of

BUILTIN = Path(__file__).parents[1] / "checkpoints" / "builtin"


def written(folder: Path, content: object) -> Path:
    path = folder / "settings.json"
    path.write_text(json.dumps(content))
    return path


def test_presets_fit_their_cohorts():
    builtin, quick, large = map(preset, ("builtin", "quick", "rsna2022"))
    assert (builtin.model, builtin.train) == (ModelConfig.small(), TrainConfig.small())
    assert (quick.model, quick.train.epochs, quick.rule.precision_floor) == (ModelConfig.small(), 1, 0.01)
    assert large == Settings(ModelConfig.rsna(), TrainConfig.rsna(), Rule(precision_floor=0.5))
    assert (large.model.size, large.model.pretrained, large.train.pseudo_label_after) == (224, "package", 10)


def test_the_built_in_preset_is_what_the_shipped_run_was_trained_with():
    assert settings_of(BUILTIN / "run.json") == preset("builtin")
    today, record = json.loads(preset("builtin").text()), read_record(BUILTIN)
    for name in ("model", "train", "rule"):
        assert {setting: today[name][setting] for setting in record[name]} == record[name]


@pytest.mark.parametrize("cohort", ["builtin", "quick", "rsna2022"])
def test_the_text_of_settings_is_read_as_the_same_settings(tmp_path, cohort):
    settings = replace(preset(cohort), split=SplitConfig(fractions=(0.7, 0.2, 0.1), seed=4))
    train = replace(settings.train, vertebra_weights=(1, 2, 3, 4, 5, 6, 7), augment=None)
    settings = replace(settings, train=train, rule=Rule("min_cost", cost_miss=5, cost_false_alarm=1))
    (tmp_path / "settings.json").write_text(settings.text())
    assert settings_of(tmp_path / "settings.json", cohort="rsna2022") == settings


def test_what_a_file_leaves_out_is_the_presets(tmp_path):
    path = written(
        tmp_path, {"train": {"epochs": 3, "augment": {"flip": 0.0}}, "rule": {"recall_floor": 0.8}}
    )
    for cohort in ("builtin", "rsna2022"):
        base = preset(cohort)
        train = replace(base.train, epochs=3, augment=replace(base.train.augment, flip=0.0))
        rule = replace(base.rule, recall_floor=0.8)
        assert settings_of(path, cohort=cohort) == replace(base, train=train, rule=rule)
    assert settings_of(written(tmp_path, {}), cohort="quick") == preset("quick")


def test_another_objective_has_none_of_the_presets_floors(tmp_path):
    path = written(tmp_path, {"rule": {"objective": "max_f1"}})
    assert settings_of(path, cohort="builtin").rule == Rule("max_f1")


def test_a_record_of_before_a_field_was_there_is_read_as_it_was_trained(tmp_path):
    record = read_record(BUILTIN)
    del record["train"]["ema"], record["train"]["epochs"], record["rule"]
    found = settings_of(written(tmp_path, record), cohort="quick")
    assert (found.train.ema, found.train.epochs) == (TrainConfig().ema, TrainConfig().epochs)
    assert found.rule == Rule(precision_floor=0.5)


@pytest.mark.parametrize(
    ("content", "sentences"),
    [
        ({"train": {"learning_rat": 1}}, ["train: learning_rat is unknown (did you mean learning_rate?)"]),
        ({"train": {"vertebra_weighting": True}}, ["(did you mean vertebra_weights?)"]),
        ({"train": {"zzz": 1}}, ["zzz is unknown (known: epochs, batch_size,"]),
        ({"trian": {}}, ["trian is unknown (did you mean train?)"]),
        ({"train": {"backbone": "resnet18"}}, ["train: backbone belongs to model. Move it there."]),
        ({"train": {"precision_floor": 0.5}}, ["train: precision_floor belongs to rule. Move it there."]),
        ({"train": {"augment": {"flop": 1}}}, ["train.augment: flop is unknown (did you mean flip?)"]),
        ({"train": {"augment": 3}}, ["train.augment is made of names and values; found 3"]),
        ({"train": [1]}, ["train is made of names and values"]),
        (
            {
                "train": {"epochs": 0, "seeed": 1},
                "model": {"size": "big"},
                "rule": {"precision_floor": "high"},
            },
            [
                "seeed is unknown (did you mean seed?)",
                "; cannot have epochs = 0 (a whole number, 1 or more). Correct it.",
                "model cannot have size = 'big' (a whole number, 32 to 4096). Correct it.",
                "rule cannot have precision_floor = 'high' (in [0, 1], or none)",
            ],
        ),
        ({"train": {"epochs": 1, "warmup_epochs": 1.0}}, ["cannot have warmup_epochs = 1.0 in 1 epochs"]),
        ({"train": {"vertebra_weights": [1, 2]}}, ["prevalence, equal, or seven numbers above 0, C1 to C7"]),
        ({"rule": {"objective": "max_luck"}}, ["objective = 'max_luck' (one of max_recall, max_f1,"]),
        ({"rule": {"beta": 2}}, ["beta belongs to max_fbeta"]),
        ({"rule": {"aggregation": {"name": "max"}}}, ["aggregation = "]),
        (
            {"split": {"fractions": [0.5, 0.5]}},
            ["fractions = [0.5, 0.5] (three shares above 0 with the sum 1)"],
        ),
        (
            {"split": {"fractions": "all", "seed": -1}},
            ["fractions = 'all'", "seed = -1 (a whole number, 0 or"],
        ),
        ([], ["holds no settings: model, train, split, rule"]),
        (
            {"format": 9},
            ["holds settings of format 9; this version reads 1. It was written by cspine_helpers"],
        ),
    ],
)
def test_unknown_and_wrong_settings_are_named_with_what_is_allowed(tmp_path, content, sentences):
    with pytest.raises(ValueError, match=r"settings\.json") as refused:
        settings_of(written(tmp_path, content), cohort="builtin")
    for sentence in sentences:
        assert sentence in str(refused.value)


def test_a_record_of_another_version_says_so(tmp_path):
    record = read_record(BUILTIN)
    record["train"]["pixie_dust"] = 1
    with pytest.raises(ValueError, match=r"pixie_dust is unknown .* written by cspine_helpers .*; this is"):
        settings_of(written(tmp_path, record))


def test_the_split_of_a_settings_file_is_read_without_the_rest(tmp_path):
    path = written(tmp_path, {"split": {"fractions": [0.5, 0.3, 0.2]}, "train": {"epochs": 0}})
    assert split_config(path) == SplitConfig(fractions=(0.5, 0.3, 0.2))
    assert split_config(written(tmp_path, {"train": {}})) == split_config(None) == SplitConfig()
    assert split_config(BUILTIN / "run.json") == SplitConfig()
    for wrong, said in (
        ({"split": {"seeds": 1}}, "split: seeds is unknown"),
        ([1], "made of names and values"),
    ):
        with pytest.raises(ValueError, match=said):
            split_config(written(tmp_path, wrong))
    with pytest.raises(FileNotFoundError, match="No settings at nowhere"):
        split_config("nowhere")


def test_a_split_of_another_way_is_refused(tmp_path):
    labels = pd.DataFrame([[f"s{n}", *[n % 2] * 8] for n in range(20)], columns=[UID, *TARGETS])
    asked = SplitConfig(fractions=(0.5, 0.25, 0.25), seed=3)
    settings, path = replace(preset("builtin"), split=asked), tmp_path / "split.csv"
    settings.check_split(tmp_path)  # there is none yet
    write_split(split_patients(labels, **asdict(asked)), path, made_with=asdict(asked))
    settings.check_split(tmp_path)
    preset("builtin").check_split(tmp_path)
    other = replace(settings, split=replace(asked, seed=4))
    with pytest.raises(
        ValueError, match=r"'seed': 4}, but .*split.csv was made with .*'seed': 3}. Leave split out"
    ):
        other.check_split(tmp_path)
    path.with_suffix(".json").unlink()
    with pytest.raises(ValueError, match="made with something that nobody noted"):
        settings.check_split(tmp_path)


def test_the_guide_is_the_page_in_the_repository_and_names_every_setting():
    page = (BUILTIN.parents[1] / "SETTINGS.md").read_text(encoding="utf-8")
    assert page == f"{guide()}\n{radiograph_guide()}", "python -m cspine_helpers settings > SETTINGS.md"
    shown = guide().split("## ")
    for name, kind in {**SECTIONS, "train.augment": AugmentConfig}.items():
        (section,) = [part for part in shown if part.startswith(f"{name}\n")]
        rows = [line.split("|")[1:5] for line in section.splitlines() if line.startswith("| `")]
        names = [each.name for each in fields(kind) if each.name != "augment"]
        assert [row[0].strip(" `") for row in rows] == names
        assert all(cell.strip() for row in rows for cell in row)


def test_the_example_of_the_guide_is_a_settings_file(tmp_path):
    (tmp_path / "settings.json").write_text(guide().split("```json")[1].split("```")[0])
    found = settings_of(tmp_path / "settings.json", cohort="builtin")
    assert (found.train.sampling, found.train.augment.flip, found.rule) == ("weighted", 0, Rule("max_f1"))
