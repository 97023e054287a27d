"""Score files of any system, judged against a label file and joined by id."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from brgsa_jax.config import UserError
from brgsa_jax.evals.evaluate import Evaluation, judge
from brgsa_jax.evals.protocol import GIVEN, Protocol
from brgsa_jax.evals.scans import chosen_rows, excluded_ids
from brgsa_jax.evals.scores import (
    LabelTable,
    ScoreTable,
    columns,
    join,
    read_labels,
    read_scores,
)

Table = TypeVar("Table", ScoreTable, LabelTable)


def evaluate_files(files: Sequence[str | Path], labels: str | Path, *,
                   patients: str | None = None, protocol: Protocol | None = None,
                   changes: Mapping[str, Any] | None = None, allow_missing: bool = False,
                   calibrated: bool = False) -> list[Evaluation]:
    """Judges score files on the same ids, so that `evaluate.compare` can pair them.

    A finding that the protocol combines is read from its own column, or as the largest of its
    parts where the first file has those.

    Args:
        files: CSVs, first column the id, the others scores.
        labels: CSV, first column the id; the columns named like the scores hold 0 or 1.
        patients: column of `labels` that names the patient; None takes every id for its own.
        protocol: whose findings are judged; None takes every column of the first file and
            thresholds fitted on held-out patients.
        changes: fields of the protocol to take otherwise, e.g. {"resamples": 5000}.
        allow_missing: judges the ids that all files have; metrics.json counts the rows of each
            file that were left out under "left_out".
        calibrated: adds "calibration" to the metrics.json of the first file.

    Returns:
        One evaluation a file, with "given" as its only score mode.

    Raises:
        UserError: unreadable tables, ids or columns that do not match.
    """
    tables = [read_scores(file) for file in files]
    if protocol is None:
        protocol = Protocol("score-file", tables[0].names, score=GIVEN,
                            threshold="heldout-patients")
    protocol = dataclasses.replace(protocol, score=GIVEN, **changes or {})
    parts = [(name,) if name in tables[0].names else protocol.combine.get(name, (name,))
             for name in protocol.findings]
    used = list(dict.fromkeys(name for names in parts for name in names))
    if patients in used:
        raise UserError(f"the column {patients!r} is judged as a finding and cannot also name the "
                        "patients; give the column that does, or leave the patients out")
    truth = read_labels(labels, used, patients)

    excluded_ids(protocol, {*truth.ids, *(key for table in tables for key in table.ids)})

    def chosen(ids: Sequence[str]) -> set[str]:
        return {ids[row] for row in chosen_rows(protocol, ids)}

    common = chosen(sorted(set(truth.ids).intersection(*(table.ids for table in tables))))
    if allow_missing and not common:
        raise UserError(f"no id of {files[0]} is in {labels}; their first columns must name the "
                        "same volumes")
    found = []
    for file, table in zip(files, tables, strict=True):
        kept, known = (keep(part, common if allow_missing else chosen(part.ids))
                       for part in (table, truth))
        try:
            joined = join(kept, known)
            values = columns(kept, used)
        except UserError as error:
            raise UserError(f"{file}: {error}") from error
        scores, present = (
            np.stack([part[:, [used.index(name) for name in names]].max(axis=1)
                      for names in parts], axis=1) for part in (values, joined.values))
        evaluation = judge(protocol, GIVEN, kept.ids, joined.patients or kept.ids, present,
                           {GIVEN: scores}, {}, {}, calibrated=calibrated and not found)
        evaluation.metrics["left_out"] = {"scores": len(table.ids) - len(kept.ids),
                                          "labels": len(truth.ids) - len(kept.ids)}
        found.append(evaluation)
    return found


def keep(table: Table, ids: set[str]) -> Table:
    """The rows of a table whose ids are named, in the table's order."""
    index = [row for row, key in enumerate(table.ids) if key in ids]
    found = table._replace(ids=tuple(table.ids[row] for row in index), values=table.values[index])
    if isinstance(table, LabelTable) and table.patients is not None:
        return found._replace(patients=tuple(table.patients[row] for row in index))
    return found
