"""The sample grids of a run: the same prompts and random numbers every time.

samples/step_00050.png    one row of images per prompt
samples/step_00050.json   the prompts, their chains of thought, the metrics of every image
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from PIL import Image
from torch import Tensor

from iris_fast.errors import atomic_write
from iris_fast.models.images import grid, save_png, strips
from iris_fast.records import Prompt, Rollout
from iris_fast.rewards.intrinsic import reduce_tokens
from iris_fast.rewards.score import Scorer
from iris_fast.rollout.sampler import Sampler

SAMPLES_PER_PROMPT = 4


@dataclass(frozen=True)
class Samples:
    """The content of one grid; `cot` and `metrics` hold one entry per image, row by row."""

    step: int
    prompts: list[str]
    per_prompt: int
    cot: list[str]
    metrics: dict[str, list[float]]

    def means(self) -> dict[str, float]:
        """Average each metric over all images."""
        return {name: sum(values) / len(values) for name, values in self.metrics.items()}

    def of_prompt(self, row: int) -> Self:
        """Select the samples of one prompt."""
        own = slice(row * self.per_prompt, (row + 1) * self.per_prompt)
        metrics = {name: values[own] for name, values in self.metrics.items()}
        return Samples(self.step, [self.prompts[row]], self.per_prompt, self.cot[own], metrics)


def write_samples(
    sampler: Sampler,
    scorer: Scorer,
    prompts: list[Prompt],
    folder: Path,
    step: int,
    num_sample_prompts: int,
) -> Path:
    """Generate the sample grid of a step into `folder` and return the path of its image.

    The prompts shown are evenly spaced over all `prompts`.
    """
    count = min(num_sample_prompts, len(prompts))
    chosen = [prompts[n * len(prompts) // count] for n in range(count)]
    repeated = [prompt for prompt in chosen for _ in range(SAMPLES_PER_PROMPT)]
    # Negative sample numbers: random streams that no training sample uses.
    rollout = sampler.rollout(repeated, [-1 - n for n in range(len(repeated))])
    images = scorer.decode(rollout.codes_NI)
    measured = nsc_per_token(rollout) | scorer.measure(repeated, images)
    samples = Samples(
        step=step,
        prompts=[prompt.text for prompt in chosen],
        per_prompt=SAMPLES_PER_PROMPT,
        cot=rollout.cot_texts,
        metrics={name: values.tolist() for name, values in measured.items()},
    )
    starts = range(0, len(images), SAMPLES_PER_PROMPT)
    rows = [images[start : start + SAMPLES_PER_PROMPT] for start in starts]
    path = folder / f"step_{step:05d}.png"
    save_png(grid(rows, samples.prompts), path)
    with atomic_write("output_dir", path.with_suffix(".json")) as partial:
        partial.write_text(json.dumps(asdict(samples)), encoding="utf-8")
    return path


def nsc_per_token(rollout: Rollout) -> dict[str, Tensor]:
    """`image_nsc`, with a chain of thought also `text_nsc`: means over each sample's tokens [N]."""
    return {
        name: reduce_tokens(trace.conditional.nsc, trace.mask, "mean")
        for name, trace in (("image_nsc", rollout.image), ("text_nsc", rollout.text))
        if trace.mask.numel()
    }


def read_samples(path: Path) -> Samples:
    """Read what `write_samples` stored with the grid at `path`."""
    return Samples(**json.loads(path.with_suffix(".json").read_text(encoding="utf-8")))


def samples_of_same_prompts(folder: Path) -> list[tuple[Samples, Path]]:
    """Read all grids that show the same prompts as the last one, in order, with their paths.

    A resumed run may show another number of prompts than before.
    """
    paths = sorted(folder.glob("step_*.png"))
    grids = [(read_samples(path), path) for path in paths if path.with_suffix(".json").is_file()]
    return [(samples, path) for samples, path in grids if samples.prompts == grids[-1][0].prompts]


def read_strips(samples: Samples, path: Path) -> list[Image.Image]:
    """The rows of images of the grid at `path`, one per prompt."""
    with Image.open(path) as sheet:
        return strips(sheet, len(samples.prompts), samples.per_prompt)
