"""Radiographs predicted by one run or several: a cohort's table with masks, or any folder of images.

All networks run folded, in float32, on each view of an image: as it is, and in test-time augmentation (TTA)
mirrored, masks mirrored back. A run that was trained on patches sees the image through a sliding window. What
members and views say is averaged and blended (`blend.Blend`), and a mask is brought back to the image's own
pixels. Shapes: B images of H × W pixels, M members, h × w cells of a mask.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from dataclasses import replace as replaced
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm.auto import tqdm

from cspine_helpers import __version__
from cspine_helpers.checkpoints import Run
from cspine_helpers.decisions.thresholds import Rule
from cspine_helpers.files.paths import listing, sha256_of
from cspine_helpers.files.records import config_of, differences
from cspine_helpers.inference.ensemble import check_alike, load_members, member_of
from cspine_helpers.inference.prediction import PREDICTIONS, Part, check_free, computed_by, write_parts
from cspine_helpers.labels import UID
from cspine_helpers.model.forward import as_on_a_cpu
from cspine_helpers.radiographs.annotations import encode_rle
from cspine_helpers.radiographs.blend import (
    BLEND,
    Blend,
    FrozenBlend,
    Outputs,
    freeze_blend,
    read_blend,
    search_blend,
)
from cspine_helpers.radiographs.cohort import RadiographCohort, read_radiograph_cohort
from cspine_helpers.radiographs.dataset import RadiographDataset, image_loader
from cspine_helpers.radiographs.images import Frame
from cspine_helpers.radiographs.masks import MASKS, write_masks
from cspine_helpers.radiographs.model import WITH_MASK
from cspine_helpers.radiographs.task import load_radiograph_run
from cspine_helpers.runs import RADIOGRAPHS, RECORD, member_folders, write_ensemble

IMAGE = "image"  # the unit of a row of predictions
AS_IT_IS = "as it is"
VIEWS: Mapping[str, tuple[int, ...]] = {  # of an image → axes of (…, H, W) that are turned round
    AS_IT_IS: (),
    "left and right exchanged": (-1,),
    "top and bottom exchanged": (-2,),
    "both exchanged": (-2, -1),
}
OVERLAP = 0.5  # of neighbouring windows
_SAME = ("labels_sha256", "split_sha256")  # in training and prediction


class Answer(NamedTuple):
    """What runs say of one radiograph.

    Attributes:
        probability: of a fracture.
        mask: (H, W) 0/1, the marked pixels of the radiograph; None where the networks have no mask.
    """

    probability: float
    mask: NDArray[np.uint8] | None


# ---------------------------------------------------------------------------------------------- networks


def view_probabilities(
    network: nn.Module, images: Tensor, views: Sequence[str], *, window: int | None = None
) -> tuple[Tensor, Tensor | None]:
    """Mean probabilities of a network over views of a batch of radiographs.

    Args:
        network: uint8 (B, H, W) → an output with `logit` (B,) and `mask_logit` (B, h, w) or None.
        images: uint8 (B, H, W).
        views: names in `VIEWS`; masks are turned back before they are averaged.
        window: side of the sliding window, pixels; None: the whole image at once.

    Returns:
        Of a fracture, float64 (B,), and of each cell, float32 (B, h, w) or None.
    """
    classes, masks = [], []
    for name in views:
        axes = VIEWS[name]
        turned = images.flip(axes) if axes else images
        of_class, mask = _probabilities(network, turned) if window is None else slide(network, turned, window)
        classes.append(of_class)
        masks.append(mask if mask is None or not axes else mask.flip(axes))
    found = [mask for mask in masks if mask is not None]
    return torch.stack(classes).mean(dim=0), torch.stack(found).mean(dim=0) if found else None


def _probabilities(network: nn.Module, images: Tensor) -> tuple[Tensor, Tensor | None]:
    with as_on_a_cpu(images.device):
        output = network(images)
    mask = output.mask_logit
    return output.logit.double().sigmoid(), None if mask is None else mask.float().sigmoid()


def slide(
    network: nn.Module, images: Tensor, window: int, *, overlap: float = OVERLAP
) -> tuple[Tensor, Tensor | None]:
    """Probabilities of a network that sees a radiograph through a window, at the scale it was trained at.

    A cell's probability is the mean of those of the windows that hold it, weighed by how far it is from their
    edge; the image's is that of the window with the highest.

    Args:
        network: as in `view_probabilities`.
        images: uint8 (B, H, W).
        window: side, pixels; of an image that is smaller, its side.
        overlap: least share of a window that the next one sees again.

    Raises:
        ValueError: the overlap is not in [0, 1).
    """
    if not 0 <= overlap < 1:
        raise ValueError(f"The overlap of windows is in [0, 1); found {overlap}. Correct it.")
    height, width = images.shape[-2:]
    sides = min(window, height), min(window, width)
    classes: list[Tensor] = []
    total = weight = None
    for top in _starts(height, sides[0], overlap):
        for left in _starts(width, sides[1], overlap):
            of_class, mask = _probabilities(network, images[:, top : top + sides[0], left : left + sides[1]])
            classes.append(of_class)
            if mask is None:
                continue
            stride = sides[0] // mask.shape[-2]
            if total is None or weight is None:
                shape = (len(images), height // stride, width // stride)
                total, weight = (torch.zeros(shape, device=mask.device) for _ in range(2))
            taper = _taper(mask.shape[-2], mask.shape[-1]).to(mask.device)
            rows = slice(top // stride, top // stride + mask.shape[-2])
            columns = slice(left // stride, left // stride + mask.shape[-1])
            total[:, rows, columns] += mask * taper
            weight[:, rows, columns] += taper
    highest = torch.stack(classes).amax(dim=0)
    return highest, None if total is None or weight is None else total / weight


def _starts(size: int, window: int, overlap: float) -> list[int]:
    """Where windows begin along a side: evenly from end to end, at multiples of 32, as any stride needs."""
    step = 32
    last = size - window
    count = 1 + int(np.ceil(last / max(window * (1 - overlap), step)))
    return sorted({min(last, round(place / step) * step) for place in np.linspace(0, last, count)})


def _taper(height: int, width: int) -> Tensor:
    """Weights (height, width) of a window's cells, highest in its middle, low at its edges, never 0."""
    rows, columns = (
        torch.minimum(torch.arange(n) + 0.5, n - 0.5 - torch.arange(n)) / (n / 2) for n in (height, width)
    )
    return rows[:, None] * columns[None, :]


