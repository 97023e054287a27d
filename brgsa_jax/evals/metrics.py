"""AUROC, average precision, ROC curves and thresholded decisions, exact under ties and weights."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from brgsa_jax.evals.scores import write_atomic


class Ranking(NamedTuple):
    """Rank statistics, one entry for each column of weights; NaN where one class is absent."""

    auroc: np.ndarray
    auprc: np.ndarray


class RocCurve(NamedTuple):
    """Points of a ROC curve from (0,0) to (1,1), both axes shares in [0,1]."""

    false_positive_rate: np.ndarray
    true_positive_rate: np.ndarray


class Decisions(NamedTuple):
    """Thresholded figures of one finding; `f1_weighted` averages both classes by their support.

    A constant negative answer has f1 0 and yet a high accuracy and f1_weighted, which is why
    `all_negative` is to be shown beside these.
    """

    accuracy: float
    f1: float
    f1_weighted: float
    precision: float
    recall: float
    specificity: float


def rank_metrics(labels: np.ndarray, scores: np.ndarray,
                 weights: np.ndarray | None = None) -> Ranking:
    """Weighted AUROC and average precision for many weightings of the same scores.

    AUROC = Σ_{i+,j−} w_i w_j ([s_i>s_j] + ½[s_i=s_j]) / (Σ w_i Σ w_j) (Mann and Whitney);
    average precision = Σ_k (R_k − R_{k−1}) P_k over distinct scores, as in scikit-learn.
    Bootstrap resamples are integer weights, so the scores are sorted once for all of them.

    Args:
        labels: [N] bool.
        scores: [N], higher means more likely present.
        weights: [N,R] non-negative, or None for one column of ones.

    Returns:
        Ranking of two [R] arrays.
    """
    labels = np.asarray(labels, dtype=bool)
    scores = np.asarray(scores, dtype=np.float64)
    if weights is None:
        weights = np.ones((len(scores), 1))
    resamples = weights.shape[1]
    if not labels.any() or labels.all():
        return Ranking(np.full(resamples, np.nan), np.full(resamples, np.nan))
    order = np.argsort(-scores, kind="stable")
    labels, ordered = labels[order], scores[order]
    first = np.r_[True, ordered[1:] != ordered[:-1]]
    group = np.cumsum(first) - 1
    weight = weights[order].astype(np.float64, copy=False)
    hits = weight[labels]
    if not first.all():
        weight = np.add.reduceat(weight, np.flatnonzero(first), axis=0)
    cumulative = np.cumsum(weight, axis=0)

    # Only tie groups that hold a positive contribute to either sum.
    held, start = np.unique(group[labels], return_index=True)
    if len(held) < len(hits):
        hits = np.add.reduceat(hits, start, axis=0)
    cumulative_hits = np.cumsum(hits, axis=0)
    positives = cumulative_hits[-1]
    negatives = cumulative[-1] - positives
    called = cumulative[held]
    tied = weight[held] - hits
    below = negatives - (called - cumulative_hits)
    with np.errstate(divide="ignore", invalid="ignore"):
        auroc = np.einsum("kr,kr->r", hits, below + 0.5 * tied) / (positives * negatives)
        precision = np.where(called > 0, cumulative_hits / np.where(called > 0, called, 1.0), 0.0)
        auprc = np.einsum("kr,kr->r", hits, precision) / positives
    undefined = (positives == 0) | (negatives == 0)
    return Ranking(np.where(undefined, np.nan, auroc), np.where(undefined, np.nan, auprc))


def auroc(labels: np.ndarray, scores: np.ndarray) -> float:
    """Area under the ROC curve of labels[N] bool and scores[N]; NaN with one class only."""
    return float(rank_metrics(labels, scores).auroc[0])


def auprc(labels: np.ndarray, scores: np.ndarray) -> float:
    """Average precision of labels[N] bool and scores[N]; its chance level is the prevalence."""
    return float(rank_metrics(labels, scores).auprc[0])


def macro(values: np.ndarray) -> float:
    """Mean over the findings that are defined; NaN when none is."""
    defined = np.asarray(values, dtype=np.float64)
    defined = defined[np.isfinite(defined)]
    return float(defined.mean()) if defined.size else math.nan


def roc_curve(labels: np.ndarray, scores: np.ndarray) -> RocCurve:
    """The ROC curve of labels[N] bool and scores[N], one point for each distinct score.

    Raises:
        ValueError: only one class is present.
    """
    labels = np.asarray(labels, dtype=bool)
    if not labels.any() or labels.all():
        raise ValueError("a ROC curve needs both classes")
    order = np.argsort(-np.asarray(scores, dtype=np.float64), kind="stable")
    ordered = np.asarray(scores, dtype=np.float64)[order]
    last = np.r_[ordered[1:] != ordered[:-1], True]
    hits = np.cumsum(labels[order])[last]
    misses = np.cumsum(~labels[order])[last]
    return RocCurve(np.r_[0.0, misses / misses[-1]], np.r_[0.0, hits / hits[-1]])


def corner_threshold(labels: np.ndarray, scores: np.ndarray) -> float:
    """The score t whose rule `score > t` comes closest to the ROC corner (0,1).

    Minimises √((1−TPR)² + FPR²) over the distinct scores; of ties the largest threshold wins
    (CT-CLIP's rule, but on a grid that follows the scores).

    Raises:
        ValueError: only one class is present.
    """
    curve = roc_curve(labels, scores)
    # Point k of the curve calls the k largest distinct scores, that is `score > distinct[k]`.
    distance = np.hypot(1.0 - curve.true_positive_rate, curve.false_positive_rate)[:-1]
    distinct = np.unique(np.asarray(scores, dtype=np.float64))[::-1]
    return float(distinct[int(np.argmin(distance))])


def decisions(labels: np.ndarray, called: np.ndarray) -> Decisions:
    """Figures of called[N] bool against labels[N] bool; a ratio without cases counts as 0."""
    labels, called = np.asarray(labels, dtype=bool), np.asarray(called, dtype=bool)
    tp, fp = float((labels & called).sum()), float((~labels & called).sum())
    fn, tn = float((labels & ~called).sum()), float((~labels & ~called).sum())

    def ratio(part: float, whole: float) -> float:
        return part / whole if whole else 0.0

    f1, f1_negative = ratio(2 * tp, 2 * tp + fp + fn), ratio(2 * tn, 2 * tn + fp + fn)
    weighted = ratio(f1 * (tp + fn) + f1_negative * (tn + fp), tp + fn + tn + fp)
    return Decisions(ratio(tp + tn, tp + fn + tn + fp), f1, weighted, ratio(tp, tp + fp),
                     ratio(tp, tp + fn), ratio(tn, tn + fp))


def call(labels: np.ndarray, scores: np.ndarray, patients: Sequence[str], rule: str,
         seed: int = 0) -> np.ndarray | None:
    """Turns scores[N] of one finding into decisions [N] by a threshold rule.

    Args:
        labels: [N] bool.
        scores: [N].
        patients: N patient ids.
        rule: "heldout-patients": each half of the patients is called at the corner fitted on
            the other half; "ctclip-test": one corner fitted on these very labels (optimistic).
        seed: decides the halves.

    Returns:
        [N] bool, or None where a half has one class only and no corner exists.

    Raises:
        ValueError: another rule.
    """
    labels, scores = np.asarray(labels, dtype=bool), np.asarray(scores, dtype=np.float64)
    if rule == "ctclip-test":
        halves = [(np.ones(len(labels), bool), np.ones(len(labels), bool))]
    elif rule == "heldout-patients":
        unique, code = np.unique(np.asarray(patients, dtype=str), return_inverse=True)
        side = np.random.default_rng(seed).permutation(len(unique)) % 2
        first = side[code] == 0
        halves = [(first, ~first), (~first, first)]
    else:
        raise ValueError(f"no decisions under the threshold rule {rule!r}")
    called = np.zeros(len(labels), dtype=bool)
    for fit, use in halves:
        if not labels[fit].any() or labels[fit].all():
            return None
        called[use] = scores[use] > corner_threshold(labels[fit], scores[fit])
    return called


def jsonable(value: Any) -> Any:
    """Copies a tree into plain JSON types at full precision, with null for what is not finite."""
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return jsonable(value.tolist())
    if isinstance(value, list | tuple):
        return [jsonable(item) for item in value]
    if isinstance(value, np.generic):
        return jsonable(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def write_metrics(path: str | Path, metrics: Mapping[str, Any]) -> None:
    """Writes metrics.json whole or not at all."""
    text = json.dumps(jsonable(metrics), indent=2, ensure_ascii=False, allow_nan=False)
    write_atomic(path, text + "\n")
