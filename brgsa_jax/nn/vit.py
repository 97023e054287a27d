"""Vision transformers on CT volumes and on radiographs.

Axes of an image are its own: nibabel's (X, Y, Z) of a volume, (H, W) of a radiograph. Patches
are flattened with the first axis slowest, as in the references' `Conv` patch embeddings.
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from brgsa_jax.nn.attention import ANYWHERE, ATTENTION, Placement
from brgsa_jax.nn.blocks import REMAT, Layers, VisionTower, grid_of
from brgsa_jax.nn.dense import Dense
from brgsa_jax.nn.norm import WHOLE_BATCH, Scope
from brgsa_jax.registry import miss, register

POSITIONS = ("frozen", "learned")
POOLS = ("cls", "mean", "weighted")


def sincos_positions(grid: Sequence[int], width: int) -> np.ndarray:
    """Sin-cos position embedding with coordinates linspace(0, 1) on every axis.

    Per axis of r ⌊width/2r⌋ frequencies 10000^(−k/n): [sin | cos], axes in their order; what is
    left of the width is zero. Reference: BrgSA's `stander_3D_vit_relate_pe`.

    Args:
        grid: patches per axis, (gx, gy, gz) of a volume.
        width: embedding width.

    Returns:
        float32 [∏grid, width], the first axis slowest.
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
    cube = table.reshape(*grid, width)
    for axis, (old, new) in enumerate(zip(grid, target, strict=True)):
        if old == new:
            continue
        places = np.clip((np.arange(new) + 0.5) * old / new - 0.5, 0, old - 1)
        below = np.floor(places).astype(int)
        share = (places - below).astype(table.dtype).reshape(-1, *[1] * (len(grid) - axis))
        # Not a product with weights: in full precision a TPU needs half a minute to compile it.
        before, after = (jnp.take(cube, index, axis, mode="clip")
                         for index in (below, np.minimum(below + 1, old - 1)))
        cube = before * (1 - share) + after * share
    return cube.reshape(-1, width)


class ViT(nn.Module):
    """Patch embedding, position embedding, CLS token, pre-norm blocks, final LayerNorm.

    Attributes:
        patch: patch size in voxels (px, py, pz) or pixels (ph, pw); its length is the number of
            axes of an image.
        base_grid: patches per axis of the stored position table, whose first row is CLS's; other
            grids are interpolated.
        width, depth, heads, mlp_width: of the transformer.
        positions: "frozen" is the reference's sin-cos table without gradient, zero for CLS;
            "learned" starts from N(0, 0.02).
        pool: "cls", "mean" over patch tokens, or "weighted": a mean whose weights are learned
            per place and channel (from 1, resized like the positions), so that a finding can be
            read where it is found without many steps of attention.
        stem: () embeds a patch by one linear map, as the reference. ((size, features), …) first
            embeds its parts: every stage maps non-overlapping boxes of `size` cells to
            `features` with a GELU, a small convolutional stem that shares what it learns over
            all positions (Xiao et al. 2021); the last linear map takes what is left of the patch.
        remat, unroll, dtype, implementation, placement: see `blocks`.
        need_cls_attention: return the last block's CLS attention over patches.
        need_tokens: return the patch tokens; without them pooling by "cls" saves most of the
            last block.
        norm_epsilon: of the final LayerNorm.
        block_epsilon: of the LayerNorms in the blocks.
        channels_first: channels come before the axes of an image, not after them.
    """

    patch: tuple[int, ...]
    base_grid: tuple[int, ...]
    width: int
    depth: int
    heads: int
    mlp_width: int
    positions: str = "frozen"
    pool: str = "cls"
    stem: tuple[tuple[tuple[int, ...], int], ...] = ()
    remat: str = "full"
    unroll: int = 1
    dtype: Any = jnp.float32
    implementation: str = "auto"
    placement: Placement = ANYWHERE
    need_cls_attention: bool = False
    need_tokens: bool = True
    norm_epsilon: float = 1e-5
    block_epsilon: float = 1e-6
    channels_first: bool = False

    @nn.compact
    def __call__(self, image: jax.Array, train: bool = False) -> VisionTower:
        """Encodes images in network units; training changes nothing.

        Args:
            image: [B, *axes] or, with channels, [B, *axes, C] ([B, C, *axes] when
                `channels_first`).
            train: taken for the sake of encoders with batch statistics.
        """
        if image.ndim == len(self.patch) + 1:
            image = image[..., None]
        elif self.channels_first:
            image = jnp.moveaxis(image, 1, -1)
        grid = grid_of(image.shape[1:-1], self.patch)
        x = self._embed_patches(image.astype(self.dtype)).astype(jnp.float32)
        cls = self.param("cls", nn.initializers.normal(0.02), (1, 1, self.width))
        cls = jnp.broadcast_to(cls, (x.shape[0], 1, self.width))
        table = self.param("positions", self._init_positions)
        if self.positions == "frozen":
            table = jax.lax.stop_gradient(table)
        places = resize_positions(table[1:], self.base_grid, grid)
        x = jnp.concatenate([cls, x], 1) + jnp.concatenate([table[:1], places])
        block = dict(heads=self.heads, mlp_width=self.mlp_width, epsilon=self.block_epsilon,
                     dtype=self.dtype, implementation=self.implementation,
                     placement=self.placement, need_cls_attention=self.need_cls_attention)
        only_cls = self.pool == "cls" and not self.need_tokens
        x, _, row = Layers(self.depth, self.remat, block, only_cls, self.unroll,
                           name="layers")(x)
        x = nn.LayerNorm(epsilon=self.norm_epsilon, dtype=jnp.float32, name="norm")(x)
        pooled = self._pool(x, grid)
        return VisionTower(pooled, x[:, 1:] if self.need_tokens else None,
                           None if row is None else row[:, 1:])

    def _init_positions(self, key: jax.Array) -> jax.Array:
        """Position table [1 + N, W] over the base grid, the row of CLS first."""
        shape = (1 + int(np.prod(self.base_grid)), self.width)
        if self.positions == "learned":
            return 0.02 * jax.random.normal(key, shape)
        return jnp.zeros(shape).at[1:].set(sincos_positions(self.base_grid, self.width))

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
        """Maps [B, *axes, C] to patch tokens [B, N, W]."""
        left, flat = self.patch, self.placement.backend != "tpu"
        for stage, (size, features) in enumerate(self.stem):
            left = grid_of(left, size)
            cells = grid_of(x.shape[1:-1], size)
            x = Dense(features, self.dtype, flat=flat, name=f"stem_{stage}")(patches_of(x, size))
            x = nn.gelu(x, approximate=False).reshape(-1, *cells, features)
        return Dense(self.width, self.dtype, wide=True, flat=flat, name="patch_embed",
                     kernel_init=nn.initializers.lecun_uniform())(patches_of(x, left))


