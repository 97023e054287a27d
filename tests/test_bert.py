"""BERT from Hugging Face folders: what transformers computed from them, stored; and refusals."""

import fnmatch
import json
import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import huggingface_hub
import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from brgsa_jax.config import UserError
from brgsa_jax.weights import import_checkpoint, load_bert
from brgsa_jax.weights.bert import read_text

GOLDEN = Path(__file__).parent / "golden/bert"
CHECKPOINTS = Path(__file__).parent / "golden/ckpt"
MODELS = ("plain", "old", "shards", "half")


@cache
def stored(name):
    with np.load(GOLDEN / name / "expected.npz") as data:
        return dict(data)


def close(ours, expected, tolerance=1e-5):
    """Largest error over the largest entry."""
    ours, expected = np.asarray(ours, np.float64), np.asarray(expected, np.float64)
    assert ours.shape == expected.shape
    assert np.abs(ours - expected).max() <= tolerance * np.abs(expected).max()


def run(name, *inputs, **options):
    encoder, params = load_bert(GOLDEN / name, **options)
    return jax.jit(encoder.apply)(params, *inputs)


@pytest.mark.parametrize("name", MODELS)
def test_equals_the_original(name):
    io = stored(name)
    ids, mask = io["input_ids"], io["attention_mask"]
    # A text that fills the position table, and shorter ones.
    assert mask.sum(1).max() == mask.shape[1] > mask.sum(1).min()
    real = mask[..., None]
    tower = run(name, ids, mask)
    close(tower.hidden * real, io["hidden"] * real)
    for ours, theirs in zip(tower.hidden, io["hidden"], strict=True):
        close(ours * real, theirs * real)
    close(tower.tokens * real, io["hidden"][-1] * real)
    close(tower.attention, io["attention"])
    np.testing.assert_array_equal(tower.mask, mask.astype(bool))
    typed = run(name, ids, mask, io["token_type_ids"])
    close(typed.tokens * real, io["last_with_types"] * real)


@pytest.mark.parametrize("options", [
    {}, {"aggregate": "mean"}, {"last_n_layers": 1, "divisor": 97},
    {"last_n_layers": 3, "aggregate": "mean", "divisor": 12}, {"last_n_layers": 6},
    {"last_n_layers": 2, "pool": "cls"}])
def test_pools_the_last_layers(options):
    io = stored("plain")
    mask = io["attention_mask"]
    chosen = io["hidden"][-options.get("last_n_layers", 4):]
    if options.get("pool") == "cls":
        pooled = chosen[:, :, 0]
    else:
        divisor = options.get("divisor") or mask.sum(1, keepdims=True)
        pooled = (chosen * mask[..., None]).sum(2) / divisor
    reduce = np.mean if options.get("aggregate") == "mean" else np.sum
    close(run("plain", io["input_ids"], mask, **options).pooled, reduce(pooled, 0))


def test_a_smaller_model_sums_all_its_layers():
    io = stored("shards")
    mask = io["attention_mask"][..., None]
    pooled = (io["hidden"][1:] * mask).sum((0, 2)) / mask.sum(1)
    close(run("shards", io["input_ids"], io["attention_mask"]).pooled, pooled)


def test_bfloat16_products_stay_near():
    io = stored("plain")
    rough = run("plain", io["input_ids"], io["attention_mask"], dtype="bfloat16")
    assert rough.pooled.dtype == np.float32
    real = io["attention_mask"][..., None]
    close(rough.hidden * real, io["hidden"] * real, 3e-2)
    with pytest.raises(AssertionError):
        close(rough.hidden * real, io["hidden"] * real, 1e-4)


# Folders that are not right.

