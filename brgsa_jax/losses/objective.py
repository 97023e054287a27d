"""The training objective: named terms with weights, summed.

A term takes the features of this device's samples and its own hyper-parameters and returns
named, weighted scalars. The registry kind is "term"; a configuration enables one by an entry
`losses.NAME = {weight: …, hyper-parameters}`.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from brgsa_jax import registry
from brgsa_jax.losses import common
from brgsa_jax.losses.classification import classification
from brgsa_jax.losses.common import AxisName
from brgsa_jax.losses.contrastive import info_nce, sigmoid
from brgsa_jax.losses.diagnostics import bank_health, batch_statistics
from brgsa_jax.losses.knowledge import knowledge_interaction
from brgsa_jax.losses.prototype import prototype_alignment
from brgsa_jax.losses.tokenwise import attention_weights, local_alignment, token_alignment
from brgsa_jax.registry import register

WEIGHTS = ("attention", "uniform")
REDUCTIONS = {"sum": 1.0, "mean": 0.5}


class Features(NamedTuple):
    """What the objective sees: this device's share of the batch.

    Attributes:
        image, text: [b, D] un-normalised embeddings; no text where no term reads it.
        groups: [b, m] int; columns of ids, equal for rows that match each other, or None.
        patches, patch_attention: [b, N, D] and [b, N], or None.
        words, word_attention, pad_mask: [b, T, D], [b, T], [b, T] bool True = padding, or None.
        valid: [b] bool, or None when all rows are real.
        bank: [k, D] this device's rows of the knowledge bank, or None.
        shared: arrays every device holds whole: prototypes [K, D], logit {log_scale, bias},
            cross_attention {word, patch}.
        logits, labels: [b, P] of a classifier, and 1, 0 or -1 for unknown; or None.
    """

    image: jax.Array
    text: jax.Array | None
    groups: jax.Array | None = None
    patches: jax.Array | None = None
    patch_attention: jax.Array | None = None
    words: jax.Array | None = None
    word_attention: jax.Array | None = None
    pad_mask: jax.Array | None = None
    valid: jax.Array | None = None
    bank: jax.Array | None = None
    shared: Mapping[str, Any] | None = None
    logits: jax.Array | None = None
    labels: jax.Array | None = None

    def positives(self, columns: Sequence[int]) -> jax.Array | None:
        """Group ids [b], or [b, m] of several columns; None without any."""
        chosen = [self.groups[:, column] for column in columns]
        if len(chosen) < 2:
            return chosen[0] if chosen else None
        return jnp.stack(chosen, axis=1)

    @property
    def logit_scale(self) -> jax.Array:
        """The learned factor on cosines; the step keeps it at 100 or below."""
        return jnp.exp(self.shared["logit"]["log_scale"])


class Objective(NamedTuple):
    """Total to minimise and every un-weighted term by name."""

    total: jax.Array
    terms: dict[str, jax.Array]


def objective(features: Features, losses: Mapping[str, Mapping[str, Any]], *,
              axis_name: AxisName = None, rows_axis: AxisName = None) -> Objective:
    """Sums the enabled terms.

    Args:
        features: this device's samples.
        losses: {term: {"weight": w, hyper-parameters…}}; weight 0 disables a term. `positives`
            among them is the columns of `features.groups` that make rows positives.
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
            terms[term if term not in terms else f"{name}_{term}"] = value
    return Objective(total, terms)


def diagnostics(features: Features, columns: Sequence[int], *, bank_scale: float = 1.0,
                axis_name: AxisName = None, rows_axis: AxisName = None) -> dict[str, jax.Array]:
    """Statistics of a batch for the log: hard negatives, norms, health of the bank.

    Args:
        features: this device's samples.
        columns: of `features.groups` whose equal ids are no negatives.
        bank_scale: factor on the bank's logits.
        axis_name, rows_axis: see `objective`.

    Returns:
        Scalars by name, "batch/…" of `diagnostics.BatchStatistics` and "bank/…" of `BankHealth`.
    """
    batch = batch_statistics(features.image, features.text, positives=features.positives(columns),
                             valid=features.valid, axis_name=axis_name)
    found = {f"batch/{name}": value for name, value in batch._asdict().items()}
    if features.bank is not None:
        health = bank_health(features.image, features.text, features.bank, scale=bank_scale,
                             valid=features.valid, axis_name=axis_name, rows_axis=rows_axis)
        found |= {f"bank/{name}": value for name, value in health._asdict().items()}
    return found


def _pair(pair: Any, reduction: str, names: tuple[str, str]) -> dict[str, Any]:
    """Both parts of a loss, summed or halved."""
    common.check_choice("objective", "reduction", reduction, tuple(REDUCTIONS))
    return {name: (REDUCTIONS[reduction], value)
            for name, value in zip(names, pair, strict=True)}


