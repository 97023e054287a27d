"""NIfTI files that are damaged, odd or hostile: read exactly, or refused in one sentence."""

import gzip
import io
import os
import re
import subprocess
import sys
import tempfile
import time
import tracemalloc
import warnings
import zlib
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np
import pytest
from PIL import Image
from test_volume import affine_lps, chest

from brgsa_jax.data import volume as V

GRID = V.Preprocess(spacing=(5.0, 6.0, 7.0), shape=(24, 22, 18))
COARSE = V.Preprocess(spacing=(10.0, 10.0, 10.0), shape=(10, 9, 11))
HU, AFFINE = chest(), affine_lps()
CODES = {np.dtype(name): code for code, name in {
    2: "u1", 256: "i1", 4: "i2", 512: "u2", 8: "i4", 768: "u4", 1024: "i8", 1280: "u8",
    16: "f4", 64: "f8", 32: "c8", 1792: "c16"}.items()}
LIMIT_BYTES, LIMIT_SECONDS = 48 * 2**20, 5.0


def nifti(values=HU, affine=AFFINE, *, version=1, order="<", behind=b"", before=b"", **fields):
    """The bytes of a file, written field by field, since nibabel mends what shall be broken."""
    kind = {1: nib.Nifti1Header, 2: nib.Nifti2Header}[version]
    header = np.zeros((), kind.template_dtype.newbyteorder(order))
    header["sizeof_hdr"], header["magic"] = kind.sizeof_hdr, kind.single_magic
    if version == 2:
        header["eol_check"] = (13, 10, 26, 10)
    header["dim"] = [values.ndim, *values.shape, *[1] * (7 - values.ndim)]
    header["datatype"] = CODES.get(values.dtype, 0)
    header["bitpix"] = 8 * values.dtype.itemsize
    header["pixdim"] = [1, *np.linalg.norm(affine[:3, :3], axis=0), 0, 0, 0, 0]
    header["vox_offset"] = kind.single_vox_offset + len(before)
    header["scl_slope"], header["xyzt_units"], header["sform_code"] = 1, 2, 1
    header["srow_x"], header["srow_y"], header["srow_z"] = affine[:3]
    for name, value in fields.items():
        header[name] = value
    flag = bytes([bool(before), 0, 0, 0])
    data = values.astype(values.dtype.newbyteorder(order)).tobytes(order="F")
    return header.tobytes() + flag + before + data + behind


def qform(b=0.0, c=0.0, d=1.0, qfac=1.0, pixdim=(4.0, 4.5, 6.0), origin=(60, 50, -40), **fields):
    """Fields of a header whose only affine is its qform; by default that of `AFFINE`."""
    return dict(sform_code=0, qform_code=1, quatern_b=b, quatern_c=c, quatern_d=d,
                pixdim=[qfac, *pixdim, 0, 0, 0, 0], qoffset_x=origin[0], qoffset_y=origin[1],
                qoffset_z=origin[2], **fields)


