"""Matrix products of a decoding step: few rows, so that the time is that of reading the weight.

    out = x @ weight.T + bias
    out = silu(gate) * up                  (gate, up) = x @ weight.T, `gated`
    out = gelu(x @ weight.T + bias)        gelu(v) = v (1 + erf(v / sqrt(2))) / 2, `gelu`
    partial_s = x[:, part s] @ weight[:, part s].T, whose sum over s is x @ weight.T

The weight is read once. It is the left operand of the tensor cores' product, whose right operand
may be as narrow as 16 columns; these are the rows of x. Where N is small, K is divided over
programs (split-K) to occupy the GPU, and whoever reads the result adds the partial sums in their
order: `add_rms_norm` does. There are no atomics. For a K that 16 does not divide, every element is
loaded by itself: torch's product is faster.

Sums are fp32. Gate and up are rounded to the dtype of x, and silu(gate) and the input of gelu as
well, as by separate operations. How K is divided depends on N and K and not on M, so every row adds
the same products in the same order, whatever the other rows; that the tensor cores add the products
of one instruction in an order that does not depend on its width is not documented by the vendor.

Bytes moved for b-byte elements: b (N K + M K + M N) (gated: N/2 in the last term), partial sums
b (N K + M K) + 4 S M N. x comes from the L2 cache once per tile of columns, which are therefore
wider for more rows (`block_columns`). A second tile of rows would read the weight from there again:
with 256 rows, three times the weight's bytes, more than memory delivers in the time. 128 rows are
the maximum.

Shapes: x (M, K), weight (N, K), S partial sums.
"""

import torch
from torch import Tensor

from ._backend import calls_directly, interpreted, triton, uses_triton
from ._linear_kernels import _linear_kernel, _uneven_linear_kernel
from ._ops import add_op_namespace_prefix
from ._overlap import LINE_BYTES, architecture, overlap_options, prefetched_lines

MAX_ROWS = 128  # of the Triton path: one program holds all rows
DTYPES = (torch.bfloat16, torch.float16)
BLOCK_N, BLOCK_K = 64, 64  # columns of the narrowest tile; gated: gates, and as many ups
WIDE_ROWS = 64  # from here on tiles may be wider: each one reads all rows from the L2 cache again
WIDEST = 256  # columns of a tile, gates and ups together
UNEVEN = 128, 32  # the same of a tile in two parts, where 128 are too few and 256 too many
# Architectures whose tensor cores read operands from shared memory. The others' registers hold them
# and have no room for the sums of the widest tiles.
FROM_SHARED_MEMORY = range(90, 120)
PROGRAMS = 132  # multiprocessors of an H100 or H200
MAX_PARTS = 6  # of K: every part costs 4 M N bytes written and read
# Of the weight, by all programs together: what memory delivers in 1 us, about its latency.
IN_FLIGHT_BYTES = 4 << 20
STAGES = (3, 6)  # of the pipeline, all but one of which are in flight
SHARED_BYTES = 160 << 10  # one program of attention still fits next to it on sm_90
SMALL_SHARED_BYTES, SMALL = 96 << 10, (86, 89, 120, 121)  # architectures that have less
OPERATIONS_PER_BYTE = 144  # of an H200: 790 TFLOP/s by 5.5 TB/s from the L2 cache


# --- Launcher -------------------------------------------------------------------------------------


