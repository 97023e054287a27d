import functools
import json
import re

import drawn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import erf

from brgsa_jax import model as models
from brgsa_jax import paths
from brgsa_jax.config import UserError, from_tree, get_config
from brgsa_jax.data.tokenizer import train_tokenizer
from brgsa_jax.network import build
from brgsa_jax.nn import vit
from brgsa_jax.predict import load_model, zero_shot
from brgsa_jax.train.start import untrained_model
from brgsa_jax.weights import load_native, save_model

PROMPTS = ["There is Lung nodule", "There is Emphysema", "There is Pleural effusion"]


def small(recipe="brgsa", **changes):
    options = {"model.input.shape": (32, 32, 16), "data.crop": (32, 32, 16),
               "model.text.vocab": 120, "model.vision.patch": (16, 16, 8), "model.embed_dim": 48,
               "model.vision.width": 48, "model.text.width": 48, "model.vision.stem": (),
               "model.vision.depth": 2, "model.text.max_tokens": 16, "data.batch_size": 16,
               "model.vision.heads": 3, "model.text.heads": 3, "model.vision.pool": "mean",
               "model.input.window": (-1000, 1000), "model.input.mean": 0.4978,
               "model.input.std": 0.2449, "optim.name": "adamw"}
    if recipe in ("brgsa", "brgsa_mgca"):
        options["model.bank.rows"] = 64
    return get_config(f"phantom:{recipe}", **{**options, **changes})


@functools.cache
def tokenizer_of_prompts():
    return train_tokenizer(PROMPTS, 16)


@functools.cache
def drawn_weights(section):
    """Drawn {params, bank, stats} of a section `model` in JSON."""
    config = from_tree(json.loads(section))
    network = models.Model(config, {}, None, None).network
    rows = config.bank.rows
    return drawn.weights({
        "params": jax.eval_shape(network.init, jax.random.key(0)),
        "bank": jax.ShapeDtypeStruct((rows, config.embed_dim), "f4") if rows else None,
        "stats": jax.eval_shape(network.init_stats, jax.random.key(0))})


def drawn_model(config):
    """A model of this configuration whose weights are drawn, as are its running statistics."""
    made = drawn_weights(json.dumps(config.model.to_dict(), sort_keys=True))
    return models.Model(config.model, made["params"], made["bank"], tokenizer_of_prompts(),
                        made["stats"])


def make_model(recipe="brgsa", **changes):
    return drawn_model(small(recipe, **{"model.text.vocab": len(tokenizer_of_prompts()),
                                        **changes}))


def small_radiographs(tower, **changes):
    """MGCA on radiographs of 32 x 48 pixels."""
    config = get_config(f"mgca:{tower}", **{
        "model.input.shape": (32, 48), "data.crop": (32, 48), "model.dtype": "float32",
        "model.embed_dim": 24, "model.head.hidden": 32, "model.local_head.hidden": 32,
        "model.prototypes": 8, "model.text.width": 24, "model.text.heads": 3,
        "model.text.mlp_width": 48, "model.text.depth": 1, "model.text.max_tokens": 16,
        "model.text.vocab": 120, "data.batch_size": 8, **changes})
    tiny = {"vit2d": {"width": 24, "heads": 3, "depth": 1, "mlp_width": 48, "patch": (16, 16)},
            "resnet50": {"stages": (1, 1), "width": 4, "resize": 40}}[tower]
    with config.unlocked():
        config.model.vision.update(tiny)
    return config


def radiographs(tower):
    """A small model of radiographs."""
    return drawn_model(small_radiographs(tower, **{
        "model.text.vocab": len(tokenizer_of_prompts())}))


def random_stats(stats):
    """Running statistics no untrained model has."""
    rng = np.random.default_rng(0)
    return paths.map_with_path(lambda path, leaf: rng.uniform(
        *((0.5, 1.5) if path.endswith("var") else (-0.1, 0.1)), leaf.shape).astype("f4"), stats)


@pytest.fixture(scope="module")
def model():
    return make_model()


def layer_norm(x, scale, bias, epsilon):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + epsilon) * scale + bias


