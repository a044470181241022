"""Radiographs: 448 × 384 uint8 read, varied, batched, a training's steps on them, the network; one thread.

Images of the cohort `fracatlas` or of its sample (without them, drawn noise as JPEGs of 512 pixels); files in
the page cache.
"""

import os
import statistics
import tempfile
from collections.abc import Callable, Iterator
from importlib import import_module
from itertools import count
from pathlib import Path

import albumentations as A
import cv2
import numpy as np
import pandas as pd
import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, Dataset

from benchmarks.measure import Row, interleaved, milliseconds, ratio, spread
from cspine_helpers.files.paths import cohort_dir, run_dir
from cspine_helpers.radiographs.annotations import rasterise
from cspine_helpers.radiographs.augment import ImageAugment
from cspine_helpers.radiographs.consolidation import consolidate
from cspine_helpers.radiographs.dataset import RadiographDataset, image_loader
from cspine_helpers.radiographs.image_table import read_images, read_regions
from cspine_helpers.radiographs.images import read_radiograph
from cspine_helpers.radiographs.losses import LossConfig, RadiographLoss
from cspine_helpers.radiographs.model import RadiographConfig, RadiographModel, RadiographOutput
from cspine_helpers.radiographs.packing import pack_images
from cspine_helpers.radiographs.prediction import VIEWS, Predictor
from cspine_helpers.radiographs.sources.yolo import read_yolo
from cspine_helpers.training.config import adamw
from cspine_helpers.training.trainer import train_epoch

IMAGES, BATCH = 96, 16


class OneByOne(Dataset[tuple[torch.Tensor, ...]]):
    """The peer: a JPEG is read, decoded, outlined, fitted, and varied as float, one image after the other.

    So do public notebooks on FracAtlas; the steps and their probabilities are ours.
    """

    def __init__(self, table: pd.DataFrame, folder: Path, config: ImageAugment) -> None:
        c, regions = config, read_regions(folder)
        self.paths = [str(folder / file) for file in table["file"]]
        self.polygons = [regions[image] for image in table["image"]]
        limits, gamma = (-c.contrast_limit, c.contrast_limit), 100 * c.gamma_limit
        self.vary = A.Compose(
            [
                A.LongestMaxSize(448),
                A.PadIfNeeded(448, 448),
                A.CenterCrop(448, 384),
                A.HorizontalFlip(p=c.flip),
                A.VerticalFlip(p=c.vertical_flip),
                A.Affine(
                    rotate=(-c.rotate_degrees, c.rotate_degrees),
                    scale=(1 - c.shrink, 1 + c.enlarge),
                    translate_percent=(-c.shift, c.shift),
                    keep_ratio=True,
                    p=c.affine,
                ),
                A.RandomGamma((100 - gamma, 100 + gamma), p=c.gamma),
                A.RandomBrightnessContrast(limits, limits, p=c.contrast),
                A.GaussianBlur(0, (0.1, c.blur_std), p=c.blur),
                A.GaussNoise(std_range=(0, c.noise_std), p=c.noise),
                A.Normalize(mean=(0.5,) * 3, std=(0.25,) * 3, max_pixel_value=1.0),
            ]
        )

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, ...]:
        image = cv2.cvtColor(cv2.imread(self.paths[index]), cv2.COLOR_BGR2RGB).astype(np.float32) / 255
        mask = rasterise(self.polygons[index], *image.shape[:2]).astype(np.float32)
        varied = self.vary(image=image, mask=mask)
        pixels = np.ascontiguousarray(varied["image"].transpose(2, 0, 1))
        return torch.from_numpy(pixels), torch.from_numpy(varied["mask"]), torch.tensor(0.0)


def cohort(folder: Path) -> Path:
    """A packed cohort of `IMAGES` radiographs, half of them fractured, in this folder."""
    made = folder / "cohort"
    for name in ("fracatlas", "fracatlas_sample"):
        if (cohort_dir(name) / "images.csv").is_file():
            return _some_of(cohort_dir(name), made)
    return _drawn(folder / "drawn", made)


