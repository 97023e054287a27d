"""Weights to start from: fitted, resized and inflated, and what became of each is told."""

import json
from pathlib import Path

import drawn
import jax
import numpy as np
import pytest
from rich.console import Console
from safetensors.numpy import save_file
from test_trainer import config_for, data  # noqa: F401  (fixture)

from brgsa_jax import mesh as meshes
from brgsa_jax import paths
from brgsa_jax.config import UserError, get_config, override
from brgsa_jax.train import start, trainer
from brgsa_jax.train.start import new_state, untrained_model
from brgsa_jax.weights import import_checkpoint
from brgsa_jax.weights.initialise import (
    EXACT,
    RANDOM,
    inflate,
    initial_weights,
    resize_table,
    summary,
)

BRGSA = Path(__file__).parent / "golden/ckpt/brgsa_public"
FILE = str(BRGSA / "checkpoint.ckpt")
# The stored checkpoint's sizes.
SIZES = {"model.input.shape": (16, 16, 8), "data.crop": (16, 16, 8), "model.embed_dim": 48,
         "model.input.window": (-1000, 1000), "model.vision.patch": (4, 4, 2),
         "model.vision.stem": (), "model.vision.width": 64, "model.vision.depth": 2,
         "model.vision.heads": 4, "model.vision.mlp_width": 256, "model.vision.pool": "cls",
         "model.text.width": 48, "model.text.depth": 5, "model.text.heads": 4,
         "model.text.mlp_width": 96, "model.text.positions": 32, "model.text.vocab": 200,
         "model.text.max_tokens": 20, "model.bank.rows": 40, "data.batch_size": 8,
         "train.steps": 4}


def state_of(**changes):
    config = get_config("phantom:brgsa", **{**SIZES, **changes})
    return new_state(drawn.training(config, meshes.make_mesh(), per_epoch=2), config)


def leaves(state):
    return {path: np.asarray(x) for path, x in paths.flat(jax.device_get(state.model)).items()}


@pytest.fixture(scope="module")
def imported():
    model = import_checkpoint(BRGSA / "checkpoint.ckpt")
    return {path: np.asarray(x) for path, x in paths.flat(
        {"params": model.params, "bank": model.bank}).items()}


@pytest.fixture(scope="module")
def random():
    return leaves(state_of()[0])


def test_a_whole_checkpoint_is_started_from_and_lies_on_the_mesh(imported, random):
    state, fates = state_of(**{"model.init_from": FILE, "optim.ema": 0.9})
    ours = leaves(state)
    assert ours.keys() == imported.keys()
    for path, x in imported.items():
        np.testing.assert_array_equal(ours[path], x, err_msg=path)
        assert path.endswith(("bias", "cls")) or not np.array_equal(random[path], x) \
            or "norm" in path, path
    assert {fate.how for fate in fates} == {EXACT}
    assert state.bank.sharding.shard_shape((40, 48)) == (5, 48)
    for path, x in paths.flat(state.ema).items():
        np.testing.assert_array_equal(x, ours[path], err_msg=path)


def test_each_tower_may_start_by_itself(imported, random):
    for tower, rest in (("vision", "text"), ("text", "vision")):
        state, fates = state_of(**{f"model.{tower}.init_from": FILE})
        ours = leaves(state)
        for fate in fates:
            loaded = fate.path.startswith(f"params/{tower}/")
            assert fate.how == (EXACT if loaded else RANDOM), fate
            np.testing.assert_array_equal(
                ours[fate.path], (imported if loaded else random)[fate.path], err_msg=fate.path)
        rows = summary(fates)
        assert any(row[0] == tower and row[2] == EXACT and row[3] == FILE for row in rows)
        assert any(row[0] == rest and row[2] == RANDOM for row in rows)
        total = sum(int(row[1].replace(",", "")) for row in rows)
        assert total == sum(x.size for x in ours.values())


def test_other_grids_depths_and_lengths_are_fitted(imported, random):
    state, fates = state_of(**{
        "model.init_from": FILE, "model.input.shape": (24, 16, 8), "model.text.depth": 3,
        "model.text.positions": 24, "model.bank.rows": 48, "model.text.last_n_layers": 1})
    ours, how = leaves(state), {fate.path: fate.how for fate in fates}
    assert how["params/vision/positions"] == "resized from 4×4×4 to 6×4×4"
    assert ours["params/vision/positions"].shape == (1 + 96, 64)
    np.testing.assert_array_equal(ours["params/vision/positions"][0],
                                  imported["params/vision/positions"][0])
    assert how["params/text/layers/blocks/up/kernel"] == "first 3 of 5 layers"
    np.testing.assert_array_equal(ours["params/text/layers/blocks/up/kernel"],
                                  imported["params/text/layers/blocks/up/kernel"][:3])
    assert how["params/text/position/embedding"] == "first 24 of 32 rows"
    # Another number of rows is another bank.
    assert how["bank"] == RANDOM and ours["bank"].shape == (48, 48)


