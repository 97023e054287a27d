"""BERT text encoders: Hugging Face folders, and those inside checkpoints of BrgSA and MGCA."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from brgsa_jax import registry
from brgsa_jax.config import UserError
from brgsa_jax.network import Encoder, encoder_of
from brgsa_jax.weights import hub
from brgsa_jax.weights.mapping import (
    LINEAR,
    SAME,
    Rule,
    Table,
    below,
    both,
    depth_of,
    norm,
    read_tree,
    renamed,
    shape_of,
)
from brgsa_jax.weights.tensors import open_tensors

# Beside the encoder: a head of pre-training, and constants of older versions.
UNUSED = (r"pooler\..*", r"embeddings\.position_ids", r"embeddings\.token_type_ids")
# MGCA's code creates it and never uses it.
CROSS_ATTENTION = r"encoder\.layer\.\d+\.crossattention\..*"
WORDS = "embeddings.word_embeddings.weight"
# Ends of what stands before the names of a text encoder in BrgSA's and MGCA's checkpoints.
PARTS = ("text_encoder.model.", "text_encoder_q.model.")
MODEL_TYPES = ("bert", "cxr-bert")
ALWAYS = {"hidden_act": "gelu", "position_embedding_type": "absolute", "is_decoder": False,
          "add_cross_attention": False}
OPTIONS = ("last_n_layers", "aggregate", "divisor", "pool", "position_ids", "remat",
           "unroll", "implementation")
WANTED = "a folder with config.json and model.safetensors (or pytorch_model.bin)"


def bert_table(source: str = "", part: str = "text", token_types: bool = True) -> Table:
    """The table of Hugging Face's BertModel.

    Args:
        source: prefix of the names, such as "bert.".
        part: part of the model it becomes.
        token_types: there is a table of token types.
    """
    root = f"params/{part}"
    layer, block = f"{source}encoder.layer.{{i}}", f"{root}/layers/blocks"
    embeddings = ("word", "position", *(("token_type",) if token_types else ()))
    rules = [Rule(f"{source}embeddings.{name}_embeddings.weight", f"{root}/{name}/embedding", SAME)
             for name in embeddings]
    rules += norm(f"{source}embeddings.LayerNorm", f"{root}/norm")
    for name, target in (("attention.self.query", "query"), ("attention.self.key", "key"),
                         ("attention.self.value", "value"), ("attention.output.dense", "out"),
                         ("intermediate.dense", "up"), ("output.dense", "down")):
        rules += both(f"{layer}.{name}", f"{block}/{target}", LINEAR)
    for name, target in (("attention.output.LayerNorm", "attention_norm"),
                         ("output.LayerNorm", "mlp_norm")):
        rules += norm(f"{layer}.{name}", f"{block}/{target}")
    return Table(tuple(rules), tuple(re.escape(source) + u for u in UNUSED), "a BERT encoder")


def bert_sizes(specs: Mapping[str, Any], source: str = "") -> dict[str, int]:
    """Sizes of a BERT from the shapes of its tensors; heads are in no shape.

    Raises:
        KeyError: a tensor that tells a size is missing.
    """
    vocab, width = shape_of(specs, source + WORDS, 2)
    types = f"{source}embeddings.token_type_embeddings.weight"
    return {
        "vocab": vocab, "width": width, "depth": depth_of(specs, f"{source}encoder.layer."),
        "mlp_width": shape_of(specs, f"{source}encoder.layer.0.intermediate.dense.weight", 2)[0],
        "positions": shape_of(specs, f"{source}embeddings.position_embeddings.weight", 2)[0],
        "token_types": shape_of(specs, types, 2)[0] if types in specs else 0,
    }


class TextWeights(NamedTuple):
    """A text encoder that someone else trained.

    Attributes:
        sizes: options of the text encoder "bert": vocab, width, depth, mlp_width, positions,
            token_types, norm_epsilon, heads, which is None where nobody tells, and of a
            checkpoint position_ids.
        params: float32 arrays by the names of `nn.bert.Bert`.
        folder: of the file, where its tokenizer may be.
        path: the file.
    """

    sizes: dict[str, Any]
    params: dict[str, Any]
    folder: Path
    path: Path


def read_text(path_or_hub_id: str | Path) -> TextWeights:
    """Reads a BERT of a Hugging Face folder, or the text encoder of a BrgSA or MGCA checkpoint.

    Args:
        path_or_hub_id: a folder with config.json and model.safetensors (or pytorch_model.bin,
            read without running it), its file of tensors, a checkpoint, or a hub id.

    Raises:
        UserError: no BERT, one of a form whose numbers would come out wrong, or damaged files.
    """
    folder, file = hub.locate_weights(path_or_hub_id, WANTED)
    tensors = renamed(open_tensors(file), _canonical)
    prefixes = [name.removesuffix(WORDS) for name in tensors.specs
                if f".{name}".endswith(f".{WORDS}")]
    # Only of a checkpoint is everything known without a config.json.
    part = len(prefixes) == 1 and prefixes[0].endswith(PARTS)
    config_file, config = folder / "config.json", {}
    if not part:
        config = hub.read_json(config_file, hub.GIVE_CONFIG)
        names = f"{config.get('model_type')} {config.get('architectures')} {prefixes}".lower()
        if "roberta" in names or "camembert" in names:
            raise _roberta(config_file)
        hub.check_config(config_file, config, MODEL_TYPES, ALWAYS)
    if len(prefixes) != 1:
        raise UserError(f"{file} holds {len(prefixes) or 'no'} tensors {WORDS}, not one, so that "
                        f"it is no BERT; give {WANTED}")
    tensors = below(tensors, prefixes[0])
    try:
        sizes: dict[str, Any] = bert_sizes(tensors.specs)
    except KeyError as error:
        raise UserError(f"{file} does not hold a whole BERT: {error.args[0]} is missing; give "
                        f"{WANTED}") from error
    # MGCA's code gives every token position 0.
    places = "zero" if "text_encoder_q" in prefixes[0] else "sequential"
    sizes |= {"heads": None, "norm_epsilon": 1e-12, "position_ids": places} \
        if part else hub.check_sizes(
        config_file, config, {
            "vocab_size": sizes["vocab"], "hidden_size": sizes["width"],
            "num_hidden_layers": sizes["depth"], "intermediate_size": sizes["mlp_width"],
            "max_position_embeddings": sizes["positions"],
            "type_vocab_size": sizes["token_types"]}, sizes["width"])
    # No shape depends on the heads.
    encoder = _encoder({**sizes, "heads": sizes["heads"] or 1})
    expected = {"params": {"text": jax.eval_shape(encoder.init, jax.random.key(0))}}
    table = bert_table(token_types=bool(sizes["token_types"]))
    if part:
        table = table._replace(unused=(*table.unused, CROSS_ATTENTION))
    params = read_tree(table, tensors, expected)["params"]["text"]
    if not part and _skips_padding(params["position"]["embedding"], config):
        raise _roberta(file)
    return TextWeights(sizes, params, folder, file)


def load_bert(folder_or_hub_id: str | Path, *, dtype: str = "float32",
              **options: Any) -> tuple[Encoder, Any]:
    """Loads a BERT text encoder.

    Args:
        folder_or_hub_id: a Hugging Face folder with config.json and model.safetensors (or
            pytorch_model.bin, read without running it), or a hub id.
        dtype: type of the matrix products.
        **options: last_n_layers, aggregate, divisor, pool, position_ids, remat, unroll and
            implementation of `nn.bert.Bert`; by default the last four layers are summed (all, of
            a smaller model), over the mean of the real tokens.

    Returns:
        The encoder, whose `apply(params, input_ids[B, T], attention_mask[B, T])` gives a
        `nn.bert.TextTower`, and its float32 parameters.

    Raises:
        UserError: no BERT there, damaged files, or unknown options.
    """
    unknown = sorted(options.keys() - set(OPTIONS))
    if unknown:
        raise UserError(f"load_bert: {registry.miss('option', unknown[0], OPTIONS)}")
    weights = read_text(folder_or_hub_id)
    sizes = weights.sizes
    if sizes["heads"] is None:
        raise UserError(f"{weights.path} is a checkpoint, and no tensor tells how many heads its "
                        "text encoder has; use import_checkpoint")
    options = {"last_n_layers": min(4, sizes["depth"]), "divisor": 0, **options}
    layers = options["last_n_layers"]
    if not isinstance(layers, int) or not 1 <= layers <= sizes["depth"] + 1:
        raise UserError(f"load_bert: last_n_layers={layers!r} must be one of 1 to "
                        f"{sizes['depth'] + 1} for {weights.path}")
    try:
        return _encoder({**sizes, **options, "dtype": jnp.dtype(dtype)}), weights.params
    except (KeyError, TypeError) as error:
        raise UserError(f"load_bert: {error.args[0]}") from error


def _encoder(options: Mapping[str, Any]) -> Encoder:
    example = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    return encoder_of(registry.get("text", "bert")(**options), example, example)


def _canonical(name: str) -> str:
    """BertModel's name of a tensor; TensorFlow's names of norms are still found in old files."""
    return re.sub(r"LayerNorm\.(gamma|beta)$",
                  lambda m: f"LayerNorm.{'weight' if m[1] == 'gamma' else 'bias'}", name)


def _skips_padding(positions: np.ndarray, config: Mapping[str, Any]) -> bool:
    """Whether a position table is that of a RoBERTa that calls itself a BERT.

    Names and shapes of its tensors are a BERT's. But the row of its padding index, 1, is no
    text's, so that it stays zero; in a BERT every text's second token has it.
    """
    untrained = len(positions) > 2 and not positions[1].any() and positions[2].any()
    return bool(untrained) or (config.get("pad_token_id"), len(positions)) == (1, 514)


def _roberta(path: Path) -> UserError:
    return UserError(f"{path} belongs to a RoBERTa, whose positions start behind the padding "
                     "index, so that it would be read wrongly as a BERT; give a BERT")
