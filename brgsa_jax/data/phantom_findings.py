"""The 33 findings as physical changes of a phantom chest.

Every finding is a pair of functions. `plan` chooses where and how large from the finding's own
random stream and returns `Lesion`s (one per location that would be boxed); `draw` changes the
canvas. Planning touches no voxel, so labels, report and geometry do not depend on resolution.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from scipy.spatial import cKDTree

from brgsa_jax.data.phantom_anatomy import (
    SIDES,
    SIGN,
    Body,
    Canvas,
    Slices,
    Tube,
    cover,
    lobe,
    sheet,
    spine_y,
)

Rng = np.random.Generator


class Lesion(NamedTuple):
    """One place of one finding.

    Attributes:
        finding: canonical name.
        side: "right", "left" or "" (midline).
        place: words for the report, e.g. "upper lobe", "aortic arch".
        size: largest diameter or thickness, mm.
        severity: 0 (barely visible) to 1.
        data: what its drawing needs.
    """

    finding: str
    side: str
    place: str
    size: float
    severity: float
    data: dict[str, Any]


class Finding(NamedTuple):
    """How a finding is planned and drawn; `stage` orders the drawing."""

    plan: Callable[[Rng, Body, float], list[Lesion]]
    draw: Callable[[Canvas, Lesion], None]
    stage: str


# Drawn in this order.
STAGES = ("diffuse", "airspace", "airway", "focal", "mediastinum", "pleura", "bone",
          "device")


def severity(rng: Rng) -> float:
    """One case in five is subtle, the others are plain."""
    return float(rng.uniform(0.0, 0.2) if rng.random() < 0.2 else rng.uniform(0.5, 1.0))


def _lattice(rng: Rng, knots: int = 27) -> np.ndarray:
    return rng.standard_normal((knots,) * 3, dtype=np.float32)


def _pick(rng: Rng, body: Body, count: int, *, sides: tuple[str, ...] = SIDES,
          depth: tuple[float, float] = (5.0, 60.0), z: tuple[float, float] = (-200.0, 200.0),
          y: tuple[float, float] = (-200.0, 200.0), apart: float = 0.0) -> list[tuple[str, Any]]:
    """Picks up to `count` (side, point) in the lungs inside the ranges, `apart` mm from another."""
    chosen: list[tuple[str, Any]] = []
    for _ in range(count):
        side = sides[int(rng.integers(len(sides)))]
        pool = body.pool[side]
        keep = (pool[:, 3] > depth[0]) & (pool[:, 3] < depth[1])
        keep &= (pool[:, 2] > z[0]) & (pool[:, 2] < z[1])
        keep &= (pool[:, 1] > y[0]) & (pool[:, 1] < y[1])
        for _, other in chosen:
            keep &= ((pool[:, :3] - other) ** 2).sum(1) > apart * apart
        rows = np.flatnonzero(keep)
        if not len(rows):
            rows = np.array([int(np.argmax(pool[:, 3] - 0.05 * np.abs(pool[:, 2] - np.clip(
                pool[:, 2], z[0], z[1]))))])
        chosen.append((side, pool[rows[int(rng.integers(len(rows)))], :3]))
    return chosen


def _sides(rng: Rng, both: float = 0.6) -> tuple[str, ...]:
    return SIDES if rng.random() < both else (SIDES[int(rng.integers(2))],)


def _mix(low: float, high: float, s: float) -> float:
    return low + (high - low) * s


def _lung_box(canvas: Canvas, side: str, z: tuple[float, float] = (-130.0, 135.0)) -> Slices:
    a, b = sorted((SIGN[side] * 4.0, SIGN[side] * 135.0))
    return canvas.cut((a, -100, z[0]), (b, 100, z[1])) or tuple(slice(0, 0) for _ in range(3))


def _cells(rng: Rng, canvas: Canvas, where: Slices, inside: np.ndarray, size: float
           ) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Voronoi cells of about `size` mm around a jittered grid, for the voxels `inside` a box.

    Returns:
        flat indices into the box, number of the voxel's cell, distance (mm) to the nearest wall
        between two cells, number of cells.
    """
    index = np.flatnonzero(inside)
    x, y, z = (v.ravel()[index] for v in canvas.coordinates(where))
    points = np.stack([x, y, z], axis=1)
    grid = np.mgrid[-140:141:size, -105:106:size, -135:146:size].reshape(3, -1).T
    seeds = grid + rng.uniform(-0.42, 0.42, grid.shape) * size
    low, high = points.min(0) - 1.5 * size, points.max(0) + 1.5 * size
    seeds = seeds[((seeds > low) & (seeds < high)).all(1)]
    distance, near = cKDTree(seeds).query(points, k=2)
    gap = np.linalg.norm(seeds[near[:, 0]] - seeds[near[:, 1]], axis=1)
    wall = (distance[:, 1] ** 2 - distance[:, 0] ** 2) / (2.0 * gap)
    return index, near[:, 0], wall.astype(np.float32), len(seeds)


# --- CT-RATE-18 ---------------------------------------------------------------------------------

DEVICES = ("pacemaker", "port catheter", "sternal wires", "prosthetic valve", "spinal hardware",
           "central venous catheter")


def _plan_device(rng: Rng, body: Body, s: float) -> list[Lesion]:
    if s < 0.2:
        kind = "central venous catheter" if rng.random() < 0.6 else "sternal wires"
    else:
        kind = DEVICES[int(rng.choice(5, p=[0.27, 0.27, 0.24, 0.1, 0.12]))]
    side = {"pacemaker": "left", "port catheter": SIDES[int(rng.random() < 0.3)],
            "central venous catheter": "right"}.get(kind, "")
    return [Lesion("Medical material", side, kind, 50.0, s, {"kind": kind})]


