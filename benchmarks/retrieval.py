"""Retrieval of 50 000 reports among 50 000 volumes on two cores: `python -m benchmarks.retrieval`.

Each direction runs in a process of its own, whose largest resident memory is reported. Embeddings
are random: the work does not depend on what they hold.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time

from benchmarks.record import fill, origin, read, save, table

ROWS, WIDTH, LABELS = 50_000, 512, 18


def measure(direction: str, rows: int, width: int) -> dict:
    """Seconds, seconds of processor time and GiB of one direction in this process."""
    import numpy as np

    from brgsa_jax.evals.retrieval import retrieve

    rng = np.random.default_rng(0)
    text = rng.standard_normal((rows, width), np.float32)
    image = text + 20 * rng.standard_normal((rows, width), np.float32)
    # Two volumes a patient; of a caption there are two on average.
    patients, captions = np.arange(rows) // 2, rng.integers(rows // 2, size=rows)
    labels = rng.random((rows, LABELS)) < 0.19
    sides = {"report_to_volume": (text, image), "volume_to_report": (image, text),
             "volume_to_volume": (image, image)}[direction]
    exclude = (patients, patients) if direction == "volume_to_volume" else None
    start, cpu = time.perf_counter(), time.process_time()
    found = retrieve(*sides, [(captions, captions)], exclude=exclude, labels=(labels, labels),
                     patients=patients)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"seconds": seconds, "cpu_seconds": cpu, "peak_gib": peak,
            "recall_at_10": found.recall[10].found.value,
            "recall_at_10_chance": found.recall[10].chance}


def main() -> None:
    """Measures the three directions, prints a table, writes the result file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--width", type=int, default=WIDTH)
    parser.add_argument("--only", help="measure this direction here and print it")
    options = parser.parse_args()
    if options.only:
        print(json.dumps(measure(options.only, options.rows, options.width)))
        return
    cores = sorted(os.sched_getaffinity(0))[:2]
    os.sched_setaffinity(0, set(cores))
    results = {}
    for direction in ("report_to_volume", "volume_to_report", "volume_to_volume"):
        run = subprocess.run([sys.executable, "-m", "benchmarks.retrieval", "--only", direction,
                              "--rows", str(options.rows), "--width", str(options.width)],
                             check=True, capture_output=True, text=True)
        results[direction] = json.loads(run.stdout)
    count = f"{options.rows:,}".replace(",", " ")
    lines = table([f"{count} queries, {count} items", "seconds", "CPU-seconds", "peak memory"],
                  [[f"`{name}`", f"{row['seconds']:.0f}", f"{row['cpu_seconds']:.0f}",
                    f"{row['peak_gib']:.2f} GiB"]
                   for name, row in results.items()])
    save("retrieval", "python -m benchmarks.retrieval",
         {"queries": options.rows, "gallery": options.rows, "width": options.width,
          "labels": LABELS, "cores": len(cores), "directions": results})
    fill("docs/evaluation.md", "retrieval", [*lines, "", origin(read("retrieval"), "retrieval")])


if __name__ == "__main__":
    main()
