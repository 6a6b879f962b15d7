"""Held-out prompts, measured before and after training with the same random numbers.

eval/step_00050.json    the prompts, the metrics of every image

The standard error of a mean over images is that over prompts: images of one prompt are alike. With
y_p the mean over the images of prompt p of P, or its difference between two evaluations,

    value = mean_p(y_p),    standard error = sqrt(sum_p (y_p - value)^2 / (P - 1) / P)

The random numbers are equal, so differences are paired: what makes a prompt hard drops out.
"""

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple, Self

import torch
from torch import Tensor
from tqdm import tqdm

from iris_fast.config import TrainConfig
from iris_fast.distributed import Ranks
from iris_fast.errors import atomic_write
from iris_fast.records import Prompt
from iris_fast.rewards import external
from iris_fast.rewards.score import Scorer
from iris_fast.rollout.sampler import Sampler
from iris_fast.run.samples import nsc_per_token

# Sample n has the number FIRST_NUMBER - n: random streams of no training sample (from 0 up) and of
# no sample grid (from -1 down).
FIRST_NUMBER = -(2**40)


class Mean(NamedTuple):
    """A mean over prompts and its standard error, None for a single prompt."""

    value: float
    standard_error: float | None

    @classmethod
    def of(cls, values_P: Tensor) -> Self:
        """Average one value per prompt."""
        values, count = values_P.double(), len(values_P)
        error = (values.std() / count**0.5).item() if count > 1 else None
        return cls(values.mean().item(), error)

    @property
    def direction(self) -> int:
        """1 above 0 by more than two standard errors, -1 below, 0 otherwise."""
        if self.standard_error is None or abs(self.value) <= 2 * self.standard_error:
            return 0
        return int(math.copysign(1, self.value))

    def text(self, sign: str = "") -> str:
        """The mean and its standard error; `sign` "+" for a difference."""
        error = "?" if self.standard_error is None else f"{self.standard_error:.3f}"
        return f"{self.value:{sign}.3f} ± {error}"


@dataclass(frozen=True)
class Evaluation:
    """One evaluation; `metrics` hold one entry per image, prompt by prompt."""

    step: int
    prompts: list[str]
    per_prompt: int
    metrics: dict[str, list[float]]

    @property
    def size(self) -> str:
        """The number of images in words."""
        return f"{len(self.prompts)} prompts x {self.per_prompt} images"

    def mean(self, metric: str) -> Mean:
        """The mean of a metric."""
        return Mean.of(self._by_prompt(metric))

    def difference(self, before: Self, metric: str) -> Mean:
        """The change of a metric since `before`, an evaluation of the same prompts."""
        return Mean.of(self._by_prompt(metric) - before._by_prompt(metric))

    def compares_with(self, other: Self) -> bool:
        """Whether both are of the same prompts and images."""
        return (self.prompts, self.per_prompt) == (other.prompts, other.per_prompt)

    def _by_prompt(self, metric: str) -> Tensor:
        values = torch.tensor(self.metrics[metric], dtype=torch.float64)
        return values.view(-1, self.per_prompt).mean(dim=1)


@dataclass(frozen=True)
class Comparison:
    """A metric before and after training."""

    metric: str
    first: Evaluation
    last: Evaluation

    @property
    def before(self) -> Mean:
        """In the first evaluation."""
        return self.first.mean(self.metric)

    @property
    def after(self) -> Mean:
        """In the last one."""
        return self.last.mean(self.metric)

    @property
    def difference(self) -> Mean:
        """The change of a prompt's mean."""
        return self.last.difference(self.first, self.metric)

    @property
    def verdict(self) -> str:
        """The difference in words."""
        if self.difference.standard_error is None:
            return "not known: one prompt"
        return {1: "higher", 0: "no clear change", -1: "lower"}[self.difference.direction]

    def __str__(self) -> str:
        return (
            f"held-out {self.metric}: {self.before.value:.3f} -> {self.after.value:.3f}, "
            f"difference {self.difference.text('+')} (standard error over prompts)"
        )


