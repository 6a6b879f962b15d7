"""The plain key-value cache: one row per sequence, torch's attention."""

import torch
import torch.nn.functional as F
from torch import Tensor

from iris_fast.models.attention import PackedAttention, rows_and_positions
from iris_fast.models.decoder import AttentionStrategy, DecoderConfig


class KVCache:
    """Preallocated keys and values of a batch of sequences, each with its own length.

        cache = KVCache(config, batch, max_length, dtype, device)
        decoder(prompt_embeds, positions, cache.prefill_attention(prompt_lengths))
        for _ in range(n):
            decoder(token_embeds_BD, cache.lengths_B, cache.decode_attention())
            cache.advance()

    `lengths_B` (int64, on the device) counts the tokens that each sequence holds, which is also the
    position of its next token. A new prefill starts all sequences over in the same memory.

    Memory: 2 * layers * batch * kv_heads * max_length * head_dim elements of `dtype`.
    `attn_implementation` is that of the prefill, as for `PackedAttention`.
    """

    def __init__(
        self,
        config: DecoderConfig,
        batch: int,
        max_length: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        attn_implementation: str = "sdpa",
    ) -> None:
        shape = (batch, config.num_kv_heads, max_length, config.head_dim)
        # Zeros, not empty: a masked slot still meets a probability of 0, and 0 * NaN is NaN.
        self.keys = [
            torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_layers)
        ]
        self.values = [torch.zeros_like(keys) for keys in self.keys]
        self.max_length = max_length
        self._attn_implementation = attn_implementation
        self.lengths_B = torch.zeros(batch, dtype=torch.int64, device=device)
        self._rows_B = torch.arange(batch, device=device)
        self._longest = 0  # the longest of lengths_B, known without synchronising with the device

    def prefill_attention(self, sequence_lengths: list[int]) -> AttentionStrategy:
        """Attention for a packed batch of prompts, one per cache row, in order.

        It stores their keys and values and is causal inside each. `lengths_B` is set at once.
        ValueError if the number of prompts is not the batch size, or if one does not fit.
        """
        batch = self.lengths_B.shape[0]
        if len(sequence_lengths) != batch:
            raise ValueError(f"{len(sequence_lengths)} prompts for a cache of {batch} sequences")
        self._check_fits(max(sequence_lengths))
        device = self.lengths_B.device
        packed = PackedAttention(sequence_lengths, device, self._attn_implementation)
        row_T, position_T = rows_and_positions(sequence_lengths, device)
        self.lengths_B.copy_(torch.tensor(sequence_lengths))
        self._longest = packed.longest

        def attention(layer_index: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            self.keys[layer_index][row_T, :, position_T] = key
            self.values[layer_index][row_T, :, position_T] = value
            return packed(layer_index, query, key, value)

        return attention

    def decode_attention(self) -> AttentionStrategy:
        """Attention for one new token per sequence: rows [B, ...], stored at `lengths_B`."""
        live = self._longest + 1
        self._check_fits(live)
        slot_S = torch.arange(live, device=self.lengths_B.device)
        mask = (slot_S <= self.lengths_B[:, None])[:, None, None, :]

        def attention(layer_index: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            keys, values = self.keys[layer_index], self.values[layer_index]
            keys[self._rows_B, :, self.lengths_B] = key
            values[self._rows_B, :, self.lengths_B] = value
            query, keys, values = query[:, :, None], keys[:, :, :live], values[:, :, :live]
            context = F.scaled_dot_product_attention(
                query, keys, values, attn_mask=mask, enable_gqa=query.shape[1] != key.shape[1]
            )
            return context[:, :, 0]

        return attention

    def advance(self) -> None:
        """Count the tokens that a decoding step has stored."""
        self.lengths_B += 1
        self._longest += 1

    def _check_fits(self, length: int) -> None:
        if length > self.max_length:
            raise ValueError(
                f"the cache holds {self.max_length} tokens per sequence, {length} are needed; "
                "make max_length larger"
            )
