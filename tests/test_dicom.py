"""brgsa_jax.data.dicom: series found, placed and scaled; what is no volume refused by name."""

import itertools
import math
import os
import pickle
import subprocess
import sys
import warnings
import zlib
from pathlib import Path

import imagecodecs
import nibabel as nib
import numpy as np
import pydicom
import pytest
import test_volume
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate, generate_frames
from pydicom.sequence import Sequence
from pydicom.uid import (
    CTImageStorage,
    DeflatedExplicitVRLittleEndian,
    EnhancedCTImageStorage,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    HTJ2KLossless,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGExtended12Bit,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
    SecondaryCaptureImageStorage,
)

from brgsa_jax.config import UserError
from brgsa_jax.data import dicom, dicom_file
from brgsa_jax.data import volume as V

GRID = V.Preprocess(spacing=(5.0, 6.0, 7.0), shape=(24, 22, 18))
LPS = np.diag([-1.0, -1.0, 1.0])
SHAPE = (30, 26, 20)
SPACING = (4.0, 4.5, 6.0)
PATIENT = "Musterfrau^Erika"
UID = "1.2.826.0.1.3680043.10.1.{}"
SHIPPED = Path(pydicom.__file__).parent / "data"
NIBABEL = Path(nib.__file__).parent


def chest(shape=SHAPE, seed=0):
    return test_volume.chest(shape, seed)


def affine_of(matrix=None, origin=(-60.0, -50.0, -40.0)):
    """Index to LPS mm."""
    result = np.eye(4)
    result[:3, :3] = np.diag(SPACING) if matrix is None else matrix
    result[:3, 3] = origin
    return result


def rotation(degrees, axis):
    axis = np.asarray(axis, float) / np.linalg.norm(axis)
    cross = np.cross(np.eye(3), axis)
    angle = math.radians(degrees)
    return np.eye(3) + math.sin(angle) * cross + (1 - math.cos(angle)) * cross @ cross


def to_ras(affine):
    result = affine.copy()
    result[:3] = LPS @ affine[:3]
    return result


def header(series=1, instance=1, **elements):
    """A CT slice without geometry or pixels; keyword None leaves an element out."""
    data = Dataset()
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = elements.pop("syntax", ExplicitVRLittleEndian)
    sop = elements.get("SOPInstanceUID", UID.format(f"{series}.{instance}"))
    values = dict(
        SOPClassUID=CTImageStorage, SOPInstanceUID=sop, SeriesInstanceUID=UID.format(series),
        FrameOfReferenceUID=UID.format("9"), Modality="CT", SeriesDescription="LUNG 1.0",
        ImageType=["ORIGINAL", "PRIMARY", "AXIAL"], PatientName=PATIENT, PatientID="4711",
        # Both mislead on purpose: neither tells where a slice lies.
        InstanceNumber=1000 - instance, SliceThickness="1.0", SamplesPerPixel=1,
        PhotometricInterpretation="MONOCHROME2", BitsAllocated=16, BitsStored=16, HighBit=15,
        PixelRepresentation=1, RescaleSlope="1", RescaleIntercept="-1024")
    values.update(elements)
    for name, value in values.items():
        if value is not None:
            setattr(data, name, value)
    data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID
    data.file_meta.MediaStorageSOPInstanceUID = sop
    return data


def place(data, affine, k):
    """Writes the geometry of slice k of an index-to-LPS affine by the equation of PS3.3 C.7.6.2."""
    spacing = np.linalg.norm(affine[:3, :2], axis=0)
    data.ImageOrientationPatient = (affine[:3, :2] / spacing).T.ravel().round(9).tolist()
    data.PixelSpacing = [float(spacing[1]), float(spacing[0])]
    data.ImagePositionPatient = (affine[:3, 3] + k * affine[:3, 2]).round(6).tolist()


def put_pixels(data, stored):
    """Stored values [columns, rows] as pixel data."""
    data.Columns, data.Rows = stored.shape
    signed = "i" if data.PixelRepresentation else "u"
    order = ">" if data.file_meta.TransferSyntaxUID == ExplicitVRBigEndian else "<"
    pixels = np.ascontiguousarray(stored.T).astype(f"{order}{signed}{data.BitsAllocated // 8}")
    data.PixelData = pixels.tobytes()
    data["PixelData"].VR = "OW"


def write_series(folder, hu=None, affine=None, edit=None, series=1, only=None, **elements):
    """Writes [columns, rows, slices] as one file a slice, in shuffled names without suffix."""
    hu, affine = chest() if hu is None else hu, affine_of() if affine is None else affine
    folder.mkdir(parents=True, exist_ok=True)
    names = np.random.default_rng(series).permutation(hu.shape[2])
    for k in range(hu.shape[2]) if only is None else only:
        data = header(series, k, **elements)
        place(data, affine, k)
        slope, intercept = float(elements.get("RescaleSlope", 1)), -1024.0
        put_pixels(data, np.rint((hu[..., k] - intercept) / slope))
        if edit is None or edit(data, k) is not False:
            save(data, folder / f"{series}_{names[k]:03}")
    return folder