@dataclass(frozen=True)
class HeldOut:
    """The held-out `prompts` of a run, and what measures `per_prompt` images of each: at most
    `batch` at a time and rank, as many as a rollout of a step samples."""

    prompts: list[Prompt]
    per_prompt: int
    batch: int
    sampler: Sampler
    scorer: Scorer

    @classmethod
    def of(
        cls, prompts: list[Prompt], config: TrainConfig, sampler: Sampler, scorer: Scorer
    ) -> Self | None:
        """As configured; None without prompts.

        UserError, before anything is sampled, for a metric that does not accept their fields.
        """
        if not prompts:
            return None
        for name, function in scorer.metrics.items():
            external.wanted_fields(name, function, prompts, "metric_funcs")
        return cls(prompts, config.num_generations_eval, config.samples_per_step, sampler, scorer)

    def evaluate(self, step: int, ranks: Ranks, pause: Callable[[], None]) -> Evaluation:
        """Sample and measure all images, shared by the ranks; a collective.

        `pause` is called several times per batch and once per prompt, equally often on every rank;
        it may raise to stop the evaluation. UserError as for `Scorer.measure`.
        """
        pause()
        # Every rank has equally many prompts: where they run out, some are measured twice.
        count, world_size = len(self.prompts), ranks.world_size
        own = [p % count for p in range(ranks.rank, count + -count % world_size, world_size)]
        codes_NI, nsc = self._sample(own, pause, shows_bar=ranks.is_first)
        columns: dict[str, list[Tensor]] = {name: [] for name in self.scorer.metrics}
        for place, prompt in enumerate(own):
            pause()
            images = self.scorer.decode(codes_NI[place * self.per_prompt :][: self.per_prompt])
            # One prompt at a time: a metric may compare images, and so no value depends on ranks.
            repeated = [self.prompts[prompt]] * self.per_prompt
            for name, values in self.scorer.measure(repeated, images).items():
                columns[name].append(values)
        measured = {name: torch.cat(values) for name, values in columns.items()} | nsc
        own_KGM = torch.stack(list(measured.values()), dim=1).double()
        own_KGM = own_KGM.view(len(own), self.per_prompt, -1)
        gathered = ranks.gather(own_KGM).view(world_size, *own_KGM.shape)
        table = gathered.transpose(0, 1).flatten(0, 1)[:count].flatten(0, 1)
        metrics = {name: column.tolist() for name, column in zip(measured, table.T, strict=True)}
        return Evaluation(step, [p.text for p in self.prompts], self.per_prompt, metrics)

    def _sample(
        self, own: list[int], pause: Callable[[], None], shows_bar: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Codes [N, I] and NSC per token [N] of the images of these prompts, given by number."""
        numbers = [prompt * self.per_prompt + n for prompt in own for n in range(self.per_prompt)]
        codes_NI = torch.zeros(len(numbers), self.sampler.image_tokens, dtype=torch.int64)
        nsc: dict[str, Tensor] = {}
        size = min(self.batch, len(numbers))
        bar = tqdm(
            range(0, len(numbers), size),
            desc="held-out prompts",
            disable=None if shows_bar else True,  # None: without a terminal
            leave=False,
        )
        for start in bar:
            # All batches are of one size, for which caches and CUDA graphs are kept: the last one
            # repeats samples of the one before.
            rows = slice(min(start, len(numbers) - size), start + size)
            samples = [self.prompts[number // self.per_prompt] for number in numbers[rows]]
            streams = [FIRST_NUMBER - number for number in numbers[rows]]
            rollout = self.sampler.rollout(samples, streams, pause)
            codes_NI[rows] = rollout.codes_NI
            for name, values in nsc_per_token(rollout).items():
                nsc.setdefault(name, torch.zeros(len(numbers)))[rows] = values
        return codes_NI, nsc


class Evaluations:
    """The evaluations of a run that is at `step`, in `folder`: known on rank 0, which writes them.

    Files of later steps, left by a run that continued past its last checkpoint, are deleted.
    """

    def __init__(self, folder: Path, step: int, ranks: Ranks) -> None:
        self._folder, self._ranks = folder, ranks
        self._found: list[Evaluation] = []
        with ranks.on_first_rank() as mine:
            if mine:
                for path in evaluation_files(folder):
                    if _step(path) > step:
                        path.unlink()
                self._found = read_evaluations(folder)

    def are_missing(self, held_out: HeldOut, step: int, is_due: bool) -> bool:
        """Whether the prompts are to be evaluated at `step`: if that `is_due`, or if they have not
        been evaluated at all, and not if they have been at this step; a collective."""
        texts = [prompt.text for prompt in held_out.prompts]
        known = [found for found in self._found if found.prompts == texts]
        known = [found for found in known if found.per_prompt == held_out.per_prompt]
        known = [found for found in known if found.metrics.keys() >= held_out.scorer.metrics.keys()]
        is_done = any(found.step == step for found in known)
        return self._ranks.broadcast((is_due or not known) and not is_done)

    def add(self, evaluation: Evaluation) -> None:
        """Write an evaluation, on rank 0. UserError, on every rank, if that fails."""
        with self._ranks.on_first_rank() as mine:
            if mine:
                path = self._folder / f"step_{evaluation.step:05d}.json"
                with atomic_write("output_dir", path) as partial:
                    path.parent.mkdir(exist_ok=True)
                    partial.write_text(json.dumps(asdict(evaluation)), encoding="utf-8")
                self._found = read_evaluations(self._folder)


def evaluation_files(folder: Path) -> list[Path]:
    """The files of all evaluations, in the order of their steps."""
    named = [path for path in folder.glob("step_*.json") if path.stem[5:].isdecimal()]
    return sorted(named, key=_step)


def _step(path: Path) -> int:
    return int(path.stem.removeprefix("step_"))


def read_evaluations(folder: Path) -> list[Evaluation]:
    """Read all evaluations, in the order of their steps."""
    texts = (path.read_text(encoding="utf-8") for path in evaluation_files(folder))
    return [Evaluation(**json.loads(text)) for text in texts]


def comparable(evaluations: list[Evaluation]) -> list[Evaluation]:
    """Those of the same prompts and images as the last one: a resumed run may have others."""
    return [found for found in evaluations if found.compares_with(evaluations[-1])]


def compare(evaluations: list[Evaluation]) -> list[Comparison]:
    """The first and the last comparable evaluation, metric by metric; none of a single one."""
    found = comparable(evaluations)
    if len(found) < 2:
        return []
    first, last = found[0], found[-1]
    return [Comparison(name, first, last) for name in last.metrics if name in first.metrics]
