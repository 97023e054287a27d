"""The training objective: named terms with weights, summed.

A term takes the features of this device's samples and its own hyper-parameters and returns
named, weighted scalars. The registry kind is "term"; a configuration enables one by an entry
`losses.NAME = {weight: …, hyper-parameters}`.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from brgsa_jax import registry
from brgsa_jax.losses.common import AxisName
from brgsa_jax.losses.contrastive import info_nce
from brgsa_jax.losses.knowledge import knowledge_interaction
from brgsa_jax.registry import register


class Features(NamedTuple):
    """What the objective sees: this device's share of the batch.

    Attributes:
        image, text: [b, D] un-normalised embeddings.
        bank: [k, D] this device's rows of the knowledge bank, or None.
        groups: [b] int, equal for captions that say the same, or None.
        valid: [b] bool, or None when all rows are real.
    """

    image: jax.Array
    text: jax.Array
    bank: jax.Array | None = None
    groups: jax.Array | None = None
    valid: jax.Array | None = None


class Objective(NamedTuple):
    """Total to minimise and every un-weighted term by name."""

    total: jax.Array
    terms: dict[str, jax.Array]


def objective(features: Features, losses: Mapping[str, Mapping[str, Any]], *,
              axis_name: AxisName = None, rows_axis: AxisName = None) -> Objective:
    """Sums the enabled terms.

    Args:
        features: this device's samples.
        losses: {term: {"weight": w, hyper-parameters…}}; weight 0 disables a term.
        axis_name: mesh axes the batch is sharded over, None for one device.
        rows_axis: mesh axes the bank's rows are sharded over.

    Raises:
        KeyError: unknown term; the message lists the choices.
    """
    total = jnp.zeros((), jnp.float32)
    terms: dict[str, jax.Array] = {}
    for name, options in losses.items():
        options = dict(options)
        weight = options.pop("weight")
        if not weight:
            continue
        for term, (factor, value) in registry.get("term", name)(
                features, axis_name=axis_name, rows_axis=rows_axis, **options).items():
            total = total + weight * factor * value
            terms[term] = value
    return Objective(total, terms)


def _positives(features: Features, multi_positive: bool) -> jax.Array | None:
    return features.groups if multi_positive else None


@register("term", "info_nce")
def info_nce_term(features: Features, *, temperature: float, negatives: str, multi_positive: bool,
                  axis_name: AxisName, rows_axis: AxisName) -> dict[str, Any]:
    """CLIP: both directions of InfoNCE, summed."""
    pair = info_nce(features.image, features.text, temperature=temperature, negatives=negatives,
                    positives=_positives(features, multi_positive), valid=features.valid,
                    axis_name=axis_name)
    return {"image_to_text": (1.0, pair.image_to_text), "text_to_image": (1.0, pair.text_to_image)}


@register("term", "knowledge_interaction")
def knowledge_interaction_term(
        features: Features, *, contrast: float, contrast_reconstructed: float,
        reconstruction: float, temperature: float, scale: float, negatives: str,
        multi_positive: bool, axis_name: AxisName, rows_axis: AxisName) -> dict[str, Any]:
    """BrgSA: β·InfoNCE(v, t) + γ·InfoNCE(v̂, t̂) + α·(MSE(v̂, v) + MSE(t̂, t)).

    The weights are `contrast` β, `contrast_reconstructed` γ and `reconstruction` α.
    """
    result = knowledge_interaction(
        features.image, features.text, features.bank, temperature=temperature, scale=scale,
        negatives=negatives, positives=_positives(features, multi_positive),
        valid=features.valid, axis_name=axis_name, rows_axis=rows_axis)
    return {
        "image_to_text": (contrast, result.contrast.image_to_text),
        "text_to_image": (contrast, result.contrast.text_to_image),
        "image_to_text_bridged": (contrast_reconstructed,
                                  result.contrast_reconstructed.image_to_text),
        "text_to_image_bridged": (contrast_reconstructed,
                                  result.contrast_reconstructed.text_to_image),
        "mse_image": (reconstruction, result.reconstruction.mse_image),
        "mse_text": (reconstruction, result.reconstruction.mse_text),
    }
