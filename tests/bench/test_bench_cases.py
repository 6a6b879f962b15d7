"""The kernels' cases: counts by hand, and checks that accept correct and reject wrong results."""

import pytest
import torch

from bench.harness.case import Absent, WrongResult
from bench.harness.clock import restore
from bench.harness.gradients import CHECKED_ROWS
from bench.harness.measure import Bench
from bench.harness.rows import Measured
from bench.kernels import (
    add_rms_norm,
    decode_attention,
    decode_linear,
    guided_sample,
    linear_token_stats,
    quantize_rows,
    residual_rms_norm,
    rope,
    rope_append,
    silu_mul,
    token_stats,
)
from bench.trainer import training
from bench.trainer.models import make_model, model_configs

CPU = torch.device("cpu")


def by_name(module, device):
    return {case.name: case for case in module.cases(torch.device(device))}


def test_bytes_of_token_stats():
    cases = by_name(token_stats, "cuda")
    assert cases["token_stats forward R=4608 V=16384 bfloat16"].bytes == 150_994_944
    assert cases["token_stats backward R=4608 V=102400 bfloat16"].bytes == 2 * 943_718_400
    both = cases["token_stats forward+backward R=36864 V=151936 bfloat16"]
    assert both.bytes == 3 * 36864 * 151936 * 2
    assert next(iter(both.candidates)) == "ours"
    assert {"eager", "torch.compile", "trl", "flash-attn"} <= set(both.candidates)
    assert "liger" in cases["token_stats forward R=4608 V=16384 bfloat16"].candidates


def test_bytes_of_guided_sample():
    case = by_name(guided_sample, "cuda")["guided_sample forward R=64 V=16384 bfloat16"]
    assert case.bytes == 2 * 64 * 16384 * 2
    assert case.in_graph


@pytest.fixture(params=[torch.float32, torch.bfloat16])
def inputs(request):
    return token_stats.make_inputs(24, 300, request.param, CPU, seed=3)


@pytest.mark.parametrize("metric", token_stats.METRICS)
@pytest.mark.parametrize("name", ["ours", "eager", "trl"])
def test_implementations_of_token_stats_agree(inputs, metric, name):
    try:
        compute = token_stats.CANDIDATES[name](CPU)
    except Absent as absent:
        pytest.skip(str(absent))
    given = token_stats.make_inputs(24, 300, inputs.logits.dtype, CPU, seed=3)
    call = token_stats.METRICS[metric](compute, given)
    check = token_stats.check_forward if metric == "forward" else token_stats.check_backward
    for _ in range(2):  # a call can be repeated
        restore(call)
        check(inputs, call())


@pytest.mark.parametrize("name", ["liger", "flash-attn"])
def test_gpu_peers_are_absent_on_a_cpu(name):
    with pytest.raises(Absent):
        token_stats.CANDIDATES[name](CPU)


def test_in_place_overwrites_the_logits_and_restore_undoes_it(inputs):
    before = inputs.logits.detach().clone()
    call = token_stats.METRICS["forward+backward in place"](
        token_stats.IN_PLACE["ours"](CPU), inputs
    )
    result = call()
    assert not torch.equal(inputs.logits.detach(), before)
    given = token_stats.make_inputs(24, 300, before.dtype, CPU, seed=3)
    token_stats.check_backward(given, result)
    restore(call)
    assert torch.equal(inputs.logits.detach(), before)


def test_wrong_statistics_are_rejected(inputs):
    result = token_stats.plain(inputs.logits.detach(), inputs.token_ids)
    for name in result:
        wrong = result | {name: result[name] * 1.01}
        with pytest.raises(WrongResult, match=name):
            token_stats.check_forward(inputs, wrong)


def test_a_wrong_gradient_is_rejected(inputs):
    names, gradient = token_stats._forward_backward(token_stats.plain, inputs)()
    with pytest.raises(WrongResult):
        token_stats.check_backward(inputs, (names, gradient.roll(1, 1)))
    with pytest.raises(WrongResult):
        token_stats.check_backward(inputs, (names[:2], gradient))  # without the entropy's part


