"""DeLong's variance of an AUROC and test of two, by midranks in O(N log N).

DeLong, DeLong and Clarke-Pearson 1988, in the form of Sun and Xu, "Fast implementation of
DeLong's algorithm", 2014. It takes rows for independent: with several volumes of a patient its
intervals are too narrow, and the bootstrap over patients is the one to quote.
"""

import math
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

from brgsa_jax.evals.metrics import checked


class DeLong(NamedTuple):
    """An AUROC, or a difference of two, with its normal interval; NaN where undefined.

    `p` is two-sided, against a difference of 0; an AUROC alone has none.
    """

    value: float
    low: float
    high: float
    variance: float
    p: float = math.nan

    def as_dict(self) -> dict[str, float]:
        """The numbers under the names of metrics.json."""
        found = self._asdict()
        return found if math.isfinite(self.p) else {k: v for k, v in found.items() if k != "p"}


def components(labels: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Structural components: V10 of the positives, V01 of the negatives.

    V10_i is the share of negatives below positive i, V01_j the share of positives above negative
    j, ties counting half; the mean of either is the AUROC (DeLong et al., eqs. 4 and 5).

    Raises:
        ValueError: as `metrics.checked`.
    """
    labels, scores = checked(labels, scores)
    positive, negative = scores[labels], scores[~labels]
    if not len(positive) or not len(negative):
        return np.full(len(positive), np.nan), np.full(len(negative), np.nan)
    rank = midranks(scores)
    return ((rank[labels] - midranks(positive)) / len(negative),
            1.0 - (rank[~labels] - midranks(negative)) / len(positive))


def midranks(x: np.ndarray) -> np.ndarray:
    """Ranks of x[N] from 1, equal entries sharing the mean of theirs."""
    _, group, size = np.unique(x, return_inverse=True, return_counts=True)
    return (np.cumsum(size) - (size - 1) / 2)[group.reshape(-1)]


def delong(labels: np.ndarray, scores: np.ndarray, level: float = 0.95) -> DeLong:
    """AUROC of labels[N] bool and scores[N] with DeLong's interval, kept within [0,1].

    With fewer than two of a class the variance is NaN, and with it the interval.

    Raises:
        ValueError: as `metrics.checked`.
    """
    found = _normal(*components(labels, scores), level)
    return found._replace(low=max(found.low, 0.0), high=min(found.high, 1.0), p=math.nan)


def delong_test(labels: np.ndarray, first: np.ndarray, second: np.ndarray,
                level: float = 0.95) -> DeLong:
    """Difference of two AUROCs on the same rows, first minus second, with its interval and p.

    Args:
        labels: [N] bool.
        first: [N] scores.
        second: [N] scores.
        level: coverage of the interval.

    Raises:
        ValueError: as `metrics.checked`.
    """
    (first10, first01), (second10, second01) = (components(labels, scores)
                                                for scores in (first, second))
    # The variance of a difference is that of the components' differences: no covariance needed.
    return _normal(first10 - second10, first01 - second01, level)


def _normal(positive: np.ndarray, negative: np.ndarray, level: float) -> DeLong:
    if min(len(positive), len(negative)) < 2:
        value = float(positive.mean()) if min(len(positive), len(negative)) else math.nan
        return DeLong(value, math.nan, math.nan, math.nan)
    value = float(positive.mean())
    variance = float(positive.var(ddof=1) / len(positive) + negative.var(ddof=1) / len(negative))
    reach = NormalDist().inv_cdf((1 + level) / 2) * math.sqrt(variance)
    if variance > 0:
        p = math.erfc(abs(value) / math.sqrt(2 * variance))
    else:
        p = float(value == 0)
    return DeLong(value, value - reach, value + reach, variance, p)
