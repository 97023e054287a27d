"""Bytes of one device: what the state takes, exactly, and what a step takes besides."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from brgsa_jax import mesh as meshes
from brgsa_jax.config import GROUPS, classifies
from brgsa_jax.train.step import Batch, TrainState


class Memory(NamedTuple):
    """Bytes of one device in a train step.

    Attributes:
        parameters, bank, statistics, optimiser, average: of the state.
        batch: of one batch.
        temporaries: what a step needs besides: gradients, activations, exchanged blocks; None
            where the compiler did not get so far.
        padding: by which the compiler's tiles are larger than state and batch.
        program: the compiled code.
        peak: all together.
        usable: what a program can have.
        total: what the device has.
    """

    parameters: float
    bank: float
    statistics: float
    optimiser: float
    average: float
    batch: float
    temporaries: float | None
    padding: float
    program: float
    peak: float
    usable: float
    total: float

    @property
    def fits(self) -> bool:
        """Whether a step runs."""
        return self.peak <= self.usable


def local_bytes(tree: Any) -> int:
    """Bytes of one device's shards of a tree of abstract arrays with shardings."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
               for leaf in jax.tree.leaves(tree))


def state_parts(state: TrainState, batch: Batch) -> dict[str, int]:
    """Bytes of one device's shards of state and batch, by the names of `Memory`."""
    return {"parameters": local_bytes(state.params), "bank": local_bytes(state.bank),
            "statistics": local_bytes(state.stats),
            "optimiser": local_bytes((state.opt, state.lr_scale, state.step)),
            "average": local_bytes(state.ema), "batch": local_bytes(batch)}


def abstract_batch(config: Any, mesh: Any) -> Batch:
    """A global batch of shapes, laid over a mesh."""
    rows, tokens = config.data.batch_size, config.model.text.max_tokens
    sharding = meshes.batch_sharding(mesh)

    def array(*shape: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((rows, *shape), dtype, sharding=sharding)

    return Batch(volume=array(*config.data.crop, dtype=jnp.int16), ids=array(tokens),
                 mask=array(tokens), words=array(tokens), groups=array(len(GROUPS)),
                 labels=array(len(config.model.classes), dtype=jnp.int8)
                 if classifies(config) else None)