def numpy_block(x, p, heads, pre_norm, epsilon, mask=None):
    """One transformer block written out in float64."""
    def norm(y, name):
        return layer_norm(y, p[name]["scale"], p[name]["bias"], epsilon)

    def dense(y, name):
        return y @ p[name]["kernel"] + p[name]["bias"]

    def attend(y):
        b, n, w = y.shape
        q, k, v = (dense(y, name).reshape(b, n, heads, w // heads).transpose(0, 2, 1, 3)
                   for name in ("query", "key", "value"))
        logits = q @ k.transpose(0, 1, 3, 2) / np.sqrt(w // heads)
        if mask is not None:
            logits = np.where(mask[:, None, None, :], logits, -np.inf)
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        return dense((weights @ v).transpose(0, 2, 1, 3).reshape(b, n, w), "out"), weights

    def mlp(y):
        h = dense(y, "up")
        return dense(h * 0.5 * (1 + erf(h / np.sqrt(2))), "down")

    if pre_norm:
        update, weights = attend(norm(x, "attention_norm"))
        x = x + update
        return x + mlp(norm(x, "mlp_norm")), weights
    update, weights = attend(x)
    x = norm(x + update, "attention_norm")
    return norm(x + mlp(x), "mlp_norm"), weights


def layer(params, index):
    return jax.tree.map(lambda a: np.asarray(a[index], np.float64), params["layers"]["blocks"])


def test_bert_equals_numpy_and_pools_in_closed_form(model):
    p = model.params["text"]
    ids, mask = model.tokenizer(["There is Lung nodule", "There is Emphysema There is Emphysema"])
    tower = jax.jit(model.network.text.apply)(p, ids, mask)
    f = lambda a: np.asarray(a, np.float64)  # noqa: E731
    x = f(p["word"]["embedding"])[ids] + f(p["position"]["embedding"])[None, :16] \
        + f(p["token_type"]["embedding"])[0]
    x = layer_norm(x, f(p["norm"]["scale"]), f(p["norm"]["bias"]), 1e-12)
    hidden = [x]
    for index in range(model.config.text.depth):
        x, weights = numpy_block(x, layer(p, index), 3, False, 1e-12, mask.astype(bool))
        hidden.append(x)
    np.testing.assert_allclose(tower.hidden, hidden, atol=1e-5)
    np.testing.assert_allclose(tower.tokens, x, atol=1e-5)
    np.testing.assert_allclose(tower.attention, weights[:, :, 0].mean(1) * mask, atol=1e-6)
    n = model.config.text.last_n_layers
    loop = np.stack([sum(h[b, i] for h in hidden[-n:] for i in range(16) if mask[b, i])
                     / mask[b].sum() for b in range(2)])
    np.testing.assert_allclose(tower.pooled, loop, atol=2e-5)


@pytest.mark.parametrize("positions", vit.POSITIONS)
def test_vit_equals_numpy(positions):
    model = make_model(**{"model.vision.positions": positions, "model.vision.pool": "cls"})
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), model.params["vision"])
    volume = np.random.default_rng(0).normal(size=(2, 32, 32, 16))
    tower = jax.jit(model.network.vision.apply)(model.params["vision"], volume.astype("f4"))
    tokens = np.stack([volume[:, 16 * i:16 * i + 16, 16 * j:16 * j + 16, 8 * k:8 * k + 8]
                       .reshape(2, -1) for i in range(2) for j in range(2) for k in range(2)], 1)
    x = tokens @ p["patch_embed"]["kernel"] + p["patch_embed"]["bias"]
    x = np.concatenate([np.broadcast_to(p["cls"], (2, 1, 48)), x], 1) + p["positions"]
    for index in range(2):
        x, _ = numpy_block(x, layer(model.params["vision"], index), 3, True, 1e-6)
    x = layer_norm(x, p["norm"]["scale"], p["norm"]["bias"], 1e-5)
    np.testing.assert_allclose(tower.pooled, x[:, 0], atol=2e-5)
    np.testing.assert_allclose(tower.tokens, x[:, 1:], atol=2e-5)