def _draw_device(canvas: Canvas, lesion: Lesion) -> None:
    body, kind, s = canvas.body, lesion.data["kind"], lesion.severity
    front = -body.cage[1] - 20.0 - 0.5 * body.fat
    metal = 2600.0
    if kind == "pacemaker":
        can = (78.0, front + 6.0, 82.0)
        canvas.ball(can, (27.0, 8.0, 24.0), 3000.0)
        path = [can, (46, -60, 104), (-26, -18, 88), (-27, -8, 20), (-10, -20, -20),
                tuple((body.heart_centre + 0.55 * body.heart_axes[0]
                       * body.heart_frame[:, 0]).tolist())]
        for a, b in zip(path[:-1], path[1:], strict=True):
            canvas.tube(Tube(tuple(map(float, a)), tuple(map(float, b)), 1.5, 1.5), metal)
        canvas.ball(path[-1], 3.0, 3000.0)
    elif kind in ("port catheter", "central venous catheter"):
        sign = SIGN[lesion.side]
        path = [(sign * 40.0, -40.0, 128.0), (-27.0, -18.0, 88.0), (-27.0, -10.0, 15.0)]
        hu = 900.0 if kind == "central venous catheter" else 1800.0
        if kind == "port catheter":
            port = (sign * 70.0, front + 6.0, 78.0)
            canvas.ball(port, (16.0, 8.0, 16.0), 2600.0)
            path.insert(0, port)
        for a, b in zip(path[:-1], path[1:], strict=True):
            canvas.tube(Tube(a, b, 1.5, 1.5), hu)
    elif kind == "sternal wires":
        radius = _mix(2.0, 4.5, s)
        for z in range(-30, 96, 21):
            canvas.ball((0.0, -body.cage[1] - 13.0, z), (9.0, radius, radius), metal)
    elif kind == "prosthetic valve":
        centre = body.heart_centre + [-4.0, -2.0, 16.0]
        for turn in np.linspace(0, 2 * np.pi, 9)[:-1]:
            canvas.ball(centre + 12.0 * np.array([np.cos(turn), 0.6, np.sin(turn)]), 3.6, metal)
        for z in range(-30, 96, 21):
            canvas.ball((0.0, -body.cage[1] - 13.0, z), (9.0, 3.0, 3.0), metal)
    else:
        for sign in (-1.0, 1.0):
            line = [(sign * 16.0, float(spine_y(z)) + 36.0, float(z)) for z in (-95, -45, 5)]
            for a, b in zip(line[:-1], line[1:], strict=True):
                canvas.tube(Tube(a, b, 3.5, 3.5), metal)
            for x, y, z in line:
                canvas.tube(Tube((x, y, z), (sign * 9.0, y - 38.0, z), 3.0, 3.0), metal)


def _plan_arterial_calcification(rng: Rng, body: Body, s: float) -> list[Lesion]:
    count = 1 + int(rng.integers(2)) if s < 0.2 else 4 + int(round(8 * s * rng.uniform(0.6, 1.2)))
    spots = []
    for _ in range(count):
        number = int(rng.choice(len(body.aorta), p=_AORTIC))
        spots.append((number, float(rng.random()), float(rng.uniform(0, 2 * np.pi)),
                      _mix(2.2, 5.0, s) * rng.uniform(0.8, 1.3), float(rng.uniform(700, 1150))))
    place = "aortic arch" if any(2 <= spot[0] <= 5 for spot in spots) else "descending aorta"
    return [Lesion("Arterial wall calcification", "", place, 2 * spot[3], s, {"spot": spot})
            for spot in spots]


_AORTIC = np.array([0.02, 0.05, 0.12, 0.2, 0.18, 0.15, 0.12, 0.1, 0.06])


def _draw_arterial_calcification(canvas: Canvas, lesion: Lesion) -> None:
    number, t, turn, radius, hu = lesion.data["spot"]
    tube = canvas.body.aorta[number]
    a, b = np.array(tube.start), np.array(tube.end)
    along = (b - a) / np.linalg.norm(b - a)
    side = np.cross(along, (0.3, 0.5, 0.81) if abs(along[2]) < 0.8 else (0.9, 0.43, 0.0))
    side /= np.linalg.norm(side)
    up = np.cross(along, side)
    out = np.cos(turn) * side + np.sin(turn) * up
    centre = a + t * (b - a) + out * (tube.r0 + (tube.r1 - tube.r0) * t - 1.5)
    frame = np.stack([out, np.cross(along, out), along], axis=1)
    canvas.ball(centre, (0.55 * radius, 1.2 * radius, 1.9 * radius), hu, frame=frame)


def _plan_cardiomegaly(rng: Rng, body: Body, s: float) -> list[Lesion]:
    width = float(np.sqrt(((body.heart_frame[0] * body.heart_axes) ** 2).sum())) + 4.5
    return [Lesion("Cardiomegaly", "", f"{width / body.cage[0]:.2f}", 2.0 * width, s, {})]


def _draw_cardiomegaly(canvas: Canvas, lesion: Lesion) -> None:
    _heart_box(canvas, 0.0)


def _heart_box(canvas: Canvas, grow: float) -> None:
    """Records the heart's own extent: a change of shape has no paint of its own."""
    body = canvas.body
    reach = np.sqrt(((body.heart_frame * (body.heart_axes + grow)) ** 2).sum(1)) - canvas.h
    where = canvas.cut(body.heart_centre - reach, body.heart_centre + reach)
    if where is not None:
        canvas.note(where, np.full([p.stop - p.start for p in where], 100.0, np.float32))


def _plan_pericardial_effusion(rng: Rng, body: Body, s: float) -> list[Lesion]:
    thick = _mix(5.0, 22.0, s)
    return [Lesion("Pericardial effusion", "", "", thick, s, {"hu": float(rng.uniform(2, 14))})]


def _heart_distance(canvas: Canvas, where: Slices, axes: np.ndarray
                    ) -> tuple[list[np.ndarray], np.ndarray]:
    """Offsets in mm from the heart's centre, and distance in mm from its ellipsoid of `axes`."""
    body = canvas.body
    offset = [c - v for c, v in zip(canvas.coordinates(where), body.heart_centre.tolist(),
                                    strict=True)]
    rho = 0.0
    for column, axis in zip(body.heart_frame.T.tolist(), axes.tolist(), strict=True):
        rho = rho + ((column[0] * offset[0] + column[1] * offset[1] + column[2] * offset[2])
                     / axis) ** 2
    distance = (np.sqrt(rho) - 1.0) * float(axes.mean())
    return offset, distance


def _draw_pericardial_effusion(canvas: Canvas, lesion: Lesion) -> None:
    """A sac of fluid outside the epicardial fat, widest at the dependent, inferior side."""
    body, t = canvas.body, lesion.size
    axes = body.heart_axes + 5.0
    reach = np.sqrt(((body.heart_frame * axes) ** 2).sum(1)) + t + 12.0
    where = canvas.cut(body.heart_centre - reach, body.heart_centre + reach)
    if where is None:
        return
    offset, distance = _heart_distance(canvas, where, axes)
    gravity = np.clip(1.0 + offset[1] / 90.0 - offset[2] / 200.0, 0.5, 1.6)
    alpha = cover(distance - t * gravity, canvas.w) * cover(-distance, canvas.w)
    alpha *= cover(offset[1] - 62.0, canvas.w)
    canvas.paint(where, alpha, lesion.data["hu"], solid=True)


