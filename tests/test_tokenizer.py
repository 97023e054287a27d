import numpy as np
import pytest

from brgsa_jax.config import UserError
from brgsa_jax.data import tokenizer as tok

NAMES = ["Emphysema", "Lung nodule", "Cardiomegaly"]


@pytest.fixture(scope="module")
def tokenizer():
    return tok.train_tokenizer([*tok.sentences_of(NAMES), "There is no abnormality"], 12)


def test_captions_follow_the_reference_loader():
    rng = np.random.default_rng(0)
    assert tok.caption(NAMES, limit=0, normal="n") == \
        "There is Emphysema There is Lung nodule There is Cardiomegaly"
    assert tok.caption([], limit=5, normal="There is no abnormality") == "There is no abnormality"
    drawn = {tok.caption(NAMES, limit=2, normal="n", rng=rng) for _ in range(60)}
    assert len(drawn) == 6 and all(text.count("There is") == 2 for text in drawn)


def test_groups_ignore_the_order_of_sentences():
    a = tok.group_of("There is Emphysema There is Lung nodule")
    assert a == tok.group_of("There is Lung nodule There is Emphysema")
    assert a != tok.group_of("There is Lung nodule")
    assert 0 <= a < 2**31


def test_tokens_are_padded_truncated_and_survive_saving(tokenizer, tmp_path):
    texts = ["There is Emphysema", " ".join(["There is Lung nodule"] * 9)]
    ids, mask = tokenizer(texts)
    assert ids.shape == (2, 12) and ids.dtype == np.int32
    assert mask[0].sum() == 5 and mask[1].sum() == 12
    assert ids[1, -1] == ids[0, 4], "a truncated text still ends in [SEP]"
    tokenizer.save(tmp_path)
    again = tok.load_tokenizer(tmp_path, 12)
    np.testing.assert_array_equal(again(texts)[0], ids)
    assert len(again) == len(tokenizer)


def test_the_same_corpus_gives_the_same_vocabulary(tokenizer):
    vocabulary = tokenizer.backend.get_vocab()
    for _ in range(5):
        other = tok.train_tokenizer([*reversed(tok.sentences_of(NAMES)),
                                     "There is no abnormality"], 12)
        assert other.backend.get_vocab() == vocabulary
    ordered = sorted(vocabulary, key=vocabulary.get)
    assert tuple(ordered[:5]) == tok.SPECIAL_TOKENS and "there" in ordered and "##y" in ordered


def test_word_groups_join_pieces(tokenizer):
    ids, _ = tokenizer(["There is emphysemacardiomegaly"])
    groups = tok.word_groups(tokenizer.backend, ids[0])
    tokens = tokenizer.backend.convert_ids_to_tokens(ids[0])
    assert groups[0] == [0] and max(map(len, groups)) > 1
    for group in groups:
        assert [tokens[i].startswith("##") for i in group] == [False] + [True] * (len(group) - 1)


def test_a_folder_without_tokenizer_is_explained(tmp_path):
    with pytest.raises(UserError, match="no tokenizer can be loaded"):
        tok.load_tokenizer(tmp_path, 12)
