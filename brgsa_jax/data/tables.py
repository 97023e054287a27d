"""Tables of reports, labels and metadata as rows of text: CSV, TSV, JSON lines and Parquet.

Cells come back as stripped text, missing ones as "". What a cell means is decided by who reads it;
`number`, `numbers` and `flag` do so for the common kinds.
"""

import ast
import contextlib
import csv
import gzip
import json
import math
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from brgsa_jax.config import UserError

_DELIMITERS = {".tsv": "\t", ".tab": "\t"}
_JSON_LINES = (".jsonl", ".ndjson")
_PARQUET = (".parquet", ".pq")
_MAX_CELL = 2**24
_MAX_NAME = 60
ACTIVE = re.compile(r"'*[=+\-@\t\r]")
_QUOTED = re.compile(r"'+[=+\-@\t\r]")
_FLAGS = {"1": True, "1.0": True, "true": True, "0": False, "0.0": False, "false": False}


def quoted(cell: str) -> str:
    """Puts an apostrophe before what a spreadsheet would run as a formula, or takes for quoted."""
    return f"'{cell}" if ACTIVE.match(cell) else cell


def unquoted(cell: str) -> str:
    """Takes the apostrophe of `quoted` away again."""
    return cell[1:] if _QUOTED.match(cell) else cell


def read_table(table: str | Path, required: Sequence[str],
               optional: Sequence[str | None] = (), *,
               wished: Sequence[str] = ()) -> list[dict[str, str]]:
    """Reads the named columns of a table; the suffix of the file decides how.

    .tsv and .tab are tab-separated, .jsonl and .ndjson hold one JSON object a line, .parquet and
    .pq are Parquet, everything else is CSV. CSV and TSV may be packed: .csv.gz. Text is UTF-8.

    Args:
        table: the file.
        required: names of columns.
        optional: names of more columns that must exist if they are not None.
        wished: names of columns that are read where the table has them.

    Returns:
        One {column: stripped text} for each row, in order; without the apostrophe that keeps a
        spreadsheet from running a cell (`quoted`). Numbers and booleans become their JSON
        text, lists (of JSON lines and Parquet) their items joined by ";".

    Raises:
        UserError: the file is missing, damaged, has no rows or lacks a column.
    """
    table = Path(table)
    wanted = list(dict.fromkeys([*required, *(name for name in optional if name)]))
    suffix = table.suffix.lower()
    if suffix in _PARQUET:
        rows = _parquet(table, wanted, wished)
    elif suffix in _JSON_LINES:
        rows = _json_lines(table, wanted, wished)
    else:
        with open_rows(table) as (columns, cells):
            places = find_columns(table, columns, _with(wanted, wished, columns))
            rows = [{name: row[place] for name, place in places.items()} for row in cells]
    if not rows:
        raise UserError(f"{table} has no rows below its header; check that it is the right file")
    return rows


@contextlib.contextmanager
def open_rows(table: Path) -> Iterator[tuple[list[str], Iterator[list[str]]]]:
    """Opens a CSV or TSV: its columns, and its rows one at a time, as wide as the header.

    Raises:
        UserError: the file is missing, damaged, or a row is longer than the header; also while the
            rows are read.
    """
    csv.field_size_limit(_MAX_CELL)
    packed = table.suffix.lower() == ".gz"
    delimiter = _DELIMITERS.get(Path(table.stem if packed else table).suffix.lower(), ",")
    with _told(table, "CSV"), _open(table, packed) as stream:
        reader = csv.reader(stream, delimiter=delimiter)
        columns = [name.strip() for name in next(reader, [])]
        yield columns, _rows(table, reader, len(columns))


def _open(table: Path, packed: bool) -> TextIO:
    how: dict[str, Any] = {"mode": "rt", "encoding": "utf-8-sig", "newline": ""}
    return gzip.open(table, **how) if packed else table.open(**how)


def _rows(table: Path, reader: Any, width: int) -> Iterator[list[str]]:
    for number, cells in enumerate(filter(None, reader), start=1):
        if len(cells) > width:
            raise UserError(f"row {number} of {table} (line {reader.line_num}) has {len(cells)} "
                            f"cells, its header has {width}; put texts with separators into quotes")
        yield [unquoted(cell.strip()) for cell in cells] + [""] * (width - len(cells))