def _coronaries(body: Body) -> dict[str, list[np.ndarray]]:
    """Courses on the heart's surface: points for each artery, body mm."""
    frame, axes, centre = body.heart_frame, body.heart_axes + 2.0, body.heart_centre

    def on_surface(direction: tuple[float, float, float]) -> np.ndarray:
        local = frame.T @ np.array(direction)
        return centre + np.array(direction) / np.sqrt(((local / axes) ** 2).sum())

    return {
        "left anterior descending artery": [on_surface(d) for d in (
            (0.1, -0.25, 1.0), (0.4, -0.7, 0.75), (0.7, -1.0, 0.3), (0.9, -0.9, -0.2))],
        "circumflex artery": [on_surface(d) for d in (
            (0.25, -0.1, 1.0), (0.8, 0.1, 0.75), (1.0, 0.5, 0.1))],
        "right coronary artery": [on_surface(d) for d in (
            (-0.5, -0.7, 0.8), (-0.9, -0.7, 0.2), (-0.8, -0.5, -0.5), (-0.3, -0.1, -1.0))],
    }


def _plan_coronary(rng: Rng, body: Body, s: float) -> list[Lesion]:
    names = list(_coronaries(body))
    vessels = ([names[0]] if s < 0.2 else
               [names[0]] + [n for n in names[1:] if rng.random() < 0.25 + 0.6 * s])
    lesions = []
    for name in vessels:
        count = 1 if s < 0.2 else 2 + int(rng.integers(3))
        spots = [(float(rng.uniform(0.02, 0.95)), _mix(1.6, 3.2, s) * rng.uniform(0.85, 1.2),
                  float(rng.uniform(5, 12)), float(rng.uniform(800, 1400))) for _ in range(count)]
        lesions.append(Lesion("Coronary artery wall calcification", "", name,
                              max(p[2] for p in spots), s, {"spots": spots}))
    return lesions


def _draw_coronary(canvas: Canvas, lesion: Lesion) -> None:
    course = np.array(_coronaries(canvas.body)[lesion.place])
    knots = np.linspace(0, 1, len(course))
    for t, radius, length, hu in lesion.data["spots"]:
        total = float(np.linalg.norm(np.diff(course, axis=0), axis=1).sum())
        ends = [np.array([np.interp(u, knots, course[:, k]) for k in range(3)])
                for u in (t, min(t + length / total, 1.0))]
        canvas.tube(Tube(tuple(ends[0].tolist()), tuple(ends[1].tolist()), radius, radius), hu)


def _plan_hernia(rng: Rng, body: Body, s: float) -> list[Lesion]:
    size = _mix(26.0, 92.0, s)
    return [Lesion("Hiatal hernia", "", "", size, s, {
        "shift": float(rng.normal(2, 5)), "air": bool(rng.random() < 0.8)})]


def _draw_hernia(canvas: Canvas, lesion: Lesion) -> None:
    r = 0.5 * lesion.size
    centre = np.array([8.0 + lesion.data["shift"], 40.0 - 0.15 * r, -78.0 + 0.5 * r])
    canvas.ball(centre, (1.1 * r, 0.72 * r, 1.05 * r), 36.0, solid=True)
    if lesion.data["air"]:
        canvas.ball(centre + [0.0, -0.22 * r, 0.15 * r], (0.72 * r, 0.42 * r, 0.62 * r), -900.0)


NODE_STATIONS = {
    "right paratracheal": (-22, 2, 66), "prevascular": (4, -42, 60),
    "aortopulmonary window": (26, -2, 44), "subcarinal": (2, 26, 20),
    "right hilar": (-46, 20, 10), "left hilar": (50, 16, 14), "lower paratracheal": (-20, 8, 46),
    "left paratracheal": (16, 14, 84),
}


def _plan_nodes(rng: Rng, body: Body, s: float) -> list[Lesion]:
    names = list(NODE_STATIONS)
    count = 1 + int(rng.integers(2)) if s < 0.2 else 5 + int(rng.integers(4))
    lesions = []
    for number in rng.permutation(len(names))[:count].tolist():
        radius = _mix(5.5, 17.0, s) * rng.uniform(0.85, 1.15)
        centre = np.array(NODE_STATIONS[names[number]], float) + rng.normal(0, 2.0, 3)
        side = "right" if centre[0] < -10 else "left" if centre[0] > 20 else ""
        lesions.append(Lesion("Lymphadenopathy", side, names[number], 2.0 * radius, s, {
            "centre": centre, "axes": radius * rng.uniform(0.8, 1.25, 3),
            "hu": float(rng.uniform(38, 62))}))
    return lesions


def _draw_nodes(canvas: Canvas, lesion: Lesion) -> None:
    canvas.ball(lesion.data["centre"], lesion.data["axes"], lesion.data["hu"], solid=True)


def _plan_emphysema(rng: Rng, body: Body, s: float) -> list[Lesion]:
    lattice = _lattice(rng, 35)
    upper = rng.random() < 0.75
    return [Lesion("Emphysema", side, "upper lobe" if upper else "lower lobe", 0.0, s,
                   {"lattice": lattice, "upper": upper}) for side in SIDES]


def _draw_emphysema(canvas: Canvas, lesion: Lesion) -> None:
    where = _lung_box(canvas, lesion.side)
    s = lesion.severity
    level = np.clip((canvas.z[where] + 20.0) / 70.0, -1.0, 1.0)
    level = level if lesion.data["upper"] else -level
    field = canvas.noise(lesion.data["lattice"], where)
    alpha = np.clip((field + 0.9 * level - _mix(1.5, -0.7, s)) * 2.2, 0.0, 1.0)
    alpha *= canvas.lung[where]
    canvas.paint(where, alpha * np.float32(_mix(0.7, 0.95, s)), -985.0)


def _plan_atelectasis(rng: Rng, body: Body, s: float) -> list[Lesion]:
    lesions = []
    for side in _sides(rng, 0.2 if s < 0.2 else 0.65):
        pick = _pick(rng, body, 1, sides=(side,), depth=(8, 40), z=(-100, -25), y=(-20, 75))[0][1]
        lesions.append(Lesion("Atelectasis", side, lobe(pick), _mix(3.0, 11.0, s), s, {
            "centre": pick, "tilt": rng.normal(0, 0.25, 2), "bands": 1 if s < 0.2 else 2,
            "extent": _mix(25.0, 58.0, s)}))
    return lesions


