"""What goes into a data set from which file: phantoms, and a folder of images with a table.

A planner reads tables and folder listings, never an image, and returns a `shards.Plan`. Rows are
joined by id; row order is never used. The planners of radiographs, MIMIC-CXR, CT-RATE and
RAD-ChestCT have files of their own.
"""

import functools
import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from brgsa_jax.config import UserError
from brgsa_jax.data import tables
from brgsa_jax.data.records import SPLITS, Failure, Recipe
from brgsa_jax.data.shards import Plan
from brgsa_jax.data.summaries import read_summaries
from brgsa_jax.data.volume import CanonicalVolume, Preprocess, load_volume

_PATIENTS_PER_SPLIT = 1_000_000
_FIELD_OF_VIEW_MM = 384.0  # Of the canonical grid on each axis, 256 x 1.5 and 128 x 3.0 mm.
NO_REPORT = {"", "not given", "not given.", "nan", "none", "n/a"}
SUFFIXES = (".nii.gz", ".nii", ".npz", ".npy")
DICOM_SUFFIXES = (".dcm", ".ima", ".dicom")
_LOOKED_AT = 3  # Files of a folder that are opened to tell whether it is a DICOM series.


class Columns(NamedTuple):
    """Names of a table's columns; None where there is none."""

    id: str = "id"
    report: str = "report"
    findings: str | None = None
    patient: str | None = None
    series: str | None = None


class Listing(NamedTuple):
    """The images below a folder.

    Attributes:
        by_name: {name: paths below the folder} of every name an id may use.
        files: all paths below the folder, in order.
    """

    by_name: Mapping[str, set[str]]
    files: list[str]


def plan_phantom(seed: int, counts: Mapping[str, int], shape: tuple[int, int, int],
                 compression: str) -> tuple[Plan, Preprocess]:
    """Plans synthetic patients and the grid that holds them.

    Args:
        seed: of all patients.
        counts: {split: patients}; splits draw from disjoint ranges of numbers.
        shape: voxels (X, Y, Z) over a field of view of 384 mm on each axis.
        compression: of the shards.

    Raises:
        UserError: no patients, or too many.
    """
    from brgsa_jax.data import phantom

    for name, count in counts.items():
        if not 0 <= count <= _PATIENTS_PER_SPLIT:
            raise UserError(f"{name}={count} patients is outside 0-{_PATIENTS_PER_SPLIT:,}")
    if not sum(counts.values()):
        raise UserError("the phantom data set has no patients; give train, valid or test a number")
    shape = Preprocess(shape=shape).shape
    # Metal is drawn as a 12-bit scanner stores it.
    preprocess = Preprocess(spacing=tuple(_FIELD_OF_VIEW_MM / n for n in shape), shape=shape,
                            high=3071)
    request = {"source": "phantom", "seed": seed, **counts, "shape": list(shape),
               "compression": compression, "code": _phantom_code()}
    tasks = [PhantomTask(split, f"phantom {number}", seed, number, shape)
             for place, (split, count) in enumerate(counts.items())
             for number in range(place * _PATIENTS_PER_SPLIT, place * _PATIENTS_PER_SPLIT + count)]
    return Plan(tasks, [], [], phantom.FINDINGS, request), preprocess


def plan_folder(images: Path, table: Path, columns: Columns, split: str | Mapping[str, float],
                preprocess: Preprocess, compression: str, summaries: Path | None = None) -> Plan:
    """Joins the rows of a table to the volumes of a folder; see `builders.build_folder`.

    Raises:
        UserError: the folder or the table is unusable as a whole.
    """
    return plan_table(images, table, columns, split, preprocess, compression, source="folder",
                      find=_volumes, task=FolderTask, summaries=summaries)


def plan_table(images: Path, table: Path, columns: Columns, split: str | Mapping[str, float],
               preprocess: Recipe, compression: str, *, source: str,
               find: Callable[[Path], Listing], task: type["FolderTask"],
               summaries: Path | None = None) -> Plan:
    """Joins the rows of a table to the images of a folder, each to exactly one by its id.

    Args:
        images: the folder.
        table: the table.
        columns: names of its columns.
        split: one split, or the share of each.
        preprocess: how the images are made.
        compression: of the shards.
        source: names the kind of the data set.
        find: lists the images of a folder.
        task: what a row becomes.
        summaries: table of the findings, in place of a column; see `summaries.read_summaries`.

    Raises:
        UserError: the folder or the table is unusable as a whole.
    """
    if summaries is not None and columns.findings:
        raise UserError("findings come either from a column or from summaries; give one of them")
    shares = shares_of(split)
    rows = tables.read_table(table, columns[:2], columns[2:])
    # One for every row, or the reason why there are none.
    labels = _labels(rows, columns, summaries)
    listing = find(images)
    make = functools.partial(task, preprocess=preprocess)
    tasks, failures = _join(rows, labels, listing.by_name, images, columns, shares, make)
    named = set().union(*(listing.by_name.get(row[columns.id], ()) for row in rows))
    unlisted = [Failure("", file, "no report row in the table") for file in listing.files
                if file not in named]
    request = {"source": source, "split": shares, "compression": compression,
               "columns": list(columns[:4]), "preprocess": preprocess.as_dict()}
    if columns.series:
        request["series"] = columns.series
    findings = sorted({name for made in tasks for name in made.findings})
    return Plan(tasks, failures, unlisted, findings, request)


