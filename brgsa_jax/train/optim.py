"""Optimiser: clip, Adam or AdamW, learning-rate groups by path, schedules, EMA."""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from brgsa_jax import paths
from brgsa_jax.config import UserError, steps_of
from brgsa_jax.registry import miss

NO_DECAY = r".*(bias|scale|positions|cls)"


def learning_rate(config: Any, *, steps: int, per_epoch: int) -> Callable[[Any], jax.Array]:
    """Returns the schedule: linear warm-up from 0, then cosine to 0 or constant (plateau).

    Args:
        config: section `optim`.
        steps: steps of the run.
        per_epoch: steps of one epoch.

    Raises:
        UserError: unknown schedule, or a warm-up that is not a duration.
    """
    peak = config.learning_rate
    warmup = steps_of(config.warmup, total=steps, per_epoch=per_epoch)
    if config.schedule == "cosine":
        return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, max(steps, warmup + 1))
    if config.schedule == "plateau":
        return optax.linear_schedule(0.0 if warmup else peak, peak, max(warmup, 1))
    raise UserError(miss("optim.schedule", config.schedule, ("cosine", "plateau")))


def optimizer(config: Any, schedule: Callable[[Any], jax.Array]) -> optax.GradientTransformation:
    """Builds the optax chain on the tree {"params", "bank"}.

    "adamw" decays matrices decoupled (not biases, norms, positions, CLS); "adam" adds the decay
    to the gradient of everything, as the reference's coupled L2. Updates are multiplied by the
    factor of `optim.groups`; 0 freezes. "muon" orthogonalises the momentum of kernels (Jordan et
    al. 2024) and leaves the rest, bank included, to Adam at `adam_share` of the learning rate.

    Raises:
        UserError: unknown optimiser, or a group whose regex matches nothing.
    """
    beta1, beta2 = config.betas
    steps = [optax.clip_by_global_norm(config.clip)] if config.clip else []
    if config.name == "adam":
        if config.weight_decay:
            steps.append(optax.add_decayed_weights(config.weight_decay))
        steps.append(optax.scale_by_adam(beta1, beta2))
    elif config.name == "adamw":
        steps.append(optax.scale_by_adam(beta1, beta2))
        if config.weight_decay:
            steps.append(optax.add_decayed_weights(config.weight_decay, _decays))
    elif config.name == "muon":
        steps.append(optax.contrib.muon(
            schedule, weight_decay=config.weight_decay, adam_b1=beta1, adam_b2=beta2,
            adam_learning_rate=lambda step: config.adam_share * schedule(step),
            muon_weight_dimension_numbers=_kernels))
    else:
        raise UserError(miss("optim.name", config.name, ("adam", "adamw", "muon")))
    if config.name != "muon":
        steps.append(optax.scale_by_learning_rate(schedule))
    if config.groups:
        steps.append(_scale_groups(config.groups))
    return optax.chain(*steps)


def _kernels(tree: Any) -> Any:
    """Muon's view of the weights: kernels [in, out] or [layer, in, out]; None for the rest."""
    def numbers(path: str, leaf: Any) -> Any:
        if not path.endswith("kernel"):
            return None
        return optax.contrib.MuonDimensionNumbers(leaf.ndim - 2, leaf.ndim - 1)

    return paths.map_with_path(numbers, tree)


def _decays(tree: Any) -> Any:
    skip = re.compile(NO_DECAY)
    return paths.map_with_path(lambda path, _: not skip.fullmatch(path), tree)


def _scale_groups(groups: Any) -> optax.GradientTransformation:
    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        factors = paths.match(updates, groups, lambda *_: 1.0)
        return jax.tree.map(lambda u, f: u * f, updates, factors), state

    return optax.GradientTransformation(lambda _: optax.EmptyState(), update)


def ema_update(average: Any, value: Any, decay: float, step: jax.Array) -> Any:
    """Moves a float32 average towards `value`; the decay warms up as (1 + t) / (10 + t)."""
    decay = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    return jax.tree.map(lambda a, v: a + (1.0 - decay) * (v.astype(a.dtype) - a), average, value)