def test_positions_are_linspace_sincos_resized_linearly():
    table = vit.sincos_positions((3, 2, 4), 24).reshape(3, 2, 4, 24)
    omega = 10000.0 ** (-np.arange(4) / 4)
    np.testing.assert_allclose(table[2, 0, 1, :4], np.sin(omega), atol=1e-7)
    np.testing.assert_allclose(table[2, 0, 1, 4:8], np.cos(omega), atol=1e-7)
    np.testing.assert_allclose(table[2, 0, 1, 16:20], np.sin(omega / 3), atol=1e-7)
    wide = vit.resize_positions(jnp.arange(3.0)[:, None], (3,), (6,))[:, 0]
    np.testing.assert_allclose(wide, [0, 0.25, 0.75, 1.25, 1.75, 2], atol=1e-6)
    grid, target = (16, 7, 3), (14, 16, 3)
    table = np.random.default_rng(0).normal(size=(np.prod(grid), 4)).astype("f4")
    pull = np.random.default_rng(1).normal(size=(np.prod(target), 4)).astype("f4")

    def theirs(table):
        return jax.image.resize(table.reshape(*grid, 4), (*target, 4), "linear",
                                antialias=False).reshape(-1, 4)

    ours = lambda table: vit.resize_positions(table, grid, target)  # noqa: E731

    def results(f, table):
        return jax.jit(f)(table), jax.jit(jax.grad(lambda t: jnp.vdot(f(t), pull)))(table)

    values, to_table = results(ours, table)
    with jax.enable_x64(True):
        expected, to_expected = results(theirs, table.astype("f8"))
    np.testing.assert_allclose(values, expected, atol=2e-6)
    np.testing.assert_allclose(to_table, to_expected, atol=2e-6)


def test_frozen_positions_get_no_gradient():
    model = make_model(**{"model.vision.positions": "frozen"})
    grads = jax.jit(jax.grad(lambda p, v: model.network.embed_volume(p, v).sum()))(
        model.params, np.ones((1, 32, 32, 16), "i2"))
    assert not np.any(grads["vision"]["positions"])
    assert np.any(grads["vision"]["patch_embed"]["kernel"])


def test_stem_covers_each_voxel_once():
    model = make_model(**{"model.vision.stem": (((4, 4, 4), 8), ((2, 2, 1), 8))})
    p = model.params["vision"]
    assert p["stem_0"]["kernel"].shape == (64, 8)
    assert p["stem_1"]["kernel"].shape == (32, 8)
    assert p["patch_embed"]["kernel"].shape == (2 * 2 * 2 * 8, 48)
    grad = jax.jit(jax.grad(lambda v: model.network.embed_volume(
        model.params, v, normalized=True).sum()))(jnp.zeros((1, 32, 32, 16)))
    assert np.all(np.asarray(grad) != 0)


@functools.cache
def gradients_of_vision(remat, unroll=1, pool="mean"):
    model = make_model(**{"model.vision.remat": remat, "model.vision.unroll": unroll,
                          "model.vision.depth": 3, "model.vision.pool": pool})
    volume = np.random.default_rng(0).integers(-1000, 1000, (2, 32, 32, 16)).astype("i2")
    grads = jax.jit(jax.grad(lambda p: model.network.embed_volume(p, volume).sum()))(model.params)
    return jax.tree.leaves(grads["vision"])


@pytest.mark.parametrize("remat,unroll,pool", [
    ("dots", 1, "mean"), ("full", 1, "mean"), ("none", 2, "mean"), ("none", 9, "cls")])
def test_remat_and_loops_change_no_number(remat, unroll, pool):
    one, two = gradients_of_vision("none", 1, pool), gradients_of_vision(remat, unroll, pool)
    largest = max(np.abs(a).max() for a in one)
    for a, b in zip(one, two, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * largest)


def test_normalisation_has_the_range_of_the_released_model(model):
    x = np.asarray(model.network.normalize(jnp.array([-3000, -1000, 0, 1000, 3000])))
    np.testing.assert_allclose(x, [-6.116, -6.116, -2.0327, 2.051, 2.051], atol=1e-3)


def test_several_windows_become_channels():
    model = make_model(**{"model.input.window": ((-1000, 1000), (-1000, -700))})
    hu = jnp.array([-1000, -850, 0, 1000]).reshape(1, 4, 1, 1)
    x = np.asarray(model.network.normalize(hu))[0, :, 0, 0] * 0.2449 + 0.4978
    np.testing.assert_allclose(x, [[-1, -1], [-0.85, 0], [0, 1], [1, 1]], atol=1e-6)
    volumes = np.random.default_rng(0).integers(-1000, 1000, (2, 32, 32, 16)).astype("i2")
    normalized = np.asarray(model.network.normalize(jnp.asarray(volumes)))
    np.testing.assert_allclose(model.encode_volume(normalized, normalized=True),
                               model.encode_volume(volumes), atol=1e-5)


