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
from iris_kernels import GuidedSample, TokenStats, guided_sample, uses_triton
from torch import Tensor

from iris_fast.config import SamplingConfig
from iris_fast.models.attention import rows_and_positions
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
from iris_fast.records import Prompt, Rollout, Trace
from iris_fast.rollout.decode_loop import Record, run_steps
from iris_fast.rollout.fused_decoder import FusedDecoder
from iris_fast.rollout.kv_cache import KVCache
from iris_fast.rollout.random_streams import uniforms
from iris_fast.rollout.shared_cache import Beginnings, SharedKVCache

Cache = KVCache | SharedKVCache

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

    @property
    def static(self) -> bool:
        """Whether equal beginnings are shared and every step is the same for the device."""
        engine = self.config.rollout_engine
        return engine == "static" or (engine == "auto" and self.device.type == "cuda")

    @property
    def captured(self) -> bool:
        """Whether steps become a CUDA graph: the torch path of the kernels asks the host."""
        return self.static and self.device.type == "cuda" and uses_triton(self.janus.lm_head.weight)

    @functools.cached_property
    def instruction(self) -> str:
        """The chain-of-thought instruction, read once: a file edited later changes no run."""
        return load_instruction(self.config.cot_instruction)

    @functools.cached_property
    def fused(self) -> FusedDecoder:
        """The static engine's decoder, of this model's weights and made once."""
        decoder = self.janus.model.language_model
        return FusedDecoder(decoder, self.config.rollout_weight_dtype)

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
        if self.static:
            self.fused.refresh()  # weights may have been written since
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
        unconditional: list[list[int]] = [[] for _ in prompts]
        if self.config.cfg_weight != 1.0:
            unconditional = [unconditional_ids(ids, self.tokenizer) for ids in prompt_ids]
        codes_NI, image = self._draw_codes(prompt_ids, unconditional, sample_numbers, pause)
        return Rollout(
            prompts=prompts,
            sample_numbers=sample_numbers,
            seed=self.config.seed,
            cot_prompt_ids=cot_prompt_ids,
            cot_ids=cot_ids,
            cot_texts=cot_texts,
            truncated=truncated,
            image_prompt_ids=prompt_ids,
            unconditional_prompt_ids=unconditional,
            codes_NI=codes_NI,
            text=text,
            image=image,
        )

    def _write_text(
        self, prompt_ids: list[list[int]], sample_numbers: list[int]
    ) -> tuple[list[list[int]], Trace]:
        """Sample text until every sequence has ended or max_completion_length is reached."""
        longest, device = self.config.max_completion_length, self.device
        record = Record(uniforms(self.config.seed, "text", sample_numbers, longest).to(device))
        embeds_ND, cache = self._start(prompt_ids, room=longest)
        ended_N = torch.zeros(len(prompt_ids), dtype=torch.bool, device=device)

        def step() -> None:
            hidden_ND = self._decode(embeds_ND, cache)
            sampled = self._sample(self.janus.text_logits(hidden_ND), None, record.draws_N())
            record.write(sampled)
            ended_N.logical_or_(sampled.token_ids == self.tokenizer.eos_id)
            embeds_ND.copy_(self.janus.embed_text(sampled.token_ids))

        def all_ended(done: int) -> bool:
            return done % POLL_STEPS[device.type] == 0 and bool(ended_N.all())

        steps = run_steps(step, longest, device, self.captured, all_ended)
        ids_NL = record.token_ids_NL(steps)
        # Tokens count up to and with the first end token.
        is_end = ids_NL == self.tokenizer.eos_id
        mask_NL = is_end.cumsum(dim=1) - is_end.long() == 0
        width = int(mask_NL.sum(dim=1).max())
        ids = [row[kept].tolist() for row, kept in zip(ids_NL, mask_NL, strict=True)]
        return ids, record.trace(mask_NL[:, :width])

    def _draw_codes(
        self,
        prompt_ids: list[list[int]],
        unconditional: list[list[int]],
        sample_numbers: list[int],
        pause: Callable[[], None],
    ) -> tuple[Tensor, Trace]:
        """Sample the image codes; the unconditional rows follow the conditional ones."""
        guided = self.config.cfg_weight != 1.0
        draws_NI = uniforms(self.config.seed, "image", sample_numbers, self.image_tokens)
        record = Record(draws_NI.to(self.device))
        rows = prompt_ids + unconditional if guided else prompt_ids
        embeds_BD, cache = self._start(rows, room=self.image_tokens)

        def step() -> None:
            hidden_BD = self._decode(embeds_BD, cache)
            logits_BK = self.janus.image_logits(hidden_BD)
            cond, uncond = logits_BK.chunk(2) if guided else (logits_BK, None)
            sampled = self._sample(cond, uncond, record.draws_N())
            record.write(sampled)
            embeds_ND = self.janus.embed_image(sampled.token_ids)
            embeds_BD.copy_(torch.cat([embeds_ND, embeds_ND]) if guided else embeds_ND)

        def look_up(done: int) -> bool:
            if done % PAUSE_STEPS == 0:
                pause()
            return False

        pause()
        steps = run_steps(step, self.image_tokens, self.device, self.captured, look_up)
        codes_NI = record.token_ids_NL(steps)
        return codes_NI, record.trace(torch.ones_like(codes_NI, dtype=torch.bool))

    def _sample(self, cond: Tensor, uncond: Tensor | None, draws_N: Tensor) -> GuidedSample:
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

    def _decode(self, embeds_BD: Tensor, cache: Cache) -> Tensor:
        """Final-norm hidden rows of every sequence's next token, which the cache then holds."""
        if isinstance(cache, SharedKVCache):
            return self.fused.step(embeds_BD, cache)
        hidden_BD = self.janus.decode(embeds_BD, cache.lengths_B, cache.decode())
        cache.advance()
        return hidden_BD

    def _start(self, sequences: list[list[int]], room: int) -> tuple[Tensor, Cache]:
        """Run all but the last token of each sequence. The last tokens' embeddings [B, D], with
        which the first step begins, and the filled cache, with `room` for that many steps."""
        device, dtype = self.device, self.janus.lm_head.weight.dtype
        config, prompts_with = self.janus.config.decoder, self.janus.attn_implementation
        beginnings = [ids[:-1] for ids in sequences]
        if self.static:
            shared = Beginnings.of(beginnings)
            kept = torch.float8_e4m3fn if self.config.kv_cache_dtype == "fp8" else dtype
            cache: Cache = SharedKVCache(config, shared, room, kept, device, prompts_with)
            beginnings = cache.beginnings.prefixes
            attention = cache.prefill()
        else:
            longest = max(map(len, beginnings))
            slots = longest + room
            cache = KVCache(config, len(sequences), slots, dtype, device, prompts_with)
            attention = cache.prefill([len(ids) for ids in beginnings])
        ids_T = torch.tensor([token for ids in beginnings for token in ids], device=device)
        _, positions_T = rows_and_positions([len(ids) for ids in beginnings], device)
        self.janus.decode(self.janus.embed_text(ids_T), positions_T, attention)
        last_B = torch.tensor([ids[-1] for ids in sequences], device=device)
        return self.janus.embed_text(last_B), cache


def empty_trace(samples: int) -> Trace:
    """The trace of no tokens."""
    nothing = TokenStats(*(torch.zeros(samples, 0) for _ in TokenStats._fields))
    return Trace(nothing, nothing, torch.zeros(samples, 0, dtype=torch.bool))
