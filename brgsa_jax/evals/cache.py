"""Embeddings kept on disk, so that a model sees every volume and every sentence once.

A file is named and keyed by what its content depends on: all arrays and the configuration of the
model, its tokenizer, the version of this package and the kind of device, and for volumes the data
set's fingerprint and index. It holds embeddings and hashes, no text. Any file may be deleted.
"""

import hashlib
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from brgsa_jax.evals.scores import write_atomic
from brgsa_jax.version import __version__


def model_digest(model: Any) -> str:
    """Hashes all of a `model.Model` that its embeddings depend on; hexadecimal SHA-256."""
    tokenizer = {}
    if model.tokenizer is not None:
        tokenizer = json.loads(model.tokenizer.backend.backend_tokenizer.to_str())
        # Its last call, not its content; the length that counts is in the configuration.
        del tokenizer["truncation"], tokenizer["padding"]
    about = [__version__, jax.default_backend(), model.config.to_dict(), tokenizer]
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    tree = {"params": model.params, "bank": model.bank, "stats": model.stats}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        array = np.ascontiguousarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}\n".encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


class Cache:
    """A folder of embeddings.

    Attributes:
        folder: where the files lie.
    """

    def __init__(self, folder: str | Path, warn: Callable[[str], None]) -> None:
        """Uses a folder.

        Args:
            folder: an existing folder.
            warn: told in one sentence of a file that cannot be used or written.
        """
        self.folder = Path(folder)
        self._warn = warn
        self._digests: dict[int, tuple[Any, str]] = {}

    def volumes(self, model: Any, source: Any, encode: Callable[[], np.ndarray],
                kind: str = "volumes") -> np.ndarray:
        """Returns what `encode` makes of a split's volumes, [N,D], from where it is kept.

        Args:
            model: a `model.Model`.
            source: the split.
            encode: makes the rows; called only where none are kept.
            kind: what of the volumes they are: their embeddings, if nothing else.
        """
        rows = hashlib.sha256("\n".join(f"{row.digest} {row.id}" for row in source.index).encode())
        key = self._key(model, kind, source.fingerprint, rows.hexdigest())
        kept = self._read(kind, key, len(source))
        if kept is not None:
            return kept["embeddings"]
        found = np.asarray(encode(), np.float32)
        self._write(kind, key, embeddings=found)
        return found

    def texts(self, model: Any, texts: Sequence[str]) -> np.ndarray:
        """Returns the embeddings [T,D] of texts, and encodes those that are not kept yet."""
        key = self._key(model, "texts")
        kept = self._read("texts", key)
        names = [hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
                 for text in texts]
        known = {} if kept is None else dict(zip(kept["names"].tolist(), kept["embeddings"],
                                                 strict=True))
        missing = {name: text for name, text in zip(names, texts, strict=True)
                   if name not in known}
        if missing:
            known |= zip(missing, model.encode_text(list(missing.values())), strict=True)
            self._write("texts", key, names=np.array(list(known)),
                        embeddings=np.stack(list(known.values())).astype(np.float32))
        return np.stack([known[name] for name in names])

    def _key(self, model: Any, *parts: str) -> str:
        if id(model) not in self._digests:
            # The model is kept too, so that its id stays its own.
            self._digests[id(model)] = model, model_digest(model)
        return hashlib.sha256("\n".join([self._digests[id(model)][1], *parts]).encode()).hexdigest()

    def _file(self, kind: str, key: str) -> Path:
        return self.folder / f"{kind}-{key[:24]}.npz"

    def _read(self, kind: str, key: str, rows: int | None = None) -> dict[str, np.ndarray] | None:
        """The arrays of a file; None, after a warning, where it is not what its name says."""
        file = self._file(kind, key)
        if not file.is_file():
            return None
        try:
            with np.load(file, allow_pickle=False) as stored:
                arrays = {name: stored[name] for name in stored.files}
            problem = _problem(arrays, key, rows)
        except Exception as error:
            # A broken archive fails anywhere inside numpy, zipfile and zlib.
            problem = " ".join(str(error).split())[:100] or type(error).__name__
        if problem:
            self._warn(f"the kept embeddings {file} cannot be used ({problem}) and are made anew")
            return None
        return arrays

    def _write(self, kind: str, key: str, **arrays: np.ndarray) -> None:
        # A model that has diverged is told of where it is scored, and must not be kept.
        if not np.isfinite(arrays["embeddings"]).all():
            return
        buffer = io.BytesIO()
        np.savez(buffer, key=np.array(key), **arrays)
        file = self._file(kind, key)
        try:
            write_atomic(file, buffer.getvalue())
        except OSError as error:
            self._warn(f"embeddings cannot be kept in {file} ({error.strerror or error}); they "
                       "will be made again next time")


def _problem(arrays: dict[str, np.ndarray], key: str, rows: int | None) -> str:
    """What keeps the arrays of a file from being those of this key; "" if nothing does."""
    if "key" not in arrays or "embeddings" not in arrays or str(arrays["key"]) != key:
        return "it was written for something else"
    found = arrays["embeddings"]
    expected = len(arrays["names"]) if rows is None else rows
    if found.dtype != np.float32 or found.ndim != 2 or len(found) != expected:
        return f"it holds {found.dtype} of shape {found.shape}"
    return "" if np.isfinite(found).all() else "it holds numbers that are not finite"
