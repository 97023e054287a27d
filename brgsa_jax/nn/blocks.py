"""What the towers share: attention, MLP, pre-norm and post-norm blocks, output of vision."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

ATTENTION = ("auto", "xla", "heads", "cudnn")
REMAT = ("none", "dots", "full")


class VisionTower(NamedTuple):
    """Output of a vision encoder.

    Attributes:
        pooled: [B, W].
        tokens: [B, N, W'], places with the first axis slowest.
        attention: [B, N] the last layer's CLS row averaged over heads, or None.
    """

    pooled: jax.Array
    tokens: jax.Array
    attention: jax.Array | None


def attention(query: jax.Array, key: jax.Array, value: jax.Array,
              key_mask: jax.Array | None = None, implementation: str = "auto") -> jax.Array:
    """Scaled dot-product attention, softmax in float32.

    Args:
        query: [B, N, H, C]; key and value: [B, M, H, C].
        key_mask: [B, M] bool, True where a key may be attended.
        implementation: "xla"; "heads" runs one head after another, which keeps the logits in the
            cache of a CPU; "cudnn"; "auto" takes cudnn for 16-bit unmasked input on a GPU,
            "heads" on a CPU for long sequences, else xla.

    Returns:
        [B, N, H, C] of the query's type.
    """
    if implementation == "auto":
        backend = jax.default_backend()
        if backend == "gpu" and query.dtype != jnp.float32 and key_mask is None:
            implementation = "cudnn"
        else:
            implementation = "heads" if backend == "cpu" and key.shape[1] >= 96 else "xla"
    if implementation == "heads":
        return _attention_by_head(query, key, value, key_mask)
    mask = None if key_mask is None else key_mask[:, None, None, :]
    return jax.nn.dot_product_attention(query, key, value, mask=mask, implementation=implementation)


def _attention_by_head(query, key, value, key_mask):
    scale = query.shape[-1] ** -0.5

    @jax.checkpoint
    def head(qkv):
        q, k, v = qkv
        logits = jnp.einsum("bnc,bmc->bnm", q * scale, k, preferred_element_type=jnp.float32)
        if key_mask is not None:
            logits = jnp.where(key_mask[:, None, :], logits, jnp.finfo(jnp.float32).min)
        weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
        return jnp.einsum("bnm,bmc->bnc", weights, v)

    heads_first = [jnp.moveaxis(x, 2, 0) for x in (query, key, value)]
    return jnp.moveaxis(jax.lax.map(head, tuple(heads_first)), 0, 2)


def cls_row(query: jax.Array, key: jax.Array, key_mask: jax.Array | None = None) -> jax.Array:
    """Attention of the first token over all keys, averaged over heads, as float32 [B, M].

    Fused kernels return no weights; one query row costs O(M·H·C).
    """
    logits = jnp.einsum("bhc,bmhc->bhm", query[:, 0] * query.shape[-1] ** -0.5, key,
                        preferred_element_type=jnp.float32)
    if key_mask is not None:
        logits = jnp.where(key_mask[:, None, :], logits, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(logits, axis=-1)
    if key_mask is not None:
        weights = jnp.where(key_mask[:, None, :], weights, 0.0)
    return weights.mean(axis=1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def wide_dot(x: jax.Array, kernel: jax.Array, dimensions: Any, precision: Any = None) -> jax.Array:
    """`lax.dot_general` whose result keeps the float32 that 16-bit products are summed up in.

    Its gradient is that of the plain product: in float32 it would be several times slower.
    """
    wide = jnp.promote_types(x.dtype, jnp.float32)
    return jax.lax.dot_general(x, kernel, dimensions, precision, preferred_element_type=wide)


def _wide_forward(x, kernel, dimensions, precision):
    return wide_dot(x, kernel, dimensions, precision), (x, kernel)


def _wide_backward(dimensions, precision, saved, gradient):
    _, pull = jax.vjp(lambda x, k: jax.lax.dot_general(x, k, dimensions, precision), *saved)
    return pull(gradient.astype(saved[0].dtype))


wide_dot.defvjp(_wide_forward, _wide_backward)


class Block(nn.Module):
    """One transformer block; x + f(norm(x)) when `pre_norm`, else norm(x + f(x)).

    Attributes:
        heads: attention heads; must divide the width.
        mlp_width: width of the hidden layer, exact GELU.
        pre_norm: ViT is pre-norm, BERT post-norm.
        epsilon: LayerNorm epsilon.
        dtype: type of the matrix products; norms, softmax and what is added up from block to
            block stay in float32, as under PyTorch's autocast.
        implementation: see `attention`.
        need_cls_attention: also return the attention row of the first token.
        keep_hidden: also return the output a second time, for `nn.scan` to stack.
    """

    heads: int
    mlp_width: int
    pre_norm: bool = True
    epsilon: float = 1e-6
    dtype: Any = jnp.float32
    implementation: str = "auto"
    need_cls_attention: bool = False
    keep_hidden: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, key_mask: jax.Array | None = None):
        """Maps [B, N, W] to ([B, N, W], (the same or None, CLS attention [B, N] or None))."""
        width = x.shape[-1]
        norm = lambda name: nn.LayerNorm(epsilon=self.epsilon, dtype=jnp.float32, name=name)  # noqa: E731

        def dense(features: int, name: str, **options: Any) -> nn.Module:
            return nn.Dense(features, dtype=self.dtype, name=name,
                            kernel_init=nn.initializers.xavier_uniform(), **options)

        # What is added to float32 need not be rounded first.
        wide = {} if self.dtype == jnp.float32 else {"dot_general": wide_dot}

        def attend(y):
            y = y.astype(self.dtype)
            split = (*y.shape[:-1], self.heads, width // self.heads)
            q, k, v = (dense(width, name)(y).reshape(split) for name in ("query", "key", "value"))
            row = cls_row(q, k, key_mask) if self.need_cls_attention else None
            mixed = attention(q, k, v, key_mask, self.implementation)
            return dense(width, "out", **wide)(mixed.reshape(y.shape)), row

        def mlp(y):
            hidden = nn.gelu(dense(self.mlp_width, "up")(y.astype(self.dtype)), approximate=False)
            return dense(width, "down", **wide)(hidden)

        attention_norm, mlp_norm = norm("attention_norm"), norm("mlp_norm")
        if self.pre_norm:
            update, row = attend(attention_norm(x))
            x = x + update
            x = x + mlp(mlp_norm(x))
        else:
            update, row = attend(x)
            x = attention_norm(x + update)
            x = mlp_norm(x + mlp(x))
        return x, (x if self.keep_hidden else None, row)


class Layers(nn.Module):
    """`depth` equal blocks under `nn.scan`; parameters are stacked on axis 0 below "blocks".

    Attributes:
        depth: number of blocks.
        remat: "none", "dots" (matrix products are kept) or "full" (only block inputs are kept).
        block: keyword arguments of `Block`.
    """

    depth: int
    remat: str
    block: dict[str, Any]

    @nn.compact
    def __call__(self, x: jax.Array, key_mask: jax.Array | None = None):
        """Maps [B, N, W] to ([B, N, W], hidden [depth, B, N, W] or None, last CLS row or None)."""
        step = Block
        if self.remat != "none":
            policy = (jax.checkpoint_policies.checkpoint_dots_with_no_batch_dims
                      if self.remat == "dots" else None)
            step = nn.remat(step, prevent_cse=False, policy=policy)
        scan = nn.scan(step, variable_axes={"params": 0}, split_rngs={"params": True},
                       length=self.depth, in_axes=nn.broadcast)
        x, (hidden, rows) = scan(**self.block, name="blocks")(x, key_mask)
        return x, hidden, None if rows is None else rows[-1]


def grid_of(shape: Sequence[int], patch: Sequence[int]) -> tuple[int, ...]:
    """Returns the number of patches along each axis.

    Raises:
        ValueError: an axis is not a multiple of the patch.
    """
    if len(shape) != len(patch) or any(s % p for s, p in zip(shape, patch, strict=False)):
        raise ValueError(f"image shape {tuple(shape)} is not a multiple of the patch "
                         f"{tuple(patch)}; crop or pad it")
    return tuple(s // p for s, p in zip(shape, patch, strict=True))
