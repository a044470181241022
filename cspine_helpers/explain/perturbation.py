"""How a probability falls as the pixels that a map points at are blurred away, and rises as they come back.

Deletion starts from the image and blurs the pixels of most evidence first; insertion starts from the blurred
image and brings them back in the same order. They ask whether a map names what the network uses, whatever is
true of the patient, and are beside `localisation`, which asks for the truth. A blurred image is one that no
network has seen; what a random order costs (the "uniform" map) says how much that alone does.

Source: Petsiuk et al., RISE, BMVC 2018, section 4.2.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.ndimage import gaussian_filter
from torch import Tensor

from cspine_helpers.checkpoints import Run
from cspine_helpers.dataset.sequence import SequenceDataset, make_loader
from cspine_helpers.evaluation.resampling import mean_by_patient
from cspine_helpers.explain.localisation import at_pixels
from cspine_helpers.files.tables import require_columns
from cspine_helpers.labels import UID
from cspine_helpers.model.forward import as_on_a_cpu, folded
from cspine_helpers.packed import MASK

SHARES = (0.0, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 0.7, 1.0)  # a fracture is of about 1 % of the pixels
CURVES = ("deletion", "insertion")
_BLUR = 1 / 16  # standard deviation, as a share of the image's shorter side
Probability = Callable[[Tensor, slice], Tensor]  # images of some rows, and which rows → (B,)


def blurred(images: ArrayLike, *, sigma_px: float | None = None) -> NDArray[np.uint8]:
    """Images uint8 (…, H, W), each blurred by a Gaussian, in which no fracture is seen any more.

    Args:
        images: of any number of axes; the last two are blurred.
        sigma_px: standard deviation; None: a sixteenth of the shorter side.

    Raises:
        ValueError: fewer axes, or a blur that is none.

    Example:
        >>> blurred(np.full((2, 64, 64), 7, np.uint8)).max()
        np.uint8(7)
    """
    array = np.asarray(images)
    if array.ndim < 2 or not (sigma_px is None or 0 < sigma_px < np.inf):
        raise ValueError(
            f"Images (…, H, W) are blurred by a number of pixels above 0; found shape {array.shape} and "
            f"sigma_px {sigma_px}. Correct them."
        )
    sigma = _BLUR * min(array.shape[-2:]) if sigma_px is None else sigma_px
    smooth = gaussian_filter(array.astype(np.float32), sigma, axes=(-2, -1), mode="nearest")
    return np.rint(smooth).astype(np.uint8)


def perturbation_curves(
    probability: Probability,
    images: NDArray[np.uint8],
    maps: ArrayLike,
    *,
    replacement: NDArray[np.uint8] | None = None,
    shares: Sequence[float] = SHARES,
    batch_size: int = 8,
    seed: int = 0,
) -> pd.DataFrame:
    """Probability of each case as ever more of its pixels are blurred, or brought back, by a map's order.

    Args:
        probability: images (B, …) and the rows that they are of → the probability of a fracture, (B,).
        images: uint8 (N, T, C, H, W), or radiographs (N, H, W).
        maps: (N, T, h, w) or (N, h, w), raw and signed, on their own grid; the highest value first, those
            equal in random order.
        replacement: what pixels are replaced by, of the images' shape; None: `blurred` images.
        shares: of all pixels (of all slices) that are replaced, rising from 0 to 1.
        batch_size: cases at a time.
        seed: of the order of equal values.

    Returns:
        `case` (0 … N − 1), `share`, `deletion` (so many pixels are blurred), `insertion` (so many are sharp).

    Raises:
        ValueError: maps of other cases or slices, or with NaN; shares that do not rise from 0 to 1; a
            replacement of another shape.

    Example:
        >>> images = np.zeros((1, 1, 1, 8, 8), np.uint8)
        >>> images[..., 2, 2] = 255
        >>> def brightest(these, rows):
        ...     return these.amax((1, 2, 3, 4)) / 255
        >>> curves = perturbation_curves(brightest, images, images[:, :, 0])
        >>> curves["deletion"].iloc[[0, -1]].round(1).tolist()
        [1.0, 0.6]
    """
    # 1. What goes in.
    values, steps = np.asarray(maps, dtype=np.float32), np.asarray(shares, dtype=np.float64)
    lead = images.shape[:2] if images.ndim == 5 else images.shape[:1]
    if (
        images.ndim not in (3, 5)
        or values.shape[:-2] != lead
        or values.ndim != len(lead) + 2
        or not values.size
    ):
        raise ValueError(
            f"Maps are of the images' cases and slices; found maps {values.shape} and images {images.shape}. "
            "Images are (N, T, C, H, W) and maps (N, T, h, w), or both (N, H, W)."
        )
    if not np.isfinite(values).all():
        raise ValueError(
            "Maps hold NaN or infinite values, which have no order. Compute them again in float32."
        )
    if len(steps) < 2 or steps[0] != 0 or steps[-1] != 1 or not (np.diff(steps) > 0).all():
        raise ValueError(f"shares rise from 0 to 1; found {list(shares)}. The default has ten.")
    other = blurred(images) if replacement is None else replacement
    if other.shape != images.shape:
        raise ValueError(
            f"The replacement has shape {other.shape}, the images {images.shape}. Make it of them."
        )
    if batch_size < 1:
        raise ValueError(f"A batch holds 1 case or more; found a batch size of {batch_size}. Correct it.")
    # 2. Each batch at each share.
    rng, rows = np.random.default_rng(seed), []
    for start in range(0, len(images), batch_size):
        batch = slice(start, min(start + batch_size, len(images)))
        sharp, smooth = images[batch], other[batch]
        place = _places(at_pixels(values[batch], *images.shape[-2:]), rng)
        ends: list[NDArray[np.float64]] = []
        for share in steps:
            marked = place < round(share * place[0].size)
            marked = marked[:, :, None] if images.ndim == 5 else marked
            pairs = [] if share == 1 else [(smooth, sharp), (sharp, smooth)]
            both = [
                probability(torch.from_numpy(np.where(marked, *pair)), batch).double().cpu().numpy()
                for pair in pairs
            ]
            ends = ends or both  # each curve ends where the other begins
            deletion, insertion = both or ends[::-1]
            cases = np.arange(batch.start, batch.stop)
            rows.append(
                pd.DataFrame({"case": cases, "share": share, "deletion": deletion, "insertion": insertion})
            )
    return pd.concat(rows).sort_values(["case", "share"], kind="stable", ignore_index=True)


def _places(values: NDArray[np.float32], rng: np.random.Generator) -> NDArray[np.intp]:
    """Place of each pixel in its case's order, 0 the highest, of the shape of the values (N, …)."""
    flat = values.reshape(len(values), -1)
    shuffled = rng.permutation(flat.shape[1])
    order = shuffled[np.argsort(-flat[:, shuffled], axis=1, kind="stable")]
    place = np.empty_like(order)
    np.put_along_axis(place, order, np.arange(flat.shape[1])[None], axis=1)
    return place.reshape(values.shape)


