"""Calibration on held-out patients, against scikit-learn and against data of known truth."""

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import expit, logit
from sklearn.calibration import calibration_curve
from sklearn.metrics import brier_score_loss, roc_auc_score

from brgsa_jax.config import UserError
from brgsa_jax.evals import calibration as cal
from brgsa_jax.evals.bootstrap import patient_halves
from brgsa_jax.evals.protocol import Protocol


def cosines(rows=600, findings=3, seed=0, each=2):
    """Labels that follow known probabilities, and cosine-like scores that rank them."""
    rng = np.random.default_rng(seed)
    z = 1.5 * rng.normal(size=(rows, findings)) - 1.2
    labels = rng.random(z.shape) < expit(z)
    return labels, 0.1 + 0.05 * z, [f"p{i // each}" for i in range(rows)], expit(z)


def test_platt_minimises_the_cross_entropy_of_smoothed_targets_on_the_other_half():
    labels, scores, patients, _ = cosines(findings=1)
    found = cal.calibrate(labels, scores, patients, "platt", seed=3)[:, 0]
    for fit, use in patient_halves(patients, 3):
        y, s = labels[fit, 0], scores[fit, 0]
        target = np.where(y, (y.sum() + 1) / (y.sum() + 2), 1 / ((~y).sum() + 2))

        def loss(v, s=s, target=target):
            z = v[0] * s + v[1]
            return np.sum(np.logaddexp(0, z) - target * z)

        best = minimize(loss, [1.0, 0.0], method="BFGS", options={"gtol": 1e-9})
        np.testing.assert_allclose(found[use], expit(best.x[0] * scores[use, 0] + best.x[1]),
                                   atol=2e-6)


def test_temperature_has_one_parameter_and_keeps_one_half_at_a_score_of_zero():
    labels, _, patients, truth = cosines(findings=1, rows=2000)
    z = logit(truth)
    found = cal.calibrate(labels, 3.0 * z, patients, "temperature")[:, 0]
    for _, use in patient_halves(patients, 0):
        temperature = (3.0 * z[use, 0]) / logit(found[use])
        np.testing.assert_allclose(temperature, temperature[0], rtol=1e-9)
        assert temperature[0] == pytest.approx(3.0, rel=0.15)


def test_a_score_that_ranks_backwards_gets_no_negative_temperature():
    labels, scores, patients, _ = cosines(findings=1)
    np.testing.assert_allclose(
        cal.calibrate(labels, 0.1 - scores, patients, "temperature"), 0.5, atol=1e-9)


@pytest.mark.parametrize("method", cal.METHODS)
def test_no_patient_decides_on_itself(method):
    labels, scores, patients, _ = cosines(rows=120)
    before = cal.calibrate(labels, scores, patients, method, seed=1)
    fit, use = patient_halves(patients, 1)[0]
    assert not set(np.array(patients)[fit]) & set(np.array(patients)[use])
    flipped = labels.copy()
    flipped[use] = ~flipped[use]
    after = cal.calibrate(flipped, scores, patients, method, seed=1)
    np.testing.assert_array_equal(after[use], before[use])
    assert (after[fit] != before[fit]).all()


def test_probabilities_enter_as_log_odds():
    labels, scores, patients, _ = cosines()
    np.testing.assert_allclose(cal.calibrate(labels, expit(9 * scores), patients),
                               cal.calibrate(labels, 9 * scores - 2, patients), atol=1e-7)
    # Certain answers have no log-odds and stay finite all the same.
    certain = cal.calibrate(labels, np.round(expit(9 * scores)), patients)
    assert ((certain > 0) & (certain < 1)).all()


def test_perfect_separation_and_constant_scores_stay_finite():
    labels, scores, patients, _ = cosines()
    for method in cal.METHODS:
        perfect = cal.calibrate(labels, np.where(labels, 1.0, -1.0), patients, method)
        assert (perfect[labels] > 0.97).all() and (perfect[~labels] < 0.03).all()
        assert ((perfect > 0) & (perfect < 1)).all()
    constant = cal.calibrate(labels, np.full(scores.shape, -3.0), patients)
    np.testing.assert_allclose(constant, np.broadcast_to(labels.mean(axis=0), scores.shape),
                               atol=0.05)


def test_a_finding_with_one_class_in_a_half_is_nan_and_the_others_are_not():
    labels, scores, patients, _ = cosines()
    labels[:, 1] = False
    labels[5, 1] = True
    found = cal.calibrate(labels, scores, patients)
    assert np.isnan(found).any(axis=0).tolist() == [False, True, False]
    assert np.isnan(found[:, 1]).all()


