"""brgsa_jax.data.volume: geometry, HU, and the refusal of what is no usable CT."""

import gzip
import itertools
import math
import pickle
import struct
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from nibabel.testing import data_path as nibabel_data

from brgsa_jax.config import UserError
from brgsa_jax.data import nifti
from brgsa_jax.data import volume as V

SMALL = V.Preprocess(spacing=(5.0, 6.0, 7.0), shape=(24, 22, 18))
LPS = np.diag([-1.0, -1.0, 1.0, 1.0])


def chest(shape=(30, 26, 20), seed=0):
    """An int16 body with two unequal lungs and a spine, in LPS order."""
    x, y, z = (np.linspace(-1, 1, n).reshape([-1 if a == axis else 1 for a in range(3)])
               for axis, n in enumerate(shape))
    hu = np.full(shape, -1000, np.int16)
    hu[np.broadcast_to((x / 0.85) ** 2 + (y / 0.75) ** 2 < 1, shape)] = 40
    for centre, width in ((-0.4, 0.3), (0.4, 0.2)):
        hu[((x - centre) / width) ** 2 + (y / 0.5) ** 2 + (z / 0.8) ** 2 < 1] = -850
    hu[np.broadcast_to((x / 0.1) ** 2 + ((y - 0.55) / 0.1) ** 2 < 1, shape)] = 400
    noise = np.random.default_rng(seed).integers(-20, 20, shape)
    return (hu + noise).astype(np.int16)


def affine_lps(spacing=(4.0, 4.5, 6.0), origin=(-60.0, -50.0, -40.0)):
    """Index to RAS+ mm of an array in LPS order."""
    result = LPS @ np.diag([*spacing, 1.0])
    result[:3, 3] = np.array([-1, -1, 1]) * origin
    return result


def write(path, array=None, affine=None, **header):
    """Writes a NIfTI file; header fields are patched into the bytes, past nibabel's repairs."""
    array = chest() if array is None else array
    image = nib.Nifti1Image(array, affine_lps() if affine is None else affine)
    image.header.set_xyzt_units("mm")
    data = bytearray(image.to_bytes())
    for name, value in header.items():
        field, offset = nib.Nifti1Header.template_dtype.fields[name][:2]
        data[offset:offset + field.itemsize] = np.asarray(value, field.base).tobytes()
    path = Path(path)
    path.write_bytes(gzip.compress(bytes(data), 1) if path.suffix == ".gz" else bytes(data))
    return path


def trilinear(hu, affine, canonical_affine, shape):
    """The stated rule, voxel by voxel from world coordinates: nothing shared with the code."""
    grid = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1).reshape(-1, 3)
    world = grid @ canonical_affine[:3, :3].T + canonical_affine[:3, 3]
    points = (world - affine[:3, 3]) @ np.linalg.inv(affine[:3, :3]).T
    last = np.array(hu.shape) - 1
    outside = ((points < -0.5 - 1e-6) | (points > last + 0.5 + 1e-6)).any(1)
    points = np.clip(points, 0, last)
    low = np.minimum(np.floor(points).astype(int), last - 1)
    part, total = points - low, 0.0
    for corner in itertools.product((0, 1), repeat=3):
        weight = np.prod(np.where(corner, part, 1 - part), axis=1)
        total = total + weight * np.maximum(hu[tuple((low + corner).T)], -1024.0)
    total[outside] = -1000
    return np.clip(total, -1000, 1000).reshape(shape)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_all_orders_and_flips_land_on_the_same_grid(tmp_path, order):
    hu, affine = chest(), affine_lps()
    want = V.to_canonical(hu, affine, SMALL)
    assert np.abs(want - trilinear(hu, affine, V.canonical_affine(hu.shape, affine, SMALL),
                                   SMALL.shape)).max() <= 0.5 + 1e-3
    for flips in itertools.product((False, True), repeat=3):
        turned, turn = hu.transpose(order), np.zeros((4, 4))
        turn[[*order, 3], range(4)] = 1
        for axis, flip in enumerate(flips):
            if flip:
                mirror = np.eye(4)
                mirror[axis, axis], mirror[axis, 3] = -1, turned.shape[axis] - 1
                turned, turn = np.flip(turned, axis), turn @ mirror
        loaded = V.load_volume(write(tmp_path / "v.nii", turned, affine @ turn), SMALL)
        np.testing.assert_array_equal(loaded.volume, want)
        np.testing.assert_allclose(loaded.affine, V.canonical_affine(hu.shape, affine, SMALL),
                                   atol=1e-4)
        assert loaded.source_orientation == "".join(nib.aff2axcodes(affine @ turn))
        np.testing.assert_allclose(loaded.source_spacing, np.array([4.0, 4.5, 6.0])[list(order)])


