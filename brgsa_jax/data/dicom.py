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

import os
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from brgsa_jax.data.dicom_file import clean, guarded, is_dicom, read_header
from brgsa_jax.data.dicom_stack import decode, images_of, stack_of
from brgsa_jax.data.scan import MIN_VOXELS_PER_AXIS, NotACT, Scan, check_values

_MAX_FILES = 100_000
_LISTED = 8

_DICOMDIR = "1.2.840.10008.1.3.10"
_SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
_LOCALISERS = {"LOCALIZER", "LOCALISER", "SCOUT", "TOPOGRAM", "TOP", "SURVIEW"}
_CAPTURES = {"SCREEN", "DOSE", "PROTOCOL"}
_RENDERINGS = {"MIP", "MAX_IP", "MIN_IP", "MINIP", "PROJECTION", "VRT", "RENDERING"}

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
    images = images_of(path, series.headers)
    if len(images) == 1 and not path.is_dir():
        raise NotACT(path, "it is a single slice; give the folder that holds its whole series")
    stack = stack_of(path, images)
    if any(image.lossy for image in images):
        told += ("its pixels went through lossy compression, so HU are not exact",)
    hu, decoded = decode(path, stack)
    return Scan(hu, stack.affine, told + stack.warnings + decoded + check_values(path, hu),
                stack.slices)


def _files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise NotACT(folder, "there is no such folder; check the path")

    def refuse(error: OSError) -> None:
        raise NotACT(folder, f"it cannot be searched ({error.strerror}); check its rights")

    found = []
    for parent, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        paths = [Path(parent, name) for name in sorted(names) if not name.startswith(".")]
        try:
            # Reading a pipe would block for ever, so only regular files.
            found += [path for path in paths if path.is_file()]
        except OSError as error:
            refuse(error)
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
            raise NotACT(path, f"it holds no CT series {clean(uid)}; choose among "
                         + _listed(candidates))
        return chosen[0], told
    whole = [series for series in candidates if series.images >= MIN_VOXELS_PER_AXIS]
    if len(whole) == 1:
        fragments = [series for series in candidates if series not in whole]
        if fragments:
            told += (f"set aside, too few slices: {_listed(fragments)}",)
        candidates = whole
    if len(candidates) > 1:
        raise NotACT(path, f"it holds {len(candidates)} CT series: {_listed(candidates)}; give "
                     "each its own folder, or choose one by its UID (--series of predict, "
                     "--series-column of data build)")
    return candidates[0], told


def _listed(series: Sequence[Series]) -> str:
    texts = []
    for one in series[:_LISTED]:
        try:
            stack = stack_of(Path(), images_of(Path(), one.headers))
            spacing = f"{np.linalg.norm(stack.affine[:3, 2]):.4g} mm apart"
        except NotACT:
            spacing = "spacing unknown"
        name = f"{one.description!r} " if one.description else ""
        texts.append(f"{name}{one.uid or 'without UID'} ({one.images} images, {spacing})")
    more = len(series) - _LISTED
    return ", ".join(texts) + (f" and {more} more" if more > 0 else "")
