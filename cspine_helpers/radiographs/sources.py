"""Radiographs as they are published, read strictly into one image table and one folder of images.

A reader looks at names, tables and annotations; `consolidate` looks at every pixel, and writes a cohort:
`images/`, `images.csv`, `annotations.json` (COCO), `sources.json`. What cannot be used is named with its
reason, and left out only when asked. A label is what the source declares, never guessed from a file's name.
"""

import json
import os
import re
import shutil
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pandas as pd
import yaml
from tqdm.auto import tqdm

from cspine_helpers.files import paths
from cspine_helpers.files.paths import atomic_path, listing
from cspine_helpers.files.records import nearest, parse_json, read_sealed, write_sealed
from cspine_helpers.files.tables import Column, checked, read_columns, utf8, write_table
from cspine_helpers.radiographs.annotations import (
    Regions,
    UnusableAnnotations,
    parse_coco,
    parse_vgg,
    parse_voc,
    parse_yolo,
)
from cspine_helpers.radiographs.groups import GroupConfig, Groups, group_images
from cspine_helpers.radiographs.images import displayed_size, read_radiograph, why_unusable

IMAGES, ANNOTATIONS, SOURCES, PAIRS = "images.csv", "annotations.json", "sources.json", "pairs.csv"
IMAGE_COLUMNS = (
    Column("image", "id"),
    Column("source"),
    Column("file"),
    Column("sha256", pattern="[0-9a-f]{64}"),
    Column("study"),
    Column("patient"),
    Column("part", empty=True),
    Column("view", empty=True),
    Column("hardware", "whole", among=(0, 1), empty=True),
    Column("multiscan", "whole", among=(0, 1), empty=True),
    Column("label", "whole", among=(0, 1)),
    Column("split", empty=True),
    Column("height", "whole", low=1),
    Column("width", "whole", low=1),
    Column("original"),
)
_TEXT = [column.name for column in IMAGE_COLUMNS if column.kind in ("id", "text")]
_WORDS = ("part", "view", "split")  # empty where nothing is known
_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".dcm")
_PARTS, _VIEWS = ("hand", "leg", "hip", "shoulder"), ("frontal", "lateral", "oblique")
_SPLITS = {"train": "train", "valid": "val", "test": "test"}  # FracAtlas' files of its fractured images
_BOXES = {"PASCAL VOC": ".xml", "YOLO": ".txt"}  # folders of a file an image
_STUDY = re.compile(r"(train|valid)/XR_([A-Z]+)/(patient\d+)/(study\d+)_(positive|negative)")
_NESTED = "folders among the images, which are not looked into"
_FORMAT = 1
_REMEDY = "`python -m cspine_helpers radiographs --help` says how such a cohort is made."
_FRACATLAS = (
    "Abedeen I, Rahman MA, Prottyasha FZ, et al. FracAtlas: A Dataset for Fracture Classification, "
    "Localization and Segmentation of Musculoskeletal Radiographs. Scientific Data 10, 521 (2023). "
    "doi:10.1038/s41597-023-02432-4"
)
_MURA = (
    "Rajpurkar P, Irvin J, Bagul A, et al. MURA: Large Dataset for Abnormality Detection in Musculoskeletal "
    "Radiographs. MIDL 2018. arXiv:1712.06957"
)


@dataclass(frozen=True)
class Source:
    """What a folder of radiographs holds.

    Attributes:
        name: of the source, a word.
        table: a row an image: `image` (id), `original` (its path in the folder), `path`, `study`, `patient`,
            `part` and `view` (several words joined by `+`), `hardware`, `multiscan`, `label`, `split`. Where
            nothing is known, patient and words are empty and flags missing.
        regions: image id → marked regions of label 1, where there are some.
        classes: class → label.
        positive: what label 1 means, a word: "fractured", or "abnormal".
        left_out: original name → why it is not in the table.
        notes: what does not agree and is no reason to leave an image out, a sentence each.
        citation: of the data.
        licence: of the data.
    """

    name: str
    table: pd.DataFrame
    regions: Regions
    classes: dict[str, int]
    positive: str = "fractured"
    left_out: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    citation: str = ""
    licence: str = ""


# Readers


