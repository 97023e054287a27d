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

import gzip
import itertools
import math
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import nibabel as nib
import numpy as np

from brgsa_jax.config import UserError

AIR = -1000
_PADDING_FLOOR = -1024  # Air in 12-bit CT; below it scanners write only padding.
_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0])
_MAX_VOXELS = 1_200_000_000  # The largest CT-RATE volume has 424 million.
_MAX_BYTES = 4 * 2**30
_MAX_DEFLATE_RATIO = 1032  # The most a deflate stream can expand (zlib's technical notes).
_MAX_VOX_OFFSET = 64 * 2**20
_MIN_VOXELS_PER_AXIS = 8
_SPACING_RANGE_MM = (0.05, 20.0)
_EXTENT_RANGE_MM = (10.0, 3000.0)
_SHORT_EXTENT_MM = 50.0
_SNAP_MM = 0.1  # Off-axis displacement over the volume below which a file counts as axis-aligned.
_MAX_NONFINITE = 0.5
_MIN_LUNG_SHARE = 0.1

_DTYPES = {2: "u1", 256: "i1", 4: "i2", 512: "u2", 8: "i4", 768: "u4", 1024: "i8", 1280: "u8",
           16: "f4", 64: "f8"}
_WRONG_DTYPES = {128: "RGB colours", 2304: "RGBA colours", 32: "complex numbers",
                 1792: "complex numbers", 2048: "complex numbers", 1: "single bits"}


class NotACT(UserError):  # noqa: N818
    """A file that cannot be placed in HU space.

    Attributes:
        file: the path as given.
        reason: why it is refused and how to mend it.
    """

    def __init__(self, file: str | Path, reason: str):
        super().__init__(f"{file}: {reason}")
        self.file = str(file)
        self.reason = reason

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.file, self.reason)


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


class Scan(NamedTuple):
    """A volume as it lies in its file, in HU.

    Attributes:
        hu: int16 or float32 [I, J, K] in file order, finite.
        affine: [4, 4] voxel index to RAS+ millimetres.
        warnings: what is odd about the file, one sentence each.
        slices: [K] rising index, from 0 to K - 1, at which each slice really lies on the affine's
            third axis; None where that is its own index.
    """

    hu: np.ndarray
    affine: np.ndarray
    warnings: tuple[str, ...]
    slices: np.ndarray | None = None


class Stored(NamedTuple):
    """The numbers of a file before they become HU.

    Attributes:
        path: the file, for messages.
        values: any integer or float type [I, J, K] in file order.
        slope: HU per stored unit.
        intercept: HU of a stored 0.
        affine: [4, 4] voxel index to RAS+ millimetres.
        warnings: what is odd about the file, one sentence each.
    """

    path: Path
    values: np.ndarray
    slope: float
    intercept: float
    affine: np.ndarray
    warnings: tuple[str, ...]


class CanonicalVolume(NamedTuple):
    """A volume on the canonical grid.

    Attributes:
        volume: int16 HU [X, Y, Z], frame LPS.
        spacing: (x, y, z) millimetres of `volume`.
        affine: [4, 4] index of `volume` to RAS+ millimetres.
        source_spacing: millimetres per voxel of the file, in file order.
        source_orientation: axis codes of the file, e.g. "RAS".
        warnings: what is odd about the file, one sentence each.
    """

    volume: np.ndarray
    spacing: tuple[float, float, float]
    affine: np.ndarray
    source_spacing: tuple[float, float, float]
    source_orientation: str
    warnings: tuple[str, ...]


class _Header(NamedTuple):
    """What of a NIfTI header is needed to read the voxels, already checked."""

    shape: tuple[int, int, int]
    dtype: np.dtype
    offset: int
    slope: float
    intercept: float
    affine: np.ndarray
    warnings: tuple[str, ...]


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
    from brgsa_jax.data import arrays, dicom

    path, preprocess = Path(path), preprocess or Preprocess()
    if path.is_dir() or dicom.is_dicom(path):
        scan = dicom.read_series(path, series)
    elif arrays.is_array(path):
        scan = arrays.read_array(path, preprocess)
    else:
        scan = read_nifti(path)
    return place(scan, preprocess)


