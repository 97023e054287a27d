"""Analytic model FLOPs, by formulas that can be checked by hand.

A multiply and an add are two. Matrix products and convolutions are counted; norms, softmax,
activations, resizing and diagnostics, which a matrix unit does not do, are not.
"""

import functools
import json
import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from brgsa_jax import paths
from brgsa_jax.config import from_tree, override, reads_text
from brgsa_jax.model_config import window_pairs
from brgsa_jax.network import build

# Blocks of the stages and channels out over channels in of a stage, by encoder.
RESNETS = {"resnet50": ((3, 4, 6, 3), 4), "resnet3d50": ((3, 4, 6, 3), 4),
           "resnet3d18": ((2, 2, 2, 2), 1)}
RESNET_WIDTH = 64
VITS = ("vit2d", "vit3d")


def forward(config: Any) -> dict[str, float]:
    """Returns the FLOPs of one sample's forward pass by part, "vision", "text" and "heads".

    The image is a training crop, `data.crop`, the text `model.text.max_tokens` long; padding is
    computed and counted. An encoder that has no formula here counts as not a number.

    Args:
        config: whole configuration.
    """
    vision, pooled, (tokens, token_width) = _vision(config)
    text = config.model.text
    per_token = _head(config.model.head, text.width, config.model.embed_dim)
    heads = _head(config.model.head, pooled, config.model.embed_dim) + per_token
    local = config.model.local_head
    if local.name:
        heads += tokens * _head(local, token_width, config.model.embed_dim)
        heads += (text.max_tokens - 1) * _head(local, text.width, config.model.embed_dim)
    blocks = (transformer(text.max_tokens, text.width, text.depth, text.mlp_width)
              if text.name == "bert" else math.nan)
    return {"vision": vision, "text": blocks, "heads": heads}


def step(config: Any) -> float:
    """Returns the model FLOPs of one train step of `data.batch_size` rows, all devices together.

    What trains counts three times its forward pass, a tower frozen whole once, a text tower that
    no loss reads not at all; nor is counted what is computed again to save memory.

    Args:
        config: whole configuration.
    """
    still, unread = frozen_towers(config), {"text"} if not reads_text(config) else set()
    rows = config.data.batch_size
    per_row = sum(flops * (1 if part in still else 3) for part, flops in forward(config).items()
                  if part not in unread)
    return rows * per_row + 3 * losses(config, rows)


def losses(config: Any, rows: int) -> float:
    """Returns the forward FLOPs of the objective on a global batch of `rows` pairs.

    The similarity of every pair of the batch is counted once, however it is computed; a term
    that has no formula here counts as nothing.
    """
    dim, bank = config.model.embed_dim, config.model.bank.rows
    tokens, words = _vision(config)[2][0], config.model.text.max_tokens - 1
    projections = 0
    if config.model.cross_attention_heads:
        # Query, key, value and output, words to patches and patches to words.
        projections = 8 * (tokens + words) * dim**2
    pairs = 2 * rows**2 * dim
    by_term = {
        "info_nce": pairs,
        "sigmoid": pairs,
        # Both modalities read the bank: logits and what is read.
        "knowledge_interaction": 2 * pairs + 2 * rows * 4 * bank * dim,
        # Attention and its contrast, each way.
        "token_alignment": rows * (8 * tokens * words * dim + 2 * (words**2 + tokens**2) * dim
                                   + projections),
        "prototype_alignment": 4 * rows * config.model.prototypes * dim,
        "local_alignment": 4 * rows**2 * tokens * words * dim,
    }
    return float(sum(by_term.get(name, 0) for name, term in config.losses.items() if term.weight))


def transformer(tokens: int, width: int, depth: int, mlp_width: int) -> float:
    """Returns the FLOPs of transformer blocks on one sequence.

    Per block: query, key, value and output 8·T·W², logits and mixing 4·T²·W, MLP 4·T·W·M.
    """
    return float(depth * (8 * tokens * width**2 + 4 * tokens**2 * width
                          + 4 * tokens * width * mlp_width))


def vit_blocks(tokens: int, width: int, depth: int, mlp_width: int, *, only_cls: bool) -> float:
    """Returns the FLOPs of a ViT's blocks; with `only_cls` the last works on one token alone.

    So it does on accelerators (`nn.blocks.Layers`). That block then costs 4·T·W² for keys and
    values, 4·W² + 4·T·W + 4·W·M for the token.
    """
    if not only_cls:
        return transformer(tokens, width, depth, mlp_width)
    last = 4 * tokens * width**2 + 4 * width**2 + 4 * tokens * width + 4 * width * mlp_width
    return transformer(tokens, width, depth - 1, mlp_width) + last


