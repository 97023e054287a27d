"""One pass over the records of a data set: what each holds, in a few kilobytes a record.

Nothing here judges; `evals/quality.py` does. Worker processes import this file, so it brings in no
jax.
"""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, NamedTuple

import numpy as np

from brgsa_jax.config import UserError
from brgsa_jax.data import shards
from brgsa_jax.data.sources import IndexRow, Source, record_digest, tune_malloc

BODY = -300  # HU between fat and lung: above it a voxel is counted as body.
SIDES = ("right", "left", "front", "back", "bottom", "top")  # Of an LPS box: x, y, z, low to high.
_SAMPLED = 64  # Voxels looked at along each axis, at most.
_BINS = {"ct": 100, "radiograph": 64}
# Where the classes of voxels between the clamps begin and end.
_BOUNDS = {"ct": (-950, -500, 200), "radiograph": (64, 192)}
_CLASSES = {"ct": ("Lower clamp", "Air", "Lung", "Fat and soft tissue", "Bone", "Upper clamp"),
            "radiograph": ("Black", "Dark", "Middle", "Bright", "White")}
_CELLS = {3: 8, 2: 24}  # Cells of a thumbnail along each axis, by the number of axes.
_CHUNK = 32
Progress = Callable[[int, int], None]


class Scale(NamedTuple):
    """The numbers a data set may hold.

    Attributes:
        kind: "ct" (HU) or "radiograph" (grey values).
        low: the lower clamp, and the value of everything outside the source.
        high: the upper clamp.
    """

    kind: str
    low: int
    high: int

    @classmethod
    def of(cls, preprocess: Mapping[str, Any]) -> "Scale":
        """Reads the scale off the recipe of a data set."""
        if preprocess.get("kind") == "radiograph":
            return cls("radiograph", 0, 255)
        return cls("ct", int(preprocess["low"]), int(preprocess["high"]))

    @property
    def noun(self) -> str:
        """What a record is called."""
        return "volume" if self.kind == "ct" else "image"

    @property
    def edges(self) -> np.ndarray:
        """[bins + 1] rising integers; bin i counts the values in [edges[i], edges[i + 1])."""
        values = self.high - self.low + 1
        bins = min(_BINS[self.kind], values)
        return self.low + np.arange(bins + 1) * values // bins

    @property
    def classes(self) -> dict[str, tuple[int, int]]:
        """{name: (first, last) value} of the classes of voxels, from dark to bright."""
        inner = [min(max(bound, self.low + 1), self.high) for bound in _BOUNDS[self.kind]]
        starts = [self.low, self.low + 1, *inner, self.high, self.high + 1]
        return {name: (first, after - 1) for name, first, after
                in zip(_CLASSES[self.kind], starts[:-1], starts[1:], strict=True)}


class Measured(NamedTuple):
    """What is kept of one record.

    Attributes:
        split, position: where it lies.
        id, patient: as in the record.
        findings: canonical names of the positive findings.
        words: of the report.
        report: hash of the report without case and spacing; empty where there is no report.
        file_spacing: millimetres per voxel of the file, in file order; () where not known.
        file_orientation: axis codes of the file, "" where not known.
        warnings: of the build.
        voxels: hash of the sampled voxels.
        histogram: float32 [bins] shares of the sampled voxels, see `Scale.edges`.
        shares: float32 [classes] shares of the sampled voxels, see `Scale.classes`.
        margins: float32 [axes, 2] share of each axis, below and above, that holds nothing but the
            lower clamp.
        faces: float32 [6] share of each face of the box that is body, as `SIDES`; () for
            radiographs.
        thumbnail: float16 [cells] block means between 0 and 1.
    """

    split: str
    position: int
    id: str
    patient: str
    findings: tuple[str, ...]
    words: int
    report: bytes
    file_spacing: tuple[float, ...]
    file_orientation: str
    warnings: tuple[str, ...]
    voxels: bytes
    histogram: np.ndarray
    shares: np.ndarray
    margins: np.ndarray
    faces: np.ndarray
    thumbnail: np.ndarray


class Damaged(NamedTuple):
    """A record that is not what was built; id and patient are those of the index."""

    split: str
    position: int
    id: str
    patient: str
    reason: str


class Scan(NamedTuple):
    """All records of a data set, in order of split and position."""

    measured: list[Measured]
    damaged: list[Damaged]


def scan(opened: Mapping[str, Source], scale: Scale, *, workers: int | None = None,
         verify: bool = True, progress: Progress | None = None) -> Scan:
    """Reads every record once.

    Args:
        opened: {split: source} of one data set.
        scale: the numbers it may hold.
        workers: processes; by default one for each core this process may use, none for small sets.
        verify: whether to compare each record with its digest.
        progress: called with the numbers of records done and in all.

    Raises:
        UserError: a worker was killed.
    """
    total = sum(len(source) for source in opened.values())
    pieces = [(source, start, source.index[start:start + _CHUNK], scale, verify)
              for source in opened.values() for start in range(0, len(source), _CHUNK)]
    if workers is None and total * math.prod(next(iter(opened.values())).metadata["shape"]) < 2**31:
        workers = 1  # Starting processes would take longer than the work.
    try:
        found = [entry for piece in _run(pieces, shards.worker_count(workers, len(pieces)),
                                         total, progress) for entry in piece]
    except BrokenProcessPool as error:
        raise UserError("a worker process was killed, most likely for memory; check the data set "
                        "with fewer workers") from error
    damaged = [entry for entry in found if isinstance(entry, Damaged)]
    told = {(entry.split, entry.position) for entry in damaged}
    for split, source in opened.items():
        for position, reason in source.broken_shards().items():
            row = source.index[position]
            if (split, position) not in told:
                damaged.append(Damaged(split, position, row.id, row.patient, reason))
    return Scan([entry for entry in found if isinstance(entry, Measured)], damaged)


