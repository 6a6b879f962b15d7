"""`token_stats` of logits whose vocabulary is sharded over the ranks of a process group.

Rank r holds V_r adjacent columns, in the order of the ranks. Each rank computes `token_stats` of
its own columns. With w_r = exp(lse_r - lse), the probability of rank r's columns:

    lse     = logsumexp_r(lse_r)
    logprob = logprob_r + log w_r                        of the rank r that holds the token
    nsc     = sum_r V_r / V (nsc_r + log w_r + log(V / V_r))
    entropy = sum_r w_r (entropy_r - log w_r)

Bytes moved: those of `token_stats` on the shard, and one all-gather of four float32 numbers per
row and rank. Backward communicates nothing: a rank's gradient follows from what was gathered.

Shapes: W ranks, V_r columns here, V in all.
"""

import math

import torch
import torch.distributed as dist
from torch import Tensor

from ._checks import check_logits, check_token_ids, kept_rows
from .token_stats import TokenStats, token_stats


def vocab_parallel_token_stats(
    logits_shard: Tensor,
    token_ids: Tensor,
    group: dist.ProcessGroup | None = None,
    *,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    vocab_size: int | None = None,
) -> TokenStats:
    """`token_stats` of logits whose columns are sharded over the ranks of `group`.

    Args:
        logits_shard: (..., V_r), this rank's columns; the number may differ between ranks. The
            leading shape, `token_ids` and `mask` are the same on every rank.
        token_ids: (...) ids in the whole vocabulary; -100 for a row without a token.
        group: the ranks, in the order of their columns; None: all.
        temperature, mask, vocab_size: as for `token_stats`; `vocab_size` counts over all ranks.

    Returns:
        TokenStats, the same on every rank, float32 (...). The gradient of `logits_shard` is that of
        a loss that every rank computes from them in the same way (it is not summed over ranks).

    Raises:
        ValueError: as `token_stats`; a `vocab_size` beyond the columns of all ranks together.
    """
    check_logits("logits_shard", logits_shard)
    check_token_ids(token_ids, mask, logits_shard)
    widths, rank = _widths(logits_shard, group)
    total = sum(widths)
    if vocab_size is not None and not 0 < vocab_size <= total:
        raise ValueError(
            f"vocab_size is {vocab_size} but the ranks hold {total} columns: pass a number from 1 "
            f"to {total}, or None"
        )
    starts = [sum(widths[:r]) for r in range(len(widths))]
    V = vocab_size or total
    columns = [max(0, min(width, V - s)) for width, s in zip(widths, starts, strict=True)]
    kept = kept_rows(token_ids, mask)
    _check_ids(token_ids, kept, V)
    local = _local_stats(logits_shard, token_ids - starts[rank], kept, temperature, columns[rank])
    gathered = list(_all_gather(local.detach(), group).unbind())
    gathered[rank] = local
    return _combine(torch.stack(gathered), token_ids, kept, starts, columns)


def _widths(logits_shard: Tensor, group: dist.ProcessGroup | None) -> tuple[list[int], int]:
    """Number of columns of every rank, and this rank's index in the group."""
    width = torch.tensor([logits_shard.shape[-1]], device=logits_shard.device)
    return _all_gather(width, group).flatten().tolist(), dist.get_rank(group)


def _all_gather(value: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """[W, ...]: every rank's `value`."""
    parts = [torch.empty_like(value) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, value.contiguous(), group=group)
    return torch.stack(parts)


def _check_ids(token_ids: Tensor, kept: Tensor, vocab_size: int) -> None:
    if token_ids.is_cpu and bool((kept & ((token_ids < 0) | (token_ids >= vocab_size))).any()):
        raise ValueError(
            f"token_ids holds an id outside [0, {vocab_size}): pass -100 for rows without a token"
        )


def _local_stats(
    logits: Tensor, local_ids: Tensor, kept: Tensor, temperature: float | Tensor, columns: int
) -> Tensor:
    """[4, ...] logprob, nsc, entropy, lse of this rank's columns. A token of another rank is
    replaced by column 0; its logprob is not used."""
    if columns == 0:  # all of them are padding
        # Connected to the logits by autograd, so that their gradient is 0 rather than None.
        zeros = torch.where(torch.zeros_like(kept), logits[..., 0].float(), 0.0)
        return torch.stack([zeros, zeros, zeros, zeros - math.inf])
    is_local = (local_ids >= 0) & (local_ids < columns)
    stats = token_stats(
        logits,
        torch.where(is_local, local_ids, 0),
        temperature=temperature,
        mask=kept,
        vocab_size=columns,
    )
    return torch.stack(list(stats))


def _combine(
    stats: Tensor, token_ids: Tensor, kept: Tensor, starts: list[int], widths: list[int]
) -> TokenStats:
    """[W, 4, ...] statistics of the shards -> those of whole rows."""
    logprob, nsc, entropy, lse = stats.unbind(1)
    total = sum(widths)
    # If every logit of every rank is -inf, 0 replaces lse: -inf + inf would be NaN.
    fully_masked = (lse == -math.inf).all(dim=0)
    log_w = torch.log_softmax(lse.masked_fill(fully_masked, 0.0), dim=0)
    no_mass = log_w == -math.inf  # such a rank contributes 0, where 0 * inf would be NaN
    finite_log_w = log_w.masked_fill(no_mass, 0.0)
    whole_entropy = (log_w.exp() * (entropy - finite_log_w)).masked_fill(no_mass, 0.0).sum(dim=0)
    whole_nsc = torch.zeros_like(fully_masked, dtype=lse.dtype)
    whole_logprob = torch.full_like(whole_nsc, math.nan)  # NaN remains if no rank has the token
    for r, (start, columns) in enumerate(zip(starts, widths, strict=True)):
        if columns == 0:
            continue
        owner = (token_ids >= start) & (token_ids < start + columns)
        whole_logprob = torch.where(owner, logprob[r] + log_w[r], whole_logprob)
        share = columns / total
        whole_nsc = whole_nsc + share * (nsc[r] + log_w[r] - math.log(share))
    whole_lse = torch.logsumexp(lse.masked_fill(fully_masked, 0.0), dim=0)
    whole_lse = whole_lse.masked_fill(fully_masked, -math.inf)
    whole_entropy = whole_entropy.masked_fill(fully_masked, 0.0)
    fields = (whole_logprob, whole_nsc, whole_entropy, whole_lse)
    return TokenStats(*(field.masked_fill(~kept, 0.0) for field in fields))
