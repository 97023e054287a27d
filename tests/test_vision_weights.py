"""Vision encoders from the files people have: what the originals computed, stored; and refusals."""

import json
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from brgsa_jax import registry
from brgsa_jax.config import UserError
from brgsa_jax.nn.resnet import ResNet
from brgsa_jax.weights import import_checkpoint
from brgsa_jax.weights.tensors import open_tensors
from brgsa_jax.weights.vision import read_vision

GOLDEN = Path(__file__).parent / "golden"
VIT, CHECKPOINTS = GOLDEN / "vit", GOLDEN / "ckpt"
# What no tensor tells.
HEADS = {"timm": 3, "mae": 4}


def close(ours, expected, tolerance=1e-5):
    """Largest error over the largest entry."""
    ours, expected = np.asarray(ours, np.float64), np.asarray(expected, np.float64)
    assert ours.shape == expected.shape
    assert np.abs(ours - expected).max() <= tolerance * np.abs(expected).max()


def run(weights, image, **options):
    """Runs the encoder that weights were read for, channels first."""
    sizes = dict(weights.sizes)
    channels = sizes.pop("channels")
    assert image.shape[1] == channels
    if weights.kind == "vit":
        grid = sizes.pop("grid")
        module = registry.get("vision", "vit2d")(input_shape=image.shape[2:], base_grid=grid,
                                                 **{**sizes, **options})
    else:
        module = ResNet(**sizes, channels_first=True)
    variables = {"params": weights.params, "batch_stats": weights.stats}
    return jax.jit(module.apply)(variables, image.astype("f4"))


@pytest.mark.parametrize("file", [
    "timm.safetensors", "mae.pth", "hf_vit", "hf_mae", "resnet_basic.safetensors",
    "resnet_bottleneck.pth", "monai_basic.safetensors", "monai_bottleneck.pth"])
def test_equals_the_original(file):
    name = file.partition(".")[0]
    weights = read_vision(VIT / file)
    with np.load(VIT / f"{name}.npz") as io:
        options = {"heads": HEADS[name]} if name in HEADS else {}
        tower = run(weights, io["image"], **options)
        close(tower.pooled, io["pooled"])
        close(tower.tokens, io["tokens"])
    assert weights.path.name.partition(".")[0] in (name, "model")
    leaves = jax.tree.leaves((weights.params, weights.stats))
    assert leaves and all(leaf.dtype == np.float32 for leaf in leaves)


def test_sizes_are_the_files_own():
    assert read_vision(VIT / "timm.safetensors").sizes == {
        "patch": (8, 4), "grid": (3, 3), "channels": 3, "width": 18, "depth": 3, "mlp_width": 36,
        "heads": None, "norm_epsilon": 1e-6, "block_epsilon": 1e-6}
    assert read_vision(VIT / "hf_vit").sizes == {
        "patch": (8, 8), "grid": (3, 2), "channels": 2, "width": 16, "depth": 2, "mlp_width": 24,
        "heads": 2, "norm_epsilon": 1e-4, "block_epsilon": 1e-4}
    assert read_vision(VIT / "monai_basic.safetensors").sizes == {
        "stages": (1, 1, 2, 1), "block": "basic", "width": 2, "channels": 1, "rank": 3}


@pytest.mark.parametrize("key", ["norm_epsilon", "block_epsilon"])
def test_both_epsilons_count(key):
    weights = read_vision(VIT / "hf_vit")
    weights.sizes[key] = 1e-6
    with np.load(VIT / "hf_vit.npz") as io, pytest.raises(AssertionError):
        close(run(weights, io["image"]).pooled, io["pooled"])


# Encoders that are parts of something larger.

def tensors_of(path):
    opened = open_tensors(path)
    return {name: opened.read(name) for name in opened.specs}


@pytest.mark.parametrize("name", ["brgsa", "mgca"])
def test_a_checkpoint_gives_its_vision_encoder_alone(name):
    path = CHECKPOINTS / f"{name}_public/checkpoint.ckpt"
    found, whole = read_vision(path), import_checkpoint(path)
    jax.tree.map(np.testing.assert_array_equal, whole.params["vision"], found.params)
    told = whole.config.vision
    assert found.sizes["norm_epsilon"] == told.get("norm_epsilon", 1e-5)
    for key in ("patch", "width", "depth", "mlp_width"):
        assert found.sizes[key] == told[key]
    assert found.sizes["grid"] == (4,) * len(told.patch) and found.sizes["heads"] is None


