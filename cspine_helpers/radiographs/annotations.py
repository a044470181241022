"""Fractures as people have drawn them: VGG, COCO, YOLO and Pascal VOC to regions in the displayed frame.

Strict: files are read whole or refused, with all that is wrong in them. Coordinates are x and y in pixels
from the top left corner, so that pixel i lies between i and i + 1.

Regions become masks, and masks text: run lengths as COCO counts them.
"""

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any
from xml.etree import ElementTree

import cv2
import numpy as np
from numpy.typing import ArrayLike, NDArray

from cspine_helpers.files.paths import listing
from cspine_helpers.files.records import parse_json
from cspine_helpers.radiographs.image_ids import composed

Sizes = Mapping[str, tuple[int, int]]  # image file name → height and width of the displayed frame, pixels
_BEYOND = 0.01  # of a side: so far may a hand slip off the image, and a box be rounded


@dataclass(frozen=True, eq=False)
class Region:
    """A region of one class.

    Attributes:
        label: its class, as the file names it.
        points: (N, 2) x, y in pixels of the displayed frame: a polygon of three points or more, not closed;
            or the four corners of a box.
        is_box: whether the file holds a box.
    """

    label: str
    points: NDArray[np.float64]
    is_box: bool = False


Regions = dict[str, list[Region]]  # image file name → its regions, none where nothing was drawn


class UnusableAnnotations(ValueError):
    """Annotations with something wrong in them.

    Attributes:
        faults: kind → its places.
        images: image file name → the first thing wrong with its regions.
        unknown: names of image files, as they are written, that are not there.
        sound: image file name → regions, of the others; None where something is wrong with no image's alone.
    """

    def __init__(self, message: str, reading: "_Reading") -> None:
        super().__init__(message)
        self.faults = dict(reading.faults)
        self.images = reading.images
        self.unknown = tuple(reading.unknown)
        others = {name: its for name, its in reading.regions.items() if name not in self.images}
        self.sound = None if reading.is_all_in_doubt else others


@dataclass
class _Reading:
    """What was read so far, and what was found to be wrong: one sentence a kind."""

    sizes: Sizes
    left_out: Collection[str]
    regions: Regions = field(default_factory=dict)
    faults: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    at: str | None = None  # the image whose regions are being read
    images: dict[str, str] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)
    is_all_in_doubt: bool = False

    def __post_init__(self) -> None:
        self.known = {composed(name): name for name in (*self.left_out, *self.sizes)}

    def fault(self, kind: str, place: str) -> None:
        self.faults[kind].append(place)
        if self.at is None:
            self.is_all_in_doubt = True
        else:
            self.images.setdefault(self.at, f"{kind[0].lower()}{kind[1:]}: {place}")

    def begin(self, file: str) -> str | None:
        """The image that a file's name means, None where its regions are not wanted or it is unknown."""
        self.at = None
        last = PurePosixPath(file.replace("\\", "/")).name
        name = self.known.get(composed(file), self.known.get(composed(last)))
        if name is None:
            self.faults["Regions of images that are not there"].append(file)  # they put no other in doubt
            self.unknown.append(file)
            return None
        if name in self.left_out:
            return None
        self.at = name
        if name in self.regions:
            self.fault("Images that come twice", file)
        self.regions.setdefault(name, [])
        return name

    def polygon(self, name: str, label: str, coordinates: Iterable[Iterable[Any]], place: str) -> None:
        """Add a polygon, of (x, y) pairs, or what is wrong with it."""
        points = _numbers(coordinates)
        if points is None or (points.ndim != 2 and points.size):
            return self.fault("Coordinates that are no numbers", place)
        points = points.reshape(-1, 2)
        points = points[(points != np.roll(points, -1, axis=0)).any(axis=1)]  # closed by hand, clicked twice
        if len(np.unique(points, axis=0)) < 3:
            return self.fault("Polygons of fewer than three points", place)
        if _is_line(points):
            return self.fault("Polygons that enclose nothing", place)
        return self._add(name, Region(label, points), place)

    def box(self, name: str, label: str, ends: Iterable[Any], place: str) -> None:
        """Add a box, of x and y of two opposite corners, or what is wrong with it."""
        numbers = _numbers(ends)
        if numbers is None:
            return self.fault("Coordinates that are no numbers", place)
        left, top, right, bottom = numbers
        if right <= left or bottom <= top:
            return self.fault("Boxes that enclose nothing", place)
        corners = np.array([(left, top), (right, top), (right, bottom), (left, bottom)])
        return self._add(name, Region(label, corners, is_box=True), place)

    def _add(self, name: str, region: Region, place: str) -> None:
        height, width = self.sizes[name]
        beyond = np.maximum(-region.points, region.points - (width, height)).max(axis=0)
        if (beyond > np.array([width, height]) * _BEYOND).any():
            return self.fault("Regions that reach out of their image", f"{place} of {width} × {height}")
        inside = np.clip(region.points, 0, (width, height))
        if _is_line(inside):
            return self.fault("Regions that reach out of their image", f"{place} of {width} × {height}")
        self.regions[name].append(Region(region.label, inside, region.is_box))
        return None

    def result(self, what: str) -> Regions:
        """The regions.

        Raises:
            UnusableAnnotations: something was wrong; a sentence for each kind, with its first ten places and
                their number.
        """
        if self.faults:
            kinds = " ".join(f"{kind} ({len(at):,}): {listing(at)}." for kind, at in self.faults.items())
            raise UnusableAnnotations(f"{what} refused. {kinds} Correct that, or take the original.", self)
        return self.regions


