"""Knowledge banks that start from data: k-means centres of embeddings, or a file of centres."""

from collections.abc import Iterable
from pathlib import Path
from tokenize import TokenError
from typing import Any

import jax
import numpy as np

from brgsa_jax.config import UserError
from brgsa_jax.model import bank_from_data
from brgsa_jax.train.step import Training, TrainState

# Embeddings a centre is made of on average; scikit-learn's own advice starts at a few.
SAMPLES_PER_ROW = 8


def fill_bank(state: TrainState, training: Training, config: Any, batches: Iterable[Any], *,
              samples: int) -> TrainState:
    """Fills the bank of a new run as `model.bank.init` says; other inits are left as they are.

    "kmeans" takes the k-means centres of image and text embeddings of the first batches (the
    towers as they start, so that it is worth most with weights that were trained before).

    Args:
        state: a new state.
        training: of the run.
        config: whole configuration.
        batches: placed batches of the training split, without end.
        samples: size of the training split.

    Raises:
        UserError: fewer embeddings than rows, or a file that holds no such centres.
    """
    bank = config.model.bank
    if state.bank is None or not bank_from_data(bank.init):
        return state
    if bank.init == "kmeans":
        centres = _kmeans(state, training, config, batches, samples)
    else:
        centres = read_centres(bank.init, (bank.rows, config.model.embed_dim))
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        centres = np.asarray(multihost_utils.broadcast_one_to_all(centres))

    def place() -> jax.Array:
        # A copy each, so that donation never sees a buffer twice: shards may alias an aligned
        # NumPy array whatever `may_alias` says.
        return jax.device_put(np.array(centres), state.bank.sharding, may_alias=False)

    ema = None if state.ema is None else {**state.ema, "bank": place()}
    return state.replace(bank=place(), ema=ema)


def _kmeans(state: TrainState, training: Training, config: Any, batches: Iterable[Any],
            samples: int) -> np.ndarray:
    from sklearn.cluster import MiniBatchKMeans

    rows, size = config.model.bank.rows, config.data.batch_size
    wanted = min(rows * SAMPLES_PER_ROW, 2 * samples)
    if wanted < rows:
        raise UserError(f"model.bank.init=kmeans needs at least model.bank.rows={rows} embeddings, "
                        f"and {samples} volumes with their captions give {2 * samples}; lower "
                        "model.bank.rows, or take another init")
    parts: list[np.ndarray] = []
    for _, batch in zip(range(-(-wanted // (2 * size))), batches, strict=False):
        parts += [np.asarray(x, np.float32) for x in training.embed(state, batch)]
    embeddings = np.concatenate(parts)
    if len(np.unique(embeddings, axis=0)) < rows:
        raise UserError(f"model.bank.init=kmeans found {len(np.unique(embeddings, axis=0))} "
                        f"different embeddings for model.bank.rows={rows}; lower model.bank.rows")
    found = MiniBatchKMeans(rows, random_state=config.seed, n_init=3, batch_size=4096)
    return found.fit(embeddings).cluster_centers_.astype(np.float32)


def read_centres(path: str | Path, shape: tuple[int, int]) -> np.ndarray:
    """Reads finite centres [rows, dim] from a .npy file of float numbers; runs nothing of it.

    Raises:
        UserError: unreadable, of another shape or type, or with entries that are no numbers.
    """
    try:
        # Only this format and never a pickle, which `np.load` would take by its first bytes.
        centres = np.lib.format.open_memmap(path, mode="r")
    except (OSError, ValueError, EOFError, OverflowError, TokenError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"model.bank.init={path} cannot be read ({reason}); give a .npy file of "
                        f"centres {list(shape)}") from error
    if centres.shape != shape or centres.dtype.kind != "f":
        raise UserError(f"model.bank.init={path} holds {list(centres.shape)} {centres.dtype}; "
                        f"centres {list(shape)} of floats are needed: model.bank.rows × "
                        "model.embed_dim")
    with np.errstate(over="ignore"):
        centres = np.array(centres, np.float32)
    if not np.isfinite(centres).all():
        raise UserError(f"model.bank.init={path} holds entries that are not finite in float32; "
                        "compute the centres again")
    return centres
