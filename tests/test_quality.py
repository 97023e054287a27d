"""The check of a data set: what is planted in a bad set is found, and nothing in a good one."""

import dataclasses
import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest

from brgsa_jax.config import UserError
from brgsa_jax.data import builders, phantom, shards
from brgsa_jax.data.image2d import Radiograph
from brgsa_jax.data.records import Failure
from brgsa_jax.data.shards import Plan
from brgsa_jax.data.volume import Preprocess
from brgsa_jax.evals import quality, quality_page
from brgsa_jax.evals.quality_scan import Scale

SHAPE = (32, 32, 16)
EVIL = "<script>alert(1)</script>\"'&"
SECRET = "The secretword of this report must not leave the data set"
LONG = " ".join(f"word{number}" for number in range(40))
MADE = {"file": "x.nii.gz", "spacing": [0.7, 0.7, 1.25], "orientation": "LPS", "warnings": []}


@dataclasses.dataclass(frozen=True)
class MadeTask:
    """A record as given, of a phantom's volume that `change` alters."""

    split: str
    id: str
    number: int
    patient: str = ""
    report: str = ""
    change: str = ""
    findings: tuple = ()
    provenance: str = json.dumps(MADE)
    radiograph: bool = False
    file: str = ""

    def stamp(self):
        return dataclasses.astuple(self)

    def make(self):
        volume = phantom.generate(3, self.number, shape=SHAPE).volume.clip(-1000, 1000)
        volume[[0, -1]] = -1000  # Else some reach a side of the box.
        noise = np.random.default_rng(self.number).normal(0, 15, SHAPE)
        if self.change == "noise":
            volume = volume + noise
        elif self.change == "air":
            volume = np.where(volume > 900, volume, -1000 + np.abs(noise))
        elif self.change == "raw":
            volume = volume + 1024
        elif self.change == "padded":
            volume[:, :, 6:] = -1000
        elif self.change == "cut":
            volume[0] = 40
        volume = np.rint(volume).clip(-1000, 1000).astype(np.int16)
        spacing = (12.0, 12.0, 24.0)
        if self.radiograph:
            volume = ((volume[:, :, 8].T.astype(float) + 1000) * 255 / 2000).astype(np.uint8)
            volume, spacing = np.zeros_like(volume) if self.change == "air" else volume, ()
        record = {"id": self.id, "patient": self.patient or self.id,
                  "report": self.report or f"{SECRET} {self.id}.", "volume": volume, "boxes": {},
                  "findings": self.findings, "spacing": spacing,
                  "provenance": json.loads(self.provenance)}
        return record, tuple(record["provenance"].get("warnings", ()))


def made(out, tasks, *, failures=(), findings=(), recipe=None):
    recipe = recipe or Preprocess(spacing=(12.0, 12.0, 24.0), shape=SHAPE)
    plan = Plan(tasks, list(failures), [], findings,
                {"source": "folder", "compression": "none"})
    return shards.build(out, plan, recipe, workers=1, progress=False).out


def origin(**changes):
    return json.dumps(MADE | changes)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    tasks = [MadeTask("train" if n < 12 else "test", f"g{n}", n, findings=("A",) * (n % 2))
             for n in range(20)]
    return made(tmp_path_factory.mktemp("quality") / "good", tasks, findings=("A",))


def bad_tasks():
    train = [MadeTask("train", f"t{n}", n, findings=("A",)) for n in range(24)]
    test = [MadeTask("test", f"e{n}", 100 + n) for n in range(24)]
    changes = {
        "t1": {"report": "No finding."}, "t2": {}, "t3": {"patient": "both"},
        "t5": {"change": "air"}, "t6": {"change": "raw"}, "t7": {"change": "padded"},
        "t8": {"change": "cut"}, "t9": {"number": 10}, "t11": {"report": LONG},
        "t12": {"provenance": origin(spacing=[0.7, 0.9, 1.25])},
        "t13": {"provenance": origin(spacing=[6.0, 0.7, 0.7], orientation="SPL")},
        "t14": {"provenance": origin(warnings=[
            "may not be a chest: aerated lung is only 2.7% of the tissue"])},
        "t15": {"provenance": origin(warnings=[f"{EVIL} at 1 mm"])},
        "t16": {"id": EVIL, "patient": EVIL, "change": "air"},
        "t17": {"id": "e17", "patient": "t17", "report": "Another report."},
        "e1": {"number": 1, "report": "No  FINDING."}, "e2": {"number": 2, "change": "noise"},
        "e3": {"patient": "both"}, "e11": {"report": LONG, "findings": ("B",)},
        "e4": {"number": 104}, "e5": {"number": 104, "change": "noise", "patient": "e4"},
        "e6": {"report": " "},
    }
    return [dataclasses.replace(task, **changes.get(task.id, {})) for task in train + test]


