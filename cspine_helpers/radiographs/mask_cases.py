"""Radiographs that are judged: masks compared with what was outlined, pixel by pixel, counted once an image.

Masks are compared in the displayed frame of the image. What was counted is kept in three tables, and every
metric comes from them (`evaluation`). Shapes: n images, P patients (groups).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self, get_args

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage

from cspine_helpers.evaluation.cases import Cases, check_choice
from cspine_helpers.evaluation.resampling import (
    Floats,
)
from cspine_helpers.files.paths import listing
from cspine_helpers.files.tables import (
    Column,
    checked,
    read_columns,
    refuse,
    require_columns,
    write_table,
)
from cspine_helpers.labels import UID
from cspine_helpers.radiographs.annotations import rasterise

EPSILON = 1e-6  # of Dice, as the public FracAtlas benchmark adds it: an empty pair counts as 1
FRAME = (384, 384)  # height and width of the square that the benchmark measures on
_WORDS, _FLAGS = ("part", "view", "size"), ("hardware", "multiscan")
SUBGROUPS = ("part", "view", "hardware", "multiscan", "size")
_COUNTED = (  # columns of each image, where masks were predicted
    *("true", "predicted", "overlap", "dice", "dice_frame", "true_frame"),
    *("lesions", "lesions_hit", "marks", "false_marks"),
)
_TABLES = ("lesions", "marks", "images")  # of `MaskCases`, as files; a folder with the last is whole
_OF_IMAGE = (
    Column("image", "id"),
    Column("patient"),
    Column("split"),
    Column("label", "whole", among=(0, 1)),
    Column("probability", "number", low=0, high=1),
    Column("study", optional=True),
    *(Column(name, optional=True, empty=True) for name in _WORDS),
    *(Column(name, "whole", among=(0, 1), optional=True, empty=True) for name in _FLAGS),
    Column("rule"),
)
_COUNTS = tuple(
    Column(name, "number", low=0, high=1) if name.startswith("dice") else Column(name, "whole", low=0)
    for name in _COUNTED
)
_OF_MARK = (Column("image", "id"), Column("patient"), Column("area", "whole", low=0))
_OF_TABLE = {
    "lesions": (*_OF_MARK, Column("score", "number", low=0, high=1, empty=True)),
    "marks": (
        *_OF_MARK,
        Column("score", "number", low=0, high=1),
        Column("false", "whole", among=(0, 1)),
    ),
}
_TOUCHING = np.ones((3, 3), dtype=int)  # pixels that share a corner are of one component
SAME = 1e-9  # shares that differ by less are equal but for rounding
Rule = Literal["iou", "overlap", "centre"]


def dice(truth: ArrayLike, predicted: ArrayLike, *, threshold: float = 0.5) -> float:
    """(2·|P∧G| + 1e-6) / (|P| + |G| + 1e-6) of two masks of one shape; 1 where both are empty.

    Args:
        truth: 0/1.
        predicted: 0/1, or probabilities: P is where they are at or above the threshold.
        threshold: of probabilities.

    Raises:
        ValueError: other shapes, or values that are neither 0/1 nor probabilities.

    Example:
        >>> round(dice([[1, 1, 0]], [[0.9, 0.1, 0.5]]), 4)
        0.5
    """
    g, p = _binary(truth, "The truth", 0.5), _binary(predicted, "The predicted mask", threshold)
    if g.shape != p.shape:
        raise ValueError(
            f"Truth and predicted mask differ in shape: {g.shape} and {p.shape}. "
            "Bring both into one frame first."
        )
    return float((2 * (p & g).sum() + EPSILON) / (p.sum() + g.sum() + EPSILON))


def dice_pos(truths: Iterable[ArrayLike], predicted: Iterable[ArrayLike], *, threshold: float = 0.5) -> float:
    """Mean Dice over the images whose truth has a pixel, as the public FracAtlas benchmark computes it.

    Both run over the same images; each pair is of one shape, whichever frame that is.

    Raises:
        ValueError: no truth has a pixel; see `dice`.

    Example:
        >>> dice_pos([[[1, 0]], [[0, 0]]], [[[0.3, 0.1]], [[0.9, 0.9]]], threshold=0.3)
        1.0
    """
    found = [
        dice(g, p, threshold=threshold) for g, p in zip(truths, predicted, strict=True) if np.asarray(g).any()
    ]
    if not found:
        raise ValueError("No image has a fracture outlined, so that dice_pos is not defined. Use others.")
    return float(np.mean(found))


def resized(mask: NDArray, height: int, width: int) -> NDArray:
    """The nearest pixel of a mask (H, W) at each pixel's centre, (height, width), stretched."""
    rows, columns = (
        ((np.arange(many) + 0.5) * (old / many)).astype(np.intp)
        for many, old in zip((height, width), mask.shape, strict=True)
    )
    return mask[rows[:, None], columns]


