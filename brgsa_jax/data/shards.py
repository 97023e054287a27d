"""From a plan to a finished data set: parallel, resumable, the same bytes however often killed.

    build(out, Plan(tasks, failures, unlisted, findings, request), preprocess)

Tasks are made in parallel, each record is staged in OUT/.staging and moved into its shard when the
shard is complete; a killed build continues with both. `dataset.json` is written last and marks the
end. A plan says what belongs into the set, `data/records.py` how it lies on disk.

The shards are written here and not by `tfds.core.GeneratorBasedBuilder`, which starts from zero
after a kill, converts on one process and passes every volume through its shuffler's files: at
50 000 volumes of 16.8 MB each of these costs days. The training feed shuffles, so records are kept
in the order of the plan, which makes the result independent of the number of workers.
"""

import contextlib
import fcntl
import hashlib
import json
import multiprocessing
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from brgsa_jax.config import UserError
from brgsa_jax.data import records, sources
from brgsa_jax.data.records import COMPRESSION, SPLITS, VERSION, Failure, Recipe, Shard, Task

FAILURES_FILE = "failures.csv"
WARNINGS_FILE = "warnings.csv"
SHARD_BYTES = 2 * 2**30


class Plan(NamedTuple):
    """What a data set will hold, before any image is read.

    Attributes:
        tasks: the records to make, in the order in which they are stored.
        failures: what was asked for and cannot be made.
        unlisted: what was found but is left out; follows the failures in failures.csv.
        findings: canonical names the set's labels may hold, in order.
        request: what the user asked for, as JSON types, with `source` and `compression`; two builds
            with the same request and the same tasks make the same data set.
    """

    tasks: Sequence[Task]
    failures: Sequence[Failure]
    unlisted: Sequence[Failure]
    findings: Sequence[str]
    request: dict[str, Any]


