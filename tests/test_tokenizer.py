import types

import numpy as np
import pytest

from brgsa_jax.config import UserError
from brgsa_jax.data import tokenizer as tok

NAMES = ["Emphysema", "Lung nodule", "Cardiomegaly"]
REPORT = "1. The heart is large.\n2. Nodule of 3.5 mm in the\nright lung.  Normal. Éffusion à côté."


class Records:
    """A source of reports, with the findings in its index."""

    def __init__(self, *reports):
        self.reports = reports
        self.index = [types.SimpleNamespace(findings=tuple(NAMES[:i % 3]))
                      for i in range(len(reports))]

    def __len__(self):
        return len(self.reports)

    def __getitem__(self, position):
        return {"report": self.reports[position], "findings": self.index[position].findings}


def section(**changes):
    values = {"captions": "report", "sentences": 0, "drop": 0.0, "report_share": 0.5,
              "normal_caption": "There is no abnormality"}
    return types.SimpleNamespace(**{**values, **changes})


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


def test_reports_are_cleaned_as_mgca_does():
    assert tok.clean_report(REPORT) == (
        "the heart is large", "nodule of", "5 mm in the right lung", "ffusion ct")
    assert tok.clean_report("Nodule of 12.  Effusion, left-sided") == (
        "nodule of", "effusion left sided")
    assert tok.clean_report("Normal. 2. Stable.") == ("normal stable",), "words are kept"
    assert tok.clean_report("12. . \n") == tok.clean_report("") == tok.clean_report("肺 炎") == ()


def test_captions_of_reports_keep_their_order_unless_sampled():
    record = {"id": "a", "report": REPORT, "findings": ("Emphysema",)}
    rng = np.random.default_rng(0)
    whole = tok.clean_report(REPORT)
    assert {tok.caption_sentences(record, section(), rng) for _ in range(20)} == {whole}
    drawn = {tok.caption_sentences(record, section(sentences=2), rng) for _ in range(60)}
    assert drawn == {(a, b) for a in whole for b in whole if a != b}
    assert tok.caption_sentences(record, section(sentences=2)) == whole[:2]
    assert tok.caption_sentences(record, section(captions="summary")) == ("There is Emphysema",)
    wordless = {**record, "report": " . "}
    assert tok.caption_sentences(wordless, section()) == ("There is Emphysema",)
    assert tok.caption_sentences({**wordless, "findings": ()}, section()) == \
        ("There is no abnormality",)
    with pytest.raises(UserError, match="data.captions 'reports'; did you mean 'report'"):
        tok.caption_sentences(record, section(captions="reports"))


def test_mixed_captions_are_reports_as_often_as_asked():
    whole = tok.clean_report(REPORT)
    record = {"id": "a", "report": REPORT, "findings": ("Emphysema",)}
    rng, config = np.random.default_rng(0), section(captions="mixed", report_share=0.3)
    drawn = [tok.caption_sentences(record, config, rng) for _ in range(2000)]
    assert set(drawn) == {whole, ("There is Emphysema",)}
    assert abs(drawn.count(whole) / 2000 - 0.3) < 0.04
    # Without a generator, as in validation, the id decides, and not always the same way.
    kept = [tok.caption_sentences({**record, "id": str(i)}, config) for i in range(500)]
    assert kept == [tok.caption_sentences({**record, "id": str(i)}, config) for i in range(500)]
    assert abs(kept.count(whole) / 500 - 0.3) < 0.08
    for share, only in ((0.0, ("There is Emphysema",)), (1.0, whole)):
        config = section(captions="mixed", report_share=share)
        assert {tok.caption_sentences(record, config, rng) for _ in range(50)} == {only}


