"""brgsa_jax.data.builders: phantom and folder data sets, their failures and their resumption."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
from test_dicom import UID, write_series
from test_volume import affine_lps, chest, write

from brgsa_jax.config import UserError
from brgsa_jax.data import builders, phantom, plans, records, shards, sources, volume

RECIPE = volume.Preprocess(spacing=(5.0, 6.0, 7.0), shape=(24, 22, 18))
PHANTOM = {"seed": 3, "train": 3, "valid": 1, "test": 2, "shape": (32, 32, 16)}


def write_table(path, rows, columns=("id", "report"), encoding="utf-8"):
    with Path(path).open("w", newline="", encoding=encoding) as stream:
        csv.writer(stream).writerows([columns, *rows])
    return path


def make_folder(root, count=4):
    """`count` different scans with a table of their reports."""
    images = root / "images"
    images.mkdir(parents=True)
    for number in range(count):
        write(images / f"scan_{number}.nii.gz", chest(seed=number))
    return images, write_table(root / "table.csv",
                               [(f"scan_{n}", f"Report {n}, normal.") for n in range(count)])


def build(root, images, table, **options):
    return builders.build_folder(root, images=images, table=table, preprocess=RECIPE, workers=1,
                                 progress=False, **options)


def failures(out, name="failures.csv"):
    with (out / name).open(encoding="utf-8", newline="") as stream:
        return list(csv.reader(stream))


@pytest.fixture(scope="module")
def phantom_set(tmp_path_factory):
    out = tmp_path_factory.mktemp("phantom") / "set"
    return builders.build_phantom(out, **PHANTOM, workers=1, progress=False)


def test_phantom_records_are_the_generated_patients(phantom_set):
    assert phantom_set.splits == {"train": 3, "valid": 1, "test": 2}
    assert (phantom_set.written, phantom_set.failed, phantom_set.reused) == (6, 0, False)
    for split, first in (("train", 0), ("valid", 1_000_000), ("test", 2_000_000)):
        source = sources.open_source(phantom_set.out, split)
        for position, item in enumerate(source):
            case = phantom.generate(3, first + position, shape=(32, 32, 16))
            np.testing.assert_array_equal(item["volume"], case.volume)
            assert item["volume"].dtype == np.int16
            for name in ("id", "patient", "report", "findings", "spacing"):
                assert item[name] == getattr(case, name)
            assert item["boxes"] == {name: [tuple(int(v) for v in box) for box in found]
                                     for name, found in case.boxes.items()}
    metadata = sources.open_source(phantom_set.out).metadata
    assert metadata["findings"] == list(phantom.FINDINGS)
    assert metadata["preprocess"]["spacing"] == [12.0, 12.0, 24.0]
    assert not (phantom_set.out / ".staging").exists()
    assert failures(phantom_set.out) == [["id", "file", "reason"]]


def test_two_workers_and_compression_change_no_content(phantom_set, tmp_path):
    two = builders.build_phantom(tmp_path / "two", **PHANTOM, workers=2, progress=False,
                                 compression="zstd")
    assert two.fingerprint == phantom_set.fingerprint
    for split in records.SPLITS:
        one = sources.open_source(phantom_set.out, split)
        other = sources.open_source(two.out, split)
        assert [row.id for row in one.index] == [row.id for row in other.index]
        np.testing.assert_array_equal(one[0]["volume"], other[0]["volume"])
    shard = "phantom-train.array_record-00000-of-00001"
    assert (two.out / shard).stat().st_size < (phantom_set.out / shard).stat().st_size


def test_enlarging_a_split_keeps_the_others(phantom_set, tmp_path):
    more = builders.build_phantom(tmp_path / "more", **{**PHANTOM, "train": 4, "valid": 0},
                                  workers=1, progress=False)
    assert more.splits == {"train": 4, "test": 2}
    assert (sources.open_source(more.out, "test").fingerprint
            == sources.open_source(phantom_set.out, "test").fingerprint)
    assert more.fingerprint != phantom_set.fingerprint


def test_a_finished_build_is_reused_and_another_one_refused(phantom_set, monkeypatch):
    monkeypatch.setattr(phantom, "generate", lambda *_, **__: pytest.fail("built again"))
    again = builders.build_phantom(phantom_set.out, **PHANTOM, workers=1, progress=False)
    assert again.reused and again.fingerprint == phantom_set.fingerprint
    assert again.written == 6 and "reused" in str(again)
    with pytest.raises(UserError, match="its seed is 3, asked is 4"):
        builders.build_phantom(phantom_set.out, **{**PHANTOM, "seed": 4}, progress=False)
    monkeypatch.setattr(plans, "_phantom_code", lambda: "other")
    with pytest.raises(UserError, match="its code is"):
        builders.build_phantom(phantom_set.out, **PHANTOM, progress=False)


def test_phantom_arguments(tmp_path):
    for options, reason in [({}, "no patients"), ({"train": -1}, "outside"),
                            ({"train": 1, "shape": (8, 8)}, "three positive"),
                            ({"train": 1, "workers": 0}, "at least 1"),
                            ({"train": 1, "compression": "lzma"}, "choose one of none, zstd")]:
        with pytest.raises(UserError, match=reason):
            builders.build_phantom(tmp_path / "out", progress=False, **options)


def test_folder_joins_by_id_whatever_the_order(tmp_path):
    images, table = make_folder(tmp_path)
    summary = build(tmp_path / "a", images, table)
    source = sources.open_source(summary.out)
    assert [row.id for row in source.index] == [f"scan_{n}" for n in range(4)]
    for number, item in enumerate(source):
        np.testing.assert_array_equal(item["volume"], volume.to_canonical(
            chest(seed=number), affine_lps(), RECIPE))
        assert item["report"] == f"Report {number}, normal." and item["patient"] == item["id"]
        assert item["spacing"] == RECIPE.spacing and item["findings"] == ()
        assert item["provenance"]["file"] == f"scan_{number}.nii.gz"
        assert item["provenance"]["orientation"] == "LPS"
    shuffled = write_table(tmp_path / "t.csv", [(f"scan_{n}.nii.gz", f"Report {n}, normal.")
                                                for n in (2, 0, 3, 1)], encoding="utf-8-sig")
    other = build(tmp_path / "b", images, shuffled)
    assert [item["report"] for item in sources.open_source(other.out)] == [
        item["report"] for item in source]


def test_folders_of_dicom_arrays_and_json_tables(tmp_path):
    images = tmp_path / "images"
    hu, affine = chest(), affine_lps()
    lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine
    write_series(images / "patient 1" / "study" / "series", hu, lps, series=1)
    write_series(images / "patient 2" / "study" / "a", hu, lps, series=2)
    write_series(images / "patient 2" / "study" / "b", hu, lps, series=3)
    write_series(images / "named", hu, lps, series=4)
    for file in sorted((images / "named").iterdir()):
        file.rename(file.with_suffix(".dcm"))
    (images / "DICOMDIR").write_bytes(bytes(128) + b"DICM")
    (images / "patient 1" / "notes").mkdir()
    (images / "patient 1" / "notes" / "report.txt").write_text("no image")
    np.savez(images / "array.npz", volume=hu, affine=affine)
    write(images / "nifti.nii.gz", hu)
    table = tmp_path / "t.jsonl"
    table.write_text("\n".join(json.dumps({"id": name, "report": "Text.", "found": ["Emphysema"]})
                               for name in ("patient 1", "patient 2/study/b", "named", "array",
                                            "nifti", "patient 2")))
    summary = build(tmp_path / "out", images, table, findings_column="found")
    items = list(sources.open_source(summary.out))
    assert [item["id"] for item in items] == ["array", "named", "nifti", "patient 1",
                                              "patient 2/study/b"]
    for item in items:
        np.testing.assert_array_equal(item["volume"], volume.to_canonical(hu, affine, RECIPE))
        assert item["findings"] == ("Emphysema",)
    assert items[3]["provenance"]["file"] == "patient 1/study/series"
    header, failed = failures(summary.out)
    assert failed[0] == "patient 2" and "2 files have this name (patient 2/" in failed[2]
    assert summary.unlisted == 0  # The row of "patient 2" named them both.
    assert build(tmp_path / "out", images, table, findings_column="found").reused
    next((images / "named").iterdir()).unlink()
    with pytest.raises(UserError, match="changed since"):
        build(tmp_path / "out", images, table, findings_column="found")


def test_folder_with_broken_files_goes_on(tmp_path):
    images, _ = make_folder(tmp_path)
    (images / "deep").mkdir()
    (images / "scan_1.nii.gz").write_bytes((images / "scan_1.nii.gz").read_bytes()[:500])
    write(images / "deep" / "raw.nii", chest() + np.int16(1024))
    write(images / "deep" / "twin.nii")
    write(images / "twin.nii.gz")
    write(images / "silent.nii")
    write(images / "unlisted.nii")
    write(images / "._scan_0.nii.gz")
    (images / "dangling.nii").symlink_to(images / "nowhere.nii")
    outside = write(tmp_path / "outside.nii")
    table = write_table(tmp_path / "t.csv", [
        ("scan_0", "Normal."), ("scan_1", "Normal."), ("scan_2", "Normal."), ("raw", "Normal."),
        ("scan_2", "Other."), ("twin", "Normal."), ("silent", "Not given."), ("", "Normal."),
        ("absent", "Normal."), ("dangling", "Normal."), ("../outside", "Normal."),
        (str(outside), "Normal."), ("=cmd()", "Normal."),
        ("scan_3", "Normal."), ("scan_3.nii.gz", "Normal.")])
    summary = build(tmp_path / "out", images, table)
    header, *rows = failures(summary.out)
    assert header == ["id", "file", "reason"]
    found = {row[0]: row[2] for row in rows if row[2] != "no report row in the table"}
    expected = {
        "scan_1": "cut short", "raw": "scl_inter -1024", "scan_2": "2 rows of the table",
        "twin": "2 files have this name (deep/twin.nii, twin.nii.gz)", "silent": "report is empty",
        "": "row 8 of the table has no id", "absent": "no image file", "dangling": "no such file",
        "../outside": "no image file", str(outside): "no image file", "'=cmd()": "no image file",
        "scan_3": "2 ids of the table name this file",
        "scan_3.nii.gz": "2 ids of the table name this file"}
    assert found.keys() == expected.keys()
    for name, reason in expected.items():
        assert reason in found[name], name
    assert [row for row in rows if row[2] == "no report row in the table"] == [
        ["", "unlisted.nii", "no report row in the table"]]
    assert rows[-1][1] == "unlisted.nii"
    assert (summary.written, summary.failed, summary.unlisted) == (1, 13, 1)
    assert "13 failed, see failures.csv" in str(summary)
    assert sources.open_source(summary.out)[0]["id"] == "scan_0"


def test_nothing_usable_is_an_error_with_the_reasons(tmp_path):
    images, table = make_folder(tmp_path, 2)
    for file in images.iterdir():
        file.write_bytes(b"no scan")
    with pytest.raises(UserError, match="nothing usable: 2 failed.*not a NIfTI"):
        build(tmp_path / "out", images, table)
    assert len(failures(tmp_path / "out")) == 3
    for number in range(2):
        write(images / f"scan_{number}.nii.gz")
    assert build(tmp_path / "out", images, table).written == 2


def test_unexpected_errors_are_failures_too(tmp_path, monkeypatch):
    images, table = make_folder(tmp_path, 2)
    load = plans.load_volume

    def strange(path, preprocess, **how):
        if "scan_1" in path:
            raise MemoryError("too large")
        return load(path, preprocess, **how)

    monkeypatch.setattr(plans, "load_volume", strange)
    summary = build(tmp_path / "out", images, table)
    assert summary.written == 1
    assert failures(summary.out)[1] == ["scan_1", "scan_1.nii.gz",
                                        "unexpected MemoryError: too large"]


def test_warnings_are_listed(tmp_path):
    images, table = make_folder(tmp_path, 2)
    write(images / "scan_1.nii.gz", np.where(chest() < -900, -1000, 40 + chest() % 20).astype("i2"))
    summary = build(tmp_path / "out", images, table)
    assert summary.warned == 1
    header, row = failures(summary.out, "warnings.csv")
    assert header == ["id", "file", "warning"]
    assert row[:2] == ["scan_1", "scan_1.nii.gz"] and row[2].startswith("may not be a chest")


def test_columns_findings_and_patients(tmp_path):
    images, _ = make_folder(tmp_path)
    table = write_table(
        tmp_path / "t.csv",
        [(f" scan_{n} ", "Text.", "Emphysema; Lung nodule;Emphysema" if n else "", f"p{n // 2}")
         for n in range(4)], columns=("Vol", "Text", "Labels", "Who"))
    names = {"id_column": "Vol", "report_column": "Text", "findings_column": "Labels",
             "patient_column": "Who"}
    summary = build(tmp_path / "out", images, table, **names, split="valid")
    source = sources.open_source(summary.out, "valid")
    assert source.metadata["findings"] == ["Emphysema", "Lung nodule"]
    assert [item["findings"] for item in source] == [(), *[("Emphysema", "Lung nodule")] * 3]
    assert [row.patient for row in source.index] == ["p0", "p0", "p1", "p1"]
    with pytest.raises(UserError, match="no column 'Nope'; its columns are Vol, Text, Labels, Who"):
        build(tmp_path / "other", images, table, **{**names, "id_column": "Nope"})
    assert not (tmp_path / "other").exists()


def test_findings_of_summaries_become_those_of_the_set(tmp_path):
    images, table = make_folder(tmp_path, 4)
    summaries = tmp_path / "s.jsonl"
    summaries.write_text("".join(json.dumps(row) + "\n" for row in (
        {"id": "scan_3", "findings": ["Lung cyst", "Rib fracture"], "status": "ok"},
        {"id": "scan_0", "findings": [], "status": "normal"},
        {"id": "scan_1", "findings": [], "status": "failed: empty report"})))
    out = tmp_path / "set"
    assert build(out, images, table, summaries=summaries).written == 2
    assert {row.id: row.findings for row in sources.open_source(out).index} == {
        "scan_0": (), "scan_3": ("Lung cyst", "Rib fracture")}
    assert failures(out)[1:] == [
        ["scan_1", "scan_1.nii.gz", "its summary failed: empty report"],
        ["scan_2", "scan_2.nii.gz", "no row in s.jsonl"]]
    summaries.write_text(summaries.read_text().replace("Lung cyst", "Lung mass"))
    with pytest.raises(UserError, match="changed since"):
        build(out, images, table, summaries=summaries)
    with pytest.raises(UserError, match="either from a column or from summaries"):
        build(tmp_path / "both", images, table, summaries=summaries, findings_column="report")


def test_rows_may_take_different_series_of_one_folder(tmp_path):
    images, scans = tmp_path / "images", {n: chest(seed=n) for n in (1, 2, 3)}
    for number, hu in scans.items():
        write_series(images / "patient" / "study", hu, affine_lps(), series=number)
    rows = [("patient", "First.", UID.format(3)), ("study", "Second.", UID.format(1))]
    table = write_table(tmp_path / "t.csv", rows, ("id", "report", "series"))
    out = tmp_path / "set"
    assert build(out, images, table, series_column="series").written == 2
    for item, number in zip(sources.open_source(out), (3, 1), strict=True):
        alone = write_series(tmp_path / f"alone{number}", scans[number], affine_lps())
        assert np.array_equal(item["volume"], volume.load_volume(alone, RECIPE).volume)
    # Two rows cannot take the same, and without the column nobody says which.
    write_table(table, [(*row[:2], UID.format(1)) for row in rows], ("id", "report", "series"))
    with pytest.raises(UserError, match="2 ids of the table name this file"):
        build(tmp_path / "same", images, table, series_column="series")
    write_table(table, rows[:1], ("id", "report", "series"))
    with pytest.raises(UserError, match="holds 3 CT series"):
        build(tmp_path / "none", images, table)


def test_a_patient_lies_in_one_split_and_new_rows_move_nobody():
    shares = plans.shares_of({"train": 0.7, "valid": 0.1, "test": 0.2})
    placed = [plans.split_of(f"patient {n}", shares) for n in range(4000)]
    for name, share in shares.items():
        assert abs(placed.count(name) / 4000 - share) < 0.02
    assert placed[:50] == [plans.split_of(f"patient {n}", shares) for n in range(50)]
    for wrong in ({"train": 0.5}, {"train": 1.2, "valid": -0.2}, "dev"):
        with pytest.raises(UserError):
            plans.shares_of(wrong)


def test_folder_is_split_by_patient(tmp_path):
    images, _ = make_folder(tmp_path, 6)
    rows = [(f"scan_{n}", "Text.", f"p{n // 2}") for n in range(6)]
    table = write_table(tmp_path / "t.csv", rows, columns=("id", "report", "patient"))
    summary = build(tmp_path / "out", images, table, patient_column="patient",
                    split={"train": 0.5, "test": 0.5})
    assert sum(summary.splits.values()) == 6
    patients = [{row.patient for row in sources.open_source(summary.out, split).index}
                for split in summary.splits]
    assert sum(map(len, patients)) == len(set.union(*patients)) == 3


@pytest.mark.parametrize("content,reason", [
    (b"", "no column 'id', 'report'; its columns are none"), (b"id,report\n", "no rows"),
    (b"id;report\na;b\n", "separated by semicolons"), (b"\xff\xfe\x00id", "UTF-8"),
    (None, "cannot be read")])
def test_unusable_tables(tmp_path, content, reason):
    images, table = make_folder(tmp_path, 1)
    table.unlink()
    if content is not None:
        table.write_bytes(content)
    with pytest.raises(UserError, match=reason):
        build(tmp_path / "out", images, table)
    assert not (tmp_path / "out").exists()


def test_unusable_folders(tmp_path):
    images, table = make_folder(tmp_path, 1)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no volume .*DICOM folder"):
        build(tmp_path / "out", tmp_path / "empty", table)
    with pytest.raises(UserError, match="is not a folder"):
        build(tmp_path / "out", tmp_path / "nowhere", table)
    with pytest.raises(UserError, match="not empty"):
        build(images, images, table)
    with pytest.raises(UserError, match="is a file"):
        build(table, images, table)
    assert sorted(p.name for p in images.iterdir()) == ["scan_0.nii.gz"]


def test_changed_inputs_of_a_finished_build_are_refused(tmp_path):
    images, table = make_folder(tmp_path, 2)
    build(tmp_path / "out", images, table)
    assert build(tmp_path / "out", images, table).reused
    write(images / "scan_1.nii.gz", chest(seed=9))
    with pytest.raises(UserError, match="changed since"):
        build(tmp_path / "out", images, table)
    with pytest.raises(UserError, match="its split is"):
        build(tmp_path / "out", images, table, split="test")


def test_an_interrupted_build_of_many_shards_resumes(tmp_path, monkeypatch):
    images, table = make_folder(tmp_path, 7)
    monkeypatch.setattr(shards, "SHARD_BYTES", 2 * 2 * 24 * 22 * 18)
    whole = build(tmp_path / "whole", images, table)
    files = sorted(p.name for p in whole.out.glob("*.array_record-*"))
    assert files == [f"folder-train.array_record-{n:05d}-of-00004" for n in range(4)]
    load, seen = plans.load_volume, []

    def loading(path, preprocess, **how):
        seen.append(Path(path).name)
        if stop_at and len(seen) == stop_at:
            raise KeyboardInterrupt
        return load(path, preprocess, **how)

    monkeypatch.setattr(plans, "load_volume", loading)
    stop_at = 6
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        build(out, images, table)
    with pytest.raises(UserError, match="unfinished build; run the same"):
        sources.open_source(out)
    with pytest.raises(UserError, match="another, unfinished build"):
        build(out, images, table, split="valid")
    # A file mended in between is read again, and only the shard it belongs to is made anew.
    write(images / "scan_3.nii.gz", chest(seed=30))
    seen.clear()
    stop_at = 0
    resumed = build(out, images, table)
    assert sorted(seen) == [f"scan_{n}.nii.gz" for n in (2, 3, 5, 6)]
    write(images / "scan_3.nii.gz", chest(seed=3))
    assert resumed.fingerprint != whole.fingerprint
    shutil.rmtree(out)
    assert build(out, images, table).fingerprint == whole.fingerprint


def test_empty_shards_are_left_out(tmp_path, monkeypatch):
    images, table = make_folder(tmp_path, 5)
    monkeypatch.setattr(shards, "SHARD_BYTES", 2 * 2 * 24 * 22 * 18)
    for number in (2, 3, 4):
        (images / f"scan_{number}.nii.gz").write_bytes(b"broken")
    summary = build(tmp_path / "out", images, table)
    assert (summary.written, summary.failed) == (2, 3)
    assert [p.name for p in summary.out.glob("*.array_record-*")] == [
        "folder-train.array_record-00000-of-00001"]
    assert len(list(sources.open_source(summary.out))) == 2


def test_two_builds_cannot_share_a_folder(tmp_path, monkeypatch):
    images, table = make_folder(tmp_path, 2)
    load = plans.load_volume

    def loading(path, preprocess, **how):
        with pytest.raises(UserError, match="being built by another process"):
            monkeypatch.setattr(plans, "load_volume", load)
            build(tmp_path / "out", images, table)
        return load(path, preprocess, **how)

    monkeypatch.setattr(plans, "load_volume", loading)
    assert build(tmp_path / "out", images, table).written == 2


@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_build_continues_to_the_same_result(tmp_path, workers):
    images, table = make_folder(tmp_path, 12)
    # Reading two of the scans never ends in this build, so the kill always finds it at work.
    (tmp_path / "sitecustomize.py").write_text(textwrap.dedent("""
        import gzip, time
        plain = gzip.open
        def slow(path, *rest):
            if "scan_8" in str(path) or "scan_9" in str(path):
                time.sleep(600)
            return plain(path, *rest)
        gzip.open = slow
        """))
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(f"""
        if __name__ == "__main__":
            from brgsa_jax.data import builders, volume
            recipe = volume.Preprocess(spacing={RECIPE.spacing}, shape={RECIPE.shape})
            builders.build_folder({str(tmp_path / "out")!r}, images={str(images)!r},
                                  table={str(table)!r}, preprocess=recipe, workers={workers},
                                  progress=False)
        """))
    process = subprocess.Popen([sys.executable, str(script)],
                               env={**os.environ, "PYTHONPATH": str(tmp_path)})
    records = tmp_path / "out" / ".staging" / "records"
    deadline = time.monotonic() + 60
    # Ids sort as scan_0, scan_1, scan_10, scan_11, scan_2 ...: ten come before scan_8.
    while len(list(records.glob("*.json"))) < 10:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 10
    while _processes_of(tmp_path):
        assert time.monotonic() < deadline, "workers outlive the build that was killed"
        time.sleep(0.05)
    calls, load = [], plans.load_volume
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plans, "load_volume",
                      lambda path, recipe, **how: calls.append(Path(path).name)
                      or load(path, recipe, **how))
        resumed = build(tmp_path / "out", images, table)
    assert calls == ["scan_8.nii.gz", "scan_9.nii.gz"] and not resumed.reused
    assert resumed.fingerprint == build(tmp_path / "whole", images, table).fingerprint


def _processes_of(folder):
    """Processes whose PYTHONPATH is `folder`; none where there is no /proc."""
    found = []
    for environment in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"PYTHONPATH={folder}\0".encode() in environment.read_bytes():
                found.append(environment.parent.name)
        except OSError:
            continue
    return found
