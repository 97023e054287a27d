"""brgsa_jax.data.ctrate: trees like CT-RATE come out with right HU, sides, ids and labels."""

import csv
import re

import nibabel as nib
import numpy as np
import pytest
from test_builders import failures

from brgsa_jax.config import UserError
from brgsa_jax.data import builders, orientation, readings, sources, tables, volume
from brgsa_jax.summarize.vocabulary import CT_RATE_18

RECIPE = volume.Preprocess(spacing=(7.0, 8.0, 9.0), shape=(26, 20, 18))
SHAPE, SPACING, ORIGIN = (24, 20, 16), (8.0, 8.0, 10.0), (-92.0, -76.0, -75.0)
AXIAL = (1, 0, 0, 0, 1, 0)
FILES = {"metadata": ("metadata/train_metadata.csv", "metadata/validation_metadata.csv"),
         "reports": ("radiology_text_reports/train_reports.csv",
                     "radiology_text_reports/validation_reports.csv"),
         "labels": ("multi_abnormality_labels/train_predicted_labels.csv",
                    "multi_abnormality_labels/valid_predicted_labels.csv")}


def anatomy(point):
    """HU at LPS millimetres: a body, lungs, and a block of bone left, behind and above."""
    x, y, z = np.moveaxis(point, -1, 0)
    hu = np.where((x / 84) ** 2 + (y / 66) ** 2 < 1, 40, -1000)
    for centre in (-36, 36):
        hu = np.where(((x - centre) / 26) ** 2 + (y / 40) ** 2 + (z / 65) ** 2 < 1, -850, hu)
    hu = np.where((abs(x - 40) < 15) & (abs(y - 30) < 15) & (abs(z - 40) < 18), 900, hu)
    return (hu + np.rint(9 * np.sin(1.3 * x + 2.1 * y + 0.7 * z))).astype(np.int32)


def scanned(orientation=AXIAL, z_step=SPACING[2]):
    """HU in the order of a file, by DICOM's own equation, and the position of its first voxel."""
    row, column = np.array(orientation, float).reshape(2, 3)
    axes = np.stack([row, column, np.cross(row, column) * np.sign(z_step)])
    place = np.abs(axes).argmax(axis=1)
    shape = np.array(SHAPE)[place]
    last = np.array(ORIGIN) + (np.array(SHAPE) - 1) * SPACING
    first = np.where(axes.sum(axis=0) > 0, ORIGIN, last)
    index = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
    return anatomy(first + (index * np.array(SPACING)[place]) @ axes), first


def truth(hu):
    return volume.to_canonical(hu, orientation.affine_of(np.eye(3), SPACING, ORIGIN), RECIPE)


TRUTH = truth(scanned()[0])


class Tree:
    """A folder like CT-RATE's, with whatever is wrong with it."""

    def __init__(self, root):
        self.root = root
        self.rows = {name: ([], []) for name in FILES}
        self.no_chest = ([], [])

    def add(self, name, version="fixed", *, hu=None, intercept=-1024, slope=1, plane=AXIAL,
            z_step=SPACING[2], dtype=np.int16, report="Lungs are clear.", impression="Not given.",
            findings=(), leave_out=(), header=None, **metadata):
        """Writes a volume with its rows; `metadata` replaces cells."""
        split = name.split("_")[0]
        found, first = scanned(plane, z_step)
        found = found if hu is None else hu
        place = np.abs(np.array(plane).reshape(2, 3)).argmax(axis=1)
        affine = orientation.affine_of(orientation.plane_axes(plane), (*np.array(SPACING)[place],
                                                                       z_step), first)
        folder = f"{split}_fixed" if version == "fixed" else split
        if version == "v1":
            found, affine = (found - intercept) / slope, np.diag([0.5, 0.5, 2.0, 1.0])
            assert (found == np.rint(found)).all()
        path = self.root / "dataset" / folder / name.rsplit("_", 2)[0] / name.rsplit("_", 1)[0]
        if "file" not in leave_out:
            path.mkdir(parents=True, exist_ok=True)
            image = nib.Nifti1Image(found.astype(dtype), affine if header is None else header)
            image.header.set_xyzt_units("mm")
            nib.save(image, path / f"{name}.nii.gz")
        volume_name = f"{name}.nii.gz"
        rows = {
            "metadata": {"VolumeName": volume_name, "Manufacturer": "X", "RescaleSlope": slope,
                         "RescaleIntercept": intercept, "Rows": found.shape[1],
                         "Columns": float(found.shape[0]), "NumberofSlices": found.shape[2],
                         "XYSpacing": str([SPACING[0]] * 2), "ZSpacing": z_step,
                         "ImagePositionPatient": str(list(map(float, first))),
                         "ImageOrientationPatient": str(list(map(float, plane)))} | metadata,
            "reports": {"VolumeName": volume_name, "ClinicalInformation_EN": "Not given.",
                        "Technique_EN": "CT", "Findings_EN": report, "Impressions_EN": impression},
            "labels": {"VolumeName": volume_name,
                       **{label: int(label in findings) for label in CT_RATE_18}}}
        for table, row in rows.items():
            if table not in leave_out:
                self.rows[table][split == "valid"].append(row)
        return self

    def write(self, seed=0):
        """Writes the tables, each in another random order."""
        rng = np.random.default_rng(seed)
        data = self.root / "dataset"
        for table, names in FILES.items():
            for name, rows in zip(names, self.rows[table], strict=True):
                (data / name).parent.mkdir(parents=True, exist_ok=True)
                with (data / name).open("w", newline="", encoding="utf-8") as stream:
                    columns = list(rows[0]) if rows else ["VolumeName"]
                    writer = csv.DictWriter(stream, columns)
                    writer.writeheader()
                    writer.writerows(rows[i] for i in rng.permutation(len(rows)))
        for split, lines in zip(("train", "valid"), self.no_chest, strict=True):
            (data / f"metadata/no_chest_{split}.txt").write_text("\n".join(lines) + "\n")
        return self.root


