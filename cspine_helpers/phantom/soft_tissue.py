"""The neck around the spine: muscles between planes of fat, vessels, skin and one airway from nose to chest.

All of it follows the spine: its shapes are laid out around the middle of the bodies, at every height.
"""

import numpy as np

from cspine_helpers.phantom.anatomy import Array

_MUSCLE_HU, _VESSEL_HU, _FAT_HU, _AIR_HU, _CARTILAGE_HU, _HYOID_HU = 55.0, 45.0, -90.0, -1000.0, 170.0, 500.0
# The airway from the middle of C1 (0) to T1 (7): how far its middle is in front of the bodies' middle, its
# half width and half depth, in mm: nasopharynx, pharynx, larynx with the glottis at C5, trachea.
_AIRWAY_LEVEL = (-0.6, 0.3, 1.0, 2.0, 3.0, 3.8, 4.3, 4.8, 5.5, 7.0)
_IN_FRONT = (24.5, 22.0, 18.0, 18.0, 19.5, 23.0, 25.5, 26.0, 26.0, 26.0)
_AIRWAY_WIDTH = (12.0, 13.0, 11.5, 12.0, 10.0, 7.0, 3.5, 6.5, 8.5, 8.5)
_AIRWAY_DEPTH = (7.0, 6.0, 5.5, 6.0, 5.5, 6.5, 8.0, 7.5, 7.5, 7.5)
# Half width and half depth, in mm, of head, neck and shoulders.
_OUTLINE_LEVEL = (-1.0, -0.5, 0.2, 5.0, 5.8, 6.6)
_HALF_WIDTH = (80.0, 74.0, 64.0, 64.0, 74.0, 140.0)
_HALF_DEPTH = (74.0, 68.0, 56.0, 56.0, 56.0, 60.0)