def _draw_atelectasis(canvas: Canvas, lesion: Lesion) -> None:
    """Plate-like bands and a dorsobasal wedge of collapsed lung, fanning to the pleura."""
    centre, extent, thick = lesion.data["centre"], lesion.data["extent"], lesion.size
    for band in range(lesion.data["bands"]):
        middle = centre + [0.0, -8.0 * band, 26.0 * band]
        where = canvas.cut(middle - extent, middle + extent)
        if where is None:
            continue
        x, y, z = canvas.coordinates(where)
        dx, dy = x - middle[0], y - middle[1]
        tilt = lesion.data["tilt"]
        plane = z - middle[2] - (tilt[0] + 0.25 * band) * dx - (0.35 + tilt[1]) * dy
        alpha = sheet(plane, thick, max(canvas.w, 0.6 * float(canvas.h[2])))
        alpha *= cover(np.sqrt(dx * dx + dy * dy) - 0.9 * extent, 12.0) * canvas.lung[where]
        canvas.paint(where, alpha, 5.0)
    if lesion.severity > 0.5:
        where = _lung_box(canvas, lesion.side, (-130.0, 0.0))
        side = lesion.side
        y, z = canvas.y[where], canvas.z[where]
        low = canvas.body.dome[side]
        wedge = cover(62.0 - 16.0 * lesion.severity - y + 0.35 * (z - low + 40.0), 10.0)
        wedge *= cover(z - low + 5.0, 18.0)
        canvas.paint(where, wedge * canvas.lung[where], 20.0)


def _plan_nodule(rng: Rng, body: Body, s: float) -> list[Lesion]:
    count = 1 if s < 0.2 else 4 + int(rng.integers(5))
    lesions = []
    for side, point in _pick(rng, body, count, depth=(9, 30), z=(-75, 110), apart=28.0):
        diameter = _mix(4.5, 25.0, s) * rng.uniform(0.75, 1.2)
        lesions.append(Lesion("Lung nodule", side, lobe(point), min(diameter, 29.0), s, {
            "centre": point, "hu": float(rng.uniform(20, 90))
            if rng.random() < 0.9 else float(rng.uniform(300, 600))}))
    return sorted(lesions, key=lambda lesion: -lesion.size)


def _draw_nodule(canvas: Canvas, lesion: Lesion) -> None:
    canvas.ball(lesion.data["centre"], 0.5 * lesion.size, lesion.data["hu"], solid=True)


def _plan_opacity(rng: Rng, body: Body, s: float) -> list[Lesion]:
    count = 1 if s < 0.2 else 4 + int(rng.integers(4))
    lattice = _lattice(rng)
    return [Lesion("Lung opacity", side, lobe(point), 2 * radius, s, {
        "centre": point, "lattice": lattice, "hu": float(rng.uniform(-590, -420))})
        for (side, point), radius in (
            (p, _mix(13.0, 44.0, s) * rng.uniform(0.85, 1.2))
            for p in _pick(rng, body, count, depth=(8, 32), z=(-85, 100), apart=35.0))]


def _draw_opacity(canvas: Canvas, lesion: Lesion) -> None:
    """Ground glass: hazy, vessels stay visible because they are drawn afterwards."""
    r = 0.5 * lesion.size
    canvas.ball(lesion.data["centre"], (r, 0.9 * r, 1.1 * r), lesion.data["hu"], mask=canvas.lung,
                rough=lesion.data["lattice"], bumps=0.28, soft=1.6, strength=0.92)


def _plan_sequela(rng: Rng, body: Body, s: float) -> list[Lesion]:
    lesions = []
    for side in _sides(rng, 0.3 if s < 0.2 else 0.8):
        root = np.array([SIGN[side] * 46.0, 12.0, body.apex[side] - 34.0])
        ends = [root + rng.normal(0, [16, 22, 8]) + [0, 0, rng.uniform(14, 30)] for _ in range(5)]
        lesions.append(Lesion("Pulmonary fibrotic sequela", side, "apex", _mix(4.0, 17.0, s), s, {
            "root": root, "ends": ends[:2 + int(3 * s)], "lattice": _lattice(rng, 35),
            "spot": bool(rng.random() < 0.4)}))
    return lesions


def _draw_sequela(canvas: Canvas, lesion: Lesion) -> None:
    """Apical pleuroparenchymal cap with strands that pull towards the hilum."""
    body, side, s = canvas.body, lesion.side, lesion.severity
    where = _lung_box(canvas, side, (60.0, 140.0))
    x, y, z = canvas.coordinates(where)
    dx = x - SIGN[side] * 48.0
    depth = 0.6 * (body.apex[side] - (dx * dx + (y - 10.0) ** 2) / 50.0 - z)
    rough = canvas.noise(lesion.data["lattice"], where)
    alpha = cover(depth - lesion.size * (0.9 + 0.55 * rough), 0.8 * canvas.w)
    alpha *= cover(body.apex[side] - 48.0 - z, 15.0) * canvas.lung[where]
    canvas.paint(where, alpha, 10.0)
    for end in lesion.data["ends"]:
        canvas.tube(Tube(tuple(lesion.data["root"].tolist()), tuple(end.tolist()),
                         _mix(1.0, 2.6, s), _mix(1.5, 4.0, s)), 0.0, mask=canvas.lung)
    if lesion.data["spot"]:
        canvas.ball(lesion.data["ends"][0], _mix(1.5, 3.5, s), 500.0, mask=canvas.lung)


def _plan_effusion(rng: Rng, body: Body, s: float) -> list[Lesion]:
    return [Lesion("Pleural effusion", side, "", _mix(7.0, 46.0, s) * rng.uniform(0.8, 1.15), s,
                   {"hu": float(rng.uniform(2, 18))}) for side in _sides(rng, 0.6)]


def _draw_effusion(canvas: Canvas, lesion: Lesion) -> None:
    """Fluid layers dorsally; its surface rises along the chest wall (meniscus)."""
    side, t = lesion.side, lesion.size
    where = _lung_box(canvas, side)
    y, z = canvas.y[where], canvas.z[where]
    wall = canvas.wall[where]
    reach = np.clip(1.0 - (z - canvas.body.dome[side] + 10.0) / (70.0 + 2.2 * t), 0.0, 1.15)
    level = canvas.body.cage[1] - t * reach - 12.0 * np.clip(1.0 + wall / 18.0, 0.0, 1.0) * reach
    alpha = cover(level - y, canvas.w) * (reach > 0.02) * canvas.sides[side][where]
    canvas.paint(where, alpha, lesion.data["hu"], solid=True)


def _plan_mosaic(rng: Rng, body: Body, s: float) -> list[Lesion]:
    seed = int(rng.integers(2**31))
    return [Lesion("Mosaic attenuation pattern", side, "both lungs", 0.0, s, {
        "seed": seed + number, "size": float(rng.uniform(20, 30))})
        for number, side in enumerate(SIDES)]


