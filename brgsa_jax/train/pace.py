"""How far the host runs ahead of the devices, when they waited for it, and a look at both."""

import collections
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import jax

from brgsa_jax.train.ledger import Ledger


class Pace:
    """Keeps the host one step ahead of the devices, and knows when each step was finished.

    One step ahead they never wait for a dispatch; further ahead, batches would fill their memory.
    """

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._watcher = ThreadPoolExecutor(1, "pace")
        self._running: collections.deque[Future[float]] = collections.deque()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self._watcher.shutdown(wait=False, cancel_futures=True)

    def started(self, value: jax.Array) -> Future[float]:
        """Notes that a step was dispatched.

        Args:
            value: one of its results.

        Returns:
            The `time.perf_counter` at which it will be finished.
        """
        finished = self._watcher.submit(_finish, value)
        self._running.append(finished)
        return finished

    def next(self, batches: Iterator[Any]) -> Any:
        """Takes the next batch, once at most one step is still to be finished.

        Of the wait for it only what the devices had nothing to do is charged to "data_wait".
        """
        self._wait(1)
        since = time.perf_counter()
        batch = next(batches)
        if all(step.done() for step in self._running):
            idle_since = max([since, *(step.result() for step in self._running)])
            self._ledger.move(time.perf_counter() - idle_since, "data_wait")
        return batch

    def drain(self) -> None:
        """Waits until the devices have finished what was dispatched."""
        self._wait(0)

    def _wait(self, most: int) -> None:
        while len(self._running) > most:
            self._running.popleft().result()


def _finish(value: jax.Array) -> float:
    value.block_until_ready()
    return time.perf_counter()


class Trace:
    """Writes a profile of the steps of `train.profile` below WORKDIR/profile.

    As a context it ends a trace that a preemption or an error cuts short.
    """

    def __init__(self, window: Sequence[int], workdir: str | Path, *, pace: Pace,
                 ledger: Ledger) -> None:
        """Prepares it.

        Args:
            window: first and last step; () for none.
            workdir: the work directory.
            pace: of the loop.
            ledger: is charged for starting the trace and for writing it.
        """
        self._steps = range(window[0], window[1] + 1) if window else ()
        self.folder = Path(workdir) / "profile"
        self._pace, self._ledger = pace, ledger
        self._running = False

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Surrounds the dispatch of one step, and its `Pace.started`."""
        if number not in self._steps:
            yield
            return
        if not self._running:
            self._start()
        with jax.profiler.StepTraceAnnotation("train", step_num=number):
            yield
        if number == self._steps[-1]:
            self._stop()

    def _start(self) -> None:
        self._pace.drain()
        with self._ledger.time("profile"):
            options = jax.profiler.ProfileOptions()
            # Every Python call as an event would slow the host down tenfold.
            options.python_tracer_level = 0
            jax.profiler.start_trace(self.folder, profiler_options=options)
            self._running = True

    def _stop(self) -> None:
        self._pace.drain()
        with self._ledger.time("profile"):
            self._running = False
            jax.profiler.stop_trace()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
