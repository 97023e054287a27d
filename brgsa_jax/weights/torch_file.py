"""PyTorch files, zip and legacy, opened without torch and without running anything.

`pickle_machine` follows the pickles of a file; here its tensors are found in the bytes around them,
checked, and read when they are asked for.
"""

import io
import mmap
import re
import struct
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from brgsa_jax.config import UserError
from brgsa_jax.weights.pickle_machine import (
    MAX_PICKLE,
    Global,
    Instance,
    Machine,
    Storage,
    Tensor,
    as_count,
    damaged,
    is_tensor,
    of_type,
    shown,
)
from brgsa_jax.weights.plain import Plain

MAGIC = 0x1950A86A20F9469CFC6C
PROTOCOL = 1001
MAX_AXES = 32

DTYPES = {name: np.dtype(getattr(ml_dtypes if name == "bfloat16" else np, name)) for name in (
    "float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint64",
    "uint32", "uint16", "uint8", "bool", "complex64", "complex128")}
STORAGES = {"DoubleStorage": "float64", "FloatStorage": "float32", "HalfStorage": "float16",
            "BFloat16Storage": "bfloat16", "LongStorage": "int64", "IntStorage": "int32",
            "ShortStorage": "int16", "CharStorage": "int8", "ByteStorage": "uint8",
            "BoolStorage": "bool", "ComplexFloatStorage": "complex64",
            "ComplexDoubleStorage": "complex128"}


class View(NamedTuple):
    """A tensor as a window of a file.

    Attributes:
        path: the file.
        start: byte at which the first element lies.
        dtype: of the elements, in the byte order of this machine.
        shape: of the tensor.
        strides: elements from one entry of an axis to the next, at least 0.
        swapped: whether the file has the other byte order.
        crc: checksum of all bytes of the window, if known.
    """

    path: Path
    start: int
    dtype: np.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    swapped: bool = False
    crc: int | None = None

    def read(self) -> np.ndarray:
        """Reads the tensor into memory of its own, C-contiguous.

        Raises:
            UserError: the file ends early or its bytes changed.
        """
        if 0 in self.shape:
            return np.empty(self.shape, self.dtype)
        data = np.empty(span(self.shape, self.strides) * self.dtype.itemsize, np.uint8)
        with open(self.path, "rb", buffering=0) as file:
            file.seek(self.start)
            left = memoryview(data)
            while left:
                count = file.readinto(left)
                if not count:
                    raise damaged(self.path)
                left = left[count:]
        if self.crc is not None and zlib.crc32(data) != self.crc:
            raise damaged(self.path)
        if self.swapped and self.dtype.itemsize > 1:
            # A complex number is two floats, each in the other order.
            word = self.dtype.itemsize // (2 if self.dtype.kind == "c" else 1)
            data.view(f"u{word}").byteswap(inplace=True)
        steps = [stride * self.dtype.itemsize for stride in self.strides]
        window = np.ndarray(self.shape, self.dtype, data, 0, steps)
        return np.ascontiguousarray(window).reshape(self.shape)


def span(shape: Iterable[int], strides: Iterable[int]) -> int:
    """Returns how many elements lie between the first and the last of a tensor, both included."""
    return 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))


class Blob(NamedTuple):
    """Bytes of one storage in the file."""

    start: int
    size: int
    crc: int | None = None


