"""Rank metrics and decisions against scikit-learn, and the JSON they are written to."""

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


def test_roc_curve_has_the_area_of_the_auroc_and_its_ends():
    labels, scores, _ = case(3, True)
    curve = metrics.roc_curve(labels, scores)
    area = reference.auc(curve.false_positive_rate, curve.true_positive_rate)
    assert area == pytest.approx(metrics.auroc(labels, scores), abs=1e-13)
    assert (curve.false_positive_rate[0], curve.true_positive_rate[0]) == (0, 0)
    assert (curve.false_positive_rate[-1], curve.true_positive_rate[-1]) == (1, 1)
    with pytest.raises(ValueError, match="both classes"):
        metrics.roc_curve(np.zeros(3, bool), np.arange(3))


@pytest.mark.parametrize("ties", [False, True])
def test_corner_threshold_is_the_best_of_all_and_the_largest_of_ties(ties):
    labels, scores, _ = case(11, ties)

    def distance(threshold):
        called = scores > threshold
        return math.hypot(1 - called[labels].mean(), called[~labels].mean())

    found = metrics.corner_threshold(labels, scores)
    best = min(distance(t) for t in np.unique(scores))
    assert distance(found) == pytest.approx(best, abs=1e-15)
    assert found == max(t for t in np.unique(scores) if distance(t) <= best + 1e-15)


def test_decisions_equal_scikit_learn():
    labels, scores, _ = case(5, False)
    called = scores > 0.6
    found = metrics.decisions(labels, called)
    assert found.accuracy == pytest.approx(reference.accuracy_score(labels, called))
    assert found.f1 == pytest.approx(reference.f1_score(labels, called))
    assert found.f1_weighted == pytest.approx(
        reference.f1_score(labels, called, average="weighted"))
    assert found.precision == pytest.approx(reference.precision_score(labels, called))
    assert found.recall == pytest.approx(reference.recall_score(labels, called))
    assert found.specificity == pytest.approx(reference.recall_score(~labels, ~called))


def test_saying_no_to_everything_looks_good_only_where_it_should():
    labels = np.arange(100) < 19
    found = metrics.decisions(labels, np.zeros(100, bool))
    assert (found.accuracy, found.f1, found.precision) == (0.81, 0.0, 0.0)
    assert found.f1_weighted == pytest.approx(0.81 * 2 * 0.81 / 1.81)


def test_heldout_threshold_never_sees_the_patients_it_calls():
    labels, scores, rng = case(2, False)
    patients = [f"p{i // 2}" for i in range(200)]
    called = metrics.call(labels, scores, patients, "heldout-patients", seed=4)
    unique = np.unique(patients)
    side = np.random.default_rng(4).permutation(len(unique)) % 2
    half = np.array([side[np.searchsorted(unique, p)] for p in patients]) == 0
    for fit, use in ((half, ~half), (~half, half)):
        threshold = metrics.corner_threshold(labels[fit], scores[fit])
        np.testing.assert_array_equal(called[use], scores[use] > threshold)
    assert all(half[0::2] == half[1::2])


def test_test_rule_is_the_corner_of_the_test_labels_and_a_lone_class_has_none():
    labels, scores, _ = case(2, False)
    patients = [str(i) for i in range(200)]
    np.testing.assert_array_equal(metrics.call(labels, scores, patients, "ctclip-test"),
                                  scores > metrics.corner_threshold(labels, scores))
    one = np.zeros(200, bool)
    one[0] = True
    assert metrics.call(one, scores, patients, "heldout-patients") is None
    with pytest.raises(ValueError, match="none"):
        metrics.call(labels, scores, patients, "none")


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
