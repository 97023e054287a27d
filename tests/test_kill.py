"""A build killed with SIGKILL at random moments ends in the same bytes as one left alone."""

import json
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
from test_builders import write_table
from test_volume import affine_lps, chest, write

from brgsa_jax.data import builders, shards, volume

VOLUMES, KILLS, PER_SHARD = 200, 3, 23
RECIPE = volume.Preprocess(spacing=(9.0, 9.0, 9.0), shape=(16, 14, 12))
SHARD_BYTES = PER_SHARD * 2 * 16 * 14 * 12


def make_images(root):
    """200 scans, one of them broken, and their table in another order."""
    images = root / "images"
    images.mkdir()
    affine = affine_lps((8.0, 8.0, 8.0))
    for number in range(VOLUMES):
        write(images / f"scan_{number:03d}.nii.gz", chest((16, 14, 12), number), affine)
    (images / "scan_077.nii.gz").write_bytes(b"broken")
    order = np.random.default_rng(1).permutation(VOLUMES)
    rows = [(f"scan_{n:03d}", f"Report {n}.", f"patient {n // 2}") for n in order]
    return images, write_table(root / "table.csv", rows, ("id", "report", "patient"))


def options(images, table):
    return {"images": str(images), "table": str(table), "patient_column": "patient",
            "split": {"train": 0.7, "valid": 0.1, "test": 0.2}, "progress": False}


def progress(staging):
    """Records that are staged or in a finished shard."""
    done = len(list((staging / "records").glob("*.json")))
    for marker in (staging / "shards").glob("*.json"):
        done += len(json.loads(marker.read_text())["keys"])
    return done


def contents(folder):
    return {str(file.relative_to(folder)): file.read_bytes()
            for file in folder.rglob("*") if file.is_file()}


def test_killed_three_times_at_random_the_bytes_are_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "SHARD_BYTES", SHARD_BYTES)
    images, table = make_images(tmp_path)
    whole = builders.build_folder(tmp_path / "whole", preprocess=RECIPE, workers=1,
                                  **options(images, table))
    # So coarse a grid shows too little lung: every volume has its line in warnings.csv.
    assert (whole.written, whole.failed, whole.warned) == (VOLUMES - 1, 1, VOLUMES - 1)
    assert len(whole.splits) == 3 and len(list(whole.out.glob("*.array_record-*"))) >= 9

    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(f"""
        if __name__ == "__main__":
            import sys
            from brgsa_jax.data import builders, shards, volume
            shards.SHARD_BYTES = {SHARD_BYTES}
            recipe = volume.Preprocess(spacing={RECIPE.spacing}, shape={RECIPE.shape})
            builders.build_folder({str(tmp_path / "out")!r}, preprocess=recipe,
                                  workers=int(sys.argv[1]), **{options(images, table)!r})
        """))
    staging = tmp_path / "out" / ".staging"
    moments = np.sort(np.random.default_rng(5).choice(np.arange(5, 170), KILLS, replace=False))
    reached = []
    for moment, workers in zip(moments, ("1", "2", "1"), strict=True):
        process = subprocess.Popen([sys.executable, str(script), workers])
        deadline = time.monotonic() + 60
        while progress(staging) < moment:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        reached.append(progress(staging))
    assert max(reached) < VOLUMES and not (tmp_path / "out" / "dataset.json").exists()

    resumed = builders.build_folder(tmp_path / "out", preprocess=RECIPE, workers=1,
                                    **options(images, table))
    assert not resumed.reused and resumed.fingerprint == whole.fingerprint
    expected, found = contents(whole.out), contents(resumed.out)
    assert expected.keys() == found.keys()
    assert [name for name in expected if expected[name] != found[name]] == []
