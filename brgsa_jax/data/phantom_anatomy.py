"""A chest in millimetres, and the canvas it is drawn on.

Two frames are used. *World*: millimetres from the centre of a cubic field of view of `FIELD` mm,
x to the patient's left, y posterior, z superior, aligned with the array axes (LPS). *Body*: the
same axes for a standard patient; `Body.matrix` and `Body.shift` carry body to world and hold the
patient's size, position and tilt. Everything is described in the body frame, so a patient is the
same at any resolution.

Structures thinner than a voxel are drawn with the fraction of the voxel that they fill, so a
1 mm vessel on a 6 mm grid is faint instead of lost or doubled.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

FIELD = 384.0
AIR = -1000.0

Slices = tuple[slice, slice, slice]


class Tube(NamedTuple):
    """A straight piece of vessel or airway: end points (body mm) and radii (mm)."""

    start: tuple[float, float, float]
    end: tuple[float, float, float]
    r0: float
    r1: float


@dataclass
class Body:
    """One patient's anatomy in the body frame (mm, HU); see `make_body`."""

    sex: str
    age: int
    matrix: np.ndarray
    shift: np.ndarray
    inverse: np.ndarray
    scale: float
    cage: tuple[float, float]
    fat: float
    apex: dict[str, float]
    dome: dict[str, float]
    heart_centre: np.ndarray
    heart_axes: np.ndarray
    heart_frame: np.ndarray
    aorta: list[Tube]
    bronchi: dict[str, list[Tube]]
    vessels: list[Tube]
    lung_hu: float
    blood_hu: float
    noise: float
    coverage: tuple[float, float]
    fov_radius: float
    fov_centre: tuple[float, float]
    table: bool
    vertebra_phase: float
    rib_phase: float
    lattice: np.ndarray
    pool: dict[str, np.ndarray] = field(default_factory=dict)

    def world(self, point: Any) -> np.ndarray:
        """Carries body points `[..., 3]` to world mm."""
        return np.asarray(point, float) @ self.matrix.T + self.shift


SIDES = ("right", "left")
SIGN = {"right": -1.0, "left": 1.0}


def squircle(x: Any, y: Any, ax: Any, ay: float, square: float) -> Any:
    """Radius-like coordinate, 1 on a rounded rectangle with half axes ax, ay."""
    u = (x / ax) ** 2
    v = (y / ay) ** 2
    return np.sqrt(np.maximum(u + v - square * u * v, 1e-6))


def cage_distance(body: Body, x: Any, y: Any, z: Any) -> Any:
    """Approximate signed distance (mm) to the inner chest wall, negative inside."""
    ax, ay = body.cage
    taper = np.clip((z - 20.0) / 110.0, 0.0, 1.2)
    return (squircle(x, y, ax * (1.0 - 0.16 * taper * taper), ay, 0.35) - 1.0) * (0.5 * (ax + ay))


def dome_height(body: Body, side: str, x: Any, y: Any) -> Any:
    """Height z (mm) of a hemidiaphragm over (x, y)."""
    dx = x - SIGN[side] * 64.0
    return body.dome[side] - dx * dx / 72.0 - (y + 14.0) ** 2 / 105.0


def medial_width(y: Any, z: Any) -> Any:
    """Half width (mm) of the mediastinum at (y, z)."""
    front = np.clip((y + 82.0) / 50.0, 0.0, 1.0)
    top = np.clip((z - 60.0) / 50.0, 0.0, 1.0)
    return 5.0 + 19.0 * front + 6.0 * top


def apex_height(body: Body, side: str, x: Any, y: Any) -> Any:
    """Height z (mm) of the lung's upper surface over (x, y)."""
    dx = x - SIGN[side] * 48.0
    return body.apex[side] - (dx * dx + (y - 10.0) ** 2) / 50.0


def lung_depth(body: Body, side: str, points: np.ndarray) -> np.ndarray:
    """Depth (mm, positive inside) of body points `[N, 3]` below the surface of one lung."""
    x, y, z = points.T
    distance = np.maximum(cage_distance(body, x, y, z), medial_width(y, z) - SIGN[side] * x)
    distance = np.maximum(distance, 0.75 * (dome_height(body, side, x, y) - z))
    distance = np.maximum(distance, 0.6 * (z - apex_height(body, side, x, y)))
    heart = ellipsoid(points - body.heart_centre, body.heart_frame, body.heart_axes + 4.0)
    return -np.maximum(distance, (1.0 - heart) * float(body.heart_axes.mean()))


def ellipsoid(offset: np.ndarray, frame: np.ndarray, axes: np.ndarray) -> np.ndarray:
    """Radius coordinate, 1 on the surface; offset `[N, 3]`, frame columns are the axes."""
    return np.sqrt((((offset @ frame) / axes) ** 2).sum(-1))


def lobe(point: np.ndarray) -> str:
    """Names the lobe of a body point, from the fissures' nominal planes."""
    x, y, z = (float(v) for v in point)
    if z < 70.0 - (70.0 - y) * 1.05:
        return "lower lobe"
    if x < 0:
        return "middle lobe" if z < 2.0 and y < 15.0 else "upper lobe"
    return "upper lobe lingula" if z < -8.0 else "upper lobe"


