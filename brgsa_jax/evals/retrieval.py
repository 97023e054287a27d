"""Retrieval between volumes and reports: recall, average precision and label agreement at k.

Every figure stands beside what a random order gives and the number of queries it is a mean of.
Reports repeat: all items that say the same as the query are right answers, and whoever is found for
knowing the patient again can be left out of the gallery.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.special import digamma, gammaln

from brgsa_jax.evals.bootstrap import (
    Interval,
    Patients,
    group_patients,
    interval,
    statistic_samples,
)
from brgsa_jax.evals.ranking import Agreement, Ranked, Relation, rank
from brgsa_jax.evals.scores import unit

KS = (1, 5, 10, 50)

# Cosines are compared in steps of 2⁻²⁰, so that equal embeddings tie in spite of rounding. Scaling
# by a power of two is exact, and float32 holds all integers of the range.
STEPS = 2.0 ** 20

Codes = tuple[Sequence, Sequence]
"""A relation of queries and gallery: codes [Q] and [G], related where they are equal."""


class Figure(NamedTuple):
    """A mean over queries: its interval over patients, its expectation for a random order, N."""

    found: Interval
    chance: float
    queries: int

    def as_dict(self) -> dict[str, float]:
        """The numbers under the names of metrics.json."""
        return {**self.found.as_dict(), "chance": self.chance, "queries": self.queries}


class Retrieval(NamedTuple):
    """What one direction of retrieval gives.

    Attributes:
        queries: number of queries.
        gallery: number of items.
        with_positive: queries with at least one right answer, over which recall, average
            precision and median rank are taken.
        median_rank: the smallest k at which at least half of the queries have found a right
            answer; NaN without positives.
        median_rank_chance: the same for a random order.
        recall: k -> share of queries with a right answer among the first k.
        average_precision: k -> mean over queries of Σ_{i≤k} P(i)·rel(i) / min(k, right answers).
        label_jaccard: k -> mean over the first k items of |A∩B| / |A∪B| of their labels and the
            query's, 0 where both have none; empty without labels. Published as "MAP@k", which
            it is not.
    """

    queries: int
    gallery: int
    with_positive: int
    median_rank: float
    median_rank_chance: float
    recall: dict[int, Figure]
    average_precision: dict[int, Figure]
    label_jaccard: dict[int, Figure]

    def as_dict(self) -> dict[str, object]:
        """The figures under the names of metrics.json; average precision is "map"."""
        def row(figures: dict[int, Figure]) -> dict[str, dict[str, float]]:
            return {str(k): figure.as_dict() for k, figure in figures.items()}

        return {"queries": self.queries, "gallery": self.gallery,
                "with_positive": self.with_positive,
                "median_rank": {"value": self.median_rank, "chance": self.median_rank_chance},
                "recall": row(self.recall), "map": row(self.average_precision),
                "label_jaccard": row(self.label_jaccard)}


def retrieve(queries: np.ndarray, gallery: np.ndarray, positives: Sequence[Codes], *,
             exclude: Codes | None = None, labels: tuple[np.ndarray, np.ndarray] | None = None,
             patients: Sequence[str] | None = None, ks: Sequence[int] = KS, chunk: int = 512,
             resamples: int = 1000, seed: int = 0, level: float = 0.95) -> Retrieval:
    """Ranks the gallery by cosine for every query, a chunk of queries at a time.

    Items of equal score count with their mean over all orders of them (for average precision:
    McSherry and Najork, 2008), so that constant embeddings give chance, not luck. Intervals are
    over the patients of the queries; the gallery stays as it is.

    Args:
        queries: [Q,D], un-normalised.
        gallery: [G,D].
        positives: relations; an item that any of them relates to a query is a right answer.
        exclude: items that this relates to a query are not in its gallery.
        labels: [Q,P] and [G,P] bool, for the agreement of labels.
        patients: Q patient ids; None takes every query for its own.
        ks: cut-offs; those beyond the gallery take all of it.
        chunk: queries ranked at once. It holds 13 bytes for each of them and every item, and
            changes no figure.
        resamples: number of bootstrap resamples.
        seed: of the draws, shared with every other interval of the evaluation.
        level: coverage.

    Returns:
        The figures.

    Raises:
        UserError: fewer than two patients, or embeddings that are not finite.
        ValueError: shapes that do not fit.
    """
    relations = [*positives, *([] if exclude is None else [exclude])]
    sides = [(np.asarray(q), np.asarray(g)) for q, g in relations + ([labels] if labels else [])]
    if (queries.ndim != 2 or gallery.ndim != 2 or queries.shape[1] != gallery.shape[1]
            or not len(gallery) or not positives or min(ks) < 1 or chunk < 1
            or any((len(q), len(g)) != (len(queries), len(gallery)) for q, g in sides)):
        raise ValueError(f"queries {queries.shape}, gallery {gallery.shape}, relations "
                         f"{[(len(q), len(g)) for q, g in sides]} and ks {tuple(ks)} do not fit")
    grouped = group_patients(range(len(queries)) if patients is None else patients)
    related = [Relation(*pair) for pair in relations]
    out = related.pop() if exclude is not None else None
    agreement = Agreement(*sides[-1]) if labels is not None else None
    # Scaled here once rather than every product.
    scaled = (unit(queries) * STEPS).astype(np.float32)
    items = np.ascontiguousarray(unit(gallery).astype(np.float32).T)
    depth = min(max(ks), len(gallery))
    parts = []
    for start in range(0, len(queries), chunk):
        rows = np.arange(start, min(start + chunk, len(queries)))
        scores = scaled[rows] @ items
        np.rint(scores, out=scores)
        parts.append(rank(scores, rows, related, out, agreement, depth))
    ranked = Ranked(*map(np.concatenate, zip(*parts, strict=True)))
    return _summary(ranked, len(gallery), ks, grouped, agreement is not None,
                    resamples=resamples, seed=seed, level=level)


def directions(image: np.ndarray, text: np.ndarray, *, captions: Sequence, findings: Sequence,
               labels: np.ndarray, patients: Sequence[str],
               **options: Any) -> dict[str, Retrieval]:
    """The three directions between N volumes and their reports.

    Between volumes and reports, right answers are equal captions, and equal findings of the same
    patient, as reconstructions of one scan have. From volume to volume they are equal findings of
    another patient: the volume itself, its other reconstructions and all else of its patient leave
    the gallery.

    Args:
        image: [N,D], un-normalised; row i belongs to row i of text.
        text: [N,D].
        captions: N codes, equal where the captions say the same.
        findings: N codes, equal where the findings are the same.
        labels: [N,P] bool, whose agreement is measured.
        patients: N patient ids.
        options: of `retrieve`.
    """
    captions, findings = (np.unique(codes, return_inverse=True)[1]
                          for codes in (captions, findings))
    owners = np.unique(np.asarray(patients, dtype=str), return_inverse=True)[1]
    same_report = owners * (findings.max() + 1) + findings
    options = {"labels": (labels, labels), "patients": patients, **options}
    reports = [(captions, captions), (same_report, same_report)]
    return {"report_to_volume": retrieve(text, image, reports, **options),
            "volume_to_report": retrieve(image, text, reports, **options),
            "volume_to_volume": retrieve(image, image, [(findings, findings)],
                                         exclude=(owners, owners), **options)}


def both_sides(mode: str, image: np.ndarray, text: np.ndarray, image_bridged: np.ndarray | None,
               text_bridged: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings of volumes and texts whose cosine is the score of `mode` (`scores.SCORE_MODES`).

    For "mean" they are [v, v̂] and [t, t], each half normalised, of twice the width: their cosine is
    ½[cos(v,t) + cos(v̂,t)].
    """
    if mode == "mean":
        return (np.concatenate([unit(image), unit(image_bridged)], axis=1),
                np.concatenate([unit(text)] * 2, axis=1))
    return (image_bridged if mode in ("bridged", "image_bridged") else image,
            text_bridged if mode in ("bridged", "text_bridged") else text)


