"""MIMIC-CXR-JPG from its downloaded tree: images, tables and free-text reports.

    ROOT/files/p10/p10000032/s50414267/DICOM_ID.jpg
    ROOT/files/p10/p10000032/s50414267.txt, or the same below another folder
    ROOT/mimic-cxr-2.0.0-{metadata,split,chexpert}.csv, or .csv.gz

Rows of metadata and split are joined by dicom_id, labels by study_id; row order is never used, and
no cell is made into a path before a file of that name was found. Reports are read when the record
is made: what has none worth a caption is a failure like an image that cannot be read. See
`builders.build_image2d`.
"""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

from brgsa_jax.config import UserError
from brgsa_jax.data import tables
from brgsa_jax.data.image2d import Radiograph
from brgsa_jax.data.plans import file_state, stem, walk
from brgsa_jax.data.radiographs import SUFFIXES, radiograph_record
from brgsa_jax.data.records import Failure
from brgsa_jax.data.shards import Plan
from brgsa_jax.data.tokenizer import clean_report
from brgsa_jax.data.volume import NotACT

VIEWS = ("PA", "AP")
CHEXPERT = (
    "Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Enlarged Cardiomediastinum",
    "Fracture", "Lung Lesion", "Lung Opacity", "Pleural Effusion", "Pleural Other", "Pneumonia",
    "Pneumothorax", "Support Devices")
_SPLITS = {"train": "train", "validate": "valid", "test": "test"}
_TABLE = re.compile(r"mimic-cxr-(?P<version>[\d.]+)-(?P<kind>metadata|split|chexpert)\.csv(\.gz)?")
_MAX_REPORT_BYTES = 2**20
_MIN_WORDS = 3

_SECTIONS = {"FINDINGS": "findings", "FINDING": "findings", "FINDINGS AND IMPRESSION": "findings",
             "FINDINGS/IMPRESSION": "findings", "IMPRESSION AND FINDINGS": "findings",
             "IMPRESSION/FINDINGS": "findings", "IMPRESSION": "impression",
             "IMPRESSIONS": "impression", "CONCLUSION": "impression", "CONCLUSIONS": "impression"}
_FINAL = "FINAL REPORT"
_OTHER = (
    "ADDENDUM", "CLINICAL HISTORY", "CLINICAL INDICATION", "CLINICAL INFORMATION", "COMPARISON",
    "COMPARISONS", "COMPARISON STUDY", "COMPARISON STUDIES", "EXAM", "EXAMINATION",
    "FINAL ADDENDUM", "HISTORY", "INDICATION", "INDICATIONS", "NOTIFICATION", "NOTIFICATIONS",
    "PRELIMINARY REPORT", "PROCEDURE", "PROVISIONAL FINDINGS IMPRESSION", "REASON FOR EXAM",
    "REASON FOR EXAMINATION", "REASON FOR STUDY", "REASON FOR THE EXAM", "RECOMMENDATION",
    "RECOMMENDATIONS", "RECOMMENDATION(S)", "STUDY", "TECHNIQUE", "TYPE OF EXAMINATION", "WET READ")


def _pattern(*names: str) -> str:
    """Matches any of these names, the longest that fits; line breaks may part the words."""
    longest_first = sorted(names, key=len, reverse=True)
    return "|".join(r"\s+".join(map(re.escape, name.split())) for name in longest_first)


_ANY = _pattern(*_SECTIONS, _FINAL, *_OTHER)
_HEADING = re.compile(
    # At the start of a line in any case before a colon, or in capitals with the line for itself.
    rf"^[ \t]*(?P<line>(?i:{_ANY}))[ \t]*(?:\([^()\n]{{0,30}}\)[ \t]*)?:"
    rf"|^[ \t]*(?P<alone>{_ANY}|(?i:{_pattern(_FINAL, 'WET READ')}))[ \t]*$"
    rf"|^[ \t]*(?P<bare>{_pattern('ADDENDUM', 'FINAL ADDENDUM', 'WET READ')})\b"
    # Inside a line only in capitals: some copies of the reports have lost their line breaks.
    rf"|(?<!\S)(?P<inside>(?:{_ANY})(?=[ \t]*:)|{_pattern(_FINAL)}\b)[ \t]*:?"
    # A rule of underscores parts a preliminary report from the final one.
    r"|^[ \t]*_{8,}[ \t]*$", re.MULTILINE)


