"""The preprocessing recipe of a data set against that a model was trained on."""

from collections.abc import Sequence
from typing import Any

from brgsa_jax.config import UserError


def clamp_of(source: Any) -> tuple[int, ...]:
    """The HU (low, high) a data set's volumes are clamped to; () of radiographs."""
    recipe = source.metadata["preprocess"]
    return (recipe["low"], recipe["high"]) if "low" in recipe else ()


def check_recipe(source: Any, image: Any) -> None:
    """Refuses a data set on which a model would see other values than it was trained on.

    Args:
        source: a split; see `data.sources`.
        image: section `model.input` of the model: `shape`, `spacing`, `window`, and `clamp`, that
            of the data set it was trained on, () where that is not known.

    Raises:
        UserError: another grid, or another clamp that the model's window reaches.
    """
    source.check_grid(image.shape, image.spacing)
    trained, mine = tuple(image.get("clamp", ())), clamp_of(source)
    if not trained or not mine:
        return
    pairs = image.window if isinstance(image.window[0], Sequence) else (image.window,)
    low, high = min(pair[0] for pair in pairs), max(pair[1] for pair in pairs)
    if max(low, trained[0]) != max(low, mine[0]) or min(high, trained[1]) != min(high, mine[1]):
        raise UserError(f"the data set {source.path} is clamped to {mine[0]} to {mine[1]} HU, the "
                        f"model was trained on {trained[0]} to {trained[1]} HU and its window of "
                        f"{low:g} to {high:g} HU reaches beyond; build the data set with the "
                        "clamp of the model's")
