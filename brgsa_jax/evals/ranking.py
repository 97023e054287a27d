"""Ranks a gallery for a chunk of queries; items of equal score count with their mean order."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Ranked(NamedTuple):
    """What is kept of each query, [Q] or [Q,K] for K = max(ks).

    `items` and `positives` count what is left of the gallery; `above` counts the items better than
    the best positive, `tied` those as good, `hits` the positives among these. `precision` is the
    expected P(i)·rel(i) of every place, `jaccard` the expected agreement, `jaccard_all` that of a
    random item.
    """

    items: np.ndarray
    positives: np.ndarray
    above: np.ndarray
    tied: np.ndarray
    hits: np.ndarray
    precision: np.ndarray
    jaccard: np.ndarray
    jaccard_all: np.ndarray


class Relation:
    """Finds the items that a relation gives to a query without looking at all of them."""

    def __init__(self, queries: Sequence, gallery: Sequence):
        codes = np.unique(np.concatenate([np.asarray(queries), np.asarray(gallery)]),
                          return_inverse=True)[1]
        self.queries, self.gallery = codes[:len(queries)], codes[len(queries):]
        self.order = np.argsort(self.gallery, kind="stable")
        ends = np.searchsorted(self.gallery[self.order], np.arange(codes.max() + 2))
        self.first, self.size = ends[:-1], np.diff(ends)

    def pairs(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Position in `rows` and item of every related pair."""
        codes = self.queries[rows]
        size = self.size[codes]
        within = np.arange(size.sum()) - np.repeat(np.cumsum(size) - size, size)
        return (np.repeat(np.arange(len(rows)), size),
                self.order[np.repeat(self.first[codes], size) + within])

    def holds(self, rows: np.ndarray, items: np.ndarray) -> np.ndarray:
        """Whether each of items [c,n] is related to its query, rows [c]."""
        return self.gallery[items] == self.queries[rows][:, None]


class Agreement:
    """Jaccard index of the labels of queries [Q,P] and gallery [G,P], by distinct gallery row."""

    def __init__(self, queries: np.ndarray, gallery: np.ndarray):
        self.queries = np.asarray(queries, dtype=np.float32)
        kinds, kind, count = np.unique(np.asarray(gallery, dtype=bool), axis=0,
                                       return_inverse=True, return_counts=True)
        self.kinds, self.kind, self.count = kinds.astype(np.float32), kind.ravel(), count

    def table(self, rows: np.ndarray) -> np.ndarray:
        """[c, kinds] for the queries `rows`."""
        both = self.queries[rows] @ self.kinds.T
        any_ = self.queries[rows].sum(1)[:, None] + self.kinds.sum(1) - both
        return both / np.maximum(any_, 1.0)


class _Ties:
    """Groups of equal values in descending rows [c,K]."""

    def __init__(self, held: np.ndarray):
        places = np.arange(held.shape[1])
        new = np.ones(held.shape, bool)
        new[:, 1:] = held[:, 1:] != held[:, :-1]
        self.first = np.maximum.accumulate(np.where(new, places, 0), axis=1)
        ends = np.ones(held.shape, bool)
        ends[:, :-1] = new[:, 1:]
        behind = np.where(ends, places, places[-1])[:, ::-1]
        self.last = np.minimum.accumulate(behind, axis=1)[:, ::-1]

    def before(self, values: np.ndarray) -> np.ndarray:
        """Sum of values[c,K] over the places better than each place's group."""
        total = np.pad(np.cumsum(values, axis=1, dtype=np.float64), ((0, 0), (1, 0)))
        return np.take_along_axis(total, self.first, axis=1)

    def sums(self, values: np.ndarray, cut: np.ndarray, last: Sequence[float]) -> np.ndarray:
        """Sum of values[c,K] over each place's group; `last` is known of rows that are cut."""
        total = np.pad(np.cumsum(values, axis=1, dtype=np.float64), ((0, 0), (1, 0)))
        found = np.take_along_axis(total, self.last + 1, axis=1) - np.take_along_axis(
            total, self.first, axis=1)
        for row, value in zip(cut, last, strict=True):
            found[row, self.first[row, -1]:] = value
        return found

    def sizes(self, cut: np.ndarray, full: Sequence[np.ndarray]) -> np.ndarray:
        """Number of items in each place's group."""
        return self.sums(np.ones(self.first.shape), cut, [len(found) for found in full])


def rank(scores: np.ndarray, rows: np.ndarray, related: Sequence[Relation],
          out: Relation | None, agreement: Agreement | None, depth: int) -> Ranked:
    """Ranks whole numbers scores[c,G], which it changes, for the queries `rows`."""
    count, gallery = scores.shape
    lines = np.arange(count)
    dropped = None if out is None else out.pairs(rows)
    if dropped is not None:
        scores[dropped] = -np.inf
    items = gallery - (0 if dropped is None else np.bincount(dropped[0], minlength=count))

    line, item = related[0].pairs(rows)
    if len(related) > 1:
        pairs = [relation.pairs(rows) for relation in related]
        line, item = np.divmod(np.unique(np.concatenate(
            [one * gallery + other for one, other in pairs])), gallery)
    value = scores[line, item]
    left = np.isfinite(value)
    line, value = line[left], value[left]
    positives = np.bincount(line, minlength=count)
    best = np.full(count, -np.inf, np.float32)
    np.maximum.at(best, line, value)
    above = np.count_nonzero(scores > best[:, None], axis=1)
    tied = np.count_nonzero(scores == best[:, None], axis=1)
    hits = np.bincount(line[value == best[line]], minlength=count)

    # One more than asked tells whether the last place is tied with what is not seen.
    width = min(depth + 1, gallery)
    top = np.argpartition(scores, gallery - width, axis=1)[:, gallery - width:]
    held = np.take_along_axis(scores, top, axis=1)
    order = np.argsort(-held, axis=1, kind="stable")
    top, held = (np.take_along_axis(part, order, axis=1) for part in (top, held))
    ties = _Ties(held[:, :depth])
    cut = lines[(held[:, depth - 1] == held[:, -1]) & np.isfinite(held[:, -1])] \
        if width > depth else lines[:0]
    full = [np.flatnonzero(scores[row] == held[row, -1]) for row in cut]
    top, seen = top[:, :depth], np.isfinite(held[:, :depth])

    relevant = np.any([relation.holds(rows, top) for relation in related], axis=0) & seen
    last = [np.any([relation.holds(rows[[row]], found[None]) for relation in related], axis=0).sum()
            for row, found in zip(cut, full, strict=True)]
    size, good = ties.sizes(cut, full), ties.sums(relevant, cut, last)
    place = np.arange(depth)
    others = (place - ties.first) * (good - 1) / np.maximum(size - 1, 1)
    precision = np.where(good > 0, good / size * (ties.before(relevant) + others + 1), 0.0)
    precision /= place + 1

    jaccard, everywhere = np.zeros((count, depth)), np.zeros(count)
    if agreement is not None:
        table = agreement.table(rows)
        gains = np.take_along_axis(table, agreement.kind[top], axis=1) * seen
        last = [table[row, agreement.kind[found]].sum()
                for row, found in zip(cut, full, strict=True)]
        jaccard = ties.sums(gains, cut, last) / size
        everywhere = table @ agreement.count.astype(np.float64)
        if dropped is not None:
            everywhere -= np.bincount(
                dropped[0], weights=table[dropped[0], agreement.kind[dropped[1]]], minlength=count)
        everywhere /= np.maximum(items, 1)
    return Ranked(items + np.zeros(count, int), positives, above, tied, hits, precision, jaccard,
                   everywhere)
