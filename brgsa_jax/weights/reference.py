"""Back to PyTorch: a model by the names of the code it is compared with."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from brgsa_jax.config import UserError, flatten
from brgsa_jax.model import Model
from brgsa_jax.weights.checkpoints import LABEL, table_of
from brgsa_jax.weights.hub import read_json
from brgsa_jax.weights.mapping import listing, write_tensors
from brgsa_jax.weights.native import write_safetensors

# What the original code always does: a model that does otherwise would compute something else
# there. Keys of the section `model`.
ALWAYS = {
    "brgsa": {"vision.name": "vit3d", "vision.pool": "cls", "vision.stem": (),
              "head.name": "linear", "local_head.name": "", "text.pool": "mean",
              "text.position_ids": "sequential",
              "text.norm_epsilon": 1e-12, "logit.scale": 0.0, "prototypes": 0,
              "cross_attention_heads": 0},
    "mgca": {"vision.pool": "cls", "vision.stem": (), "vision.norm_epsilon": 1e-6,
             "vision.resize": 299, "head.name": "batchnorm", "local_head.name": "batchnorm",
             "text.pool": "cls", "text.position_ids": "zero", "text.last_n_layers": 1,
             "text.token_types": 0, "text.norm_epsilon": 1e-12, "logit.scale": 0.0, "bank.rows": 0},
}
KIND_OF_TOWER = {"vit3d": "brgsa", "vit2d": "mgca", "resnet50": "mgca"}


def export_checkpoint(model: Model, path: str | Path) -> Path:
    """Writes a model as a checkpoint of BrgSA's or MGCA's own code.

    An imported model that was not changed comes out bit for bit, with the tensors no forward pass
    needs; for a model trained here those are zeros. A config.json beside the file says what its
    tensors do not.

    Args:
        model: a 3-D ViT with a bank (BrgSA), or a radiograph model with MGCA's heads.
        path: .safetensors; or .ckpt, .pth or .pt, {"state_dict": …}, which needs PyTorch.

    Returns:
        The path.

    Raises:
        UserError: the original code would compute something else from this model, or PyTorch is
            missing.
    """
    path = Path(path)
    beside = path.parent / "config.json"
    state, kind = reference_tensors(model)
    config = reference_config(model, kind)
    if beside.exists() and read_json(beside, "choose another folder") != config:
        raise UserError(f"{beside} belongs to another model and would be replaced; choose another "
                        f"folder for {path.name}")
    if path.is_dir():
        raise UserError(f"{path} is a folder; give the name of a file")
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        write_safetensors(path, state, {"format": "pt"})
    elif path.suffix in (".ckpt", ".pth", ".pt"):
        try:
            import torch
        except ImportError as error:
            raise UserError(f"writing {path} needs PyTorch (pip install 'brgsa-jax[convert]'); or "
                            "give a name that ends in .safetensors") from error
        # A copy: torch wants memory it may write to.
        partial = path.with_name(f"{path.name}.tmp")
        torch.save({"state_dict": {name: torch.from_numpy(x.copy()) for name, x in state.items()}},
                   partial)
        os.replace(partial, path)
    else:
        raise UserError(f"{path} ends in none of .safetensors, .ckpt, .pth, .pt; choose one of "
                        "them, or a folder for the native format")
    partial = beside.with_name(f"{beside.name}.{os.getpid()}.tmp")
    partial.write_text(json.dumps(config, indent=1) + "\n")
    os.replace(partial, beside)
    return path


def reference_tensors(model: Model) -> tuple[dict[str, np.ndarray], str]:
    """Returns the tensors of the original code by name, and its kind.

    Raises:
        UserError: see `export_checkpoint`.
    """
    tower = model.config.vision.name
    kind = model.origin.kind if model.origin else KIND_OF_TOWER.get(tower)
    if kind not in ALWAYS:
        raise UserError(f"neither BrgSA's nor MGCA's code has a vision tower {tower!r}; choose the "
                        "native format")
    _check(model, kind)
    tree = {"params": model.params, "stats": model.stats}
    if model.bank is not None:
        tree["bank"] = model.bank
    state = write_tensors(table_of(model.config, kind), tree)
    unused = dict(model.origin.unused) if model.origin else {}
    for name, (shape, dtype) in _placeholders(model.config, kind).items():
        if name not in state and name not in unused:
            unused[name] = np.zeros(shape, dtype)
            if name.endswith("position_ids"):
                unused[name][0] = np.arange(shape[1])
    return {**state, **unused}, kind


def _check(model: Model, kind: str) -> None:
    """Refuses a model the original code would compute otherwise.

    Raises:
        UserError: every difference.
    """
    config, text = flatten(model.config.to_dict()), model.config.text
    wrong = [f"model.{key} is {config[key]!r}, there {value!r}"
             for key, value in ALWAYS[kind].items() if key in config and config[key] != value]
    if kind == "brgsa":
        if text.divisor != text.max_tokens:
            wrong.append(f"model.text.divisor is {text.divisor}, there always max_tokens "
                         f"({text.max_tokens})")
        if not model.config.bank.rows:
            wrong.append("model.bank.rows is 0, there is always a bank")
        if model.config.bank.scale not in (1.0, model.config.embed_dim**-0.5):
            wrong.append(f"model.bank.scale is {model.config.bank.scale}, there 1 or 1/√D")
        if not text.token_types:
            wrong.append("model.text.token_types is 0, there 2")
    elif not model.config.prototypes:
        wrong.append("model.prototypes is 0, there are always some")
    if wrong:
        raise UserError(f"{LABEL[kind].removeprefix('a ').removeprefix('an ')}s cannot hold this "
                        f"model: {listing(wrong)}; choose the native format")


def _placeholders(config: Any, kind: str) -> dict[str, tuple[tuple[int, ...], str]]:
    """Names, shapes and types of what the original model holds and never uses."""
    width, dim, text = config.text.width, config.embed_dim, config.text
    square = (width, width)
    if kind == "brgsa":
        names: dict[str, Any] = {
            "gloria.text_encoder.model.pooler.dense.weight": square,
            "gloria.text_encoder.model.pooler.dense.bias": (width,),
            "gloria.text_encoder.emb_local.weight": (dim, width),
            "gloria.text_encoder.emb_local.bias": (dim,),
            "gloria.img_encoder.local_embedder.weight": (dim, config.vision.width),
            "gloria.img_encoder.local_embedder.bias": (dim,)}
        return {name: (shape, "float32") for name, shape in names.items()}
    names = {}
    for layer in range(text.depth):
        cross = f"text_encoder_q.model.encoder.layer.{layer}.crossattention"
        seen = config.vision.get("width", RESNET_WIDTH) if config.vision.name == "vit2d" \
            else RESNET_WIDTH
        for name, shape in (("self.query", square), ("self.key", (width, seen)),
                            ("self.value", (width, seen)), ("output.dense", square)):
            names |= {f"{cross}.{name}.weight": shape, f"{cross}.{name}.bias": (width,)}
        names |= {f"{cross}.output.LayerNorm.{end}": (width,) for end in ("weight", "bias")}
    for side in ("patch", "word"):
        layer = f"{side}_local_atten_layer"
        names |= {f"{layer}.in_proj_weight": (3 * dim, dim), f"{layer}.in_proj_bias": (3 * dim,),
                  f"{layer}.out_proj.weight": (dim, dim), f"{layer}.out_proj.bias": (dim,)}
    found = {name: (shape, "float32") for name, shape in names.items()}
    found["text_encoder_q.model.embeddings.position_ids"] = ((1, text.positions), "int64")
    counters = [f"{tower}_encoder_q.{part}_embed.head.{index}" for tower in ("img", "text")
                for part in ("global", "local") for index in (1, 4)]
    if config.vision.name == "resnet50":
        table = table_of(config, kind)
        counters += [rule.source.removesuffix(".running_mean") for rule in table.rules
                     if rule.source.endswith(".running_mean") and ".model." in rule.source]
    found |= {f"{name}.num_batches_tracked": ((), "int64") for name in counters}
    return found


# Width MGCA's code gives the cross-attention that it creates and never uses.
RESNET_WIDTH = 768


def reference_config(model: Model, kind: str) -> dict[str, Any]:
    """What no tensor tells, in the format `import_checkpoint` reads."""
    config, text = model.config, model.config.text
    vision = config.vision
    common: dict[str, Any] = {"system": kind, "vision": {}, "text": {
        "num_attention_heads": text.heads, "last_n_layers": text.last_n_layers,
        "do_lower_case": True, "clean": bool(text.get("clean", False))},
        "input": {key: _listed(config.input[key])
                  for key in ("window", "mean", "std", "spacing") if key in config.input}}
    if vision.name != "resnet50":
        common["vision"] = {"num_heads": vision.heads}
    if kind == "mgca":
        heads = config.cross_attention_heads
        common["text"]["max_words"] = text.max_tokens
        common["loss"] = {"use_local_atten": bool(heads), "num_heads": max(heads, 1)}
        return common
    grid = base_grid(config)
    common["text"] |= {"max_length": text.max_tokens, "mean_divisor": text.divisor,
                       "aggregate_method": text.aggregate}
    # The code reads the table as (Z, Y, X).
    common["vision"]["base_grid"] = list(grid[::-1])
    common["bank"] = {"norm": config.bank.scale != 1.0}
    common["large_volume"] = list(config.input.shape)
    return common


def _listed(value: Any) -> Any:
    """Tuples as the lists that JSON makes of them."""
    return [_listed(x) for x in value] if isinstance(value, (list, tuple)) else value


def base_grid(config: Mapping[str, Any] | Any) -> tuple[int, ...]:
    """Patches per axis of a ViT's position table."""
    given = config.vision.get("base_grid", ())
    if given:
        return tuple(given)
    return tuple(s // p for s, p in zip(config.input.shape, config.vision.patch, strict=True))


