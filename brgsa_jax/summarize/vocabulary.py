"""Canonical findings: the two label lists, their prompts, and which name implies which.

Names and order are those of the released label files (CT-RATE multi-abnormality labels and the
CT-RATE-LT prompts); they are data, so they are repeated here letter by letter.
"""

from __future__ import annotations

from collections.abc import Iterable

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

# A narrower or synonymous finding -> the CT-RATE-18 name that is then true as well.
#   Pneumonia: airspace or ground-glass opacity is how it is seen; Consolidation is not implied,
#     because a viral pneumonia is often ground glass alone.
#   Empyema: an infected pleural effusion.
#   Pulmonary fibrosis, Bronchial thickening: what CT-RATE files under its sequela and
#     peribronchial names.
#   Atherosclerosis: on a chest CT it is read from calcified plaque of the arterial wall.
# Deliberately without a parent: Lung mass (Fleischner: a nodule is at most 30 mm, a mass is
#   larger, so neither is the other); Lung cyst (not emphysema); Tuberculosis (cavity, nodules or
#   sequela: none is certain); pleural and pericardial calcification (not arteries); the rest.
PARENTS: dict[str, str] = {
    "Pneumonia": "Lung opacity",
    "Empyema": "Pleural effusion",
    "Pulmonary fibrosis": "Pulmonary fibrotic sequela",
    "Bronchial thickening": "Peribronchial thickening",
    "Atherosclerosis": "Arterial wall calcification",
}

_RANK = {name: rank for rank, name in enumerate(CT_RATE_33)}


def sentence(name: str) -> str:
    """Returns the positive prompt and caption sentence of a finding, "There is X"."""
    return f"There is {name}"


def negative(name: str) -> str:
    """Returns the negative prompt of a finding, "There is no X"."""
    return f"There is no {name}"


def closure(names: Iterable[str]) -> tuple[str, ...]:
    """Adds the CT-RATE-18 parents of narrower findings and sorts canonically.

    Args:
        names: canonical findings in any order, repeats allowed.

    Returns:
        Each finding once, CT-RATE-18 order first, then CT-RATE-LT prompt order.

    Raises:
        ValueError: a name is not one of `CT_RATE_33`.
    """
    found = set(names)
    unknown = sorted(found - _RANK.keys())
    if unknown:
        raise ValueError(f"unknown findings {unknown}; choose from {list(CT_RATE_33)}")
    found |= {PARENTS[name] for name in found if name in PARENTS}
    return tuple(sorted(found, key=_RANK.__getitem__))
