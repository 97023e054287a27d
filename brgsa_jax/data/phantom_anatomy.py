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
    vessels: np.ndarray
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


def medial_width(side: str, y: Any, z: Any) -> Any:
    """Half width (mm) of the mediastinum at (y, z): narrow in front, and behind the heart."""
    front = np.clip((y + 82.0) / 50.0, 0.0, 1.0)
    top = np.clip((z - 60.0) / 50.0, 0.0, 1.0)
    recess = np.clip((y - 14.0) / 24.0, 0.0, 1.0) * np.clip((42.0 - z) / 30.0, 0.0, 1.0)
    return 5.0 + 19.0 * front + 6.0 * top - (13.0 if side == "right" else 7.0) * recess


def apex_height(body: Body, side: str, x: Any, y: Any) -> Any:
    """Height z (mm) of the lung's upper surface over (x, y)."""
    dx = x - SIGN[side] * 48.0
    return body.apex[side] - (dx * dx + (y - 10.0) ** 2) / 50.0


def lung_depth(body: Body, side: str, points: np.ndarray) -> np.ndarray:
    """Depth (mm, positive inside) of body points `[N, 3]` below the surface of one lung."""
    x, y, z = points.T
    distance = np.maximum(cage_distance(body, x, y, z),
                          medial_width(side, y, z) - SIGN[side] * x)
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


def _fan(rng: np.random.Generator, table: np.ndarray, count: int, length: float,
         spread: float, shrink: float) -> np.ndarray:
    """Gives every tube of `[N, 8]` rows `count` children at its end, fanned and thinner."""
    start = np.repeat(table[:, 3:6], count, axis=0)
    along = start - np.repeat(table[:, :3], count, axis=0)
    along /= np.sqrt((along * along).sum(1, keepdims=True))
    along += spread * rng.standard_normal(along.shape)
    along /= np.sqrt((along * along).sum(1, keepdims=True))
    end = start + along * length * rng.uniform(0.7, 1.3, (len(start), 1))
    radius = np.repeat(table[:, 7], count)[:, None] * shrink
    return np.concatenate([start, end, radius, 0.75 * radius], axis=1)


def _rows(tubes: list[Tube]) -> np.ndarray:
    """Tubes as rows (start, end, r0, r1) `[N, 8]`."""
    return np.array([(*t.start, *t.end, t.r0, t.r1) for t in tubes], float)


def _tubes(table: np.ndarray) -> list[Tube]:
    """Rows `[N, 8]` as tubes."""
    return [Tube(tuple(row[:3]), tuple(row[3:6]), row[6], row[7]) for row in table.tolist()]


