"""PyTorch files read without torch and without running anything.

A pickle is a program. `Machine` follows it opcode by opcode, but where a loader would import a name
or call a function it only notes down which; what the notes mean is worked out afterwards. A call
that is known to be harmless becomes data, any other is refused by name.
"""

import io
import mmap
import pickletools
import re
import struct
import sys
import zipfile
import zlib
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np

from brgsa_jax.config import UserError

MAGIC = 0x1950A86A20F9469CFC6C
PROTOCOL = 1001
# Bytes and operations of one pickle; real checkpoints of 1000 tensors stay below 1 MB and 100 000.
MAX_PICKLE = 64 << 20
MAX_STEPS = 5_000_000
# What is kept of everything beside the tensors: values in all, and levels of nesting.
MAX_VALUES = 200_000
MAX_DEPTH = 64
MAX_AXES = 32

DTYPES = {name: np.dtype(getattr(ml_dtypes if name == "bfloat16" else np, name)) for name in (
    "float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint64",
    "uint32", "uint16", "uint8", "bool", "complex64", "complex128")}
STORAGES = {"DoubleStorage": "float64", "FloatStorage": "float32", "HalfStorage": "float16",
            "BFloat16Storage": "bfloat16", "LongStorage": "int64", "IntStorage": "int32",
            "ShortStorage": "int16", "CharStorage": "int8", "ByteStorage": "uint8",
            "BoolStorage": "bool", "ComplexFloatStorage": "complex64",
            "ComplexDoubleStorage": "complex128"}

# Calls read as a dict or a list; those below them stay a note of the call.
MAPPINGS = {"builtins.dict", "collections.OrderedDict", "collections.defaultdict",
            "collections.Counter"}
LISTS = {"builtins.list", "builtins.tuple", "builtins.set", "builtins.frozenset",
         "collections.deque", "torch.Size"}
NAMESPACES = {"argparse.Namespace", "types.SimpleNamespace"}
NUMPY_SCALAR = "numpy.core.multiarray.scalar"
NUMPY_ARRAYS = {"numpy.core.multiarray._reconstruct", "numpy.core.numeric._frombuffer"}
HARMLESS = NAMESPACES | NUMPY_ARRAYS | {
    *(f"builtins.{name}" for name in ("object", "int", "float", "complex", "bool", "str", "bytes",
                                      "bytearray", "range", "slice")),
    *(f"datetime.{name}" for name in ("date", "datetime", "time", "timedelta", "timezone")),
    "decimal.Decimal", "fractions.Fraction", "functools.partial", "uuid.UUID",
    NUMPY_SCALAR, "numpy.dtype", "numpy.ndarray", "torch.device", "torch.serialization._get_layout"}
# States of numpy's random generators.
NUMPY_RANDOM = re.compile(r"numpy\.random\.\w+\.(__\w+_ctor|__pyx_unpickle_\w+)")
# How NoneType is written.
TYPE_OF_NONE = ("builtins.type", (None,))
# Of these modules of the standard library every class is only data.
DATA_MODULES = {"pathlib", "pathlib._local", "typing"}


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


def damaged(path: Path) -> UserError:
    """The error of a file whose bytes make no sense."""
    return UserError(f"{path} is damaged, cut short or no file of tensors; copy or download "
                     "it again")


