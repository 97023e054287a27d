"""The patient bootstrap against its plain definition with scikit-learn."""

import time

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score

from brgsa_jax.config import UserError
from brgsa_jax.evals import bootstrap
from brgsa_jax.evals.metrics import rank_metrics


def case(rows=120, findings=3, seed=0, each=2):
    rng = np.random.default_rng(seed)
    labels = rng.random((rows, findings)) < 0.3
    scores = np.round(rng.normal(size=labels.shape) + labels, 1)
    return labels, scores, [f"p{i // each}" for i in range(rows)]


def whole(labels, scores):
    return np.array([rank_metrics(labels[:, p], scores[:, p]).auroc[0]
                     for p in range(labels.shape[1])])


def test_samples_equal_scikit_learn_on_rows_drawn_by_patient():
    labels, scores, patients = case()
    found = bootstrap.rank_samples(labels, scores, patients, resamples=9, seed=3)
    names = np.unique(patients)
    counts = np.concatenate(list(bootstrap.draws(len(names), 9, 3)))
    rows_of = {name: [i for i, p in enumerate(patients) if p == name] for name in names}
    for r, row in enumerate(counts):
        rows = [i for name, times in zip(names, row, strict=True)
                for i in rows_of[name] * times]
        for p in range(3):
            y, s = labels[rows, p], scores[rows, p]
            assert found.auroc[r, p] == pytest.approx(roc_auc_score(y, s), abs=1e-12)
            assert found.auprc[r, p] == pytest.approx(average_precision_score(y, s), abs=1e-12)


def test_every_draw_has_as_many_patients_as_the_set_and_chunks_do_not_matter(monkeypatch):
    counts = np.concatenate(list(bootstrap.draws(37, 300, 5)))
    assert counts.shape == (300, 37)
    assert (counts.sum(axis=1) == 37).all()
    monkeypatch.setattr(bootstrap, "CHUNK", 7)
    np.testing.assert_array_equal(np.concatenate(list(bootstrap.draws(37, 300, 5))), counts)
    assert (np.concatenate(list(bootstrap.draws(37, 300, 6))) != counts).any()


def test_row_order_does_not_matter():
    labels, scores, patients = case()
    order = np.random.default_rng(1).permutation(len(labels))
    shuffled = bootstrap.rank_samples(labels[order], scores[order], [patients[i] for i in order],
                                      resamples=50)
    np.testing.assert_allclose(shuffled.auroc,
                               bootstrap.rank_samples(labels, scores, patients, resamples=50).auroc,
                               rtol=0, atol=1e-12)


def test_repeated_volumes_of_a_patient_do_not_narrow_the_interval():
    labels, scores, _ = case(rows=150, each=1)
    single = bootstrap.rank_samples(labels, scores, [str(i) for i in range(150)], resamples=400)
    twice = np.repeat(np.arange(150), 4)
    grouped, alone = (
        bootstrap.rank_samples(labels[twice], scores[twice], owners, resamples=400)
        for owners in ([str(i) for i in twice], [str(i) for i in range(600)]))
    spread = [bootstrap.macro_samples(s.auroc).std() for s in (single, grouped, alone)]
    assert spread[1] == pytest.approx(spread[0], rel=1e-9)
    assert spread[2] < 0.65 * spread[0]


def test_macro_interval_is_that_of_the_mean_not_the_mean_of_intervals():
    labels, scores, patients = case(rows=200, findings=12)
    samples = bootstrap.rank_samples(labels, scores, patients, resamples=500).auroc
    found = bootstrap.macro_interval(whole(labels, scores), samples)
    np.testing.assert_allclose([found.low, found.high],
                               np.quantile(samples.mean(axis=1), [0.025, 0.975]))
    singles = np.quantile(samples, [0.025, 0.975], axis=0).mean(axis=1)
    assert found.high - found.low < 0.6 * (singles[1] - singles[0])
    assert found.low < found.value < found.high


def test_rare_findings_are_counted_and_left_out_of_their_resample_only():
    labels, scores, patients = case(findings=2)
    labels[:, 1] = False
    labels[0, 1] = True
    samples = bootstrap.rank_samples(labels, scores, patients, resamples=400).auroc
    missing = np.isnan(samples[:, 1])
    assert 0.25 < missing.mean() < 0.5
    rare = bootstrap.interval(0.6, samples[:, 1])
    assert rare.undefined == missing.sum()
    np.testing.assert_allclose([rare.low, rare.high],
                               np.quantile(samples[~missing, 1], [0.025, 0.975]))
    macro = bootstrap.macro_interval(whole(labels, scores), samples)
    assert macro.undefined == missing.sum()
    np.testing.assert_array_equal(bootstrap.macro_samples(samples)[missing], samples[missing, 0])


