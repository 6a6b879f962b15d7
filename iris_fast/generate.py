"""Images for people: `python -m iris_fast.generate --model FOLDER --prompts FILE`.

Under torchrun the prompts are shared out over the ranks. An image depends on its prompt, its number
and the seed; on the batch size and the number of ranks only where the logits' round-off decides
between two tokens.
"""

from __future__ import annotations

from iris_fast.cli import parse_command_line
from iris_fast.config import GenerateConfig

PROGRAM = "iris_fast.generate"
# Before torch is imported: a typo is answered at once.
CONFIG = parse_command_line(GenerateConfig, PROGRAM) if __name__ == "__main__" else None

from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from iris_fast import distributed
from iris_fast.distributed import Ranks
from iris_fast.errors import UserError, report_error, writing
from iris_fast.models.images import decode_images, save_png
from iris_fast.preflight.inputs import check_device, open_inputs, set_attention
from iris_fast.rollout.sampler import Sampler

COLLECTIVE_TIMEOUT_S = 3600.0


def generate(config: GenerateConfig) -> None:
    """Draw every prompt `num_images_per_prompt` times into `output_dir`; UserError as `train`."""
    with distributed.start(config.device, COLLECTIVE_TIMEOUT_S) as ranks:
        check_device(config, ranks.device)
        inputs = open_inputs(config, torch.bfloat16 if config.bf16 else torch.float32)
        count = config.num_images_per_prompt
        paths = [
            Path(config.output_dir) / f"{prompt:05d}_{image:02d}.png"
            for prompt in range(len(inputs.prompts))
            for image in range(count)
        ]
        refuse_to_overwrite(config, paths, ranks)
        opened = inputs.checkpoint
        model, vq = opened.model.to(ranks.device), opened.vq.to(ranks.device)
        model.requires_grad_(False)
        set_attention(model, config, ranks.device)
        sampler = Sampler(model, opened.tokenizer, config, inputs.image_tokens, config.greedy)
        mine = range(ranks.rank, len(paths), ranks.world_size)
        codes = torch.zeros(len(paths), inputs.image_tokens, dtype=torch.int64)
        bar = tqdm(
            total=len(mine),
            unit="image",
            disable=None if ranks.is_first else True,
            dynamic_ncols=True,
        )
        for start in range(0, len(mine), config.batch_size):
            numbers = list(mine[start : start + config.batch_size])
            samples = [inputs.prompts[number // count] for number in numbers]
            rollout = sampler.rollout(samples, numbers)
            codes[numbers] = rollout.codes_NI
            for number, picture in zip(numbers, decode_images(vq, rollout.codes_NI), strict=True):
                save_png(picture, paths[number])
            bar.update(len(numbers))
        bar.close()
        codes = ranks.gather(codes[None]).sum(dim=0)
        if ranks.is_first:
            if config.save_codes:
                shape = (len(inputs.prompts), count, inputs.image_tokens)
                with writing("save_codes", Path(config.save_codes)):
                    np.savez(config.save_codes, codes=codes.view(shape).numpy())
            print(f"{len(paths)} images in {config.output_dir}")


def refuse_to_overwrite(config: GenerateConfig, paths: list[Path], ranks: Ranks) -> None:
    """UserError if an image, or the codes file, is there already, or the folder is unwritable."""
    targets = [*paths, *([Path(config.save_codes)] if config.save_codes else [])]
    with ranks.on_first_rank() as mine:
        if mine:
            standing = [path for path in targets if path.exists()]
            if standing and not config.overwrite:
                setting = "save_codes" if standing[0].suffix == ".npz" else "output_dir"
                raise UserError(
                    f"{setting}: {standing[0]} is there already and is not written over; name "
                    f"another --{setting}, or add --overwrite true"
                )
            for path in {target.parent: target for target in targets}.values():
                folder = path.parent
                with writing("save_codes" if path.suffix == ".npz" else "output_dir", folder):
                    folder.mkdir(parents=True, exist_ok=True)
                    probe = folder / ".iris_fast_probe"
                    probe.touch()
                    probe.unlink()


def main(config: GenerateConfig) -> int:
    """`generate`, with the user's errors told in one line; the exit code."""
    try:
        generate(config)
    except UserError as error:
        return report_error(PROGRAM, error)
    return 0


if __name__ == "__main__":
    distributed.leave(main(CONFIG))
