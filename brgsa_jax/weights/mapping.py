"""Tables from the tensors of a PyTorch model to parameters here, read in both directions.

A table says every name once: which tensor, which leaf, and what turns one into the other. Reading
and writing back use the same rows, so that what goes in comes out bit for bit.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from brgsa_jax import paths
from brgsa_jax.config import UserError
from brgsa_jax.weights.tensors import Tensors

# Problems shown in one message.
SHOWN = 8


class Transform(NamedTuple):
    """How a tensor becomes (its part of) a leaf.

    Attributes:
        read: (tensor, shape of the leaf) -> leaf.
        write: leaf -> tensor.
        shape: shape of the leaf -> shape of the tensor.
    """

    read: Callable[[np.ndarray, tuple[int, ...]], np.ndarray]
    write: Callable[[np.ndarray], np.ndarray]
    shape: Callable[[tuple[int, ...]], tuple[int, ...]]


def _reversed(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[::-1]


# A tensor as it is.
SAME = Transform(lambda x, shape: x, lambda x: x, lambda shape: shape)
# Linear weight (out, in) <-> kernel [in, out].
LINEAR = Transform(lambda x, shape: x.T, lambda x: x.T, _reversed)
# Convolution of one place (out, in, 1) <-> kernel [in, out].
POINTWISE = Transform(lambda x, shape: x[..., 0].T, lambda x: x.T[..., None],
                      lambda shape: (*shape[::-1], 1))
# Convolution (out, in, *places) <-> kernel [*places, in, out].
CONV = Transform(
    lambda x, shape: np.moveaxis(x, (0, 1), (-1, -2)),
    lambda x: np.moveaxis(x, (-1, -2), (0, 1)),
    lambda shape: (shape[-1], shape[-2], *shape[:-2]))
# A table with an axis of one before it: (1, rows, W) <-> [rows, W].
TABLE = Transform(lambda x, shape: x[0], lambda x: x[None], lambda shape: (1, *shape))


def patches(size: Sequence[int], channels: int) -> Transform:
    """Convolution over whole patches (W, C, *size) <-> kernel [∏size·C, W], channels fastest."""
    size = tuple(size)

    def read(x: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        return np.moveaxis(x, (0, 1), (-1, -2)).reshape(shape)

    def write(x: np.ndarray) -> np.ndarray:
        return np.moveaxis(x.reshape(*size, channels, x.shape[-1]), (-1, -2), (0, 1))

    return Transform(read, write, lambda shape: (shape[-1], channels, *size))


class Rule(NamedTuple):
    """One row of a table.

    Attributes:
        source: name of the tensor; "{i}" stands for the layer.
        target: path of the leaf, below "params", "stats" or "bank". With "{i}" in the source, the
            leaf has the layers on its first axis.
        transform: see `Transform`.
        part: (index, count) where the tensor holds several leaves one after another on its first
            axis, as the fused query, key and value of an attention do.
    """

    source: str
    target: str
    transform: Transform = SAME
    part: tuple[int, int] = (0, 1)


class Table(NamedTuple):
    """How a model of one kind lies in a file.

    Attributes:
        rules: one for every leaf, and for every part of a tensor.
        unused: regexes, full match, of tensors that a forward pass does not need.
        what: for messages, such as "a BrgSA checkpoint".
    """

    rules: tuple[Rule, ...]
    unused: tuple[str, ...]
    what: str


def both(source: str, target: str, transform: Transform = LINEAR, *,
         names: tuple[str, str] = ("kernel", "bias"),
         part: tuple[int, int] = (0, 1)) -> tuple[Rule, Rule]:
    """Rules of SOURCE.weight and SOURCE.bias, to leaves `names` below `target`."""
    return (Rule(f"{source}.weight", f"{target}/{names[0]}", transform, part),
            Rule(f"{source}.bias", f"{target}/{names[1]}", SAME, part))


def norm(source: str, target: str) -> tuple[Rule, Rule]:
    """Rules of the scale and bias of a normalisation."""
    return both(source, target, SAME, names=("scale", "bias"))


def statistics(source: str, target: str) -> tuple[Rule, Rule]:
    """Rules of the running mean and variance of a batch normalisation."""
    return (Rule(f"{source}.running_mean", f"{target}/mean"),
            Rule(f"{source}.running_var", f"{target}/var"))


def renamed(tensors: Tensors, rename: Callable[[str], str]) -> Tensors:
    """The same tensors by other names.

    Raises:
        UserError: two tensors would have the same name.
    """
    names = {rename(name): name for name in tensors.specs}
    if len(names) < len(tensors.specs):
        doubled = sorted(set(tensors.specs) - set(names.values()))
        raise UserError(f"{tensors.path} holds the same tensor more than once ({doubled[0]}); keep "
                        "one of them")
    return tensors.renamed(names)


def below(tensors: Tensors, prefix: str) -> Tensors:
    """The tensors whose names start with a prefix, by what follows it."""
    return tensors.renamed({name.removeprefix(prefix): name for name in tensors.specs
                            if name.startswith(prefix)})


def shape_of(specs: Mapping[str, Any], name: str, *ranks: int) -> tuple[int, ...]:
    """The shape of a tensor that tells sizes.

    Args:
        specs: of a file.
        name: of the tensor.
        *ranks: numbers of axes it may have.

    Raises:
        KeyError: it is missing, or has another number of axes or an empty one.
    """
    shape = specs[name].shape
    if len(shape) not in ranks or 0 in shape:
        raise KeyError(f"{name} with {' or '.join(map(str, ranks))} axes")
    return shape


def depth_of(specs: Mapping[str, Any], prefix: str) -> int:
    """Counts the layers whose tensors are called PREFIX0, PREFIX1 and so on."""
    found = (re.match(re.escape(prefix) + r"(\d+)\.", name) for name in specs)
    return len({match[1] for match in found if match})


def join(what: str, *tables: Table) -> Table:
    """Returns the table of a model made of several parts."""
    return Table(tuple(r for t in tables for r in t.rules),
                 tuple(u for t in tables for u in t.unused), what)


class _Step(NamedTuple):
    """A rule at one layer (None: not stacked) and the shape of its leaf there."""

    rule: Rule
    layer: int | None
    shape: tuple[int, ...]

    @property
    def source(self) -> str:
        layer = self.layer
        return self.rule.source if layer is None else self.rule.source.replace("{i}", str(layer))

    def tensor_shape(self) -> tuple[int, ...]:
        """Shape of the whole tensor, all of its parts together."""
        first, *rest = self.rule.transform.shape(self.shape)
        return (first * self.rule.part[1], *rest) if self.rule.part[1] > 1 else (
            self.rule.transform.shape(self.shape))


def _steps(table: Table, leaves: Mapping[str, Any]) -> Iterable[_Step]:
    for rule in table.rules:
        shape = tuple(leaves[rule.target].shape)
        if "{i}" in rule.source:
            yield from (_Step(rule, layer, shape[1:]) for layer in range(shape[0]))
        else:
            yield _Step(rule, None, shape)


def read_tree(table: Table, tensors: Tensors, expected: Any) -> Any:
    """Fills a tree of shapes from the tensors of a file.

    Nothing is read before all names and shapes were checked, and tensors are read one by one.

    Args:
        table: covers every leaf of `expected`.
        tensors: an open file.
        expected: nested dict of shapes (`jax.eval_shape`).

    Returns:
        The same tree of float32 arrays.

    Raises:
        UserError: one sentence with every missing, misshapen and unknown tensor, or every one that
            is not finite.
    """
    leaves = paths.flat(expected)
    check_covers(table, leaves)
    steps = list(_steps(table, leaves))
    unused = re.compile("|".join(table.unused)) if table.unused else None
    known, problems = {step.source for step in steps}, []
    for name, wanted in {step.source: step.tensor_shape() for step in steps}.items():
        if name not in tensors.specs:
            problems.append(f"{name} is missing")
        elif tuple(tensors.specs[name].shape) != wanted:
            problems.append(f"{name} has shape {list(tensors.specs[name].shape)}, not "
                            f"{list(wanted)}")
        elif not _is_number(tensors.specs[name].dtype):
            problems.append(f"{name} holds {tensors.specs[name].dtype}, not floats")
    problems += [f"{name} is unknown" for name in tensors.specs
                 if name not in known and not (unused and unused.fullmatch(name))]
    if problems:
        raise UserError(f"{tensors.path} does not hold {table.what}: {listing(problems)}; give the "
                        "file this model was saved to, whole and unchanged")
    arrays = {path: np.empty(leaf.shape, np.float32) for path, leaf in leaves.items()}
    by_source: dict[str, list[_Step]] = {}
    for step in steps:
        by_source.setdefault(step.source, []).append(step)
    for name, users in by_source.items():
        tensor = tensors.read(name)
        for step in users:
            index, count = step.rule.part
            part = tensor if count == 1 else tensor.reshape(count, -1, *tensor.shape[1:])[index]
            leaf = arrays[step.rule.target]
            leaf[() if step.layer is None else step.layer] = step.rule.transform.read(
                part, step.shape)
    wild = [path for path, array in arrays.items() if not np.isfinite(array).all()]
    if wild:
        raise UserError(f"{tensors.path} holds numbers that are not finite in float32 "
                        f"({listing(wild)}); its training diverged or the file is damaged, give "
                        "another one")
    return paths.map_with_path(lambda path, _: arrays[path], expected)


def sources_of(table: Table, expected: Any) -> Iterable[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the tensors a tree of these shapes is made of."""
    for step in _steps(table, paths.flat(expected)):
        yield step.source, step.tensor_shape()