def test_guided_sample_agrees_and_a_wrong_token_is_rejected():
    inputs = guided_sample.make_inputs(8, 300, torch.float32, CPU, seed=4)
    for name in ("ours", "eager"):
        result = guided_sample.CANDIDATES[name](CPU)(*inputs)
        guided_sample.check(inputs, result)
    with pytest.raises(WrongResult, match="CDF"):
        guided_sample.check(inputs, result._replace(token_ids=(result.token_ids + 1) % 300))
    with pytest.raises(WrongResult, match="guided nsc"):
        guided = result.guided | {"nsc": result.guided["nsc"] * 1.01}
        guided_sample.check(inputs, result._replace(guided=guided))


LINEAR = "linear_token_stats {} R=4608 D=2048 V=16384 bfloat16"


@pytest.mark.parametrize(
    ("metric", "products", "moved"),
    [
        ("forward", 1, 4608 * 2048 + 16384 * 2048),
        ("forward+backward", 3, 2 * (4608 * 2048 + 16384 * 2048)),
        ("forward+backward, frozen weight", 2, 2 * 4608 * 2048 + 16384 * 2048),
    ],
)
def test_counts_of_linear_token_stats(metric, products, moved):
    case = by_name(linear_token_stats, "cuda")[LINEAR.format(metric)]
    assert case.flops == products * 309_237_645_312  # 2 R D V
    assert case.bytes == 2 * moved
    assert {"liger", "cut-cross-entropy", "trl", "matmuls"} <= set(case.candidates)


@pytest.fixture(params=[True, False])
def head(request):
    return linear_token_stats.make_inputs(24, 16, 300, torch.float32, CPU, request.param, seed=5)


@pytest.mark.parametrize("name", ["ours", "eager", "trl"])
@pytest.mark.parametrize("forward", [True, False])
def test_implementations_of_linear_token_stats_agree(head, name, forward):
    call = linear_token_stats._prepare(forward, linear_token_stats.CANDIDATES[name], CPU, head)
    check = linear_token_stats.check_forward if forward else linear_token_stats.check_backward
    check(head, call())


def test_a_wrong_gradient_of_the_head_is_rejected(head):
    eager = linear_token_stats.CANDIDATES["eager"]
    names, gradients = linear_token_stats._prepare(False, eager, CPU, head)()
    assert len(gradients) == 1 + head.weight.requires_grad
    for i, gradient in enumerate(gradients):
        wrong = [*gradients[:i], gradient.roll(1, 0), *gradients[i + 1 :]]
        with pytest.raises(WrongResult, match=("d hidden", "d weight")[i]):
            linear_token_stats.check_backward(head, (names, wrong))


def test_bytes_of_decode_attention():
    case = by_name(decode_attention, "cuda")[
        "decode_attention forward H=32 B=64 S=704 Dh=128 bfloat16"
    ]
    assert case.bytes == 2 * 64 * 400 * 32 * 128 * 2  # keys and values, 400 entries on average
    assert case.in_graph
    lengths = decode_attention.live_entries(64)
    assert (lengths.min(), lengths.max()) == (352, 448)


def test_implementations_of_decode_attention_agree_and_a_wrong_one_is_rejected():
    inputs = decode_attention.make_inputs(3, 2, torch.float32, CPU, seed=6)
    for name in ("ours", "sdpa, masked", "sdpa, cut"):
        context = decode_attention.CANDIDATES[name](CPU)(inputs)()
        decode_attention.check(inputs, context)
        with pytest.raises(WrongResult, match="sequence 2"):
            decode_attention.check(inputs, context.index_fill(0, torch.tensor([2]), 0.0))
    longer = inputs._replace(lengths=inputs.lengths + 1)
    with pytest.raises(WrongResult):
        decode_attention.check(inputs, decode_attention.ours(CPU)(longer)())


