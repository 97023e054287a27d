"""Vision encoders: ViTs of timm, DeiT, MAE and Hugging Face; ResNets of torchvision and MONAI."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from brgsa_jax.config import UserError
from brgsa_jax.network import encoder_of
from brgsa_jax.nn.resnet import ResNet
from brgsa_jax.nn.vit import ViT
from brgsa_jax.weights import hub
from brgsa_jax.weights.mapping import (
    CONV,
    LINEAR,
    SAME,
    TABLE,
    Rule,
    Table,
    below,
    both,
    depth_of,
    norm,
    patches,
    read_tree,
    shape_of,
    statistics,
)
from brgsa_jax.weights.tensors import Tensors, open_tensors

# Classifiers, and what only pre-training uses (MAE's decoder, masks).
UNUSED = (r"head\..*", r"fc\..*", r"pre_logits\..*", r"pooler\..*", r"decoder.*",
          r"(embeddings\.)?mask_token")
WANTED = "a file of tensors, or a folder with model.safetensors or pytorch_model.bin"

# The tensor that gives an encoder away, by the layout of its names.
LAYOUTS = {"timm": "patch_embed.proj.weight",
           "hugging_face": "embeddings.patch_embeddings.projection.weight",
           "resnet": "layer1.0.conv1.weight"}
MODEL_TYPES = ("vit", "vit_mae")
# Parts that no encoder here has, by the tensors that give them away.
FEATURES = {
    "a distillation token": r"dist_token",
    "register tokens": r"reg_token|register_tokens",
    "layer scale": r"blocks\.\d+\.(ls\d\.gamma|gamma_\d)",
    "normalised queries and keys": r"blocks\.\d+\.attn\.[qk]_norm\..*",
    "a gated MLP (SwiGLU)": r"blocks\.\d+\.mlp\.(w12|w3|fc1_[gx])\..*",
    "relative positions": r".*(relative_position_bias_table|rel_pos_[hw])",
    "a norm before its blocks": r"norm_pre\..*",
    "pooling by attention": r"attn_pool\..*",
    "a norm after pooling": r"fc_norm\..*",
    "a stem of several convolutions": r"conv1\.\d+\..*",
    "squeeze and excitation": r"layer\d+\.\d+\.se\..*",
}
# Convolution and normalisation of a shortcut.
SHORTCUT = re.compile(r"layer\d+\.0\.downsample\.")


class VisionWeights(NamedTuple):
    """A vision encoder that someone else trained, in its own geometry.

    Attributes:
        kind: "vit" or "resnet".
        sizes: of a ViT patch and grid (in the axes of its images), channels, width, depth,
            mlp_width, norm_epsilon, block_epsilon, and heads, which is None where nobody tells;
            of a ResNet stages, block, width, channels and rank.
        params, stats: float32 arrays by the names of `nn.vit.ViT` or `nn.resnet.ResNet`.
        path: the file.
    """

    kind: str
    sizes: dict[str, Any]
    params: dict[str, Any]
    stats: dict[str, Any]
    path: Path


def read_vision(path_or_hub_id: str | Path) -> VisionWeights:
    """Reads a vision encoder of timm, DeiT, MAE, Hugging Face, torchvision or MONAI.

    It may be part of something larger, such as a checkpoint of BrgSA or MGCA: the encoder is found
    by the names of its tensors, and everything beside it is left alone.

    Args:
        path_or_hub_id: a file of tensors (PyTorch files are read without running them), a folder
            with model.safetensors or pytorch_model.bin, or a hub id.

    Raises:
        UserError: no such encoder, several, or one with parts that no encoder here has.
    """
    _, file = hub.locate_weights(path_or_hub_id, WANTED)
    layout, prefix, tensors = _find(open_tensors(file))
    _check_features(tensors)
    try:
        if layout == "resnet":
            return _read_resnet(tensors)
        if layout == "timm":
            return _read_timm(tensors, prefix)
        return _read_hugging_face(tensors)
    except KeyError as error:
        raise UserError(f"{file} does not hold a whole vision encoder: {error.args[0]} is missing; "
                        "give the file this model was saved to, whole and unchanged") from error


def _find(tensors: Tensors) -> tuple[str, str, Tensors]:
    """Finds an encoder: its layout, the prefix of its names, and its tensors without that prefix.

    Raises:
        UserError: none, or several.
    """
    found = [(layout, name.removesuffix(ending)) for layout, ending in LAYOUTS.items()
             for name in tensors.specs if f".{name}".endswith(f".{ending}")]
    if not found:
        names = ", ".join(list(tensors.specs)[:3])
        raise UserError(f"{tensors.path} holds no vision encoder that is known: its "
                        f"{len(tensors.specs)} tensors are called {names} …; give a ViT of timm, "
                        "DeiT, MAE or Hugging Face, or a ResNet of torchvision or MONAI")
    if len(found) > 1:
        names = ", ".join(prefix + LAYOUTS[layout] for layout, prefix in found)
        raise UserError(f"{tensors.path} holds {len(found)} vision encoders ({names}); save the "
                        "one you want alone")
    layout, prefix = found[0]
    return layout, prefix, below(tensors, prefix)


def _check_features(tensors: Tensors) -> None:
    """Refuses an encoder with parts that would be left out, by their names.

    Raises:
        UserError: all of them.
    """
    has = [what for what, pattern in FEATURES.items()
           if any(re.fullmatch(pattern, name) for name in tensors.specs)]
    up, down = (tensors.specs.get(f"blocks.0.mlp.{name}.weight") for name in ("fc1", "fc2"))
    # timm packs both halves of a gate into one tensor.
    if up and down and up.shape[:1] == (2 * np.prod(down.shape[1:]),):
        has.append("a gated MLP (SwiGLU)")
    stem, first = (tensors.specs.get(f"{name}.weight") for name in ("conv1", "layer1.0.conv1"))
    if stem and first and stem.shape[:1] != first.shape[:1]:
        has.append("wider or grouped convolutions")
    if "layer2.0.conv1.weight" in tensors.specs and not any(map(SHORTCUT.match, tensors.specs)):
        has.append("shortcuts without weights (type A)")
    if has:
        raise UserError(f"{tensors.path} is an encoder with {' and '.join(has)}, which no encoder "
                        "here has; give one without")


def _read_timm(tensors: Tensors, prefix: str) -> VisionWeights:
    sizes = vit_sizes(tensors.specs)
    # BrgSA's last norm has PyTorch's own epsilon.
    sizes |= {"heads": None, "norm_epsilon": 1e-5 if "gloria." in prefix else 1e-6,
              "block_epsilon": 1e-6}
    return _read_vit(timm_table(sizes["patch"], sizes["channels"]), tensors, sizes)


def _read_hugging_face(tensors: Tensors) -> VisionWeights:
    """Reads ViTModel or ViTMAEModel, whose config.json tells what no tensor does."""
    specs, path = tensors.specs, tensors.path.parent / "config.json"
    config = hub.read_json(path, hub.GIVE_CONFIG)
    hub.check_config(path, config, MODEL_TYPES, {"hidden_act": "gelu"})
    width, channels, *patch = shape_of(specs, LAYOUTS["hugging_face"], 4, 5)
    sizes = {"patch": tuple(patch), "channels": channels, "width": width,
             "depth": depth_of(specs, "encoder.layer."),
             "mlp_width": shape_of(specs, "encoder.layer.0.intermediate.dense.weight", 2)[0],
             "places": shape_of(specs, "embeddings.position_embeddings", 3)[1] - 1}
    sizes |= hub.check_sizes(path, config, {
        "hidden_size": width, "num_hidden_layers": sizes["depth"], "num_channels": channels,
        "intermediate_size": sizes["mlp_width"]}, width)
    sizes["block_epsilon"] = sizes["norm_epsilon"]
    return _read_vit(hugging_face_vit_table(patch, channels), tensors, sizes,
                     config.get("image_size"))


def _read_vit(table: Table, tensors: Tensors, sizes: dict[str, Any],
              image_size: Any = None) -> VisionWeights:
    grid = _grid(tensors.path, sizes.pop("places"), sizes["patch"], image_size)
    # No shape depends on the heads.
    module = ViT(**{key: sizes[key] for key in ("patch", "width", "depth", "mlp_width")},
                 heads=1, base_grid=grid)
    image = jax.ShapeDtypeStruct((1, *sizes["patch"], sizes["channels"]), jnp.float32)
    expected = jax.eval_shape(encoder_of(module, image).init, jax.random.key(0))
    tree = read_tree(table, tensors, {"params": {"vision": expected}})
    return VisionWeights("vit", {**sizes, "grid": grid}, tree["params"]["vision"], {},
                         tensors.path)


def _grid(path: Path, places: int, patch: tuple[int, ...], image_size: Any) -> tuple[int, ...]:
    """Patches per axis of a position table.

    Raises:
        UserError: they are no equal grid and nobody tells the sides, or CLS has no row.
    """
    rank = len(patch)
    if image_size is not None:
        size = image_size if isinstance(image_size, list) else [image_size] * rank
        if len(size) == rank and all(isinstance(n, int) for n in size):
            grid = tuple(n // p for n, p in zip(size, patch, strict=True))
            if np.prod(grid) == places:
                return grid
        raise UserError(f"{path}: images of image_size={image_size!r} do not have its {places} "
                        f"positions; {hub.GIVE_CONFIG}")
    side, side_of_all = (round(count ** (1 / rank)) for count in (places, places + 1))
    if places and side**rank == places:
        return (side,) * rank
    if side_of_all**rank == places + 1:
        raise UserError(f"{path} is an encoder without a row for CLS in its position table, which "
                        "every encoder here has; give one with it")
    raise UserError(f"{path}: {places} positions are no grid of equal sides, and no tensor tells "
                    "which grid they are; give weights of square or cubic images")


class _Folded:
    """A ResNet whose shortcuts have a bias, as MONAI's.

    The normalisation behind it takes away a mean, so the bias goes out of the mean that is stored;
    in training it never had a say.
    """

    def __init__(self, tensors: Tensors) -> None:
        self.path, self.extra, self._tensors = tensors.path, tensors.extra, tensors
        self.specs = {name: spec for name, spec in tensors.specs.items()
                      if not re.fullmatch(r"layer\d+\.0\.downsample\.0\.bias", name)}

    def read(self, name: str) -> np.ndarray:
        """Reads one tensor."""
        value, bias = self._tensors.read(name), name.replace("1.running_mean", "0.bias")
        if name.endswith("downsample.1.running_mean") and bias in self._tensors.specs:
            value = value.astype(np.float32) - self._tensors.read(bias)
        return value


def _read_resnet(tensors: Tensors) -> VisionWeights:
    sizes = resnet_sizes(tensors.specs)
    module = ResNet(**{key: sizes[key] for key in ("stages", "block", "width", "rank")})
    image = jax.ShapeDtypeStruct((1, *(32,) * sizes["rank"], sizes["channels"]), jnp.float32)
    encoder = encoder_of(module, image)
    expected = jax.eval_shape(lambda key: {"params": {"vision": encoder.init(key)},
                                           "stats": {"vision": encoder.init_stats(key)}},
                              jax.random.key(0))
    tree = read_tree(resnet_table(sizes["stages"], sizes["block"]), _Folded(tensors), expected)
    return VisionWeights("resnet", sizes, tree["params"]["vision"], tree["stats"]["vision"],
                         tensors.path)


def timm_table(patch: Sequence[int], channels: int, source: str = "",
               part: str = "vision") -> Table:
    """The table of timm's VisionTransformer, which DeiT, MAE and both references follow.

    Args:
        patch: patch size in the axes of an image.
        channels: of an image.
        source: prefix of the names.
        part: part of the model it becomes.
    """
    root, block, layer = f"params/{part}", f"params/{part}/layers/blocks", f"{source}blocks.{{i}}"
    rules = [Rule(f"{source}cls_token", f"{root}/cls", SAME),
             Rule(f"{source}pos_embed", f"{root}/positions", TABLE),
             *both(f"{source}patch_embed.proj", f"{root}/patch_embed", patches(patch, channels)),
             *norm(f"{source}norm", f"{root}/norm"),
             *norm(f"{layer}.norm1", f"{block}/attention_norm"),
             *norm(f"{layer}.norm2", f"{block}/mlp_norm")]
    for index, name in enumerate(("query", "key", "value")):
        rules += both(f"{layer}.attn.qkv", f"{block}/{name}", LINEAR, part=(index, 3))
    for name, target in (("attn.proj", "out"), ("mlp.fc1", "up"), ("mlp.fc2", "down")):
        rules += both(f"{layer}.{name}", f"{block}/{target}", LINEAR)
    return Table(tuple(rules), tuple(re.escape(source) + u for u in UNUSED), "a ViT encoder")


def hugging_face_vit_table(patch: Sequence[int], channels: int) -> Table:
    """The table of Hugging Face's ViTModel and ViTMAEModel; arguments as `timm_table`."""
    root, block, layer = "params/vision", "params/vision/layers/blocks", "encoder.layer.{i}"
    rules = [Rule("embeddings.cls_token", f"{root}/cls", SAME),
             Rule("embeddings.position_embeddings", f"{root}/positions", TABLE),
             *both("embeddings.patch_embeddings.projection", f"{root}/patch_embed",
                   patches(patch, channels)),
             *norm("layernorm", f"{root}/norm"),
             *norm(f"{layer}.layernorm_before", f"{block}/attention_norm"),
             *norm(f"{layer}.layernorm_after", f"{block}/mlp_norm")]
    for name, target in (("attention.attention.query", "query"),
                         ("attention.attention.key", "key"),
                         ("attention.attention.value", "value"),
                         ("attention.output.dense", "out"), ("intermediate.dense", "up"),
                         ("output.dense", "down")):
        rules += both(f"{layer}.{name}", f"{block}/{target}", LINEAR)
    return Table(tuple(rules), UNUSED, "a ViT encoder")


