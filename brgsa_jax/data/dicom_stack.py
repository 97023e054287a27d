"""The images of one DICOM series to one volume: where they lie, their scale, their pixels in HU.

Headers say what places and scales each slice; slices are sorted by ImagePositionPatient along the
normal of their plane; then each image is decoded into its place. SliceThickness and the order of
files are never used. `data/dicom.py` tells what is corrected.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from brgsa_jax.data.dicom_file import clean, guarded, image_size, padding_range, pixels
from brgsa_jax.data.scan import (
    AIR,
    LPS_TO_RAS,
    MAX_VOXELS,
    MIN_VOXELS_PER_AXIS,
    SNAP_MM,
    NotACT,
    check_affine,
)

_SAME_PLACE_MM = 0.02  # Closer slices are one place: the thinnest CT slices are 0.1 mm apart.
_MAX_GAP = 1.5  # In median gaps; a missing slice makes 2.
_MAX_TILT_DEGREES = 45.0  # Gantries tilt by 30 degrees at most.
_TOLD_TILT_DEGREES = 0.1
_DIRECTION_TOLERANCE = 1e-3
# Padding declared between these is a value that tissue has too.
_TISSUE_HU = (-900.0, 3071.0)
_MAX_NUMBER = 1e6  # Of positions in millimetres, slopes and intercepts.
_NOT_HU = {"OD", "MGML", "Z_EFF", "ED", "EDW", "PCT"}  # Rescale types of the standard.


class Image(NamedTuple):
    """One slice, from its header; millimetres, directions in DICOM's LPS."""

    path: Path
    frame: int
    frame_of_reference: str
    size: tuple[int, int]  # rows, columns
    spacing: tuple[float, float]  # millimetres between rows, between columns
    along_row: np.ndarray  # [3] LPS direction of growing column index
    along_column: np.ndarray
    position: np.ndarray  # [3] LPS millimetres of the first pixel's centre
    slope: float
    intercept: float
    padding: tuple[int, int] | None  # stored values, both included
    whole: bool  # Its HU are whole numbers.
    lossy: bool  # Its pixels went through lossy compression.


class Stack(NamedTuple):
    """Slices in the order of their place; several at one place must turn out to be the same.

    Attributes:
        places: images of each place, rising along the normal.
        affine: [4, 4] (column, row, place) to RAS+ millimetres.
        slices: see `scan.Scan`.
        warnings: what is odd about the geometry, one sentence each.
    """

    places: tuple[tuple[Image, ...], ...]
    affine: np.ndarray
    slices: np.ndarray | None
    warnings: tuple[str, ...]


def images_of(path: Path, headers: Sequence[tuple[Path, Any]]) -> list[Image]:
    """Reads what places and scales each slice.

    Args:
        path: what the user gave, for messages.
        headers: (file, pydicom data set without pixels) of each file of one series.

    Returns:
        The slices, frames of multi-frame files counted, in any order.

    Raises:
        NotACT: a header lacks its geometry or scale, or the slices cannot lie in one volume.
    """
    images = []
    for file, data in headers:
        with guarded(file, "its DICOM header cannot be read"):
            images += _file_images(file, data)
    if len(images) * math.prod(images[0].size) > MAX_VOXELS:
        raise NotACT(path, f"its {len(images):,} images are more than any CT; give the folder of "
                     "one series")
    if len({image.frame_of_reference for image in images}) > 1:
        raise NotACT(path, "its images have different frames of reference, so their positions "
                     "cannot be compared; give each its own folder")
    for name, values in (
            ("Rows x Columns", ["x".join(map(str, image.size)) for image in images]),
            ("PixelSpacing", ["x".join(f"{mm:.4g}" for mm in image.spacing) for image in images])):
        _same(path, name, values)
    directions = np.array([[*image.along_row, *image.along_column] for image in images])
    if np.abs(directions - directions[0]).max() > _DIRECTION_TOLERANCE:
        _same(path, "ImageOrientationPatient",
              ["/".join(f"{cosine:.3f}" for cosine in direction) for direction in directions])
    return images


def _same(path: Path, name: str, values: Sequence[str]) -> None:
    counts = Counter(values)
    if len(counts) > 1:
        text = ", ".join(f"{value} ({count})" for value, count in counts.most_common(4))
        raise NotACT(path, f"its images differ in {name}: {text}; keep the images of one volume")


def _file_images(path: Path, data: Any) -> list[Image]:
    rows, columns, frames = image_size(path, data)
    _check_storage(path, data)
    groups = data.get("PerFrameFunctionalGroupsSequence")
    if not groups:
        if frames > 1:
            raise NotACT(path, f"it holds {frames} frames without a position for each; export it "
                         "as an enhanced CT or as single slices")
        return [_image(path, 0, data, [data])]
    if len(groups) != frames:
        raise NotACT(path, f"its header gives {frames} frames and the geometry of {len(groups)}; "
                     "export it again")
    shared = data.get("SharedFunctionalGroupsSequence") or [None]
    images = []
    for frame, group in enumerate(groups):
        parts = [sequence[0] for owner in (group, shared[0]) if owner is not None
                 for name in ("PlanePositionSequence", "PlaneOrientationSequence",
                              "PixelMeasuresSequence", "PixelValueTransformationSequence")
                 if (sequence := owner.get(name))]
        images.append(_image(path, frame, data, parts))
    return images


