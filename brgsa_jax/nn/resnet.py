"""Residual networks with batch normalisation, for images of any number of axes."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from brgsa_jax.nn.attention import ANYWHERE, Placement
from brgsa_jax.nn.blocks import VisionTower
from brgsa_jax.nn.norm import WHOLE_BATCH, BatchNorm, Scope
from brgsa_jax.registry import miss, register

NORMS = ("batch", "frozen")


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
    # Output channels over `features`.
    expansion = 4

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        def unit(features: int, size: int, stride: int, name: str) -> nn.Module:
            return _Unit(features, size, stride, self.dtype, self.sharing, name=name)

        out = self.features * self.expansion
        y = nn.relu(unit(self.features, 1, 1, "reduce")(x, train))
        y = nn.relu(unit(self.features, 3, self.stride, "middle")(y, train))
        y = unit(out, 1, 1, "expand")(y, train)
        if x.shape[-1] != out or self.stride != 1:
            x = unit(out, 1, self.stride, "shortcut")(x, train)
        return nn.relu(x + y).astype(self.dtype)


class _Basic(nn.Module):
    """Two 3x3 convolutions around a shortcut, the stride on the first (ResNet-18 and -34)."""

    features: int
    stride: int
    dtype: Any
    sharing: Scope
    expansion = 1

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        def unit(size: int, stride: int, name: str) -> nn.Module:
            return _Unit(self.features, size, stride, self.dtype, self.sharing, name=name)

        y = nn.relu(unit(3, self.stride, "first")(x, train))
        y = unit(3, 1, "second")(y, train)
        if x.shape[-1] != self.features or self.stride != 1:
            x = unit(1, self.stride, "shortcut")(x, train)
        return nn.relu(x + y).astype(self.dtype)


BLOCKS = {"bottleneck": _Bottleneck, "basic": _Basic}


class ResNet(nn.Module):
    """Residual network (torchvision's v1.5) that returns its last two stages.

    Attributes:
        stages: blocks per stage, at least two; (3, 4, 6, 3) is ResNet-50, (2, 2, 2, 2) ResNet-18.
        block: "bottleneck", or "basic" as in ResNet-18.
        rank: axes of an image, 2 or 3.
        width: channels of the stem; every stage has twice those of the one before.
        norm: "batch", or "frozen": running statistics always, as when fine-tuning with small
            batches.
        resize: every axis is first resized linearly to this many cells; 0 leaves it.
        channels_first: channels come before the axes of an image, not after them.
        dtype: type of the convolutions; statistics and the pooled vector are float32.
        sharing: who shares batch statistics.
    """

    stages: tuple[int, ...] = (3, 4, 6, 3)
    block: str = "bottleneck"
    rank: int = 2
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
            image: [B, *axes, C], or [B, C, *axes] when `channels_first`; one channel
                also [B, *axes].
            train: normalise by the statistics of the batch, unless `norm` is "frozen".

        Returns:
            VisionTower: pooled [B, W], the mean of the last stage over its places; tokens
            [B, N, W / 2], the places of the stage before it, first axis slowest; no attention.
        """
        train = train and self.norm == "batch"
        if self.channels_first:
            image = jnp.moveaxis(image, 1, -1)
        elif image.ndim == self.rank + 1:
            image = image[..., None]
        rank = self.rank
        if self.resize:
            image = resize_linear(image, (self.resize,) * rank)
        x = _Unit(self.width, 7, 2, self.dtype, self.sharing, name="stem")(
            image.astype(self.dtype), train)
        x = nn.max_pool(nn.relu(x).astype(self.dtype), (3,) * rank, (2,) * rank,
                        [(1, 1)] * rank)
        before, block = x, BLOCKS[self.block]
        for stage, blocks in enumerate(self.stages):
            before = x
            for index in range(blocks):
                stride = 2 if stage and not index else 1
                x = block(self.width * 2**stage, stride, self.dtype, self.sharing,
                          name=f"stage{stage + 1}_block{index}")(x, train)
        pooled = x.astype(jnp.promote_types(x.dtype, jnp.float32)).mean(range(1, rank + 1))
        return VisionTower(pooled, before.reshape(before.shape[0], -1, before.shape[-1]), None)


@register("vision", "resnet50")
def resnet50(*, input_shape: Sequence[int], resize: int = 299, **options: Any) -> nn.Module:
    """Makes MGCA's ResNet-50 on radiographs [B, C, H, W].

    Args:
        input_shape: (H, W) in pixels; any, since the network is convolutional.
        resize: see `ResNet`.
        **options: `norm`, `scope` and other attributes of `ResNet`.

    Raises:
        KeyError: unknown `norm`, or a shape that has not two numbers.
    """
    return _make("resnet50", 2, input_shape, resize=resize, channels_first=True, **options)


@register("vision", "resnet3d18")
def resnet3d18(*, input_shape: Sequence[int], **options: Any) -> nn.Module:
    """Makes a ResNet-18 on volumes (X, Y, Z), the cheap baseline: two basic blocks a stage.

    Raises:
        KeyError: unknown `norm`, or a shape that has not three numbers.
    """
    return _make("resnet3d18", 3, input_shape,
                 **{"stages": (2, 2, 2, 2), "block": "basic", **options})


@register("vision", "resnet3d50")
def resnet3d50(*, input_shape: Sequence[int], **options: Any) -> nn.Module:
    """Makes a ResNet-50 on volumes (X, Y, Z).

    Raises:
        KeyError: unknown `norm`, or a shape that has not three numbers.
    """
    return _make("resnet3d50", 3, input_shape, **options)


def _make(name: str, rank: int, input_shape: Sequence[int], *, norm: str = "batch",
          scope: Scope = WHOLE_BATCH, placement: Placement = ANYWHERE,
          need_cls_attention: bool = False, need_tokens: bool = True, **options: Any) -> ResNet:
    """Makes a network; without attention, `placement` and the two needs have no say."""
    for key, value, choices in (("norm", norm, NORMS),
                                ("block", options.get("block", "bottleneck"), BLOCKS)):
        if value not in choices:
            raise KeyError(miss(key, value, choices))
    if len(input_shape) != rank:
        axes = {2: "(H, W)", 3: "(X, Y, Z)"}[rank]
        raise KeyError(f"{name} needs an input shape {axes}, not {tuple(input_shape)}; choose "
                       "another encoder or shape")
    return ResNet(norm=norm, rank=rank, sharing=scope, **options)
