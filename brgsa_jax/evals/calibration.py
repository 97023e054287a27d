"""Probabilities from scores, fitted on other patients than they are for, and how true they are.

A zero-shot score is no probability: it ranks volumes and means nothing at a threshold of 0.5.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.special import expit, logit

from brgsa_jax.evals.bootstrap import (
    group_patients,
    paired_macro,
    patient_halves,
    statistic_samples,
)
from brgsa_jax.evals.metrics import macro

METHODS = ("temperature", "platt")
"""σ(s/T) with one temperature a finding, and σ(a·s + b) (Platt 1999)."""

BINS = 10
"""Equal bins of [0,1] in reliability diagrams and calibration errors."""

# A probability of exactly 0 or 1 has no log-odds; this is as near as they come.
_EDGE = 1e-7


class Reliability(NamedTuple):
    """Points of a reliability diagram, one for each bin that holds a volume.

    Attributes:
        mean: mean probability in the bin.
        share: share of positives in the bin.
        count: volumes in the bin.
    """

    mean: np.ndarray
    share: np.ndarray
    count: np.ndarray


def as_probabilities(scores: np.ndarray) -> np.ndarray:
    """Scores read as they are: probabilities if all lie in [0,1], else log-odds, 1/(1+e^−s)."""
    scores = np.asarray(scores, dtype=np.float64)
    if are_probabilities(scores):
        return scores
    return expit(scores)


def are_probabilities(scores: np.ndarray) -> bool:
    """Whether every entry lies in [0,1]."""
    return bool(np.all((scores >= 0) & (scores <= 1)))


def calibrate(labels: np.ndarray, scores: np.ndarray, patients: Sequence[str],
              method: str = "platt", seed: int = 0) -> np.ndarray:
    """Probabilities, each half of the patients calibrated by a fit on the other half.

    Fits minimise the cross-entropy with Platt's smoothed targets (n₊+1)/(n₊+2) and 1/(n₋+2), so
    that findings which a score separates perfectly keep finite parameters. Scores that all lie
    in [0,1] are taken for probabilities and enter as log-odds.

    Args:
        labels: [N,P] bool.
        scores: [N,P], finite.
        patients: N patient ids.
        method: "platt"; or "temperature", which cannot shift and so stays poor on cosines.
        seed: decides the halves.

    Returns:
        [N,P] in (0,1); a column of NaN where one of the halves has one class only.

    Raises:
        ValueError: another method, or scores that are not finite.
        UserError: fewer than two patients.
    """
    if method not in METHODS:
        raise ValueError(f"no calibration {method!r}; choices: {', '.join(METHODS)}")
    labels, scores = np.asarray(labels, dtype=bool), np.asarray(scores, dtype=np.float64)
    if not np.isfinite(scores).all():
        raise ValueError("scores to calibrate must be finite")
    if are_probabilities(scores):
        scores = logit(np.clip(scores, _EDGE, 1 - _EDGE))
    group_patients(patients)
    found = np.full(scores.shape, np.nan)
    halves = patient_halves(patients, seed)
    for p in range(scores.shape[1]):
        if all(labels[fit, p].any() and not labels[fit, p].all() for fit, _ in halves):
            for fit, use in halves:
                slope, shift = _fit(labels[fit, p], scores[fit, p], shifted=method == "platt")
                found[use, p] = expit(slope * scores[use, p] + shift)
    return found


def _fit(labels: np.ndarray, scores: np.ndarray, *, shifted: bool) -> tuple[float, float]:
    """Slope and shift of σ(slope·s + shift); without a shift the slope is 1/T ≥ 0."""
    # Not at the top: scikit-learn takes a second to import.
    from sklearn.linear_model import LogisticRegression

    positives, negatives = labels.sum(), (~labels).sum()
    target = np.where(labels, (positives + 1) / (positives + 2), 1 / (negatives + 2))
    centre = scores.mean() if shifted else 0.0
    spread = np.sqrt(np.mean((scores - centre) ** 2))
    # Sums of equal numbers may differ in their last digits.
    if spread <= 1e-12 * np.abs(scores).max():
        share = target.mean()
        return 0.0, float(logit(share)) if shifted else 0.0
    x = (scores - centre) / spread
    # A soft target is two rows, one of each class, weighted by it.
    model = LogisticRegression(C=np.inf, fit_intercept=shifted, solver="newton-cholesky",
                               tol=1e-10)
    model.fit(np.r_[x, x][:, None], np.repeat([True, False], len(x)), np.r_[target, 1 - target])
    slope = float(model.coef_[0, 0]) / spread
    if not shifted:
        return max(slope, 0.0), 0.0
    return slope, float(model.intercept_[0]) - slope * centre


def reliability(labels: np.ndarray, probabilities: np.ndarray, bins: int = BINS) -> Reliability:
    """Mean probability and share of positives in equal bins of [0,1]; empty bins are left out.

    A bin holds its upper edge, as in scikit-learn.

    Args:
        labels: [N] bool.
        probabilities: [N] in [0,1].
        bins: number of bins.

    Raises:
        ValueError: probabilities outside [0,1], NaN among them.
    """
    labels, probabilities = np.asarray(labels, dtype=bool), np.asarray(probabilities, np.float64)
    if not are_probabilities(probabilities):
        raise ValueError("probabilities must lie in [0,1]; calibrate scores first")
    place = np.searchsorted(np.linspace(0, 1, bins + 1)[1:-1], probabilities)
    count, total, hits = (np.bincount(place, weights, minlength=bins)
                          for weights in (None, probabilities, labels))
    held = count > 0
    return Reliability(total[held] / count[held], hits[held] / count[held], count[held])


def ece(labels: np.ndarray, probabilities: np.ndarray, bins: int = BINS) -> float:
    """Expected calibration error Σ_b n_b/N |share_b − mean_b| (Naeini et al. 2015) of one finding.

    Arguments and errors as in `reliability`. A constant answer at the prevalence has an ECE of
    nearly 0, so it is to be read with the Brier score.
    """
    found = reliability(labels, probabilities, bins)
    return float(np.abs(found.share - found.mean) @ found.count / found.count.sum())


def brier(labels: np.ndarray, probabilities: np.ndarray) -> float:
    """Brier score, the mean of (p − y)², of labels[N] bool and probabilities[N]."""
    return float(np.mean((np.asarray(probabilities) - np.asarray(labels, dtype=bool)) ** 2))


def judge_calibration(protocol: Any, labels: np.ndarray, scores: np.ndarray,
                      patients: Sequence[str]) -> dict[str, Any]:
    """The entry "calibration" of metrics.json.

    "raw" reads the scores as they are (`as_probabilities`), "prevalence" answers every volume of
    a finding with the share of positives among the other half's patients. All stand on the same
    findings, those that can be fitted. "brier_below" is how far the macro Brier score of a method
    lies below that of the other two, with its paired interval over patients.

    Args:
        protocol: its findings, resamples, seed and level are taken.
        labels: [N,P] bool.
        scores: [N,P].
        patients: N patient ids.
    """
    found = {"raw": as_probabilities(scores), "prevalence": np.empty(scores.shape)}
    for fit, use in patient_halves(patients, protocol.seed):
        found["prevalence"][use] = labels[fit].mean(axis=0)
    found |= {method: calibrate(labels, scores, patients, method, protocol.seed)
              for method in METHODS}
    unknown = np.isnan(found["platt"]).any(axis=0)
    losses = {name: np.where(unknown, np.nan, (p - labels) ** 2) for name, p in found.items()}
    drawn = _mean_samples(protocol, np.hstack(list(losses.values())), patients)
    samples = dict(zip(losses, np.split(drawn, len(losses), axis=1), strict=True))
    means = {name: loss.mean(axis=0) for name, loss in losses.items()}
    entry: dict[str, Any] = {"bins": BINS, "raw_is": (
        "probability" if are_probabilities(scores) else "logistic of the score")}
    for name, probabilities in found.items():
        rows = {finding: {"ece": np.nan if unknown[p] else ece(labels[:, p], probabilities[:, p]),
                          "brier": float(means[name][p])}
                for p, finding in enumerate(protocol.findings)}
        entry[name] = {"ece": macro([row["ece"] for row in rows.values()]),
                       "brier": macro(means[name]), "findings": rows}
        if name in METHODS:
            entry[name]["brier_below"] = {
                other: paired_macro((means[other], means[name]), (samples[other], samples[name])
                                    ).interval(protocol.level).as_dict()
                for other in ("raw", "prevalence")}
    return entry


def _mean_samples(protocol: Any, loss: np.ndarray, patients: Sequence[str]) -> np.ndarray:
    """Means [R,P] of loss[N,P] over the resamples of patients."""
    grouped = group_patients(patients)
    total = np.zeros((len(grouped.names), loss.shape[1]))
    np.add.at(total, grouped.code, loss)
    size = np.bincount(grouped.code).astype(np.float64)
    return statistic_samples(lambda weights: (weights @ total) / (weights @ size)[:, None],
                             len(size), resamples=protocol.resamples, seed=protocol.seed)
