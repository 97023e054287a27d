"""A model as StableHLO programs that run with jax alone: no brgsa_jax, flax or transformers."""

import json
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from brgsa_jax import paths
from brgsa_jax.config import UserError, override
from brgsa_jax.losses.knowledge import read_bank
from brgsa_jax.model import Model
from brgsa_jax.network import build
from brgsa_jax.registry import miss

FORMAT = "brgsa_jax.export/1"
PLATFORMS = ("cpu", "cuda", "tpu")


class Program(NamedTuple):
    """A function to export.

    Attributes:
        run: (weights, *inputs) -> [b, D] float32.
        weights: tree of arrays; they are arguments, since constants of hundreds of megabytes
            make a program slow to compile.
        inputs: the type of every input by its name, first axis `b`.
    """

    run: Callable[..., jax.Array]
    weights: dict[str, Any]
    inputs: dict[str, jax.ShapeDtypeStruct]


def export_model(model: Model, folder: str | Path, *,
                 platforms: Sequence[str] = PLATFORMS) -> Path:
    """Writes a model as programs for any batch size, their weights and a script that runs them.

    Programs are serialised by `jax.export`: `encode_volume` (HU volumes [b, X, Y, Z], or
    radiographs [b, H, W], float32 -> [b, D]), `encode_text` (ids [b, T], mask [b, T], int32 ->
    [b, D]), and `reconstruct` (embeddings [b, D] -> [b, D], what they read from the bank) of a
    model with a bank. All give un-normalised float32.

    Args:
        model: the model.
        folder: a new or empty folder, or an earlier export, which is replaced when the new one
            is complete.
        platforms: JAX's names of the platforms the programs shall run on, "cpu", "cuda", "rocm"
            or "tpu"; none of them needs to be there now.

    Returns:
        The folder: one NAME.stablehlo a program, weights.npz, tokenizer files if the model has a
        tokenizer, run.py, and export.json, which tells what is what.

    Raises:
        UserError: unknown platform, or the folder holds files of another origin.
    """
    folder = Path(folder).resolve()
    _check_platforms(platforms)
    _check_free(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as staging:
        new = Path(staging) / "new"
        new.mkdir()
        _write(model, new, platforms)
        if folder.exists():
            os.replace(folder, Path(staging) / "old")
        os.replace(new, folder)
    return folder


def _check_platforms(platforms: Sequence[str]) -> None:
    known = (*PLATFORMS, "rocm")
    unknown = [name for name in platforms if name not in known]
    if unknown or not platforms:
        raise UserError(miss("platform", unknown[0] if unknown else "", known))


def _check_free(folder: Path) -> None:
    """Refuses a folder with files that no export wrote.

    Raises:
        UserError: there are some, or it is no folder.
    """
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UserError(f"{folder} is a file; give a new folder to export to")
    ours = {"__pycache__"}
    try:
        about = json.loads((folder / "export.json").read_text())
        if about["format"].startswith(FORMAT.partition("/")[0]):
            ours |= set(about["files"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass  # No export then, and each of its files is foreign.
    foreign = sorted({path.name for path in folder.iterdir()} - ours)
    if foreign:
        raise UserError(f"{folder} holds {foreign[0]}, which no export wrote; give a new folder, "
                        "or move that file away")


def _write(model: Model, folder: Path, platforms: Sequence[str]) -> None:
    """Writes all files of an export into an empty folder."""
    arrays: dict[str, np.ndarray] = {}
    about: dict[str, Any] = {}
    for name, program in _programs(model).items():
        weights = paths.flat(program.weights)
        arrays.update((key, np.asarray(leaf, np.float32)) for key, leaf in weights.items())
        (folder / f"{name}.stablehlo").write_bytes(_lower(program, platforms))
        about[name] = {
            "weights": list(weights),
            "inputs": [{"name": key, "shape": ["b", *struct.shape[1:]], "dtype": struct.dtype.name}
                       for key, struct in program.inputs.items()],
            "output": {"shape": ["b", model.config.embed_dim], "dtype": "float32"}}
    np.savez(folder / "weights.npz", **arrays)
    if model.tokenizer is not None:
        model.tokenizer.save(folder)
    (folder / "run.py").write_text(RUN)
    volumes = model.network.rank == 3
    content = {
        "format": FORMAT,
        "programs": about,
        "input": {"shape": list(model.shape), "spacing": list(model.spacing),
                  "orientation": "LPS" if volumes else None,
                  "values": "HU" if volumes else "grey levels"},
        "embed_dim": model.config.embed_dim,
        "platforms": list(platforms),
        "jax": jax.__version__,
        "model": model.config.to_dict(),
        "files": sorted([*(path.name for path in folder.iterdir()), "export.json"]),
    }
    (folder / "export.json").write_text(json.dumps(content, indent=2) + "\n")


def _programs(model: Model) -> dict[str, Program]:
    """The programs of a model by name."""
    network = build(_portable(model.config))
    (batch,) = jax.export.symbolic_shape("b")

    def weights(tower: str) -> dict[str, Any]:
        parts = (tower, f"{tower}_head")
        return {"params": {part: model.params[part] for part in parts},
                "stats": {part: model.stats[part] for part in parts if part in model.stats}}

    def struct(shape: Sequence[int], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((batch, *shape), dtype)

    def encode_volume(tree: Any, volumes: jax.Array) -> jax.Array:
        return network.embed_volume(tree["params"], volumes, stats=tree["stats"])

    def encode_text(tree: Any, ids: jax.Array, mask: jax.Array) -> jax.Array:
        return network.embed_text(tree["params"], ids, mask, stats=tree["stats"])

    def reconstruct(tree: Any, embeddings: jax.Array) -> jax.Array:
        scale = model.config.bank.scale
        return read_bank(embeddings, tree["bank"], scale=scale).reconstruction

    tokens = struct((model.config.text.max_tokens,), jnp.int32)
    programs = {
        "encode_volume": Program(encode_volume, weights("vision"),
                                 {"volumes": struct(model.shape, jnp.float32)}),
        "encode_text": Program(encode_text, weights("text"), {"ids": tokens, "mask": tokens})}
    if model.bank is not None:
        programs["reconstruct"] = Program(
            reconstruct, {"bank": model.bank},
            {"embeddings": struct((model.config.embed_dim,), jnp.float32)})
    return programs


def _portable(config: Any) -> Any:
    """The model's configuration with plain attention, no rematerialisation and rolled loops.

    "auto" would choose by the machine the export is made on.
    """
    changes = {"implementation": "xla", "remat": "none", "unroll": 1}
    return override(config, {f"{tower}.{key}": value for tower in ("vision", "text")
                             for key, value in changes.items() if key in config[tower]})


def _lower(program: Program, platforms: Sequence[str]) -> bytes:
    """Serialises a program whose weights are a flat list, in the order of `paths.flat`."""
    leaves, tree = jax.tree.flatten(program.weights)

    def call(weights: list[jax.Array], *inputs: jax.Array) -> jax.Array:
        return program.run(jax.tree.unflatten(tree, weights), *inputs)

    types = [jax.ShapeDtypeStruct(leaf.shape, jnp.float32) for leaf in leaves]
    exported = jax.export.export(jax.jit(call), platforms=tuple(platforms))(
        types, *program.inputs.values())
    return bytes(exported.serialize())


# The script of an export folder. It stands alone: Python, jax and flatbuffers, by which jax reads
# its programs.
RUN = '''"""Embeds volumes and texts with the model of this folder: pip install jax flatbuffers.

    python run.py --volumes volumes.npy --tokens tokens.npz --out embeddings.npz

volumes.npy holds [b, X, Y, Z] in HU ([b, H, W] for radiographs) on the grid that export.json names
under "input"; tokens.npz holds ids [b, T] and mask [b, T]. Embeddings are not normalised.
"""

import argparse
import json
import sys
import zipfile
from pathlib import Path

import jax
import jax.export
import numpy as np

FOLDER = Path(__file__).resolve().parent
ABOUT = json.loads((FOLDER / "export.json").read_text())


def load(name):
    """Returns a program, "encode_volume", "encode_text" or "reconstruct", as a function.

    It takes arrays of equally many rows and the number of rows to compute at once, and returns
    [b, D] float32.
    """
    about = ABOUT["programs"][name]
    program = jax.export.deserialize(bytearray((FOLDER / f"{name}.stablehlo").read_bytes()))
    with np.load(FOLDER / "weights.npz", allow_pickle=False) as file:
        weights = [jax.device_put(file[key]) for key in about["weights"]]
    compiled = jax.jit(program.call)

    def run(*inputs, batch_size=1):
        for array, wanted in zip(inputs, about["inputs"], strict=True):
            if list(array.shape[1:]) != wanted["shape"][1:] or len(array) != len(inputs[0]):
                raise ValueError(f"{wanted['name']} of the shape {array.shape} are none of this "
                                 f"model; give {wanted['shape']}")
        parts = [np.zeros((0, ABOUT["embed_dim"]), np.float32)]
        for start in range(0, len(inputs[0]), batch_size):
            rows = [np.asarray(array[start:start + batch_size], wanted["dtype"])
                    for array, wanted in zip(inputs, about["inputs"], strict=True)]
            parts.append(np.asarray(compiled(weights, *rows)))
        result = np.concatenate(parts)
        if not np.isfinite(result).all():
            raise ValueError(f"{name} gave values that are not finite; look for values that are "
                             "not finite, or token ids of another vocabulary, in the input")
        return result

    return run


def read(path, *names):
    """Reads the array of an .npy file, or those of these names of an .npz file."""
    try:
        # Volumes may not fit into memory.
        content = np.load(path, mmap_mode="r", allow_pickle=False)
        return [content[name] for name in names] if names else [content[:]]
    except (OSError, EOFError, ValueError, LookupError, TypeError, zipfile.BadZipFile) as error:
        wanted = f".npz file with {' and '.join(names)}" if names else ".npy file of numbers"
        raise ValueError(f"{path} cannot be read ({error}); give a {wanted}") from error


def main():
    """Embeds what the command line names."""
    parser = argparse.ArgumentParser(description="Embed volumes and texts.")
    parser.add_argument("--volumes", help=".npy file")
    parser.add_argument("--tokens", help=".npz file with ids and mask")
    parser.add_argument("--out", default="embeddings.npz", help="[%(default)s]")
    parser.add_argument("--batch-size", type=int, default=1, help="rows at once [%(default)s]")
    options = parser.parse_args()
    if not (options.volumes or options.tokens) or options.batch_size < 1:
        parser.error("give --volumes or --tokens, and a positive --batch-size")
    results = {}
    if options.volumes:
        inputs = read(options.volumes)
        results["volumes"] = load("encode_volume")(*inputs, batch_size=options.batch_size)
    if options.tokens:
        inputs = read(options.tokens, "ids", "mask")
        results["texts"] = load("encode_text")(*inputs, batch_size=options.batch_size)
    if "reconstruct" in ABOUT["programs"]:
        reconstruct = load("reconstruct")
        results.update({f"{name}_from_bank": reconstruct(rows, batch_size=options.batch_size)
                        for name, rows in results.items()})
    with open(options.out, "wb") as file:
        np.savez(file, **results)
    for name, rows in results.items():
        print(f"{name} {rows.shape} in {options.out}")


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        sys.exit(f"run.py: {error}")
'''
