"""Canonical grid back to the file's: markers are found where they were put."""

import itertools

import numpy as np
import pytest
from scipy import ndimage

from brgsa_jax.data.placement import Placement, to_source
from brgsa_jax.data.scan import Scan
from brgsa_jax.data.volume import Preprocess, place

PREPROCESS = Preprocess(spacing=(3.0, 3.0, 5.0), shape=(56, 56, 40))
SHAPE = (90, 60, 44)
SPACING = (1.4, 2.1, 4.0)


def rotation(degrees, axis):
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    turned = np.eye(3)
    first, second = [n for n in range(3) if n != axis]
    turned[first, first] = turned[second, second] = c
    turned[first, second], turned[second, first] = -s, s
    return turned


def affine_of(axes, spacing=SPACING):
    affine = np.eye(4)
    affine[:3, :3] = axes * np.asarray(spacing)
    affine[:3, 3] = (31.0, -80.0, 400.0)
    return affine


AXES = {
    "RAS": np.eye(3), "LPS": np.diag([-1.0, -1.0, 1.0]), "LAI": np.diag([-1.0, 1.0, -1.0]),
    "permuted": np.eye(3)[[2, 0, 1]], "permuted and flipped": -np.eye(3)[[1, 2, 0]],
    "oblique": rotation(12, 0) @ rotation(25, 2), "slightly oblique": rotation(0.3, 1),
    "tilted gantry": np.eye(3) + np.outer([0, 1, 0], [0, 0, 0.3])}


def ball(shape, affine, centre, radius=9.0):
    """HU of air with a ball of bone at voxel `centre`, radius in mm."""
    places = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1) - centre
    return np.where(np.linalg.norm(places @ affine[:3, :3].T, axis=-1) < radius, 900, -1000)


def centre_of(weights):
    return np.array([(np.indices(weights.shape)[axis] * weights).sum() / weights.sum()
                     for axis in range(3)])


@pytest.mark.parametrize("name", AXES)
def test_a_marker_returns_to_where_it_was_in_the_file(name):
    affine = affine_of(AXES[name])
    marker = np.array([52, 21, 25])
    placed = place(Scan(ball(SHAPE, affine, marker).astype(np.int16), affine, ()), PREPROCESS)
    seen = placed.volume > 0
    assert seen.sum() > 20
    back = to_source(seen.astype(np.float32), placed.placement)
    assert back.shape == SHAPE and back.dtype == np.float32
    off = affine[:3, :3] @ (centre_of(back) - marker)
    assert np.linalg.norm(off) < 0.5 * min(PREPROCESS.spacing), off
    # The same marker by its world position, without `to_source`.
    world = (placed.affine @ [*centre_of(seen.astype(float)), 1])[:3]
    assert np.linalg.norm(world - (affine @ [*marker, 1])[:3]) < 0.5 * min(PREPROCESS.spacing)


def test_uneven_slices_are_filled_where_they_lie():
    affine = affine_of(np.eye(3))
    slices = np.arange(44, dtype=float)
    slices[1:-1] += 0.4 * np.sin(np.arange(42))
    placement = place(Scan(np.zeros(SHAPE, np.int16), affine, (), slices), PREPROCESS).placement
    # The height of every canonical voxel comes back as the height of the slice it lies in.
    heights = np.broadcast_to(placement.canonical[2, 3] + 5.0 * np.arange(40), PREPROCESS.shape)
    back = to_source(heights - heights.min() + 1, placement)
    wanted = affine[2, 3] + 4.0 * slices - heights.min() + 1
    inside = (back > 0).all(axis=(0, 1))
    assert inside.sum() > 40
    held = np.clip(wanted, 1, 1 + 5.0 * 39)
    np.testing.assert_allclose(back[20, 20, inside], held[inside], atol=1e-3)


def test_what_lies_outside_the_canonical_grid_is_zero_and_the_rest_is_covered():
    affine = affine_of(np.eye(3), (3.0, 3.0, 5.0))
    shape = (80, 40, 40)
    placement = place(Scan(np.zeros(shape, np.int16), affine, ()), PREPROCESS).placement
    back = to_source(np.ones(PREPROCESS.shape), placement)
    assert back[12:68].all() and not back[:12].any() and not back[68:].any()


def test_every_axis_order_interpolates_linearly():
    values = np.random.default_rng(0).random((12, 10, 8)).astype(np.float32)
    canonical = np.diag([-2.0, -2.0, 3.0, 1.0])
    canonical[:3, 3] = [11, 9, -10]
    for order, turn in itertools.product(itertools.permutations(range(3)), (0, 9)):
        affine = affine_of(rotation(turn, 2) @ np.eye(3)[list(order)] * [1, -1, 1],
                           (1.5, 1.1, 2.0))
        affine[:3, 3] = -affine[:3, :3] @ [10, 9, 5]
        back = to_source(values, Placement((21, 19, 11), affine, None, canonical))
        to = np.linalg.inv(canonical) @ affine
        points = (np.indices(back.shape).reshape(3, -1).T @ to[:3, :3].T + to[:3, 3]).T
        wanted = ndimage.map_coordinates(values, points, order=1, mode="nearest")
        edge = np.asarray(values.shape)[:, None] - 0.5
        wanted[((points < -0.5) | (points > edge)).any(axis=0)] = 0
        np.testing.assert_allclose(back.ravel(), wanted, atol=1e-5)
        assert 0.05 < (wanted > 0).mean() < 1
