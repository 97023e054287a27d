"""Radiographs (PNG, JPEG, DICOM) to square 8-bit images, MGCA's way; what is none is refused.

The longest side is brought to 256 by averaging areas and the other padded with black on both sides,
as MGCA does with its images before any crop. Pictures of 8 bits keep their values; DICOM, after the
window its header asks for, and deeper pictures are spread from their darkest to their brightest
value. Files are told by content. Pillow and pydicom are imported only inside functions.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from brgsa_jax.config import UserError
from brgsa_jax.data.dicom_file import (
    clean,
    guarded,
    is_dicom,
    padding_range,
    pixels,
    read_header,
)
from brgsa_jax.data.volume import NotACT

SIZE = 256
_MAX_PIXELS = 64_000_000  # The largest detectors have 20 million.
_MIN_SIDE = 32
_MAX_SIDE = 4096
_MODALITIES = ("CR", "DX", "RG", "DR")
_TAGS = (
    "Modality", "NumberOfFrames", "PhotometricInterpretation", "BitsAllocated", "BitsStored",
    "PixelRepresentation", "PixelPaddingValue", "PixelPaddingRangeLimit", "RescaleSlope",
    "RescaleIntercept", "ModalityLUTSequence", "VOILUTSequence", "WindowCenter", "WindowWidth",
    "VOILUTFunction")


@dataclass(frozen=True)
class Radiograph:
    """The recipe of a stored radiograph, the counterpart of `volume.Preprocess`.

    Attributes:
        shape: (H, W) pixels of the square.
        spacing: (); the size of a pixel is not known.
        dtype: of the grey levels, only "uint8".
        kind: only "radiograph".
    """

    shape: tuple[int, int] = (SIZE, SIZE)
    spacing: tuple[float, ...] = ()
    dtype: str = "uint8"
    kind: str = "radiograph"

    def __post_init__(self) -> None:
        if (self.kind, self.dtype, tuple(self.spacing)) != ("radiograph", "uint8", ()):
            raise UserError(f"the recipe {asdict(self)} is none of radiographs, whose dtype is "
                            "uint8 and whose spacing is empty; build the data set anew")
        if len(self.shape) != 2 or self.shape[0] != self.shape[1] or not all(
                int(n) == n and _MIN_SIDE <= n <= _MAX_SIDE for n in self.shape):
            raise UserError(f"radiographs of the shape {self.shape} cannot be stored; choose one "
                            f"size of {_MIN_SIDE} to {_MAX_SIDE} pixels for both sides")
        object.__setattr__(self, "shape", tuple(int(n) for n in self.shape))
        object.__setattr__(self, "spacing", ())

    def as_dict(self) -> dict[str, Any]:
        """Returns the recipe as JSON types."""
        return {key: list(value) if isinstance(value, tuple) else value
                for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> "Radiograph":
        """Reads what `as_dict` wrote."""
        return cls(**{key: tuple(value) if isinstance(value, list) else value
                      for key, value in record.items()})


def load_radiograph(path: str | Path, size: int = SIZE) -> np.ndarray:
    """Reads a radiograph as a square 8-bit image, bright where the patient absorbs.

    Args:
        path: PNG, JPEG or DICOM (modality CR, DX, DR, RG), told apart by content.
        size: pixels of a side.

    Returns:
        uint8 [size, size], rows from top to bottom, padded with 0.

    Raises:
        NotACT: the file is damaged, too large or no radiograph; the message says how to mend it.
        UserError: a package that reads the file is not installed.
    """
    path = Path(path)
    if not path.is_file():
        raise NotACT(path, "there is no such file; check the path")
    image = _read_dicom(path) if is_dicom(path) else _read_picture(path)
    if min(image.shape) < _MIN_SIDE:
        raise NotACT(path, f"it has {image.shape[0]}x{image.shape[1]} pixels, fewer than "
                     f"{_MIN_SIDE} on a side; give the full image, not a thumbnail")
    low, high = float(image.min()), float(image.max())
    if not low < high:
        raise NotACT(path, f"every pixel is {low:g}; export the image again")
    if image.dtype != np.uint8:
        image = (image.astype(np.float64) - low) * (255 / (high - low))
    return fit(image, size)


def fit(image: np.ndarray, size: int) -> np.ndarray:
    """Scales the longest side to `size` by averaging areas and pads the other with 0 to a square.

    Args:
        image: [H, W] of values 0 to 255.
        size: pixels of a side of the result.

    Returns:
        uint8 [size, size].
    """
    longest = max(image.shape)
    # The reference truncates the shorter side and puts the odd row of padding at the end.
    rows, columns = (max(1, side * size // longest) for side in image.shape)
    small = _area_resize(_area_resize(image, rows).T, columns).T
    top, left = (size - rows) // 2, (size - columns) // 2
    square = np.zeros((size, size), np.uint8)
    square[top:top + rows, left:left + columns] = np.rint(small).clip(0, 255)
    return square


def _area_resize(image: np.ndarray, count: int) -> np.ndarray:
    """Averages the rows of an image over `count` equal stretches, rows in part by their share."""
    edges = np.linspace(0, image.shape[0], count + 1)
    result = np.empty((count, image.shape[1]))
    for place, (low, high) in enumerate(zip(edges[:-1], edges[1:], strict=True)):
        row = np.arange(int(low), min(math.ceil(high), image.shape[0]))
        share = np.minimum(row + 1, high) - np.maximum(row, low)
        result[place] = (share / share.sum()) @ image[row[0]:row[-1] + 1]
    return result


def _read_picture(path: Path) -> np.ndarray:
    """Reads a PNG or JPEG as grey uint8, or as deeper numbers if it has them."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    with guarded(path, "it cannot be decoded"):
        try:
            picture = Image.open(path, formats=("PNG", "JPEG"))
        except UnidentifiedImageError:
            raise NotACT(path, "it is neither PNG, JPEG nor DICOM; convert it to PNG") from None
        except Image.DecompressionBombError:
            raise NotACT(path, f"its header gives more than {_MAX_PIXELS:,} pixels; it is damaged "
                         "or no radiograph") from None
        with picture:
            if picture.width * picture.height > _MAX_PIXELS:
                raise NotACT(path, f"its header gives more than {_MAX_PIXELS:,} pixels; it is "
                             "damaged or no radiograph")
            turned = ImageOps.exif_transpose(picture)
            if turned.mode == "L" or turned.mode[0] in "IF":
                return np.asarray(turned)
            # By way of RGB, so that alpha is dropped and palettes are looked up.
            return np.asarray(turned.convert("RGB").convert("L"))


