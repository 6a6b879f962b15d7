"""Whole runs with `--torch_compile true`, against the same without."""

from __future__ import annotations

import pytest
import torch
from commands import TIMEOUT_S, launch
from small_runs import flags, metrics, quick, tensors
from torch._dynamo.utils import counters

from iris_fast.config import TrainConfig
from iris_fast.models import compilation
from iris_fast.models.attention import IMPLEMENTATIONS, unavailable
from iris_fast.train import train

MEAN_METRICS = ("loss", "kl", "ratio", "reward", "image_nsc", "text_nsc", "grad_norm")


@pytest.fixture(autouse=True)
def _a_cheap_backend(monkeypatch):
    """Trace and differentiate as for inductor, and run the graphs as they are."""
    monkeypatch.setattr(compilation, "BACKEND", "aot_eager")
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"gradient_checkpointing": True},
        {"bf16": True},
        {"gradient_accumulation_steps": 2},
        {"use_peft": True, "gradient_checkpointing": True},
    ],
    ids=["plain", "recomputed", "bf16", "accumulated", "lora"],
)
def test_a_compiled_step_has_the_same_gradients_and_metrics(here, settings):
    once = {"max_steps": 1, "beta": 0.5, "reward_funcs": ["random"], "max_grad_norm": 0.0}
    train(quick("eager", **once | settings))
    assert not counters["stats"]
    train(quick("compiled", torch_compile=True, **once | settings))
    # The policy's and the reference's; with LoRA no gradient goes into the first block's rows.
    assert counters["stats"]["unique_graphs"] == (3 if settings.get("use_peft") else 2)
    assert not counters["graph_break"]
    rtol = 2e-2 if settings.get("bf16") else 1e-5
    (ours,), (theirs,) = metrics("compiled"), metrics("eager")
    for name in MEAN_METRICS:
        assert ours[name] == pytest.approx(theirs[name], rel=rtol, abs=rtol), name
    found, expected = tensors("compiled", 1), tensors("eager", 1)
    assert found.keys() == expected.keys()
    moments = [name for name in expected if "exp_avg" in name and "exp_avg_sq" not in name]
    assert moments
    for name in moments:  # after one step a tenth of the gradient
        error = found[name] - expected[name]
        if settings.get("bf16"):
            # Both round to 8 bits in every op; the embeddings, at the end of the backward pass,
            # differ by 2.2%. The largest single error says little there.
            assert error.norm() <= 3e-2 * expected[name].norm(), name
        else:
            assert error.abs().max() <= rtol * expected[name].abs().max(), name


def test_no_step_compiles_anew(here):
    """Lengths change from step to step, and the second pass over a rollout changes nothing else."""
    train(quick("run", max_steps=6, torch_compile=True, num_iterations=2, max_completion_length=20))
    tokens = [row["cot_tokens"] for row in metrics("run")]
    assert len(set(tokens)) > 1
    # Reference, policy for its old log-probs, policy with gradients.
    assert counters["stats"]["unique_graphs"] == 3


def test_compilation_is_off_unless_asked_for():
    assert TrainConfig().torch_compile is False


def test_without_a_cpp_compiler_it_is_refused_before_anything_is_opened(here):
    words = [*flags(torch_compile=True), "--device", "cpu", "--prompts", "absent.txt"]
    # In a new interpreter: torch reads CXX when it is imported.
    process = launch("iris_fast.train", *words, cwd=here, CXX="/nowhere/g++")
    error = process.communicate(timeout=TIMEOUT_S)[1].strip().splitlines()[-1]
    assert process.returncode == 2
    assert "torch_compile: " in error
    assert "needs a C++ compiler" in error
    assert not list(here.iterdir())


@pytest.mark.gpu
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_compiled_blocks_on_a_gpu_give_the_samplers_log_probs(here, monkeypatch, name):
    """With every attention implementation that is installed; only the policy is compiled."""
    fault = unavailable(name, torch.device("cuda"), torch.bfloat16)
    if fault:
        pytest.skip(f"{name} {fault}")
    monkeypatch.setattr(compilation, "BACKEND", "inductor")
    settings = {"bf16": True, "device": "cuda", "attn_implementation": name, "max_steps": 4}
    for compiled in (False, True):
        train(quick(f"compiled {compiled}", torch_compile=compiled, **settings))
    eager, ours = (metrics(f"compiled {compiled}") for compiled in (False, True))
    assert {row["attn_implementation"] for row in ours} == {name}
    assert counters["stats"]["unique_graphs"] <= 12  # four times as many where blocks are cut
    assert ours[0]["logprob_mismatch"] <= 2 * eager[0]["logprob_mismatch"] + 1e-3
    assert ours[0]["grad_norm"] == pytest.approx(eager[0]["grad_norm"], rel=0.1)
