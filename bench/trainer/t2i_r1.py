"""The peer of the whole step: a GRPO step as in T2I-R1, on transformers' modules.

Text, then image, each a loop of single decoding steps with a growing cache; text and image are
trained in separate passes, with log-softmax over all logits of the completion; a reference model;
AdamW over float32 copies of the weights. Faster than T2I-R1's code where that needs no new method:
all samples of a step are decoded together, the other modality's head is not run, the backward of
each pass runs before the next pass begins, the reward is computed in the sampling loop, and no
sequence is padded, since all have the same length here.

Shapes: N samples, A prompt tokens, L text or I image tokens, vocabulary V.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bench.trainer.models import PAD, NumberTokenizer, in_transformers
from iris_fast.config import TrainConfig
from iris_fast.grpo.advantage import group_advantages
from iris_fast.models.janus import Janus
from iris_fast.models.templates import (
    TEMPLATES,
    fill_instruction,
    image_prompt_ids,
    join_prompt,
    load_instruction,
)


class Samples(NamedTuple):
    """A rollout: prompts and tokens of text and image, and the samples' advantages [N]."""

    text_prompts: Tensor  # [N, A]
    text: Tensor  # [N, L]
    image_prompts: Tensor
    codes: Tensor  # [N, I]
    advantages: Tensor

    def micro_batches(self, samples: int) -> Iterator[Samples]:
        """Split into parts of that many samples."""
        for parts in zip(*(field.split(samples) for field in self), strict=True):
            yield Samples(*parts)


# --- Decoding -------------------------------------------------------------------------------------


@torch.no_grad()
def decode(
    model: nn.Module, embeds: Tensor, tokens: int, choose: Callable[[Tensor], tuple[Tensor, Tensor]]
) -> Tensor:
    """Token ids [N, tokens].

    `choose` maps a step's hidden states [B, D] to its token ids and the next step's embeddings.
    """
    cache, sampled = None, []
    for _ in range(tokens):
        out = model.model.language_model(
            inputs_embeds=embeds, past_key_values=cache, use_cache=True
        )
        cache = out.past_key_values
        chosen, embeds = choose(out.last_hidden_state[:, -1])
        sampled.append(chosen)
    return torch.stack(sampled, 1)


def generate_text(
    model: nn.Module, prompts: Tensor, tokens: int, watch: Callable[[Tensor], None]
) -> Tensor:
    """Text ids [N, tokens]; `watch` is called with every step's logits [N, V]."""
    embed = model.get_input_embeddings()

    def choose(hidden: Tensor) -> tuple[Tensor, Tensor]:
        logits = model.lm_head(hidden)
        watch(logits)
        sampled = torch.multinomial(logits.softmax(-1), 1)
        return sampled[:, 0], embed(sampled)

    return decode(model, embed(prompts), tokens, choose)


def generate_image(
    model: nn.Module,
    prompts: Tensor,
    tokens: int,
    cfg_weight: float,
    greedy: bool = False,
    watch: Callable[[Tensor], None] = lambda logits: None,
) -> Tensor:
    """Codes [N, tokens] with guidance; `watch` is called with the conditional logits [N, V]."""
    uncond = prompts.clone()
    uncond[:, 1:-1] = PAD

    def choose(hidden: Tensor) -> tuple[Tensor, Tensor]:
        logit_cond, logit_uncond = model.model.generation_head(hidden).chunk(2)
        watch(logit_cond)
        mixed = logit_uncond + cfg_weight * (logit_cond - logit_uncond)
        probs = torch.softmax(mixed, dim=-1)
        sampled = probs.argmax(-1) if greedy else torch.multinomial(probs, 1)[:, 0]
        both = torch.cat([sampled, sampled])[:, None]
        return sampled, model.prepare_embeddings_for_image_generation(both)

    embeds = model.get_input_embeddings()(torch.cat([prompts, uncond]))
    return decode(model, embeds, tokens, choose)


class Nsc:
    """Sum of log V + mean(log p) = -KL(U || p) over all steps it is called with, [N]."""

    def __init__(self) -> None:
        self.total: Tensor | float = 0.0

    def __call__(self, logits: Tensor) -> None:
        mean = logits.float().log_softmax(-1).mean(-1)
        self.total = self.total + math.log(logits.shape[-1]) + mean


# --- Training -------------------------------------------------------------------------------------


