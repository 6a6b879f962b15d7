"""token_stats: properties for any input, and its behaviour as a PyTorch operator."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from iris_kernels import token_stats
from iris_kernels.token_stats import token_stats_reference
from kernel_oracle import (
    FIELDS,
    NO_TRITON,
    TRITON_RUNS,
    random_case,
    run,
    upstream_gradients,
)

ops = torch.ops.iris_kernels

# --- Properties -----------------------------------------------------------------------------------


@st.composite
def cases(draw):
    """Logits [R, V] float32 and token ids [R], over sizes, scales and seeds."""
    rows, V = draw(st.integers(1, 4)), draw(st.integers(1, 700))
    scale = draw(st.sampled_from([0.0, 1e-3, 1.0, 10.0, 100.0]))
    return random_case((rows,), V, torch.float32, "cpu", scale, draw(st.integers(0, 2**31)))


properties = settings(max_examples=15, deadline=None, derandomize=True)


@pytest.fixture(scope="module", params=["torch", "triton"])
def module_backend(request):
    """`backend`, set once for all examples of a property."""
    if request.param == "triton" and not TRITON_RUNS:
        pytest.skip(NO_TRITON)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IRIS_KERNELS_BACKEND", request.param)
        yield request.param


@properties
@given(cases())
def test_ranges(module_backend, device_of_properties, case):
    logits, token_ids = (t.to(device_of_properties) for t in case)
    out = token_stats(logits, token_ids)
    assert (out.nsc <= 0).all() and (out.logprob <= 0).all()
    assert (out.entropy >= 0).all()
    assert (out.entropy <= math.log(logits.shape[-1]) * (1 + 1e-6) + 1e-6).all()


@properties
@given(cases(), st.integers(-1000, 1000))
def test_shift_changes_only_lse(module_backend, device_of_properties, case, shift):
    logits, token_ids = (t.to(device_of_properties) for t in case)
    logits = (logits * 64).round() / 64  # so that the shift itself rounds nothing
    before, after = token_stats(logits, token_ids), token_stats(logits + shift, token_ids)
    for name in ("logprob", "nsc", "entropy"):
        assert torch.equal(getattr(before, name), getattr(after, name)), name
    torch.testing.assert_close(after.lse, before.lse + shift, rtol=1e-6, atol=1e-4)


@properties
@given(cases(), st.integers(0, 2**31))
def test_permutation_of_the_classes(module_backend, device_of_properties, case, seed):
    logits, token_ids = (t.to(device_of_properties) for t in case)
    V = logits.shape[-1]
    order = torch.randperm(V, generator=torch.Generator().manual_seed(seed)).to(logits.device)
    permuted = token_stats(logits[:, order], order.argsort()[token_ids])
    spread = float(logits.amax() - logits.amin())
    for a, b in zip(token_stats(logits, token_ids), permuted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6 * (1 + spread))


@properties
@given(cases())
def test_batch_invariance_and_determinism(module_backend, device_of_properties, case):
    """The same bits for a row alone, with other rows, and again."""
    logits, token_ids = (t.to(device_of_properties) for t in case)
    gradients = upstream_gradients(token_ids.shape, logits.device)
    out, gradient = run(token_stats, logits, token_ids, gradients)
    again, gradient_again = run(token_stats, logits, token_ids, gradients)
    assert all(torch.equal(a, b) for a, b in zip(out, again, strict=True))
    assert torch.equal(gradient, gradient_again)
    for row in range(len(logits)):
        part = slice(row, row + 1)
        alone, gradient_alone = run(
            token_stats, logits[part], token_ids[part], [g[part] for g in gradients]
        )
        assert all(torch.equal(a[part], b) for a, b in zip(out, alone, strict=True))
        assert torch.equal(gradient[part], gradient_alone)


@pytest.fixture(scope="module")
def device_of_properties():
    return "cuda" if torch.cuda.is_available() else "cpu"


def test_batch_invariance_across_chunks_and_threads(monkeypatch):
    """Sizes at which torch splits work over CPU threads, and rows are in several chunks."""
    monkeypatch.setenv("IRIS_KERNELS_BACKEND", "torch")
    logits, token_ids = random_case((35,), 40001, torch.float32, "cpu")
    gradients = upstream_gradients((35,), "cpu")
    out, gradient = run(token_stats, logits, token_ids, gradients)
    for part in (slice(0, 1), slice(34, 35), slice(5, 8), slice(3, 20)):
        alone, gradient_alone = run(
            token_stats, logits[part], token_ids[part], [g[part] for g in gradients]
        )
        assert all(torch.equal(a[part], b) for a, b in zip(out, alone, strict=True))
        assert torch.equal(gradient[part], gradient_alone)


# --- As an operator -------------------------------------------------------------------------------


def test_gradcheck(monkeypatch):
    """The torch path supports float64, so the derivative formulas are checked directly."""
    monkeypatch.setenv("IRIS_KERNELS_BACKEND", "torch")
    torch.manual_seed(0)
    logits = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    token_ids = torch.tensor([2, -100, 6])

    def function(x):
        return tuple(token_stats(x * 1.0, token_ids, temperature=0.8, vocab_size=7))

    assert torch.autograd.gradcheck(function, logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype, backend, device):
    logits, token_ids = random_case((3,), 50, dtype, device)
    mask = torch.tensor([True, False, True], device=device)
    for leaf in (logits, logits.clone().requires_grad_()):
        arguments = (leaf, token_ids, mask, torch.tensor(0.7), 48, False)
        torch.library.opcheck(ops.token_stats.default, arguments)
    saved = [torch.rand(3, device=device) + 1 for _ in range(3)]
    upstream = upstream_gradients((3,), device)
    upstream[1] = None
    for op in (ops.token_stats_backward, ops.token_stats_backward_):
        torch.library.opcheck(
            op.default, (logits.clone(), token_ids, mask, *saved, *upstream, torch.tensor(0.7), 48)
        )


@pytest.mark.parametrize("inplace", [False, True])
def test_fullgraph(inplace, backend, device):
    logits, token_ids = random_case((4,), 300, torch.float32, device)

    def loss(x, ids):
        out = token_stats(x * 2, ids, temperature=0.9, inplace_backward=inplace)
        return (out.logprob * 2 + out.nsc - out.entropy + out.lse.square()).sum()

    def value_and_gradient(function):
        leaf = logits.clone().requires_grad_()
        value = function(leaf, token_ids)
        value.backward()
        return value.detach(), leaf.grad

    torch._dynamo.reset()
    compiled = value_and_gradient(torch.compile(loss, fullgraph=True))
    for mine, expected in zip(compiled, value_and_gradient(loss), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-6, atol=1e-6)


def graphs_compiled(function, logits, token_ids, temperatures) -> list[int]:
    """Number of graphs after each call; each result is compared with eager mode."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    graphs = []
    for temperature in temperatures:
        out = compiled(logits, token_ids, temperature)
        expected = function(logits, token_ids, temperature)
        assert all(torch.equal(a, b) for a, b in zip(out, expected, strict=True))
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    return graphs