@pytest.fixture(scope="module")
def bad(tmp_path_factory):
    failures = [Failure(f"f{n}", "", f"it has {n} slices of '{n}x'; copy it") for n in range(3)]
    return made(tmp_path_factory.mktemp("quality") / "bad", bad_tasks(),
                failures=[*failures, Failure("=evil", "", "another reason")],
                findings=("A", "B", "C"))


@pytest.fixture(scope="module")
def found(bad):
    return quality.check(bad)


def titles(checked, severity):
    return [problem.title for problem in checked.problems if problem.severity == severity]


def ids(places):
    return {place["id"] for place in places}


def test_a_good_set_has_no_error_and_nothing_to_look_at(good):
    checked = quality.check(good)
    assert checked.passed and titles(checked, "look") == []
    assert checked.records["verified"] and checked.facts["patients"] == 20
    assert checked.facts["splits"] == {"train": {"volumes": 12, "patients": 12},
                                       "test": {"volumes": 8, "patients": 8}}


def test_errors_of_the_bad_set(found):
    assert not found.passed
    assert titles(found, "error") == [
        "1 patient lies in several splits", "1 id is there more than once",
        "1 group of identical volumes in several splits", "2 volumes hold no patient",
        "1 volume is saturated at the upper clamp"]
    assert found.leakage["patients"] == [{"patient": "both", "splits": {"train": 1, "test": 1}}]
    assert found.leakage["ids"] == [{"id": "e17", "count": 2}]
    assert ids(found.values["empty"]) == {"t5", EVIL} and ids(found.values["saturated"]) == {"t6"}


def test_duplicates_of_the_bad_set(found):
    groups = {name: [(ids(group["members"]), group["splits"], group["patients"])
                     for group in found.duplicates[name]] for name in ("identical", "near")}
    assert ({"t1", "e1"}, ["train", "test"], 2) in groups["identical"]
    assert ({"t9", "t10"}, ["train"], 2) in groups["identical"]
    assert len(groups["identical"]) == 2
    assert ({"t2", "e2"}, ["train", "test"], 2) in groups["near"]
    assert ({"e4", "e5"}, ["test"], 1) in groups["near"]
    assert len(groups["near"]) == 2
    reports = {frozenset(ids(g["members"])): g["telling"] for g in found.duplicates["reports"]}
    assert reports == {frozenset({"t1", "e1"}): False, frozenset({"t11", "e11"}): True}
    look = titles(found, "look")
    assert "1 group of identical volumes under different ids within a split" in look
    assert "1 group of nearly identical volumes of different patients in several splits" in look
    assert "1 long report of different patients in several splits" in look
    assert "1 group of nearly identical volumes of one patient" in titles(found, "info")


def test_values_geometry_and_view_of_the_bad_set(found):
    assert ids(found.values["outliers"]) == {"t6"}
    assert max(found.values["split_distances"].values()) < 20
    classes = found.values["classes"]
    assert list(classes) == ["Lower clamp", "Air", "Lung", "Fat and soft tissue", "Bone",
                             "Upper clamp"]
    assert (classes["Lung"]["from"], classes["Lung"]["to"]) == (-950, -501)
    for split in ("train", "test"):
        assert math.isclose(sum(c["splits"][split] for c in classes.values()), 1, abs_tol=1e-5)
    assert ids(found.geometry["unequal"]) == {"t12"} and ids(found.geometry["thick"]) == {"t13"}
    assert found.geometry["orientations"] == {"LPS": {"train": 23, "test": 24},
                                              "SPL": {"train": 1}}
    assert found.geometry["between_slices"]["splits"]["train"]["quantiles"][-1] == 6.0
    assert "t7" in ids(found.view["short"])
    cut = {place["id"]: place for place in found.view["cut"]}["t8"]
    assert cut["side"] == "right" and cut["share"] == 1.0
    assert {"t6", "t8"} == ids(found.view["sides"]["right"]["worst"])


