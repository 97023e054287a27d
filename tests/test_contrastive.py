"""InfoNCE and the sigmoid loss: golden vectors, definitions, groups, validity, ring memory."""

import os
import subprocess
import sys

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from brgsa_jax.losses import info_nce, sigmoid


def batch(rows=12, width=8, seed=0):
    rng = np.random.default_rng(seed)
    return tuple(rng.normal(size=(rows, width)).astype(np.float32) for _ in range(2))


@pytest.mark.parametrize("dtype", golden.DTYPES)
@pytest.mark.parametrize("path", golden.files("ita"), ids=lambda p: p.stem)
def test_ita_golden(path, dtype):
    with jax.enable_x64(dtype == "float64"):
        check_ita(golden.Golden(path, dtype)).finish()


def check_ita(file):
    temperature = file.meta["hparams"]["softmax_temperature"]
    forms = ("global", "ring")

    def function(x):
        losses = {}
        for form in forms:
            loss = info_nce(
                x["img_raw"], x["report_raw"], temperature=temperature, negatives=form
            )
            losses |= {(form, k): v for k, v in loss._asdict().items()}
        return losses, None

    losses, _, grads = golden.differentiate(
        function,
        file.inputs("img_raw", "report_raw"),
        {f: {(f, "image_to_text"): 1.0, (f, "text_to_image"): 1.0} for f in forms},
    )
    for form in forms:
        one, two = losses[form, "image_to_text"], losses[form, "text_to_image"]
        file.value("loss_ita_i2t", one)
        file.value("loss_ita_t2i", two)
        file.value("loss_ita", one + two)
        file.gradients("ita", grads[form])
    return file


def relation(groups):
    """Who is whose positive, row by row: any column equal."""
    groups = np.asarray(groups).reshape(len(groups), -1)
    return np.array([[bool(np.any(a == b)) for b in groups] for a in groups])


def dense_info_nce(image, text, temperature, groups):
    """The definition, in numpy and float64, one anchor at a time."""
    image, text = (np.asarray(x, np.float64) for x in (image, text))
    image /= np.linalg.norm(image, axis=1, keepdims=True)
    text /= np.linalg.norm(text, axis=1, keepdims=True)
    s = image @ text.T / temperature
    same = relation(groups)
    out = []
    for scores in (s, s.T):
        loss = 0.0
        for i, row in enumerate(scores):
            log_softmax = row - np.log(np.exp(row).sum())
            loss -= log_softmax[same[i]].mean()
        out.append(loss / len(scores))
    return out


def dense_sigmoid(image, text, scale, bias, groups):
    image, text = (np.asarray(x, np.float64) for x in (image, text))
    image /= np.linalg.norm(image, axis=1, keepdims=True)
    text /= np.linalg.norm(text, axis=1, keepdims=True)
    z = np.where(relation(groups), 1.0, -1.0)
    return np.log1p(np.exp(-z * (scale * image @ text.T + bias))).sum() / len(image)


GROUPS = np.array([7, 3, 7, 1, 0, 5, 3, 7, 9, 4, 5, 2])
# Rows 1 and 6 share the first column, 6 and 8 the second: 1 and 8 share none. Ids 7 and 3 stand
# in both columns, which says nothing.
COLUMNS = np.stack([GROUPS, [7, 20, 21, 22, 3, 24, 25, 26, 25, 22, 27, 28]], axis=1)
KINDS = {"none": None, "one": GROUPS, "two": COLUMNS, "as one": COLUMNS[:, :1]}


def test_the_relation_of_two_columns_is_not_transitive():
    same = relation(COLUMNS)
    assert same[1, 6] and same[6, 8] and not same[1, 8]
    assert same.sum() > relation(GROUPS).sum()
    assert not same[0, 4] and not same[1, 4]


@pytest.mark.parametrize("negatives", ["global", "ring", "local"])
@pytest.mark.parametrize("groups", KINDS.values(), ids=KINDS)
def test_info_nce_is_its_definition(negatives, groups):
    image, text = batch()
    options = {"temperature": 0.2, "negatives": negatives, "positives": groups}
    ours = golden.jit(lambda a, b: info_nce(a, b, **options))(image, text)
    expected = dense_info_nce(image, text, 0.2, np.arange(12) if groups is None else groups)
    np.testing.assert_allclose(ours, expected, rtol=2e-6)


@pytest.mark.parametrize("groups", KINDS.values(), ids=KINDS)
def test_sigmoid_is_its_definition(groups):
    image, text = batch()
    options = {"logit_scale": 5.0, "logit_bias": -2.0, "positives": groups}
    ours = golden.jit(lambda a, b: sigmoid(a, b, **options))(image, text)
    expected = dense_sigmoid(image, text, 5.0, -2.0, np.arange(12) if groups is None else groups)
    np.testing.assert_allclose(ours, expected, rtol=2e-6)


def ring_total(image, text, temperature, negatives, kind="one"):
    valid = jnp.arange(12) < 10
    loss = info_nce(
        image,
        text,
        temperature=temperature,
        negatives=negatives,
        positives=KINDS[kind],
        valid=valid,
    )
    return loss.image_to_text + 3.0 * loss.text_to_image


