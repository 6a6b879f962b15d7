"""linear_token_stats: head and statistics over tiles, against float64 and against its parts."""

import importlib
import math
import weakref

import pytest
import torch
from backends import without_cpp
from iris_kernels import linear_token_stats, token_stats
from iris_kernels.linear_token_stats import linear_token_stats_reference, tile_shape
from kernel_oracle import EPS, FIELDS, assert_close, rounding, upstream_gradients

ops = torch.ops.iris_kernels
module = importlib.import_module("iris_kernels.linear_token_stats.tiles")
op = importlib.import_module("iris_kernels.linear_token_stats.op")
INPUTS = ("hidden", "weight", "bias")
# name: (rows, V, D, dtype). Tiles have up to 80 elements and sums up to 64: with D = 16, 4 rows
# by 20 columns, or 20 by 4 in the loop for a half-precision weight. The interpreter takes as long
# as there are rows of tiles: few here.
REGIMES = {
    "one_tile": (3, 20, 16, torch.float32),
    "many_tiles": (5, 50, 16, torch.float32),
    "many_tiles_half": (5, 50, 16, torch.bfloat16),
    "last_tile_of_one_column": (5, 41, 16, torch.float32),
    "one_class": (3, 1, 4, torch.float32),
}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    small = {"CHUNK_ELEMENTS": 80, "TILE_ELEMENTS": 80, "SUM_ELEMENTS": 64, "MIN_TILE_SIDE": 4}
    monkeypatch.setattr(op, "KEPT_LOGITS_BYTES", 0)
    for name, value in small.items():
        monkeypatch.setattr(module, name, value)


@pytest.fixture
def tiles(monkeypatch) -> list[tuple]:
    """(function, first column, columns) of every tile, in order."""
    seen = []
    for name in ("forward_torch", "forward_triton", "backward_torch", "backward_triton"):
        function = getattr(module, name)

        def recorded(*arguments, function=function, name=name):
            columns = next(a for a in arguments if isinstance(a, module.Columns))
            seen.append((name, columns.first, columns.count))
            return function(*arguments)

        monkeypatch.setattr(module, name, recorded)
    return seen


def case(rows: int, V: int, D: int, dtype: torch.dtype, device: str, bias: bool = True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, D, generator=generator)
    weight = torch.randn(V, D, generator=generator) * 0.7
    shift = torch.randn(V, generator=generator)
    token_ids = torch.randint(V, (rows,), generator=generator).to(device)
    head = (hidden, weight, shift) if bias else (hidden, weight, None)
    return [None if t is None else t.to(device, dtype) for t in head], token_ids


def run(function, head, token_ids, gradients, dtype=None, **kwargs):
    """(statistics, gradients of hidden, weight, bias)."""
    leaves = [None if t is None else t.detach().to(dtype or t.dtype).clone() for t in head]
    wanted = [t.requires_grad_() for t in leaves if t is not None]
    hidden, weight, bias = leaves
    out = function(hidden, weight, token_ids, bias, **kwargs)
    used = [(o, g.to(o.dtype)) for o, g in zip(out, gradients, strict=True) if g is not None]
    return out, torch.autograd.grad([o for o, _ in used], wanted, [g for _, g in used])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("regime", REGIMES)
def test_budget(regime, bias, backend, device, tiles):
    rows, V, D, dtype = REGIMES[regime]
    head, token_ids = case(rows, V, D, dtype, device, bias)
    gradients = upstream_gradients((rows,), device)
    ours, mine = run(linear_token_stats, head, token_ids, gradients, temperature=0.8)
    eager, theirs = run(linear_token_stats_reference, head, token_ids, gradients, temperature=0.8)
    exact, truth = run(
        linear_token_stats_reference, head, token_ids, gradients, torch.float64, temperature=0.8
    )
    spread = float(exact.entropy.abs().amax() - exact.logprob.amin()) + math.log(V) + 1
    for name, a, b, c in zip(FIELDS, ours, eager, exact, strict=True):
        assert a.dtype == torch.float32
        assert_close(name, a, b, c, 8 * EPS * spread)
    for name, a, b, c in zip(INPUTS, mine, theirs, truth, strict=False):
        assert a.dtype == dtype
        # A gradient sums over rows or columns; every tile of logit gradients is rounded to `dtype`.
        floor = 16 * EPS * spread + 2 * rounding(dtype) * float(c.abs().amax())
        assert_close(f"gradient of {name}", a, b, c, floor)
    path = "triton" if backend == "triton" else "torch"  # of the tiles
    assert all(name.endswith(path) for name, _, _ in tiles)
    forward = {(first, count) for name, first, count in tiles if name.startswith("forward")}
    assert sum(count for _, count in forward) == V
    assert (len(forward) > 1) == ("tile" in regime and regime != "one_tile")


