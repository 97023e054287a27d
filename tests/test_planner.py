"""Plans: what is read of programs, what formulas say, and what is refused."""

import functools
import importlib.util
import json
import types

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

from brgsa_jax import flops
from brgsa_jax.config import UserError, get_config
from brgsa_jax.hardware import CHIPS
from brgsa_jax.network import build
from brgsa_jax.nn.attention import Placement
from brgsa_jax.planner import activations, compile, hlo, roofline
from brgsa_jax.planner.hlo import Traffic
from brgsa_jax.planner.plan import plan
from brgsa_jax.planner.target import (
    GPUS,
    TOPOLOGIES,
    target_of,
    tpu_devices,
    without_accelerators,
)

SMALL = {
    "model.input.shape": (32, 32, 16), "data.crop": (32, 32, 16), "model.embed_dim": 32,
    "model.vision.width": 64, "model.vision.depth": 2, "model.vision.heads": 2,
    "model.vision.mlp_width": 128, "model.text.width": 64, "model.text.depth": 2,
    "model.text.heads": 2, "model.text.mlp_width": 128, "model.text.last_n_layers": 1,
    "model.text.vocab": 2000, "model.text.max_tokens": 16}


def small(**changes):
    return get_config("brgsa", **{**SMALL, **changes})


@functools.cache
def planned(batch, *changes, topology="h200:8"):
    """A plan of the small configuration, with (key, value) changes; made once."""
    return plan(small(**dict(changes)), topology, batch=batch)


# ------------------------------------------------------------------------------- targets


@pytest.fixture
def quiet():
    with without_accelerators():
        yield


@pytest.mark.parametrize(("name", "count"), [
    ("v5e:4x4", 16), ("v5e:16x16", 256), ("v6e:2x2", 4), ("v5p:8x8x8", 512), ("v7x:2x2x1", 8),
    ("h200:8", 8), ("a100:512", 512), ("l4:1", 1)])
def test_targets(name, count):
    target = target_of(name)
    assert target.count == count and target.chip is CHIPS[name.split(":")[0]]


@pytest.mark.parametrize(("name", "words"), [
    ("v5ee:4x4", "did you mean v5e"), ("", "choose a TPU slice"), ("cpu:8", "as h200:8"),
    ("v4:2x2x1", "choose a TPU slice"), ("v5e", "2 axes, as v5e:16x16"),
    ("v5e:256", "2 axes"), ("v5e:4x4x4", "2 axes"), ("v5p:8x8", "3 axes, as v5p:8x8x8"),
    ("v5e:0x4", "2 axes"), ("v5e:4X4", "2 axes"), ("v5e:axb", "2 axes"),
    ("v5e:32x32", "at most 256"), ("h200", "write it as h200:8"), ("h200:4x2", "h200:8"),
    ("h200:0", "h200:8"), ("h200:-8", "h200:8"), ("h200:8.5", "h200:8"),
    ("h200:99999999999", "h200:8")])
def test_other_targets_are_refused_in_one_sentence(name, words):
    with pytest.raises(UserError) as error:
        target_of(name)
    assert words in str(error.value) and "\n" not in str(error.value)
    if "choose a TPU slice" in words:
        assert all(known in str(error.value) for known in (*TOPOLOGIES, *GPUS))


def test_a_slice_that_does_not_exist(quiet):
    with pytest.raises(UserError, match="v5e:3x3 is no v5e slice .*such as v5e:16x16"):
        tpu_devices(target_of("v5e:3x3"))


