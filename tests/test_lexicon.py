"""The lexicon backend, on sentences written for these tests."""

import subprocess
import sys
import time

import pytest

from brgsa_jax.config import UserError
from brgsa_jax.summarize import lexicon as module
from brgsa_jax.summarize.lexicon import RULES, Lexicon, sentences
from brgsa_jax.summarize.validate import InvalidAnswer
from brgsa_jax.summarize.vocabulary import SYNONYMS, VOCABULARY, closure


@pytest.fixture(scope="module")
def lexicon():
    return Lexicon()


# A sentence for each finding; what it states besides is its closure.
STATED = {
    "Medical material": ["The tip of the venous catheter lies in the right atrium.",
                         "Metallic sutures after sternotomy.", "A tracheostomy cannula is seen.",
                         "Stent in the left main coronary artery."],
    "Arterial wall calcification": ["Calcific plaques are observed in the wall of the aorta.",
                                    "The aortic arch shows mural calcifications."],
    "Cardiomegaly": ["The heart is clearly larger than normal.",
                     "Heart size has markedly increased.", "Mild cardiomegaly.",
                     "The cardiothoracic index is increased."],
    "Pericardial effusion": ["Minimal pericardial effusion.",
                             "An effusion of 9 mm is measured in the pericardial space."],
    "Coronary artery wall calcification": ["Several calcifications in both coronary arteries.",
                                           "The LAD shows calcified plaques."],
    "Hiatal hernia": ["There is a sliding type hernia at the hiatus.", "Small hiatus hernia."],
    "Lymphadenopathy": ["Two enlarged subcarinal lymph nodes.", "Bilateral hilar LAP."],
    "Emphysema": ["Emphysematous changes in both upper lobes.", "A bulla of 3 cm on the left."],
    "Atelectasis": ["Linear atelectasis in the lingula.", "The left lower lobe collapsed."],
    "Lung nodule": ["A 4 mm nonspecific nodule in the right lung.", "Millimetric nodules."],
    "Lung opacity": ["Patchy opacities in both lungs.", "Crazy paving in the left lower lobe."],
    "Pulmonary fibrotic sequela": ["Pleuroparenchymal sequelae at both apices.",
                                   "Fibrotic bands in the middle lobe."],
    "Pleural effusion": ["Bilateral pleural effusion.", "Effusion of 2 cm in the left hemithorax.",
                         "Hemothorax on the right."],
    "Mosaic attenuation pattern": ["Mosaic perfusion in both lungs (small airway disease?)."],
    "Peribronchial thickening": ["Thickening of every peribronchial sheath."],
    "Consolidation": ["Area of consolidation with air bronchograms."],
    "Bronchiectasis": ["Cylindrical bronchiectasis.", "The lower lobe bronchi are dilated: "
                       "dilated bronchi."],
    "Interlobular septal thickening": ["Smooth thickening of the interlobular septa."],
    "Pneumonia": ["Findings compatible with lobar pneumonia."],
    "Tuberculosis": ["Active tuberculosis."], "Lung cyst": ["An air cyst in the right lung."],
    "Bronchial thickening": ["The walls are thick: bronchial wall thickening."],
    "Lung mass": ["A spiculated mass of 5 cm in the right upper lobe."],
    "Osteophyte": ["Bridging osteophytes."], "Rib fracture": ["Old fracture of the left 5th rib."],
    "Spondylosis": ["Thoracic spondylosis."],
    "Pleural calcification": ["Calcified plaques of the pleura."],
    "Pneumothorax": ["Large left pneumothorax."], "Empyema": ["Pleural empyema on the left."],
    "Ground glass opacity": ["Ground-glass areas, bilateral and patchy."],
    "Covid 19 pneumonia": ["Typical of COVID-19 pneumonia."],
    "Fatty liver": ["Hepatosteatosis.", "Liver density fell in line with fatty deposits."],
    "Gallstone": ["A calculus is observed in the gallbladder."],
    "Kidney stone": ["3 mm calculus in the left kidney."], "Renal cyst": ["Right renal cyst."],
    "Liver lesion": ["A hypodense lesion is observed in the liver."],
    "Thyroid nodule": ["Nodules in the left lobe of the thyroid."],
    "Scoliosis": ["Dorsal scoliosis."], "Splenomegaly": ["The spleen is larger than normal."],
    "Vertebral compression fracture": ["Loss of height of the T8 vertebra."],
}


@pytest.mark.parametrize(("name", "text"), [
    (name, text) for name, texts in STATED.items() for text in texts])
def test_stated(name, text, lexicon):
    found = lexicon.findings(text)
    assert name in found
    assert found == closure(found)


@pytest.mark.parametrize("name", VOCABULARY)
def test_every_name_is_found_and_denied(name, lexicon):
    assert name in lexicon.findings(f"There is {name.lower()}.")
    assert lexicon.findings(f"There is no {name.lower()}.") == ()
    assert lexicon.findings(f"{name} was not observed.") == ()


def test_every_rule_is_tried_on_its_own_names():
    """A rule whose stems miss a spelling would never see it."""
    for rule in RULES:
        assert rule.finding in VOCABULARY
        for stem in rule.stems:
            assert stem == stem.lower()
    ruled = {rule.finding for rule in RULES}
    for name in ruled:
        rules = [rule for rule in RULES if rule.finding == name]
        assert any(stem in phrase for rule in rules for stem in rule.stems
                   for phrase in SYNONYMS[name]), name