@pytest.mark.parametrize("frozen", [False, True])
def test_logits_that_fit_are_kept(frozen, tiles, monkeypatch):
    """On a CPU: no tile is computed, and results agree with the tiles' also for padding, masks and
    a frozen weight."""
    monkeypatch.setenv("IRIS_KERNELS_BACKEND", "torch")
    head, token_ids = case(10, 101, 16, torch.float32, "cpu")
    token_ids = token_ids.clamp(max=89)
    token_ids[3], mask = -100, torch.arange(10) != 6
    gradients, results = upstream_gradients((10,), "cpu"), []
    for kept_bytes in (10 * 90 * 4, 10 * 90 * 4 - 1):
        monkeypatch.setattr(op, "KEPT_LOGITS_BYTES", kept_bytes)
        tiles.clear()
        leaves = [t.clone().requires_grad_(i == 0 or not frozen) for i, t in enumerate(head)]
        hidden, weight, bias = leaves
        options = {"temperature": 0.7, "mask": mask, "vocab_size": 90}
        out = linear_token_stats(hidden, weight, token_ids, bias, **options)
        torch.autograd.backward(out, gradients)
        assert bool(tiles) == (kept_bytes < 10 * 90 * 4)
        results.append([*out, *(leaf.grad for leaf in leaves)])
    for kept, tiled in zip(*results, strict=True):
        assert (kept is None) == (tiled is None)
        if kept is not None:
            torch.testing.assert_close(kept, tiled, rtol=1e-4, atol=1e-5)


def test_sums_over_tiles_are_kept_in_fp32(device, monkeypatch):
    """50 tiles and 10 chunks round a half-precision gradient no more than a single one does."""
    monkeypatch.setenv("IRIS_KERNELS_BACKEND", "torch")
    head, token_ids = case(40, 1000, 16, torch.bfloat16, device)
    gradients = [g.abs() for g in upstream_gradients((40,), device)]
    _, tiled = run(linear_token_stats, head, token_ids, gradients)
    monkeypatch.undo()  # tiles of the normal size, on the same backend
    monkeypatch.setenv("IRIS_KERNELS_BACKEND", "torch")
    _, whole = run(linear_token_stats, head, token_ids, gradients)
    for name, a, b in zip(INPUTS, tiled, whole, strict=True):
        # Equal, except where a tile's fp32 logits round differently.
        assert float((a != b).double().mean()) < 0.02, name


@without_cpp
@pytest.mark.parametrize("alone", FIELDS)
def test_each_gradient_alone(alone, backend, device):
    head, token_ids = case(3, 45, 16, torch.float32, device)
    gradients = [
        g if name == alone else None
        for name, g in zip(FIELDS, upstream_gradients((3,), device), strict=True)
    ]
    _, mine = run(linear_token_stats, head, token_ids, gradients)
    _, truth = run(linear_token_stats_reference, head, token_ids, gradients, torch.float64)
    for a, b in zip(mine, truth, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=2e-5)


@without_cpp
def test_tiles_agree_with_token_stats_of_whole_logits(backend, device):
    """Also if whole tiles (of 26 columns) are -inf, huge, or hold only the token."""
    (hidden, weight, _), token_ids = case(3, 70, 8, torch.float32, device)
    for name, shift in {
        "first tiles masked": [-math.inf] * 45 + [0.0] * 25,
        "last tiles masked": [0.0] * 15 + [-math.inf] * 55,
        "all masked": [-math.inf] * 70,
        "rising": [1.5 * i for i in range(70)],
        "huge": [1e4] * 70,
    }.items():
        bias = torch.tensor(shift, device=device)
        out = linear_token_stats(hidden, weight, token_ids, bias)
        expected = token_stats(hidden @ weight.t() + bias, token_ids)
        for field, a, b in zip(FIELDS, out, expected, strict=True):
            torch.testing.assert_close(
                a, b, rtol=1e-5, atol=2e-3 if name == "huge" else 2e-5, msg=f"{name}: {field}"
            )


@without_cpp
def test_masked_classes_give_no_nan(backend, device):
    head, token_ids = case(3, 70, 8, torch.float32, device)
    head[2][:50] = -math.inf
    token_ids[:] = torch.tensor([69, 50, 3])
    _, gradients = run(linear_token_stats, head, token_ids, upstream_gradients((3,), device))
    assert all(gradient.isfinite().all() for gradient in gradients)


