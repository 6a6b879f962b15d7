"""The C++ libraries: the same tokens with every instruction set, the same rows in every batch."""

from pathlib import Path

import pytest
import torch
from iris_kernels import (
    add_rms_norm,
    cpp,
    guided_sample,
    quantize_rows,
    residual_rms_norm,
    rope,
    rope_append,
    silu_mul,
    token_stats,
)
from iris_kernels._backend import direct_backend

FOLDER = Path(cpp.__file__).parent
CAPABILITIES = ("AVX2", "AVX512")


def libraries() -> dict[str, Path]:
    """Those that were compiled and that this CPU can run."""
    best = torch.backends.cpu.get_cpu_capability()
    runnable = CAPABILITIES[: CAPABILITIES.index(best) + 1] if best in CAPABILITIES else ("base",)
    found = {name: list(FOLDER.glob(f"_{name.lower()}.*")) for name in runnable}
    return {name: paths[0] for name, paths in found.items() if paths}


@pytest.fixture
def use(monkeypatch):
    """Switch to the library of an instruction set."""
    if not libraries():
        pytest.skip("the C++ kernels are not compiled")
    monkeypatch.setenv("IRIS_KERNELS_BACKEND", "cpp")

    def switch(path: Path) -> None:
        loaded = cpp._load(path)
        monkeypatch.setattr(cpp, "library", lambda: loaded)

    return switch


