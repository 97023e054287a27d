"""Builders: volumes and reports to a TFDS data set of array_record shards, resumable and parallel.

    build_phantom(out, train=1000, valid=100, test=200)
    build_folder(out, images=DIR, table=CSV)

The result is a proper TFDS data set (`dataset_info.json`, `features.json`, one record per volume,
`group_size:1` so that any record is read alone) plus `dataset.json` with the request, the
preprocess record and the fingerprints, `index_SPLIT.jsonl`, `failures.csv` and `warnings.csv`.

The shards are written here and not by `tfds.core.GeneratorBasedBuilder`, which starts from zero
after a kill, converts on one process and passes every volume through its shuffler's files: at
50 000 volumes of 16.8 MB each of these costs days. The training feed shuffles, so records are kept
in the order of patients (phantom) or ids (folder), which makes the result independent of the
table's rows and of the number of workers.

Resuming: each converted volume is staged in OUT/.staging and moved into its shard when the shard is
complete; a killed build continues with both. `dataset.json` is written last and marks the end.
"""

import contextlib
import csv
import fcntl
import functools
import hashlib
import json
import multiprocessing
import os
import shutil
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from brgsa_jax.config import UserError
from brgsa_jax.data import sources
from brgsa_jax.data.volume import NotACT, Preprocess, load_volume

VERSION = "1.0.0"
SPLITS = ("train", "valid", "test")
FAILURES_FILE = "failures.csv"
WARNINGS_FILE = "warnings.csv"
_SHARD_BYTES = 2 * 2**30
_PATIENTS_PER_SPLIT = 1_000_000
_FIELD_OF_VIEW_MM = 384.0  # Of the canonical grid on each axis, 256 x 1.5 and 128 x 3.0 mm.
_NO_REPORT = {"", "not given", "not given.", "nan", "none", "n/a"}
_SUFFIXES = (".nii.gz", ".nii")
_COMPRESSION = {"none": "group_size:1,uncompressed", "zstd": "group_size:1,zstd:1"}


class Failure(NamedTuple):
    """One row of failures.csv (or, with a warning as its reason, of warnings.csv)."""

    id: str
    file: str
    reason: str


@dataclass(frozen=True)
class BuildSummary:
    """What a build did.

    Attributes:
        written: records in the data set.
        failed: rows of the table without a usable volume or report, listed in failures.csv.
        out: the data set's folder.
        fingerprint: SHA-256 of the content of all splits.
        seconds: wall time of this call.
        reused: the folder already held the same build.
        unlisted: image files without a row in the table, listed in failures.csv after the failures.
        warned: warnings about written volumes, listed in warnings.csv.
        splits: {split: records}.
    """

    written: int
    failed: int
    out: Path
    fingerprint: str
    seconds: float
    reused: bool = False
    unlisted: int = 0
    warned: int = 0
    splits: Mapping[str, int] | None = None

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {count}" for name, count in (self.splits or {}).items())
        text = f"{self.out}: {self.written} volumes ({parts})"
        text += ", reused, nothing to do" if self.reused else f", {self.seconds:.1f} s"
        if self.failed:
            text += f"; {self.failed} failed, see {FAILURES_FILE}"
        if self.unlisted:
            text += f"; {self.unlisted} files without a report row, see {FAILURES_FILE}"
        if self.warned:
            text += f"; {self.warned} warnings, see {WARNINGS_FILE}"
        return text


@dataclass(frozen=True)
class _PhantomTask:
    """One synthetic patient."""

    split: str
    id: str
    seed: int
    patient: int
    shape: tuple[int, int, int]
    file: str = ""

    def stamp(self) -> list[Any]:
        return [self.seed, self.patient, self.shape]

    def make(self) -> tuple[dict[str, Any], tuple[str, ...]]:
        from brgsa_jax.data import phantom

        case = phantom.generate(self.seed, self.patient, shape=self.shape)
        record = {"id": case.id, "patient": case.patient, "report": case.report,
                  "volume": case.volume, "findings": tuple(case.findings), "boxes": case.boxes,
                  "spacing": case.spacing,
                  "provenance": {"seed": self.seed, "patient": self.patient}}
        return record, ()


