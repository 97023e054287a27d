"""The whole demo, timed in a fresh folder: `python -m benchmarks.demo [--workdir DIR]`.

With --workdir the demo there is finished or reused, and only its figures are recorded.
"""

import argparse
import contextlib
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.record import fill, origin, read, save, table


def main() -> None:
    """Runs `brgsa demo` and records its figures, wall-clock time and peak memory."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workdir", help="a work directory of brgsa demo")
    chosen = parser.parse_args().workdir
    fresh = tempfile.TemporaryDirectory() if chosen is None else contextlib.nullcontext(chosen)
    with fresh as folder:
        workdir = Path(folder) / "demo" if chosen is None else Path(folder)
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "brgsa_jax.cli", "demo", "--workdir", str(workdir)],
                       check=True)
        seconds = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
        names = {"BrgSA": "", "CLIP": "phantom_clip", "BrgSA, untrained": "phantom_brgsa_untrained",
                 "CLIP, untrained": "phantom_clip_untrained"}
        metrics = {label: json.loads((workdir / "eval" / sub / "metrics.json").read_text())
                   for label, sub in names.items()}
        config = json.loads((workdir / "config.json").read_text())
    models = {label: {
        "macro_auroc": {mode: found["macro"]["auroc"] for mode, found in m["scores"].items()},
        "judged_by": m["score"],
        "calibration": {name: {key: entry[key] for key in ("ece", "brier", "brier_below")
                               if key in entry}
                        for name, entry in m["calibration"].items() if isinstance(entry, dict)},
        "centroid_distance": {kind: gap["distance"] for kind, gap in m["gap"].items()},
        "findings_auroc": {name: found["auroc"]["value"] for name, found in m["findings"].items()},
    } for label, m in metrics.items()}

    cost = {}
    if chosen is None:
        print(f"whole demo {seconds:.0f} s, peak memory of one process {peak:.1f} GiB")
        cost = {"seconds": seconds, "peak_gib_of_one_process": peak}
    save("demo", "python -m benchmarks.demo" + (" --workdir DIR" if chosen else ""), {
        "data": "phantom patients, not real ones", **cost, "steps": config["train"]["steps"],
        "batch_size": config["data"]["batch_size"], "protocol": metrics["BrgSA"]["protocol"],
        "counts": metrics["BrgSA"]["counts"], "models": models})
    print_table()


def print_table() -> None:
    """Prints the table of the result file and puts it into the README."""
    recorded = read("demo")

    def interval(found: dict | None) -> str:
        if found is None:
            return "–"
        return f"{found['value']:.3f} ({found['low']:.3f}–{found['high']:.3f})"

    rows = [[label, interval(m["macro_auroc"][m["judged_by"]]),
             interval(m["centroid_distance"]["direct"]),
             interval(m["centroid_distance"].get("bridged"))]
            for label, m in recorded["result"]["models"].items()]
    lines = table(["Phantom patients, not real ones", "Macro AUROC, 18 findings",
                   "Centroid distance, direct (v, t)", "bridged (v̂, t̂)"], rows)
    fill("README.md", "demo", [*lines, "", origin(recorded, "demo")])


if __name__ == "__main__":
    main()
