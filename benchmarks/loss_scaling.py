"""Memory and time of contrastive losses over devices: `python -m benchmarks.loss_scaling`.

Rows a device stay the same while devices are added, simulated ones of one CPU. Memory is what the
compiler lays out for the loss and its gradient on one device; times are of all devices together
on this machine's cores, so that constant work a device shows as a straight line.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.record import fill, origin, read, save, table

COUNTS = (1, 2, 4, 8, 16, 32)
TIMED = 8
ROWS, DIM, BANK = 32, 512, 2048
REPEATS = 15


def losses() -> dict[str, Callable[..., Any]]:
    """Losses of (image [b, D], text [b, D], bank [k, D]) on a batch axis, by their names here."""
    import jax
    import jax.numpy as jnp
    from jax import lax

    from brgsa_jax.losses import info_nce, knowledge_interaction, sigmoid

    def contrast(negatives: str) -> Callable[..., Any]:
        def loss(image: Any, text: Any, bank: Any, axis: str) -> Any:
            return sum(info_nce(image, text, temperature=0.07, negatives=negatives,
                                axis_name=axis))
        return loss

    def knowledge(negatives: str) -> Callable[..., Any]:
        def loss(image: Any, text: Any, bank: Any, axis: str) -> Any:
            found = knowledge_interaction(image, text, bank, negatives=negatives, axis_name=axis,
                                          rows_axis=axis)
            return sum(jax.tree.leaves(found))
        return loss

    def pairwise(image: Any, text: Any, bank: Any, axis: str) -> Any:
        return sigmoid(image, text, logit_scale=10.0, logit_bias=-10.0, axis_name=axis)

    def naive(image: Any, text: Any, bank: Any, axis: str) -> Any:
        """What is usually written: gather both sides, all pairs on every device."""
        images, texts = (lax.all_gather(x / jnp.linalg.norm(x, axis=1, keepdims=True), axis,
                                        tiled=True) for x in (image, text))
        logits = images @ texts.T / 0.07
        own = jnp.arange(len(logits))
        both = jax.nn.log_softmax(logits, 1)[own, own] + jax.nn.log_softmax(logits, 0)[own, own]
        return lax.pmean(-both.mean(), axis)

    return {"InfoNCE, all gathered (naive)": naive, "InfoNCE, global": contrast("global"),
            "InfoNCE, ring": contrast("ring"), "sigmoid, ring": pairwise,
            "knowledge interaction, global": knowledge("global"),
            "knowledge interaction, ring": knowledge("ring")}


def measure(count: int) -> dict[str, dict[str, float]]:
    """Compiles, and up to `TIMED` devices times, every loss on the devices of this process."""
    import jax
    from jax.sharding import PartitionSpec as P

    from brgsa_jax.mesh import make_mesh

    assert jax.device_count() == count
    mesh = make_mesh(count, 1)
    rng = np.random.default_rng(0)
    sharded = jax.NamedSharding(mesh, P("data"))
    inputs = [jax.device_put(rng.normal(size=(rows, DIM)).astype("f4"), sharded)
              for rows in (count * ROWS, count * ROWS, BANK)]
    found = {}
    for name, loss in losses().items():
        def total(image: Any, text: Any, bank: Any, loss: Callable[..., Any] = loss) -> Any:
            return jax.shard_map(lambda *x: loss(*x, "data"), mesh=mesh, in_specs=P("data"),
                                 out_specs=P())(image, text, bank)

        arguments = (0, 1, 2) if "knowledge" in name else (0, 1)
        step = jax.jit(jax.value_and_grad(total, arguments)).lower(*inputs).compile()
        found[name] = {"temporaries": step.memory_analysis().temp_size_in_bytes}
        if count <= TIMED:
            found[name]["seconds"] = median(lambda step=step: jax.block_until_ready(step(*inputs)))
    return found


def median(run: Callable[[], Any]) -> float:
    """Median seconds of some runs after the first two."""
    seconds = []
    for _ in range(REPEATS + 2):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds[2:]))


def main() -> None:
    """Measures in one process for each number of devices; writes the result and the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--devices", type=int, help=argparse.SUPPRESS)
    count = parser.parse_args().devices
    if count:
        print(json.dumps(measure(count)))
        return
    runs = {}
    for count in COUNTS:
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "0",
                       "XLA_FLAGS": f"--xla_force_host_platform_device_count={count}"}
        done = subprocess.run([sys.executable, "-m", "benchmarks.loss_scaling", "--devices",
                               str(count)], check=True, env=environment, capture_output=True,
                              text=True)
        runs[str(count)] = json.loads(done.stdout.splitlines()[-1])
    save("loss_scaling", "python -m benchmarks.loss_scaling", {
        "what": "temporaries in bytes of one simulated CPU device, seconds of all devices together",
        "rows_a_device": ROWS, "width": DIM, "bank_rows": BANK, "repeats": REPEATS, "runs": runs})
    show()


def show() -> None:
    """Fills the table of docs/plan.md from the result file."""
    recorded = read("loss_scaling")
    runs = recorded["result"]["runs"]
    header = ["MiB of temporaries a device", *(f"{count} devices" for count in runs),
              *(f"ms at {count}" for count in ("1", str(TIMED)))]
    rows = [[name, *(f"{found[name]['temporaries'] / 2**20:.2f}" for found in runs.values()),
             *(f"{runs[count][name]['seconds'] * 1e3:.1f}" for count in ("1", str(TIMED)))]
            for name in runs["1"]]
    fill("docs/plan.md", "loss-scaling", [*table(header, rows), "",
                                          origin(recorded, "loss_scaling")])


if __name__ == "__main__":
    main()
