"""DICOM series to one volume in HU: which files belong together, where they lie, what is refused.

Headers are read first, without pixels and without any tag that names a patient. Files are told by
their content, grouped by SeriesInstanceUID, and what is no part of a CT volume (localisers, dose
reports, other modalities) is set aside with its reason. The images of the one series that is left
are sorted by ImagePositionPatient along the normal of their plane; SliceThickness and the order of
file names are never used. Only then are pixels decoded, one image at a time.

What is corrected, and why it is exact:
  gantry tilt: the shear goes into the affine, and `to_canonical` resamples through all of it;
  uneven gaps up to 1.5 times the usual one: `Scan.slices` holds where each slice lies, so that
  interpolation runs between the real neighbours;
  slope and intercept of each image, applied once; padding becomes air; twin images are dropped.
Everything else that does not make one volume is refused by name.

Reading needs the extra `dicom`; importing this file does not.
"""

import math
import os
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from brgsa_jax.data.dicom_file import (
    clean,
    guarded,
    image_size,
    is_dicom,
    padding_range,
    pixels,
    read_header,
)
from brgsa_jax.data.volume import (
    _LPS_TO_RAS,
    _MAX_VOXELS,
    _MIN_VOXELS_PER_AXIS,
    _SNAP_MM,
    AIR,
    NotACT,
    Scan,
    _check_affine,
    _check_values,
)

_MAX_FILES = 100_000
_SAME_PLACE_MM = 0.02  # Closer slices are one place: the thinnest CT slices are 0.1 mm apart.
_MAX_GAP = 1.5  # In median gaps; a missing slice makes 2.
_MAX_TILT_DEGREES = 45.0  # Gantries tilt by 30 degrees at most.
_TOLD_TILT_DEGREES = 0.1
_DIRECTION_TOLERANCE = 1e-3
# Padding declared between these is a value that tissue has too.
_TISSUE_HU = (-900.0, 3071.0)
_LISTED = 8

_DICOMDIR = "1.2.840.10008.1.3.10"
_SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
_LOCALISERS = {"LOCALIZER", "LOCALISER", "SCOUT", "TOPOGRAM", "TOP", "SURVIEW"}
_CAPTURES = {"SCREEN", "DOSE", "PROTOCOL"}
_RENDERINGS = {"MIP", "MAX_IP", "MIN_IP", "MINIP", "PROJECTION", "VRT", "RENDERING"}
_NOT_HU = {"OD", "MGML", "Z_EFF", "ED", "EDW", "PCT"}  # Rescale types of the standard.

_HEADER_TAGS = [
    "SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID", "Modality",
    "ImageType", "SeriesDescription", "Rows", "Columns", "NumberOfFrames", "SamplesPerPixel",
    "PhotometricInterpretation", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation",
    "PixelSpacing", "ImageOrientationPatient", "ImagePositionPatient", "RescaleSlope",
    "RescaleIntercept", "RescaleType", "ModalityLUTSequence", "PixelPaddingValue",
    "PixelPaddingRangeLimit", "LossyImageCompression", "SharedFunctionalGroupsSequence",
    "PerFrameFunctionalGroupsSequence"]


class Series(NamedTuple):
    """The image files of one SeriesInstanceUID.

    Attributes:
        uid: SeriesInstanceUID; empty if the files have none.
        description: SeriesDescription, cleaned for display.
        headers: (path, pydicom data set without pixels) of each file.
        images: slices, frames of multi-frame files counted.
    """

    uid: str
    description: str
    headers: tuple[tuple[Path, Any], ...]
    images: int


class Found(NamedTuple):
    """What a folder holds.

    Attributes:
        series: CT series, largest first.
        set_aside: {reason: files} of DICOM files that are no part of a CT volume.
    """

    series: tuple[Series, ...]
    set_aside: dict[str, int]


class _Image(NamedTuple):
    """One slice, from its header."""

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


class _Stack(NamedTuple):
    """Images in the order of their place; several at one place must turn out to be the same."""

    places: tuple[tuple[_Image, ...], ...]
    affine: np.ndarray
    slices: np.ndarray | None
    warnings: tuple[str, ...]


def find_series(folder: str | Path) -> Found:
    """Reads the headers of all DICOM files below a folder and groups them into CT series.

    Files are told by content; everything that is not DICOM is ignored, as are hidden files and
    folders, links to folders, and DICOMDIR indices.

    Args:
        folder: searched with all its folders.

    Returns:
        The CT series and what else is there, with reasons.

    Raises:
        NotACT: the folder cannot be searched or a DICOM header is damaged.
        UserError: pydicom is not installed.
    """
    headers = [(path, read_header(path, _HEADER_TAGS))
               for path in _files(Path(folder)) if is_dicom(path)]
    return _grouped(headers)


