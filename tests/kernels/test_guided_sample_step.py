"""guided_sample_step: what guided_sample returns, read from and written to the column of a step."""

import pytest
import torch
from iris_kernels import guided_sample, guided_sample_step
from kernel_oracle import random_case
from torch._subclasses import FakeTensorMode

R, V, L = 3, 300, 4
SETTINGS = {
    "guided": {"cfg_weight": 5.0, "temperature": 0.7},
    "unguided": {"cfg_weight": 1.0},
    "greedy": {"cfg_weight": 2.0, "temperature": 0},
    "top_k": {"cfg_weight": 2.0, "top_k": 5},
}


def logits(device, seed=0):
    return [random_case((R,), V, torch.bfloat16, device, 2.0, seed=2 * seed + i)[0] for i in (0, 1)]


def buffers(device):
    """uniforms, step, token_ids, conditional and guided; what is not recorded stays -1."""
    generator = torch.Generator().manual_seed(5)
    return [
        torch.rand(R, L, generator=generator).to(device),
        torch.zeros(1, dtype=torch.int64, device=device),
        torch.full((R, L), -1, device=device),
        *(torch.full((4, R, L), -1.0, device=device) for _ in range(2)),
    ]


@pytest.mark.parametrize("name", SETTINGS)
def test_same_as_guided_sample(name, backend, device):
    uniforms, step, token_ids, *stats = buffers(device)
    for column in range(L - 1):
        cond, uncond = logits(device, column)
        uncond = None if name == "unguided" else uncond
        expected = guided_sample(cond, uncond, uniforms[:, column].contiguous(), **SETTINGS[name])
        tokens = guided_sample_step(
            cond, uncond, uniforms, step, token_ids, *stats, **SETTINGS[name]
        )
        assert torch.equal(tokens, expected.token_ids) and tokens.is_contiguous()
        assert torch.equal(token_ids[:, column], tokens)
        for recorded, of_op in zip(stats, expected[1:], strict=True):
            assert torch.equal(recorded[..., column], torch.stack(of_op))
        assert (token_ids[:, column + 1 :] == -1).all()
        assert all((recorded[..., column + 1 :] == -1).all() for recorded in stats)
        assert step.item() == column  # the caller counts
        step += 1


def test_step_outside_the_buffers(backend, device):
    tensors = buffers(device)
    before = [t.clone() for t in tensors]
    for column in (L, -L - 1):
        tensors[1].fill_(column)
        if backend != "triton":
            with pytest.raises(IndexError):
                guided_sample_step(*logits(device), *tensors, cfg_weight=2.0)
        else:
            guided_sample_step(*logits(device), *tensors, cfg_weight=2.0)
        for tensor, old in zip(tensors[2:], before[2:], strict=True):
            assert torch.equal(tensor, old)


def test_rows_of_none(backend, device):
    uniforms, step, token_ids, *stats = buffers(device)
    tensors = uniforms[:0], step, token_ids[:0], *(t[:, :0] for t in stats)
    cond, uncond = (t[:0] for t in logits(device))
    assert guided_sample_step(cond, uncond, *tensors, cfg_weight=2.0).shape == (0,)


def test_opcheck(backend, device):
    numbers = torch.tensor(3.0, dtype=torch.float64), torch.tensor(1.0, dtype=torch.float64)
    torch.library.opcheck(
        torch.ops.iris_kernels.guided_sample_step,
        (*logits(device), *buffers(device), *numbers, False, 0, 1.0, 0.0, V),
    )


def test_fullgraph(backend, device):
    """The mutated buffers are those of the caller."""

    @torch.compile(fullgraph=True, backend="aot_eager")
    def run(cond, uncond, *tensors):
        return guided_sample_step(cond, uncond, *tensors, cfg_weight=3.0)

    compiled, eager = buffers(device), buffers(device)
    tokens = run(*logits(device), *compiled)
    assert torch.equal(tokens, guided_sample_step(*logits(device), *eager, cfg_weight=3.0))
    for a, b in zip(compiled, eager, strict=True):
        assert torch.equal(a, b)


def test_fake_tensors():
    with FakeTensorMode():
        tensors = [torch.empty(R, V, device="cuda") for _ in range(2)]
        state = [
            torch.empty(R, L, device="cuda"),
            torch.empty(1, dtype=torch.int64, device="cuda"),
            torch.empty(R, L, dtype=torch.int64, device="cuda"),
            *(torch.empty(4, R, L, device="cuda") for _ in range(2)),
        ]
        tokens = guided_sample_step(*tensors, *state, cfg_weight=2.0)
    assert tokens.shape == (R,) and tokens.dtype == torch.int64 and tokens.device.type == "cuda"


WRONG = {
    r"cond_logits has shape \(300,\)": {0: torch.zeros(V)},
    r"uniforms has shape \(2, 4\)": {2: torch.zeros(R - 1, L)},
    "uniforms has dtype torch.float64": {2: torch.zeros(R, L, dtype=torch.float64)},
    r"step is \(2,\) torch.int64": {3: torch.zeros(2, dtype=torch.int64)},
    r"token_ids is \(3, 4\) torch.int32": {4: torch.zeros(R, L, dtype=torch.int32)},
    r"conditional is \(3, 4\) torch.float32": {5: torch.zeros(R, L)},
    "guided is not contiguous": {6: torch.zeros(4, L, R).mT},
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments_are_named(message):
    positional = [*logits("cpu"), *buffers("cpu")]
    for i, value in WRONG[message].items():
        positional[i] = value
    with pytest.raises(ValueError, match=message):
        guided_sample_step(*positional, cfg_weight=1.0)
