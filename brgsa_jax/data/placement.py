"""Where a canonical volume lies in its file, and the way back: maps on the grid of the file."""

import itertools
from typing import NamedTuple

import numpy as np

_EVEN_VOXELS = 0.05  # Canonical voxels off its axis up to which a source counts as axis-aligned.


class Placement(NamedTuple):
    """Where a canonical volume lies in the file it was made of.

    Attributes:
        shape: (I, J, K) voxels of the file.
        affine: [4, 4] index in the file to RAS+ millimetres.
        slices: as in `Scan`.
        canonical: [4, 4] index of the canonical volume to RAS+ millimetres.
    """

    shape: tuple[int, int, int]
    affine: np.ndarray
    slices: np.ndarray | None
    canonical: np.ndarray


def axis_order(matrix: np.ndarray) -> tuple[int, int, int]:
    """The assignment of source axes to canonical axes with the largest direction cosines.

    Args:
        matrix: [3, 3] source index to canonical millimetres or voxels.

    Returns:
        The source axis of each canonical axis.
    """
    cosines = np.abs(matrix) / np.linalg.norm(matrix, axis=0)
    return max(itertools.permutations(range(3)),
               key=lambda order: sum(cosines[axis, source] for axis, source in enumerate(order)))


def to_source(values: np.ndarray, placement: Placement) -> np.ndarray:
    """Brings what was computed on the canonical grid back to the grid of the file.

    Linear between the centres of canonical voxels, the edge value up to half a voxel beyond, and 0
    where the file reaches further than the canonical grid.

    Args:
        values: [X, Y, Z], any real type.
        placement: of the canonical volume.

    Returns:
        float32 [I, J, K] in file order.
    """
    values = np.asarray(values, np.float32)
    to_canonical = np.linalg.inv(placement.canonical) @ placement.affine
    matrix, offset = to_canonical[:3, :3], to_canonical[:3, 3]
    places = [np.arange(n, dtype=np.float64) for n in placement.shape]
    if placement.slices is not None:
        places[2] = placement.slices
    order = axis_order(matrix)
    aligned = np.zeros_like(matrix)
    for axis, source in enumerate(order):
        aligned[axis, source] = matrix[axis, source]
    middle = (np.asarray(placement.shape) - 1.0) / 2
    if (np.abs(matrix - aligned) @ middle).max() > _EVEN_VOXELS:
        return _source_oblique(values, matrix, offset, places)
    offset = offset + (matrix - aligned) @ middle
    for axis, source in enumerate(order):
        weights = _hat_weights(aligned[axis, source] * places[source] + offset[axis],
                               values.shape[axis])
        values = np.moveaxis(np.tensordot(weights, values, (1, axis)), 0, axis)
    return np.ascontiguousarray(values.transpose(np.argsort(order)))


def _hat_weights(at: np.ndarray, count: int) -> np.ndarray:
    """float32 [len(at), count]: weights of `count` grid points in linear interpolation at `at`."""
    held = np.clip(at, 0.0, count - 1.0)
    weights = np.maximum(1.0 - np.abs(held[:, None] - np.arange(count)), 0.0)
    weights[(at < -0.5) | (at > count - 0.5)] = 0.0
    return weights.astype(np.float32)


def _source_oblique(values: np.ndarray, matrix: np.ndarray, offset: np.ndarray,
                    places: list[np.ndarray]) -> np.ndarray:
    """Interpolates [X, Y, Z] at matrix @ (i, j, k) + offset, one k at a time."""
    from scipy import ndimage

    out = np.zeros(tuple(map(len, places)), np.float32)
    base = (matrix[:, 0, None, None] * places[0][:, None]
            + matrix[:, 1, None, None] * places[1][None, :] + offset[:, None, None])
    last = np.asarray(values.shape)[:, None, None] - 0.5
    for k, place in enumerate(places[2]):
        points = base + matrix[:, 2, None, None] * place
        inside = ((points >= -0.5) & (points <= last)).all(axis=0)
        if inside.any():
            out[inside, k] = ndimage.map_coordinates(values, points[:, inside], order=1,
                                                     output=np.float32, mode="nearest")
    return out
