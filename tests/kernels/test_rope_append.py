"""rope_append: rotation against complex numbers; exactly one slot per sequence is written."""

import math

import pytest
import torch
from iris_kernels import rope_append
from iris_kernels.rope_append import rope_append_reference
from kernel_oracle import EPS, assert_close, rounding

ops = torch.ops.iris_kernels
FP8 = torch.float8_e4m3fn
FP8_MAX = torch.finfo(FP8).max

# name: (B, H, Hkv, S, Dh, dtype). A program takes up to 16 heads of one sequence.
REGIMES = {
    "janus_1b": (2, 16, 16, 9, 128, torch.bfloat16),
    "two_programs_of_heads": (2, 32, 32, 5, 64, torch.float32),
    "heads_not_a_power_of_two": (2, 18, 3, 5, 16, torch.float32),
    "one_head": (3, 1, 1, 4, 32, torch.float16),
    "width_not_a_power_of_two": (2, 2, 2, 5, 80, torch.float32),
    "odd_half": (3, 3, 2, 4, 22, torch.bfloat16),
    "two_channels": (2, 4, 2, 3, 2, torch.float32),
}


def case(B, H, Hkv, S, Dh, dtype, device, seed=0):
    """query, key, value, cos, sin, key cache, value cache, slots; the caches hold NaN."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    angles = torch.rand(B, Dh // 2, generator=generator) * 50
    caches = [torch.full((B, Hkv, S, Dh), math.nan) for _ in range(2)]
    slots = torch.randint(S, (B,), generator=generator)
    numbers = [normal(B, H, Dh), normal(B, Hkv, Dh), normal(B, Hkv, Dh)]
    numbers, caches = ([t.to(device, dtype) for t in ts] for ts in (numbers, caches))
    tables = [t.to(device) for t in (angles.cos(), angles.sin())]
    return [*numbers, *tables, *caches, slots.to(device)]


@pytest.mark.parametrize("regime", REGIMES)
def test_budget(regime, backend, device):
    inputs = case(*REGIMES[regime], device)
    query, key, value, cos, sin, key_cache, value_cache, slots = inputs
    dtype = query.dtype
    rotated = rope_append(*inputs)
    assert rotated.is_contiguous() and rotated.dtype == dtype
    rows = torch.arange(len(slots), device=device)
    kept = {"query": (query, rotated), "key": (key, key_cache[rows, :, slots])}
    for name, (given, found) in kept.items():
        truth = rope_append_reference(given.double(), cos.double(), sin.double())
        eager = rope_append_reference(given.float(), cos, sin).to(dtype)
        floor = (4 * EPS + rounding(dtype)) * float(truth.abs().max())
        assert_close(name, found, eager, truth, floor)
    assert torch.equal(value_cache[rows, :, slots], value)
    for cache in (key_cache, value_cache):  # nothing else was written
        cache[rows, :, slots] = math.nan
        assert cache.isnan().all()


def test_a_slot_outside_the_cache_is_refused_or_not_written(backend, device):
    inputs = case(3, 2, 2, 4, 16, torch.float32, device)
    for slot in (-1, 4):
        inputs[7] = torch.tensor([1, slot, 2], device=device)
        if device == "cpu":
            with pytest.raises(ValueError, match=rf"slots is \[1, {slot}, 2\].*\[0, 3\]"):
                rope_append(*inputs)
        else:
            rope_append(*inputs)
            assert inputs[5][1].isnan().all() and inputs[6][1].isnan().all()


def test_fp8_caches_round_and_saturate(backend, device):
    query, key, value, cos, sin, *_, slots = case(2, 4, 2, 3, 32, torch.float32, device)
    cos, sin = torch.ones_like(cos), torch.zeros_like(sin)  # no rotation
    value = (value * 8).to(FP8).float()  # Triton's interpreter rounds to fp8 wrongly
    value[1, 0, 5], value[0, 1, 9] = 1e6, -math.inf
    key = (key * 8).to(FP8).float()
    key[0, 0, 0] = -1e6
    caches = [torch.zeros(2, 2, 3, 32, device=device).to(FP8) for _ in range(2)]
    rope_append(query, key, value, cos, sin, *caches, slots)
    rows = torch.arange(2, device=device)
    for cache, given in zip(caches, (key, value), strict=True):
        kept = cache.float()[rows, :, slots]
        assert torch.equal(kept, given.clamp(-FP8_MAX, FP8_MAX))


def test_strided_inputs_and_caches(backend, device):
    query, key, value, cos, sin, key_cache, value_cache, slots = case(
        2, 3, 3, 5, 16, torch.float32, device
    )
    expected = rope_append(query, key, value, cos, sin, key_cache, value_cache, slots)
    fused = torch.full((2, 10, 16), math.nan, device=device)
    for i, part in enumerate((query, key, value)):
        fused[:, 3 * i : 3 * i + 3] = part
    parts = [fused[:, i : i + 3] for i in (0, 3, 6)]
    tables = []
    for table in (cos, sin):
        wider = torch.full((2, 11), math.nan, device=device)
        wider[:, :8] = table
        tables.append(wider[:, :8])
    # Key and value caches of different strides.
    held = [torch.full((2, 5, heads, 16), math.nan, device=device) for heads in (4, 6)]
    others = [t[:, :, :3].transpose(1, 2) for t in held]
    slots = slots.int()
    found = rope_append(*parts, *tables, *others, slots)
    assert torch.equal(found, expected)
    for mine, theirs in zip(others, (key_cache, value_cache), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0, equal_nan=True)
    assert all(t[:, :, 3:].isnan().all() for t in held)


def test_a_sequence_does_not_depend_on_other_sequences(backend, device):
    inputs = case(3, 2, 2, 4, 16, torch.bfloat16, device)
    alone = [[t[b : b + 1].clone() for t in inputs] for b in range(3)]
    together = rope_append(*inputs)
    for b, part in enumerate(alone):
        assert torch.equal(rope_append(*part)[0], together[b])
        torch.testing.assert_close(part[5][0], inputs[5][b], rtol=0, atol=0, equal_nan=True)


def test_opcheck_and_fullgraph(backend, device):
    inputs = case(2, 4, 2, 3, 16, torch.float32, device)
    inputs[5].zero_(), inputs[6].zero_()  # opcheck compares, and NaN is not equal to NaN
    torch.library.opcheck(ops.rope_append.default, tuple(t.clone() for t in inputs))
    torch._dynamo.reset()

    def run(query, *rest):
        return rope_append(query * 2, *rest) + 1, rest[4]

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    expected = run(*(t.clone() for t in inputs))
    for mine, theirs in zip(compiled(*(t.clone() for t in inputs)), expected, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_no_rows(backend, device):
    inputs = case(2, 4, 2, 3, 16, torch.float32, device)
    assert rope_append(*(t[:0] for t in inputs)).shape == (0, 4, 16)


@pytest.mark.gpu
def test_graph_replay_writes_to_new_slots(monkeypatch):
    monkeypatch.setenv("IRIS_KERNELS_BACKEND", "triton")
    torch.use_deterministic_algorithms(False)
    inputs = case(4, 4, 4, 9, 128, torch.bfloat16, "cuda")
    rope_append(*inputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        rope_append(*inputs)
    inputs[7].copy_(torch.tensor([8, 0, 3, 5]))
    inputs[6].fill_(math.nan)
    graph.replay()
    assert torch.equal(inputs[6][torch.arange(4), :, [8, 0, 3, 5]], inputs[2])
    assert inputs[6].isnan().all(dim=-1).sum() == 4 * 4 * 8


GIVEN = case(2, 4, 2, 3, 8, torch.float32, "cpu")
WRONG_ARGUMENTS = {
    r"query has shape \(4, 8\)": (0, GIVEN[0][0]),
    r"query has shape \(2, 4, 7\)": (0, GIVEN[0][..., :7]),
    "query has strides": (0, torch.zeros(2, 4, 16)[..., ::2]),
    "key has shape": (1, GIVEN[1][0]),
    "key is torch.bfloat16": (1, GIVEN[1].bfloat16()),
    r"value is torch.float32 of shape \(2, 1, 8\)": (2, GIVEN[2][:, :1]),
    r"cos is torch.float32 of shape \(2, 8\)": (3, torch.zeros(2, 8)),
    "sin is torch.float64": (4, GIVEN[4].double()),
    "cos has strides": (3, torch.zeros(2, 8)[:, :4]),
    "key_cache is torch.float16": (5, GIVEN[5].half()),
    "value_cache is torch.float8": (6, GIVEN[6].to(FP8)),
    r"slots is torch.float32": (7, torch.zeros(2)),
    r"slots is torch.int64 of shape \(1,\)": (7, GIVEN[7][:1]),
}


@pytest.mark.parametrize("message", WRONG_ARGUMENTS)
def test_wrong_arguments_are_named(message):
    place, wrong = WRONG_ARGUMENTS[message]
    inputs = [*GIVEN[:place], wrong, *GIVEN[place + 1 :]]
    with pytest.raises(ValueError, match=message):
        rope_append(*inputs)
