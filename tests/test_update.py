"""One optimizer step: what it is made of, and what it leaves alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from small_runs import metrics, open_run, quick, score, tensors
from torch.distributed.fsdp import FSDPModule

from iris_fast import distributed
from iris_fast.config import TrainConfig
from iris_fast.distributed import Ranks
from iris_fast.errors import UserError
from iris_fast.grpo.fsdp import full
from iris_fast.grpo.micro_batches import log_probs, prepare
from iris_fast.grpo.optimizer import make_optimizer, set_learning_rate
from iris_fast.grpo.packing import pack
from iris_fast.grpo.policy import Models, copy_weights
from iris_fast.grpo.update import Learner
from iris_fast.preflight.inputs import open_inputs
from iris_fast.records import Scored
from iris_fast.train import take_samples, train


@dataclasses.dataclass
class Step:
    """All that one step needs; the rollout is of four prompts, two samples each."""

    config: TrainConfig
    ranks: Ranks
    models: Models
    learner: Learner
    scored: Scored

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        return self.learner.optimizer

    def batches(self, **changes: Any):
        config = dataclasses.replace(self.config, **changes)
        return prepare(self.scored, self.models.policy, self.models.reference, config, self.ranks)

    def update(self, batches) -> dict[str, float]:
        """The learning rate of QUICK is constant, so the step does not matter."""
        return self.learner.update(batches, step=0)

    def gradients(self) -> dict[str, torch.Tensor]:
        """Those of an update whose optimizer step is skipped."""
        self.optimizer.step = lambda: None
        self.optimizer.zero_grad = lambda set_to_none: None
        self.update(self.batches())
        named = self.models.policy.named_parameters()
        return {name: full(p.grad).clone() for name, p in named if p.grad is not None}

    def weights(self) -> dict[str, torch.Tensor]:
        return {n: full(p.detach()).clone() for n, p in self.models.policy.named_parameters()}


@contextmanager
def one_step(**settings: Any) -> Iterator[Step]:
    defaults = {"reward_funcs": ["random"], "beta": 0.5, "max_grad_norm": 0.0}
    batch = 4 // settings.get("gradient_accumulation_steps", 1)
    config = quick("unused", **defaults | settings, per_device_train_batch_size=batch)
    with distributed.start("cpu", 60.0) as ranks:
        models, prompts = open_run(config, ranks)
        with torch.no_grad():  # a policy that has moved away from its reference
            for parameter in models.policy.model.language_model.layers.parameters():
                parameter *= 1.05
        copy_weights(models.policy, models.sampler.janus)
        rollout = models.sampler.rollout(*take_samples(prompts, 4, config.num_generations, ranks))
        optimizer = make_optimizer(models.policy, config)
        learner = Learner(models.policy, models.reference, optimizer, config, ranks)
        step = Step(config, ranks, models, learner, score(rollout, config, ranks))
        yield step
        del step.models, step.learner, models, learner


def gradients(**settings: Any) -> dict[str, torch.Tensor]:
    with one_step(**settings) as step:
        return step.gradients()


def assert_same_gradients(left: dict, right: dict, rtol: float = 1e-4) -> None:
    assert left.keys() == right.keys()
    for name in left:
        scale = left[name].abs().max().item()
        assert scale > 0, name
        torch.testing.assert_close(left[name], right[name], rtol=rtol, atol=rtol * scale, msg=name)


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
def test_accumulated_gradients_are_those_of_the_whole_batch(loss_type):
    whole = gradients(loss_type=loss_type)
    for accumulation in (2, 4):
        cut = gradients(loss_type=loss_type, gradient_accumulation_steps=accumulation)
        assert_same_gradients(whole, cut)


# --- Out of memory --------------------------------------------------------------------------------


CAN_RESTART = hasattr(FSDPModule, "reset_iter_state")


class RunsOutOnce(torch.autograd.Function):
    """Identity in the forward pass; the first backward pass fails here, after later blocks."""

    armed = True

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        if RunsOutOnce.armed:
            RunsOutOnce.armed = False
            raise torch.OutOfMemoryError("pretended")
        return gradient


def run_out_above(limit: int, step: Step, monkeypatch) -> tuple[dict, list[int]]:
    """A step on a device that holds `limit` samples: its metrics, and the sizes it tried."""
    forward = type(step.models.policy).forward
    tried = []

    def small_device(policy, packed, *rest):
        tried.append(len(packed.sequence_lengths) // 2)  # a text and an image each
        if tried[-1] > limit:
            raise torch.OutOfMemoryError("pretended")
        return forward(policy, packed, *rest)

    batches = step.batches()
    with monkeypatch.context() as patched:
        patched.setattr(type(step.models.policy), "forward", small_device)
        return step.update(batches), tried


@pytest.mark.skipif(not CAN_RESTART, reason="restarting after out of memory needs torch 2.13")
@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo"])
def test_out_of_memory_halves_the_micro_batch_and_changes_nothing(monkeypatch, loss_type):
    settings = {"loss_type": loss_type, "gradient_accumulation_steps": 2, "learning_rate": 1e-3}
    with one_step(**settings) as step:
        expected, tried = run_out_above(4, step, monkeypatch)
        assert tried == [4, 4]
        assert expected.pop("micro_batch_pieces") == 1
        assert expected.pop("attn_implementation") == "sdpa"
        weights = step.weights()
    with one_step(**settings) as step:
        losses, tried = run_out_above(1, step, monkeypatch)
        assert tried == [4, 2, *[1] * 8]
        assert losses.pop("micro_batch_pieces") == step.learner.pieces == 4
        cut_weights = step.weights()
    losses.pop("attn_implementation")
    assert losses == pytest.approx(expected, rel=1e-4, abs=1e-6)
    # Adam's first step is the sign of a gradient: where that is near 0, rounding decides.
    for name, weight in weights.items():
        differs = (cut_weights[name] - weight).abs() > 1e-5
        assert differs.float().mean() < 0.01, name


@pytest.mark.skipif(not CAN_RESTART, reason="restarting after out of memory needs torch 2.13")
def test_gradients_of_a_backward_pass_that_ran_out_of_memory_are_discarded():
    whole = gradients()
    with one_step() as step:
        block = step.models.policy.model.language_model.layers[1]
        block.register_forward_hook(lambda module, inputs, output: RunsOutOnce.apply(output))
        RunsOutOnce.armed = True
        found = step.gradients()
        assert step.learner.pieces == 2
    assert not RunsOutOnce.armed
    assert_same_gradients(found, whole)


@pytest.mark.skipif(not CAN_RESTART, reason="restarting after out of memory needs torch 2.13")
def test_a_single_sample_that_does_not_fit_is_reported(monkeypatch):
    with one_step() as step:
        before = step.weights()
        with pytest.raises(UserError, match="single sample; add --gradient_checkpointing true"):
            run_out_above(0, step, monkeypatch)
        after = step.weights()
        assert all(torch.equal(before[name], after[name]) for name in before)


def test_out_of_memory_among_several_ranks_is_reported_at_once(monkeypatch):
    with one_step() as step:
        step.learner.ranks = dataclasses.replace(step.ranks, world_size=2)
        with pytest.raises(UserError, match="raise --gradient_accumulation_steps"):
            run_out_above(4, step, monkeypatch)


def test_gradient_checkpointing_changes_no_gradient():
    assert_same_gradients(gradients(), gradients(gradient_checkpointing=True), rtol=1e-6)


def test_the_gradient_is_that_of_the_loss_written_out():
    """Log-probs of the unsharded model, advantages and a plain mean of means."""
    with one_step() as step:
        found = step.gradients()
        (batch,) = step.batches()
        config = step.config
        policy = open_inputs(config, torch.float32).loaded.model
        copy_weights(step.models.policy, policy)
        text, image = policy(batch.packed)
        counts = step.scored.rollout.text.mask.sum(dim=1).tolist()
        loss = 0.0
        for sample, texts in enumerate(torch.split(text.logprob, counts)):
            images = image.logprob[sample * 4 : sample * 4 + 4]
            logprob = torch.cat([texts, images])
            start = sum(counts[:sample])
            reference = batch.reference_logprob_M[
                [*range(start, start + counts[sample])]
                + [sum(counts) + sample * 4 + i for i in range(4)]
            ]
            gap = reference - logprob
            token = step.scored.advantage_N[sample] * torch.exp(logprob - logprob.detach())
            token = token - config.beta * (torch.exp(gap) - gap - 1)
            loss = loss - token.mean() / len(counts)
        loss.backward()
        expected = {n: p.grad for n, p in policy.named_parameters() if n in found}
        assert_same_gradients(found, expected)


def test_the_direct_gradient_is_that_of_the_reward_written_out():
    """The mean over samples of each one's weighted mean reward per token, and the KL."""
    names, weights = ["image_nsc", "text_entropy"], [1.0, -0.5]
    with one_step(objective="direct", reward_funcs=names, reward_weights=weights) as step:
        found = step.gradients()
        (batch,) = step.batches()
        policy = open_inputs(step.config, torch.float32).loaded.model
        copy_weights(step.models.policy, policy)
        sample_M = pack(step.scored.rollout)[1]
        text, image = policy(batch.packed)
        gap = batch.reference_logprob_M - torch.cat([text.logprob, image.logprob])
        reward_M = torch.cat([-0.5 * text.entropy, image.nsc]) - 0.5 * (gap.exp() - gap - 1)
        samples = len(step.scored.rollout.prompts)
        means = [reward_M[sample_M == sample].mean() for sample in range(samples)]
        (-torch.stack(means).mean()).backward()
        expected = {n: p.grad for n, p in policy.named_parameters() if n in found}
        assert_same_gradients(found, expected)


