"""AUROC, average precision and their curves, exact under ties and weights; the files of metrics."""

import csv
import io
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from brgsa_jax.data.tables import quoted
from brgsa_jax.evals.scores import write_atomic


class Ranking(NamedTuple):
    """Rank statistics, one entry for each column of weights; NaN where one class is absent."""

    auroc: np.ndarray
    auprc: np.ndarray


class RocCurve(NamedTuple):
    """Points of a ROC curve from (0,0) to (1,1), both axes shares in [0,1]."""

    false_positive_rate: np.ndarray
    true_positive_rate: np.ndarray


class PrCurve(NamedTuple):
    """Points of a precision-recall curve by rising recall, from (0,1); draw it as steps."""

    recall: np.ndarray
    precision: np.ndarray


class RankPlan(NamedTuple):
    """One finding sorted once, so that any number of resamples costs three sparse products.

    K is the number of distinct scores that hold a positive, M the number of patients. Row k of
    each matrix counts, patient by patient, the volumes of one stretch of the ranking.

    Attributes:
        positives: [K,M], positives at the k-th such score, from the highest.
        tied: [K,M], negatives of the same score.
        between: [K+1,M], negatives below the score before and above this one; the last row holds
            those below all positives.
    """

    positives: Any
    tied: Any
    between: Any


