"""The free-text report of a phantom patient, in the manner of translated clinical reports.

What is said follows from the plan: sides, lobes and measurements are those of the lesions. Which
words are used is random. Rules that keep text and labels consistent:

- every finding that is present is stated plainly at least once;
- a negative sentence names only findings that are absent, and not every absent one is named;
- uncertain phrases ("could not be excluded", "may be compatible with") and historical ones
  ("previously … has resolved") are about absent findings: uncertain and past count as negative.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from brgsa_jax.data.phantom_anatomy import Body

# {where}: "the right lower lobe" or "both lungs"; {side}: "on the right", "bilaterally"; {mm}: the
# largest measurement with unit; {place}: the first lesion's own place; {many}: "a" or "multiple".
_POSITIVE: dict[str, tuple[str, ...]] = {
    "Medical material": (
        "{device} is seen.", "There is {device}.", "Note is made of {device}.",
        "{device} is present within the sections."),
    "Arterial wall calcification": (
        "Calcific plaques are present in the wall of the {place}.",
        "The walls of the {place} and its branches are calcified.",
        "There are atheromatous calcifications along the {place}.",
        "Mural calcification of the thoracic aorta is noted, mainly at the {place}."),
    "Cardiomegaly": (
        "The heart is enlarged; the cardiothoracic ratio is {place}.",
        "Cardiomegaly is present (CTR {place}).",
        "Heart size has increased, predominantly the left chambers.",
        "The cardiothoracic index is increased in favour of the heart."),
    "Pericardial effusion": (
        "Pericardial effusion reaching a thickness of {mm} is seen.",
        "There is {mm} of fluid between the pericardial leaves.",
        "A pericardial effusion surrounds the heart, {mm} at its thickest."),
    "Coronary artery wall calcification": (
        "Calcified plaques are seen in the {place}.",
        "There are wall calcifications of the coronary arteries, notably the {place}.",
        "Coronary calcification is present ({place})."),
    "Hiatal hernia": (
        "A hiatal hernia is present, about {mm} wide.",
        "There is a sliding type hiatal hernia at the lower end of the oesophagus.",
        "Part of the stomach has herniated through the hiatus into the posterior mediastinum "
        "(hiatal hernia)."),
    "Lymphadenopathy": (
        "{Many} enlarged lymph node{s} with a diameter of up to {mm} {are} seen in the {stations} "
        "station{ss}.",
        "Lymphadenopathy is present: {stations}, the largest {mm}.",
        "Pathological lymph nodes reaching {mm} are noted in the {stations} region."),
    "Emphysema": (
        "Emphysematous changes are present in both lungs, more marked in the {place}s.",
        "There are centrilobular emphysema areas, predominantly in the {place}s.",
        "Both lungs show emphysematous destruction and increased aeration."),
    "Atelectasis": (
        "Linear atelectasis is seen in {where}.",
        "There are subsegmental atelectatic bands in {where}.",
        "Plate-like atelectasis with slight volume loss is noted in {where}."),
    "Lung nodule": (
        "{Many} nodule{s}, the largest {mm} in diameter, {are} observed in {where}.",
        "{Many} pulmonary nodule{s} {are} present in {where} (up to {mm}).",
        "In {where} there {are} {many} well-defined nodule{s} measuring up to {mm}."),
    "Lung opacity": (
        "Ground-glass opacities are seen in {where}.",
        "There are patchy areas of ground-glass density in {where}.",
        "Hazy density increases in the form of ground glass are noted in {where}."),
    "Pulmonary fibrotic sequela": (
        "Pleuroparenchymal sequela densities are seen {side} at the lung {place}.",
        "There are fibrotic sequelae with retraction at the {place} {side}.",
        "Sequela fibrotic strands and irregular apical thickening are present {side}."),
    "Pleural effusion": (
        "Pleural effusion {side}, {mm} at its deepest, is observed.",
        "There is free pleural fluid {side} measuring {mm}.",
        "Pleural effusion is present {side} and reaches a thickness of {mm}."),
    "Mosaic attenuation pattern": (
        "A mosaic attenuation pattern is present in both lungs.",
        "Mosaic attenuation of the parenchyma is seen (small airway or small vessel disease?).",
        "Both lungs show a mosaic pattern with geographic differences of attenuation."),
    "Peribronchial thickening": (
        "Peribronchial thickening is seen {side}.",
        "There is peribronchial cuffing of the segmental bronchi {side}.",
        "The peribronchial interstitium is thickened {side} in the central zones."),
    "Consolidation": (
        "Consolidation with air bronchograms is seen in {where}.",
        "There are consolidated areas in {where}, the largest {mm}.",
        "An area of consolidation is noted in {where}."),
    "Bronchiectasis": (
        "Bronchiectasis is present in {where}.",
        "There are dilated bronchi with thick walls in {where} (bronchiectasis).",
        "Tubular bronchiectatic changes are noted in {where}."),
    "Interlobular septal thickening": (
        "Interlobular septal thickening is present {side}.",
        "The interlobular septa are thickened {side}, mainly in the periphery of the bases.",
        "Smooth thickening of the interlobular septa is seen {side}."),
    "Pneumonia": (
        "An infiltration with ground-glass halo in {where} is consistent with pneumonia.",
        "Airspace disease in {where} indicates pneumonia.",
        "There is pneumonic infiltration in {where}."),
    "Pneumothorax": (
        "Pneumothorax is present {side}, {mm} thick anteriorly.",
        "There is free air in the pleural space {side} (pneumothorax).",
        "A pneumothorax {side} with partial collapse of the lung is seen."),
    "Empyema": (
        "A loculated collection with a thick rim and air bubbles {side}, {mm} thick, is consistent "
        "with empyema.",
        "There is empyema {side} in the posterolateral pleural space."),
    "Tuberculosis": (
        "A thick-walled cavity of {mm} with tree-in-bud nodules in {where} indicates active "
        "tuberculosis.",
        "Cavitary tuberculosis is seen in {where}."),
    "Pulmonary fibrosis": (
        "Subpleural honeycombing in both lung bases is consistent with pulmonary fibrosis.",
        "Pulmonary fibrosis with basal and peripheral predominance is present.",
        "There are findings of pulmonary fibrosis with honeycomb cysts at the bases."),
    "Lung cyst": (
        "{Many} thin-walled air cyst{s} of up to {mm} {are} seen in {where}.",
        "In {where} there {are} {many} parenchymal cyst{s}, the largest {mm}."),
    "Bronchial thickening": (
        "Bronchial wall thickening is present in the main and lobar bronchi.",
        "The walls of the central bronchi are thickened (bronchial thickening).",),
    "Lung mass": (
        "A spiculated mass of {mm} is seen in {where}.",
        "There is a mass lesion measuring {mm} in {where}.",
        "In {where} a lobulated soft-tissue mass of {mm} is observed."),
    "Osteophyte": (
        "Osteophytes are seen at the corners of the thoracic vertebrae.",
        "There are bridging osteophytic spurs on the right side of the thoracic spine.",
        "Vertebral end plates show osteophyte formation."),
    "Rib fracture": (
        "Displaced fractures of the {place} ribs are seen {side}.",
        "There is a rib fracture with callus {side}.",
        "Fracture lines are present in the ribs {side}."),
    "Atherosclerosis": (
        "The thoracic aorta is ectatic and tortuous with atherosclerotic wall changes.",
        "Atherosclerosis of the thoracic aorta is present.",
        "There are atherosclerotic changes in the aorta."),
    "Pericardial calcification": (
        "Calcification of the pericardium is seen.",
        "There are pericardial calcifications over the ventricles."),
    "Spondylosis": (
        "Spondylosis with narrowed discs and sclerotic end plates is present.",
        "There are findings of thoracic spondylosis.",
        "Spondylotic changes are seen in the thoracic spine."),
    "Pleural calcification": (
        "Calcified pleural plaques are present {side}.",
        "There is calcification of the pleura {side}.",),
    "Pneumomediastinum": (
        "Free air is present in the mediastinal fat planes (pneumomediastinum).",
        "There is pneumomediastinum.",),
}

# (findings that must all be absent, wordings)
_NEGATIVE: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...] = (
    ("heart", ("Pericardial effusion",), (
        "No pericardial effusion or thickening was seen.", "Pericardial effusion was not found.")),
    ("heart", ("Cardiomegaly",), (
        "Heart size and contours are normal.", "The heart is of natural size.")),
    ("heart", ("Arterial wall calcification", "Atherosclerosis"), (
        "The calibre of the thoracic aorta is natural.", "Thoracic aorta and branches are normal, "
        "without calcified plaque.")),
    ("heart", ("Coronary artery wall calcification",), (
        "No coronary calcification was detected.",)),
    ("heart", ("Hiatal hernia",), (
        "The oesophagus has a normal calibre and wall.", "No hiatal hernia was detected.")),
    ("heart", ("Lymphadenopathy",), (
        "No pathologically enlarged lymph node was seen in the mediastinum or hila.",
        "Mediastinal and hilar lymph nodes are not of pathological size.",
        "Lymphadenopathy was not detected.")),
    ("heart", ("Pneumomediastinum",), ("No free air was seen in the mediastinum.",)),
    ("lung", ("Lung nodule", "Lung mass"), (
        "No nodule or mass was found in either lung.",
        "There is no space-occupying lesion in the lung parenchyma.")),
    ("lung", ("Consolidation", "Pneumonia", "Lung opacity"), (
        "No active infiltration or consolidation was detected.",
        "There is no consolidation or ground-glass area in the parenchyma.")),
    ("lung", ("Emphysema", "Mosaic attenuation pattern"), (
        "Aeration of both lungs is normal and symmetric.",)),
    ("lung", ("Bronchiectasis", "Peribronchial thickening", "Bronchial thickening"), (
        "Bronchial calibres and walls are natural; no bronchiectasis.",)),
    ("lung", ("Atelectasis",), ("No atelectasis was seen.",)),
    ("pleura", ("Pleural effusion", "Pneumothorax", "Empyema"), (
        "No pleural effusion or pneumothorax was detected.",
        "Pleural effusion was not seen on either side; there is no pneumothorax.")),
    ("pleura", ("Pleural effusion", "Empyema"), ("There is no pleural effusion.",)),
    ("bone", ("Rib fracture",), ("No fracture line was seen in the ribs.",)),
    ("bone", ("Osteophyte", "Spondylosis"), (
        "Bone structures in the field of view are natural.",
        "Vertebral body heights and end plates are preserved.")),
)

_UNCERTAIN: dict[str, tuple[str, ...]] = {
    "Pneumonia": ("An early infectious process (pneumonia?) could not be excluded clinically.",
                  "Correlation with laboratory findings is advised for possible pneumonia."),
    "Lung nodule": ("A millimetric density on the fissure may be compatible with an intrapulmonary "
                    "lymph node or a vessel section; a nodule could not be confirmed.",),
    "Atelectasis": ("Dependent density increase may represent atelectasis or positioning.",),
    "Lymphadenopathy": ("Lymph nodes below pathological size are present; lymphadenopathy is "
                        "doubtful.",),
    "Pericardial effusion": ("A small pericardial effusion could not be excluded because of motion "
                             "artefact.",),
    "Lung opacity": ("Slight ground glass at the bases may be secondary to expiration and could "
                     "not be evaluated clearly.",),
    "Tuberculosis": ("Specific infection such as tuberculosis could not be excluded; clinical "
                     "correlation is advised.",),
    "Hiatal hernia": ("The hiatus is wide; a small hernia may be considered.",),
}

_HISTORICAL: dict[str, tuple[str, ...]] = {
    "Pleural effusion": ("The previously seen pleural effusion has resolved.",
                         "Pleural fluid reported in the earlier examination is no longer present."),
    "Consolidation": ("The consolidation described in the previous examination has regressed "
                      "completely.",),
    "Pneumothorax": ("The pneumothorax of the previous study is not seen in this examination.",),
    "Lung nodule": ("The nodule mentioned in the former report could not be found today.",),
    "Pneumonia": ("History of pneumonia two years ago; no residual finding.",),
    "Medical material": ("The catheter seen in the previous study has been removed.",),
}

_NORMAL: dict[str, tuple[str, ...]] = {
    "airway": ("The trachea is in the midline and both main bronchi are patent.",
               "Trachea and main bronchi are open, without obstruction of the lumen.",
               "The tracheobronchial tree is patent to the segmental level."),
    "abdomen": ("Upper abdominal organs within the sections are unremarkable.",
                "The liver, spleen and adrenal glands in the sections are natural.",
                "No focal lesion was found in the visible part of the liver and spleen.",
                "Sections of the upper abdomen show no pathology; both adrenal glands are normal."),
    "bone": ("No lytic or destructive bone lesion was seen.",
             "There is no destructive lesion in the visible bones."),
}

_TECHNIQUE = {
    False: ("Thoracic CT was obtained in the axial plane without contrast material.",
            "Non-contrast multidetector CT of the thorax, 1.5 mm sections.",
            "Unenhanced chest CT; mediastinal structures could not be assessed optimally."),
    True: ("Thoracic CT was obtained after intravenous contrast material.",
           "Contrast-enhanced multidetector CT of the thorax, 1.5 mm sections."),
}
_HISTORY = ("Cough.", "Dyspnoea.", "Fever, cough.", "Control.", "Chest pain.", "Not given.",
            "Follow-up of known disease.", "Preoperative evaluation.", "Back pain.")
_LUNG_LEAD = ("In the lung parenchyma window: ", "Evaluation of both lungs: ", "", "")

_DEVICES = {
    "pacemaker": ("a cardiac pacemaker in the left pectoral region with its lead in the right "
                  "ventricle", "a left-sided pacemaker and electrodes"),
    "port catheter": ("a port catheter whose tip lies in the superior vena cava",
                      "a subcutaneous port chamber with a central catheter"),
    "sternal wires": ("metallic sternotomy sutures", "median sternotomy wires"),
    "prosthetic valve": ("a prosthetic heart valve and sternotomy wires",
                         "metallic valve replacement material"),
    "spinal hardware": ("metallic fixation material in the thoracic vertebrae",
                        "posterior spinal instrumentation (rods and pedicle screws)"),
    "central venous catheter": ("a central venous catheter ending in the superior vena cava",
                                "a right jugular venous catheter"),
}

_REGION = {
    "heart": ("Medical material", "Arterial wall calcification", "Atherosclerosis", "Cardiomegaly",
              "Pericardial effusion", "Pericardial calcification",
              "Coronary artery wall calcification", "Hiatal hernia", "Lymphadenopathy",
              "Pneumomediastinum"),
    "lung": ("Bronchial thickening", "Peribronchial thickening", "Bronchiectasis", "Emphysema",
             "Mosaic attenuation pattern", "Lung mass", "Lung nodule", "Lung cyst",
             "Tuberculosis", "Pneumonia", "Consolidation", "Lung opacity", "Atelectasis",
             "Pulmonary fibrosis", "Pulmonary fibrotic sequela", "Interlobular septal thickening"),
    "pleura": ("Pleural effusion", "Empyema", "Pneumothorax", "Pleural calcification"),
    "bone": ("Rib fracture", "Osteophyte", "Spondylosis"),
}

_IMPRESSION = ("{finding} {where}.", "{finding}.", "Findings consistent with {lower}.")


def _choose(rng: np.random.Generator, options: Sequence[str]) -> str:
    return options[int(rng.integers(len(options)))]


def _measure(rng: np.random.Generator, size: float, two: bool = False) -> str:
    """Words for a length in mm: "14 mm", "1.4 cm" or "14x11 mm"."""
    top = max(1, round(size))
    roll = rng.random()
    if roll < 0.25 and top >= 10:
        return f"{size / 10:.1f} cm"
    if roll < 0.5 and two:
        return f"{top}x{max(1, round(size * 0.8))} mm"
    return f"{top} mm"


def _side(lesions: Sequence[Any]) -> str:
    sides = {lesion.side for lesion in lesions} - {""}
    if len(sides) == 2:
        return "bilaterally"
    return f"on the {sides.pop()}" if sides else "in the midline"


def _where(rng: np.random.Generator, lesions: Sequence[Any]) -> str:
    """Lobes of the lesions: up to three are listed, otherwise the lungs are named."""
    places = list(dict.fromkeys((lesion.side, lesion.place) for lesion in lesions))
    if len(places) > 3 or not all("lobe" in place for _, place in places):
        sides = sorted({side for side, _ in places})
        return "both lungs" if len(sides) == 2 else f"the {sides[0]} lung"
    words = []
    for side, place in places:
        if "lingula" in place:
            words.append("the lingula of the left upper lobe")
        elif rng.random() < 0.5:
            words.append(f"the {side} {place}")
        else:
            words.append(f"the {place} of the {side} lung")
    return ", ".join(words[:-1]) + (" and " if len(words) > 1 else "") + words[-1]


def describe(rng: np.random.Generator, body: Body, name: str, lesions: Sequence[Any]) -> str:
    """One sentence that states a present finding, from its lesions' places and sizes."""
    many = len(lesions) > 1
    size = max(lesion.size for lesion in lesions) * body.scale
    stations = list(dict.fromkeys(lesion.place for lesion in lesions))
    words = {
        "where": _where(rng, lesions), "side": _side(lesions), "place": lesions[0].place,
        "mm": _measure(rng, size, name in ("Lung nodule", "Lymphadenopathy", "Lung mass")),
        "many": _choose(rng, ("multiple", "several", "a few")) if many else "a",
        "s": "s" if many else "", "are": "are" if many else "is",
        "stations": ", ".join(stations[:4]), "ss": "s" if len(stations) > 1 else "",
        "device": _choose(rng, _DEVICES.get(lesions[0].place, ("a metallic device",))),
    }
    words["Many"] = words["many"].capitalize()
    text = _choose(rng, _POSITIVE[name]).format(**words)
    text = re.sub(r"\b([Aa]) (?=[aeio])", r"\1n ", text)
    return text[0].upper() + text[1:]