def _draw_mosaic(canvas: Canvas, lesion: Lesion) -> None:
    """Lobules of two attenuations with sharp polygonal borders, in all zones."""
    where = _lung_box(canvas, lesion.side)
    lung = canvas.lung[where]
    rng = np.random.default_rng(lesion.data["seed"])
    index, cell, _, count = _cells(rng, canvas, where, lung > 0.02, lesion.data["size"])
    up = _mix(45.0, 185.0, lesion.severity)
    value = np.where(rng.random(count) < 0.5, up, -0.45 * up).astype(np.float32)
    change = np.zeros_like(lung)
    change.ravel()[index] = value[cell]
    region = canvas.hu[where]
    change *= lung
    np.maximum(region + change, -985.0, out=region, where=lung > 0.02)
    canvas.note(where, np.abs(change))


def _plan_peribronchial(rng: Rng, body: Body, s: float) -> list[Lesion]:
    return [Lesion("Peribronchial thickening", side, "central", _mix(1.5, 5.0, s), s,
                   {"hu": float(rng.uniform(-20, 40))}) for side in
            (SIDES if s > 0.2 else _sides(rng, 0.5))]


def _draw_peribronchial(canvas: Canvas, lesion: Lesion) -> None:
    """Soft-tissue cuffs round the segmental bronchi."""
    for tube in canvas.body.bronchi[lesion.side]:
        canvas.shell(tube, lesion.size, lesion.data["hu"], grow=0.5, mask=canvas.lung)
        canvas.tube(tube, -960.0)
    if lesion.severity > 0.5:
        for tube in canvas.body.bronchi[lesion.side + " fine"]:
            canvas.shell(tube, 0.6 * lesion.size, lesion.data["hu"], mask=canvas.lung)


def _plan_consolidation(rng: Rng, body: Body, s: float) -> list[Lesion]:
    count = 1 if s < 0.2 else 1 + int(rng.integers(1, 4))
    lattice = _lattice(rng)
    lesions = []
    for side, point in _pick(rng, body, count, depth=(9, 32), z=(-80, 90), y=(-55, 70), apart=40.0):
        radius = _mix(11.0, 36.0, s) * rng.uniform(0.8, 1.15)
        out = point - np.array([SIGN[side] * 30.0, 20.0, 8.0])
        out /= np.linalg.norm(out)
        bronchi = []
        for _ in range(4):
            start = point - 0.9 * radius * out + rng.normal(0, 0.15 * radius, 3)
            end = point + 0.5 * radius * out + rng.normal(0, 0.3 * radius, 3)
            bronchi.append(Tube(tuple(start.tolist()), tuple(end.tolist()), 1.9, 1.1))
        lesions.append(Lesion("Consolidation", side, lobe(point), 2 * radius, s, {
            "centre": point, "lattice": lattice, "hu": float(rng.uniform(15, 55)),
            "bronchi": bronchi}))
    return lesions


def _draw_consolidation(canvas: Canvas, lesion: Lesion) -> None:
    """Airless lung in which the bronchi stay open: the air bronchogram."""
    r = 0.5 * lesion.size
    canvas.ball(lesion.data["centre"], (r, 0.95 * r, r), lesion.data["hu"], mask=canvas.lung,
                rough=lesion.data["lattice"], bumps=0.22, soft=1.3)
    for tube in lesion.data["bronchi"]:
        canvas.tube(tube, -920.0, mask=canvas.lung)


def _plan_bronchiectasis(rng: Rng, body: Body, s: float) -> list[Lesion]:
    lesions = []
    count = 1 if s < 0.2 else 3 + int(rng.integers(3))
    for side, point in _pick(rng, body, count, depth=(16, 40), z=(-80, 5), y=(-30, 80),
                             apart=30.0):
        inward = np.array([SIGN[side] * 40.0, 28.0, -5.0])
        tubes = []
        for _ in range(1 if s < 0.2 else 7):
            start = point + rng.normal(0, 11.0, 3)
            along = start - inward
            along /= np.linalg.norm(along)
            r = _mix(2.0, 6.5, s) * rng.uniform(0.75, 1.2)
            end = start + along * rng.uniform(14, 26)
            tubes.append(Tube(tuple(start.tolist()), tuple(end.tolist()), 0.8 * r, 1.1 * r))
        lesions.append(Lesion("Bronchiectasis", side, lobe(point), 2 * tubes[0].r1, s, {
            "tubes": tubes, "wall": _mix(1.0, 3.2, s)}))
    return lesions


def _draw_bronchiectasis(canvas: Canvas, lesion: Lesion) -> None:
    for tube in lesion.data["tubes"]:
        canvas.shell(tube, lesion.data["wall"], 30.0, mask=canvas.lung)
    for tube in lesion.data["tubes"]:
        canvas.tube(tube, -995.0, mask=canvas.lung)


def _plan_septal(rng: Rng, body: Body, s: float) -> list[Lesion]:
    seed = int(rng.integers(2**31))
    sides = SIDES if s > 0.2 else _sides(rng, 0.3)
    return [Lesion("Interlobular septal thickening", side, "lower lobe", 0.0, s,
                   {"seed": seed + number}) for number, side in enumerate(sides)]


def _draw_septal(canvas: Canvas, lesion: Lesion) -> None:
    """A net of thickened lobular walls in the outer lung, densest at the bases."""
    where = _lung_box(canvas, lesion.side, (-130.0, _mix(-10.0, 100.0, lesion.severity)))
    lung = canvas.lung[where]
    outer = (lung > 0.02) & (canvas.wall[where] > -_mix(18.0, 44.0, lesion.severity))
    if not outer.any():
        return
    rng = np.random.default_rng(lesion.data["seed"])
    index, _, wall, _ = _cells(rng, canvas, where, outer, 19.0)
    alpha = np.zeros_like(lung)
    alpha.ravel()[index] = sheet(wall, _mix(0.9, 2.6, lesion.severity), canvas.w)
    canvas.paint(where, alpha * lung, 20.0)


# --- CT-RATE-LT-15 ------------------------------------------------------------------------------

def _plan_pneumonia(rng: Rng, body: Body, s: float) -> list[Lesion]:
    side, point = _pick(rng, body, 1, depth=(14, 40), z=(-70, 70))[0]
    buds = [point + rng.normal(0, 26.0, 3) for _ in range(10)]
    return [Lesion("Pneumonia", side, lobe(point), 2 * _mix(14.0, 40.0, s), s, {
        "centre": point, "lattice": _lattice(rng), "buds": buds})]


def _draw_pneumonia(canvas: Canvas, lesion: Lesion) -> None:
    """A segmental airspace focus: dense core, ground-glass halo, small centrilobular nodules."""
    r, rough = 0.5 * lesion.size, lesion.data["lattice"]
    canvas.ball(lesion.data["centre"], 1.35 * r, -480.0, mask=canvas.lung, rough=rough, bumps=0.3,
                soft=2.0, strength=0.9)
    canvas.ball(lesion.data["centre"], 0.75 * r, -10.0, mask=canvas.lung, rough=rough, bumps=0.35,
                soft=1.5)
    for bud in lesion.data["buds"]:
        canvas.ball(bud, 3.0, -150.0, mask=canvas.lung)


