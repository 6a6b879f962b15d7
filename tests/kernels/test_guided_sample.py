"""guided_sample: the exact token, its distribution, truncation, and its statistics."""

import math

import pytest
import torch
from iris_kernels import cpp, guided_sample, token_stats
from iris_kernels._inverse_cdf import (
    sample_tokens,
    sampling_weights,
    truncation_threshold,
    weight_scale,
)
from iris_kernels.guided_sample import guided_sample_reference, mix
from kernel_oracle import FIELDS, TRITON_RUNS, random_case
from torch._subclasses import FakeTensorMode
from torch.autograd import DeviceType
from torch.utils._python_dispatch import TorchDispatchMode

ops = torch.ops.iris_kernels

PATHS = ("torch", "cpp", "triton")
# name: (rows, V, dtype). A row is one tile or several, of groups of 16 bytes.
REGIMES = {
    "one_class": (2, 1, torch.float32),
    "fewer_classes_than_groups": (3, 11, torch.float32),
    "unaligned_rows": (3, 257, torch.bfloat16),
    "one_group_per_thread": (3, 1000, torch.float16),
    "image_vocabulary": (2, 16384, torch.bfloat16),
    "several_tiles": (2, 20000, torch.bfloat16),
    "several_unaligned_tiles": (2, 20001, torch.float32),
}
SETTINGS = {
    "plain": {},
    "guided": {"cfg_weight": 5.0},
    "guided_cold": {"cfg_weight": 3.0, "temperature": 0.5},
    "guided_hot": {"cfg_weight": 1.5, "temperature": 4.0},
    "greedy": {"cfg_weight": 5.0, "temperature": 0},
    "top_k": {"cfg_weight": 2.0, "top_k": 5},
    "all_truncations": {
        "cfg_weight": 1.0, "temperature": 2.0, "top_k": 40, "top_p": 0.8, "min_p": 0.02
    },
}  # fmt: skip


def case(rows: int, V: int, dtype: torch.dtype, device: str, name: str, scale: float = 2.0):
    """(cond, uncond or None, uniform) for a setting."""
    cond, _ = random_case((rows,), V, dtype, device, scale, seed=rows)
    uncond, _ = random_case((rows,), V, dtype, device, scale, seed=rows + 1)
    uniform = torch.rand(rows, generator=torch.Generator().manual_seed(3)).to(device)
    return cond, None if name == "plain" else uncond, uniform


def arguments(name: str) -> dict:
    return {"cfg_weight": 1.0} | SETTINGS[name]


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("regime", REGIMES)
def test_same_token_on_every_backend(regime, name, device, monkeypatch, paths_run):
    """Also at both ends of [0, 1)."""
    cond, uncond, uniform = case(*REGIMES[regime], device, name)
    uniform[0], uniform[-1] = 0.0, 1 - 2.0**-24
    absent = {"triton": not TRITON_RUNS, "cpp": not cpp.takes(cond)}
    paths = [path for path in PATHS if not absent.get(path)]
    if len(paths) == 1:
        pytest.skip("only the torch path runs here")
    out = {}
    for path in paths:
        monkeypatch.setenv("IRIS_KERNELS_BACKEND", path)
        paths_run.clear()
        out[path] = guided_sample(cond, uncond, uniform, **arguments(name))
        assert paths_run == [f"sample_{path}"]
    expected = out.pop("torch")
    for path, found in out.items():
        assert torch.equal(found.token_ids, expected.token_ids), path
        pairs = zip(FIELDS * 2, sum(found[1:], ()), sum(expected[1:], ()), strict=True)
        for field, a, b in pairs:
            torch.testing.assert_close(a, b, rtol=1e-5, atol=3e-5, msg=f"{path} {field}")


@pytest.mark.parametrize("name", ["plain", "guided", "guided_cold", "guided_hot"])
def test_inverse_cdf(name, backend, device):
    """The float64 inverse CDF, unless the uniform is within rounding of a step of it."""
    rows = 16 if backend == "triton" and device == "cpu" else 40  # the interpreter is slow
    cond, uncond, _ = case(1, 3000, torch.float32, device, name)
    cond, uncond = cond.expand(rows, -1), uncond if uncond is None else uncond.expand(rows, -1)
    uniform = ((torch.arange(rows, device=device) + 0.5) / rows).float()
    kwargs = arguments(name)
    other = cond if uncond is None else uncond
    # The oracle runs on the CPU: cumsum is not deterministic on a GPU, and raises there.
    exact = guided_sample_reference(*(t.double().cpu() for t in (cond, other, uniform)), **kwargs)
    mixed = mix(cond, uncond, kwargs["cfg_weight"]).double().cpu() / kwargs.get("temperature", 1.0)
    steps = torch.softmax(mixed, -1).cumsum(-1)
    clear = ((steps - uniform[:, None].cpu()).abs() > 1e-5).all(-1)
    assert clear.sum() > rows / 2
    token_ids = guided_sample(cond, uncond, uniform, **kwargs).token_ids.cpu()
    assert torch.equal(token_ids[clear], exact[clear])


