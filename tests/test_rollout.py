"""Sampling: the same tokens whatever the batch, and statistics that a forward pass confirms."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from iris_kernels import TokenStats, token_stats
from small_runs import set_spread

from iris_fast.config import SamplingConfig
from iris_fast.grpo.packing import pack
from iris_fast.models.attention import PackedAttention
from iris_fast.models.pretrained.load import LoadedJanus
from iris_fast.models.templates import TEMPLATES, image_prompt_ids, join_prompt, unconditional_ids
from iris_fast.records import Guidance, PackedBatch, Prompt, Rollout
from iris_fast.rollout.decoding import Decoding
from iris_fast.rollout.random_streams import uniforms
from iris_fast.rollout.sampler import Sampler
from iris_fast.tiny import build_random_tiny

PROMPTS = [
    "a red cube",
    "a small blue ball left of a large green cone",
    "a red cube",
    "two yellow pyramids",
    "a 😀 on a table",
    "x",
]
IMAGE_TOKENS = 9


@pytest.fixture(scope="module")
def opened() -> LoadedJanus:
    """A tiny Janus with varied distributions. Its end token is one that the third sample has
    fourth, so that some texts end and some do not."""
    loaded = build_random_tiny(seed=5)
    loaded.model.requires_grad_(False)
    set_spread(loaded, text=2.5, image=0.6)
    loaded.tokenizer.eos_id = sample(sampler(loaded), list(range(6))).cot_ids[2][3]
    return loaded


def sampler(opened: LoadedJanus, greedy: bool = False, **settings: Any) -> Sampler:
    config = SamplingConfig(**{"cot": True, "max_completion_length": 10} | settings)
    return Sampler(opened.model, opened.tokenizer, config, IMAGE_TOKENS, greedy)


def sample(made: Sampler, places: list[int]) -> Rollout:
    """The samples at these places of PROMPTS; a place is also the sample's number."""
    return made.rollout([Prompt(PROMPTS[i]) for i in places], places)


@pytest.fixture(scope="module")
def rollout(opened) -> Rollout:
    return sample(sampler(opened), list(range(6)))


def test_the_model_of_these_tests_is_neither_flat_nor_certain(rollout):
    assert 1 < rollout.image.guided.entropy.mean() < 4  # of log 256 = 5.5
    assert 1 < rollout.text.conditional.entropy[rollout.text.mask].mean() < 5  # of log 640 = 6.5
    assert any(rollout.truncated)
    assert not all(rollout.truncated)
    assert len({tuple(row) for row in rollout.codes_NI.tolist()}) == 6


@pytest.mark.parametrize("calls", [[[0], [1], [2, 3], [4, 5]], [[5, 2, 0], [4, 3, 1]]])
def test_tokens_do_not_depend_on_the_batch(opened, rollout, calls):
    made = sampler(opened)
    for places in calls:
        part = sample(made, places)
        assert part.cot_ids == [rollout.cot_ids[i] for i in places]
        assert part.codes_NI.tolist() == rollout.codes_NI[places].tolist()
        for ours, theirs in ((part.text, rollout.text), (part.image, rollout.image)):
            whole = theirs.take(places)
            width = ours.mask.shape[1]
            assert not whole.mask[:, width:].any()
            assert torch.equal(ours.mask, whole.mask[:, :width])
            for name in TokenStats._fields:
                left, right = (getattr(t.conditional, name) for t in (ours, whole))
                torch.testing.assert_close(left, right[:, :width], rtol=2e-5, atol=2e-5)


def test_the_seed_decides(opened, rollout):
    torch.manual_seed(99)  # not this one
    again = sample(sampler(opened), list(range(6)))
    assert again.cot_ids == rollout.cot_ids
    assert torch.equal(again.codes_NI, rollout.codes_NI)
    other = sample(sampler(opened, seed=43), list(range(6)))
    assert (other.codes_NI != rollout.codes_NI).any(dim=1).all()
    assert other.cot_ids != rollout.cot_ids


