"""The two towers, their projection heads and the bank as pure functions of parameters.

`Network` is what training uses: `init` and `embed_*` on a plain dict of parameters. `Model` is
what people use: a network with its weights and tokenizer.
"""

import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from brgsa_jax import (
    nn,  # noqa: F401  (registers the encoders)
    registry,
)
from brgsa_jax.config import UserError, from_tree

BANK_INITS = ("orthogonal", "gaussian", "xavier", "uniform")


class Encoder(NamedTuple):
    """A pure-function encoder: init(key) -> params, apply(params, *inputs) -> output."""

    init: Callable[[jax.Array], Any]
    apply: Callable[..., Any]


def _encoder(module: Any, *examples: jax.ShapeDtypeStruct) -> Encoder:
    def init(key: jax.Array) -> Any:
        return module.init(key, *(jnp.zeros(e.shape, e.dtype) for e in examples))["params"]

    return Encoder(init, lambda params, *inputs: module.apply({"params": params}, *inputs))


@dataclass(frozen=True)
class Network:
    """Encoders, heads and input normalisation of one model configuration.

    Attributes:
        vision: volumes [B, X, Y, Z] in network units -> VisionTower.
        text: ids [B, T], mask [B, T] -> TextTower.
        vision_head, text_head: pooled [B, W] -> [B, D].
        windows: pairs (low, high) in HU, each mapped linearly to [-1, 1] and clipped.
        mean, std: applied after the window.
    """

    vision: Encoder
    text: Encoder
    vision_head: Encoder
    text_head: Encoder
    windows: tuple[tuple[float, float], ...]
    mean: float
    std: float

    def init(self, key: jax.Array) -> dict[str, Any]:
        """Returns random parameters {"vision", "text", "vision_head", "text_head"}."""
        parts = ("vision", "text", "vision_head", "text_head")
        return {name: getattr(self, name).init(k)
                for name, k in zip(parts, jax.random.split(key, len(parts)), strict=True)}

    def normalize(self, hu: jax.Array) -> jax.Array:
        """Maps HU [B, X, Y, Z] to network input: window to [-1, 1], then (x - mean) / std.

        Several windows become channels, [B, X, Y, Z, C], as a radiologist looks at lung, soft
        tissue and bone one after another.
        """
        hu = hu.astype(jnp.float32)
        channels = [jnp.clip((hu - low) * (2.0 / (high - low)) - 1.0, -1.0, 1.0)
                    for low, high in self.windows]
        x = channels[0] if len(channels) == 1 else jnp.stack(channels, axis=-1)
        return (x - self.mean) / self.std

    def embed_volume(self, params: Any, hu: jax.Array, normalized: bool = False) -> jax.Array:
        """Embeds volumes [B, X, Y, Z] (HU, or network units) to un-normalised [B, D] float32."""
        x = hu if normalized else self.normalize(hu)
        pooled = self.vision.apply(params["vision"], x).pooled
        return self.vision_head.apply(params["vision_head"], pooled)

    def embed_text(self, params: Any, ids: jax.Array, mask: jax.Array) -> jax.Array:
        """Embeds token ids [B, T] with mask [B, T] to un-normalised [B, D] float32."""
        pooled = self.text.apply(params["text"], ids, mask).pooled
        return self.text_head.apply(params["text_head"], pooled)


def build(config: Any) -> Network:
    """Builds the network of a `model` configuration section.

    Args:
        config: the section `model` with sub-sections input, vision, text; text.vocab is set.

    Raises:
        UserError: unknown encoder name or an option it does not have.
    """
    dtype = jnp.dtype(config.dtype)

    def make(kind: str, section: Any, drop: Sequence[str], **more: Any) -> Any:
        options = {k: v for k, v in section.items() if k not in ("name", *drop)}
        try:
            return registry.get(kind, section.name)(dtype=dtype, **options, **more)
        except (KeyError, TypeError) as error:
            raise UserError(f"model.{kind}: {error.args[0]}") from error

    shape, windows = tuple(config.input.shape), window_pairs(config.input.window)
    channels = () if len(windows) == 1 else (len(windows),)
    vision = make("vision", config.vision, (), input_shape=shape)
    text = make("text", config.text, ("tokenizer", "max_tokens"))
    head = lambda: registry.get("head", "linear")(dim=config.embed_dim)  # noqa: E731
    struct = jax.ShapeDtypeStruct
    tokens = struct((1, config.text.max_tokens), jnp.int32)
    return Network(
        vision=_encoder(vision, struct((1, *shape, *channels), jnp.float32)),
        text=_encoder(text, tokens, tokens),
        vision_head=_encoder(head(), struct((1, config.vision.width), jnp.float32)),
        text_head=_encoder(head(), struct((1, config.text.width), jnp.float32)),
        windows=windows,
        mean=config.input.mean, std=config.input.std)


def window_pairs(window: Sequence[Any]) -> tuple[tuple[float, float], ...]:
    """Returns `model.input.window`, one pair (low, high) or several, as pairs of floats."""
    pairs = window if isinstance(window[0], (tuple, list)) else (window,)
    return tuple((float(low), float(high)) for low, high in pairs)


