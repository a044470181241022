"""Loader: sequences of 15 × 224² × 6, uint8.

Sequences of the built-in cohort (or, without it, smooth noise), brought to 224 pixels and 15 slices; files in
the page cache; one thread a process.
"""

import math
import os
import resource
import statistics
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from time import perf_counter

import albumentations as A
import cv2
import numpy as np
import pandas as pd
import torch
from torch.utils.data import DataLoader, Dataset

from benchmarks.measure import Row, in_fresh_process, interleaved, milliseconds, ratio, spread
from cspine_helpers.dataset import augment
from cspine_helpers.dataset import sequence as loading
from cspine_helpers.dataset.augment import AugmentConfig
from cspine_helpers.dataset.sequence import SequenceDataset, make_loader
from cspine_helpers.files.paths import cohort_dir
from cspine_helpers.labels import UID
from cspine_helpers.packed import CHANNELS, MASK, open_sequence, sequence_path, write_sequence

SLICES, SIZE, FILES, BATCH = 15, 224, 16, 8
LARGE = 512  # sequences of the cohort that memory is watched on, 2.2 GiB
LIMIT = 3 * 2**29  # bytes of data that a process may have then, less than the cohort
STEPS = {
    "read": (loading, "open_sequence"),
    "flip": (augment._Flip, "apply"),
    "affine": (augment._Affine, "move"),
    "contrast": (augment._Contrast, "apply"),
    "noise, drawn": (augment._Noise, "get_params_dependent_on_data"),
    "noise, added": (augment._Noise, "apply"),
    "dropout": (augment._Dropout, "apply"),
}
REST = "rest"
REASONS = {
    "read": "Header checked and file mapped; its pages are read by whichever step comes first.",
    "affine": "The one step that interpolates, in seven of ten sequences. OpenCV's bare warp of the same "
    "pixels, handed to it as images of four channels (three for two slices), takes {warp:.2f} of its time; "
    "the rest parts and joins the six channels and sharpens the mask.",
    "contrast": "Half of the sequences: OpenCV's weighted sum, and the mask put back.",
    "noise, drawn": "Normal numbers for one slice and its channels, which all slices share.",
    REST: "Fresh memory for the batch, one copy into it, random streams, `Compose`, labels and truth.",
}