def test_missing_libtpu_names_the_extra(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'brgsa-jax\[tpu\]'"):
        plan(small(), "v5e:2x2", batch=8)


# ---------------------------------------------------------------------------- collectives

PROGRAM = """\
HloModule jit_step, is_scheduled=true

%add (x: f32[], y: f32[]) -> f32[] {
  ROOT %z = f32[] add(%x, %y)
}

%fused.1 (p: f32[4,8]) -> f32[32,8] {
  ROOT %ag.1 = f32[32,8]{1,0:T(8,128)} all-gather(%p), replica_groups={{0,1,2,3,4,5,6,7}}, \
frontend_attributes={chain_id="0"}
}

%fused.2 (p: f32[4,8]) -> f32[32,8] {
  ROOT %ag.2 = f32[32,8]{1,0:T(8,128)} all-gather(%p), replica_groups={{0,1,2,3,4,5,6,7}}, \
frontend_attributes={chain_id="0"}
}

%inner_condition (p: (s32[], f32[4])) -> pred[] {
  %bound = s32[]{:T(128)} constant(5)
  ROOT %lt = pred[] compare(%i, %bound), direction=LT
}

%inner (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  %start = (f32[4]{0}, f32[4]{0}, u32[], u32[]) collective-permute-start(%x), \
source_target_pairs={{0,1},{1,0}}
  %done = f32[4]{0} collective-permute-done(%start)
}

%outer (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  %w = (s32[], f32[4]) while(%t), condition=%inner_condition, body=%inner
  %ar = (bf16[1,64]{1,0:T(2,128)(2,1)S(1)}, f32[16]{0}) all-reduce(%a, %b), \
replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_0'}, to_apply=%add
}

ENTRY %main (p: f32[4]) -> f32[4] {
  %loop = (s32[], f32[4]) while(%t), condition=%unknown, body=%outer, \
backend_config={"known_trip_count":{"n":"12"}}
  %s = f32[32,8] fusion(%p), kind=kCustom, calls=%fused.1
  %d = f32[32,8] fusion(%p), kind=kCustom, calls=%fused.2
  %rs = f32[2,8]{1,0} reduce-scatter(%d), replica_groups=[2,4]<=[8], dimensions={0}, to_apply=%add
  %a2a = s8[4,4]{1,0} all-to-all(%q), replica_groups={{0,1},{2,3}}
}
"""


def test_collectives_of_a_text():
    found = hlo.collectives(PROGRAM, 8)
    assert found == {
        "all-reduce": Traffic(12, 12 * 2 * (128 + 64) * 3 / 4),
        "all-gather": Traffic(1, 1024 * 7 / 8),
        "reduce-scatter": Traffic(1, 64 * 3),
        "all-to-all": Traffic(1, 8.0),
        "collective-permute": Traffic(60, 60 * 16.0)}


def test_collectives_of_a_compiled_program(devices):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))

    def local(x):
        def turn(carry, _):
            return lax.ppermute(carry, "x", [(i, (i + 1) % 8) for i in range(8)]) * 2.0, None

        x, _ = lax.scan(turn, x, None, length=8)
        return lax.psum(x, "x"), lax.all_gather(x, "x", tiled=True)

    run = jax.shard_map(local, mesh=mesh, in_specs=P("x"), out_specs=(P(), P()), check_vma=False)
    text = jax.jit(run).lower(jnp.zeros((8 * 16, 4))).compile().as_text()
    block = 16 * 4 * 4
    assert hlo.collectives(text, 8) == {
        "all-reduce": Traffic(1, 2 * block * 7 / 8), "all-gather": Traffic(1, 8 * block * 7 / 8),
        "collective-permute": Traffic(8, 8.0 * block)}


def test_no_collectives():
    text = jax.jit(jnp.sin).lower(jnp.zeros(3)).compile().as_text()
    assert hlo.collectives(text, 1) == {}


# ------------------------------------------------------------------------- TPU compiles


def test_what_overflows_is_told_by_its_size(quiet):
    device = tpu_devices(target_of("v5e:2x2"))[0]
    here = jax.sharding.SingleDeviceSharding(device)
    wide = jax.ShapeDtypeStruct((2**15, 2**20), jnp.float32)
    lowered = jax.jit(jnp.sin, in_shardings=here, out_shardings=here).lower(wide)
    assert compile._compile(lowered) == pytest.approx(2**38, rel=0.01)


@pytest.mark.parametrize("name", ["v5e:2x2", "v6e:2x2", "v5p:2x2x1"])
def test_usable_memory_is_what_the_compiler_says(quiet, name):
    target = target_of(name)
    here = jax.sharding.SingleDeviceSharding(tpu_devices(target)[0])
    wide = jax.ShapeDtypeStruct((2**17, 2**20), jnp.float32)
    with pytest.raises(jax.errors.JaxRuntimeError, match="Ran out of|HbmOom") as error:
        jax.jit(jnp.sin, in_shardings=here, out_shardings=here).lower(wide).compile()
    said = float(str(error.value).partition("available HBM (")[2].partition("G")[0])
    # Versions of the compiler round it differently.
    assert target.chip.usable == pytest.approx(said * 2**30, abs=0.02 * 2**30)


def test_losses_that_do_not_fit_end_the_plan_before_the_step(monkeypatch):
    def loss(config, mesh, training):
        overflow = f"HLO temporaries ({mesh.size}.01T) exceeds available HBM (15.75G)"
        return compile.needed_bytes(overflow)

    monkeypatch.setattr(compile, "loss_temporaries", loss)
    monkeypatch.setattr(compile, "compile_step", None)
    found = plan(small(), "v5e:2x2", batch=64)
    assert found.compiled and not found.memory.fits and found.memory.temporaries is None
    assert found.loss_memory == 4.01 * 2**40
    assert found.memory.peak > found.loss_memory and found.largest < 64
    json.dumps(found.to_dict())


