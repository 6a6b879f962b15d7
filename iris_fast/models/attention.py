"""Causal attention inside each sequence of a packed batch: implementations and their choice.

An implementation is built for the sequence lengths of one batch, then called with query [T, H, d],
key and value [T, J, d] of every layer, and returns the context [T, H, d]. All are differentiable
and take fewer key heads than query heads (H a multiple of J). The setting `attn_implementation`
names one; `resolve_implementation` decides which one that means here, and it is then never replaced
by another.

Shapes: T rows, B sequences, L longest sequence, H query heads, J key/value heads, d head width.
"""

import functools
import importlib
import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from iris_fast.errors import UserError

HALF_PRECISION = (torch.bfloat16, torch.float16)
WIDEST_HEAD = 256
OLDEST_GPU = 8  # compute capability that flash attention needs: Ampere
# `auto` is the first of these that works.
PREFERRED = ("flash_attention_2", "varlen", "sdpa")


def rows_and_positions(
    sequence_lengths: list[int], device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """The sequence of each row of a packed batch, and its position in it; int64 [T] each."""
    lengths = torch.tensor(sequence_lengths)
    rows = torch.arange(len(sequence_lengths)).repeat_interleave(lengths)
    positions = torch.arange(len(rows)) - (lengths.cumsum(0) - lengths)[rows]
    return rows.to(device), positions.to(device)


def cumulative_lengths(sequence_lengths: list[int], device: torch.device | str) -> Tensor:
    """0 and the end of each sequence, int32 [B + 1], as variable-length kernels take it."""
    return torch.tensor([0, *sequence_lengths]).cumsum(0, dtype=torch.int32).to(device)


def repeat_heads(x_TJd: Tensor, heads: int) -> Tensor:
    """Each key or value head repeated for the query heads that share it: [T, H, d]."""
    copies = heads // x_TJd.shape[1]
    return x_TJd if copies == 1 else x_TJd.repeat_interleave(copies, dim=1)


class Sdpa:
    """torch's `scaled_dot_product_attention` over sequences padded on the *right*, where causality
    alone masks the padding. Any device and precision, at the cost of a padded copy of q, k and v.
    """

    def __init__(self, sequence_lengths: list[int], device: torch.device | str) -> None:
        self.batch, self.longest = len(sequence_lengths), max(sequence_lengths)
        row_T, position_T = rows_and_positions(sequence_lengths, device)
        # Row b * L + t of the padded batch for every packed row; None if nothing is padded.
        padded = sum(sequence_lengths) != self.batch * self.longest
        self.slot_T = row_T * self.longest + position_T if padded else None

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Context [T, H, d]."""
        shared = query.shape[1] != key.shape[1]
        query, key, value = self._pad(query), self._pad(key), self._pad(value)
        context = F.scaled_dot_product_attention(
            query, key, value, is_causal=True, enable_gqa=shared
        )
        context = context.transpose(1, 2).flatten(0, 1)
        return context if self.slot_T is None else context.index_select(0, self.slot_T)

    def _pad(self, x_THd: Tensor) -> Tensor:
        if self.slot_T is not None:
            # Not index_copy, which would save x_THd for a backward pass that does not read it.
            padded = x_THd.new_zeros(self.batch * self.longest, *x_THd.shape[1:])
            padded[self.slot_T] = x_THd
            x_THd = padded
        return x_THd.unflatten(0, (self.batch, self.longest)).transpose(1, 2)


class Varlen:
    """torch's own `varlen_attn`: flash attention without padding, on a GPU in half precision."""

    def __init__(self, sequence_lengths: list[int], device: torch.device | str) -> None:
        self.cumulative_B1 = cumulative_lengths(sequence_lengths, device)
        self.longest = max(sequence_lengths)
        self._function, self._shares_heads = _varlen()

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Context [T, H, d]."""
        lengths = (self.cumulative_B1, self.cumulative_B1, self.longest, self.longest)
        # A literal window: torch.compile would treat one that is kept in a variable as dynamic.
        if self._shares_heads:
            return self._function(query, key, value, *lengths, window_size=(-1, 0), enable_gqa=True)
        key, value = (repeat_heads(x, query.shape[1]) for x in (key, value))
        return self._function(query, key, value, *lengths, window_size=(-1, 0))


class FlashAttention2:
    """`flash_attn_varlen_func` of the package flash_attn: on a GPU in half precision."""

    def __init__(self, sequence_lengths: list[int], device: torch.device | str) -> None:
        self.cumulative_B1 = cumulative_lengths(sequence_lengths, device)
        self.longest = max(sequence_lengths)
        self._function = _flash_attn()

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Context [T, H, d]."""
        lengths = (self.cumulative_B1, self.cumulative_B1, self.longest, self.longest)
        return self._function(query, key, value, *lengths, causal=True)


class Xformers:
    """`memory_efficient_attention` of the package xformers with its block-diagonal causal mask: on
    a GPU in half precision. Shared key heads are copied: their 5-dimensional form has no gradient.
    """

    def __init__(self, sequence_lengths: list[int], device: torch.device | str) -> None:
        self._function, mask = _xformers()
        self.mask = mask.from_seqlens(sequence_lengths, device=torch.device(device))

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Context [T, H, d]."""
        key, value = (repeat_heads(x, query.shape[1]) for x in (key, value))
        return self._function(query[None], key[None], value[None], attn_bias=self.mask)[0]


# Each is made from (sequence_lengths, device) and called with query, key and value.
IMPLEMENTATIONS: dict[str, type] = {
    "sdpa": Sdpa,
    "varlen": Varlen,
    "flash_attention_2": FlashAttention2,
    "xformers": Xformers,
}


class PackedAttention:
    """Causal attention inside each sequence of a packed batch; differentiable.

    `sequence_lengths`: tokens of each sequence in packed order, each at least 1.
    `implementation`: one of `IMPLEMENTATIONS`.
    """

    def __init__(
        self,
        sequence_lengths: list[int],
        device: torch.device | str = "cpu",
        implementation: str = "sdpa",
    ) -> None:
        if not sequence_lengths or min(sequence_lengths) < 1:
            raise ValueError(f"sequence_lengths must be positive integers, got {sequence_lengths}")
        self.total, self.longest = sum(sequence_lengths), max(sequence_lengths)
        self._attend = IMPLEMENTATIONS[implementation](sequence_lengths, device)

    def __call__(self, layer_index: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Context [T, H, d]."""
        if query.shape[0] != self.total:
            raise ValueError(f"expected {self.total} packed rows, got {query.shape[0]}")
        return self._attend(query, key, value)


# Imported on first use: the packages are optional, and torch's own module imports the compiler.
# Cached, because a compiled block is specialised on the function that it has seen. The packages'
# functions are not traced: they pass Python objects around on which each batch's trace would be
# specialised.


@functools.cache
def _varlen() -> tuple[Callable[..., Tensor], bool]:
    """The function, and whether it takes shared key heads, which it does since torch 2.12."""
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn, "enable_gqa" in inspect.signature(varlen_attn).parameters


@functools.cache
def _flash_attn() -> Callable[..., Tensor]:
    from flash_attn import flash_attn_varlen_func

    return torch.compiler.disable(flash_attn_varlen_func)


@functools.cache
def _xformers() -> tuple[Callable[..., Tensor], Any]:
    from xformers.ops import memory_efficient_attention
    from xformers.ops.fmha.attn_bias import BlockDiagonalCausalMask

    return torch.compiler.disable(memory_efficient_attention), BlockDiagonalCausalMask


def resolve_implementation(
    setting: str, device: torch.device, dtype: torch.dtype, head_dim: int | None = None
) -> str:
    """The one of `IMPLEMENTATIONS` that the setting `attn_implementation` means here.

    `head_dim`: None while the model is not known. UserError if the one asked for cannot work, or if
    its package is installed and cannot be imported.
    """
    if setting == "auto":
        return next(n for n in PREFERRED if not unavailable(n, device, dtype, head_dim))
    if reason := unavailable(setting, device, dtype, head_dim):
        raise UserError(f"attn_implementation: {setting} {reason}")
    return setting


def unavailable(
    name: str, device: torch.device, dtype: torch.dtype, head_dim: int | None = None
) -> str | None:
    """Why an implementation does not work here, with a remedy; None if it does.

    UserError if its package is installed and cannot be imported: another must not replace it then.
    """
    if name == "sdpa":
        return None
    otherwise = "use --attn_implementation sdpa, or auto"
    if device.type != "cuda":
        return f"needs a GPU, and this runs on the {device.type.upper()}; {otherwise}"
    if dtype not in HALF_PRECISION:
        kind = str(dtype).removeprefix("torch.")
        return f"needs half precision, not {kind}; add --bf16 true, or {otherwise}"
    major, minor = torch.cuda.get_device_capability(device)
    if major < OLDEST_GPU:
        found = f"{major}.{minor}"
        return f"needs a GPU of compute capability 8.0 or later, this one has {found}; {otherwise}"
    if head_dim is not None and (head_dim % 8 or head_dim > WIDEST_HEAD):
        widths = f"a multiple of 8 up to {WIDEST_HEAD}"
        return f"needs a head width that is {widths}, this model's is {head_dim}; {otherwise}"
    if name == "varlen":
        found = torch.backends.cuda.is_flash_attention_available()
        return None if found else f"is not part of this torch {torch.__version__}; {otherwise}"
    package, module = {
        "flash_attention_2": ("flash-attn", "flash_attn.flash_attn_interface"),
        "xformers": ("xformers", "xformers.ops"),
    }[name]
    found = _can_import(name, module)
    return None if found else f"is not installed; pip install {package}, or {otherwise}"


def _can_import(name: str, module: str) -> bool:
    try:
        importlib.import_module(module)
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and module.startswith(error.name or "?"):
            return False  # the package itself is missing, not something that it imports
        raise UserError(
            f"attn_implementation: {name} is installed and cannot be imported ({error}); repair "
            "or uninstall it, or use --attn_implementation sdpa"
        ) from None
    return True
