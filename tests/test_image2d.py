"""brgsa_jax.data.image2d: radiographs of any format as MGCA's square 8-bit images."""

import io
import math
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pydicom
import pytest
from PIL import Image, PngImagePlugin
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.sequence import Sequence
from pydicom.uid import (
    DigitalXRayImageStorageForPresentation,
    ExplicitVRLittleEndian,
    JPEGBaseline8Bit,
)

from brgsa_jax.config import UserError
from brgsa_jax.data import image2d
from brgsa_jax.data.volume import NotACT

SHIPPED = Path(pydicom.__file__).parent / "data"


def radiograph(shape=(300, 220), top=255):
    """A bright spine and heart between dark lungs, heart to the right of the picture."""
    y, x = (np.linspace(-1, 1, n).reshape([-1 if a == axis else 1 for a in range(2)])
            for axis, n in enumerate(shape))
    field = 0.9 - 0.6 * np.exp(-((np.abs(x) - 0.45) / 0.3) ** 2 - (y / 0.8) ** 2)
    field = np.maximum(field, 0.95 * np.exp(-((x - 0.25) / 0.25) ** 2 - ((y - 0.3) / 0.3) ** 2))
    field = np.where(np.broadcast_to(np.abs(x) > 0.95, shape), 0.0, field)
    return np.rint(field * top).astype(np.uint8 if top < 256 else np.uint16)


def by_hand(image, size=256):
    """MGCA's geometry, pixel by pixel: longest side to `size`, area average, black borders."""
    longest = max(image.shape)
    rows, columns = (int(side * size / longest) for side in image.shape)
    result = np.zeros((size, size))
    top, left = math.floor((size - rows) / 2), math.floor((size - columns) / 2)
    for r in range(rows):
        for c in range(columns):
            total = weight = 0.0
            y0, y1 = r * image.shape[0] / rows, (r + 1) * image.shape[0] / rows
            x0, x1 = c * image.shape[1] / columns, (c + 1) * image.shape[1] / columns
            for y in range(math.floor(y0), min(math.ceil(y1), image.shape[0])):
                for x in range(math.floor(x0), min(math.ceil(x1), image.shape[1])):
                    share = (min(y + 1, y1) - max(y, y0)) * (min(x + 1, x1) - max(x, x0))
                    total, weight = total + share * image[y, x], weight + share
            result[top + r, left + c] = total / weight
    return result


def write_dicom(path, stored, syntax=ExplicitVRLittleEndian, **elements):
    data = Dataset()
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = syntax
    data.SOPClassUID = data.file_meta.MediaStorageSOPClassUID = (
        DigitalXRayImageStorageForPresentation)
    data.SOPInstanceUID = data.file_meta.MediaStorageSOPInstanceUID = "1.2.826.0.1.3680043.10.2"
    values = dict(Modality="DX", PhotometricInterpretation="MONOCHROME2", SamplesPerPixel=1,
                  BitsAllocated=8 * stored.dtype.itemsize, BitsStored=8 * stored.dtype.itemsize,
                  HighBit=8 * stored.dtype.itemsize - 1,
                  PixelRepresentation=int(stored.dtype.kind == "i"), PatientName="Musterfrau^Erika",
                  Rows=stored.shape[-2], Columns=stored.shape[-1])
    for name, value in {**values, **elements}.items():
        if value is not None:
            setattr(data, name, value)
    if "PixelData" not in data:
        data.PixelData = stored.astype(stored.dtype.newbyteorder("<")).tobytes()
    data["PixelData"].VR = "OB" if syntax.is_encapsulated else "OW"
    data["PixelData"].is_undefined_length = syntax.is_encapsulated
    data.save_as(path, enforce_file_format=True)
    return path


def save(path, array, **options):
    Image.fromarray(array).save(path, **options)
    return path


@pytest.mark.parametrize("shape,size", [((61, 40), 32), ((40, 61), 32), ((50, 50), 32),
                                        ((33, 47), 64), ((97, 96), 33)])
def test_geometry_is_the_references(shape, size):
    image = radiograph(shape)
    square = image2d.fit(image, size)
    assert square.shape == (size, size) and square.dtype == np.uint8
    assert np.abs(square - by_hand(image, size)).max() <= 0.5 + 1e-9


