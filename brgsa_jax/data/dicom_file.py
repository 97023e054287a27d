"""One DICOM file: its header and its pixels, believed only as far as they were checked.

Parsing and uncompressed or RLE pixels are pydicom's; JPEG, JPEG-LS and JPEG 2000 are decoded by
imagecodecs (libjpeg-turbo, CharLS, OpenJPEG), which refuses damaged streams where GDCM ends the
process. Both are imported only inside functions: extra `dicom`.
"""

import contextlib
import logging
import warnings
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from brgsa_jax.config import UserError
from brgsa_jax.data.scan import MAX_VOXELS, NO_MEMORY, NotACT, unreadable

_MAX_SIDE = 8192
_MAX_FILE_BYTES = 4 * 2**30
_MAX_INFLATED_BYTES = 2**30
_INSTALL = "run pip install 'brgsa-jax[dicom]'"

_UID = "1.2.840.10008.1.2."
_RLE = _UID + "5"
_DEFLATED = _UID + "1.99"
_JPEG = {_UID + "4." + last for last in ("50", "51", "57", "70")}
_JPEG_LS = {_UID + "4." + last for last in ("80", "81")}
_JPEG_2000 = {_UID + "4." + last for last in ("90", "91", "201", "202", "203")}
_END_OF_IMAGE = b"\xff\xd9"

_PIXEL_TAGS = (
    "Rows", "Columns", "NumberOfFrames", "SamplesPerPixel", "PhotometricInterpretation",
    "PlanarConfiguration", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation",
    "ExtendedOffsetTable", "ExtendedOffsetTableLengths", "PixelData")


class _Stream(NamedTuple):
    """What a compressed image says of itself."""

    rows: int
    columns: int
    bits: int


def is_dicom(path: str | Path) -> bool:
    """Tells by its first bytes whether a file is DICOM, with or without the usual preamble."""
    try:
        if not Path(path).is_file():  # Opening a pipe would block for ever.
            return False
        with Path(path).open("rb") as stream:
            head = stream.read(132)
    except OSError:
        return False
    if head[128:] == b"DICM":
        return True
    # Without a preamble the file begins with two short elements of group 2 or 8.
    if head[:2] not in (b"\x02\x00", b"\x08\x00", b"\x00\x08"):
        return False
    explicit = head[4:6].isalpha() and head[4:6].isupper()
    length = int.from_bytes(head[6 if explicit else 4:8], "little" if head[0] else "big")
    return head[8 + length:10 + length] == head[:2]


def read_header(path: str | Path, tags: Sequence[str]) -> Any:
    """Reads these elements of a DICOM file; others, the patient's among them, are not kept.

    Args:
        path: a DICOM file.
        tags: keywords of the elements.

    Returns:
        A pydicom data set with a transfer syntax. Its values are converted on access, which may
        raise anything on damaged bytes: use them under `guarded`.

    Raises:
        NotACT: the header is damaged or too large.
        UserError: pydicom is not installed.
    """
    return _read(Path(path), tags, whole=False)


def pixels(path: str | Path) -> Iterator[np.ndarray]:
    """Decodes the frames of a DICOM file, in order, as stored values.

    Sizes that the header and the compressed data claim are checked before anything is decompressed.

    Args:
        path: a DICOM file with pixel data.

    Yields:
        [rows, columns] of integers, or [rows, columns, samples] of colours.

    Raises:
        NotACT: the pixels are missing, damaged, cut short, or need a decoder that is not here.
    """
    path = Path(path)
    data = _read(path, _PIXEL_TAGS, whole=True)
    with guarded(path, "its pixels cannot be decoded"):
        rows, columns, count = image_size(path, data)
        samples = int(data.get("SamplesPerPixel") or 1)
        _check_pixels(path, data)
        frames = _decoded(path, data, count)
    while True:
        # The guard must not stay open while the caller holds a frame.
        with guarded(path, "its pixels cannot be decoded"):
            frame = next(frames, None)
        if frame is None:
            return
        if frame.shape != ((rows, columns) if samples == 1 else (rows, columns, samples)):
            raise NotACT(path, "its pixels do not have the size its header gives; export the "
                         "images again")
        yield frame


