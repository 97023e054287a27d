"""What a run tells before its first step: sizes, negatives, memory on each device."""

import math
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from brgsa_jax import flops
from brgsa_jax.hardware import chip_of
from brgsa_jax.model import parameter_count
from brgsa_jax.train import optim
from brgsa_jax.train.meter import Work
from brgsa_jax.train.step import TrainState


def bytes_per_device(tree: Any) -> int:
    """Bytes one device holds of arrays, or of shapes with shardings."""
    return sum(int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize
               for leaf in jax.tree.leaves(tree))


def negatives_per_sample(config: Any, devices: int) -> dict[str, int]:
    """Rows a sample is contrasted with, by the name of the loss, before duplicates are left out."""
    batch = config.data.batch_size
    return {name: (batch // devices if term.get("negatives") == "local" else batch) - 1
            for name, term in config.losses.items()
            if term.weight and ("negatives" in term or name in ("sigmoid", "local_alignment"))}


def work_of(config: Any, mesh: Mesh) -> Work:
    """What a train step computes, and what these devices could."""
    chip = chip_of(mesh.devices.flat[0].device_kind)
    return Work(config.data.batch_size, flops.step(config),
                None if chip is None else mesh.size * chip.flops)


def describe(config: Any, mesh: Mesh, state: TrainState, *, volumes: int, work: Work,
             temporary: int | None) -> list[str]:
    """Lines about a run: what is trained, on what, and what each device holds.

    Args:
        config: whole configuration, durations in steps.
        mesh: its devices.
        state: arrays, or shapes with shardings.
        volumes: in the training split.
        work: of a step, from `work_of`.
        temporary: bytes of activations and temporaries of the compiled step on one device, or
            None when the compiler does not tell.
    """
    steps, batch = config.train.steps, config.data.batch_size
    rows = 0 if state.bank is None else state.bank.shape[0]
    _, still = optim.split(config, state.weights)
    count, frozen = (parameter_count(tree) for tree in (state.params, still["params"]))
    lines = [f"{config.name}: {count:,} parameters"
             + (f" ({count - frozen:,} trained, {frozen:,} frozen)" if frozen else "")
             + (f", bank of {rows} {'rows' if still['bank'] is None else 'frozen rows'}" if rows
                else ", no bank")
             + f", {volumes} volumes, {steps} steps of {batch} = {steps * batch / volumes:.1f} "
             f"epochs, on {mesh.size} × {mesh.devices.flat[0].device_kind}"]
    layout = (f"data parallel by pmap over {mesh.size} devices" if config.train.parallel == "pmap"
              else f"mesh {dict(mesh.shape)}")
    if rows and mesh.size > 1:
        mine = state.bank.sharding.shard_shape(state.bank.shape)[0]
        layout += (f", bank rows: {mine} of {rows} on each device" if mine < rows
                   else f", bank replicated: all {rows} rows on each device")
    if config.train.microbatch > 1:
        layout += f", towers in {config.train.microbatch} chunks"
    lines.append(f"  {layout}")
    seen = []
    for name, count in negatives_per_sample(config, mesh.size).items():
        same = " or ".join(config.losses[name].get("positives", ()))
        seen.append(f"{count} in {name}" + (f", less those of the same {same}" if same else ""))
    if seen:
        lines.append(f"  negatives of each sample: {'; '.join(seen)}")
    held = {"parameters": state.params, "optimiser": state.opt, "bank": state.bank,
            "average": state.ema}
    parts = [f"{_mebibytes(bytes_per_device(tree))} {name}"
             for name, tree in held.items() if tree is not None]
    if temporary is not None:
        parts.append(f"{_mebibytes(temporary)} activations and temporaries of the step")
    lines.append(f"  each device holds {', '.join(parts)}")
    if math.isfinite(work.flops):
        lines.append(f"  a step is {_scaled(work.flops)}FLOP" + (
            f"; MFU is its share of {_scaled(work.peak)}FLOP/s, dense bfloat16" if work.peak
            else ""))
    return lines


def temporary_bytes(compiled: Any) -> int | None:
    """Bytes of temporaries of a compiled step on one device, None when it does not tell."""
    analysis = compiled.memory_analysis()
    return None if analysis is None else analysis.temp_size_in_bytes


def _scaled(number: float) -> str:
    power = min(max(int(math.log10(number)) // 3, 0), 5)
    return f"{number / 1000**power:.3g} {' kMGTP'[power].strip()}"


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:.{1 if size < 2**27 else 0}f} MiB"
