"""How fast phantom patients are made on one core: `python -m benchmarks.phantom`."""

import os
import time

from benchmarks.record import save, table
from brgsa_jax.data.phantom import generate


def main() -> None:
    """Times small and full-size volumes, report included, on one core."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    try:
        generate(0, 0)
        rates = {}
        for name, shape, count in (("small", (64, 64, 32), 60), ("real", (256, 256, 128), 3)):
            best = 0.0
            for repeat in range(3):
                start = time.perf_counter()
                for patient in range(count):
                    generate(repeat, patient, shape)
                best = max(best, count / (time.perf_counter() - start))
            rates[name] = {"shape": shape, "volumes_per_second": best, "repeats": 3}
    finally:
        os.sched_setaffinity(0, cores)
    table(["volume", "volumes/s on one core, best of 3"],
          [[" × ".join(map(str, r["shape"])), f"{r['volumes_per_second']:.1f}"]
           for r in rates.values()])
    save("phantom", "python -m benchmarks.phantom", rates)


if __name__ == "__main__":
    main()