def test_frame_is_left_posterior_superior():
    # One bright block in the patient's left, posterior, superior corner of an RAS array.
    hu = np.full((24, 24, 24), -1000, np.int16)
    hu[2:6, 3:7, 18:22] = 500
    out = V.to_canonical(hu, np.diag([4.0, 4.0, 4.0, 1.0]), V.Preprocess((4, 4, 4), (24, 24, 24)))
    assert {tuple(sorted(set(axis))) for axis in np.nonzero(out > 0)} == {
        (18, 19, 20, 21), (17, 18, 19, 20)}
    assert (out[18:22, 17:21, 18:22] == 500).all()


@pytest.mark.parametrize("size", [1, 5, 8, 9, 10, 11, 12, 13, 14, 31])
@pytest.mark.parametrize("target", [10, 11])
def test_crop_and_pad_rule_on_odd_sizes(size, target):
    hu = np.arange(size, dtype=np.int16)[:, None, None] + np.zeros((1, 4, 4), np.int16)
    out = V.to_canonical(hu, LPS, V.Preprocess((1, 1, 1), (target, 4, 4)))[:, 0, 0]
    if size > target:
        lower = math.ceil((size - target) / 2)
        want = list(range(lower, lower + target))
    else:
        lower = (target - size) // 2
        want = [-1000] * lower + list(range(size)) + [-1000] * (target - size - lower)
    assert out.tolist() == want


def test_border_is_edge_for_half_a_voxel_then_air_and_never_water():
    ramp = (100 * np.arange(1, 8, dtype=np.int16))[:, None, None] + np.zeros((1, 7, 7), np.int16)
    recipe = V.Preprocess((1.0, 1.0, 1.0), (64, 64, 64))
    out = V.to_canonical(ramp, LPS @ np.diag([5.0, 5.0, 5.0, 1.0]), recipe)
    # 7 voxels of 5 mm give 35 of 1 mm from the first voxel's centre on; the last one is at 30 mm.
    line = [100 + 20 * min(mm, 30) for mm in range(33)]
    assert out[:, 30, 30].tolist() == [-1000] * 14 + line + [-1000] * (64 - 14 - 33)
    assert not (out == 0).any()
    assert set(np.unique(out)) == {-1000, *line}


def test_size_rounds_extent_over_spacing():
    for count, spacing, target in [(101, 0.7, 1.5), (33, 2.5, 3.0), (10, 1.0, 4.0)]:
        grid = V._Grid.of((count,) * 3, np.diag([spacing, spacing, spacing, 1.0]),
                          V.Preprocess((target,) * 3, (16, 16, 16)))
        assert grid.size == (round(count * spacing / target),) * 3


def rotation(degrees, axis):
    axis = np.asarray(axis, float) / np.linalg.norm(axis)
    cross = np.cross(np.eye(3), axis)
    angle = math.radians(degrees)
    return np.eye(3) + math.sin(angle) * cross + (1 - math.cos(angle)) * cross @ cross


