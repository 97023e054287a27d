"""Radiographs end to end: folder and MIMIC-CXR trees to data sets, a small MGCA on one of them."""

import base64
import csv
import functools
import gzip
import io
import os
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_builders import failures, write_table
from test_image2d import radiograph, write_dicom

from brgsa_jax import config as configs
from brgsa_jax.config import UserError
from brgsa_jax.data import builders, image2d, mimic_cxr, shards, sources
from brgsa_jax.data.volume import NotACT

SIZE = 64
TEXT = "FINAL REPORT\n EXAMINATION: CHEST\n\n FINDINGS: The lungs are clear.\n\n" \
       " IMPRESSION:\n No acute disease of number {}.\n"


def picture(seed):
    """A radiograph that no other seed has."""
    image = radiograph((70 + seed, 60), top=240)
    return image + np.random.default_rng(seed).integers(0, 9, image.shape, np.uint8)


def save(path, seed, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture(seed)).save(path, **options)
    return path


def build(out, **options):
    return builders.build_image2d(out, size=SIZE, workers=1, progress=False, **options)


def reasons(out):
    """{id, or file of what has no id: reason} of failures.csv."""
    return {row[0] or row[1]: row[2] for row in failures(out)[1:]}


# Folder and table


def test_folder_of_png_jpeg_and_dicom_joins_by_id(tmp_path):
    images = tmp_path / "images"
    files = {
        "a/frontal": save(images / "a" / "frontal.PNG", 1, format="PNG"),
        "a/lateral": save(images / "a" / "lateral.png", 2),
        "photo": save(images / "b" / "photo.jpeg", 3),
        "dx": write_dicom(images / "b" / "dx.dcm", picture(4)),
        "IM0001": write_dicom(images / "b" / "IM0001", 255 - picture(5), Modality="CR",
                              PhotometricInterpretation="MONOCHROME1")}
    (images / "README").write_text("no image")
    (images / "b" / "DICOMDIR").write_bytes(bytes(128) + b"DICM")
    report = "Both views show an effusion."
    rows = [("photo", "Photo.", "p2", ""), ("a/lateral", report, "p1", "Pleural Effusion"),
            ("IM0001", "Inverted.", "p4", "Edema;Pleural Effusion"), ("dx", "DX.", "p3", ""),
            ("a/frontal", report, "p1", "Pleural Effusion")]
    table = write_table(tmp_path / "t.csv", rows, ("id", "text", "who", "found"))
    options = {"images": images, "table": table, "report_column": "text", "patient_column": "who",
               "findings_column": "found", "split": "test"}
    summary = build(tmp_path / "out", **options)
    assert (summary.written, summary.failed, summary.unlisted) == (5, 0, 0)
    assert str(summary).startswith(f"{summary.out}: 5 images (test 5)")
    source = sources.open_source(summary.out, "test")
    assert [row.id for row in source.index] == ["IM0001", "a/frontal", "a/lateral", "dx", "photo"]
    given = {row[0]: row for row in rows}
    for item in source:
        _, text, who, found = given[item["id"]]
        np.testing.assert_array_equal(item["volume"],
                                      image2d.load_radiograph(files[item["id"]], SIZE))
        assert item["volume"].dtype == np.uint8 and item["volume"].shape == (SIZE, SIZE)
        assert (item["report"], item["patient"], ";".join(item["findings"])) == (text, who, found)
        assert item["spacing"] == () and item["boxes"] == {}
        assert item["provenance"] == {"file": str(files[item["id"]].relative_to(images))}
    # MONOCHROME1 stores the picture inverted.
    upright = image2d.load_radiograph(write_dicom(tmp_path / "x", picture(5)), SIZE)
    assert np.abs(source[0]["volume"].astype(int) - upright).max() <= 1
    metadata = source.metadata
    assert (metadata["name"], metadata["shape"], metadata["spacing"]) == ("image2d", [64, 64], [])
    assert metadata["preprocess"] == {"shape": [64, 64], "spacing": [], "dtype": "uint8",
                                      "kind": "radiograph"}
    assert metadata["findings"] == ["Edema", "Pleural Effusion"]
    source.verify()
    assert build(tmp_path / "out", **options).reused
    with pytest.raises(UserError, match="its preprocess is"):
        builders.build_image2d(tmp_path / "out", **options, size=96, progress=False)