def _binary(mask: ArrayLike, what: str, threshold: float) -> NDArray[np.bool_]:
    """Where a mask of 0/1, or of probabilities, is at or above the threshold."""
    values = np.asarray(mask)
    if values.ndim == 2 and values.dtype == bool:
        return values
    if values.ndim != 2 or not values.size or values.dtype.kind not in "uif":
        raise ValueError(f"{what} is an array (H, W) of numbers; found {values.dtype} {values.shape}.")
    low, high = values.min(), values.max()
    if not (low >= 0 and high <= 1):  # also NaN
        raise ValueError(
            f"{what} holds values from {low} to {high}, neither 0/1 nor probabilities. "
            "Divide by 255, or take the sigmoid of logits."
        )
    return values >= (threshold if values.dtype.kind == "f" else 1)


class _Overlaps(NamedTuple):
    """Lesions L against marks M of one image, in pixels.

    Attributes:
        lesion: areas, (L,).
        mark: areas, (M,).
        both: pixels in common, (L, M).
        centre: whether the mark's centre of mass lies in the lesion, (L, M).
    """

    lesion: Floats
    mark: Floats
    both: Floats
    centre: NDArray[np.bool_]

    def hits(self, rule: Rule, least_iou: float) -> NDArray[np.bool_]:
        if rule == "centre":
            return self.centre
        if rule == "overlap":
            return self.both > 0
        union = self.lesion[:, None] + self.mark[None, :] - self.both
        return np.asarray(self.both / union >= least_iou)


def _overlaps(lesions: Sequence[NDArray[np.bool_]], marks: NDArray, many: int) -> _Overlaps:
    """Of the lesions' masks, each (H, W), and the labelled marks (H, W), 1 … many."""
    both = np.array([np.bincount(marks[lesion], minlength=many + 1)[1:] for lesion in lesions])
    places = np.nonzero(marks)
    whose = marks[places]
    area = np.bincount(whose, minlength=many + 1)[1:].astype(np.float64)
    at = tuple((np.bincount(whose, place, many + 1)[1:] / area).round().astype(np.intp) for place in places)
    return _Overlaps(
        np.array([lesion.sum() for lesion in lesions], dtype=np.float64),
        area,
        both.reshape(len(lesions), many).astype(np.float64),
        np.array([lesion[at] for lesion in lesions], dtype=bool).reshape(len(lesions), many),
    )


def _components(mask: NDArray[np.bool_]) -> list[NDArray[np.bool_]]:
    labelled, many = ndimage.label(mask, _TOUCHING)
    return [labelled == number for number in range(1, many + 1)]


