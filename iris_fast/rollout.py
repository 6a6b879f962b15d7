"""Prompts -> chain of thought -> image codes, KV-cached and guided, with per-token statistics.

All samples of a call are one batch without padding: every sequence has its own length. A sample's
tokens depend on its own prompt and random numbers; the rows beside it change its logits by
rounding at most.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from iris_kernels import TokenStats, guided_sample
from torch import Tensor

from iris_fast.batch import Prompt, Rollout, Trace
from iris_fast.config import SamplingConfig
from iris_fast.models.attention import KVCache
from iris_fast.models.janus import Janus
from iris_fast.models.templates import (
    TEMPLATES,
    fill_instruction,
    image_prompt_ids,
    join_prompt,
    load_instruction,
    unconditional_ids,
)
from iris_fast.models.tokenizer import JanusTokenizer
from iris_fast.randomness import uniforms

PAUSE_STEPS = 64  # image steps between two calls of `pause`
# Text steps between two looks at the device's "all ended" flag: a look stalls a GPU.
POLL_STEPS = {"cpu": 1, "cuda": 16}


@dataclass(frozen=True)
class Sampler:
    """A model to sample from and everything that turns prompts into its token sequences."""

    janus: Janus
    tokenizer: JanusTokenizer
    config: SamplingConfig
    image_tokens: int
    greedy: bool = False

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.janus.lm_head.weight.device

    @functools.cached_property
    def instruction(self) -> str:
        """The chain-of-thought instruction, read once: a file edited later changes no run."""
        return load_instruction(self.config.cot_instruction)

    @torch.no_grad()
    def rollout(
        self,
        prompts: list[Prompt],
        sample_numbers: list[int],
        pause: Callable[[], None] = lambda: None,
    ) -> Rollout:
        """One sample for each entry of `prompts`; `sample_numbers` choose their random streams.

        `pause` is called from time to time, equally often on every rank, and may raise.
        """
        template = TEMPLATES[self.config.template]
        cot_prompt_ids: list[list[int]] = [[] for _ in prompts]
        cot_ids: list[list[int]] = [[] for _ in prompts]
        truncated = [False for _ in prompts]
        text = empty_trace(len(prompts))
        texts = [prompt.text for prompt in prompts]
        cot_texts = ["" for _ in prompts]
        if self.config.cot:
            cot_prompt_ids = [
                self.tokenizer.encode(template.cot_prompt(fill_instruction(self.instruction, text)))
                for text in texts
            ]
            cot_ids, text = self._write_text(cot_prompt_ids, sample_numbers)
            truncated = [ids[-1] != self.tokenizer.eos_id for ids in cot_ids]
            cot_texts = [
                self.tokenizer.strip_special(self.tokenizer.decode(ids)).strip() for ids in cot_ids
            ]
            texts = [join_prompt(*pair) for pair in zip(texts, cot_texts, strict=True)]
        prompt_ids = [image_prompt_ids(self.tokenizer, template, text) for text in texts]
        codes_NI, image = self._draw_codes(prompt_ids, sample_numbers, pause)
        return Rollout(
            prompts=prompts,
            sample_numbers=sample_numbers,
            seed=self.config.seed,
            cot_prompt_ids=cot_prompt_ids,
            cot_ids=cot_ids,
            cot_texts=cot_texts,
            truncated=truncated,
            image_prompt_ids=prompt_ids,
            codes_NI=codes_NI,
            text=text,
            image=image,
        )

    def _write_text(
        self, prompt_ids: list[list[int]], sample_numbers: list[int]
    ) -> tuple[list[list[int]], Trace]:
        """Sample text until every sequence has ended or max_completion_length is reached."""
        longest = self.config.max_completion_length
        device = self.device
        draws_NL = uniforms(self.config.seed, "text", sample_numbers, longest).to(device)
        hidden_ND, cache = self._prefill(prompt_ids, room=longest)
        ended_N = torch.zeros(len(prompt_ids), dtype=torch.bool, device=device)
        steps = []
        for step in range(longest):
            sampled = self._sample(self.janus.text_logits(hidden_ND), None, draws_NL[:, step])
            steps.append(sampled)
            ended_N |= sampled.token_ids == self.tokenizer.eos_id
            look = step % POLL_STEPS[device.type] == 0
            if step + 1 == longest or (look and bool(ended_N.all())):
                break
            hidden_ND = self._step(self.janus.embed_text(sampled.token_ids), cache)
        ids_NL = torch.stack([step.token_ids for step in steps], dim=1).cpu()
        # Tokens count up to and with the first end token.
        is_end = ids_NL == self.tokenizer.eos_id
        mask_NL = is_end.cumsum(dim=1) - is_end.long() == 0
        width = int(mask_NL.sum(dim=1).max())
        ids = [row[kept].tolist() for row, kept in zip(ids_NL, mask_NL, strict=True)]
        return ids, make_trace(steps[:width], mask_NL[:, :width])

    def _draw_codes(
        self, prompt_ids: list[list[int]], sample_numbers: list[int], pause: Callable[[], None]
    ) -> tuple[Tensor, Trace]:
        """Sample the image codes; the unconditional rows follow the conditional ones."""
        guided = self.config.cfg_weight != 1.0
        draws_NI = uniforms(self.config.seed, "image", sample_numbers, self.image_tokens)
        draws_NI = draws_NI.to(self.device)
        rows = list(prompt_ids)
        if guided:
            rows += [unconditional_ids(ids, self.tokenizer) for ids in prompt_ids]
        hidden_BD, cache = self._prefill(rows, room=self.image_tokens)
        steps = []
        for step in range(self.image_tokens):
            if step % PAUSE_STEPS == 0:
                pause()
            logits_BK = self.janus.image_logits(hidden_BD)
            cond, uncond = logits_BK.chunk(2) if guided else (logits_BK, None)
            sampled = self._sample(cond, uncond, draws_NI[:, step])
            steps.append(sampled)
            if step + 1 < self.image_tokens:
                embeds_ND = self.janus.embed_image(sampled.token_ids)
                embeds_BD = torch.cat([embeds_ND, embeds_ND]) if guided else embeds_ND
                hidden_BD = self._step(embeds_BD, cache)
        codes_NI = torch.stack([step.token_ids for step in steps], dim=1).cpu()
        return codes_NI, make_trace(steps, torch.ones_like(codes_NI, dtype=torch.bool))

    def _sample(self, cond: Tensor, uncond: Tensor | None, draws_N: Tensor):
        config = self.config
        return guided_sample(
            cond,
            uncond,
            draws_N,
            cfg_weight=config.cfg_weight if uncond is not None else 1.0,
            temperature=0.0 if self.greedy else config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            min_p=config.min_p,
        )

    def _prefill(self, sequences: list[list[int]], room: int) -> tuple[Tensor, KVCache]:
        """Run the prompts; the hidden state after each one's last token, and the filled cache."""
        device, dtype = self.device, self.janus.lm_head.weight.dtype
        lengths = [len(sequence) for sequence in sequences]
        cache = KVCache(
            self.janus.config.decoder, len(sequences), max(lengths) + room, dtype, device
        )
        ids_T = torch.tensor([token for sequence in sequences for token in sequence], device=device)
        positions_T = torch.cat([torch.arange(length) for length in lengths]).to(device)
        embeds_TD = self.janus.embed_text(ids_T)
        hidden_TD = self.janus.decode(embeds_TD, positions_T, cache.prefill(lengths))
        last = torch.tensor(lengths).cumsum(0) - 1
        return hidden_TD[last.to(device)], cache

    def _step(self, embeds_BD: Tensor, cache: KVCache) -> Tensor:
        """One more token for every sequence; the hidden state after it."""
        hidden_BD = self.janus.decode(embeds_BD, cache.lengths_B, cache.decode())
        cache.advance()
        return hidden_BD


def make_trace(steps: list, mask_NL: Tensor) -> Trace:
    """Stack the steps' statistics to [N, L] on the CPU, 0 where the mask does not hold."""

    def stack(parts: list[TokenStats]) -> TokenStats:
        fields = (torch.stack(values, dim=1).cpu() for values in zip(*parts, strict=True))
        return TokenStats(*(field.masked_fill(~mask_NL, 0.0) for field in fields))

    return Trace(
        conditional=stack([step.conditional for step in steps]),
        guided=stack([step.guided for step in steps]),
        mask=mask_NL,
    )


def empty_trace(samples: int) -> Trace:
    """The trace of no tokens."""
    nothing = TokenStats(*(torch.zeros(samples, 0) for _ in TokenStats._fields))
    return Trace(nothing, nothing, torch.zeros(samples, 0, dtype=torch.bool))
