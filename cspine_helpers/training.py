"""Training: from a cohort's folder to a run's folder, through Accelerate on whatever device is there."""

import math
import platform
import time
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from tqdm.auto import tqdm

from cspine_helpers import __version__
from cspine_helpers.checkpoints import RECORD, WEIGHTS, save_weights, write_record
from cspine_helpers.cohort import Cohort, read_cohort
from cspine_helpers.dataset import SequenceDataset, make_loader
from cspine_helpers.decisions import Decision, choose_threshold
from cspine_helpers.labels import VERTEBRAE, write_table
from cspine_helpers.metrics import auroc, average_precision
from cspine_helpers.model import ClassifierOutput, FractureClassifier, ModelConfig
from cspine_helpers.packed import check_sequences
from cspine_helpers.paths import listing
from cspine_helpers.pretraining import pretrain
from cspine_helpers.recipe import Loss, TrainConfig, adamw, best_epoch, learning_rate

LAST = "last"  # the last complete epoch's weights are in last.safetensors
_FILES = (RECORD, "history.csv", f"{WEIGHTS}.safetensors", f"{LAST}.safetensors")


def set_aside(run_folder: str | Path) -> Path | None:
    """Rename a run's folder to the first free `<run>-previous-<n>`, so that a new run can take its name.

    Returns:
        Where it is now; None where there was no run.
    """
    folder = Path(run_folder)
    if not _held(folder):
        return None
    n = 1
    while (target := folder.with_name(f"{folder.name}-previous-{n}")).exists():
        n += 1
    return folder.rename(target)


def _held(folder: Path) -> list[str]:
    return [name for name in _FILES if (folder / name).exists()]


def train(
    cohort_folder: str | Path, run_folder: str | Path, *, model: ModelConfig, config: TrainConfig
) -> pd.DataFrame:
    """Train on a cohort's training split, and keep the epoch that is best on its validation split.

    After every epoch the run folder holds the whole history, the last epoch's weights
    (`last.safetensors`), the best epoch's (`model.safetensors`) and the record (`run.json`): stopped in a
    later epoch, it is a usable run. A stop between the writing of the best weights and of their record is
    noticed by `checkpoints.load_run`. Seeds torch's global generator.

    Args:
        cohort_folder: holds `train.csv`, `split.csv` and `packed/`.
        run_folder: where the run goes; must hold no run yet.
        model: what to train.
        config: how to train it.

    Returns:
        One row an epoch: epoch (from 1), train_loss, validation_loss, validation_recall,
        validation_precision, validation_average_precision, validation_auroc, threshold (NaN where no
        threshold keeps the precision floor; recall and precision are 0 then), learning_rate (of the epoch's
        last step), seconds. Recall and precision are at the threshold.

    Raises:
        FileExistsError: the run folder holds a run; nothing is ever overwritten.
        FileNotFoundError: the cohort lacks labels or split.
        ValueError: an input breaks its schema, packed sequences cannot be used (all are named), a split
            lacks a class, or the loss is no longer a finite number.
    """
    folder, start = Path(run_folder), time.perf_counter()
    if held := _held(folder):
        raise FileExistsError(
            f"{folder} holds a run already ({listing(held)}). Train into another folder, or move it aside "
            "with training.set_aside(...)."
        )
    cohort = read_cohort(cohort_folder)
    _check(cohort, model)
    if AcceleratorState._shared_state:  # an earlier training of this process may have had another precision
        AcceleratorState._reset_state()
    accelerator = Accelerator(
        mixed_precision=_mixed_precision(config), gradient_accumulation_steps=config.accumulate
    )
    torch.manual_seed(config.seed)
    seen, held_out = (
        SequenceDataset(
            cohort.samples[name],
            cohort.packed,
            slices=model.slices,
            size=model.size,
            augment=augment,
            seed=config.seed,
            manifest=cohort.manifest,
        )
        for name, augment in (("train", config.augment), ("validation", None))
    )
    loss = Loss.of(cohort.samples["train"], seen.slice_truth, config)
    network = FractureClassifier(model)
    slice_losses = pretrain(accelerator, network, seen, config) if config.slice_epochs else []
    options: dict[str, Any] = {
        "batch_size": config.batch_size,
        "workers": config.workers,
        "seed": config.seed,
    }
    network, optimizer, loader, validation = accelerator.prepare(
        network,
        adamw(network.parameters(), config.learning_rate, config.weight_decay),
        make_loader(seen, sampling=config.sampling, **options),
        make_loader(held_out, **options),
    )
    history, record = pd.DataFrame(columns=["epoch", "validation_average_precision"]), {}
    quiet = not accelerator.is_main_process
    for epoch in (bar := tqdm(range(1, config.epochs + 1), desc="epochs", leave=False, disable=quiet)):
        began = time.perf_counter()
        rates = [
            learning_rate(config, epoch - 1 + (batch + 0.5) / len(loader), history)
            for batch in range(len(loader))
        ]
        loader.set_epoch(epoch)
        train_loss = _train_epoch(accelerator, network, optimizer, loader, loss, rates, config.clip_norm)
        if not math.isfinite(train_loss):
            raise ValueError(
                f"The training loss of epoch {epoch} is {train_loss}. Lower the learning rate "
                f"({config.learning_rate:g}), or train without mixed precision. What {folder} holds is of "
                "earlier epochs."
            )
        metrics, decision = _validate(accelerator, network, validation, loss, config)
        row = {
            "epoch": epoch,
            "train_loss": train_loss,
            **{f"validation_{name}": value for name, value in metrics.items()},
            "threshold": math.nan if decision.threshold is None else decision.threshold,
            "learning_rate": rates[-1],
            "seconds": time.perf_counter() - began,
        }
        history = pd.DataFrame([*history.to_dict("records"), row])
        best = best_epoch(history)
        bar.set_postfix(best=best, recall=metrics["recall"], average_precision=metrics["average_precision"])
        if best == epoch:
            record = {"decision": asdict(decision), "metrics": {"validation": metrics}, "best_epoch": best}
        if accelerator.is_main_process:
            plain = accelerator.unwrap_model(network)
            write_table(history, folder / "history.csv")
            save_weights(folder, plain, LAST)
            seconds = time.perf_counter() - start
            if best == epoch:
                save_weights(folder, plain)  # right before the record that holds their hash
            write_record(
                folder,
                {
                    **_facts(cohort, model, config, loss),
                    **record,
                    "slice_losses": slice_losses,
                    "seconds": seconds,
                },
            )
        accelerator.wait_for_everyone()
        if epoch - best >= config.patience:
            break
    return history


