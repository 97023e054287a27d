"""One picture of a volume: three planes in a lung and a soft-tissue window, with marked sides.

Or of a radiograph, as it is stored: its sides are not marked, since no picture format names them.
"""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from brgsa_jax.evals.scores import write_atomic


class Window(NamedTuple):
    """A display window in HU."""

    name: str
    centre: float
    width: float


LUNG = Window("Lung", -600.0, 1500.0)
SOFT_TISSUE = Window("Soft tissue", 40.0, 400.0)


class Plane(NamedTuple):
    """One slice as it is shown: pixels [rows, columns], size in mm, and the marks at its edges."""

    name: str
    pixels: np.ndarray
    width: float
    height: float
    left: str
    right: str
    top: str
    bottom: str


def planes(volume: np.ndarray, spacing: Sequence[float],
           at: Sequence[int] | None = None) -> tuple[Plane, Plane, Plane]:
    """Axial, coronal and sagittal slices in radiological view.

    The axial slice is seen from the feet: the patient's right is on the left of the picture and
    anterior is on top. Coronal and sagittal slices have the head on top; sagittal looks at
    anterior on the left.

    Args:
        volume: [X,Y,Z] in HU, x to the patient's left, y to posterior, z to superior (LPS).
        spacing: mm for x, y, z.
        at: voxel the slices go through; None takes the middle.

    Returns:
        The three planes.

    Raises:
        ValueError: not three axes, or `at` outside the volume.
    """
    volume = np.asarray(volume)
    if volume.ndim != 3:
        raise ValueError(f"a volume has three axes, this has shape {volume.shape}")
    x, y, z = (size // 2 for size in volume.shape) if at is None else map(int, at)
    if not all(0 <= index < size for index, size in zip((x, y, z), volume.shape, strict=True)):
        raise ValueError(f"voxel {(x, y, z)} is outside a volume of shape {volume.shape}")
    across, deep, tall = (size * step for size, step in zip(volume.shape, spacing, strict=True))
    return (Plane("Axial", volume[:, :, z].T, across, deep, "R", "L", "A", "P"),
            Plane("Coronal", volume[:, y, ::-1].T, across, tall, "R", "L", "H", "F"),
            Plane("Sagittal", volume[x, :, ::-1].T, deep, tall, "A", "P", "H", "F"))


def volume_picture(volume: np.ndarray, spacing: Sequence[float], title: str = "",
                   path: str | Path | None = None, *, at: Sequence[int] | None = None,
                   windows: Sequence[Window] = (LUNG, SOFT_TISSUE), width: int = 1080,
                   heat: np.ndarray | None = None) -> bytes:
    """Draws one PNG: a row for each window, a column for each plane.

    Args:
        volume: int16 HU [X,Y,Z] in LPS, as in `planes`.
        spacing: mm for x, y, z; the aspect ratio follows it.
        title: a line above the picture; "" for none.
        path: where to write the PNG as well; None only returns it.
        at: voxel the slices go through; None takes the middle.
        windows: display windows, top to bottom.
        width: of the picture in pixels.
        heat: a map [X,Y,Z] ≥ 0 laid over the volume in colour, the more opaque the higher.

    Returns:
        The PNG file as bytes.

    Raises:
        ValueError: as `planes`, or a map of another shape than the volume's.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patheffects import withStroke

    shown = planes(volume, spacing, at)
    if heat is not None and np.shape(heat) != np.shape(volume):
        raise ValueError(f"a map of shape {np.shape(heat)} over a volume of {np.shape(volume)}")
    colours = (None,) * 3 if heat is None else [
        _coloured(plane.pixels) for plane in planes(_relative(heat), spacing, at)]
    gap, head, dpi = 10.0, 34.0 if title else 8.0, 100
    # One scale in pixels per mm for all planes, so that sizes can be compared between them.
    scale = (width - gap * (len(shown) + 1)) / sum(plane.width for plane in shown)
    row = max(plane.height for plane in shown) * scale
    height = head + len(windows) * (row + gap)
    figure = Figure(figsize=(width / dpi, height / dpi), dpi=dpi, facecolor="#0b0d10")
    FigureCanvasAgg(figure)
    if title:
        figure.text(gap / width, 1 - 17 / height, _plain(title), color="#e8eaed", fontsize=11,
                    va="center", ha="left")
    # The outline keeps the marks legible over bone as over air.
    outline = [withStroke(linewidth=2.2, foreground="#0b0d10")]
    mark = {"color": "#f2c14e", "fontsize": 9.5, "fontweight": "bold", "path_effects": outline}
    for index, window in enumerate(windows):
        left = gap
        for plane, colour in zip(shown, colours, strict=True):
            wide, tall = plane.width * scale, plane.height * scale
            top = head + index * (row + gap) + (row - tall) / 2
            axes = figure.add_axes((left / width, 1 - (top + tall) / height, wide / width,
                                    tall / height))
            axes.imshow(plane.pixels, cmap="gray", vmin=window.centre - window.width / 2,
                        vmax=window.centre + window.width / 2, interpolation="bilinear",
                        aspect="auto")
            if colour is not None:
                axes.imshow(colour, interpolation="bilinear", aspect="auto")
            axes.set_axis_off()
            pad = 9.0
            for text, px, py, ha, va in (
                    (plane.left, pad, tall / 2, "left", "center"),
                    (plane.right, wide - pad, tall / 2, "right", "center"),
                    (plane.top, wide / 2, tall - pad, "center", "top"),
                    (plane.bottom, wide / 2, pad, "center", "bottom")):
                axes.text(px / wide, py / tall, text, transform=axes.transAxes, ha=ha, va=va,
                          **mark)
            axes.text(pad / wide, 1 - pad / tall, f"{plane.name}\n{window.name}",
                      transform=axes.transAxes, ha="left", va="top", color="#e8eaed",
                      fontsize=8.5, linespacing=1.35, path_effects=outline)
            left += wide + gap
    buffer = io.BytesIO()
    # The Software entry would make the bytes depend on the matplotlib version.
    figure.savefig(buffer, format="png", metadata={"Software": None})
    png = buffer.getvalue()
    if path is not None:
        write_atomic(path, png)
    return png


def radiograph_picture(image: np.ndarray, heat: np.ndarray | None = None) -> bytes:
    """Draws a radiograph, one pixel for each of its own.

    Args:
        image: uint8 grey levels [H, W].
        heat: a map [H, W] ≥ 0 laid over it, as in `volume_picture`.

    Returns:
        The PNG file as bytes.

    Raises:
        ValueError: not two axes of uint8, or a map of another shape.
    """
    from PIL import Image

    image = np.asarray(image)
    if image.ndim != 2 or image.dtype != np.uint8:
        raise ValueError(f"a radiograph is uint8 [H, W], this is {image.dtype} {image.shape}")
    picture = Image.fromarray(image)
    if heat is not None:
        if np.shape(heat) != image.shape:
            raise ValueError(f"a map of shape {np.shape(heat)} over a picture of {image.shape}")
        colour = Image.fromarray(np.rint(255 * _coloured(_relative(heat))).astype(np.uint8))
        picture = Image.alpha_composite(picture.convert("RGBA"), colour).convert("RGB")
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def _relative(heat: np.ndarray) -> np.ndarray:
    """A map as shares of its highest value; one of zeros stays zero."""
    heat = np.asarray(heat, np.float32)
    return heat / max(float(heat.max()), np.finfo(np.float32).tiny)


def _coloured(heat: np.ndarray) -> np.ndarray:
    """RGBA in 0..1 of a plane in 0..1; nothing covers what lies below a fifth of the maximum."""
    from matplotlib import colormaps

    colour = colormaps["inferno"](0.25 + 0.75 * heat)
    colour[..., 3] = 0.6 * np.clip((heat - 0.2) / 0.5, 0.0, 1.0)
    return colour


def _plain(text: str) -> str:
    """Text in which matplotlib finds no formula between dollar signs."""
    return text.replace("$", r"\$")
