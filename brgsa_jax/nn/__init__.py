"""Encoders and heads; the only folder that imports flax.linen."""

from brgsa_jax.nn import bert, heads, vit3d  # noqa: F401  (registry entries)