@dataclass(frozen=True)
class _FolderTask:
    """One image file with its report."""

    split: str
    id: str
    patient: str
    report: str
    findings: tuple[str, ...]
    file: str
    path: str
    preprocess: Preprocess

    def stamp(self) -> list[Any]:
        try:
            stat = os.stat(self.path)
            state = [stat.st_size, stat.st_mtime_ns]
        except OSError:
            state = None  # A broken link; reading it will tell.
        return [self.patient, self.report, self.findings, self.file, state]

    def make(self) -> tuple[dict[str, Any], tuple[str, ...]]:
        loaded = load_volume(self.path, self.preprocess)
        record = {"id": self.id, "patient": self.patient, "report": self.report,
                  "volume": loaded.volume, "findings": self.findings, "boxes": {},
                  "spacing": loaded.spacing,
                  "provenance": {"file": self.file, "spacing": loaded.source_spacing,
                                 "orientation": loaded.source_orientation,
                                 "warnings": loaded.warnings}}
        return record, loaded.warnings


_Task = _PhantomTask | _FolderTask


class _Shard(NamedTuple):
    """Consecutive tasks of a split that go into one file."""

    name: str
    split: str
    tasks: tuple[_Task, ...]
    keys: tuple[str, ...]


def build_phantom(out: str | Path, *, seed: int = 0, train: int = 0, valid: int = 0, test: int = 0,
                  shape: tuple[int, int, int] = (64, 64, 32), workers: int | None = None,
                  compression: str = "none", progress: bool = True) -> BuildSummary:
    """Builds a data set of synthetic chest CTs.

    Splits draw their patients from disjoint ranges, so enlarging one leaves the others as they are.

    Args:
        out: the folder to make.
        seed: of all patients.
        train, valid, test: patients per split.
        shape: voxels (X, Y, Z) over a field of view of 384 mm on each axis.
        workers: processes; by default one for each core this process may use. Scripts that use more
            than one need the usual `if __name__ == "__main__":` guard.
        compression: "none", or "zstd" for a smaller folder that is several times slower to read.
        progress: whether to draw a progress bar on a terminal.

    Returns:
        The summary; `reused` when `out` already held this data set.

    Raises:
        UserError: no patients, or `out` holds something else.
    """
    from brgsa_jax.data import phantom

    counts = {"train": train, "valid": valid, "test": test}
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
    tasks = [_PhantomTask(split, f"phantom {number}", seed, number, shape)
             for place, (split, count) in enumerate(counts.items())
             for number in range(place * _PATIENTS_PER_SPLIT, place * _PATIENTS_PER_SPLIT + count)]
    return _build(Path(out), request, preprocess, tasks, [], [], phantom.FINDINGS, workers,
                  progress)