def save(data, path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # Broken values must get into the file as they are.
        with pydicom.config.disable_value_validation():
            data.save_as(path, enforce_file_format=True)


def write_enhanced(path, hu, affine, order=None, **elements):
    """Writes a volume as one enhanced CT file, its frames in any order."""
    order = range(hu.shape[2]) if order is None else order
    data = header(SOPClassUID=EnhancedCTImageStorage, RescaleSlope=None, RescaleIntercept=None,
                  NumberOfFrames=len(order), **elements)
    data.file_meta.MediaStorageSOPClassUID = EnhancedCTImageStorage
    shared, frames, stored = Dataset(), [], []
    measure, scale, plane = Dataset(), Dataset(), Dataset()
    place(plane, affine, 0)
    measure.PixelSpacing, measure.SliceThickness = plane.PixelSpacing, "1.0"
    scale.RescaleSlope, scale.RescaleIntercept, scale.RescaleType = "1", "-1024", "HU"
    orientation = Dataset()
    orientation.ImageOrientationPatient = plane.ImageOrientationPatient
    shared.PixelMeasuresSequence = Sequence([measure])
    shared.PlaneOrientationSequence = Sequence([orientation])
    shared.PixelValueTransformationSequence = Sequence([scale])
    for k in order:
        position, frame = Dataset(), Dataset()
        place(plane, affine, k)
        position.ImagePositionPatient = plane.ImagePositionPatient
        frame.PlanePositionSequence = Sequence([position])
        frames.append(frame)
        stored.append(hu[..., k].T + 1024)
    data.SharedFunctionalGroupsSequence = Sequence([shared])
    data.PerFrameFunctionalGroupsSequence = Sequence(frames)
    put_pixels(data, hu[..., 0])
    data.PixelData = np.stack(stored).astype("<i2").tobytes()
    save(data, path)
    return path


def from_nifti(tmp_path, hu, affine):
    """The same volume through the NIfTI reader, which is tested elsewhere."""
    image = nib.Nifti1Image(hu, to_ras(affine))
    image.to_filename(tmp_path / "same.nii")
    return V.load_volume(tmp_path / "same.nii", GRID)


def refused(path, **arguments):
    """The reason; holds that it is one clean sentence that names no patient."""
    with pytest.raises(V.NotACT) as caught:
        V.load_volume(path, GRID, **arguments)
    text = str(caught.value)
    assert isinstance(caught.value, UserError) and "\n" not in text and text == ascii_only(text)
    assert not any(word in text for word in ("Musterfrau", "Erika", "4711", "Traceback"))
    assert pickle.loads(pickle.dumps(caught.value)).reason == caught.value.reason
    return caught.value.reason


def ascii_only(text):
    return "".join(letter for letter in text if letter.isprintable())


TURNS = {
    "supine head first": np.diag(SPACING),
    "supine feet first": np.diag(SPACING) @ np.diag([1.0, 1.0, -1.0]),
    "prone": np.diag([-4.0, -4.5, 6.0]),
    "mirrored rows": np.diag([-4.0, 4.5, 6.0]),
    "sagittal": np.diag(SPACING)[:, [1, 2, 0]],
    "coronal, top row superior": (np.diag(SPACING) @ np.diag([1, 1, -1.0]))[:, [0, 2, 1]],
    "oblique": rotation(20, (1, 2, 3)) @ np.diag(SPACING),
    "gantry tilt": np.array([[4.0, 0, 0], [0, 4.5 * math.cos(0.32), 0],
                             [0, -4.5 * math.sin(0.32), 6.0]]),
}


@pytest.mark.parametrize("turn", TURNS)
def test_every_orientation_lands_where_the_same_nifti_does(tmp_path, turn):
    hu, affine = chest(), affine_of(TURNS[turn])
    write_series(tmp_path / "scan", hu, affine)
    scan = dicom.read_series(tmp_path / "scan")
    loaded, want = V.load_volume(tmp_path / "scan", GRID), from_nifti(tmp_path, hu, affine)
    assert scan.hu.dtype == np.int16 and scan.slices is None
    np.testing.assert_allclose(loaded.affine, want.affine, atol=1e-4)
    # Positions are written with six decimals, so oblique weights differ in the last bits.
    tolerance = 1 if turn in ("oblique", "gantry tilt") else 0
    assert np.abs(loaded.volume.astype(int) - want.volume).max() <= tolerance
    assert any("tilt" in text for text in loaded.warnings) == (turn == "gantry tilt")


def test_frame_is_left_posterior_superior(tmp_path):
    # One bright block towards the patient's left, back and head, in a prone feet-first scan: the
    # columns run to the right (-x), the rows to the front (-y), the slices are written downwards.
    hu = np.full((24, 22, 20), -1000, np.int16)
    hu[2:22, 2:20, 1:19] = 40
    hu[3:6, 4:7, 3:5] = 900
    affine = affine_of(np.diag([-4.0, -4.0, -4.0]), origin=(46.0, 42.0, 38.0))
    write_series(tmp_path / "scan", hu, affine)
    loaded = V.load_volume(tmp_path / "scan", V.Preprocess((4, 4, 4), (24, 22, 20)))
    bright = np.argwhere(loaded.volume > 800)
    assert (bright.min(0) == (18, 15, 15)).all() and (bright.max(0) == (20, 17, 16)).all()


def phantom(world):
    """A smooth HU field over LPS millimetres, unequal in every direction."""
    x, y, z = np.moveaxis(np.asarray(world, float), -1, 0)
    body = 1 / (1 + np.exp((np.hypot(x / 48, y / 40) - 1) * 12))
    lung = np.exp(-(((x - 14) / 16) ** 2 + ((y + 6) / 18) ** 2 + ((z - 8) / 30) ** 2))
    return -1000 + body * (1040 - 850 * lung + 3 * y + 2 * z)


def error_against_phantom(scan, recipe):
    """Mean absolute error of the canonical volume inside the scan."""
    canonical = V.to_canonical(scan.hu, scan.affine, recipe, scan.slices)
    affine = to_ras(V.canonical_affine(scan.hu.shape, scan.affine, recipe))
    grid = np.stack(np.meshgrid(*map(np.arange, recipe.shape), indexing="ij"), -1)
    world = grid @ affine[:3, :3].T + affine[:3, 3]
    inside = (np.hypot(world[..., 0] / 40, world[..., 1] / 32) < 1) & (np.abs(world[..., 2]) < 25)
    assert inside.sum() > 500
    return float(np.abs(canonical - phantom(world))[inside].mean())


def sampled(affine, shape, positions=None):
    index = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1).astype(float)
    if positions is not None:
        index[..., 2] = positions
    return np.rint(phantom(index @ affine[:3, :3].T + affine[:3, 3])).astype(np.int16)


