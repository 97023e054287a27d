"""brgsa_jax.data.beam: a pipeline makes the bytes that processes make, also after a stop."""

import sys

import apache_beam
import pytest
from test_builders import RECIPE, make_folder
from test_kill import contents

from brgsa_jax.config import UserError
from brgsa_jax.data import beam, builders, records, shards

DIRECT = ["--runner=DirectRunner"]


def build(out, images, table, **options):
    return builders.build_folder(out, images=images, table=table, preprocess=RECIPE, workers=1,
                                 progress=False, **options)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "SHARD_BYTES", 3 * 2 * 24 * 22 * 18)
    images, table = make_folder(tmp_path, 8)
    (images / "scan_4.nii.gz").write_bytes(b"broken")
    return images, table


def test_the_bytes_of_processes(tmp_path, folder):
    plain = build(tmp_path / "plain", *folder)
    piped = build(tmp_path / "piped", *folder, beam=DIRECT)
    assert (piped.written, piped.failed) == (7, 1)
    assert len(list(piped.out.glob("*.array_record-*"))) == 3
    assert contents(piped.out) == contents(plain.out)
    assert build(tmp_path / "piped", *folder, beam=DIRECT).reused


def test_a_stopped_build_continues_in_a_pipeline_and_the_other_way(tmp_path, folder, monkeypatch):
    make, made = records.make_record, []

    def making(staging, task, key):
        made.append(task.id)
        if len(made) == stop_at:
            raise KeyboardInterrupt
        make(staging, task, key)

    monkeypatch.setattr(records, "make_record", making)
    stop_at = 6
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "out", *folder)
    made.clear()
    stop_at = 0
    resumed = build(tmp_path / "out", *folder, beam=DIRECT)
    assert sorted(made) == ["scan_5", "scan_6", "scan_7"]
    assert contents(resumed.out) == contents(build(tmp_path / "whole", *folder).out)


def test_a_bundle_may_be_tried_twice(tmp_path, folder, monkeypatch):
    """Beam runs what failed, or seemed to, once more."""
    apply = apache_beam.Map

    def twice(function, *arguments):
        return apply(lambda element: [function(element, *arguments) for _ in range(2)][0])

    monkeypatch.setattr(apache_beam, "Map", twice)
    piped = build(tmp_path / "piped", *folder, beam=DIRECT)
    assert contents(piped.out) == contents(build(tmp_path / "plain", *folder).out)


def test_a_failing_pipeline_is_one_sentence(tmp_path, folder, monkeypatch):
    with pytest.raises(UserError, match="the Beam pipeline failed .*; mend that and run the same"):
        build(tmp_path / "out", *folder, beam=["--runner=NoSuchRunner"])
    monkeypatch.setattr(beam.records, "write_shard", lambda *_: 1 / 0)
    with pytest.raises(UserError, match="Beam pipeline failed .*division by zero"):
        build(tmp_path / "out", *folder, beam=DIRECT)
    monkeypatch.undo()
    monkeypatch.setattr(shards, "SHARD_BYTES", 3 * 2 * 24 * 22 * 18)
    assert build(tmp_path / "out", *folder).written == 7
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    with pytest.raises(UserError, match=r"install brgsa-jax\[beam\]"):
        build(tmp_path / "other", *folder, beam=DIRECT)
