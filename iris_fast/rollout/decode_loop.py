"""Steps of decoding: run one by one, or captured once and replayed; what they draw stays on the
device until the last one is done.

Shapes: N samples, L steps.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from iris_kernels import GuidedSample, TokenStats
from torch import Tensor

from iris_fast.records import Trace

WARM_UP_STEPS = 2  # before a capture: compilation, library handles and workspaces


def run_steps(
    step: Callable[[], None],
    count: int,
    device: torch.device,
    captured: bool,
    between: Callable[[int], bool],
) -> int:
    """Call `step` up to `count` times and return how often it ran.

    `captured`: after a few calls the step becomes one CUDA graph, replayed from then on, which must
    neither wait for the device nor count on the host. `between(done)` is called after each step and
    says whether to stop early.
    """
    run = step
    for done in range(1, count + 1):
        if captured and done == WARM_UP_STEPS + 1:
            run = _capture(step, device)
        run()
        if between(done):
            return done
    return count


def _capture(step: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """`step` as a CUDA graph, which this records and does not run."""
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


class Record:
    """Tokens and statistics of every step, written where a counter on the device points."""

    def __init__(self, draws_NL: Tensor) -> None:
        """`draws_NL`: the uniform numbers that the steps will sample with, on the device."""
        samples, steps = draws_NL.shape
        self._draws_NL = draws_NL
        self._token_ids_NL = draws_NL.new_zeros(samples, steps, dtype=torch.int64)
        self._stats_NL = draws_NL.new_zeros(2, 4, samples, steps)
        self._step_1 = draws_NL.new_zeros(1, dtype=torch.int64)

    def draws_N(self) -> Tensor:
        """This step's uniform numbers."""
        return self._draws_NL.index_select(1, self._step_1)[:, 0]

    def write(self, sampled: GuidedSample) -> None:
        """Keep what this step drew; the next step's turn."""
        self._token_ids_NL.index_copy_(1, self._step_1, sampled.token_ids[:, None])
        stats = torch.stack([torch.stack(sampled.conditional), torch.stack(sampled.guided)])
        self._stats_NL.index_copy_(3, self._step_1, stats[..., None])
        self._step_1 += 1

    def token_ids_NL(self, steps: int) -> Tensor:
        """The tokens of the first `steps` steps, on the CPU."""
        return self._token_ids_NL[:, :steps].cpu()

    def trace(self, mask_NL: Tensor) -> Trace:
        """The statistics of the first steps, as many as the mask has, 0 where it does not hold."""
        stats = self._stats_NL[..., : mask_NL.shape[1]].cpu().masked_fill(~mask_NL, 0.0)
        return Trace(TokenStats(*stats[0]), TokenStats(*stats[1]), mask_NL)
