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
from jax import Array, lax

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
        positives: ``[B]`` integer group ids, unique across the whole batch: all rows of equal id
            are positives of each other (duplicate captions, twin reconstructions). With
            ``negatives="local"`` only this device's rows of the group count.
        valid: ``[B]`` bool; False rows are no anchor, no negative, and in no mean.

    Returns:
        InfoNCE of two scalars.

    Raises:
        ValueError: shapes differ or ``negatives`` is unknown.
    """
    common.check_choice("info_nce", "negatives", negatives, NEGATIVES)
    _check_batch("info_nce", image, text, positives, valid)
    image, text = _unit_rows(image, text, valid)
    scale = 1.0 / jnp.asarray(temperature, image.dtype)
    if negatives == "ring":
        per_image, per_text = _ring_info_nce(
            image, text, scale, _group_ids(positives, image, axis_name), valid, axis_name
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
        positives: ``[B]`` integer group ids, see ``info_nce``.
        valid: ``[B]`` bool; pairs with a False row are left out, B counts the valid rows.

    Returns:
        Scalar.

    Raises:
        ValueError: shapes differ.
    """
    _check_batch("sigmoid", image, text, positives, valid)
    image, text = _unit_rows(image, text, valid)
    scale = jnp.asarray(logit_scale, image.dtype)
    bias = jnp.asarray(logit_bias, image.dtype)
    per_image = _ring_sigmoid(
        image, text, scale, bias, _group_ids(positives, image, axis_name), valid, axis_name
    )
    return common.global_mean(per_image, valid, axis_name)


def _check_batch(
    where: str, image: Array, text: Array, positives: Array | None, valid: Array | None
) -> None:
    shapes = {"image": (image, "BD"), "text": (text, "BD")}
    if positives is not None:
        shapes["positives"] = (positives, "B")
    if valid is not None:
        shapes["valid"] = (valid, "B")
    common.check_shapes(where, **shapes)


def _unit_rows(image: Array, text: Array, valid: Array | None) -> tuple[Array, Array]:
    image, text = common.promote(image, text)
    return (
        common.l2_normalize(common.zero_invalid(image, valid)),
        common.l2_normalize(common.zero_invalid(text, valid)),
    )


def _group_ids(positives: Array | None, rows: Array, axis_name: AxisName) -> Array:
    """Global group id of each of this device's rows; without groups, its global row number."""
    if positives is not None:
        return positives
    count = rows.shape[0]
    return common.axis_index(axis_name) * count + jnp.arange(count)


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
        same = positives[:, None] == common.gather_rows(positives, axis_name)[None, :]
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


def _rotate(tree, axis_name: AxisName):
    """Hands a tree to the next device of the ring."""
    if axis_name is None:
        return tree
    n = common.axis_size(axis_name)
    shift = [(i, (i + 1) % n) for i in range(n)]
    return jax.tree.map(lambda x: lax.ppermute(x, common.axis_tuple(axis_name), shift), tree)


def _travel(step, travelling, staying, axis_name: AxisName):
    """Runs ``step(travelling, staying)`` on every device's block, until all are home again."""
    if axis_name is None:
        return step(travelling, staying)

    def body(carry, _):
        travelling, staying = step(*carry)
        return (_rotate(travelling, axis_name), staying), None

    n = common.axis_size(axis_name)
    (travelling, staying), _ = lax.scan(body, (travelling, staying), None, length=n)
    return travelling, staying


def _spread(axis_name: AxisName, *arrays: Array) -> tuple[Array, ...]:
    """Types all arrays as varying over the same axes, as a custom_vjp and a scan carry need.

    Done outside the custom_vjp, the transpose of the cast sums the gradients of what is
    replicated (temperature, bias) over the devices.
    """
    axes = tuple(dict.fromkeys(common.axis_tuple(axis_name) + common.varying_axes(*arrays)))
    return tuple(common.vary(x, axes) for x in arrays)


def _zeros(like: Array, shape: tuple[int, ...] | None = None, fill: float = 0.0) -> Array:
    shape = like.shape if shape is None else shape
    return common.vary(jnp.full(shape, fill, like.dtype), common.varying_axes(like))


def _accumulate(peak: Array, total: Array, logits: Array, axis: int) -> tuple[Array, Array]:
    """Adds a block of logits to a running (maximum, sum of exponentials) along ``axis``."""
    new_peak = jnp.maximum(peak, jnp.max(logits, axis=axis))
    block = jnp.sum(jnp.exp(logits - jnp.expand_dims(new_peak, axis)), axis=axis)
    return new_peak, total * jnp.exp(peak - new_peak) + block


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
    arrays = _spread(axis_name, image, text, scale, groups, valid)
    return _ring_info_nce_vjp(*arrays, axis_name)


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _ring_info_nce_vjp(image, text, scale, groups, valid, axis_name):
    return _ring_info_nce_forward(image, text, scale, groups, valid, axis_name)[0]


def _block(image, text, scale, groups, valid, other):
    """Logits of this device's images against the block's texts, and who is whose positive."""
    logits = scale * dot("id,jd->ij", image, text)
    pair = valid[:, None] & other["valid"][None, :]
    same = pair & (groups[:, None] == other["groups"][None, :])
    return logits, pair, same


def _ring_info_nce_forward(image, text, scale, groups, valid, axis_name):
    rows = image.shape[:1]

    def step(there, here):
        logits, pair, same = _block(image, there["text"], scale, groups, valid, there)
        positive = jnp.where(same, logits, 0.0)
        masked = jnp.where(pair, logits, MASKED)
        peak, total = _accumulate(here["peak"], here["total"], masked, axis=1)
        here = {
            "peak": peak,
            "total": total,
            "positive": here["positive"] + jnp.sum(positive, axis=1),
            "count": here["count"] + jnp.sum(same, axis=1, dtype=image.dtype),
        }
        peak, total = _accumulate(there["peak"], there["total"], masked, axis=0)
        there = there | {
            "peak": peak,
            "total": total,
            "positive": there["positive"] + jnp.sum(positive, axis=0),
        }
        return there, here

    start = {
        "peak": _zeros(image, rows, MASKED),
        "total": _zeros(image, rows),
        "positive": _zeros(image, rows),
    }
    there = start | {"text": text, "groups": groups, "valid": valid}
    there, here = _travel(step, there, start | {"count": _zeros(image, rows)}, axis_name)

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
        "grad": _zeros(text),
    }
    here = {"image": _zeros(image), "scale": _zeros(scale)}
    there, here = _travel(step, there, here, axis_name)
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
    arrays = _spread(axis_name, image, text, scale, bias, groups, valid)
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
    _, loss = _travel(step, there, _zeros(image, image.shape[:1]), axis_name)
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

    there = {"text": text, "groups": groups, "valid": valid, "grad": _zeros(text)}
    here = {"image": _zeros(image), "scale": _zeros(scale), "bias": _zeros(bias)}
    there, here = _travel(step, there, here, axis_name)
    grads = (scale * here["image"], scale * there["grad"], here["scale"], here["bias"])
    return *grads, None, None


_ring_sigmoid_vjp.defvjp(_ring_sigmoid_forward, _ring_sigmoid_backward)
