"""FSDP2: sharding a model over the ranks, and reading sharded tensors."""

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor

from iris_fast.distributed import Ranks
from iris_fast.errors import UserError


def shard(
    module: nn.Module,
    blocks: nn.ModuleList,
    ranks: Ranks,
    bf16: bool,
    offload: bool = False,
    dtype: torch.dtype | None = None,
) -> None:
    """Apply FSDP2 in place: one unit per block, and one for the rest of `module`. On a single rank
    that computes in float32 there is nothing to shard or to cast, and the module stays plain.

    Gradient sums are float32; with `bf16` blocks compute in bfloat16. With `offload` the shards
    stay in CPU memory, and a block is on the GPU only while it runs.

    The parameters may be mapped from files. Each unit is copied, to `dtype` if it is given, and cut
    before the next one is, so that besides its shards a rank holds one unit at a time.
    """
    if ranks.world_size == 1 and not bf16 and not offload:
        for parameter in module.parameters():
            to = {"device": ranks.device, "dtype": dtype or parameter.dtype}
            parameter.data = parameter.data.to(**to, copy=True)
        module.to(ranks.device)  # buffers
        return
    pinned = ranks.device.type == "cuda"
    policy = CPUOffloadPolicy(pin_memory=pinned) if offload else OffloadPolicy()
    precision = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if bf16 else torch.float32,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,
    )
    for unit in (*blocks, module):
        for parameter in unit.parameters():
            if not isinstance(parameter, DTensor):
                parameter.data = parameter.data.to(dtype or parameter.dtype, copy=True)
        fully_shard(unit, mesh=ranks.mesh, mp_policy=precision, offload_policy=policy)


def discard_pass(module: nn.Module) -> None:
    """Reset `module` after a pass that an exception interrupted; gradients are dropped.

    UserError where this torch cannot do so (2.13 can; older versions wait for the end of that
    pass).
    """
    if not isinstance(module, FSDPModule):
        module.zero_grad(set_to_none=True)
        return
    if not hasattr(module, "reset_iter_state"):
        raise UserError(
            "per_device_train_batch_size: out of memory in the training pass; to continue with "
            f"smaller micro-batches automatically needs torch 2.13, this is {torch.__version__}: "
            "lower it and raise --gradient_accumulation_steps, or add --gradient_checkpointing "
            "true"
        )
    module.zero_grad(set_to_none=True)  # of the parameters that are gathered now
    module.reset_iter_state()
    module.zero_grad(set_to_none=True)  # of their shards


def full(tensor: Tensor) -> Tensor:
    """The unsharded tensor (a collective), or the tensor itself if it is not sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """This rank's part of the tensor, sharing its memory; the tensor itself if it is not sharded.

    Without a gradient. An operation on parts costs a fifth of the host time of one on sharded
    tensors, which first works out the sharding of its result.
    """
    with torch.no_grad():
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor
