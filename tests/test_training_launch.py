"""Two processes through `accelerate launch`: each sample once, the losses of one process, one writer."""

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from radiograph_folders import radiograph_cohort
from safetensors.torch import load_file
from toy_cohort import make_toy_cohort, tiny_model

from cspine_helpers.checkpoints import load_run
from cspine_helpers.radiographs.model import RadiographConfig
from cspine_helpers.radiographs.packing import ImagePackConfig, pack_images
from cspine_helpers.radiographs.task import RadiographTrainConfig, load_radiograph_run
from cspine_helpers.runs import read_history, read_record
from cspine_helpers.training.config import TrainConfig, TrainerConfig

pytestmark = pytest.mark.slow
CONFIG = TrainConfig(
    epochs=2,
    batch_size=4,
    learning_rate=4e-3,
    accumulate=1,
    slice_epochs=2,
    slice_batch_size=8,
    freeze_epochs=3,  # so that each process meets a frozen backbone, and its unfreezing
    backbone_rate=0.5,
    ema=0.9,
    workers=0,
    vertebra_weights="equal",
)
ALONE = [sys.executable]
TWO = [*ALONE, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
TWO += [
    "--num_machines",
    "1",
    "--mixed_precision",
    "no",
    "--dynamo_backend",
    "no",
    "--main_process_port",
    "0",
]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("project")
    make_toy_cohort(folder / "data" / "toy")
    return folder


def launch(
    root: Path,
    command: list[str],
    run: str,
    config: TrainerConfig,
    *options: str,
    cohort: str = "toy",
    model: Any = None,
) -> str:
    """Train from the command line; returns what it wrote to both streams."""
    settings = root / f"{run}.json"
    settings.write_text(json.dumps({"model": asdict(model or tiny_model()), "train": asdict(config)}))
    environment = {**os.environ, "CSPINE_ROOT": str(root), "OMP_NUM_THREADS": "1"}
    environment |= {"ACCELERATE_USE_CPU": "true"}  # with --multi_gpu: two processes of the CPU, over gloo
    arguments = [
        "-m",
        "cspine_helpers",
        "train",
        "--cohort",
        cohort,
        "--run",
        run,
        "--settings",
        str(settings),
    ]
    done = subprocess.run(
        [*command, *arguments, *options],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def runs(root):
    """One process that accumulates two batches a step, and two processes with a batch each."""
    launch(root, ALONE, "one", replace(CONFIG, accumulate=2))
    launch(root, TWO, "two", CONFIG)
    return root / "checkpoints" / "one", root / "checkpoints" / "two"


def test_two_processes_train_as_one_with_the_same_global_batch(runs):
    one, two = (read_history(folder) for folder in runs)
    assert list(one["epoch"]) == list(two["epoch"]) == [1, 2]
    np.testing.assert_allclose(
        *(table.drop(columns=["epoch", "seconds"]).to_numpy(float) for table in (two, one)), rtol=1e-4
    )
    losses = [read_record(folder)["slice_losses"] for folder in runs]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
    weights = [load_file(folder / "model.safetensors") for folder in runs]
    for name, value in weights[0].items():
        if not name.endswith("num_batches_tracked"):
            np.testing.assert_allclose(weights[1][name], value, rtol=1e-3, atol=1e-5, err_msg=name)


def test_a_launched_run_is_a_run_like_any_other(runs):
    record = load_run(runs[1]).record
    assert record["processes"] == 2
    assert sorted(path.name for path in runs[1].iterdir()) == [
        "history.csv",
        "model.safetensors",
        "run.json",
        "train.log",
    ]


def test_the_command_can_be_given_again_after_the_end(root, runs):
    before = (runs[0] / "run.json").read_bytes()
    printed = launch(root, ALONE, "one", replace(CONFIG, accumulate=2), "--resume")
    assert "validation_recall" in printed
    assert (runs[0] / "run.json").read_bytes() == before


def test_two_processes_train_on_radiographs_as_one(tmp_path):
    made = radiograph_cohort(tmp_path / "made")
    (tmp_path / "data").mkdir()
    pack_images(made.rename(tmp_path / "data" / "limbs"), ImagePackConfig(long=64, short=32))
    size = {"long": 64, "short": 32, "decoder_channels": (8, 8, 8, 8)}
    model = RadiographConfig(backbone="mobilenetv3_small_050", pretrained=None, frozen_blocks=0, **size)
    hard = {"hard_share": 0.5, "hard_after": 1}
    config = RadiographTrainConfig(epochs=2, batch_size=3, warmup_epochs=0, workers=0, **hard)
    given: Any = {"cohort": "limbs", "model": model}
    launch(tmp_path, ALONE, "one", replace(config, accumulate=2), **given)
    launch(tmp_path, TWO, "two", config, **given)
    one, two = (tmp_path / "checkpoints" / name for name in ("one", "two"))
    tables = (read_history(folder).drop(columns=["epoch", "seconds"]) for folder in (two, one))
    np.testing.assert_allclose(*(table.to_numpy(float) for table in tables), rtol=1e-3)
    assert load_radiograph_run(two).record["processes"] == 2
