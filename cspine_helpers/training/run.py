"""Training: from a cohort's folder to a run's folder, through Accelerate on whatever devices are there.

python -m cspine_helpers train --cohort builtin --run mine
accelerate launch --num_processes 4 -m cspine_helpers train --cohort rsna2022 --run mine --resume
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import parse_flag_from_env

from cspine_helpers.cohort import Cohort, read_cohort
from cspine_helpers.files import paths
from cspine_helpers.files.paths import listing
from cspine_helpers.files.records import differences
from cspine_helpers.model.classifier import ModelConfig
from cspine_helpers.runs import HISTORY, RECORD, WEIGHTS, read_history, read_record
from cspine_helpers.training.config import TrainConfig
from cspine_helpers.training.sequence_task import SequenceTask
from cspine_helpers.training.state import STATE, TrainingState, read_state
from cspine_helpers.training.trainer import Training

TRAINING_SPLITS = ("train", "validation")  # the only ones a training looks at
_FILES = (RECORD, HISTORY, f"{WEIGHTS}.safetensors", STATE)
_LATER = (
    "predictions.csv",
    "decision.json",
    "test_openings.csv",
    "calibrated.csv",
)  # made with a run, or brought


def set_aside(run_folder: str | Path) -> Path | None:
    """Rename a run's folder to the first free `<run>-previous-<n>`, so that a new run can take its name.

    A folder that holds nothing but predictions, or a decision on them, is set aside as well.

    Returns:
        Where it is now; None where there was none of these.
    """
    folder = Path(run_folder)
    if not _held(folder, (*_FILES, *_LATER)):
        return None
    return folder.rename(paths.next_previous_dir(folder))


def interrupted(run_folder: str | Path) -> bool:
    """Whether a training stopped there before its end, so that `train(..., resume=True)` goes on with it."""
    return (Path(run_folder) / STATE).is_file()


class Interrupted(KeyboardInterrupt):
    """A training that somebody stopped; says what is kept. A notebook shows that instead of a traceback."""

    def _render_traceback_(self) -> list[str]:  # IPython asks for it
        return [str(self)]


@contextmanager
def beside(run_folder: str | Path) -> Iterator[Path]:
    """Train a new run while an earlier one stands; it takes its place once it can be used.

    The block trains and predicts in the folder that it is given. When it ends well, that folder becomes
    `run_folder`, and the earlier run `<run>-previous-<n>`. Until then, however the block ends, the earlier
    run stays as it is, and the same block continues with what was trained.

    Yields:
        `<run>-training`; or `run_folder` itself, where no finished run stands there.

    Raises:
        BlockingIOError: another process is in such a block.
        Interrupted: by the keyboard, or Jupyter's stop button.
        ValueError: the block ended without predictions of a trained run.

    Example:
        >>> with beside(run_folder) as folder:
        ...     train(cohort.folder, folder, model=model, config=config, resume=True)
        ...     predict_cohort(load_run(folder), cohort, folder / "predictions.csv", replace=True)
    """
    standing = Path(run_folder)
    staged = paths.staging_dir(standing)
    with paths.exclusive(standing.with_name(f".{staged.name}.lock"), f"training {standing.name}"):
        folder = staged if staged.is_dir() or _finished(standing) else standing
        try:
            yield folder
        except KeyboardInterrupt:
            raise Interrupted(_kept(folder, standing)) from None
        if not (_finished(folder) and (folder / RECORD).is_file()):
            raise ValueError(
                f"{folder} holds no predictions of a trained run. Train and predict in the block."
            )
        if folder == staged and standing.exists():
            staged.rename(earlier := paths.next_previous_dir(standing))  # a stop here leaves two whole runs
            paths.exchange(earlier, standing)
        elif folder == staged:
            staged.rename(standing)


def _finished(folder: Path) -> bool:
    """Whether predictions stand there, and no training is going on."""
    return (folder / "predictions.csv").is_file() and not interrupted(folder)


def _kept(folder: Path, standing: Path) -> str:
    """What a stopped training leaves, in one or two sentences."""
    if _held(folder):
        said = f"Stopped. What was trained is kept in {folder.name}; the same cell or call continues with it."
    else:
        said = "Stopped before an epoch was complete: nothing of the new training is kept."
    return said if folder == standing else f"{said} The run {standing.name} is as it was."


def _held(folder: Path, names: tuple[str, ...] = _FILES) -> list[str]:
    return [name for name in names if (folder / name).exists()]


def train(
    cohort_folder: str | Path,
    run_folder: str | Path,
    *,
    model: ModelConfig,
    config: TrainConfig,
    resume: bool = False,
    leave_out_unusable: bool = False,
) -> pd.DataFrame:
    """Train on a cohort's training split, and keep the epoch that is best on its validation split.

    After every epoch of sequences the run folder holds the history, the best epoch's weights
    (`model.safetensors`), the record (`run.json`) and, until training ends, its state (`state.safetensors`);
    in the pretraining of slices before that, the state only. Stopped at any moment, it
    is resumed from the last complete epoch, and ends with the same history and weights, bit for bit on a
    CPU. Seeds torch's global generator.

    Args:
        cohort_folder: holds `train.csv`, `split.csv` and `packed/`.
        run_folder: where the run goes.
        model: what to train.
        config: how to train it.
        resume: go on with the training that was stopped there; begin where there is none; do nothing where
            the same training has ended.
        leave_out_unusable: train without the studies whose packed sequences cannot be used, and name them
            under "left_out" in the record; else they are an error.

    Returns:
        One row an epoch: epoch (from 1), train_loss, validation_loss, validation_recall,
        validation_precision, validation_average_precision, validation_auroc, threshold (NaN where no
        threshold keeps the precision floor; recall and precision are 0 then), learning_rate (of the epoch's
        last step). Recall and precision are at the threshold.

    Raises:
        FileExistsError: the run folder holds a run, and `resume` is not set, or predictions or a decision
            without one; nothing is ever overwritten.
        FileNotFoundError: the cohort lacks labels or split.
        BlockingIOError: another process trains in this folder.
        ValueError: an input breaks its schema, packed sequences cannot be used (ten are named), a split lacks
            a class, the loss is no longer a finite number, or what is to be resumed has another
            setting (names each difference).
    """
    folder = Path(run_folder)
    own = _held(folder)
    held = own if own and not resume else [] if own else _held(folder, _LATER)
    if held:
        raise FileExistsError(
            f"{folder} holds a run already, or what was made with one ({listing(held)}). Train into another "
            "folder, move it aside with training.set_aside(...), or, where a training stopped, go on with it "
            "by resume=True."
        )
    cohort, left_out = read_cohort(cohort_folder).usable(
        slices=model.slices, size=model.size, splits=TRAINING_SPLITS, leave_out=leave_out_unusable
    )
    _check_classes(cohort)
    accelerator = _accelerator(config)
    setting = {
        "model": asdict(model),
        "train": asdict(config),
        "data": cohort.fingerprint(),
        "processes": accelerator.num_processes,
        "device": accelerator.device.type,
        "mixed_precision": accelerator.mixed_precision,
        "left_out": left_out,
    }
    setting = json.loads(json.dumps(setting))  # as it will be read again: lists for tuples
    writes = accelerator.is_main_process
    alone = paths.exclusive(folder / ".lock", f"training in {folder}") if writes else nullcontext()
    with alone:
        state, tensors = TrainingState(setting), None
        ended = None
        if interrupted(folder):
            state, tensors = read_state(folder)
            _check_same(setting, state.setting, folder)
        elif _held(folder):
            _check_same(setting, read_record(folder), folder)
            ended = read_history(folder)
        accelerator.wait_for_everyone()  # until all processes have read what the first one may now write
        if ended is not None:
            return ended
        for name in _FILES if writes else ():
            paths.remove_unfinished(folder / name)
        task = SequenceTask(cohort, model, config, accelerator)
        return Training(accelerator, task, folder, state).run(tensors)


def _check_classes(cohort: Cohort) -> None:
    for name in TRAINING_SPLITS:
        samples = cohort.samples[name]
        if samples["label"].nunique() < 2:
            raise ValueError(
                f"Split {name!r} holds {int(samples['label'].sum())} fractured of {len(samples)} vertebrae; "
                "training needs both kinds. Add studies, or split anew with notebook 02."
            )


def _accelerator(config: TrainConfig) -> Accelerator:
    if AcceleratorState._shared_state:  # an earlier training of this process may have had another precision
        AcceleratorState._reset_state()
    precision: str = config.mixed_precision
    if precision == "auto":
        on_gpu = torch.cuda.is_available() and not parse_flag_from_env("ACCELERATE_USE_CPU")
        has_bf16 = on_gpu and torch.cuda.is_bf16_supported(including_emulation=False)
        precision = "bf16" if has_bf16 else "no"
    return Accelerator(mixed_precision=precision)


def _check_same(setting: dict[str, Any], stored: dict[str, Any], folder: Path) -> None:
    """Refuse to resume a training of another setting; the number of workers may differ."""
    found = differences({name: stored.get(name) for name in setting}, setting)
    if differ := [line for line in found if not line.startswith("train.workers ")]:
        raise ValueError(
            f"The training in {folder} has another setting: {listing(differ, separator='; ', quoted=False)}. "
            "Resume it with its own, or move it aside with training.set_aside(...)."
        )
