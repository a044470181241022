"""Training on radiographs: the task of images with masks, its settings, and the runs that it leaves.

python -m cspine_helpers train --cohort fracatlas --run mine
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
import pandas as pd
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader

from cspine_helpers.checkpoints import Run, load_task_run
from cspine_helpers.decisions.thresholds import Rule, choose_threshold
from cspine_helpers.files.paths import listing
from cspine_helpers.files.records import TRUE_OR_FALSE, one_of, optional, setting, whole, within
from cspine_helpers.files.tables import require_columns
from cspine_helpers.metrics import auroc, average_precision
from cspine_helpers.model.forward import as_on_a_cpu
from cspine_helpers.radiographs.augment import ImageAugment
from cspine_helpers.radiographs.cohort import RadiographCohort, read_radiograph_cohort
from cspine_helpers.radiographs.dataset import RadiographDataset, image_loader, intact_images
from cspine_helpers.radiographs.losses import LossConfig, RadiographLoss
from cspine_helpers.radiographs.mask_cases import EPSILON
from cspine_helpers.radiographs.model import RadiographConfig, RadiographModel
from cspine_helpers.radiographs.packing import read_packing
from cspine_helpers.runs import RADIOGRAPHS
from cspine_helpers.training.config import Keep, Precision, TrainerConfig
from cspine_helpers.training.memory import largest_batch, take_step
from cspine_helpers.training.run import RULE, TRAINING_SPLITS, check_rule, check_vacant, train_task
from cspine_helpers.training.sequence_task import f1, training_metrics
from cspine_helpers.training.settings import Settings, chosen, described, found_in
from cspine_helpers.training.trainer import Advance, Stage

CLASSES = ("fractured",)
MASK_THRESHOLDS = tuple(round(0.05 * n, 2) for n in range(1, 15))  # of a cell's probability, tried each epoch
_VALIDATED = 0.4  # what an image costs that is only looked at, by one trained on: for the progress bar


@dataclass(frozen=True)
class RadiographTrainConfig(TrainerConfig):
    """How a run of radiographs is trained; the defaults are for FracAtlas on two CPU cores.

    Attributes:
        intact: intact images in an epoch for each fractured one, at least one. Every fractured image is
            shown once an epoch; the intact ones take turns, so that none is shown twice before all were.
        hardware: whether images with metal train, too. False: they are not drawn in training, so that metal
            cannot stand for a fracture; validation and test keep them.
        hard_share: share of an epoch's intact images that are hard ones: those of some candidates which the
            model itself, as it is before the epoch, marks most strongly; 0 turns it off. Their patches are
            cut out about that mark.
        hard_after: epochs before the first with hard images.
        hard_candidates: intact images that are scored for each hard one, drawn anew each epoch.
        patch: side of the squares that are trained on instead of whole images, pixels at the same scale,
            a multiple of 32; validation sees whole images. None: whole images.
        loss: what is minimised.
        augment: how training images are varied; None leaves them as they are.
    """

    epochs: int = setting(26, whole(1))
    batch_size: int = setting(32, whole(1))
    learning_rate: float = setting(2.8e-3, within("(0, inf)"))
    warmup_epochs: float = setting(2.0, within("[0, inf)"))
    backbone_rate: float = setting(0.25, within("(0, inf)"))
    ema: float = setting(0.99, within("[0, 1)"))
    accumulate: int = setting(1, whole(1))
    clip_norm: float = setting(5.0, within("(0, inf)"))
    patience: int = setting(100, whole(1))
    mixed_precision: Precision = setting("no", one_of(*get_args(Precision)))
    keep: Keep = setting("last", one_of(*get_args(Keep)))
    workers: int = setting(1, whole(0))
    intact: float = setting(1.0, within("(0, inf)"))
    hardware: bool = setting(True, TRUE_OR_FALSE)
    hard_share: float = setting(0.0, within("[0, 1]"))
    hard_after: int = setting(4, whole(0))
    hard_candidates: int = setting(3, whole(1))
    patch: int | None = setting(None, optional(whole(32, 4096)))
    loss: LossConfig = field(default_factory=LossConfig)
    augment: ImageAugment | None = field(default_factory=ImageAugment)


class ImageScores(NamedTuple):
    """What a network says of N radiographs, held against their truth.

    Attributes:
        logit: `(N,)`, of a fracture being there.
        loss: `(N,)`, of the image's batch.
        mark: `(N,)`, mean probability of the image's most suspected cells: how strongly it is marked.
        place: `(N, 2)`, x, y of the most suspected cell, pixels of the frame; NaN without a mask.
        both: `(N, K)`, pixels of the frame that are marked at each of `MASK_THRESHOLDS` and fractured.
        marked: `(N, K)`, pixels that are marked.
        true: `(N,)`, pixels that are fractured; NaN where nobody outlined the fracture.
    """

    logit: Tensor
    loss: Tensor
    mark: Tensor
    place: Tensor
    both: Tensor
    marked: Tensor
    true: Tensor

    @property
    def probability(self) -> np.ndarray:
        """`(N,)` float64, of a fracture being there."""
        return self.logit.double().sigmoid().numpy()

    def dice_pos(self) -> np.ndarray:
        """`(K,)`, mean Dice of the images with an outlined fracture, see `evaluation.dice_pos`."""
        outlined = self.true > 0
        both, marked, true = (each[outlined].double() for each in (self.both, self.marked, self.true))
        return ((2 * both + EPSILON) / (marked + true[:, None] + EPSILON)).mean(dim=0).numpy()


class RadiographTask:
    """A `trainer.Task`: the network, a cohort's training and validation split, and the loss.

    Seeds torch's global generator.

    Args:
        cohort: packed in the model's frame.
        model: what to train.
        config: how.
        rule: chooses the threshold of an epoch on the validation split.
        accelerator: devices and processes.
    """

    def __init__(
        self,
        cohort: RadiographCohort,
        model: RadiographConfig,
        config: RadiographTrainConfig,
        rule: Rule,
        accelerator: Accelerator,
    ) -> None:
        torch.manual_seed(config.seed)
        self.model = RadiographModel(model)
        if config.gradient_checkpointing:
            self.model.checkpoint_gradients()
        self._config, self._rule, self._accelerator, self._cohort = config, rule, accelerator, cohort
        self._shares = {"process": accelerator.process_index, "processes": accelerator.num_processes}
        self._table = training_images(cohort, hardware=config.hardware)
        self._seen = RadiographDataset(
            self._table, cohort.packed, augment=config.augment, seed=config.seed, patch=config.patch
        )
        self._intact = np.flatnonzero(self._seen.labels == 0)
        self._held_out = self._whole(cohort.of("validation"))
        self._loaders: dict[str, DataLoader[Any]] = {}
        self._trained_on: list[Tensor] = []  # labels and logits of the epoch's batches, each (2, B)
        self._loss = RadiographLoss(config.loss, np.repeat([1, 0], [self._fractured, self._drawn]))
        self.stages: Sequence[Stage] = [self._stage()]
        self.record = {
            "cohort": cohort.facts(),
            "pretrained": self.model.pretrained,
            "normalisation": model.normalisation,
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "positive_weight": self._loss.positive_weight,
            "classes": list(CLASSES),
        }

    def _whole(self, table: pd.DataFrame) -> RadiographDataset:
        """Whole images as they are, with masks of every pixel."""
        return RadiographDataset(table, self._cohort.packed, stride=1)

    def _stage(self) -> Stage:
        config = self._config

        def loss(network: nn.Module, batch: dict[str, Tensor]) -> Tensor:
            output = network(batch["image"])
            self._trained_on.append(torch.stack([batch["label"], output.logit.detach().float()]))
            return self._loss(output, batch)

        return Stage(
            name="images",
            network=self.model,
            backbone=self.model.backbone,
            loader=lambda: image_loader(
                self._seen,
                batch_size=config.batch_size,
                training=True,
                intact=config.intact,
                workers=config.workers,
                seed=config.seed,
                accumulate=config.accumulate,
                **self._shares,
            ),
            before_epoch=self._draw,
            loss=loss,
            config=config,
            seed=(config.seed, 1),
            work=self._fractured + self._drawn,
            validation_work=_VALIDATED * len(self._held_out),
        )

    @property
    def _fractured(self) -> int:
        """Fractured images of an epoch, all there are."""
        return len(self._seen) - len(self._intact)

    @property
    def _drawn(self) -> int:
        """Intact images of an epoch."""
        return intact_images(self._config.intact, self._fractured, len(self._intact))

    def _draw(self, epoch: int) -> None:
        """Choose the intact images of an epoch: those whose turn it is, and hard ones in their stead."""
        config = self._config
        hard = round(config.hard_share * self._drawn) if epoch > config.hard_after else 0
        turn = in_turn(len(self._intact), self._drawn, seed=config.seed, epoch=epoch)[: self._drawn - hard]
        chosen = self._intact[turn]
        if hard:
            others = np.setdiff1d(self._intact, chosen)
            rng = np.random.default_rng((config.seed, epoch, 1))
            candidates = rng.permutation(others)[: config.hard_candidates * hard]
            marks = self._marks(candidates)
            hardest = np.argsort(-marks[:, 0])[:hard]
            chosen = np.concatenate([chosen, candidates[hardest]])
            self._seen.focus[:] = torch.nan
            self._seen.focus[candidates[hardest]] = torch.from_numpy(marks[hardest, 1:]).float()
        self._seen.weights[:] = 0
        self._seen.weights[chosen] = 1

    def _marks(self, rows: np.ndarray) -> np.ndarray:
        """How strongly the model, as it is, marks these training images, and where, x and y: `(M, 3)`."""
        table = self._table.iloc[np.sort(rows)].reset_index(drop=True)
        scores = self._scores(self.model, self._in_order(self._whole(table)))
        marks = torch.cat([scores.mark[:, None], scores.place], dim=1)
        return marks.numpy()[np.argsort(np.argsort(rows))]

    def validate(
        self, network: nn.Module, advance: Advance = lambda share: None
    ) -> tuple[dict[str, float], dict[str, Any]]:
        """Metrics of the validation split: for the history, and the record.

        Presence is called at the threshold that the rule chooses, of the presence head alone; masks at the
        best of `MASK_THRESHOLDS`. The objective is the sum of average precision and dice_pos.
        """
        labels, scores = self._held_out.labels, self.predict(network, "validation", advance)
        probabilities = scores.probability
        decision = choose_threshold(labels, probabilities, self._rule)
        found = {
            "loss": float(scores.loss.mean()),
            "recall": decision.recall,
            "precision": decision.precision,
            "average_precision": average_precision(labels, probabilities),
            "auroc": auroc(labels, probabilities),
            "dice_pos": np.nan,
        }
        mask = None
        if self.model.decoder is not None and bool((scores.true > 0).any()):
            dice = scores.dice_pos()
            best = int(dice.argmax())
            found["dice_pos"] = float(dice[best])
            mask = {"threshold": MASK_THRESHOLDS[best], "dice_pos": found["dice_pos"]}
        row = {f"validation_{name}": value for name, value in found.items()}
        row["threshold"] = np.nan if decision.threshold is None else decision.threshold
        row["validation_objective"] = found["average_precision"] + (0.0 if mask is None else mask["dice_pos"])
        row["validation_f1"] = f1(decision.recall, decision.precision)
        row |= training_metrics(self._trained_on, decision.threshold)
        metrics = {name: value for name, value in found.items() if not np.isnan(value)}
        return row, {"decision": decision.record(), "mask": mask, "metrics": {"validation": metrics}}

    def predict(self, network: nn.Module, split: str, advance: Advance = lambda share: None) -> ImageScores:
        """Scores of a split's images in their order, each computed once, by one process."""
        if split not in self._loaders:
            is_held_out = split == "validation"
            data = self._held_out if is_held_out else self._whole(self._cohort.of(split))
            self._loaders[split] = self._in_order(data)
        return self._scores(self._accelerator.unwrap_model(network), self._loaders[split], advance)

    def _in_order(self, data: RadiographDataset) -> DataLoader[Any]:
        config = self._config
        return image_loader(data, batch_size=config.batch_size, workers=config.workers, **self._shares)

    def _scores(
        self, model: Any, loader: DataLoader[Any], advance: Advance = lambda share: None
    ) -> ImageScores:
        accelerator, kinds = self._accelerator, len(MASK_THRESHOLDS)
        images = len(loader.dataset)  # type: ignore[arg-type]
        whole = torch.zeros(images, 6 + 2 * kinds, dtype=torch.float64, device=accelerator.device)
        network, cells = model.folded(), self.model.config.mask_cells
        for batch in loader:
            given = {name: value.to(accelerator.device, non_blocking=True) for name, value in batch.items()}
            whole[given["index"]] = self._columns(network, given, cells)
            advance(1 / len(loader))
        whole = accelerator.reduce(whole, reduction="sum").cpu()  # each row is zero in all processes but one
        logit, loss, mark, true, place, both, marked = whole.split([1, 1, 1, 1, 2, kinds, kinds], dim=1)
        return ImageScores(logit[:, 0], loss[:, 0], mark[:, 0], place, both, marked, true[:, 0])

    def _columns(self, network: nn.Module, batch: dict[str, Tensor], cells: int) -> Tensor:
        """Logit, loss, mark, true area, place, and at each threshold common and marked area, of a batch."""
        with as_on_a_cpu(batch["image"].device):
            output = network(batch["image"])
            truth = batch["mask"] > 127  # (B, H, W)
            loss = self._loss(output, batch)
            true = torch.where(batch["annotated"], truth.sum((1, 2)), torch.nan)
            areas = torch.zeros(
                len(truth), 2 * len(MASK_THRESHOLDS), dtype=torch.float64, device=truth.device
            )
            mark, place = output.logit.sigmoid(), torch.full((len(truth), 2), torch.nan, device=truth.device)
            if output.mask_logit is not None:
                highest, _ = output.mask_logit.flatten(1).topk(min(cells, output.mask_logit[0].numel()))
                mark = highest.sigmoid().mean(1)
                cell, (rows, columns) = output.mask_logit.flatten(1).argmax(1), output.mask_logit.shape[1:]
                middle = torch.stack([cell % columns, cell // columns], dim=1) + 0.5
                place = middle * (truth.shape[1] / rows)
                size = list(truth.shape[1:])
                full = functional.interpolate(output.mask_logit[:, None], size, mode="bilinear")[:, 0]
                for kind, threshold in enumerate(MASK_THRESHOLDS):
                    marked = full >= np.log(threshold / (1 - threshold))
                    areas[:, kind] = (marked & truth).sum((1, 2))
                    areas[:, len(MASK_THRESHOLDS) + kind] = marked.sum((1, 2))
        head = torch.stack([output.logit, loss.expand(len(mark)), mark, true], dim=1).double()
        return torch.cat([head, place.double(), areas], dim=1)


def training_images(cohort: RadiographCohort, *, hardware: bool = True) -> pd.DataFrame:
    """The images that a training draws from: those of the training split.

    Args:
        cohort: in question.
        hardware: False leaves out images with metal, see `RadiographTrainConfig`.

    Raises:
        ValueError: metal is to be left out, and of some images nobody stated whether they show any.

    Example:
        >>> from cspine_helpers.radiographs.cohort import read_radiograph_cohort
        >>> cohort = read_radiograph_cohort(radiographs)
        >>> [len(training_images(cohort, hardware=hardware)) for hardware in (True, False)]
        [16, 15]
    """
    table = cohort.of("train")
    if hardware:
        return table
    require_columns(table, ("hardware",), what="The table of training images")
    if len(unknown := table["image"][table["hardware"].isna()]):
        raise ValueError(
            f"Images with hardware are to be left out of training, and of {len(unknown)} of {len(table)} "
            f"training images nobody stated whether they show any: {listing(unknown)}. State it in the "
            "column hardware of images.csv, or set hardware to true."
        )
    return table[table["hardware"] == 0].reset_index(drop=True)


def in_turn(images: int, wanted: int, *, seed: int, epoch: int) -> np.ndarray:
    """Which images an epoch shows, `(wanted,)`, where all take turns in a random order.

    None is shown twice before all were, but for fewer than `wanted` that are left over; then they are
    shuffled again. Epochs count from 1, and each is drawn from (seed, epoch) alone.

    Example:
        >>> sorted(np.concatenate([in_turn(6, 3, seed=0, epoch=epoch) for epoch in (1, 2)]).tolist())
        [0, 1, 2, 3, 4, 5]
    """
    turns = max(images // wanted, 1)
    round_, turn = divmod(epoch - 1, turns)
    order = np.random.default_rng((seed, round_)).permutation(images)
    return order[turn * wanted : (turn + 1) * wanted]


def train_radiographs(
    cohort: str | Path | RadiographCohort,
    run_folder: str | Path,
    *,
    model: RadiographConfig,
    config: RadiographTrainConfig,
    rule: Rule = RULE,
    resume: bool = False,
) -> pd.DataFrame:
    """Train on the radiographs of a cohort's training split, and keep one epoch; as `training.train` does.

    After each epoch the run folder holds history, weights of the epoch that is kept, and record, which names
    the task. A training stopped at any moment resumes from its last complete epoch, and ends with the same
    history and weights, bit for bit on a CPU. Seeds torch's global generator.

    Args:
        cohort: its folder, packed in the model's frame and divided; or a cohort that was read.
        run_folder: where the run goes.
        model: what to train.
        config: how to train it; its `keep` says which epoch is kept, the last or the best by the objective,
            average precision + dice_pos of the validation split.
        rule: chooses the threshold of each epoch on the validation split, of images.
        resume: resume the training that stopped there; begin where there is none; do nothing where the same
            training has ended.

    Returns:
        The history, one row an epoch: the columns of `training.train` without those of single vertebrae, and
        validation_dice_pos: mean Dice, pixels of the network's frame, of the images with an outlined
        fracture, at the best of `MASK_THRESHOLDS`, which the record has under "mask"; NaN without masks.
        Presence is what the presence head says, without the mask.

    Raises:
        FileExistsError: the folder holds a run and `resume` is not set, or predictions without a run.
        FileNotFoundError: the cohort lacks images or split, or is not packed.
        BlockingIOError: another process trains in this folder.
        ValueError: an input breaks its schema, images are packed in another frame, a split lacks a class (of
            training, among the images that are drawn), images without hardware are asked for and not known,
            the loss is not finite, or what is to be resumed has other settings (names each).

    Example:
        >>> settings = radiograph_preset("fracatlas")
        >>> options = {"model": settings.model, "config": settings.train}
        >>> history = train_radiographs(radiographs, "mine", **options)  # doctest: +SKIP
    """
    # 1. Nothing is overwritten.
    folder = check_vacant(run_folder, resume=resume)
    check_rule(rule, level="image", units="images")
    rule = replace(rule, level="image")
    # 2. The data.
    cohort = cohort if isinstance(cohort, RadiographCohort) else read_radiograph_cohort(cohort)
    _check_frame(cohort, model)
    _check_classes(cohort, config)
    # 3. Train, where it has not ended.
    return train_task(
        folder,
        config,
        lambda fitting, accelerator: RadiographTask(cohort, model, fitting, rule, accelerator),
        setting={
            "task": RADIOGRAPHS,
            "model": asdict(model),
            "rule": asdict(rule),
            "data": cohort.fingerprint(),
        },
        fit=lambda accelerator, earlier: _fitted(config, model, accelerator, earlier),
    )


def _check_frame(cohort: RadiographCohort, model: RadiographConfig) -> None:
    packed = read_packing(cohort.packed)["frame"]
    wanted = {"long": model.long, "short": model.short}
    if packed != wanted:
        raise ValueError(
            f"{cohort.packed} holds frames of {packed['long']} × {packed['short']} pixels, the model is for "
            f"{model.long} × {model.short}. Pack the cohort for it, or give the model its frame."
        )


def _check_classes(cohort: RadiographCohort, config: RadiographTrainConfig) -> None:
    for name in TRAINING_SPLITS:
        bare = name == "train" and not config.hardware
        label = (training_images(cohort, hardware=False) if bare else cohort.of(name))["label"]
        if label.nunique() < 2:
            which, else_ = (
                (" without hardware", "set hardware to true") if bare else ("", "divide them otherwise")
            )
            raise ValueError(
                f"Split {name!r} holds {label.sum()} fractured of {len(label)} images{which}; training needs "
                f"both kinds. Add images, or {else_}."
            )


def _fitted(
    config: RadiographTrainConfig,
    model: RadiographConfig,
    accelerator: Accelerator,
    earlier: Mapping[str, Any],
) -> RadiographTrainConfig:
    """The config with the largest batch of images that fits."""
    height, width = (model.long, model.short) if config.patch is None else (config.patch, config.patch)

    def attempt(batch_size: int) -> None:
        network = RadiographModel(model, load_pretrained=False)
        images = torch.zeros(batch_size, height, width, dtype=torch.uint8, device=accelerator.device)
        take_step(network, [images], config, accelerator)

    return largest_batch(config, attempt, accelerator, earlier, what=f"image of {height} × {width} pixels")


def load_radiograph_run(folder: str | Path) -> Run[RadiographModel, RadiographConfig]:
    """Load a run of radiographs, as strictly as `checkpoints.load_run`.

    Raises:
        FileNotFoundError: `run.json` or `model.safetensors` is missing.
        ValueError: they are damaged, of another task, or do not belong to this package or to each other;
            says what differs.

    Example:
        >>> load_radiograph_run("nobody")
        Traceback (most recent call last):
        ...
        FileNotFoundError: No run at nobody: run.json is missing...
    """
    return load_task_run(folder, RADIOGRAPHS, RadiographConfig, RadiographModel, classes=CLASSES)


# ---------------------------------------------------------------------------------------------- settings

SECTIONS: dict[str, Any] = {"model": RadiographConfig, "train": RadiographTrainConfig, "rule": Rule}
_CLASSIFIER = RadiographConfig(architecture="classifier", pretrained="hub", head_features=512, dropout=0.5)
_OF_CLASSIFIERS = RadiographTrainConfig(batch_size=32, learning_rate=5e-4, backbone_rate=0.2)
_PRESETS: dict[str, tuple[RadiographConfig, RadiographTrainConfig]] = {
    "fracatlas": (RadiographConfig(), RadiographTrainConfig()),
    "simple_cnn": (
        RadiographConfig(architecture="simple_cnn", backbone=None, pretrained=None, frozen_blocks=0),
        replace(_OF_CLASSIFIERS, learning_rate=1e-3, backbone_rate=1.0),
    ),
    "resnet50": (replace(_CLASSIFIER, backbone="resnet50", frozen_blocks=2), _OF_CLASSIFIERS),
    "efficientnet_b0": (
        replace(_CLASSIFIER, backbone="efficientnet_b0", frozen_blocks=3),
        _OF_CLASSIFIERS,
    ),
    "deeplabv3": (
        RadiographConfig(architecture="deeplabv3", backbone="resnet50", pretrained="hub", frozen_blocks=1),
        RadiographTrainConfig(batch_size=8, learning_rate=1e-3, backbone_rate=0.1),
    ),
}
PRESETS = tuple(_PRESETS)


def radiograph_preset(name: str = "fracatlas") -> Settings[RadiographConfig, RadiographTrainConfig]:
    """Settings by name, one of `PRESETS`.

    "fracatlas" is the recipe of the shipped run. The others are what is usually compared with: a small CNN
    from scratch, and ResNet-50, EfficientNet-B0 and DeepLabV3 on weights of timm's hub, their first blocks
    frozen.

    Raises:
        ValueError: there is no such name.

    Example:
        >>> radiograph_preset("resnet50").model.frozen_blocks
        2
    """
    if name not in _PRESETS:
        raise ValueError(f"Named settings of radiographs are {listing(PRESETS)}; found {name!r}. Choose one.")
    return Settings(*_PRESETS[name], replace(RULE, level="image"))


def radiograph_settings_of(
    path: str | Path, *, preset: str | None = None
) -> Settings[RadiographConfig, RadiographTrainConfig]:
    """Settings of a JSON file that a person wrote, or of a radiograph run's `run.json`.

    Args:
        path: of the file; it may name the preset that it changes: `{"preset": "resnet50", "train": {...}}`.
        preset: has what the file leaves out; None: the one that it names, else "fracatlas".

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no JSON, of another format or task, or sections, fields or values are unknown or
            wrong; names each, with what is allowed.
    """
    found, is_record = found_in(path, SECTIONS, task=RADIOGRAPHS)
    if is_record:
        base = Settings(RadiographConfig(), RadiographTrainConfig(), radiograph_preset().rule)
    else:
        base = radiograph_preset(preset or found.get("preset", PRESETS[0]))
    return chosen(path, found, base, SECTIONS, others=("preset",))


_GUIDE = """# Settings of a run of radiographs

The same for a cohort of radiographs: `python -m cspine_helpers train --cohort fracatlas --settings FILE`. The
file may name one of the presets, `{"preset": "resnet50"}`, whose settings it then changes; without one, that
is `fracatlas`, whose values are below. The section `rule` is as above, with images for vertebrae. The others
differ from it so:
"""


def radiograph_guide() -> str:
    """Every setting of radiographs, what it may be and what it means, and every preset, as Markdown.

    Example:
        >>> radiograph_guide().splitlines()[0]
        '# Settings of a run of radiographs'
    """
    base = radiograph_preset()
    usual = {name: asdict(getattr(base, name)) for name in ("model", "train")}
    lines = [_GUIDE]
    for name in PRESETS[1:]:
        own = radiograph_preset(name)
        values = {
            f"{section}.{key}": value
            for section, settings in usual.items()
            for key, value in asdict(getattr(own, section)).items()
            if value != settings[key]
        }
        lines.append(f"- `{name}`: {', '.join(f'`{key}` {json.dumps(v)}' for key, v in values.items())}")
    tables = {name: SECTIONS[name] for name in usual}
    return "\n".join([*lines, "", *described([base], tables, notes={}, title="radiographs: ")])