@pytest.mark.parametrize("temperature", [1.0, 0.3, 3.0])
def test_exact_at_the_steps_of_the_cdf(temperature, monkeypatch):
    """The torch path searches in floating point where that is certain; numbers next to a step of
    the integer CDF must still give the integer weights' token."""
    from iris_kernels._inverse_cdf import sample_tokens, sampling_weights, weight_scale

    monkeypatch.setenv("IRIS_KERNELS_BACKEND", "torch")
    generator = torch.Generator().manual_seed(3)
    cond, uncond = (torch.randn(512, 700, generator=generator) * 2 for _ in range(2))
    mixed = mix(cond, uncond, 3.0)
    scale = weight_scale(temperature, mixed.device)
    weights = sampling_weights(mixed, mixed.amax(-1, keepdim=True), scale).double()
    steps = weights.cumsum(-1) / weights.sum(-1, keepdim=True)
    column = torch.multinomial(weights, 1, generator=generator)
    uniform = steps.gather(1, column)[:, 0].float().clamp(max=1 - 2.0**-24)
    for _ in range(3):
        exact = sample_tokens(mixed, uniform, None, temperature, False)
        found = guided_sample(cond, uncond, uniform, cfg_weight=3.0, temperature=temperature)
        assert torch.equal(found.token_ids, exact)
        uniform = torch.nextafter(uniform, torch.zeros(()))


def test_chi_square(backend, device):
    """Samples follow the exact probabilities (few samples in the interpreter, which is slow)."""
    V, draws, limit = 12, 20000, 31.3  # the limit: the 99.9% point, 11 degrees of freedom
    if backend == "triton" and device == "cpu":
        V, draws, limit = 4, 32, 16.3  # 3 degrees of freedom
    cond, uncond, _ = case(1, V, torch.float32, device, "guided", scale=0.5)
    uniform = torch.rand(draws, generator=torch.Generator().manual_seed(11)).to(device)
    token_ids = guided_sample(
        cond.expand(draws, -1), uncond.expand(draws, -1), uniform, cfg_weight=2.0, temperature=1.5
    ).token_ids
    expected = torch.softmax(mix(cond, uncond, 2.0).double() / 1.5, -1)[0].cpu() * draws
    counted = torch.bincount(token_ids.cpu(), minlength=V)
    assert float(expected.min()) > 5
    assert float(((counted - expected) ** 2 / expected).sum()) < limit


# --- The ends of the interval, and classes that cannot be sampled ---------------------------------


@pytest.mark.parametrize("uniform", [0.0, 1e-38, 0.5, 1 - 2.0**-24])
def test_impossible_classes_are_never_sampled(uniform, backend, device):
    """-inf at both ends, and in one branch only; a class of weight 0."""
    cond, uncond, _ = case(2, 600, torch.float32, device, "guided")
    cond[:, :100], uncond[:, 100:130] = -math.inf, -math.inf
    cond[:, 500:], uncond[:, 550:] = -math.inf, -math.inf
    cond[:, 140:160] = -200.0
    out = guided_sample(
        cond, uncond, torch.full((2,), uniform, device=device), cfg_weight=4.0, temperature=0.9
    )
    sampled_logits = mix(cond, uncond, 4.0).gather(1, out.token_ids[:, None])
    assert sampled_logits.isfinite().all()
    assert out.guided.logprob.isfinite().all() and out.conditional.entropy.isfinite().all()
    assert (out.guided.logprob > -40 * math.log(2) - math.log(600)).all()


def test_uniform_at_its_ends(backend, device):
    cond = torch.tensor([[-math.inf, 0.0, 0.0, -math.inf]] * 3, device=device)
    uniform = torch.tensor([0.0, 0.5, 1 - 2.0**-24], device=device)
    assert guided_sample(cond, None, uniform, cfg_weight=1.0).token_ids.tolist() == [1, 2, 2]