def build_folder(out: str | Path, *, images: str | Path, table: str | Path, id_column: str = "id",
                 report_column: str = "report", findings_column: str | None = None,
                 patient_column: str | None = None,
                 split: str | Mapping[str, float] = "train", preprocess: Preprocess | None = None,
                 workers: int | None = None, compression: str = "none",
                 progress: bool = True) -> BuildSummary:
    """Builds a data set from a folder of NIfTI files and a table of reports.

    A row belongs to the one file below `images` whose name, or path below `images`, is its id, with
    or without .nii or .nii.gz. Ids are only looked up among the files found, never made into paths.
    A row without exactly one file, without a report ("Not given." counts as none), with a repeated
    id or with a file that is no usable CT becomes a row of failures.csv and the rest goes on.
    Files without a row follow there with the reason "no report row in the table".

    Args:
        out: the folder to make.
        images: searched with all its folders; hidden files are left out, links to folders not
            followed.
        table: CSV in UTF-8 with a header row.
        id_column, report_column: names of columns.
        findings_column: column of canonical positive findings separated by ";"; empty means none.
        patient_column: column of the patient's id; by default every row is its own patient.
        split: "train", "valid" or "test" for all rows, or the share of each, e.g.
            {"train": 0.8, "valid": 0.1, "test": 0.1}. The hash of the patient decides, so a patient
            never lies in two splits and adding rows moves nobody.
        preprocess: the canonical grid; by default the reference's.
        workers: processes; by default one for each core this process may use. Scripts that use more
            than one need the usual `if __name__ == "__main__":` guard.
        compression: "none", or "zstd" for a smaller folder that is several times slower to read.
        progress: whether to draw a progress bar on a terminal.

    Returns:
        The summary; `reused` when `out` already held this data set.

    Raises:
        UserError: the folder or table is unusable as a whole, no row is usable (failures.csv then
            says why), or `out` holds something else.
    """
    images, table, preprocess = Path(images), Path(table), preprocess or Preprocess()
    shares = _shares(split)
    rows = _read_table(table, [id_column, report_column], [findings_column, patient_column])
    files = _image_files(images)
    if not files:
        raise UserError(f"{images} holds no {' or '.join(_SUFFIXES)} file; check --images")
    by_name = _files_by_name(files)
    tasks, failures = _plan_folder(rows, by_name, images, id_column, report_column, findings_column,
                                   patient_column, shares, preprocess)
    named = set().union(*(by_name.get(row[id_column], ()) for row in rows))
    unlisted = [Failure("", file, "no report row in the table") for file in files
                if file not in named]
    request = {"source": "folder", "split": shares, "compression": compression,
               "columns": [id_column, report_column, findings_column, patient_column],
               "preprocess": preprocess.as_dict()}
    findings = sorted({name for task in tasks for name in task.findings})
    return _build(Path(out), request, preprocess, tasks, failures, unlisted, findings, workers,
                  progress)


def _phantom_code() -> str:
    """Names the generator's code, so that what other code built is not taken for this build."""
    here = Path(__file__).parent
    files = [*sorted(here.glob("phantom*.py")), here.parent / "summarize" / "vocabulary.py"]
    return hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()[:16]


def _shares(split: str | Mapping[str, float]) -> dict[str, float]:
    shares = {split: 1.0} if isinstance(split, str) else dict(split)
    unknown = [name for name in shares if name not in SPLITS]
    if unknown:
        raise UserError(f"split {unknown[0]!r} is not known; choose among {', '.join(SPLITS)}")
    if abs(sum(shares.values()) - 1) > 1e-6 or any(share < 0 for share in shares.values()):
        raise UserError(f"the shares of the splits {shares} must not be negative and sum to 1")
    return {name: float(shares[name]) for name in SPLITS if name in shares}


def _split_of(patient: str, shares: Mapping[str, float]) -> str:
    point = int.from_bytes(hashlib.sha256(patient.encode()).digest()[:8], "big") / 2**64
    for name, share in shares.items():
        if point < share:
            return name
        point -= share
    return max(shares, key=shares.get)


def _read_table(table: Path, required: Sequence[str],
                optional: Sequence[str | None]) -> list[dict[str, str]]:
    """Reads a CSV as stripped cells; missing cells are empty."""
    wanted = [*required, *(name for name in optional if name)]
    csv.field_size_limit(2**24)
    try:
        with table.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.DictReader(stream)
            columns = [(name or "").strip() for name in reader.fieldnames or []]
            missing = [name for name in wanted if name not in columns]
            if missing:
                raise UserError(f"{table} has no column {', '.join(map(repr, missing))}; its "
                                f"columns are {', '.join(columns) or 'none'}")
            reader.fieldnames = columns
            rows = [{name: (row[name] or "").strip() for name in wanted} for row in reader]
    except UnicodeDecodeError as error:
        raise UserError(f"{table} is not UTF-8 ({error}); save it as CSV UTF-8") from error
    except csv.Error as error:
        raise UserError(f"{table} is no readable CSV ({error}); save it as CSV UTF-8") from error
    except OSError as error:
        raise UserError(f"the table {table} cannot be read ({error.strerror}); check the path"
                        ) from error
    if not rows:
        raise UserError(f"{table} has no rows below its header; check that it is the right file")
    return rows


