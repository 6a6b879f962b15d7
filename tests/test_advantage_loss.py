"""Advantage and loss against numbers worked out by hand, and against TRL's formulas as TRL writes
them: on right-padded [B, T] tensors with a mask."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from iris_fast.grpo.advantage import group_advantages
from iris_fast.grpo.loss import grpo_loss, token_weights, truncated_importance


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32)


# --- Advantage ------------------------------------------------------------------------------------


def test_advantage_of_two_groups_by_hand():
    # [1, 2, 3, 6]: mean 3, deviations -2 -1 0 3, unbiased variance 14 / 3
    # [0, 0, 0, 4]: mean 1, deviations -1 -1 -1 3, unbiased variance 12 / 3 = 4
    rewards = tensor(1, 2, 3, 6, 0, 0, 0, 4)
    first, second = math.sqrt(14 / 3) + 1e-4, 2 + 1e-4
    expected = [-2 / first, -1 / first, 0, 3 / first, *[-1 / second] * 3, 3 / second]
    assert group_advantages(rewards, 4, "group").tolist() == pytest.approx(expected, rel=1e-6)


def test_advantage_over_the_batchs_spread_by_hand():
    # Group means 2 and 4; over all four: mean 3, variance (4 + 0 + 1 + 9) / 3
    scale = math.sqrt(14 / 3) + 1e-4
    expected = [-1 / scale, 1 / scale, -2 / scale, 2 / scale]
    found = group_advantages(tensor(1, 3, 2, 6), 2, "batch")
    assert found.tolist() == pytest.approx(expected, rel=1e-6)


def test_advantage_unscaled_is_the_deviation():
    assert group_advantages(tensor(1, 3, 2, 6), 2, "none").tolist() == [-1, 1, -2, 2]


@pytest.mark.parametrize("scale_rewards", ["group", "batch", "none"])
@pytest.mark.parametrize("reward", [-81.7, -1234.567, 0.1, 0.0])
def test_equal_rewards_give_exactly_no_advantage(scale_rewards, reward):
    """Also where the mean of eight equal numbers is another number, as that of -81.7 is."""
    rewards = torch.full((16,), reward)
    rewards[8:] += torch.arange(8)  # the other group has a spread
    found = group_advantages(rewards, 8, scale_rewards)
    assert found[:8].tolist() == [0] * 8
    assert (found[8:] != 0).all()


reward_lists = st.lists(st.floats(-100, 100, width=32), min_size=4, max_size=4)


@given(reward_lists, reward_lists)
def test_groups_do_not_see_each_other(first, second):
    together = group_advantages(tensor(*first, *second), 4, "group")
    alone = [group_advantages(tensor(*group), 4, "group") for group in (first, second)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-6, atol=1e-9)


@given(reward_lists, st.sampled_from(["group", "batch", "none"]))
def test_advantages_sum_to_0_and_order_as_the_rewards(rewards, scale_rewards):
    found = group_advantages(tensor(*rewards), 4, scale_rewards)
    assert abs(found.sum().item()) <= 1e-3 * found.abs().max().clamp(min=1).item()
    best = max(range(4), key=lambda i: rewards[i])
    assert found[best] == found.max()


# --- One token ------------------------------------------------------------------------------------


def one_token(
    ratio: float, advantage: float, *, epsilon: float = 0.2, epsilon_high: float | None = None
):
    """Loss and gradient with respect to the log-prob of a single token, without a reference."""
    logprob = tensor(math.log(ratio)).requires_grad_()
    loss = grpo_loss(
        logprob,
        tensor(0.0),
        None,
        tensor(advantage),
        tensor(1.0),
        beta=0.5,
        epsilon=epsilon,
        epsilon_high=epsilon if epsilon_high is None else epsilon_high,
    )
    loss.value.backward()
    return loss, logprob.grad.item()


@pytest.mark.parametrize(
    ("ratio", "advantage", "value", "gradient", "clipped"),
    [
        # d/dlogprob of -ratio * A is -ratio * A; where the clip decides, 0.
        (1.0, 2.0, -2.0, -2.0, False),
        (1.0, -2.0, 2.0, 2.0, False),
        (1.1, 2.0, -2.2, -2.2, False),
        (1.5, 2.0, -2.4, 0.0, True),  # gained enough: min picks 1.2 * 2
        (1.5, -2.0, 3.0, 3.0, False),  # got likelier and is bad: no clip
        (0.5, 2.0, -1.0, -1.0, False),  # got rarer and is good: no clip
        (0.5, -2.0, 1.6, 0.0, True),  # lost enough: max picks 0.8 * 2
        (1.5, 0.0, 0.0, 0.0, False),
    ],
)
def test_clipped_ratio_by_hand(ratio, advantage, value, gradient, clipped):
    loss, found = one_token(ratio, advantage)
    assert loss.value.item() == pytest.approx(value, rel=1e-6)
    assert found == pytest.approx(gradient, rel=1e-6)
    assert loss.clipped_M.tolist() == [clipped]
    assert loss.ratio_M.item() == pytest.approx(ratio, rel=1e-6)
    assert loss.kl_M.tolist() == [0]


def test_truncated_importance_by_hand_weighs_the_gain_and_not_the_kl():
    # The trainer finds the first token 1.5 times as likely as the sampler did, the second 8 times.
    old, sampler = tensor(math.log(0.6), math.log(0.8)), tensor(math.log(0.4), math.log(0.1))
    correction = truncated_importance(old, sampler, cap=2.0)
    assert correction.tolist() == pytest.approx([1.5, 2.0])
    logprob = old.clone().requires_grad_()
    reference = old + math.log(2)
    loss = grpo_loss(
        logprob, old, reference, tensor(1.0, -3.0), tensor(0.5, 0.5), correction,
        beta=0.1, epsilon=0.2, epsilon_high=0.2,
    )  # fmt: skip
    k3 = 2 - math.log(2) - 1
    assert loss.value.item() == pytest.approx(0.5 * (-1.5 + 6.0) + 0.1 * k3)
    loss.value.backward()
    # d k3 / d logprob = 1 - exp(reference - logprob) = -1
    assert logprob.grad.tolist() == pytest.approx([0.5 * (-1.5 - 0.1), 0.5 * (6.0 - 0.1)])


def test_epsilon_high_moves_the_upper_end_alone():
    loss, _ = one_token(1.5, 1.0, epsilon=0.2, epsilon_high=0.28)
    assert loss.value.item() == pytest.approx(-1.28)
    loss, _ = one_token(0.5, -1.0, epsilon=0.2, epsilon_high=0.28)
    assert loss.value.item() == pytest.approx(0.8)


def kl_of(logprob: float, reference: float) -> tuple[float, float, float]:
    """Loss value, its gradient and the logged KL of one token with A = 0 and beta = 1."""
    current = tensor(logprob).requires_grad_()
    loss = grpo_loss(
        current,
        current.detach(),
        tensor(reference),
        tensor(0.0),
        tensor(1.0),
        beta=1.0,
        epsilon=0.2,
        epsilon_high=0.2,
    )
    loss.value.backward()
    return loss.value.item(), current.grad.item(), loss.kl_M.item()


def test_k3_by_hand():
    # gap = ref - lp = ln 2: exp(gap) - gap - 1 = 1 - ln 2, gradient -exp(gap) + 1 = -1
    value, gradient, logged = kl_of(-2.0, -2.0 + math.log(2))
    assert value == logged == pytest.approx(1 - math.log(2), rel=1e-5)
    assert gradient == pytest.approx(-1, rel=1e-5)
    # gap = -ln 2: 1/2 + ln 2 - 1, gradient 1/2: the policy is pulled back down
    value, gradient, _ = kl_of(-2.0, -2.0 - math.log(2))
    assert value == pytest.approx(math.log(2) - 0.5, rel=1e-5)
    assert gradient == pytest.approx(0.5, rel=1e-5)


@given(st.floats(-30, 0, width=32))
def test_k3_and_its_gradient_vanish_at_the_reference(logprob):
    assert kl_of(logprob, logprob) == (0, 0, 0)


@given(st.floats(-10, 0, width=32), st.floats(-10, 0, width=32))
def test_k3_is_never_negative_and_pulls_towards_the_reference(logprob, reference):
    value, gradient, _ = kl_of(logprob, reference)
    assert value >= -1e-6
    if abs(logprob - reference) > 1e-3:
        assert (gradient > 0) == (logprob > reference)


def test_beta_weighs_the_kl_and_0_drops_it():
    arguments = [tensor(-1.0), tensor(-1.0), tensor(-1.0 + math.log(2)), tensor(0.0), tensor(1.0)]
    for beta in (0.0, 0.01, 2.0):
        loss = grpo_loss(*arguments, beta=beta, epsilon=0.2, epsilon_high=0.2)
        assert loss.value.item() == pytest.approx(beta * (1 - math.log(2)), abs=1e-6)


# --- A batch, against TRL -------------------------------------------------------------------------

LENGTHS = [5, 1, 3, 7, 2, 2, 6, 4]
MAX_COMPLETION = 9
BETA, EPSILON, EPSILON_HIGH = 0.04, 0.2, 0.28


def batch(seed: int = 0) -> dict[str, torch.Tensor]:
    """Padded [B, T] log-probs as TRL holds them; the pads hold numbers that would show."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(LENGTHS), max(LENGTHS))
    mask = torch.arange(shape[1])[None] < torch.tensor(LENGTHS)[:, None]
    policy = -3 * torch.rand(shape, generator=generator)
    return {
        "mask": mask,
        "policy": policy.masked_fill(~mask, -77.0),
        "old": policy + 0.3 * torch.randn(shape, generator=generator),
        "reference": policy + 0.3 * torch.randn(shape, generator=generator),
        "advantage": torch.randn(len(LENGTHS), generator=generator),
    }


