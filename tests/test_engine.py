"""The rollout engine: shared beginnings, steps that could be a graph, fused products."""

from __future__ import annotations

from typing import Any

import attention_fakes
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from iris_kernels import TokenStats
from small_runs import set_spread

from iris_fast.batch import Prompt, Rollout
from iris_fast.config import SamplingConfig
from iris_fast.engine import run_steps
from iris_fast.errors import UserError
from iris_fast.models.layouts import JanusCheckpoint
from iris_fast.models.shared_cache import Beginnings, SharedKVCache
from iris_fast.rollout import Sampler
from iris_fast.tiny import build_random_tiny

PROMPTS = ["a red cube", "a red cube", "a blue ball left of a cone", "x", "a red cube", "x"]


def lively(device: str = "cpu", dtype: torch.dtype = torch.float32) -> JanusCheckpoint:
    checkpoint = build_random_tiny(seed=5)
    set_spread(checkpoint, text=2.5, image=0.6)
    checkpoint.model.requires_grad_(False).to(device, dtype)
    return checkpoint


def draw(opened: JanusCheckpoint, engine: str, **settings: Any) -> Rollout:
    config = SamplingConfig(rollout_engine=engine, max_completion_length=7, **settings)
    sampler = Sampler(opened.model, opened.tokenizer, config, image_tokens=9)
    return sampler.rollout([Prompt(text) for text in PROMPTS], list(range(len(PROMPTS))))


@pytest.mark.parametrize(
    "settings",
    [{}, {"cot": True}, {"cfg_weight": 1.0}, {"cot": True, "top_k": 40, "temperature": 0.8}],
    ids=["image", "text and image", "without guidance", "truncated"],
)
def test_both_engines_draw_the_same(settings):
    opened = lively()
    plain = draw(opened, "plain", **settings)
    opened.model.model.language_model.fuse()
    static = draw(opened, "static", **settings)
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
    opened = lively()
    expected = draw(opened, engine, cot=True)
    calls = attention_fakes.install(name, monkeypatch)
    opened.model.attn_implementation = name
    found = draw(opened, engine, cot=True)
    assert len(calls) == 2 * opened.config.decoder.num_layers  # once for text, once for images
    assert found.cot_ids == expected.cot_ids
    assert found.codes_NI.tolist() == expected.codes_NI.tolist()


def test_an_fp8_cache_draws_from_almost_the_same_distributions():
    opened = lively()
    exact = draw(opened, "static", cot=True)
    eight = draw(opened, "static", cot=True, kv_cache_dtype="fp8")
    first = (exact.text.conditional.entropy - eight.text.conditional.entropy)[:, 0].abs()
    assert 0 < first.max() < 0.1  # of about 3 nats, before the two draw different tokens


def test_keys_beyond_the_range_of_fp8_are_kept_at_its_end():
    opened = lively()
    for layer in opened.model.model.language_model.layers:
        layer.self_attn.v_proj.weight.data.mul_(1e6)
    drawn = draw(opened, "static", kv_cache_dtype="fp8")
    assert drawn.image.guided.logprob.isfinite().all()


def test_fp8_needs_the_static_engine():
    with pytest.raises(UserError, match=r"kv_cache_dtype.*add --rollout_engine static"):
        SamplingConfig(kv_cache_dtype="fp8")


def test_auto_is_plain_on_a_cpu():
    opened = lively()
    sampler = Sampler(opened.model, opened.tokenizer, SamplingConfig(), 9)
    assert not sampler.static
    assert not sampler.captured


# --- What is shared -------------------------------------------------------------------------------


