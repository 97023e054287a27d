"""Scans and their reconstructions, told by the names that CT-RATE gives its volumes.

The reconstructions of one scan have one report and one set of labels, so that a policy is needed
for how they count: train_12_b_1.nii.gz and train_12_b_2.nii.gz are both of the scan train_12_b.
Under any other name a volume is a scan of its own.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

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


def scan_of(volume_id: str) -> tuple[str, int]:
    """Returns the scan of a volume and the number of its reconstruction, 0 of no known name."""
    match = _VOLUME.fullmatch(volume_id)
    return (match["scan"], int(match["number"])) if match else (volume_id, 0)


def count_scans(ids: Sequence[str]) -> int:
    """Returns how many scans the volumes are of."""
    return len({scan_of(volume_id)[0] for volume_id in ids})


def chosen_rows(protocol: Any, ids: Sequence[str]) -> list[int]:
    """Rows of the volumes a protocol judges: without its exclusions, one a scan under "first".

    The first reconstruction is the one of the lowest number that is not excluded.
    """
    excluded = set(protocol.exclude)
    rows = [row for row, volume_id in enumerate(ids) if volume_id not in excluded]
    if protocol.reconstructions != "first":
        return rows
    first: dict[str, int] = {}
    for row in sorted(rows, key=lambda row: scan_of(ids[row])[1]):
        first.setdefault(scan_of(ids[row])[0], row)
    return sorted(first.values())


def pool(protocol: Any, ids: Sequence[str], patients: Sequence[str], labels: np.ndarray,
         scores: Mapping[str, np.ndarray]) -> Judged:
    """Averages the scores of each scan's volumes under "mean"; otherwise returns what it got.

    A finding is present in a scan where one of its volumes has it, which is all or none of them
    wherever labels were read from the report.

    Args:
        protocol: its `reconstructions` is taken.
        ids: N volume ids.
        patients: N patient ids.
        labels: [N,P] bool.
        scores: score mode -> [N,P].
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

    first = [names.index(name) for name in scans]
    return Judged(tuple(scans), tuple(patients[row] for row in first), total(labels) > 0,
                  {mode: total(values) / size for mode, values in scores.items()})
