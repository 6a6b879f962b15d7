"""The Triton kernels of decode_linear.

Shapes: x (M, K), weight (N, K).
"""

from ._backend import jit, tl
from ._overlap import prefetch_to_l2, wait_for_previous_kernel


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
def _tile(
    weight, first_n, N, K, first_k, ROWS: tl.constexpr, BLOCK_K: tl.constexpr, GATED: tl.constexpr,
    LINES: tl.constexpr, LINE: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Columns of the result and addresses for ROWS rows of the weight, whose beginning is fetched.

    GATED: gates and ups by turns, so that a thread's sums hold both of a column.
    """
    r = tl.arange(0, ROWS)
    n = first_n + (r // 2 if GATED else r)
    rows = tl.minimum(n, N - 1).to(tl.int64)
    if GATED:
        rows += (r % 2) * tl.cast(N, tl.int64)
    columns = tl.minimum(first_k + tl.arange(0, LINES) * LINE, K - 1)
    prefetch_to_l2(weight + rows[:, None] * K + columns[None, :], OVERLAP)
    return n, weight + rows[:, None] * K + (first_k + tl.arange(0, BLOCK_K))[None, :]


@jit
def _swiglu(gate, up, dtype: tl.constexpr):
    """silu(gate) * up, rounded as by separate operations."""
    gate = gate.to(dtype).to(tl.float32)
    silu = (gate / (1.0 + tl.exp(-gate))).to(dtype)
    return silu.to(tl.float32) * up.to(dtype).to(tl.float32)


@jit
def _store_tile(
    out, bias, first_n, total, m, M, N, x,
    ROWS: tl.constexpr, GATED: tl.constexpr, GELU: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Sums [BLOCK_M, ROWS] of a tile, as the epilogue of `_linear_kernel`."""
    dtype: tl.constexpr = x.dtype.element_ty
    if GATED:
        gate, up = tl.split(tl.reshape(total, [BLOCK_M, ROWS // 2, 2]))
        total = _swiglu(gate, up, dtype)
    n = first_n + tl.arange(0, ROWS // 2 if GATED else ROWS)
    if bias is not None:
        total += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    if GELU:
        v = total.to(dtype).to(tl.float32)
        total = 0.5 * v * (1.0 + tl.erf(v * 0.7071067811865476))
    to = out + m[:, None] * N + n[None, :]
    tl.store(to, total.to(out.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])


@jit
def _uneven_linear_kernel(
    x, weight, bias, out, M, N, K,
    GATED: tl.constexpr, GELU: tl.constexpr, PARTIAL: tl.constexpr, PART_K: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, EXTRA: tl.constexpr, BLOCK_K: tl.constexpr,
    LINES: tl.constexpr, LINE: tl.constexpr, WIDEN: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """`_linear_kernel` for BLOCK_N + EXTRA columns, which are no power of two: two tiles that share
    the rows of x. These are the left operand, so that the narrow tile may be the right one."""
    COPIES: tl.constexpr = 2 if GATED else 1
    first_n = tl.program_id(0) * (BLOCK_N + EXTRA)
    first_k = tl.program_id(1) * PART_K
    n, w = _tile(
        weight, first_n, N, K, first_k, COPIES * BLOCK_N, BLOCK_K, GATED, LINES, LINE, OVERLAP
    )
    n_extra, w_extra = _tile(
        weight, first_n + BLOCK_N, N, K, first_k, COPIES * EXTRA, BLOCK_K, GATED, LINES, LINE,
        OVERLAP,
    )  # fmt: skip
    wait_for_previous_kernel(OVERLAP)
    m = tl.arange(0, BLOCK_M)
    k = first_k + tl.arange(0, BLOCK_K)
    rows = x + m[:, None] * K + k[None, :]
    total = tl.zeros([BLOCK_M, COPIES * BLOCK_N], tl.float32)
    extra = tl.zeros([BLOCK_M, COPIES * EXTRA], tl.float32)
    for _ in range(first_k, tl.minimum(first_k + PART_K, K), BLOCK_K):
        mask = (m < M)[:, None]
        if not EVEN:
            mask = mask & (k < K)[None, :]
        left = tl.load(rows, mask=mask, other=0.0)
        wide = tl.trans(_load_weight(w, n < N, k, K, EVEN))
        total = _add_product(left, wide, total, WIDEN)
        narrow = tl.trans(_load_weight(w_extra, n_extra < N, k, K, EVEN))
        extra = _add_product(left, narrow, extra, WIDEN)
        w += BLOCK_K
        w_extra += BLOCK_K
        rows += BLOCK_K
        k += BLOCK_K
    if PARTIAL:
        out += tl.program_id(1) * M * N
    _store_tile(out, bias, first_n, total, m, M, N, x, COPIES * BLOCK_N, GATED, GELU, BLOCK_M)
    first_n += BLOCK_N
    _store_tile(out, bias, first_n, extra, m, M, N, x, COPIES * EXTRA, GATED, GELU, BLOCK_M)


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
        product = _swiglu(product, up, x.dtype.element_ty)
    if GELU:
        v = product.to(x.dtype.element_ty).to(tl.float32)
        product = 0.5 * v * (1.0 + tl.erf(v * 0.7071067811865476))
    if PARTIAL:
        out += part * M * N
    to = out + m[None, :] * N + n[:, None]
    tl.store(to, product.to(out.dtype.element_ty), mask=inside[:, None] & (m < M)[None, :])
