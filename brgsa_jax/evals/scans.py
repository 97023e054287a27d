"""Scans and their reconstructions, told by the names that CT-RATE gives its volumes.

The reconstructions of one scan have one report and one set of labels, so that a policy is needed
for how they count: train_12_b_1.nii.gz and train_12_b_2.nii.gz are both of the scan train_12_b.
Under any other name a volume is a scan of its own.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from brgsa_jax.config import UserError

_VOLUME = re.compile(r"(?P<scan>(train|valid)_\d+_[a-z]+)_(?P<number>\d+)(\.nii(\.gz)?)?")


class Judged(NamedTuple):
    """What is judged: M volumes, or scans.

    Attributes:
        ids: M ids.
        patients: M patient ids.
        labels: [M,P] bool.
        scores: score mode -> [M,P].
    """

    ids: tuple[str, ...]
    patients: tuple[str, ...]
    labels: np.ndarray
    scores: dict[str, np.ndarray]


def _stem(volume_id: str) -> str:
    return volume_id.removesuffix(".gz").removesuffix(".nii")


def scan_of(volume_id: str) -> tuple[str, int]:
    """Returns the scan of a volume and the number of its reconstruction, 0 of no known name."""
    match = _VOLUME.fullmatch(volume_id)
    return (match["scan"], int(match["number"])) if match else (volume_id, 0)


def count_scans(ids: Sequence[str]) -> int:
    """Returns how many scans the volumes are of."""
    return len({scan_of(volume_id)[0] for volume_id in ids})


def excluded_ids(protocol: Any, ids: Collection[str]) -> list[str]:
    """Returns those of the ids that a protocol leaves out, with or without the ending of a file.

    Raises:
        UserError: it leaves out some, and none of them is there: they are written otherwise.
    """
    excluded = set(map(_stem, protocol.exclude))
    found = sorted(volume_id for volume_id in ids if _stem(volume_id) in excluded)
    if excluded and not found:
        raise UserError(f"the protocol {protocol.name!r} leaves out ids such as "
                        f"{protocol.exclude[0]!r}, and the data has none of them, only such as "
                        f"{min(ids)!r}; write its exclusions as the data does, or take them out")
    return found


def chosen_rows(protocol: Any, ids: Sequence[str]) -> list[int]:
    """Rows of the volumes a protocol judges: without its exclusions, one a scan under "first".

    The first reconstruction is the one of the lowest number that is not excluded.
    """
    excluded = set(map(_stem, protocol.exclude))
    rows = [row for row, volume_id in enumerate(ids) if _stem(volume_id) not in excluded]
    if protocol.reconstructions != "first":
        return rows
    first: dict[str, int] = {}
    for row in sorted(rows, key=lambda row: scan_of(ids[row])[1]):
        first.setdefault(scan_of(ids[row])[0], row)
    return sorted(first.values())


def pool(protocol: Any, ids: Sequence[str], patients: Sequence[str], labels: np.ndarray,
         scores: Mapping[str, np.ndarray]) -> Judged:
    """Averages the scores of each scan's volumes under "mean"; otherwise returns what it got.

    Args:
        protocol: its `reconstructions` is taken.
        ids: N volume ids.
        patients: N patient ids.
        labels: [N,P] bool.
        scores: score mode -> [N,P].

    Raises:
        UserError: the volumes of a scan differ in patient or labels.
    """
    if protocol.reconstructions != "mean":
        return Judged(tuple(ids), tuple(patients), labels, dict(scores))
    names = [scan_of(volume_id)[0] for volume_id in ids]
    scans = {name: number for number, name in enumerate(dict.fromkeys(names))}
    code = np.array([scans[name] for name in names])
    size = np.bincount(code)[:, None]

    def total(values: np.ndarray) -> np.ndarray:
        summed = np.zeros((len(scans), values.shape[1]))
        np.add.at(summed, code, values)
        return summed

    first = np.array([names.index(name) for name in scans])
    # Where nothing is known of patients every volume stands for one.
    known = tuple(patients) != tuple(ids)
    for row, leader in enumerate(first[code]):
        if (known and patients[row] != patients[leader]) or (labels[row] != labels[leader]).any():
            raise UserError(f"{ids[leader]!r} and {ids[row]!r} are of one scan and differ in "
                            "patient or labels, so that they cannot be judged as one; mend the "
                            "table, or use reconstructions: all")
    return Judged(tuple(scans), tuple(patients[row] for row in first), labels[first],
                  {mode: total(values) / size for mode, values in scores.items()})
