"""Where the wall-clock time of a run went, over all its restarts.

A run is started, killed and started again. WORKDIR/ledger.json holds the seconds since its first
start by what they were spent on, and goodput, the share of them that made steps which still count.
"""

import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

FILE = "ledger.json"
NAMES = ("setup", "compile", "step", "data_wait", "validation", "checkpoint", "profile", "export",
         "lost", "downtime")
# What is done again when it was done after the checkpoint a run goes on from.
REPEATED = ("step", "data_wait", "validation")
# At least so many seconds between writes, and more where writing takes a larger share of them.
BEAT = 1.0
SHARE = 0.005


class Ledger:
    """Charges all time since it was made to one activity after the other; "setup" is the first.

    As a context it writes the file however its body ends. Without `open` it writes nothing.
    """

    def __init__(self) -> None:
        self._seconds = dict.fromkeys(NAMES, 0.0)
        self._before: Mapping[str, float] = dict.fromkeys(NAMES, 0.0)
        self._starts = 1
        self.path: Path | None = None
        self._activity = NAMES[0]
        self._born = time.time()
        self._since = self._next = time.perf_counter()

    def open(self, workdir: str | Path, *, mark: Mapping[str, float] | None) -> bool:
        """Goes on with what earlier starts of the run have written, and writes from now on.

        Args:
            workdir: the work directory.
            mark: what `total` was when the checkpoint that this start goes on from was saved: what
                came after it is lost. {} without a checkpoint, None where it is not known.

        Returns:
            False when there is a file that cannot be read; it is replaced.
        """
        self.path = Path(workdir) / FILE
        readable = True
        if self.path.exists():
            try:
                kept = read_ledger(self.path)
            except (OSError, ValueError, TypeError, KeyError):
                readable = False
            else:
                self._go_on(kept, kept["seconds"] if mark is None else mark)
        self.save()
        return readable

    def _go_on(self, kept: Mapping[str, Any], mark: Mapping[str, float]) -> None:
        before = dict(kept["seconds"])
        for name in REPEATED:
            valid = min(before[name], mark.get(name, 0.0))
            before["lost"] += before[name] - valid
            before[name] = valid
        before["downtime"] += max(self._born - kept["until"], 0.0)
        self._before, self._starts = before, kept["starts"] + 1

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds since this start by name."""
        self._charge()
        return dict(self._seconds)

    @property
    def total(self) -> dict[str, float]:
        """Seconds since the first start by name; together the wall-clock time."""
        return {name: round(self._before[name] + spent, 3) for name, spent in self.seconds.items()}

    @contextmanager
    def time(self, name: str) -> Iterator[None]:
        """Charges the time inside to `name`, one of `NAMES`, and not to what is around it."""
        outer = self._activity
        self._charge()
        self._activity = name
        try:
            yield
        finally:
            self._charge()
            self._activity = outer

    def move(self, seconds: float, name: str) -> None:
        """Charges `seconds` of the time just passed to `name`, not to the present activity."""
        self._charge()
        self._seconds[self._activity] -= seconds
        self._seconds[name] += seconds

    def _charge(self) -> None:
        now = time.perf_counter()
        self._seconds[self._activity] += now - self._since
        self._since = now

    def beat(self) -> None:
        """Writes the file when that was not done for a while; to be called often."""
        if time.perf_counter() > self._next:
            self.save()

    def save(self) -> None:
        """Writes the file."""
        if self.path is None:
            return
        begin = time.perf_counter()
        total = self.total
        partial = self.path.with_suffix(".tmp")
        partial.write_text(json.dumps({
            "goodput": goodput(total), "wall_seconds": round(sum(total.values()), 3),
            "starts": self._starts, "until": time.time(), "seconds": total}, indent=2) + "\n")
        os.replace(partial, self.path)
        end = time.perf_counter()
        self._next = end + max((end - begin) / SHARE, BEAT)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self.save()

    def line(self) -> str:
        """One line for people; times below half a second are left out."""
        total = self.total
        parts = ", ".join(f"{name.replace('_', ' ')} {spent:.0f} s"
                          for name, spent in total.items() if spent >= 0.5)
        starts = f" over {self._starts} starts" if self._starts > 1 else ""
        return (f"goodput {goodput(total):.1%} of {sum(total.values()):.0f} s{starts}"
                f"{': ' if parts else ''}{parts}")


def goodput(seconds: Mapping[str, float]) -> float:
    """Share of steps that still count in all wall-clock time."""
    return round(seconds["step"] / max(sum(seconds.values()), 1e-9), 4)


def read_ledger(path: str | Path) -> dict[str, Any]:
    """Reads a ledger.json.

    Returns:
        `seconds` by name since the first start, their sum `wall_seconds`, `goodput`, `starts`, and
        `until`, the time of the last write in seconds since 1970.

    Raises:
        OSError, ValueError, TypeError, KeyError: it is no such file.
    """
    found = json.loads(Path(path).read_text())
    seconds = dict(found["seconds"])
    return {**found, "until": float(found["until"]), "starts": int(found["starts"]),
            "seconds": {name: float(seconds.get(name, 0.0)) for name in NAMES}}
