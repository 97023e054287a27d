"""The plan of a run: memory, collectives, time and the largest batch, by device."""

import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from brgsa_jax import flops, paths
from brgsa_jax import mesh as meshes
from brgsa_jax.config import UserError, override, train_durations, validate
from brgsa_jax.hardware import Chip
from brgsa_jax.planner import activations, compile, roofline
from brgsa_jax.planner.hlo import Traffic
from brgsa_jax.planner.memory import Memory, abstract_batch, local_bytes, state_parts
from brgsa_jax.planner.target import Target, target_of, tpu_devices, without_accelerators
from brgsa_jax.train import optim
from brgsa_jax.train.step import Training, make_training

# Rows of BERT's table, for configurations that take them from a tokenizer.
USUAL_VOCABULARY = 30522
# Durations need the length of an epoch, which changes no shape.
STEPS_OF_AN_EPOCH = 1000


class Plan(NamedTuple):
    """What a run needs on a target.

    Attributes:
        name: of the configuration.
        target: accelerators.
        mesh: devices along "data" and "fsdp".
        batch: global rows.
        vocabulary: rows of the token table; `assumed` where the configuration names none.
        compiled: whether the compiler was asked; otherwise temporaries and collectives are
            estimates by formulas.
        memory: bytes of one device.
        loss_memory: bytes of temporaries of the objective alone, on-chip memory included; or None.
        collectives: of one step and device.
        flops: model FLOPs of a step of all devices; `forward` those of one sample by part.
        time: estimate of a step.
        scaling: extrapolated efficiency from 8 to 1 024 devices.
        largest: global batch that should fit, and `largest_compiled` whether that was compiled.
        seconds: what planning took.
    """

    name: str
    target: Target
    mesh: dict[str, int]
    batch: int
    vocabulary: int
    assumed: bool
    compiled: bool
    memory: Memory
    loss_memory: float | None
    collectives: dict[str, Traffic]
    flops: float
    forward: dict[str, float]
    time: roofline.Time
    scaling: list[roofline.Scale]
    largest: int
    largest_compiled: bool
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Returns everything for JSON."""
        chip = self.target.chip
        return {
            **{key: getattr(self, key) for key in (
                "name", "mesh", "batch", "vocabulary", "assumed", "compiled", "loss_memory",
                "flops", "forward", "seconds")},
            "topology": self.target.name, "devices": self.target.count, "fits": self.memory.fits,
            "chip": chip._asdict(), "memory": self.memory._asdict(),
            "collectives": {kind: t._asdict() for kind, t in self.collectives.items()},
            "step_seconds": {**self.time._asdict(), "total": self.time.total},
            "assumed_shares": {"arithmetic": roofline.ARITHMETIC, "bandwidth": roofline.BANDWIDTH,
                               "links": roofline.LINKS, "latency_seconds": roofline.LATENCY},
            "scaling": [scale._asdict() for scale in self.scaling],
            "largest_batch": self.largest, "largest_batch_compiled": self.largest_compiled}


def plan(config: Any, topology: str, *, batch: int | None = None, largest: bool = False,
         tell: Callable[[str], None] = lambda _: None) -> Plan:
    """Plans a run.

    Args:
        config: whole configuration; it may name no data set.
        topology: a TPU slice ("v5e:16x16"), for which the train step is compiled, or GPUs
            ("h200:8"), whose temporaries and collectives are estimated.
        batch: global rows in place of data.batch_size.
        largest: compile the largest batch until one fits, in place of an estimate.
        tell: told what is being done.

    Raises:
        UserError: an unknown accelerator, a configuration that cannot be, what does not divide.
    """
    start = time.perf_counter()
    target = target_of(topology)
    config, assumed = _settle(config, target, batch)
    with without_accelerators():
        devices = tpu_devices(target) if target.chip.is_tpu else None
        made = _Made(config, target, devices)
        memory, found, loss_memory = _needs(made, tell)
        largest_batch, confirmed = _largest(made, memory, largest and devices is not None, tell)
    state = memory.parameters + memory.bank + memory.optimiser + memory.average
    traffic = found or roofline.traffic_of(config, made.gradients, target.count)
    return Plan(
        name=config.name, target=target, mesh=dict(made.mesh.shape),
        batch=config.data.batch_size, vocabulary=config.model.text.vocab, assumed=assumed,
        compiled=devices is not None, memory=memory, loss_memory=loss_memory, collectives=traffic,
        flops=flops.step(config), forward=flops.forward(config),
        time=roofline.step_time(config, target.chip, target.count, traffic, state),
        scaling=roofline.scaling(config, target.chip, target.count, state, made.gradients),
        largest=largest_batch, largest_compiled=confirmed, seconds=time.perf_counter() - start)


def _settle(config: Any, target: Target, batch: int | None) -> tuple[Any, bool]:
    """The configuration with all that a plan needs, and whether its vocabulary was assumed."""
    assumed = config.model.text.vocab == 0
    changes: dict[str, Any] = {"data.batch_size": batch} if batch is not None else {}
    if assumed:
        changes["model.text.vocab"] = USUAL_VOCABULARY
    config = validate(override(config, changes))
    config = override(config, train_durations(config, STEPS_OF_AN_EPOCH))
    if config.train.parallel != "mesh":
        raise UserError(f"train.parallel={config.train.parallel} runs on the devices of one "
                        "process only; plan with --config.train.parallel=mesh")
    unit, rows = target.count * max(config.train.microbatch, 1), config.data.batch_size
    if rows % unit:
        chunks = f" in {config.train.microbatch} chunks" if unit > target.count else ""
        raise UserError(f"a global batch of {rows} does not divide over {target.count} devices"
                        f"{chunks}; give --batch a multiple of {unit}, such as "
                        f"{max(-(-rows // unit), 8) * unit}")
    return config, assumed


class _Device:
    """A GPU that is not there, for a mesh to lie over."""

    platform, process_index = "gpu", 0

    def __init__(self, number: int, chip: Chip) -> None:
        self.id, self.device_kind = number, chip.kind


class _Made:
    """The run over the devices of the target; with `rows`, at another global batch."""

    def __init__(self, config: Any, target: Target, devices: list[Any] | None) -> None:
        self.config, self.target, self.devices = config, target, devices
        if devices is None:
            devices = [_Device(number, target.chip) for number in range(target.count)]
            # Shapes do not depend on the kernel, and cuDNN's asks for its library.
            config = override(config, {f"model.{name}.implementation": "xla" for name in (
                "vision", "text") if "implementation" in config.model[name]})
        self.mesh = meshes.make_mesh(config.mesh.data, config.mesh.fsdp, devices)
        self.training: Training = make_training(config, self.mesh, per_epoch=STEPS_OF_AN_EPOCH)
        state = self.training.abstract
        self.parts = state_parts(state, abstract_batch(config, self.mesh))
        trained, _ = optim.split(config, state.weights)
        in_blocks, others, self.local_gradients = gradient_sizes(trained)
        self.stacked = 4.0 * in_blocks
        self.gradients = 4.0 * (in_blocks + others)

    def at(self, rows: int) -> "_Made":
        """The same run at another global batch."""
        return _Made(override(self.config, {"data.batch_size": rows}), self.target, self.devices)


def gradient_sizes(trained: Any) -> tuple[int, int, float]:
    """Entries of trained weights in scanned blocks, of others, and bytes of one device's share."""
    leaves = paths.flat(trained)
    in_blocks = sum(math.prod(leaf.shape) for path, leaf in leaves.items()
                    if "/blocks/" in path and len(leaf.shape) > 2)
    everything = sum(math.prod(leaf.shape) for leaf in leaves.values())
    return in_blocks, everything - in_blocks, float(local_bytes(trained))


