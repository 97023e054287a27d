"""brgsa_jax.data.arrays: HU arrays of NumPy files with their geometry."""

import zipfile

import numpy as np
import pytest

from brgsa_jax.config import UserError
from brgsa_jax.data import arrays
from brgsa_jax.data import volume as V

GRID = V.Preprocess(spacing=(5.0, 6.0, 7.0), shape=(24, 22, 18))
AFFINE = np.array([[-5.0, 0, 0, 40], [0, -6.0, 0, 50], [0, 0, 7.0, -60], [0, 0, 0, 1]])


def chest(shape=GRID.shape):
    hu = np.full(shape, -1000, np.int16)
    hu[2:-2, 2:-2] = 40
    hu[4:10, 6:-6, 3:-3] = -850
    return hu


def test_npy_on_the_canonical_grid_stays_as_it_is(tmp_path):
    np.save(tmp_path / "a.npy", chest())
    np.testing.assert_array_equal(V.load_volume(tmp_path / "a.npy", GRID).volume, chest())


@pytest.mark.parametrize("name", ["volume", "hu", "ct", "anything"])
def test_npz_brings_its_geometry(tmp_path, name):
    other = np.eye(3) if name != "anything" else np.zeros(())
    np.savez_compressed(tmp_path / "a", **{name: chest(), "affine": AFFINE, "other": other})
    loaded = V.load_volume(tmp_path / "a.npz", GRID)
    np.testing.assert_array_equal(loaded.volume, chest())
    np.testing.assert_allclose(loaded.affine, AFFINE)
    flipped = AFFINE @ np.array([[-1.0, 0, 0, 23], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    np.savez(tmp_path / "flipped", **{name: chest()[::-1], "affine": flipped})
    np.testing.assert_array_equal(V.load_volume(tmp_path / "flipped.npz", GRID).volume, chest())
    np.savez(tmp_path / "spacing", **{name: chest().astype(np.float32), "spacing": GRID.spacing})
    loaded = V.load_volume(tmp_path / "spacing.npz", GRID)
    np.testing.assert_array_equal(loaded.volume, chest())
    assert loaded.source_orientation == "LPS"


def _lying(path, shape, kind="<i2"):
    header = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}"
    content = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode()
    if path.suffix == ".npy":
        path.write_bytes(content)
        return
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("volume.npy", content)


def _save(path, **values):
    np.savez(path, **values)


BROKEN = {
    "other grid": ("a.npy", lambda p: np.save(p, chest((30, 22, 18))), "shape is 30x22x18, not 24"),
    "flat": ("a.npy", lambda p: np.save(p, np.zeros((5, 5), np.int16)), "shape is 5x5, not"),
    "no geometry": ("a.npz", lambda p: _save(p, volume=chest()), "it has no voxel size; save"),
    "wrong geometry": ("a.npz", lambda p: _save(p, volume=chest(), affine=np.eye(3)),
                       "it has no voxel size"),
    "singular": ("a.npz", lambda p: _save(p, volume=chest(), affine=np.ones((4, 4))), "singular"),
    "spacing 0": ("a.npz", lambda p: _save(p, volume=chest(), spacing=np.zeros(3)), "not three"),
    "two volumes": ("a.npz", lambda p: _save(p, a=chest(), b=chest()), "holds 2 3-D arrays"),
    "no volume": ("a.npz", lambda p: _save(p, affine=AFFINE), "holds 0 3-D arrays"),
    "thin": ("a.npz", lambda p: _save(p, volume=chest()[:7], affine=AFFINE), "fewer than 8"),
    "objects": ("a.npz", lambda p: _save(p, volume=np.array([{}], object)), "type object, not HU"),
    "words": ("a.npy", lambda p: np.save(p, np.array(["x"])), "type <U1, not HU"),
    "complex": ("a.npz", lambda p: _save(p, volume=chest() * 1j), "complex128, not HU"),
    "normalised": ("a.npz", lambda p: _save(p, volume=chest() / 1000, affine=AFFINE),
                   "normalised or windowed"),
    "lying shape": ("a.npz", lambda p: _lying(p, (10**5, 10**5, 10**5)), "more than any CT"),
    "lying shape of a .npy": ("a.npy", lambda p: _lying(p, GRID.shape), "no readable NumPy file"),
    "negative shape": ("a.npz", lambda p: _lying(p, (-24, -22, 18)), ""),
    "cut": ("a.npz", lambda p: (_save(p, volume=chest(), affine=AFFINE),
                                p.write_bytes(p.read_bytes()[:900])), "no readable NumPy file"),
    "junk": ("a.npz", lambda p: p.write_bytes(b"PK\x03\x04" + bytes(99)), "no readable NumPy file"),
    "junk .npy": ("a.npy", lambda p: p.write_bytes(b"\x93NUMPY" + bytes(99)), "no readable NumPy"),
    "code in the header": ("a.npy", lambda p: _lying(p, "__import__('os').getpid()"),
                           "no readable NumPy file"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_arrays_are_refused_by_name(tmp_path, name):
    file, make, reason = BROKEN[name]
    make(tmp_path / file)
    with pytest.raises(V.NotACT) as caught:
        V.load_volume(tmp_path / file, GRID)
    assert reason in caught.value.reason and isinstance(caught.value, UserError)
    assert "\n" not in str(caught.value)


def test_a_given_affine_serves_a_file_without_one(tmp_path):
    np.savez(tmp_path / "a", ct=chest())
    scan = arrays.read_array(tmp_path / "a.npz", GRID, AFFINE)
    np.testing.assert_array_equal(scan.affine, AFFINE)