def test_gantry_tilt_is_corrected_against_a_known_field(tmp_path):
    tilt = math.radians(18.5)
    matrix = np.array([[2.5, 0, 0], [0, 2.5 * math.cos(tilt), 0],
                       [0, -2.5 * math.sin(tilt), 3.0]])
    affine = affine_of(matrix, origin=(-56.25, -50.0, -35.0))
    shape, recipe = (46, 42, 32), V.Preprocess((3, 3, 3), (40, 36, 30))
    write_series(tmp_path / "scan", sampled(affine, shape), affine)
    scan = dicom.read_series(tmp_path / "scan")
    assert scan.warnings == ("gantry tilt of 18.5 degrees is corrected",)
    assert error_against_phantom(scan, recipe) < 4
    # Taking the slices as stacked along their normal, as SliceThickness suggests, is far off.
    upright = scan.affine.copy()
    normal = np.cross(upright[:3, 0], upright[:3, 1])
    upright[:3, 2] = normal / np.linalg.norm(normal) * 3.0 * math.cos(tilt)
    assert error_against_phantom(scan._replace(affine=upright), recipe) > 15


@pytest.mark.parametrize("matrix", [np.diag([2.5, 2.5, 3.0]), np.diag([-2.5, 2.5, 3.0]),
                                    rotation(15, (1, 2, 0)) @ np.diag([2.5, 2.5, 3.0])])
def test_uneven_slices_are_interpolated_where_they_lie(tmp_path, matrix):
    shape, recipe = (46, 42, 32), V.Preprocess((3, 3, 3), (40, 36, 30))
    affine = affine_of(matrix)
    affine[:3, 3] = -matrix @ (np.array(shape) - 1) / 2
    gaps = np.where(np.arange(shape[2] - 1) < 12, 0.7, 1.0)
    positions = np.concatenate([[0], np.cumsum(gaps)])
    positions += (shape[2] - 1 - positions[-1]) / 2
    hu = sampled(affine, shape, positions)

    def move(data, k):
        place(data, affine, positions[k])

    write_series(tmp_path / "scan", hu, affine, move)
    scan = dicom.read_series(tmp_path / "scan")
    assert len(scan.warnings) == 1 and "uneven gaps of 2.1 to 3 mm" in scan.warnings[0]
    rising = positions if scan.slices[1] < 0.9 else positions[-1] - positions[::-1]
    want = (rising - rising[0]) / (rising[-1] - rising[0]) * (shape[2] - 1)
    np.testing.assert_allclose(scan.slices, want, atol=1e-4)
    assert error_against_phantom(scan, recipe) < 4
    assert error_against_phantom(scan._replace(slices=None), recipe) > 15


def test_rounded_positions_are_even(tmp_path):
    def coarse(data, k):
        position = list(data.ImagePositionPatient)
        data.ImagePositionPatient = [*position[:2], round(position[2] + 0.04 * (-1) ** k, 2)]

    assert dicom.read_series(write_series(tmp_path / "s", edit=coarse)).slices is None


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRLittleEndian,
                                    ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian])
@pytest.mark.parametrize("stored", [(16, 16, 1), (16, 12, 0), (32, 32, 1)])
def test_hu_are_exact_in_every_encoding(tmp_path, syntax, stored):
    allocated, bits, signed = stored
    hu = chest().clip(-1024, 3071)
    write_series(tmp_path / "s", hu, syntax=syntax, BitsAllocated=allocated, BitsStored=bits,
                 HighBit=bits - 1, PixelRepresentation=signed)
    scan = dicom.read_series(tmp_path / "s")
    np.testing.assert_array_equal(scan.hu, hu)
    assert scan.warnings == ()


def test_bits_beyond_bits_stored_do_not_count(tmp_path):
    def overlay(data, k):
        stored = np.frombuffer(data.PixelData, "<u2") | 0xa000
        data.PixelData = stored.tobytes()

    hu = chest()
    write_series(tmp_path / "s", hu, edit=overlay, BitsStored=12, HighBit=11,
                 PixelRepresentation=0)
    np.testing.assert_array_equal(dicom.read_series(tmp_path / "s").hu, hu)


def test_each_slice_has_its_own_slope(tmp_path):
    hu = chest()

    def scale(data, k):
        slope, intercept = 0.5 + k, -1200.0 + k
        data.RescaleSlope, data.RescaleIntercept = str(slope), str(intercept)
        put_pixels(data, np.rint((hu[..., k] - intercept) / slope))

    scan = dicom.read_series(write_series(tmp_path / "s", hu, edit=scale))
    assert scan.hu.dtype == np.float32
    error = np.abs(scan.hu - hu).reshape(-1, SHAPE[2]).max(0)
    assert (error <= (0.5 + np.arange(SHAPE[2])) / 2 + 1e-3).all()


@pytest.mark.parametrize("declared,limit,air", [
    (-2000, None, True), (63536, None, True), (-2000, -1900, True), (32767, None, True),
    (1064, None, False)])
