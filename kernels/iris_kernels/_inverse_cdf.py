"""Sampling by the inverse CDF over integer weights: the same token on every backend.

The token is the first column whose cumulative weight exceeds uniform * total, with the weights

    w_j = floor(2^40 exp2(t_j)),    t_j = (x_j - max x) log2(e) / T

Sums of integers do not depend on their order, and exp2 is a fixed polynomial of separately rounded
fp32 operations, so torch and Triton agree in every bit, for any block size and any batch. A class
with p < 2^-40 max p has weight 0: at most V 2^-40 of the probability is lost.
"""

import math

import torch
from torch import Tensor

from ._backend import constant, jit, tl
from ._row_stats import LOG2_E, any_row, safe_max

# 2^f on [-1/2, 1/2] to 1.9e-7: 1 + f (c1 + f (c2 + ...)), minimax by Lawson's iteration.
EXP2_POLYNOMIAL = (
    0.6931470036506653,
    0.24022242426872253,
    0.05550733581185341,
    0.009671512991189957,
    0.001326472731307149,
)
MIN_T = -64.0  # the weight is already 0 here, and the exponent still fits a float
ROUND = 1.5 * 2**23  # t + ROUND has no fraction bits: its low bits are round(t)
ROUND_BITS = 0x4B400000  # ROUND as bits
WEIGHT_BITS = 40
EXPONENT = 127 + WEIGHT_BITS - ROUND_BITS  # bits of t + ROUND -> exponent field of the weight
_C1, _C2, _C3, _C4, _C5 = (constant(c) for c in EXP2_POLYNOMIAL)
_MIN_T, _ROUND, _EXPONENT = constant(MIN_T), constant(ROUND), constant(EXPONENT)


@jit
def kernel_weights(mixed, m, threshold, scale, GREEDY: tl.constexpr):
    """Integer sampling weights; compile without floating-point fusion, see the module docstring."""
    if GREEDY:
        weights = tl.where(mixed == m, 1, 0).to(tl.int64)
    else:
        # NaN becomes _MIN_T, which gives weight 0. The difference is also that of `shifted_exp`.
        t = tl.maximum((mixed - safe_max(m)) * scale, _MIN_T)
        shifted = t + _ROUND
        f = t - (shifted - _ROUND)
        power = 1.0 + f * (_C1 + f * (_C2 + f * (_C3 + f * (_C4 + f * _C5))))
        exponent = shifted.to(tl.int32, bitcast=True) + _EXPONENT
        power *= (exponent << 23).to(tl.float32, bitcast=True)
        if threshold is not None:
            power = tl.where(mixed >= threshold, power, 0.0)
        weights = power.to(tl.int64)
    return weights


def weight_scale(temperature: float | Tensor, device: torch.device) -> Tensor:
    """log2(e) / T, divided in fp32 as the kernel does."""
    if not isinstance(temperature, Tensor):
        # Filled on the device: a copy from the host cannot be captured in a CUDA graph.
        temperature = torch.full((), temperature, dtype=torch.float32, device=device)
    temperature = temperature.float()
    return torch.full_like(temperature, LOG2_E) / temperature


def without_nan(mixed: Tensor) -> tuple[Tensor, Tensor]:
    """`mixed` with NaN as -inf, because NaN is never sampled, and its maximum [R, 1]."""
    row_max = mixed.amax(-1, keepdim=True)
    if any_row(row_max.isnan()):  # one NaN makes the maximum NaN
        mixed = mixed.masked_fill(mixed.isnan(), -math.inf)
        row_max = mixed.amax(-1, keepdim=True)
    return mixed, row_max


def sampling_weights(mixed: Tensor, row_max: Tensor, scale: Tensor) -> Tensor:
    """floor(2^40 exp2((mixed - row_max) scale)) as int64, the same bits as in the kernel."""
    t = mixed.sub(row_max).mul_(scale)
    t = torch.fmax(t, t.new_full((), MIN_T))  # NaN becomes MIN_T, which gives weight 0
    shifted = t + ROUND
    f = t.sub_(shifted - ROUND)
    power = f * EXP2_POLYNOMIAL[-1]
    for coefficient in (*EXP2_POLYNOMIAL[-2::-1], 1.0):
        power.add_(coefficient)
        if coefficient != 1.0:
            power.mul_(f)
    power *= (shifted.view(torch.int32).add_(EXPONENT) << 23).view(torch.float32)
    return power.to(torch.int64)


def truncation_threshold(
    mixed: Tensor, temperature: float | Tensor, top_k: int, top_p: float, min_p: float
) -> Tensor | None:
    """The smallest mixed logit [R] that top_k, then top_p, then min_p keep; None: all are kept."""
    thresholds = []
    mixed, row_max = without_nan(mixed)
    scale = weight_scale(temperature, mixed.device)
    if 0 < top_k < mixed.shape[-1]:
        thresholds.append(mixed.topk(top_k, dim=-1).values[:, -1])
    if top_p < 1:
        ordered = mixed.sort(-1, descending=True).values
        weights = sampling_weights(ordered, row_max, scale)
        if thresholds:
            weights.masked_fill_(ordered < thresholds[0][:, None], 0)
        cumulative = weights.cumsum(-1)
        needed = cumulative[:, -1:].double() * top_p
        kept = ((cumulative - weights).double() < needed).sum(-1, keepdim=True)
        thresholds.append(ordered.gather(-1, kept.sub_(1).clamp_(min=0))[:, 0])
    if min_p > 0:
        thresholds.append(row_max[:, 0] + math.log(min_p) * temperature)
    if not thresholds:
        return None
    return torch.stack(thresholds).amax(0)


def sample_tokens(
    mixed: Tensor,
    uniform: Tensor,
    threshold: Tensor | None,
    temperature: float | Tensor,
    greedy: bool,
) -> Tensor:
    """Tokens [R] of mixed logits [R, V] at `uniform` [R], among those >= `threshold` [R]."""
    mixed, row_max = without_nan(mixed)
    if greedy:
        return mixed.argmax(-1)  # the first one
    weights = sampling_weights(mixed, row_max, weight_scale(temperature, mixed.device))
    if threshold is not None:
        weights.masked_fill_(mixed < threshold[:, None], 0)
    cumulative = weights.cumsum(-1)
    total = cumulative[:, -1]
    position = torch.minimum((uniform.double() * total.double()).long(), total - 1)
    token = torch.searchsorted(cumulative, position[:, None], right=True)[:, 0]
    return token.masked_fill_(total == 0, 0)