def test_bad_input_is_refused():
    labels, scores, patients, _ = cosines(rows=20)
    with pytest.raises(ValueError, match="no calibration 'beta'; choices: temperature, platt"):
        cal.calibrate(labels, scores, patients, "beta")
    with pytest.raises(ValueError, match="finite"):
        cal.calibrate(labels, scores * np.nan, patients)
    with pytest.raises(UserError, match="1 patient"):
        cal.calibrate(labels, scores, ["a"] * 20)
    with pytest.raises(ValueError, match=r"\[0,1\]"):
        cal.reliability(labels[:, 0], np.full(20, np.nan))
    with pytest.raises(ValueError, match=r"\[0,1\]"):
        cal.ece(labels[:, 0], scores[:, 0] - 1)


@pytest.mark.parametrize("coarse", [False, True])
def test_reliability_and_brier_equal_scikit_learn(coarse):
    labels, _, _, truth = cosines()
    y, p = labels[:, 0], np.round(truth[:, 0], 1) if coarse else truth[:, 0]
    found = cal.reliability(y, p)
    share, mean = calibration_curve(y, p, n_bins=10)
    np.testing.assert_allclose(found.share, share, atol=1e-13)
    np.testing.assert_allclose(found.mean, mean, atol=1e-13)
    assert found.count.sum() == len(y) and (found.count > 0).all()
    assert cal.brier(y, p) == pytest.approx(brier_score_loss(y, p), abs=1e-14)
    by_hand = sum(n / len(y) * abs(s - m) for m, s, n in zip(*found, strict=True))
    assert cal.ece(y, p) == pytest.approx(by_hand, abs=1e-14)


def test_the_extremes_of_the_errors():
    labels = np.array([True, False, False, False])
    assert (cal.ece(labels, labels * 1.0), cal.brier(labels, labels * 1.0)) == (0, 0)
    assert (cal.ece(labels, 1.0 - labels), cal.brier(labels, 1.0 - labels)) == (1, 1)
    assert cal.ece(labels, np.full(4, 0.25)) == 0
    assert cal.brier(labels, np.full(4, 0.25)) == pytest.approx(0.25 * 0.75)


def test_calibration_makes_probabilities_of_cosines_and_keeps_the_ranking_of_each_half():
    labels, scores, patients, truth = cosines(rows=4000)
    protocol = Protocol("three", ("a", "b", "c"), resamples=200)
    found = cal.judge_calibration(protocol, labels, scores, patients)
    assert found["raw_is"] == "logistic of the score"
    assert found["raw"]["ece"] > 0.2 > 0.03 > found["platt"]["ece"]
    assert found["platt"]["brier"] == pytest.approx(np.mean((truth - labels) ** 2), abs=0.003)
    # Also below the answer that knows nothing but how common a finding is.
    for other in ("raw", "prevalence"):
        assert found["platt"]["brier_below"][other]["low"] > 0
    # That answer has no calibration error to speak of and is worthless, which its Brier shows.
    assert found["prevalence"]["ece"] < 0.03
    assert found["temperature"]["brier_below"]["prevalence"]["high"] < 0
    probabilities = cal.calibrate(labels, scores, patients)
    for _, use in patient_halves(patients, 0):
        assert roc_auc_score(labels[use, 0], probabilities[use, 0]) == pytest.approx(
            roc_auc_score(labels[use, 0], scores[use, 0]), abs=1e-12)


def test_probabilities_that_are_true_already_are_left_about_as_they_are():
    labels, _, patients, truth = cosines(rows=4000)
    protocol = Protocol("three", ("a", "b", "c"), resamples=50)
    found = cal.judge_calibration(protocol, labels, truth, patients)
    assert found["raw_is"] == "probability"
    assert found["platt"]["brier"] == pytest.approx(found["raw"]["brier"], abs=0.001)
    entry = found["raw"]["findings"]["b"]
    assert entry == {"ece": cal.ece(labels[:, 1], truth[:, 1]),
                     "brier": pytest.approx(cal.brier(labels[:, 1], truth[:, 1]), abs=1e-15)}


def test_findings_that_cannot_be_fitted_leave_every_row_of_the_table():
    labels, scores, patients, _ = cosines()
    labels[:, 1] = False
    found = cal.judge_calibration(Protocol("three", ("a", "b", "c"), resamples=20), labels, scores,
                                  patients)
    for name in ("raw", "prevalence", *cal.METHODS):
        assert np.isnan(list(found[name]["findings"]["b"].values())).all()
        assert found[name]["brier"] == pytest.approx(
            np.mean([found[name]["findings"][f]["brier"] for f in "ac"]), abs=1e-15)