@pytest.mark.parametrize("matrix", [
    rotation(25, (1, 2, 3)) @ np.diag([2.0, 2.5, 3.0]),
    rotation(40, (3, -1, 1)) @ np.diag([-2.0, 2.0, -3.0]),
    rotation(18.5, (1, 0, 0)) @ np.diag([2.0, 2.0, 3.0])[:, [2, 0, 1]],
    np.array([[2.0, 0, 0], [0, 2.0, 0.9], [0, 0, 3.0]]),  # Gantry tilt: sheared, not rotated.
])
def test_oblique_files_are_resampled_through_the_whole_affine(matrix):
    shape, slope, base = (40, 36, 30), np.array([3.0, -4.0, 2.0]), 80.0
    affine = np.eye(4)
    affine[:3, :3] = matrix
    affine[:3, 3] = (7.0, -11.0, 5.0)
    index = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
    world = index @ matrix.T + affine[:3, 3]
    # A field linear in world millimetres is reproduced exactly by linear interpolation.
    field = ((world - world.mean((0, 1, 2))) @ slope + base).astype(np.float32)
    recipe = V.Preprocess((3.0, 3.5, 4.0), (48, 48, 40), low=-2000, high=2000)
    out = V.to_canonical(field, affine, recipe)
    grid = np.stack(np.meshgrid(*map(np.arange, recipe.shape), indexing="ij"), -1)
    canonical = V.canonical_affine(shape, affine, recipe)
    assert nib.aff2axcodes(canonical) == ("L", "P", "S")
    at = grid @ canonical[:3, :3].T + canonical[:3, 3]
    source = (at - affine[:3, 3]) @ np.linalg.inv(matrix).T
    inside = ((source >= 0) & (source <= np.array(shape) - 1)).all(-1)
    want = (at - world.mean((0, 1, 2))) @ slope + base
    assert inside.mean() > 0.1
    np.testing.assert_allclose(out[inside], want[inside], atol=0.51)
    beyond = ((source < -0.51) | (source > np.array(shape) - 0.49)).any(-1)
    assert (out[beyond] == -2000).all()
    # The patient stays in the middle of the grid.
    middle = canonical[:3, :3] @ ((np.array(recipe.shape) - 1) / 2) + canonical[:3, 3]
    assert np.abs(middle - world.mean((0, 1, 2))).max() < 4.0


def test_rounding_noise_in_an_affine_keeps_the_axis_aligned_path():
    hu, affine = chest(), affine_lps()
    noisy = affine.copy()
    noisy[:3, :3] += np.random.default_rng(0).normal(0, 1e-5, (3, 3))
    noisy[0, 1] = 2e-3
    grid = V._Grid.of(hu.shape, noisy, SMALL)
    assert grid.order == (0, 1, 2)
    centre = (np.array(hu.shape) - 1) / 2
    np.testing.assert_allclose(grid.matrix @ centre + grid.offset,
                               LPS[:3, :3] @ (noisy[:3, :3] @ centre + noisy[:3, 3]))
    difference = np.abs(V.to_canonical(hu, noisy, SMALL) - V.to_canonical(hu, affine, SMALL))
    assert difference.mean() < 1


def test_oblique_and_aligned_paths_meet():
    hu, affine = chest(), affine_lps()
    tilted = affine.copy()
    tilted[:3, :3] = rotation(0.2, (1, 1, 1)) @ affine[:3, :3]
    assert V._Grid.of(hu.shape, tilted, SMALL).order is None
    difference = V.to_canonical(hu, tilted, SMALL) - V.to_canonical(hu, affine, SMALL)
    assert np.abs(difference).mean() < 10


@pytest.mark.parametrize("dtype,slope,intercept", [
    ("<i2", 1, 0), (">i2", 1, 0), ("<u2", 1, -1024), ("<i4", 1, 0), ("<f4", 1, 0), ("<f8", 1, 0),
    ("<i2", 0.5, -100), ("<u2", 1, -8192), ("<f4", 2, 7), ("<i2", 1, -1024)])
