"""Canonical findings: the label lists, their prompts, synonyms, and which name implies which.

Names and order are those of the released label files (CT-RATE multi-abnormality labels, the
CT-RATE-LT prompts, and the 88 names of BrgSA's summaries); they are data, so they are repeated here
letter by letter. Some of the 88 mean the same (Kidney stone, Nephrolithiasis); each keeps its name.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator

CT_RATE_18: tuple[str, ...] = (
    "Medical material",
    "Arterial wall calcification",
    "Cardiomegaly",
    "Pericardial effusion",
    "Coronary artery wall calcification",
    "Hiatal hernia",
    "Lymphadenopathy",
    "Emphysema",
    "Atelectasis",
    "Lung nodule",
    "Lung opacity",
    "Pulmonary fibrotic sequela",
    "Pleural effusion",
    "Mosaic attenuation pattern",
    "Peribronchial thickening",
    "Consolidation",
    "Bronchiectasis",
    "Interlobular septal thickening",
)

# Prompt order. CT-RATE-LT-label.csv has another column order: select its columns by name.
CT_RATE_LT_15: tuple[str, ...] = (
    "Pneumonia",
    "Pneumothorax",
    "Empyema",
    "Tuberculosis",
    "Pulmonary fibrosis",
    "Lung cyst",
    "Bronchial thickening",
    "Lung mass",
    "Osteophyte",
    "Rib fracture",
    "Atherosclerosis",
    "Pericardial calcification",
    "Spondylosis",
    "Pleural calcification",
    "Pneumomediastinum",
)

CT_RATE_33: tuple[str, ...] = CT_RATE_18 + CT_RATE_LT_15

# What BrgSA's summaries of the validation reports name, in that file's order.
BRGSA_88: tuple[str, ...] = (
    "Acute respiratory distress syndrome",
    "Adenoma",
    "Adrenal hyperplasia",
    "Arterial wall calcification",
    "Ascites",
    "Atelectasis",
    "Atherosclerosis",
    "Bone lesion",
    "Bronchial thickening",
    "Bronchiectasis",
    "Bronchiolitis",
    "Bronchopneumonia",
    "Calcification",
    "Carcinomatosis",
    "Cardiomegaly",
    "Cavitary lesion",
    "Chilaiditi syndrome",
    "Consolidation",
    "Coronary artery wall calcification",
    "Covid 19 pneumonia",
    "Degenerative change",
    "Emphysema",
    "Empyema",
    "Fatty liver",
    "Fibrosis",
    "Fracture",
    "Gallstone",
    "Ground glass opacity",
    "Gynecomastia",
    "Heart failure",
    "Hepatomegaly",
    "Hepatosplenomegaly",
    "Hiatal hernia",
    "Hydatid cyst",
    "Infarction",
    "Interlobular septal thickening",
    "Kidney atrophy",
    "Kidney stone",
    "Lipomatosis",
    "Liver lesion",
    "Lung cyst",
    "Lung mass",
    "Lung nodule",
    "Lung opacity",
    "Lymphadenopathy",
    "Lymphangitis carcinomatosis",
    "Lymphoma",
    "Lytic bone lesion",
    "Medical material",
    "Metastasis",
    "Mosaic attenuation pattern",
    "Myeloma",
    "Nephrolithiasis",
    "Osteopenia",
    "Osteophyte",
    "Osteoporosis",
    "Pancreatic cancer",
    "Pancreatic pseudocyst",
    "Peribronchial thickening",
    "Pericardial calcification",
    "Pericardial effusion",
    "Pleural calcification",
    "Pleural effusion",
    "Pleural thickening",
    "Pneumomediastinum",
    "Pneumonia",
    "Pneumothorax",
    "Pulmonary fibrosis",
    "Pulmonary fibrotic sequela",
    "Pulmonary hypertension",
    "Pulmonary hypertrophy",
    "Renal atrophy",
    "Renal cyst",
    "Renal parapelvic cyst",
    "Rib fracture",
    "Sclerotic bone lesion",
    "Scoliosis",
    "Situs inversus",
    "Splenic effusion",
    "Splenomegaly",
    "Spondylosis",
    "Thyroid nodule",
    "Tracheal stenosis",
    "Tracheobronchopathy",
    "Tuberculosis",
    "Vertebral compression fracture",
    "Vertebral degeneration",
    "Viral pneumonia",
)

# Every name, CT-RATE-18 first, then CT-RATE-LT, then the rest of the 88 by letter.
VOCABULARY: tuple[str, ...] = CT_RATE_33 + tuple(
    name for name in BRGSA_88 if name not in CT_RATE_33)

# A narrower or synonymous finding -> the name that is then true as well, by way of Pneumonia in
# the end a CT-RATE-18 one.
#   Pneumonia: airspace or ground-glass opacity is how it is seen; Consolidation is not implied,
#     because a viral pneumonia is often ground glass alone.
#   Covid 19, viral and bronchopneumonia: CT-RATE-LT files them under Pneumonia.
#   Empyema: an infected pleural effusion.
#   Pulmonary fibrosis, Fibrosis (of a chest report), Bronchial thickening: what CT-RATE files
#     under its sequela and peribronchial names.
#   Lymphangitis carcinomatosis: seen as thickened septa.
#   Atherosclerosis: on a chest CT it is read from calcified plaque of the arterial wall.
# Deliberately without a parent: Lung mass (Fleischner: a nodule is at most 30 mm, a mass is
#   larger, so neither is the other); Lung cyst (not emphysema); Tuberculosis (cavity, nodules or
#   sequela: none is certain); pleural and pericardial calcification (not arteries); Heart failure
#   (a diagnosis that needs no large heart); Lymphoma, Metastasis (anywhere); the rest.
PARENTS: dict[str, str] = {
    "Pneumonia": "Lung opacity",
    "Empyema": "Pleural effusion",
    "Pulmonary fibrosis": "Pulmonary fibrotic sequela",
    "Bronchial thickening": "Peribronchial thickening",
    "Atherosclerosis": "Arterial wall calcification",
    "Bronchopneumonia": "Pneumonia",
    "Covid 19 pneumonia": "Pneumonia",
    "Fibrosis": "Pulmonary fibrotic sequela",
    "Ground glass opacity": "Lung opacity",
    "Lymphangitis carcinomatosis": "Interlobular septal thickening",
    "Viral pneumonia": "Pneumonia",
}

# Other ways to write a name, in lower case. Regular plurals, British spellings and hyphens are
# added by `fold` and `spellings`. No phrase belongs to two names.
SYNONYMS: dict[str, tuple[str, ...]] = {
    "Medical material": (
        "medical device", "medical devices", "catheter", "central venous catheter", "port catheter",
        "pacemaker", "cardiac pacemaker", "defibrillator", "icd lead", "stent", "prosthesis",
        "prosthetic valve", "valve prosthesis", "endotracheal tube", "tracheostomy tube",
        "tracheostomy cannula", "nasogastric tube", "feeding tube", "chest tube", "thoracic tube",
        "drainage tube", "drainage catheter", "chest drain", "surgical clip", "surgical suture",
        "suture material", "metallic suture", "sternotomy wire", "sternal wire", "surgical staple",
        "surgical material", "metallic material", "metallic implant", "implanted hardware",
        "spinal hardware", "fixation material", "fixation screw", "port chamber"),
    "Arterial wall calcification": (
        "aortic calcification", "aortic wall calcification", "calcification of the aorta",
        "arterial calcification", "vascular calcification", "vascular wall calcification",
        "aortic atherosclerosis", "atherosclerotic calcification", "calcified atheroma plaque",
        "calcific atheroma plaque", "calcified plaque", "calcific plaque",
        "calcified atherosclerotic plaque", "calcific atherosclerotic plaque"),
    "Cardiomegaly": (
        "enlarged heart", "heart enlargement", "enlargement of the heart", "cardiac enlargement",
        "increased heart size", "increased cardiac size", "increased cardiothoracic index",
        "increased cardiothoracic ratio", "cardiac dilatation", "biatrial dilatation"),
    "Pericardial effusion": (
        "effusion in the pericardium", "pericardial fluid", "hemopericardium",
        "effusion in the pericardial space", "fluid in the pericardial space"),
    "Coronary artery wall calcification": (
        "coronary calcification", "coronary artery calcification",
        "coronary arterial calcification", "coronary plaque", "calcified coronary plaque",
        "coronary artery plaque",
        "coronary artery calcium", "coronary atherosclerosis", "coronary artery atherosclerosis"),
    "Hiatal hernia": (
        "hiatus hernia", "sliding hernia", "paraesophageal hernia", "sliding hiatal hernia",
        "sliding type hiatal hernia", "hernia of the hiatus", "esophageal hiatal hernia"),
    "Lymphadenopathy": (
        "lap", "adenopathy", "lymphadenomegaly", "enlarged lymph node", "lymph node enlargement",
        "pathological lymph node", "mediastinal lymphadenopathy", "hilar lymphadenopathy",
        "axillary lymphadenopathy", "mediastinal lymph node", "hilar lymph node"),
    "Emphysema": (
        "pulmonary emphysema", "emphysematous change", "emphysematous area", "emphysematous lung",
        "centrilobular emphysema", "centriacinar emphysema", "paraseptal emphysema",
        "panlobular emphysema", "panacinar emphysema", "bullous emphysema", "emphysematous bulla",
        "bulla", "bullae", "bleb"),
    "Atelectasis": (
        "atelectatic change", "atelectatic area", "linear atelectasis", "subsegmental atelectasis",
        "band atelectasis", "plate atelectasis", "discoid atelectasis", "passive atelectasis",
        "compression atelectasis", "compressive atelectasis", "lobar collapse", "lung collapse",
        "collapsed lung", "atelectasia"),
    "Lung nodule": (
        "pulmonary nodule", "nodule", "micronodule", "nodule in the lung", "nodule of the lung",
        "parenchymal nodule", "subpleural nodule", "ground glass nodule", "nodular lung lesion",
        "pulmonary micronodule", "metastatic lung nodule", "solitary pulmonary nodule"),
    "Lung opacity": (
        "pulmonary opacity", "opacity", "opacification", "lung opacification", "infiltrate",
        "infiltration", "pulmonary infiltrate", "lung infiltrate", "pneumonic infiltration",
        "airspace opacity", "airspace disease", "parenchymal opacity", "crazy paving",
        "crazy paving pattern"),
    "Pulmonary fibrotic sequela": (
        "fibrotic sequela", "fibrotic sequelae", "fibrotic sequela change",
        "fibrotic sequelae change", "sequela change", "sequelae change", "sequela of fibrosis",
        "pleuroparenchymal sequela", "pleuroparenchymal sequelae", "pleuroparenchymal band",
        "parenchymal band", "fibrotic band", "fibrotic change", "fibroatelectasis",
        "fibroatelectatic change", "fibrotic density", "fibrotic recession", "apical scarring",
        "scarring", "pulmonary scarring", "lung scarring", "scar", "scar tissue"),
    "Pleural effusion": (
        "effusion in the pleura", "pleural fluid", "fluid in the pleural space", "hydrothorax",
        "hemothorax", "hydropneumothorax", "effusion in the pleural space", "hemithorax effusion"),
    "Mosaic attenuation pattern": (
        "mosaic attenuation", "mosaic pattern", "mosaic perfusion", "mosaic density",
        "mosaic appearance", "mosaic lung attenuation", "mosaicism", "mosaic perfusion pattern"),
    "Peribronchial thickening": (
        "peribronchial wall thickening", "peribronchial cuffing", "peribronchovascular thickening",
        "thickening of the peribronchial wall", "peribronchial sheath thickening"),
    "Consolidation": (
        "consolidated area", "consolidative area", "consolidative opacity",
        "air space consolidation", "airspace consolidation", "lung consolidation",
        "pulmonary consolidation",
        "consolidation area"),
    "Bronchiectasis": (
        "bronchiectatic change", "bronchiectasia", "bronchial dilatation", "bronchial dilation",
        "bronchial ectasia", "dilated bronchus", "dilated bronchi", "traction bronchiectasis",
        "tubular bronchiectasis", "cystic bronchiectasis", "bronchiolectasis"),
    "Interlobular septal thickening": (
        "septal thickening", "interseptal thickening", "thickened interlobular septum",
        "thickened interlobular septa", "thickening of the interlobular septa",
        "thickening of interlobular septa", "interlobular septa thickening",
        "interlobular thickening", "smooth septal thickening", "kerley line"),
    "Pneumonia": (
        "pneumonic consolidation", "lobar pneumonia", "aspiration pneumonia", "lung infection",
        "pulmonary infection", "bacterial pneumonia", "pneumonic focus", "organizing pneumonia"),
    "Pneumothorax": ("pneumothoraces", "air in the pleural space"),
    "Empyema": ("pleural empyema", "thoracic empyema", "pyothorax"),
    "Tuberculosis": (
        "tb", "pulmonary tuberculosis", "tuberculous infection", "tbc", "miliary tuberculosis"),
    "Pulmonary fibrosis": (
        "lung fibrosis", "interstitial fibrosis", "interstitial pulmonary fibrosis",
        "idiopathic pulmonary fibrosis", "honeycombing", "honeycomb lung", "honeycomb appearance"),
    "Lung cyst": (
        "pulmonary cyst", "air cyst", "parenchymal cyst", "cyst in the lung", "cystic lung lesion",
        "pneumatocele"),
    "Bronchial thickening": (
        "bronchial wall thickening", "thickening of the bronchial wall",
        "thickened bronchial wall", "bronchial wall thickness increase", "airway wall thickening",
        "thickening of bronchial walls"),
    "Lung mass": (
        "pulmonary mass", "mass in the lung", "lung tumor", "pulmonary tumor",
        "parenchymal lung mass", "mass lesion in the lung"),
    "Osteophyte": (
        "osteophytosis", "osteophyte formation", "osteophytic change", "bone spur",
        "osteophytic spur", "bridging osteophyte", "vertebral osteophyte"),
    "Rib fracture": (
        "costal fracture", "fractured rib", "fracture of the rib", "fracture of a rib",
        "broken rib", "fracture in the rib"),
    "Atherosclerosis": (
        "atherosclerotic change", "atherosclerotic disease", "atherosclerotic plaque",
        "atheroma plaque", "atheromatous plaque", "atheromatosis", "arteriosclerosis",
        "atheromatous change"),
    "Pericardial calcification": (
        "calcification of the pericardium", "calcified pericardium", "pericardial calcific plaque"),
    "Spondylosis": (
        "spondylotic change", "thoracic spondylosis", "spondyloarthrosis", "spondylosis deformans"),
    "Pleural calcification": (
        "calcification of the pleura", "calcified pleura", "calcified pleural plaque",
        "pleural calcific plaque", "calcific pleural plaque", "calcified pleural thickening"),
    "Pneumomediastinum": ("mediastinal emphysema", "mediastinal air", "air in the mediastinum"),
    "Acute respiratory distress syndrome": ("ards", "acute lung injury"),
    "Adenoma": ("adrenal adenoma", "surrenal adenoma", "adenomatous lesion"),
    "Adrenal hyperplasia": (
        "hyperplasia of the adrenal gland", "adrenal gland hyperplasia", "adrenal thickening",
        "thickened adrenal gland", "surrenal hyperplasia"),
    "Ascites": ("peritoneal fluid", "intraabdominal free fluid", "peritoneal effusion"),
    "Bone lesion": ("osseous lesion", "skeletal lesion", "lesion of the bone"),
    "Bronchiolitis": (
        "tree in bud", "tree in bud pattern", "tree in bud appearance", "bronchiolar inflammation",
        "budding tree appearance", "budding tree view", "small airway infection"),
    "Bronchopneumonia": ("bronchopneumonic infiltration", "lobular pneumonia"),
    "Calcification": ("calcific focus", "calcified lesion", "calcific density", "calcified focus"),
    "Carcinomatosis": ("peritoneal carcinomatosis", "pleural carcinomatosis", "omental cake"),
    "Cavitary lesion": (
        "cavitation", "cavitated lesion", "cavitating lesion", "cavitary nodule",
        "cavitary mass", "lung cavity"),
    "Chilaiditi syndrome": ("chilaiditi", "chilaiditi sign", "colonic interposition"),
    "Covid 19 pneumonia": (
        "covid pneumonia", "covid19 pneumonia", "covid 19 viral pneumonia", "coronavirus pneumonia",
        "sars cov 2 pneumonia", "covid 19 infection", "covid 19"),
    "Degenerative change": (
        "degeneration", "degenerative bone change", "degenerative disease",
        "osteodegenerative change", "osteoarthritis", "degenerative changes of the bone",
        "degenerative bone disease"),
    "Fatty liver": (
        "hepatic steatosis", "hepatosteatosis", "steatosis", "liver steatosis",
        "fatty infiltration of the liver", "adiposity of the liver", "hepatic fatty infiltration",
        "fatty liver disease"),
    "Fibrosis": ("fibrotic tissue", "fibrous tissue"),
    "Fracture": (
        "bone fracture", "fracture line", "sternal fracture", "clavicle fracture",
        "vertebral fracture"),
    "Gallstone": (
        "cholelithiasis", "gall stone", "stone in the gallbladder", "gallbladder stone",
        "biliary stone", "biliary calculus", "biliary calculi", "gallbladder calculus",
        "gallbladder calculi", "cholecystolithiasis"),
    "Ground glass opacity": (
        "ggo", "ground glass", "ground glass density", "ground glass area",
        "ground glass appearance", "ground glass attenuation", "ground glass density increase",
        "ground glass infiltrate",
        "ground glass opacification", "frosted glass", "frosted glass density"),
    "Gynecomastia": ("male breast enlargement",),
    "Heart failure": (
        "cardiac failure", "congestive heart failure", "cardiac decompensation",
        "cardiac insufficiency", "left heart failure", "right heart failure"),
    "Hepatomegaly": (
        "enlarged liver", "liver enlargement", "increased liver size", "enlargement of the liver"),
    "Hepatosplenomegaly": ("enlarged liver and spleen", "hepatomegaly and splenomegaly"),
    "Hydatid cyst": (
        "hydatid disease", "cyst hydatid", "echinococcosis", "echinococcal cyst"),
    "Infarction": ("infarct", "pulmonary infarction", "pulmonary infarct", "splenic infarct",
                   "renal infarct", "splenic infarction"),
    "Kidney atrophy": (
        "atrophic kidney", "atrophy of the kidney", "small kidney", "shrunken kidney"),
    "Kidney stone": (
        "renal stone", "renal calculus", "renal calculi", "kidney calculus", "kidney calculi",
        "stone in the kidney", "calculus in the kidney", "calculi in the kidney"),
    "Lipomatosis": (
        "mediastinal lipomatosis", "renal sinus lipomatosis", "epicardial lipomatosis"),
    "Liver lesion": (
        "hepatic lesion", "hepatic mass", "liver mass", "lesion in the liver", "liver cyst",
        "hepatic cyst", "hypodense liver lesion", "liver nodule", "hepatic hemangioma",
        "liver hemangioma"),
    "Lymphangitis carcinomatosis": (
        "lymphangitic carcinomatosis", "lymphangitic spread", "lymphangitis carcinomatosa",
        "lymphangitic tumor spread", "pulmonary lymphangitis"),
    "Lymphoma": ("hodgkin lymphoma", "non hodgkin lymphoma", "hodgkin disease"),
    "Lytic bone lesion": (
        "lytic lesion", "osteolytic lesion", "lytic destructive lesion", "lytic bone metastasis",
        "osteolysis", "lytic area"),
    "Metastasis": (
        "metastatic disease", "metastatic lesion", "metastatic mass", "secondary deposit",
        "metastatic involvement", "lung metastasis", "liver metastasis", "bone metastasis",
        "metastatic nodule"),
    "Myeloma": ("multiple myeloma", "plasmacytoma"),
    "Nephrolithiasis": ("urolithiasis", "renal lithiasis"),
    "Osteopenia": (
        "osteopenic change", "osteopenic appearance", "decreased bone density",
        "reduced bone density", "bone demineralization"),
    "Osteoporosis": ("osteoporotic change", "osteoporotic appearance"),
    "Pancreatic cancer": (
        "pancreatic carcinoma", "pancreatic adenocarcinoma", "pancreatic tumor", "pancreas cancer",
        "pancreatic mass", "pancreatic malignancy", "pancreas ca", "pancreatic ca"),
    "Pancreatic pseudocyst": ("pancreas pseudocyst", "pseudocyst of the pancreas", "pseudocyst"),
    "Pleural thickening": (
        "thickening of the pleura", "thickened pleura", "pleural plaque", "pachypleuritis",
        "apical pleural thickening", "fibrothorax"),
    "Pulmonary hypertension": ("pulmonary arterial hypertension", "pulmonary artery hypertension"),
    "Pulmonary hypertrophy": ("lung hypertrophy",),
    "Renal atrophy": ("atrophic renal parenchyma", "renal parenchymal atrophy"),
    "Renal cyst": (
        "kidney cyst", "cortical cyst", "renal cortical cyst", "cyst in the kidney",
        "simple renal cyst", "cyst of the kidney", "exophytic renal cyst"),
    "Renal parapelvic cyst": (
        "parapelvic cyst", "parapelvic renal cyst", "peripelvic cyst", "renal sinus cyst"),
    "Sclerotic bone lesion": (
        "sclerotic lesion", "osteosclerotic lesion", "osteoblastic lesion", "blastic lesion",
        "sclerotic bone metastasis", "sclerotic focus", "bone island"),
    "Scoliosis": (
        "scoliotic curvature", "scoliotic deformity", "spinal scoliosis", "kyphoscoliosis",
        "thoracic scoliosis"),
    "Situs inversus": ("situs inversus totalis", "dextrocardia"),
    "Splenic effusion": ("perisplenic effusion", "perisplenic fluid", "perisplenic collection"),
    "Splenomegaly": (
        "enlarged spleen", "spleen enlargement", "increased spleen size",
        "enlargement of the spleen"),
    "Thyroid nodule": (
        "nodule in the thyroid", "nodule of the thyroid", "thyroid gland nodule",
        "nodular goiter", "multinodular goiter"),
    "Tracheal stenosis": (
        "stenosis of the trachea", "tracheal narrowing", "narrowing of the trachea"),
    "Tracheobronchopathy": (
        "tracheobronchopathia osteochondroplastica", "tracheopathia osteoplastica"),
    "Vertebral compression fracture": (
        "compression fracture", "vertebral collapse", "collapsed vertebra",
        "vertebral height loss", "vertebral compression", "compression fracture of the vertebra"),
    "Vertebral degeneration": (
        "degenerative vertebral change", "degenerative spine change", "degenerative spine",
        "degenerative disc disease", "degeneration of the vertebra",
        "vertebral degenerative change", "degenerative change of the spine"),
    "Viral pneumonia": ("viral infection of the lung", "viral lung infection"),
}

# British -> American, on any part of a word.
_AMERICAN = {
    "oesoph": "esoph", "oedema": "edema", "haem": "hem", "tumour": "tumor", "anaem": "anem",
    "gynaec": "gynec", "calibre": "caliber", "fibre": "fiber", "centre": "center",
    "goitre": "goiter", "ischaem": "ischem", "leukaem": "leukem", "isation": "ization",
    "grey": "gray", "sulph": "sulf", "faec": "fec", "colour": "color"}
_BRITISH = re.compile("|".join(_AMERICAN))
_WORD = re.compile(r"\d+(?:[.,]\d+)*|[^\W\d_]+|[^\w\s]|\d|_")
_JOINERS = re.compile(r"(?<=\w)[-\u2010-\u2015/](?=\w)")

_RANK = {name: rank for rank, name in enumerate(VOCABULARY)}


def sentence(name: str) -> str:
    """Returns the positive prompt and caption sentence of a finding, "There is X"."""
    return f"There is {name}"


def negative(name: str) -> str:
    """Returns the negative prompt of a finding, "There is no X"."""
    return f"There is no {name}"


def closure(names: Iterable[str]) -> tuple[str, ...]:
    """Adds the parents of narrower findings and sorts canonically.

    Args:
        names: canonical findings in any order, repeats allowed.

    Returns:
        Each finding once, in the order of `VOCABULARY`.

    Raises:
        ValueError: a name is not one of `VOCABULARY`.
    """
    found = set(names)
    unknown = sorted(found - _RANK.keys())
    if unknown:
        raise ValueError(f"unknown findings {unknown}; choose from {list(VOCABULARY)}")
    waiting = list(found)
    while waiting:
        parent = PARENTS.get(waiting.pop())
        if parent and parent not in found:
            found.add(parent)
            waiting.append(parent)
    return tuple(sorted(found, key=_RANK.__getitem__))


def fold(text: str) -> str:
    """Lower case, American spelling, a space for joining hyphens, one space between tokens.

    >>> fold("Peribronchial oedema, ground-glass (3.5mm)")
    'peribronchial edema , ground glass ( 3.5 mm )'
    """
    text = _JOINERS.sub(" ", text.lower())
    text = _BRITISH.sub(lambda found: _AMERICAN[found[0]], text)
    return " ".join(_WORD.findall(text))


def spellings(phrase: str) -> tuple[str, ...]:
    """Returns a folded phrase and its regular plurals: last word, or the noun before "of", "in"."""
    folded = fold(phrase)
    words = folded.split()
    head = next((at for at, word in enumerate(words) if word in ("of", "in")), len(words)) - 1
    forms = [folded]
    if head >= 0:
        forms += [" ".join([*words[:head], plural, *words[head + 1:]])
                  for plural in _plurals(words[head])]
    return tuple(dict.fromkeys(forms))


def _plurals(noun: str) -> Iterator[str]:
    if noun.endswith("is"):
        yield noun[:-2] + "es"
    elif noun.endswith(("s", "x", "ch")):
        yield noun + "es"
    elif noun.endswith("y") and noun[-2:-1] not in "aeiou":
        yield noun[:-1] + "ies"
    elif noun.endswith("um"):
        yield noun[:-2] + "a"
    elif noun.endswith("a"):
        yield noun + "e"
        yield noun + "s"
    else:
        yield noun + "s"


@functools.cache
def phrases() -> dict[str, str]:
    """Returns {folded spelling: canonical name} of every name and synonym.

    Raises:
        ValueError: one spelling belongs to two names.
    """
    found: dict[str, str] = {}
    for name in VOCABULARY:
        for phrase in (name, *SYNONYMS[name]):
            for spelling in spellings(phrase):
                if found.setdefault(spelling, name) != name:
                    raise ValueError(f"{spelling!r} means {found[spelling]} and {name}")
    return found


def canonical(phrase: str) -> str | None:
    """Returns the name that a phrase means, whatever its case, plural or spelling, or None."""
    return phrases().get(fold(phrase))