@register("term", "info_nce")
def info_nce_term(features: Features, *, temperature: float, negatives: str,
                  positives: Sequence[int], reduction: str, axis_name: AxisName,
                  rows_axis: AxisName) -> dict[str, Any]:
    """CLIP, MGCA's ITA: both directions of InfoNCE; temperature 0 takes the learned scale."""
    pair = info_nce(features.image, features.text,
                    temperature=temperature or 1.0 / features.logit_scale, negatives=negatives,
                    positives=features.positives(positives), valid=features.valid,
                    axis_name=axis_name)
    return _pair(pair, reduction, ("image_to_text", "text_to_image"))


@register("term", "sigmoid")
def sigmoid_term(features: Features, *, positives: Sequence[int], axis_name: AxisName,
                 rows_axis: AxisName) -> dict[str, Any]:
    """SigLIP with the learned logit scale and bias."""
    loss = sigmoid(features.image, features.text, logit_scale=features.logit_scale,
                   logit_bias=features.shared["logit"]["bias"],
                   positives=features.positives(positives), valid=features.valid,
                   axis_name=axis_name)
    return {"sigmoid": (1.0, loss)}


@register("term", "knowledge_interaction")
def knowledge_interaction_term(
        features: Features, *, contrast: float, contrast_reconstructed: float,
        reconstruction: float, temperature: float, scale: float, negatives: str,
        positives: Sequence[int], axis_name: AxisName, rows_axis: AxisName) -> dict[str, Any]:
    """BrgSA: β·InfoNCE(v, t) + γ·InfoNCE(v̂, t̂) + α·(MSE(v̂, v) + MSE(t̂, t)).

    The weights are `contrast` β, `contrast_reconstructed` γ and `reconstruction` α; temperature 0
    takes the learned scale.
    """
    result = knowledge_interaction(
        features.image, features.text, features.bank,
        temperature=temperature or 1.0 / features.logit_scale, scale=scale,
        negatives=negatives, positives=features.positives(positives),
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


@register("term", "token_alignment")
def token_alignment_term(
        features: Features, *, temperature: float, mask_padding: bool,
        normalize_patch_context: bool, bidirectional: bool, word_weights: str, patch_weights: str,
        low: float, high: float, cross_attention_heads: int, reduction: str, axis_name: AxisName,
        rows_axis: AxisName) -> dict[str, Any]:
    """MGCA's CTA; weights are the clipped CLS attention, or uniform."""
    for name, value in (("word_weights", word_weights), ("patch_weights", patch_weights)):
        common.check_choice("token_alignment", name, value, WEIGHTS)
    present = (~features.pad_mask).astype(jnp.float32)
    attention = present if word_weights == "uniform" else features.word_attention
    by_attention = patch_weights == "attention" and features.patch_attention is not None
    cross_attention = None
    if cross_attention_heads:
        cross_attention = {**features.shared["cross_attention"], "heads": cross_attention_heads}
    pair = token_alignment(
        features.patches, features.words,
        word_weights=attention_weights(attention, low=low, high=high),
        patch_weights=attention_weights(features.patch_attention, low=low, high=high)
        if by_attention else None,
        pad_mask=features.pad_mask, temperature=temperature, mask_padding=mask_padding,
        normalize_patch_context=normalize_patch_context, bidirectional=bidirectional,
        cross_attention=cross_attention, valid=features.valid, axis_name=axis_name)
    return _pair(pair, reduction, ("word", "patch"))


@register("term", "prototype_alignment")
def prototype_alignment_term(
        features: Features, *, temperature: float, epsilon: float, iterations: int, codes: str,
        normalized_gradient: bool, reduction: str, axis_name: AxisName,
        rows_axis: AxisName) -> dict[str, Any]:
    """MGCA's CPA over the learned prototypes."""
    pair = prototype_alignment(
        features.image, features.text, features.shared["prototypes"], temperature=temperature,
        epsilon=epsilon, iterations=iterations, codes=codes,
        normalized_gradient=normalized_gradient, valid=features.valid, axis_name=axis_name)
    return _pair(pair, reduction, ("prototype_image_to_text", "prototype_text_to_image"))


@register("term", "local_alignment")
def local_alignment_term(
        features: Features, *, temperatures: Sequence[float], aggregate: str, reduction: str,
        axis_name: AxisName, rows_axis: AxisName) -> dict[str, Any]:
    """GLoRIA's local loss over patches and words."""
    maps = jnp.swapaxes(features.patches, 1, 2)[..., None, None]
    pair = local_alignment(
        maps, jnp.swapaxes(features.words, 1, 2), jnp.sum(~features.pad_mask, axis=1),
        temperatures=temperatures, aggregate=aggregate, valid=features.valid,
        axis_name=axis_name)
    return _pair(pair, reduction, ("local_image_to_text", "local_text_to_image"))


@register("term", "classification")
def classification_term(features: Features, *, positive_weights: Sequence[float],
                        axis_name: AxisName, rows_axis: AxisName) -> dict[str, Any]:
    """Binary cross-entropy of the classes; without weights positives weigh as negatives do."""
    weights = jnp.asarray(positive_weights, jnp.float32) if positive_weights else None
    loss = classification(features.logits, features.labels, positive_weights=weights,
                          valid=features.valid, axis_name=axis_name)
    return {"classification": (1.0, loss)}