def _image_files(images: Path) -> list[str]:
    """Returns the NIfTI files below a folder as sorted paths relative to it."""
    if not images.is_dir():
        raise UserError(f"{images} is not a folder; check --images")
    found = []
    for folder, folders, names in os.walk(images):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [(Path(folder) / name).relative_to(images).as_posix() for name in names
                  if name.lower().endswith(_SUFFIXES) and not name.startswith(".")]
    return sorted(found)


def _stem(name: str) -> str:
    for suffix in _SUFFIXES:
        if name.lower().endswith(suffix):
            return name[:-len(suffix)]
    return name


def _files_by_name(files: Sequence[str]) -> dict[str, set[str]]:
    """Every name an id may use for a file: its path or its last part, with or without extension."""
    by_name = defaultdict(set)
    for file in files:
        name = file.rsplit("/", 1)[-1]
        for key in (file, _stem(file), name, _stem(name)):
            by_name[key].add(file)
    return dict(by_name)


def _plan_folder(rows: Sequence[Mapping[str, str]], by_name: Mapping[str, set[str]], images: Path,
                 id_column: str, report_column: str, findings_column: str | None,
                 patient_column: str | None, shares: Mapping[str, float],
                 preprocess: Preprocess) -> tuple[list[_FolderTask], list[Failure]]:
    """Joins rows to files by id; what cannot be joined exactly once is a failure."""
    repeats = Counter(row[id_column] for row in rows)
    claims = Counter(next(iter(by_name[id_])) for id_ in repeats if len(by_name.get(id_, ())) == 1)
    tasks, failures, told = [], [], set()
    for number, row in enumerate(rows, start=1):
        id_, matches = row[id_column], sorted(by_name.get(row[id_column], ()))
        file = matches[0] if len(matches) == 1 else ""
        patient = row[patient_column] if patient_column else id_
        reason = ""
        if not id_:
            reason = f"row {number} of the table has no id; fill in column {id_column!r}"
        elif repeats[id_] > 1:
            reason = f"{repeats[id_]} rows of the table have this id; keep one"
        elif not matches:
            reason = "no image file has this id as its name; check the id or add the file"
        elif len(matches) > 1:
            reason = (f"{len(matches)} files have this name ({', '.join(matches[:3])}); use the "
                      "path below the image folder as the id")
        elif claims[file] > 1:
            reason = f"{claims[file]} ids of the table name this file; keep one"
        elif row[report_column].casefold() in _NO_REPORT:
            reason = f"the report is empty; fill in column {report_column!r} or drop the row"
        elif not patient:
            reason = f"the patient is empty; fill in column {patient_column!r}"
        if reason:
            # A repeated id is one failure, not one for each of its rows.
            if not id_ or id_ not in told:
                failures.append(Failure(id_, file, reason))
            told.add(id_)
            continue
        names = row[findings_column].split(";") if findings_column else []
        tasks.append(_FolderTask(
            split=_split_of(patient, shares), id=id_, patient=patient, report=row[report_column],
            findings=tuple(dict.fromkeys(name.strip() for name in names if name.strip())),
            file=file, path=str(images / file), preprocess=preprocess))
    return sorted(tasks, key=lambda task: task.id), failures