@pytest.mark.parametrize("V", [3, 257, 5000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_are_those_of_the_torch_path(V, dtype, use, monkeypatch):
    generator = torch.Generator().manual_seed(V)
    cond, uncond = (torch.randn(500, V, generator=generator).mul(3).to(dtype) for _ in range(2))
    uniform = torch.rand(500, generator=generator)
    settings = {"cfg_weight": 3.0, "temperature": 0.7}
    found = {}
    for name, path in libraries().items():
        use(path)
        found[name] = guided_sample(cond, uncond, uniform, **settings).token_ids
    monkeypatch.setenv("IRIS_KERNELS_BACKEND", "torch")
    expected = guided_sample(cond, uncond, uniform, **settings).token_ids
    for name, tokens in found.items():
        assert torch.equal(tokens, expected), name


@pytest.mark.parametrize("threads", [1, 2])
def test_rows_do_not_depend_on_threads_and_other_rows(threads, use):
    logits = torch.randn(64, 1000, generator=torch.Generator().manual_seed(0)) * 4
    token_ids = torch.arange(64)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for path in libraries().values():
            use(path)
            whole = token_stats(logits, token_ids)
            for row in (0, 31, 63):
                alone = token_stats(logits[row : row + 1], token_ids[row : row + 1])
                for a, b in zip(alone, whole, strict=True):
                    assert torch.equal(a, b[row : row + 1])
    finally:
        torch.set_num_threads(before)


def test_a_missing_library_is_none(monkeypatch):
    monkeypatch.setattr(cpp, "EXTENSION_SUFFIXES", [".nothing"])
    assert cpp.library.__wrapped__() is None


def numbers(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 2


def same(found, expected) -> bool:
    return torch.equal(found.nan_to_num(7e7), expected.nan_to_num(7e7))


# --- Row ops: (x, y, their place among all rows) -> results of these rows -------------------------

ROWS = 9


def norm(x, y, _):
    """Sum and norm, which are those of the norm in place."""
    weight, total = numbers(x.shape[-1]).to(x.dtype), x.detach().clone()
    out = residual_rms_norm(x, weight, eps=1e-6, delta=y)
    assert same(add_rms_norm(total, weight, eps=1e-6, delta=y.detach()), out.norm)
    assert same(total, out.total)
    return out


def rotation(x, y, rows):
    """Rotated query and key, which are those of the op with a cache."""
    half = x.shape[-1] // 2
    query, key = (t[:, None, : 2 * half] for t in (x, y))
    tables = numbers(2, ROWS, half)[:, rows]
    caches = [torch.zeros(len(x), 1, 2, 2 * half, dtype=x.dtype) for _ in range(2)]
    slots = torch.ones(len(x), dtype=torch.int32)
    out = rope(query, key, *tables)
    with torch.no_grad():
        found = rope_append(query, key, key, *tables, *caches, slots)
    assert same(found, out[0])
    assert same(caches[0][:, :, 1], out[1])
    assert same(caches[1][:, :, 1], key)
    return out


def gate(x, y, _):
    return (silu_mul(x, y),)


def results_and_gradients(op, x, y, rows=slice(None)):
    leaves = [t[rows].clone().requires_grad_() for t in (x, y)]
    out = op(*leaves, rows)
    upstream = [numbers(ROWS, *o.shape[1:], seed=5).to(o.dtype)[rows] for o in out]
    return [t.detach() for t in (*out, *torch.autograd.grad(out, leaves, upstream))]


# Widths: less than a vector, odd, several vectors, more than a thread's share of a row.
@pytest.mark.parametrize("width", [3, 37, 130, 4099])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("op", [norm, gate, rotation])
def test_row_ops_do_not_depend_on_threads_and_other_rows(op, dtype, width, use, monkeypatch):
    monkeypatch.setattr(cpp, "SERIAL_ELEMENTS", 1)
    x, y = (numbers(ROWS, width, seed=seed).to(dtype) for seed in (0, 1))
    x[3, 0] = torch.nan
    before = torch.get_num_threads()
    for path in libraries().values():
        use(path)
        try:
            torch.set_num_threads(1)
            whole = results_and_gradients(op, x, y)
            torch.set_num_threads(3)
            assert all(map(same, results_and_gradients(op, x, y), whole))
        finally:
            torch.set_num_threads(before)
        for t in whole:
            with_nan = t.isnan().flatten(1).any(1).tolist()
            assert not any(with_nan[:3] + with_nan[4:])
        assert whole[0][3].isnan().any()
        for r in range(ROWS):
            alone = results_and_gradients(op, x, y, slice(r, r + 1))
            assert all(same(a[0], t[r]) for a, t in zip(alone, whole, strict=True))


def test_the_weights_gradient_does_not_depend_on_threads(use, monkeypatch):
    x, weight = numbers(700, 70), numbers(70).requires_grad_()
    monkeypatch.setattr(cpp, "SERIAL_ELEMENTS", 1)
    before, found = torch.get_num_threads(), []
    for path in libraries().values():
        use(path)
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            try:
                out = residual_rms_norm(x, weight, eps=1e-6).norm
                found += torch.autograd.grad(out, weight, numbers(700, 70, seed=1))
            finally:
                torch.set_num_threads(before)
        assert torch.equal(found[-1], found[-2]) and torch.equal(found[-1], found[-3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fp8_rows_have_the_bits_of_the_torch_path(dtype, use, monkeypatch):
    """All exponents, ties, infinity and NaN."""
    x = torch.cat([numbers(64, 333), numbers(64, 333) * 2.0 ** torch.randint(-30, 30, (64, 333))])
    x[1] = torch.arange(333) / 16
    x[1, 0] = 448
    x[2], x[3, 5], x[4, 6], x[5, 7] = 0, torch.nan, torch.inf, -torch.inf
    x[6] *= 1e-42
    x = x.to(dtype)
    found = {}
    for name, path in libraries().items():
        use(path)
        found[name] = quantize_rows(x)
    monkeypatch.setenv("IRIS_KERNELS_BACKEND", "torch")
    expected = quantize_rows(x)
    for name, (values, scales) in found.items():
        assert torch.equal(scales.nan_to_num(-1), expected.scales.nan_to_num(-1)), name
        assert torch.equal(values.float().nan_to_num(7e7), expected.values.float().nan_to_num(7e7))


def test_what_is_written_in_place_has_a_new_version(use):
    use(next(iter(libraries().values())))
    residual, caches = numbers(2, 8), [torch.zeros(2, 1, 4, 8) for _ in range(2)]
    add_rms_norm(residual, numbers(8), eps=1e-6)
    assert residual._version == 0
    add_rms_norm(residual, numbers(8), eps=1e-6, delta=numbers(2, 8))
    heads = numbers(2, 1, 8)
    slots = torch.zeros(2, dtype=torch.int64)
    rope_append(heads, heads, heads, numbers(2, 4), numbers(2, 4), *caches, slots)
    assert all(t._version > 0 for t in (residual, *caches))
    weight = numbers(8).requires_grad_()
    saved = residual * weight  # saves the residual stream
    with torch.no_grad():
        add_rms_norm(residual, weight, eps=1e-6, delta=numbers(2, 8))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        saved.sum().backward()


def test_gradients_can_be_taken_twice(use):
    use(next(iter(libraries().values())))
    x, weight = numbers(3, 8).requires_grad_(), numbers(8).requires_grad_()
    total, out = residual_rms_norm(x, weight, eps=1e-6, delta=silu_mul(x, x * 2))
    loss = (total * out).sum()
    first = torch.autograd.grad(loss, (x, weight), retain_graph=True)
    second = torch.autograd.grad(loss, (x, weight))
    assert all(map(torch.equal, first, second))
    (gradient,) = torch.autograd.grad(silu_mul(x, x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError):  # not a wrong result
        torch.autograd.grad(gradient.sum(), x)
    # A rotation is linear in its rows, and is differentiated as often as one likes.
    y, tables = numbers(3, 2, 8).requires_grad_(), numbers(2, 3, 4)
    rotated = rope(y, y, *tables)[0]
    upstream = numbers(3, 2, 8, seed=1).requires_grad_()
    (back,) = torch.autograd.grad(rotated, y, upstream, create_graph=True)
    (forth,) = torch.autograd.grad(back, upstream, y.detach())
    torch.testing.assert_close(forth, rotated.detach())


def test_only_plain_eager_tensors_are_read_by_address():
    class Wrapped(torch.Tensor):
        pass

    plain, wrapped = numbers(2, 4), numbers(2, 4).as_subclass(Wrapped)
    assert direct_backend(plain, None, torch.nn.Parameter(plain), with_gradient=True)
    assert direct_backend(plain, wrapped) is None
    assert direct_backend(wrapped) is None
    with torch.autograd.forward_ad.dual_level():
        assert direct_backend(plain) is None
