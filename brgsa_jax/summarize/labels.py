"""Summaries to a table of labels: drafted by machine, corrected by radiologists.

OUT holds labels.csv (what evaluations read), findings.csv (what data sets are built with),
review.csv (what readers fill in) and labels.json (where all of it comes from). No report text is
written unless its columns are named, and then into the sheets only.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from brgsa_jax.config import UserError
from brgsa_jax.data.records import write_json
from brgsa_jax.summarize import vocabulary
from brgsa_jax.summarize.drafts import Drafts, Request, choose_findings, read_cases, read_drafts
from brgsa_jax.summarize.review import Agreement, Cell, Rate, agreements, collect, rate, settle
from brgsa_jax.summarize.sheet import (
    Case,
    Opinion,
    Question,
    Sheet,
    is_filled,
    read_sheet,
    write_csv,
    write_sheet,
)
from brgsa_jax.version import __version__

_SHEETS = re.compile(r"(review|conflicts)(-\d+)?\.csv")


class Tally(NamedTuple):
    """One finding, counted in reports.

    Attributes:
        drafted: found by the machine.
        positive: labelled present.
        open: not labelled, as readers disagree.
        prevalence: positive among the labelled.
        reviewed: answered by a reader and not open.
        corrected: of these against the draft.
        implied: changed because another finding was answered.
        right: drafts found present that readers confirmed, among those they read.
        missed: reports that readers found to have it, among the sampled ones drafted without it.
        agreement: of each two readers.
    """

    drafted: int
    positive: int
    open: int
    prevalence: float
    reviewed: int
    corrected: int
    implied: int
    right: Rate
    missed: Rate
    agreement: list[Agreement]


class Labels(NamedTuple):
    """What was written.

    Attributes:
        findings: counts by finding.
        too_rare: {finding: reports} left out by `min_positives`.
        ids: rows of labels.csv.
        reports: different reports behind them.
        failed: ids without a summary, in left_out.csv.
        sheet: the sheet written now, None if every row was in an earlier one.
        questions: rows of it.
        to_read: reports in it.
        shows_reports: whether the sheets hold report text.
        conflicts: the sheet of disagreements, None without any.
        open: rows of it.
        agreement: of each two readers, all findings together.
    """

    findings: dict[str, Tally]
    too_rare: dict[str, int]
    ids: int
    reports: int
    failed: int
    sheet: str | None
    questions: int
    to_read: int
    shows_reports: bool
    conflicts: str | None
    open: int
    agreement: list[Agreement]


def make_labels(summaries: str | Path, out: str | Path, *, reviews: Sequence[str | Path] = (),
                **request: Any) -> Labels:
    """Writes labels of summaries, as drafted or as corrected by filled-in sheets.

    What `request` leaves out is taken from the folder's labels.json, so that a folder keeps its
    findings, sample and table. A sheet that anyone has written into is never written again.

    Args:
        summaries: JSON lines of `summarize_table`, or a table with the columns id and findings.
        out: the folder.
        reviews: sheets that readers filled in, those of disagreements among them.
        **request: fields of `Request`; None and () are as if left out.

    Raises:
        UserError: a file is damaged or does not fit the others, or filled-in cells of `out` would
            be lost.
    """
    summaries, out = Path(summaries), Path(out)
    kept, used = _recall(out)
    asked = _change(kept, request)
    dropped = [name for name in used if name not in {Path(path).name for path in reviews}]
    if dropped:
        raise UserError(f"the labels in {out} come from {', '.join(dropped)} too; add --review for "
                        "it, or choose another --out")
    drafts = read_drafts(summaries)
    by_id, patients = read_cases(drafts, asked)
    plan = _plan(list(dict.fromkeys(by_id.values())), asked)
    sheets = [read_sheet(path, by_id, plan.names) for path in reviews]
    unused = _unused_sheets(out, reviews)
    questions = plan.questions()
    if reviews:
        waiting = [read_sheet(path, by_id, plan.names) for path in unused
                   if _stem(path) == "review"]
        known = {cell for sheet in (*sheets, *waiting) for cell in sheet.asked}
        questions = [one for one in questions if (one.case.ids[0], one.finding) not in known]
    opinions = collect(sheets)
    cells = {case.ids[0]: settle(case.findings, opinions[case.ids[0]]) for case in plan.cases
             if case.ids[0] in opinions}
    conflicts = [Question(case, finding, cell.why) for case in plan.cases
                 for finding, cell in cells.get(case.ids[0], {}).items() if cell.label is None]

    out.mkdir(parents=True, exist_ok=True)
    for path in unused:
        if not reviews or _stem(path) == "conflicts":
            path.unlink()
    labels = Labels(
        findings={name: _tally(name, plan, cells, opinions) for name in plan.names},
        too_rare=plan.too_rare, ids=len(by_id), reports=len(plan.cases), failed=len(drafts.failed),
        sheet=_new_sheet(out, "review", questions), questions=len(questions),
        to_read=len({question.case for question in questions}),
        shows_reports=bool(asked.text_column),
        conflicts=_new_sheet(out, "conflicts", conflicts), open=len(conflicts),
        agreement=agreements(given for case in opinions.values() for given in case.values()))
    _write_tables(out, plan.names, by_id, patients, cells, drafts.failed)
    write_json(out / "labels.json", _provenance(summaries, drafts, asked, sheets, labels))
    return labels


def _recall(out: Path) -> tuple[Request, list[str]]:
    """What the folder was asked to be, and the names of the sheets in its labels."""
    file = out / "labels.json"
    if not file.exists():
        if (out / "labels.csv").exists():
            raise UserError(f"{out} holds a labels.csv of something else; choose another --out")
        return Request(), []
    try:
        kept = json.loads(file.read_text(encoding="utf-8"))
        request = Request()._replace(**{
            name: tuple(value) if isinstance(value, list) else value
            for name, value in kept["request"].items()})
        if ([*map(type, request)] != [*map(type, Request())]
                or not all(isinstance(name, str) for name in request.text_column)
                or min(request.min_positives, request.negatives) < 0):
            raise TypeError(request)
        choose_findings(request.findings)
        return request, [str(sheet["file"]) for sheet in kept["sheets"]]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, UserError) as error:
        raise UserError(f"{file} is not what brgsa data labels wrote; choose another --out"
                        ) from error


def _change(request: Request, given: Mapping[str, Any]) -> Request:
    """The request with what is given now."""
    given = {name: value for name, value in given.items() if value not in (None, (), [])}
    request = request._replace(**given)
    request = request._replace(findings=choose_findings(request.findings),
                               text_column=tuple(request.text_column),
                               reports=str(request.reports))
    columns = {"--text-column": request.text_column, "--patient-column": request.patient_column,
               "--scan-column": request.scan_column}
    if any(columns.values()) and not request.reports:
        raise UserError(f"{', '.join(name for name in columns if columns[name])} needs --reports "
                        "with the table of the reports")
    if request.reports and not any(columns.values()):
        raise UserError(f"--reports needs {' or '.join(columns)}, to say what it is read for")
    return request


class _Plan(NamedTuple):
    """Which findings are labelled, and of which reports readers are asked.

    Attributes:
        cases: the reports in an order by chance: who stops reading halfway has read a random part.
        names: the findings.
        too_rare: {finding: reports} that are left out.
        sampled: {finding: reports drafted without it that are read as well}.
    """

    cases: list[Case]
    names: list[str]
    too_rare: dict[str, int]
    sampled: dict[str, list[Case]]

    def questions(self) -> list[Question]:
        drawn = {(name, case.ids[0]) for name in self.names for case in self.sampled[name]}
        return [Question(case, name) for case in self.cases for name in self.names
                if name in case.findings or (name, case.ids[0]) in drawn]


def _plan(cases: Sequence[Case], asked: Request) -> _Plan:
    drafted = {name: sum(name in case.findings for case in cases) for name in asked.findings}
    names = [name for name in asked.findings if drafted[name] >= asked.min_positives]
    if not names:
        raise UserError(f"no finding is drafted in {asked.min_positives} reports; lower "
                        "--min-positives")
    # By its hash a report keeps its place when others are added. One order serves all findings, so
    # that a report read for one of them is read for many.
    ranked = sorted(cases, key=lambda case: hashlib.sha256(
        f"{asked.seed} {case.ids[0]}".encode()).digest())
    sampled = {name: [case for case in ranked if name not in case.findings][:asked.negatives]
               for name in names}
    return _Plan(ranked, names, {name: drafted[name] for name in drafted if name not in names},
                 sampled)


def _stem(path: Path) -> str:
    return path.stem.partition("-")[0]


def _unused_sheets(out: Path, reviews: Sequence[str | Path]) -> list[Path]:
    """The folder's own sheets that are not given; nobody has written into them."""
    given = {Path(path).resolve() for path in reviews}
    own = [path for path in sorted(out.glob("*.csv"))
           if _SHEETS.fullmatch(path.name) and path.resolve() not in given]
    for path in own:
        if is_filled(path):
            raise UserError(f"{path} has been written into; add --review {path} to apply it, or "
                            "choose another --out")
    return own


