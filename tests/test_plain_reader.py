import json
import os
import shutil
import threading

import numpy as np
import pytest
from array_record.python import array_record_module

from brgsa_jax.config import UserError
from brgsa_jax.data import builders, plain_reader
from brgsa_jax.data.records import COMPRESSION
from brgsa_jax.data.sources import open_source

BLOCK = 65536


def write(path, records, options=COMPRESSION["none"]):
    writer = array_record_module.ArrayRecordWriter(str(path), options)
    for record in records:
        writer.write(record)
    writer.close()
    return path


def sizes():
    """Records that end everywhere around the boundaries of blocks."""
    rng = np.random.default_rng(0)
    edges = [BLOCK * n + d for n in (0, 1, 2) for d in range(-110, 40, 7) if BLOCK * n + d > 0]
    # 3 MB needs more blocks than one call of the system reads; then every length for a while.
    return [*edges, *rng.integers(1, 3 * BLOCK, 40).tolist(), 70_000_000, *range(1, 60), 1]


def test_records_are_those_the_library_reads(tmp_path):
    rng = np.random.default_rng(1)
    records = [rng.bytes(size) for size in sizes()]
    path = write(tmp_path / "a.array_record", records)
    reader = plain_reader.open_plain(path, len(records))
    assert [bytes(reader.read(i)) for i in range(len(records))] == records
    assert reader.read(0).readonly
    library = array_record_module.ArrayRecordReader(str(path))
    assert library.num_records() == len(records) and library.read([7])[0] == records[7]


def test_a_forgotten_reader_closes_its_file(tmp_path):
    reader = plain_reader.open_plain(write(tmp_path / "a", [b"x"]), 1)
    number = reader._file
    os.fstat(number)
    del reader
    with pytest.raises(OSError):
        os.fstat(number)


def test_memory_is_used_again_only_when_nobody_looks(tmp_path):
    records = [bytes([i]) * 5000 for i in range(6)]
    reader = plain_reader.open_plain(write(tmp_path / "a", records), 6)
    kept = [np.frombuffer(reader.read(i), np.uint8)[10:20] for i in range(6)]
    for i in range(50):
        reader.read(i % 6)
    assert [set(view.tolist()) for view in kept] == [{i} for i in range(6)]
    place = kept[0].ctypes.data
    kept.clear()
    later = [np.frombuffer(reader.read(0), np.uint8) for _ in range(40)]
    assert place in {view[10:].ctypes.data for view in later}


def test_threads_share_a_reader(tmp_path):
    records = [np.random.default_rng(i).bytes(200_000 + i) for i in range(8)]
    reader = plain_reader.open_plain(write(tmp_path / "a", records), 8)
    wrong = []

    def work(seed):
        for i in np.random.default_rng(seed).integers(8, size=60):
            if bytes(reader.read(i)) != records[i]:
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("options", [
    COMPRESSION["zstd"], "group_size:1,brotli:1", "group_size:3,uncompressed",
    "group_size:1,uncompressed,transpose:true"])
def test_other_layouts_are_left_to_the_library(tmp_path, options):
    path = write(tmp_path / "a", [b"x" * 500] * 9, options)
    assert plain_reader.open_plain(path, 9) is None


def test_files_that_are_no_shard_are_left_to_the_library(tmp_path):
    path = write(tmp_path / "a", [b"y" * 300_000] * 4)
    content = path.read_bytes()
    rng = np.random.default_rng(0)
    assert plain_reader.open_plain(path, 5) is None, "there are fewer records than expected"
    for cut in (0, 10, 63, 64, 90, 200, 500_000):
        path.write_bytes(content[:cut])
        assert plain_reader.open_plain(path, 4) is None
    for _ in range(300):
        damaged = bytearray(content)
        for place in rng.integers(110, size=2):
            damaged[place] = rng.integers(256)
        path.write_bytes(damaged)
        reader = plain_reader.open_plain(path, 4)
        if reader:
            assert [len(reader.read(i)) for i in range(4)] == [p.size for p in reader.places]


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_a_shard_that_became_shorter_is_told_in_one_sentence(tmp_path, compression):
    builders.build_phantom(tmp_path / "d", train=3, shape=(64, 64, 32), workers=1,
                           compression=compression, progress=False)
    source = open_source(tmp_path / "d")
    file, = (tmp_path / "d").glob("*.array_record-*")
    source[0]
    with file.open("r+b") as stream:
        stream.truncate(file.stat().st_size // 3)
    with pytest.raises(UserError, match="record 2 of .* cannot be read .*; copy the folder again"):
        source[2]


def test_damaged_sets_are_told_in_one_sentence(tmp_path):
    good = tmp_path / "good"
    builders.build_phantom(good, train=3, shape=(32, 32, 16), workers=1, compression="zstd",
                           progress=False)

    def damaged(number, change):
        copy = tmp_path / str(number)
        shutil.copytree(good, copy)
        change(copy)
        return copy

    def described(**changes):
        def change(folder):
            content = json.loads((folder / "dataset.json").read_text())
            for path, value in changes.items():
                *keys, last = path.split("__")
                place = content
                for key in keys:
                    place = place[int(key) if isinstance(place, list) else key]
                place[last] = value
            (folder / "dataset.json").write_text(json.dumps(content))
        return change

    def shard(action):
        return lambda folder: action(next(folder.glob("*.array_record-*")))

    cases = [
        shard(lambda file: file.write_bytes(b"")),
        shard(lambda file: os.truncate(file, file.stat().st_size - 65536)),
        lambda folder: (folder / "index_train.jsonl").write_text("no json"),
        lambda folder: (folder / "index_train.jsonl").unlink(),
        described(splits=[]), described(splits={"train": {}}), described(findings=3),
        described(splits__train__shards=[]), described(splits__train__shards__0__records="3"),
        described(splits__train__shards__0__records=9),
        described(splits__train__shards__0__file="../good"),
        described(preprocess__shape=[32, 32, 15]), described(preprocess__shape="x"),
        described(preprocess={})]
    for number, change in enumerate(cases):
        folder = damaged(number, change)
        with pytest.raises(UserError, match="anew") as refusal:
            source = open_source(folder)
            list(source), source.index
        assert "\n" not in str(refusal.value) and str(folder) in str(refusal.value)


def test_a_shard_without_its_end_is_found_though_its_records_are_there(tmp_path):
    builders.build_phantom(tmp_path, train=3, shape=(64, 64, 32), workers=1, progress=False)
    source = open_source(tmp_path)
    assert source.broken_shards() == {}
    file, = tmp_path.glob("*.array_record-*")
    os.truncate(file, file.stat().st_size - 70_000)
    assert len(list(open_source(tmp_path))) == 3
    assert file.name in source.broken_shards()[0]
