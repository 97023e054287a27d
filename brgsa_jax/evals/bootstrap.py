"""Percentile bootstrap over patients, with resamples shared by every finding and every model.

Volumes of one patient are not independent, so patients are drawn and all their volumes come
along. The draws depend only on the set of patient ids and the seed: two models judged on the
same patients see the same resamples, and their difference is paired.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from brgsa_jax.config import UserError
from brgsa_jax.evals.metrics import Ranking, macro, rank_plan, rank_resamples

# Resamples worked on at once: the weights of a few thousand patients then fit a cache.
CHUNK = 128


class Interval(NamedTuple):
    """A statistic, its percentile interval, and the number of resamples that left it undefined."""

    value: float
    low: float
    high: float
    undefined: int = 0

    def as_dict(self) -> dict[str, float]:
        """The three numbers under the names of metrics.json."""
        return {"value": self.value, "low": self.low, "high": self.high}


class Patients(NamedTuple):
    """Patients in sorted order: `names` [M] and the patient of every row, `code` [N]."""

    names: np.ndarray
    code: np.ndarray


def group_patients(patients: Sequence[str]) -> Patients:
    """Numbers the patients of N rows in sorted order, so that row order does not matter.

    Raises:
        UserError: fewer than two patients, of which no interval can be made.
    """
    names, code = np.unique(np.asarray(patients, dtype=str), return_inverse=True)
    if len(names) < 2:
        raise UserError(f"{len(names)} patient in the evaluation; an interval needs at least two, "
                        "so check the patients column or take more data")
    return Patients(names, code)


def patient_halves(patients: Sequence[str], seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Splits N rows by patient: two pairs of masks [N], rows to fit on and rows to apply to.

    What is fitted on one half is applied to the other, so no patient decides on itself.
    """
    unique, code = np.unique(np.asarray(patients, dtype=str), return_inverse=True)
    first = (np.random.default_rng(seed).permutation(len(unique)) % 2)[code.reshape(-1)] == 0
    return [(first, ~first), (~first, first)]


def draws(patients: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Yields how often each patient is drawn, as [r, patients] counts, r adding to `resamples`."""
    rng = np.random.default_rng(seed)
    for start in range(0, resamples, CHUNK):
        rows = min(CHUNK, resamples - start)
        picked = rng.integers(patients, size=(rows, patients))
        picked += np.arange(rows)[:, None] * patients
        yield np.bincount(picked.ravel(), minlength=rows * patients).reshape(rows, patients)


def interval(value: float, samples: np.ndarray, level: float = 0.95) -> Interval:
    """Percentile interval of samples[R] around a value, over the resamples that are finite."""
    samples = np.asarray(samples, dtype=np.float64)
    finite = samples[np.isfinite(samples)]
    if not finite.size or not np.isfinite(value):
        return Interval(float(value), np.nan, np.nan, len(samples))
    low, high = np.quantile(finite, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(value), float(low), float(high), int(len(samples) - finite.size))


def rank_samples(labels: np.ndarray, scores: np.ndarray, patients: Sequence[str], *,
                 resamples: int = 1000, seed: int = 0) -> Ranking:
    """AUROC and average precision of every finding in every resample.

    Args:
        labels: [N,P] bool.
        scores: [N,P].
        patients: N patient ids.
        resamples: R.
        seed: of the draws.

    Returns:
        Ranking of two [R,P] arrays, NaN where a resample has one class only.
    """
    labels, scores = np.asarray(labels, dtype=bool), np.asarray(scores, dtype=np.float64)
    grouped = group_patients(patients)
    plans = [rank_plan(labels[:, p], scores[:, p], grouped.code, len(grouped.names))
             for p in range(labels.shape[1])]
    parts = []
    for counts in draws(len(grouped.names), resamples, seed):
        weights = np.ascontiguousarray(counts.T, dtype=np.float64)
        columns = [rank_resamples(plan, weights) for plan in plans]
        parts.append(Ranking(*(np.stack(column, axis=1) for column in zip(*columns, strict=True))))
    return Ranking(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def macro_samples(samples: np.ndarray) -> np.ndarray:
    """Macro mean [R] of samples[R,P] over the findings defined in each resample.

    A resample without positives of a rare finding leaves that finding out rather than the
    resample, which would drop almost all resamples of a long-tailed set.
    """
    defined = np.isfinite(samples)
    count = defined.sum(axis=1)
    total = np.where(defined, samples, 0.0).sum(axis=1)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def macro_interval(values: np.ndarray, samples: np.ndarray, level: float = 0.95) -> Interval:
    """Interval of the macro mean itself, not the mean of the findings' intervals.

    Args:
        values: [P] on the whole set, NaN where undefined.
        samples: [R,P] on the resamples.
        level: coverage.

    Returns:
        Interval whose `undefined` counts resamples in which at least one finding that is
        defined on the whole set was not.
    """
    values, samples = np.asarray(values), np.asarray(samples)
    known = np.isfinite(values)
    partial = int((~np.isfinite(samples[:, known])).any(axis=1).sum())
    return interval(macro(values), macro_samples(samples), level)._replace(undefined=partial)


def reversed_share(difference: float, samples: np.ndarray) -> float:
    """Share of the finite samples[R] of a difference that are 0 or have the other sign.

    Twice this share is about the two-sided p value of a difference of 0; NaN without a sample.
    """
    finite = np.asarray(samples)[np.isfinite(samples)]
    if not finite.size or not np.isfinite(difference):
        return float("nan")
    return float(np.mean(finite * np.sign(difference) <= 0))


class Paired(NamedTuple):
    """A paired difference: its value, samples [R], and how many left out a finding."""

    value: float
    samples: np.ndarray
    partial: int

    def interval(self, level: float = 0.95) -> Interval:
        """Its percentile interval, with `partial` for the undefined resamples."""
        return interval(self.value, self.samples, level)._replace(undefined=self.partial)


def paired_macro(values: tuple[np.ndarray, np.ndarray],
                 samples: tuple[np.ndarray, np.ndarray]) -> Paired:
    """Difference macro(first) − macro(second) of samples [R,P] of the same draws.

    Args:
        values: two [P] arrays on the whole set.
        samples: two [R,P] arrays.

    Raises:
        ValueError: the samples differ in shape, so that they cannot be of the same draws.
    """
    first, second = (np.asarray(part) for part in samples)
    if first.shape != second.shape:
        raise ValueError(f"samples of shape {first.shape} and {second.shape} are not paired")
    both = np.isfinite(first) & np.isfinite(second)
    gap = (macro_samples(np.where(both, first, np.nan))
           - macro_samples(np.where(both, second, np.nan)))
    whole = np.asarray(values[0], dtype=np.float64) - np.asarray(values[1], dtype=np.float64)
    partial = int((~both[:, np.isfinite(whole)]).any(axis=1).sum())
    return Paired(macro(whole), gap, partial)


def statistic_samples(statistic: Callable[[np.ndarray], np.ndarray], patients: int, *,
                      resamples: int = 1000, seed: int = 0) -> np.ndarray:
    """Applies statistic([r,M] patient counts) -> [r, …] to every draw and stacks to [R, …]."""
    return np.concatenate([np.asarray(statistic(counts.astype(np.float64)))
                           for counts in draws(patients, resamples, seed)])