def test_volumes_of_another_form_are_refused():
    model = make_model(**{"model.input.window": ((-1000, 1000), (-1000, -700))})
    for shape, normalized, form in (
            ((2, 32, 32), False, "Y, Z]"), ((2, 32, 32, 16, 2), False, "Y, Z]"),
            ((2, 32, 32, 16), True, "Y, Z, 2]"), ((2, 32, 32, 16, 3), True, "Y, Z, 2]"),
            ((2, 3, 32, 32, 16, 2), True, "Y, Z, 2]")):
        with pytest.raises(UserError, match=re.escape(form)):
            model.encode_volume(np.zeros(shape, "f4"), normalized=normalized)


def test_weighted_pooling_starts_as_the_mean():
    mean, weighted = (make_model(**{"model.vision.pool": pool}) for pool in ("mean", "weighted"))
    # Of the initialisation only what the pool starts from is compiled.
    start = jax.jit(lambda key: weighted.network.init(key)["vision"]["pool"])(jax.random.key(0))
    weighted.params = {**mean.params, "vision": {**mean.params["vision"], "pool": start}}
    volumes = np.random.default_rng(0).integers(-1000, 1000, (2, 32, 32, 16)).astype("i2")
    np.testing.assert_allclose(weighted.encode_volume(volumes), mean.encode_volume(volumes),
                               atol=1e-5)
    with pytest.raises(UserError, match="did you mean 'mean'"):
        make_model(**{"model.vision.pool": "meen"})


def test_bank_initialisations():
    bank = models.init_bank(jax.random.key(0), 64, 16)
    np.testing.assert_allclose(bank.T @ bank, np.eye(16), atol=1e-5)
    assert np.abs(models.init_bank(jax.random.key(0), 64, 16, "uniform")).max() <= 0.1
    with pytest.raises(UserError, match="orthogonal"):
        models.init_bank(jax.random.key(0), 64, 16, "orthogonl")


def test_encoding_does_not_depend_on_the_batch(model):
    volumes = np.random.default_rng(0).integers(-1000, 1000, (5, 32, 32, 16)).astype("i2")
    whole = model.encode_volume(volumes)
    np.testing.assert_allclose(model.encode_volume(volumes, batch_size=2), whole, atol=1e-5)
    normalized = np.asarray(model.network.normalize(jnp.asarray(volumes)))
    np.testing.assert_allclose(model.encode_volume(normalized, normalized=True), whole, atol=1e-5)
    with pytest.raises(UserError, match="multiple of the patch"):
        model.encode_volume(volumes[:, :30])
    assert model.encode_text(PROMPTS).shape == (3, 48)


def test_texts_of_any_number_need_few_programs(model):
    texts = [f"There is {word}" for word in ("a", "no", "fluid", "air", "a mass") * 2]
    ids, mask = model.tokenizer(texts)
    model.encode_text_ids(ids[:5], mask[:5])
    before = model._text._cache_size()
    found = {count: model.encode_text_ids(ids[:count], mask[:count]) for count in range(5, 9)}
    assert model._text._cache_size() == before
    for count, rows in found.items():
        np.testing.assert_array_equal(rows, found[8][:count])
    in_parts = model.encode_text_ids(ids, mask, batch_size=4)
    assert in_parts.shape == (10, 48)
    np.testing.assert_allclose(in_parts[:8], found[8], atol=1e-5)
    assert model.encode_text([]).shape == (0, 48)


def test_saved_model_gives_the_same_numbers(model, tmp_path):
    save_model(model, tmp_path / "m")
    again = load_model(tmp_path / "m")
    volumes = np.random.default_rng(0).integers(-1000, 1000, (2, 32, 32, 16)).astype("i2")
    np.testing.assert_array_equal(again.encode_volume(volumes), model.encode_volume(volumes))
    np.testing.assert_array_equal(again.encode_text(PROMPTS), model.encode_text(PROMPTS))
    np.testing.assert_array_equal(again.bank, model.bank)
    assert load_model(tmp_path / "m", dtype="bfloat16").config.dtype == "bfloat16"


