"""What the build and the reports of a data set say: failures, warnings, captions, prevalence.

Functions return sections as `evals/quality_checks.py` describes. The text of no report is kept.
"""

import csv
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from brgsa_jax.data.shards import FAILURES_FILE
from brgsa_jax.evals.quality_checks import (
    INFO,
    LOOK,
    Problem,
    Section,
    histogram_by_split,
    many,
    named,
)
from brgsa_jax.evals.quality_scan import Measured

_FAILED_SHARE = 0.05  # Above it a build is looked at.
_NOT_A_CHEST = "may not be a chest"
_SIGNIFICANCE = 0.01
_RATIO, _DIFFERENCE = 1.5, 0.1  # Prevalences that differ by less are no concern.


def build(records: Sequence[Measured], folder: Path, dataset: Mapping[str, Any],
          noun: str) -> Section:
    """What the build refused, left out and warned of, grouped by reason."""
    warned = [(record, text) for record in records for text in record.warnings]
    strange = [(record, text) for record, text in warned if text.startswith(_NOT_A_CHEST)]
    rows = _read_failures(folder / FAILURES_FILE)
    failed, unlisted = dataset["failed"], dataset["unlisted"]
    content = {
        "failed": failed, "unlisted": unlisted, "listed": None if rows is None else len(rows),
        "failures": _by_reason((row["id"] or row["file"], row["reason"]) for row in rows or ()),
        "warnings": _by_reason((record.id, text) for record, text in warned),
        "not_a_chest": [named(record, reason=text) for record, text in strange]}
    problems = []
    if failed:
        often = failed > _FAILED_SHARE * (len(records) + failed)
        problems.append(Problem(
            LOOK if often else INFO, failed, f"{many(failed, noun)} refused by the build",
            "Read the reasons; the same one many times is usually a wrong option or a wrong file.",
            "build"))
    if rows is None or len(rows) != failed + unlisted:
        problems.append(Problem(
            LOOK, 1, f"{FAILURES_FILE} is not the one of this build",
            "Copy the whole folder again, so that what was left out stays known.", "build"))
    if unlisted:
        problems.append(Problem(
            INFO, unlisted, f"{many(unlisted, noun)} left out on purpose or for lack of a row",
            "Check that you meant to leave them out.", "build"))
    if strange:
        count = len({(record.split, record.position) for record, _ in strange})
        problems.append(Problem(
            LOOK, count, f"{many(count, noun)} may not show a chest",
            "Look at the pictures, and take the ids out of your table if they do not.", "build"))
    if count := len(warned) - len(strange):
        problems.append(Problem(INFO, count, many(count, "other warning") + " of the build",
                                "Read them once.", "build"))
    return Section(content, problems)


def _read_failures(file: Path) -> list[dict[str, str]] | None:
    try:
        with file.open(encoding="utf-8", newline="") as stream:
            return [{name: row.get(name) or "" for name in ("id", "file", "reason")}
                    for row in csv.DictReader(stream)]
    except (OSError, ValueError, csv.Error):
        return None


def _by_reason(pairs: Iterable[tuple[str, str]]) -> list[dict[str, Any]]:
    """Groups reasons that differ only in numbers and quoted names, the commonest first."""
    groups: dict[str, list[str]] = defaultdict(list)
    for name, reason in pairs:
        kind = re.sub(r"\d+(?:[.,]\d+)*", "#", re.sub(r"'[^']*'", "'…'", reason))
        groups[kind[:300]].append(name)
    ordered = sorted(groups.items(), key=lambda pair: -len(pair[1]))
    return [{"reason": reason, "count": len(names), "ids": names} for reason, names in ordered]


def captions(records: Sequence[Measured], findings: Sequence[str]) -> Section:
    """Lengths of reports, numbers of findings and their prevalence, by split."""
    by_split: dict[str, list[Measured]] = defaultdict(list)
    for record in records:
        by_split[record.split].append(record)
    prevalence = _prevalence(by_split, findings)
    content = {
        "labelled": bool(findings),
        "splits": {split: {
            "volumes": len(found), "empty": sum(not r.words for r in found),
            "without_findings": sum(not r.findings for r in found),
            "different": len({r.report for r in found if r.words}),
            "findings": np.bincount([len(r.findings) for r in found]).tolist()}
            for split, found in by_split.items()},
        "words": histogram_by_split({s: [r.words for r in f] for s, f in by_split.items()}),
        "prevalence": prevalence}
    problems = []
    if count := sum(not record.words for record in records):
        problems.append(Problem(
            LOOK, count, f"{many(count, 'report')} without a word",
            "They pair an image with nothing; check the column of the table.", "captions"))
    if count := sum(row["implausible"] for row in prevalence):
        problems.append(Problem(
            LOOK, count, f"{many(count, 'finding')} of different prevalence between splits",
            "More than chance explains; check that labels of all splits were made the same way.",
            "captions"))
    if findings and (count := sum(not any(row["patients"].values()) for row in prevalence)):
        problems.append(Problem(
            INFO, count, f"{many(count, 'finding')} without a positive patient",
            "No score can be computed for them on this set.", "captions"))
    if not findings:
        problems.append(Problem(INFO, 1, "The set has no labels",
                                "Training needs none; evaluation does.", "captions"))
    return Section(content, problems)


def _prevalence(by_split: Mapping[str, Sequence[Measured]], findings: Sequence[str]
                ) -> list[dict[str, Any]]:
    """Positive patients of each finding and split, compared by Fisher's exact test.

    Patients and not volumes, since volumes of one patient are no independent cases. Every split is
    compared with the largest.
    """
    from scipy.stats import fisher_exact

    patients = {split: {r.patient for r in found} for split, found in by_split.items()}
    positive = {split: defaultdict(set) for split in by_split}
    for split, found in by_split.items():
        for record in found:
            for name in record.findings:
                positive[split][name].add(record.patient)
    if not patients:
        return []
    largest = max(patients, key=lambda split: len(patients[split]))
    rows = []
    tests = len(findings) * (len(patients) - 1)
    for name in findings:
        counts = {split: len(positive[split][name]) for split in patients}
        odd = []
        for split in patients:
            a, n, b, m = counts[split], len(patients[split]), counts[largest], len(
                patients[largest])
            if split != largest and _apart(a, n, b, m):
                p = float(fisher_exact([[a, n - a], [b, m - b]]).pvalue) * tests
                odd += [split] if p < _SIGNIFICANCE else []
        rows.append({"name": name, "patients": counts, "implausible": odd != [], "odd": odd,
                     "shares": {split: counts[split] / len(patients[split])
                                for split in patients}})
    return rows


def _apart(a: int, n: int, b: int, m: int) -> bool:
    """Whether a of n and b of m differ enough to matter, if it is no chance."""
    first, second = (a + 0.5) / (n + 1), (b + 0.5) / (m + 1)
    return (max(first, second) / min(first, second) > _RATIO
            or abs(first - second) > _DIFFERENCE)
