"""Trees by path: one regex matcher for sharding, learning-rate groups, decay and freezing."""

import re
from collections.abc import Callable, Sequence
from typing import Any

import jax

from brgsa_jax.config import UserError


def path_of(key_path: Sequence[Any]) -> str:
    """Returns "a/b/0" for a JAX key path."""
    parts = []
    for key in key_path:
        name = getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))
        parts.append(str(name))
    return "/".join(parts)


def flat(tree: Any) -> dict[str, Any]:
    """Returns {path: leaf} of a tree."""
    return {path_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def map_with_path(function: Callable[[str, Any], Any], tree: Any) -> Any:
    """Maps function(path, leaf) over a tree."""
    return jax.tree_util.tree_map_with_path(lambda p, leaf: function(path_of(p), leaf), tree)


def match(tree: Any, rules: Sequence[tuple[str, Any]],
          default: Callable[[str, Any], Any] | None = None) -> Any:
    """Gives every leaf the value of the first rule whose regex fully matches its path.

    Args:
        tree: any tree of arrays or shapes.
        rules: (regex, value) pairs the user wrote; each must match at least one leaf.
        default: function(path, leaf) for leaves no rule matches; None makes those an error.

    Returns:
        A tree of the same structure holding the values.

    Raises:
        UserError: a rule matches nothing, or a leaf is matched by no rule and has no default.
    """
    compiled = [(re.compile(pattern), value) for pattern, value in rules]
    used: set[int] = set()
    uncovered: list[str] = []

    def value_of(path: str, leaf: Any) -> Any:
        for index, (pattern, value) in enumerate(compiled):
            if pattern.fullmatch(path):
                used.add(index)
                return value
        if default is None:
            uncovered.append(path)
            return None
        return default(path, leaf)

    result = map_with_path(value_of, tree)
    unused = [pattern for index, (pattern, _) in enumerate(rules) if index not in used]
    if unused or uncovered:
        known = sorted(flat(tree))
        problem = [f"the rule {p!r} matches no parameter" for p in unused]
        problem += [f"no rule covers {p!r}" for p in uncovered]
        raise UserError("; ".join(problem) + f"; parameters are {', '.join(known[:12])}"
                        + (" …" if len(known) > 12 else ""))
    return result