def read_fracatlas(folder: str | Path, *, skip_unusable: bool = False, name: str = "fracatlas") -> Source:
    """FracAtlas in its published layout, or a copy with other image sizes whose polygons were scaled along.

    Label, parts, views, hardware and multi-scan are those of `dataset.csv`; polygons those of the VGG file,
    else of the COCO file, else boxes of Pascal VOC or YOLO. The split is the column `split` where there is
    one, else that of `Utilities`, which has the fractured images only. FracAtlas names no patients.

    Args:
        folder: with `dataset.csv`, `images/Fractured`, `images/Non_fractured`, `Annotations`.
        skip_unusable: leave out images without row, rows without image, images with a region that cannot be
            used, and what contradicts itself.
        name: of the source.

    Raises:
        FileNotFoundError: a file of the layout is not there.
        ValueError: images, rows and polygons do not fit each other, and `skip_unusable` is not set; names
            them.

    Example:
        >>> read_fracatlas(fracatlas_folder).table["label"].sum()
        np.int64(8)
    """
    folder = Path(folder)
    what = f"FracAtlas at {folder}"
    _require(folder / "dataset.csv", what, "folder that holds dataset.csv, images/ and Annotations/")
    bad = _Bad(what)

    # 1. Rows, images and regions, by file name.
    flags = [*_PARTS, "mixed", "hardware", "multiscan", "fractured", *_VIEWS]
    needed = ["image_id", *flags, "fracture_count"]
    found = read_columns(
        folder / "dataset.csv", needed, what="FracAtlas table", source="", text=["image_id", "split"]
    )
    columns = [Column("image_id"), *(Column(each, "whole", among=(0, 1)) for each in flags)]
    columns += [Column("fracture_count", "whole", low=0), Column("split", empty=True, optional=True)]
    rows = checked(found, columns, what=f"{what}: dataset.csv", key=("image_id",)).set_index("image_id")
    files: dict[str, Path] = {}
    for kind in ("Fractured", "Non_fractured"):
        below = _folders(_require(folder / "images" / kind, what, "folder images/ with all images"))
        bad.add(_NESTED, _named(Path("images", kind), below))
        for path in _files(folder / "images" / kind):
            bad.add(
                "images in both folders, Fractured and Non_fractured",
                [path.name] if path.name in files else [],
            )
            files[path.name] = path
    sizes = {each: size for each, path in files.items() if (size := _size(path))}
    without = [each for each in {**files, **dict.fromkeys(rows.index)} if each not in sizes]
    doubtful: dict[str, str] = {}
    try:
        regions = _fracatlas_regions(folder / "Annotations", sizes, without, what)
    except UnusableAnnotations as error:
        if error.sound is None:
            raise
        regions, doubtful = error.sound, error.images

    # 2. What does not fit each other.
    for each, reason in doubtful.items():
        bad.add("images with regions that cannot be used", [each], reason)
    folded = Counter(map(str.casefold, rows.index))
    same = [each for each in rows.index if folded[each.casefold()] > 1]
    bad.add("rows whose names differ in capitals only", same)
    bad.add("images without a row in dataset.csv", [each for each in files if each not in rows.index])
    bad.add("rows without an image", [each for each in rows.index if each not in files])
    known = rows[rows.index.isin(files)]
    in_folder = known.index.map(lambda each: int(files[each].parent.name == "Fractured"))
    bad.add("images whose folder contradicts dataset.csv", known.index[known["fractured"] != in_folder])
    counted = (known["fracture_count"] > 0).astype(int)
    bad.add("rows whose fracture_count contradicts fractured", known.index[known["fractured"] != counted])
    seen = known[known.index.isin(sizes.keys() - doubtful)]  # what cannot be read, `consolidate` names
    marked = seen.index.map(lambda each: int(bool(regions.get(each))))
    bad.add("intact images with polygons", seen.index[marked > seen["fractured"]])
    bad.add("fractured images without a polygon", seen.index[marked < seen["fractured"]])
    strange = [each for each, found in regions.items() if {region.label for region in found} - {"fractured"}]
    bad.add("images with regions of another class than fractured", strange)
    left_out = bad.settle(skip=skip_unusable)

    # 3. The table.
    used = known[~known.index.isin(left_out)].sort_index()
    notes = _counts_that_differ(used, regions, folder / "Annotations")
    differ = used.index[(used["mixed"] == 1) != (used[[*_PARTS]].sum(axis=1) > 1)]
    if len(differ):
        notes.append(
            f"mixed: other than the number of parts says in {len(differ)} images: {listing(differ)}."
        )
    split = used["split"].fillna("") if "split" in used else _fracatlas_split(folder, used.index)
    table = pd.DataFrame(
        {
            "original": [files[each].relative_to(folder).as_posix() for each in used.index],
            "part": _joined(used[[*_PARTS]]),
            "view": _joined(used[[*_VIEWS]]),
            "hardware": used["hardware"].to_numpy(),
            "multiscan": used["multiscan"].to_numpy(),
            "label": used["fractured"].to_numpy(),
            "split": np.asarray(split, dtype=object),
        }
    )
    return _source(
        name,
        folder,
        table,
        {files[each].relative_to(folder).as_posix(): regions.get(each, []) for each in used.index},
        classes={"fractured": 1},
        left_out=left_out,
        notes=notes,
        citation=_FRACATLAS,
        licence="CC BY 4.0",
    )