def _new_sheet(out: Path, stem: str, questions: Sequence[Question]) -> str | None:
    """Writes questions, if any, under a name that is still free."""
    if not questions:
        return None
    path, number = out / f"{stem}.csv", 1
    while path.exists():
        number += 1
        path = out / f"{stem}-{number}.csv"
    write_sheet(path, questions)
    return str(path)


def _tally(name: str, plan: _Plan, cells: Mapping[str, Mapping[str, Cell]],
           opinions: Mapping[str, Mapping[str, list[Opinion]]]) -> Tally:
    drafted = [case for case in plan.cases if name in case.findings]
    states = [by_name[name].state for by_name in cells.values() if name in by_name]
    open = states.count("open")
    positive = sum(_label(name, case, cells) is True for case in plan.cases)

    def answers(asked: Sequence[Case]) -> list[bool]:
        read = (cells.get(case.ids[0], {}).get(name) for case in asked)
        return [bool(cell.label) for cell in read
                if cell and cell.state in ("confirmed", "corrected")]

    return Tally(
        drafted=len(drafted), positive=positive, open=open,
        prevalence=positive / max(1, len(plan.cases) - open),
        reviewed=states.count("confirmed") + states.count("corrected"),
        corrected=states.count("corrected"), implied=states.count("implied"),
        right=rate(answers(drafted)), missed=rate(answers(plan.sampled[name])),
        agreement=agreements(given[name] for given in opinions.values() if name in given))


