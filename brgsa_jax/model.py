"""The two towers, their projection heads and the bank as pure functions of parameters.

`Network` is what training uses: `init` and `embed_*` on a plain dict of parameters. `Model` is
what people use: a network with its weights and tokenizer.
"""

import functools
import json
import math
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
from brgsa_jax.data.tokenizer import clean_report
from brgsa_jax.nn.attention import ANYWHERE, Placement
from brgsa_jax.nn.norm import WHOLE_BATCH, Scope
from brgsa_jax.nn.words import gather_words

# Types the matrix products may have.
DTYPES = ("float32", "bfloat16")


class Encoder(NamedTuple):
    """A pure-function encoder.

    Attributes:
        init: key -> parameters.
        apply: (params, *inputs, stats=…) -> output, as at inference.
        init_stats: key -> running batch statistics; {} for what has none.
        update: (params, stats, *inputs) -> (output, new statistics), as in training.
    """

    init: Callable[[jax.Array], Any]
    apply: Callable[..., Any]
    init_stats: Callable[[jax.Array], Any]
    update: Callable[..., Any]


def encoder_of(module: Any, *examples: jax.ShapeDtypeStruct) -> Encoder:
    """Makes an encoder of a flax module whose inputs have these shapes."""
    def variables(key: jax.Array) -> Any:
        return module.init(key, *(jnp.zeros(e.shape, e.dtype) for e in examples))

    def apply(params: Any, *inputs: Any, stats: Any = None) -> Any:
        return module.apply({"params": params, "batch_stats": stats or {}}, *inputs)

    def update(params: Any, stats: Any, *inputs: Any) -> tuple[Any, Any]:
        if not stats:
            return apply(params, *inputs), {}
        output, changed = module.apply({"params": params, "batch_stats": stats}, *inputs,
                                       train=True, mutable=["batch_stats"])
        return output, changed["batch_stats"]

    return Encoder(lambda key: variables(key)["params"], apply,
                   lambda key: variables(key).get("batch_stats", {}), update)


class Towers(NamedTuple):
    """What the towers give before any head; the fields of tokens are None without local heads.

    Attributes:
        image, text: pooled [B, W]; None of a side that was not given.
        patches: image tokens [B, N, W]; patch_attention: CLS row [B, N], None for a tower
            without CLS token.
        words: [B, T-1, W], sums of their pieces; word_attention: [B, T-1]; pad_mask: [B, T-1]
            bool, True where there is no word.
        logits: [B, P] of a classifier, which only heads give.
    """

    image: jax.Array | None
    text: jax.Array | None
    patches: jax.Array | None = None
    patch_attention: jax.Array | None = None
    words: jax.Array | None = None
    word_attention: jax.Array | None = None
    pad_mask: jax.Array | None = None
    logits: jax.Array | None = None


class Origin(NamedTuple):
    """Where an imported model came from, so that it can go back complete.

    Attributes:
        kind: "brgsa" or "mgca".
        unused: tensors of its checkpoint that no forward pass needs, by their names there.
    """

    kind: str
    unused: dict[str, np.ndarray]