def copy(tmp_path, name="plain", config=None, drop=(), tensors=None):
    """A copy of a golden folder, its configuration or tensors changed."""
    folder = tmp_path / "model"
    shutil.copytree(GOLDEN / name, folder, ignore=shutil.ignore_patterns("expected.npz"))
    content = json.loads((folder / "config.json").read_text()) | (config or {})
    for key in drop:
        del content[key]
    (folder / "config.json").write_text(json.dumps(content))
    if tensors:
        state = load_file(folder / "model.safetensors")
        save_file(tensors(state) or state, folder / "model.safetensors")
    return folder


def refused(where, match, **options):
    with pytest.raises(UserError, match=match) as error:
        load_bert(where, **options)
    message = str(error.value)
    assert "\n" not in message and Path(str(where)).name in message
    return message


def test_the_epsilon_is_the_configurations(tmp_path):
    io = stored("shards")
    folder = copy(tmp_path, "shards", {"layer_norm_eps": 1e-12})
    encoder, params = load_bert(folder)
    hidden = jax.jit(encoder.apply)(params, io["input_ids"], io["attention_mask"]).hidden
    with pytest.raises(AssertionError):
        close(hidden[0], io["hidden"][0])
    folder = copy(tmp_path / "default", "plain", drop=["layer_norm_eps"])
    assert read_text(folder).sizes["norm_epsilon"] == 1e-12


@pytest.mark.parametrize("kind", ["roberta", "xlm-roberta", "camembert", "roberta-prelayernorm"])
def test_a_roberta_is_refused(tmp_path, kind):
    refused(copy(tmp_path, config={"model_type": kind}),
            r"config.json belongs to a RoBERTa.*behind the padding index.*give a BERT")


def padding_row(row=1):
    def change(state):
        # As transformers and fairseq make and keep it.
        state["embeddings.position_embeddings.weight"][row] = 0
    return change


def longer(state):
    table = state["embeddings.position_embeddings.weight"]
    state["embeddings.position_embeddings.weight"] = np.resize(table, (514, table.shape[1]))


def prefixed(prefix):
    return lambda state: {prefix + name: tensor for name, tensor in state.items()}


@pytest.mark.parametrize("change", [
    {"tensors": padding_row()},
    {"tensors": longer, "config": {"pad_token_id": 1, "max_position_embeddings": 514}},
    {"tensors": prefixed("roberta.")},
    {"config": {"architectures": ["RobertaModel"]}},
], ids=["padding row", "514 positions", "names", "architecture"])
def test_a_roberta_that_calls_itself_a_bert_is_refused(tmp_path, change):
    refused(copy(tmp_path, **change), "belongs to a RoBERTa.*give a BERT")


def test_a_bert_with_padding_index_1_is_none(tmp_path):
    io = stored("plain")
    encoder, params = load_bert(copy(tmp_path, config={"pad_token_id": 1}))
    real = io["attention_mask"][..., None]
    hidden = jax.jit(encoder.apply)(params, io["input_ids"], io["attention_mask"]).hidden
    close(hidden * real, io["hidden"] * real)
    _, params = load_bert(copy(tmp_path / "zero", tensors=padding_row(0)))
    assert not params["position"]["embedding"][0].any()


@pytest.mark.parametrize(("config", "match"), [
    *(({"model_type": kind}, f"type '{kind}'.*bert or cxr-bert")
      for kind in ("albert", "distilbert", "electra", "deberta", "modernbert")),
    ({"position_embedding_type": "relative_key"}, "position_embedding_type='relative_key'"),
    ({"hidden_act": "gelu_new"}, "hidden_act='gelu_new', which would be computed wrongly"),
    ({"hidden_act": "relu"}, "hidden_act='relu'"),
    ({"is_decoder": True, "add_cross_attention": True},
     "is_decoder=True, add_cross_attention=True"),
    ({"vocab_size": 51, "num_hidden_layers": 12},
     "config.json does not belong.*vocab_size=51 and the tensors say 50; num_hidden_layers=12"),
    ({"hidden_size": 20}, "hidden_size=20 and the tensors say 18"),
    ({"intermediate_size": 1}, "intermediate_size=1 and the tensors say 40"),
    ({"max_position_embeddings": 512}, "max_position_embeddings=512 and the tensors say 14"),
    ({"type_vocab_size": 1}, "type_vocab_size=1 and the tensors say 2"),
    ({"num_attention_heads": 4}, "num_attention_heads=4 does not divide the width 18"),
    ({"num_attention_heads": None}, "num_attention_heads=None"),
    ({"num_attention_heads": "3"}, "num_attention_heads='3'"),
    ({"num_attention_heads": 0}, "num_attention_heads=0"),
    ({"layer_norm_eps": "tiny"}, "layer_norm_eps='tiny'"),
    ({"layer_norm_eps": -1}, "layer_norm_eps=-1"),
])
def test_a_configuration_that_would_be_read_wrongly_is_refused(tmp_path, config, match):
    refused(copy(tmp_path, config=config), match)