def test_build_and_captions_of_the_bad_set(found):
    assert found.build["failures"][0] == {"reason": "it has # slices of '…'; copy it", "count": 3,
                                          "ids": ["f0", "f1", "f2"]}
    assert ids(found.build["not_a_chest"]) == {"t14"}
    assert len(found.build["warnings"]) == 2
    rows = {row["name"]: row for row in found.captions["prevalence"]}
    assert rows["A"]["odd"] == ["test"] and rows["A"]["shares"]["train"] == 1.0
    assert rows["B"]["odd"] == [] and rows["B"]["patients"] == {"train": 0, "test": 1}
    assert found.captions["splits"]["test"]["empty"] == 1
    assert "1 finding without a positive patient" in titles(found, "info")


def test_bins_cover_the_scale_once():
    for recipe, count in ((Preprocess().as_dict(), 100), ({"kind": "radiograph"}, 64),
                          ({"low": 0, "high": 9}, 10)):
        scale = Scale.of(recipe)
        assert len(scale.edges) == count + 1 and (np.diff(scale.edges) > 0).all()
        assert (scale.edges[0], scale.edges[-1]) == (scale.low, scale.high + 1)


class Checker(HTMLParser):
    """Collects what a browser would fetch or run, and checks that tags are balanced."""

    def __init__(self):
        super().__init__()
        self.open, self.targets, self.tags, self.names = [], [], set(), set()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        if tag not in {"meta", "img", "br"}:
            self.open.append(tag)
        self.targets += [value for name, value in attrs
                         if name in ("src", "href", "action", "data") or name.startswith("on")]
        self.names |= {value for name, value in attrs if name == "id"}

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"


def checked_page(html):
    checker = Checker()
    checker.feed(html)
    assert checker.open == []
    assert checker.tags.isdisjoint({"script", "link", "iframe", "object", "base", "form"})
    for target in checker.targets:
        assert target.startswith("data:image/png;base64,iVBOR") or target[1:] in checker.names
    assert "default-src 'none'" in html and "url(" not in html
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", html))


def test_page_is_self_contained_escaped_and_tells_every_problem(found, tmp_path):
    page = quality_page.write_page(found, tmp_path / "new" / "check.html")
    html = page.read_text()
    text = checked_page(html)
    for problem in found.problems:
        assert problem.title in text and problem.advice.replace("'", "&#39;") in text
    assert "&lt;script&gt;alert(1)" in html and "Not to be trusted as it is" in text
    assert html.count("data:image/png") >= 8
    stored = (tmp_path / "new" / "quality.json").read_text()
    assert json.loads(stored) == json.loads(json.dumps(found.as_dict()))
    for content in (html, stored):
        assert "secretword" not in content and "word17" not in content
    assert sorted(p.name for p in page.parent.iterdir()) == ["check.html", "quality.json"]


def test_workers_find_the_same(good, bad, found):
    seen = []
    other = quality.check(bad, workers=2, progress=lambda done, total: seen.append((done, total)))
    assert json.dumps(other.as_dict()) == json.dumps(found.as_dict())
    assert seen[-1] == (48, 48) and [done for done, _ in seen] == sorted(done for done, _ in seen)


def flip(file, marker, offset):
    """Changes one byte behind the first place where `marker` stands in a file."""
    data = bytearray(file.read_bytes())
    data[data.index(marker) + offset] ^= 1
    file.write_bytes(data)


@pytest.fixture
def small(tmp_path):
    return made(tmp_path / "small", [MadeTask("train", f"s{n}", n) for n in range(4)])


def test_damaged_records_are_told_and_the_rest_is_judged(small):
    shard, = small.glob("*.array_record*")
    flip(shard, b"data set s2.", 3)
    checked = quality.check(small)
    assert titles(checked, "error") == ["1 record is not what was built"]
    damaged, = checked.records["damaged"]
    assert (damaged["id"], damaged["position"]) == ("s2", 2) and "digest" in damaged["reason"]
    assert checked.values["volumes"] == 3
    text = checked_page(quality_page.render(checked))
    assert "s2" in text and "its content has not the digest" in text
    unverified = quality.check(small, verify=False)
    assert unverified.passed and "Digests were not compared" in titles(unverified, "info")


