"""Records on disk: one staged file each, then array_record shards, then the published set.

A record on its way is OUT/.staging/records/KEY.example with KEY.json beside it, written last. A
finished shard is OUT/.staging/shards/NAME.array_record with NAME.json. Published shards and
`dataset.json` lie in OUT itself; see `data/shards.py` for who writes what when.
"""

import csv
import functools
import json
import os
import uuid
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from brgsa_jax.data import sources
from brgsa_jax.data.tables import quoted
from brgsa_jax.data.volume import NotACT

VERSION = "1.0.0"
SPLITS = ("train", "valid", "test")
PARTIAL = ".partial"
COMPRESSION = {"none": "group_size:1,uncompressed", "zstd": "group_size:1,zstd:1"}


class Failure(NamedTuple):
    """One row of failures.csv (or, with a warning as its reason, of warnings.csv)."""

    id: str
    file: str
    reason: str


class Task(Protocol):
    """One record still to be made; a picklable value, usually a frozen dataclass.

    Attributes:
        split: "train", "valid" or "test".
        id: unique in the data set.
        file: where the image comes from, for failures.csv; empty if from no file, and then any
            exception ends the build.
    """

    split: str
    id: str
    file: str

    def stamp(self) -> Any:
        """Returns as JSON types all that decides the record beside the request and the id."""

    def make(self) -> tuple[dict[str, Any], tuple[str, ...]]:
        """Returns the record, with the keys of `sources.Source.item`, and its warnings.

        Raises:
            NotACT: there is no usable image.
        """


class Recipe(Protocol):
    """How the images of a data set are made: `volume.Preprocess` or `image2d.Radiograph`.

    Attributes:
        shape: voxels or pixels of every image.
        spacing: their size in mm, a number for each axis; () where it is not known.
    """

    shape: tuple[int, ...]
    spacing: tuple[float, ...]

    def as_dict(self) -> dict[str, Any]:
        """Returns the recipe as JSON types; see `sources.dtype_of` for its type of values."""


class Shard(NamedTuple):
    """Consecutive tasks of a split that go into one file."""

    name: str
    split: str
    tasks: tuple[Task, ...]
    keys: tuple[str, ...]


def is_staged(staging: Path, key: str) -> bool:
    """Whether a record, or the reason why there is none, waits in staging."""
    return (staging / "records" / f"{key}.json").exists()


def make_record(staging: Path, task: Task, key: str) -> None:
    """Makes one record, or the reason why there is none, and stages it."""
    entry: dict[str, Any] = {"id": task.id, "file": task.file}
    try:
        record, warnings = task.make()
    except NotACT as error:
        entry["reason"] = error.reason
    except Exception as error:
        if not task.file:
            raise
        # One strange file must not stop a build of thousands; the reason names what happened.
        entry["reason"] = f"unexpected {type(error).__name__}: {error}"
    else:
        entry |= {"id": record["id"], "patient": record["patient"], "warnings": list(warnings),
                  "findings": list(record["findings"]), "digest": sources.record_digest(record)}
        _replace(staging / "records" / f"{key}.example", _serialize(record))
    # The entry comes last: where it exists, the record is complete.
    write_json(staging / "records" / f"{key}.json", entry)


def _serialize(record: Mapping[str, Any]) -> bytes:
    example = {**record, "findings": list(record["findings"]),
               "boxes": json.dumps(record["boxes"], sort_keys=True, default=_plain),
               "provenance": json.dumps(record["provenance"], sort_keys=True),
               "spacing": np.asarray(record["spacing"], np.float32)}
    features, serializer = _features(record["volume"].shape, record["volume"].dtype.name,
                                     len(record["spacing"]))
    proto = serializer.get_tf_example(features.encode_example(example))
    # The order of a map's entries is otherwise another one in every process.
    return proto.SerializeToString(deterministic=True)


def _plain(value: Any) -> Any:
    """NumPy numbers of a box as JSON."""
    return value.item()


@functools.cache
def _features(shape: tuple[int, ...], dtype: str, spacings: int) -> tuple[Any, Any]:
    """Returns the TFDS features of a record and what serialises it."""
    from tensorflow_datasets import features
    from tensorflow_datasets.core import example_serializer

    record = features.FeaturesDict({
        "id": features.Text(), "patient": features.Text(), "report": features.Text(),
        # As bytes: TFDS would otherwise store every voxel as a variable-length 64-bit integer.
        "volume": features.Tensor(shape=shape, dtype=np.dtype(dtype).type, encoding="bytes"),
        "spacing": features.Tensor(shape=(spacings,), dtype=np.float32),
        "findings": features.Sequence(features.Text()),
        "boxes": features.Text(), "provenance": features.Text()})
    return record, example_serializer.ExampleSerializer(record.get_serialized_info())


def write_shard(staging: Path, shard: Shard, options: str) -> None:
    """Moves the staged records of a shard into one array_record file."""
    from array_record.python import array_record_module

    records = staging / "records"
    entries = [json.loads((records / f"{key}.json").read_text(encoding="utf-8"))
               for key in shard.keys]
    target = staging / "shards" / f"{shard.name}.array_record"
    partial = _partial(target)
    writer = array_record_module.ArrayRecordWriter(str(partial), options)
    size = 0
    for key, entry in zip(shard.keys, entries, strict=True):
        if "reason" not in entry:
            record = (records / f"{key}.example").read_bytes()
            size += len(record)
            writer.write(record)
    writer.close()
    os.replace(partial, target)
    write_json(staging / "shards" / f"{shard.name}.json",
                {"keys": shard.keys, "entries": entries, "bytes": size,
                 "records": sum("reason" not in entry for entry in entries)})
    for key in shard.keys:
        (records / f"{key}.example").unlink(missing_ok=True)
        (records / f"{key}.json").unlink(missing_ok=True)


