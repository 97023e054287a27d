"""The native folder: config.json, model.safetensors and the tokenizer."""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from brgsa_jax import paths
from brgsa_jax.config import UserError, from_tree
from brgsa_jax.data.tokenizer import find_tokenizer, load_tokenizer
from brgsa_jax.model import Model, Origin, check_runs, init_bank
from brgsa_jax.network import build
from brgsa_jax.weights.hub import TOKENIZER_FILES, read_json
from brgsa_jax.weights.mapping import listing

FORMAT = "brgsa_jax/2"
CONFIG, WEIGHTS = "config.json", "model.safetensors"
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
    tree = {"params": model.params}
    if model.bank is not None:
        tree["bank"] = model.bank
    if model.stats:
        tree["stats"] = model.stats
    arrays = {path: np.asarray(leaf, order="C")
              for path, leaf in paths.flat(jax.device_get(tree)).items()}
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as staging:
        new = Path(staging)
        write_safetensors(new / WEIGHTS, arrays, {"format": FORMAT})
        if model.origin is not None:
            write_safetensors(new / ORIGIN, model.origin.unused, {"kind": model.origin.kind})
        if model.tokenizer is not None:
            model.tokenizer.save(new)
        config = json.dumps({"format": FORMAT, "model": model.config.to_dict()}, indent=2,
                            sort_keys=True)
        (new / CONFIG).write_text(config + "\n")
        # Without its config.json a folder is incomplete: no kill leaves parts of two models that
        # load as one.
        if (folder / CONFIG).exists():
            for name in (CONFIG, ORIGIN, *TOKENIZER_FILES):
                (folder / name).unlink(missing_ok=True)
        for path in sorted(new.iterdir(), key=lambda path: path.name == CONFIG):
            os.replace(path, folder / path.name)
    return folder


def check_free(folder: Path) -> None:
    """Refuses a folder whose config.json is not that of a model of this format.

    Raises:
        UserError: it holds something else, or is a file.
    """
    if folder.is_file():
        raise UserError(f"{folder} is a file; give a folder for the model")
    config = folder / CONFIG
    if config.exists() and read_json(config, "give another folder").get("format") != FORMAT:
        raise UserError(f"{config} belongs to something else and would be replaced; give another "
                        "folder")


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
    try:
        return _load(folder, config)
    except UserError:
        raise
    except Exception as error:
        # A config.json or tokenizer from elsewhere can fail anywhere inside jax, flax and
        # tokenizers; the cause stays attached.
        reason = (str(error).splitlines() or [""])[0][:200]
        raise UserError(f"the model in {folder} cannot be built from its config.json and tokenizer "
                        f"({type(error).__name__}: {reason}); use the files that were saved with "
                        "it") from error


def _load(folder: Path, config: Any) -> Model:
    network = build(config)
    bank = config.bank

    def shapes() -> Any:
        tree = {"params": network.init(jax.random.key(0)),
                "stats": network.init_stats(jax.random.key(0))}
        if bank.rows:
            tree["bank"] = init_bank(jax.random.key(0), bank.rows, config.embed_dim, bank.init)
        return tree

    expected = jax.eval_shape(shapes)
    tree = fill(expected, read_safetensors(folder / WEIGHTS),
                where=str(folder / WEIGHTS))
    origin = _load_origin(folder)
    # Only an imported model may have been saved without one.
    tokenizer = (find_tokenizer(folder / WEIGHTS, None, config.text.max_tokens)
                 if origin is not None else load_tokenizer(folder, config.text.max_tokens))
    model = Model(config, tree["params"], tree.get("bank"), tokenizer, tree["stats"], origin)
    check_runs(model)
    return model


def write_safetensors(path: Path, arrays: dict[str, np.ndarray], metadata: dict[str, str]) -> None:
    """Writes a safetensors file as a whole, with the rights that new files have.

    Raises:
        UserError: it cannot be written.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        # The library gives its files to their owner alone; an open file has the usual rights.
        partial.touch()
        rights = partial.stat().st_mode
        save_file(arrays, str(partial), metadata=metadata)
        partial.chmod(rights)
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be written ({error}); check the path, its rights and the "
                        "free space") from error
    finally:
        partial.unlink(missing_ok=True)


def read_native_config(folder: Path) -> Any:
    """Reads the `model` section of a native folder's config.json.

    Raises:
        UserError: no such file, or of another format.
    """
    path = folder / CONFIG
    content = read_json(path, "give a work directory or a folder written by Model.save")
    if "model_type" in content:
        raise UserError(f"{path} is that of a {content['model_type']} of Hugging Face, one encoder "
                        "and no whole model; name it as model.text.init_from or "
                        "model.vision.init_from of a run, or read it by load_bert")
    if content.get("format") != FORMAT or not isinstance(content.get("model"), dict):
        raise UserError(f"{path} has the format {content.get('format')!r}, not {FORMAT!r}, or no "
                        "model; convert a checkpoint by brgsa convert, or save the model again")
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
        UserError: one message with every missing, unknown, misshapen, wrongly typed or not finite
            tensor.
    """
    wanted = paths.flat(expected)
    problems = [f"{name} is missing" for name in wanted if name not in arrays]
    problems += [f"{name} is unknown" for name in arrays if name not in wanted]
    for name in wanted.keys() & arrays.keys():
        array, shape = arrays[name], tuple(wanted[name].shape)
        if array.shape != shape:
            problems.append(f"{name} has shape {array.shape}, not {shape}")
        elif array.dtype != wanted[name].dtype:
            problems.append(f"{name} holds {array.dtype}, not {wanted[name].dtype}")
        elif not np.isfinite(array).all():
            problems.append(f"{name} holds entries that are not finite")
    if problems:
        raise UserError(f"the tensors of {where} do not fit its config.json: {listing(problems)}; "
                        "use the config.json that was saved with them")
    return paths.map_with_path(lambda path, _: arrays[path], expected)
