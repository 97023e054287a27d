"""Draft labels: which findings, which summaries, and the reports they were made of."""

from __future__ import annotations

import unicodedata
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple

from brgsa_jax.config import UserError
from brgsa_jax.data.summaries import read_summaries
from brgsa_jax.data.tables import read_table
from brgsa_jax.registry import miss
from brgsa_jax.summarize import vocabulary
from brgsa_jax.summarize.sheet import Case

GROUPS = {"@ct-rate-18": vocabulary.CT_RATE_18, "@ct-rate-lt": vocabulary.CT_RATE_LT_15,
          "@all": vocabulary.VOCABULARY}
_UNSAFE = ("Cc", "Cs", "Zl", "Zp")


class Request(NamedTuple):
    """What a folder of labels was asked to be; kept in its labels.json.

    Attributes:
        findings: canonical names, the columns of labels.csv in their order.
        min_positives: findings drafted in fewer reports are left out.
        negatives: reports without a finding that are read as well, of each finding.
        seed: of the choice of these.
        reports: table of the reports, or "".
        id_column: its ids; "" is the column "id", else the row's number from 1.
        text_column: its columns that readers see in the sheets.
        patient_column: its patients, for labels.csv.
        scan_column: its scans; the volumes of one have one report and are read once.
    """

    findings: tuple[str, ...] = vocabulary.CT_RATE_LT_15
    min_positives: int = 0
    negatives: int = 50
    seed: int = 0
    reports: str = ""
    id_column: str = ""
    text_column: tuple[str, ...] = ()
    patient_column: str = ""
    scan_column: str = ""


class Drafts(NamedTuple):
    """The draft labels of a file.

    Attributes:
        found: {id: canonical findings}, in the file's order.
        failed: {id: reason} of those without a summary.
        backends: what made them, with versions.
    """

    found: dict[str, frozenset[str]]
    failed: dict[str, str]
    backends: list[str]


def choose_findings(parts: str | Sequence[str]) -> tuple[str, ...]:
    """Returns canonical names from names, groups and files.

    Args:
        parts: separated by commas, or a sequence. Each is a name or synonym of the vocabulary, one
            of `GROUPS`, or a text file with a name a line; lines that start with # are left out.

    Raises:
        UserError: a part is none of these, or there is none.
    """
    names: list[str] = []
    parts = parts.split(",") if isinstance(parts, str) else parts
    for part in filter(None, map(str.strip, parts)):
        if part in GROUPS:
            names += GROUPS[part]
        elif name := vocabulary.canonical(part):
            names.append(name)
        elif Path(part).is_file():
            names += _names_of(Path(part))
        elif part.startswith("@"):
            raise UserError(miss("group of findings", part, GROUPS))
        else:
            raise UserError(f"{miss('finding', part, vocabulary.VOCABULARY)}; a file of that name "
                            "is not there either")
    if not names:
        raise UserError(f"--findings names no finding; give names, {', '.join(GROUPS)} or a file")
    return tuple(dict.fromkeys(names))


def _names_of(file: Path) -> list[str]:
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} is no text in UTF-8 ({error}); write one finding a line"
                        ) from error
    names = []
    for number, line in enumerate(map(str.strip, lines), start=1):
        if line and not line.startswith("#"):
            names.append(vocabulary.canonical(line))
            if names[-1] is None:
                raise UserError(f"line {number} of {file}: "
                                f"{miss('finding', line, vocabulary.VOCABULARY)}")
    return names


def read_drafts(file: Path) -> Drafts:
    """Reads what `brgsa summarize` wrote, or a table like it; see `data.summaries`.

    Raises:
        UserError: it is something else, says two things of one id, or holds no summary.
    """
    named, failed = read_summaries(file)
    if not named:
        raise UserError(f"all {len(failed)} summaries of {file} have failed; see their status")
    for id in (*named, *failed):
        if any(unicodedata.category(letter) in _UNSAFE for letter in id):
            raise UserError(f"{file} has the id {id[:60]!r}, which no table can hold; rename it "
                            "where the reports are")
    found = {}
    for id, names in named.items():
        try:
            found[id] = frozenset(vocabulary.closure(names))
        except ValueError as error:
            unknown = str(error).partition(";")[0][:200]
            raise UserError(f"{file} has {unknown} of {id!r}; summarise the reports again with "
                            "this version") from error
    backends = {row.get("backend", "") for row in read_table(file, ["id"], wished=["backend"])}
    return Drafts(found, failed, sorted(backends - {""}))


def read_cases(drafts: Drafts, asked: Request) -> tuple[dict[str, Case], dict[str, str]]:
    """Joins summaries with the table of the reports, by id.

    Returns:
        {id: report} in the order of the summaries, and {id: patient} where patients are asked for.

    Raises:
        UserError: the table lacks a column or an id, or volumes of a scan have different findings.
    """
    rows = _read_reports(asked, drafts.found) if asked.reports else {}
    groups: dict[str, list[str]] = {}
    for id in drafts.found:
        groups.setdefault(rows[id][asked.scan_column] if asked.scan_column else id, []).append(id)
    cases = {}
    for scan, ids in groups.items():
        other = next((id for id in ids if drafts.found[id] != drafts.found[ids[0]]), None)
        if other is not None:
            raise UserError(f"{ids[0]!r} and {other!r} are volumes of the scan {scan!r} and have "
                            f"different findings; name another --scan-column")
        text = " ".join(rows[ids[0]][column] for column in asked.text_column)
        cases |= dict.fromkeys(ids, Case(tuple(ids), drafts.found[ids[0]], text))
    return ({id: cases[id] for id in drafts.found},
            {id: rows[id][asked.patient_column] for id in rows if asked.patient_column})


def _read_reports(asked: Request, ids: Collection[str]) -> dict[str, dict[str, str]]:
    named = [name for name in (asked.patient_column, asked.scan_column) if name]
    table = read_table(asked.reports, [*named, *asked.text_column], [asked.id_column],
                       wished=[] if asked.id_column else ["id"])
    column = asked.id_column or ("id" if "id" in table[0] else None)
    rows: dict[str, dict[str, str]] = {}
    for number, row in enumerate(table, start=1):
        id = row[column] if column else str(number)
        if rows.setdefault(id, row) != row:
            raise UserError(f"row {number} of {asked.reports} is another one of the id {id!r}; "
                            "keep one of them")
        empty = next((name for name in named if not row[name]), None)
        if empty and id in ids:
            raise UserError(f"row {number} of {asked.reports} has no {empty}; fill it in")
    missing = [id for id in ids if id not in rows]
    if missing:
        raise UserError(f"{len(missing)} ids of the summaries are not in {asked.reports}, the "
                        f"first is {missing[0]!r}; give the table they were made from, or another "
                        "--id-column")
    return {id: rows[id] for id in ids}
