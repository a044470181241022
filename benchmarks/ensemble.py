"""Ensemble: five runs of the built-in model over the same loaded batches, against one after the other."""

import copy
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state

from benchmarks.measure import Row, interleaved, milliseconds, ratio, spread
from cspine_helpers.checkpoints import load_run, save_weights
from cspine_helpers.cohort import Cohort, read_cohort
from cspine_helpers.files.paths import cohort_dir
from cspine_helpers.inference.ensemble import predict_ensemble
from cspine_helpers.inference.prediction import PREDICTIONS, predict_cohort
from cspine_helpers.labels import VERTEBRAE
from cspine_helpers.model.classifier import FractureClassifier, ModelConfig
from cspine_helpers.model.forward import folded
from cspine_helpers.runs import write_record

MEMBERS, STUDIES, REPEATS = 5, 2, 5
SPLIT = ("validation",)


def few(cohort: Cohort) -> Cohort:
    """The cohort with the first of its validation studies only."""
    rows = cohort.samples["validation"].head(STUDIES * len(VERTEBRAE))
    return replace(cohort, samples={**cohort.samples, "validation": rows})


def make_runs(folder: Path, cohort: Cohort) -> list[Path]:
    """Runs of random weights: what they say does not matter here, and takes as long."""
    config = ModelConfig.small()
    record = {
        "classes": list(VERTEBRAE),
        "model": asdict(config),
        "data": cohort.fingerprint(),
        "decision": {"threshold": 0.5},
    }
    for seed in range(MEMBERS):
        torch.manual_seed(seed)
        save_weights(folder / str(seed), FractureClassifier(config))
        write_record(folder / str(seed), record)
    return [folder / str(seed) for seed in range(MEMBERS)]


def tables(folder: Path) -> Iterator[Row]:
    """A predictions table, from the runs' files to its own."""
    cohort = few(read_cohort(cohort_dir("builtin")))
    runs = make_runs(folder, cohort)

    def one_by_one() -> None:
        for number, run in enumerate(runs):
            path = folder / f"alone_{number}" / PREDICTIONS
            predict_cohort(load_run(run), cohort, path, splits=SPLIT, replace=True)

    def together() -> None:
        predict_ensemble(runs, cohort, folder / "together", splits=SPLIT, replace=True)

    times = interleaved({"alone": one_by_one, "together": together}, repeats=REPEATS)
    share = ratio(times["together"], times["alone"])
    yield Row(
        f"predict_ensemble of {MEMBERS} runs, {STUDIES * len(VERTEBRAE)} sequences",
        "load_run and predict_cohort, one run after the other, without their mean",
        f"{spread(share)} of its time; {milliseconds(times['together'])}",
        "≤ 1",
        share[0] <= 1,
        "the forward passes, which both have in common, are nearly all of it",
    )


class Features(nn.Module):
    """The backbone's forward pass as a module's, for `functional_call`."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor) -> Tensor:
        """Maps `(N, D, h, w)` of images `(N, 6, H, W)`."""
        return self.backbone.forward_features(images)


def vectorised() -> Iterator[Row]:
    """Stacked weights under `vmap`, for the backbones: torch has no batching rule for the whole model."""
    config = ModelConfig.small()
    backbones = [Features(folded(FractureClassifier(config)).backbone) for _ in range(MEMBERS)]
    images = torch.randn(4 * config.slices, 6, config.size, config.size)
    images = images.to(memory_format=torch.channels_last)
    stacked, skeleton = stack_module_state(backbones), copy.deepcopy(backbones[0]).to("meta")
    batched = torch.vmap(lambda *state: functional_call(skeleton, state, (images,)))

    def quiet(function: Callable[[], object]) -> Callable[[], object]:
        def called() -> None:
            with torch.inference_mode():
                function()

        return called

    functions = {
        "vmap": quiet(lambda: batched(*stacked)),
        "loop": quiet(lambda: [backbone(images) for backbone in backbones]),
    }
    times = interleaved(functions, repeats=REPEATS)
    yield Row(
        f"torch.vmap over the stacked weights of {MEMBERS} backbones",
        "one backbone after the other, as predict_ensemble runs them",
        f"{spread(ratio(times['vmap'], times['loop']))} of its time",
        note="convolutions with stacked weights become grouped ones, which a CPU computes more slowly",
    )


def rows() -> Iterator[Row]:
    """All measurements of ensembles."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    with tempfile.TemporaryDirectory() as folder:
        yield from tables(Path(folder))
    yield from vectorised()
