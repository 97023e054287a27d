"""BrgSA's cross-modal knowledge interaction: both modalities read one learned bank."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from brgsa_jax.losses import common
from brgsa_jax.losses.common import AxisName, dot
from brgsa_jax.losses.contrastive import InfoNCE, info_nce
from brgsa_jax.registry import register


class BankRead(NamedTuple):
    """What this device's samples read from the bank."""

    reconstruction: Array
    codes: Array


class Reconstruction(NamedTuple):
    """Mean squared error per modality."""

    mse_image: Array
    mse_text: Array


class KnowledgeInteraction(NamedTuple):
    """The three terms of BrgSA's objective, un-weighted."""

    contrast: InfoNCE
    contrast_reconstructed: InfoNCE
    reconstruction: Reconstruction


# Published banks have 2 048 rows of 768, 6 MiB.
LARGEST_GATHERED = 64 * 2**20


def read_bank(
    x: Array, bank: Array, *, scale: float | Array = 1.0, rows_axis: AxisName = None
) -> BankRead:
    """Reads a bank of knowledge vectors by softmax attention over its rows.

    ``codes = softmax(scale * x bank^T)``, ``reconstruction = codes bank`` (BrgSA, arXiv
    2501.03565, CMKI; no normalisation of either side). With ``rows_axis`` a bank of up to
    ``LARGEST_GATHERED`` bytes is gathered for the read, so that its memory does not grow with
    the devices; a larger one stays where it is: the samples of all devices visit every shard,
    the softmax is taken over all shards, and each device gets its own samples back.

    Args:
        x: ``[B, D]`` un-normalised embeddings, this device's share.
        bank: ``[K, D]``; with ``rows_axis`` this device's rows, in mesh order.
        scale: factor on the logits; the paper's is 1.
        rows_axis: the batch axis, or tuple of batch axes, over which the rows are sharded.

    Returns:
        BankRead(reconstruction ``[b, D]``, codes ``[b, K]``, all K rows of this device's samples).

    Raises:
        ValueError: widths differ.
    """
    common.check_shapes("read_bank", x=(x, "BD"), bank=(bank, "KD"))
    x, bank = common.promote(x, bank)
    if rows_axis is not None and lax.axis_size(rows_axis) * bank.nbytes <= LARGEST_GATHERED:
        bank, rows_axis = common.gather_rows(bank, rows_axis), None
    queries = common.gather_rows(x, rows_axis)
    logits = jnp.asarray(scale, x.dtype) * dot("bd,kd->bk", queries, bank)
    peak = lax.stop_gradient(jnp.max(logits, axis=1, keepdims=True))
    if rows_axis is not None:
        peak = lax.pmax(peak, common.axis_tuple(rows_axis))
    weights = jnp.exp(logits - peak)
    total = jnp.sum(weights, axis=1, keepdims=True)
    if rows_axis is not None:
        total = lax.psum(total, common.axis_tuple(rows_axis))
    codes = weights / total
    reconstruction = dot("bk,kd->bd", codes, bank)
    if rows_axis is not None:
        reconstruction = lax.psum_scatter(
            reconstruction, common.axis_tuple(rows_axis), scatter_dimension=0, tiled=True
        )
    return BankRead(reconstruction, common.swap_columns_for_rows(codes, rows_axis))


@register("loss", "knowledge_interaction")
def knowledge_interaction(
    image: Array,
    text: Array,
    bank: Array,
    *,
    temperature: float | Array = 0.1,
    scale: float | Array = 1.0,
    negatives: str = "global",
    positives: Array | None = None,
    axis_name: AxisName = None,
    rows_axis: AxisName = None,
    valid: Array | None = None,
) -> KnowledgeInteraction:
    """Contrast of the embeddings, contrast of their bank reconstructions, and reconstruction.

    BrgSA's objective is ``(i2t + t2i) + (i2t + t2i of the reconstructions) + 0.5 (mse_image +
    mse_text)``, logits ``10 cos``, without stop-gradients; the weights belong to the recipe. The
    squared error is the mean over all ``B * D`` elements of the un-normalised vectors.

    Args:
        image: ``[B, D]`` un-normalised embeddings, this device's share under ``axis_name``.
        text: ``[B, D]`` un-normalised.
        bank: ``[K, D]``, see ``read_bank``.
        temperature: of both contrasts.
        scale: of the bank logits.
        negatives: ``"global"``, ``"ring"`` or ``"local"``, see ``info_nce``.
        positives: ``[B]`` or ``[B, m]`` integer group ids, see ``info_nce``.
        axis_name: axes over which the batch is sharded, or None.
        rows_axis: axes, among ``axis_name``, over which the bank's rows are sharded, or None.
        valid: ``[B]`` bool; False rows take part in nothing.

    Returns:
        KnowledgeInteraction(contrast, contrast_reconstructed, reconstruction).

    Raises:
        ValueError: shapes differ, or ``rows_axis`` is not among the batch axes.
    """
    common.check_rows_axis("knowledge_interaction", rows_axis, axis_name)
    common.check_shapes(
        "knowledge_interaction", image=(image, "BD"), text=(text, "BD"), bank=(bank, "KD")
    )
    image, text, bank = common.promote(image, text, bank)
    image, text = common.zero_invalid(image, valid), common.zero_invalid(text, valid)
    # One read for both modalities: half the collectives, one gradient of the bank.
    both = read_bank(
        jnp.concatenate([image, text]), bank, scale=scale, rows_axis=rows_axis
    ).reconstruction
    image_read, text_read = jnp.split(both, 2)

    def contrast(a: Array, b: Array) -> InfoNCE:
        return info_nce(
            a,
            b,
            temperature=temperature,
            axis_name=axis_name,
            negatives=negatives,
            positives=positives,
            valid=valid,
        )

    def mse(read: Array, x: Array) -> Array:
        return common.global_mean(jnp.mean((read - x) ** 2, axis=1), valid, axis_name)

    return KnowledgeInteraction(
        contrast(image, text),
        contrast(image_read, text_read),
        Reconstruction(mse(image_read, image), mse(text_read, text)),
    )
