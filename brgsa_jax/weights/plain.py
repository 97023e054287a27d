"""Inert values of a pickle turned into plain Python data, for what lies beside the tensors."""

import re
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np

from brgsa_jax.weights.pickle_machine import (
    NAMESPACES,
    NUMPY_ARRAYS,
    NUMPY_SCALAR,
    Global,
    Instance,
    Key,
    Storage,
    is_tensor,
)

# What is kept of everything beside the tensors: values in all, and levels of nesting.
MAX_VALUES = 200_000
MAX_DEPTH = 64


class Plain:
    """Turns inert values into dicts, lists, texts, numbers, booleans and None.

    What is nested too deeply, refers to itself, or comes after `MAX_VALUES` values becomes "…"; a
    tensor or bytes become a short text.
    """

    def __init__(self) -> None:
        self._values = 0
        self._open: set[int] = set()

    def __call__(self, value: Any, depth: int = 0) -> Any:
        """Returns the plain form of a value `depth` levels below the top."""
        self._values += 1
        if value is None or isinstance(value, bool | float | str):
            return value
        if isinstance(value, int):
            return value if value.bit_length() <= 256 else "<large integer>"
        if isinstance(value, Global):
            return str(value)
        if isinstance(value, bytes | bytearray):
            return f"<{len(value)} bytes>"
        if is_tensor(value) or isinstance(value, Storage):
            return "<tensor>"
        if depth > MAX_DEPTH or self._values > MAX_VALUES or id(value) in self._open:
            return "…"
        self._open.add(id(value))
        result = self._content(value, depth + 1)
        self._open.discard(id(value))
        return result

    def _content(self, value: Any, depth: int) -> Any:
        if isinstance(value, dict):
            return {self._text(key, depth): self(item, depth) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self(item, depth) for item in value]
        if isinstance(value, Key):
            return self._spelled(value.value, depth)
        return self._instance(value, depth)

    def _text(self, key: Any, depth: int) -> str:
        return key if isinstance(key, str) else str(self(key, depth))

    def _spelled(self, value: Any, depth: int) -> str:
        """A text made of a value; long ones count as many values, for each is a new copy."""
        text = str(self(value, depth))
        self._values += len(text) // 16
        return text

    def _instance(self, value: Instance, depth: int) -> Any:
        name, state = str(value.function), value.state
        if value.function.module.startswith("omegaconf.") and isinstance(state, dict):
            for key in ("_content", "_val"):
                if key in state:
                    return self(state[key], depth)
        if name == NUMPY_SCALAR:
            return _numpy_number(value.args)
        if name in NUMPY_ARRAYS:
            return "<array>"
        if name == "torch.device":
            return ":".join(self._spelled(arg, depth) for arg in value.args)
        if value.function.module.startswith("pathlib") and all(
                isinstance(arg, str) for arg in value.args):
            kind = PureWindowsPath if "Windows" in name else PurePosixPath
            return self._spelled(str(kind(*value.args)), depth)
        if isinstance(state, tuple) and len(state) == 2 and all(
                isinstance(part, dict | None) for part in state):
            # Attributes of __dict__ and of __slots__.
            state = {**(state[0] or {}), **(state[1] or {})}
        content = {} if name in NAMESPACES else {"__class__": value.function}
        if isinstance(state, dict):
            content |= state
        elif state is not None:
            content["state"] = state
        content |= value.entries
        if value.items:
            content["items"] = value.items
        if value.args:
            content["args"] = value.args
        return self._content(content, depth)


def _numpy_number(args: tuple) -> Any:
    """The number in a pickled numpy scalar, or a placeholder for one of an unusual kind."""
    try:
        dtype, data = args
        kind, order = dtype.args[0], dtype.state[1]
        if not (re.fullmatch(r"[<>|=]", order) and re.fullmatch(r"[biuf][1248]", kind)):
            raise ValueError(kind)
        return np.frombuffer(data, order + kind)[0].item()
    except (ValueError, TypeError, AttributeError, IndexError):
        return "<numpy scalar>"
