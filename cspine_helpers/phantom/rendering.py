"""One synthetic CT of the cervical spine in Hounsfield units, drawn from (cohort seed, study index) alone."""

import itertools
from dataclasses import dataclass, replace

import numpy as np
from scipy import ndimage

from cspine_helpers.labels import VERTEBRAE
from cspine_helpers.phantom.anatomy import (
    BRAINCASE,
    DIMENSIONS,
    SKULL,
    Array,
    LocalGrid,
    Point,
    bounds,
    vertebra_distance,
)
from cspine_helpers.phantom.difficulty import (
    Findings,
    Hard,
    add_metal,
    blurred,
    draw_findings,
    hairline,
    move,
    thicken,
)
from cspine_helpers.phantom.fractures import (
    Fracture,
    add_mimics,
    break_bone,
    displace,
    draw_fractures,
    draw_mimics,
)
from cspine_helpers.phantom.soft_tissue import soft_tissue

LEVELS = (*VERTEBRAE, "T1")
_JOINT_MM = 1.6  # from bone to bone: cartilage, and what is between
_CSF_HU, _CORD_HU, _DISC_HU, _BRAIN_HU = 12.0, 42.0, 90.0, 34.0
_KERNEL_REACH = 3.0  # standard deviations
# The field of view around the bodies' middles: above C1, below T1, in front, behind, and its whole width.
_ABOVE_MM, _BELOW_MM, _FRONT_MM, _BACK_MM, _WIDTH_MM = 26.0, 24.0, 36.0, 64.0, 106.0


@dataclass(frozen=True)
class Study:
    """One phantom.

    Attributes:
        uid: StudyInstanceUID in the form of RSNA 2022.
        volume_hu: float32 (Z, Y, X), cranial to caudal, front to back, right to left.
        label_map: uint8, same shape; 1–7 mark C1–C7.
        fracture_map: uint8, same shape; the vertebra's number where its bone is fractured.
        spacing_mm: (z, y, x).
        window_hu: the window this study is packed with.
        labels: 0 or 1 for each of C1–C7.
    """

    uid: str
    volume_hu: Array
    label_map: Array
    fracture_map: Array
    spacing_mm: tuple[float, float, float]
    window_hu: tuple[float, float]
    labels: dict[str, int]


@dataclass(frozen=True)
class _Patient:
    """What differs from patient to patient beside the findings."""

    scale: float
    density: float
    lordosis: float  # rad between C2 and C7
    tilt: float  # rad, of C7
    yaw: float
    roll: float
    disc_mm: float
    noise_hu: float
    blur_mm: float
    spacing_mm: tuple[float, float, float]
    window_hu: tuple[float, float]
    cortex: float = 1.0


def study_uid(seed: int, index: int) -> str:
    """A UID under the root that RSNA 2022 uses, with cohort seed and study index behind it."""
    return f"1.2.826.0.1.3680043.{seed}.{index + 1}"


def generator(seed: int, index: int, stream: int) -> np.random.Generator:
    """The random stream of one study: the same on every machine and in every process."""
    return np.random.default_rng(np.random.SeedSequence([seed, index, stream]))


