"""The whole step: its floor by hand, both sides compared with each other, and the rows."""

import math
from dataclasses import replace

import pytest
import torch
from small_runs import needs_scaled_products

from bench.harness.case import WrongResult
from bench.harness.measure import Bench
from bench.harness.rows import Measured
from bench.trainer import rollout, step
from bench.trainer.models import (
    BOS,
    NumberTokenizer,
    in_transformers,
    make_model,
    model_configs,
)  # fmt: skip
from bench.trainer.t2i_r1 import Nsc
from iris_fast.grpo.advantage import group_advantages
from iris_fast.models.attention import PackedAttention

from test_bench_measure import CEILINGS  # isort: skip

CPU = torch.device("cpu")
TINY = model_configs(CPU)["tiny"]
SIZE = step.Size(prompts=2, group=2, cot=4, batch=1)
CONFIG = step.settings(SIZE, bf16=False)


@pytest.fixture
def tokens(monkeypatch):
    monkeypatch.setattr(step, "token_counts", lambda janus, config: step.Tokens(10, 4, 6, 16))


def floor_of(copy, rate):
    bench = Bench(CPU)
    bench.copy_bytes_per_second, bench.flops_per_second = copy, {"float32": rate}
    return step.floor_phases(bench, TINY, CONFIG, SIZE)


def test_floor_of_bytes(tokens):
    """Blocks 803840, text head 65536, image head 49536, embeddings 65536; 4096 bytes per key and
    value. Live in a text step: 2 prompts of 10 and 2 tokens of 4 samples; in an image step: 5
    prompts of 6 (4 samples and the shared unconditional one) and 8 tokens of 8 sequences."""
    found = floor_of(1e9, math.inf)
    text = 4 * ((803840 + 65536) * 4 + 4096 * (2 * 10 + 4 * 2))
    image = 16 * ((803840 + 49536) * 4 + 4096 * (5 * 6 + 8 * 8))
    assert found.rollout == pytest.approx((text + image) / 1e9)
    assert found.training == pytest.approx((803840 + 65536 + 65536) * 36 / 1e9)


def test_floor_of_operations(tokens):
    found = floor_of(math.inf, 1e9)
    prompts = 2 * 803840 * (2 * 10 + 5 * 6)
    decoding = 4 * 2 * (803840 + 65536) * 4 + 16 * 2 * (803840 + 49536) * 8
    assert found.rollout == pytest.approx((prompts + decoding) / 1e9)
    heads = 8 * 65536 * 4 + 6 * 49536 * 16
    attention = 8 * 4 * 128 * (13**2 + 21**2)
    assert found.training == pytest.approx(4 * (8 * 803840 * 34 + heads + attention) / 1e9)


@pytest.fixture(scope="module")
def both():
    """Our first step, its rollout, and a function that makes a peer before its first step."""
    with step.distributed.start("cpu", 60.0) as ranks:
        ours = step.Ours(TINY, CONFIG, ranks)
        first_step = ours.first_step()
        del ours
    return first_step, first_step.scored.rollout, lambda: step.Peer(TINY, CONFIG, CPU)


def test_samples_have_the_lengths_that_the_floor_assumes(both):
    _, sampled, _ = both
    counted = step.token_counts(TINY, CONFIG)
    for rows, length in (
        (sampled.cot_prompt_ids, counted.cot_prompt),
        (sampled.cot_ids, counted.cot),
        (sampled.image_prompt_ids, counted.image_prompt),
        (sampled.codes_NI.tolist(), counted.image),
    ):
        assert {len(ids) for ids in rows} == {length}


def test_the_peer_samples_as_many_tokens_from_the_same_prompts(both):
    _, ours, make_peer = both
    torch.manual_seed(0)
    samples = make_peer().rollout()
    assert samples.text_prompts.tolist() == ours.cot_prompt_ids
    assert samples.text.shape == (4, 4) and samples.codes.shape == (4, 16)
    assert samples.image_prompts.shape == torch.tensor(ours.image_prompt_ids).shape
    assert samples.advantages.view(2, 2).sum(dim=1).tolist() == pytest.approx([0, 0], abs=1e-3)
    assert samples.advantages.abs().min() > 0.1