def sections(text: str) -> dict[str, str]:
    """Finds the impression and the findings of a free-text report.

    A section runs from its heading to the next heading that is known; sub-headings ("LUNGS:") stay
    in it. Of several sections of a kind the last one counts, and nothing before "FINAL REPORT"
    does. "FINDINGS AND IMPRESSION" is taken as findings, a conclusion as the impression.

    Args:
        text: the report with any line breaks.

    Returns:
        {"impression", "findings": text with single spaces}; what is missing or empty is not there.
    """
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    headings = list(_HEADING.finditer(text))
    ends = [heading.start() for heading in headings[1:]]
    found: dict[str, str] = {}
    for heading, end in zip_longest(headings, ends, fillvalue=len(text)):
        name = " ".join((heading[heading.lastgroup] if heading.lastgroup else "").upper().split())
        body = " ".join(text[heading.end():end].split())
        if name == _FINAL:
            found.clear()
        elif name in _SECTIONS and body:
            found[_SECTIONS[name]] = body
    return found


def read_caption(path: str | Path) -> str:
    """Reads a report as MGCA's caption: the impression, then the findings, a line each.

    Raises:
        NotACT: it cannot be read, or has too little of either; the message names no text.
    """
    name = Path(path).name
    try:
        with Path(path).open("rb") as stream:
            content = stream.read(_MAX_REPORT_BYTES + 1)
        if len(content) > _MAX_REPORT_BYTES:
            raise NotACT(path, f"its report {name} is larger than {_MAX_REPORT_BYTES:,} bytes; "
                         "download it again")
        found = sections(content.decode("utf-8-sig"))
    except OSError as error:
        raise NotACT(path, f"its report {name} cannot be read ({error.strerror}); download it "
                     "again") from error
    except UnicodeDecodeError as error:
        raise NotACT(path, f"its report {name} is not UTF-8; download it again") from error
    caption = "\n".join(found[part] for part in ("impression", "findings") if part in found)
    if not caption:
        raise NotACT(path, f"its report {name} has no findings or impression section")
    if sum(len(sentence.split()) for sentence in clean_report(caption)) < _MIN_WORDS:
        raise NotACT(path, f"the findings and impression of its report {name} have fewer than "
                     f"{_MIN_WORDS} words")
    return caption


@dataclass(frozen=True)
class MimicTask:
    """One image of MIMIC-CXR.

    Attributes:
        study: the examination, e.g. "50414267"; all its images have one report.
        view: its ViewPosition.
        report: path of the study's report.
    """

    split: str
    id: str
    patient: str
    study: str
    view: str
    findings: tuple[str, ...]
    file: str
    path: str
    report: str
    preprocess: Radiograph

    def stamp(self) -> list[Any]:
        """See `records.Task`."""
        return [self.patient, self.study, self.view, self.findings, self.file,
                file_state(self.path), file_state(self.report)]

    def make(self) -> tuple[dict[str, Any], tuple[str, ...]]:
        """See `records.Task`."""
        return radiograph_record(self.id, self.patient, read_caption(self.report), self.findings,
                                 self.path, self.preprocess, file=self.file, study=self.study,
                                 view=self.view)


def plan_mimic_cxr(root: Path, reports: Path | None, views: Sequence[str], recipe: Radiograph,
                   compression: str) -> Plan:
    """Joins the files of a MIMIC-CXR-JPG tree to its tables; see `builders.build_image2d`.

    Raises:
        UserError: the tree or a table is unusable as a whole, or no image has one of the views.
    """
    files = root / "files"
    if not files.is_dir():
        raise UserError(f"{root} has no folder files; give the folder that holds MIMIC-CXR-JPG's "
                        "files and tables")
    release = _Release.read(root)
    _check_views(release.metadata, views)
    # Last, since listing all files takes long.
    tree = _Tree.read(files, reports)
    tasks: list[MimicTask] = []
    failures: list[Failure] = []
    unlisted: list[Failure] = []
    for id_ in sorted({*release.metadata.rows, *release.split.rows}):
        file = ""
        try:
            row = release.metadata.of(id_)
            file = tree.file_of(row)
            if row["ViewPosition"] in views:
                tasks.append(_task(row, file, tree, release, recipe))
            else:
                unlisted.append(Failure(id_, file, "left out: its view is "
                                        f"{row['ViewPosition'] or 'not given'}"))
        except _Unusable as error:
            failures.append(Failure(id_, file, str(error)))
    named = {name for rows in release.metadata.rows.values() for _, row in rows
             for name in tree.images.get(_image(row), ())}
    strays = sorted(name for names in tree.images.values() for name in names if name not in named)
    unlisted += [Failure("", name, f"no row of {release.metadata.file.name} belongs to this file")
                 for name in strays]
    request = {"source": "mimic-cxr", "views": list(views), "compression": compression,
               "preprocess": recipe.as_dict()}
    return Plan(tasks, failures, unlisted, CHEXPERT, request)