def test_bytes_of_decode_linear():
    """The weight, the rows and the result; the gate halves the result."""
    found = by_name(decode_linear, "cuda")
    sizes = {name.split()[1]: case for name, case in found.items() if "M=64" in name}
    assert sizes["qkv"].bytes == 2 * (6144 * 2048 + 64 * (2048 + 6144))
    assert sizes["gate_up"].bytes == 2 * (11264 * 2048 + 64 * (2048 + 5632))
    assert sizes["down"].flops == 2 * 64 * 2048 * 5632
    assert all(case.in_graph for case in sizes.values())


@pytest.mark.parametrize("kind", ["plain", "gated", "partial"])
def test_implementations_of_decode_linear_agree_and_a_wrong_one_is_rejected(kind):
    inputs = decode_linear.make_inputs(3, 128, 192, torch.bfloat16, CPU, seed=5)
    for compute in (decode_linear.ours[kind](CPU), decode_linear.PLAIN[kind]):
        result = compute(*inputs)
        decode_linear.check(kind, inputs, result)
        with pytest.raises(WrongResult, match="product"):
            decode_linear.check(kind, inputs, result * 1.1)


BETWEEN_MATMULS = {
    add_rms_norm: ("add_rms_norm forward R=64 D=2048 bfloat16", (4 * 64 + 1) * 2048 * 2),
    silu_mul: ("silu_mul forward R=64 I=5632 bfloat16", 3 * 64 * 5632 * 2),
    quantize_rows: ("quantize_rows forward R=64 D=5632 bfloat16", 64 * (3 * 5632 + 4)),
    rope_append: (
        "rope_append forward H=16 B=64 S=8 Dh=128 bfloat16",
        2 * 64 * 3 * 16 * 128 * 2 + 64 * (2 * 64 * 4 + 8),  # read, written; tables and slots
    ),
}


@pytest.mark.parametrize("module", BETWEEN_MATMULS, ids=lambda module: module.__name__)
def test_bytes_between_matmuls(module):
    name, moved = BETWEEN_MATMULS[module]
    case = by_name(module, "cuda")[name]
    assert case.bytes == moved
    assert case.in_graph
    assert next(iter(case.candidates)) == "ours"


def small_inputs(module):
    sizes = {rope_append: (3, 2), silu_mul: (3, 20)}.get(module, (3, 32))
    return module.make_inputs(*sizes, torch.float32, CPU, seed=7)


def result_of(module, name):
    case = next(iter(module.cases(CPU)))
    return case.candidates[name](small_inputs(module))()


@pytest.mark.parametrize("name", ["ours", "eager"])
@pytest.mark.parametrize("module", BETWEEN_MATMULS, ids=lambda module: module.__name__)
def test_implementations_between_matmuls_agree(module, name):
    module.check(small_inputs(module), result_of(module, name))


def test_wrong_results_between_matmuls_are_rejected():
    norm, total = result_of(add_rms_norm, "ours")
    for wrong, what in (((norm * 1.01, total), "norm"), ((norm, total * 1.01), "sum")):
        with pytest.raises(WrongResult, match=what):
            add_rms_norm.check(small_inputs(add_rms_norm), wrong)
    with pytest.raises(WrongResult, match="product"):
        silu_mul.check(small_inputs(silu_mul), result_of(silu_mul, "ours").flip(-1))
    values, scales = result_of(quantize_rows, "ours")
    with pytest.raises(WrongResult, match="scales"):
        quantize_rows.check(small_inputs(quantize_rows), (values, scales * 1.01))
    with pytest.raises(WrongResult, match="rows"):
        quantize_rows.check(small_inputs(quantize_rows), (values.float() * 1.1, scales))
    query, read = result_of(rope_append, "ours")
    for place, what in enumerate(("query", "key", "value")):
        wrong = [t * (1.01 if i == place else 1.0) for i, t in enumerate(read())]
        with pytest.raises(WrongResult, match=what):
            rope_append.check(
                small_inputs(rope_append), (query, lambda wrong=wrong: rope_append.Result(*wrong))
            )


