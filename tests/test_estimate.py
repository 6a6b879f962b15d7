"""The memory estimate, compared with what torch allocates, and its messages."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from small_runs import open_run, quick, state_bytes

from iris_fast import distributed
from iris_fast.config import PRESETS, TrainConfig
from iris_fast.errors import UserError
from iris_fast.grpo.optimizer import make_optimizer
from iris_fast.models import decoder
from iris_fast.models.attention import PackedAttention
from iris_fast.models.decoder import DecoderConfig, DecoderLayer, rope_tables
from iris_fast.models.vq import VQConfig
from iris_fast.preflight.estimate import (
    GIB,
    H200,
    MOMENT_BYTES,
    USABLE_SHARE,
    Estimate,
    check_fits,
    estimate,
    layer_activation_elements,
)
from iris_fast.tiny.build import TINY_CONFIG
from iris_fast.train import main

JANUS_1B = dataclasses.replace(
    TINY_CONFIG,
    decoder=DecoderConfig(102400, 2048, 5632, 24, 16, 16, 128),
    vq=VQConfig(),
    image_size=384,
)
JANUS_7B = dataclasses.replace(
    JANUS_1B, decoder=DecoderConfig(102400, 4096, 11008, 30, 32, 32, 128)
)


def preset(name: str, **changes) -> TrainConfig:
    return TrainConfig(**{"preset": name, "prompts": "p.txt"} | PRESETS[name] | changes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("fused", [True, False])
def test_activations_of_a_block_are_those_that_autograd_keeps(monkeypatch, dtype, kv_heads, fused):
    monkeypatch.setattr(decoder, "runs_fused", lambda x: fused)
    config = DecoderConfig(64, 128, 352, 1, 4, kv_heads, 32)
    layer = DecoderLayer(config).to(dtype)
    lengths = [30] * 4 if fused else [30, 29, 31, 30]  # padding copies the context
    rows = sum(lengths)
    x = torch.randn(rows, 128, dtype=dtype, requires_grad=True)
    cos, sin = rope_tables(torch.arange(rows), 32, 1e4)
    kept, alive = {}, []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        alive.append(tensor)  # otherwise the allocator could reuse its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(x, cos, sin, PackedAttention(lengths), 0)
    shared = (cos, sin) if fused else ()
    for tensor in (*layer.parameters(), *shared):
        kept.pop(tensor.untyped_storage().data_ptr(), None)
    compute, single = layer_activation_elements(config, fused)
    expected = compute * dtype.itemsize + single * 4
    assert sum(kept.values()) / rows == pytest.approx(expected, rel=0.05)


def test_states_are_counted_from_the_parameters():
    config = preset("janus-pro-1b")
    found = estimate(config, JANUS_1B, 1, H200, 64)
    parts = found.always_bytes
    # Decoder 24 x (4 D^2 + 3 D I + 2 D) + D, text embedding and head 2 V D; all but these frozen.
    trained = 24 * (4 * 2048**2 + 3 * 2048 * 5632 + 2 * 2048) + 2048 + 2 * 102400 * 2048
    assert found.training_bytes["gradients, float32"] == 4 * trained
    assert parts["moments, adamw_torch"] == 8 * trained
    on_four = estimate(config, JANUS_1B, 4, H200, 64).always_bytes
    assert on_four["policy"] == parts["policy"] / 4
    assert on_four["sampler's copy"] == parts["sampler's copy"]


@pytest.mark.parametrize("changes", [{"beta": 0.0}, {"offload_reference": True}])
def test_a_reference_outside_the_gpu_is_not_counted(changes):
    found = estimate(preset("janus-pro-1b", **changes), JANUS_1B, 1, H200, 64)
    assert found.always_bytes["reference"] == 0


def test_offloading_the_reference_is_proposed_if_that_is_enough():
    config = preset("janus-pro-1b")
    needs = estimate(config, JANUS_1B, 1, H200, 64)
    smaller = dataclasses.replace(H200, memory_bytes=int(needs.peak_bytes / USABLE_SHARE) - 2**30)
    with pytest.raises(UserError, match=r"add --offload_reference true$"):
        check_fits(estimate(config, JANUS_1B, 1, smaller, 64), config)
    config = preset("janus-pro-1b", offload_reference=True)
    check_fits(estimate(config, JANUS_1B, 1, smaller, 64), config)


def test_1b_and_7b_fit_one_h200_and_7b_with_float32_moments_does_not():
    one, seven = preset("janus-pro-1b", max_completion_length=128), preset("janus-pro-7b")
    check_fits(estimate(one, JANUS_1B, 1, H200, 64), one)
    check_fits(estimate(seven, JANUS_7B, 1, H200, 64), seven)
    exact = preset("janus-pro-7b", optim="adamw_torch")
    message = r"needs about \d+ GiB per GPU, and a H200 has 140; add --optim adamw_torch_8bit$"
    with pytest.raises(UserError, match=message):
        check_fits(estimate(exact, JANUS_7B, 1, H200, 64), exact)
    check_fits(estimate(exact, JANUS_7B, 4, H200, 64), exact)
    a100 = dataclasses.replace(H200, name="A100", memory_bytes=80 * 2**30)
    message = "a A100 has 80; use more GPUs: weights and optimizer state alone"
    with pytest.raises(UserError, match=message):
        check_fits(estimate(exact, JANUS_7B, 1, a100, 64), exact)


def test_adapters_are_counted_as_allocated():
    config = quick("unused", use_peft=True, lora_r=4, bf16=True)
    with distributed.start("cpu", 60.0) as ranks:
        models, _ = open_run(config, ranks)
        held = sum(p.numel() * p.element_size() for p in models.policy.parameters())
        sizes = models.policy.config
        trained = sum(p.numel() for p in models.policy.parameters() if p.requires_grad)
        del models
    found = estimate(config, sizes, 1, H200, 64)
    assert found.always_bytes["policy"] == held
    assert found.training_bytes["gradients, float32"] == 4 * trained
    assert found.always_bytes["reference"] == 0


@pytest.mark.parametrize("optim", MOMENT_BYTES)
def test_moments_are_counted_as_the_optimizer_allocates_them(optim):
    layer = torch.nn.Linear(256, 512, bias=False)
    optimizer = make_optimizer(layer, TrainConfig(optim=optim))
    layer.weight.grad = torch.zeros_like(layer.weight)
    optimizer.step()
    tables = 2 * 4 * 256 if optim == "adamw_torch_8bit" else 0
    expected = MOMENT_BYTES[optim] * layer.weight.numel() + tables
    assert state_bytes(optimizer) == expected


@pytest.mark.parametrize(
    ("optim", "each"), [("adamw_torch", 8), ("adamw_torch_bf16", 6), ("adamw_torch_8bit", 8)]
)
def test_moments_of_narrow_adapters(optim, each):
    """torchao keeps matrices of fewer columns than a block of 8-bit moments in float32."""
    found = estimate(preset("janus-pro-1b", use_peft=True, optim=optim), JANUS_1B, 1, H200, 64)
    gradients = found.training_bytes["gradients, float32"]
    assert found.always_bytes[f"moments, {optim}"] == each * gradients / 4


def test_fp8_rollouts_allocate_and_read_less():
    def rollout(**settings) -> Estimate:
        settings |= {"rollout_engine": "static"}
        return estimate(preset("janus-pro-1b", **settings), JANUS_1B, 1, H200, 64)

    plain = rollout()
    cache, weights = rollout(kv_cache_dtype="fp8"), rollout(rollout_weight_dtype="fp8")
    projections = 24 * (4 * 2048**2 + 3 * 2048 * 5632)
    norms = 24 * 2 * 2048  # they are not quantized, and are counted with the blocks
    more = weights.always_bytes["sampler's copy"] - plain.always_bytes["sampler's copy"]
    assert projections <= more <= projections + norms
    assert cache.rollout_bytes["KV cache"] == plain.rollout_bytes["KV cache"] / 2
    for found in (cache, weights):
        assert found.seconds["rollout"] < plain.seconds["rollout"]


def test_an_estimate_that_does_not_fit_names_what_to_change():
    wide = preset("janus-pro-1b", per_device_train_batch_size=16, gradient_accumulation_steps=1)
    with pytest.raises(UserError, match="add --gradient_checkpointing true"):
        check_fits(estimate(wide, JANUS_1B, 1, H200, 64), wide)
    many = preset("janus-pro-1b", per_device_train_batch_size=1, gradient_accumulation_steps=80)
    with pytest.raises(UserError, match="lower --gradient_accumulation_steps"):
        check_fits(estimate(many, JANUS_1B, 1, H200, 64), many)


def test_the_peak_is_the_larger_phase_plus_what_is_always_allocated():
    found = estimate(preset("janus-pro-1b"), JANUS_1B, 1, H200, 64)
    always = sum(found.always_bytes.values())
    assert found.peak_bytes == always + sum(found.training_bytes.values())
    assert f"{found.peak_bytes / GIB:.2f} GiB" in found.table()


def test_dry_run_prints_the_table_and_writes_nothing(tmp_path, capsys):
    assert main(quick(tmp_path / "run", dry_run=True)) == 0
    printed = capsys.readouterr().out
    for part in ("policy", "KV cache", "activations", "peak", "whole step"):
        assert part in printed
    assert not (tmp_path / "run").exists()