@dataclass(frozen=True)
class Network:
    """Encoders, heads and input normalisation of one model configuration.

    Attributes:
        parts: encoders by name: vision, text, vision_head, text_head, and for token-level losses
            vision_local_head, text_local_head; for a model with classes classifier.
        extras: initialisers of what the objective learns beside them: prototypes [K, D], logit
            {log_scale, bias}, cross_attention {word, patch: {in_w, in_b, out_w, out_b}}.
        words: options of `nn.words.gather_words`.
        mask_padding: padding words stay out of the local head's batch statistics.
        windows: pairs (low, high) in HU or grey levels, each mapped linearly to [-1, 1] and
            clipped.
        mean, std: applied after the window.
        rank: 3 for volumes [B, X, Y, Z], 2 for radiographs [B, H, W].
        frozen: parts that run in training as at inference.
    """

    parts: dict[str, Encoder]
    extras: dict[str, Callable[[jax.Array], Any]]
    words: dict[str, Any]
    mask_padding: bool
    windows: tuple[tuple[float, float], ...]
    mean: float
    std: float
    rank: int
    frozen: frozenset[str] = frozenset()

    @property
    def vision(self) -> Encoder:
        """Network input -> VisionTower."""
        return self.parts["vision"]

    @property
    def text(self) -> Encoder:
        """Ids [B, T], mask [B, T] -> TextTower."""
        return self.parts["text"]

    @property
    def has_tokens(self) -> bool:
        """Whether patches and words are projected too."""
        return "vision_local_head" in self.parts

    def init(self, key: jax.Array) -> dict[str, Any]:
        """Returns random parameters by the names of `parts` and `extras`."""
        makers = {**{name: part.init for name, part in self.parts.items()}, **self.extras}
        return {name: make(k) for (name, make), k in zip(
            makers.items(), jax.random.split(key, len(makers)), strict=True)}

    def init_stats(self, key: jax.Array) -> dict[str, Any]:
        """Returns the running batch statistics of the parts that have some."""
        stats = {name: part.init_stats(key) for name, part in self.parts.items()}
        return {name: value for name, value in stats.items() if value}

    def normalize(self, values: jax.Array) -> jax.Array:
        """Maps HU [B, X, Y, Z] to network input: window to [-1, 1], then (x - mean) / std.

        Several windows become channels, [B, X, Y, Z, C], as a radiologist looks at lung, soft
        tissue and bone one after another. Radiographs [B, H, W] become [B, 3, H, W], the grey
        image three times.
        """
        values = values.astype(jnp.float32)
        channels = [jnp.clip((values - low) * (2.0 / (high - low)) - 1.0, -1.0, 1.0)
                    for low, high in self.windows]
        if self.rank == 2:
            x = jnp.stack(channels * 3, axis=1)
        else:
            x = channels[0] if len(channels) == 1 else jnp.stack(channels, axis=-1)
        return (x - self.mean) / self.std

    def _run(self, name: str, *inputs: Any, params: Any, stats: Any, new: dict[str, Any],
             train: bool) -> Any:
        """Output of a part; in training its new statistics go into `new`."""
        if not train or name in self.frozen:
            return self.parts[name].apply(params[name], *inputs, stats=stats.get(name))
        output, changed = self.parts[name].update(params[name], stats.get(name, {}), *inputs)
        if changed:
            new[name] = changed
        return output

    def run_towers(self, params: Any, stats: Any, volume: jax.Array | None,
                   ids: jax.Array | None, mask: jax.Array | None, words: jax.Array | None, *,
                   train: bool) -> tuple[Towers, dict[str, Any]]:
        """Encodes the sides that are given; returns their new statistics too, {} unless training.

        Without batch statistics in a tower every sample is by itself, so that a batch may be run
        in chunks.
        """
        new: dict[str, Any] = {}
        run = functools.partial(self._run, params=params, stats=stats, new=new, train=train)
        image = None if volume is None else run("vision", self.normalize(volume))
        text = None if ids is None else run("text", ids, mask)
        if not self.has_tokens or image is None or text is None:
            return Towers(*(None if side is None else side.pooled for side in (image, text))), new
        gathered = gather_words(text.tokens, text.attention, words, **self.words)
        return Towers(image.pooled, text.pooled, image.tokens, image.attention,
                      gathered.embeddings, gathered.attention, gathered.pad_mask), new

    def run_heads(self, params: Any, stats: Any, towers: Towers, *,
                  train: bool) -> tuple[Towers, dict[str, Any]]:
        """Projects what the towers gave to un-normalised [..., D] float32.

        Returns:
            Towers with image, text, patches and words projected, logits of the classes, and the
            heads' new statistics, {} unless training.
        """
        new: dict[str, Any] = {}

        def head(name: str, values: jax.Array | None, *rest: Any) -> jax.Array | None:
            return None if values is None else self._run(
                name, values, *rest, params=params, stats=stats, new=new, train=train)

        result = towers._replace(image=head("vision_head", towers.image),
                                 text=head("text_head", towers.text))
        if "classifier" in self.parts:
            result = result._replace(logits=head("classifier", towers.image))
        if towers.patches is not None:
            counted = ~towers.pad_mask if self.mask_padding else None
            result = result._replace(patches=head("vision_local_head", towers.patches),
                                     words=head("text_local_head", towers.words, counted))
        return result, new

    def embed_volume(self, params: Any, values: jax.Array, normalized: bool = False,
                     stats: Any = None) -> jax.Array:
        """Embeds volumes [B, X, Y, Z] (HU, or network units) to un-normalised [B, D] float32."""
        stats = stats or {}
        x = values if normalized else self.normalize(values)
        pooled = self.vision.apply(params["vision"], x, stats=stats.get("vision")).pooled
        return self.parts["vision_head"].apply(params["vision_head"], pooled,
                                               stats=stats.get("vision_head"))

    def classify(self, params: Any, values: jax.Array, normalized: bool = False,
                 stats: Any = None) -> jax.Array:
        """Probabilities [B, P] float32 of a model with classes, of volumes as `embed_volume`'s."""
        x = values if normalized else self.normalize(values)
        pooled = self.vision.apply(params["vision"], x, stats=(stats or {}).get("vision")).pooled
        return jax.nn.sigmoid(self.parts["classifier"].apply(params["classifier"], pooled))

    def embed_text(self, params: Any, ids: jax.Array, mask: jax.Array,
                   stats: Any = None) -> jax.Array:
        """Embeds token ids [B, T] with mask [B, T] to un-normalised [B, D] float32."""
        stats = stats or {}
        pooled = self.text.apply(params["text"], ids, mask, stats=stats.get("text")).pooled
        return self.parts["text_head"].apply(params["text_head"], pooled,
                                             stats=stats.get("text_head"))


