"""brgsa_jax.data.radchestct: npz volumes with the right side up, ids joined, labels mapped."""

import csv

import numpy as np
import pytest
import yaml
from test_builders import failures

from brgsa_jax.config import UserError
from brgsa_jax.data import builders, radchestct, sources, volume
from brgsa_jax.summarize.vocabulary import CT_RATE_18

RECIPE = volume.Preprocess(spacing=(0.9, 0.8, 1.0), shape=(60, 56, 48))
SHAPE = (44, 52, 56)  # Slices, rows, columns.
ABNORMALITIES = sorted({abnormality for name in ("brgsa", "hlip", "strict")
                        for sources_ in radchestct.read_mapping(name).findings.values()
                        for abnormality, _ in sources_} | {"groundglass", "nodulegr1cm"})
LOCATIONS = ("lung", "left_upper", "thyroid", "aorta", "heart", "other_location")


def array():
    """HU [slice, row, column], head first: a body, lungs, bone left, behind and above."""
    down, back, left = np.meshgrid(*(np.linspace(-1, 1, n) for n in SHAPE), indexing="ij")
    hu = np.where((left / 0.9) ** 2 + (back / 0.8) ** 2 < 1, 40, -1000)
    for centre in (-0.4, 0.4):
        hu = np.where(((left - centre) / 0.3) ** 2 + (back / 0.5) ** 2 + (down / 0.8) ** 2 < 1,
                      -850, hu)
    hu = np.where((abs(left - 0.5) < 0.2) & (abs(back - 0.4) < 0.2) & (abs(down + 0.5) < 0.2), 900,
                  hu)
    return (hu + np.random.default_rng(0).integers(-9, 9, SHAPE)).clip(-1000, 1000).astype(np.int16)


def write_csv(path, rows):
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


class Release:
    """A folder like the release's."""

    def __init__(self, root):
        self.root = root
        (root / "volumes").mkdir(parents=True)
        self.labels = {"imgtrain": [], "imgvalid": [], "imgtest": []}
        self.metadata = []

    def add(self, note, positive=(), *, split="imgtest", patient=None, file=None, hu=None,
            leave_out=(), **cells):
        """Writes a volume with its rows; `positive` names columns, `cells` replaces metadata."""
        file = file or f"{note}.npz"
        if "file" not in leave_out:
            np.savez_compressed(self.root / "volumes" / file, ct=array() if hu is None else hu)
        if "labels" not in leave_out:
            columns = [f"{a}*{place}" for a in ABNORMALITIES for place in LOCATIONS]
            self.labels[split].append({"NoteAcc_DEID": note} | {
                column: "1.0" if column in positive else "0.0" for column in columns})
        if "metadata" not in leave_out:
            self.metadata.append({"NoteAcc_DEID": note, "VolumeAcc_DEID": file,
                                  "MRN_DEID": patient or f"mrn of {note}", "orig_square": 512,
                                  "orig_orientation": "1,0,0,0,1,0"} | cells)
        return self

    def write(self):
        """Writes the tables, none in the order of another."""
        for name, rows in self.labels.items():
            if rows:
                write_csv(self.root / f"{name}_Abnormality_and_Location_Labels.csv", rows[::-1])
        write_csv(self.root / "CT_Scan_Metadata_Complete_35747.csv", self.metadata)
        return self.root


def build(root, out, **options):
    return builders.build_rad_chestct(out, root=root, preprocess=RECIPE, workers=1, progress=False,
                                      **options)


def reasons(out):
    return {row[0] or row[1]: row[2] for row in failures(out)[1:]}