def _read_dicom(path: Path) -> np.ndarray:
    """Reads a DICOM radiograph as grey values, bright where the patient absorbs."""
    data = read_header(path, _TAGS)
    with guarded(path, "its DICOM header cannot be read"):
        modality = clean(data.get("Modality")) or "unknown"
        grey = clean(data.get("PhotometricInterpretation")) or "not named"
        frames = int(data.get("NumberOfFrames") or 1)
    if modality not in _MODALITIES:
        raise NotACT(path, f"its modality is {modality}, not {' or '.join(_MODALITIES)}; give a "
                     "radiograph")
    if grey not in ("MONOCHROME1", "MONOCHROME2"):
        raise NotACT(path, f"its grey scale is {grey}; export it in grey")
    if frames != 1:
        raise NotACT(path, f"it holds {frames} frames; export one image a file")
    stored, = pixels(path)
    with guarded(path, "its grey values cannot be computed"):
        return _shown(path, data, stored, inverted=grey == "MONOCHROME1")


def _shown(path: Path, data: Any, stored: np.ndarray, *, inverted: bool) -> np.ndarray:
    from pydicom.pixels import apply_modality_lut, apply_voi_lut

    values = apply_voi_lut(apply_modality_lut(stored, data), data).astype(np.float64)
    if not np.isfinite(values).all():
        raise NotACT(path, "its slope or window gives values that are not finite; the header is "
                     "damaged, export it again")
    if inverted:
        values = -values
    padding = padding_range(data)
    if padding is not None:
        padded = (stored >= padding[0]) & (stored <= padding[1])
        if padded.all():
            raise NotACT(path, "every pixel is padding; export the image again")
        values[padded] = values[~padded].min()
    return values