def place(scan: Scan, preprocess: Preprocess) -> CanonicalVolume:
    """Brings a scan onto the canonical grid and compares it with a chest.

    Args:
        scan: HU with their affine, from whatever file.
        preprocess: the recipe.

    Returns:
        The canonical volume with its geometry and all warnings.
    """
    volume = to_canonical(scan.hu, scan.affine, preprocess, scan.slices)
    return CanonicalVolume(
        volume=volume, spacing=preprocess.spacing,
        affine=canonical_affine(scan.hu.shape, scan.affine, preprocess),
        source_spacing=tuple(float(s) for s in np.linalg.norm(scan.affine[:3, :3], axis=0)),
        source_orientation="".join(nib.aff2axcodes(scan.affine)),
        warnings=scan.warnings + _chest_warnings(volume))


def read_nifti(path: str | Path) -> Scan:
    """Reads a NIfTI file as HU, in file order, and refuses what is no usable CT volume.

    Sizes are checked in the header before anything is decompressed. The slope and intercept of the
    header are applied once and nowhere else. Non-finite voxels (at most half) become air.

    Args:
        path: a single-file NIfTI-1 or NIfTI-2, gzip-compressed or not.

    Returns:
        The volume in HU, its affine and warnings.

    Raises:
        NotACT: for any unusable file; the message says why and how to mend it.
    """
    return rescale(read_stored(path))


def read_stored(path: str | Path, affine: np.ndarray | None = None) -> Stored:
    """Reads the numbers of a NIfTI file as they are stored, before slope and intercept.

    Args:
        path: a single-file NIfTI-1 or NIfTI-2, gzip-compressed or not.
        affine: [4, 4] voxel index to RAS+ millimetres, in place of a header known to be wrong.

    Returns:
        The stored numbers in file order and what the header says about them.

    Raises:
        NotACT: for any file that cannot be read or placed.
    """
    path = Path(path)
    if not path.is_file():
        raise NotACT(path, "there is no such file; check the path")
    try:
        with _open(path) as stream:
            header = _read_header(path, stream, affine)
            raw = _read_voxels(path, stream, header)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise NotACT(path, f"the compressed data is damaged or cut short ({error}); copy or "
                     "download the file again") from error
    except OSError as error:
        raise NotACT(path, f"it cannot be read ({error}); check the disk and the file's "
                     "rights") from error
    return Stored(path, raw, header.slope, header.intercept, header.affine, header.warnings)


def rescale(stored: Stored) -> Scan:
    """Applies slope and intercept, once, and refuses what cannot be HU.

    Args:
        stored: numbers with the slope and intercept that make them HU.

    Returns:
        The volume in HU.

    Raises:
        NotACT: the result is no CT; the message says why and how to mend it.
    """
    path, warnings = stored.path, stored.warnings
    hu, nonfinite = _to_hu(stored.values, stored.slope, stored.intercept)
    if nonfinite > _MAX_NONFINITE:
        raise NotACT(path, f"{nonfinite:.0%} of its voxels are not numbers (NaN or infinite); "
                     "export it again from the original series")
    if nonfinite:
        warnings += (f"{nonfinite:.2%} of the voxels are not finite; they are taken as air",)
    return Scan(hu, stored.affine, warnings + _check_values(path, hu))


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
    result[:3, :3] = _LPS_TO_RAS @ np.diag(spacing)
    result[:3, 3] = _LPS_TO_RAS @ (grid.first + np.asarray(grid.start) * spacing)
    return result


