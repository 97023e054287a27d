"""The lexicon backend against labelled reports: `python -m benchmarks.summaries --reports CSV`.

The CSV holds a report a row (column report_text) and the 18 labels of CT-RATE as 0 or 1. Rules were
written while looking at the first 500 rows; the other rows were not looked at. Only numbers are
kept.
"""

import argparse
import csv
import hashlib
import os
import time
from pathlib import Path

import numpy as np

from benchmarks.record import fill, save, table
from brgsa_jax.summarize import lexicon, vocabulary
from brgsa_jax.summarize.vocabulary import CT_RATE_18

SEEN = 500
PASSES = 3
# What was seen among the errors of the first 500 reports, in our words.
ERRORS = {
    "Medical material": "labelled absent although a catheter, port or stent is described; material "
                        "that is named by a rare word is missed",
    "Arterial wall calcification": "plaque of the abdominal aorta alone, or a bare "
                                   "\"atherosclerosis\", labelled absent",
    "Cardiomegaly": "a single wide chamber; labelled absent although stated",
    "Pericardial effusion": "labelled absent although a minimal effusion is stated",
    "Coronary artery wall calcification": "labelled absent although stated",
    "Hiatal hernia": "labelled absent although stated",
    "Lymphadenopathy": "every visible node counts, as in the labels, which are not of one mind "
                       "about small ones; nodes in the lung",
    "Emphysema": "labelled absent although stated; air in soft tissue labelled present",
    "Atelectasis": "one of several readings of the same density",
    "Lung nodule": "nodular lesions of the pleura; an organ named only in the sentence before",
    "Lung opacity": "\"density increase\" means opacity or not; pneumonia without an opacity "
                    "described; nodules of ground glass",
    "Pulmonary fibrotic sequela": "sequelae as one of several readings; honeycombing, which is "
                                  "filed here by its parent",
    "Pleural effusion": "labelled absent although stated",
    "Mosaic attenuation pattern": "labelled absent although stated",
    "Peribronchial thickening": "thick bronchial walls, filed here by their parent; peribronchial "
                                "density without thickening",
    "Consolidation": "millimetric or ground-glass consolidation labelled absent",
    "Bronchiectasis": "widening beside a consolidation",
    "Interlobular septal thickening": "septa said not to be interlobular; gone since the last scan",
}


def main() -> None:
    """Scores both parts, measures the speed, writes the result file and the page's table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--reports", type=Path, required=True)
    options = parser.parse_args()
    with options.reports.open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    reports = [row["report_text"] for row in rows]
    truth = np.array([[row[name] == "1" for name in CT_RATE_18] for row in rows])
    answers, speed = read(reports)
    found = np.array([[name in answer for name in CT_RATE_18] for answer in answers])
    parts = {"first": score(found[:SEEN], truth[:SEEN]), "rest": score(found[SEEN:], truth[SEEN:])}
    result = {
        "backend": lexicon.Lexicon.name, "rules_sha256": rules(),
        "reports": {"first": SEEN, "rest": len(rows) - SEEN,
                    "texts_of_the_rest_also_among_the_first":
                        len(set(reports[:SEEN]) & set(reports[SEEN:]))},
        **parts, "speed": speed}
    save("summaries", "python -m benchmarks.summaries --reports CSV", result)
    fill("docs/summaries.md", "summaries", page(result))


def rules() -> str:
    """Fingerprint of what the findings depend on."""
    digest = hashlib.sha256()
    for module in (lexicon, vocabulary):
        digest.update(Path(module.__file__).read_bytes())
    return digest.hexdigest()


def read(reports: list[str]) -> tuple[list[tuple[str, ...]], dict]:
    """Findings of every report, and the speed of the passes, each with an empty memory."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    startups, rates, cpu_rates = [], [], []
    for _ in range(PASSES):
        start = time.perf_counter()
        backend = lexicon.Lexicon()
        startups.append(time.perf_counter() - start)
        begin, cpu = time.perf_counter(), time.process_time()
        answers = [answer if isinstance(answer, tuple) else ()
                   for _, answer in backend.summarize(reports)]
        rates.append(len(reports) / (time.perf_counter() - begin))
        cpu_rates.append(len(reports) / (time.process_time() - cpu))
    os.sched_setaffinity(0, cores)
    # The first start imports spaCy; the later ones do not.
    return answers, {"cores": 1, "reports_per_second": rates, "reports_per_cpu_second": cpu_rates,
                     "startup_seconds": startups[0]}


def score(found: np.ndarray, truth: np.ndarray) -> dict:
    """Precision, recall, F1 and support per finding from bool [N, 18], and the macro F1."""
    hit = (found & truth).sum(0)
    f1 = 2 * hit / np.maximum(found.sum(0) + truth.sum(0), 1)
    columns = {"precision": hit / np.maximum(found.sum(0), 1),
               "recall": hit / np.maximum(truth.sum(0), 1), "f1": f1}
    return {"macro_f1": float(f1.mean()),
            "findings": {name: {**{key: float(value[i]) for key, value in columns.items()},
                                "support": int(truth[:, i].sum())}
                         for i, name in enumerate(CT_RATE_18)}}


def page(result: dict) -> list[str]:
    """The table of the page."""
    first, rest = result["first"], result["rest"]

    def cells(part: dict) -> list[str]:
        return [f"{part[key]:.3f}" for key in ("precision", "recall", "f1")] + [
            str(part["support"])]

    rows = [[name, *cells(first["findings"][name]), *cells(rest["findings"][name]), ERRORS[name]]
            for name in CT_RATE_18]
    rows.append(["**macro F1**", "", "", f"**{first['macro_f1']:.3f}**", "", "", "",
                 f"**{rest['macro_f1']:.3f}**", "", ""])
    speed, counts = result["speed"], result["reports"]
    return table(["Finding", "first P", "R", "F1", "n", "rest P", "R", "F1", "n",
                  "commonest errors (first part)"], rows) + [
        "", f"First {counts['first']} and remaining {counts['rest']} reports, "
        f"{counts['texts_of_the_rest_also_among_the_first']} texts of which occur in both parts. "
        f"{span(speed['reports_per_second'])} reports/s on one core in {PASSES} passes "
        f"({span(speed['reports_per_cpu_second'])} per CPU-second), after a start of "
        f"{speed['startup_seconds']:.1f} s; rules {result['backend']}, SHA-256 "
        f"`{result['rules_sha256'][:12]}`."]


def span(values: list[float]) -> str:
    return f"{min(values):.0f} to {max(values):.0f}"


if __name__ == "__main__":
    main()
