"""What a run tells while it trains: metrics.jsonl and the progress bar."""

import json
import math
import os
import time
from collections.abc import Iterable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple

import jax
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from brgsa_jax.config import UserError
from brgsa_jax.train.ledger import Ledger


class MetricsFile:
    """Appends one JSON object per line; opened for a resume it forgets what came later."""

    def __init__(self, path: str | Path, *, resume_step: int) -> None:
        self.path = Path(path)
        # The validation of the step is repeated.
        kept = [row for row in read_metrics(self.path)
                if row["step"] + ("validation_loss" in row) <= resume_step]
        partial = self.path.with_suffix(".tmp")
        partial.write_text("".join(json.dumps(row) + "\n" for row in kept))
        os.replace(partial, self.path)
        self._file = self.path.open("a")

    def write(self, row: dict[str, Any]) -> None:
        """Writes one row and flushes it."""
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Reads metrics.jsonl; a last line cut off by a kill is left out; [] without a file."""
    rows = []
    path = Path(path)
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


class Work(NamedTuple):
    """The arithmetic of one train step, and what its devices could do.

    Attributes:
        samples: rows of the global batch.
        flops: model FLOPs, `brgsa_jax.flops.step`; NaN where there is no formula.
        peak: dense bfloat16 FLOP/s of all devices together; None for unlisted ones.
    """

    samples: int
    flops: float
    peak: float | None

    def utilisation(self, seconds: float) -> float | None:
        """Model FLOPs utilisation of a step that takes so long; None where it is not known."""
        share = self.flops / seconds / self.peak if self.peak else math.nan
        return share if math.isfinite(share) else None


class _Logged(NamedTuple):
    """A step whose values are still to be written.

    `spent` is the ledger's, at the time the step was dispatched.
    """

    step: int
    values: Any
    finished: Future[float]
    spent: dict[str, float]


class Meter:
    """Counts steps and shows them; metric values are fetched one log interval late.

    Fetching a value waits for its step. By the time the next interval is logged the earlier
    step is done, so the device never waits for the host.
    """

    def __init__(self, *, metrics: MetricsFile | None, console: Console, title: str, start: int,
                 steps: int, log_every: int, work: Work, ledger: Ledger) -> None:
        self._metrics = metrics
        self._console = console
        self._log_every = log_every
        self._work, self._ledger = work, ledger
        self._pending: _Logged | None = None
        self._last = (start, time.perf_counter(), ledger.seconds)
        self._shown = self._printed = time.perf_counter()
        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(bar_width=20), MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"), TimeElapsedColumn(), TextColumn("left"),
            TimeRemainingColumn(), TextColumn("{task.fields[terms]}"), console=console,
            disable=not console.is_terminal, refresh_per_second=4)
        self._task = self._progress.add_task(title, total=steps, completed=start, rate="",
                                             terms="compiling …")
        self._title, self._steps = title, steps

    def __enter__(self) -> "Meter":
        self._progress.start()
        return self

    def __exit__(self, error: Any, *_: Any) -> None:
        try:
            if error is None:
                self.flush()
        finally:
            self._progress.stop()

    def step(self, step: int, values: Any, finished: Future[float]) -> None:
        """Notes that `step` updates are dispatched.

        Args:
            step: how many.
            values: of the last, on the devices.
            finished: of the last, from `Pace.started`.
        """
        now = time.perf_counter()
        if now - self._shown > 0.25:
            self._shown = now
            self._progress.update(self._task, completed=step)
        if step % self._log_every == 0 or step == self._steps:
            self.flush()
            self._pending = _Logged(step, values, finished, self._ledger.seconds)

    def flush(self) -> None:
        """Writes the values that wait."""
        if self._pending is None:
            return
        step, values, finished, spent = self._pending
        self._pending = None
        row = {name: float(value) for name, value in jax.device_get(values).items()}
        for name, what in (("loss", "loss"), ("grad_norm", "norm of the gradient")):
            if not math.isfinite(row[name]):
                raise UserError(f"the {what} is {row[name]} at step {step}; lower "
                                "optim.learning_rate, or train in float32 with "
                                "model.dtype=float32")
        done, since, before = self._last
        self._last = (step, finished.result(), spent)
        passed = {name: spent[name] - before[name] for name in spent}
        waited = passed.pop("data_wait")
        del passed["step"]
        # What else the loop did in the meantime, as validations, did not run beside the steps.
        took = max(finished.result() - since - sum(passed.values()), 1e-9)
        speed = self._speed(took / max(step - done, 1), min(waited / took, 1.0))
        if self._metrics is not None:
            self._metrics.write({"step": step, **row, **speed})
        rate = _rate(speed)
        terms = "  ".join(f"{name} {row[name]:.3f}" for name in _shown(row))
        self._progress.update(self._task, completed=step, rate=rate, terms=terms)
        now = time.perf_counter()
        if not self._console.is_terminal and (now - self._printed > 15 or step == self._steps):
            self._printed = now
            left = (self._steps - step) * speed["seconds_per_step"]
            self._console.print(f"{self._title}  step {step}/{self._steps}  {rate}  "
                                f"left {left:.0f} s  {terms}", highlight=False, soft_wrap=True)

    def _speed(self, seconds: float, waited: float) -> dict[str, float]:
        """The columns of `SPEED` that are known."""
        found = {"seconds_per_step": seconds, "samples_per_second": self._work.samples / seconds,
                 "data_wait_share": waited, "mfu": self._work.utilisation(seconds), **_memory()}
        return {name: value for name, value in found.items() if value is not None}


# Columns of metrics.jsonl that differ between two runs of the same numbers.
SPEED = ("seconds_per_step", "samples_per_second", "data_wait_share", "mfu", "memory_bytes",
         "memory_peak_bytes")


def _memory() -> dict[str, int]:
    """Bytes in use, now and at most, on the fullest device of this process that tells."""
    told = [stats for device in jax.local_devices() if (stats := device.memory_stats())]
    return {name: max(stats[key] for stats in told) for name, key in (
        ("memory_bytes", "bytes_in_use"), ("memory_peak_bytes", "peak_bytes_in_use"))
        if told and all(key in stats for stats in told)}


def _rate(speed: dict[str, float]) -> str:
    """The columns of `SPEED` for people."""
    parts = [f"{speed['seconds_per_step'] * 1e3:.0f} ms/step",
             f"{speed['samples_per_second']:.0f} samples/s"]
    if "mfu" in speed:
        parts.append(f"MFU {speed['mfu']:.1%}")
    parts.append(f"data wait {speed['data_wait_share']:.0%}")
    if "memory_peak_bytes" in speed:
        parts.append(f"memory {speed['memory_bytes'] / 2**30:.1f} GiB, "
                     f"peak {speed['memory_peak_bytes'] / 2**30:.1f}")
    return "  ".join(parts)


def _shown(row: dict[str, float]) -> Iterable[str]:
    """Names of the terms: not the diagnostics, "batch/…" and "bank/…", which only the file has."""
    hidden = ("grad_norm", "learning_rate")
    return (name for name in row if name not in hidden and "/" not in name)