def test_fully_masked_rows(backend, device):
    out = guided_sample(
        torch.full((2, 70), -math.inf, device=device), None, torch.rand(2, device=device),
        cfg_weight=1.0,
    )  # fmt: skip
    assert (out.token_ids == 0).all() and (out.guided.logprob == -math.inf).all()


def test_nan_is_not_sampled_and_not_hidden(backend, device):
    cond, _, uniform = case(4, 300, torch.float32, device, "plain")
    cond[:, 17] = math.nan
    out = guided_sample(cond, None, uniform, cfg_weight=1.0)
    assert ((out.token_ids >= 0) & (out.token_ids < 300)).all()
    assert out.guided.logprob.isnan().all() and out.conditional.nsc.isnan().all()


@pytest.mark.parametrize("column", [0, 5])
@pytest.mark.parametrize(
    "settings", [{}, {"temperature": 0.0}, {"top_k": 3}, {"top_p": 0.8}, {"min_p": 0.1}], ids=str
)
def test_a_nan_class_is_sampled_like_a_masked_one(backend, device, column, settings):
    cond, _, uniform = case(3, 40, torch.float32, device, "plain")
    masked = cond.clone()
    cond[:, column], masked[:, column] = math.nan, -math.inf
    token_ids = guided_sample(cond, None, uniform, cfg_weight=1.0, **settings).token_ids
    expected = guided_sample(masked, None, uniform, cfg_weight=1.0, **settings).token_ids
    assert token_ids.tolist() == expected.tolist()


def test_truncation_copies_no_temperature_from_the_host():
    """A CUDA graph cannot hold such a copy. Fake tensors check this without a GPU."""

    class NoCopies(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            assert "copy" not in str(function)
            return function(*args, **(kwargs or {}))

    with FakeTensorMode(), NoCopies():
        assert weight_scale(0.7, torch.device("cuda")).device.type == "cuda"


# --- Statistics -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["plain", "guided", "guided_cold", "greedy", "all_truncations"])
def test_statistics_are_those_of_token_stats(name, backend, device):
    """`conditional` at temperature 1, `guided` at the sampling one; both before truncation."""
    cond, uncond, uniform = case(3, 3000, torch.float32, device, name)
    kwargs = arguments(name)
    out = guided_sample(cond, uncond, uniform, **kwargs)
    mixed = mix(cond, uncond, kwargs["cfg_weight"])
    for mine, expected in (
        (out.conditional, token_stats(cond, out.token_ids)),
        (out.guided, token_stats(mixed, out.token_ids, temperature=kwargs.get("temperature") or 1)),
    ):
        for field, a, b in zip(FIELDS, mine, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=3e-5, msg=field)


def test_certain_token_keeps_its_digits(backend, device):
    logits = torch.zeros(2, 600, device=device)
    logits[:, 17] = torch.tensor([30.0, 50.0])
    out = guided_sample(logits, None, torch.full((2,), 0.5, device=device), cfg_weight=1.0)
    others = 599 * torch.exp(-torch.tensor([30.0, 50.0], dtype=torch.float64, device=device))
    for stats in (out.conditional, out.guided):
        torch.testing.assert_close(stats.logprob.double(), -others.log1p(), rtol=1e-5, atol=0)


# --- Truncation -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p"), [(7, 1, 0), (0, 0.6, 0), (0, 1, 0.05), (30, 0.9, 0.02), (1, 1, 0)]
)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_truncation_keeps_what_hugging_face_keeps(top_k, top_p, min_p, temperature, device):
    warpers = pytest.importorskip("transformers.generation.logits_process")
    logits, _ = random_case((20,), 400, torch.float32, device)
    scores = logits.cpu() / temperature  # cumsum raises on a GPU, see above
    if top_k:
        scores = warpers.TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1:
        scores = warpers.TopPLogitsWarper(float(top_p))(None, scores)
    if min_p:
        scores = warpers.MinPLogitsWarper(min_p)(None, scores)
    threshold = truncation_threshold(logits, temperature, top_k, top_p, min_p)
    assert torch.equal((logits >= threshold[:, None]).cpu(), scores > -math.inf)