def read_series(path: str | Path, uid: str | None = None) -> Scan:
    """Reads one CT series as HU.

    Args:
        path: a folder that holds exactly one CT series (localisers, reports and fragments beside it
            are set aside), or one multi-frame file.
        uid: SeriesInstanceUID of the series to take where there are several.

    Returns:
        HU [columns, rows, slices] with the affine; `slices` is set if the gaps are uneven.

    Raises:
        NotACT: there is not exactly one usable series; the message says why and how to mend it.
        UserError: pydicom is not installed.
    """
    path = Path(path)
    if path.is_dir():
        found = find_series(path)
    elif is_dicom(path):
        found = _grouped([(path, read_header(path, _HEADER_TAGS))])
    else:
        raise NotACT(path, "it is neither a folder nor a DICOM file; check the path")
    series, told = _choose(path, found, uid)
    images = _images(path, series)
    if len(images) == 1 and not path.is_dir():
        raise NotACT(path, "it is a single slice; give the folder that holds its whole series")
    stack = _stack(path, images)
    if any(image.lossy for image in images):
        told += ("its pixels went through lossy compression, so HU are not exact",)
    hu, decoded = _decode(path, stack)
    return Scan(hu, stack.affine, told + stack.warnings + decoded + _check_values(path, hu),
                stack.slices)


def _files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise NotACT(folder, "there is no such folder; check the path")

    def refuse(error: OSError) -> None:
        raise NotACT(folder, f"it cannot be searched ({error.strerror}); check its rights")

    found = []
    for parent, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        # Reading a pipe would block for ever, so only regular files.
        found += [path for name in sorted(names) if not name.startswith(".")
                  and (path := Path(parent) / name).is_file()]
        if len(found) > _MAX_FILES:
            raise NotACT(folder, f"it holds more than {_MAX_FILES:,} files; give the folder of one "
                         "series")
    return found


def _grouped(headers: Sequence[tuple[Path, Any]]) -> Found:
    members: dict[str, list[tuple[Path, Any]]] = defaultdict(list)
    descriptions: dict[str, str] = {}
    images: Counter[str] = Counter()
    aside: Counter[str] = Counter()
    for path, data in headers:
        with guarded(path, "its DICOM header cannot be read"):
            if str(data.file_meta.get("MediaStorageSOPClassUID")) == _DICOMDIR:
                continue
            reason = _reason_aside(data)
            if reason:
                aside[reason] += 1
                continue
            uid = clean(data.get("SeriesInstanceUID"))
            members[uid].append((path, data))
            descriptions.setdefault(uid, clean(data.get("SeriesDescription")))
            images[uid] += int(data.get("NumberOfFrames") or 1)
    found = [Series(uid, descriptions[uid], tuple(files), images[uid])
             for uid, files in members.items()]
    return Found(tuple(sorted(found, key=lambda one: (-one.images, one.uid))), dict(aside))


def _reason_aside(data: Any) -> str:
    """Says why a file is no slice of a CT volume; empty if it may be one."""
    modality = clean(data.get("Modality")) or "unknown"
    if "Rows" not in data or "Columns" not in data:
        return f"no image (modality {modality})"
    if modality != "CT":
        return f"modality {modality}, not CT"
    kinds = data.get("ImageType") or []
    words = {str(kind).upper() for kind in ([kinds] if isinstance(kinds, str) else kinds)}
    words |= {part for word in words for part in re.split(r"[\s_]+", word)}
    if words & _LOCALISERS:
        return "localiser"
    if words & _CAPTURES or str(data.get("SOPClassUID")).startswith(_SECONDARY_CAPTURE):
        return "screen capture or dose report"
    if words & _RENDERINGS:
        return "projection or rendering"
    if int(data.get("SamplesPerPixel") or 1) != 1:
        return "colours, not HU"
    return ""


def _choose(path: Path, found: Found, uid: str | None) -> tuple[Series, tuple[str, ...]]:
    """Returns the one series to read and what was left out beside it."""
    aside = ", ".join(f"{count} x {reason}" for reason, count in sorted(found.set_aside.items()))
    candidates = list(found.series)
    if not candidates:
        raise NotACT(path, "it holds no CT image" + (f" (set aside: {aside})" if aside else "")
                     + "; give the folder of one CT series")
    told = (f"set aside: {aside}",) if aside else ()
    if uid is not None:
        chosen = [series for series in candidates if series.uid == uid]
        if not chosen:
            raise NotACT(path, f"it holds no CT series {clean(uid)}; there are "
                         + _listed(candidates))
        return chosen[0], told
    whole = [series for series in candidates if series.images >= _MIN_VOXELS_PER_AXIS]
    if len(whole) == 1:
        fragments = [series for series in candidates if series not in whole]
        if fragments:
            told += (f"set aside, too few slices: {_listed(fragments)}",)
        candidates = whole
    if len(candidates) > 1:
        raise NotACT(path, f"it holds {len(candidates)} CT series: {_listed(candidates)}; give "
                     "each its own folder, or choose one by its SeriesInstanceUID")
    return candidates[0], told