def test_volumes_come_out_right_side_up_with_ids_patients_and_labels(tmp_path):
    release = Release(tmp_path / "rad")
    release.add("tst2", ["nodule*thyroid", "calcification*aorta"], patient="mrn7", file="other.npz")
    release.add("trn1", ["staple*other_location", "septal_thickening*lung"], split="imgtrain",
                VolumeAcc_DEID="trn1")
    release.add("val3", split="imgvalid")
    summary = build(release.write(), tmp_path / "out")
    assert summary.splits == {"test": 3} and summary.failed == summary.unlisted == 0
    source = sources.open_source(summary.out, "test")
    assert [row.id for row in source.index] == ["trn1", "tst2", "val3"]
    assert [row.patient for row in source.index] == ["mrn of trn1", "mrn7", "mrn of val3"]
    assert [row.findings for row in source.index] == [
        ("Medical material", "Interlobular septal thickening"), ("Calcification", "Lung nodule"),
        ()]
    assert source.metadata["request"]["mapping"][:2] == ["brgsa", "2025.1"]
    item = source[1]
    assert item["report"] == "" and item["provenance"]["file"] == "volumes/other.npz"
    assert item["provenance"]["orientation"] == "IPL"
    # The release's own names: axis 0 runs to inferior, 1 to posterior, 2 to the left.
    expected = volume.to_canonical(array()[::-1].transpose(2, 1, 0), np.diag([-0.8, -0.8, 0.8, 1]),
                                   RECIPE)
    np.testing.assert_array_equal(item["volume"], expected)
    x, y, z = (axis.mean() / n for axis, n in zip(np.nonzero(item["volume"] > 500),
                                                  RECIPE.shape, strict=True))
    assert x > 0.6 and y > 0.6 and z > 0.6, "the block lies left, behind and above"


def test_another_orientation_turns_the_axes():
    """A prone scan was stacked by the same code: its rows run to the right, columns to anterior."""
    supine = radchestct.affine_of_array((1, 0, 0, 0, 1, 0))
    prone = radchestct.affine_of_array((-1, 0, 0, 0, -1, 0))
    np.testing.assert_allclose(supine[:3, :3], 0.8 * np.array([[0, 0, -1], [0, -1, 0],
                                                               [-1, 0, 0]]))
    np.testing.assert_allclose(prone[:3, :3], 0.8 * np.array([[0, 0, 1], [0, 1, 0], [-1, 0, 0]]))


def test_the_three_mappings_as_published():
    brgsa, hlip, strict = map(radchestct.read_mapping, ("brgsa", "hlip", "strict"))
    assert len(brgsa.findings) == 16 and len(hlip.findings) == 15 and len(strict.findings) == 11
    assert [name for name, _ in brgsa.findings["Medical material"]] == [
        "catheter_or_port", "tracheal_tube", "chest_tube", "breast_implant", "pacemaker_or_defib",
        "stent", "clip", "staple", "gi_tube", "hardware", "suture"]
    assert brgsa.findings["Pulmonary fibrotic sequela"] == [("scarring", None)]
    assert hlip.findings["Pulmonary fibrotic sequela"] == [("fibrosis", None)]
    assert [name for name, _ in brgsa.findings["Lung nodule"]] == ["nodule", "nodulegr1cm"]
    assert hlip.findings["Lung nodule"] == [("nodule", None)]
    assert {"Medical material", "Lymphadenopathy"}.isdisjoint(hlip.findings)
    assert list(strict.findings) == [name for name in CT_RATE_18 if name in strict.findings]
    for name in ("brgsa", "hlip", "strict"):
        content = yaml.safe_load((radchestct.MAPPINGS / f"{name}.yaml").read_text())
        parts = {part for parts in content.get("scores", {}).values() for part in parts}
        assert set(CT_RATE_18) == (set(content["findings"]) | set(content["left_out"]) | parts) - {
            "Calcification"}
        assert not set(content["findings"]) & set(content["left_out"])


@pytest.mark.parametrize("mapping,expected", [
    ("brgsa", ("Calcification", "Lung nodule", "Pulmonary fibrotic sequela")),
    ("hlip", ("Arterial wall calcification", "Coronary artery wall calcification", "Lung nodule")),
    ("strict", ("Cardiomegaly",))])
def test_one_scan_under_each_mapping(tmp_path, mapping, expected):
    positive = ["calcification*aorta", "nodule*thyroid", "scarring*left_upper",
                *(["cardiomegaly*heart"] if mapping == "strict" else [])]
    root = Release(tmp_path / "rad").add("tst1", positive).write()
    out = build(root, tmp_path / "out", mapping=mapping).out
    source = sources.open_source(out, "test")
    assert source.index[0].findings == expected
    assert source.metadata["findings"] == list(radchestct.read_mapping(mapping).findings)