def _numbers(values: Iterable[Any]) -> NDArray[np.float64] | None:
    """The values as finite numbers, None where one is none."""
    try:
        numbers = np.array([*values], dtype=float)
    except (TypeError, ValueError, OverflowError):
        return None
    return numbers if np.isfinite(numbers).all() else None


def _is_line(points: NDArray[np.float64]) -> bool:
    """Whether all points lie on one line, or in one place."""
    return bool(np.linalg.matrix_rank(points - points[0]) < 2)


# 1. One file of all images.


def parse_vgg(
    path: str | Path, sizes: Sizes, *, attribute: str = "label", left_out: Collection[str] = ()
) -> Regions:
    """Polygons of a VGG Image Annotator file (JSON): one object an image, or a project that holds them.

    Args:
        path: the file. `regions` may be a list, or an object by number.
        sizes: image file name → height and width of the displayed frame, of every image.
        attribute: the region attribute that names the class.
        left_out: image file names whose regions are dropped, as the images are.

    Returns:
        Image file name → its regions, of the images that the file names.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no such file; an image is unknown or comes twice; a shape is no polygon, has fewer
            than three points, encloses nothing or reaches out of its image by more than 1 % of a side; a
            region has no class. Names them all.
    """
    path, reading = Path(path), _Reading(sizes, left_out)
    entries = _json(path)
    entries = entries.get("_via_img_metadata", entries)
    for key, entry in entries.items() if isinstance(entries, dict) else [("entries", None)]:
        if not isinstance(entry, dict):
            reading.at = None
            reading.fault("Parts that describe no image", key)
            continue
        name, found = reading.begin(str(entry.get("filename", key))), entry.get("regions") or []
        if name is None:
            continue
        listed = found if isinstance(found, list) else [found]
        for number, item in found.items() if isinstance(found, dict) else enumerate(listed):
            place = f"{name} region {number}"
            shape, about = (_part(item, part) for part in ("shape_attributes", "region_attributes"))
            xs, ys, label = shape.get("all_points_x"), shape.get("all_points_y"), about.get(attribute)
            if shape.get("name") != "polygon":
                reading.fault("Shapes that are no polygon", f"{place}: {shape.get('name')}")
            elif not isinstance(label, str) or not label:
                reading.fault(f"Regions without a class in their attribute {attribute!r}", place)
            elif not isinstance(xs, list) or not isinstance(ys, list) or len(xs) != len(ys):
                reading.fault("Polygons with not as many x as y", place)
            else:
                reading.polygon(name, label, zip(xs, ys, strict=True), place)
    return reading.result(f"{path.name} is")