def render_study(seed: int, index: int, fractured: dict[str, int], *, hard: Hard | None = None) -> Study:
    """Render one study in Hounsfield units.

    Args:
        seed: cohort seed.
        index: study index within the cohort.
        fractured: 0 or 1 for each of C1–C7.
        hard: what makes it hard to read; None: nothing.
    """
    # 1. The patient.
    rng, other = generator(seed, index, 1), generator(seed, index, 4)
    patient = _draw_patient(rng)
    found = draw_findings(hard, patient.spacing_mm[0], other) if hard else Findings()
    patient = replace(patient, density=patient.density * found.density, cortex=found.cortex)
    poses = _poses(patient, rng)
    shape = _shape(poses, patient)
    # 2. Soft tissue, then bone in it.
    tissue = soft_tissue(smooth_noise(shape, 8, rng), _axes(shape, patient), poses, patient.scale, rng)
    label_map, fracture_map = np.zeros(shape, np.uint8), np.zeros(shape, np.uint8)
    texture = 75 * smooth_noise(shape, 3, rng)
    grids = {level: _local(level, *poses[level], shape, patient) for level in LEVELS}
    grids[SKULL] = _local(SKULL, *poses["C1"], shape, patient)
    for level in (SKULL, *LEVELS):
        _fill_between(level, *grids[level], tissue, patient)
    above_mm = np.full(shape, 20, np.float32)  # distance to the bones drawn so far
    for level in (SKULL, *LEVELS):
        broken = draw_fractures(level, rng) if fractured.get(level) else []
        if hard and found.is_hairline:
            broken = hairline(broken, hard, other)
        block, grid = grids[level]
        free = label_map[block] == 0  # where vertebrae touch, the upper one keeps the voxel
        arguments = (tissue[block], texture[block], free, above_mm[block], patient, rng)
        inside, truth = _render_vertebra(level, broken, grid, *arguments)
        truth = blurred(truth, inside) if found.is_hairline else truth
        if level in VERTEBRAE:
            number = VERTEBRAE.index(level) + 1
            label_map[block][inside & free] = number
            fracture_map[block][truth & free] = number
    # 3. What is in the way, and the scanner.
    maps = (tissue, label_map, fracture_map)
    if hard and found.metal:
        add_metal(tissue, _axes(shape, patient), poses, patient.scale, found, hard, other)
    if hard and found.is_moving:
        maps = move(maps, patient.spacing_mm, hard, other)
    if found.thick > 1:
        maps = thicken(maps, found.thick)
        z, y, x = patient.spacing_mm
        patient = replace(patient, spacing_mm=(z * found.thick, y, x))
    tissue, label_map, fracture_map = maps
    volume = _scan(tissue, patient, rng)
    uid = study_uid(seed, index)
    return Study(uid, volume, label_map, fracture_map, patient.spacing_mm, patient.window_hu, dict(fractured))


def _draw_patient(rng: np.random.Generator) -> _Patient:
    level, width = rng.normal(400, 60), rng.normal(1800, 150)
    pixel = rng.uniform(0.68, 0.85)
    return _Patient(
        scale=float(np.clip(rng.normal(1.0, 0.07), 0.85, 1.18)),
        density=float(np.clip(rng.normal(1.0, 0.15), 0.6, 1.4)),
        lordosis=np.deg2rad(rng.normal(22, 10)),
        tilt=np.deg2rad(rng.normal(20, 6)),
        yaw=np.deg2rad(rng.normal(0, 6)),
        roll=np.deg2rad(rng.normal(0, 3)),
        disc_mm=float(np.clip(rng.normal(4.8, 0.8), 2.5, 6.5)),
        noise_hu=rng.uniform(18, 50),
        blur_mm=rng.uniform(0.25, 0.6),
        spacing_mm=(float(rng.choice([1.0, 1.0, 1.25])), float(pixel), float(pixel)),
        window_hu=(float(level - width / 2), float(level + width / 2)),
    )


def _poses(patient: _Patient, rng: np.random.Generator) -> dict[str, tuple[Array, Array]]:
    """By level: middle (z, y, x in mm from the field's middle) and rotation (patient axes x, y, z to own)."""
    order = ["T1", "C7", "C6", "C5", "C4", "C3", "C2", "C1"]  # from the trunk up
    pitch = patient.tilt - patient.lordosis * np.linspace(0, 1, 6)
    angles = dict(zip(order, (patient.tilt + 0.12, *pitch, pitch[-1] + rng.normal(0, 0.06)), strict=True))
    # Most of a neck's turn is between C1 and C2, the rest is shared: spinous processes stay behind bodies.
    yaw = patient.yaw * np.array([1.0, *np.linspace(0.4, 0.0, len(LEVELS) - 1)])
    yaw += np.deg2rad(rng.normal(0, 0.75, len(LEVELS)))
    roll = patient.roll + np.deg2rad(rng.normal(0, 1.0, len(LEVELS)))
    rotations = {its: _rotation(angles[its], yaw[i], roll[i]) for i, its in enumerate(LEVELS)}
    tilts = {level: its[2, 0] for level, its in rotations.items()}  # of its axis, to the side
    point = np.zeros(3)
    middles = {"T1": point}
    for below, above in itertools.pairwise(order):
        step = 18.0
        if above != "C1":
            step = DIMENSIONS[below].body[2] + DIMENSIONS[above].body[2] + patient.disc_mm
        ends = (below, below) if "T1" in (below, above) or above == "C1" else (below, above)
        lean, side = (np.mean([its[end] for end in ends]) for its in (angles, tilts))
        point = point - step * np.array([np.cos(lean), np.sin(lean), side])
        middles[above] = point
    spine = np.array(list(middles.values()))
    middle = (spine.max(axis=0) + spine.min(axis=0)) / 2
    middle += np.array([_BELOW_MM - _ABOVE_MM, _BACK_MM - _FRONT_MM, 0.0]) / 2
    return {level: ((middles[level] - middle) * patient.scale, rotations[level]) for level in LEVELS}


