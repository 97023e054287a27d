"""Zero-shot reading: load a model, score volumes against prompts."""

import contextlib
import os
import unicodedata
import warnings
from collections.abc import Container, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from brgsa_jax import config as configs
from brgsa_jax import mesh as meshes
from brgsa_jax.config import UserError
from brgsa_jax.data.recipe import Image, load_image
from brgsa_jax.data.tokenizer import load_tokenizer
from brgsa_jax.evals import heatmap
from brgsa_jax.evals.run import bridge
from brgsa_jax.evals.scores import SCORE_MODES, score_matrix, write_atomic
from brgsa_jax.evals.volume_picture import radiograph_picture, volume_picture
from brgsa_jax.model import Model
from brgsa_jax.model_config import DTYPES
from brgsa_jax.registry import miss
from brgsa_jax.train.checkpoint import Checkpointer
from brgsa_jax.train.step import make_training, model_of
from brgsa_jax.weights import hub, load_native


class ZeroShot(NamedTuple):
    """Scores of volumes against prompts.

    Attributes:
        ids: N names of the volumes.
        prompts: P prompts.
        scores: [N, P] float; higher means more like the prompt. Not a probability.
        heatmaps: None; or float32 [N, P, X, Y, Z], [N, P, H, W] of radiographs, on the model's
            input grid; see `evals.heatmap`.
    """

    ids: list[str]
    prompts: list[str]
    scores: np.ndarray
    heatmaps: np.ndarray | None


def load_model(path_or_hub_id: str | Path, *, dtype: str | None = None) -> Model:
    """Loads a model from a work directory, an exported folder or a Hugging Face hub id.

    Reads JSON, safetensors and checkpoint arrays only; never runs a configuration file.

    Args:
        path_or_hub_id: `brgsa train`'s work directory, a folder of `Model.save`, or "owner/name".
        dtype: "float32" or "bfloat16" for the matrix products; None keeps the model's own.

    Raises:
        UserError: nothing loadable there.
    """
    if os.path.isfile(path_or_hub_id):
        raise UserError(f"{path_or_hub_id} is a file; make a model folder of a checkpoint with "
                        f"brgsa convert {path_or_hub_id} FOLDER")
    folder = hub.locate(path_or_hub_id, "a work directory of brgsa train, a folder with "
                        "config.json and model.safetensors")
    if dtype not in (None, *DTYPES):
        raise UserError(miss("dtype", str(dtype), DTYPES))
    model = _load(folder)
    if dtype is not None:
        config = configs.override(model.config, {"dtype": dtype})
        model = Model(config, model.params, model.bank, model.tokenizer, model.stats, model.origin)
    return model


def _load(folder: Path) -> Model:
    if (folder / "model" / "config.json").is_file():
        return load_native(folder / "model")
    if (folder / "checkpoints").is_dir():
        return _from_checkpoint(folder)
    return load_native(folder)


def _from_checkpoint(workdir: Path) -> Model:
    """The newest checkpoint of a run that has not finished."""
    config = configs.load_json(workdir / "config.json")
    tokenizer = load_tokenizer(workdir / "tokenizer", config.model.text.max_tokens)
    config = configs.override(config, {"train.parallel": "mesh"})
    training = make_training(config, meshes.make_mesh(1, 1, jax.devices()[:1]), per_epoch=1)
    checkpointer = Checkpointer(workdir, every=1, keep=None)
    restored = checkpointer.restore(training.abstract)
    checkpointer.close()
    if restored is None:
        raise UserError(f"{workdir} holds no complete checkpoint yet; train longer, or give a "
                        "trained model")
    return model_of(config, training.gather(restored.state), tokenizer)


def zero_shot(model: Model, volumes: Any, prompts: Sequence[str], *, score: str = "mean",
              heatmaps: bool = False, ids: Sequence[str] | None = None) -> ZeroShot:
    """Scores volumes against prompts without any training on them.

    S = ½[cos(v, t) + cos(v̂, t)] by default (BrgSA §zero-shot); the text stays un-bridged.

    Args:
        model: from `load_model`.
        volumes: paths of NIfTI files, or HU volumes [N, X, Y, Z] in the canonical LPS frame.
        prompts: P texts such as "There is Lung nodule".
        score: direct cos(v, t), bridged cos(v̂, t̂), image_bridged cos(v̂, t), text_bridged
            cos(v, t̂), mean = average of direct and image_bridged. A model without a bank has
            only "direct", which then also stands for "mean".
        heatmaps: also draw what of each volume each score hangs on; N·P maps of the size of a
            volume are held in memory.
        ids: names of the volumes; by default the file names, or "0", "1", ….

    Raises:
        UserError: unknown score, no prompt, or a file that is no CT.
    """
    if score not in SCORE_MODES:
        raise UserError(miss("score", score, SCORE_MODES))
    if not prompts:
        raise UserError("there is no prompt to score; give at least one such as "
                        "'There is Lung nodule'")
    if model.bank is None and score == "mean":
        score = "direct"
    if isinstance(volumes, (str, Path)):
        volumes = [volumes]
    if ids is None:
        ids = [volume_id(v) if isinstance(v, (str, Path)) else str(i)
               for i, v in enumerate(volumes)]
    if heatmaps:
        volumes = [load_image(v, model.config.input).volume if isinstance(v, (str, Path)) else v
                   for v in volumes]
    image, text = model.encode_volume(volumes), model.encode_text(prompts)
    try:
        scores = score_matrix(image, text, bridge(model, image), bridge(model, text), score)
    except ValueError as error:
        raise UserError(str(error)) from error
    maps = heatmap.heatmaps(model, volumes, prompts, score=score) if heatmaps else None
    return ZeroShot(list(ids), list(prompts), np.asarray(scores), maps)