def read_yolo(
    folder: str | Path,
    *,
    labels: Mapping[str, int] | str | Path,
    skip_unusable: bool = False,
    name: str = "yolo",
    citation: str = "",
    licence: str = "",
) -> Source:
    """A data set in YOLO format: `data.yaml`, and folders of images with a text file of labels for each.

    An image is of label 1 where it has a line of such a class. An empty label file says that an image shows
    none; an image without one is refused: nobody said what it shows. Boxes become polygons of four corners.
    Varied copies of one original, which Roboflow names `<original>.rf.<hash>`, are one patient's.

    Args:
        folder: with `data.yaml` and the folders that it names.
        labels: class of `data.yaml` → 1 (fractured) or 0; every class, no other. Or a JSON file of that.
        skip_unusable: leave out what cannot be used: images without label file, lines that are no label.
        name: of the source.
        citation: of the data.
        licence: of the data.

    Raises:
        FileNotFoundError: `data.yaml`, or a folder that it names, is not there.
        ValueError: `labels` is not about the classes of data.yaml; or files cannot be used, and
            `skip_unusable` is not set; names them.
    """
    folder = Path(folder)
    what = f"the YOLO-format set at {folder}"
    content, names = _data_yaml(_require(folder / "data.yaml", what, "folder that holds data.yaml"))
    classes = _class_map(labels, names, what)
    bad, rows, regions = _Bad(what), [], Regions()
    notes: list[str] = []
    read: dict[Path, str] = {}
    for split, images in _yolo_folders(folder, content, what):
        # 1. Images and label files.
        if (first := read.setdefault(images.resolve(), split)) != split:
            notes.append(f"data.yaml names one folder as {first} and as {split}; its images are {first}.")
            continue
        at = images.relative_to(folder) if images.is_relative_to(folder) else images
        files = _files(images)
        bad.add(_NESTED, _named(at, _folders(images)))
        where = _labels_of(images, what)
        texts = {path.stem: path for path in where.glob("[!.]*.txt") if path.name != "classes.txt"}
        stems = Counter(path.stem for path in files)
        others = [path for path in files if path.suffix.lower() not in _SUFFIXES]
        bad.add("files among the images that are no image by their name", _named(at, others))
        files = [path for path in files if path not in others]
        bad.add(
            "images that share a label file", _named(at, (path for path in files if stems[path.stem] > 1))
        )
        bad.add(
            "images without a label file (an empty one says intact)",
            _named(at, (path for path in files if path.stem not in texts)),
        )
        bad.add(
            "label files without an image",
            _named(at.parent / where.name, (path for stem, path in texts.items() if stem not in stems)),
        )
        # 2. Their regions.
        for path in files:
            original = (at / path.name).as_posix()
            if path.stem not in texts:
                continue
            size = _size(path)
            sizes = {path.name: size or (1, 1)}  # what cannot be read, `consolidate` names
            try:
                marks = parse_yolo({path.name: texts[path.stem]}, sizes, names)[path.name]
            except UnusableAnnotations as error:
                for kind, lines in error.faults.items():
                    bad.add(f"label files: {kind.lower()}", [original], listing(lines, quoted=False))
                continue
            hits = [mark for mark in marks if classes[mark.label]]
            rows.append({"original": original, "label": int(bool(hits)), "split": split})
            regions[original] = hits if size else []
    left_out = bad.settle(skip=skip_unusable)
    table = pd.DataFrame(rows, columns=["original", "label", "split"])
    table = table[~table["original"].isin(left_out)].sort_values("original", ignore_index=True)
    table["patient"] = _copies(table["original"].tolist())
    return _source(
        name,
        folder,
        table,
        regions,
        classes=classes,
        left_out=left_out,
        notes=notes,
        citation=citation,
        licence=licence,
    )


def read_mura(folder: str | Path, *, skip_unusable: bool = False, name: str = "mura") -> Source:
    """MURA v1.1. A study's label is the last word of its own folder's name, and checked against the table.

    Label 1 means abnormal, which need not be fractured. The licence forbids handing the images on.

    Args:
        folder: `MURA-v1.1`, or as it is called, with `train`, `valid` and the four tables.
        skip_unusable: leave out images without row, rows without image, studies of two labels.
        name: of the source.

    Raises:
        FileNotFoundError: a folder or table is not there.
        ValueError: folders and tables do not fit each other, and `skip_unusable` is not set; names them.
    """
    folder = Path(folder)
    what = f"MURA at {folder}"
    bad, rows = _Bad(what), []
    for split in ("train", "valid"):
        # 1. What the tables say, and what lies there.
        _require(folder / split, what, "folder MURA-v1.1 with train, valid and four tables")
        listed = [_below_root(cells[0]) for cells in _cells(folder / f"{split}_image_paths.csv", 1, what)]
        cells = _cells(folder / f"{split}_labeled_studies.csv", 2, what)
        told = {_below_root(study): label for study, label in cells}
        lies = {
            path.relative_to(folder).as_posix(): path
            for path in sorted((folder / split).glob("XR_*/patient*/study*/*"))
            if path.is_file() and not path.name.startswith(".")
        }
        # 2. What does not fit.
        parsed = {
            each: _STUDY.fullmatch(each.rpartition("/")[0]) for each in {**dict.fromkeys(listed), **lies}
        }
        bad.add("paths that are not like MURA's", (each for each, match in parsed.items() if not match))
        bad.add(f"images without a row in {split}_image_paths.csv", lies.keys() - set(listed))
        bad.add("rows without an image", set(listed) - lies.keys())
        again = Counter([*listed, *(_below_root(study) for study, _ in cells)])
        bad.add("rows that repeat an image or a study", (each for each, n in again.items() if n > 1))
        word = {"0": "negative", "1": "positive"}
        for each, match in parsed.items():
            study = each.rpartition("/")[0]
            if not match:
                continue
            if study not in told:
                bad.add(f"images of studies without a row in {split}_labeled_studies.csv", [each])
            elif word.get(told[study]) != match[5]:
                bad.add(f"images of studies whose folder contradicts {split}_labeled_studies.csv", [each])
            rows.append((each, match))
        known = {each.rpartition("/")[0] for each in lies}
        bad.add(f"studies of {split}_labeled_studies.csv without an image", told.keys() - known)
    left_out = bad.settle(skip=skip_unusable)
    used = sorted((each, match) for each, match in rows if each not in left_out)
    table = pd.DataFrame(
        {
            "original": [each for each, _ in used],
            "part": [match[2].lower() for _, match in used],
            "study": [f"{match[2].lower()}-{match[3]}-{match[4]}" for _, match in used],
            "patient": [match[3] for _, match in used],
            "label": [int(match[5] == "positive") for _, match in used],
            "split": [match[1] for _, match in used],
        }
    )
    names = table["study"] + "-" + table["original"].str.rpartition("/")[2]
    return _source(
        name,
        folder,
        table,
        {},
        names=names,
        classes={"negative": 0, "positive": 1},
        positive="abnormal",
        left_out=left_out,
        citation=_MURA,
        licence="Stanford MURA Dataset Research Use Agreement; not to be handed on",
    )


# What readers share