def shares_of(split: str | Mapping[str, float]) -> dict[str, float]:
    """Returns {split: share} in the order of `SPLITS`.

    Raises:
        UserError: an unknown split, or shares that do not sum to 1.
    """
    shares = {split: 1.0} if isinstance(split, str) else dict(split)
    unknown = [name for name in shares if name not in SPLITS]
    if unknown:
        raise UserError(f"split {unknown[0]!r} is not known; choose among {', '.join(SPLITS)}")
    if abs(sum(shares.values()) - 1) > 1e-6 or any(share < 0 for share in shares.values()):
        raise UserError(f"the shares of the splits {shares} must not be negative and sum to 1")
    return {name: float(shares[name]) for name in SPLITS if name in shares}


def split_of(patient: str, shares: Mapping[str, float]) -> str:
    """Places a patient by the hash of the id alone, so that new patients move nobody."""
    point = int.from_bytes(hashlib.sha256(patient.encode()).digest()[:8], "big") / 2**64
    for name, share in shares.items():
        if point < share:
            return name
        point -= share
    return max(shares, key=shares.get)


@dataclass(frozen=True)
class PhantomTask:
    """One synthetic patient."""

    split: str
    id: str
    seed: int
    patient: int
    shape: tuple[int, int, int]
    file: str = ""

    def stamp(self) -> list[Any]:
        """See `records.Task`."""
        return [self.seed, self.patient, self.shape]

    def make(self) -> tuple[dict[str, Any], tuple[str, ...]]:
        """See `records.Task`."""
        from brgsa_jax.data import phantom

        case = phantom.generate(self.seed, self.patient, shape=self.shape)
        record = {"id": case.id, "patient": case.patient, "report": case.report,
                  "volume": case.volume, "findings": tuple(case.findings), "boxes": case.boxes,
                  "spacing": case.spacing,
                  "provenance": {"seed": self.seed, "patient": self.patient}}
        return record, ()


@dataclass(frozen=True)
class FolderTask:
    """One image file with its report."""

    split: str
    id: str
    patient: str
    report: str
    findings: tuple[str, ...]
    file: str
    path: str
    preprocess: Preprocess
    series: str = ""

    def stamp(self) -> list[Any]:
        """See `records.Task`."""
        return [self.patient, self.report, self.findings, self.file, file_state(self.path),
                *filter(None, [self.series])]

    def make(self) -> tuple[dict[str, Any], tuple[str, ...]]:
        """See `records.Task`."""
        loaded = load_volume(self.path, self.preprocess, series=self.series or None)
        return record_of(self.id, self.patient, self.report, self.findings, loaded, self.file)


def file_state(path: str) -> list[int] | None:
    """Tells a changed file, or folder of files, from an unchanged one without reading it."""
    try:
        if os.path.isdir(path):
            with os.scandir(path) as found:
                stats = [entry.stat() for entry in found]
            return [len(stats), sum(s.st_size for s in stats),
                    max((s.st_mtime_ns for s in stats), default=0)]
        stat = os.stat(path)
        return [stat.st_size, stat.st_mtime_ns]
    except OSError:
        return None  # A broken link; reading it will tell.


def record_of(id_: str, patient: str, report: str, findings: Sequence[str],
              loaded: CanonicalVolume, file: str, **provenance: Any
              ) -> tuple[dict[str, Any], tuple[str, ...]]:
    """What `Task.make` returns for a volume read from a file; `provenance` is stored beside it."""
    record = {"id": id_, "patient": patient, "report": report, "volume": loaded.volume,
              "findings": tuple(findings), "boxes": {}, "spacing": loaded.spacing,
              "provenance": {"file": file, "spacing": loaded.source_spacing,
                             "orientation": loaded.source_orientation,
                             "warnings": loaded.warnings, **provenance}}
    return record, loaded.warnings


def _phantom_code() -> str:
    """Names the generator's code, so that what other code built is not taken for this build."""
    here = Path(__file__).parent
    files = [*sorted(here.glob("phantom*.py")), here.parent / "summarize" / "vocabulary.py"]
    return hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()[:16]


def _volumes(images: Path) -> Listing:
    """Finds the volumes below a folder.

    A file is named by its path below the folder or the last part of it, with or without extension;
    a folder of DICOM files by its path or any part of it, since exports nest patient, study and
    series.
    """
    by_name: dict[str, set[str]] = defaultdict(set)
    found = []
    for here, names in walk(images):
        files = [name for name in names if name.lower().endswith(SUFFIXES)]
        for name in files:
            found.append((here / name).as_posix())
            add_names(by_name, found[-1], SUFFIXES)
        if here.parts and not files and _is_dicom_folder(images / here, names):
            found.append(here.as_posix())
            for end in range(1, len(here.parts) + 1):
                by_name[here.parts[end - 1]].add(here.as_posix())
                by_name["/".join(here.parts[:end])].add(here.as_posix())
    if not found:
        raise UserError(f"{images} holds no volume ({', '.join(SUFFIXES)} file or DICOM folder); "
                        "check --images")
    return Listing(dict(by_name), sorted(found))