def _build(out: Path, request: dict[str, Any], preprocess: Preprocess, tasks: Sequence[_Task],
           failures: list[Failure], unlisted: list[Failure], findings: Sequence[str],
           workers: int | None, progress: bool) -> BuildSummary:
    """Converts the tasks, writes the shards and the files about them; see the module."""
    started = time.monotonic()
    if request["compression"] not in _COMPRESSION:
        raise UserError(f"compression {request['compression']!r} is not known; choose one of "
                        f"{', '.join(_COMPRESSION)}")
    request = {**request, "builder_version": VERSION}
    keys = [_key(task, request) for task in tasks]
    inputs = sources.chain_digests("inputs", [*keys, *(json.dumps(f) for f in failures + unlisted)])
    done = _finished(out, request, inputs)
    if done is not None:
        # Left over when a build was killed between its last file and its clean-up.
        shutil.rmtree(out / sources.STAGING, ignore_errors=True)
        return _summary(out, done, time.monotonic() - started, reused=True)

    try:
        staging = _claim(out, request)
        with _lock(staging):
            shards = _shards(tasks, keys, preprocess)
            entries = _convert(staging, shards, _COMPRESSION[request["compression"]],
                               _worker_count(workers, len(tasks)), progress)
            failures = failures + [Failure(e["id"], e["file"], e["reason"])
                                   for e in entries if "reason" in e]
            _write_rows(out / FAILURES_FILE, "reason", failures + unlisted)
            good = [entry for entry in entries if "reason" not in entry]
            if good:
                warnings = [Failure(e["id"], e["file"], warning)
                            for e in good for warning in e["warnings"]]
                _write_rows(out / WARNINGS_FILE, "warning", warnings)
                counts = {"failed": len(failures), "unlisted": len(unlisted),
                          "warned": len(warnings)}
                done = _publish(out, staging, shards, good, request, preprocess,
                                {"inputs": inputs, "findings": list(findings), **counts})
        shutil.rmtree(staging)
    except BrokenProcessPool as error:
        raise UserError("a worker process was killed, most likely for memory; run the same build "
                        "with fewer workers, it continues where it stopped") from error
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error}); mend that and run the same build "
                        "again, it continues where it stopped") from error
    if done is None:
        first = failures[0] if failures else Failure("", "", "the table has no rows")
        raise UserError(f"nothing usable: {len(failures)} failed, all listed in "
                        f"{out / FAILURES_FILE}; the first is {first.id or first.file}: "
                        f"{first.reason}")
    return _summary(out, done, time.monotonic() - started)


def _key(task: _Task, request: Mapping[str, Any]) -> str:
    """Names all that decides a record, so that staged work is reused only if nothing changed."""
    recipe = {name: value for name, value in request.items() if name not in (*SPLITS, "split")}
    text = json.dumps([recipe, task.split, task.id, task.stamp()], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _finished(out: Path, request: Mapping[str, Any], inputs: str) -> dict[str, Any] | None:
    """The record of a finished build in `out`, None if there is none; another build is an error."""
    if not (out / sources.DATASET_FILE).exists():
        return None
    done = sources.read_dataset_file(out)
    if done["request"] != _as_json(request):
        raise UserError(f"{out} holds another data set ({_difference(done['request'], request)}); "
                        "delete it or choose another folder")
    if done["inputs"] != inputs:
        raise UserError(f"the images or the table changed since {out} was built; delete it or "
                        "choose another folder")
    return done


def _claim(out: Path, request: Mapping[str, Any]) -> Path:
    """Makes or resumes OUT/.staging."""
    staging = out / sources.STAGING
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; choose a folder")
    marker = staging / "request.json"
    if marker.exists():
        begun = json.loads(marker.read_text(encoding="utf-8"))
        if begun != _as_json(request):
            raise UserError(f"{out} holds another, unfinished build "
                            f"({_difference(begun, request)}); delete it or choose another folder")
    else:
        if out.is_dir():
            strange = sorted({p.name for p in out.iterdir()}
                             - {sources.STAGING, FAILURES_FILE, WARNINGS_FILE})
            if strange:
                raise UserError(f"{out} is not empty (it holds {strange[0]}); choose another "
                                "folder")
        (staging / "records").mkdir(parents=True, exist_ok=True)
        (staging / "shards").mkdir(exist_ok=True)
        _write_json(marker, request)
    return staging


@contextlib.contextmanager
def _lock(staging: Path) -> Iterator[None]:
    """Keeps a second build out of the same folder; the kernel lets go when the process ends."""
    with (staging / "lock").open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"{staging.parent} is being built by another process; wait for it or "
                            "choose another folder") from error
        yield