# Segmental airways of a standard patient: (lobe key, start, end, radius at start, at end).
_CARINA = (0.0, 20.0, 42.0)
_CENTRAL = (
    ((0.0, 8.0, 175.0), _CARINA, 8.6, 8.4),
    (_CARINA, (-28.0, 22.0, 22.0), 7.0, 6.4),
    ((-28.0, 22.0, 22.0), (-35.0, 25.0, -2.0), 5.6, 5.0),
    (_CARINA, (36.0, 26.0, 18.0), 6.8, 5.8),
)
_SEGMENTS = {
    "right": (
        ((-27, 22, 25), (-48, 20, 38), 4.6, 4.2), ((-48, 20, 38), (-54, 14, 78), 3.2, 2.4),
        ((-48, 20, 38), (-76, -28, 50), 3.2, 2.3), ((-48, 20, 38), (-76, 44, 58), 3.2, 2.3),
        ((-35, 22, -2), (-56, -18, -14), 3.8, 3.2), ((-56, -18, -14), (-84, -46, -20), 2.8, 2.0),
        ((-35, 25, -2), (-48, 42, -22), 5.0, 4.2), ((-42, 34, -12), (-62, 70, 8), 3.2, 2.3),
        ((-48, 42, -22), (-68, 68, -50), 3.4, 2.3), ((-48, 42, -22), (-90, 38, -50), 3.2, 2.2),
        ((-48, 42, -22), (-66, 8, -42), 3.0, 2.1),
    ),
    "left": (
        ((36, 25, 18), (54, 16, 25), 4.6, 4.2), ((54, 16, 25), (56, 24, 76), 3.2, 2.3),
        ((54, 16, 25), (76, -28, 44), 3.2, 2.3), ((54, 16, 25), (86, -34, 4), 3.0, 2.1),
        ((36, 26, 18), (50, 44, -16), 5.0, 4.2), ((42, 34, 4), (64, 70, 12), 3.2, 2.3),
        ((50, 44, -16), (68, 68, -48), 3.4, 2.3), ((50, 44, -16), (92, 40, -44), 3.2, 2.2),
        ((50, 44, -16), (84, 12, -36), 2.8, 2.0),
    ),
}
_AORTA = (
    (-12, -14, -8, 15.0), (-20, -26, 18, 16.0), (-17, -26, 44, 15.0), (-2, -8, 62, 13.5),
    (15, 16, 64, 13.0), (24, 34, 52, 12.5), (26, 42, 26, 12.0), (25, 44, -30, 11.5),
    (18, 46, -85, 11.0), (6, 44, -200, 10.0),
)
_GREAT_VESSELS = (
    ((10, -40, 0), (15, -30, 28), 13.0, 12.5), ((15, -30, 28), (22, -4, 32), 12.0, 10.0),
    ((22, -4, 32), (44, 16, 26), 10.0, 7.5), ((14, -22, 28), (-10, 4, 24), 10.0, 9.0),
    ((-10, 4, 24), (-42, 14, 14), 9.0, 7.5), ((-26, -14, 86), (-27, -8, 6), 8.5, 8.5),
    ((-26, -14, 86), (-40, -30, 122), 7.0, 6.5), ((-24, -18, 84), (28, -38, 92), 6.5, 6.0),
    ((28, -38, 92), (44, -34, 122), 6.0, 6.0), ((-9, -12, 62), (-20, -6, 125), 6.0, 4.5),
    ((6, 2, 66), (16, 0, 128), 4.2, 4.0), ((15, 16, 66), (28, 14, 124), 5.0, 4.6),
    ((-17, 8, -45), (-18, 18, -130), 10.5, 11.0), ((-4, 10, -8), (-46, 30, -12), 7.0, 4.5),
    ((6, 12, -8), (48, 32, -10), 7.0, 4.5), ((-6, 4, 0), (-44, 6, 8), 6.0, 4.0),
    ((8, 6, 0), (46, 10, 8), 6.0, 4.0),
)


def _orthonormal(first: tuple[float, float, float]) -> np.ndarray:
    """Frame `[3, 3]` whose first column is along `first`."""
    a = np.asarray(first, float)
    a /= np.linalg.norm(a)
    b = np.cross((0.0, 0.0, 1.0), a)
    b /= np.linalg.norm(b)
    return np.stack([a, b, np.cross(a, b)], axis=1)


def _branch(rng: np.random.Generator, tubes: list[Tube], count: int, length: float,
            spread: float, shrink: float) -> list[Tube]:
    """Gives every tube `count` children at its end, fanned by `spread`, thinner by `shrink`."""
    start = np.repeat(np.array([t.end for t in tubes], float), count, axis=0)
    along = np.repeat(np.array([t.end for t in tubes], float) - [t.start for t in tubes], count, 0)
    along /= np.linalg.norm(along, axis=1, keepdims=True)
    along += spread * rng.normal(size=along.shape)
    along /= np.linalg.norm(along, axis=1, keepdims=True)
    end = start + along * length * rng.uniform(0.7, 1.3, (len(start), 1))
    radius = np.repeat([t.r1 for t in tubes], count) * shrink
    return [Tube(tuple(a), tuple(b), r, 0.75 * r)
            for a, b, r in zip(start.tolist(), end.tolist(), radius.tolist(), strict=True)]


