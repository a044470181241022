"""The shapes of C1–C7, T1 and the skull base as signed distances in mm: what the phantom is cut from.

Every vertebra has a frame of its own: x to the patient's left, y to the back, z to the feet, the origin in
the middle of the body (of the dens for C1 and for the skull base above it). A signed distance is negative
inside bone. Dimensions are those of an average adult; the phantom scales them by patient.

Joints have no shape of their own: a bone's upper articular surfaces reach too far up, and the phantom takes
away what is nearer than the joint space to the bone above. So the two surfaces of a joint fit each other.

Source: body, canal, process and dens dimensions rounded from published cervical morphometry (Panjabi et
al., Spine 16(8), 1991, for C2–C7; Doherty and Heggeness, Spine 19(22), 1994, for the atlas).
"""

import copy
from dataclasses import dataclass

import numpy as np

Array = np.ndarray
Window = tuple[slice, slice, slice]
Point = tuple[float, float, float]
_BLEND_MM = 1.5  # radius by which neighbouring parts flow into each other
SKULL = "C0"  # the skull base, in the frame of C1
BRAINCASE: tuple[Point, Point] = ((0.0, 18.0, -62.0), (62.0, 80.0, 46.0))  # middle and radii
_FACET = 0.5**0.5  # sine and cosine of a facet's slope, 45°
_FACET_MM = 5.2  # from a pillar's middle to its lower facet


@dataclass(frozen=True)
class Dimensions:
    """Half widths (x), half depths (y) and half heights (z) of one vertebra's parts, in mm."""

    body: Point
    canal: tuple[float, float]  # half width, half depth
    pillar_x: float  # middle of the articular pillar
    transverse_x: float  # tip of the transverse process
    foramen: float  # radius of the foramen transversarium
    lamina: tuple[float, float]  # half thickness, half height
    spinous: tuple[float, float, float]  # length, drop towards the feet, radius
    bifid: bool

    @property
    def canal_y(self) -> float:
        """Middle of the spinal canal behind the body's middle."""
        return self.body[1] + self.canal[1] + 0.5

    @property
    def arch_y(self) -> float:
        """Where the laminae meet and the spinous process begins."""
        return self.canal_y + self.canal[1] + 2.0


DIMENSIONS = {
    "C2": Dimensions((9.0, 7.6, 8.0), (11.5, 8.4), 16.5, 26.0, 2.7, (2.7, 7.4), (14.0, 5.0, 3.4), True),
    "C3": Dimensions((9.4, 7.5, 6.4), (11.5, 7.4), 18.0, 26.5, 2.8, (1.9, 5.2), (10.0, 4.0, 2.3), True),
    "C4": Dimensions((9.7, 7.7, 6.2), (11.7, 7.2), 18.6, 27.0, 2.9, (1.8, 5.2), (11.0, 5.0, 2.3), True),
    "C5": Dimensions((10.1, 7.9, 6.1), (12.0, 7.3), 19.0, 28.0, 3.0, (1.9, 5.2), (12.5, 6.0, 2.4), True),
    "C6": Dimensions((10.8, 8.2, 6.3), (12.4, 7.4), 19.6, 29.5, 2.9, (2.0, 5.6), (18.0, 8.0, 2.7), True),
    "C7": Dimensions((12.2, 8.5, 7.2), (12.0, 7.4), 19.0, 35.0, 1.6, (2.3, 6.6), (27.0, 10.0, 3.2), False),
    "T1": Dimensions((14.0, 8.8, 8.0), (10.5, 7.3), 18.0, 36.0, 0.0, (2.5, 7.6), (28.0, 16.0, 3.2), False),
}