def test_equal_prompts_have_their_own_streams(rollout):
    assert PROMPTS[0] == PROMPTS[2]
    assert rollout.codes_NI[0].tolist() != rollout.codes_NI[2].tolist()


def test_random_streams_differ_by_each_part_of_their_name():
    names = [(1, "a", 1), (2, "a", 1), (1, "b", 1), (1, "a", 2), (1, "a", -1), (11, "a", 1)]
    draws = [tuple(uniforms(seed, name, [n], 4)[0].tolist()) for seed, name, n in names]
    assert len(set(draws)) == len(names)
    together = uniforms(1, "a", [2, 1], 4)
    assert [tuple(row) for row in together.tolist()] == [draws[3], draws[0]]
    assert torch.equal(uniforms(1, "a", [1], 2)[0], together[1, :2])  # whatever the count
    assert together.dtype == torch.float32


def test_random_numbers_fill_0_to_1_and_streams_are_their_own():
    values = uniforms(3, "a", list(range(70_000)), 8)
    assert 0 <= values.min() < 1e-4
    assert 1 - 1e-4 < values.max() < 1
    assert abs(values.mean().item() - 0.5) < 1e-3
    assert len(torch.unique(values, dim=0)) == len(values)  # a hash cut to 32 bits would repeat one


# --- Statistics -----------------------------------------------------------------------------------


def hidden_of(opened: LoadedJanus, prompt: list[int], codes: list[int]) -> torch.Tensor:
    """Final hidden rows of one whole image sequence, run without any cache."""
    janus = opened.model
    embeds = torch.cat(
        [janus.embed_text(torch.tensor(prompt)), janus.embed_image(torch.tensor(codes[:-1]))]
    )
    attention = PackedAttention([len(embeds)])
    return janus.hidden_states(embeds, torch.arange(len(embeds)), attention)[len(prompt) - 1 :]


