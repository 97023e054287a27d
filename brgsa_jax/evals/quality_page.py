"""The page of a data set's check: one HTML file that needs nothing but a browser.

Every number comes from `quality.Quality`. Ids and reasons are of unknown origin: the template and
`charts.element` escape them, and the page forbids scripts and network by its own content security
policy.
"""

import base64
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from brgsa_jax.evals import charts
from brgsa_jax.evals.quality import MOST_PICTURES, Quality, picture_key
from brgsa_jax.evals.scores import write_atomic

JSON_FILE = "quality.json"
_LISTED = 20  # Rows of a list on the page; quality.json has all.
_LEAST_SHARE = 1e-6
_LINES = 5  # Outliers drawn into the histogram.


def write_page(quality: Quality, out: str | Path) -> Path:
    """Writes the page, and `quality.json` with all lists beside it, each whole or not at all.

    Args:
        quality: what `quality.check` found.
        out: the HTML file.

    Returns:
        The path of the page.
    """
    out = Path(out)
    write_atomic(out, render(quality))
    write_atomic(out.parent / JSON_FILE, json.dumps(quality.as_dict(), indent=1, allow_nan=False))
    return out


def render(quality: Quality) -> str:
    """Returns the page as text."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"), autoescape=True,
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(number=_number, percent=_percent, commas=lambda n: f"{n:,}",
                               size=_size)
    return environment.get_template("quality.html").render(_page(quality))


def _page(quality: Quality) -> dict[str, Any]:
    """Everything the template places; it holds no arithmetic."""
    values, ct = quality.values, quality.facts["preprocess"].get("kind") != "radiograph"
    splits = list(quality.facts["splits"])
    colours = {split: f"m{place % 4}" for place, split in enumerate(splits)}
    return {
        "q": quality, "facts": quality.facts, "splits": splits, "colours": colours, "ct": ct,
        "unit": "HU" if ct else "grey values", "a_volume": "volume" if ct else "image",
        "verdict": _verdict(quality), "most": _LISTED, "json_file": JSON_FILE,
        "picture": lambda place: _png(quality.pictures.get(picture_key(place))),
        "most_pictures": MOST_PICTURES,
        "histogram": _histogram(values, "HU" if ct else "grey value") if values["volumes"] else "",
        "odd": bool(values["volumes"] and _odd_ones(values)),
        "class_strips": {name: _strip(entry["shares"])
                         for name, entry in values.get("classes", {}).items()},
        "share_axis": charts.strip_axis(0, 100),
        "spacing_charts": [
            (title, _steps(quality.geometry[name], colours, title, "mm"))
            for name, title in (("in_plane", "In plane"), ("between_slices", "Between slices"))
            if quality.geometry[name]["splits"]],
        "word_chart": _steps(quality.captions["words"], colours, "Words of a report", "words"),
        "finding_chart": _steps(_finding_counts(quality.captions["splits"]), colours,
                                "Findings of a volume", "findings"),
    }


def _odd_ones(values: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The records whose histogram is drawn beside those of the set, each once."""
    found = [place for name in ("empty", "saturated", "outliers") for place in values[name]]
    return list({picture_key(place): place for place in found}.values())


def _verdict(quality: Quality) -> tuple[str, str]:
    """The colour class and the sentence on top."""
    if not quality.passed:
        return "error", "Not to be trusted as it is"
    if quality.count("look"):
        return "look", "No error; look at what is listed"
    return "good", "No problem found"


def _histogram(values: Mapping[str, Any], unit: str) -> Markup:
    """Shares of voxels over their value: the bands of the set and the farthest outliers, by log."""
    width, height, left, right, top, bottom = 720, 260, 58, 16, 10, 34
    edges, bands = np.array(values["edges"]), values["bands"]
    middles = (edges[:-1] + edges[1:]) / 2
    outliers = _odd_ones(values)[:_LINES]
    highest = max(max(bands["high"]), *(max(o["histogram"]) for o in outliers), _LEAST_SHARE * 10)
    decades = range(math.ceil(math.log10(highest)), round(math.log10(_LEAST_SHARE)) - 1, -1)
    low, high = decades[-1], decades[0]

    def across(x: Any) -> Any:
        return left + (width - left - right) * (x - edges[0]) / (edges[-1] - edges[0])

    def up(y: Any) -> Any:
        level = np.log10(np.maximum(y, _LEAST_SHARE))
        return height - bottom - (height - top - bottom) * (level - low) / (high - low)

    def area(lower: str, upper: str, css: str) -> Markup:
        xs = np.concatenate([middles, middles[::-1]])
        ys = np.concatenate([bands[upper], bands[lower][::-1]])
        return charts.element("path", d=_path(across(xs), up(ys)) + "Z", class_=css)

    parts = []
    for power in decades:
        y = float(up(10.0 ** power))
        parts += [charts.element("line", x1=left, x2=width - right, y1=y, y2=y, class_="grid"),
                  charts.element("text", _percent(10.0 ** power), x=left - 6, y=y + 3.5,
                                 text_anchor="end", class_="tick")]
    for value in charts.ticks(float(edges[0]), float(edges[-1]), 8):
        parts.append(charts.element("text", charts.label(value), x=float(across(value)),
                                    y=height - bottom + 15, text_anchor="middle", class_="tick"))
    parts += [charts.element("text", unit, x=(left + width - right) / 2, y=height - 4,
                             text_anchor="middle", class_="tick"),
              area("low", "high", "band m0"), area("quarter", "three_quarters", "band m0"),
              charts.element("path", d=_path(across(middles), up(np.array(
                  bands["median"]))), class_="curve first m0")]
    for outlier in outliers:
        path = _path(across(middles), up(np.array(outlier["histogram"])))
        parts.append(charts.element("path", charts.element("title", outlier["id"]), d=path,
                                    class_="curve other m1"))
    return charts.element("svg", charts.element("title", "Histogram of all voxels"), *parts,
                          class_="plot", viewBox=f"0 0 {width} {height}", role="img")


