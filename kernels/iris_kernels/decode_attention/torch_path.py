"""`decode_attention` in torch."""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ..rope_append import rope_append_torch
from .checks import NewToken, positions


def decode_torch(
    query: Tensor, keys: Tensor, values: Tensor, lengths: Tensor,
    prefix: tuple[Tensor | None, ...], scale: float, new: NewToken | None = None,
) -> Tensor:  # fmt: skip
    """Same as `decode_triton`: torch's attention without a mask, once per group of sequences of
    equal lengths and prefix; with `new` after `rope_append_torch`.

    Reads the lengths on the host, which waits for the device on a GPU.
    """
    if new is not None:
        at = positions(lengths, prefix)
        tables = new.cos[at], new.sin[at]
        query = rope_append_torch(query, new.key, new.value, *tables, keys, values, lengths)
        lengths = lengths + 1
    prefix_keys, prefix_values, prefix_lengths, prefix_index = prefix
    context = torch.zeros_like(query, memory_format=torch.contiguous_format)
    own_lengths, shared_lengths, shared = lengths.tolist(), [0] * len(query), [-1] * len(query)
    if prefix_keys is not None:
        shared_lengths = prefix_lengths.where(prefix_index >= 0, 0).tolist()
        shared = prefix_index.tolist()
    groups: dict[tuple[int, int, int], list[int]] = {}
    for b, group in enumerate(zip(own_lengths, shared_lengths, shared, strict=True)):
        groups.setdefault(group, []).append(b)
    for (length, prefix_length, n), members in groups.items():
        rows = _as_index(members)
        k, v = keys[rows, :, :length], values[rows, :, :length]
        if prefix_length:
            size = (len(members), -1, -1, -1)
            k = torch.cat([prefix_keys[n, :, :prefix_length].expand(size), k], 2)
            v = torch.cat([prefix_values[n, :, :prefix_length].expand(size), v], 2)
        if k.shape[2]:
            q = query[rows, :, None].float()
            # Heads that share keys become queries of one head: no key is repeated.
            q = q.view(len(members), k.shape[1], -1, q.shape[-1])
            out = scaled_dot_product_attention(q, k.float(), v.float(), scale=scale)
            context[rows] = out.view(len(members), *query.shape[1:]).to(query.dtype)
    return context


def _as_index(rows: list[int]) -> slice | list[int]:
    """Index of these rows: a slice, which makes a view, if they are adjacent."""
    adjacent = rows[-1] - rows[0] + 1 == len(rows)
    return slice(rows[0], rows[-1] + 1) if adjacent else rows
