"""Result files: benchmarks/results/NAME.json with hardware, versions and date."""

import datetime
import importlib.metadata
import json
import os
import platform
import re
from collections.abc import Iterator
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("brgsa-jax", "jax", "jaxlib", "flax", "optax", "numpy")


def machine() -> dict[str, str]:
    """Processor, cores and memory, without a host name."""
    model = next((line.split(":")[1].strip() for line in
                  Path("/proc/cpuinfo").read_text().splitlines()
                  if line.startswith("model name")), platform.processor())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {"processor": model, "cores": str(len(os.sched_getaffinity(0))),
            "memory": f"{memory:.0f} GiB", "system": f"{platform.system()} {platform.machine()}"}


def save(name: str, command: str, result: dict) -> Path:
    """Writes a result file and prints where it is."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({
        "command": command, "date": datetime.date.today().isoformat(), "machine": machine(),
        "versions": {"python": platform.python_version(),
                     **dict(_versions())},
        "result": result}, indent=2) + "\n")
    print(f"result {path.relative_to(RESULTS.parents[1])}")
    return path


def _versions() -> Iterator[tuple[str, str]]:
    """Versions of what is installed; a checkout may run without being so."""
    for package in PACKAGES:
        try:
            yield package, importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue


def table(header: list[str], rows: list[list[str]]) -> list[str]:
    """Prints a Markdown table and returns its lines."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header),
             *("| " + " | ".join(row) + " |" for row in rows)]
    print("\n".join(lines))
    return lines


def fill(page: str, name: str, lines: list[str]) -> None:
    """Puts the lines of a table between the marks of its name into a page of this repository."""
    path = RESULTS.parents[1] / page
    marks = f"<!-- {name}-table -->", f"<!-- /{name}-table -->"
    filled, found = re.subn(f"{marks[0]}.*?{marks[1]}",
                            lambda _: "\n".join([marks[0], *lines, marks[1]]), path.read_text(),
                            flags=re.S)
    if not found:
        raise ValueError(f"{page} has no {marks[0]} … {marks[1]}")
    path.write_text(filled)


def read(name: str) -> dict:
    """Reads a result file."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def origin(recorded: dict, name: str) -> str:
    """One sentence: which file, when, on what."""
    machine, versions = recorded["machine"], recorded["versions"]
    return (f"File: `benchmarks/results/{name}.json` ({recorded['date']}, {machine['cores']} CPU "
            f"cores, {machine['memory']}, jax {versions['jax']}).")