ENDINGS = (".nii.gz", ".nii", ".npz", ".npy", ".png", ".jpg", ".jpeg", ".dcm")


def volume_id(path: str | Path) -> str:
    """File name without the ending of an image; what no terminal or table can show becomes "_"."""
    name = Path(path).name
    stem = next((name[:-len(end)] for end in ENDINGS if name.lower().endswith(end)), "")
    return "".join(c if c.isprintable() else "_" for c in stem or name)


def read_prompts(path: str | Path) -> list[str]:
    """Reads prompts, one per line; empty lines and lines starting with # are left out.

    Raises:
        UserError: unreadable, no text, or no prompt in it.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the prompt file {path} cannot be read ({error}); give a UTF-8 text file "
                        "with one prompt per line") from error
    prompts = [" ".join(line.split()) for line in lines]
    prompts = [prompt for prompt in prompts if prompt and not prompt.startswith("#")]
    strange = [prompt for prompt in prompts
               if any(unicodedata.category(letter) == "Cc" for letter in prompt)]
    if strange:
        raise UserError(f"the prompt file {path} holds control characters ({strange[0][:40]!r}); "
                        "give a UTF-8 text file with one prompt per line")
    if not prompts:
        raise UserError(f"the prompt file {path} holds no prompt; write one per line")
    return list(dict.fromkeys(prompts))


class Files(NamedTuple):
    """Images read from files.

    Attributes:
        ids: names of the readable ones.
        volumes: `data.recipe.Image` each.
        warnings: sentences per image.
        failures: one sentence per file that is no usable image.
    """

    ids: list[str]
    volumes: list[Image]
    warnings: list[tuple[str, ...]]
    failures: list[str]


def read_files(model: Model, paths: Sequence[str | Path], series: str | None = None) -> Files:
    """Reads files onto the model's grid; unusable ones become failures.

    Args:
        model: whose recipe is used.
        paths: volumes, DICOM folders, or radiographs for a model that reads those.
        series: UID of the series to read of DICOM folders that hold several.
    """
    ids, volumes, told, failures = [], [], [], []
    for path in paths:
        try:
            volume = load_image(path, model.config.input, series)
        except UserError as error:
            failures.append(str(error))
            continue
        except OSError as error:
            failures.append(f"{path}: it cannot be read ({error.strerror}); check the path")
            continue
        ids.append(unused(volume_id(path), ids))
        volumes.append(volume)
        told.append(volume.warnings)
    return Files(ids, volumes, told, failures)


def unused(name: str, taken: Container[str]) -> str:
    """The name, or with the first number from 2 on behind it that makes it unused."""
    found, number = name, 2
    while found in taken:
        found, number = f"{name}_{number}", number + 1
    return found


@contextlib.contextmanager
def _any_glyph() -> Iterator[None]:
    """A name in a script that the font lacks is still the name of the picture's file."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")
        yield


def write_pictures(out: str | Path, files: Files) -> list[Path]:
    """Writes one PNG per image, OUT/ID.png, as the model sees it."""
    paths = []
    for name, volume in zip(files.ids, files.volumes, strict=True):
        path = Path(out) / f"{name}.png"
        if volume.volume.ndim == 2:
            path.write_bytes(radiograph_picture(volume.volume))
            paths.append(path)
            continue
        with _any_glyph():
            volume_picture(volume.volume, volume.spacing, name, path)
        paths.append(path)
    return paths


def write_heatmaps(out: str | Path, model: Model, files: Files, prompts: Sequence[str], *,
                   score: str = "mean") -> list[Path]:
    """Writes the map of every image for every prompt, one image in memory at a time.

    OUT/ID_PROMPT.nii.gz lies on the grid of the image's file, OUT/ID_PROMPT.png shows the map over
    what the model saw; of radiographs there is only the latter. In names everything but letters
    and digits is "_".

    Args:
        out: the folder.
        model: from `load_model`.
        files: from `read_files`.
        prompts: P texts.
        score: the score that is explained; see `zero_shot`.

    Returns:
        The files written.
    """
    draw = heatmap.mapper(model, heatmap.directions(model, prompts, score=score))
    paths: list[Path] = []
    taken: set[str] = set(files.ids)
    for name, image in zip(files.ids, files.volumes, strict=True):
        for prompt, heat in zip(prompts, draw(image.volume), strict=True):
            words = "".join(c if c.isalnum() else "_" for c in prompt)
            stem = unused(_cut(f"{name}_{_cut(words, 80)}", 200), taken)
            taken.add(stem)
            if image.placement is not None:
                paths.append(heatmap.write_map(Path(out) / f"{stem}.nii.gz", heat,
                                               image.placement))
            paths.append(Path(out) / f"{stem}.png")
            with _any_glyph():
                write_atomic(paths[-1], heatmap.overlay(image.volume, heat, image.spacing,
                                                        f"{name}: {prompt}"))
    return paths


def _cut(text: str, length: int) -> str:
    """The beginning of a text that fits into so many bytes; file systems allow a name 255."""
    return text.encode()[:length].decode(errors="ignore")
