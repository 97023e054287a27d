"""What people use: a network with its weights, knowledge bank and tokenizer."""

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from brgsa_jax import registry
from brgsa_jax.config import UserError, from_tree
from brgsa_jax.data.tokenizer import clean_report
from brgsa_jax.network import Network, build


class Origin(NamedTuple):
    """Where an imported model came from, so that it can go back complete.

    Attributes:
        kind: "brgsa" or "mgca".
        unused: tensors of its checkpoint that no forward pass needs, by their names there.
    """

    kind: str
    unused: dict[str, np.ndarray]


@functools.lru_cache(maxsize=4)
def _compiled(config: str) -> tuple[Network, Callable[..., Any], Callable[..., Any],
                                    Callable[..., Any]]:
    """Network and jitted encoders of a configuration in JSON; models of one shape share them."""
    network = build(from_tree(json.loads(config)))
    return (network, *(jax.jit(function, static_argnames="normalized")
                       for function in (network.embed_volume, network.classify)),
            jax.jit(network.embed_text))


class Model:
    """A network with weights and tokenizer.

    Attributes:
        config: the `model` configuration section.
        network: its pure functions.
        params: nested dict of arrays.
        bank: [K, D] knowledge bank, or None.
        stats: running batch statistics, {} for a model without batch normalisation.
        tokenizer: a `data.tokenizer.Tokenizer`; None for an imported model without one, which
            encodes token ids only.
        origin: of an imported model.
        spacing, shape: canonical grid of volumes read from files, in mm and voxels.
        classes: names of the findings that `classify` tells, () for a model without a classifier.
    """

    def __init__(self, config: Any, params: Any, bank: jax.Array | None, tokenizer: Any,
                 stats: Any = None, origin: Origin | None = None) -> None:
        self.config = config
        self.origin = origin
        self.network, self._volume, self._classify, self._text = _compiled(
            json.dumps(config.to_dict(), sort_keys=True))
        self.params = params
        self.bank = bank
        self.stats = stats or {}
        self.tokenizer = tokenizer
        self.spacing = tuple(config.input.spacing)
        self.shape = tuple(config.input.shape)
        self.classes: tuple[str, ...] = tuple(config.get("classes", ()))

    def encode_volume(self, paths_or_arrays: Any, *, normalized: bool = False,
                      batch_size: int = 8) -> np.ndarray:
        """Embeds volumes.

        Args:
            paths_or_arrays: file paths, or HU volumes [B, X, Y, Z] in the canonical LPS frame
                (network input when `normalized`, PyTorch's [B, 1, X, Y, Z] too). A 2-D model
                takes radiographs: grey levels [B, H, W], or network input [B, 3, H, W].
            normalized: the arrays are already windowed and normalised.
            batch_size: volumes encoded at once; the result does not depend on it.

        Returns:
            [B, D] float32, un-normalised.

        Raises:
            UserError: a file is not a usable CT, or the shape does not fit the patches.
        """
        return self._run(self._volume, self.config.embed_dim, paths_or_arrays, normalized,
                         batch_size)

    def classify(self, paths_or_arrays: Any, *, normalized: bool = False,
                 batch_size: int = 8) -> np.ndarray:
        """Gives the probability of every class; volumes are given as to `encode_volume`.

        Returns:
            [B, P] float32 in [0, 1], in the order of `classes`.

        Raises:
            UserError: a model without a classifier; otherwise as `encode_volume`.
        """
        if not self.classes:
            raise UserError("this model has no classifier; train one with the recipe finetune, or "
                            "score prompts by zero_shot")
        return self._run(self._classify, len(self.classes), paths_or_arrays, normalized,
                         batch_size)

    def _run(self, function: Callable[..., Any], width: int, paths_or_arrays: Any,
             normalized: bool, batch_size: int) -> np.ndarray:
        """Runs a jitted function of volumes on batches of one size, to [B, width]."""
        if isinstance(paths_or_arrays, (str, Path)):
            paths_or_arrays = [paths_or_arrays]
        volumes = [self._read(v) for v in paths_or_arrays]
        if normalized and self.network.rank == 3 and len(self.network.windows) == 1:
            volumes = [v[0] if v.ndim == 4 and len(v) == 1 else v for v in volumes]
        shapes = sorted({volume.shape for volume in volumes})
        if len(shapes) > 1:
            raise UserError(f"images of different shapes ({shapes[0]} and {shapes[1]}) cannot be "
                            "encoded together; encode one shape at a time")
        if volumes:
            normalized = self._is_network_input(shapes[0], normalized)
        chunks = []
        for start in range(0, len(volumes), batch_size):
            chunk = np.stack(volumes[start:start + batch_size])
            # A constant batch shape compiles once; the filler rows are cut off again.
            padded = np.concatenate([chunk, np.repeat(chunk[-1:], batch_size - len(chunk), 0)]) \
                if len(volumes) > batch_size else chunk
            try:
                found = function(self.params, padded, normalized=normalized, stats=self.stats)
                chunks.append(np.asarray(found)[:len(chunk)])
            except ValueError as error:
                if "multiple of the patch" in str(error):
                    raise UserError(str(error)) from error
                raise
        return np.concatenate(chunks) if chunks else np.zeros((0, width), "f4")

    def _is_network_input(self, shape: tuple[int, ...], normalized: bool) -> bool:
        """Whether images of this shape are to be taken as they are.

        Raises:
            UserError: the shape is of no image of this model.
        """
        rank, windows = self.network.rank, len(self.network.windows)
        if len(shape) == rank and not normalized:
            return False
        if rank == 2:
            # [3, H, W] is network input by its shape.
            if len(shape) == 3 and shape[0] == 3:
                return True
            form = "[B, H, W], or [B, 3, H, W] as network input"
        else:
            form = f"[B, X, Y, Z{f', {windows}' if windows > 1 else ''}]" if normalized \
                else "[B, X, Y, Z]"
            if normalized and shape[3:] == ((windows,) if windows > 1 else ()) and len(shape) > 2:
                return True
        raise UserError(f"{'radiographs' if rank == 2 else 'volumes'} of the shape {shape} each "
                        f"are none of this model; give {form}")

    def _read(self, item: Any) -> np.ndarray:
        if not isinstance(item, (str, Path)):
            return np.asarray(item)
        from brgsa_jax.data.recipe import load_image

        return load_image(item, self.config.input).volume

    def encode_text(self, texts: Sequence[str]) -> np.ndarray:
        """Embeds texts to [B, D] float32, un-normalised.

        With `model.text.clean`, which imported models have, texts are cleaned like reports first.

        Raises:
            UserError: the model was imported without a tokenizer.
        """
        if self.tokenizer is None:
            raise UserError("this model was imported without a tokenizer, so that it encodes token "
                            "ids only; import it again with the tokenizer it was trained with")
        texts = list(texts)
        if self.config.text.get("clean", False):
            texts = [" ".join(clean_report(text)) for text in texts]
        empty = np.zeros((0, self.config.text.max_tokens), np.int32)
        return self.encode_text_ids(*(self.tokenizer(texts) if texts else (empty, empty)))

    def encode_text_ids(self, ids: Any, mask: Any, batch_size: int = 256) -> np.ndarray:
        """Embeds token ids [B, T] with attention mask [B, T] to [B, D] float32."""
        ids, mask = np.asarray(ids, np.int32), np.asarray(mask, np.int32)
        if not len(ids):
            return np.zeros((0, self.config.embed_dim), "f4")
        # Few shapes, so that few programs are compiled; the filler rows are cut off again.
        size = min(batch_size, 1 << (len(ids) - 1).bit_length())
        filler = ((0, -len(ids) % size), (0, 0))
        padded = np.pad(ids, filler, "edge"), np.pad(mask, filler, "edge")
        parts = [np.asarray(self._text(self.params, *(rows[i:i + size] for rows in padded),
                                       stats=self.stats)) for i in range(0, len(ids), size)]
        return np.concatenate(parts)[:len(ids)]

    def save(self, folder: str | Path) -> Path:
        """Writes config.json, model.safetensors and the tokenizer; `load_model` reads it."""
        from brgsa_jax.weights import save_model

        return save_model(self, folder)