def patches_of(image: jax.Array, patch: Sequence[int]) -> jax.Array:
    """Cuts [B, *axes, C] into [B, N, ∏patch·C]; in N and in a patch the first axis is slowest."""
    grid, channels, rank = grid_of(image.shape[1:-1], patch), image.shape[-1], len(patch)
    # Axes become pairs (patch, place in it): 1, 3, … are the patches, 2, 4, … the places.
    pairs = [n for pair in zip(grid, patch, strict=True) for n in pair]
    order = (0, *range(1, 2 * rank, 2), *range(2, 2 * rank + 1, 2), 2 * rank + 1)
    x = image.reshape(-1, *pairs, channels).transpose(order)
    return x.reshape(-1, int(np.prod(grid)), int(np.prod(patch)) * channels)


def _make(input_shape: Sequence[int], options: dict[str, Any], rank: int) -> ViT:
    for key, choices in (("positions", POSITIONS), ("pool", POOLS), ("remat", REMAT),
                         ("implementation", ATTENTION)):
        if options.get(key, choices[0]) not in choices:
            raise KeyError(miss(key, options[key], choices))
    patch = tuple(options.pop("patch"))
    if len(patch) != rank or len(input_shape) != rank:
        raise KeyError(f"vit{rank}d needs {rank} numbers in patch and input shape, not "
                       f"{patch} and {tuple(input_shape)}; choose another encoder or shape")
    base_grid = tuple(options.pop("base_grid", ())) or grid_of(input_shape, patch)
    if len(base_grid) != rank or min(base_grid) < 1:
        raise KeyError(f"vit{rank}d needs {rank} positive numbers in base_grid, not {base_grid}; "
                       "leave it out for the grid of the input shape")
    return ViT(patch=patch, base_grid=base_grid, **options)


@register("vision", "vit3d")
def vit3d(*, input_shape: Sequence[int], scope: Scope = WHOLE_BATCH, **options: Any) -> nn.Module:
    """Makes a ViT for `input_shape` in voxels (X, Y, Z).

    Its position table fits that shape, unless `base_grid` says for how many patches per axis it
    was made. BrgSA's code reads its table as (Z, Y, X): for a table whose grid is no cube, give
    the base grid in that order to read it as that code does. It has no batch statistics, so
    `scope` has no say.

    Raises:
        KeyError: unknown choice of positions, pool, remat or attention; a patch or shape that
            has not three numbers.
    """
    return _make(input_shape, options, 3)


@register("vision", "vit2d")
def vit2d(*, input_shape: Sequence[int], scope: Scope = WHOLE_BATCH, **options: Any) -> nn.Module:
    """Makes a ViT on radiographs [B, C, H, W], as MGCA's, for `input_shape` in pixels (H, W).

    Learned positions and a final epsilon of 1e-6, unless said otherwise. It has no batch
    statistics, so `scope` has no say.

    Raises:
        KeyError: unknown choice of positions, pool, remat or attention; a patch or shape that
            has not two numbers.
    """
    defaults = {"positions": "learned", "norm_epsilon": 1e-6, "channels_first": True}
    return _make(input_shape, {**defaults, **options}, 2)
