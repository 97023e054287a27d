"""DeLong's variance and test against their slow definitions."""

import math

import numpy as np
import pytest
from scipy.stats import norm, rankdata
from sklearn.metrics import roc_auc_score

from brgsa_jax.evals import delong


def case(seed, ties, rows=80):
    rng = np.random.default_rng(seed)
    labels = rng.random(rows) < 0.3
    first = rng.normal(size=rows) + labels
    second = first + rng.normal(size=rows)
    return labels, *((np.round(s, 1) if ties else s) for s in (first, second))


def kernel(labels, scores):
    """[positives, negatives]: 1 where the positive is above, ½ where tied."""
    gap = scores[labels][:, None] - scores[~labels][None]
    return (gap > 0) + 0.5 * (gap == 0)


def slow(labels, *scores):
    """AUROCs and their covariance by the definition (DeLong et al. 1988, eqs. 4 to 7)."""
    tables = [kernel(labels, s) for s in scores]
    areas = np.array([t.mean() for t in tables])
    positive, negative = (np.atleast_2d(np.cov([t.mean(axis=axis) for t in tables]))
                          for axis in (1, 0))
    return areas, positive / tables[0].shape[0] + negative / tables[0].shape[1]


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_variance_and_interval_equal_the_definition(seed, ties):
    labels, scores, _ = case(seed, ties)
    (area,), ((variance,),) = slow(labels, scores)
    found = delong.delong(labels, scores, 0.9)
    assert found.value == pytest.approx(area, abs=1e-14)
    assert found.value == pytest.approx(roc_auc_score(labels, scores), abs=1e-14)
    assert found.variance == pytest.approx(variance, rel=1e-11)
    low, high = norm.interval(0.9, area, math.sqrt(variance))
    assert (found.low, found.high) == pytest.approx((low, min(high, 1.0)), rel=1e-12)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_paired_test_equals_the_definition(seed, ties):
    labels, first, second = case(seed, ties)
    areas, covariance = slow(labels, first, second)
    variance = covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1]
    found = delong.delong_test(labels, first, second)
    assert found.value == pytest.approx(areas[0] - areas[1], abs=1e-13)
    assert found.variance == pytest.approx(variance, rel=1e-10)
    z = (areas[0] - areas[1]) / math.sqrt(variance)
    assert found.p == pytest.approx(2 * norm.sf(abs(z)), rel=1e-9)
    mirrored = delong.delong_test(labels, second, first)
    assert (mirrored.value, mirrored.p) == (-found.value, found.p)


def test_midranks_equal_scipy():
    x = np.random.default_rng(0).integers(0, 9, 50)
    np.testing.assert_array_equal(delong.midranks(x), rankdata(x))


def test_equal_scores_do_not_differ_and_opposite_ones_do():
    labels, scores, _ = case(0, True)
    same = delong.delong_test(labels, scores, 2 * scores + 1)
    assert (same.value, same.variance, same.p) == (0, 0, 1)
    perfect = delong.delong_test(labels, labels * 1.0, labels * -1.0)
    assert (perfect.value, perfect.variance, perfect.p) == (1, 0, 0)


def test_constant_scores_are_chance_without_variance():
    found = delong.delong(case(0, False)[0], np.zeros(80))
    assert (found.value, found.low, found.high, found.variance) == (0.5, 0.5, 0.5, 0)


def test_too_few_of_a_class_leave_the_interval_undefined():
    labels = np.zeros(10, bool)
    assert all(map(math.isnan, delong.delong(labels, np.arange(10.0))))
    assert math.isnan(delong.delong_test(labels, np.arange(10.0), np.ones(10)).p)
    labels[3] = True
    found = delong.delong(labels, np.arange(10.0))
    assert found.value == pytest.approx(1 / 3) and math.isnan(found.low)
    assert "p" not in found.as_dict()


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="1 scores are not finite"):
        delong.delong([0, 1], [0.0, np.nan])
    with pytest.raises(ValueError, match="0 or 1"):
        delong.delong([0, np.nan], [0.0, 1.0])


def test_interval_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(1)
    # P(N(1,1) > N(0,1)) = Φ(1/√2).
    truth, hits = norm.cdf(1 / math.sqrt(2)), 0
    for _ in range(400):
        labels = np.arange(200) < 60
        found = delong.delong(labels, rng.normal(size=200) + labels)
        hits += found.low <= truth <= found.high
    assert 0.92 < hits / 400 < 0.98
