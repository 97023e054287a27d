"""Sinkhorn codes and prototype alignment: golden vectors, balance, gradient switches."""

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from brgsa_jax.losses import common, prototype_alignment, sinkhorn


def check_cpa(file):
    h = file.meta["hparams"]

    options = {"epsilon": h["epsilon"], "iterations": h["sinkhorn_iterations"]}

    def losses_of(x, prototypes):
        return prototype_alignment(
            x["img_raw"],
            x["report_raw"],
            prototypes,
            temperature=h["proto_temperature"],
            **options,
        )._asdict()

    def function(x):
        codes = {
            side: sinkhorn(common.l2_normalize(x[f"{side}_raw"]) @ x["proto"].T, **options)
            for side in ("img", "report")
        }
        return losses_of(x, x["proto"]), (codes, losses_of(x, raw))

    raw = file.inputs("proto_raw")["proto_raw"]
    inputs = file.inputs("img_raw", "report_raw")
    # The stored gradient is taken at the normalised prototypes.
    inputs["proto"] = file["out_proto_norm"].astype(file.dtype)
    losses, (codes, of_raw), grads = golden.differentiate(
        function, inputs, {"cpa": {"image_to_text": 0.5, "text_to_image": 0.5}}
    )
    for values in (losses, of_raw):
        file.value("loss_cpa_i2t", values["image_to_text"])
        file.value("loss_cpa_t2i", values["text_to_image"])
        file.value("loss_cpa", 0.5 * sum(values.values()))
    file.gradients("cpa", grads["cpa"])
    for side in codes:
        file.value(f"{side}_code", codes[side])
    return file


def check_sinkhorn(file):
    scores = file.inputs("scores")["scores"]
    options = {"epsilon": float(file["in_eps"]), "iterations": int(file["in_iters"])}
    if file.meta["kind"] == "sinkhorn":
        file.value("code", golden.jit(lambda s: sinkhorn(s, **options))(scores))
        return file
    ranks = file.meta["world"]
    mesh = jax.make_mesh(
        (ranks,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:ranks]
    )
    for name, axis in (("code_global", "data"), ("code_local_only", None)):
        sharded = jax.shard_map(
            lambda s, axis=axis: sinkhorn(s, axis_name=axis, **options),
            mesh=mesh,
            in_specs=P("data"),
            out_specs=P("data"),
        )
        file.value(name, golden.jit(sharded)(scores))
    return file


@pytest.mark.parametrize("dtype", golden.DTYPES)
@pytest.mark.parametrize("path", golden.files("cpa"), ids=lambda p: p.stem)
def test_cpa_golden(path, dtype):
    with jax.enable_x64(dtype == "float64"):
        check_cpa(golden.Golden(path, dtype)).finish()


@pytest.mark.parametrize("dtype", golden.DTYPES)
@pytest.mark.parametrize("path", golden.files("sinkhorn", "sinkhorn_dist"), ids=lambda p: p.stem)
def test_sinkhorn_golden(path, dtype):
    with jax.enable_x64(dtype == "float64"):
        check_sinkhorn(golden.Golden(path, dtype)).finish()


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_many_rounds_balance_the_prototypes():
    scores = random(24, 6) * 0.3
    codes = np.asarray(golden.jit(lambda s: sinkhorn(s, iterations=200))(scores))
    np.testing.assert_allclose(codes.sum(axis=1), 1.0, rtol=1e-5)
    np.testing.assert_allclose(codes.sum(axis=0), 24 / 6, rtol=1e-3)
    alone = np.asarray(golden.jit(lambda s: sinkhorn(s, iterations=0))(scores))
    np.testing.assert_allclose(alone, jax.nn.softmax(scores / 0.05, axis=1), rtol=1e-5)
    assert np.ptp(alone.sum(axis=0)) > 1.0


def test_sinkhorn_takes_no_share_for_invalid_rows():
    scores = random(10, 4)
    valid = np.arange(10) < 7
    noisy = np.where(valid[:, None], scores, np.nan)
    part = golden.jit(lambda s, v: sinkhorn(s, valid=v))(noisy, valid)[:7]
    np.testing.assert_allclose(part, golden.jit(sinkhorn)(scores[:7]), rtol=1e-5, atol=1e-7)


def test_scores_where_the_exponential_form_overflows():
    codes = np.asarray(golden.jit(sinkhorn)(random(8, 5) * 100.0))
    assert np.all(np.isfinite(codes))
    np.testing.assert_allclose(codes.sum(axis=1), 1.0, rtol=1e-5)


def test_prototype_gradient_with_and_without_the_jacobian():
    image, text, prototypes = random(6, 5), random(6, 5, seed=1), 3.0 * random(4, 5, seed=2)

    def gradient(prototypes, normalized):
        def loss(p):
            return sum(prototype_alignment(image, text, p, normalized_gradient=normalized))

        return np.asarray(golden.jit(jax.grad(loss))(prototypes))

    unit = prototypes / np.linalg.norm(prototypes, axis=1, keepdims=True)
    plain = gradient(prototypes, False)
    np.testing.assert_allclose(plain, gradient(unit, False), rtol=1e-4, atol=1e-7)
    projected = gradient(prototypes, True)
    # The Jacobian removes the radial part and divides by the norm.
    norm = np.linalg.norm(prototypes, axis=1, keepdims=True)
    radial = np.sum(plain * unit, axis=1, keepdims=True)
    np.testing.assert_allclose(projected, (plain - radial * unit) / norm, rtol=1e-3, atol=1e-6)
    assert np.max(np.abs(radial)) > 1e-3


def test_codes_carry_no_gradient():
    gradient = golden.jit(jax.grad(lambda s: jnp.sum(sinkhorn(s) ** 2)))(random(6, 4))
    assert np.all(np.asarray(gradient) == 0)


def test_wrong_use_is_named():
    with pytest.raises(ValueError, match="codes='rank'.*global"):
        prototype_alignment(random(4, 3), random(4, 3), random(5, 3), codes="rank")
    with pytest.raises(ValueError, match="epsilon=0"):
        sinkhorn(random(4, 3), epsilon=0)
    with pytest.raises(ValueError, match="prototypes has shape"):
        prototype_alignment(random(4, 3), random(4, 3), random(5, 2))