def text_logprobs(model: nn.Module, prompts: Tensor, ids: Tensor) -> Tensor:
    """Log-probs [N, L] of text ids [N, L] after prompts [N, A]."""
    embeds = model.get_input_embeddings()(torch.cat([prompts, ids[:, :-1]], dim=1))
    return _logprobs(model, embeds, prompts.shape[1], model.lm_head, ids)


def image_logprobs(model: nn.Module, prompts: Tensor, codes: Tensor) -> Tensor:
    """Log-probs [N, I] of codes [N, I] after prompts [N, A]."""
    text = model.get_input_embeddings()(prompts)
    image = model.prepare_embeddings_for_image_generation(codes[:, :-1])
    embeds = torch.cat([text, image], dim=1)
    return _logprobs(model, embeds, prompts.shape[1], model.model.generation_head, codes)


def _logprobs(model: nn.Module, embeds: Tensor, start: int, head: nn.Module, ids: Tensor) -> Tensor:
    out = model.model.language_model(inputs_embeds=embeds, use_cache=False)
    logprobs = head(out.last_hidden_state[:, start - 1 :]).float().log_softmax(-1)
    return logprobs.gather(-1, ids[..., None])[..., 0]


class T2IR1:
    """Policy, reference and optimizer, all starting from the weights of `janus`."""

    def __init__(self, janus: Janus, tokenizer: NumberTokenizer, config: TrainConfig):
        self.config, self._tokenizer = config, tokenizer
        self.policy, self.reference = in_transformers(janus), in_transformers(janus)
        modules = (self.policy.model.language_model, self.policy.lm_head)
        self._trained = [p.requires_grad_(True) for m in modules for p in m.parameters()]
        self._masters = [p.detach().float().clone() for p in self._trained]
        self._optimizer = torch.optim.AdamW(
            self._masters, lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
        )
        self.device = janus.lm_head.weight.device

    def rollout(self, texts: list[str], image_tokens: int) -> Samples:
        """One sample with its advantage per text, all samples of a prompt in a row."""
        config, tokenizer, template = self.config, self._tokenizer, TEMPLATES[self.config.template]
        instruction, nsc = load_instruction(config.cot_instruction), Nsc()
        cot_prompts = [template.cot_prompt(fill_instruction(instruction, text)) for text in texts]
        text_prompts = self._ids([tokenizer.encode(each) for each in cot_prompts])
        ids = generate_text(self.policy, text_prompts, config.max_completion_length, nsc)
        joined = [
            join_prompt(text, tokenizer.decode(row))
            for text, row in zip(texts, ids.tolist(), strict=True)
        ]
        image_prompts = self._ids([image_prompt_ids(tokenizer, template, text) for text in joined])
        codes = generate_image(
            self.policy, image_prompts, image_tokens, config.cfg_weight, watch=nsc
        )
        advantages = group_advantages(nsc.total, config.num_generations, config.scale_rewards)
        return Samples(text_prompts, ids, image_prompts, codes, advantages)

    def _ids(self, rows: list[list[int]]) -> Tensor:
        return torch.tensor(rows, device=self.device)

    def train(self, samples: Samples) -> float:
        """One AdamW step on GRPO's loss over micro-batches; returns the gradient's norm."""
        config = self.config
        tokens = samples.text.numel() + samples.codes.numel()
        size = config.per_device_train_batch_size * config.num_generations
        for batch in samples.micro_batches(size):
            for logprobs, prompts, ids in (
                (text_logprobs, batch.text_prompts, batch.text),
                (image_logprobs, batch.image_prompts, batch.codes),
            ):
                with torch.no_grad():
                    reference = logprobs(self.reference, prompts, ids)
                policy = logprobs(self.policy, prompts, ids)
                gap = reference - policy
                kl = gap.exp() - gap - 1
                gain = (policy - policy.detach()).exp() * batch.advantages[:, None]
                ((config.beta * kl - gain).sum() / tokens).backward()
        for master, parameter in zip(self._masters, self._trained, strict=True):
            master.grad, parameter.grad = parameter.grad.float(), None
        norm = nn.utils.clip_grad_norm_(self._masters, config.max_grad_norm)
        self._optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_(self._trained, self._masters)
        return norm.item()

    def gradient(self) -> Tensor:
        """The last step's clipped gradient of one weight in the first block."""
        watched = self.policy.model.language_model.layers[0].self_attn.o_proj.weight
        (place,) = (i for i, p in enumerate(self._trained) if p is watched)
        return self._masters[place].grad