def build(root, out, **options):
    return builders.build_ct_rate(out, root=root, preprocess=RECIPE, workers=1, progress=False,
                                  **options)


def reasons(out):
    return {row[0]: row[2] for row in failures(out)[1:]}


def test_version_1_gets_its_scale_geometry_ids_and_labels_from_the_tables(tmp_path):
    padded = scanned()[0].copy()
    padded[:2, :2] = -8192
    tree = Tree(tmp_path / "ct")
    tree.add("train_2_a_1", "v1", findings=("Lung nodule", "Cardiomegaly"), report="Two.")
    tree.add("train_10_a_1", "v1", intercept=-8192, hu=padded, dtype=np.uint16, report="Ten.")
    tree.add("train_10_a_2", "v1", intercept=-8192, report="Ten.", impression="Nothing.")
    tree.add("train_3_b_1", "v1", slope=2, intercept=-1024, hu=scanned()[0] // 2 * 2,
             findings=CT_RATE_18)
    tree.add("valid_1_a_1", "v1", report="Valid.")
    summary = build(tree.write(), tmp_path / "out", impressions=True)
    assert summary.splits == {"train": 4, "test": 1} and summary.failed == summary.unlisted == 0
    train, test = (sources.open_source(summary.out, split) for split in ("train", "test"))
    assert [row.id for row in train.index] == [
        f"{name}.nii.gz" for name in ("train_2_a_1", "train_3_b_1", "train_10_a_1", "train_10_a_2")]
    assert [row.patient for row in train.index] == ["train_2", "train_3", "train_10", "train_10"]
    assert [item["report"] for item in train] == [
        "Two.", "Lungs are clear.", "Ten.", "Ten.\nNothing."]
    assert train[0]["findings"] == ("Cardiomegaly", "Lung nodule")  # The order of the 18.
    assert train[1]["findings"] == CT_RATE_18 and test[0]["findings"] == ()
    assert train.metadata["findings"] == list(CT_RATE_18)
    for item in (train[0], train[3], test[0]):
        np.testing.assert_array_equal(item["volume"], TRUTH)
    np.testing.assert_array_equal(train[1]["volume"], truth(scanned()[0] // 2 * 2))
    np.testing.assert_array_equal(train[2]["volume"], truth(padded))
    assert (train[2]["volume"] == -1000).sum() > (TRUTH == -1000).sum()  # Padding is air.
    assert train[2]["provenance"]["scan"] == "train_10_a"
    assert train[2]["provenance"]["intercept"] == -8192


@pytest.mark.parametrize("version", ["v1", "fixed"])
@pytest.mark.parametrize("plane,z_step", [
    (AXIAL, 10.0), ((-1, 0, 0, 0, -1, 0), 10.0), ((-1, 0, 0, 0, 1, 0), 10.0), (AXIAL, -10.0)])
def test_left_is_left_whatever_the_order_of_the_file(tmp_path, version, plane, z_step):
    root = Tree(tmp_path / "ct").add("train_1_a_1", version, plane=plane, z_step=z_step).write()
    summary = build(root, tmp_path / "out")
    found = sources.open_source(summary.out)[0]["volume"]
    np.testing.assert_array_equal(found, TRUTH)
    x, y, z = (axis.mean() / n for axis, n in zip(np.nonzero(found > 500), found.shape,
                                                  strict=True))
    assert x > 0.6 and y > 0.6 and z > 0.6, "the block lies left, behind and above"


def test_turned_planes_by_the_equation_of_dicom():
    """Sagittal and coronal slices, which CT-RATE does not have, prove the cross product."""
    for plane in ((0, 1, 0, 0, 0, -1), (1, 0, 0, 0, 0, -1), (0, 0, 1, 0, 1, 0)):
        hu, first = scanned(plane)
        axes = orientation.plane_axes(plane)
        place = np.abs(axes).argmax(axis=0)
        affine = orientation.affine_of(axes, np.array(SPACING)[place], first)
        np.testing.assert_array_equal(volume.to_canonical(hu, affine, RECIPE), TRUTH)
    oblique = np.array([0.8, 0.6, 0, -0.6, 0.8, 0])
    point = orientation.affine_of(orientation.plane_axes(oblique), (2, 3, 4), (5, 6, 7)) @ [
        1, 10, 100, 1]
    np.testing.assert_allclose(point[:3] * [-1, -1, 1],
                               np.array([5, 6, 7]) + 2 * oblique[:3] + 30 * oblique[3:]
                               + 400 * np.cross(oblique[:3], oblique[3:]))
    for wrong in ((1, 0, 0, 1, 0, 0), (1, 0, 0, 0, 0.9, 0), (0,) * 6):
        with pytest.raises(ValueError, match="right angles"):
            orientation.plane_axes(wrong)


def test_folder_values_and_metadata_must_agree(tmp_path):
    raw = scanned()[0] + 1024
    tree = Tree(tmp_path / "ct").add("train_9_a_1")
    tree.add("train_1_a_1", hu=raw).add("train_2_a_1", hu=raw + 7168)
    tree.add("train_3_a_1", header=np.diag([8.0, -8.0, 10.0, 1.0]))
    tree.add("train_4_a_1", ZSpacing=5.0).add("train_6_a_1", Rows=512)
    tree.add("train_5_a_1", hu=scanned()[0] - 1024)
    tree.add("valid_9_a_1", "v1")
    tree.add("valid_1_a_1", "v1", hu=scanned()[0] - 1024)
    tree.add("valid_2_a_1", "v1", RescaleIntercept=-8192)
    tree.add("valid_3_a_1", "v1", NumberofSlices=99)
    summary = build(tree.write(), tmp_path / "out")
    assert summary.splits == {"train": 3, "test": 1}
    found = reasons(summary.out)
    for name, words in {
            "train_1_a_1": "repaired version.*raw numbers with slope 1 and intercept -1024 .air "
                           "near 24.*nothing is guessed",
            "train_2_a_1": "intercept -8192 .air near 7192",
            "train_3_a_1": "axes run RPS, the metadata say LPS",
            "train_5_a_1": "neither HU nor raw",
            "valid_1_a_1": "folder of version 1.*are HU already .air near -1000",
            "valid_2_a_1": "metadata give it slope 1 and intercept -8192, but its values are raw "
                           "numbers with slope 1 and intercept -1024",
            "valid_3_a_1": "it has 16 slices, not 99 as in the metadata, so the row may"}.items():
        assert re.search(words, found.pop(f"{name}.nii.gz")), name
    assert not found
    warned = {row[0]: row[2] for row in failures(summary.out, "warnings.csv")[1:]}
    assert "differs from the metadata's 8x8x5 mm" in warned["train_4_a_1.nii.gz"]
    assert warned["train_6_a_1.nii.gz"] == "it has 20 rows, not 512 as in the metadata"


def test_what_is_missing_is_listed(tmp_path):
    tree = Tree(tmp_path / "ct").add("train_1_a_1").add("train_1_b_1", ZSpacing="")
    for number, table in enumerate(("metadata", "reports", "labels"), start=2):
        tree.add(f"train_{number}_a_1", leave_out=(table,))
    tree.add("train_5_a_1", leave_out=("file",)).add("train_6_a_1", report="Not given.")
    tree.add("train_7_a_1").rows["labels"][0][-1]["Emphysema"] = "yes"
    tree.add("train_8_a_1").add("train_8_a_1")
    tree.add("valid_1_a_1", "v1").add("valid_2_a_1", "v1", ZSpacing="")
    tree.add("valid_3_a_1", "v1", XYSpacing="0.34").add("valid_4_a_1", "v1", RescaleSlope=0)
    tree.add("valid_5_a_1", "v1", ImageOrientationPatient="[1, 0, 0, 1, 0, 0]")
    tree.add("valid_6_a_1", "v1", XYSpacing="[0.34, 0.68]")
    tree.add("valid_7_a_1", "v1", XYSpacing="[__import__('os').getcwd(), 1]")
    root = tree.write()
    data = root / "dataset"
    (data / "train_fixed/train_1/train_1_a/notes.txt").write_text("x")
    (data / "train_fixed/valid_9_a_1.nii.gz").write_bytes(b"x")
    (data / "train_fixed/copy").mkdir()
    (data / "train_fixed/copy/train_9_a_1.nii.gz").write_bytes(b"x")
    (data / "train_fixed/train_9_a_1.nii.gz").write_bytes(b"x")
    summary = build(root, tmp_path / "out")
    assert summary.splits == {"train": 2, "test": 1} and summary.unlisted == 1
    found = reasons(summary.out)
    assert found.pop("") == "left out: no .nii.gz file"
    expected = {
        "train_2_a_1": "no row in metadata/train_metadata.csv",
        "train_3_a_1": "no row in radiology_text_reports/train_reports.csv",
        "train_4_a_1": "no row in multi_abnormality_labels/train_predicted_labels.csv",
        "train_5_a_1": "no such file below train_fixed", "train_6_a_1": "the report is empty",
        "train_7_a_1": "of train_predicted_labels.csv: column 'Emphysema' is 'yes', not 0 or 1",
        "train_8_a_1": "2 rows of train_reports.csv", "train_9_a_1": "2 files have this name",
        "valid_2_a_1": "validation_metadata.csv: column 'ZSpacing' is empty, not a number",
        "valid_3_a_1": "column 'XYSpacing' is '0.34', not a list of 2 numbers",
        "valid_4_a_1": "'RescaleSlope' is 0, not positive", "valid_5_a_1": "at right angles",
        "valid_6_a_1": "two sizes, 0.34 and 0.68", "valid_7_a_1": "not a list of 2 numbers",
        "valid_9_a_1": "not one of CT-RATE's train split"}
    assert found.keys() == {f"{name}.nii.gz" for name in expected}
    for name, words in expected.items():
        assert words in found[f"{name}.nii.gz"], (name, found[f"{name}.nii.gz"])
    warned = {row[0]: row[2] for row in failures(summary.out, "warnings.csv")[1:]}
    assert "not compared with the metadata: row" in warned["train_1_b_1.nii.gz"]


def test_volumes_without_a_chest_are_left_out_by_name(tmp_path):
    tree = Tree(tmp_path / "ct")
    for name in ("train_1_a_1", "train_1_a_2", "train_2_a_1", "train_2_b_1", "train_21_a_1"):
        tree.add(name)
    tree.no_chest[0].extend(["train/train_1/train_1_a/train_1_a_2.nii.gz", "train_2_a"])
    summary = build(tree.write(), tmp_path / "out")
    assert [row.id.split(".")[0] for row in sources.open_source(summary.out).index] == [
        "train_1_a_1", "train_2_b_1", "train_21_a_1"]
    assert summary.failed == 0 and summary.unlisted == 2 and "2 left out" in str(summary)
    assert all("no_chest_train.txt lists it" in reason for reason in reasons(summary.out).values())


@pytest.mark.parametrize("twins,kept", [
    ("all", ["1_a_1", "1_a_2", "1_a_10", "2_a_1", "2_a_2"]), ("first", ["1_a_1", "2_a_1"]),
    ("thinnest", ["1_a_2", "2_a_1"])])
def test_twin_reconstructions(tmp_path, twins, kept):
    tree = Tree(tmp_path / "ct")
    for name, step in (("1_a_10", 5.0), ("1_a_1", 10.0), ("1_a_2", 5.0), ("2_a_2", ""),
                       ("2_a_1", "")):
        tree.add(f"train_{name}", ZSpacing=step)
    summary = build(tree.write(), tmp_path / "out", twins=twins)
    source = sources.open_source(summary.out)
    assert [row.id for row in source.index] == [f"train_{name}.nii.gz" for name in kept]
    assert summary.unlisted == 5 - len(kept) and summary.failed == 0
    assert {item["provenance"]["scan"] for item in source} == {"train_1_a", "train_2_a"}
    if twins == "thinnest":
        assert "reconstruction of train_1_a, of which train_1_a_2.nii.gz is the thinnest" in (
            reasons(summary.out)["train_1_a_1.nii.gz"])


def test_official_splits_and_a_share_held_out_by_patient(tmp_path):
    tree = Tree(tmp_path / "ct").add("valid_1_a_1").add("valid_2_a_1")
    for patient in range(1, 9):
        tree.add(f"train_{patient}_a_1").add(f"train_{patient}_b_1")
    root = tree.write()
    assert build(root, tmp_path / "a").splits == {"train": 16, "test": 2}
    assert build(root, tmp_path / "b", official_valid="valid").splits == {"train": 16, "valid": 2}
    held = build(root, tmp_path / "c", holdout=0.4)
    assert held.splits["test"] == 2 and held.splits["train"] + held.splits["valid"] == 16
    train, valid = ({row.patient for row in sources.open_source(held.out, split).index}
                    for split in ("train", "valid"))
    assert valid and not train & valid
    for wrong, words in (({"twins": "best"}, "choose one of all, first, thinnest"),
                         ({"version": "v2"}, "choose one of auto, v1, fixed"),
                         ({"holdout": 1.0}, "from 0 to below 1"),
                         ({"holdout": 0.1, "official_valid": "valid"}, "leave official_valid"),
                         ({"version": "v1"}, "has none of the folders train, valid")):
        with pytest.raises(UserError, match=words):
            build(root, tmp_path / "d", **wrong)


def test_the_repaired_folder_is_preferred_and_a_build_is_reused(tmp_path):
    tree = Tree(tmp_path / "ct").add("train_1_a_1").add("train_1_a_2")
    tree.add("train_1_a_1", "v1", leave_out=tuple(FILES)).add("train_1_a_2", "v1",
                                                             leave_out=tuple(FILES))
    root = tree.write()
    first = build(root, tmp_path / "a")
    assert sources.open_source(first.out)[0]["provenance"]["version"] == "fixed"
    assert build(root, tmp_path / "a").reused
    old = build(root, tmp_path / "b", version="v1")
    assert sources.open_source(old.out)[0]["provenance"]["version"] == "v1"
    np.testing.assert_array_equal(sources.open_source(old.out)[0]["volume"],
                                  sources.open_source(first.out)[0]["volume"])
    tree.rows["reports"][0][0]["Findings_EN"] = "Changed."
    tree.write()
    with pytest.raises(UserError, match="changed since"):
        build(root, tmp_path / "a")


def test_unusable_trees(tmp_path):
    with pytest.raises(UserError, match="none of the folders train, train_fixed, valid, va"):
        build(tmp_path, tmp_path / "out")
    root = Tree(tmp_path / "ct").add("train_1_a_1").write()
    (root / "dataset/metadata/no_chest_train.txt").unlink()
    with pytest.raises(UserError, match="without a chest.*download it, or make an empty file"):
        build(root, tmp_path / "out")
    (root / "dataset" / FILES["reports"][0]).unlink()
    with pytest.raises(UserError, match="train_reports.csv cannot be read"):
        build(root, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_readings_with_padding_and_without_sense():
    def reading(values, said=None):
        stored = volume.Stored("f", np.asarray(values), 1.0, 0.0, np.eye(4), ())
        return readings.readings_of(stored, said)

    hu = scanned()[0]
    assert reading(hu) == [readings.HU]
    for low, raw in ((24, readings.RAW[0]), (7192, readings.RAW[1])):
        values = hu + 1000 + low
        assert reading(values) == [raw] == reading(values, raw)
        for padding in (0, -1024, -2000):
            corner = values.copy()
            corner[:4, :4] = padding
            assert reading(corner) == [raw], padding
    assert reading((hu + 1024) // 2, readings.Reading(2.0, -1024.0)) == [(2.0, -1024.0)]
    for values in (hu - 1024, hu * 0, hu * 0 + 40, np.full((9, 9, 9), np.nan), hu + 3000):
        assert reading(values) == []
    metal = hu - 1024  # The intercept applied twice: its few bright voxels alone look like a CT.
    metal[10:12, 10:12], metal[12:14, 10:12] = 1100 - 1024, 2000 - 1024
    assert reading(metal) == []
    assert "neither" in readings.describe([])


def test_cells():
    row = {"a": "1e3", "b": "[1, 2.5]", "c": "", "d": "nan", "e": "[1, 'x']", "f": "True"}
    assert tables.number(row, "a") == 1000 and tables.numbers(row, "b", 2) == (1, 2.5)
    assert tables.flag(row, "f") and not tables.flag({"g": "0.0"}, "g")
    for wrong in (lambda: tables.number(row, "d"), lambda: tables.number(row, "c"),
                  lambda: tables.numbers(row, "b", 3), lambda: tables.numbers(row, "e", 2),
                  lambda: tables.numbers({"h": "[" * 5000}, "h", 2), lambda: tables.flag(row, "c")):
        with pytest.raises(ValueError, match="column"):
            wrong()