def test_a_share_of_sentences_is_never_seen():
    rng = np.random.default_rng(0)
    everything = {name: {"id": name, "report": "", "findings": tuple(f"F{i}" for i in range(10))}
                  for name in map(str, range(200))}
    kept = {name: set().union(*(tok.caption_sentences(
        record, section(captions="summary", drop=0.3, sentences=4), rng) for _ in range(60)))
        for name, record in everything.items()}
    assert abs(np.mean([len(seen) for seen in kept.values()]) - 7) < 0.3
    assert len({frozenset(seen) for seen in kept.values()}) > 100, "each record drops its own"
    more = tok.without_dropped("7", tok.sentences_of(everything["7"]["findings"]), 0.1)
    assert kept["7"] < set(more), "a larger share drops what a smaller one drops, and more"
    one = {"id": "x", "report": "", "findings": ("Emphysema",)}
    assert tok.caption_sentences(one, section(captions="summary", drop=0.999)) == \
        ("There is Emphysema",), "the last sentence stays"
    report = {"id": "x", "report": "The heart is large. Nodule on the right. Old fracture here.",
              "findings": ()}
    whole, part = (tok.caption_sentences(report, section(drop=d)) for d in (0.0, 0.6))
    assert len(whole) == 3 and 0 < len(part) < 3 and set(part) < set(whole)


def test_the_corpus_holds_prompts_and_what_captions_say():
    source = Records("Clear lungs.", "Old fracture. Nothing new.", "Clear\nlungs")
    prompts = ["There is Emphysema", "There is Lung nodule", "There is no abnormality"]
    assert list(tok.corpus(source, section(captions="summary"))) == prompts
    assert list(tok.corpus(source, section())) == [*prompts, "clear lungs",
                                                   "old fracture nothing new"]
    with pytest.raises(UserError, match="no record has one"):
        list(tok.corpus(Records("", " "), section()))
    with pytest.raises(UserError, match="did you mean 'summary'"):
        list(tok.corpus(source, section(captions="summery")))


def test_groups_ignore_the_order_of_parts():
    a = tok.group_of(("There is Emphysema", "There is Lung nodule"))
    assert a == tok.group_of(["There is Lung nodule", "There is Emphysema"])
    assert a != tok.group_of(["There is Lung nodule"])
    assert a != tok.group_of(["There is Emphysema There is Lung nodule"])
    assert all(0 <= tok.group_of([str(i)]) < 2**31 for i in range(100))


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


def custom(folder):
    """A vocabulary with pieces of several letters, among them "##" alone."""
    pieces = [*tok.SPECIAL_TOKENS, "there", "is", "card", "##card", "##io", "##mega", "##ly",
              "em", "##phys", "##ema", "#", "##", "nodule"]
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(pieces))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    return tok.load_tokenizer(folder, 12)


@pytest.mark.parametrize("vocabulary", ["trained", "custom"])
def test_words_agree_with_word_groups(vocabulary, tmp_path):
    if vocabulary == "trained":
        tokenizer = tok.train_tokenizer([*tok.sentences_of(NAMES), "quartz axis zymosis"], 12)
    else:
        tokenizer = custom(tmp_path / "custom")
    ids, mask = tokenizer([
        "There is zymqx", "", "There is Cardiomegaly", "nodule ### emphysema", "is [PAD] there",
        "There is emphysemacardiomegaly emphysemacardiomegaly"])
    # Rows a tokenizer does not make: a piece first, pads in front, nothing but pads.
    piece = int(np.flatnonzero(tokenizer.continues)[0])
    odd = np.zeros((3, 12), np.int32)
    odd[0, :3], odd[1, 4:8] = (piece, piece, 5), (piece, 6, piece, 5)
    words = tokenizer.words(np.concatenate([ids, odd]))
    assert words.dtype == np.int32 and words.shape == (9, 12)
    assert mask[5].all() and words[5].max() < 6, "the long caption is cut inside a word"
    assert np.bincount(words[5]).max() > 2
    for row, slots in zip([*ids, *odd], words, strict=True):
        groups = tok.word_groups(tokenizer.backend, row)
        assert [np.flatnonzero(slots == word).tolist()
                for word in range(slots.max() + 1)] == groups
        assert (slots[row == tokenizer.backend.pad_token_id] == -1).all()


def test_unseen_words_are_one_word_of_many_pieces():
    tokenizer = tok.train_tokenizer(["There is", "quartz axis zymosis"], 12)
    ids, mask = tokenizer(["There is zymqx"])
    np.testing.assert_array_equal(tokenizer.words(ids)[0],
                                  [0, 1, 2, 3, 3, 3, 3, 3, 4, -1, -1, -1])
    assert mask[0].sum() == 9


def test_a_folder_without_tokenizer_is_explained(tmp_path):
    with pytest.raises(UserError, match="no tokenizer can be loaded"):
        tok.load_tokenizer(tmp_path, 12)
