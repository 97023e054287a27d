"""What a vision tower looked at: gradient-weighted attention rollout, and what CAMs need.

The tower's own code runs. While it does, zeros are added to what its patches are embedded from, to
what its attention mixed and to the places it pools, so that one backward pass gives the slope of a
score by all of them, and queries, keys and values are kept. An attention map and its gradient are
then formed head by head and never stored for a whole tower: a ViT-B of 4097 tokens would need 10 GB
for each of the two.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from brgsa_jax.nn.attention import _dot
from brgsa_jax.nn.blocks import Block, Layers
from brgsa_jax.nn.dense import Dense
from brgsa_jax.nn.resnet import ResNet
from brgsa_jax.nn.vit import ViT


class Inside(NamedTuple):
    """What a vision tower computes on its way to the pooled vector.

    Attributes:
        places: what is pooled: [B, 1 + N, W] of a ViT, the class token first, after the last
            norm; [B, *grid, W] of a ResNet, its last stage.
        before: [B, *grid, W / 2] of a ResNet, its stage before the last; None for a ViT.
        cells: what a ViT's patch embedding starts from, [B, N, cells·C] with the first axis of a
            patch slowest: the last stage of its stem, or without a stem its own result [B, N, W];
            None for a ResNet.
        query, key, value: of every layer, [L, B, 1 + N, H·C]; None for a ResNet.
    """

    places: jax.Array
    before: jax.Array | None = None
    cells: jax.Array | None = None
    query: jax.Array | None = None
    key: jax.Array | None = None
    value: jax.Array | None = None


class Taps(NamedTuple):
    """What is added inside a tower; zeros, so that only gradients by them matter.

    Attributes:
        places, cells: added to those of `Inside`.
        mixed: [L, B, 1 + N, H·C], added to what attention mixed of the values; None for a ResNet.
    """

    places: jax.Array
    cells: jax.Array | None = None
    mixed: jax.Array | None = None


def look_inside(run: Callable[[], Any], taps: Taps | None = None) -> tuple[Any, Inside]:
    """Runs a vision tower and keeps what `rollout` needs.

    Args:
        run: applies a `ViT` or a `ResNet` as at inference.
        taps: added on the way; None adds nothing.

    Returns:
        What `run` returns, and the inside.

    Raises:
        ValueError: `run` applies neither.
    """
    found: dict[str, Any] = {}

    def watch(call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        module, method = context.module, context.method_name
        if isinstance(module, Layers) and method == "__call__":
            x, found["layers"] = _run_layers(module, args[0], taps and taps.mixed)
            return x, None, None
        if isinstance(module, ViT) and method == "_pool":
            args = (keep("places", args[0]), *args[1:])
        embeds = isinstance(module.parent, ViT) and module.name == "patch_embed"
        if embeds and module.parent.stem:
            args = (keep("cells", args[0]),)
        result = call(*args, **kwargs)
        if embeds and not module.parent.stem:
            return keep("cells", result)
        if isinstance(module.parent, ResNet) and method == "__call__":
            before, last = _last_blocks(module.parent)
            if module.name == before:
                found["before"] = result
            elif module.name == last:
                return keep("places", result)
        return result

    def keep(name: str, x: jax.Array) -> jax.Array:
        tap = getattr(taps, name, None)
        found[name] = x if tap is None else x + tap.astype(x.dtype)
        return found[name]

    with nn.intercept_methods(watch):
        result = run()
    if "places" not in found:
        raise ValueError("the tower is neither a ViT nor a ResNet, of which alone maps are made")
    return result, Inside(found["places"], found.get("before"), found.get("cells"),
                          *found.get("layers", ()))


def _last_blocks(tower: ResNet) -> tuple[str, str]:
    """Names of the last blocks of the last two stages."""
    return tuple(f"stage{stage}_block{tower.stages[stage - 1] - 1}"
                 for stage in (len(tower.stages) - 1, len(tower.stages)))


def _run_layers(layers: Layers, x: jax.Array,
                taps: jax.Array | None) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """Runs [B, N, W] through the blocks; returns queries, keys and values [L, B, N, W] too."""
    def step(x: jax.Array, inputs: Any) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        params, tap = inputs
        kept: dict[str, jax.Array] = {}

        def watch(call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
            name = context.module.name
            if not isinstance(context.module, Dense) or context.method_name != "__call__":
                return call(*args, **kwargs)
            if name == "out" and tap is not None:
                args = (args[0] + tap.astype(args[0].dtype),)
            result = call(*args, **kwargs)
            if name in ("query", "key", "value"):
                kept[name] = result
            return result

        with nn.intercept_methods(watch):
            x, _ = Block(**layers.block, parent=None).apply({"params": params}, x)
        return x, (kept["query"], kept["key"], kept["value"])

    # Kept for the backward pass are the blocks' inputs alone.
    return lax.scan(jax.checkpoint(step, prevent_cse=False), x,
                    (layers.variables["params"]["blocks"], taps))


def rollout(row: jax.Array, inside: Inside, slopes: jax.Array, heads: int) -> jax.Array:
    """Carries relevance from the last layer's places back to the image's patches.

    r ← r + r E_h[(∇A ∘ A)⁺] from the last layer to the first, A the attention of head h and ∇A
    the gradient of the score by it: equations 5 and 6 of Chefer, Gur and Wolf 2021 ("Generic
    attention-model explainability"), of which only the wanted row is formed. It is the attention
    rollout of Abnar and Zuidema 2020 with gradients in place of equal heads.

    Args:
        row: relevance [1 + N] of the pooled places, ≥ 0, as of one image; sums to 1.
        inside: of one image, B = 1.
        slopes: [L, 1, 1 + N, H·C], gradient of the score by `Taps.mixed`.
        heads: H.

    Returns:
        Relevance [1 + N] of the tokens that enter the first layer, ≥ 0.
    """
    def by_head(x: jax.Array) -> jax.Array:
        return x.reshape(x.shape[0], heads, -1).swapaxes(0, 1).astype(jnp.float32)

    def layer(row: jax.Array, inputs: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        def head(x: tuple[jax.Array, ...]) -> jax.Array:
            query, key, value, slope = x
            weights = jax.nn.softmax(_dot(query * query.shape[-1] ** -0.5, key.T), axis=-1)
            return row @ jnp.maximum(weights * _dot(slope, value.T), 0.0)

        flows = lax.map(head, tuple(by_head(x[0]) for x in inputs))
        return row + flows.mean(axis=0), None

    return lax.scan(layer, row, (inside.query, inside.key, inside.value, slopes),
                    reverse=True)[0]
