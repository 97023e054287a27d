"""Towers in chunks and the step under pmap: the same numbers, less memory, no new traffic."""

import re

import drawn
import jax
import numpy as np
import pytest
from test_model import small
from test_step import make_batch

from brgsa_jax import mesh as meshes
from brgsa_jax import paths
from brgsa_jax.config import UserError
from brgsa_jax.train import startup
from brgsa_jax.train import step as steps

COLLECTIVE = re.compile(
    r"= \S+ (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(")


def training_on(config, count=8):
    fsdp = config.mesh.fsdp
    return steps.make_training(config, meshes.make_mesh(count // fsdp, fsdp,
                                                        jax.devices()[:count]), per_epoch=10)


def steps_of(config, count, batches):
    """Yields the state, which the next step donates, and the metrics of each step."""
    training = training_on(config, count)
    state, step = drawn.state(training), None
    for index in batches:
        batch = training.place(make_batch(config, index))
        # As the trainer; called as it is, a pmapped step would be compiled for its own output too.
        step = step or training.train_step.lower(state, batch).compile()
        state, metrics = step(state, batch)
        yield state, {name: float(value) for name, value in metrics.items()}


def run(config, count, batches):
    """The state after steps on these host batches and the metrics of each."""
    done = list(steps_of(config, count, batches))
    return done[-1][0], [metrics for _, metrics in done]


def everything(recipe="brgsa_mgca", **changes):
    """All terms, BatchNorm heads and token losses with their trained attention."""
    return small(recipe, **{"model.head.name": "batchnorm", "model.cross_attention_heads": 2,
                            "model.text.pool": "cls", "optim.warmup": 0,
                            "optim.learning_rate": 5e-5, "optim.ema": 0.9, **changes})


@pytest.fixture(scope="module")
def twenty():
    """Twenty steps on the mesh: moments after the first, state after the last, all metrics."""
    done = steps_of(everything(), 4, range(20))
    state, first = next(done)
    moments = jax.device_get(state.opt)
    rest = list(done)
    return moments, jax.device_get(rest[-1][0]), [first, *(metrics for _, metrics in rest)]


def without_gradient(state):
    """Weights whose gradient is zero but for rounding, which Adam blows up to its learning rate.

    Nothing depends on them: what is added to all keys or before a batch normalisation cancels.
    """
    moments = {name.split("/nu/")[1]: leaf for name, leaf in paths.flat(state.opt).items()
               if "/nu/" in name}
    found = {name for name, leaf in moments.items() if np.sqrt(leaf.max()) < 1e-9}
    assert all(name.endswith(("bias", "in_b")) for name in found), found
    return found


def close(ours, expected, tolerance=1e-5, skip=()):
    """Holds two trees to an absolute deviation."""
    ours, expected = paths.flat(ours), paths.flat(expected)
    assert set(ours) == set(expected)
    for name, value in expected.items():
        if not name.endswith(tuple(skip)):
            np.testing.assert_allclose(ours[name], value, rtol=tolerance, atol=tolerance,
                                       err_msg=name)


def test_twenty_steps_under_pmap_in_chunks_equal_the_mesh(twenty):
    _, expected, history = twenty
    state, ours = run(everything(**{"train.parallel": "pmap", "train.microbatch": 2}), 4,
                      range(20))
    for mine, row in zip(ours, history, strict=True):
        for name, value in row.items():
            np.testing.assert_allclose(mine[name], value, rtol=1e-5, atol=1e-5, err_msg=name)
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(state))
    close(jax.device_get(state.weights), expected.weights, skip=without_gradient(expected))
    # Running means follow the biases before them, which the batch's own mean takes out again.
    close(jax.device_get(state.stats), expected.stats, skip=("mean",))


def test_local_statistics_and_negatives_under_pmap_equal_the_mesh():
    """What unsynchronised devices compute is the same function in both modes."""
    changes = {"model.batch_statistics": "local", "losses.info_nce.negatives": "local",
               "losses.prototype_alignment.codes": "local",
               # They know of no device; heads and losses are less to compile.
               "optim.freeze": ("params/(vision|text)/.*",)}
    (mesh, mesh_history), (mapped, mapped_history) = (
        run(everything("mgca", **{"train.parallel": mode, **changes}), 4, [0])
        for mode in ("mesh", "pmap"))
    for name, value in mesh_history[0].items():
        np.testing.assert_allclose(mapped_history[0][name], value, rtol=1e-5, atol=1e-6,
                                   err_msg=name)
    close(jax.device_get(mapped.stats), jax.device_get(mesh.stats))


