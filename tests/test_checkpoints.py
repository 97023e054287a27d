"""Released checkpoints of BrgSA and MGCA: what the original code computed from them, stored."""

import json
import shutil
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file
from test_model import make_model

from brgsa_jax.config import UserError, flatten, from_tree, get_config
from brgsa_jax.evals.run import bridge
from brgsa_jax.evals.scores import score_matrix
from brgsa_jax.losses.knowledge import knowledge_interaction, read_bank
from brgsa_jax.mesh import make_mesh
from brgsa_jax.model import Model
from brgsa_jax.network import Towers
from brgsa_jax.nn.vit import resize_positions
from brgsa_jax.nn.words import gather_words
from brgsa_jax.predict import load_model
from brgsa_jax.train.step import judge
from brgsa_jax.weights import export_checkpoint, import_checkpoint
from brgsa_jax.weights.reference import reference_tensors
from brgsa_jax.weights.tensors import open_tensors

GOLDEN = Path(__file__).parent / "golden/ckpt"
BRGSA, MGCA = GOLDEN / "brgsa_public", GOLDEN / "mgca_public"


@cache
def imported(folder):
    return import_checkpoint(folder / "checkpoint.ckpt")


@cache
def stored(folder):
    with np.load(folder / "io.npz") as data:
        return dict(data), json.loads((folder / "texts.json").read_text())


def close(ours, expected, tolerance=1e-5):
    """Largest error over the largest entry."""
    ours, expected = np.asarray(ours, np.float64), np.asarray(expected, np.float64)
    assert ours.shape == expected.shape
    assert np.abs(ours - expected).max() <= tolerance * max(np.abs(expected).max(), 1e-300)


def recipe(name, model, **weights):
    """The objective of a recipe as training computes it, for a model that was imported."""
    config = get_config(name).to_dict()
    config["model"] = model.config.to_dict()
    for term, weight in weights.items():
        config["losses"][term]["weight"] = weight
    return jax.jit(judge(from_tree(config), mesh=make_mesh(1, 1, jax.devices()[:1])))


def groups(count):
    return np.arange(count, dtype=np.int32)[:, None].repeat(3, 1)


@pytest.mark.parametrize("size", ["", "_large"])
def test_brgsa_reads_volumes_as_the_original(size):
    model, (io, _) = imported(BRGSA), stored(BRGSA)
    volume = io[f"volume{size}"][:, 0]
    tower = jax.jit(model.network.vision.apply)(model.params["vision"], volume)
    close(tower.pooled, io[f"cls{size}"])
    close(tower.tokens, io[f"patch{size}"])
    v = model.encode_volume(volume, normalized=True)
    close(v, io[f"v{size}"])
    np.testing.assert_array_equal(v, model.encode_volume(io[f"volume{size}"], normalized=True))
    read = read_bank(jnp.asarray(v), model.bank)
    close(read.codes, io[f"z_v{size}"])
    close(read.reconstruction, io[f"v_hat{size}"])


def test_brgsa_reads_texts_as_the_original():
    model, (io, texts) = imported(BRGSA), stored(BRGSA)
    ids, mask = model.tokenizer(texts["captions"])
    np.testing.assert_array_equal(ids, io["caption_ids"])
    np.testing.assert_array_equal(mask, io["caption_mask"])
    tower = jax.jit(model.network.text.apply)(model.params["text"], ids, mask)
    for k, hidden in enumerate(tower.hidden):
        real = io["caption_mask"][..., None]
        close(hidden * real, io[f"text_hidden_{k}"] * real)
    close(tower.pooled, io["sent_pre"])
    t = model.encode_text_ids(io["caption_ids"], io["caption_mask"])
    close(t, io["t"])
    read = read_bank(jnp.asarray(t), model.bank)
    close(read.codes, io["z_t"])
    # Prompts are cleaned first, captions are not.
    close(model.encode_text(texts["prompts"]), io["t_prompt"])


@pytest.mark.parametrize("size", ["", "_large"])
def test_brgsa_scores_as_the_original(size):
    model, (io, texts) = imported(BRGSA), stored(BRGSA)
    v = model.encode_volume(io[f"volume{size}"], normalized=True)
    t = model.encode_text(texts["prompts"])
    for mode, name in (("mean", "score"), ("direct", "score_vt"), ("image_bridged", "score_vhat_t"),
                       ("text_bridged", "score_v_that"), ("bridged", "score_vhat_that")):
        close(score_matrix(v, t, bridge(model, v), bridge(model, t), mode), io[name + size])


