"""silu_mul: gates and ups from one tensor or from two, and gradients."""

import math

import pytest
import torch
from iris_kernels import silu_mul
from iris_kernels.silu_mul import BLOCK, silu_mul_reference
from kernel_oracle import EPS, assert_close, assert_gradients_within_budget, gradients, rounding

ops = torch.ops.iris_kernels

# name: (shape, dtype)
REGIMES = {
    "janus_1b": ((2, 2 * 5632), torch.bfloat16),
    "one_block_exactly": ((2, 2 * BLOCK), torch.float32),
    "just_over_a_block": ((1, 2 * (BLOCK + 1)), torch.float32),
    "narrow": ((2, 3, 2 * 10), torch.float16),
    "odd": ((3, 2 * 37), torch.bfloat16),
    "one_gate": ((3, 2), torch.float32),
    "one_row": ((64,), torch.bfloat16),
}


def make_input(shape, dtype, device, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * 3).to(device, dtype)


@pytest.mark.parametrize("regime", REGIMES)
def test_budget(regime, backend, device):
    gate_up = make_input(*REGIMES[regime], device)
    given = gate_up.clone()
    out = silu_mul(gate_up)
    assert torch.equal(gate_up, given)
    assert out.dtype == gate_up.dtype
    assert out.shape == (*gate_up.shape[:-1], gate_up.shape[-1] // 2)
    truth = silu_mul_reference(gate_up.double())
    floor = (8 * EPS + 2 * rounding(gate_up.dtype)) * float(truth.abs().max())
    assert_close("product", out, silu_mul_reference(gate_up), truth, floor)
    gate, up = (half.contiguous() for half in gate_up.chunk(2, dim=-1))
    assert torch.equal(silu_mul(gate, up), out)


@pytest.mark.parametrize("regime", REGIMES)
def test_gradient_budget(regime, backend, device):
    gate_up = make_input(*REGIMES[regime], device)
    gate, up = (half.contiguous() for half in gate_up.chunk(2, dim=-1))
    upstream = [make_input(gate.shape, torch.float32, device, seed=1)]
    assert_gradients_within_budget(silu_mul, silu_mul_reference, {"both": gate_up}, upstream)
    tensors = {"gate": gate, "up": up}
    assert_gradients_within_budget(silu_mul, silu_mul_reference, tensors, upstream)
    (together,), apart = (gradients(silu_mul, t, upstream) for t in ([gate_up], [gate, up]))
    assert torch.equal(together, torch.cat(apart, dim=-1))


def test_gradients_at_large_gates(backend, device):
    gates = torch.tensor([-1e4, -100.0, 0.0, 100.0, 1e4], device=device)
    ups = torch.full_like(gates, 2.0)
    d_gate, d_up = gradients(silu_mul, [gates[None], ups[None]], [torch.ones(1, 5, device=device)])
    torch.testing.assert_close(d_gate[0].cpu(), torch.tensor([0.0, 0.0, 1.0, 2.0, 2.0]))
    torch.testing.assert_close(d_up[0].cpu(), torch.tensor([0.0, 0.0, 0.0, 100.0, 1e4]))


def test_relative_precision(backend, device):
    """Of sigmoids down to exp(-80), and of one minus them, which cancels if it is subtracted."""
    gates = torch.linspace(-80, 80, 3203, device=device)
    leaf = gates.clone().requires_grad_()
    out = silu_mul(leaf, torch.ones_like(gates))
    (slope,) = torch.autograd.grad(out.sum(), leaf)
    wide = gates.double()
    torch.testing.assert_close(out.double(), wide * wide.sigmoid(), rtol=2e-5, atol=0)
    exact = wide.sigmoid() * (1 + wide * (-wide).sigmoid())
    torch.testing.assert_close(slope.double(), exact, rtol=2e-5, atol=2e-6)


def test_gradcheck(device, monkeypatch):
    monkeypatch.setenv("IRIS_KERNELS_BACKEND", "torch")
    gate_up = make_input((2, 6), torch.float64, device).requires_grad_()
    assert torch.autograd.gradcheck(silu_mul, [gate_up])
    halves = [make_input((2, 3), torch.float64, device, seed).requires_grad_() for seed in (0, 1)]
    assert torch.autograd.gradcheck(silu_mul, halves)


def test_large_gates(backend, device):
    """exp(-x) overflows for large negative x, where silu is -0; it underflows for large x."""
    gates = torch.tensor([-1e4, -100.0, -80.0, 0.0, 100.0, 1e4, math.inf])
    gate_up = torch.cat([gates, torch.full_like(gates, 2.0)])[None].to(device)
    out = silu_mul(gate_up)[0].cpu()
    assert (out[:3].abs() < 1e-30).all()
    assert out[3:].tolist() == [0.0, 200.0, 2e4, math.inf]


def test_nan_stays_in_its_element(backend, device):
    gate_up = make_input((2, 12), torch.float32, device)
    gate_up[1, 2] = math.nan
    assert silu_mul(gate_up).isnan().nonzero().tolist() == [[1, 2]]


def test_opcheck_and_fullgraph(backend, device):
    gate_up = make_input((3, 32), torch.float32, device)
    gate, up = (half.contiguous() for half in gate_up.chunk(2, dim=-1))
    for given in ((gate_up, None), (gate, up)):
        leaves = [None if t is None else t.clone().requires_grad_() for t in given]
        torch.library.opcheck(ops.silu_mul.default, tuple(leaves))
        torch.library.opcheck(ops.silu_mul_backward.default, (*given, gate))
    torch._dynamo.reset()

    def run(x):
        return silu_mul(x * 2) + 1

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(gate_up), run(gate_up))
    found, expected = (gradients(f, [gate_up], [gate]) for f in (compiled, run))
    torch.testing.assert_close(found, expected)


def test_no_rows(backend, device):
    nothing = make_input((0, 8), torch.float32, device)
    assert silu_mul(nothing).shape == (0, 4)
    assert silu_mul(nothing, nothing).shape == (0, 8)
    assert [g.shape for g in gradients(silu_mul, [nothing] * 2, [nothing])] == [(0, 8)] * 2


G = torch.zeros(2, 8)
WRONG_ARGUMENTS = {
    "gate_up has 7 columns": (torch.zeros(2, 7),),
    "gate_up .* contiguous": (torch.zeros(2, 16)[:, ::2],),
    "gate_up .* torch.int64": (torch.zeros(2, 8, dtype=torch.int64),),
    r"gate_up has shape \(\)": (torch.zeros(()),),
    r"up is torch.float32 of shape \(2, 4\)": (G, G[:, :4].contiguous()),
    "up is torch.bfloat16": (G, G.bfloat16()),
    "up .* contiguous": (G, torch.zeros(8, 2).t()),
}


@pytest.mark.parametrize("message", WRONG_ARGUMENTS)
def test_wrong_arguments_are_named(message):
    with pytest.raises(ValueError, match=message):
        silu_mul(*WRONG_ARGUMENTS[message])
