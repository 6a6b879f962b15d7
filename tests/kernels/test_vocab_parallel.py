"""Two gloo ranks, each with half of the columns, against token_stats of the whole."""

from __future__ import annotations

import gc
import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from iris_kernels import TokenStats, token_stats, vocab_parallel_token_stats

RANKS = 2
INF = math.inf


def logits_of(case: str, V: int) -> torch.Tensor:
    logits = torch.randn(3, 4, V, generator=torch.Generator().manual_seed(len(case))) * 3
    if case == "huge":
        logits *= 1e4
    if case == "masked shard":
        logits[0, :, V // 2 :] = -INF
        logits[1, :, : V // 2] = -INF
    if case == "masked row":
        logits[1, 2] = -INF
    if case == "one-sided":  # nearly all probability on one rank
        logits[..., : V // 2] -= 200
    return logits


# name, columns of rank 0 and rank 1, vocab_size
SPLITS = [
    ("even", 48, 48, None),
    ("uneven", 70, 26, None),
    ("padded columns on the last rank", 48, 48, 90),
    ("a rank of padding alone", 60, 36, 60),
]
CASES = ["plain", "huge", "one-sided", "masked shard", "masked row"]


def check_on_rank(rank: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, RANKS), rank=rank, world_size=RANKS)
    for split, left, right, vocab_size in SPLITS:
        for case in CASES:
            for temperature in (1.0, 0.7):
                check(rank, f"{split}, {case}", left, left + right, vocab_size, case, temperature)
    with pytest.raises(ValueError, match="vocab_size is 97 but the ranks hold 96 columns"):
        vocab_parallel_token_stats(
            torch.zeros(1, 48), torch.zeros(1, dtype=torch.int64), vocab_size=97
        )
    with pytest.raises(ValueError, match="outside"):
        vocab_parallel_token_stats(torch.zeros(1, 48), torch.tensor([96]))
    # References to the destroyed group, such as a caught exception's frames, can abort the
    # process.
    dist.barrier()
    gc.collect()
    dist.destroy_process_group()


def check(
    rank: int, name: str, left: int, V: int, vocab_size: int | None, case: str, temperature: float
) -> None:
    logits = logits_of(case, V)
    generator = torch.Generator().manual_seed(5)
    token_ids = torch.randint(vocab_size or V, (3, 4), generator=generator)
    token_ids[2, 0] = -100
    mask = torch.ones(3, 4, dtype=torch.bool)
    mask[2, 1] = False
    upstream = [torch.randn(3, 4, generator=generator) for _ in TokenStats._fields]
    arguments = {"temperature": temperature, "mask": mask, "vocab_size": vocab_size}

    whole = logits.clone().requires_grad_()
    expected = token_stats(whole, token_ids, **arguments)
    (expected_grad,) = torch.autograd.grad(expected, whole, upstream)

    columns = slice(0, left) if rank == 0 else slice(left, V)
    shard = logits[..., columns].clone().requires_grad_()
    found = vocab_parallel_token_stats(shard, token_ids, **arguments)
    (found_grad,) = torch.autograd.grad(found, shard, upstream)

    scale = 1e4 if case == "huge" else 1.0
    for field, ours, theirs in zip(TokenStats._fields, found, expected, strict=True):
        assert not ours.isnan().any(), f"{name}: {field} has NaN"
        torch.testing.assert_close(
            ours, theirs, rtol=2e-6, atol=2e-6 * scale, msg=lambda m, f=field: f"{name}: {f}: {m}"
        )
    torch.testing.assert_close(
        found_grad, expected_grad[..., columns], rtol=1e-5, atol=2e-6, equal_nan=True,
        msg=lambda m: f"{name}: gradient: {m}",
    )  # fmt: skip


def test_two_ranks_agree_with_the_unsharded_op(tmp_path: Path):
    mp.spawn(check_on_rank, args=(str(tmp_path / "store"),), nprocs=RANKS)