def _plan_pneumothorax(rng: Rng, body: Body, s: float) -> list[Lesion]:
    side = SIDES[int(rng.integers(2))]
    return [Lesion("Pneumothorax", side, "", _mix(5.0, 34.0, s), s, {})]


def _draw_pneumothorax(canvas: Canvas, lesion: Lesion) -> None:
    """Air without vessels between the chest wall and the edge of a collapsing lung, anteriorly."""
    side, t = lesion.side, lesion.size
    where = _lung_box(canvas, side)
    x, y, z = canvas.coordinates(where)
    lung = canvas.sides[side][where]
    thick = t * np.clip(0.75 - y / 95.0, 0.0, 1.5) + t * np.clip((z - 70.0) / 60.0, 0.0, 0.6)
    dx = x - SIGN[side] * 48.0
    top = 0.6 * (canvas.body.apex[side] - (dx * dx + (y - 10.0) ** 2) / 50.0 - z)
    depth = np.minimum(-canvas.wall[where], top) - thick
    lost = cover(-depth, canvas.w)
    canvas.paint(where, (1.0 - lost) * lung * 0.10, 40.0)
    free = cover(depth, canvas.w) * (thick > 0.5)
    canvas.paint(where, free * lung, -1000.0)
    edge = sheet(depth, 1.2, canvas.w) * lung * (thick > 0.5)
    canvas.paint(where, edge, 0.0)


def _plan_empyema(rng: Rng, body: Body, s: float) -> list[Lesion]:
    side = SIDES[int(rng.integers(2))]
    return [Lesion("Empyema", side, "posterolateral", _mix(18.0, 42.0, s), s,
                   {"z": float(rng.uniform(-45, 10)), "bubbles": rng.uniform(-1, 1, (4, 3))})]


def _draw_empyema(canvas: Canvas, lesion: Lesion) -> None:
    """A lens of loculated fluid on the pleura with a thick rim and gas bubbles."""
    sign, r = SIGN[lesion.side], lesion.size
    ax, ay = canvas.body.cage
    centre = np.array([sign * 0.66 * ax, 0.62 * ay, lesion.data["z"]])
    out = np.array([sign * 0.72, 0.69, 0.0])
    frame = np.stack([out, np.cross((0, 0, 1.0), out), (0, 0, 1.0)], axis=1)
    mask = canvas.sides[lesion.side]
    axes = np.array([0.8 * r, 1.35 * r, 1.5 * r])
    canvas.ball(centre, axes + 4.0, 75.0, frame=frame, mask=mask, solid=True)
    canvas.ball(centre, axes, 22.0, frame=frame, mask=mask, solid=True)
    for bubble in lesion.data["bubbles"]:
        canvas.ball(centre + bubble * 0.4 * r + [0, -0.25 * r, 0], 0.16 * r + 1.5, -850.0,
                    mask=mask)


def _plan_tuberculosis(rng: Rng, body: Body, s: float) -> list[Lesion]:
    side = SIDES[int(rng.integers(2))]
    centre = np.array([SIGN[side] * rng.uniform(48, 62), rng.uniform(5, 35), rng.uniform(55, 80)])
    return [Lesion("Tuberculosis", side, "upper lobe", _mix(16.0, 46.0, s), s, {
        "centre": centre, "buds": [centre + rng.normal(0, [20, 22, 22]) for _ in range(28)]})]


def _draw_tuberculosis(canvas: Canvas, lesion: Lesion) -> None:
    """A thick-walled apical cavity and a spray of tree-in-bud nodules around it."""
    r = 0.5 * lesion.size
    for bud in lesion.data["buds"]:
        canvas.ball(bud, 2.6, 20.0, mask=canvas.lung)
    canvas.ball(lesion.data["centre"], r, 35.0, mask=canvas.lung, solid=True)
    canvas.ball(lesion.data["centre"], max(r - 6.0, 0.5 * r), -960.0)


def _plan_fibrosis(rng: Rng, body: Body, s: float) -> list[Lesion]:
    seed = int(rng.integers(2**31))
    return [Lesion("Pulmonary fibrosis", side, "lower lobe", _mix(8.0, 26.0, s), s,
                   {"seed": seed + number}) for number, side in enumerate(SIDES)]


def _draw_fibrosis(canvas: Canvas, lesion: Lesion) -> None:
    """Subpleural basal honeycombing: small air cells with thick fibrous walls."""
    where = _lung_box(canvas, lesion.side, (-130.0, 15.0))
    lung = canvas.lung[where]
    z = canvas.z[where]
    base = z - (canvas.body.dome[lesion.side] + 14.0)
    rind = (lung > 0.02) & ((canvas.wall[where] > -lesion.size) | (base < -10.0))
    rind &= canvas.y[where] > -45.0
    if not rind.any():
        return
    rng = np.random.default_rng(lesion.data["seed"])
    index, _, wall, _ = _cells(rng, canvas, where, rind, 9.0)
    alpha = np.zeros_like(lung)
    alpha.ravel()[index] = sheet(wall, 3.0, canvas.w)
    canvas.paint(where, alpha * lung, 0.0)
    canvas.paint(where, rind * lung * (1.0 - alpha) * 0.35, -960.0)


def _plan_cyst(rng: Rng, body: Body, s: float) -> list[Lesion]:
    count = 1 if s < 0.2 else 1 + int(rng.integers(3))
    return [Lesion("Lung cyst", side, lobe(point), _mix(10.0, 44.0, s) * rng.uniform(0.8, 1.1), s,
                   {"centre": point})
            for side, point in _pick(rng, body, count, depth=(14, 36), z=(-70, 95), apart=50.0)]


def _draw_cyst(canvas: Canvas, lesion: Lesion) -> None:
    r = 0.5 * lesion.size
    canvas.ball(lesion.data["centre"], r + 1.5, -250.0, mask=canvas.lung)
    canvas.ball(lesion.data["centre"], r, -995.0, mask=canvas.lung)


def _plan_bronchial(rng: Rng, body: Body, s: float) -> list[Lesion]:
    return [Lesion("Bronchial thickening", "", "main and lobar bronchi", _mix(1.5, 4.5, s), s, {})]


def _draw_bronchial(canvas: Canvas, lesion: Lesion) -> None:
    """Thick walls of the trachea's bifurcation, the main and the lobar bronchi."""
    bronchi = canvas.body.bronchi
    tubes = bronchi["central"][1:] + [t for side in SIDES for t in bronchi[side] if t.r0 > 3.5]
    for tube in tubes:
        canvas.shell(tube, lesion.size, 45.0)
    for tube in tubes:
        canvas.tube(tube, -965.0)