def crop_or_pad_start(size: int, target: int) -> int:
    """Returns where a centred window of `target` voxels starts in an axis of `size` voxels.

    Cropping takes ceil(excess / 2) voxels off the lower end, padding adds deficit // 2 there, then
    the result is negative (the reference's steps 4 and 5).
    """
    if size > target:
        return (size - target + 1) // 2
    return -((target - size) // 2)


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
        matrix = _LPS_TO_RAS @ affine[:3, :3]
        offset = _LPS_TO_RAS @ affine[:3, 3]
        if not np.isfinite(affine).all() or _is_singular(matrix):
            raise ValueError("the affine is singular or not finite")
        last = np.asarray(shape) - 1.0
        order = _axis_order(matrix)
        aligned = np.zeros_like(matrix)
        for axis, source in enumerate(order):
            aligned[axis, source] = matrix[axis, source]
        residue = matrix - aligned
        if (np.abs(residue) @ last).max() < _SNAP_MM:
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


def _is_singular(matrix: np.ndarray) -> bool:
    lengths = np.linalg.norm(matrix, axis=0)
    return bool((lengths == 0).any() or abs(np.linalg.det(matrix / lengths)) < 1e-3)


def _axis_order(matrix: np.ndarray) -> tuple[int, int, int]:
    """The assignment of source axes to canonical axes with the largest direction cosines."""
    cosines = np.abs(matrix) / np.linalg.norm(matrix, axis=0)
    return max(itertools.permutations(range(3)),
               key=lambda order: sum(cosines[axis, source] for axis, source in enumerate(order)))


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
                    slices: np.ndarray | None):
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
                    slices: np.ndarray | None):
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


def _open(path: Path) -> BinaryIO:
    with path.open("rb") as stream:
        compressed = stream.read(2) == b"\x1f\x8b"
    return gzip.open(path, "rb") if compressed else path.open("rb")


def _read_header(path: Path, stream: BinaryIO, affine: np.ndarray | None) -> _Header:
    block = stream.read(540)
    sizes = {int.from_bytes(block[:4], order) for order in ("little", "big")}
    if 348 in sizes and block[344:348] == b"n+1\x00":
        header = nib.Nifti1Header(block[:348], check=False)
    elif 540 in sizes and block[4:8] == b"n+2\x00":
        header = nib.Nifti2Header(block, check=False)
    elif 348 in sizes and block[344:348] == b"ni1\x00":
        raise NotACT(path, "it is the header of a NIfTI pair (.hdr/.img); join them into one .nii")
    else:
        raise NotACT(path, "it is not a NIfTI, DICOM or NumPy file; convert the series, e.g. with "
                     "dcm2niix")

    shape = _checked_shape(path, header)
    code = int(header["datatype"])
    if code not in _DTYPES:
        kind = _WRONG_DTYPES.get(code, f"values of type code {code}")
        raise NotACT(path, f"it holds {kind}, not HU; export the CT as 16-bit integers")
    dtype = np.dtype(_DTYPES[code]).newbyteorder(header.endianness)

    offset = float(header["vox_offset"])
    least = 352 if int(header["sizeof_hdr"]) == 348 else 544
    if not math.isfinite(offset) or offset < 0 or offset > _MAX_VOX_OFFSET:
        raise NotACT(path, f"its data offset {offset} is impossible; the header is damaged")
    offset = max(int(offset), least)
    _check_bytes(path, shape, dtype, offset, isinstance(stream, gzip.GzipFile))

    slope, intercept = float(header["scl_slope"]), float(header["scl_inter"])
    if slope == 0 or not math.isfinite(slope) or not math.isfinite(intercept):
        raise NotACT(path, f"its scl_slope is {slope:g} and scl_inter {intercept:g}, so the HU "
                     "scale is unknown; write 1 and 0 if the stored values are HU")
    if affine is None:
        affine, warnings = _header_affine(path, header, shape)
    else:
        warnings = _check_affine(path, "affine", affine, shape)
    return _Header(shape, dtype, offset, slope, intercept, affine, warnings)


def _checked_shape(path: Path, header: nib.Nifti1Header) -> tuple[int, int, int]:
    dims = [int(n) for n in header["dim"]]
    if not 1 <= dims[0] <= 7:
        raise NotACT(path, f"its header gives {dims[0]} dimensions; the header is damaged")
    shape = dims[1:dims[0] + 1]
    text = "x".join(map(str, shape))
    if any(n < 0 for n in shape):
        raise NotACT(path, f"its header gives the negative size {text}; the header is damaged")
    if any(n == 0 for n in shape):
        raise NotACT(path, f"it has no voxels (size {text}); convert the series again")
    if any(n != 1 for n in shape[3:]):
        raise NotACT(path, f"it is not one volume (size {text}); split it and keep one frame")
    shape = (shape + [1, 1])[:3]
    if min(shape) < _MIN_VOXELS_PER_AXIS:
        raise NotACT(path, f"its size {text} leaves fewer than {_MIN_VOXELS_PER_AXIS} voxels on an "
                     "axis, so it is a localiser or a fragment; convert the whole series")
    if math.prod(shape) > _MAX_VOXELS:
        raise NotACT(path, f"its header gives {math.prod(shape):,} voxels, more than any CT "
                     f"({_MAX_VOXELS:,}); the header is damaged")
    return tuple(shape)


