"""Encoders of radiographs (ViT, ResNet-50) and MGCA's options of the text tower."""

import functools

import drawn
import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import erf

from brgsa_jax import registry
from brgsa_jax.nn import bert, blocks, resnet, vit
from brgsa_jax.nn.norm import Scope

VIT = {"patch": (8, 4), "width": 24, "depth": 2, "heads": 3, "mlp_width": 48, "remat": "none"}


def make_vit(shape=(16, 12), **options):
    return registry.get("vision", "vit2d")(input_shape=shape, **{**VIT, **options})


def f8(tree):
    return jax.tree.map(lambda a: np.asarray(a, np.float64), tree)


def random_variables(module, *inputs):
    return drawn.weights(jax.eval_shape(module.init, jax.random.key(0), *inputs))


def layer_norm(x, p, epsilon):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + epsilon) * p["scale"] + p["bias"]


def numpy_vit(variables, image, epsilon=1e-6, heads=3):
    """CLS and patch tokens, last CLS row, of images [B, C, H, W] in float64."""
    p = f8(variables["params"])
    dense = lambda y, q: y @ q["kernel"] + q["bias"]  # noqa: E731
    # H is rows: patch (r, c) has pixels [8r:8r+8, 4c:4c+4]; within it the channel runs fastest.
    x = np.stack([image[:, :, 8 * r:8 * r + 8, 4 * c:4 * c + 4].transpose(0, 2, 3, 1)
                  .reshape(len(image), -1)
                  for r in range(image.shape[2] // 8) for c in range(image.shape[3] // 4)], 1)
    x = dense(x, p["patch_embed"])
    x = np.concatenate([np.broadcast_to(p["cls"], (len(x), 1, x.shape[-1])), x], 1)
    x = x + p["positions"]
    for i in range(len(p["layers"]["blocks"]["up"]["bias"])):
        q = jax.tree.map(lambda a, i=i: a[i], p["layers"]["blocks"])
        y = layer_norm(x, q["attention_norm"], 1e-6)
        query, key, value = (dense(y, q[n]).reshape(*y.shape[:2], heads, -1).transpose(0, 2, 1, 3)
                             for n in ("query", "key", "value"))
        weights = np.exp(query @ key.transpose(0, 1, 3, 2) / np.sqrt(query.shape[-1]))
        weights /= weights.sum(-1, keepdims=True)
        x = x + dense((weights @ value).transpose(0, 2, 1, 3).reshape(x.shape), q["out"])
        y = dense(layer_norm(x, q["mlp_norm"], 1e-6), q["up"])
        x = x + dense(y * 0.5 * (1 + erf(y / np.sqrt(2))), q["down"])
    return layer_norm(x, p["norm"], epsilon), weights.mean(1)[:, 0, 1:]


def test_vit2d_equals_numpy():
    module = make_vit(need_cls_attention=True)
    image = np.random.default_rng(0).normal(size=(2, 3, 16, 12)).astype("f4")
    variables = random_variables(module, image)
    tower = golden.jit(module.apply)(variables, image)
    x, row = numpy_vit(variables, image.astype("f8"))
    np.testing.assert_allclose(tower.pooled, x[:, 0], atol=2e-5)
    np.testing.assert_allclose(tower.tokens, x[:, 1:], atol=2e-5)
    np.testing.assert_allclose(tower.attention, row, atol=1e-6)
    assert tower.attention.shape == (2, 6)
    bare = golden.jit(make_vit().apply)(variables, image)
    assert bare.attention is None
    np.testing.assert_allclose(bare.tokens, tower.tokens, atol=1e-5)


def test_final_epsilon_is_the_encoders_own():
    image = np.zeros((1, 3, 16, 12), "f4")
    volume = registry.get("vision", "vit3d")(input_shape=(8, 8, 8), **{**VIT, "patch": (4, 4, 8)})
    assert make_vit().norm_epsilon == 1e-6 and volume.norm_epsilon == 1e-5
    variables = random_variables(make_vit(), image)
    # Only tokens of a small spread feel it.
    params = jax.tree.map(lambda a: 1e-3 * a, variables["params"])
    small = {"params": params | {"norm": variables["params"]["norm"]}}
    for module, epsilon in ((make_vit(), 1e-6), (make_vit(norm_epsilon=1e-5), 1e-5)):
        tokens = golden.jit(module.apply)(small, image).tokens
        np.testing.assert_allclose(tokens, numpy_vit(small, image.astype("f8"), epsilon)[0][:, 1:],
                                   atol=2e-5)
    other = numpy_vit(small, image.astype("f8"), 1e-6)[0][:, 1:]
    assert np.abs(tokens - other).max() > 1e-2


@pytest.mark.parametrize("patch", [(2, 3), (2, 3, 2)])
def test_patches_have_the_first_axis_slowest(patch):
    shape = tuple(2 * n for n in patch)
    image = np.random.default_rng(0).normal(size=(2, *shape, 3))
    patches = np.asarray(vit.patches_of(jnp.asarray(image), patch))
    for n, place in enumerate(np.ndindex(*(2,) * len(patch))):
        cut = tuple(slice(i * p, i * p + p) for i, p in zip(place, patch, strict=True))
        np.testing.assert_allclose(patches[:, n], image[(slice(None), *cut)].reshape(2, -1),
                                   rtol=1e-6)


def test_vit2d_takes_frozen_positions_a_stem_and_other_sizes():
    module = make_vit(positions="frozen", stem=(((4, 2), 5),), need_cls_attention=True)
    image = np.random.default_rng(0).normal(size=(1, 3, 16, 12)).astype("f4")
    variables = golden.jit(module.init)(jax.random.key(0), image)
    params = variables["params"]
    assert params["stem_0"]["kernel"].shape == (4 * 2 * 3, 5)
    assert params["patch_embed"]["kernel"].shape == (2 * 2 * 5, 24)
    table = vit.sincos_positions((2, 3), 24)
    np.testing.assert_array_equal(params["positions"][1:], table)
    np.testing.assert_array_equal(params["positions"][0], 0)
    omega = 10000.0 ** (-np.arange(6) / 6)
    np.testing.assert_allclose(table[1 * 3 + 1, :6], np.sin(omega), atol=1e-7)
    np.testing.assert_allclose(table[1 * 3 + 1, 12:18], np.sin(omega / 2), atol=1e-7)
    wide = np.zeros((1, 3, 32, 12), "f4")
    assert golden.jit(module.apply)(variables, wide).tokens.shape == (1, 12, 24)


def test_vit_ignores_training_and_scope():
    module = make_vit(scope=Scope("d"))
    image = np.random.default_rng(0).normal(size=(1, 3, 16, 12)).astype("f4")
    variables = random_variables(module, image)
    assert set(variables) == {"params"}
    run = golden.jit(module.apply, static_argnames="train")
    np.testing.assert_array_equal(run(variables, image).pooled,
                                  run(variables, image, train=True).pooled)


def test_wrong_options_are_named():
    with pytest.raises(KeyError, match="did you mean 'learned'"):
        make_vit(positions="lerned")
    with pytest.raises(KeyError, match="vit2d needs 2 numbers"):
        make_vit(shape=(16, 12, 8))
    make = registry.get("vision", "resnet50")
    with pytest.raises(KeyError, match="choices: batch, frozen"):
        make(input_shape=(224, 224), norm="group")
    with pytest.raises(KeyError, match=r"\(H, W\)"):
        make(input_shape=(224, 224, 128))
    with pytest.raises(KeyError, match="choices: cls, mean"):
        make_bert(pool="max")
    with pytest.raises(KeyError, match="did you mean 'zero'"):
        make_bert(position_ids="zeros")


# ResNet.

def entries(tree):
    return sum(int(np.prod(a.shape)) for a in jax.tree.leaves(tree))


def test_resnet50_has_torchvisions_size_and_mgcas_maps():
    module = registry.get("vision", "resnet50")(input_shape=(224, 224))
    image = jax.ShapeDtypeStruct((2, 3, 224, 224), jnp.float32)
    variables = jax.eval_shape(module.init, jax.random.key(0), image)
    assert entries(variables["params"]) == 23_508_032
    # Two statistics for each of the 26 560 channels.
    assert entries(variables["batch_stats"]) == 2 * 26_560
    tower = jax.eval_shape(module.apply, variables, image)
    assert tower.pooled.shape == (2, 2048) and tower.pooled.dtype == jnp.float32
    assert tower.tokens.shape == (2, 19 * 19, 1024) and tower.attention is None


def conv(x, kernel, stride, pad):
    """Cross-correlation of [B, *axes, C] with [*sizes, C, F], any number of axes."""
    rank = x.ndim - 2
    x = np.pad(x, [(0, 0), *[(pad, pad)] * rank, (0, 0)])
    axes = tuple(range(1, rank + 1))
    windows = np.lib.stride_tricks.sliding_window_view(x, kernel.shape[:rank], axes)
    windows = windows[(slice(None), *[slice(None, None, stride)] * rank)]
    taken = (rank + 1, *range(rank + 2, 2 * rank + 2))
    return np.tensordot(windows, kernel, (taken, (rank, *range(rank))))


def max_pool(x):
    rank = x.ndim - 2
    x = np.pad(x, [(0, 0), *[(1, 1)] * rank, (0, 0)], constant_values=-np.inf)
    windows = np.lib.stride_tricks.sliding_window_view(x, (3,) * rank, tuple(range(1, rank + 1)))
    windows = windows[(slice(None), *[slice(None, None, 2)] * rank)]
    return windows.max(tuple(range(-rank, 0)))


def numpy_resnet(variables, x, stages, train):
    """(pooled, tokens, {path: running mean after}) of [B, *axes, C] in float64."""
    params, stats = f8(variables["params"]), f8(variables["batch_stats"])
    means = {}

    def unit(x, p, s, stride, name):
        size = p["conv"]["kernel"].shape[0]
        x = conv(x, p["conv"]["kernel"], stride, size // 2)
        axes = tuple(range(x.ndim - 1))
        mean, var = (x.mean(axes), x.var(axes)) if train else (s["norm"]["mean"], s["norm"]["var"])
        means[name] = 0.9 * s["norm"]["mean"] + 0.1 * mean
        return (x - mean) / np.sqrt(var + 1e-5) * p["norm"]["scale"] + p["norm"]["bias"]

    x = max_pool(np.maximum(unit(x, params["stem"], stats["stem"], 2, "stem"), 0))
    for stage, count in enumerate(stages, 1):
        before = x
        for block in range(count):
            name = f"stage{stage}_block{block}"
            p, s = params[name], stats[name]
            stride = 2 if stage > 1 and block == 0 else 1
            y = np.maximum(unit(x, p["reduce"], s["reduce"], 1, name), 0)
            y = np.maximum(unit(y, p["middle"], s["middle"], stride, name), 0)
            y = unit(y, p["expand"], s["expand"], 1, name)
            if "shortcut" in p:
                x = unit(x, p["shortcut"], s["shortcut"], stride, name)
            x = np.maximum(x + y, 0)
    return x.mean(tuple(range(1, x.ndim - 1))), before.reshape(len(x), -1, before.shape[-1]), means


@pytest.mark.parametrize(("axes", "train"), [((37, 32), False), ((20, 16, 16), True)])
def test_resnet_equals_numpy(axes, train):
    stages = (1, 2, 1)
    module = resnet.ResNet(stages=stages, rank=len(axes), width=4)
    x = np.random.default_rng(0).normal(size=(2, *axes, 3)).astype("f4")
    variables = random_variables(module, x)
    run = golden.jit(lambda v, x: module.apply(v, x, train=train, mutable=["batch_stats"]))
    tower, after = run(variables, x)
    pooled, tokens, means = numpy_resnet(variables, x.astype("f8"), stages, train)
    for ours, expected in ((tower.pooled, pooled), (tower.tokens, tokens)):
        np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    stem = after["batch_stats"]["stem"]["norm"]["mean"]
    np.testing.assert_allclose(stem, means["stem"] if train
                               else variables["batch_stats"]["stem"]["norm"]["mean"], atol=1e-5)


def test_basic_blocks_on_volumes_equal_numpy():
    module = resnet.ResNet(stages=(2, 1), block="basic", rank=3, width=4)
    x = np.random.default_rng(0).normal(size=(2, 12, 8, 8)).astype("f4")
    variables = random_variables(module, x)
    tower = golden.jit(module.apply)(variables, x)
    p, s = (f8(variables[kind]) for kind in ("params", "batch_stats"))

    def unit(x, *path, size=3, stride=1):
        q, t = p, s
        for name in path:
            q, t = q[name], t[name]
        y = conv(x, q["conv"]["kernel"], stride, size // 2)
        y = (y - t["norm"]["mean"]) / np.sqrt(t["norm"]["var"] + 1e-5)
        return y * q["norm"]["scale"] + q["norm"]["bias"]

    y = max_pool(np.maximum(unit(x[..., None].astype("f8"), "stem", size=7, stride=2), 0))
    for block in ("stage1_block0", "stage1_block1"):
        z = unit(np.maximum(unit(y, block, "first"), 0), block, "second")
        y = np.maximum(y + z, 0)
    before = y
    z = unit(np.maximum(unit(y, "stage2_block0", "first", stride=2), 0), "stage2_block0", "second")
    y = np.maximum(unit(y, "stage2_block0", "shortcut", size=1, stride=2) + z, 0)
    np.testing.assert_allclose(tower.pooled, y.mean((1, 2, 3)), atol=2e-5)
    np.testing.assert_allclose(tower.tokens, before.reshape(2, -1, 4), atol=2e-5)


def test_resize_holds_the_corners():
    image = np.random.default_rng(0).normal(size=(1, 4, 5, 2))
    wide = np.asarray(golden.jit(lambda x: resnet.resize_linear(x, (7, 3)))(image.astype("f4")))
    assert wide.shape == (1, 7, 3, 2)
    np.testing.assert_allclose(wide[:, ::2, :], image[:, :, ::2], atol=1e-6)
    np.testing.assert_allclose(wide[:, 1::2], (image[:, :-1, ::2] + image[:, 1:, ::2]) / 2,
                               atol=1e-6)
    same = resnet.resize_linear(jnp.asarray(image, jnp.float32), (4, 5))
    np.testing.assert_array_equal(same, image.astype("f4"))


def tiny(**options):
    return registry.get("vision", "resnet50")(
        input_shape=(24, 32), **{"stages": (1, 1), "width": 4, "resize": 40, **options})


def test_resnet50_reads_channels_first_and_resizes():
    image = np.random.default_rng(0).normal(size=(2, 3, 24, 32)).astype("f4")
    variables = random_variables(tiny(), image)
    tower = golden.jit(tiny().apply)(variables, image)
    resized = resnet.resize_linear(jnp.asarray(image).transpose(0, 2, 3, 1), (40, 40))
    pooled, tokens, _ = numpy_resnet(variables, np.asarray(resized, np.float64), (1, 1), False)
    np.testing.assert_allclose(tower.pooled, pooled, rtol=1e-4)
    np.testing.assert_allclose(tower.tokens, tokens, rtol=0, atol=1e-5 * np.abs(tokens).max())
    assert tower.tokens.shape == (2, 100, 16)


def test_frozen_norm_keeps_its_statistics_and_batch_norm_follows_the_scope():
    image = np.random.default_rng(0).normal(size=(4, 3, 24, 32)).astype("f4")
    image[2:] *= 5
    variables = random_variables(tiny(), image)

    def train(module, image):
        return golden.jit(lambda x: module.apply(variables, x, train=True,
                                                 mutable=["batch_stats"]))(image)

    tower, after = train(tiny(norm="frozen"), image)
    np.testing.assert_allclose(tower.pooled, golden.jit(tiny().apply)(variables, image).pooled,
                               rtol=1e-6, atol=1e-6)
    for a, b in zip(jax.tree.leaves(after["batch_stats"]),
                    jax.tree.leaves(variables["batch_stats"]), strict=True):
        np.testing.assert_array_equal(a, b)
    whole, _ = train(tiny(), image)
    parts, _ = train(tiny(scope=Scope(shards=2)), image)
    first, _ = train(tiny(), image[:2])
    np.testing.assert_allclose(parts.pooled[:2], first.pooled, rtol=1e-4, atol=1e-5)
    assert np.abs(whole.pooled[:2] - first.pooled).max() > 1e-2


def test_bfloat16_convolutions_keep_float32_statistics():
    image = np.random.default_rng(0).normal(size=(2, 3, 24, 32)).astype("f4")
    full, half = tiny(), tiny(dtype=jnp.bfloat16)
    variables = random_variables(full, image)
    step = lambda module: golden.jit(lambda x: module.apply(  # noqa: E731
        variables, x, train=True, mutable=["batch_stats"]))(image)
    (exact, _), (rough, after) = step(full), step(half)
    assert rough.tokens.dtype == jnp.bfloat16 and rough.pooled.dtype == jnp.float32
    assert all(a.dtype == jnp.float32 for a in jax.tree.leaves(after))
    error = np.abs(np.asarray(rough.pooled - exact.pooled)).max() / np.abs(exact.pooled).max()
    assert 1e-5 < error < 0.05


# Text tower.

def make_bert(**options):
    return registry.get("text", "bert")(**{
        "vocab": 30, "width": 24, "depth": 3, "heads": 3, "mlp_width": 32, "positions": 12,
        **options})


IDS = np.random.default_rng(0).integers(0, 30, (2, 9)).astype("i4")
MASK = np.arange(9)[None] < np.array([[9], [5]])


@functools.cache
def compiled_bert(**options):
    return golden.jit(make_bert(**options).apply)


def encode(variables, ids=IDS, mask=MASK, **options):
    return compiled_bert(**options)(variables, ids, mask)


@pytest.fixture(scope="module")
def text():
    return random_variables(make_bert(), IDS, MASK)


def test_cls_pooling_takes_the_first_token_of_the_chosen_layers(text):
    one = encode(text, pool="cls", last_n_layers=1)
    np.testing.assert_allclose(one.pooled, one.tokens[:, 0], rtol=1e-6)
    for aggregate, reduce in (("sum", np.sum), ("mean", np.mean)):
        tower = encode(text, pool="cls", last_n_layers=2, aggregate=aggregate, divisor=97)
        np.testing.assert_allclose(tower.pooled, reduce(tower.hidden[-2:, :, 0], axis=0),
                                   rtol=1e-5, atol=1e-6)
    mean = encode(text, last_n_layers=1, divisor=0)
    expected = [mean.tokens[b, :n].mean(0) for b, n in enumerate((9, 5))]
    np.testing.assert_allclose(mean.pooled, expected, rtol=1e-5, atol=1e-6)


def test_zero_positions_know_no_word_order(text):
    order = np.array([0, 3, 1, 2, 4, 5, 6, 7, 8])
    for ids, deaf in (("zero", True), ("sequential", False)):
        a = encode(text, position_ids=ids).tokens
        b = encode(text, IDS[:, order], position_ids=ids).tokens
        error = np.abs(np.asarray(a)[:, order] - b).max()
        assert error < 1e-5 if deaf else error > 1e-2
    params = text["params"] | {"position": {"embedding": jnp.broadcast_to(
        text["params"]["position"]["embedding"][:1], (12, 24))}}
    np.testing.assert_allclose(encode({"params": params}).tokens,
                               encode(text, position_ids="zero").tokens, atol=1e-6)


def test_no_token_types_is_a_table_of_zeros(text):
    module = make_bert(token_types=0)
    assert "token_type" not in random_variables(module, IDS, MASK)["params"]
    params = {k: v for k, v in text["params"].items() if k != "token_type"}
    zeros = {"token_type": {"embedding": jnp.zeros((2, 24))}}
    np.testing.assert_array_equal(encode({"params": params}, token_types=0).tokens,
                                  encode({"params": params | zeros}).tokens)
    with pytest.raises(ValueError, match="no token-type table"):
        module.apply(text, IDS, MASK, np.zeros_like(IDS))


def test_every_module_takes_train(text):
    run = golden.jit(lambda v: make_bert().apply(v, IDS, MASK, train=True))
    np.testing.assert_array_equal(run(text).pooled, encode(text).pooled)
    assert bert.POOLS == ("mean", "cls") and blocks.VisionTower is vit.VisionTower
