"""Released checkpoints of BrgSA and MGCA: import, and back to their names."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from brgsa_jax.config import UserError, from_tree, get_config
from brgsa_jax.data.tokenizer import find_tokenizer
from brgsa_jax.model import Model, Origin, check_runs, init_bank
from brgsa_jax.network import build
from brgsa_jax.registry import miss
from brgsa_jax.weights import hub
from brgsa_jax.weights.bert import bert_sizes, bert_table
from brgsa_jax.weights.mapping import (
    LINEAR,
    POINTWISE,
    SAME,
    Rule,
    Table,
    Transform,
    both,
    join,
    listing,
    norm,
    read_tree,
    renamed,
    shape_of,
    sources_of,
    statistics,
)
from brgsa_jax.weights.tensors import Tensors, open_tensors
from brgsa_jax.weights.vision import resnet_sizes, resnet_table, timm_table, vit_sizes

KINDS = ("brgsa", "mgca")
# Sizes of the released models, for what neither tensors nor a configuration tell.
RELEASED_WIDTH = 768
RELEASED = {
    "brgsa": {"vision.num_heads": 12, "text.num_attention_heads": 12, "text.last_n_layers": 4,
              "text.mean_divisor": 97, "text.max_length": 97},
    "mgca": {"vision.num_heads": 12, "text.num_attention_heads": 12, "text.max_words": 112},
}
BRGSA_CROP, BRGSA_GRID = (224, 224, 112), (14, 14, 14)


class Hints:
    """What no tensor tells, asked of several sources in their order.

    Args:
        kind: "brgsa" or "mgca".
        path: the checkpoint, for messages.
        sources: nested dicts in the format of golden config.json, first come first served.
        released: the model has the released sizes, so that theirs may stand in.
    """

    def __init__(self, kind: str, path: Path, sources: list[Mapping[str, Any]],
                 released: bool) -> None:
        self.kind, self.path, self.sources, self.released = kind, path, sources, released

    def find(self, key: str, default: Any = None) -> Any:
        """The value of a dotted key, or the default."""
        for source in self.sources:
            value: Any = source
            for name in key.split("."):
                value = value.get(name) if isinstance(value, Mapping) else None
            if value is not None:
                return value
        return default

    def number(self, key: str, *, least: int = 1) -> int:
        """The whole number of a key; the released model's where it may stand in.

        Raises:
            UserError: nobody tells, or it is no such number.
        """
        value = self.find(key, RELEASED[self.kind].get(key) if self.released else None)
        if value is None:
            section, name = key.split(".")
            raise UserError(f"{self.path}: no tensor tells {section}.{name}; give config={{"
                            f"\"{section}\": {{\"{name}\": …}}, …}}, or a config.json with it "
                            "beside the file")
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise UserError(f"{self.path}: {key}={value!r} of its configuration is no number of at "
                            f"least {least}; mend the configuration")
        return value

    def sizes(self, key: str, rank: int) -> tuple[int, ...] | None:
        """`rank` positive whole numbers of a key (one stands for all), None if nobody tells.

        Raises:
            UserError: it is something else.
        """
        value = self.find(key)
        if value is None:
            return None
        numbers = (value,) * rank if isinstance(value, int) else value
        if not isinstance(numbers, (list, tuple)) or len(numbers) != rank or not all(
                isinstance(n, int) and not isinstance(n, bool) and 0 < n <= 4096
                for n in numbers):
            raise UserError(f"{self.path}: {key}={value!r} of its configuration is not {rank} "
                            "positive whole numbers; mend the configuration")
        return tuple(numbers)

    def switch(self, key: str, default: bool) -> bool:
        """True or false of a key.

        Raises:
            UserError: it is something else.
        """
        value = self.find(key, default)
        if not isinstance(value, bool):
            raise UserError(f"{self.path}: {key}={value!r} of its configuration is neither true "
                            "nor false; mend the configuration")
        return value


def import_checkpoint(path: str | Path, kind: str = "auto", config: Any = None, *,
                      tokenizer: str | Path | None = None) -> Model:
    """Imports a released checkpoint of BrgSA or MGCA, with the quirks it was trained with.

    Sizes come from the shapes of its tensors. What no tensor tells (heads, layers that are
    pooled, the constant divisor of the text) comes from `config`, else the config.json beside the
    file, else the hyper-parameters inside it, else the released models' values where the towers
    are 768 wide.

    Args:
        path: a .ckpt or .pth of PyTorch, read without running anything in it, or .safetensors.
        kind: "brgsa", "mgca", or "auto" by the names of the tensors.
        config: dict or JSON file such as {"vision": {"num_heads": 12}, "text":
            {"num_attention_heads": 12, "last_n_layers": 4, "max_length": 97}}.
        tokenizer: folder or vocab.txt; by default what lies beside the file. Without one the
            model encodes token ids, not texts.

    Returns:
        The model in float32.

    Raises:
        UserError: one sentence that names the file: unreadable, of another model, refused because
            it would run code, sizes that no one tells, or a tokenizer of another size.
    """
    if kind not in ("auto", *KINDS):
        raise UserError(miss("kind", kind, ("auto", *KINDS)))
    path = Path(path)
    tensors = open_tensors(path)
    found = kind_of(tensors)
    if found is None or kind not in ("auto", found):
        names = ", ".join(list(tensors.specs)[:3])
        wanted = "BrgSA or MGCA" if kind == "auto" else {"brgsa": "BrgSA", "mgca": "MGCA"}[kind]
        raise UserError(f"{path} holds no {wanted} checkpoint: its {len(tensors.specs)} tensors "
                        f"are called {names} …; give another file, or load encoders by "
                        "model.vision.init_from and model.text.init_from")
    sources = _sources(path, found, config, tensors.extra)
    reader = _read_brgsa if found == "brgsa" else _read_mgca
    try:
        opened = reader(tensors, sources)
    except KeyError as error:
        raise UserError(f"{path} does not hold {LABEL[found]} whole: {error.args[0]} is missing; "
                        "give the file this model was saved to, whole and unchanged") from error
    section = from_tree(opened.section)
    try:
        network = build(section)
    except (UserError, ValueError, TypeError) as error:
        raise UserError(f"{path} and its configuration make no model: {error}; mend the "
                        "configuration") from error
    expected = jax.eval_shape(lambda: {
        "params": network.init(jax.random.key(0)), "stats": network.init_stats(jax.random.key(0)),
        **({"bank": init_bank(jax.random.key(0), section.bank.rows, section.embed_dim)}
           if section.bank.rows else {})})
    words = find_tokenizer(path, tokenizer, section.text.max_tokens,
                           lowercase=opened.hints.switch("text.do_lower_case", True))
    if words is not None and len(words) != section.text.vocab:
        raise UserError(f"the tokenizer {tokenizer or path.parent} knows {len(words)} tokens and "
                        f"{path} was trained with {section.text.vocab}; give the tokenizer it was "
                        "trained with")
    table = table_of(section, found)
    tree = read_tree(table, opened.tensors, expected)
    used = {name for name, _ in sources_of(table, expected)}
    origin = Origin(found, {name: opened.tensors.read(name) for name in opened.tensors.specs
                            if name not in used})
    model = Model(section, tree["params"], tree.get("bank"), words, tree["stats"], origin)
    check_runs(model)
    return model


LABEL = {"brgsa": "a BrgSA checkpoint", "mgca": "an MGCA checkpoint"}


class _Opened(NamedTuple):
    """A checkpoint understood: its model section, tensors by canonical names, hints."""

    section: dict[str, Any]
    tensors: Tensors
    hints: Hints


def kind_of(tensors: Tensors) -> str | None:
    """Tells BrgSA and MGCA by the names of their tensors; None for anything else."""
    if any("gloria." in name for name in tensors.specs):
        return "brgsa"
    if any(name.startswith("img_encoder_q.") for name in tensors.specs):
        return "mgca"
    return None


def _sources(path: Path, kind: str, config: Any, extra: Mapping[str, Any]) -> list[Any]:
    """Configurations in their order of precedence.

    Raises:
        UserError: unreadable, or of another system.
    """
    mend = "give a JSON file in the format of the checkpoint's config.json"
    named = []
    if isinstance(config, Mapping):
        named.append(("config", config))
    elif config is not None:
        named.append((config, hub.read_json(Path(config), mend)))
    beside = path.parent / "config.json"
    if beside.is_file():
        content = hub.read_json(beside, mend)
        # The folder may hold another model's, such as its text encoder's.
        if "system" in content or config is None and {"vision", "text"} <= set(content):
            named.append((beside, content))
    for where, content in named:
        if content.get("system", kind) != kind:
            raise UserError(f"{where} describes the system {content['system']!r} and {path} holds "
                            f"{LABEL[kind]}; give the configuration that belongs to it")
    inside = extra.get("hyper_parameters")
    sources = [content for _, content in named]
    if isinstance(inside, Mapping):
        sources.append(_inside(kind, inside))
    return sources


def _inside(kind: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Hyper-parameters of a Lightning checkpoint, in the format of config.json."""
    def find(*keys: str) -> Any:
        value: Any = parameters
        for key in keys:
            value = value.get(key) if isinstance(value, Mapping) else None
        return value

    if kind == "mgca":
        local = find("use_local_atten")
        return {"loss": {"use_local_atten": local, "num_heads": find("num_heads")}}
    words = find("data", "text", "word_num")
    return {"text": {"max_length": words, "mean_divisor": words,
                     "last_n_layers": find("model", "text", "last_n_layers"),
                     "aggregate_method": find("model", "text", "aggregate_method"),
                     "norm": find("model", "text", "norm")},
            "large_volume": find("data", "image", "imsize")}