def image_size(path: Path, data: Any) -> tuple[int, int, int]:
    """Returns rows, columns and frames of an image after checking that a machine can hold them."""
    rows, columns, frames = (int(data.get(name) or least) for name, least in
                             (("Rows", 0), ("Columns", 0), ("NumberOfFrames", 1)))
    if not 1 <= rows <= _MAX_SIDE or not 1 <= columns <= _MAX_SIDE:
        raise NotACT(path, f"its header gives {rows}x{columns} pixels, outside 1-{_MAX_SIDE}; the "
                     "header is damaged")
    if frames < 1 or rows * columns * frames > MAX_VOXELS:
        raise NotACT(path, f"its header gives {frames:,} frames of {rows}x{columns}, more than any "
                     "CT; the header is damaged")
    return rows, columns, frames


def padding_range(data: Any) -> tuple[int, int] | None:
    """Returns the stored values, both included, that stand for no measurement; None if none do."""
    ends = [data.get(name) for name in ("PixelPaddingValue", "PixelPaddingRangeLimit")]
    if not isinstance(ends[0], int):
        return None
    # Some writers store a negative value as unsigned or the reverse.
    bits = int(data.BitsAllocated)
    least = -(1 << bits - 1) if int(data.PixelRepresentation) else 0
    ends = [(end - least) % (1 << bits) + least for end in ends if isinstance(end, int)]
    return min(ends), max(ends)


