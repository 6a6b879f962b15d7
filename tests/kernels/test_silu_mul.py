"""silu_mul: gates and ups from one tensor."""

import math

import pytest
import torch
from iris_kernels import silu_mul
from iris_kernels.silu_mul import BLOCK, silu_mul_reference
from kernel_oracle import EPS, assert_close, rounding

ops = torch.ops.iris_kernels

# name: (shape, dtype)
REGIMES = {
    "janus_1b": ((2, 2 * 5632), torch.bfloat16),
    "one_block_exactly": ((2, 2 * BLOCK), torch.float32),
    "just_over_a_block": ((1, 2 * (BLOCK + 1)), torch.float32),
    "narrow": ((2, 3, 2 * 10), torch.float16),
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
    torch.library.opcheck(ops.silu_mul.default, (gate_up,))
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: silu_mul(x * 2) + 1, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(gate_up), silu_mul(gate_up * 2) + 1)


def test_no_rows(backend, device):
    assert silu_mul(make_input((0, 8), torch.float32, device)).shape == (0, 4)


WRONG_ARGUMENTS = {
    "gate_up has 7 columns": torch.zeros(2, 7),
    "gate_up .* contiguous": torch.zeros(2, 16)[:, ::2],
    "gate_up .* torch.float64": torch.zeros(2, 8, dtype=torch.float64),
    r"gate_up has shape \(\)": torch.zeros(()),
}


@pytest.mark.parametrize("message", WRONG_ARGUMENTS)
def test_wrong_arguments_are_named(message):
    with pytest.raises(ValueError, match=message):
        silu_mul(WRONG_ARGUMENTS[message])
