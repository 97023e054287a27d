"""The whole demo in a fresh folder, timed: `python -m benchmarks.demo`."""

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.record import save, table


def main() -> None:
    """Runs `brgsa demo` and records its figures, wall-clock time and peak memory."""
    with tempfile.TemporaryDirectory() as folder:
        workdir = Path(folder) / "demo"
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
        "centroid_distance": {kind: gap["distance"] for kind, gap in m["gap"].items()},
        "findings_auroc": {name: found["auroc"]["value"] for name, found in m["findings"].items()},
    } for label, m in metrics.items()}

    def interval(found: dict) -> str:
        return f"{found['value']:.3f} ({found['low']:.3f}–{found['high']:.3f})"

    table(["phantom patients, not real ones", "macro AUROC, 18 findings",
           "centroid distance, direct", "bridged"],
          [[label, interval(m["macro_auroc"][m["judged_by"]]),
            interval(m["centroid_distance"]["direct"]),
            interval(m["centroid_distance"]["bridged"]) if "bridged" in m["centroid_distance"]
            else "–"] for label, m in models.items()])
    print(f"whole demo {seconds:.0f} s, peak memory of one process {peak:.1f} GiB")
    save("demo", "python -m benchmarks.demo", {
        "data": "phantom patients, not real ones", "seconds": seconds,
        "peak_gib_of_one_process": peak, "steps": config["train"]["steps"],
        "batch_size": config["data"]["batch_size"], "protocol": metrics["BrgSA"]["protocol"],
        "counts": metrics["BrgSA"]["counts"], "models": models})


if __name__ == "__main__":
    main()