def _check_bytes(path: Path, shape: tuple[int, int, int], dtype: np.dtype, offset: int,
                 compressed: bool) -> None:
    needed = math.prod(shape) * dtype.itemsize
    if needed > _MAX_BYTES:
        raise NotACT(path, f"its header gives {needed:,} bytes of voxels, above the limit of "
                     f"{_MAX_BYTES:,}; store it as 16-bit integers")
    present = path.stat().st_size * (_MAX_DEFLATE_RATIO if compressed else 1)
    if offset + needed > present:
        raise NotACT(path, f"its header promises {needed:,} bytes of voxels, more than the file "
                     "can hold; it is cut short, copy or download it again")


def _header_affine(path: Path, header: nib.Nifti1Header,
                   shape: tuple[int, int, int]) -> tuple[np.ndarray, tuple[str, ...]]:
    pixdim = np.asarray(header["pixdim"][1:4], np.float64)
    if not np.isfinite(pixdim).all() or (pixdim == 0).any():
        raise NotACT(path, f"its voxel size (pixdim) is {_numbers(pixdim)}; write the millimetres "
                     "per voxel into the header")
    header["pixdim"][1:4] = np.abs(pixdim)
    codes = int(header["sform_code"]), int(header["qform_code"])
    if codes[0] <= 0 and codes[1] <= 0:
        raise NotACT(path, "sform_code and qform_code are 0, so left and right are unknown; set "
                     "one of the two with its affine")
    affines = []
    if codes[0] > 0:
        affines.append(("sform", np.asarray(header.get_sform(), np.float64)))
    if codes[1] > 0:
        try:
            affines.append(("qform", np.asarray(header.get_qform(), np.float64)))
        except (ValueError, nib.spatialimages.HeaderDataError):
            affines.append(("qform", np.full((4, 4), np.nan)))
    name, affine = affines[0]
    warnings = _check_affine(path, name, affine, shape)
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    if (np.abs(spacing / np.abs(pixdim) - 1) > 0.02).any():
        warnings += (f"pixdim {_numbers(pixdim)} differs from the voxel size of the {name} "
                     f"{_numbers(spacing)} mm; the {name} is used",)
    if len(affines) == 2:
        corners = itertools.product(*((0, n - 1) for n in shape), (1,))
        distance = np.abs(np.array(list(corners)) @ (affine - affines[1][1]).T).max()
        if not distance < 1:
            warnings += ("sform and qform differ by more than 1 mm; the sform is used",)
    return affine, warnings


def _check_affine(path: Path, name: str, affine: np.ndarray,
                  shape: tuple[int, int, int]) -> tuple[str, ...]:
    """Refuses an affine that no CT has; `name` is what the messages call it."""
    if not np.isfinite(affine).all():
        raise NotACT(path, f"its {name} is not finite; write a valid affine into the header")
    if _is_singular(affine[:3, :3]):
        raise NotACT(path, f"its {name} is singular, so it has no orientation; write a valid "
                     "affine into the header")
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    low, high = _SPACING_RANGE_MM
    if (spacing < low).any() or (spacing > high).any():
        raise NotACT(path, f"its voxel size {_numbers(spacing)} mm is outside {low}-{high} mm; "
                     "write the affine in millimetres")
    extent = spacing * shape
    low, high = _EXTENT_RANGE_MM
    if (extent < low).any() or (extent > high).any():
        raise NotACT(path, f"its extent {_numbers(extent)} mm is outside {low:g}-{high:g} mm; "
                     "check the voxel size in the header")
    if (extent < _SHORT_EXTENT_MM).any():
        return (f"may not be a chest: it covers only {_numbers(extent)} mm",)
    return ()


def _numbers(values: np.ndarray) -> str:
    return "x".join(f"{value:.4g}" for value in values)