def test_conditional_statistics_are_those_of_the_packed_forward_pass(opened, rollout):
    packed, _ = pack(rollout)
    text, image = opened.model(packed)
    for stats, trace in ((text, rollout.text), (image, rollout.image)):
        for name in ("logprob", "nsc", "entropy"):
            ours = getattr(trace.conditional, name)[trace.mask]
            torch.testing.assert_close(ours, getattr(stats, name), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_guided_statistics_are_those_of_the_mixed_logits(opened, temperature):
    rollout = sample(sampler(opened, temperature=temperature, cfg_weight=3.0), [0, 1])
    janus = opened.model
    for row, codes in enumerate(rollout.codes_NI.tolist()):
        prompt = rollout.image_prompt_ids[row]
        empty = unconditional_ids(prompt, opened.tokenizer)
        cond, uncond = (
            janus.image_logits(hidden_of(opened, ids, codes)) for ids in (prompt, empty)
        )
        mixed = (uncond + 3.0 * (cond - uncond)) / temperature
        logprobs = torch.log_softmax(mixed, dim=-1)
        chosen = torch.tensor(codes)[:, None]
        found = TokenStats(*(field[row] for field in rollout.image.guided))
        expected = {
            "logprob": logprobs.gather(1, chosen)[:, 0],
            "entropy": -(logprobs.exp() * logprobs).sum(dim=1),
            "nsc": logprobs.mean(dim=1) + torch.tensor(256.0).log(),
        }
        for name, values in expected.items():
            torch.testing.assert_close(getattr(found, name), values, rtol=1e-3, atol=1e-3)
        conditional = token_stats(cond, torch.tensor(codes))
        torch.testing.assert_close(
            rollout.image.conditional.logprob[row], conditional.logprob, rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("cfg_weight", [3.0, 1.0])
def test_the_guided_training_distribution_is_the_one_that_was_sampled_from(opened, cfg_weight):
    rollout = sample(sampler(opened, temperature=0.7, cfg_weight=cfg_weight), [0, 1, 2])
    packed, sample_M = pack(rollout, Guidance(cfg_weight, 0.7))
    assert len(sample_M) == len(packed.text_targets) + len(packed.image_targets)
    assert len(packed.unconditional_rows) == (3 * IMAGE_TOKENS if cfg_weight != 1 else 0)
    text, image = opened.model(packed)
    for stats, trace in ((text, rollout.text), (image, rollout.image)):
        for name in ("logprob", "nsc", "entropy"):
            ours = getattr(trace.guided, name)[trace.mask]
            torch.testing.assert_close(ours, getattr(stats, name), rtol=2e-4, atol=2e-4)


def test_gradients_of_the_guided_distribution_go_through_both_rows(opened):
    """Against two separate sequences and logits mixed as in sampling, in float64."""
    rollout = sample(sampler(opened, cot=False, temperature=0.7, cfg_weight=3.0), [0, 1])
    generator = torch.Generator().manual_seed(3)
    upstream = torch.randn(2, IMAGE_TOKENS, generator=generator)

    def gradients(opened: LoadedJanus, loss: Callable) -> dict[str, torch.Tensor]:
        opened.model.requires_grad_(True).zero_grad()
        loss(opened).backward()
        return {
            n: p.grad.double() for n, p in opened.model.named_parameters() if p.grad is not None
        }

    def ours(opened: LoadedJanus) -> torch.Tensor:
        _, image = opened.model(pack(rollout, Guidance(3.0, 0.7))[0])
        return (image.logprob * upstream.flatten()).sum()

    def separately(opened: LoadedJanus) -> torch.Tensor:
        total = 0.0
        for row, codes in enumerate(rollout.codes_NI.tolist()):
            prompts = rollout.image_prompt_ids[row], rollout.unconditional_prompt_ids[row]
            cond, uncond = (
                opened.model.image_logits(hidden_of(opened, ids, codes)) for ids in prompts
            )
            logprobs = ((uncond + 3.0 * (cond - uncond)) / 0.7).log_softmax(dim=-1)
            chosen = logprobs.gather(1, torch.tensor(codes)[:, None])[:, 0]
            total = total + (chosen * upstream[row]).sum()
        return total

    found = gradients(copy.deepcopy(opened), ours)
    exact = copy.deepcopy(opened)
    exact.model.double()
    expected = gradients(exact, separately)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name] - value).norm() <= 1e-4 * value.norm() + 1e-7, name


def test_texts_conditional_statistics_stay_at_temperature_1(opened):
    rollout = sample(sampler(opened, temperature=0.5), [0, 1, 2])
    text, _ = opened.model(pack(rollout)[0])
    trace = rollout.text
    torch.testing.assert_close(
        trace.conditional.logprob[trace.mask], text.logprob, rtol=1e-4, atol=1e-4
    )
    assert (trace.guided.entropy < trace.conditional.entropy)[trace.mask].all()


def test_the_unconditional_row_keeps_bos_and_image_start_and_length(opened):
    tokenizer = opened.tokenizer
    ids = image_prompt_ids(tokenizer, TEMPLATES["janus-pro"], "a red cube")
    empty = unconditional_ids(ids, tokenizer)
    assert (empty[0], empty[-1]) == (tokenizer.bos_id, tokenizer.image_start_id)
    assert set(empty[1:-1]) == {tokenizer.pad_id}
    assert len(empty) == len(ids)


def test_cfg_weight_1_is_no_guidance(opened):
    """It runs without the unconditional rows: the mixed logits are the conditional ones."""
    plain = sample(sampler(opened, cfg_weight=1.0), [0, 1])
    torch.testing.assert_close(plain.image.guided.logprob, plain.image.conditional.logprob)
    almost = sample(sampler(opened, cfg_weight=1.0 + 1e-6), [0, 1])
    assert torch.equal(plain.codes_NI, almost.codes_NI)
    guided = sample(sampler(opened), [0, 1])
    assert (guided.image.guided.logprob - guided.image.conditional.logprob).abs().max() > 0.1