@without_cpp
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_frozen_parts_cost_nothing(dtype, backend, device, tiles):
    """A frozen weight costs no matrix product and no tiles."""
    (hidden, weight, bias), token_ids = case(3, 30, 16, dtype, device)
    gradients = upstream_gradients((3,), device)
    _, full = run(linear_token_stats, (hidden, weight, bias), token_ids, gradients)
    trained = sum(name.startswith("backward") for name, _, _ in tiles)
    tiles.clear()
    leaf = hidden.clone().requires_grad_()
    out = linear_token_stats(leaf, weight, token_ids, bias)
    (d_hidden,) = torch.autograd.grad(out, leaf, gradients)
    frozen = sum(name.startswith("backward") for name, _, _ in tiles)
    assert torch.equal(d_hidden, full[0])
    assert frozen == trained if dtype == torch.float32 else frozen < trained
    leaf = weight.clone().requires_grad_()
    out = linear_token_stats(hidden, leaf, token_ids, bias)
    (d_weight,) = torch.autograd.grad(out, leaf, gradients)
    assert torch.equal(d_weight, full[1])


def test_frozen_weight_costs_no_product(device, monkeypatch):
    monkeypatch.setenv("IRIS_KERNELS_BACKEND", "torch")
    (hidden, weight, _), token_ids = case(20, 100, 16, torch.float32, device, bias=False)
    shapes = []
    add_matmul = module.add_matmul
    monkeypatch.setattr(
        module, "add_matmul", lambda t, a, b: (shapes.append(t.shape), add_matmul(t, a, b))
    )
    leaf = hidden.requires_grad_()
    linear_token_stats(leaf, weight, token_ids).logprob.sum().backward()
    assert {shape[0] for shape in shapes} <= set(range(1, 21))
    assert weight.grad is None


@without_cpp
def test_dropped_rows(backend, device):
    head, token_ids = case(8, 15, 8, torch.float32, device)
    mask = torch.tensor([True, False] * 4, device=device)
    kept = [head[0][mask], head[1], head[2]]
    head[0][~mask] = math.nan
    token_ids[1], token_ids[3] = -100, 10**6
    gradients = upstream_gradients((8,), device)
    out, mine = run(linear_token_stats, head, token_ids, gradients, mask=mask)
    expected, theirs = run(linear_token_stats, kept, token_ids[mask], [g[mask] for g in gradients])
    for a, b in zip(out, expected, strict=True):
        assert (a[~mask] == 0).all()
        torch.testing.assert_close(a[mask], b, rtol=1e-5, atol=1e-5)
    assert (mine[0][~mask] == 0).all()
    torch.testing.assert_close(mine[0][mask], theirs[0], rtol=1e-4, atol=1e-5)


