"""decode_attention: ragged lengths, shared prefixes, grouped heads; only live entries are read."""

import math

import pytest
import torch
from iris_kernels import cpp, decode_attention
from iris_kernels.decode_attention import decode_attention_reference
from kernel_oracle import EPS, assert_close, rounding

ops = torch.ops.iris_kernels

# name: (B, H, Hkv, S, Dh, dtype). Chunks have 256 entries, of which a slot takes every L-th,
# L = 4096 / Dh: 32 at Dh = 128.
REGIMES = {
    "one_round_of_slots": (3, 2, 2, 40, 128, torch.float32),
    "several_rounds": (2, 2, 2, 150, 128, torch.bfloat16),
    "head_64": (2, 3, 3, 200, 64, torch.float16),
    "head_16": (3, 4, 4, 30, 16, torch.float32),
    "head_width_not_a_power_of_two": (2, 2, 2, 20, 80, torch.float32),
    "head_width_of_no_whole_vector": (2, 2, 1, 23, 27, torch.bfloat16),
    "grouped_heads": (2, 6, 2, 33, 64, torch.bfloat16),
    "one_key_head": (2, 4, 1, 33, 16, torch.float32),
    "one_entry": (2, 2, 2, 1, 32, torch.float32),
}


def case(B, H, Hkv, S, Dh, dtype, device, seed=0):
    """query, key cache, value cache, lengths; entries that are not live hold NaN."""
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(B, H, Dh, generator=generator) * 2
    keys, values = (torch.randn(B, Hkv, S, Dh, generator=generator) for _ in range(2))
    lengths = torch.randint(1, S + 1, (B,), generator=generator)
    lengths[0] = S
    not_live = (torch.arange(S) >= lengths[:, None])[:, None, :, None]
    tensors = [query, keys.masked_fill(not_live, math.nan), values.masked_fill(not_live, math.nan)]
    return [t.to(device, dtype) for t in tensors] + [lengths.to(device)]


def exact(query, keys, values, lengths):
    clean = (t.nan_to_num(0.0).double() for t in (query, keys, values))
    return decode_attention_reference(*clean, lengths)


