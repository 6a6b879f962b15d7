"""The rollout engine: shared sequences, steps that could be a graph, fused products."""

from __future__ import annotations

import copy
import dataclasses
from collections import Counter
from typing import Any

import attention_fakes
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from iris_kernels import TokenStats, cpp, quantize_rows
from small_runs import needs_scaled_products, set_spread
from torch.utils._python_dispatch import TorchDispatchMode

from iris_fast.config import FP8_SETTINGS, SamplingConfig
from iris_fast.errors import UserError
from iris_fast.models.attention import PackedAttention
from iris_fast.models.decoder import RMSNorm
from iris_fast.models.pretrained.load import LoadedJanus
from iris_fast.preflight.inputs import check_device, check_fp8_sizes
from iris_fast.records import Prompt, Rollout
from iris_fast.rollout.decode_loop import run_steps
from iris_fast.rollout.fused_decoder import FusedDecoder, FusedLinear, fuse_storage
from iris_fast.rollout.sampler import Sampler
from iris_fast.rollout.shared_cache import SharedKVCache, SharedPrefixes
from iris_fast.tiny import build_random_tiny

PROMPTS = ["a red cube", "a red cube", "a blue ball left of a cone", "x", "a red cube", "x"]


class Launches(TorchDispatchMode):
    """Counts the operations that are more than a view."""

    def __init__(self, found: Counter[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if not op.is_view:
            self.found[str(op)] += 1
        return op(*args, **(kwargs or {}))


def make_model(device: str = "cpu", dtype: torch.dtype = torch.float32) -> LoadedJanus:
    loaded = build_random_tiny(seed=5)
    set_spread(loaded, text=2.5, image=0.6)
    generator = torch.Generator().manual_seed(11)
    for module in loaded.model.modules():
        if isinstance(module, RMSNorm):  # norms of ones would hide a mix-up
            module.weight.data += 0.3 * torch.randn(module.weight.shape, generator=generator)
    loaded.model.requires_grad_(False).to(device, dtype)
    return loaded


def sample(opened: LoadedJanus, engine: str, **settings: Any) -> Rollout:
    config = SamplingConfig(rollout_engine=engine, max_completion_length=7, **settings)
    sampler = Sampler(opened.model, opened.tokenizer, config, image_tokens=9)
    return sampler.rollout([Prompt(text) for text in PROMPTS], list(range(len(PROMPTS))))


@pytest.mark.parametrize(
    "settings",
    [{}, {"cot": True}, {"cfg_weight": 1.0}, {"cot": True, "top_k": 40, "temperature": 0.8}],
    ids=["image", "text and image", "without guidance", "truncated"],
)
def test_both_engines_sample_the_same(settings):
    opened = make_model()
    plain = sample(opened, "plain", **settings)
    static = sample(opened, "static", **settings)
    assert static.cot_ids == plain.cot_ids
    assert static.codes_NI.tolist() == plain.codes_NI.tolist()
    assert len({tuple(row) for row in plain.codes_NI.tolist()}) == len(PROMPTS)
    for ours, theirs in ((static.text, plain.text), (static.image, plain.image)):
        assert torch.equal(ours.mask, theirs.mask)
        for kind in ("conditional", "guided"):
            for name in TokenStats._fields:
                left, right = (getattr(getattr(t, kind), name) for t in (ours, theirs))
                torch.testing.assert_close(left, right, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("engine", ["plain", "static"])
@pytest.mark.parametrize("name", ["varlen", "flash_attention_2", "xformers"])
def test_prompts_are_read_with_the_chosen_attention(engine, name, monkeypatch):
    opened = make_model()
    expected = sample(opened, engine, cot=True)
    calls = attention_fakes.install(name, monkeypatch)
    opened.model.attn_implementation = name
    found = sample(opened, engine, cot=True)
    assert len(calls) == 2 * opened.config.decoder.num_layers  # once for text, once for images
    assert found.cot_ids == expected.cot_ids
    assert found.codes_NI.tolist() == expected.codes_NI.tolist()


def test_an_fp8_cache_samples_from_almost_the_same_distributions():
    opened = make_model()
    exact = sample(opened, "static", cot=True)
    rounded = sample(opened, "static", cot=True, kv_cache_dtype="fp8")
    first = (exact.text.conditional.entropy - rounded.text.conditional.entropy)[:, 0].abs()
    assert 0 < first.max() < 0.1  # of about 3 nats, before the two sample different tokens


def test_values_beyond_the_range_of_fp8_are_clamped():
    opened = make_model()
    for layer in opened.model.model.language_model.layers:
        layer.self_attn.v_proj.weight.data.mul_(1e6)
    sampled = sample(opened, "static", kv_cache_dtype="fp8")
    assert sampled.image.guided.logprob.isfinite().all()


@pytest.mark.parametrize("name", FP8_SETTINGS)
def test_fp8_needs_the_static_engine(name):
    with pytest.raises(UserError, match=rf"{name}.*add --rollout_engine static"):
        SamplingConfig(**{name: "fp8"})


@pytest.mark.parametrize("name", FP8_SETTINGS)
def test_fp8_on_a_gpu_without_it_is_refused(name, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    config = SamplingConfig(rollout_engine="static", bf16=True, **{name: "fp8"})
    with pytest.raises(UserError, match=rf"{name}.*8\.9 or later, this one has 8\.6"):
        check_device(config, torch.device("cuda"))


def test_fp8_weights_on_a_gpu_need_bfloat16(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    config = SamplingConfig(rollout_engine="static", rollout_weight_dtype="fp8")
    with pytest.raises(UserError, match=r"rollout_weight_dtype.*add --bf16 true"):
        check_device(config, torch.device("cuda"))


@needs_scaled_products
def test_fp8_weights_sample_from_almost_the_same_distributions():
    opened = make_model()
    exact = sample(opened, "static", cot=True)
    rounded = sample(opened, "static", cot=True, rollout_weight_dtype="fp8")
    first = (exact.text.conditional.entropy - rounded.text.conditional.entropy)[:, 0].abs()
    assert 0 < first.max() < 0.2  # of about 3 nats, before the two sample different tokens


@needs_scaled_products
def test_fp8_weights_follow_the_weights_that_they_are_made_of():
    """A used sampler samples the same as one that is made after the weights were written."""
    used, fresh = (make_model() for _ in range(2))
    settings = {"rollout_engine": "static", "rollout_weight_dtype": "fp8"}
    config = SamplingConfig(max_completion_length=7, **settings)
    samplers = [Sampler(o.model, o.tokenizer, config, image_tokens=9) for o in (used, fresh)]
    prompts, numbers = [Prompt(text) for text in PROMPTS], list(range(len(PROMPTS)))
    before = samplers[0].rollout(prompts, numbers).codes_NI
    for opened in (used, fresh):
        generator = torch.Generator().manual_seed(3)
        for weight in opened.model.model.language_model.layers.parameters():
            weight += 0.05 * torch.randn(weight.shape, generator=generator)
    after = [sampler.rollout(prompts, numbers).codes_NI.tolist() for sampler in samplers]
    assert after[0] == after[1] != before.tolist()


def test_auto_is_static_on_a_cpu_with_the_kernels_in_cpp(monkeypatch):
    opened = make_model()
    sampler = Sampler(opened.model, opened.tokenizer, SamplingConfig(), 9)
    assert sampler.uses_static_engine == (cpp.library() is not None)
    monkeypatch.setenv("IRIS_KERNELS_BACKEND", "torch")
    assert not sampler.uses_static_engine
    assert not sampler.uses_cuda_graph


# --- What is shared -------------------------------------------------------------------------------


def test_a_group_and_all_unconditional_rows_are_one_prefix_each():
    cond = [[1, 5, 6], [1, 5, 6], [1, 7]]
    uncond = [[1, 0, 0], [1, 0, 0], [1, 0]]
    shared = SharedPrefixes.of(cond + uncond)
    assert sorted(shared.prefixes) == [[1, 0, 0], [1, 5, 6], [1, 7]]
    assert shared.lengths == [3, 3, 2, 3, 3, 2]


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=4), min_size=1, max_size=8))
def test_every_sequence_has_a_prefix_and_no_prefix_is_stored_twice(sequences):
    shared = SharedPrefixes.of(sequences)
    for ids, place, seen in zip(sequences, shared.index, shared.lengths, strict=True):
        assert shared.prefixes[place][:seen] == ids
    for i, prefix in enumerate(shared.prefixes):
        assert prefix in sequences
        assert not any(
            other[: len(prefix)] == prefix for j, other in enumerate(shared.prefixes) if i != j
        )


def test_an_empty_sequence_is_refused():
    with pytest.raises(ValueError, match="not empty"):
        SharedPrefixes.of([[1, 2], []])


def test_the_cache_holds_each_prefix_once():
    config = build_random_tiny().model.config.decoder
    group = SharedKVCache(config, SharedPrefixes.of([[1] * 50] * 8), room=3)
    ungrouped = SharedKVCache(config, SharedPrefixes.of([[1] * 49 + [i] for i in range(8)]), room=3)

    def slots(cache: SharedKVCache) -> int:
        return sum(keys.shape[0] * keys.shape[2] for keys, _ in cache._prefix + cache._own)

    assert slots(group) == config.num_layers * (50 + 8 * 3)
    assert slots(ungrouped) == config.num_layers * (8 * 50 + 8 * 3)


# --- Steps ----------------------------------------------------------------------------------------


def test_steps_stop_when_asked_to():
    ran = []
    between = [False, False, True]
    done = run_steps(lambda: ran.append(0), 10, lambda done: between[done - 1])
    assert (done, len(ran)) == (3, 3)
    assert run_steps(lambda: None, 4, lambda done: False) == 4


# --- Memory that is kept --------------------------------------------------------------------------


def kept_sampler(opened: LoadedJanus) -> Sampler:
    config = SamplingConfig(rollout_engine="static", max_completion_length=7, cot=True)
    return Sampler(opened.model, opened.tokenizer, config, image_tokens=9, keep_memory=True)


def addresses(sampler: Sampler) -> list[int]:
    caches = [decoding._cache for decoding in sampler._kept.values()]
    return [keys.data_ptr() for cache in caches for keys, _ in cache._prefix + cache._own]


def test_a_rollout_in_kept_memory_samples_the_same():
    opened = make_model()
    sampler, numbers = kept_sampler(opened), list(range(len(PROMPTS)))
    first = sampler.rollout([Prompt(text) for text in PROMPTS], numbers)
    codes, before = first.codes_NI.clone(), addresses(sampler)
    other = [Prompt(text) for text in ["two green spheres", *PROMPTS[1:]]]
    second = sampler.rollout(other, numbers)
    fresh = kept_sampler(opened).rollout(other, numbers)
    assert addresses(sampler) == before
    assert second.cot_ids == fresh.cot_ids
    assert torch.equal(second.codes_NI, fresh.codes_NI)
    assert torch.equal(second.image.guided.logprob, fresh.image.guided.logprob)
    assert torch.equal(first.codes_NI, codes)


def test_memory_is_replaced_if_a_batch_does_not_fit_or_weights_have_moved():
    opened = make_model()
    sampler, numbers = kept_sampler(opened), list(range(len(PROMPTS)))
    sampler.rollout([Prompt(text) for text in PROMPTS], numbers)
    before = addresses(sampler)
    longer = [Prompt("cube " * 70)] * len(PROMPTS)
    assert torch.equal(
        sampler.rollout(longer, numbers).codes_NI,
        kept_sampler(opened).rollout(longer, numbers).codes_NI,
    )
    assert addresses(sampler) != before
    before = addresses(sampler)
    opened.model.lm_head.weight = torch.nn.Parameter(opened.model.lm_head.weight.flip(0))
    assert (
        sampler.rollout(longer, numbers).cot_ids
        == kept_sampler(opened).rollout(longer, numbers).cot_ids
    )
    assert addresses(sampler) != before


def test_fewer_samples_get_memory_of_their_own():
    opened = make_model()
    sampler = kept_sampler(opened)
    sampler.rollout([Prompt(text) for text in PROMPTS], list(range(len(PROMPTS))))
    one = sampler.rollout([Prompt(PROMPTS[0])], [0])
    assert torch.equal(
        one.codes_NI, kept_sampler(opened).rollout([Prompt(PROMPTS[0])], [0]).codes_NI
    )


# --- The fused decoder ----------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
def test_a_fused_linear_follows_weights_written_in_place(bias):
    layers = [torch.nn.Linear(48, size, bias=bias).requires_grad_(False) for size in (32, 16)]
    product, x = FusedLinear(*layers), torch.randn(5, 48)
    for layer in layers:
        for parameter in layer.parameters():
            parameter.copy_(torch.randn_like(parameter))
    together = torch.cat([layer(x) for layer in layers], dim=-1)
    torch.testing.assert_close(product(x), together)


def test_a_second_fused_linear_leaves_the_first_valid():
    """For example two samplers of one model."""
    layers = [torch.nn.Linear(48, size, bias=True).requires_grad_(False) for size in (32, 16)]
    first, second, x = FusedLinear(*layers), FusedLinear(*layers), torch.randn(5, 48)
    alone = FusedLinear(layers[0])
    layers[0].weight.copy_(torch.randn(32, 48))
    layers[1].bias.copy_(torch.randn(16))
    expected = torch.cat([layer(x) for layer in layers], dim=-1)
    for product in (first, second):
        torch.testing.assert_close(product(x), expected)
    torch.testing.assert_close(alone(x), expected[:, :32])


@needs_scaled_products
@pytest.mark.parametrize("bias", [False, True])
def test_an_fp8_fused_linear_multiplies_the_quantized_values(bias):
    layer = torch.nn.Linear(48, 32, bias=bias).requires_grad_(False)
    product, x = FusedLinear(layer, weight_dtype="fp8"), torch.randn(5, 48) * 9
    layer.weight.copy_(torch.randn(32, 48))
    product.refresh()
    weight, rows = (q.values.float() * q.scales for q in map(quantize_rows, (layer.weight, x)))
    expected = torch.nn.functional.linear(rows, weight, layer.bias)
    torch.testing.assert_close(product(x), expected, rtol=1e-4, atol=1e-4)
    error = (expected - layer(x)).norm() / layer(x).norm()
    assert 0.005 < error < 0.05


def other_order(weight: torch.Tensor) -> list[torch.Tensor]:
    return [weight[16:], weight[:16]]


def with_a_gap(weight: torch.Tensor) -> list[torch.Tensor]:
    return [weight[:8], weight[16:]]


def transposed(weight: torch.Tensor) -> list[torch.Tensor]:
    return [part.t() for part in weight.split([16, 16])]


def wider(weight: torch.Tensor) -> list[torch.Tensor]:
    return [part[:, :5] for part in weight.split([16, 16])]


@pytest.mark.parametrize("views", [other_order, with_a_gap, transposed, wider])
def test_weights_that_share_memory_in_another_way_are_copied(views):
    parameters = [torch.nn.Parameter(v, False) for v in views(torch.randn(32, 16))]
    values = torch.cat([p.clone() for p in parameters])
    together = fuse_storage(parameters)
    assert torch.equal(together, values)
    parameters[1].fill_(7.0)
    assert torch.equal(together, torch.cat(parameters))
    assert fuse_storage(parameters).data_ptr() == together.data_ptr()


def to_double_and_back(sampler: Sampler) -> Sampler:
    sampler.janus.double().float()
    return sampler


def assigned(sampler: Sampler) -> Sampler:
    state = {name: value.clone() for name, value in sampler.janus.state_dict().items()}
    sampler.janus.load_state_dict(state, assign=True)
    sampler.janus.requires_grad_(False)
    return sampler


@pytest.mark.parametrize("replace_tensors", [to_double_and_back, assigned, copy.deepcopy])
@pytest.mark.parametrize("dtype", ["auto", pytest.param("fp8", marks=needs_scaled_products)])
def test_a_sampler_follows_weights_whose_tensors_were_replaced(replace_tensors, dtype):
    opened, fresh = make_model(), make_model()
    settings = {"rollout_engine": "static", "rollout_weight_dtype": dtype}
    config = SamplingConfig(**settings)
    used = Sampler(opened.model, opened.tokenizer, config, image_tokens=4)
    prompts, numbers = [Prompt("a red cube")] * 4, list(range(4))
    used.rollout(prompts, numbers)
    used = replace_tensors(used)
    for model in (used.janus, fresh.model):
        generator = torch.Generator().manual_seed(3)
        for weight in model.model.language_model.parameters():
            weight += 0.05 * torch.randn(weight.shape, generator=generator)
    expected = Sampler(fresh.model, fresh.tokenizer, config, image_tokens=4)
    found, wanted = (s.rollout(prompts, numbers).image.guided for s in (used, expected))
    torch.testing.assert_close(found.logprob, wanted.logprob, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 2, 16, 17, 128])
def test_an_fp8_fused_linear_on_a_gpu(rows):
    layers = [torch.nn.Linear(64, size).requires_grad_(False) for size in (32, 48)]
    layers = [layer.to("cuda", torch.bfloat16) for layer in layers]
    x = torch.randn(rows, 64, device="cuda", dtype=torch.bfloat16)
    found = FusedLinear(*layers, weight_dtype="fp8")(x)
    together = torch.cat([layer.weight for layer in layers])
    weight, given = (q.values.float() * q.scales for q in map(quantize_rows, (together, x)))
    bias = torch.cat([layer.bias for layer in layers]).float()
    expected = torch.nn.functional.linear(given, weight, bias)
    torch.testing.assert_close(found.float(), expected, rtol=2e-2, atol=2e-2)


def test_a_model_of_sizes_that_fp8_does_not_support_is_refused():
    sizes = build_random_tiny().config.decoder
    check_fp8_sizes(sizes)
    with pytest.raises(UserError, match=r"rollout_weight_dtype.*intermediate_size is 72; use auto"):
        check_fp8_sizes(dataclasses.replace(sizes, intermediate_size=72))


def test_sizes_that_fp8_does_not_support_are_refused():
    with pytest.raises(ValueError, match=r"that 16 divides, these layers have \(8, 48\)"):
        FusedLinear(torch.nn.Linear(48, 8), weight_dtype="fp8")


def test_a_fused_step_equals_the_modules_in_few_launches():
    opened = make_model()
    decoder = opened.model.model.language_model
    cache = SharedKVCache(decoder.config, SharedPrefixes.of([[1, 2, 3], [1, 2]]), room=2)
    embeds = opened.model.embed_text(torch.tensor([1, 2, 3, 7, 8]))
    for number, norm in enumerate(m for m in decoder.modules() if isinstance(m, RMSNorm)):
        norm.eps = 0.01 * (1 + number)
    decoder(embeds[:3], torch.arange(3), cache.prefill_attention())
    fused, launched, given = FusedDecoder(decoder), Counter(), embeds[3:].clone()
    with Launches(launched):
        step = fused.step(given, cache)
    for b, length in enumerate((3, 2)):
        rows = torch.cat([embeds[:length], embeds[3 + b : 4 + b]])
        whole = decoder(rows, torch.arange(length + 1), PackedAttention([length + 1]))
        torch.testing.assert_close(step[b], whole[-1], rtol=1e-5, atol=1e-5)
    # Four products, attention with rotation, two norms and the gate; a norm and the lengths.
    assert launched.total() == 8 * decoder.config.num_layers + 2, launched


# --- On a GPU -------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("settings", [{}, {"cot": True}], ids=["image", "text and image"])
def test_a_replayed_graph_samples_the_same_as_single_steps(settings):
    opened = make_model("cuda")
    assert Sampler(opened.model, opened.tokenizer, SamplingConfig(), 9).uses_cuda_graph
    plain, captured = (sample(opened, engine, **settings) for engine in ("plain", "auto"))
    assert captured.cot_ids == plain.cot_ids
    assert captured.codes_NI.tolist() == plain.codes_NI.tolist()


@pytest.mark.gpu
def test_a_replayed_graph_in_bfloat16_differs_by_near_ties_only():
    opened = make_model("cuda", torch.bfloat16)
    plain, captured = (sample(opened, engine) for engine in ("plain", "auto"))
    same = (plain.codes_NI == captured.codes_NI).all(dim=1)
    first = (plain.codes_NI != captured.codes_NI).float().argmax(dim=1)
    for row in (~same).nonzero()[:, 0]:
        left, right = (t.image.guided.entropy[row, first[row]] for t in (plain, captured))
        torch.testing.assert_close(left, right, rtol=0.05, atol=0.05)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("name", "dtype"),
    [("kv_cache_dtype", torch.float32), ("rollout_weight_dtype", torch.bfloat16)],
    ids=["cache", "weights"],
)
def test_a_replayed_graph_in_fp8_samples_the_same_as_single_steps(name, dtype, monkeypatch):
    opened = make_model("cuda", dtype)
    captured = sample(opened, "static", **{name: "fp8"})
    monkeypatch.setattr(Sampler, "uses_cuda_graph", False)
    single = sample(opened, "static", **{name: "fp8"})
    assert captured.codes_NI.tolist() == single.codes_NI.tolist()