def _grow_tree(hilum: np.ndarray, trunks: np.ndarray, tips: np.ndarray) -> np.ndarray:
    """Connects points of the lung to vessels that come from the hilum.

    Each point hangs on the nearest node that is nearer to the hilum; radii follow Murray's law
    from the number of points downstream.

    Args:
        hilum: `[3]`.
        trunks: `[M, 8]` tubes that exist already; their ends are nodes.
        tips: `[N, 3]` points to supply.

    Returns:
        `[N, 8]` rows (start, end, r0, r1).
    """
    tips = tips[np.argsort(((tips - hilum) ** 2).sum(1))]
    nodes = np.concatenate([trunks[:, 3:6], tips])
    reach = np.sqrt(((nodes - hilum) ** 2).sum(1))
    square = (nodes * nodes).sum(1)
    m = len(trunks)
    gap = square[m:, None] + square[None, :] - 2.0 * np.einsum("ik,jk->ij", tips, nodes)
    gap[reach[None, :] > 0.9 * reach[m:, None]] = np.inf
    gap[:, 0] = np.minimum(gap[:, 0], 1e6)
    parent = gap.argmin(1)
    load = [1.0] * len(nodes)
    for child in range(len(tips) - 1, -1, -1):
        load[int(parent[child])] += load[m + child]
    r1 = 0.66 * np.array(load) ** 0.36
    start = np.minimum(r1[parent], 1.35 * r1[m:])
    return np.concatenate([nodes[parent], tips, start[:, None], r1[m:, None]], axis=1)


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
    size = rng.normal(0.97 if sex == "female" else 1.02, 0.028, 3) * rng.normal(1.0, 0.02)
    size = np.clip(size, 0.86, 1.12)
    roll, lean, pitch = np.deg2rad(rng.normal(0, [2.0, 1.2, 1.5]))
    rotation = (
        np.array([[np.cos(roll), -np.sin(roll), 0], [np.sin(roll), np.cos(roll), 0], [0, 0, 1]])
        @ np.array([[np.cos(lean), 0, np.sin(lean)], [0, 1, 0], [-np.sin(lean), 0, np.cos(lean)]])
        @ np.array([[1, 0, 0], [0, np.cos(pitch), -np.sin(pitch)],
                    [0, np.sin(pitch), np.cos(pitch)]])
    )
    matrix = rotation * size
    shift = np.clip(rng.normal(0, [4.5, 4.0, 5.0]), -12, 12) + [0.0, -6.0, 4.0]

    breath = rng.normal(0, 6.0)
    dome = {"right": -42.0 - breath, "left": -52.0 - breath + rng.normal(0, 4.0)}
    # The scanned range is the patient's, with or without a finding.
    lowest = min(dome.values())
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
    trunks: dict[str, np.ndarray] = {}
    for side in SIDES:
        table = np.array([(*a, *b, p, q) for a, b, p, q in _SEGMENTS[side]], float)
        begins = {tuple(row) for row in table[:, :3].tolist()}
        last = np.array([tuple(row) not in begins for row in table[:, 3:6].tolist()])
        table[last, 3:6] += rng.normal(0, 4.0, (int(last.sum()), 3))
        airways = table * ([1.0] * 6 + [0.86, 0.8])
        bronchi[side] = _tubes(airways)
        bronchi[side + " fine"] = _tubes(_fan(rng, airways[last], 2, 17.0, 0.35, 0.72))
        beside = np.array([SIGN[side] * 4.5, -2.0, -3.0])
        trunks[side] = table * ([1.0] * 6 + [1.05, 1.1])
        trunks[side][:, :6] += np.tile(beside, 2)

    contrast = rng.random() < 0.22
    lung = -862.0 + rng.normal(0, 14.0)
    blood = rng.uniform(95, 165) if contrast else rng.normal(42, 4)
    low = -100.0 - rng.uniform(15, 60)
    body = Body(
        sex=sex, age=age, matrix=matrix, shift=shift, inverse=np.linalg.inv(matrix),
        scale=float(size.mean()), cage=(126.0 + rng.normal(0, 3), 90.0 + rng.normal(0, 3)),
        fat=float(np.clip(rng.gamma(5.0, 3.0) + (4.0 if sex == "female" else 0.0), 4, 34)),
        apex=apex, dome=dome, heart_centre=centre, heart_axes=axes, heart_frame=frame,
        aorta=tubes, bronchi=bronchi, vessels=np.zeros((0, 8)), lung_hu=float(lung),
        blood_hu=float(blood), noise=float(rng.uniform(9, 24)),
        coverage=(low + lowest + 40.0, max(apex.values()) + rng.uniform(8, 35)),
        fov_radius=float(rng.choice([rng.uniform(168, 185), rng.uniform(186, 280)],
                                    p=[0.25, 0.75])),
        fov_centre=tuple(rng.normal(0, 3, 2).tolist()), table=bool(rng.random() < 0.55),
        vertebra_phase=float(rng.uniform(0, 25)), rib_phase=float(rng.uniform(0, 25)),
        lattice=rng.normal(size=(3, 19, 19, 19)).astype(np.float32),
    )
    cloud = rng.uniform((0, -92, -125), (128, 92, 128), (560, 3))
    fine = []
    for side in SIDES:
        points = cloud * [SIGN[side], 1, 1]
        depth = lung_depth(body, side, points)
        keep = depth > 3.0
        body.pool[side] = np.concatenate([points[keep], depth[keep, None]], axis=1)
        hilum = np.array([SIGN[side] * 30.0, 18.0, 15.0])
        grown = _grow_tree(hilum, trunks[side], points[depth > 2.0])
        twigs = _fan(rng, grown[grown[:, 7] < 1.0], 2, 9.0, 0.7, 0.8)
        fine += [trunks[side], grown, twigs]
    body.vessels = np.concatenate(fine)
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
    np.maximum(out, np.float32(0.0), out=out)
    return np.minimum(out, np.float32(1.0), out=out)


