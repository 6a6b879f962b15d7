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
from torch import Tensor


@dataclass(frozen=True)
class Prompt:
    """One line of a prompt file.

    `text` is what is drawn; `extra` holds the line's other fields, passed on to external rewards.
    """

    text: str
    extra: dict[str, Any] = field(default_factory=dict)


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

    def to(self, device: torch.device) -> PackedBatch:
        """The same batch on `device`."""
        moved = {
            name: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
            for name, value in vars(self).items()
        }
        return PackedBatch(**moved)
