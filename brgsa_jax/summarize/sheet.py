"""The review sheet: which questions it asks, and what readers have answered.

A sheet is a CSV that goes through a spreadsheet and comes back. It is written so that a spreadsheet
neither runs nor changes a cell, and read in the forms that spreadsheets save.
"""

from __future__ import annotations

import csv
import datetime
import hashlib
import io
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from brgsa_jax.config import UserError
from brgsa_jax.data.tables import ACTIVE, find_columns, flag, quoted

ASKED = ("id", "finding", "draft", "corrected", "by", "when")
FILLED = ("corrected", "by", "when", "note")
# A sheet with this column is one of disagreements: its answers settle them.
OPINIONS = "opinions"

# The longest text a cell of Excel holds.
_CELL = 32_767
# What spreadsheets take for a number, a date or a truth value: 00123, 1e5, 2024-1-2, MAR1, True.
_MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
_CHANGED = re.compile(rf"[\W\d]|true|false|{'|'.join(_MONTHS)}", re.I)
_TIME = r"(?:[ T]\d{1,2}:\d\d.*)?"
_YEAR_FIRST = re.compile(rf"(\d{{4}})[-/.](\d{{1,2}})[-/.](\d{{1,2}}){_TIME}")
_DAY_FIRST = re.compile(rf"(\d{{1,2}})\.(\d{{1,2}})\.(\d{{4}}){_TIME}")
_NAMED = re.compile(rf"(\d{{1,2}})[- ]({'|'.join(_MONTHS)})[a-z]*[- ](?:20)?(\d\d)", re.I)
_EITHER = re.compile(rf"(\d{{1,2}})[/-](\d{{1,2}})[/-](\d{{4}}){_TIME}")


class Case(NamedTuple):
    """A report with its draft labels.

    Attributes:
        ids: the volumes it speaks of; the first one stands for it in sheets.
        findings: canonical positive findings, parents included.
        text: the report, empty unless readers are to see it.
    """

    ids: tuple[str, ...]
    findings: frozenset[str]
    text: str = ""


class Opinion(NamedTuple):
    """One reader's answer about one finding of one report.

    Attributes:
        case: first id of the report.
        finding: canonical name.
        value: whether it is there.
        by: the reader.
        when: ISO date.
        settles: whether it decides a disagreement of others.
        place: row and file, for messages.
    """

    case: str
    finding: str
    value: bool
    by: str
    when: str
    settles: bool
    place: str


class Sheet(NamedTuple):
    """A sheet as read.

    Attributes:
        path: the file.
        sha256: of its bytes.
        asked: (first id of the report, finding) of every row.
        opinions: one for each row with an answer.
    """

    path: Path
    sha256: str
    asked: frozenset[tuple[str, str]]
    opinions: tuple[Opinion, ...]


class Question(NamedTuple):
    """A row to be written: one finding of one report, with the answers that disagree."""

    case: Case
    finding: str
    opinions: str = ""


def plain(text: str) -> str:
    """Returns a text on one line without control characters and lone surrogates."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def write_csv(path: Path, rows: Iterable[Iterable[str]], encoding: str = "utf-8") -> None:
    """Writes a CSV that spreadsheets do not execute, whole or not at all."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("w", encoding=encoding, newline="") as stream:
            csv.writer(stream, lineterminator="\n").writerows(
                [quoted(cell) for cell in row] for row in rows)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_sheet(path: Path, questions: Sequence[Question]) -> None:
    """Writes a sheet with a row a question, in their order; `report` only where there are texts."""
    columns = [*ASKED, "note"]
    columns += [OPINIONS] if any(question.opinions for question in questions) else []
    columns += ["report"] if any(question.case.text for question in questions) else []
    rows = [{"id": _kept(case.ids[0]), "finding": finding,
             "draft": str(int(finding in case.findings)), OPINIONS: opinions,
             "report": _short(plain(case.text))} for case, finding, opinions in questions]
    # Excel takes a file without a byte-order mark for another encoding than UTF-8.
    write_csv(path, [columns, *([row.get(name, "") for name in columns] for row in rows)],
              encoding="utf-8-sig")


def _kept(id: str) -> str:
    return f"'{id}" if _CHANGED.match(id) and not ACTIVE.match(id) else id


def _short(text: str) -> str:
    mark = f" … [cut, {len(text)} letters]"
    # One letter less, as an apostrophe may come before it.
    return text if len(text) < _CELL else text[:_CELL - 1 - len(mark)] + mark


def is_filled(path: Path) -> bool:
    """Whether anyone has written into a sheet.

    Raises:
        UserError: it is no sheet.
    """
    _, rows = _read(path)
    return any(row[name] for _, row in rows for name in FILLED)