def test_padding_becomes_air_unless_tissue_has_the_value(tmp_path, declared, limit, air):
    hu = chest()
    value = -1900 if limit else declared - 65536 if declared > 32767 else declared

    def pad(data, k):
        stored = np.frombuffer(data.PixelData, "<i2").reshape(data.Rows, data.Columns).copy()
        stored[:3] = value
        data.PixelData = stored.tobytes()
        block = data.private_block(0x0029, "none", create=True)  # Unknown tags do not disturb.
        block.add_new(1, "LO", PATIENT)
        data.add_new("PixelPaddingValue", "US" if declared > 0 else "SS", declared)
        if limit:
            data.add_new("PixelPaddingRangeLimit", "SS", limit)

    scan = dicom.read_series(write_series(tmp_path / "s", hu, edit=pad))
    assert (scan.hu[:, :3] == (-1000 if air else 40)).all()
    np.testing.assert_array_equal(scan.hu[:, 3:], hu[:, 3:])
    assert ("PixelPaddingValue" in "".join(scan.warnings)) == (not air)


ENCODE = {
    JPEGLosslessSV1: lambda a: imagecodecs.jpeg8_encode(a, lossless=True, predictor=1,
                                                        bitspersample=16),
    JPEGLossless: lambda a: imagecodecs.ljpeg_encode(a, bitspersample=16),
    JPEGExtended12Bit: lambda a: imagecodecs.jpeg8_encode(a, level=100, bitspersample=12),
    JPEGLSLossless: imagecodecs.jpegls_encode,
    JPEG2000Lossless: lambda a: imagecodecs.jpeg2k_encode(a, level=0, codecformat="j2k",
                                                          reversible=True),
    HTJ2KLossless: imagecodecs.htj2k_encode,
}


def compress(data, syntax):
    """Compresses the pixels of a data set in place."""
    if syntax == RLELossless:
        data.compress(RLELossless)
        return
    sign = "i" if data.PixelRepresentation and "2000" in syntax.name else "u"
    stored = np.frombuffer(data.PixelData, f"<{sign}2").reshape(data.Rows, data.Columns)
    data.PixelData = encapsulate([ENCODE[syntax](np.ascontiguousarray(stored))])
    data["PixelData"].VR = "OB"
    data["PixelData"].is_undefined_length = True
    data.file_meta.TransferSyntaxUID = syntax


def write_coded(folder, syntax, hu=None, edit=None, **elements):
    def both(data, k):
        compress(data, syntax)
        return edit(data, k) if edit else None

    return write_series(folder, hu, edit=both, **{"BitsStored": 12, "HighBit": 11,
                                                  "PixelRepresentation": 0, **elements})


CODECS = [RLELossless, JPEGLossless, JPEGLosslessSV1, JPEGLSLossless, JPEG2000Lossless,
          HTJ2KLossless]


@pytest.mark.parametrize("syntax", CODECS, ids=lambda uid: uid.name)
@pytest.mark.parametrize("bits,signed", [(12, 0), (16, 1)])
def test_lossless_compression_gives_the_same_hu(tmp_path, syntax, bits, signed):
    hu = chest().clip(-1024, 3000)
    if signed:
        hu[:4] = -2000  # Stored below 0, where the sign may get lost.
    write_coded(tmp_path / "s", syntax, hu, BitsStored=bits, HighBit=bits - 1,
                PixelRepresentation=signed)
    assert {pydicom.dcmread(path).file_meta.TransferSyntaxUID
            for path in (tmp_path / "s").iterdir()} == {syntax}
    np.testing.assert_array_equal(dicom.read_series(tmp_path / "s").hu, hu)


def test_lossy_12_bit_jpeg_is_read_and_told(tmp_path):
    hu = chest().clip(-1024, 3000)
    write_coded(tmp_path / "s", JPEGExtended12Bit, hu, LossyImageCompression="01")
    scan = dicom.read_series(tmp_path / "s")
    assert 0 < np.abs(scan.hu.astype(int) - hu).max() < 12
    assert scan.warnings == ("its pixels went through lossy compression, so HU are not exact",)


def test_files_without_preamble_or_meta_header_are_read(tmp_path):
    write_series(tmp_path / "s", syntax=ImplicitVRLittleEndian)
    for path in (tmp_path / "s").iterdir():
        plain = Dataset()
        plain.update(pydicom.dcmread(path))
        plain.save_as(path, implicit_vr=True, little_endian=True, enforce_file_format=False)
        assert path.read_bytes()[128:132] != b"DICM"
    np.testing.assert_array_equal(dicom.read_series(tmp_path / "s").hu, chest())