def extent_y(body: Body) -> tuple[float, float]:
    """World y range (mm) that holds the body and the table."""
    front = 45.0 + body.cage[1] + 0.9 * body.fat if body.sex == "female" else (
        18.0 + body.cage[1] + 0.8 * body.fat)
    back = body.cage[1] + 33.0 + 0.8 * body.fat
    shift, scale = float(body.shift[1]), float(body.matrix[1, 1])
    return shift - scale * front - 12.0, shift + scale * back + 20.0


def scanned_z(body: Body) -> tuple[float, float]:
    """World z range (mm) of the scan."""
    return tuple(float(body.world((0, 0, value))[2]) for value in body.coverage)


class Canvas:
    """A float32 HU volume with the body's coordinates, drawn on box by box.

    Attributes:
        hu: `[X, Y, Z]` float32.
        x, y, z: body coordinates of the voxel centres, `[X, Y, Z]` float32, mm.
        h: voxel size in body mm along x, y, z; w: the in-plane size, the usual edge width.
        lung: filled fraction of each voxel by aerated lung; airspace: the same before organs
            and lesions displaced it.
        wall: signed distance to the inner chest wall, mm, negative inside.
        boxes: for every lesion drawn between `begin` and `finish`, its voxel box.
    """

    def __init__(self, shape: tuple[int, int, int], body: Body):
        self.body = body
        self.full = shape
        self._step = [FIELD / n for n in shape]
        self.spacing = np.array(self._step)
        self.h = self.spacing / np.sqrt((body.matrix**2).sum(0))
        self.w = float(self.h[0])
        # Only the part that holds the body, the table and the scanned range is drawn.
        ranges = ((-FIELD / 2, FIELD / 2), extent_y(body), scanned_z(body))
        first = [max(int((low + FIELD / 2) // step), 0)
                 for (low, _), step in zip(ranges, self._step, strict=True)]
        last = [min(int((high + FIELD / 2) // step) + 1, n)
                for (_, high), step, n in zip(ranges, self._step, shape, strict=True)]
        self.origin = first
        self.drawn: Slices = tuple(slice(a, b) for a, b in zip(first, last, strict=True))
        self.shape = tuple(b - a for a, b in zip(first, last, strict=True))
        self.world = [axis[part] for axis, part in zip(_axes(shape), self.drawn, strict=True)]
        self.hu = np.full(self.shape, AIR, np.float32)
        inverse, offset = body.inverse, body.inverse @ body.shift
        wx, wy, wz = self.world
        self.x, self.y, self.z = (
            ((row[0] * wx)[:, None, None] + (row[1] * wy)[None, :, None]).astype(np.float32)
            + (row[2] * wz - o).astype(np.float32)
            for row, o in zip(inverse, offset, strict=True)
        )
        self._matrix = body.matrix.tolist()
        self._shift = (body.shift + FIELD / 2 - self.spacing * self.origin).tolist()
        self.wall = cage_distance(body, self.x, self.y, self.z)
        self.lung = np.zeros(self.shape, np.float32)
        self.sides: dict[str, np.ndarray] = {}
        self.body_cover = np.zeros(self.shape, np.float32)
        self.airspace = self.body_cover
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
            low.append(self.origin[axis] + part.start + line[0])
            high.append(self.origin[axis] + part.start + line[-1] + 1)
        self._corner.append(np.array(low + high))

    # Boxes and paint.
    def cut(self, low: Any, high: Any) -> Slices | None:
        """Voxel slices that hold the body box [low, high] with a margin of one voxel."""
        middle = [0.5 * (a + b) for a, b in zip(low, high, strict=True)]
        half = [0.5 * (b - a) for a, b in zip(low, high, strict=True)]
        parts = []
        for row, shift, step, count in zip(self._matrix, self._shift, self._step, self.shape,
                                           strict=True):
            centre = row[0] * middle[0] + row[1] * middle[1] + row[2] * middle[2] + shift
            reach = (abs(row[0]) * half[0] + abs(row[1]) * half[1] + abs(row[2]) * half[2]) + step
            first = max(int((centre - reach) // step), 0)
            last = min(int(-(-(centre + reach) // step)), count)
            if first >= last:
                return None
            parts.append(slice(first, last))
        return tuple(parts)

    @property
    def everything(self) -> Slices:
        """The whole drawn grid."""
        return tuple(slice(0, n) for n in self.shape)

    def coordinates(self, where: Slices) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Body coordinates (mm) of the voxels in a box."""
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
            index, weight = _spline(self.full[axis], lattice.shape[axis])
            part = slice(part.start + self.origin[axis], part.stop + self.origin[axis])
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

    def tube_distance(self, tube: Tube, reach: float
                      ) -> tuple[Slices, np.ndarray, np.ndarray] | None:
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
        np.maximum(t, np.float32(0.0), out=t)
        np.minimum(t, np.float32(1.0), out=t)
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

    def splat(self, table: np.ndarray, hu: float, *, grow: float = 0.0,
              mask: np.ndarray | None = None) -> None:
        """Paints many tubes `[N, 8]` thinner than about a voxel at once, conserving their volume.

        Each is sampled along its axis; a sample's share of the tube's volume goes to the eight
        voxels around it with trilinear weights.
        """
        if not len(table):
            return
        start, step = table[:, :3], table[:, 3:6] - table[:, :3]
        length = np.sqrt((step * step).sum(1))
        count = np.maximum(np.ceil(length / (0.6 * self.w)).astype(int), 1)
        owner = np.repeat(np.arange(len(table)), count)
        part = np.arange(len(owner)) - np.repeat(np.cumsum(count) - count, count)
        t = (part + 0.5) / count[owner]
        points = start[owner] + t[:, None] * step[owner]
        radius = table[owner, 6] + t * (table[owner, 7] - table[owner, 6]) + grow
        volume = np.pi * radius**2 * (length / count)[owner] / float(np.prod(self.h))
        place = (self.body.world(points) + FIELD / 2) / self.spacing - 0.5 - self.origin
        base = np.floor(place).astype(int)
        inside = ((base >= 0) & (base < np.array(self.shape) - 1)).all(1)
        base, volume = base[inside], volume[inside]
        far = place[inside] - base
        weight = [(1.0 - far[:, k], far[:, k]) for k in range(3)]
        _, ny, nz = self.shape
        flat = (base[:, 0] * ny + base[:, 1]) * nz + base[:, 2]
        total = np.zeros(self.hu.size)
        for i, j, k in np.ndindex(2, 2, 2):
            share = volume * weight[0][i] * weight[1][j] * weight[2][k]
            total += np.bincount(flat + (i * ny + j) * nz + k, share, self.hu.size)
        hit = np.flatnonzero(total)
        alpha = np.minimum(total[hit], 1.0).astype(np.float32)
        if mask is not None:
            alpha *= mask.reshape(-1)[hit]
        canvas = self.hu.reshape(-1)
        canvas[hit] += alpha * (hu - canvas[hit])

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
            centre = (SIGN[side] * 70.0, -ay - 12.0, -5.0)
            grown = np.array([58.0, 15.0 + 0.9 * body.fat, 54.0])
            canvas.ball(centre, grown, -100.0)
            canvas.ball((centre[0], centre[1] - 0.35 * body.fat, centre[2]), grown * 0.5, 10.0,
                        rough=body.lattice[1], bumps=0.25, strength=0.6)
        canvas.body_cover = np.maximum(skin, cover((AIR + 300.0) - canvas.hu, 400.0))
    muscle = cover(outer + 3.0 + body.fat, w)
    plane = sheet(canvas.wall - 13.0 - 2.0 * texture, 2.2, w)
    canvas.paint(everything, muscle, 54.0 - 45.0 * np.clip(texture - 0.7, 0.0, 1.5) - 110.0 * plane)
    inner = cover(canvas.wall, w)
    canvas.paint(everything, inner, -96.0 + 5.0 * texture)

    w_z = 0.6 * float(canvas.h[2])
    high = canvas.cut((-140, -110, -15), (140, 110, 200))
    if high is not None:
        top = np.maximum(apex_height(body, "right", x[high], y[high]),
                         apex_height(body, "left", x[high], y[high]))
        above = cover(top + 3.0 - z[high], w_z) * inner[high]
        canvas.paint(high, above, 40.0 - 90.0 * (texture[high] > 0.8))

    low = canvas.cut((-140, -110, -200), (140, 110, max(body.dome.values())))
    if low is not None:
        xs, zs = x[low], z[low]
        right, left = (dome_height(body, side, xs, y[low]) for side in SIDES)
        under = cover(canvas.wall[low] + 4.0, w)
        liver = cover(zs - right + 3.0, w_z) * cover(xs - 38.0 + 0.25 * y[low], 2 * w)
        liver *= under * cover(-155.0 - zs + 0.4 * (xs + 60.0) + 9.0 * texture[low], w_z)
        canvas.paint(low, liver, 58.0 + 3.0 * texture[low])
        room = np.zeros_like(canvas.lung)
        room[low] = cover(zs - left + 4.0, w_z) * under
        bowel = np.clip((texture[low] - 0.75) * 4.0, 0.0, 1.0)
        bowel *= under * cover(zs - left + 8.0, w_z)
        canvas.paint(low, bowel * (1.0 - liver), 36.0)
        level, rough = body.dome["left"], body.lattice[1]
        canvas.ball((90, 38, level - 46.0), (30, 40, 48), 50.0, mask=room, rough=rough, bumps=0.05)
        canvas.ball((50, -22, level - 46.0), (42, 48, 46), 34.0, mask=room, rough=rough, bumps=0.08)
        canvas.ball((54, -42, level - 36.0), (30, 18, 26), -930.0, mask=room)
        canvas.ball((98, -42, level - 62.0), (22, 26, 26), 20.0, mask=room, rough=rough, bumps=0.1)
        canvas.ball((98, -50, level - 58.0), (14, 13, 16), -880.0, mask=room)
        for sign in (-1.0, 1.0):
            canvas.ball((sign * 54.0, 52, -172), (25, 22, 46), 34.0)

    for side in SIDES:
        canvas.sides[side] = np.zeros_like(canvas.lung)
        inside, outside = sorted((SIGN[side] * 2.0, SIGN[side] * 140.0))
        where = canvas.cut((inside, -110, -150), (outside, 110, body.apex[side]))
        if where is None:
            continue
        xs, ys, zs = canvas.coordinates(where)
        edge = medial_width(side, ys, zs) + 1.6 * texture[where]
        fill = inner[where] * cover(edge - SIGN[side] * xs, w)
        fill *= cover(zs - apex_height(body, side, xs, ys), w_z)
        fill *= cover(dome_height(body, side, xs, ys) - zs, w_z)
        canvas.sides[side][where] = fill
        canvas.lung[where] += fill
        tissue = canvas.noise(body.lattice[2], where)
        canvas.paint(where, fill, body.lung_hu + 0.32 * ys + 13.0 * tissue)
    canvas.airspace = canvas.lung.copy()


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
    size = float(axes[0]) / 59.0
    atria = ((centre + np.array([-33.0, 2.0, 8.0]) * size, np.array([24.0, 27.0, 31.0]) * size),
             (centre + np.array([-12.0, 28.0, 20.0]) * size, np.array([31.0, 17.0, 20.0]) * size))
    canvas.ball(centre, axes + 4.5, -92.0, frame=frame, solid=True)
    for place, half in atria:
        canvas.ball(place, half + 3.0, -92.0, solid=True)
    canvas.ball(centre, axes, 50.0, frame=frame, solid=True)
    for place, half in atria:
        canvas.ball(place, half, 46.0)
        canvas.ball(place, half - 3.0, body.blood_hu)
    canvas.ball(centre + size * (16.0 * frame[:, 0] + [10.0, 10.0, 0.0]), 24.0 * size,
                body.blood_hu)
    canvas.ball(centre + size * (8.0 * frame[:, 0] + [-8.0, -20.0, 0.0]),
                np.array([27.0, 19.0, 19.0]) * size, body.blood_hu)
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
    """Pulmonary arteries and veins, to the lung's periphery."""
    table = canvas.body.vessels
    thin = table[:, 6] <= 0.75 * canvas.w
    canvas.splat(table[thin], 38.0, mask=canvas.lung)
    for tube in _tubes(table[~thin]):
        canvas.tube(tube, 38.0, mask=canvas.lung)


def draw_airways(canvas: Canvas) -> None:
    """Trachea and bronchi: an air lumen in a thin wall."""
    thick = 0.75 * canvas.w
    tubes = [tube for group in canvas.body.bronchi.values() for tube in group]
    large = [tube for tube in tubes if tube.r0 > thick]
    small = [tube for tube in tubes if tube.r0 <= thick]
    fine = _rows(small)
    for tube in large:
        canvas.shell(tube, 0.4 + 0.1 * tube.r0, -60.0)
    canvas.splat(fine, -350.0, grow=0.5, mask=canvas.lung)
    canvas.splat(fine, -970.0, mask=canvas.airspace)
    for tube in large:
        canvas.tube(tube, -970.0, mask=None if tube.r0 > 4.5 else canvas.airspace)


def draw_fissures(canvas: Canvas) -> None:
    """Oblique fissures and the right horizontal one, as sheets of 1 mm."""
    if canvas.w > 4.0:
        return
    for side in SIDES:
        inner, outer = sorted((SIGN[side] * 10.0, SIGN[side] * 135.0))
        where = canvas.cut((inner, -100, -115), (outer, 100, 135))
        if where is None:
            continue
        x, y, z = canvas.coordinates(where)
        bow = 0.0016 * (np.abs(x) - 70.0) ** 2 + 4.0 * canvas.noise(canvas.body.lattice[1], where)
        plane = z - 70.0 + (70.0 - y) * 1.05 + 3.0 * bow
        alpha = sheet(plane / 1.45, 0.7, canvas.w) * canvas.lung[where]
        canvas.paint(where, alpha, -500.0)
        if side == "right":
            flat = sheet(z - 2.0 - bow, 0.7, canvas.w) * (plane > 0) * canvas.lung[where]
            canvas.paint(where, flat, -550.0)


def draw_outside(canvas: Canvas, rng: np.random.Generator) -> np.ndarray:
    """Noise, table, and the scanner's field of view; returns the int16 volume.

    Air outside the body, outside the reconstructed circle and beyond the scanned range is exactly
    -1000 HU; the scanner's noise is added inside the body.
    """
    body = canvas.body
    # Averaging over a larger voxel lowers the noise, less than for white noise.
    sigma = body.noise * (1.5 * 1.5 * 3.0 / float(np.prod(canvas.spacing))) ** 0.25
    noise = rng.standard_normal(canvas.shape, dtype=np.float32)
    noise *= np.float32(sigma)
    noise *= canvas.body_cover
    canvas.hu += noise
    wx, wy, wz = canvas.world
    if body.table:
        back = extent_y(body)[1] - 12.0
        curve = wy[None, :] - (back - (wx[:, None] / 200.0) ** 2 * 22.0)
        edge = sheet(curve.astype(np.float32), 4.0, float(canvas.spacing[1]))
        edge = edge * (np.abs(wx) < 185.0)[:, None]
        free = (1.0 - canvas.body_cover) * edge[:, :, None]
        canvas.hu += free.astype(np.float32) * (-250.0 - canvas.hu)
    circle = ((wx - body.fov_centre[0])[:, None] ** 2 + (wy - body.fov_centre[1])[None, :] ** 2
              > body.fov_radius**2)
    canvas.hu[circle] = AIR
    low, high = scanned_z(body)
    canvas.hu[:, :, (wz < low) | (wz > high)] = AIR
    volume = np.full(canvas.full, int(AIR), np.int16)
    np.rint(canvas.hu, out=canvas.hu)
    volume[canvas.drawn] = np.minimum(np.maximum(canvas.hu, -1024.0), 3071.0)
    return volume
