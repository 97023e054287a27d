"""Records of uncompressed array_record shards, straight from the page cache into one buffer.

The library checks a hash and copies a record several times on its way to Python, which for volumes
of 16 MB costs six times what the copy out of the page cache does and is most of what a feed costs.
Shards with one stored record a chunk, as `data/records.py` writes them, need none of that: the
record lies in the file as it is, but for a header of 24 bytes at every multiple of 64 KiB. All
other shards are left to the library. The layout is that of
https://github.com/google/riegeli/blob/master/doc/riegeli_records_file_format.md
"""

import collections
import os
import struct
import weakref
from pathlib import Path
from typing import NamedTuple

import numpy as np

_BLOCK, _BLOCK_HEADER = 1 << 16, 24
_CHUNK_HEADER = struct.Struct("<QQQQQ")  # Hash, size, hash of the data, type and count, decoded.
_SIGNATURE, _SIMPLE, _STORED = ord("s"), ord("r"), 0
_PREFIX = 32  # Bytes that hold the two sizes before a stored record.
_SPARE = 1 << 16  # Records of one data set differ by their texts.
_MOST_PIECES = 1000  # Below the 1024 that Linux reads at once.


# Memory of records that nobody looks at any more: fresh pages cost as much as the reading.
_free: collections.deque[bytearray] = collections.deque(maxlen=32)


class Place(NamedTuple):
    """Where a record's bytes begin in the file, and how many they are without block headers."""

    start: int
    size: int


class PlainReader:
    """Random access to the records of one file; safe to share between threads.

    Attributes:
        path: the file.
        places: of its records, in order.
    """

    def __init__(self, path: Path, places: list[Place]):
        self.path = path
        self.places = places
        self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self._file).atexit = False

    def read(self, position: int) -> memoryview:
        """Returns the bytes of a record, read-only.

        Raises:
            ValueError: the file has become shorter.
        """
        start, size = self.places[position]
        record = memoryview(_buffer(size))
        skipped = memoryview(bytearray(_BLOCK_HEADER))
        pieces, done, place = [], 0, start
        while done < size:
            room = -place % _BLOCK
            if not room:
                pieces.append(skipped)
                place += _BLOCK_HEADER
                room = _BLOCK - _BLOCK_HEADER
            count = min(room, size - done)
            pieces.append(record[done:done + count])
            done, place = done + count, place + count
        for first in range(0, len(pieces), _MOST_PIECES):
            start += self._fill(pieces[first:first + _MOST_PIECES], start)
        return record.toreadonly()

    def _fill(self, pieces: list[memoryview], start: int) -> int:
        wanted = sum(map(len, pieces))
        got = os.preadv(self._file, pieces, start)
        if got != wanted:
            raise ValueError("it is cut short")
        return wanted


def _buffer(size: int) -> np.ndarray:
    """Bytes whose memory is used again when the last view of them is gone."""
    try:
        memory = _free.pop()
    except IndexError:
        memory = bytearray()
    if not size <= len(memory) <= 2 * size + _SPARE:
        memory = bytearray(size + _SPARE)
    array = np.frombuffer(memory, np.uint8, size)
    weakref.finalize(array, _free.append, memory).atexit = False
    return array


def open_plain(path: Path, records: int) -> PlainReader | None:
    """Opens a shard whose records are stored one a chunk; None if they are stored otherwise.

    Args:
        path: the file.
        records: how many it holds.
    """
    with path.open("rb", buffering=0) as stream:
        file, end = stream.fileno(), os.fstat(stream.fileno()).st_size
        if _header(file, 0)[1:] != (0, _SIGNATURE, 0):
            return None
        places, position = [], _BLOCK_HEADER + _CHUNK_HEADER.size
        for _ in range(records):
            body, size, kind, count = _header(file, position)
            if (kind, count) != (_SIMPLE, 1):
                return None
            prefix = _pread(file, body, _PREFIX)
            before = _sizes_length(prefix)
            if before is None or before[0] + before[1] != size:
                return None
            places.append(Place(_advance(body, before[0]), before[1]))
            position = _advance(body, size)
            if position > end:
                return None
    return PlainReader(path, places)


def _header(file: int, position: int) -> tuple[int, int, int, int]:
    """Where a chunk's data begins, its size, type and number of records."""
    content = _pread(file, position, _CHUNK_HEADER.size)
    if len(content) < _CHUNK_HEADER.size:
        return 0, 0, 0, 0
    _, size, _, kind, _ = _CHUNK_HEADER.unpack(content)
    return _advance(position, _CHUNK_HEADER.size), size, kind & 0xFF, kind >> 8


def _sizes_length(prefix: bytes) -> tuple[int, int] | None:
    """Bytes before a stored record, and of it, from the start of its chunk; None if not stored."""
    if not prefix or prefix[0] != _STORED:
        return None
    count, place = _varint(prefix, 1)
    size, after = _varint(prefix, place)
    return (after, size) if place and after == place + count else None


def _varint(content: bytes, start: int) -> tuple[int, int]:
    """A number and the place after it; (0, 0) where none ends within ten bytes."""
    value = 0
    for place in range(start, min(len(content), start + 10)):
        value |= (content[place] & 0x7F) << 7 * (place - start)
        if content[place] < 0x80:
            return value, place + 1
    return 0, 0


def _pread(file: int, position: int, size: int) -> bytes:
    """Reads bytes of a chunk, without the block headers between them."""
    content = b""
    while len(content) < size:
        position += _BLOCK_HEADER * (position % _BLOCK == 0)
        piece = os.pread(file, min(size - len(content), _BLOCK - position % _BLOCK), position)
        if not piece:
            break
        content, position = content + piece, position + len(piece)
    return content


def _advance(position: int, size: int) -> int:
    """The place in the file `size` bytes of a chunk after `position`."""
    position += _BLOCK_HEADER * (position % _BLOCK == 0)
    while size:
        count = min(size, _BLOCK - position % _BLOCK)
        position, size = position + count, size - count
        if size:
            position += _BLOCK_HEADER
    return position
