"""The training loop: `torchrun -m iris_fast.train [--preset P] [--config FILE] [--setting value]`.

prompts -> rollout -> rewards -> advantages -> loss -> optimizer -> checkpoint and log
"""

from __future__ import annotations

import sys

from iris_fast.cli import parse_command_line
from iris_fast.config import TrainConfig

PROGRAM = "iris_fast.train"
# Before torch is imported: a typo is answered at once.
CONFIG = parse_command_line(TrainConfig, PROGRAM) if __name__ == "__main__" else None

import functools
import resource
import signal
import time
from dataclasses import dataclass

import torch

from iris_fast import distributed
from iris_fast.distributed import Ranks
from iris_fast.errors import UserError, report_error
from iris_fast.grpo.lora import Lora
from iris_fast.grpo.optimizer import make_optimizer, set_learning_rate
from iris_fast.grpo.policy import Models, assign, copy_weights
from iris_fast.grpo.update import Pieces, prepare, update
from iris_fast.models.compilation import require_compiler
from iris_fast.models.images import decode_images
from iris_fast.models.janus import Janus
from iris_fast.models.templates import get_template, image_prompt_ids
from iris_fast.preflight.estimate import Estimate, check_fits, estimate, this_gpu
from iris_fast.preflight.inputs import Inputs, check_device, open_inputs
from iris_fast.prompts import PromptSource
from iris_fast.rewards import check_rewards, load_metrics, load_rewards, score
from iris_fast.rewards.score import Functions
from iris_fast.run import checkpoint
from iris_fast.run import folder as run_folder
from iris_fast.run.checkpoint import Progress
from iris_fast.run.log import Log
from iris_fast.run.metrics import rollout_metrics
from iris_fast.run.report import write_report
from iris_fast.run.samples import draw_samples
from iris_fast.run.signals import Interrupted, StopSignal
from iris_fast.run.trackers import require_tracker


@dataclass
class Judges:
    """What looks at a rollout: rewards are trained on, metrics only logged."""

    rewards: Functions
    metrics: Functions


def train(config: TrainConfig) -> None:
    """Run, or go on with, the training that `config` describes.

    UserError for whatever the user can mend; SIGTERM or Ctrl-C save a checkpoint and return.
    """
    with StopSignal() as stop, distributed.start(config.device, config.ddp_timeout) as ranks:
        if config.dry_run:
            return dry_run(config, ranks)
        folder = run_folder.choose(config, ranks)
        require_tracker(config.report_to)
        check_device(config, ranks.device)
        if config.torch_compile:
            require_compiler(ranks.device)
        rewards = load_rewards(config.reward_funcs)
        models, prompts = load_inputs(config, ranks)
        check_rewards(rewards, prompts.prompts)
        judges = Judges(rewards, load_metrics(config.metric_funcs, prompts.prompts))
        optimizer = make_optimizer(models.policy, config)
        progress = restore(folder, models.policy, optimizer, prompts, config, ranks)
        with run_folder.claimed(folder, config, ranks):
            log = Log(folder, config, progress.step, ranks)
            log.say(f"run folder: {folder.path}")
            log.say(f"attention: {models.policy.attn_implementation}")
            copy_weights(models.policy, models.sampler.janus)
            try:
                if progress.step == 0 and config.sample_steps:
                    show_samples(models, prompts, judges, folder, 0, log, config, ranks)
                loop(models, optimizer, prompts, judges, progress, folder, log, config, ranks, stop)
            finally:
                log.close()
                if ranks.is_first:
                    report(folder)
        if ranks.is_first:
            tell_end(progress.step, folder, config)


def tell_end(step: int, folder: run_folder.RunFolder, config: TrainConfig) -> None:
    """Where the run ended, and how to go on with it."""
    if step >= config.max_steps:
        print(f"finished at step {step}; report: {folder.report}")
        return
    saved = f"saved at step {step}" if step else "before the first step"
    print(f"stopped by a signal, {saved}; report: {folder.report}")
    print(
        f"go on with the same command and: --output_dir {folder.path} --resume_from_checkpoint true"
    )


