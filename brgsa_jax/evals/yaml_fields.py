"""YAML files that people write: strict reading, and one function for each kind of field."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml


class _Strict(yaml.SafeLoader):
    """Refuses a key that comes twice, of which YAML silently takes the last."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """See yaml.SafeLoader."""
        keys = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        twice = [key for key, count in keys.items() if count > 1]
        if twice:
            raise yaml.constructor.ConstructorError(
                None, None, f"the key {twice[0]!r} comes twice", node.start_mark)
        return super().construct_mapping(node, deep)


def read_tree(path: str | Path) -> Any:
    """Reads a YAML file; runs nothing that stands in it.

    Raises:
        ValueError: it cannot be read, is no YAML, or names a key twice; why, in one line.
    """
    try:
        return yaml.load(Path(path).read_bytes(), _Strict)
    except (OSError, yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(" ".join(str(error).split())[:200]) from error


def shown(value: Any) -> str:
    """A value in a few characters; lists are not written out, as aliases make them endless."""
    return f"of type {type(value).__name__}" if isinstance(value, list | dict | set) \
        else repr(str(value)[:40])


def text(value: Any) -> str:
    """Takes a text."""
    if not isinstance(value, str):
        raise ValueError(f"is {shown(value)}, not text; put it in quotes")
    return value


def number(value: Any) -> float:
    """Takes a number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"is {shown(value)}, not a number")
    return float(value)


def whole(value: Any) -> int:
    """Takes a whole number."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"is {shown(value)}, not a whole number")
    return value


def or_none(read: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Returns what takes null, and everything else as `read` does."""
    return lambda value: None if value is None else read(value)


def texts(value: Any) -> tuple[str, ...]:
    """Takes a list of texts."""
    if not isinstance(value, list):
        raise ValueError("is not a list of texts")
    # YAML reads no, yes, on, off, 1 and 2026-01-01 as something else than text.
    wrong = [item for item in value if not isinstance(item, str)]
    if wrong:
        raise ValueError(f"has an item that is {shown(wrong[0])}, not text; put it in quotes")
    return tuple(value)


def some_texts(value: Any) -> tuple[str, ...]:
    """Takes a list of at least one text."""
    if not value:
        raise ValueError("is empty")
    return texts(value)


def lists(value: Any) -> dict[str, tuple[str, ...]]:
    """Takes names with a list of at least one text each."""
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
        raise ValueError("is not names with lists of texts")
    try:
        return {name: some_texts(items) for name, items in value.items()}
    except ValueError as error:
        raise ValueError(f"has a list that {error}") from error