def zeros(count):
    """gzip members of `count` zeros, made without compressing them all."""
    block = gzip.compress(bytes(2**24), 9)
    return block * (count // 2**24) + gzip.compress(bytes(count % 2**24), 9)


def damaged(data, at):
    return data[:at] + bytes([data[at] ^ 0x55]) + data[at + 1:]


def picture(form):
    stream = io.BytesIO()
    Image.fromarray(np.arange(4096, dtype=np.uint8).reshape(64, 64)).save(stream, form)
    return stream.getvalue()


def bomb(shape, dtype="u1", count=100_000):
    """A header that promises much over a stream of `count` zeros."""
    header = nifti(np.zeros((8, 8, 8), dtype), np.diag([1.0, 1, 1, 1]), dim=[3, *shape, 1, 1, 1, 1])
    return gzip.compress(header[:352]) + zeros(count)


def turned(matrix):
    result = AFFINE.copy()
    result[:3, :3] = matrix
    return result


def shear(degrees):
    return turned(np.array([[-4, 0, 0], [0, -4.5, -6 * np.tan(np.radians(degrees))], [0, 0, 6.0]]))


class Reads(NamedTuple):
    """What must come out: HU and affine of the truth, and the only warnings, as patterns."""

    hu: np.ndarray = HU
    affine: np.ndarray = AFFINE
    told: tuple[str, ...] = ()


LUNG = "may not be a chest: aerated lung"
LONG = "the file goes on after its voxels; what follows is not read"
SIZE = "its size .* leaves fewer than 8 voxels on an axis"
GZIP = r"the compressed data is damaged or cut short \(.+\); copy or download the file again"
CUT = r"its header promises [\d,]+ bytes of voxels, more than the file can hold; it is cut short"
NOT = "it is not a NIfTI, DICOM or NumPy file; convert the series, e.g. with dcm2niix"
UNKNOWN_SIDES = "sform_code and qform_code are 0, so left and right are unknown"
OFFSET = r"its data offset .+ is no whole number of bytes from (352|544) to \d+; convert"
FLOATS = HU.astype(np.float32)
HOLES = np.where(np.arange(20) < 2, np.inf, np.where(np.arange(20) < 4, np.nan, HU)).astype("f4")
FILLED = np.where(np.arange(20) < 4, -1000, HU)
MIRROR = AFFINE @ np.diag([-1.0, 1, 1, 1])
FAT = np.full((12, 12, 40), 0) + np.round(np.linspace(-1000, 400, 12)).astype("i2")[:, None, None]

# name: (file name, bytes, what must come of it)
CASES = {
    # Forms of a sound file.
    "plain": ("v.nii", nifti(), Reads()),
    "gzip": ("v.nii.gz", gzip.compress(nifti()), Reads()),
    "gzip named plain": ("v.nii", gzip.compress(nifti()), Reads()),
    "plain named gzip": ("v.nii.gz", nifti(), Reads()),
    "named nothing": ("v", nifti(), Reads()),
    "gzip in two members": ("v.nii.gz", gzip.compress(nifti()[:9000])
                            + gzip.compress(nifti()[9000:]), Reads()),
    "gzip with zero padding": ("v.nii.gz", gzip.compress(nifti()) + bytes(512), Reads()),
    "big endian": ("v.nii", nifti(order=">"), Reads()),
    "big endian floats": ("v.nii", nifti(FLOATS, order=">"), Reads()),
    "NIfTI-2": ("v.nii.gz", gzip.compress(nifti(version=2)), Reads()),
    "NIfTI-2 big endian": ("v.nii", nifti(version=2, order=">"), Reads()),
    "name with a line break": ("a\nb.nii", nifti(), Reads()),
    "name of no script": (os.fsdecode(b"\xff.nii"), nifti(), Reads()),
    "64-bit integers": ("v.nii", nifti(HU.astype("i8")), Reads()),
    "extension": ("v.nii", nifti(before=b"\x10\0\0\0\x04\0\0\0comment!"), Reads()),
    "extension with a bad size": ("v.nii", nifti(before=b"\xff\xff\xff\x7f" + bytes(12)), Reads()),
    "extension of size 0": ("v.nii", nifti(before=bytes(64)), Reads()),
    "offset no multiple of 16": ("v.nii", nifti(before=bytes(9)), Reads()),
    # Length.
    "empty": ("v.nii", b"", "it is empty; copy or download it again"),
    "gzip of nothing": ("v.nii.gz", gzip.compress(b""), "it is empty; copy or download it again"),
    "header cut": ("v.nii", nifti()[:200], "ends within its header, after 200 bytes"),
    "NIfTI-2 header cut": ("v.nii", nifti(version=2)[:400], "ends within its header, after 400"),
    "header alone": ("v.nii", nifti()[:352], CUT),
    "one byte short": ("v.nii", nifti()[:-1], CUT),
    "voxels cut in gzip": ("v.nii.gz", gzip.compress(nifti()[:-999]),
                           "it ends after 30,201 of 31,200 bytes of voxels"),
    "gzip cut": ("v.nii.gz", gzip.compress(nifti())[:-2000], GZIP),
    "gzip cut in its header": ("v.nii.gz", gzip.compress(nifti())[:9], GZIP),
    "gzip without its end": ("v.nii.gz", gzip.compress(nifti())[:-8], GZIP),
    "gzip checksum": ("v.nii.gz", damaged(gzip.compress(nifti()), -6), GZIP),
    "gzip length": ("v.nii.gz", damaged(gzip.compress(nifti()), -1), GZIP),
    "gzip damaged": ("v.nii.gz", damaged(gzip.compress(nifti()), 9000), GZIP),
    "gzip followed by junk": ("v.nii.gz", gzip.compress(nifti()) + b"junk", GZIP),
    "voxels followed by junk": ("v.nii", nifti(behind=b"junk"), Reads(told=(LONG,))),
    "one slice too many": ("v.nii.gz", gzip.compress(nifti(behind=bytes(1560))),
                           Reads(told=(LONG,))),
    # Bombs.
    "stream without end": ("v.nii.gz", gzip.compress(nifti()) + zeros(2**31), Reads(told=(LONG,))),
    "header promises 10 TB": ("v.nii.gz", bomb((30000, 30000, 12000)), "more than any CT"),
    "header promises 8 GB": ("v.nii.gz", bomb((1000, 1000, 1000), "f8"), "above the limit of"),
    "header promises 1 GB": ("v.nii.gz", bomb((1000, 1000, 1000)), CUT),
    "sizes overflow": ("v.nii", nifti(version=2, dim=[3, 2**62, 2**62, 8, 1, 1, 1, 1]),
                       "more than any CT"),
    "sizes overflow to 0": ("v.nii", nifti(version=2, dim=[3, 2**32, 2**32, 2**32, 1, 1, 1, 1]),
                            "more than any CT"),
    "100 MB of extensions": ("v.nii.gz", gzip.compress(nifti(vox_offset=352 + 10**8)[:352])
                             + zeros(10**8) + gzip.compress(HU.tobytes(order="F")), OFFSET),
    # What it is.
    "wrong magic": ("v.nii", nifti(magic=b"n+3"), NOT),
    "magic goes on": ("v.nii", nifti(magic=b"n+1x"), NOT),
    "wrong size of the header": ("v.nii", nifti(sizeof_hdr=347), NOT),
    "Analyze": ("v.hdr", nifti(magic=b""), NOT),
    "pair, header": ("v.hdr", nifti(magic=b"ni1")[:348], "it is the header of a NIfTI pair"),
    "NIfTI-2 pair, header": ("v.hdr", nifti(version=2, magic=b"ni2")[:540], "NIfTI pair"),
    "pair, voxels": ("v.img", HU.tobytes(order="F"), NOT),
    "text": ("v.nii", b"id,report\n" * 99, NOT),
    "text, gzip": ("v.nii.gz", gzip.compress(b"id,report\n" * 99), NOT),
    "PNG": ("v.nii", picture("PNG"), NOT),
    "PNG named gzip": ("v.nii.gz", picture("PNG"), NOT),
    "TIFF": ("v.nii", picture("TIFF"), NOT),
    "zlib, not gzip": ("v.nii.gz", zlib.compress(nifti()), NOT),
    # Sizes.
    "dim[0] = 0": ("v.nii", nifti(dim=[0, 30, 26, 20, 1, 1, 1, 1]), "gives 0 dimensions"),
    "dim[0] = 9": ("v.nii", nifti(dim=[9, 30, 26, 20, 1, 1, 1, 1]), "gives 9 dimensions"),
    "dim[0] = -1": ("v.nii", nifti(dim=[-1, 30, 26, 20, 1, 1, 1, 1]), "gives -1 dimensions"),
    "dim[0] = 768": ("v.nii", nifti(dim=[768, 30, 26, 20, 1, 1, 1, 1]), "gives 768 dimensions"),
    "dim[0] = 1": ("v.nii", nifti(dim=[1, 30, 26, 20, 1, 1, 1, 1]), SIZE),
    "a dim of 0": ("v.nii", nifti(dim=[3, 30, 0, 20, 1, 1, 1, 1]), "no voxels .size 30x0x20."),
    "a negative dim": ("v.nii", nifti(dim=[3, 30, -26, 20, 1, 1, 1, 1]), "negative size 30x-26x20"),
    "two negative dims": ("v.nii", nifti(dim=[3, -30, -26, 20, 1, 1, 1, 1]), "negative size"),
    "4-D of one volume": ("v.nii", nifti(HU[..., None]), Reads()),
    "7-D of one volume": ("v.nii", nifti(dim=[7, 30, 26, 20, 1, 1, 1, 1]), Reads()),
    "4-D of three volumes": ("v.nii", nifti(np.stack([HU] * 3, -1)), "it is not one volume"),
    "slices as time": ("v.nii", nifti(dim=[4, 30, 26, 1, 20, 1, 1, 1]), "it is not one volume"),
    "2-D": ("v.nii", nifti(HU[..., 0]), SIZE),
    "one slice": ("v.nii", nifti(HU[..., :1]), SIZE),
    "seven slices": ("v.nii", nifti(HU[..., :7]), SIZE),
    "eight slices": ("v.nii", nifti(HU[..., 6:14]), Reads(HU[..., 6:14], told=(
        "may not be a chest: it covers only 120x117x48 mm",))),
    # Types.
    "RGB": ("v.nii", nifti(datatype=128, bitpix=24), "it holds RGB colours, not HU"),
    "RGBA": ("v.nii", nifti(datatype=2304, bitpix=32), "it holds RGBA colours, not HU"),
    "complex": ("v.nii", nifti(HU.astype("c8")), "it holds complex numbers, not HU"),
    "float128": ("v.nii", nifti(datatype=1536, bitpix=128), "it holds 128-bit numbers, not HU"),
    "bits": ("v.nii", nifti(datatype=1, bitpix=1), "it holds single bits, not HU"),
    "no type": ("v.nii", nifti(datatype=0), "it holds values of type code 0, not HU"),
    "bitpix contradicts": ("v.nii", nifti(bitpix=32), "4 has 16 bits and its bitpix says 32"),
    "bitpix 0": ("v.nii", nifti(bitpix=0), Reads()),
    # Scale.
    "slope 0": ("v.nii", nifti(scl_slope=0), "its scl_slope is 0 and scl_inter 0"),
    "slope NaN": ("v.nii", nifti(scl_slope=np.nan), "its scl_slope is nan and"),
    "slope inf": ("v.nii", nifti(scl_slope=np.inf), "its scl_slope is inf and"),
    "slope 1e300": ("v.nii", nifti(version=2, scl_slope=1e300), "from -32768 to 32767"),
    "slope overflows": ("v.nii", nifti(version=2, scl_slope=1.7e308), "are not numbers"),
    "slope 1e-30": ("v.nii", nifti(scl_slope=1e-30), "normalised or windowed"),
    "slope -1": ("v.nii", nifti(-HU, scl_slope=-1), Reads()),
    "slope -1 of sound HU": ("v.nii", nifti(scl_slope=-1), "raw stored values or no CT"),
    "intercept NaN": ("v.nii", nifti(scl_inter=np.nan), "its scl_slope is 1 and scl_inter nan"),
    "intercept inf": ("v.nii", nifti(scl_inter=-np.inf), "its scl_slope is 1 and scl_inter -inf"),
    "intercept -1024": ("v.nii", nifti(HU + np.int16(1024), scl_inter=-1024), Reads()),
    "half steps": ("v.nii", nifti((HU.astype(int) * 2 + 2048).astype("u2"), scl_slope=0.5,
                                  scl_inter=-1024), Reads()),
    # Where the voxels begin.
    "offset 0": ("v.nii", nifti(vox_offset=0), OFFSET),
    "offset 348": ("v.nii", nifti(vox_offset=348), OFFSET),
    "NIfTI-2 offset 352": ("v.nii", nifti(version=2, vox_offset=352), OFFSET),
    "offset negative": ("v.nii", nifti(vox_offset=-352), OFFSET),
    "offset NaN": ("v.nii", nifti(vox_offset=np.nan), OFFSET),
    "offset of a fraction": ("v.nii", nifti(vox_offset=352.5, behind=bytes(8)), OFFSET),
    "offset 1e12": ("v.nii.gz", gzip.compress(nifti(vox_offset=1e12)), OFFSET),
    "offset beyond the file": ("v.nii", nifti(vox_offset=40000), CUT),
    "offset beyond the stream": ("v.nii.gz", gzip.compress(nifti(vox_offset=40000)),
                                 "it ends after 0 of 31,200 bytes of voxels"),
    # Voxel size and affine.
    "pixdim 0": ("v.nii", nifti(pixdim=[1, 4, 0, 6, 0, 0, 0, 0]), r"\(pixdim\) is 4x0x6"),
    "pixdim NaN": ("v.nii", nifti(pixdim=[1, 4, np.nan, 6, 0, 0, 0, 0]), "is 4xnanx6"),
    "pixdim negative": ("v.nii", nifti(pixdim=[1, -4, 4.5, -6, 0, 0, 0, 0]), Reads()),
    "pixdim 1e9": ("v.nii", nifti(pixdim=[1, 1e9, 4.5, 6, 0, 0, 0, 0]), Reads(told=(
        r"pixdim 1e\+09x4.5x6 differs from the voxel size of the sform 4x4.5x6 mm",))),
    "pixdim tiny": ("v.nii", nifti(version=2, pixdim=[1, 5e-324, 4.5, 6, 0, 0, 0, 0]), Reads(told=(
        "pixdim .* differs from",))),
    "pixdim 1e9 in a qform": ("v.nii", nifti(**qform(pixdim=(1e9, 4, 6))), "size 1e.09x4x6 mm is"),
    "metres": ("v.nii", nifti(affine=affine_lps((0.004, 0.0045, 0.006)), xyzt_units=1),
               "its voxel size 0.004x0.0045x0.006 mm is outside 0.05-20.0 mm"),
    "microns": ("v.nii", nifti(affine=affine_lps((4000, 4500, 6000)), xyzt_units=3),
                "its voxel size 4000x4500x6000 mm is outside 0.05-20.0 mm"),
    "metres in name only": ("v.nii", nifti(xyzt_units=1), Reads(told=(
        "its unit is metres, which no CT of this size has; it is read as mm",))),
    "unknown unit": ("v.nii", nifti(xyzt_units=0), Reads()),
    "3.2 m long": ("v.nii", nifti(np.zeros((8, 8, 160), "u1"), affine_lps((20, 20, 20))),
                   "its extent 160x160x3200 mm is outside 10-3000 mm"),
    "7 mm long": ("v.nii", nifti(affine=affine_lps((4, 4.5, 0.35))), "its extent 120x117x7 mm"),
    "no form": ("v.nii", nifti(sform_code=0), UNKNOWN_SIDES),
    "negative form code": ("v.nii", nifti(sform_code=-1), UNKNOWN_SIDES),
    "sform NaN": ("v.nii", nifti(srow_x=[np.nan, 0, 0, 0]), "its sform is not finite"),
    "sform singular": ("v.nii", nifti(srow_z=[0, 0, 0, 0]), "its sform is singular"),
    "sform nearly singular": ("v.nii", nifti(
        affine=turned([[-4, -4, 0], [-4, -4.004, 0], [0, 0, 6]])), "its sform is singular"),
    "sform 1e300": ("v.nii", nifti(version=2, srow_x=[1e300, 0, 0, 0]), "its sform is singular"),
    "sform far away": ("v.nii", nifti(srow_x=[-4, 0, 0, 1e30]), "voxel lies at 1e.30x50x"),
    "gantry tilt": ("v.nii", nifti(affine=shear(25)), Reads(affine=shear(25))),
    "sheared by 60 degrees": ("v.nii", nifti(affine=shear(60)), "sheared by 60 degrees"),
    "mirrored": ("v.nii", nifti(affine=MIRROR), Reads(affine=MIRROR)),
    "qform alone": ("v.nii", nifti(**qform()), Reads()),
    "qfac 0 is 1": ("v.nii", nifti(**qform(qfac=0)), Reads()),
    "qfac -1": ("v.nii", nifti(**qform(qfac=-1)), Reads(affine=AFFINE @ np.diag([1.0, 1, -1, 1]))),
    "quaternion rounded": ("v.nii", nifti(**qform(d=1.00002)), Reads()),
    "quaternion too long": ("v.nii", nifti(**qform(b=2, c=2, d=2)), "its qform is not finite"),
    "quaternion NaN": ("v.nii", nifti(**qform(d=np.nan)), "its qform is not finite"),
    "quaternion inf": ("v.nii", nifti(**qform(d=-np.inf)), "its qform is not finite"),
    "qform invalid beside a sform": ("v.nii", nifti(qform_code=1, quatern_b=7), Reads(told=(
        "sform and qform differ by more than 1 mm; the sform is used",))),
    "qform of size 0 beside a sform": ("v.nii", nifti(version=2, **{
        **qform(pixdim=(1e-200, 1e-200, 1e-200)), "sform_code": 1}), Reads(told=(
            "pixdim 1e-200x1e-200x1e-200 differs", "sform and qform differ by more than 1 mm"))),
    "qform shifted": ("v.nii", nifti(**{**qform(origin=(60, 50, -38)), "sform_code": 1}), Reads(
        told=("sform and qform differ by more than 1 mm; the sform is used",))),
    "qform agrees": ("v.nii", nifti(**{**qform(), "sform_code": 2}), Reads()),
    "qform mirrored": ("v.nii", nifti(**{**qform(d=0.0, qfac=-1), "sform_code": 1}),
                       "its sform says LPS and its qform RAI"),
    "qform turned": ("v.nii", nifti(**{**qform(d=0.0), "sform_code": 1}),
                     "its sform says LPS and its qform RAS"),
    "anisotropic": ("v.nii", nifti(FAT.astype("i2"), affine_lps((10, 10, 0.3))), Reads(
        FAT, affine_lps((10, 10, 0.3)), ("may not be a chest: it covers only 120x120x12", LUNG))),
    # Values.
    "NaN": ("v.nii", nifti(FLOATS * np.nan), "100% of its voxels are not numbers"),
    "some inf and NaN": ("v.nii", nifti(HOLES), Reads(FILLED, told=(
        "20.00% of the voxels are not finite; they are taken as air",))),
    "signalling NaN": ("v.nii", nifti(np.where(np.arange(20) < 2, np.uint32(0x7f800001),
                                               FLOATS.view("u4")).view("f4")), Reads(
        np.where(np.arange(20) < 2, -1000, HU), told=("10.00% of the voxels are not finite",))),
    "floats of 1e38": ("v.nii", nifti(np.where(HU > 300, 3e38, HU).astype("f4")), Reads(
        np.where(HU > 300, 32767, HU))),
    "integers of 2^63": ("v.nii", nifti(np.where(HU > 300, np.uint64(2**63), HU + np.int16(1024))
                                        .astype("u8"), scl_inter=-1024), Reads(
        np.where(HU > 300, 32767, HU))),
    "constant": ("v.nii", nifti(HU * 0), "every voxel is 0"),
    "picture": ("v.nii", nifti((HU // 8 + 128).clip(0, 255).astype("u1")), "an 8-bit picture"),
    "raw": ("v.nii", nifti(HU + np.int16(1024)), "write scl_slope 1 and scl_inter -1024 into"),
    "raw, -8192": ("v.nii", nifti(HU + np.int16(8192)), "raw stored values .air near 7192"),
    "intercept twice": ("v.nii", nifti(HU - np.int16(1024)), "applied more than once"),
    "0 to 1": ("v.nii", nifti((FLOATS + 1000) / 2000), "normalised or windowed, not HU"),
}


def loaded(path):
    """load_volume under watch: nothing warns, and time and memory are bounded."""
    tracemalloc.start()
    start = time.process_time()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            return V.load_volume(path, GRID)
    finally:
        seconds, peak = time.process_time() - start, tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert seconds < LIMIT_SECONDS and peak < LIMIT_BYTES, (seconds, peak)


def refusal(path):
    with pytest.raises(V.NotACT) as caught:
        loaded(path)
    text = str(caught.value)
    # What is wrong; how to mend it.
    assert re.fullmatch(r"[^\n]+: .{10,}; .{10,}", text) and text.isprintable()
    assert caught.value.file == str(path)
    return caught.value.reason


@pytest.fixture(scope="module", autouse=True)
def warm(tmp_path_factory):
    """What is imported on first use is not what is measured."""
    path = tmp_path_factory.mktemp("warm") / "v.nii"
    path.write_bytes(nifti())
    V.load_volume(path, GRID)


@pytest.mark.parametrize("name", CASES)
def test_each_file_is_read_exactly_or_refused_in_one_sentence(tmp_path, name, capfd):
    file, data, want = CASES[name]
    path = tmp_path / file
    path.write_bytes(data)
    if isinstance(want, str):
        reason = refusal(path)
        assert re.search(want, reason), reason
    else:
        got = loaded(path)
        np.testing.assert_array_equal(V.read_nifti(path).hu, want.hu)
        np.testing.assert_array_equal(got.volume, V.to_canonical(want.hu, want.affine.astype("f4"),
                                                                 GRID))
        np.testing.assert_allclose(got.affine, V.canonical_affine(want.hu.shape, want.affine, GRID),
                                   atol=1e-3)
        assert got.source_orientation == "".join(nib.aff2axcodes(want.affine))
        assert len(got.warnings) == len(want.told), got.warnings
        assert all(map(re.search, want.told, got.warnings)), got.warnings
    assert capfd.readouterr() == ("", "")


def folder(path):
    path.mkdir()


def loop(path):
    path.symlink_to(path.name)


def link(path):
    (path.parent / "real").write_bytes(nifti())
    path.symlink_to("real")


PLACES = {
    "nothing": ("v.nii", lambda path: None, "there is no such file; check the path"),
    "folder": ("v.nii.gz", folder, "it holds no CT image; give the folder of one CT series"),
    "link in a loop": ("v.nii", loop, "there is no such file; check the path"),
    "link to nothing": ("v.nii", lambda path: path.symlink_to("gone"), "there is no such file"),
    "pipe": ("v.nii.gz", os.mkfifo, "it is no regular file"),
    "device": ("v.nii", lambda path: path.symlink_to("/dev/zero"), "it is no regular file"),
    "below a file": ("w/v.nii", lambda path: path.parent.write_text(""), "there is no such file"),
    "name too long": ("v" * 300, lambda path: None, "cannot be read .File name too long.; check"),
    "NUL in the name": ("v\0.nii", lambda path: None, "there is no such file; check the path"),
    "line break in the name": ("a\nb.nii", lambda path: path.write_text("x"), NOT),
}


@pytest.mark.parametrize("name", PLACES)
def test_what_is_no_file_is_refused_before_it_is_opened(tmp_path, name, capfd):
    file, make, want = PLACES[name]
    make(tmp_path / file)
    reason = refusal(tmp_path / file)
    assert re.search(want, reason), reason
    assert capfd.readouterr() == ("", "")


def test_a_link_to_a_file_is_that_file(tmp_path):
    link(tmp_path / "v.nii")
    np.testing.assert_array_equal(loaded(tmp_path / "v.nii").volume,
                                  V.to_canonical(HU, AFFINE, GRID))


def test_files_without_rights_are_refused():
    # Not below pytest's folder, which nobody else may enter.
    with tempfile.TemporaryDirectory() as name:
        shut, listed = Path(name, "shut"), Path(name, "listed")
        files = [Path(name, "v.nii"), shut / "v.nii", listed / "v.nii"]
        for path in files:
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(nifti())
        files[0].chmod(0)
        shut.chmod(0)
        listed.chmod(0o444)  # Names can be read, files cannot be reached.
        Path(name).chmod(0o755)
        root = os.geteuid() == 0
        if root:
            os.seteuid(65534)
        try:
            reasons = [refusal(path) for path in (*files, shut, listed)]
        finally:
            if root:
                os.seteuid(0)
            for path in (shut, listed):
                path.chmod(0o700)
    assert reasons == [
        *["it cannot be read (Permission denied); check the disk and the file's rights"] * 3,
        *["it cannot be searched (Permission denied); check its rights"] * 2]


def test_what_memory_cannot_hold_is_refused(tmp_path):
    path = tmp_path / "v.nii.gz"
    path.write_bytes(bomb((1100, 1000, 1000), count=1_100_000_000))
    code = ("import resource, sys\n"
            "from brgsa_jax.data import arrays, dicom, volume\n"
            "from scipy import ndimage\n"
            "resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))\n"
            "try:\n"
            "    volume.load_volume(sys.argv[1])\n"
            "except volume.NotACT as error:\n"
            "    print(error.reason)\n")
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True,
                          env={**os.environ, "OPENBLAS_NUM_THREADS": "1"}, timeout=60)
    assert done.stdout.startswith("it needs more memory than there is; ") and not done.stderr


def mutants(seed, count):
    """Sound files of several forms, damaged at random, mostly in their headers."""
    rng = np.random.default_rng(seed)
    hu, affine = chest((9, 8, 10)), affine_lps((8.0, 9.0, 8.0))
    forms = [nifti(hu, affine), nifti(hu.astype("f4"), affine, order=">"),
             nifti(hu, affine, version=2), nifti(hu, shear(10), before=bytes(16), scl_slope=0.5),
             nifti(hu, affine, **qform(pixdim=(8, 9, 8))), nifti(hu.astype("f8"), affine)]
    special = [np.array(value, dtype).tobytes() for dtypes, values in (
        (("<f4", ">f4", "<f8"), (np.nan, np.inf, -np.inf, 3e38, 1e-40, 0, 1, -1, 0.9, 1e4)),
        (("<i2", ">i2", "<i8"), (0, -1, 1, 7, 8, 9, 127, 128, 255, 256, 32767)))
        for dtype in dtypes for value in values]
    for _ in range(count):
        data = forms[rng.integers(len(forms))]
        packed = rng.random()
        data = bytearray(gzip.compress(data, 1) if packed < 0.15 else data)
        for _ in range(rng.integers(1, 4)):
            at = int(rng.integers(max(1, len(data) if rng.random() < 0.2 else 360)))
            kind = rng.choice(5, p=(0.25, 0.55, 0.1, 0.05, 0.05))
            if kind == 0:
                data[at:at + 1] = rng.bytes(1)
            elif kind == 1:
                value = special[rng.integers(len(special))]
                at -= at % len(value)
                data[at:at + len(value)] = value
            elif kind == 2:
                data[at:at + 8] = bytes(len(data[at:at + 8]))
            elif kind == 3:
                data[at:at + int(rng.integers(9))] = rng.bytes(int(rng.integers(9)))
            else:
                del data[int(rng.integers(len(data) + 1)):]
        yield gzip.compress(data, 1) if packed > 0.7 else bytes(data)


def survives(path, data):
    """Whether damage is read; holds that all else is refused in one sentence."""
    path.write_bytes(data)
    try:
        got = V.load_volume(path, COARSE)
    except V.NotACT as error:
        assert str(error).isprintable() and len(error.reason) > 20, error
        return False
    assert got.volume.dtype == np.int16 and got.volume.shape == COARSE.shape
    assert -1000 <= got.volume.min() and got.volume.max() <= 1000
    assert np.isfinite(got.affine).all() and np.isfinite(got.source_spacing).all()
    assert all(text.isprintable() for text in got.warnings)
    return True


def test_random_damage_gives_a_volume_or_a_refusal(tmp_path, capfd):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read = sum(survives(tmp_path / "v.nii.gz", data) for data in mutants(0, 1500))
    # Both ends must have been met, or the damage is no test.
    assert 300 < read < 1200
    assert capfd.readouterr() == ("", "")
