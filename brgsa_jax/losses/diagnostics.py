"""What a loss curve hides: retrieval within the batch, collapse, and how the bank is used.

Exact on any number of devices, without gradients, in memory that does not grow with the number of
devices. Conventions: ``brgsa_jax.losses.common``.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from brgsa_jax.losses import common
from brgsa_jax.losses.common import MASKED, AxisName, dot

# Cosines this many units of precision apart are the same number: the sums of equal vectors may
# be taken in another order at another place of the batch or on another number of devices.
TIE = 16

# A row of the bank is dead below this part of the share it would have if all were used alike.
DEAD = 0.01


class BatchStatistics(NamedTuple):
    """How well the pairs of a batch are told apart.

    Attributes:
        positive_cosine: mean cosine of the own pairs.
        hardest_negative_cosine: mean over the anchors of both directions of the highest cosine
            to a row that is no positive; anchors without such a row are left out.
        top1: share, in [0, 1], of the anchors of both directions whose own pair ranks first.
        top5: the same among the first five.
        duplicates: mean number of other positives an anchor has.
        image_norm: mean L2 norm of the un-normalised image embeddings.
        text_norm: mean L2 norm of the un-normalised text embeddings.
    """

    positive_cosine: Array
    hardest_negative_cosine: Array
    top1: Array
    top5: Array
    duplicates: Array
    image_norm: Array
    text_norm: Array


class BankHealth(NamedTuple):
    """How the samples of a batch use the rows of the knowledge bank.

    Attributes:
        code_entropy_image: mean entropy of an image's code, in nats; log K reads all rows alike.
        code_entropy_text: mean entropy of a text's code, in nats.
        usage_entropy: entropy, in nats, of the mean code of the batch, both modalities together;
            log K uses all rows alike, far less is a collapsed bank.
        dead_rows: number of rows with less than 1 % of the share 1/K of the mean code.
        row_norm_mean: mean L2 norm of the bank's rows.
        row_norm_min: smallest.
        row_norm_max: largest.
    """

    code_entropy_image: Array
    code_entropy_text: Array
    usage_entropy: Array
    dead_rows: Array
    row_norm_mean: Array
    row_norm_min: Array
    row_norm_max: Array


def batch_statistics(
    image: Array,
    text: Array,
    *,
    positives: Array | None = None,
    valid: Array | None = None,
    axis_name: AxisName = None,
) -> BatchStatistics:
    """Cosines, retrieval accuracy, duplicates and norms of the global batch, on a ring.

    An own pair that ties with ``t`` negatives counts as if ties were broken at random: with the
    expected share ``clip((k - greater) / (t + 1), 0, 1)``. All embeddings alike is thus chance,
    ``k / B``, and the order of the batch does not matter. Other positives of an anchor count
    neither for nor against it.

    Args:
        image: ``[B, D]`` un-normalised embeddings, this device's share under ``axis_name``.
        text: ``[B, D]`` un-normalised, row i belongs to ``image[i]``.
        positives: ``[B]`` or ``[B, m]`` integer group ids, see ``info_nce``; None: only the own
            pair is positive.
        valid: ``[B]`` bool; False rows are no anchor, no negative, and in no mean.
        axis_name: axes over which the batch is sharded, or None.

    Returns:
        BatchStatistics of scalars, equal on all devices; a mean over no anchor is 0.

    Raises:
        ValueError: shapes differ.
    """
    common.check_batch("batch_statistics", image, text, positives, valid)
    image, text = common.promote(*lax.stop_gradient((image, text)))
    norms = [_norms(common.zero_invalid(x, valid)) for x in (image, text)]
    image, text = common.unit_rows(image, text, valid)
    groups = common.group_ids(positives, image, axis_name)
    present = jnp.ones(image.shape[0], bool) if valid is None else valid
    image, text, groups, present = common.spread(axis_name, image, text, groups, present)
    own = jnp.sum(image * text, axis=1)
    tie = TIE * jnp.finfo(own.dtype).eps

    def rank(seen: dict, cosine: Array, negative: Array, own: Array, axis: int) -> dict:
        """Adds a block of cosines to what the anchors along the other axis have seen."""
        above = cosine - jnp.expand_dims(own, axis)
        tied = jnp.abs(above) <= tie
        hardest = jnp.max(jnp.where(negative, cosine, MASKED), axis=axis)

        def count(mask: Array) -> Array:
            return jnp.sum(mask & negative, axis=axis, dtype=cosine.dtype)

        return {
            "greater": seen["greater"] + count((above > 0) & ~tied),
            "tied": seen["tied"] + count(tied),
            "hardest": jnp.maximum(seen["hardest"], hardest),
        }

    def step(there, here):
        cosine = dot("id,jd->ij", image, there["text"])
        pair = present[:, None] & there["present"][None, :]
        same = pair & common.same_group(groups, there["groups"])
        negative = pair & ~same
        others = here["others"] + jnp.sum(same, axis=1, dtype=cosine.dtype)
        here = {"seen": rank(here["seen"], cosine, negative, own, 1), "others": others}
        there = there | {"seen": rank(there["seen"], cosine, negative, there["own"], 0)}
        return there, here

    nothing = {
        "greater": common.zeros(own),
        "tied": common.zeros(own),
        "hardest": common.zeros(own, fill=MASKED),
    }
    there = {"text": text, "groups": groups, "present": present, "own": own, "seen": nothing}
    # Each anchor meets itself on the way.
    here = {"seen": nothing, "others": common.zeros(own, fill=-1.0)}
    there, here = common.travel(step, there, here, axis_name)
    both = (here["seen"], there["seen"])

    def mean(values: Array, rows: Array | None = valid) -> Array:
        return common.global_mean(values, rows, axis_name)

    def top(k: int) -> Array:
        shares = [jnp.clip((k - x["greater"]) / (x["tied"] + 1), 0, 1) for x in both]
        return mean(sum(shares) / 2)

    # Positives are symmetric: an image has a negative where its text has one.
    contested = present & (both[0]["hardest"] > MASKED)
    return BatchStatistics(
        positive_cosine=mean(own),
        hardest_negative_cosine=mean(sum(x["hardest"] for x in both) / 2, contested),
        top1=top(1),
        top5=top(5),
        duplicates=mean(here["others"]),
        image_norm=mean(norms[0]),
        text_norm=mean(norms[1]),
    )


def bank_health(
    image: Array,
    text: Array,
    bank: Array,
    *,
    scale: float | Array = 1.0,
    axis_name: AxisName = None,
    rows_axis: AxisName = None,
    valid: Array | None = None,
) -> BankHealth:
    """Entropies of the codes ``softmax(scale * x bank^T)``, dead rows and row norms of the bank.

    The samples visit every shard of the bank twice: once for their log-sum-exp, once for their
    codes, of which no device ever holds more than one block.

    Args:
        image: ``[B, D]`` un-normalised embeddings, this device's share under ``axis_name``.
        text: ``[B, D]`` un-normalised.
        bank: ``[K, D]``; with ``rows_axis`` this device's rows, see ``read_bank``.
        scale: factor on the logits.
        axis_name: axes over which the batch is sharded, or None.
        rows_axis: axes, among ``axis_name``, over which the bank's rows are sharded, or None.
        valid: ``[B]`` bool; False rows take part in nothing.

    Returns:
        BankHealth of scalars, equal on all devices; a mean over no sample is 0.

    Raises:
        ValueError: shapes differ, or ``rows_axis`` is not among the batch axes.
    """
    common.check_rows_axis("bank_health", rows_axis, axis_name)
    common.check_batch("bank_health", image, text, None, valid)
    common.check_shapes("bank_health", image=(image, "BD"), bank=(bank, "KD"))
    image, text, bank, scale = lax.stop_gradient((image, text, bank, scale))
    image, text, bank = common.promote(image, text, bank)
    samples = jnp.concatenate([common.zero_invalid(x, valid) for x in (image, text)])
    present = jnp.ones(image.shape[0], bool) if valid is None else valid
    present = jnp.concatenate([present, present])
    scale = jnp.asarray(scale, samples.dtype)
    samples, present, bank, scale = common.spread(axis_name, samples, present, bank, scale)
    start = common.zeros(samples, samples.shape[:1])

    def logits(there: dict) -> Array:
        return scale * dot("bd,kd->bk", there["samples"], bank)

    def read(there, here):
        peak, total = common.accumulate(there["peak"], there["total"], logits(there), axis=1)
        return there | {"peak": peak, "total": total}, here

    there = {
        "samples": samples,
        "peak": common.zeros(start, fill=MASKED),
        "total": start,
    }
    there, _ = common.travel(read, there, (), rows_axis)
    lse = there["peak"] + jnp.log(there["total"])

    def use(there, usage):
        log_code = logits(there) - there["lse"][:, None]
        code = jnp.exp(log_code)
        entropy = there["entropy"] - jnp.sum(code * log_code, axis=1)
        usage = usage + jnp.sum(jnp.where(there["present"][:, None], code, 0.0), axis=0)
        return there | {"entropy": entropy}, usage

    there = {"samples": samples, "present": present, "lse": lse, "entropy": start}
    there, usage = common.travel(use, there, common.zeros(bank, bank.shape[:1]), rows_axis)
    entropy_image, entropy_text = jnp.split(there["entropy"], 2)
    return BankHealth(
        common.global_mean(entropy_image, valid, axis_name),
        common.global_mean(entropy_text, valid, axis_name),
        *_row_statistics(usage, present, bank, axis_name, rows_axis),
    )


def _row_statistics(
    usage: Array, present: Array, bank: Array, axis_name: AxisName, rows_axis: AxisName
) -> tuple[Array, ...]:
    """Usage entropy, dead rows and norms (mean, minimum, maximum) from this device's rows.

    ``usage`` ``[k]`` is the total of the codes of those samples that came by on the ring.
    """
    axes, rows = common.axis_tuple(axis_name), common.axis_tuple(rows_axis)
    elsewhere = tuple(a for a in axes if a not in rows)
    count = jnp.sum(present, dtype=usage.dtype)
    if axes:
        count = lax.psum(count, axes)
    if elsewhere:
        usage = lax.psum(usage, elsewhere)
    share = usage / jnp.maximum(count, 1.0)
    norms = _norms(bank)
    sums = jnp.stack([
        -jnp.sum(share * jnp.log(jnp.where(share > 0, share, 1.0))),
        jnp.sum(share < DEAD / (share.size * common.axis_size(rows_axis)), dtype=share.dtype),
        jnp.mean(norms) / common.axis_size(rows_axis),
    ])
    ends = jnp.stack([-jnp.min(norms), jnp.max(norms)])
    if rows:
        sums, ends = lax.psum(common.vary(sums, rows), rows), lax.pmax(ends, rows)
    values = jnp.concatenate([sums, ends * jnp.asarray([-1.0, 1.0], ends.dtype)])
    if axes:
        # The devices agree already; this is how a type of device-varying values learns of it.
        values = lax.pmean(common.vary(values, axes), axes)
    return tuple(values)


def _norms(x: Array) -> Array:
    return jnp.sqrt(jnp.sum(x * x, axis=1))
