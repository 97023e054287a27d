"""Optimiser: clip, Adam or AdamW, learning-rate groups by path, schedules, EMA."""

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from brgsa_jax import paths
from brgsa_jax.config import UserError, steps_of
from brgsa_jax.registry import miss

# "scale" ends the names of norms' gains and of a learned `log_scale`.
NO_DECAY = r".*(bias|scale|positions|cls)"
DECAYS = ("matrices", "all")


def learning_rate(config: Any, *, steps: int, per_epoch: int) -> Callable[[Any], jax.Array]:
    """Returns the schedule: linear warm-up, then cosine or constant (plateau).

    "cosine" warms up from `floor` and ends at it (MGCA: 1e-8), "plateau" warms up from 0.

    Args:
        config: section `optim`.
        steps: steps of the run.
        per_epoch: steps of one epoch.

    Raises:
        UserError: unknown schedule, or a warm-up that is no duration within the run.
    """
    peak = config.learning_rate
    warmup = steps_of(config.warmup, total=steps, per_epoch=per_epoch)
    if not 0 <= warmup <= steps:
        raise UserError(f"optim.warmup={config.warmup!r} is {warmup} steps, and the run has "
                        f"{steps}; take a share such as '5%'")
    if config.schedule == "cosine":
        return optax.warmup_cosine_decay_schedule(config.floor, peak, warmup,
                                                  max(steps, warmup + 1), config.floor)
    if config.schedule == "plateau":
        return optax.linear_schedule(0.0 if warmup else peak, peak, max(warmup, 1))
    raise UserError(miss("optim.schedule", config.schedule, ("cosine", "plateau")))


def frozen(config: Any, weights: Any) -> Any:
    """Tells which weights do not train: those of `optim.freeze`, and a frozen bank.

    Args:
        config: whole configuration; sections optim and model.bank are read.
        weights: tree {"params", "bank"} of arrays or shapes.

    Returns:
        A tree of bool of the same structure.

    Raises:
        UserError: a regex matches nothing, nothing is left to train, or a rule of `groups` or
            `start` is for frozen weights alone.
    """
    patterns = [*config.optim.freeze]
    if config.model.bank.frozen and weights["bank"] is not None:
        patterns.append("bank")
    # One by one: a weight that several regexes match makes none of them useless.
    found = [_match("freeze", weights, [(pattern, True)], False) for pattern in patterns]
    result = jax.tree.map(lambda _, *each: any(each), weights, *found)
    if all(jax.tree.leaves(result)):
        raise UserError(f"optim.freeze={tuple(config.optim.freeze)} leaves no weight to train; "
                        "leave out what should train")
    for key in ("groups", "start"):
        for pattern, _ in config.optim[key]:
            named = [f for path, f in paths.flat(result).items() if re.fullmatch(pattern, path)]
            if named and all(named):
                raise UserError(f"optim.{key} has a rule for {pattern!r}, and all of that is "
                                "frozen; leave out the rule, or let some of it train")
    return result


def split(config: Any, weights: Any) -> tuple[Any, Any]:
    """Parts weights into those that train and the frozen; each has None for the other's."""
    still = frozen(config, weights)
    return (jax.tree.map(lambda w, f: None if f else w, weights, still),
            jax.tree.map(lambda w, f: w if f else None, weights, still))


def join(trained: Any, still: Any) -> Any:
    """Puts together what `split` parted."""
    return jax.tree.map(lambda t, s: s if t is None else t, trained, still,
                        is_leaf=lambda leaf: leaf is None)


def _match(key: str, tree: Any, rules: Sequence[tuple[str, Any]], default: Any) -> Any:
    """Value of every leaf by the rules of `optim.KEY`, which a mistake is told to be in."""
    try:
        return paths.match(tree, rules, lambda *_: default)
    except UserError as error:
        raise UserError(f"optim.{key}: {error}") from error