def init_bank(key: jax.Array, rows: int, dim: int, init: str = "orthogonal") -> jax.Array:
    """Returns a knowledge bank [rows, dim] in float32.

    Args:
        key: random key.
        rows, dim: size; 2048 × 768 in the paper.
        init: "orthogonal" (bankᵀ bank = I for rows ≥ dim), "gaussian" N(0, 1), "xavier"
            (uniform), "uniform" in ±0.1.

    Raises:
        UserError: unknown `init`.
    """
    choices = {
        "orthogonal": jax.nn.initializers.orthogonal(),
        "gaussian": jax.nn.initializers.normal(1.0),
        "xavier": jax.nn.initializers.xavier_uniform(),
        "uniform": lambda k, shape: jax.random.uniform(k, shape, minval=-0.1, maxval=0.1),
    }
    if init not in choices:
        raise UserError(registry.miss("model.bank.init", init, choices))
    return choices[init](key, (rows, dim))


@functools.lru_cache(maxsize=4)
def _compiled(config: str) -> tuple[Network, Callable[..., Any], Callable[..., Any]]:
    """Network and jitted encoders of a configuration in JSON; models of one shape share them."""
    network = build(from_tree(json.loads(config)))
    return (network, jax.jit(network.embed_volume, static_argnames="normalized"),
            jax.jit(network.embed_text))


class Model:
    """A network with weights and tokenizer.

    Attributes:
        config: the `model` configuration section.
        network: its pure functions.
        params: nested dict of arrays.
        bank: [K, D] knowledge bank, or None.
        tokenizer: a `data.tokenizer.Tokenizer`.
        spacing, shape: canonical grid of volumes read from files, in mm and voxels.
    """

    def __init__(self, config: Any, params: Any, bank: jax.Array | None, tokenizer: Any) -> None:
        self.config = config
        self.network, self._volume, self._text = _compiled(
            json.dumps(config.to_dict(), sort_keys=True))
        self.params = params
        self.bank = bank
        self.tokenizer = tokenizer
        self.spacing = tuple(config.input.spacing)
        self.shape = tuple(config.input.shape)

    def encode_volume(self, paths_or_arrays: Any, *, normalized: bool = False,
                      batch_size: int = 8) -> np.ndarray:
        """Embeds volumes.

        Args:
            paths_or_arrays: file paths, or HU volumes [B, X, Y, Z] in the canonical LPS frame
                (network input when `normalized`).
            normalized: the arrays are already windowed and normalised.
            batch_size: volumes encoded at once; the result does not depend on it.

        Returns:
            [B, D] float32, un-normalised.

        Raises:
            UserError: a file is not a usable CT, or the shape does not fit the patches.
        """
        if isinstance(paths_or_arrays, (str, Path)):
            paths_or_arrays = [paths_or_arrays]
        volumes = [self._read(v) for v in paths_or_arrays]
        chunks = []
        for start in range(0, len(volumes), batch_size):
            chunk = np.stack(volumes[start:start + batch_size])
            if chunk.ndim not in (4, 5):
                raise UserError(f"volumes have {chunk.ndim - 1} axes; give [B, X, Y, Z]")
            # A constant batch shape compiles once; the filler rows are cut off again.
            padded = np.concatenate([chunk, np.repeat(chunk[-1:], batch_size - len(chunk), 0)]) \
                if len(volumes) > batch_size else chunk
            try:
                chunks.append(np.asarray(self._volume(self.params, padded,
                                                      normalized=normalized))[:len(chunk)])
            except ValueError as error:
                if "multiple of the patch" in str(error):
                    raise UserError(str(error)) from error
                raise
        return np.concatenate(chunks) if chunks else np.zeros((0, self.config.embed_dim), "f4")

    def _read(self, item: Any) -> np.ndarray:
        if not isinstance(item, (str, Path)):
            return np.asarray(item)
        from brgsa_jax.data.volume import Preprocess, load_volume

        return load_volume(item, Preprocess(spacing=self.spacing, shape=self.shape)).volume

    def encode_text(self, texts: Sequence[str]) -> np.ndarray:
        """Embeds texts to [B, D] float32, un-normalised."""
        ids, mask = self.tokenizer(list(texts))
        return self.encode_text_ids(ids, mask)

    def encode_text_ids(self, ids: Any, mask: Any, batch_size: int = 256) -> np.ndarray:
        """Embeds token ids [B, T] with attention mask [B, T] to [B, D] float32."""
        ids, mask = np.asarray(ids, np.int32), np.asarray(mask, np.int32)
        if not len(ids):
            return np.zeros((0, self.config.embed_dim), "f4")
        parts = [np.asarray(self._text(self.params, ids[i:i + batch_size], mask[i:i + batch_size]))
                 for i in range(0, len(ids), batch_size)]
        return np.concatenate(parts)

    def save(self, folder: str | Path) -> Path:
        """Writes config.json, model.safetensors and the tokenizer; `load_model` reads it."""
        from brgsa_jax.weights import save_model

        return save_model(self, folder)


def parameter_count(tree: Any) -> int:
    """Returns the number of entries of all arrays of a tree."""
    return int(sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(tree)))