class LocalGrid:
    """Voxel positions of a block of the volume in one vertebra's frame.

    Attributes:
        x, y, z: float32 positions in mm, each of the block's shape (Z, Y, X).
    """

    def __init__(self, origin_mm: Array, shape: tuple[int, int, int], spacing_mm: Array, rotation: Array):
        """Lay the grid: `origin_mm` (z, y, x) is its first voxel relative to the vertebra's origin."""
        axes = [
            (o + s * np.arange(n)).astype(np.float32)
            for o, s, n in zip(origin_mm, spacing_mm, shape, strict=True)
        ]
        zs, ys, xs = axes[0][:, None, None], axes[1][None, :, None], axes[2][None, None, :]
        self.x, self.y, self.z = (
            row[0] * xs + row[1] * ys + row[2] * zs for row in np.asarray(rotation, np.float32)
        )
        self._axes, self._rotation = axes, rotation

    def copy(self) -> "LocalGrid":
        """The same grid with positions of its own, free to be bent."""
        twin = copy.copy(self)
        twin.x, twin.y, twin.z = self.x.copy(), self.y.copy(), self.z.copy()
        return twin

    def window(self, low: Point, high: Point, *, pad: float = 6.0) -> Window:
        """The index ranges that hold the local box from `low` to `high` (x, y, z), and `pad` mm around it."""
        middle, half = (np.add(low, high)) / 2, (np.subtract(high, low)) / 2 + pad
        centre, reach = self._rotation.T @ middle, np.abs(self._rotation.T) @ half
        ranges = [
            slice(int(np.searchsorted(axis, c - r)), int(np.searchsorted(axis, c + r)))
            for axis, c, r in zip(self._axes, centre[::-1], reach[::-1], strict=True)
        ]
        return ranges[0], ranges[1], ranges[2]


def bounds(level: str) -> tuple[Point, Point]:
    """Opposite corners (x, y, z, mm) of a box that holds a vertebra, its osteophytes and moved fragments."""
    if level == SKULL:
        return (-56.0, -44.0, -34.0), (56.0, 66.0, 16.0)
    if level == "C1":
        return (-44.0, -20.0, -14.0), (44.0, 39.0, 14.0)
    d = DIMENSIONS[level]
    _, b, h = d.body
    above = 24.0 if level == "C2" else 12.0  # the dens, upper facets
    length, drop, _ = d.spinous
    reach = d.transverse_x + 5.0
    return (-reach, -b - 7.0, -h - above), (reach, d.arch_y + length + 9.0, h + max(drop, 5.0) + 7.0)


def vertebra_distance(level: str, grid: LocalGrid) -> Array:
    """Signed distance (mm) to the surface of one vertebra or the skull base, float32 of its grid's shape.

    True to a tenth of a millimetre near the surface; farther than 6 mm outside it only says "far".
    """
    solid = _Solid(grid)
    if level == SKULL:
        _skull(solid)
    elif level == "C1":
        _atlas(solid)
    else:
        _typical(level, solid)
    return solid.distance


