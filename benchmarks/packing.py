"""CT to packed sequences: against reading alone, stage by stage, memory, two processes, and studies an hour.

SimpleITK reads the same series alone, on one core: the names in order, then the slices. Packing has a second
thread for SHA-256 and the mask. The series is a phantom at clinical size, 512 × 512 × 400; its mask is an
uncompressed NIfTI on the same grid.
"""

import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import cv2
import numpy as np
import pandas as pd
from scipy import ndimage

from benchmarks.measure import Row, in_fresh_process, interleaved, ratio, spread
from cspine_helpers.ct import dicom, reading, stack
from cspine_helpers.ct.volume import simpleitk
from cspine_helpers.labels import BOX_COLUMNS
from cspine_helpers.packing import study
from cspine_helpers.packing.cohort import PackSource, pack_cohort
from cspine_helpers.packing.crop import PackConfig
from cspine_helpers.packing.study import StudyFiles
from cspine_helpers.phantom.rendering import render_study
from cspine_helpers.phantom.scanner import write_label_map, write_series

SHAPE, SPACING_MM = (400, 512, 512), (0.6, 0.45, 0.45)
VOLUME_MIB = 4 * np.prod(SHAPE) / 2**20
RSNA_STUDIES = 2019
STUDIES = 4  # packed at once
STAGES = {  # what a study's time goes into: where it is called from, and by what name
    "headers": (dicom, "read_header"),
    "decoding": (dicom, "_read_at_once"),
    "values beside their neighbours'": (stack, "_check_values"),
    "Hounsfield scale": (reading, "_check_hu"),
    "mask on the CT's grid": (study, "place"),
    "vertebrae": (study, "find_vertebrae"),
    "cutting": (study, "pack_vertebra"),
    "writing": (study, "write_sequence"),
    "beside: SHA-256": (study, "_hashes"),
    "beside: mask": (study, "read_mask"),
}
MEMORY = """
import sys
from pathlib import Path
import pandas as pd
from cspine_helpers.ct import dicom, reading, stack
from cspine_helpers.ct.volume import simpleitk
from cspine_helpers.labels import BOX_COLUMNS
from cspine_helpers.packing.crop import PackConfig
from cspine_helpers.packing.study import StudyFiles, pack_study
simpleitk()
def peak_mib():  # of this process; rusage's begins with that of the one it was forked from
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) / 1024 for line in status if line.startswith("VmHWM"))
before, folder = peak_mib(), Path(sys.argv[1])
boxes = pd.DataFrame(columns=list(BOX_COLUMNS))
files = StudyFiles("1.2.3", folder / sys.argv[2], folder / "mask.nii", "rsna", None, None, boxes)
pack_study(files, folder / "memory", PackConfig())
print(peak_mib() - before)
"""


def clinical_study() -> tuple[np.ndarray, np.ndarray]:
    """A phantom on a clinical grid, in a field that is wider and higher: HU int16 and labels."""
    drawn = render_study(3, 0, {"C2": 1, "C5": 1})
    zoom = np.divide(drawn.spacing_mm, SPACING_MM)
    inner = np.rint(ndimage.zoom(drawn.volume_hu, zoom, order=1)).astype(np.int16)
    hu, labels = np.full(SHAPE, -1000, np.int16), np.zeros(SHAPE, np.uint8)
    start = np.subtract(SHAPE, inner.shape) // 2
    place = tuple(slice(a, a + n) for a, n in zip(start, inner.shape, strict=True))
    hu[place], labels[place] = inner, ndimage.zoom(drawn.label_map, zoom, order=0)
    hu += (
        np.random.default_rng(0).normal(0, 12, SHAPE).astype(np.int16)
    )  # noise: what compression has to keep
    return hu, labels


def compress(source: Path, target: Path, compressor: str) -> None:
    """The series again, compressed without loss, the way archives hold CT."""
    sitk = simpleitk()
    target.mkdir()
    for path in source.iterdir():
        image = sitk.ReadImage(str(path), imageIO="GDCMImageIO")
        writer = sitk.ImageFileWriter()
        writer.KeepOriginalImageUIDOn()
        writer.UseCompressionOn()
        writer.SetCompressor(compressor)
        writer.SetFileName(str(target / path.name))
        writer.Execute(image)


def read_alone(folder: Path) -> None:
    """What SimpleITK's own example does to read a series."""
    reader = simpleitk().ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    reader.Execute()


def pack(folder: Path, series: str) -> None:
    boxes = pd.DataFrame(columns=list(BOX_COLUMNS))
    files = StudyFiles("1.2.3", folder / series, folder / "mask.nii", "rsna", None, None, boxes)
    study.forget(folder / "packed", files.uid)
    study.pack_study(files, folder / "packed", PackConfig())


