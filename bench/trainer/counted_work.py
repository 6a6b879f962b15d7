"""Work of a training pass at true sizes, counted without a GPU and without memory.

    python -m bench.trainer.counted_work [--model 1B] [--tokens 40320] [--json FILE]

The trainer's forward and backward pass runs on tensors of the meta device, which have shapes but no
storage, in bfloat16, with varlen attention; every operation that reaches the dispatcher is counted:

    products     2 M N K operations each; their own reads and writes are not counted as traffic
    attention    2 L^2 H d operations per sequence of L tokens forward, twice that backward (causal:
                 half of the two products; the recomputation inside its kernels is not counted)
    head         linear_token_stats: 2 R V D operations forward, 4 backward (its weight is frozen);
                 its fp32 logits are read twice and their gradient is written once: 10 R V bytes
    the rest     elementwise traffic: bytes of every tensor read, plus of every tensor written.
                 Views count nothing, a fill no read, an indexed read what it selects.

The kernels of `iris_kernels` thereby count as their docstrings say: each input once, each output
once. The model of the time adds up, without overlap,

    seconds = (products + head) / 790 TFLOP/s + attention / 250 TFLOP/s + traffic / 4.3 TB/s
    MFU     = operations / seconds / 989 TFLOP/s

with the matrix and copy rates that an H200 has reached and, as an assumption, the rate of
flash-attention at a few hundred tokens per sequence. Launch gaps, the optimizer, and with several
GPUs the collectives are not part of it. With `--recompute` the blocks' forward runs twice, and its
second run counts as time but not as operations of the MFU.

`--blocks`: fused, the kernels that run on a GPU; modules, plain torch, as on a CPU.
"""

import argparse
import functools
import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint as recompute

from bench.trainer.models import make_model, model_configs
from bench.trainer.training import DATA_SHEET
from iris_fast.grpo.packing import pack
from iris_fast.grpo.policy import freeze_generation
from iris_fast.models import decoder
from iris_fast.models.janus import Janus
from iris_fast.preflight.estimate import H200
from iris_fast.records import Rollout
from iris_fast.rollout.sampler import empty_trace

PROMPT_TOKENS = 55  # with 575 codes, 630 tokens per sequence
ATTENTION_RATE = 250e12  # operations per second
PRODUCTS = ("mm", "addmm", "addmm_", "bmm", "baddbmm")
# Operations that read only what they select.
SELECTIONS = ("index_select", "gather", "embedding", "index")
NO_TRAFFIC = ("empty", "empty_like", "new_empty", "empty_strided", "detach", "_unsafe_view")
FILLS = ("zero_", "fill_", "zeros", "zeros_like", "new_zeros", "ones_like", "arange", "full")


@dataclass
class Work:
    """Operations by kind, elementwise traffic in bytes by operation, and calls by operation."""

    operations: Counter = field(default_factory=Counter)
    bytes: Counter = field(default_factory=Counter)
    calls: Counter = field(default_factory=Counter)

    def seconds(self) -> float:
        """The modelled time."""
        matrix = self.operations["products"] + self.operations["head"]
        attention = self.operations["attention"] / ATTENTION_RATE
        return matrix / H200.flops_per_s + attention + self.bytes.total() / H200.copy_bytes_per_s


class CountedWork(TorchDispatchMode):
    """Counts what is dispatched in its `with` block; `attention`, the operations of a layer's
    forward pass."""

    def __init__(self, attention: float) -> None:
        super().__init__()
        self.work, self._attention = Work(), attention

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.partition("::")[2]
        read = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        written = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        if not func.is_view and name not in NO_TRAFFIC:
            self.work.calls[name] += 1
            self._count(name, read, written)
        return out

    def _count(self, name: str, read: list[Tensor], written: list[Tensor]) -> None:
        work = self.work
        if name in PRODUCTS:
            a = next(t for t in reversed(read[:-1]) if t.dim() >= 2)
            work.operations["products"] += 2 * a.numel() * read[-1].shape[-1]
        elif "varlen_attn" in name:
            work.operations["attention"] += self._attention * (2 if "backward" in name else 1)
        elif name.startswith("linear_token_stats"):
            (R, D), V = read[0].shape, read[1].shape[0]
            backward = name.endswith("backward")
            work.operations["head"] += (4 if backward else 2) * R * V * D
            work.bytes[name] += (6 if backward else 4) * R * V
        else:
            work.bytes[name] += traffic(name, read, written)


def traffic(name: str, read: list[Tensor], written: list[Tensor]) -> int:
    """Bytes that an operation moves; a tensor that is expanded, or passed twice, is read once."""
    out = sum(map(size, written))
    if name in FILLS:
        return out
    if name in SELECTIONS:
        return 2 * out + sum(size(t) for t in read if not t.is_floating_point())
    if name == "copy_":
        return size(read[0]) + size(read[1])
    return out + sum(size(t) for t in {id(t): t for t in read}.values())