def _vision(config: Any) -> tuple[float, int, tuple[int, int]]:
    """FLOPs of the vision tower, width of its pooled vector, number and width of its tokens."""
    vision = config.model.vision
    shape = tuple(config.data.crop)
    channels = 3 if len(shape) == 2 else len(window_pairs(config.model.input.window))
    if vision.name in RESNETS:
        return _resnet(vision, shape, channels)
    if vision.name not in VITS:
        return math.nan, 0, (0, 0)
    left, cells, flops = tuple(vision.patch), shape, 0
    for size, features in vision.get("stem", ()):
        left = tuple(n // s for n, s in zip(left, size, strict=True))
        cells = tuple(n // s for n, s in zip(cells, size, strict=True))
        flops += 2 * math.prod(cells) * math.prod(size) * channels * features
        channels = features
    places = math.prod(n // p for n, p in zip(shape, vision.patch, strict=True))
    flops += 2 * places * math.prod(left) * channels * vision.width
    only_cls = vision.get("pool", "cls") == "cls" and not config.model.local_head.name
    flops += vit_blocks(places + 1, vision.width, vision.depth, vision.mlp_width,
                        only_cls=only_cls)
    return float(flops), vision.width, (places, vision.width)


class Convolution(NamedTuple):
    """One convolution: places it makes, its size along each axis, features in and out."""

    places: int
    size: int
    given: int
    made: int


def convolutions(vision: Any, shape: Sequence[int], channels: int) -> list[list[Convolution]]:
    """Returns the convolutions of a residual network, by stage, the stem first."""
    stages, expansion = RESNETS[vision.name]
    stages, width = vision.get("stages", stages), vision.get("width", RESNET_WIDTH)
    if vision.get("resize", 0):
        shape = (vision.resize,) * len(shape)

    def halve(shape: Sequence[int]) -> tuple[int, ...]:
        return tuple(-(-n // 2) for n in shape)

    shape = halve(shape)
    found = [[Convolution(math.prod(shape), 7, channels, width)]]
    shape, given = halve(shape), width
    for stage, blocks in enumerate(stages):
        features, layers = width * 2**stage, []
        made = features * expansion
        for block in range(blocks):
            old, shape = shape, halve(shape) if stage and not block else shape
            before, places = math.prod(old), math.prod(shape)
            if expansion > 1:
                layers += [Convolution(before, 1, given, features),
                           Convolution(places, 3, features, features),
                           Convolution(places, 1, features, made)]
            else:
                layers += [Convolution(places, 3, given, features),
                           Convolution(places, 3, features, made)]
            if given != made or shape != old:
                layers.append(Convolution(places, 1, given, made))
            given = made
        found.append(layers)
    return found


def _resnet(vision: Any, shape: Sequence[int],
            channels: int) -> tuple[float, int, tuple[int, int]]:
    """As `_vision`, of a residual network."""
    stages = convolutions(vision, shape, channels)
    flops = sum(2 * c.places * c.size**len(shape) * c.given * c.made
                for layers in stages for c in layers)
    # The expansion is a block's last convolution but for a shortcut, of equal size.
    last, before = stages[-1][-1], stages[-2][-1]
    return float(flops), last.made, (before.places, before.made)


def _head(section: Any, width: int, dim: int) -> int:
    """FLOPs of a projection head on one vector."""
    if section.name == "batchnorm":
        return 2 * (width * section.hidden + section.hidden * dim)
    return 2 * width * dim


def frozen_towers(config: Any) -> frozenset[str]:
    """Returns the towers all of whose parameters `optim.freeze` names."""
    if not config.optim.freeze:
        return frozenset()
    model = override(config, {"model.text.vocab": config.model.text.vocab or 1}).model
    return _frozen_towers(json.dumps(model.to_dict(), sort_keys=True), tuple(config.optim.freeze))


@functools.lru_cache(maxsize=4)
def _frozen_towers(model: str, freeze: tuple[str, ...]) -> frozenset[str]:
    shapes = jax.eval_shape(build(from_tree(json.loads(model))).init, jax.random.key(0))
    return frozenset(part for part in ("vision", "text") if all(
        any(re.fullmatch(pattern, f"params/{part}/{path}") for pattern in freeze)
        for path in paths.flat(shapes[part])))