def test_a_set_of_nothing_but_damage_still_gets_a_page(small):
    shard, = small.glob("*.array_record*")
    shard.write_bytes(shard.read_bytes()[:40])
    checked = quality.check(small)
    assert titles(checked, "error")[0] == "4 records are not what was built"
    assert "No record could be read" in checked_page(quality_page.render(checked))


def test_a_shard_without_its_end_and_another_spacing_are_damage(small):
    shard, = small.glob("*.array_record*")
    content = shard.read_bytes()
    shard.write_bytes(content[:-65536])
    checked = quality.check(small)
    assert titles(checked, "error")[0] == "1 record is not what was built"
    shard.write_bytes(content)
    described = json.loads((small / "dataset.json").read_text())
    described["preprocess"]["spacing"][2] /= 2
    (small / "dataset.json").write_text(json.dumps(described))
    assert titles(quality.check(small), "error")[0] == "4 records are not what was built"


@pytest.mark.parametrize(("name", "content", "message"), [
    ("dataset.json", "{", "is damaged"), ("dataset.json", '{"format": 1}', "is damaged"),
    ("index_train.jsonl", "nonsense\n", "cannot be read"),
    ("index_train.jsonl", "", "0 rows for 4 records"), ("index_train.jsonl", None, "be read")])
def test_a_damaged_set_is_refused_in_a_sentence(small, name, content, message):
    if content is None:
        (small / name).unlink()
    else:
        (small / name).write_text(content)
    with pytest.raises(UserError, match=message) as told:
        quality.check(small)
    assert name in str(told.value) and "\n" not in str(told.value)


def test_no_data_set_is_refused(tmp_path):
    with pytest.raises(UserError, match="is no data set"):
        quality.check(tmp_path)


def test_missing_and_foreign_failures_are_told(small):
    (small / "failures.csv").unlink()
    assert "failures.csv is not the one of this build" in titles(quality.check(small), "look")


def test_one_volume_without_findings(tmp_path):
    out = made(tmp_path / "one", [MadeTask("test", "x" * 300, 1, provenance="{}")])
    checked = quality.check(out)
    assert checked.passed and titles(checked, "look") == []
    text = checked_page(quality_page.render(checked))
    assert "Too few volumes" in text and "do not tell the voxel sizes" in text
    assert "(there is only one)" in text


def test_phantoms_are_named_as_such(tmp_path, good):
    out = builders.build_phantom(tmp_path / "p", train=2, shape=SHAPE, workers=1,
                                 progress=False).out
    assert "Phantom patients, not real ones" in checked_page(quality_page.render(
        quality.check(out)))
    assert "hantom" not in checked_page(quality_page.render(quality.check(good)))


def test_radiographs(tmp_path):
    tasks = [MadeTask("train", f"r{n}", n, radiograph=True, provenance='{"file": "a.png"}')
             for n in range(9)]
    tasks += [MadeTask("test", "copy", 2, radiograph=True, provenance="{}"),
              MadeTask("test", "black", 3, change="air", radiograph=True, provenance="{}")]
    out = made(tmp_path / "xray", tasks, recipe=Radiograph(shape=(32, 32)))
    checked = quality.check(out)
    assert titles(checked, "error") == ["1 group of identical images in several splits",
                                        "1 image is of one grey value"]
    assert list(checked.values["classes"]) == ["Black", "Dark", "Middle", "Bright", "White"]
    assert list(checked.view["sides"]) == ["left edge", "right edge", "top edge", "bottom edge"]
    text = checked_page(quality_page.render(checked))
    assert "Grey values" in text and "Hounsfield" not in text and "Spacing and" not in text


def test_workers_load_no_jax_and_no_pictures():
    code = ("import sys, brgsa_jax.evals.quality_scan\n"
            "heavy = {'jax', 'sklearn', 'matplotlib', 'tensorflow_datasets'} & set(sys.modules)\n"
            "assert not heavy, heavy")
    subprocess.run([sys.executable, "-c", code], check=True)
