"""A key-value cache for sequences that begin alike: equal beginnings are held and computed once.

The samples of a group share their prompt, and all unconditional rows begin BOS, pad, pad, ...; what
differs is the last token and what follows it. Every step reads live entries only, through
`iris_kernels.decode_attention`, and counts on the device: a captured CUDA graph serves all steps.

Shapes: B sequences, P prefixes, H query heads, J key/value heads, S slots, d head width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from iris_kernels import decode_attention, rope_append
from torch import Tensor

from iris_fast.models.attention import PackedAttention, rows_and_positions
from iris_fast.models.decoder import AttentionStrategy, DecoderConfig, rope_tables


@dataclass(frozen=True)
class Beginnings:
    """Sequences cut into a shared prefix and what comes after it.

    Sequence b begins with the first `seen[b]` tokens of `prefixes[index[b]]`.
    """

    prefixes: list[list[int]]
    index: list[int]
    seen: list[int]

    @classmethod
    def of(cls, beginnings: list[list[int]]) -> Beginnings:
        """As few prefixes as there are beginnings that no other continues; all non-empty."""
        if not beginnings or not all(beginnings):
            raise ValueError(f"beginnings must hold token lists that are not empty: {beginnings}")
        prefixes: list[list[int]] = []
        home: dict[tuple[int, ...], int] = {}
        for beginning in sorted({tuple(ids) for ids in beginnings}, key=len, reverse=True):
            ids = list(beginning)
            found = (i for i, prefix in enumerate(prefixes) if prefix[: len(ids)] == ids)
            place = next(found, len(prefixes))
            if place == len(prefixes):
                prefixes.append(ids)
            home[beginning] = place
        index = [home[tuple(ids)] for ids in beginnings]
        return cls(prefixes, index, [len(ids) for ids in beginnings])


class SharedKVCache:
    """Preallocated keys and values: each prefix once, and `room` slots a sequence after it.

        cache = SharedKVCache(config, Beginnings.of(beginnings), room, dtype, device)
        decoder(prefix_embeds, positions, cache.prefill())      # cache.beginnings.prefixes, packed
        for _ in range(room):
            fused_decoder.step(token_embeds_BD, cache)      # it advances the cache

    Nothing in a step touches the host: it is the caller who counts up to `room`.
    """

    def __init__(
        self,
        config: DecoderConfig,
        beginnings: Beginnings,
        room: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        attn_implementation: str = "sdpa",
    ) -> None:
        """2 * layers * kv_heads * head_dim * (B * room + P * longest prefix) elements of `dtype`,
        which float8_e4m3fn can be whatever the model's is. `attn_implementation`: the prefixes'
        own, as `PackedAttention` takes it."""
        self.beginnings = beginnings
        self._dtype = dtype
        self._attn_implementation = attn_implementation
        batch = len(beginnings.index)
        longest = max(map(len, beginnings.prefixes))

        def slots(rows: int, length: int) -> list[tuple[Tensor, Tensor]]:
            shape = (rows, config.num_kv_heads, length, config.head_dim)
            return [
                (
                    torch.empty(shape, dtype=dtype, device=device),
                    torch.empty(shape, dtype=dtype, device=device),
                )
                for _ in range(config.num_layers)
            ]

        self._prefix, self._own = slots(len(beginnings.prefixes), longest), slots(batch, room)
        self._index_B = torch.tensor(beginnings.index, device=device)
        self._seen_B = torch.tensor(beginnings.seen, device=device)
        positions_S = torch.arange(longest + room, device=device)
        tables = rope_tables(positions_S, config.head_dim, config.rope_theta)
        half = config.head_dim // 2  # both halves of a table are the same
        self._rope = tuple(table[:, 0, :half].contiguous() for table in tables)
        self._own_B = torch.zeros(batch, dtype=torch.int64, device=device)
        self._live_B = self._own_B + 1  # with the token under way

    def prefill(self) -> AttentionStrategy:
        """Strategy for the prefixes, packed in their order: causal inside each, all kept."""
        lengths = [len(prefix) for prefix in self.beginnings.prefixes]
        device = self._own_B.device
        packed = PackedAttention(lengths, device, self._attn_implementation)
        row_T, position_T = rows_and_positions(lengths, device)

        def attention(layer_index: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            keys, values = self._prefix[layer_index]
            keys[row_T, :, position_T] = self._kept(key)
            values[row_T, :, position_T] = self._kept(value)
            return packed(layer_index, query, key, value)

        return attention

    def rope(self) -> tuple[Tensor, Tensor]:
        """Cosine and sine of each sequence's next position, [B, d / 2] fp32."""
        position_B = self._seen_B + self._own_B
        cos, sin = (table.index_select(0, position_B) for table in self._rope)
        return cos, sin

    def append_and_attend(
        self, layer_index: int, query: Tensor, key: Tensor, value: Tensor, rope: tuple[Tensor, ...]
    ) -> Tensor:
        """Context [B, H, d] of one new token a sequence: its query and key turned by `rope`, key
        and value kept, then attention to all before it."""
        keys, values = self._own[layer_index]
        prefix_keys, prefix_values = self._prefix[layer_index]
        return decode_attention(
            rope_append(query, key, value, *rope, keys, values, self._own_B),
            keys,
            values,
            self._live_B,
            prefix_keys=prefix_keys,
            prefix_values=prefix_values,
            prefix_lengths=self._seen_B,
            prefix_index=self._index_B,
        )

    def _kept(self, x_BJd: Tensor) -> Tensor:
        """In the cache's dtype; beyond the range of 8 bits its end, where a cast may give NaN."""
        if self._dtype == torch.float8_e4m3fn:
            largest = torch.finfo(self._dtype).max
            x_BJd = x_BJd.clamp(-largest, largest)
        return x_BJd.to(self._dtype)

    def advance(self) -> None:
        """Count the tokens that a step has kept."""
        self._own_B += 1
        self._live_B += 1
