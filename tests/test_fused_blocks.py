"""Whole training steps with fused blocks, here by the ops' C++ or torch path."""

from __future__ import annotations

import pytest
from small_runs import metrics, quick, tensors

from iris_fast.models import decoder
from iris_fast.train import train

SETTINGS = {
    "plain": {},
    "bf16, recomputed": {"bf16": True, "gradient_checkpointing": True},
    # Some projections with adapters, some without.
    "adapters": {"use_peft": True, "lora_target_modules": ["q_proj", "v_proj", "up_proj"]},
}


@pytest.mark.parametrize("kind", SETTINGS)
def test_a_step_has_the_gradients_and_metrics_of_the_modules(here, monkeypatch, kind):
    once = {"max_steps": 1, "max_grad_norm": 0.0, "reward_funcs": ["random"], "beta": 0.5}
    monkeypatch.setattr(decoder, "runs_fused", lambda x: False)
    train(quick("modules", **once | SETTINGS[kind]))
    monkeypatch.setattr(decoder, "runs_fused", lambda x: True)
    train(quick("fused", **once | SETTINGS[kind]))
    rel = 2e-2 if "bf16" in kind else 1e-5
    (ours,), (theirs,) = metrics("fused"), metrics("modules")
    for name in ("loss", "kl", "reward", "image_nsc", "grad_norm"):
        assert ours[name] == pytest.approx(theirs[name], rel=rel, abs=rel), name
    found, expected = tensors("fused", 1), tensors("modules", 1)
    moments = [name for name in expected if name.endswith("exp_avg")]
    assert moments
    for name in moments:  # after one step a tenth of the gradient
        assert (found[name] - expected[name]).norm() <= rel * expected[name].norm(), name