class PerSlice(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """The peer: each slice goes through one `Compose` for image and one for mask, in float from then on.

    So do public notebooks on RSNA 2022; the steps and their probabilities are ours.
    """

    def __init__(self, paths: list[Path], config: AugmentConfig) -> None:
        c = config
        limits, side = (-c.contrast_limit, c.contrast_limit), (c.hole_size / 2, c.hole_size)
        geometry = [
            A.HorizontalFlip(p=c.flip),
            A.Affine(
                rotate=(-c.rotate_degrees, c.rotate_degrees),
                scale=(1 - c.scale, 1 + c.scale),
                translate_percent=(-c.shift, c.shift),
                keep_ratio=True,
                p=c.affine,
            ),
        ]
        intensity = [
            A.RandomBrightnessContrast(limits, limits, p=c.contrast),
            A.GaussNoise(std_range=(0, c.noise_std), p=c.noise),
            A.CoarseDropout((1, c.holes), side, side, p=c.dropout),
            A.Normalize(mean=(0.5,) * MASK, std=(0.25,) * MASK),
        ]
        self.image, self.mask, self.paths = A.Compose(geometry + intensity), A.Compose(geometry), paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        slices = []
        for pixels in np.load(self.paths[index]):
            image = self.image(image=np.ascontiguousarray(pixels[..., :MASK]))["image"]
            mask = self.mask(image=np.ascontiguousarray(pixels[..., MASK]))["image"]
            slices.append(np.concatenate([image, mask[..., None].astype(np.float32) / 255], axis=-1))
        sequence = np.stack(slices).transpose(0, 3, 1, 2)  # (T, 6, H, W)
        return torch.from_numpy(np.ascontiguousarray(sequence)), torch.tensor(0.0)


def pixels() -> Iterator[np.ndarray]:
    """`(15, 224, 224, 6)` sequences, without end."""
    files = sorted((cohort_dir("builtin") / "packed").glob("*.npy"))
    rng = np.random.default_rng(0)
    for number in count():
        noise = rng.integers(0, 256, (SLICES, 16, 16, CHANNELS), dtype=np.uint8)
        small = np.load(files[number % len(files)]) if files else noise
        order = np.linspace(0, len(small) - 1, SLICES).round().astype(int)
        sequence = np.stack([cv2.resize(small[t], (SIZE, SIZE)) for t in order])
        sequence[..., MASK] = 255 * (sequence[..., MASK] > 127)
        yield sequence


def dataset(folder: Path, number: int, **options: object) -> SequenceDataset:
    """A dataset of so many files in this folder, made where they are not: the first ones under more names."""
    samples = pd.DataFrame({UID: [f"1.2.{i}" for i in range(number)], "vertebra": "C1", "label": 0})
    made = pixels()
    for i, uid in enumerate(samples[UID]):
        path = sequence_path(folder, uid, "C1")
        if not path.exists():
            if i < FILES:
                write_sequence(folder, uid, "C1", next(made))
            else:
                os.link(sequence_path(folder, samples[UID][i % FILES], "C1"), path)
    return SequenceDataset(samples, folder, slices=SLICES, size=SIZE, **options)


def passes(loader: DataLoader) -> Callable[[], None]:
    """A call goes through the loader once, every time in another epoch."""
    epochs = count()

    def one() -> None:
        if hasattr(loader.batch_sampler, "set_epoch"):
            loader.batch_sampler.set_epoch(next(epochs))
        for _batch in loader:
            pass

    return one


@contextmanager
def timed(totals: dict[str, float]) -> Iterator[None]:
    """Add up the seconds of every step while the block runs."""

    def clock(name: str, function: Callable) -> Callable:
        def call(*arguments: object, **options: object) -> object:
            start = perf_counter()
            result = function(*arguments, **options)
            totals[name] += perf_counter() - start
            return result

        return call

    plain = {name: getattr(owner, step) for name, (owner, step) in STEPS.items()}
    for name, (owner, step) in STEPS.items():
        setattr(owner, step, clock(name, plain[name]))
    try:
        yield
    finally:
        for name, (owner, step) in STEPS.items():
            setattr(owner, step, plain[name])


def profile(folder: Path, epochs: int = 8) -> dict[str, float]:
    """Milliseconds of an augmented sequence by step, averaged over many draws; medians of three rounds."""
    data, rounds = dataset(folder, FILES, augment=AugmentConfig()), []
    for first in (0, epochs, 2 * epochs):
        totals = dict.fromkeys(STEPS, 0.0)
        with timed(totals):
            start = perf_counter()
            for epoch in range(first, first + epochs):
                for begin in range(0, FILES, BATCH):
                    data.__getitems__([(epoch, begin + i) for i in range(BATCH)])
            whole = perf_counter() - start
        totals[REST] = whole - sum(totals.values())
        rounds.append({name: 1000 * spent / (FILES * epochs) for name, spent in totals.items()})
    return {name: statistics.median(each[name] for each in rounds) for name in rounds[0]}


def bare_warp(folder: Path) -> float:
    """Time of OpenCV's own warp, on images of four channels made before, over that of our step."""
    sequence = np.array(open_sequence(sequence_path(folder, "1.2.0", "C1")))
    many = math.ceil(SLICES * CHANNELS / 4)
    fours = [np.ascontiguousarray(sequence[i % SLICES, ..., :4]) for i in range(many)]
    step, matrix = augment._Affine(), np.array([[1, 0.1, -5], [-0.1, 1, 5], [0, 0, 1]])
    functions = {
        "bare": lambda: [cv2.warpAffine(four, matrix[:2], (SIZE, SIZE)) for four in fours],
        "step": lambda: [step.move(list(sequence[i : i + 2]), matrix) for i in range(0, SLICES, 2)],
    }
    times = interleaved(functions, repeats=30)
    return ratio(times["bare"], times["step"])[0]


def used_mib(pids: list[int]) -> float:
    """Memory these processes hold together that is no file's: shared pages counted once, MiB."""
    total = 0
    for pid in pids:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            name, *value = line.split()
            total += int(value[0]) if name in ("Pss_Anon:", "Pss_Shmem:") else 0
    return total / 2**10


def watch(folder: str, workers: int) -> tuple[float, float]:
    """Mean memory in the second quarter of an epoch over the large cohort, and in its last, MiB."""
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    data = dataset(Path(folder), LARGE, augment=AugmentConfig())
    loader = make_loader(data, batch_size=BATCH, sampling="shuffle", workers=workers)
    resource.setrlimit(resource.RLIMIT_DATA, (LIMIT, LIMIT))  # workers inherit it
    iterator = iter(loader)
    pids = [os.getpid(), *(worker.pid for worker in getattr(iterator, "_workers", ()))]
    used = [used_mib(pids) for _batch in iterator]
    quarter = len(used) // 4
    return statistics.mean(used[quarter : 2 * quarter]), statistics.mean(used[3 * quarter :])


def rows() -> Iterator[Row]:
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        yield from speed(folder)
        yield from steps(folder)
        yield from memory(folder)


def speed(folder: Path) -> Iterator[Row]:
    paths = [sequence_path(folder, f"1.2.{i}", "C1") for i in range(FILES)]
    varied = dataset(folder, FILES, augment=AugmentConfig())
    functions = {
        "varied": passes(make_loader(varied, batch_size=BATCH, sampling="shuffle")),
        "plain": passes(make_loader(dataset(folder, FILES), batch_size=BATCH)),
        "peer": passes(DataLoader(PerSlice(paths, AugmentConfig()), batch_size=BATCH)),
        "np.load": lambda: [np.load(path) for path in paths],
    }
    times = interleaved(functions, repeats=11)
    each = {name: milliseconds([took / FILES for took in times[name]]) for name in times}
    found = ratio(times["peer"], times["varied"])
    yield Row(
        "augmented sequences, one process",
        f"per-slice float pipeline, {each['peer']} a sequence",
        f"{each['varied']} a sequence; {spread(found, 1)} × faster",
        "≥ 8 ×",
        found[0] >= 8,
    )
    for name, what in (("varied", "augmented sequences"), ("plain", "sequences as packed")):
        share = spread(ratio(times["np.load"], times[name]))
        yield Row(
            f"{what}, one process: share of reading",
            f"`np.load` of the same files, {each['np.load']} a sequence",
            f"{each[name]} a sequence; share {share}",
        )
    many = dataset(folder, 6 * FILES, augment=AugmentConfig())
    loaders = (make_loader(many, batch_size=BATCH, sampling="shuffle", workers=n) for n in (0, 2))
    times = interleaved(dict(zip(("one", "two"), map(passes, loaders), strict=True)), repeats=5)
    yield Row(
        "augmented sequences, two workers",
        "one process",
        f"{milliseconds([took / len(many) for took in times['two']])} a sequence; "
        f"{spread(ratio(times['one'], times['two']))} × faster",
        note="A worker's batch crosses through shared memory, whose pages the system hands out anew.",
    )


def steps(folder: Path) -> Iterator[Row]:
    spent = profile(folder)
    whole, warp = sum(spent.values()), bare_warp(folder)
    for name, took in sorted(spent.items(), key=lambda item: -item[1]):
        yield Row(
            f"of an augmented sequence: {name}",
            f"all steps, {whole:.3g} ms",
            f"{took:.2g} ms, {took / whole:.0%}",
            note=REASONS.get(name, "").format(warp=warp),
        )


def memory(folder: Path) -> Iterator[Row]:
    data = dataset(folder, LARGE)
    size = LARGE * SLICES * SIZE**2 * CHANNELS / 2**30
    code = "import sys; from benchmarks.loader import watch; print(*watch(sys.argv[1], int(sys.argv[2])))"
    for workers in (0, 2):
        early, late = map(float, in_fresh_process(code, str(folder), str(workers)).split())
        yield Row(
            f"memory over an epoch of {LARGE} sequences, {size:.1f} GiB, {workers} workers",
            "second quarter of the epoch",
            f"{early:.0f} MiB, then {late:.0f} MiB in the last",
            "growth ≤ 16 MiB",
            late - early <= 16,
            f"The cohort is {FILES} files under {LARGE} names. "
            "Means over batches, of all processes together, mapped files aside, shared pages counted once. "
            f"No process was allowed more than {LIMIT / 2**30:g} GiB of data, and none needed it.",
        )
    kept = sum(array.nbytes for array in vars(data).values() if isinstance(array, np.ndarray)) / LARGE
    yield Row(
        "a dataset's table",
        "memory",
        f"{kept:.0f} bytes a sample",
        note="Plain arrays, which workers share; a list of paths they would copy, counting its references.",
    )