def perturbation_areas(curves: pd.DataFrame) -> pd.DataFrame:
    """Area under each case's curves: small where deletion falls fast, large where insertion rises fast.

    Args:
        curves: of `perturbation_curves`.

    Returns:
        One row a case, in order: `deletion` and `insertion`, 0 to 1, by trapezoids; for
        `localisation_table(..., metrics=CURVES)`.

    Raises:
        ValueError: columns are missing.

    Example:
        >>> ends = {"case": 0, "share": [0.0, 1.0], "deletion": [1.0, 0.0], "insertion": [0.0, 1.0]}
        >>> curves = pd.DataFrame(ends)
        >>> perturbation_areas(curves).values.tolist()
        [[0.5, 0.5]]
    """
    require_columns(curves, ("case", "share", *CURVES), what="The table of curves")
    wide = curves.pivot_table(index="case", columns="share", values=list(CURVES), sort=True)
    areas = {name: np.trapezoid(wide[name], wide[name].columns.to_numpy(float), axis=1) for name in CURVES}
    return pd.DataFrame(areas)


def mean_curves(
    curves: pd.DataFrame, *, patients: Sequence[object] | pd.Series | None = None, confidence: float = 0.95
) -> pd.DataFrame:
    """Mean curves of each method with intervals, resampling patients: what a figure draws.

    Args:
        curves: of `perturb_sequences`, or of `perturbation_curves` with a column `method`.
        patients: of each row; None: its StudyInstanceUID.
        confidence: of the intervals.

    Returns:
        `method`, `curve` ("deletion", "insertion"), `share`, `probability`, `low`, `high`.

    Raises:
        ValueError: columns are missing.

    Example:
        >>> ends = {"method": "uniform", "share": [0.0, 1.0], "deletion": [1.0, 0.0], "insertion": [0.0, 1.0]}
        >>> mean_curves(pd.DataFrame(ends), patients=["1", "1"])["probability"].tolist()
        [1.0, 0.0, 0.0, 1.0]
    """
    require_columns(curves, ("method", "share", *CURVES), what="The table of curves")
    if patients is None:
        require_columns(curves, (UID,), what="The table of curves, whose patients are not given,")
    whose = pd.Series(curves[UID] if patients is None else patients).to_numpy()
    if len(whose) != len(curves):
        raise ValueError(
            f"Each row has a patient; found {len(curves)} rows and {len(whose)} patients. Pass one a row."
        )
    rows = []
    for method, its in curves.assign(_patient=whose).groupby("method", sort=False):
        for curve in CURVES:
            for share, part in its.groupby("share"):
                found = mean_by_patient(part[curve], part["_patient"], confidence)
                rows.append((method, curve, share, *found))
    return pd.DataFrame(rows, columns=["method", "curve", "share", "probability", "low", "high"])


