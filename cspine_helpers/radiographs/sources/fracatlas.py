"""FracAtlas, as published."""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath

import numpy as np
import pandas as pd

from cspine_helpers.files.paths import listing
from cspine_helpers.files.tables import Column, checked, read_columns
from cspine_helpers.radiographs.annotations import (
    Regions,
    UnusableAnnotations,
    parse_coco,
    parse_vgg,
    parse_voc,
    parse_yolo,
)
from cspine_helpers.radiographs.image_ids import composed
from cspine_helpers.radiographs.sources.source import (
    CLASSES_FILE,
    Source,
    Unusable,
    image_files,
    label_files,
    readable_size,
    required,
    twins,
)

_PARTS, _VIEWS = ("hand", "leg", "hip", "shoulder"), ("frontal", "lateral", "oblique")
_SPLITS = {"train": "train", "valid": "val", "test": "test"}  # FracAtlas' files of its fractured images
_BOXES = {"PASCAL VOC": ".xml", "YOLO": ".txt"}  # folders of a file an image
_CITATION = (
    "Abedeen I, Rahman MA, Prottyasha FZ, et al. FracAtlas: A Dataset for Fracture Classification, "
    "Localization and Segmentation of Musculoskeletal Radiographs. Scientific Data 10, 521 (2023). "
    "doi:10.1038/s41597-023-02432-4"
)


def read_fracatlas(folder: str | Path, *, skip_unusable: bool = False, name: str = "fracatlas") -> Source:
    """FracAtlas in its published layout, or a copy with other image sizes whose polygons were scaled along.

    Label, parts, views, hardware and multi-scan are those of `dataset.csv`; polygons those of the VGG file,
    else of the COCO file, else boxes of Pascal VOC or YOLO. The split is the column `split` where there is
    one, else that of `Utilities`, which has the fractured images only. FracAtlas names no patients.

    Args:
        folder: with `dataset.csv`, `images/Fractured`, `images/Non_fractured`, `Annotations`.
        skip_unusable: leave out images without row, rows without image, regions without image, images with a
            region that cannot be used, and what contradicts itself.
        name: of the source.

    Raises:
        FileNotFoundError: a file of the layout is not there.
        ValueError: images, rows and polygons do not fit each other, and `skip_unusable` is not set; or
            regions are of nobody knows which image. Names them all.

    Example:
        >>> read_fracatlas(fracatlas_folder).table["label"].sum()
        np.int64(8)
    """
    folder = Path(folder)
    what = f"FracAtlas at {folder}"
    required(folder / "dataset.csv", what, "folder that holds dataset.csv, images/ and Annotations/")
    bad = Unusable(what)

    # 1. Rows, images and regions, by file name.
    flags = [*_PARTS, "mixed", "hardware", "multiscan", "fractured", *_VIEWS]
    needed = ["image_id", *flags, "fracture_count"]
    found = read_columns(
        folder / "dataset.csv", needed, what="FracAtlas table", source="", text=["image_id", "split"]
    )
    columns = [Column("image_id"), *(Column(each, "whole", among=(0, 1)) for each in flags)]
    columns += [Column("fracture_count", "whole", low=0), Column("split", empty=True, optional=True)]
    found["image_id"] = found["image_id"].map(composed, na_action="ignore")
    rows = checked(found, columns, what=f"{what}: dataset.csv", key=("image_id",)).set_index("image_id")
    files: dict[str, Path] = {}
    for kind in ("Fractured", "Non_fractured"):
        images = required(folder / "images" / kind, what, "folder images/ with all images")
        here = image_files(images, Path("images", kind), bad)
        bad.add("images of one name, with accents composed and decomposed", twins(path.name for path in here))
        named = {composed(path.name): path for path in here}
        bad.add("images in both folders, Fractured and Non_fractured", files.keys() & named.keys())
        files |= named
    sizes = {each: size for each, path in files.items() if (size := readable_size(path))}
    without = [each for each in {**files, **dict.fromkeys(rows.index)} if each not in sizes]
    doubtful: dict[str, str] = {}
    try:
        regions = _regions(folder / "Annotations", files, sizes, without, bad)
    except UnusableAnnotations as error:
        if error.sound is None:  # of every image, nobody knows whether it has others
            regions, doubtful = {}, dict.fromkeys(sizes, "")
            for kind, places in error.faults.items():
                bad.refuse(f"annotations: {kind[0].lower()}{kind[1:]}", places)
        else:
            regions, doubtful = error.sound, error.images
            bad.add("regions of images that are not there", error.unknown)
            for each, reason in doubtful.items():
                bad.add("images with regions that cannot be used", [each], reason)

    # 2. What does not fit each other.
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
    split = used["split"].fillna("") if "split" in used else _published_split(folder, used.index)
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
    return Source.of(
        name,
        folder,
        table,
        {files[each].relative_to(folder).as_posix(): regions.get(each, []) for each in used.index},
        classes={"fractured": 1},
        left_out=left_out,
        notes=notes,
        citation=_CITATION,
        licence="CC BY 4.0",
    )


