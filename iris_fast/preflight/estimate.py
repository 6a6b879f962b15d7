"""Estimate of a run before anything is loaded: memory per part and GPU, disk, time per step.

Memory is computed from the shapes that the code allocates. Time is a lower bound: FLOPs at the
GPU's matrix rate and bytes at its copy rate, without any overhead.

`item` is the size of the compute dtype in bytes, `world_size` the number of GPUs.
"""

import math
from dataclasses import dataclass, replace

import torch

from iris_fast.config import TrainConfig
from iris_fast.errors import UserError
from iris_fast.models.decoder import DecoderConfig
from iris_fast.models.janus import Janus, JanusConfig

GIB = 2**30
HEAD_BYTES = 64 * 2**20  # upper limit of what iris_kernels.linear_token_stats allocates
# Both moments per parameter, with scales; the few parameters that keep float32 moments are ignored.
MOMENT_BYTES = {"adamw_torch": 8, "adamw_torch_bf16": 6, "adamw_torch_8bit": 2 * (1 + 4 / 64)}
USABLE_SHARE = 0.92  # of a GPU's memory; the rest is for the allocator and CUDA itself


@dataclass(frozen=True)
class Gpu:
    """A GPU's memory (bytes), copy rate (bytes/s) and bf16 matrix rate (FLOP/s)."""

    name: str
    memory_bytes: float
    copy_bytes_per_s: float
    flops_per_s: float


# Rates measured with torch on an H200: a large copy, a matrix product of size 8192. They are also
# used for other GPUs, with the memory of that GPU.
H200 = Gpu("H200", 143771 * 2**20, 4.3e12, 790e12)


@dataclass(frozen=True)
class Estimate:
    """Memory per GPU and time per step, by part. Rollout and training pass do not overlap: the
    larger of the two adds to what is always allocated."""

    gpu: Gpu
    always_bytes: dict[str, float]
    rollout_bytes: dict[str, float]
    training_bytes: dict[str, float]
    seconds: dict[str, float]
    checkpoint_bytes: float  # on disk, of all ranks together
    evaluation_s: float  # of the held-out prompts, once; 0 without them

    @property
    def peak_bytes(self) -> float:
        """Peak memory of one GPU."""
        phases = (self.rollout_bytes, self.training_bytes)
        return sum(self.always_bytes.values()) + max(sum(phase.values()) for phase in phases)

    @property
    def caches_fit_during_training(self) -> bool:
        """Whether the rollout's caches can stay allocated during the training pass."""
        both = sum(self.rollout_bytes.values()) + sum(self.training_bytes.values())
        most = USABLE_SHARE * self.gpu.memory_bytes
        return sum(self.always_bytes.values()) + both <= most

    def table(self) -> str:
        """The estimate as lines of text."""
        phases = {
            "always": self.always_bytes,
            "rollout": self.rollout_bytes,
            "training pass": self.training_bytes,
        }
        lines = [f"memory per GPU ({self.gpu.name}, {self.gpu.memory_bytes / GIB:.0f} GiB)"]
        for title, parts in phases.items():
            for name, size in parts.items():
                lines.append(f"  {title:<14} {name:<28} {size / GIB:9.2f} GiB")
        lines.append(f"  {'peak':<43} {self.peak_bytes / GIB:9.2f} GiB")
        lines.append(f"  {'one checkpoint on disk':<43} {self.checkpoint_bytes / GIB:9.2f} GiB")
        lines.append("time per step, at least")
        for name, value in (self.seconds | {"whole step": sum(self.seconds.values())}).items():
            lines.append(f"  {name:<43} {value:9.2f} s")
        if self.evaluation_s:
            title = "time per evaluation of held-out prompts, at least"
            lines.append(f"{title:<45} {self.evaluation_s:>9.2f} s")
        return "\n".join(lines)


def layer_activation_elements(decoder: DecoderConfig, fused: bool = True) -> tuple[int, int]:
    """Elements that one block keeps per token for its backward pass: of the compute dtype, and of
    float32. `fused`: with the kernels that run on a GPU; otherwise with the modules, which compute
    norms and rotary embeddings in float32 (with `torch_compile`, an upper limit)."""
    width, heads = decoder.hidden_size, decoder.num_heads * decoder.head_dim
    kv, inner = decoder.num_kv_heads * decoder.head_dim, decoder.intermediate_size
    if fused:
        # Two norms and their inputs; q, k, v, the context and its normalizers; gate, up and their
        # product. The rotary tables are the same for all blocks.
        return 4 * width + 2 * heads + 2 * kv + 3 * inner, decoder.num_heads
    # Two norms, each before and after its weight; q, k, v; the context, padded and packed; gate,
    # silu, up and their product.
    compute = 4 * width + 3 * heads + 2 * kv + 4 * inner
    single = 2 * width + 2 * decoder.head_dim
    return compute, single


