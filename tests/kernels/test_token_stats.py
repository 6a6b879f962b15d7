"""token_stats: values and gradients against float64, over the regimes of its two backends."""

import math

import pytest
import torch
from iris_kernels import token_stats
from iris_kernels.token_stats import token_stats_reference
from kernel_oracle import (
    FIELDS,
    assert_within_budget,
    random_case,
    run,
    upstream_gradients,
)

PATHS = {
    "torch": ["forward_torch", "backward_torch"],
    "cpp": ["forward_cpp", "backward_cpp"],
    "triton": ["forward_triton", "backward_triton"],
}
# name: (rows, V, dtype). The forward kernel takes tiles of L lanes x 16 bytes: 8192 bf16 or 4096
# fp32 columns from that vocabulary on; backward takes blocks of 4096 columns.
REGIMES = {
    "one_class": ((3,), 1, torch.float32),
    "less_than_a_lane": ((3,), 3, torch.bfloat16),
    "masked_tail_only": ((2, 3), 100, torch.float32),
    "odd_vocabulary_unaligned_rows": ((5,), 257, torch.bfloat16),
    "exactly_one_tile": ((2,), 4096, torch.float32),
    "one_past_a_tile": ((2,), 4097, torch.float32),
    "whole_tiles_bf16": ((2,), 16384, torch.bfloat16),
    "tiles_and_a_tail_bf16": ((2,), 8192 + 4096 + 8, torch.bfloat16),
    "half_precision": ((4,), 1000, torch.float16),
    "more_rows_than_a_chunk_holds": ((1200,), 500, torch.float32),
}


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("regime", REGIMES)
def test_budget(regime, temperature, backend, device, paths_run):
    shape, V, dtype = REGIMES[regime]
    if regime.startswith("more_rows") and backend == "triton":
        shape = (40,)  # chunks are the torch path's; a program a row is slow in the interpreter
    logits, token_ids = random_case(shape, V, dtype, device)
    assert_within_budget(logits, token_ids, temperature=temperature)
    no_cpp = backend == "cpp" and dtype == torch.float16
    assert paths_run == PATHS["torch" if no_cpp else backend]


@pytest.mark.parametrize("alone", FIELDS)
def test_each_gradient_alone(alone, backend, device):
    logits, token_ids = random_case((6,), 300, torch.float32, device)
    gradients = [
        g if name == alone else None
        for name, g in zip(FIELDS, upstream_gradients((6,), device), strict=True)
    ]
    assert_within_budget(logits, token_ids, gradients, temperature=1.3)


def test_stride_zero_gradients(backend, device):
    logits, token_ids = random_case((6,), 300, torch.float32, device)
    expanded = [torch.tensor(0.5 + i, device=device).expand(6) for i in range(4)]
    _, gradient = run(token_stats, logits, token_ids, expanded)
    _, exact = run(token_stats_reference, logits.double(), token_ids, expanded)
    torch.testing.assert_close(gradient.double(), exact, rtol=1e-5, atol=1e-6)


MAGNITUDES = {
    "huge": lambda x: x + 1e4,
    "hugely_spread": lambda x: x * 3e3,
    "all_negative": lambda x: x.abs().neg() - 200,
    "equal": torch.zeros_like,
    "rising_over_tiles": lambda x: x + torch.linspace(0, 90, x.shape[-1], device=x.device),
    "falling_over_tiles": lambda x: x - torch.linspace(0, 90, x.shape[-1], device=x.device),
}


@pytest.mark.parametrize("name", MAGNITUDES)
def test_magnitudes(name, backend, device):
    logits, token_ids = random_case((4,), 5000, torch.float32, device)
    token_ids[0] = logits[0].argmax()
    assert_within_budget(MAGNITUDES[name](logits), token_ids)


