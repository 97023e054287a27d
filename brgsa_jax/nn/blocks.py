"""What the towers share: attention, MLP, pre-norm and post-norm blocks, output of vision."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from brgsa_jax.nn.attention import ANYWHERE, Placement, attention, cls_row
from brgsa_jax.nn.dense import Dense

REMAT = ("none", "dots", "full")


class VisionTower(NamedTuple):
    """Output of a vision encoder.

    Attributes:
        pooled: [B, W].
        tokens: [B, N, W'], places with the first axis slowest; None where nobody needs them.
        attention: [B, N] the last layer's CLS row averaged over heads, or None.
    """

    pooled: jax.Array
    tokens: jax.Array | None
    attention: jax.Array | None


# erf(x)/x by a ratio of polynomials in x², fitted by linear programming to the least largest
# relative error on |x| <= 3.92, beyond which erf is 1 in float32.
ERF_ABOVE = (1.1283791065216064, 0.18552125990390778, 0.052112068980932236,
             0.0035596038214862347, 0.00028091674903407693, 2.0958718778274488e-06)
ERF_BELOW = (1.0, 0.49774739146232605, 0.11209875345230103, 0.014554908499121666,
             0.0011138955596834421, 3.8359743484761566e-05)
ERF_LAST = 3.92


def gelu(x: jax.Array) -> jax.Array:
    """Exact GELU, x Φ(x) (Hendrycks and Gimpel 2016).

    In float32 the error function is a ratio of polynomials, within 4e-7 of it: XLA's own takes
    three times as long on a CPU. Only the input is kept for the gradient.
    """
    return _gelu(x) if x.dtype == jnp.float32 else nn.gelu(x, approximate=False)


def _normal_cdf(x: jax.Array) -> jax.Array:
    """Φ(x) in float32."""
    x = jnp.clip(x * 0.5**0.5, -ERF_LAST, ERF_LAST)
    above, below = (functools.reduce(lambda sum, c: sum * x * x + c, coefficients[::-1])
                    for coefficients in (ERF_ABOVE, ERF_BELOW))
    return 0.5 + 0.5 * jnp.clip(x * above / below, -1.0, 1.0)


@jax.custom_vjp
def _gelu(x: jax.Array) -> jax.Array:
    return x * _normal_cdf(x)


def _gelu_backward(x, gradient):
    density = jnp.exp(-0.5 * x * x) * (2.0 * jnp.pi) ** -0.5
    return (gradient * (_normal_cdf(x) + x * density),)


_gelu.defvjp(lambda x: (_gelu(x), x), _gelu_backward)


class Block(nn.Module):
    """One transformer block; x + f(norm(x)) when `pre_norm`, else norm(x + f(x)).

    Attributes:
        heads: attention heads; must divide the width.
        mlp_width: width of the hidden layer, exact GELU.
        pre_norm: ViT is pre-norm, BERT post-norm.
        epsilon: LayerNorm epsilon.
        dtype: type of the matrix products; norms, softmax and what is added up from block to
            block stay in float32, as under PyTorch's autocast.
        implementation, placement: see `attention`.
        need_cls_attention: also return the attention row of the first token.
        only_cls: return the first token alone; the others serve as keys and values.
        keep_hidden: also return the output a second time, for `nn.scan` to stack.
    """

    heads: int
    mlp_width: int
    pre_norm: bool = True
    epsilon: float = 1e-6
    dtype: Any = jnp.float32
    implementation: str = "auto"
    placement: Placement = ANYWHERE
    need_cls_attention: bool = False
    only_cls: bool = False
    keep_hidden: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, key_mask: jax.Array | None = None):
        """Maps [B, N, W] to ([B, N, W], (the same or None, CLS attention [B, N] or None)).

        With `only_cls` the results are [B, 1, W].
        """
        width = x.shape[-1]
        norm = lambda name: nn.LayerNorm(epsilon=self.epsilon, dtype=jnp.float32, name=name)  # noqa: E731

        dense = functools.partial(Dense, dtype=self.dtype, flat=self.placement.backend != "tpu",
                                  kernel_init=nn.initializers.xavier_uniform())
        # Parameters are initialised by one example row, which no devices can share.
        placement = ANYWHERE if self.is_initializing() else self.placement
        kept = slice(0, 1 if self.only_cls else None)

        def attend(y):
            y = y.astype(self.dtype)
            q, k, v = (dense(width, name=name)(z).reshape(*z.shape[:-1], self.heads, -1)
                       for name, z in (("query", y[:, kept]), ("key", y), ("value", y)))
            row = cls_row(q, k, key_mask) if self.need_cls_attention else None
            # One query needs no memory that a fused kernel would save.
            form = "xla" if self.only_cls else self.implementation
            mixed = attention(q, k, v, key_mask, form, placement)
            # What is added to float32 need not be rounded first.
            return dense(width, wide=True, name="out")(mixed.reshape(*mixed.shape[:2], width)), row

        def mlp(y):
            hidden = gelu(dense(self.mlp_width, name="up")(y))
            return dense(width, wide=True, name="down")(hidden)

        attention_norm, mlp_norm = norm("attention_norm"), norm("mlp_norm")
        if self.pre_norm:
            update, row = attend(attention_norm(x))
            x = x[:, kept] + update
            x = x + mlp(mlp_norm(x))
        else:
            update, row = attend(x)
            x = attention_norm(x[:, kept] + update)
            x = mlp_norm(x + mlp(x))
        return x, (x if self.keep_hidden else None, row)


class Layers(nn.Module):
    """`depth` equal blocks, scanned over; parameters are stacked on axis 0 below "blocks".

    Attributes:
        depth: number of blocks.
        remat: "none", "dots" (matrix products are kept) or "full" (only block inputs are kept).
        block: keyword arguments of `Block`.
        only_cls: return the first token alone. The last block then leaves out the others, except
            on a CPU: five sixths of its products are saved.
        unroll: blocks a turn of the loop. With more, programs are larger and take longer to
            compile, but copy fewer weights and less of what the backward pass needs.
    """

    depth: int
    remat: str
    block: dict[str, Any]
    only_cls: bool = False
    unroll: int = 1

    @nn.compact
    def __call__(self, x: jax.Array, key_mask: jax.Array | None = None):
        """Maps [B, N, W] to ([B, N, W], hidden [depth, B, N, W] or None, last CLS row or None).

        With `only_cls` the first result is [B, 1, W], and there is no hidden.
        """
        # Taking the other blocks' weights apart costs a CPU what the last block would save.
        backend = self.block.get("placement", ANYWHERE).backend
        if self.only_cls and backend != "cpu" and not self.is_initializing():
            return self._last_alone(x, key_mask)
        step = Block
        if self.remat != "none":
            step = nn.remat(step, prevent_cse=False, policy=self._policy())
        scan = nn.scan(step, variable_axes={"params": 0}, split_rngs={"params": True},
                       length=self.depth, in_axes=nn.broadcast,
                       unroll=min(self.unroll, self.depth))
        x, (hidden, rows) = scan(**self.block, name="blocks")(x, key_mask)
        row = None if rows is None else rows[-1]
        return (x[:, :1], None, row) if self.only_cls else (x, hidden, row)

    def _last_alone(self, x: jax.Array, key_mask: jax.Array | None) -> Any:
        """The same with parameters as arrays, of which the last block's are taken apart."""
        params = self.variables["params"]["blocks"]

        def run(x: jax.Array, layer: Any, **options: Any) -> Any:
            def apply(x: jax.Array, layer: Any) -> Any:
                block = Block(**self.block, **options, parent=None)
                return block.apply({"params": layer}, x, key_mask)

            if self.remat != "none":
                apply = jax.checkpoint(apply, prevent_cse=False, policy=self._policy())
            return apply(x, layer)

        if self.depth > 1:
            x, _ = lax.scan(run, x, jax.tree.map(lambda p: p[:-1], params),
                            unroll=min(self.unroll, self.depth - 1))
        x, (_, row) = run(x, jax.tree.map(lambda p: p[-1], params), only_cls=True)
        return x, None, row

    def _policy(self) -> Any:
        return (jax.checkpoint_policies.checkpoint_dots_with_no_batch_dims
                if self.remat == "dots" else None)


def grid_of(shape: Sequence[int], patch: Sequence[int]) -> tuple[int, ...]:
    """Returns the number of patches along each axis.

    Raises:
        ValueError: an axis is not a multiple of the patch.
    """
    if len(shape) != len(patch) or any(s % p for s, p in zip(shape, patch, strict=False)):
        raise ValueError(f"image shape {tuple(shape)} is not a multiple of the patch "
                         f"{tuple(patch)}; crop or pad it")
    return tuple(s // p for s, p in zip(shape, patch, strict=True))
