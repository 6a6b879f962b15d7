"""Packed attention: each implementation against plain matrix products, and the choice."""

from __future__ import annotations

import inspect
import sys

import attention_fakes
import pytest
import torch
from torch import Tensor

from iris_fast.errors import UserError
from iris_fast.models.attention import (
    IMPLEMENTATIONS,
    PackedAttention,
    resolve_implementation,
    unavailable,
)

LENGTHS = [5, 1, 9, 2]
FAKES = {
    "sdpa": "sdpa",
    "varlen": "varlen",
    "varlen 2.11": "varlen",
    "flash_attention_2": "flash_attention_2",
    "xformers": "xformers",
}
GPU, CPU = torch.device("cuda"), torch.device("cpu")
BF16, FP32 = torch.bfloat16, torch.float32


def inputs(
    kv_heads: int,
    heads: int = 4,
    head_dim: int = 16,
    lengths: list[int] = LENGTHS,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
) -> list[Tensor]:
    """Query, key, value and the upstream gradient."""
    rows = sum(lengths)
    shapes = [(rows, h, head_dim) for h in (heads, kv_heads, kv_heads, heads)]
    return [torch.randn(shape, dtype=torch.float64).to(device, dtype) for shape in shapes]


def run(attention, query: Tensor, key: Tensor, value: Tensor, upstream: Tensor) -> list[Tensor]:
    """Context, and the gradients of query, key and value."""
    leaves = [x.detach().requires_grad_() for x in (query, key, value)]
    context = attention(*leaves)
    return [context.detach(), *torch.autograd.grad(context, leaves, upstream)]


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("fake", FAKES)
def test_every_implementation_is_causal_attention_inside_each_sequence(fake, kv_heads, monkeypatch):
    calls = attention_fakes.install(fake, monkeypatch) if fake != "sdpa" else None
    tensors = inputs(kv_heads)
    attention = PackedAttention(LENGTHS, implementation=FAKES[fake])
    found = run(lambda *qkv: attention(0, *qkv), *tensors)
    expected = run(lambda *qkv: attention_fakes.causal_inside(*qkv, LENGTHS), *tensors)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.shape == theirs.shape
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    if calls is not None:
        assert len(calls) == 1
        assert calls[0]["causal"]
        # Whoever can share a key head among queries is not given copies.
        assert calls[0].get("kv_heads", kv_heads) == kv_heads


@pytest.mark.parametrize("lengths", [[3, 3], [1], [7]])
def test_without_padding_too(lengths):
    tensors = inputs(2, lengths=lengths)
    attention = PackedAttention(lengths)
    found = run(lambda *qkv: attention(0, *qkv), *tensors)
    expected = run(lambda *qkv: attention_fakes.causal_inside(*qkv, lengths), *tensors)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_this_torch_takes_the_arguments_that_its_stand_in_takes():
    from torch.nn.attention.varlen import varlen_attn

    versions = (attention_fakes.varlen_2_11, attention_fakes.varlen_2_12)
    stand_ins = [list(inspect.signature(make([])).parameters) for make in versions]
    assert list(inspect.signature(varlen_attn).parameters) in stand_ins


# --- The choice -----------------------------------------------------------------------------------


@pytest.fixture
def gpu(monkeypatch):
    """A GPU as the choice sees it; no package is installed, and torch has varlen attention."""
    for name in ("flash_attn", "xformers"):
        for module in [m for m in sys.modules if m.partition(".")[0] == name]:
            monkeypatch.delitem(sys.modules, module)
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)


def test_auto_is_sdpa_on_a_cpu_and_in_float32(gpu, monkeypatch):
    attention_fakes.install("flash_attention_2", monkeypatch)
    assert resolve_implementation("auto", CPU, BF16) == "sdpa"
    assert resolve_implementation("auto", GPU, FP32) == "sdpa"


def test_auto_is_the_best_that_is_there(gpu, monkeypatch):
    assert resolve_implementation("auto", GPU, BF16) == "varlen"
    assert resolve_implementation("auto", GPU, torch.float16, head_dim=128) == "varlen"
    assert resolve_implementation("auto", GPU, BF16, head_dim=20) == "sdpa"
    attention_fakes.install("flash_attention_2", monkeypatch)
    assert resolve_implementation("auto", GPU, BF16, head_dim=64) == "flash_attention_2"
    assert resolve_implementation("auto", GPU, BF16, head_dim=20) == "sdpa"


def test_auto_is_sdpa_where_torch_has_no_flash_attention(gpu, monkeypatch):
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: False)
    assert resolve_implementation("auto", GPU, BF16) == "sdpa"