def _joined(flags: pd.DataFrame) -> list[str]:
    """The names of the columns that are 1, in each row, joined by `+`."""
    return ["+".join(flags.columns[row == 1]) for row in flags.to_numpy()]


def _regions(
    folder: Path,
    files: Collection[str],
    sizes: Mapping[str, tuple[int, int]],
    left_out: Sequence[str],
    bad: Unusable,
) -> Regions:
    """File name → regions, from the first that is there: VGG, COCO, or the boxes of Pascal VOC or YOLO."""
    for kind, parse in (("VGG", parse_vgg), ("COCO", parse_coco)):
        path = folder / f"{kind} JSON" / f"{kind}_fracture_masks.json"
        if path.is_file():
            return parse(path, sizes, left_out=left_out)
    for kind in ("PASCAL VOC", "YOLO"):
        if labels := _labels_in(folder / kind):
            of = label_files(files, {f"{folder.name}/{kind}/{path.name}": path for path in labels}, bad)
            of = {name: path for name, path in of.items() if name in sizes}
            return parse_voc(of, sizes) if kind == "PASCAL VOC" else parse_yolo(of, sizes, ["fractured"])
    raise FileNotFoundError(
        f"{bad.what} has no annotations of fractures in {folder}. Bring VGG JSON/VGG_fracture_masks.json."
    )


def _labels_in(folder: Path) -> list[Path]:
    """The label files of a folder of boxes, by name; none where there is no such folder."""
    found = folder.glob(f"[!.]*{_BOXES[folder.name]}")
    return sorted(path for path in found if path.name != CLASSES_FILE)


def _counts_that_differ(rows: pd.DataFrame, regions: Regions, folder: Path) -> list[str]:
    """Where dataset.csv or YOLO files count other fractures than there are polygons: in FracAtlas, thrice."""
    polygons = {each: len(regions.get(each, [])) for each in rows.index}
    files = {composed(path.stem): path for path in _labels_in(folder / "YOLO")}
    of = {each: files[stem] for each in rows.index if (stem := PurePosixPath(each).stem) in files}
    boxes = {each: sum(map(bool, path.read_bytes().split(b"\n"))) for each, path in of.items()}
    counts = {"fracture_count of dataset.csv": dict(rows["fracture_count"]), "YOLO boxes": boxes}
    notes = []
    for source, found in counts.items():
        differ = [f"{each} ({n} for {polygons[each]})" for each, n in found.items() if n != polygons[each]]
        if differ:
            named = listing(differ, quoted=False)
            notes.append(f"{source}: other numbers than of polygons in {len(differ)} images: {named}.")
    return notes


def _published_split(folder: Path, names: Iterable[str]) -> list[str]:
    """Each image's split by `Utilities/Fracture Split`, empty for images without one."""
    split: dict[str, str] = {}
    twice: list[str] = []
    for file, word in _SPLITS.items():
        path = folder / "Utilities" / "Fracture Split" / f"{file}.csv"
        if path.is_file():
            found = read_columns(path, ["image_id"], what="split of FracAtlas", source="")
            listed = dict.fromkeys(map(composed, found["image_id"].dropna()), word)
            twice += [name for name in listed if name in split]
            split |= listed
    if twice:
        raise ValueError(
            f"FracAtlas' splits in {folder / 'Utilities'} share images ({len(twice)}): {listing(twice)}. "
            "Leave each in one of them."
        )
    return [split.get(name, "") for name in names]