class _Solid:
    """A union of parts, each evaluated only in the window it can reach."""

    def __init__(self, grid: LocalGrid):
        self.grid = grid
        self.distance = np.full(grid.x.shape, 20.0, dtype=np.float32)

    def _at(self, low: Point, high: Point) -> tuple[Window, Array, Array, Array]:
        window = self.grid.window(low, high)
        return window, self.grid.x[window], self.grid.y[window], self.grid.z[window]

    def _add(self, window: Window, part: Array) -> None:
        whole = self.distance[window]
        blend = np.maximum(_BLEND_MM - np.abs(whole - part), 0.0)
        np.minimum(whole, part, out=whole)
        whole -= blend * blend / np.float32(4 * _BLEND_MM)

    def capsule(self, a: Point, b: Point, radius: float, *, tall: float = 1.0) -> None:
        """A rod from `a` to `b`; `tall` > 1 makes it a plate, that much taller than thick."""
        low = tuple(min(p, q) - radius * tall for p, q in zip(a, b, strict=True))
        high = tuple(max(p, q) + radius * tall for p, q in zip(a, b, strict=True))
        window, x, y, z = self._at(low, high)  # type: ignore[arg-type]
        ab = np.asarray((b[0] - a[0], b[1] - a[1], (b[2] - a[2]) / tall), np.float32)
        px, py, pz = x - np.float32(a[0]), y - np.float32(a[1]), (z - np.float32(a[2])) / np.float32(tall)
        along = np.clip((px * ab[0] + py * ab[1] + pz * ab[2]) / (ab @ ab), 0.0, 1.0)
        px -= along * ab[0]
        py -= along * ab[1]
        pz -= along * ab[2]
        self._add(window, np.sqrt(px * px + py * py + pz * pz) - np.float32(radius))

    def ellipsoid(self, centre: Point, radii: Point) -> None:
        """A rounded mass."""
        low, high = np.subtract(centre, radii), np.add(centre, radii)
        window, x, y, z = self._at(tuple(low), tuple(high))
        self._add(window, _ellipsoid(x, y, z, centre, radii))

    def arch(self, centre_y: float, rx: float, ry: float, radius: float, *, tall: float) -> None:
        """Half of an elliptic ring around (0, `centre_y`): behind it, or in front of it where `ry` < 0."""
        side, ry = (1.0 if ry > 0 else -1.0), abs(ry)
        far = centre_y + side * (ry + radius)
        low, high = min(centre_y, far), max(centre_y, far)
        window, x, y, z = self._at((-rx - radius, low, -radius * tall), (rx + radius, high, radius * tall))
        y = y - np.float32(centre_y)
        tube = np.hypot(_ellipse(x, y, rx, ry), z / np.float32(tall)) - np.float32(radius)
        self._add(window, np.maximum(tube, -np.float32(side) * y))

    def shell(self, centre: Point, radii: Point, half_mm: float, low: Point, high: Point) -> None:
        """The part of a hollow ellipsoid that lies in the box from `low` to `high`."""
        window, x, y, z = self._at(low, high)
        self._add(window, np.abs(_ellipsoid(x, y, z, centre, radii)) - np.float32(half_mm))

    def pillar(self, centre: Point, rx: float, ry: float, *, above_mm: float) -> None:
        """An articular pillar: an upright elliptic column between two facets that slope down to the back."""
        up, down = above_mm / _FACET + ry, _FACET_MM / _FACET + ry
        cx, cy, cz = centre
        window, x, y, z = self._at((cx - rx, cy - ry, cz - up), (cx + rx, cy + ry, cz + down))
        x, y, z = (p - np.float32(c) for p, c in zip((x, y, z), centre, strict=True))
        rounding = 1.2
        beyond = (z - y) * _FACET
        ends = np.maximum(
            beyond - np.float32(_FACET_MM - rounding), -np.float32(above_mm - rounding) - beyond
        )
        self._add(window, _rounded(_ellipse(x, y, rx - rounding, ry - rounding), ends, rounding))

    def cut(self, low: Point, high: Point, point: Point, normal: Point) -> None:
        """Take away, in the box from `low` to `high`, what lies beyond a plane."""
        window, x, y, z = self._at(low, high)
        nx, ny, nz = np.asarray(normal, np.float32) / np.float32(np.linalg.norm(normal))
        beyond = nx * x + ny * y + nz * z - np.float32(np.dot((nx, ny, nz), point))
        np.maximum(self.distance[window], beyond, out=self.distance[window])

    def drill(self, x0: float, y0: float, rx: float, ry: float, half_height: float) -> None:
        """Take away an upright elliptic hole (canal, foramen)."""
        window, x, y, _ = self._at((x0 - rx, y0 - ry, -half_height), (x0 + rx, y0 + ry, half_height))
        hole = _ellipse(x - np.float32(x0), y - np.float32(y0), rx, ry)
        whole = self.distance[window]
        np.maximum(whole, -hole, out=whole)

    def body(self, half: Point, *, uncinate_mm: float) -> None:
        """A body: kidney-shaped, waisted, with raised uncinate edges above and a front lip below."""
        a, b, h = half
        window, x, y, z = self._at((-a, -b, -h - uncinate_mm), (a, b, h + 2))
        waist = np.float32(1.0) - np.float32(0.07) * (1 - np.clip(z / np.float32(h), -1, 1) ** 2)
        side = _ellipse(x / waist, y / waist, a - 1.2, b - 1.2)
        edge = np.clip((np.abs(x) / np.float32(a) - 0.55) / 0.4, 0, 1)
        top = -np.float32(h - 2.0) - np.float32(uncinate_mm) * edge * edge
        bottom = np.float32(h - 2.0) - np.float32(0.12) * y
        ends = np.maximum(top - z, z - bottom)
        self._add(window, _rounded(side, ends, 1.2))


