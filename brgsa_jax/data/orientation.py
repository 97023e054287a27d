"""Directions of DICOM image planes as affines.

DICOM's patient coordinates are LPS (x to the left, y to posterior, z to superior); affines here are
nibabel's, index to RAS+ millimetres.
"""

from collections.abc import Sequence

import numpy as np

_TOLERANCE = 1e-3


def plane_axes(cosines: Sequence[float]) -> np.ndarray:
    """Returns the axes of an image plane from ImageOrientationPatient.

    Args:
        cosines: six numbers: the direction in which the columns' index grows (along a row), then
            the one in which the rows' index grows (down a column), both LPS.

    Returns:
        [3, 3], its columns the unit vectors along a row, down a column and along the normal of the
        plane (their cross product), LPS.

    Raises:
        ValueError: the two directions are no unit vectors at right angles.
    """
    row, column = np.asarray(cosines, np.float64).reshape(2, 3)
    lengths = np.linalg.norm([row, column], axis=1)
    if np.abs(lengths - 1).max() > _TOLERANCE or abs(row @ column) > _TOLERANCE:
        raise ValueError(f"the directions {list(cosines)} are not two unit vectors at right angles")
    return np.stack([row, column, np.cross(row, column)], axis=1)


def affine_of(axes: np.ndarray, spacing: Sequence[float], origin: Sequence[float]) -> np.ndarray:
    """Returns the affine of a volume from its axes in LPS.

    Args:
        axes: [3, 3], column n the direction in which index n grows.
        spacing: millimetres per index; negative reverses an axis.
        origin: LPS millimetres of the centre of voxel (0, 0, 0).

    Returns:
        [4, 4] voxel index to RAS+ millimetres.
    """
    affine = np.eye(4)
    affine[:3, :3] = axes * np.asarray(spacing, np.float64)
    affine[:3, 3] = origin
    affine[:2] *= -1.0
    return affine
