"""Every recipe at its full size, shapes only; a small ResNet whose statistics are fixed."""

import drawn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_model import small_radiographs
from test_step import make_batch

from brgsa_jax import mesh as meshes
from brgsa_jax import paths
from brgsa_jax.config import get_config, recipes, validate
from brgsa_jax.model import parameter_count
from brgsa_jax.train import step as steps

VOCAB = 30522
# Affine map, BatchNorm, affine map: what MGCA's heads hold from a width to 128.
HEAD = lambda width: (width + 1) * 2048 + 2 * 2048 + (2048 + 1) * 128  # noqa: E731
VIT_2D = 85_798_656
RESNET, TEXT, SHORT_TEXT = 23_508_032, 108_891_648, 66_362_880
VIT_3D = VIT_2D - (3 * 16 * 16 + 1) * 768 - 196 * 768 + (16 * 16 * 8 + 1) * 768 + 4096 * 768
LINEAR = 768 * 768 + 768


def vit(width, depth):
    """A 3-D ViT: patches, CLS, positions, blocks of 12 W² + 13 W, final norm."""
    return (16 * 16 * 8 + 1 + 1 + 4097 + 2) * width + depth * (12 * width + 13) * width


def resnet3d(blocks, bottleneck):
    unit = lambda size, before, after: size**3 * before * after + 2 * after  # noqa: E731
    total, before = unit(7, 1, 64), 64
    for stage, count in enumerate(blocks):
        width = 64 * 2**stage
        for block in range(count):
            after = 4 * width if bottleneck else width
            total += (unit(1, before, width) + unit(3, width, width) + unit(1, width, after)
                      if bottleneck else unit(3, before, width) + unit(3, width, width))
            if block == 0 and before != after:
                total += unit(1, before, after)
            before = after
    return total


# Recipe -> parameters of vision, text, vision_head and vision_local_head.
SIZES = {
    "brgsa": (VIT_3D, TEXT, LINEAR, 0), "brgsa_paper": (VIT_3D, TEXT, LINEAR, 0),
    "clip": (VIT_3D, TEXT, LINEAR, 0), "siglip": (VIT_3D, TEXT, LINEAR, 0),
    "brgsa:vit3d_s": (vit(384, 12), TEXT, 385 * 768, 0),
    "clip:vit3d_l": (vit(1024, 24), TEXT, 1025 * 768, 0),
    "brgsa:resnet3d18": (resnet3d((2, 2, 2, 2), False), TEXT, 513 * 768, 0),
    "siglip:resnet3d50": (resnet3d((3, 4, 6, 3), True), TEXT, 2049 * 768, 0),
    "brgsa_mgca": (VIT_3D, TEXT, LINEAR, HEAD(768) + (768 - 128) * 2049),
    "mgca": (VIT_2D, TEXT, HEAD(768), HEAD(768)),
    "mgca:3d": (VIT_3D, TEXT, HEAD(768), HEAD(768)),
    "mgca:resnet50": (RESNET, TEXT, HEAD(2048), HEAD(1024)),
    "mgca_paper": (VIT_2D, SHORT_TEXT, HEAD(768), HEAD(768)),
    "mgca_paper:resnet50": (RESNET, SHORT_TEXT, HEAD(2048), HEAD(1024)),
}


def test_every_recipe_is_here():
    # The recipe finetune trains something else; see test_finetune.
    assert {name.partition(":")[0] for name in SIZES} == set(recipes()) - {
        "phantom", "ablations", "finetune"}


@pytest.mark.parametrize("name", SIZES)
def test_a_step_of_the_recipe_has_the_published_sizes(name):
    config = validate(get_config(name, **{"model.text.vocab": VOCAB, "train.steps": 100}))
    training = steps.make_training(config, meshes.make_mesh(), per_epoch=10)
    state, model = training.abstract, config.model
    params = state.params
    sizes = [parameter_count(params.get(part, {})) for part in (
        "vision", "text", "vision_head", "vision_local_head")]
    assert sizes == list(SIZES[name])
    assert (state.bank is None) == (not model.bank.rows)
    if state.bank is not None:
        assert state.bank.shape == (2048, 768)
        assert state.bank.sharding.shard_shape(state.bank.shape) == (256, 768)
    assert ("prototypes" in params) == ("mgca" in name)
    if "mgca" in name:
        assert params["prototypes"].shape == (500, model.embed_dim)

    size, length = config.data.batch_size, model.text.max_tokens
    tokens = jax.ShapeDtypeStruct((size, length), jnp.int32)
    batch = steps.Batch(
        jax.ShapeDtypeStruct((size, *config.data.crop),
                             jnp.uint8 if len(config.data.crop) == 2 else jnp.int16),
        tokens, tokens, tokens, jax.ShapeDtypeStruct((size, 3), jnp.int32))
    after, metrics = jax.eval_shape(training.train_step, state, batch)
    before = {path: (leaf.shape, leaf.dtype) for path, leaf in paths.flat(state).items()}
    assert {path: (leaf.shape, leaf.dtype) for path, leaf in paths.flat(after).items()} == before
    assert {value.shape for value in metrics.values()} == {()}
    assert {"loss", "grad_norm", "batch/top1"} <= set(metrics)
    terms = {"info_nce": "image_to_text", "sigmoid": "sigmoid", "token_alignment": "patch",
             "knowledge_interaction": "mse_image", "prototype_alignment": "prototype_image_to_text"}
    for term, value in terms.items():
        assert (term in config.losses) <= (value in metrics), term


def test_frozen_statistics_allow_chunks_and_running_ones_are_those_of_validation():
    """A small ResNet: its fixed statistics go into every chunk; those of the heads move."""
    mesh = meshes.make_mesh(2, 1, jax.devices()[:2])
    results = {}
    for chunks in (0, 2):
        config = small_radiographs("resnet50", **{
            "model.vision.norm": "frozen", "train.microbatch": chunks, "optim.warmup": 0,
            "train.steps": 10})
        training = steps.make_training(config, mesh, per_epoch=10)
        state = drawn.state(training)
        before = jax.device_get(state.stats)
        state, metrics = training.train_step(state, make_batch(config))
        results[chunks] = jax.device_get((metrics, state.params, state.stats))
        after = results[chunks][2]
        for name, value in paths.flat(before).items():
            moved = np.abs(paths.flat(after)[name] - value).max() > 0
            assert moved != name.startswith("vision/"), name
    for ours, expected in zip(*(jax.tree.leaves(results[c][::2]) for c in (2, 0)), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5)
    with_running, shifted = (
        float(training.eval_step(state.replace(stats=stats), make_batch(config))["loss"])
        for stats in (state.stats, drawn.state(training).stats))
    assert abs(with_running - shifted) > 1e-4
