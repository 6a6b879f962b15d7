"""A key-value cache that stores and computes shared prefixes once.

The samples of a group share their prompt, and all unconditional rows begin BOS, pad, pad, ...; they
differ in the last token and what follows it. Every step reads live entries only, through
`iris_kernels`' decoding attention, and counts on the device, so one CUDA graph serves all steps. On
a CPU the same calls run in C++.

Shapes: B sequences, P prefixes, H query heads, J key/value heads, S slots, d head width.
"""

import functools
from dataclasses import dataclass
from typing import Self

import torch
from iris_kernels import rope_append_attention
from torch import Tensor

from iris_fast.models.attention import PackedAttention, rows_and_positions
from iris_fast.models.decoder import AttentionStrategy, DecoderConfig, rope_tables

SPARE_PREFIXES, SPARE_TOKENS = 8, 64


@dataclass(frozen=True)
class SharedPrefixes:
    """Which prefix each sequence begins with: the first `lengths[b]` tokens of
    `prefixes[index[b]]`."""

    prefixes: list[list[int]]
    index: list[int]
    lengths: list[int]

    @classmethod
    def of(cls, sequences: list[list[int]]) -> Self:
        """The fewest prefixes: those sequences that no other one continues. None may be empty."""
        if not sequences or not all(sequences):
            raise ValueError(f"sequences must hold token lists that are not empty: {sequences}")
        prefixes: list[list[int]] = []
        index_of: dict[tuple[int, ...], int] = {}
        for sequence in sorted({tuple(ids) for ids in sequences}, key=len, reverse=True):
            ids = list(sequence)
            matches = (i for i, prefix in enumerate(prefixes) if prefix[: len(ids)] == ids)
            index_of[sequence] = next(matches, len(prefixes))
            if index_of[sequence] == len(prefixes):
                prefixes.append(ids)
        index = [index_of[tuple(ids)] for ids in sequences]
        return cls(prefixes, index, [len(ids) for ids in sequences])


class SharedKVCache:
    """Preallocated keys and values: each prefix once, and `room` slots per sequence after it.

        cache = SharedKVCache(config, SharedPrefixes.of(sequences), room, dtype, device)
        decoder(prefix_embeds, positions, cache.prefill_attention())   # the prefixes, packed
        for _ in range(room):
            fused_decoder.step(token_embeds_BD, cache)      # it advances the cache

    No step synchronises with the host, so the caller must not run more than `room` steps.

    Memory: 2 * layers * kv_heads * head_dim * (B * room + P * longest prefix) elements of `dtype`,
    which may be float8_e4m3fn whatever the model's is. `attn_implementation` is that of the
    prefill, as for `PackedAttention`. `spare`: with room for more and longer prefixes, P rounded up
    to a multiple of 8 and their length to one of 64, for `restart`.
    """

    def __init__(
        self,
        config: DecoderConfig,
        shared: SharedPrefixes,
        room: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        attn_implementation: str = "sdpa",
        spare: bool = False,
    ) -> None:
        self._dtype, self._attn_implementation = dtype, attn_implementation
        batch, count = len(shared.index), len(shared.prefixes)
        longest = max(map(len, shared.prefixes))
        if spare:
            count, longest = _round_up(count, SPARE_PREFIXES), _round_up(longest, SPARE_TOKENS)

        def allocate(rows: int, slots: int) -> list[tuple[Tensor, Tensor]]:
            shape = (rows, config.num_kv_heads, slots, config.head_dim)
            empty = functools.partial(torch.empty, shape, dtype=dtype, device=device)
            return [(empty(), empty()) for _ in range(config.num_layers)]

        self._prefix, self._own = allocate(count, longest), allocate(batch, room)
        self._index_B, self._prefix_lengths_B = torch.empty(
            2, batch, dtype=torch.int64, device=device
        ).unbind()
        positions_S = torch.arange(longest + room, device=device)
        tables = rope_tables(positions_S, config.head_dim, config.rope_theta)
        half = config.head_dim // 2  # both halves of a table are the same
        cos, sin = (table[:, 0, :half].contiguous() for table in tables)
        self._rope = cos, sin
        # Tokens of each sequence that are stored after its prefix.
        self._own_B = torch.empty(batch, dtype=torch.int64, device=device)
        fits = self.restart(shared)
        assert fits

    def restart(self, shared: SharedPrefixes) -> bool:
        """Start over with other prefixes in the same memory; False if they do not fit."""
        keys, _ = self._prefix[0]
        longest = max(map(len, shared.prefixes))
        if len(shared.prefixes) > keys.shape[0] or longest > keys.shape[2]:
            return False
        assert len(shared.index) == len(self._own_B)
        self.prefixes = shared.prefixes
        self._index_B.copy_(torch.tensor(shared.index))
        self._prefix_lengths_B.copy_(torch.tensor(shared.lengths))
        self._own_B.zero_()
        return True

    def prefill_attention(self) -> AttentionStrategy:
        """Attention for the prefixes, packed in their order: causal inside each; all are stored."""
        device, lengths = self._own_B.device, [len(prefix) for prefix in self.prefixes]
        packed = PackedAttention(lengths, device, self._attn_implementation)
        row_T, position_T = rows_and_positions(lengths, device)

        def attention(layer_index: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            keys, values = self._prefix[layer_index]
            keys[row_T, :, position_T] = self._convert(key)
            values[row_T, :, position_T] = self._convert(value)
            return packed(layer_index, query, key, value)

        return attention

    def append_and_attend(
        self, layer_index: int, query: Tensor, key: Tensor, value: Tensor
    ) -> Tensor:
        """Context [B, H, d] of one new token per sequence: query and key are rotated, key
        and value stored, then the query attends to all stored tokens of its sequence."""
        own, (prefix_keys, prefix_values) = self._own[layer_index], self._prefix[layer_index]
        return rope_append_attention(
            query, key, value, *self._rope, *own, self._own_B, prefix_keys=prefix_keys,
            prefix_values=prefix_values, prefix_lengths=self._prefix_lengths_B,
            prefix_index=self._index_B,
        )  # fmt: skip

    def _convert(self, x_BJd: Tensor) -> Tensor:
        """In the cache's dtype; clamped to the range of fp8, beyond which a cast may give NaN."""
        if self._dtype == torch.float8_e4m3fn:
            largest = torch.finfo(self._dtype).max
            x_BJd = x_BJd.clamp(-largest, largest)
        return x_BJd.to(self._dtype)

    def advance(self) -> None:
        """Count the tokens that a step has stored."""
        self._own_B += 1


def _round_up(number: int, step: int) -> int:
    return -(-number // step) * step
