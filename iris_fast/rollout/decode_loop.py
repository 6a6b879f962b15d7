"""The decoding loop: steps called one by one, or captured once as a CUDA graph and replayed.

Shapes: N samples, L steps.
"""

import math
from collections.abc import Callable

import torch
from iris_kernels import TokenStats, guided_sample_step
from torch import Tensor

from iris_fast.records import Trace

WARM_UP_STEPS = 2  # before a capture: compilation, library handles and workspaces


class CapturedStep:
    """A decoding step: called `WARM_UP_STEPS` times, then captured as a CUDA graph, and from then
    on replayed. Without `use_cuda_graph` it is always called.

    A captured step must not synchronise with the device or depend on host state.
    """

    def __init__(self, step: Callable[[], None], use_cuda_graph: bool) -> None:
        self._step, self._run = step, step
        self._until_capture = WARM_UP_STEPS if use_cuda_graph else math.inf

    def __call__(self) -> None:
        """Run one step."""
        if self._until_capture == 0:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):  # it synchronises, and capturing does not run the step
                self._step()
            self._run, self._until_capture = graph.replay, math.inf
        self._until_capture -= 1
        self._run()


def run_steps(step: Callable[[], None], max_steps: int, should_stop: Callable[[int], bool]) -> int:
    """Call `step` up to `max_steps` times, until `should_stop(steps_done)`; how often it ran."""
    for steps_done in range(1, max_steps + 1):
        step()
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

    def restart(self, uniforms_NL: Tensor) -> None:
        """Start over with other random numbers, in the same memory."""
        self._uniforms_NL.copy_(uniforms_NL)
        self._step_1.zero_()

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