def _run(pieces: Sequence[tuple[Any, ...]], workers: int, total: int,
         progress: Progress | None) -> list[list[Measured | Damaged]]:
    results: list[list[Measured | Damaged]] = [[] for _ in pieces]
    running: dict[Future, int] = {}
    done = 0

    def settle(limit: int) -> None:
        nonlocal done
        while len(running) > limit:
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                number = running.pop(future)
                results[number] = future.result()
                done += len(results[number])
                if progress is not None:
                    progress(done, total)

    with shards.pool(workers) as submit:
        for number, piece in enumerate(pieces):
            settle(2 * workers - 1 if workers > 1 else 0)
            running[submit(_measure_piece, *piece)] = number
        settle(0)
    return results


def _measure_piece(source: Source, start: int, rows: Sequence[IndexRow], scale: Scale,
                   verify: bool) -> list[Measured | Damaged]:
    """Measures consecutive records; a record that cannot be read is one damaged entry."""
    tune_malloc()
    spacing = source.metadata["spacing"]
    found: list[Measured | Damaged] = []
    for position, row in enumerate(rows, start=start):
        try:
            item = source.item(position)
            reason = _difference(item, row, spacing, verify)
            entry = None if reason else measure(item, source.split, position, scale)
        # Damage shows as whatever the readers of shards, messages, text or JSON raise.
        except Exception as error:
            cause = type(error.__cause__ or error).__name__
            reason, entry = f"it cannot be read ({cause})", None
        found.append(entry or Damaged(source.split, position, row.id, row.patient, reason))
    return found


def _difference(item: Mapping[str, Any], row: IndexRow, spacing: Sequence[float],
                verify: bool) -> str:
    """What is wrong with a record beside its row of the index; "" if nothing."""
    if item["id"] != row.id:
        return "its id is not that of the index"
    if (item["patient"], tuple(item["findings"])) != (row.patient, row.findings):
        return "its patient or findings are not those of the index"
    if not np.allclose(item["spacing"], spacing or item["spacing"], rtol=1e-4):
        return "its spacing is not that of the recipe"
    if verify and record_digest(item) != row.digest:
        return "its content has not the digest it was built with"
    return ""


def measure(item: Mapping[str, Any], split: str, position: int, scale: Scale) -> Measured:
    """Reduces a record of `Source.item` to what the checks need.

    Voxels are looked at in steps that leave at most 64 along each axis, faces in full.
    """
    volume, origin = item["volume"], item["provenance"]
    sample = np.ascontiguousarray(volume[tuple(slice(None, None, -(-n // _SAMPLED))
                                               for n in volume.shape)])
    counts = np.bincount(np.clip(sample, scale.low, scale.high).ravel().astype(np.intp) - scale.low,
                         minlength=scale.high - scale.low + 1) / sample.size
    report = " ".join(item["report"].casefold().split())
    return Measured(
        split=split, position=position, id=item["id"], patient=item["patient"],
        findings=tuple(item["findings"]), words=len(report.split()),
        report=hashlib.blake2b(report.encode(), digest_size=16).digest() if report else b"",
        file_spacing=tuple(float(s) for s in origin.get("spacing") or ()),
        file_orientation=str(origin.get("orientation") or ""),
        warnings=tuple(origin.get("warnings") or ()),
        voxels=hashlib.blake2b(sample, digest_size=16).digest(),
        histogram=np.add.reduceat(counts, scale.edges[:-1] - scale.low).astype(np.float32),
        shares=np.array([counts[first - scale.low:last + 1 - scale.low].sum()
                         for first, last in scale.classes.values()], np.float32),
        margins=_margins(sample > scale.low),
        faces=_faces(volume) if scale.kind == "ct" else np.zeros(0, np.float32),
        thumbnail=_thumbnail(sample, scale))


def _margins(filled: np.ndarray) -> np.ndarray:
    """How far from both ends of each axis the first filled plane lies, as a share of the axis."""
    margins = np.zeros((filled.ndim, 2), np.float32)
    for axis, size in enumerate(filled.shape):
        planes, = np.nonzero(filled.any(axis=tuple(a for a in range(filled.ndim) if a != axis)))
        margins[axis] = (planes[0] / size, 1 - (planes[-1] + 1) / size) if planes.size else (1, 0)
    return margins


def _faces(volume: np.ndarray) -> np.ndarray:
    return np.array([np.mean(volume.take(end, axis) > BODY)
                     for axis in range(3) for end in (0, -1)], np.float32)


def _thumbnail(sample: np.ndarray, scale: Scale) -> np.ndarray:
    """Means over equal blocks, brought to 0 for the lower clamp and 1 for the upper one."""
    small = np.clip(sample, scale.low, scale.high).astype(np.float32)
    for axis, size in enumerate(sample.shape):
        starts = np.unique(np.arange(_CELLS[sample.ndim]) * size // _CELLS[sample.ndim])
        lengths = np.diff([*starts, size]).reshape([-1 if a == axis else 1
                                                    for a in range(sample.ndim)])
        small = np.add.reduceat(small, starts, axis=axis) / lengths
    return ((small - scale.low) / (scale.high - scale.low)).astype(np.float16).ravel()