def checked(labels: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns labels[N] as bool and scores[N] as float64.

    Raises:
        ValueError: labels other than 0 and 1, scores that are not finite, or two lengths.
    """
    labels, scores = np.asarray(labels), np.asarray(scores, dtype=np.float64)
    if labels.shape != scores.shape or labels.ndim != 1:
        raise ValueError(f"labels of shape {labels.shape} and scores of shape {scores.shape}; "
                         "both must be one row of the same length")
    if labels.dtype != bool and not np.isin(labels, (0, 1)).all():
        raise ValueError("labels must be 0 or 1; decide uncertain and missing ones first")
    if not np.isfinite(scores).all():
        raise ValueError(f"{np.count_nonzero(~np.isfinite(scores))} scores are not finite")
    return labels.astype(bool), scores


def rank_plan(labels: np.ndarray, scores: np.ndarray, code: np.ndarray,
              patients: int) -> RankPlan | None:
    """Sorts one finding for `rank_resamples`.

    Args:
        labels: [N] bool.
        scores: [N], higher means more likely present.
        code: [N], the patient of every row, from 0.
        patients: M.

    Returns:
        The plan, or None where only one class is present.

    Raises:
        ValueError: as `checked`.
    """
    # Not at the top: half of the start of a command that only writes metrics.
    from scipy.sparse import csr_matrix

    labels, scores = checked(labels, scores)
    if not labels.any() or labels.all():
        return None
    group = np.unique(-scores, return_inverse=True)[1].reshape(-1)
    held = np.unique(group[labels])
    row = np.searchsorted(held, group)
    tied = np.append(held, -1)[row] == group

    def counts(rows: np.ndarray, length: int) -> Any:
        ones = np.ones(np.count_nonzero(rows))
        return csr_matrix((ones, (row[rows], code[rows])), shape=(length, patients))

    return RankPlan(counts(labels, len(held)), counts(~labels & tied, len(held)),
                    counts(~labels & ~tied, len(held) + 1))


def rank_resamples(plan: RankPlan | None, weights: np.ndarray) -> Ranking:
    """AUROC and average precision of one finding under many weightings of its patients.

    AUROC = Σ_{i+,j−} w_i w_j ([s_i>s_j] + ½[s_i=s_j]) / (Σ w_i Σ w_j) (Mann and Whitney);
    average precision = Σ_k (R_k − R_{k−1}) P_k over distinct scores, as in scikit-learn.

    Args:
        plan: of `rank_plan`.
        weights: [M,R] non-negative; bootstrap resamples are whole numbers.

    Returns:
        Ranking of two [R] arrays, NaN where one class has no weight.
    """
    if plan is None:
        return Ranking(np.full(weights.shape[1], np.nan), np.full(weights.shape[1], np.nan))
    hits = plan.positives @ weights
    between = plan.between @ weights
    above = np.cumsum(between, axis=0)
    tied = None
    if plan.tied.nnz:
        tied = plan.tied @ weights
        cumulative = np.cumsum(tied, axis=0)
        above[:-1] += cumulative - tied
        above[-1] += cumulative[-1]
    negatives, above = above[-1], above[:-1]
    called = np.cumsum(hits, axis=0)
    positives = called[-1].copy()
    called += above
    if tied is not None:
        called += tied
    with np.errstate(divide="ignore", invalid="ignore"):
        precision = called
        np.divide(called - above if tied is None else called - above - tied, called,
                  out=precision, where=called > 0)
        auprc = np.einsum("kr,kr->r", hits, precision) / positives
        if tied is not None:
            above += 0.5 * tied
        auroc = 1.0 - np.einsum("kr,kr->r", hits, above) / (positives * negatives)
    undefined = (positives == 0) | (negatives == 0)
    return Ranking(np.where(undefined, np.nan, auroc), np.where(undefined, np.nan, auprc))


def rank_metrics(labels: np.ndarray, scores: np.ndarray,
                 weights: np.ndarray | None = None) -> Ranking:
    """AUROC and average precision, see `rank_resamples`, for many weightings of the rows.

    Args:
        labels: [N] bool.
        scores: [N], higher means more likely present.
        weights: [N,R] non-negative, or None for one column of ones.

    Returns:
        Ranking of two [R] arrays, NaN where only one class is present.

    Raises:
        ValueError: as `checked`.
    """
    if weights is None:
        return rank_resamples(rank_plan(labels, scores, np.zeros(len(labels), int), 1),
                              np.ones((1, 1)))
    plan = rank_plan(labels, scores, np.arange(len(labels)), len(labels))
    return rank_resamples(plan, np.ascontiguousarray(weights, dtype=np.float64))


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
        ValueError: only one class is present; otherwise as `checked`.
    """
    hits, misses = operating_points(labels, scores)
    return RocCurve(misses / misses[-1], hits / hits[-1])


def pr_curve(labels: np.ndarray, scores: np.ndarray) -> PrCurve:
    """Precision over recall of labels[N] bool and scores[N], one point for each distinct score.

    Its area as steps is the average precision; the first point is (0,1), as in scikit-learn.

    Raises:
        ValueError: as `roc_curve`.
    """
    hits, misses = operating_points(labels, scores)
    called = hits + misses
    return PrCurve(hits / hits[-1], np.where(called > 0, hits / np.maximum(called, 1), 1.0))


def operating_points(labels: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Positives and negatives called when the k largest distinct scores are, k from 0 to all.

    Raises:
        ValueError: only one class is present; otherwise as `checked`.
    """
    labels, scores = checked(labels, scores)
    if not labels.any() or labels.all():
        raise ValueError("a curve needs both classes")
    group = np.unique(-scores, return_inverse=True)[1].reshape(-1)
    size = group.max() + 1
    hits, misses = (np.bincount(group[rows], minlength=size) for rows in (labels, ~labels))
    return np.r_[0, np.cumsum(hits)], np.r_[0, np.cumsum(misses)]


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


def write_findings(path: str | Path, metrics: Mapping[str, Any]) -> None:
    """Writes metrics.csv: one row a finding, full precision, empty where undefined.

    Args:
        path: the CSV file.
        metrics: the content of metrics.json.
    """
    decided = metrics.get("decisions", {"findings": {}})["findings"]
    rows = []
    for name, entry in metrics["findings"].items():
        row = {"finding": quoted(name), "positives": entry["positives"],
               "prevalence": entry["prevalence"]}
        for figure in ("auroc", "auprc"):
            row |= {figure: entry[figure]["value"], f"{figure}_low": entry[figure]["low"],
                    f"{figure}_high": entry[figure]["high"]}
        row |= decided.get(name, {})
        row |= {f"all_negative_{figure}": metrics["all_negative"]["findings"][name][figure]
                for figure in ("accuracy", "f1_weighted")}
        row |= {f"{figure}_{method}": found["findings"][name][figure]
                for method, found in metrics.get("calibration", {}).items()
                if isinstance(found, Mapping) for figure in ("ece", "brier")}
        rows.append(jsonable(row))
    names = list(dict.fromkeys(name for row in rows for name in row))
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomic(path, buffer.getvalue())