def parse_coco(path: str | Path, sizes: Sizes, *, left_out: Collection[str] = ()) -> Regions:
    """Polygons of a COCO file, each a region; the box of an annotation that has no polygon.

    Args:
        path: the file.
        sizes: image file name → height and width of the displayed frame, of every image. The file's own sizes
            must be these, or these exchanged: some tools write the size of the stored pixels.
        left_out: image file names whose regions are dropped, as the images are.

    Returns:
        Image file name → its regions, of the images that the file names.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no such file; an image is unknown, comes twice or is of another size; an annotation
            is of an unknown image or category, a run-length mask, or wrong as in `parse_vgg`. Names them all.
    """
    path, reading = Path(path), _Reading(sizes, left_out)
    content = _json(path)
    parts = [content.get(part) for part in ("images", "annotations", "categories")]
    if not all(_is_objects(part) for part in parts):
        raise ValueError(
            f"{path.name} lacks COCO's lists of images, annotations and categories. Take another."
        )
    images, annotations, categories = ([*(part or ())] for part in parts)
    labels, names = {_key(its, "id"): str(its.get("name")) for its in categories}, dict[str, str | None]()
    for its in images:
        file = str(its.get("file_name"))
        name = reading.begin(file)
        if _key(its, "id") in names:
            reading.at = None  # whose the annotations of that id are, nobody knows
            reading.fault("Images with the id of another", file)
            reading.at = name
        names[_key(its, "id")] = name
        if name is not None:
            _check_size(reading, name, its.get("height"), its.get("width"))
    for its in annotations:
        place = f"annotation {its.get('id')}"
        image, category = _key(its, "image_id"), _key(its, "category_id")
        reading.at = names.get(image)
        if image not in names:
            reading.fault("Annotations of no image", f"{place}: {its.get('image_id')}")
            continue
        name = names[image]
        if name is None:
            continue
        if category not in labels:
            reading.fault("Annotations of no category", f"{place}: {its.get('category_id')}")
            continue
        label, drawn, box = labels[category], its.get("segmentation"), its.get("bbox")
        place = f"{name} {place}"
        if isinstance(drawn, dict) or its.get("iscrowd"):
            reading.fault("Run-length masks where polygons are read", place)
        elif isinstance(drawn, list) and drawn:
            for part in drawn if isinstance(drawn[0], list) else [drawn]:
                if not isinstance(part, list) or len(part) % 2:
                    reading.fault("Polygons with not as many x as y", place)
                else:
                    reading.polygon(name, label, zip(part[::2], part[1::2], strict=True), place)
        elif (ends := _numbers(box or [])) is not None and ends.shape == (4,):
            reading.box(name, label, (*ends[:2], *ends[:2] + ends[2:]), place)
        else:
            reading.fault("Annotations with neither polygon nor box", place)
    return reading.result(f"{path.name} is")


def _key(item: Mapping[str, Any], name: str) -> str:
    """An id as text, for that of a damaged file may be anything."""
    return str(item.get(name))


def _part(item: Any, name: str) -> dict[str, Any]:
    """An object within an object; an empty one where there is none."""
    found = item.get(name) if isinstance(item, dict) else None
    return found if isinstance(found, dict) else {}


def _json(path: Path) -> dict[str, Any]:
    content = parse_json(_bytes(path), path.name, remedy="Take the original.")
    if not isinstance(content, dict):
        raise ValueError(
            f"{path.name} holds no object of annotations but {type(content).__name__}. Take another."
        )
    return content


def _bytes(path: Path) -> bytes:
    if not path.is_file():
        raise FileNotFoundError(f"No annotations at {path}. Check the name.")
    return path.read_bytes()


def _is_objects(found: Any) -> bool:
    return isinstance(found, list) and all(isinstance(its, dict) for its in found)


def _check_size(reading: _Reading, name: str, height: Any, width: Any) -> None:
    """An image in another size has its regions elsewhere."""
    displayed = reading.sizes[name]
    if (height, width) not in (displayed, displayed[::-1]):
        where = f"{name}: {width} × {height}, is {displayed[1]} × {displayed[0]}"
        reading.fault("Images drawn on in another size", where)


