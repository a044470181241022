"""Commands of training: of radiographs, and of settings; a run of CT is trained in `test_main`."""

import json

import pytest
from radiograph_folders import radiograph_cohort
from toy_cohort import make_toy_cohort

from cspine_helpers.radiographs.packing import ImagePackConfig, pack_images
from cspine_helpers.radiographs.task import radiograph_guide, radiograph_preset, radiograph_settings_of
from cspine_helpers.runs import read_record
from cspine_helpers.training.settings import guide, preset, settings_of

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_settings_of_a_preset_are_printed_as_a_file_that_train_takes(tmp_path, command):
    status, out, _ = command(tmp_path, "settings", "--json", "--cohort", "rsna2022")
    assert status == 0
    (tmp_path / "mine.json").write_text(out)
    assert settings_of(tmp_path / "mine.json", cohort="builtin") == preset("rsna2022")
    assert command(tmp_path, "settings") == (0, f"{guide()}\n{radiograph_guide()}", "")
    (limbs := tmp_path / "data" / "limbs").mkdir(parents=True)
    (limbs / "images.csv").touch()
    status, out, _ = command(tmp_path, "settings", "--json", "--cohort", "limbs")
    assert (status, out) == (0, radiograph_preset().text())
    status, out, _ = command(tmp_path, "settings", "--json", "--preset", "resnet50")
    (tmp_path / "mine.json").write_text(out)
    assert radiograph_settings_of(tmp_path / "mine.json") == radiograph_preset("resnet50")


def test_a_cohort_of_radiographs_is_trained_as_such(tmp_path, command):
    cohort = radiograph_cohort(tmp_path / "made")
    (tmp_path / "data").mkdir()
    pack_images(cohort.rename(tmp_path / "data" / "limbs"), ImagePackConfig(long=64, short=32))
    settings = {"model": {"long": 64, "short": 32}, "train": {"epochs": 1, "warmup_epochs": 0, "workers": 0}}
    (tmp_path / "mine.json").write_text(json.dumps(settings))
    train = ("train", "--cohort", "limbs", "--settings", str(tmp_path / "mine.json"), "--preset")
    status, out, err = command(tmp_path, *train, "simple_cnn")
    assert (status, "validation_auroc" in out) == (0, True), err
    record = read_record(tmp_path / "checkpoints" / "limbs")
    assert (record["task"], record["model"]["architecture"]) == ("radiographs", "simple_cnn")
    for wrong, said in (
        (("--folds", "3"), "--folds is for cohorts of CT; limbs holds radiographs"),
        (("--skip-unusable",), "--skip-unusable is for cohorts of CT"),
        (("--run", "x", "--preset", "none"), "Named settings of radiographs are"),
    ):
        status, _, err = command(tmp_path, *train, "simple_cnn", *wrong)
        assert status == 100
        assert said in err
    make_toy_cohort(tmp_path / "data" / "toy")
    status, _, err = command(tmp_path, "train", "--cohort", "toy", "--preset", "resnet50")
    assert (status, "--preset is for radiographs; toy holds none" in err) == (100, True)
