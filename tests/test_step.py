"""The jitted step on a mesh: equality with one device, real sharding, what each switch does."""

import drawn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from test_model import small, small_radiographs

from brgsa_jax import mesh as meshes
from brgsa_jax import model as models
from brgsa_jax import paths
from brgsa_jax.config import UserError, get_config
from brgsa_jax.network import Towers, build
from brgsa_jax.train import step as steps
from brgsa_jax.train.checkpoint import Checkpointer


def make_batch(config, seed=0):
    rng = np.random.default_rng(seed)
    size, length = config.data.batch_size, config.model.text.max_tokens
    mask = (np.arange(length)[None] < rng.integers(3, length, size)[:, None]).astype("i4")
    # Every third token of a text continues the word before it.
    words = np.cumsum(np.arange(length) % 3 != 2) - 1
    return steps.Batch(
        rng.integers(-1000, 1000, (size, *config.data.crop)).astype("i2"),
        rng.integers(1, 100, (size, length)).astype("i4") * mask, mask,
        np.where(mask, words[None], -1).astype("i4"),
        np.stack([np.arange(size, dtype="i4") // 2] * 3, axis=1))


def training_on(config, data, fsdp, count):
    mesh = meshes.make_mesh(data, fsdp, jax.devices()[:count])
    return steps.make_training(config, mesh, per_epoch=10)


MESHES = {"1": (1, 1, 1), "8": (8, 1, 8), "4x2": (4, 2, 8)}


@pytest.fixture(scope="module")
def runs():
    """Weights and metrics after one and three steps on three meshes."""
    config = small(**{"optim.ema": 0.9, "mesh.rules": ((".*/query/kernel", (None, None, "fsdp")),)})
    results = {}
    for name, (data, fsdp, count) in MESHES.items():
        training = training_on(config, data, fsdp, count)
        state, history = training.init(0), []
        first = jax.device_get(state.weights)
        for index in range(3):
            state, metrics = training.train_step(state, make_batch(config, index))
            history.append({k: float(v) for k, v in metrics.items()})
        results[name] = (first, jax.device_get(state.weights), history, state)
    return results


@pytest.mark.parametrize("mesh", ["8", "4x2"])
def test_devices_do_not_change_the_run(runs, mesh):
    for key, value in runs["1"][2][0].items():
        np.testing.assert_allclose(runs[mesh][2][0][key], value, rtol=1e-5, err_msg=key)
    one, many = (paths.flat(runs[name][1]) for name in ("1", mesh))
    for name, value in one.items():
        # Nothing depends on what is added to all keys: Adam blows the rounding of zero up.
        if not name.endswith("key/bias"):
            np.testing.assert_allclose(many[name], value, atol=1e-6, err_msg=name)
    one, many = (moments_of(runs[name][3]) for name in ("1", mesh))
    for name, value in one.items():
        assert np.abs(many[name] - value).max() <= 1e-5 * np.abs(value).max() + 1e-9, name


def moments_of(state):
    """Averages of the gradients by path."""
    return {name: np.asarray(leaf) for name, leaf in paths.flat(state.opt).items()
            if "/mu/" in name}


RECIPES = ("brgsa", "clip", "siglip", "mgca", "brgsa_mgca")


@pytest.fixture(scope="module", params=RECIPES)
def objective_of(request):
    """Objective, diagnostics and gradients by mesh, of random features and learned extras."""
    config = small(request.param, **{"data.sentences": 2})
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), "f4")  # noqa: E731
    pad = jnp.arange(5)[None] >= jnp.asarray(rng.integers(2, 6, 16))[:, None]
    towers = Towers(normal(16, 48), normal(16, 48))
    if config.model.local_head.name:
        towers = towers._replace(patches=normal(16, 8, 48), words=normal(16, 5, 48), pad_mask=pad,
                                 patch_attention=jnp.abs(normal(16, 8)),
                                 word_attention=jnp.where(pad, 0, jnp.abs(normal(16, 5))))
    extras = {name: make(jax.random.key(1)) for name, make in
              build(config.model).extras.items()}
    bank = normal(64, 48) if config.model.bank.rows else None
    groups = jnp.stack([jnp.arange(16) // 2, jnp.arange(16) // 4, jnp.zeros(16, int)], axis=1)

    def evaluate(sizes):
        mesh = meshes.make_mesh(*sizes[:2], jax.devices()[:sizes[2]])
        judge = steps.judge(config, mesh)

        def total(image, text, patches, words, bank, extras):
            mine = towers._replace(image=image, text=text, patches=patches, words=words)
            judged = judge(mine, groups, bank, extras)
            return judged.objective.total, judged.diagnostics

        smooth = (towers.image, towers.text, towers.patches, towers.words, bank, extras)
        return jax.device_get(jax.jit(jax.value_and_grad(total, argnums=range(6), has_aux=True))(
            *smooth))

    return {name: evaluate(sizes) for name, sizes in MESHES.items()}


@pytest.mark.parametrize("mesh", ["8", "4x2"])
def test_objective_and_gradients_of_every_recipe_equal_one_device(objective_of, mesh):
    ((one, found), one_grads), ((many, others), many_grads) = objective_of["1"], objective_of[mesh]
    np.testing.assert_allclose(many, one, rtol=1e-6)
    for a, b in zip(jax.tree.leaves(one_grads), jax.tree.leaves(many_grads), strict=True):
        assert np.abs(a - b).max() <= 5e-6 * np.abs(a).max()
    for name, value in found.items():
        np.testing.assert_allclose(others[name], value, rtol=1e-5, atol=1e-6, err_msg=name)


def test_bank_rows_and_optimiser_moments_are_really_sharded(runs):
    state = runs["4x2"][3]
    assert state.bank.sharding.spec == P(("data", "fsdp"))
    assert {shard.data.shape for shard in state.bank.addressable_shards} == {(8, 48)}
    rows = {shard.index[0].start or 0 for shard in state.bank.addressable_shards}
    assert rows == set(range(0, 64, 8))
    moments = [leaf for name, leaf in paths.flat(state.opt).items() if name.endswith("/bank")]
    assert len(moments) == 2
    for moment in (*moments, state.ema["bank"]):
        assert {shard.data.shape for shard in moment.addressable_shards} == {(8, 48)}
    kernel = state.params["vision"]["layers"]["blocks"]["query"]["kernel"]
    assert kernel.sharding.spec == P(None, None, "fsdp")
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(2, 48, 24)}


def test_training_moves_weights_bank_and_average(runs):
    first, last, history, state = runs["1"]
    after = paths.flat(last)
    moved = {name: np.abs(a - after[name]).max() for name, a in paths.flat(first).items()}
    still = [name for name, change in moved.items() if change == 0]
    # A softmax ignores what is added to all keys' logits.
    assert all(name.endswith("key/bias") for name in still), still
    average = paths.flat(jax.device_get(state.ema))
    assert any(np.abs(average[name] - value).max() > 0 for name, value in paths.flat(last).items())
    assert {"loss", "grad_norm", "learning_rate", "mse_image"} <= set(history[0])


@pytest.mark.parametrize("name", ["adam", "adamw", "muon"])
def test_every_optimiser_keeps_its_moments_where_the_weights_are(name):
    config = small(**{"optim.name": name, "mesh.rules": ((".*/query/kernel",
                                                          (None, None, "fsdp")),)})
    training = training_on(config, 4, 2, 8)
    opt = paths.flat(training.abstract.opt)
    for ending, spec in (("/bank", P(("data", "fsdp"))),
                         ("query/kernel", P(None, None, "fsdp"))):
        found = [leaf.sharding.spec for path, leaf in opt.items() if path.endswith(ending)]
        assert found and set(found) == {spec}, (ending, found)


def test_total_is_the_weighted_sum_of_its_terms(runs):
    row = runs["1"][2][0]
    expected = (row["image_to_text"] + row["text_to_image"] + row["image_to_text_bridged"]
                + row["text_to_image_bridged"] + 0.5 * (row["mse_image"] + row["mse_text"]))
    np.testing.assert_allclose(row["loss"], expected, rtol=1e-6)


def test_frozen_bank_and_frozen_group_stay_where_they_are():
    config = small(**{"model.bank.frozen": True, "optim.groups": (("params/text/.*", 0.0),),
                      "optim.warmup": 0})
    training = training_on(config, 1, 1, 1)
    state = drawn.state(training)
    before = jax.device_get(state.weights)
    state, _ = training.train_step(state, make_batch(config))
    after = jax.device_get(state.weights)
    np.testing.assert_array_equal(after["bank"], before["bank"])
    for a, b in zip(jax.tree.leaves(after["params"]["text"]),
                    jax.tree.leaves(before["params"]["text"]), strict=True):
        np.testing.assert_array_equal(a, b)
    assert np.any(after["params"]["vision"]["cls"] != before["params"]["vision"]["cls"]) or \
        np.any(after["params"]["vision"]["norm"]["scale"]
               != before["params"]["vision"]["norm"]["scale"])
    assert not [path for path in paths.flat(state.opt) if path.endswith("/bank")]


FREEZE = ("params/text/.*", "params/text_head/.*", "params/vision_head/out/.*",
          "params/prototypes", ".*/log_scale")
STILL = ("params/text/", "params/text_head/", "params/vision_head/out/", "params/prototypes",
         "params/logit/log_scale", "stats/text_head/")
MODES = {"mesh": (2, 2, {"mesh.rules": ((".*/query/kernel", (None, None, "fsdp")),)}),
         "pmap in chunks": (2, 1, {"train.parallel": "pmap", "train.microbatch": 2})}


def partly_frozen(**changes):
    return small("brgsa_mgca", **{
        "model.head.name": "batchnorm", "model.local_head.name": "", "model.vision.depth": 1,
        "losses.token_alignment.weight": 0.0, "optim.warmup": 0,
        # Above what the step allows a scale that trains.
        "model.logit.scale": 4 * steps.LARGEST_SCALE,
        "optim.learning_rate": 1e-3, "optim.ema": 0.9, "optim.freeze": FREEZE, **changes})


def two_steps(config, data=1, fsdp=1, count=1):
    """The states before and after two steps from drawn weights and statistics, and metrics."""
    training = training_on(config, data, fsdp, count)
    model = drawn.weights(training.abstract.model)
    model["params"]["logit"]["log_scale"] = np.log(np.float32(config.model.logit.scale))
    state = drawn.state(training, model)
    start, step, history = jax.device_get(state), None, []
    for index in range(2):
        batch = training.place(make_batch(config, index))
        # As the trainer; called as it is, a pmapped step would be compiled for its own output too.
        step = step or training.train_step.lower(state, batch).compile()
        state, metrics = step(state, batch)
        history.append({name: float(value) for name, value in metrics.items()})
    return start, jax.device_get(state), history


@pytest.fixture(scope="module")
def on_one_device():
    return two_steps(partly_frozen())


@pytest.mark.parametrize("mode", MODES)
def test_frozen_weights_stay_bit_for_bit_and_the_rest_moves(on_one_device, mode):
    data, fsdp, changes = MODES[mode]
    start, state, history = two_steps(partly_frozen(**changes), data, fsdp, data * fsdp)
    before, after, average = (paths.flat(tree) for tree in (start.model, state.model, state.ema))
    for name, value in before.items():
        moved = bool((after[name] != value).any())
        if name.startswith(STILL):
            assert not moved and (average[name] == value).all(), name
        else:
            # What is added to all keys, or before a batch normalisation, cancels.
            assert moved or name.endswith("bias"), name
    moments = [name.partition("/nu/")[2] for name in paths.flat(state.opt) if "/nu/" in name]
    assert set(moments) == {name for name in before if not name.startswith((*STILL, "stats/"))}
    for mine, row in zip(history, on_one_device[2], strict=True):
        for name, value in row.items():
            np.testing.assert_allclose(mine[name], value, rtol=1e-4, atol=1e-5, err_msg=name)


def test_frozen_weights_are_out_of_both_norms():
    """Gradients of the rest are as with nothing frozen; they alone are clipped together."""
    runs = {}
    for name, freeze, clip in (("free", (), 0.0), ("frozen", ("params/text/.*",), 0.1)):
        config = small("clip", **{"optim.freeze": freeze, "optim.clip": clip,
                                  "model.vision.depth": 1})
        training = training_on(config, 1, 1, 1)
        state, metrics = training.train_step(drawn.state(training), make_batch(config))
        # The first moment after a first step is a tenth of the clipped gradient.
        gradients = {path.partition("/mu/")[2]: 10 * np.asarray(leaf)
                     for path, leaf in paths.flat(state.opt).items() if "/mu/" in path}
        runs[name] = gradients, {key: float(value) for key, value in metrics.items()}
    (free, free_metrics), (frozen, metrics) = runs["free"], runs["frozen"]
    assert set(free) - set(frozen) == {name for name in free if name.startswith("params/text/")}
    np.testing.assert_allclose(metrics["loss"], free_metrics["loss"], rtol=1e-6)
    norm = np.sqrt(sum((free[name] ** 2).sum() for name in frozen))
    assert norm < 0.99 * free_metrics["grad_norm"]
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-5)
    for name, value in frozen.items():
        np.testing.assert_allclose(value, free[name] * 0.1 / norm, rtol=1e-3, atol=1e-6,
                                   err_msg=name)


def test_a_part_frozen_whole_runs_as_at_inference_and_in_chunks():
    """A small ResNet with batch statistics, which otherwise could not be chunked."""
    changes = {"train.microbatch": 2, "model.local_head.name": "", "optim.warmup": 0,
               "losses.token_alignment.weight": 0.0}
    with pytest.raises(UserError, match="train.microbatch cannot chunk"):
        training_on(small_radiographs("resnet50", **{
            **changes, "optim.freeze": ("params/vision/stem/.*",)}), 2, 1, 2)
    config = small_radiographs("resnet50", **{
        **changes, "optim.freeze": ("params/vision/.*", "params/.*_head/.*")})
    training = training_on(config, 2, 1, 2)
    state = drawn.state(training)
    batch = training.place(make_batch(config))
    stats, text = jax.device_get((state.stats, state.params["text"]))
    loss = float(training.eval_step(state, batch)["loss"])
    state, metrics = training.train_step(state, batch)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-6)
    for a, b in zip(*map(jax.tree.leaves, (stats, jax.device_get(state.stats))), strict=True):
        np.testing.assert_array_equal(a, b)
    assert (state.params["text"]["norm"]["scale"] != text["norm"]["scale"]).any()


