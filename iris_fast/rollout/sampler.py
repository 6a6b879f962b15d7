"""Prompts -> chain of thought -> image codes, KV-cached and guided, with per-token statistics.

All samples of a call are one batch without padding: every sequence has its own length. A sample's
tokens depend on its own prompt and random numbers; the rest of the batch changes its logits at most
by rounding.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from iris_kernels import TokenStats, backend, uses_triton
from torch import Tensor

from iris_fast.config import SamplingConfig
from iris_fast.models import templates
from iris_fast.models.janus import Janus
from iris_fast.models.tokenizer import JanusTokenizer
from iris_fast.records import Prompt, Rollout, Trace
from iris_fast.rollout.decode_loop import StepBuffer
from iris_fast.rollout.decoding import Decoding
from iris_fast.rollout.fused_decoder import FusedDecoder, fuse_storage
from iris_fast.rollout.random_streams import uniforms

CALLBACK_STEPS = 64  # image steps between two calls of `callback`
# Text steps between two checks of the device's "all ended" flag: a check stalls a GPU.
END_CHECK_STEPS = {"cpu": 1, "cuda": 16}


@dataclass(frozen=True)
class Sampler:
    """A model to sample from and everything that turns prompts into its token sequences."""

    janus: Janus
    tokenizer: JanusTokenizer
    config: SamplingConfig
    image_tokens: int
    greedy: bool = False
    keep_memory: bool = False  # of the static engine: caches and graphs serve the next rollout
    _kept: dict[str, Decoding] = field(default_factory=dict, init=False, repr=False)

    @property
    def device(self) -> torch.device:
        """The model's device."""
        return self.janus.lm_head.weight.device

    @property
    def uses_static_engine(self) -> bool:
        """Whether prefixes are shared and every step runs the same kernels on the same memory."""
        engine = self.config.rollout_engine
        if engine != "auto":
            return engine == "static"
        return self.device.type == "cuda" or backend(self.janus.lm_head.weight) == "cpp"

    @property
    def uses_cuda_graph(self) -> bool:
        """Whether steps are captured, which needs the Triton kernels: the others synchronise."""
        on_gpu = self.device.type == "cuda" and uses_triton(self.janus.lm_head.weight)
        return self.uses_static_engine and on_gpu

    @functools.cached_property
    def instruction(self) -> str:
        """The chain-of-thought instruction, read once: later edits of its file have no effect."""
        return templates.load_instruction(self.config.cot_instruction)

    @functools.cached_property
    def fused(self) -> FusedDecoder:
        """The decoder for single tokens, which shares this model's weights."""
        head = self.janus.model.generation_head
        for layer in (self.janus.lm_head, head.proj_out, head.vision_head):
            fuse_storage([layer.weight], by_input=layer.weight.is_cpu)
        return FusedDecoder(self.janus.model.language_model, self.config.rollout_weight_dtype)

    @torch.no_grad()
    def rollout(
        self,
        prompts: list[Prompt],
        sample_numbers: list[int],
        callback: Callable[[], None] = lambda: None,
    ) -> Rollout:
        """One sample for each entry of `prompts`; `sample_numbers` choose their random streams.

        `callback` is called before the image and every `CALLBACK_STEPS` of its steps, equally often
        on every rank; it may raise to stop the rollout.
        """
        self.fused.refresh()  # weights may have been written since
        template = templates.TEMPLATES[self.config.template]
        texts = [prompt.text for prompt in prompts]
        cot_prompt_ids: list[list[int]] = [[] for _ in prompts]
        cot_ids: list[list[int]] = [[] for _ in prompts]
        cot_texts, truncated = [""] * len(prompts), [False] * len(prompts)
        text_trace = empty_trace(len(prompts))
        if self.config.cot:
            filled = (templates.fill_instruction(self.instruction, text) for text in texts)
            cot_prompt_ids = [self.tokenizer.encode(template.cot_prompt(text)) for text in filled]
            cot_ids, text_trace = self._sample_text(cot_prompt_ids, sample_numbers)
            truncated = [ids[-1] != self.tokenizer.eos_id for ids in cot_ids]
            decoded = (self.tokenizer.decode(ids) for ids in cot_ids)
            cot_texts = [self.tokenizer.strip_special(text).strip() for text in decoded]
            texts = [templates.join_prompt(*pair) for pair in zip(texts, cot_texts, strict=True)]
        prompt_ids = [templates.image_prompt_ids(self.tokenizer, template, text) for text in texts]
        unconditional: list[list[int]] = []
        if self.config.guided:
            unconditional = [templates.unconditional_ids(ids, self.tokenizer) for ids in prompt_ids]
        codes_NI, image_trace = self.sample_image(
            prompt_ids, unconditional, sample_numbers, callback
        )
        return Rollout(
            prompts=prompts,
            sample_numbers=sample_numbers,
            seed=self.config.seed,
            cot_prompt_ids=cot_prompt_ids,
            cot_ids=cot_ids,
            cot_texts=cot_texts,
            truncated=truncated,
            image_prompt_ids=prompt_ids,
            unconditional_prompt_ids=unconditional or [[] for _ in prompts],
            codes_NI=codes_NI,
            text=text_trace,
            image=image_trace,
        )

    def _sample_text(
        self, prompt_ids: list[list[int]], sample_numbers: list[int]
    ) -> tuple[list[list[int]], Trace]:
        """Sample text until every sequence has ended or max_completion_length is reached."""
        end, check_every = self.tokenizer.eos_id, END_CHECK_STEPS[self.device.type]

        def all_ended(ids_NL: Tensor) -> bool:
            return ids_NL.shape[1] % check_every == 0 and bool((ids_NL == end).any(dim=1).all())

        max_steps = self.config.max_completion_length
        ids_NL, buffer = self._sample_tokens(
            "text", prompt_ids, [], sample_numbers, max_steps, all_ended
        )
        # A text includes its first end token and nothing after it.
        is_end = ids_NL == end
        mask_NL = is_end.cumsum(dim=1) - is_end.long() == 0
        width = int(mask_NL.sum(dim=1).max())
        ids = [row[kept].tolist() for row, kept in zip(ids_NL, mask_NL, strict=True)]
        return ids, buffer.trace(mask_NL[:, :width])

    def sample_image(
        self,
        prompt_ids: list[list[int]],
        unconditional: list[list[int]],
        sample_numbers: list[int],
        callback: Callable[[], None],
    ) -> tuple[Tensor, Trace]:
        """Sample the image codes; `unconditional` is empty without guidance."""

        def call_back(ids_NI: Tensor) -> bool:
            if ids_NI.shape[1] % CALLBACK_STEPS == 0:
                callback()
            return False

        callback()
        codes_NI, buffer = self._sample_tokens(
            "image", prompt_ids, unconditional, sample_numbers, self.image_tokens, call_back
        )
        return codes_NI, buffer.trace(torch.ones_like(codes_NI, dtype=torch.bool))

    def _sample_tokens(
        self,
        stream: Literal["text", "image"],
        prompt_ids: list[list[int]],
        unconditional: list[list[int]],
        sample_numbers: list[int],
        max_steps: int,
        should_stop: Callable[[Tensor], bool],
    ) -> tuple[Tensor, StepBuffer]:
        """Sample up to `max_steps` tokens after each prompt: ids [N, steps] on the CPU, statistics.

        `unconditional` holds the rows that guide those of `prompt_ids`, or nothing; both rows of a
        sample receive the same token. `should_stop` is given the tokens [N, steps] so far.
        """
        decoding = self._kept.get(stream) or Decoding(
            self.janus,
            self.fused,
            self.config,
            stream,
            static=self.uses_static_engine,
            use_cuda_graph=self.uses_cuda_graph,
            keep=self.keep_memory,
            greedy=self.greedy,
        )
        if self.keep_memory:
            self._kept[stream] = decoding
        numbers_NL = uniforms(self.config.seed, stream, sample_numbers, max_steps)
        decoding.start(prompt_ids + unconditional, numbers_NL)
        return decoding.run(should_stop), decoding.buffer


def empty_trace(samples: int) -> Trace:
    """The trace of no tokens."""
    nothing = TokenStats(*(torch.zeros(samples, 0) for _ in TokenStats._fields))
    return Trace(nothing, nothing, torch.zeros(samples, 0, dtype=torch.bool))
