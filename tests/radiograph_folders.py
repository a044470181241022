"""Small made folders of radiographs in the layouts they are published in; each fracture's polygon is known.

An image is a limb: soft tissue, a bone with a bright cortex, noise. A fracture is a dark line through the
bone with bright rims. The same call gives the same bytes.
"""

import csv
import json
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pandas as pd
from PIL import Image

from cspine_helpers.labels import UID
from cspine_helpers.radiographs.consolidation import consolidate
from cspine_helpers.radiographs.packing import ImagePackConfig
from cspine_helpers.radiographs.sources.fracatlas import read_fracatlas
from cspine_helpers.splits import write_split

PARTS = ("hand", "leg", "hip", "shoulder")
VIEWS = (("frontal",), ("lateral",), ("oblique",), ("frontal", "lateral"))
YOLO_NAMES = ("elbow positive", "fingers positive", "forearm fracture", "humerus")
YOLO_LABELS = {"elbow positive": 1, "fingers positive": 1, "forearm fracture": 1, "humerus": 0}
SMALL = ImagePackConfig(long=96, short=64)  # a frame that packs fast
ROTATED = 1  # the fractured image, counted from 0, that a FracAtlas folder holds with EXIF orientation 6
FRACATLAS_COLUMNS = (
    *("image_id", *PARTS, "mixed", "hardware", "multiscan", "fractured", "fracture_count"),
    *("frontal", "lateral", "oblique"),
)


@dataclass(frozen=True)
class Drawn:
    """A radiograph.

    Attributes:
        pixels: uint8 `(H, W)`, as displayed.
        polygons: one `(4, 2)` of x, y a fracture; pixel i lies between i and i + 1.
    """

    pixels: np.ndarray
    polygons: list[np.ndarray]


def draw_radiograph(
    rng: np.random.Generator,
    *,
    fractures: int = 0,
    hardware: bool = False,
    height: int = 160,
    width: int = 128,
) -> Drawn:
    """A limb along the longer side, tilted a little, with as many fractures."""
    # 1. Along (t) and across (s) the bone, pixels from the centre.
    angle = rng.uniform(-0.2, 0.2) + (np.pi / 2 if width > height else 0)
    along, across = np.array([-np.sin(angle), np.cos(angle)]), np.array([np.cos(angle), np.sin(angle)])
    y, x = np.mgrid[:height, :width] + 0.5
    centre = np.array([width / 2, height / 2]) + rng.uniform(-0.05, 0.05, 2) * [width, height]
    t = (x - centre[0]) * along[0] + (y - centre[1]) * along[1]
    s = (x - centre[0]) * across[0] + (y - centre[1]) * across[1]
    long, short = max(height, width), min(height, width)

    # 2. Tissue, bone, cortex, plate.
    half = 0.12 * short * (1 + 0.8 * np.abs(t / long) ** 2)
    pixels = np.where(np.abs(s) < 0.34 * short, 75.0, 22.0)
    pixels = np.where(np.abs(s) < half, 150.0, pixels)
    pixels = np.where(np.abs(np.abs(s) - half) < 2, 200.0, pixels)
    if hardware:
        plate = (np.abs(s - 0.2 * short) < 0.04 * short) & (np.abs(t) < 0.3 * long)
        pixels = np.where(plate, 250.0, pixels)

    # 3. Fractures: a dark line with bright rims, in equal parts of the shaft.
    polygons = []
    for n in range(fractures):
        place = (-0.3 + 0.6 * (n + rng.uniform(0.2, 0.8)) / fractures) * long
        slope = rng.uniform(-0.5, 0.5)
        off, reach = t - place - slope * s, 0.15 * short
        inside = np.abs(s) < reach
        pixels = np.where(inside & (np.abs(off) < 5), 230.0, pixels)
        pixels = np.where(inside & (np.abs(off) < 3), 30.0, pixels)
        ends = [(-reach, -5), (reach, -5), (reach, 5), (-reach, 5)]
        polygons.append(
            np.array([centre + s_ * across + (place + slope * s_ + t_) * along for s_, t_ in ends]).round(2)
        )
    pixels = pixels + rng.normal(0, 5, pixels.shape)
    return Drawn(np.clip(pixels.round(), 0, 255).astype(np.uint8), polygons)


