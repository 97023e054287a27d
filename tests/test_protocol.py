"""Protocols: the files of the package, the user's own, and a hash that follows every number."""

import dataclasses
import re
import shutil
from pathlib import Path

import pytest
import yaml

from brgsa_jax.config import UserError
from brgsa_jax.data.mimic_cxr import CHEXPERT
from brgsa_jax.data.radchestct import MAPPINGS, read_mapping
from brgsa_jax.evals.protocol import PROTOCOLS, Prompts, Protocol, get_protocol, protocols
from brgsa_jax.summarize.vocabulary import CT_RATE_18, CT_RATE_33, CT_RATE_LT_15

# A change here means that published hashes stop matching: raise the file's version with it, or
# DEFINITIONS for all, on purpose only.
HASHES = {
    "brgsa-paper": "d24b9a8e7e329a99", "chexpert-5": "2db2c413d0c66e69",
    "ct-rate-18": "687e5492ea80e42e", "ct-rate-33": "00643e6b82bee1d6",
    "ct-rate-lt-15": "b1803dcc59480f8b", "ctclip-18": "7a742e0e24f85f88",
    "fvlm-16": "0bcdc436cd92fcf3", "hlip-14": "402349fea95bc62f",
    "inspect-pe": "b22e4019814cd4bf", "phantom": "c10af9d3698a5ea6",
    "rad-chestct-11-strict": "d9e44ffb49adfa90", "rad-chestct-14-hlip": "48d2d1d2ee76cbf6",
    "rad-chestct-16": "1dadf1f467d48fef", "vlm3d-0.5": "2beb390fd03c6a2c"}


def test_every_file_is_a_protocol_of_its_name_with_the_published_hash():
    found = {name: get_protocol(name) for name in protocols()}
    assert {name: protocol.hash for name, protocol in found.items()} == HASHES
    for name, protocol in found.items():
        assert protocol.name == name and protocol.version == "2026.1" and protocol.source
        # Written out in full, so that a default that changes one day changes none of them.
        written = set(yaml.safe_load((PROTOCOLS / f"{name}.yaml").read_text()))
        fields = {field.name for field in dataclasses.fields(Protocol)}
        assert fields - {"findings", "combine", "temperature"} <= written


def test_named_protocols_have_their_findings_in_order():
    assert get_protocol("ct-rate-18").findings == CT_RATE_18
    assert get_protocol("ct-rate-lt-15").findings == CT_RATE_LT_15
    for name in ("ct-rate-33", "phantom"):
        assert get_protocol(name).findings == CT_RATE_33
    for name in ("brgsa-paper", "ctclip-18", "vlm3d-0.5"):
        assert get_protocol(name).findings == CT_RATE_18
    assert set(get_protocol("chexpert-5").findings) <= set(CHEXPERT)
    assert set(CT_RATE_18) - set(get_protocol("fvlm-16").findings) == {
        "Medical material", "Lymphadenopathy"}


@pytest.mark.parametrize("name, mapping", [
    ("rad-chestct-16", "brgsa"), ("rad-chestct-14-hlip", "hlip"), ("hlip-14", "hlip"),
    ("rad-chestct-11-strict", "strict")])
def test_rad_chestct_protocols_fit_their_label_mapping(name, mapping):
    protocol, labels = get_protocol(name), read_mapping(mapping)
    assert protocol.labels == f"{labels.name}-{labels.version}"
    folded = yaml.safe_load((MAPPINGS / f"{mapping}.yaml").read_text()).get("scores", {})
    assert protocol.combine == {finding: tuple(parts) for finding, parts in folded.items()}
    parts = {part for names in folded.values() for part in names}
    assert set(protocol.findings) == (set(labels.findings) - parts) | set(folded)
    assert len(protocol.findings) == int(name.split("-")[1 if name.startswith("hlip") else 2])


def test_prompts_are_those_of_the_papers():
    assert get_protocol("ct-rate-18").texts[9] == "There is Lung nodule"
    assert get_protocol("inspect-pe").texts == ("There is lung embolism",)
    pair = get_protocol("ctclip-18")
    assert (pair.positive[0], pair.negative[0]) == (
        ("Medical material is present.",), ("Medical material is not present.",))
    assert len(pair.texts) == 36 and pair.contrast == "softmax" and pair.score == "direct"
    hlip = get_protocol("hlip-14")
    row = hlip.findings.index("Atelectasis")
    assert (hlip.positive[row], hlip.negative[row]) == (
        ("The volume shows: Atelectasis.",), ("The volume shows: Not atelectatic.",))
    assert len(hlip.positive[hlip.findings.index("Calcification")]) == 2
    fvlm = get_protocol("fvlm-16")
    row = fvlm.findings.index("Lung nodule")
    assert (fvlm.positive[row], fvlm.negative[row]) == (("Nodule.",), ("Not Nodule.",))
    assert get_protocol("vlm3d-0.5").rule == "fixed=0.5 after platt"


