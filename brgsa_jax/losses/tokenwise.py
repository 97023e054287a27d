"""Token-level alignment: MGCA's CTA inside each sample, GLoRIA's local loss across samples."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from brgsa_jax.losses import common
from brgsa_jax.losses.common import MASKED, AxisName, dot
from brgsa_jax.registry import register

AGGREGATES = ("sum", "mean")

# Similarity elements one chunk of samples may hold; above it chunks run one after another,
# rematerialised. 2 744 x 2 744 patch pairs are 30 MB a copy, and several copies live at once.
CHUNK_ELEMENTS = 1 << 24


class TokenAlignment(NamedTuple):
    """Word-anchored and patch-anchored losses, each a mean over the batch."""

    word: Array
    patch: Array


class LocalAlignment(NamedTuple):
    """The two directions of GLoRIA's local loss, each a mean over the batch."""

    image_to_text: Array
    text_to_image: Array


def attention_weights(attention: Array, *, low: float = 0.1, high: float = 0.9) -> Array:
    """Turns attention into token weights, robust to outliers (MGCA §3.3, its code).

    The non-zero entries of a sample are clipped to their own ``low`` and ``high`` quantiles
    (linear interpolation) and divided by their sum. Zeros mark what is no token and stay zero.

    Args:
        attention: ``[B, N]``, non-negative, exactly zero where there is no token.
        low: lower quantile in [0, 1].
        high: upper quantile in [0, 1].

    Returns:
        ``[B, N]``; rows sum to 1, or to 0 where a row has no non-zero entry. No gradient.

    Raises:
        ValueError: not ``[B, N]``, or not ``0 <= low <= high <= 1``.
    """
    common.check_shapes("attention_weights", attention=(attention, "BN"))
    if not 0 <= low <= high <= 1:
        raise ValueError(
            f"attention_weights: low={low} and high={high} must satisfy 0 <= low <= high <= 1."
        )
    (attention,) = common.promote(lax.stop_gradient(attention))
    present = attention != 0
    count = jnp.sum(present, axis=1, keepdims=True)
    ordered = jnp.sort(jnp.where(present, attention, jnp.inf), axis=1)

    def quantile(q: float) -> Array:
        position = q * jnp.maximum(count - 1, 0).astype(attention.dtype)
        below = jnp.floor(position)
        first = jnp.take_along_axis(ordered, below.astype(jnp.int32), axis=1)
        second = jnp.take_along_axis(ordered, jnp.ceil(position).astype(jnp.int32), axis=1)
        # A weighted sum, not first + w * (second - first): both are infinite in an empty row.
        weight = position - below
        return jnp.where(weight > 0, (1 - weight) * first + weight * second, first)

    clipped = jnp.clip(attention, quantile(low), quantile(high))
    clipped = jnp.where(present, clipped, 0.0)
    total = jnp.sum(clipped, axis=1, keepdims=True)
    return jnp.where(present, clipped / jnp.where(total == 0, 1.0, total), 0.0)


