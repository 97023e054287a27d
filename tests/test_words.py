"""Word vectors from word pieces: golden vectors of the reference, and the sane defaults."""

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from brgsa_jax.nn.words import gather_words

REFERENCE = {"attention_of": "next", "separator": True, "truncated": "drop"}


def word_slots(file):
    """Word slot of every token of a golden file, from its vocabulary."""
    pieces = np.array(file.meta["vocab"])[file["in_token_ids"]]
    starts = ~np.char.startswith(pieces, "##")
    return np.where(pieces == "[PAD]", -1, np.cumsum(starts, axis=1) - 1).astype(np.int32)


def cls_row(file):
    """[B, T] attention of [CLS]; nothing may depend on its own column, here a large number."""
    row = file["in_cls_attn_to_tokens_1_to_Tm1"].astype(file.dtype)
    return np.concatenate([np.full((len(row), 1), 9.0, file.dtype), row], axis=1)


@pytest.mark.parametrize("dtype", golden.DTYPES)
@pytest.mark.parametrize("path", golden.files("agg"), ids=lambda p: p.stem)
def test_reference_golden(path, dtype):
    with jax.enable_x64(dtype == "float64"):
        file = golden.Golden(path, dtype)
        slots, row = word_slots(file), cls_row(file)
        cotangent = file.inputs("cotangent")["cotangent"]

        def function(x):
            words = gather_words(x["token_emb"], row, slots, **REFERENCE)
            everything = jnp.concatenate([x["token_emb"][:, :1], words.embeddings], axis=1)
            return {"sum": jnp.sum(everything * cotangent)}, (words, everything)

        _, (words, everything), grads = golden.differentiate(
            function, file.inputs("token_emb"), {"agg": {"sum": 1.0}})
        file.arrays["grad_agg__token_emb"] = file["grad__token_emb"]
        file.value("word_emb", words.embeddings)
        file.value("agg_emb", everything)
        file.value("word_attn", words.attention)
        np.testing.assert_array_equal(words.pad_mask, file["out_pad_mask"])
        assert np.all(words.attention[file["out_pad_mask"]] == 0)
        file.gradients("agg", grads["agg"])
        file.finish()


def gather(file, **switches):
    return golden.jit(lambda t, a, w: gather_words(t, a, w, **switches))(
        file["in_token_emb"], cls_row(file), word_slots(file))


def loop(file, b):
    """Word vectors and weights of one row, piece by piece, [CLS] and [SEP] left out."""
    slots, row, tokens = word_slots(file)[b], cls_row(file)[b], file["in_token_emb"][b]
    vectors, weights = {}, {}
    for i, slot in enumerate(slots):
        if 0 < slot < slots.max():
            vectors[slot] = vectors.get(slot, 0) + tokens[i]
            weights[slot] = weights.get(slot, 0) + row[i]
    order = sorted(vectors)
    return np.stack([vectors[w] for w in order]), np.array([weights[w] for w in order])


@pytest.mark.parametrize("b", range(5))
def test_by_default_a_word_has_its_own_weight_and_none_is_lost(b):
    file = golden.Golden(golden.files("agg")[0], "float32")
    words = gather(file)
    vectors, weights = loop(file, b)
    count = len(vectors)
    np.testing.assert_allclose(words.embeddings[b, :count], vectors, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(words.attention[b, :count], weights, rtol=1e-6)
    assert np.all(words.embeddings[b, count:] == 0) and np.all(words.attention[b, count:] == 0)
    np.testing.assert_array_equal(words.pad_mask[b], np.arange(15) >= count)


def test_each_switch_changes_what_it_names():
    file = golden.Golden(golden.files("agg")[0], "float32")
    own, kept = gather(file), gather(file, separator=True)
    # Row 3 fills all 16 slots: w6 is its tenth word, [SEP] its eleventh.
    assert not own.pad_mask[3, 9] and own.pad_mask[3, 10] and not kept.pad_mask[3, 10]
    np.testing.assert_allclose(kept.embeddings[3, 10], file["in_token_emb"][3, 15], rtol=1e-6)
    np.testing.assert_allclose(kept.attention[3, 10], cls_row(file)[3, 15], rtol=1e-6)
    for separator in (False, True):
        dropped = gather(file, truncated="drop", separator=separator)
        assert dropped.pad_mask[3, 9] and np.all(dropped.embeddings[3, 9:] == 0)
        others = np.array([0, 1, 2, 4])
        np.testing.assert_array_equal(dropped.pad_mask[others],
                                      (kept if separator else own).pad_mask[others])
    # Row 0 is [CLS] w0 w1 ##c0 ##c1 w2 [SEP]: with "next" w2 carries [SEP]'s weight.
    shifted = gather(file, attention_of="next")
    np.testing.assert_allclose(shifted.attention[0, 2], cls_row(file)[0, 6], rtol=1e-6)
    np.testing.assert_allclose(own.attention[0, 2], cls_row(file)[0, 5], rtol=1e-6)
    np.testing.assert_allclose(own.attention[0, 1], cls_row(file)[0, 2:5].sum(), rtol=1e-6)


def test_rows_without_words_are_all_padding():
    slots = np.array([[-1, -1, -1, -1], [0, 1, -1, -1]], np.int32)
    tokens, row = np.ones((2, 4, 3), "f4"), np.full((2, 4), 0.25, "f4")
    words = golden.jit(gather_words)(jnp.asarray(tokens, jnp.bfloat16), row, slots)
    assert words.embeddings.dtype == jnp.float32
    assert np.all(words.pad_mask) and np.all(words.attention == 0)
    assert np.all(words.embeddings == 0)


def test_unknown_switches_list_the_choices():
    with pytest.raises(KeyError, match="choices: next, own"):
        gather_words(jnp.ones((1, 2, 3)), jnp.ones((1, 2)), jnp.zeros((1, 2), int),
                     attention_of="nxt")
    with pytest.raises(KeyError, match="did you mean 'drop'"):
        gather_words(jnp.ones((1, 2, 3)), jnp.ones((1, 2)), jnp.zeros((1, 2), int),
                     truncated="drp")