@pytest.mark.parametrize("text", [
    "No pericardial, pleural or other effusion.",
    "Pleural thickening-effusion: not seen.",
    "There is no evidence of mass, nodule, consolidation or ground glass opacity.",
    "Without consolidation or effusion.", "Neither nodule nor mass is seen in the lungs.",
    "Pneumothorax has resolved.", "The previously seen nodules have completely disappeared.",
    "The effusion of the previous examination was not seen in the current one.",
    "The consolidation completely regressed.",
    "An early pneumonia cannot be excluded.", "Appearance atypical for viral pneumonia.",
    "Follow-up in terms of pneumonia is recommended.",
    "Tuberculosis should be considered in the differential diagnosis.",
    "Subpleural density (atelectasis?).", "History of pneumothorax.",
    "Family history: tuberculosis.", "Tuberculosis in the family.",
    "Heart size is normal.", "The cardiothoracic index is normal.",
    "No suspicious lesion was detected in the whole liver.",
    "No stones were seen in either of the kidneys.",
    "Main bronchi are open and the trachea is normal.",
    "Findings are not compatible with pneumonia.", "Pneumothorax: none.",
    "The heart is normal and the aorta is dilated.", "Nodules could not be detected.",
])
def test_not_stated(text, lexicon):
    assert lexicon.findings(text + " Bones are normal.") == ()


@pytest.mark.parametrize(("text", "found"), [
    ("Atelectasis is observed, pleural effusion was not detected.", ["Atelectasis"]),
    ("No effusion was detected, but a nodule is seen in the right lung.", ["Lung nodule"]),
    ("No mass was seen and there are a few nodules in the lungs.", ["Lung nodule"]),
    ("Nodules not seen in the previous examination are observed in the lungs.", ["Lung nodule"]),
    ("Emphysema of the upper lobes; no nodule.", ["Emphysema"]),
    ("No difference in the size of the nodules in both lungs.", ["Lung nodule"]),
    ("Calcific plaques in the aorta and the coronary arteries.",
     ["Arterial wall calcification", "Coronary artery wall calcification"]),
    ("Atheroma plaques are seen in two coronary arteries.",
     ["Coronary artery wall calcification"]),
    ("Three nodules in the thyroid gland.", ["Thyroid nodule"]),
    ("Intrapulmonary lymph node of 4 mm. Bones are normal.", []),
    ("Subcutaneous emphysema of the chest wall. Bones are normal.", []),
    ("Fibroatelectatic changes in the lingula.", ["Pulmonary fibrotic sequela"]),
    ("Pericardial effusion. No pleural effusion.", ["Pericardial effusion"]),
    ("Pleural empyema.", ["Pleural effusion", "Empyema"]),
    ("CARDIOMEGALY\nHIATAL HERNIA", ["Cardiomegaly", "Hiatal hernia"]),
    ("Oesophageal hiatus hernia and haemothorax.", ["Hiatal hernia", "Pleural effusion"]),
    ("• Cardiomegaly • No effusion • Atelectasis", ["Cardiomegaly", "Atelectasis"]),
])
def test_clauses_places_and_spellings(text, found, lexicon):
    assert list(lexicon.findings(text)) == list(closure(found))


def test_sentences():
    assert list(sentences('A is 3.5 mm. B at T12. vertebra! C? D "E" • F\n\nG; h?')) == [
        "A is 3.5 mm", "B at T12. vertebra", "C", "D", "E", "F", "G", "h?"]
    assert list(sentences(" \n.. ")) in ([], ["."])
    pieces = list(sentences("word " * 5000 + "x" * 2500))
    assert max(map(len, pieces)) <= 1000
    assert "".join(pieces).replace(" ", "") == "word" * 5000 + "x" * 2500


@pytest.mark.parametrize("text", ["lorem ipsum dolor sit amet", "?!", "12", "\ud800",
                                  "Akciğer parankimi doğal değildir"])
def test_what_it_does_not_understand_is_no_normal_report(text, lexicon):
    with pytest.raises(InvalidAnswer, match="chest report"):
        lexicon.findings(text)


def test_a_normal_report_and_a_broken_one_side_by_side(lexicon):
    answers = dict(lexicon.summarize(["Normal chest CT.", "lorem", "Cardiomegaly."]))
    assert answers[0] == () and answers[2] == ("Cardiomegaly",)
    assert isinstance(answers[1], InvalidAnswer)
    assert lexicon.name == f"lexicon/{module.VERSION}"


def test_the_memory_of_sentences_is_bounded(lexicon, monkeypatch):
    monkeypatch.setattr(module, "_KNOWN_SENTENCES", 10)
    for number in range(40):
        assert lexicon.findings(f"Nodule of {number} mm in the lung.") == ("Lung nodule",)
        assert len(lexicon._known) <= 10


def test_text_without_stops_takes_no_square_of_time(lexicon):
    start = time.process_time()
    lexicon.findings("nodule is observed and no effusion was detected in the lung " * 2000)
    assert time.process_time() - start < 10


def test_a_missing_library_is_told_in_a_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "negspacy.negation", None)
    with pytest.raises(UserError, match=r"pip install 'brgsa-jax\[summarize\]'"):
        Lexicon()


def test_import_brings_no_spacy():
    code = ("import sys, brgsa_jax.summarize.lexicon, brgsa_jax.summarize.run;"
            "print([m for m in ('spacy', 'jax', 'numpy') if m in sys.modules])")
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                            check=True)
    assert result.stdout.strip() == "[]"
