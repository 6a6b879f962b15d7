"""Classifier-free guidance, sampling and the sampled token's statistics, in one kernel launch.

    mixed_j = uncond_j + cfg_weight (cond_j - uncond_j)
    token   ~ softmax(mixed / temperature), after top_k, top_p and min_p
    conditional = token_stats(cond, token)                 at temperature 1
    guided      = token_stats(mixed, token, temperature)   before truncation

Bytes moved for R rows of b-byte logits: 2 R V b; the second pass over a row hits the cache.

Sampling is the inverse CDF over integer weights: the same logits and uniform give the same token,
whatever the backend, the block size and the other rows (see `_inverse_cdf`).

Shapes: R rows, V columns.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .._backend import backend, calls_directly
from .._checks import (
    check_logits,
    check_per_row,
    check_range,
    check_same_layout,
    check_scalar,
    check_temperature,
    check_truncation,
    check_vocab_size,
    last_dim_contiguous,
)
from .._inverse_cdf import truncation_threshold
from .._ops import add_op_namespace_prefix
from .._scalars import to_kernel_argument, to_scalar_tensor
from ..token_stats import TokenStats
from .cpp_path import sample_cpp
from .outputs import Recording, empty_outputs
from .torch_path import flat_rows, mix, sample_torch
from .triton_path import sample_triton


class GuidedSample(NamedTuple):
    """Sampled tokens (int64) and their statistics under both distributions."""

    token_ids: Tensor
    conditional: TokenStats
    guided: TokenStats


# --- Custom op ------------------------------------------------------------------------------------


@torch.library.custom_op(add_op_namespace_prefix("guided_sample"), mutates_args=())
def _guided_sample_op(
    cond: Tensor, uncond: Tensor | None, uniform: Tensor, cfg_weight: Tensor, temperature: Tensor,
    greedy: bool, top_k: int, top_p: float, min_p: float, vocab_size: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    shape = cond.shape[:-1]
    if not uniform.numel():
        return empty_outputs(cond, shape)
    arguments = (
        cond, uncond, uniform, to_kernel_argument(cfg_weight), to_kernel_argument(temperature),
        greedy, top_k, top_p, min_p, vocab_size,
    )  # fmt: skip
    tokens, conditional, guided = sample(*arguments)
    return tokens.view(shape), conditional.view(4, *shape), guided.view(4, *shape)


def sample(
    cond, uncond, uniform, cfg_weight, temperature, greedy, top_k, top_p, min_p, vocab_size,
    recording: Recording | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """What the path for `cond` returns, at the threshold of the truncation."""
    path, threshold = backend(cond), None
    if recording is not None and path != "triton" and recording.step.is_cpu:
        step, room = int(recording.step), recording.token_ids.shape[1]
        if not 0 <= step < room:
            raise IndexError(f"step is {step}: it must lie in [0, {room})")
    if uniform.is_cpu and path != "cpp" and not _in_unit_interval(uniform):
        raise ValueError("uniform holds numbers outside [0, 1): pass the result of torch.rand")
    if not greedy and (0 < top_k < vocab_size or top_p < 1 or min_p > 0):
        mixed = mix(flat_rows(cond, vocab_size), flat_rows(uncond, vocab_size), cfg_weight)
        threshold = truncation_threshold(mixed, temperature, top_k, top_p, min_p)
    run = {"triton": sample_triton, "cpp": sample_cpp, "torch": sample_torch}[path]
    return run(
        cond, uncond, uniform.reshape(-1), threshold, cfg_weight, temperature, greedy, vocab_size,
        recording,
    )  # fmt: skip


def _in_unit_interval(uniform: Tensor) -> bool:
    lowest, highest = torch.aminmax(uniform)
    return float(lowest) >= 0 and float(highest) < 1


@_guided_sample_op.register_fake
def _(cond, *_):
    return empty_outputs(cond, cond.shape[:-1])


# --- Public ---------------------------------------------------------------------------------------


def guided_sample(
    cond_logits: Tensor,
    uncond_logits: Tensor | None,
    uniform: Tensor,
    *,
    cfg_weight: float | Tensor,
    temperature: float | Tensor = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    vocab_size: int | None = None,
) -> GuidedSample:
    """Sample one token per row from guided logits, and score it under both distributions.

    mixed = uncond + cfg_weight * (cond - uncond) in float32, or cond if `uncond_logits` is None.
    The token is the inverse CDF of softmax(mixed / temperature) at `uniform`: the first column
    whose cumulative probability exceeds it. A pure function: no random state, no host sync, safe in
    a CUDA graph, the same token on every backend and in every batch. A class of probability 0 is
    never sampled.

    Truncation is that of Hugging Face's generate, in its order: top_k keeps the k largest, top_p
    the smallest set of the largest whose probability reaches top_p, min_p those with at least min_p
    times the largest probability. Ties with the last one kept are kept. On a GPU, untruncated
    sampling is one kernel launch; truncation adds torch's topk or sort.

    Args:
        cond_logits: (..., V) float32, bfloat16 or float16. Strides as in `token_stats`, but a copy
            is also made if the leading dimensions do not merge into two.
        uncond_logits: the same shape, dtype and device, or None for plain sampling.
        uniform: (...) float32 in [0, 1), one random number per row, from the caller.
        cfg_weight: guidance; 1 is the conditional distribution. A run-time value, as is
            `temperature`; a 0-dim tensor is read again in every replay of a graph.
        temperature: a positive number; the number 0 is greedy: the first largest mixed logit,
            whatever `uniform` and the truncation (`guided` is then taken at temperature 1).
        top_k: 0 keeps all. top_p: 1 keeps all. min_p: 0 keeps all.
        vocab_size: columns from here on are padding. None: no padding.

    Returns:
        GuidedSample(token_ids int64 (...), conditional, guided), both TokenStats of float32 (...):
        `conditional` of the cond logits at temperature 1, `guided` of mixed / temperature, each
        over all V classes: a truncated distribution has nsc -inf. No output carries gradients;
        score the tokens again with `token_stats` to train on them.
        A class at -inf in either branch is masked. A row in which every logit is -inf gives token
        0 with logprob -inf. NaN logits are never sampled, and make the row's statistics NaN.

    Raises:
        ValueError: an argument of the wrong shape, dtype, device or range; `uniform` outside
            [0, 1), which is checked on the CPU only; on a GPU it is clamped.
    """
    rows = cond_logits.shape[:-1]
    cond_logits, uncond_logits, temperature, truncation = checked(
        cond_logits, uncond_logits, cfg_weight, temperature, top_k, top_p, min_p, vocab_size
    )
    check_uniform("uniform", uniform, rows, cond_logits.device)
    if calls_directly(cond_logits, uncond_logits, uniform) and uniform.numel():
        numbers = float(cfg_weight), float(temperature)
        tokens, conditional, guided = sample(
            cond_logits, uncond_logits, uniform.detach(), *numbers, *truncation
        )
        if len(rows) != 1:
            tokens = tokens.view(rows)
            conditional, guided = conditional.view(4, *rows), guided.view(4, *rows)
        return GuidedSample(tokens, TokenStats(*conditional), TokenStats(*guided))
    token_ids, conditional, guided = _guided_sample_op(
        cond_logits, uncond_logits, uniform.detach(),
        to_scalar_tensor(cfg_weight, cond_logits), to_scalar_tensor(temperature, cond_logits),
        *truncation,
    )  # fmt: skip
    return GuidedSample(token_ids, TokenStats(*conditional), TokenStats(*guided))


def checked(cond, uncond, cfg_weight, temperature, top_k, top_p, min_p, vocab_size):
    """The logits without gradients, the temperature, and (greedy, top_k, top_p, min_p, V)."""
    check_logits("cond_logits", cond)
    if cond.dtype == torch.float64:
        raise ValueError("cond_logits has dtype torch.float64: cast it with .float()")
    if uncond is not None:
        check_same_layout(cond, uncond)
        uncond = last_dim_contiguous(uncond.detach())
    check_scalar("cfg_weight", cfg_weight, cond)
    if not isinstance(cfg_weight, Tensor):
        check_range("cfg_weight", cfg_weight, -math.inf < cfg_weight < math.inf, "a finite number")
    check_temperature(temperature, cond, zero_allowed=True)
    greedy = not isinstance(temperature, Tensor) and temperature == 0
    check_truncation(top_k, top_p, min_p)
    vocab_size = check_vocab_size(vocab_size, cond.shape[-1])
    truncation = (greedy, top_k, float(top_p), float(min_p), vocab_size)
    cond = last_dim_contiguous(cond.detach())
    return cond, uncond, 1.0 if greedy else temperature, truncation


def check_uniform(name: str, uniform: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    """Raise ValueError unless these are random numbers of this shape on the device."""
    check_per_row(name, uniform, shape, device)
    if uniform.dtype != torch.float32:
        raise ValueError(f"{name} has dtype {uniform.dtype}: pass float32")


def guided_sample_reference(
    cond_logits: Tensor, uncond_logits: Tensor, uniform: Tensor, *,
    cfg_weight: float, temperature: float = 1.0,
) -> Tensor:  # fmt: skip
    """The token in eager torch: softmax, cumsum, searchsorted; exact away from steps of the CDF."""
    mixed = uncond_logits + cfg_weight * (cond_logits - uncond_logits)
    cumulative = torch.softmax(mixed / temperature, -1).cumsum(-1)
    position = uniform[..., None] * cumulative[..., -1:]
    return torch.searchsorted(cumulative, position, right=True)[..., 0]