def test_on_tpus_tokens_of_volumes_are_never_laid_out_as_one_axis(quiet):
    """An odd number of them a volume would move every row."""
    def lowered(platform, sharding):
        network = build(small().model, placement=Placement(platform), tokens=False)
        params = jax.eval_shape(lambda key: network.init(key)["vision"], jax.random.key(0))
        volumes = jax.ShapeDtypeStruct((6, 32, 32, 16), jnp.int16)

        def loss(params, volumes):
            return network.vision.apply(params, network.normalize(volumes)).pooled.sum()

        return jax.jit(jax.grad(loss), in_shardings=sharding).lower(params, volumes).as_text()

    chip = jax.sharding.SingleDeviceSharding(tpu_devices(target_of("v5e:2x2"))[0])
    here = jax.sharding.SingleDeviceSharding(jax.devices("cpu")[0])
    tokens = 1 + (32 // 16) * (32 // 16) * (16 // 8)
    assert f"tensor<{6 * tokens}x" in lowered("cpu", here)
    assert f"tensor<{6 * tokens}x" not in lowered("tpu", chip)


# What the log of libtpu 0.0.42.1 says of three programs, MiB: the heap of temporaries, with its
# gaps. The sizes are those of `memory_analysis`: arguments, results, shared, temporaries, peak.
@pytest.mark.parametrize("found,heap", [
    ((2387.28662, 2289.06250, 2289.05025, 2555.52051, 4887.12061), 2.47 * 1024),
    ((0.42383, 0.43274, 0.0, 9.85477, 7.24133), 8.06),
    ((0.07227, 0.08118, 0.0, 20.87622, 12.25061), 13.62)])
def test_temporaries_lie_between_their_sum_and_what_counts_gaps_twice(found, heap):
    names = ("argument", "output", "alias", "temp")
    sizes = compile.sizes(types.SimpleNamespace(
        peak_memory_in_bytes=found[4] * 2**20,
        **{f"{name}_size_in_bytes": size * 2**20
           for name, size in zip(names, found, strict=False)}))
    assert sizes.kept == (found[0] + found[1] - found[2]) * 2**20
    assert sizes.live <= heap * 2**20 * 1.001
    assert heap * 2**20 * 0.998 <= sizes.held <= found[3] * 2**20


def test_needed_bytes_of_both_refusals():
    assert compile.needed_bytes("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used "
                                "20.40G of 15.75G hbm. Exceeded") == 20.4 * 2**30
    assert compile.needed_bytes("something else") == float("inf")


# ------------------------------------------------------------------------------ formulas


def test_the_state_is_counted_shard_by_shard():
    whole, parts, average = (planned(16, *changes) for changes in (
        (), (("mesh.fsdp", 4),), (("optim.ema", 0.99),)))
    assert whole.mesh == {"data": 8, "fsdp": 1} and parts.mesh == {"data": 2, "fsdp": 4}
    # Both moments of parameters and bank, and a few counters.
    assert whole.memory.optimiser == pytest.approx(
        2 * (whole.memory.parameters + whole.memory.bank), abs=100)
    assert whole.memory.bank == 2048 * 32 * 4 / 8
    assert whole.memory.batch == 2 * (32 * 32 * 16 * 2 + 3 * 16 * 4 + 3 * 4)
    assert 0.25 < parts.memory.parameters / whole.memory.parameters < 0.4
    assert average.memory.average == whole.memory.parameters + whole.memory.bank
    assert average.memory.peak - whole.memory.peak == average.memory.average
    json.dumps(whole.to_dict())


def test_durations_in_epochs_are_steps():
    assert planned(16, ("train.steps", "3epochs")).memory == planned(16).memory


def test_frozen_weights_have_no_gradients_and_no_moments():
    frozen, whole = planned(16, ("optim.freeze", ("params/text/.*",))), planned(16)
    assert frozen.memory.parameters == whole.memory.parameters
    assert frozen.memory.optimiser < 0.7 * whole.memory.optimiser
    assert frozen.memory.temporaries < whole.memory.temporaries


def test_a_batch_grows_what_depends_on_it_until_it_does_not_fit():
    few, many = planned(16), planned(512)
    assert many.memory.temporaries - few.memory.temporaries == pytest.approx(
        62 * activations.per_row(small()))
    assert many.largest % 8 == 0 and many.largest == few.largest
    assert planned(many.largest).memory.fits and not planned(many.largest + 8).memory.fits


def test_microbatches_make_room():
    plain, chunked = planned(512), planned(512, ("train.microbatch", 8))
    assert chunked.memory.temporaries < plain.memory.temporaries
    assert chunked.largest > 3 * plain.largest
    assert chunked.time.compute > plain.time.compute and chunked.flops == plain.flops


def test_less_rematerialisation_takes_more_memory_and_less_time():
    plans = [planned(512, ("model.vision.remat", remat)) for remat in ("none", "dots")]
    plans.append(planned(512))
    temporaries = [found.memory.temporaries for found in plans]
    assert temporaries == sorted(temporaries, reverse=True)
    assert plans[0].time.compute == plans[1].time.compute < plans[2].time.compute


@pytest.mark.parametrize("recipe", ["mgca:resnet50", "brgsa_mgca", "siglip"])
def test_other_recipes_have_plans(recipe):
    found = plan(get_config(recipe), "h100:8", batch=64)
    assert found.assumed and found.vocabulary == 30522
    assert found.memory.fits and 64 < found.largest < 10**5
    assert found.memory.temporaries > found.memory.parameters


# ------------------------------------------------------------------------------- roofline


def test_step_time_by_hand():
    config = get_config("clip", **{"data.batch_size": 64, "model.text.vocab": 30522})
    chip = CHIPS["h200"]
    time = roofline.step_time(config, chip, 8, {"all-reduce": Traffic(10, 45e9)}, 1e9)
    # Four passes of both towers, three of heads and losses.
    parts = flops.forward(config)
    towers = 8 * 4 * (parts["vision"] + parts["text"])
    assert time.compute == pytest.approx(towers / (0.5 * 989e12), rel=1e-3)
    assert time.communication == pytest.approx(45e9 / (0.8 * 450e9) + 10e-6)
    assert time.total == max(time.compute, time.memory) + time.communication


def test_between_islands_the_network_counts():
    traffic = {"all-reduce": Traffic(0, 8e9)}
    chip = CHIPS["h200"]
    inside, between = (roofline.communication(traffic, chip, n) for n in (8, 16))
    assert inside == pytest.approx(8e9 / (0.8 * 450e9))
    assert between == pytest.approx(inside + 1e9 / (0.8 * 50e9))
    ring = {"collective-permute": Traffic(0, 1e9)}
    assert roofline.communication(ring, chip, 16) == pytest.approx(1e9 / (0.8 * 50e9))
    assert roofline.communication(ring, CHIPS["v5e"], 256) == pytest.approx(1e9 / (0.8 * 50e9))


def test_efficiency_falls_from_one():
    found = plan(get_config("brgsa"), "h200:8", batch=64).scaling
    assert [scale.devices for scale in found] == [8, 16, 32, 64, 128, 256, 512, 1024]
    rows, batch = ([getattr(scale, key) for scale in found]
                   for key in ("constant_rows", "constant_batch"))
    assert rows[0] == batch[0] == 1.0
    assert rows == sorted(rows, reverse=True) and 0.5 < rows[-1] < 1
    assert batch[4:] == [None] * 4 and batch[:4] == sorted(batch[:4], reverse=True)


# -------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(("changes", "batch", "words"), [
    ({}, 12, "does not divide over 8 devices; give --batch a multiple of 8, such as 64"),
    ({"train.microbatch": 4}, 48, "in 4 chunks; give --batch a multiple of 32, such as 256"),
    ({"train.parallel": "pmap"}, 16, "plan with --config.train.parallel=mesh"),
    ({"model.bank.rows": 100}, 16, "model.bank.rows=100 does not divide over 8 devices"),
    ({"mesh.fsdp": 3}, 16, "the mesh data=-1 × fsdp=3 does not fit 8 devices"),
    ({"losses.knowledge_interaction.temperature": -1.0}, 16, "must be positive"),
    ({"model.text.heads": 5}, 16, "is not a multiple of"),
    ({}, 1, "at least 2")])
def test_what_cannot_be_planned(changes, batch, words):
    with pytest.raises(UserError) as error:
        plan(small(**changes), "h200:8", batch=batch)
    assert words in str(error.value)


def test_the_batch_of_the_configuration_is_taken_if_it_divides():
    assert plan(small(), "h200:8").batch == 64
    with pytest.raises(UserError, match="a global batch of 64 does not divide over 256 devices"):
        plan(small(), "v5e:16x16")