def test_what_is_missing_or_wrong_is_listed(tmp_path):
    release = Release(tmp_path / "rad").add("good", ["nodule*lung"])
    release.add("nofile", leave_out=("file",)).add("nometa", leave_out=("metadata",))
    release.add("nolabel", leave_out=("labels",)).add("twice").add("twice", split="imgtrain")
    release.add("turned", orig_orientation="1,0,0").add("skewed", orig_orientation="1,0,0,1,0,0")
    release.add("nobody", MRN_DEID="").add("cell").labels["imgtest"][-1]["nodule*aorta"] = "2"
    release.add("air", hu=np.full(SHAPE, -1000, np.int16)).add("pickle")
    np.savez(release.root / "volumes/pickle.npz", ct=np.array([[[print]]], dtype=object))
    summary = build(release.write(), tmp_path / "out")
    assert summary.splits == {"test": 1} and summary.unlisted == 1
    found = reasons(summary.out)
    expected = {
        "nofile": "there is no file nofile.npz; download it",
        "nometa": "no rows of the metadata have this id",
        "twice": "2 rows of the label tables", "turned": "not a list of 6 numbers",
        "skewed": "at right angles", "nobody": "no MRN_DEID",
        "cell": "column 'nodule*aorta' is '2', not 0 or 1", "air": "every voxel is -1000",
        "pickle": "not HU"}
    for name, words in expected.items():
        assert words in found.pop(name), name
    assert found == {"volumes/nolabel.npz": "no row in the label tables"}


def test_official_splits_and_shares_by_patient(tmp_path):
    release = Release(tmp_path / "rad")
    for number, split in enumerate(("imgtrain", "imgtrain", "imgvalid", "imgtest")):
        release.add(f"scan{number}", split=split)
    release.add("a", split="imgtrain", patient="both").add("b", split="imgtest", patient="both")
    root = release.write()
    official = build(root, tmp_path / "a", split="official")
    assert official.splits == {"train": 2, "valid": 1, "test": 1} and official.failed == 2
    assert "several official splits (test, train)" in reasons(official.out)["a"]
    assert build(root, tmp_path / "b").splits == {"test": 6}
    shared = build(root, tmp_path / "c", split={"train": 0.5, "test": 0.5})
    homes = [{row.patient for row in sources.open_source(shared.out, split).index}
             for split in shared.splits]
    assert sum(shared.splits.values()) == 6 and sum(map(len, homes)) == len(set().union(*homes))


def test_unusable_releases_and_mappings(tmp_path):
    root = Release(tmp_path / "rad").add("tst1").write()
    for text, words in [
            ("name: x\nversion: '1'\n", "must have findings"),
            ("name: x\nversion: 1\nfindings: {A: [nodule]}", "must have a name and a version"),
            ("name: x\nversion: '1'\nfindings: {A: [nodule@lung]}", "has 'nodule@lung' under 'A'"),
            ("name: x\nversion: '1'\nfindings: {A: [absent]}", "has no column absent.* for 'A'"),
            ("name: x\nversion: '1'\nfindings: {A: nodule}", "names with lists of names"),
            ("name: x\nversion: '1'\nfinding: {}", "unknown key 'finding'"),
            ("a: [", "is no readable YAML"), ("!!python/object:os.system {}", "no readable YAML")]:
        (tmp_path / "own.yaml").write_text(text)
        with pytest.raises(UserError, match=words):
            build(root, tmp_path / "out", mapping=str(tmp_path / "own.yaml"))
    (tmp_path / "own.yaml").write_text("name: x\nversion: '1'\nfindings: {A: [nodule]}")
    assert build(root, tmp_path / "out", mapping=str(tmp_path / "own.yaml")).written == 1
    with pytest.raises(UserError, match="its mapping is"):
        build(root, tmp_path / "out")
    with pytest.raises(UserError, match="neither one of brgsa, hlip, strict nor a file"):
        build(root, tmp_path / "out", mapping="brgs")
    with pytest.raises(UserError, match="split 'all' is not known"):
        build(root, tmp_path / "out", split="all")
    table = root / "CT_Scan_Metadata_Complete_35747.csv"
    table.rename(root / "gone")
    with pytest.raises(UserError, match="holds no CT_Scan_Metadata_Complete"):
        build(root, tmp_path / "other")
    (root / "gone").rename(table)
    (root / "imgtest_Abnormality_and_Location_Labels.csv").unlink()
    with pytest.raises(UserError, match="download the label tables"):
        build(root, tmp_path / "other")
    with pytest.raises(UserError, match="holds no .npz volume"):
        build(tmp_path / "out", tmp_path / "other")