def test_a_group_and_all_unconditional_rows_are_one_prefix_each():
    cond = [[1, 5, 6], [1, 5, 6], [1, 7]]
    uncond = [[1, 0, 0], [1, 0, 0], [1, 0]]
    shared = Beginnings.of(cond + uncond)
    assert sorted(shared.prefixes) == [[1, 0, 0], [1, 5, 6], [1, 7]]
    assert shared.seen == [3, 3, 2, 3, 3, 2]


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=4), min_size=1, max_size=8))
def test_beginnings_are_all_there_and_none_is_there_twice(beginnings):
    shared = Beginnings.of(beginnings)
    for ids, place, seen in zip(beginnings, shared.index, shared.seen, strict=True):
        assert shared.prefixes[place][:seen] == ids
    for i, prefix in enumerate(shared.prefixes):
        assert prefix in beginnings
        assert not any(
            other[: len(prefix)] == prefix for j, other in enumerate(shared.prefixes) if i != j
        )


def test_an_empty_beginning_is_refused():
    with pytest.raises(ValueError, match="not empty"):
        Beginnings.of([[1, 2], []])


def test_the_cache_holds_each_prefix_once():
    config = build_random_tiny().model.config.decoder
    group = SharedKVCache(config, Beginnings.of([[1] * 50] * 8), room=3)
    ungrouped = SharedKVCache(config, Beginnings.of([[1] * 49 + [i] for i in range(8)]), room=3)

    def slots(cache: SharedKVCache) -> int:
        return sum(keys.shape[0] * keys.shape[2] for keys, _ in cache._prefix + cache._own)

    assert slots(group) == config.num_layers * (50 + 8 * 3)
    assert slots(ungrouped) == config.num_layers * (8 * 50 + 8 * 3)


# --- Steps ----------------------------------------------------------------------------------------


def test_steps_end_when_told_to():
    ran = []
    between = [False, False, True]
    done = run_steps(
        lambda: ran.append(0), 10, torch.device("cpu"), False, lambda done: between[done - 1]
    )
    assert (done, len(ran)) == (3, 3)
    assert run_steps(lambda: None, 4, torch.device("cpu"), False, lambda done: False) == 4


# --- Fused products -------------------------------------------------------------------------------


def test_fused_products_follow_weights_written_in_place():
    opened = lively()
    decoder = opened.model.model.language_model
    layer = decoder.layers[0]
    x = torch.randn(5, decoder.config.hidden_size)
    names = dict(decoder.named_parameters()).keys()
    decoder.fuse()
    assert dict(decoder.named_parameters()).keys() == names
    for linear in (layer.self_attn.k_proj, layer.mlp.up_proj):
        linear.weight.copy_(torch.randn_like(linear.weight))
    torch.testing.assert_close(layer.self_attn._fused(x)[1], layer.self_attn.k_proj(x))
    torch.testing.assert_close(layer.mlp._fused(x)[1], layer.mlp.up_proj(x))


# --- On a GPU -------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("settings", [{}, {"cot": True}], ids=["image", "text and image"])
def test_a_replayed_graph_draws_what_single_steps_draw(settings):
    opened = lively("cuda")
    assert Sampler(opened.model, opened.tokenizer, SamplingConfig(), 9).captured
    plain, captured = (draw(opened, engine, **settings) for engine in ("plain", "auto"))
    assert captured.cot_ids == plain.cot_ids
    assert captured.codes_NI.tolist() == plain.codes_NI.tolist()


@pytest.mark.gpu
def test_a_replayed_graph_in_bfloat16_differs_by_near_ties_only():
    opened = lively("cuda", torch.bfloat16)
    plain, captured = (draw(opened, engine) for engine in ("plain", "auto"))
    same = (plain.codes_NI == captured.codes_NI).all(dim=1)
    first = (plain.codes_NI != captured.codes_NI).float().argmax(dim=1)
    for row in (~same).nonzero()[:, 0]:
        left, right = (t.image.guided.entropy[row, first[row]] for t in (plain, captured))
        torch.testing.assert_close(left, right, rtol=0.05, atol=0.05)


@pytest.mark.gpu
def test_a_replayed_graph_reads_an_fp8_cache_as_single_steps_do(monkeypatch):
    opened = lively("cuda")
    captured = draw(opened, "static", kv_cache_dtype="fp8")
    monkeypatch.setattr(Sampler, "captured", False)
    single = draw(opened, "static", kv_cache_dtype="fp8")
    assert captured.codes_NI.tolist() == single.codes_NI.tolist()