def test_brgsa_has_the_loss_of_the_original():
    model, (io, _) = imported(BRGSA), stored(BRGSA)
    v = model.encode_volume(io["volume"], normalized=True)
    t = model.encode_text_ids(io["caption_ids"], io["caption_mask"])
    terms = jax.jit(knowledge_interaction)(v, t, model.bank)
    for ours, name in ((terms.contrast.image_to_text, "global_rows"),
                       (terms.contrast.text_to_image, "global_cols"),
                       (terms.contrast_reconstructed.image_to_text, "recon_rows"),
                       (terms.contrast_reconstructed.text_to_image, "recon_cols"),
                       (terms.reconstruction[0], "mse_img"),
                       (terms.reconstruction[1], "mse_text")):
        close(ours, io[f"loss_{name}"])
    judged = recipe("brgsa_paper", model)(Towers(v, t), groups(len(v)), model.bank, model.params)
    close(judged.objective.total, io["loss"])


def test_positions_are_read_as_brgsas_code_reads_them():
    with np.load(BRGSA / "pe_cases.npz") as cases:
        seen = 0
        for name in cases.files:
            case, _, target = name.partition("_to_")
            if not target:
                continue
            grid = cases[f"{case}_img"] // cases[f"{case}_patch"]
            table = cases[f"{case}_pos_embed"][0]
            shape = tuple(map(int, target.split("x")))
            # The table of a grid (X, Y, Z) is taken for one of (Z, Y, X).
            resized = resize_positions(jnp.asarray(table[1:], jnp.float32), grid[::-1], shape)
            close(np.concatenate([table[:1], resized]), cases[name][0])
            seen += 1
        assert seen >= 3


def mgca_towers(model, io):
    network, params = model.network, model.params
    image = jax.jit(network.vision.apply)(params["vision"], io["image"])
    text = jax.jit(network.text.apply)(params["text"], io["caption_ids"], io["caption_mask"])
    words = model.tokenizer.words(io["caption_ids"])
    gathered = gather_words(text.tokens, text.attention, words, **network.words)
    towers = Towers(image.pooled, text.pooled, image.tokens, image.attention,
                    gathered.embeddings, gathered.attention, gathered.pad_mask)
    heads = jax.jit(network.run_heads, static_argnames="train")(params, model.stats, towers,
                                                                 train=False)[0]
    return image, text, towers, heads


