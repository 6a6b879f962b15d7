"""The decoding loop: steps called one by one, or captured once as a CUDA graph and replayed.

Shapes: N samples, L steps.
"""

from collections.abc import Callable

import torch
from iris_kernels import GuidedSample, TokenStats
from torch import Tensor

from iris_fast.records import Trace

WARM_UP_STEPS = 2  # before a capture: compilation, library handles and workspaces


def run_steps(
    step: Callable[[], None],
    max_steps: int,
    use_cuda_graph: bool,
    should_stop: Callable[[int], bool],
) -> int:
    """Call `step` up to `max_steps` times and return how often it ran.

    `use_cuda_graph`: after `WARM_UP_STEPS` calls the step is captured and from then on replayed; it
    must not synchronise with the device or depend on host state. `should_stop(steps_done)` is
    called after each step.
    """
    run = step
    for steps_done in range(1, max_steps + 1):
        if use_cuda_graph and steps_done == WARM_UP_STEPS + 1:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):  # it synchronises, and capturing does not run the step
                step()
            run = graph.replay
        run()
        if should_stop(steps_done):
            return steps_done
    return max_steps


class StepBuffer:
    """Random numbers, tokens and statistics of all steps, indexed by a step counter on the device.

    uniforms_NL: the numbers in [0, 1) that the steps sample with, on the device.
    token_ids_NL: the sampled tokens, int64; meaningless beyond the current step.
    """

    def __init__(self, uniforms_NL: Tensor) -> None:
        self._uniforms_NL = uniforms_NL
        self.token_ids_NL = torch.zeros_like(uniforms_NL, dtype=torch.int64)
        self._stats_NL = uniforms_NL.new_zeros(2, 4, *uniforms_NL.shape)
        self._step_1 = uniforms_NL.new_zeros(1, dtype=torch.int64)

    def uniforms_N(self) -> Tensor:
        """The random numbers of the current step."""
        return self._uniforms_NL.index_select(1, self._step_1)[:, 0]

    def append(self, sampled: GuidedSample) -> None:
        """Store what the current step sampled and advance the step counter."""
        self.token_ids_NL.index_copy_(1, self._step_1, sampled.token_ids[:, None])
        stats = torch.stack([torch.stack(sampled.conditional), torch.stack(sampled.guided)])
        self._stats_NL.index_copy_(3, self._step_1, stats[..., None])
        self._step_1 += 1

    def trace(self, mask_NL: Tensor) -> Trace:
        """The statistics of the first L steps on the CPU, L from the mask; 0 where it is False."""
        stats = self._stats_NL[..., : mask_NL.shape[1]].cpu().masked_fill(~mask_NL, 0.0)
        return Trace(TokenStats(*stats[0]), TokenStats(*stats[1]), mask_NL)