@dataclass(frozen=True, eq=False)
class MaskCases:
    """Images with what was predicted and what is true, checked and counted once: what every metric asks.

    A mark is a connected component of the predicted mask (pixels that share a corner are of one), a lesion a
    polygon of the truth, or a connected component where the truth is a mask. A mark hits a lesion by `rule`;
    one that hits none is false, and several on one lesion are none the worse for it.

    Attributes:
        images: one row an image: `image, patient, split, label, probability`, the table's other columns, and,
            where masks were predicted, `true, predicted, overlap` (pixels), `dice`, `dice_frame` (at the
            benchmark's frame), `true_frame` (pixels there), `lesions, lesions_hit, marks, false_marks`.
        lesions: one row a lesion: `image, patient, area` (pixels), `score` of the best mark that hits it, NaN
            where none does.
        marks: one row a mark: `image, patient, area, score, false` (0/1). Its score is the highest
            probability in it, or that of the image where the mask has no probabilities.
        rule: in words, for tables and figures.

    Example:
        >>> table = pd.DataFrame({"image": ["a", "b"], "patient": ["a", "b"], "label": [1, 0]})
        >>> masks = {"a": np.eye(8) * 0.9, "b": np.zeros((8, 8))}
        >>> cases = MaskCases.of(table.assign(probability=[0.8, 0.1]), truth={"a": np.eye(8) > 0},
        ...                      predicted=masks)
        >>> cases.images[["dice", "lesions_hit", "false_marks"]].to_numpy().tolist()
        [[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]]
    """

    images: pd.DataFrame
    lesions: pd.DataFrame
    marks: pd.DataFrame
    rule: str

    @classmethod
    def of(
        cls,
        table: pd.DataFrame,
        *,
        truth: Mapping[str, Any],
        predicted: Mapping[str, Any] | None = None,
        threshold: float = 0.5,
        rule: Rule = "iou",
        least_iou: float = 0.1,
        frame: tuple[int, int] = FRAME,
    ) -> Self:
        """The cases of a table of images, of their true masks and of the predicted ones.

        Args:
            table: one row an image: `image, patient, label, probability`, perhaps `split`, and any others, as
                those of `SUBGROUPS`: see `judged_images`.
            truth: image → its lesions: polygons (N, 2) of x, y, as `read_regions` gives them, or masks (H, W)
                of 0/1, one for each lesion; or one mask (H, W) of them all. Intact images may be absent.
            predicted: image → mask (H, W) of 0/1, or of probabilities, in the truth's frame, one for each
                image. None where only presence was predicted.
            threshold: of probabilities; a pixel at or above it is in the mask.
            rule: when a mark hits a lesion: `iou`, intersection over union of `least_iou` or more; `overlap`,
                one pixel in common; `centre`, the mark's centre of mass in the lesion.
            least_iou: of `iou`.
            frame: height and width that both masks are stretched to for the benchmark's Dice.

        Raises:
            ValueError: columns are missing; an image occurs twice, or has no patient, label or probability; a
                mask is missing or of another shape than the truth; a fractured image has no lesion, or an
                intact one has; there are several splits.

        Source: a rule has to be stated, as there is none that all use (Chakraborty, Observer Performance
        Methods for Diagnostic Imaging, 2017, chapter 12); an intersection over union of 0.1 is that of the
        PI-CAI challenge.
        """
        check_choice("rule", rule, get_args(Rule))
        images = _checked(table)
        words = {
            "iou": f"intersection over union ≥ {least_iou:g}",
            "overlap": "a pixel in common",
            "centre": "the mark's centre in the lesion",
        }[rule]
        rows: dict[str, list[dict[str, Any]]] = {"images": [], "lesions": [], "marks": []}
        if predicted is not None:
            if absent := [image for image in images["image"] if image not in predicted]:
                raise ValueError(
                    f"{len(absent)} images have no predicted mask: {listing(absent)}. "
                    "Predict them, an empty mask where nothing is found."
                )
            for row in images.to_dict("records"):
                pixels = _Pixels.of(row["image"], truth.get(row["image"]), predicted[row["image"]], threshold)
                for name, more in _counted(row, pixels, rule, least_iou, frame).items():
                    rows[name] += more
            _check_truth(images["label"], pd.DataFrame(rows["images"])["true"], images["image"])
            images = pd.concat([images, pd.DataFrame(rows["images"])], axis=1)
        found = cls(
            images,
            pd.DataFrame(rows["lesions"], columns=["image", "patient", "area", "score"]),
            pd.DataFrame(rows["marks"], columns=["image", "patient", "area", "score", "false"]),
            words,
        )
        _ = found.presence  # which checks labels, probabilities and patients
        return found

    @cached_property
    def population(self) -> pd.Index:
        """The groups that a resample draws from, (P,)."""
        return pd.Index(self.images["patient"].unique())

    @property
    def has_masks(self) -> bool:
        """Whether masks were predicted, not presence alone."""
        return "dice" in self.images.columns

    @cached_property
    def presence(self) -> Cases:
        """The images as cases of presence, each by its own probability."""
        columns = {"image": UID, "patient": "patient", "split": "split", "label": "label"}
        table = self.images[[*columns, "probability"]].rename(columns=columns)
        return Cases.of(table.assign(vertebra="image"))

    def where(self, kept: NDArray[np.bool_]) -> Self:
        """The images of a mask (n,), in their order, with their lesions and marks."""
        images = self.images[kept].reset_index(drop=True)
        lesions, marks = (
            part[part["image"].isin(images["image"])].reset_index(drop=True)
            for part in (self.lesions, self.marks)
        )
        return replace(self, images=images, lesions=lesions, marks=marks)

    def sums(self, values: ArrayLike, rows: pd.DataFrame | None = None) -> Floats:
        """Values of images, or of the rows of another table with `patient`, summed over each group, (P,)."""
        whose = self.population.get_indexer(pd.Index((self.images if rows is None else rows)["patient"]))
        weights = np.broadcast_to(np.asarray(values, dtype=np.float64), len(whose))
        return np.bincount(whose, weights, len(self.population)).astype(np.float64)

    def __len__(self) -> int:
        return len(self.images)

    def write(self, folder: str | Path, *, replace: bool = False) -> None:
        """Write what was counted: `images.csv`, `lesions.csv`, `marks.csv`, each with its SHA-256 beside it.

        They hold no image and no outline, and every metric of the cases is the same from them. Of the
        images' other columns `study` and those of `SUBGROUPS` are kept.

        Args:
            folder: made where it is missing.
            replace: replace tables that are there.

        Raises:
            FileExistsError: there are some, and `replace` is not set.

        Example:
            >>> table = pd.DataFrame({"image": ["a", "b"], "patient": ["a", "b"], "label": [1, 0]})
            >>> cases = MaskCases.of(table.assign(probability=[0.8, 0.1]), truth={})
            >>> cases.write("measured/test")
            >>> MaskCases.read("measured/test").images["probability"].tolist()
            [0.8, 0.1]
        """
        folder = Path(folder)
        if (folder / "images.csv").exists() and not replace:
            raise FileExistsError(
                f"{folder} holds what was measured before. Leave it, or replace it with replace=True."
            )
        folder.mkdir(parents=True, exist_ok=True)
        kept = [column.name for column in _image_columns(self.images) if column.name != "rule"]
        tables = {name: getattr(self, name) for name in _TABLES}
        tables["images"] = self.images[kept].assign(rule=self.rule)
        for name, table in tables.items():
            write_table(table, folder / f"{name}.csv", sealed=True)

    @classmethod
    def read(cls, folder: str | Path) -> Self:
        """The cases that `write` left in a folder, to the last digit.

        Raises:
            FileNotFoundError: a table is missing.
            ValueError: one is not as it was written, breaks its schema, or the three do not belong together.
        """
        folder = Path(folder)
        images, lesions, marks = (_stored(folder / f"{name}.csv") for name in ("images", *_TABLES[:2]))
        if len(rules := images.pop("rule").unique()) > 1:
            raise ValueError(f"{folder / 'images.csv'} mixes the rules {listing(rules)}. Keep one.")
        found = cls(_checked_split(images), lesions, marks, str(rules[0]))
        _check_counts(found, folder)
        _ = found.presence  # which checks labels, probabilities and patients
        return found


