import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from brgsa_jax import mesh as meshes
from brgsa_jax.nn import attention as module
from brgsa_jax.nn import blocks
from brgsa_jax.nn.attention import Placement, attention, choose


def drawn(batch=2, queries=37, keys=53, heads=3, width=16, dtype="f4"):
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(batch, n, heads, width)), dtype)
               for n in (queries, keys, keys))
    lengths = rng.integers(1, keys, batch)
    return q, k, v, jnp.asarray(np.arange(keys) < lengths[:, None])


def value_and_gradients(form, *inputs, mask=None, placement=module.ANYWHERE):
    weights = jnp.asarray(np.random.default_rng(1).normal(size=inputs[0].shape), "f4")

    def total(q, k, v):
        mixed = attention(q, k, v, mask, form, placement)
        return (mixed.astype("f4") * weights).sum(), mixed

    (_, mixed), grads = jax.jit(jax.value_and_grad(total, (0, 1, 2), has_aux=True))(*inputs)
    return mixed, *grads


def close(got, wanted, tolerance=2e-5):
    for a, b in zip(got, wanted, strict=True):
        a, b = (np.asarray(x, "f8") for x in (a, b))
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max())


@pytest.mark.parametrize("form", ["chunked", "splash"])
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "padded"])
def test_every_form_equals_the_plain_one_in_value_and_gradient(form, masked):
    *inputs, mask = drawn()
    mask = mask if masked else None
    close(value_and_gradients(form, *inputs, mask=mask),
          value_and_gradients("xla", *inputs, mask=mask))


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "padded"])
def test_long_sequences_go_in_chunks_of_queries(masked, monkeypatch):
    monkeypatch.setattr(module, "CHUNK_ENTRIES", 10 * 53)
    *inputs, mask = drawn()
    mask = mask if masked else None
    close(value_and_gradients("chunked", *inputs, mask=mask),
          value_and_gradients("xla", *inputs, mask=mask))


@pytest.mark.parametrize("form", ["chunked", "splash"])
def test_sixteen_bits_stay_within_their_rounding(form):
    *inputs, mask = drawn(dtype="bfloat16")
    got = value_and_gradients(form, *inputs, mask=mask)
    assert all(x.dtype == jnp.bfloat16 for x in got)
    wide = [x.astype("f4") for x in inputs]
    close(got, value_and_gradients("xla", *wide, mask=mask), tolerance=2e-2)


def test_memory_of_the_chunked_form_grows_with_the_tokens_not_their_square():
    def temporaries(tokens):
        x = jax.ShapeDtypeStruct((1, tokens, 2, 16), jnp.float32)
        grad = jax.jit(jax.grad(lambda q, k, v: attention(q, k, v, None, "chunked").sum(),
                                (0, 1, 2)))
        return grad.lower(x, x, x).compile().memory_analysis().temp_size_in_bytes

    # Between these the square grows ninefold; the logits of a chunk are bounded.
    assert temporaries(12_288) < 3.5 * temporaries(4_096)


@pytest.mark.parametrize("form", ["chunked", "splash"])
def test_devices_run_their_own_rows_without_a_word(form):
    mesh = meshes.make_mesh(4, 2)
    *inputs, mask = drawn(batch=8, queries=17, keys=17)
    wanted = value_and_gradients("xla", *inputs, mask=mask)
    rows = meshes.batch_sharding(mesh)
    inputs = [jax.device_put(x, rows) for x in inputs]
    placement = Placement("cpu", meshes.over_rows(mesh))
    close(value_and_gradients(form, *inputs, mask=jax.device_put(mask, rows),
                              placement=placement), wanted)
    program = jax.jit(lambda q, k, v: attention(q, k, v, None, form, placement)).lower(*inputs)
    text = program.compile().as_text()
    assert not any(word in text for word in ("all-gather", "all-reduce", "collective-permute"))


@pytest.mark.parametrize(("platform", "dtype", "keys", "masked", "form"), [
    ("gpu", jnp.bfloat16, 2745, False, "cudnn"), ("gpu", jnp.bfloat16, 128, True, "xla"),
    ("gpu", jnp.float32, 2745, False, "xla"), ("tpu", jnp.float32, 344, True, "splash"),
    ("tpu", jnp.bfloat16, 64, True, "xla"), ("cpu", jnp.float32, 344, False, "chunked"),
    ("cpu", jnp.float32, 30, True, "xla")])
def test_auto_chooses_by_the_device(platform, dtype, keys, masked, form):
    asked = {"platform": platform, "dtype": dtype, "keys": keys, "masked": masked}
    assert choose("auto", **asked) == form
    assert choose("xla", **asked) == "xla"


def test_splash_pads_little():
    for tokens in (344, 1373, 2745, 4097, 13_825):
        block = module._splash_block(tokens)
        padded = -(-tokens // block) * block
        assert block % 128 == 0 and padded <= max(1.1 * tokens, tokens + 127)


@pytest.mark.parametrize("pre_norm", [True, False])
@pytest.mark.parametrize("depth", [1, 3])
def test_the_last_block_of_the_first_token_alone_is_that_of_all(pre_norm, depth):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 9, 24)), "f4")
    # The platform decides which block leaves out tokens; the CPU of the tests runs it all the same.
    block = {"heads": 3, "mlp_width": 48, "pre_norm": pre_norm, "need_cls_attention": True,
             "implementation": "xla", "placement": Placement("gpu")}
    whole, alone = (blocks.Layers(depth, "none", block, only, unroll)
                    for only, unroll in ((False, 1), (True, 2)))
    params = jax.jit(whole.init)(jax.random.key(0), x)
    assert (jax.tree.map(jnp.shape, jax.eval_shape(alone.init, jax.random.key(0), x))
            == jax.tree.map(jnp.shape, params))

    def first(layers, params):
        tokens, _, row = layers.apply(params, x)
        return (tokens[:, 0] ** 2).sum(), (tokens[:, :1], row)

    (_, wanted), slopes, (_, got), own = jax.jit(lambda p: [
        part for layers in (whole, alone)
        for part in jax.value_and_grad(first, argnums=1, has_aux=True)(layers, p)])(params)
    assert got[0].shape == (2, 1, 24)
    close(got, wanted, 1e-6)
    # The bias of a key has none but rounding.
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(slopes))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6 * largest),
                 own, slopes)


def test_gelu_is_the_exact_one():
    x = np.concatenate([np.linspace(-12, 12, 100_001), [-1e30, 1e30, 0.0]]).astype("f4")
    wide = x.astype("f8")
    exact = wide * scipy.special.ndtr(wide)
    slope = scipy.special.ndtr(wide) + wide * np.exp(-0.5 * wide**2) / np.sqrt(2 * np.pi)
    got = np.asarray(jax.jit(blocks.gelu)(x), "f8")
    assert np.abs(got - exact)[:-3].max() <= 4e-7 * 4
    assert got[-2] == np.float32(1e30) and got[-3] == got[-1] == 0
    # Relative to the input: what a layer loses by it.
    assert (np.abs(got - exact)[:-3] <= 3e-7 * np.abs(wide[:-3]) + 1e-12).all()
    grad = np.asarray(jax.jit(jax.vmap(jax.grad(blocks.gelu)))(x[:-3]))
    np.testing.assert_allclose(grad, slope[:-3], rtol=0, atol=1e-6)