def check_sizes(config: Any) -> None:
    """Checks numbers of a `model` section that came from a file.

    Raises:
        UserError: every key whose value cannot be.
    """
    problems = []

    def expect(section: Any, key: str, good: Callable[[Any], bool], what: str) -> None:
        value = section.get(key.rpartition(".")[2])
        try:
            fine = not isinstance(value, bool) and bool(good(value))
        except (TypeError, ValueError, IndexError, ZeroDivisionError):
            fine = False
        if not fine:
            problems.append(f"model.{key}={value!r} is not {what}")

    def whole(least: int, most: int = 10**6) -> Callable[[Any], bool]:
        return lambda value: isinstance(value, int) and least <= value <= most

    def number(value: Any) -> bool:
        return isinstance(value, (int, float)) and math.isfinite(value)

    vision, text, image = config.vision, config.text, config.input
    expect(config, "dtype", lambda v: v in DTYPES, f"one of {', '.join(DTYPES)}")
    expect(config, "embed_dim", whole(1), "a positive number")
    expect(config.bank, "bank.rows", whole(0, 10**9), "a number of rows")
    expect(config.bank, "bank.scale", lambda v: number(v) and v > 0, "a positive number")
    for name, section in (("vision", vision), ("text", text)):
        for key in ("width", "depth", "heads", "mlp_width"):
            if key in section:
                expect(section, f"{name}.{key}", whole(1), "a positive number")
        for key in ("norm_epsilon", "block_epsilon"):
            if key in section:
                expect(section, f"{name}.{key}", lambda v: number(v) and v > 0,
                       "a positive number")
        if "heads" in section:
            expect(section, f"{name}.heads", lambda v, s=section: s["width"] % v == 0,
                   f"a divisor of model.{name}.width={section.get('width')!r}")
    expect(text, "text.vocab", whole(1, 10**8), "a positive number")
    expect(text, "text.positions", whole(1), "a positive number")
    expect(text, "text.max_tokens", lambda v: whole(2)(v) and v <= text.positions,
           f"a number of tokens up to model.text.positions={text.get('positions')!r}")
    expect(text, "text.last_n_layers", lambda v: whole(1)(v) and v <= text.depth + 1,
           f"a number of the {text.get('depth')!r} layers' hidden states")
    expect(text, "text.divisor", whole(0), "a positive number, or 0")
    expect(image, "input.shape", lambda v: len(v) in (2, 3) and all(
        whole(1, 4096)(n) for n in v), "two or three sizes up to 4096")
    if len(image.get("shape", ())) == 3:
        expect(image, "input.spacing", lambda v: len(v) == 3 and all(
            number(n) and n > 0 for n in v), "three positive numbers")
    if image.get("stored", ()):
        expect(image, "input.stored", lambda v: len(v) == len(image.shape) and all(
            whole(1, 8192)(n) for n in v), "as many sizes as input.shape")
    if image.get("clamp", ()):
        expect(image, "input.clamp", lambda v: len(v) == 2 and all(
            isinstance(n, int) and -32768 <= n <= 32767 for n in v) and v[0] < v[1],
            "a rising pair of HU")
    expect(config, "classes", lambda v: v is None or all(
        isinstance(name, str) and name for name in v) and len({*v}) == len(v),
        "different names of findings")
    expect(image, "input.std", lambda v: number(v) and v > 0, "a positive number")
    expect(image, "input.mean", number, "a number")
    expect(image, "input.window", lambda v: all(
        number(low) and number(high) and low < high for low, high in window_pairs(v)),
        "a window (low, high), or several")
    if problems:
        raise UserError(f"the configuration of the model cannot be: {'; '.join(problems)}; use the "
                        "one it was saved with")


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