def _rounded(side: Array, ends: Array, rounding_mm: float) -> Array:
    """Distance to a column from those to its side and to its ends, each `rounding_mm` inside the surface."""
    outside = np.hypot(np.maximum(side, 0), np.maximum(ends, 0))
    return outside + np.minimum(np.maximum(side, ends), 0) - np.float32(rounding_mm)


def _ellipse(x: Array, y: Array, rx: float, ry: float) -> Array:
    """Distance to an upright elliptic cylinder, exact to first order at the surface."""
    u, v = x / np.float32(rx), y / np.float32(ry)
    k = np.sqrt(u * u + v * v) + np.float32(1e-6)
    slope = np.sqrt((u / np.float32(rx)) ** 2 + (v / np.float32(ry)) ** 2) + np.float32(1e-6 / max(rx, ry))
    return k * (k - 1) / slope


def _ellipsoid(x: Array, y: Array, z: Array, centre: Point, radii: Point) -> Array:
    u, v, w = ((p - np.float32(c)) / np.float32(r) for p, c, r in zip((x, y, z), centre, radii, strict=True))
    k = np.sqrt(u * u + v * v + w * w) + np.float32(1e-6)
    rx, ry, rz = np.asarray(radii, np.float32)
    slope = np.sqrt((u / rx) ** 2 + (v / ry) ** 2 + (w / rz) ** 2) + np.float32(1e-6) / max(rx, ry, rz)
    return k * (k - 1) / slope


def _skull(solid: _Solid) -> None:
    """The floor of the skull around the foramen magnum, with clivus, condyles, petrous bones and mastoids.

    The angles of the jaw are part of it: they are in front of C1 and C2, and hang on the skull.
    """
    solid.shell(*BRAINCASE, 2.4, (-52.0, -40.0, -38.0), (52.0, 66.0, -12.0))
    solid.capsule((0.0, -8.0, -17.0), (0.0, -26.0, -29.0), 5.0)  # clivus
    solid.capsule((0.0, 40.0, -17.5), (0.0, 64.0, -24.0), 3.0)  # external occipital crest
    solid.drill(0.0, 14.5, 14.0, 17.5, 34.0)  # foramen magnum
    for s in (-1.0, 1.0):
        solid.capsule((13.5 * s, -8.0, -14.0), (18.0 * s, 6.0, -13.0), 5.2)  # condyle
        solid.capsule((20.0 * s, -16.0, -25.0), (46.0 * s, 2.0, -27.0), 6.5)  # petrous bone
        solid.ellipsoid((49.0 * s, 8.0, -25.0), (7.5, 9.0, 13.0))  # mastoid
        solid.ellipsoid((44.0 * s, -27.0, -12.0), (3.6, 13.0, 24.0))  # ramus of the jaw