def test_batch_statistics_are_saved_and_read(tmp_path):
    model = make_model("brgsa_mgca", **{"model.head.name": "batchnorm"})
    plain, stats = model.encode_text(PROMPTS), random_stats(model.stats)
    model = models.Model(model.config, model.params, model.bank, model.tokenizer, stats)
    again = load_model(save_model(model, tmp_path / "m"))
    assert set(paths.flat(again.stats)) == set(paths.flat(stats)) and len(paths.flat(stats)) == 16
    volumes = np.random.default_rng(0).integers(-1000, 1000, (2, 32, 32, 16)).astype("i2")
    np.testing.assert_array_equal(again.encode_volume(volumes), model.encode_volume(volumes))
    np.testing.assert_array_equal(again.encode_text(PROMPTS), model.encode_text(PROMPTS))
    # The head, written out, on the statistics of the file.
    head, running = again.params["text_head"], again.stats["text_head"]
    ids, mask = again.tokenizer(PROMPTS)
    x = np.asarray(jax.jit(again.network.text.apply)(again.params["text"], ids, mask).pooled, "f8")
    x = x @ head["hidden"]["kernel"] + head["hidden"]["bias"]
    x = (x - running["hidden_norm"]["mean"]) / np.sqrt(running["hidden_norm"]["var"] + 1e-5)
    x = np.maximum(x * head["hidden_norm"]["scale"] + head["hidden_norm"]["bias"], 0)
    x = x @ head["out"]["kernel"] + head["out"]["bias"]
    x = (x - running["out_norm"]["mean"]) / np.sqrt(running["out_norm"]["var"] + 1e-5)
    np.testing.assert_allclose(again.encode_text(PROMPTS), x, atol=1e-5)
    assert np.abs(x - plain).max() > 0.1
    config = folder_config(tmp_path / "m")
    config["model"]["head"]["name"] = "linear"
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="text_head/linear/kernel is missing"):
        load_native(tmp_path / "m")


def folder_config(folder):
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("recipe", ["siglip", "mgca"])
def test_what_the_objective_learns_is_exported(recipe, tmp_path):
    tokenizer = tokenizer_of_prompts()
    config = small(recipe, **{"model.text.vocab": len(tokenizer), "model.cross_attention_heads": 2,
                              "optim.ema": 0.9})
    model = untrained_model(config, tokenizer)
    extras = {"siglip": ("logit",), "mgca": ("prototypes",)}[recipe] + ("cross_attention",)
    again = load_model(model.save(tmp_path / "m"))
    assert set(extras) <= set(again.params)
    saved, loaded = (paths.flat(m.params) for m in (model, again))
    for name, value in saved.items():
        np.testing.assert_array_equal(loaded[name], value, err_msg=name)
        assert loaded[name].shape == value.shape, name
    if recipe == "siglip":
        np.testing.assert_allclose(again.params["logit"]["log_scale"],
                                   np.log(config.model.logit.scale), rtol=1e-6)
        assert again.params["logit"]["bias"] == config.model.logit.bias < 0
    else:
        np.testing.assert_allclose(np.linalg.norm(again.params["prototypes"], axis=1), 1, rtol=1e-5)
    np.testing.assert_array_equal(again.encode_text(PROMPTS), model.encode_text(PROMPTS))