def _read_voxels(path: Path, stream: BinaryIO, header: _Header) -> np.ndarray:
    """Reads exactly the voxels, and the gzip checksum if nothing follows them."""
    stream.seek(header.offset)
    data = np.empty(math.prod(header.shape) * header.dtype.itemsize, np.uint8)
    view = memoryview(data)
    filled = 0
    while filled < len(view):
        count = stream.readinto(view[filled:])
        if not count:
            raise NotACT(path, f"it ends after {filled:,} of {len(view):,} bytes of voxels; it is "
                         "cut short, copy or download it again")
        filled += count
    stream.read(1)
    return data.view(header.dtype).reshape(header.shape, order="F")


def _to_hu(raw: np.ndarray, slope: float, intercept: float) -> tuple[np.ndarray, float]:
    """Applies the slope once: int16 if that is exact, else float32; non-finite becomes air.

    Returns:
        The HU and the share of voxels that were not finite.
    """
    identity = slope == 1 and intercept == 0
    if identity and raw.dtype == np.int16 and raw.dtype.isnative:
        return raw, 0.0
    exact = raw.dtype.kind in "iu" and slope.is_integer() and intercept.is_integer()
    hu = np.empty(raw.shape, np.int16 if exact else np.float32, order="F")
    nonfinite = 0
    for k in range(raw.shape[2]):
        plane = raw[..., k].astype(np.float64)
        if not identity:
            plane = plane * slope + intercept
        bad = ~np.isfinite(plane)
        if bad.any():
            nonfinite += int(bad.sum())
            plane[bad] = AIR
        # Beyond int16 there is no tissue, and the canonical clamp is narrower anyway.
        hu[..., k] = np.clip(plane, -32768, 32767)
    return hu, nonfinite / raw.size


def _check_values(path: Path, hu: np.ndarray) -> tuple[str, ...]:
    """Refuses values that cannot be HU; returns warnings.

    CT-RATE's first version stores raw values under slope 1 and intercept 0: outside air lies near
    24 where the intercept is -1024 and near 7192 where it is -8192; others apply it twice.
    """
    low, high = float(hu.min()), float(hu.max())
    span = f"its values run from {low:g} to {high:g}"
    if low == high:
        raise NotACT(path, f"every voxel is {low:g}; convert the series again")
    if high - low < 100:
        raise NotACT(path, f"{span}: normalised or windowed, not HU; use the volume before that "
                     "step")
    # An odd step visits every row and column of the usual power-of-two matrices.
    step = max(1, hu.size // 2_000_000) | 1
    sample = hu.ravel(order="K")[::step].astype(np.float32)
    body = sample[sample >= -1100]
    if not body.size:
        raise NotACT(path, f"{span}: all below air; the rescale intercept was applied more than "
                     "once, convert the series again")
    if np.mean(sample < -1500) > 0.05 and np.mean(sample > -300) < 0.02:
        raise NotACT(path, f"{span}, almost all at or below air; the rescale intercept was applied "
                     "more than once, convert the series again")
    air = np.mean(body <= -500)
    between = np.mean((body > -990) & (body < -150))
    tissue_too_high = between < 1e-3 and np.mean(body > 800) > 0.2
    if air >= 5e-4 and not tissue_too_high:
        return ()
    if low >= 0 and high <= 255:
        raise NotACT(path, f"{span}: an 8-bit picture, not HU; use the volume before windowing")
    if np.mean((body > 7000) & (body < 9500)) > 0.5:
        raise NotACT(path, f"{span}: raw stored values (air near 7192), not HU; write scl_slope 1 "
                     "and scl_inter -8192 into the header")
    if low >= -3072 and high < 6000 and np.mean(body > 700) > 0.05:
        raise NotACT(path, f"{span}, with air near 24 or none at all: raw stored values or no CT; "
                     "if it is raw CT write scl_slope 1 and scl_inter -1024 into the header")
    if np.mean((body > -200) & (body < -20)) > 5e-3 and -200 < float(np.median(body)) < 400:
        return ("may not be a chest: it contains no air",)
    raise NotACT(path, f"{span}, without the air and fat of a CT; use a CT volume in HU")


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
