"""3-D vision transformer on CT volumes.

Axis order of a volume is nibabel's (X, Y, Z); patches are flattened with X slowest and Z
fastest, as in the reference's `Conv3d` patch embedding.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from brgsa_jax.nn.blocks import ATTENTION, REMAT, Layers, grid_of
from brgsa_jax.registry import miss, register

POSITIONS = ("frozen", "learned")
POOLS = ("cls", "mean", "weighted")


class VisionTower(NamedTuple):
    """Output of a vision encoder: pooled [B, W], tokens [B, N, W], attention [B, N] or None."""

    pooled: jax.Array
    tokens: jax.Array
    attention: jax.Array | None


def sincos_positions(grid: Sequence[int], width: int) -> np.ndarray:
    """Sin-cos position embedding with coordinates linspace(0, 1) on every axis.

    Per axis ⌊width/6⌋ frequencies 10000^(−k/n): [sin | cos], axes in order X, Y, Z; what is
    left of the width is zero. Reference: BrgSA's `stander_3D_vit_relate_pe`.

    Args:
        grid: patches per axis (gx, gy, gz).
        width: embedding width.

    Returns:
        float32 [gx·gy·gz, width], X slowest.
    """
    count = width // (2 * len(grid))
    omega = 10000.0 ** (-np.arange(count, dtype=np.float64) / count)
    codes = []
    for size in grid:
        angles = np.linspace(0.0, 1.0, size)[:, None] * omega
        codes.append(np.concatenate([np.sin(angles), np.cos(angles)], axis=1))
    table = np.zeros((*grid, width))
    for axis, code in enumerate(codes):
        index = [None] * len(grid)
        index[axis] = slice(None)
        table[..., axis * 2 * count:(axis + 1) * 2 * count] = code[tuple(index)]
    return table.reshape(-1, width).astype(np.float32)


def resize_positions(table: jax.Array, grid: Sequence[int], target: Sequence[int]) -> jax.Array:
    """Linearly resizes a [grid…, W] position table to another grid (half-pixel centres).

    Args:
        table: [∏grid, W].
        grid: its patches per axis.
        target: wanted patches per axis.

    Returns:
        [∏target, W].
    """
    if tuple(grid) == tuple(target):
        return table
    width = table.shape[-1]
    cube = jax.image.resize(table.reshape(*grid, width), (*target, width), "linear",
                            antialias=False)
    return cube.reshape(-1, width)


class ViT3D(nn.Module):
    """Patch embedding, position embedding, CLS token, pre-norm blocks, final LayerNorm.

    Attributes:
        patch: patch size in voxels (px, py, pz).
        base_grid: patches per axis of the stored position table; other grids are interpolated.
        width, depth, heads, mlp_width: of the transformer.
        positions: "frozen" is the reference's sin-cos table without gradient; "learned" starts
            from N(0, 0.02).
        pool: "cls", "mean" over patch tokens, or "weighted": a mean whose weights are learned
            per place and channel (from 1, resized like the positions), so that a finding can be
            read where it is found without many steps of attention.
        stem: () embeds a patch by one linear map, as the reference. ((size, features), …) first
            embeds its parts: every stage maps non-overlapping boxes of `size` cells to
            `features` with a GELU, a small convolutional stem that shares what it learns over
            all positions (Xiao et al. 2021); the last linear map takes what is left of the patch.
        remat, dtype, implementation: see `blocks`.
        need_cls_attention: return the last block's CLS attention over patches.
    """

    patch: tuple[int, int, int]
    base_grid: tuple[int, int, int]
    width: int
    depth: int
    heads: int
    mlp_width: int
    positions: str = "frozen"
    pool: str = "cls"
    stem: tuple[tuple[tuple[int, int, int], int], ...] = ()
    remat: str = "full"
    dtype: Any = jnp.float32
    implementation: str = "auto"
    need_cls_attention: bool = False

    @nn.compact
    def __call__(self, volume: jax.Array) -> VisionTower:
        """Encodes normalised volumes [B, X, Y, Z] or, with channels, [B, X, Y, Z, C]."""
        if volume.ndim == 4:
            volume = volume[..., None]
        grid = grid_of(volume.shape[1:4], self.patch)
        x = self._embed_patches(volume.astype(self.dtype))
        if self.positions == "frozen":
            init = lambda _key: jnp.asarray(sincos_positions(self.base_grid, self.width))  # noqa: E731
        else:
            init = lambda key: 0.02 * jax.random.normal(  # noqa: E731
                key, (int(np.prod(self.base_grid)), self.width))
        table = self.param("positions", init)
        if self.positions == "frozen":
            table = jax.lax.stop_gradient(table)
        x = x + resize_positions(table, self.base_grid, grid).astype(self.dtype)
        cls = self.param("cls", nn.initializers.normal(0.02), (1, 1, self.width))
        x = jnp.concatenate([jnp.broadcast_to(cls, (len(x), 1, self.width)).astype(x.dtype), x], 1)
        block = dict(heads=self.heads, mlp_width=self.mlp_width, dtype=self.dtype,
                     implementation=self.implementation,
                     need_cls_attention=self.need_cls_attention)
        x, _, row = Layers(self.depth, self.remat, block, name="layers")(x)
        x = nn.LayerNorm(epsilon=1e-5, dtype=jnp.float32, name="norm")(x)
        pooled = self._pool(x, grid)
        return VisionTower(pooled, x[:, 1:], None if row is None else row[:, 1:])


    def _pool(self, x: jax.Array, grid: Sequence[int]) -> jax.Array:
        """Pools [B, 1 + N, W], CLS first, to [B, W]."""
        if self.pool == "cls":
            return x[:, 0]
        if self.pool == "mean":
            return x[:, 1:].mean(axis=1)
        table = self.param("pool", nn.initializers.ones, (int(np.prod(self.base_grid)), self.width))
        weights = resize_positions(table, self.base_grid, grid) / np.prod(grid)
        return jnp.einsum("bnw,nw->bw", x[:, 1:], weights)

    def _embed_patches(self, x: jax.Array) -> jax.Array:
        """Maps [B, X, Y, Z, C] to patch tokens [B, N, W]."""
        left = self.patch
        for stage, (size, features) in enumerate(self.stem):
            left = grid_of(left, size)
            cells = grid_of(x.shape[1:4], size)
            # One matrix: on a CPU the gradient of the kernel takes half the time of [B, N, C].
            boxes = patches_of(x, size)
            x = nn.Dense(features, dtype=self.dtype, name=f"stem_{stage}",
                         kernel_init=nn.initializers.lecun_normal())(
                             boxes.reshape(-1, boxes.shape[-1]))
            x = nn.gelu(x, approximate=False).reshape(-1, *cells, features)
        return nn.Dense(self.width, dtype=self.dtype, name="patch_embed",
                        kernel_init=nn.initializers.lecun_uniform())(patches_of(x, left))


def patches_of(volume: jax.Array, patch: Sequence[int]) -> jax.Array:
    """Cuts [B, X, Y, Z, C] into [B, N, px·py·pz·C], X slowest and Z fastest in both orders."""
    gx, gy, gz = grid_of(volume.shape[1:4], patch)
    px, py, pz = patch
    x = volume.reshape(-1, gx, px, gy, py, gz, pz, volume.shape[-1])
    return x.transpose(0, 1, 3, 5, 2, 4, 6, 7).reshape(-1, gx * gy * gz, px * py * pz * x.shape[-1])


@register("vision", "vit3d")
def vit3d(*, input_shape: Sequence[int], **options: Any) -> nn.Module:
    """Makes a ViT3D whose position table fits `input_shape` in voxels (X, Y, Z).

    Raises:
        KeyError: unknown choice of positions, pool, remat or attention.
    """
    for key, choices in (("positions", POSITIONS), ("pool", POOLS), ("remat", REMAT),
                         ("implementation", ATTENTION)):
        if options.get(key, choices[0]) not in choices:
            raise KeyError(miss(key, options[key], choices))
    patch = tuple(options.pop("patch"))
    return ViT3D(patch=patch, base_grid=grid_of(input_shape, patch), **options)