def test_the_direct_gradient_is_the_same_in_pieces():
    settings = {"objective": "direct", "reward_funcs": ["image_nsc", "text_nsc"]}
    whole = gradients(**settings)
    with one_step(**settings) as step:
        step.learner.pieces = 4
        assert_same_gradients(step.gradients(), whole)


def test_the_direct_objective_raises_the_reward_of_the_same_tokens():
    settings = {"objective": "direct", "reward_funcs": ["image_nsc"], "beta": 0.0}
    with one_step(**settings, learning_rate=1e-4) as step:
        packed, _ = pack(step.scored.rollout)

        def nsc() -> float:
            with torch.no_grad():
                return step.models.policy(packed)[1].nsc.mean().item()

        before = nsc()
        step.update(step.batches())
        assert nsc() > before


def test_num_iterations_2_holds_the_old_log_probs_fixed():
    with one_step(num_iterations=2, learning_rate=3e-3) as step:
        batches = step.batches()
        old = [batch.old_logprob_M.clone() for batch in batches]
        first = step.update(batches)
        assert first["ratio"] == 1
        assert first["clip_ratio"] == 0
        second = step.update(batches)
        assert second["ratio"] != 1
        assert all(torch.equal(a, b.old_logprob_M) for a, b in zip(old, batches, strict=True))
        now = log_probs(step.models.policy, batches[0].packed)
        assert not torch.equal(now, old[0])