def test_what_does_not_fit_is_one_error_with_the_keys_to_change():
    with pytest.raises(UserError, match=r"init_from=.*checkpoint.ckpt does not fit.*"
                                        r"params/vision/layers/blocks/up/kernel.*"
                                        r"set model.vision.mlp_width=256, or choose others"):
        state_of(**{"model.vision.init_from": FILE, "model.vision.mlp_width": 128})
    with pytest.raises(UserError, match="it has 4 heads, model.text.heads=6"):
        state_of(**{"model.init_from": FILE, "model.text.heads": 6})
    with pytest.raises(UserError, match="does not fit.*layers"):
        state_of(**{"model.init_from": FILE, "model.text.depth": 6})
    with pytest.raises(UserError, match="table of 200 tokens and the tokenizer knows 190"):
        state_of(**{"model.text.init_from": FILE, "model.text.vocab": 190})
    with pytest.raises(UserError, match="norm_epsilon=1e-12 and .*; set model.text.norm_epsilon"):
        state_of(**{"model.text.init_from": FILE, "model.text.norm_epsilon": 1e-6})
    mgca = str(BRGSA.parent / "mgca_public/checkpoint.ckpt")
    with pytest.raises(UserError, match="set model.text.position_ids=zero"):
        state_of(**{"model.text.init_from": mgca, "model.text.vocab": 204})
    with pytest.raises(UserError, match="there is no model at .*none"):
        state_of(**{"model.init_from": "./none"})
    with pytest.raises(UserError, match="model.vision.inflate='men' must be one of mean, centre"):
        state_of(**{"model.vision.init_from": FILE, "model.vision.inflate": "men"})


@pytest.mark.parametrize("how", ["mean", "centre"])
@pytest.mark.parametrize("depth", [4, 5])
def test_inflated_kernels_answer_an_even_volume_as_the_flat_ones(how, depth):
    rng = np.random.default_rng(0)
    kernel, image = rng.normal(size=(3, 2, 3, 5)), rng.normal(size=(3, 2))
    inflated, _ = inflate(kernel, (3, 2), (2, 3, depth), 1, how)
    assert inflated.shape == (2, 3, depth, 1, 5)
    # Grey in all three channels; rows of the picture are Y, columns X.
    flat = np.einsum("hw,hwco->o", image, kernel)
    volume = np.repeat(image.T[..., None], depth, -1)
    np.testing.assert_allclose(np.einsum("xyz,xyzco->o", volume, inflated), flat, rtol=1e-5)
    used = np.abs(inflated).sum((0, 1, 3, 4)) > 0
    assert used.sum() == (depth if how == "mean" else 2 - depth % 2)


def test_windows_share_what_one_channel_had():
    kernel = np.random.default_rng(0).normal(size=(2, 2, 2, 1, 3))
    wide, told = inflate(kernel, (2, 2, 2), (2, 2, 2), 4, "mean")
    assert told == "1 to 4 channels"
    np.testing.assert_allclose(wide.sum(-2), kernel[..., 0, :])
    even, told = inflate(np.ones((2, 2, 3, 1)), (2, 2), (4, 4, 8), 3, "mean")
    assert told == "inflated to 3-D (mean), window 2×2 resized to 4×4"
    np.testing.assert_allclose(even.sum(), 2 * 2 * 3, rtol=1e-6)


def test_flat_positions_are_those_of_every_axial_slice():
    table = np.random.default_rng(0).normal(size=(1 + 2 * 3, 5)).astype("f4")
    wide, told = resize_table(table, (2, 3), (3, 2, 4))
    assert told == "resized from 2×3 to 3×2×4" and wide.shape == (1 + 24, 5)
    np.testing.assert_array_equal(wide[0], table[0])
    cube, flat = wide[1:].reshape(3, 2, 4, 5), table[1:].reshape(2, 3, 5)
    for z in range(4):
        np.testing.assert_array_equal(cube[:, :, z], flat.swapaxes(0, 1))
    with pytest.raises(UserError, match="2-D weights"):
        resize_table(np.zeros((9, 2), "f4"), (2, 2, 2), (4, 4))