def _needs(made: _Made, tell: Callable[[str], None]) -> tuple[Memory, dict[str, Traffic],
                                                            float | None]:
    """Memory of a step, its collectives ({} if not compiled), and what the losses alone need."""
    chip, rows = made.target.chip, made.config.data.batch_size // made.target.count
    state = float(sum(made.parts.values()))
    if made.devices is None:
        temporaries = (activations.fixed(made.config, made.local_gradients, made.stacked)
                       + rows * activations.per_row(made.config))
        return (Memory(**made.parts, temporaries=temporaries, padding=0.0, program=0.0,
                       peak=state + temporaries, usable=chip.usable, total=chip.memory), {}, None)
    tell(f"compiling the losses for {made.target.count} devices")
    loss_memory = compile.loss_temporaries(made.config, made.mesh, made.training)
    if loss_memory > chip.usable:
        # What holds the losses and more cannot fit either.
        return (Memory(**made.parts, temporaries=None, padding=0.0, program=0.0,
                       peak=state + loss_memory, usable=chip.usable, total=chip.memory), {},
                loss_memory)
    tell("compiling the train step")
    found = compile.compile_step(made.config, made.mesh, made.training)
    peak, padding = max(found.needed, chip.usable + 1), 0.0
    if found.fits:
        peak = found.needed
        padding = peak - state - found.temporaries - found.program
    return (Memory(**made.parts, temporaries=found.temporaries, padding=padding,
                   program=found.program, peak=peak, usable=chip.usable, total=chip.memory),
            found.collectives, loss_memory)


def _largest(made: _Made, memory: Memory, confirm: bool,
             tell: Callable[[str], None]) -> tuple[int, bool]:
    """The largest global batch that should fit, and whether it was compiled.

    Temporaries are a part that does not depend on the batch, by formula, and the rest, which
    grows with it.
    """
    unit = made.target.count * max(made.config.train.microbatch, 1)
    rows = made.config.data.batch_size // made.target.count
    state = sum(value for name, value in made.parts.items() if name != "batch")
    constant = (state + memory.padding + memory.program + activations.fixed(
        made.config, made.local_gradients, made.stacked))
    growing = (memory.peak - constant) / rows
    if growing <= 0:
        growing = made.parts["batch"] / rows + activations.per_row(made.config)
    units = int((memory.usable - constant) / growing) * made.target.count // unit
    guess = max(units, 0) * unit
    if not confirm:
        return guess, guess == made.config.data.batch_size and memory.fits
    while guess:
        tell(f"compiling a batch of {guess}")
        other = made.at(guess)
        if compile.compile_step(other.config, other.mesh, other.training).fits:
            return guess, True
        guess = min(int(guess * 0.9) // unit, guess // unit - 1) * unit
    return 0, True
