"""Random access to the images and reports of a data set on disk, without TensorFlow or JAX.

A data set is a folder made by `data/builders.py`: array_record shards of `tf.train.Example`
records that `tfds.builder_from_directory(...).as_data_source(split)` reads too, `dataset.json` with
the recipe and the fingerprints, and `index_SPLIT.jsonl` with the id, patient and findings of each
record. Records are decoded here rather than by TFDS so that a volume costs no copy and a crop only
its own.
"""

import ctypes
import hashlib
import json
import operator
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from brgsa_jax.config import UserError
from brgsa_jax.data.plain_reader import open_plain

FORMAT = 1
DATASET_FILE = "dataset.json"
STAGING = ".staging"
_DTYPES = ("int16", "uint8")
_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5


class IndexRow(NamedTuple):
    """What is known of a record without reading it.

    Attributes:
        id: the record's id, unique in the data set.
        patient: the patient's id.
        findings: canonical names of the positive findings.
        digest: hexadecimal SHA-256 of the record's content (`record_digest`).
    """

    id: str
    patient: str
    findings: tuple[str, ...]
    digest: str


class Source:
    """One split of a data set: `len(source)` records, each readable by its position.

    Safe to share between threads; pickles to its path, so workers started by spawn open their own
    readers.

    Attributes:
        path: the data set's folder.
        split: "train", "valid" or "test".
    """

    def __init__(self, path: str | Path, split: str = "train"):
        """Opens a split.

        Args:
            path: the data set's folder.
            split: the name of a split in it.

        Raises:
            UserError: the folder holds no finished data set, or not this split.
        """
        self.path = Path(path)
        self.split = split
        dataset = read_dataset_file(self.path)
        if split not in dataset["splits"]:
            choices = ", ".join(dataset["splits"])
            raise UserError(f"{self.path} has no split {split!r}; choose one of {choices}")
        self._dataset = dataset
        self._record = dataset["splits"][split]
        self._shape = tuple(dataset["preprocess"]["shape"])
        self._dtype = dtype_of(dataset["preprocess"])
        self._files = [self.path / shard["file"] for shard in self._record["shards"]]
        missing = [file.name for file in self._files if not file.is_file()]
        if missing:
            raise UserError(f"{self.path} lacks {', '.join(missing[:3])}; copy the folder again or "
                            "build it anew")
        self._ends = np.cumsum([shard["records"] for shard in self._record["shards"]])
        self._readers: list[Any] = [None] * len(self._files)
        self._lock = threading.Lock()
        self._index: tuple[IndexRow, ...] | None = None

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, position: int) -> dict[str, Any]:
        """Returns the record at `position`; see `item`."""
        return self.item(position)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self.item(position) for position in range(len(self)))

    def __repr__(self) -> str:
        return f"Source({str(self.path)!r}, {self.split!r}, {len(self)} records)"

    def __reduce__(self) -> tuple[Any, ...]:
        return Source, (self.path, self.split)

    @property
    def fingerprint(self) -> str:
        """Hexadecimal SHA-256 of this split's content in order, stored when it was built.

        It covers ids, patients, images, reports, findings, boxes and spacing, not file names,
        shards or compression, so it is the same on every machine.
        """
        return self._record["fingerprint"]

    @property
    def metadata(self) -> dict[str, Any]:
        """The split's name, finding names, preprocess record and builder version, as a new dict.

        Keys: `name`, `source`, `split`, `records`, `findings` (canonical names, fixed order),
        `preprocess` (see `volume.Preprocess` and `image2d.Radiograph`), `spacing`, `shape`,
        `builder_version`, `request`, `fingerprint` (of the split), `dataset_fingerprint`.
        """
        dataset = self._dataset
        return json.loads(json.dumps({
            "name": dataset["name"], "source": dataset["source"], "split": self.split,
            "records": len(self), "findings": dataset["findings"],
            "preprocess": dataset["preprocess"], "spacing": dataset["preprocess"]["spacing"],
            "shape": dataset["preprocess"]["shape"], "builder_version": dataset["builder_version"],
            "request": dataset["request"], "fingerprint": self.fingerprint,
            "dataset_fingerprint": dataset["fingerprint"]}))

    @property
    def index(self) -> tuple[IndexRow, ...]:
        """Ids, patients and findings of all records in order, without reading any volume."""
        if self._index is None:
            file = self.path / index_file(self.split)
            try:
                rows = map(json.loads, file.read_text(encoding="utf-8").splitlines())
                index = tuple(IndexRow(row["id"], row["patient"], tuple(row["findings"]),
                                       row["digest"]) for row in rows)
                if len(index) != len(self):
                    raise ValueError(f"it has {len(index)} rows for {len(self)} records")
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise UserError(f"{file} cannot be read ({error!r}); copy the folder again or "
                                "build it anew") from error
            self._index = index
        return self._index

    def item(self, position: int, origin: Sequence[int] | None = None,
             size: Sequence[int] | None = None) -> dict[str, Any]:
        """Reads one record.

        Args:
            position: 0 <= position < len(self), or negative from the end.
            origin: first voxel of a crop, a number for each axis; None for the whole image.
            size: voxels of the crop; given exactly when `origin` is.

        Returns:
            `id`, `patient`, `report`: str; `volume`: int16 HU [X, Y, Z], or grey levels of a
            radiograph, uint8 [H, W]: a read-only view of the record, or a contiguous writable copy
            of the crop; `findings`: tuple of canonical names; `boxes`:
            {finding: [(x0, y0, z0, x1, y1, z1), ...]} in voxels of the whole volume; `spacing`:
            (x, y, z) millimetres, () of a radiograph; `provenance`: dict of the file the image came
            from.

        Raises:
            IndexError: no such position.
            ValueError: the crop leaves the image.
        """
        fields = parse_example(self._read(position))
        volume = self._image(fields)
        if origin is not None or size is not None:
            volume = _crop(volume, origin, size)
        boxes = json.loads(_text(fields["boxes"]))
        return {
            "id": _text(fields["id"]), "patient": _text(fields["patient"]), "volume": volume,
            "report": _text(fields["report"]),
            "findings": tuple(str(name, "utf-8") for name in fields["findings"]),
            "boxes": {name: [tuple(box) for box in found] for name, found in boxes.items()},
            "spacing": tuple(float(s) for s in fields["spacing"]),
            "provenance": json.loads(_text(fields["provenance"]))}

    def volume_crop(self, position: int, origin: Sequence[int], size: Sequence[int]) -> np.ndarray:
        """Returns `size` voxels or pixels from `origin` on, a contiguous copy; see `item`."""
        return _crop(self._image(parse_example(self._read(position))), origin, size)

    def _image(self, fields: Mapping[str, list[Any]]) -> np.ndarray:
        content = fields["volume"][0]
        if len(content) != self._dtype.itemsize * int(np.prod(self._shape)):
            raise UserError(f"a record of {self.path} holds {len(content)} bytes, which are not "
                            f"{self._shape} values as {DATASET_FILE} says; copy the folder again "
                            "or build it anew")
        return np.frombuffer(content, self._dtype).reshape(self._shape)

    def broken_shards(self) -> dict[int, str]:
        """Returns {position of its first record: what is wrong} of shards that are not whole.

        Reading records does not find this: TFDS and the library need the end of a file as well.
        """
        from array_record.python import array_record_module

        broken, first = {}, 0
        for file, shard in zip(self._files, self._record["shards"], strict=True):
            try:
                reader = array_record_module.ArrayRecordReader(str(file))
                if reader.num_records() != shard["records"]:
                    broken[first] = f"its shard {file.name} holds {reader.num_records()} records"
            except (RuntimeError, ValueError):
                broken[first] = f"its shard {file.name} is cut short or damaged at its end"
            first += shard["records"]
        return broken

    def verify(self) -> None:
        """Reads every record and compares it with its digest.

        Raises:
            UserError: a record differs from what was built.
        """
        if chain_digests(self.split, (row.digest for row in self.index)) != self.fingerprint:
            raise UserError(f"{self.path / index_file(self.split)} is not what was built; copy the "
                            "folder again or build it anew")
        for row, item in zip(self.index, self, strict=True):
            if record_digest(item) != row.digest:
                raise UserError(f"record {row.id!r} of {self.path} is not what was built; copy the "
                                "folder again or build it anew")

    def _read(self, position: int) -> bytes | memoryview:
        position = operator.index(position)
        if position < 0:
            position += len(self)
        if not 0 <= position < len(self):
            raise IndexError(f"{self!r} has no record {position}")
        shard = int(np.searchsorted(self._ends, position, side="right"))
        first = int(self._ends[shard - 1]) if shard else 0
        try:
            return self._reader(shard)(position - first)
        except (ValueError, RuntimeError, IndexError) as error:
            reason = str(error).splitlines()[0][:200]
            raise UserError(f"record {position} of {self._files[shard]} cannot be read ({reason}); "
                            "copy the folder again or build it anew") from error

    def _reader(self, shard: int) -> Callable[[int], bytes | memoryview]:
        """Returns what reads a record of a shard by its position in it."""
        with self._lock:
            if self._readers[shard] is None:
                records = self._record["shards"][shard]["records"]
                plain = open_plain(self._files[shard], records)
                self._readers[shard] = plain.read if plain else _library_reader(self._files[shard])
            return self._readers[shard]