def fracatlas_folder(
    folder: Path, *, images: int = 24, fractured: int = 8, seed: int = 0, split: bool = True
) -> Path:
    """FracAtlas as it is published, smaller: portrait and landscape, one fractured image turned by its EXIF.

    Images are `IMG<n>.jpg`. Every third is fractured until there are `fractured` of them; the first has two
    fractures. Parts and views take turns; one fractured and one intact image have hardware.

    Args:
        folder: made here.
        images: how many.
        fractured: of them, at most a third rounded up.
        seed: of the drawing.
        split: a column `split` in dataset.csv, as the reduced copy has: every fifth image val, else train.
    """
    rng = np.random.default_rng(seed)
    rows, drawn = [], {}
    for n in range(images):
        broken = n % 3 == 0 and n // 3 < fractured
        count = 0 if not broken else 2 if n == 0 else 1
        metal = n in (0, 1)
        height, width = ((160, 128), (144, 112), (120, 152))[n // 3 % 3]
        name = f"IMG{n:07d}.jpg"
        drawn[name] = draw_radiograph(rng, fractures=count, hardware=metal, height=height, width=width)
        part, view = PARTS[n // 3 % 4], VIEWS[n // 2 % 4]
        row = {"image_id": name, **{each: int(each == part) for each in PARTS}, "mixed": 0}
        row |= {"hardware": int(metal), "multiscan": int(len(view) > 1)}
        row |= {"fractured": int(broken), "fracture_count": count}
        row |= {each: int(each in view) for each in ("frontal", "lateral", "oblique")}
        rows.append(row | ({"split": "val" if n % 5 == 4 else "train"} if split else {}))
        kind = "Fractured" if broken else "Non_fractured"
        save_jpeg(drawn[name].pixels, folder / "images" / kind / name, rotated=broken and n // 3 == ROTATED)
    write_rows(folder / "dataset.csv", rows)
    _write_annotations(folder / "Annotations", drawn)
    broken_names = [name for name, image in drawn.items() if image.polygons]
    for name, part_of in zip(("train", "valid", "test"), np.array_split(broken_names, 3), strict=True):
        write_rows(
            folder / "Utilities" / "Fracture Split" / f"{name}.csv", [{"image_id": each} for each in part_of]
        )
    return folder


def save_jpeg(pixels: np.ndarray, path: Path, *, rotated: bool = False) -> None:
    """Save what is displayed; `rotated`: turned, with the EXIF orientation 6 that turns it back."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image, exif = Image.fromarray(pixels), Image.Exif()
    if rotated:
        image, exif[0x0112] = image.transpose(Image.Transpose.ROTATE_90), 6
    image.save(path, quality=92, exif=exif)


def write_rows(path: Path, rows: list[dict]) -> None:
    """A CSV file; the columns are those of the first row."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _write_annotations(folder: Path, drawn: dict[str, Drawn]) -> None:
    """The four formats, in the displayed frame, as makesense.ai and FracAtlas' notebooks write them."""
    # 1. VGG and COCO know the fractured images only.
    vgg, images, annotations = {}, [], []
    for name, image in drawn.items():
        if not image.polygons:
            continue
        regions = {
            str(n): {
                "shape_attributes": {
                    "name": "polygon",
                    "all_points_x": [*polygon[:, 0], polygon[0, 0]],
                    "all_points_y": [*polygon[:, 1], polygon[0, 1]],
                },
                "region_attributes": {"label": "fractured"},
            }
            for n, polygon in enumerate(image.polygons)
        }
        vgg[name] = {"fileref": "", "size": 1, "filename": name, "base64_img_data": "", "file_attributes": {}}
        vgg[name]["regions"] = regions
        height, width = image.pixels.shape
        images.append({"id": len(images), "width": width, "height": height, "file_name": name})
        for polygon in image.polygons:
            low, size = polygon.min(0), np.ptp(polygon, axis=0)
            annotations.append(
                {
                    **{"id": len(annotations), "iscrowd": 0, "image_id": len(images) - 1, "category_id": 1},
                    **{"segmentation": [polygon.ravel().tolist()], "bbox": [*low.tolist(), *size.tolist()]},
                    "area": float(np.prod(size)),
                }
            )
    coco = {"info": {"description": "made"}, "images": images, "annotations": annotations}
    coco["categories"] = [{"id": 1, "name": "fractured"}]
    for kind, content in (("VGG", vgg), ("COCO", coco)):
        path = folder / f"{kind} JSON" / f"{kind}_fracture_masks.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(content), encoding="utf-8")
    # 2. YOLO and Pascal VOC have a file an image.
    for kind in ("YOLO", "PASCAL VOC"):
        (folder / kind).mkdir()
    for name, image in drawn.items():
        stem, (height, width) = name.removesuffix(".jpg"), image.pixels.shape
        lines = [yolo_box(0, polygon, height, width) for polygon in image.polygons]
        (folder / "YOLO" / f"{stem}.txt").write_text("".join(f"{line}\n" for line in lines))
        tree = _voc(name, image)
        tree.write(folder / "PASCAL VOC" / f"{stem}.xml")


def _voc(name: str, image: Drawn) -> ElementTree.ElementTree:
    root = ElementTree.Element("annotation")
    ElementTree.SubElement(root, "filename").text = name
    size = ElementTree.SubElement(root, "size")
    for key, value in zip(("height", "width", "depth"), (*image.pixels.shape, 1), strict=True):
        ElementTree.SubElement(size, key).text = str(value)
    for polygon in image.polygons:
        each = ElementTree.SubElement(root, "object")
        ElementTree.SubElement(each, "name").text = "fractured"
        box = ElementTree.SubElement(each, "bndbox")
        for key, value in zip(
            ("xmin", "ymin", "xmax", "ymax"), [*polygon.min(0), *polygon.max(0)], strict=True
        ):
            ElementTree.SubElement(box, key).text = str(int(value.round()))
    return ElementTree.ElementTree(root)


def yolo_box(number: int, polygon: np.ndarray, height: int, width: int) -> str:
    """A YOLO line: class, centre and size of the polygon's box as shares of the image."""
    low, high = polygon.min(0) / [width, height], polygon.max(0) / [width, height]
    return " ".join([str(number), *(f"{value:.6f}" for value in [*(low + high) / 2, *(high - low)])])


def yolo_polygon(number: int, polygon: np.ndarray, height: int, width: int) -> str:
    """A YOLO line: class and corners as shares of the image."""
    return " ".join([str(number), *(f"{value:.6f}" for value in (polygon / [width, height]).ravel())])


def yolo_folder(folder: Path, *, images: int = 12, seed: int = 1) -> Path:
    """A YOLO-format set as Roboflow exports one: `train`, `valid`, `test`, each with images and labels.

    Of each split's `images // 3`, the first is fractured and marked by a box, the second by a polygon, the
    third is intact (an empty file), the fourth has a box of the class `humerus`, no fracture; and so on.
    """
    rng = np.random.default_rng(seed)
    for split in ("train", "valid", "test"):
        for n in range(images // 3):
            kind = n % 4
            image = draw_radiograph(rng, fractures=int(kind < 2))
            path = folder / split / "images" / f"limb {n} größe_{split}.jpg"
            save_jpeg(image.pixels, path)
            lines = {0: [(yolo_box, 0)], 1: [(yolo_polygon, 2)], 2: [], 3: [(yolo_box, 3)]}[kind]
            polygons = image.polygons or [np.array([[40.0, 20], [90, 20], [90, 140], [40, 140]])]
            text = "".join(f"{write(number, polygons[0], *image.pixels.shape)}\n" for write, number in lines)
            label = folder / split / "labels" / f"{path.stem}.txt"
            label.parent.mkdir(exist_ok=True)
            label.write_text(text)
    names = ", ".join(f"'{name}'" for name in YOLO_NAMES)
    (folder / "data.yaml").write_text(
        "train: ../train/images\nval: ../valid/images\ntest: ../test/images\n\n"
        f"nc: {len(YOLO_NAMES)}\nnames: [{names}]\n"
    )
    return folder


def mura_folder(root: Path, *, patients: int = 8, seed: int = 2) -> Path:
    """MURA v1.1 under `root/MURA-v1.1`, which is returned: the last quarter of the patients in valid.

    Patients take turns: odd ones are abnormal, every fourth has two studies; each study has two views.
    """
    folder, rng = root / "MURA-v1.1", np.random.default_rng(seed)
    for split, numbers in zip(
        ("train", "valid"), np.split(np.arange(patients), [patients * 3 // 4]), strict=True
    ):
        paths, studies = [], []
        for patient in numbers:
            part = ("XR_WRIST", "XR_ELBOW", "XR_HAND")[patient % 3]
            for study in range(1, 3 if patient % 4 == 3 else 2):
                word = "positive" if patient % 2 else "negative"
                name = f"{split}/{part}/patient{patient + 1:05d}/study{study}_{word}"
                studies.append(f"MURA-v1.1/{name}/,{patient % 2}\n")
                (folder / name).mkdir(parents=True)
                for view in (1, 2):
                    image = draw_radiograph(rng, fractures=int(patient % 2))
                    Image.fromarray(image.pixels).save(folder / name / f"image{view}.png")
                    paths.append(f"MURA-v1.1/{name}/image{view}.png\n")
        (folder / f"{split}_image_paths.csv").write_text("".join(paths))
        (folder / f"{split}_labeled_studies.csv").write_text("".join(studies))
    return folder


def radiograph_cohort(folder: Path, *, images: int = 24, fractured: int = 8, seed: int = 0) -> Path:
    """A cohort of a FracAtlas folder, with a split: of six images four train, one validation, one test."""
    source = fracatlas_folder(folder / "source", images=images, fractured=fractured, seed=seed)
    table = consolidate([read_fracatlas(source)], cohort := folder / "cohort")
    names = np.array(["train", "validation", "train", "train", "test", "train"])
    place = (np.arange(len(table)) // 3 + np.arange(len(table)) % 3) % len(names)
    split = pd.DataFrame({UID: table["image"], "split": names[place], "patient": table["patient"]})
    write_split(split, cohort / "split.csv")
    return cohort


def change(path: Path, was: str, now: str) -> None:
    """Replace a piece of text in a file, once."""
    text = path.read_text(encoding="utf-8")
    assert was in text
    path.write_text(text.replace(was, now, 1), encoding="utf-8")