def trl_loss(
    part: dict[str, torch.Tensor], policy: torch.Tensor, loss_type: str, step_tokens: float
) -> torch.Tensor:
    """GRPOTrainer._compute_loss of one micro-batch, before division by the accumulation steps.

    `step_tokens`: num_items_in_batch / num_processes, which only dapo divides by.
    """
    mask = part["mask"].float()
    per_token_kl = torch.exp(part["reference"] - policy) - (part["reference"] - policy) - 1
    coef_1 = torch.exp(policy - part["old"])
    coef_2 = torch.clamp(coef_1, 1 - EPSILON, 1 + EPSILON_HIGH)
    advantages = part["advantage"].unsqueeze(1)
    per_token_loss = -torch.min(coef_1 * advantages, coef_2 * advantages) + BETA * per_token_kl
    per_token_loss = torch.where(part["mask"], per_token_loss, 0.0)
    if loss_type == "grpo":
        return ((per_token_loss * mask).sum(-1) / mask.sum(-1).clamp(min=1.0)).mean()
    if loss_type == "bnpo":
        return (per_token_loss * mask).sum() / mask.sum().clamp(min=1.0)
    if loss_type == "dr_grpo":
        return (per_token_loss * mask).sum() / (per_token_loss.size(0) * MAX_COMPLETION)
    return (per_token_loss * mask).sum() / step_tokens