@pytest.mark.parametrize("tower", ["vit2d", "resnet50"])
def test_radiographs_are_grey_levels_or_network_input(tower, tmp_path):
    model = radiographs(tower)
    model = models.Model(model.config, model.params, None, model.tokenizer,
                         random_stats(model.stats))
    grey = np.random.default_rng(0).integers(0, 256, (3, 32, 48)).astype("u1")
    encoded = model.encode_volume(grey)
    assert encoded.shape == (3, 24) and np.ptp(encoded, axis=0).min() > 1e-4
    network = np.repeat(grey[:, None] / np.float32(127.5) - 1, 3, axis=1).astype("f4")
    for x in (network, list(network)):
        np.testing.assert_allclose(model.encode_volume(x), encoded, atol=1e-5)
    np.testing.assert_allclose(model.encode_volume(network, normalized=True), encoded, atol=1e-5)
    np.testing.assert_allclose(model.encode_volume(grey.astype("i2"), batch_size=2), encoded,
                               atol=1e-5)
    # Every channel of network input is read.
    network[:, 1] = 0
    assert np.abs(model.encode_volume(network) - encoded).max() > 1e-4
    for wrong in (grey[0], network[..., None], [1.0, 2.0], network[:, :1],
                  np.repeat(network, 2, axis=1)):
        with pytest.raises(UserError, match=r"\[B, H, W\], or \[B, 3, H, W\]"):
            model.encode_volume(wrong)
    for wrong, options, words in ((grey, {"normalized": True}, r"\[B, 3, H, W\]"),
                                  ([grey[0], grey[1, :16]], {}, "different shapes"),
                                  (["scan.nii"], {}, "which no file gives")):
        with pytest.raises(UserError, match=words):
            model.encode_volume(wrong, **options)
    if tower == "vit2d":
        with pytest.raises(UserError, match="multiple of the patch"):
            model.encode_volume(grey[:, :30])
    again = load_model(model.save(tmp_path / "m"))
    assert ("vision" in again.stats) == (tower == "resnet50")
    np.testing.assert_array_equal(again.encode_volume(grey), encoded)


def test_a_damaged_model_is_refused_in_one_sentence(model, tmp_path):
    folder = save_model(model, tmp_path / "m")
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace('"rows": 64', '"rows": 32'))
    with pytest.raises(UserError, match=r"bank has shape \(64, 48\), not \(32, 48\)"):
        load_native(folder)
    (folder / "config.json").write_text(text)
    (folder / "model.safetensors").write_bytes(b"x" * 20)
    with pytest.raises(UserError, match="cannot be read as safetensors"):
        load_native(folder)
    with pytest.raises(UserError, match="there is no model at"):
        load_model(tmp_path / "none")


def test_zero_shot_scores_are_the_cosines_of_the_contract(model):
    volumes = np.random.default_rng(0).integers(-1000, 1000, (2, 32, 32, 16)).astype("i2")
    v, t = model.encode_volume(volumes), model.encode_text(PROMPTS)

    def bridged(x):
        z = np.exp(x @ np.asarray(model.bank).T)
        return z / z.sum(1, keepdims=True) @ np.asarray(model.bank)

    def cos(a, b):
        return (a / np.linalg.norm(a, axis=1, keepdims=True)) @ (
            b / np.linalg.norm(b, axis=1, keepdims=True)).T

    expected = {"direct": cos(v, t), "bridged": cos(bridged(v), bridged(t)),
                "image_bridged": cos(bridged(v), t), "text_bridged": cos(v, bridged(t)),
                "mean": (cos(v, t) + cos(bridged(v), t)) / 2}
    for score, value in expected.items():
        result = zero_shot(model, volumes, PROMPTS, score=score)
        np.testing.assert_allclose(result.scores, value, atol=1e-5)
    assert result.ids == ["0", "1"] and result.prompts == PROMPTS and result.heatmaps is None
    for bad in ({"score": "man"}, {"prompts": []}):
        with pytest.raises(UserError):
            zero_shot(model, volumes, **{"prompts": PROMPTS, **bad})


def test_a_model_without_bank_scores_directly():
    model = make_model("clip")
    volumes = np.zeros((1, 32, 32, 16), "i2")
    assert model.bank is None
    mean, direct = (zero_shot(model, volumes, PROMPTS, score=s).scores for s in ("mean", "direct"))
    np.testing.assert_array_equal(mean, direct)
    with pytest.raises(UserError, match="bridged"):
        zero_shot(model, volumes, PROMPTS, score="bridged")


def test_unknown_encoder_lists_the_choices():
    config = small(**{"model.vision.name": "vit3"})
    with pytest.raises(UserError, match="did you mean 'vit3d'"):
        build(config.model)


def test_parameters_are_plain_nested_dicts(model):
    names = paths.flat(model.params)
    assert "vision/layers/blocks/query/kernel" in names and "text/word/embedding" in names
    assert models.parameter_count(model.params) == sum(a.size for a in names.values())
