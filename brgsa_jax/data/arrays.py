"""HU arrays of NumPy files, with the geometry that stands in them.

  .npz: one 3-D array, and `affine` [4, 4] (index to RAS+ millimetres, as nibabel's) or
        `spacing` [3] (millimetres per voxel of an array in the canonical order LPS);
  .npy: an array on the canonical grid already, since the file has no room for a voxel size.

Sizes are checked in the headers before anything is decompressed; pickled objects are never loaded.
"""

import math
import zipfile
import zlib
from pathlib import Path
from typing import BinaryIO

import numpy as np

from brgsa_jax.data.scan import (
    LPS_TO_RAS,
    MAX_BYTES,
    MAX_VOXELS,
    MIN_VOXELS_PER_AXIS,
    NotACT,
    Scan,
    Stored,
    check_affine,
    rescale,
    unreadable,
)
from brgsa_jax.data.volume import Preprocess

_NAMES = ("volume", "hu", "ct")  # Of the array, where a file holds several.
_GEOMETRY = {"affine": (4, 4), "spacing": (3,)}


def is_array(path: str | Path) -> bool:
    """Tells by its first bytes whether a file is an .npy or .npz."""
    try:
        with Path(path).open("rb") as stream:
            head = stream.read(6)
    except OSError:
        return False
    return head == b"\x93NUMPY" or head[:4] == b"PK\x03\x04"


def read_array(path: str | Path, preprocess: Preprocess,
               affine: np.ndarray | None = None) -> Scan:
    """Reads a NumPy file as HU.

    Args:
        path: an .npy or .npz file, told apart by content.
        preprocess: the recipe, whose grid an .npy must lie on.
        affine: [4, 4] of an .npz that has none; index to RAS+ millimetres.

    Returns:
        The array in HU with its affine and warnings.

    Raises:
        NotACT: the file is damaged, too large, no CT, or has no geometry.
    """
    path = Path(path)
    try:
        with path.open("rb") as stream:
            if stream.read(2) == b"PK":
                values, affine = _read_npz(path, stream, affine)
            else:
                stream.seek(0)
                values, affine = _read_npy(path, stream, preprocess)
    except (ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error, NotImplementedError,
            RuntimeError) as error:
        raise NotACT(path, f"it is no readable NumPy file ({type(error).__name__}); write it again "
                     "with numpy.savez") from error
    except OSError as error:
        raise unreadable(path, error) from error
    return rescale(Stored(path, values, 1.0, 0.0, affine,
                          check_affine(path, "affine", affine, values.shape)))


def _read_npy(path: Path, stream: BinaryIO,
              preprocess: Preprocess) -> tuple[np.ndarray, np.ndarray]:
    shape, _ = _header(path, stream)
    if shape != preprocess.shape:
        sizes = ("x".join(map(str, size)) for size in (shape, preprocess.shape))
        raise NotACT(path, "an .npy has no voxel size, so it must lie on the canonical grid, but "
                     "its shape is {}, not {}; save an .npz with the volume and its affine"
                     .format(*sizes))
    _check_volume(path, shape)
    stream.seek(0)
    affine = np.diag([*(LPS_TO_RAS @ np.asarray(preprocess.spacing)), 1.0])
    return np.lib.format.read_array(stream, allow_pickle=False), affine


def _read_npz(path: Path, stream: BinaryIO,
              affine: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    with zipfile.ZipFile(stream) as archive:
        shapes = {}
        for info in archive.infolist():
            if info.filename.endswith(".npy"):
                with archive.open(info) as member:
                    shapes[info.filename.removesuffix(".npy")] = _header(path, member)[0]
        arrays = [name for name, shape in shapes.items() if len(shape) == 3]
        named = [name for name in _NAMES if name in arrays]
        if len(arrays) != 1 and len(named) != 1:
            raise NotACT(path, f"it holds {len(arrays)} 3-D arrays; name the one in HU 'volume'")
        name = (named or arrays)[0]
        _check_volume(path, shapes[name])
        geometry = [key for key, shape in _GEOMETRY.items() if shapes.get(key) == shape]
        if affine is not None:
            with archive.open(name + ".npy") as member:
                return np.lib.format.read_array(member, allow_pickle=False), affine
        if not geometry:
            raise NotACT(path, "it has no voxel size; save 'affine' [4, 4] (index to RAS+ "
                         "millimetres) or 'spacing' [3] (of an array in LPS order) beside the "
                         "volume")
        read = {}
        for key in (name, geometry[0]):
            with archive.open(key + ".npy") as member:
                read[key] = np.lib.format.read_array(member, allow_pickle=False)
        given = read[geometry[0]].astype(np.float64)
    if geometry[0] == "affine":
        return read[name], given
    if not (np.isfinite(given).all() and (given > 0).all()):
        raise NotACT(path, "its spacing is not three positive numbers; save the millimetres per "
                     "voxel")
    return read[name], np.diag([*(LPS_TO_RAS @ given), 1.0])


def _header(path: Path, stream: BinaryIO) -> tuple[tuple[int, ...], np.dtype]:
    """Reads shape and type of an .npy stream and leaves what no volume has unread."""
    version = np.lib.format.read_magic(stream)
    if version not in ((1, 0), (2, 0)):
        raise ValueError("unknown version")
    read = (np.lib.format.read_array_header_1_0 if version == (1, 0)
            else np.lib.format.read_array_header_2_0)
    shape, _, dtype = read(stream)
    if dtype.kind not in "iuf":
        raise NotACT(path, f"it holds values of type {dtype}, not HU; save 16-bit integers")
    if math.prod(shape) > MAX_VOXELS or math.prod(shape) * dtype.itemsize > MAX_BYTES:
        raise NotACT(path, f"its header gives {math.prod(shape):,} values of type {dtype}, more "
                     "than any CT; save 16-bit integers of one volume")
    return shape, dtype


def _check_volume(path: Path, shape: tuple[int, ...]) -> None:
    if min(shape) < MIN_VOXELS_PER_AXIS:
        raise NotACT(path, f"its shape {'x'.join(map(str, shape))} leaves fewer than "
                     f"{MIN_VOXELS_PER_AXIS} voxels on an axis; save the whole volume")