def optimizer(config: Any, schedule: Callable[[Any], jax.Array], *, steps: int,
              per_epoch: int) -> optax.GradientTransformation:
    """Builds the optax chain on the tree {"params", "bank"}, None in place of frozen weights.

    "adamw" decays decoupled: matrices (not biases, norms, positions, CLS), or all weights with
    `decay` "all"; "adam" adds the decay to the gradient of everything, as the reference's coupled
    L2. Updates are multiplied by the factor of `optim.groups`. "muon" orthogonalises the momentum
    of kernels (Jordan et al. 2024) and leaves the rest, bank included, to Adam at `adam_share` of
    the learning rate; it decays kernels, or all weights with `decay` "all".

    Weights of `optim.start` are not touched before their step, as if they had no gradient: no
    update, decay, moment or share in the clipped norm. Then their moments and bias correction
    start as new, at the learning rate of the run's step.

    Args:
        config: section `optim`.
        schedule: step -> learning rate.
        steps: steps of the run, for durations.
        per_epoch: steps of one epoch, for durations.

    Raises:
        UserError: unknown optimiser or decay, or a start that is no duration; from the chain's
            `init`, a regex of `start` or `groups` that matches nothing.
    """
    if config.decay not in DECAYS:
        raise UserError(miss("optim.decay", config.decay, DECAYS))
    starts = [(pattern, steps_of(duration, total=steps, per_epoch=per_epoch))
              for pattern, duration in config.start]
    chain = []
    if config.clip:
        if starts:
            chain.append(_withhold(starts))
        chain.append(optax.clip_by_global_norm(config.clip))
    if starts:
        labels = [(pattern, str(first)) for pattern, first in starts]
        rules = {first: optax.chain(*_rule(config, schedule, first))
                 for first in {0, *(first for _, first in starts)}}
        chain.append(optax.partition(
            {str(first): _from_step(first, rule) if first else rule
             for first, rule in rules.items()},
            lambda tree: _match("start", tree, labels, "0")))
    else:
        chain += _rule(config, schedule)
    if config.groups:
        chain.append(_scale_groups(config.groups))
    return optax.chain(*chain)


def _rule(config: Any, schedule: Callable[[Any], jax.Array],
          first: int = 0) -> list[optax.GradientTransformation]:
    """The chain that updates weights whose own updates begin at step `first` of the run."""
    beta1, beta2 = config.betas

    def rate(count: Any) -> jax.Array:
        return schedule(count + first)

    adam = optax.scale_by_adam(beta1, beta2)
    decay = []
    if config.name == "muon":
        return [optax.contrib.muon(
            rate, weight_decay=config.weight_decay, adam_b1=beta1, adam_b2=beta2,
            adam_weight_decay=config.weight_decay if config.decay == "all" else 0.0,
            adam_learning_rate=lambda count: config.adam_share * rate(count),
            muon_weight_dimension_numbers=_kernels)]
    if config.weight_decay:
        masked = config.name == "adamw" and config.decay == "matrices"
        decay = [optax.add_decayed_weights(config.weight_decay, _decays if masked else None)]
    if config.name == "adam":
        return [*decay, adam, optax.scale_by_learning_rate(rate)]
    if config.name == "adamw":
        return [adam, *decay, optax.scale_by_learning_rate(rate)]
    raise UserError(miss("optim.name", config.name, ("adam", "adamw", "muon")))


class Delayed(NamedTuple):
    """State of a rule that begins later.

    Attributes:
        count: int32, steps of the run so far.
        inner: the rule's own state, as new until it begins.
    """

    count: jax.Array
    inner: Any


def _from_step(first: int, rule: optax.GradientTransformation) -> optax.GradientTransformation:
    """Lets a rule act, and its state change, from step `first` on."""
    def init(params: Any) -> Delayed:
        return Delayed(jnp.zeros((), jnp.int32), rule.init(params))

    def update(updates: Any, state: Delayed, params: Any = None) -> tuple[Any, Delayed]:
        begun = state.count >= first
        updates, inner = rule.update(updates, state.inner, params)
        # Selected rather than branched: a branch makes a GPU's host wait for the count.
        return (jax.tree.map(lambda u: jnp.where(begun, u, 0), updates),
                Delayed(optax.safe_increment(state.count),
                        jax.tree.map(lambda new, old: jnp.where(begun, new, old), inner,
                                     state.inner)))

    return optax.GradientTransformation(init, update)


def _withhold(starts: Sequence[tuple[str, int]]) -> optax.GradientTransformation:
    """Zeroes the gradients of weights that have not started, which keeps them out of the norm."""
    def update(updates: Any, count: jax.Array, params: Any = None) -> tuple[Any, jax.Array]:
        firsts = _match("start", updates, starts, 0)
        held = jax.tree.map(lambda u, first: jnp.where(count >= first, u, 0) if first else u,
                            updates, firsts)
        return held, optax.safe_increment(count)

    return optax.GradientTransformation(lambda _: jnp.zeros((), jnp.int32), update)


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
    def init(params: Any) -> optax.EmptyState:
        # A rule that matches nothing is told before anything is compiled.
        _match("groups", params, groups, 1.0)
        return optax.EmptyState()

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        factors = _match("groups", updates, groups, 1.0)
        return jax.tree.map(lambda u, f: u * f, updates, factors), state

    return optax.GradientTransformation(init, update)


def ema_update(average: Any, value: Any, decay: float, step: jax.Array) -> Any:
    """Moves a float32 average towards `value`; the decay warms up as (1 + t) / (10 + t)."""
    decay = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    return jax.tree.map(lambda a, v: a + (1.0 - decay) * (v.astype(a.dtype) - a), average, value)