@dataclass(frozen=True, slots=True)
class Global:
    """A name of a module: a class or a function, never imported."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(eq=False, slots=True)
class Instance:
    """What a call would have made."""

    function: Global
    args: tuple
    state: Any = None
    items: list = field(default_factory=list)
    entries: dict = field(default_factory=dict)


@dataclass(eq=False, slots=True)
class Key:
    """A key of a dict that is no plain scalar; hashing a hostile one could take for ever."""

    value: Any


@dataclass(eq=False, slots=True)
class Storage:
    """A run of elements of one dtype in the file, or (`first`) a part of one."""

    key: str
    kind: Global
    count: int
    first: int = 0

    @property
    def dtype(self) -> np.dtype | None:
        """Of its elements; None of a kind that is not read, or untyped."""
        return DTYPES.get(STORAGES.get(self.kind.name, ""))

    @property
    def width(self) -> int:
        """Bytes of what `count` counts; bytes themselves in an untyped storage."""
        return self.dtype.itemsize if self.dtype else 1


@dataclass(eq=False, slots=True)
class Tensor:
    """A window of a storage, as the pickle claims it; see `_view` for the checks."""

    storage: Any
    offset: Any
    shape: Any
    strides: Any
    dtype: Global | None = None
    plain: bool = True


class Blob(NamedTuple):
    """Bytes of one storage in the file."""

    start: int
    size: int
    crc: int | None = None


class Machine:
    """Follows pickles of one file on inert values.

    Attributes:
        storages: the first storage seen of every key.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.storages: dict[str, Storage] = {}
        self._steps = 0

    def load(self, stream: BinaryIO | mmap.mmap) -> Any:
        """Follows one pickle from the position of the stream on, and stops behind it.

        Raises:
            UserError: it is damaged, too large, or would run something.
        """
        self.stack: list = []
        self.marks: list[list] = []
        self.memo: dict[int, Any] = {}
        start = stream.tell()
        try:
            for opcode, argument, position in pickletools.genops(stream):
                if position - start > MAX_PICKLE:
                    raise self.too_large()
                self.spend(1)
                HANDLERS[opcode.name](self, argument)
            return self.stack.pop()
        except (ValueError, LookupError, TypeError, OverflowError) as error:
            raise damaged(self.path) from error

    def spend(self, steps: int) -> None:
        """Counts work, so that a small file cannot ask for much of it."""
        self._steps += steps
        if self._steps > MAX_STEPS:
            raise self.too_large()

    def too_large(self) -> UserError:
        """The error of a pickle beyond the limits."""
        return UserError(f"{self.path} holds more Python objects than a checkpoint has reason to; "
                         "save only model.state_dict(), or better a safetensors file")

    def refused(self, what: Any) -> UserError:
        """The error of a file that would run code."""
        return UserError(f"{self.path} would run {_shown(what)} when loaded by PyTorch; it is "
                         "refused; get the file from a source you trust and re-save it as "
                         "safetensors")

    def pop_mark(self) -> list:
        """Returns everything above the last mark."""
        items, self.stack = self.stack, self.marks.pop()
        return items

    def mark(self, _: None) -> None:
        """Starts a new run of values."""
        self.marks.append(self.stack)
        self.stack = []

    def pop(self, _: None) -> None:
        """Drops one value, or the last mark."""
        if self.stack:
            self.stack.pop()
        else:
            self.pop_mark()

    def list_of_mark(self, _: None) -> None:
        """Makes a list; a set too, whose order and hashes nobody needs."""
        items = self.pop_mark()
        self.stack.append(items)

    def tuple_of_mark(self, _: None) -> None:
        """Makes a tuple of all values above the mark."""
        items = self.pop_mark()
        self.stack.append(tuple(items))

    def tuple_of(self, count: int) -> None:
        """Makes a tuple of the last `count` values."""
        if len(self.stack) < count:
            raise ValueError("too few values")
        self.stack[-count:] = [tuple(self.stack[-count:])]

    def dict_of_mark(self, _: None) -> None:
        """Makes a dict of keys and values in turn."""
        items = self.pop_mark()
        self.stack.append(_dict(zip(items[::2], items[1::2], strict=True)))

    def extend(self, items: list) -> None:
        """Adds values to the list below them."""
        target = self.stack[-1]
        (target.items if isinstance(target, Instance) else _of(list, target)).extend(items)

    def update(self, items: list) -> None:
        """Adds keys and values in turn to the dict below them."""
        target = self.stack[-1]
        (target.entries if isinstance(target, Instance) else _of(dict, target)).update(
            _dict(zip(items[::2], items[1::2], strict=True)))

    def named(self, argument: str) -> None:
        """Notes a name; protocols up to 3."""
        self.stack.append(_global(*argument.split(" ", 1)))

    def named_by_stack(self, _: None) -> None:
        """Notes a name; protocol 4 and later."""
        name, module = _of(str, self.stack.pop()), _of(str, self.stack.pop())
        self.stack.append(_global(module, name))

    def reduce(self, _: None) -> None:
        """Notes a call of a function."""
        args, function = self.stack.pop(), self.stack.pop()
        self.stack.append(self.call(function, args))

    def new(self, _: None) -> None:
        """Notes that an object is made without calling its class."""
        args, cls = self.stack.pop(), self.stack.pop()
        self.stack.append(self.call(cls, args, only_creates=True))

    def new_with_names(self, _: None) -> None:
        """The same with arguments by name."""
        kwargs, args, cls = self.stack.pop(), self.stack.pop(), self.stack.pop()
        self.spend(len(args))
        self.stack.append(self.call(cls, (*_of(tuple, args), kwargs), only_creates=True))

    def instance_of_mark(self, argument: str | None) -> None:
        """Notes a call of a class; protocols 0 and 1."""
        items = self.pop_mark()
        cls = items.pop(0) if argument is None else _global(*argument.split(" ", 1))
        self.stack.append(self.call(cls, tuple(items)))

    def build(self, _: None) -> None:
        """Notes the state of an object; that of a dict (`state_dict._metadata`) is left out."""
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, Instance):
            target.state = state
        elif not isinstance(target, dict | list | Tensor):
            raise ValueError("a state for something without one")

    def persistent(self, _: None) -> None:
        """Notes a storage of the file."""
        kind, *rest = _of(tuple, self.stack.pop())
        self.spend(len(rest))
        if kind == "module":
            raise UserError(f"{self.path} holds a whole module with its source code; load it where "
                            "it was made and save model.state_dict()")
        cls, key, _, count, *part = rest
        if kind != "storage" or not isinstance(cls, Global):
            raise ValueError("no storage")
        root = Storage(_of(str, key), cls, _count(count))
        self.storages.setdefault(root.key, root)
        if part and part[0] is not None:
            _, first, size = part[0]
            if _count(first) + _count(size) > root.count:
                raise ValueError("a part outside its storage")
            root = Storage(root.key, cls, size, first)
        self.stack.append(root)

    def call(self, function: Any, args: Any, *, only_creates: bool = False) -> Any:
        """Works out what a call would make.

        Args:
            function: what is called.
            args: its arguments.
            only_creates: whether `function.__new__` is called, which a class has and no function.

        Raises:
            UserError: it would run something.
        """
        self.spend(5 + len(_of(tuple, args)))
        if not isinstance(function, Global):
            raise self.refused(f"a call of {function.function}" if isinstance(function, Instance)
                               else "a computed function")
        # A tensor of a subclass: (its rebuilder, the subclass, the rebuilder's arguments, state).
        while str(function) == "torch._tensor._rebuild_from_type_v2":
            function, _, args, _ = args
            if not (isinstance(function, Global) and isinstance(args, tuple)):
                raise ValueError("no tensor")
        name = str(function)
        if name in MAPPINGS:
            return self.mapping(args)
        if name in LISTS and (not args or isinstance(args[0], list | tuple)):
            return args[0] if args and args[0] else []
        if name in ("torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2"):
            # The last argument tells of lazily conjugated or negated values.
            return Tensor(*args[:4], plain=not any(args[6:]))
        if name == "torch._utils._rebuild_tensor_v3":
            return Tensor(*args[:4], dtype=_of(Global, args[6]), plain=not any(args[7:]))
        if name in ("torch._utils._rebuild_parameter",
                    "torch._utils._rebuild_parameter_with_state"):
            return args[0]
        if name == "_codecs.encode" and args[1:] in (("latin1",), ("latin-1",)):
            # How protocol 2 writes bytes.
            text = _of(str, args[0])
            self.spend(len(text) // 10)
            return text.encode("latin-1")
        if name == "copyreg._reconstructor":
            return self.call(args[0], tuple(x for x in args[2:] if x is not None),
                             only_creates=True)
        if name == "builtins.getattr" and _names_nested_class(args):
            return _global(args[0].module, f"{args[0].name}.{args[1]}")
        if (name == "_operator.getitem" and _is_typing(args)) or (name, args) == TYPE_OF_NONE:
            return Instance(function, args)
        if not _is_harmless(function, only_creates):
            raise self.refused(name)
        return Instance(function, args)

    def mapping(self, args: tuple) -> dict:
        """A dict made by a call: empty, of another dict, or (Python 2) of pairs."""
        content = args[-1] if args else None
        if isinstance(content, dict):
            return content
        if isinstance(content, list):
            self.spend(len(content))
            return _dict(content)
        return {}


def _shown(what: Any) -> str:
    """A name out of the file, fit for one line of a message."""
    text = str(what)[:200]
    return text if text.isprintable() else ascii(text)


def _of(kind: type, value: Any) -> Any:
    """Returns the value.

    Raises:
        ValueError: of another type.
    """
    if not isinstance(value, kind):
        raise ValueError(f"not a {kind.__name__}")
    return value


def _count(value: Any) -> int:
    """Returns the value.

    Raises:
        ValueError: no integer, or below 0.
    """
    if type(value) is not int or value < 0:
        raise ValueError("no count")
    return value


def _dict(pairs: Iterable[Any]) -> dict:
    return {key if isinstance(key, str | int | float | bytes | None) else Key(key): value
            for key, value in pairs}


def _global(module: str, name: str) -> Global:
    if len(module) + len(name) > 1000:
        raise ValueError("an endless name")
    # Protocol 2 says `commands` for subprocess, and `__builtin__` for builtins.
    module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
    # numpy 2 moved numpy.core.
    return Global(re.sub(r"^numpy\._core\b", "numpy.core", module), name)


def _is_class(name: str) -> bool:
    return name.rpartition(".")[2].lstrip("_")[:1].isupper()


def _is_harmless(function: Global, only_creates: bool) -> bool:
    """Whether a call makes data and does nothing else, as far as its name tells."""
    module, name = function.module, function.name
    if str(function) in HARMLESS or NUMPY_RANDOM.fullmatch(str(function)):
        return True
    if module in DATA_MODULES:
        return _is_class(name) and "." not in name
    if module == "torch._utils":
        # Sparse, quantised and other tensors: refused only where one is needed.
        return name.startswith("_rebuild") and "." not in name
    if module.partition(".")[0] in sys.stdlib_module_names:
        return False
    return only_creates or _is_class(name)


def _names_nested_class(args: tuple) -> bool:
    """Whether getattr(*args) only names Outer.Inner, as protocol 2 writes it."""
    return (len(args) == 2 and isinstance(args[0], Global) and _is_class(args[0].name)
            and args[0].module.partition(".")[0] not in sys.stdlib_module_names
            and isinstance(args[1], str) and len(args[1]) < 100 and args[1].isidentifier()
            and _is_class(args[1]))


def _is_typing(args: tuple) -> bool:
    """Whether getitem(*args) is an annotation such as Optional[int]."""
    return len(args) == 2 and isinstance(args[0], Global) and args[0].module == "typing"


HANDLERS: dict[str, Callable[[Machine, Any], None]] = {
    **dict.fromkeys(
        ("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT",
         "STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE",
         "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
        lambda machine, argument: machine.stack.append(argument)),
    **dict.fromkeys(("PROTO", "FRAME", "STOP"), lambda machine, argument: None),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"),
                    lambda machine, argument: machine.stack.append(machine.memo[argument])),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT"),
                    lambda machine, argument: machine.memo.__setitem__(argument,
                                                                       machine.stack[-1])),
    "MEMOIZE": lambda machine, _: machine.memo.__setitem__(len(machine.memo), machine.stack[-1]),
    "NONE": lambda machine, _: machine.stack.append(None),
    "NEWTRUE": lambda machine, _: machine.stack.append(True),
    "NEWFALSE": lambda machine, _: machine.stack.append(False),
    "DUP": lambda machine, _: machine.stack.append(machine.stack[-1]),
    "MARK": Machine.mark,
    "POP": Machine.pop,
    "POP_MARK": lambda machine, _: machine.pop_mark(),
    "EMPTY_TUPLE": lambda machine, _: machine.stack.append(()),
    "TUPLE1": lambda machine, _: machine.tuple_of(1),
    "TUPLE2": lambda machine, _: machine.tuple_of(2),
    "TUPLE3": lambda machine, _: machine.tuple_of(3),
    "TUPLE": Machine.tuple_of_mark,
    "EMPTY_LIST": lambda machine, _: machine.stack.append([]),
    "EMPTY_SET": lambda machine, _: machine.stack.append([]),
    "LIST": Machine.list_of_mark,
    "FROZENSET": Machine.list_of_mark,
    "APPEND": lambda machine, _: machine.extend([machine.stack.pop()]),
    "APPENDS": lambda machine, _: machine.extend(machine.pop_mark()),
    "ADDITEMS": lambda machine, _: machine.extend(machine.pop_mark()),
    "EMPTY_DICT": lambda machine, _: machine.stack.append({}),
    "DICT": Machine.dict_of_mark,
    "SETITEM": lambda machine, _: machine.update([*reversed((machine.stack.pop(),
                                                             machine.stack.pop()))]),
    "SETITEMS": lambda machine, _: machine.update(machine.pop_mark()),
    "GLOBAL": Machine.named,
    "STACK_GLOBAL": Machine.named_by_stack,
    "REDUCE": Machine.reduce,
    "NEWOBJ": Machine.new,
    "NEWOBJ_EX": Machine.new_with_names,
    "INST": Machine.instance_of_mark,
    "OBJ": Machine.instance_of_mark,
    "BUILD": Machine.build,
    "BINPERSID": Machine.persistent,
}


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
        what = (f"a whole {_shown(top.function)}" if isinstance(top, Instance)
                else "no dict of tensors")
        raise UserError(f"{path} holds {what}; load it where it was made and save "
                        "model.state_dict()")
    state = next((top[key] for key in ("state_dict", "model") if _tensors_in(top.get(key))), top)
    if state is top and 2 * _tensors_in(top) <= len(top):
        entries = [_shown(key)[:40] for key in top if isinstance(key, str)]
        raise UserError(f"{path} holds no state dict (its entries are "
                        f"{', '.join(entries[:8]) or 'none'}); save model.state_dict()")
    views = {}
    for name, value in state.items():
        machine.spend(20)
        if isinstance(name, str) and _is_tensor(value):
            views[name] = _view(path, name, value, find, swapped)
        elif _is_tensor(value):
            raise UserError(f"{path} holds a tensor under a name that is no text "
                            f"({str(Plain()(name))[:80]!a}); save model.state_dict()")
    rest = {key: value for key, value in top.items()
            if value is not state and not (state is top and _is_tensor(value))}
    return views, Plain()(rest)