@pytest.mark.parametrize(("devices", "changes"), [(1, {}), (2, {"train.microbatch": 2})])
def test_a_frozen_tower_costs_no_backward_pass(devices, changes):
    flops = {}
    for name, freeze in (("all", ()), ("text", ("params/vision/.*",))):
        config = small("clip", **{
            "model.vision.patch": (4, 4, 4), "model.vision.depth": 1, "model.text.depth": 1,
            "model.vision.remat": "full", "optim.freeze": freeze, **changes})
        training = training_on(config, devices, 1, devices)
        # Of what is handed to the compiler, which could only leave more out.
        program = training.train_step.lower(training.abstract, training.place(make_batch(config)))
        flops[name] = program.cost_analysis()["flops"]
    # Forward, and with rematerialisation forward again and twice that backward: a quarter is left.
    assert flops["text"] < 0.35 * flops["all"], flops


@pytest.mark.parametrize("name", ["adam", "adamw", "muon"])
def test_moments_of_what_trains_stay_sharded_and_survive_a_checkpoint(name, tmp_path):
    config = small(**{
        "optim.name": name, "optim.freeze": ("params/text/.*", "params/vision/norm/.*"),
        "optim.start": (("bank", 2),), "mesh.rules": ((".*/query/kernel",
                                                        (None, None, "fsdp")),)})
    training = training_on(config, 4, 2, 8)
    opt = paths.flat(training.abstract.opt)
    for path, spec in (("/bank", P(("data", "fsdp"))),
                       ("params/vision/layers/blocks/query/kernel", P(None, None, "fsdp"))):
        found = [leaf.sharding.spec for key, leaf in opt.items() if key.endswith(path)]
        assert found and set(found) == {spec}, (path, found)
    assert not [key for key in opt if "/params/text/" in key or "/params/vision/norm/" in key]
    if name != "adamw":
        return
    state = jax.tree.map(lambda s: jax.device_put(np.ones(s.shape, s.dtype), s.sharding),
                         training.abstract)
    checkpointer = Checkpointer(tmp_path, every=1, keep=1)
    checkpointer.save(1, state, {})
    checkpointer.close()
    restored = Checkpointer(tmp_path, every=1, keep=1).restore(training.abstract).state
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(state), strict=True):
        assert a.sharding == b.sharding and (np.asarray(a) == np.asarray(b)).all()