def _plan_mass(rng: Rng, body: Body, s: float) -> list[Lesion]:
    size = _mix(33.0, 72.0, s)
    side, point = _pick(rng, body, 1, depth=(0.28 * size, 60), z=(-55, 85))[0]
    spikes = rng.normal(size=(14, 3))
    spikes /= np.linalg.norm(spikes, axis=1, keepdims=True)
    return [Lesion("Lung mass", side, lobe(point), size, s, {
        "centre": point, "lattice": _lattice(rng), "spikes": spikes})]


def _draw_mass(canvas: Canvas, lesion: Lesion) -> None:
    """More than 30 mm of soft tissue, lobulated and spiculated."""
    r, centre = 0.5 * lesion.size, lesion.data["centre"]
    for spike in lesion.data["spikes"]:
        canvas.tube(Tube(tuple((centre + 0.8 * r * spike).tolist()),
                         tuple((centre + 1.45 * r * spike).tolist()), 2.6, 0.6), -50.0,
                    mask=canvas.lung)
    canvas.ball(centre, r, 46.0, mask=canvas.lung, rough=lesion.data["lattice"], bumps=0.1,
                solid=True)


def _disc_heights(body: Body, low: float, high: float) -> list[float]:
    """Heights z (mm) of the intervertebral discs between `low` and `high`."""
    first = np.ceil((low + body.vertebra_phase) / 25.0)
    last = np.floor((high + body.vertebra_phase) / 25.0)
    return [25.0 * k - body.vertebra_phase for k in np.arange(first, last + 1)]


def _plan_osteophyte(rng: Rng, body: Body, s: float) -> list[Lesion]:
    heights = _disc_heights(body, -85.0, 60.0)
    count = 1 if s < 0.2 else min(len(heights), 3 + int(rng.integers(3)))
    chosen = sorted(rng.permutation(len(heights))[:count].tolist())
    return [Lesion("Osteophyte", "right", "thoracic vertebrae", _mix(5.0, 12.0, s), s,
                   {"z": heights[k]}) for k in chosen]


def _draw_osteophyte(canvas: Canvas, lesion: Lesion) -> None:
    """Bony beaks at the anterior and right corners of the end plates beside a disc."""
    r, z = 0.5 * lesion.size, lesion.data["z"]
    y = float(spine_y(z))
    for turn in (-0.25, 0.25, 0.75, 1.2):
        centre = (-np.sin(turn) * (19.0 + 0.5 * r), y - np.cos(turn) * (16.0 + 0.5 * r), z)
        canvas.ball(centre, (r, r, 1.3 * r), 850.0, solid=True)


def _plan_rib_fracture(rng: Rng, body: Body, s: float) -> list[Lesion]:
    side = SIDES[int(rng.integers(2))]
    start = float(rng.uniform(-20, 45))
    count = 1 if s < 0.2 else 3
    turn = float(rng.uniform(0.3, 0.62))
    return [Lesion("Rib fracture", side, f"{4 + number}th-{5 + number}th", _mix(7.0, 17.0, s), s, {
        "turn": turn + float(rng.normal(0, 0.02)), "z": start - 25.0 * number})
        for number in range(count)]


def _draw_rib_fracture(canvas: Canvas, lesion: Lesion) -> None:
    """A gap with displaced ends, callus, and a haematoma that bulges into the pleural space."""
    body, r = canvas.body, 0.5 * lesion.size
    angle = np.pi * lesion.data["turn"]
    out = np.array([SIGN[lesion.side] * np.sin(angle), np.cos(angle), 0.0])
    ax, ay = body.cage
    low, high = 60.0, 160.0
    for _ in range(24):
        middle = 0.5 * (low + high)
        u, v = (middle * out[0] / ax) ** 2, (middle * out[1] / ay) ** 2
        low, high = (middle, high) if u + v - 0.35 * u * v < 1.0 else (low, middle)
    turn = lesion.data["turn"]
    slope = 95.0 * turn - 22.0 * turn * turn + body.rib_phase
    z = (np.round((lesion.data["z"] + slope) / 25.0 - 0.5) + 0.5) * 25.0 - slope
    centre = out * low + [0, 0, z]
    tangent = np.array([out[1], -out[0], 0.0])
    canvas.ball(centre - 2.0 * out, (1.3 * r, 1.3 * r, 1.1 * r), 55.0, solid=True)
    for sign in (-1.0, 1.0):
        canvas.ball(centre + sign * 0.8 * r * tangent + (5.0 + 3.5 * sign) * out,
                    (0.7 * r, 0.7 * r, 0.8 * r), 1000.0, solid=True)


def _plan_atherosclerosis(rng: Rng, body: Body, s: float) -> list[Lesion]:
    return [Lesion("Atherosclerosis", "", "thoracic aorta", _mix(2.0, 5.0, s), s,
                   {"lattice": _lattice(rng, 35)})]


def _draw_atherosclerosis(canvas: Canvas, lesion: Lesion) -> None:
    """Irregular mural thickening of an ectatic, tortuous aorta, in part calcified."""
    for tube in canvas.body.aorta[2:]:
        canvas.shell(tube, lesion.size, 62.0)
        found = canvas.tube_distance(tube, tube.r0 + 6.0 + canvas.w)
        if found is None:
            continue
        where, distance, radius = found
        rough = canvas.noise(lesion.data["lattice"], where)
        alpha = sheet(distance - radius - 1.0, 2.5, canvas.w)
        alpha *= np.clip((rough - _mix(1.4, 0.5, lesion.severity)) * 3.0, 0.0, 1.0)
        canvas.paint(where, alpha, 750.0)


def _plan_pericardial_calcification(rng: Rng, body: Body, s: float) -> list[Lesion]:
    return [Lesion("Pericardial calcification", "", "", _mix(1.5, 4.5, s), s,
                   {"lattice": _lattice(rng, 23)})]


def _draw_pericardial_calcification(canvas: Canvas, lesion: Lesion) -> None:
    """Plates of lime on the pericardium, mostly over the ventricles."""
    body = canvas.body
    axes = body.heart_axes + 4.0
    reach = np.sqrt(((body.heart_frame * axes) ** 2).sum(1)) + 8.0
    where = canvas.cut(body.heart_centre - reach, body.heart_centre + reach)
    if where is None:
        return
    offset, distance = _heart_distance(canvas, where, axes)
    patch = np.clip((canvas.noise(lesion.data["lattice"], where)
                     - _mix(1.2, -0.1, lesion.severity) - offset[2] / 90.0) * 3.0, 0.0, 1.0)
    canvas.paint(where, sheet(distance, lesion.size, canvas.w) * patch, 1000.0)


