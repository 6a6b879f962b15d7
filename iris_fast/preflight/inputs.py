"""Prompts and model: opened, and checked against each other before a command starts."""

from dataclasses import dataclass, field

import torch

from iris_fast.config import FP8_SETTINGS, SamplingConfig, TrainConfig
from iris_fast.errors import UserError
from iris_fast.models import templates
from iris_fast.models.attention import resolve_implementation
from iris_fast.models.decoder import DecoderConfig
from iris_fast.models.images import check_image_tokens
from iris_fast.models.janus import Janus
from iris_fast.models.pretrained.load import LoadedJanus, load_janus
from iris_fast.prompts import check_against, read_prompts
from iris_fast.records import Prompt
from iris_fast.rollout.fused_decoder import FP8_MULTIPLE
from iris_fast.tiny import HELD_OUT_FILE, PROMPTS_FILE, build_tiny

FP8_CAPABILITY = (8, 9)  # older GPUs cannot convert e4m3
SCALED_PRODUCT_ON_CPU = (2, 13)  # the first torch whose CPU products take one scale per row


@dataclass(frozen=True)
class Inputs:
    """Model and prompts, checked: every prompt fits the model. `held_out` is for evaluations, and
    empty without them."""

    loaded: LoadedJanus
    prompts: list[Prompt]
    image_tokens: int
    held_out: list[Prompt] = field(default_factory=list)


def open_model(name: str, dtype: torch.dtype | None) -> LoadedJanus:
    """`tiny`, a model folder, or a hub id, as `load_janus`; UserError if it cannot be opened."""
    return build_tiny(dtype=dtype) if name == "tiny" else load_janus(name, dtype)


def resolve_attention(
    config: SamplingConfig, device: torch.device, head_dim: int | None = None
) -> str:
    """The attention that `attn_implementation` means on this device; UserError if it cannot work.
    Without `head_dim` only what does not depend on the model is checked."""
    dtype = torch.bfloat16 if config.bf16 else torch.float32
    return resolve_implementation(config.attn_implementation, device, dtype, head_dim)


def set_attention(model: Janus, config: SamplingConfig, device: torch.device) -> None:
    """Set the model's attention as configured; UserError as for `resolve_attention`."""
    head_dim = model.config.decoder.head_dim
    model.attn_implementation = resolve_attention(config, device, head_dim)


def check_device(config: SamplingConfig, device: torch.device) -> None:
    """UserError, before anything is loaded, for what this device does not support."""
    resolve_attention(config, device)
    for name in FP8_SETTINGS:
        if getattr(config, name) == "fp8" and device.type == "cuda":
            major, minor = torch.cuda.get_device_capability(device)
            if (major, minor) < FP8_CAPABILITY:
                raise UserError(
                    f"{name}: fp8 needs a GPU of compute capability 8.9 or later, this one has "
                    f"{major}.{minor}; use --{name} auto"
                )
    if config.rollout_weight_dtype == "fp8":
        if device.type == "cuda" and not config.bf16:
            raise UserError("rollout_weight_dtype: fp8 needs bf16 on a GPU; add --bf16 true")
        if device.type == "cpu" and torch.__version__ < SCALED_PRODUCT_ON_CPU:
            raise UserError(
                "rollout_weight_dtype: fp8 on a CPU needs torch 2.13, this is "
                f"{torch.__version__}; use auto"
            )


def open_inputs(config: SamplingConfig, dtype: torch.dtype | None) -> Inputs:
    """Read the prompts, open the model and check them against each other, the fastest first.
    `dtype` as for `load_janus`."""
    sources = {"prompts": config.prompts or str(PROMPTS_FILE)}
    if isinstance(config, TrainConfig) and config.evaluates:
        sources["eval_prompts"] = config.eval_prompts or str(HELD_OUT_FILE)
    prompts = {setting: read_prompts(source, setting) for setting, source in sources.items()}
    instruction = templates.load_instruction(config.cot_instruction) if config.cot else ""
    loaded = open_model(config.model, dtype)
    tokens = check_image_tokens(config.image_token_num_per_image, loaded.config.image_tokens)
    for setting, source in sources.items():
        longest = check_against(
            loaded.tokenizer, prompts[setting], config.max_prompt_length, f"{setting}: {source}"
        )
        check_positions(config, loaded, longest.text, instruction, tokens)
    if config.rollout_weight_dtype == "fp8":
        check_fp8_sizes(loaded.config.decoder)
    return Inputs(loaded, prompts["prompts"], tokens, prompts.get("eval_prompts", []))


def check_fp8_sizes(decoder: DecoderConfig) -> None:
    """UserError for sizes that fp8 matrix products do not support."""
    sizes = {
        "hidden_size": decoder.hidden_size,
        "intermediate_size": decoder.intermediate_size,
        "num_heads * head_dim": decoder.num_heads * decoder.head_dim,
        "num_kv_heads * head_dim": decoder.num_kv_heads * decoder.head_dim,
    }
    for name, size in sizes.items():
        if size % FP8_MULTIPLE:
            raise UserError(
                f"rollout_weight_dtype: fp8 needs multiples of {FP8_MULTIPLE}, and this model's "
                f"{name} is {size}; use auto"
            )


def check_positions(
    config: SamplingConfig, loaded: LoadedJanus, prompt: str, instruction: str, image_tokens: int
) -> None:
    """UserError if the longest sequence that `prompt` can lead to has more tokens than the model's
    `max_positions`: it would be sampled at positions that the model was not trained on."""
    template, tokenizer = templates.TEMPLATES[config.template], loaded.tokenizer
    cot_tokens = config.max_completion_length if config.cot else 0
    image_prompt = templates.image_prompt_ids(tokenizer, template, prompt)
    needed = len(image_prompt) + cot_tokens + image_tokens
    if config.cot:
        filled = templates.fill_instruction(instruction, prompt)
        cot_prompt = tokenizer.encode(template.cot_prompt(filled))
        needed = max(needed, len(cot_prompt) + cot_tokens)
    available = loaded.config.decoder.max_positions
    if needed > available:
        cot = f"a chain of thought of {cot_tokens}, " if config.cot else ""
        remedy = "lower --max_completion_length or " if config.cot else ""
        raise UserError(
            f"max_prompt_length: with its template, {cot}and {image_tokens} image tokens, the "
            f"longest prompt ({prompt[:40]!r}) needs up to {needed} positions, and {config.model} "
            f"has {available}; {remedy}shorten the prompt"
        )