def test_a_finding_without_positives_has_no_interval_and_does_not_hurt_the_macro():
    labels, scores, patients = case(findings=2)
    labels[:, 1] = False
    samples = bootstrap.rank_samples(labels, scores, patients, resamples=20).auroc
    none = bootstrap.interval(np.nan, samples[:, 1])
    assert np.isnan([none.value, none.low, none.high]).all() and none.undefined == 20
    macro = bootstrap.macro_interval(whole(labels, scores), samples)
    assert macro.undefined == 0 and macro.value == whole(labels, scores)[0]


def test_paired_difference_is_exactly_zero_for_equal_models_and_tighter_than_unpaired():
    labels, scores, patients = case(rows=200)
    close = scores + np.random.default_rng(9).normal(size=scores.shape) * 0.05
    samples = [bootstrap.rank_samples(labels, s, patients, resamples=300).auroc
               for s in (scores, scores * 3 + 1, close)]
    values = [whole(labels, s) for s in (scores, scores * 3 + 1, close)]
    same = bootstrap.paired_macro((values[0], values[1]), (samples[0], samples[1])).interval()
    assert same == (0.0, 0.0, 0.0, 0)
    near = bootstrap.paired_macro((values[0], values[2]), (samples[0], samples[2])).interval()
    single = bootstrap.macro_interval(values[0], samples[0])
    assert near.value == pytest.approx(values[0].mean() - values[2].mean())
    assert near.high - near.low < 0.3 * (single.high - single.low)
    with pytest.raises(ValueError, match="not paired"):
        bootstrap.paired_macro((values[0], values[1]), (samples[0], samples[1][:5]))


def test_interval_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = 0
    for trial in range(60):
        labels = rng.random((150, 1)) < 0.4
        scores = rng.normal(size=(150, 1)) + labels
        patients = [str(i) for i in range(150)]
        samples = bootstrap.rank_samples(labels, scores, patients, resamples=200,
                                         seed=trial).auroc[:, 0]
        found = bootstrap.interval(whole(labels, scores)[0], samples)
        # P(N(1,1) > N(0,1)) = Φ(1/√2).
        hits += found.low <= 0.76025 <= found.high
    assert 51 <= hits <= 60


def test_one_patient_is_refused():
    with pytest.raises(UserError, match="1 patient in the evaluation"):
        bootstrap.group_patients(["a", "a"])


def test_patients_make_the_interval_wider_than_volumes_do():
    # As in CT-RATE's split: 2.3 volumes a patient, mostly reconstructions of one scan.
    rng = np.random.default_rng(0)
    size = rng.choice([1, 2, 3, 4, 6], 650, p=[.15, .6, .1, .1, .05])
    owner = np.repeat(np.arange(650), size)
    labels = (rng.random((650, 8)) < 0.2)[owner]
    scores = (1.135 * labels + rng.normal(size=(650, 8))[owner]
              + 0.1 * rng.normal(size=labels.shape))
    widths = []
    for patients in (owner.astype(str), np.arange(len(owner)).astype(str)):
        samples = bootstrap.rank_samples(labels, scores, patients, resamples=1000).auroc
        found = bootstrap.macro_interval(whole(labels, scores), samples)
        widths.append(found.high - found.low)
    assert 1.4 < widths[0] / widths[1] < 1.8


def test_reversed_share_counts_ties_and_the_other_sign():
    assert bootstrap.reversed_share(0.1, np.array([0.2, 0.0, -0.1, np.nan, 0.3])) == 0.5
    assert bootstrap.reversed_share(-0.1, np.array([0.2, 0.0, -0.1, -0.3])) == 0.5
    assert bootstrap.reversed_share(0.0, np.zeros(3)) == 1.0
    assert np.isnan(bootstrap.reversed_share(0.1, np.full(3, np.nan)))


def test_halves_split_patients_and_cover_everyone_once():
    patients = [f"p{i % 7}" for i in range(50)]
    (fit, use), (other, rest) = bootstrap.patient_halves(patients, 3)
    assert (use == ~fit).all() and (other == use).all() and (rest == fit).all()
    sides = {p: {bool(f) for f, q in zip(fit, patients, strict=True) if q == p} for p in patients}
    assert all(len(side) == 1 for side in sides.values())
    assert sorted(len(side) for side in ({p for p in sides if sides[p] == {s}}
                                         for s in (True, False))) == [3, 4]


def test_a_real_size_takes_seconds():
    rng = np.random.default_rng(0)
    labels = rng.random((3000, 18)) < 0.15
    scores = rng.normal(size=labels.shape) + labels
    # CPU time of this thread: colleagues on the machine must not fail the test.
    start = time.thread_time()
    bootstrap.rank_samples(labels, scores, [str(i) for i in range(3000)], resamples=500)
    # A tenth of the 5000 resamples that may take 10 s.
    assert time.thread_time() - start < 1