def adapter(state):
    state["encoder.layer.0.adapter.down.weight"] = np.zeros((4, 18), "f4")


def missing(state):
    del state["encoder.layer.3.output.dense.bias"], state["encoder.layer.2.output.dense.bias"]


def misshapen(state):
    state["encoder.layer.1.output.dense.weight"] = np.zeros((40, 18), "f4")


def flat(state):
    state["embeddings.word_embeddings.weight"] = np.zeros(900, "f4")


def far(state):
    state["encoder.layer.999999999.output.dense.bias"] = np.zeros(18, "f4")


def doubled(state):
    state["embeddings.LayerNorm.gamma"] = state["embeddings.LayerNorm.weight"]


def truth(state):
    state["embeddings.LayerNorm.bias"] = np.zeros(18, bool)


@pytest.mark.parametrize(("change", "match"), [
    (adapter, "encoder.layer.0.adapter.down.weight is unknown"),
    (missing, r"layer.2.output.dense.bias is missing; .*layer.3.output.dense.bias is missing"),
    (misshapen, r"layer.1.output.dense.weight has shape \[40, 18\], not \[18, 40\]"),
    (flat, "embeddings.word_embeddings.weight with 2 axes is missing"),
    (far, "num_hidden_layers=5 and the tensors say 6"),
    (doubled, "the same tensor more than once"),
    (truth, "embeddings.LayerNorm.bias holds bool"),
    (lambda state: {"a": state["embeddings.LayerNorm.weight"]}, "holds no tensors .*no BERT"),
    (lambda state: state | prefixed("second.")(state), "holds 2 tensors .*no BERT"),
    (lambda state: {name: x for name, x in state.items() if "intermediate" not in name},
     "does not hold a whole BERT: encoder.layer.0.intermediate.dense.weight is missing"),
])
def test_tensors_of_another_model_are_refused(tmp_path, change, match):
    refused(copy(tmp_path, tensors=change), match)


def test_names_before_and_heads_behind_the_encoder_do_not_matter(tmp_path):
    plain = read_text(GOLDEN / "plain").params
    for number, change in enumerate((prefixed("bert."), prefixed("module.bert."), lambda state: {
            **prefixed("bert.")(state), "cls_projection_head.dense_to_hidden.weight":
            np.zeros((3, 18), "f4"), "qa_outputs.bias": np.zeros(2, "f4")})):
        found = read_text(copy(tmp_path / str(number), tensors=change)).params
        jax.tree.map(np.testing.assert_array_equal, plain, found)


@pytest.mark.parametrize(("name", "file"), [
    ("plain", "model.safetensors"), ("old", "pytorch_model.bin"),
    ("shards", "model-00002-of-00003.safetensors")])
def test_damaged_weights_are_refused(tmp_path, name, file):
    folder = copy(tmp_path, name)
    whole = (folder / file).read_bytes()
    for content in (whole[:-100], whole[:200], b""):
        (folder / file).write_bytes(content)
        with pytest.raises(UserError, match=f"{file} .*again$") as error:
            load_bert(folder)
        assert "\n" not in str(error.value)
    (folder / file).unlink()
    with pytest.raises(UserError, match="does not exist|holds no weights; it needs one of"):
        load_bert(folder)