def test_slope_and_intercept_are_applied_once(tmp_path, dtype, slope, intercept):
    hu = chest()
    stored = ((hu.astype(float) - intercept) / slope).astype(dtype)
    image = nib.Nifti1Image(stored, affine_lps(),
                            nib.Nifti1Header(endianness=dtype[0]))
    image.header.set_data_dtype(stored.dtype)
    image.header.set_slope_inter(slope, intercept)
    nib.save(image, tmp_path / "v.nii.gz")
    scan = V.read_nifti(tmp_path / "v.nii.gz")
    np.testing.assert_allclose(scan.hu, hu, atol=1e-3)
    assert scan.hu.dtype == (np.float32 if dtype[1] == "f" or slope != 1 else np.int16)
    np.testing.assert_array_equal(V.to_canonical(scan.hu, scan.affine, SMALL),
                                  V.to_canonical(hu, affine_lps(), SMALL))


def test_nifti2_reads_like_nifti1(tmp_path):
    nib.save(nib.Nifti2Image(chest(), affine_lps()), tmp_path / "v.nii")
    np.testing.assert_array_equal(V.read_nifti(tmp_path / "v.nii").hu, chest())


@pytest.mark.parametrize("padding", [-3024, -2048, -1500, -1024])
@pytest.mark.parametrize("tilt", [0, 10])
def test_padding_becomes_air_and_does_not_bleed(tmp_path, padding, tilt):
    hu, affine = chest(), affine_lps()
    affine[:3, :3] = rotation(tilt, (1, 0, 0)) @ affine[:3, :3]
    hu[:, :8] = 40  # The body touches the padding, and samples lie between the two.
    outside = np.zeros(hu.shape, bool)
    outside[:, :6] = True
    with_padding = np.where(outside, padding, hu).astype(np.int16)
    with_air = np.where(outside, -1024, hu).astype(np.int16)
    out = V.load_volume(write(tmp_path / "v.nii", with_padding, affine), SMALL).volume
    want = V.to_canonical(with_air, affine.astype(np.float32), SMALL)
    np.testing.assert_array_equal(out, want)
    assert ((want > -900) & (want < -100)).any()
    assert out.min() == -1000 and out.dtype == np.int16


def test_one_frame_of_a_4d_file_is_a_volume(tmp_path):
    path = write(tmp_path / "v.nii.gz", chest()[..., None])
    np.testing.assert_array_equal(V.read_nifti(path).hu, chest())


def test_some_missing_voxels_are_air_with_a_warning(tmp_path):
    hu = chest().astype(np.float32)
    hu[:2] = np.nan
    scan = V.read_nifti(write(tmp_path / "v.nii", hu))
    assert (scan.hu[:2] == -1000).all() and "not finite" in scan.warnings[0]


def test_disagreeing_affines_are_a_warning(tmp_path):
    image = nib.Nifti1Image(chest(), affine_lps())
    image.set_qform(affine_lps(origin=(-60, -50, -42)), 1)
    image.set_sform(affine_lps(), 1)
    nib.save(image, tmp_path / "v.nii")
    scan = V.read_nifti(tmp_path / "v.nii")
    np.testing.assert_allclose(scan.affine, affine_lps())
    assert any("differ by more than 1 mm" in warning for warning in scan.warnings)
    wrong = V.read_nifti(write(tmp_path / "w.nii", pixdim=[1, 2, 2, 2, 0, 0, 0, 0]))
    assert any("pixdim 2x2x2 differs" in warning for warning in wrong.warnings)


def test_qform_alone_is_enough(tmp_path):
    image = nib.Nifti1Image(chest(), None)
    image.set_qform(affine_lps(), 1)
    image.set_sform(None, 0)
    nib.save(image, tmp_path / "v.nii")
    np.testing.assert_allclose(V.read_nifti(tmp_path / "v.nii").affine, affine_lps(), atol=1e-4)
    path = write(tmp_path / "w.nii", sform_code=0, qform_code=1, quatern_d=1, qoffset_x=60,
                 qoffset_y=50, qoffset_z=-40, pixdim=[1, -4, 4.5, -6, 0, 0, 0, 0])
    np.testing.assert_allclose(V.read_nifti(path).affine, affine_lps(), atol=1e-4)