def write_tensors(table: Table, tree: Any) -> dict[str, np.ndarray]:
    """Writes a tree back to tensors by their names, the inverse of `read_tree`."""
    leaves = paths.flat(tree)
    check_covers(table, leaves)
    parts: dict[str, list[np.ndarray]] = {}
    for step in _steps(table, leaves):
        leaf = np.asarray(leaves[step.rule.target])
        leaf = leaf if step.layer is None else leaf[step.layer]
        slots = parts.setdefault(step.source, [np.empty(0)] * step.rule.part[1])
        slots[step.rule.part[0]] = step.rule.transform.write(leaf)
    return {name: np.ascontiguousarray(np.concatenate(slots) if len(slots) > 1 else slots[0])
            for name, slots in parts.items()}


def check_covers(table: Table, leaves: Mapping[str, Any]) -> None:
    """Refuses a table that leaves a parameter out or fills one that is not there.

    Raises:
        UserError: the model has parts that such a file has no place for.
    """
    filled = {rule.target for rule in table.rules}
    problems = [f"{path} has no place in it" for path in leaves if path not in filled]
    problems += [f"{path} is not in the model" for path in filled if path not in leaves]
    if problems:
        raise UserError(f"the model and {table.what} differ: {listing(problems)}; choose a model "
                        "of the same structure")


def listing(problems: Sequence[str]) -> str:
    """Joins problems with semicolons, the first ones of many."""
    more = len(problems) - SHOWN
    return "; ".join(problems[:SHOWN]) + (f"; and {more} more" if more > 0 else "")


def _is_number(dtype: np.dtype) -> bool:
    # bfloat16 has the kind "V" of its registration. Integers would be a quantised file's.
    return dtype.kind == "f" or dtype.name == "bfloat16"
