"""Result files: benchmarks/results/NAME.json with hardware, versions and date."""

import datetime
import importlib.metadata
import json
import os
import platform
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
                     **{p: importlib.metadata.version(p) for p in PACKAGES}},
        "result": result}, indent=2) + "\n")
    print(f"result {path.relative_to(RESULTS.parents[1])}")
    return path


def table(header: list[str], rows: list[list[str]]) -> None:
    """Prints a Markdown table."""
    print("| " + " | ".join(header) + " |\n|" + "---|" * len(header))
    for row in rows:
        print("| " + " | ".join(row) + " |")
