"""What makes a scan hard to read: hairline cracks, thin bone, thick slices, metal and motion.

Each is drawn for a patient with a probability of its own, from a random stream of its own: beneath them a
patient of the hard cohort is the one of the standard cohort.

Shares and strengths were set by trial, so that a run of the standard cohort does here as readers do: 70
studies of seed 9090, 38 fractured vertebrae, had an AUROC of 0.88 (95 % interval 0.79 to 0.94).
"""

from dataclasses import dataclass, replace

import numpy as np
from scipy import ndimage

from cspine_helpers.phantom.anatomy import DIMENSIONS, Array, Point
from cspine_helpers.phantom.fractures import Compression, Crack, Fracture

METAL_HU = 3071.0  # titanium and more: the end of the scale
_SCREWS = ("C3", "C4", "C5", "C6")
_VIEWS, _RAY_MM = 180, 0.5  # of the streaks' projections


@dataclass(frozen=True)
class Hard:
    """How often, and how much. Pairs are the ends of a uniform draw.

    Attributes:
        hairline: share of patients whose fractures are hairline cracks, of one site or seldom two.
        gap_mm: of such a crack, where standard ones have 0.7 to 2.3.
        shift_mm: how far its fragment has moved, where standard ones have up to 3.
        pressed: share of a compressed body's loss of height that is left.
        osteopenia: share of patients with thin bone; a third of women of 75 have osteoporosis, and more have
            less bone than the young (Source: Looker et al., Osteoporos Int 28, 2017).
        density: factor of marrow and cortex, and `cortex` of the thickness of the shell.
        thick: share of patients in slices of two or three of the usual 1 to 1.25 mm, up to `thick_mm`.
        metal: share of patients with metal; half of them dental fillings in front of C1 to C3, half screws
            and rods in two or three vertebrae.
        streak_hu: 99th percentile of what metal does to HU around it, by beam hardening and by photons that
            lack (Source: De Man et al., IEEE Trans Nucl Sci 46, 1999, for both, and how they make streaks).
        motion: share of patients who moved, once or twice; swallowing, or a turn of the head.
        moved_mm: how far, in the axial plane; `moving_mm` of the table's way long.
    """

    hairline: float = 0.6
    gap_mm: tuple[float, float] = (0.6, 1.1)
    shift_mm: tuple[float, float] = (0.0, 1.0)
    pressed: tuple[float, float] = (0.45, 0.8)
    osteopenia: float = 0.3
    density: tuple[float, float] = (0.6, 0.8)
    cortex: tuple[float, float] = (0.6, 0.85)
    thick: float = 0.35
    thick_mm: float = 3.0
    metal: float = 0.2
    streak_hu: tuple[float, float] = (80.0, 250.0)
    motion: float = 0.25
    moved_mm: tuple[float, float] = (1.5, 4.0)
    moving_mm: tuple[float, float] = (3.0, 9.0)


@dataclass(frozen=True)
class Findings:
    """What makes one patient hard to read; by default nothing.

    Attributes:
        is_hairline: see `Hard.hairline`.
        density: factor of bone's density.
        cortex: factor of the cortex's thickness.
        thick: how many slices become one.
        metal: "", "fillings" or "screws".
        is_moving: whether the patient moves.
    """

    is_hairline: bool = False
    density: float = 1.0
    cortex: float = 1.0
    thick: int = 1
    metal: str = ""
    is_moving: bool = False


def draw_findings(hard: Hard, slice_mm: float, rng: np.random.Generator) -> Findings:
    """One patient's, whose slices are `slice_mm` apart before they become thick."""
    is_hairline, is_thin, is_thick, has_metal, is_moving = rng.random(5) < (
        hard.hairline,
        hard.osteopenia,
        hard.thick,
        hard.metal,
        hard.motion,
    )
    density, cortex = rng.uniform(*hard.density), rng.uniform(*hard.cortex)
    thick = int(rng.integers(2, int(hard.thick_mm / slice_mm) + 1))
    metal = str(rng.choice(["fillings", "screws"]))
    return Findings(
        bool(is_hairline),
        density if is_thin else 1.0,
        cortex if is_thin else 1.0,
        thick if is_thick else 1,
        metal if has_metal else "",
        bool(is_moving),
    )


def hairline(fractures: list[Fracture], hard: Hard, rng: np.random.Generator) -> list[Fracture]:
    """The same fractures, hardly to be seen: the first of them, one time in four the second, too."""
    gap, moved, left = (rng.uniform(*ends) for ends in (hard.gap_mm, hard.shift_mm, hard.pressed))
    found: list[Fracture] = []
    for fracture in fractures[: 1 + int(rng.random() < 0.25)]:
        if isinstance(fracture, Compression):
            found.append(replace(fracture, loss_mm=max(fracture.loss_mm * left, 1.2)))
        else:
            found.append(_narrow(fracture, gap, moved))
    return found


