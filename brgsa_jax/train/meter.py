"""What a run tells: metrics.jsonl, the progress bar, where the time went."""

import json
import math
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

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


class MetricsFile:
    """Appends one JSON object per line; opened for a resume it forgets what came later."""

    def __init__(self, path: str | Path, *, resume_step: int) -> None:
        self.path = Path(path)
        kept = [row for row in read_metrics(self.path) if row["step"] <= resume_step]
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


class Meter:
    """Counts steps and shows them; metric values are fetched one log interval late.

    Fetching a value waits for its step. By the time the next interval is logged the earlier
    step is done, so the device never waits for the host.
    """

    def __init__(self, *, metrics: MetricsFile | None, console: Console, title: str, start: int,
                 steps: int, batch_size: int, log_every: int) -> None:
        self._metrics = metrics
        self._console = console
        self._batch_size = batch_size
        self._log_every = log_every
        self._pending: tuple[int, Any, float] | None = None
        self._last = (start, time.perf_counter())
        self._start = start
        self._printed = time.perf_counter()
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

    def step(self, step: int, values: Any) -> None:
        """Notes that `step` updates are done, the last with these (device) values."""
        self._progress.update(self._task, completed=step)
        if step % self._log_every == 0 or step == self._steps:
            self.flush()
            self._pending = (step, values, time.perf_counter())

    def flush(self) -> None:
        """Writes the values that wait."""
        if self._pending is None:
            return
        step, values, when = self._pending
        self._pending = None
        row = {name: float(value) for name, value in values.items()}
        for name, what in (("loss", "loss"), ("grad_norm", "norm of the gradient")):
            if not math.isfinite(row[name]):
                raise UserError(f"the {what} is {row[name]} at step {step}; lower "
                                "optim.learning_rate, or train in float32 with "
                                "model.dtype=float32")
        done, since = self._last
        self._last = (step, when)
        seconds = (when - since) / max(step - done, 1)
        if self._metrics is not None:
            self._metrics.write({"step": step, **row, "seconds_per_step": seconds,
                                 "samples_per_second": self._batch_size / seconds})
        rate = f"{seconds * 1e3:.0f} ms/step  {self._batch_size / seconds:.0f} samples/s"
        terms = "  ".join(f"{name} {row[name]:.3f}" for name in _shown(row))
        self._progress.update(self._task, rate=rate, terms=terms)
        now = time.perf_counter()
        if not self._console.is_terminal and (now - self._printed > 15 or step == self._steps):
            self._printed = now
            left = (self._steps - step) * seconds
            self._console.print(f"{self._title}  step {step}/{self._steps}  {rate}  "
                                f"left {left:.0f} s  {terms}", highlight=False, soft_wrap=True)


def _shown(row: dict[str, float]) -> Iterable[str]:
    """Names of the terms: not the diagnostics, "batch/…" and "bank/…", which only the file has."""
    hidden = ("grad_norm", "learning_rate")
    return (name for name in row if name not in hidden and "/" not in name)


class Ledger:
    """Where the wall-clock time of a run went, in seconds by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def time(self, name: str) -> "_Span":
        """Context manager that adds its duration to `name`."""
        return _Span(self, name)


class _Span:
    def __init__(self, ledger: Ledger, name: str) -> None:
        self._ledger, self._name = ledger, name

    def __enter__(self) -> None:
        self._since = time.perf_counter()

    def __exit__(self, *_: Any) -> None:
        spent = time.perf_counter() - self._since
        self._ledger.seconds[self._name] = self._ledger.seconds.get(self._name, 0.0) + spent
