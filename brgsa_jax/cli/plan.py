"""The command that plans: what a run needs on accelerators that are not here."""

import argparse
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from brgsa_jax.cli.common import Add, positive, terminal
from brgsa_jax.config import UserError

GIB = 2**30
WIDTH = 120


def add(command: Add) -> None:
    """Adds the command."""
    sub = command("plan", plan, "what a run needs on TPUs or GPUs that are not here: memory, "
                  "collectives, time, the largest batch", overrides=True)
    sub.add_argument("--config", required=True, help="recipe name, Python file or config.json")
    sub.add_argument("--topology", required=True, metavar="NAME:SIZE",
                     help="a TPU slice (v5e:16x16, v5p:8x8x8), compiled for; or GPUs (h200:8), by "
                     "formulas")
    sub.add_argument("--batch", type=positive, metavar="ROWS",
                     help="global batch, of all devices together [data.batch_size]")
    sub.add_argument("--largest", action="store_true", help="compile the largest batch until one "
                     "fits, in place of an estimate; minutes for each")
    sub.add_argument("--json", metavar="FILE", help="writes everything there too")


def plan(options: argparse.Namespace) -> int:
    """Plans a run; 1 when it does not fit."""
    # Before anything imports JAX: nothing of a plan runs on an accelerator.
    os.environ["JAX_PLATFORMS"] = "cpu"
    # A compile lets no handler of Python's run for minutes, and a plan has nothing to save.
    for stop in (signal.SIGINT, signal.SIGTERM):
        signal.signal(stop, signal.SIG_DFL)
    from brgsa_jax import config as configs
    from brgsa_jax.planner.plan import plan as make

    config = configs.get_config(options.config, **configs.parse_overrides(options.rest))
    if options.json:
        _check_writable(Path(options.json))
    console = terminal()
    with console.status("planning") as status:
        found = make(config, options.topology, batch=options.batch, largest=options.largest,
                     tell=status.update)
    if options.json:
        Path(options.json).write_text(json.dumps(found.to_dict(), indent=2) + "\n")
    # A file or a pipe has no width.
    console.print(_table(found), width=None if console.is_terminal else WIDTH)
    for line in _sentences(found):
        console.print(line)
    return 0 if found.memory.fits else 1


def _check_writable(path: Path) -> None:
    """Refuses a file that cannot be written before minutes of compiling."""
    if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise UserError(f"--json={path} cannot be written; give a file in a folder that is there")


def size(amount: float) -> str:
    """Bytes for reading."""
    for unit, factor in (("GiB", GIB), ("MiB", 2**20)):
        if amount >= factor:
            return f"{amount / factor:.2f} {unit}"
    return f"{amount / 2**10:.1f} KiB"


def _table(found: Any) -> Any:
    """The plan as a table of two columns, in sections."""
    from rich.table import Table

    table = Table(title=_title(found), title_justify="left", show_header=False, box=None,
                  pad_edge=False)
    for _ in range(3):
        table.add_column()
    previous = ""
    for section, name, value in _rows(found):
        table.add_row(section if section != previous else "", name, value)
        previous = section
    return table


def _title(found: Any) -> str:
    target, each = found.target, found.batch / found.target.count
    mesh = " × ".join(f"{axis}={size}" for axis, size in found.mesh.items())
    return (f"{found.name} on {target.name}: {target.count} devices, {mesh}; global batch "
            f"{found.batch}, {each:g} rows a device")


def _rows(found: Any) -> Iterator[tuple[str, str, str]]:
    """Section, name and value of every line."""
    memory, of = found.memory, "bytes a device"
    for name in ("parameters", "optimiser", "bank", "average", "statistics", "batch"):
        value = getattr(memory, name)
        if value:
            yield of, name, size(value)
    if memory.temporaries is not None:
        yield of, "activations and other temporaries", size(memory.temporaries)
    for name in ("padding", "program"):
        value = getattr(memory, name)
        if value:
            yield of, name, size(value)
    yield of, "peak", f"{size(memory.peak)} of {size(memory.usable)} usable"
    if found.loss_memory is not None:
        yield of, "losses alone, on-chip memory included", size(found.loss_memory)
    for kind, traffic in found.collectives.items():
        yield ("collectives a step", kind, f"{traffic.count} ×, {size(traffic.sent)} sent by a "
               "device")
    forward = ", ".join(f"{name} {flops / 1e9:.4g} G" for name, flops in found.forward.items())
    yield "FLOPs", "forward, one sample", forward
    yield "FLOPs", "train step", (f"{found.flops / 1e12:.4g} T, "
                                  f"{found.flops / found.target.count / 1e12:.4g} T a device")
    time = found.time
    for name in ("compute", "memory", "communication"):
        yield "estimated step", name, f"{getattr(time, name) * 1e3:.1f} ms"
    yield "estimated step", "in all", (
        f"{time.total * 1e3:.1f} ms, {time.communication / time.total:.1%} of it communication; "
        f"{found.batch / time.total:.0f} samples/s, model FLOPs "
        f"{found.flops / found.target.count / time.total / found.target.chip.flops:.0%} of the "
        "peak")
    for label, key in (("as many rows a device", "constant_rows"),
                       ("the same global batch", "constant_batch")):
        yield "efficiency, from 8 devices", label, "  ".join(
            f"{scale.devices}: {getattr(scale, key):.0%}" for scale in found.scaling
            if getattr(scale, key) is not None)


def _sentences(found: Any) -> Iterator[str]:
    """What has to be said beside the table, the verdict last."""
    from brgsa_jax.planner import roofline

    if found.assumed:
        yield (f"The configuration takes its vocabulary from a tokenizer; {found.vocabulary} rows "
               "were assumed (BERT's).")
    if not found.compiled:
        yield ("Nothing can be compiled for a GPU here: temporaries and collectives are estimates "
               "by formulas. XLA takes 75 % of a GPU's memory, unless "
               "XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise.")
    yield (f"Times assume {roofline.ARITHMETIC:.0%} of the published FLOP/s, "
           f"{roofline.BANDWIDTH:.0%} of the memory's and {roofline.LINKS:.0%} of the links' "
           "bandwidth, and no collective hidden behind arithmetic; efficiencies are extrapolated.")
    how = "compiled" if found.largest_compiled else "estimated" + (
        ", --largest compiles it" if found.compiled else "")
    yield f"Largest global batch: {found.largest} ({how})."
    memory = found.memory
    if memory.fits:
        yield f"It fits: {size(memory.usable - memory.peak)} of {size(memory.usable)} are left."
    else:
        yield (f"It does not fit: {size(memory.peak)} are needed on a device and "
               f"{size(memory.usable)} are usable; lower the batch, raise train.microbatch or "
               "mesh.fsdp, or set model.vision.remat=full.")
