"""From scores to decisions: threshold rules, thresholded figures, and what they are worth.

The rule moves accuracy by more than ten points on the same scores, and a system that always
answers "no" beats most of them on accuracy; so every figure stands beside the rule's name and
the row of that system.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from brgsa_jax.evals.bootstrap import (
    group_patients,
    interval,
    macro_interval,
    patient_halves,
    statistic_samples,
)
from brgsa_jax.evals.calibration import calibrate
from brgsa_jax.evals.metrics import checked, operating_points

RULES = ("none", "fixed=VALUE", "heldout-patients", "heldout-patients:youden",
         "heldout-patients:f1", "test", "test:youden", "test:f1", "ctclip-test")
"""How a protocol may cut scores: not at all; above a value; at the best point of the other half
of the patients; at the best point of the very labels that are judged (optimistic)."""


class Rule(NamedTuple):
    """A threshold rule.

    Attributes:
        place: "none", "fixed", "heldout-patients", or "test", which is optimistic.
        criterion: what the best point is, see `best_threshold`: "corner", "youden" or "f1".
        value: of a fixed threshold.
    """

    place: str
    criterion: str = "corner"
    value: float = math.nan


class Decisions(NamedTuple):
    """Thresholded figures, numbers or arrays of one shape.

    `f1_positive` is the F1 of the present class; `f1_weighted` averages both classes' by their
    support, which is what many papers call F1. A constant negative answer has f1_positive 0 and
    yet a high accuracy and f1_weighted.
    """

    accuracy: Any
    balanced_accuracy: Any
    f1_positive: Any
    f1_weighted: Any
    precision: Any
    recall: Any
    specificity: Any


def parse_rule(text: str) -> Rule:
    """Reads one of `RULES`; "ctclip-test" is "test" by the name it is known by.

    Raises:
        ValueError: another text.
    """
    place, separator, rest = text.partition("=")
    if place == "fixed" and separator:
        try:
            value = float(rest)
        except ValueError:
            value = math.nan
        if math.isfinite(value):
            return Rule("fixed", value=value)
    elif text == "ctclip-test":
        return Rule("test")
    elif text in RULES:
        place, _, criterion = text.partition(":")
        return Rule(place, criterion or "corner")
    raise ValueError(f"no threshold rule {text!r}; choices: {', '.join(RULES)}")


def _corner(hits: np.ndarray, misses: np.ndarray) -> np.ndarray:
    return -np.hypot(1.0 - hits / hits[-1], misses / misses[-1])


def _youden(hits: np.ndarray, misses: np.ndarray) -> np.ndarray:
    return hits / hits[-1] - misses / misses[-1]


def _f1(hits: np.ndarray, misses: np.ndarray) -> np.ndarray:
    return 2.0 * hits / (hits + misses + hits[-1])


_CRITERIA: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "corner": _corner, "youden": _youden, "f1": _f1}


def best_threshold(labels: np.ndarray, scores: np.ndarray, criterion: str = "corner") -> float:
    """The score t whose rule `score > t` is best; of ties the largest.

    "corner" is the least √((1−TPR)² + FPR²) (CT-CLIP's rule, but on a grid that follows the
    scores), "youden" the largest TPR − FPR, "f1" the largest F1 of the present class.

    Args:
        labels: [N] bool.
        scores: [N].
        criterion: one of the three.

    Returns:
        One of the scores, or −∞ where calling everything is best.

    Raises:
        ValueError: only one class is present, or scores that are not finite.
    """
    worth = _CRITERIA[criterion](*operating_points(labels, scores))
    # Point k calls the k largest distinct scores, that is `score > distinct[k]`.
    distinct = np.unique(np.asarray(scores, dtype=np.float64))[::-1]
    return float(np.append(distinct, -np.inf)[int(np.argmax(worth))])


def call(labels: np.ndarray, scores: np.ndarray, patients: Sequence[str], rule: str,
         seed: int = 0) -> np.ndarray | None:
    """Turns scores[N] of one finding into decisions [N] by a threshold rule.

    Args:
        labels: [N] bool.
        scores: [N].
        patients: N patient ids.
        rule: one of `RULES` but "none". Under "heldout-patients" each half of the patients is
            called at the threshold of the other half; a fixed value calls what lies above it.
        seed: decides the halves.

    Returns:
        [N] bool, or None where a threshold cannot be fitted because one class is missing.

    Raises:
        ValueError: another rule.
    """
    labels, scores = checked(labels, scores)
    parsed = parse_rule(rule)
    if parsed.place == "none":
        raise ValueError("the threshold rule 'none' makes no decisions")
    if parsed.place == "fixed":
        return scores > parsed.value
    everyone = np.ones(len(labels), dtype=bool)
    halves = [(everyone, everyone)] if parsed.place == "test" else patient_halves(patients, seed)
    called = np.zeros(len(labels), dtype=bool)
    for fit, use in halves:
        if not labels[fit].any() or labels[fit].all():
            return None
        called[use] = scores[use] > best_threshold(labels[fit], scores[fit], parsed.criterion)
    return called


def figures(tp: Any, fp: Any, fn: Any, tn: Any) -> Decisions:
    """Figures of counts, numbers or arrays of one shape; a ratio without cases counts as 0."""
    tp, fp, fn, tn = (np.asarray(count, dtype=np.float64) for count in (tp, fp, fn, tn))

    def ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
        return np.divide(part, whole, out=np.zeros_like(whole), where=whole > 0)

    total = tp + fp + fn + tn
    positive, negative = ratio(2 * tp, 2 * tp + fp + fn), ratio(2 * tn, 2 * tn + fp + fn)
    recall, specificity = ratio(tp, tp + fn), ratio(tn, tn + fp)
    return Decisions(ratio(tp + tn, total), (recall + specificity) / 2, positive,
                     ratio(positive * (tp + fn) + negative * (tn + fp), total),
                     ratio(tp, tp + fp), recall, specificity)


def decisions(labels: np.ndarray, called: np.ndarray) -> Decisions:
    """Figures of called[N] bool against labels[N] bool."""
    labels, called = np.asarray(labels, dtype=bool), np.asarray(called, dtype=bool)
    found = figures((labels & called).sum(), (~labels & called).sum(),
                    (labels & ~called).sum(), (~labels & ~called).sum())
    return Decisions(*map(float, found))


def decision_samples(labels: np.ndarray, called: np.ndarray, patients: Sequence[str], *,
                     resamples: int = 1000, seed: int = 0) -> Decisions:
    """Figures of every finding in every resample of patients, the decisions staying as they are.

    Args:
        labels: [N,P] bool.
        called: [N,P] bool.
        patients: N patient ids.
        resamples: R.
        seed: of the draws.

    Returns:
        Decisions of [R,P] arrays, NaN where a resample has one class only.
    """
    grouped = group_patients(patients)
    counts = np.zeros((len(grouped.names), 4, labels.shape[1]))
    np.add.at(counts, grouped.code, np.stack(
        [labels & called, ~labels & called, labels & ~called, ~labels & ~called], axis=1))
    flat = counts.reshape(len(counts), -1)
    drawn = statistic_samples(lambda weights: weights @ flat, len(counts), resamples=resamples,
                              seed=seed).reshape(-1, 4, labels.shape[1])
    tp, fp, fn, tn = drawn.transpose(1, 0, 2)
    undefined = (tp + fn == 0) | (tn + fp == 0)
    return Decisions(*(np.where(undefined, np.nan, part) for part in figures(tp, fp, fn, tn)))


def all_negative(findings: Sequence[str], labels: np.ndarray) -> dict[str, Any]:
    """The row of a system that always answers "no": figures of metrics.json without intervals.

    The macro is over the findings that have both classes, as for AUROC.

    Args:
        findings: P names.
        labels: [N,P] bool.
    """
    rows = [decisions(column, np.zeros(len(column), bool)) for column in labels.T]
    both = [row for row, column in zip(rows, labels.T, strict=True)
            if column.any() and not column.all()]
    return {"macro": _mean(both),
            "findings": {name: row._asdict()
                         for name, row in zip(findings, rows, strict=True)}}


def judge_decisions(protocol: Any, labels: np.ndarray, scores: np.ndarray,
                    patients: Sequence[str]) -> dict[str, Any]:
    """The entry "decisions" of metrics.json: figures with intervals beside the all-negative row.

    Args:
        protocol: its findings, threshold, calibration, resamples, seed and level are taken.
        labels: [N,P] bool.
        scores: [N,P].
        patients: N patient ids.
    """
    if protocol.calibration != "none":
        scores = calibrate(labels, scores, patients, protocol.calibration, protocol.seed)
    calls = {}
    for p, name in enumerate(protocol.findings):
        truth = labels[:, p]
        if truth.any() and not truth.all() and np.isfinite(scores[:, p]).all():
            called = call(truth, scores[:, p], patients, protocol.threshold, protocol.seed)
            if called is not None:
                calls[name] = called
    names = list(calls)
    truth = labels[:, [protocol.findings.index(name) for name in names]]
    rows = [decisions(column, called)
            for column, called in zip(truth.T, calls.values(), strict=True)]
    found = {"rule": protocol.threshold, "calibration": protocol.calibration,
             "optimistic": parse_rule(protocol.threshold).place == "test",
             "macro": _mean(rows), "all_negative": all_negative(names, truth)["macro"],
             "undefined": [name for name in protocol.findings if name not in calls],
             "findings": {name: row._asdict() for name, row in zip(names, rows, strict=True)},
             "intervals": {"macro": None, "findings": {}}}
    if names:
        samples = decision_samples(truth, np.column_stack(list(calls.values())), patients,
                                   resamples=protocol.resamples, seed=protocol.seed)
        found["intervals"] = _intervals(names, rows, samples, protocol.level)
    return found


def _intervals(names: Sequence[str], rows: Sequence[Decisions], samples: Decisions,
               level: float) -> dict[str, Mapping[str, Any]]:
    """Interval and undefined resamples of every figure, of the macro and of each finding."""
    values = Decisions(*np.array(rows).T)
    macro, findings = {}, {name: {} for name in names}
    for figure, value, drawn in zip(Decisions._fields, values, samples, strict=True):
        macro[figure] = macro_interval(value, drawn, level).as_dict()
        for p, name in enumerate(names):
            findings[name][figure] = interval(value[p], drawn[:, p], level).as_dict()
    return {"macro": macro, "findings": findings}


def _mean(rows: Sequence[Decisions]) -> dict[str, float] | None:
    return Decisions(*map(float, np.mean(rows, axis=0)))._asdict() if rows else None