def pack_by_stage(folder: Path, series: str) -> dict[str, float]:
    """Seconds of one packing that each stage takes."""
    took = dict.fromkeys(STAGES, 0.0)

    def timed(stage: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **options: Any) -> Any:
            start = time.perf_counter()
            try:
                return call(*arguments, **options)
            finally:
                took[stage] += time.perf_counter() - start

        return run

    with ExitStack() as patches:
        for stage, (module, name) in STAGES.items():
            patches.enter_context(patch.object(module, name, timed(stage, getattr(module, name))))
        pack(folder, series)
    return took


def pack_several(folder: Path, workers: int, sheets: Path | None = None) -> None:
    shutil.rmtree(folder / "packed", ignore_errors=True)
    report = pack_cohort(folder, source=PackSource.of(folder), sheets=sheets, workers=workers)
    assert (report["status"] == "packed").all(), report


def rows() -> Iterator[Row]:
    cv2.setNumThreads(1)
    simpleitk().ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        hu, labels = clinical_study()
        write_series(folder / "plain", hu, SPACING_MM, study_uid="1.2.3")
        write_label_map(folder / "mask.nii", labels, SPACING_MM)
        del hu, labels
        compress(folder / "plain", folder / "jpeg", "JPEG")
        compress(folder / "plain", folder / "j2k", "JPEG2000")
        seconds_of = {}
        for series, stored, repeats, note in (
            ("j2k", "JPEG 2000 lossless", 2, ""),
            ("jpeg", "JPEG lossless", 3, ""),
            (
                *("plain", "uncompressed, in the page cache", 7),
                "nothing is decoded and nothing comes from a disk, so that reading is little more than "
                "copying; the rows below show where the time goes.",
            ),
        ):
            calls = {
                "pack": lambda s=series: pack(folder, s),
                "read": lambda s=series: read_alone(folder / s),
            }
            times = interleaved(calls, repeats=repeats)
            found = ratio(times["pack"], times["read"])
            seconds_of[series] = statistics.median(times["pack"])
            took = f"{seconds_of[series]:.2f} s against {statistics.median(times['read']):.2f} s"
            what = f"a study of 400 slices packed; {stored}"
            yield Row(
                what,
                "SimpleITK reading the series",
                f"{took}: {spread(found)} ×",
                "≤ 1.3 ×",
                found[0] <= 1.3,
                note,
            )
            rounds = [pack_by_stage(folder, series) for _ in range(3)]
            split = {stage: statistics.median(took[stage] for took in rounds) for stage in STAGES}
            stages = ", ".join(f"{stage} {seconds:.2f}" for stage, seconds in split.items())
            yield Row(f"seconds by stage; {stored}", "", stages)
        for series in ("plain", "jpeg"):
            peak = float(in_fresh_process(MEMORY, str(folder), series))
            found = float(peak / VOLUME_MIB)
            what = f"peak memory of packing it ({series}), beyond what the imports take"
            yield Row(
                what, "the volume in float32", f"{peak:.0f} MiB: {found:.2f} ×", "≤ 2.5 ×", found <= 2.5
            )
        cohort = folder / "cohort"
        for number in range(1, STUDIES + 1):
            path = cohort / "train_images" / f"1.2.{number}"
            path.parent.mkdir(parents=True, exist_ok=True)
            os.symlink(folder / "jpeg", path)
            (cohort / "segmentations").mkdir(exist_ok=True)
            os.symlink(folder / "mask.nii", cohort / "segmentations" / f"1.2.{number}.nii")
        pack_several(cohort, 2)  # the workers start
        calls = {str(n): lambda n=n: pack_several(cohort, n) for n in (1, 2)}
        calls["sheets"] = lambda: pack_several(cohort, 2, folder / "sheets")
        times = interleaved(calls, repeats=3, warm_up=0)
        found = ratio(times["1"], times["2"])
        each = {name: statistics.median(took) / STUDIES for name, took in times.items()}
        rate = f"{3600 / each['2']:.0f} against {3600 / each['1']:.0f} studies an hour"
        rate += f": {spread(found)} × as many"
        yield Row(
            f"{STUDIES} studies (JPEG lossless), two processes",
            "one process",
            rate,
            "≥ 1.8 ×",
            found[0] >= 1.8,
        )
        for name, what in (("2", "without contact sheets"), ("sheets", "with a contact sheet a study")):
            hours = RSNA_STUDIES * each[name] / 3600
            took = f"{3600 / each[name]:.0f} studies an hour; {hours:.1f} h for {RSNA_STUDIES:,} studies"
            yield Row(f"two cores, {what}", "", took)
