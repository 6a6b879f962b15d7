"""rope_append_attention: equal to rope_append and decode_attention, whether split or not."""

import math

import pytest
import torch
from iris_kernels import decode_attention, rope_append, rope_append_attention
from iris_kernels.decode_attention import CHUNK, triton_path
from kernel_oracle import rounding

ops = torch.ops.iris_kernels

# name: (H, Hkv, Dh, dtype, cache dtype)
REGIMES = {
    "float32": (2, 2, 16, torch.float32, torch.float32),
    "grouped_heads": (4, 2, 32, torch.bfloat16, torch.bfloat16),
    "head_width_not_a_power_of_two": (3, 1, 20, torch.float16, torch.float16),
    "fp8_cache": (2, 1, 32, torch.bfloat16, torch.float8_e4m3fn),
}
S, PREFIX_S = CHUNK + 40, CHUNK + 9
LENGTHS = [0, 5, CHUNK - 1, CHUNK, CHUNK + 7]


def make_inputs(H, Hkv, Dh, dtype, cache_dtype, device, seed=0):
    """Query, key and value of one projection, tables, caches, lengths; and the prefix arguments.

    Entries that are not live hold NaN.
    """
    generator = torch.Generator().manual_seed(seed)
    B = len(LENGTHS)
    parts = torch.randn(B, (H + 2 * Hkv), Dh, generator=generator) * 2
    query, key, value = parts.to(device, dtype).split([H, Hkv, Hkv], 1)
    angles = torch.randn(S + PREFIX_S, Dh // 2, generator=generator) * 3
    lengths, prefix_lengths = torch.tensor(LENGTHS), torch.tensor([3, PREFIX_S, 0, CHUNK, 7])
    live = torch.arange(S) < lengths[:, None]
    own = [torch.randn(B, Hkv, S, Dh, generator=generator) for _ in range(2)]
    own = [t.masked_fill(~live[:, None, :, None], math.nan) for t in own]
    shared = [torch.randn(2, Hkv, PREFIX_S, Dh, generator=generator) for _ in range(2)]
    caches = [t.to(device, dtype).to(cache_dtype) for t in own + shared]
    tensors = [query, key, value, angles.cos().to(device), angles.sin().to(device), *caches[:2]]
    prefix = {
        "prefix_keys": caches[2], "prefix_values": caches[3],
        "prefix_lengths": prefix_lengths.to(device),
        "prefix_index": torch.tensor([1, 0, 1, -1, 0], device=device),
    }  # fmt: skip
    return [*tensors, lengths.to(device)], prefix


def copied(inputs):
    return [*inputs[:5], *(t.clone() for t in inputs[5:7]), inputs[7]]


def in_two_steps(query, key, value, cos, sin, keys, values, lengths, **prefix):
    """The two ops that it replaces."""
    position = lengths
    if prefix:
        position = lengths + prefix["prefix_lengths"] * (prefix["prefix_index"] >= 0)
    tables = cos[position], sin[position]
    rotated = rope_append(query, key, value, *tables, keys, values, lengths)
    return decode_attention(rotated, keys, values, lengths + 1, **prefix)


@pytest.mark.parametrize("with_prefix", [False, True])
@pytest.mark.parametrize("regime", REGIMES)
def test_equals_the_two_ops(regime, with_prefix, backend, device):
    inputs, prefix = make_inputs(*REGIMES[regime], device)
    prefix = prefix if with_prefix else {}
    ours, theirs = copied(inputs), copied(inputs)
    out = rope_append_attention(*ours, **prefix)
    expected = in_two_steps(*theirs, **prefix)
    tolerance = 1e-5 if regime == "float32" else 8 * rounding(out.dtype)
    assert out.dtype == inputs[0].dtype and out.isfinite().all()
    torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance)
    for mine, same in zip(ours[5:7], theirs[5:7], strict=True):  # written once, and only there
        torch.testing.assert_close(mine.float(), same.float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("regime", ["grouped_heads", "float32"])
def test_splitting_changes_no_bit(regime, backend, device, monkeypatch):
    """And so neither does the number of sequences, which decides it."""
    inputs, prefix = make_inputs(*REGIMES[regime], device)
    results = []
    for below in (0, 10**6):
        monkeypatch.setattr(triton_path, "SPLIT_BELOW", below)
        results.append(rope_append_attention(*copied(inputs), **prefix))
        results.append(decode_attention(inputs[0], *inputs[5:7], inputs[7], **prefix))
    assert torch.equal(results[0], results[2])
    assert torch.equal(results[1], results[3])


@pytest.mark.gpu
def test_splitting_changes_no_bit_at_real_sizes(monkeypatch):
    monkeypatch.setenv("IRIS_KERNELS_BACKEND", "triton")
    inputs, prefix = make_inputs(16, 16, 128, torch.bfloat16, torch.bfloat16, "cuda")
    results = []
    for below in (0, 10**6):
        monkeypatch.setattr(triton_path, "SPLIT_BELOW", below)
        results.append(rope_append_attention(*copied(inputs), **prefix))
    assert torch.equal(*results)


def test_a_sequence_does_not_depend_on_other_sequences(backend, device):
    inputs, prefix = make_inputs(*REGIMES["grouped_heads"], device)
    together = rope_append_attention(*copied(inputs), **prefix)
    for b in (0, 4):
        part = slice(b, b + 1)
        alone = [t[part] if i not in (3, 4) else t for i, t in enumerate(copied(inputs))]
        kept = {n: t[part] if t.dim() == 1 else t for n, t in prefix.items()}
        out = rope_append_attention(*alone, **kept)
        if backend != "torch":
            assert torch.equal(out, together[part])
        torch.testing.assert_close(out, together[part], rtol=2e-2, atol=2e-2)


def test_lengths_outside_the_cache_write_nothing(backend, device):
    """The launcher itself: the op checks lengths where it can read them."""
    if backend != "triton":
        pytest.skip("on a CPU other paths are not reached")
    query, key, value, cos, sin, keys, values, lengths = make_inputs(*REGIMES["float32"], device)[0]
    before = keys.clone(), values.clone()
    # Entry -1 of a sequence is the last one of the sequence before it.
    lengths = torch.full_like(lengths, -1)
    lengths[0] = S
    new = triton_path.NewToken(key, value, cos, sin)
    out = triton_path.decode_triton(query, keys, values, lengths, (None,) * 4, 0.25, new)
    for cache, given in zip((keys, values), before, strict=True):
        torch.testing.assert_close(cache, given, rtol=0, atol=0, equal_nan=True)
    assert out[1:].isfinite().all()  # the new token alone


def test_steps_that_follow_one_another(backend, device):
    """Three tokens one by one: each attends to those before it."""
    generator = torch.Generator().manual_seed(4)
    query, key, value = (torch.randn(3, 2, 2, 16, generator=generator).to(device) for _ in range(3))
    angles = torch.randn(8, 8, generator=generator).to(device)
    keys, values = (torch.full((2, 2, 3, 16), math.nan, device=device) for _ in range(2))
    lengths = torch.zeros(2, dtype=torch.int64, device=device)
    for step in range(3):
        new = (query[step], key[step], value[step], angles.cos(), angles.sin())
        out = rope_append_attention(*new, keys, values, lengths)
        lengths += 1
    tables = angles.cos()[[2, 2]], angles.sin()[[2, 2]]
    rotated = rope_append(*new[:3], *tables, keys, values, lengths - 1)
    expected = decode_attention(rotated, keys, values, lengths)
    assert keys.isfinite().all() and values.isfinite().all()
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


def test_opcheck_and_fullgraph(backend, device):
    inputs, prefix = make_inputs(*REGIMES["float32"], device)
    inputs = [t[:2] if i not in (3, 4) else t for i, t in enumerate(inputs)]
    prefix = {n: t[:2] for n, t in prefix.items()}
    inputs[5:7] = [t.nan_to_num(0.5) for t in inputs[5:7]]
    torch.library.opcheck(
        ops.rope_append_attention.default, (*copied(inputs), *prefix.values(), 0.25)
    )
    torch._dynamo.reset()

    def double(query, *rest):
        return rope_append_attention(query * 2, *rest, **prefix) + 1, rest[4]

    compiled = torch.compile(double, fullgraph=True, backend="aot_eager")
    found, expected = compiled(*copied(inputs)), double(*copied(inputs))
    torch.testing.assert_close(found, expected)


def test_no_rows(backend, device):
    inputs, _ = make_inputs(*REGIMES["float32"], device)
    none = [t[:0] if i not in (3, 4) else t for i, t in enumerate(inputs)]
    assert rope_append_attention(*none).shape == (0, 2, 16)


WRONG_ARGUMENTS = {
    r"key is torch.float32 of shape \(5, 2, 16\)": {1: lambda t: t.repeat(1, 2, 1)},
    "value is torch.bfloat16": {2: lambda t: t.bfloat16()},
    r"cos is torch.float32 of shape \(5, 3\)": {3: lambda t: t[:5, :3]},
    "sin is torch.float64": {4: lambda t: t.double()},
    "cos and sin of equal strides": {4: lambda t: t.repeat(1, 2)[:, :8]},
    r"lengths is \[0, 5, 255, 256, 296\]": {7: lambda t: t.where(t < CHUNK + 1, S)},
    r"position is \[0, 5, 255, 256, 263\]: all must lie in \[0, 99\]": {
        3: lambda t: t[:100],
        4: lambda t: t[:100],
    },
}


@pytest.mark.parametrize("message", WRONG_ARGUMENTS)
def test_wrong_arguments_are_named(message):
    inputs, _ = make_inputs(2, 1, 16, torch.float32, torch.float32, "cpu")
    for place, change in WRONG_ARGUMENTS[message].items():
        inputs[place] = change(inputs[place])
    before = inputs[5].clone()
    with pytest.raises(ValueError, match=message):
        rope_append_attention(*inputs)
    torch.testing.assert_close(inputs[5], before, rtol=0, atol=0, equal_nan=True)
