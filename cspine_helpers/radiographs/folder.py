"""Any folder of radiographs answered by a run: a table, masks, pictures, and what could not be read.

Everything is written beside the folder that was asked for and takes its name when it is whole, so that a stop
leaves nothing behind.
"""

import hashlib
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path, PurePosixPath
from typing import Any, Literal, NamedTuple

import cv2
import numpy as np
import pandas as pd
from numpy.typing import NDArray
from tqdm.auto import tqdm

from cspine_helpers.checkpoints import Run
from cspine_helpers.decisions.test_split import DECISION, check_belongs, read_decision
from cspine_helpers.decisions.thresholds import check_threshold
from cspine_helpers.explain.maps import Method
from cspine_helpers.files.paths import exchange, exclusive, inside, listing, printable, sha256_of
from cspine_helpers.files.tables import write_table
from cspine_helpers.inference.prediction import PREDICTIONS
from cspine_helpers.inference.study import CHOSEN, FROZEN, GIVEN, NOTICE
from cspine_helpers.predictions import read_predictions
from cspine_helpers.radiographs.annotations import encode_rle
from cspine_helpers.radiographs.blend import BLEND, read_blend
from cspine_helpers.radiographs.cohort import SPLIT, is_radiographs, read_radiograph_cohort
from cspine_helpers.radiographs.image_ids import file_ids
from cspine_helpers.radiographs.images import Frame, holds_no_image, read_radiograph, why_unusable
from cspine_helpers.radiographs.maps import map_radiographs
from cspine_helpers.radiographs.masks import MASKS
from cspine_helpers.radiographs.model import RadiographConfig, RadiographModel
from cspine_helpers.radiographs.prediction import Answer, Predictor
from cspine_helpers.runs import recorded_cohort
from cspine_helpers.splits import split_hash

