"""Shared arithmetic of the losses: safe normalisation, exact means, positives, devices, ring.

Conventions (all losses of this package):

* ``axis_name`` is ``None`` on one device, else the mesh axis, or tuple of axes, over which the
  batch is split in equal parts. The same code runs inside ``jax.shard_map`` (``check_vma`` on or
  off) and inside ``jax.pmap``.
* A scalar that leaves a loss is the ``lax.pmean`` of every device's share, so all devices hold
  the same number and differentiation needs no further convention than ``lax.pmean`` itself.
* ``valid`` marks the rows that exist; the others (padding of a ragged last batch) are no anchor,
  no negative and in no mean, whatever numbers, NaN included, they hold.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

AxisName = str | tuple[str, ...] | None

# Finite, so that a row whose every column is masked has no NaN in its gradient.
MASKED = -1e30


def axis_tuple(axis_name: AxisName) -> tuple[str, ...]:
    """Mesh axes as a tuple; empty for one device."""
    if axis_name is None:
        return ()
    return (axis_name,) if isinstance(axis_name, str) else tuple(axis_name)


def promote(*arrays: Array) -> tuple[Array, ...]:
    """Casts to the common type of the arrays and float32 (bf16 -> float32, float64 stays)."""
    dtype = jnp.promote_types(jnp.result_type(*arrays), jnp.float32)
    return tuple(jnp.asarray(x, dtype) for x in arrays)


def dot(subscripts: str, *operands: Array) -> Array:
    """``einsum`` at full precision: TF32 or bf16 passes would break the stated tolerances."""
    return jnp.einsum(subscripts, *operands, precision=lax.Precision.HIGHEST)


def l2_normalize(x: Array, axis: int = -1) -> Array:
    """Unit vectors along ``axis``; a zero vector stays zero and its gradient is exactly zero.

    A vector with a NaN becomes NaN.

    Args:
        x: float array.
        axis: the axis of the vectors.

    Returns:
        Array like ``x``.
    """
    squared = jnp.sum(x * x, axis=axis, keepdims=True)
    # Not `> 0`: a NaN must stay one, or a diverged tower would look like a zero vector.
    nonzero = squared != 0
    # Both the inner and the outer `where` are needed: 0 * (derivative of sqrt at 0) is NaN.
    norm = jnp.sqrt(jnp.where(nonzero, squared, 1.0))
    return jnp.where(nonzero, x / norm, 0.0)


def zero_invalid(x: Array, valid: Array | None) -> Array:
    """Rows of ``x[B, ...]`` that do not exist become zero, with zero gradient."""
    if valid is None:
        return x
    return jnp.where(valid.reshape(valid.shape + (1,) * (x.ndim - 1)), x, jnp.zeros_like(x))


def check_shapes(where: str, **arrays: tuple[Array, Sequence[Any]]) -> None:
    """Compares shapes with named dimensions, and says what is wrong in one sentence.

    Args:
        where: function name for the message.
        **arrays: name -> (array, dimensions); a string dimension must be the same everywhere.

    Raises:
        ValueError: a rank or a dimension differs.
    """
    sizes: dict[str, int] = {}
    for name, (array, dims) in arrays.items():
        shape = jnp.shape(array)
        expected = "[" + ",".join(str(d) for d in dims) + "]"
        if len(shape) != len(dims) or any(
            sizes.setdefault(d, n) != n if isinstance(d, str) else d != n
            for d, n in zip(dims, shape, strict=True)
        ):
            known = ", ".join(f"{k}={v}" for k, v in sizes.items())
            raise ValueError(
                f"{where}: {name} has shape {list(shape)}, but {expected} is needed ({known})."
            )


def check_choice(where: str, name: str, value: Any, choices: Sequence[str]) -> None:
    """Raises ValueError, listing the choices, when ``value`` is none of them."""
    if value not in choices:
        raise ValueError(f"{where}: {name}={value!r} is unknown; choose one of {list(choices)}.")


def check_batch(
    where: str, image: Array, text: Array, positives: Array | None, valid: Array | None
) -> None:
    """Checks the arguments of a loss between two embeddings.

    Args:
        where: function name for the message.
        image: ``[B, D]``.
        text: ``[B, D]``.
        positives: ``[B]``, ``[B, m]`` or None; without a column a row would not match itself.
        valid: ``[B]`` or None.

    Raises:
        ValueError: a shape differs, or ``positives`` has no column.
    """
    shapes = {"image": (image, "BD"), "text": (text, "BD")}
    if positives is not None:
        shapes["positives"] = (positives, "Bm" if jnp.ndim(positives) == 2 else "B")
    if valid is not None:
        shapes["valid"] = (valid, "B")
    check_shapes(where, **shapes)
    if positives is not None and jnp.shape(positives)[1:] == (0,):
        raise ValueError(f"{where}: positives has no column; give None or at least one group id.")


def check_rows_axis(where: str, rows_axis: AxisName, axis_name: AxisName) -> None:
    """Raises ValueError unless the bank's rows are sharded over batch axes only."""
    missing = set(axis_tuple(rows_axis)) - set(axis_tuple(axis_name))
    if missing:
        raise ValueError(
            f"{where}: rows_axis {sorted(missing)} is not among the batch axes "
            f"{list(axis_tuple(axis_name))}; shard the bank over a batch axis."
        )