def test_a_missing_or_broken_configuration_is_refused(tmp_path):
    folder = copy(tmp_path)
    for content, match in (("{", "config.json cannot be read"), ("[]", "it holds no object"),
                           (None, "config.json cannot be read .No such file.*belongs")):
        path = folder / "config.json"
        path.unlink() if content is None else path.write_text(content)
        refused(folder, match)


def test_places_without_a_model_are_refused(tmp_path):
    refused(tmp_path / "nothing", "there is no model at .*; give a folder with config.json")
    refused("./nothing", "there is no model at ./nothing")
    refused("nobody/nothing", "no folder here, and the hub gave no model .*check the path")
    refused("", "there is no model at ")
    (tmp_path / "config.json").write_text("{}")
    refused(tmp_path, "holds no weights; it needs one of model.safetensors")


@pytest.mark.parametrize(("options", "match"), [
    ({"last_layers": 4}, "unknown option 'last_layers'; did you mean 'last_n_layers'"),
    ({"width": 18}, "unknown option 'width'"),
    ({"pool": "max"}, "unknown pool 'max'"),
    ({"aggregate": "max"}, "unknown aggregate 'max'"),
    ({"dtype": "float33"}, "float33"),
    ({"last_n_layers": 7}, "last_n_layers=7 must be one of 1 to 6 for "),
    ({"last_n_layers": 0}, "last_n_layers=0"),
    ({"last_n_layers": "4"}, "last_n_layers='4'"),
])
def test_unknown_options_are_refused(options, match):
    with pytest.raises(UserError, match=match) as error:
        load_bert(GOLDEN / "plain", **options)
    assert "\n" not in str(error.value) and "load_bert" in str(error.value)


# The hub, without a network.

@pytest.mark.parametrize(("name", "calls"), [("plain", 1), ("shards", 1), ("old", 2)])
def test_a_model_of_the_hub_comes_without_code(tmp_path, monkeypatch, name, calls):
    remote, snapshot, asked = copy(tmp_path, name), tmp_path / "snapshot", []
    for extra in ("modeling.py", "vocab.txt", "tf_model.h5", "training_args.bin"):
        (remote / extra).write_text("x")
    if name != "old":
        (remote / "pytorch_model.bin").write_text("x")
    # Of others than the encoder there may be safetensors.
    save_file({"x": np.zeros(1)}, remote / "adapter.safetensors")

    def download(repository, *, allow_patterns):
        asked.append(repository)
        snapshot.mkdir(exist_ok=True)
        for file in remote.iterdir():
            if any(fnmatch.fnmatch(file.name, pattern) for pattern in allow_patterns):
                shutil.copyfile(file, snapshot / file.name)
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    found = read_text("owner/name")
    jax.tree.map(np.testing.assert_array_equal, read_text(GOLDEN / name).params, found.params)
    assert asked == ["owner/name"] * calls and found.folder == snapshot
    fetched = {file.name for file in snapshot.iterdir()}
    assert not fetched & {"modeling.py", "tf_model.h5", "training_args.bin"}
    assert ("pytorch_model.bin" in fetched) == (name == "old") and "vocab.txt" in fetched


# Text encoders inside of checkpoints.

@pytest.mark.parametrize("name", ["brgsa", "mgca"])
def test_a_checkpoint_gives_its_text_encoder_alone(name):
    path = CHECKPOINTS / f"{name}_public/checkpoint.ckpt"
    found, whole = read_text(path), import_checkpoint(path)
    jax.tree.map(np.testing.assert_array_equal, whole.params["text"], found.params)
    told = whole.config.text
    assert found.sizes == {**{key: told[key] for key in found.sizes}, "heads": None}
    assert found.folder == path.parent
    with pytest.raises(UserError, match="no tensor tells how many heads .*import_checkpoint"):
        load_bert(path)


