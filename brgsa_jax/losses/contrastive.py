"""Batch-coupled contrastive losses: InfoNCE (MGCA's ITA, BrgSA's contrast) and SigLIP's sigmoid.

Negatives may come from the whole batch by gathering the embeddings (``"global"``), from the
whole batch by passing blocks around a ring of devices (``"ring"``: the same numbers, memory that
does not grow with the number of devices), or from each device alone (``"local"``: what the
published MGCA code does on several GPUs).
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from brgsa_jax.losses import common
from brgsa_jax.losses.common import MASKED, AxisName, dot
from brgsa_jax.registry import register

NEGATIVES = ("global", "ring", "local")


class InfoNCE(NamedTuple):
    """The two directions of the contrastive loss, each a mean over the batch."""

    image_to_text: Array
    text_to_image: Array


@register("loss", "info_nce")
def info_nce(
    image: Array,
    text: Array,
    *,
    temperature: float | Array,
    axis_name: AxisName = None,
    negatives: str = "global",
    positives: Array | None = None,
    valid: Array | None = None,
) -> InfoNCE:
    """Symmetric InfoNCE on cosine similarities.

    ``image_to_text = mean_i [ logsumexp_j s_ij - mean_{j in P(i)} s_ij ]`` with
    ``s_ij = cos(image_i, text_j) / temperature`` and ``P(i) = {i}`` without groups; the other
    direction swaps the roles. MGCA (arXiv 2210.06044) §3.2 sums both directions at 0.07, BrgSA
    (arXiv 2501.03565) at 0.1; several positives as in SupCon's L_out (arXiv 2004.11362, Eq. 2).

    Args:
        image: ``[B, D]`` un-normalised embeddings, this device's share under ``axis_name``.
        text: ``[B, D]`` un-normalised, row i belongs to ``image[i]``.
        temperature: positive scalar; may be traced and differentiated.
        axis_name: axes over which the batch is sharded, or None.
        negatives: ``"global"`` gathers, ``"ring"`` rotates, ``"local"`` stays on the device.
        positives: ``[B]`` or ``[B, m]`` integer group ids, unique across the whole batch: rows
            are positives of each other when any of their m ids is equal (duplicate captions,
            twin reconstructions). The relation need not be transitive. With
            ``negatives="local"`` only this device's rows count.
        valid: ``[B]`` bool; False rows are no anchor, no negative, and in no mean.

    Returns:
        InfoNCE of two scalars.

    Raises:
        ValueError: shapes differ or ``negatives`` is unknown.
    """
    common.check_choice("info_nce", "negatives", negatives, NEGATIVES)
    common.check_batch("info_nce", image, text, positives, valid)
    image, text = common.unit_rows(image, text, valid)
    scale = 1.0 / jnp.asarray(temperature, image.dtype)
    if negatives == "ring":
        per_image, per_text = _ring_info_nce(
            image, text, scale, common.group_ids(positives, image, axis_name), valid, axis_name
        )
    else:
        scope = axis_name if negatives == "global" else None
        per_image, per_text = _gathered_info_nce(image, text, scale, positives, valid, scope)
    return InfoNCE(
        common.global_mean(per_image, valid, axis_name),
        common.global_mean(per_text, valid, axis_name),
    )


@register("loss", "sigmoid")
def sigmoid(
    image: Array,
    text: Array,
    *,
    logit_scale: float | Array,
    logit_bias: float | Array,
    axis_name: AxisName = None,
    positives: Array | None = None,
    valid: Array | None = None,
) -> Array:
    """SigLIP's pairwise sigmoid loss over all pairs of the global batch, computed on a ring.

    ``-1/B sum_ij log sigmoid(z_ij (logit_scale cos(image_i, text_j) + logit_bias))`` with
    ``z = 1`` for positives and -1 otherwise (arXiv 2303.15343, Eq. 1, Algorithm 1). Each device
    sees one ``[b, b]`` block of pairs at a time, in the forward and again in the backward pass.

    Args:
        image: ``[B, D]`` un-normalised embeddings, this device's share under ``axis_name``.
        text: ``[B, D]`` un-normalised.
        logit_scale: the factor itself (not its logarithm); may be traced and differentiated.
        logit_bias: added to every logit; may be traced and differentiated.
        axis_name: axes over which the batch is sharded, or None.
        positives: ``[B]`` or ``[B, m]`` integer group ids, see ``info_nce``.
        valid: ``[B]`` bool; pairs with a False row are left out, B counts the valid rows.

    Returns:
        Scalar.

    Raises:
        ValueError: shapes differ.
    """
    common.check_batch("sigmoid", image, text, positives, valid)
    image, text = common.unit_rows(image, text, valid)
    scale = jnp.asarray(logit_scale, image.dtype)
    bias = jnp.asarray(logit_bias, image.dtype)
    per_image = _ring_sigmoid(
        image, text, scale, bias, common.group_ids(positives, image, axis_name), valid, axis_name
    )
    return common.global_mean(per_image, valid, axis_name)


def _gathered_info_nce(
    image: Array,
    text: Array,
    scale: Array,
    positives: Array | None,
    valid: Array | None,
    axis_name: AxisName,
) -> tuple[Array, Array]:
    """Per-anchor losses ``[b]``, ``[b]`` of this device's rows against the gathered batch."""
    keys = common.gather_rows(jnp.stack([image, text], axis=1), axis_name)
    key_valid = None if valid is None else common.gather_rows(valid, axis_name)
    if positives is None:
        positive = jnp.sum(image * text, axis=-1)
        same = None
    else:
        same = common.same_group(positives, common.gather_rows(positives, axis_name))
        if key_valid is not None:
            same = same & key_valid[None, :]

    def direction(anchors: Array, others: Array) -> Array:
        cosine = dot("id,jd->ij", anchors, others)
        target = positive if same is None else _mean_where(same, cosine)
        # Relative to the positive before scaling: the gradient of the temperature is then a sum
        # of small terms, not the small difference of two large ones.
        logits = scale * (cosine - target[:, None])
        if key_valid is not None:
            logits = jnp.where(key_valid[None, :], logits, MASKED)
        return jax.nn.logsumexp(logits, axis=1)

    return direction(image, keys[:, 1]), direction(text, keys[:, 0])


