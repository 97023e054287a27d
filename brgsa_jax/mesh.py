"""The device mesh, and how arrays are laid over it.

The mesh has the axes ("data", "fsdp"); the batch is sharded over both, parameters over "fsdp",
the rows of the knowledge bank over both. Axis types are Auto: under Explicit axes embedding
look-ups and `z @ z.T` on a sharded batch raise.
"""

import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from brgsa_jax import paths
from brgsa_jax.config import UserError

BATCH_AXES = ("data", "fsdp")
SMALLEST_SHARDED = 2**14


def make_mesh(data: int = -1, fsdp: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """Makes the ("data", "fsdp") mesh.

    Args:
        data: devices along "data"; -1 takes what is left.
        fsdp: devices along "fsdp", over which parameters are sharded; -1 takes what is left.
        devices: the devices to use, by default all.

    Raises:
        UserError: the axes do not multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    count = len(devices)
    sizes = [data, fsdp]
    if sizes.count(-1) == 1:
        known = int(np.prod([s for s in sizes if s != -1]))
        if known > 0 and count % known == 0:
            sizes[sizes.index(-1)] = count // known
    if -1 in sizes or int(np.prod(sizes)) != count:
        raise UserError(f"the mesh data={data} × fsdp={fsdp} does not fit {count} devices; choose "
                        "two numbers whose product is that, or -1 for one of them")
    return jax.make_mesh(tuple(sizes), BATCH_AXES, devices=devices,
                         axis_types=(AxisType.Auto,) * 2)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of an array whose first axis is the global batch."""
    return NamedSharding(mesh, P(BATCH_AXES))


def over_rows(mesh: Mesh) -> Any:
    """Turns a function of arrays [B, …] into one that every device runs on its own rows."""
    rows = P(BATCH_AXES)
    return lambda function: jax.shard_map(function, mesh=mesh, in_specs=rows, out_specs=rows,
                                          check_vma=False)


def place(rows: Any, sharding: NamedSharding, devices: int | None = None) -> Any:
    """Puts this process's rows of a batch on its devices.

    Args:
        rows: tree of NumPy arrays [b, …].
        sharding: of the leading axis.
        devices: None assembles the processes' rows to global arrays [B, …]; a number deals them
            to as many devices, [devices, b/devices, …], contiguous rows on each, as `jax.pmap`
            takes them.
    """
    if devices is not None:
        rows = jax.tree.map(lambda x: x.reshape(devices, -1, *x.shape[1:]), rows)
    if jax.process_count() == 1:
        # One call for all arrays costs the host a third of one for each.
        return jax.device_put(rows, sharding)
    # Asked for, though JAX does not take it for that where the loop disallows other transfers.
    with jax.transfer_guard_host_to_device("allow"):
        return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), rows)


def replicated(mesh: Mesh) -> NamedSharding:
    """Sharding of an array every device holds whole."""
    return NamedSharding(mesh, P())


def constrain_batch(x: jax.Array, mesh: Mesh | None) -> jax.Array:
    """Keeps the first axis of `x` sharded over the batch axes; no-op without a mesh."""
    return x if mesh is None else jax.lax.with_sharding_constraint(x, batch_sharding(mesh))


def parameter_specs(tree: Any, mesh: Mesh, rules: Sequence[tuple[str, Any]] = ()) -> Any:
    """Gives every leaf a PartitionSpec.

    Args:
        tree: parameters or their shapes.
        mesh: a ("data", "fsdp") mesh.
        rules: (path regex, spec) written by the user; a spec is a tuple of axis names or None.

    Returns:
        Tree of PartitionSpecs: the user's rule, else the largest axis that "fsdp" divides for
        arrays of at least 16 Ki entries, else replicated.

    Raises:
        UserError: a rule is no such pair, matches nothing, or does not fit what it matches.
    """
    size = mesh.shape["fsdp"]
    rules = [(pattern, _spec_of(pattern, spec)) for pattern, spec in map(_pair, rules)]

    def default(_: str, leaf: Any) -> P:
        shape = leaf.shape
        if size == 1 or int(np.prod(shape)) < SMALLEST_SHARDED:
            return P()
        for axis in sorted(range(len(shape)), key=lambda a: -shape[a]):
            if shape[axis] % size == 0:
                return P(*[None] * axis, "fsdp")
        return P()

    specs = paths.match(tree, rules, default)
    leaves = paths.flat(tree)
    for (path, leaf), spec in zip(leaves.items(), jax.tree.leaves(
            specs, is_leaf=lambda x: isinstance(x, P)), strict=True):
        if len(spec) > len(leaf.shape) or any(
                axis is not None and leaf.shape[place] % mesh.shape[axis]
                for place, axis in enumerate(spec)):
            raise UserError(f"mesh.rules cannot lay {path} of shape {tuple(leaf.shape)} as "
                            f"{tuple(spec)} over {dict(mesh.shape)}; every named axis must be "
                            "there and divide its size")
    return specs


def _pair(rule: Any) -> tuple[str, Any]:
    try:
        pattern, spec = rule
        re.compile(pattern)
    except (TypeError, ValueError, re.error) as error:
        raise UserError(f"mesh.rules has {rule!r} ({error}); a rule is (path regex, spec), as in "
                        "(('.*/query/kernel', (None, None, 'fsdp')),)") from error
    return pattern, spec


def _spec_of(pattern: str, spec: Any) -> P:
    if not isinstance(spec, (tuple, list)) or not all(
            axis is None or axis in BATCH_AXES for axis in spec):
        raise UserError(f"mesh.rules gives {pattern!r} the spec {spec!r}; a spec is a tuple of "
                        f"None and {' or '.join(map(repr, BATCH_AXES))}, one for each axis")
    return P(*spec)


def shardings(specs: Any, mesh: Mesh) -> Any:
    """Turns a tree of PartitionSpecs into NamedShardings."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs,
                        is_leaf=lambda x: isinstance(x, P))


def bank_spec(rows: int, mesh: Mesh) -> P:
    """PartitionSpec of a bank of `rows` rows.

    Raises:
        UserError: the rows do not divide over the devices.
    """
    if rows % mesh.size:
        raise UserError(f"model.bank.rows={rows} does not divide over {mesh.size} devices; choose "
                        f"a multiple such as {-(-rows // mesh.size) * mesh.size}")
    return P(BATCH_AXES)