@pytest.fixture(scope="module")
def flat_vit(tmp_path_factory):
    """A ViT of timm on RGB pictures of 8 x 8 pixels, patches 4 x 4."""
    rng, width = np.random.default_rng(0), 64
    shapes = {"cls_token": (1, 1, width), "pos_embed": (1, 5, width),
              "patch_embed.proj.weight": (width, 3, 4, 4), "patch_embed.proj.bias": (width,),
              "norm.weight": (width,), "norm.bias": (width,), "head.weight": (10, width),
              "head.bias": (10,)}
    for i in range(2):
        for name, shape in (("norm1", (width,)), ("norm2", (width,)),
                            ("attn.qkv", (3 * width, width)), ("attn.proj", (width, width)),
                            ("mlp.fc1", (256, width)), ("mlp.fc2", (width, 256))):
            shapes |= {f"blocks.{i}.{name}.weight": shape, f"blocks.{i}.{name}.bias": shape[:1]}
    path = tmp_path_factory.mktemp("vit") / "vit.safetensors"
    save_file({name: rng.normal(size=shape).astype("f4") for name, shape in shapes.items()},
              str(path))
    return path


def test_a_flat_vit_becomes_one_of_volumes(flat_vit):
    state, fates = state_of(**{"model.vision.init_from": str(flat_vit)})
    how = {fate.path: fate.how for fate in fates}
    assert how["params/vision/patch_embed/kernel"] == "3 to 1 channels, inflated to 3-D (mean)"
    assert how["params/vision/positions"] == "resized from 2×2 to 4×4×4"
    assert how["params/vision/layers/blocks/query/kernel"] == EXACT
    assert how["params/text/word/embedding"] == RANDOM
    kernel = leaves(state)["params/vision/patch_embed/kernel"].reshape(4, 4, 2, 1, 64)
    np.testing.assert_array_equal(kernel[:, :, 0], kernel[:, :, 1])


@pytest.mark.usefixtures("one_device")
def test_a_run_says_where_it_starts_and_starts_there(data, tmp_path, monkeypatch):  # noqa: F811
    for module in (start, trainer):
        monkeypatch.setattr(module, "make_training", drawn.training)
    changes = {key: value for key, value in SIZES.items() if key != "model.text.vocab"}
    config = override(config_for(data, recipe="phantom:brgsa"), {
        **changes, "model.input.shape": (32, 32, 16), "data.crop": (32, 32, 16),
        "model.init_from": FILE, "optim.freeze": ("params/text/.*",), "train.steps": 2,
        "optim.clip": 0.0})
    console = Console(width=160, record=True)
    trainer.train(config, tmp_path / "run", console=console)
    told = console.export_text()
    assert "weights to start from" in told and "resized from 4×4×4 to 8×8×8" in told
    rows = json.loads((tmp_path / "run/initialised.json").read_text())
    assert {"path", "count", "how", "source"} == set(rows[0])
    # Its tokenizer came along, and the frozen text tower is the checkpoint's.
    model = trainer_model(tmp_path / "run")
    original = import_checkpoint(BRGSA / "checkpoint.ckpt")
    assert len(model.tokenizer) == 200
    for path, x in paths.flat(original.params["text"]).items():
        np.testing.assert_array_equal(paths.flat(model.params["text"])[path], x, err_msg=path)
    untrained = untrained_model(override(config, {"model.text.vocab": 200}), model.tokenizer)
    np.testing.assert_array_equal(untrained.bank, original.bank)


def trainer_model(workdir):
    from brgsa_jax.predict import load_model

    return load_model(workdir)


def test_a_finished_run_is_a_place_to_start_from(tmp_path):
    config = get_config("phantom:brgsa", **SIZES)
    model = untrained_model(config, import_checkpoint(BRGSA / "checkpoint.ckpt").tokenizer)
    model.save(tmp_path / "run/model")
    for place in (tmp_path / "run", tmp_path / "run/model"):
        arrays, fates = initial_weights(
            override(config.model, {"init_from": str(place)}),
            jax.eval_shape(lambda: {"params": model.params, "bank": model.bank}))
        assert {fate.how for fate in fates} == {EXACT}
        np.testing.assert_array_equal(arrays["bank"], model.bank)
