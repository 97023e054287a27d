"""Weights in and out: the native folder (config.json, model.safetensors, tokenizer)."""

import json
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from brgsa_jax import paths
from brgsa_jax.config import UserError, from_tree
from brgsa_jax.data.tokenizer import load_tokenizer
from brgsa_jax.model import Model, build, init_bank

FORMAT = "brgsa_jax/1"


def save_model(model: Model, folder: str | Path) -> Path:
    """Writes a model as config.json + model.safetensors + tokenizer files.

    Args:
        model: the model.
        folder: created if missing; files of these names are replaced.

    Returns:
        The folder.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tree = {"params": model.params}
    if model.bank is not None:
        tree["bank"] = model.bank
    if model.stats:
        tree["stats"] = model.stats
    arrays = {path: np.asarray(leaf, order="C")
              for path, leaf in paths.flat(jax.device_get(tree)).items()}
    partial = folder / "model.safetensors.tmp"
    save_file(arrays, str(partial), metadata={"format": FORMAT})
    os.replace(partial, folder / "model.safetensors")
    model.tokenizer.save(folder)
    config = {"format": FORMAT, "model": model.config.to_dict()}
    # Written last: a folder with this file is complete.
    partial = folder / "config.json.tmp"
    partial.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    os.replace(partial, folder / "config.json")
    return folder


def load_native(folder: str | Path) -> Model:
    """Reads a folder written by `save_model`; JSON and safetensors only.

    Raises:
        UserError: a file is missing, unreadable, or its tensors do not fit the configuration.
    """
    folder = Path(folder)
    config = read_native_config(folder)
    network = build(config)
    bank = config.bank

    def shapes() -> Any:
        tree = {"params": network.init(jax.random.key(0)),
                "stats": network.init_stats(jax.random.key(0))}
        if bank.rows:
            tree["bank"] = init_bank(jax.random.key(0), bank.rows, config.embed_dim, bank.init)
        return tree

    expected = jax.eval_shape(shapes)
    tree = fill(expected, read_safetensors(folder / "model.safetensors"),
                where=str(folder / "model.safetensors"))
    tokenizer = load_tokenizer(folder, config.text.max_tokens)
    return Model(config, tree["params"], tree.get("bank"), tokenizer, tree["stats"])


def read_native_config(folder: Path) -> Any:
    """Reads the `model` section of a native folder's config.json.

    Raises:
        UserError: no such file, or of another format.
    """
    try:
        content = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / 'config.json'} cannot be read ({error}); give a work "
                        "directory or a folder written by Model.save") from error
    if content.get("format") != FORMAT:
        raise UserError(f"{folder / 'config.json'} has the format {content.get('format')!r}, not "
                        f"{FORMAT!r}; convert it first with brgsa convert")
    return from_tree(content["model"])


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """Reads all tensors of a safetensors file.

    Raises:
        UserError: missing or damaged file.
    """
    try:
        with safe_open(str(path), framework="numpy") as file:
            return {key: file.get_tensor(key) for key in file.keys()}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read as safetensors ({error}); save the model "
                        "again") from error


def fill(expected: Any, arrays: dict[str, np.ndarray], *, where: str) -> Any:
    """Fills a tree of shapes with arrays by path.

    Raises:
        UserError: one message with every missing, unknown and misshapen tensor.
    """
    wanted = paths.flat(expected)
    problems = [f"{name} is missing" for name in wanted if name not in arrays]
    problems += [f"{name} is unknown" for name in arrays if name not in wanted]
    problems += [f"{name} has shape {arrays[name].shape}, not {tuple(leaf.shape)}"
                 for name, leaf in wanted.items()
                 if name in arrays and arrays[name].shape != tuple(leaf.shape)]
    if problems:
        shown = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more"
                                           if len(problems) > 8 else "")
        raise UserError(f"the tensors of {where} do not fit its config.json: {shown}; use the "
                        "config.json that was saved with them")
    return paths.map_with_path(lambda path, leaf: arrays[path].astype(leaf.dtype), expected)