def _listed(series: Sequence[Series]) -> str:
    texts = []
    for one in series[:_LISTED]:
        try:
            stack = _stack(Path(), _images(Path(), one))
            spacing = f"{np.linalg.norm(stack.affine[:3, 2]):.4g} mm apart"
        except NotACT:
            spacing = "spacing unknown"
        name = f"{one.description!r} " if one.description else ""
        texts.append(f"{name}{one.uid or 'without UID'} ({one.images} images, {spacing})")
    more = len(series) - _LISTED
    return ", ".join(texts) + (f" and {more} more" if more > 0 else "")


def _images(path: Path, series: Series) -> list[_Image]:
    """Reads what places and scales each slice, and refuses what one volume cannot have."""
    images = []
    for file, data in series.headers:
        with guarded(file, "its DICOM header cannot be read"):
            images += _file_images(file, data)
    if len(images) * math.prod(images[0].size) > _MAX_VOXELS:
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


def _file_images(path: Path, data: Any) -> list[_Image]:
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


def _image(path: Path, frame: int, data: Any, parts: Sequence[Any]) -> _Image:
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
    return _Image(
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
    if values.shape != (count,) or not np.isfinite(values).all():
        raise NotACT(path, f"its {name} is not {count} finite number{'s' * (count > 1)}; the "
                     "header is damaged, export it again")
    return values


def _stack(path: Path, images: Sequence[_Image]) -> _Stack:
    """Sorts images along their normal and finds the affine of the stack."""
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
    if len(places) < _MIN_VOXELS_PER_AXIS:
        raise NotACT(path, f"it has {len(places)} slices, fewer than {_MIN_VOXELS_PER_AXIS}, so it "
                     "is a fragment; give the folder of the whole series")
    bottom, top = places[0][0], places[-1][0]
    path_per_mm = (positions[top] - positions[bottom]) / (depth[top] - depth[bottom])
    tilt = math.degrees(math.acos(min(1.0, 1 / float(np.linalg.norm(path_per_mm)))))
    straight = positions[bottom] + np.outer(depth - depth[bottom], path_per_mm)
    aside = float(np.linalg.norm(positions - straight, axis=1).max())
    if tilt > _MAX_TILT_DEGREES or aside > _SNAP_MM:
        raise NotACT(path, f"its slices are shifted sideways by up to {aside:.3g} mm off a "
                     f"straight line, tilted by {tilt:.3g} degrees; keep the images of one volume")
    if tilt > _TOLD_TILT_DEGREES:
        told += (f"gantry tilt of {tilt:.3g} degrees is corrected",)
    affine = np.eye(4)
    affine[:3, 0] = first.along_row * first.spacing[1]
    affine[:3, 1] = first.along_column * first.spacing[0]
    affine[:3, 2] = (positions[top] - positions[bottom]) / (len(places) - 1)
    affine[:3, 3] = positions[bottom]
    affine[:3] = _LPS_TO_RAS @ affine[:3]
    told += _check_affine(path, "geometry", affine, (*first.size[::-1], len(places)))
    slices = (depth[[place[0] for place in places]] - depth[bottom]) / (depth[top] - depth[bottom])
    slices *= len(places) - 1
    spacing = (depth[top] - depth[bottom]) / (len(places) - 1)
    if np.abs(slices - np.arange(len(places))).max() * spacing < _SNAP_MM:
        slices = None
    return _Stack(tuple(tuple(images[index] for index in place) for place in places), affine,
                  slices, told)


def _check_gaps(path: Path, images: Sequence[_Image], depth: np.ndarray) -> tuple[str, ...]:
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
    if max(abs(gaps.max() - usual), abs(gaps.min() - usual)) > _SNAP_MM:
        return (f"uneven gaps of {gaps.min():.4g} to {gaps.max():.4g} mm; each slice is taken "
                "where it lies",)
    return ()


def _decode(path: Path, stack: _Stack) -> tuple[np.ndarray, tuple[str, ...]]:
    """Decodes every image into its place, file by file."""
    rows, columns = stack.places[0][0].size
    images = [image for place in stack.places for image in place]
    whole = all(image.whole for image in images)
    hu = np.empty((columns, rows, len(stack.places)), np.int16 if whole else np.float32, order="F")
    wanted: dict[Path, dict[int, tuple[int, _Image]]] = defaultdict(dict)
    for k, place in enumerate(stack.places):
        for image in place:
            wanted[image.path][image.frame] = k, image
    filled: dict[int, _Image] = {}
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


def _to_hu(raw: np.ndarray, image: _Image) -> tuple[np.ndarray, bool]:
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
