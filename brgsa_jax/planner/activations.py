"""Temporaries of a step by formulas, where no compiler can be asked."""

import math
from typing import Any

import jax.numpy as jnp

from brgsa_jax import flops
from brgsa_jax.losses.tokenwise import CHUNK_ELEMENTS
from brgsa_jax.model_config import window_pairs


def fixed(config: Any, gradients: float, stacked: float) -> float:
    """Bytes of one device's temporaries that do not depend on the batch.

    Args:
        config: whole configuration.
        gradients: bytes of one device's gradients in float32.
        stacked: bytes of the parameters in scanned blocks, in float32.
    """
    size = jnp.dtype(config.model.dtype).itemsize
    # The kernels of all blocks are cast once, before the loop.
    return gradients + (stacked * size / 4 if size < 4 else 0.0)


def per_row(config: Any) -> float:
    """Bytes of one device's temporaries for one row, with attention that keeps no logits.

    What the backward pass needs of every block, the widest block's own work, and the input.
    """
    chunks = max(config.train.microbatch, 1)
    size = jnp.dtype(config.model.dtype).itemsize
    total = math.prod(config.data.crop) * (4 + size) / chunks
    text = config.model.text
    total += _transformer(text, text.max_tokens, size) / chunks
    # All hidden states are kept, and pooled in float32.
    total += 2 * (text.depth + 1) * text.max_tokens * text.width * 4 / chunks
    vision = config.model.vision
    if vision.name in flops.RESNETS:
        channels = 3 if len(config.data.crop) == 2 else len(window_pairs(config.model.input.window))
        # Output, and what normalisation and activation keep of it.
        total += sum(c.places * c.made for layers in flops.convolutions(
            vision, config.data.crop, channels) for c in layers) * (4 + 4 + size) / chunks
        tokens = 0
    else:
        tokens = math.prod(n // p for n, p in zip(config.data.crop, vision.patch, strict=True))
        total += _transformer(vision, tokens + 1, size) / chunks
    if config.model.local_head.name:
        # Tokens of both towers, projected, with their gradients.
        wide = config.model.embed_dim + config.model.local_head.hidden
        total += 2 * 4 * (tokens + text.max_tokens) * (wide + vision.get("width", 0))
        total += 8 * 4 * min(max(tokens, text.max_tokens)**2, CHUNK_ELEMENTS)
    return total


def _transformer(tower: Any, tokens: int, size: int) -> float:
    """Bytes that blocks keep for the backward pass, and the work of one block in it."""
    width, hidden = tower.width, tower.mlp_width
    kept = {"full": 4 * width,
            # Products: query, key, value, out, up and down; what is added up is float32.
            "dots": 12 * width + size * (3 * width + hidden),
            # And what norms, softmax and GELU keep.
            "none": 20 * width + size * (6 * width + 3 * hidden)}[tower.remat]
    work = size * (6 * width + 3 * hidden) + 8 * width
    return tokens * (tower.depth * kept + work)
