"""Compare rewards in three worlds: train every arm from several seeds, measure, draw a page.

    python -m iris_fast.tiny.recipe.ablate [--worlds shipped] [--arms nsc sc] [--dry_run true]

The worlds are those of `iris_fast.tiny.world`: the one that the package's model was trained on, and
two controls, whose models are fine-tuned from it first. Before training, the alignment of every
reward with the verifier is measured. Each arm and seed is one training run, measured on the
held-out prompts with its own sampling settings and with the same random numbers before and after
training and in every arm. After an interruption, the same command runs what is missing.

RUNS/results.json holds the measurements; ablation.md and ablation.svg show them. All three are
written after every run, from everything that is in RUNS.

Nothing is tuned here: all hyperparameters are those of the preset, chosen on other seeds.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from iris_fast.cli import CommandParser
from iris_fast.config import PRESETS
from iris_fast.errors import require
from iris_fast.tiny.recipe.ablation_figure import figure
from iris_fast.tiny.recipe.ablation_page import page
from iris_fast.tiny.recipe.ablation_plan import (
    ARMS,
    SAMPLES,
    SEEDS,
    STARTUP_S,
    STEP_S,
    Plan,
    finish_all,
    resumable,
    sampling_s,
    write_files,
)
from iris_fast.tiny.recipe.ablation_results import collect_results
from iris_fast.tiny.recipe.pretrain import FINE_TUNE_RECIPE
from iris_fast.tiny.world import WORLDS

PROGRAM = "iris_fast.tiny.recipe.ablate"
FINE_TUNE_STEP_S = 0.26  # as STEP_S


def ablate(plan: Plan) -> dict[str, Any]:
    """Run what is missing; write RUNS/results.json, ablation.md and ablation.svg.

    A failed run does not stop the others and is listed in the results. Raises UserError if a folder
    contains a run with other settings.
    """
    plan.check()
    failed = finish_all({f"{m.world}/model": m.make for m in plan.models()}, plan.jobs)
    ready = [model for model in plan.models() if model.is_there]
    runs = [run for run in plan.runs() if run.model.is_there]
    before = {str(run.before_file): run.measure_before for run in runs}
    alignments = {
        str(model.alignment_file(seed)): lambda model=model, seed=seed: model.align(seed)
        for seed in plan.seeds
        for model in ready
    }
    failed |= finish_all(before | alignments, plan.jobs)
    runs = [run for run in runs if run.before_file.is_file()]
    failed |= finish_all(
        {run.name: run.finish for run in runs}, plan.jobs, lambda: write_results(plan, failed)
    )
    return write_results(plan, failed)


def write_results(plan: Plan, failed: dict[str, str]) -> dict[str, Any]:
    """Write the results of everything that is in the folder of the runs, and return them."""
    results = collect_results(plan.complete(), failed)
    files = {
        "results.json": json.dumps(results, indent=2) + "\n",
        "ablation.md": page(results),
        "ablation.svg": figure(results),
    }
    write_files(plan.folder, files)
    return results


def print_plan(plan: Plan) -> None:
    """Print all runs in their order, whether each is done, and an estimate of the remaining time,
    without those that share a core."""
    remaining = [run for run in plan.runs() if not run.after_file.is_file()]
    for run in plan.runs():
        changes = " ".join(f"{name} {value}" for name, value in ARMS[run.arm].items())
        print(f"{run.name:32} {'to do' if run in remaining else 'done':6} {changes}".rstrip())

    missing = [model for model in plan.models() if not model.is_there]
    before = {run.before_file for run in plan.runs() if not run.before_file.is_file()}
    alignments = [
        seed
        for model in plan.models()
        for seed in plan.seeds
        if not model.alignment_file(seed).is_file()
    ]
    measuring_s = sampling_s(plan.prompts, plan.samples)
    total_s = (STARTUP_S + FINE_TUNE_RECIPE.steps * FINE_TUNE_STEP_S) * len(missing)
    total_s += sampling_s(plan.training_prompts, SAMPLES) * len(alignments)
    total_s += measuring_s * len(before)
    total_s += sum(STARTUP_S + STEP_S * run.config.max_steps + measuring_s for run in remaining)
    minutes = total_s / plan.jobs / 60
    print(f"{len(remaining)} runs to do, about {minutes:.0f} min with {plan.jobs} in parallel")


def command() -> int:
    """Parse the command line and run what it names; the exit code."""
    parser = CommandParser(prog=PROGRAM, description=__doc__.splitlines()[0])
    parser.add_argument(
        "--runs", type=Path, default=Path("runs/ablation"), help="folder of the runs"
    )
    parser.add_argument("--jobs", type=int, default=2, help="runs in parallel; default: 2")
    parser.add_argument(
        "--worlds", nargs="+", choices=WORLDS, default=list(WORLDS), metavar="WORLD",
        help=f"of {', '.join(WORLDS)}; default: all",
    )  # fmt: skip
    parser.add_argument(
        "--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="ARM",
        help=f"of {', '.join(ARMS)}; default: all",
    )  # fmt: skip
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
    options = parser.parse_args()
    for name in ("jobs", "samples"):
        require(getattr(options, name) >= 1, name, getattr(options, name), "give 1 or more")
    plan = Plan(
        folder=options.runs,
        worlds=[name for name in WORLDS if name in options.worlds],
        arms=[name for name in ARMS if name in options.arms],
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


def main() -> int:
    """Run the command and return its exit code."""
    return resumable(PROGRAM, command)


if __name__ == "__main__":
    sys.exit(main())
