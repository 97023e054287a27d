"""`brgsa metrics` at the size of a benchmark: `python -m benchmarks.metrics`.

Made-up scores of 3 000 volumes of 1 300 patients and 18 findings, 5 000 resamples, as a process
from its start to its end: plain, and with a comparison and calibration.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.record import fill, origin, read, save, table
from brgsa_jax.evals.bootstrap import rank_samples
from brgsa_jax.evals.scores import write_labels, write_scores

VOLUMES, PATIENTS, FINDINGS, RESAMPLES = 3000, 1300, 18, 5000


def main() -> None:
    """Runs the command three times each way and keeps the medians."""
    rng = np.random.default_rng(0)
    labels = rng.random((VOLUMES, FINDINGS)) < np.geomspace(0.03, 0.5, FINDINGS)
    scores = rng.normal(size=labels.shape) + 1.1 * labels
    ids, names = ([f"{what}{i}" for i in range(count)]
                  for what, count in (("v", VOLUMES), ("finding ", FINDINGS)))
    patients = [f"p{i}" for i in rng.integers(PATIENTS, size=VOLUMES)]
    start = time.perf_counter()
    rank_samples(labels, scores, patients, resamples=RESAMPLES)
    runs = {"resampling alone": {"seconds": time.perf_counter() - start}}
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        write_scores(place / "a.csv", ids, names, scores)
        write_scores(place / "b.csv", ids, names, scores + rng.normal(size=scores.shape))
        write_labels(place / "l.csv", ids, names, labels, patients)
        command = [sys.executable, "-m", "brgsa_jax.cli", "metrics", "--scores", place / "a.csv",
                   "--labels", place / "l.csv", "--patients", "patient", "--resamples",
                   str(RESAMPLES), "--out", place / "out"]
        for name, more in (("brgsa metrics", []), ("with --compare and --calibrate",
                                                   ["--calibrate", "--compare", place / "b.csv"])):
            runs[name] = measured([*command, *more])
    save("metrics", "python -m benchmarks.metrics", {
        "what": "brgsa metrics as a process, made-up scores; medians of three",
        "volumes": VOLUMES, "patients": PATIENTS, "findings": FINDINGS, "resamples": RESAMPLES,
        "runs": runs})
    print_table()


def measured(command: list) -> dict[str, float]:
    """Median seconds and peak memory of three runs of a command."""
    rows = []
    for _ in range(3):
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            raise RuntimeError(f"{command} failed")
        rows.append((time.perf_counter() - start, usage.ru_utime + usage.ru_stime,
                     usage.ru_maxrss / 2**20))
    seconds, processor, memory = np.median(rows, axis=0)
    return {"seconds": float(seconds), "cpu_seconds": float(processor),
            "peak_gib": float(memory)}


def print_table() -> None:
    """Prints the table of the result file and puts it into the documentation."""
    recorded = read("metrics")
    rows = [[name, f"{m['seconds']:.1f} s", f"{m['peak_gib']:.2f} GiB" if "peak_gib" in m else "–"]
            for name, m in recorded["result"]["runs"].items()]
    lines = table(["3 000 volumes × 18 findings, 5 000 resamples", "Time", "Peak memory"], rows)
    fill("docs/evaluation.md", "metrics", [*lines, "", origin(recorded, "metrics")])


if __name__ == "__main__":
    main()