UNREADABLE, OVERLAYS, MAPS = "unreadable.csv", "overlays", "maps.csv"
_OF_DICOM = (".dcm", ".dicom", ".ima")
SUFFIXES = frozenset(
    (
        *(".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".tif", ".tiff", ".bmp", ".gif", ".webp"),
        *(".jp2", ".j2k", ".pgm", ".pnm", *_OF_DICOM),
    )
)
_DICOM_MARK, _PREAMBLE = b"DICM", 128  # bytes of a DICOM file, and where they are
_OUTLINE = (233, 180, 86)  # sky blue, as figures draw what is predicted; blue, green, red
_SMALLEST = 32  # pixels of a side: of less, nothing can be seen that a network was trained on
_LONGEST = 240  # bytes of a file's name, of 255 that disks take
_OPACITY = 0.7  # of a map's maximum in pictures
_OWN = {PREDICTIONS, MASKS, MAPS, UNREADABLE, OVERLAYS}  # what is written, and may be replaced


@dataclass(frozen=True)
class FolderPrediction:
    """What a run says of a folder of radiographs.

    Attributes:
        folder: where it was written.
        table: one row an image: `file` (below the folder that was asked about), `probability`, `called` (0/1,
            at or above the threshold), `mask_pixels`, `height`, `width`, `trained_on` (1 where the run was
            trained on these pixels; missing where that is not known).
        unreadable: `file` and `reason`; a folder that cannot be opened, too.
        others: how many files are no radiographs by their name, or DICOM that holds no image.
        threshold: probability from which an image is called.
        threshold_source: `frozen decision`, `blend.json`, `run.json` or `given`.
        warnings: what to know before believing it, a sentence each.
        positive: what a called image is, a word: "fractured", "abnormal".
    """

    folder: Path
    table: pd.DataFrame
    unreadable: pd.DataFrame
    others: int
    threshold: float
    threshold_source: str
    warnings: tuple[str, ...]
    positive: str = "fractured"

    def summary(self) -> str:
        """The answer in a few lines of text."""
        called = int(self.table["called"].sum())
        lines = [
            f"{len(self.table):,} radiographs, {called:,} called {self.positive} (probability at or above "
            f"{self.threshold:.4g}, from {self.threshold_source}): {self.folder}",
        ]
        if len(self.unreadable):
            names = listing(self.unreadable["file"])
            lines.append(f"Not readable ({len(self.unreadable):,}), see {UNREADABLE}: {names}")
        if self.others:
            lines.append(
                f"{self.others:,} files are no images by their names, or DICOM without one: they were left "
                "alone."
            )
        lines += [f"Warning: {text}" for text in self.warnings]
        return "\n".join([*lines, f"{NOTICE} The absence of a call is no all-clear."])


class Search(NamedTuple):
    """What `find_radiographs` found.

    Attributes:
        files: images, sorted.
        others: how many files are none.
        closed: what cannot be opened, folders too → why.
    """

    files: list[Path]
    others: int
    closed: dict[Path, str]


def find_radiographs(folder: str | Path) -> Search:
    """Images below a folder, by their names, DICOM files without one by content.

    Hidden files and folders are passed over, links to folders not followed. DICOM that holds no image, such
    as the directory of a CD, is none.

    Raises:
        FileNotFoundError: there is no such folder, or no image in it.
        ImportError: there is DICOM, and the libraries of the group ct are not installed.

    Example:
        >>> find_radiographs("nowhere")
        Traceback (most recent call last):
        ...
        FileNotFoundError: No folder at nowhere. Name one that holds radiographs.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"No folder at {folder}. Name one that holds radiographs.")
    found, others, closed = [], 0, dict[Path, str]()

    def refused(error: OSError) -> None:
        closed[Path(error.filename or folder)] = (
            f"it is a folder that cannot be opened: {why_unusable(error)}"
        )

    for where, folders, names in os.walk(folder, onerror=refused):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for path in (Path(where, name) for name in sorted(names) if not name.startswith(".")):
            try:
                is_image = _is_image(path)
            except OSError as error:
                closed[path] = why_unusable(error)
                continue
            if is_image:
                found.append(path)
            else:
                others += 1
    if not found:
        shut = f" What cannot be opened ({len(closed):,}): {listing(map(str, closed))}." if closed else ""
        raise FileNotFoundError(
            f"No radiograph in {folder}, nor in its folders ({others:,} other files). They are known by "
            f"{listing(sorted(SUFFIXES), quoted=False)}, DICOM files by their content, too.{shut}"
        )
    return Search(found, others, closed)


def _is_image(path: Path) -> bool:
    """Whether a file is an image by its name, or DICOM that may hold one."""
    suffix = path.suffix.lower()
    if suffix in SUFFIXES and (suffix not in _OF_DICOM or not path.is_file()):
        return True
    return (suffix in _OF_DICOM or _is_dicom(path)) and not holds_no_image(path)


def _is_dicom(path: Path) -> bool:
    """Whether a file whose name says nothing begins as DICOM files do."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return file.read(_PREAMBLE + len(_DICOM_MARK))[_PREAMBLE:] == _DICOM_MARK


def predict_folder(
    run_folder: str | Path,
    folder: str | Path,
    out: str | Path,
    *,
    tta: bool | None = None,
    threshold: float | None = None,
    device: str = "cpu",
    overlays: bool = True,
    inverted: bool = False,
    replace: bool = False,
) -> FolderPrediction:
    """Predict every radiograph of a folder, and of the folders in it.

    Writes `predictions.csv` (see `FolderPrediction.table`), `masks.csv` (`file`, `height`, `width`, `mask` as
    COCO's run lengths), `unreadable.csv` where there is something to say, and `overlays/`: each image that is
    called or marked, with the marks' outline. All or nothing.

    Args:
        run_folder: of a run or an ensemble.
        folder: any, of PNG, JPEG, TIFF, DICOM.
        out: folder that is made.
        tta: see `Predictor.of`.
        threshold: probability from which an image is called; None: that of the frozen decision, else of the
            frozen blend, else the one that training chose.
        device: "cpu" or "cuda".
        overlays: whether pictures are written.
        inverted: whether bone is dark in these PNG or JPEG files; DICOM and TIFF say so themselves.
        replace: replace what an earlier call wrote there.

    Raises:
        FileExistsError: `out` holds something, and `replace` is not set, or what it holds is not from here.
        FileNotFoundError: there is no run, or no image.
        ValueError: one of the folders lies in the other; there is no threshold; see `Predictor.of`.

    Example:
        >>> predict_folder("fracatlas", "xrays", "answers")
        Traceback (most recent call last):
        ...
        FileNotFoundError: No folder at xrays. Name one that holds radiographs.
    """
    # 1. What is there, and where it goes.
    if threshold is not None:
        check_threshold(threshold)
    folder, out = Path(folder), Path(out)
    _check_apart(folder, out)
    _check_free(out, replace=replace)
    files, others, closed = find_radiographs(folder)
    predictor = Predictor.of(run_folder, tta=tta, device=device)
    limit, source = image_threshold(predictor, threshold)
    known = _Training.of(predictor)

    # 2. Each image.
    rows, masks = [], []
    pictures, unreadable = _pictures([_name(path, folder) for path in files]), _closed(closed, folder)
    with _staged(out, replace=replace) as staging:
        for path, name, image in _readable(files, folder, "predict", unreadable, inverted=inverted):
            answer = predictor.predict(image)
            called = answer.probability >= limit
            rows.append(
                _row(name, image, answer, called, known.holds(path, predictor.frame(*image.shape), image))
            )
            if answer.mask is not None:
                size = {"height": image.shape[0], "width": image.shape[1]}
                masks.append({"file": name, **size, "mask": encode_rle(answer.mask)})
                if overlays and (called or answer.mask.any()):
                    write_overlay(image, answer.mask, staging / OVERLAYS / pictures[name])

        # 3. The tables.
        table = pd.DataFrame(rows, columns=_COLUMNS).astype({"trained_on": "Int64"})
        missing = pd.DataFrame(unreadable, columns=["file", "reason"])
        write_table(table, staging / PREDICTIONS)
        if masks:
            write_table(pd.DataFrame(masks), staging / MASKS)
        if unreadable:
            write_table(missing, staging / UNREADABLE)
    warnings = _warnings(predictor, source, table, known)
    return FolderPrediction(out, table, missing, others, limit, source, warnings, _positive(predictor))


def explain_folder(
    run: Run[RadiographModel, RadiographConfig],
    folder: str | Path,
    out: str | Path,
    *,
    method: Method | Literal["mask"] = "grad_cam",
    layer: str | None = None,
    replace: bool = False,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Map every radiograph of a folder, and of the folders in it, on its own pixels.

    Writes `maps.csv` (what is returned first), `unreadable.csv` where there is something to say, and
    `overlays/`: each image with the positive part of its map in blue, up to its own maximum, which a cross
    marks. Shades of two pictures do not compare, values in the table do. All or nothing.

    Args:
        run: of `load_radiograph_run`.
        folder: any, of PNG, JPEG, TIFF, DICOM.
        out: folder that is made.
        method: of `maps.RADIOGRAPH_METHODS`.
        layer: whose cells are mapped; None: see `maps.map_radiographs`.
        replace: replace what an earlier call wrote there.

    Returns:
        One row an image: `file`, `probability` (of the network's class, not blended with its mask), `method`,
        `highest` (value of the map on the image's pixels), `x` and `y` of it, pixels, missing where nothing
        is above 0 or the map is constant, `height`, `width`. And `file` and `reason` of what cannot be read.

    Raises:
        FileExistsError, FileNotFoundError: as `predict_folder`.
        ValueError: one of the folders lies in the other; method or layer are unknown, see `map_radiographs`.

    Example:
        >>> explain_folder(run, "xrays", "maps")
        Traceback (most recent call last):
        ...
        FileNotFoundError: No folder at xrays. Name one that holds radiographs.
    """
    folder, out = Path(folder), Path(out)
    _check_apart(folder, out)
    _check_free(out, replace=replace)
    files, _, closed = find_radiographs(folder)
    size, rows = {"long": run.config.long, "short": run.config.short}, []
    pictures, unreadable = _pictures([_name(path, folder) for path in files]), _closed(closed, folder)
    with _staged(out, replace=replace) as staging:
        for _, name, image in _readable(files, folder, method, unreadable):
            pixels = Frame.of(*image.shape, **size).pixels(image)
            found = map_radiographs(run, pixels[None], method=method, layer=layer)
            values = found.on_radiograph(0, *image.shape)
            place = _highest(values)
            write_map_overlay(image, values, staging / OVERLAYS / pictures[name])
            y, x = place or (pd.NA, pd.NA)
            height, width = image.shape
            row = (name, float(found.probability[0]), method, float(values.max()), x, y, height, width)
            rows.append(row)
        columns = ["file", "probability", "method", "highest", "x", "y", "height", "width"]
        table = pd.DataFrame(rows, columns=columns).astype({"x": "Int64", "y": "Int64"})
        missing = pd.DataFrame(unreadable, columns=["file", "reason"])
        write_table(table, staging / MAPS)
        if unreadable:
            write_table(missing, staging / UNREADABLE)
    return table, missing


def _highest(values: NDArray[np.float32]) -> tuple[int, int] | None:
    """Row and column of a map's maximum; None where it has no positive part, or is constant."""
    if values.max() <= 0 or np.ptp(values) == 0:
        return None
    row, column = np.unravel_index(values.argmax(), values.shape)
    return int(row), int(column)


def write_map_overlay(image: NDArray[np.uint8], values: NDArray[np.float32], path: Path) -> None:
    """Write a radiograph (H, W) as PNG with the positive part of a map of its shape, its maximum marked."""
    picture = cv2.cvtColor(image, cv2.COLOR_GRAY2BGR)
    if (place := _highest(values)) is not None:
        share = _OPACITY * np.clip(values / values.max(), 0, 1)[..., None]
        picture = np.rint(picture * (1 - share) + np.array(_OUTLINE) * share).astype(np.uint8)
        thick = max(1, round(max(image.shape) / 400))
        for colour, width in (((0, 0, 0), 3 * thick), ((255, 255, 255), thick)):
            cv2.drawMarker(picture, place[::-1], colour, cv2.MARKER_TILTED_CROSS, 10 * thick, width)
    _write_png(picture, path)


_COLUMNS = ["file", "probability", "called", "mask_pixels", "height", "width", "trained_on"]


def _row(
    name: str, image: NDArray, answer: Answer, called: bool, trained_on: bool | None
) -> dict[str, object]:
    return {
        "file": name,
        "probability": answer.probability,
        "called": int(called),
        "mask_pixels": None if answer.mask is None else int(answer.mask.sum()),
        "height": image.shape[0],
        "width": image.shape[1],
        "trained_on": pd.NA if trained_on is None else int(trained_on),
    }


def _name(path: Path, folder: Path) -> str:
    """How answers call a file: its path below the folder that was asked about, as text."""
    return printable(path.relative_to(folder).as_posix())


def _closed(closed: dict[Path, str], folder: Path) -> list[dict[str, str]]:
    """Rows of `unreadable.csv`."""
    return [{"file": _name(path, folder), "reason": why} for path, why in closed.items()]


def _pictures(names: Sequence[str]) -> dict[str, str]:
    """Name of a file → where below `overlays/` its picture goes: that name and `.png`.

    Hashed where it is too long for a disk, numbered where another picture or a folder has it, as a file x
    beside a folder x.png.
    """
    fitting = {name: PurePosixPath(*map(_fitting, PurePosixPath(name).parts)) for name in names}
    taken = {str(folder).casefold() for path in fitting.values() for folder in path.parents}
    found = {}
    for name, path in fitting.items():
        marks = chain([""], (f"-{number}" for number in count(2)))
        free = (f"{path}{mark}.png" for mark in marks)
        found[name] = next(picture for picture in free if picture.casefold() not in taken)
        taken.add(found[name].casefold())
    return found


def _fitting(part: str) -> str:
    """A part of a path, short enough for a disk with the ending of a picture."""
    return part if len(part.encode()) <= _LONGEST else file_ids([part])[0]


def write_overlay(image: NDArray[np.uint8], mask: NDArray[np.uint8], path: Path) -> None:
    """Write a radiograph as PNG with the outline of a mask around its marks, both (H, W)."""
    picture = cv2.cvtColor(image, cv2.COLOR_GRAY2BGR)
    outlines, _ = cv2.findContours(mask, cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
    cv2.drawContours(picture, outlines, -1, _OUTLINE, max(1, round(max(image.shape) / 400)))
    _write_png(picture, path)


def _write_png(picture: NDArray[Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    done, content = cv2.imencode(".png", picture, [cv2.IMWRITE_PNG_COMPRESSION, 1])
    if not done:
        raise OSError(f"{path.name} cannot be written as PNG.")
    path.write_bytes(content.tobytes())  # cv2 itself would not say that a disk is full


def _readable(
    files: list[Path], folder: Path, doing: str, unreadable: list[dict[str, str]], *, inverted: bool = False
) -> Iterator[tuple[Path, str, NDArray[np.uint8]]]:
    """Each file that can be read, its name below the folder, its pixels; the others go to `unreadable`."""
    for path in tqdm(files, desc=doing, unit="image", mininterval=1):
        name = _name(path, folder)
        try:
            image = read_radiograph(path, inverted=inverted)
            _check_size(image)
        except (OSError, ValueError) as error:
            unreadable.append({"file": name, "reason": why_unusable(error)})
            continue
        yield path, name, image


def _check_size(image: NDArray[np.uint8]) -> None:
    if min(image.shape) < _SMALLEST:
        height, width = image.shape
        raise ValueError(f"it has {width} × {height} pixels, and needs {_SMALLEST} a side")


# Where it goes


def _check_apart(folder: Path, out: Path) -> None:
    inner, outer = out.resolve(), folder.resolve()
    if inner.is_relative_to(outer) or outer.is_relative_to(inner):
        raise ValueError(
            f"{out} and {folder} lie in each other, so that pictures would be taken for radiographs the next "
            "time. Name a folder elsewhere."
        )


def _check_free(out: Path, *, replace: bool) -> None:
    inside(out)
    held = sorted(path.name for path in out.iterdir()) if out.is_dir() else []
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"{out} is a file. Name a folder.")
    if held and not replace:
        raise FileExistsError(
            f"{out} holds something already: {listing(held)}. Name another folder, or replace what is there "
            "with replace=True (on the command line, --replace)."
        )
    if foreign := [name for name in held if name not in _OWN]:
        raise FileExistsError(
            f"{out} holds what is no prediction: {listing(foreign)}. It is not replaced: name another folder."
        )


@contextmanager
def _staged(out: Path, *, replace: bool) -> Iterator[Path]:
    """A folder that takes the place of `out` when the block ends well, and goes when it does not."""
    staging = out.with_name(f".{out.name}.unfinished")
    with exclusive(out.with_name(f".{out.name}.lock"), f"writing {out}"):
        shutil.rmtree(staging, ignore_errors=True)  # of a process that was killed
        try:
            staging.mkdir(parents=True)
            yield staging
            _check_free(out, replace=replace)
            if out.is_dir():
                exchange(staging, out)
            else:
                staging.rename(out)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


# What calls an image, and what the run knows


def _positive(predictor: Predictor) -> str:
    """What label 1 meant in the training."""
    sources = (predictor.runs[0].record.get("cohort") or {}).get("sources") or [{}]
    return str(sources[0].get("label_1") or "fractured")


def image_threshold(predictor: Predictor, given: float | None = None) -> tuple[float, str]:
    """The threshold of images, and where it comes from.

    Raises:
        ValueError: there is none, or what is frozen is not of the run's predictions.
    """
    if given is not None:
        return float(given), GIVEN
    if (predictor.folder / DECISION).is_file():
        frozen = read_decision(predictor.folder)
        check_belongs(frozen, read_predictions(predictor.folder / PREDICTIONS))
        if (decision := frozen.decisions.get("image")) is not None:
            return decision.require(), FROZEN
    if predictor.is_frozen:
        chosen, source = read_blend(predictor.folder).threshold, BLEND
    else:
        chosen, source = predictor.runs[0].threshold if len(predictor.runs) == 1 else None, CHOSEN
    if chosen is not None:
        return float(chosen), source
    raise ValueError(
        f"The run at {predictor.folder} has no threshold: no decision about images is frozen (notebook 04). "
        "Freeze one, or pass threshold=... (on the command line, --threshold)."
    )


@dataclass(frozen=True)
class _Training:
    """What is known of the images that the runs were trained on; None: their cohort is not here.

    Attributes:
        files: SHA-256 of their files.
        frames: SHA-256 of their pixels in the network's frame; empty where the cohort is not packed.
    """

    files: frozenset[str] | None
    frames: frozenset[str]

    @classmethod
    def of(cls, predictor: Predictor) -> "_Training":
        run = predictor.runs[0]
        data = run.record.get("data", {})
        cohort = recorded_cohort(data)
        if cohort is None or not (cohort / SPLIT).is_file() or not is_radiographs(cohort):
            return cls(None, frozenset())
        known = read_radiograph_cohort(cohort)
        if split_hash(known.split) != data.get("split_sha256"):
            return cls(None, frozenset())
        images = known.of("train")
        packed = (known.packed / "images" / f"{name}.npy" for name in images["image"])
        frames = frozenset(_pixels_sha256(np.load(path)) for path in packed if path.is_file())
        return cls(frozenset(images["sha256"]), frames)

    def holds(self, path: Path, frame: Frame, image: NDArray[np.uint8]) -> bool | None:
        """Whether a file, or its pixels, are among them; None where that is not known."""
        if self.files is None:
            return None
        if sha256_of(path) in self.files:
            return True
        return bool(self.frames) and _pixels_sha256(frame.pixels(image)) in self.frames


def _pixels_sha256(pixels: NDArray[np.uint8]) -> str:
    return hashlib.sha256(repr(pixels.shape).encode() + np.ascontiguousarray(pixels).tobytes()).hexdigest()


def _warnings(predictor: Predictor, source: str, table: pd.DataFrame, known: _Training) -> tuple[str, ...]:
    found = []
    if count := int(table["trained_on"].fillna(0).sum()):
        names = listing(table["file"][table["trained_on"].fillna(0) == 1])
        found.append(
            f"the run was trained on {count:,} of these images ({names}): what it says of them is better "
            "than it would be of others."
        )
    if known.files is None:
        found.append("the cohort of the run's training is not here: nobody checked whether it knows them.")
    chosen = read_blend(predictor.folder).views if (predictor.folder / BLEND).is_file() else predictor.views
    if chosen != predictor.views and source != GIVEN:
        found.append(
            f"the threshold was chosen with {len(chosen)} view(s) of each image, and here there are "
            f"{len(predictor.views)}: rates will differ a little."
        )
    return tuple(found)