@pytest.mark.parametrize(("changes", "message"), [
    ({"optim.groups": (("params/txt/.*", 0.0),)}, "optim.groups: .*params/txt"),
    ({"optim.start": (("params/txt/.*", 3),)}, "optim.start: .*params/txt"),
    ({"optim.freeze": ("params/txt/.*",)}, "optim.freeze: .*params/txt/.*matches no parameter"),
    ({"optim.freeze": ("params/.*", "bank")}, "leaves no weight to train"),
    ({"optim.freeze": ("params/.*",), "model.bank.frozen": True}, "leaves no weight to train"),
    ({"optim.freeze": ("bank",), "optim.groups": (("bank", 0.1),)}, "all of that is frozen"),
    ({"optim.warmup": 901}, "optim.warmup=901 is 901 steps, and the run has 900"),
    ({"model.text.implementation": "cudnn"}, "model.text.implementation=cudnn runs on NVIDIA GPUs, "
                                             "and this run has cpu"),
    ({"model.vision.implementation": "cudnn"}, "set model.vision.implementation=auto")])
def test_wrong_wishes_are_refused_before_anything_is_compiled(changes, message):
    with pytest.raises(UserError, match=message):
        training_on(small(**changes), 1, 1, 1)


def test_plateau_halves_the_learning_rate_after_patience():
    config = small("clip", **{"optim.schedule": "plateau", "optim.plateau_patience": 2,
                              "optim.warmup": 0})
    training = training_on(config, 1, 1, 1)
    state = drawn.state(training)
    for _ in range(4):
        state = training.update_plateau(state, jnp.float32(1.0))
    # Of the step only what this metric needs is compiled.
    rate = jax.jit(lambda *args: training.train_step(*args)[1]["learning_rate"])
    np.testing.assert_allclose(rate(state, make_batch(config)), 0.5 * config.optim.learning_rate)