def open_torch(path: Path) -> tuple[dict[str, View], dict[str, Any]]:
    """Opens a file of torch.save: zip (PyTorch 1.6 on) or the older run of pickles.

    Args:
        path: a regular file.

    Returns:
        The tensors of the state dict (at top level, or under "state_dict" or "model") in its
        order, none of them read; and everything else at top level as plain data.

    Raises:
        UserError: not such a file, damaged, without a state dict, or one that would run code.
    """
    with open(path, "rb") as file:
        head = file.read(512)
    if head[257:262] == b"ustar":
        raise UserError(f"{path} is in the tar format of PyTorch 0.1; save it again with a newer "
                        "PyTorch")
    machine = Machine(path)
    if head.startswith(b"PK"):
        top, find, swapped = _open_zip(path, machine)
    else:
        top, find, swapped = *_open_legacy(path, machine), sys.byteorder == "big"
    if not isinstance(top, dict):
        what = (f"a whole {shown(top.function)}" if isinstance(top, Instance)
                else "no dict of tensors")
        raise UserError(f"{path} holds {what}; load it where it was made and save "
                        "model.state_dict()")
    state = next((top[key] for key in ("state_dict", "model") if _tensors_in(top.get(key))), top)
    if any(_class_of(value) in machine.modules for value in state.values()):
        raise UserError(f"{path} holds a whole module with its source code; load it where it was "
                        "made and save model.state_dict()")
    if state is top and 2 * _tensors_in(top) <= len(top):
        entries = [shown(key)[:40] for key in top if isinstance(key, str)]
        raise UserError(f"{path} holds no state dict (its entries are "
                        f"{', '.join(entries[:8]) or 'none'}); save model.state_dict()")
    views = {}
    for name, value in state.items():
        machine.spend(20)
        if isinstance(name, str) and is_tensor(value):
            views[name] = _view(path, name, value, find, swapped)
        elif is_tensor(value):
            raise UserError(f"{path} holds a tensor under a name that is no text "
                            f"({str(Plain()(name))[:80]!a}); save model.state_dict()")
    rest = {key: value for key, value in top.items()
            if value is not state and not (state is top and is_tensor(value))}
    return views, Plain()(rest)


def _tensors_in(value: Any) -> int:
    """The number of tensors that are entries of a dict; 0 of anything else."""
    return sum(map(is_tensor, value.values())) if isinstance(value, dict) else 0


def _class_of(value: Any) -> Global | None:
    """The class that a value is, or is an instance of, as far as it is known."""
    cls = value.function if isinstance(value, Instance) else value
    return cls if isinstance(cls, Global) else None


def _dtype(storage: Storage) -> np.dtype | None:
    """Of the elements of a storage; None of a kind that is not read, or untyped."""
    return DTYPES.get(STORAGES.get(storage.kind.name, ""))


def _width(storage: Storage) -> int:
    """Bytes of what a storage counts; bytes themselves in an untyped one."""
    dtype = _dtype(storage)
    return dtype.itemsize if dtype else 1


def _view(path: Path, name: str, tensor: Tensor | Instance, find: Callable[[Storage], Blob],
          swapped: bool) -> View:
    """Checks what the pickle says of a tensor against the storage it lies in.

    Raises:
        UserError: of a kind that cannot be read, or outside its storage.
    """
    storage = tensor.storage if isinstance(tensor, Tensor) else None
    if isinstance(tensor, Instance) or not tensor.plain or not isinstance(storage, Storage):
        kind = shown(tensor.function) if isinstance(tensor, Instance) else "a conjugated view"
        raise UserError(f"{path} holds the tensor {name!a} as {kind}, which cannot be read; save "
                        "it as a plain dense tensor")
    dtype = _dtype(storage)
    if tensor.dtype is not None:
        dtype = DTYPES.get(tensor.dtype.name)
    if dtype is None:
        raise UserError(f"{path} holds the tensor {name!a} as "
                        f"{shown(tensor.dtype or storage.kind)}, which cannot be read; save it "
                        "as float32")
    try:
        if len(tensor.shape) > MAX_AXES:
            raise ValueError("too many axes")
        shape = tuple(map(as_count, of_type(tuple, tensor.shape)))
        strides = tuple(map(as_count, of_type(tuple, tensor.strides)))
        offset = as_count(tensor.offset)
        blob = find(storage)
        start = blob.start + storage.first * _width(storage) + offset * dtype.itemsize
        size = span(shape, strides) * dtype.itemsize
        if 0 in shape:
            size = 0
        if offset * dtype.itemsize + size > storage.count * _width(storage):
            raise ValueError("outside its storage")
    except (ValueError, LookupError, TypeError) as error:
        raise UserError(f"{path} holds the tensor {name!a} with a place or size that is not in the "
                        "file; copy or download it again") from error
    whole = (start, size) == (blob.start, blob.size)
    return View(path, start, dtype, shape, strides, swapped, blob.crc if whole else None)