def _label(name: str, case: Case, cells: Mapping[str, Mapping[str, Cell]]) -> bool | None:
    cell = cells.get(case.ids[0], {}).get(name)
    return cell.label if cell else name in case.findings


def _write_tables(out: Path, names: Sequence[str], by_id: Mapping[str, Case],
                  patients: Mapping[str, str], cells: Mapping[str, Mapping[str, Cell]],
                  failed: Mapping[str, str]) -> None:
    """The tables that other commands and people read; none of them holds report text."""
    def patient(text: str) -> list[str]:
        return [text] if patients else []

    labels = [["id", *patient("patient"), *names]]
    findings = [["id", *patient("patient"), "findings"]]
    states = [["id", "finding", "draft", "label", "state", "by", "when"]]
    left_out = [["id", "reason"], *failed.items()]
    for id, case in by_id.items():
        answered = cells.get(case.ids[0], {})
        row = [id, *patient(patients.get(id, ""))]
        labels.append([*row, *(_written(_label(name, case, cells)) for name in names)])
        open = [name for name, cell in answered.items() if cell.label is None]
        if open:
            left_out.append([id, f"not in findings.csv: readers disagree on {', '.join(open)}"])
        else:
            findings.append([*row, ";".join(name for name in vocabulary.VOCABULARY
                                            if _label(name, case, cells))])
        states += [[id, name, _written(name in case.findings), _written(cell.label), cell.state,
                    cell.by, cell.when] for name, cell in answered.items()]
    for name, rows in (("labels", labels), ("findings", findings), ("label_states", states),
                       ("left_out", left_out)):
        write_csv(out / f"{name}.csv", rows)


def _written(label: bool | None) -> str:
    return "" if label is None else str(int(label))


def _provenance(summaries: Path, drafts: Drafts, asked: Request, sheets: Sequence[Sheet],
                labels: Labels) -> dict[str, Any]:
    words = json.dumps([vocabulary.VOCABULARY, vocabulary.PARENTS]).encode()
    return {
        "written": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "brgsa_jax": __version__,
        "summaries": {"file": summaries.name, "backends": drafts.backends,
                      "sha256": hashlib.sha256(summaries.read_bytes()).hexdigest()},
        "vocabulary_sha256": hashlib.sha256(words).hexdigest(),
        "request": asked._asdict(),
        "sheets": [{"file": sheet.path.name, "sha256": sheet.sha256, "rows": len(sheet.asked),
                    "answers": len(sheet.opinions)} for sheet in sheets],
        **_plain(labels)}


def _plain(value: Any) -> Any:
    """Named tuples as dictionaries, however deep."""
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return _plain(value._asdict()) if hasattr(value, "_asdict") else value
