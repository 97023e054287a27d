"""Projection heads into the shared embedding space.

A head maps [..., W] to un-normalised [..., dim] in float32 (float64 for float64 input). All take
`mask` [...] (True = counts in batch statistics) and `train`; only those with batch statistics
read them.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from brgsa_jax.nn.norm import WHOLE_BATCH, BatchNorm, Scope
from brgsa_jax.registry import register


class Projection(nn.Module):
    """One affine map, BrgSA's g_v and g_t: x ↦ xA + b."""

    dim: int

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None = None,
                 train: bool = False) -> jax.Array:
        """Maps [..., W] to [..., dim]."""
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        return nn.Dense(self.dim, dtype=x.dtype, name="linear")(x)


class BatchNormProjection(nn.Module):
    """MGCA's head: affine map, BatchNorm, ReLU, affine map, BatchNorm without affine part.

    For tokens [B, N, W] it is the reference's 1x1 convolutions; statistics run over B and N.

    Attributes:
        dim: output width.
        hidden: width between the two maps.
        sharing: who shares batch statistics.
    """

    dim: int
    hidden: int
    sharing: Scope = WHOLE_BATCH

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None = None,
                 train: bool = False) -> jax.Array:
        """Maps [..., W] to [..., dim]; rows where `mask` [...] is False enter no statistics."""
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        x = nn.Dense(self.hidden, dtype=x.dtype, name="hidden")(x)
        x = nn.relu(BatchNorm(sharing=self.sharing, name="hidden_norm")(x, mask, train))
        x = nn.Dense(self.dim, dtype=x.dtype, name="out")(x)
        return BatchNorm(affine=False, sharing=self.sharing, name="out_norm")(x, mask, train)


@register("head", "linear")
def linear(*, dim: int, **_: Any) -> nn.Module:
    """Makes the single affine head; it has no batch statistics, so it needs no `scope`."""
    return Projection(dim)


@register("head", "batchnorm")
def batchnorm(*, dim: int, hidden: int = 2048, scope: Scope = WHOLE_BATCH,
              **_: Any) -> nn.Module:
    """Makes MGCA's two-layer head."""
    return BatchNormProjection(dim, hidden, scope)