def walk(images: Path) -> Iterator[tuple[Path, list[str]]]:
    """Yields every folder below `images` and `images` itself, as path below it, with its files.

    Hidden files and folders are left out, links to folders not followed.

    Raises:
        UserError: it is no folder.
    """
    if not images.is_dir():
        raise UserError(f"{images} is not a folder; check the path")
    for folder, folders, names in os.walk(images):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield (Path(folder).relative_to(images),
               sorted(name for name in names if not name.startswith(".")))


def add_names(by_name: dict[str, set[str]], file: str, suffixes: Sequence[str]) -> None:
    """Adds the names of a file: its path or the last part of it, with or without extension."""
    for name in (file, file.rpartition("/")[2]):
        by_name[name].add(file)
        by_name[stem(name, suffixes)].add(file)


def stem(name: str, suffixes: Sequence[str]) -> str:
    """Returns a name without the first of the suffixes that it has."""
    for suffix in suffixes:
        if name.lower().endswith(suffix):
            return name[:-len(suffix)]
    return name


def _is_dicom_folder(folder: Path, names: Sequence[str]) -> bool:
    """Whether files of a folder are DICOM images: by suffix, or by the mark at byte 128."""
    names = [name for name in names if name.upper() != "DICOMDIR"]
    if any(name.lower().endswith(DICOM_SUFFIXES) for name in names):
        return True
    for name in names[:_LOOKED_AT]:
        if not (folder / name).is_file():
            continue  # Opening a pipe would wait for ever.
        try:
            with (folder / name).open("rb") as stream:
                if stream.read(132)[128:] == b"DICM":
                    return True
        except OSError:
            continue
    return False


def _labels(rows: Sequence[Mapping[str, str]], columns: Columns, summaries: Path | None
            ) -> list[tuple[str, ...] | str]:
    """The findings of every row, or the reason why there are none."""
    if summaries is not None:
        found, failed = read_summaries(summaries)
        return [found.get(row[columns.id], failed.get(
            row[columns.id], f"no row in {summaries.name}")) for row in rows]
    names = (row[columns.findings].split(";") if columns.findings else [] for row in rows)
    return [tuple(dict.fromkeys(filter(None, map(str.strip, found)))) for found in names]


def _join(rows: Sequence[Mapping[str, str]], labels: Sequence[tuple[str, ...] | str],
          by_name: Mapping[str, set[str]], images: Path, columns: Columns,
          shares: Mapping[str, float], make: Callable[..., "FolderTask"]
          ) -> tuple[list["FolderTask"], list[Failure]]:
    """Joins rows to files by id; what cannot be joined exactly once is a failure."""
    repeats = Counter(row[columns.id] for row in rows)
    series_of = {row[columns.id]: row[columns.series] if columns.series else "" for row in rows}
    claims = Counter((next(iter(by_name[id_])), series) for id_, series in series_of.items()
                     if len(by_name.get(id_, ())) == 1)
    tasks, failures, told = [], [], set()
    for number, (row, findings) in enumerate(zip(rows, labels, strict=True), start=1):
        id_, matches = row[columns.id], sorted(by_name.get(row[columns.id], ()))
        file = matches[0] if len(matches) == 1 else ""
        patient = row[columns.patient] if columns.patient else id_
        reason = ""
        if not id_:
            reason = f"row {number} of the table has no id; fill in column {columns.id!r}"
        elif repeats[id_] > 1:
            reason = f"{repeats[id_]} rows of the table have this id; keep one"
        elif not matches:
            reason = "no image file has this id as its name; check the id or add the file"
        elif len(matches) > 1:
            reason = (f"{len(matches)} files have this name ({', '.join(matches[:3])}); use the "
                      "path below the image folder as the id")
        elif (claim := claims[file, series_of[id_]]) > 1:
            reason = f"{claim} ids of the table name this file; keep one"
        elif row[columns.report].casefold() in NO_REPORT:
            reason = f"the report is empty; fill in column {columns.report!r} or drop the row"
        elif not patient:
            reason = f"the patient is empty; fill in column {columns.patient!r}"
        elif isinstance(findings, str):
            reason = findings
        if reason:
            # A repeated id is one failure, not one for each of its rows.
            if not id_ or id_ not in told:
                failures.append(Failure(id_, file, reason))
            told.add(id_)
            continue
        tasks.append(make(
            split=split_of(patient, shares), id=id_, patient=patient, report=row[columns.report],
            findings=findings, file=file, path=str(images / file), series=series_of[id_]))
    return sorted(tasks, key=lambda task: task.id), failures