def shard_entries(staging: Path, shard: Shard) -> list[dict[str, Any]] | None:
    """The entries of a finished shard; None if it is not finished or its inputs changed."""
    marker = _shard_marker(staging, shard)
    return marker["entries"] if marker and marker["keys"] == list(shard.keys) else None


def _shard_marker(staging: Path, shard: Shard) -> dict[str, Any] | None:
    file = staging / "shards" / f"{shard.name}.json"
    if not file.exists() or not file.with_suffix(".array_record").exists():
        return None
    return json.loads(file.read_text(encoding="utf-8"))


def publish(out: Path, staging: Path, shards: Sequence[Shard], entries: Sequence[dict[str, Any]],
             request: dict[str, Any], preprocess: Recipe,
             facts: dict[str, Any]) -> dict[str, Any]:
    """Puts the shards and their metadata into place; `dataset.json` comes last."""
    for stale in out.glob("*.array_record-*"):
        stale.unlink()
    name = request["source"]
    splits: dict[str, Any] = {}
    sizes = Counter()
    for split in SPLITS:
        rows = [entry for entry in entries if entry["split"] == split]
        if not rows:
            continue
        markers = {shard.name: _shard_marker(staging, shard) for shard in shards
                   if shard.split == split}
        filled = [shard for shard in markers if markers[shard]["records"]]
        listed = []
        for number, shard in enumerate(filled):
            file = f"{name}-{split}.array_record-{number:05d}-of-{len(filled):05d}"
            _link(staging / "shards" / f"{shard}.array_record", out / file)
            listed.append({"file": file, "records": markers[shard]["records"]})
            sizes[split] += markers[shard]["bytes"]
        splits[split] = {"shards": listed,
                         "fingerprint": sources.chain_digests(split, [r["digest"] for r in rows])}
        lines = [json.dumps({k: row[k] for k in ("id", "patient", "findings", "digest")})
                 for row in rows]
        _replace(out / sources.index_file(split), ("\n".join(lines) + "\n").encode())
    _write_tfds_metadata(out, name, splits, sizes, preprocess)
    dataset = {"format": sources.FORMAT, "name": name, "source": name, "builder_version": VERSION,
               "preprocess": preprocess.as_dict(), "request": request, **facts, "splits": splits,
               "fingerprint": sources.chain_digests("dataset",
                                                    [s["fingerprint"] for s in splits.values()])}
    write_json(out / sources.DATASET_FILE, dataset)
    return dataset


def _write_tfds_metadata(out: Path, name: str, splits: Mapping[str, Any], sizes: Mapping[str, int],
                         preprocess: Recipe) -> None:
    import tensorflow_datasets as tfds

    dtype = sources.dtype_of(preprocess.as_dict())
    images = ("Radiographs (uint8 grey levels)" if dtype == np.uint8 else
              "Chest CT volumes (int16 HU, frame LPS)")
    identity = tfds.core.dataset_info.DatasetIdentity(
        name=name, version=tfds.core.Version(VERSION), data_dir=str(out),
        module_name="brgsa_jax.data.builders")
    info = tfds.core.DatasetInfo(
        builder=identity, disable_shuffling=True,
        features=_features(preprocess.shape, dtype.name, len(preprocess.spacing))[0],
        description=f"{images} with reports and findings.")
    info.set_file_format("array_record")
    info.set_splits(tfds.core.splits.SplitDict([
        tfds.core.splits.SplitInfo(
            name=split, num_bytes=sizes[split],
            shard_lengths=[shard["records"] for shard in record["shards"]],
            filename_template=tfds.core.ShardedFileTemplate(
                data_dir=out, dataset_name=name, split=split, filetype_suffix="array_record"))
        for split, record in splits.items()]))
    info.write_to_directory(out)


def write_rows(file: Path, last_column: str, rows: Sequence[Failure]) -> None:
    """Writes a CSV that spreadsheets do not execute."""
    partial = file.with_name(file.name + ".partial")
    # Names of files need not be text.
    with partial.open("w", encoding="utf-8", errors="backslashreplace", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["id", "file", last_column])
        writer.writerows([quoted(" ".join(cell.split())) for cell in row] for row in rows)
    os.replace(partial, file)


def _link(source: Path, target: Path) -> None:
    """Links, so that staging stays whole until `dataset.json` exists; moves where links fail."""
    try:
        os.link(source, target)
    except OSError:
        os.replace(source, target)


def _replace(file: Path, content: bytes) -> None:
    """Writes a file that is either complete or not there."""
    partial = _partial(file)
    partial.write_bytes(content)
    os.replace(partial, file)


def _partial(file: Path) -> Path:
    """A name of its own for each writer: two machines may work in one folder."""
    return file.with_name(f"{file.name}.{uuid.uuid4().hex}{PARTIAL}")


def write_json(file: Path, value: Any) -> None:
    """Writes JSON into a file that is either complete or not there."""
    _replace(file, json.dumps(value, indent=1, default=asdict).encode())