def build(config: Any, scope: Scope = WHOLE_BATCH, placement: Placement = ANYWHERE,
          tokens: bool = True) -> Network:
    """Builds the network of a `model` configuration section.

    Args:
        config: the section `model`; text.vocab is set.
        scope: how batch statistics are shared in training; see `nn.norm.Scope`.
        placement: on what attention runs; see `nn.attention.Placement`.
        tokens: the vision tower returns patch tokens also where no head takes them; without,
            pooling by CLS saves most of its last block on accelerators.

    Raises:
        UserError: unknown encoder name or an option it does not have, or a size that cannot be.
    """
    check_sizes(config)
    dtype = jnp.dtype(config.dtype)

    def make(kind: str, name: str, key: str, **options: Any) -> Any:
        try:
            return registry.get(kind, name)(**options)
        except (KeyError, TypeError) as error:
            raise UserError(f"model.{key}: {error.args[0]}") from error

    def options(section: Any, *drop: str) -> dict[str, Any]:
        return {k: v for k, v in section.items() if k not in ("name", *drop)}

    shape, windows = tuple(config.input.shape), window_pairs(config.input.window)
    struct = jax.ShapeDtypeStruct
    if len(shape) == 2:
        image = struct((1, 3, *shape), jnp.float32)
    else:
        channels = () if len(windows) == 1 else (len(windows),)
        image = struct((1, *shape, *channels), jnp.float32)
    ids = struct((1, config.text.max_tokens), jnp.int32)
    local = bool(config.local_head.name)
    vision = make("vision", config.vision.name, "vision", dtype=dtype, input_shape=shape,
                  scope=scope, placement=placement, need_cls_attention=local,
                  need_tokens=tokens or local,
                  **options(config.vision, "init_from", "inflate"))
    text = make("text", config.text.name, "text", dtype=dtype, placement=placement,
                **options(config.text, "tokenizer", "max_tokens", "clean", "init_from"))
    parts = {"vision": encoder_of(vision, image), "text": encoder_of(text, ids, ids)}
    towers = {name: jax.eval_shape(module.init_with_output, jax.random.key(0), *inputs)[0]
              for name, module, inputs in (("vision", vision, (image,)),
                                           ("text", text, (ids, ids)))}

    def head(section: str, example: Any) -> Encoder:
        settings = config[section]
        module = make("head", settings.name, section, dim=config.embed_dim, scope=scope,
                      hidden=settings.hidden)
        return encoder_of(module, example)

    for name in ("vision", "text"):
        parts[f"{name}_head"] = head("head", towers[name].pooled)
    if config.get("classes", ()):
        parts["classifier"] = encoder_of(
            make("head", "linear", "classes", dim=len(config.classes)), towers["vision"].pooled)
    if local:
        for name in ("vision", "text"):
            parts[f"{name}_local_head"] = head("local_head", towers[name].tokens)
    return Network(parts=parts, extras=_extras(config), words=config.words.to_dict(),
                   mask_padding=config.local_head.mask_padding, windows=windows,
                   mean=config.input.mean, std=config.input.std, rank=len(shape))


def _extras(config: Any) -> dict[str, Callable[[jax.Array], Any]]:
    """Initialisers of what the objective learns beside towers and heads."""
    dim, makers = config.embed_dim, {}
    if config.prototypes:
        def prototypes(key: jax.Array) -> jax.Array:
            rows = jax.random.normal(key, (config.prototypes, dim))
            return rows / jnp.linalg.norm(rows, axis=1, keepdims=True)

        makers["prototypes"] = prototypes
    if config.logit.scale:
        makers["logit"] = lambda _: {"log_scale": jnp.log(jnp.float32(config.logit.scale)),
                                     "bias": jnp.float32(config.logit.bias)}
    if config.cross_attention_heads:
        uniform = jax.nn.initializers.xavier_uniform()

        def attention(key: jax.Array) -> dict[str, jax.Array]:
            first, second = jax.random.split(key)
            return {"in_w": uniform(first, (3 * dim, dim)), "in_b": jnp.zeros(3 * dim),
                    "out_w": uniform(second, (dim, dim)), "out_b": jnp.zeros(dim)}

        makers["cross_attention"] = lambda key: {
            side: attention(k) for side, k in zip(("word", "patch"), jax.random.split(key),
                                                  strict=True)}
    return makers


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
        ids, mask = self.tokenizer(texts)
        return self.encode_text_ids(ids, mask)

    def encode_text_ids(self, ids: Any, mask: Any, batch_size: int = 256) -> np.ndarray:
        """Embeds token ids [B, T] with attention mask [B, T] to [B, D] float32."""
        ids, mask = np.asarray(ids, np.int32), np.asarray(mask, np.int32)
        if not len(ids):
            return np.zeros((0, self.config.embed_dim), "f4")
        parts = [np.asarray(self._text(self.params, ids[i:i + batch_size], mask[i:i + batch_size],
                                       stats=self.stats)) for i in range(0, len(ids), batch_size)]
        return np.concatenate(parts)

    def save(self, folder: str | Path) -> Path:
        """Writes config.json, model.safetensors and the tokenizer; `load_model` reads it."""
        from brgsa_jax.weights import save_model

        return save_model(self, folder)


def parameter_count(tree: Any) -> int:
    """Returns the number of entries of all arrays of a tree."""
    return int(sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(tree)))