def test_tfds_reads_radiographs_too(tmp_path):
    import tensorflow_datasets as tfds

    save(tmp_path / "images" / "x.png", 1)
    table = write_table(tmp_path / "t.csv", [("x", "Text.")])
    out = build(tmp_path / "out", images=tmp_path / "images", table=table).out
    builder = tfds.builder_from_directory(str(out))
    theirs, mine = builder.as_data_source("train")[0], sources.open_source(out)[0]
    assert theirs["volume"].dtype == np.uint8 and theirs["spacing"].shape == (0,)
    np.testing.assert_array_equal(mine["volume"], theirs["volume"])
    assert theirs["report"].decode() == mine["report"] and "Radiographs" in builder.info.description


def test_folder_with_broken_files_goes_on(tmp_path):
    images = tmp_path / "images"
    for number, name in enumerate(("good.png", "cut.jpg", "a/twin.png", "b/twin.png", "silent.png",
                                   "unlisted.png", "double.png")):
        save(images / name, number)
    (images / "cut.jpg").write_bytes((images / "cut.jpg").read_bytes()[:700])
    (images / "text.png").write_text("no picture")
    write_dicom(images / "ct.dcm", picture(9), Modality="CT")
    outside = save(tmp_path / "outside.png", 10)
    save(images / os.fsdecode(b"\xff.png"), 11)
    rows = [(name, "Normal chest.") for name in (
        "good", "cut", "twin", "text", "ct", "absent", "../outside", str(outside), "=cmd()",
        "double", "double.png")]
    rows += [("silent", "Not given."), ("good2", "x"), ("good2", "y"), ("", "Normal chest.")]
    out = build(tmp_path / "out", images=images, table=write_table(tmp_path / "t.csv", rows)).out
    expected = {
        "cut": "it cannot be decoded", "twin": "2 files have this name (a/twin.png, b/twin.png)",
        "text": "neither PNG, JPEG nor DICOM", "ct": "modality is CT", "absent": "no image file",
        "../outside": "no image file", str(outside): "no image file", "'=cmd()": "no image file",
        "double": "2 ids of the table name this file",
        "double.png": "2 ids of the table name this file", "silent": "report is empty",
        "good2": "2 rows of the table", "": "row 15 of the table has no id",
        "unlisted.png": "no report row in the table",
        "\\udcff.png": "no report row in the table"}
    found = {row[0] or (row[1] if row[2].startswith("no report row") else ""): row[2]
             for row in failures(out)[1:]}
    assert found.keys() == expected.keys()
    for name, reason in expected.items():
        assert reason in found[name], name
    assert [item["id"] for item in sources.open_source(out)] == ["good"]


