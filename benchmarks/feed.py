"""Speed of the feed on records of real size, beside nibabel: `python -m benchmarks.feed`.

256 × 256 × 128 int16 phantom volumes in the page cache, random crops of 224 × 224 × 112. The median
of five measures of 64 batches each, the feed and nibabel in turn in one process.
"""

import tempfile
from pathlib import Path

import numpy as np

from benchmarks.record import fill, origin, read, save, table
from brgsa_jax.data import builders
from brgsa_jax.data.bench import bench

VOLUMES, REPEATS = 24, 5


def main() -> None:
    """Builds the volumes, measures, writes the result file and the table of the documentation."""
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        builders.build_phantom(data, train=VOLUMES, shape=(256, 256, 128), progress=False)
        runs = [bench(data, crop=(224, 224, 112), batch_size=8, batches=64, threads=1)
                for _ in range(REPEATS)]
    first = runs[0]
    save("feed", "python -m benchmarks.feed", {
        "what": "random crops delivered as batches from the page cache; phantom volumes",
        "shape": first.shape, "crop": first.crop, "batch_size": first.batch_size,
        "batches": 64, "threads": first.threads, "repeats": REPEATS,
        "feed": summary([run.feed for run in runs]), "nifti": summary([run.nifti for run in runs]),
        "waited": [run.waited for run in runs]})
    show()


def summary(rates: list) -> dict:
    """Medians, and every measure of the rate a core."""
    return {"gigabytes_per_cpu_second": float(np.median([r.per_core for r in rates])),
            "cpu_milliseconds_per_volume": float(np.median(
                [r.cpu_seconds / r.samples * 1e3 for r in rates])),
            "all": [r.per_core for r in rates]}


def show() -> None:
    """Fills the table of docs/data.md from the result file."""
    recorded = read("feed")
    found = recorded["result"]
    rows = [[name, f"{found[key]['gigabytes_per_cpu_second']:.2f}",
             f"{min(found[key]['all']):.2f}–{max(found[key]['all']):.2f}",
             f"{found[key]['cpu_milliseconds_per_volume']:.1f}"]
            for key, name in (("feed", "shards of `brgsa data build`"),
                              ("nifti", "`.nii.gz` by nibabel"))]
    lines = table(["Read from", "GB/s per core", "lowest–highest", "CPU ms per volume"], rows)
    fill("docs/data.md", "feed", [*lines, "", origin(recorded, "feed")])


if __name__ == "__main__":
    main()
