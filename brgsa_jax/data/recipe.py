"""The preprocessing recipe: of a data set against a model, and of files for a model."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from brgsa_jax.config import UserError


class Image(NamedTuple):
    """An image of a file as a model reads it.

    Attributes:
        volume: int16 HU [X, Y, Z], or uint8 grey levels [H, W].
        spacing: (x, y, z) millimetres; () of radiographs.
        warnings: what is odd about the file, one sentence each.
        placement: a `placement.Placement`: where the volume lies in the file; None of radiographs.
    """

    volume: np.ndarray
    spacing: tuple[float, ...]
    warnings: tuple[str, ...]
    placement: Any = None


def training_recipe(source: Any) -> dict[str, Any]:
    """What a configuration gets from the split it is trained on, by its keys.

    That is what a model keeps of the images' recipe, and what labels say; see `data.labelled`.
    """
    recipe = source.metadata["preprocess"]
    clamp = (recipe["low"], recipe["high"]) if "low" in recipe else ()
    return {"model.input.stored": tuple(recipe["shape"]), "model.input.clamp": clamp,
            **getattr(source, "recipe", {})}


def check_recipe(source: Any, image: Any) -> None:
    """Refuses a data set on which a model would see other values than it was trained on.

    Args:
        source: a split; see `data.sources`.
        image: section `model.input` of the model: `shape`, `spacing`, `window`, and of the data
            set it was trained on `stored` and `clamp`, () where they are not known.

    Raises:
        UserError: another grid, or another clamp that the model's window reaches.
    """
    recipe = source.metadata["preprocess"]
    _check_grid(source, recipe, image)
    trained, mine = tuple(image.get("clamp", ())), (recipe.get("low"), recipe.get("high"))
    if not trained or None in mine:
        return
    pairs = image.window if isinstance(image.window[0], Sequence) else (image.window,)
    low, high = min(pair[0] for pair in pairs), max(pair[1] for pair in pairs)
    if max(low, trained[0]) != max(low, mine[0]) or min(high, trained[1]) != min(high, mine[1]):
        raise UserError(f"the data set {source.path} is clamped to {mine[0]} to {mine[1]} HU, the "
                        f"model was trained on {trained[0]} to {trained[1]} HU and its window of "
                        f"{low:g} to {high:g} HU reaches beyond; build the data set with the "
                        "clamp of the model's")


def _check_grid(source: Any, recipe: Mapping[str, Any], image: Any) -> None:
    shape, spacing = tuple(recipe["shape"]), tuple(recipe["spacing"])
    trained = tuple(image.get("stored", ()))
    if len(shape) == 2:
        fits = tuple(image.shape) in (shape, central_shape(shape)) and trained in ((), shape)
        holds = (f"radiographs of {grid_text(shape)}, read whole or as their central "
                 f"{grid_text(central_shape(shape))}")
        mend = "build a data set of another size, or change model.input.shape"
    else:
        fits = shape == tuple(image.shape) and np.allclose(spacing, tuple(image.spacing), rtol=1e-3)
        holds = f"volumes of {grid_text(shape, spacing)}"
        mend = ("build the data set on the model's grid, or change model.input.shape and "
                "model.input.spacing")
    if not fits:
        of = f" of {grid_text(trained)}" if trained and trained != tuple(image.shape) else ""
        raise UserError(f"the data set {source.path} holds {holds}, the model is for "
                        f"{grid_text(image.shape, image.spacing)}{of}; {mend}")


def central_shape(stored: Sequence[int]) -> tuple[int, ...]:
    """The part of a radiograph that a network sees at a time: 224 × 224 of MGCA's 256 × 256."""
    return tuple(side * 7 // 8 for side in stored)


def grid_text(shape: Sequence[int], spacing: Sequence[float] = ()) -> str:
    """Writes a grid as "256×256×128 voxels at 1.5×1.5×3 mm", or "256×256 pixels"."""
    size = "×".join(map(str, shape))
    return (f"{size} voxels at {'×'.join(f'{s:g}' for s in spacing)} mm" if spacing
            else f"{size} pixels")


def centre(image: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """The central part of an image; validation sees the same (`data.feed`)."""
    corner = [(have - want) // 2 for have, want in zip(image.shape, shape, strict=True)]
    return image[tuple(slice(c, c + want) for c, want in zip(corner, shape, strict=True))]


def load_image(path: str | Path, image: Any, series: str | None = None) -> Image:
    """Reads a file as the images of a model's training set were read.

    Args:
        path: a volume's file or DICOM folder; PNG, JPEG or DICOM of a radiograph.
        image: section `model.input` of the model. Where `stored` is not known, a model of
            radiographs reads the central 7/8 of a side, as MGCA.
        series: the UID of the one DICOM series to read of a folder that holds several.

    Raises:
        NotACT: the file is no such image.
        UserError: the model reads radiographs that are not square.
    """
    shape = tuple(image.shape)
    if len(shape) == 2:
        if series is not None:
            raise UserError("this model reads radiographs, one file each; leave --series out")
        from brgsa_jax.data.image2d import load_radiograph

        if len(set(shape)) > 1:
            raise UserError(f"the model reads radiographs of {grid_text(shape)}, which no file "
                            "gives, since files are made square; give it grey levels [B, H, W]")
        stored = tuple(image.get("stored", ())) or tuple(side * 8 // 7 for side in shape)
        return Image(centre(load_radiograph(path, stored[0]), shape), (), ())
    from brgsa_jax.data.volume import Preprocess, load_volume

    low, high = image.get("clamp", ()) or (Preprocess.low, Preprocess.high)
    preprocess = Preprocess(spacing=tuple(image.spacing), shape=shape, low=low, high=high)
    loaded = load_volume(path, preprocess, series=series)
    return Image(loaded.volume, loaded.spacing, loaded.warnings, loaded.placement)
