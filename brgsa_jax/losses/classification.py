"""Multi-label classification: the objective of a linear head on the image tower."""

import jax
import jax.numpy as jnp
from jax import Array

from brgsa_jax.losses import common
from brgsa_jax.losses.common import AxisName
from brgsa_jax.registry import register


@register("loss", "classification")
def classification(logits: Array, labels: Array, *,
                   positive_weights: Array | None = None, valid: Array | None = None,
                   axis_name: AxisName = None) -> Array:
    """Mean binary cross-entropy of a sigmoid for every class, over all labels that are known.

    −[w_p y log σ(z) + (1 − y) log(1 − σ(z))], averaged over rows and classes alike: a class with
    few known labels weighs as little as it has labels.

    Args:
        logits: ``[B, P]``.
        labels: ``[B, P]`` integers: 1 present, 0 absent, negative unknown, which is in no
            mean.
        positive_weights: ``[P]``, w_p; None is 1 for all.
        valid: ``[B]`` bool or None.
        axis_name: mesh axes of the batch, None for one device.

    Returns:
        Scalar; 0 where no label is known.

    Raises:
        ValueError: shapes that do not fit.
    """
    shapes = {"logits": (logits, "BP"), "labels": (labels, "BP")}
    if positive_weights is not None:
        shapes["positive_weights"] = (positive_weights, "P")
    if valid is not None:
        shapes["valid"] = (valid, "B")
    common.check_shapes("classification", **shapes)
    (logits,) = common.promote(logits)
    logits = common.zero_invalid(logits, valid)
    positive, known = labels == 1, labels >= 0
    if valid is not None:
        known = known & valid[:, None]
    entropy = jax.nn.softplus(jnp.where(positive, -logits, logits))
    if positive_weights is not None:
        entropy = entropy * jnp.where(positive, positive_weights.astype(logits.dtype), 1.0)
    return common.global_mean(entropy.reshape(-1), known.reshape(-1), axis_name)
