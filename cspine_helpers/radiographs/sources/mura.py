"""MURA, as published."""

import re
from collections import Counter, defaultdict
from pathlib import Path

import pandas as pd

from cspine_helpers.files.paths import listing
from cspine_helpers.files.tables import utf8
from cspine_helpers.radiographs.image_ids import composed
from cspine_helpers.radiographs.sources.source import Source, Unusable, required, twins

_STUDY = re.compile(r"(train|valid)/XR_([A-Z]+)/(patient\d+)/(study\d+)_(positive|negative)")
_CITATION = (
    "Rajpurkar P, Irvin J, Bagul A, et al. MURA: Large Dataset for Abnormality Detection in Musculoskeletal "
    "Radiographs. MIDL 2018. arXiv:1712.06957"
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
    bad, files, rows = Unusable(what), dict[str, Path](), list[tuple[str, re.Match[str]]]()
    for split in ("train", "valid"):
        # 1. What the tables say, and what lies there.
        required(folder / split, what, "folder MURA-v1.1 with train, valid and four tables")
        listed = [_below_root(cells[0]) for cells in _cells(folder / f"{split}_image_paths.csv", 1, what)]
        cells = _cells(folder / f"{split}_labeled_studies.csv", 2, what)
        told: dict[str, set[str]] = defaultdict(set)
        for study, label in cells:
            told[_below_root(study)].add(label)
        paths = sorted((folder / split).glob("XR_*/patient*/study*/[!.]*"))
        lying = [path.relative_to(folder).as_posix() for path in paths if path.is_file()]
        lies = {composed(each): folder / each for each in lying}
        # 2. What does not fit.
        parsed = {
            each: _STUDY.fullmatch(each.rpartition("/")[0]) for each in {**dict.fromkeys(listed), **lies}
        }
        bad.add("paths that are not like MURA's", (each for each, match in parsed.items() if not match))
        bad.add("images of one name, with accents composed and decomposed", twins(lying))
        bad.add(f"images without a row in {split}_image_paths.csv", lies.keys() - set(listed))
        bad.add("rows without an image", set(listed) - lies.keys())
        again = Counter([*listed, *(_below_root(study) for study, _ in cells)])
        bad.add("rows that repeat an image or a study", (each for each, n in again.items() if n > 1))
        word = {"negative": {"0"}, "positive": {"1"}}
        for each, match in parsed.items():
            study = each.rpartition("/")[0]
            if not match:
                continue
            if study not in told:
                bad.add(f"images of studies without a row in {split}_labeled_studies.csv", [each])
            elif len(told[study]) > 1:
                bad.add(f"images of studies that {split}_labeled_studies.csv gives two labels", [each])
            elif told[study] != word[match[5]]:
                bad.add(f"images of studies whose folder contradicts {split}_labeled_studies.csv", [each])
            rows.append((each, match))
        files |= lies
        known = {each.rpartition("/")[0] for each in lies}
        bad.add(f"studies of {split}_labeled_studies.csv without an image", told.keys() - known)
    words: dict[str, set[str]] = defaultdict(set)
    for _, match in rows:
        words[_study(match)].add(match[5])
    torn = [each for each, match in rows if len(words[_study(match)]) > 1]
    bad.add("images of studies whose folders are positive and negative", torn)
    left_out = bad.settle(skip=skip_unusable)
    used = sorted((each, match) for each, match in rows if each not in left_out)
    table = pd.DataFrame(
        {
            "original": [files[each].relative_to(folder).as_posix() for each, _ in used],
            "part": [match[2].lower() for _, match in used],
            "study": [_study(match) for _, match in used],
            "patient": [match[3] for _, match in used],
            "label": [int(match[5] == "positive") for _, match in used],
            "split": [match[1] for _, match in used],
        }
    )
    names = table["study"] + "-" + table["original"].str.rpartition("/")[2]
    return Source.of(
        name,
        folder,
        table,
        {},
        names=names,
        classes={"negative": 0, "positive": 1},
        positive="abnormal",
        left_out=left_out,
        citation=_CITATION,
        licence="Stanford MURA Dataset Research Use Agreement; not to be handed on",
    )


def _study(match: re.Match[str]) -> str:
    """A study's name, whichever split and label its folder has."""
    return f"{match[2].lower()}-{match[3]}-{match[4]}"


def _below_root(path: str) -> str:
    """A path of MURA's tables below its first folder, without a slash at the end."""
    return composed(path.strip().rstrip("/").partition("/")[2])


def _cells(path: Path, count: int, what: str) -> list[list[str]]:
    """The cells of a table without header, separated by commas, semicolons or tabs, with or without a BOM.

    Raises:
        FileNotFoundError: there is no such table.
        ValueError: it has other than `count` cells a row.
    """
    required(path, what, "folder that holds the four tables")
    lines = [line for line in utf8(path.read_bytes(), path.name).decode().splitlines() if line.strip()]
    rows = [[cell.strip() for cell in re.split(r"[,;\t]", line)] for line in lines]
    if wrong := [line for line, row in zip(lines, rows, strict=True) if len(row) != count]:
        raise ValueError(
            f"{path.name} of {what} has rows of other than {count} cells ({len(wrong)}): {listing(wrong)}. "
            "Mend them."
        )
    return rows