@without_cpp
def test_dropped_rows_contribute_nothing_to_weight_and_bias(backend, device):
    """As without these rows (finite ones: 0 * NaN is NaN in any product)."""
    head, token_ids = case(8, 15, 8, torch.float32, device)
    mask = torch.tensor([True, False] * 4, device=device)
    gradients = upstream_gradients((8,), device)
    _, mine = run(linear_token_stats, head, token_ids, gradients, mask=mask)
    kept = [head[0][mask], head[1], head[2]]
    _, theirs = run(linear_token_stats, kept, token_ids[mask], [g[mask] for g in gradients])
    for a, b in zip(mine[1:], theirs[1:], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@without_cpp
def test_vocab_size(backend, device):
    """Classes from vocab_size on are padding; their rows of the weight get gradient 0."""
    (hidden, weight, bias), token_ids = case(3, 60, 8, torch.float32, device)
    token_ids.remainder_(43)
    padded = [hidden, weight.clone(), bias.clone()]
    padded[1][43:], padded[2][43:] = math.nan, math.nan
    gradients = upstream_gradients((3,), device)
    out, mine = run(linear_token_stats, padded, token_ids, gradients, vocab_size=43)
    expected, theirs = run(
        linear_token_stats, [hidden, weight[:43], bias[:43]], token_ids, gradients
    )
    assert all(torch.equal(a, b) for a, b in zip(out, expected, strict=True))
    for name, a, b in zip(INPUTS, mine, theirs, strict=True):
        assert torch.equal(a[: len(b)], b), name
        assert (a[len(b) :] == 0).all(), name


@without_cpp
def test_leading_dimensions_and_strides(backend, device):
    (hidden, weight, bias), token_ids = case(6, 20, 8, torch.float32, device)
    flat = linear_token_stats(hidden, weight, token_ids, bias)
    folded = hidden.view(2, 3, 8).transpose(0, 1)
    out = linear_token_stats(folded, weight, token_ids.view(2, 3).t(), bias)
    for a, b in zip(out, flat, strict=True):
        assert a.shape == (3, 2)
        torch.testing.assert_close(a.t().reshape(-1), b)


@without_cpp
def test_no_rows(backend, device):
    leaf = torch.empty(0, 8, device=device, requires_grad=True)
    weight = torch.randn(5, 8, device=device, requires_grad=True)
    out = linear_token_stats(leaf, weight, torch.empty(0, dtype=torch.long, device=device))
    out.nsc.sum().backward()
    assert leaf.grad.shape == (0, 8) and (weight.grad == 0).all()


@without_cpp
def test_autocast_is_that_of_linear(backend, device):
    """Inputs are cast as for a linear layer; the logits still have float32 precision."""
    head, token_ids = case(3, 30, 16, torch.float32, device)
    half = [t.bfloat16() for t in head]
    expected = linear_token_stats(half[0], half[1], token_ids, half[2])
    with torch.autocast(device, torch.bfloat16):
        out, gradients = run(linear_token_stats, head, token_ids, upstream_gradients((3,), device))
    for a, b in zip(out, expected, strict=True):
        assert torch.equal(a, b)
    assert all(gradient.dtype == torch.float32 for gradient in gradients)


def test_gradcheck(monkeypatch):
    monkeypatch.setenv("IRIS_KERNELS_BACKEND", "torch")
    (hidden, weight, bias), _ = case(3, 7, 4, torch.float64, "cpu")
    token_ids = torch.tensor([2, -100, 6])
    leaves = [t.requires_grad_() for t in (hidden, weight, bias)]

    def function(hidden, weight, bias):
        return tuple(linear_token_stats(hidden, weight, token_ids, bias, temperature=0.8))

    assert torch.autograd.gradcheck(function, leaves)


@without_cpp
def test_opcheck(backend, device):
    (hidden, weight, bias), token_ids = case(2, 20, 8, torch.float32, device)
    T = torch.tensor(0.7)
    for leaf in (weight, weight.clone().requires_grad_()):
        arguments = (hidden, leaf, bias, token_ids, None, T, 20)
        torch.library.opcheck(ops.linear_token_stats.default, arguments)
    saved = [torch.rand(2, device=device) + 1 for _ in range(3)]
    upstream = upstream_gradients((2,), device)
    torch.library.opcheck(
        ops.linear_token_stats_backward.default,
        (hidden, weight, None, token_ids, None, T, 20, *saved, *upstream, [True, False, False]),
    )


@without_cpp
def test_fullgraph_and_run_time_temperature(backend, device):
    (hidden, weight, bias), token_ids = case(3, 30, 8, torch.float32, device)

    def loss(hidden, weight, temperature):
        out = linear_token_stats(hidden * 2, weight, token_ids, bias, temperature=temperature)
        return (out.logprob + out.nsc * out.entropy - out.lse).sum()

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for temperature in (1.1, 0.8, 2.0):
        found = []
        for function in (compiled, loss):
            leaves = [t.clone().requires_grad_() for t in (hidden, weight)]
            function(*leaves, temperature).backward()
            found.append([leaf.grad for leaf in leaves])
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


@pytest.mark.parametrize("R", [1, 4608, 36864, 10**6])
@pytest.mark.parametrize(
    ("V", "D"), [(16384, 2048), (102400, 2048), (102400, 4096), (151936, 8192), (32, 64)]
)
def test_tiles_stay_under_64_mb(R, V, D, monkeypatch):
    """On a GPU: fp32 tile, its half-precision gradient, the fp32 sum over tiles, its summand."""
    monkeypatch.undo()
    for sum_columns in (False, True):
        C, B = tile_shape(R, V, D, on_cpu=False, sum_columns=sum_columns)
        assert 1 <= C <= R and 1 <= B <= V
        held = C * B * (4 + 2) + (B if sum_columns else C) * D * (4 + 4)
        assert held <= 64e6, (C, B)
        assert R < 1024 or V < 1024 or (C >= 512 and B >= 512), "tiles too thin for the product"


def test_one_sum_over_tiles_is_held_at_a_time(device, monkeypatch):
    """For a trained half-precision head: that of a block of rows of hidden, or of weight. The last
    of the former is freed before the first of the latter is allocated."""
    make_sum, make_tile, sums, held = module._accumulator, module._gradient_tile, [], []

    def summing(gradient, full_precision):
        made = make_sum(gradient, full_precision)
        sums.append(weakref.ref(made))
        return made

    def tiling(*arguments):
        held.append(sum(made() is not None for made in sums))
        return make_tile(*arguments)

    monkeypatch.setattr(module, "_accumulator", summing)
    monkeypatch.setattr(module, "_gradient_tile", tiling)
    head, token_ids = case(20, 300, 16, torch.bfloat16, device)
    run(linear_token_stats, head, token_ids, upstream_gradients((20,), device))
    assert len(sums) > 2 and set(held) == {1}


@pytest.mark.gpu
def test_products_are_added_without_a_temporary():
    torch.use_deterministic_algorithms(False)
    a, b = (torch.randn(2048, 2048, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    total = torch.randn(2048, 2048, device="cuda")
    expected = total.double() + a.double() @ b.double()
    module.add_matmul(torch.zeros_like(total), a, b)  # the library's workspace
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    module.add_matmul(total, a, b)
    assert torch.cuda.max_memory_allocated() - before < total.nbytes
    torch.testing.assert_close(total.double(), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("trained", [True, False])
def test_memory(trained, monkeypatch):
    monkeypatch.undo()
    torch.use_deterministic_algorithms(False)
    hidden = torch.randn(36864, 2048, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(102400, 2048, device="cuda", dtype=torch.bfloat16, requires_grad=trained)
    token_ids = torch.randint(102400, (36864,), device="cuda")
    gradients = (hidden.nbytes + weight.nbytes * trained) + 40 * 36864
    linear_token_stats(hidden[:8], weight, token_ids[:8]).nsc.sum().backward()
    hidden.grad = weight.grad = None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = linear_token_stats(hidden, weight, token_ids)
    (out.logprob + out.nsc).sum().backward()
    assert torch.cuda.max_memory_allocated() - before - gradients <= 64e6


HIDDEN, WEIGHT, IDS = torch.zeros(2, 4), torch.zeros(3, 4), torch.zeros(2, dtype=torch.long)
WRONG_ARGUMENTS = {
    r"weight has shape \(0, 4\)": (
        (torch.zeros(2, 4), torch.zeros(0, 4), torch.zeros(2).long()),
        {},
    ),
    r"weight has shape \(5, 0\)": (
        (torch.zeros(2, 0), torch.zeros(5, 0), torch.zeros(2).long()),
        {},
    ),
    "hidden has dtype torch.int64": ((HIDDEN.long(), WEIGHT, IDS), {}),
    "weight has dtype torch.bfloat16 but hidden": ((HIDDEN, WEIGHT.bfloat16(), IDS), {}),
    r"weight has shape \(3, 5\)": ((HIDDEN, torch.zeros(3, 5), IDS), {}),
    r"bias has shape \(4,\)": ((HIDDEN, WEIGHT, IDS, torch.zeros(4)), {}),
    r"token_ids has shape \(3,\)": ((HIDDEN, WEIGHT, torch.zeros(3).long()), {}),
    "token_ids holds 3": ((HIDDEN, WEIGHT, IDS + 3), {}),
    "temperature is -1": ((HIDDEN, WEIGHT, IDS), {"temperature": -1}),
    "vocab_size is 4": ((HIDDEN, WEIGHT, IDS), {"vocab_size": 4}),
}


@pytest.mark.parametrize("message", WRONG_ARGUMENTS)
def test_wrong_arguments_are_named(message):
    positional, keywords = WRONG_ARGUMENTS[message]
    with pytest.raises(ValueError, match=message):
        linear_token_stats(*positional, **keywords)


@pytest.mark.parametrize("kept", [0, op.KEPT_LOGITS_BYTES], ids=["tiles", "kept_logits"])
def test_a_graph_that_is_kept_gives_each_gradient(kept, monkeypatch):
    monkeypatch.setattr(op, "KEPT_LOGITS_BYTES", kept)
    (hidden, weight, _), token_ids = case(5, 33, 8, torch.float32, "cpu", bias=False)
    hidden.requires_grad_()
    out = linear_token_stats(hidden, weight, token_ids)
    wanted = linear_token_stats_reference(hidden, weight, token_ids)
    for name in FIELDS:
        (found,) = torch.autograd.grad(getattr(out, name).sum(), hidden, retain_graph=True)
        (grad,) = torch.autograd.grad(getattr(wanted, name).sum(), hidden, retain_graph=True)
        torch.testing.assert_close(found, grad, rtol=1e-4, atol=1e-5)
