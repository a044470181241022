"""Training: from a cohort's folder to a run's folder, through Accelerate on whatever devices are there.

python -m cspine_helpers train --cohort builtin --run mine
accelerate launch --num_processes 4 -m cspine_helpers train --cohort rsna2022 --run mine --resume
"""

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import is_tensorboard_available, parse_flag_from_env

from cspine_helpers.cohort import Cohort, read_cohort
from cspine_helpers.decisions.thresholds import OBJECTIVES, STATED, Rule
from cspine_helpers.files import paths
from cspine_helpers.files.paths import listing
from cspine_helpers.files.records import differences
from cspine_helpers.model.classifier import ModelConfig
from cspine_helpers.runs import ENSEMBLE, HISTORY, RECORD, STATE, WEIGHTS, read_history, read_record
from cspine_helpers.splits import FOLDS
from cspine_helpers.training.config import TrainConfig, TrainerConfig
from cspine_helpers.training.memory import fitted
from cspine_helpers.training.sequence_task import SequenceTask
from cspine_helpers.training.trainer import Task, Training, TrainingState, read_state

Config = TypeVar("Config", bound=TrainerConfig)
TRAINING_SPLITS = ("train", "validation")  # the only ones a training looks at
_FILES = (RECORD, HISTORY, f"{WEIGHTS}.safetensors", STATE)
_PREDICTIONS = "predictions.csv"
LOG = "train.log"  # what happened, for people
RULE = Rule(precision_floor=0.5)  # unless the settings name another
_LATER = (  # made with a run or with runs, or brought
    *(_PREDICTIONS, "decision.json", "triage.json", "test_openings.csv", "calibrated.csv", "masks.csv"),
    *("blend.json", ENSEMBLE, FOLDS),
)


def set_aside(run_folder: str | Path) -> Path | None:
    """Rename the folder of a run, or of predictions, to the first free `<run>-previous-<n>`.

    Returns:
        Where it is now; None where it holds neither.

    Example:
        >>> set_aside("checkpoints/mine") is None  # there is none
        True
    """
    folder = Path(run_folder)
    held = _held(folder, (*_FILES, *_LATER))
    return folder.rename(paths.next_previous_dir(folder)) if held else None


def interrupted(run_folder: str | Path) -> bool:
    """Whether a training stopped there before its end, so that `train(..., resume=True)` resumes it."""
    return (Path(run_folder) / STATE).is_file()


class Interrupted(KeyboardInterrupt):
    """Somebody stopped the training. Says what is kept; a notebook shows that instead of a traceback."""

    def _render_traceback_(self) -> list[str]:  # IPython asks for it
        return [str(self)]


