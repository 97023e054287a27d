"""Scaled dot-product attention in the form that suits the device.

"xla" is the plain form. "chunked" is for the cache of a CPU, "cudnn" NVIDIA's fused kernel,
"splash" the fused kernel of JAX for TPUs; each is equal to the plain form and keeps of the
weights only their log-sum-exp, so that memory grows with the tokens and not with their square.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

ATTENTION = ("auto", "xla", "chunked", "cudnn", "splash")
# The platform that alone has a form.
PLATFORM_OF = {"cudnn": "gpu", "splash": "tpu"}
SMALLEST_CHUNKED = 96
# Logits of one chunk, 8 MiB in float32.
CHUNK_ENTRIES = 2**21
SPLASH_LANES = 128
SPLASH_BLOCKS = (1024, 512, 256)
# What a larger block may add in padding.
SPLASH_PADDING = 1.1


class Placement(NamedTuple):
    """On what attention runs.

    Attributes:
        platform: "cpu", "gpu" or "tpu"; None asks JAX for its default.
        rows: turns a function of arrays [B, …] into one that every device runs on its own rows,
            which the compiler cannot find out for loops over rows and for kernels; None where
            one device sees all of them, or the caller has split them already.
    """

    platform: str | None = None
    rows: Callable[[Callable[..., jax.Array]], Callable[..., jax.Array]] | None = None

    @property
    def backend(self) -> str:
        """`platform`, or JAX's default."""
        return self.platform or jax.default_backend()


ANYWHERE = Placement()


def choose(implementation: str, *, platform: str, dtype: Any, keys: int, masked: bool) -> str:
    """Returns the form "auto" stands for.

    Args:
        implementation: one of `ATTENTION`; all but "auto" are returned as they are.
        platform: see `Placement`.
        dtype: of query, key and value.
        keys: number of keys.
        masked: some keys are padding.
    """
    if implementation != "auto":
        return implementation
    if platform == "gpu":
        # Its padding is a length, and a mask might have holes.
        return "cudnn" if jnp.dtype(dtype).itemsize == 2 and not masked else "xla"
    if platform == "tpu":
        return "splash" if keys > SPLASH_LANES else "xla"
    return "chunked" if platform == "cpu" and keys >= SMALLEST_CHUNKED else "xla"


def attention(query: jax.Array, key: jax.Array, value: jax.Array,
              key_mask: jax.Array | None = None, implementation: str = "auto",
              placement: Placement = ANYWHERE) -> jax.Array:
    """Scaled dot-product attention, softmax(q kᵀ/√C) v, with the softmax in float32.

    Args:
        query: [B, N, H, C]; key and value: [B, M, H, C].
        key_mask: [B, M] bool, True where a key may be attended, at least once in every row;
            "cudnn" takes the number of True as the length of a text padded on the right.
        implementation: see the module; "auto" takes cudnn for 16-bit unmasked input on a GPU,
            splash on a TPU and chunked on a CPU for all but short sequences, else xla.
        placement: see `Placement`.

    Returns:
        [B, N, H, C] of the query's type.
    """
    platform = placement.backend
    form = choose(implementation, platform=platform, dtype=query.dtype, keys=key.shape[1],
                  masked=key_mask is not None)
    if form in ("xla", "cudnn"):
        masks = {}
        if key_mask is not None:
            masks = ({"mask": key_mask[:, None, None, :]} if form == "xla"
                     else {"key_value_seq_lengths": key_mask.sum(axis=1, dtype=jnp.int32)})
        return jax.nn.dot_product_attention(query, key, value, implementation=form, **masks)
    local = (chunked if form == "chunked"
             else functools.partial(splash, interpret=platform != "tpu"))
    inputs = (query, key, value) if key_mask is None else (query, key, value, key_mask)
    return (placement.rows(local) if placement.rows else local)(*inputs)


