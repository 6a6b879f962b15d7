"""The model in its three roles: the trained policy, the sampler's copy, the frozen reference."""

import functools
from dataclasses import dataclass

import torch
from torch.utils.checkpoint import checkpoint as recompute

from iris_fast.config import TrainConfig
from iris_fast.distributed import Ranks
from iris_fast.grpo import lora
from iris_fast.grpo.fsdp import shard
from iris_fast.models.compilation import compile_blocks
from iris_fast.models.janus import Janus
from iris_fast.models.vq import VQModel
from iris_fast.preflight.inputs import Inputs, set_attention
from iris_fast.rollout.sampler import Sampler


@dataclass
class Models:
    """The three copies of the weights, and the model that turns codes into pixels.

    `policy` is trained: float32 master weights, sharded over the ranks. `sampler` samples with an
    unsharded copy, refreshed in place after each step. `reference` is the frozen initial policy
    (None with beta 0): a copy, or with LoRA the policy without its adapters.
    """

    policy: Janus
    reference: Janus | lora.Base | None
    sampler: Sampler
    vq: VQModel


def build_models(
    inputs: Inputs, config: TrainConfig, ranks: Ranks, keep_rollout_memory: bool = False
) -> Models:
    """Make policy, sampler and reference of the opened model, on their devices.

    Its weights are read from where they are, such as files, and become those of the policy: float32
    master weights, or with LoRA, where they are never updated, of the compute dtype.
    """
    opened = inputs.loaded
    dtype = torch.bfloat16 if config.bf16 else torch.float32
    policy, vq = opened.model, opened.vq.to(ranks.device)
    if ranks.device.type == "cpu":
        vq.to(memory_format=torch.channels_last)  # a quarter faster, image by image
    set_attention(policy, config, ranks.device)
    frozen = frozen_copy(policy, dtype, ranks.device)
    sampler = Sampler(
        frozen, opened.tokenizer, config, inputs.image_tokens, keep_memory=keep_rollout_memory
    )
    reference: Janus | lora.Base | None = None
    adapters = lora.Lora.of(config)
    if adapters is not None:
        policy.to(dtype)
        lora.add(policy, adapters)
        reference = lora.Base(policy) if config.beta else None
        place(policy, config, ranks)
    else:
        freeze_generation(policy, config.train_image_head)
        if config.beta:
            reference = alias(policy).requires_grad_(False)
            place(reference, config, ranks, dtype, offload=config.offload_reference)
        place(policy, config, ranks, torch.float32)
    return Models(policy, reference, sampler, vq)


def frozen_copy(model: Janus, dtype: torch.dtype, device: torch.device) -> Janus:
    """The same weights in `dtype` on `device`, without an intermediate float32 copy."""
    with torch.device("meta"):
        copy = Janus(model.config)
    copy.to(dtype).to_empty(device=device)
    copy_weights(model, copy)
    copy.attn_implementation = model.attn_implementation
    return copy.requires_grad_(False)


def alias(model: Janus) -> Janus:
    """Another model with the same tensors."""
    with torch.device("meta"):
        other = Janus(model.config)
    other.load_state_dict(model.state_dict(), assign=True)
    other.attn_implementation = model.attn_implementation
    return other


@torch.no_grad()
def copy_weights(source: torch.nn.Module, target: torch.nn.Module) -> None:
    """Write the parameters of `source`, gathered and with adapters merged, into those of `target`.

    In place: addresses that a CUDA graph or a kernel holds stay valid.
    """
    targets = dict(target.named_parameters())
    for name, value in lora.merged_weights(source):
        targets[name].copy_(value)


def freeze_generation(policy: Janus, train_image_head: bool) -> None:
    """Train the language model and its head; of everything `gen*`, at most the image head."""
    policy.model.generation_embeddings.requires_grad_(False)
    policy.model.generation_aligner.requires_grad_(False)
    policy.model.generation_head.requires_grad_(train_image_head)


def place(
    model: Janus,
    config: TrainConfig,
    ranks: Ranks,
    dtype: torch.dtype | None = None,
    offload: bool = False,
) -> None:
    """Shard a model over the ranks, block by block, so that neither host nor GPU ever holds more
    than its share and a block. The shards are copies of its tensors, in `dtype` if it is given."""
    blocks = model.model.language_model.layers
    if config.torch_compile:  # first: recomputation and sharding wrap a compiled block
        compile_blocks(model.model.language_model)
    if config.gradient_checkpointing and any(p.requires_grad for p in model.parameters()):
        for block in blocks:
            block.forward = functools.partial(recompute, block.forward, use_reentrant=False)
    shard(model, blocks, ranks, config.bf16, offload, dtype)
