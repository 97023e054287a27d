"""Charts of the report as inline SVG: escaped text, colours from the page's style sheet.

Colours are class names (`m0`, `m1`, …, `mu` for an untrained model), so that one style sheet
serves screen, dark screen and print.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup, escape

from brgsa_jax.evals.gap import Projection


class Mark(NamedTuple):
    """One estimate on an interval strip; low and high may be NaN."""

    css: str
    value: float
    low: float
    high: float


class Line(NamedTuple):
    """One curve: finite x[N] and y[N], a colour class, its label, and how much each point holds.

    `shares` [N], each in [0,1], draws every point as a disc of that share's area; None draws none.
    """

    css: str
    label: str
    x: np.ndarray
    y: np.ndarray
    shares: np.ndarray | None = None


def element(tag: str, *children: Any, **attributes: Any) -> Markup:
    """Makes an element; `_` in attribute names becomes `-`, a trailing `_` is dropped."""
    written = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{escape(_number(value))}"'
        for name, value in attributes.items() if value is not None)
    inner = "".join(str(escape(child)) for child in children)
    return Markup(f"<{tag}{written}>{inner}</{tag}>")


def _number(value: Any) -> str:
    if isinstance(value, float | np.floating):
        return f"{float(value):.2f}".rstrip("0").rstrip(".")
    return str(value)


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers (1, 2, 5 times a power of ten) between low and high, about `count`."""
    if not high > low:
        return [low]
    power = 10.0 ** math.floor(math.log10((high - low) / count))
    step = min((power * factor for factor in (1, 2, 5, 10)),
               key=lambda step: abs((high - low) / step - count))
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(index * step, 10) for index in range(first, last + 1)]


def label(value: float) -> str:
    """A tick label without needless digits, with a true minus sign."""
    if abs(value) >= 10000:
        return f"{value / 1000:g}k".replace("-", "−")
    return f"{value:g}".replace("-", "−")


def strip(marks: Sequence[Mark], low: float, high: float, *,
          chance: float | None = 0.5) -> Markup:
    """A row of a forest plot: estimates with intervals on a shared scale, one above the other.

    It stretches with its cell. An interval that leaves the scale is cut at its end.

    Args:
        marks: top to bottom; the first is drawn filled, the others as open dots.
        low, high: ends of the scale.
        chance: where a dashed line stands, or None.
    """

    def at(value: float) -> str:
        return f"{100 * (min(max(value, low), high) - low) / (high - low):.2f}%"

    height = 7 + 11 * len(marks)
    parts = []
    if chance is not None and low <= chance <= high:
        parts.append(element("line", x1=at(chance), x2=at(chance), y1=0, y2=height,
                             class_="chance"))
    for index, mark in enumerate(marks):
        middle = 9 + 11 * index
        parts.append(element("line", x1="0", x2="100%", y1=middle, y2=middle, class_="rail"))
        if not math.isfinite(mark.value):
            continue
        if math.isfinite(mark.low) and math.isfinite(mark.high):
            parts.append(element("line", x1=at(mark.low), x2=at(mark.high), y1=middle, y2=middle,
                                 class_=f"whisker {mark.css}"))
        parts.append(element("circle", cx=at(mark.value), cy=middle, r=4.2 if index == 0 else 3.4,
                             class_=f"{'dot' if index == 0 else 'ring'} {mark.css}"))
    return element("svg", *parts, class_="strip", height=height, width="100%", aria_hidden="true")


def strip_axis(low: float, high: float, chance: float = 0.5) -> Markup:
    """Tick labels under a column of strips; a narrow screen keeps those at chance and the end."""
    parts, marked = [], ticks(low, high, 6)
    last = marked[-1]
    for value in marked:
        where = 100 * (value - low) / (high - low)
        anchor = "start" if where < 2 else "end" if where > 98 else "middle"
        minor = not any(math.isclose(value, kept, abs_tol=1e-9) for kept in (chance, last))
        parts.append(element("text", label(value), x=f"{where:.2f}%", y=11, text_anchor=anchor,
                             class_="tick minor" if minor else "tick"))
    return element("svg", *parts, class_="strip", height=16, width="100%", aria_hidden="true")


def _path(x: Sequence[float], y: Sequence[float]) -> str:
    points = [f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True)]
    kept = [point for index, point in enumerate(points) if not index or point != points[index - 1]]
    return "M" + " L".join(kept)