def unit_rows(image: Array, text: Array, valid: Array | None) -> tuple[Array, Array]:
    """Promoted unit vectors of both modalities; rows that do not exist are zero."""
    image, text = promote(image, text)
    return l2_normalize(zero_invalid(image, valid)), l2_normalize(zero_invalid(text, valid))


def same_group(groups: Array, others: Array) -> Array:
    """Who is whose positive: ``[b, c]`` bool, symmetric, not necessarily transitive.

    Args:
        groups: ``[b]`` or ``[b, m]`` integer ids.
        others: ``[c]`` or ``[c, m]``.
    """
    if groups.ndim == 1:
        return groups[:, None] == others[None, :]
    # Column by column: a [b, c, m] comparison would be m times the memory.
    same = groups[:, None, 0] == others[None, :, 0]
    for column in range(1, groups.shape[1]):
        same = same | (groups[:, None, column] == others[None, :, column])
    return same


def axis_size(axis_name: AxisName) -> int:
    """Number of devices along the axes, a Python int."""
    return lax.axis_size(axis_tuple(axis_name)) if axis_name is not None else 1


def axis_index(axis_name: AxisName) -> Array | int:
    """Position of this device along the axes, first axis slowest, as in a PartitionSpec."""
    return lax.axis_index(axis_tuple(axis_name)) if axis_name is not None else 0


def group_ids(positives: Array | None, rows: Array, axis_name: AxisName) -> Array:
    """Global group ids of each of this device's rows; without groups, its global row number."""
    if positives is not None:
        return positives
    count = rows.shape[0]
    return axis_index(axis_name) * count + jnp.arange(count)


def varying_axes(*arrays: Array) -> tuple[str, ...]:
    """Mesh axes over which any of the arrays is typed as device-varying (check_vma=True)."""
    axes: set[str] = set()
    for x in arrays:
        axes |= set(jax.typeof(x).manual_axis_type.varying)
    return tuple(sorted(axes))


def vary(x: Array, axes: AxisName) -> Array:
    """Types ``x`` as varying over ``axes``; scan carries and custom_vjp arguments need it."""
    x = jnp.asarray(x)
    missing = tuple(a for a in axis_tuple(axes) if a not in varying_axes(x))
    return lax.pcast(x, missing, to="varying") if missing else x


def gather_rows(x: Array, axis_name: AxisName) -> Array:
    """The global batch ``[B, ...]`` from this device's ``[b, ...]``, in mesh order."""
    if axis_name is None:
        return x
    axes = axis_tuple(axis_name)
    return lax.all_gather(vary(x, axes), axes, axis=0, tiled=True)


def swap_rows_for_columns(x: Array, axis_name: AxisName) -> Array:
    """This device's columns of all rows, ``[B, c/n]``, from its rows of all columns, ``[b, c]``."""
    if axis_name is None:
        return x
    axes = axis_tuple(axis_name)
    return lax.all_to_all(vary(x, axes), axes, split_axis=1, concat_axis=0, tiled=True)


