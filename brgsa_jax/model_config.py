"""The section `model` of a configuration: what its numbers may be, and how windows are written."""

import math
from collections.abc import Callable, Sequence
from typing import Any

from brgsa_jax.config import UserError

# Types the matrix products may have.
DTYPES = ("float32", "bfloat16")


def check_sizes(config: Any) -> None:
    """Checks numbers of a `model` section that came from a file.

    Raises:
        UserError: every key whose value cannot be.
    """
    problems = []

    def expect(section: Any, key: str, good: Callable[[Any], bool], what: str) -> None:
        value = section.get(key.rpartition(".")[2])
        try:
            fine = not isinstance(value, bool) and bool(good(value))
        except (TypeError, ValueError, IndexError, ZeroDivisionError):
            fine = False
        if not fine:
            problems.append(f"model.{key}={value!r} is not {what}")

    def whole(least: int, most: int = 10**6) -> Callable[[Any], bool]:
        return lambda value: isinstance(value, int) and least <= value <= most

    def number(value: Any) -> bool:
        return isinstance(value, (int, float)) and math.isfinite(value)

    vision, text, image = config.vision, config.text, config.input
    expect(config, "dtype", lambda v: v in DTYPES, f"one of {', '.join(DTYPES)}")
    expect(config, "embed_dim", whole(1), "a positive number")
    expect(config.bank, "bank.rows", whole(0, 10**9), "a number of rows")
    expect(config.bank, "bank.scale", lambda v: number(v) and v > 0, "a positive number")
    for name, section in (("vision", vision), ("text", text)):
        for key in ("width", "depth", "heads", "mlp_width", "unroll"):
            if key in section:
                expect(section, f"{name}.{key}", whole(1), "a positive number")
        for key in ("norm_epsilon", "block_epsilon"):
            if key in section:
                expect(section, f"{name}.{key}", lambda v: number(v) and v > 0,
                       "a positive number")
        if "heads" in section:
            expect(section, f"{name}.heads", lambda v, s=section: s["width"] % v == 0,
                   f"a divisor of model.{name}.width={section.get('width')!r}")
    expect(text, "text.vocab", whole(1, 10**8), "a positive number")
    expect(text, "text.positions", whole(1), "a positive number")
    expect(text, "text.max_tokens", lambda v: whole(2)(v) and v <= text.positions,
           f"a number of tokens up to model.text.positions={text.get('positions')!r}")
    expect(text, "text.last_n_layers", lambda v: whole(1)(v) and v <= text.depth + 1,
           f"a number of the {text.get('depth')!r} layers' hidden states")
    expect(text, "text.divisor", whole(0), "a positive number, or 0")
    expect(image, "input.shape", lambda v: len(v) in (2, 3) and all(
        whole(1, 4096)(n) for n in v), "two or three sizes up to 4096")
    if len(image.get("shape", ())) == 3:
        expect(image, "input.spacing", lambda v: len(v) == 3 and all(
            number(n) and n > 0 for n in v), "three positive numbers")
    if image.get("stored", ()):
        expect(image, "input.stored", lambda v: len(v) == len(image.shape) and all(
            whole(1, 8192)(n) for n in v), "as many sizes as input.shape")
    if image.get("clamp", ()):
        expect(image, "input.clamp", lambda v: len(v) == 2 and all(
            isinstance(n, int) and -32768 <= n <= 32767 for n in v) and v[0] < v[1],
            "a rising pair of HU")
    expect(config, "classes", lambda v: v is None or all(
        isinstance(name, str) and name for name in v) and len({*v}) == len(v),
        "different names of findings")
    expect(image, "input.std", lambda v: number(v) and v > 0, "a positive number")
    expect(image, "input.mean", number, "a number")
    expect(image, "input.window", lambda v: all(
        number(low) and number(high) and low < high for low, high in window_pairs(v)),
        "a window (low, high), or several")
    if problems:
        raise UserError(f"the configuration of the model cannot be: {'; '.join(problems)}; use the "
                        "one it was saved with")


def window_pairs(window: Sequence[Any]) -> tuple[tuple[float, float], ...]:
    """Returns `model.input.window`, one pair (low, high) or several, as pairs of floats."""
    pairs = window if isinstance(window[0], (tuple, list)) else (window,)
    return tuple((float(low), float(high)) for low, high in pairs)