def _mean_where(mask: Array, values: Array) -> Array:
    count = jnp.maximum(jnp.sum(mask, axis=1), 1)
    return jnp.sum(jnp.where(mask, values, 0.0), axis=1) / count


# --------------------------------------------------------------------------------------------
# Ring. Text blocks, with what belongs to them, travel once around the devices. The forward pass
# keeps its inputs and one log-sum-exp a row; the backward pass travels once more and carries the
# gradients of the text block home. Differentiating a scan, even a rematerialised one, would keep
# the travelling block of every step, which grows with the number of devices.


def _ring_info_nce(
    image: Array,
    text: Array,
    scale: Array,
    groups: Array,
    valid: Array | None,
    axis_name: AxisName,
) -> tuple[Array, Array]:
    """As ``_gathered_info_nce``, holding one ``[b, b]`` block of logits at a time."""
    valid = jnp.ones(image.shape[0], bool) if valid is None else valid
    arrays = common.spread(axis_name, image, text, scale, groups, valid)
    return _ring_info_nce_vjp(*arrays, axis_name)


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _ring_info_nce_vjp(image, text, scale, groups, valid, axis_name):
    return _ring_info_nce_forward(image, text, scale, groups, valid, axis_name)[0]


def _block(image, text, scale, groups, valid, other):
    """Logits of this device's images against the block's texts, and who is whose positive."""
    logits = scale * dot("id,jd->ij", image, text)
    pair = valid[:, None] & other["valid"][None, :]
    same = pair & common.same_group(groups, other["groups"])
    return logits, pair, same


def _ring_info_nce_forward(image, text, scale, groups, valid, axis_name):
    rows = image.shape[:1]

    def step(there, here):
        logits, pair, same = _block(image, there["text"], scale, groups, valid, there)
        positive = jnp.where(same, logits, 0.0)
        masked = jnp.where(pair, logits, MASKED)
        peak, total = common.accumulate(here["peak"], here["total"], masked, axis=1)
        here = {
            "peak": peak,
            "total": total,
            "positive": here["positive"] + jnp.sum(positive, axis=1),
            "count": here["count"] + jnp.sum(same, axis=1, dtype=image.dtype),
        }
        peak, total = common.accumulate(there["peak"], there["total"], masked, axis=0)
        there = there | {
            "peak": peak,
            "total": total,
            "positive": there["positive"] + jnp.sum(positive, axis=0),
        }
        return there, here

    start = {
        "peak": common.zeros(image, rows, MASKED),
        "total": common.zeros(image, rows),
        "positive": common.zeros(image, rows),
    }
    there = start | {"text": text, "groups": groups, "valid": valid}
    here = start | {"count": common.zeros(image, rows)}
    there, here = common.travel(step, there, here, axis_name)

    # Positives are symmetric: a text has as many positive images as its image positive texts.
    count = jnp.maximum(here["count"], 1.0)
    lse_image = here["peak"] + jnp.log(here["total"])
    lse_text = there["peak"] + jnp.log(there["total"])
    losses = (lse_image - here["positive"] / count, lse_text - there["positive"] / count)
    # An invalid row has seen masked pairs only; its loss is dropped by the mean, and 0 here.
    losses = tuple(jnp.where(valid, x, 0.0) for x in losses)
    return losses, (image, text, scale, groups, valid, lse_image, lse_text, count)


