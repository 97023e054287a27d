"""Step times by a roofline: arithmetic or memory, whichever is slower, and then the network.

The shares of the published numbers that real steps reach are assumptions, not measurements.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from brgsa_jax import flops
from brgsa_jax.hardware import Chip
from brgsa_jax.planner.hlo import Traffic

# Of the published FLOP/s, bytes/s of memory, and bytes/s of links; seconds a collective begins in.
ARITHMETIC, BANDWIDTH, LINKS, LATENCY = 0.5, 0.7, 0.8, 1e-6
DOUBLINGS = tuple(2**power for power in range(3, 11))


class Time(NamedTuple):
    """Seconds of one step.

    Attributes:
        compute: of the matrix products, with what is computed again to save memory.
        memory: of reading and writing device memory.
        communication: of the collectives, none of it hidden behind the rest.
    """

    compute: float
    memory: float
    communication: float

    @property
    def total(self) -> float:
        """The slower of arithmetic and memory, and the collectives."""
        return max(self.compute, self.memory) + self.communication


class Scale(NamedTuple):
    """Efficiency at a number of devices, against eight of them.

    Attributes:
        devices: how many.
        constant_rows: at as many rows a device.
        constant_batch: at the same global batch; None where it leaves a device without rows.
    """

    devices: int
    constant_rows: float
    constant_batch: float | None


def step_time(config: Any, chip: Chip, devices: int, traffic: Mapping[str, Traffic],
              state: float) -> Time:
    """Estimates a step.

    Args:
        config: whole configuration; data.batch_size is the global batch.
        chip: one device.
        devices: how many.
        traffic: collectives of a step by kind.
        state: bytes of one device's parameters, moments and average.
    """
    peak = chip.flops
    if config.model.dtype == "float32" and not chip.is_tpu:
        # TF32 has half the throughput; a TPU rounds to bfloat16 by default.
        peak /= 2
    rows = config.data.batch_size / devices
    return Time(compute=executed(config) / devices / (ARITHMETIC * peak),
                memory=(3 * state + rows * activation_bytes(config)) / (BANDWIDTH * chip.bandwidth),
                communication=communication(traffic, chip, devices))


def executed(config: Any) -> float:
    """FLOPs of a step as it is run: `flops.step`, and the passes that are run again."""
    again = 0.0
    still, parts = flops.frozen_towers(config), flops.forward(config)
    for name in {"vision", "text"} - still:
        passes = (config.model[name].get("remat") == "full") + (config.train.microbatch > 1)
        again += passes * parts[name]
    return flops.step(config) + config.data.batch_size * again


def activation_bytes(config: Any) -> float:
    """Bytes that the towers read and write for one row in a step, roughly.

    A transformer block moves some sixteen arrays [T, W] and four [T, M] of 16 bits each pass.
    """
    total = 0.0
    for name in ("vision", "text"):
        tower = config.model[name]
        if "mlp_width" not in tower:
            # A convolution reads and writes some bytes for every thousand FLOPs.
            total += 3e-3 * flops.forward(config)[name]
            continue
        tokens = config.model.text.max_tokens if name == "text" else math.prod(
            n // p for n, p in zip(config.data.crop, tower.patch, strict=True))
        passes = 3 + (tower.remat == "full") + (config.train.microbatch > 1)
        total += passes * tower.depth * tokens * 2 * (16 * tower.width + 4 * tower.mlp_width)
    return total


def communication(traffic: Mapping[str, Traffic], chip: Chip, devices: int) -> float:
    """Seconds of collectives, one after another, by rings within an island and between them."""
    islands = -(-devices // chip.island)
    seconds = 0.0
    for kind, (count, sent) in traffic.items():
        seconds += count * LATENCY
        if kind == "collective-permute":
            # One neighbour: one of the links of a torus of two or three axes.
            ports = {True: 4 if chip.island == 256 else 6, False: 1}[chip.is_tpu]
            seconds += sent / ((chip.link / ports if islands == 1 else chip.network) * LINKS)
            continue
        seconds += sent / (chip.link * LINKS)
        if islands > 1:
            # Every device carries its share of what its island has to tell the others.
            seconds += sent / chip.island / (chip.network * LINKS)
    return seconds


def scaling(config: Any, chip: Chip, devices: int, state: float, gradients: float) -> list[Scale]:
    """Extrapolates efficiency from 8 to 1 024 devices, from formulas alone.

    Args:
        config: whole configuration; data.batch_size is the batch of `devices`.
        chip: one device.
        devices: of the plan.
        state: bytes of one device's parameters, moments and average.
        gradients: bytes of the gradients, as they are reduced.
    """
    rows = config.data.batch_size // devices

    def seconds(count: int, batch: int) -> float:
        changed = config.copy_and_resolve_references()
        with changed.unlocked():
            changed.data.batch_size = batch
        found = traffic_of(changed, gradients, count)
        return step_time(changed, chip, count, found, state).total

    base = DOUBLINGS[0]
    each, whole = seconds(base, rows * base), seconds(base, config.data.batch_size)
    return [Scale(count, each / seconds(count, rows * count),
                  base * whole / (count * seconds(count, config.data.batch_size))
                  if config.data.batch_size % count == 0 else None) for count in DOUBLINGS]


def traffic_of(config: Any, gradients: float, devices: int) -> dict[str, Traffic]:
    """Collectives of a step by formulas: gradients, sharded parameters, losses and bank.

    Args:
        config: whole configuration; data.batch_size is the global batch.
        gradients: bytes of all gradients, as they are reduced.
        devices: how many.
    """
    fsdp = config.mesh.fsdp if config.mesh.fsdp > 0 else devices // max(config.mesh.data, 1)
    others = (devices - 1) / devices
    found = {kind: [0, 0.0] for kind in ("all-reduce", "all-gather", "reduce-scatter",
                                         "collective-permute")}

    def add(kind: str, count: int, sent: float) -> None:
        found[kind][0] += count
        found[kind][1] += sent

    data = max(devices // fsdp, 1)
    depth = sum(config.model[name].get("depth", 1) for name in ("vision", "text"))
    add("all-reduce", depth, 2 * gradients / fsdp * (data - 1) / data)
    if fsdp > 1:
        # Gathered for the forward and the backward pass; gradients are scattered where they lie.
        add("all-gather", 2 * depth, 2 * gradients * (fsdp - 1) / fsdp)
        add("reduce-scatter", depth, gradients * (fsdp - 1) / fsdp)
    # One device's embeddings of one modality, in float32.
    block = config.data.batch_size / devices * config.model.embed_dim * 4
    for name, term in config.losses.items():
        contrasts = {"info_nce": 1, "knowledge_interaction": 2, "sigmoid": 1}.get(name, 0)
        if not term.weight or not contrasts:
            continue
        if term.get("negatives", "ring") == "ring":
            # Texts travel round, and again with their gradients.
            add("collective-permute", contrasts * 10 * devices, contrasts * 3 * block * devices)
        elif term.negatives == "global":
            add("all-gather", contrasts, contrasts * 2 * block * devices * others)
            add("all-reduce", contrasts, contrasts * 4 * block * devices * others)
    if config.model.bank.rows:
        # Queries are gathered and what they read is scattered, and back in the gradient.
        add("all-gather", 2, 4 * block * devices * others)
        add("all-reduce", 2, 8 * block * devices * others)
    # Diagnostics: the hardest negative of every row.
    add("collective-permute", 5 * devices, block * devices)
    return {kind: Traffic(int(count), sent) for kind, (count, sent) in found.items() if count}