def estimate(
    config: TrainConfig,
    model: JanusConfig,
    world_size: int,
    gpu: Gpu,
    prompt_tokens: int,
    held_out: int = 0,
) -> Estimate:
    """The estimate for `world_size` GPUs; `prompt_tokens` is the length of a typical image prompt,
    with its template, `held_out` the number of prompts of an evaluation."""
    with torch.device("meta"):
        shapes = Janus(model)
    decoder = model.decoder
    total = sum(p.numel() for p in shapes.parameters())
    generation = sum(p.numel() for n, p in shapes.named_parameters() if "generation" in n)
    block = sum(p.numel() for p in shapes.model.language_model.layers[0].parameters())
    blocks = block * decoder.num_layers
    item = 2 if config.bf16 else 4

    trained = total - (0 if config.train_image_head else generation)
    policy_bytes = 4 * total
    if config.use_peft:
        trained = _adapter_parameters(config, shapes)
        policy_bytes = item * total + 4 * trained
    has_reference = bool(config.beta) and not config.offload_reference and not config.use_peft

    image = config.image_token_num_per_image or model.image_tokens
    text = config.max_completion_length if config.cot else 0
    samples = config.samples_per_step
    batch = config.per_device_train_batch_size * config.num_generations
    tokens = prompt_tokens + text + image + (prompt_tokens + text if config.cot else 0)
    if config.policy_distribution == "guided" and config.guided:
        tokens += prompt_tokens + text + image

    compute, single = layer_activation_elements(decoder, fused=not config.torch_compile)
    layer_bytes = compute * item + single * 4
    token_bytes = layer_bytes * decoder.num_layers
    if config.gradient_checkpointing:
        token_bytes = decoder.hidden_size * item * decoder.num_layers + layer_bytes

    # Unconditional rows share one prefix. A decoding step reads half of the image on average.
    kv_item = 1 if config.kv_cache_dtype == "fp8" else item
    kv_token_bytes = 2 * decoder.num_layers * decoder.num_kv_heads * decoder.head_dim * kv_item
    rows = samples * (2 if config.guided else 1)
    prompts = samples * (prompt_tokens + text)
    fp8_bytes = blocks if config.rollout_weight_dtype == "fp8" else 0
    read_bytes = (total - fp8_bytes) * item + fp8_bytes
    step_bytes = read_bytes + (prompts + rows * image / 2) * kv_token_bytes
    rollout_s = (image + text) * step_bytes / gpu.copy_bytes_per_s
    # An evaluation samples its share in batches of a rollout's size.
    evaluated = math.ceil(held_out / world_size) * config.num_generations_eval

    saved = 4 * (trained if config.use_peft else total) + _moment_bytes(config) * trained
    flops = 2 * total * batch * tokens * config.gradient_accumulation_steps
    passes = 3 + config.gradient_checkpointing + bool(config.beta) + (config.num_iterations > 1)
    return Estimate(
        gpu=gpu,
        always_bytes={
            "policy": policy_bytes / world_size,
            f"moments, {config.optim}": _moment_bytes(config) * trained / world_size,
            "reference": item * total / world_size * has_reference,
            "sampler's copy": item * total + fp8_bytes,
        },
        rollout_bytes={"KV cache": (prompts + rows * image) * kv_token_bytes},
        training_bytes={
            "gradients, float32": 4 * trained / world_size,  # freed between two steps
            "activations": batch * tokens * token_bytes,
            "heads, tile by tile": HEAD_BYTES,
            "gathered weights": (total - blocks + 2 * block) * item,
        },
        seconds={
            "rollout": rollout_s,
            "training and reference passes": passes * flops / gpu.flops_per_s,
        },
        checkpoint_bytes=saved,
        evaluation_s=math.ceil(evaluated / samples) * rollout_s,
    )


def _moment_bytes(config: TrainConfig) -> float:
    """Per trained parameter. torchao keeps the moments of LoRA's matrices in float32 unless 64
    divides their rank."""
    narrow = config.optim == "adamw_torch_8bit" and config.use_peft and config.lora_r % 64
    return MOMENT_BYTES["adamw_torch" if narrow else config.optim]


def _adapter_parameters(config: TrainConfig, shapes: Janus) -> int:
    """A [r, in] and B [out, r] of every projection that has adapters."""
    return sum(
        config.lora_r * (layer.in_features + layer.out_features)
        for name, layer in shapes.model.language_model.named_modules()
        if name.rpartition(".")[2] in config.lora_target_modules
    )


def this_gpu(device: torch.device) -> Gpu:
    """The GPU of `device`, with the rates of an H200; an H200 if `device` is not a GPU."""
    if device.type != "cuda":
        return H200
    properties = torch.cuda.get_device_properties(device)
    return replace(H200, name=properties.name, memory_bytes=properties.total_memory)


def check_fits(needs: Estimate, config: TrainConfig) -> None:
    """UserError, with the setting to change, if the peak is more than the GPU's usable memory."""
    limit = USABLE_SHARE * needs.gpu.memory_bytes
    if needs.peak_bytes <= limit:
        return
    moments = needs.always_bytes[f"moments, {config.optim}"]
    smallest = _moment_bytes(replace(config, optim="adamw_torch_8bit"))
    savings = {
        "add --offload_reference true": needs.always_bytes["reference"],
        "add --optim adamw_torch_8bit": moments * max(0.0, 1 - smallest / _moment_bytes(config)),
    }
    enough = [
        name for name, saved in savings.items() if saved and needs.peak_bytes - saved <= limit
    ]
    states = sum(needs.always_bytes.values()) + needs.training_bytes["gradients, float32"]
    if enough:
        remedy = enough[0]
    elif states - sum(savings.values()) > limit:
        remedy = "use more GPUs: weights and optimizer state alone do not fit"
    elif sum(needs.rollout_bytes.values()) > sum(needs.training_bytes.values()):
        remedy = "lower --gradient_accumulation_steps or --per_device_train_batch_size"
    else:
        remedy = "lower --per_device_train_batch_size and raise --gradient_accumulation_steps"
        if not config.gradient_checkpointing:
            remedy = f"add --gradient_checkpointing true, or {remedy}"
    raise UserError(
        f"memory: this run needs about {needs.peak_bytes / GIB:.0f} GiB per GPU, and a "
        f"{needs.gpu.name} has {needs.gpu.memory_bytes / GIB:.0f}; {remedy}"
    )
