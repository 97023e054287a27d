"""Threshold rules and thresholded figures against scikit-learn, and what a rule is worth."""

import dataclasses
import math

import numpy as np
import pytest
from sklearn import metrics as reference

from brgsa_jax.evals import thresholds
from brgsa_jax.evals.bootstrap import draws
from brgsa_jax.evals.calibration import calibrate
from brgsa_jax.evals.protocol import Protocol

# Spread like the findings of a chest CT benchmark: few common, many rare, 19.3 % on average.
PREVALENCES = np.array([.46, .37, .33, .31, .29, .27, .26, .20, .18, .16, .13, .12, .10, .09, .08,
                        .07, .03, .024])


def case(seed, ties):
    rng = np.random.default_rng(seed)
    labels = rng.random(200) < 0.2
    scores = rng.normal(size=200) + labels
    return labels, np.round(scores, 1) if ties else scores, rng


@pytest.mark.parametrize("ties", [False, True])
def test_corner_threshold_is_the_best_of_all_and_the_largest_of_ties(ties):
    labels, scores, _ = case(11, ties)

    def distance(threshold):
        called = scores > threshold
        return math.hypot(1 - called[labels].mean(), called[~labels].mean())

    found = thresholds.best_threshold(labels, scores)
    best = min(distance(t) for t in np.unique(scores))
    assert distance(found) == pytest.approx(best, abs=1e-15)
    assert found == max(t for t in np.unique(scores) if distance(t) <= best + 1e-15)


def scan(labels, scores, worth):
    """The best worth over all thresholds, and the largest threshold that reaches it."""
    worths = {t: worth(scores > t) for t in (-np.inf, *np.unique(scores))}
    return max(t for t in worths if worths[t] >= max(worths.values()) - 1e-13)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_youden_and_f1_are_the_best_of_all_thresholds(seed, ties):
    labels, scores, _ = case(seed, ties)
    assert thresholds.best_threshold(labels, scores, "youden") == scan(
        labels, scores, lambda called: called[labels].mean() - called[~labels].mean())
    assert thresholds.best_threshold(labels, scores, "f1") == scan(
        labels, scores, lambda called: 2 * (called & labels).sum() / (called.sum() + labels.sum()))


def test_calling_everything_may_be_the_best_f1():
    labels = np.array([True, False, True])
    assert thresholds.best_threshold(labels, np.array([0.0, 1.0, 0.0]), "f1") == -np.inf
    with pytest.raises(ValueError, match="both classes"):
        thresholds.best_threshold(np.ones(3, bool), np.arange(3), "f1")


@pytest.mark.parametrize(("text", "rule"), [
    ("none", ("none", "corner")), ("heldout-patients", ("heldout-patients", "corner")),
    ("heldout-patients:f1", ("heldout-patients", "f1")), ("test", ("test", "corner")),
    ("test:youden", ("test", "youden")), ("ctclip-test", ("test", "corner"))])
def test_rules_are_read(text, rule):
    assert thresholds.parse_rule(text)[:2] == rule


def test_a_fixed_rule_has_a_value_and_other_texts_are_refused():
    assert thresholds.parse_rule("fixed=-0.25") == ("fixed", "corner", -0.25)
    for text in ("", "fixed", "fixed=", "fixed=x", "fixed=nan", "fixed=inf", "fixed:0.5",
                 "fixed=VALUE", "test:", "test:best", "none:f1", "ctclip-test:f1", "heldout"):
        with pytest.raises(ValueError, match="choices: none, fixed=VALUE, heldout-patients"):
            thresholds.parse_rule(text)


def test_fixed_calls_what_lies_above():
    found = thresholds.call([0, 1, 1], [0.5, 0.5, 0.6], "abc", "fixed=0.5")
    assert found.tolist() == [False, False, True]


