"""NIfTI files to HU in file order; what is damaged, ambiguous or no CT volume is refused.

Headers are parsed by nibabel and believed only as far as they were checked here. Sizes are compared
with the file before anything is decompressed, and no more than the voxels is ever read.
"""

import gzip
import itertools
import math
import zlib
from pathlib import Path
from typing import BinaryIO, NamedTuple

import nibabel as nib
import numpy as np

from brgsa_jax.data.scan import (
    MAX_BYTES,
    MAX_VOXELS,
    MIN_VOXELS_PER_AXIS,
    NO_MEMORY,
    NotACT,
    Scan,
    Stored,
    check_affine,
    check_file,
    is_singular,
    numbers,
    rescale,
    unreadable,
)

_MAX_DEFLATE_RATIO = 1032  # The most a deflate stream can expand (zlib's technical notes).
_MAX_VOX_OFFSET = 64 * 2**20
_MAX_QUATERNION = 1.001  # Squared length of (b, c, d); rounding leaves 1.000001.
_LEAST_COSINE = 0.5  # Between the axes of sform and qform.

_DTYPES = {2: "u1", 256: "i1", 4: "i2", 512: "u2", 8: "i4", 768: "u4", 1024: "i8", 1280: "u8",
           16: "f4", 64: "f8"}
_WRONG_DTYPES = {128: "RGB colours", 2304: "RGBA colours", 32: "complex numbers",
                 1792: "complex numbers", 2048: "complex numbers", 1: "single bits",
                 1536: "128-bit numbers"}
_OTHER_UNITS = {1: "metres", 3: "microns"}


class _Header(NamedTuple):
    """What of a NIfTI header is needed to read the voxels, already checked."""

    shape: tuple[int, int, int]
    dtype: np.dtype
    offset: int
    slope: float
    intercept: float
    affine: np.ndarray
    warnings: tuple[str, ...]


