"""Data sets in YOLO format, as Roboflow and others export them."""

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import pandas as pd
import yaml

from cspine_helpers.files.paths import listing
from cspine_helpers.files.records import nearest, parse_json
from cspine_helpers.files.tables import utf8
from cspine_helpers.radiographs.annotations import Regions, UnusableAnnotations, parse_yolo
from cspine_helpers.radiographs.image_ids import composed, file_ids
from cspine_helpers.radiographs.sources.source import (
    CLASSES_FILE,
    Source,
    Unusable,
    image_files,
    label_files,
    on_disk,
    readable_size,
    required,
)

_NO_VALUE = (ValueError, LookupError, AttributeError, TypeError, RecursionError)  # as of the day 2020-13-45
_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".dcm")


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
    Varied copies of one original, which Roboflow names `<original>.rf.<hash>`, are one patient's; whether
    another original is this patient's, too, names do not tell.

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
    content, names = _data_yaml(required(folder / "data.yaml", what, "folder that holds data.yaml"))
    classes = _class_map(labels, names, what)
    bad, rows, regions = Unusable(what), [], Regions()
    notes: list[str] = []
    read: dict[Path, str] = {}
    for split, images in _image_folders(folder, content, what):
        # 1. Images and label files.
        if (first := read.setdefault(images.resolve(), split)) != split:
            notes.append(f"data.yaml names one folder as {first} and as {split}; its images are {first}.")
            continue
        at = images.relative_to(folder) if images.is_relative_to(folder) else images
        files = image_files(images, at, bad)
        where = _labels_of(images, what)
        texts = sorted(path for path in where.glob("[!.]*.txt") if path.name != CLASSES_FILE)
        others = [path for path in files if path.suffix.lower() not in _SUFFIXES]
        bad.add("files among the images that are no image by their name", _named(at, others))
        pictures = {(at / path.name).as_posix(): path for path in files if path not in others}
        named = _named(at.parent / where.name, texts)
        labelled = label_files(pictures, dict(zip(named, texts, strict=True)), bad)
        # 2. Their regions.
        for original, text in labelled.items():
            size = readable_size(pictures[original])
            sizes = {original: size or (1, 1)}  # what cannot be read, `consolidate` names
            try:
                marks = parse_yolo({original: text}, sizes, names)[original]
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
    table["copy_of"] = _copies(table["original"].tolist())
    return Source.of(
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


def _named(folder: Path, files: Iterable[Path]) -> list[str]:
    return [(folder / path.name).as_posix() for path in files]


def _data_yaml(path: Path) -> tuple[dict[str, Any], list[str]]:
    """What data.yaml says, and its class names by number."""
    text = utf8(path.read_bytes(), str(path))
    try:
        content = yaml.safe_load(text)
    except (yaml.YAMLError, *_NO_VALUE) as error:
        why = " ".join(str(error).split())
        raise ValueError(f"{path} is not YAML that can be read ({why}). Correct it.") from error
    names = content.get("names") if isinstance(content, dict) else None
    if isinstance(names, dict) and {*map(repr, names)} == {*map(repr, range(len(names)))}:
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


def _image_folders(folder: Path, content: Mapping[str, Any], what: str) -> Iterator[tuple[str, Path]]:
    """Split → a folder of images, as data.yaml has them: below its `path`, or below the folder itself."""
    splits = [(split, content[split]) for split in ("train", "val", "test") if content.get(split)]
    if not splits:
        raise ValueError(f"data.yaml of {what} names no folder as train, val or test. Add them.")
    for split, named in splits:
        for each in named if isinstance(named, list) else [named]:
            below = re.sub(r"^(\.\./)+", "", str(each))  # as exported: ../train/images is train/images
            tried = [folder / str(content.get("path") or "") / str(each), folder / str(each), folder / below]
            images = next((path for path in map(on_disk, tried) if path.is_dir()), None)
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
    """Of images with varied copies the name that these share; of others, empty."""
    names = [composed(PurePosixPath(each).name).rpartition(".rf.")[0] for each in originals]
    several = sorted(name for name, n in Counter(names).items() if n > 1 and name)
    ids = dict(zip(several, file_ids(several), strict=True))
    return [ids.get(name, "") for name in names]
