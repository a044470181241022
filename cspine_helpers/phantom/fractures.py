"""Fractures of a phantom vertebra, and what only looks like them.

Fractures are cracks through cortex and marrow, with or without a displaced fragment, and compressed bodies,
at the sites where each level breaks. Look-alikes (vascular channels, osteophytes, sclerotic endplates, old
smooth ossicles) are in intact vertebrae as often as in fractured ones: neither brightness nor a dark line
gives the answer away.
"""

from dataclasses import dataclass

import numpy as np

from cspine_helpers.phantom.anatomy import DIMENSIONS, Array, LocalGrid, Point

BLOOD_HU = 60.0


@dataclass(frozen=True)
class Crack:
    """A wavy plane of bleeding through bone; one side of it may have moved.

    Attributes:
        point, normal: where it passes and its unit normal (x, y, z), in the vertebra's frame.
        reach_mm: radius around `point` within which bone is fractured.
        gap_mm: width of the dark line.
        shift_mm: how far the bone on the normal's side has moved (x, y, z).
        phase: phase of the plane's waves.
    """

    point: Point
    normal: Point
    reach_mm: float
    gap_mm: float
    shift_mm: Point = (0.0, 0.0, 0.0)
    phase: float = 0.0

    def side(self, x: Array, y: Array, z: Array) -> tuple[Array, Array]:
        """Signed distance to the wavy plane, and squared distance to the point over the squared reach."""
        px, py, pz = (c - np.float32(p) for c, p in zip((x, y, z), self.point, strict=True))
        nx, ny, nz = np.asarray(self.normal, np.float32)
        wave = np.float32(0.5) * np.sin(np.float32(0.7) * (px + py + pz) + np.float32(self.phase))
        return nx * px + ny * py + nz * pz + wave, (px * px + py * py + pz * pz) / np.float32(
            self.reach_mm**2
        )

    def bounds(self) -> tuple[Point, Point]:
        """Corners of the box that the crack can reach."""
        low, high = (tuple(np.add(self.point, sign * self.reach_mm)) for sign in (-1, 1))
        return low, high


@dataclass(frozen=True)
class Compression:
    """A body that lost height in front, its upper endplate pressed in.

    Attributes:
        loss_mm: height lost at the front edge; none is lost at the back.
    """

    loss_mm: float


Fracture = Crack | Compression


@dataclass(frozen=True)
class Mimic:
    """A harmless finding: `kind` is channel, osteophyte, sclerosis or ossicle; a rod from start to end."""

    kind: str
    start: Point
    end: Point
    radius_mm: float


def sites(level: str) -> dict[str, tuple[Point, Point, float]]:
    """Where a level breaks: name to (point, plane normal, reach in mm), for the patient's left side.

    Source: the sites named in the AO Spine upper cervical and subaxial injury classifications.
    """
    if level == "C1":
        return {
            "anterior arch": ((9.0, -9.5, 0.0), (0.9, 0.4, 0.0), 8.0),
            "posterior arch": ((12.0, 21.5, 0.0), (0.6, -0.8, 0.1), 8.0),
            "lateral mass": ((17.0, 1.0, 0.0), (1.0, 0.1, 0.0), 12.0),
        }
    d = DIMENSIONS[level]
    a, b, h = d.body
    found = {
        "pedicle": ((a + 3.0, b + 1.0, -1.0), (0.4, 0.9, 0.1), 8.0),
        "lamina": ((d.pillar_x * 0.6, (d.canal_y + d.arch_y) / 2 + 3.0, 2.0), (0.7, -0.7, 0.1), 8.0),
        "pillar": ((d.pillar_x, d.canal_y - 1.0, 0.5), (0.2, 0.5, 0.85), 9.0),
        "transverse process": ((a + 5.0, 2.5, 0.5), (0.95, 0.2, 0.1), 8.0),
        "spinous process": ((0.0, d.arch_y + 0.45 * d.spinous[0], 3.0), (0.1, 0.9, 0.4), 9.0),
        "body": ((0.15 * a, 0.0, 0.0), (0.95, 0.25, 0.1), 15.0),
    }
    if level == "C2":
        found["dens"] = ((0.0, 0.0, -h - 1.0), (0.0, 0.2, 0.98), 10.0)
    else:
        found["teardrop"] = ((0.0, -0.55 * b, 0.5 * h), (0.0, -0.75, 0.66), 11.0)
    return found


