"""The replacements for TRL's functions against the originals."""

import inspect

import pytest
import torch
from integration_inputs import LAYOUTS, assert_within, make_logits, make_token_ids, make_upstream
from iris_kernels import integrations
from iris_kernels.integrations import trl as ours

theirs = pytest.importorskip("trl.trainer.utils", reason="TRL is not installed")

NAMES = ("selective_log_softmax", "entropy_from_logits", "selective_log_softmax_and_entropy")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def unpatched():
    integrations.unpatch_trl(quiet=True)
    yield
    integrations.unpatch_trl(quiet=True)


def gradient(outputs, logits):
    """Gradient of the logits for random upstream gradients of all outputs."""
    total = sum((o * make_upstream(i).to(o.dtype)).sum() for i, o in enumerate(outputs))
    return torch.autograd.grad(total, logits)[0]


def compare(name, logits, *arguments, **keywords):
    """Ours, TRL's and TRL's in float64: outputs and gradients within the budget."""

    def run(function, logits):
        logits = logits.detach().requires_grad_()
        outputs = function(logits, *arguments, **keywords)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return outputs, gradient(outputs, logits)

    (mine, my_grad), (other, other_grad), (oracle, oracle_grad) = (
        run(getattr(ours, name), logits),
        run(getattr(theirs, name), logits),
        run(getattr(theirs, name), logits.double()),
    )
    for m, t, o in zip(mine, other, oracle, strict=True):
        assert m.shape == t.shape
        assert_within(m.detach(), t.detach(), o.detach())
    assert my_grad.dtype == logits.dtype
    assert_within(my_grad, other_grad, oracle_grad)


@pytest.mark.parametrize("name", NAMES)
def test_the_parameters_are_theirs(name):
    def shape(function):
        return [(p.name, p.default) for p in inspect.signature(function).parameters.values()]

    assert shape(getattr(ours, name)) == shape(getattr(theirs, name))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_softmax_and_entropy(layout, dtype, temperature):
    logits, ids = make_logits(layout, dtype), make_token_ids()
    compare("selective_log_softmax", logits, ids, temperature=temperature)
    compare("selective_log_softmax_and_entropy", logits, ids, temperature=temperature)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_entropy(layout, dtype):
    compare("entropy_from_logits", make_logits(layout, dtype))
    compare("entropy_from_logits", make_logits(layout, dtype), chunk_size=2)


@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.int32, torch.int64])
def test_row_mask(mask_dtype):
    logits, ids = make_logits("sliced", torch.float32), make_token_ids()
    mask = (make_upstream(5) > 0).to(mask_dtype)
    assert 0 < mask.sum() < mask.numel()
    compare("selective_log_softmax", logits, ids, row_mask=mask)
    compare("selective_log_softmax_and_entropy", logits, ids, row_mask=mask, temperature=1.3)
    logprob, entropy = ours.selective_log_softmax_and_entropy(logits, ids, row_mask=mask)
    assert (logprob[mask == 0] == 0).all()
    assert (entropy[mask == 0] == 0).all()


@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("masked", [False, True])
def test_several_classes_per_row(k, dtype, masked):
    logits = make_logits("sliced", dtype)
    generator = torch.Generator().manual_seed(3)
    index = torch.randint(0, 501, (3, 7, k), generator=generator)
    mask = torch.randint(0, 2, (3, 7, k), generator=generator) if masked else None

    def run(function, logits):
        logits = logits.detach().requires_grad_()
        out = function(logits, index, temperature=0.8, row_mask=mask)
        upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(4))
        return out.detach(), torch.autograd.grad(out, logits, upstream.to(out.dtype))[0]

    mine, other, oracle = (
        run(ours.selective_log_softmax, logits),
        run(theirs.selective_log_softmax, logits),
        run(theirs.selective_log_softmax, logits.double()),
    )
    for m, t, o in zip(mine, other, oracle, strict=True):
        assert m.shape == t.shape
        assert_within(m, t, o)


@pytest.mark.parametrize("shape", [(501,), (5, 501), (2, 3, 4, 501)])
def test_any_number_of_leading_dimensions(shape):
    generator = torch.Generator().manual_seed(6)
    logits = torch.randn(shape, generator=generator)
    ids = torch.randint(0, 501, shape[:-1], generator=generator)
    logprob, entropy = ours.selective_log_softmax_and_entropy(logits, ids)
    expected = torch.log_softmax(logits, -1)
    torch.testing.assert_close(logprob, expected.gather(-1, ids[..., None])[..., 0])
    torch.testing.assert_close(entropy, -(expected.exp() * expected).sum(-1))
    torch.testing.assert_close(ours.entropy_from_logits(logits), entropy)


def test_entropy_without_gradient():
    logits = make_logits("contiguous", torch.float32).requires_grad_()
    logprob, entropy = ours.selective_log_softmax_and_entropy(
        logits, make_token_ids(), entropy_requires_grad=False
    )
    assert logprob.requires_grad
    assert not entropy.requires_grad


def test_an_ignored_index_reads_nothing():
    logits, ids = make_logits("contiguous", torch.float32), make_token_ids()
    ids[0, 0] = -100
    logprob, entropy = ours.selective_log_softmax_and_entropy(logits, ids)
    assert logprob[0, 0] == entropy[0, 0] == 0
    assert logprob.isfinite().all()


def test_masked_classes_give_no_nan():
    logits, ids = make_logits("contiguous", torch.float32), make_token_ids().clamp(min=200)
    logits[..., :200] = -torch.inf
    logits.requires_grad_()
    logprob, entropy = ours.selective_log_softmax_and_entropy(logits, ids)
    (grad,) = torch.autograd.grad(logprob.sum() + entropy.sum(), logits)
    kept = logits.detach()[..., 200:].double().log_softmax(-1)
    torch.testing.assert_close(entropy, -(kept.exp() * kept).sum(-1).float())
    assert grad.isfinite().all()


@pytest.mark.parametrize("temperature", [0.0, -1.0])
def test_a_nonpositive_temperature_is_refused(temperature):
    logits, ids = make_logits("contiguous", torch.float32), make_token_ids()
    for name in ("selective_log_softmax", "selective_log_softmax_and_entropy"):
        with pytest.raises(ValueError, match="temperature"):
            getattr(ours, name)(logits, ids, temperature=temperature)


def test_patch_reaches_the_trainers_and_is_reverted(capsys):
    from trl.experimental.tpo import tpo_trainer

    originals = {name: getattr(theirs, name) for name in NAMES}
    bound = tpo_trainer.selective_log_softmax_and_entropy
    replaced = integrations.patch_trl()
    for name in NAMES:
        assert getattr(theirs, name) is getattr(ours, name)
        assert f"trl.trainer.utils.{name}" in replaced
    assert tpo_trainer.selective_log_softmax_and_entropy is ours.selective_log_softmax_and_entropy
    assert "trl.experimental.tpo.tpo_trainer.selective_log_softmax_and_entropy" in replaced
    assert "replaced in trl: " in capsys.readouterr().out

    assert integrations.patch_trl() == []
    assert "nothing more" in capsys.readouterr().out

    assert integrations.unpatch_trl() == replaced
    for name in NAMES:
        assert getattr(theirs, name) is originals[name]
    assert tpo_trainer.selective_log_softmax_and_entropy is bound