# ---------------------------------------------------------------------------------------------- members


@dataclass(frozen=True)
class Predictor:
    """Runs that predict radiographs together, by one blend.

    Attributes:
        folder: of the run or the ensemble.
        runs: its members, alike.
        blend: how their outputs become an answer.
        views: of each image, names in `VIEWS`.
        is_frozen: whether the blend is the one that is frozen in the folder; else it is the class alone, with
            the mask's threshold that training found best.

    Example:
        >>> Predictor.of("nobody")
        Traceback (most recent call last):
        ...
        FileNotFoundError: No run at nobody: run.json is missing...
    """

    folder: Path
    runs: tuple[Run[Any, Any], ...]
    blend: Blend
    views: tuple[str, ...]
    is_frozen: bool

    @classmethod
    def of(cls, folder: str | Path, *, tta: bool | None = None, device: str = "cpu") -> Self:
        """A run as it was trained, or the members of an ensemble, with the blend that is frozen there.

        Args:
            folder: of the run or the ensemble.
            tta: whether mirrored views count as well; None: as the frozen blend was chosen, else without.
            device: "cpu" or "cuda".

        Raises:
            FileNotFoundError: there is neither.
            ValueError: members are missing, damaged or not alike, or not those of the frozen blend.
        """
        return cls.by(member_folders(folder), folder, frozen=_frozen(folder), tta=tta, device=device)

    @classmethod
    def by(
        cls,
        members: Sequence[str | Path],
        folder: str | Path,
        *,
        frozen: FrozenBlend | None = None,
        tta: bool | None = None,
        device: str = "cpu",
    ) -> Self:
        """The same with members and the blend that are named; see `of`."""
        runs = load_members([Path(member) for member in members], load_radiograph_run)
        check_alike(
            runs, _shared, "Runs of an ensemble share labels, split, frame and whether they have a mask"
        )
        if frozen:
            frozen.check_members([member_of(run) for run in runs])
        chosen = frozen.views if frozen else (AS_IT_IS,)
        views = chosen if tta is None else tuple(VIEWS) if tta else (AS_IT_IS,)
        chosen_by_training = [found["threshold"] for run in runs if (found := run.record.get("mask"))]
        plain = Blend(weights=(1 / len(runs),) * len(runs))
        if chosen_by_training:
            plain = replaced(plain, mask_threshold=float(np.mean(chosen_by_training)))
        for run in runs:
            run.to(device)
        return cls(Path(folder), runs, frozen.blend if frozen else plain, views, frozen is not None)

    @cached_property
    def networks(self) -> tuple[nn.Module, ...]:
        """Members for inference: norms folded into convolutions."""
        return tuple(run.model.folded() for run in self.runs)

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return next(self.runs[0].model.parameters()).device

    def frame(self, height: int, width: int) -> Frame:
        """The networks' frame of a radiograph of this size."""
        config = self.runs[0].config
        return Frame.of(height, width, long=config.long, short=config.short)

    def outputs(self, images: Tensor) -> tuple[NDArray[np.float64], NDArray[np.float16] | None]:
        """What each member says of frames uint8 (B, H, W): classes (B, M) and masks (B, M, h, w) or None.

        Masks are rounded to float16, in which a search keeps them, so that it sees what is predicted.
        """
        moved = images.to(self.device)
        pairs = [
            view_probabilities(network, moved, self.views, window=_window(run))
            for network, run in zip(self.networks, self.runs, strict=True)
        ]
        classes = torch.stack([of_class for of_class, _ in pairs], dim=1).cpu().numpy()
        masks = [mask for _, mask in pairs if mask is not None]
        return classes, torch.stack(masks, dim=1).half().cpu().numpy() if masks else None

    def answer(self, classes: NDArray[np.float64], masks: NDArray[np.float16] | None, frame: Frame) -> Answer:
        """The answer of one image: classes (M,), masks (M, h, w), its frame."""
        mask = None
        if masks is not None:
            marked = self.blend.mask(masks, *frame.shape)
            mask = (frame.back(marked.astype(np.float32)) >= 0.5).astype(np.uint8)
        return Answer(self.blend.probability(classes, masks), mask)

    def predict(self, image: NDArray[np.uint8]) -> Answer:
        """The answer of one radiograph of any size, as `read_radiograph` gives it."""
        frame = self.frame(*image.shape)
        classes, masks = self.outputs(torch.from_numpy(frame.pixels(image))[None])
        return self.answer(classes[0], None if masks is None else masks[0], frame)


