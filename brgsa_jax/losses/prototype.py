"""Disease-level alignment: balanced prototype codes by Sinkhorn, and MGCA's CPA."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from brgsa_jax.losses import common
from brgsa_jax.losses.common import MASKED, AxisName, dot
from brgsa_jax.registry import register

CODES = ("global", "local")


class PrototypeAlignment(NamedTuple):
    """Image codes against text probabilities, and the mirror; each a mean over the batch."""

    image_to_text: Array
    text_to_image: Array


def sinkhorn(
    scores: Array,
    *,
    epsilon: float = 0.05,
    iterations: int = 3,
    axis_name: AxisName = None,
    valid: Array | None = None,
) -> Array:
    """Balanced soft assignment of samples to prototypes (SwAV, arXiv 2006.09882, §3.1).

    Sinkhorn-Knopp on ``exp(scores / epsilon)``, in the log domain: prototypes, then samples, are
    scaled to equal totals, ``iterations`` times. The batch is the global one: the prototypes'
    totals are summed over all devices.

    Args:
        scores: ``[B, K]`` similarities, this device's share under ``axis_name``.
        epsilon: entropy weight, > 0; small is sharp.
        iterations: number of rounds, >= 0; 0 is a softmax of each sample alone.
        axis_name: axes over which the batch is sharded, or None for this device's rows alone.
        valid: ``[B]`` bool; False samples take no share of any prototype.

    Returns:
        Codes ``[B, K]``, rows sum to 1. No gradient flows through them.

    Raises:
        ValueError: shapes differ, ``epsilon`` not positive, or ``iterations`` negative.
    """
    shapes = {"scores": (scores, "BK")}
    if valid is not None:
        shapes["valid"] = (valid, "B")
    common.check_shapes("sinkhorn", **shapes)
    if epsilon <= 0 or iterations < 0:
        raise ValueError(
            f"sinkhorn: epsilon={epsilon} must be > 0 and iterations={iterations} must be >= 0."
        )
    (scores,) = common.promote(lax.stop_gradient(scores))
    axes = common.axis_tuple(axis_name)
    logits = common.vary(common.zero_invalid(scores, valid) / epsilon, axes)

    def balance(_, logits: Array) -> Array:
        present = logits if valid is None else jnp.where(valid[:, None], logits, MASKED)
        peak = jnp.max(present, axis=0)
        peak = lax.pmax(peak, axes) if axes else peak
        total = jnp.sum(jnp.exp(present - peak), axis=0)
        total = lax.psum(total, axes) if axes else total
        # The targets 1/K and 1/B are common factors, which the last softmax removes.
        return jax.nn.log_softmax(logits - peak - jnp.log(total), axis=1)

    return jax.nn.softmax(lax.fori_loop(0, iterations, balance, logits), axis=1)


@jax.custom_jvp
def _unit_value_plain_gradient(x: Array) -> Array:
    """Unit rows whose derivative is that of the identity."""
    return common.l2_normalize(x)


@_unit_value_plain_gradient.defjvp
def _unit_value_plain_gradient_jvp(primals, tangents):
    return _unit_value_plain_gradient(*primals), tangents[0]


@register("loss", "prototype_alignment")
def prototype_alignment(
    image: Array,
    text: Array,
    prototypes: Array,
    *,
    temperature: float | Array = 0.2,
    epsilon: float = 0.05,
    iterations: int = 3,
    codes: str = "global",
    normalized_gradient: bool = False,
    axis_name: AxisName = None,
    valid: Array | None = None,
) -> PrototypeAlignment:
    """Cross-modal prototype alignment (MGCA, arXiv 2210.06044, §3.4), swapped prediction.

    ``image_to_text = -mean_b sum_k q_image log softmax(z_text / temperature)`` with
    ``z = n(x) n(prototypes)^T`` and ``q = sinkhorn(z)`` without gradient (Eq. 8 with the minus
    sign the paper lost). The reference halves the sum of both directions.

    Args:
        image: ``[B, D]`` un-normalised embeddings, this device's share under ``axis_name``.
        text: ``[B, D]`` un-normalised.
        prototypes: ``[K, D]``, normalised here.
        temperature: of the predicted probabilities.
        epsilon: of ``sinkhorn``.
        iterations: of ``sinkhorn``.
        codes: ``"global"`` balances over the whole batch; ``"local"`` each device alone, as the
            reference's distributed runs do, so that the value depends on the device count.
        normalized_gradient: False is the reference: the gradient of the prototypes is taken at
            the normalised prototypes, without the Jacobian of the normalisation.
        axis_name: axes over which the batch is sharded, or None.
        valid: ``[B]`` bool; False rows take part in nothing.

    Returns:
        PrototypeAlignment of two scalars.

    Raises:
        ValueError: shapes differ or ``codes`` is unknown.
    """
    common.check_choice("prototype_alignment", "codes", codes, CODES)
    shapes = {"image": (image, "BD"), "text": (text, "BD"), "prototypes": (prototypes, "KD")}
    if valid is not None:
        shapes["valid"] = (valid, "B")
    common.check_shapes("prototype_alignment", **shapes)
    image, text, prototypes = common.promote(image, text, prototypes)
    project = common.l2_normalize if normalized_gradient else _unit_value_plain_gradient
    centers = project(prototypes)
    scope = axis_name if codes == "global" else None

    def scores(x: Array) -> Array:
        return dot("bd,kd->bk", common.l2_normalize(common.zero_invalid(x, valid)), centers)

    z_image, z_text = scores(image), scores(text)

    def direction(source: Array, target: Array) -> Array:
        code = sinkhorn(
            source, epsilon=epsilon, iterations=iterations, axis_name=scope, valid=valid
        )
        log_probability = jax.nn.log_softmax(target / jnp.asarray(temperature, target.dtype))
        return common.global_mean(-jnp.sum(code * log_probability, axis=1), valid, axis_name)

    return PrototypeAlignment(direction(z_image, z_text), direction(z_text, z_image))
