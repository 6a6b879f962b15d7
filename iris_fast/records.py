"""The records that pass between the stages, in the order in which they arise.

    Prompt -> Rollout -> Scored -> PackedBatch (one per micro-batch)

Shape legend, used all over `iris_fast`:
    P prompts        G images per prompt        N = P * G samples, prompt-major
    L text tokens of the longest chain of thought        I image tokens per image
    T token rows of a packed batch        D hidden width        V text vocabulary        K codebook
A sample's global number is `prompt_number * G + g`; its random numbers depend on that number and
the seed alone, so neither the batch nor the rank a sample lands in changes it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from iris_kernels import TokenStats
from torch import Tensor


@dataclass(frozen=True)
class Prompt:
    """One line of a prompt file.

    `text` is what is drawn; `extra` holds the line's other fields, passed on to external rewards.
    """

    text: str
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Guidance:
    """A distribution of tokens: image logits uncond + cfg_weight * (cond - uncond), and text
    logits, over the temperature. By default the prompt's own."""

    cfg_weight: float = 1.0
    temperature: float = 1.0


CONDITIONAL = Guidance()


@dataclass(frozen=True)
class PackedBatch:
    """Token sequences laid end to end, without padding, and the rows whose heads are needed.

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
    unconditional_rows: Tensor  # int64, the row that guides each of `image_rows`; or none at all
    guidance: Guidance = CONDITIONAL  # the distributions that the statistics are of

    def to(self, device: torch.device) -> PackedBatch:
        """The same batch on `device`."""
        moved = {
            name: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
            for name, value in vars(self).items()
        }
        return PackedBatch(**moved)


@dataclass(frozen=True)
class Trace:
    """Per-token statistics of what was sampled, as the sampling op gave them; 0 where no token is.

    `conditional` is the prompt's own distribution at temperature 1, `guided` the one sampled from
    (cond and uncond mixed, at the temperature, before top-k, top-p and min-p). Without guidance, as
    in the text, the two differ by the temperature alone. Each field [N, L] float32, on the CPU.
    """

    conditional: TokenStats
    guided: TokenStats
    mask: Tensor  # [N, L] bool

    def take(self, samples: list[int]) -> Trace:
        """The rows of these samples."""
        return Trace(
            conditional=TokenStats(*(field[samples] for field in self.conditional)),
            guided=TokenStats(*(field[samples] for field in self.guided)),
            mask=self.mask[samples],
        )


@dataclass(frozen=True)
class Rollout:
    """What was drawn for N samples, prompt-major, on the CPU.

    Example: 2 prompts, G = 2, give N = 4 with `prompts` = [a, a, b, b]. Without a chain of thought
    `cot_prompt_ids` and `cot_ids` hold empty lists and `text` has L = 0 columns.
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

    def take(self, samples: list[int]) -> Rollout:
        """The part of these samples, by their place in this rollout."""
        parts = {}
        for name, value in vars(self).items():
            if isinstance(value, list):
                parts[name] = [value[sample] for sample in samples]
            elif isinstance(value, Trace):
                parts[name] = value.take(samples)
            elif isinstance(value, Tensor):
                parts[name] = value[samples]
            else:
                parts[name] = value
        return Rollout(**parts)


@dataclass(frozen=True)
class Scored:
    """A rollout with its rewards and advantages, [N] float32 each, on the CPU."""

    rollout: Rollout
    reward_terms: dict[str, Tensor]  # name -> [N], before the weight
    reward_N: Tensor
    advantage_N: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)  # name -> [N], of `metric_funcs`
