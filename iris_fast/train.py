"""The training loop: `torchrun -m iris_fast.train [--preset P] [--config FILE] [--setting value]`.

prompts -> rollout -> rewards -> advantages -> loss -> optimizer -> checkpoint and log
"""

from __future__ import annotations

from iris_fast.cli import parse_command_line
from iris_fast.config import TrainConfig

PROGRAM = "iris_fast.train"
# Before torch is imported, so that a mistyped setting is reported at once.
CONFIG = parse_command_line(TrainConfig, PROGRAM) if __name__ == "__main__" else None

import functools
import signal

from iris_fast import distributed
from iris_fast.distributed import Ranks
from iris_fast.errors import UserError, report_error
from iris_fast.grpo.advantage import group_advantages
from iris_fast.grpo.optimizer import make_optimizer
from iris_fast.grpo.policy import build_models
from iris_fast.grpo.update import Learner
from iris_fast.models.compilation import require_compiler
from iris_fast.models.images import decode_images
from iris_fast.preflight.dry_run import dry_run, keeps_rollout_memory, open_checked
from iris_fast.preflight.inputs import check_device
from iris_fast.prompts import PromptSource
from iris_fast.records import Prompt, Scored
from iris_fast.rewards.score import Scorer, load_rewards
from iris_fast.rollout.sampler import Sampler
from iris_fast.run import folder as run_folder
from iris_fast.run.checkpoint import Progress
from iris_fast.run.context import Run, StepClock, is_due
from iris_fast.run.evaluation import HeldOut
from iris_fast.run.log import open_log
from iris_fast.run.metrics import rollout_metrics
from iris_fast.run.resume import restore
from iris_fast.run.signals import StopSignal
from iris_fast.run.trackers import require_tracker


def train(config: TrainConfig) -> None:
    """Run, or resume, the training that `config` describes.

    UserError for everything that the user can fix. After SIGTERM or Ctrl-C a checkpoint is saved
    and the function returns.
    """
    with StopSignal() as stop, distributed.start(config.device, config.ddp_timeout) as ranks:
        if config.dry_run:
            return dry_run(config, ranks)
        folder = run_folder.choose(config, ranks)
        check_environment(config, ranks)
        rewards = load_rewards(config.reward_funcs or [])  # before the model: it takes longer
        inputs = open_checked(config, ranks, folder.path)
        models = build_models(inputs, config, ranks, keeps_rollout_memory(config, inputs, ranks))
        prompts = PromptSource(inputs.prompts, config.seed)
        decode = functools.partial(decode_images, models.vq)
        scorer = Scorer.of(config, rewards, inputs.prompts, decode)
        held_out = HeldOut.of(inputs.held_out, config, models.sampler, scorer)
        optimizer = make_optimizer(models.policy, config)
        learner = Learner(models.policy, models.reference, optimizer, config, ranks)
        progress = restore(folder, learner, prompts.sha256(), config, ranks)
        with run_folder.claimed(folder, config, ranks):
            log = open_log(folder, config, progress.step, ranks)
            run = Run(config, folder, log, ranks, stop, progress.step, held_out)
            log.print(f"run folder: {folder.path}")
            log.print(f"attention: {models.policy.attn_implementation}")
            try:
                loop(run, models.sampler, learner, scorer, prompts, progress)
            finally:
                run.close()
        run.print_end(progress.step)


def loop(
    run: Run,
    sampler: Sampler,
    learner: Learner,
    scorer: Scorer,
    prompts: PromptSource,
    progress: Progress,
) -> None:
    """Train until `max_steps`, `max_kl` or a stop signal; `num_iterations` steps per rollout."""
    config, ranks, batches = run.config, run.ranks, None
    learner.copy_weights_to(sampler.janus)
    if progress.step == 0:
        run.show_samples(sampler, scorer, prompts.prompts, step=0)
    while progress.step < config.max_steps and not run.stopped:
        with run.step_or_rollback(learner):
            run.evaluate(progress.step)
            clock, scored = StepClock(), progress.scored
            prompts.cursor = progress.cursor
            if scored is None:
                count, group = config.prompts_per_step, config.num_generations
                samples, numbers = take_samples(prompts, count, group, ranks)
                rollout = sampler.rollout(samples, numbers, run.pause)
                run.pause()
                rewards = scorer.score(rollout)
                everyone_N = ranks.gather(rewards.total_N)
                advantages = group_advantages(everyone_N, group, config.scale_rewards)
                scored = Scored.of(rollout, rewards, ranks.own_part(advantages))
                batches = None
            clock.rollout_done()
            batches = batches or learner.prepare(scored, progress.old_logprobs)
            learned = learner.update(batches, progress.step, run.pause)
            learner.copy_weights_to(sampler.janus)
            progress.advance(prompts.cursor, scored, batches, config.num_iterations)
            seen = rollout_metrics(scored, config.num_generations, ranks)
            timed = clock.metrics(len(scored.reward_N) * ranks.world_size, ranks.device)
            run.log_step({"step": progress.step, **seen, **learned, **timed})
            run.show_samples(sampler, scorer, prompts.prompts, progress.step)
            if is_due(config.save_steps, progress.step):
                run.save(learner, progress)
    run.save(learner, progress)
    with run.step_or_rollback(learner):
        run.evaluate(progress.step)


def take_samples(
    prompts: PromptSource, count: int, num_generations: int, ranks: Ranks
) -> tuple[list[Prompt], list[int]]:
    """This rank's next `count` prompts, each `num_generations` times, and the samples' global
    numbers."""
    taken, numbers = prompts.take(count, ranks.rank, ranks.world_size)
    group = range(num_generations)
    samples = [prompt for prompt in taken for _ in group]
    return samples, [number * num_generations + g for number in numbers for g in group]


def check_environment(config: TrainConfig, ranks: Ranks) -> None:
    """UserError, before anything is opened, for a tracker, device or compiler that is missing."""
    require_tracker(config.report_to)
    check_device(config, ranks.device)
    if config.torch_compile:
        require_compiler(ranks.device)


def main(config: TrainConfig) -> int:
    """`train`, with UserErrors reported in one line; the exit code."""
    try:
        train(config)
    except UserError as error:
        return report_error(PROGRAM, error)
    except KeyboardInterrupt:  # the second Ctrl-C, which does not wait for a checkpoint
        return 128 + signal.SIGINT
    return 0


if __name__ == "__main__":
    distributed.leave(main(CONFIG))