def _image_columns(images: pd.DataFrame) -> list[Column]:
    """Columns of `images.csv`: those of the counts are all there or none."""
    counted = _COUNTS if set(_COUNTED) & set(images.columns) else ()
    return [
        *(each for each in _OF_IMAGE if not each.optional or each.name in images.columns),
        *counted,
    ]


def _stored(path: Path) -> pd.DataFrame:
    """One table of `MaskCases.write`, its numbers exactly those that were written."""
    found = read_columns(path, what="table of what was measured", source="MaskCases.write makes it.")
    columns = _OF_TABLE.get(path.stem) or _image_columns(found)
    numeric = [each.name for each in columns if each.kind in ("number", "whole") and each.name in found]
    exact = {name: [_number(cell) for cell in found[name]] for name in numeric}
    is_images = path.stem == "images"
    found = checked(
        found.assign(**exact),
        columns,
        what=str(path),
        key=("image",),
        unique=is_images,
        may_be_empty=not is_images,
    )
    words = [column.name for column in columns if column.kind == "text" and column.empty]
    return found.assign(**{name: found[name].fillna("") for name in words})


def _number(cell: Any) -> Any:
    """The number of a cell's text, rounded once, which pandas does not promise; else the cell."""
    try:
        return float(cell)
    except ValueError:
        return cell