def soft_tissue(
    noise: Array,
    axes: list[Array],
    poses: dict[str, tuple[Array, Array]],
    scale: float,
    rng: np.random.Generator,
) -> Array:
    """Neck without bone, float32 (Z, Y, X) in HU.

    Args:
        noise: standard normal and smooth, (Z, Y, X): where fat lies between fibres. It is used up.
        axes: positions of the voxels along each axis, mm from the field's middle.
        poses: C1 … T1 → middle (z, y, x in mm) and rotation.
        scale: the patient's.
        rng: how wide the airway is, and how far from the midline.
    """
    z, y, x = axes
    middles = np.array([middle for middle, _ in poses.values()])
    ends = 2 * middles[[0, -1]] - middles[[1, -2]]  # the curve goes on straight above C1 and below T1
    curve = np.array([ends[0], *middles, ends[1]])
    level, spine_y, spine_x = (
        np.interp(z, curve[:, 0], its) for its in (np.arange(-1, len(middles) + 1), curve[:, 1], curve[:, 2])
    )
    # 1. Fat between fibres, and layers that are the same at all heights of the neck.
    tissue = np.maximum(noise, np.float32(0.7), out=noise)
    tissue *= np.float32(-90)
    tissue += np.float32(_MUSCLE_HU + 0.7 * 90)
    rows = np.arange(y[0] - spine_y.max(), y[-1] - spine_y.min() + y[1] - y[0], y[1] - y[0])
    first = np.round((y[0] - spine_y - rows[0]) / (y[1] - y[0])).astype(int)
    layers = _layers(rows / scale, x / scale)
    width, depth = (scale * np.interp(level, _OUTLINE_LEVEL, its) for its in (_HALF_WIDTH, _HALF_DEPTH))
    for index, plane in enumerate(tissue):
        plane += layers[first[index] : first[index] + y.size]
        across = ((x - spine_x[index]) / width[index]) ** 2
        deep = ((y - spine_y[index] - 10 * scale) / depth[index]) ** 2
        away = across[None, :].astype(np.float32) + deep[:, None].astype(np.float32)
        plane[away > 0.93**2] = _FAT_HU
        plane[away > 1] = _AIR_HU
    # 2. The airway.
    wide, aside = 1 + 0.15 * np.sin(z / 23.0 + rng.uniform(0, 6)), rng.normal(0, 1)
    ahead, across, deep = (
        scale * np.interp(level, _AIRWAY_LEVEL, its) for its in (_IN_FRONT, _AIRWAY_WIDTH, _AIRWAY_DEPTH)
    )
    across, deep = across * wide, deep * wide
    middle_y, middle_x = np.maximum(spine_y - ahead, y[0] + deep + 3), spine_x + aside
    reach = 21.0 * scale
    near_y = slice(*np.searchsorted(y, (middle_y.min() - reach, middle_y.max() + reach)))
    near_x = slice(*np.searchsorted(x, (middle_x.min() - reach, middle_x.max() + reach)))
    part = tissue[:, near_y, near_x]
    dy = (y[None, near_y] - middle_y[:, None]).astype(np.float32)[:, :, None]
    dx = (x[None, near_x] - middle_x[:, None]).astype(np.float32)[:, None, :]
    across, deep = (its.astype(np.float32)[:, None, None] for its in (across, deep))
    away = (dx / across) ** 2 + (dy / deep) ** 2
    is_larynx, is_windpipe = (level > 3.4) & (level < 4.7), level > 4.7
    # Hyoid bone, thyroid cartilage (a keel, open to the back), rings of the trachea, air.
    keel = np.abs(np.abs(dx) * np.float32(0.8) - dy - np.float32(10.0 * scale)) < np.float32(1.2 * scale)
    near = np.flatnonzero(np.abs(level - 2.3) < 0.25)
    bow = (10 * np.hypot(dx[near] / (19 * scale), dy[near] / (15 * scale)) - 10) ** 2
    part[near] = np.where(
        (bow + ((level[near] - 2.3) / 0.25)[:, None, None] ** 2 < 1) & (dy[near] < 0), _HYOID_HU, part[near]
    )
    part[keel & (np.abs(dx) < 14.0 * scale) & is_larynx[:, None, None]] = _CARTILAGE_HU
    ring = (away < 1.5) & (dy < 0.55 * deep) & is_windpipe[:, None, None]
    part[ring] = 0.6 * _CARTILAGE_HU
    part[away < 1] = _AIR_HU
    return tissue


def _layers(y: Array, x: Array) -> Array:
    """HU to add to muscle, (Y, X); `y` and `x` are mm behind and beside the bodies."""
    y, x = y.astype(np.float32)[:, None], np.abs(x.astype(np.float32))[None, :]
    layers = np.zeros((y.size, x.size), np.float32)
    fat = np.float32(_FAT_HU - _MUSCLE_HU)
    # Planes between the deep muscles, splenius and trapezius, and the septum between left and right.
    around = np.hypot(x / 64, (y - 10) / 56) + np.float32(0.025) * np.sin(x / 7)
    for radius, half_mm in ((0.57, 0.6), (0.8, 0.9)):
        layers[(np.abs(around - radius) < half_mm / 60) & (y > 14 + 0.3 * x)] = fat
    layers[(x < 0.7) & (y > 27)] = 0.5 * fat
    # The carotid sheath in its fat, and the sternocleidomastoid beside it.
    layers[np.hypot((x - 30) / 11, (y + 13) / 9) < 1] = fat
    for vessel_x, vessel_y, radius in ((26.0, -15.0, 3.3), (33.0, -12.0, 4.8)):
        layers[np.hypot(x - vessel_x, y - vessel_y) < radius] = _VESSEL_HU - _MUSCLE_HU
    muscle = np.hypot((x - 44) / 8, (y + 14) / 14)
    layers[(muscle >= 1) & (muscle < 1.14)] = fat
    layers[muscle < 1] = 0
    return layers
