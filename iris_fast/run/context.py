"""What a run writes to and what stops it: folder, log, checkpoints, ranks, stop signal."""

import contextlib
import resource
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from iris_fast.config import TrainConfig
from iris_fast.distributed import Ranks
from iris_fast.errors import UserError
from iris_fast.grpo.update import Learner
from iris_fast.records import Prompt
from iris_fast.rewards.score import Scorer
from iris_fast.rollout.sampler import Sampler
from iris_fast.run import checkpoint
from iris_fast.run.best import Judge
from iris_fast.run.checkpoint import Progress, describe_best
from iris_fast.run.evaluation import Evaluations, HeldOut, compare, read_evaluations
from iris_fast.run.folder import RunFolder
from iris_fast.run.log import Log
from iris_fast.run.random_state import random_state, set_random_state
from iris_fast.run.report import write_report
from iris_fast.run.samples import write_samples
from iris_fast.run.signals import Interrupted, StopSignal

TRUE_REWARD = "torchrun -m iris_fast.train --reward_funcs '[tiny_verifier]'"


@dataclass
class Run:
    """One training run of one process; `saved_at` is the step of its newest checkpoint, `held_out`
    is evaluated, `halted` says why it stops by itself, `evaluation_is_missing` that the last
    evaluation was stopped."""

    config: TrainConfig
    folder: RunFolder
    log: Log
    ranks: Ranks
    signal: StopSignal
    saved_at: int
    held_out: HeldOut | None = None
    halted: str = ""
    evaluation_is_missing: bool = False

    def __post_init__(self) -> None:
        self.evaluations = Evaluations(self.folder.evaluations, self.saved_at, self.ranks)
        for row in self.ranks.broadcast(self.log.history[-1:]):
            self._kl_warning(row)  # a run that has stopped is not continued by resuming it

    @property
    def stopped(self) -> bool:
        """Whether any rank was asked to stop, or the run stops by itself; a collective."""
        return self.ranks.any(self.signal.requested or bool(self.halted))

    def pause(self) -> None:
        """Raise Interrupted, on all ranks, if any was asked to stop. For use inside a step."""
        if self.stopped:
            raise Interrupted

    @contextlib.contextmanager
    def step_or_rollback(self, learner: Learner) -> Iterator[None]:
        """Complete the step in this block, or after `Interrupted` leave everything as before it.

        Nothing that a checkpoint holds changes before the optimizer step, so that only the random
        state has to be restored; after resuming, the step is done again.
        """
        before = random_state()
        try:
            yield
        except Interrupted:
            learner.discard_gradients()
            set_random_state(before)

    def log_step(self, metrics: dict[str, Any]) -> None:
        """Log a step, and warn or stop if its KL is above `max_kl`."""
        self.log.step({**metrics, "warnings": self._kl_warning(metrics)})

    def _kl_warning(self, metrics: dict[str, Any]) -> dict[str, str]:
        limit = self.config.max_kl
        if limit is None or metrics["kl"] <= limit:
            return {}
        text = f"KL to the reference is {metrics['kl']:.3g}, above max_kl {limit:.3g}"
        if self.config.max_kl_action == "stop":
            self.halted = text
            return {"max kl": f"{text}; the run stops here"}
        return {"max kl": f"{text}; look at the samples and the metrics"}

    def show_samples(
        self, sampler: Sampler, scorer: Scorer, prompts: list[Prompt], step: int
    ) -> None:
        """Write the sample grid of a step, if it is due, and log its metrics. Rank 0 samples."""
        config = self.config
        last = config.sample_steps > 0 and (step == config.max_steps or bool(self.halted))
        if not (last or is_due(config.sample_steps, step)):
            return
        with self.ranks.on_first_rank() as mine:
            if mine:
                path = write_samples(
                    sampler, scorer, prompts, self.folder.samples, step, config.num_sample_prompts
                )
                self.log.samples(path)

    def evaluate(self, step: int) -> None:
        """Evaluate the held-out prompts after `step`, if that is due and has not been done.

        Raise Interrupted, on all ranks, if any was asked to stop meanwhile. The global random
        numbers that a metric takes do not change those of the next step.
        """
        last = step >= self.config.max_steps or bool(self.halted)
        due = last or is_due(self.config.eval_steps, step)
        if self.held_out is None or not self.evaluations.are_missing(self.held_out, step, due):
            return
        self.evaluation_is_missing = True
        before, started = random_state(), time.perf_counter()
        evaluation = self.held_out.evaluate(step, self.ranks, self._pause_for_signal)
        set_random_state(before)
        self.evaluations.add(evaluation)
        self.evaluation_is_missing = False
        metrics = list(self.held_out.scorer.metrics)
        self.log.evaluation(evaluation, metrics, time.perf_counter() - started)

    def _pause_for_signal(self) -> None:
        """As `pause`, but not for a run that stops by itself: it is evaluated at its end."""
        if self.ranks.any(self.signal.requested):
            raise Interrupted

    def save(self, learner: Learner, progress: Progress) -> None:
        """Write a checkpoint, unless this step has one."""
        if self.saved_at != progress.step:
            folder, keep = self.folder.checkpoints, self.config.save_total_limit
            policy, optimizer = learner.policy, learner.optimizer
            self.log.sync()
            judge = Judge.of(vars(self.config), self.log.history)
            checkpoint.save(folder, policy, optimizer, progress, self.ranks, keep, judge)
            self.saved_at = progress.step

    def close(self) -> None:
        """Close the log and write report.html; a full disk does not make the run fail."""
        self.log.close()
        if self.ranks.is_first:
            try:
                write_report(self.folder)
            except UserError as error:
                print(f"iris_fast.train: warning: {error}", file=sys.stderr)

    def print_end(self, step: int) -> None:
        """Print where the run ended, and how to resume it."""
        if not self.ranks.is_first:
            return
        for comparison in compare(read_evaluations(self.folder.evaluations)):
            if comparison.metric in (self.config.metric_funcs or []):
                print(comparison)
        best = describe_best(self.folder.checkpoints, Judge.of(vars(self.config), self.log.history))
        if best:
            print(f"best checkpoint: {best}")
        if step >= self.config.max_steps:
            print(f"finished at step {step}; report: {self.folder.report}")
            if not self.evaluation_is_missing:
                print_next_steps(self.config, self.folder)
                return
        saved = f"saved at step {step}" if step else "before the first step"
        reason, change = f"stopped by a signal, {saved}", ""
        if self.halted:
            reason, change = f"stopped at step {step}: {self.halted}", "raise --max_kl and "
        if step >= self.config.max_steps:
            print("stopped by a signal, before the held-out prompts were evaluated")
        else:
            print(f"{reason}; report: {self.folder.report}")
        print(
            f"to resume, {change}repeat the command with: --output_dir {self.folder.path} "
            "--resume_from_checkpoint true"
        )