def read_nifti(path: str | Path) -> Scan:
    """Reads a NIfTI file as HU, in file order, and refuses what is no usable CT volume.

    The slope and intercept of the header are applied once and nowhere else. Non-finite voxels (at
    most half) become air.

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
    check_file(path)
    try:
        with _open(path) as stream:
            header = _read_header(path, stream, affine)
            raw = _read_voxels(path, stream, header)
            follows = bool(stream.read(1))  # At the end this compares the checksum of gzip.
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise NotACT(path, f"the compressed data is damaged or cut short ({error}); copy or "
                     "download the file again") from error
    except OSError as error:
        raise unreadable(path, error) from error
    except MemoryError as error:
        raise NotACT(path, NO_MEMORY) from error
    warnings = header.warnings
    if follows:
        warnings += ("the file goes on after its voxels; what follows is not read",)
    return Stored(path, raw, header.slope, header.intercept, header.affine, warnings)


def _open(path: Path) -> BinaryIO:
    with path.open("rb") as stream:
        compressed = stream.read(2) == b"\x1f\x8b"
    return gzip.open(path, "rb") if compressed else path.open("rb")


@np.errstate(all="ignore")
def _read_header(path: Path, stream: BinaryIO, affine: np.ndarray | None) -> _Header:
    header = _parsed(path, stream.read(nib.Nifti2Header.sizeof_hdr))
    shape = _checked_shape(path, header)
    dtype = _checked_dtype(path, header)
    offset = _checked_offset(path, header)
    _check_bytes(path, shape, dtype, offset, isinstance(stream, gzip.GzipFile))
    slope, intercept = float(header["scl_slope"]), float(header["scl_inter"])
    if slope == 0 or not math.isfinite(slope) or not math.isfinite(intercept):
        raise NotACT(path, f"its scl_slope is {slope:g} and scl_inter {intercept:g}, so the HU "
                     "scale is unknown; write 1 and 0 if the stored values are HU")
    if affine is None:
        affine, warnings = _header_affine(path, header, shape)
    else:
        warnings = check_affine(path, "affine", affine, shape)
    return _Header(shape, dtype, offset, slope, intercept, affine, warnings)


def _parsed(path: Path, block: bytes) -> nib.Nifti1Header:
    """Tells version and byte order by the size field; nibabel guesses them from dim[0]."""
    if not block:
        raise NotACT(path, "it is empty; copy or download it again")
    for kind, order in itertools.product((nib.Nifti1Header, nib.Nifti2Header), ("little", "big")):
        if int.from_bytes(block[:4], order) != kind.sizeof_hdr:
            continue
        if len(block) < kind.sizeof_hdr:
            raise NotACT(path, f"it ends within its header, after {len(block)} bytes; it is cut "
                         "short, copy or download it again")
        header = kind(block[:kind.sizeof_hdr], endianness=order, check=False)
        magic = header["magic"].item()
        if magic == kind.single_magic:
            return header
        if magic == kind.pair_magic:
            raise NotACT(path, "it is the header of a NIfTI pair (.hdr/.img); join them into one "
                         ".nii")
    raise NotACT(path, "it is not a NIfTI, DICOM or NumPy file; convert the series, e.g. with "
                 "dcm2niix")


def _checked_shape(path: Path, header: nib.Nifti1Header) -> tuple[int, int, int]:
    dims = [int(n) for n in header["dim"]]
    if not 1 <= dims[0] <= 7:
        raise NotACT(path, f"its header gives {dims[0]} dimensions; it is damaged, convert the "
                     "series again")
    shape = dims[1:dims[0] + 1]
    text = "x".join(map(str, shape))
    if any(n < 0 for n in shape):
        raise NotACT(path, f"its header gives the negative size {text}; it is damaged, convert the "
                     "series again")
    if any(n == 0 for n in shape):
        raise NotACT(path, f"it has no voxels (size {text}); convert the series again")
    if any(n != 1 for n in shape[3:]):
        raise NotACT(path, f"it is not one volume (size {text}); split it and keep one frame")
    shape = (shape + [1, 1])[:3]
    if min(shape) < MIN_VOXELS_PER_AXIS:
        raise NotACT(path, f"its size {text} leaves fewer than {MIN_VOXELS_PER_AXIS} voxels on an "
                     "axis, so it is a localiser or a fragment; convert the whole series")
    if math.prod(shape) > MAX_VOXELS:
        raise NotACT(path, f"its header gives {math.prod(shape):,} voxels, more than any CT "
                     f"({MAX_VOXELS:,}); it is damaged, convert the series again")
    return tuple(shape)


def _checked_dtype(path: Path, header: nib.Nifti1Header) -> np.dtype:
    code, bits = int(header["datatype"]), int(header["bitpix"])
    if code not in _DTYPES:
        kind = _WRONG_DTYPES.get(code, f"values of type code {code}")
        raise NotACT(path, f"it holds {kind}, not HU; export the CT as 16-bit integers")
    dtype = np.dtype(_DTYPES[code]).newbyteorder(header.endianness)
    if bits not in (0, 8 * dtype.itemsize):
        raise NotACT(path, f"its datatype {code} has {8 * dtype.itemsize} bits and its bitpix says "
                     f"{bits}, so its values are unknown; convert the series again")
    return dtype


def _checked_offset(path: Path, header: nib.Nifti1Header) -> int:
    # Readers disagree about where voxels begin if this lies inside the header: 0, 348 or 352.
    offset, least = float(header["vox_offset"]), header.single_vox_offset
    if not least <= offset <= _MAX_VOX_OFFSET or not offset.is_integer():
        raise NotACT(path, f"its data offset {offset:g} is no whole number of bytes from {least} "
                     f"to {_MAX_VOX_OFFSET}; convert the series again")
    return int(offset)


def _check_bytes(path: Path, shape: tuple[int, int, int], dtype: np.dtype, offset: int,
                 compressed: bool) -> None:
    needed = math.prod(shape) * dtype.itemsize
    if needed > MAX_BYTES:
        raise NotACT(path, f"its header gives {needed:,} bytes of voxels, above the limit of "
                     f"{MAX_BYTES:,}; store it as 16-bit integers")
    present = path.stat().st_size * (_MAX_DEFLATE_RATIO if compressed else 1)
    if offset + needed > present:
        raise NotACT(path, f"its header promises {needed:,} bytes of voxels, more than the file "
                     "can hold; it is cut short, copy or download it again")


def _header_affine(path: Path, header: nib.Nifti1Header,
                   shape: tuple[int, int, int]) -> tuple[np.ndarray, tuple[str, ...]]:
    pixdim = np.asarray(header["pixdim"][1:4], np.float64)
    if not np.isfinite(pixdim).all() or (pixdim == 0).any():
        raise NotACT(path, f"its voxel size (pixdim) is {numbers(pixdim)}; write the millimetres "
                     "per voxel into the header")
    affines = {}
    if header["sform_code"] > 0:
        affines["sform"] = np.asarray(header.get_sform(), np.float64)
    if header["qform_code"] > 0:
        affines["qform"] = _qform(header)
    if not affines:
        raise NotACT(path, "sform_code and qform_code are 0, so left and right are unknown; set "
                     "one of the two with its affine")
    (name, affine), *other = affines.items()
    warnings = check_affine(path, name, affine, shape)
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    if (np.abs(spacing / np.abs(pixdim) - 1) > 0.02).any():
        warnings += (f"pixdim {numbers(pixdim)} differs from the voxel size of the {name} "
                     f"{numbers(spacing)} mm; the {name} is used",)
    if other:
        warnings += _compared(path, affine, other[0][1], shape)
    unit = _OTHER_UNITS.get(int(header["xyzt_units"]) & 7)
    if unit:
        warnings += (f"its unit is {unit}, which no CT of this size has; it is read as mm",)
    return affine, warnings


def _qform(header: nib.Nifti1Header) -> np.ndarray:
    """nibabel refuses a qfac of 0, which the standard takes as 1, and much rounding."""
    bcd = [float(header[f"quatern_{letter}"]) for letter in "bcd"]
    square = sum(value * value for value in bcd)
    if not square <= _MAX_QUATERNION:
        return np.full((4, 4), np.nan)
    rotation = nib.quaternions.quat2mat([math.sqrt(max(0.0, 1 - square)), *bcd])
    qfac, *pixdim = np.asarray(header["pixdim"][:4], np.float64)
    affine = np.eye(4)
    affine[:3, :3] = rotation * np.abs(pixdim) * (1, 1, -1 if qfac < 0 else 1)
    affine[:3, 3] = [float(header[f"qoffset_{letter}"]) for letter in "xyz"]
    return affine


def _compared(path: Path, sform: np.ndarray, qform: np.ndarray,
              shape: tuple[int, int, int]) -> tuple[str, ...]:
    """Refuses two affines with different directions, as programs differ in which one they take."""
    if np.isfinite(qform).all() and not is_singular(qform[:3, :3]):
        axes = [form[:3, :3] / np.linalg.norm(form[:3, :3], axis=0) for form in (sform, qform)]
        if (axes[0] * axes[1]).sum(axis=0).min() < _LEAST_COSINE:
            codes = ["".join(nib.aff2axcodes(form)) for form in (sform, qform)]
            raise NotACT(path, f"its sform says {codes[0]} and its qform {codes[1]}, so left and "
                         "right are unknown; write the true affine into both")
    corners = np.array(list(itertools.product(*((0, n - 1) for n in shape), (1,))))
    if not np.abs(corners @ (sform - qform).T).max() < 1:
        return ("sform and qform differ by more than 1 mm; the sform is used",)
    return ()


def _read_voxels(path: Path, stream: BinaryIO, header: _Header) -> np.ndarray:
    """Reads exactly the voxels."""
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
    return data.view(header.dtype).reshape(header.shape, order="F")