def test_longest_side_always_fills_the_square():
    for side in range(100, 3000, 283):
        square = image2d.fit(np.full((side, side // 2), 9, np.uint8), 256)
        assert (square == 9).any(axis=1).all() and (square == 9).any(axis=0).sum() in (127, 128)


@pytest.mark.parametrize("suffix,tolerance", [(".png", 0), (".jpg", 4), (".anything", 0)])
def test_pictures_keep_their_values(tmp_path, suffix, tolerance):
    image = radiograph()
    path = tmp_path / f"x{suffix}"
    save(path, image, format="JPEG" if suffix == ".jpg" else "PNG",
         **({"quality": 95} if suffix == ".jpg" else {}))
    got = image2d.load_radiograph(path)
    want = image2d.fit(image, 256)
    assert got.shape == (256, 256) and got.dtype == np.uint8
    assert np.abs(got.astype(int) - want).max() <= tolerance
    # Top stays top, and the heart stays on the right of the picture.
    assert got[150:190, 150:165].mean() > got[150:190, 85:100].mean() + 50


def test_colours_alpha_palettes_and_turned_pictures_become_grey(tmp_path):
    image = radiograph()
    want = image2d.fit(image, 256)
    grey = Image.fromarray(image)
    alpha = Image.new("L", grey.size, 0)
    exif = Image.Exif()
    exif[0x0112] = 6  # Shown after a quarter turn to the right.
    variants = {
        "rgb": grey.convert("RGB"), "palette": grey.convert("P"),
        "rgba": Image.merge("RGBA", [grey] * 3 + [alpha]), "la": Image.merge("LA", [grey, alpha])}
    for name, picture in variants.items():
        picture.save(tmp_path / f"{name}.png")
        got = image2d.load_radiograph(tmp_path / f"{name}.png")
        assert np.abs(got.astype(int) - want).max() <= 1, name
    grey.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    np.testing.assert_array_equal(image2d.load_radiograph(tmp_path / "turned.png"), want)


def test_deep_pictures_are_spread_over_8_bits(tmp_path):
    image = radiograph(top=4095) + 300
    got = image2d.load_radiograph(save(tmp_path / "deep.png", image))
    want = image2d.fit((image - 300.0) * 255 / 4095 * (4095 / (image.max() - 300)), 256)
    assert np.abs(got.astype(int) - want).max() <= 1 and got.max() == 255


@pytest.mark.parametrize("dtype,base", [(np.uint8, 0), (np.uint16, 200), (np.int16, -700)])
def test_dicom_radiographs_are_spread_and_inverted_where_they_must_be(tmp_path, dtype, base):
    image = radiograph()
    want = image2d.fit((image - float(image.min())) * 255 / (float(image.max()) - image.min()), 256)
    scale = 1 if dtype == np.uint8 else 11
    stored = (image.astype(int) * scale + base).astype(dtype)
    got = image2d.load_radiograph(write_dicom(tmp_path / "two", stored))
    assert np.abs(got.astype(int) - want).max() <= 1
    turned = (int(stored.max()) + int(stored.min()) - stored.astype(int)).astype(dtype)
    got = image2d.load_radiograph(write_dicom(
        tmp_path / "one", turned, PhotometricInterpretation="MONOCHROME1", Modality="CR"))
    assert np.abs(got.astype(int) - want).max() <= 1


def test_window_and_tables_of_the_header_are_applied(tmp_path):
    stored = np.tile(np.arange(0, 4096, 16, dtype=np.uint16), (256, 1))
    line = image2d.load_radiograph(write_dicom(
        tmp_path / "window", stored, WindowCenter=[1024, 2000], WindowWidth=[512, 100],
        BitsStored=12, HighBit=11))[128]
    # Levels of 16 stored units: the window is 768 to 1280.
    assert (line[:48] == 0).all() and (line[81:] == 255).all()
    assert abs(int(line[64]) - 128) <= 1 and (np.diff(line[48:80].astype(int)) >= 7).all()
    table = Dataset()
    table.LUTDescriptor, table.LUTExplanation = [4096, 0, 16], "SQUARE"
    table.LUTData = (np.arange(4096.0) ** 2 / 4096).astype("<u2").tobytes()
    line = image2d.load_radiograph(write_dicom(
        tmp_path / "table", stored, BitsStored=12, HighBit=11,
        VOILUTSequence=Sequence([table])))[128]
    want = np.rint((stored[0].astype(float) / stored.max()) ** 2 * 255)
    assert np.abs(line.astype(int) - want).max() <= 1


def test_padding_does_not_set_the_range(tmp_path):
    image = radiograph(top=4095).astype(np.int16)
    image[:40] = -2000
    for kind in ("MONOCHROME2", "MONOCHROME1"):
        got = image2d.load_radiograph(write_dicom(tmp_path / kind, image, PixelPaddingValue=-2000,
                                                  PhotometricInterpretation=kind))
        assert got[:33].max() == 0 and got[60:].max() == 255
        assert np.median(got[60:][got[60:] > 0]) > 40


def test_compressed_dicom_is_read(tmp_path):
    image = radiograph()
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "JPEG", quality=98)
    got = image2d.load_radiograph(write_dicom(
        tmp_path / "jpeg", image, JPEGBaseline8Bit, PixelData=encapsulate([stream.getvalue()])))
    want = image2d.load_radiograph(write_dicom(tmp_path / "plain", image))
    assert np.abs(got.astype(int) - want).max() <= 5


def png_of(width, height):
    """A PNG that promises more pixels than it holds."""
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I",
                                                                        zlib.crc32(kind + data))
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0,
                                                               0))
            + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b""))