class Selection:
    """Some records of a split, in the order given; all else is as in the split."""

    def __init__(self, source: Any, positions: Sequence[int]) -> None:
        """Takes records of a split.

        Args:
            source: a split; see `Source`.
            positions: which of its records; one may come several times.
        """
        self._source, self._positions = source, list(positions)

    def __len__(self) -> int:
        return len(self._positions)

    def __getitem__(self, position: int) -> dict[str, Any]:
        return self._source[self._positions[position]]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[position] for position in range(len(self)))

    @property
    def path(self) -> Path:
        """The data set's folder."""
        return self._source.path

    @property
    def metadata(self) -> Mapping[str, Any]:
        """That of the split; see `Source.metadata`."""
        return self._source.metadata


def _library_reader(file: Path) -> Callable[[int], bytes]:
    from array_record.python import array_record_module

    # Random access gains nothing from reading ahead, and its threads cost.
    reader = array_record_module.ArrayRecordReader(
        str(file), options="readahead_buffer_size:0", file_reader_buffer_size=32768)

    def read(position: int) -> bytes:
        record = reader.read([position])[0]
        if not record:
            raise ValueError("it is cut short or damaged")
        return record

    return read


def open_source(path: str | Path, split: str = "train") -> Source:
    """Opens a split of a data set made by `brgsa data build`.

    Args:
        path: the data set's folder.
        split: "train", "valid" or "test".

    Raises:
        UserError: the folder holds no finished data set, or not this split.
    """
    return Source(path, split)