def test_only_a_volume_without_lung_may_not_be_a_chest(tmp_path):
    recipe = V.Preprocess((4.0, 4.5, 6.0), (32, 28, 24))
    assert V.load_volume(write(tmp_path / "a.nii"), recipe).warnings == ()
    abdomen = chest()
    abdomen[(abdomen < -800) & (abdomen > -900)] = 50
    loaded = V.load_volume(write(tmp_path / "b.nii", abdomen), recipe)
    assert len(loaded.warnings) == 1 and loaded.warnings[0].startswith("may not be a chest")
    small = V.load_volume(write(tmp_path / "c.nii", affine=affine_lps((1.5, 1.5, 2.0))), recipe)
    assert "covers only 45x39x40 mm" in small.warnings[0]


def _cut(path, count):
    path.write_bytes(path.read_bytes()[:-count])
    return path


def _flip(path, position):
    data = bytearray(path.read_bytes())
    data[position] ^= 0x55
    path.write_bytes(data)
    return path


def _bomb(path, shape, dtype=2):
    header = nib.Nifti1Header()
    header.set_data_shape(shape)
    header["datatype"], header["vox_offset"], header["magic"] = dtype, 352, b"n+1"
    header["bitpix"] = 8 * header.get_data_dtype().itemsize
    header["sform_code"], header["srow_x"][0] = 1, 1
    path.write_bytes(gzip.compress(header.binaryblock + bytes(10_000)))
    return path


def _float(scale, shift):
    return ((chest().astype(np.float32) + 1000) / 2000) * scale + shift


def _affine_with(value, *place):
    affine = affine_lps()
    affine[place] = value
    return affine


