"""Pickles followed without running them, on inert values.

A pickle is a program. `Machine` follows it opcode by opcode, but where a loader would import a name
or call a function it only notes down which; what the notes mean is worked out afterwards. A call
that is known to be harmless becomes data, any other is refused by name.
"""

import mmap
import pickletools
import re
import sys
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from brgsa_jax.config import UserError

# Bytes and operations of one pickle; real checkpoints of 1000 tensors stay below 1 MB and 100 000.
MAX_PICKLE = 64 << 20
MAX_STEPS = 5_000_000

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


@dataclass(eq=False, slots=True)
class Tensor:
    """A window of a storage, as the pickle claims it; `torch_file` checks it."""

    storage: Any
    offset: Any
    shape: Any
    strides: Any
    dtype: Global | None = None
    plain: bool = True


class Machine:
    """Follows pickles of one file on inert values.

    Attributes:
        storages: the first storage seen of every key.
        modules: classes of whole modules, which the legacy format keeps with their source.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.storages: dict[str, Storage] = {}
        self.modules: set[Global] = set()
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
        return UserError(f"{self.path} would run {shown(what)} when loaded by PyTorch; it is "
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
        (target.items if isinstance(target, Instance) else of_type(list, target)).extend(items)

    def update(self, items: list) -> None:
        """Adds keys and values in turn to the dict below them."""
        target = self.stack[-1]
        (target.entries if isinstance(target, Instance) else of_type(dict, target)).update(
            _dict(zip(items[::2], items[1::2], strict=True)))

    def named(self, argument: str) -> None:
        """Notes a name; protocols up to 3."""
        self.stack.append(_global(*argument.split(" ", 1)))

    def named_by_stack(self, _: None) -> None:
        """Notes a name; protocol 4 and later."""
        name, module = of_type(str, self.stack.pop()), of_type(str, self.stack.pop())
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
        self.stack.append(self.call(cls, (*of_type(tuple, args), kwargs), only_creates=True))

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
        """Notes a storage of the file, or the class of a module."""
        kind, *rest = of_type(tuple, self.stack.pop())
        self.spend(len(rest))
        if kind == "module":
            self.modules.add(of_type(Global, rest[0]))
            self.stack.append(rest[0])
            return
        cls, key, _, count, *part = rest
        if kind != "storage" or not isinstance(cls, Global):
            raise ValueError("no storage")
        root = Storage(of_type(str, key), cls, as_count(count))
        self.storages.setdefault(root.key, root)
        if part and part[0] is not None:
            _, first, size = part[0]
            if as_count(first) + as_count(size) > root.count:
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
        self.spend(5 + len(of_type(tuple, args)))
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
            return Tensor(*args[:4], dtype=of_type(Global, args[6]), plain=not any(args[7:]))
        if name in ("torch._utils._rebuild_parameter",
                    "torch._utils._rebuild_parameter_with_state"):
            return args[0]
        if name == "_codecs.encode" and args[1:] in (("latin1",), ("latin-1",)):
            # How protocol 2 writes bytes.
            text = of_type(str, args[0])
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


def is_tensor(value: Any) -> bool:
    """Whether the value is a tensor, of whatever kind."""
    return isinstance(value, Tensor) or (
        isinstance(value, Instance) and str(value.function).startswith("torch._utils._rebuild"))


def shown(what: Any) -> str:
    """A name out of the file, fit for one line of a message."""
    text = str(what)[:200]
    return text if text.isprintable() else ascii(text)


def of_type(kind: type, value: Any) -> Any:
    """Returns the value.

    Raises:
        ValueError: of another type.
    """
    if not isinstance(value, kind):
        raise ValueError(f"not a {kind.__name__}")
    return value


def as_count(value: Any) -> int:
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