def vit_sizes(specs: Mapping[str, Any], source: str = "") -> dict[str, Any]:
    """Sizes of a timm ViT from the shapes of its tensors; heads are in no shape.

    Returns:
        patch, channels, width, depth, mlp_width, and places: rows of the position table, CLS
        left out.

    Raises:
        KeyError: a tensor that tells a size is missing.
    """
    width, channels, *patch = shape_of(specs, source + LAYOUTS["timm"], 4, 5)
    return {"patch": tuple(patch), "channels": channels, "width": width,
            "depth": depth_of(specs, f"{source}blocks."),
            "mlp_width": shape_of(specs, f"{source}blocks.0.mlp.fc1.weight", 2)[0],
            "places": shape_of(specs, f"{source}pos_embed", 3)[1] - 1}


def resnet_table(stages: Sequence[int], block: str, source: str = "",
                 part: str = "vision") -> Table:
    """The table of torchvision's ResNet, and of MONAI's with volumes.

    Args:
        stages: blocks per stage.
        block: "bottleneck" or "basic".
        source: prefix of the names.
        part: part of the model it becomes.
    """
    rules: list[Rule] = []

    def unit(convolution: str, normalisation: str, target: str) -> None:
        rules.append(Rule(f"{source}{convolution}.weight",
                          f"params/{part}/{target}/conv/kernel", CONV))
        rules.extend(norm(f"{source}{normalisation}", f"params/{part}/{target}/norm"))
        rules.extend(statistics(f"{source}{normalisation}", f"stats/{part}/{target}/norm"))

    unit("conv1", "bn1", "stem")
    names = {"bottleneck": ("reduce", "middle", "expand"), "basic": ("first", "second")}[block]
    for stage, blocks in enumerate(stages, 1):
        for index in range(blocks):
            theirs, ours = f"layer{stage}.{index}", f"stage{stage}_block{index}"
            for number, name in enumerate(names, 1):
                unit(f"{theirs}.conv{number}", f"{theirs}.bn{number}", f"{ours}/{name}")
            # ResNet-18's first stage changes neither width nor resolution.
            if index == 0 and (stage > 1 or block == "bottleneck"):
                unit(f"{theirs}.downsample.0", f"{theirs}.downsample.1", f"{ours}/shortcut")
    unused = tuple(re.escape(source) + u for u in (*UNUSED, r".*num_batches_tracked"))
    return Table(tuple(rules), unused, "a ResNet encoder")


def resnet_sizes(specs: Mapping[str, Any], source: str = "") -> dict[str, Any]:
    """Sizes of a ResNet from the names and shapes of its tensors.

    Returns:
        stages, block, width, and channels and rank of its images.

    Raises:
        KeyError: a tensor that tells a size is missing.
    """
    width, channels, *window = shape_of(specs, f"{source}conv1.weight", 4, 5)
    found: dict[int, set[str]] = {}
    for name in specs:
        if match := re.match(re.escape(source) + r"layer(\d+)\.(\d+)\.conv1\.weight$", name):
            found.setdefault(int(match[1]), set()).add(match[2])
    deep = f"{source}layer1.0.conv3.weight" in specs
    return {"stages": tuple(len(found[stage]) for stage in sorted(found)),
            "block": "bottleneck" if deep else "basic", "width": width, "channels": channels,
            "rank": len(window)}
