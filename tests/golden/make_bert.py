"""Writes golden/bert: small BERTs as Hugging Face folders, and what transformers makes of them.

A maintainer's command, not a test: `pip install torch transformers`, then
`python tests/golden/make_bert.py`.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import BertConfig, BertForPreTraining, BertModel

HERE = Path(__file__).parent / "bert"


def trained(model: torch.nn.Module, seed: int) -> None:
    """Gives every parameter a size it could have after training; none is 0 or 1 throughout."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=generator)
        if "LayerNorm.weight" in name:
            noise = 1.0 + 0.3 * noise
        elif name.endswith("bias"):
            noise = 0.15 * noise
        elif "embeddings." in name:
            # Small, so that the epsilon of the first norm counts.
            noise = 0.03 * noise
        else:
            noise = 0.25 * noise
        p.data.copy_(noise)


def make(sizes: dict, seed: int, kind: type = BertModel) -> torch.nn.Module:
    config = BertConfig(attn_implementation="eager", **sizes)
    model = kind(config).eval()
    trained(model, seed)
    return model


def texts(config: BertConfig, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ids, mask and token types of three texts; the first is as long as the position table."""
    rng = np.random.default_rng(seed)
    length = config.max_position_embeddings
    mask = np.arange(length) < np.array([length, 3, length // 2])[:, None]
    ids = np.where(mask, rng.integers(1, config.vocab_size, mask.shape), config.pad_token_id)
    types = np.where(mask, rng.integers(0, config.type_vocab_size, mask.shape), 0)
    return ids, mask.astype(np.int64), types


def record(model: torch.nn.Module, folder: Path, seed: int) -> None:
    """Runs a model in float64 and stores its inputs and what it gave."""
    bert = getattr(model, "bert", model).double()
    inputs = dict(zip(("input_ids", "attention_mask", "token_type_ids"),
                      map(torch.from_numpy, texts(bert.config, seed)), strict=True))
    found = {name: value.numpy() for name, value in inputs.items()}
    with torch.no_grad():
        found["last_with_types"] = bert(**inputs).last_hidden_state.numpy()
        del inputs["token_type_ids"]
        out = bert(**inputs, output_hidden_states=True, output_attentions=True)
    found["hidden"] = torch.stack(out.hidden_states).numpy()
    found["attention"] = out.attentions[-1][:, :, 0].mean(1).numpy()
    np.savez_compressed(folder / "expected.npz", **found)


def fresh(name: str) -> Path:
    shutil.rmtree(HERE / name, ignore_errors=True)
    (HERE / name).mkdir(parents=True)
    return HERE / name


def plain() -> None:
    """As it is saved today."""
    folder, model = fresh("plain"), make(dict(
        vocab_size=50, hidden_size=18, num_hidden_layers=5, num_attention_heads=3,
        intermediate_size=40, max_position_embeddings=14), 0)
    model.save_pretrained(folder)
    record(model, folder, 0)


def old() -> None:
    """As in 2019: a legacy pickle, TensorFlow's names of norms, heads, no type of the model."""
    folder, model = fresh("old"), make(dict(
        vocab_size=37, hidden_size=20, num_hidden_layers=3, num_attention_heads=5,
        intermediate_size=28, max_position_embeddings=16, type_vocab_size=3), 1,
        BertForPreTraining)
    state = {name.replace("LayerNorm.weight", "LayerNorm.gamma")
                 .replace("LayerNorm.bias", "LayerNorm.beta"): value
             for name, value in model.state_dict().items()}
    state["bert.embeddings.position_ids"] = torch.arange(16)[None]
    torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    keys = ("attention_probs_dropout_prob", "hidden_act", "hidden_dropout_prob", "hidden_size",
            "initializer_range", "intermediate_size", "max_position_embeddings",
            "num_attention_heads", "num_hidden_layers", "type_vocab_size", "vocab_size")
    (folder / "config.json").write_text(
        json.dumps({key: getattr(model.config, key) for key in keys}, indent=2) + "\n")
    record(model, folder, 1)


def shards() -> None:
    """In several files, with another epsilon and one token type."""
    folder, model = fresh("shards"), make(dict(
        vocab_size=44, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=48, max_position_embeddings=12, type_vocab_size=1,
        layer_norm_eps=1e-5), 2)
    model.save_pretrained(folder, max_shard_size="12KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    record(model, folder, 2)


def half() -> None:
    """In bfloat16; what is expected is what float64 makes of these weights."""
    folder, model = fresh("half"), make(dict(
        vocab_size=41, hidden_size=16, num_hidden_layers=3, num_attention_heads=4,
        intermediate_size=32, max_position_embeddings=15), 3)
    model.to(torch.bfloat16).save_pretrained(folder)
    assert {x.dtype for x in load_file(folder / "model.safetensors").values()} == {torch.bfloat16}
    record(model, folder, 3)


if __name__ == "__main__":
    for write in (plain, old, shards, half):
        write()