class _Bad:
    """What of a source cannot be used, and why."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.found: dict[str, dict[str, str]] = {}  # reason → name → detail

    def add(self, reason: str, names: Iterable[str], detail: str = "") -> None:
        for name in sorted(map(str, names)):
            self.found.setdefault(reason, {})[name] = detail

    def settle(self, *, skip: bool) -> dict[str, str]:
        """Refuse all of it; `skip`: the names to leave out, each with its reason."""
        if self.found and not skip:
            named = [
                f"{reason} ({len(names)}): {listing(_with_detail(names), quoted=False)}"
                for reason, names in self.found.items()
            ]
            lines = "\n".join(f"- {line}" for line in named)
            raise ValueError(
                f"{self.what} is refused. Correct it, or leave these out with skip_unusable "
                f"(--skip-unusable):\n{lines}"
            )
        reasons = reversed([*self.found.items()])  # the first that was found is kept
        return {
            name: f"{reason}{f': {detail}' if detail else ''}"
            for reason, names in reasons
            for name, detail in names.items()
        }


def _with_detail(names: Mapping[str, str]) -> list[str]:
    return [f"{name!r}{f': {detail}' if detail else ''}" for name, detail in names.items()]


def _require(path: Path, what: str, remedy: str) -> Path:
    """The path, where it is there."""
    if not path.exists():
        below = sorted({each.parent for each in path.parent.glob(f"*/{path.name}")})
        hint = f" Did you mean {below[0]}?" if below else f" Name the {remedy}."
        raise FileNotFoundError(f"{what} has no {path.name} at {path}.{hint}")
    return path


def _files(folder: Path) -> list[Path]:
    """The files of a folder, but hidden ones, by name."""
    return sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))


def _folders(folder: Path) -> list[Path]:
    """The folders in a folder, but hidden ones, by name."""
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _named(folder: Path, files: Iterable[Path]) -> list[str]:
    return [(folder / path.name).as_posix() for path in files]


def _joined(flags: pd.DataFrame) -> list[str]:
    """The names of the columns that are 1, in each row, joined by `+`."""
    return ["+".join(flags.columns[row == 1]) for row in flags.to_numpy()]


def _source(
    name: str,
    folder: Path,
    table: pd.DataFrame,
    regions: Regions,
    *,
    names: Iterable[str] | None = None,
    **rest: Any,
) -> Source:
    """The source, with an id for each image, and columns that say that nothing is known.

    Args:
        name: of the source.
        folder: of the source.
        table: `original`, `label`, and what is known beside them.
        regions: original → regions.
        names: to make ids of; None: the file names.
        rest: other fields.
    """
    paths.checked_name(name, "source")
    if table.empty:
        raise ValueError(f"{folder} has no image that can be used. Name the folder with the images.")
    stems = [PurePosixPath(each).stem for each in (table["original"] if names is None else names)]
    table = table.assign(image=file_ids(stems, table["original"]))
    table["path"] = [str((folder / each).absolute()) for each in table["original"]]
    unknown: dict[str, Any] = {"study": table["image"], "patient": "", "part": "", "view": "", "split": ""}
    unknown |= {"hardware": np.nan, "multiscan": np.nan}
    table = table.assign(**{key: value for key, value in unknown.items() if key not in table})
    order = ["image", "original", "path", "study", "patient", "part", "view", "hardware", "multiscan"]
    by_id = zip(table["image"], table["original"], strict=True)
    return Source(
        name,
        table[[*order, "label", "split"]].reset_index(drop=True),
        {image: marks for image, original in by_id if (marks := regions.get(original))},
        **rest,
    )


def file_ids(names: Iterable[str], tails: Iterable[str] | None = None) -> list[str]:
    """Ids that can be file names on every system, one for each name, no two alike whatever the capitals.

    A letter with an accent loses it, and what no file name may hold becomes `-`. Names that would be alike,
    too long or empty end with eight digits of a hash.

    Args:
        names: such as "limb 2 größe".
        tails: what is hashed, one a name: something that no two share, as paths; None: the names.

    Example:
        >>> file_ids(["IMG0000019", "Knöchel links"])
        ['IMG0000019', 'Knochel-links']
    """
    names = list(names)
    plain = [_plain(name) for name in names]
    often = Counter(map(str.casefold, plain))
    ids = []
    for name, text, tail in zip(names, plain, names if tails is None else tails, strict=True):
        try:
            paths.check_uids([text])
            good = often[text.casefold()] == 1
        except ValueError:
            good = False
        ids.append(text if good else f"{text[:48].strip('.-_') or 'image'}-{_short_hash(tail or name)}")
    return ids


def _plain(name: str) -> str:
    """ASCII letters, digits, `.`, `_`, `-`; no dot at the ends."""
    ascii_ = unicodedata.normalize("NFKD", name.replace("ß", "ss")).encode("ascii", "ignore").decode()
    return re.sub(r"[^A-Za-z0-9._-]+", "-", ascii_).lstrip("._-").rstrip(".")


def _short_hash(text: str) -> str:
    return sha256(unicodedata.normalize("NFC", text).encode()).hexdigest()[:8]


def _size(path: Path) -> tuple[int, int] | None:
    """Height and width in pixels of an image as it is displayed; None: it cannot be read."""
    try:
        return displayed_size(path)
    except (OSError, ValueError):
        return None


# FracAtlas


def _fracatlas_regions(
    folder: Path, sizes: Mapping[str, tuple[int, int]], left_out: Sequence[str], what: str
) -> Regions:
    """File name → regions, from the first that is there: VGG, COCO, or the boxes of Pascal VOC or YOLO."""
    for kind, parse in (("VGG", parse_vgg), ("COCO", parse_coco)):
        path = folder / f"{kind} JSON" / f"{kind}_fracture_masks.json"
        if path.is_file():
            return parse(path, sizes, left_out=left_out)
    boxes = {kind: _files_of(folder / kind, sizes, suffix) for kind, suffix in _BOXES.items()}
    if boxes["PASCAL VOC"]:
        return parse_voc(boxes["PASCAL VOC"], sizes)
    if boxes["YOLO"]:
        return parse_yolo(boxes["YOLO"], sizes, ["fractured"])
    raise FileNotFoundError(
        f"{what} has no annotations of fractures in {folder}. Bring VGG JSON/VGG_fracture_masks.json."
    )


def _files_of(folder: Path, names: Iterable[str], suffix: str) -> dict[str, Path]:
    """Image file name → the file of the same stem in a folder, where there is one."""
    named = {name: folder / f"{PurePosixPath(name).stem}{suffix}" for name in names}
    return {name: path for name, path in named.items() if path.is_file()}


def _counts_that_differ(rows: pd.DataFrame, regions: Regions, folder: Path) -> list[str]:
    """Where dataset.csv or YOLO files count other fractures than there are polygons: in FracAtlas, thrice."""
    polygons = {each: len(regions.get(each, [])) for each in rows.index}
    files = _files_of(folder / "YOLO", rows.index, ".txt")
    boxes = {each: sum(map(bool, path.read_bytes().split(b"\n"))) for each, path in files.items()}
    counts = {"fracture_count of dataset.csv": dict(rows["fracture_count"]), "YOLO boxes": boxes}
    notes = []
    for source, found in counts.items():
        differ = [f"{each} ({n} for {polygons[each]})" for each, n in found.items() if n != polygons[each]]
        if differ:
            named = listing(differ, quoted=False)
            notes.append(f"{source}: other numbers than of polygons in {len(differ)} images: {named}.")
    return notes


def _fracatlas_split(folder: Path, names: Iterable[str]) -> list[str]:
    """Each image's split by `Utilities/Fracture Split`, empty for images without one."""
    split: dict[str, str] = {}
    twice: list[str] = []
    for file, word in _SPLITS.items():
        path = folder / "Utilities" / "Fracture Split" / f"{file}.csv"
        if path.is_file():
            found = read_columns(path, ["image_id"], what="split of FracAtlas", source="")
            twice += [name for name in dict.fromkeys(found["image_id"]) if name in split]
            split |= dict.fromkeys(found["image_id"], word)
    if twice:
        raise ValueError(
            f"FracAtlas' splits in {folder / 'Utilities'} share images ({len(twice)}): {listing(twice)}. "
            "Leave each in one of them."
        )
    return [split.get(name, "") for name in names]


