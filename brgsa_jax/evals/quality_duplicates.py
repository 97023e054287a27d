"""What is in a data set more than once: volumes, nearly the same volumes, reports, ids, patients.

Functions return sections as `evals/quality_checks.py` describes.
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from brgsa_jax.data.sources import Source
from brgsa_jax.evals.quality_checks import (
    ERROR,
    INFO,
    LOOK,
    Problem,
    Section,
    is_empty,
    many,
    named,
)
from brgsa_jax.evals.quality_scan import Damaged, Measured, Scale

ALIKE = 0.99  # Correlation of thumbnails from which two volumes count as nearly the same.
_NEIGHBOURS = 5
_LONG_REPORT = 30  # Words; a shorter report, or one without findings, repeats legitimately.
_FIX_SPLITS = ("Build again with --patient-column, so that a patient's volumes stay in one split; "
               "scores on these splits are too good.")


def leakage(opened: Mapping[str, Source]) -> Section:
    """Patients in several splits, and ids that are there more than once."""
    splits: dict[str, dict[str, int]] = defaultdict(dict)
    ids: Counter[str] = Counter()
    for split, source in opened.items():
        for row in source.index:
            splits[row.patient][split] = splits[row.patient].get(split, 0) + 1
            ids[row.id] += 1
    crossing = [{"patient": patient, "splits": places} for patient, places in splits.items()
                if len(places) > 1]
    repeated = [{"id": id_, "count": count} for id_, count in ids.items() if count > 1]
    problems = []
    if count := len(crossing):
        problems.append(Problem(
            ERROR, count, f"{many(count, 'patient lies', 'patients lie')} in several splits",
            _FIX_SPLITS, "leakage"))
    if count := len(repeated):
        problems.append(Problem(
            ERROR, count, f"{many(count, 'id is', 'ids are')} there more than once",
            "Scores are joined by id; make the ids of your table unique and rebuild.", "leakage"))
    return Section({"patients": crossing, "ids": repeated, "count": len(splits)}, problems)


def duplicates(opened: Mapping[str, Source], records: Sequence[Measured],
               scale: Scale) -> Section:
    """Groups of identical volumes, of nearly identical ones, and of identical reports."""
    identical = _identical(opened, records)
    same = {id(record): number for number, group in enumerate(identical) for record in group}
    near = [group for group in _near([r for r in records if not is_empty(r, scale)])
            if len({same.get(id(record), id(record)) for record in group}) > 1]
    reports = _groups([record for record in records if record.report],
                      [record.report for record in records if record.report])
    content = {name: [_as_json(group) for group in groups] for name, groups in
               (("identical", identical), ("near", near), ("reports", reports))}
    for entry, group in zip(content["reports"], reports, strict=True):
        entry["words"] = group[0].words
        entry["telling"] = group[0].words >= _LONG_REPORT and any(r.findings for r in group)
    return Section(content, [*_image_problems(content, scale.noun),
                             *_report_problems(content, records, scale.noun)])


def _groups(records: Sequence[Measured], keys: Sequence[Any]) -> list[list[Measured]]:
    """Groups of two and more records of one key, the largest first."""
    groups: dict[Any, list[Measured]] = defaultdict(list)
    for record, key in zip(records, keys, strict=True):
        groups[key].append(record)
    return sorted((group for group in groups.values() if len(group) > 1), key=len, reverse=True)


def _identical(opened: Mapping[str, Source], records: Sequence[Measured]) -> list[list[Measured]]:
    """Groups by the sampled voxels, then compares whole volumes, which few need."""
    alike = [record for group in _groups(records, [r.voxels for r in records]) for record in group]
    return _groups(alike, [hashlib.sha256(np.ascontiguousarray(
        opened[r.split].item(r.position)["volume"])).digest() for r in alike])


def _near(records: Sequence[Measured]) -> list[list[Measured]]:
    """Groups of volumes whose thumbnails, less the mean thumbnail of the set, correlate.

    All chests resemble each other; without the mean, what is left is what makes a volume its own.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components
    from sklearn.neighbors import NearestNeighbors

    if len(records) < 3:
        return []
    vectors = np.stack([record.thumbnail for record in records]).astype(np.float32)
    vectors -= vectors.mean(axis=0)
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    vectors = np.divide(vectors, lengths, out=vectors, where=lengths > 1e-6)
    # Of unit vectors, |a - b|² = 2 (1 - correlation); brute force works in blocks, not on N² pairs.
    distances, neighbours = NearestNeighbors(
        n_neighbors=min(_NEIGHBOURS, len(records) - 1), algorithm="brute").fit(vectors).kneighbors()
    rows, columns = np.nonzero((distances < (2 * (1 - ALIKE)) ** 0.5) & (lengths > 1e-6))
    pairs = coo_array((np.ones(rows.size), (rows, neighbours[rows, columns])),
                      shape=(len(records),) * 2)
    return _groups(records, connected_components(pairs, directed=False)[1].tolist())