def test_greedy_takes_the_likeliest_of_the_mixed_logits(opened):
    rollout = sample(sampler(opened, greedy=True, cot=False, cfg_weight=2.0), [1])
    codes, prompt = rollout.codes_NI[0].tolist(), rollout.image_prompt_ids[0]
    empty = unconditional_ids(prompt, opened.tokenizer)
    cond, uncond = (
        opened.model.image_logits(hidden_of(opened, ids, codes)) for ids in (prompt, empty)
    )
    assert (uncond + 2.0 * (cond - uncond)).argmax(dim=-1).tolist() == codes
    other_seed = sample(sampler(opened, greedy=True, cot=False, cfg_weight=2.0, seed=1), [1])
    assert other_seed.codes_NI.tolist() == rollout.codes_NI.tolist()


def test_top_k_1_is_greedy(opened):
    greedy = sample(sampler(opened, greedy=True), [0, 3])
    top_1 = sample(sampler(opened, top_k=1), [0, 3])
    assert top_1.cot_ids == greedy.cot_ids
    assert torch.equal(top_1.codes_NI, greedy.codes_NI)


# --- Chain of thought -----------------------------------------------------------------------------


def test_text_ends_at_the_first_end_token_or_at_the_limit(opened, rollout):
    end = opened.tokenizer.eos_id
    for ids, truncated, mask in zip(
        rollout.cot_ids, rollout.truncated, rollout.text.mask, strict=True
    ):
        assert 1 <= len(ids) <= 10
        assert end not in ids[:-1]
        assert (ids[-1] == end) is not truncated  # the end token is part of the text
        assert truncated == (end not in ids)
        assert mask.tolist() == [place < len(ids) for place in range(len(mask))]
        if truncated:
            assert len(ids) == 10
    for field in rollout.text.conditional + rollout.text.guided:
        assert (field[~rollout.text.mask] == 0).all()


def test_texts_that_all_end_early_stop_the_loop(opened, monkeypatch):
    made = sampler(opened, top_k=1, max_completion_length=50)
    first = sample(made, [0, 2]).cot_ids[0][0]  # of the same prompt twice
    monkeypatch.setattr(opened.tokenizer, "eos_id", first)
    steps = []
    step = Decoding._decode
    monkeypatch.setattr(Decoding, "_decode", lambda *a: steps.append(1) or step(*a))
    ended = sample(made, [0, 2])
    assert ended.cot_ids == [[first]] * 2
    assert ended.truncated == [False, False]
    assert ended.text.mask.shape == (2, 1)
    assert len(steps) == 1 + IMAGE_TOKENS  # one step of text


def test_the_image_prompt_is_prompt_and_text(opened, rollout):
    template = TEMPLATES["janus-pro"]
    for place, ids in enumerate(rollout.image_prompt_ids):
        joined = join_prompt(PROMPTS[place], rollout.cot_texts[place])
        assert ids == image_prompt_ids(opened.tokenizer, template, joined)
        assert joined.startswith(PROMPTS[place])


def test_without_cot_the_image_prompt_is_the_prompt_alone(opened):
    rollout = sample(sampler(opened, cot=False), [0, 1])
    template = TEMPLATES["janus-pro"]
    expected = [image_prompt_ids(opened.tokenizer, template, text) for text in PROMPTS[:2]]
    assert rollout.image_prompt_ids == expected
    assert rollout.cot_ids == rollout.cot_prompt_ids == [[], []]
    assert rollout.text.mask.shape == (2, 0)