# YOLO


def _data_yaml(path: Path) -> tuple[dict[str, Any], list[str]]:
    """What data.yaml says, and its class names by number."""
    try:
        content = yaml.safe_load(utf8(path.read_bytes(), path.name))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML ({error}). Correct it.") from error
    names = content.get("names") if isinstance(content, dict) else None
    if isinstance(names, dict) and sorted(names) == [*range(len(names))]:
        names = [names[number] for number in range(len(names))]
    if not (isinstance(names, list) and names and all(isinstance(each, str) for each in names)):
        raise ValueError(
            f"{path} has no names, the classes as a list or by number from 0; found {listing([names])}. "
            "Correct it."
        )
    if len(set(names)) < len(names) or content.get("nc", len(names)) != len(names):
        raise ValueError(
            f"{path} has nc = {content.get('nc')} and the names {listing(names)}. They are as many, each "
            "once: correct it."
        )
    return content, names


def _class_map(labels: Mapping[str, int] | str | Path, names: Sequence[str], what: str) -> dict[str, int]:
    """Class → label, where every class has one."""
    if not isinstance(labels, Mapping):
        path = Path(labels)
        if not path.is_file():
            raise FileNotFoundError(f"No labels of classes at {path}. Write {_example(names)}, for instance.")
        labels = parse_json(path.read_bytes(), str(path))
        if not isinstance(labels, Mapping):
            raise ValueError(f"{path} holds no labels of classes. Write {_example(names)}, for instance.")
    lacking = [name for name in names if name not in labels]
    strange = [f"{name!r}{nearest(name, names)}" for name in labels if name not in names]
    wrong = [
        f"{name!r}: {label!r}"
        for name, label in labels.items()
        if isinstance(label, bool) or label not in (0, 1)
    ]
    problems = [
        f"{reason} ({len(found)}): {listing(found, quoted=quoted)}"
        for reason, found, quoted in (
            ("classes of data.yaml without a label", lacking, True),
            ("labels of no class of data.yaml", strange, False),
            ("labels that are not 0 or 1", wrong, False),
        )
        if found
    ]
    if problems:
        raise ValueError(
            f"The labels do not fit {what}: {'; '.join(problems)}. Give each class 1 (fractured) or 0: "
            f"{_example(names)}, for instance."
        )
    return {name: int(labels[name]) for name in names}


def _example(names: Sequence[str]) -> str:
    return json.dumps(dict.fromkeys(names, 1), ensure_ascii=False)


def _yolo_folders(folder: Path, content: Mapping[str, Any], what: str) -> Iterator[tuple[str, Path]]:
    """Split → a folder of images, as data.yaml has them: below its `path`, or below the folder itself."""
    splits = [(split, content[split]) for split in ("train", "val", "test") if content.get(split)]
    if not splits:
        raise ValueError(f"data.yaml of {what} names no folder as train, val or test. Add them.")
    for split, named in splits:
        for each in named if isinstance(named, list) else [named]:
            below = re.sub(r"^(\.\./)+", "", str(each))  # as exported: ../train/images is train/images
            tried = [folder / str(content.get("path") or "") / str(each), folder / str(each), folder / below]
            images = next((path for path in tried if path.is_dir()), None)
            if images is None:
                raise FileNotFoundError(
                    f"{split} in data.yaml of {what} is no folder of images: {each!r}. Correct or bring it."
                )
            yield split, images