def test_temperature_compiles_nothing(backend, device):
    """A run-time value: torch.compile makes a float a constant once, and not again."""
    logits, token_ids = random_case((4,), 300, torch.float32, device)
    values = (0.9, 0.8, 0.7, 1.3)

    def function(x, ids, temperature):
        return token_stats(x, ids, temperature=temperature)

    assert graphs_compiled(function, logits, token_ids, values) == [1, 2, 2, 2]
    tensors = [torch.tensor(value, device=device) for value in values]
    assert graphs_compiled(function, logits, token_ids, tensors) == [1, 1, 1, 1]


def test_temperature_as_a_tensor(backend, device):
    logits, token_ids = random_case((4,), 300, torch.float32, device)
    gradients = upstream_gradients((4,), device)
    expected = run(token_stats, logits, token_ids, gradients, temperature=0.7)
    temperature = torch.tensor(0.7, device=device)
    out, gradient = run(token_stats, logits, token_ids, gradients, temperature=temperature)
    assert all(torch.equal(a, b) for a, b in zip(out, expected[0], strict=True))
    assert torch.equal(gradient, expected[1])


def test_no_graph_is_kept_without_gradients(backend, device):
    logits, token_ids = random_case((4,), 300, torch.float32, device)
    assert not any(value.requires_grad for value in token_stats(logits, token_ids))
    with torch.no_grad():
        out = token_stats(logits.requires_grad_(), token_ids)
    assert not any(value.requires_grad for value in out)


def test_memory_of_the_torch_path(monkeypatch):
    """Besides the gradient, both passes hold two chunks, for any number of rows."""
    monkeypatch.setenv("IRIS_KERNELS_BACKEND", "torch")
    torch.use_deterministic_algorithms(False)
    logits, token_ids = random_case((1024,), 8192, torch.float32, "cpu")
    leaf = logits.requires_grad_()

    def forward_backward(function):
        out = function(leaf, token_ids)
        torch.autograd.grad(out, leaf, upstream_gradients((1024,), "cpu"))

    size = logits.numel() * 4
    ours = peak_bytes(lambda: forward_backward(token_stats))
    assert ours < size + 3 * (4 << 20)
    assert ours < peak_bytes(lambda: forward_backward(token_stats_reference)) / 3


def peak_bytes(function) -> int:
    """Peak of allocated memory, above that before the call."""
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(profile_memory=True, activities=cpu) as profile:
        function()
    held = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def test_fields_are_those_documented():
    assert FIELDS == ("logprob", "nsc", "entropy", "lse")
