"""Synthetic chest CT with findings, and the report that describes it.

A patient is planned first (anatomy, findings, lesions in millimetres, report) and then drawn on a
grid of any shape over a fixed cubic field of view of 384 mm: 256×256×128 voxels are the real
canonical (1.5, 1.5, 3.0) mm, 64×64×32 the small (6, 6, 12) mm. The plan does not know the shape, so
a (seed, patient) pair has the same findings, geometry and report at every resolution. Every random
stream is `numpy.random.default_rng([seed, patient, stream])`: anatomy, labels, each finding, report
and scanner noise have their own, so that one patient exists with and without a finding.

Labels: a finding counts when it is drawn. Uncertain phrases ("could not be excluded") are written
only about findings that are not drawn and are therefore negative, as are historical ones
("previously seen … has resolved").
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import nibabel
import numpy as np
from scipy.special import ndtri

from brgsa_jax.data import phantom_anatomy as anatomy
from brgsa_jax.data.phantom_findings import FINDINGS as _DRAWN
from brgsa_jax.data.phantom_findings import STAGES, Lesion, severity
from brgsa_jax.data.phantom_report import write_report
from brgsa_jax.summarize.vocabulary import CT_RATE_33, PARENTS, closure

FINDINGS: tuple[str, ...] = CT_RATE_33

# Share of scans. First 18: CT-RATE validation split, measured per scan. Last 15: chosen, since
# CT-RATE-LT publishes no table; all between 0.5 % and 6 %.
PREVALENCE: dict[str, float] = dict(zip(CT_RATE_33, (
    0.101, 0.278, 0.105, 0.070, 0.248, 0.139, 0.254, 0.195, 0.233, 0.450, 0.387, 0.273, 0.121,
    0.081, 0.112, 0.191, 0.108, 0.079,
    0.050, 0.012, 0.008, 0.010, 0.025, 0.030, 0.040, 0.030, 0.060, 0.030, 0.060, 0.008, 0.050,
    0.015, 0.006,
), strict=True))

# Loadings of the findings on shared causes (illness in general, age, infection, heart failure,
# airway disease): the correlations of a Gaussian copula, whose margins stay exactly PREVALENCE.
_CAUSES: dict[str, tuple[float, float, float, float, float]] = {
    "Medical material": (0.40, 0.30, 0.0, 0.25, 0.0),
    "Arterial wall calcification": (0.25, 0.75, 0.0, 0.1, 0.0),
    "Cardiomegaly": (0.30, 0.40, 0.0, 0.50, 0.0),
    "Pericardial effusion": (0.35, 0.1, 0.1, 0.50, 0.0),
    "Coronary artery wall calcification": (0.25, 0.75, 0.0, 0.15, 0.0),
    "Hiatal hernia": (0.25, 0.40, 0.0, 0.0, 0.0),
    "Lymphadenopathy": (0.55, 0.1, 0.3, 0.1, 0.0),
    "Emphysema": (0.35, 0.25, -0.1, 0.0, 0.45),
    "Atelectasis": (0.50, 0.2, 0.1, 0.30, 0.0),
    "Lung nodule": (0.50, 0.1, 0.0, 0.0, 0.1),
    "Lung opacity": (0.45, 0.0, 0.60, 0.1, 0.0),
    "Pulmonary fibrotic sequela": (0.45, 0.30, 0.0, 0.0, 0.1),
    "Pleural effusion": (0.50, 0.1, 0.2, 0.50, 0.0),
    "Mosaic attenuation pattern": (0.35, 0.0, 0.0, 0.1, 0.40),
    "Peribronchial thickening": (0.40, 0.0, 0.2, 0.1, 0.50),
    "Consolidation": (0.45, 0.0, 0.60, 0.1, 0.0),
    "Bronchiectasis": (0.40, 0.15, 0.0, 0.0, 0.45),
    "Interlobular septal thickening": (0.45, 0.1, 0.2, 0.45, 0.0),
    "Osteophyte": (0.2, 0.65, 0.0, 0.0, 0.0),
    "Spondylosis": (0.2, 0.65, 0.0, 0.0, 0.0),
    "Tuberculosis": (0.2, 0.0, 0.3, 0.0, 0.0),
    "Lung mass": (0.4, 0.2, 0.0, 0.0, 0.0),
}

# Streams of a patient's randomness; findings use _FINDING + their position in CT_RATE_33.
_ANATOMY, _LABELS, _REPORT, _NOISE, _NATIVE, _FINDING = 0, 1, 2, 3, 4, 16


class PhantomCase(NamedTuple):
    """One synthetic patient.

    Attributes:
        id: unique name within the seed.
        patient: patient name.
        volume: `[X, Y, Z]` int16 HU, canonical LPS order (x left, y posterior, z superior).
        spacing: voxel size along x, y, z in mm.
        report: free text.
        findings: canonical names that are present, CT-RATE-18 order, then CT-RATE-LT order.
        boxes: for each finding its places as half-open voxel boxes (x0, y0, z0, x1, y1, z1).
    """

    id: str
    patient: str
    volume: np.ndarray
    spacing: tuple[float, float, float]
    report: str
    findings: tuple[str, ...]
    boxes: dict[str, list[tuple[int, ...]]]


class Plan(NamedTuple):
    """Everything about a patient but the voxels."""

    seed: int
    patient: int
    findings: tuple[str, ...]
    body: anatomy.Body
    lesions: tuple[Lesion, ...]
    report: str


def sample_findings(seed: int, patient: int) -> tuple[str, ...]:
    """Samples a patient's findings; cheap (no anatomy).

    Margins are `PREVALENCE`. A narrower finding is drawn among the patients with its parent, so
    that the parent's margin is kept and the labels never contradict each other.

    Args:
        seed: data set seed.
        patient: patient number, non-negative.
    """
    rng = np.random.default_rng([seed, patient, _LABELS])
    causes = rng.standard_normal(5)
    own = rng.standard_normal(len(CT_RATE_33))
    uniform = rng.random(len(CT_RATE_33))
    found: set[str] = set()
    for number, name in enumerate(CT_RATE_33):
        if name in PARENTS:
            share = PREVALENCE[name] / PREVALENCE[PARENTS[name]]
            if PARENTS[name] in found and uniform[number] < share:
                found.add(name)
            continue
        loading = np.array(_CAUSES.get(name, (0.15, 0.0, 0.0, 0.0, 0.0)))
        latent = loading @ causes + np.sqrt(1.0 - loading @ loading) * own[number]
        if latent > ndtri(1.0 - PREVALENCE[name]):
            found.add(name)
    return closure(found)


def plan_case(seed: int, patient: int, findings: Iterable[str] | None = None) -> Plan:
    """Plans a patient without drawing.

    Args:
        seed: data set seed.
        patient: patient number, non-negative.
        findings: canonical names to give this patient instead of sampled ones; parents of
            narrower findings are added. The anatomy and each finding's own geometry stay those of
            (seed, patient).

    Raises:
        ValueError: an unknown finding name.
    """
    names = sample_findings(seed, patient) if findings is None else closure(findings)
    streams = {name: np.random.default_rng([seed, patient, _FINDING + CT_RATE_33.index(name)])
               for name in names}
    degree = {name: severity(streams[name]) for name in names}
    raised: dict[str, float] = {"right": 0.0, "left": 0.0}
    if "Emphysema" in names:
        raised = {side: height - 14.0 * degree["Emphysema"] for side, height in raised.items()}
    if "Pulmonary fibrosis" in names:
        raised = {side: height + 14.0 * degree["Pulmonary fibrosis"]
                  for side, height in raised.items()}
    if "Atelectasis" in names:
        raised = {side: height + 6.0 * degree["Atelectasis"] for side, height in raised.items()}
    heart = 1.0
    if "Cardiomegaly" in names:
        heart = 1.16 + 0.26 * degree["Cardiomegaly"]
    aged = degree.get("Atherosclerosis", 0.0) if "Atherosclerosis" in names else 0.0
    body = anatomy.make_body(np.random.default_rng([seed, patient, _ANATOMY]), heart=heart,
                             raised=raised, aorta=1.0 + 0.22 * aged, tortuous=10.0 * aged)
    lesions = tuple(lesion for name in names
                    for lesion in _DRAWN[name].plan(streams[name], body, degree[name]))
    report = write_report(np.random.default_rng([seed, patient, _REPORT]), body, names, lesions)
    return Plan(seed, patient, names, body, lesions, report)


def draw_case(plan: Plan, shape: tuple[int, int, int] = (64, 64, 32)) -> PhantomCase:
    """Draws a plan on a grid of `shape` voxels over the 384 mm field of view."""
    shape = tuple(int(n) for n in shape)
    if len(shape) != 3 or min(shape) < 8:
        raise ValueError(f"shape must be three sizes of at least 8 voxels, got {shape}")
    canvas = anatomy.Canvas(shape, plan.body)
    boxes: dict[str, list[tuple[int, ...]]] = {name: [] for name in plan.findings}
    stages: dict[str, list[Lesion]] = {stage: [] for stage in STAGES}
    for lesion in plan.lesions:
        stages[_DRAWN[lesion.finding].stage].append(lesion)

    def draw(stage: str) -> None:
        for lesion in stages[stage]:
            canvas.begin()
            _DRAWN[lesion.finding].draw(canvas, lesion)
            box = canvas.finish()
            if box is not None:
                boxes[lesion.finding].append(box)

    anatomy.draw_trunk(canvas)
    anatomy.draw_bones(canvas)
    draw("bone")
    anatomy.draw_mediastinum(canvas)
    draw("diffuse")
    anatomy.draw_fissures(canvas)
    anatomy.draw_vessels(canvas)
    draw("airspace")
    anatomy.draw_airways(canvas)
    for stage in ("airway", "focal", "mediastinum", "pleura", "device"):
        draw(stage)
    volume = anatomy.draw_outside(
        canvas, np.random.default_rng([plan.seed, plan.patient, _NOISE, *shape]))
    name = f"phantom_{plan.seed}_{plan.patient:06d}"
    return PhantomCase(id=name, patient=name, volume=volume,
                       spacing=tuple(anatomy.FIELD / n for n in shape), report=plan.report,
                       findings=plan.findings, boxes=boxes)


def generate(seed: int, patient: int, shape: tuple[int, int, int] = (64, 64, 32)) -> PhantomCase:
    """Makes one synthetic patient, a pure function of its arguments.

    Args:
        seed: data set seed, non-negative.
        patient: patient number, non-negative.
        shape: voxels along x, y, z over a fixed field of view of 384 mm.

    Returns:
        The case; volume int16 HU `[X, Y, Z]` in canonical LPS order. Air outside the body, outside
        the reconstructed circle and beyond the scanned range is exactly -1000.

    Raises:
        ValueError: a negative number, or a shape that is not three sizes of at least 8.
    """
    return draw_case(plan_case(seed, patient), shape)


def native_image(case: PhantomCase, seed: int) -> nibabel.Nifti1Image:
    """The same patient as a scanner and a converter might have written it.

    Random axis order and flips with the correct affine and a random origin; sometimes the stored
    numbers need a slope and intercept; outside the reconstructed circle a vendor's padding value
    (-1024, -2048 or -3024) instead of air.

    Args:
        case: any case.
        seed: chooses the disguise.

    Returns:
        A NIfTI image whose scaled data are HU (`get_fdata`), affine in nibabel's RAS+ world.
    """
    rng = np.random.default_rng([seed, _NATIVE])
    shape, spacing = case.volume.shape, np.array(case.spacing)
    hu = case.volume.astype(np.float32)
    x, y = (((np.arange(n) + 0.5) / n - 0.5) * 2.0 for n in shape[:2])
    hu[x[:, None] ** 2 + y[None, :] ** 2 > 1.0] = float(rng.choice([-1024.0, -2048.0, -3024.0]))
    affine = np.diag([-spacing[0], -spacing[1], spacing[2], 1.0])
    affine[:3, 3] = rng.normal(0, 120.0, 3).round(1)
    order = rng.permutation(3)
    image = hu.transpose(order)
    turned = np.zeros((4, 4))
    turned[3, 3] = 1.0
    turned[:3, 3] = affine[:3, 3]
    for new, old in enumerate(order):
        column = affine[:3, old].copy()
        if rng.random() < 0.5:
            turned[:3, 3] += column * (image.shape[new] - 1)
            column = -column
            image = np.flip(image, new)
        turned[:3, new] = column
    slope, intercept = [(1.0, 0.0), (1.0, -1024.0), (1.0, -8192.0), (0.5, -1024.0)][
        int(rng.choice(4, p=[0.4, 0.3, 0.2, 0.1]))]
    stored = np.ascontiguousarray(np.rint((image - intercept) / slope).astype(np.int16))
    result = nibabel.Nifti1Image(stored, turned)
    result.header.set_xyzt_units("mm", "sec")
    result.header.set_slope_inter(slope, intercept)
    return result