def check_runs(model: "Model") -> None:
    """Traces both towers without computing, so that what cannot run is found at once.

    Raises:
        UserError: tokens that have no row in the model's table, or shapes that do not fit.
    """
    text, network = model.config.text, model.network
    ids = mask = np.zeros((1, text.max_tokens), np.int32)
    if model.tokenizer is not None:
        # Rows beyond a table would come back as NaN.
        last = max(model.tokenizer.backend.get_vocab().values())
        if last >= text.vocab:
            raise UserError(f"the tokenizer knows tokens up to number {last}, the model only "
                            f"{text.vocab}; use the tokenizer that was saved with the model")
        ids, mask = model.tokenizer(["There is"])
    try:
        jax.eval_shape(functools.partial(network.embed_text, stats=model.stats), model.params,
                       ids, mask)
        jax.eval_shape(functools.partial(network.embed_volume, stats=model.stats), model.params,
                       jax.ShapeDtypeStruct((1, *model.shape), jnp.int16))
    except ValueError as error:
        raise UserError(f"the model cannot run: {str(error).splitlines()[0]}; use the "
                        "configuration it was saved with") from error


def init_bank(key: jax.Array, rows: int, dim: int, init: str = "orthogonal") -> jax.Array:
    """Returns a knowledge bank [rows, dim] in float32.

    Args:
        key: random key.
        rows, dim: size; 2048 × 768 in the paper.
        init: "orthogonal" (bankᵀ bank = I for rows ≥ dim), "gaussian" N(0, 1), "xavier"
            (uniform), "uniform" in ±0.1; "kmeans" and a path ending in ".npy" give zeros, which
            the trainer fills (`train.bank_init`).

    Raises:
        UserError: unknown `init`.
    """
    choices = {
        "orthogonal": jax.nn.initializers.orthogonal(),
        "gaussian": jax.nn.initializers.normal(1.0),
        "xavier": jax.nn.initializers.xavier_uniform(),
        "uniform": lambda k, shape: jax.random.uniform(k, shape, minval=-0.1, maxval=0.1),
    }
    if bank_from_data(init):
        return jnp.zeros((rows, dim))
    if init not in choices:
        raise UserError(registry.miss("model.bank.init", init, [*choices, "kmeans", "FILE.npy"]))
    return choices[init](key, (rows, dim))


def bank_from_data(init: str) -> bool:
    """Whether a bank of this `model.bank.init` starts from data, which the trainer reads."""
    return init == "kmeans" or init.endswith(".npy")


def parameter_count(tree: Any) -> int:
    """Returns the number of entries of all arrays of a tree."""
    return int(sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(tree)))