RGB = np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")])
DIM = np.array([3, 30, 26, 20, 1, 1, 1, 1])
REFUSED = {
    "missing": (lambda p: p / "no.nii", "no such file"),
    "folder": (lambda p: p, "it holds no CT image"),
    "text": (lambda p: _write_bytes(p / "v.nii", b"id,report\n" * 99), "not a NIfTI"),
    "empty": (lambda p: _write_bytes(p / "v.nii.gz", b""), "it is empty"),
    "half a header": (lambda p: _write_bytes(p / "v.nii", write(p / "w.nii").read_bytes()[:200]),
                      "ends within its header"),
    "gzip of nothing": (lambda p: _write_bytes(p / "v.nii.gz", gzip.compress(b"")), "it is empty"),
    "pair": (lambda p: write(p / "v.hdr", magic=b"ni1"), "pair"),
    "cut gzip": (lambda p: _cut(write(p / "v.nii.gz"), 2000), "cut short"),
    "cut gzip header": (lambda p: _write_bytes(
        p / "v.nii.gz", write(p / "w.nii.gz").read_bytes()[:60]), "cut short"),
    "damaged gzip": (lambda p: _flip(write(p / "v.nii.gz"), 9000), "damaged"),
    "wrong checksum": (lambda p: _flip(write(p / "v.nii.gz"), -6), "damaged"),
    "cut file": (lambda p: _cut(write(p / "v.nii"), 1), "more than the file can hold"),
    "zero slices": (lambda p: write(p / "v.nii", dim=[3, 30, 26, 0, 1, 1, 1, 1]), "no voxels"),
    "negative size": (lambda p: write(p / "v.nii", dim=[3, 30, -26, 20, 1, 1, 1, 1]), "negative"),
    "no dimensions": (lambda p: write(p / "v.nii", dim=[0, 30, 26, 20, 1, 1, 1, 1]), "dimensions"),
    "2-D": (lambda p: write(p / "v.nii", chest()[..., 0]), "fewer than 8"),
    "two frames": (lambda p: write(p / "v.nii", np.stack([chest()] * 2, -1)), "not one volume"),
    "localiser": (lambda p: write(p / "v.nii", chest((60, 60, 3))), "fewer than 8"),
    "all NaN": (lambda p: write(p / "v.nii", np.full((30, 26, 20), np.nan, "f4")), "100% of its"),
    "mostly NaN": (lambda p: write(p / "v.nii", np.where(
        np.arange(20) < 12, np.nan, chest()).astype("f4")), "60% of its"),
    "NaN affine": (lambda p: write(p / "v.nii", srow_x=[np.nan, 0, 0, 0]), "sform is not finite"),
    "singular affine": (lambda p: write(p / "v.nii", srow_z=[0, 0, 0, 0]), "sform is singular"),
    "collinear affine": (lambda p: write(p / "v.nii", srow_y=[-4, 0, 0, 0]), "sform is singular"),
    "bad qform": (lambda p: write(p / "v.nii", sform_code=0, qform_code=1, quatern_b=np.nan),
                  "qform is not finite"),
    "pixdim 0": (lambda p: write(p / "v.nii", pixdim=[1, 4, 0, 6, 0, 0, 0, 0]), "pixdim"),
    "pixdim NaN": (lambda p: write(p / "v.nii", pixdim=[1, 4, np.nan, 6, 0, 0, 0, 0]), "pixdim"),
    "no codes": (lambda p: write(p / "v.nii", sform_code=0, qform_code=0), "left and right"),
    "slope 0": (lambda p: write(p / "v.nii", scl_slope=0), "scl_slope is 0"),
    "slope NaN": (lambda p: write(p / "v.nii", scl_slope=np.nan), "scl_slope is nan"),
    "intercept NaN": (lambda p: write(p / "v.nii", scl_inter=np.nan), "scl_inter nan"),
    "colours": (lambda p: write(p / "v.nii", np.zeros((30, 26, 20), RGB)), "RGB"),
    "complex": (lambda p: write(p / "v.nii", chest().astype(np.complex64)), "complex"),
    "unknown type": (lambda p: write(p / "v.nii", datatype=77), "type code 77"),
    "constant": (lambda p: write(p / "v.nii", np.full((30, 26, 20), 0, "i2")), "every voxel is 0"),
    "0 to 1": (lambda p: write(p / "v.nii", _float(1, 0)), "normalised"),
    "-1 to 1": (lambda p: write(p / "v.nii", _float(2, -1)), "normalised"),
    "z-scores": (lambda p: write(p / "v.nii", _float(8, -6)), "normalised"),
    "8 bit": (lambda p: write(p / "v.nii", (_float(1, 0).clip(0, 1) * 255).astype("u1")), "8-bit"),
    "raw -1024": (lambda p: write(p / "v.nii", chest() + np.int16(1024)), "scl_inter -1024"),
    "raw -1024 padded": (lambda p: write(p / "v.nii", np.where(
        np.arange(26)[:, None] < 5, -2000, chest() + 1024).astype("i2")), "scl_inter -1024"),
    "raw -8192": (lambda p: write(p / "v.nii", (chest() + 8192).astype("u2")), "scl_inter -8192"),
    "raw -8192 padded": (lambda p: write(p / "v.nii", np.where(
        np.arange(26)[:, None] < 2, 0, chest() + 8192).astype("u2")), "scl_inter -8192"),
    "intercept twice": (lambda p: write(p / "v.nii", chest() - np.int16(1024)), "more than once"),
    "-8192 twice": (lambda p: write(p / "v.nii", chest() - np.int16(8192)), "more than once"),
    "magnetic resonance": (lambda p: Path(nibabel_data) / "anatomical.nii", "without the air"),
    "time series": (lambda p: Path(nibabel_data) / "example4d.nii.gz", "not one volume"),
    "bomb of voxels": (lambda p: _bomb(p / "v.nii.gz", (30000, 30000, 3000)), "more than any CT"),
    "bomb of bytes": (lambda p: _bomb(p / "v.nii.gz", (1000, 1000, 1000), 64), "above the limit"),
    "bomb within limits": (lambda p: _bomb(p / "v.nii.gz", (1000, 1000, 1000)), "can hold"),
    "offset NaN": (lambda p: write(p / "v.nii", vox_offset=np.nan), "offset"),
    "offset huge": (lambda p: write(p / "v.nii.gz", vox_offset=1e12), "offset"),
    "metres": (lambda p: write(p / "v.nii", affine=affine_lps((0.004, 0.0045, 0.006))),
               "in millimetres"),
    "microns": (lambda p: write(p / "v.nii", affine=affine_lps((700, 700, 1500))),
                "in millimetres"),
    "a crumb": (lambda p: write(p / "v.nii", affine=affine_lps((0.3, 0.3, 0.4))), "extent"),
}


