"""Names to callables; a miss lists the choices.

Every pluggable part (encoder, loss, data source, config recipe) is entered here by a
decorator beside its definition and found by the pair (kind, name).
"""

import difflib
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")

_ENTRIES: dict[str, dict[str, Any]] = {}


def register(kind: str, name: str) -> Callable[[T], T]:
    """Enters the decorated object under (kind, name).

    Raises:
        ValueError: another object already holds that name.
    """

    def enter(value: T) -> T:
        entries = _ENTRIES.setdefault(kind, {})
        if name in entries and entries[name] is not value:
            raise ValueError(f"the {kind} name {name!r} is registered twice")
        entries[name] = value
        return value

    return enter


def names(kind: str) -> tuple[str, ...]:
    """Returns the sorted names registered under `kind`."""
    return tuple(sorted(_ENTRIES.get(kind, {})))


def get(kind: str, name: str) -> Any:
    """Returns the object registered under (kind, name).

    Raises:
        KeyError: no such name; the message gives the nearest names and all choices.
    """
    entries = _ENTRIES.get(kind, {})
    if name not in entries:
        raise KeyError(miss(kind, name, entries))
    return entries[name]


def miss(kind: str, name: str, choices: Any) -> str:
    """Returns the one-sentence message for an unknown name: nearest names, then all choices."""
    choices = sorted(map(str, choices))
    near = difflib.get_close_matches(name, choices, n=3, cutoff=0.5)
    hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ";"
    return f"unknown {kind} {name!r}{hint} choices: {', '.join(choices) or 'none registered'}"