def test_ties_with_the_last_one_kept_are_kept(backend, device):
    logits = torch.tensor([[3.0, 1.0, 2.0, 2.0, 2.0, 0.0]], device=device).expand(16, -1)
    uniform = (torch.arange(16, device=device) + 0.5) / 16
    for kwargs in ({"top_k": 2}, {"top_p": 0.6}):
        token_ids = guided_sample(logits, None, uniform, cfg_weight=1.0, **kwargs).token_ids
        assert sorted(set(token_ids.tolist())) == [0, 2, 3, 4], kwargs


def test_truncated_samples_are_among_the_kept(backend, device):
    cond, _, _ = case(1, 500, torch.float32, device, "plain")
    rows = 10 if backend == "triton" and device == "cpu" else 38
    uniform = torch.cat([torch.rand(rows), torch.tensor([0.0, 1 - 2.0**-24])]).to(device)
    token_ids = guided_sample(
        cond.expand(rows + 2, -1), None, uniform, cfg_weight=1.0, temperature=3.0, top_k=9
    ).token_ids
    assert set(token_ids.tolist()) <= set(cond[0].topk(9).indices.tolist())


def test_top_k_one_is_greedy(backend, device):
    cond, uncond, uniform = case(5, 500, torch.float32, device, "guided")
    greedy = guided_sample(cond, uncond, uniform, cfg_weight=3.0, temperature=0)
    assert torch.equal(greedy.token_ids, mix(cond, uncond, 3.0).argmax(-1))
    first = guided_sample(cond, uncond, uniform, cfg_weight=3.0, top_k=1)
    assert torch.equal(first.token_ids, greedy.token_ids)
    assert torch.equal(first.guided.logprob, greedy.guided.logprob)


def test_greedy_takes_the_first_of_equals(backend, device):
    logits = torch.tensor([[1.0, 5.0, 5.0, 2.0]], device=device)
    for uniform in (0.0, 0.9):
        out = guided_sample(
            logits, None, torch.tensor([uniform], device=device), cfg_weight=1.0, temperature=0
        )
        assert out.token_ids.tolist() == [1]


# --- Independence of batch, chunk and layout ------------------------------------------------------


@pytest.mark.parametrize("name", ["guided", "all_truncations"])
def test_batch_invariance(name, backend, device):
    cond, uncond, uniform = case(4, 700, torch.bfloat16, device, name)
    together = guided_sample(cond, uncond, uniform, **arguments(name))
    for row in range(4):
        part = slice(row, row + 1)
        alone = guided_sample(cond[part], uncond[part], uniform[part], **arguments(name))
        assert torch.equal(alone.token_ids, together.token_ids[part])
        for mine, other in zip(alone[1:], together[1:], strict=True):
            assert all(torch.equal(a, b[part]) for a, b in zip(mine, other, strict=True))


def test_chunks_change_nothing(device, monkeypatch):
    """The torch path takes 1 row at a time here, or 7."""
    import importlib

    monkeypatch.setenv("IRIS_KERNELS_BACKEND", "torch")
    module = importlib.import_module("iris_kernels.guided_sample.torch_path")
    cond, uncond, uniform = case(30, 45000, torch.float32, device, "guided")
    whole = guided_sample(cond, uncond, uniform, cfg_weight=2.0)
    monkeypatch.setattr(module, "chunk_rows", lambda columns: 7)
    cut = guided_sample(cond, uncond, uniform, cfg_weight=2.0)
    assert torch.equal(whole.token_ids, cut.token_ids)
    for mine, other in zip(whole[1:], cut[1:], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, other, strict=True))


