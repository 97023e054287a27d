"""Captions and tokens: canonical findings -> "There is X" sentences -> padded token ids."""

import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from brgsa_jax.config import UserError

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def sentences_of(findings: Sequence[str]) -> tuple[str, ...]:
    """Returns "There is X" for every canonical finding."""
    return tuple(f"There is {name}" for name in findings)


def caption(findings: Sequence[str], *, limit: int, normal: str,
            rng: np.random.Generator | None = None) -> str:
    """Joins sentences to one caption, as BrgSA's loader.

    Args:
        findings: canonical names of one volume.
        limit: sentences sampled without replacement in random order; 0 keeps all.
        normal: caption of a volume without findings.
        rng: source of the sample; None keeps the given order and the first `limit`.

    Returns:
        The caption, sentences joined by a space.
    """
    sentences = list(sentences_of(findings))
    if rng is not None:
        sentences = [sentences[i] for i in rng.permutation(len(sentences))]
    chosen = sentences[:limit] if limit else sentences
    return " ".join(chosen) or normal


def group_of(text: str) -> int:
    """Returns an int32 that is equal for captions with the same sentences in any order."""
    parts = sorted(p for p in text.split("There is ") if p)
    return zlib.crc32("|".join(p.strip() for p in parts).encode()) & 0x7FFFFFFF


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

    def save(self, folder: str | Path) -> None:
        """Writes the tokenizer as a Hugging Face folder."""
        self.backend.save_pretrained(str(folder))


def load_tokenizer(folder_or_id: str | Path, max_tokens: int) -> Tokenizer:
    """Loads a tokenizer from a Hugging Face folder or id; runs no code of it.

    Raises:
        UserError: nothing usable there.
    """
    from transformers import AutoTokenizer

    try:
        backend = AutoTokenizer.from_pretrained(str(folder_or_id), trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"no tokenizer can be loaded from {str(folder_or_id)!r} ({reason}); give a "
                        "Hugging Face folder with tokenizer.json or vocab.txt, or a model id"
                        ) from error
    return Tokenizer(backend, max_tokens)


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
    from transformers import BertTokenizerFast

    normalizer = BertWordPieceTokenizer(lowercase=True).normalizer
    split = BertPreTokenizer()
    counts = Counter(word for text in texts
                     for word, _ in split.pre_tokenize_str(normalizer.normalize_str(text)))
    letters = sorted({letter for word in counts for letter in word})
    pieces = [*SPECIAL_TOKENS, *letters, *(f"##{letter}" for letter in letters)]
    words = sorted((w for w in counts if len(w) > 1), key=lambda w: (-counts[w], w))
    pieces += words[:max(vocab_size - len(pieces), 0)]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    backend = BertTokenizerFast(
        tokenizer_object=BertWordPieceTokenizer(vocab=vocabulary, lowercase=True)._tokenizer,
        do_lower_case=True)
    return Tokenizer(backend, max_tokens)


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