def test_decisions_equal_scikit_learn():
    labels, scores, _ = case(5, False)
    called = scores > 0.6
    found = thresholds.decisions(labels, called)
    assert found.accuracy == pytest.approx(reference.accuracy_score(labels, called))
    assert found.f1_positive == pytest.approx(reference.f1_score(labels, called))
    assert found.f1_weighted == pytest.approx(
        reference.f1_score(labels, called, average="weighted"))
    assert found.precision == pytest.approx(reference.precision_score(labels, called))
    assert found.recall == pytest.approx(reference.recall_score(labels, called))
    assert found.balanced_accuracy == pytest.approx(
        reference.balanced_accuracy_score(labels, called))
    assert found.specificity == pytest.approx(reference.recall_score(~labels, ~called))


def test_saying_no_to_everything_looks_good_only_where_it_should():
    labels = np.arange(100) < 19
    found = thresholds.decisions(labels, np.zeros(100, bool))
    assert (found.accuracy, found.f1_positive, found.precision) == (0.81, 0.0, 0.0)
    assert found.f1_weighted == pytest.approx(0.81 * 2 * 0.81 / 1.81)


def test_heldout_threshold_never_sees_the_patients_it_calls():
    labels, scores, rng = case(2, False)
    patients = [f"p{i // 2}" for i in range(200)]
    called = thresholds.call(labels, scores, patients, "heldout-patients", seed=4)
    unique = np.unique(patients)
    side = np.random.default_rng(4).permutation(len(unique)) % 2
    half = np.array([side[np.searchsorted(unique, p)] for p in patients]) == 0
    for fit, use in ((half, ~half), (~half, half)):
        threshold = thresholds.best_threshold(labels[fit], scores[fit])
        np.testing.assert_array_equal(called[use], scores[use] > threshold)
    assert all(half[0::2] == half[1::2])


def test_test_rule_is_the_corner_of_the_test_labels_and_a_lone_class_has_none():
    labels, scores, _ = case(2, False)
    patients = [str(i) for i in range(200)]
    np.testing.assert_array_equal(thresholds.call(labels, scores, patients, "ctclip-test"),
                                  scores > thresholds.best_threshold(labels, scores))
    one = np.zeros(200, bool)
    one[0] = True
    assert thresholds.call(one, scores, patients, "heldout-patients") is None
    with pytest.raises(ValueError, match="none"):
        thresholds.call(labels, scores, patients, "none")


@pytest.mark.parametrize("called", [0, 1])
@pytest.mark.parametrize("label", [0, 1])
def test_constant_answers_equal_scikit_learn_with_a_ratio_of_nothing_as_zero(label, called):
    labels, calls = np.full(7, label, bool), np.full(7, called, bool)
    found = thresholds.decisions(labels, calls)
    assert found.accuracy == reference.accuracy_score(labels, calls)
    assert found.f1_positive == reference.f1_score(labels, calls, zero_division=0)
    assert found.f1_weighted == reference.f1_score(labels, calls, average="weighted",
                                                   zero_division=0)
    assert found.precision == reference.precision_score(labels, calls, zero_division=0)
    assert found.recall == reference.recall_score(labels, calls, zero_division=0)


def test_samples_equal_the_figures_of_rows_drawn_by_patient():
    rng = np.random.default_rng(0)
    labels, called = rng.random((40, 2)) < 0.3, rng.random((40, 2)) < 0.4
    labels[:, 1] = False
    labels[3, 1] = True
    patients = [f"p{i // 4}" for i in range(40)]
    found = thresholds.decision_samples(labels, called, patients, resamples=30, seed=2)
    counts = np.concatenate(list(draws(10, 30, 2)))
    for r, row in enumerate(counts):
        rows = np.repeat(np.arange(40), np.repeat(row, 4))
        expected = thresholds.decisions(labels[rows, 0], called[rows, 0])
        np.testing.assert_allclose([part[r, 0] for part in found], expected, atol=1e-13)
    # The one positive is not drawn: no figure, rather than a recall of 0.
    missing = counts[:, 0] == 0
    assert missing.any() and not missing.all()
    for part in found:
        np.testing.assert_array_equal(np.isnan(part[:, 1]), missing)


