"""Captions and tokens: findings or report -> sentences -> padded token ids and their words."""

import functools
import hashlib
import os
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from brgsa_jax.config import CAPTIONS, UserError
from brgsa_jax.registry import miss

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def sentences_of(findings: Sequence[str]) -> tuple[str, ...]:
    """Returns "There is X" for every canonical finding."""
    return tuple(f"There is {name}" for name in findings)


def clean_report(text: str) -> tuple[str, ...]:
    """Splits a report to lower-case sentences of ASCII words, as MGCA's loader.

    Item numbers ("2.") and full stops end a sentence, those inside a decimal number too. Sentences
    of one word are dropped, unless the report has no other.

    Returns:
        The sentences, words joined by a space; none of a report without a word.
    """
    sentences = []
    for part in re.split(r"[0-9]+\.|\.", text):
        stripped = (word.encode("ascii", "ignore").decode()
                    for word in re.findall(r"\w+", part.lower()))
        sentences.append([word for word in stripped if word])
    kept = tuple(" ".join(words) for words in sentences if len(words) > 1)
    rest = " ".join(word for words in sentences for word in words)
    return kept or ((rest,) if rest else ())


def draw(sentences: Sequence[str], *, limit: int, normal: str,
         rng: np.random.Generator | None = None) -> tuple[str, ...]:
    """Samples the sentences of one caption, as BrgSA's loader.

    Args:
        sentences: all there are.
        limit: sentences sampled without replacement in random order; 0 keeps all.
        normal: stands in where there is no sentence.
        rng: source of the sample; None keeps the given order and the first `limit`.

    Returns:
        The sentences, at least one.
    """
    order = range(len(sentences)) if rng is None else rng.permutation(len(sentences))
    chosen = tuple(sentences[i] for i in order)
    return (chosen[:limit] if limit else chosen) or (normal,)


def caption(findings: Sequence[str], *, limit: int, normal: str,
            rng: np.random.Generator | None = None) -> str:
    """Joins the drawn sentences of a volume's canonical findings by spaces; see `draw`."""
    return " ".join(draw(sentences_of(findings), limit=limit, normal=normal, rng=rng))


def caption_sentences(record: Mapping[str, Any], config: Any,
                      rng: np.random.Generator | None = None) -> tuple[str, ...]:
    """Draws the sentences of one record's caption.

    Args:
        record: `id`, `findings`, and `report` for captions of reports.
        config: section `data`: `captions` "summary" says "There is X" of every finding, "report"
            the cleaned report, in its own order unless `sentences` samples it, "mixed" either,
            the report with the probability `report_share`; `drop` is the share of sentences that
            are never seen, see `without_dropped`.
        rng: see `draw`; without it "mixed" is decided by the id.

    Returns:
        The sentences. A report without a word gives way to the summary.

    Raises:
        UserError: unknown `data.captions`.
    """
    _check_captions(config.captions)
    sentences: tuple[str, ...] = ()
    if _reads_report(record["id"], config, rng):
        sentences = without_dropped(record["id"], clean_report(record["report"]), config.drop)
    if sentences and not config.sentences:
        return sentences
    sentences = sentences or without_dropped(record["id"], sentences_of(record["findings"]),
                                             config.drop)
    return draw(sentences, limit=config.sentences, normal=config.normal_caption, rng=rng)


def _reads_report(id_: str, config: Any, rng: np.random.Generator | None) -> bool:
    if config.captions != "mixed":
        return config.captions == "report"
    point = _point(id_, "report") if rng is None else rng.random()
    return point < config.report_share


def without_dropped(id_: str, sentences: Sequence[str], share: float) -> tuple[str, ...]:
    """Leaves out a share of a record's sentences, the same in every epoch.

    This is how BrgSA tests what an incomplete summary costs. A record keeps at least one sentence:
    the caption of a normal volume would be wrong.

    Args:
        id_: of the record; with the sentence it decides what is dropped.
        sentences: all there are.
        share: probability of each to be dropped.
    """
    if not share or not sentences:
        return tuple(sentences)
    points = [_point(id_, sentence) for sentence in sentences]
    limit = min(share, max(points))
    return tuple(s for s, point in zip(sentences, points, strict=True) if point >= limit)


