"""The feed: (seed, step) -> host batch -> global sharded arrays.

Order, crop and caption of every sample are a pure function of the seed and the position in the
run, so a resume starts at any step at once and the global batches do not depend on the number of
processes. The random crop is taken here, on the host, to ship less; window and normalisation run
on the device.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import grain
import jax
import numpy as np

from brgsa_jax.config import UserError
from brgsa_jax.data import tokenizer as tok
from brgsa_jax.data.sources import tune_malloc


class HostBatch(NamedTuple):
    """One process's rows of a global batch, as NumPy arrays.

    Attributes:
        volume: int16 HU [b, X, Y, Z]; ids, mask: int32 [b, T]; groups: int32 [b].
    """

    volume: np.ndarray
    ids: np.ndarray
    mask: np.ndarray
    groups: np.ndarray


def random_crop(volume: np.ndarray, size: tuple[int, int, int],
                rng: np.random.Generator | None) -> np.ndarray:
    """Cuts a box of `size` voxels [X, Y, Z] from a volume; at the centre when `rng` is None.

    Raises:
        UserError: the volume is smaller than the crop.
    """
    free = [have - want for have, want in zip(volume.shape, size, strict=True)]
    if min(free) < 0:
        raise UserError(f"a volume of {volume.shape} voxels is smaller than data.crop="
                        f"{tuple(size)}; lower the crop or rebuild the data set larger")
    corner = [f // 2 if rng is None else int(rng.integers(f + 1)) for f in free]
    cut = tuple(slice(c, c + s) for c, s in zip(corner, size, strict=True))
    return np.ascontiguousarray(volume[cut])


def _sample(record: dict[str, Any], rng: np.random.Generator | None, config: Any,
            tokenizer: tok.Tokenizer) -> HostBatch:
    text = tok.caption(record["findings"], limit=config.sentences, normal=config.normal_caption,
                       rng=rng)
    ids, mask = tokenizer([text])
    return HostBatch(random_crop(record["volume"], tuple(config.crop), rng), ids[0], mask[0],
                     np.int32(tok.group_of(text)))


def host_batches(source: Any, config: Any, tokenizer: tok.Tokenizer, *, seed: int, start: int = 0,
                 process_index: int = 0, process_count: int = 1) -> Iterator[HostBatch]:
    """Iterates one process's batches from step `start`, without end.

    Args:
        source: random-access source of records (`data.sources`).
        config: section `data` of the configuration.
        tokenizer: of the text tower.
        seed: of order and augmentation.
        start: the first step.
        process_index, process_count: which contiguous rows of each global batch to take.

    Raises:
        UserError: the batch does not divide over the processes, or the source is empty.
    """
    if config.batch_size % process_count:
        raise UserError(f"data.batch_size={config.batch_size} does not divide over "
                        f"{process_count} processes; choose a multiple of it")
    if not len(source):
        raise UserError("the training split holds no volume; build the data set again")
    # Before the first large allocation: fresh pages cost more than the reading.
    tune_malloc()
    local = config.batch_size // process_count
    dataset = (
        grain.MapDataset.source(source).seed(seed).shuffle().repeat(None)
        .random_map(lambda record, rng: _sample(record, rng, config, tokenizer))
        # Batches of a process's size, of which each process takes every n-th: the rows of a
        # global batch are then contiguous and in one order for any number of processes.
        .batch(local)[start * process_count + process_index::process_count])
    options = grain.ReadOptions(num_threads=config.threads, prefetch_buffer_size=4)
    return iter(dataset.to_iter_dataset(options))


def eval_batches(source: Any, config: Any, tokenizer: tok.Tokenizer, *, process_index: int = 0,
                 process_count: int = 1) -> Iterator[HostBatch]:
    """Iterates one pass in order, centre crop and unshuffled captions; drops a ragged end."""
    size = config.batch_size
    local = size // process_count
    for start in range(0, len(source) - size + 1, size):
        first = start + process_index * local
        rows = [_sample(source[i], None, config, tokenizer) for i in range(first, first + local)]
        yield HostBatch(*(np.stack(column) for column in zip(*rows, strict=True)))


def to_global(batch: HostBatch, sharding: jax.sharding.NamedSharding) -> HostBatch:
    """Assembles the processes' rows to global arrays sharded over the batch axes."""
    return HostBatch(*(jax.make_array_from_process_local_data(sharding, column)
                       for column in batch))


def global_batches(batches: Iterator[HostBatch],
                   sharding: jax.sharding.NamedSharding) -> Iterator[HostBatch]:
    """Keeps one batch on its way to the devices while the step before it runs."""
    ahead = None
    for batch in batches:
        current, ahead = ahead, to_global(batch, sharding)
        if current is not None:
            yield current
    if ahead is not None:
        yield ahead
