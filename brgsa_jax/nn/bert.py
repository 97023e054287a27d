"""BERT text encoder with the closed-form pooling of BrgSA."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from brgsa_jax.nn.attention import ANYWHERE, ATTENTION, Placement
from brgsa_jax.nn.blocks import REMAT, Layers
from brgsa_jax.registry import miss, register

AGGREGATES = ("sum", "mean")
POOLS = ("mean", "cls")
POSITION_IDS = ("sequential", "zero")


class TextTower(NamedTuple):
    """Output of a text encoder.

    Attributes:
        pooled: [B, W].
        tokens: last hidden states [B, T, W].
        mask: [B, T] bool, True for real tokens.
        attention: [B, T] the last layer's CLS row averaged over heads.
        hidden: [layers + 1, B, T, W], embeddings first.
    """

    pooled: jax.Array
    tokens: jax.Array
    mask: jax.Array
    attention: jax.Array
    hidden: jax.Array


class Bert(nn.Module):
    """Post-norm BERT.

    Pooling "mean" is BrgSA's global text vector in closed form (word grouping cancels out):
    pooled = reduce over the last n layers of (1/divisor) Σ_i mask_i h_i. Pooling "cls" takes
    h_0 of [CLS] for that sum, as MGCA.

    Attributes:
        vocab: rows of the token table.
        width, depth, heads, mlp_width: of the transformer.
        positions: rows of the position table, the longest text.
        token_types: rows of the token-type table; 0 has none.
        last_n_layers: layers that enter the pooled vector.
        aggregate: "sum" or "mean" over those layers.
        divisor: constant the token sum is divided by (97 in the released models); 0 divides by
            the number of real tokens, so that short prompts and long captions agree in scale.
        pool: "mean" over the real tokens, or "cls", which knows no divisor.
        position_ids: "sequential", or "zero": every token takes row 0 of the position table, so
            that the tower has no word order, as MGCA's released one.
        norm_epsilon: of all LayerNorms.
        remat, unroll, dtype, implementation, placement: see `blocks`.
    """

    vocab: int
    width: int
    depth: int
    heads: int
    mlp_width: int
    positions: int = 512
    token_types: int = 2
    last_n_layers: int = 4
    aggregate: str = "sum"
    divisor: int = 97
    pool: str = "mean"
    position_ids: str = "sequential"
    norm_epsilon: float = 1e-12
    remat: str = "none"
    unroll: int = 1
    dtype: Any = jnp.float32
    implementation: str = "auto"
    placement: Placement = ANYWHERE

    @nn.compact
    def __call__(self, ids: jax.Array, mask: jax.Array,
                 types: jax.Array | None = None, train: bool = False) -> TextTower:
        """Encodes token ids [B, T] with attention mask [B, T]; training changes nothing.

        Raises:
            ValueError: `types` are given to a tower without a token-type table.
        """
        if types is not None and not self.token_types:
            raise ValueError("this BERT has no token-type table (token_types=0); leave types out")
        mask = mask.astype(bool)
        init = nn.initializers.normal(0.02)
        table = lambda rows, name: nn.Embed(rows, self.width, embedding_init=init, name=name)  # noqa: E731
        x = table(self.vocab, "word")(ids)
        places = jnp.arange(ids.shape[1])
        if self.position_ids == "zero":
            places = jnp.zeros_like(places)
        x = x + table(self.positions, "position")(places)[None]
        if self.token_types:
            types = jnp.zeros_like(ids) if types is None else types
            x = x + table(self.token_types, "token_type")(types)
        norm = nn.LayerNorm(epsilon=self.norm_epsilon, dtype=jnp.float32, name="norm")
        x = norm(x)
        block = dict(heads=self.heads, mlp_width=self.mlp_width, pre_norm=False,
                     epsilon=self.norm_epsilon, dtype=self.dtype,
                     implementation=self.implementation, placement=self.placement,
                     need_cls_attention=True,
                     keep_hidden=True)
        layers = Layers(self.depth, self.remat, block, unroll=self.unroll, name="layers")
        last, hidden, row = layers(x, mask)
        hidden = jnp.concatenate([x[None], hidden])
        chosen = hidden[-self.last_n_layers:]
        if self.pool == "cls":
            pooled = chosen[:, :, 0].sum(axis=0)
        else:
            pooled = jnp.einsum("lbtw,bt->bw", chosen, mask.astype(jnp.float32))
            pooled = pooled / (self.divisor or jnp.maximum(mask.sum(axis=1, keepdims=True), 1))
        if self.aggregate == "mean":
            pooled = pooled / self.last_n_layers
        return TextTower(pooled, last, mask, row, hidden)


@register("text", "bert")
def bert(**options: Any) -> nn.Module:
    """Makes a Bert from the keys of its configuration section.

    Raises:
        KeyError: unknown choice of aggregate, pool, position_ids, remat or attention.
    """
    for key, choices in (("aggregate", AGGREGATES), ("pool", POOLS),
                         ("position_ids", POSITION_IDS), ("remat", REMAT),
                         ("implementation", ATTENTION)):
        if options.get(key, choices[0]) not in choices:
            raise KeyError(miss(key, options[key], choices))
    return Bert(**options)
