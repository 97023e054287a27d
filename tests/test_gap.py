"""Modality-gap figures against their definitions, and intervals that stand where they should."""

import numpy as np
import pytest

from brgsa_jax.evals import gap as gaps


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def pairs(rows=80, width=6, shift=0.8, seed=0):
    rng = np.random.default_rng(seed)
    text = rng.normal(size=(rows, width))
    image = text + 0.7 * rng.normal(size=(rows, width)) + shift
    return image, text, [f"p{i // 2}" for i in range(rows)]


def test_figures_equal_their_definitions():
    image, text, patients = pairs()
    found = gaps.measure_gap(image, text, patients, resamples=20).gap
    v, t = unit(image), unit(text)
    distance = np.linalg.norm(v.mean(0) - t.mean(0))
    assert found.distance.value == pytest.approx(distance, abs=1e-14)
    assert found.matched.value == pytest.approx((v * t).sum(1).mean(), abs=1e-14)
    cross = [v[i] @ t[j] for i in range(80) for j in range(80) if patients[i] != patients[j]]
    assert found.mismatched.value == pytest.approx(np.mean(cross), abs=1e-14)
    radius = np.sqrt((((v - v.mean(0)) ** 2).sum(1).mean()
                      + ((t - t.mean(0)) ** 2).sum(1).mean()) / 2)
    assert found.relative.value == pytest.approx(distance / radius, abs=1e-13)
    assert (found.pairs, found.patients) == (80, 40)


def test_lengths_of_embeddings_do_not_matter():
    image, text, patients = pairs()
    scale = np.random.default_rng(1).uniform(0.1, 9, size=(80, 1))
    one = gaps.measure_gap(image, text, patients, resamples=30).gap
    two = gaps.measure_gap(image * scale, text / scale, patients, resamples=30).gap
    np.testing.assert_allclose(one.distance, two.distance, atol=1e-12)
    np.testing.assert_allclose(one.mismatched, two.mismatched, atol=1e-12)


def test_opposite_points_are_two_apart_and_have_no_relative_distance():
    image = np.tile([[1.0, 0.0]], (6, 1))
    found = gaps.measure_gap(image, -image, list("aabbcc"), resamples=10).gap
    assert found.distance == (2.0, 2.0, 2.0, 0)
    assert (found.matched.value, found.mismatched.value, found.floor) == (-1.0, -1.0, 0.0)
    assert np.isnan(found.relative.value)


def test_intervals_are_centred_on_the_value():
    image, text, patients = pairs(rows=300, width=20, shift=0.15)
    found = gaps.measure_gap(image, text, patients, resamples=600)
    gap = found.gap
    for figure in (gap.distance, gap.relative, gap.matched, gap.mismatched):
        assert figure.low < figure.value < figure.high
    middle = (gap.distance.low + gap.distance.high) / 2
    assert abs(middle - gap.distance.value) < 0.15 * (gap.distance.high - gap.distance.low)


def test_bootstrap_samples_equal_resampled_rows_but_for_the_added_variance():
    from brgsa_jax.evals.bootstrap import draws

    image, text, patients = pairs(rows=60, width=5)
    found = gaps.measure_gap(image, text, patients, resamples=8, seed=2)
    names = np.unique(patients)
    v, t = unit(image), unit(text)
    for sample, counts in zip(found.distance, np.concatenate(list(draws(30, 8, 2))), strict=True):
        rows = [i for name, times in zip(names, counts, strict=True)
                for i in [j for j, p in enumerate(patients) if p == name] * times]
        plain = np.linalg.norm(v[rows].mean(0) - t[rows].mean(0))
        assert sample ** 2 == pytest.approx(max(plain ** 2 - found.gap.floor ** 2, 0), abs=1e-12)