def _check_counts(cases: MaskCases, folder: Path) -> None:
    """Refuse lesions and marks that are not those that the images' rows count.

    Raises:
        ValueError: names the images.
    """
    images = cases.images.set_index("image")
    parts = {"lesions": cases.lesions, "marks": cases.marks}
    problems = [
        f"{name} of images that are not in images.csv, or are there of another patient ({len(other)}): "
        f"{listing(other)}"
        for name, rows in parts.items()
        if len(other := rows["image"][images["patient"].reindex(rows["image"]).to_numpy() != rows["patient"]])
    ]
    if cases.has_masks:
        hit, false = cases.lesions["score"].notna(), cases.marks["false"]
        for name, rows, values in (
            ("lesions", cases.lesions, 1),
            ("lesions_hit", cases.lesions, hit),
            ("marks", cases.marks, 1),
            ("false_marks", cases.marks, false),
            ("predicted", cases.marks, cases.marks["area"]),
        ):
            counted = rows.assign(value=values).groupby("image")["value"].sum()
            differ = images.index[images[name] != counted.reindex(images.index, fill_value=0)]
            if len(differ):
                problems.append(f"images whose {name} are others than in their table ({len(differ)}): "
                                f"{listing(differ)}")  # fmt: skip
        sums = images["predicted"] + images["true"] + EPSILON
        wrong = images.index[((2 * images["overlap"] + EPSILON) / sums - images["dice"]).abs() > SAME]
        if len(wrong):
            problems.append(f"images whose dice is not that of their pixels ({len(wrong)}): {listing(wrong)}")
    refuse(problems, what=f"What was measured, at {folder},")
    if cases.has_masks:
        _check_truth(cases.images["label"], cases.images["true"], cases.images["image"])


def judged_images(predictions: pd.DataFrame, images: pd.DataFrame, *, split: str) -> pd.DataFrame:
    """The predictions of one split, with what the image table says of each image: what `MaskCases.of` takes.

    Args:
        predictions: a predictions table of images: `StudyInstanceUID` is the image.
        images: image table of the cohort.
        split: the one that is judged.

    Returns:
        Columns `image, patient, split, label, probability, study`, and those of `SUBGROUPS` that there are:
        `size` comes from `height` and `width`, "up to" or "over" the median length of the longer side.

    Raises:
        ValueError: no prediction is of the split, one is of an image that the table lacks, or the two
            disagree about a label.

    Example:
        >>> table = pd.DataFrame({"StudyInstanceUID": ["a"], "split": "test", "label": 1, "probability": 0.7})
        >>> images = pd.DataFrame({"image": ["a"], "patient": "p", "study": "s", "label": 1, "part": "hand"})
        >>> judged_images(table, images, split="test")["part"].tolist()
        ['hand']
    """
    rows = predictions[predictions["split"] == split].rename(columns={UID: "image"})
    if rows.empty:
        known = listing(sorted(predictions["split"].unique()))
        raise ValueError(
            f"The predictions have no image of the split {split!r}; found {known}. Name another."
        )
    if {"height", "width"} <= set(images.columns):
        images = images.assign(size=_sizes(images[["height", "width"]].max(axis=1)))
    columns = [name for name in ("image", "study", *SUBGROUPS) if name in images.columns]
    if "patient" not in rows.columns:
        columns.append("patient")
    if len(absent := rows["image"][~rows["image"].isin(images["image"])]):
        raise ValueError(
            f"{len(absent)} predicted images are not in the image table: {listing(absent)}. "
            "Use the cohort that was predicted."
        )
    found = rows.merge(images[[*columns, "label"]], on="image", suffixes=("", "_of_image"))
    if len(differ := found["image"][found["label"] != found["label_of_image"]]):
        raise ValueError(
            f"{len(differ)} images are labelled otherwise in the image table: {listing(differ)}. "
            "Predict the cohort again."
        )
    names = ["image", "patient", "split", "label", "probability", *columns[1:]]
    return found[list(dict.fromkeys(names))]


def _sizes(longer: pd.Series) -> pd.Series:
    """Images by the length of their longer side: a sign of where they were taken, not of what they show."""
    middle = int(longer.median())
    if (longer > middle).any():
        return (longer > middle).map({False: f"up to {middle} pixels", True: f"over {middle} pixels"})
    return (longer < middle).map({False: f"{middle} pixels", True: f"under {middle} pixels"})


def _checked(table: pd.DataFrame) -> pd.DataFrame:
    """The columns that count, of a table with each image once."""
    needed = ("image", "patient", "label", "probability")
    require_columns(table, needed, what="The table of images")
    twice = table["image"][table["image"].duplicated()].drop_duplicates()
    if table.empty or len(twice):
        raise ValueError(
            f"The table of images holds {len(twice)} images twice: {listing(twice)}. Keep one row each."
            if len(twice)
            else "The table of images has no rows. Choose a split that has some."
        )
    table = _checked_split(table if "split" in table.columns else table.assign(split="test"))
    names = [*needed[:2], "split", *needed[2:]]
    if own := [name for name in table.columns if name in _COUNTED]:
        raise ValueError(f"The table of images has columns that are counted here: {listing(own)}. Drop them.")
    return table[[*names, *table.columns.difference(names, sort=False)]].reset_index(drop=True)