def _labels_of(images: Path, what: str) -> Path:
    """The folder of label files that belongs to a folder of images: `labels` in the place of `images`."""
    parts = [*images.parts]
    if "images" in parts:
        parts[len(parts) - 1 - parts[::-1].index("images")] = "labels"
    labels = Path(*parts)
    if labels == images or not labels.is_dir():
        raise FileNotFoundError(f"{what} has no folder of labels for {images}. Bring it: {labels}.")
    return labels


def _copies(originals: Sequence[str]) -> list[str]:
    """Who is the patient of images with varied copies: the name that these share; of others, empty."""
    names = [PurePosixPath(each).name.rpartition(".rf.")[0] for each in originals]
    several = sorted(name for name, n in Counter(names).items() if n > 1 and name)
    ids = dict(zip(several, file_ids(several), strict=True))
    return [ids.get(name, "") for name in names]


# MURA


def _below_root(path: str) -> str:
    """A path of MURA's tables below its first folder, without a slash at the end."""
    return path.strip().rstrip("/").partition("/")[2]


def _cells(path: Path, count: int, what: str) -> list[list[str]]:
    """The cells of a table without header, separated by commas, semicolons or tabs, with or without a BOM.

    Raises:
        FileNotFoundError: there is no such table.
        ValueError: it has other than `count` cells a row.
    """
    _require(path, what, "folder that holds the four tables")
    lines = [line for line in utf8(path.read_bytes(), path.name).decode().splitlines() if line.strip()]
    rows = [[cell.strip() for cell in re.split(r"[,;\t]", line)] for line in lines]
    if wrong := [line for line, row in zip(lines, rows, strict=True) if len(row) != count]:
        raise ValueError(
            f"{path.name} of {what} has rows of other than {count} cells ({len(wrong)}): {listing(wrong)}. "
            "Mend them."
        )
    return rows


# A cohort


def consolidate(
    sources: Sequence[Source],
    cohort_folder: str | Path,
    *,
    group: GroupConfig | None = None,
    skip_unusable: bool = False,
    copy: bool = False,
    check: Callable[[pd.DataFrame], object] | None = None,
) -> pd.DataFrame:
    """Join sources into a cohort: every image looked at, under a name of its own in one layout.

    Writes `images/`, `annotations.json`, `sources.json`, with `group` also `pairs.csv`, and, last,
    `images.csv`; or nothing, where anything is refused. A cohort that is there already is never written over.

    Args:
        sources: of different names. An id that two of them have gets the source's name before it in both.
        cohort_folder: `data/<cohort>`.
        group: what counts as one patient where none is named, see `groups.group_images`; images of two labels
            are left out. None: nothing does, and each such image is a patient of its own.
        skip_unusable: leave out images that cannot be read.
        copy: copy the images; else `images/` holds links to where they lie.
        check: is called with the image table before anything is written; what it raises refuses the cohort.

    Returns:
        The image table, see `read_images`.

    Raises:
        ValueError: images cannot be read, and `skip_unusable` is not set; names them and why. Or label 1 does
            not mean the same in all sources.
        FileExistsError: the folder holds another image table.

    Example:
        >>> source = read_fracatlas(fracatlas_folder)
        >>> consolidate([source], "bones")["label"].value_counts().tolist()
        [16, 8]
    """
    folder = Path(cohort_folder)
    names = [source.name for source in sources]
    if not sources or len(set(names)) < len(names):
        raise ValueError(
            f"A cohort is made of sources of different names; found {listing(names)}. Name them apart."
        )
    if len({source.positive for source in sources}) > 1:
        told = [f"{source.name}: {source.positive}" for source in sources]
        raise ValueError(
            f"Label 1 of these sources means different things ({listing(told, quoted=False)}). Make a "
            "cohort of each."
        )
    lock = folder.with_name(f".{folder.name}.lock")
    with paths.exclusive(lock, f"making the cohort {folder.name}"):
        # 1. Every pixel.
        sources = _apart(sources)
        table = pd.concat([source.table.assign(source=source.name) for source in sources], ignore_index=True)
        regions = {image: marks for source in sources for image, marks in source.regions.items()}
        bad = _Bad(f"The images of {listing(names, quoted=False)}")
        seen = _examined(table, bad)
        origin = table["source"] + ": " + table["original"]
        unused = bad.settle(skip=skip_unusable)
        table = table.assign(**seen)[~origin.isin(unused)].reset_index(drop=True)
        if table.empty:
            raise ValueError(
                f"No image of {listing(names, quoted=False)} can be used. Bring the files again."
            )
        table, groups = _grouped(table, group, unused)
        suffix = table["path"].map(lambda path: Path(path).suffix.lower())
        table["file"] = "images/" + table["image"] + suffix
        where = dict(zip(table["file"], table["path"], strict=True))
        table = _checked(table, f"the image table of {folder.name}")
        if check:
            check(table)

        # 2. Everything beside its place, then into it.
        annotations = _coco(table, regions)
        record = _record(sources, table, unused) | ({"groups": groups.report()} if groups else {})
        write_cohort(folder, table, where, annotations, record, groups, copy=copy)
    return read_images(folder)