def _some_of(whole: Path, made: Path) -> Path:
    """The first images of both kinds, under more names where there are too few."""
    table, regions = read_images(whole), read_regions(whole)
    layout = made.with_name("chosen")
    for label, rows in table.groupby("label"):
        for n in range(IMAGES // 2):
            row = rows.iloc[n % len(rows)]
            sizes = np.array([row["width"], row["height"]])
            lines = [
                " ".join(map(str, ["0", *(p / sizes).clip(0, 1).ravel()])) for p in regions[row["image"]]
            ]
            _put(layout, f"{label}_{n}", (whole / row["file"]).read_bytes(), lines)
    return _joined(layout, made)


def _drawn(layout: Path, made: Path) -> Path:
    rng = np.random.default_rng(0)
    for n in range(IMAGES):
        small = rng.integers(0, 256, (32, 26), dtype=np.uint8)
        _, jpeg = cv2.imencode(".jpg", cv2.resize(small, (416, 512), interpolation=cv2.INTER_CUBIC))
        lines = ["0 0.4 0.4 0.5 0.4 0.5 0.45 0.4 0.45"] if n % 2 else []
        _put(layout, f"{n % 2}_{n}", jpeg.tobytes(), lines)
    return _joined(layout, made)


def _put(layout: Path, name: str, jpeg: bytes, lines: list[str]) -> None:
    for kind, end, content in (("images", "jpg", jpeg), ("labels", "txt", "\n".join([*lines, ""]).encode())):
        path = layout / "train" / kind / f"{name}.{end}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if lines or kind == "images" else b"")


def _joined(layout: Path, made: Path) -> Path:
    (layout / "data.yaml").write_text("names: [fracture]\nnc: 1\ntrain: train/images\n")
    consolidate([read_yolo(layout, labels={"fracture": 1})], made)
    pack_images(made)
    return made


def passes(loader: DataLoader) -> Callable[[], None]:
    """A call goes through the loader once, every time in another epoch."""
    epochs = count()

    def one() -> None:
        if hasattr(loader.batch_sampler, "set_epoch"):
            loader.batch_sampler.set_epoch(next(epochs))
        for _batch in loader:
            pass

    return one


def rows() -> Iterator[Row]:
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    cv2.setNumThreads(0)
    with tempfile.TemporaryDirectory() as temporary:
        folder = cohort(Path(temporary))
        yield from data_path(folder)
        yield from training(folder)
    yield from networks()
    yield from answers()


def data_path(folder: Path) -> Iterator[Row]:
    """What an image costs until it lies in a batch."""
    table, config, packed = read_images(folder), ImageAugment(), folder / "packed"
    paths = [packed / "images" / f"{image}.npy" for image in table["image"]]
    varied = RadiographDataset(table, packed, augment=config)
    functions = {
        "varied": passes(image_loader(varied, batch_size=BATCH, training=True)),
        "plain": passes(image_loader(RadiographDataset(table, packed), batch_size=BATCH)),
        "patches": passes(
            image_loader(
                RadiographDataset(table, packed, augment=config, patch=256), batch_size=BATCH, training=True
            )
        ),
        "peer": passes(DataLoader(OneByOne(table, folder, config), batch_size=BATCH, shuffle=True)),
        "np.load": lambda: [np.load(path) for path in paths],
    }
    times = interleaved(functions, repeats=9)
    each = {name: milliseconds([took / len(table) for took in found]) for name, found in times.items()}
    found = ratio(times["peer"], times["varied"])
    yield Row(
        "augmented radiographs with masks, one process",
        f"JPEG read, decoded and varied as float one by one, {each['peer']} an image",
        f"{each['varied']} an image; {spread(found, 1)} × faster",
        "≥ 5 ×",
        found[0] >= 5,
    )
    for name, what in (("plain", "radiographs as packed"), ("patches", "augmented patches of 256 pixels")):
        yield Row(
            f"{what}, one process",
            f"`np.load` of the same files, {each['np.load']} an image",
            f"{each[name]} an image",
        )


def training(folder: Path) -> Iterator[Row]:
    """An epoch as it is trained, against the same batches through the bare network."""
    table, packed = read_images(folder), folder / "packed"
    torch.manual_seed(0)
    network = RadiographModel(RadiographConfig())
    bare = RadiographModel(RadiographConfig()).train()
    dataset = RadiographDataset(table, packed, augment=ImageAugment())
    loader = image_loader(dataset, batch_size=BATCH, training=True)
    accelerator, optimizer = Accelerator(cpu=True), adamw(network, 2e-3, 0.02)
    loss = RadiographLoss(LossConfig(), dataset.labels)
    batches = [batch["image"] for batch in loader]

    def epoch() -> None:
        rates = [2e-3] * len(loader.batch_sampler.step_sizes)
        train_epoch(
            accelerator,
            network,
            optimizer,
            loader,
            lambda model, batch: loss(model(batch["image"]), batch),
            rates=rates,
            clip_norm=5.0,
            seed=(0, 1),
        )

    def alone() -> None:
        for images in batches:
            output = bare(images)
            (output.logit.mean() + output.mask_logit.mean()).backward()
            bare.zero_grad()

    times = interleaved({"epoch": epoch, "alone": alone}, repeats=5)
    share = ratio(times["alone"], times["epoch"])
    yield Row(
        f"training step, {BATCH} radiographs loaded, varied and learned from in one process",
        "bare network forward + backward, the same batches in memory, float32",
        f"{spread(share)} of its throughput; "
        f"{milliseconds([took / sum(map(len, batches)) for took in times['epoch']])} an image",
        "≥ 0.9",
        share[0] >= 0.9,
    )


def networks() -> Iterator[Row]:
    """A training step and inference of our network, against general-purpose decoders on the same encoder."""
    batch = {
        "image": torch.randint(0, 256, (BATCH, 448, 384), dtype=torch.uint8),
        "mask": torch.zeros(BATCH, 112, 96, dtype=torch.uint8),
        "label": (torch.arange(BATCH) % 2).float(),
        "annotated": torch.ones(BATCH, dtype=torch.bool),
    }
    batch["mask"][1::2, 40:50, 30:45] = 255
    # Without the weights' package: what they are does not change how long they take.
    own = RadiographModel(RadiographConfig(), load_pretrained=False)
    learning = RadiographModel(RadiographConfig(pretrained=None, frozen_blocks=0))
    steps = {"own": step_of(own, batch), "own, nothing frozen": step_of(learning, batch)}
    passes = {"own": inference_of(own.folded(), batch["image"])}
    peers = library_networks()
    for name, peer in peers.items():
        steps[name] = step_of(peer, batch)
        passes[name] = inference_of(peer, batch["image"])
    trained, scored = interleaved(steps, repeats=3), interleaved(passes, repeats=3)
    size = f"batch {BATCH}, float32, {torch.get_num_threads()} threads"
    yield Row(
        "training step of the network, three blocks frozen",
        f"nothing frozen, {size}",
        f"{spread(ratio(trained['own, nothing frozen'], trained['own']), 1)} × faster; "
        f"{milliseconds(trained['own'])} a step",
        note=f"{millions(own)} of its weights learn",
    )
    seconds_an_image = statistics.median(scored["own"]) / BATCH
    yield Row(
        "inference of the network, without the disk",
        "0.15 s an image on one core",
        f"{seconds_an_image:.3f} s an image, {torch.get_num_threads()} threads",
        "≤ 0.15 s",
        seconds_an_image <= 0.15,
    )
    for name, peer in peers.items():
        yield Row(
            "light decoder and presence head",
            f"{name} of segmentation-models-pytorch with `aux_params`, the same encoder, {size}",
            f"a training step {spread(ratio(trained[name], trained['own, nothing frozen']), 1)} × faster "
            f"with nothing frozen, {spread(ratio(trained[name], trained['own']), 1)} × as trained; "
            f"inference {spread(ratio(scored[name], scored['own']), 1)} ×",
            note=f"{millions(learning)} weights against {millions(peer)}",
        )
    if not peers:
        yield Row(
            "light decoder and presence head",
            "segmentation-models-pytorch",
            "not measured: it is not installed here",
            note="`pip install segmentation-models-pytorch`, then `python -m benchmarks radiographs`",
        )


def answers() -> Iterator[Row]:
    """What an image costs from its file to probability and mask, one by one, where the run is shipped."""
    folder, run = cohort_dir("fracatlas_sample"), run_dir("fracatlas")
    if not ((folder / "images.csv").is_file() and (run / "run.json").is_file()):
        return
    paths = [folder / file for file in read_images(folder)["file"]]

    def answering(predictor: Predictor) -> Callable[[], None]:
        return lambda: [predictor.predict(read_radiograph(path)) for path in paths]

    functions = {
        "one view": answering(Predictor.of(run, tta=False)),
        f"{len(VIEWS)} mirrored views": answering(Predictor.of(run, tta=True)),
    }
    for name, times in interleaved(functions, repeats=3).items():
        each, is_plain = statistics.median(times) / len(paths), name == "one view"
        yield Row(
            f"answer of the run `fracatlas`, from the file to probability and mask, one by one, {name}",
            "0.15 s an image on one core" if is_plain else "",
            f"{each:.3f} s an image, {torch.get_num_threads()} threads",
            "≤ 0.15 s" if is_plain else "",
            each <= 0.15 if is_plain else None,
        )


class LibraryNetwork(nn.Module):
    """A network of segmentation-models-pytorch that takes and gives what ours does."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: torch.Tensor) -> RadiographOutput:
        """Grey as three channels; the mask, which it gives at every pixel, at cells of 4 × 4."""
        grey = images.unsqueeze(1).float().div(127.5).sub(1).expand(-1, 3, -1, -1)
        mask_logit, logit = self.network(grey.contiguous(memory_format=torch.channels_last))
        return RadiographOutput(logit.squeeze(1), nn.functional.avg_pool2d(mask_logit, 4).squeeze(1))


def library_networks() -> dict[str, nn.Module]:
    """U-Net and FPN of the library, by name; none where it is not installed."""
    try:
        library = import_module("segmentation_models_pytorch")
    except ModuleNotFoundError:
        return {}
    aux = {"pooling": "avg", "dropout": 0.3, "classes": 1}
    made = {
        name: getattr(library, name)("tu-tf_efficientnet_lite0", encoder_weights=None, aux_params=aux)
        for name in ("Unet", "FPN")
    }
    return {name: LibraryNetwork(each.to(memory_format=torch.channels_last)) for name, each in made.items()}


def step_of(network: nn.Module, batch: dict[str, torch.Tensor]) -> Callable[[], None]:
    """A training step without the trainer: forward, loss, backward, optimizer."""
    loss, optimizer = RadiographLoss(LossConfig(), batch["label"].numpy()), adamw(network, 1e-4, 0.02)

    def step() -> None:
        network.train()
        loss(network(batch["image"]), batch).backward()
        nn.utils.clip_grad_norm_(network.parameters(), 5.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def inference_of(network: nn.Module, images: torch.Tensor) -> Callable[[], None]:
    def score() -> None:
        with torch.inference_mode():
            network.eval()(images)

    return score


def millions(network: nn.Module) -> str:
    """Weights that learn."""
    return f"{sum(each.numel() for each in network.parameters()) / 1e6:.1f} million"