def write_report(rng: np.random.Generator, body: Body, findings: Sequence[str],
                 lesions: Sequence[Any]) -> str:
    """Writes the report of one patient.

    Args:
        rng: the report's own stream.
        body: the patient (contrast, scale).
        findings: canonical names present.
        lesions: their places; every finding has at least one.

    Returns:
        Plain text of three to five paragraphs: clinical information and technique (not always),
        findings by region, impression.
    """
    present = set(findings)
    places = {name: [lesion for lesion in lesions if lesion.finding == name] for name in findings}
    region: dict[str, list[str]] = {key: [] for key in ("airway", "heart", "lung", "pleura",
                                                        "abdomen", "bone")}
    for key in ("airway", "abdomen", "bone"):
        if rng.random() < 0.8:
            region[key].append(_choose(rng, _NORMAL[key]))
    for key, names in _REGION.items():
        stated = [name for name in names if name in present]
        for number in rng.permutation(len(stated)).tolist():
            region[key].append(describe(rng, body, stated[number], places[stated[number]]))
    said: set[str] = set()
    for key, names, wordings in _NEGATIVE:
        if present.isdisjoint(names) and said.isdisjoint(names) and rng.random() < 0.65:
            region[key].insert(int(rng.integers(len(region[key]) + 1)), _choose(rng, wordings))
            said.update(names)
    for table, chance in ((_UNCERTAIN, 0.30), (_HISTORICAL, 0.16)):
        if rng.random() < chance:
            free = [name for name in table if name not in present and name not in said]
            if free:
                name = _choose(rng, free)
                key = next(key for key, names in _REGION.items() if name in names)
                region[key].append(_choose(rng, table[name]))
                said.add(name)
    if region["lung"]:
        lead = _choose(rng, _LUNG_LEAD)
        region["lung"][0] = lead + region["lung"][0]
    text = []
    if rng.random() < 0.5:
        text.append("Clinical information: " + _choose(rng, _HISTORY))
    if rng.random() < 0.6:
        text.append("Technique: " + _choose(rng, _TECHNIQUE[body.blood_hu > 70.0]))
    text.append("Findings: " + " ".join(s for part in region.values() for s in part))
    if not present:
        text.append("Impression: " + _choose(rng, (
            "Thoracic CT examination within normal limits.", "No pathology was detected.",
            "Normal chest CT.")))
    else:
        lines = []
        for name in findings:
            if rng.random() < 0.75 or len(findings) == 1:
                form = _choose(rng, _IMPRESSION)
                lobar = all("lobe" in lesion.place for lesion in places[name])
                where = f"in {_where(rng, places[name])}" if lobar else ""
                lines.append(form.format(finding=name, lower=name.lower(), where=where)
                             .replace(" .", "."))
        text.append("Impression: " + (" ".join(lines) if lines else "As described above."))
    return "\n".join(text)