def our_loss(
    part: dict[str, torch.Tensor],
    policy: torch.Tensor,
    loss_type: str,
    step_tokens: float,
    accumulation: int,
) -> torch.Tensor:
    """The same micro-batch as tokens of no particular order."""
    mask = part["mask"]
    rows = torch.arange(len(mask))[:, None].expand(mask.shape)[mask]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(1))
    sample_M = rows[order]
    weight_M = token_weights(
        loss_type,
        sample_M,
        len(mask),
        max_completion_length=MAX_COMPLETION,
        tokens_per_rank=step_tokens,
        accumulation=accumulation,
    )
    return grpo_loss(
        policy[mask][order],
        part["old"][mask][order],
        part["reference"][mask][order],
        part["advantage"][sample_M],
        weight_M,
        beta=BETA,
        epsilon=EPSILON,
        epsilon_high=EPSILON_HIGH,
    ).value


LOSS_TYPES = ["grpo", "bnpo", "dr_grpo", "dapo"]


@pytest.mark.parametrize("accumulation", [1, 2, 4])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_loss_and_gradient_are_trls(loss_type, accumulation):
    whole = batch()
    step_tokens = float(sum(LENGTHS))
    gradients, values = [], []
    for ours in (True, False):
        policy = whole["policy"].clone().requires_grad_()
        value = 0.0
        for rows in torch.arange(len(LENGTHS)).chunk(accumulation):
            part = {name: field[rows] for name, field in whole.items()}
            if ours:
                loss = our_loss(part, policy[rows], loss_type, step_tokens, accumulation)
            else:
                loss = trl_loss(part, policy[rows], loss_type, step_tokens)
                # dapo's divisor already counts all micro-batches; the others are averaged.
                loss = loss if loss_type == "dapo" else loss / accumulation
            loss.backward()
            value += loss.item()
        values.append(value)
        gradients.append(policy.grad)
    assert values[0] == pytest.approx(values[1], rel=1e-5)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-5, atol=1e-7)
    assert gradients[0][~whole["mask"]].abs().max() == 0
    assert gradients[0][whole["mask"]].abs().max() > 0


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("accumulation", [1, 2, 4])
@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "dapo"])
def test_how_a_step_is_split_changes_nothing(loss_type, accumulation, ranks):
    """All but bnpo, whose very definition is per micro-batch."""
    whole = batch()
    expected = trl_loss(whole, whole["policy"], loss_type, float(sum(LENGTHS))).item()
    per_rank = []
    for rank_rows in torch.arange(len(LENGTHS)).chunk(ranks):
        parts = [
            {name: field[rows] for name, field in whole.items()}
            for rows in rank_rows.chunk(accumulation)
        ]
        step_tokens = sum(LENGTHS) / ranks
        losses = [
            our_loss(part, part["policy"], loss_type, step_tokens, accumulation) for part in parts
        ]
        per_rank.append(sum(loss.item() for loss in losses))
    assert sum(per_rank) / ranks == pytest.approx(expected, rel=1e-5)


def test_bnpo_depends_on_the_split_and_says_so():
    whole = batch()
    halves = [{name: field[rows] for name, field in whole.items()} for rows in ([0, 1], [2, 3])]
    both = {name: field[:4] for name, field in whole.items()}
    cut = sum(our_loss(part, part["policy"], "bnpo", 1.0, 2).item() for part in halves)
    assert cut != pytest.approx(our_loss(both, both["policy"], "bnpo", 1.0, 1).item(), rel=1e-3)
    assert "depends on how the batch is split" in token_weights.__doc__


def test_a_sample_without_tokens_costs_nothing():
    weights = token_weights(
        "grpo",
        torch.tensor([0, 0, 2]),
        3,
        max_completion_length=4,
        tokens_per_rank=3,
        accumulation=1,
    )
    assert weights.tolist() == pytest.approx([1 / 6, 1 / 6, 1 / 3])