def draw_fractures(level: str, rng: np.random.Generator) -> list[Fracture]:
    """One fracture, or two or three at once as they occur together, of graded visibility."""
    places = sites(level)
    names = list(places)
    weights = np.ones(len(names))
    if level in ("C6", "C7"):
        weights[names.index("spinous process")] = 2.0
    if level == "C2":
        weights[names.index("dens")] = 4.0
    grade = float(rng.beta(1.8, 1.4))  # 0 hair-fine, 1 gross
    if level not in ("C1", "C2") and rng.random() < 0.3:
        return [Compression(loss_mm=1.6 + 3.4 * grade)]
    count = int(rng.choice([1, 2, 3], p=[0.4, 0.4, 0.2]))
    chosen = rng.choice(len(names), size=min(count, len(names)), replace=False, p=weights / weights.sum())
    return [_draw_crack(*places[names[i]], grade, rng) for i in chosen]


def _draw_crack(point: Point, normal: Point, reach: float, grade: float, rng: np.random.Generator) -> Crack:
    mirror = np.array([rng.choice([-1.0, 1.0]), 1.0, 1.0])
    plane = np.array(normal) * mirror + rng.normal(0, 0.18, 3)
    shift = rng.normal(0, 1, 3) + 0.8 * plane
    moved = grade * 3.0 * rng.uniform(0.4, 1.0) if rng.random() < 0.75 else 0.0
    return Crack(
        point=tuple(np.array(point) * mirror + rng.normal(0, 0.8, 3)),
        normal=tuple(plane / np.linalg.norm(plane)),
        reach_mm=reach * rng.uniform(1.0, 1.3),
        gap_mm=0.7 + 1.6 * grade,
        shift_mm=tuple(shift / np.linalg.norm(shift) * moved),
        phase=float(rng.uniform(0, 6.28)),
    )


def draw_mimics(level: str, rng: np.random.Generator) -> list[Mimic]:
    """Harmless findings of one vertebra, drawn whether it is fractured or not."""
    found: list[Mimic] = []
    if level == "C1":
        if rng.random() < 0.35:  # nutrient channel of the lateral mass
            s = float(rng.choice([-1.0, 1.0]))
            found.append(
                Mimic("channel", (15.0 * s, -3.0, 1.0), (19.0 * s, 4.0, -1.0), rng.uniform(0.5, 0.9))
            )
        return found
    d = DIMENSIONS[level]
    a, b, h = d.body
    if rng.random() < 0.5:  # basivertebral vein, from the back wall to the middle
        found.append(
            Mimic(
                "channel", (0.0, b, 0.0), (rng.normal(0, 2), rng.uniform(-3, 2), 0.5), rng.uniform(0.6, 1.1)
            )
        )
    if rng.random() < 0.35:  # a nutrient channel somewhere in the marrow, not through the cortex
        start = rng.uniform(-0.6, 0.6, 3) * np.array(d.body)
        end = np.clip(start + rng.normal(0, 5, 3), -0.65 * np.array(d.body), 0.65 * np.array(d.body))
        found.append(Mimic("channel", tuple(start), tuple(end), rng.uniform(0.5, 0.9)))
    if rng.random() < 0.4:
        edge = float(rng.choice([-1.0, 1.0])) * (h - 0.5)
        x = rng.uniform(-0.6, 0.6) * a
        found.append(
            Mimic("osteophyte", (x, -b, edge), (x * 1.1, -b - rng.uniform(1, 3), edge), rng.uniform(1.2, 2.2))
        )
    if rng.random() < 0.3:
        edge = float(rng.choice([-1.0, 1.0])) * (h - 1.0)
        half = rng.uniform(0.3, 0.7) * a
        found.append(
            Mimic("sclerosis", (-half, -0.2 * b, edge), (half, -0.2 * b, edge), rng.uniform(2.0, 3.5))
        )
    if rng.random() < 0.2:
        tip = (rng.normal(0, 2), d.arch_y + d.spinous[0] + 3.0, 4.0 + d.spinous[1])
        found.append(Mimic("ossicle", tip, tuple(np.add(tip, (1.0, 0.5, 1.0))), rng.uniform(1.3, 2.3)))
    return found


