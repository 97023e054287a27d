"""What a run tells before its first step: bytes, negatives and the lines themselves."""

import math
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict
from test_model import small

from brgsa_jax import flops
from brgsa_jax import mesh as meshes
from brgsa_jax.model import parameter_count
from brgsa_jax.train import startup
from brgsa_jax.train import step as steps
from brgsa_jax.train.meter import Work

# Of no formula, so that no line tells it.
WORK = Work(16, math.nan, None)

# Enough that whole and shared banks differ in tenths of a MiB.
ROWS = 4096


def test_bytes_per_device_count_what_one_device_holds():
    mesh = meshes.make_mesh(4, 2)
    sharded = NamedSharding(mesh, P(("data", "fsdp")))
    half, whole = NamedSharding(mesh, P(None, "fsdp")), NamedSharding(mesh, P())
    x, y = np.zeros((16, 6), "f4"), np.zeros((3, 4), "i2")
    tree = {"sharded": jax.device_put(x, sharded), "half": jax.device_put(y, half),
            "whole": jax.device_put(y, whole), "none": None,
            "number": jax.device_put(jnp.zeros((), jnp.int32), whole)}
    sizes = {"sharded": 2 * 6 * 4, "half": 3 * 2 * 2, "whole": 3 * 4 * 2, "none": 0, "number": 4}
    for name, size in sizes.items():
        assert startup.bytes_per_device(tree[name]) == size, name
    assert startup.bytes_per_device(tree) == sum(sizes.values())
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding),
                          tree)
    assert startup.bytes_per_device(shapes) == sum(sizes.values())
    held = sum(shard.data.nbytes for leaf in jax.tree.leaves(tree)
               for shard in leaf.addressable_shards if shard.device == jax.devices()[3])
    assert held == sum(sizes.values())


@pytest.mark.parametrize(("losses", "expected"), [
    ({"info_nce": {"weight": 1.0, "negatives": "global"}}, {"info_nce": 15}),
    ({"info_nce": {"weight": 1.0, "negatives": "ring"}}, {"info_nce": 15}),
    ({"info_nce": {"weight": 1.0, "negatives": "local"}}, {"info_nce": 3}),
    ({"knowledge_interaction": {"weight": 0.5, "negatives": "local"},
      "info_nce": {"weight": 0.0, "negatives": "global"}}, {"knowledge_interaction": 3}),
    ({"sigmoid": {"weight": 1.0}, "local_alignment": {"weight": 1.0}},
     {"sigmoid": 15, "local_alignment": 15}),
    ({"token_alignment": {"weight": 1.0}, "prototype_alignment": {"weight": 1.0}}, {})])
def test_negatives_are_counted_by_where_they_come_from(losses, expected):
    config = ConfigDict({"data": {"batch_size": 16}, "losses": losses})
    assert startup.negatives_per_sample(config, 4) == expected


def lines(count, temporary=3 * 2**20, **changes):
    """The lines of a run that is never started, by their subject."""
    config = small("brgsa_mgca", **{"model.bank.rows": ROWS, "optim.ema": 0.9, "train.steps": 30,
                                    **changes})
    mesh = meshes.make_mesh(count, 1, jax.devices()[:count])
    state = steps.make_training(config, mesh, per_epoch=10).abstract
    found = startup.describe(config, mesh, state, volumes=100, temporary=temporary, work=WORK)
    assert len(found) == 4 and all(line.startswith("  ") for line in found[1:])
    return found, state


def mebibytes(line, name):
    return float(re.search(rf"([\d.]+) MiB {name}", line)[1])


def test_one_device_is_told_without_talk_of_sharding():
    (run, layout, negatives, memory), state = lines(1)
    assert run == (f"phantom_brgsa_mgca: {parameter_count(state.params):,} parameters, bank of "
                   "4096 rows, 100 volumes, 30 steps of 16 = 4.8 epochs, on 1 × cpu")
    assert layout == "  mesh {'data': 1, 'fsdp': 1}"
    assert negatives == ("  negatives of each sample: 15 in knowledge_interaction, less those of "
                         "the same caption")
    assert mebibytes(memory, "bank") == round(ROWS * 48 * 4 / 2**20, 1)
    assert memory.endswith("3.0 MiB activations and temporaries of the step")
    for name, tree in (("parameters", state.params), ("optimiser", state.opt),
                       ("average", state.ema)):
        size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
        assert mebibytes(memory, name) == round(size / 2**20, 1), name


