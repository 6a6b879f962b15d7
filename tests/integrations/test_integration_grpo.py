"""TRL's fused head and its own GRPOTrainer, before and after the patch."""

import pytest
import torch
from integration_inputs import assert_within

pytest.importorskip("trl", reason="TRL is not installed")
from iris_kernels import integrations
from iris_kernels.integrations import SelfCertaintyReward
from iris_kernels.integrations import trl as ours
from tiny_trl import train
from trl.kernels import ChunkedLogProbFunction

N, D, V = 13, 32, 501


@pytest.fixture(autouse=True)
def unpatched(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    integrations.unpatch_trl(quiet=True)
    yield
    integrations.unpatch_trl(quiet=True)


def head_inputs(dtype, bias):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    targets = torch.randint(0, V, (N,), generator=generator)
    return normal(N, D), normal(V, D) * 0.4, normal(V) if bias else None, targets


def run_head(head, inputs, dtype, *arguments):
    """Outputs, and gradients of a random weighting of log-probs and entropy."""
    *tensors, targets = inputs
    leaves = [None if t is None else t.to(dtype).requires_grad_() for t in tensors]
    out = head.apply(*leaves, targets, *arguments)
    generator = torch.Generator().manual_seed(1)
    total = sum((o * torch.randn(N, generator=generator).to(o)).sum() for o in out[:2])
    return out, torch.autograd.grad(total, [leaf for leaf in leaves if leaf is not None])


class Plain:
    """The definition, in the dtype of its inputs."""

    @staticmethod
    def apply(hidden, weight, bias, targets, temperature, chunk_size, softcap, scale, outputs):
        logits = torch.nn.functional.linear(hidden, weight, bias) * scale / temperature
        logprobs = logits.log_softmax(-1)
        entropy = -(logprobs.exp() * logprobs).sum(-1)
        return logprobs.gather(-1, targets[:, None])[:, 0], entropy, None, logits.mean(-1), None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("temperature", "scale"), [(1.0, 1.0), (0.7, 2.5)])
def test_fused_head(dtype, bias, temperature, scale):
    inputs = head_inputs(dtype, bias)
    arguments = (temperature, 128, None, scale, ("entropy", "mean_logits"))
    (mine, my_grads), (theirs, their_grads), (oracle, oracle_grads) = (
        run_head(ours.FusedHead, inputs, dtype, *arguments),
        run_head(ChunkedLogProbFunction, inputs, dtype, *arguments),
        run_head(Plain, inputs, torch.float64, *arguments),
    )
    for m, t, o in zip(mine, theirs, oracle, strict=True):
        assert (m is None) == (t is None)
        if m is not None:
            assert m.shape == t.shape
            assert_within(m.detach(), t.detach(), o.detach())
    assert not mine[3].requires_grad
    for m, t, o in zip(my_grads, their_grads, oracle_grads, strict=True):
        assert m.dtype == t.dtype
        assert_within(m, t, o)


def test_only_requested_outputs_are_returned():
    out = ours.FusedHead.apply(*head_inputs(torch.float32, False), 1.0, 128, None, 1.0, ())
    assert [o is None for o in out] == [False, True, True, True, True]


def test_the_head_is_computed_in_the_dtype_of_the_hidden_states():
    hidden, weight, _, targets = head_inputs(torch.bfloat16, False)
    arguments = (None, targets, 1.0, 128, None, 1.0, ("entropy",))
    mine, theirs = (
        head.apply(hidden.float(), weight, *arguments)
        for head in (ours.FusedHead, ChunkedLogProbFunction)
    )
    torch.testing.assert_close(mine[0], theirs[0])
    with torch.autocast("cpu", torch.bfloat16):
        mine = ours.FusedHead.apply(hidden.float(), weight.float(), *arguments)
    torch.testing.assert_close(mine[0], theirs[0], atol=0.05, rtol=0.02)


def test_the_head_works_without_the_patch():
    hidden, weight, _, targets = head_inputs(torch.float32, False)
    with pytest.warns(UserWarning, match="is_top1"):
        mine = ours.FusedHead.apply(hidden, weight, None, targets, 1.0, 128)
    theirs = ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, 128)
    for left, right in zip(mine, theirs, strict=True):
        torch.testing.assert_close(left, right)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ((None, 1.0, ("is_top1",)), "is_top1"),
        ((None, 1.0, ("entropy", "log_sum_sq_probs")), "log_sum_sq_probs"),
        ((30.0, 1.0, ("entropy",)), "softcapped"),
        ((None, -1.0, ("entropy",)), "logit_scale"),
    ],
)
def test_unsupported_arguments_use_trls_head_with_a_warning(arguments, word):
    inputs = (*head_inputs(torch.float32, True), 1.0, 128, *arguments)
    expected = ChunkedLogProbFunction.apply(*inputs)
    integrations.patch_trl(quiet=True)
    with pytest.warns(UserWarning, match=word):
        got = ours.FusedHead.apply(*inputs)
    for mine, theirs in zip(got, expected, strict=True):
        assert (mine is None) == (theirs is None)
        assert mine is None or torch.equal(mine, theirs)


def test_three_steps_of_grpo_are_the_same_before_and_after_the_patch(tmp_path, monkeypatch):
    """Real trainer, tiny random Llama, KL to a reference, several updates per rollout."""
    settings = {"temperature": 0.9, "num_iterations": 2}
    before = train(tmp_path / "before", SelfCertaintyReward, **settings)

    calls = []
    linear = ours.linear_token_stats
    monkeypatch.setattr(
        ours, "linear_token_stats", lambda *a, **k: calls.append(a[0].shape) or linear(*a, **k)
    )
    replaced = integrations.patch_trl(quiet=True)
    assert "trl.trainer.utils._ChunkedLogProbFunction" in replaced
    after = train(tmp_path / "after", SelfCertaintyReward, **settings)
    assert len(calls) >= 3  # our head computed the log-probs of every step

    integrations.unpatch_trl(quiet=True)
    count = len(calls)
    again = train(tmp_path / "again", SelfCertaintyReward, **settings)
    assert len(calls) == count

    assert len(before) == len(after) == 3
    for key in ("loss", "grad_norm", "kl", "entropy"):
        values = [[line[key] for line in run] for run in (before, after, again)]
        assert values[1] == pytest.approx(values[0], rel=1e-3, abs=1e-5), key
        assert values[2] == values[0], key
    assert max(abs(line["loss"]) for line in before) > 1e-3
    assert any(line["grad_norm"] > 1e-2 for line in before)