def test_a_resnet_of_mgca_is_found(tmp_path):
    state = tensors_of(VIT / "resnet_basic.safetensors")
    path = tmp_path / "mgca.safetensors"
    save_file({**{f"img_encoder_q.model.{name}": x for name, x in state.items()},
               "text_encoder_q.model.embeddings.word_embeddings.weight": np.zeros((3, 2)),
               "img_encoder_q.global_embed.head.0.weight": np.zeros((3, 2))}, path)
    found, plain = read_vision(path), read_vision(VIT / "resnet_basic.safetensors")
    jax.tree.map(np.testing.assert_array_equal, (plain.params, plain.stats),
                 (found.params, found.stats))


@pytest.mark.parametrize("prefix", ["vision_encoder.", "module.", "module.model."])
def test_a_volume_encoder_of_a_pre_training_is_found(tmp_path, prefix):
    """As M3AE's: another prefix, and decoders and a language encoder beside it."""
    inside = "gloria.img_encoder.model."
    state = {name.removeprefix(inside): x
             for name, x in tensors_of(CHECKPOINTS / "brgsa_public/checkpoint.ckpt").items()
             if name.startswith(inside)}
    assert "pos_embed" in state
    path = tmp_path / "m3ae.safetensors"
    save_file({**{prefix + name: x for name, x in state.items()},
               f"{prefix}decoder_pos_embed": np.zeros((1, 2, 2)), f"{prefix}mask_token": np.ones(1),
               "language_encoder.embeddings.word_embeddings.weight": np.zeros((3, 2)),
               "mim_head.decoder.0.weight": np.zeros(2)}, path)
    found = read_vision(path)
    jax.tree.map(np.testing.assert_array_equal,
                 read_vision(CHECKPOINTS / "brgsa_public/checkpoint.ckpt").params, found.params)
    assert found.sizes["norm_epsilon"] == 1e-6 and found.sizes["patch"] == (4, 4, 2)


# Files that are refused: one sentence that names the file.

def refused(path, match):
    with pytest.raises(UserError, match=match) as error:
        read_vision(path)
    message = str(error.value)
    assert "\n" not in message and Path(str(path)).name in message


def changed(tmp_path, change, source="timm.safetensors"):
    state = tensors_of(VIT / source)
    save_file(change(state) or state, tmp_path / "changed.safetensors")
    return tmp_path / "changed.safetensors"


@pytest.mark.parametrize(("name", "feature"), [
    ("dist_token", "a distillation token"),
    ("reg_token", "register tokens"),
    ("register_tokens", "register tokens"),
    ("blocks.1.ls1.gamma", "layer scale"),
    ("blocks.0.gamma_2", "layer scale"),
    ("blocks.0.attn.q_norm.weight", "normalised queries and keys"),
    ("blocks.0.mlp.w12.weight", r"a gated MLP \(SwiGLU\)"),
    ("blocks.0.mlp.fc1_g.weight", r"a gated MLP \(SwiGLU\)"),
    ("blocks.0.attn.relative_position_bias_table", "relative positions"),
    ("blocks.0.attn.rel_pos_h", "relative positions"),
    ("norm_pre.weight", "a norm before its blocks"),
    ("attn_pool.q.weight", "pooling by attention"),
    ("fc_norm.weight", "a norm after pooling"),
    ("layer1.0.se.fc1.weight", "squeeze and excitation"),
    ("conv1.3.weight", "a stem of several convolutions"),
])
def test_a_part_that_no_encoder_here_has_is_named(tmp_path, name, feature):
    source = "resnet_basic.safetensors" if "layer1" in name or "conv1" in name else (
        "timm.safetensors")
    refused(changed(tmp_path, lambda state: state | {name: np.ones(1)}, source),
            f"changed.safetensors is an encoder with {feature}, which no encoder here has")


def gate(state):
    for index in range(3):
        state[f"blocks.{index}.mlp.fc2.weight"] = np.zeros((18, 18), "f4")


def rows(count):
    def change(state):
        state["pos_embed"] = np.resize(state["pos_embed"], (1, count, 18))
    return change


def without(pattern):
    return lambda state: {name: x for name, x in state.items() if not re.search(pattern, name)}


def shaped(name, *shape):
    return lambda state: state | {name: np.zeros(shape, "f4")}