def _frozen(folder: str | Path) -> FrozenBlend | None:
    """The blend that is frozen in a folder, if one is."""
    return read_blend(folder) if (Path(folder) / BLEND).is_file() else None


def _shared(run: Run[Any, Any]) -> dict[str, Any]:
    """What all members of an ensemble have alike."""
    data = run.record["data"]
    return {
        **{name: data.get(name) for name in _SAME},
        **{name: getattr(run.config, name) for name in ("long", "short")},
        "mask": run.config.architecture in WITH_MASK,
    }


def _window(run: Run[Any, Any]) -> int | None:
    """Side of the patches that a run was trained on; None where it saw whole images."""
    return run.record.get("train", {}).get("patch")


# ---------------------------------------------------------------------------------------------- a cohort


def predict_radiographs(
    members: Sequence[str | Path],
    cohort_folder: str | Path,
    run_folder: str | Path | None = None,
    *,
    tta: bool | None = None,
    search: bool = False,
    folds: int = 5,
    splits: Sequence[str] = ("validation", "test"),
    device: str = "cpu",
    batch_size: int = 16,
    workers: int = 0,
    replace: bool = False,
) -> pd.DataFrame:
    """Predictions table of a cohort by one run or several, `predictions.csv`, and the masks, `masks.csv`.

    A row's unit is `image`, its patient the group that is resampled. Masks are at the size of the displayed
    image. Stopped at any moment and called again, the prediction resumes behind the last whole batch; a
    search, which comes first, begins again.

    Args:
        members: folders of the runs.
        cohort_folder: with `images.csv`, `split.csv` and `packed/`.
        run_folder: where the tables go; None: the folder of the one run.
        tta: whether mirrored views count as well; None: as the frozen blend was chosen, else without.
        search: first choose, on validation, how class, mask and members are blended, and freeze that in
            `blend.json`; a blend that is there stays, unless `replace` is set. See `blend.search_blend`.
        folds: parts of the groups in that search.
        splits: which images, in this order.
        device: "cpu" or "cuda".
        batch_size: images computed at once.
        workers: processes that load; 0 loads in this one.
        replace: replace tables (and with `search` a blend) that are there; decisions frozen with them are
            refused from then on.

    Raises:
        FileExistsError: there are whole tables already, or the folder of an ensemble holds a run.
        FileNotFoundError: runs, or parts of the cohort, are missing.
        ValueError: runs are not alike, or were trained on other images or another split; packed images
            cannot be used; the frozen blend is of other members or views.

    Example:
        >>> predict_radiographs(["one", "one"], radiographs, "mean")
        Traceback (most recent call last):
        ...
        ValueError: Each run counts once; found several times: 'one'. Name each once.
    """
    # 1. What is asked for fits together.
    folder = Path(members[0] if run_folder is None else run_folder)
    cohort = read_radiograph_cohort(cohort_folder)
    is_ensemble = [Path(member).resolve() for member in members] != [folder.resolve()]
    if is_ensemble and (folder / RECORD).exists():
        raise FileExistsError(
            f"{folder} holds a run of its own; an ensemble's predictions go elsewhere. Name another folder."
        )
    path = folder / PREDICTIONS
    check_free(path, replace=replace)
    is_searched = search and (replace or not (folder / BLEND).is_file())
    frozen = None if is_searched else _frozen(folder)
    predictor = Predictor.by(members, folder, frozen=frozen, tta=tta, device=device)
    _check_cohort(predictor.runs[0], cohort)

    # 2. The blend, where one is asked for.
    known: Outputs | None = None
    loaded = {"batch_size": batch_size, "workers": workers}
    if is_searched:
        known = validation_outputs(predictor, cohort, **loaded)
        freeze_blend(
            folder,
            search_blend(known, folds=folds),
            members=[member_of(run) for run in predictor.runs],
            views=predictor.views,
            rule=config_of(Rule, predictor.runs[0].record["rule"]),
            data=cohort.fingerprint(),
            replace=replace,
        )
        frozen = read_blend(folder)
        predictor = replaced(predictor, blend=frozen.blend, is_frozen=True)
    elif frozen and predictor.views != frozen.views:
        raise ValueError(
            f"{folder / BLEND} was chosen with other views of each image ({listing(frozen.views)}) than "
            f"{listing(predictor.views)}. Predict with those, or search a blend again: predict --blend "
            "--replace."
        )

    # 3. The tables.
    parts = [_part(predictor, cohort, name, known, **loaded) for name in splits]
    made_of = {
        "members": [member_of(run) for run in predictor.runs],
        "views": list(predictor.views),
        "blend_sha256": sha256_of(folder / BLEND) if predictor.is_frozen else None,
        "data": cohort.fingerprint(),
        "splits": list(splits),
        "batch_size": batch_size,
        "computed_by": computed_by(predictor.runs[0]),
    }
    images = pd.concat([part.rows[UID] for part in parts])

    def describe(found: list[Any]) -> None:
        if found and found[0][1] is not None:
            sizes = cohort.images.set_index("image").loc[images, ["height", "width"]].reset_index()
            write_masks(sizes, [text for _, text in found], folder / MASKS)
        if is_ensemble:
            record = {"task": RADIOGRAPHS, "mean_of": "probabilities of each run and view", **made_of}
            hashes = {"predictions_sha256": sha256_of(path)}
            write_ensemble(folder, {**record, **hashes, "versions": {"cspine_helpers": __version__}})

    return write_parts(parts, path, made_of=made_of, probability=lambda found: found[0], then=describe)


