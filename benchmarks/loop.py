"""What the training loop costs the host beside the devices: `python -m benchmarks.loop`.

The trainer itself on 8 simulated devices, with a train step of the same arguments, results and
donation that computes nothing: what remains is dispatch, placing batches, metrics, the progress
bar, asking for checkpoints and preemptions. Batches are read before.
"""

import argparse
import itertools
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from benchmarks.record import fill, origin, read, save, table
from brgsa_jax import config as configs
from brgsa_jax.data import feed
from brgsa_jax.data.builders import build_phantom
from brgsa_jax.train import trainer
from brgsa_jax.train.step import Training, make_training

DEVICES, WINDOW = 8, 50
RECIPES = ("brgsa", "brgsa_mgca", "phantom")
# Towers of few numbers and as many arrays as the real ones: sizes are nothing to the host.
SMALL = {"model.input.shape": (32, 32, 16), "data.crop": (32, 32, 16),
         "model.vision.patch": (16, 16, 8), "model.embed_dim": 24, "model.vision.width": 24,
         "model.vision.heads": 3, "model.vision.mlp_width": 48, "model.text.width": 24,
         "model.text.heads": 3, "model.text.mlp_width": 48, "model.bank.rows": 16,
         "model.text.max_tokens": 16, "data.batch_size": 16, "train.eval_every": 0,
         "train.checkpoint_every": 10**6, "model.input.spacing": (12.0, 12.0, 24.0)}


class Found(NamedTuple):
    """Milliseconds per step, of every window of `WINDOW` steps.

    Attributes:
        wall: wall-clock time of the loop.
        processor: processor time of the loop's thread.
        bare: wall-clock time of only placing a batch and dispatching the step.
        bare_processor: processor time of that.
        arrays: in the train state.
    """

    wall: list[float]
    processor: list[float]
    bare: list[float]
    bare_processor: list[float]
    arrays: int


class Idle:
    """A train step that computes nothing, and notes when it is called."""

    def __init__(self, training: Training) -> None:
        self._training = training
        self.clocks: list[tuple[float, float]] = []
        self.arrays = len(jax.tree.leaves(training.abstract))

    def lower(self, state: Any, batch: Any) -> "Idle":
        self._rows = jax.device_get(batch)
        _, values = jax.eval_shape(self._training.train_step, state, batch)

        def step(state: Any, batch: Any) -> Any:
            return (state.replace(step=state.step + 1),
                    {name: jnp.ones(value.shape, value.dtype) for name, value in values.items()})

        where = jax.tree.map(lambda x: x.sharding, (state, batch))
        self._compiled = jax.jit(
            step, in_shardings=where, out_shardings=(where[0], where[0].step),
            donate_argnums=0).lower(state, batch).compile()
        return self

    def compile(self) -> "Idle":
        return self

    def memory_analysis(self) -> None:
        return None

    def bare(self, steps: int) -> list[tuple[float, float]]:
        """The clocks of a loop that only places batches and calls the step."""
        clocks, state, values = [], self._training.init(0), []
        for _ in range(steps):
            clocks.append((time.perf_counter(), time.thread_time()))
            batch = self._training.place(self._rows)
            state, value = self._compiled(state, batch)
            values = [*values[-1:], value["loss"]]
            values[0].block_until_ready()
        return clocks

    def __call__(self, state: Any, batch: Any) -> Any:
        self.clocks.append((time.perf_counter(), time.thread_time()))
        return self._compiled(state, batch)


@contextmanager
def idle() -> Iterator[list[Idle]]:
    """Has the trainer train with steps that compute nothing, on batches that are read before."""
    made: list[Idle] = []
    read = feed.host_batches

    def training(*args: Any, **options: Any) -> Training:
        real = make_training(*args, **options)
        made.append(Idle(real))
        return real._replace(train_step=made[-1])

    def batches(*args: Any, **options: Any) -> Iterator[Any]:
        return itertools.cycle(list(itertools.islice(read(*args, **options), 3)))

    with mock.patch.object(trainer, "make_training", training), \
            mock.patch.object(feed, "host_batches", batches):
        yield made


def measure(data: str | Path, recipe: str, *, steps: int, console: Console) -> Found:
    """Trains `steps` idle steps and returns what they cost the host.

    Args:
        data: a data set of phantoms of 32 × 32 × 16.
        recipe: a configuration; its towers are made small.
        steps: how many; the first window is left out.
        console: gets what the trainer tells.
    """
    known = configs.flatten(configs.get_config(recipe))
    config = configs.get_config(recipe, **{
        "data.path": str(data), "train.steps": steps,
        **{key: value for key, value in SMALL.items() if key in known}})
    with idle() as made, tempfile.TemporaryDirectory() as folder:
        trainer.train(config, folder, console=console)
    loop, bare = per_step(made[0].clocks), per_step(made[0].bare(steps))
    return Found(*loop, *bare, made[0].arrays)


def per_step(clocks: list[tuple[float, float]]) -> tuple[list[float], list[float]]:
    """Milliseconds of wall-clock and of processor time per step, window by window."""
    wall, processor = np.diff(np.array(clocks[WINDOW::WINDOW]), axis=0).T * 1e3 / WINDOW
    return wall.tolist(), processor.tolist()


def main() -> None:
    """Measures the recipes and writes the result file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=2000)
    steps = parser.parse_args().steps
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", DEVICES)
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        build_phantom(data, train=48, valid=16, test=16, shape=(32, 32, 16), progress=False)
        # A terminal, so that the progress bar is drawn.
        with open(os.devnull, "w") as nowhere:
            console = Console(file=nowhere, force_terminal=True, width=200)
            runs = {recipe: measure(data, recipe, steps=steps, console=console)
                    for recipe in RECIPES}
    save("loop", "python -m benchmarks.loop", {
        "what": "host milliseconds per step of a train step that computes nothing",
        "devices": f"{DEVICES} simulated", "steps": steps, "window": WINDOW,
        "load_average": os.getloadavg(), "recipes": {name: {
            "arrays": run.arrays, "median": {kind: float(np.median(times)) for kind, times in
                                             zip(run._fields[:4], run[:4], strict=True)},
            "quartiles_of_wall": np.percentile(run.wall, (25, 75)).tolist(),
        } for name, run in runs.items()}})
    show()


def show() -> None:
    """Fills the table of docs/running.md from the result file."""
    recorded = read("loop")
    rows = [[f"`{name}`", str(run["arrays"]), f"{run['median']['wall']:.2f}",
             "–".join(f"{edge:.2f}" for edge in run["quartiles_of_wall"]),
             *(f"{run['median'][kind]:.2f}" for kind in ("processor", "bare", "bare_processor"))]
            for name, run in recorded["result"]["recipes"].items()]
    lines = table(["Recipe", "Arrays in the state", "ms per step", "quartiles",
                   "processor time of its thread", "ms of bare dispatch and placing",
                   "processor time of that"], rows)
    fill("docs/running.md", "loop", [*lines, "", origin(recorded, "loop")])


if __name__ == "__main__":
    main()
