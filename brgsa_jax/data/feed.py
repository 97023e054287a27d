"""The feed: (seed, step) -> host batch -> arrays on the devices.

Order, crop and caption of every sample are a pure function of the seed and the position in the
run, so a resume starts at any step at once and the global batches do not depend on the number of
processes. The random crop is taken here, on the host, to ship less; window and normalisation run
on the device.
"""

import collections
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import grain
import numpy as np

from brgsa_jax.config import UserError
from brgsa_jax.data import tokenizer as tok
from brgsa_jax.data.sources import tune_malloc

Placed = TypeVar("Placed")


class HostBatch(NamedTuple):
    """One process's rows of a global batch, as NumPy arrays.

    Attributes:
        volume: int16 HU [b, X, Y, Z], or uint8 or int16 radiographs [b, H, W].
        ids, mask: int32 [b, T].
        words: int32 [b, T], the word slot of every token (`Tokenizer.words`); -1 for pads.
        groups: int32 [b, 3], see `groups_of`.
        labels: int8 [b, P], 1, 0, or -1 for unknown; None of records without labels.
    """

    volume: np.ndarray
    ids: np.ndarray
    mask: np.ndarray
    words: np.ndarray
    groups: np.ndarray
    labels: np.ndarray | None = None


def random_crop(volume: np.ndarray, size: Sequence[int],
                rng: np.random.Generator | None) -> np.ndarray:
    """Cuts a box of `size` voxels from a volume or radiograph; at the centre when `rng` is None.

    Args:
        volume: [X, Y, Z] or [H, W].
        size: as many numbers as the volume has axes.
        rng: draws the corner.

    Returns:
        A view of `size`.

    Raises:
        UserError: the volume has other axes than the crop, or is smaller.
    """
    size = tuple(size)
    if len(size) != volume.ndim:
        raise UserError(f"data.crop={size} has {len(size)} numbers, the data set's images are "
                        f"{'×'.join(map(str, volume.shape))}; give one number an axis")
    free = [have - want for have, want in zip(volume.shape, size, strict=True)]
    if min(free) < 0:
        raise UserError(f"a volume of {volume.shape} voxels is smaller than data.crop={size}; "
                        "lower the crop or rebuild the data set larger")
    corner = [f // 2 if rng is None else int(rng.integers(f + 1)) for f in free]
    cut = tuple(slice(c, c + s) for c, s in zip(corner, size, strict=True))
    return volume[cut]


def groups_of(record: Mapping[str, Any], sentences: Sequence[str]) -> np.ndarray:
    """Numbers what a record shares with others, to tell false negatives of a contrast.

    Args:
        record: `id`, `report` and `findings` are read.
        sentences: of its caption.

    Returns:
        int32 [3]: equal for the same caption sentences in any order, for the same report (but for
        white space; an empty one equals no other), and for the same set of findings.
    """
    report = " ".join(record["report"].split())
    # No report without line breaks hashes like two parts.
    own = [report] if report else ["", record["id"]]
    return np.array([tok.group_of(parts) for parts in (sentences, own, set(record["findings"]))],
                    np.int32)


def _sample(record: Mapping[str, Any], rng: np.random.Generator | None, config: Any,
            tokenizer: tok.Tokenizer) -> HostBatch:
    sentences = tok.caption_sentences(record, config, rng)
    ids, mask = tokenizer([" ".join(sentences)])
    return HostBatch(random_crop(record["volume"], config.crop, rng), ids[0], mask[0],
                     tokenizer.words(ids)[0], groups_of(record, sentences), record.get("labels"))


def _stack(rows: Sequence[Sequence[Any]]) -> list[np.ndarray | None]:
    """Stacks samples field by field; a field that they lack stays None."""
    return [None if column[0] is None else np.stack(column) for column in zip(*rows, strict=True)]


AHEAD = 2  # Batches that are read while one is used.


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
        UserError: the batch does not divide over the processes, or the source is empty. The
            iterator raises it too, where a record does not fit `data.crop`.
    """
    if config.batch_size % process_count:
        raise UserError(f"data.batch_size={config.batch_size} does not divide over "
                        f"{process_count} processes; choose a multiple of it")
    if not len(source):
        raise UserError("the training split holds no volume; build the data set again")
    # Before the first large allocation: fresh pages cost more than the reading.
    tune_malloc()
    samples = (grain.MapDataset.source(source).seed(seed).shuffle().repeat(None)
               .random_map(lambda record, rng: _sample(record, rng, config, tokenizer)))
    local = config.batch_size // process_count
    # The rows of a global batch are in one order for any number of processes.
    starts = (step * config.batch_size + process_index * local for step in itertools.count(start))
    return _read_ahead(samples, starts, local, config)


def _read_ahead(samples: Any, starts: Iterator[int], rows: int, config: Any
                ) -> Iterator[HostBatch]:
    """Yields batches of consecutive samples; threads read them and copy each into its row."""
    first = next(starts)
    dtype = samples[first].volume.dtype

    def begin(first: int) -> tuple[np.ndarray, list[Future]]:
        # Here and not in a thread: the C library would map and clear it anew for every batch.
        volumes = np.empty((rows, *config.crop), dtype)

        def fill(row: int) -> HostBatch:
            sample = samples[first + row]
            volumes[row] = sample.volume
            return sample._replace(volume=None)

        return volumes, [pool.submit(fill, row) for row in range(rows)]

    pool = ThreadPoolExecutor(config.threads or 1, "feed")
    try:
        ahead = collections.deque(map(begin, [first, *itertools.islice(starts, AHEAD - 1)]))
        while True:
            volumes, reading = ahead.popleft()
            rest = [future.result()[1:] for future in reading]
            ahead.append(begin(next(starts)))
            yield HostBatch(volumes, *_stack(rest))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def eval_batches(source: Any, config: Any, tokenizer: tok.Tokenizer, *, process_index: int = 0,
                 process_count: int = 1) -> Iterator[HostBatch]:
    """Iterates one pass in order, centre crop and unshuffled captions; drops a ragged end."""
    size = config.batch_size
    local = size // process_count
    for start in range(0, len(source) - size + 1, size):
        first = start + process_index * local
        rows = [_sample(source[i], None, config, tokenizer) for i in range(first, first + local)]
        yield HostBatch(*_stack(rows))


def global_batches(batches: Iterator[HostBatch],
                   place: Callable[[HostBatch], Placed]) -> Iterator[Placed]:
    """Keeps one batch on its way to the devices while the step before it runs.

    Args:
        batches: from `host_batches`.
        place: puts a batch on the devices; see `mesh.place`.
    """
    ahead = None
    for batch in batches:
        current, ahead = ahead, place(batch)
        if current is not None:
            yield current
    if ahead is not None:
        yield ahead
