"""AdamW with moments of 32, 16 and 8 bits: accuracy, memory, saving and loading."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from small_runs import state_bytes
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode

from iris_fast.config import TrainConfig
from iris_fast.errors import UserError
from iris_fast.grpo.fsdp import local
from iris_fast.grpo.optimizer import (
    LocalAdamW,
    clip_gradients,
    fits_blocks,
    make_optimizer,
    plain_parts,
    set_learning_rate,
)

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


class Calls(TorchDispatchMode):
    """Names of the operations in the `with` block, views aside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view and func is not torch.ops.aten.detach.default:
            self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def sharded(ranks) -> nn.ModuleList:
    """Twenty layers under FSDP2, with gradients."""
    layers = nn.ModuleList(nn.Linear(4, 3) for _ in range(20))
    generator = torch.Generator().manual_seed(0)
    for layer in layers:
        fully_shard(layer, mesh=ranks.mesh)
    for parameter in layers.parameters():
        parameter.grad = torch.zeros_like(parameter)
        part = local(parameter.grad)
        part.copy_(torch.randn(part.shape, generator=generator))
    return layers


def test_the_fused_step_is_that_of_adamw_in_a_few_operations(sharded):
    plain = [nn.Parameter(local(p).clone()) for p in sharded.parameters()]
    for mine, theirs in zip(plain, sharded.parameters(), strict=True):
        mine.grad = local(theirs.grad).clone()
    settings = {"lr": 1e-2, "weight_decay": 0.1}
    expected = torch.optim.AdamW(plain, **settings)
    optimizer = LocalAdamW(sharded.parameters(), **settings)
    for _ in range(3):
        expected.step()
        optimizer.step()
    for theirs, mine in zip(plain, sharded.parameters(), strict=True):
        torch.testing.assert_close(local(mine), theirs.detach(), rtol=1e-6, atol=1e-7)
        assert type(optimizer.state[mine]["exp_avg"]) is type(mine)  # sharded, for checkpoints
    with Calls() as calls:
        optimizer.step()
    computed = [name for name in calls.names if name.startswith("aten::")]
    assert computed == ["aten::_foreach_add_", "aten::_fused_adamw_"]  # for 40 tensors
    del optimizer, sharded


@pytest.mark.parametrize("limit", [0.5, 0.0, 1e6])
def test_clipping_is_torchs_with_one_reduction(sharded, monkeypatch, limit):
    reductions, reduce = [], torch.distributed.all_reduce
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda t: reductions.append(reduce(t)))
    plain = [nn.Parameter(local(p).clone()) for p in sharded.parameters()]
    for mine, theirs in zip(plain, sharded.parameters(), strict=True):
        mine.grad = local(theirs.grad).clone()
    with Calls() as calls:
        norm = clip_gradients(sharded.parameters(), limit)
    expected = nn.utils.clip_grad_norm_(plain, limit or math.inf)
    assert norm.item() == pytest.approx(expected.item(), rel=1e-6)
    for theirs, mine in zip(plain, sharded.parameters(), strict=True):
        torch.testing.assert_close(local(mine.grad), theirs.grad, rtol=1e-6, atol=0.0)
    assert len(reductions) == 1
    assert len(calls.names) <= 14, calls.names
    del sharded


def test_clipping_without_gradients_is_nothing(ranks):
    assert clip_gradients([nn.Parameter(torch.ones(2))], 1.0) == 0


def test_a_rank_without_a_part_of_a_tensor_takes_the_step_too():
    rows = [nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(0, 3))]
    for parameter in rows:
        parameter.grad = torch.ones_like(parameter)
    LocalAdamW(rows, lr=0.1).step()
    assert (rows[0] < 1).all()


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