def size(tensor: Tensor) -> int:
    """Bytes of the elements of `tensor`, each counted once."""
    elements = tensor.numel()
    for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
        elements //= length if stride == 0 and length else 1
    return elements * tensor.itemsize


def counted(model: str, tokens: int, fused: bool, recomputed: bool) -> tuple[Work, Work]:
    """Work of a training pass over about `tokens` tokens, and that of it which trains: without
    recomputation."""
    config = model_configs(torch.device("cuda"))[model]
    length = PROMPT_TOKENS + config.image_tokens - 1
    samples = max(tokens // length, 1)
    sizes = config.decoder
    attention = 2.0 * length**2 * sizes.num_heads * sizes.head_dim * samples
    with (
        mock.patch.object(decoder, "runs_fused", lambda x: fused),
        mock.patch.object(torch, "is_autocast_enabled", lambda device: False),  # meta has none
    ):
        least, *more = (
            _pass(make_policy(config, again), packed_batch(config, samples), attention)
            for again in ([False, True] if recomputed else [False])
        )
    return more[0] if more else least, least


def make_policy(config, recomputed: bool) -> Janus:
    """A policy as the trainer trains it, without storage."""
    janus = make_model(config, torch.device("meta"), torch.bfloat16).requires_grad_(True)
    freeze_generation(janus, train_image_head=False)
    janus.attn_implementation = "varlen"
    for block in janus.model.language_model.layers if recomputed else ():
        block.forward = functools.partial(recompute, block.forward, use_reentrant=False)
    return janus


def packed_batch(config, samples: int):
    """Images of prompts of equal length, without storage."""
    nothing = empty_trace(samples)
    rollout = Rollout(
        prompts=[], sample_numbers=[], seed=0, cot_prompt_ids=[[]] * samples,
        cot_ids=[[]] * samples, cot_texts=[], truncated=[False] * samples,
        image_prompt_ids=[[1] * PROMPT_TOKENS] * samples,
        unconditional_prompt_ids=[[]] * samples,
        codes_NI=torch.zeros(samples, config.image_tokens, dtype=torch.int64),
        text=nothing, image=nothing,
    )  # fmt: skip
    return pack(rollout)[0].to(torch.device("meta"))


def _pass(janus: Janus, packed, attention: float) -> Work:
    with CountedWork(attention) as mode:
        _, image = janus(packed)
        image.logprob.backward(torch.empty_like(image.logprob))
    return mode.work


def summary(model: str, tokens: int, fused: bool, recomputed: bool) -> dict:
    """One row of the table, and its traffic by operation in GB."""
    work, least = counted(model, tokens, fused, recomputed)
    seconds = work.seconds()
    return {
        "model": model,
        "tokens": tokens,
        "blocks": "fused" if fused else "modules",
        "recomputed": recomputed,
        "tflop": {kind: count / 1e12 for kind, count in sorted(work.operations.items())},
        "gb": work.bytes.total() / 1e9,
        "kernels": work.calls.total(),
        "modelled_s": seconds,
        "modelled_mfu": least.operations.total() / seconds / DATA_SHEET,
        "by_operation": {
            name: {"gb": count / 1e9, "calls": work.calls[name]}
            for name, count in work.bytes.most_common()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", nargs="+", default=["1B", "7B"], choices=["1B", "7B"])
    parser.add_argument("--tokens", type=int, default=40320)
    parser.add_argument(
        "--blocks", nargs="+", default=["modules", "fused"], choices=["modules", "fused"]
    )
    parser.add_argument("--recompute", nargs="+", default=["7B"], help="models that recompute")
    parser.add_argument("--json", type=Path, help="also write the table to this file")
    options = parser.parse_args()
    table = []
    for model in options.model:
        for blocks in options.blocks:
            recomputed = model in options.recompute
            row = summary(model, options.tokens, blocks == "fused", recomputed)
            table.append(row)
            print(_lines(row), flush=True)
    if options.json:
        options.json.write_text(json.dumps(table, indent=1) + "\n")


def _lines(row: dict) -> str:
    operations = ", ".join(f"{kind} {count:.1f}" for kind, count in row["tflop"].items())
    lines = [
        f"{row['model']}, {row['tokens']} tokens, {row['blocks']}"
        + (", blocks recomputed" if row["recomputed"] else ""),
        f"  TFLOP: {operations}; elementwise {row['gb']:.0f} GB; {row['kernels']} kernels",
        f"  modelled: {row['modelled_s']:.3f} s, {row['modelled_mfu']:.1%} MFU (not measured)",
    ]
    for name, found in row["by_operation"].items():
        if found["gb"] >= 0.005 * row["gb"]:
            lines.append(f"    {name:<36} {found['gb']:9.1f} GB {found['calls']:6d} calls")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
