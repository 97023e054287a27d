"""Token alignment, attention weights and the local loss: golden vectors, switches, chunks."""

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from brgsa_jax.losses import attention_weights, local_alignment, token_alignment, tokenwise

MHA = ("in_w", "in_b", "out_w", "out_b")


def reference_switches(meta):
    """The switches under which the shipped MGCA code runs, from a file's record."""
    return {
        "temperature": meta["hparams"]["local_temperature"],
        "bidirectional": meta["hparams"]["bidirectional"],
        "normalize_patch_context": meta["backbone"] != "vit_base",
        "mask_padding": False,
    }


def patch_weights_of(file):
    if "in_cls_attn" not in file.arrays:
        return None
    return attention_weights(file.inputs("cls_attn")["cls_attn"].mean(axis=1))


def check_cta(file):
    names = ["patch_raw", "word_raw"]
    heads = file.meta["hparams"]["num_heads"] if "in_mha_word_in_w" in file.arrays else None
    if heads:
        names += [f"mha_{side}_{k}" for side in ("word", "patch") for k in MHA]

    def function(x):
        word_weights = attention_weights(file.inputs("word_attn")["word_attn"])
        patch_weights = patch_weights_of(file)
        cross_attention = None
        if heads:
            cross_attention = {
                side: {k: x[f"mha_{side}_{k}"] for k in MHA} for side in ("word", "patch")
            } | {"heads": heads}
        loss = token_alignment(
            x["patch_raw"],
            x["word_raw"],
            word_weights=word_weights,
            patch_weights=patch_weights,
            pad_mask=file["in_pad_mask"],
            cross_attention=cross_attention,
            **reference_switches(file.meta),
        )
        return loss._asdict(), (word_weights, patch_weights)

    losses, (word_weights, patch_weights), grads = golden.differentiate(
        function,
        file.inputs(*names),
        {"cta": {"word": 1.0, "patch": 1.0}, "word": {"word": 1.0}, "patch": {"patch": 1.0}},
    )
    file.value("loss_word", losses["word"])
    file.value("loss_patch", losses["patch"])
    file.value("loss_cta", losses["word"] + losses["patch"])
    file.value("word_weights", word_weights)
    uniform = np.full(file["out_patch_weights"].shape, 1 / file["out_patch_weights"].shape[1])
    file.value("patch_weights", uniform if patch_weights is None else patch_weights)
    for prefix in grads:
        file.gradients(prefix, grads[prefix], {n: n.removeprefix("mha_") for n in names})
    return file


def check_gloria(file):
    scales = tuple(file.meta[f"temp{i}"] for i in (1, 2, 3))

    def function(x):
        loss = local_alignment(
            x["img"],
            x["words"],
            file["in_cap_lens"].astype(np.int32),
            temperatures=scales,
            aggregate=file.meta["agg"],
        )
        return loss._asdict(), None

    losses, _, grads = golden.differentiate(
        function,
        file.inputs("img", "words"),
        {"sum": {"image_to_text": 1.0, "text_to_image": 1.0}},
    )
    file.value("loss0", losses["image_to_text"])
    file.value("loss1", losses["text_to_image"])
    file.gradients("sum", grads["sum"])
    return file


@pytest.mark.parametrize("dtype", golden.DTYPES)
@pytest.mark.parametrize("path", golden.files("cta"), ids=lambda p: p.stem)
def test_cta_golden(path, dtype):
    with jax.enable_x64(dtype == "float64"):
        check_cta(golden.Golden(path, dtype)).finish()


@pytest.mark.parametrize("dtype", golden.DTYPES)
@pytest.mark.parametrize("path", golden.files("gloria_local3d"), ids=lambda p: p.stem)
def test_gloria_golden(path, dtype):
    with jax.enable_x64(dtype == "float64"):
        check_gloria(golden.Golden(path, dtype)).finish()


def test_attention_weights():
    rng = np.random.default_rng(0)
    attention = rng.random((3, 11)).astype(np.float32)
    attention[0, 4:] = 0.0
    attention[2] = 0.0

    def squares(a):
        weights = attention_weights(a)
        return jnp.sum(weights**2), weights

    gradient, weights = golden.jit(jax.grad(squares, has_aux=True))(attention)
    weights = np.asarray(weights)
    row = attention[0, :4].astype(np.float64)
    clipped = np.clip(row, np.quantile(row, 0.1), np.quantile(row, 0.9))
    np.testing.assert_allclose(weights[0, :4], clipped / clipped.sum(), rtol=2e-6)
    assert np.all(weights[0, 4:] == 0) and np.all(weights[2] == 0)
    np.testing.assert_allclose(weights[1].sum(), 1.0, rtol=1e-6)
    assert np.all(np.asarray(gradient) == 0)
    with pytest.raises(ValueError, match="low=0.9"):
        attention_weights(attention, low=0.9, high=0.1)