def test_groups_take_every_class_once():
    for name in protocols():
        groups = get_protocol(name).groups
        members = [finding for group in groups.values() for finding in group]
        assert not groups or sorted(members) == sorted(get_protocol(name).findings)
    assert list(get_protocol("ct-rate-18").groups) == ["head", "medium", "tail"]


def test_unknown_name_lists_the_choices():
    with pytest.raises(UserError, match="did you mean 'ct-rate-18'.*; or the path of a YAML file"):
        get_protocol("ct-rate-17")


BASE = Protocol("name", ("A", "B"), Prompts(negative=("There is no {}",)), contrast="softmax",
                temperature=0.1, combine={"B": ("C", "D")})


@pytest.mark.parametrize("change", [
    {"findings": ("B", "A")}, {"prompts": Prompts(("{} is present.",), ("There is no {}",))},
    {"prompts": Prompts(("There is {}", "{}"), ("There is no {}",))},
    {"prompts": Prompts(negative=("There is not {}",))},
    {"prompts": Prompts(negative=("There is no {}",), overrides={"C": {"negative": ("None",)}})},
    {"score": "direct"}, {"contrast": "none", "temperature": None}, {"temperature": 0.2},
    {"combine": {}}, {"combine": {"B": ("C",)}}, {"split": "valid"},
    {"threshold": "ctclip-test"}, {"threshold": "fixed=0.5"}, {"threshold": "fixed=0.4"},
    {"threshold": "fixed=0.5", "calibration": "platt"}, {"groups": {"rare": ("A",)}},
    {"labels": "brgsa-2025.1"}, {"exclude": ("v",)}, {"reconstructions": "first"},
    {"resamples": 999}, {"seed": 1}, {"level": 0.9}])
def test_hash_follows_every_field_that_changes_a_number(change):
    changed = dataclasses.replace(BASE, **change)
    others = {dataclasses.replace(BASE, **other).hash for other in (
        {}, {"threshold": "fixed=0.5"}) if other != change}
    assert changed.hash not in others


def test_hash_ignores_what_changes_no_number():
    assert Protocol("one", ("A",)).hash == Protocol("two", ["A"], version="9", source="me").hash
    assert len(BASE.hash) == 16
    # The same sentences from other templates, and negatives that nothing is contrasted with.
    worded = Prompts(("x {}",), overrides={"A": {"positive": ("There is A",)}})
    assert Protocol("n", ("A",), worded).hash == Protocol("n", ("A",)).hash
    assert Protocol("n", ("A",), Prompts(negative=("no {}",))).hash == Protocol("n", ("A",)).hash
    assert (dataclasses.replace(BASE, threshold="ctclip-test").hash
            == dataclasses.replace(BASE, threshold="test").hash)
    one, other = (Protocol("n", ("A",), exclude=ids) for ids in (("x", "y"), ("y", "x")))
    assert one.hash == other.hash


def test_texts_are_distinct_and_name_no_negative_without_a_contrast():
    assert BASE.columns == ("A", "C", "D")
    assert BASE.texts == ("There is A", "There is C", "There is D",
                          "There is no A", "There is no C", "There is no D")
    assert BASE.positive == (("There is A",), ("There is C", "There is D"))
    alone = dataclasses.replace(BASE, contrast="none", temperature=None)
    assert alone.texts == BASE.texts[:3] and alone.negative == ((), ())
    assert alone.wording == "“There is X”, positive only"
    assert BASE.wording == "“There is X” against “There is no X”, softmax at temperature 0.1"


def test_all_problems_of_a_protocol_are_told_at_once():
    with pytest.raises(UserError) as told:
        Protocol("../bad", ("A", "A", "id"), Prompts(("no place",)), score="man", level=1.0,
                 temperature=1.0)
    for part in ("'../bad' is not letters", "'A' more than once", "'id' cannot be", "'no place'",
                 "'mean'", "level is 1.0", "temperature"):
        assert part in str(told.value)


BAD = """
name: 7
classes: [A, B, A]
combine: {C: [A]}
prompts: {positive: [nothing], overrides: {Z: {positive: [z]}}}
score: men
contrast: softmax
temperature: 0
threshold: fixed
calibration: plat
groups: {rare: [B, E]}
exclude: v1
resamples: true
seed: -1
level: 95
folds: 5
"""


def test_all_problems_of_a_file_are_told_in_one_sentence(tmp_path):
    (tmp_path / "p.yaml").write_text(BAD)
    with pytest.raises(UserError) as told:
        get_protocol(tmp_path / "p.yaml")
    text = str(told.value)
    for part in ("'folds' is unknown (choices: name, version", "version is missing",
                 "name is '7', not text", "classes names 'A' more than once", "combine names 'C'",
                 "'nothing' needs exactly one {}", "overrides names 'Z'", "unknown score 'men'",
                 "temperature is a positive", "unknown threshold rule 'fixed'",
                 "unknown calibration 'plat'", "groups names 'E'", "exclude is not a list",
                 "resamples is 'True', not a whole", "seed is -1", "level is 95.0",
                 "no negative prompt, or an"):
        assert part in text, part
    assert text.startswith(f"the protocol file {tmp_path / 'p.yaml'} cannot be used: ")
    assert "\n" not in text