def _rotation(pitch: float, yaw: float, roll: float) -> Array:
    """Rotation that takes patient axes (x, y, z) into a vertebra's own."""
    cp, sp, cy, sy, cr, sr = (
        np.cos(pitch),
        np.sin(pitch),
        np.cos(yaw),
        np.sin(yaw),
        np.cos(roll),
        np.sin(roll),
    )
    about_x = np.array([[1, 0, 0], [0, cp, -sp], [0, sp, cp]])
    about_z = np.array([[cy, sy, 0], [-sy, cy, 0], [0, 0, 1]])
    about_y = np.array([[cr, 0, -sr], [0, 1, 0], [sr, 0, cr]])
    return about_x @ about_z @ about_y


def _shape(poses: dict[str, tuple[Array, Array]], patient: _Patient) -> tuple[int, ...]:
    """Voxels of the field of view along z, y and x."""
    height, depth, _ = np.ptp(np.array([middle for middle, _ in poses.values()]), axis=0)
    height += (_ABOVE_MM + _BELOW_MM) * patient.scale
    depth += (_FRONT_MM + _BACK_MM) * patient.scale
    field = (height, depth, _WIDTH_MM * patient.scale)
    return tuple(round(f / s) for f, s in zip(field, patient.spacing_mm, strict=True))


def _axes(shape: tuple[int, ...], patient: _Patient) -> list[Array]:
    """Voxel positions in mm from the field's middle, along z, y and x."""
    return [
        ((np.arange(n) - (n - 1) / 2) * s).astype(np.float32)
        for n, s in zip(shape, patient.spacing_mm, strict=True)
    ]