def displace(fractures: list[Fracture], level: str, grid: LocalGrid) -> LocalGrid:
    """A bent copy of the grid: shapes evaluated on it come out with moved fragments and lost height."""
    if not fractures:
        return grid
    grid = grid.copy()
    for fracture in fractures:
        if isinstance(fracture, Crack):
            if any(fracture.shift_mm):
                window = grid.window(*fracture.bounds(), pad=0.0)
                x, y, z = grid.x[window], grid.y[window], grid.z[window]
                side, far = fracture.side(x, y, z)
                weight = np.clip(1.5 * (1 - far), 0, 1) * (side > 0)
                for axis, shift in zip((x, y, z), fracture.shift_mm, strict=True):
                    axis -= weight * np.float32(shift)
        else:
            a, b, h = DIMENSIONS[level].body
            window = grid.window((-a, -b, -h), (a, b, h))
            x, y, z = grid.x[window], grid.y[window], grid.z[window]
            loss = _height_loss(fracture, level, x, y)
            z -= np.where(z < h, (h - z) * loss / (2 * h - loss), 0).astype(np.float32)
    return grid


def _height_loss(fracture: Compression, level: str, x: Array, y: Array) -> Array:
    a, b, _ = DIMENSIONS[level].body
    front = np.clip((np.float32(b) - y) / np.float32(2 * b), 0, 1)
    within = np.clip((np.float32(a + 3) - np.abs(x)) / 3, 0, 1) * np.clip((y + np.float32(b + 5)) / 3, 0, 1)
    return np.float32(fracture.loss_mm) * front * within


def add_mimics(mimics: list[Mimic], grid: LocalGrid, distance: Array, hu: Array) -> None:
    """Put harmless findings into a vertebra in place: bone into `distance`, changed marrow into `hu`."""
    for mimic in mimics:
        low, high = np.minimum(mimic.start, mimic.end), np.maximum(mimic.start, mimic.end)
        window = grid.window(tuple(low - mimic.radius_mm), tuple(high + mimic.radius_mm), pad=1.5)
        start = np.asarray(mimic.start, np.float32)
        along = np.asarray(mimic.end, np.float32) - start
        px, py, pz = (c[window] - s for c, s in zip((grid.x, grid.y, grid.z), start, strict=True))
        t = np.clip((px * along[0] + py * along[1] + pz * along[2]) / max(float(along @ along), 1e-6), 0, 1)
        rod = np.sqrt((px - t * along[0]) ** 2 + (py - t * along[1]) ** 2 + (pz - t * along[2]) ** 2)
        rod -= np.float32(mimic.radius_mm)
        if mimic.kind in ("osteophyte", "ossicle"):
            np.minimum(distance[window], rod, out=distance[window])
        elif mimic.kind == "sclerosis":
            hu[window] += np.float32(380) * np.clip(-rod / np.float32(mimic.radius_mm), 0, 1)
        else:  # a channel: dark, with a thin cortical wall
            inside = np.clip(0.5 - rod, 0, 1)
            wall = np.clip(1 - np.abs(rod - 0.6), 0, 1) * (1 - inside)
            hu[window] += inside * (np.float32(30) - hu[window]) + np.float32(180) * wall


def break_bone(fractures: list[Fracture], level: str, grid: LocalGrid, distance: Array, hu: Array) -> Array:
    """Bleed into cracks and condense compressed bone, in place in `hu`; `grid` is the straight one.

    Returns:
        bool array of the grid's shape: the voxels that are fracture.
    """
    truth = np.zeros(distance.shape, dtype=bool)
    for fracture in fractures:
        if isinstance(fracture, Crack):
            window = grid.window(*fracture.bounds(), pad=0.0)
            side, far = fracture.side(grid.x[window], grid.y[window], grid.z[window])
            crack = np.clip(0.5 + np.float32(fracture.gap_mm / 2) - np.abs(side), 0, 1) * np.clip(
                6 * (1 - far), 0, 1
            )
            hu[window] += crack * (np.float32(BLOOD_HU) - hu[window])
            truth[window] |= (crack > 0.4) & (distance[window] < 0)
        else:
            a, b, h = DIMENSIONS[level].body
            window = grid.window((-a, -b, -h), (a, b, h), pad=3.0)
            x, y, z = grid.x[window], grid.y[window], grid.z[window]
            loss = _height_loss(fracture, level, x, y)
            depth = z - (np.float32(-h) + loss)  # below the pressed-in endplate
            band = np.clip(1 - np.abs(depth - 2.0) / 2.5, 0, 1) * np.clip(loss / 1.5, 0, 1)
            hu[window] += band * np.float32(120 + 90 * fracture.loss_mm)
            truth[window] |= (band > 0.3) & (distance[window] < 0) & (loss > 0.8)
    return truth