def test_the_peer_finds_our_logprobs_and_our_gradient(both):
    first_step, _, make_peer = both
    step.check(make_peer(), first_step)


def test_the_peer_rewards_what_we_reward(both):
    """The NSC that its loop sums, of logits whose NSC is known."""
    nsc = Nsc()
    logits = torch.tensor([[0.0, 0.0], [math.log(3.0), 0.0]])  # uniform, and 3/4 to 1/4
    nsc(logits)
    nsc(logits)
    expected = math.log(2) + (math.log(0.75) + math.log(0.25)) / 2
    assert nsc.total.tolist() == pytest.approx([0.0, 2 * expected])


def test_the_peers_advantages_are_of_all_its_tokens():
    """Text and image NSC as our model computes them for the peer's tokens."""
    janus = make_model(TINY, CPU, torch.float32)
    peer = step.Peer(TINY, CONFIG, CPU)
    torch.manual_seed(1)
    samples = peer.rollout()
    ids = torch.cat([samples.text_prompts, samples.text], dim=1)
    embeds = janus.embed_text(ids)
    prompt_length, images = samples.text_prompts.shape[1], samples.codes
    text = nsc_of(janus, embeds[:, :-1], prompt_length, janus.text_logits)
    prompt = janus.embed_text(samples.image_prompts)
    embeds = torch.cat([prompt, janus.embed_image(images)], dim=1)
    image = nsc_of(janus, embeds[:, :-1], prompt.shape[1], janus.image_logits)
    advantages = group_advantages(text + image, SIZE.group, "group")
    assert samples.advantages.tolist() == pytest.approx(advantages.tolist(), abs=1e-3)


def nsc_of(janus, embeds, start, head):
    """Summed NSC [N] of embeddings [N, T, D], from the row that predicts token `start`."""
    samples, length, _ = embeds.shape
    attention = PackedAttention([length] * samples, CPU)
    positions = torch.arange(length).repeat(samples)
    hidden = janus.hidden_states(embeds.flatten(0, 1), positions, attention).unflatten(
        0, (samples, -1)
    )
    logits = head(hidden[:, start - 1 :]).double()
    return (math.log(logits.shape[-1]) - logits.logsumexp(-1) + logits.mean(-1)).sum(-1)


def test_both_generate_the_same_greedy_image():
    janus = make_model(TINY, CPU, torch.float32)
    prompts = rollout.make_prompts(8, 0)
    images = [make(janus)(prompts, 4, True) for make in (rollout.ours, rollout.eager_loop)]
    assert torch.equal(*images)


@needs_scaled_products
def test_fp8_rollouts_sample_from_nearly_the_same_distribution(monkeypatch):
    janus = make_model(TINY, CPU, torch.float32)
    prompts = rollout.make_prompts(8, 0)
    for name in rollout.FP8_SETTINGS:
        rollout.check_entropy(name, janus, prompts)
        monkeypatch.setattr(rollout, "ENTROPY_TOLERANCE", 1e-7)  # not from exactly the same
        with pytest.raises(WrongResult, match=name):
            rollout.check_entropy(name, janus, prompts)
        monkeypatch.undo()


def test_our_step_ends_with_the_new_weights_in_the_sampler():
    with step.distributed.start("cpu", 60.0) as ranks:
        ours = step.Ours(TINY, CONFIG, ranks)
        before = ours.models.sampler.janus.lm_head.weight.clone()
        ours.train(ours.rollout())
        after = ours.models.sampler.janus.lm_head.weight
        assert not torch.equal(before, after)
        assert torch.equal(after, step.full(ours.models.policy.lm_head.weight.detach()))
        del ours