def _is_tensor(value: Any) -> bool:
    """Whether the value is a tensor, of whatever kind."""
    return isinstance(value, Tensor) or (
        isinstance(value, Instance) and str(value.function).startswith("torch._utils._rebuild"))


def _tensors_in(value: Any) -> int:
    """The number of tensors that are entries of a dict; 0 of anything else."""
    return sum(map(_is_tensor, value.values())) if isinstance(value, dict) else 0


def _view(path: Path, name: str, tensor: Tensor | Instance, find: Callable[[Storage], Blob],
          swapped: bool) -> View:
    """Checks what the pickle says of a tensor against the storage it lies in.

    Raises:
        UserError: of a kind that cannot be read, or outside its storage.
    """
    storage = tensor.storage if isinstance(tensor, Tensor) else None
    if isinstance(tensor, Instance) or not tensor.plain or not isinstance(storage, Storage):
        kind = _shown(tensor.function) if isinstance(tensor, Instance) else "a conjugated view"
        raise UserError(f"{path} holds the tensor {name!a} as {kind}, which cannot be read; save "
                        "it as a plain dense tensor")
    dtype = storage.dtype
    if tensor.dtype is not None:
        dtype = DTYPES.get(tensor.dtype.name)
    if dtype is None:
        raise UserError(f"{path} holds the tensor {name!a} as "
                        f"{_shown(tensor.dtype or storage.kind)}, which cannot be read; save it "
                        "as float32")
    try:
        if len(tensor.shape) > MAX_AXES:
            raise ValueError("too many axes")
        shape = tuple(map(_count, _of(tuple, tensor.shape)))
        strides = tuple(map(_count, _of(tuple, tensor.strides)))
        offset = _count(tensor.offset)
        blob = find(storage)
        start = blob.start + storage.first * storage.width + offset * dtype.itemsize
        size = span(shape, strides) * dtype.itemsize
        if 0 in shape:
            size = 0
        if offset * dtype.itemsize + size > storage.count * storage.width:
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
        if blob.size != storage.count * storage.width:
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
            blobs[key] = Blob(position + 8, count * storage.width)
            position = blobs[key].start + blobs[key].size
        if position > size:
            raise damaged(path)
    return top, lambda storage: blobs[storage.key]


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
        if _is_tensor(value) or isinstance(value, Storage):
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