def _check(cohort: Cohort, model: ModelConfig) -> None:
    for name in ("train", "validation"):
        samples = cohort.samples[name]
        check_sequences(cohort.packed, samples, slices=model.slices, size=model.size)
        if samples["label"].nunique() < 2:
            raise ValueError(
                f"Split {name!r} holds {int(samples['label'].sum())} fractured of {len(samples)} vertebrae; "
                "training needs both kinds. Add studies, or split anew with notebook 02."
            )


def _mixed_precision(config: TrainConfig) -> str:
    if config.mixed_precision != "auto":
        return config.mixed_precision
    return (
        "bf16"
        if torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
        else "no"
    )


def _train_epoch(
    accelerator: Accelerator,
    network: nn.Module,
    optimizer: Any,
    loader: Any,
    loss: Loss,
    rates: list[float],
    clip_norm: float,
) -> float:
    """One pass over the training split; returns the mean loss of its batches."""
    network.train()
    total = torch.zeros((), device=accelerator.device)
    bar = tqdm(loader, desc="train", leave=False, disable=not accelerator.is_main_process)
    for rate, batch in zip(rates, bar, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = rate
        with accelerator.accumulate(network):
            value = loss(network(batch["sequence"], batch["vertebra"]), batch)
            accelerator.backward(value)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(network.parameters(), clip_norm)
            optimizer.step()
            optimizer.zero_grad()
        total += value.detach()
    return float(accelerator.reduce(total / len(rates), reduction="mean"))


@torch.inference_mode()
def _validate(
    accelerator: Accelerator, network: nn.Module, loader: Any, loss: Loss, config: TrainConfig
) -> tuple[dict[str, float], Decision]:
    """Metrics of the validation split, at the threshold chosen there.

    In float32 as inference runs, also where training does not: else the threshold would not be its own.
    """
    plain = accelerator.unwrap_model(network).eval()
    parts: list[dict[str, Tensor]] = []
    for batch in tqdm(loader, desc="validate", leave=False, disable=not accelerator.is_main_process):
        output = FractureClassifier.forward(plain, batch["sequence"], batch["vertebra"])  # past autocast
        kept = {key: batch[key] for key in ("label", "vertebra", "slice_truth")}
        parts.append(accelerator.gather_for_metrics({**kept, **output._asdict()}))
    whole = {key: torch.cat([part[key] for part in parts]).float().cpu() for key in parts[0]}  # (N, …)
    whole["vertebra"] = whole["vertebra"].long()
    scores = ClassifierOutput(*(whole[name] for name in ClassifierOutput._fields))
    labels = whole["label"].numpy()
    probabilities = scores.logit.double().sigmoid().numpy()
    decision = choose_threshold(labels, probabilities, precision_floor=config.precision_floor)
    metrics = {
        "loss": float(loss(scores, whole)),
        "recall": decision.recall,
        "precision": decision.precision,
        "average_precision": average_precision(labels, probabilities),
        "auroc": auroc(labels, probabilities),
    }
    return metrics, decision


def _facts(cohort: Cohort, model: ModelConfig, config: TrainConfig, loss: Loss) -> dict[str, Any]:
    """What `run.json` says of the inputs, the settings and the software."""
    packages = ("torch", "timm", "accelerate", "albumentations", "numpy")
    return {
        "model": asdict(model),
        "train": asdict(config),
        "loss": asdict(loss),
        "data": cohort.fingerprint(),
        "classes": list(VERTEBRAE),
        "versions": {
            "cspine_helpers": __version__,
            "python": platform.python_version(),
            **{name: version(name) for name in packages},
        },
    }
