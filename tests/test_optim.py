"""Schedules, decay and delayed weights of the optimiser, against formulas and fresh optimisers."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from brgsa_jax import paths
from brgsa_jax.config import UserError
from brgsa_jax.train import optim

KERNEL, BIAS, LOG_SCALE = "params/head/kernel", "params/head/bias", "params/log_scale"
PROTOTYPES, CLS = "params/prototypes", "params/cls"


def section(**changes):
    values = {"name": "adamw", "learning_rate": 1e-2, "betas": (0.9, 0.999), "adam_share": 0.2,
              "weight_decay": 0.05, "decay": "matrices", "clip": 0.0, "schedule": "cosine",
              "floor": 0.0, "warmup": 0, "groups": (), "start": (), "freeze": ()}
    return types.SimpleNamespace(**{**values, **changes})


def make(schedule=lambda step: 0.01, *, steps=20, per_epoch=3, **changes):
    return optim.optimizer(section(**changes), schedule, steps=steps, per_epoch=per_epoch)


def weights(seed=0, bank=True):
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    return {"params": {"head": {"kernel": normal(4, 3), "bias": normal(3)},
                       "prototypes": normal(5, 3), "cls": normal(1, 3), "log_scale": normal()},
            "bank": normal(6, 3) if bank else None}


def run(tx, tree, gradients):
    """Weights by path after every step, and the last state."""
    @jax.jit
    def step(tree, state, gradient):
        updates, state = tx.update(gradient, state, tree)
        return optax.apply_updates(tree, updates), state

    state, history = tx.init(tree), []
    for gradient in gradients:
        tree, state = step(tree, state, gradient)
        history.append(paths.flat(jax.device_get(tree)))
    return history, state


def test_the_cosine_schedule_is_mgcas():
    floor, peak, total = 1e-8, 2e-5, 50
    schedule = optim.learning_rate(section(learning_rate=peak, floor=floor, warmup="40%"),
                                   steps=total, per_epoch=5)
    t, warm = np.arange(total + 1), 0.4 * total
    expected = np.where(t < warm, floor + (peak - floor) * t / warm,
                        floor + (peak - floor) * (1 + np.cos(np.pi * (t - warm) / (total - warm)))
                        / 2)
    # The cosine's rounding error is a share of the peak: far below the floor.
    np.testing.assert_allclose(jax.vmap(schedule)(t), expected, rtol=1e-6, atol=1e-6 * peak)
    assert expected[0] == expected[-1] == floor


def test_without_a_floor_the_schedule_starts_and_ends_at_nothing():
    schedule = optim.learning_rate(section(warmup=4), steps=10, per_epoch=5)
    np.testing.assert_allclose([schedule(0), schedule(4), schedule(10)], [0, 1e-2, 0], atol=1e-9)


@pytest.mark.parametrize("name, decay, decayed", [
    ("adamw", "matrices", {KERNEL, PROTOTYPES, "bank"}),
    ("adamw", "all", {KERNEL, BIAS, LOG_SCALE, PROTOTYPES, CLS, "bank"}),
    ("muon", "matrices", {KERNEL})])
def test_decoupled_decay_shrinks_what_it_should(name, decay, decayed):
    tree = weights()
    nothing = jax.tree.map(jnp.zeros_like, tree)
    (after,), _ = run(make(name=name, decay=decay, weight_decay=0.5), tree, [nothing])
    for path, value in paths.flat(tree).items():
        factor = 1 - 0.01 * 0.5 if path in decayed else 1
        np.testing.assert_allclose(after[path], factor * value, rtol=1e-6, err_msg=path)


def test_muon_decays_all_at_each_parts_own_learning_rate():
    tree = weights()
    nothing = jax.tree.map(jnp.zeros_like, tree)
    (after,), _ = run(make(name="muon", decay="all", weight_decay=0.5), tree, [nothing])
    for path, value in paths.flat(tree).items():
        rate = 0.01 if path == KERNEL else 0.2 * 0.01
        np.testing.assert_allclose(after[path], (1 - rate * 0.5) * value, rtol=1e-6, err_msg=path)


@pytest.mark.parametrize("decay", ["matrices", "all"])
def test_adams_decay_is_coupled_and_of_everything(decay):
    tree = weights()
    nothing = jax.tree.map(jnp.zeros_like, tree)
    (after,), _ = run(make(name="adam", decay=decay), tree, [nothing])
    for path, value in paths.flat(tree).items():
        # A first Adam step has the size of the learning rate and the sign of the gradient.
        np.testing.assert_allclose(after[path], value - 0.01 * np.sign(value), rtol=1e-4,
                                   err_msg=path)


def rate(step):
    return 0.01 / (1.0 + step)


@pytest.mark.parametrize("bank", [True, False])
@pytest.mark.parametrize("name", ["adam", "adamw", "muon"])
def test_delayed_weights_equal_a_fresh_optimiser_and_leave_the_others_alone(name, bank):
    tree = weights(bank=bank)
    gradients = [weights(seed, bank) for seed in range(1, 9)]
    starts = ((PROTOTYPES, "1epochs"), ("params/head/.*", 5), ("params/cls", 0))
    delayed, _ = run(make(rate, name=name, decay="all", start=starts), tree, gradients)
    plain, _ = run(make(rate, name=name, decay="all"), tree, gradients)
    for first, names in ((3, [PROTOTYPES]), (5, [KERNEL, BIAS])):
        fresh, _ = run(make(lambda step, first=first: rate(step + first), name=name, decay="all"),
                       tree, gradients[first:])
        for path in names:
            for step in range(first):
                np.testing.assert_array_equal(delayed[step][path], paths.flat(tree)[path])
            for step, expected in enumerate(fresh):
                np.testing.assert_allclose(delayed[first + step][path], expected[path], rtol=1e-6,
                                           atol=1e-7, err_msg=f"{path} {step}")
            assert np.abs(delayed[-1][path] - plain[-1][path]).max() > 1e-4
    others = set(paths.flat(tree)) - {PROTOTYPES, KERNEL, BIAS}
    assert others == {CLS, LOG_SCALE} | ({"bank"} if bank else set())
    for step, expected in enumerate(plain):
        for path in others:
            np.testing.assert_allclose(delayed[step][path], expected[path], rtol=1e-6, atol=1e-7)


def test_moments_and_their_count_wait_too():
    tx = make(start=((PROTOTYPES, "1epochs"),), clip=1.0)
    for steps in (2, 3, 4):
        _, state = run(tx, weights(), [weights(seed) for seed in range(1, steps + 1)])
        own = {path: np.abs(leaf).max() for path, leaf in paths.flat(state).items()
               if "/inner_states/3/" in path and "/inner/" in path}
        assert sum(path.endswith(PROTOTYPES) for path in own) == 2
        assert {path for path in own if not path.endswith(PROTOTYPES)} and len(own) == 4
        assert all((value > 0) == (steps > 3) for value in own.values()), own


def test_a_delayed_weights_gradient_is_not_in_the_norm_until_it_starts():
    tree = weights()
    gradients = [weights(seed) for seed in range(1, 5)]
    for gradient in gradients:
        gradient["params"]["prototypes"] *= jnp.inf
    gradients[3]["params"]["prototypes"] = jnp.full((5, 3), 100.0)
    tx = make(start=((PROTOTYPES, 3),), clip=0.5)
    without = [{**g, "params": {k: v for k, v in g["params"].items() if k != "prototypes"}}
               for g in gradients]
    alone = {**tree, "params": {k: v for k, v in tree["params"].items() if k != "prototypes"}}
    delayed, _ = run(tx, tree, gradients)
    expected, state = run(make(clip=0.5), alone, without)
    for step in range(3):
        for path, value in expected[step].items():
            np.testing.assert_allclose(delayed[step][path], value, rtol=1e-6, atol=1e-7)
        np.testing.assert_array_equal(delayed[step][PROTOTYPES], tree["params"]["prototypes"])
    # The fourth step's prototypes outweigh the rest: clipping leaves the rest nearly nothing.
    assert np.isfinite(delayed[3][PROTOTYPES]).all()
    assert np.abs(delayed[3][KERNEL] - expected[3][KERNEL]).max() > 1e-4


@pytest.mark.parametrize("name", ["adam", "adamw", "muon"])
@pytest.mark.parametrize("start", [(), ((PROTOTYPES, 3), ("bank", 4))])
def test_every_moment_ends_with_its_weights_path(name, start):
    tree = weights()
    state = paths.flat(jax.eval_shape(make(name=name, start=start, clip=1.0).init, tree))
    for path, weight in paths.flat(tree).items():
        own = [leaf for key, leaf in state.items() if key.endswith(f"/{path}")]
        assert len(own) == (1 if name == "muon" and path == KERNEL else 2), path
        assert {leaf.shape for leaf in own} == {weight.shape}
    rest = {key: leaf for key, leaf in state.items() if not key.endswith(tuple(paths.flat(tree)))}
    for key, leaf in rest.items():
        assert leaf.shape == () or key.endswith("ns_coeffs"), key


@pytest.mark.parametrize("start", [(), ((PROTOTYPES, 2),)])
@pytest.mark.parametrize("name", ["adam", "adamw", "muon"])
def test_learning_rate_groups_are_factors_of_every_optimisers_updates(name, start):
    """Without decay no update depends on the weights, so that factors carry over many steps."""
    tree, gradients = weights(), [weights(seed) for seed in range(1, 5)]
    options = {"name": name, "start": start, "weight_decay": 0.0}
    groups = ((".*/kernel", 0.5), ("params/(prototypes|head/.*)", 0.25), (CLS, 0.0))
    full, _ = run(make(**options), tree, gradients)
    scaled, _ = run(make(groups=groups, **options), tree, gradients)
    for path, factor in ((KERNEL, 0.5), (BIAS, 0.25), (PROTOTYPES, 0.25), (CLS, 0.0),
                         (LOG_SCALE, 1.0), ("bank", 1.0)):
        before = paths.flat(tree)[path]
        assert np.abs(full[-1][path] - before).max() > 1e-4
        np.testing.assert_allclose(scaled[-1][path] - before, factor * (full[-1][path] - before),
                                   rtol=1e-5, atol=1e-6, err_msg=path)


def whole(bank_frozen=False, **changes):
    """A configuration as far as `optim.frozen` reads it."""
    return ConfigDict({"optim": vars(section(**changes)), "model": {"bank": {
        "frozen": bank_frozen}}})


FREEZE = ("params/head/.*", ".*/log_scale", "params/prototypes")


@pytest.mark.parametrize("options", [{}, {"start": ((CLS, 2),), "groups": (("bank", 0.5),)}])
@pytest.mark.parametrize("name", ["adam", "adamw", "muon"])
def test_the_optimiser_of_the_rest_never_sees_frozen_weights(name, options):
    """Neither in moments nor in the clipped norm: as if there were no such weights."""
    tree, gradients = weights(), [weights(seed) for seed in range(1, 5)]
    alone, *others = [{"params": {"cls": t["params"]["cls"]}, "bank": t["bank"]}
                      for t in (tree, *gradients)]
    config = whole(freeze=FREEZE, name=name, **options)
    trained, still = optim.split(config, tree)
    assert set(paths.flat(trained)) == {CLS, "bank"}
    assert set(paths.flat(still)) == {KERNEL, BIAS, LOG_SCALE, PROTOTYPES}
    for path, value in paths.flat(optim.join(trained, still)).items():
        assert value is paths.flat(tree)[path]
    tx = make(name=name, decay="all", clip=0.5, **options)
    ours, state = run(tx, trained, [optim.split(config, g)[0] for g in gradients])
    expected, other = run(tx, alone, others)
    for a, b in zip(ours, expected, strict=True):
        assert set(a) == set(b) and all((a[path] == b[path]).all() for path in a)
    assert set(paths.flat(state)) == set(paths.flat(other))
    moments = [path for path in paths.flat(state) if path.endswith((f"/{CLS}", "/bank"))]
    assert len(moments) == 4


def test_a_frozen_bank_is_one_more_frozen_weight():
    for bank, freeze in ((True, ()), (False, ("bank",)), (True, ("bank",)), (True, (".*bank", ))):
        trained, still = optim.split(whole(bank, freeze=freeze), weights())
        assert list(paths.flat(still)) == ["bank"] and trained["bank"] is None
    trained, still = optim.split(whole(True), weights(bank=False))
    assert not paths.flat(still) and set(paths.flat(trained)) == set(paths.flat(weights(
        bank=False)))


@pytest.mark.parametrize(("changes", "message"), [
    ({"freeze": (BIAS, "params/txt/.*")}, "optim.freeze: .*'params/txt/.*' matches no parameter"),
    ({"freeze": ("params",)}, "'params' matches no parameter"),
    ({"freeze": (".*", "bank")}, "leaves no weight to train"),
    ({"freeze": ("params/.*",), "bank_frozen": True}, "leaves no weight to train"),
    ({"freeze": FREEZE, "groups": (("params/head/bias", 0.1),)},
     "optim.groups has a rule for 'params/head/bias', and all of that is frozen"),
    ({"bank_frozen": True, "start": (("bank", 3),)}, "optim.start has a rule for 'bank'")])
def test_freezing_that_cannot_be_meant_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        optim.split(whole(**changes), weights())


def test_overlapping_regexes_freeze_together():
    config = whole(freeze=("params/.*", BIAS), groups=((".*", 0.5),))
    assert list(paths.flat(optim.split(config, weights())[0])) == ["bank"]


@pytest.mark.parametrize("schedule", ["cosine", "plateau"])
@pytest.mark.parametrize(("warmup", "steps"), [("120%", 20), (21, 20), ("3epochs", 14), (-1, 20)])
def test_a_warm_up_outside_the_run_is_refused(schedule, warmup, steps):
    with pytest.raises(UserError, match=f"optim.warmup={warmup!r} is -?[0-9]+ steps, and the run "
                                        f"has {steps}"):
        optim.learning_rate(section(warmup=warmup, schedule=schedule), steps=steps, per_epoch=5)


def test_a_warm_up_may_last_the_whole_run():
    for warmup in ("100%", 20, "4epochs"):
        schedule = optim.learning_rate(section(warmup=warmup), steps=20, per_epoch=5)
        np.testing.assert_allclose([schedule(0), schedule(10), schedule(20)], [0, 5e-3, 1e-2],
                                   atol=1e-9)


def test_wrong_wishes_are_explained():
    with pytest.raises(UserError, match="optim.decay 'matrix'; did you mean 'matrices'"):
        make(decay="matrix")
    with pytest.raises(UserError, match="did you mean 'adamw'"):
        make(name="adamww", start=((PROTOTYPES, 3),))
    with pytest.raises(UserError, match="'soon' is not understood"):
        make(start=((PROTOTYPES, "soon"),))
    with pytest.raises(UserError, match="'params/prototype' matches no parameter"):
        make(start=(("params/prototype", 3),)).init(weights())
    with pytest.raises(UserError, match="optim.groups: .*'params/prototype' matches no parameter"):
        make(groups=(("params/prototype", 0.5),)).init(weights())
