"""Run the paper's ablations in the synthetic world: train every arm from several seeds, measure.

    python -m iris_fast.tiny.recipe.ablate [--runs runs/ablation] [--jobs 2] [--dry_run true]

An arm is the preset `tiny` with the changes in `ARMS`. Each arm and seed is one training run in
RUNS/ARM-SEED. It is measured on the held-out prompts with its own sampling settings and with the
same random numbers before and after training and in every arm. After an interruption, the same
command runs what is missing. The measurements are in RUNS/results.json; ablation.md and
ablation.svg show them.

Nothing is tuned here: all hyperparameters are those of the preset, chosen on other seeds.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from iris_fast.cli import CommandParser
from iris_fast.config import PRESETS, TrainConfig
from iris_fast.errors import UserError, report_error, require, writing
from iris_fast.run.log import read_metrics
from iris_fast.run.provenance import commit, hardware
from iris_fast.tiny import HELD_OUT_FILE
from iris_fast.tiny.recipe.ablation_page import figure, page

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
# None of these is a seed that the preset was chosen with: 1 (learning rate) and 42 (guidance).
SEEDS = [11, 12, 13]
MEASUREMENT_SEED = 7
SAMPLES = 8
# Seconds on one thread of a 2-core AMD EPYC, for the estimate of --dry_run.
STARTUP_S, STEP_S, IMAGE_S = 5.0, 1.2, 0.04


@dataclass(frozen=True)
class Plan:
    """The runs of an ablation: `settings` of all arms, `samples` images per held-out prompt."""

    folder: Path
    arms: dict[str, Settings] = field(default_factory=lambda: ARMS)
    seeds: list[int] = field(default_factory=lambda: SEEDS)
    settings: Settings = field(default_factory=dict)
    samples: int = SAMPLES
    prompts: Path = HELD_OUT_FILE
    jobs: int = 2

    def runs(self) -> list[Run]:
        """All runs, grouped by seed, so that an interruption leaves complete seeds."""
        return [Run(self, arm, seed) for seed in self.seeds for arm in self.arms]


@dataclass(frozen=True)
class Run:
    """One arm with one seed."""

    plan: Plan
    arm: str
    seed: int

    @property
    def folder(self) -> Path:
        """Folder of the training run."""
        return self.plan.folder / f"{self.arm}-{self.seed}"

    @property
    def config(self) -> TrainConfig:
        """All settings; UserError if they contradict each other."""
        return TrainConfig(**PRESETS["tiny"] | self._overrides())

    @property
    def before_file(self) -> Path:
        """Measurements of the initial model with this run's sampling settings."""
        config, samples = self.config, self.plan.samples
        name = f"before-cot_{config.cot}-cfg_{config.cfg_weight:g}-x{samples}.json".lower()
        return self.plan.folder / name

    @property
    def after_file(self) -> Path:
        """Measurements of the trained model."""
        return self.folder / f"held_out-x{self.plan.samples}.json"

    def check(self) -> None:
        """Raise UserError if the folder contains a run with other settings."""
        path = self.folder / "config.yaml"
        if not path.is_file():
            return
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
        for name, value in asdict(self.config).items():
            if name != "output_dir" and found.get(name) != value:
                raise UserError(
                    f"runs: {self.folder} has {name} {found.get(name)}, this command {name} "
                    f"{value}; give the same settings or another --runs folder"
                )

    def train(self) -> None:
        """Start or resume training; UserError if it stops before the last step."""
        flags = [
            f"--{k}={v if isinstance(v, str) else json.dumps(v)}"
            for k, v in self._overrides().items()
        ]
        if (self.folder / "config.yaml").is_file():
            flags.append("--resume_from_checkpoint=true")
        log = self.folder.parent / f"{self.folder.name}.log"
        run_command(["iris_fast.train", *flags], log)
        rows = read_metrics(self.folder / "metrics.jsonl")
        if not rows or rows[-1]["step"] < self.config.max_steps:
            raise UserError(
                f"runs: {self.folder} was interrupted; run the same command to resume it"
            )

    def measure(self, target: Path, *arguments: str) -> None:
        """Measure the initial model, or the one that `arguments` name, and write `target`."""
        config, plan = self.config, self.plan
        command = ["iris_fast.tiny.recipe.measure", *arguments, "--json", str(target)]
        command += ["--prompts", str(plan.prompts), "--samples", str(plan.samples)]
        command += ["--cfg_weight", str(config.cfg_weight), "--seed", str(MEASUREMENT_SEED)]
        if config.cot:
            command.append("--cot")
        run_command(command, target.with_suffix(".log"))

    def finish(self) -> str:
        """Train and measure unless that is done already; return a summary line."""
        if not self.after_file.is_file():
            self.train()
            self.measure(self.after_file, "--run", str(self.folder))
        return f"{self.folder.name}: accuracy {read_measurements(self.after_file)['mean']:.3f}"

    def _overrides(self) -> Settings:
        steps = self.plan.settings.get("max_steps", PRESETS["tiny"]["max_steps"])
        shared = {"preset": "tiny", "save_steps": 0, "sample_steps": steps, "eval_prompts": "none"}
        shared |= self.plan.settings
        return (
            shared | self.plan.arms[self.arm] | {"seed": self.seed, "output_dir": str(self.folder)}
        )


