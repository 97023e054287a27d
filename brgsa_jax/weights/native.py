"""The native folder: config.json, model.safetensors and the tokenizer."""

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
from brgsa_jax.data.tokenizer import find_tokenizer, load_tokenizer
from brgsa_jax.model import Model, Origin, build, init_bank
from brgsa_jax.weights.hub import read_json

FORMAT = "brgsa_jax/2"
# Tensors of an imported checkpoint that the model does not need, for the way back.
ORIGIN = "origin.safetensors"


def save_model(model: Model, folder: str | Path) -> Path:
    """Writes a model as config.json + model.safetensors + tokenizer files.

    Args:
        model: the model.
        folder: created if missing; files of these names are replaced.

    Returns:
        The folder.

    Raises:
        UserError: the folder holds the config.json of something else.
    """
    folder = Path(folder)
    check_free(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tree = {"params": model.params}
    if model.bank is not None:
        tree["bank"] = model.bank
    if model.stats:
        tree["stats"] = model.stats
    arrays = {path: np.asarray(leaf, order="C")
              for path, leaf in paths.flat(jax.device_get(tree)).items()}
    write_safetensors(folder / "model.safetensors", arrays, {"format": FORMAT})
    _save_origin(model.origin, folder)
    if model.tokenizer is not None:
        model.tokenizer.save(folder)
    config = {"format": FORMAT, "model": model.config.to_dict()}
    # Written last: a folder with this file is complete.
    partial = folder / "config.json.tmp"
    partial.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    os.replace(partial, folder / "config.json")
    return folder


def check_free(folder: Path) -> None:
    """Refuses a folder whose config.json is not that of a model of this format.

    Raises:
        UserError: it holds something else, or is a file.
    """
    if folder.is_file():
        raise UserError(f"{folder} is a file; give a folder for the model")
    config = folder / "config.json"
    if config.exists() and read_json(config, "give another folder").get("format") != FORMAT:
        raise UserError(f"{config} belongs to something else and would be replaced; give another "
                        "folder")


def _save_origin(origin: Origin | None, folder: Path) -> None:
    """Writes what an imported checkpoint held besides the model."""
    path = folder / ORIGIN
    if origin is None:
        path.unlink(missing_ok=True)
        return
    write_safetensors(path, origin.unused, {"kind": origin.kind})


def _load_origin(folder: Path) -> Origin | None:
    path = folder / ORIGIN
    if not path.is_file():
        return None
    try:
        with safe_open(str(path), framework="numpy") as file:
            kind = (file.metadata() or {}).get("kind", "")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read as safetensors ({error}); import the checkpoint "
                        "again") from error
    return Origin(kind, read_safetensors(path))


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
    origin = _load_origin(folder)
    # Only an imported model may have been saved without one.
    tokenizer = (find_tokenizer(folder / "model.safetensors", None, config.text.max_tokens)
                 if origin is not None else load_tokenizer(folder, config.text.max_tokens))
    return Model(config, tree["params"], tree.get("bank"), tokenizer, tree["stats"], origin)


def write_safetensors(path: Path, arrays: dict[str, np.ndarray], metadata: dict[str, str]) -> None:
    """Writes a safetensors file as a whole, with the rights that new files have."""
    partial = path.with_name(f"{path.name}.tmp")
    # The library gives its files to their owner alone; an open file has the usual rights.
    partial.touch()
    rights = partial.stat().st_mode
    save_file(arrays, str(partial), metadata=metadata)
    partial.chmod(rights)
    os.replace(partial, path)


def read_native_config(folder: Path) -> Any:
    """Reads the `model` section of a native folder's config.json.

    Raises:
        UserError: no such file, or of another format.
    """
    content = read_json(folder / "config.json",
                        "give a work directory or a folder written by Model.save")
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
    return paths.map_with_path(
        lambda path, leaf: arrays[path].astype(leaf.dtype, copy=False), expected)
