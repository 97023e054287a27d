"""The picture shows sides, planes and proportions as a radiologist expects them."""

import io

import numpy as np
import pytest

from brgsa_jax.evals import volume_picture as pictures


def decoded(png):
    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(png)).convert("L")).astype(float)


def marked(x, y, z, shape=(20, 24, 16)):
    """Air with one bright block at patient left, posterior, superior as the flags say."""
    volume = np.full(shape, -1000, dtype=np.int16)
    where = tuple(slice(size // 2, None) if late else slice(0, size // 2)
                  for size, late in zip(shape, (x, y, z), strict=True))
    volume[where] = 1000
    return volume


def test_axial_has_patient_right_on_the_left_and_anterior_on_top():
    right_anterior = marked(x=False, y=False, z=True)
    axial, _, _ = pictures.planes(right_anterior, (1, 1, 1), at=(5, 5, 12))
    assert axial.pixels.shape == (24, 20)
    assert axial.pixels[0, 0] == 1000 and axial.pixels[-1, 0] == -1000
    assert axial.pixels[0, -1] == -1000
    assert (axial.left, axial.right, axial.top, axial.bottom) == ("R", "L", "A", "P")


def test_coronal_and_sagittal_have_the_head_on_top():
    left_posterior_top = marked(x=True, y=True, z=True)
    _, coronal, sagittal = pictures.planes(left_posterior_top, (1, 1, 1), at=(15, 20, 12))
    assert coronal.pixels.shape == (16, 20) and sagittal.pixels.shape == (16, 24)
    assert coronal.pixels[0, -1] == 1000 and coronal.pixels[0, 0] == -1000
    assert coronal.pixels[-1, -1] == -1000
    assert sagittal.pixels[0, -1] == 1000 and sagittal.pixels[0, 0] == -1000
    assert (coronal.left, coronal.right, coronal.top, coronal.bottom) == ("R", "L", "H", "F")
    assert (sagittal.left, sagittal.right, sagittal.top, sagittal.bottom) == ("A", "P", "H", "F")


def test_planes_follow_the_spacing():
    axial, coronal, sagittal = pictures.planes(np.zeros((20, 24, 16), np.int16), (1.5, 2.0, 3.0))
    assert (axial.width, axial.height) == (30, 48)
    assert (coronal.width, coronal.height) == (30, 48)
    assert (sagittal.width, sagittal.height) == (48, 48)


def test_picture_shows_the_mark_where_the_planes_say(tmp_path):
    volume = marked(x=False, y=False, z=True, shape=(20, 20, 20))
    png = pictures.volume_picture(volume, (2, 2, 2), path=tmp_path / "v.png", at=(5, 5, 15),
                                  width=630)
    assert (tmp_path / "v.png").read_bytes() == png and png.startswith(b"\x89PNG")
    image = decoded(png)
    # Three planes of 40 mm share 630 − 4·10 pixels; the first row starts 8 pixels from the top.
    side = (630 - 40) / 3
    assert image.shape[1] == 630
    assert image.shape[0] == pytest.approx(8 + 2 * (side + 10), abs=1)
    for index, bright in ((0, (0.3, 0.3)), (1, (0.3, 0.3)), (2, (0.3, 0.3))):
        left = 10 + index * (side + 10)
        column, row = int(left + bright[0] * side), int(8 + bright[1] * side)
        assert image[row, column] > 240
        dark = int(left + 0.75 * side), int(8 + 0.72 * side)
        assert image[dark[1], dark[0]] < 60


def test_windows_differ_and_a_title_may_hold_dollars():
    volume = np.full((8, 8, 8), -600, dtype=np.int16)
    image = decoded(pictures.volume_picture(volume, (1, 1, 1), title="a $x_1$ b", width=330))
    side = (330 - 40) / 3
    assert 100 < image[int(34 + 0.3 * side), int(10 + 0.65 * side)] < 150
    assert image[int(34 + side + 10 + 0.3 * side), int(10 + 0.65 * side)] < 3


def test_a_radiograph_is_drawn_as_it_is_stored():
    image = np.random.default_rng(0).integers(0, 256, (40, 40), np.uint8)
    np.testing.assert_array_equal(decoded(pictures.radiograph_picture(image)), image)


def test_bad_arguments_are_refused():
    for wrong in (np.zeros((4, 4, 4), np.uint8), np.zeros((4, 4), np.int16)):
        with pytest.raises(ValueError, match="a radiograph is uint8"):
            pictures.radiograph_picture(wrong)
    with pytest.raises(ValueError, match="three axes"):
        pictures.planes(np.zeros((4, 4)), (1, 1, 1))
    with pytest.raises(ValueError, match="outside"):
        pictures.planes(np.zeros((4, 4, 4)), (1, 1, 1), at=(0, 0, 4))
