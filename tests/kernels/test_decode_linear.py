"""decode_linear: products of few rows, gated, and as partial sums for add_rms_norm."""

import math
import sys

import pytest
import torch
from backends import without_cpp
from iris_kernels import add_rms_norm, decode_linear, decode_linear_partials
from iris_kernels._overlap import PREFETCH_BYTES, prefetched_lines
from iris_kernels.decode_linear import (
    BLOCK_K,
    BLOCK_N,
    UNEVEN,
    WIDEST,
    decode_linear_reference,
    parts_of,
)
from kernel_oracle import EPS, assert_close, rounding

module = sys.modules["iris_kernels.decode_linear"]  # the name in the package is the function
ops = torch.ops.iris_kernels

# name: (M, N, K, dtype)
REGIMES = {
    "one_row": (1, 2 * BLOCK_N, 2 * BLOCK_K, torch.bfloat16),
    "rows_not_a_power_of_two": (19, 2 * BLOCK_N, BLOCK_K, torch.bfloat16),
    "tile_of_64_rows": (64, 3 * BLOCK_N, 2 * BLOCK_K, torch.bfloat16),
    "more_rows_than_64": (65, 3 * BLOCK_N + 8, 2 * BLOCK_K, torch.bfloat16),
    "rows_of_a_prime_count": (101, BLOCK_N, 3 * BLOCK_K, torch.float16),
    "most_rows": (128, 3 * BLOCK_N, BLOCK_K, torch.float16),
    "ragged_columns": (3, BLOCK_N + 6, 2 * BLOCK_K, torch.float16),
    "ragged_k": (2, BLOCK_N, 3 * BLOCK_K + 8, torch.bfloat16),
    "smaller_than_a_tile": (2, 6, 20, torch.bfloat16),
}


def make_inputs(M, N, K, dtype, device, seed=0):
    """x, weight and bias; what is read beyond them would be NaN."""
    generator = torch.Generator().manual_seed(seed)
    held = []
    for shape in ((M, K), (N, K), (N,)):
        size = math.prod(shape)
        memory = torch.full((size + 4096,), math.nan, device=device, dtype=dtype)
        memory[:size] = torch.randn(size, generator=generator).to(device, dtype)
        held.append(memory[:size].view(shape))
    return held


def budget(truth, K, dtype):
    """fp32 sums of K products, and roundings to the dtype."""
    return (math.sqrt(K) * 4 * EPS + 3 * rounding(dtype)) * float(truth.abs().max())