@pytest.mark.parametrize("regime", REGIMES)
def test_budget(regime, backend, device):
    tensors = case(*REGIMES[regime], device)
    dtype = tensors[0].dtype
    clean = [t.nan_to_num(0.0) for t in tensors[:3]]
    out = decode_attention(*tensors)
    truth = exact(*tensors)
    assert out.dtype == dtype
    eager = decode_attention_reference(*clean, tensors[3])
    # A score of size s shifts its weight by s roundings; then one rounding to the output's dtype.
    largest = float((clean[0].double().norm(dim=-1)).amax() * 4)
    floor = 4 * EPS * largest + 0.5 * rounding(dtype) * float(truth.abs().amax())
    assert_close("context", out, eager, truth, floor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shared_prefix_is_equal_to_a_copy_in_every_cache(dtype, backend, device):
    query, keys, values, lengths = case(4, 2, 2, 20, 16, dtype, device)
    _, prefix_keys, prefix_values, live = case(2, 2, 2, 9, 16, dtype, device, seed=5)
    live[1] = 4
    index = torch.tensor([1, -1, 0, 1], device=device)
    lengths[3] = 0
    prefix_lengths = live[index.clamp(min=0)]
    prefix_lengths[0] = 3  # two sequences see different parts of one prefix
    out = decode_attention(
        query, keys, values, lengths, prefix_keys=prefix_keys, prefix_values=prefix_values,
        prefix_lengths=prefix_lengths, prefix_index=index,
    )  # fmt: skip
    for b in range(4):
        joined = []
        for prefix, own in ((prefix_keys, keys), (prefix_values, values)):
            shared = prefix[index[b], :, : prefix_lengths[b] if index[b] >= 0 else 0]
            joined.append(torch.cat([shared, own[b, :, : lengths[b]]], 1)[None])
        together = torch.tensor([joined[0].shape[2]], device=device)
        truth = exact(query[b : b + 1], *joined, together)[0]
        tolerance = 1e-5 if dtype == torch.float32 else 0.03
        torch.testing.assert_close(out[b].double(), truth, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_fp8_cache_is_equal_to_one_with_the_same_values(dtype, backend, device):
    query, *caches, lengths = case(2, 2, 1, 20, 32, dtype, device)
    _, *shared, live = case(2, 1, 1, 9, 32, dtype, device, seed=5)
    names = ("prefix_keys", "prefix_values")
    rest = {"prefix_lengths": live, "prefix_index": live.new_tensor([0, 1])}

    def attend(convert):
        prefixes = {n: convert(t) for n, t in zip(names, shared, strict=True)}
        return decode_attention(query, *map(convert, caches), lengths, **prefixes, **rest)

    fp8 = attend(lambda cache: cache.to(torch.float8_e4m3fn))
    same = attend(lambda cache: cache.to(torch.float8_e4m3fn).to(dtype))
    # Caches of fp8 take the torch path, not the C++ one.
    tolerance = 1e-5 + rounding(dtype) if backend == "cpp" else 0.0
    torch.testing.assert_close(fp8, same, rtol=tolerance, atol=tolerance)
    assert (fp8 - attend(lambda cache: cache)).abs().max() > 1e-3


def test_a_sequence_without_entries_gives_zero(backend, device):
    query, keys, values, lengths = case(2, 2, 2, 10, 16, torch.float32, device)
    lengths[1] = 0
    keys[1], values[1] = math.nan, math.nan
    out = decode_attention(query, keys, values, lengths)
    assert (out[1] == 0).all() and (out[0] != 0).all()


@pytest.mark.parametrize("scale", [0.0, 0.3])
def test_scale(scale, backend, device):
    query, keys, values, lengths = case(2, 2, 2, 10, 16, torch.float32, device)
    out = decode_attention(query, keys, values, lengths, scale=scale)
    truth = exact(query * scale * 4, keys, values, lengths)
    torch.testing.assert_close(out.double(), truth, rtol=1e-5, atol=1e-5)


def test_large_scores(backend, device):
    """One key's score is larger by thousands: no overflow, and the result is its value."""
    query, keys, values, lengths = case(1, 1, 1, 70, 16, torch.float32, device)
    keys[0, 0, 66] = query[0, 0] * 1e3
    out = decode_attention(query, keys, values, lengths)
    torch.testing.assert_close(out[0, 0], values[0, 0, 66])


def test_a_sequence_does_not_depend_on_other_sequences(backend, device):
    query, keys, values, lengths = case(3, 2, 2, 90, 32, torch.float32, device)
    together = decode_attention(query, keys, values, lengths)
    for b in range(3):
        part = slice(b, b + 1)
        alone = decode_attention(query[part], keys[part], values[part], lengths[part])
        if backend != "torch":
            assert torch.equal(alone, together[part])
        torch.testing.assert_close(alone, together[part], rtol=1e-5, atol=1e-6)


INFINITE = {
    "NaN in the query": lambda query, keys, values: query[0, 0, 3:4].fill_(math.nan),
    "NaN in the last live key": lambda query, keys, values: keys[0, 0, 36, 19:].fill_(math.nan),
    "NaN in a value": lambda query, keys, values: values[0, 0, 36, 1:2].fill_(math.nan),
    "infinity in a value": lambda query, keys, values: values[0, 0, 5, 1:2].fill_(math.inf),
    "a score of infinity": lambda query, keys, values: keys[0, 0, 5].copy_(query[0, 0] * math.inf),
    "a score of minus infinity": lambda query, keys, values: (
        keys[0, 0, 5].copy_(query[0, 0] * -math.inf), values[0, 0, 5, 1:2].fill_(math.inf)
    ),
    "all scores minus infinity": lambda query, keys, values: keys[0, 0].copy_(
        (query[0, 0] * -math.inf).expand(40, -1)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", INFINITE)
def test_infinite_numbers(name, backend, device, monkeypatch):
    """Whatever the path: as torch's attention."""
    query, keys, values, _ = case(1, 1, 1, 40, 20, torch.float32, device)
    lengths = torch.tensor([37], device=device)
    INFINITE[name](query, keys, values)
    out = decode_attention(query, keys, values, lengths)
    monkeypatch.setenv("IRIS_KERNELS_BACKEND", "torch")
    expected = decode_attention(query, keys, values, lengths)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5, equal_nan=True)


@pytest.mark.skipif(cpp.library() is None, reason="no C++ compiler was found at installation")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_change_no_bit(dtype, monkeypatch):
    monkeypatch.setenv("IRIS_KERNELS_BACKEND", "cpp")
    tensors = case(5, 6, 3, 40, 34, dtype, "cpu")
    found = []
    for threads in (1, 3):
        monkeypatch.setattr(cpp, "threads", lambda elements, threads=threads: threads)
        found.append(decode_attention(*tensors))
    assert torch.equal(*found)


def test_strided_caches(backend, device):
    """Query from a fused projection, caches held (B, S, H, Dh), entries of a larger allocation."""
    query, keys, values, lengths = case(2, 3, 3, 12, 16, torch.float32, device)
    expected = decode_attention(query, keys, values, lengths)
    fused = torch.full((2, 9, 16), math.nan, device=device)
    fused[:, 3:6] = query
    held = []
    for cache in (keys, values):
        larger = torch.full((2, 20, 5, 16), math.nan, device=device)
        larger[:, 4:16, 1:4] = cache.transpose(1, 2)
        held.append(larger[:, 4:16, 1:4].transpose(1, 2))
    out = decode_attention(fused[:, 3:6], *held, lengths.int())
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)


SPREAD = {
    "every_third": lambda n: n.repeat_interleave(3)[::3],
    "expanded": lambda n: n[:1].expand(2),
}


@pytest.mark.parametrize("name", SPREAD)
def test_lengths_of_any_strides(name, backend, device):
    query, keys, values, lengths = case(2, 3, 3, 12, 16, torch.float32, device)
    keys, values, lengths = keys.nan_to_num(), values.nan_to_num(), SPREAD[name](lengths)
    prefix = {"prefix_keys": keys, "prefix_values": values, "prefix_lengths": lengths}
    index = torch.arange(2, device=device)
    found = decode_attention(query, keys, values, lengths, **prefix, prefix_index=index)
    prefix["prefix_lengths"] = lengths.contiguous()
    expected = decode_attention(
        query, keys, values, lengths.contiguous(), **prefix, prefix_index=index
    )
    assert torch.equal(found, expected)


def test_opcheck_and_fullgraph(backend, device):
    tensors = case(2, 2, 2, 10, 16, torch.float32, device)
    torch.library.opcheck(ops.decode_attention.default, (*tensors, None, None, None, None, 0.25))
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda q, k, v, n: decode_attention(q * 1.5, k, v, n), fullgraph=True, backend="aot_eager"
    )
    query, *rest = tensors
    torch.testing.assert_close(compiled(query, *rest), decode_attention(query * 1.5, *rest))


def test_no_rows(backend, device):
    tensors = case(2, 2, 2, 10, 16, torch.float32, device)
    assert decode_attention(*(t[:0] for t in tensors)).shape == (0, 2, 16)


@pytest.mark.gpu
def test_graph_replay_reads_new_lengths(monkeypatch):
    monkeypatch.setenv("IRIS_KERNELS_BACKEND", "triton")
    torch.use_deterministic_algorithms(False)
    query, keys, values, lengths = case(8, 4, 4, 300, 128, torch.bfloat16, "cuda")
    keys, values = keys.nan_to_num(0.5), values.nan_to_num(0.5)
    decode_attention(query, keys, values, lengths)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = decode_attention(query, keys, values, lengths)
    lengths.copy_(torch.arange(8, device="cuda") + 3)
    graph.replay()
    assert torch.equal(out, decode_attention(query, keys, values, lengths))


Q, K, N = torch.zeros(2, 4, 16), torch.zeros(2, 2, 5, 16), torch.tensor([5, 1])
ONE_EACH = torch.tensor([1, 1])
PREFIX = {"prefix_keys": torch.zeros(1, 2, 3, 16), "prefix_values": torch.zeros(1, 2, 3, 16)}
WRONG_ARGUMENTS = {
    r"query has shape \(4, 16\)": ((Q[0], K, K, N), {}),
    r"key_cache has shape \(2, 2, 5, 8\)": ((Q, K[..., :8], K, N), {}),
    "key_cache is torch.bfloat16": ((Q, K.bfloat16(), K, N), {}),
    "value_cache is torch.float32": ((Q, K.to(torch.float8_e4m3fn), K, N), {}),
    "prefix_keys is torch.float32 but key_cache is torch.float8": (
        (Q, K.to(torch.float8_e4m3fn), K.to(torch.float8_e4m3fn), N),
        PREFIX | {"prefix_lengths": ONE_EACH, "prefix_index": torch.tensor([0, 0])},
    ),
    "which do not divide the 4": ((Q, K[:, :0], K[:, :0], N), {}),
    "do not divide the 4 of query": ((Q, K.repeat(1, 2, 1, 1)[:, :3], K, N), {}),
    r"value_cache has shape \(2, 2, 4, 16\)": ((Q, K, K[:, :, :4], N), {}),
    r"lengths has shape \(1,\)": ((Q, K, K, N[:1]), {}),
    r"lengths is \[6, 1\]": ((Q, K, K, torch.tensor([6, 1])), {}),
    "go together": ((Q, K, K, N), PREFIX),
    r"prefix_lengths has shape \(1,\)": (
        (Q, K, K, N), PREFIX | {"prefix_lengths": N[1:], "prefix_index": torch.tensor([0, 0])}
    ),
    r"prefix_index is \[0, 1\]": (
        (Q, K, K, N), PREFIX | {"prefix_lengths": ONE_EACH, "prefix_index": torch.tensor([0, 1])}
    ),
}  # fmt: skip


@pytest.mark.parametrize("message", WRONG_ARGUMENTS)
def test_wrong_arguments_are_named(message):
    positional, keywords = WRONG_ARGUMENTS[message]
    with pytest.raises(ValueError, match=message):
        decode_attention(*positional, **keywords)
