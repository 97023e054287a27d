"""The transformers backend with torch and real model files."""

import json
import shutil

import pytest
import torch
import transformers
from test_llm import TEMPLATE, report, tokenizer, told

from brgsa_jax.summarize.cache import Cache
from brgsa_jax.summarize.llm import LocalModel, TransformersBackend
from brgsa_jax.summarize.run import summarize_table
from brgsa_jax.summarize.validate import InvalidAnswer

ANSWER = '["Emphysema"]'


def save(folder, model, tokens):
    model.save_pretrained(folder)
    tokens.save_pretrained(folder)
    assert (folder / "model.safetensors").is_file()
    return str(folder)


def llama(tokens, seed=0):
    torch.manual_seed(seed)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=len(tokens), hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=16384,
        initializer_range=0.3, bos_token_id=None, eos_token_id=tokens.eos_token_id))


def gpt2(tokens):
    torch.manual_seed(1)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=len(tokens), n_embd=64, n_layer=2, n_head=4, n_positions=16384,
        initializer_range=0.3, bos_token_id=None, eos_token_id=tokens.eos_token_id))


def answering(tokens):
    """A Llama in which every token leads to one other: <|assistant|>, the answer, the end."""
    size = len(tokens)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=size, hidden_size=size + size % 2, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=1, max_position_embeddings=16384, tie_word_embeddings=False,
        bos_token_id=None, eos_token_id=tokens.eos_token_id))
    number = tokens.convert_tokens_to_ids
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(torch.eye(size, model.config.hidden_size))
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.lm_head.weight.zero_()
        model.lm_head.weight[number("<|end|>")] = 1
        model.lm_head.weight[number(ANSWER), number("<|assistant|>")] = 2
    return model


@pytest.fixture(scope="module")
def reports():
    return [report(n) + " Unremarkable otherwise." * (n % 4) for n in range(10)]


@pytest.mark.parametrize(("make", "template"), [(llama, TEMPLATE), (gpt2, None)])
def test_a_random_model_loses_no_report_and_batches_change_nothing(tmp_path, reports, make,
                                                                   template):
    tokens = tokenizer(template)
    folder = save(tmp_path / "model", make(tokens), tokens)
    backend = TransformersBackend(folder, batch_size=4, max_tokens=24)
    given = list(backend.summarize(reports))
    assert sorted(position for position, _ in given) == list(range(10))
    assert all(isinstance(found, InvalidAnswer) for _, found in given)
    assert backend.account.repairs == 10, "each answer that is no list is asked for once more"
    local = LocalModel.load(folder, max_tokens=24)
    # Short, so that the report weighs something in a random model.
    chats = [[{"role": "system", "content": "Read."}, {"role": "user", "content": text}]
             for text in reports]
    together = local(chats)
    assert together == [local([chat])[0] for chat in chats], "padding changes answers"
    assert len(set(together)) > 5, "reports change nothing"


def test_answers_become_summaries_and_a_second_call_asks_nothing(tmp_path, reports):
    tokens = tokenizer()
    tokens.add_tokens([ANSWER])
    folder = save(tmp_path / "answering", answering(tokens), tokens)
    table = tmp_path / "reports.csv"
    table.write_text("id,report\n" + "".join(f"{n},{text}\n" for n, text in enumerate(reports)))
    for asked in (10, 0):
        with Cache(tmp_path / "cache.jsonl") as cache:
            counts = summarize_table(table, text_column="report", out=tmp_path / "out.jsonl",
                                     backend=TransformersBackend(folder, batch_size=4),
                                     cache=cache)
        assert (counts.ok, counts.asked) == (10, asked)
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [(row["id"], row["findings"]) for row in rows] == [
        (str(n), ["Emphysema"]) for n in range(10)]


def test_unusable_models_are_refused_and_their_code_is_not_run(tmp_path, reports):
    tokens = tokenizer()
    good = save(tmp_path / "gpt2", gpt2(tokens), tokens)
    assert "device" in told(lambda: LocalModel.load(good, max_tokens=8, device="nowhere"))
    pickled = tmp_path / "pickled"
    shutil.copytree(good, pickled)
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    damaged = tmp_path / "damaged"
    shutil.copytree(good, damaged)
    (damaged / "model.safetensors").write_bytes(b"\x10" * 100)
    code = tmp_path / "code"
    code.mkdir()
    (code / "config.json").write_text(json.dumps({
        "model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil",
                                           "AutoModelForCausalLM": "evil.Evil",
                                           "AutoTokenizer": ["evil.Evil", None]}}))
    (code / "tokenizer_config.json").write_text((code / "config.json").read_text())
    (code / "evil.py").write_text("raise SystemExit('code of the folder was run')")
    (tmp_path / "empty").mkdir()
    for folder in (pickled, damaged, code, tmp_path / "empty"):
        message = told(lambda folder=folder: list(
            TransformersBackend(str(folder)).summarize(reports)))
        assert str(folder) in message and "\n" not in message