def dry_run(config: TrainConfig, ranks: Ranks) -> None:
    """Print what the run will need; UserError if that does not fit."""
    if ranks.device.type == "cuda":  # else the estimate is for other machines than this one
        check_device(config, ranks.device)
    needs = estimate_run(config, open_inputs(config, torch.float32), ranks)
    if ranks.is_first:
        print(needs.table())
    check_fits(needs, config)


def estimate_run(config: TrainConfig, inputs: Inputs, ranks: Ranks) -> Estimate:
    """The estimate for these inputs; prompts count with their mean length and the template."""
    tokenizer, template = inputs.checkpoint.tokenizer, get_template(config.template)
    shown = inputs.prompts[:100]
    lengths = [len(image_prompt_ids(tokenizer, template, prompt.text)) for prompt in shown]
    mean_length = round(sum(lengths) / len(lengths))
    gpu = this_gpu(ranks.device)
    return estimate(config, inputs.checkpoint.config, ranks.world_size, gpu, mean_length)


def report(folder: run_folder.RunFolder) -> None:
    """Write report.html; a disk that does not take it is no reason for a run to fail."""
    try:
        write_report(folder)
    except UserError as error:
        print(f"{PROGRAM}: warning: {error}", file=sys.stderr)


def loop(
    models: Models,
    optimizer: torch.optim.Optimizer,
    prompts: PromptSource,
    judges: Judges,
    progress: Progress,
    folder: run_folder.RunFolder,
    log: Log,
    config: TrainConfig,
    ranks: Ranks,
    stop: StopSignal,
) -> None:
    """Steps until max_steps or a signal; each `num_iterations` steps share one rollout.

    A signal gives up the step under way: nothing that a checkpoint holds has changed by then, and
    after resuming the step is done again.
    """

    def pause() -> None:
        if ranks.any(stop.requested):
            raise Interrupted

    prompts.cursor = progress.cursor
    random_before = checkpoint.random_state()
    saved_at = progress.step
    pieces = Pieces()
    try:
        batches = None
        while progress.step < config.max_steps:
            pause()
            started, random_before = time.perf_counter(), checkpoint.random_state()
            if progress.scored is None:
                prompts.cursor = progress.cursor
                drawn, numbers = prompts.take(config.prompts_per_step, ranks.rank, ranks.world_size)
                samples, sample_numbers = repeat(drawn, numbers, config.num_generations)
                rollout = models.sampler.rollout(samples, sample_numbers, pause)
                images = functools.partial(decode_images, models.vq, rollout.codes_NI)
                pause()
                scored = score(rollout, judges.rewards, images, config, ranks, judges.metrics)
                batches = None
            else:
                scored = progress.scored
            rolled_out = time.perf_counter()
            if batches is None:
                batches = prepare(
                    scored, models.policy, models.reference, config, ranks, progress.old_logprobs
                )
            set_learning_rate(optimizer, progress.step, config)
            losses = update(models.policy, optimizer, batches, config, ranks, pause, pieces)
            copy_weights(models.policy, models.sampler.janus)
            progress.step += 1
            progress.cursor = prompts.cursor
            if progress.step % config.num_iterations == 0:
                progress.scored = progress.old_logprobs = None
            else:
                progress.scored = scored
                progress.old_logprobs = [batch.old_logprob_M.cpu() for batch in batches]
            log.step(
                {
                    "step": progress.step,
                    **rollout_metrics(scored, config, ranks),
                    **losses,
                    "micro_batch_pieces": pieces.count,
                    "learning_rate": float(optimizer.param_groups[0]["lr"]),
                    "attn_implementation": models.policy.attn_implementation,
                    **speed(started, rolled_out, config, ranks),
                }
            )
            last = progress.step == config.max_steps
            if config.sample_steps and (progress.step % config.sample_steps == 0 or last):
                show_samples(models, prompts, judges, folder, progress.step, log, config, ranks)
            if last or (config.save_steps and progress.step % config.save_steps == 0):
                save(folder, models, optimizer, progress, config, ranks)
                saved_at = progress.step
    except Interrupted:
        optimizer.zero_grad(set_to_none=True)
        checkpoint.set_random_state(random_before)
        if saved_at != progress.step:
            save(folder, models, optimizer, progress, config, ranks)