def test_with_one_iteration_the_ratio_is_1_and_nothing_is_kept():
    with one_step() as step:
        batches = step.batches()
        assert [batch.old_logprob_M for batch in batches] == [None]
        assert step.update(batches)["ratio"] == 1


def test_a_step_makes_good_samples_likelier_and_bad_ones_rarer():
    with one_step(beta=0.0, learning_rate=1e-4) as step:
        batches = step.batches()
        before = log_probs(step.models.policy, batches[0].packed)
        step.update(batches)
        gain = log_probs(step.models.policy, batches[0].packed) - before
        assert (gain * batches[0].advantage_M).sum() > 0


def test_the_kl_term_alone_pulls_back_to_the_reference():
    with one_step(reward_funcs=["constant"], beta=1.0, learning_rate=1e-6) as step:
        batches = step.batches()
        kl = step.update(batches)["kl"]
        assert kl > 0
        assert step.update(batches)["kl"] < kl


def test_an_offloaded_reference_is_the_same_reference():
    with one_step() as step:
        (expected,) = (batch.reference_logprob_M for batch in step.batches())
    with one_step(offload_reference=True) as step:
        (found,) = (batch.reference_logprob_M for batch in step.batches())
        assert next(step.models.reference.parameters()).device.type == "cpu"
    assert torch.equal(found, expected)


def test_without_beta_there_is_no_reference_and_no_kl():
    with one_step(beta=0.0) as step:
        assert step.models.reference is None
        assert step.update(step.batches())["kl"] == 0


def test_the_samplers_log_probs_are_the_policys():
    with one_step() as step:
        assert step.update(step.batches())["logprob_mismatch"] < 1e-4


def test_tis_corrects_a_sampler_that_underestimates_its_tokens():
    def gradients_with(gap: float, **settings: Any) -> dict[str, torch.Tensor]:
        with one_step(beta=0.0, **settings) as step:
            trace = step.scored.rollout
            for part in (trace.text, trace.image):
                part.conditional.logprob.sub_(gap)
            return step.gradients()

    plain = gradients_with(0.5)
    corrected = gradients_with(0.5, rollout_correction="tis")
    capped = gradients_with(5.0, rollout_correction="tis", rollout_correction_cap=3.0)
    factor = torch.tensor(0.5).exp()
    assert_same_gradients(corrected, {n: g * factor for n, g in plain.items()}, rtol=1e-3)
    assert_same_gradients(capped, {n: g * 3 for n, g in plain.items()}, rtol=1e-3)


