"""`guided_sample` in C++, for float32 and bfloat16 on a CPU: see `cpp/guided_sample.cpp`."""

import torch
from torch import Tensor

from .. import cpp
from ..token_stats.cpp_path import rows_of
from .outputs import Recording, empty_outputs

_sample = cpp.function(
    "iris_guided_sample", cpp.INT, cpp.INT, *cpp.ROWS, *cpp.ROWS, cpp.LONG, cpp.LONG, cpp.POINTER,
    cpp.LONG, cpp.POINTER, cpp.FLOAT, cpp.FLOAT, cpp.INT, cpp.POINTER, cpp.LONG, cpp.POINTER,
    cpp.POINTER, cpp.LONG, cpp.LONG, cpp.INT,
)  # fmt: skip


def sample_cpp(
    cond: Tensor,
    uncond: Tensor | None,
    uniform: Tensor,
    threshold: Tensor | None,
    cfg_weight: float,
    temperature: float,
    greedy: bool,
    vocab_size: int,
    recording: Recording | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Same as `sample_triton`."""
    cond_rows, uncond_rows = rows_of(cond), None if uncond is None else rows_of(uncond)
    if cond_rows is None:
        cond_rows = rows_of(cond := cond.contiguous())
    if uncond is not None and uncond_rows is None:
        uncond_rows = rows_of(uncond := uncond.contiguous())
    rows = cond.numel() // cond.shape[-1]
    uniform = uniform.contiguous()  # held until the call has read it
    if recording is None:
        column, room = 0, 1
        step_tokens, conditional, guided = empty_outputs(cond, (rows,))
    else:
        column, room = int(recording.step), recording.token_ids.shape[1]
        _, step_tokens, conditional, guided = recording
    places = [
        each.data_ptr() + column * each.element_size()
        for each in (uniform, step_tokens, conditional, guided)
    ]
    in_range = _sample()(
        cond.dtype == torch.bfloat16, *cond_rows, *(uncond_rows or (None, 1, 0, 0)), rows,
        vocab_size, places[0], room, cpp.address(threshold), cfg_weight, temperature, greedy,
        places[1], room, places[2], places[3], rows * room, room,
        cpp.threads(rows * vocab_size),
    )  # fmt: skip
    if not in_range:
        raise ValueError("uniform holds numbers outside [0, 1): pass the result of torch.rand")
    if recording is None:
        return step_tokens, conditional, guided
    torch.autograd.graph.increment_version((step_tokens, conditional, guided))
    return step_tokens[:, column].clone(), conditional, guided