def test_sizes_that_do_not_divide_are_refused():
    with pytest.raises(UserError, match="data.batch_size=12"):
        training_on(small(**{"data.batch_size": 12}), 8, 1, 8)
    with pytest.raises(UserError, match="model.bank.rows=60"):
        training_on(small(**{"model.bank.rows": 60}), 8, 1, 8)
    with pytest.raises(UserError, match="did you mean 'adamw'"):
        training_on(small(**{"optim.name": "adamww"}), 1, 1, 1)
    with pytest.raises(UserError, match="did you mean 'cosine'"):
        training_on(small(**{"optim.schedule": "cosin"}), 1, 1, 1)


@pytest.mark.parametrize("recipe", ["brgsa", "clip"])
def test_the_real_recipes_have_the_published_sizes(recipe):
    """Shapes only: nothing of this size is computed."""
    config = get_config(recipe, **{"model.text.vocab": 30522})
    training = steps.make_training(config, meshes.make_mesh(2, 4), per_epoch=700)
    vision = training.abstract.params["vision"]
    assert round(models.parameter_count(vision["layers"]) / 1e6, 2) == 85.05
    assert round(models.parameter_count(vision["patch_embed"]) / 1e6, 2) == 1.57
    assert models.parameter_count(training.abstract.params["vision_head"]) == 768 * 769
    assert round(models.parameter_count(training.abstract.params["text"]) / 1e6) == 109
    if recipe == "brgsa":
        assert training.abstract.bank.shape == (2048, 768)
    up = vision["layers"]["blocks"]["up"]["kernel"]
    assert "fsdp" in up.sharding.spec