def run_command(command: list[str], log: Path) -> None:
    """Run a module with its arguments on one thread and write its output to `log`.

    Raises UserError with the last line of the output if the command fails.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w", encoding="utf-8") as file:
        finished = subprocess.run(
            [sys.executable, "-m", *command],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=file,
            stderr=subprocess.STDOUT,
            check=False,
        )
    if finished.returncode:
        last = log.read_text(encoding="utf-8").strip().rpartition("\n")[2]
        raise UserError(f"{command[0]} exited with {finished.returncode}: {last} (log: {log})")


def read_measurements(path: Path) -> dict[str, float]:
    """Read a file that `iris_fast.tiny.recipe.measure --json` wrote for one setting."""
    (measured,) = json.loads(path.read_text(encoding="utf-8")).values()
    return measured


def ablate(plan: Plan) -> dict[str, Any]:
    """Run what is missing; write RUNS/results.json, ablation.md and ablation.svg.

    A failed run does not stop the others and is listed in the results. Raises UserError if a folder
    contains a run with other settings.
    """
    runs = plan.runs()
    for run in runs:
        run.check()
    with writing("runs", plan.folder):
        plan.folder.mkdir(parents=True, exist_ok=True)
    for run in {run.before_file: run for run in runs}.values():
        if not run.before_file.is_file():
            run.measure(run.before_file)
    results = collect_results(plan, finish_all(runs, plan.jobs))
    files = {
        "results.json": json.dumps(results, indent=2) + "\n",
        "ablation.md": page(results),
        "ablation.svg": figure(results),
    }
    for name, text in files.items():
        with writing("runs", plan.folder / name):
            (plan.folder / name).write_text(text, encoding="utf-8")
    return results


def finish_all(runs: list[Run], jobs: int) -> dict[str, str]:
    """Finish all runs, `jobs` in parallel; return the failed ones with their errors."""
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
        except KeyboardInterrupt:  # the running commands received it too
            pool.shutdown(cancel_futures=True)
            raise
    return failed


def collect_results(plan: Plan, failed: dict[str, str]) -> dict[str, Any]:
    """All measurements, with the commit, hardware and settings that they are from."""
    arms: dict[str, Any] = {
        arm: {"settings": settings, "before": {}, "after": {}}
        for arm, settings in plan.arms.items()
    }
    for run in plan.runs():
        arms[run.arm]["before"] = read_measurements(run.before_file)
        if run.after_file.is_file():
            kl = read_metrics(run.folder / "metrics.jsonl")[-1]["kl"]
            measured = read_measurements(run.after_file) | {"kl": round(kl, 4)}
            arms[run.arm]["after"][str(run.seed)] = measured
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


def print_plan(plan: Plan) -> None:
    """Print all runs, whether each is done, and an estimate of the remaining time."""
    remaining = [run for run in plan.runs() if not run.after_file.is_file()]
    for run in plan.runs():
        changes = " ".join(f"{name} {value}" for name, value in plan.arms[run.arm].items())
        status = "to do" if run in remaining else "done"
        print(f"{run.folder.name:24} {status:6} {changes}")
    num_prompts = len(plan.prompts.read_text(encoding="utf-8").splitlines())
    measure_s = STARTUP_S + IMAGE_S * plan.samples * num_prompts
    runs_s = sum(STARTUP_S + STEP_S * run.config.max_steps + measure_s for run in remaining)
    before = {run.before_file for run in plan.runs() if not run.before_file.is_file()}
    minutes = (runs_s / plan.jobs + measure_s * len(before)) / 60
    print(f"{len(remaining)} runs to do, about {minutes:.0f} min with {plan.jobs} in parallel")


def main() -> int:
    """Run the command and return its exit code."""
    parser = CommandParser(prog=PROGRAM, description=__doc__.splitlines()[0])
    parser.add_argument(
        "--runs", type=Path, default=Path("runs/ablation"), help="folder of the runs"
    )
    parser.add_argument("--jobs", type=int, default=2, help="runs in parallel; default: 2")
    parser.add_argument(
        "--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="ARM", help="default: all"
    )
    parser.add_argument(
        "--seeds", nargs="+", type=int, default=SEEDS, metavar="SEED", help="default: 11 12 13"
    )
    parser.add_argument(
        "--max_steps", type=int, default=PRESETS["tiny"]["max_steps"], help="training steps per run"
    )
    parser.add_argument("--samples", type=int, default=SAMPLES, help="images per held-out prompt")
    parser.add_argument(
        "--dry_run", choices=("true", "false"), default="false", help="only list the runs"
    )
    try:
        options = parser.parse_args()
        for name in ("jobs", "samples"):
            require(getattr(options, name) >= 1, name, getattr(options, name), "give 1 or more")
        plan = Plan(
            folder=options.runs,
            arms={name: ARMS[name] for name in ARMS if name in options.arms},
            seeds=list(dict.fromkeys(options.seeds)),
            settings={"max_steps": options.max_steps},
            samples=options.samples,
            jobs=options.jobs,
        )
        if options.dry_run == "true":
            print_plan(plan)
            return 0
        failed = ablate(plan)["failed"]
        print(f"results: {plan.folder / 'ablation.md'}")
        return 1 if failed else 0
    except UserError as error:
        return report_error(PROGRAM, error)
    except KeyboardInterrupt:
        print("interrupted; run the same command to resume", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
