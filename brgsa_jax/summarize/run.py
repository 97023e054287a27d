"""A table of reports in, one summary a row out."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from brgsa_jax.config import UserError
from brgsa_jax.data.tables import read_table
from brgsa_jax.summarize.cache import Cache, cache_key
from brgsa_jax.summarize.validate import InvalidAnswer, Summary, summary

SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")
# How tables write an empty report, in lower case and without a full stop.
NO_REPORT = frozenset({"", "not given", "nan", "none", "null", "n/a"})


class Backend(Protocol):
    """Something that reads reports.

    Attributes:
        name: kind, model and version of the prompt or rules; part of every cache key.
    """

    name: str

    def summarize(self, reports: Sequence[str]
                  ) -> Iterator[tuple[int, tuple[str, ...] | InvalidAnswer]]:
        """Yields (position, findings or why there are none) once a report, in any order."""
        ...


class Counts(NamedTuple):
    """What became of the rows of a table.

    Attributes:
        rows: all of them; the sum of the next three.
        ok: rows with findings.
        normal: rows without a finding.
        failed: rows without a summary; the status says why.
        asked: different reports that went to the backend.
        cached: different reports answered by the cache.
    """

    rows: int
    ok: int
    normal: int
    failed: int
    asked: int
    cached: int


class _Row(NamedTuple):
    id: str
    text: str


def summarize_table(table: str | Path, *, text_column: str | Sequence[str],
                    id_column: str | None = None, out: str | Path, backend: Backend,
                    cache: Cache | None = None,
                    progress: Callable[[int, int], None] | None = None) -> Counts:
    """Summarises every report of a table; each different text is read once.

    Args:
        table: CSV, TSV, JSONL or Parquet file with a row a report; see `data.tables`.
        text_column: column of the report; several columns are joined, a line break between them.
        id_column: column of the ids; without it the column "id", else the row's number from 1.
        out: JSONL file with a row a report in the table's order: id, findings, sentences, status,
            backend. It is written at the end, whole or not at all.
        backend: what reads the reports.
        cache: answers kept from earlier calls; every valid answer is put there as it comes.
        progress: called with (different reports done, all of them).

    Returns:
        The counts.

    Raises:
        UserError: the table is unreadable, lacks a column or gives one id to two reports; the
            output cannot be written; or the backend gives up as a whole.
    """
    table, out = Path(table), Path(out)
    columns = [text_column] if isinstance(text_column, str) else list(text_column)
    rows = read_reports(table, columns, id_column)
    _check_out(out, table)
    answers: dict[str, tuple[str, ...] | InvalidAnswer] = {}
    texts = list(dict.fromkeys(row.text for row in rows if row.text))
    keys = {text: cache_key(backend.name, text) for text in texts}
    if cache is not None:
        answers = {text: kept for text in texts if (kept := cache.get(keys[text])) is not None}
    cached = len(answers)
    missing = [text for text in texts if text not in answers]

    def tell() -> None:
        if progress:
            progress(len(answers), len(texts))

    tell()
    with contextlib.closing(_generator(backend, missing)) as given:
        for position, answer in given:
            text = missing[position]
            if text in answers:
                raise RuntimeError(f"{backend.name} answered report {position} twice")
            if cache is not None and not isinstance(answer, InvalidAnswer):
                cache.put(keys[text], answer)
            answers[text] = answer
            tell()
    silent = InvalidAnswer("the backend gave no answer")
    empty = InvalidAnswer("empty report")
    summaries = [summary(row.id, answers.get(row.text, silent) if row.text else empty,
                         backend.name) for row in rows]
    _write(out, summaries)
    statuses = [entry.status.partition(":")[0] for entry in summaries]
    return Counts(len(rows), *(statuses.count(s) for s in ("ok", "normal", "failed")),
                  asked=len(missing), cached=cached)


def _generator(backend: Backend, reports: Sequence[str]) -> Iterator[Any]:
    """A generator whatever iterator the backend returns, and no call for nothing."""
    if reports:
        yield from backend.summarize(reports)


def read_reports(table: str | Path, text_columns: Sequence[str],
                 id_column: str | None = None) -> list[_Row]:
    """Reads (id, text) of every row; a report that is not given is the empty text.

    Raises:
        UserError: the table is unreadable, lacks a column, or gives one id to two reports.
    """
    table = Path(table)
    kind = table.suffix.lower()
    if kind not in SUFFIXES:
        raise UserError(f"{table} is not a table; give a file ending in {', '.join(SUFFIXES)}")
    records = read_table(table, text_columns, [id_column],
                         wished=[] if id_column else ["id"])
    if id_column is None and "id" in records[0]:
        id_column = "id"
    rows, first = [], {}
    for number, record in enumerate(records, 1):
        id = record[id_column] if id_column else str(number)
        text = "\n".join(filter(None, (_report(record[name]) for name in text_columns)))
        if not id:
            raise UserError(f"{table}: row {number} has no {id_column}; fill it in or choose "
                            "another --id-column")
        if first.setdefault(id, (number, text))[1] != text:
            raise UserError(f"{table}: rows {first[id][0]} and {number} have the same {id_column} "
                            f"{id!r} and different reports; choose another --id-column")
        rows.append(_Row(id, text))
    return rows


def _report(text: str) -> str:
    return "" if text.lower().rstrip(".") in NO_REPORT else text


def _check_out(out: Path, table: Path) -> None:
    """Fails before the reports are read, not after."""
    if out.exists() and (out.is_dir() or out.samefile(table)):
        raise UserError(f"{out} is {'a folder' if out.is_dir() else 'the table itself'}; choose "
                        "another --out")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out.parent).close()
    except OSError as error:
        raise UserError(f"nothing can be written into {out.parent} ({error.strerror}); choose "
                        "another --out") from error


def _write(out: Path, summaries: Sequence[Summary]) -> None:
    partial = out.with_name(f"{out.name}.{os.getpid()}.partial")
    try:
        with partial.open("w", encoding="utf-8") as stream:
            for entry in summaries:
                # ASCII: a lone surrogate of the table cannot stop the file.
                stream.write(json.dumps(entry._asdict()) + "\n")
        os.replace(partial, out)
    finally:
        partial.unlink(missing_ok=True)
