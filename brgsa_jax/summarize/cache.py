"""Summaries kept by content: a rerun costs nothing, a crash loses nothing."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path

from brgsa_jax.config import UserError
from brgsa_jax.summarize import vocabulary


def cache_key(backend: str, report: str) -> str:
    """Returns the SHA-256 (hex) of a backend's name, with its prompt's version, and a report.

    The length keeps names and reports apart, whatever letters they hold.
    """
    name, text = backend.encode("utf-8", "surrogatepass"), report.encode("utf-8", "surrogatepass")
    return hashlib.sha256(b"%d:%b%b" % (len(name), name, text)).hexdigest()


class Cache:
    """Findings by `cache_key`, in a file that only grows; it holds no report text.

    One JSON object a line, each written by one system call, so that a kill loses at most the line
    being written. Lines that are torn, foreign, or of names the vocabulary no longer has are
    passed over. Several processes may append to one file; each sees what was there when it opened.
    """

    def __init__(self, path: str | Path):
        """Opens or makes the file.

        Raises:
            UserError: it cannot be read or written.
        """
        self.path = Path(path)
        self._found: dict[str, tuple[str, ...]] = {}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
            with self.path.open("rb") as stream:
                line = b"\n"
                for line in stream:
                    self._read(line)
        except OSError as error:
            raise UserError(f"the cache {self.path} cannot be used ({error.strerror}); choose "
                            "another file") from error
        if not line.endswith(b"\n"):
            # Ends a torn line, which would swallow the next one.
            os.write(self._file, b"\n")

    def __len__(self) -> int:
        return len(self._found)

    def __enter__(self) -> Cache:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def get(self, key: str) -> tuple[str, ...] | None:
        """Returns the findings of a key, empty for a normal report, or None."""
        return self._found.get(key)

    def put(self, key: str, findings: Iterable[str]) -> None:
        """Appends the findings of a key unless they are there.

        Raises:
            UserError: the disk takes no more.
        """
        findings = vocabulary.closure(findings)
        if self._found.get(key) == findings:
            return
        line = json.dumps({"key": key, "findings": findings}).encode() + b"\n"
        try:
            written = os.write(self._file, line)
        except OSError as error:
            raise UserError(f"the cache {self.path} cannot be written ({error.strerror}); make "
                            "room and run the same command again") from error
        if written < len(line):
            raise UserError(f"the cache {self.path} was written in part; make room and run the "
                            "same command again")
        self._found[key] = findings

    def close(self) -> None:
        """Closes the file."""
        os.close(self._file)

    def _read(self, line: bytes) -> None:
        try:
            entry = json.loads(line)
            key, findings = entry["key"], vocabulary.closure(entry["findings"])
        except (ValueError, KeyError, TypeError, RecursionError):
            return
        if isinstance(key, str):
            self._found[key] = findings