def square(curves: Sequence[Line], title: str, *, chance: Sequence[tuple[float, float]],
           names: tuple[str, str] | None = None) -> Markup:
    """Curves in the unit square: ROC, precision over recall, or reliability.

    Args:
        curves: x and y in [0,1]; the first is drawn boldest and last.
        title: for screen readers.
        chance: corners (x, y) of the dashed line that no skill, or perfect calibration, draws.
        names: of the two axes, which adds ticks; None draws a small plot with neither.
    """
    left, bottom, inset = (38, 36, 8) if names else (5, 5, 5)
    span = 300 if names else 122

    def across(x: Any) -> Any:
        return left + span * np.asarray(x, dtype=float)

    def up(y: Any) -> Any:
        return inset + span * (1 - np.asarray(y, dtype=float))

    width, height = left + span + inset, inset + span + bottom
    parts = [_ticks_of_square(across, up, left, height, names)] if names else []
    parts += [element("rect", x=left, y=inset, width=span, height=span, class_="frame"),
              element("path", d=_path(across([x for x, _ in chance]), up([y for _, y in chance])),
                      class_="chance")]
    for index, curve in reversed(list(enumerate(curves))):
        # A curve of thousands of steps is drawn by its points on a grid of half pixels.
        x, y = np.round(across(curve.x) * 2) / 2, np.round(up(curve.y) * 2) / 2
        parts.append(element("path", d=_path(x, y),
                             class_=f"curve {curve.css} {'first' if index == 0 else 'other'}"))
        if curve.shares is not None:
            parts += [element("circle", cx=float(a), cy=float(b),
                              r=1.5 + span / 22 * math.sqrt(share), class_=f"disc {curve.css}")
                      for a, b, share in zip(x, y, curve.shares, strict=True)]
    return element("svg", element("title", title), *parts, class_="plot",
                   viewBox=f"0 0 {width} {height}", role="img")


def _ticks_of_square(across: Any, up: Any, left: int, height: int,
                     names: tuple[str, str]) -> Markup:
    parts = []
    for value in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0):
        x, y = float(across(value)), float(up(value))
        parts += [element("line", x1=x, x2=x, y1=float(up(0)), y2=float(up(1)), class_="grid"),
                  element("line", x1=float(across(0)), x2=float(across(1)), y1=y, y2=y,
                          class_="grid"),
                  element("text", label(value), x=x, y=float(up(0)) + 14, text_anchor="middle",
                          class_="tick"),
                  element("text", label(value), x=left - 5, y=y + 3.5, text_anchor="end",
                          class_="tick")]
    middle = float(up(0.5))
    parts += [element("text", names[0], x=float(across(0.5)), y=height - 6, text_anchor="middle",
                      class_="tick"),
              element("text", names[1], x=11, y=middle, text_anchor="middle", class_="tick",
                      transform=f"rotate(-90 11 {middle:.1f})")]
    return Markup("").join(parts)


def scatter(projection: Projection, reach: tuple[float, float], css: str, name: str,
            limit: int = 400) -> Markup:
    """Image and text embeddings in their joint plane, with centroids and the line between them.

    Args:
        projection: the plane.
        reach: what must fit to each side and above and below the middle, in units of the
            embedding, shared between plots.
        css: colour class of the image points.
        name: for the title that screen readers tell.
        limit: most points drawn of each modality, evenly picked.
    """
    width, height = 300, 240
    scale = min((width / 2 - 8) / reach[0], (height / 2 - 8) / reach[1])
    middle = (projection.image.mean(0) + projection.text.mean(0)) / 2

    def at(point: np.ndarray) -> tuple[float, float]:
        return (width / 2 + float(point[0] - middle[0]) * scale,
                height / 2 - float(point[1] - middle[1]) * scale)

    parts = [element("rect", x=1, y=1, width=width - 2, height=height - 2, class_="frame")]
    every = max(1, math.ceil(len(projection.image) / limit))
    for point in projection.text[::every]:
        x, y = at(point)
        parts.append(element("rect", x=x - 2.1, y=y - 2.1, width=4.2, height=4.2,
                             transform=f"rotate(45 {x:.1f} {y:.1f})", class_="point text"))
    for point in projection.image[::every]:
        x, y = at(point)
        parts.append(element("circle", cx=x, cy=y, r=2.3, class_=f"point {css}"))
    (ax, ay), (bx, by) = at(projection.image.mean(0)), at(projection.text.mean(0))
    parts += [element("line", x1=ax, y1=ay, x2=bx, y2=by, class_="bond"),
              element("circle", cx=ax, cy=ay, r=5.5, class_=f"centroid {css}"),
              element("rect", x=bx - 4.6, y=by - 4.6, width=9.2, height=9.2,
                      transform=f"rotate(45 {bx:.1f} {by:.1f})", class_="centroid text")]
    bar = ticks(0.0, width / 2 / scale, 3)[1]
    parts += [element("line", x1=12, x2=12 + bar * scale, y1=height - 12, y2=height - 12,
                      class_="axis"),
              element("text", label(bar), x=12, y=height - 17, class_="tick")]
    return element("svg", element("title", name), *parts, class_="plot",
                   viewBox=f"0 0 {width} {height}", role="img")