@pytest.mark.parametrize(("change", "match"), [
    (gate, r"a gated MLP \(SwiGLU\)"),
    (rows(9), "without a row for CLS in its position table"),
    (rows(13), "12 positions are no grid of equal sides"),
    (rows(1), "without a row for CLS"),
    (shaped("pos_embed", 18), "pos_embed with 3 axes is missing"),
    (shaped("patch_embed.proj.weight", 18), "patch_embed.proj.weight with 4 or 5 axes is missing"),
    (shaped("patch_embed.proj.weight", 18, 0, 8, 4), "with 4 or 5 axes is missing"),
    (shaped("blocks.0.mlp.fc1.weight"), "blocks.0.mlp.fc1.weight with 2 axes is missing"),
    (shaped("blocks.0.mlp.fc2.weight"), r"blocks.0.mlp.fc2.weight has shape \[\], not \[18, 36\]"),
    (shaped("blocks.999999999.mlp.fc2.bias", 18), r"blocks.3.norm1.weight is missing"),
    (without("cls_token|blocks.2.norm1"), "cls_token is missing; blocks.2.norm1.weight is missing"),
    (without("pos_embed"), "not hold a whole vision encoder: pos_embed is missing"),
    (without("blocks"), "not hold a whole vision encoder: blocks.0.mlp.fc1.weight is missing"),
    (without("patch_embed"), "holds no vision encoder that is known: its .* a ResNet of"),
    (lambda state: state | {"blocks.0.adapter.weight": np.ones(1)},
     "blocks.0.adapter.weight is unknown"),
    (lambda state: {f"{tower}.{name}": x for name, x in state.items()
                    for tower in ("base_encoder", "momentum_encoder")},
     r"holds 2 vision encoders .*momentum_encoder.patch_embed.*the one you want alone"),
])
def test_a_damaged_or_foreign_vit_is_refused(tmp_path, change, match):
    refused(changed(tmp_path, change), match)


def widened(state):
    state["layer1.0.conv1.weight"] = np.zeros((4, 2, 3, 3), "f2")


@pytest.mark.parametrize(("change", "match"), [
    (widened, "wider or grouped convolutions"),
    (shaped("conv1.weight"), "wider or grouped"),
    (shaped("conv1.weight", 2, 3), "conv1.weight with 4 or 5 axes is missing"),
    (shaped("layer2.99999999.conv1.weight", 2), "layer2.1.conv1.weight is missing"),
    (without("downsample"), r"shortcuts without weights \(type A\)"),
    (without("running_mean"), "bn1.running_mean is missing"),
    (without("layer3.0.downsample.0"), "layer3.0.downsample.0.weight is missing"),
    (lambda state: {name: x for name, x in state.items() if not name.startswith("conv1")},
     "not hold a whole vision encoder: conv1.weight is missing"),
])
def test_a_damaged_or_foreign_resnet_is_refused(tmp_path, change, match):
    refused(changed(tmp_path, change, "resnet_basic.safetensors"), match)


@pytest.mark.parametrize(("config", "match"), [
    ({"model_type": "dinov2"}, "type 'dinov2'.*give one of the type vit or vit_mae"),
    ({"hidden_act": "gelu_new"}, "hidden_act='gelu_new', which would be computed wrongly"),
    ({"num_attention_heads": 3}, "num_attention_heads=3 does not divide the width 16"),
    ({"hidden_size": 32, "num_hidden_layers": 3}, "hidden_size=32 .*16; num_hidden_layers=3"),
    ({"image_size": [24, 24]}, r"image_size=\[24, 24\] do not have its 6 positions"),
    ({"image_size": [24, 16, 8]}, "do not have its 6 positions"),
    ({"image_size": "24"}, "image_size='24'"),
    (None, "config.json cannot be read .*give the config.json"),
])
def test_a_configuration_of_another_vit_is_refused(tmp_path, config, match):
    folder = tmp_path / "model"
    shutil.copytree(VIT / "hf_vit", folder)
    path = folder / "config.json"
    content = json.loads(path.read_text())
    path.unlink() if config is None else path.write_text(json.dumps(content | config))
    with pytest.raises(UserError, match=match) as error:
        read_vision(folder)
    assert "\n" not in str(error.value) and str(folder) in str(error.value)


def test_a_damaged_file_or_a_place_without_one_is_refused(tmp_path):
    path = tmp_path / "mae.pth"
    path.write_bytes((VIT / "mae.pth").read_bytes()[:-500])
    refused(path, "cut short")
    refused(tmp_path / "nothing.pth", "there is no model at .*nothing.pth; give a file of tensors")
    refused(CHECKPOINTS.parent / "bert/plain", "holds no vision encoder that is known")


def test_a_folder_of_timm_needs_no_configuration(tmp_path):
    save_file(load_file(VIT / "timm.safetensors"), tmp_path / "model.safetensors")
    found = read_vision(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, read_vision(VIT / "timm.safetensors").params,
                 found.params)