@register("loss", "token_alignment")
def token_alignment(
    patches: Array,
    words: Array,
    *,
    word_weights: Array,
    patch_weights: Array | None = None,
    pad_mask: Array,
    temperature: float | Array = 0.1,
    mask_padding: bool = True,
    normalize_patch_context: bool = True,
    bidirectional: bool = True,
    cross_attention: Mapping[str, Any] | None = None,
    axis_name: AxisName = None,
    valid: Array | None = None,
) -> TokenAlignment:
    """Cross-attention token alignment (MGCA, arXiv 2210.06044, §3.3), inside each sample.

    With unit words ``w`` and patches ``p``, a word attends to the patches,
    ``o_j = n(sum_i softmax_i(w_j p_i / tau) p_i)``, and must pick its own context among those of
    the other words: ``M = w o^T / tau``, ``word = mean_B sum_j omega_j [CE(M_j., j) +
    CE(M_.j, j)] / 2``. The patch term swaps the roles; padding words are never attended to.

    Args:
        patches: ``[B, N, D]`` un-normalised, this device's share under ``axis_name``.
        words: ``[B, T, D]`` un-normalised.
        word_weights: ``[B, T]``, see ``attention_weights``; no gradient flows into weights.
        patch_weights: ``[B, N]``; None is uniform ``1 / N``.
        pad_mask: ``[B, T]`` bool, True = padding.
        temperature: of the attention and of the contrast.
        mask_padding: True keeps padding words out of the denominators and gives them no weight;
            False is the reference's behaviour, padding columns compete in every softmax.
        normalize_patch_context: False leaves the patch's context un-normalised, as the
            reference's ViT branch does.
        bidirectional: False leaves the patch term out (0).
        cross_attention: None is the parameter-free attention above. ``{"word": p, "patch": p,
            "heads": h}`` with ``p = {in_w [3D, D], in_b [3D], out_w [D, D], out_b [D]}``
            replaces it by multi-head attention (query, key, value rows in that order, scale
            ``1 / sqrt(D / h)``); ``"word"`` words query patches, ``"patch"`` the reverse.
        axis_name: axes over which the batch is sharded, or None.
        valid: ``[B]`` bool; False samples are in no mean.

    Returns:
        TokenAlignment of two scalars.

    Raises:
        ValueError: shapes differ, or the head count does not divide the width.
    """
    shapes = {
        "patches": (patches, "BND"),
        "words": (words, "BTD"),
        "word_weights": (word_weights, "BT"),
        "pad_mask": (pad_mask, "BT"),
    }
    if patch_weights is not None:
        shapes["patch_weights"] = (patch_weights, "BN")
    if valid is not None:
        shapes["valid"] = (valid, "B")
    common.check_shapes("token_alignment", **shapes)
    samples, n, width = patches.shape
    patches, words = common.promote(patches, words)
    dtype = patches.dtype
    if patch_weights is None:
        patch_weights = jnp.full((samples, n), 1.0 / n, dtype)
    word_weights, patch_weights = (
        common.zero_invalid(lax.stop_gradient(w).astype(dtype), valid)
        for w in (word_weights, patch_weights)
    )
    patches = common.l2_normalize(common.zero_invalid(patches, valid))
    words = common.l2_normalize(common.zero_invalid(words, valid))
    pad_mask = jnp.asarray(pad_mask, bool)
    if mask_padding:
        word_weights = jnp.where(pad_mask, 0.0, word_weights)
    temperature = jnp.asarray(temperature, dtype)
    projections = _cross_attention_arrays(cross_attention, width, dtype)

    def sample(batch) -> tuple[Array, Array]:
        p, w, omega_w, omega_p, pad = batch
        if projections is None:
            context = _softmax_read(w, p, None, temperature)
        else:
            context = _multi_head(projections, "word", w, p, None)
        word = _token_contrast(
            w, common.l2_normalize(context), omega_w, ~pad if mask_padding else None, temperature
        )
        if not bidirectional:
            return word, jnp.zeros_like(word)
        if projections is None:
            context = _softmax_read(p, w, ~pad, temperature)
        else:
            context = _multi_head(projections, "patch", p, w, ~pad)
        if normalize_patch_context:
            context = common.l2_normalize(context)
        return word, _token_contrast(p, context, omega_p, None, temperature)

    batch = (patches, words, word_weights, patch_weights, pad_mask)
    larger = max(n, words.shape[1])
    chunk = max(1, CHUNK_ELEMENTS // (larger * larger))
    if chunk >= samples:
        word, patch = jax.vmap(sample)(batch)
    else:
        word, patch = lax.map(jax.checkpoint(sample), batch, batch_size=chunk)
    return TokenAlignment(
        common.global_mean(word, valid, axis_name), common.global_mean(patch, valid, axis_name)
    )


def _masked_softmax(logits: Array, keep: Array | None) -> Array:
    """Softmax over the last axis among the kept entries; all zero where none is kept."""
    if keep is None:
        return jax.nn.softmax(logits, axis=-1)
    return jnp.where(keep, jax.nn.softmax(jnp.where(keep, logits, MASKED), axis=-1), 0.0)


def _softmax_read(queries: Array, keys: Array, keep: Array | None, temperature: Array) -> Array:
    """``softmax(queries keys^T / temperature) keys`` over the kept keys: ``[Q, D]``."""
    attention = _masked_softmax(dot("qd,kd->qk", queries, keys) / temperature, keep)
    return dot("qk,kd->qd", attention, keys)


def _token_contrast(
    tokens: Array, contexts: Array, weights: Array, keep: Array | None, temperature: Array
) -> Array:
    """Weighted symmetric cross-entropy of tokens against their own contexts, one sample."""
    similarity = dot("qd,kd->qk", tokens, contexts)
    target = jnp.sum(tokens * contexts, axis=-1)

    def direction(similarity: Array) -> Array:
        # Relative to the target before scaling: see contrastive, same reason.
        scores = (similarity - target[:, None]) / temperature
        scores = scores if keep is None else jnp.where(keep[None, :], scores, MASKED)
        # Tokens of zero weight may have no finite loss: masked before the product, not by it.
        return jnp.sum(weights * jnp.where(weights != 0, jax.nn.logsumexp(scores, axis=1), 0.0))

    return 0.5 * (direction(similarity) + direction(similarity.T))


def _cross_attention_arrays(
    cross_attention: Mapping[str, Any] | None, width: int, dtype: Any
) -> dict[str, Any] | None:
    """Checked and promoted copy of the ``cross_attention`` argument."""
    if cross_attention is None:
        return None
    heads = int(cross_attention["heads"])
    if heads < 1 or width % heads:
        raise ValueError(
            f"token_alignment: cross_attention heads={heads} does not divide the width {width}."
        )
    arrays: dict[str, Any] = {"heads": heads}
    for side in ("word", "patch"):
        p = cross_attention[side]
        common.check_shapes(
            f"token_alignment cross_attention[{side!r}]",
            in_w=(p["in_w"], (3 * width, width)),
            in_b=(p["in_b"], (3 * width,)),
            out_w=(p["out_w"], (width, width)),
            out_b=(p["out_b"], (width,)),
        )
        arrays[side] = {k: jnp.asarray(p[k], dtype) for k in ("in_w", "in_b", "out_w", "out_b")}
    return arrays


def _multi_head(
    projections: dict[str, Any], side: str, queries: Array, keys: Array, keep: Array | None
) -> Array:
    """Multi-head attention of one sample with biased input and output projections: ``[Q, D]``."""
    p, heads = projections[side], projections["heads"]
    width = queries.shape[-1]

    def project(x: Array, part: int) -> Array:
        rows = slice(part * width, (part + 1) * width)
        y = dot("nd,ed->ne", x, p["in_w"][rows]) + p["in_b"][rows]
        return y.reshape(x.shape[0], heads, width // heads)

    q, k, v = project(queries, 0), project(keys, 1), project(keys, 2)
    logits = dot("qhe,khe->hqk", q, k) / math.sqrt(width // heads)
    context = dot("hqk,khe->qhe", _masked_softmax(logits, keep), v)
    return dot("nd,ed->ne", context.reshape(queries.shape), p["out_w"]) + p["out_b"]


@register("loss", "local_alignment")
def local_alignment(
    image: Array,
    words: Array,
    lengths: Array,
    *,
    temperatures: Sequence[float] = (4.0, 5.0, 10.0),
    aggregate: str = "sum",
    axis_name: AxisName = None,
    valid: Array | None = None,
) -> LocalAlignment:
    """GLoRIA's local loss (Huang et al., ICCV 2021, Eq. 4-8) on 3-D feature maps.

    For every pair of a volume and a caption: ``a = softmax_voxels(t1 softmax_words(v . w))``,
    a word's context is ``c_w = sum_v a_wv v``, the pair's score
    ``t3 log sum_w exp(t2 cos(w, c_w))``; cross-entropy over captions and over volumes.
    Devices exchange words and scores, never feature maps; one caption at a time is held.

    Args:
        image: ``[B, D, x, y, z]`` un-normalised features, this device's share.
        words: ``[B, D, T]`` un-normalised.
        lengths: ``[B]`` integers, the leading words in use. A caption of length 0 has no score:
            its row counts as not valid.
        temperatures: ``(t1, t2, t3)``, factors on the attention, the words and the scores.
        aggregate: ``"sum"`` or ``"mean"`` over the words inside the logarithm.
        axis_name: axes over which the batch is sharded, or None.
        valid: ``[B]`` bool; False rows are no anchor, no negative, and in no mean.

    Returns:
        LocalAlignment of two scalars.

    Raises:
        ValueError: shapes differ, three temperatures are not given, ``aggregate`` is unknown.
    """
    common.check_choice("local_alignment", "aggregate", aggregate, AGGREGATES)
    if len(temperatures) != 3:
        raise ValueError(f"local_alignment: temperatures={temperatures} must be three numbers.")
    shapes = {"image": (image, "BDxyz"), "words": (words, "BDT"), "lengths": (lengths, "B")}
    if valid is not None:
        shapes["valid"] = (valid, "B")
    common.check_shapes("local_alignment", **shapes)
    image, words = common.promote(image, words)
    valid = (lengths > 0) if valid is None else valid & (lengths > 0)
    image = common.zero_invalid(image.reshape(*image.shape[:2], -1), valid)
    words = common.zero_invalid(words, valid)
    sharpen_voxels, sharpen_words, sharpen_pairs = temperatures

    def scores_of_caption(caption: tuple[Array, Array]) -> Array:
        """Scores ``[b]`` of this device's volumes with one caption of the global batch."""
        word, length = caption
        used = jnp.arange(word.shape[1]) < length
        over_words = _masked_softmax(dot("bdv,dt->bvt", image, word), used)
        over_voxels = jax.nn.softmax(sharpen_voxels * over_words, axis=1)
        context = dot("bvt,bdv->btd", over_voxels, image)
        cosine = jnp.sum(
            common.l2_normalize(word.T)[None] * common.l2_normalize(context), axis=-1
        )
        score = jax.nn.logsumexp(jnp.where(used, sharpen_words * cosine, MASKED), axis=1)
        if aggregate == "mean":
            score = score - jnp.log(jnp.maximum(length, 1).astype(score.dtype))
        return sharpen_pairs * jnp.where(length > 0, score, 0.0)

    captions = (common.gather_rows(words, axis_name), common.gather_rows(lengths, axis_name))
    scores = lax.map(jax.checkpoint(scores_of_caption), captions).T
    columns = common.swap_rows_for_columns(scores, axis_name).T
    all_valid = common.gather_rows(valid, axis_name)
    start = common.axis_index(axis_name) * scores.shape[0]
    own = start + jnp.arange(scores.shape[0])

    def direction(logits: Array) -> Array:
        target = jnp.take_along_axis(logits, own[:, None], axis=1)[:, 0]
        lse = jax.nn.logsumexp(jnp.where(all_valid[None, :], logits, MASKED), axis=1)
        return common.global_mean(lse - target, valid, axis_name)

    return LocalAlignment(direction(scores), direction(columns))
