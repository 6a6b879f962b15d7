"""The self-certainty reward: its value, and a real TRL run on it."""

import math

import pytest
import torch

pytest.importorskip("trl", reason="TRL is not installed")
from iris_kernels.integrations import SelfCertaintyReward
from tiny_trl import make_model, make_prompts, make_tokenizer, train

LENGTHS = (3, 6, 1, 5, 2)


@pytest.fixture
def completion_ids():
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 99, (n,), generator=generator).tolist() for n in LENGTHS]


def oracle(model, prompt_ids, completion_ids, temperature=1.0):
    """KL(U || p) of every token of one completion, in float64."""
    ids = torch.tensor([[*prompt_ids, *completion_ids]])
    logits = model.double()(input_ids=ids).logits[0, len(prompt_ids) - 1 : -1] / temperature
    model.float()
    return -logits.log_softmax(-1).mean(-1) - math.log(logits.shape[-1])


@pytest.mark.parametrize("batch_size", [1, 2, 8])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_value_of_each_completion(completion_ids, batch_size, reduction):
    model, tokenizer, prompts = make_model(), make_tokenizer(), make_prompts()[: len(LENGTHS)]
    reward = SelfCertaintyReward(
        model, tokenizer, reduction=reduction, temperature=0.8, batch_size=batch_size
    )
    got = reward(
        prompts=prompts, completions=[""] * len(prompts), completion_ids=completion_ids,
        trainer_state=None, log_extra=None,
    )  # fmt: skip
    expected = []
    for prompt, ids in zip(prompts, completion_ids, strict=True):
        tokens = oracle(model, tokenizer(text=[prompt])["input_ids"][0], ids, temperature=0.8)
        expected.append(getattr(tokens, reduction)().item())
    assert got == pytest.approx(expected, rel=1e-5)
    assert min(got) > 0


def test_conversational_prompts_use_the_chat_template(completion_ids):
    model, tokenizer = make_model(), make_tokenizer()
    prompts = [[{"role": "w5", "content": p}] for p in make_prompts()[: len(LENGTHS)]]
    got = SelfCertaintyReward(model, tokenizer)(prompts, [""] * len(prompts), completion_ids)
    for reward, prompt, ids in zip(got, make_prompts(), completion_ids, strict=False):
        as_text = tokenizer(text=[f"w5 {prompt} w0"])["input_ids"][0]
        assert reward == pytest.approx(oracle(model, as_text, ids).mean().item(), rel=1e-5)


def test_a_completion_without_tokens_has_no_reward(completion_ids):
    completion_ids[2] = []
    prompts = make_prompts()[: len(LENGTHS)]
    got = SelfCertaintyReward(make_model(), make_tokenizer())(prompts, prompts, completion_ids)
    assert [reward is None for reward in got] == [False, False, True, False, False]


def test_the_model_is_not_changed(completion_ids):
    model = make_model().train()
    model.model.layers[0].self_attn.attention_dropout = 0.9
    prompts = make_prompts()[: len(LENGTHS)]
    reward = SelfCertaintyReward(model, make_tokenizer())
    first, second = (reward(prompts, prompts, completion_ids) for _ in range(2))
    assert first == second  # no dropout
    assert model.training
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("wrong", [{"reduction": "max"}, {"batch_size": 0}])
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        SelfCertaintyReward(None, None, **wrong)


def test_the_reward_in_a_trl_run(tmp_path, monkeypatch):
    """Each reward that TRL logs in three steps is that of the policy at the step."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    seen = []

    class Recorded(SelfCertaintyReward):
        def __call__(self, prompts, completions, completion_ids, **rest):
            rewards = super().__call__(prompts, completions, completion_ids, **rest)
            for prompt, ids, reward in zip(prompts, completion_ids, rewards, strict=True):
                prompt_ids = self.processing_class(text=[prompt])["input_ids"][0]
                expected = oracle(self.model, prompt_ids, ids).mean().item()
                assert reward == pytest.approx(expected, rel=1e-4)
            seen.append(sum(rewards) / len(rewards))
            return rewards

    log = train(tmp_path, Recorded)
    assert [line["rewards/self_certainty/mean"] for line in log] == pytest.approx(seen, rel=1e-5)
    assert len(set(seen)) == 3  # the policy changed