def simulated(rows=3000, seed=0):
    """Gaussian scores whose macro AUROC is about 0.79, with the prevalences above."""
    rng = np.random.default_rng(seed)
    labels = rng.random((rows, 18)) < PREVALENCES
    return labels, rng.normal(size=labels.shape) + 1.135 * labels, [
        f"p{i // 2}" for i in range(rows)]


def test_the_constant_row_of_a_benchmark():
    labels, _, _ = simulated()
    found = thresholds.all_negative([str(p) for p in range(18)], labels)["macro"]
    assert found["accuracy"] == pytest.approx(0.807, abs=0.005)
    assert found["f1_weighted"] == pytest.approx(0.725, abs=0.01)
    assert found["f1_positive"] == found["precision"] == found["recall"] == 0
    assert found["balanced_accuracy"] == 0.5 and found["specificity"] == 1


def test_the_rule_moves_accuracy_by_more_than_ten_points_on_the_same_scores():
    labels, scores, patients = simulated()
    protocol = Protocol("x", tuple(f"f{p}" for p in range(18)), resamples=2)
    found = {}
    for rule in ("test", "test:youden", "test:f1", "heldout-patients", "heldout-patients:f1"):
        found[rule] = thresholds.judge_decisions(
            dataclasses.replace(protocol, threshold=rule), labels, scores, patients)
    found["fixed=0.5"] = thresholds.judge_decisions(
        dataclasses.replace(protocol, threshold="fixed=0.5", calibration="platt"), labels, scores,
        patients)
    accuracy = {rule: entry["macro"]["accuracy"] for rule, entry in found.items()}
    assert accuracy["fixed=0.5"] - accuracy["test:youden"] > 0.1
    # Most rules are less accurate than always answering "no".
    assert sum(value < found["test"]["all_negative"]["accuracy"] for value in accuracy.values()) > 3
    # Fitting on the test labels adds next to nothing on common findings.
    assert abs(accuracy["test"] - accuracy["heldout-patients"]) < 0.02
    assert {rule for rule, entry in found.items() if entry["optimistic"]} == {
        "test", "test:youden", "test:f1"}


def test_a_fixed_cut_after_calibration_cuts_the_calibrated_scores():
    labels, scores, patients = simulated(rows=600)
    scores = 0.05 * scores
    protocol = Protocol("x", tuple(f"f{p}" for p in range(18)), resamples=2, seed=4,
                        threshold="fixed=0.5", calibration="platt")
    found = thresholds.judge_decisions(protocol, labels, scores, patients)
    name = "f0"
    called = calibrate(labels, scores, patients, "platt", 4)[:, 0] > 0.5
    assert found["findings"][name] == thresholds.decisions(labels[:, 0], called)._asdict()
    raw = thresholds.judge_decisions(dataclasses.replace(protocol, calibration="none"), labels,
                                     scores, patients)
    assert raw["macro"]["recall"] == 0 < found["macro"]["recall"]


def test_intervals_stand_around_their_figures_and_a_lone_class_is_listed():
    labels, scores, patients = simulated(rows=400)
    labels[:, 3] = False
    protocol = Protocol("x", tuple(f"f{p}" for p in range(18)), resamples=100,
                        threshold="fixed=0.5")
    found = thresholds.judge_decisions(protocol, labels, scores, patients)
    assert found["undefined"] == ["f3"] and "f3" not in found["intervals"]["findings"]
    for figure, value in found["macro"].items():
        entry = found["intervals"]["macro"][figure]
        assert entry["value"] == pytest.approx(value, abs=1e-15)
        assert entry["low"] < value < entry["high"]
    for name, row in found["findings"].items():
        for figure, value in row.items():
            entry = found["intervals"]["findings"][name][figure]
            assert entry["value"] == value and entry["low"] <= value <= entry["high"]


def test_no_finding_to_decide_on_is_no_error():
    protocol = Protocol("x", ("a",), threshold="test", resamples=5)
    found = thresholds.judge_decisions(protocol, np.zeros((4, 1), bool), np.ones((4, 1)), "abcd")
    assert found["macro"] is None and found["all_negative"] is None
    assert found["undefined"] == ["a"]
