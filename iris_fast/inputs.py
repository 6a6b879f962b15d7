"""What a command starts from: prompts and model, opened and checked against each other."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from iris_fast.batch import Prompt
from iris_fast.config import SamplingConfig
from iris_fast.models.layouts import JanusCheckpoint, load_janus
from iris_fast.models.templates import load_instruction
from iris_fast.pictures import check_image_tokens
from iris_fast.prompts import check_against, read_prompts
from iris_fast.tiny import PROMPTS_FILE, build_tiny


@dataclass(frozen=True)
class Inputs:
    """A checked start: every prompt fits the model."""

    checkpoint: JanusCheckpoint
    prompts: list[Prompt]
    image_tokens: int


def open_model(name: str, dtype: torch.dtype) -> JanusCheckpoint:
    """`tiny`, a checkpoint folder, or a hub id; UserError if it cannot be opened."""
    return build_tiny(dtype=dtype) if name == "tiny" else load_janus(name, dtype)


def open_inputs(config: SamplingConfig, dtype: torch.dtype) -> Inputs:
    """Read the prompts (first: they are the cheaper mistake), open the model, check both."""
    source = config.prompts or str(PROMPTS_FILE)
    prompts = read_prompts(source)
    if config.cot:
        load_instruction(config.cot_instruction)  # a mistake in it is told before anything is made
    checkpoint = open_model(config.model, dtype)
    check_against(checkpoint.tokenizer, prompts, config.max_prompt_length, source)
    tokens = check_image_tokens(config.image_token_num_per_image, checkpoint.config.image_tokens)
    return Inputs(checkpoint, prompts, tokens)