@without_cpp
@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("kind", ["plain", "bias", "gated", "gelu"])
def test_budget(regime, kind, backend, device):
    M, N, K, dtype = REGIMES[regime]
    x, weight, bias = make_inputs(M, N, K, dtype, device)
    arguments = (bias if kind in ("bias", "gelu") else None, kind == "gated", kind == "gelu")
    out = decode_linear(x, weight, arguments[0], gated=arguments[1], gelu=arguments[2])
    assert out.dtype == dtype and out.shape == (M, N // 2 if kind == "gated" else N)
    wide = [None if t is None else t.double() for t in (x, weight, arguments[0])]
    truth = decode_linear_reference(*wide, *arguments[1:])
    eager = decode_linear_reference(x, weight, *arguments)
    assert_close("product", out, eager, truth, budget(truth, K, dtype))


@without_cpp
@pytest.mark.parametrize("regime", REGIMES)
def test_partial_sums(regime, backend, device):
    M, N, K, dtype = REGIMES[regime]
    x, weight, _ = make_inputs(M, N, K, dtype, device)
    parts = decode_linear_partials(x, weight)
    count, width = parts_of(N, K)
    assert parts.shape == (count, M, N) and parts.dtype == torch.float32
    assert (count - 1) * width < K <= count * width
    pairs = zip(x.double().split(width, 1), weight.double().split(width, 1), strict=True)
    truth = torch.stack([rows @ columns.t() for rows, columns in pairs])
    # Tensor cores truncate sums of a few hundred products.
    torch.testing.assert_close(parts.double(), truth, rtol=1e-5, atol=2e-4)


@without_cpp
@pytest.mark.parametrize("kind", ["plain", "gated", "partial"])
def test_the_widest_tiles(kind, backend, device, monkeypatch):
    """Of sm_90, in the interpreter as well: more than one of them, the last one ragged."""
    monkeypatch.setattr(module, "architecture", lambda: 90)
    monkeypatch.setattr(module, "PROGRAMS", 2)
    N = WIDEST + BLOCK_N + 2
    x, weight, _ = make_inputs(100, N, 3 * BLOCK_K, torch.bfloat16, device)
    if kind == "partial":
        found = decode_linear_partials(x, weight).sum(0)
    else:
        found = decode_linear(x, weight, gated=kind == "gated")
    truth = decode_linear_reference(x.double(), weight.double(), gated=kind == "gated")
    options = module.linear_launch(100, N, 3 * BLOCK_K, 1, kind == "gated")
    assert options["BLOCK_N"] == (WIDEST // 2 if kind == "gated" else WIDEST)
    limit = budget(truth, 3 * BLOCK_K, torch.bfloat16)
    torch.testing.assert_close(found.double(), truth, rtol=0, atol=limit)


@without_cpp
@pytest.mark.parametrize("kind", ["plain", "bias", "gelu", "gated", "partial", "ragged k"])
def test_tiles_in_two_parts(kind, backend, device, monkeypatch):
    """Where 160 columns are better than 128 and 256; the last tiles are ragged."""
    monkeypatch.setattr(module, "architecture", lambda: 90)
    monkeypatch.setattr(module, "block_columns", lambda *a: sum(UNEVEN) // (2 if a[-1] else 1))
    gated, gelu = kind == "gated", kind == "gelu"
    N, K = sum(UNEVEN) + UNEVEN[0] + 10, 2 * BLOCK_K + (8 if kind == "ragged k" else 0)
    x, weight, bias = make_inputs(100, N, K, torch.bfloat16, device)
    bias = bias if kind in ("bias", "gelu") else None
    if kind == "partial":
        found = decode_linear_partials(x, weight).sum(0)
    else:
        found = decode_linear(x, weight, bias, gated=gated, gelu=gelu)
    wide = [None if t is None else t.double() for t in (x, weight, bias)]
    truth = decode_linear_reference(*wide, gated, gelu)
    limit = budget(truth, K, torch.bfloat16)
    torch.testing.assert_close(found.double(), truth, rtol=0, atol=limit)


# Rows, N, K, parts, gated of 1B and 7B on an H200: columns of a tile.
TILES = {
    (16, 6144, 2048, 1, False): 64,
    (64, 6144, 2048, 1, False): 128,
    (64, 11264 // 2, 2048, 1, True): 64,
    (128, 6144, 2048, 1, False): 128,  # 24 wider tiles would leave most multiprocessors idle
    (128, 2048, 2048, 4, False): 160,
    (128, 2048, 5632, 5, False): 160,
    (128, 11264 // 2, 2048, 1, True): 80,
    (128, 16384, 2048, 1, False): 256,
    (128, 4096, 4096, 4, False): 256,
    (128, 4096, 11008, 5, False): 256,
    (128, 12288, 4096, 1, False): 160,
    (128, 22016 // 2, 4096, 1, True): 128,
}


@pytest.mark.parametrize("case", TILES)
def test_tiles_of_real_sizes(case, monkeypatch):
    """They fit the shared memory and the registers of one multiprocessor."""
    monkeypatch.setattr(module, "architecture", lambda: 90)
    M, N, K, parts, gated = case
    options = module.linear_launch(M, N, K, parts, gated)
    columns = options["BLOCK_N"] + options.get("EXTRA", 0)
    assert columns == TILES[case]
    columns *= 2 if gated else 1
    stage = 2 * BLOCK_K * (columns + options["BLOCK_M"])
    assert 3 <= options["num_stages"] <= 6
    assert options["num_stages"] * stage <= 160 << 10
    assert options["maxnreg"] * 32 * options["num_warps"] <= 65536


def test_the_number_of_parts_occupies_the_gpu_and_ignores_the_rows():
    """Of 1B and 7B: the output projection and the MLP's last product; the image head is wide
    enough."""
    assert parts_of(2048, 2048) == (4, 512)
    assert parts_of(2048, 5632) == (5, 18 * 64)
    assert parts_of(4096, 4096) == (4, 16 * 64)
    assert parts_of(4096, 11008) == (5, 35 * 64)
    assert parts_of(16384, 2048)[0] == 1


@pytest.mark.parametrize(("N", "K"), [(6144, 2048), (2048, 5632), (102400, 2048), (64, 64)])
def test_what_is_prefetched(N, K):
    """Between the bound and twice the bound, but more than half of a small weight, and no more than
    the weight."""
    parts, part_k = parts_of(N, K)
    fetched = 128 * prefetched_lines(N, parts, part_k) * N * parts
    assert fetched < max(2 * PREFETCH_BYTES, 2 * 128 * N * parts)
    assert min(PREFETCH_BYTES, N * K) <= fetched <= 2 * N * K


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_norm_adds_partial_sums_as_it_adds_the_product(dtype, backend, device):
    """The sum of the parts is rounded to the stream's dtype before it is added."""
    x, weight, norm = make_inputs(3, 96, 3 * BLOCK_K, dtype, device)
    stream = make_inputs(3, 96, 8, dtype, device, seed=2)[0].repeat(1, 12).contiguous()
    others = [stream.clone(), stream.clone()]
    parts = decode_linear_partials(x, weight)
    assert len(parts) == 3
    out = add_rms_norm(others[0], norm, eps=1e-5, delta=parts)
    product = ((parts[0] + parts[1]) + parts[2]).to(dtype)
    expected = add_rms_norm(others[1], norm, eps=1e-5, delta=product)
    if device == "cuda" or backend == "torch":  # the interpreter truncates where torch rounds
        assert torch.equal(others[0], others[1]) and torch.equal(out, expected)
    step = 2 * rounding(dtype)
    torch.testing.assert_close(others[0], others[1], rtol=step, atol=step)
    torch.testing.assert_close(out, expected, rtol=2 * step, atol=2 * step)


@without_cpp
@pytest.mark.parametrize("kind", ["plain", "gated", "partial"])
def test_a_row_does_not_depend_on_the_other_rows(kind, backend, device):
    x, weight, _ = make_inputs(40, 2 * BLOCK_N, 5 * BLOCK_K, torch.bfloat16, device)

    def multiply(rows):
        if kind == "partial":
            return decode_linear_partials(rows, weight).movedim(1, 0)
        return decode_linear(rows, weight, gated=kind == "gated")

    together = multiply(x)
    for b in (0, 17, 39):
        alone = multiply(x[b : b + 1].contiguous())
        if backend == "triton" and device == "cuda":  # numpy's product depends on its shape
            assert torch.equal(alone[0], together[b])
        torch.testing.assert_close(alone[0], together[b], rtol=2e-2, atol=1e-4)


@without_cpp
def test_nan_stays_in_its_row(backend, device):
    x, weight, _ = make_inputs(4, BLOCK_N, BLOCK_K, torch.bfloat16, device)
    x[2, 5] = math.nan
    assert decode_linear(x, weight).isnan().any(1).tolist() == [False, False, True, False]


@without_cpp
def test_opcheck_and_fullgraph(backend, device):
    x, weight, bias = make_inputs(3, 32, 64, torch.bfloat16, device)
    flags = (
        (False, False, False),
        (True, False, False),
        (False, True, False),
        (False, False, True),
    )
    for arguments in ((None if any(f[:2]) else bias, *f) for f in flags):
        torch.library.opcheck(ops.decode_linear.default, (x, weight, *arguments))
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x: decode_linear(x * 2, weight, bias) + 1, fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(compiled(x), decode_linear(x * 2, weight, bias) + 1)


@without_cpp
def test_no_rows(backend, device):
    x, weight, _ = make_inputs(0, 32, 64, torch.bfloat16, device)
    assert decode_linear(x, weight).shape == (0, 32)
    assert decode_linear(x, weight, gated=True).shape == (0, 16)
    assert decode_linear_partials(x, weight).shape == (1, 0, 32)


X, W = torch.zeros(2, 16, dtype=torch.bfloat16), torch.zeros(6, 16, dtype=torch.bfloat16)
WRONG_ARGUMENTS = {
    r"x has shape \(2, 16\), dtype torch.float32": ((X.float(), W), {}),
    r"x has shape \(129, 16\)": ((X[:1].repeat(129, 1), W), {}),
    r"x has shape \(2, 8\).*strides \(16, 2\)": ((X[:, ::2], W), {}),
    r"weight is torch.float16": ((X, W.half()), {}),
    r"weight is torch.bfloat16 of shape \(6, 8\)": ((X, W[:, :8]), {}),
    r"weight is torch.bfloat16 of shape \(0, 16\)": ((X, W[:0]), {}),
    r"bias is torch.bfloat16 of shape \(5,\)": ((X, W, W[0, :5]), {}),
    r"gated with weight of shape \(5, 16\)": ((X, W[:5]), {"gated": True}),
    r"gated with .* bias \(6,\)": ((X, W, W[0, :6]), {"gated": True}),
    r"gated and gelu are both True": ((X, W), {"gated": True, "gelu": True}),
}


@pytest.mark.parametrize("message", WRONG_ARGUMENTS)
def test_wrong_arguments_are_named(message):
    positional, keywords = WRONG_ARGUMENTS[message]
    with pytest.raises(ValueError, match=message):
        decode_linear(*positional, **keywords)


@pytest.mark.gpu
@pytest.mark.parametrize("M", [1, 2, 16, 17, 64, 65, 128])
@pytest.mark.parametrize(
    ("N", "K"), [(6144, 2048), (2048, 2048), (11264, 2048), (2048, 5632), (4096, 11008)]
)
def test_real_sizes(M, N, K, monkeypatch):
    monkeypatch.setenv("IRIS_KERNELS_BACKEND", "triton")
    x, weight, _ = make_inputs(M, N, K, torch.bfloat16, "cuda")
    truth = x.double() @ weight.double().t()
    parts = decode_linear_partials(x, weight)
    torch.testing.assert_close(parts.sum(0).double(), truth, rtol=1e-3, atol=1e-2)
    out = decode_linear(x, weight)
    torch.testing.assert_close(out.double(), truth, rtol=5e-3, atol=2e-2)
    gated = decode_linear(x, weight, gated=True)
    expected = decode_linear_reference(x.double(), weight.double(), gated=True)
    torch.testing.assert_close(gated.double(), expected, rtol=2e-2, atol=5e-2 * K**0.5)


@pytest.mark.gpu
def test_a_replayed_graph_of_overlapping_kernels_waits_for_what_it_reads(monkeypatch):
    """A chain of launches, each of which reads what the previous one wrote, many times."""
    monkeypatch.setenv("IRIS_KERNELS_BACKEND", "triton")
    torch.use_deterministic_algorithms(False)
    x, weight, norm = make_inputs(64, 2048, 2048, torch.bfloat16, "cuda")
    stream, first = x.clone(), x.clone()

    def chain():
        stream.copy_(first)
        out = stream
        for _ in range(20):
            out = add_rms_norm(stream, norm, eps=1e-6, delta=decode_linear_partials(out, weight))
        return out

    expected = chain().clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = chain()
    for _ in range(50):
        graph.replay()
        assert torch.equal(out, expected)