def make_body(rng: np.random.Generator, *, heart: float = 1.0, raised: dict[str, float]
              | None = None, aorta: float = 1.0, tortuous: float = 0.0) -> Body:
    """Samples a patient.

    Args:
        rng: the patient's own stream; the draws do not depend on the other arguments, so that the
            same patient exists with and without a finding.
        heart: size factor of the heart (1 is normal).
        raised: mm by which each hemidiaphragm is raised (negative: flattened).
        aorta: size factor of the aorta.
        tortuous: sideways bow of the thoracic aorta, mm.
    """
    raised = raised or {}
    sex = "female" if rng.random() < 0.45 else "male"
    age = int(np.clip(rng.normal(56, 16), 19, 92))
    size = rng.normal(0.97 if sex == "female" else 1.02, 0.035, 3) * rng.normal(1.0, 0.02)
    size = np.clip(size, 0.86, 1.12)
    roll, lean, pitch = np.deg2rad(rng.normal(0, [2.0, 1.2, 1.5]))
    rotation = (
        np.array([[np.cos(roll), -np.sin(roll), 0], [np.sin(roll), np.cos(roll), 0], [0, 0, 1]])
        @ np.array([[np.cos(lean), 0, np.sin(lean)], [0, 1, 0], [-np.sin(lean), 0, np.cos(lean)]])
        @ np.array([[1, 0, 0], [0, np.cos(pitch), -np.sin(pitch)],
                    [0, np.sin(pitch), np.cos(pitch)]])
    )
    matrix = rotation * size
    shift = np.clip(rng.normal(0, [5.0, 5.0, 6.0]), -12, 12) + [0.0, -6.0, 4.0]

    breath = rng.normal(0, 6.0)
    dome = {"right": -42.0 - breath, "left": -52.0 - breath + rng.normal(0, 4.0)}
    dome = {side: dome[side] + raised.get(side, 0.0) for side in SIDES}
    apex = {side: 128.0 + rng.normal(0, 3.0) for side in SIDES}

    factor = heart * rng.normal(1.0, 0.03)
    frame = _orthonormal((0.74, -0.5, -0.45))
    axes = np.array([59.0, 43.0, 44.0]) * factor
    # A larger heart grows to the left and downwards; its right border hardly moves.
    centre = np.array([20.0, -27.0, -30.0]) + (factor - 1.0) * np.array([42.0, -8.0, -16.0])
    centre = centre + rng.normal(0, [2.5, 2.0, 3.0])

    bend = rng.normal(0, 1.5, 3)
    wide = aorta * rng.normal(1.0, 0.05) * (1.0 + 0.003 * (age - 56))
    path = np.array(_AORTA, float)
    path[:, :3] += bend
    path[5:9, 0] += tortuous * np.array([0.4, 1.0, 0.8, 0.2])
    path[2:6, 2] += 0.5 * tortuous
    tubes = [Tube(tuple(a[:3]), tuple(b[:3]), a[3] * wide, b[3] * wide)
             for a, b in zip(path[:-1].tolist(), path[1:].tolist(), strict=True)]

    bronchi = {"central": [Tube(*tube) for tube in _CENTRAL]}
    vessels: list[Tube] = []
    for side in SIDES:
        segments = [Tube(tuple(float(v) for v in a), tuple(float(v) for v in b), p, q)
                    for a, b, p, q in _SEGMENTS[side]]
        ends = {t.start for t in segments}
        moved = [t if t.end in ends else t._replace(end=tuple((np.array(t.end)
                 + rng.normal(0, 4.0, 3)).tolist())) for t in segments]
        peripheral = [t for t in moved if t.end not in ends]
        fine = _branch(rng, peripheral, 2, 20.0, 0.35, 0.72)
        bronchi[side] = moved
        bronchi[side + " fine"] = fine
        offset = np.array([SIGN[side] * 4.5, -2.0, -3.0])
        arteries = [Tube(tuple((np.array(t.start) + offset).tolist()),
                         tuple((np.array(t.end) + offset).tolist()), t.r0 * 1.05, t.r1 * 1.1)
                    for t in moved]
        outer = [Tube(tuple((np.array(t.start) + offset).tolist()),
                      tuple((np.array(t.end) + offset).tolist()), t.r0 * 1.05, t.r1 * 1.1)
                 for t in peripheral]
        second = _branch(rng, outer, 3, 24.0, 0.45, 0.66)
        third = _branch(rng, second, 2, 18.0, 0.5, 0.7)
        fourth = _branch(rng, third, 2, 13.0, 0.6, 0.75)
        vessels += arteries + second + third + fourth

    contrast = rng.random() < 0.22
    lung = -862.0 + rng.normal(0, 14.0)
    blood = rng.uniform(95, 165) if contrast else rng.normal(42, 4)
    low = -100.0 - rng.uniform(15, 60)
    body = Body(
        sex=sex, age=age, matrix=matrix, shift=shift, inverse=np.linalg.inv(matrix),
        scale=float(size.mean()), cage=(126.0 + rng.normal(0, 3), 90.0 + rng.normal(0, 3)),
        fat=float(np.clip(rng.gamma(5.0, 3.0) + (4.0 if sex == "female" else 0.0), 4, 34)),
        apex=apex, dome=dome, heart_centre=centre, heart_axes=axes, heart_frame=frame,
        aorta=tubes, bronchi=bronchi, vessels=vessels, lung_hu=float(lung),
        blood_hu=float(blood), noise=float(rng.uniform(9, 24)),
        coverage=(low + min(dome.values()) + 45.0, max(apex.values()) + rng.uniform(8, 35)),
        fov_radius=float(rng.choice([rng.uniform(168, 185), rng.uniform(186, 280)], p=[0.25, 0.75])),
        fov_centre=tuple(rng.normal(0, 3, 2).tolist()), table=bool(rng.random() < 0.55),
        vertebra_phase=float(rng.uniform(0, 25)), rib_phase=float(rng.uniform(0, 25)),
        lattice=rng.normal(size=(3, 19, 19, 19)).astype(np.float32),
    )
    cloud = rng.uniform((0, -92, -125), (128, 92, 128), (500, 3))
    for side in SIDES:
        points = cloud * [SIGN[side], 1, 1]
        depth = lung_depth(body, side, points)
        keep = depth > 3.0
        body.pool[side] = np.concatenate([points[keep], depth[keep, None]], axis=1)
    return body