@pytest.mark.parametrize(("changes", "message"), [
    ({"train.parallel": "pmap", "mesh.fsdp": 2}, "mesh.fsdp=1"),
    ({"train.microbatch": 3}, "3 chunks of train.microbatch; choose a multiple such as 24"),
])
def test_what_cannot_be_combined_is_refused(changes, message):
    config = everything(**changes)
    with pytest.raises(UserError, match=message):
        steps.make_training(config, meshes.make_mesh(8 // config.mesh.fsdp, config.mesh.fsdp),
                            per_epoch=10)


def deep(chunks, batch=128, **changes):
    """Towers whose activations outweigh their parameters."""
    return small("brgsa", **{
        "data.batch_size": batch, "train.microbatch": chunks, "model.vision.remat": "full",
        "model.text.remat": "full", "model.vision.patch": (4, 4, 4), "model.vision.width": 24,
        "model.vision.mlp_width": 48, "model.text.width": 24, "model.text.mlp_width": 48,
        "model.vision.depth": 2, "model.embed_dim": 24, "optim.ema": 0.0, **changes})


@pytest.fixture(scope="module")
def compiled():
    """The compiled step whole, in chunks, and in as large chunks of twice the batch."""
    programs = {}
    for name, chunks, batch in (("whole", 0, 128), ("chunks", 16, 128), ("twice", 32, 256)):
        config = deep(chunks, batch)
        training = training_on(config)
        arrays = training.place(make_batch(config))
        program = training.train_step.lower(training.abstract, arrays).compile()
        programs[name] = (program, startup.bytes_per_device(arrays))
    return programs


def test_sixteen_chunks_take_an_eighth_of_the_memory(compiled):
    temporary = {name: startup.temporary_bytes(program) for name, (program, _) in compiled.items()}
    assert temporary["whole"] >= 8 * temporary["chunks"], temporary
    growth = temporary["twice"] - temporary["chunks"]
    assert growth < 0.1 * (compiled["twice"][1] - compiled["chunks"][1]), temporary


def test_chunks_add_no_collective(compiled):
    counts = {name: collectives(program.as_text()) for name, (program, _) in compiled.items()}
    for kind, count in counts["chunks"].items():
        assert count <= counts["whole"].get(kind, 0), counts
    # Static counts say nothing of what a loop repeats.
    body = "\n".join(computations_of_loops(compiled["chunks"][0].as_text()))
    assert "dynamic-slice" in body
    assert not [found for found in COLLECTIVE.findall(body) if found != "collective-permute"], body


def collectives(text):
    found = COLLECTIVE.findall(text)
    return {kind: found.count(kind) for kind in set(found)}


def computations_of_loops(text):
    """The text of every computation that is the body of a while loop."""
    blocks = dict(re.findall(r"^%?([\w.\-]+) \([^\n]*\{\n(.*?)^\}", text, re.M | re.S))
    return [blocks[name] for name in set(re.findall(r"body=%?([\w.\-]+)", text))]


def test_chunks_change_no_gradient(twenty):
    """Over parameters sharded at rest."""
    moments, _, history = twenty
    state, ours = run(everything(**{
        "train.microbatch": 2, "mesh.fsdp": 2,
        "mesh.rules": ((".*/query/kernel", (None, None, "fsdp")),)}), 4, [0])
    for name, value in history[0].items():
        np.testing.assert_allclose(ours[0][name], value, rtol=1e-5, atol=1e-6, err_msg=name)
    ours, expected = ({name: leaf for name, leaf in paths.flat(opt).items() if "/mu/" in name}
                      for opt in (jax.device_get(state.opt), moments))
    largest = max(np.abs(leaf).max() for leaf in expected.values())
    for name, leaf in expected.items():
        assert np.abs(ours[name] - leaf).max() <= 1e-5 * largest, name
    kernel = state.params["vision"]["layers"]["blocks"]["query"]["kernel"]
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(2, 48, 24)}