def test_eight_devices_share_the_bank_on_the_mesh_and_repeat_it_under_pmap():
    (run, layout, _, memory), _ = lines(8, **{"train.microbatch": 2})
    assert run.endswith("on 8 × cpu")
    assert layout == ("  mesh {'data': 8, 'fsdp': 1}, bank rows: 512 of 4096 on each device, "
                      "towers in 2 chunks")
    assert mebibytes(memory, "bank") == 0.1
    (_, layout, _, memory), _ = lines(8, None, **{"train.parallel": "pmap"})
    assert layout == ("  data parallel by pmap over 8 devices, bank replicated: all 4096 rows on "
                      "each device")
    assert memory.startswith("  each device holds ") and mebibytes(memory, "bank") == 0.8
    assert "activations" not in memory


def test_what_a_run_does_not_have_is_not_told():
    config = small("mgca", **{"losses.info_nce.weight": 0.0, "optim.ema": 0.0})
    mesh = meshes.make_mesh(8, 1)
    state = steps.make_training(config, mesh, per_epoch=10).abstract
    told = {"volumes": 100, "temporary": None, "work": WORK}
    run, layout, memory = startup.describe(config, mesh, state, **told)
    assert ", no bank, " in run and "bank" not in layout
    assert "bank" not in memory and "average" not in memory
    local = small("clip", **{"losses.info_nce.negatives": "local",
                             "losses.info_nce.positives": ("report", "caption")})
    state = steps.make_training(local, mesh, per_epoch=10).abstract
    assert startup.describe(local, mesh, state, **told)[2] == (
        "  negatives of each sample: 1 in info_nce, less those of the same report or caption")
    both = local.copy_and_resolve_references().unlock()
    both.losses.sigmoid = {"weight": 1.0, "positives": ()}
    assert startup.describe(both, mesh, state, **told)[2] == (
        "  negatives of each sample: 1 in info_nce, less those of the same report or caption; "
        "15 in sigmoid")


def test_frozen_weights_are_counted():
    (run, *_), state = lines(1, **{"optim.freeze": ("params/text/.*", "params/prototypes")})
    frozen = parameter_count(state.params["text"]) + state.params["prototypes"].size
    total = parameter_count(state.params)
    assert f"{total:,} parameters ({total - frozen:,} trained, {frozen:,} frozen), bank" in run
    (run, *_, memory), state = lines(1, **{"model.bank.frozen": True})
    assert f"{total:,} parameters, bank of 4096 frozen rows, " in run
    # Two moments of every parameter and none of the bank.
    assert mebibytes(memory, "optimiser") == round(2 * total * 4 / 2**20, 1)


def test_the_work_of_a_step_is_told_with_the_peak_of_known_devices():
    config = small("clip")
    mesh = meshes.make_mesh(8, 1)
    state = steps.make_training(config, mesh, per_epoch=10).abstract

    def last(work):
        return startup.describe(config, mesh, state, volumes=100, temporary=None, work=work)[-1]

    assert startup.work_of(config, mesh) == (config.data.batch_size, flops.step(config), None)
    assert last(Work(16, 44.2e6, None)) == "  a step is 44.2 MFLOP"
    assert last(Work(16, 17.3e12, 8 * 989e12)) == (
        "  a step is 17.3 TFLOP; MFU is its share of 7.91 PFLOP/s, dense bfloat16")
    h200 = SimpleNamespace(devices=np.array([SimpleNamespace(device_kind="NVIDIA H200")] * 8),
                           size=8)
    assert startup.work_of(config, h200).peak == 8 * 989e12


def test_temporaries_are_those_of_the_compiled_program():
    def step(x):
        return jnp.sort(jnp.sin(x) @ jnp.cos(x)).sum()

    size = 2**8
    compiled = jax.jit(step).lower(jax.ShapeDtypeStruct((size, size), jnp.float32)).compile()
    assert startup.temporary_bytes(compiled) >= size * size * 4

    class Silent:
        def memory_analysis(self):
            return None

    assert startup.temporary_bytes(Silent()) is None
