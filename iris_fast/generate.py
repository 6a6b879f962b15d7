"""Generate images: `python -m iris_fast.generate --model FOLDER --prompts FILE`.

Under torchrun the images are distributed over the ranks. An image depends on its prompt, its number
and the seed only; batch size and number of ranks matter only where rounding of the logits decides
between two tokens.

`--alignment true` also compares the rewards of the images with their metrics, without training:
see `iris_fast.rewards.alignment`.
"""

from iris_fast.cli import parse_command_line
from iris_fast.config import GenerateConfig

PROGRAM = "iris_fast.generate"
# Parsed before torch is imported, so that errors are reported at once.
CONFIG = parse_command_line(GenerateConfig, PROGRAM) if __name__ == "__main__" else None

import functools
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from iris_fast import distributed
from iris_fast.distributed import Ranks
from iris_fast.errors import UserError, report_error, writing
from iris_fast.models.images import decode_images, save_png
from iris_fast.preflight.inputs import Inputs, check_device, open_inputs, set_attention
from iris_fast.rewards.group_scores import GroupScores, write_alignment
from iris_fast.rewards.score import Scorer, load_rewards
from iris_fast.rollout.sampler import Sampler

COLLECTIVE_TIMEOUT_S = 3600.0
ALIGNMENT_FILE = "alignment.json"


def generate(config: GenerateConfig) -> None:
    """Write `num_images_per_prompt` images per prompt to `output_dir`; UserError as `train`."""
    with distributed.start(config.device, COLLECTIVE_TIMEOUT_S) as ranks:
        check_device(config, ranks.device)
        rewards = load_rewards(config.reward_funcs or []) if config.alignment else {}
        inputs = open_inputs(config, torch.bfloat16 if config.bf16 else torch.float32)
        count = config.num_images_per_prompt
        paths = [
            Path(config.output_dir) / f"{prompt:05d}_{image:02d}.png"
            for prompt in range(len(inputs.prompts))
            for image in range(count)
        ]
        opened = inputs.loaded
        decode = functools.partial(decode_images, opened.vq)
        scores = None
        if config.alignment:
            scorer = Scorer.of(config, rewards, inputs.prompts, decode)
            scores = GroupScores(scorer, len(inputs.prompts), count)
        with ranks.on_first_rank() as mine:
            if mine:
                check_targets(config, paths)
        model, _ = opened.model.to(ranks.device), opened.vq.to(ranks.device)
        model.requires_grad_(False)
        set_attention(model, config, ranks.device)
        sampler = Sampler(model, opened.tokenizer, config, inputs.image_tokens, config.greedy)
        own = own_images(config, inputs, ranks)
        codes = torch.zeros(len(paths), inputs.image_tokens, dtype=torch.int64)
        # disable=None: no bar where standard error is not a terminal.
        disable = None if ranks.is_first else True
        with tqdm(total=len(own), unit="image", disable=disable, dynamic_ncols=True) as bar:
            for start in range(0, len(own), config.batch_size):
                numbers = own[start : start + config.batch_size]
                samples = [inputs.prompts[number // count] for number in numbers]
                rollout = sampler.rollout(samples, numbers)
                codes[numbers] = rollout.codes_NI
                images = decode(rollout.codes_NI)
                for number, image in zip(numbers, images, strict=True):
                    save_png(image, paths[number])
                if scores:
                    scores.add(rollout, images)
                bar.update(len(numbers))
        codes = ranks.gather(codes[None]).sum(dim=0)
        if ranks.is_first:
            if config.save_codes:
                shape = (len(inputs.prompts), count, inputs.image_tokens)
                with writing("save_codes", Path(config.save_codes)):
                    np.savez(config.save_codes, codes=codes.view(shape).numpy())
            print(f"{len(paths)} images in {config.output_dir}")
        if scores:
            values = scores.gather(ranks)
            with ranks.on_first_rank() as mine:
                if mine:
                    write_alignment(values, Path(config.output_dir) / ALIGNMENT_FILE, config)


def own_images(config: GenerateConfig, inputs: Inputs, ranks: Ranks) -> list[int]:
    """The numbers of this rank's images. With `alignment` a prompt's are all on one rank: rewards
    may compare them."""
    count = config.num_images_per_prompt
    if not config.alignment:
        return list(range(ranks.rank, len(inputs.prompts) * count, ranks.world_size))
    own = range(ranks.rank, len(inputs.prompts), ranks.world_size)
    return [prompt * count + image for prompt in own for image in range(count)]


def check_targets(config: GenerateConfig, images: list[Path]) -> None:
    """UserError if a file to be written exists already, or a folder is not writable."""
    targets = {"output_dir": images}
    if config.alignment:
        targets["output_dir"] = [*images, Path(config.output_dir) / ALIGNMENT_FILE]
    if config.save_codes:
        targets["save_codes"] = [Path(config.save_codes)]
    for setting, paths in targets.items():
        existing = [path for path in paths if path.exists()]
        if existing and not config.overwrite:
            raise UserError(
                f"{setting}: {existing[0]} exists already and is not overwritten; name another "
                f"--{setting}, or add --overwrite true"
            )
    for setting, paths in targets.items():
        folder = paths[0].parent
        with writing(setting, folder):
            folder.mkdir(parents=True, exist_ok=True)
            probe = folder / ".iris_fast_probe"
            probe.touch()
            probe.unlink()


def main(config: GenerateConfig) -> int:
    """`generate`, with UserErrors reported in one line; the exit code."""
    try:
        generate(config)
    except UserError as error:
        return report_error(PROGRAM, error)
    return 0


if __name__ == "__main__":
    distributed.leave(main(CONFIG))