@dataclass(frozen=True)
class BuildSummary:
    """What a build did.

    Attributes:
        written: records in the data set.
        failed: rows of a table without a usable image or report, listed in failures.csv.
        out: the data set's folder.
        fingerprint: SHA-256 of the content of all splits.
        seconds: wall time of this call.
        reused: the folder already held the same build.
        unlisted: images left out on purpose or for lack of a row, in failures.csv as well.
        warned: warnings about written images, listed in warnings.csv.
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
        text = f"{self.out}: {self.written} images ({parts})"
        text += ", reused, nothing to do" if self.reused else f", {self.seconds:.1f} s"
        if self.failed:
            text += f"; {self.failed} failed, see {FAILURES_FILE}"
        if self.unlisted:
            text += f"; {self.unlisted} left out, see {FAILURES_FILE}"
        if self.warned:
            text += f"; {self.warned} warnings, see {WARNINGS_FILE}"
        return text


def build(out: str | Path, plan: Plan, preprocess: Recipe, *, workers: int | None = None,
          beam: Sequence[str] | None = None, progress: bool = True) -> BuildSummary:
    """Makes the records of a plan and puts them on disk; see the module.

    Args:
        out: the folder to make, or to go on with.
        plan: what belongs into the set.
        preprocess: how all images are made.
        workers: processes; by default one for each core this process may use. Scripts that use more
            than one need the usual `if __name__ == "__main__":` guard.
        beam: flags of an Apache Beam pipeline that takes the place of the processes, e.g.
            ["--runner=FlinkRunner", "--flink_master=host:8081"]; see `data/beam.py`.
        progress: whether to draw a progress bar on a terminal.

    Returns:
        The summary; `reused` when `out` already held this data set.

    Raises:
        UserError: no record could be made (failures.csv then says why), `out` holds something else
            or cannot be written.
    """
    started = time.monotonic()
    out, tasks, unlisted = Path(out), plan.tasks, list(plan.unlisted)
    if plan.request["compression"] not in COMPRESSION:
        raise UserError(f"compression {plan.request['compression']!r} is not known; choose one of "
                        f"{', '.join(COMPRESSION)}")
    request = {**plan.request, "builder_version": VERSION}
    keys = [_key(task, request) for task in tasks]
    failures = list(plan.failures)
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
            # What a killed writer left half written; nobody else is at work here.
            for partial in staging.rglob(f"*{records.PARTIAL}"):
                partial.unlink(missing_ok=True)
            options = COMPRESSION[request["compression"]]
            if beam is None:
                _convert(staging, shards, options, worker_count(workers, len(tasks)), progress)
            else:
                from brgsa_jax.data import beam as pipeline

                pipeline.convert(staging, shards, options, beam)
            entries = [entry | {"split": shard.split} for shard in shards
                       for entry in records.shard_entries(staging, shard)]
            failures += [Failure(e["id"], e["file"], e["reason"])
                         for e in entries if "reason" in e]
            records.write_rows(out / FAILURES_FILE, "reason", failures + unlisted)
            good = [entry for entry in entries if "reason" not in entry]
            if good:
                warnings = [Failure(e["id"], e["file"], warning)
                            for e in good for warning in e["warnings"]]
                records.write_rows(out / WARNINGS_FILE, "warning", warnings)
                counts = {"failed": len(failures), "unlisted": len(unlisted),
                          "warned": len(warnings)}
                facts = {"inputs": inputs, "findings": list(plan.findings), **counts}
                done = records.publish(out, staging, shards, good, request, preprocess, facts)
        shutil.rmtree(staging)
    except BrokenProcessPool as error:
        raise UserError("a worker process was killed, most likely for memory; run the same build "
                        "with fewer workers, it continues where it stopped") from error
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error}); mend that and run the same build "
                        "again, it continues where it stopped") from error
    if done is None:
        first = failures[0] if failures else Failure("", "", "there is no image")
        raise UserError(f"nothing usable: {len(failures)} failed, all listed in "
                        f"{out / FAILURES_FILE}; the first is {first.id or first.file}: "
                        f"{first.reason}")
    return _summary(out, done, time.monotonic() - started)


def _key(task: Task, request: Mapping[str, Any]) -> str:
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
        records.write_json(marker, request)
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


def _shards(tasks: Sequence[Task], keys: Sequence[str], preprocess: Recipe) -> list[Shard]:
    """Cuts each split into shards of at most 2 GiB, independent of failures and workers."""
    dtype = sources.dtype_of(preprocess.as_dict())
    size = max(1, SHARD_BYTES // (dtype.itemsize * int(np.prod(preprocess.shape))))
    shards = []
    for split in SPLITS:
        pairs = [pair for pair in zip(tasks, keys, strict=True) if pair[0].split == split]
        for start in range(0, len(pairs), size):
            chosen_tasks, chosen_keys = zip(*pairs[start:start + size], strict=True)
            shards.append(Shard(f"{split}-{start // size:05d}", split, chosen_tasks, chosen_keys))
    return shards


def worker_count(workers: int | None, tasks: int) -> int:
    """The number of processes: what is asked for, by default the cores, at most one a task.

    Raises:
        UserError: less than one is asked for.
    """
    if workers is not None and workers < 1:
        raise UserError(f"workers={workers} must be at least 1")
    return max(1, min(workers or len(os.sched_getaffinity(0)), tasks))


def _convert(staging: Path, shards: Sequence[Shard], options: str, workers: int,
             progress: bool) -> None:
    """Makes each record and shard that staging lacks."""
    with pool(workers) as submit, _bar(sum(len(s.tasks) for s in shards), progress) as advance:
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
                running[submit(records.write_shard, staging, shard, options)] = name

        for shard in shards:
            if records.shard_entries(staging, shard) is not None:
                advance(len(shard.tasks))
                continue
            staged = [records.is_staged(staging, key) for key in shard.keys]
            unmade[shard.name] = [shard, staged.count(False)]
            advance(staged.count(True))
            start_shard(shard.name)
            for task, key, ready in zip(shard.tasks, shard.keys, staged, strict=True):
                if not ready:
                    # A short queue keeps at most one shard more than needed in staging.
                    settle(2 * workers)
                    running[submit(records.make_record, staging, task, key)] = shard.name
        settle(0)


@contextlib.contextmanager
def pool(workers: int) -> Iterator[Callable[..., Future]]:
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
            time.sleep(0.2)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextlib.contextmanager
def _bar(total: int, show: bool) -> Iterator[Callable[[int], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    console = Console(stderr=True)
    bar = Progress("images", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
                   console=console, disable=not (show and console.is_terminal))
    with bar:
        task = bar.add_task("images", total=total)
        yield lambda count: bar.advance(task, count)


def _summary(out: Path, done: Mapping[str, Any], seconds: float,
             reused: bool = False) -> BuildSummary:
    splits = {name: sum(shard["records"] for shard in split["shards"])
              for name, split in done["splits"].items()}
    return BuildSummary(written=sum(splits.values()), failed=done["failed"], out=out,
                        fingerprint=done["fingerprint"], seconds=seconds, reused=reused,
                        unlisted=done["unlisted"], warned=done["warned"], splits=splits)


def _as_json(value: Any) -> Any:
    return json.loads(json.dumps(value))


def _difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """Names the first entry in which two requests differ."""
    new = _as_json(new)
    for name in sorted({*old, *new}):
        if old.get(name) != new.get(name):
            return f"its {name} is {old.get(name)!r}, asked is {new.get(name)!r}"
    return "the same request"
