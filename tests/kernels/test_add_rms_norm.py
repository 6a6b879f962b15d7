"""add_rms_norm: the sum in place, the norm of the rounded sum, one row at a time."""

import math

import pytest
import torch
from iris_kernels import add_rms_norm
from iris_kernels.add_rms_norm import add_rms_norm_reference
from kernel_oracle import EPS, assert_close, rounding
from norm_cases import NORM_EPS, REGIMES, case

ops = torch.ops.iris_kernels


@pytest.mark.parametrize("regime", REGIMES)
def test_budget(regime, backend, device):
    residual, delta, weight = case(*REGIMES[regime], device)
    dtype = residual.dtype
    given = residual.clone()
    out = add_rms_norm(residual, weight, eps=NORM_EPS, delta=delta)
    assert out.dtype == dtype and out.shape == given.shape
    total = given.double() + delta.double()
    assert_close("sum", residual, given + delta, total, rounding(dtype) * float(total.abs().max()))
    # The norm of the rounded sum is rounded twice: before and after the weight.
    exact = (t.double() for t in (residual, weight))
    truth = add_rms_norm_reference(*exact, NORM_EPS, torch.zeros_like(total))
    eager = add_rms_norm_reference(residual, weight, NORM_EPS, torch.zeros_like(residual))
    floor = (8 * EPS + 2 * rounding(dtype)) * float(truth.abs().max())
    assert_close("norm", out, eager, truth, floor)


def test_without_delta_nothing_is_overwritten(backend, device):
    residual, _, weight = case((4, 48), torch.float32, device)
    given = residual.clone()
    out = add_rms_norm(residual, weight, eps=NORM_EPS)
    assert torch.equal(residual, given)
    expected = torch.nn.functional.rms_norm(given, (48,), weight, NORM_EPS)
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("size", [0.0, 1e-20, 1e15])
def test_extreme_rows(size, backend, device):
    """Zeros stay zeros; rows far below eps stay small; squares of 1e15 fit fp32."""
    residual, _, weight = case((2, 64), torch.float32, device)
    residual *= size
    out = add_rms_norm(residual, weight, eps=NORM_EPS)
    wide = residual.double()
    truth = weight.double() * wide / (wide.square().mean(-1, keepdim=True) + NORM_EPS).sqrt()
    torch.testing.assert_close(out.double(), truth, rtol=1e-5, atol=0.0)


def test_a_weight_that_is_fetched_early_changes_nothing(backend, device):
    residual, delta, weight = case((3, 96), torch.bfloat16, device)
    ahead = torch.full((40, 96), math.nan, dtype=torch.bfloat16, device=device)
    streams = [residual.clone() for _ in range(3)]
    found = [
        add_rms_norm(stream, weight, eps=NORM_EPS, delta=delta, ahead=next_weight)
        for stream, next_weight in zip(streams, (None, ahead, ahead[:0]), strict=True)
    ]
    for stream, out in zip(streams, found, strict=True):
        assert torch.equal(stream, streams[0]) and torch.equal(out, found[0])
    for wrong in (ahead[0], ahead[:, ::2], ahead.float(), ahead[None]):
        with pytest.raises(ValueError, match="ahead"):
            add_rms_norm(residual, weight, eps=NORM_EPS, ahead=wrong)


def test_nan_stays_in_its_row(backend, device):
    residual, delta, weight = case((3, 32), torch.float32, device)
    delta[1, 5] = math.nan
    out = add_rms_norm(residual, weight, eps=NORM_EPS, delta=delta)
    assert out.isnan().any(dim=-1).tolist() == [False, True, False]


def test_a_row_does_not_depend_on_other_rows(backend, device):
    residual, delta, weight = case((5, 96), torch.bfloat16, device)
    alone = [
        add_rms_norm(row.clone()[None], weight, eps=NORM_EPS, delta=added[None])[0]
        for row, added in zip(residual, delta, strict=True)
    ]
    together = add_rms_norm(residual, weight, eps=NORM_EPS, delta=delta)
    if backend != "torch":
        assert torch.equal(torch.stack(alone), together)
    torch.testing.assert_close(torch.stack(alone), together)


def test_opcheck_and_fullgraph(backend, device):
    residual, delta, weight = case((3, 32), torch.float32, device)
    for added in (delta, None):
        torch.library.opcheck(ops.add_rms_norm.default, (residual.clone(), added, weight, NORM_EPS))
    torch._dynamo.reset()

    def run(stream, added):
        out = add_rms_norm(stream, weight, eps=NORM_EPS, delta=added * 2)
        return out + 1, stream

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    expected = run(residual.clone(), delta)
    for mine, theirs in zip(compiled(residual.clone(), delta), expected, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_no_rows(backend, device):
    residual, delta, weight = case((3, 32), torch.float32, device)
    assert add_rms_norm(residual[:0], weight, eps=NORM_EPS, delta=delta[:0]).shape == (0, 32)


X, W = torch.zeros(3, 8), torch.ones(8)
WRONG_ARGUMENTS = {
    "residual has shape .* contiguous": (torch.zeros(3, 16)[:, ::2], W, None),
    "residual .* dtype torch.float64": (X.double(), W.double(), None),
    "residual has 32769 channels": (torch.zeros(1, 32769), torch.zeros(32769), None),
    r"weight is torch.float32 of shape \(4,\)": (X, W[:4], None),
    "weight is torch.bfloat16": (X, W.bfloat16(), None),
    r"delta is torch.float32 of shape \(2, 8\)": (X, W, X[:2]),
    "delta .* contiguous": (X, W, torch.zeros(8, 3).t()),
    r"delta is torch.bfloat16 .* pass torch.float32 of shape \(2, 3, 8\)": (
        X, W, torch.zeros(2, 3, 8, dtype=torch.bfloat16)
    ),
    r"delta is torch.float32 of shape \(0, 3, 8\)": (X, W, torch.zeros(0, 3, 8)),
}  # fmt: skip


@pytest.mark.parametrize("message", WRONG_ARGUMENTS)
def test_wrong_arguments_are_named(message):
    residual, weight, delta = WRONG_ARGUMENTS[message]
    with pytest.raises(ValueError, match=message):
        add_rms_norm(residual, weight, eps=NORM_EPS, delta=delta)