def test_a_sampled_text_cannot_insert_special_tokens(opened, monkeypatch):
    """Neither as ids nor spelled out in ordinary tokens nor by spelling one around another."""
    tokenizer = opened.tokenizer
    start, pad = "<begin_of_image>", tokenizer.specials["pad_token"]
    spelled = f"a {start} b <begin_of{pad}_image> c"
    pieces = [i for char in spelled for i in tokenizer.backend.encode(char).ids]
    assert start in tokenizer.decode(pieces)  # or there would be nothing to take out
    written = [tokenizer.image_start_id, *pieces, tokenizer.image_end_id, tokenizer.eos_id]
    trace = sample(sampler(opened), [0]).text
    monkeypatch.setattr(Sampler, "_sample_text", lambda *_: ([written], trace))
    sampled = sample(sampler(opened), [0])
    ids = sampled.image_prompt_ids[0]
    specials = {tokenizer.image_start_id, tokenizer.pad_id, tokenizer.image_end_id}
    assert specials.isdisjoint(ids[1:-1])
    assert (ids.count(tokenizer.bos_id), ids[-1]) == (1, tokenizer.image_start_id)
    assert sampled.cot_ids == [written]  # training still uses the sampled ids


def test_an_instruction_file_is_used(opened, here: Path):
    (here / "ask.txt").write_text("Describe {prompt} at length.\n")
    made = sampler(opened, cot_instruction="ask.txt", template="t2i-r1")
    text = opened.tokenizer.decode(sample(made, [0]).cot_prompt_ids[0])
    assert "User: Describe a red cube at length.\n\nAssistant:" in text


# --- Packing --------------------------------------------------------------------------------------


def test_packing_is_the_example_of_its_record():
    assert "T = 12" in PackedBatch.__doc__
    nothing = sample(sampler(build_random_tiny()), [0])
    rollout = dataclasses.replace(
        nothing,
        cot_prompt_ids=[[1, 2, 3]],
        cot_ids=[[4, 5, 6]],
        image_prompt_ids=[[1, 7, 8, 9]],
        codes_NI=torch.tensor([[20, 21, 22, 23]]),
    )
    packed, sample_M = pack(rollout)
    # The last token of each sequence predicts nothing and is left out.
    assert packed.token_ids_T.tolist() == [1, 2, 3, 4, 5, 1, 7, 8, 9, 20, 21, 22]
    assert packed.is_image_T.tolist() == [False] * 9 + [True] * 3
    assert packed.positions_T.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6]
    assert packed.sequence_lengths == [5, 7]
    assert packed.text_rows.tolist() == [2, 3, 4]
    assert packed.text_targets.tolist() == [4, 5, 6]
    assert packed.image_rows.tolist() == [8, 9, 10, 11]
    assert packed.image_targets.tolist() == [20, 21, 22, 23]
    assert sample_M.tolist() == [0] * 7


def test_packing_orders_text_before_image_rows_over_all_samples():
    nothing = sample(sampler(build_random_tiny(), cot=False), [0, 1])
    rollout = dataclasses.replace(
        nothing,
        cot_prompt_ids=[[1], [1, 2]],
        cot_ids=[[3], [4, 5]],
        image_prompt_ids=[[1, 9], [1, 8, 9]],
        codes_NI=torch.tensor([[20, 21], [22, 23]]),
    )
    packed, sample_M = pack(rollout)
    assert packed.token_ids_T.tolist() == [1, 1, 9, 20, 1, 2, 4, 1, 8, 9, 22]
    assert packed.sequence_lengths == [1, 3, 3, 4]
    assert packed.text_rows.tolist() == [0, 5, 6]
    assert packed.image_rows.tolist() == [2, 3, 9, 10]
    assert sample_M.tolist() == [0, 1, 1, 0, 0, 1, 1]


def test_packed_sequences_do_not_see_each_other(opened, rollout):
    whole, _ = opened.model(pack(rollout)[0])
    first, _ = opened.model(pack(rollout.take([0]))[0])
    torch.testing.assert_close(
        whole.logprob[: len(first.logprob)], first.logprob, rtol=1e-5, atol=1e-5
    )