def _check_cohort(run: Run[Any, Any], cohort: RadiographCohort) -> None:
    """Refuse other images, or another split, than those of the training.

    Raises:
        ValueError: says which differ.
    """
    found = {name: value for name, value in cohort.fingerprint().items() if name in _SAME}
    wanted = {name: run.record["data"].get(name) for name in _SAME}
    if differ := differences(found, wanted):
        raise ValueError(
            f"The run {run.folder.name} was not trained on the cohort at {cohort.folder} as it is now: "
            f"{listing(differ, separator='; ', quoted=False)}. Images of its training may be in "
            "validation or test here. Restore the cohort, or train on this one."
        )


def _rows(cohort: RadiographCohort, split: str) -> pd.DataFrame:
    """Images of a split as rows of a predictions table, portrait ones first, as `image_loader` has them."""
    images = cohort.of(split)
    images = images.assign(landscape=images["width"] > images["height"])
    images = images.sort_values(["landscape", "image"], kind="stable", ignore_index=True)
    rows = images.assign(vertebra=IMAGE).rename(columns={"image": UID})
    return rows[[UID, "vertebra", "split", "label", "patient"]]


def _batches(
    rows: pd.DataFrame, packed: Path, *, batch_size: int, workers: int, stride: int = 4
) -> Iterator[Mapping[str, Tensor]]:
    dataset = RadiographDataset(rows.rename(columns={UID: "image"}), packed, stride=stride)
    return iter(image_loader(dataset, batch_size=batch_size, workers=workers))