def blurred(truth: Array, inside: Array) -> Array:
    """Fractured voxels of a hairline crack: its neighbours in the slice, too, over which the scan spreads it.

    Args:
        truth: bool (Z, Y, X), where the crack itself is.
        inside: the same of the vertebra.
    """
    return ndimage.binary_dilation(truth, np.array([[[0, 1, 0], [1, 1, 1], [0, 1, 0]]])) & inside


def _narrow(crack: Crack, gap_mm: float, moved_mm: float) -> Crack:
    shift = np.array(crack.shift_mm)
    length = float(np.linalg.norm(shift))
    share = min(moved_mm / length, 1.0) if length else 0.0
    return replace(crack, gap_mm=min(gap_mm, crack.gap_mm), shift_mm=tuple((shift * share).tolist()))


@dataclass(frozen=True)
class _Rod:
    """Metal from `start` to `end` (z, y, x in mm from the field's middle)."""

    start: Array
    end: Array
    radius_mm: float


def add_metal(
    tissue: Array,
    axes: list[Array],
    poses: dict[str, tuple[Array, Array]],
    scale: float,
    findings: Findings,
    hard: Hard,
    rng: np.random.Generator,
) -> None:
    """Put metal into the tissue, in place, and the streaks that it makes.

    Args:
        tissue: (Z, Y, X) HU.
        axes: positions of its voxels along each axis, mm from the field's middle.
        poses: level → middle (z, y, x in mm) and rotation.
        scale: the patient's.
        findings: of the patient.
        hard: strength.
        rng: where, and the noise of the streaks.
    """
    rods = _fillings(axes, poses, rng) if findings.metal == "fillings" else _implant(poses, scale, rng)
    strength_hu = rng.uniform(*hard.streak_hu)
    z, y, x = axes
    discs = [_discs(rods, height) for height in z]
    touched = [index for index, its in enumerate(discs) if its]
    streaks = np.stack([_streaks(discs[index], y, x, rng) for index in touched])
    streaks *= strength_hu / np.quantile(np.abs(streaks), 0.99)
    tissue[touched] += np.clip(streaks, -3 * strength_hu, 3 * strength_hu)
    for index in touched:
        for middle_y, middle_x, radius in discs[index]:
            away = np.hypot(y[:, None] - middle_y, x[None, :] - middle_x)
            share = np.clip((radius - away) / (y[1] - y[0]) + 0.5, 0, 1)
            tissue[index] += share * (METAL_HU - tissue[index])


def _fillings(
    axes: list[Array], poses: dict[str, tuple[Array, Array]], rng: np.random.Generator
) -> list[_Rod]:
    """Two to five of them, in front of the field of view and at the height of C1 to C3."""
    top, low = poses["C1"][0][0], poses["C3"][0][0]
    front, rods = axes[1][0], []
    for _ in range(int(rng.integers(2, 6))):
        z, y = rng.uniform(top, low), front - rng.uniform(8, 30)
        middle = np.array([z, y, rng.choice([-1, 1]) * rng.uniform(14, 27)])
        half = np.array([rng.uniform(2, 4), 0.0, 0.0])
        rods.append(_Rod(middle - half, middle + half, rng.uniform(2.0, 3.5)))
    return rods


def _implant(poses: dict[str, tuple[Array, Array]], scale: float, rng: np.random.Generator) -> list[_Rod]:
    """Screws of 3.5 mm in the lateral masses of two or three vertebrae, with a rod on each side.

    Source: Magerl's way in: from behind, a quarter turn of 25° outwards and up along the facet.
    """
    levels = int(rng.integers(2, 4))
    first = int(rng.integers(0, len(_SCREWS) - levels + 1))
    rods = []
    for side in (-1.0, 1.0):
        heads = []
        for level in _SCREWS[first : first + levels]:
            d = DIMENSIONS[level]
            points = (
                (side * d.pillar_x, d.canal_y + 5.0, 2.0),
                (side * (d.pillar_x + 5.0), d.canal_y - 7.0, -4.0),
                (side * d.pillar_x, d.canal_y + 8.0, 3.5),
            )
            entry, tip, head = (_placed(point, *poses[level], scale) for point in points)
            rods += [_Rod(head, tip, 1.75), _Rod(head, entry, 3.5)]
            heads.append(head)
        rods.append(_Rod(heads[0], heads[-1], 1.75))
    return rods


def _placed(point: Point, middle: Array, rotation: Array, scale: float) -> Array:
    """A point of a vertebra's frame (x, y, z) in the field (z, y, x)."""
    return np.asarray(middle + scale * (rotation.T @ np.array(point))[::-1])


