"""`guided_sample_step`: one step of a decoding loop, sampled and recorded in one launch.

Around `guided_sample`, a loop selects the step's random numbers and copies the tokens and eight
statistics into its buffers: some twelve small kernels per step on a GPU. Here the kernel reads and
writes the column of the step itself. The step counter is only read, because programs of the same
launch would race to increment it.

Bytes moved: those of `guided_sample`.

Shapes: R rows, V columns, L steps.
"""

import torch
from torch import Tensor

from .._backend import calls_directly
from .._ops import add_op_namespace_prefix
from .._scalars import to_kernel_argument, to_scalar_tensor
from .op import check_uniform, checked, sample
from .outputs import Recording


@torch.library.custom_op(
    add_op_namespace_prefix("guided_sample_step"),
    mutates_args={"token_ids", "conditional", "guided"},
)
def _guided_sample_step_op(
    cond: Tensor, uncond: Tensor | None, uniforms: Tensor, step: Tensor,
    token_ids: Tensor, conditional: Tensor, guided: Tensor,
    cfg_weight: Tensor, temperature: Tensor,
    greedy: bool, top_k: int, top_p: float, min_p: float, vocab_size: int,
) -> Tensor:  # fmt: skip
    recording = Recording(step, token_ids, conditional, guided)
    numbers = to_kernel_argument(cfg_weight), to_kernel_argument(temperature)
    truncation = (greedy, top_k, top_p, min_p, vocab_size)
    return sample(cond, uncond, uniforms, *numbers, *truncation, recording)[0]


@_guided_sample_step_op.register_fake
def _(cond, *_):
    return cond.new_empty(cond.shape[0], dtype=torch.int64)


def guided_sample_step(
    cond_logits: Tensor,
    uncond_logits: Tensor | None,
    uniforms: Tensor,
    step: Tensor,
    token_ids: Tensor,
    conditional: Tensor,
    guided: Tensor,
    *,
    cfg_weight: float | Tensor,
    temperature: float | Tensor = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    vocab_size: int | None = None,
) -> Tensor:
    """`guided_sample` at the random numbers of column `step`, recorded in column `step`.

    The same tokens and statistics as `guided_sample`, bit for bit. On a GPU, untruncated sampling
    is one kernel launch and safe in a CUDA graph: the counter is read in every replay. The caller
    increments it afterwards.

    Args:
        cond_logits, uncond_logits: (R, V), as for `guided_sample`.
        uniforms: (R, L) float32 in [0, 1), contiguous, one random number per row and step.
        step: (1) int64 on the device of the logits, in [0, L).
        token_ids: (R, L) int64, contiguous; column `step` is written.
        conditional, guided: (4, R, L) float32, contiguous; column `step` is written with logprob,
            nsc, entropy and lse, in this order.
        cfg_weight, temperature, top_k, top_p, min_p, vocab_size: as for `guided_sample`.

    Returns:
        The tokens (R) int64.

    Raises:
        ValueError: an argument of the wrong shape, dtype, device or range, as for `guided_sample`.
        IndexError: a step outside [0, L), which is checked on the CPU only; on a GPU nothing is
            recorded then, and the token is that of the number 0.
    """
    if cond_logits.dim() != 2:
        raise ValueError(f"cond_logits has shape {tuple(cond_logits.shape)}: pass (R, V)")
    cond_logits, uncond_logits, temperature, truncation = checked(
        cond_logits, uncond_logits, cfg_weight, temperature, top_k, top_p, min_p, vocab_size
    )
    recording = Recording(step, token_ids, conditional, guided)
    _check_buffers(uniforms, recording, cond_logits)
    if calls_directly(cond_logits, uncond_logits, uniforms, *recording) and len(cond_logits):
        numbers = float(cfg_weight), float(temperature)
        return sample(cond_logits, uncond_logits, uniforms, *numbers, *truncation, recording)[0]
    if not len(cond_logits):
        return token_ids.new_empty(0)
    return _guided_sample_step_op(
        cond_logits, uncond_logits, uniforms, *recording,
        to_scalar_tensor(cfg_weight, cond_logits), to_scalar_tensor(temperature, cond_logits),
        *truncation,
    )  # fmt: skip


def _check_buffers(uniforms: Tensor, recording: Recording, cond: Tensor) -> None:
    shape = (len(cond), uniforms.shape[-1])
    check_uniform("uniforms", uniforms, shape, cond.device)
    expected = {"step": ((1,), torch.int64), "token_ids": (shape, torch.int64)}
    expected |= dict.fromkeys(("conditional", "guided"), ((4, *shape), torch.float32))
    for name, tensor in {"uniforms": uniforms, **recording._asdict()}.items():
        wanted_shape, dtype = expected.get(name, (shape, torch.float32))
        if tensor.shape != wanted_shape or tensor.dtype != dtype or tensor.device != cond.device:
            raise ValueError(
                f"{name} is {tuple(tensor.shape)} {tensor.dtype} on {tensor.device}: "
                f"pass {wanted_shape} {dtype} on {cond.device}"
            )
        if not tensor.is_contiguous():
            raise ValueError(f"{name} is not contiguous: pass a contiguous tensor")