def test_floor_predicts_the_distance_of_coinciding_centroids():
    distances, floors = [], []
    for seed in range(30):
        rng = np.random.default_rng(seed)
        image, text = rng.normal(size=(2, 100, 16))
        found = gaps.measure_gap(image, text, [str(i) for i in range(100)], resamples=2).gap
        distances.append(found.distance.value ** 2)
        floors.append(found.floor ** 2)
    assert np.mean(distances) == pytest.approx(np.mean(floors), rel=0.15)


def test_difference_is_paired():
    image, text, patients = pairs()
    one = gaps.measure_gap(image, text, patients, resamples=200)
    assert gaps.distance_difference(one, one) == (0.0, 0.0, 0.0, 0)
    far = gaps.measure_gap(image + 1.5, text, patients, resamples=200)
    found = gaps.distance_difference(one, far)
    assert found.high < 0
    assert found.value == pytest.approx(one.gap.distance.value - far.gap.distance.value)
    with pytest.raises(ValueError, match="same patients"):
        gaps.distance_difference(one, gaps.measure_gap(image, text, patients, resamples=5))


def test_alignment_uniformity_and_rank_equal_their_definitions():
    image, text, patients = pairs(rows=50)
    found = gaps.measure_gap(image, text, patients, resamples=40).gap
    v, t = unit(image), unit(text)
    square = ((v - t) ** 2).sum(1)
    assert found.alignment.value == pytest.approx(square.mean(), abs=1e-13)
    assert found.alignment.low < square.mean() < found.alignment.high
    for x, value, rank in ((v, found.uniformity_image, found.rank_image),
                           (t, found.uniformity_text, found.rank_text)):
        energy = [np.exp(-2 * ((x[i] - x[j]) ** 2).sum()) for i in range(50) for j in range(50)
                  if patients[i] != patients[j]]
        assert value == pytest.approx(np.log(np.mean(energy)), abs=1e-12)
        share = np.linalg.svd(x)[1] / np.linalg.svd(x)[1].sum()
        assert rank == pytest.approx(np.exp(-(share * np.log(share)).sum()), abs=1e-12)
    assert set(found.as_dict()) == set(gaps.Gap._fields)
    assert set(found.as_dict()["separability"]) == {"value", "low", "high"}


def test_uniformity_does_not_depend_on_its_chunks():
    image, _, patients = pairs(rows=50)
    codes = np.unique(patients, return_inverse=True)[1]
    assert gaps.uniformity(unit(image), codes, chunk=7) == pytest.approx(
        gaps.uniformity(unit(image), codes), abs=1e-14)
    assert gaps.uniformity(unit(image), codes, limit=20) == pytest.approx(
        gaps.uniformity(unit(image)[::3], codes[::3]), abs=1e-14)
    assert np.isnan(gaps.uniformity(unit(image), codes, limit=1))


def test_a_collapsed_and_an_even_cloud_are_told():
    rng = np.random.default_rng(0)
    point = np.tile(rng.normal(size=8), (40, 1))
    even = unit(rng.normal(size=(4000, 400)))
    assert gaps.effective_rank(point) == pytest.approx(1, abs=1e-12)
    assert gaps.effective_rank(np.eye(7)) == pytest.approx(7)
    assert np.isnan(gaps.effective_rank(np.zeros((4, 3))))
    assert gaps.uniformity(unit(point), np.arange(40)) == pytest.approx(0, abs=1e-12)
    assert gaps.uniformity(even, np.arange(4000)) == pytest.approx(-4, abs=0.05)


def test_separability_is_judged_on_other_patients():
    image, text, patients = pairs(rows=200, width=10, shift=0.0)
    mixed = gaps.measure_gap(image, text, patients, resamples=100).gap.separability
    assert mixed.low < 0.5 < mixed.high and mixed.value < 0.6
    apart = gaps.measure_gap(image + 3, text, patients, resamples=100).gap.separability
    assert apart.value > 0.95 and apart.high <= 1
    same = gaps.measure_gap(text, text, patients, resamples=10).gap.separability
    assert same == (0.5, 0.5, 0.5, 0)
    # Width beyond the number of pairs: any patients seen in training would be told without fail.
    rng = np.random.default_rng(3)
    points = np.repeat(rng.normal(size=(2, 30, 300)), 2, axis=1)
    wide = gaps.measure_gap(*points, [f"p{i // 2}" for i in range(60)], resamples=100).gap
    assert wide.separability.low < 0.5 < wide.separability.high


