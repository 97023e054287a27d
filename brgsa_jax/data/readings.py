"""What the numbers of a CT file are, judged by the numbers alone: HU, or raw and with which scale.

In HU the air around and inside a patient lies near -1000 and soft tissue near 40. Raw numbers of a
scanner lie higher: air near 24 where the intercept is -1024, near 7192 where it is -8192. A reading
fits if both air and tissue come out in their places, which only one does for any real volume.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from brgsa_jax.data.scan import Stored

_SAMPLE = 500_000
_AIR_HU, _TISSUE_HU = (-1100.0, -800.0), (-200.0, 200.0)  # Air includes lung.
_LEAST_BODY = 0.25  # Share of voxels that are not far below air; the corners of a slice are 0.21.
_LEAST_AIR, _LEAST_TISSUE = 0.01, 0.05  # Shares of those.


class Reading(NamedTuple):
    """HU = slope * number + intercept."""

    slope: float
    intercept: float


HU = Reading(1.0, 0.0)
RAW = (Reading(1.0, -1024.0), Reading(1.0, -8192.0))  # All that CT-RATE has.
_NEAR = 200.0  # HU within which two intercepts are one reading.


def readings_of(stored: Stored, said: Reading | None = None) -> list[Reading]:
    """Returns every reading under which the numbers are a CT; one, unless something is wrong.

    Args:
        stored: the file; the slope and intercept of its header are applied first.
        said: what somebody says the reading is, tried in place of the usual ones close to it.
    """
    sample = _sample(stored)
    tried = [HU, *RAW]
    if said is not None:
        tried = [said, *(usual for usual in tried if abs(usual.intercept - said.intercept) > _NEAR)]
    found = _fitting(sample, tried)
    if len(found) > 1:
        # Padding can lie where another reading has its air; it is one number, the lowest.
        found = _fitting(sample[sample > sample.min()], found)
    return found


def describe(found: Sequence[Reading]) -> str:
    """Says what the numbers are, to follow "its values"."""
    if not found:
        return "are neither HU nor raw numbers of a CT (no air near -1000, 24 or 7192)"
    return " or ".join(
        "are HU already (air near -1000)" if reading == HU else
        f"are raw numbers with slope {reading.slope:g} and intercept {reading.intercept:g} (air "
        f"near {(-1000 - reading.intercept) / reading.slope:.0f})" for reading in found)


def _sample(stored: Stored) -> np.ndarray:
    # An odd step visits every row and column of the usual power-of-two matrices.
    step = max(1, stored.values.size // _SAMPLE) | 1
    sample = stored.values.ravel(order="K")[::step].astype(np.float64)
    return sample[np.isfinite(sample)] * stored.slope + stored.intercept


def _fitting(sample: np.ndarray, tried: Sequence[Reading]) -> list[Reading]:
    return [reading for reading in tried if _is_ct(sample * reading.slope + reading.intercept)]


def _is_ct(hu: np.ndarray) -> bool:
    body = hu[hu >= _AIR_HU[0]]
    if body.size <= _LEAST_BODY * hu.size:
        return False
    air = np.mean(body <= _AIR_HU[1])
    tissue = np.mean((body >= _TISSUE_HU[0]) & (body <= _TISSUE_HU[1]))
    return bool(air >= _LEAST_AIR and tissue >= _LEAST_TISSUE)