def lines(curves: Sequence[Line], name: str, *, width: int = 330, height: int = 190,
          x_name: str = "step") -> Markup:
    """A line chart with few ticks; several curves are each named where they end."""
    widest = max(len(curve.label) for curve in curves)
    left, top, bottom = 44, 10, 30
    right = min(110, 14 + 7 * widest) if len(curves) > 1 else 12
    x_low = min(float(curve.x.min()) for curve in curves)
    x_high = max(float(curve.x.max()) for curve in curves)
    y_low = min(float(curve.y.min()) for curve in curves)
    y_high = max(float(curve.y.max()) for curve in curves)
    room = 0.04 * (y_high - y_low) or max(abs(y_high) * 0.1, 0.5)
    y_low, y_high = (0.0 if 0 <= y_low < 0.4 * y_high else y_low - room), y_high + room

    def across(x: Any) -> Any:
        return left + (width - left - right) * (x - x_low) / ((x_high - x_low) or 1.0)

    def up(y: Any) -> Any:
        return height - bottom - (height - top - bottom) * (y - y_low) / (y_high - y_low)

    parts = []
    for value in ticks(y_low, y_high, 4):
        parts += [element("line", x1=left, x2=width - right, y1=up(value), y2=up(value),
                          class_="grid"),
                  element("text", label(value), x=left - 6, y=up(value) + 3.5, text_anchor="end",
                          class_="tick")]
    for value in ticks(x_low, x_high, 4):
        parts.append(element("text", label(value), x=across(value), y=height - bottom + 14,
                             text_anchor="middle", class_="tick"))
    parts.append(element("text", x_name, x=(left + width - right) / 2, y=height - 4,
                         text_anchor="middle", class_="tick"))
    for index, curve in reversed(list(enumerate(curves))):
        parts.append(element("path", d=_path(across(curve.x), up(curve.y)),
                             class_=f"curve {curve.css} {'first' if index == 0 else 'other'}"))
    if len(curves) > 1:
        ends = sorted(((float(up(curve.y[-1])), curve) for curve in curves),
                      key=lambda pair: pair[0])
        taken = -math.inf
        for y, curve in ends:
            taken = max(y, taken + 14)
            parts.append(element("text", _short(curve.label), x=width - right + 6, y=taken + 4,
                                 class_=f"name {curve.css}"))
    return element("svg", element("title", name), *parts, class_="plot",
                   viewBox=f"0 0 {width} {height}", role="img")


def _short(name: str, most: int = 13) -> str:
    """A name cut to what fits beside a chart; the legend above has the whole one."""
    return name if len(name) <= most else f"{name[:most - 1].rstrip()}…"


def history_lines(histories: Sequence[tuple[str, str, Sequence[Mapping[str, Any]]]], key: str,
                  points: int = 200) -> list[Line]:
    """Curves of one logged number over the step, averaged in at most `points` bins.

    Args:
        histories: (colour class, label, rows of metrics.jsonl) of each model.
        key: the number; rows without it, or where it is not finite, are passed over.
        points: most points of a curve.
    """
    found = []
    for css, name, rows in histories:
        pairs = sorted((float(row["step"]), float(row[key])) for row in rows
                       if "step" in row and _finite(row.get(key)))
        if pairs:
            bins = np.array_split(np.array(pairs), min(points, len(pairs)))
            means = np.array([part.mean(axis=0) for part in bins])
            found.append(Line(css, name, means[:, 0], means[:, 1]))
    return found


def _finite(value: Any) -> bool:
    return (isinstance(value, int | float | np.integer | np.floating)
            and not isinstance(value, bool) and math.isfinite(value))