def _discs(rods: list[_Rod], z: float) -> list[tuple[float, float, float]]:
    """Round cuts (y, x, radius) of the rods with an axial plane; a rod in the plane gives a row of them."""
    found = []
    for rod in rods:
        steps = max(int(np.linalg.norm(rod.end - rod.start) / rod.radius_mm * 2), 2)
        for share in np.linspace(0, 1, steps):
            point = rod.start + share * (rod.end - rod.start)
            left = rod.radius_mm**2 - (point[0] - z) ** 2
            if left > 0.1:
                found.append((float(point[1]), float(point[2]), float(np.sqrt(left))))
    return found


def _streaks(discs: list[tuple[float, float, float]], y: Array, x: Array, rng: np.random.Generator) -> Array:
    """Errors (Y, X) of a slice, in no unit: filtered back-projection of what metal takes from projections."""
    angles = np.pi * np.arange(_VIEWS) / _VIEWS
    reach = 1.1 * max(np.hypot(*place[:2]) + place[2] for place in [*discs, (y.max(), x.max(), 0.0)])
    rays = np.arange(-reach, reach, _RAY_MM)
    path_mm = np.zeros((_VIEWS, rays.size))  # of metal along each ray
    for middle_y, middle_x, radius in discs:
        middle = middle_x * np.cos(angles) + middle_y * np.sin(angles)
        chord = 2 * np.sqrt(np.clip(radius**2 - (rays - middle[:, None]) ** 2, 0, None))
        path_mm = np.maximum(path_mm, chord) + 0.3 * np.minimum(path_mm, chord)  # cuts of a rod overlap
    error = -(path_mm**2) * (1 + 0.5 * rng.standard_normal(path_mm.shape))  # hardening, and lost photons
    size = 2 ** int(np.ceil(np.log2(2 * rays.size)))
    ramp = np.abs(np.fft.rfftfreq(size)) * np.hanning(size + 1)[size // 2 :]
    filtered = np.fft.irfft(np.fft.rfft(error, size) * ramp, size)[:, : rays.size]
    image = np.zeros((y.size, x.size), np.float32)
    for angle, view in zip(angles, filtered.astype(np.float32), strict=True):
        across, down = (
            (axis / _RAY_MM).astype(np.float32) for axis in (x * np.cos(angle), y * np.sin(angle))
        )
        ray = across[None, :] + (down + np.float32(reach / _RAY_MM + 0.5))[:, None]
        image += view.take(ray.astype(np.int32))
    return image


def move(
    volumes: tuple[Array, Array, Array],
    spacing_mm: tuple[float, float, float],
    hard: Hard,
    rng: np.random.Generator,
) -> tuple[Array, Array, Array]:
    """Tissue, label map and fracture map of a patient who moves once or twice during the scan.

    From a height on, everything is somewhere else in the plane. Slices scanned on the way show both places.
    """
    tissue, *maps = (volume.copy() for volume in volumes)
    depth = len(tissue)
    place, ghost = np.zeros((depth, 2)), np.zeros((depth, 2))
    for _ in range(int(rng.integers(1, 3))):
        angle, far = rng.uniform(0, 2 * np.pi), rng.uniform(*hard.moved_mm)
        way = far * np.array([np.sin(angle), np.cos(angle)]) / spacing_mm[1:]
        width = rng.uniform(*hard.moving_mm) / spacing_mm[0]
        done = np.clip((np.arange(depth) - rng.uniform(0.1, 0.9) * depth) / width, 0, 1)[:, None]
        place += done * way
        ghost += ((done > 0) & (done < 1)) * way * 0.5
    place -= place.mean(axis=0)  # the field of view stays around the neck
    for index in range(depth):
        still, other = volumes[0][index], place[index] + ghost[index]
        tissue[index] = ndimage.shift(still, place[index], order=1, mode="nearest")
        if ghost[index].any():
            tissue[index] += 0.4 * (ndimage.shift(still, other, order=1, mode="nearest") - tissue[index])
        for moved, source in zip(maps, volumes[1:], strict=True):
            moved[index] = ndimage.shift(source[index], place[index], order=0)
    return tissue, maps[0], maps[1]


def thicken(volumes: tuple[Array, Array, Array], thick: int) -> tuple[Array, Array, Array]:
    """Tissue, label map and fracture map in slices of `thick` of theirs; a rest at the end is lost.

    HU are the slices' mean. A voxel is a vertebra's where its middle is, and fractured where any of it is.
    """
    depth = len(volumes[0]) // thick
    tissue, label_map, fracture_map = (
        volume[: depth * thick].reshape(depth, thick, *volume.shape[1:]) for volume in volumes
    )
    labelled = label_map[:, thick // 2]
    broken = (fracture_map == labelled[:, None]).any(axis=1) & (labelled > 0)
    return tissue.mean(axis=1), labelled.copy(), np.where(broken, labelled, 0).astype(np.uint8)
