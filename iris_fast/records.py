"""The records that pass between the stages, in the order in which they are made.

    Prompt -> Rollout -> Rewards -> Scored -> PackedBatch (one per micro-batch)

Shape legend, used throughout `iris_fast`:
    P prompts        G images per prompt        N = P * G samples, prompt-major
    L text tokens of the longest chain of thought        I image tokens per image
    M trained tokens of a micro-batch: all text tokens, then all image tokens
    T token rows of a packed batch        D hidden width        V text vocabulary        K codebook
The global number of a sample is `prompt_number * G + g`. Its random numbers depend only on that
number and the seed, so neither the batch nor the rank that a sample is placed in changes it.
"""

from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from iris_kernels import TokenStats
from torch import Tensor


@dataclass(frozen=True)
class Prompt:
    """One line of a prompt file: its text, and its other fields, which external rewards receive."""

    text: str
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Guidance:
    """A distribution of tokens: image logits uncond + cfg_weight * (cond - uncond), and text
    logits, divided by the temperature. The default is the conditional distribution."""

    cfg_weight: float = 1.0
    temperature: float = 1.0


CONDITIONAL = Guidance()


@dataclass(frozen=True)
class PackedBatch:
    """Token sequences laid end to end, without padding, and the rows that the heads project.

    Example: a text sequence of 5 tokens (3 of prompt, 2 of CoT) and an image sequence of 7 (4 of
    prompt, 3 codes) give T = 12, `sequence_lengths` = [5, 7], `text_rows` = [2, 3],
    `image_rows` = [8, 9, 10]: the row *before* a token predicts it.
    """

    token_ids_T: Tensor  # int64: a text id, or a codebook index where `is_image_T`
    is_image_T: Tensor  # bool
    positions_T: Tensor  # int64, counted from 0 in every sequence
    sequence_lengths: list[int]
    text_rows: Tensor  # int64 rows of T whose next token is a CoT token
    text_targets: Tensor  # int64, that token
    image_rows: Tensor
    image_targets: Tensor
    unconditional_rows: Tensor  # int64, the row that guides each of `image_rows`; or empty
    guidance: Guidance = CONDITIONAL  # the distributions that the statistics describe

    def to(self, device: torch.device) -> Self:
        """Return the same batch on `device`."""

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=True)

        return replace(
            self,
            token_ids_T=move(self.token_ids_T),
            is_image_T=move(self.is_image_T),
            positions_T=move(self.positions_T),
            text_rows=move(self.text_rows),
            text_targets=move(self.text_targets),
            image_rows=move(self.image_rows),
            image_targets=move(self.image_targets),
            unconditional_rows=move(self.unconditional_rows),
        )


@dataclass(frozen=True)
class Trace:
    """Per-token statistics of the sampled tokens, as the sampling op gave them; 0 outside the mask.

    `conditional` describes the conditional distribution at temperature 1, `guided` the one that was
    sampled from (cond and uncond mixed, at the temperature, before top-k, top-p and min-p). Without
    guidance, as for text, they differ by the temperature only. Each field is [N, L] float32, on the
    CPU.
    """

    conditional: TokenStats
    guided: TokenStats
    mask: Tensor  # [N, L] bool

    def take(self, samples: list[int]) -> Self:
        """Return the rows of these samples."""
        return Trace(
            conditional=TokenStats(*(field[samples] for field in self.conditional)),
            guided=TokenStats(*(field[samples] for field in self.guided)),
            mask=self.mask[samples],
        )


@dataclass(frozen=True)
class Rollout:
    """What was sampled for N samples, prompt-major, on the CPU.

    Example: 2 prompts with G = 2 give N = 4 with `prompts` = [a, a, b, b]. Without a chain of
    thought `cot_prompt_ids` and `cot_ids` hold empty lists and `text` has L = 0 columns.
    """

    prompts: list[Prompt]
    sample_numbers: list[int]  # global, see the legend
    seed: int
    cot_prompt_ids: list[list[int]]
    cot_ids: list[list[int]]  # with the end token, unless cut at max_completion_length
    cot_texts: list[str]
    truncated: list[bool]  # the chain of thought was cut
    image_prompt_ids: list[list[int]]
    unconditional_prompt_ids: list[list[int]]  # empty lists without guidance
    codes_NI: Tensor  # int64
    text: Trace
    image: Trace

    def take(self, samples: list[int]) -> Self:
        """Return the part of these samples, given by their index in this rollout."""

        def pick(values: list) -> list:
            return [values[sample] for sample in samples]

        return Rollout(
            prompts=pick(self.prompts),
            sample_numbers=pick(self.sample_numbers),
            seed=self.seed,
            cot_prompt_ids=pick(self.cot_prompt_ids),
            cot_ids=pick(self.cot_ids),
            cot_texts=pick(self.cot_texts),
            truncated=pick(self.truncated),
            image_prompt_ids=pick(self.image_prompt_ids),
            unconditional_prompt_ids=pick(self.unconditional_prompt_ids),
            codes_NI=self.codes_NI[samples],
            text=self.text.take(samples),
            image=self.image.take(samples),
        )


@dataclass(frozen=True)
class Rewards:
    """What the rewards and metrics gave for each sample of a rollout, [N] float32, on the CPU."""

    terms: dict[str, Tensor]  # name -> [N], before the weight
    total_N: Tensor  # the weighted sum of the terms
    metrics: dict[str, Tensor]  # name -> [N], of `metric_funcs`: logged, not trained on


@dataclass(frozen=True)
class Scored:
    """A rollout with its rewards and advantages, [N] float32 each, on the CPU."""

    rollout: Rollout
    reward_terms: dict[str, Tensor]  # name -> [N], before the weight
    reward_N: Tensor
    advantage_N: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)  # name -> [N], of `metric_funcs`

    @classmethod
    def of(cls, rollout: Rollout, rewards: Rewards, advantage_N: Tensor) -> Self:
        """Join what the stages before the update gave."""
        return cls(rollout, rewards.terms, rewards.total_N, advantage_N, rewards.metrics)