def _apart(sources: Sequence[Source]) -> list[Source]:
    """The sources with no id, study or patient in two of them: what is gets the source's name before it."""
    shared: dict[str, set[str]] = {}
    for column in ("image", "study", "patient"):
        each_has = [{name.casefold() for name in source.table[column]} for source in sources]
        often = Counter(name for names in each_has for name in names)
        shared[column] = {name for name, n in often.items() if n > 1 and name}

    def named(source: Source, column: str) -> pd.Series:
        return source.table[column].map(
            lambda each: file_ids([f"{source.name}-{each}"])[0] if each.casefold() in shared[column] else each
        )

    apart = []
    for source in sources:
        table = source.table.assign(**{column: named(source, column) for column in shared})
        ids = dict(zip(source.table["image"], table["image"], strict=True))
        regions = {ids[each]: marks for each, marks in source.regions.items() if each in ids}
        apart.append(replace(source, table=table, regions=regions))
    return apart


def _examined(table: pd.DataFrame, bad: _Bad) -> dict[str, list[Any]]:
    """Height, width and SHA-256 of each image; what cannot be read goes to `bad`."""

    def examine(path: str) -> tuple[int, int, str] | str:
        try:
            return *read_radiograph(path).shape, paths.sha256_of(path)
        except (OSError, ValueError) as error:
            return why_unusable(error)

    seen = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = pool.map(examine, table["path"])
        rows = zip(table["source"] + ": " + table["original"], found, strict=True)
        for name, result in tqdm(rows, "reading images", len(table), unit="image", mininterval=1):
            if isinstance(result, str):
                bad.add("images that cannot be read", [name], result)
            seen.append((0, 0, "") if isinstance(result, str) else result)
    heights, widths, sums = zip(*seen, strict=True)
    return {"height": [*heights], "width": [*widths], "sha256": [*sums]}


def _grouped(
    table: pd.DataFrame, config: GroupConfig | None, unused: dict[str, str]
) -> tuple[pd.DataFrame, Groups | None]:
    """The table with every patient filled; what two labels contradict goes to `unused`."""
    if config is None:
        return table.assign(patient=table["patient"].where(table["patient"] != "", table["image"])), None
    groups = group_images(table, read_radiograph, config=config)
    origin = dict(zip(table["image"], table["source"] + ": " + table["original"], strict=True))
    for row in groups.left_out.itertuples():
        unused[origin[row.image]] = (
            f"label {row.label}, and {row.why} to {origin[row.other]} with label {row.other_label}"
        )
    return groups.table, groups


def _coco(table: pd.DataFrame, regions: Regions) -> dict[str, Any]:
    """Images and polygons as COCO has them, ids counted from 1; `file_name` is the table's `file`."""
    kinds = sorted({region.label for image in table["image"] for region in regions.get(image, [])})
    numbers = {kind: number for number, kind in enumerate(kinds, start=1)}
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, row in enumerate(table.itertuples(), start=1):
        images.append({"id": number, "file_name": row.file, "height": row.height, "width": row.width})
        for region in regions.get(str(row.image), []):
            points, (x, y) = region.points, region.points.T
            low, size = points.min(0), np.ptp(points, axis=0)
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": numbers[region.label],
                    "segmentation": [points.round(3).ravel().tolist()],
                    "bbox": [*low.round(3).tolist(), *size.round(3).tolist()],
                    "area": round(abs(float(x @ np.roll(y, 1) - y @ np.roll(x, 1))) / 2, 3),
                    "iscrowd": 0,
                }
            )
    categories = [{"id": number, "name": kind} for kind, number in numbers.items()]
    return {"images": images, "annotations": annotations, "categories": categories}


def _record(sources: Sequence[Source], table: pd.DataFrame, unused: Mapping[str, str]) -> dict[str, Any]:
    """`sources.json`: of each source, what came from it, what did not and why, its classes, its citation."""
    told = []
    for source in sources:
        start, rows = f"{source.name}: ", table[table["source"] == source.name]
        here = {name.removeprefix(start): why for name, why in unused.items() if name.startswith(start)}
        told.append(
            {
                "name": source.name,
                "images": len(rows),
                "positive": int(rows["label"].sum()),
                "label_1": source.positive,
                "classes": source.classes,
                "left_out": source.left_out | here,
                "notes": source.notes,
                "citation": source.citation,
                "licence": source.licence,
            }
        )
    return {"format": _FORMAT, "sources": told}


def write_cohort(
    folder: Path,
    table: pd.DataFrame,
    where: Mapping[str, str],
    annotations: Mapping[str, Any],
    record: Mapping[str, Any],
    groups: Groups | None = None,
    *,
    copy: bool,
) -> None:
    """Write a cohort, the image table last: a folder with one is whole. Links to nowhere are mended.

    Args:
        folder: `data/<cohort>`.
        table: image table.
        where: `file` of the table → where the image is.
        annotations: COCO.
        record: of `sources.json`.
        groups: whose pairs are written, too.
        copy: copy the images, byte for byte; else link them.

    Raises:
        FileExistsError: the folder holds another image table, or part of a cohort.
    """
    if (folder / IMAGES).exists():
        if _stored(folder).equals(table):
            for link, source in ((folder / name, source) for name, source in where.items()):
                if link.is_symlink() and not link.exists():  # the images have moved
                    link.unlink()
                    link.symlink_to(source)
            return
        raise FileExistsError(
            f"{folder / IMAGES} is kept as it is: another image table is there already. Move it aside, or "
            "make this cohort under another name."
        )
    if found := [name for name in ("images", "train.csv", "train_images") if (folder / name).exists()]:
        raise FileExistsError(
            f"{folder} holds {listing(found)}, of no whole cohort of radiographs. Move that aside, or make "
            "this cohort under another name."
        )
    unfinished = folder / ".images"
    shutil.rmtree(unfinished, ignore_errors=True)  # of a process that was killed
    unfinished.mkdir(parents=True)
    try:
        for name, source in where.items():
            target = unfinished / PurePosixPath(name).name
            if copy:
                shutil.copyfile(source, target)
            else:
                target.symlink_to(source)
        with atomic_path(folder / ANNOTATIONS) as file:
            file.write_text(json.dumps(annotations, ensure_ascii=False), encoding="utf-8")
        write_sealed(folder / SOURCES, record)
        if groups:
            write_table(groups.pairs, folder / PAIRS)
        unfinished.rename(folder / "images")
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    write_table(table, folder / IMAGES)