def _point(*parts: str) -> float:
    """A number in [0, 1) that is the same for the same parts, on every machine."""
    digest = hashlib.sha256("\0".join(parts).encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def corpus(source: Any, config: Any) -> Iterator[str]:
    """Yields the texts to train a tokenizer on, each once and in an order of their own.

    Prompts are sentences of findings, so that these are among the texts of any choice.

    Args:
        source: random-access source of records with an `index` (`data.sources`). Captions of
            reports need every record to be read.
        config: section `data`.

    Raises:
        UserError: unknown `data.captions`, or captions of reports where no record has one.
    """
    _check_captions(config.captions)
    texts = {sentence for row in source.index for sentence in sentences_of(row.findings)}
    texts.add(config.normal_caption)
    if config.captions != "summary":
        reports = {" ".join(clean_report(source[i]["report"])) for i in range(len(source))} - {""}
        if not reports:
            raise UserError(f"data.captions={config.captions!r} needs reports, and no record has "
                            "one; set data.captions=summary, or build the data set with a column "
                            "of reports")
        texts |= reports
    yield from sorted(texts)


def _check_captions(choice: str) -> None:
    if choice not in CAPTIONS:
        raise UserError(miss("data.captions", choice, CAPTIONS))


def group_of(parts: Iterable[str]) -> int:
    """Returns a non-negative int32 that is equal for the same parts in any order."""
    return zlib.crc32("\n".join(sorted(parts)).encode()) & 0x7FFFFFFF


class Tokenizer:
    """A Hugging Face fast tokenizer with a fixed length.

    Attributes:
        backend: transformers' PreTrainedTokenizerFast.
        max_tokens: length of every row, [CLS] and [SEP] included.
    """

    def __init__(self, backend: object, max_tokens: int) -> None:
        self.backend = backend
        self.max_tokens = max_tokens

    def __len__(self) -> int:
        return len(self.backend)

    def __call__(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Returns int32 ids [B, T] and mask [B, T], padded and truncated to `max_tokens`."""
        out = self.backend(list(texts), padding="max_length", truncation=True,
                           max_length=self.max_tokens)
        return (np.asarray(out["input_ids"], np.int32), np.asarray(out["attention_mask"], np.int32))

    @functools.cached_property
    def continues(self) -> np.ndarray:
        """Bool [V]: which entries of the vocabulary are "##" pieces of the word before them."""
        vocabulary = self.backend.get_vocab()
        table = np.zeros(max(vocabulary.values()) + 1, bool)
        table[[number for token, number in vocabulary.items() if token.startswith("##")]] = True
        return table

    def words(self, ids: np.ndarray) -> np.ndarray:
        """Returns the word slot of every token, as `word_groups` would group them.

        Args:
            ids: token ids [B, T].

        Returns:
            int32 [B, T]: [CLS] is word 0, pieces share the slot of their word, [SEP] is a word of
            its own; -1 for pads.
        """
        real = ids != self.backend.pad_token_id
        starts = real & (~self.continues[ids] | (np.cumsum(real, axis=-1) == 1))
        return np.where(real, np.cumsum(starts, axis=-1) - 1, -1).astype(np.int32)

    def save(self, folder: str | Path) -> None:
        """Writes the tokenizer as a Hugging Face folder."""
        self.backend.save_pretrained(str(folder))


def load_tokenizer(folder_or_id: str | Path, max_tokens: int) -> Tokenizer:
    """Loads a tokenizer from a Hugging Face folder or id; runs no code of it.

    Raises:
        UserError: nothing usable there.
    """
    # Only its tokenizers are used; the advice to install PyTorch would mislead.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers import AutoTokenizer

    try:
        backend = AutoTokenizer.from_pretrained(str(folder_or_id), trust_remote_code=False)
        tokenizer = Tokenizer(backend, max_tokens)
        _check_ends(tokenizer, folder_or_id)
    except UserError:
        raise
    except Exception as error:
        # Files from elsewhere fail anywhere inside transformers and tokenizers.
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"no tokenizer can be loaded from {str(folder_or_id)!r} ({reason}); give a "
                        "Hugging Face folder with tokenizer.json or vocab.txt, or a model id"
                        ) from error
    return tokenizer


def _check_ends(tokenizer: Tokenizer, source: object) -> None:
    """Refuses a tokenizer whose texts do not begin with [CLS] and end with [SEP], as BERT's do.

    Raises:
        UserError: they do not.
    """
    backend = tokenizer.backend
    ids, mask = tokenizer(["There is"])
    row = ids[0][mask[0] > 0].tolist()
    if None in (backend.cls_token_id, backend.sep_token_id, backend.pad_token_id) or (
            row[0], row[-1]) != (backend.cls_token_id, backend.sep_token_id):
        raise UserError(f"the tokenizer of {str(source)!r} does not put {backend.cls_token} before "
                        f"and {backend.sep_token} after a text and {backend.pad_token} behind it, "
                        "as a BERT's does; give a BERT's tokenizer")


def train_tokenizer(texts: Iterable[str], max_tokens: int, vocab_size: int = 4096) -> Tokenizer:
    """Trains a lower-casing WordPiece vocabulary with BERT's special tokens.

    The pieces are the corpus' characters, alone and as continuations, and its most frequent
    words. `tokenizers`' own WordPiece trainer is not used: it breaks ties in an order that
    changes from run to run, and with it would change every number of a run.

    Args:
        texts: the corpus.
        max_tokens: length of every row.
        vocab_size: upper bound of the vocabulary.

    Returns:
        The tokenizer; the same corpus gives the same vocabulary.
    """
    from tokenizers import BertWordPieceTokenizer
    from tokenizers.pre_tokenizers import BertPreTokenizer

    normalizer = BertWordPieceTokenizer(lowercase=True).normalizer
    split = BertPreTokenizer()
    counts = Counter(word for text in texts
                     for word, _ in split.pre_tokenize_str(normalizer.normalize_str(text)))
    letters = sorted({letter for word in counts for letter in word})
    pieces = [*SPECIAL_TOKENS, *letters, *(f"##{letter}" for letter in letters)]
    words = sorted((w for w in counts if len(w) > 1), key=lambda w: (-counts[w], w))
    pieces += words[:max(vocab_size - len(pieces), 0)]
    return wordpiece(pieces, max_tokens)


def wordpiece(pieces: Sequence[str], max_tokens: int, *, lowercase: bool = True) -> Tokenizer:
    """Makes BERT's tokenizer of a list of pieces, [PAD], [UNK], [CLS] and [SEP] among them."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from tokenizers import BertWordPieceTokenizer
    from transformers import BertTokenizerFast

    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    backend = BertWordPieceTokenizer(vocab=vocabulary, lowercase=lowercase)._tokenizer
    return Tokenizer(BertTokenizerFast(tokenizer_object=backend, do_lower_case=lowercase),
                     max_tokens)


def read_vocabulary(path: str | Path) -> list[str]:
    """Reads a vocab.txt of one piece a line.

    Raises:
        UserError: unreadable, a piece twice, or without BERT's special tokens.
    """
    try:
        pieces = Path(path).read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the vocabulary {path} cannot be read ({error}); give a vocab.txt with "
                        "one piece a line") from error
    pieces = [piece.removesuffix("\r") for piece in pieces]
    missing = [token for token in SPECIAL_TOKENS if token not in pieces]
    doubled = [piece for piece, count in Counter(pieces).items() if count > 1]
    if missing or doubled:
        what = f"has no {', '.join(missing)}" if missing else f"holds {doubled[0]!r} twice"
        raise UserError(f"the vocabulary {path} {what}; give the vocab.txt of a BERT, one piece a "
                        "line")
    return pieces


def find_tokenizer(weights: Path, given: str | Path | None, max_tokens: int, *,
                   lowercase: bool = True) -> Tokenizer | None:
    """Loads the tokenizer of a file of weights.

    Args:
        weights: the file.
        given: folder, Hugging Face id or vocab.txt; None looks beside the file.
        max_tokens: length of every row.
        lowercase: texts become lower-case, where only a vocab.txt is there to tell.

    Returns:
        The tokenizer; None when none is given and none lies beside the file.

    Raises:
        UserError: what is given is none.
    """
    place = Path(given) if given is not None else weights.parent
    if place.is_file():
        return wordpiece(read_vocabulary(place), max_tokens, lowercase=lowercase)
    if (place / "vocab.txt").is_file() and not any(
            (place / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        return wordpiece(read_vocabulary(place / "vocab.txt"), max_tokens, lowercase=lowercase)
    if given is not None or (place / "tokenizer.json").is_file() \
            or (place / "tokenizer_config.json").is_file():
        return load_tokenizer(given if given is not None else place, max_tokens)
    return None


def word_groups(backend: object, ids: Sequence[int]) -> list[list[int]]:
    """Groups token positions into words: a piece starting with "##" joins the word before it.

    Args:
        backend: the Hugging Face tokenizer.
        ids: one row of token ids.

    Returns:
        Lists of positions, one per word, [CLS] and [SEP] as words of their own, pads left out.
    """
    groups: list[list[int]] = []
    for position, token in enumerate(backend.convert_ids_to_tokens(list(ids))):
        if token == backend.pad_token:
            continue
        if token.startswith("##") and groups:
            groups[-1].append(position)
        else:
            groups.append([position])
    return groups