@contextmanager
def beside(run_folder: str | Path) -> Iterator[Path]:
    """Train beside an earlier run, which the new one replaces once it is trained and has predictions.

    When the block ends well, its folder becomes `run_folder`, and the earlier run `<run>-previous-<n>`. If it
    ends otherwise, the earlier run stays as it is, and the same block resumes what was trained.

    Yields:
        `<run>-training`; or `run_folder` itself, where it holds no finished run.

    Raises:
        BlockingIOError: another process is in such a block.
        Interrupted: by the keyboard, or Jupyter's stop button.
        ValueError: the block ended without predictions of a trained run.

    Example:
        >>> with beside(run_folder) as folder:  # doctest: +SKIP
        ...     train(cohort_folder, folder, model=model, config=config, resume=True)
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
    """Whether a run has predictions, and its training has ended."""
    return (folder / _PREDICTIONS).is_file() and not interrupted(folder)


def _kept(folder: Path, standing: Path) -> str:
    """What a stopped training leaves, in one or two sentences."""
    said = "Stopped before an epoch was complete: nothing of the new training is kept."
    if _held(folder):
        said = f"Stopped. What was trained is kept in {folder.name}; the same cell or call continues with it."
    return said if folder == standing else f"{said} The run {standing.name} is as it was."


def _held(folder: Path, names: tuple[str, ...] = _FILES) -> list[str]:
    return [name for name in names if (folder / name).exists()]


def train(
    cohort: str | Path | Cohort,
    run_folder: str | Path,
    *,
    model: ModelConfig,
    config: TrainConfig,
    rule: Rule = RULE,
    resume: bool = False,
    skip_unusable: bool = False,
) -> pd.DataFrame:
    """Train on a cohort's training split, and keep the epoch that is best on its validation split.

    After each epoch of sequences the run folder holds history, weights of the best epoch, and record; until
    training ends, `state.safetensors`, too. A training stopped at any moment resumes from its last complete
    epoch, and ends with the same history and weights, bit for bit on a CPU. `train.log` tells people what
    happened. Seeds torch's global generator.

    Args:
        cohort: its folder, which holds `train.csv`, `split.csv` and `packed/`; or a cohort that was read.
        run_folder: where the run goes.
        model: what to train.
        config: how to train it.
        rule: chooses the threshold of each epoch on the validation split, of vertebrae; the epoch that is
            kept reaches most of its objective.
        resume: resume the training that stopped there; begin where there is none; do nothing where the same
            training has ended.
        skip_unusable: train without the studies whose packed sequences cannot be used, and name them under
            "left_out" in the record; else they are an error.

    Returns:
        The history, one row an epoch: epoch (from 1), train_loss, validation_loss, _recall, _precision,
        _average_precision, _auroc, threshold, validation_objective, _f1, train_auroc, _recall, _f1,
        validation_auroc of each vertebra, learning_rate and backbone_learning_rate (of the last step) and
        seconds. What depends on a threshold is at the one of that epoch, in the training samples, too; where
        none qualifies, validation_recall, _precision and _f1 are 0, the others NaN, as is the area of a
        vertebra of one class.

    Raises:
        FileExistsError: the folder holds a run and `resume` is not set, or predictions without a run.
        FileNotFoundError: the cohort lacks labels or split.
        BlockingIOError: another process trains in this folder.
        ValueError: an input breaks its schema, packed sequences cannot be used (ten are named), a split lacks
            a class, the loss is not finite, or what is to be resumed has other settings (names each).

    Example:
        >>> history = train(cohort_folder, "mine", model=model, config=config)  # doctest: +SKIP
    """
    # 1. Nothing is overwritten.
    folder = check_vacant(run_folder, resume=resume)
    check_rule(rule)
    # 2. The data.
    cohort = cohort if isinstance(cohort, Cohort) else read_cohort(cohort)
    cohort, left_out = cohort.usable(
        slices=model.slices, size=model.size, splits=TRAINING_SPLITS, skip_unusable=skip_unusable
    )
    check_classes(cohort)
    # 3. Train, where it has not ended.
    return train_task(
        folder,
        config,
        lambda fitting, accelerator: SequenceTask(cohort, model, fitting, rule, accelerator),
        setting={
            "model": asdict(model),
            "rule": asdict(rule),
            "data": cohort.fingerprint(),
            "left_out": left_out,
        },
        fit=lambda accelerator, earlier: fitted(config, model, accelerator, earlier),
    )


def check_vacant(run_folder: str | Path, *, resume: bool) -> Path:
    """The folder of a run that is to be trained, where that overwrites nothing.

    Raises:
        FileExistsError: it holds a run and `resume` is not set, or predictions without a run.
        ValueError: its log is a link, see `paths.check_own`.
    """
    folder = Path(run_folder)
    own = _held(folder)
    if held := _held(folder, _LATER) if not own else [] if resume else own:
        raise FileExistsError(
            f"{folder} holds a run already, or what was made with one ({listing(held)}). Train into another "
            "folder (--run), move this one away, or resume a training that stopped (--resume, resume=True)."
        )
    paths.check_own(folder / LOG)
    return folder


def check_rule(rule: Rule, *, level: str = "vertebra", units: str = "vertebrae") -> None:
    """Refuse a rule that chooses no threshold on the validation split, of single units.

    Args:
        rule: of a training.
        level: of the units; a rule that names none is at vertebra level.
        units: their name.

    Raises:
        ValueError: says what it is.
    """
    if rule.level not in ("vertebra", level) or rule.objective == STATED:
        raise ValueError(
            f"The rule of a training chooses a threshold for {units}; found {rule.objective!r} at "
            f"{rule.level} level. Leave level out, and name one of {', '.join(OBJECTIVES)}."
        )


def train_task(
    folder: Path,
    config: Config,
    make_task: Callable[[Config, Accelerator], Task],
    *,
    setting: Mapping[str, Any],
    fit: Callable[[Accelerator, Mapping[str, Any]], Config],
) -> pd.DataFrame:
    """Train whatever a task is, alone in its folder, from where it stopped; see `train`.

    Args:
        folder: of the run, vacant or to be resumed (`check_vacant`).
        config: how to train.
        make_task: config that fits the device, and the devices → the task.
        setting: what else must be the same for a training to be resumed, of plain values; "model" is one.
        fit: the devices, and the training settings of what is resumed → the config that fits them.

    Returns:
        The history; that of the run, where the same training has ended.

    Raises:
        BlockingIOError: another process trains in this folder.
        ValueError: the loss is not finite, or what is to be resumed has other settings (names each).
    """
    accelerator = _accelerator(config, folder)
    writes = accelerator.is_main_process
    alone = paths.exclusive(folder / ".lock", f"training in {folder}") if writes else nullcontext()
    with alone:
        earlier: dict[str, Any] = {}
        state, tensors, ended = None, None, None
        if interrupted(folder):
            state, tensors = read_state(folder)
            earlier = state.setting
        elif _held(folder):
            earlier, ended = read_record(folder), read_history(folder)
        config = fit(accelerator, earlier.get("train", {}))
        whole = {
            **setting,
            "train": asdict(config),
            "processes": accelerator.num_processes,
            "device": accelerator.device.type,
            "mixed_precision": accelerator.mixed_precision,
        }
        whole = json.loads(json.dumps(whole))  # as it will be read again: lists for tuples
        if earlier:
            _check_same(whole, earlier, folder, usual=asdict(type(config)()))
        accelerator.wait_for_everyone()  # until all processes have read what the first one may now write
        if ended is not None:
            return ended
        for name in _FILES if writes else ():
            paths.remove_unfinished(folder / name)
        task = make_task(config, accelerator)
        with _watched(accelerator, config, folder):
            return Training(accelerator, task, folder, state or TrainingState(whole)).run(tensors)


def check_classes(cohort: Cohort) -> None:
    """Refuse to train where a split has only fractured vertebrae, or only intact ones.

    Raises:
        ValueError: names the split.
    """
    for name in TRAINING_SPLITS:
        label = cohort.samples[name]["label"]
        if label.nunique() < 2:
            raise ValueError(
                f"Split {name!r} holds {label.sum()} fractured of {len(label)} vertebrae; training needs "
                "both kinds. Add studies, or make another split with notebook 02."
            )


def _accelerator(config: TrainerConfig, folder: Path) -> Accelerator:
    """Accelerate on the devices of this process, in the precision that the config or "auto" chooses.

    Raises:
        ValueError: the config's tracker is not installed.
    """
    if AcceleratorState._shared_state:  # an earlier training of this process may have had another precision
        AcceleratorState._reset_state()
    precision: str = config.mixed_precision
    if precision == "auto":
        on_gpu = torch.cuda.is_available() and not parse_flag_from_env("ACCELERATE_USE_CPU")
        has_bf16 = on_gpu and torch.cuda.is_bf16_supported(including_emulation=False)
        precision = "bf16" if has_bf16 else "no"
    if config.tracker == "none":
        return Accelerator(mixed_precision=precision)
    if not is_tensorboard_available():
        raise ValueError(
            f"tracker = {config.tracker!r} needs the package tensorboard, which is not installed. Install "
            "cspine-helpers[tensorboard], or set tracker to none."
        )
    return Accelerator(mixed_precision=precision, log_with=config.tracker, project_dir=folder)


@contextmanager
def _watched(accelerator: Accelerator, config: TrainerConfig, folder: Path) -> Iterator[None]:
    """A training writes its lines to `train.log`, below those of earlier ones, and to the tracker."""
    logger = logging.getLogger("cspine_helpers.training")
    lines: logging.Handler = logging.NullHandler()
    if accelerator.is_main_process:
        lines = logging.FileHandler(folder / LOG, encoding="utf-8")
    lines.setFormatter(logging.Formatter("%(asctime)s  %(message)s", "%Y-%m-%d %H:%M:%S"))
    before = logger.level
    logger.addHandler(lines)
    logger.setLevel(logging.INFO)
    if config.tracker != "none":
        accelerator.init_trackers(config.tracker)
    try:
        yield
    except BaseException as error:
        logger.error("Stopped. %s", str(error) or type(error).__name__)
        raise
    finally:
        for tracker in accelerator.trackers:  # accelerator.end_training() would end the processes' group, too
            tracker.finish()
        logger.setLevel(before)
        logger.removeHandler(lines)
        lines.close()


def _check_same(
    setting: dict[str, Any], stored: dict[str, Any], folder: Path, *, usual: dict[str, Any]
) -> None:
    """Refuse to resume a training of another setting; the number of workers and the tracker may differ.

    Settings of training that came later than what is stored have their `usual` value; an earlier version kept
    the best epoch.
    """
    usual = json.loads(json.dumps(usual))
    stored = {**stored, "train": {**usual, "keep": "best", **stored.get("train", {})}}
    found = differences({name: stored.get(name) for name in setting}, setting)
    if differ := [line for line in found if not line.startswith(("train.workers ", "train.tracker "))]:
        raise ValueError(
            f"The training in {folder} has another setting: {listing(differ, separator='; ', quoted=False)}. "
            "Resume it with its own, or move it away."
        )