def _check_storage(path: Path, data: Any) -> None:
    """Refuses stored values that the header does not tie to HU."""
    photometric = clean(data.get("PhotometricInterpretation"))
    if photometric != "MONOCHROME2":
        raise NotACT(path, f"its grey scale is {photometric or 'not named'}, not MONOCHROME2, so "
                     "its values may be inverted; export the original series")
    if "ModalityLUTSequence" in data:
        raise NotACT(path, "its values go through a look-up table, not slope and intercept; "
                     "export the original series")
    allocated, stored = int(data.BitsAllocated), int(data.BitsStored)
    signed, high = int(data.PixelRepresentation), int(data.get("HighBit", stored - 1))
    if (allocated not in (8, 16, 32) or not 1 <= stored <= allocated or high != stored - 1
            or signed not in (0, 1)):
        raise NotACT(path, f"its bits (allocated {allocated}, stored {stored}, high bit {high}, "
                     f"representation {signed}) are no valid integers; the header is damaged")


def _image(path: Path, frame: int, data: Any, parts: Sequence[Any]) -> Image:
    """One slice; `parts` are the data sets that may hold its geometry and scale."""
    position = _numbers(path, parts, "ImagePositionPatient", 3)
    directions = _numbers(path, parts, "ImageOrientationPatient", 6).reshape(2, 3)
    spacing = _numbers(path, parts, "PixelSpacing", 2)
    slope, = _numbers(path, parts, "RescaleSlope", 1)
    intercept, = _numbers(path, parts, "RescaleIntercept", 1)
    if slope <= 0:
        raise NotACT(path, f"its RescaleSlope is {slope:g}, so the HU scale is unknown; export the "
                     "original series")
    if (spacing <= 0).any():
        raise NotACT(path, f"its PixelSpacing is {spacing[0]:g}x{spacing[1]:g} mm; the header is "
                     "damaged, export it again")
    lengths = np.linalg.norm(directions, axis=1)
    cosine = abs(directions[0] @ directions[1])
    if np.abs(lengths - 1).max() > 0.01 or cosine > 0.01:
        raise NotACT(path, "its ImageOrientationPatient is not two perpendicular directions; the "
                     "header is damaged, export it again")
    unit = clean(_first(parts, "RescaleType")).upper()
    if unit in _NOT_HU:
        raise NotACT(path, f"its values are {unit}, not HU; export the CT series itself")
    whole = slope.is_integer() and intercept.is_integer() and int(data.BitsAllocated) <= 16
    return Image(
        path, frame, str(data.get("FrameOfReferenceUID")), (int(data.Rows), int(data.Columns)),
        tuple(spacing.tolist()), directions[0] / lengths[0], directions[1] / lengths[1], position,
        float(slope), float(intercept), padding_range(data), bool(whole),
        str(data.get("LossyImageCompression")) == "01")


def _first(parts: Sequence[Any], name: str) -> Any:
    return next((part[name].value for part in parts if name in part), None)


def _numbers(path: Path, parts: Sequence[Any], name: str, count: int) -> np.ndarray:
    try:
        value = _first(parts, name)
        values = np.atleast_1d(np.asarray(() if value in (None, "") else value, np.float64))
    except (ValueError, TypeError, OverflowError):
        raise NotACT(path, f"its {name} is no number; the header is damaged, export it again"
                     ) from None
    if not values.size:
        raise NotACT(path, f"it has no {name}; export the original series")
    if values.shape != (count,) or not (np.abs(values) < _MAX_NUMBER).all():
        raise NotACT(path, f"its {name} is not {count} finite number{'s' * (count > 1)} below "
                     f"{_MAX_NUMBER:g}; the header is damaged, export it again")
    return values