def sample_batch(samples=3, n=7, t=6, width=5, seed=1):
    rng = np.random.default_rng(seed)
    patches = rng.normal(size=(samples, n, width)).astype(np.float32)
    words = rng.normal(size=(samples, t, width)).astype(np.float32)
    pad = np.arange(t)[None] >= np.array([t, 4, 3])[:samples, None]
    weights = np.where(pad, 0.0, rng.random((samples, t))).astype(np.float32)
    weights /= weights.sum(axis=1, keepdims=True)
    return patches, words, {"word_weights": weights, "pad_mask": pad}


def align(patches, words, rest, **switches):
    return golden.jit(lambda p, w, r: token_alignment(p, w, **r, **switches))(patches, words, rest)


def test_masked_padding_means_as_if_it_were_not_there():
    patches, words, rest = sample_batch()
    noisy = np.where(rest["pad_mask"][..., None], 100.0 * words + 3.0, words)
    masked = align(patches, noisy, rest)
    expected = np.zeros(2)
    for b, used in enumerate([6, 4, 3]):
        one = {
            "word_weights": rest["word_weights"][b : b + 1, :used],
            "pad_mask": np.zeros((1, used), bool),
        }
        expected += np.asarray(align(patches[b : b + 1], words[b : b + 1, :used], one)) / 3
    np.testing.assert_allclose(masked, expected, rtol=1e-5)
    kept = align(patches, noisy, rest, mask_padding=False)
    assert abs(float(kept.word) - float(masked.word)) > 1e-2
    gradient = golden.jit(jax.grad(lambda w: sum(token_alignment(patches, w, **rest))))(words)
    assert np.all(np.asarray(gradient)[rest["pad_mask"]] == 0)


def test_switches_change_what_they_name():
    patches, words, rest = sample_batch()
    base = align(patches, words, rest)
    plain = align(patches, words, rest, normalize_patch_context=False)
    np.testing.assert_allclose(plain.word, base.word, rtol=1e-6)
    assert abs(float(plain.patch - base.patch)) > 1e-3
    one_way = align(patches, words, rest, bidirectional=False)
    np.testing.assert_allclose(one_way.word, base.word, rtol=1e-6)
    assert one_way.patch == 0
    weights = np.zeros(patches.shape[:2], np.float32)
    weights[:, 0] = 1.0
    first = align(patches, words, rest | {"patch_weights": weights})
    np.testing.assert_allclose(first.word, base.word, rtol=1e-6)
    assert abs(float(first.patch - base.patch)) > 1e-3


def test_wrong_use_is_named():
    patches, words, rest = sample_batch()
    with pytest.raises(ValueError, match="heads=2"):
        token_alignment(
            patches, words, cross_attention={"heads": 2, "word": {}, "patch": {}}, **rest
        )
    with pytest.raises(ValueError, match="pad_mask has shape"):
        token_alignment(patches, words, **(rest | {"pad_mask": np.zeros((3, 2), bool)}))
    image, words, lengths = local_batch()
    with pytest.raises(ValueError, match="aggregate='max'.*sum"):
        local_alignment(image, words, lengths, aggregate="max")
    with pytest.raises(ValueError, match="three numbers"):
        local_alignment(image, words, lengths, temperatures=(4.0, 5.0))


def test_chunks_equal_the_whole(monkeypatch):
    patches, words, rest = sample_batch()

    def run():
        # A new function object a time: the chunk size is read while tracing.
        def loss(p, w):
            return sum(token_alignment(p, w, **rest))

        assert ("scan" in str(jax.make_jaxpr(loss)(patches, words))) == (
            tokenwise.CHUNK_ELEMENTS < 1000
        )
        return golden.jit(jax.value_and_grad(loss, (0, 1)))(patches, words)

    whole = run()
    # Two samples a chunk, the third in a chunk of its own.
    monkeypatch.setattr(tokenwise, "CHUNK_ELEMENTS", 2 * 7 * 7)
    chunked = run()
    for a, b in zip(jax.tree.leaves(chunked), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def local_batch():
    rng = np.random.default_rng(2)
    image = rng.normal(size=(4, 5, 2, 2, 3)).astype(np.float32)
    words = rng.normal(size=(4, 5, 6)).astype(np.float32)
    return image, words, np.array([6, 2, 4, 1])


def align_locally(image, words, lengths, **options):
    return golden.jit(lambda i, w, n: local_alignment(i, w, n, **options))(image, words, lengths)


def test_local_alignment_reads_only_the_leading_words():
    image, words, lengths = local_batch()
    noise = np.arange(6)[None, None] >= lengths[:, None, None]
    a = align_locally(image, words, lengths)
    b = align_locally(image, np.where(noise, 50.0, words), lengths)
    np.testing.assert_allclose(a, b, rtol=1e-6)
    mean = align_locally(image, words, lengths, aggregate="mean")
    assert abs(float(mean.image_to_text - a.image_to_text)) > 1e-2


def test_local_alignment_leaves_out_an_empty_caption():
    image, words, lengths = local_batch()
    a = align_locally(image, words, np.array([6, 2, 4, 0]))
    b = align_locally(image[:3], words[:3], lengths[:3])
    np.testing.assert_allclose(a, b, rtol=1e-6)