def judge_retrieval(protocol: Any, mode: str, embeddings: Any, findings: np.ndarray,
                    labels: np.ndarray, patients: Sequence[str]) -> dict[str, Any]:
    """The entry "retrieval" of metrics.json: the three directions by the judged score.

    Args:
        protocol: seed, resamples and level.
        mode: of the score.
        embeddings: `evaluate.Embeddings` with captions.
        findings: every label of the volumes, [N,F] bool: equal rows are equal findings.
        labels: those of the protocol, [N,P] bool, whose agreement is measured.
        patients: N patient ids.
    """
    same = np.unique(np.asarray(findings, dtype=bool), axis=0, return_inverse=True)[1].ravel()
    codes = embeddings.caption_codes
    image, text = both_sides(mode, embeddings.image, embeddings.captions,
                             embeddings.image_bridged, embeddings.captions_bridged)
    found = directions(image, text, captions=same if codes is None else codes, findings=same,
                       labels=labels, patients=patients, resamples=protocol.resamples,
                       seed=protocol.seed, level=protocol.level)
    return {name: direction.as_dict() for name, direction in found.items()}


def _drawn(items: np.ndarray, good: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """Probability that `draws` of `items` without replacement hold one of the `good` ones."""
    bad = items - good
    most = int(np.max(draws, initial=0))
    if most <= 64:
        # The logarithms below leave 1e-10, too much beside a chance of 1 in 50 000.
        miss = np.ones(len(items))
        for drawn in range(most):
            left = np.maximum(bad - drawn, 0) / np.maximum(items - drawn, 1)
            miss *= np.where(drawn < draws, left, 1.0)
        return 1.0 - miss
    possible = draws <= bad
    kept = np.where(possible, draws, 0)
    log_miss = (gammaln(bad + 1) - gammaln(bad - kept + 1)
                - gammaln(items + 1) + gammaln(items - kept + 1))
    return np.where(possible, -np.expm1(log_miss), 1.0)


def _median(above: np.ndarray, tied: np.ndarray, hits: np.ndarray, most: int) -> float:
    """Smallest k up to `most` at which the mean probability of having found one is a half."""
    low, high = 1, most
    while low < high:
        k = (low + high) // 2
        # What is a half but for rounding counts as one.
        if _drawn(tied, hits, np.clip(k - above, 0, tied)).mean() >= 0.5 - 1e-9:
            high = k
        else:
            low = k + 1
    return float(low)


def _chance_precision(items: np.ndarray, good: np.ndarray, k: np.ndarray) -> np.ndarray:
    """Expected Σ_{i≤k} P(i)·rel(i) of a random order: Σ (r/n) [1 + (i−1)(r−1)/(n−1)] / i."""
    others = (good - 1) / np.maximum(items - 1, 1)
    harmonic = digamma(k + 1) - digamma(1)
    return good / np.maximum(items, 1) * ((1 - others) * harmonic + others * k)


def _summary(ranked: Ranked, gallery: int, ks: Sequence[int], grouped: Patients, labelled: bool, *,
             resamples: int, seed: int, level: float) -> Retrieval:
    """Means over queries with intervals over patients."""
    answered, open_ = ranked.positives > 0, ranked.items > 0
    depth = ranked.precision.shape[1]
    columns = []
    for k in ks:
        seen = np.minimum(k, ranked.items)
        most = np.maximum(np.minimum(k, ranked.positives), 1)
        upto = min(k, depth)
        columns += [
            ("recall", k, answered,
             _drawn(ranked.tied, ranked.hits, np.clip(k - ranked.above, 0, ranked.tied)),
             _drawn(ranked.items, ranked.positives, seen)),
            ("average_precision", k, answered, ranked.precision[:, :upto].sum(1) / most,
             _chance_precision(ranked.items, ranked.positives, seen) / most)]
        if labelled:
            columns.append(("label_jaccard", k, open_,
                            ranked.jaccard[:, :upto].sum(1) / np.maximum(seen, 1),
                            ranked.jaccard_all))
    counted = np.stack([column[2] for column in columns], axis=1).astype(float)
    found = np.where(counted > 0, np.stack([column[3] for column in columns], axis=1), 0.0)

    def per_patient(values: np.ndarray) -> np.ndarray:
        total = np.zeros((len(grouped.names), values.shape[1]))
        np.add.at(total, grouped.code, values)
        return total

    totals, sizes = per_patient(found), per_patient(counted)

    def means(counts: np.ndarray) -> np.ndarray:
        n = counts @ sizes
        return np.where(n > 0, (counts @ totals) / np.where(n > 0, n, 1.0), np.nan)

    values = means(np.ones((1, len(grouped.names))))[0]
    samples = statistic_samples(means, len(grouped.names), resamples=resamples, seed=seed)
    figures: dict[str, dict[int, Figure]] = {
        "recall": {}, "average_precision": {}, "label_jaccard": {}}
    for position, (name, k, rows, _, chance) in enumerate(columns):
        figures[name][k] = Figure(interval(values[position], samples[:, position], level),
                                  float(chance[rows].mean()) if rows.any() else np.nan,
                                  int(rows.sum()))
    ranks = [part[answered] for part in (ranked.above, ranked.tied, ranked.hits)]
    blind = [np.zeros_like(ranks[0]), ranked.items[answered], ranked.positives[answered]]
    return Retrieval(
        queries=len(answered), gallery=gallery, with_positive=int(answered.sum()),
        median_rank=_median(*ranks, gallery) if answered.any() else np.nan,
        median_rank_chance=_median(*blind, gallery) if answered.any() else np.nan, **figures)
