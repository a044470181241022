"""A vertebra cut along its own plane: no axial slice of a tilted one shows body and spinous process."""

import numpy as np

from cspine_helpers.packed import MASK

_TILT_DEG, _ROLL_DEG = (
    np.arange(-48, 49, 3),
    np.arange(-24, 25, 4),
)  # about the left-right and front-back axis
_SIDES = 0.4  # how much a column from side to side counts, of a row from front to back
_THICK_MM = 2.0  # of the plane that holds most of the vertebra


def own_plane(array: np.ndarray, *, pixel_mm: float, step_mm: float) -> np.ndarray:
    """One packed sequence cut along the vertebra's own plane, as a sequence of one slice.

    It is the plane that holds most of the vertebra, where each row from front to back counts the same, and
    each column less, so that thin processes weigh as much as the body. Planes are tilted by up to 48 degrees
    forwards and backwards and 24 to either side. What the sequence does not reach, above and below the
    vertebra, is black. Nothing is stretched: a pixel of the cut is as long as one of the sequence.

    Args:
        array: (T, H, W, 6) uint8, cranial first.
        pixel_mm: side of a pixel.
        step_mm: from one of the T positions to the next, `(z_last_mm - z_first_mm) / (T - 1)`.

    Returns:
        uint8 (1, H, W, 6): the middle channel five times, and the mask, 0 or 255.

    Raises:
        ValueError: a length is not above 0, there are fewer than two positions, or the mask is empty.

    Example:
        >>> array = np.zeros((9, 32, 32, 6), np.uint8)
        >>> array[3:6, 8:24, 8:24] = 255
        >>> own_plane(array, pixel_mm=1.0, step_mm=1.0).shape
        (1, 32, 32, 6)
    """
    from scipy import ndimage  # here alone: who packs need not wait for it

    inside = np.asarray(array[..., MASK]) > 127
    if not (pixel_mm > 0 and step_mm > 0 and len(array) > 1 and inside.any()):
        raise ValueError(
            "A plane is cut through two positions or more with a mask, and lengths above 0; found "
            f"{len(array)} position(s), {inside.sum()} pixels of the mask, pixel_mm {pixel_mm} and step_mm "
            f"{step_mm}. Give a whole packed sequence and its row of the manifest."
        )
    # 1. Which plane, by the mask's voxels in mm
    size_mm = np.array([step_mm, pixel_mm, pixel_mm])
    voxels = np.argwhere(inside)
    points = voxels * size_mm
    weight = 1 / inside.sum(axis=(0, 2))[voxels[:, 1]] + _SIDES / inside.sum(axis=(0, 1))[voxels[:, 2]]
    middle = points.mean(axis=0)
    best, normal, depth = 0.0, np.array([1.0, 0, 0]), 0.0
    for tilt, roll in sorted(
        ((t, r) for t in _TILT_DEG for r in _ROLL_DEG), key=lambda both: np.hypot(*both)
    ):
        t, r = np.radians([tilt, roll])
        towards = np.array([np.cos(t) * np.cos(r), np.sin(t) * np.cos(r), np.sin(r)])  # (z, y, x), caudal
        depths = (points - middle) @ towards
        order = np.argsort(depths)
        depths, up_to = depths[order], np.r_[0.0, np.cumsum(weight[order])]
        held = up_to[np.searchsorted(depths, depths + _THICK_MM)] - up_to[:-1]
        if held.max() > best * (1 + 1e-9):  # of equals the one nearest to axial
            best, normal, depth = held.max(), towards, depths[held.argmax()] + _THICK_MM / 2
    # 2. The cut: its rows run towards the back, its columns to the left, both perpendicular to the normal
    across = np.array([0.0, 0, 1]) - normal[2] * normal
    across /= np.linalg.norm(across)
    back = np.cross(normal, across)
    back *= np.sign(back[1])
    rows, columns = (np.arange(n) - (n - 1) / 2 for n in array.shape[1:3])
    start = (np.array(array.shape[:3]) - 1) / 2 * size_mm
    start += (
        (middle - start) @ normal + depth
    ) * normal  # of the plane, the point nearest to the crop's middle
    places = start + pixel_mm * (rows[:, None, None] * back + columns[:, None] * across)  # (H, W, 3)
    at = np.moveaxis(places / size_mm, -1, 0)
    cut = ndimage.map_coordinates(array[..., MASK // 2].astype(np.float32), at, order=1, cval=0.0)
    mask = ndimage.map_coordinates(inside.astype(np.float32), at, order=1, cval=0.0) > 0.5
    found = np.repeat(cut.round().astype(np.uint8)[None, ..., None], MASK + 1, axis=-1)
    found[..., MASK] = 255 * mask
    return found