# 2. One file an image.


def parse_yolo(
    files: Mapping[str, Path], sizes: Sizes, names: Sequence[str], *, left_out: Collection[str] = ()
) -> Regions:
    """Boxes and polygons of YOLO label files; an empty file is an image where nothing was found.

    A line is `class x y width height`, of the box's centre, or `class x1 y1 x2 y2 x3 y3 …`, as shares of the
    displayed frame's width and height.

    Args:
        files: image file name → its label file, of every image.
        sizes: image file name → height and width of the displayed frame.
        names: of the classes, in the order of their numbers.
        left_out: image file names whose regions are dropped, as the images are.

    Returns:
        Image file name → its regions.

    Raises:
        ValueError: a label file is missing; a line has another number of columns, an unknown class, or
            coordinates outside 0 … 1; a region is wrong as in `parse_vgg`. Names them all.
    """
    reading = _Reading(sizes, left_out)
    for file, path in files.items():
        name = reading.begin(file)
        if name is None:
            continue
        if not path.is_file():
            reading.fault("Images without a label file (an empty one says that nothing was found)", name)
            continue
        height, width = sizes[name]
        for number, line in enumerate(path.read_text("utf-8-sig", errors="replace").splitlines(), start=1):
            place, (label, *rest) = f"{path.name} line {number}", line.split() or [""]
            if not label:
                continue
            shares = _numbers(rest)
            if not label.isdecimal() or int(label) >= len(names):
                reading.fault(f"Classes that are none of 0 to {len(names) - 1}", f"{place}: {label}")
            elif shares is None:
                reading.fault("Coordinates that are no numbers", place)
            elif len(shares) != 4 and (len(shares) < 6 or len(shares) % 2):
                reading.fault(
                    "Lines of other than a class with 4 numbers or with 3 points and more",
                    f"{place}: {len(shares) + 1} columns",
                )
            elif shares.min() < 0 or shares.max() > 1:
                reading.fault("Coordinates outside 0 to 1", place)
            elif len(shares) == 4:
                centre, half = shares[:2] * (width, height), shares[2:] * (width, height) / 2
                reading.box(name, names[int(label)], (*centre - half, *centre + half), place)
            else:
                reading.polygon(name, names[int(label)], shares.reshape(-1, 2) * (width, height), place)
    return reading.result("These label files are")


def parse_voc(files: Mapping[str, Path], sizes: Sizes, *, left_out: Collection[str] = ()) -> Regions:
    """Boxes of Pascal VOC files (XML), one an image.

    Args:
        files: image file name → its XML file. What a file itself calls its image is not used.
        sizes: image file name → height and width of the displayed frame; as in `parse_coco`.
        left_out: image file names whose regions are dropped, as the images are.

    Returns:
        Image file name → its regions.

    Raises:
        ValueError: a file is missing, no XML, or of an image of another size; an object has no name or no
            box; a box encloses nothing or reaches out of its image. Names them all.
    """
    reading = _Reading(sizes, left_out)
    for file, path in files.items():
        name = reading.begin(file)
        if name is None:
            continue
        if not path.is_file():
            reading.fault("Images without an annotation file", name)
            continue
        try:
            root = ElementTree.fromstring(path.read_bytes())
        except (ElementTree.ParseError, LookupError, ValueError):  # also of an encoding that is none
            reading.fault("Files that are no XML", path.name)
            continue
        stated = [root.findtext(f"size/{side}") for side in ("height", "width")]
        if any(stated):
            numbers = _numbers(stated)
            _check_size(reading, name, *(stated if numbers is None else map(int, numbers)))
        for number, its in enumerate(root.iterfind("object"), start=1):
            place = f"{path.name} object {number}"
            label = (its.findtext("name") or "").strip()
            ends = [its.findtext(f"bndbox/{end}") for end in ("xmin", "ymin", "xmax", "ymax")]
            if not label:
                reading.fault("Objects without a class", place)
            elif None in ends:
                reading.fault("Objects without a box", place)
            else:
                reading.box(name, label, ends, place)
    return reading.result("These label files are")


# 3. Masks.


