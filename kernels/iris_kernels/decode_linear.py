"""Matrix products of a decoding step: few rows, so that the time is that of reading the weight.

    out = x @ weight.T + bias
    out = silu(gate) * up                  (gate, up) = x @ weight.T, `gated`
    out = gelu(x @ weight.T + bias)        gelu(v) = v (1 + erf(v / sqrt(2))) / 2, `gelu`
    partial_s = x[:, part s] @ weight[:, part s].T, whose sum over s is x @ weight.T

The weight is read once. It is the left operand of the tensor cores' product, whose right operand
may be as narrow as 16 columns; these are the rows of x. Where N is small, K is divided over
programs (split-K) to occupy the GPU, and whoever reads the result adds the partial sums in their
order: `add_rms_norm` does. There are no atomics.

Sums are fp32. Gate and up are rounded to the dtype of x, and silu(gate) and the input of gelu as
well, as by separate operations. How K is divided depends on N and K and not on M, so every row adds
the same products in the same order, whatever the other rows; that the tensor cores add the products
of one instruction in an order that does not depend on its width is not documented by the vendor.

Bytes moved for b-byte elements: b (N K + M K + M N) (gated: N/2 in the last term), partial sums
b (N K + M K) + 4 S M N. x comes from the L2 cache once per tile of columns.

Shapes: x (M, K), weight (N, K), S partial sums.
"""

import torch
from torch import Tensor

from ._backend import calls_directly, interpreted, jit, tl, triton, uses_triton
from ._ops import add_op_namespace_prefix
from ._overlap import LINE_BYTES, overlap_options, prefetch_to_l2, wait_for_previous_kernel

MAX_ROWS = 128  # of the Triton path: one program holds all rows
DTYPES = (torch.bfloat16, torch.float16)
BLOCK_N, BLOCK_K = 64, 64  # gated: that many gates and as many ups
WIDE_ROWS = 64  # from here on twice as many columns per program, so that x is read half as often
PROGRAMS = 132  # multiprocessors of an H100 or H200
MAX_PARTS = 8  # of K: every part costs 4 M N bytes written and read
SHARED_BYTES = 96 << 10  # so that the next kernel's tiles fit next to them on sm_90
# Where programs are fewer than half of the multiprocessors, each one has more bytes in flight; one
# program of attention still fits next to it.
FEW_PROGRAMS_SHARED_BYTES = 144 << 10
# Of the weight, into the L2 cache while the previous kernel ends: what memory delivers in 2 us,
# about as long as the norm between two products takes, which leaves memory idle.
PREFETCH_BYTES = 8 << 20


# --- Triton kernel --------------------------------------------------------------------------------


@jit
def _load_weight(pointers, in_rows, k, K, EVEN: tl.constexpr):
    """A tile of the weight. EVEN: BLOCK_K divides K."""
    if EVEN:
        return tl.load(pointers, mask=in_rows[:, None], other=0.0)
    return tl.load(pointers, mask=in_rows[:, None] & (k < K)[None, :], other=0.0)


@jit
def _add_product(left, right, total, WIDEN: tl.constexpr):
    """total + left @ right; WIDEN: in Triton's interpreter, which cannot multiply bfloat16."""
    if WIDEN:
        return tl.dot(left.to(tl.float32), right.to(tl.float32), total)
    return tl.dot(left, right, total)


@jit
def _prefetch(
    weight, n, N, K, first_k, LINES: tl.constexpr, LINE: tl.constexpr, OVERLAP: tl.constexpr
):
    """The first LINES cache lines of each row in this program's part of the weight."""
    rows = tl.minimum(n, N - 1).to(tl.int64) * K
    columns = tl.minimum(first_k + tl.arange(0, LINES) * LINE, K - 1)
    prefetch_to_l2(weight + rows[:, None] + columns[None, :], OVERLAP)