def test_unmatched_shapes_are_refused():
    with pytest.raises(ValueError, match="not matched pairs"):
        gaps.measure_gap(np.zeros((3, 2)), np.zeros((4, 2)), list("abc"))


def test_projection_keeps_distances_of_plane_data_and_is_deterministic():
    rng = np.random.default_rng(0)
    angles = rng.uniform(0, 2 * np.pi, size=40)
    circle = np.zeros((40, 9))
    circle[:, 2], circle[:, 5] = np.cos(angles), np.sin(angles)
    found = gaps.project(circle[:25] * 3, circle[25:])
    assert found.image.shape == (25, 2) and found.text.shape == (15, 2)
    assert found.explained.sum() == pytest.approx(1.0)
    plane = np.concatenate([found.image, found.text])
    np.testing.assert_allclose(np.linalg.norm(plane[:, None] - plane, axis=-1),
                               np.linalg.norm(circle[:, None] - circle, axis=-1), atol=1e-9)
    np.testing.assert_array_equal(found.image, gaps.project(circle[:25] * 3, circle[25:]).image)


def test_projection_of_one_dimension_has_a_flat_second_axis():
    found = gaps.project(np.array([[1.0], [-1.0]]), np.array([[2.0], [-3.0]]))
    assert (found.image[:, 1] == 0).all() and found.explained[1] == 0


def test_a_collapsed_model_has_a_gap_a_projection_and_a_picture():
    from brgsa_jax.evals.plots import plot_gap

    point = np.tile(np.random.default_rng(0).normal(size=5), (6, 1))
    found = gaps.project(point, 2 * point)
    assert not found.image.any() and not found.text.any() and not found.explained.any()
    assert len(plot_gap(found).axes) == 1
    gap = gaps.measure_gap(point, 2 * point, list("aabbcc"), resamples=10).gap
    assert gap.distance.value == pytest.approx(0, abs=1e-12) and np.isnan(gap.relative.value)
    assert gap.separability.value == 0.5 and gap.rank_image == pytest.approx(1)
    assert gap.uniformity_text == pytest.approx(0, abs=1e-12)


def test_plot_shows_every_projection_on_one_scale(tmp_path):
    from brgsa_jax.evals.plots import plot_gap

    image, text, _ = pairs()
    near, far = gaps.project(image, text), gaps.project(image + 3, text)
    figure = plot_gap({"after the bank": near, "before <$\\": far})
    first, second = figure.axes
    assert (first.get_title(), second.get_title()) == ("after the bank", "before <$\\")
    assert first.get_xlim() == second.get_xlim() == second.get_ylim()
    for panel, found in zip(figure.axes, (near, far), strict=True):
        shown = [panel.collections[k].get_offsets() for k in range(4)]
        # Volumes, their centroid, reports, theirs; the plane may be shifted, not scaled or turned.
        np.testing.assert_allclose(shown[0] - shown[1], found.image - found.image.mean(0),
                                   atol=1e-12)
        np.testing.assert_allclose(shown[1] - shown[3], [found.image.mean(0) - found.text.mean(0)],
                                   atol=1e-12)
        assert np.abs(np.concatenate([shown[0], shown[2]])).max() < panel.get_xlim()[1]
    figure.savefig(tmp_path / "gap.png")
    assert (tmp_path / "gap.png").stat().st_size > 5000
    assert len(plot_gap(near).axes) == 1
    with pytest.raises(ValueError, match="no projection"):
        plot_gap({})