def splits(path: str | Path) -> dict[str, int]:
    """Returns {split: number of records} of a data set's folder."""
    dataset = read_dataset_file(Path(path))
    return {name: sum(shard["records"] for shard in split["shards"])
            for name, split in dataset["splits"].items()}


def read_dataset_file(path: Path) -> dict[str, Any]:
    """Reads and checks `dataset.json` of a data set's folder.

    Raises:
        UserError: it is missing, unreadable or of another format.
    """
    file = path / DATASET_FILE
    if not file.is_file():
        if (path / STAGING).is_dir():
            raise UserError(f"{path} holds an unfinished build; run the same `brgsa data build` "
                            "again and it continues")
        raise UserError(f"{path} is no data set (it has no {DATASET_FILE}); make one with `brgsa "
                        "data build`")
    try:
        dataset = json.loads(file.read_text(encoding="utf-8"))
        known = dataset["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is damaged ({error}); build the data set anew") from error
    if known != FORMAT:
        raise UserError(f"{file} has format {known}, this version reads {FORMAT}; build the data "
                        "set anew")
    problem = _problem(dataset)
    if problem:
        raise UserError(f"{file} is damaged ({problem}); copy the folder again or build it anew")
    return dataset


def _problem(dataset: Mapping[str, Any]) -> str:
    """What keeps `dataset.json` from being read; "" if nothing does."""
    try:
        for key in ("name", "source", "builder_version", "fingerprint"):
            if not isinstance(dataset[key], str):
                return f"{key} is no text"
        for split in dataset["splits"].values():
            for shard in split["shards"]:
                if not (isinstance(shard["file"], str) and Path(shard["file"]).name == shard["file"]
                        and type(shard["records"]) is int and shard["records"] > 0):
                    return "a shard is no file with records"
            if not split["shards"] or not isinstance(split["fingerprint"], str):
                return "a split has no shards or no fingerprint"
        recipe = dataset["preprocess"]
        if not all(type(n) is int and n > 0 for n in recipe["shape"]) or not all(
                isinstance(s, (int, float)) and s > 0 for s in recipe["spacing"]):
            return "its recipe has no shape and spacing"
        dataset["request"], [str(name) for name in dataset["findings"]]
    except (KeyError, TypeError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def index_file(split: str) -> str:
    """The name of a split's index file."""
    return f"index_{split}.jsonl"


def dtype_of(recipe: Mapping[str, Any]) -> np.dtype:
    """Returns the type of the values that a recipe stores, little-endian; int16 if it names none.

    Raises:
        UserError: no data set holds such values.
    """
    name = recipe.get("dtype", "int16")
    if name not in _DTYPES:
        raise UserError(f"images of the type {name!r} are not known, only {' and '.join(_DTYPES)}; "
                        "build the data set anew")
    return np.dtype(name).newbyteorder("<")


def record_digest(record: Mapping[str, Any]) -> str:
    """Hashes what a model can see of a record, independent of how it is stored.

    Args:
        record: `id`, `patient`, `report`, `findings`, `boxes`, `spacing` and `volume` of `item`.

    Returns:
        Hexadecimal SHA-256.
    """
    volume = np.asarray(record["volume"])
    grey = volume.dtype == np.uint8
    text = json.dumps([record["id"], record["patient"], record["report"], list(record["findings"]),
                       {name: [[float(v) for v in box] for box in found]
                        for name, found in record["boxes"].items()},
                       # Spacing is stored as float32.
                       [float(np.float32(s)) for s in record["spacing"]],
                       # Digests of HU, the first kind there was, name no type.
                       list(volume.shape), *(["uint8"] if grey else [])],
                      sort_keys=True, ensure_ascii=True)
    digest = hashlib.sha256(text.encode("ascii"))
    digest.update(np.ascontiguousarray(volume, "u1" if grey else "<i2").data)
    return digest.hexdigest()


def chain_digests(name: str, digests: Iterator[str] | Sequence[str]) -> str:
    """Hashes digests in order, under a name."""
    chain = hashlib.sha256(f"brgsa {FORMAT} {name}\n".encode())
    for digest in digests:
        chain.update(digest.encode() + b"\n")
    return chain.hexdigest()


def tune_malloc() -> bool:
    """Lets glibc keep and reuse the memory of large records; call it before the first read.

    By default every 16 MB record is a fresh mmap whose pages fault in one by one, which costs more
    than the read itself (44 against 12 ms a record, measured). Affects the whole process and lasts;
    feed workers call it too.

    Returns:
        Whether the C library took all three settings; False where it is not glibc.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    max_mmaps, trim_threshold, top_pad = -4, -1, -2
    return all([mallopt(max_mmaps, 0), mallopt(trim_threshold, 2**31 - 1),
                mallopt(top_pad, 64 << 20)])


def parse_example(record: bytes | memoryview) -> dict[str, list[Any]]:
    """Reads a serialised `tf.train.Example` without copying its byte strings.

    Args:
        record: the serialised message: Example{1: Features{1: map<string, Feature>}}, where Feature
            is one of bytes_list (1), float_list (2) and int64_list (3).

    Returns:
        {feature: values}; byte strings are memoryviews of `record`.

    Raises:
        ValueError: the message is cut short or not an Example.
    """
    result: dict[str, list[Any]] = {}
    for _, features in _messages(memoryview(record), 1):
        for _, entry in _messages(features, 1):
            pair = dict(_messages(entry, 1, 2))
            if 1 in pair:
                result[str(pair[1], "utf-8")] = _feature_values(pair.get(2, memoryview(b"")))
    return result


def _feature_values(feature: memoryview) -> list[Any]:
    for kind, values in _messages(feature, 1, 2, 3):
        if kind == 1:
            return [value for _, value in _messages(values, 1)]
        packed = [block for _, block in _messages(values, 1)]
        if kind == 2:
            return [float(v) for block in packed for v in np.frombuffer(block, "<f4")]
        return [v for block in packed for v in _varints(block)]
    return []


def _messages(data: memoryview, *wanted: int) -> Iterator[tuple[int, memoryview]]:
    """Yields (field, content) of the length-delimited fields of a protobuf message."""
    position = 0
    while position < len(data):
        key, position = _varint(data, position)
        field, wire = key >> 3, key & 7
        if wire == _LENGTH:
            length, position = _varint(data, position)
            if position + length > len(data):
                raise ValueError("the record is cut short")
            if field in wanted:
                yield field, data[position:position + length]
            position += length
        elif wire == _VARINT:
            _, position = _varint(data, position)
        elif wire in (_FIXED32, _FIXED64):
            position += 4 if wire == _FIXED32 else 8
        else:
            raise ValueError(f"the record is no tf.train.Example (wire type {wire})")


def _varint(data: memoryview, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if position >= len(data):
            raise ValueError("the record is cut short")
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7


def _varints(data: memoryview) -> Iterator[int]:
    position = 0
    while position < len(data):
        value, position = _varint(data, position)
        yield value - (1 << 64) if value >= 1 << 63 else value


def _text(values: list[memoryview]) -> str:
    return str(values[0], "utf-8")


def _crop(volume: np.ndarray, origin: Sequence[int] | None,
          size: Sequence[int] | None) -> np.ndarray:
    if origin is None or size is None:
        raise ValueError("give both origin and size of a crop")
    window = tuple(slice(operator.index(start), operator.index(start) + operator.index(count))
                   for start, count in zip(origin, size, strict=True))
    if len(window) != volume.ndim or any(w.start < 0 or w.stop <= w.start or w.stop > n
                               for w, n in zip(window, volume.shape, strict=True)):
        raise ValueError(f"a crop of {tuple(size)} at {tuple(origin)} leaves the volume "
                         f"{volume.shape}")
    return volume[window].copy()
