"""Plain calls on a CPU: what a custom op guarantees holds there as well."""

import pytest
import torch
from iris_kernels import (
    cpp,
    decode_attention,
    guided_sample,
    guided_sample_step,
    rope_append,
    token_stats,
)
from torch._subclasses import FakeTensor, FakeTensorMode


@pytest.fixture(autouse=True, params=["cpp", "torch"])
def path(request, monkeypatch):
    if request.param == "cpp" and cpp.library() is None:
        pytest.skip("the C++ kernels are not compiled")
    monkeypatch.setenv("IRIS_KERNELS_BACKEND", request.param)


def logits(rows: int = 3, V: int = 50) -> torch.Tensor:
    return torch.randn(rows, V, generator=torch.Generator().manual_seed(0))


def zeros(rows: int = 3) -> torch.Tensor:
    return torch.zeros(rows, dtype=torch.int64)


def test_the_default_device_does_not_matter():
    inputs, token_ids = logits(5, 4999), zeros(5)
    expected = token_stats(inputs, token_ids)
    with torch.device("meta"):
        found = token_stats(inputs, token_ids)
    assert all(map(torch.equal, found, expected))
    assert all(map(torch.equal, token_stats(inputs, token_ids), expected))


def test_results_share_no_memory():
    sampled = guided_sample(logits(), None, torch.full((3,), 0.5), cfg_weight=1.0)
    before = sampled.conditional.logprob.clone()
    sampled.guided.logprob.zero_()
    assert torch.equal(sampled.conditional.logprob, before)


def test_small_exponentials_do_not_depend_on_other_rows():
    # The smallest float32 that is not denormal is exp(-87.34).
    for d in torch.linspace(-87.4, -86.8, 61).tolist():
        row = torch.tensor([[0.0, d, d]])
        alone = token_stats(row, zeros(1))
        both = token_stats(torch.cat([row, row - torch.tensor([0.0, 200.0, 0.0])]), zeros(2))
        assert all(torch.equal(a, b[:1]) for a, b in zip(alone, both, strict=True)), d


@pytest.mark.parametrize("column", [-1, 4])
def test_a_step_outside_the_buffers_is_refused(column):
    buffers = zeros(12).view(3, 4), torch.zeros(4, 3, 4), torch.zeros(4, 3, 4)
    with pytest.raises(IndexError, match=f"step is {column}: it must lie in"):
        guided_sample_step(
            logits(), None, torch.rand(3, 4), torch.tensor([column]), *buffers, cfg_weight=1.0
        )


def test_buffers_that_a_step_has_written_have_a_new_version():
    buffers = zeros(12).view(3, 4), torch.zeros(4, 3, 4), torch.zeros(4, 3, 4)
    guided_sample_step(
        logits(), None, torch.rand(3, 4), torch.tensor([1]), *buffers, cfg_weight=1.0
    )
    assert all(buffer._version > 0 for buffer in buffers)


@pytest.mark.parametrize("name", ["key", "value"])
def test_a_cache_never_becomes_part_of_a_graph(name):
    new = {each: torch.randn(2, 1, 8) for each in ("query", "key", "value")}
    new[name].requires_grad_()
    caches = torch.zeros(2, 1, 4, 8), torch.zeros(2, 1, 4, 8)
    tables = torch.randn(2, 4), torch.randn(2, 4)
    rope_append(*new.values(), *tables, *caches, zeros(2))
    assert not any(cache.requires_grad for cache in caches)


def test_attention_to_a_cache_has_no_gradient():
    cache = torch.randn(2, 1, 4, 8, requires_grad=True)
    context = decode_attention(torch.randn(2, 1, 8), cache, cache, zeros(2) + 3)
    assert not context.requires_grad


@pytest.mark.filterwarnings("ignore:.*performance drop")
def test_gradients_of_several_upstream_gradients_at_once():
    leaf, token_ids = logits().requires_grad_(), zeros()
    out = token_stats(leaf, token_ids).nsc
    upstream = torch.randn(4, 3)

    def gradient(each):
        return torch.autograd.grad(out, leaf, each, retain_graph=True)[0]

    expected = torch.stack([gradient(each) for each in upstream])
    torch.testing.assert_close(torch.func.vmap(gradient)(upstream), expected)


def test_one_fake_argument_makes_fake_results():
    """Its address is 0."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = torch.empty(3, 50)
    uniform, token_ids = (mode.from_tensor(t) for t in (torch.rand(3), zeros()))
    heads, cache = torch.randn(3, 1, 8), torch.zeros(3, 1, 4, 8)
    results = [
        guided_sample(logits(), fake, torch.rand(3), cfg_weight=2.0).token_ids,
        guided_sample(logits(), None, uniform, cfg_weight=2.0).token_ids,
        token_stats(logits(), token_ids).nsc,
        token_stats(logits(), zeros(), mask=token_ids == 0).nsc,
        decode_attention(heads, cache, cache, token_ids),
    ]
    assert all(isinstance(result, FakeTensor) for result in results)


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_a_traced_graph_contains_the_op():
    inputs, token_ids = logits(), zeros()
    traced = torch.jit.trace(lambda x: token_stats(x, token_ids).logprob, inputs)
    masked = inputs.flip(1).clone()
    masked[0, 3] = -torch.inf
    assert torch.equal(traced(masked), token_stats(masked, token_ids).logprob)
