"""What a published folder of radiographs holds, and what of it cannot be used.

A reader looks at names, tables and annotations; `consolidation` looks at every pixel. What cannot be used is
named with its reason, and left out only when asked. A label is what the source declares, never guessed from
a file's name.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Self

import numpy as np
import pandas as pd

from cspine_helpers.files import paths
from cspine_helpers.files.paths import listing
from cspine_helpers.radiographs.annotations import Regions
from cspine_helpers.radiographs.image_ids import composed, file_ids
from cspine_helpers.radiographs.images import displayed_size

CLASSES_FILE = "classes.txt"  # that programs write among label files of YOLO
_NESTED = "folders among the images, which are not looked into"


@dataclass(frozen=True)
class Source:
    """What a folder of radiographs holds.

    Attributes:
        name: of the source, a word.
        table: a row an image: `image` (id), `original` (its path in the folder), `path`, `study`, `patient`,
            `copy_of` (what varied copies of one original share, which names no patient), `part` and `view`
            (several words joined by `+`), `hardware`, `multiscan`, `label`, `split`. Where nothing is known,
            patient, copy_of and words are empty and flags missing.
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

    @classmethod
    def of(
        cls,
        name: str,
        folder: Path,
        table: pd.DataFrame,
        regions: Regions,
        *,
        names: Iterable[str] | None = None,
        **rest: Any,
    ) -> Self:
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
        unknown: dict[str, Any] = {"study": table["image"], "hardware": np.nan, "multiscan": np.nan}
        unknown |= dict.fromkeys(("patient", "copy_of", "part", "view", "split"), "")
        table = table.assign(**{key: value for key, value in unknown.items() if key not in table})
        order = ["image", "original", "path", "study", "patient", "copy_of", "part", "view"]
        by_id = zip(table["image"], table["original"], strict=True)
        return cls(
            name,
            table[[*order, "hardware", "multiscan", "label", "split"]].reset_index(drop=True),
            {image: marks for image, original in by_id if (marks := regions.get(original))},
            **rest,
        )


class Unusable:
    """What of a source cannot be used, and why.

    Example:
        >>> bad = Unusable("FracAtlas")
        >>> bad.add("rows without an image", ["IMG1.jpg"])
        >>> bad.settle(skip=True)
        {'IMG1.jpg': 'rows without an image'}
    """

    def __init__(self, what: str) -> None:
        """`what` is the source, as a message names it."""
        self.what = what
        self.found: dict[str, dict[str, str]] = {}  # reason → name → detail
        self.in_doubt: set[str] = set()  # reasons that put all else in doubt

    def add(self, reason: str, names: Iterable[str], detail: str = "") -> None:
        """Note names that cannot be used for this reason."""
        for name in sorted(map(str, names)):
            self.found.setdefault(reason, {})[name] = detail

    def refuse(self, reason: str, names: Iterable[str]) -> None:
        """Note what puts all else in doubt, so that leaving it out is no help."""
        self.add(reason, names)
        self.in_doubt.add(reason)

    def settle(self, *, skip: bool) -> dict[str, str]:
        """Refuse all of it; `skip`: the names to leave out, each with its reason."""
        if self.found and (not skip or self.in_doubt):
            named = [
                f"{reason}{', which cannot be left out' if reason in self.in_doubt else ''} ({len(names)}): "
                f"{listing(_with_detail(names), quoted=False)}"
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


def required(path: Path, what: str, remedy: str) -> Path:
    """The path, where it is there."""
    if not path.exists():
        below = sorted({each.parent for each in path.parent.glob(f"*/{path.name}")})
        hint = f" Did you mean {below[0]}?" if below else f" Name the {remedy}."
        raise FileNotFoundError(f"{what} has no {path.name} at {path}.{hint}")
    return path


def image_files(folder: Path, at: Path, bad: Unusable) -> list[Path]:
    """The files of a folder of images, but hidden ones, by name; folders among them go to `bad`.

    Args:
        folder: of images.
        at: the same below the source's folder.
        bad: of the source.
    """
    found = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    bad.add(_NESTED, [(at / path.name).as_posix() for path in found if path.is_dir()])
    return [path for path in found if path.is_file()]


def twins(names: Iterable[str]) -> list[str]:
    """Names that two files have, once with composed letters and once with decomposed ones."""
    return [name for name, n in Counter(map(composed, names)).items() if n > 1]


def on_disk(path: Path) -> Path:
    """The path as the disk spells it, where the letters of a name there are composed otherwise."""
    if path.exists() or path == path.parent:
        return path
    folder = on_disk(path.parent)
    there = sorted(folder.iterdir()) if folder.is_dir() else []
    return next((each for each in there if composed(each.name) == composed(path.name)), folder / path.name)


def label_files(images: Collection[str], labels: Mapping[str, Path], bad: Unusable) -> dict[str, Path]:
    """Image → the label file of the same stem; what has no other side, or shares it, goes to `bad`.

    Args:
        images: their names, with or without folders.
        labels: name → label file, of one folder.
        bad: of the source.
    """
    stem = {name: composed(PurePosixPath(name).stem) for name in (*images, *labels)}
    shown, texts = (Counter(stem[name] for name in names) for names in (images, labels))
    bad.add("images that share a label file", [each for each in images if shown[stem[each]] > 1])
    lacking = [each for each in images if stem[each] not in texts]
    bad.add("images without a label file (an empty one says intact)", lacking)
    bad.add("label files without an image", [each for each in labels if stem[each] not in shown])
    bad.add("images with two label files of one name", [each for each in images if texts[stem[each]] > 1])
    of_stem = {stem[name]: path for name, path in labels.items()}
    return {each: of_stem[stem[each]] for each in images if stem[each] in texts}


def readable_size(path: Path) -> tuple[int, int] | None:
    """Height and width in pixels of an image as it is displayed; None: it cannot be read."""
    try:
        return displayed_size(path)
    except (OSError, ValueError):
        return None
