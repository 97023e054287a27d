"""Splits for classifiers: labels beside every record, and parts of a split by whole patients."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from brgsa_jax.config import PREVALENCE, UserError, classifies
from brgsa_jax.data.records import Failure
from brgsa_jax.data.sources import IndexRow, Selection, chain_digests
from brgsa_jax.data.summaries import open_captioned
from brgsa_jax.data.tables import read_table
from brgsa_jax.registry import miss

# Neither 1, present, nor 0, absent: uncertain, or not given.
UNKNOWN = -1
_LABELS = {**dict.fromkeys(("1", "1.0", "true"), 1), **dict.fromkeys(("0", "0.0", "false"), 0),
           **dict.fromkeys(("-1", "-1.0", "", "nan", "none", "null"), UNKNOWN)}


class Part(Selection):
    """Some records of a split, and what is known of each.

    Attributes:
        index: `sources.IndexRow` of each record.
        labels: int8 [N, P], 1 present, 0 absent, -1 unknown; None for records without labels.
        recipe: what a run's configuration gets from the labels, by its keys.
        left_out: what is left out because something is missing, and what; `lacking` names it.
    """

    lacking = "summary or label"

    def __init__(self, source: Any, positions: Sequence[int], labels: np.ndarray | None = None,
                 recipe: Mapping[str, Any] | None = None, left_out: Sequence[Failure] = ()):
        """Takes records of a split.

        Args:
            source: a split; see `sources.Source`.
            positions: which of its records; one may come several times.
            labels: of each of them.
            recipe: see the class.
            left_out: see the class.
        """
        super().__init__(source, positions)
        self.index: tuple[IndexRow, ...] = tuple(source.index[p] for p in self._positions)
        self.labels, self.recipe, self.left_out = labels, recipe or {}, list(left_out)

    def __getitem__(self, position: int) -> dict[str, Any]:
        record = super().__getitem__(position)
        return record if self.labels is None else {**record, "labels": self.labels[position]}

    @property
    def fingerprint(self) -> str:
        """Hexadecimal SHA-256 of the split's fingerprint, these records and their labels."""
        labels = b"" if self.labels is None else self.labels.tobytes()
        ids = "\n".join(row.id for row in self.index).encode()
        return chain_digests("part", [self._source.fingerprint, *(
            hashlib.sha256(x).hexdigest() for x in (ids, labels))])


def patients_in_order(patients: Iterable[str], seed: int) -> list[str]:
    """Every patient once, in an order that depends on nothing but the seed and the ids."""
    return sorted(set(patients), key=lambda patient: (
        hashlib.sha256(f"{seed}/{patient}".encode()).digest(), patient))


def open_labelled(config: Any, split: str) -> Any:
    """Opens a split for a configuration: its captions, and for a classifier its labels.

    Of the split "train" only a share `data.label_fraction` of the patients is taken, drawn by the
    seed so that a smaller share is part of a larger one, and no volume without a known label.

    Args:
        config: whole configuration.
        split: "train" or "valid".

    Raises:
        UserError: no such split, unusable summaries or labels, or no finding of a class's name.
    """
    source = open_captioned(config.data, split)
    if not classifies(config):
        return source
    classes = tuple(config.model.classes) or tuple(source.metadata["findings"])
    if not classes:
        raise UserError(f"{source.path} names no finding to classify; build the data set with a "
                        "column of findings, or name model.classes and data.labels")
    if config.data.labels:
        labels = _table_labels(config.data.labels, source, classes)
    else:
        _check_names(source, classes, split)
        labels = np.array([[name in row.findings for name in classes] for row in source.index],
                          np.int8)
    if split != "train":
        return Part(source, range(len(source)), labels)
    return _training_part(source, labels, classes, config)


def _training_part(source: Any, labels: np.ndarray, classes: tuple[str, ...],
                   config: Any) -> Part:
    """The patients whose labels are used, and what the configuration gets from them."""
    order = patients_in_order((row.patient for row in source.index), config.seed)
    chosen = {*order[:max(round(config.data.label_fraction * len(order)), 1)]}
    mine = [p for p, row in enumerate(source.index) if row.patient in chosen]
    known = [p for p in mine if (labels[p] != UNKNOWN).any()]
    if not known:
        raise UserError(f"no volume of the {len(chosen)} patients that data.label_fraction="
                        f"{config.data.label_fraction} leaves has a label; raise it, or give "
                        "another table in data.labels")
    left_out = [Failure(source.index[p].id, "", "no label is known")
                for p in mine if p not in {*known}]
    labels = labels[known]
    recipe: dict[str, Any] = {"model.classes": classes}
    if tuple(config.losses.classification.positive_weights) == (PREVALENCE,):
        recipe["losses.classification.positive_weights"] = positive_weights(labels)
    return Part(source, known, labels, recipe, [*getattr(source, "left_out", ()), *left_out])


def positive_weights(labels: np.ndarray) -> tuple[float, ...]:
    """Negatives over positives of every column of labels [N, P]; 1 where one of them is missing."""
    positive, negative = (labels == 1).sum(0), (labels == 0).sum(0)
    return tuple(float(n / p) if n and p else 1.0
                 for n, p in zip(negative, positive, strict=True))


def _check_names(source: Any, classes: Sequence[str], split: str) -> None:
    """Refuses a class that is no finding of the data set; its volumes would all be negative."""
    names = {*source.metadata["findings"], *(n for row in source.index for n in row.findings)}
    for name in classes if split == "train" else ():
        if name not in names:
            raise UserError(f"model.classes of {source.path}: {miss('finding', name, names)}; "
                            "name findings of the data set, or a table in data.labels")


def _table_labels(table: str, source: Any, classes: Sequence[str]) -> np.ndarray:
    """Labels [N, P] of a table, by id; unknown for volumes it does not name.

    Raises:
        UserError: the table cannot be read, lacks a class, holds something else than labels,
            gives one id two rows, or names no volume of the split.
    """
    found: dict[str, list[int]] = {}
    for number, row in enumerate(read_table(table, ["id", *classes]), 1):
        values = [_LABELS.get(row[name].strip().lower()) for name in classes]
        if None in values:
            name = classes[values.index(None)]
            raise UserError(f"row {number} of {table} has {row[name]!r} as {name}; write 1, 0, or "
                            "-1 or nothing where it is not known")
        if found.setdefault(row["id"], values) != values:
            raise UserError(f"row {number} of {table} gives {row['id']!r} other labels than a row "
                            "before it; keep one")
    labels = np.full((len(source), len(classes)), UNKNOWN, np.int8)
    for position, row in enumerate(source.index):
        if row.id in found:
            labels[position] = found[row.id]
    if not any(row.id in found for row in source.index):
        raise UserError(f"{table} has labels of none of the {len(source)} volumes of {source.path};"
                        f" their ids are like {source.index[0].id!r}, those of the table like "
                        f"{next(iter(found))!r}")
    return labels
