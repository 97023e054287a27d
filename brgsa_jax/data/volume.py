"""Files and HU arrays to one canonical CT volume; what is not a usable CT is refused.

The recipe is the reference's (BrgSA, `preprocess/data_fix_metadata_*.py`): linear resampling to
(1.5, 1.5, 3.0) mm in ITK's first-voxel-centre geometry without anti-aliasing, centre crop and pad
to 256 x 256 x 128, clamp to [-1000, 1000] HU. It differs in three points: the grid is the canonical
patient frame whatever the order, flips or obliqueness of the file; everything outside the source is
air (the reference leaves 0 HU, water, at the border); the header's slope is applied exactly once.

Canonical arrays are int16 [X, Y, Z] in the frame LPS: x grows to the patient's left, y to
posterior, z to superior. Affines are nibabel's: voxel index to RAS+ millimetres.

This file imports neither jax nor tensorflow_datasets.
"""

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np

from brgsa_jax.config import UserError
from brgsa_jax.data.nifti import read_nifti, read_stored
from brgsa_jax.data.placement import Placement, axis_order
from brgsa_jax.data.scan import (
    AIR,
    LPS_TO_RAS,
    NO_MEMORY,
    SNAP_MM,
    NotACT,
    Scan,
    Stored,
    check_file,
    is_singular,
    rescale,
)

__all__ = ["AIR", "CanonicalVolume", "NotACT", "Preprocess", "Scan", "Stored", "canonical_affine",
           "crop_or_pad_start", "load_volume", "place", "read_nifti", "read_stored", "rescale",
           "to_canonical"]

_PADDING_FLOOR = -1024  # Air in 12-bit CT; below it scanners write only padding.
_MIN_LUNG_SHARE = 0.1


_MAX_CANONICAL = 2**30  # Voxels of a canonical volume, 2 GiB.


