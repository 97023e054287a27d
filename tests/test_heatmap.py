"""Heat-maps: rollout against explicit attention, files on the grid of the scan, pictures."""

import functools
import io

import jax
import jax.numpy as jnp
import nibabel
import numpy as np
import pytest
from PIL import Image
from test_model import PROMPTS, drawn_model, make_model, small_radiographs, tokenizer_of_prompts

from brgsa_jax.config import UserError
from brgsa_jax.data.placement import Placement
from brgsa_jax.evals import heatmap
from brgsa_jax.evals.run import bridge
from brgsa_jax.evals.scores import SCORE_MODES, score_matrix
from brgsa_jax.losses.knowledge import read_bank
from brgsa_jax.nn.rollout import look_inside

SHAPE = (32, 32, 16)


def volumes(count=1, shape=SHAPE):
    return np.random.default_rng(0).integers(-1000, 800, (count, *shape)).astype(np.int16)


@functools.cache
def model_of(pool):
    return make_model(**{"model.vision.pool": pool})


def layer_norm(p, x, epsilon):
    x = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + epsilon)
    return x * p["scale"] + p["bias"]


def explicit_map(model, volume, prompt):
    """Chefer's relevance with every attention map and its gradient as arrays, and HiResCAM."""
    vision, params = model.config.vision, model.params["vision"]
    network, t = model.network, jnp.asarray(model.encode_text([prompt]))[0]
    x = network.normalize(jnp.asarray(volume)[None])[0]
    px, py, pz = vision.patch
    gx, gy, gz = (n // p for n, p in zip(SHAPE, vision.patch, strict=True))
    x = x.reshape(gx, px, gy, py, gz, pz).transpose(0, 2, 4, 1, 3, 5).reshape(gx * gy * gz, -1)

    def dense(p, x):
        return x @ p["kernel"] + p["bias"]

    x = dense(params["patch_embed"], x)
    blocks = params["layers"]["blocks"]

    def forward(extra, x):
        """(score, places, attention) with `extra` added to what is asked about."""
        maps, cells = [], x
        x = jnp.concatenate([params["cls"][0], x + extra["cells"]]) + params["positions"]
        for number in range(vision.depth):
            p = jax.tree.map(lambda leaf, number=number: leaf[number], blocks)
            y = layer_norm(p["attention_norm"], x, 1e-6)
            q, k, v = (dense(p[name], y).reshape(len(y), vision.heads, -1).swapaxes(0, 1)
                       for name in ("query", "key", "value"))
            weights = jax.nn.softmax(q @ k.swapaxes(1, 2) / q.shape[-1] ** 0.5)
            maps.append(weights)
            mixed = (weights + extra["maps"][number]) @ v
            x = x + dense(p["out"], mixed.swapaxes(0, 1).reshape(len(y), -1))
            y = layer_norm(p["mlp_norm"], x, 1e-6)
            x = x + dense(p["down"], jax.nn.gelu(dense(p["up"], y), approximate=False))
        places = layer_norm(params["norm"], x, 1e-5)
        tapped = places + extra["places"]
        pooled = {"cls": lambda: tapped[0], "mean": lambda: tapped[1:].mean(0),
                  "weighted": lambda: (tapped[1:] * params["pool"]).mean(0)}[vision.pool]()
        embedded = dense(model.params["vision_head"]["linear"], pooled)
        bridged = read_bank(embedded[None], model.bank).reconstruction[0]
        cosines = [a @ t / jnp.linalg.norm(a) / jnp.linalg.norm(t) for a in (embedded, bridged)]
        return 0.5 * sum(cosines), (places, maps, pooled, cells)

    tokens = len(x) + 1
    extra = {"maps": [jnp.zeros((vision.heads, tokens, tokens))] * vision.depth,
             "places": jnp.zeros((tokens, x.shape[1])), "cells": jnp.zeros(x.shape)}
    slopes, (places, maps, pooled, cells) = jax.jit(jax.grad(forward, has_aux=True))(extra, x)
    relevance = jnp.eye(tokens)
    for weights, slope in zip(maps, slopes["maps"], strict=True):
        relevance = relevance + jnp.maximum(weights * slope, 0).mean(0) @ relevance
    if vision.pool == "cls":
        top = relevance[0]
    else:
        top = jnp.maximum((places * slopes["places"]).sum(-1), 0) @ relevance
    cam = jnp.maximum((cells * slopes["cells"]).sum(-1), 0)
    return np.asarray(top[1:]), np.asarray(cam), np.asarray(pooled)


@pytest.mark.parametrize("pool", ["cls", "weighted"])
def test_rollout_is_that_of_explicit_attention_maps(pool):
    model, volume = model_of(pool), volumes()[0]
    wanted, cam, pooled = explicit_map(model, volume, PROMPTS[1])
    found = heatmap.heatmaps(model, volume[None], PROMPTS)
    assert found.shape == (1, 3, *SHAPE) and found.dtype == np.float32 and found.min() >= 0
    resized = jax.image.resize(wanted.reshape(2, 2, 2), SHAPE, "linear", antialias=False)
    np.testing.assert_allclose(found[0, 1], resized, rtol=2e-4, atol=2e-6 * wanted.max())
    assert np.abs(found[0, 0] / found[0, 0].max() - found[0, 1] / found[0, 1].max()).max() > 0.03
    if pool == "cls":
        return
    cam_found = heatmap.heatmaps(model, volume[None], PROMPTS[1:2], method="cam")[0, 0]
    resized = jax.image.resize(cam.reshape(2, 2, 2), SHAPE, "linear", antialias=False)
    np.testing.assert_allclose(cam_found, resized, rtol=2e-4, atol=2e-5 * cam.max())
    # What looks inside changes nothing.
    network, image = model.network, model.network.normalize(volume[None])
    output, inside = look_inside(lambda: network.vision.apply(model.params["vision"], image))
    np.testing.assert_allclose(output.pooled[0], pooled, atol=1e-4)
    assert inside.places.shape == (1, 9, 48) and inside.query.shape == (2, 1, 9, 48)


def test_a_stem_gives_maps_of_its_cells():
    model = make_model(**{"model.vision.stem": (((4, 4, 4), 8),), "model.vision.depth": 1,
                          "model.vision.pool": "weighted"})
    assert heatmap.automatic(model) == "cam" != heatmap.automatic(model_of("cls"))
    look = jax.jit(lambda volume: look_inside(lambda: model.network.vision.apply(
        model.params["vision"], model.network.normalize(volume)))[1].cells)
    volume = volumes()
    changed = volume.copy()
    changed[0, 21:23, 6, 14] = 900
    moved = jnp.abs(look(changed) - look(volume)).reshape(8, 4 * 4 * 2, 8).sum(-1)
    where = np.argwhere(heatmap.spread(moved, (2, 2, 2), (4, 4, 2)))
    np.testing.assert_array_equal(where, [[5, 1, 3]])
    found = heatmap.heatmaps(model, volume, PROMPTS[:1])[0, 0]
    # The map is the one of 8 × 8 × 4 cells, linear between their centres.
    np.testing.assert_allclose(found[5, 9, 5], found[4:8, 9, 5] @ [0, 1, 0, 0])
    assert len(np.unique(found[1::4, 1::4, 1::4])) > 50


def test_a_pooled_place_is_scored_as_if_it_were_alone():
    model, volume = model_of("weighted"), volumes()[0]
    output, inside = look_inside(lambda: model.network.vision.apply(
        model.params["vision"], model.network.normalize(volume[None])))
    alone = inside.places[0, 1:] * model.params["vision"]["pool"]
    np.testing.assert_allclose(alone.mean(0), output.pooled[0], atol=1e-5)
    head = model.params["vision_head"]["linear"]
    v = np.asarray(alone @ head["kernel"] + head["bias"])
    scores = score_matrix(v, model.encode_text(PROMPTS), bridge(model, v))
    found = heatmap.heatmaps(model, volume[None], PROMPTS, method="similarity")[0]
    wanted = (scores - scores.min(0)).T.reshape(3, 2, 2, 2)
    np.testing.assert_allclose(found[:, 8::16, 8::16, 4::8],
                               np.asarray(jax.image.resize(jnp.asarray(wanted, "f4"), (3, *SHAPE),
                                                           "linear"))[:, 8::16, 8::16, 4::8],
                               atol=1e-5)
    assert found.min() == 0


@pytest.mark.parametrize("recipe", ["brgsa", "clip"])
def test_scores_are_linear_in_their_directions(recipe):
    model = make_model(recipe)
    v = np.random.default_rng(1).normal(size=(4, 48)).astype("f4")
    t = model.encode_text(PROMPTS)
    v_hat, t_hat = bridge(model, v), bridge(model, t)

    def unit(x):
        return x / np.linalg.norm(x, axis=1, keepdims=True)

    for mode in SCORE_MODES if recipe == "brgsa" else ("direct",):
        found = heatmap.directions(model, PROMPTS, score=mode)
        scores = unit(v) @ found.direct.T
        if v_hat is not None:
            scores += unit(v_hat) @ found.bridged.T
        np.testing.assert_allclose(scores, score_matrix(v, t, v_hat, t_hat, mode), atol=1e-5)
    if recipe == "clip":
        assert heatmap.directions(model, PROMPTS).bridged.max() == 0
        with pytest.raises(UserError, match="'bridged' is not available"):
            heatmap.directions(model, PROMPTS, score="bridged")


def test_radiographs_have_grad_cam_and_word_similarity():
    model = drawn_model(small_radiographs(
        "resnet50", **{"model.text.vocab": len(tokenizer_of_prompts())}))
    image = np.random.default_rng(0).integers(0, 255, (1, 32, 48)).astype(np.uint8)
    found = heatmap.heatmaps(model, image, PROMPTS[:2])
    network, stats = model.network, model.stats
    output, inside = look_inside(lambda: network.vision.apply(
        model.params["vision"], network.normalize(image), stats=stats["vision"]))
    np.testing.assert_allclose(inside.places.mean((1, 2)), output.pooled, atol=1e-5)
    np.testing.assert_allclose(inside.before.reshape(1, -1, inside.before.shape[-1]),
                               output.tokens, atol=1e-5)
    t = model.encode_text(PROMPTS[:1])[0]

    def score(pooled):
        v = network.parts["vision_head"].apply(model.params["vision_head"], pooled,
                                               stats=stats["vision_head"])[0]
        return v @ t / jnp.linalg.norm(v) / np.linalg.norm(t)

    slope = jax.grad(score)(output.pooled)[0]
    places = inside.places[0]
    cam = np.maximum(places @ slope, 0) / places[..., 0].size
    wanted = jax.image.resize(cam, (32, 48), "linear", antialias=False)
    np.testing.assert_allclose(found[0, 0], wanted, atol=1e-4 * wanted.max())
    similar = heatmap.heatmaps(model, image, PROMPTS[:2], method="similarity")
    assert similar.shape == (1, 2, 32, 48) and similar.min() >= 0 and similar.max() > 0
    picture = Image.open(io.BytesIO(heatmap.overlay(image[0], found[0, 0])))
    assert picture.size == (48, 32)


def test_unusable_requests_are_refused():
    model = model_of("weighted")
    for asked, words in (({"method": "magic"}, "method 'magic'"), ({"score": "odd"}, "score 'odd'"),
                         ({"prompts": []}, "no prompt"),
                         ({"volumes": volumes(shape=(16, 16, 16))}, "none of this model")):
        options = {"volumes": volumes(), "prompts": PROMPTS, **asked}
        with pytest.raises(UserError, match=words):
            heatmap.heatmaps(model, **options)
    with pytest.raises(ValueError, match="neither a ViT nor a ResNet"):
        look_inside(lambda: None)


def test_a_written_map_lies_on_the_grid_of_the_file(tmp_path):
    affine = np.array([[0, 0, 2.5, -30], [-1.2, 0, 0, 55], [0, 1.7, 0, 7], [0, 0, 0, 1]])
    canonical = np.diag([-4.0, -4.0, 4.0, 1.0])
    canonical[:3, 3] = [20, 50, 8]
    heat = np.random.default_rng(0).random((14, 12, 10)).astype(np.float32)
    placement = Placement((31, 20, 17), affine, None, canonical)
    path = heatmap.write_map(tmp_path / "new" / "m.nii.gz", heat, placement)
    image = nibabel.load(path)
    np.testing.assert_allclose(image.affine, affine)
    assert image.shape == placement.shape and image.header.get_xyzt_units()[0] == "mm"
    np.testing.assert_allclose(image.get_fdata(), heatmap.to_source(heat, placement),
                               atol=heat.max() / 60000)
    again = heatmap.write_map(tmp_path / "again.nii.gz", heat, placement)
    assert again.read_bytes() == path.read_bytes()
    heatmap.write_map(path, 0 * heat, placement)
    assert not nibabel.load(path).get_fdata().any()


def test_the_overlay_colours_the_three_planes_through_the_maximum():
    volume = np.full((40, 40, 40), -1000, np.int16)
    heat = np.zeros((40, 40, 40), np.float32)
    heat[28:32, 8:12, 18:22] = 1
    heat[29, 9, 19] = 2
    plain = heatmap.overlay(volume, 0 * heat, (1, 1, 1), "a $ <b>", width=600)
    shown = heatmap.overlay(volume, heat, (1, 1, 1), "a $ <b>", width=600)
    pixels, before = (np.asarray(Image.open(io.BytesIO(png)).convert("RGB"), float)
                      for png in (shown, plain))
    changed = np.abs(pixels - before).max(-1) > 30
    # Two rows of windows, three planes each; every plane holds the mark.
    rows, columns = changed.any(1), changed.any(0)
    edges = [np.count_nonzero(np.diff(line.astype(int)) == 1) for line in (rows, columns)]
    assert edges[1] == 3 and edges[0] >= 2 and changed.mean() < 0.2
    red, _, blue = pixels[changed].mean(0)
    assert red > blue
    # In the axial plane the mark is on the patient's left, the picture's right, and in front.
    axial = changed[:, :200]
    assert axial[:, 100:].sum() > 20 * max(1, axial[:, :100].sum())
    with pytest.raises(ValueError, match="a map of shape"):
        heatmap.overlay(volume, heat[1:], (1, 1, 1))
