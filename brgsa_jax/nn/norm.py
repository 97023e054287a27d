"""Batch normalisation with PyTorch's semantics and a stated scope of its statistics."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax


class Scope(NamedTuple):
    """Which rows share batch statistics.

    Attributes:
        axis_name: mesh axis, or tuple of axes, over which the batch is split (inside `jax.pmap`
            or `jax.shard_map`); statistics are those of all devices. None where one program
            sees the whole batch, as under `jax.jit` with a sharded batch.
        shards: each contiguous 1/shards of the leading axis has its own statistics, as on that
            many unsynchronised devices; needs `axis_name=None` or `local`.
        local: with `axis_name`, every device normalises by its own statistics and only the
            running ones are averaged.
    """

    axis_name: str | tuple[str, ...] | None = None
    shards: int = 1
    local: bool = False


WHOLE_BATCH = Scope()


class BatchNorm(nn.Module):
    """Batch normalisation over all axes but the last, as PyTorch's `BatchNorm{1,2,3}d`.

    The batch is normalised by its biased variance; the running variance is the unbiased one.
    Statistics live in the collection "batch_stats" (mean, var), which must be mutable when
    training. Everything is computed in float32, or float64 for float64 input.

    Attributes:
        affine: learn a scale and a bias per feature.
        momentum: share of the new batch in the running statistics.
        epsilon: added to the variance.
        sharing: who shares statistics; several scopes' running statistics are averaged.
    """

    affine: bool = True
    momentum: float = 0.1
    epsilon: float = 1e-5
    sharing: Scope = WHOLE_BATCH

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None = None,
                 train: bool = False) -> jax.Array:
        """Normalises features.

        Args:
            x: [B, ..., W].
            mask: [B, ...] bool, False leaves a row out of the statistics (it is still
                normalised); None counts every row.
            train: use and record the statistics of the batch, not the running ones.

        Returns:
            [B, ..., W] float32 (float64 for float64 input).

        Raises:
            ValueError: the batch cannot be split into `sharing.shards`, or training on one row.
        """
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        width = x.shape[-1]
        mean = self.variable("batch_stats", "mean", jnp.zeros, (width,), jnp.float32)
        var = self.variable("batch_stats", "var", jnp.ones, (width,), jnp.float32)
        # Parameters are initialised outside pmap and shard_map, where the axes have no name.
        if train and not self.is_initializing():
            y, new_mean, new_var = self._by_batch(x, mask, mean.value, var.value)
            mean.value, var.value = new_mean, new_var
        else:
            y = (x - mean.value) * lax.rsqrt(var.value + self.epsilon)
        if self.affine:
            scale = self.param("scale", nn.initializers.ones, (width,))
            bias = self.param("bias", nn.initializers.zeros, (width,))
            y = y * scale + bias
        return y

    def _by_batch(self, x: jax.Array, mask: jax.Array | None, mean: jax.Array,
                  var: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Normalises [B, ..., W] by its own statistics; also returns the running ones, [W]."""
        axes, shards = self._axes(), self.sharing.shards
        if len(x) % shards:
            raise ValueError(f"{len(x)} rows cannot be split into {shards} equal shards of batch "
                             "statistics; choose a multiple as batch size")
        parts = x.reshape(shards, -1, *x.shape[1:])
        keep = None if mask is None else mask.astype(bool).reshape(*parts.shape[:-1], 1)
        over = tuple(range(1, parts.ndim - 1))

        def total(values: jax.Array) -> jax.Array:
            if keep is not None:
                values = jnp.where(keep, values, 0.0)
            values = values.sum(over, keepdims=True)
            return lax.psum(values, axes) if axes else values

        if keep is None:
            rows = x.size // (shards * x.shape[-1])
            count = rows * (lax.axis_size(axes) if axes else 1)
            if count < 2:
                raise ValueError("batch normalisation cannot train on a single row, whose "
                                 "variance is zero; use a larger batch")
            count = jnp.full((1,) * parts.ndim, count, x.dtype)
        else:
            count = total(jnp.ones((*parts.shape[:-1], 1), x.dtype))
        divisor = jnp.maximum(count, 1.0)
        batch_mean = total(parts) / divisor
        # Two passes: E[x²] - E[x]² cancels where the mean is large against the spread.
        centred = parts - batch_mean
        batch_var = total(centred * centred) / divisor
        y = (centred * lax.rsqrt(batch_var + self.epsilon)).reshape(x.shape)

        def running(old: jax.Array, new: jax.Array, least: int) -> jax.Array:
            old = lax.stop_gradient(old)
            new = old + self.momentum * (lax.stop_gradient(new).reshape(-1, x.shape[-1]) - old)
            # A scope without rows tells nothing, one of a single row nothing of the spread.
            new = jnp.where(count.reshape(-1, 1) >= least, new, old).mean(axis=0)
            if self.sharing.local and self.sharing.axis_name is not None:
                new = lax.pmean(new, self.sharing.axis_name)
            return new.astype(old.dtype)

        unbiased = batch_var * (divisor / jnp.maximum(divisor - 1.0, 1.0))
        return y, running(mean, batch_mean, 1), running(var, unbiased, 2)

    def _axes(self) -> tuple[str, ...]:
        """Returns the mesh axes that sums run over."""
        name, shards, local = self.sharing
        if name is None or local:
            return ()
        if shards > 1:
            raise ValueError(f"Scope(axis_name={name!r}, shards={shards}) asks for statistics "
                             "shared by all devices and kept apart; add local=True or take "
                             "shards=1")
        return (name,) if isinstance(name, str) else tuple(name)