def _checked_split(table: pd.DataFrame) -> pd.DataFrame:
    """The table, where all its images are of one split."""
    if len(splits := table["split"].unique()) > 1:
        raise ValueError(f"The table of images mixes the splits {listing(sorted(splits))}. Keep one.")
    return table


def _check_truth(label: pd.Series, true: pd.Series, image: pd.Series) -> None:
    for wrong, what, remedy in (
        ((label == 1) & (true == 0), "fractured images have no lesion in the truth", "Outline them"),
        ((label == 0) & (true > 0), "intact images have a lesion in the truth", "Correct their label"),
    ):
        if wrong.any():
            raise ValueError(f"{wrong.sum()} {what}: {listing(image[wrong])}. {remedy}, or leave them out.")


class _Pixels(NamedTuple):
    """One image: its lesions, the true and predicted mask (H, W), and the probabilities if there are any."""

    lesions: list[NDArray[np.bool_]]
    true: NDArray[np.bool_]
    predicted: NDArray[np.bool_]
    probability: Floats | None

    @classmethod
    def of(cls, image: str, truth: Any, predicted: Any, threshold: float) -> Self:
        mask = np.asarray(predicted)
        found = _binary(mask, f"The predicted mask of {image}", threshold)
        if truth is None:
            lesions = []
        elif isinstance(truth, np.ndarray) and truth.ndim == 2:
            lesions = _components(_binary(truth, f"The truth of {image}", 0.5))
        else:
            lesions = [_lesion(each, found.shape, f"A lesion of {image}") for each in truth]
        if wrong := [lesion.shape for lesion in lesions if lesion.shape != found.shape]:
            raise ValueError(
                f"The truth of {image} is of shape {wrong[0]}, its predicted mask of {found.shape}. "
                "Bring the mask back into the frame of the image."
            )
        true = np.logical_or.reduce(lesions) if lesions else np.zeros_like(found)
        return cls(lesions, true, found, mask if mask.dtype.kind == "f" else None)


def _lesion(given: ArrayLike, shape: tuple[int, ...], what: str) -> NDArray[np.bool_]:
    """A lesion's mask, of that or of the polygon (N, 2)."""
    values = np.asarray(given)
    if values.ndim == 2 and values.shape[1] == 2 and values.shape != shape:
        return rasterise([values], *shape) > 0
    return _binary(values, what, 0.5)


def _counted(
    row: Mapping[Any, Any], pixels: _Pixels, rule: Rule, least_iou: float, frame: tuple[int, int]
) -> dict[str, list[dict[str, Any]]]:
    """Rows of the three tables that one image adds."""
    labelled, many = ndimage.label(pixels.predicted, _TOUCHING)
    scores = np.full(many, row["probability"], dtype=np.float64)
    if pixels.probability is not None and many:
        scores = np.array(ndimage.maximum(pixels.probability, labelled, range(1, many + 1)), dtype=float)
    overlaps = _overlaps(pixels.lesions, labelled, many)
    hits = overlaps.hits(rule, least_iou)
    best = [scores[hit].max() if hit.any() else np.nan for hit in hits]
    false = np.logical_not(hits.any(axis=0))
    own = {"image": row["image"], "patient": row["patient"]}
    small = [resized(mask, *frame) for mask in (pixels.true, pixels.predicted)]
    return {
        "images": [
            {
                "true": int(pixels.true.sum()),
                "predicted": int(pixels.predicted.sum()),
                "overlap": int((pixels.true & pixels.predicted).sum()),
                "dice": dice(pixels.true, pixels.predicted),
                "dice_frame": dice(*small),
                "true_frame": int(small[0].sum()),
                "lesions": len(pixels.lesions),
                "lesions_hit": int(np.isfinite(best).sum()),
                "marks": many,
                "false_marks": int(false.sum()),
            }
        ],
        "lesions": [
            own | {"area": int(area), "score": score}
            for area, score in zip(overlaps.lesion, best, strict=True)
        ],
        "marks": [
            own | {"area": int(area), "score": score, "false": int(wrong)}
            for area, score, wrong in zip(overlaps.mark, scores, false, strict=True)
        ],
    }
