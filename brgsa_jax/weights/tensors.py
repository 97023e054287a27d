"""One lazy view of the tensors of any file: safetensors, PyTorch, and both in shards."""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from brgsa_jax.config import UserError
from brgsa_jax.weights.torch_file import DTYPES, MAX_AXES, View, damaged, open_torch

SAFETENSORS_DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64",
    "I32": "int32", "I16": "int16", "I8": "int8", "U64": "uint64", "U32": "uint32",
    "U16": "uint16", "U8": "uint8", "BOOL": "bool", "C64": "complex64"}
# A tensor may be larger than its file where one element stands for many; up to this many bytes,
# or that multiple of the file.
MAX_EXPANDED = 64 << 20
MAX_GROWTH = 16
MAX_INDEX = 64 << 20


class Spec(NamedTuple):
    """What a header says of a tensor; dtype is ml_dtypes.bfloat16 for bf16."""

    shape: tuple[int, ...]
    dtype: np.dtype


class Tensors:
    """The tensors of a file by name, each read when it is asked for.

    Attributes:
        path: the file, or the index of several.
        specs: shape and dtype of every tensor in the order of the file.
        extra: what else the file holds, as plain dicts, lists, texts, numbers, booleans and None:
            a checkpoint's hyper-parameters, epoch and so on, or the metadata of safetensors.

    Raises:
        UserError: a tensor is far larger than its file.
    """

    def __init__(self, path: Path, views: dict[str, View], extra: dict[str, Any]) -> None:
        for name, view in views.items():
            limit = max(MAX_EXPANDED, MAX_GROWTH * view.path.stat().st_size)
            if math.prod(n or 1 for n in view.shape) * view.dtype.itemsize > limit:
                raise UserError(f"{view.path} holds the tensor {name!a} with a shape far beyond "
                                "what is in the file; copy or download it again")
        self.path, self.extra = path, extra
        self.specs = {name: Spec(view.shape, view.dtype) for name, view in views.items()}
        self._views = views

    def read(self, name: str) -> np.ndarray:
        """Reads one tensor: a C-contiguous copy of its own dtype.

        Raises:
            KeyError: no tensor of that name.
            UserError: the file ends early or its bytes changed.
        """
        return self._views[name].read()

    def renamed(self, names: Mapping[str, str]) -> "Tensors":
        """The tensors of {new name: name}, without those that it leaves out."""
        return Tensors(self.path, {new: self._views[old] for new, old in names.items()}, self.extra)


def open_tensors(path: str | Path) -> Tensors:
    """Opens a file of tensors without reading them; its content tells the kind, not its name.

    Args:
        path: a safetensors file; a file of torch.save (zip or legacy), whose tensors are the state
            dict at top level or under "state_dict" or "model"; or the JSON index of shards
            in one folder. PyTorch files are read without torch, and nothing in them is run.

    Raises:
        UserError: no such file, damaged, of another kind, or one that would run code.
    """
    path = Path(path)
    try:
        views, extra = _open(path, index=True)
        return Tensors(path, views, extra)
    except OSError as error:
        raise UserError(f"{error.filename or path} cannot be read ({error.strerror}); check the "
                        "path and its permissions") from error


def _open(path: Path, *, index: bool = False) -> tuple[dict[str, View], dict[str, Any]]:
    """Opens a file of any kind; an index only where `index` allows one.

    Raises:
        UserError: see `open_tensors`.
        OSError: the system refuses.
    """
    if path.is_dir():
        raise UserError(f"{path} is a folder; give a file in it, such as model.safetensors")
    if not path.exists():
        raise UserError(f"{path} does not exist; check the path")
    if not path.is_file():
        raise UserError(f"{path} is no regular file; give a file of tensors")
    with open(path, "rb") as file:
        head = file.read(512)
    if not head:
        raise UserError(f"{path} is empty; copy or download it again")
    if head.startswith(b"version https://git-lfs"):
        raise UserError(f"{path} is only a Git LFS pointer to the weights; run git lfs pull in its "
                        "repository")
    if head.lstrip()[:14].lower().startswith((b"<!doctype html", b"<html", b"<?xml")):
        raise UserError(f"{path} is a web page, not weights; download the file itself, after "
                        "logging in where that is needed")
    if head[8:9] == b"{":
        return _open_safetensors(path)
    if index and head.lstrip().startswith(b"{"):
        return _open_index(path)
    return open_torch(path)


def _open_safetensors(path: Path) -> tuple[dict[str, View], dict[str, Any]]:
    """Reads the header; tensors are read past the library, whose mapped pages count as memory."""
    try:
        # Checks the header as a whole: sizes, dtypes, no overlap, no hole.
        with safe_open(str(path), framework="numpy") as file:
            metadata = dict(file.metadata() or {})
    except (SafetensorError, UnicodeError) as error:
        raise damaged(path) from error
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    header.pop("__metadata__", None)
    views = {}
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        if entry["dtype"] not in SAFETENSORS_DTYPES:
            raise UserError(f"{path} holds the tensor {name!a} as {entry['dtype']}, which cannot "
                            "be read; save it as bfloat16 or float32")
        dtype, shape = DTYPES[SAFETENSORS_DTYPES[entry["dtype"]]], tuple(entry["shape"])
        if len(shape) > MAX_AXES:
            raise damaged(path)
        strides = tuple(math.prod(shape[axis + 1:]) for axis in range(len(shape)))
        views[name] = View(path, 8 + size + entry["data_offsets"][0], dtype, shape, strides)
    return views, metadata


def _open_index(path: Path) -> tuple[dict[str, View], dict[str, Any]]:
    """Reads the index of shards in the folder of the index.

    Raises:
        UserError: no index, a shard is missing or elsewhere, or lacks a tensor it should hold.
    """
    try:
        if path.stat().st_size > MAX_INDEX:
            raise ValueError("too large")
        places = json.loads(path.read_text("utf-8"))["weight_map"]
        if not places or not all(isinstance(shard, str) for shard in places.values()):
            raise ValueError("no map")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is JSON but no index of shards; give the file with the tensors, "
                        "such as model.safetensors") from error
    views: dict[str, View] = {}
    for shard in dict.fromkeys(places.values()):
        if not re.fullmatch(r"[^/\\:\0]+", shard) or shard in (".", ".."):
            raise UserError(f"{path} names the shard {shard[:80]!a}, which is no plain file name; "
                            "the shards must lie in the folder of their index")
        found, _ = _open(path.parent / shard)
        wanted = {name for name, place in places.items() if place == shard}
        missing = sorted(wanted - found.keys())
        if missing:
            raise UserError(f"{path.parent / shard} lacks {missing[0]!a}"
                            + (f" and {len(missing) - 1} more tensors" if missing[1:] else "")
                            + f", which {path.name} says it holds; download the shards again")
        views |= {name: view for name, view in found.items() if name in wanted}
    return views, {}