def _as_json(group: Sequence[Measured]) -> dict[str, Any]:
    return {"members": [named(record, patient=record.patient) for record in group],
            "splits": list(dict.fromkeys(record.split for record in group)),
            "patients": len({record.patient for record in group})}


def _image_problems(content: Mapping[str, Any], noun: str) -> list[Problem]:
    crossing = [g for g in content["identical"] if len(g["splits"]) > 1]
    inside = [g for g in content["identical"] if len(g["splits"]) == 1]
    strangers = [g for g in content["near"] if g["patients"] > 1]
    leaking = [g for g in strangers if len(g["splits"]) > 1]
    twins = [g for g in content["near"] if g["patients"] == 1]
    told = [
        (ERROR, crossing, f"identical {noun}s", "in several splits",
         "The model is tested on what it learned; keep one copy and rebuild."),
        (LOOK, inside, f"identical {noun}s", "under different ids within a split",
         f"Keep one copy of each; the same {noun} with two reports teaches nothing."),
        (LOOK, leaking, f"nearly identical {noun}s", "of different patients in several splits",
         "Look at the pictures; if they show one patient, mend the patient column and rebuild."),
        (LOOK, [g for g in strangers if len(g["splits"]) == 1], f"nearly identical {noun}s",
         "of different patients within a split",
         "Look at the pictures; if they show one patient, mend the patient column and rebuild."),
        (INFO, twins, f"nearly identical {noun}s", "of one patient",
         "Usually reconstructions of one scan; keep one, or let the objective know twins."),
    ]
    return [Problem(severity, len(groups), f"{many(len(groups), 'group')} of {what} {where}",
                    advice, "duplicates")
            for severity, groups, what, where, advice in told if groups]


def _report_problems(content: Mapping[str, Any], records: Sequence[Measured],
                     noun: str) -> list[Problem]:
    telling = [g for g in content["reports"] if g["telling"] and g["patients"] > 1
               and len(g["splits"]) > 1]
    problems = []
    if count := len(telling):
        problems.append(Problem(
            LOOK, count, f"{many(count, 'long report')} of different patients in several splits",
            "A report that tells much seldom fits two patients; look whether rows were joined "
            "wrongly or a patient has two names.", "duplicates"))
    if count := sum(len(g["members"]) for g in content["reports"]):
        problems.append(Problem(
            INFO, count, f"{many(count, noun)} whose report others have too "
            f"({count / len(records):.0%})",
            "Usual for several images of one study and for normal findings; they are no negatives "
            "of each other.", "duplicates"))
    return problems


def damage(damaged: Sequence[Damaged], verified: bool) -> Section:
    """Records that are not what was built."""
    content = {"verified": verified,
               "damaged": [{"id": d.id, "split": d.split, "position": d.position,
                            "reason": d.reason} for d in damaged]}
    problems = []
    if count := len(damaged):
        problems.append(Problem(
            ERROR, count, f"{many(count, 'record is', 'records are')} not what was built",
            "Copy the folder again, or delete it and build it anew.", "records"))
    if not verified:
        problems.append(Problem(INFO, 1, "Digests were not compared",
                                "Check again with verification before you rely on a copy.",
                                "records"))
    return Section(content, problems)