LAYOUTS = {
    "pairs_interleaved": lambda x: (x[::2], x[1::2]),
    "padded_vocabulary": lambda x: (x[:4, :250], x[4:, :250]),
    "two_leading_dimensions": lambda x: (x[:4].view(2, 2, 300), x[4:].view(2, 2, 300)),
    "two_strides": lambda x: (x.view(2, 4, 300)[:, :3], x.view(2, 4, 300)[:, 1:]),
    "columns_apart": lambda x: (x[:4].t().contiguous().t(), x[4:]),
    "one_row": lambda x: (x[0], x[1]),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(name, backend, device):
    full, _ = random_case((8,), 300, torch.float32, device)
    cond, uncond = LAYOUTS[name](full)
    uniform = torch.rand(cond.shape[:-1], generator=torch.Generator().manual_seed(1)).to(device)
    out = guided_sample(cond, uncond, uniform, cfg_weight=2.0)
    V = cond.shape[-1]
    flat = guided_sample(
        cond.reshape(-1, V).clone(), uncond.reshape(-1, V).clone(), uniform.reshape(-1),
        cfg_weight=2.0,
    )  # fmt: skip
    assert out.token_ids.shape == uniform.shape and out.guided.lse.shape == uniform.shape
    assert torch.equal(out.token_ids.reshape(-1), flat.token_ids)
    assert torch.equal(out.conditional.nsc.reshape(-1), flat.conditional.nsc)


SPREAD = {
    "every_third": lambda u: u.repeat_interleave(3)[::3],
    "expanded": lambda u: u[:1].expand(40),
}


@pytest.mark.parametrize("name", SPREAD)
def test_uniform_of_any_strides(name, backend, device):
    cond, _ = random_case((40,), 300, torch.float32, device)
    uniform = SPREAD[name](torch.rand(40, generator=torch.Generator().manual_seed(1)).to(device))
    found = guided_sample(cond, None, uniform, cfg_weight=1.0).token_ids
    expected = guided_sample(cond, None, uniform.contiguous(), cfg_weight=1.0).token_ids
    assert torch.equal(found, expected)


def test_vocab_size(backend, device):
    cond, uncond, uniform = case(5, 400, torch.float32, device, "guided")
    for name in ("guided", "all_truncations"):
        kwargs = arguments(name)
        cut = guided_sample(cond[:, :333].clone(), uncond[:, :333].clone(), uniform, **kwargs)
        padded = cond.clone()
        padded[:, 333:] = math.nan
        out = guided_sample(padded, uncond, uniform, vocab_size=333, **kwargs)
        assert torch.equal(out.token_ids, cut.token_ids)
        assert torch.equal(out.guided.nsc, cut.guided.nsc)


def test_no_rows(backend, device):
    out = guided_sample(
        torch.zeros(0, 50, device=device), None, torch.zeros(0, device=device), cfg_weight=1.0
    )
    assert out.token_ids.shape == (0,) and out.guided.nsc.shape == (0,)


# --- As an operator -------------------------------------------------------------------------------


def test_opcheck(backend, device):
    cond, uncond, uniform = case(3, 60, torch.float32, device, "guided")
    for other in (uncond, None):
        numbers = (torch.tensor(2.0), torch.tensor(0.9), False, 5, 0.9, 0.0, 60)
        torch.library.opcheck(ops.guided_sample.default, (cond, other, uniform, *numbers))


def test_no_gradient_and_inputs_untouched(backend, device):
    cond, uncond, uniform = case(3, 60, torch.float32, device, "guided")
    before = cond.clone(), uncond.clone(), uniform.clone()
    out = guided_sample(cond.requires_grad_(), uncond, uniform, cfg_weight=2.0)
    assert not out.guided.logprob.requires_grad
    for tensor, value in zip((cond, uncond, uniform), before, strict=True):
        assert torch.equal(tensor, value)


def test_fullgraph_and_run_time_values(backend, device):
    cond, uncond, uniform = case(3, 60, torch.float32, device, "guided")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()

    def function(weight, temperature):
        return guided_sample(cond, uncond, uniform, cfg_weight=weight, temperature=temperature)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for weight, temperature in ((5.0, 0.9), (3.0, 0.8), (2.0, 1.1), (7.0, 1.7)):
        mine, expected = compiled(weight, temperature), function(weight, temperature)
        assert torch.equal(mine.token_ids, expected.token_ids)
        torch.testing.assert_close(mine.guided.nsc, expected.guided.nsc)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


def test_numbers_as_tensors(backend, device):
    cond, uncond, uniform = case(3, 60, torch.float32, device, "guided")
    expected = guided_sample(cond, uncond, uniform, cfg_weight=3.0, temperature=0.7, top_p=0.9)
    weight, temperature = torch.tensor(3.0, device=device), torch.tensor(0.7, device=device)
    out = guided_sample(
        cond, uncond, uniform, cfg_weight=weight, temperature=temperature, top_p=0.9
    )
    assert torch.equal(out.token_ids, expected.token_ids)
    assert torch.equal(out.guided.lse, expected.guided.lse)


@pytest.mark.gpu
def test_graph_capture(monkeypatch):
    """A replay samples from the current values of its inputs."""
    monkeypatch.setenv("IRIS_KERNELS_BACKEND", "triton")
    torch.use_deterministic_algorithms(False)
    cond, uncond, uniform = case(64, 16384, torch.bfloat16, "cuda", "guided")
    guided_sample(cond, uncond, uniform, cfg_weight=5.0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = guided_sample(cond, uncond, uniform, cfg_weight=5.0)
    uniform.copy_(torch.rand(64, device="cuda"))
    graph.replay()
    assert torch.equal(
        out.token_ids, guided_sample(cond, uncond, uniform, cfg_weight=5.0).token_ids
    )


@pytest.mark.gpu
def test_one_launch(monkeypatch):
    monkeypatch.setenv("IRIS_KERNELS_BACKEND", "triton")
    torch.use_deterministic_algorithms(False)
    cond, uncond, uniform = case(64, 16384, torch.bfloat16, "cuda", "guided")
    guided_sample(cond, uncond, uniform, cfg_weight=5.0)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        guided_sample(cond, uncond, uniform, cfg_weight=5.0)
        torch.cuda.synchronize()
    on_the_gpu = [e for e in profile.events() if e.device_type == DeviceType.CUDA]
    assert len(on_the_gpu) == 1, on_the_gpu


# --- Wrong arguments ------------------------------------------------------------------------------

LOGITS = torch.zeros(2, 3)
UNIFORM = torch.zeros(2)
WRONG_ARGUMENTS = {
    "cond_logits has dtype torch.int64": ((LOGITS.long(), None, UNIFORM), {}),
    "cond_logits has dtype torch.float64": ((LOGITS.double(), None, UNIFORM), {}),
    r"uncond_logits has shape torch.Size\(\[2, 4\]\)": ((LOGITS, torch.zeros(2, 4), UNIFORM), {}),
    "uncond_logits has dtype torch.bfloat16": ((LOGITS, LOGITS.bfloat16(), UNIFORM), {}),
    r"uniform has shape \(3,\)": ((LOGITS, None, torch.zeros(3)), {}),
    "uniform has dtype torch.float64": ((LOGITS, None, UNIFORM.double()), {}),
    r"outside \[0, 1\)": ((LOGITS, None, UNIFORM + 1), {}),
    "temperature is -1": ((LOGITS, None, UNIFORM), {"temperature": -1}),
    "cfg_weight is inf": ((LOGITS, None, UNIFORM), {"cfg_weight": math.inf}),
    "top_k is -1": ((LOGITS, None, UNIFORM), {"top_k": -1}),
    "top_p is 0": ((LOGITS, None, UNIFORM), {"top_p": 0}),
    "min_p is 2": ((LOGITS, None, UNIFORM), {"min_p": 2}),
    "vocab_size is 5": ((LOGITS, None, UNIFORM), {"vocab_size": 5}),
}


@pytest.mark.parametrize("message", WRONG_ARGUMENTS)
def test_wrong_arguments_are_named(message):
    positional, keywords = WRONG_ARGUMENTS[message]
    with pytest.raises(ValueError, match=message):
        guided_sample(*positional, **{"cfg_weight": 1.0} | keywords)


def test_sampling_is_exact_on_integer_weights(device):
    """Equal logits: token i owns [i/V, (i+1)/V), to the last bit of the uniform."""
    logits = torch.zeros(8, 8, device=device)
    uniform = torch.arange(8, device=device) / 8
    assert sample_tokens(logits, uniform, None, 1.0, False).tolist() == list(range(8))
    below = torch.nextafter(uniform[1:], torch.zeros(7, device=device))
    assert sample_tokens(logits[1:], below, None, 1.0, False).tolist() == list(range(7))


def test_every_step_of_the_cdf_is_exact(backend, device):
    """At the float32 next to each step, against integer arithmetic: sums round nowhere."""
    V = 40
    logits, _ = random_case((1,), V, torch.float32, device, scale=1.5)
    weights = sampling_weights(logits, logits.amax(-1, keepdim=True), weight_scale(1.0, device))
    steps = [sum(weights[0].tolist()[: i + 1]) for i in range(V)]
    places = range(0, V - 1, 3 if backend == "triton" and device == "cpu" else 1)
    uniform = torch.tensor([steps[i] / steps[-1] for i in places], device=device)
    wanted = [int(u * float(steps[-1])) for u in uniform.double().tolist()]
    expected = [next(i for i, step in enumerate(steps) if step > w) for w in wanted]
    rows = logits.expand(len(places), -1)
    assert guided_sample(rows, None, uniform, cfg_weight=1.0).token_ids.tolist() == expected