def _atlas(solid: _Solid) -> None:
    """C1: two lateral masses joined by a front and a long back arch; no body, no spinous process."""
    for s in (-1.0, 1.0):
        solid.ellipsoid((17.0 * s, 1.0, 0.0), (6.4, 9.0, 9.5))
        solid.cut(  # its lower facets face down and inwards
            (17.0 * s - 7.0, -8.0, -10.0),
            (17.0 * s + 7.0, 10.0, 10.0),
            (17.0 * s, 1.0, 6.8),
            (-0.38 * s, 0.0, 1.0),
        )
    solid.arch(2.0, 16.0, -12.7, 2.5, tall=1.9)
    solid.ellipsoid((0.0, -12.8, 0.5), (3.2, 2.4, 3.6))  # anterior tubercle
    solid.arch(7.0, 17.0, 21.5, 2.4, tall=1.7)
    solid.ellipsoid((0.0, 30.5, 0.5), (2.6, 2.6, 3.4))  # posterior tubercle
    for s in (-1.0, 1.0):
        solid.ellipsoid((28.5 * s, 3.0, 1.0), (9.5, 5.6, 4.2))
        solid.drill(26.5 * s, 3.0, 3.1, 3.1, 8.0)


def _typical(level: str, solid: _Solid) -> None:
    """C2–T1: body, pedicles, pillars, transverse processes, laminae and spinous process; C2 with its dens."""
    d = DIMENSIONS[level]
    a, b, h = d.body
    cy, ay, px = d.canal_y, d.arch_y, d.pillar_x
    half, height = d.lamina
    lift = 2.0 if level == "C2" else 0.0
    has_tubercles = level in ("C3", "C4", "C5", "C6")
    tall = 2.1 if level in ("C3", "C4", "C5") else 1.8
    solid.body(d.body, uncinate_mm=0.0 if level in ("C2", "T1") else 4.0)
    if level == "C2":
        solid.capsule((0.0, 0.0, -h + 2), (0.0, -0.5, -h - 13.5), 5.0)
        for s in (-1.0, 1.0):  # superior facets, the shoulders that carry the atlas, and the bone behind them
            solid.ellipsoid((15.0 * s, 2.0, -h + 1.5), (7.5, 8.0, 6.0))
            solid.capsule((14.5 * s, 4.0, -h + 4.5), (px * s, cy - 2.0, 1.0), 4.2)
    for s in (-1.0, 1.0):
        solid.capsule((a * 0.8 * s, b * 0.45, -1.0), (px * 0.95 * s, cy - 3.5, -1.0), 2.8, tall=1.25)
        solid.pillar((px * s, cy - 1.0, 0.5), 5.7, 5.0, above_mm=2.0 if level == "C2" else 8.2)
        reach = (d.transverse_x - a * 0.8 - (1.5 if has_tubercles else 0.0)) / 2
        solid.ellipsoid(((a * 0.8 + reach) * s, 2.5, 0.5), (reach, 6.0, 3.8))
        solid.capsule(
            (px * 0.97 * s, cy + 3.0, 1.0 - lift), (0.8 * s, ay, 2.5 - lift), half, tall=height / half
        )
        if has_tubercles:  # two tubercles, with the nerve's groove between
            tx = d.transverse_x
            solid.capsule(((tx - 6.0) * s, 0.0, 0.5), ((tx - 2.0) * s, -3.5, 0.0), 2.0)
            solid.capsule(((tx - 6.0) * s, 5.0, 0.5), ((tx - 2.0) * s, 8.0, 2.0), 2.0)
        if d.foramen:
            solid.drill((a + 5.2) * s, 2.0, d.foramen, d.foramen, 9.0)
    length, drop, radius = d.spinous
    split, tip = (0.0, ay + 0.7 * length, 3.0 + 0.7 * drop), (0.0, ay + length, 3.0 + drop)
    solid.capsule((0.0, ay, 3.0), split if d.bifid else tip, radius, tall=tall)
    if d.bifid:
        for s in (-1.0, 1.0):
            solid.capsule(split, (4.0 * s, tip[1], tip[2]), radius * 0.85, tall=1.3)
    else:
        solid.ellipsoid(tip, (radius * 1.35, 3.5, 5.0))
    solid.drill(0.0, cy, d.canal[0], d.canal[1], h + 12.0)