def parts_of(N: int, K: int) -> tuple[int, int]:
    """How many partial sums `decode_linear_partials` returns, and the columns of each one.

    Of the numbers the one with which MAX_ROWS rows are done first, the partial sums read included.
    """
    tiles = -(-K // BLOCK_K)

    def time(parts: int) -> float:
        per_part = -(-tiles // parts)
        uneven = parts * per_part / tiles
        partial_sums = 2 * parts * MAX_ROWS / K  # written, and once more read
        shortest = min(
            _time(MAX_ROWS, N, parts, columns, 1, partial_sums, uneven)
            for columns in (2 * BLOCK_N, sum(UNEVEN), WIDEST)
        )
        return shortest + partial_sums

    parts = min(range(1, min(MAX_PARTS, tiles) + 1), key=time)
    tiles_per_part = -(-tiles // parts)
    return -(-tiles // tiles_per_part), tiles_per_part * BLOCK_K


def _time(
    rows: int, N: int, parts: int, columns: int, weights: int, results: float = 0.0,
    uneven: float = 1.0,
) -> float:  # fmt: skip
    """Of a product, in units of the time that the weight takes from the L2 cache.

    That, the rows, once per tile of columns, and the results pass the L2 cache in
    1 + rows / columns + results; the tensor cores take rows / OPERATIONS_PER_BYTE if all are in
    use, and more if programs do not come out even on the multiprocessors.
    """
    programs = -(-N // columns) * parts
    busiest = -(-programs // PROGRAMS) * PROGRAMS / programs
    l2 = 1 + rows / (weights * columns) + results
    return max(l2, uneven * busiest * rows / OPERATIONS_PER_BYTE)


def block_columns(block_m: int, N: int, K: int, parts: int, gated: bool) -> int:
    """Columns of a program's tile: of the choices the one that is done first, the widest if equal.

    Of the widest two, one is no power of two: those of UNEVEN, gates and ups together.
    """
    weights = 2 if gated else 1
    # Partial sums have 4 bytes; a single part is taken for one in the dtype of x.
    results = (2 * parts if parts > 1 else 1 / weights) * block_m / K
    choices = [BLOCK_N]
    if block_m >= WIDE_ROWS and not gated:
        choices.append(2 * BLOCK_N)
    if block_m >= MAX_ROWS and architecture() in FROM_SHARED_MEMORY:
        choices += [sum(UNEVEN) // weights, WIDEST // weights]

    def time(columns: int) -> float:
        return _time(block_m, N, parts, columns, weights, results)

    return min(reversed(choices), key=time)


def linear_launch(M: int, N: int, K: int, parts: int, gated: bool) -> dict[str, int | bool | None]:
    """Tile sizes, and as many pipeline stages as memory needs and fit, for 2-byte elements."""
    block_m = max(16, triton.next_power_of_2(M))
    columns = block_columns(block_m, N, K, parts, gated)
    weights = 2 if gated else 1
    weight_rows = weights * columns
    block_n = UNEVEN[0] // weights if weight_rows == sum(UNEVEN) else columns
    tile_bytes = 2 * BLOCK_K * weight_rows
    wanted = 1 + -(-IN_FLIGHT_BYTES // (-(-N // columns) * parts * tile_bytes))
    stages = min(max(wanted, STAGES[0]), STAGES[1])
    warps = 8 if block_m >= WIDE_ROWS else 4
    sums = block_m * weight_rows // (32 * warps)  # per thread
    shared = SMALL_SHARED_BYTES if architecture() in SMALL else SHARED_BYTES
    return {
        "BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": BLOCK_K,
        **({"EXTRA": columns - block_n} if columns > block_n else {}),
        "num_stages": min(stages, shared // (tile_bytes + 2 * BLOCK_K * block_m)),
        "num_warps": warps, "maxnreg": max_registers(sums, gated), "enable_fp_fusion": True,
    }  # fmt: skip


def max_registers(sums: int, gated: bool) -> int:
    """Of a thread that holds so many sums; what it does not take is left to the next kernel.

    The compiler's own choice spills on sm_80.
    """
    if architecture() not in FROM_SHARED_MEMORY:
        return 192
    return 96 if sums <= 32 else 128 if sums <= (64 if gated else 80) else 208


def linear_triton(
    x: Tensor, weight: Tensor, bias: Tensor | None, gated: bool, partial: bool, gelu: bool = False
) -> Tensor:
    """One launch, one program per tile of columns and part of K."""
    (M, K), N = x.shape, weight.shape[0] // (2 if gated else 1)
    parts, part_k = parts_of(N, K) if partial else (1, -(-K // BLOCK_K) * BLOCK_K)
    out = x.new_empty(parts, M, N, dtype=torch.float32) if partial else x.new_empty(M, N)
    options = linear_launch(M, N, K, parts, gated)
    columns = options["BLOCK_N"] + options.get("EXTRA", 0)
    kernel = _uneven_linear_kernel if "EXTRA" in options else _linear_kernel
    kernel[(-(-N // columns), parts)](
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
        x: (M, K) bfloat16 or float16, contiguous, M up to 128; on a GPU slow unless 16 divides K.
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
