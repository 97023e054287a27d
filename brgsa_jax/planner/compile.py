"""Ahead-of-time compiles for TPUs that are not there: the train step, and the losses alone."""

import re
from typing import Any, NamedTuple

import jax

from brgsa_jax import mesh as meshes
from brgsa_jax.config import reads_text
from brgsa_jax.network import Towers, build
from brgsa_jax.planner.hlo import Traffic, collectives
from brgsa_jax.planner.memory import abstract_batch, local_bytes
from brgsa_jax.train.step import Batch, Training, judge

UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
# The memory space assignment moves arrays to VMEM.
IN_HBM = {"xla_msa_enable": False}
_OVERFLOW = re.compile(r"CompileTimeHbmOom|Ran out of memory")
_NEEDED = re.compile(r"(?:HLO temporaries \(|Used )(\d+(?:\.\d+)?)([KMGT]?)")


class Sizes(NamedTuple):
    """Bytes of one device's arrays in a compiled program.

    Attributes:
        kept: arguments and results, what shares memory once.
        live: temporaries, at the moment when they are most.
        held: the same with the gaps between them.
    """

    kept: float
    live: float
    held: float


def sizes(found: Any) -> Sizes:
    """Reads a compiler's `memory_analysis`.

    The size libtpu gives for temporaries counts gaps twice: its log has the heap, with gaps, and
    the gaps apart, and the size is their sum. The peak it gives has none. The heap is halfway.
    """
    kept = found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
    live = min(max(found.peak_memory_in_bytes - kept, 0), found.temp_size_in_bytes)
    return Sizes(kept, live, (live + found.temp_size_in_bytes) / 2)


class Compiled(NamedTuple):
    """What the compiler says of a step.

    Attributes:
        needed: bytes one device needs in all.
        temporaries, program: of these; None and 0 when it does not fit.
        collectives: of one step, by kind; {} when it does not fit.
        fits: whether it could be compiled for this device.
    """

    needed: float
    temporaries: float | None
    program: float
    collectives: dict[str, Traffic]
    fits: bool


def compile_step(config: Any, mesh: Any, training: Training) -> Compiled:
    """Compiles the train step of a run for the devices of a mesh.

    Args:
        config: whole configuration; data.batch_size is the global batch.
        mesh: of devices that need not be there.
        training: `make_training` of both.
    """
    batch = abstract_batch(config, mesh)
    compiled = _compile(training.train_step.lower(training.abstract, batch))
    if isinstance(compiled, float):
        arguments = local_bytes((training.abstract, batch))
        return Compiled(arguments + compiled, None, 0.0, {}, fits=False)
    found = sizes(compiled.memory_analysis())
    program = compiled.memory_analysis().generated_code_size_in_bytes
    return Compiled(found.kept + found.held + program, found.held, program,
                    collectives(compiled.as_text(), mesh.size), fits=True)


def loss_temporaries(config: Any, mesh: Any, training: Training) -> float:
    """Bytes one device needs for the objective, its gradient and its diagnostics alone.

    Gaps of the heap are not counted. What the compiler would keep in the chip's own memory (VMEM)
    is: whether a loss fits there changes with the slice, and would hide how its memory grows.
    """
    network = build(config.model)
    batch = abstract_batch(config, mesh)

    def embed(params: Any, stats: Any, *rows: jax.Array) -> Towers:
        towers, _ = network.run_towers(params, stats, *rows, train=False)
        return network.run_heads(params, stats, towers, train=False)[0]

    state = training.abstract
    inputs = batch[:4] if reads_text(config) else (batch.volume, None, None, None)
    towers = jax.eval_shape(embed, state.params, state.stats or {}, *inputs)
    rows = meshes.batch_sharding(mesh)
    towers = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows), towers)
    of = judge(config, mesh)
    names = ("image", "text", "patches", "words", "logits")

    def loss(trained: tuple[dict[str, Any], Any, Any], rest: Towers, batch: Batch) -> Any:
        embedded, bank, params = trained
        judged = of(rest._replace(**embedded), batch.groups, bank, params, batch.labels)
        return judged.objective.total, judged

    shared = {name: state.params[name] for name in ("prototypes", "logit", "cross_attention")
              if name in state.params}
    trained = ({name: getattr(towers, name) for name in names}, state.bank, shared)
    rest = towers._replace(**dict.fromkeys(names))
    told = batch._replace(volume=None, ids=None, mask=None, words=None)
    replicated = meshes.replicated(mesh)
    # Gradients lie as what they are of; XLA would otherwise be free to leave them whole.
    placed = jax.tree.map(lambda x: x.sharding, trained)
    compiled = _compile(jax.jit(jax.value_and_grad(loss, has_aux=True),
                                out_shardings=(replicated, placed)).lower(
                                    trained, rest, told), IN_HBM)
    return (compiled if isinstance(compiled, float)
            else float(sizes(compiled.memory_analysis()).live))


def _compile(lowered: jax.stages.Lowered,
             options: dict[str, Any] | None = None) -> jax.stages.Compiled | float:
    """Compiles; where memory does not suffice, the bytes that are needed."""
    try:
        return lowered.compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        if not _OVERFLOW.search(str(error)):
            raise
        return needed_bytes(str(error))


def needed_bytes(message: str) -> float:
    """Bytes that a refusal of the compiler says a program needs, its arguments left out or not."""
    found = _NEEDED.search(message)
    return float(found[1]) * UNITS[found[2]] if found else float("inf")