def test_equal_logits_are_uniform(backend, device):
    out = token_stats(torch.full((2, 1000), -7.0, device=device), torch.tensor([0, 999]).to(device))
    torch.testing.assert_close(out.nsc, torch.zeros(2, device=device), rtol=0, atol=1e-6)
    uniform = torch.full((2,), math.log(1000), device=device)
    torch.testing.assert_close(out.entropy, uniform)
    torch.testing.assert_close(out.logprob, -uniform)


def test_certain_token_keeps_its_digits(backend, device):
    """At a margin of 30 nats, 1 + others is 1 in float32, and log-softmax gives 0, not -others."""
    margin = torch.tensor([30.0, 50.0], dtype=torch.float64, device=device)
    logits = torch.zeros(2, 600, device=device)
    logits[:, 17] = margin.float()
    token_ids = torch.tensor([17, 17], device=device)
    others = 599 * torch.exp(-margin)
    ours = token_stats(logits, token_ids)
    torch.testing.assert_close(ours.logprob.double(), -torch.log1p(others), rtol=1e-5, atol=0)
    entropy = torch.log1p(others) + others * margin / (1 + others)
    torch.testing.assert_close(ours.entropy.double(), entropy, rtol=1e-5, atol=0)
    assert (token_stats_reference(logits, token_ids).logprob == 0).all()


# --- Rows that are dropped ------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["ignored id", "mask", "both"])
def test_dropped_rows(how, backend, device):
    logits, token_ids = random_case((2, 3), 300, torch.float32, device)
    dropped = torch.tensor([[True, False, False], [False, True, True]], device=device)
    kept = logits[~dropped], token_ids[~dropped]
    logits[dropped] = math.nan
    mask = None if how == "ignored id" else ~dropped
    token_ids[dropped] = 10**9 if how == "mask" else -100
    out, gradient = run(
        token_stats, logits, token_ids, upstream_gradients((2, 3), device), mask=mask
    )
    for name, value, expected in zip(FIELDS, out, token_stats(*kept), strict=True):
        assert (value[dropped] == 0).all(), name
        assert torch.equal(value[~dropped], expected), name
    assert (gradient[dropped] == 0).all()
    assert gradient[~dropped].isfinite().all() and (gradient[~dropped] != 0).any()


def test_all_rows_dropped_and_no_rows(backend, device):
    logits, _ = random_case((4,), 50, torch.float32, device)
    out, gradient = run(
        token_stats, logits, torch.full((4,), -100, device=device), upstream_gradients((4,), device)
    )
    assert all((value == 0).all() for value in out) and (gradient == 0).all()
    none = torch.empty(0, 3, 50, device=device, requires_grad=True)
    out = token_stats(none, torch.empty(0, 3, dtype=torch.long, device=device))
    assert out.logprob.shape == (0, 3)
    out.entropy.sum().backward()
    assert none.grad.shape == none.shape


# --- Masked classes -------------------------------------------------------------------------------


MASKED = {
    "one": [5],
    "the first tile": range(4096),
    "the last tile": range(4096, 9000),
    "all but one": [i for i in range(9000) if i != 8000],
}


@pytest.mark.parametrize("which", MASKED)
def test_minus_infinity(which, backend, device):
    """As without these classes, except that nsc is -inf; never NaN."""
    logits, token_ids = random_case((2,), 9000, torch.float32, device)
    out_columns = torch.tensor(list(MASKED[which]), device=device)
    existing = torch.ones(9000, dtype=torch.bool, device=device)
    existing[out_columns] = False
    logits[:, out_columns] = -math.inf
    columns = existing.nonzero()[:, 0]
    token_ids[:] = columns[-1]
    gradients = upstream_gradients((2,), device)
    gradients[1] = None
    out, gradient = run(token_stats, logits, token_ids, gradients)
    last = torch.full((2,), len(columns) - 1, device=device)
    exact, exact_gradient = run(token_stats_reference, logits[:, columns].double(), last, gradients)
    for name in ("logprob", "entropy", "lse"):
        mine, truth = getattr(out, name).double(), getattr(exact, name)
        torch.testing.assert_close(mine, truth, rtol=1e-5, atol=1e-5)
    assert (out.nsc == -math.inf).all()
    assert (gradient[:, out_columns] == 0).all()
    torch.testing.assert_close(gradient[:, columns].double(), exact_gradient, rtol=1e-4, atol=1e-5)


