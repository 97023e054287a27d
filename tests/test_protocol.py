"""Protocols: the lists, the prompts, and a hash that follows every number-changing field."""

import dataclasses

import pytest

from brgsa_jax.config import UserError
from brgsa_jax.data.mimic_cxr import CHEXPERT
from brgsa_jax.evals.protocol import Protocol, get_protocol, protocols


def test_named_protocols_have_their_findings_in_order():
    assert protocols() == ("ct-rate-18", "ct-rate-lt-15", "ct-rate-33", "chexpert-5")
    common, rare, both, radiographs = map(get_protocol, protocols())
    assert (len(common.findings), len(rare.findings)) == (18, 15)
    assert common.findings[0] == "Medical material"
    assert common.findings[17] == "Interlobular septal thickening"
    assert (rare.findings[0], rare.findings[14]) == ("Pneumonia", "Pneumomediastinum")
    assert both.findings == common.findings + rare.findings
    assert len(radiographs.findings) == 5 and set(radiographs.findings) <= set(CHEXPERT)


def test_prompts_are_the_positive_sentence():
    assert get_protocol("ct-rate-18").prompts[9] == "There is Lung nodule"


def test_unknown_name_lists_the_choices():
    with pytest.raises(UserError, match="ct-rate-lt-15") as told:
        get_protocol("ct-rate-17")
    assert "ct-rate-18" in str(told.value)


@pytest.mark.parametrize("change", [
    {"findings": ("B", "A")}, {"prompt": "{} is present."}, {"score": "direct"},
    {"split": "validation"}, {"threshold": "ctclip-test"}, {"resamples": 999}, {"seed": 1},
    {"level": 0.9}])
def test_hash_follows_every_field_that_changes_a_number(change):
    protocol = Protocol("name", ("A", "B"))
    assert dataclasses.replace(protocol, **change).hash != protocol.hash


def test_hash_ignores_the_name_and_is_stable():
    assert Protocol("one", ("A",)).hash == Protocol("two", ["A"]).hash
    assert len(Protocol("one", ("A",)).hash) == 16
    # A change here means that published hashes stop matching: raise DEFINITIONS on purpose only.
    assert get_protocol("ct-rate-18").hash == "04da18455339cbf2"


def test_all_problems_of_a_protocol_are_told_at_once():
    with pytest.raises(UserError) as told:
        Protocol("bad", ("A", "A"), prompt="no place", score="man", level=1.0)
    for part in ("'bad'", "A more than once", "'no place'", "'mean'", "level"):
        assert part in str(told.value)