@dataclass(frozen=True)
class Preprocess:
    """The recipe of a canonical volume, stored with every data set and checked at evaluation.

    Attributes:
        spacing: (x, y, z) millimetres of the canonical grid.
        shape: (X, Y, Z) voxels of the canonical grid.
        low: lower clamp in HU; also the value of everything outside the source.
        high: upper clamp in HU.
        frame: the canonical frame; only "LPS".
    """

    spacing: tuple[float, float, float] = (1.5, 1.5, 3.0)
    shape: tuple[int, int, int] = (256, 256, 128)
    low: int = AIR
    high: int = 1000
    frame: str = "LPS"

    def __post_init__(self) -> None:
        if self.frame != "LPS":
            raise UserError(f"frame {self.frame!r} is not known, only 'LPS'")
        if len(self.spacing) != 3 or not all(s > 0 and math.isfinite(s) for s in self.spacing):
            raise UserError(f"spacing {self.spacing} must be three positive numbers of millimetres")
        if len(self.shape) != 3 or not all(int(n) == n and n > 0 for n in self.shape):
            raise UserError(f"shape {self.shape} must be three positive numbers of voxels")
        if math.prod(self.shape) > _MAX_CANONICAL:
            raise UserError(f"shape {self.shape} has {math.prod(self.shape):,} voxels, more than "
                            f"{_MAX_CANONICAL:,}; choose a smaller one")
        if not -32768 <= self.low < self.high <= 32767:
            raise UserError(f"the clamp [{self.low}, {self.high}] must rise and fit into int16")
        object.__setattr__(self, "spacing", tuple(float(s) for s in self.spacing))
        object.__setattr__(self, "shape", tuple(int(n) for n in self.shape))

    def as_dict(self) -> dict[str, Any]:
        """Returns the recipe as JSON types."""
        return {key: list(value) if isinstance(value, tuple) else value
                for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> "Preprocess":
        """Reads what `as_dict` wrote."""
        return cls(**{key: tuple(value) if isinstance(value, list) else value
                      for key, value in record.items()})


class CanonicalVolume(NamedTuple):
    """A volume on the canonical grid.

    Attributes:
        volume: int16 HU [X, Y, Z], frame LPS.
        spacing: (x, y, z) millimetres of `volume`.
        affine: [4, 4] index of `volume` to RAS+ millimetres.
        source_spacing: millimetres per voxel of the file, in file order.
        source_orientation: axis codes of the file, e.g. "RAS".
        warnings: what is odd about the file, one sentence each.
        placement: where `volume` lies in the file, for `placement.to_source`.
    """

    volume: np.ndarray
    spacing: tuple[float, float, float]
    affine: np.ndarray
    source_spacing: tuple[float, float, float]
    source_orientation: str
    warnings: tuple[str, ...]
    placement: Placement


def load_volume(path: str | Path, preprocess: Preprocess | None = None, *,
                series: str | None = None) -> CanonicalVolume:
    """Reads one CT volume of any format onto the canonical grid.

    Args:
        path: a .nii or .nii.gz file in HU (after its own slope and intercept), a folder of one
            DICOM series, a multi-frame DICOM file, or an .npz or .npy as `data.arrays` describes;
            told apart by content.
        preprocess: the recipe; by default the reference's grid.
        series: SeriesInstanceUID to take from a DICOM folder that holds several.

    Returns:
        The canonical volume with its geometry and warnings.

    Raises:
        NotACT: the file cannot be placed in HU space; the message says why and how to mend it.
    """
    path, preprocess = Path(path), preprocess or Preprocess()
    try:
        return place(_read(path, preprocess, series), preprocess)
    except MemoryError as error:
        raise NotACT(path, NO_MEMORY) from error


def _read(path: Path, preprocess: Preprocess, series: str | None) -> Scan:
    from brgsa_jax.data import arrays, dicom

    if os.path.isdir(path):
        return dicom.read_series(path, series)
    check_file(path)
    if dicom.is_dicom(path):
        return dicom.read_series(path, series)
    if series is not None:
        raise NotACT(path, "it is no DICOM series, so there is none to choose; leave --series out")
    if arrays.is_array(path):
        return arrays.read_array(path, preprocess)
    return read_nifti(path)


def place(scan: Scan, preprocess: Preprocess) -> CanonicalVolume:
    """Brings a scan onto the canonical grid and compares it with a chest.

    Args:
        scan: HU with their affine, from whatever file.
        preprocess: the recipe.

    Returns:
        The canonical volume with its geometry and all warnings.
    """
    volume = to_canonical(scan.hu, scan.affine, preprocess, scan.slices)
    affine = canonical_affine(scan.hu.shape, scan.affine, preprocess)
    return CanonicalVolume(
        volume=volume, spacing=preprocess.spacing, affine=affine,
        placement=Placement(scan.hu.shape, scan.affine, scan.slices, affine),
        source_spacing=tuple(float(s) for s in np.linalg.norm(scan.affine[:3, :3], axis=0)),
        source_orientation="".join(nib.aff2axcodes(scan.affine)),
        warnings=scan.warnings + _chest_warnings(volume))


def to_canonical(hu: np.ndarray, affine: np.ndarray, preprocess: Preprocess,
                 slices: np.ndarray | None = None) -> np.ndarray:
    """Resamples a HU volume onto the canonical grid.

    Axis-aligned volumes are interpolated axis by axis; oblique or sheared ones through the full
    affine. The grid starts at the corner voxel centre that lies most right, anterior and inferior
    (of the bounding box, for oblique volumes), has round(extent / spacing) voxels and is then
    cropped and padded about its centre (the reference's steps 3 to 5). As in ITK, points up to half
    a voxel beyond the outermost voxel centre take the edge value; all others are air.

    Args:
        hu: [I, J, K] finite HU, any real type.
        affine: [4, 4] voxel index to RAS+ millimetres.
        preprocess: the recipe.
        slices: as in `Scan`; interpolation then runs between slices where they really lie.

    Returns:
        int16 [X, Y, Z] of `preprocess.shape`, within the clamp.

    Raises:
        ValueError: `hu` is not 3-D or the affine is singular or not finite.
    """
    grid = _Grid.of(hu.shape, affine, preprocess)
    if grid.order is None:
        sample = _sample_oblique
    else:
        sample = _sample_aligned
    out = np.full(preprocess.shape, preprocess.low, np.int16)
    for z, rows, columns, plane in sample(hu, grid, preprocess, slices):
        np.clip(plane, preprocess.low, preprocess.high, out=plane)
        out[rows, columns, z] = np.rint(plane, out=plane)
    return out


def canonical_affine(shape: tuple[int, ...], affine: np.ndarray,
                     preprocess: Preprocess) -> np.ndarray:
    """Returns the affine (index to RAS+ millimetres) of what `to_canonical` makes of a volume.

    Args:
        shape: (I, J, K) of the source.
        affine: [4, 4] of the source.
        preprocess: the recipe.
    """
    grid = _Grid.of(shape, affine, preprocess)
    spacing = np.asarray(preprocess.spacing)
    result = np.eye(4)
    result[:3, :3] = LPS_TO_RAS @ np.diag(spacing)
    result[:3, 3] = LPS_TO_RAS @ (grid.first + np.asarray(grid.start) * spacing)
    return result


def crop_or_pad_start(size: int, target: int) -> int:
    """Returns where a centred window of `target` voxels starts in an axis of `size` voxels.

    Cropping takes ceil(excess / 2) voxels off the lower end, padding adds deficit // 2 there, then
    the result is negative (the reference's steps 4 and 5).
    """
    if size > target:
        return (size - target + 1) // 2
    return -((target - size) // 2)


_Planes = Iterator[tuple[int, slice, slice, np.ndarray]]


@dataclass(frozen=True)
class _Grid:
    """Where the canonical grid lies over a source volume.

    Attributes:
        matrix: [3, 3] source index to LPS millimetres, off-axis noise removed.
        offset: [3] LPS millimetres of source index (0, 0, 0).
        order: source axis of each canonical axis; None for an oblique source.
        first: [3] LPS millimetres of index 0 of the resampled, not yet cropped grid.
        size: voxels of that grid per axis.
        start: index in that grid of the canonical voxel 0 per axis; negative is padding.
    """

    matrix: np.ndarray
    offset: np.ndarray
    order: tuple[int, int, int] | None
    first: np.ndarray
    size: tuple[int, int, int]
    start: tuple[int, int, int]

    @classmethod
    def of(cls, shape: tuple[int, ...], affine: np.ndarray, preprocess: Preprocess) -> "_Grid":
        affine = np.asarray(affine, np.float64)
        if len(shape) != 3 or affine.shape != (4, 4):
            raise ValueError(f"expected a 3-D volume and a [4, 4] affine, got {shape} and "
                             f"{affine.shape}")
        matrix = LPS_TO_RAS @ affine[:3, :3]
        offset = LPS_TO_RAS @ affine[:3, 3]
        if not np.isfinite(affine).all() or is_singular(matrix):
            raise ValueError("the affine is singular or not finite")
        last = np.asarray(shape) - 1.0
        order = axis_order(matrix)
        aligned = np.zeros_like(matrix)
        for axis, source in enumerate(order):
            aligned[axis, source] = matrix[axis, source]
        residue = matrix - aligned
        if (np.abs(residue) @ last).max() < SNAP_MM:
            # The centre of the volume stays where it is, so snapping moves no voxel by more than
            # half the residue.
            offset = offset + residue @ last / 2
            matrix = aligned
        else:
            order = None
        spacing = np.asarray(preprocess.spacing)
        extent = np.abs(matrix) @ np.asarray(shape, np.float64)
        size = tuple(max(1, round(float(n))) for n in extent / spacing)
        first = offset + np.minimum(matrix * last, 0.0).sum(axis=1)
        start = tuple(crop_or_pad_start(n, t) for n, t in zip(size, preprocess.shape, strict=True))
        return cls(matrix, offset, order, first, size, start)

    def window(self, axis: int, target: int) -> tuple[slice, np.ndarray]:
        """The canonical voxels of an axis that the grid covers, and their indices in the grid."""
        lower = max(0, -self.start[axis])
        upper = min(target, self.size[axis] - self.start[axis])
        return slice(lower, upper), np.arange(lower, upper) + self.start[axis]


def _axis_weights(grid: _Grid, axis: int, count: int, preprocess: Preprocess,
                  slices: np.ndarray | None) -> tuple[slice, np.ndarray, np.ndarray, np.ndarray]:
    """Linear interpolation along one axis of a source of `count` voxels.

    Returns:
        The canonical voxels that lie inside the source, and for each the lower source index, the
        upper one and the weight of the upper one.
    """
    span, indices = grid.window(axis, preprocess.shape[axis])
    step = preprocess.spacing[axis] / abs(grid.matrix[axis, grid.order[axis]])
    position = indices * step
    inside = int(np.count_nonzero(position <= count - 0.5))
    position = np.minimum(position[:inside], count - 1.0)
    if slices is not None and grid.order[axis] == 2:
        flipped = grid.matrix[axis, 2] < 0
        at = count - 1 - slices[::-1] if flipped else slices
        position = np.interp(position, at, np.arange(count))
    lower = np.floor(position).astype(np.intp)
    upper = np.minimum(lower + 1, count - 1)
    return (slice(span.start, span.start + inside), lower, upper,
            (position - lower).astype(np.float32))


def _sample_aligned(hu: np.ndarray, grid: _Grid, preprocess: Preprocess,
                    slices: np.ndarray | None) -> _Planes:
    """Yields (z, x slice, y slice, float32 plane) of an axis-aligned source, one z at a time."""
    flips = tuple(slice(None, None, -1 if grid.matrix[axis, source] < 0 else 1)
                  for axis, source in enumerate(grid.order))
    source = hu.transpose(grid.order)[flips]
    (rows, x0, x1, wx), (columns, y0, y1, wy), (planes, z0, z1, wz) = (
        _axis_weights(grid, axis, source.shape[axis], preprocess, slices) for axis in range(3))
    wx = wx[:, None]
    for z, lower, upper, weight in zip(range(planes.start, planes.stop), z0, z1, wz, strict=True):
        plane = _floored(source[:, :, lower])
        if weight:
            plane += weight * (_floored(source[:, :, upper]) - plane)
        plane = plane[:, y0] + wy * (plane[:, y1] - plane[:, y0])
        yield z, rows, columns, plane[x0] + wx * (plane[x1] - plane[x0])


def _sample_oblique(hu: np.ndarray, grid: _Grid, preprocess: Preprocess,
                    slices: np.ndarray | None) -> _Planes:
    """Yields (z, x slice, y slice, float32 plane) of an oblique source, one z at a time."""
    from scipy import ndimage

    source = np.maximum(hu, np.asarray(_PADDING_FLOOR, hu.dtype))
    spans, indices = zip(*(grid.window(axis, n) for axis, n in enumerate(preprocess.shape)),
                         strict=True)
    inverse = np.linalg.inv(grid.matrix)
    x, y, z_mm = (grid.first[axis] + indices[axis] * preprocess.spacing[axis] for axis in range(3))
    base = (inverse[:, 0, None, None] * x[None, :, None]
            + inverse[:, 1, None, None] * y[None, None, :]
            - (inverse @ grid.offset)[:, None, None])
    last = np.asarray(hu.shape)[:, None, None] - 1.0
    for z, height in zip(range(spans[2].start, spans[2].stop), z_mm, strict=True):
        points = base + inverse[:, 2, None, None] * height
        outside = ((points < -0.5) | (points > last + 0.5)).any(axis=0)
        if outside.all():
            continue
        if slices is not None:
            points[2] = np.interp(points[2], slices, np.arange(slices.size))
        plane = ndimage.map_coordinates(source, points, output=np.float32, order=1, mode="nearest")
        plane[outside] = preprocess.low
        yield z, spans[0], spans[1], plane


def _floored(plane: np.ndarray) -> np.ndarray:
    """float32 copy without padding values, which would bleed into tissue when interpolated."""
    return np.maximum(plane, _PADDING_FLOOR, dtype=np.float32)


def _chest_warnings(volume: np.ndarray) -> tuple[str, ...]:
    """Compares aerated lung with soft tissue: an abdomen or a limb has little of the first.

    Lung is taken as air-like voxels that tissue encloses within their axial slice, so that neither
    noisy air nor clothing around the patient counts.
    """
    from scipy import ndimage

    sample = volume[tuple(slice(None, None, max(1, n // 64)) for n in volume.shape)]
    in_plane = ndimage.generate_binary_structure(3, 1)
    in_plane[1, 1, ::2] = False
    parts, count = ndimage.label(sample < -300, structure=in_plane)
    enclosed = np.ones(count + 1, bool)
    for border in (parts[0], parts[-1], parts[:, 0], parts[:, -1]):
        enclosed[border] = False
    lung = np.count_nonzero(enclosed[parts] & (sample > -950) & (sample < -600))
    tissue = max(1, np.count_nonzero(sample > -300))
    if lung < _MIN_LUNG_SHARE * tissue:
        return (f"may not be a chest: aerated lung is only {lung / tissue:.1%} of the tissue",)
    return ()
