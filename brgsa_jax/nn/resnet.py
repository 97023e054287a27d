"""Residual networks with batch normalisation, for images of any number of axes."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from brgsa_jax.nn.blocks import VisionTower
from brgsa_jax.nn.norm import WHOLE_BATCH, BatchNorm, Scope
from brgsa_jax.registry import miss, register

NORMS = ("batch", "frozen")
# Output channels of a block over those of its 3x3 convolution.
EXPANSION = 4


def resize_linear(image: jax.Array, shape: Sequence[int]) -> jax.Array:
    """Resizes [B, *axes, C] linearly with the corner cells held (PyTorch's align_corners).

    Args:
        image: any float type.
        shape: wanted size of every axis.

    Returns:
        [B, *shape, C] float32 (float64 for float64 input).
    """
    image = image.astype(jnp.promote_types(image.dtype, jnp.float32))
    for axis, (old, new) in enumerate(zip(image.shape[1:-1], shape, strict=True), 1):
        if old == new:
            continue
        places = np.linspace(0.0, old - 1.0, new)
        weights = np.maximum(1.0 - np.abs(places[:, None] - np.arange(old)), 0.0)
        # One small matrix per axis; bf16 or TF32 passes would blur intensities by 0.4 %.
        image = jnp.moveaxis(jnp.tensordot(image, jnp.asarray(weights, image.dtype), (axis, 1),
                                           precision=lax.Precision.HIGHEST), -1, axis)
    return image


class _Unit(nn.Module):
    """Convolution without bias and batch normalisation; float32 out."""

    features: int
    size: int
    stride: int
    dtype: Any
    sharing: Scope

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        rank = x.ndim - 2
        init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
        x = nn.Conv(self.features, (self.size,) * rank, (self.stride,) * rank,
                    padding=[(self.size // 2,) * 2] * rank, use_bias=False, dtype=self.dtype,
                    kernel_init=init, name="conv")(x)
        return BatchNorm(sharing=self.sharing, name="norm")(x, train=train)


class _Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions around a shortcut, the stride on the 3x3 (ResNet v1.5)."""

    features: int
    stride: int
    dtype: Any
    sharing: Scope

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        def unit(features: int, size: int, stride: int, name: str) -> nn.Module:
            return _Unit(features, size, stride, self.dtype, self.sharing, name=name)

        out = self.features * EXPANSION
        y = nn.relu(unit(self.features, 1, 1, "reduce")(x, train))
        y = nn.relu(unit(self.features, 3, self.stride, "middle")(y, train))
        y = unit(out, 1, 1, "expand")(y, train)
        if x.shape[-1] != out or self.stride != 1:
            x = unit(out, 1, self.stride, "shortcut")(x, train)
        return nn.relu(x + y).astype(self.dtype)


class ResNet(nn.Module):
    """Bottleneck residual network (torchvision's v1.5) that returns its last two stages.

    Attributes:
        stages: blocks per stage, at least two; (3, 4, 6, 3) is ResNet-50.
        width: channels of the stem; every stage has twice those of the one before.
        norm: "batch", or "frozen": running statistics always, as when fine-tuning with small
            batches.
        resize: every axis is first resized linearly to this many cells; 0 leaves it.
        channels_first: channels come before the axes of an image, not after them.
        dtype: type of the convolutions; statistics and the pooled vector are float32.
        sharing: who shares batch statistics.
    """

    stages: tuple[int, ...] = (3, 4, 6, 3)
    width: int = 64
    norm: str = "batch"
    resize: int = 0
    channels_first: bool = False
    dtype: Any = jnp.float32
    sharing: Scope = WHOLE_BATCH

    @nn.compact
    def __call__(self, image: jax.Array, train: bool = False) -> VisionTower:
        """Encodes images in network units.

        Args:
            image: [B, *axes, C], or [B, C, *axes] when `channels_first`.
            train: normalise by the statistics of the batch, unless `norm` is "frozen".

        Returns:
            VisionTower: pooled [B, W], the mean of the last stage over its places; tokens
            [B, N, W / 2], the places of the stage before it, first axis slowest; no attention.
        """
        train = train and self.norm == "batch"
        if self.channels_first:
            image = jnp.moveaxis(image, 1, -1)
        rank = image.ndim - 2
        if self.resize:
            image = resize_linear(image, (self.resize,) * rank)
        x = _Unit(self.width, 7, 2, self.dtype, self.sharing, name="stem")(
            image.astype(self.dtype), train)
        x = nn.max_pool(nn.relu(x).astype(self.dtype), (3,) * rank, (2,) * rank,
                        [(1, 1)] * rank)
        before = x
        for stage, blocks in enumerate(self.stages):
            before = x
            for block in range(blocks):
                stride = 2 if stage and not block else 1
                x = _Bottleneck(self.width * 2**stage, stride, self.dtype, self.sharing,
                                name=f"stage{stage + 1}_block{block}")(x, train)
        pooled = x.astype(jnp.promote_types(x.dtype, jnp.float32)).mean(range(1, rank + 1))
        return VisionTower(pooled, before.reshape(len(before), -1, before.shape[-1]), None)


@register("vision", "resnet50")
def resnet50(*, input_shape: Sequence[int], norm: str = "batch", resize: int = 299,
             scope: Scope = WHOLE_BATCH, need_cls_attention: bool = False,
             **options: Any) -> nn.Module:
    """Makes MGCA's ResNet-50 on radiographs [B, C, H, W].

    Args:
        input_shape: (H, W) in pixels; any, since the network is convolutional.
        norm, resize: see `ResNet`.
        scope: who shares batch statistics.
        need_cls_attention: taken for the sake of encoders with a CLS token; has no say here.
        **options: other attributes of `ResNet`.

    Raises:
        KeyError: unknown `norm`, or a shape that has not two numbers.
    """
    if norm not in NORMS:
        raise KeyError(miss("norm", norm, NORMS))
    if len(input_shape) != 2:
        raise KeyError(f"resnet50 needs an input shape (H, W), not {tuple(input_shape)}; choose "
                       "another encoder or shape")
    return ResNet(norm=norm, resize=resize, channels_first=True, sharing=scope, **options)
