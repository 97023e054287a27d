"""Canonical names, their order, and the parents of narrower findings."""

import subprocess
import sys

import pytest

from brgsa_jax.summarize import vocabulary
from brgsa_jax.summarize.vocabulary import CT_RATE_18, CT_RATE_33, CT_RATE_LT_15, PARENTS


def test_lists_have_the_released_sizes_and_ends():
    assert (len(CT_RATE_18), len(CT_RATE_LT_15)) == (18, 15)
    assert CT_RATE_33 == CT_RATE_18 + CT_RATE_LT_15
    assert len(set(CT_RATE_33)) == 33
    assert (CT_RATE_18[0], CT_RATE_18[-1]) == ("Medical material", "Interlobular septal thickening")
    assert CT_RATE_18.index("Lung nodule") == 9
    assert (CT_RATE_LT_15[0], CT_RATE_LT_15[-1]) == ("Pneumonia", "Pneumomediastinum")


def test_parents_lead_from_narrow_names_to_ct_rate_18():
    assert set(PARENTS) <= set(CT_RATE_LT_15)
    assert set(PARENTS.values()) <= set(CT_RATE_18)
    assert "Lung mass" not in PARENTS


def test_closure_adds_parents_and_sorts():
    assert vocabulary.closure(["Empyema", "Lung nodule", "Empyema"]) == (
        "Lung nodule", "Pleural effusion", "Empyema")
    assert vocabulary.closure([]) == ()


def test_closure_names_what_it_does_not_know():
    with pytest.raises(ValueError, match="lung nodule"):
        vocabulary.closure(["lung nodule"])


def test_prompts():
    assert vocabulary.sentence("Lung cyst") == "There is Lung cyst"
    assert vocabulary.negative("Lung cyst") == "There is no Lung cyst"


def test_import_is_light():
    code = "import sys, brgsa_jax.summarize.vocabulary; print(int('numpy' in sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                            check=True)
    assert result.stdout.strip() == "0"