def _shards(tasks: Sequence[_Task], keys: Sequence[str], preprocess: Preprocess) -> list[_Shard]:
    """Cuts each split into shards of at most 2 GiB, independent of failures and workers."""
    size = max(1, _SHARD_BYTES // (2 * int(np.prod(preprocess.shape))))
    shards = []
    for split in SPLITS:
        pairs = [pair for pair in zip(tasks, keys, strict=True) if pair[0].split == split]
        for start in range(0, len(pairs), size):
            chosen_tasks, chosen_keys = zip(*pairs[start:start + size], strict=True)
            shards.append(_Shard(f"{split}-{start // size:05d}", split, chosen_tasks, chosen_keys))
    return shards


def _worker_count(workers: int | None, tasks: int) -> int:
    if workers is not None and workers < 1:
        raise UserError(f"workers={workers} must be at least 1")
    return max(1, min(workers or len(os.sched_getaffinity(0)), tasks))


def _convert(staging: Path, shards: Sequence[_Shard], options: str, workers: int,
             progress: bool) -> list[dict[str, Any]]:
    """Makes each record and shard that staging lacks; returns the entries of all tasks in order."""
    with _pool(workers) as submit, _bar(sum(len(s.tasks) for s in shards), progress) as advance:
        running: dict[Future, str] = {}
        unmade = {}

        def settle(limit: int) -> None:
            while len(running) > limit:
                finished, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in finished:
                    name = running.pop(future)
                    future.result()
                    if name not in unmade:
                        continue
                    advance(1)
                    unmade[name][1] -= 1
                    start_shard(name)

        def start_shard(name: str) -> None:
            shard, missing = unmade[name]
            if not missing:
                del unmade[name]
                running[submit(_write_shard, staging, shard, options)] = name

        for shard in shards:
            if _shard_entries(staging, shard) is not None:
                advance(len(shard.tasks))
                continue
            staged = [_staged(staging, key) for key in shard.keys]
            unmade[shard.name] = [shard, staged.count(False)]
            advance(staged.count(True))
            start_shard(shard.name)
            for task, key, ready in zip(shard.tasks, shard.keys, staged, strict=True):
                if not ready:
                    # A short queue keeps at most one shard more than needed in staging.
                    settle(2 * workers)
                    running[submit(_make_record, staging, task, key)] = shard.name
        settle(0)
    return [entry | {"split": shard.split} for shard in shards
            for entry in _shard_entries(staging, shard)]


@contextlib.contextmanager
def _pool(workers: int) -> Iterator[Callable[..., Future]]:
    """Yields submit(function, *args): a pool of spawned processes, or for one worker this one."""
    if workers == 1:
        def run(function: Callable[..., Any], *args: Any) -> Future:
            future: Future = Future()
            future.set_result(function(*args))
            return future

        yield run
        return
    # Fork would copy the locks of whatever threads (JAX's among them) the caller has started.
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _end_with_parent,
                               (os.getpid(),))
    try:
        yield pool.submit
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _end_with_parent(parent: int) -> None:
    """Ends this worker when the build is killed; a pool's workers otherwise wait for ever."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextlib.contextmanager
def _bar(total: int, show: bool) -> Iterator[Callable[[int], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    console = Console(stderr=True)
    bar = Progress("volumes", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
                   console=console, disable=not (show and console.is_terminal))
    with bar:
        task = bar.add_task("volumes", total=total)
        yield lambda count: bar.advance(task, count)


def _staged(staging: Path, key: str) -> bool:
    return (staging / "records" / f"{key}.json").exists()


def _make_record(staging: Path, task: _Task, key: str) -> None:
    """Makes one record, or the reason why there is none, and stages it."""
    entry: dict[str, Any] = {"id": task.id, "file": task.file}
    try:
        record, warnings = task.make()
    except NotACT as error:
        entry["reason"] = error.reason
    except Exception as error:
        if not task.file:
            raise
        # One strange file must not stop a build of thousands; the reason names what happened.
        entry["reason"] = f"unexpected {type(error).__name__}: {error}"
    else:
        entry |= {"id": record["id"], "patient": record["patient"], "warnings": list(warnings),
                  "findings": list(record["findings"]), "digest": sources.record_digest(record)}
        _replace(staging / "records" / f"{key}.example", _serialize(record))
    # The entry comes last: where it exists, the record is complete.
    _write_json(staging / "records" / f"{key}.json", entry)


def _serialize(record: Mapping[str, Any]) -> bytes:
    example = {**record, "findings": list(record["findings"]),
               "boxes": json.dumps(record["boxes"], sort_keys=True, default=_plain),
               "provenance": json.dumps(record["provenance"], sort_keys=True),
               "spacing": np.asarray(record["spacing"], np.float32)}
    return _features(record["volume"].shape).serialize_example(example)


def _plain(value: Any) -> Any:
    """NumPy numbers of a box as JSON."""
    return value.item()


@functools.cache
def _features(shape: tuple[int, int, int]) -> Any:
    from tensorflow_datasets import features

    return features.FeaturesDict({
        "id": features.Text(), "patient": features.Text(), "report": features.Text(),
        # As bytes: TFDS would otherwise store every voxel as a variable-length 64-bit integer.
        "volume": features.Tensor(shape=shape, dtype=np.int16, encoding="bytes"),
        "spacing": features.Tensor(shape=(3,), dtype=np.float32),
        "findings": features.Sequence(features.Text()),
        "boxes": features.Text(), "provenance": features.Text()})


def _write_shard(staging: Path, shard: _Shard, options: str) -> None:
    """Moves the staged records of a shard into one array_record file."""
    from array_record.python import array_record_module

    records = staging / "records"
    entries = [json.loads((records / f"{key}.json").read_text(encoding="utf-8"))
               for key in shard.keys]
    target = staging / "shards" / f"{shard.name}.array_record"
    partial = target.with_suffix(".partial")
    writer = array_record_module.ArrayRecordWriter(str(partial), options)
    size = 0
    for key, entry in zip(shard.keys, entries, strict=True):
        if "reason" not in entry:
            record = (records / f"{key}.example").read_bytes()
            size += len(record)
            writer.write(record)
    writer.close()
    os.replace(partial, target)
    _write_json(staging / "shards" / f"{shard.name}.json",
                {"keys": shard.keys, "entries": entries, "bytes": size,
                 "records": sum("reason" not in entry for entry in entries)})
    for key in shard.keys:
        (records / f"{key}.example").unlink(missing_ok=True)
        (records / f"{key}.json").unlink()


def _shard_entries(staging: Path, shard: _Shard) -> list[dict[str, Any]] | None:
    """The entries of a finished shard; None if it is not finished or its inputs changed."""
    marker = _shard_marker(staging, shard)
    return marker["entries"] if marker and marker["keys"] == list(shard.keys) else None


def _shard_marker(staging: Path, shard: _Shard) -> dict[str, Any] | None:
    file = staging / "shards" / f"{shard.name}.json"
    if not file.exists() or not file.with_suffix(".array_record").exists():
        return None
    return json.loads(file.read_text(encoding="utf-8"))


def _publish(out: Path, staging: Path, shards: Sequence[_Shard], entries: Sequence[dict[str, Any]],
             request: dict[str, Any], preprocess: Preprocess,
             facts: dict[str, Any]) -> dict[str, Any]:
    """Puts the shards and their metadata into place; `dataset.json` comes last."""
    for stale in out.glob("*.array_record-*"):
        stale.unlink()
    name = request["source"]
    splits: dict[str, Any] = {}
    sizes = Counter()
    for split in SPLITS:
        rows = [entry for entry in entries if entry["split"] == split]
        if not rows:
            continue
        markers = {shard.name: _shard_marker(staging, shard) for shard in shards
                   if shard.split == split}
        filled = [shard for shard in markers if markers[shard]["records"]]
        listed = []
        for number, shard in enumerate(filled):
            file = f"{name}-{split}.array_record-{number:05d}-of-{len(filled):05d}"
            _link(staging / "shards" / f"{shard}.array_record", out / file)
            listed.append({"file": file, "records": markers[shard]["records"]})
            sizes[split] += markers[shard]["bytes"]
        splits[split] = {"shards": listed,
                         "fingerprint": sources.chain_digests(split, [r["digest"] for r in rows])}
        lines = [json.dumps({k: row[k] for k in ("id", "patient", "findings", "digest")})
                 for row in rows]
        _replace(out / sources.index_file(split), ("\n".join(lines) + "\n").encode())
    _write_tfds_metadata(out, name, splits, sizes, preprocess)
    dataset = {"format": sources.FORMAT, "name": name, "source": name, "builder_version": VERSION,
               "preprocess": preprocess.as_dict(), "request": request, **facts, "splits": splits,
               "fingerprint": sources.chain_digests("dataset",
                                                    [s["fingerprint"] for s in splits.values()])}
    _write_json(out / sources.DATASET_FILE, dataset)
    return dataset


def _write_tfds_metadata(out: Path, name: str, splits: Mapping[str, Any], sizes: Mapping[str, int],
                         preprocess: Preprocess) -> None:
    import tensorflow_datasets as tfds

    identity = tfds.core.dataset_info.DatasetIdentity(
        name=name, version=tfds.core.Version(VERSION), data_dir=str(out), module_name=__name__)
    info = tfds.core.DatasetInfo(
        builder=identity, features=_features(preprocess.shape), disable_shuffling=True,
        description="Chest CT volumes (int16 HU, frame LPS) with reports and findings.")
    info.set_file_format("array_record")
    info.set_splits(tfds.core.splits.SplitDict([
        tfds.core.splits.SplitInfo(
            name=split, num_bytes=sizes[split],
            shard_lengths=[shard["records"] for shard in record["shards"]],
            filename_template=tfds.core.ShardedFileTemplate(
                data_dir=out, dataset_name=name, split=split, filetype_suffix="array_record"))
        for split, record in splits.items()]))
    info.write_to_directory(out)


def _summary(out: Path, done: Mapping[str, Any], seconds: float,
             reused: bool = False) -> BuildSummary:
    splits = {name: sum(shard["records"] for shard in split["shards"])
              for name, split in done["splits"].items()}
    return BuildSummary(written=sum(splits.values()), failed=done["failed"], out=out,
                        fingerprint=done["fingerprint"], seconds=seconds, reused=reused,
                        unlisted=done["unlisted"], warned=done["warned"], splits=splits)


def _write_rows(file: Path, last_column: str, rows: Sequence[Failure]) -> None:
    """Writes a CSV that spreadsheets do not execute."""
    partial = file.with_name(file.name + ".partial")
    with partial.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["id", "file", last_column])
        writer.writerows([_inert(cell) for cell in row] for row in rows)
    os.replace(partial, file)


def _inert(cell: str) -> str:
    cell = " ".join(cell.split())
    return f"'{cell}" if cell[:1] in tuple("=+-@") else cell


def _link(source: Path, target: Path) -> None:
    """Links, so that staging stays whole until `dataset.json` exists; moves where links fail."""
    try:
        os.link(source, target)
    except OSError:
        os.replace(source, target)


def _replace(file: Path, content: bytes) -> None:
    """Writes a file that is either complete or not there."""
    partial = file.with_name(f"{file.name}.{os.getpid()}.partial")
    partial.write_bytes(content)
    os.replace(partial, file)


def _write_json(file: Path, value: Any) -> None:
    _replace(file, json.dumps(value, indent=1, default=asdict).encode())


def _as_json(value: Any) -> Any:
    return json.loads(json.dumps(value))


def _difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """Names the first entry in which two requests differ."""
    new = _as_json(new)
    for name in sorted({*old, *new}):
        if old.get(name) != new.get(name):
            return f"its {name} is {old.get(name)!r}, asked is {new.get(name)!r}"
    return "the same request"