@pytest.mark.parametrize("kind", ["one", "two"])
def test_ring_gradients_are_those_of_the_gathered_form(kind):
    grads = {
        negatives: golden.jit(jax.grad(ring_total, (0, 1, 2)), static_argnums=(3, 4))(
            *batch(), jnp.float32(0.3), negatives, kind
        )
        for negatives in ("global", "ring")
    }
    for ring, gathered in zip(grads["ring"], grads["global"], strict=True):
        np.testing.assert_allclose(ring, gathered, atol=5e-6 * np.max(np.abs(gathered)))


@pytest.mark.parametrize("groups", [GROUPS, COLUMNS], ids=["one", "two"])
def test_sigmoid_gradients_are_those_of_the_dense_form(groups):
    def dense(image, text, scale, bias):
        unit = [x / jnp.linalg.norm(x, axis=1, keepdims=True) for x in (image, text)]
        z = jnp.where(relation(groups), 1.0, -1.0)
        return -jnp.sum(jax.nn.log_sigmoid(z * (scale * unit[0] @ unit[1].T + bias))) / 12

    def ours(image, text, scale, bias):
        return sigmoid(image, text, logit_scale=scale, logit_bias=bias, positives=groups)

    args = (*batch(), jnp.float32(5.0), jnp.float32(-2.0))
    for a, b in zip(
        golden.jit(jax.grad(ours, (0, 1, 2, 3)))(*args),
        golden.jit(jax.grad(dense, (0, 1, 2, 3)))(*args),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, atol=5e-6 * np.max(np.abs(b)))


def test_gradient_at_a_zero_vector_is_exactly_zero():
    image, text = batch()
    image[4] = 0.0
    for negatives in ("global", "ring"):
        grads = golden.jit(jax.grad(ring_total, (0, 1)), static_argnums=3)(
            image, text, 0.3, negatives
        )
        assert np.all(np.asarray(grads[0])[4] == 0)
        assert np.all(np.isfinite(grads[0])) and np.all(np.isfinite(grads[1]))
        assert np.any(np.asarray(grads[0])[3] != 0)


def test_no_valid_row_is_zero_not_nan():
    image, text = batch()
    nothing = np.zeros(12, bool)

    def loss(x, negatives):
        return sum(info_nce(x, text, temperature=0.1, negatives=negatives, valid=nothing))

    for negatives in ("global", "ring"):
        value, grad = golden.jit(jax.value_and_grad(loss), static_argnums=1)(image, negatives)
        assert value == 0 and np.all(np.asarray(grad) == 0)


def test_wrong_use_is_named():
    image, text = batch()
    with pytest.raises(ValueError, match="ring.*local"):
        info_nce(image, text, temperature=0.1, negatives="globl")
    with pytest.raises(ValueError, match="text has shape"):
        info_nce(image, text[:5], temperature=0.1)
    with pytest.raises(ValueError, match="positives has shape"):
        sigmoid(image, text, logit_scale=1.0, logit_bias=0.0, positives=jnp.arange(3))
    with pytest.raises(ValueError, match=r"positives has shape \[3, 2\], but \[B,m\]"):
        info_nce(image, text, temperature=0.1, positives=jnp.zeros((3, 2), int))
    with pytest.raises(ValueError, match="positives has no column"):
        info_nce(image, text, temperature=0.1, positives=jnp.zeros((12, 0), int))


RING_MEMORY = """
import jax, jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec as P
from brgsa_jax.losses import info_nce, sigmoid
def temp(n, loss):
    mesh = jax.make_mesh((n,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:n])
    f = jax.shard_map(loss, mesh=mesh, in_specs=P("data"), out_specs=P())
    x = jax.ShapeDtypeStruct((n * 32, 512), jnp.float32)
    compiled = jax.jit(jax.grad(f, (0, 1))).lower(x, x).compile()
    return compiled.memory_analysis().temp_size_in_bytes
def nce(a, b, negatives="ring"):
    return sum(info_nce(a, b, temperature=0.07, axis_name="data", negatives=negatives))
def siglip(a, b):
    return sigmoid(a, b, logit_scale=10.0, logit_bias=-10.0, axis_name="data")
print(*[temp(n, loss) for loss in (nce, siglip) for n in (8, 32)],
      *[temp(n, lambda a, b: nce(a, b, "global")) for n in (8, 32)])
"""


def test_ring_memory_does_not_grow_with_devices():
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=32",
        "JAX_PLATFORMS": "cpu",
    }
    out = subprocess.run(
        [sys.executable, "-c", RING_MEMORY], env=environment, capture_output=True, text=True
    )
    assert out.returncode == 0, out.stderr
    nce_8, nce_32, sigmoid_8, sigmoid_32, gathered_8, gathered_32 = map(int, out.stdout.split())
    assert nce_32 <= 1.3 * nce_8, (nce_8, nce_32)
    assert sigmoid_32 <= 1.3 * sigmoid_8, (sigmoid_8, sigmoid_32)
    # The measure itself must see growth where there is some.
    assert gathered_32 > 2 * gathered_8, (gathered_8, gathered_32)


def test_a_nan_is_not_taken_for_a_zero_vector():
    broken = jnp.ones((4, 3)).at[1, 2].set(jnp.nan)
    for negatives in ("global", "ring"):
        pair = info_nce(broken, jnp.ones((4, 3)), temperature=0.1, negatives=negatives)
        assert all(np.isnan(value) for value in pair)
    valid = jnp.arange(4) != 1
    assert np.all(np.isfinite(info_nce(broken, jnp.ones((4, 3)), temperature=0.1, valid=valid)))
