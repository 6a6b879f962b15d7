"""What a run will need, before anything is loaded: memory per part and GPU, time per step.

Memory is counted from the shapes that the code allocates. Time is a floor: FLOPs at the matrix rate
and bytes at the copy rate of the GPU, nothing lost; a real step takes longer.

Notation: N parameters, D hidden width, I MLP width, b bytes of the compute dtype, W ranks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from iris_fast.config import TrainConfig
from iris_fast.errors import UserError
from iris_fast.models.decoder import DecoderConfig
from iris_fast.models.janus import Janus, JanusConfig

GIB = 2**30
HEAD_BYTES = 64 * 2**20  # what iris_kernels.linear_token_stats holds at the most
# Of both moments of a parameter, scales included; the few that stay float32 are not counted apart.
MOMENT_BYTES = {"adamw_torch": 8, "adamw_torch_bf16": 6, "adamw_torch_8bit": 2 * (1 + 4 / 64)}
FREE_SHARE = 0.92  # of a GPU's memory; the rest is the allocator's slack and CUDA's own


@dataclass(frozen=True)
class Gpu:
    """A GPU's memory (bytes), copy rate (bytes/s) and bf16 matrix rate (FLOP/s)."""

    name: str
    memory_bytes: float
    copy_bytes_per_s: float
    flops_per_s: float


# Rates measured with torch on an H200: a large copy, a matrix product of 8192. What is estimated
# for where there is no GPU to ask; on another GPU its own memory counts, at these rates.
H200 = Gpu("H200", 143771 * 2**20, 4.3e12, 790e12)


@dataclass(frozen=True)
class Estimate:
    """`memory_bytes` per GPU and `seconds` per step, by part. Rollout and training pass do not
    overlap: the larger of the two adds to what is always there."""

    gpu: Gpu
    always_bytes: dict[str, float]
    rollout_bytes: dict[str, float]
    training_bytes: dict[str, float]
    seconds: dict[str, float]

    @property
    def peak_bytes(self) -> float:
        """The most that one GPU holds at a time."""
        phases = (self.rollout_bytes, self.training_bytes)
        return sum(self.always_bytes.values()) + max(sum(phase.values()) for phase in phases)

    @property
    def fits(self) -> bool:
        """Whether the peak leaves the GPU its slack."""
        return self.peak_bytes <= FREE_SHARE * self.gpu.memory_bytes

    def table(self) -> str:
        """The estimate as lines of text."""
        lines = [f"memory per GPU ({self.gpu.name}, {self.gpu.memory_bytes / GIB:.0f} GiB)"]
        for title, parts in (
            ("always", self.always_bytes),
            ("rollout", self.rollout_bytes),
            ("training pass", self.training_bytes),
        ):
            lines += [
                f"  {title:<14} {name:<28} {size / GIB:9.2f} GiB" for name, size in parts.items()
            ]
        lines.append(f"  {'peak':<43} {self.peak_bytes / GIB:9.2f} GiB")
        lines.append("time per step, at the least")
        lines += [f"  {name:<43} {value:9.2f} s" for name, value in self.seconds.items()]
        lines.append(f"  {'whole step':<43} {sum(self.seconds.values()):9.2f} s")
        return "\n".join(lines)


def layer_activation_elements(decoder: DecoderConfig) -> tuple[int, int]:
    """What one token keeps in one block for its backward pass: elements of the compute dtype, and
    of float32 (norms and rotary positions run in float32)."""
    width, heads = decoder.hidden_size, decoder.num_heads * decoder.head_dim
    kv = decoder.num_kv_heads * decoder.head_dim
    # Per norm its result before and after the weight; q, k, v; the context, padded and packed;
    # gate, silu, up and their product.
    compute = 4 * width + 3 * heads + 2 * kv + 4 * decoder.intermediate_size
    single = 2 * width + 2 * decoder.head_dim
    return compute, single


