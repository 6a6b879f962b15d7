"""Stand-ins for the attention packages that need a GPU: the real signatures, and attention written
out from the arguments alone."""

from __future__ import annotations

import functools
import sys
from types import ModuleType

import torch
from torch import Tensor

from iris_fast.models import attention as packed_attention


def causal_inside(query: Tensor, key: Tensor, value: Tensor, lengths: list[int]) -> Tensor:
    """Softmax attention of each sequence by itself, in float64: [T, H, d]; GQA where H > J."""
    group = query.shape[1] // key.shape[1]
    contexts = []
    for q, k, v in zip(*(x.double().split(lengths) for x in (query, key, value)), strict=True):
        k, v = (torch.stack([x[:, h // group] for h in range(q.shape[1])], 1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5
        hidden = torch.ones(len(q), len(q), dtype=torch.bool).triu(1)
        contexts.append(
            torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -1e9).softmax(-1), v)
        )
    return torch.cat(contexts).to(query.dtype)


def lengths_of(ends_B1: Tensor, longest: int, rows: int) -> list[int]:
    """The lengths that cumulative ones stand for, checked as the kernels require them."""
    assert ends_B1.dtype == torch.int32
    assert ends_B1.is_contiguous()
    lengths = ends_B1.diff().tolist()
    assert ends_B1[0] == 0
    assert sum(lengths) == rows
    assert max(lengths) == longest
    return lengths


class Calls(list):
    """The keyword arguments of every call."""


def flash_attn(calls: Calls):
    """flash_attn 2.8's `flash_attn_varlen_func`."""

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
        softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
        deterministic=False, return_attn_probs=False, block_table=None,
    ):  # fmt: skip
        calls.append({"causal": causal, "kv_heads": k.shape[1]})
        assert causal
        assert (dropout_p, softmax_scale, window_size) == (0.0, None, (-1, -1))
        lengths = lengths_of(cu_seqlens_q, max_seqlen_q, len(q))
        assert lengths == lengths_of(cu_seqlens_k, max_seqlen_k, len(k))
        return causal_inside(q, k, v, lengths)

    return flash_attn_varlen_func


def xformers(calls: Calls):
    """xformers 0.0.33's `memory_efficient_attention` and `BlockDiagonalCausalMask`."""

    class BlockDiagonalCausalMask:
        def __init__(self, lengths):
            self.lengths = lengths

        @classmethod
        def from_seqlens(cls, q_seqlen, kv_seqlen=None, *, device=None):
            assert kv_seqlen is None
            assert device is not None  # its default is a GPU where there is one
            return cls(list(q_seqlen))

    def memory_efficient_attention(
        query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None, output_dtype=None
    ):
        calls.append({"causal": type(attn_bias) is BlockDiagonalCausalMask})
        assert type(attn_bias) is BlockDiagonalCausalMask
        assert (p, scale) == (0.0, None)
        assert query.dim() == 4
        assert query.shape == key.shape == value.shape  # [1, T, H, d]: five dimensions for GQA
        assert query.shape[0] == 1
        return causal_inside(query[0], key[0], value[0], attn_bias.lengths)[None]

    return memory_efficient_attention, BlockDiagonalCausalMask


def varlen_2_11(calls: Calls):
    """torch 2.11's: with windows, without GQA."""

    def varlen_attn(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None,
        window_size=(-1, -1),
    ):  # fmt: skip
        calls.append({"causal": window_size == (-1, 0)})
        assert window_size == (-1, 0)  # a list of the same is not causal: torch compares tuples
        assert query.shape[1] == key.shape[1]
        return causal_inside(query, key, value, lengths_of(cu_seq_q, max_q, len(query)))

    return varlen_attn


def varlen_2_12(calls: Calls):
    """torch 2.12's and 2.13's."""

    def varlen_attn(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None,
        window_size=(-1, -1), enable_gqa=False, seqused_k=None, block_table=None, num_splits=None,
    ):  # fmt: skip
        calls.append({"causal": window_size == (-1, 0), "kv_heads": key.shape[1]})
        assert window_size == (-1, 0)
        assert enable_gqa or query.shape[1] == key.shape[1]
        lengths = lengths_of(cu_seq_q, max_q, len(query))
        assert lengths == lengths_of(cu_seq_k, max_k, len(key))
        return causal_inside(query, key, value, lengths)

    return varlen_attn


def install(name: str, monkeypatch) -> Calls:
    """Replace the real implementation by the stand-in called `name` during the test."""
    for lookup in ("_varlen", "_flash_attn", "_xformers"):  # what was found before, or will be
        original = getattr(packed_attention, lookup).__wrapped__
        monkeypatch.setattr(packed_attention, lookup, functools.cache(original))
    calls = Calls()
    if name == "flash_attention_2":
        package, inner = ModuleType("flash_attn"), ModuleType("flash_attn.flash_attn_interface")
        package.flash_attn_varlen_func = inner.flash_attn_varlen_func = flash_attn(calls)
        modules = [package, inner]
    elif name == "xformers":
        names = ("xformers", "xformers.ops", "xformers.ops.fmha", "xformers.ops.fmha.attn_bias")
        modules = [ModuleType(name) for name in names]
        function, mask = xformers(calls)
        modules[1].memory_efficient_attention = function
        modules[3].BlockDiagonalCausalMask = mask
    else:
        module = ModuleType("torch.nn.attention.varlen")
        module.varlen_attn = {
            "varlen": varlen_2_12, "varlen 2.11": varlen_2_11,
        }[name](calls)  # fmt: skip
        modules = [module]
    for module in modules:
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return calls
