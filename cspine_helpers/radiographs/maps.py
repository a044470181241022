"""Where in a radiograph a network sees evidence of a fracture: maps of `explain.maps`, and its own mask.

Maps lie in the network's frame, in which cohorts are packed and in which they are judged; `Frame.back` brings
one onto the radiograph's own pixels. Portrait and landscape frames differ in shape, so that a cohort comes in
up to two groups. Shapes: N radiographs in frames of H × W pixels, maps of h × w cells.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from tqdm.auto import tqdm

from cspine_helpers.checkpoints import Run
from cspine_helpers.explain.maps import (
    METHODS,
    ON_PIXELS,
    Grid,
    Method,
    check_precision,
    compute_maps,
    default_layer,
    grid_of,
)
from cspine_helpers.files.paths import listing
from cspine_helpers.model.forward import as_on_a_cpu
from cspine_helpers.radiographs.cohort import RadiographCohort
from cspine_helpers.radiographs.dataset import RadiographDataset
from cspine_helpers.radiographs.images import Frame
from cspine_helpers.radiographs.model import MASK_STRIDE, WITH_MASK, RadiographConfig, RadiographModel

MASK: Literal["mask"] = "mask"  # the network's own: probability of each cell of being fractured
RADIOGRAPH_METHODS = (*METHODS, MASK)


class Framed(NamedTuple):
    """Radiographs of a cohort whose frames have one shape.

    Attributes:
        rows: of the cohort's image table.
        pixels: uint8 (N, H, W).
        truth: uint8 (N, H, W), 1 where a fracture is outlined.
    """

    rows: pd.DataFrame
    pixels: NDArray[np.uint8]
    truth: NDArray[np.uint8]


def framed(cohort: RadiographCohort, rows: pd.DataFrame) -> list[Framed]:
    """Packed radiographs and the truth about them, portrait ones first, landscape ones second.

    Args:
        cohort: packed, of `read_radiograph_cohort`.
        rows: of its image table, such as `cohort.of("test")`.

    Raises:
        FileNotFoundError, ValueError: nothing is packed, or not these images.

    Example:
        >>> from cspine_helpers.radiographs.cohort import read_radiograph_cohort
        >>> from cspine_helpers.radiographs.packing import pack_images
        >>> _ = pack_images(radiographs)
        >>> cohort = read_radiograph_cohort(radiographs)
        >>> [part.pixels.shape[1:] for part in framed(cohort, cohort.of("test"))]
        [(448, 384), (384, 448)]
    """
    dataset = RadiographDataset(rows, cohort.packed, stride=1)
    portrait = dataset.shapes[:, 0] >= dataset.shapes[:, 1]
    parts = []
    for those in (np.flatnonzero(portrait), np.flatnonzero(~portrait)):
        if len(those):
            items = [dataset[int(n)] for n in those]
            pixels = np.stack([item["image"].numpy() for item in items])
            truth = np.stack([item["mask"].numpy() >= 128 for item in items]).astype(np.uint8)
            parts.append(Framed(rows.iloc[those].reset_index(drop=True), pixels, truth))
    return parts


@dataclass(frozen=True)
class RadiographMaps:
    """One map of each of N radiographs, in frames of one shape.

    Attributes:
        values: float32 (N, h, w), raw and signed, on the map's own grid; of "mask", probabilities.
        method: of `RADIOGRAPH_METHODS`.
        layer: whose cells they are; None: of the image, or of the mask.
        grid: where in the frame its cells lie.
        size: (H, W) of the frame, pixels.
        probability: (N,), of a fracture.
    """

    values: NDArray[np.float32]
    method: str
    layer: str | None
    grid: Grid
    size: tuple[int, int]
    probability: NDArray[np.float64]

    def pixels(self) -> NDArray[np.float32]:
        """The maps on the frame's pixels, float32 (N, H, W): linear between the centres of their cells."""
        return self.grid.on_pixels(self.values, self.size)

    def on_radiograph(self, number: int, height: int, width: int) -> NDArray[np.float32]:
        """One map on its radiograph's own pixels, float32 (height, width)."""
        frame = Frame.of(height, width, long=max(self.size), short=min(self.size))
        return frame.back(self.grid.on_pixels(self.values[number], self.size))


def map_radiographs(
    run: Run[RadiographModel, RadiographConfig],
    images: NDArray[np.uint8],
    *,
    method: Method | Literal["mask"] = "grad_cam",
    layer: str | None = None,
) -> RadiographMaps:
    """One map of each radiograph, by the network that predicts: folded, in float32, the image as it is.

    Gradients run through what was frozen in training, too, so that any layer can be named.

    Args:
        run: of `load_radiograph_run`.
        images: uint8 (N, H, W), in frames of one shape, of `framed` or `Frame.pixels`.
        method: of `RADIOGRAPH_METHODS`.
        layer: whose cells are mapped; None: the encoder's deepest. See `explain.maps.compute_maps`.

    Raises:
        ValueError: as in `compute_maps`; the network has no mask, and it is asked for; it was trained on
            patches; the images are of another shape or type.

    Example:
        >>> map_radiographs(run, np.zeros((2, 448, 384), np.uint8), method="colours")
        Traceback (most recent call last):
        ...
        ValueError: There is no method 'colours' to map with. Choose one of 'grad_cam', ...
    """
    # 1. What is asked for.
    if method not in RADIOGRAPH_METHODS:
        known = listing(RADIOGRAPH_METHODS)
        raise ValueError(f"There is no method {method!r} to map with. Choose one of {known}.")
    if not isinstance(run.config, RadiographConfig):
        raise ValueError(
            f"The run {run.folder.name} is of sequences, not of radiographs. Those are mapped by "
            "explain.map_sequences(...)."
        )
    if images.ndim != 3 or len(images) == 0:
        raise ValueError(
            f"Radiographs to map are uint8 (N, H, W), one or more in frames of one shape; found "
            f"{images.shape}. Bring them into a frame, portrait and landscape apart."
        )
    if side := run.record.get("train", {}).get("patch"):
        raise ValueError(
            f"The run {run.folder.name} sees patches of {side} pixels through a window, and no whole image "
            "to map. Choose a run of whole images."
        )
    if method == MASK and run.config.architecture not in WITH_MASK:
        raise ValueError(
            f"A {run.config.architecture} has no mask to show. Choose one of {listing(METHODS)}."
        )
    if method == MASK and layer is not None:
        raise ValueError(f"The mask takes no layer; found {layer!r}. Leave it out.")

    check_precision(run.model)

    # 2. Image by image: on a CPU that is how the network computes them anyway.
    network = run.model.folded(gradients=True)
    device = next(network.buffers()).device
    maps, probabilities = [], []
    grid = Grid(((MASK_STRIDE - 1) / 2,) * 2, (float(MASK_STRIDE),) * 2)  # of the mask, as its truth is made
    for image in tqdm(
        torch.from_numpy(images), desc="map", unit="image", leave=False, disable=len(images) == 1
    ):
        given = image[None].to(device)
        with as_on_a_cpu(device):
            output = network(given)
        probabilities.append(float(output.probability))
        if method == MASK:
            assert output.mask_logit is not None  # as its architecture says
            maps.append(output.mask_logit.float().sigmoid())
            continue
        if layer is None and method not in ON_PIXELS:
            layer = default_layer(network, given)
        if not maps:
            grid = grid_of(network, layer, given)
        maps.append(compute_maps(network, given, lambda output: output.logit, method=method, layer=layer))
    height, width = images.shape[1:]
    values = torch.cat(maps).cpu().numpy()
    return RadiographMaps(values, method, layer, grid, (height, width), np.array(probabilities))
