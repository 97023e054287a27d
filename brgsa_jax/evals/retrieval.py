"""Retrieval between volumes and reports: recall at k, beside what chance gives."""

from collections.abc import Sequence

import numpy as np
from scipy.special import gammaln

from brgsa_jax.config import UserError


def recall_at_k(scores: np.ndarray, relevant: np.ndarray,
                ks: Sequence[int] = (1, 5, 10)) -> dict[int, float]:
    """Share of queries with at least one relevant item among their k highest scores.

    Items of equal score count with the share of orders in which a relevant one is within the k,
    so that a constant score gives chance, not luck.

    Args:
        scores: [Q, M] of queries with items.
        relevant: [Q, M] bool; every query has at least one relevant item.
        ks: cut-offs; those beyond M count all items.

    Returns:
        {k: recall in [0, 1]}.

    Raises:
        UserError: shapes differ, a score is not finite, or a query has no relevant item.
    """
    _check(scores, relevant)
    best = np.where(relevant, scores, -np.inf).max(axis=1, keepdims=True)
    above = (scores > best).sum(axis=1)
    tied = (scores == best).sum(axis=1)
    hits = ((scores == best) & relevant).sum(axis=1)
    return {k: float(np.mean(_drawn(tied, hits, np.clip(k - above, 0, tied)))) for k in ks}


def chance_recall_at_k(relevant: np.ndarray, ks: Sequence[int] = (1, 5, 10)) -> dict[int, float]:
    """What `recall_at_k` expects of a random order: 1 − C(M−r, k) / C(M, k) for r relevant items.

    Args:
        relevant: [Q, M] bool.
        ks: cut-offs.
    """
    items = np.full(len(relevant), relevant.shape[1])
    found = relevant.sum(axis=1)
    return {k: float(np.mean(_drawn(items, found, np.minimum(k, items)))) for k in ks}


def _drawn(items: np.ndarray, good: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """Probability that `draws` of `items` without replacement hold one of the `good` ones."""
    bad = items - good
    possible = draws <= bad
    kept = np.where(possible, draws, 0)
    log_miss = (gammaln(bad + 1) - gammaln(bad - kept + 1)
                - gammaln(items + 1) + gammaln(items - kept + 1))
    return np.where(possible, 1.0 - np.exp(log_miss), 1.0)


def _check(scores: np.ndarray, relevant: np.ndarray) -> None:
    if scores.shape != relevant.shape or scores.ndim != 2:
        raise UserError(f"retrieval scores {scores.shape} and relevance {relevant.shape} differ; "
                        "give both as [queries, items]")
    if not np.isfinite(scores).all():
        raise UserError("a retrieval score is not finite; look at the embeddings it comes from")
    if not relevant.any(axis=1).all():
        raise UserError("a retrieval query has no relevant item; leave it out")
