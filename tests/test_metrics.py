"""Rank metrics and curves against scikit-learn, also on adversarial input, and their files."""

import json
import math

import numpy as np
import pytest
from sklearn import metrics as reference

from brgsa_jax.evals import metrics


def case(seed, ties):
    rng = np.random.default_rng(seed)
    labels = rng.random(200) < 0.2
    scores = rng.normal(size=200) + labels
    return labels, np.round(scores, 1) if ties else scores, rng


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_auroc_and_average_precision_equal_scikit_learn(seed, ties):
    labels, scores, _ = case(seed, ties)
    assert metrics.auroc(labels, scores) == pytest.approx(
        reference.roc_auc_score(labels, scores), abs=1e-13)
    assert metrics.auprc(labels, scores) == pytest.approx(
        reference.average_precision_score(labels, scores), abs=1e-13)


@pytest.mark.parametrize("ties", [False, True])
def test_weights_equal_scikit_learn_column_by_column(ties):
    labels, scores, rng = case(7, ties)
    weights = rng.integers(0, 4, size=(200, 6))
    found = metrics.rank_metrics(labels, scores, weights)
    for r in range(6):
        w = weights[:, r]
        assert found.auroc[r] == pytest.approx(
            reference.roc_auc_score(labels, scores, sample_weight=w), abs=1e-13)
        assert found.auprc[r] == pytest.approx(
            reference.average_precision_score(labels, scores, sample_weight=w), abs=1e-13)


def test_constant_scores_are_chance():
    labels, _, _ = case(1, False)
    assert metrics.auroc(labels, np.zeros(200)) == 0.5
    assert metrics.auprc(labels, np.zeros(200)) == pytest.approx(labels.mean())


def test_one_class_is_undefined_whole_or_by_weight():
    assert math.isnan(metrics.auroc(np.zeros(4, bool), np.arange(4)))
    assert math.isnan(metrics.auprc(np.ones(4, bool), np.arange(4)))
    found = metrics.rank_metrics(np.array([True, False]), np.array([1.0, 0.0]),
                                 np.array([[0, 1, 1], [1, 0, 1]]))
    np.testing.assert_array_equal(np.isnan(found.auroc), [True, True, False])
    np.testing.assert_array_equal(np.isnan(found.auprc), [True, True, False])


def test_macro_leaves_undefined_findings_out():
    assert metrics.macro(np.array([0.5, np.nan, 0.7])) == pytest.approx(0.6)
    assert math.isnan(metrics.macro(np.array([np.nan])))


def adversarial(kind, rows=150):
    """Scores that break careless ranking code."""
    rng = np.random.default_rng(len(kind))
    labels = rng.random(rows) < 0.3
    scores = {
        "one value": np.full(rows, -0.3), "two values": labels.astype(float),
        "reversed": -labels.astype(float), "signed zeros": rng.choice([0.0, -0.0], rows),
        "next floats": 1 + np.spacing(1.0) * rng.integers(0, 5, rows),
        "subnormal": 5e-324 * rng.integers(0, 4, rows),
        "huge": 1e305 * rng.choice([-1.0, 0.5, 1.0], rows),
        "few ties": np.where(rng.random(rows) < 0.9, rng.normal(size=rows), 0.1),
        "sorted": np.sort(rng.normal(size=rows)), "ties of one class": np.where(
            labels, rng.normal(size=rows), np.round(rng.normal(size=rows))),
    }[kind]
    return labels, scores


KINDS = ("one value", "two values", "reversed", "signed zeros", "next floats", "subnormal", "huge",
         "few ties", "sorted", "ties of one class")