def test_the_file_of_a_folder_stands_for_the_folder():
    found = read_text(GOLDEN / "old/pytorch_model.bin")
    jax.tree.map(np.testing.assert_array_equal, read_text(GOLDEN / "old").params, found.params)


# The size of real models.

LOAD = """
import json, sys, time
import brgsa_jax.weights
from brgsa_jax.weights.vision import read_vision

def memory(key):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

import jax
jax.random.key(0)
loaders = {"bert": brgsa_jax.weights.load_bert, "vit": read_vision}
before, start = memory("VmRSS"), time.perf_counter()
loaded = loaders[sys.argv[1]](sys.argv[2])
print(json.dumps([time.perf_counter() - start, memory("VmHWM") - before]))
"""


def write_tensors(path, shapes):
    """A safetensors file of these float32 shapes, one megabyte of numbers repeated."""
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 4 * int(np.prod(shape))
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    block = np.random.default_rng(0).normal(0, 0.02, 1 << 18).astype("f4").tobytes()
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for start in range(0, end, len(block)):
            file.write(block[:end - start])
    return end


def transformer(layer, names, depth=12):
    shapes = {}
    for index in range(depth):
        for name, out, into in names:
            shapes[f"{layer}.{index}.{name}.weight"] = (out, into) if into else (out,)
            shapes[f"{layer}.{index}.{name}.bias"] = (out,)
    return shapes


def bert_base(folder):
    square = [f"attention.self.{name}" for name in ("query", "key", "value")]
    names = [(name, 768, 768) for name in (*square, "attention.output.dense")]
    names += [("intermediate.dense", 3072, 768), ("output.dense", 768, 3072),
              ("attention.output.LayerNorm", 768, 0), ("output.LayerNorm", 768, 0)]
    (folder / "config.json").write_text(json.dumps({
        "model_type": "bert", "num_attention_heads": 12, "vocab_size": 30522}))
    return folder, write_tensors(folder / "model.safetensors", {
        "embeddings.word_embeddings.weight": (30522, 768),
        "embeddings.position_embeddings.weight": (512, 768),
        "embeddings.token_type_embeddings.weight": (2, 768),
        "embeddings.LayerNorm.weight": (768,), "embeddings.LayerNorm.bias": (768,),
        **transformer("encoder.layer", names)})


def vit_base(folder):
    names = [("attn.qkv", 2304, 768), ("attn.proj", 768, 768), ("mlp.fc1", 3072, 768),
             ("mlp.fc2", 768, 3072), ("norm1", 768, 0), ("norm2", 768, 0)]
    file = folder / "vit.safetensors"
    return file, write_tensors(file, {
        "cls_token": (1, 1, 768), "pos_embed": (1, 197, 768),
        "patch_embed.proj.weight": (768, 3, 16, 16), "patch_embed.proj.bias": (768,),
        **transformer("blocks", names), "norm.weight": (768,), "norm.bias": (768,),
        "head.weight": (1000, 768), "head.bias": (1000,)})


@pytest.mark.parametrize(("kind", "make", "least"), [("bert", bert_base, 435e6),
                                                     ("vit", vit_base, 345e6)])
def test_real_models_load_in_seconds_and_twice_their_memory(tmp_path, kind, make, least):
    where, size = make(tmp_path)
    assert size > least
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    done = subprocess.run([sys.executable, "-c", LOAD, kind, str(where)], capture_output=True,
                          text=True, env=environment, timeout=120)
    shutil.rmtree(tmp_path)
    assert done.returncode == 0, done.stderr
    seconds, peak = json.loads(done.stdout.splitlines()[-1])
    assert seconds <= 10
    # The weights themselves, and less than as much again on the way.
    assert size <= peak <= 2 * size