def _text_bomb(path):
    info = PngImagePlugin.PngInfo()
    info.add_text("comment", "0" * 3_000_000, zip=True)
    Image.fromarray(radiograph()).save(path, "PNG", pnginfo=info)


def _cut(path, name="PNG"):
    save(path, np.random.default_rng(0).integers(0, 255, (200, 200), np.uint8), format=name)
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])


def _dicom(shape=(300, 220), **elements):
    return lambda path: write_dicom(path, radiograph(shape), **elements)


BROKEN = {
    "nothing": (lambda p: None, "no such file"),
    "folder": (lambda p: p.mkdir(), "no such file"),
    "empty": (lambda p: p.write_bytes(b""), "neither PNG, JPEG nor DICOM"),
    "text": (lambda p: p.write_text("no picture"), "neither PNG, JPEG nor DICOM"),
    "gif": (lambda p: save(p, radiograph(), format="GIF"), "neither PNG, JPEG nor DICOM"),
    "cut PNG": (_cut, "it cannot be decoded"),
    "cut JPEG": (lambda p: _cut(p, "JPEG"), "it cannot be decoded"),
    "too many pixels": (lambda p: p.write_bytes(png_of(9000, 9000)), "more than 64,000,000 pixels"),
    "far too many": (lambda p: p.write_bytes(png_of(2**31 - 1, 2**31 - 1)), "64,000,000 pixels"),
    "pixels that are not there": (lambda p: p.write_bytes(png_of(7000, 7000)),
                                  "it cannot be decoded"),
    "text bomb": (_text_bomb, "it cannot be decoded"),
    "flat": (lambda p: save(p, np.full((99, 99), 7, np.uint8), format="PNG"), "every pixel is 7"),
    "thumbnail": (lambda p: save(p, radiograph((31, 80)), format="PNG"), "31x80 pixels, fewer"),
    "CT": (_dicom(Modality="CT"), "modality is CT, not CR"),
    "no modality": (_dicom(Modality=None), "modality is unknown"),
    "colours": (_dicom(PhotometricInterpretation="PALETTE COLOR"), "grey scale is PALETTE COLOR"),
    "frames": (_dicom(NumberOfFrames=2), "it holds 2 frames"),
    "cut DICOM": (_dicom(Rows=301), "promises 66,220 bytes"),
    "no pixels": (_dicom(PixelData=b""), "no stored pixels"),
    "huge DICOM": (_dicom(Rows=60000, Columns=60000), "outside 1-8192"),
    "flat DICOM": (_dicom(PixelData=bytes(300 * 220)), "every pixel is 0"),
    "all padding": (_dicom(PixelPaddingValue=0, PixelPaddingRangeLimit=255), "is padding"),
    "window of width 0": (_dicom(WindowCenter=5, WindowWidth=0), "grey values cannot be computed"),
    "slope not finite": (_dicom(RescaleSlope="1e400", RescaleIntercept="0"), "not finite"),
    "compressed junk": (_dicom(syntax=JPEGBaseline8Bit, PixelData=encapsulate([bytes(50)])),
                        "compressed data no size"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_radiographs_are_refused_by_name(tmp_path, name):
    make, reason = BROKEN[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        make(tmp_path / "x")
    with pytest.raises(NotACT) as caught:
        image2d.load_radiograph(tmp_path / "x")
    text = str(caught.value)
    assert reason in text and isinstance(caught.value, UserError)
    assert "\n" not in text and "Musterfrau" not in text


def test_all_files_of_pydicom_are_read_or_refused(capfd):
    seen = 0
    for path in sorted(SHIPPED.rglob("*")):
        if path.is_file() and path.suffix not in (".py", ".pyc"):
            with pytest.raises(NotACT) as caught:
                image2d.load_radiograph(path)
            assert len(caught.value.reason) > 20
            seen += 1
    # All are other modalities, or radiographs of 16 and 32 pixels.
    assert seen > 120
    assert "Traceback" not in "".join(capfd.readouterr())
