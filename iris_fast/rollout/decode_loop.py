"""The decoding loop: steps called one by one, or captured once as a CUDA graph and replayed.

Shapes: N samples, L steps.
"""

from collections.abc import Callable

import torch
from iris_kernels import TokenStats, guided_sample_step
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

    def sample(self, cond_NV: Tensor, uncond_NV: Tensor | None, **settings: float) -> Tensor:
        """Sample the current step's tokens [N] and store them; advance the step counter.

        `settings` are those of `guided_sample`.
        """
        token_ids_N = guided_sample_step(
            cond_NV, uncond_NV, self._uniforms_NL, self._step_1,
            self.token_ids_NL, *self._stats_NL, **settings,
        )  # fmt: skip
        self._step_1 += 1
        return token_ids_N

    def trace(self, mask_NL: Tensor) -> Trace:
        """The statistics of the first L steps on the CPU, L from the mask; 0 where it is False."""
        stats = self._stats_NL[..., : mask_NL.shape[1]].cpu().masked_fill(~mask_NL, 0.0)
        return Trace(TokenStats(*stats[0]), TokenStats(*stats[1]), mask_NL)