def _open_zip(path: Path, machine: Machine) -> tuple[Any, Callable[[Storage], Blob], bool]:
    """Reads the pickle of a zip; nothing in it may be compressed, so nothing can grow."""
    size = path.stat().st_size
    try:
        with zipfile.ZipFile(path) as archive:
            entries = {info.filename: info for info in archive.infolist()}
    except (zipfile.BadZipFile, ValueError, NotImplementedError, EOFError, struct.error) as error:
        raise damaged(path) from error
    roots = [name.removesuffix("data.pkl") for name in entries
             if re.fullmatch(r"[^/]+/data\.pkl", name)]
    if len(roots) != 1:
        raise UserError(f"{path} is a zip file but no PyTorch checkpoint; give a file of "
                        "torch.save or safetensors")
    root, = roots
    if f"{root}constants.pkl" in entries:
        raise UserError(f"{path} is a TorchScript program; load it where it was made and save "
                        "model.state_dict()")

    def find(name: str) -> Blob:
        info = entries[root + name]
        if info.compress_type != zipfile.ZIP_STORED:
            raise UserError(f"{path} was compressed again; save it again with torch.save")
        if not 0 <= info.header_offset <= size - 30:
            raise damaged(path)
        with open(path, "rb") as file:
            file.seek(info.header_offset)
            header = file.read(30)
        if not header.startswith(b"PK\3\4"):
            raise damaged(path)
        start = info.header_offset + 30 + sum(struct.unpack("<HH", header[26:]))
        if start + info.file_size > size:
            raise damaged(path)
        # PyTorch can be told to write no checksums, and then writes 0.
        return Blob(start, info.file_size, info.CRC or None)

    def content(name: str) -> bytes:
        blob = find(name)
        if blob.size > MAX_PICKLE:
            raise machine.too_large()
        return View(path, blob.start, DTYPES["uint8"], (blob.size,), (1,), crc=blob.crc).read(
            ).tobytes()

    order = content("byteorder") if f"{root}byteorder" in entries else b"little"
    if order not in (b"little", b"big"):
        raise damaged(path)
    top = machine.load(io.BytesIO(content("data.pkl")))

    def find_storage(storage: Storage) -> Blob:
        blob = find(f"data/{storage.key}")
        if blob.size != storage.count * _width(storage):
            raise ValueError("a storage of another size")
        return blob

    return top, find_storage, order.decode() != sys.byteorder


def _open_legacy(path: Path, machine: Machine) -> tuple[Any, Callable[[Storage], Blob]]:
    """Reads the pickles of a file of before PyTorch 1.6, and finds the storages behind them."""
    blobs = {}
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as stream:
        if machine.load(stream) != MAGIC or machine.load(stream) != PROTOCOL:
            raise damaged(path)
        machine.load(stream)  # Sizes of C types and the byte order of the machine: not used.
        top = machine.load(stream)
        keys = machine.load(stream)
        position, size = stream.tell(), len(stream)
        for key in keys if isinstance(keys, list) else ():
            storage = machine.storages.get(key) if isinstance(key, str) else None
            if storage is None or position + 8 > size:
                raise damaged(path)
            count, = struct.unpack_from("<q", stream, position)
            if count != storage.count:
                raise damaged(path)
            blobs[key] = Blob(position + 8, count * _width(storage))
            position = blobs[key].start + blobs[key].size
        if position > size:
            raise damaged(path)
    return top, lambda storage: blobs[storage.key]