def _task(row: Mapping[str, str], file: str, tree: "_Tree", release: "_Release",
          recipe: Radiograph) -> MimicTask:
    """Joins an image of a wanted view to its file, patient, labels, split and report."""
    subject, study = row["subject_id"], row["study_id"]
    if not file:
        raise _Unusable(f"there is no file {_image(row)}.jpg; download it")
    if subject in release.straddling:
        raise _Unusable(f"{release.split.file.name} has its patient in the splits "
                        f"{' and '.join(release.straddling[subject])}; keep one")
    split = release.split.cells(row["dicom_id"], subject, _split_name)
    findings = release.labels.cells(study, subject, _positives)
    report = tree.reports.get(_study(row))
    if report is None:
        raise _Unusable(f"there is no report {_study(row)}.txt; download it, or give the folder "
                        "of the reports")
    return MimicTask(
        split=split, id=row["dicom_id"], patient=subject, study=study, view=row["ViewPosition"],
        findings=findings, file=file, path=str(tree.root / file), report=report,
        preprocess=recipe)


def _study(row: Mapping[str, str]) -> str:
    """Where the release has a study, below its folder files; only looked up, never opened."""
    subject = row["subject_id"]
    return f"p{subject[:2]}/p{subject}/s{row['study_id']}"


def _image(row: Mapping[str, str]) -> str:
    return f"{_study(row)}/{row['dicom_id']}"


class _Unusable(Exception):  # noqa: N818
    """Why an image cannot be planned."""


class _Tree(NamedTuple):
    """The files below ROOT/files.

    Attributes:
        root: ROOT/files.
        images: {path without suffix: paths with it}, below `root`.
        reports: {folder of the study below `root`: path of its report}.
    """

    root: Path
    images: dict[str, list[str]]
    reports: dict[str, str]

    @classmethod
    def read(cls, files: Path, reports: Path | None) -> "_Tree":
        images: dict[str, list[str]] = defaultdict(list)
        texts = {}
        for here, names in walk(files):
            for name in names:
                path = (here / name).as_posix()
                if name.lower().endswith(SUFFIXES):
                    images[stem(path, SUFFIXES)].append(path)
                elif name.endswith(".txt"):
                    texts[path.removesuffix(".txt")] = str(files / path)
        if reports is not None:
            base = reports / "files" if (reports / "files").is_dir() else reports
            texts = {(here / name).as_posix().removesuffix(".txt"): str(base / here / name)
                     for here, names in walk(base) for name in names if name.endswith(".txt")}
        if not images:
            raise UserError(f"{files} holds no image; download those of MIMIC-CXR-JPG")
        if not texts:
            raise UserError(f"{reports or files} holds no report; unpack MIMIC-CXR's "
                            "mimic-cxr-reports.zip and give that folder with --reports")
        return cls(files, dict(images), texts)

    def file_of(self, row: Mapping[str, str]) -> str:
        """The file of an image, "" if there is none."""
        found = self.images.get(_image(row), [""])
        if len(found) > 1:
            raise _Unusable(f"{len(found)} files have this name ({', '.join(found)}); keep one")
        return found[0]


