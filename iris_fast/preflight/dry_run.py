"""`--dry_run true`, and the same estimate as a check before a run starts."""

from pathlib import Path

from iris_fast.config import TrainConfig
from iris_fast.distributed import Ranks
from iris_fast.models.templates import TEMPLATES, image_prompt_ids
from iris_fast.preflight.disk import check_disk
from iris_fast.preflight.estimate import Estimate, check_fits, estimate, this_gpu
from iris_fast.preflight.inputs import Inputs, check_device, open_inputs

PROMPTS_COUNTED = 100


def dry_run(config: TrainConfig, ranks: Ranks) -> None:
    """Print what the run will need; UserError if it does not fit."""
    if ranks.device.type == "cuda":  # otherwise the estimate is for another machine
        check_device(config, ranks.device)
    needs = estimate_run(config, open_inputs(config, None), ranks)
    if ranks.is_first:
        print(needs.table())
    check_fits(needs, config)
    if config.output_dir:
        with ranks.on_first_rank() as mine:
            if mine:
                check_disk(config, needs.checkpoint_bytes, Path(config.output_dir))


def estimate_run(config: TrainConfig, inputs: Inputs, ranks: Ranks) -> Estimate:
    """The estimate for these inputs, with the mean length of their first prompts."""
    tokenizer, template = inputs.loaded.tokenizer, TEMPLATES[config.template]
    counted = inputs.prompts[:PROMPTS_COUNTED]
    lengths = [len(image_prompt_ids(tokenizer, template, prompt.text)) for prompt in counted]
    mean_length = round(sum(lengths) / len(lengths))
    gpu, held_out = this_gpu(ranks.device), len(inputs.held_out)
    return estimate(config, inputs.loaded.config, ranks.world_size, gpu, mean_length, held_out)


def keeps_rollout_memory(config: TrainConfig, inputs: Inputs, ranks: Ranks) -> bool:
    """Whether caches and CUDA graphs stay allocated between rollouts: on a GPU, if they fit."""
    on_gpu = ranks.device.type == "cuda"
    return on_gpu and estimate_run(config, inputs, ranks).caches_fit_during_training


def open_checked(config: TrainConfig, ranks: Ranks, run_folder: Path) -> Inputs:
    """Open model, mapped from its files, and prompts; UserError if a GPU is used and cannot hold
    the run, or if the disk of `run_folder` cannot hold its checkpoints."""
    inputs = open_inputs(config, None)
    needs = estimate_run(config, inputs, ranks)
    if ranks.device.type == "cuda":
        check_fits(needs, config)
    with ranks.on_first_rank() as mine:
        if mine:
            check_disk(config, needs.checkpoint_bytes, run_folder)
    return inputs
