"""Radiographs: 384 × 320 uint8 read, varied and batched, and a training's steps on them, one thread.

Images of the cohort `fracatlas` or of its sample (without them, drawn noise as JPEGs of 512 pixels); files in
the page cache.
"""

import os
import tempfile
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import albumentations as A
import cv2
import numpy as np
import pandas as pd
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, Dataset

from benchmarks.measure import Row, interleaved, milliseconds, ratio, spread
from cspine_helpers.files.paths import cohort_dir
from cspine_helpers.radiographs.annotations import rasterise
from cspine_helpers.radiographs.dataset import ImageAugment, RadiographDataset, image_loader, pack_images
from cspine_helpers.radiographs.losses import LossConfig, RadiographLoss
from cspine_helpers.radiographs.model import RadiographConfig, RadiographModel
from cspine_helpers.radiographs.sources import consolidate, read_images, read_regions, read_yolo
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
                A.LongestMaxSize(384),
                A.PadIfNeeded(384, 384),
                A.CenterCrop(384, 320),
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
