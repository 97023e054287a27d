"""Word vectors and word attention from those of word pieces (MGCA, word-piece aggregation)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from brgsa_jax.registry import miss

ATTENTION_OF = ("own", "next")
TRUNCATED = ("keep", "drop")


class Words(NamedTuple):
    """Words of a batch of captions, [CLS] left out.

    Attributes:
        embeddings: [B, T - 1, W], zero where there is no word.
        attention: [B, T - 1], exactly zero where there is no word.
        pad_mask: [B, T - 1] bool, True where there is no word.
    """

    embeddings: jax.Array
    attention: jax.Array
    pad_mask: jax.Array


def gather_words(tokens: jax.Array, attention: jax.Array, words: jax.Array, *,
                 attention_of: str = "own", separator: bool = False,
                 truncated: str = "keep") -> Words:
    """Sums the pieces of every word.

    The reference has attention_of="next", separator=True, truncated="drop": there token i gets
    the attention of token i + 1, and a caption that fills all T slots loses its last word and
    its [SEP].

    Args:
        tokens: vectors of word pieces, [B, T, W].
        attention: weights of the pieces, [B, T].
        words: word slot of every token, [B, T] int: 0 for [CLS], the same number for the pieces
            of one word, the highest one of a row for [SEP], -1 for padding.
        attention_of: "own", or "next": pieces carry their right neighbour's weight.
        separator: keep [SEP] as a word of its own; otherwise it is padding.
        truncated: "keep", or "drop" the last word and [SEP] of a row without padding.

    Returns:
        Words, in float32 (float64 for float64 input).

    Raises:
        KeyError: unknown `attention_of` or `truncated`.
    """
    if attention_of not in ATTENTION_OF:
        raise KeyError(miss("attention_of", attention_of, ATTENTION_OF))
    if truncated not in TRUNCATED:
        raise KeyError(miss("truncated", truncated, TRUNCATED))
    tokens, attention = (x.astype(jnp.promote_types(x.dtype, jnp.float32))
                         for x in (tokens, attention))
    slots = tokens.shape[1]
    if attention_of == "next":
        attention = jnp.pad(attention[:, 1:], ((0, 0), (0, 1)))
    last = words.max(axis=1, keepdims=True)
    absent = jnp.zeros_like(words, bool) if separator else words == last
    if truncated == "drop":
        full = words.min(axis=1, keepdims=True) >= 0
        absent |= full & (words >= last - 1)
    words = jnp.where(absent, -1, words)
    member = words[:, None, :] == jnp.arange(1, slots, dtype=words.dtype)[:, None]
    one_hot = member.astype(tokens.dtype)
    # A sum of pieces must not depend on how coarsely a device multiplies.
    embeddings = jnp.einsum("bgt,btw->bgw", one_hot, tokens, precision=lax.Precision.HIGHEST)
    weights = jnp.where(member, attention[:, None, :], 0.0).sum(axis=-1)
    return Words(embeddings, weights, ~member.any(axis=-1))