def test_the_learned_scale_is_kept_at_a_hundred_and_can_come_back():
    config = small("siglip", **{"optim.warmup": 0, "optim.learning_rate": 0.5})
    training = training_on(config, 1, 1, 1)

    def scales_from(scale, steps):
        model = drawn.weights(training.abstract.model)
        model["params"]["logit"] = {"log_scale": np.log(np.float32(scale)),
                                    "bias": np.float32(config.model.logit.bias)}
        state = drawn.state(training, model)
        for index in range(steps):
            state, _ = training.train_step(state, make_batch(config, index))
            yield float(jnp.exp(state.params["logit"]["log_scale"]))

    scales = list(scales_from(100.0, 4))
    assert max(scales) <= 100.001 and min(scales) < 90, scales
    # The first Adam step changes its logarithm by half at most.
    np.testing.assert_allclose(list(scales_from(400.0, 1)), 100.0, rtol=1e-3)


@pytest.mark.parametrize("changes", [{"losses.info_nce.negatives": "local"},
                                     {"model.batch_statistics": "local"}])
def test_one_row_on_each_device_cannot_stand_alone(changes):
    with pytest.raises(UserError, match="two rows or more on each device"):
        training_on(small("mgca", **{"data.batch_size": 8, **changes}), 8, 1, 8)


def test_weights_that_are_not_finite_are_named():
    good = {"params": {"a": jnp.ones(3)}, "bank": None}
    steps.check_finite(good)
    for bad in (jnp.nan, jnp.inf):
        with pytest.raises(UserError, match="not finite .first params/a"):
            steps.check_finite({"params": {"a": jnp.ones(3).at[1].set(bad)}, "bank": None})
