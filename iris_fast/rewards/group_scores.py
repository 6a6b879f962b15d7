"""Rewards and metrics of images sampled in any batches, for `generate --alignment true`."""

import json
from pathlib import Path

import torch
from PIL.Image import Image
from torch import Tensor

from iris_fast.config import GenerateConfig
from iris_fast.distributed import Ranks
from iris_fast.errors import atomic_write
from iris_fast.records import Prompt, Rollout
from iris_fast.rewards.alignment import TOTAL, align, alignment_lines, alignment_warnings
from iris_fast.rewards.score import Scorer


class GroupScores:
    """The value of every reward term and metric for `group` images of each of `prompts` prompts.

    Functions of images are called with the images of one prompt at a time, because they may compare
    them; so no value depends on the batches.
    """

    def __init__(self, scorer: Scorer, prompts: int, group: int) -> None:
        self._scorer, self._group = scorer, group
        names = [*scorer.weights, *(f"metrics/{name}" for name in scorer.metrics)]
        self._values = {name: torch.zeros(prompts * group) for name in names}
        self._waiting: list[tuple[int, Prompt, Image]] = []  # of a prompt that is not complete

    def add(self, rollout: Rollout, images: list[Image]) -> None:
        """Score the next samples; a rank's samples come prompt by prompt."""
        for name, values in self._scorer.intrinsic_terms(rollout).items():
            self._values[name][rollout.sample_numbers] = values
        self._waiting += zip(rollout.sample_numbers, rollout.prompts, images, strict=True)
        while len(self._waiting) >= self._group:
            complete = self._waiting[: self._group]
            del self._waiting[: self._group]
            numbers, prompts, own_images = map(list, zip(*complete, strict=True))
            measured = self._scorer.measure(prompts, own_images)
            found = self._scorer.external_terms(prompts, own_images)
            found |= {f"metrics/{name}": values for name, values in measured.items()}
            for name, values in found.items():
                self._values[name][numbers] = values

    def gather(self, ranks: Ranks) -> tuple[dict[str, Tensor], Tensor, dict[str, Tensor]]:
        """Terms, their weighted sum and metrics of all ranks' samples, [prompts * group] each."""
        values = {name: ranks.gather(v[None]).sum(dim=0) for name, v in self._values.items()}
        terms = {name: values[name] for name in self._scorer.weights}
        metrics = {name: values[f"metrics/{name}"] for name in self._scorer.metrics}
        return terms, self._scorer.total(terms), metrics


def write_alignment(
    scored: tuple[dict[str, Tensor], Tensor, dict[str, Tensor]], path: Path, config: GenerateConfig
) -> None:
    """Print the alignment of what `GroupScores.gather` returned, and write it with all values."""
    terms, total_N, metrics = scored
    group = config.num_images_per_prompt
    alignments = align(terms, total_N, metrics, group)
    for line in [*alignment_lines(alignments), *alignment_warnings(alignments).values()]:
        print(line)
    values = {TOTAL: total_N, **terms, **metrics}
    table = {
        "model": config.model,
        "cfg_weight": config.cfg_weight,
        "temperature": config.temperature,
        "cot": config.cot,
        "seed": config.seed,
        "reward_weights": dict(zip(terms, config.reward_weights, strict=True)),
        "prompts": len(total_N) // group,
        "images_per_prompt": group,
        "alignment": {name: found._asdict() for name, found in alignments.items()},
        "values": {name: column.view(-1, group).tolist() for name, column in values.items()},
    }
    with atomic_write("output_dir", path) as partial:
        partial.write_text(json.dumps(table) + "\n", encoding="utf-8")
