"""LoRA: what is trained, what the reference is, what is sampled from and saved."""

from __future__ import annotations

import sys

import pytest
import torch
from small_runs import assert_same_run, checkpoints, metrics, open_run, quick, tensors

from iris_fast import distributed
from iris_fast.config import PROJECTIONS, TrainConfig
from iris_fast.errors import UserError
from iris_fast.export import export
from iris_fast.grpo import lora as adapters
from iris_fast.grpo.fsdp import local
from iris_fast.grpo.micro_batches import log_probs
from iris_fast.grpo.packing import pack
from iris_fast.grpo.policy import copy_weights
from iris_fast.models.pretrained.load import load_janus
from iris_fast.preflight.inputs import open_model
from iris_fast.tiny.build import build_tiny
from iris_fast.train import take_samples, train

LORA = {"use_peft": True, "lora_r": 4, "lora_alpha": 8, "learning_rate": 1e-2}


@torch.no_grad()
def disturb(policy) -> None:
    """Adapters as after some training."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in policy.named_parameters():
        if not adapters.is_adapter(name):
            continue
        part = local(parameter)
        part.copy_(0.1 * torch.randn(part.shape, generator=generator))


def test_merged_weights_equal_the_adapted_policy_and_the_base_the_initial_one():
    config = quick("unused", **LORA)
    with distributed.start("cpu", 60.0) as ranks:
        models, prompts = open_run(config, ranks)
        rollout = models.sampler.rollout(*take_samples(prompts, 1, 2, ranks))
        packed, _ = pack(rollout)
        start = log_probs(build_tiny().model, packed)
        assert torch.equal(log_probs(models.policy, packed), start)  # B is 0
        disturb(models.policy)
        assert torch.equal(log_probs(models.reference, packed), start)
        moved = log_probs(models.policy, packed)
        assert (moved - start).abs().max() > 0.1
        copy_weights(models.policy, models.sampler.janus)
        torch.testing.assert_close(
            log_probs(models.sampler.janus, packed), moved, atol=2e-5, rtol=2e-5
        )
        assert [n for n, p in models.policy.named_parameters() if p.requires_grad] == [
            n for n, _ in models.policy.named_parameters() if adapters.is_adapter(n)
        ]
        del models


def test_a_run_trains_the_adapters_and_resumes_bitwise(here):
    settings = {**LORA, "save_steps": 2, "max_steps": 4}
    train(quick("whole", **settings))
    rows = metrics("whole")
    assert rows[0]["kl"] == 0.0 < rows[-1]["kl"]
    train(quick("parts", **settings | {"max_steps": 2}))
    train(quick("parts", **settings, resume_from_checkpoint=True))
    assert_same_run("whole", "parts", 4)
    written = {n for n in tensors("whole", 4) if n.startswith("policy.")}
    layers = build_tiny().config.decoder.num_layers
    assert len(written) == 2 * len(PROJECTIONS) * layers  # A and B, nothing of the model
    moved = [t for n, t in tensors("whole", 4).items() if "lora_B" in n and n.startswith("policy.")]
    assert all(bool(t.any()) for t in moved)


def test_bf16_keeps_the_base_in_bfloat16_and_the_adapters_in_float32():
    with distributed.start("cpu", 60.0) as ranks:
        models, _ = open_run(quick("unused", **LORA, bf16=True), ranks)
        for name, parameter in models.policy.named_parameters():
            expected = torch.float32 if adapters.is_adapter(name) else torch.bfloat16
            assert parameter.dtype == expected, name
        del models


def test_a_run_in_bf16_works(here):
    train(quick("run", **LORA, bf16=True))
    assert metrics("run")[-1]["grad_norm"] > 0


def test_an_export_is_the_plain_model_with_the_adapters_merged(here):
    train(quick("run", **LORA))
    target = export(here / "run", here / "model", "transformers", "float32")
    opened, start = load_janus(str(target), torch.float32).model, open_model("tiny", torch.float32)
    ours, before = opened.state_dict(), start.model.state_dict()
    assert ours.keys() == before.keys()
    moved = {name for name in ours if not torch.equal(ours[name], before[name])}
    assert moved == {n for n in ours if any(f".{p}.weight" in n for p in PROJECTIONS)}
    state = tensors("run", 2)
    name = "model.language_model.layers.0.mlp.up_proj"
    up, down = (state[f"policy.{name}.lora_{part}.default.weight"] for part in "BA")
    torch.testing.assert_close(ours[f"{name}.weight"], before[f"{name}.weight"] + 2 * up @ down)
    assert checkpoints("run") == ["step_00002"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lora_target_modules": ["lm_head"]}, "lora_target_modules: lm_head.*choose from q_proj"),
        ({"lora_target_modules": []}, "lora_target_modules"),
        ({"lora_r": 0}, "lora_r: 0"),
        ({"train_image_head": True}, "train_image_head: --use_peft true trains adapters only"),
        ({"offload_reference": True}, "offload_reference: with --use_peft true the reference is"),
    ],
)
def test_what_cannot_be_made_is_refused(settings, message):
    with pytest.raises(UserError, match=message):
        TrainConfig(use_peft=True, **settings)


@pytest.mark.parametrize("setting", [{"lora_r": 4}, {"lora_target_modules": ["q_proj"]}])
def test_adapters_that_were_not_asked_for_are_not_ignored_silently(setting):
    with pytest.raises(UserError, match="add --use_peft true"):
        TrainConfig(**setting)


def test_without_peft_the_error_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r"use_peft: true needs peft.*pip install peft"):
        adapters.add(build_tiny().model, adapters.Lora(4, 8, ["q_proj"], 0))