def read_sheet(path: str | Path, cases: Mapping[str, Case], findings: Sequence[str]) -> Sheet:
    """Reads a sheet that readers have filled in, in part or not at all.

    Separators are commas, semicolons or tabs. Answers are 0 and 1 (1.0, TRUE); a row without one
    has not been read yet. Dates are 2026-03-14, 14-Mar-2026 or 14.3.2026, or with slashes where
    some row of the sheet tells days from months. Rows are counted as a spreadsheet does: the header
    is row 1.

    Args:
        path: the file.
        cases: report of every id.
        findings: names that may be asked.

    Raises:
        UserError: the sheet is damaged, belongs to other summaries, or has an answer that is none.
    """
    path = Path(path)
    content, rows = _read(path)
    asked, answered = set(), []
    for number, row in rows:
        place = f"row {number} of {path}"
        case = _case(row["id"], cases, place)
        finding = row["finding"]
        if finding not in findings:
            raise UserError(f"{place} names the finding {finding[:60]!r}, which is not labelled "
                            "here; write it as the sheet had it, or give its name to --findings")
        if _flag(row, "draft", place) != (finding in case.findings):
            raise UserError(f"{place} has the draft {row['draft']} for {finding}, where the "
                            f"summaries now say {int(finding in case.findings)}; give the "
                            "summaries the sheet was made from, or make a new sheet in another "
                            "--out")
        asked.add((case.ids[0], finding))
        if not row["corrected"]:
            continue
        value = _flag(row, "corrected", place)
        by = plain(row["by"])
        if not by:
            raise UserError(f"{place} has an answer and nobody in the column 'by'; write who gave "
                            "it")
        answered.append((number, row["when"], Opinion(
            case.ids[0], finding, value, by, "", OPINIONS in row, place)))
    dates = _dates(path, {number: when for number, when, _ in answered})
    return Sheet(path, hashlib.sha256(content).hexdigest(), frozenset(asked), tuple(
        opinion._replace(when=dates[number].isoformat()) for number, _, opinion in answered))


def _case(cell: str, cases: Mapping[str, Case], place: str) -> Case:
    case = cases.get(cell.removeprefix("'")) or cases.get(cell)
    if case is None:
        raise UserError(f"{place} names the id {cell[:60]!r}, which has no summary; where a "
                        "spreadsheet has changed ids (00123 to 123), open the sheet again with "
                        "that column as text")
    return case


def _flag(row: Mapping[str, str], column: str, place: str) -> bool:
    try:
        return flag(row, column)
    except ValueError as error:
        raise UserError(f"{place}: {error}; correct that cell") from None


def _read(path: Path) -> tuple[bytes, list[tuple[int, dict[str, str]]]]:
    """The bytes of a sheet, and its rows that are not blank with their numbers."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"the sheet {path} cannot be read ({error.strerror or error}); check the "
                        "path") from error
    if content.startswith(b"PK\x03\x04"):
        raise UserError(f"{path} is a workbook; save it as CSV UTF-8")
    try:
        text = content.decode("utf-8-sig")
        # As spreadsheets of one half of the world save them.
        header = next(iter(text.splitlines()), "")
        delimiter = max(",;\t", key=header.count)
        records = list(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True))
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} is no CSV in UTF-8 ({error}); save it as CSV UTF-8") from error
    names = [name.strip().lower() for name in records[0]] if records else []
    places = find_columns(path, names, [*ASKED, *(
        name for name in ("note", OPINIONS) if name in names)])
    return content, list(_numbered(path, places, len(names), records[1:]))


def _numbered(path: Path, places: Mapping[str, int], width: int,
              records: Sequence[Sequence[str]]) -> Iterator[tuple[int, dict[str, str]]]:
    for number, record in enumerate(records, start=2):
        cells = [cell.strip() for cell in record] + [""] * (width - len(record))
        if any(cells[width:]):
            raise UserError(f"row {number} of {path} has more cells than the header; put texts "
                            "with separators into quotes")
        if any(cells):
            yield number, {"note": "", **{name: cells[place] for name, place in places.items()}}


def _dates(path: Path, texts: Mapping[int, str]) -> dict[int, datetime.date]:
    """Dates by row; 3/4/2026 is read the way the other rows of the sheet allow."""
    either = {number: found for number, text in texts.items() if (found := _EITHER.fullmatch(text))}
    days = [number for number, found in either.items() if int(found[1]) > 12]
    months = [number for number, found in either.items() if int(found[2]) > 12]
    if days and months:
        raise UserError(f"rows {days[0]} and {months[0]} of {path} have days and months in "
                        "different orders; write dates as 14-Mar-2026")
    dates = {}
    for number, text in texts.items():
        if number in either and not days and not months and either[number][1] != either[number][2]:
            raise UserError(f"row {number} of {path} has the date {text!r}, and no row tells "
                            "days from months; write dates as 14-Mar-2026")
        try:
            dates[number] = _date(text, day_first=bool(days))
        except ValueError:
            raise UserError(f"row {number} of {path} has {text[:40]!r} in the column 'when', not "
                            "the date of the answer; write dates as 2026-03-14") from None
    return dates


def _date(text: str, day_first: bool) -> datetime.date:
    if found := _YEAR_FIRST.fullmatch(text):
        year, month, day = map(int, found.groups())
    elif found := _DAY_FIRST.fullmatch(text):
        day, month, year = map(int, found.groups())
    elif found := _NAMED.fullmatch(text):
        day, month = int(found[1]), _MONTHS.index(found[2].lower()) + 1
        year = 2000 + int(found[3])
    elif found := _EITHER.fullmatch(text):
        month, day, year = map(int, found.groups())
        if day_first:
            month, day = day, month
    else:
        raise ValueError(text)
    date = datetime.date(year, month, day)
    # A day ahead is another time zone, more is a slip.
    if date > datetime.date.today() + datetime.timedelta(days=1):
        raise ValueError(text)
    return date