@jit
def _linear_kernel(
    # x [M, K], weight [N, K] or, gated, [2 N, K], bias [N] or None
    x, weight, bias,
    # [M, N], or PARTS partial sums in fp32 [PARTS, M, N]
    out,
    M, N, K,
    GATED: tl.constexpr, GELU: tl.constexpr, PARTIAL: tl.constexpr, PART_K: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    LINES: tl.constexpr, LINE: tl.constexpr, WIDEN: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """BLOCK_N columns of all rows, over PART_K of K; products are transposed."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    part = tl.program_id(1)
    first_k = part * PART_K
    m = tl.arange(0, BLOCK_M)
    k = first_k + tl.arange(0, BLOCK_K)
    inside = n < N
    # Nothing but the weight, which no kernel of a decoding step writes, is worth fetching now.
    _prefetch(weight, n, N, K, first_k, LINES, LINE, OVERLAP)
    w = weight + n.to(tl.int64)[:, None] * K + k[None, :]
    up_weight = weight + tl.cast(N, tl.int64) * K  # an N of 1 is a constant, without `to`
    u = w
    if GATED:
        _prefetch(up_weight, n, N, K, first_k, LINES, LINE, OVERLAP)
        u = up_weight + n.to(tl.int64)[:, None] * K + k[None, :]
    # x is what the previous kernel wrote, and `out` may be memory that it read.
    wait_for_previous_kernel(OVERLAP)
    rows = x + m[:, None] * K + k[None, :]
    product = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    up = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for _ in range(first_k, tl.minimum(first_k + PART_K, K), BLOCK_K):
        mask = (m < M)[:, None]
        if not EVEN:
            mask = mask & (k < K)[None, :]
        right = tl.trans(tl.load(rows, mask=mask, other=0.0))
        product = _add_product(_load_weight(w, inside, k, K, EVEN), right, product, WIDEN)
        if GATED:
            up = _add_product(_load_weight(u, inside, k, K, EVEN), right, up, WIDEN)
            u += BLOCK_K
        w += BLOCK_K
        rows += BLOCK_K
        k += BLOCK_K
    if bias is not None:
        product += tl.load(bias + n, mask=inside, other=0.0).to(tl.float32)[:, None]
    if GATED:
        gate = product.to(x.dtype.element_ty).to(tl.float32)
        silu = (gate / (1.0 + tl.exp(-gate))).to(x.dtype.element_ty)
        product = silu.to(tl.float32) * up.to(x.dtype.element_ty).to(tl.float32)
    if GELU:
        v = product.to(x.dtype.element_ty).to(tl.float32)
        product = 0.5 * v * (1.0 + tl.erf(v * 0.7071067811865476))
    if PARTIAL:
        out += part * M * N
    to = out + m[None, :] * N + n[:, None]
    tl.store(to, product.to(out.dtype.element_ty), mask=inside[:, None] & (m < M)[None, :])


# --- Launcher -------------------------------------------------------------------------------------


def parts_of(N: int, K: int) -> tuple[int, int]:
    """How many partial sums `decode_linear_partials` returns, and the columns of each one."""
    tiles = -(-K // BLOCK_K)
    parts = min(max(PROGRAMS // -(-N // BLOCK_N), 1), MAX_PARTS, tiles)
    tiles_per_part = -(-tiles // parts)
    return -(-tiles // tiles_per_part), tiles_per_part * BLOCK_K


def linear_launch(M: int, N: int, parts: int, gated: bool) -> dict[str, int | bool]:
    """Tile sizes, and as many pipeline stages as fit, for 2-byte elements."""
    block_m = max(16, triton.next_power_of_2(M))
    wide = block_m >= WIDE_ROWS
    block_n = 2 * BLOCK_N if wide and not gated else BLOCK_N
    stage_bytes = 2 * BLOCK_K * (block_m + (2 * block_n if gated else block_n))
    few = -(-N // block_n) * parts <= PROGRAMS // 2
    shared = FEW_PROGRAMS_SHARED_BYTES if few else SHARED_BYTES
    return {
        "BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": BLOCK_K,
        "num_stages": min(shared // stage_bytes, 6), "num_warps": 8 if wide else 4,
        "maxnreg": 192 if wide else None,  # sm_80 spills at the number that the compiler chooses
        "enable_fp_fusion": True,
    }  # fmt: skip


def prefetched_lines(weight_rows: int, parts: int, part_k: int) -> int:
    """Cache lines per row and part of the weight that are fetched early: a power of two."""
    wanted = PREFETCH_BYTES // (LINE_BYTES * weight_rows * parts)
    return 1 << max(min(wanted, 2 * part_k // LINE_BYTES), 1).bit_length() - 1


def linear_triton(
    x: Tensor, weight: Tensor, bias: Tensor | None, gated: bool, partial: bool, gelu: bool = False
) -> Tensor:
    """One launch, one program per tile of columns and part of K."""
    (M, K), N = x.shape, weight.shape[0] // (2 if gated else 1)
    parts, part_k = parts_of(N, K) if partial else (1, -(-K // BLOCK_K) * BLOCK_K)
    out = x.new_empty(parts, M, N, dtype=torch.float32) if partial else x.new_empty(M, N)
    options = linear_launch(M, N, parts, gated)
    _linear_kernel[(-(-N // options["BLOCK_N"]), parts)](
        x, weight, bias, out, M, N, K,
        GATED=gated, GELU=gelu, PARTIAL=partial, PART_K=part_k, EVEN=K % BLOCK_K == 0,
        WIDEN=interpreted(),
        LINES=prefetched_lines(len(weight), parts, part_k), LINE=LINE_BYTES // 2,
        **options, **overlap_options(),
    )  # fmt: skip
    return out


# --- The torch path -------------------------------------------------------------------------------


def linear_torch(
    x: Tensor, weight: Tensor, bias: Tensor | None, gated: bool, partial: bool, gelu: bool = False
) -> Tensor:
    """The same in torch."""
    if partial:
        _, part_k = parts_of(*weight.shape)
        pairs = zip(x.float().split(part_k, 1), weight.float().split(part_k, 1), strict=True)
        return torch.stack([rows @ columns.t() for rows, columns in pairs])
    product = torch.nn.functional.linear(x, weight, bias)
    if not gated:
        return torch.nn.functional.gelu(product) if gelu else product
    gate, up = product.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


# --- Custom op ------------------------------------------------------------------------------------


@torch.library.custom_op(add_op_namespace_prefix("decode_linear"), mutates_args=())
def _decode_linear_op(
    x: Tensor, weight: Tensor, bias: Tensor | None, gated: bool, partial: bool, gelu: bool = False
) -> Tensor:
    if not x.shape[0]:
        return _empty(x, weight, gated, partial)
    run = linear_triton if uses_triton(x) else linear_torch
    return run(x, weight, bias, gated, partial, gelu)


def _empty(x: Tensor, weight: Tensor, gated: bool, partial: bool) -> Tensor:
    N = weight.shape[0]
    if partial:
        return x.new_empty(parts_of(N, weight.shape[1])[0], x.shape[0], N, dtype=torch.float32)
    return x.new_empty(x.shape[0], N // 2 if gated else N)


@_decode_linear_op.register_fake
def _(x, weight, bias, gated, partial, gelu=False):
    return _empty(x, weight, gated, partial)


# --- Public ---------------------------------------------------------------------------------------


def decode_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    gated: bool = False,
    gelu: bool = False,
) -> Tensor:
    """x @ weight.T + bias for few rows; `gated`: silu of its first half times its second half.

    Not differentiable. `decode_linear_reference` is the same in eager torch.

    Args:
        x: (M, K) bfloat16 or float16, contiguous, M up to 128.
        weight: (N, K) of the same dtype, contiguous; gated: N/2 gates, then N/2 ups.
        bias: (N) of the same dtype; not with `gated`.
        gated: return the input of a SwiGLU's last product, as `silu_mul` of the product.
        gelu: return gelu of the sum, exact (by erf); not with `gated`.

    Returns:
        (M, N), or (M, N/2) if gated, in the dtype of `x`.

    Raises:
        ValueError: an argument of the wrong shape, strides, dtype or device.
    """
    _check(x, weight)
    N = weight.shape[0]
    if gated and gelu:
        raise ValueError("gated and gelu are both True: pass one of them")
    if gated and (bias is not None or N % 2):
        raise ValueError(
            f"gated with weight of shape {tuple(weight.shape)} and bias "
            f"{None if bias is None else tuple(bias.shape)}: pass gate and up of equal width and "
            "no bias"
        )
    if bias is not None and (bias.shape, bias.dtype, bias.device) != ((N,), x.dtype, x.device):
        raise ValueError(
            f"bias is {bias.dtype} of shape {tuple(bias.shape)} on {bias.device}: pass {x.dtype} "
            f"of shape {(N,)} on {x.device}"
        )
    if calls_directly(x, weight, bias) and len(x):
        return linear_torch(x, weight, bias, gated, False, gelu)
    return _decode_linear_op(x, weight, bias, gated, False, gelu)


def decode_linear_partials(x: Tensor, weight: Tensor) -> Tensor:
    """Partial sums over parts of K: (S, M, N) float32, whose sum over S is x @ weight.T.

    S depends on N and K only. `add_rms_norm` takes the result as its `delta`. Arguments and errors
    are those of `decode_linear`.
    """
    _check(x, weight)
    if calls_directly(x, weight) and len(x):
        return linear_torch(x, weight, None, False, True)
    return _decode_linear_op(x, weight, None, False, True)


def _check(x: Tensor, weight: Tensor) -> None:
    if x.dtype not in DTYPES or x.dim() != 2 or not x.is_contiguous() or x.shape[0] > MAX_ROWS:
        raise ValueError(
            f"x has shape {tuple(x.shape)}, dtype {x.dtype}, strides {x.stride()}: pass (M, K) in "
            f"bfloat16 or float16, contiguous, of {MAX_ROWS} rows or fewer"
        )
    fits = weight.dim() == 2 and weight.shape[1] == x.shape[1] and weight.is_contiguous()
    if not fits or (weight.dtype, weight.device) != (x.dtype, x.device) or not weight.numel():
        raise ValueError(
            f"weight is {weight.dtype} of shape {tuple(weight.shape)}, strides {weight.stride()}, "
            f"on {weight.device}: pass {x.dtype} (N, {x.shape[1]}), contiguous, on {x.device}"
        )


def decode_linear_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    gated: bool = False,
    gelu: bool = False,
) -> Tensor:
    """`decode_linear` in eager torch."""
    product = torch.nn.functional.linear(x, weight, bias)
    if gelu:
        return product * (1 + (product / 2**0.5).erf()) / 2
    if not gated:
        return product
    gate, up = product.chunk(2, dim=-1)
    return gate * gate.sigmoid() * up
