"""AdamW over the trained parameters with moments of 32, 16 or 8 bits, its schedule; clipping."""

import math
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from iris_fast.config import TrainConfig
from iris_fast.errors import optional_import, require
from iris_fast.grpo.fsdp import local

LEAST_ROWS = 128
BLOCK = 64  # values that share a scale: divides the rows of all Janus models, the tiny one's too


def make_optimizer(policy: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW over the trained parameters; `config.optim` selects the dtype of its moments:

        adamw_torch       float32, torch's own fused kernel
        adamw_torch_bf16  the first in bfloat16, the second in float32: a step changes the second by
                          about one part in a thousand, which bfloat16 would round away
        adamw_torch_8bit  8 bits with one scale per 64 values (arXiv 2110.02861), torchao's

    Updates are computed in float32 in every case. Vectors, matrices of fewer than 128 rows, and
    matrices whose row length is not a multiple of 64 keep float32 moments instead of 8-bit ones.
    UserError without torchao.
    """
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    kind = LocalAdamW if config.optim == "adamw_torch" else _compact(config.optim)
    return kind(
        trained,
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        weight_decay=config.weight_decay,
    )


class LocalAdamW(torch.optim.AdamW):
    """torch's fused AdamW, which updates this rank's part of every tensor in a few kernel launches.

    The state consists of sharded tensors, as the parameters; only the update runs on their parts,
    since it is elementwise and no other rank's part matters.
    """

    def __init__(self, *arguments, **settings) -> None:
        super().__init__(*arguments, **settings, fused=True)

    def _init_group(self, group, *lists) -> bool:
        has_complex = super()._init_group(group, *lists)
        for tensors in lists:  # parameters, gradients, moments, steps
            tensors[:] = map(local, tensors)
        return has_complex


@torch.no_grad()
def clip_gradients(parameters: Iterable[Tensor], limit: float) -> Tensor:
    """Scale the gradients so that their norm over all tensors and ranks is at most `limit`, in
    place; 0 never scales. Returns the norm before, a 0-dim tensor. A collective: one reduction.
    """
    parts = [local(p.grad) for p in parameters if p.grad is not None]
    total = nn.utils.get_total_norm(parts).double().square()
    dist.all_reduce(total)
    norm = total.sqrt()
    if limit and parts:
        scale = (limit / (norm + 1e-6)).clamp(max=1.0)  # as torch.nn.utils.clip_grad_norm_
        torch._foreach_mul_(parts, scale.to(parts[0].dtype))
    return norm


def _compact(name: str) -> type[torch.optim.Optimizer]:
    with optional_import("torchao", f"optim: {name}", "use --optim adamw_torch"):
        from torchao.optim import AdamW8bit
        from torchao.optim.subclass_8bit import OptimState8bit

    class CompactAdamW(AdamW8bit):
        """torchao's AdamW, which compiles one kernel per shape. On a CPU that would need a C++
        compiler and gain little, so the same operations run eagerly."""

        def step(self, closure: None = None) -> None:
            on_gpu = self.param_groups[0]["params"][0].is_cuda
            with torch.compiler.set_stance("default" if on_gpu else "force_eager"):
                super().step(closure)

        def _new_buffer(self, p: Tensor, signed: bool) -> Tensor:
            if name == "adamw_torch_bf16":
                return torch.zeros_like(p, dtype=torch.bfloat16 if signed else torch.float32)
            if not fits_blocks(p.shape):
                return torch.zeros_like(p)
            shape = p.to_local().shape if isinstance(p, DTensor) else p.shape
            require(
                shape[0] > 0, "optim", name, "a rank has no rows of a matrix, and an 8-bit moment "
                "cannot be empty: use --optim adamw_torch, or fewer ranks",
            )  # fmt: skip
            moment = OptimState8bit.zeros(shape, signed, BLOCK, p.device, p.dtype)
            return _sharded_like(p, moment)

    return CompactAdamW


def fits_blocks(shape: torch.Size) -> bool:
    """Whether a parameter can have 8-bit moments: rows consist of whole blocks, so that scales are
    sharded as values are. Independent of the number of ranks, which may change on resume."""
    return len(shape) == 2 and shape[1] % BLOCK == 0 and shape[0] >= LEAST_ROWS


def _sharded_like(p: Tensor, local: Tensor) -> Tensor:
    """Wrap this rank's rows of a tensor with as many rows as `p` as `p` is sharded."""
    if not isinstance(p, DTensor):
        return local
    shape = (p.shape[0], *local.shape[1:])
    return DTensor.from_local(
        local, p.device_mesh, p.placements, run_check=False, shape=shape,
        stride=(math.prod(shape[1:]), 1),
    )  # fmt: skip


def plain_parts(name: str, moment: Tensor) -> dict[str, Tensor]:
    """A moment as named plain tensors that share its memory, for checkpoints: itself, or for 8 bits
    the codes [rows, columns] and the scales [rows, columns / 64]. Writing to them sets it."""
    local = moment.to_local() if isinstance(moment, DTensor) else moment
    if not hasattr(local, "codes"):
        return {name: moment}
    scale = local.scale.view(local.shape[0], -1)
    return {
        f"{name}.codes": _sharded_like(moment, local.codes),
        f"{name}.scale": _sharded_like(moment, scale),
    }


def set_learning_rate(optimizer: torch.optim.Optimizer, step: int, config: TrainConfig) -> None:
    """Set the rate of the update that leads from `step` to `step + 1`, which depends only on it."""
    if step < config.warmup_steps:
        share = (step + 1) / (config.warmup_steps + 1)
    else:
        span = max(config.max_steps - config.warmup_steps, 1)
        left = 1 - (step - config.warmup_steps) / span
        cosine = 0.5 * (1 + torch.cos(torch.tensor((1 - left) * torch.pi, dtype=torch.float64)))
        share = {"linear": left, "cosine": cosine.item(), "constant": 1.0}[config.lr_scheduler_type]
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            # In place, because a compiled step would treat a number as a constant.
            group["lr"].fill_(config.learning_rate * share)
        else:
            group["lr"] = config.learning_rate * share
