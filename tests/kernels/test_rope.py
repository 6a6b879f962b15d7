"""rope: rotation of query and key rows against complex numbers, and its gradients."""

import math

import pytest
import torch
from iris_kernels import rope
from iris_kernels.rope_append import rope_append_reference
from kernel_oracle import EPS, assert_close, assert_gradients_within_budget, gradients, rounding

ops = torch.ops.iris_kernels

# name: (T, H, Hkv, Dh, dtype). A program takes up to 16 heads of one row.
REGIMES = {
    "janus_1b": (2, 16, 16, 128, torch.bfloat16),
    "two_programs_of_heads": (2, 32, 32, 64, torch.float32),
    "fewer_key_heads": (2, 18, 3, 16, torch.float32),
    "one_head": (3, 1, 1, 32, torch.float16),
    "width_not_a_power_of_two": (2, 2, 2, 80, torch.float32),
    "odd_half": (3, 3, 2, 22, torch.bfloat16),
    "two_channels": (2, 4, 2, 2, torch.float32),
}


def case(T, H, Hkv, Dh, dtype, device, seed=0):
    """query, key, cos, sin."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randn(T, heads, Dh, generator=generator) for heads in (H, Hkv)]
    angles = torch.rand(T, Dh // 2, generator=generator) * 600
    return [t.to(device, dtype) for t in rows] + [
        t.to(device) for t in (angles.cos(), angles.sin())
    ]


def reference(query, key, cos, sin):
    """In the dtype of the rows, the angles too in float64; rounded once."""
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    return tuple(
        rope_append_reference(x.to(wide), cos.to(wide), sin.to(wide)).to(x.dtype)
        for x in (query, key)
    )


@pytest.mark.parametrize("regime", REGIMES)
def test_budget(regime, backend, device):
    query, key, cos, sin = case(*REGIMES[regime], device)
    given = [t.clone() for t in (query, key)]
    rotated = rope(query, key, cos, sin)
    eager = reference(query, key, cos, sin)
    truth = reference(query.double(), key.double(), cos, sin)
    for x, before, mine, theirs, exact in zip(
        (query, key), given, rotated, eager, truth, strict=True
    ):
        assert torch.equal(x, before)
        assert mine.is_contiguous() and mine.dtype == x.dtype
        floor = (4 * EPS + rounding(x.dtype)) * float(exact.abs().max())
        assert_close("rotated", mine, theirs, exact, floor)


@pytest.mark.parametrize("regime", REGIMES)
def test_gradient_budget(regime, backend, device):
    query, key, cos, sin = case(*REGIMES[regime], device)
    generator = torch.Generator().manual_seed(2)
    upstream = [torch.randn(x.shape, generator=generator).to(device) for x in (query, key)]
    assert_gradients_within_budget(
        lambda q, k: rope(q, k, cos, sin),
        lambda q, k: reference(q, k, cos, sin),
        {"query": query, "key": key},
        upstream,
    )


def test_the_gradient_undoes_the_rotation(backend, device):
    query, key, cos, sin = case(3, 4, 2, 16, torch.float32, device)
    rotated = rope(query, key, cos, sin)
    back = gradients(lambda q, k: rope(q, k, cos, sin), [query, key], list(rotated))
    torch.testing.assert_close(back, [query, key], rtol=1e-6, atol=1e-6)


def test_strided_rows_tables_and_gradients(backend, device):
    query, key, cos, sin = case(2, 3, 2, 16, torch.float32, device)
    expected = rope(query, key, cos, sin)
    fused = torch.full((2, 8, 16), math.nan, device=device)
    fused[:, 1:4], fused[:, 5:7] = query, key
    tables = [torch.cat([t, t], dim=-1)[:, :8] for t in (cos, sin)]
    found = rope(fused[:, 1:4], fused[:, 5:7], *tables)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    upstream = [torch.randn_like(x) for x in (query, key)]

    def run(q, k):
        return rope(q, k, cos, sin)

    plain = gradients(run, [query, key], upstream)
    for order in ((1, 0, 2), (0, 2, 1)):  # heads first; channels not adjacent
        strided = [g.permute(order).contiguous().permute(order) for g in upstream]
        assert all(
            torch.equal(*pair)
            for pair in zip(gradients(run, [query, key], strided), plain, strict=True)
        )


def test_heads_further_apart_than_32_bits(backend, device, tmp_path):
    query, key, cos, sin = case(1, 3, 3, 16, torch.bfloat16, device)
    apart = 2**30 + 8
    size = 2 * apart + 16
    if device == "cpu":  # a file without blocks: no memory is needed
        storage = torch.from_file(str(tmp_path / "rows"), True, size, dtype=torch.bfloat16)
    else:
        storage = torch.empty(size, dtype=torch.bfloat16, device=device)
    distant = storage.as_strided(query.shape, (16, apart, 1))
    distant.copy_(query)
    found = rope(distant, key, cos, sin)
    assert all(torch.equal(*pair) for pair in zip(found, rope(query, key, cos, sin), strict=True))


def test_a_row_does_not_depend_on_other_rows(backend, device):
    inputs = case(3, 2, 2, 16, torch.bfloat16, device)
    together = rope(*inputs)
    for t in range(3):
        alone = rope(*(x[t : t + 1] for x in inputs))
        assert all(torch.equal(a[0], b[t]) for a, b in zip(alone, together, strict=True))


def test_gradcheck(device, monkeypatch):
    monkeypatch.setenv("IRIS_KERNELS_BACKEND", "torch")
    query, key, cos, sin = case(2, 2, 1, 4, torch.float64, device)
    rows = [query.requires_grad_(), key.requires_grad_()]
    assert torch.autograd.gradcheck(lambda q, k: rope(q, k, cos, sin), rows)


def test_opcheck_and_fullgraph(backend, device):
    query, key, cos, sin = case(2, 4, 2, 16, torch.float32, device)
    for backwards in (False, True):
        rows = [t.clone().requires_grad_() for t in (query, key)]
        torch.library.opcheck(ops.rope.default, (*rows, cos, sin, backwards))
    torch._dynamo.reset()

    def run(q, k):
        return [x + 1 for x in rope(q * 2, k, cos, sin)]

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(query, key), run(query, key))
    found, expected = (gradients(f, [query, key], [query, key]) for f in (compiled, run))
    torch.testing.assert_close(found, expected)


def test_no_rows(backend, device):
    inputs = case(2, 4, 2, 16, torch.float32, device)
    assert [x.shape for x in rope(*(t[:0] for t in inputs))] == [(0, 4, 16), (0, 2, 16)]


GIVEN = case(2, 4, 2, 8, torch.float32, "cpu")
WRONG_ARGUMENTS = {
    r"query has shape \(4, 8\)": (0, GIVEN[0][0]),
    r"query has shape \(2, 4, 7\)": (0, GIVEN[0][..., :7]),
    "query has strides": (0, torch.zeros(2, 4, 16)[..., ::2]),
    r"key has shape \(2, 8\)": (1, GIVEN[1][0]),
    r"key is torch.float32 of shape \(1, 2, 8\)": (1, GIVEN[1][:1]),
    "key is torch.bfloat16": (1, GIVEN[1].bfloat16()),
    r"cos is torch.float32 of shape \(2, 8\)": (2, torch.zeros(2, 8)),
    "sin is torch.float64": (3, GIVEN[3].double()),
    "cos has strides": (2, torch.zeros(2, 8)[:, :4]),
}


@pytest.mark.parametrize("message", WRONG_ARGUMENTS)
def test_wrong_arguments_are_named(message):
    place, wrong = WRONG_ARGUMENTS[message]
    inputs = [*GIVEN[:place], wrong, *GIVEN[place + 1 :]]
    with pytest.raises(ValueError, match=message):
        rope(*inputs)
