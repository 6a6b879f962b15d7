"""The paper's ablations in the small world: every arm trained from several seeds, then measured.

    python -m iris_fast.tiny.recipe.ablate [--runs runs/ablation] [--jobs 2] [--dry_run true]

An arm is the preset `tiny` with the changes in `ARMS`. Each arm and seed is one ordinary training
run in RUNS/ARM-SEED, measured on the held-out prompts as it is trained to draw, with the same
random numbers before and after and for every arm. What is finished is not done again: after a stop,
start the same command. RUNS/results.json holds what was measured, ablation.md and ablation.svg show
it.

Nothing is tuned here: all hyperparameters are the preset's, and were chosen on other seeds.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import yaml

from iris_fast.config import PRESETS, TrainConfig
from iris_fast.errors import UserError, report_error, require, writing
from iris_fast.run.log import read_metrics
from iris_fast.run.provenance import commit, hardware
from iris_fast.tiny import HELD_OUT_FILE
from iris_fast.tiny.recipe.ablation_page import draw, page

PROGRAM = "iris_fast.tiny.recipe.ablate"
Settings = dict[str, Any]

ARMS: dict[str, Settings] = {
    "nsc": {},
    "sc": {"reward_weights": [-1.0, -1.0]},
    "external": {"reward_funcs": ["tiny_verifier"]},
    "constant": {"reward_funcs": ["constant"]},
    "random": {"reward_funcs": ["random"]},
    "image_nsc_text_sc": {"reward_weights": [1.0, -1.0]},
    "image_sc_text_nsc": {"reward_weights": [-1.0, 1.0]},
    "backward_kl": {"reward_funcs": ["image_entropy", "text_entropy"]},
    "no_cot": {"cot": False},
    "direct": {"objective": "direct"},
}
# None of them, nor that of the measurement, is one that the preset was chosen with: 1 for its
# learning rate, 42 for its guidance.
SEEDS = [11, 12, 13]
MEASURING_SEED = 7
SAMPLES = 8
# One thread of a 2-core AMD EPYC: what --dry_run reckons with.
START_S, STEP_S, PICTURE_S = 5.0, 1.2, 0.04


@dataclass(frozen=True)
class Plan:
    """What is to be run. `settings` are shared by all arms; `samples` pictures a prompt."""

    folder: Path
    arms: dict[str, Settings] = field(default_factory=lambda: ARMS)
    seeds: list[int] = field(default_factory=lambda: SEEDS)
    settings: Settings = field(default_factory=dict)
    samples: int = SAMPLES
    prompts: Path = HELD_OUT_FILE
    jobs: int = 2

    def runs(self) -> list[Run]:
        """Seed by seed, so that a stop leaves whole rounds."""
        return [Run(self, arm, seed) for seed in self.seeds for arm in self.arms]


@dataclass(frozen=True)
class Run:
    """One arm from one seed."""

    plan: Plan
    arm: str
    seed: int

    @property
    def folder(self) -> Path:
        """Of the training run."""
        return self.plan.folder / f"{self.arm}-{self.seed}"

    @property
    def config(self) -> TrainConfig:
        """All settings; UserError where the given ones contradict each other."""
        return TrainConfig(**PRESETS["tiny"] | self._given())

    @property
    def before(self) -> Path:
        """What is measured of the untrained model, drawing as this run does."""
        config, samples = self.config, self.plan.samples
        name = f"before-cot_{config.cot}-cfg_{config.cfg_weight:g}-x{samples}.json".lower()
        return self.plan.folder / name

    @property
    def after(self) -> Path:
        """What is measured of the trained one."""
        return self.folder / f"held_out-x{self.plan.samples}.json"

    def check(self) -> None:
        """Raise UserError if the folder holds a run of other settings."""
        path = self.folder / "config.yaml"
        if not path.is_file():
            return
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
        for name, value in asdict(self.config).items():
            if name != "output_dir" and found.get(name) != value:
                raise UserError(
                    f"runs: {self.folder} was run with {name} {found.get(name)}, and now {name} is "
                    f"{value}; give the same, or another --runs folder"
                )

    def train(self) -> None:
        """Train to the end, or go on; UserError if that does not get there."""
        flags = [
            f"--{k}={v if isinstance(v, str) else json.dumps(v)}" for k, v in self._given().items()
        ]
        if (self.folder / "config.yaml").is_file():
            flags.append("--resume_from_checkpoint=true")
        call(["iris_fast.train", *flags], self.folder)
        rows = read_metrics(self.folder / "metrics.jsonl")
        if not rows or rows[-1]["step"] < self.config.max_steps:
            raise UserError(f"{self.folder} was stopped; start the same command again to go on")

    def measure(self, target: Path, *words: str) -> None:
        """The held-out prompts drawn as this run does, by the model that `words` name."""
        config, plan = self.config, self.plan
        words += ("--prompts", str(plan.prompts), "--samples", str(plan.samples))
        words += ("--cfg_weight", str(config.cfg_weight), "--seed", str(MEASURING_SEED))
        words += ("--cot",) * config.cot
        call(
            ["iris_fast.tiny.recipe.measure", *words, "--json", str(target)], target.with_suffix("")
        )

    def finish(self) -> str:
        """All of it that is not there yet; a line that says so."""
        if not self.after.is_file():
            self.train()
            self.measure(self.after, "--run", str(self.folder))
        return f"{self.folder.name}: accuracy {read(self.after)['mean']:.3f}"

    def _given(self) -> Settings:
        steps = self.plan.settings.get("max_steps", PRESETS["tiny"]["max_steps"])
        shared = {"preset": "tiny", "save_steps": 0, "sample_steps": steps} | self.plan.settings
        return (
            shared | self.plan.arms[self.arm] | {"seed": self.seed, "output_dir": str(self.folder)}
        )


def call(words: list[str], log: Path) -> None:
    """Run one of the package's commands on one thread, its output into LOG.log; UserError, with the
    last line of it, if it fails."""
    path = log.parent / f"{log.name}.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        done = subprocess.run(
            [sys.executable, "-m", *words],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=file,
            stderr=subprocess.STDOUT,
            check=False,
        )
    if done.returncode:
        last = path.read_text(encoding="utf-8").strip().rpartition("\n")[2]
        raise UserError(f"{words[0]} ended with {done.returncode}: {last} (all of it: {path})")


def read(path: Path) -> dict[str, float]:
    """What `iris_fast.tiny.recipe.measure --json` wrote of one setting."""
    (measured,) = json.loads(path.read_text(encoding="utf-8")).values()
    return measured


def ablate(plan: Plan) -> dict[str, Any]:
    """Do what is not done yet, and write RUNS/results.json, ablation.md and ablation.svg.

    A run that fails does not keep the others from going on, and is named in the results. UserError
    if a folder holds a run of other settings.
    """
    runs = plan.runs()
    for run in runs:
        run.check()
    with writing("runs", plan.folder):
        plan.folder.mkdir(parents=True, exist_ok=True)
    for run in {run.before: run for run in runs}.values():
        if not run.before.is_file():
            run.measure(run.before)
    results = gather(plan, finish_all(runs, plan.jobs))
    pages = {
        "results.json": json.dumps(results, indent=2) + "\n",
        "ablation.md": page(results),
        "ablation.svg": draw(results),
    }
    for name, text in pages.items():
        with writing("runs", plan.folder / name):
            (plan.folder / name).write_text(text, encoding="utf-8")
    return results


def finish_all(runs: list[Run], jobs: int) -> dict[str, str]:
    """Finish all runs, `jobs` at a time; the names of those that failed, and why."""
    failed = {}
    with ThreadPoolExecutor(jobs) as pool:
        futures = {pool.submit(run.finish): run.folder.name for run in runs}
        try:
            for future in as_completed(futures):
                try:
                    print(future.result(), flush=True)
                except UserError as error:
                    failed[futures[future]] = str(error)
                    print(f"{futures[future]}: {error}", file=sys.stderr, flush=True)
        except KeyboardInterrupt:  # the commands under way have had it too
            pool.shutdown(cancel_futures=True)
            raise
    return failed


def gather(plan: Plan, failed: dict[str, str]) -> dict[str, Any]:
    """All that was measured, with what it came from."""
    arms: dict[str, Any] = {
        arm: {"settings": settings, "before": {}, "after": {}}
        for arm, settings in plan.arms.items()
    }
    for run in plan.runs():
        arms[run.arm]["before"] = read(run.before)
        if run.after.is_file():
            kl = read_metrics(run.folder / "metrics.jsonl")[-1]["kl"]
            arms[run.arm]["after"][str(run.seed)] = read(run.after) | {"kl": round(kl, 4)}
    steps = plan.settings.get("max_steps", PRESETS["tiny"]["max_steps"])
    return {
        "commit": commit(),
        "hardware": hardware(),
        "steps": steps,
        "seeds": plan.seeds,
        "pictures": next(iter(arms.values()))["before"]["images"],
        "arms": arms,
        "failed": failed,
    }


def tell_plan(plan: Plan) -> None:
    """The runs, which are done, and about how long the others take."""
    left = [run for run in plan.runs() if not run.after.is_file()]
    for run in plan.runs():
        changes = " ".join(f"{name} {value}" for name, value in plan.arms[run.arm].items())
        state = "to do" if run in left else "done"
        print(f"{run.folder.name:24} {state:6} {changes}")
    pictures = plan.samples * len(plan.prompts.read_text(encoding="utf-8").splitlines())
    measuring = START_S + PICTURE_S * pictures
    seconds = sum(START_S + STEP_S * run.config.max_steps + measuring for run in left)
    seconds = seconds / plan.jobs + measuring * len(
        {run.before for run in plan.runs() if not run.before.is_file()}
    )
    print(f"{len(left)} runs to do, about {seconds / 60:.0f} min with {plan.jobs} side by side")


class _Parser(argparse.ArgumentParser):
    """Reports an error as a UserError: one line, as the other commands do."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; --help lists what there is")


def main() -> int:
    """The command; its exit code."""
    parser = _Parser(prog=PROGRAM, description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, default=Path("runs/ablation"), help="folder")
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side; default: 2")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="ARM")
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS, metavar="SEED")
    parser.add_argument("--max_steps", type=int, default=PRESETS["tiny"]["max_steps"])
    parser.add_argument("--samples", type=int, default=SAMPLES, help="pictures a held-out prompt")
    parser.add_argument("--dry_run", choices=("true", "false"), default="false")
    try:
        asked = parser.parse_args()
        for name in ("jobs", "samples"):
            require(getattr(asked, name) >= 1, name, getattr(asked, name), "give 1 or more")
        plan = Plan(
            folder=asked.runs,
            arms={name: ARMS[name] for name in ARMS if name in asked.arms},
            seeds=list(dict.fromkeys(asked.seeds)),
            settings={"max_steps": asked.max_steps},
            samples=asked.samples,
            jobs=asked.jobs,
        )
        if asked.dry_run == "true":
            tell_plan(plan)
            return 0
        failed = ablate(plan)["failed"]
        print(f"results: {plan.folder / 'ablation.md'}")
        return 1 if failed else 0
    except UserError as error:
        return report_error(PROGRAM, error)
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