def _write_bytes(path, data):
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("case", REFUSED)
def test_unusable_files_are_refused_with_name_and_reason(tmp_path, case):
    make, reason = REFUSED[case]
    path = make(tmp_path)
    with pytest.raises(V.NotACT) as caught:
        V.load_volume(path, SMALL)
    assert reason in caught.value.reason
    assert str(caught.value) == f"{path}: {caught.value.reason}"
    assert isinstance(caught.value, UserError) and "\n" not in str(caught.value)
    assert pickle.loads(pickle.dumps(caught.value)).reason == caught.value.reason


def test_sizes_are_refused_before_anything_is_decompressed(tmp_path, monkeypatch):
    monkeypatch.setattr(nifti, "_read_voxels", lambda *_: pytest.fail("voxels were read"))
    for shape, dtype in (((30000, 30000, 3000), 2), ((1000, 1000, 1000), 64),
                         ((1000, 1000, 1000), 2)):
        with pytest.raises(V.NotACT):
            V.read_nifti(_bomb(tmp_path / "v.nii.gz", shape, dtype))


def test_ordinary_and_artificial_hu_are_not_refused(tmp_path):
    rng = np.random.default_rng(0)
    box = np.full((30, 26, 20), -1000, np.int16)
    box[10:14, 9:12, 8:11] = 60
    cropped = rng.normal(40, 30, (30, 26, 20))
    cropped[:8] = rng.normal(-100, 15, (8, 26, 20))
    for array in (box, rng.integers(-1024, 3071, box.shape).astype("i2"), cropped.astype("i2"),
                  chest().clip(-1000, 1000)):
        scan = V.read_nifti(write(tmp_path / "v.nii", array))
        np.testing.assert_array_equal(scan.hu, array)


def test_preprocess_round_trips_and_checks_itself():
    assert V.Preprocess.from_dict(V.Preprocess().as_dict()) == V.Preprocess()
    assert V.Preprocess().shape == (256, 256, 128) and V.Preprocess().spacing == (1.5, 1.5, 3.0)
    for wrong in ({"spacing": (0, 1, 1)}, {"shape": (1, 1)}, {"low": 5, "high": 5},
                  {"frame": "RAS"}, {"high": 40000}):
        with pytest.raises(UserError):
            V.Preprocess(**wrong)


def test_arrays_without_geometry_are_a_programming_error():
    with pytest.raises(ValueError, match="3-D"):
        V.to_canonical(np.zeros((4, 4)), np.eye(4), SMALL)
    with pytest.raises(ValueError, match="singular"):
        V.to_canonical(np.zeros((4, 4, 4)), _affine_with(0.0, 2, 2), SMALL)


def test_header_fields_are_patched_as_meant(tmp_path):
    # The helper above must write what it says, or the refusals would test something else.
    data = write(tmp_path / "v.nii", scl_slope=3, dim=DIM).read_bytes()
    assert struct.unpack("<f", data[112:116]) == (3.0,)
    assert struct.unpack("<8h", data[40:56]) == tuple(DIM)