@functools.lru_cache(maxsize=32)
def _spline(cells: int, knots: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices and weights `[4, cells]` of cubic B-splines over `knots` lattice points."""
    u = (np.arange(cells) + 0.5) / cells * (knots - 3)
    base = np.minimum(u.astype(int), knots - 4)
    t = u - base
    weights = np.stack([(1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, -3 * t**3 + 3 * t**2 + 3 * t + 1,
                        t**3]) / 6.0
    return base[None] + np.arange(4)[:, None], weights.astype(np.float32)


@functools.lru_cache(maxsize=4)
def _axes(shape: tuple[int, int, int]) -> tuple[np.ndarray, ...]:
    """World coordinates (mm) of the voxel centres along each axis."""
    return tuple(((np.arange(n) + 0.5) / n - 0.5) * FIELD for n in shape)


def cover(distance: Any, width: float) -> Any:
    """Filled fraction of a voxel of `width` mm whose centre is `distance` mm outside a surface."""
    out = distance * np.float32(-1.0 / width)
    out += np.float32(0.5)
    return np.clip(out, 0.0, 1.0, out=out) if isinstance(out, np.ndarray) else min(max(out, 0), 1)


class Canvas:
    """A float32 HU volume with the body's coordinates, drawn on box by box.

    Attributes:
        hu: `[X, Y, Z]` float32.
        x, y, z: body coordinates of the voxel centres, `[X, Y, Z]` float32, mm.
        h: voxel size in body mm along x, y, z; w: the in-plane size, the usual edge width.
        lung: filled fraction of each voxel by aerated lung, `[X, Y, Z]`.
        wall: signed distance to the inner chest wall, mm, negative inside.
        boxes: for every lesion drawn between `begin` and `finish`, its voxel box.
    """

    def __init__(self, shape: tuple[int, int, int], body: Body):
        self.shape = shape
        self.body = body
        self.hu = np.full(shape, AIR, np.float32)
        self.spacing = np.array([FIELD / n for n in shape])
        self.h = self.spacing / np.sqrt((body.matrix**2).sum(0))
        self.w = float(self.h[0])
        wx, wy, wz = _axes(shape)
        inverse, origin = body.inverse, body.inverse @ body.shift
        self.x, self.y, self.z = (
            ((row[0] * wx)[:, None, None] + (row[1] * wy)[None, :, None]
             + (row[2] * wz - o)[None, None, :]).astype(np.float32)
            for row, o in zip(inverse, origin, strict=True)
        )
        self.absolute = np.abs(body.matrix)
        self.wall = cage_distance(body, self.x, self.y, self.z)
        self.lung = np.zeros(shape, np.float32)
        self.sides: dict[str, np.ndarray] = {}
        self.body_cover = self.lung
        self._corner: list[np.ndarray] | None = None

    # Recording: which voxels a lesion really changed.
    def begin(self) -> None:
        """Starts recording the box of one lesion."""
        self._corner = []

    def finish(self) -> tuple[int, ...] | None:
        """Ends recording; returns (x0, y0, z0, x1, y1, z1), half open, or None if unchanged."""
        corner, self._corner = self._corner, None
        if not corner:
            return None
        boxes = np.array(corner)
        return tuple(int(v) for v in (*boxes[:, :3].min(0), *boxes[:, 3:].max(0)))

    def note(self, where: Slices, change: np.ndarray) -> None:
        """Records the extent of `change` (HU, absolute) inside the box `where`."""
        if self._corner is None or not change.size:
            return
        top = float(change.max())
        if top < 4.0:
            return
        hit = change > min(25.0, 0.5 * top)
        low, high = [], []
        for axis, part in enumerate(where):
            line = np.flatnonzero(hit.any(axis=tuple(a for a in range(3) if a != axis)))
            low.append(part.start + line[0])
            high.append(part.start + line[-1] + 1)
        self._corner.append(np.array(low + high))

    # Boxes and paint.
    def cut(self, low: Any, high: Any) -> Slices | None:
        """Voxel slices that hold the body box [low, high] with a margin of one voxel."""
        low, high = np.asarray(low, float), np.asarray(high, float)
        centre = self.body.matrix @ (0.5 * (low + high)) + self.body.shift
        half = self.absolute @ (0.5 * (high - low)) + self.spacing
        first = np.floor((centre - half + FIELD / 2) / self.spacing).astype(int)
        last = np.ceil((centre + half + FIELD / 2) / self.spacing).astype(int)
        first = np.maximum(first, 0)
        last = np.minimum(last, self.shape)
        if (first >= last).any():
            return None
        return tuple(slice(a, b) for a, b in zip(first.tolist(), last.tolist(), strict=True))

    @property
    def everything(self) -> Slices:
        return tuple(slice(0, n) for n in self.shape)

    def coordinates(self, where: Slices) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return self.x[where], self.y[where], self.z[where]

    def paint(self, where: Slices, alpha: np.ndarray, hu: Any, *, solid: bool = False) -> None:
        """Mixes `hu` into the box with weight `alpha`; `solid` displaces aerated lung."""
        region = self.hu[where]
        change = alpha * (hu - region)
        region += change
        if solid:
            self.lung[where] *= 1.0 - alpha
        if self._corner is not None:
            self.note(where, np.abs(change))

    def noise(self, lattice: np.ndarray, where: Slices) -> np.ndarray:
        """Smooth random field in the box, about unit variance, from a `[n, n, n]` lattice."""
        out = lattice
        for axis, part in enumerate(where):
            index, weight = _spline(self.shape[axis], lattice.shape[axis])
            total: Any = 0.0
            view = [None, None, None]
            view[axis] = slice(None)
            for tap in range(4):
                total = total + out.take(index[tap, part], axis) * weight[tap, part][tuple(view)]
            out = total
        return out * np.float32(3.0)

    # Shapes.
    def ball(self, centre: Any, axes: Any, hu: Any, *, frame: np.ndarray | None = None,
             mask: np.ndarray | None = None, rough: np.ndarray | None = None, bumps: float = 0.0,
             soft: float = 1.0, solid: bool = False, strength: float = 1.0) -> None:
        """Paints an ellipsoid.

        Args:
            centre: body mm.
            axes: one radius or three half axes, mm.
            hu: its value.
            frame: `[3, 3]`, columns are the directions of the half axes; identity if None.
            mask: `[X, Y, Z]` weights, e.g. the lung.
            rough: noise lattice that makes the surface irregular by `bumps` (fraction of radius).
            soft: edge width in voxels.
            solid: it displaces aerated lung.
            strength: largest weight.
        """
        axes = np.broadcast_to(np.asarray(axes, float), 3)
        reach = axes if frame is None else np.sqrt(((frame * axes) ** 2).sum(1))
        reach = reach * (1.0 + 1.5 * bumps) + self.w * soft
        centre = np.asarray(centre, float)
        where = self.cut(centre - reach, centre + reach)
        if where is None:
            return
        size = self.h if frame is None else np.abs(frame).T @ self.h
        seen = np.maximum(axes, 0.5 * size)
        fill = float(np.prod(axes / seen)) * strength
        offset = [c - v for c, v in zip(self.coordinates(where), centre.tolist(), strict=True)]
        if frame is not None:
            columns = frame.T.tolist()
            offset = [a * offset[0] + b * offset[1] + c * offset[2] for a, b, c in columns]
        rho = sum((o * (1.0 / float(s))) ** 2 for o, s in zip(offset, seen, strict=True))
        rho = np.sqrt(rho)
        if rough is not None:
            rho = rho + bumps * self.noise(rough, where)
        width = soft * self.w / float(seen.mean())
        alpha = cover(rho - 1.0, width)
        if fill < 1.0:
            alpha *= fill
        if mask is not None:
            alpha *= mask[where]
        self.paint(where, alpha, hu, solid=solid)

    def tube_distance(self, tube: Tube, reach: float) -> tuple[Slices, np.ndarray, np.ndarray] | None:
        """Box, distance to the axis and local radius (mm) of a tube, `reach` mm around it."""
        a, b = np.array(tube.start), np.array(tube.end)
        where = self.cut(np.minimum(a, b) - reach, np.maximum(a, b) + reach)
        if where is None:
            return None
        x, y, z = self.coordinates(where)
        v = (b - a).tolist()
        dx, dy, dz = x - tube.start[0], y - tube.start[1], z - tube.start[2]
        length = v[0] ** 2 + v[1] ** 2 + v[2] ** 2 + 1e-6
        t = dx * (v[0] / length) + dy * (v[1] / length) + dz * (v[2] / length)
        t = np.clip(t, 0.0, 1.0, out=t)
        dx -= t * v[0]
        dy -= t * v[1]
        dz -= t * v[2]
        distance = np.sqrt(dx * dx + dy * dy + dz * dz)
        return where, distance, tube.r0 + (tube.r1 - tube.r0) * t

    def tube(self, tube: Tube, hu: Any, *, grow: float = 0.0, mask: np.ndarray | None = None,
             solid: bool = False, strength: float = 1.0) -> None:
        """Paints a tube, its radii enlarged by `grow` mm."""
        top = max(tube.r0, tube.r1) + grow
        found = self.tube_distance(tube, max(top, 0.5 * self.w) + self.w)
        if found is None:
            return
        where, distance, radius = found
        radius = radius + grow
        seen = np.maximum(radius, 0.5 * self.w)
        alpha = cover(distance - seen, self.w)
        alpha *= (radius / seen) ** 2 * strength
        if mask is not None:
            alpha *= mask[where]
        self.paint(where, alpha, hu, solid=solid)

    def shell(self, tube: Tube, thickness: float, hu: Any, *, grow: float = 0.0,
              mask: np.ndarray | None = None, strength: float = 1.0) -> None:
        """Paints the wall of a tube, `thickness` mm outside its radius (plus `grow`)."""
        top = max(tube.r0, tube.r1) + grow + thickness
        found = self.tube_distance(tube, top + self.w)
        if found is None:
            return
        where, distance, radius = found
        alpha = sheet(distance - (radius + grow + 0.5 * thickness), thickness, self.w)
        alpha *= strength
        if mask is not None:
            alpha *= mask[where]
        self.paint(where, alpha, hu)


def sheet(distance: np.ndarray, thickness: Any, width: float) -> np.ndarray:
    """Filled fraction of voxels of `width` mm by a sheet, from the distance to its middle."""
    seen = np.maximum(thickness, width)
    return cover(np.abs(distance) - 0.5 * seen, width) * np.float32(thickness / seen)


def spine_y(z: Any) -> Any:
    """Body y (mm) of the vertebral bodies' middle: the thoracic kyphosis."""
    return 67.0 - 10.0 * ((z - 25.0) / 120.0) ** 2


def draw_trunk(canvas: Canvas) -> None:
    """Body wall, fat, muscle, breasts, abdomen and the aerated lungs (no vessels yet)."""
    body, (x, y, z), w = canvas.body, (canvas.x, canvas.y, canvas.z), canvas.w
    ax, ay = body.cage
    everything = canvas.everything
    shoulder = np.clip((z - 55.0) / 60.0, 0.0, 1.0)
    half = ax + 24.0 + body.fat + 14.0 * shoulder
    back = ay + 24.0 + 0.8 * body.fat
    outer = (squircle(x, y - 9.0, half, back, 0.55) - 1.0) * (0.5 * (ax + ay) + 24.0)
    texture = canvas.noise(body.lattice[0], everything)
    skin = cover(outer, w)
    canvas.body_cover = skin
    canvas.paint(everything, skin, -12.0)
    canvas.paint(everything, cover(outer + 3.0, w), -104.0 + 6.0 * texture)
    if body.sex == "female":
        for side in SIDES:
            centre = (SIGN[side] * 72.0, -ay - 18.0, -5.0)
            grown = np.array([52.0, 20.0 + 0.9 * body.fat, 50.0])
            canvas.ball(centre, grown, -100.0, mask=1.0 - canvas.wall.clip(-1, 0) * 0)
            canvas.ball((centre[0], centre[1] - 0.35 * body.fat, centre[2]), grown * 0.5, 10.0,
                        rough=body.lattice[1], bumps=0.25, strength=0.6)
    canvas.body_cover = np.maximum(skin, cover(-(canvas.hu - (AIR + 300.0)), 400.0))
    muscle = cover(outer + 3.0 + body.fat, w)
    canvas.paint(everything, muscle, 52.0 - 45.0 * np.clip(texture - 0.6, 0.0, 1.5))
    inner = cover(canvas.wall, w)
    canvas.paint(everything, inner, -96.0 + 5.0 * texture)

    w_z = 0.6 * float(canvas.h[2])
    top = np.maximum(apex_height(body, "right", x, y), apex_height(body, "left", x, y))
    canvas.paint(everything, cover(top + 3.0 - z, w_z) * inner, 40.0 - 90.0 * (texture > 0.8))

    right, left = (dome_height(body, side, x, y) for side in SIDES)
    low = canvas.cut((-140, -110, -200), (140, 110, max(body.dome.values())))
    if low is not None:
        xs, zs = x[low], z[low]
        under = cover(canvas.wall[low] + 4.0, w)
        liver = cover(zs - right[low] + 3.0, w_z) * cover(xs - 38.0 + 0.25 * y[low], 2 * w)
        liver *= under * cover(-155.0 - zs + 0.4 * (xs + 60.0), w_z)
        canvas.paint(low, liver, 58.0 + 3.0 * texture[low])
        room = np.zeros_like(canvas.lung)
        room[low] = cover(zs - left[low] + 4.0, w_z) * under
        canvas.ball((88, 42, body.dome["left"] - 45.0), (27, 36, 44), 50.0, mask=room)
        canvas.ball((54, -18, body.dome["left"] - 42.0), (38, 44, 40), 34.0, mask=room)
        canvas.ball((56, -36, body.dome["left"] - 34.0), (26, 18, 24), -930.0, mask=room)
        for sign in (-1.0, 1.0):
            canvas.ball((sign * 54.0, 52, -172), (25, 22, 46), 34.0)

    tissue = canvas.noise(body.lattice[2], everything)
    value = body.lung_hu + 0.32 * y + 13.0 * tissue
    for side in SIDES:
        dome = right if side == "right" else left
        fill = cover(canvas.wall, w) * cover(medial_width(y, z) - SIGN[side] * x, w)
        fill *= cover(dome - z, w_z) * cover(z - apex_height(body, side, x, y), w_z)
        canvas.sides[side] = fill
    canvas.lung = canvas.sides["right"] + canvas.sides["left"]
    canvas.paint(everything, canvas.lung, value)


def draw_bones(canvas: Canvas) -> None:
    """Spine with its canal, ribs, sternum, clavicles, scapulae."""
    body, w = canvas.body, canvas.w
    index = np.flatnonzero((np.abs(canvas.wall - 5.5) < 5.0 + 0.6 * w).ravel()
                           & (canvas.z.ravel() < 130.0))
    wall = canvas.wall.ravel()[index]
    x, y, z = (v.ravel()[index] for v in (canvas.x, canvas.y, canvas.z))
    turn = np.arctan2(np.abs(x), y) / np.float32(np.pi)
    phase = (z + 95.0 * turn - 22.0 * turn * turn + body.rib_phase) / 25.0
    across = (phase - np.floor(phase) - 0.5) * 25.0
    rho = np.sqrt((across / 6.5) ** 2 + ((wall - 5.5) / 4.2) ** 2)
    fill = cover(rho - 1.0, w / 5.0)
    bone = 330.0 + 420.0 * np.clip((rho - 0.45) * 2.5, 0.0, 1.0)
    bone = np.where(turn > 0.80, 110.0, bone)
    fill *= (turn < 0.97)
    flat = canvas.hu.reshape(-1)
    flat[index] += fill * (bone - flat[index])
    canvas.lung.reshape(-1)[index] *= 1.0 - fill

    where = canvas.cut((-62, 40, -200), (62, 135, 200))
    if where is not None:
        x, y, z = canvas.coordinates(where)
        dy = y - spine_y(z)
        phase = (z + body.vertebra_phase) / 25.0
        level = (phase - np.floor(phase) - 0.5) * 25.0
        disc = cover(9.8 - np.abs(level), max(1.5, 0.5 * float(canvas.h[2])))
        rho = np.sqrt((x / 18.5) ** 2 + (dy / 15.5) ** 2)
        lump = cover(rho - 1.0 - 0.1 * (disc > 0.5), w / 17.0)
        spongy = 165.0 - 1.1 * (body.age - 55)
        value = spongy + 330.0 * np.clip((rho - 0.78) * 5.0, 0.0, 1.0)
        value = value + (85.0 - value) * disc
        canvas.paint(where, lump, value, solid=True)
        back = np.sqrt((x / 14.0) ** 2 + ((dy - 27.0) / 13.0) ** 2)
        arch = cover(back - 1.0, w / 13.0)
        arch = np.maximum(arch, cover(np.abs(x) - 3.5, w) * cover(np.abs(dy - 47.0) - 14.0, w)
                          * cover(np.abs(level) - 9.0, w))
        wing = cover(np.abs(dy - 30.0 - 0.25 * np.abs(x)) - 5.0, w) * cover(np.abs(x) - 36.0, w)
        arch = np.maximum(arch, wing * cover(np.abs(level) - 7.0, w))
        canvas.paint(where, arch * (1.0 - lump), 430.0, solid=True)
        canvas.paint(where, cover(np.sqrt(x * x + (dy - 25.0) ** 2) - 8.5, w), 22.0)

    front = -body.cage[1] - 6.0
    canvas.ball((0, front, 78), (24, 7, 26), 260.0)
    canvas.ball((0, front - 1, 15), (17, 6.5, 55), 260.0)
    for sign in (-1.0, 1.0):
        canvas.tube(Tube((sign * 20.0, front + 4.0, 102.0), (sign * 115.0, -30.0, 132.0), 6, 6),
                    480.0)
        frame = _orthonormal((sign * 0.72, -0.69, 0.05))
        canvas.ball((sign * 98.0, 88.0, 62.0), (38.0, 4.5, 56.0), 380.0, frame=frame)


def draw_mediastinum(canvas: Canvas) -> None:
    """Heart with fat and chambers, great vessels, oesophagus."""
    body = canvas.body
    centre, axes, frame = body.heart_centre, body.heart_axes, body.heart_frame
    canvas.ball(centre, axes + 4.5, -92.0, frame=frame, solid=True)
    canvas.ball(centre, axes, 48.0, frame=frame, solid=True)
    size = axes / 59.0
    canvas.ball(centre + 16 * frame[:, 0] * size[0] + [10, 10, 0], 24 * size[0], body.blood_hu)
    canvas.ball(centre + 8 * frame[:, 0] * size[0] + [-8, -20, 0], (27 * size[0],) + (19 * size[0],)
                * 2, body.blood_hu)
    canvas.ball(centre + [-32 * size[0], 2, 4], 19 * size[0], body.blood_hu)
    canvas.ball(centre + [-14 * size[0], 26, 18], np.array((25, 15, 18)) * size[0], body.blood_hu)
    for start, end, r0, r1 in _GREAT_VESSELS:
        canvas.tube(Tube(start, end, r0, r1), body.blood_hu, solid=True)
    for tube in body.aorta:
        canvas.tube(tube, body.blood_hu, solid=True)
    for start, end in (((0, 30, 160), (4, 36, 40)), ((4, 36, 40), (6, 38, -25)),
                       ((6, 38, -25), (20, 20, -88))):
        canvas.tube(Tube(start, end, 8.0, 8.0), 36.0, solid=True)
    canvas.ball((2, 31, 85), (3, 2.5, 14), -600.0)
    for centre in ((-16, 2, 60), (-14, 4, 52), (24, 4, 40), (4, -46, 62)):
        canvas.ball(centre, (3.5, 2.8, 4.0), 40.0)


def draw_vessels(canvas: Canvas) -> None:
    """Pulmonary arteries and veins; those that would not show at this resolution are left out."""
    least = 0.13 * canvas.w
    for tube in canvas.body.vessels:
        if tube.r0 > least:
            canvas.tube(tube, 38.0, mask=canvas.lung)


def draw_airways(canvas: Canvas) -> None:
    """Trachea and bronchi: an air lumen in a thin wall."""
    body = canvas.body
    for name, tubes in body.bronchi.items():
        for tube in tubes:
            if tube.r0 < 0.22 * canvas.w:
                continue
            if name == "central" or canvas.w < 4.0:
                canvas.tube(tube, 10.0, grow=1.2)
            canvas.tube(tube, -970.0)


def draw_fissures(canvas: Canvas) -> None:
    """Oblique fissures and the right horizontal one, as sheets of 1 mm."""
    if canvas.w > 4.0:
        return
    for side in SIDES:
        where = canvas.cut(*sorted(((SIGN[side] * 20, -95, -110), (SIGN[side] * 130, 95, 130)))
                           if False else ((min(20 * SIGN[side], 130 * SIGN[side]), -95, -110),
                                          (max(20 * SIGN[side], 130 * SIGN[side]), 95, 130)))
        if where is None:
            continue
        x, y, z = canvas.coordinates(where)
        plane = z - 70.0 + (70.0 - y) * 1.05
        alpha = sheet(plane / 1.45, 0.9, canvas.w) * canvas.lung[where]
        canvas.paint(where, alpha, -350.0)
        if side == "right":
            flat = sheet(z - 2.0 - 0.05 * y, 0.9, canvas.w) * (plane > 0) * canvas.lung[where]
            canvas.paint(where, flat, -400.0)


def draw_outside(canvas: Canvas, rng: np.random.Generator) -> np.ndarray:
    """Noise, table, and the scanner's field of view; returns the int16 volume.

    Air outside the body, outside the reconstructed circle and beyond the scanned range is exactly
    -1000 HU; the scanner's noise is added inside the body.
    """
    body, shape = canvas.body, canvas.shape
    # Averaging over a larger voxel lowers the noise, less than for white noise.
    sigma = body.noise * (1.5 * 1.5 * 3.0 / float(np.prod(canvas.spacing))) ** 0.25
    noise = rng.standard_normal(shape, dtype=np.float32)
    noise *= np.float32(sigma)
    noise *= canvas.body_cover
    canvas.hu += noise
    wx, wy, wz = _axes(shape)
    if body.table:
        back = float(body.world((0, body.cage[1] + 33.0 + 0.8 * body.fat, 0))[1]) + 8.0
        curve = wy[None, :] - (back - (wx[:, None] / 200.0) ** 2 * 22.0)
        edge = sheet(curve.astype(np.float32), 4.0, float(canvas.spacing[1]))
        edge = edge * (np.abs(wx) < 185.0)[:, None]
        free = (1.0 - canvas.body_cover) * edge[:, :, None]
        canvas.hu += free.astype(np.float32) * (-250.0 - canvas.hu)
    circle = ((wx - body.fov_centre[0])[:, None] ** 2 + (wy - body.fov_centre[1])[None, :] ** 2
              > body.fov_radius**2)
    canvas.hu[circle] = AIR
    low, high = (float(body.world((0, 0, value))[2]) for value in body.coverage)
    canvas.hu[:, :, (wz < low) | (wz > high)] = AIR
    return np.clip(np.rint(canvas.hu, out=canvas.hu), -1024, 3071).astype(np.int16)
