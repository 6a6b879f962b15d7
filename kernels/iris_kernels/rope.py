"""Rotary positions of query and key rows, both in one pass; differentiable.

    rotated_i = x_i cos_i - x_(i + Dh/2) sin_i
    rotated_(i + Dh/2) = x_(i + Dh/2) cos_i + x_i sin_i          i < Dh/2, for query and key

Computed in fp32 and rounded once. A rotation's gradient is the upstream gradient rotated by the
negative angle, by the same kernel; backward keeps nothing but the tables.

Bytes moved for b-byte elements: 2 b Dh (H + Hkv) + 4 Dh per row (the tables are fp32), forward and
backward each; one kernel launch instead of the fourteen of separate operations.

Shapes: T rows, H query heads, Hkv key heads, Dh head width.
"""

import torch
from torch import Tensor

from . import cpp
from ._backend import backend, direct_backend, jit, needs_gradient, tl, triton
from ._checks import LOGIT_DTYPES, check_rotation
from ._ops import add_op_namespace_prefix

# --- Triton kernel --------------------------------------------------------------------------------


@jit
def _rotate(x, out, row, h, heads, x_t, x_h, c, s, i, HALF: tl.constexpr):
    """Heads `h` of one row of `x`, rotated, to contiguous `out`."""
    mask = (h < heads)[:, None] & (i < HALF)[None, :]
    h = h.to(tl.int64)  # heads may be further apart than rows
    source = x + row * x_t + h[:, None] * x_h + i[None, :]
    target = out + (row * heads + h[:, None]) * 2 * HALF + i[None, :]
    low = tl.load(source, mask=mask, other=0.0)
    high = tl.load(source + HALF, mask=mask, other=0.0)
    a, b = low.to(tl.float32), high.to(tl.float32)
    tl.store(target, (a * c - b * s).to(low.dtype), mask=mask)
    tl.store(target + HALF, (b * c + a * s).to(low.dtype), mask=mask)


@jit
def _rope_kernel(
    # Inputs: query [T, H, Dh], key [T, Hkv, Dh], tables [T, Dh/2]
    query, key, cos, sin,
    # Outputs, contiguous
    rotated_query, rotated_key,
    # Sizes, and strides by dimension
    H, HKV, q_t, q_h, k_t, k_h, table_t,
    # Programs per row for its query; heads per program; Dh/2, and that rounded up to a power of two
    QUERY_BLOCKS: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr, WIDTH: tl.constexpr,
    BACKWARDS: tl.constexpr,
):  # fmt: skip
    """HEADS heads of one row: of its query, then of its key."""
    row = tl.program_id(0).to(tl.int64)  # the other grid axes are limited to 65535
    block = tl.program_id(1)
    i = tl.arange(0, WIDTH)
    h = tl.arange(0, HEADS)
    c = tl.load(cos + row * table_t + i, mask=i < HALF, other=0.0)[None, :]
    s = tl.load(sin + row * table_t + i, mask=i < HALF, other=0.0)[None, :]
    if BACKWARDS:
        s = -s
    if block < QUERY_BLOCKS:
        _rotate(query, rotated_query, row, block * HEADS + h, H, q_t, q_h, c, s, i, HALF)
    else:
        h += (block - QUERY_BLOCKS) * HEADS
        _rotate(key, rotated_key, row, h, HKV, k_t, k_h, c, s, i, HALF)


# --- Launcher -------------------------------------------------------------------------------------