def validation_outputs(
    predictor: Predictor, cohort: RadiographCohort, *, batch_size: int = 16, workers: int = 0
) -> Outputs:
    """What the members predict of the images of validation, with the truth, to search a blend by.

    Args:
        predictor: its members and views.
        cohort: packed.
        batch_size: images computed at once.
        workers: processes that load; 0 loads in this one.
    """
    rows = _rows(cohort, "validation")
    classes, masks, truths = [], [], []
    with tqdm(desc="search a blend", total=len(rows), unit="image", leave=False) as bar:
        for batch in _batches(rows, cohort.packed, batch_size=batch_size, workers=workers, stride=1):
            of_class, of_mask = predictor.outputs(batch["image"])
            classes.append(of_class)
            masks += [] if of_mask is None else list(of_mask)
            truths += list((batch["mask"].numpy() >= 128).astype(np.uint8))
            bar.update(len(of_class))
    return Outputs(
        image=rows[UID].to_numpy(dtype=np.str_),
        group=rows["patient"].to_numpy(dtype=np.str_),
        label=rows["label"].to_numpy(),
        classes=np.concatenate(classes),
        masks=masks or None,
        truths=truths,
    )


def _part(
    predictor: Predictor,
    cohort: RadiographCohort,
    split: str,
    known: Outputs | None,
    *,
    batch_size: int,
    workers: int,
) -> Part:
    """A part of the table; what is computed for a row is its probability and its mask, as run lengths."""
    rows = _rows(cohort, split)
    sizes = cohort.images.set_index("image").loc[rows[UID], ["height", "width"]]
    frames = [predictor.frame(height, width) for height, width in sizes.itertuples(index=False)]

    def outputs(start: int) -> Iterator[tuple[NDArray[np.float64], Any]]:
        if known is not None and split == "validation":  # the search has just computed them
            for first in range(start, len(rows), batch_size):
                some = slice(first, first + batch_size)
                yield known.classes[some], known.masks and known.masks[some]
            return
        rest = rows.iloc[start:]
        for batch in _batches(rest, cohort.packed, batch_size=batch_size, workers=workers):
            yield predictor.outputs(batch["image"])

    def batches(start: int) -> Iterator[list[Any]]:
        place = start
        with tqdm(desc="predict", total=len(rows), initial=start, unit="image", leave=False) as bar:
            for classes, masks in outputs(start):
                batch = []
                for n, of_class in enumerate(classes):
                    found = predictor.answer(of_class, None if masks is None else masks[n], frames[place + n])
                    text = None if found.mask is None else encode_rle(found.mask)
                    batch.append([found.probability, text])
                place += len(batch)
                bar.update(len(batch))
                yield batch

    return Part(rows, batches)