def _input(hints: Hints) -> dict[str, Any]:
    """What the configuration says of window, mean, std and spacing; `build` checks the values."""
    def plain(value: Any) -> Any:
        return tuple(map(plain, value)) if isinstance(value, (list, tuple)) else value

    found = {key: hints.find(f"input.{key}") for key in ("window", "mean", "std", "spacing")}
    return {key: plain(value) for key, value in found.items() if value is not None}


def _heads(hints: Hints, key: str, width: int) -> int:
    heads = hints.number(key)
    if width % heads:
        raise UserError(f"{hints.path}: {key}={heads} does not divide the width {width}; give the "
                        "configuration that belongs to the file")
    return heads


def _agree(hints: Hints, pairs: Mapping[str, Any]) -> None:
    """Refuses a configuration whose sizes are not those of the tensors.

    Raises:
        UserError: every difference.
    """
    wrong = []
    for key, size in pairs.items():
        said = hints.find(key)
        said = tuple(said) if isinstance(said, list) else said
        if said is not None and said != size:
            wrong.append(f"{key}={said} and the tensors say {size}")
    if wrong:
        raise UserError(f"the configuration of {hints.path} does not belong to it: "
                        f"{listing(wrong)}; give the one that does")


def _grid(hints: Hints, places: int, patch: tuple[int, ...]) -> tuple[int, ...]:
    """Patches per axis the position table was made for.

    Raises:
        UserError: nobody tells, or it does not fit.
    """
    rank = len(patch)
    size = hints.sizes("vision.img_size", rank) or hints.sizes("vision.image_size", rank)
    grid = hints.sizes("vision.base_grid", rank)
    if grid is None and size is not None:
        grid = tuple(s // p for s, p in zip(size, patch, strict=True))
    if grid is None:
        side = round(places ** (1 / rank))
        grid = (side,) * rank
        if side**rank != places:
            raise UserError(f"{hints.path}: {places} positions are no equal grid, and no tensor "
                            "tells its sides; give config={\"vision\": {\"base_grid\": […]}}")
    if len(grid) != rank or np.prod(grid) != places:
        raise UserError(f"{hints.path}: a grid of {list(grid)} patches does not have its {places} "
                        "positions; give the configuration that belongs to the file")
    return grid


def table_of(section: Any, kind: str) -> Table:
    """The table of a checkpoint of this kind whose model has this `model` section."""
    vision, types = section.vision, bool(section.text.token_types)
    if kind == "brgsa":
        return _brgsa_table(tuple(vision.patch), types)
    image = "img_encoder_q.model."
    if vision.name == "resnet50":
        table = resnet_table(vision.get("stages", (3, 4, 6, 3)),
                             vision.get("block", "bottleneck"), image)
    else:
        table = timm_table(tuple(vision.patch), 3, image)
    return _mgca_table(table, types, bool(section.cross_attention_heads))


# BrgSA.

_G = "gloria."


def _brgsa_table(patch: tuple[int, ...], token_types: bool = True) -> Table:
    bert = bert_table(f"{_G}text_encoder.model.", token_types=token_types)
    vit = timm_table(patch, 1, f"{_G}img_encoder.model.")
    rest = Table((*both(f"{_G}text_encoder.emb_global", "params/text_head/linear"),
                  *both(f"{_G}img_encoder.global_embedder", "params/vision_head/linear"),
                  Rule(f"{_G}dictionarylearning.dictionary.weight", "bank")),
                 (r"gloria\.text_encoder\.emb_local\..*",
                  r"gloria\.img_encoder\.local_embedder\..*"), "")
    return join(LABEL["brgsa"], bert, vit, rest)


def _read_brgsa(tensors: Tensors, sources: list[Any]) -> _Opened:
    tensors = renamed(tensors, lambda name: _G + name.rpartition(_G)[2] if _G in name else name)
    text = bert_sizes(tensors.specs, f"{_G}text_encoder.model.")
    vision = vit_sizes(tensors.specs, f"{_G}img_encoder.model.")
    rows, dim = shape_of(tensors.specs, f"{_G}dictionarylearning.dictionary.weight", 2)
    hints = Hints("brgsa", tensors.path, sources,
                  text["width"] == vision["width"] == RELEASED_WIDTH)
    patch, places = vision["patch"], vision.pop("places")
    vision.pop("channels")
    if len(patch) != 3:
        raise UserError(f"{tensors.path}: its patches have {len(patch)} sides, not 3; only BrgSA's "
                        "volumes are read")
    _agree(hints, {"vision.hidden_size": vision["width"], "vision.num_layers": vision["depth"],
                   "vision.mlp_dim": vision["mlp_width"], "vision.patch_size": patch,
                   "text.vocab_size": text["vocab"], "text.hidden_size": text["width"],
                   "text.num_hidden_layers": text["depth"],
                   "text.intermediate_size": text["mlp_width"],
                   "text.max_position_embeddings": text["positions"],
                   "embedding_dim": dim, "bank.dict_size": rows})
    if hints.switch("text.norm", False):
        raise UserError(f"{tensors.path}: text.norm=True of its configuration normalises the text "
                        "embedding, which is not done here; choose another checkpoint")
    grid = _grid(hints, places, patch)
    base = tuple(g * p for g, p in zip(grid, patch, strict=True))
    shape = hints.sizes("large_volume", 3)
    if shape is None:
        # Released numbers are those of uncropped volumes.
        shape = (256, 256, 128) if base == BRGSA_CROP else base
    length = hints.number("text.max_length")
    section = get_config("brgsa_paper").model.to_dict()
    section.update(embed_dim=dim, dtype="float32")
    section["input"].update(_input(hints), shape=shape)
    section["bank"].update(rows=rows, scale=dim**-0.5 if hints.switch("bank.norm", False) else 1.0)
    section["vision"].update(
        vision, heads=_heads(hints, "vision.num_heads", vision["width"]),
        # The code reads the table as (Z, Y, X), whatever it was made for.
        base_grid=grid[::-1])
    section["text"].update(
        text, heads=_heads(hints, "text.num_attention_heads", text["width"]), max_tokens=length,
        divisor=hints.number("text.mean_divisor") if hints.find("text.mean_divisor") else length,
        last_n_layers=hints.number("text.last_n_layers"),
        aggregate=hints.find("text.aggregate_method", "sum"),
        clean=hints.switch("text.clean", True))
    return _Opened(section, tensors, hints)


# MGCA.

def _mgca_head(source: str, target: str, transform: Transform) -> Table:
    params, stats = f"params/{target}", f"stats/{target}"
    rules = (*both(f"{source}.head.0", f"{params}/hidden", transform),
             *norm(f"{source}.head.1", f"{params}/hidden_norm"),
             *statistics(f"{source}.head.1", f"{stats}/hidden_norm"),
             *both(f"{source}.head.3", f"{params}/out", transform),
             *statistics(f"{source}.head.4", f"{stats}/out_norm"))
    return Table(rules, (re.escape(source) + r"\.head\.\d\.num_batches_tracked",), "")


def _mgca_attention() -> Table:
    rules = []
    for side in ("word", "patch"):
        source, target = f"{side}_local_atten_layer", f"params/cross_attention/{side}"
        rules += [Rule(f"{source}.in_proj_weight", f"{target}/in_w"),
                  Rule(f"{source}.in_proj_bias", f"{target}/in_b"),
                  *both(f"{source}.out_proj", target, SAME, names=("out_w", "out_b"))]
    return Table(tuple(rules), (), "")


def _mgca_table(vision: Table, token_types: bool, attention: bool) -> Table:
    heads = [_mgca_head(f"{tower}_encoder_q.{kind}_embed", f"{ours}{part}", transform)
             for tower, ours in (("img", "vision"), ("text", "text"))
             for kind, part, transform in (("global", "_head", LINEAR),
                                           ("local", "_local_head", POINTWISE))]
    unused = [r"text_encoder_q\.model\.encoder\.layer\.\d+\.crossattention\..*"]
    if not attention:
        unused.append(r"(patch|word)_local_atten_layer\..*")
    rest = Table((Rule("prototype_layer.weight", "params/prototypes"),), tuple(unused), "")
    return join(LABEL["mgca"], vision, bert_table("text_encoder_q.model.",
                                                  token_types=token_types),
                *heads, *([_mgca_attention()] if attention else []), rest)


def _read_mgca(tensors: Tensors, sources: list[Any]) -> _Opened:
    image = "img_encoder_q.model."
    text = bert_sizes(tensors.specs, "text_encoder_q.model.")
    prototypes, dim = shape_of(tensors.specs, "prototype_layer.weight", 2)
    hidden = shape_of(tensors.specs, "img_encoder_q.global_embed.head.0.weight", 2)[0]
    local = shape_of(tensors.specs, "img_encoder_q.local_embed.head.0.weight", 3)[0]
    convolutional = f"{image}conv1.weight" in tensors.specs
    width = (RELEASED_WIDTH if convolutional
             else shape_of(tensors.specs, f"{image}patch_embed.proj.weight", 4)[0])
    hints = Hints("mgca", tensors.path, sources, text["width"] == width == RELEASED_WIDTH)
    _agree(hints, {"text.vocab_size": text["vocab"], "text.hidden_size": text["width"],
                   "text.num_hidden_layers": text["depth"],
                   "text.intermediate_size": text["mlp_width"],
                   "text.max_position_embeddings": text["positions"],
                   "heads.hidden_dim": hidden, "heads.emb_dim": dim,
                   "num_prototypes": prototypes})
    section = get_config("mgca_paper:resnet50" if convolutional else "mgca_paper").model.to_dict()
    if convolutional:
        sizes = resnet_sizes(tensors.specs, image)
        section["vision"].update({key: sizes[key] for key in ("stages", "block", "width")})
    else:
        sizes = vit_sizes(tensors.specs, image)
        patch, places, channels = (sizes.pop(key) for key in ("patch", "places", "channels"))
        if channels != 3:
            raise UserError(f"{tensors.path}: its images have {channels} channels, not 3; only "
                            "MGCA's radiographs are read")
        _agree(hints, {"vision.embed_dim": sizes["width"], "vision.depth": sizes["depth"],
                       "vision.in_chans": channels})
        grid = _grid(hints, places, patch)
        section["input"]["shape"] = tuple(g * p for g, p in zip(grid, patch, strict=True))
        section["vision"].update(sizes, patch=patch,
                                 heads=_heads(hints, "vision.num_heads", sizes["width"]))
    attention = hints.switch("loss.use_local_atten", False)
    section.update(embed_dim=dim, prototypes=prototypes,
                   cross_attention_heads=hints.number("loss.num_heads") if attention else 0)
    section["head"]["hidden"], section["local_head"]["hidden"] = hidden, local
    section["input"].update(_input(hints))
    section["text"].update(text, clean=hints.switch("text.clean", True),
                           max_tokens=hints.number("text.max_words"),
                           heads=_heads(hints, "text.num_attention_heads", text["width"]))
    return _Opened(section, tensors, hints)
