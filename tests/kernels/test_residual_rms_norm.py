"""residual_rms_norm: sum and norm out of place, the norm of the rounded sum, and gradients."""

import sys

import pytest
import torch
from iris_kernels import add_rms_norm, residual_rms_norm
from iris_kernels.residual_rms_norm import residual_rms_norm_reference
from kernel_oracle import EPS, assert_close, assert_gradients_within_budget, gradients, rounding
from norm_cases import NORM_EPS, REGIMES, case

ops = torch.ops.iris_kernels


def differentiable(residual, delta, weight):
    return residual_rms_norm(residual, weight, eps=NORM_EPS, delta=delta)


def differentiable_alone(residual, weight):
    return residual_rms_norm(residual, weight, eps=NORM_EPS).norm


def reference(residual, delta, weight):
    return residual_rms_norm_reference(residual, weight, NORM_EPS, delta)


def upstream_of(tensor, seed=3):
    """Random gradients of the sum and of the norm."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(tensor.shape, generator=generator).to(tensor.device) for _ in range(2)]


@pytest.mark.parametrize("regime", REGIMES)
def test_budget(regime, backend, device):
    residual, delta, weight = case(*REGIMES[regime], device)
    dtype = residual.dtype
    total, norm = differentiable(residual, delta, weight)
    exact = residual.double() + delta.double()
    floor = rounding(dtype) * float(exact.abs().max())
    assert_close("sum", total, residual + delta, exact, floor)
    # The norm of the rounded sum is rounded twice: before and after the weight.
    _, truth = residual_rms_norm_reference(total.double(), weight.double(), NORM_EPS)
    _, eager = residual_rms_norm_reference(total, weight, NORM_EPS)
    floor = (8 * EPS + 2 * rounding(dtype)) * float(truth.abs().max())
    assert_close("norm", norm, eager, truth, floor)


@pytest.mark.parametrize("regime", REGIMES)
def test_residual_rms_norm_is_add_rms_norm_and_overwrites_nothing(regime, backend, device):
    residual, delta, weight = case(*REGIMES[regime], device)
    given = [t.clone() for t in (residual, delta, weight)]
    total, norm = residual_rms_norm(residual, weight, eps=NORM_EPS, delta=delta)
    for now, before in zip((residual, delta, weight), given, strict=True):
        assert torch.equal(now, before)
    assert torch.equal(norm, add_rms_norm(residual, weight, eps=NORM_EPS, delta=delta))
    assert torch.equal(total, residual)  # which the line before has overwritten
    alone = residual_rms_norm(total, weight, eps=NORM_EPS)
    assert alone.total is total
    assert torch.equal(alone.norm, norm)


@pytest.mark.parametrize("regime", REGIMES)
def test_gradient_budget(regime, backend, device):
    names, tensors = ("residual", "delta", "weight"), case(*REGIMES[regime], device)
    upstream = upstream_of(tensors[0])
    named = dict(zip(names, tensors, strict=True))
    # Of one channel the terms cancel: the norm is a sign.
    total = (tensors[0] + tensors[1]).double()
    scale = (total.square().mean(-1) + NORM_EPS).rsqrt().max()
    term = float(scale * (upstream[1].double() * tensors[2]).abs().max())
    assert_gradients_within_budget(differentiable, reference, named, upstream, term)
    assert_gradients_within_budget(differentiable, reference, named, [None, upstream[1]], term)
    del named["delta"]
    scale = (tensors[0].double().square().mean(-1) + NORM_EPS).rsqrt().max()
    term = float(scale * (upstream[1].double() * tensors[2]).abs().max())
    upstream = upstream[1:]
    assert_gradients_within_budget(
        differentiable_alone,
        lambda x, weight: residual_rms_norm_reference(x, weight, NORM_EPS)[1],
        named,
        upstream,
        term,
    )


def test_a_programs_rows_are_added_up_in_fp32(backend, device, monkeypatch):
    """Three programs for eight rows; in bf16 the sum of the rows would be off by a percent."""
    module = sys.modules[residual_rms_norm.__module__]
    for name, value in (("PROGRAMS", 3), ("CPP_PROGRAMS", 3), ("CPP_ROWS", 1)):
        monkeypatch.setattr(module, name, value)
    tensors = case((8, 40), torch.bfloat16, device)
    upstream = [g.bfloat16() for g in upstream_of(tensors[0])]
    truth = gradients(reference, [t.double() for t in tensors], upstream)
    for name, found, exact in zip(
        ("residual", "delta", "weight"),
        gradients(differentiable, tensors, upstream),
        truth,
        strict=True,
    ):
        # Roundings: of the sum before the norm, of the normalized row, and of the gradient.
        limit = 4 * rounding(torch.bfloat16) * float(exact.abs().max())
        assert float((found.double() - exact).abs().max()) <= limit, name


def test_a_sum_that_alone_is_used_passes_its_gradient_on(backend, device):
    residual, delta, weight = case((3, 32), torch.float32, device)
    (gradient, _) = upstream_of(residual)
    found = gradients(
        lambda x, y: differentiable(x, y, weight), [residual, delta], [gradient, None]
    )
    assert all(torch.equal(g, gradient) for g in found)


def test_a_frozen_weight_and_strided_upstream_gradients(backend, device):
    residual, delta, weight = case((3, 32), torch.float32, device)
    upstream = upstream_of(residual)
    expected = gradients(differentiable, [residual, delta, weight], upstream)[:2]
    leaves = [t.clone().requires_grad_() for t in (residual, delta)]
    strided = [g.t().contiguous().t() for g in upstream]
    found = torch.autograd.grad(differentiable(*leaves, weight), leaves, strided)
    for mine, theirs in zip(found, expected, strict=True):
        assert torch.equal(mine, theirs)


def test_gradients_of_a_row_do_not_depend_on_other_rows(backend, device):
    residual, delta, weight = case((5, 96), torch.bfloat16, device)
    upstream = upstream_of(residual)
    together, *_ = gradients(differentiable, [residual, delta, weight], upstream)
    for r in range(5):
        row = [t[r : r + 1] for t in (residual, delta, *upstream)]
        alone, *_ = gradients(differentiable, [*row[:2], weight], row[2:])
        if backend != "torch":
            assert torch.equal(alone[0], together[r])
        torch.testing.assert_close(alone[0], together[r])


def test_gradcheck(device, monkeypatch):
    monkeypatch.setenv("IRIS_KERNELS_BACKEND", "torch")
    tensors = [t.requires_grad_() for t in case((3, 7), torch.float64, device)]
    assert torch.autograd.gradcheck(differentiable, tensors)
    assert torch.autograd.gradcheck(differentiable_alone, tensors[::2])


def test_opcheck_and_fullgraph_with_gradients(backend, device):
    tensors = [t.requires_grad_() for t in case((3, 32), torch.float32, device)]
    residual, _, weight = tensors
    torch.library.opcheck(ops.residual_rms_norm.default, (*tensors, NORM_EPS))
    torch.library.opcheck(ops.rms_norm.default, (residual, weight, NORM_EPS))
    upstream, plain = upstream_of(residual), [t.detach() for t in tensors]
    for d_total, trained in ((upstream[0], True), (None, False)):
        arguments = (plain[0], plain[2], upstream[1], d_total, NORM_EPS, trained)
        torch.library.opcheck(ops.residual_rms_norm_backward.default, arguments)
    torch._dynamo.reset()

    def run(x, y, w):
        total, norm = differentiable(x * 2, y, w)
        return total + 1, norm * 2

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for mine, theirs in zip(
        gradients(compiled, plain, upstream), gradients(run, plain, upstream), strict=True
    ):
        torch.testing.assert_close(mine, theirs)


def test_no_rows(backend, device):
    residual, delta, weight = case((3, 32), torch.float32, device)
    none = [residual[:0], delta[:0], weight]
    assert [x.shape for x in differentiable(*none)] == [(0, 32)] * 2
    found = gradients(differentiable, none, upstream_of(residual[:0]))
    assert [tuple(g.shape) for g in found] == [(0, 32), (0, 32), (32,)]
    assert not found[2].any()


X, W = torch.zeros(3, 8), torch.ones(8)
WRONG_ARGUMENTS = {
    "residual has shape .* contiguous": (torch.zeros(3, 16)[:, ::2], W, None),
    "residual .* dtype torch.int64": (X.long(), W.long(), None),
    "residual has 32769 channels": (torch.zeros(1, 32769), torch.zeros(32769), None),
    r"weight is torch.float32 of shape \(4,\)": (X, W[:4], None),
    "weight is torch.bfloat16": (X, W.bfloat16(), None),
    r"delta is torch.float32 of shape \(2, 8\)": (X, W, X[:2]),
    "delta .* contiguous": (X, W, torch.zeros(8, 3).t()),
}


@pytest.mark.parametrize("message", WRONG_ARGUMENTS)
def test_wrong_arguments_are_named(message):
    residual, weight, delta = WRONG_ARGUMENTS[message]
    with pytest.raises(ValueError, match=message):
        residual_rms_norm(residual, weight, eps=NORM_EPS, delta=delta)
