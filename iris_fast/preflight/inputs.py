"""What a command starts from: prompts and model, opened and checked against each other."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from iris_fast.config import FP8_SETTINGS, SamplingConfig
from iris_fast.errors import UserError, require
from iris_fast.models.attention import resolve_implementation
from iris_fast.models.images import check_image_tokens
from iris_fast.models.janus import Janus
from iris_fast.models.pretrained.load import LoadedJanus, load_janus
from iris_fast.models.templates import (
    TEMPLATES,
    fill_instruction,
    image_prompt_ids,
    load_instruction,
)
from iris_fast.prompts import check_against, read_prompts
from iris_fast.records import Prompt
from iris_fast.tiny import PROMPTS_FILE, build_tiny

FP8_CAPABILITY = (8, 9)  # older GPUs cannot convert e4m3
PRODUCT_SIZES = 16  # torch's scaled products take multiples
SCALED_PRODUCT_ON_CPU = (2, 13)  # the first torch that multiplies by row scales there


@dataclass(frozen=True)
class Inputs:
    """A checked start: every prompt fits the model."""

    checkpoint: LoadedJanus
    prompts: list[Prompt]
    image_tokens: int


def open_model(name: str, dtype: torch.dtype) -> LoadedJanus:
    """`tiny`, a checkpoint folder, or a hub id; UserError if it cannot be opened."""
    return build_tiny(dtype=dtype) if name == "tiny" else load_janus(name, dtype)


def resolve_attention(
    config: SamplingConfig, device: torch.device, head_dim: int | None = None
) -> str:
    """What `attn_implementation` means on this device in the precision that is computed in. Without
    `head_dim` before anything is loaded: UserError for what no model would change."""
    dtype = torch.bfloat16 if config.bf16 else torch.float32
    return resolve_implementation(config.attn_implementation, device, dtype, head_dim)


def set_attention(model: Janus, config: SamplingConfig, device: torch.device) -> None:
    """Set the model's attention to what the settings mean on this device; UserError if that cannot
    work."""
    head_dim = model.config.decoder.head_dim
    model.attn_implementation = resolve_attention(config, device, head_dim)


def check_device(config: SamplingConfig, device: torch.device) -> None:
    """UserError, before anything is loaded, for what this device cannot do."""
    resolve_attention(config, device)
    for name in FP8_SETTINGS:
        if getattr(config, name) == "fp8" and device.type == "cuda":
            found = torch.cuda.get_device_capability(device)
            remedy = (
                "it needs a GPU of compute capability 8.9 or later, this one has "
                f"{found[0]}.{found[1]}: use --{name} auto"
            )
            require(found >= FP8_CAPABILITY, name, "fp8", remedy)
    if config.rollout_weight_dtype == "fp8":
        if device.type == "cuda" and not config.bf16:
            raise UserError(
                "rollout_weight_dtype: fp8 multiplies in bfloat16 on a GPU; add --bf16 true"
            )
        if device.type == "cpu" and torch.__version__ < SCALED_PRODUCT_ON_CPU:
            raise UserError(
                "rollout_weight_dtype: fp8 on a CPU needs torch 2.13, this is "
                f"{torch.__version__}; use auto"
            )


def open_inputs(config: SamplingConfig, dtype: torch.dtype) -> Inputs:
    """Read the prompts (first: they are the cheaper error), open the model, check both."""
    source = config.prompts or str(PROMPTS_FILE)
    prompts = read_prompts(source)
    # An error in it is told before anything is made.
    instruction = load_instruction(config.cot_instruction) if config.cot else ""
    checkpoint = open_model(config.model, dtype)
    longest = check_against(checkpoint.tokenizer, prompts, config.max_prompt_length, source)
    tokens = check_image_tokens(config.image_token_num_per_image, checkpoint.config.image_tokens)
    check_positions(config, checkpoint, longest.text, instruction, tokens)
    if config.rollout_weight_dtype == "fp8":
        check_products(checkpoint)
    return Inputs(checkpoint, prompts, tokens)


def check_products(checkpoint: LoadedJanus) -> None:
    """UserError for sizes that products in 8 bits do not take."""
    sizes = checkpoint.config.decoder
    inputs_and_outputs = {
        "hidden_size": sizes.hidden_size,
        "intermediate_size": sizes.intermediate_size,
        "heads times their width": sizes.num_heads * sizes.head_dim,
        "key/value heads times their width": sizes.num_kv_heads * sizes.head_dim,
    }
    for name, size in inputs_and_outputs.items():
        if size % PRODUCT_SIZES:
            raise UserError(
                f"rollout_weight_dtype: fp8 takes sizes that {PRODUCT_SIZES} divides, and this "
                f"model's {name} is {size}; use auto"
            )


def check_positions(
    config: SamplingConfig,
    checkpoint: LoadedJanus,
    prompt: str,
    instruction: str,
    image_tokens: int,
) -> None:
    """Raise UserError if the longest sequence that `prompt` can lead to is longer than the model's
    `max_positions`: it would be drawn, but from positions that the model never saw."""
    template, tokenizer = TEMPLATES[config.template], checkpoint.tokenizer
    cot_tokens = config.max_completion_length if config.cot else 0
    needed = len(image_prompt_ids(tokenizer, template, prompt)) + cot_tokens + image_tokens
    if config.cot:
        asked = tokenizer.encode(template.cot_prompt(fill_instruction(instruction, prompt)))
        needed = max(needed, len(asked) + cot_tokens)
    room = checkpoint.config.decoder.max_positions
    if needed > room:
        cot = f"a chain of thought of {cot_tokens}, " if config.cot else ""
        remedy = "lower --max_completion_length or " if config.cot else ""
        raise UserError(
            f"max_prompt_length: with its template, {cot}and {image_tokens} image tokens, the "
            f"longest prompt ({prompt[:40]!r}) takes up to {needed} positions, and {config.model} "
            f"has {room}; {remedy}shorten the prompt"
        )
