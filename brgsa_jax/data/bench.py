"""How fast a data set reaches the batches of training, beside reading the same volumes as .nii.gz.

The measure is bytes of delivered crops for each second of processor time of all threads: wall-clock
time of a short run is flattered by what was read ahead, and hides how many cores it took.
"""

import itertools
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from brgsa_jax.config import UserError, get_config
from brgsa_jax.data.sources import Source, open_source
from brgsa_jax.data.sources import splits as splits_of

_WARM_UP = 8  # Batches.
_NIFTI_VOLUMES = 4
_SLACK = 1.5  # A step this much longer than the feed's own time for a batch must never wait.


class Rate(NamedTuple):
    """Crops delivered as batches.

    Attributes:
        samples: how many.
        gigabytes: of crops, 10⁹ bytes.
        cpu_seconds: of all threads.
        seconds: wall-clock.
    """

    samples: int
    gigabytes: float
    cpu_seconds: float
    seconds: float

    @property
    def per_core(self) -> float:
        """Gigabytes per second of processor time."""
        return self.gigabytes / max(self.cpu_seconds, 1e-9)


class Bench(NamedTuple):
    """What `bench` measured.

    Attributes:
        shape, crop: voxels of a record and of what is cut from it.
        batch_size, threads: of the feed.
        feed: from the shards.
        nifti: the same volumes from .nii.gz by nibabel, one thread; None for radiographs.
        step_seconds: length of the steps of the test of waiting.
        waited: share of that test in which the step waited for its batch.
    """

    shape: tuple[int, ...]
    crop: tuple[int, ...]
    batch_size: int
    threads: int
    feed: Rate
    nifti: Rate | None
    step_seconds: float
    waited: float


def bench(path: str | Path, *, split: str | None = None, crop: Sequence[int] | None = None,
          batch_size: int = 8, batches: int = 64, threads: int = 2) -> Bench:
    """Measures the feed of a data set as training uses it: shuffled, random crops, tokens.

    Args:
        path: the data set's folder.
        split: by default its first one.
        crop: voxels; by default 7/8 of each axis, as 224 × 224 × 112 of 256 × 256 × 128.
        batch_size: of this process.
        batches: to measure over, after a warm-up.
        threads: that read.

    Raises:
        UserError: no such data set or split, or a crop larger than its volumes.
    """
    source = open_source(path, split or next(iter(splits_of(path))))
    if batch_size > len(source):
        raise UserError(f"a batch of {batch_size} is more than the {len(source)} images of {path}; "
                        "lower the batch size")
    shape = tuple(source.metadata["shape"])
    crop = tuple(crop or (7 * n // 8 or 1 for n in shape))
    if min(batch_size, batches, threads) < 1:
        raise UserError("batch size, batches and threads must be at least 1")
    config = get_config("clip").data
    config.update(path=str(path), crop=crop, batch_size=batch_size, threads=threads)
    feed = _batches(source, config)
    rate = _measure(feed, batches)
    step = _SLACK * rate.seconds / batches
    waited = _waiting(feed, step, min(batches, 16))
    feed.close()
    nifti = _nibabel_rate(source, crop, batch_size) if len(shape) == 3 else None
    return Bench(shape, crop, batch_size, threads, rate, nifti, step, waited)


def _batches(source: Source, config: Any) -> Iterator[Any]:
    from brgsa_jax.data import feed
    from brgsa_jax.data import tokenizer as tok

    tokenizer = tok.train_tokenizer(tok.corpus(source, config), 97)
    return feed.host_batches(source, config, tokenizer, seed=0)


def _measure(batches: Iterator[Any], count: int, warm_up: int = _WARM_UP) -> Rate:
    for _ in range(warm_up):
        next(batches)
    samples = size = 0
    cpu, wall = time.process_time(), time.perf_counter()
    for batch in itertools.islice(batches, count):
        samples += len(batch.volume)
        size += batch.volume.nbytes
    return Rate(samples, size / 1e9, time.process_time() - cpu, time.perf_counter() - wall)


def _waiting(batches: Iterator[Any], step: float, count: int) -> float:
    """Share of the time that a device, busy for `step` seconds a batch, waits for its batch."""
    next(batches)
    waited = 0.0
    started = time.perf_counter()
    for _ in range(count):
        time.sleep(step)
        asked = time.perf_counter()
        next(batches)
        waited += time.perf_counter() - asked
    return waited / (time.perf_counter() - started)


class _Volumes(NamedTuple):
    volume: np.ndarray


def _nibabel_rate(source: Source, crop: Sequence[int], batch_size: int) -> Rate:
    """The same crops from files that nibabel decompresses."""
    import nibabel

    from brgsa_jax.data.feed import random_crop

    with tempfile.TemporaryDirectory() as folder:
        files = []
        for position in range(min(_NIFTI_VOLUMES, len(source))):
            item = source[position]
            # LPS voxels, as nibabel's RAS+ world sees them.
            affine = np.diag([-item["spacing"][0], -item["spacing"][1], item["spacing"][2], 1.0])
            files.append(Path(folder) / f"{position}.nii.gz")
            nibabel.save(nibabel.Nifti1Image(item["volume"], affine), files[-1])
        rng = np.random.default_rng(0)

        def batches() -> Iterator[_Volumes]:
            while True:
                chosen = rng.integers(len(files), size=batch_size)
                volumes = (np.asanyarray(nibabel.load(files[i]).dataobj) for i in chosen)
                yield _Volumes(np.stack([random_crop(volume, crop, rng) for volume in volumes]))

        return _measure(batches(), 1, warm_up=0)