def rasterise(polygons: Iterable[ArrayLike], height: int, width: int) -> NDArray[np.uint8]:
    """The union of polygons as a mask: 1 where a pixel's middle lies inside one.

    A polygon that holds no pixel's middle marks the pixels that its outline runs through: none that touches
    the image vanishes. One that touches or crosses itself is filled wherever its outline winds around.

    Args:
        polygons: each (N, 2) of x, y in pixels; what lies outside the image is cut off.
        height: of the image.
        width: of the image.

    Returns:
        (height, width) of 0 and 1.

    Raises:
        ValueError: a polygon has fewer than three points, or coordinates that are no finite numbers.

    Example:
        >>> rasterise([[(1, 0), (3, 0), (3, 2), (1, 2)]], 2, 4)
        array([[0, 1, 1, 0],
               [0, 1, 1, 0]], dtype=uint8)
    """
    mask = np.zeros((height, width), np.uint8)
    for polygon in polygons:
        points = np.asarray(polygon, float)
        if points.ndim != 2 or points.shape[1:] != (2,) or len(points) < 3 or not np.isfinite(points).all():
            raise ValueError(
                f"A polygon is three points or more of finite x, y; found {listing(points.tolist())}."
            )
        inside = _winding(points, height, width) != 0
        if inside.any():
            mask[inside] = 1
        else:
            cv2.polylines(mask, [np.floor(points).astype(np.int32)], isClosed=True, color=1)
    return mask


def _winding(points: NDArray[np.float64], height: int, width: int) -> NDArray[np.int64]:
    """How often the polygon winds around each pixel's middle, (height, width)."""
    x0, y0 = points.T
    x1, y1 = np.roll(points, -1, axis=0).T
    middles = np.arange(height)[:, None] + 0.5
    down, up = (y0 <= middles) & (middles < y1), (y1 <= middles) & (middles < y0)
    rows, edges = np.nonzero(down | up)
    at = x0[edges] + (middles[rows, 0] - y0[edges]) * (x1 - x0)[edges] / (y1 - y0)[edges]
    steps = np.zeros((height, width + 1), np.int64)
    columns = np.clip(np.ceil(at - 0.5), 0, width).astype(int)  # the first middle on or right of the edge
    np.add.at(steps, (rows, columns), np.where(down[rows, edges], 1, -1))
    return steps.cumsum(axis=1)[:, :width]


def encode_rle(mask: NDArray[Any]) -> str:
    """A mask as run lengths of zeros, of ones, of zeros …, down each column, from the left.

    Args:
        mask: (H, W); what is not 0 is 1.

    Returns:
        The lengths between spaces. They are COCO's `counts`, the first of zeros even where there is none.

    Example:
        >>> encode_rle(np.array([[0, 1], [1, 1]]))
        '1 3'
    """
    if mask.ndim != 2:
        raise ValueError(f"A mask has a height and a width; found shape {mask.shape}.")
    cells = np.concatenate([[False], (mask != 0).ravel(order="F")])
    changes = np.flatnonzero(np.diff(cells))
    return " ".join(map(str, np.diff([0, *changes.tolist(), mask.size]).tolist()))


def decode_rle(text: str, height: int, width: int) -> NDArray[np.uint8]:
    """The mask of 0 and 1, (height, width), that `encode_rle` wrote.

    Raises:
        ValueError: it is no text of whole numbers, or their sum is not the number of pixels.

    Example:
        >>> decode_rle("1 3", 2, 2)
        array([[0, 1],
               [1, 1]], dtype=uint8)
    """
    counts = text.split()
    if not all(count.isdecimal() for count in counts):
        raise ValueError(f"Run lengths are whole numbers between spaces; found {listing([text])}.")
    lengths = np.array(counts, dtype=np.int64)
    if lengths.sum() != height * width:
        raise ValueError(
            f"Run lengths of {lengths.sum():,} pixels are of no mask of {height} × {width}. Give the size of "
            "the image that they were written for."
        )
    cells = np.repeat(np.arange(len(lengths)) % 2, lengths).astype(np.uint8)
    return cells.reshape((height, width), order="F")
