"""Encoders and heads; the only folder that imports flax.linen."""

from brgsa_jax.nn import bert, heads, resnet, vit  # noqa: F401  (registry entries)
