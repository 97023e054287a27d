"""Projection heads into the shared embedding space."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from brgsa_jax.registry import register


class Projection(nn.Module):
    """One affine map, BrgSA's g_v and g_t: x ↦ xA + b, in float32 and un-normalised."""

    dim: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [..., W] to [..., dim]."""
        return nn.Dense(self.dim, dtype=jnp.float32, name="linear")(x.astype(jnp.float32))


@register("head", "linear")
def linear(*, dim: int, **_: Any) -> nn.Module:
    """Makes the single affine head."""
    return Projection(dim)
