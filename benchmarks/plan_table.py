"""Plans of the BrgSA recipe on TPU slices and GPUs: `python -m benchmarks.plan_table`.

Eight rows a device, negatives on a ring. Every plan is a process of its own, as a user starts it;
its time and peak memory are measured.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.record import fill, origin, read, save, table

# Topology -> devices.
TPUS = {"v5e:4x4": 16, "v5e:16x16": 256, "v6e:4x4": 16, "v6e:16x16": 256, "v5p:8x8x8": 512}
GPUS = {"h200:8": 8, "h100:8": 8, "a100:8": 8}
ROWS = 8
RING = "--config.losses.knowledge_interaction.negatives=ring"
GIB = 2**30


def main() -> None:
    """Plans, writes the result file and the tables of README and documentation."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--show", action="store_true", help="only the tables, from the result file")
    if not parser.parse_args().show:
        plans = {name: plan(name, count) for name, count in {**TPUS, **GPUS}.items()}
        save("plan", "python -m benchmarks.plan_table", {
            "config": "brgsa", "rows_a_device": ROWS, "negatives": "ring", "plans": plans})
    show()


def plan(topology: str, devices: int) -> dict:
    """Runs `brgsa plan`; its JSON, exit code, seconds and peak memory."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "plan.json"
        start = time.perf_counter()
        child = subprocess.Popen(
            [sys.executable, "-m", "brgsa_jax.cli", "plan", "--config", "brgsa", "--topology",
             topology, "--batch", str(ROWS * devices), "--json", str(path), RING])
        _, status, usage = os.wait4(child.pid, 0)
        seconds = time.perf_counter() - start
        child.returncode = os.waitstatus_to_exitcode(status)
        return {**json.loads(path.read_text()), "exit_code": child.returncode,
                "process_seconds": seconds, "process_cpu_seconds": usage.ru_utime + usage.ru_stime,
                "process_peak_gib": usage.ru_maxrss / 2**20}


def show() -> None:
    """Fills the tables from the result file."""
    recorded = read("plan")
    rows = []
    for name, found in recorded["result"]["plans"].items():
        memory, step = found["memory"], found["step_seconds"]
        at = {scale["devices"]: scale for scale in found["scaling"]}
        loss = found["loss_memory"]
        rows.append([
            name, str(found["batch"]),
            f"{memory['peak'] / GIB:.2f} of {memory['usable'] / GIB:.2f}",
            "–" if loss is None else f"{loss / 2**20:.2f}",
            f"{step['total'] * 1e3:.0f}", f"{step['communication'] / step['total']:.1%}",
            f"{at[1024]['constant_rows']:.0%}", str(found["largest_batch"]),
            "formulas" if not found["compiled"] else
            f"compiled in {found['process_seconds']:.0f} s, {found['process_peak_gib']:.1f} GiB"])
    lines = table(["BrgSA, ViT-B, 8 rows a device", "global batch", "GiB a device",
                   "losses alone, MiB", "step, ms (estimate)", "communication",
                   "efficiency 8 → 1 024", "largest batch (estimate)", "planned by"], rows)
    fill("docs/plan.md", "plan", [*lines, "", origin(recorded, "plan")])


if __name__ == "__main__":
    main()
