"""Canonical names, their order, synonyms, and the parents of narrower findings."""

import subprocess
import sys

import pytest

from brgsa_jax.summarize import vocabulary
from brgsa_jax.summarize.vocabulary import (
    BRGSA_88,
    CT_RATE_18,
    CT_RATE_33,
    CT_RATE_LT_15,
    PARENTS,
    SYNONYMS,
    VOCABULARY,
)


def test_lists_have_the_released_sizes_and_ends():
    assert (len(CT_RATE_18), len(CT_RATE_LT_15)) == (18, 15)
    assert CT_RATE_33 == CT_RATE_18 + CT_RATE_LT_15
    assert len(set(CT_RATE_33)) == 33
    assert (CT_RATE_18[0], CT_RATE_18[-1]) == ("Medical material", "Interlobular septal thickening")
    assert CT_RATE_18.index("Lung nodule") == 9
    assert (CT_RATE_LT_15[0], CT_RATE_LT_15[-1]) == ("Pneumonia", "Pneumomediastinum")


def test_the_88_names_are_sorted_and_hold_the_other_lists():
    assert len(BRGSA_88) == len(set(BRGSA_88)) == 88
    assert list(BRGSA_88) == sorted(BRGSA_88)
    assert set(CT_RATE_33) <= set(BRGSA_88)
    assert VOCABULARY[:33] == CT_RATE_33
    assert len(VOCABULARY) == len(set(VOCABULARY)) == 88


def test_parents_lead_from_narrow_names_to_ct_rate_18():
    for name in PARENTS:
        assert set(vocabulary.closure([name])) & set(CT_RATE_18) - {name}
    assert {name for name in PARENTS if name in CT_RATE_33} <= set(CT_RATE_LT_15)
    assert "Lung mass" not in PARENTS


def test_closure_adds_parents_and_sorts():
    assert vocabulary.closure(["Empyema", "Lung nodule", "Empyema"]) == (
        "Lung nodule", "Pleural effusion", "Empyema")
    assert vocabulary.closure(["Viral pneumonia"]) == (
        "Lung opacity", "Pneumonia", "Viral pneumonia")
    assert vocabulary.closure([]) == ()


def test_closure_names_what_it_does_not_know():
    with pytest.raises(ValueError, match="lung nodule"):
        vocabulary.closure(["lung nodule"])


def test_prompts():
    assert vocabulary.sentence("Lung cyst") == "There is Lung cyst"
    assert vocabulary.negative("Lung cyst") == "There is no Lung cyst"


def test_every_name_has_synonyms_and_no_spelling_means_two_names():
    assert SYNONYMS.keys() == set(VOCABULARY)
    found = vocabulary.phrases()
    assert set(found.values()) == set(VOCABULARY)
    for name in VOCABULARY:
        assert vocabulary.canonical(name) == name


@pytest.mark.parametrize(("phrase", "name"), [
    ("PLEURAL EFFUSIONS", "Pleural effusion"), ("ground-glass opacities", "Ground glass opacity"),
    ("Haemothorax", "Pleural effusion"), ("lung tumour", "Lung mass"),
    ("paraoesophageal  hernia", "Hiatal hernia"), ("GGO", "Ground glass opacity"),
    ("calculi in the kidney", "Kidney stone"), ("Nephrolithiasis", "Nephrolithiasis"),
    ("atelectases", "Atelectasis"), ("metastases", "Metastasis"), ("bullae", "Emphysema"),
    ("COVID-19", "Covid 19 pneumonia"), ("nodules in the lung", "Lung nodule"),
    ("lymphadenopathies", "Lymphadenopathy"), ("no effusion", None), ("", None), ("dragon", None),
    ("nodule in the thyroid", "Thyroid nodule")])
def test_other_spellings_become_the_canonical_name(phrase, name):
    assert vocabulary.canonical(phrase) == name


def test_fold():
    assert vocabulary.fold("Peribronchial oedema,\n ground-glass (3.5mm)") == (
        "peribronchial edema , ground glass ( 3.5 mm )")
    assert vocabulary.fold("") == ""


def test_import_is_light():
    code = ("import sys, brgsa_jax.summarize.vocabulary, brgsa_jax.summarize.validate;"
            "print(int('numpy' in sys.modules or 'spacy' in sys.modules))")
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                            check=True)
    assert result.stdout.strip() == "0"