def swap_columns_for_rows(x: Array, axis_name: AxisName) -> Array:
    """This device's rows of all columns, ``[B/n, C]``, from its columns of all rows ``[B, c]``."""
    if axis_name is None:
        return x
    axes = axis_tuple(axis_name)
    return lax.all_to_all(vary(x, axes), axes, split_axis=0, concat_axis=1, tiled=True)


def global_mean(values: Array, valid: Array | None, axis_name: AxisName) -> Array:
    """Mean of per-sample values over the valid rows of all devices.

    Each device divides its own sum by the global count and multiplies by the number of devices,
    so that the ``lax.pmean`` of the shares is the mean.

    Args:
        values: ``[b]``, this device's samples.
        valid: ``[b]`` bool or None.
        axis_name: axes of the batch or None.

    Returns:
        Scalar, equal on all devices; 0 when no row is valid.
    """
    if valid is None:
        mean = jnp.mean(values)
    else:
        count = jnp.sum(valid.astype(values.dtype))
        if axis_name is not None:
            count = lax.pmean(vary(count, axis_name), axis_tuple(axis_name))
        # `count` is now the mean number of valid rows a device has: the factor n is in it.
        total = jnp.sum(jnp.where(valid, values, 0.0))
        mean = jnp.where(count > 0, total / jnp.where(count > 0, count, 1.0), 0.0)
    if axis_name is None:
        return mean
    return lax.pmean(vary(mean, axis_name), axis_tuple(axis_name))


# --------------------------------------------------------------------------------------------
# Ring: blocks travel once around the devices, so that memory does not grow with their number.


def _rotate(tree: Any, axis_name: AxisName) -> Any:
    """Hands a tree to the next device of the ring."""
    n = axis_size(axis_name)
    shift = [(i, (i + 1) % n) for i in range(n)]
    return jax.tree.map(lambda x: lax.ppermute(x, axis_tuple(axis_name), shift), tree)


def travel(
    step: Callable[[Any, Any], tuple[Any, Any]],
    travelling: Any,
    staying: Any,
    axis_name: AxisName,
) -> tuple[Any, Any]:
    """Runs ``step(travelling, staying)`` on every device's block, until all are home again.

    Args:
        step: returns the new (travelling, staying) of equal shapes, dtypes and varying axes.
        travelling: tree of arrays of this device's block and of what is gathered on the way.
        staying: tree of arrays that do not move.
        axis_name: axes of the ring, or None for one device, where ``step`` runs once.

    Returns:
        (travelling, staying) after the whole round.
    """
    if axis_name is None:
        return step(travelling, staying)

    def body(carry, _):
        travelling, staying = step(*carry)
        return (_rotate(travelling, axis_name), staying), None

    n = axis_size(axis_name)
    (travelling, staying), _ = lax.scan(body, (travelling, staying), None, length=n)
    return travelling, staying


def spread(axis_name: AxisName, *arrays: Array) -> tuple[Array, ...]:
    """Types all arrays as varying over the same axes, as a custom_vjp and a scan carry need.

    Done outside the custom_vjp, the transpose of the cast sums the gradients of what is
    replicated (temperature, bias) over the devices.
    """
    axes = tuple(dict.fromkeys(axis_tuple(axis_name) + varying_axes(*arrays)))
    return tuple(vary(x, axes) for x in arrays)


def zeros(like: Array, shape: tuple[int, ...] | None = None, fill: float = 0.0) -> Array:
    """Start of a scan carry: ``fill`` with the dtype and the varying axes of ``like``."""
    shape = like.shape if shape is None else shape
    return vary(jnp.full(shape, fill, like.dtype), varying_axes(like))


def accumulate(peak: Array, total: Array, logits: Array, axis: int) -> tuple[Array, Array]:
    """Adds a block of logits to a running (maximum, sum of exponentials) along ``axis``."""
    new_peak = jnp.maximum(peak, jnp.max(logits, axis=axis))
    block = jnp.sum(jnp.exp(logits - jnp.expand_dims(new_peak, axis)), axis=axis)
    return new_peak, total * jnp.exp(peak - new_peak) + block
