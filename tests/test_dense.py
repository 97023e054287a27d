"""The affine map: nn.Dense in float32, and 16-bit products with float32 sums."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from brgsa_jax.nn.dense import Dense, affine

RNG = np.random.default_rng(0)
X, KERNEL, BIAS = (RNG.normal(size=shape).astype("f4") for shape in ((4, 256, 24), (24, 40), (40,)))
PULL = RNG.normal(size=(4, 256, 40)).astype("f4")


def gradients(x, *, wide):
    return jax.jit(jax.grad(lambda *a: jnp.sum(affine(*a, wide).astype("f4") * PULL),
                            argnums=(0, 1, 2)))(x, KERNEL, BIAS)


def test_it_is_the_layer_of_flax_with_the_same_parameters():
    ours, theirs = Dense(40), nn.Dense(40)
    made = jax.jit(ours.init)(jax.random.key(0), X)
    jax.tree.map(np.testing.assert_array_equal, made, jax.jit(theirs.init)(jax.random.key(0), X))

    def loss(layer):
        return jax.jit(jax.value_and_grad(lambda p, x: jnp.sum(layer.apply(p, x) * PULL),
                                          argnums=(0, 1)))

    made["params"]["bias"] = jnp.asarray(BIAS)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-4),
                 loss(ours)(made, X), loss(theirs)(made, X))


@pytest.mark.parametrize("wide", [False, True])
def test_sixteen_bit_products_are_summed_up_in_float32(wide):
    half = jnp.asarray(X, jnp.bfloat16)
    assert affine(half, KERNEL, BIAS, wide).dtype == (jnp.float32 if wide else jnp.bfloat16)
    to_x, to_kernel, to_bias = gradients(half, wide=wide)
    assert (to_x.dtype, to_kernel.dtype, to_bias.dtype) == (jnp.bfloat16, jnp.float32, jnp.float32)
    rows = np.asarray(half, "f8").reshape(-1, 24)
    pulled = np.asarray(PULL.astype(jnp.bfloat16), "f8").reshape(-1, 40)
    exact = rows.T @ pulled
    # Rounding to bfloat16 would be off by 2e-3 of the largest.
    np.testing.assert_allclose(to_kernel, exact, atol=1e-5 * np.abs(exact).max())
    sums = (PULL.reshape(-1, 40) if wide else pulled).astype("f8").sum(axis=0)
    np.testing.assert_allclose(to_bias, sums, atol=1e-5 * np.abs(sums).max())


@pytest.mark.parametrize("wide", [False, True])
def test_leading_axes_as_one_or_apart_give_the_same(wide):
    half = jnp.asarray(X, jnp.bfloat16)

    def run(flat):
        return jax.jit(jax.value_and_grad(
            lambda *a: jnp.vdot(affine(*a, wide, flat).astype("f4"), PULL),
            argnums=(0, 1, 2)))(half, KERNEL, BIAS)

    jax.tree.map(lambda a, b: np.testing.assert_allclose(
        a.astype("f4"), b.astype("f4"), rtol=1e-5, atol=1e-4), run(True), run(False))


def test_double_precision_stays_so():
    with jax.enable_x64(True):
        x = jnp.asarray(X, jnp.float64)
        made = affine(x, KERNEL, BIAS)
        assert made.dtype == jnp.float64
        np.testing.assert_allclose(made, X.astype("f8") @ KERNEL.astype("f8") + BIAS, rtol=1e-12)
