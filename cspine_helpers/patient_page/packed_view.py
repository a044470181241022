"""What a page shows where no CT is at hand: the packed slices, and each vertebra's middle at its height.

A packed sequence knows the height of its slices (the manifest), not where it lies from front to back: the
vertebrae are set below each other, and a step between two of them is no finding.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from cspine_helpers.figures.patient import AxialSlice, SideView
from cspine_helpers.figures.scans import BONE_WINDOW_HU
from cspine_helpers.labels import VERTEBRAE
from cspine_helpers.packed import MASK

STEP_MM = 17.0  # between vertebrae whose height is not known; about one's height with its disc
_TALL_MM, _PIXEL_MM = 14.0, 1.0  # of such vertebrae
_AIR_HU = -1000.0
_CENTRAL = MASK // 2


@dataclass(frozen=True)
class PackedView:
    """The packed sequences of one study.

    Attributes:
        arrays: vertebra → (T, H, W, 6), as `packed.open_sequence` gives it.
        manifest: the study's rows by vertebra; None, and vertebrae that it lacks or gives no height: their
            place is not known.
    """

    arrays: Mapping[str, NDArray[np.uint8]]
    manifest: pd.DataFrame | None

    def heights_mm(self, vertebra: str) -> NDArray[np.float64]:
        """How far below the scan's first slice each slice lies, (T,)."""
        slices = len(self.arrays[vertebra])
        if self._is_known(vertebra):
            first, last = (self._said(vertebra, f"z_{end}_mm") for end in ("first", "last"))
        else:
            middle = STEP_MM * VERTEBRAE.index(vertebra)
            first, last = middle - _TALL_MM / 2, middle + _TALL_MM / 2
        return np.linspace(first, last, slices)

    def side_view(self) -> SideView:
        """The middle column of each sequence within its mask, at its height, middles in line."""
        pixels = {name: self._pixel_mm(name) for name in self.arrays}
        half = max(pixels[name] * array.shape[1] / 2 for name, array in self.arrays.items())
        heights = {name: self.heights_mm(name) for name in self.arrays}
        top = min(z[0] for z in heights.values())
        # A canvas of 1 mm by 0.5 mm whose first row is at the scan's first slice.
        dz, dy = 1.0, 0.5
        rows = int(max(z[-1] for z in heights.values()) / dz) + 2
        rows, shift = (rows - int(min(top, 0)), -min(top, 0.0))
        plane = np.full((rows, int(2 * half / dy) + 1), _AIR_HU, np.float32)
        labels = np.zeros(plane.shape, np.uint8)
        depth = np.arange(plane.shape[1]) * dy - half  # of the canvas' columns
        middle_mm, fronts = {}, {}
        for name, array in self.arrays.items():
            z = heights[name]
            inside = np.arange(int(np.ceil(z[0] + shift)), int(z[-1] + shift) + 1)  # of the canvas' rows
            t = np.interp(inside - shift, z, np.arange(len(z))).round().astype(int)
            row = np.floor(depth / pixels[name] + array.shape[1] / 2).astype(int)
            seen = (row >= 0) & (row < array.shape[1])
            sheet = np.asarray(array[:, :, array.shape[2] // 2])[t][:, row.clip(0, array.shape[1] - 1)]
            bone = (sheet[..., MASK] > 127) & seen
            plane[inside] = np.where(bone, self._hu(name, sheet[..., _CENTRAL]), plane[inside])
            labels[inside] = np.where(bone, VERTEBRAE.index(name) + 1, labels[inside])
            middle_mm[name] = float(z.mean())
            fronts[name] = (np.flatnonzero(bone.any(axis=0)).min(initial=len(depth)) - 3) * dy
        return SideView(
            plane=plane,
            labels=labels,
            spacing_mm=(dz, dy),
            height_mm=middle_mm,
            name_mm=fronts,
            note="No CT at hand: the packed vertebrae, each cut in its middle, set in line",
        )

    def axial(self, vertebra: str, position: int, caption: str) -> AxialSlice:
        """One packed slice; no lesion is marked on it."""
        picture = np.asarray(self.arrays[vertebra][position])
        pixel_mm = self._said(vertebra, "pixel_mm") if self._is_known(vertebra) else None
        plane, mask = self._hu(vertebra, picture[..., _CENTRAL]), picture[..., MASK] > 127
        return AxialSlice(plane, mask, 1.0, caption, pixel_mm=pixel_mm)

    def _is_known(self, vertebra: str) -> bool:
        if self.manifest is None or vertebra not in self.manifest.index:
            return False
        return self._said(vertebra, "z_first_mm") < self._said(vertebra, "z_last_mm")

    def _said(self, vertebra: str, column: str) -> float:
        assert self.manifest is not None
        return float(self.manifest.loc[vertebra, column])  # type: ignore[arg-type]

    def _pixel_mm(self, vertebra: str) -> float:
        return self._said(vertebra, "pixel_mm") if self._is_known(vertebra) else _PIXEL_MM

    def _hu(self, vertebra: str, values: NDArray[np.uint8]) -> NDArray[np.float32]:
        low, high = BONE_WINDOW_HU
        if self._is_known(vertebra):
            low, high = (self._said(vertebra, f"window_{end}_hu") for end in ("low", "high"))
        return (low + values.astype(np.float32) * np.float32((high - low) / 255)).astype(np.float32)