def test_everything_else_in_a_study_folder_is_set_aside_by_name(tmp_path):
    study = tmp_path / "study"
    write_series(study / "deep" / "lung", chest())
    write_series(study, series=2, only=[0, 1], SeriesDescription="TOPOGRAM",
                 ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    write_series(study, series=3, only=[0], SOPClassUID=SecondaryCaptureImageStorage)
    write_series(study, series=4, only=[0], Modality="PT")
    write_series(study, series=5, only=[0, 1, 2], SeriesDescription="MONITORING")
    write_series(study, series=6, only=[0], ImageType=["DERIVED", "SECONDARY", "AXIAL", "MIP"])
    save(header(series=7, Modality="SR", PixelRepresentation=None), study / "report")
    (study / "License.txt").write_text("not an image")
    (study / ".hidden").write_bytes(b"\0" * 128 + b"DICM junk")
    (study / "empty").write_bytes(b"")
    directory = header(SOPClassUID="1.2.840.10008.1.3.10")
    save(directory, study / "DICOMDIR")
    os.symlink(study / "nowhere", study / "broken link")
    os.mkfifo(study / "pipe")
    scan = dicom.read_series(study)
    np.testing.assert_array_equal(scan.hu, chest())
    first, second = scan.warnings
    for reason in ("2 x localiser", "1 x screen capture", "1 x modality PT", "1 x no image (mod",
                   "1 x projection"):
        assert reason in first
    assert "too few slices: 'MONITORING'" in second and "3 images" in second
    found = dicom.find_series(study)
    assert [series.images for series in found.series] == [20, 3]
    assert found.set_aside["localiser"] == 2


def test_one_of_several_series_is_chosen_by_uid(tmp_path):
    write_series(tmp_path / "s", chest(), SeriesDescription="LUNG B70f")
    write_series(tmp_path / "s", chest(seed=1), series=2, SeriesDescription="SOFT B30f")
    reason = refused(tmp_path / "s")
    listed = [f"'{name}' {UID.format(uid)} (20 images, 6 mm apart)"
              for uid, name in ((1, "LUNG B70f"), (2, "SOFT B30f"))]
    assert reason == (f"it holds 2 CT series: {', '.join(listed)}; give each its own folder, or "
                      "choose one by its UID (--series of predict, --series-column of data build)")
    np.testing.assert_array_equal(dicom.read_series(tmp_path / "s", UID.format(2)).hu,
                                  chest(seed=1))
    chosen = [V.load_volume(tmp_path / "s", GRID, series=UID.format(uid)).volume for uid in (1, 2)]
    for volume, seed in zip(chosen, (0, 1), strict=True):
        want = from_nifti(tmp_path, chest(seed=seed), affine_of())
        np.testing.assert_array_equal(volume, want.volume)
    assert refused(tmp_path / "s", series="1.2.3") == (
        f"it holds no CT series 1.2.3; choose among {', '.join(listed)}")


def test_a_series_is_not_chosen_in_vain(tmp_path):
    path = write_enhanced(tmp_path / "one.dcm", chest(), affine_of())
    assert V.load_volume(path, GRID, series=UID.format(1)).volume.shape == GRID.shape
    assert "holds no CT series 1.2.3; choose among 'LUNG" in refused(path, series="1.2.3")
    from_nifti(tmp_path, chest(), affine_of())
    assert refused(tmp_path / "same.nii", series=UID.format(1)) == (
        "it is no DICOM series, so there is none to choose; leave --series out")


NUMBERS = {"ImagePositionPatient": 3, "ImageOrientationPatient": 6, "PixelSpacing": 2,
           "RescaleSlope": 1, "RescaleIntercept": 1}


@pytest.mark.parametrize("value", ["1e300", "-1e40", "1e-300", "1e9"])
def test_numbers_beyond_reason_give_a_volume_or_a_refusal(tmp_path, value, capfd):
    folder = write_series(tmp_path / "s", chest((10, 9, 8)))
    series = [(path, pydicom.dcmread(path)) for path in sorted(folder.iterdir())]
    for changed in (series, series[3:4]):
        for name, entry in [(name, at) for name, count in NUMBERS.items() for at in {0, count - 1}]:
            kept = [data[name].value for _, data in changed]
            for path, data in changed:
                values = list(np.atleast_1d(data[name].value).astype(str))
                values[entry] = value
                setattr(data, name, values)
                save(data, path)
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                try:
                    got = V.load_volume(folder, GRID)
                except V.NotACT as error:
                    assert "; " in error.reason
                else:
                    assert np.isfinite(got.affine).all() and got.volume.max() <= 1000
            for (path, data), before in zip(changed, kept, strict=True):
                setattr(data, name, before)
                save(data, path)
    assert capfd.readouterr() == ("", "")


def test_twins_are_dropped_and_told(tmp_path):
    write_series(tmp_path / "s")
    for path in sorted((tmp_path / "s").iterdir())[:5]:
        (tmp_path / "s" / f"copy of {path.name}.dcm").write_bytes(path.read_bytes())
    scan = dicom.read_series(tmp_path / "s")
    np.testing.assert_array_equal(scan.hu, chest())
    assert scan.warnings == ("5 images are there twice; one of each is taken",)


def test_enhanced_multi_frame_files_are_read(tmp_path):
    hu, affine = chest(), affine_of(TURNS["gantry tilt"])
    order = np.random.default_rng(0).permutation(hu.shape[2]).tolist()
    path = write_enhanced(tmp_path / "one.dcm", hu, affine, order)
    want = from_nifti(tmp_path, hu, affine)
    for place_of in (path, tmp_path):
        if place_of == tmp_path:
            (tmp_path / "same.nii").unlink()
        loaded = V.load_volume(place_of, GRID)
        assert np.abs(loaded.volume.astype(int) - want.volume).max() <= 1
        np.testing.assert_allclose(loaded.affine, want.affine, atol=1e-4)


def each(name, value):
    """An edit that sets one element of every slice."""
    return lambda data, k: setattr(data, name, value) if value is not None else delattr(data, name)


def one(name, value, at=7):
    return lambda data, k: each(name, value)(data, k) if k == at else None


def _extra_phase(tmp_path):
    write_series(tmp_path, chest())
    write_series(tmp_path, chest(seed=5), edit=each("SeriesInstanceUID", UID.format(1)), series=2)


def _mixed(**elements):
    def make(tmp_path):
        write_series(tmp_path, only=range(12))
        write_series(tmp_path, only=range(12, 20), series=2,
                     edit=lambda data, k: [setattr(data, name, value) for name, value in
                                           {"SeriesInstanceUID": UID.format(1),
                                            **elements}.items()] and None)
    return make


def _other_size(tmp_path):
    write_series(tmp_path, only=range(12))
    write_series(tmp_path, chest((32, 26, 20)), only=range(12, 20), series=2,
                 edit=each("SeriesInstanceUID", UID.format(1)))


def _moved(offset):
    def make(tmp_path):
        affine = affine_of()

        def edit(data, k):
            place(data, affine, k)
            data.ImagePositionPatient = (np.array(data.ImagePositionPatient)
                                         + offset(k)).round(6).tolist()
        write_series(tmp_path, edit=edit)
    return make


def _cut(share, which=3):
    def make(tmp_path):
        write_series(tmp_path)
        path = sorted(tmp_path.iterdir())[which]
        path.write_bytes(path.read_bytes()[:int(path.stat().st_size * share)])
    return make


def _coded(syntax, edit):
    return lambda tmp_path: write_coded(
        tmp_path, syntax, edit=lambda data, k: edit(data) if k == 7 else None)


def _shorten(data):
    frame = next(generate_frames(data.PixelData, number_of_frames=1))
    data.PixelData = encapsulate([frame[:len(frame) // 2]])


def _colours(data):
    frame = ENCODE[JPEG2000Lossless](np.zeros((26, 30, 3), np.uint16))
    data.PixelData = encapsulate([frame])


def _swap(data):
    """Puts a frame of another size under an unchanged header."""
    frame = ENCODE[JPEG2000Lossless](np.zeros((64, 48), np.uint16))
    data.PixelData = encapsulate([frame])


def _other_syntax(tmp_path):
    write_series(tmp_path, syntax=ImplicitVRLittleEndian)
    for path in tmp_path.iterdir():
        data = pydicom.dcmread(path)
        data.file_meta.TransferSyntaxUID = "1.2.840.113619.5.2"
        data.save_as(path, implicit_vr=True, little_endian=True, overwrite=True)


def _bomb(tmp_path):
    meta = header(syntax=DeflatedExplicitVRLittleEndian)
    save(meta, tmp_path / "bomb")
    content = (tmp_path / "bomb").read_bytes()
    group = pydicom.filereader.read_file_meta_info(tmp_path / "bomb")
    start = 132 + 12 + group.FileMetaInformationGroupLength
    deflate = zlib.compressobj(9, wbits=-15)
    zeros = b"".join([*(deflate.compress(bytes(2**20)) for _ in range(20)), deflate.flush()])
    (tmp_path / "bomb").write_bytes(content[:start] + zeros)


def _enhanced(**changes):
    def make(tmp_path):
        path = write_enhanced(tmp_path / "e.dcm", chest(), affine_of())
        data = pydicom.dcmread(path)
        for name, value in changes.items():
            setattr(data, name, value)
        save(data, path)
    return make


def _frames_without_groups(tmp_path):
    path = write_enhanced(tmp_path / "e.dcm", chest(), affine_of())
    data = pydicom.dcmread(path)
    del data.PerFrameFunctionalGroupsSequence
    save(data, path)


def _picture(tmp_path):
    write_series(tmp_path, edit=lambda data, k: put_pixels(
        data, np.linspace(0, 255, data.Rows * data.Columns).reshape(data.Columns, data.Rows)),
        RescaleIntercept="0")


def _look_up_table(data, k):
    table = Dataset()
    table.LUTDescriptor, table.LUTData = [2, 0, 16], bytes(4)
    table.ModalityLUTType = "HU"
    data.ModalityLUTSequence = Sequence([table])


def _series(edit=None, **elements):
    return lambda tmp_path: write_series(tmp_path, edit=edit, **elements)


BROKEN = {
    "missing slice": (_series(lambda data, k: k != 11), "slices are missing between 1_"),
    "two missing": (_series(lambda data, k: k not in (11, 12)), "gap is 18 mm where it is usually"),
    "uneven": (_moved(lambda k: (0, 0, 4.2 if k > 11 else 0)), "its slices are uneven between 1_"),
    "sideways": (_moved(lambda k: (3 * (k > 11), 0, 0)), "shifted sideways by up to"),
    "staircase": (_moved(lambda k: (0, 9 * k, 0)), "tilted by 56.3 degrees"),
    "one position": (_moved(lambda k: (0, 0, -6 * k)), "20 images all lie at one position"),
    "two phases": (_extra_phase, "different images lie at one position (1_"),
    "two sizes": (_other_size, "differ in Rows x Columns: 26x30 (12), 26x32 (8)"),
    "two spacings": (_mixed(PixelSpacing=[4.0, 4.0]), "differ in PixelSpacing: 4.5x4 (12)"),
    "two orientations": (_mixed(ImageOrientationPatient=[0, 1, 0, 0, 0, -1]),
                         "differ in ImageOrientationPatient: 1.000/0.000"),
    "two frames of reference": (_mixed(FrameOfReferenceUID="1.2.3"), "frames of reference"),
    "MR": (_series(Modality="MR"), "holds no CT image (set aside: 20 x modality MR, not CT)"),
    "no modality": (_series(Modality=None), "20 x modality unknown, not CT"),
    "only a localiser": (_series(ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]),
                         "20 x localiser"),
    "colours": (_series(SamplesPerPixel=3), "20 x colours, not HU"),
    "no position": (_series(each("ImagePositionPatient", None)), "no ImagePositionPatient; exp"),
    "one without position": (_series(one("ImagePositionPatient", None)),
                             "no ImagePositionPatient"),
    "position of two": (_series(each("ImagePositionPatient", [1, 2])), "not 3 finite numbers"),
    "position not finite": (_series(one("ImagePositionPatient", ["0", "0", "1e999"])),
                            "not 3 finite numbers"),
    "no orientation": (_series(each("ImageOrientationPatient", None)),
                       "no ImageOrientationPatient"),
    "skewed orientation": (_series(each("ImageOrientationPatient", [1, 0, 0, 0.6, 0.8, 0])),
                           "not two perpendicular directions"),
    "zero orientation": (_series(each("ImageOrientationPatient", [0] * 6)), "perpendicular"),
    "no spacing": (_series(each("PixelSpacing", None)), "it has no PixelSpacing"),
    "spacing 0": (_series(each("PixelSpacing", [0, 0])), "its PixelSpacing is 0x0 mm"),
    "spacing in metres": (_series(each("PixelSpacing", [0.004, 0.004])), "outside 0.05-20.0 mm"),
    "slope 0": (_series(each("RescaleSlope", "0")), "RescaleSlope is 0,"),
    "slope negative": (_series(each("RescaleSlope", "-1")), "RescaleSlope is -1, so"),
    "slope a word": (_series(lambda data, k: setattr(data["RescaleSlope"], "_value", "one")),
                     "its RescaleSlope is no number"),
    "slope not finite": (_series(each("RescaleSlope", "nan")), "RescaleSlope is not 1 finite"),
    "slope empty": (_series(each("RescaleSlope", "")), "it has no RescaleSlope"),
    "no intercept": (_series(each("RescaleIntercept", None)), "it has no RescaleIntercept"),
    "no HU": (_series(RescaleType="Z_EFF"), "its values are Z_EFF, not HU"),
    "look-up table": (_series(_look_up_table), "look-up table"),
    "inverted": (_series(PhotometricInterpretation="MONOCHROME1"), "grey scale is MONOCHROME1"),
    "high bit": (_series(HighBit=11), "high bit 11"),
    "no bits": (_series(each("BitsAllocated", None)), "its DICOM header cannot be read"),
    "one slice": (_series(only=[4]), "it holds a single slice"),
    "seven slices": (_series(only=range(7)), "it has 7 slices, fewer than 8"),
    "no pixels": (_series(one("PixelData", None)), "no stored pixels"),
    "pixels cut short": (_series(one("PixelData", bytes(600))), "promises 1,560 bytes of pixels"),
    "file cut in its pixels": (_cut(0.7), "cut short"),
    "file cut in its header": (_cut(0.2), ""),
    "lying Rows": (_series(one("Rows", 4000)), "differ in Rows x Columns"),
    "all Rows lie": (_series(each("Rows", 60)), "promises 3,600 bytes of pixels and there are"),
    "Rows beyond any CT": (_series(each("Rows", 60000)), "60000x30 pixels, outside 1-8192"),
    "no Rows": (_series(each("Rows", 0)), "0x30 pixels"),
    "compressed size lies": (_coded(JPEG2000Lossless, _swap),
                             "gives 26x30 pixels and its compressed data 64x48"),
    "RLE cut short": (_coded(RLELossless, _shorten), "cannot be decoded"),
    "JPEG lossless cut short": (_coded(JPEGLosslessSV1, _shorten), "pixels are cut short"),
    "compressed data that is none": (_coded(JPEGLSLossless, lambda d: setattr(
        d, "PixelData", encapsulate([bytes(200)]))), "and its compressed data no size"),
    "colours in the compressed data": (_coded(JPEG2000Lossless, _colours), "do not have the size"),
    "JPEG-LS cut short": (_coded(JPEGLSLossless, _shorten), "pixels are cut short"),
    "JPEG 2000 cut short": (_coded(JPEG2000Lossless, _shorten), "cannot be decoded"),
    "frames that are not there": (
        _coded(RLELossless, lambda d: setattr(d, "PixelData", encapsulate([bytes(2)]))),
        "cannot be decoded"),
    "unknown transfer syntax": (_other_syntax, "syntax 1.2.840.113619.5.2 is not supported"),
    "deflate bomb": (_bomb, "grows beyond 16,777,216 bytes"),
    "enhanced, frames lie": (_enhanced(NumberOfFrames=2000), "2000 frames and the geometry of 20"),
    "enhanced, frames beyond reason": (_enhanced(NumberOfFrames=2**31 - 1), "more than any CT"),
    "multi-frame without positions": (_frames_without_groups, "without a position for each"),
    "8-bit picture": (_picture, "8-bit picture"),
    "junk with the magic word": (lambda p: (p / "x.dcm").write_bytes(
        bytes(128) + b"DICM" + os.urandom(4096)), ""),
    "no DICOM": (lambda p: (p / "notes.txt").write_text("no images"), "it holds no CT image; give"),
    "empty folder": (lambda p: None, "it holds no CT image; give"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_series_are_refused_by_name(tmp_path, name, capfd, caplog, monkeypatch):
    monkeypatch.setattr(dicom_file, "_MAX_INFLATED_BYTES", 2**24)
    make, reason = BROKEN[name]
    make(tmp_path)
    assert reason in refused(tmp_path)
    out, error = capfd.readouterr()
    assert "Traceback" not in out + error + caplog.text and "Musterfrau" not in caplog.text


def test_sizes_are_refused_before_anything_is_decoded(tmp_path, monkeypatch):
    decode = dicom_file._decoded

    def only_good(path, data, count):
        assert (data.Rows, data.Columns, count) == (26, 30, 1)
        assert path != lying
        return decode(path, data, count)

    monkeypatch.setattr(dicom_file, "_decoded", only_good)
    for name in ("all Rows lie", "compressed size lies", "enhanced, frames lie", "two sizes"):
        (tmp_path / name).mkdir()
        BROKEN[name][0](tmp_path / name)
        lying = tmp_path / name / f"1_{np.random.default_rng(1).permutation(20)[7]:03}"
        refused(tmp_path / name)


def test_a_single_slice_given_as_a_file_asks_for_its_folder(tmp_path):
    path = write_series(tmp_path / "s", only=[3]) / "1_000"
    path = next((tmp_path / "s").iterdir())
    assert "single slice; give the folder" in refused(path)
    assert "neither a folder nor a DICOM file" in pytest.raises(
        V.NotACT, dicom.read_series, tmp_path / "nothing").value.reason


def test_importing_the_readers_brings_in_no_decoder():
    # nibabel itself imports pydicom where it is installed.
    code = ("import sys, nibabel; before = set(sys.modules); "
            "import brgsa_jax.data.dicom, brgsa_jax.data.image2d, brgsa_jax.data.arrays; "
            "new = set(sys.modules) - before; "
            "print([name for name in ('jax', 'pydicom', 'imagecodecs', 'PIL') if name in new])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_without_pydicom_the_extra_is_named(tmp_path, monkeypatch):
    write_series(tmp_path / "s", only=[3])
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(UserError, match=r"pip install 'brgsa-jax\[dicom\]'"):
        V.load_volume(tmp_path / "s", GRID)


SAMPLES = [path for root in (SHIPPED, NIBABEL) for path in sorted(root.rglob("*"))
           if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".py"]


def test_all_files_of_pydicom_and_nibabel_are_read_or_refused(capfd, caplog):
    assert len(SAMPLES) > 200
    read, reasons = [], {}
    folders = sorted({path.parent for path in SAMPLES})
    for path in [*SAMPLES, *folders]:
        try:
            volume = V.load_volume(path, GRID).volume
        except V.NotACT as error:
            reasons[path] = error.reason
            assert len(error.reason) > 20 and "\n" not in str(error)
        else:
            read.append(path)
            assert volume.shape == GRID.shape and volume.dtype == np.int16
            assert -1000 <= volume.min() < volume.max() <= 1000
    # All are single slices, pictures of other modalities or fragments.
    named = {path.name: reason for path, reason in reasons.items()}
    assert "single slice" in named["CT_small.dcm"] and "modality MR" in named["MR_small.dcm"]
    assert "5 slices" in named["CT5N"] and "2 x localiser" in named["CT2N"]
    assert "gap is 202.5 mm" in named["CT2"]
    out, error = capfd.readouterr()
    assert "Traceback" not in out + error + caplog.text


@pytest.mark.parametrize("plain,packed", [
    ("MR_small.dcm", "MR_small_RLE.dcm"), ("MR_small.dcm", "MR_small_jp2klossless.dcm"),
    ("MR_small.dcm", "MR_small_jpeg_ls_lossless.dcm"), ("MR_small.dcm", "MR_small_bigendian.dcm"),
    ("MR_small.dcm", "MR_small_implicit.dcm"), ("MR_small.dcm", "MR_small_padded.dcm")])
def test_shipped_files_of_other_software_decode_alike(plain, packed):
    frames = [next(dicom_file.pixels(SHIPPED / "test_files" / name)) for name in (plain, packed)]
    np.testing.assert_array_equal(*frames)
    assert frames[0].shape == (64, 64)


def test_sign_of_a_mislabelled_jpeg_2000_is_mended():
    # Its code stream says unsigned, its header signed; padding is -2000.
    frame, = dicom_file.pixels(SHIPPED / "test_files" / "J2K_pixelrep_mismatch.dcm")
    assert frame.min() == -2000 and 1000 < frame.max() < 4000


def test_codestream_sizes_match_their_headers():
    seen = 0
    for path in SAMPLES:
        if path.suffix == ".dcm" and dicom.is_dicom(path):
            data = pydicom.dcmread(path, force=True)
            syntax = data.file_meta.get("TransferSyntaxUID")
            if syntax and "JPEG" in syntax.name and "PixelData" in data:
                frame = next(generate_frames(data.PixelData, number_of_frames=1))
                stream = dicom_file._stream(frame)
                # One is wrapped as a .jp2, which DICOM does not allow, another damaged on purpose.
                if "sequence-delimiter" not in path.name:
                    want = None if b"jp2h" in frame else (data.Rows, data.Columns)
                    assert (stream and stream[:2]) == want, path.name
                    seen += 1
    assert seen > 15


def test_random_damage_never_gives_more_than_a_refusal(tmp_path):
    rng = np.random.default_rng(0)
    syntaxes = (ExplicitVRLittleEndian, RLELossless, JPEGLosslessSV1, JPEG2000Lossless)
    files = [next(write_coded(tmp_path / syntax, syntax, chest((30, 26, 8))).iterdir())
             if syntax != ExplicitVRLittleEndian else
             next(write_series(tmp_path / syntax, chest((30, 26, 8))).iterdir())
             for syntax in syntaxes]
    for path, _ in itertools.product(files, range(30)):
        content = path.read_bytes()
        damaged = bytearray(content)
        for at in rng.integers(132, len(content), 8):
            damaged[at] = rng.integers(256)
        path.write_bytes(damaged)
        try:
            V.load_volume(path.parent, GRID)
        except V.NotACT as error:
            assert "\n" not in str(error)
        path.write_bytes(content)