def test_nsc_gradient_with_minus_infinity(backend, device):
    """d nsc / dx_j = 1/V - p_j, as in autograd, also if nsc itself is -inf."""
    logits, token_ids = random_case((2,), 300, torch.float32, device)
    logits[:, :7] = -math.inf
    gradients = [None, torch.tensor([1.5, -2.0], device=device), None, None]
    _, gradient = run(token_stats, logits, token_ids, gradients, temperature=2.0)
    p = torch.softmax(logits.double() / 2, -1)
    exact = gradients[1][:, None] * (1 / 300 - p) / 2
    torch.testing.assert_close(gradient.double(), exact, rtol=1e-5, atol=1e-7)


def test_masked_token(backend, device):
    logits, token_ids = random_case((2,), 300, torch.float32, device)
    logits[:, 9] = -math.inf
    token_ids[:] = 9
    out, gradient = run(token_stats, logits, token_ids, upstream_gradients((2,), device))
    assert (out.logprob == -math.inf).all() and out.entropy.isfinite().all()
    assert gradient.isfinite().all()


def test_fully_masked_rows(backend, device):
    logits = torch.full((2, 5000), -math.inf, device=device)
    token_ids = torch.tensor([0, 4999], device=device)
    out, gradient = run(token_stats, logits, token_ids, upstream_gradients((2,), device))
    assert (out.entropy == 0).all()
    for value in (out.logprob, out.nsc, out.lse):
        assert (value == -math.inf).all()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("column", [0, 150, 4500])
def test_nan_is_not_hidden(column, backend, device):
    logits, token_ids = random_case((2,), 5000, torch.float32, device)
    logits[0, column] = math.nan
    out = token_stats(logits, token_ids)
    assert all(value[0].isnan() and value[1].isfinite() for value in out)


# --- Columns and ids ------------------------------------------------------------------------------