def _checked(table: pd.DataFrame, what: str) -> pd.DataFrame:
    """The table with its columns and types, sorted by image; missing words are empty."""
    table = table.assign(
        **{column: table[column].replace("", np.nan) for column in _WORDS if column in table}
    )
    found = checked(table, IMAGE_COLUMNS, what=what, key=("image",), rules=_rules)
    words = {column: found[column].fillna("") for column in _WORDS}
    return found.assign(**words).sort_values("image", kind="stable", ignore_index=True)


def _rules(table: pd.DataFrame) -> Iterator[tuple[str, pd.Series]]:
    """Rules about several rows of an image table."""
    folded = table["image"].str.casefold()
    yield "images whose names differ in capitals only", folded.duplicated(keep=False)
    by_study = table.groupby("study")
    for column in ("label", "patient"):
        yield f"studies with two {column}s", by_study[column].transform("nunique") > 1


def read_images(cohort_folder: str | Path) -> pd.DataFrame:
    """The image table of a cohort of radiographs, one row an image, sorted by it.

    Returns:
        `image` (id), `source`, `file` (below the cohort's folder, or absolute), `sha256`, `study`, `patient`
        (who is resampled), `part`, `view`, `hardware`, `multiscan`, `label`, `split` (the published one),
        `height` and `width` (displayed, pixels), `original` (path in the source). Words are empty and flags
        missing where nothing is known.

    Raises:
        FileNotFoundError: there is no such table, or images that it names are gone.
        ValueError: it breaks a rule; names the first ten offenders of each.

    Example:
        >>> read_images(radiographs)["view"].unique().tolist()
        ['frontal', 'lateral', 'oblique', 'frontal+lateral']
    """
    folder = Path(cohort_folder)
    table = _stored(folder)
    if gone := [each for each in table["file"] if not (folder / each).exists()]:
        raise FileNotFoundError(
            f"Images of {folder / IMAGES} are not where it says ({len(gone)}): {listing(gone)}. Bring them "
            "back, or make the cohort again from where they are now."
        )
    return table


def _stored(folder: Path) -> pd.DataFrame:
    """The image table, wherever its images are."""
    found = read_columns(folder / IMAGES, what="image table", source=_REMEDY, text=_TEXT)
    return _checked(found, f"{folder / IMAGES}")


def read_regions(cohort_folder: str | Path) -> dict[str, list[np.ndarray]]:
    """Image id → its marked fractures, each `(N, 2)`: x and y of the corners, pixels of the displayed image.

    Every image of the table has an entry, an empty list where nothing is marked: an intact image, or one of a
    source that marks nothing.

    Raises:
        FileNotFoundError: there are no annotations.
        ValueError: they are not those of the image table.

    Example:
        >>> regions = read_regions(radiographs)
        >>> sum(len(marked) for marked in regions.values())
        9
    """
    folder = Path(cohort_folder)
    path, table = folder / ANNOTATIONS, read_images(folder)
    if not path.is_file():
        raise FileNotFoundError(f"No annotations at {path}. {_REMEDY}")
    coco = parse_json(path.read_bytes(), str(path))
    found = {each["file_name"]: each["id"] for each in coco["images"]}
    if found.keys() != set(table["file"]):
        differ = found.keys() ^ set(table["file"])
        raise ValueError(
            f"{path} is of other images than {IMAGES} ({len(differ)}): {listing(sorted(differ))}. {_REMEDY}"
        )
    marked: dict[int, list[np.ndarray]] = {number: [] for number in found.values()}
    for each in coco["annotations"]:
        marked[each["image_id"]] += [
            np.array(flat, dtype=float).reshape(-1, 2) for flat in each["segmentation"]
        ]
    return {image: marked[found[file]] for image, file in zip(table["image"], table["file"], strict=True)}


def read_sources(cohort_folder: str | Path) -> dict[str, Any]:
    """What `sources.json` says of each source: classes, what was left out and why, citation, licence.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is not as it was written.

    Example:
        >>> [(source["name"], source["licence"]) for source in read_sources(radiographs)["sources"]]
        [('fracatlas', 'CC BY 4.0')]
    """
    path = Path(cohort_folder) / SOURCES
    return read_sealed(
        path,
        version=_FORMAT,
        missing=f"No {SOURCES} at {path}. {_REMEDY}",
        again="make the cohort again",
        writer="consolidate",
    )


def read_pairs(cohort_folder: str | Path) -> pd.DataFrame:
    """Images that were taken for one patient's: image, other, why, similarity, see `groups.Groups`.

    Raises:
        FileNotFoundError: the cohort was made without grouping.
        ValueError: the table lacks columns.
    """
    columns = ["image", "other", "why", "similarity"]
    path = Path(cohort_folder) / PAIRS
    return read_columns(path, columns, what="table of pairs", source=_REMEDY, text=columns[:3])