def perturb_sequences(
    run: Run,
    samples: pd.DataFrame,
    packed_dir: str | Path,
    maps: Mapping[str, ArrayLike],
    *,
    shares: Sequence[float] = SHARES,
    batch_size: int = 8,
    seed: int = 0,
) -> pd.DataFrame:
    """Curves of a run's probability for each of several maps of the same samples.

    The five intensity channels of a pixel are blurred together; the mask stays.

    Args:
        run: of `checkpoints.load_run`.
        samples: StudyInstanceUID, vertebra and label, as `labels.expand` makes them.
        packed_dir: the cohort's `packed` folder.
        maps: method → (N, T, h, w), in the samples' order.
        shares: see `perturbation_curves`.
        batch_size: sequences at a time.
        seed: of the order of equal values.

    Returns:
        `method`, StudyInstanceUID, vertebra, `case`, `share`, `deletion`, `insertion`.

    Raises:
        ValueError: see `perturbation_curves`.

    Example:
        >>> broken = cohort.samples["train"].query("label == 1")
        >>> maps = {"uniform": np.ones((len(broken), 5, 32, 32))}
        >>> curves = perturb_sequences(run, broken, cohort.packed, maps, shares=(0, 0.5, 1))
        >>> curves["share"].tolist()[:3]
        [0.0, 0.5, 1.0]
    """
    if not maps:
        raise ValueError("Curves are of one map or more; found none. Pass each method's maps by its name.")
    network, config = folded(run.model), run.config
    device = next(network.parameters()).device
    dataset = SequenceDataset(samples, packed_dir, slices=config.slices, size=config.size)
    batches = list(make_loader(dataset, batch_size=batch_size))
    images = torch.cat([batch["sequence"] for batch in batches]).numpy()
    vertebra = torch.cat([batch["vertebra"] for batch in batches])

    def probability(these: Tensor, rows: slice) -> Tensor:
        with as_on_a_cpu(device):
            return network(these.to(device), vertebra[rows].to(device)).probability

    other = blurred(images)
    other[:, :, MASK] = images[:, :, MASK]
    ids = samples[[UID, "vertebra"]].reset_index(drop=True)
    found = {
        name: perturbation_curves(
            probability, images, its, replacement=other, shares=shares, batch_size=batch_size, seed=seed
        )
        for name, its in maps.items()
    }
    curves = pd.concat(found, names=["method"]).reset_index(level="method").reset_index(drop=True)
    named = ids.loc[curves["case"]].reset_index(drop=True)
    return pd.concat([curves[["method"]], named, curves.drop(columns="method")], axis=1)