def rope_triton(
    query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, backwards: bool
) -> tuple[Tensor, Tensor]:
    """One launch; up to 16 heads per program, 8 elements of each half per thread."""
    T, H, width = query.shape
    kv_heads = key.shape[1]
    heads, half = (
        min(triton.next_power_of_2(max(H, kv_heads)), 16),
        triton.next_power_of_2(width // 2),
    )
    query_blocks, key_blocks = -(-H // heads), -(-kv_heads // heads)
    rotated = query.new_empty(query.shape), key.new_empty(key.shape)
    _rope_kernel[(T, query_blocks + key_blocks)](
        query, key, cos, sin, *rotated, H, kv_heads,
        *query.stride()[:2], *key.stride()[:2], cos.stride(0),
        QUERY_BLOCKS=query_blocks, HEADS=heads, HALF=width // 2, WIDTH=half, BACKWARDS=backwards,
        num_warps=min(max(heads * half // 256, 1), 8), enable_fp_fusion=True,
    )  # fmt: skip
    return rotated


# --- The C++ path ---------------------------------------------------------------------------------

_rope = cpp.function(
    "iris_rope", None, cpp.INT, *[cpp.POINTER, cpp.LONG, cpp.LONG, cpp.LONG] * 2, cpp.POINTER,
    cpp.POINTER, cpp.LONG, cpp.LONG, cpp.LONG, cpp.INT, cpp.POINTER, cpp.POINTER, cpp.INT,
)  # fmt: skip


def rope_cpp(
    query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, backwards: bool
) -> tuple[Tensor, Tensor]:
    """One pass over each row."""
    T, H, width = query.shape
    kv_heads = key.shape[1]
    rotated = query.new_empty(query.shape), key.new_empty(key.shape)
    _rope()(
        query.dtype == torch.bfloat16, query.data_ptr(), H, *query.stride()[:2],
        key.data_ptr(), kv_heads, *key.stride()[:2], cos.data_ptr(), sin.data_ptr(),
        cos.stride(0), T, width // 2, backwards, rotated[0].data_ptr(), rotated[1].data_ptr(),
        cpp.threads(T * (H + kv_heads) * width),
    )  # fmt: skip
    return rotated


# --- The torch path -------------------------------------------------------------------------------


def rope_torch(
    query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, backwards: bool
) -> tuple[Tensor, Tensor]:
    """The same in torch."""
    cos, sin = cos[:, None], -sin[:, None] if backwards else sin[:, None]

    def rotate(x: Tensor) -> Tensor:
        first, second = x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, dim=-1)
        parts = (first * cos - second * sin, second * cos + first * sin)
        return torch.cat(parts, dim=-1).to(x.dtype)

    return rotate(query), rotate(key)


PATHS = {"triton": rope_triton, "cpp": rope_cpp, "torch": rope_torch}


# --- Custom op and autograd -----------------------------------------------------------------------


@torch.library.custom_op(add_op_namespace_prefix("rope"), mutates_args=())
def _rope_op(
    query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, backwards: bool
) -> tuple[Tensor, Tensor]:
    if not query.numel() or not key.numel():
        return query.new_empty(query.shape), key.new_empty(key.shape)
    return PATHS[backend(query)](query, key, cos, sin, backwards)


@_rope_op.register_fake
def _(query, key, *_):
    return query.new_empty(query.shape), key.new_empty(key.shape)


def _setup_context(ctx, inputs, output) -> None:
    _, _, cos, sin, ctx.backwards = inputs
    ctx.save_for_backward(cos, sin)


def _autograd_backward(ctx, d_query, d_key):
    d_query, d_key = (d if d.stride(-1) == 1 else d.contiguous() for d in (d_query, d_key))
    return *_rotate_rows(d_query, d_key, *ctx.saved_tensors, not ctx.backwards), None, None, None


_rope_op.register_autograd(_autograd_backward, setup_context=_setup_context)


# --- Eager mode on a CPU, without the custom op ---------------------------------------------------


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, cos, sin, backwards, path):
        ctx.save_for_backward(cos, sin)
        ctx.backwards = backwards
        return PATHS[path](query, key, cos, sin, backwards)

    @staticmethod
    def backward(ctx, d_query, d_key):
        return *_autograd_backward(ctx, d_query, d_key), None


def _rotate_rows(query, key, cos, sin, backwards: bool) -> tuple[Tensor, Tensor]:
    path = direct_backend(query, key, cos, sin, with_gradient=True)
    if path is None or not query.numel() or not key.numel():
        return _rope_op(query, key, cos, sin, backwards)
    if needs_gradient(query, key):
        return _Rope.apply(query, key, cos, sin, backwards, path)
    return PATHS[path](query, key, cos, sin, backwards)


# --- Public ---------------------------------------------------------------------------------------


def rope(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Query and key rows, rotated by their positions. Overwrites nothing.

    Channels i and i + Dh/2 are rotated together, as in transformers' Llama. Differentiable with
    respect to `query` and `key`. A row's result does not depend on the other rows, bit for bit.
    For decoding, `rope_append` also writes the key into a cache. `rope_append_reference` is the
    rotation in eager torch.

    Args:
        query: (T, H, Dh) float32, bfloat16 or float16 (float64 on the torch path), Dh even. Any
            strides, but contiguous in the last dimension.
        key: (T, Hkv, Dh) of the same dtype.
        cos, sin: (T, Dh/2) float32, of the angle position * theta^(-2i/Dh), contiguous in the last
            dimension and of equal strides.

    Returns:
        Rotated query and key, contiguous.

    Raises:
        ValueError: an argument of the wrong shape, strides, dtype or device.
    """
    _check(query, key, cos, sin)
    return _rotate_rows(query, key, cos, sin, False)


def _check(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> None:
    if query.dtype not in LOGIT_DTYPES or query.dim() != 3 or query.shape[-1] % 2:
        raise ValueError(
            f"query has shape {tuple(query.shape)} and dtype {query.dtype}: pass (T, H, Dh), Dh "
            "even, in float32, bfloat16 or float16"
        )
    if key.dim() != 3:
        raise ValueError(f"key has shape {tuple(key.shape)}: pass (T, Hkv, Dh)")
    T, _, width = query.shape
    check_rotation(
        {
            "query": (query, tuple(query.shape), (query.dtype,)),
            "key": (key, (T, key.shape[1], width), (query.dtype,)),
            "cos": (cos, (T, width // 2), (torch.float32,)),
            "sin": (sin, (T, width // 2), (torch.float32,)),
        }
    )