def _plan_spondylosis(rng: Rng, body: Body, s: float) -> list[Lesion]:
    return [Lesion("Spondylosis", "", "thoracic spine", _mix(2.0, 6.0, s), s, {
        "heights": _disc_heights(body, -110.0, 70.0)[: 2 if s < 0.2 else 8]})]


def _draw_spondylosis(canvas: Canvas, lesion: Lesion) -> None:
    """Narrow discs between sclerotic end plates, with small marginal lips."""
    for z in lesion.data["heights"]:
        where = canvas.cut((-26, 40, z - 14), (26, 95, z + 14))
        if where is None:
            continue
        x, y, height = canvas.coordinates(where)
        rho = np.sqrt((x / 20.5) ** 2 + ((y - spine_y(height)) / 17.5) ** 2)
        inside = cover(rho - 1.0, canvas.w / 19.0)
        for sign in (-1.0, 1.0):
            plate = sheet(height - z - sign * (0.6 + 0.5 * lesion.size), lesion.size,
                          float(canvas.h[2]))
            canvas.paint(where, plate * inside, 780.0)


def _plan_pleural_calcification(rng: Rng, body: Body, s: float) -> list[Lesion]:
    return [Lesion("Pleural calcification", side, "", _mix(1.8, 5.0, s), s,
                   {"lattice": _lattice(rng, 23)}) for side in _sides(rng, 0.6)]


def _draw_pleural_calcification(canvas: Canvas, lesion: Lesion) -> None:
    """Calcified plaques on the parietal pleura, posterolateral and lower half."""
    where = _lung_box(canvas, lesion.side, (-120.0, 80.0))
    a, b = sorted((SIGN[lesion.side] * 20.0, SIGN[lesion.side] * 145.0))
    where = canvas.cut((a, -80, -120), (b, 110, 80)) or where
    patch = np.clip((canvas.noise(lesion.data["lattice"], where)
                     - _mix(1.3, 0.2, lesion.severity)) * 3.0, 0.0, 1.0)
    alpha = sheet(canvas.wall[where] + 0.5 * lesion.size, lesion.size, canvas.w)
    low = cover(canvas.body.dome[lesion.side] - 45.0 - canvas.z[where], 10.0)
    canvas.paint(where, alpha * patch * low, 900.0)


def _plan_pneumomediastinum(rng: Rng, body: Body, s: float) -> list[Lesion]:
    return [Lesion("Pneumomediastinum", "", "", _mix(3.0, 8.0, s), s,
                   {"lattice": _lattice(rng, 35)})]


def _draw_pneumomediastinum(canvas: Canvas, lesion: Lesion) -> None:
    """Streaks of free air in the mediastinal fat, round trachea, aorta and heart."""
    where = canvas.cut((-45, -88, -60), (50, 50, 130))
    if where is None:
        return
    region = canvas.hu[where]
    fat = np.clip((-35.0 - region) / 25.0, 0.0, 1.0) * (region > -260.0)
    fat *= cover(canvas.wall[where] + 2.0, canvas.w)
    fat *= 1.0 - np.minimum(canvas.lung[where] * 3.0, 1.0)
    streak = np.clip((canvas.noise(lesion.data["lattice"], where)
                      - _mix(1.0, -0.4, lesion.severity)) * 2.5, 0.0, 1.0)
    canvas.paint(where, fat * streak, -985.0)


FINDINGS: dict[str, Finding] = {
    "Medical material": Finding(_plan_device, _draw_device, "device"),
    "Arterial wall calcification": Finding(
        _plan_arterial_calcification, _draw_arterial_calcification, "mediastinum"),
    "Cardiomegaly": Finding(_plan_cardiomegaly, _draw_cardiomegaly, "mediastinum"),
    "Pericardial effusion": Finding(
        _plan_pericardial_effusion, _draw_pericardial_effusion, "mediastinum"),
    "Coronary artery wall calcification": Finding(_plan_coronary, _draw_coronary, "mediastinum"),
    "Hiatal hernia": Finding(_plan_hernia, _draw_hernia, "mediastinum"),
    "Lymphadenopathy": Finding(_plan_nodes, _draw_nodes, "mediastinum"),
    "Emphysema": Finding(_plan_emphysema, _draw_emphysema, "diffuse"),
    "Atelectasis": Finding(_plan_atelectasis, _draw_atelectasis, "airspace"),
    "Lung nodule": Finding(_plan_nodule, _draw_nodule, "focal"),
    "Lung opacity": Finding(_plan_opacity, _draw_opacity, "diffuse"),
    "Pulmonary fibrotic sequela": Finding(_plan_sequela, _draw_sequela, "airspace"),
    "Pleural effusion": Finding(_plan_effusion, _draw_effusion, "pleura"),
    "Mosaic attenuation pattern": Finding(_plan_mosaic, _draw_mosaic, "diffuse"),
    "Peribronchial thickening": Finding(_plan_peribronchial, _draw_peribronchial, "airway"),
    "Consolidation": Finding(_plan_consolidation, _draw_consolidation, "airspace"),
    "Bronchiectasis": Finding(_plan_bronchiectasis, _draw_bronchiectasis, "focal"),
    "Interlobular septal thickening": Finding(_plan_septal, _draw_septal, "airspace"),
    "Pneumonia": Finding(_plan_pneumonia, _draw_pneumonia, "airspace"),
    "Pneumothorax": Finding(_plan_pneumothorax, _draw_pneumothorax, "pleura"),
    "Empyema": Finding(_plan_empyema, _draw_empyema, "pleura"),
    "Tuberculosis": Finding(_plan_tuberculosis, _draw_tuberculosis, "focal"),
    "Pulmonary fibrosis": Finding(_plan_fibrosis, _draw_fibrosis, "airspace"),
    "Lung cyst": Finding(_plan_cyst, _draw_cyst, "focal"),
    "Bronchial thickening": Finding(_plan_bronchial, _draw_bronchial, "airway"),
    "Lung mass": Finding(_plan_mass, _draw_mass, "focal"),
    "Osteophyte": Finding(_plan_osteophyte, _draw_osteophyte, "bone"),
    "Rib fracture": Finding(_plan_rib_fracture, _draw_rib_fracture, "bone"),
    "Atherosclerosis": Finding(_plan_atherosclerosis, _draw_atherosclerosis, "mediastinum"),
    "Pericardial calcification": Finding(
        _plan_pericardial_calcification, _draw_pericardial_calcification, "mediastinum"),
    "Spondylosis": Finding(_plan_spondylosis, _draw_spondylosis, "bone"),
    "Pleural calcification": Finding(
        _plan_pleural_calcification, _draw_pleural_calcification, "pleura"),
    "Pneumomediastinum": Finding(_plan_pneumomediastinum, _draw_pneumomediastinum, "pleura"),
}
