"""AdamW with moments of 32, 16 and 8 bits: accuracy, memory, saving and loading."""

from __future__ import annotations

import sys

import pytest
import torch
from small_runs import state_bytes
from torch import nn

from iris_fast.config import TrainConfig
from iris_fast.errors import UserError
from iris_fast.grpo.optimizer import fits_blocks, make_optimizer, plain_parts, set_learning_rate

STEPS = 20


def train(optim: str, device: str = "cpu") -> tuple[nn.Linear, torch.optim.Optimizer]:
    """A layer after some steps of noise around a steady gradient, of a schedule's rates."""
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(128, 256)
    for parameter in layer.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    layer.to(device)
    config = TrainConfig(optim=optim, learning_rate=1e-2, max_steps=STEPS, weight_decay=0.1)
    optimizer = make_optimizer(layer, config)
    steady = [torch.randn(p.shape, generator=generator) for p in layer.parameters()]
    for step in range(STEPS):
        for parameter, gradient in zip(layer.parameters(), steady, strict=True):
            noise = 0.5 * torch.randn(gradient.shape, generator=generator)
            parameter.grad = (gradient + noise).to(device)
        set_learning_rate(optimizer, step, config)
        optimizer.step()
    return layer, optimizer


@pytest.mark.parametrize(
    ("optim", "bytes_per_value", "error"),
    [("adamw_torch", 8, 0.0), ("adamw_torch_bf16", 6, 0.01), ("adamw_torch_8bit", 2, 0.03)],
)
def test_moments_take_less_and_lead_to_the_same_weights(optim, bytes_per_value, error):
    exact, _ = train("adamw_torch")
    layer, optimizer = train(optim)
    values = layer.weight.numel()
    # Besides the values: the bias; scales; two tables of 256 values.
    overhead = 8 * layer.bias.numel() + 2 * (4 * values // 64 + 4 * 256)
    assert state_bytes(optimizer) <= bytes_per_value * values + overhead
    start = nn.Linear(128, 256)
    generator = torch.Generator().manual_seed(0)
    start.weight.data = torch.randn(start.weight.shape, generator=generator)
    way = (exact.weight - start.weight).norm()
    assert (layer.weight - exact.weight).norm() <= error * way


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_bf16", "adamw_torch_8bit"])
def test_gradients_that_have_become_small_are_forgotten_as_fast(optim):
    """A step takes a thousandth of the second moment away: what keeps too few bits keeps it all."""
    layer = nn.Linear(64, 128, bias=False)
    config = TrainConfig(optim=optim, learning_rate=1e-4, max_steps=2, lr_scheduler_type="constant")
    optimizer = make_optimizer(layer, config)
    gradient = torch.randn(layer.weight.shape, generator=torch.Generator().manual_seed(0))
    for step in range(600):
        layer.weight.grad = gradient * (1.0 if step < 100 else 0.01)
        optimizer.step()
    second = next(iter(optimizer.state.values()))["exp_avg_sq"]
    if optim == "adamw_torch_8bit":
        second = second.dequantize()
    exact = gradient.square() * ((1 - 0.999**100) * 0.999**500 + 1e-4 * (1 - 0.999**500))
    assert second.sum().item() == pytest.approx(exact.sum().item(), rel=0.03)


def test_which_moments_have_8_bits_does_not_depend_on_the_ranks():
    assert fits_blocks(torch.Size([192, 512]))
    assert not fits_blocks(torch.Size([16, 192]))  # an adapter's A, cut among 24 ranks or none
    assert not fits_blocks(torch.Size([192, 16]))
    assert not fits_blocks(torch.Size([4096]))


def test_a_saved_and_loaded_moment_is_the_same():
    _, optimizer = train("adamw_torch_8bit")
    _, other = train("adamw_torch_8bit")
    for name in ("exp_avg", "exp_avg_sq"):
        moment, fresh = (next(iter(o.state.values()))[name] for o in (optimizer, other))
        parts = plain_parts(name, moment)
        assert {n: (p.dtype, tuple(p.shape)) for n, p in parts.items()} == {
            f"{name}.codes": (torch.uint8, (256, 128)),
            f"{name}.scale": (torch.float32, (256, 2)),
        }
        written = {n: part.clone() for n, part in parts.items()}
        values = moment.dequantize()
        for part in plain_parts(name, fresh).values():
            part.zero_()
        assert not torch.equal(fresh.dequantize(), values)
        for n, part in plain_parts(name, fresh).items():
            part.copy_(written[n])
        assert torch.equal(fresh.dequantize(), values)


def test_without_torchao_the_default_works_and_the_others_say_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    make_optimizer(nn.Linear(2, 2), TrainConfig())
    with pytest.raises(UserError, match=r"optim: adamw_torch_8bit needs torchao.*pip install"):
        make_optimizer(nn.Linear(2, 2), TrainConfig(optim="adamw_torch_8bit"))


@pytest.mark.gpu
@pytest.mark.parametrize("optim", ["adamw_torch_bf16", "adamw_torch_8bit"])
def test_the_compiled_step_of_a_gpu_follows_the_schedule_as_single_steps_do(optim):
    pytest.importorskip("torchao")
    (ours, _), (theirs, _) = train(optim, "cuda"), train(optim, "cpu")
    torch.testing.assert_close(ours.weight.cpu(), theirs.weight, rtol=1e-3, atol=1e-3)