@pytest.mark.parametrize("wrong", ["logprob", "norm", "gradient"])
def test_a_peer_that_computes_something_else_is_not_timed(both, wrong):
    first_step, _, make_peer = both
    if wrong == "logprob":
        first_step = first_step._replace(logprobs=first_step.logprobs * 1.001)
    elif wrong == "norm":
        first_step = first_step._replace(norm=2 * first_step.norm)
    else:  # other rewards than ours
        scored = replace(first_step.scored, advantage_N=-first_step.scored.advantage_N)
        first_step = first_step._replace(scored=scored)
    with pytest.raises(WrongResult, match=wrong):
        step.check(make_peer(), first_step)


def test_the_peer_samples_from_what_it_trained(both):
    first_step, _, make_peer = both
    peer = make_peer()
    before = peer.model.policy.lm_head.weight.detach().clone()
    start = peer.model.reference.lm_head.weight.detach().clone()
    step.check(peer, first_step)
    moved = (peer.model.policy.lm_head.weight - before).abs().max().item()
    assert moved == pytest.approx(CONFIG.learning_rate, rel=0.2)  # Adam's first step
    assert torch.equal(peer.model.reference.lm_head.weight, start)


def test_rows_of_a_run(monkeypatch):
    monkeypatch.setattr(step, "CPU_SIZE", SIZE)
    monkeypatch.setattr(step, "RUNS", 1)
    bench = Bench(CPU, CEILINGS)
    rows = {row["metric"]: row for row in step.rows(bench)}
    assert bench.failures == []
    assert list(rows) == ["step", "rollout", "training", "images", "hours_for_800_steps"]
    whole, hours = rows["step"], rows["hours_for_800_steps"]
    assert whole["shape"] == {"model": "tiny", "P": 2, "G": 2, "cot": 4, "tokens": 16}
    phases = rows["rollout"]["value"] + rows["training"]["value"]
    assert whole["value"] == pytest.approx(phases, rel=2e-3)
    assert hours["value"] == pytest.approx(whole["value"] * 800 / 3600, rel=2e-3)
    assert rows["images"]["value"] == pytest.approx(4 / whole["value"], rel=2e-3)
    for row in rows.values():
        peer = row["peers"][step.PEER]
        assert row["value"] > 0 and peer["value"] > 0 and "error" not in peer
        assert row["fraction_of_floor"] == pytest.approx(whole["fraction_of_floor"], rel=2e-3) or (
            row["metric"] in ("rollout", "training")
        )


def test_a_phase_of_a_failed_step_has_no_value():
    found = {"ours": Measured(2.0), step.PEER: Measured(error="out of memory")}
    phases = {"ours": step.Phases(1.5, 0.5)}
    rows = list(step.make_rows({}, CONFIG, found, phases, step.Phases(1.0, 0.25)))
    assert [row["value"] for row in rows] == [2.0, 1.5, 0.5, 2.0, 0.4444]
    assert [row["fraction_of_floor"] for row in rows] == [0.625, 0.6667, 0.5, 0.625, 0.625]
    assert {row["peers"][step.PEER]["error"] for row in rows} == {"out of memory"}


def test_ids_survive_the_number_tokenizer():
    numbers = NumberTokenizer(1000)
    ids = [999, 0, 1, 2, 3, 17]
    assert numbers.encode(numbers.decode(ids)) == [BOS, *ids]
    assert numbers.encode("a cube: 7<begin_of_image>") == [1, 5, 5, 7, 2]


def test_a_peer_has_the_dtype_of_our_weights():
    janus = make_model(TINY, CPU, torch.bfloat16)
    model = in_transformers(janus)
    trained = [*model.model.language_model.parameters(), *model.lm_head.parameters()]
    assert {p.dtype for p in trained} == {torch.bfloat16}
    assert torch.equal(model.lm_head.weight, janus.lm_head.weight)
