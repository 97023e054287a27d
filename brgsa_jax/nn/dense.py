"""The affine map of the towers: 16-bit products, float32 sums."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax


def _float32_of(dtype: Any) -> Any:
    """The type in which products of `dtype` are summed up: float32, or float64 for itself."""
    return jnp.promote_types(dtype, jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def affine(x: jax.Array, kernel: jax.Array, bias: jax.Array, wide: bool = False,
           flat: bool = True) -> jax.Array:
    """x ↦ x kernel + bias, the product in the type of x.

    The gradients of kernel and bias are summed up in float32, over devices too; that of x has its
    type.

    Args:
        x: [..., W].
        kernel: [W, V], bias: [V], in the type they are trained in.
        wide: keep the float32 that 16-bit products are summed up in.
        flat: leading axes are one for the product. With two its gradient is a third slower on a
            CPU; on a TPU making one of them moves every row, if their number is odd.

    Returns:
        [..., V] in the type of x, with `wide` in float32 at least.
    """
    made = _float32_of(x.dtype) if wide else x.dtype
    rows = x.reshape(-1, x.shape[-1]) if flat else x
    product = lax.dot_general(rows, kernel.astype(x.dtype), (((rows.ndim - 1,), (0,)), ((), ())),
                                preferred_element_type=made)
    return product.reshape(*x.shape[:-1], kernel.shape[-1]) + bias.astype(made)


def _forward(x, kernel, bias, wide, flat):
    return affine(x, kernel, bias, wide, flat), (x, kernel, bias)


def _backward(wide, flat, saved, gradient):
    x, kernel, bias = saved
    rows, pulled = ((part.reshape(-1, part.shape[-1]) for part in (x, gradient)) if flat
                    else (x, gradient))
    last, leading = rows.ndim - 1, tuple(range(rows.ndim - 1))
    sums = _float32_of(x.dtype)
    narrow = pulled.astype(x.dtype)
    to_x = lax.dot_general(narrow, kernel.astype(x.dtype), (((last,), (1,)), ((), ())))
    to_kernel = lax.dot_general(rows, narrow, ((leading, leading), ((), ())),
                                preferred_element_type=sums)
    to_bias = jnp.sum(pulled, axis=leading, dtype=sums)
    return to_x.reshape(x.shape), to_kernel.astype(kernel.dtype), to_bias.astype(bias.dtype)


affine.defvjp(_forward, _backward)


class Dense(nn.Module):
    """`affine` with parameters "kernel" and "bias", as `nn.Dense`.

    Attributes:
        features: width of the result.
        dtype: of the product.
        wide, flat: see `affine`.
        kernel_init: initialiser of the kernel; the bias starts at 0.
    """

    features: int
    dtype: Any = jnp.float32
    wide: bool = False
    flat: bool = True
    kernel_init: Any = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [..., W] to [..., features]."""
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        return affine(x.astype(self.dtype), kernel, bias, self.wide, self.flat)
