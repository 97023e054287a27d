"""A volume as it lies in its file, in HU, and the refusal of what no CT has.

Every reader (NIfTI, DICOM, NumPy) ends here: slope and intercept applied once, the affine and the
values compared with what a CT of a person can have. Affines are nibabel's: voxel index to RAS+
millimetres.
"""

import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from brgsa_jax.config import UserError

AIR = -1000
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0])
MAX_VOXELS = 1_200_000_000  # The largest CT-RATE volume has 424 million.
MAX_BYTES = 4 * 2**30
MIN_VOXELS_PER_AXIS = 8
SNAP_MM = 0.1  # Displacement over a volume below which it counts as even, or as axis-aligned.
NO_MEMORY = "it needs more memory than there is; read it on a larger machine, or crop it"

_SPACING_RANGE_MM = (0.05, 20.0)
_EXTENT_RANGE_MM = (10.0, 3000.0)
_SHORT_EXTENT_MM = 50.0
_MAX_ORIGIN_MM = 1e5  # Tables move by metres; far beyond, interpolation loses its digits.
_MAX_SHEAR_DEGREES = 45.0  # Gantries tilt by 30 degrees at most.
_MAX_NONFINITE = 0.5


class NotACT(UserError):  # noqa: N818
    """A file that cannot be placed in HU space.

    Attributes:
        file: the path as given.
        reason: why it is refused and how to mend it.
    """

    def __init__(self, file: str | Path, reason: str):
        # A name may hold line breaks and bytes of no script; the message stays one line.
        name = "".join(letter if letter.isprintable() else "?" for letter in str(file))
        super().__init__(f"{name}: {reason}")
        self.file = str(file)
        self.reason = reason

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.file, self.reason)


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


def check_file(path: Path) -> None:
    """Refuses what is no regular file before anything opens it; a pipe would block for ever.

    Raises:
        NotACT: there is no such file, it is a device or a pipe, or it cannot be reached.
    """
    try:
        regular = path.is_file()
        there = regular or path.exists()
    except OSError as error:
        raise unreadable(path, error) from error
    if not there:
        raise NotACT(path, "there is no such file; check the path")
    if not regular:
        raise NotACT(path, "it is no regular file but a pipe, a socket or a device; copy its "
                     "content into a file")


def unreadable(path: Path, error: OSError) -> NotACT:
    """Returns the refusal of a file that the operating system does not hand out."""
    return NotACT(path, f"it cannot be read ({error.strerror or error}); check the disk and the "
                  "file's rights")


@np.errstate(all="ignore")
def rescale(stored: Stored) -> Scan:
    """Applies slope and intercept, once, and refuses what cannot be HU.

    Args:
        stored: numbers with the slope and intercept that make them HU.

    Returns:
        The volume in HU; non-finite voxels (at most half) are air.

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
    return Scan(hu, stored.affine, warnings + check_values(path, hu))


@np.errstate(all="ignore")
def check_affine(path: Path, name: str, affine: np.ndarray,
                 shape: tuple[int, int, int]) -> tuple[str, ...]:
    """Refuses an affine that no CT has.

    Args:
        path: the file, for messages.
        name: what the messages call the affine.
        affine: [4, 4] voxel index to RAS+ millimetres.
        shape: (I, J, K) of the volume.

    Returns:
        What is odd about it, one sentence each.

    Raises:
        NotACT: the affine has no orientation, or sizes that no CT of a person has.
    """
    if not np.isfinite(affine).all():
        raise NotACT(path, f"its {name} is not finite; write a valid affine into the header")
    if is_singular(affine[:3, :3]):
        raise NotACT(path, f"its {name} is singular, so it has no orientation; write a valid "
                     "affine into the header")
    if (affine[3] != (0, 0, 0, 1)).any():
        raise NotACT(path, f"the last row of its {name} is not 0 0 0 1; write it as [4, 4] with "
                     "the origin in the last column")
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    low, high = _SPACING_RANGE_MM
    if (spacing < low).any() or (spacing > high).any():
        raise NotACT(path, f"its voxel size {numbers(spacing)} mm is outside {low}-{high} mm; "
                     "write the affine in millimetres")
    extent = spacing * shape
    low, high = _EXTENT_RANGE_MM
    if (extent < low).any() or (extent > high).any():
        raise NotACT(path, f"its extent {numbers(extent)} mm is outside {low:g}-{high:g} mm; "
                     "check the voxel size in the header")
    if np.abs(affine[:3, 3]).max() > _MAX_ORIGIN_MM:
        raise NotACT(path, f"its first voxel lies at {numbers(affine[:3, 3])} mm, farther than any "
                     "scanner reaches; write a valid affine into the header")
    unit = affine[:3, :3] / spacing
    shear = math.degrees(math.asin(min(1.0, np.abs(unit.T @ unit - np.eye(3)).max())))
    if shear > _MAX_SHEAR_DEGREES:
        raise NotACT(path, f"its {name} is sheared by {shear:.3g} degrees, more than any gantry "
                     "tilts; write a valid affine into the header")
    if (extent < _SHORT_EXTENT_MM).any():
        return (f"may not be a chest: it covers only {numbers(extent)} mm",)
    return ()


def is_singular(matrix: np.ndarray) -> bool:
    """Whether the columns of a [3, 3] matrix point into fewer than three directions."""
    lengths = np.linalg.norm(matrix, axis=0)
    return bool((lengths == 0).any() or abs(np.linalg.det(matrix / lengths)) < 1e-3)


def numbers(values: np.ndarray) -> str:
    """Writes sizes as 0.7x0.7x1.5."""
    return "x".join(f"{value:.4g}" for value in values)


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
        plane = raw[..., k].astype(np.float32 if identity and raw.itemsize <= 4 else np.float64)
        if not identity:
            plane *= slope
            plane += intercept
        bad = ~np.isfinite(plane)
        if bad.any():
            nonfinite += int(bad.sum())
            plane[bad] = AIR
        # Beyond int16 there is no tissue, and the canonical clamp is narrower anyway.
        hu[..., k] = np.clip(plane, -32768, 32767, out=plane)
    return hu, nonfinite / raw.size


def check_values(path: Path, hu: np.ndarray) -> tuple[str, ...]:
    """Refuses values that cannot be HU.

    CT-RATE's first version stores raw values under slope 1 and intercept 0: outside air lies near
    24 where the intercept is -1024 and near 7192 where it is -8192; others apply it twice.

    Args:
        path: the file, for messages.
        hu: [I, J, K], finite.

    Returns:
        What is odd about them, one sentence each.

    Raises:
        NotACT: they are no HU; the message says what they seem to be.
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