def estimate(
    config: TrainConfig, model: JanusConfig, world_size: int, gpu: Gpu, prompt_tokens: int
) -> Estimate:
    """The estimate for `world_size` GPUs; `prompt_tokens`: of a typical image prompt."""
    with torch.device("meta"):
        shapes = Janus(model)
    total = sum(p.numel() for p in shapes.parameters())
    generation = sum(p.numel() for n, p in shapes.named_parameters() if "generation" in n)
    trained = total - (0 if config.train_image_head else generation)
    item = 2 if config.bf16 else 4
    policy_bytes = 4 * total
    if config.use_peft:
        trained = _adapter_parameters(config, shapes)
        policy_bytes = item * total + 4 * trained
    decoder = model.decoder
    image = config.image_token_num_per_image or model.image_tokens
    text = config.max_completion_length if config.cot else 0
    samples = config.prompts_per_step * config.num_generations
    batch = config.per_device_train_batch_size * config.num_generations
    tokens = prompt_tokens + text + image + (prompt_tokens + text if config.cot else 0)

    if config.policy_distribution == "guided" and config.guided:
        tokens += prompt_tokens + text + image

    rows = samples * (2 if config.guided else 1)
    kv_item = 1 if config.kv_cache_dtype == "fp8" else item
    kv_token = 2 * decoder.num_layers * decoder.num_kv_heads * decoder.head_dim * kv_item
    compute, single = layer_activation_elements(decoder)
    per_layer = compute * item + single * 4
    kept = decoder.hidden_size * item
    per_token = (
        kept * decoder.num_layers + per_layer
        if config.gradient_checkpointing
        else per_layer * decoder.num_layers
    )
    block = sum(p.numel() for p in shapes.model.language_model.layers[0].parameters())
    outside = total - block * decoder.num_layers
    on_gpu = bool(config.beta) and not config.offload_reference and not config.use_peft

    # Unconditional rows share one prefix; on average half of the image is there.
    prompts = samples * (prompt_tokens + text)
    eight_bit = block * decoder.num_layers if config.rollout_weight_dtype == "fp8" else 0
    read = (total - eight_bit) * item + eight_bit
    steps_bytes = read + (prompts + rows * image / 2) * kv_token
    flops = 2 * total * batch * tokens * config.gradient_accumulation_steps
    passes = 3 + config.gradient_checkpointing + bool(config.beta) + (config.num_iterations > 1)
    return Estimate(
        gpu=gpu,
        always_bytes={
            "policy": policy_bytes / world_size,
            f"moments, {config.optim}": _moment_bytes(config) * trained / world_size,
            "reference": item * total / world_size * on_gpu,
            "sampler's copy": item * total + eight_bit,
        },
        rollout_bytes={"KV cache": (prompts + rows * image) * kv_token},
        training_bytes={
            "gradients, float32": 4 * trained / world_size,  # none are kept between two steps
            "activations": batch * tokens * per_token,
            "heads, tile by tile": HEAD_BYTES,
            "gathered weights": (outside + 2 * block) * item,
        },
        seconds={
            "rollout": (image + text) * steps_bytes / gpu.copy_bytes_per_s,
            "training and reference passes": passes * flops / gpu.flops_per_s,
        },
    )


def _moment_bytes(config: TrainConfig) -> float:
    """Per trained parameter. Adapters are too narrow for 8 bits, but for a rank that 64 divides."""
    narrow = config.optim == "adamw_torch_8bit" and config.use_peft and config.lora_r % 64
    return MOMENT_BYTES["adamw_torch" if narrow else config.optim]


def _adapter_parameters(config: TrainConfig, shapes: Janus) -> int:
    """Of A [r, in] and B [out, r] beside every projection that has them."""
    return sum(
        config.lora_r * (layer.in_features + layer.out_features)
        for name, layer in shapes.model.language_model.named_modules()
        if name.rpartition(".")[2] in config.lora_target_modules
    )


def this_gpu(device: torch.device) -> Gpu:
    """The GPU that `device` is, or an H200 where it is none; at the rates of an H200."""
    if device.type != "cuda":
        return H200
    properties = torch.cuda.get_device_properties(device)
    return replace(H200, name=properties.name, memory_bytes=properties.total_memory)


def check_fits(found: Estimate, config: TrainConfig) -> None:
    """UserError, naming what to change, if the peak is more than the GPU holds."""
    if found.fits:
        return
    limit = FREE_SHARE * found.gpu.memory_bytes
    moments, kept = found.always_bytes[f"moments, {config.optim}"], _moment_bytes(config)
    smallest = _moment_bytes(replace(config, optim="adamw_torch_8bit"))
    savings = {
        "add --offload_reference true": found.always_bytes["reference"],
        "add --optim adamw_torch_8bit": moments * max(0.0, 1 - smallest / kept),
    }
    enough = [
        name for name, saved in savings.items() if saved and found.peak_bytes - saved <= limit
    ]
    states = sum(found.always_bytes.values()) + found.training_bytes["gradients, float32"]
    if enough:
        remedy = enough[0]
    elif states - sum(savings.values()) > limit:
        remedy = "use more GPUs: weights and optimizer state alone do not fit"
    elif sum(found.rollout_bytes.values()) > sum(found.training_bytes.values()):
        remedy = "lower --gradient_accumulation_steps or --per_device_train_batch_size"
    elif not config.gradient_checkpointing:
        remedy = (
            "add --gradient_checkpointing true, or lower --per_device_train_batch_size and raise "
            "--gradient_accumulation_steps"
        )
    else:
        remedy = "lower --per_device_train_batch_size and raise --gradient_accumulation_steps"
    raise UserError(
        f"memory: this run needs about {found.peak_bytes / GIB:.0f} GiB per GPU, and a "
        f"{found.gpu.name} has {found.gpu.memory_bytes / GIB:.0f}; {remedy}"
    )