TRAINED = {
    "residual_rms_norm forward+backward R=40320 D=2048 bfloat16": (8 * 40320 + 3) * 2048 * 2,
    "silu_mul forward+backward R=40320 I=5632 bfloat16": 8 * 40320 * 5632 * 2,
    "rope forward+backward T=40320 H=16 Dh=128 bfloat16": 2 * 40320 * (4 * 2048 * 2 + 128 * 4),
}
SMALL = {  # more rows than are checked
    residual_rms_norm: residual_rms_norm.make_inputs(CHECKED_ROWS + 3, 16, torch.float32, CPU, 1),
    silu_mul: silu_mul.make_halves(CHECKED_ROWS + 3, 16, torch.float32, CPU, 1),
    rope: rope.make_inputs(CHECKED_ROWS + 3, 2, torch.float32, CPU, 1),
}


def test_bytes_of_the_trained_ops():
    found = {}
    for module in SMALL:
        assert not any(case.metric != "forward" for case in module.cases(CPU))
        found |= {name: case.bytes for name, case in by_name(module, "cuda").items()}
    assert TRAINED.items() <= found.items()


@pytest.mark.parametrize("module", SMALL, ids=lambda module: module.__name__)
def test_implementations_of_the_trained_ops_agree_and_wrong_gradients_are_rejected(module):
    loaders = getattr(module, "TRAINED", module.CANDIDATES)
    prepare = getattr(module, "_prepare_both", module._prepare)
    check = getattr(module, "check_both", module.check)
    inputs = SMALL[module]
    for name in ("ours", "eager"):
        results, gradients = prepare(loaders[name], CPU, inputs)()
        check(inputs, (results, gradients))
    for i, gradient in enumerate(gradients):
        wrong = [*gradients[:i], gradient * 1.01, *gradients[i + 1 :]]
        with pytest.raises(WrongResult, match="gradient"):
            check(inputs, (results, wrong))
    with pytest.raises(WrongResult, match="result 0"):
        check(inputs, ([results[0].roll(1, 0), *results[1:]], gradients))


def test_a_training_pass_is_reported_as_time_tokens_and_operations(monkeypatch):
    """2 ms for 8 sequences of 79 tokens; on a GPU also relative to its data sheet."""
    bench = Bench(CPU, [{"case": "matmul", "dtype": "float32", "value": 1.0}])
    monkeypatch.setattr(training, "flops", lambda *_: 10**9)
    monkeypatch.setattr(bench, "compare", lambda *_: {"ours": Measured(2e-3)})
    config = model_configs(CPU)["tiny"]

    def rows():
        return {row["metric"]: row for row in training.measure(bench, "tiny", config, 8)}

    found = rows()
    assert list(found) == ["forward+backward", "tokens"]
    assert (found["forward+backward"]["value"], found["forward+backward"]["floor"]) == (2.0, 1.0)
    tokens = 8 * (training.PROMPT_TOKENS + config.image_tokens - 1)
    assert found["tokens"]["value"] == pytest.approx(tokens / 2e-3, rel=1e-3)
    assert found["tokens"]["fraction_of_floor"] == pytest.approx(0.5, rel=1e-3)
    monkeypatch.setattr(training, "make_policy", lambda config, device: make_model(
        config, CPU, torch.float32))  # fmt: skip
    monkeypatch.setattr(training, "make_inputs", lambda *_: None)
    bench.device = torch.device("cuda")
    mfu = rows()["MFU"]
    assert (mfu["value"], mfu["unit"]) == (0.5, "TFLOP/s")
    assert mfu["fraction_of_floor"] == pytest.approx(0.5 / 989, rel=1e-3)


def test_changes_to_transformers_end_with_the_measurement():
    before = training.modeling_llama.LlamaRMSNorm
    with pytest.raises(RuntimeError), training.unpatched():
        training.modeling_llama.LlamaRMSNorm = None
        raise RuntimeError
    assert training.modeling_llama.LlamaRMSNorm is before