def print_next_steps(config: TrainConfig, folder: RunFolder) -> None:
    """Print where to go from a run on the built-in prompts."""
    if not (config.has_built_in_prompts and config.evaluates):
        return
    print(f"next: open {folder.report}, the same prompts before and after, and the curves")
    if config.reward_funcs != ["tiny_verifier"]:
        print("  the same with a true reward: " + TRUE_REWARD)
    print("  Janus-Pro: docs/janus.md")


def is_due(every: int, step: int) -> bool:
    """Whether something that happens every `every` steps (0: never) happens at `step`."""
    return every > 0 and step % every == 0


class StepClock:
    """Wall times of a step on this rank."""

    def __init__(self) -> None:
        self._started = self._rolled_out = time.perf_counter()

    def rollout_done(self) -> None:
        """The time until now counts as rollout, the time from now on as training."""
        self._rolled_out = time.perf_counter()

    def metrics(self, images: int, device: torch.device) -> dict[str, float]:
        """Seconds by phase, images per second (of all ranks), and the peak memory in bytes."""
        now = time.perf_counter()
        if device.type == "cuda":
            peak_memory_bytes = torch.cuda.max_memory_allocated()
        else:
            peak_memory_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return {
            "rollout_s": self._rolled_out - self._started,
            "train_s": now - self._rolled_out,
            "images_per_s": images / (now - self._started),
            "peak_memory_bytes": peak_memory_bytes,
        }
