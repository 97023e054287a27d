"""Numbers as the report writes them, and the template engine that places them.

Every number may be missing: what is None or not finite is written as a dash, never as "nan".
"""

import base64
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from brgsa_jax.evals.bootstrap import Interval

Figure = Interval | Mapping[str, Any] | float | None
"""A number with or without its interval, as the evaluation or metrics.json holds it."""


def render_template(name: str, values: Mapping[str, Any]) -> str:
    """Fills a template of this package; every string is escaped unless it is `Markup`."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"), autoescape=True,
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(
        number=number, plus=plus, estimate=estimate, signed=signed, span=span, percent=percent,
        pvalue=pvalue, png=png, commas=lambda count: f"{count:,}",
        words=lambda text: str(text).replace("_", " "))
    return environment.get_template(name).render(values)


def bounds(found: Figure) -> tuple[float, float, float]:
    """Value, low and high; NaN for what is not there."""
    if isinstance(found, Interval):
        return found.value, found.low, found.high
    if isinstance(found, Mapping):
        return tuple(_float(found.get(key)) for key in ("value", "low", "high"))
    return _float(found), math.nan, math.nan


def _float(value: float | None) -> float:
    return math.nan if value is None else float(value)


def number(found: Figure, digits: int = 3) -> str:
    """The value alone: "0.873"."""
    value = bounds(found)[0]
    if not math.isfinite(value):
        return "–"
    # Rounding first keeps a tiny negative number from being written as minus zero.
    return f"{round(value, digits) + 0.0:.{digits}f}".replace("-", "−")


def span(found: Figure, digits: int = 3) -> str:
    """The interval alone: "0.851–0.894", with "to" where a minus sign would be misread."""
    _, low, high = bounds(found)
    if not (math.isfinite(low) and math.isfinite(high)):
        return "no interval"
    return f"{number(low, digits)}{' to ' if low < 0 or high < 0 else '–'}{number(high, digits)}"


def estimate(found: Figure, digits: int = 3) -> str:
    """The value with its interval, where there is one: "0.873 (0.851–0.894)"."""
    value = number(found, digits)
    if value == "–" or isinstance(found, int | float):
        return value
    return f"{value} ({span(found, digits)})"


def plus(found: Figure) -> str:
    """A difference with its sign: "+0.031"."""
    return f"{'+' if round(bounds(found)[0], 3) > 0 else ''}{number(found)}"


def signed(found: Figure) -> str:
    """A difference with its sign and interval: "+0.031 (0.012–0.050)"."""
    return f"{'+' if round(bounds(found)[0], 3) > 0 else ''}{estimate(found)}"


def pvalue(p: float | None) -> str:
    """A p value: "0.032", "< 0.001"."""
    return "< 0.001" if p is not None and p < 0.001 else number(p)


def percent(value: float | None) -> str:
    """A share: "4.2%", "42%"."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{100 * value:.1f}%" if value < 0.0995 else f"{100 * value:.0f}%"


def png(picture: bytes) -> str:
    """A picture as the address of an image element."""
    return "data:image/png;base64," + base64.b64encode(picture).decode()