def normalized(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def test_mgca_computes_what_the_original_computed():
    model, (io, texts) = imported(MGCA), stored(MGCA)
    ids, _ = model.tokenizer(texts["captions_clean"])
    np.testing.assert_array_equal(ids, io["caption_ids"])
    image, text, towers, heads = mgca_towers(model, io)
    for k, hidden in enumerate(text.hidden):
        close(hidden, io[f"text_hidden_{k}"])
    # The stored row keeps its CLS column.
    close(image.attention, io["cls_attn"].mean(1)[:, 1:])
    close(text.attention, io["text_cls_attn"].mean(1))
    for ours, name in ((towers.image, "img_feat"), (towers.patches, "patch_feat"),
                       (towers.text, "report_feat"), (towers.words, "word_feat"),
                       (towers.word_attention, "word_attn"),
                       (heads.image, "img_emb_raw"), (heads.text, "report_emb_raw"),
                       (heads.patches, "patch_emb_raw"), (heads.words, "word_emb_raw"),
                       (normalized(heads.image), "img_emb"),
                       (normalized(heads.text), "report_emb")):
        close(ours, io[name])
    np.testing.assert_array_equal(towers.pad_mask, io["pad_mask"])
    close(model.encode_volume(io["image"], normalized=True), io["img_emb_raw"])
    close(model.encode_text(texts["reports"]), io["report_emb_raw"])


@pytest.mark.parametrize(("cta", "cpa", "name"), [(1.0, 1.0, "loss_total_111"),
                                                  (0.7, 0.5, "loss_total_1_07_05")])
def test_mgca_has_the_losses_of_the_original(cta, cpa, name):
    model, (io, _) = imported(MGCA), stored(MGCA)
    *_, towers, heads = mgca_towers(model, io)
    judge = recipe("mgca_paper", model, token_alignment=cta, prototype_alignment=cpa)
    judged = judge(heads, groups(6), None, model.params)
    close(judged.objective.total, io[name])


# There and back.

def tensors_of(path):
    opened = open_tensors(path)
    return {name: opened.read(name) for name in opened.specs}


@pytest.mark.parametrize("folder", [BRGSA, MGCA], ids=["brgsa", "mgca"])
def test_there_and_back_is_bit_exact(folder, tmp_path):
    before = tensors_of(folder / "checkpoint.ckpt")
    model = imported(folder)
    # Through the native format, and read again without any other file.
    again = load_model(model.save(tmp_path / "native"))
    back = export_checkpoint(again, tmp_path / "back" / "model.safetensors")
    after = tensors_of(back)
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype, name
        np.testing.assert_array_equal(after[name], tensor, err_msg=name)
    # The config.json written beside it tells what the tensors do not.
    third = import_checkpoint(back, tokenizer=folder / "vocab.txt")
    assert third.config.to_dict() == model.config.to_dict()
    texts = ["There is Lung nodule"]
    np.testing.assert_array_equal(third.encode_text(texts), again.encode_text(texts))


def full_size(name, path):
    """A file with every tensor of the real model, tiny numbers in it; pages that repeat."""
    shapes = json.loads((GOLDEN / f"keys_full_{name}.json").read_text())
    integers = ("position_ids", "num_batches_tracked")
    save_file({key: np.zeros(shape, "i8" if key.endswith(integers) else "f4")
               for key, shape in shapes.items()}, str(path))
    return shapes


@pytest.mark.parametrize(("name", "expected"), [
    ("brgsa", {"vision.heads": 12, "text.heads": 12, "text.last_n_layers": 4, "text.divisor": 97,
               "text.max_tokens": 97, "vision.depth": 12, "bank.rows": 2048, "embed_dim": 768,
               "vision.patch": (16, 16, 8), "input.shape": (256, 256, 128),
               "vision.base_grid": (14, 14, 14), "vision.positions": "frozen",
               "text.token_types": 2, "text.vocab": 30522}),
    ("mgca", {"vision.heads": 12, "text.heads": 12, "text.depth": 6, "text.max_tokens": 112,
              "text.position_ids": "zero", "text.token_types": 0, "text.vocab": 28996,
              "input.shape": (224, 224), "embed_dim": 128, "prototypes": 500,
              "head.hidden": 2048}),
    ("mgca_resnet50", {"vision.name": "resnet50", "vision.stages": (3, 4, 6, 3),
                       "vision.resize": 299, "embed_dim": 128})])
def test_the_released_sizes_are_covered_whole(name, expected, tmp_path):
    shapes = full_size(name, tmp_path / "model.safetensors")
    model = import_checkpoint(tmp_path / "model.safetensors")
    config = flatten(model.config)
    assert {key: config[key] for key in expected} == expected
    state, _ = reference_tensors(model)
    assert {key: list(x.shape) for key, x in state.items()} == shapes
    # What a model that was trained here would be filled up with has the original's shapes too.
    native = Model(model.config, model.params, model.bank, None, model.stats)
    state, _ = reference_tensors(native)
    assert {key: list(x.shape) for key, x in state.items()} == shapes


def test_a_model_trained_here_goes_to_the_originals_names_or_says_why_not(tmp_path):
    model = make_model(**{"model.vision.pool": "cls", "model.vision.stem": (),
                     "model.text.divisor": 16})
    back = import_checkpoint(export_checkpoint(model, tmp_path / "a/model.safetensors"))
    volume = np.random.default_rng(0).normal(size=(2, *model.shape)).astype("f4")
    close(back.encode_volume(volume, normalized=True), model.encode_volume(volume, normalized=True))
    ids = np.arange(32, dtype=np.int32).reshape(2, 16) % model.config.text.vocab
    mask = np.ones_like(ids)
    close(back.encode_text_ids(ids, mask), model.encode_text_ids(ids, mask))
    with pytest.raises(UserError, match=r"text.divisor is 0, there always max_tokens.*native"):
        export_checkpoint(make_model(), tmp_path / "b.safetensors")
    assert not (tmp_path / "b.safetensors").exists()
    with pytest.raises(UserError, match="ends in none of"):
        export_checkpoint(imported(BRGSA), tmp_path / "b.onnx")


# Bad input: one sentence that names the file, and nothing half read.

def copied(folder, target, *names):
    target.mkdir(exist_ok=True)
    for name in names:
        shutil.copyfile(folder / name, target / name)
    return target / "checkpoint.ckpt"


def changed(folder, path, change):
    tensors = tensors_of(folder / "checkpoint.ckpt")
    change(tensors)
    save_file(tensors, str(path))
    shutil.copyfile(folder / "config.json", path.parent / "config.json")
    return path


def refused(path, match, **options):
    with pytest.raises(UserError, match=match) as error:
        import_checkpoint(path, **options)
    message = str(error.value)
    assert str(path) in message or path.name in message
    assert "\n" not in message
    return message


def test_sizes_that_no_tensor_tells_are_asked_for(tmp_path):
    path = copied(BRGSA, tmp_path, "checkpoint.ckpt")
    refused(path, r"no tensor tells vision.num_heads; give config=.*config.json")
    model = import_checkpoint(path, config={"vision": {"num_heads": 4},
                                            "text": {"num_attention_heads": 4}})
    # The rest comes from the hyper-parameters inside.
    assert model.config.text.last_n_layers == 4 and model.config.text.max_tokens == 20
    io, _ = stored(BRGSA)
    close(model.encode_volume(io["volume"], normalized=True), io["v"])
    close(model.encode_text_ids(io["caption_ids"], io["caption_mask"]), io["t"])
    with pytest.raises(UserError, match="without a tokenizer"):
        model.encode_text(["There is Emphysema"])
    refused(path, "does not divide the width 64", config={
        "vision": {"num_heads": 5}, "text": {"num_attention_heads": 4}})
    refused(path, r"vision.num_heads='4'.*is no number", config={
        "vision": {"num_heads": "4"}, "text": {"num_attention_heads": 4}})


def test_a_configuration_given_wins_over_the_file_beside_and_that_over_the_one_inside(tmp_path):
    path = copied(BRGSA, tmp_path, "checkpoint.ckpt", "config.json", "vocab.txt")
    assert import_checkpoint(path, config={"text": {"last_n_layers": 2}}
                             ).config.text.last_n_layers == 2
    beside = json.loads((tmp_path / "config.json").read_text())
    beside["text"]["last_n_layers"] = 3
    (tmp_path / "config.json").write_text(json.dumps(beside))
    assert import_checkpoint(path).config.text.last_n_layers == 3
    beside["text"]["hidden_size"] = 52
    (tmp_path / "config.json").write_text(json.dumps(beside))
    refused(path, "text.hidden_size=52 and the tensors say 48")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config.json cannot be read"):
        import_checkpoint(path)
    shutil.copyfile(MGCA / "config.json", tmp_path / "config.json")
    refused(path, "describes the system 'mgca'")


def test_files_of_another_model_are_named(tmp_path):
    refused(MGCA / "checkpoint.ckpt", "holds no BrgSA checkpoint", kind="brgsa")
    with pytest.raises(UserError, match="brgsa, mgca"):
        import_checkpoint(BRGSA / "checkpoint.ckpt", kind="bragsa")
    save_file({"bert.embeddings.word_embeddings.weight": np.zeros((4, 4), "f4")},
              str(tmp_path / "bert.safetensors"))
    refused(tmp_path / "bert.safetensors", "text.init_from")
    with pytest.raises(UserError, match="none.ckpt"):
        import_checkpoint(tmp_path / "none.ckpt")


@pytest.mark.parametrize(("change", "match"), [
    (lambda t: t.pop("gloria.text_encoder.emb_global.bias"), "emb_global.bias is missing"),
    (lambda t: t.pop("gloria.img_encoder.model.patch_embed.proj.weight"), "is missing"),
    (lambda t: t.pop("gloria.dictionarylearning.dictionary.weight"), "is missing"),
    (lambda t: t.pop("gloria.img_encoder.model.blocks.1.attn.proj.bias"), "is missing"),
    (lambda t: t.update({"gloria.dqn.weight": np.zeros(3, "f4")}), "gloria.dqn.weight is unknown"),
    (lambda t: t.update({"gloria.img_encoder.model.norm.bias": np.zeros(3, "f4")}),
     r"norm.bias has shape \[3\], not \[64\]"),
    (lambda t: t.update({"gloria.img_encoder.model.pos_embed": np.zeros((1, 60, 64), "f4")}),
     "does not have its 59 positions")])
def test_tensors_that_are_missing_misshapen_or_unknown_are_listed(change, match, tmp_path):
    refused(changed(BRGSA, tmp_path / "model.safetensors", change), match)


def test_a_tokenizer_of_another_size_is_refused(tmp_path):
    path = copied(BRGSA, tmp_path, "checkpoint.ckpt", "config.json")
    words = (BRGSA / "vocab.txt").read_text().splitlines()
    for lines in (words[:-1], [*words, "more"]):
        (tmp_path / "vocab.txt").write_text("\n".join(lines) + "\n")
        refused(path, f"knows {len(lines)} tokens and .* was trained with 200")
    (tmp_path / "vocab.txt").write_text("a\nb\n")
    with pytest.raises(UserError, match=r"vocab.txt has no \[PAD\]"):
        import_checkpoint(path)
    with pytest.raises(UserError, match="no tokenizer can be loaded"):
        import_checkpoint(path, tokenizer=tmp_path / "none")


@pytest.mark.parametrize("folder", [BRGSA, MGCA], ids=["brgsa", "mgca"])
def test_bfloat16_points_the_same_way(folder, tmp_path):
    io, _ = stored(folder)
    exact = imported(folder)
    rough = load_model(exact.save(tmp_path), dtype="bfloat16")
    images = io["volume" if folder == BRGSA else "image"]
    for encode in (lambda m: m.encode_volume(images, normalized=True),
                   lambda m: m.encode_text_ids(io["caption_ids"], io["caption_mask"])):
        a, b = normalized(encode(exact)), normalized(encode(rough))
        assert not np.array_equal(a, b)
        assert (a * b).sum(-1).min() >= 0.999
