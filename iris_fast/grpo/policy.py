"""The model in its three roles: the policy that is trained, the sampler's copy, the reference."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch.utils.checkpoint import checkpoint as recompute

from iris_fast.config import TrainConfig
from iris_fast.distributed import Ranks
from iris_fast.grpo import fsdp
from iris_fast.grpo import lora as adapters
from iris_fast.models.compilation import compile_blocks
from iris_fast.models.janus import Janus
from iris_fast.models.vq import VQModel
from iris_fast.preflight.inputs import Inputs, use_attention
from iris_fast.rollout.sampler import Sampler


@dataclass
class Models:
    """The three copies of the weights, and what turns codes into pixels.

    `policy` is trained: float32 master weights, sharded over the ranks. `sampler` draws with a
    whole copy, refreshed in place after each step. `reference` is the frozen start (beta > 0): a
    copy, or with LoRA the policy without its adapters.
    """

    policy: Janus
    reference: Janus | adapters.Base | None
    sampler: Sampler
    vq: VQModel


def assign(inputs: Inputs, config: TrainConfig, ranks: Ranks) -> Models:
    """The opened model as policy, sampler and reference, on their devices."""
    opened = inputs.checkpoint
    dtype = torch.bfloat16 if config.bf16 else torch.float32
    policy, vq = opened.model, opened.vq.to(ranks.device)
    use_attention(policy, config, ranks.device)
    frozen = frozen_copy(policy, dtype, ranks.device)
    sampler = Sampler(frozen, opened.tokenizer, config, inputs.image_tokens)
    reference: Janus | adapters.Base | None = None
    lora = adapters.Lora.of(config)
    if lora is not None:
        policy.to(dtype)  # never updated, so it needs no float32 master weights
        adapters.add(policy, lora)
        reference = adapters.Base(policy) if config.beta else None
    else:
        freeze(policy, config)
        if config.beta:
            reference = frozen_copy(policy, dtype, torch.device("cpu"))
            place(reference, config, ranks, offload=config.offload_reference)
    place(policy, config, ranks)
    return Models(policy, reference, sampler, vq)


def frozen_copy(model: Janus, dtype: torch.dtype, device: torch.device) -> Janus:
    """The same weights in `dtype` on `device`, without a second copy in float32 on the way."""
    with torch.device("meta"):
        twin = Janus(model.config)
    twin.to(dtype).to_empty(device=device)
    copy_weights(model, twin)
    twin.attn_implementation = model.attn_implementation
    return twin.requires_grad_(False)


@torch.no_grad()
def copy_weights(source: torch.nn.Module, target: torch.nn.Module) -> None:
    """Write `source`'s parameters, gathered and with adapters merged, into `target`'s, in place:
    the addresses that a graph or a kernel holds stay right."""
    targets = dict(target.named_parameters())
    for name, value in adapters.whole_weights(source):
        targets[name].copy_(value)


def freeze(policy: Janus, config: TrainConfig) -> None:
    """Train the language model and its head; everything `gen*` stays, but for train_image_head."""
    policy.model.generation_embeddings.requires_grad_(False)
    policy.model.generation_aligner.requires_grad_(False)
    policy.model.generation_head.requires_grad_(config.train_image_head)


def place(model: Janus, config: TrainConfig, ranks: Ranks, offload: bool = False) -> None:
    """Shard a model over the ranks. From the CPU, block by block: no GPU ever holds all of what it
    will hold a share of."""
    blocks = model.model.language_model.layers
    if config.torch_compile:  # first: recomputation and sharding go around a compiled block
        compile_blocks(model.model.language_model)
    if config.gradient_checkpointing and any(p.requires_grad for p in model.parameters()):
        for block in blocks:
            block.forward = functools.partial(recompute, block.forward, use_reentrant=False)
    fsdp.shard(model, blocks, ranks, config.bf16, offload)