def load_inputs(config: TrainConfig, ranks: Ranks) -> tuple[Models, PromptSource]:
    """Prompts, checked, and the model in its three roles; UserError if a GPU will not hold them."""
    inputs = open_inputs(config, torch.float32)
    if ranks.device.type == "cuda":
        check_fits(estimate_run(config, inputs, ranks), config)
    return assign(inputs, config, ranks), PromptSource(inputs.prompts, config.seed)


def repeat(prompts: list, numbers: list[int], num_generations: int) -> tuple[list, list[int]]:
    """Each prompt G times, with the samples' global numbers."""
    samples = [prompt for prompt in prompts for _ in range(num_generations)]
    sample_numbers = [n * num_generations + g for n in numbers for g in range(num_generations)]
    return samples, sample_numbers


def restore(
    folder: run_folder.RunFolder,
    policy: Janus,
    optimizer: torch.optim.Optimizer,
    prompts: PromptSource,
    config: TrainConfig,
    ranks: Ranks,
) -> Progress:
    """The newest sound checkpoint's state, or a fresh start where none was written yet.

    UserError if all are broken, or if this one cannot be gone on from as asked.
    """
    fresh = Progress(prompts_sha256=prompts.sha256(), lora=Lora.of(config))
    if not folder.resumed:
        return fresh
    path, faults = ranks.from_first(
        checkpoint.newest(folder.checkpoints) if ranks.is_first else None
    )
    if ranks.is_first:
        for fault in faults:
            print(f"{PROGRAM}: warning: {fault}", file=sys.stderr)
    if path is None:
        if not faults:  # stopped before its first checkpoint
            return fresh
        raise UserError(
            f"resume_from_checkpoint: {folder.checkpoints} holds no sound checkpoint; start anew "
            "in another --output_dir"
        )
    progress = checkpoint.load(path, policy, optimizer, ranks)
    batches = progress.old_logprobs or []
    if batches and len(batches) != config.gradient_accumulation_steps:
        raise UserError(
            f"resume_from_checkpoint: {path} lies between two passes over one rollout, cut into "
            f"{len(batches)} micro-batches; resume with --gradient_accumulation_steps "
            f"{len(batches)}"
        )
    if progress.prompts_sha256 != prompts.sha256():
        raise UserError(
            f"prompts: {config.prompts} holds other prompts than when {path} was written; put "
            "those back, or start a new run in another --output_dir"
        )
    return progress


def save(
    folder: run_folder.RunFolder,
    models: Models,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    config: TrainConfig,
    ranks: Ranks,
) -> None:
    """One checkpoint."""
    checkpoint.save(
        folder.checkpoints, models.policy, optimizer, progress, ranks, config.save_total_limit
    )


def show_samples(
    models: Models,
    prompts: PromptSource,
    judges: Judges,
    folder: run_folder.RunFolder,
    step: int,
    log: Log,
    config: TrainConfig,
    ranks: Ranks,
) -> None:
    """The picture grid of a step, and what was measured of it on the console. Rank 0 draws."""
    with ranks.first_does() as mine:
        if mine:
            samples = draw_samples(
                models.sampler, models.vq, prompts.prompts, judges.metrics, folder.samples, step,
                config,
            )  # fmt: skip
            means = "  ".join(f"{name} {value:.3f}" for name, value in samples.means().items())
            log.say(f"samples at step {step}: {means}")


def speed(started: float, rolled_out: float, config: TrainConfig, ranks: Ranks) -> dict[str, float]:
    """Wall times of a step on rank 0 (s), its images per second, and the peak memory (bytes)."""
    now = time.perf_counter()
    images = config.prompts_per_step * config.num_generations * ranks.world_size
    if ranks.device.type == "cuda":
        peak_memory_bytes = torch.cuda.max_memory_allocated()
    else:
        peak_memory_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "rollout_s": rolled_out - started,
        "train_s": now - rolled_out,
        "images_per_s": images / (now - started),
        "peak_memory_bytes": peak_memory_bytes,
    }


def main(config: TrainConfig) -> int:
    """`train`, with the user's errors told in one line; the exit code."""
    try:
        train(config)
    except UserError as error:
        return report_error(PROGRAM, error)
    except KeyboardInterrupt:  # the second Ctrl-C, which does not wait for a checkpoint
        return 128 + signal.SIGINT
    return 0


if __name__ == "__main__":
    distributed.leave(main(CONFIG))
