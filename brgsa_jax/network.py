"""The two towers and their heads as pure functions of a plain dict of parameters."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from brgsa_jax import (
    nn,  # noqa: F401  (registers the encoders)
    registry,
)
from brgsa_jax.config import UserError
from brgsa_jax.model_config import check_sizes, window_pairs
from brgsa_jax.nn.attention import ANYWHERE, Placement
from brgsa_jax.nn.norm import WHOLE_BATCH, Scope
from brgsa_jax.nn.words import gather_words


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
