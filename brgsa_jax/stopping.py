"""SIGTERM: a platform that wants its machine back asks a command to stop, which ends with 143.

A process that is number 1 of a container does not even end by a SIGTERM it does not handle.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import NoReturn

STOPPED = 128 + signal.SIGTERM
ASKED = "asked to stop; the same command goes on from what is finished"


def end(sentence: str, code: int) -> NoReturn:
    """Ends this process at once, from any thread, whatever its main thread waits for.

    Not by an exception: raised within an import or a destructor, it would be lost or replaced.
    """
    with contextlib.suppress(OSError):
        os.write(2, f"brgsa: {sentence}\n".encode(errors="replace"))
    os._exit(code)


@contextlib.contextmanager
def on_sigterm(handle: Callable[[], None]) -> Iterator[None]:
    """Has SIGTERM call `handle`, in the main thread, for the time of the context."""

    def handler(number: int, frame: FrameType | None) -> None:
        handle()

    # Python lets only the main thread set handlers.
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def ending_on_sigterm() -> contextlib.AbstractContextManager[None]:
    """Ends the process on SIGTERM; for commands that leave whole files whenever they are killed."""
    return on_sigterm(lambda: end(ASKED, STOPPED))


class StopPoint:
    """The place in a loop at which SIGTERM has it stop, the same in all processes of a run.

    The loop calls it wherever it may stop, each process equally often; the calls are counted.
    """

    def __init__(self) -> None:
        # Its lock may be taken again by a signal handler that interrupts the thread holding it.
        self._changed = threading.Condition()
        self._calls = 0
        self._last: int | None = None
        self._held = False

    def __call__(self) -> bool:
        """Whether to stop here."""
        with self._changed:
            self._changed.wait_for(lambda: not self._held)
            self._calls += 1
            return self._last is not None and self._calls >= self._last

    def hold(self) -> int:
        """Has the next call wait; returns how many there were."""
        with self._changed:
            self._held = True
            return self._calls

    def release(self, last: int) -> None:
        """Lets calls go on up to number `last`, which returns True."""
        with self._changed:
            self._last, self._held = last, False
            self._changed.notify_all()


@contextlib.contextmanager
def stopping_on_sigterm() -> Iterator[StopPoint]:
    """Has SIGTERM stop the loop of this process, or end it at once when the loop has not begun."""
    point = StopPoint()

    def stop() -> None:
        calls = point.hold()
        if calls == 0:
            end(ASKED, STOPPED)
        point.release(calls + 1)

    with on_sigterm(stop):
        yield point