def stack_of(path: Path, images: Sequence[Image]) -> Stack:
    """Sorts slices along their normal and finds the affine of the stack.

    Args:
        path: what the user gave, for messages.
        images: slices of one size, voxel size and direction.

    Raises:
        NotACT: slices are missing, uneven, shifted or too few.
    """
    first = images[0]
    normal = np.cross(first.along_row, first.along_column)
    positions = np.array([image.position for image in images])
    depth = positions @ normal
    order = np.argsort(depth, kind="stable")
    places: list[list[int]] = []
    for index in order:
        if places and depth[index] - depth[places[-1][0]] < _SAME_PLACE_MM:
            places[-1].append(index)
        else:
            places.append([index])
    if len(places) == 1:
        raise NotACT(path, "it holds a single slice; give the folder of the whole series"
                     if len(images) == 1 else f"its {len(images)} images all lie at one position; "
                     "it is no volume")
    told = _check_gaps(path, [images[place[0]] for place in places],
                       depth[[place[0] for place in places]])
    if len(places) < MIN_VOXELS_PER_AXIS:
        raise NotACT(path, f"it has {len(places)} slices, fewer than {MIN_VOXELS_PER_AXIS}, so it "
                     "is a fragment; give the folder of the whole series")
    bottom, top = places[0][0], places[-1][0]
    path_per_mm = (positions[top] - positions[bottom]) / (depth[top] - depth[bottom])
    tilt = math.degrees(math.acos(min(1.0, 1 / float(np.linalg.norm(path_per_mm)))))
    straight = positions[bottom] + np.outer(depth - depth[bottom], path_per_mm)
    aside = float(np.linalg.norm(positions - straight, axis=1).max())
    if tilt > _MAX_TILT_DEGREES or aside > SNAP_MM:
        raise NotACT(path, f"its slices are shifted sideways by up to {aside:.3g} mm off a "
                     f"straight line, tilted by {tilt:.3g} degrees; keep the images of one volume")
    if tilt > _TOLD_TILT_DEGREES:
        told += (f"gantry tilt of {tilt:.3g} degrees is corrected",)
    affine = np.eye(4)
    affine[:3, 0] = first.along_row * first.spacing[1]
    affine[:3, 1] = first.along_column * first.spacing[0]
    affine[:3, 2] = (positions[top] - positions[bottom]) / (len(places) - 1)
    affine[:3, 3] = positions[bottom]
    affine[:3] = LPS_TO_RAS @ affine[:3]
    told += check_affine(path, "geometry", affine, (*first.size[::-1], len(places)))
    slices = (depth[[place[0] for place in places]] - depth[bottom]) / (depth[top] - depth[bottom])
    slices *= len(places) - 1
    spacing = (depth[top] - depth[bottom]) / (len(places) - 1)
    if np.abs(slices - np.arange(len(places))).max() * spacing < SNAP_MM:
        slices = None
    return Stack(tuple(tuple(images[index] for index in place) for place in places), affine,
                  slices, told)


def _check_gaps(path: Path, images: Sequence[Image], depth: np.ndarray) -> tuple[str, ...]:
    gaps = np.diff(depth)
    usual = float(np.median(gaps))
    widest = int(gaps.argmax())
    ratio = gaps[widest] / usual
    if ratio > _MAX_GAP:
        between = " and ".join(clean(image.path.name) for image in images[widest:widest + 2])
        text = f"the gap is {gaps[widest]:.4g} mm where it is usually {usual:.4g} mm"
        if abs(ratio - round(ratio)) < 0.1:
            raise NotACT(path, f"slices are missing between {between}: {text}; copy the whole "
                         "series")
        raise NotACT(path, f"its slices are uneven between {between}: {text}; keep the images of "
                     "one acquisition")
    if max(abs(gaps.max() - usual), abs(gaps.min() - usual)) > SNAP_MM:
        return (f"uneven gaps of {gaps.min():.4g} to {gaps.max():.4g} mm; each slice is taken "
                "where it lies",)
    return ()


def decode(path: Path, stack: Stack) -> tuple[np.ndarray, tuple[str, ...]]:
    """Decodes every image into its place, file by file.

    Returns:
        HU [columns, rows, slices] and what is odd about the pixels, one sentence each.

    Raises:
        NotACT: pixels are damaged, or different images lie at one place.
    """
    rows, columns = stack.places[0][0].size
    images = [image for place in stack.places for image in place]
    whole = all(image.whole for image in images)
    hu = np.empty((columns, rows, len(stack.places)), np.int16 if whole else np.float32, order="F")
    wanted: dict[Path, dict[int, tuple[int, Image]]] = defaultdict(dict)
    for k, place in enumerate(stack.places):
        for image in place:
            wanted[image.path][image.frame] = k, image
    filled: dict[int, Image] = {}
    twins, spared = 0, 0
    for file, frames in wanted.items():
        for number, raw in enumerate(pixels(file)):
            k, image = frames[number]
            plane, ignored = _to_hu(raw, image)
            spared += ignored
            if k not in filled:
                hu[..., k] = plane.T
                filled[k] = image
                continue
            if not np.array_equal(hu[..., k], plane.T.astype(hu.dtype)):
                names = " and ".join(clean(one.path.name) for one in (filled[k], image))
                raise NotACT(path, f"different images lie at one position ({names}): several "
                             "phases, times or reconstructions; keep the images of one volume")
            twins += 1
    told = ()
    if twins:
        told += (f"{twins} images are there twice; one of each is taken",)
    if spared:
        told += (f"PixelPaddingValue is a value of tissue in {spared} images and is not used",)
    return hu, told


def _to_hu(raw: np.ndarray, image: Image) -> tuple[np.ndarray, bool]:
    """Returns HU [rows, columns] as float64, clipped to int16, and if the padding was ignored."""
    hu = raw * image.slope + image.intercept
    ignored = False
    if image.padding is not None:
        low, high = (value * image.slope + image.intercept for value in image.padding)
        padded = (raw >= image.padding[0]) & (raw <= image.padding[1])
        if high <= _TISSUE_HU[0] or low >= _TISSUE_HU[1]:
            hu[padded] = AIR
        else:
            ignored = bool(padded.any())
    # Beyond int16 there is no tissue, and the canonical clamp is narrower anyway.
    return np.clip(hu, -32768, 32767, out=hu), ignored
