"""A split whose findings come from a table of summaries, joined by id."""

import hashlib
import json
from pathlib import Path
from typing import Any

from brgsa_jax.config import UserError
from brgsa_jax.data.records import Failure
from brgsa_jax.data.sources import IndexRow, Selection, Source, chain_digests, open_source
from brgsa_jax.data.tables import read_table

FAILED = "failed"


def read_summaries(table: str | Path) -> tuple[dict[str, tuple[str, ...]], dict[str, str]]:
    """Reads what `brgsa summarize` wrote, or any table with the columns id and findings.

    Args:
        table: JSON lines, CSV, TSV or Parquet. Outside JSON lines, findings are separated by ";".
            Rows whose column `status` begins with "failed" have no summary.

    Returns:
        {id: findings}, an empty tuple for a normal report, and {id: reason} of what failed.

    Raises:
        UserError: the table cannot be read, or gives one id two different summaries.
    """
    found: dict[str, tuple[str, ...]] = {}
    failed: dict[str, str] = {}
    for number, row in enumerate(read_table(table, ["id", "findings"], wished=["status"]), 1):
        names = tuple(dict.fromkeys(filter(None, map(str.strip, row["findings"].split(";")))))
        if not row["id"]:
            raise UserError(f"row {number} of {table} has no id; fill it in")
        if row.get("status", "").startswith(FAILED):
            failed[row["id"]] = f"its summary {row['status']}"
        elif found.setdefault(row["id"], names) != names:
            raise UserError(f"row {number} of {table} gives {row['id']!r} other findings than a "
                            "row before it; keep one")
    contradicting = failed.keys() & found.keys()
    if contradicting:
        raise UserError(f"{table} says of {min(contradicting)!r} both that it failed and what it "
                        "holds; keep one row")
    return found, failed


class Summarised(Selection):
    """A split read through a table of summaries: their findings take the place of its own.

    Volumes without a summary are left out; all else is as in the split (`sources.Source`).

    Attributes:
        left_out: what is left out, and why.
    """

    def __init__(self, source: Source, table: str | Path):
        """Joins a split and a table by id.

        Args:
            source: the split.
            table: see `read_summaries`.

        Raises:
            UserError: the table cannot be read, or none of its ids is one of the split's.
        """
        found, failed = read_summaries(table)
        ids = [row.id for row in source.index]
        super().__init__(source, [position for position, id_ in enumerate(ids) if id_ in found])
        if not self._positions and not found.keys() | failed.keys() - set(ids):
            id_, reason = next(iter(failed.items()))
            raise UserError(f"{table} holds no summary of {source.path}, split {source.split}: all "
                            f"{len(failed)} failed, the first, {id_!r}: {reason}; summarise them "
                            "again")
        if not self._positions:
            raise UserError(f"{table} has a summary of none of the {len(ids)} volumes of "
                            f"{source.path}, split {source.split}; their ids are like {ids[0]!r}, "
                            f"those of the table like {next(iter(found or failed))!r}")
        self.left_out = [Failure(id_, "", failed.get(id_, f"no row in {Path(table).name}"))
                         for id_ in ids if id_ not in found]
        self.index = tuple(source.index[p]._replace(findings=found[ids[p]])
                           for p in self._positions)

    def __getitem__(self, position: int) -> dict[str, Any]:
        row: IndexRow = self.index[position]
        return self._source.item(self._positions[position]) | {"findings": row.findings}

    @property
    def fingerprint(self) -> str:
        """Hexadecimal SHA-256 of the split's fingerprint and the summaries of its volumes."""
        rows = json.dumps([[row.id, row.findings] for row in self.index])
        return chain_digests("summaries", [self._source.fingerprint,
                                           hashlib.sha256(rows.encode()).hexdigest()])


def open_captioned(config: Any, split: str) -> Source | Summarised:
    """Opens a split with the captions that section `data` of a configuration asks for.

    Raises:
        UserError: no such split, or unusable summaries.
    """
    source = open_source(config.path, split)
    return Summarised(source, config.summaries) if config.summaries else source