def _steps(found: Mapping[str, Any], colours: Mapping[str, str], title: str, unit: str) -> Markup:
    """Outlined histograms of the splits in shares, so that small and large ones compare."""
    if not found["splits"]:
        return Markup("")
    width, height, left, right, top, bottom = 330, 180, 40, 10, 8, 32
    edges = np.array(found["edges"])
    shares = {split: np.array(entry["counts"]) / max(1, sum(entry["counts"]))
              for split, entry in found["splits"].items()}
    most = max(float(s.max()) for s in shares.values())

    def across(x: Any) -> Any:
        return left + (width - left - right) * (x - edges[0]) / ((edges[-1] - edges[0]) or 1)

    def up(y: Any) -> Any:
        return height - bottom - (height - top - bottom) * y / (1.04 * most)

    parts = []
    for value in charts.ticks(0, most, 3):
        parts += [charts.element("line", x1=left, x2=width - right, y1=up(value), y2=up(value),
                                 class_="grid"),
                  charts.element("text", _percent(value), x=left - 5, y=up(value) + 3.5,
                                 text_anchor="end", class_="tick")]
    for value in charts.ticks(float(edges[0]), float(edges[-1]), 5):
        parts.append(charts.element("text", charts.label(value), x=float(across(value)),
                                    y=height - bottom + 14, text_anchor="middle", class_="tick"))
    parts.append(charts.element("text", unit, x=(left + width - right) / 2, y=height - 4,
                                text_anchor="middle", class_="tick"))
    for place, (split, share) in reversed(list(enumerate(shares.items()))):
        xs = np.repeat(edges, 2)
        ys = np.concatenate([[0], np.repeat(share, 2), [0]])
        path = _path(across(xs), up(ys))
        if place == 0:
            parts.append(charts.element("path", d=path + "Z", class_=f"band {colours[split]}"))
        parts.append(charts.element(
            "path", d=path, class_=f"curve {'other' if place else 'first'} {colours[split]}"))
    return charts.element("svg", charts.element("title", title), *parts, class_="plot",
                          viewBox=f"0 0 {width} {height}", role="img")


def _path(x: Any, y: Any) -> str:
    return "M" + " L".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))


def _finding_counts(splits: Mapping[str, Any]) -> dict[str, Any]:
    most = max((len(entry["findings"]) for entry in splits.values()), default=0)
    return {"edges": (np.arange(most + 1) - 0.5).tolist(),
            "splits": {split: {"counts": np.pad(entry["findings"], (
                0, most - len(entry["findings"]))).tolist()} for split, entry in splits.items()}}


def _strip(shares: Sequence[float]) -> Markup:
    _, five, _, median, _, ninety_five, _ = (100 * share for share in shares)
    return charts.strip([charts.Mark("m0", median, five, ninety_five)], 0, 100, chance=None)


def _number(value: float, digits: int = 2) -> str:
    """At most so many digits behind the point, none where it is an integer."""
    return f"{round(value, digits) + 0.0:,.{digits}f}".rstrip("0").rstrip(".").replace(
        "-", "−") if digits else f"{round(value):,}".replace("-", "−")


def _percent(share: float) -> str:
    percent = 100 * share
    if percent == 0 or percent >= 9.95:
        return f"{percent:.0f}%"
    return f"{percent:.2g}%" if percent >= 0.1 else f"{percent:.1g}%"


def _size(count: int) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e8 else f"{count / 1e6:,.1f} MB"


def _png(picture: bytes | None) -> str | None:
    return picture and "data:image/png;base64," + base64.b64encode(picture).decode()
