"""The replacements for verl's functions against plain torch, and against verl if installed."""

import inspect

import pytest
import torch
from integration_inputs import LAYOUTS, assert_within, make_logits, make_token_ids, make_upstream
from iris_kernels import integrations
from iris_kernels.integrations import verl as ours

NAMES = ("logprobs_from_logits", "entropy_from_logits")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture
def theirs():
    """verl's module. Skips if the import fails: verl pins many other packages."""
    try:
        import verl.utils.torch_functional as module
    except ImportError as error:
        pytest.skip(f"verl does not import here: {error}")
    integrations.unpatch_verl(quiet=True)
    yield module
    integrations.unpatch_verl(quiet=True)


def run(function, logits, *arguments):
    logits = logits.detach().requires_grad_()
    out = function(logits, *arguments)
    return out.detach(), torch.autograd.grad(out, logits, make_upstream().to(out.dtype))[0]


def compare(name, theirs, logits, *arguments):
    results = (
        run(getattr(ours, name), logits, *arguments),
        run(theirs, logits, *arguments),
        run(theirs, logits.double(), *arguments),
    )
    for mine, other, oracle in zip(*results, strict=True):
        assert mine.shape == other.shape
        assert_within(mine, other, oracle)


def plain_logprobs(logits, labels):
    return logits.log_softmax(-1).gather(-1, labels[..., None])[..., 0]


def plain_entropy(logits):
    return logits.logsumexp(-1) - (logits.softmax(-1) * logits).sum(-1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_plain_torch(layout, dtype):
    logits = make_logits(layout, dtype)
    compare("logprobs_from_logits", plain_logprobs, logits, make_token_ids())
    compare("entropy_from_logits", plain_entropy, logits)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_verl(theirs, layout, dtype):
    logits = make_logits(layout, dtype)
    compare("logprobs_from_logits", theirs.logprobs_from_logits, logits, make_token_ids())
    compare("entropy_from_logits", theirs.entropy_from_logits, logits)


def test_the_parameters_are_theirs(theirs):
    for name in NAMES:
        mine, other = (inspect.signature(getattr(m, name)).parameters for m in (ours, theirs))
        assert [(p.name, p.default) for p in mine.values()] == [
            (p.name, p.default) for p in other.values()
        ]


def test_backward_is_in_place_if_the_logits_are_the_output_of_an_operation():
    weight = make_logits("contiguous", torch.float32).requires_grad_()
    expected = torch.autograd.grad(
        plain_logprobs(weight * 2, make_token_ids()), weight, make_upstream()
    )[0]
    logits = weight * 2
    logits.retain_grad()
    before = logits.detach().clone()
    out = ours.logprobs_from_logits(logits, make_token_ids())
    (grad,) = torch.autograd.grad(out, weight, make_upstream())
    torch.testing.assert_close(grad, expected)
    assert not torch.equal(logits.detach(), before)  # the memory was reused


def test_inplace_backward_false_keeps_the_logits():
    weight = make_logits("contiguous", torch.float32).requires_grad_()
    logits = weight * 2
    before = logits.detach().clone()
    out = ours.logprobs_from_logits(logits, make_token_ids(), inplace_backward=False)
    torch.autograd.grad(out, weight, make_upstream())
    assert torch.equal(logits.detach(), before)


def test_leaves_and_shared_rows_are_not_overwritten():
    for make in (lambda w: w, lambda w: w[:, :], lambda w: (w[:1] * 2).expand(3, 7, 501)):
        weight = make_logits("contiguous", torch.float32).requires_grad_()
        logits = make(weight)
        before = logits.detach().clone()
        (grad,) = torch.autograd.grad(
            ours.logprobs_from_logits(logits, make_token_ids()), weight, make_upstream()
        )
        (expected,) = torch.autograd.grad(
            plain_logprobs(make(weight), make_token_ids()), weight, make_upstream()
        )
        torch.testing.assert_close(grad, expected)
        assert torch.equal(logits.detach(), before)


def test_another_reader_of_overwritten_logits_raises():
    logits = make_logits("contiguous", torch.float32).requires_grad_() * 2
    entropy = (logits.softmax(-1) * logits).sum(-1)  # keeps the logits
    logprob = ours.logprobs_from_logits(logits, make_token_ids())
    logprob.sum().backward()  # a pass that keeps its graph overwrites nothing on a CPU
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        entropy.sum().backward()


def test_entropy_compiles_with_dynamic_shapes():
    """As verl's engines compile `entropy_from_logits`."""
    compiled = torch.compile(
        ours.entropy_from_logits, dynamic=True, fullgraph=True, backend="eager"
    )
    for rows in (5, 9):
        logits = torch.randn(rows, 33, generator=torch.Generator().manual_seed(rows))
        torch.testing.assert_close(compiled(logits), plain_entropy(logits))


def test_patch_and_unpatch(theirs, capsys):
    originals = {name: getattr(theirs, name) for name in NAMES}
    replaced = integrations.patch_verl()
    assert {f"verl.utils.torch_functional.{name}" for name in NAMES} <= set(replaced)
    assert "replaced in verl: " in capsys.readouterr().out
    assert all(getattr(theirs, name) is getattr(ours, name) for name in NAMES)
    assert integrations.patch_verl(quiet=True) == []
    assert integrations.unpatch_verl(quiet=True) == replaced
    assert all(getattr(theirs, name) is originals[name] for name in NAMES)