def chunked(query: jax.Array, key: jax.Array, value: jax.Array,
            key_mask: jax.Array | None = None) -> jax.Array:
    """Attention of one head of one sample after another, and of long ones in chunks of queries.

    Arguments and result are those of `attention`. The weights of a chunk stay in the cache; the
    backward pass forms them again from the log-sum-exp (Dao et al. 2022, equation of dS).
    """
    batch, queries, heads, width = query.shape
    pieces = -(-queries * key.shape[1] // CHUNK_ENTRIES)
    size = -(-queries // pieces)
    padded = [(0, 0), (0, pieces * size - queries), (0, 0), (0, 0)]
    by_head = [x.transpose(0, 2, 1, 3).reshape(batch * heads, x.shape[1], width)
               for x in (jnp.pad(query, padded), key, value)]
    by_head[0] = by_head[0].reshape(batch * heads, pieces, size, width)
    bias = None
    if key_mask is not None:
        bias = jnp.repeat(jnp.where(key_mask, 0.0, jnp.finfo(jnp.float32).min), heads, axis=0)
    mixed = _by_head(*by_head, bias).reshape(batch, heads, pieces * size, width)
    return mixed[:, :, :queries].transpose(0, 2, 1, 3)


@jax.custom_vjp
def _by_head(query: jax.Array, key: jax.Array, value: jax.Array,
             bias: jax.Array | None) -> jax.Array:
    """Attention of [G, P, N, C] queries over [G, M, C] keys, to whose logits bias [G, M] adds."""
    return _by_head_forward(query, key, value, bias)[0]


def _logits(q: jax.Array, k: jax.Array, bias: jax.Array | None) -> jax.Array:
    logits = _dot(q * q.shape[-1] ** -0.5, k.T)
    return logits if bias is None else logits + bias


def _dot(x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.dot(x, y, preferred_element_type=jnp.promote_types(x.dtype, jnp.float32))


def _by_head_forward(query, key, value, bias):
    def head(q, k, v, b):
        def piece(q):
            logits = _logits(q, k, b)
            top = logits.max(axis=-1, keepdims=True)
            weights = jnp.exp(logits - top)
            total = weights.sum(axis=-1, keepdims=True)
            mixed = _dot(weights.astype(v.dtype), v) / total
            return mixed.astype(q.dtype), (top + jnp.log(total))[:, 0]

        return lax.map(piece, q) if len(q) > 1 else jax.tree.map(lambda x: x[None], piece(q[0]))

    mixed, sums = lax.map(lambda x: head(*x), (query, key, value, bias))
    return mixed, (query, key, value, bias, mixed, sums)


def _by_head_backward(saved, gradient):
    def head(q, k, v, b, mixed, sums, gradient):
        def piece(so_far, x):
            q, mixed, sums, gradient = x
            weights = jnp.exp(_logits(q, k, b) - sums[:, None])
            inner = (gradient * mixed).astype(weights.dtype).sum(axis=-1, keepdims=True)
            slopes = weights * (_dot(gradient, v.T) - inner)
            slopes = (slopes * q.shape[-1] ** -0.5).astype(q.dtype)
            dk, dv = so_far
            return ((dk + _dot(slopes.T, q), dv + _dot(weights.astype(v.dtype).T, gradient)),
                    _dot(slopes, k).astype(q.dtype))

        wide = jnp.promote_types(k.dtype, jnp.float32)
        zero = (jnp.zeros(k.shape, wide), jnp.zeros(v.shape, wide))
        (dk, dv), dq = (lax.scan(piece, zero, (q, mixed, sums, gradient)) if len(q) > 1 else
                        _stacked(piece(zero, (q[0], mixed[0], sums[0], gradient[0]))))
        return dq, dk.astype(k.dtype), dv.astype(v.dtype)

    dq, dk, dv = lax.map(lambda x: head(*x), (*saved, gradient))
    bias = saved[3]
    return dq, dk, dv, None if bias is None else jnp.zeros_like(bias)


def _stacked(result: tuple[Any, jax.Array]) -> tuple[Any, jax.Array]:
    """What a scan of one turn returns, of its turn's result."""
    carried, one = result
    return carried, one[None]


_by_head.defvjp(_by_head_forward, _by_head_backward)


def splash(query: jax.Array, key: jax.Array, value: jax.Array, key_mask: jax.Array | None = None,
           *, interpret: bool = False) -> jax.Array:
    """JAX's fused kernel for TPUs; arguments and result are those of `attention`.

    Tokens are padded to a multiple of the kernel's block; padded keys have another segment id
    than the queries, which no query attends to.

    Args:
        query, key, value, key_mask: see `attention`.
        interpret: runs the kernel step by step without a TPU, for tests.
    """
    # Importing Pallas takes a second that only TPUs need.
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel as kernels,
    )
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    batch, queries, heads, width = query.shape
    keys = key.shape[1]
    query_block, key_block = _splash_block(queries), _splash_block(keys)

    def prepare(x: jax.Array, block: int) -> jax.Array:
        more = -x.shape[1] % block
        return jnp.pad(x, [(0, 0), (0, more), (0, 0), (0, 0)]).transpose(0, 2, 1, 3)

    q = prepare(query * width ** -0.5, query_block)
    k, v = (prepare(x, key_block) for x in (key, value))
    kernel = kernels.make_splash_mha_single_device(
        masks.MultiHeadMask([masks.FullMask((q.shape[2], k.shape[2]))] * heads),
        block_sizes=kernels.BlockSizes(
            block_q=query_block, block_kv=key_block, block_kv_compute=key_block,
            block_q_dkv=query_block, block_kv_dkv=key_block, block_kv_dkv_compute=key_block,
            block_q_dq=query_block, block_kv_dq=key_block),
        interpret=interpret)
    if key_mask is None:
        key_mask = jnp.ones((batch, keys), bool)
    ids = kernels.SegmentIds(
        q=jnp.ones((batch, q.shape[2]), jnp.int32),
        kv=jnp.pad(key_mask, [(0, 0), (0, k.shape[2] - keys)]).astype(jnp.int32))
    mixed = jax.vmap(kernel)(q, k, v, ids)
    return mixed[:, :, :queries].transpose(0, 2, 1, 3).astype(query.dtype)


def _splash_block(tokens: int) -> int:
    """The largest block whose padding costs little."""
    for block in SPLASH_BLOCKS:
        if -(-tokens // block) * block <= SPLASH_PADDING * tokens:
            return block
    return SPLASH_LANES


def cls_row(query: jax.Array, key: jax.Array, key_mask: jax.Array | None = None) -> jax.Array:
    """Attention of the first token over all keys, averaged over heads, as float32 [B, M].

    Fused kernels return no weights; one query row costs O(M·H·C).
    """
    logits = jnp.einsum("bhc,bmhc->bhm", query[:, 0] * query.shape[-1] ** -0.5, key,
                        preferred_element_type=jnp.float32)
    if key_mask is not None:
        logits = jnp.where(key_mask[:, None, :], logits, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(logits, axis=-1)
    if key_mask is not None:
        weights = jnp.where(key_mask[:, None, :], weights, 0.0)
    return weights.mean(axis=1)