def test_auto_is_sdpa_on_a_gpu_that_is_too_old(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert resolve_implementation("auto", GPU, BF16) == "sdpa"


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_what_is_asked_for_is_what_is_used(name, gpu, monkeypatch):
    for fake in ("flash_attention_2", "xformers"):
        attention_fakes.install(fake, monkeypatch)
    assert resolve_implementation(name, GPU, BF16, head_dim=64) == name
    assert unavailable(name, GPU, BF16, head_dim=64) is None


@pytest.mark.parametrize("name", [name for name in IMPLEMENTATIONS if name != "sdpa"])
@pytest.mark.parametrize(
    ("device", "dtype", "head_dim", "capability", "said"),
    [
        (CPU, BF16, 64, (9, 0), "needs a GPU, and this runs on the CPU; use .* sdpa, or auto"),
        (GPU, FP32, 64, (9, 0), "needs half precision, not float32; add --bf16 true"),
        (GPU, BF16, 20, (9, 0), "multiple of 8 up to 256, this model's is 20; use .* sdpa"),
        (GPU, BF16, 512, (9, 0), "multiple of 8 up to 256, this model's is 512"),
        (GPU, BF16, 64, (7, 5), r"compute capability 8.0 .*, this one has 7.5"),
    ],
)
def test_what_cannot_work_is_refused(
    name, device, dtype, head_dim, capability, said, gpu, monkeypatch
):
    for fake in ("flash_attention_2", "xformers"):
        attention_fakes.install(fake, monkeypatch)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    with pytest.raises(UserError, match=f"^attn_implementation: {name} .*{said}") as refusal:
        resolve_implementation(name, device, dtype, head_dim)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("flash_attention_2", "is not installed; pip install flash-attn"),
        ("xformers", "is not installed; pip install xformers"),
    ],
)
def test_a_package_that_is_not_there_is_named(name, said, gpu):
    with pytest.raises(UserError, match=f"attn_implementation: {name} {said}"):
        resolve_implementation(name, GPU, BF16)


def test_a_torch_without_varlen_is_reported(gpu, monkeypatch):
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: False)
    with pytest.raises(UserError, match="attn_implementation: varlen is not part of this torch"):
        resolve_implementation("varlen", GPU, BF16)


@pytest.mark.parametrize("wanted", ["auto", "flash_attention_2"])
def test_a_package_that_is_broken_is_no_reason_for_another(wanted, gpu, monkeypatch, tmp_path):
    monkeypatch.delitem(sys.modules, "flash_attn")
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "flash_attn").mkdir()
    (tmp_path / "flash_attn" / "__init__.py").write_text("raise ImportError('bad\\nsymbol')")
    with pytest.raises(UserError, match=r"cannot be imported \(bad symbol\); .*--attn_") as refusal:
        resolve_implementation(wanted, GPU, BF16)
    assert "\n" not in str(refusal.value)


def test_flash_attn_4_alone_is_not_flash_attention_2(gpu, monkeypatch, tmp_path):
    """It installs a namespace of that name, without the function."""
    monkeypatch.delitem(sys.modules, "flash_attn")
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "flash_attn" / "cute").mkdir(parents=True)
    assert resolve_implementation("auto", GPU, BF16) == "varlen"


# --- On a GPU -------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("kv_heads", [8, 2])
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_half_precision_errs_no_more_than_sdpa(name, kv_heads, head_dim):
    """Against float64, forward and backward: at most twice sdpa's error in the same precision."""
    fault = unavailable(name, GPU, BF16, head_dim)
    if fault:
        pytest.skip(f"{name} {fault}")
    lengths = [700, 1, 129, 64, 577]
    exact = inputs(kv_heads, heads=8, head_dim=head_dim, lengths=lengths)
    rounded = [tensor.to("cuda", BF16) for tensor in exact]
    exact = [tensor.double().cpu() for tensor in rounded]
    expected = run(lambda *qkv: attention_fakes.causal_inside(*qkv, lengths), *exact)

    def errors(implementation: str) -> list[tuple[float, float]]:
        attention = PackedAttention(lengths, "cuda", implementation)
        found = run(lambda *qkv: attention(0, *qkv), *rounded)
        gaps = [(a.double().cpu() - b).abs() for a, b in zip(found, expected, strict=True)]
        return [(gap.max().item(), gap.square().mean().sqrt().item()) for gap in gaps]

    for ours, theirs in zip(errors(name), errors("sdpa"), strict=True):
        assert ours[0] <= 3 * theirs[0] + 1e-3  # the largest is one number of many: more scatter
        assert ours[1] <= 2 * theirs[1] + 1e-5