class _Table(NamedTuple):
    """A table of MIMIC-CXR by one of its columns.

    Attributes:
        file: the table.
        key: the column.
        rows: {cell of that column: [(row number, cells)]}.
    """

    file: Path
    key: str
    rows: dict[str, list[tuple[int, dict[str, str]]]]

    @classmethod
    def read(cls, file: Path, key: str, *columns: str) -> "_Table":
        rows = defaultdict(list)
        for number, row in enumerate(tables.read_table(file, [key, *columns]), start=1):
            rows[row[key]].append((number, row))
        return cls(file, key, dict(rows))

    def of(self, key: str) -> dict[str, str]:
        """The one row of a key."""
        found = self.rows.get(key, [])
        if not key:
            raise _Unusable(f"row {found[0][0]} of {self.file.name} has no {self.key}; fill it in")
        if len(found) != 1:
            raise _Unusable(f"{len(found)} rows of {self.file.name} have this {self.key}; keep one"
                            if found else f"it has no row in {self.file.name}; download the tables "
                            "again, or leave the image out")
        return found[0][1]

    def cells(self, key: str, subject: str, read: Any) -> Any:
        """What `read` makes of the row of a key that belongs to this patient."""
        row = self.of(key)
        place = f"row {self.rows[key][0][0]} of {self.file.name}"
        if row["subject_id"] != subject:
            raise _Unusable(f"{place} is of patient {row['subject_id']!r}, the metadata say "
                            f"{subject!r}; download the tables again")
        try:
            return read(row)
        except ValueError as error:
            raise _Unusable(f"{place}: {error}") from error


class _Release(NamedTuple):
    """The tables of a release.

    Attributes:
        metadata, split: by dicom_id.
        labels: by study_id.
        straddling: {patient: splits} of patients that lie in more than one.
    """

    metadata: _Table
    split: _Table
    labels: _Table
    straddling: dict[str, list[str]]

    @classmethod
    def read(cls, root: Path) -> "_Release":
        """Finds and reads the tables of whatever version there is."""
        found: dict[str, dict[str, Path]] = defaultdict(dict)
        # Unpacked tables come last and take the place of their archives.
        for file in sorted(root.iterdir(), key=lambda file: file.suffix != ".gz"):
            match = _TABLE.fullmatch(file.name)
            if match:
                found[match["kind"]][match["version"]] = file
        files = []
        for kind in ("metadata", "split", "chexpert"):
            if len(found[kind]) != 1:
                names = " and ".join(sorted(file.name for file in found[kind].values()))
                raise UserError(f"{root} holds {names}; keep one" if names else f"{root} has no "
                                f"table mimic-cxr-2.0.0-{kind}.csv or .csv.gz; download it from "
                                "MIMIC-CXR-JPG")
            files += found[kind].values()
        split = _Table.read(files[1], "dicom_id", "subject_id", "study_id", "split")
        of_patient = defaultdict(set)
        for rows in split.rows.values():
            for _, row in rows:
                of_patient[row["subject_id"]].add(row["split"])
        return cls(_Table.read(files[0], "dicom_id", "subject_id", "study_id", "ViewPosition"),
                   split, _Table.read(files[2], "study_id", "subject_id", *CHEXPERT),
                   {patient: sorted(names) for patient, names in of_patient.items()
                    if len(names) > 1})


def _check_views(metadata: _Table, views: Sequence[str]) -> None:
    there = {row["ViewPosition"] for rows in metadata.rows.values() for _, row in rows} - {""}
    unknown = [view for view in views if view not in there]
    if unknown or not views:
        asked = f"the view {unknown[0]!r}" if unknown else "no view"
        raise UserError(f"{asked} is none of {metadata.file}; choose among "
                        f"{', '.join(sorted(there))}")


def _split_name(row: Mapping[str, str]) -> str:
    if row["split"] not in _SPLITS:
        raise ValueError(f"column 'split' is {row['split'][:40]!r}, not one of "
                         f"{', '.join(_SPLITS)}")
    return _SPLITS[row["split"]]


def _positives(row: Mapping[str, str]) -> tuple[str, ...]:
    """Findings with 1; uncertain ones (-1), absent ones (0) and those not mentioned are not."""
    found = {name: tables.number(row, name) for name in CHEXPERT if row[name]}
    strange = [name for name, value in found.items() if value not in (-1, 0, 1)]
    if strange:
        raise ValueError(f"column {strange[0]!r} is {row[strange[0]][:40]!r}, not 1, 0, -1 or "
                         "empty")
    return tuple(name for name in CHEXPERT if found.get(name) == 1)