@contextlib.contextmanager
def guarded(path: Path, what: str) -> Iterator[None]:
    """Turns whatever a parser or decoder raises on damaged bytes into one sentence.

    pydicom's own errors, warnings and log are held back: they may quote the file.
    """
    log = logging.getLogger("pydicom")
    level = log.level
    log.setLevel(logging.CRITICAL + 1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except UserError:
        raise
    except MemoryError as error:
        raise NotACT(path, NO_MEMORY) from error
    except Exception as error:
        if isinstance(error, OSError) and error.strerror:
            raise unreadable(path, error) from error
        # Parsers of a format this wide raise nearly every type on damaged input.
        raise NotACT(path, f"{what} ({type(error).__name__}); it is damaged or cut short, copy or "
                     "export it again") from error
    finally:
        log.setLevel(level)


def clean(text: Any) -> str:
    """A header's text or a file's name for one line of a message."""
    text = "" if text is None else str(text)
    return "".join(letter if letter.isprintable() else "?" for letter in text).strip()[:80]


def _pydicom() -> Any:
    try:
        import pydicom
        import pydicom.pixels
    except ImportError as error:
        raise UserError(f"reading DICOM needs pydicom; {_INSTALL}") from error
    return pydicom


def _read(path: Path, tags: Sequence[str], whole: bool) -> Any:
    """Reads these tags of a DICOM file; others, the patient's among them, never enter memory."""
    pydicom = _pydicom()
    with guarded(path, "its DICOM header cannot be read"):
        size = path.stat().st_size
        if size > _MAX_FILE_BYTES:
            raise NotACT(path, f"it has {size:,} bytes, above the limit of {_MAX_FILE_BYTES:,}; "
                         "export one image a file")
        _check_deflated(path)
        data = pydicom.dcmread(path, stop_before_pixels=not whole, force=True,
                               specific_tags=list(tags))
        meta = getattr(data, "file_meta", None)
        if meta is None:
            meta = data.file_meta = pydicom.dataset.FileMetaDataset()
        if not meta.get("TransferSyntaxUID"):
            # Written without its meta header: pydicom has found out how it is encoded.
            implicit, little = data.original_encoding
            meta.TransferSyntaxUID = (
                pydicom.uid.ImplicitVRLittleEndian if implicit else
                pydicom.uid.ExplicitVRLittleEndian if little else pydicom.uid.ExplicitVRBigEndian)
    return data


def _check_deflated(path: Path) -> None:
    """Refuses a deflated data set that would not fit into memory; nothing of it is kept."""
    pydicom = _pydicom()
    with path.open("rb") as stream:
        if stream.read(132)[128:] != b"DICM":
            return
        meta = pydicom.filereader.read_dataset(
            stream, is_implicit_VR=False, is_little_endian=True,
            stop_when=lambda tag, *_: int(tag) >> 16 != 2)
        if meta.get("TransferSyntaxUID") != pydicom.uid.DeflatedExplicitVRLittleEndian:
            return
        inflate, size = zlib.decompressobj(-zlib.MAX_WBITS), 0
        while not inflate.eof:
            block = inflate.unconsumed_tail or stream.read(2**20)
            part = inflate.decompress(block, 2**24)
            if not block and not part:
                raise NotACT(path, "its deflated data is cut short; copy the file again")
            size += len(part)
            if size > _MAX_INFLATED_BYTES:
                raise NotACT(path, f"its deflated data grows beyond {_MAX_INFLATED_BYTES:,} bytes; "
                             "store it uncompressed")


def _check_pixels(path: Path, data: Any) -> None:
    """Compares the bytes that are there with what the header promises, before decoding."""
    from pydicom.encaps import generate_frames

    if not data.get("PixelData"):
        raise NotACT(path, "it has no stored pixels; export the images again")
    rows, columns, frames = image_size(path, data)
    syntax = data.file_meta.TransferSyntaxUID
    if not syntax.is_private and not syntax.is_compressed or syntax == _DEFLATED:
        bits = rows * columns * frames * int(data.SamplesPerPixel) * int(data.BitsAllocated)
        needed = bits // 8 * (2 if data.PhotometricInterpretation == "YBR_FULL_422" else 3) // 3
        if len(data.PixelData) < needed:
            raise NotACT(path, f"its header promises {needed:,} bytes of pixels and there are "
                         f"{len(data.PixelData):,}; it is cut short, copy it again")
        return
    if syntax not in {_RLE} | _JPEG | _JPEG_LS | _JPEG_2000:
        raise NotACT(path, f"its transfer syntax {clean(syntax.name)} is not supported; convert "
                     "it to an uncompressed one")
    count = 0
    for frame in generate_frames(data.PixelData, number_of_frames=frames):
        count += 1
        if syntax == _RLE:
            continue
        stream = _stream(frame)
        if stream is None or stream[:2] != (rows, columns):
            text = f"{stream.rows}x{stream.columns}" if stream else "no size"
            raise NotACT(path, f"its header gives {rows}x{columns} pixels and its compressed data "
                         f"{text}; export the images again")
        # libjpeg silently fills what is missing with grey; CharLS may look for it for seconds.
        if syntax not in _JPEG_2000 and _END_OF_IMAGE not in frame[-16:]:
            raise NotACT(path, "its compressed pixels are cut short; copy the file again")
    if count != frames:
        raise NotACT(path, f"its header gives {frames} frames and it holds {count}; it is cut "
                     "short, copy it again")


def _stream(frame: bytes) -> _Stream | None:
    """Reads the header of a JPEG, JPEG-LS or JPEG 2000 image; None if it is none of these."""
    if frame[:4] == b"\xff\x4f\xff\x51":  # Start of code stream, then SIZ.
        right, bottom, left, top = (int.from_bytes(frame[at:at + 4]) for at in (8, 12, 16, 20))
        return _Stream(bottom - top, right - left, (frame[42] & 0x7f) + 1)
    at = 2
    while frame[:2] == b"\xff\xd8" and at + 9 <= len(frame) and frame[at] == 0xff:
        marker = frame[at + 1]
        if marker == 0xf7 or 0xc0 <= marker <= 0xcf and marker not in (0xc4, 0xc8, 0xcc):
            return _Stream(int.from_bytes(frame[at + 5:at + 7]),
                           int.from_bytes(frame[at + 7:at + 9]), frame[at + 4])
        at += 1 if marker == 0xff else 2 + int.from_bytes(frame[at + 2:at + 4])
    return None


def _decoded(path: Path, data: Any, count: int) -> Iterator[np.ndarray]:
    from pydicom.encaps import generate_frames
    from pydicom.pixels import iter_pixels

    syntax = data.file_meta.TransferSyntaxUID
    if syntax == _RLE or not syntax.is_encapsulated:
        yield from iter_pixels(data, raw=True)
        return
    try:
        import imagecodecs
    except ImportError as error:
        raise UserError(f"{path}: its pixels are {syntax.name}, which needs imagecodecs; {_INSTALL}"
                        ) from error
    decode = (imagecodecs.jpeg8_decode if syntax in _JPEG else
              imagecodecs.jpegls_decode if syntax in _JPEG_LS else imagecodecs.jpeg2k_decode)
    stored, signed = int(data.BitsStored), bool(data.PixelRepresentation)
    for frame in generate_frames(data.PixelData, number_of_frames=count):
        # JPEG-LS and some writers of JPEG 2000 drop the sign, which then stands in the highest bit
        # of the stream's precision.
        bits = stored if syntax in _JPEG else min(stored, _stream(frame).bits)
        values = decode(frame).astype(np.int64) & ((1 << bits) - 1)
        if signed:
            values -= (values >> (bits - 1)) << bits
        yield values