@pytest.mark.parametrize("kind", KINDS)
def test_adversarial_scores_equal_scikit_learn(kind):
    labels, scores = adversarial(kind)
    assert metrics.auroc(labels, scores) == pytest.approx(
        reference.roc_auc_score(labels, scores), abs=1e-12)
    assert metrics.auprc(labels, scores) == pytest.approx(
        reference.average_precision_score(labels, scores), abs=1e-12)
    weights = np.random.default_rng(0).integers(0, 3, (len(labels), 5))
    found = metrics.rank_metrics(labels, scores, weights)
    for r in range(5):
        assert found.auroc[r] == pytest.approx(
            reference.roc_auc_score(labels, scores, sample_weight=weights[:, r]), abs=1e-12)
        assert found.auprc[r] == pytest.approx(
            reference.average_precision_score(labels, scores, sample_weight=weights[:, r]),
            abs=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_curves_equal_scikit_learn_point_by_point(kind):
    labels, scores = adversarial(kind)
    false, true, _ = reference.roc_curve(labels, scores, drop_intermediate=False)
    roc = metrics.roc_curve(labels, scores)
    np.testing.assert_allclose(roc.false_positive_rate, false, atol=1e-13)
    np.testing.assert_allclose(roc.true_positive_rate, true, atol=1e-13)
    precision, recall, _ = reference.precision_recall_curve(labels, scores)
    pr = metrics.pr_curve(labels, scores)
    np.testing.assert_allclose(pr.recall, recall[::-1], atol=1e-13)
    np.testing.assert_allclose(pr.precision, precision[::-1], atol=1e-13)
    area = np.sum(np.diff(pr.recall) * pr.precision[1:])
    assert area == pytest.approx(metrics.auprc(labels, scores), abs=1e-13)


@pytest.mark.parametrize("labels", [[0, 0, 0], [1, 1, 1]])
def test_a_curve_of_one_class_is_refused(labels):
    for curve in (metrics.roc_curve, metrics.pr_curve):
        with pytest.raises(ValueError, match="both classes"):
            curve(labels, np.arange(3))


@pytest.mark.parametrize(("labels", "scores", "message"), [
    ([0, 1, 1], [0.1, np.nan, 0.2], "1 scores are not finite"),
    ([0, 1, 1], [0.1, np.inf, -np.inf], "2 scores are not finite"),
    ([0, np.nan, 1], [0.1, 0.2, 0.3], "labels must be 0 or 1"),
    ([0, 2, 1], [0.1, 0.2, 0.3], "labels must be 0 or 1"),
    ([0, -1, 1], [0.1, 0.2, 0.3], "labels must be 0 or 1"),
    ([0, 1], [0.1, 0.2, 0.3], "same length"),
    ([[0, 1]], [[0.1, 0.2]], "same length"),
])
def test_what_cannot_be_ranked_is_refused_and_not_ranked_somehow(labels, scores, message):
    for function in (metrics.auroc, metrics.auprc, metrics.roc_curve, metrics.pr_curve):
        with pytest.raises(ValueError, match=message):
            function(labels, scores)


def test_weights_need_not_be_whole():
    labels, scores, rng = case(7, True)
    weights = rng.random((200, 2)) * (rng.random((200, 2)) < 0.8) / 50
    found = metrics.rank_metrics(labels, scores, weights)
    assert found.auroc[1] == pytest.approx(
        reference.roc_auc_score(labels, scores, sample_weight=weights[:, 1]), abs=1e-12)
    assert found.auprc[1] == pytest.approx(
        reference.average_precision_score(labels, scores, sample_weight=weights[:, 1]), abs=1e-12)


def test_metrics_are_written_whole_precise_and_without_nan(tmp_path):
    path = tmp_path / "deep" / "metrics.json"
    metrics.write_metrics(path, {
        "a": np.float64(1 / 3), "b": float("nan"), "c": np.array([np.inf, 1]),
        "d": (np.int64(3), np.bool_(True)), "Ü": None})
    text = path.read_text(encoding="utf-8")
    assert json.loads(text) == {"a": 1 / 3, "b": None, "c": [None, 1.0], "d": [3, True], "Ü": None}
    with pytest.raises(TypeError):
        metrics.write_metrics(path, {"a": object()})
    assert path.read_text(encoding="utf-8") == text
    assert [file.name for file in path.parent.iterdir()] == ["metrics.json"]