def smooth_noise(shape: tuple[int, ...], step: int, rng: np.random.Generator) -> Array:
    """Standard normal values every `step` voxels, linear between: two taps an axis, the same anywhere."""
    noise = rng.standard_normal([(n - 1) // step + 2 for n in shape], dtype=np.float32)
    for axis, n in enumerate(shape):
        left, rest = np.divmod(np.arange(n), step)
        share = (rest / step).astype(np.float32).reshape([-1 if i == axis else 1 for i in range(3)])
        noise = noise.take(left, axis) * (1 - share) + noise.take(left + 1, axis) * share
    return noise


def _local(
    level: str, centre: Array, rotation: Array, shape: tuple[int, ...], patient: _Patient
) -> tuple[tuple[slice, ...], LocalGrid]:
    """The block of the volume that a vertebra can reach, and its grid in its own frame and scale."""
    low, high = bounds(level)
    middle, half = np.add(low, high) / 2, np.subtract(high, low) / 2
    middle, half = (rotation.T @ middle)[::-1], (np.abs(rotation.T) @ half)[::-1]  # in z, y, x now
    axes = _axes(shape, patient)
    block = tuple(
        slice(*np.searchsorted(axis, (c + patient.scale * (m - r), c + patient.scale * (m + r))))
        for axis, c, m, r in zip(axes, centre, middle, half, strict=True)
    )
    size = tuple(b.stop - b.start for b in block)
    origin = np.array([axis[b.start] - c for axis, b, c in zip(axes, block, centre, strict=True)])
    spacing = np.array(patient.spacing_mm)
    return block, LocalGrid(origin / patient.scale, size, spacing / patient.scale, rotation)


def _fill_between(
    level: str, block: tuple[slice, ...], grid: LocalGrid, tissue: Array, patient: _Patient
) -> None:
    """Disc above a body, and the canal with its cord behind it, in place; in the skull, brain."""
    if level == SKULL:
        _put(_BRAIN_HU, *BRAINCASE, block, grid, tissue)
        return
    d = DIMENSIONS["C2" if level == "C1" else level]
    a, b, h = d.body
    canal_y = 14.5 if level == "C1" else d.canal_y
    half = h + patient.disc_mm + 4
    up = 30.0 if level == "C1" else half  # through the foramen magnum
    for (rx, ry), hu in ((d.canal, _CSF_HU), ((6.5, 4.0), _CORD_HU)):
        _put(hu, (0.0, canal_y, 0.0), (rx, ry, np.inf), block, grid, tissue, between=(-up, half))
    if level not in ("C1", "C2"):
        ends = (-h - patient.disc_mm - 3, 0.0)
        _put(_DISC_HU, (0.0, 0.0, 0.0), (0.95 * a, 0.95 * b, np.inf), block, grid, tissue, between=ends)


def _put(
    hu: float,
    centre: Point,
    radii: Point,
    block: tuple[slice, ...],
    grid: LocalGrid,
    tissue: Array,
    *,
    between: tuple[float, float] = (-100.0, 100.0),
) -> None:
    """Fill an ellipsoid, or an upright elliptic cylinder whose height's radius is infinite, in place."""
    low, high = np.subtract(centre, radii), np.add(centre, radii)
    low[2], high[2] = max(low[2], between[0]), min(high[2], between[1])
    window = grid.window(tuple(low), tuple(high), pad=0.0)
    x, y, z = grid.x[window], grid.y[window], grid.z[window]
    away = sum(
        ((p - np.float32(c)) * np.float32(1 / r)) ** 2
        for p, c, r in zip((x, y, z), centre, radii, strict=True)
        if r < np.inf
    )
    tissue[block][window][(away < 1) & (z > low[2]) & (z < high[2])] = hu


def _render_vertebra(
    level: str,
    broken: list[Fracture],
    grid: LocalGrid,
    tissue: Array,
    texture: Array,
    free: Array,
    above_mm: Array,
    patient: _Patient,
    rng: np.random.Generator,
) -> tuple[Array, Array]:
    """Draw one bone over its block of the tissue, in place; return its voxels and its fracture voxels."""
    mimics = [] if level == SKULL else draw_mimics(level, rng)
    distance = vertebra_distance(level, displace(broken, level, grid))
    np.maximum(distance, (_JOINT_MM - above_mm) / np.float32(patient.scale), out=distance)
    in_body = grid.y < (DIMENSIONS[level].body[1] + 1.5 if level in DIMENSIONS else -np.inf)
    marrow = np.where(in_body, np.float32(235), np.float32(390)) * patient.density + texture
    shell = np.where(in_body, np.float32(1.1), np.float32(1.5)) * np.float32(patient.cortex)
    cortex = np.clip((distance + 1.5 * shell) / shell, 0, 1)
    hu = marrow + cortex * (np.float32(830 * (0.4 + 0.6 * patient.density)) - marrow)
    add_mimics(mimics, grid, distance, hu)
    truth = break_bone(broken, level, grid, distance, hu)
    voxel_mm = np.mean(patient.spacing_mm[:2]) / patient.scale
    share = np.clip(0.5 - distance / np.float32(voxel_mm), 0, 1)
    tissue += share * free * (hu - tissue)
    np.minimum(above_mm, distance * np.float32(patient.scale), out=above_mm)
    return distance < 0, truth


def _scan(tissue: Array, patient: _Patient, rng: np.random.Generator) -> Array:
    """Reconstruction kernel and noise; across the shoulders noise grows and streaks from side to side."""
    sigma = [0.25 / patient.spacing_mm[0]] + [patient.blur_mm / s for s in patient.spacing_mm[1:]]
    shoulders = np.clip(np.linspace(-1.2, 1.0, tissue.shape[0], dtype=np.float32), 0, 1)[:, None, None]
    noise = rng.standard_normal(tissue.shape, dtype=np.float32)
    noise *= np.float32(patient.noise_hu / np.prod([_noise_left(its) for its in sigma])) * (1 + shoulders)
    noise += tissue  # one filter for both: it is a third of all the time
    volume = ndimage.gaussian_filter(noise, sigma, truncate=_KERNEL_REACH)
    streak = rng.standard_normal(tissue.shape[:2], dtype=np.float32)[:, :, None]
    volume += streak * shoulders * np.float32(0.7 * patient.noise_hu)
    return np.clip(volume, -1024, 3071, out=volume)


def _noise_left(sigma: float) -> float:
    """Standard deviation of white noise of 1 after a Gaussian filter along one axis."""
    impulse = np.zeros(2 * int(_KERNEL_REACH * sigma + 0.5) + 1)
    impulse[impulse.size // 2] = 1
    return float(
        np.linalg.norm(ndimage.gaussian_filter1d(impulse, sigma, mode="constant", truncate=_KERNEL_REACH))
    )
