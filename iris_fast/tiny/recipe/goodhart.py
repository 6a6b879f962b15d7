"""How far can a reward be followed? Accuracy over KL, from many checkpoints of longer runs.

    python -m iris_fast.tiny.recipe.goodhart [--runs runs/goodhart] [--dry_run true]

Each reward (NSC, and the verifier for comparison) is one training run per seed that keeps all its
checkpoints, and every checkpoint is measured on the held-out prompts. After an interruption, the
same command runs what is missing. RUNS/goodhart.json holds the measurements; goodhart.md says at
which KL accuracy was highest, and so which --max_kl to use, and goodhart.svg shows the curves.

The limit is chosen by these held-out prompts; measure what it gives from other seeds.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from iris_fast.cli import CommandParser
from iris_fast.errors import require
from iris_fast.run.best import Judge
from iris_fast.run.checkpoint import step_folders
from iris_fast.run.provenance import commit, hardware
from iris_fast.tiny.recipe.ablation_plan import (
    ARMS,
    SAMPLES,
    SHIPPED,
    STARTUP_S,
    STEP_S,
    Plan,
    Run,
    finish_all,
    read_measurements,
    resumable,
    sampling_s,
    write_files,
)
from iris_fast.tiny.recipe.goodhart_page import figure, page

PROGRAM = "iris_fast.tiny.recipe.goodhart"
REWARDS = ("nsc", "verifier")
MAX_STEPS, SAVE_STEPS = 300, 20
KEEP_ALL = 10_000
KL_REACH = 2  # steps on each side that the KL of a checkpoint is averaged over
# Neither one that the preset was chosen with nor one of the ablation's.
SEEDS = [21]


def checkpoint_file(run: Run, step: int) -> Path:
    """Measurements of the weights after `step`."""
    return run.folder / f"held_out-x{run.plan.samples}-step_{step:05d}.json"


def finish(run: Run) -> str:
    """Train, and measure all checkpoints, unless that is done already; return a summary line."""
    if run.config.max_steps not in checkpoints(run):
        run.train()
    for step, name in checkpoints(run).items():
        if not checkpoint_file(run, step).is_file():
            target = checkpoint_file(run, step)
            run.measure(target, "--run", str(run.folder), "--checkpoint", name)
    return f"{run.name}: {len(checkpoints(run))} checkpoints measured"


def checkpoints(run: Run) -> dict[int, str]:
    """Step -> name of every checkpoint of a run."""
    folder = run.folder / "checkpoints"
    return {int(path.name.removeprefix("step_")): path.name for path in step_folders(folder)}


def collect_curve(run: Run) -> list[dict[str, Any]]:
    """Step, KL and measurements of the initial model and of every checkpoint, in order.

    The KL is the mean over the steps around it, because one step has few images.
    """
    kl = Judge(run.rows, "kl", KL_REACH)
    points = [{"step": 0, "kl": 0.0, **read_measurements(run.before_file)}]
    for step in sorted(checkpoints(run)):
        path = checkpoint_file(run, step)
        if path.is_file():
            points.append({"step": step, "kl": kl.score(step), **read_measurements(path)})
    return points


def write_results(plan: Plan, failed: dict[str, str]) -> dict[str, Any]:
    """Write goodhart.json, goodhart.md and goodhart.svg from what is in RUNS; return the first."""
    rewards: dict[str, dict[str, Any]] = {}
    for run in plan.runs():
        if run.before_file.is_file() and (run.folder / "metrics.jsonl").is_file():
            rewards.setdefault(run.arm, {})[str(run.seed)] = collect_curve(run)
    results = {
        "commit": commit(),
        "hardware": hardware(),
        "steps": plan.settings["max_steps"],
        "rewards": rewards,
        "failed": failed,
    }
    files = {
        "goodhart.json": json.dumps(results, indent=2) + "\n",
        "goodhart.md": page(results),
        "goodhart.svg": figure(results),
    }
    write_files(plan.folder, files)
    return results


def goodhart(plan: Plan) -> dict[str, Any]:
    """Run what is missing and write the results. UserError if the folder contains a run with other
    settings, or if the initial model cannot be measured."""
    plan.check()
    runs = plan.runs()
    for run in runs:
        run.measure_before()
    failed = finish_all({run.name: lambda run=run: finish(run) for run in runs}, plan.jobs)
    return write_results(plan, failed)


def print_plan(plan: Plan, save_steps: int) -> None:
    """Print all runs and an estimate of the time that all of them take."""
    measuring_s = sampling_s(plan.prompts, plan.samples)
    total_s = measuring_s
    for run in plan.runs():
        steps = run.config.max_steps
        count = -(-steps // save_steps)
        print(f"{run.name:24} {steps} steps, {count} checkpoints")
        total_s += STARTUP_S + STEP_S * steps + measuring_s * count
    runs = len(plan.runs())
    minutes = total_s / min(plan.jobs, runs) / 60
    print(f"{runs} runs, from nothing about {minutes:.0f} min with {plan.jobs} in parallel")


def command() -> int:
    """Parse the command line and run what it names; the exit code."""
    parser = CommandParser(prog=PROGRAM, description=__doc__.splitlines()[0])
    parser.add_argument(
        "--runs", type=Path, default=Path("runs/goodhart"), help="folder of the runs"
    )
    parser.add_argument("--jobs", type=int, default=2, help="runs in parallel; default: 2")
    parser.add_argument(
        "--rewards", nargs="+", choices=ARMS, default=list(REWARDS), metavar="ARM",
        help="arms of the ablation; default: nsc verifier",
    )  # fmt: skip
    parser.add_argument(
        "--seeds", nargs="+", type=int, default=SEEDS, metavar="SEED", help="default: 21"
    )
    parser.add_argument("--max_steps", type=int, default=MAX_STEPS, help="training steps per run")
    parser.add_argument(
        "--save_steps", type=int, default=SAVE_STEPS, help="steps between checkpoints; default: 20"
    )
    parser.add_argument("--samples", type=int, default=SAMPLES, help="images per held-out prompt")
    parser.add_argument(
        "--dry_run", choices=("true", "false"), default="false", help="only list the runs"
    )
    options = parser.parse_args()
    for name in ("jobs", "samples", "max_steps", "save_steps"):
        require(getattr(options, name) >= 1, name, getattr(options, name), "give 1 or more")
    plan = Plan(
        folder=options.runs,
        worlds=[SHIPPED],
        arms=[name for name in ARMS if name in options.rewards],
        seeds=list(dict.fromkeys(options.seeds)),
        settings={
            "max_steps": options.max_steps,
            "save_steps": options.save_steps,
            "save_total_limit": KEEP_ALL,
        },
        samples=options.samples,
        jobs=options.jobs,
    )
    if options.dry_run == "true":
        print_plan(plan, options.save_steps)
        return 0
    failed = goodhart(plan)["failed"]
    print(f"results: {plan.folder / 'goodhart.md'}")
    return 1 if failed else 0


def main() -> int:
    """Run the command and return its exit code."""
    return resumable(PROGRAM, command)


if __name__ == "__main__":
    sys.exit(main())