@contextlib.contextmanager
def _told(table: Path, kind: str) -> Iterator[None]:
    """What reading a table may raise, as one sentence."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise UserError(f"{table} is not UTF-8 ({error}); save it as {kind} UTF-8") from error
    except csv.Error as error:
        raise UserError(f"{table} is no readable CSV ({error}); save it as CSV UTF-8") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{table} is no whole gzip file ({error}); copy it again") from error
    except OSError as error:
        raise UserError(f"the table {table} cannot be read ({error.strerror or error}); check the "
                        "path") from error


def find_columns(table: Path, columns: Sequence[str], wanted: Sequence[str]) -> dict[str, int]:
    """Returns {name: position} of the wanted columns.

    Raises:
        UserError: a column is missing or there twice.
    """
    missing = [name for name in wanted if name not in columns]
    if missing:
        # A table without a header begins with a row of data, which belongs into no message.
        long = [name for name in columns if len(name) > _MAX_NAME]
        listed = ", ".join(columns[:30]) + (", …" if len(columns) > 30 else "")
        told = ("its first row looks like data; put a row with the names of the columns above it"
                if long else f"its columns are {listed or 'none'}")
        if len(columns) == 1 and ";" in columns[0]:
            told = "it is separated by semicolons; save it with commas"
        raise UserError(f"{table} has no column {', '.join(map(repr, missing))}; {told}")
    twice = [name for name in wanted if columns.count(name) > 1]
    if twice:
        raise UserError(f"{table} has several columns {twice[0]!r}; rename all but one")
    return {name: columns.index(name) for name in wanted}


def number(row: Mapping[str, str], column: str) -> float:
    """Reads a finite number.

    Raises:
        ValueError: the cell is empty or no finite number; the message names column and cell.
    """
    try:
        value = float(row[column])
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(_cell(row, column, "a number"))
    return value


def numbers(row: Mapping[str, str], column: str, count: int) -> tuple[float, ...]:
    """Reads a list of finite numbers written as Python or JSON would, e.g. "[0.34, 0.34]".

    Raises:
        ValueError: the cell is something else; the message names column and cell.
    """
    try:
        found = ast.literal_eval(row[column])
        values = tuple(float(value) for value in found)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        values = ()
    if len(values) != count or not all(map(math.isfinite, values)):
        raise ValueError(_cell(row, column, f"a list of {count} numbers"))
    return values


def flag(row: Mapping[str, str], column: str) -> bool:
    """Reads 0 or 1.

    Raises:
        ValueError: the cell is something else; the message names column and cell.
    """
    try:
        return _FLAGS[row[column].casefold()]
    except KeyError:
        raise ValueError(_cell(row, column, "0 or 1")) from None


def _cell(row: Mapping[str, str], column: str, kind: str) -> str:
    text = row[column]
    return (f"column {column!r} is empty" if not text else
            f"column {column!r} is {text[:40]!r}") + f", not {kind}"


def _with(wanted: Sequence[str], wished: Sequence[str], columns: Sequence[str]) -> list[str]:
    return list(dict.fromkeys([*wanted, *(name for name in wished if name in columns)]))


def _json_lines(table: Path, wanted: Sequence[str],
                wished: Sequence[str]) -> list[dict[str, str]]:
    objects = list(_json_objects(table))
    columns = list(dict.fromkeys(name for _, found in objects for name in found))
    wanted = _with(wanted, wished, columns)
    find_columns(table, columns, wanted)
    return [{name: _text(found.get(name), f"line {line} of {table}", name) for name in wanted}
            for line, found in objects]


def _json_objects(table: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with _told(table, "JSON lines in"), table.open(encoding="utf-8-sig") as stream:
        for line, text in enumerate(stream, start=1):
            if not text.strip():
                continue
            try:
                found = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise UserError(f"line {line} of {table} is no JSON ({error}); write one object a "
                                "line") from error
            if not isinstance(found, dict):
                raise UserError(f"line {line} of {table} is no JSON object; write one object a "
                                "line")
            yield line, found


def _parquet(table: Path, wanted: Sequence[str], wished: Sequence[str]) -> list[dict[str, str]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise UserError(f"{table} is Parquet, which needs pyarrow; install brgsa-jax[parquet] or "
                        "save the table as CSV UTF-8") from error
    try:
        with _told(table, "Parquet"):
            names = parquet.read_schema(table).names
            wanted = _with(wanted, wished, names)
            find_columns(table, names, wanted)
            columns = parquet.read_table(table, columns=list(wanted)).to_pydict()
    except pyarrow.ArrowException as error:
        raise UserError(f"{table} is no readable Parquet ({str(error).splitlines()[0]}); save it "
                        "again, or as CSV UTF-8") from error
    return [{name: _text(value, f"row {row} of {table}", name)
             for name, value in zip(wanted, values, strict=True)}
            for row, values in enumerate(zip(*(columns[n] for n in wanted), strict=True), start=1)]


def _text(value: Any, place: str, column: str) -> str:
    """A typed cell as the text a CSV would hold."""
    if value is None or value != value:  # A float NaN is how data frames store an empty cell.
        return ""
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return ";".join(value)
    raise UserError(f"column {column!r} in {place} is neither text nor a number nor a list of "
                    "texts; write it as text")