@pytest.mark.parametrize("content, told", [
    (b"name: a\nname: b\n", "the key 'name' comes twice"),
    (b"- a\n", "holds no fields"), (b"", "holds no fields"), (b"name: [a\n", "no readable YAML"),
    (b"\xff\xfe\x00", "no readable YAML"), (b"[" * 1200, "no readable YAML"),
    (b"name: !!python/object/apply:os.getcwd []\n", "no readable YAML"),
    (b"{[a]: b}", "no readable YAML"),
    (b"name: n\nversion: 1\nclasses: [A]\n", "version is '1', not text; put it in quotes"),
    (b"name: n\nversion: '1'\nclasses: []\n", "classes is empty"),
    (b"name: n\nversion: '1'\nclasses: [no]\n",
     "classes has an item that is 'False', not text; put it in quotes"),
    (b"name: n\nversion: '1'\nclasses: [' A']\n", "' A' cannot be the name of a class"),
    (b"name: n\nversion: '1'\nclasses: [A]\nprompts: {positive: []}\n", "no positive prompt, or"),
    (b"name: n\nversion: '1'\nclasses: [A]\nprompts: {positive: [\"\\e[31m {}\"]}\n",
     "an unreadable one, for 'A'"),
    (b"name: n\nversion: '1'\nclasses: [\"A\\n\"]\n", "cannot be the name of a class"),
    (b"name: n\nversion: '1'\nclasses: [A]\nscore: given\n", "unknown score 'given'"),
    (b"name: n\nversion: '1'\nclasses: [A]\nprompts: {overrides: {A: {negative: []}}}\n",
     "has a list that is empty"),
    (b"name: n\nversion: '1'\nclasses: [A]\nprompts: [x]\n", "prompts may have only positive"),
    (b"name: n\nversion: '1'\nclasses: [A]\ntemperature: .nan\ncontrast: softmax\n",
     "temperature is a positive number"),
    (b"name: n\nversion: '1'\nclasses: [A]\ncalibration: platt\n", "needs a fixed threshold"),
    (b"name: n\nversion: '1'\nclasses: &a [*a]\n",
     "classes has an item that is of type list, not text"),
])
def test_a_file_that_is_no_protocol_is_refused_in_one_sentence(tmp_path, content, told):
    path = tmp_path / "p.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        get_protocol(path)
    assert told in str(error.value)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_lists_of_lists_without_end_are_refused_at_once(tmp_path):
    levels = ["a: &l0 [x, x, x, x, x, x, x, x, x, x]"]
    levels += [f"b{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 10)}]" for n in range(1, 30)]
    (tmp_path / "p.yaml").write_text("\n".join([*levels, "name: *l29", "classes: *l29"]))
    with pytest.raises(UserError, match="name is of type list, not text"):
        get_protocol(tmp_path / "p.yaml")


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    with pytest.raises(UserError, match="there is no protocol file"):
        get_protocol(tmp_path / "none.yaml")
    (tmp_path / "folder.yaml").mkdir()
    with pytest.raises(UserError, match="there is no protocol file"):
        get_protocol(tmp_path / "folder.yaml")


def test_a_file_of_the_users_own_needs_only_what_differs(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text("name: mine\nversion: '1'\nclasses: [Lung nodule]\nlevel: 0.9\n")
    assert get_protocol(path) == Protocol("mine", ("Lung nodule",), level=0.9)


def test_the_example_of_the_guide_is_a_protocol(tmp_path):
    guide = (Path(__file__).parents[1] / "docs" / "evaluation.md").read_text(encoding="utf-8")
    example, = re.findall(r"```yaml\n(name: .*?)```", guide, re.DOTALL)
    (tmp_path / "mine.yaml").write_text(example)
    found = get_protocol(tmp_path / "mine.yaml")
    assert found.negative[0] == ("No nodule in either lung",) and len(found.texts) == 12
    told = {name for name in protocols() if f"`{name}`" in guide}
    assert told == set(protocols())


def test_a_well_known_name_keeps_its_content(tmp_path):
    copy = tmp_path / "copy.yaml"
    shutil.copy(PROTOCOLS / "ct-rate-18.yaml", copy)
    assert get_protocol(copy) == get_protocol("ct-rate-18")
    copy.write_text(copy.read_text().replace("seed: 0", "seed: 1"))
    with pytest.raises(UserError, match="give it a name of its own"):
        get_protocol(copy)