@pytest.mark.parametrize("train_image_head", [False, True])
def test_only_what_is_trained_moves(train_image_head):
    with one_step(train_image_head=train_image_head) as step:
        before = step.weights()
        step.update(step.batches())
        after = step.weights()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    trained = {n for n in before if not n.startswith("model.generation_")}
    if train_image_head:
        trained |= {n for n in before if n.startswith("model.generation_head.")}
    assert moved == trained
    assert len(trained) < len(before)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_stops_before_any_weight_changes(bad):
    with one_step() as step:
        before = step.weights()
        batches = step.batches()
        advantage = batches[0].advantage_M.clone()
        advantage[0] = bad
        batches[0] = dataclasses.replace(batches[0], advantage_M=advantage)
        with pytest.raises(UserError, match=r"gradient norm is (nan|inf).*--learning_rate"):
            step.update(batches)
        after = step.weights()
        assert all(torch.equal(before[name], after[name]) for name in before)
        assert not step.optimizer.state


def test_gradients_are_clipped_to_the_norm_and_logged_before():
    with one_step(max_grad_norm=0.01) as step:
        clipped = step.gradients()
        logged = step.update(step.batches())["grad_norm"]
    total = torch.cat([gradient.flatten() for gradient in clipped.values()]).norm().item()
    assert total == pytest.approx(0.01, rel=1e-3)
    assert logged > 0.02
    unclipped = gradients(max_grad_norm=0.0)
    for name in clipped:
        factor = 0.01 / torch.cat([g.flatten() for g in unclipped.values()]).norm()
        torch.testing.assert_close(clipped[name], unclipped[name] * factor, rtol=1e-3, atol=1e-9)


def test_copied_weights_keep_their_addresses():
    with one_step() as step:
        sampler = step.models.sampler.janus
        addresses = [parameter.data_ptr() for parameter in sampler.parameters()]
        before = sampler.lm_head.weight.clone()
        step.update(step.batches())
        assert torch.equal(sampler.lm_head.weight, before)  # a copy, not the policy's own memory
        copy_weights(step.models.policy, sampler)
        assert [parameter.data_ptr() for parameter in sampler.parameters()] == addresses
        copied = dict(sampler.named_parameters())
        for name, weight in step.weights().items():
            assert torch.equal(copied[name], weight)


# --- Schedule and precision -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "warmup", "expected"),
    [
        ("constant", 0, [1, 1, 1, 1]),
        ("linear", 0, [1, 0.75, 0.5, 0.25]),
        ("cosine", 0, [1, 0.853553, 0.5, 0.146447]),
        ("constant", 2, [1 / 3, 2 / 3, 1, 1]),
        ("linear", 2, [1 / 3, 2 / 3, 1, 0.5]),
        ("linear", 9, [0.1, 0.2, 0.3, 0.4]),
    ],
)
def test_learning_rate_by_hand(kind, warmup, expected):
    config = quick(
        "unused", learning_rate=2.0, lr_scheduler_type=kind, warmup_steps=warmup, max_steps=4
    )
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=99.0)
    rates = []
    for step in range(4):
        set_learning_rate(optimizer, step, config)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([2 * share for share in expected], rel=1e-5)


def test_the_optimizer_is_adamw_as_configured():
    with one_step(
        learning_rate=1e-4, weight_decay=0.1, adam_beta1=0.8, adam_beta2=0.95, adam_epsilon=1e-6
    ) as step:
        (group,) = step.optimizer.param_groups
        assert isinstance(step.optimizer, torch.optim.AdamW)
        found = [group[name] for name in ("lr", "weight_decay", "betas", "eps")]
        assert found == [1e-4, 0.1, (0.8, 0.95), 1e-6]


def test_bf16_computes_in_bf16_on_float32_weights(here):
    train(quick("bf16", bf16=True))
    train(quick("fp32"))
    for row in metrics("bf16"):
        assert all(abs(v) < 1e6 for v in row.values() if isinstance(v, int | float))
    stored = tensors("bf16", 2)
    assert {tensor.dtype for tensor in stored.values()} == {torch.float32}
    name = "policy.lm_head.weight"
    assert not torch.equal(stored[name], stored[name].bfloat16().float())
    mismatch = [metrics(run)[0]["logprob_mismatch"] for run in ("bf16", "fp32")]
    assert mismatch[0] > 10 * mismatch[1]
