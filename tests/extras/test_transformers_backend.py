"""The transformers backend with torch and real model files; for maintainers, not for pytest.

Run from the root of the repository, in an environment with the extra `convert`:

    python -m tests.transformers_backend_check

It writes tiny Llama and GPT-2 folders with random weights, and one whose weights are set so that
it answers, and reads reports with them as `brgsa summarize --backend transformers` does.
"""

import json
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers

from brgsa_jax.summarize import llm
from brgsa_jax.summarize.cache import Cache
from brgsa_jax.summarize.llm import LocalModel, TransformersBackend
from brgsa_jax.summarize.run import summarize_table
from brgsa_jax.summarize.validate import InvalidAnswer
from tests.test_llm import TEMPLATE, report, tokenizer, told

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


def main():
    root = Path(tempfile.mkdtemp())
    transformers.utils.logging.disable_progress_bar()
    print(f"torch {torch.__version__}, transformers {transformers.__version__}")
    reports = [report(n) + " Unremarkable otherwise." * (n % 4) for n in range(10)]

    for kind, make, template in (("llama", llama, TEMPLATE), ("gpt2", gpt2, None)):
        tokens = tokenizer(template)
        folder = save(root / kind, make(tokens), tokens)
        start = time.perf_counter()
        backend = TransformersBackend(folder, batch_size=4, max_tokens=24)
        given = list(backend.summarize(reports))
        seconds = time.perf_counter() - start
        assert sorted(position for position, _ in given) == list(range(10))
        assert all(isinstance(found, InvalidAnswer) for _, found in given)
        local = LocalModel.load(folder, max_tokens=24)
        # Short, so that the report weighs something in a random model.
        chats = [[{"role": "system", "content": "Read."}, {"role": "user", "content": text}]
                 for text in reports]
        together, alone = local(chats), [local([chat])[0] for chat in chats]
        assert together == alone, "padding changes answers"
        assert len(set(together)) > 5, "reports change nothing"
        print(f"{kind}: 10 of 10 reports listed, {backend.account.repairs} repairs, batches equal "
              f"single reports, {seconds:.1f} s")

    tokens = tokenizer()
    tokens.add_tokens([ANSWER])
    folder = save(root / "answering", answering(tokens), tokens)
    table = root / "reports.csv"
    table.write_text("id,report\n" + "".join(f"{n},{text}\n" for n, text in enumerate(reports)))
    for asked in (10, 0):
        with Cache(root / "cache.jsonl") as cache:
            counts = summarize_table(table, text_column="report", out=root / "out.jsonl",
                                     backend=TransformersBackend(folder, batch_size=4),
                                     cache=cache)
        assert (counts.ok, counts.asked) == (10, asked), counts
    rows = [json.loads(line) for line in (root / "out.jsonl").read_text().splitlines()]
    assert {tuple(row["findings"]) for row in rows} == {("Emphysema",)}
    print(f"answering: {counts}, backend {rows[0]['backend']!r}")

    (root / "answering" / "model.safetensors").rename(root / "answering" / "pytorch_model.bin")
    print("refused:", told(lambda: list(TransformersBackend(folder).summarize(reports))))
    print("refused:", told(lambda: list(TransformersBackend(str(root)).summarize(reports))))
    (root / "llama" / "model.safetensors").write_bytes(b"\x10" * 100)
    print("refused:", told(lambda: list(TransformersBackend(str(root / "llama")).summarize(
        reports))))
    code = root / "code"
    code.mkdir()
    (code / "config.json").write_text(json.dumps({
        "model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil",
                                           "AutoModelForCausalLM": "evil.Evil",
                                           "AutoTokenizer": ["evil.Evil", None]}}))
    (code / "tokenizer_config.json").write_text((code / "config.json").read_text())
    (code / "evil.py").write_text("raise SystemExit('code of the folder was run')")
    print("refused:", told(lambda: list(TransformersBackend(str(code)).summarize(reports))))
    print("refused:", told(lambda: llm.LocalModel.load(str(root / "gpt2"), max_tokens=8,
                                                       device="nowhere")))
    return 0


if __name__ == "__main__":
    sys.exit(main())