@pytest.mark.parametrize("V", [1, 250, 256])
def test_vocab_size(V, backend, device):
    """Columns from vocab_size on are not read, and their gradient is 0."""
    logits, _ = random_case((3,), 300, torch.bfloat16, device)
    logits[:, V:] = math.nan
    token_ids = torch.tensor([0, V - 1, V // 2], device=device)
    gradients = upstream_gradients((3,), device)
    out, gradient = run(token_stats, logits, token_ids, gradients, vocab_size=V)
    exact, exact_gradient = run(token_stats, logits[:, :V].contiguous(), token_ids, gradients)
    for value, expected in zip(out, exact, strict=True):
        assert torch.equal(value, expected)
    assert torch.equal(gradient[:, :V], exact_gradient)
    assert (gradient[:, V:] == 0).all()


def test_token_id_out_of_range(backend, device):
    logits, token_ids = random_case((3,), 300, torch.float32, device)
    token_ids[1] = 300
    if device == "cpu":
        with pytest.raises(ValueError, match=r"token_ids holds 300, outside \[0, 300\)"):
            token_stats(logits, token_ids)
        return
    out, gradient = run(token_stats, logits, token_ids, upstream_gradients((3,), device))
    assert out.logprob[1].isnan() and gradient[1].isnan().all()
    assert out.logprob[[0, 2]].isfinite().all() and gradient[[0, 2]].isfinite().all()


# --- Layouts --------------------------------------------------------------------------------------

LAYOUTS = {
    "shifted": lambda x: x[:, 1:],
    "batch_first_transposed": lambda x: x.transpose(0, 1),
    "every_second_row": lambda x: x[:, ::2],
    "padded_vocabulary": lambda x: x[..., :200],
    "unaligned_columns": lambda x: x[..., 3:203],
    "three_strides": lambda x: x.view(2, 3, 4, 300)[:, :2, :3],
    "repeated_rows": lambda x: x[:1].expand(3, -1, -1),
    "one_row": lambda x: x[0, 0],
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_are_read_in_place(name, backend, device, monkeypatch):
    full, _ = random_case((4, 6), 300, torch.float32, device)
    logits = LAYOUTS[name](full)
    token_ids = torch.randint(200, logits.shape[:-1], device=device)
    gradients = upstream_gradients(token_ids.shape, device)
    expected, expected_gradient = run(token_stats, logits.contiguous(), token_ids, gradients)

    contiguous = torch.Tensor.contiguous

    def no_copy(tensor):
        assert tensor.numel() < logits.numel(), "the logits were copied"
        return contiguous(tensor)

    leaf = logits.detach().requires_grad_()
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "contiguous", no_copy)
        out = token_stats(leaf, token_ids)
    (gradient,) = torch.autograd.grad(out, leaf, gradients)
    for value, other in zip(out, expected, strict=True):
        assert torch.equal(value, other)
    assert torch.equal(gradient, expected_gradient)


def test_strided_columns_are_copied(backend, device):
    logits, token_ids = random_case((5,), 300, torch.float32, device)
    apart = logits.t().contiguous().t()
    gradients = upstream_gradients((5,), device)
    out, gradient = run(token_stats, apart, token_ids, gradients)
    expected, expected_gradient = run(token_stats, logits, token_ids, gradients)
    assert all(torch.equal(a, b) for a, b in zip(out, expected, strict=True))
    assert torch.equal(gradient, expected_gradient)


@pytest.mark.parametrize("stride", [2**31 - 64, 2**31 + 64])
def test_rows_beyond_two_to_the_31(stride, backend, device, monkeypatch):
    """The third row starts beyond element 2^32; its stride alone may still fit an int32."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    memory = torch.empty(2 * stride + 300, dtype=torch.bfloat16, device=device)
    logits = memory.as_strided((3, 300), (stride, 1))
    values, token_ids = random_case((3,), 300, torch.bfloat16, device)
    logits.copy_(values)
    out = token_stats(logits, token_ids)
    assert all(torch.equal(a, b) for a, b in zip(out, token_stats(values, token_ids), strict=True))


def test_int32_and_strided_token_ids(backend, device):
    logits, token_ids = random_case((2, 6), 300, torch.float32, device)
    expected = token_stats(logits, token_ids)
    strided = token_ids.int().t().contiguous().t()
    assert all(
        torch.equal(a, b) for a, b in zip(token_stats(logits, strided), expected, strict=True)
    )


# --- In place -------------------------------------------------------------------------------------


def test_inplace_backward(backend, device):
    logits, token_ids = random_case((2, 5), 300, torch.bfloat16, device)
    gradients = upstream_gradients((2, 5), device)
    _, expected = run(token_stats, logits, token_ids, gradients, vocab_size=290)
    leaf = logits.clone().requires_grad_()
    produced = leaf * 1
    pointers = []
    produced.register_hook(lambda g: pointers.append(g.data_ptr()))
    out = token_stats(produced, token_ids, vocab_size=290, inplace_backward=True)
    torch.autograd.backward(out, gradients)
    assert torch.equal(leaf.grad, expected)
    assert pointers == [produced.data_ptr()]


@pytest.mark.parametrize("view", [lambda p: p[:, :-1], lambda p: p.view(-1, p.shape[-1])])
def test_inplace_backward_does_not_overwrite_a_leaf_through_a_view(backend, device, view):
    parameter = torch.randn(2, 5, 8, device=device, requires_grad=True)
    logits = view(parameter)
    token_ids = torch.zeros(logits.shape[:-1], dtype=torch.int64, device=device)
    with pytest.raises(ValueError, match="a view of one"):
        token_stats(logits, token_ids, inplace_backward=True)


@pytest.mark.parametrize("name", sorted(LAYOUTS.keys() - {"repeated_rows"}))
def test_inplace_backward_takes_every_layout_without_shared_rows(name, backend, device):
    full, _ = random_case((4, 6), 300, torch.float32, device)
    token_ids = torch.randint(200, LAYOUTS[name](full).shape[:-1], device=device)
    gradients = []
    for inplace in (False, True):
        leaf = full.clone().requires_grad_()
        out = token_stats(LAYOUTS[name](leaf * 1), token_ids, inplace_backward=inplace)
        gradients += torch.autograd.grad(out.nsc.sum() + out.logprob.sum(), leaf)
    assert torch.equal(*gradients)


def test_inplace_backward_raises_in_other_readers(backend, device):
    leaf, token_ids = random_case((4,), 300, torch.float32, device)
    produced = leaf.requires_grad_() * 1
    other = produced.square().sum()
    token_stats(produced, token_ids, inplace_backward=True).logprob.sum().backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.backward()


def test_logits_are_not_overwritten_by_default(backend, device):
    logits, token_ids = random_case((4,), 300, torch.float32, device)
    before = logits.clone()
    run(lambda x, ids: token_stats(x, ids), logits, token_ids, upstream_gradients((4,), device))
    leaf = logits.requires_grad_()
    token_stats(leaf, token_ids).entropy.sum().backward()
    assert torch.equal(leaf.detach(), before)


# --- Wrong arguments ------------------------------------------------------------------------------

GOOD_IDS = torch.zeros(2, dtype=torch.long)
WRONG_ARGUMENTS = {
    "logits has dtype torch.int64": (torch.zeros(2, 3, dtype=torch.long), GOOD_IDS, {}),
    r"logits has shape \(2, 0\)": (torch.zeros(2, 0), GOOD_IDS, {}),
    r"logits has shape \(\)": (torch.tensor(1.0), torch.tensor(0), {}),
    r"token_ids has shape \(3,\)": (torch.zeros(2, 3), torch.zeros(3, dtype=torch.long), {}),
    "token_ids has dtype torch.float32": (torch.zeros(2, 3), torch.zeros(2), {}),
    "mask has dtype torch.int64": (torch.zeros(2, 3), GOOD_IDS, {"mask": GOOD_IDS}),
    r"mask has shape \(1,\)": (torch.zeros(2, 3), GOOD_IDS, {"mask": torch.ones(1).bool()}),
    "temperature is 0": (torch.zeros(2, 3), GOOD_IDS, {"temperature": 0}),
    r"temperature is a tensor of shape \(1,\)": (
        torch.zeros(2, 3), GOOD_IDS, {"temperature": torch.ones(1)}
    ),
    "temperature is nan": (torch.zeros(2, 3), GOOD_IDS, {"temperature": math.nan}),
    "vocab_size is 4": (torch.zeros(2, 3), GOOD_IDS, {"vocab_size": 4}),
    "vocab_size is 0": (torch.zeros(2, 3), GOOD_IDS, {"vocab_size": 0}),
    "token_ids holds -1": (torch.zeros(2, 3), GOOD_IDS - 1, {}),
    "logits is a leaf": (
        torch.zeros(2, 3, requires_grad=True), GOOD_IDS, {"inplace_backward": True}
    ),
    "share memory": (
        torch.zeros(1, 3).expand(2, 3), GOOD_IDS, {"inplace_backward": True}
    ),
    "overlapping windows": (
        torch.zeros(5).unfold(0, 3, 2), GOOD_IDS, {"inplace_backward": True}
    ),
}  # fmt: skip


@pytest.mark.parametrize("message", WRONG_ARGUMENTS)
def test_wrong_arguments_are_named(message):
    logits, token_ids, kwargs = WRONG_ARGUMENTS[message]
    with pytest.raises(ValueError, match=message):
        token_stats(logits, token_ids, **kwargs)