def test_images_of_a_patient_stay_together_and_shards_count_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "SHARD_BYTES", 3 * SIZE * SIZE)
    images = tmp_path / "images"
    for number in range(12):
        save(images / f"i{number:02d}.png", number)
    rows = [(f"i{n:02d}", f"Study {n // 2}.", f"p{n // 4}") for n in range(12)]
    table = write_table(tmp_path / "t.csv", rows, ("id", "report", "patient"))
    summary = build(tmp_path / "out", images=images, table=table, patient_column="patient",
                    split={"train": 0.5, "test": 0.5})
    patients = [{row.patient for row in sources.open_source(summary.out, split).index}
                for split in summary.splits]
    assert len(patients) == 2 and sum(map(len, patients)) == len(set.union(*patients)) == 3
    for split, count in summary.splits.items():
        files = list(summary.out.glob(f"image2d-{split}.array_record-*"))
        assert len(files) == -(-count // 3)


@pytest.mark.parametrize("options,reason", [
    ({}, "either images and table, or root"), ({"images": "i"}, "either images and table"),
    ({"images": "i", "table": "t", "root": "r"}, "either images and table"),
    ({"images": "empty", "table": "t.csv"}, "holds no radiograph (.png"),
    ({"images": "nowhere", "table": "t.csv"}, "is not a folder"),
    ({"images": "empty", "table": "t.csv", "reports": "r"}, "leave reports out"),
    ({"images": "empty", "table": "t.csv", "size": 8}, "32 to 4096 pixels"),
    ({"root": "empty", "split": "train"}, "official; leave split out"),
    ({"root": "empty"}, "has no folder files")])
def test_requests_that_make_no_sense(tmp_path, monkeypatch, options, reason):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    write_table("t.csv", [("a", "Text.")])
    with pytest.raises(UserError, match=re.escape(reason)):
        builders.build_image2d("out", **options, progress=False)
    assert not Path("out").exists()


# MIMIC-CXR

COLUMNS = {"metadata": ("dicom_id", "subject_id", "study_id", "ViewPosition", "Rows"),
           "split": ("dicom_id", "study_id", "subject_id", "split"),
           "chexpert": ("subject_id", "study_id", *sorted((*mimic_cxr.CHEXPERT, "No Finding")))}


class Release:
    """A small MIMIC-CXR-JPG: rows to change before `write`."""

    def __init__(self, root):
        self.root, self.reports = root, root / "files"
        self.metadata, self.split, self.chexpert, self.texts = [], [], [], {}

    def add(self, dicom, subject, study, view="PA", split="train", labels=None, text=None):
        """One image; the first of a study brings its labels and its report."""
        path = self.root / "files" / f"p{subject[:2]}" / f"p{subject}" / f"s{study}"
        save(path / f"{dicom}.jpg", len(self.metadata) % 50, quality=95)
        self.metadata.append([dicom, subject, study, view, "70"])
        self.split.append([dicom, study, subject, split])
        if not any(row[1] == study for row in self.chexpert):
            cells = {"No Finding": "1.0"} if labels is None else labels
            self.chexpert.append([subject, study, *(
                cells.get(name, "") for name in COLUMNS["chexpert"][2:])])
            self.texts[f"p{subject[:2]}/p{subject}/s{study}.txt"] = (
                TEXT.format(study) if text is None else text)
        return path / f"{dicom}.jpg"

    def write(self, version="2.0.0", packed=True):
        for name, columns in COLUMNS.items():
            rows = getattr(self, name)
            order = np.random.default_rng(len(name)).permutation(len(rows))
            file = self.root / f"mimic-cxr-{version}-{name}.csv{'.gz' if packed else ''}"
            with (gzip.open if packed else open)(file, "wt", newline="") as stream:
                csv.writer(stream).writerows([columns, *(rows[n] for n in order)])
        for name, text in self.texts.items():
            (self.reports / name).parent.mkdir(parents=True, exist_ok=True)
            (self.reports / name).write_bytes(text.encode() if isinstance(text, str) else text)
        return self.root


@pytest.fixture
def release(tmp_path):
    found = Release(tmp_path / "mimic")
    found.add("aa-1", "10000001", "50000011", labels={
        "Edema": "1.0", "Pleural Effusion": "-1.0", "Fracture": "0.0", "Support Devices": "1"})
    found.add("aa-2", "10000001", "50000011", "AP")
    found.add("aa-3", "10000001", "50000011", "LATERAL")
    found.add("bb-1", "10000002", "50000021", "AP", "validate")
    found.add("cc-1", "11000003", "50000031", "PA", "test", {"Pneumothorax": "1.0"})
    return found


def test_mimic_cxr_joins_images_tables_and_reports(release, tmp_path):
    summary = build(tmp_path / "out", root=release.write())
    assert summary.splits == {"train": 2, "valid": 1, "test": 1}
    assert (summary.failed, summary.unlisted) == (0, 1)
    assert reasons(summary.out) == {"aa-3": "left out: its view is LATERAL"}
    first, twin = sources.open_source(summary.out, "train")
    assert (first["id"], twin["id"]) == ("aa-1", "aa-2")
    assert first["patient"] == "10000001"
    assert first["findings"] == twin["findings"] == ("Edema", "Support Devices")
    # The impression comes first, as in MGCA's captions.
    assert first["report"] == twin["report"] == (
        "No acute disease of number 50000011.\nThe lungs are clear.")
    assert twin["provenance"] == {"file": "p10/p10000001/s50000011/aa-2.jpg", "study": "50000011",
                                  "view": "AP"}
    for item in (first, twin):
        np.testing.assert_array_equal(item["volume"], image2d.load_radiograph(
            release.root / "files" / item["provenance"]["file"], SIZE))
    assert not np.array_equal(first["volume"], twin["volume"])
    source = sources.open_source(summary.out, "test")
    assert source[0]["findings"] == ("Pneumothorax",) and source.metadata["name"] == "mimic-cxr"
    assert sources.open_source(summary.out, "valid")[0]["findings"] == ()
    assert source.metadata["findings"] == list(mimic_cxr.CHEXPERT)
    assert len(mimic_cxr.CHEXPERT) == 13
    assert build(tmp_path / "out", root=release.root).reused
    with pytest.raises(UserError, match="its views is"):
        build(tmp_path / "out", root=release.root, views=("AP",))
    (release.root / "files/p11/p11000003/s50000031.txt").write_text("IMPRESSION: Changed a lot.")
    with pytest.raises(UserError, match="changed since"):
        build(tmp_path / "out", root=release.root)


def test_reports_elsewhere_other_versions_and_views(release, tmp_path):
    whole = build(tmp_path / "whole", root=release.write())
    for reports, version in (("texts/files", "2.1.0"), ("texts", "3.0")):
        for file in release.root.iterdir():
            if file.is_file():
                file.unlink()
        for file in release.root.rglob("*.txt"):
            file.unlink()
        release.reports = tmp_path / version / reports
        release.write(version, packed=False)
        moved = build(tmp_path / f"out {version}", root=release.root,
                      reports=tmp_path / version / "texts")
        assert moved.fingerprint == whole.fingerprint
    # An unpacked table beside its archive is the same table.
    with gzip.open(release.root / "mimic-cxr-3.0-split.csv.gz", "wt") as stream:
        stream.write("not looked at")
    lateral = build(tmp_path / "lateral", root=release.root, reports=tmp_path / "3.0" / "texts",
                    views=["LATERAL"])
    assert [item["id"] for item in sources.open_source(lateral.out)] == ["aa-3"]
    assert reasons(lateral.out)["aa-1"] == "left out: its view is PA"
    with pytest.raises(UserError, match="'LL' is none of .*choose among AP, LATERAL, PA"):
        build(tmp_path / "none", root=release.root, reports=tmp_path / "3.0", views=["PA", "LL"])
    with pytest.raises(UserError, match="no view is none of"):
        build(tmp_path / "none", root=release.root, reports=tmp_path / "3.0", views=[])


def test_what_mimic_cxr_lacks_is_listed(release, tmp_path, monkeypatch):
    def row(table, key):
        return next(row for row in table if key in row)

    def cell(study, name, value):
        row(release.chexpert, study)[COLUMNS["chexpert"].index(name)] = value

    expected = {"aa-3": "left out: its view is LATERAL"}
    for number, (name, reason) in enumerate({
            "no-file": "there is no file p20/p20000000/s60000000/no-file.jpg",
            "no-report": "there is no report p20/p20000001/s60000001.txt",
            "no-sections": "s60000002.txt has no findings or impression section",
            "two-words": "s60000003.txt have fewer than 3 words",
            "no-split": "no row in mimic-cxr-2.0.0-split.csv.gz",
            "no-labels": "no row in mimic-cxr-2.0.0-chexpert.csv.gz",
            "no-metadata": "no row in mimic-cxr-2.0.0-metadata.csv.gz",
            "twice": "2 rows of mimic-cxr-2.0.0-metadata.csv.gz have this dicom_id",
            "label": "column 'Edema' is '2.0', not 1, 0, -1 or empty",
            "no-number": "column 'Edema' is 'yes', not a number",
            "official": "column 'split' is 'dev', not one of train, validate, test",
            "patient": "is of patient '1', the metadata say '20000011'",
            "two-files": "2 files have this name (p20/p20000012/s60000012/two-files.jpeg",
            "broken": "neither PNG, JPEG nor DICOM", "latin": "s60000014.txt is not UTF-8",
            "no-view": "left out: its view is not given",
            "torn": "has its patient in the splits test and train"}.items()):
        path = release.add(name, f"200000{number:02d}", f"600000{number:02d}")
        expected[name] = reason
        study = f"600000{number:02d}"
        match name:
            case "no-file":
                path.unlink()
            case "no-report":
                del release.texts["p20/p20000001/s60000001.txt"]
            case "no-sections":
                release.texts["p20/p20000002/s60000002.txt"] = "HISTORY: Cough.\n No section."
            case "two-words":
                release.texts["p20/p20000003/s60000003.txt"] = "IMPRESSION: As above."
            case "no-split" | "no-metadata" | "no-labels":
                table = {"no-labels": release.chexpert}.get(name) or getattr(release, name[3:])
                table.remove(row(table, study))
            case "twice":
                release.metadata.append(list(row(release.metadata, study)))
            case "label" | "no-number":
                cell(study, "Edema", "2.0" if name == "label" else "yes")
            case "official":
                row(release.split, study)[3] = "dev"
            case "patient":
                row(release.chexpert, study)[0] = "1"
            case "two-files":
                save(path.with_suffix(".jpeg"), 1)
            case "broken":
                path.write_bytes(b"no picture")
            case "latin":
                release.texts["p20/p20000014/s60000014.txt"] = "IMPRESSION: Säule".encode("latin-1")
            case "no-view":
                row(release.metadata, study)[3] = ""
            case "torn":
                release.add("torn-2", "20000016", "60000099", split="test")
                expected["torn-2"] = reason
    release.metadata.append(["../../evil", "../..", "x", "PA", "70"])
    expected["../../evil"] = "there is no file p../p../../sx/../../evil.jpg"
    release.metadata.append(["", "20000011", "60000011", "PA", "70"])
    expected[""] = "has no dicom_id; fill it in"
    save(release.root / "files" / "p10" / "stray.jpg", 3)
    expected["p10/stray.jpg"] = "no row of mimic-cxr-2.0.0-metadata.csv.gz belongs to this file"
    no_row = "p20/p20000006/s60000006/no-metadata.jpg"
    expected[no_row] = "no row of mimic-cxr-2.0.0-metadata.csv.gz belongs to this file"
    summary = build(tmp_path / "out", root=release.write())
    found = {row[0] or (row[1] if row[1].endswith("jpg") else ""): row[2]
             for row in failures(summary.out)[1:]}
    assert found.keys() == expected.keys()
    for name, reason in expected.items():
        assert reason in found[name], (name, found[name])
    assert summary.written == 4 and summary.unlisted == 4
    text = (summary.out / "failures.csv").read_text()
    assert "Cough" not in text and "As above" not in text
    # Another file system lists its folders in another order.
    plain = os.walk

    def ordered(top, backwards):
        for here, folders, names in plain(top):
            folders.sort(reverse=backwards)
            yield here, folders, sorted(names, reverse=backwards)

    for backwards in (False, True):
        monkeypatch.setattr(os, "walk", functools.partial(ordered, backwards=backwards))
        assert build(tmp_path / "out", root=release.root).reused


def test_trees_that_are_no_mimic_cxr(release, tmp_path):
    release.write()
    split = release.root / "mimic-cxr-2.0.0-split.csv.gz"
    content = split.read_bytes()
    for change, reason in (
            (content[:-20], "no whole gzip file"), (b"dicom_id", "no whole gzip file"),
            (gzip.compress(b"dicom_id,split\na,b\n"), "no column 'subject_id', 'study_id'")):
        split.write_bytes(change)
        with pytest.raises(UserError, match=reason):
            build(tmp_path / "out", root=release.root)
    split.unlink()
    with pytest.raises(UserError, match="has no table mimic-cxr-2.0.0-split.csv or .csv.gz"):
        build(tmp_path / "out", root=release.root)
    for version in ("2.0.0", "2.1.0"):
        (release.root / f"mimic-cxr-{version}-split.csv.gz").write_bytes(content)
    with pytest.raises(UserError, match="2.0.0-split.csv.gz and mimic-cxr-2.1.0.*keep one"):
        build(tmp_path / "out", root=release.root)
    (release.root / "mimic-cxr-2.1.0-split.csv.gz").unlink()
    (tmp_path / "texts").mkdir()
    with pytest.raises(UserError, match="texts holds no report; unpack"):
        build(tmp_path / "out", root=release.root, reports=tmp_path / "texts")
    for file in (release.root / "files").rglob("*.jpg"):
        file.unlink()
    with pytest.raises(UserError, match="files holds no image"):
        build(tmp_path / "out", root=release.root)


# Sections of reports

REPORTS = {
    "usual": ("""                                 FINAL REPORT
 EXAMINATION:  CHEST (PA AND LAT)

 INDICATION:  ___ year old woman with cough

 COMPARISON:  Findings of the last year

 FINDINGS:

 Lungs are clear.  Heart size
 is normal.

 IMPRESSION:

 No pneumonia.
""", "No pneumonia.", "Lungs are clear. Heart size is normal."),
    "other line breaks and case": (
        "Final Report\r\nHistory: Pain.\r\nFindings: Clear\rlungs.\r\nImpression : Normal chest.\r",
        "Normal chest.", "Clear lungs."),
    "one line": ("FINAL REPORT EXAM: Chest. HISTORY: Pain. FINDINGS: Clear lungs. IMPRESSION: "
                 "Normal chest. RECOMMENDATION(S): None.", "Normal chest.", "Clear lungs."),
    "conclusion": ("TECHNIQUE: AP.\nCONCLUSION:\nStable lines.", "Stable lines.", None),
    "only findings": ("FINDINGS: Stable lines.\nNOTIFICATION: Dr. X was told.", None,
                      "Stable lines."),
    "both in one": ("HISTORY: Pain.\n FINDINGS AND\n IMPRESSION:\n Clear lungs.", None,
                    "Clear lungs."),
    "with a slash": ("IMPRESSION/FINDINGS: Clear lungs.", None, "Clear lungs."),
    "sub-headings stay": ("FINDINGS:\nLUNGS: Clear.\nHEART: Large.\nIMPRESSION: Large heart: old.",
                          "Large heart: old.", "LUNGS: Clear. HEART: Large."),
    "headings without colon": ("FINDINGS\nClear lungs.\n\nIMPRESSION\nNormal chest.",
                               "Normal chest.", "Clear lungs."),
    "wet read": (" WET READ: ___ ___ 7:47 PM\n  No effusion.\n  IMPRESSION: Preliminary.\n"
                 " ______________________________\n   FINAL REPORT\n FINDINGS: Small effusion.",
                 None, "Small effusion."),
    "wet read after": ("IMPRESSION: Final words.\n_________\n WET READ VERSION #1 at noon\n Other.",
                       "Final words.", None),
    "addendum": ("FINAL ADDENDUM\n ADDENDUM  Told by phone.\n__________________\nFINAL REPORT\n"
                 "IMPRESSION: Nodule seen.", "Nodule seen.", None),
    "last of a kind": ("IMPRESSION: First.\nIMPRESSION: Second one.\nFINDINGS: Text.\nFINDINGS:\n",
                       "Second one.", "Text."),
    "words in the text": ("FINDINGS: These\nfindings, and the impression\nare old.\nhistory: no.",
                          None, "These findings, and the impression are old."),
    "provisional": ("PROVISIONAL FINDINGS IMPRESSION (PFI): Not yet.\nIMPRESSION: Now it is.",
                    "Now it is.", None),
    "none": ("HISTORY: Pain.\n\n The lungs are clear.", None, None),
    "empty": ("", None, None),
}


@pytest.mark.parametrize("name", REPORTS)
def test_sections_of_reports(name):
    text, impression, findings = REPORTS[name]
    found = mimic_cxr.sections(text)
    assert (found.get("impression"), found.get("findings")) == (impression, findings)


def test_long_reports_are_read_in_linear_time_or_refused(tmp_path):
    import time

    for text in (" " * 100_000, "FINDINGS " * 10_000, "_" * 100_000, ("\n" + " " * 40) * 2_500,
                 "FINDINGS" + "\n" * 100_000, "IMPRESSION (" * 8_000):
        started = time.process_time()
        mimic_cxr.sections(text)
        assert time.process_time() - started < 5
    file = tmp_path / "s1.txt"
    file.write_text("IMPRESSION: " + "word " * 300_000)
    with pytest.raises(NotACT, match="s1.txt is larger than 1,048,576 bytes"):
        mimic_cxr.read_caption(file)
    with pytest.raises(NotACT, match="cannot be read"):
        mimic_cxr.read_caption(tmp_path / "s2.txt")


def test_the_recipe_of_radiographs():
    recipe = image2d.Radiograph(shape=(64, 64))
    assert image2d.Radiograph.from_dict(recipe.as_dict()) == recipe
    assert image2d.Radiograph().shape == (256, 256)
    for change in ({"shape": [64, 65]}, {"shape": [64, 64, 64]}, {"shape": [8, 8]},
                   {"dtype": "int16"}, {"spacing": [1.0, 1.0]}, {"kind": "volume"}):
        with pytest.raises(UserError):
            image2d.Radiograph.from_dict(recipe.as_dict() | change)


# Training and evaluation

TINY = {
    "model.input.shape": (28, 28), "data.crop": (28, 28), "model.vision.patch": (14, 14),
    "model.vision.width": 24, "model.vision.heads": 3, "model.vision.depth": 1,
    "model.vision.mlp_width": 48, "model.embed_dim": 24, "model.head.hidden": 32,
    "model.local_head.hidden": 32, "model.prototypes": 8, "model.dtype": "float32",
    "model.text.width": 24, "model.text.heads": 3, "model.text.mlp_width": 48,
    "model.text.depth": 1, "model.text.max_tokens": 24, "data.batch_size": 8, "train.steps": 2,
    "train.eval_every": 0, "train.log_every": 1}


def test_a_small_mgca_trains_on_radiographs_and_is_evaluated(tmp_path, monkeypatch):
    import jax
    from rich.console import Console

    from brgsa_jax import mesh as meshes
    from brgsa_jax.evals.protocol import get_protocol
    from brgsa_jax.evals.run import Candidate, embed_volumes, report_models
    from brgsa_jax.predict import load_model, read_files, write_pictures
    from brgsa_jax.train import trainer

    images = tmp_path / "images"
    rows = []
    for number in range(24):
        save(images / f"i{number:02d}.png", number)
        found = "Edema" if number % 2 else "Cardiomegaly;Edema" if number % 3 else ""
        rows.append((f"i{number:02d}", f"Report of study {number}. There is something.", found))
    table = write_table(tmp_path / "t.csv", rows, ("id", "report", "findings"))
    out = builders.build_image2d(tmp_path / "set", images=images, table=table, size=32, workers=1,
                                 findings_column="findings", progress=False,
                                 split={"train": 0.6, "test": 0.4}).out
    # One device compiles in half the time.
    mesh = meshes.make_mesh(1, 1, jax.devices()[:1])
    monkeypatch.setattr(meshes, "make_mesh", lambda *_: mesh)
    quiet, workdir = Console(quiet=True), tmp_path / "run"
    config = configs.get_config("mgca", **TINY, **{"data.path": str(out)})
    assert trainer.train(config, workdir, console=quiet).stop == 2
    model = load_model(workdir / "model")
    source = sources.open_source(out, "test")
    centre = np.stack([source[n % len(source)]["volume"][2:30, 2:30] for n in range(16)])
    encoded = model.encode_volume(centre, batch_size=16)
    assert encoded.shape == (16, 24) and np.isfinite(encoded).all()
    np.testing.assert_allclose(embed_volumes(model, source), encoded[:len(source)], atol=1e-6)

    # Files are read as the set was made.
    files = read_files(model, [images / f"{row.id}.png" for row in source.index])
    assert files.ids == [row.id for row in source.index] and not files.failures
    for seen, item in zip(files.volumes, source, strict=True):
        np.testing.assert_array_equal(seen.volume, item["volume"][2:30, 2:30])
    np.testing.assert_allclose(model.encode_volume([images / f"{source.index[0].id}.png"]),
                               encoded[:1], rtol=1e-5, atol=1e-6)
    picture = np.asarray(Image.open(write_pictures(tmp_path, files)[0]))
    np.testing.assert_array_equal(picture, files.volumes[0].volume)

    evaluation = report_models([Candidate("mgca", "MGCA", model, [])], source,
                               get_protocol("chexpert-5"), tmp_path / "eval", title="MGCA",
                               normal_caption="There is no abnormality")
    assert 0 <= evaluation.macro_auroc.value <= 1 and set(evaluation.ids) <= {r[0] for r in rows}
    page = (tmp_path / "eval" / "report.html").read_text()
    assert "image2d, 32×32 pixels, split test" in page
    shown = re.findall(r"data:image/png;base64,([A-Za-z0-9+/=]+)", page)
    pictures = [np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))) for data in shown]
    # Four patients, and of each two heat-maps in colour.
    grey = {picture.tobytes() for picture in pictures if picture.ndim == 2}
    assert len(shown) == 12 and len(grey) == 4
    assert grey <= {item["volume"].tobytes() for item in source}

    other = configs.get_config("mgca", **{**TINY, "model.input.shape": (42, 42),
                                          "data.path": str(out)})
    with pytest.raises(UserError, match="radiographs of 32×32 pixels, read whole or as their "
                       "central 28×28 pixels, the model is for 42×42 pixels"):
        trainer.train(other, tmp_path / "other", console=quiet)