def _ring_info_nce_backward(axis_name, residuals, cotangents):
    image, text, scale, groups, valid, lse_image, lse_text, count = residuals
    weight_image, weight_text = (jnp.where(valid, g, 0.0) for g in cotangents)

    def step(there, here):
        logits, pair, same = _block(image, there["text"], scale, groups, valid, there)
        logits = jnp.where(pair, logits, MASKED)
        # d loss / d logits, rows and columns: softmax minus the mean over the positives.
        rows = jnp.exp(logits - lse_image[:, None]) - same / count[:, None]
        columns = jnp.exp(logits - there["lse"][None, :]) - same / there["count"][None, :]
        slope = weight_image[:, None] * rows + there["weight"][None, :] * columns
        slope = jnp.where(pair, slope, 0.0)
        pull = dot("ij,jd->id", slope, there["text"])
        here = {
            "image": here["image"] + pull,
            "scale": here["scale"] + jnp.sum(pull * image),
        }
        there = there | {"grad": there["grad"] + dot("ij,id->jd", slope, image)}
        return there, here

    there = {
        "text": text,
        "groups": groups,
        "valid": valid,
        "lse": lse_text,
        "count": count,
        "weight": weight_text,
        "grad": common.zeros(text),
    }
    here = {"image": common.zeros(image), "scale": common.zeros(scale)}
    there, here = common.travel(step, there, here, axis_name)
    return scale * here["image"], scale * there["grad"], here["scale"], None, None


_ring_info_nce_vjp.defvjp(_ring_info_nce_forward, _ring_info_nce_backward)


def _ring_sigmoid(
    image: Array,
    text: Array,
    scale: Array,
    bias: Array,
    groups: Array,
    valid: Array | None,
    axis_name: AxisName,
) -> Array:
    """Per-image sums over all texts of the sigmoid loss, ``[b]``."""
    valid = jnp.ones(image.shape[0], bool) if valid is None else valid
    arrays = common.spread(axis_name, image, text, scale, bias, groups, valid)
    return _ring_sigmoid_vjp(*arrays, axis_name)


@partial(jax.custom_vjp, nondiff_argnums=(6,))
def _ring_sigmoid_vjp(image, text, scale, bias, groups, valid, axis_name):
    return _ring_sigmoid_forward(image, text, scale, bias, groups, valid, axis_name)[0]


def _ring_sigmoid_forward(image, text, scale, bias, groups, valid, axis_name):
    def step(there, here):
        logits, pair, same = _block(image, there["text"], scale, groups, valid, there)
        sign = jnp.where(same, 1.0, -1.0)
        loss = -jax.nn.log_sigmoid(sign * (logits + bias))
        return there, here + jnp.sum(jnp.where(pair, loss, 0.0), axis=1)

    there = {"text": text, "groups": groups, "valid": valid}
    _, loss = common.travel(step, there, common.zeros(image, image.shape[:1]), axis_name)
    return loss, (image, text, scale, bias, groups, valid)


def _ring_sigmoid_backward(axis_name, residuals, cotangent):
    image, text, scale, bias, groups, valid = residuals

    def step(there, here):
        logits, pair, same = _block(image, there["text"], scale, groups, valid, there)
        sign = jnp.where(same, 1.0, -1.0)
        slope = -sign * jax.nn.sigmoid(-sign * (logits + bias)) * cotangent[:, None]
        slope = jnp.where(pair, slope, 0.0)
        pull = dot("ij,jd->id", slope, there["text"])
        here = {
            "image": here["image"] + pull,
            "scale": here["scale"] + jnp.sum(pull * image),
            "bias": here["bias"] + jnp.sum(slope),
        }
        there = there | {"grad": there["grad"] + dot("ij,id->jd", slope, image)}
        return there, here

    there = {"text": text, "groups": groups, "valid": valid, "grad": common.zeros(text)}
    here = {"image": common.zeros(image), "scale": common.zeros(scale), "bias": common.zeros(bias)}
    there, here = common.travel(step, there, here, axis_name)
    grads = (scale * here["image"], scale * there["grad"], here["scale"], here["bias"])
    return *grads, None, None


_ring_sigmoid_vjp.defvjp(_ring_sigmoid_forward, _ring_sigmoid_backward)
