"""The runs of `iris_fast.tiny.recipe.ablate` and `goodhart`: their folders, settings and commands.

An arm is the preset `tiny` with the changes in `ARMS`. Everything of a world is in RUNS/WORLD: its
model (a control's decoder is fine-tuned from the package's), the measurements of that model before
training, and one run folder ARM-SEED per arm and seed.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from iris_fast.config import PRESETS, TrainConfig
from iris_fast.errors import UserError, atomic_write, report_error, writing
from iris_fast.run.log import read_metrics
from iris_fast.tiny import HELD_OUT_FILE, MODEL_FOLDER, PROMPTS_FILE
from iris_fast.tiny.world import WORLDS

Settings = dict[str, Any]

# The paper's reward is the sum of both, the preset's the first alone.
BOTH = ["image_nsc", "text_nsc"]
# The arms that are run first in every world, then the others.
FIRST = ("nsc", "sc", "verifier", "random", "entropy")
ARMS: dict[str, Settings] = {
    "nsc": {},
    "sc": {"reward_weights": [-1.0]},
    "entropy": {"reward_funcs": ["image_entropy"]},
    "verifier": {"reward_funcs": ["tiny_verifier"]},
    "random": {"reward_funcs": ["random"]},
    "constant": {"reward_funcs": ["constant"]},
    "image_nsc_text_nsc": {"reward_funcs": BOTH},
    "image_nsc_text_sc": {"reward_funcs": BOTH, "reward_weights": [1.0, -1.0]},
    "image_sc_text_nsc": {"reward_funcs": BOTH, "reward_weights": [-1.0, 1.0]},
    "no_cot": {"cot": False},
    "direct": {"objective": "direct"},
}
# Of this arm one seed is enough: its advantages are 0, and so is the gradient of the KL term as
# long as the policy equals the reference. Whether all gradients were 0 is read from the run's log.
ONE_SEED = "constant"
# None of these is a seed that the preset was chosen with.
SEEDS = [11, 12, 13]
SHIPPED = "shipped"  # the world of the package's model
MEASUREMENT_SEED = 7
SAMPLES = 8
# Approximate seconds on one core of a loaded 2-core AMD EPYC, for the estimates of --dry_run: of
# starting a command, of a training step with the preset's 64 images, and of measuring an image.
STARTUP_S, STEP_S, IMAGE_S = 6.0, 2.4, 0.02
# Their alignment with METRIC is measured before training; `random` shows the noise.
TERMS = ["image_nsc", "text_nsc", "image_entropy", "text_entropy", "random"]
METRIC = "tiny_verifier"


@dataclass(frozen=True)
class Plan:
    """The runs of an ablation: `settings` that all share, `samples` images per held-out prompt."""

    folder: Path
    worlds: list[str] = field(default_factory=lambda: list(WORLDS))
    arms: list[str] = field(default_factory=lambda: list(ARMS))
    seeds: list[int] = field(default_factory=lambda: SEEDS)
    settings: Settings = field(default_factory=dict)
    samples: int = SAMPLES
    prompts: Path = HELD_OUT_FILE
    training_prompts: Path = PROMPTS_FILE
    jobs: int = 2

    def runs(self) -> list[Run]:
        """All runs, the arms of `FIRST` in all worlds before the others, grouped by seed: an
        interruption leaves complete seeds of what matters most."""
        first = [arm for arm in self.arms if arm in FIRST]
        others = [arm for arm in self.arms if arm not in FIRST]
        return [
            Run(self, world, arm, seed)
            for arms in (first, others)
            for seed in self.seeds
            for world in self.worlds
            for arm in arms
            if arm != ONE_SEED or seed == self.seeds[0]
        ]

    def models(self) -> list[WorldModel]:
        """The model of every world."""
        return [WorldModel(self, world) for world in self.worlds]

    def complete(self) -> Plan:
        """The plan with all worlds and arms, and with the seeds of other runs in the folder."""
        names = (path.parent.name for path in self.folder.glob("*/*-*/config.yaml"))
        found = {int(name.rpartition("-")[2]) for name in names}
        seeds = [*self.seeds, *sorted(found.difference(self.seeds))]
        return replace(self, worlds=list(WORLDS), arms=list(ARMS), seeds=seeds)

    def check(self) -> None:
        """Raise UserError if the folder contains runs with other settings, or of another model;
        create the folder otherwise."""
        sha256 = hashlib.sha256((MODEL_FOLDER / "model.safetensors").read_bytes()).hexdigest()
        path = self.folder / "model.sha256"
        if path.is_file() and path.read_text(encoding="utf-8").strip() != sha256:
            raise UserError(
                f"runs: {self.folder} has runs of another tiny model; give another --runs folder"
            )
        for run in self.complete().runs():
            run.check()
        with writing("runs", self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            path.write_text(sha256 + "\n", encoding="utf-8")


@dataclass(frozen=True)
class WorldModel:
    """The initial model of a world."""

    plan: Plan
    world: str

    @property
    def folder(self) -> Path:
        """Folder of everything that belongs to the world."""
        return self.plan.folder / self.world

    @property
    def name(self) -> str:
        """The setting `model`."""
        return "tiny" if self.world == SHIPPED else str(self.folder / "model")

    @property
    def is_there(self) -> bool:
        """Whether the model is complete; a model folder is renamed into place."""
        return self.world == SHIPPED or (self.folder / "model" / "config.json").is_file()

    def make(self) -> str:
        """Fine-tune the package's decoder on the world's pictures, unless that is done already."""
        if not self.is_there:
            command = ["iris_fast.tiny.recipe.pretrain", "--world", self.world, "--model", "tiny"]
            command += ["--work_dir", str(self.folder / "pretrain"), "--target", self.name]
            run_command(command, self.folder / "model.log")
        return f"{self.world}: model {self.name}"

    def alignment_file(self, seed: int) -> Path:
        """Rewards and metric of images of the training prompts, sampled with `seed`."""
        return self.folder / f"alignment-{seed}" / "alignment.json"

    def align(self, seed: int) -> str:
        """Write `alignment_file`, unless it is there."""
        target = self.alignment_file(seed)
        config = Run(self.plan, self.world, "nsc", seed).config
        if not target.is_file():
            settings = {
                "alignment": True,
                "overwrite": True,
                "model": self.name,
                "prompts": str(self.plan.training_prompts),
                "reward_funcs": TERMS,
                "metric_funcs": [METRIC],
                "cot": True,
                "cfg_weight": config.cfg_weight,
                "max_completion_length": config.max_completion_length,
                "seed": seed,
                "output_dir": str(target.parent),
            }
            run_command(["iris_fast.generate", *flags(settings)], target.parent.with_suffix(".log"))
        return f"{self.world}/{target.parent.name}: {target}"


@dataclass(frozen=True)
class Run:
    """One arm in one world with one seed."""

    plan: Plan
    world: str
    arm: str
    seed: int

    @property
    def name(self) -> str:
        """For messages."""
        return f"{self.world}/{self.arm}-{self.seed}"

    @property
    def model(self) -> WorldModel:
        """The model that training starts from."""
        return WorldModel(self.plan, self.world)

    @property
    def folder(self) -> Path:
        """Folder of the training run."""
        return self.plan.folder / self.world / f"{self.arm}-{self.seed}"

    @property
    def config(self) -> TrainConfig:
        """All settings; UserError if they contradict each other."""
        return TrainConfig(**PRESETS["tiny"] | self._overrides())

    @property
    def before_file(self) -> Path:
        """Measurements of the initial model with this run's sampling settings."""
        config, samples = self.config, self.plan.samples
        name = f"before-cot_{config.cot}-cfg_{config.cfg_weight:g}-x{samples}.json".lower()
        return self.plan.folder / self.world / name

    @property
    def after_file(self) -> Path:
        """Measurements of the trained model."""
        return self.folder / f"held_out-x{self.plan.samples}.json"

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The rows of the run's metrics.jsonl."""
        return read_metrics(self.folder / "metrics.jsonl")

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
        words = flags(self._overrides())
        if (self.folder / "config.yaml").is_file():
            words.append("--resume_from_checkpoint=true")
        run_command(["iris_fast.train", *words], self.folder.with_suffix(".log"))
        rows = self.rows
        if not rows or rows[-1]["step"] < self.config.max_steps:
            raise UserError(
                f"runs: {self.folder} was interrupted; run the same command to resume it"
            )

    def measure(self, target: Path, *arguments: str) -> None:
        """Measure the model that `arguments` name, with the run's sampling settings, and write
        `target`."""
        config, plan = self.config, self.plan
        command = ["iris_fast.tiny.recipe.measure", *arguments, "--json", str(target)]
        command += ["--prompts", str(plan.prompts), "--samples", str(plan.samples)]
        command += ["--cfg_weight", str(config.cfg_weight), "--seed", str(MEASUREMENT_SEED)]
        if config.cot:
            command.append("--cot")
        run_command(command, target.with_suffix(".log"))

    def measure_before(self) -> str:
        """Measure the initial model, unless that is done already; return a summary line."""
        if not self.before_file.is_file():
            self.measure(self.before_file, "--model", self.model.name)
        accuracy = read_measurements(self.before_file)["mean"]
        return f"{self.world}/{self.before_file.stem}: accuracy {accuracy:.3f}"

    def finish(self) -> str:
        """Train and measure unless that is done already; return a summary line."""
        if not self.after_file.is_file():
            self.train()
            if self.is_unchanged():
                self.after_file.write_bytes(self.before_file.read_bytes())
            else:
                self.measure(self.after_file, "--run", str(self.folder))
        return f"{self.name}: accuracy {read_measurements(self.after_file)['mean']:.3f}"

    def is_unchanged(self) -> bool:
        """Whether the trained weights are the initial ones: AdamW without weight decay changes
        nothing if the gradient of every step was exactly 0."""
        return self.config.weight_decay == 0 and all(row["grad_norm"] == 0 for row in self.rows)

    def _overrides(self) -> Settings:
        steps = self.plan.settings.get("max_steps", PRESETS["tiny"]["max_steps"])
        # Prompts and metrics are named because the defaults of a control's model would be others.
        # With prompts that are named, there is no evaluation during training.
        shared = {
            "preset": "tiny",
            "model": self.model.name,
            "prompts": str(self.plan.training_prompts),
            "metric_funcs": [METRIC, "diversity", "richness"],
            "save_steps": 0,
            "sample_steps": steps,
        }
        own = {"seed": self.seed, "output_dir": str(self.folder)}
        return shared | self.plan.settings | ARMS[self.arm] | own


def flags(settings: Settings) -> list[str]:
    """Settings as words of a command line."""
    return [
        f"--{name}={value if isinstance(value, str) else json.dumps(value)}"
        for name, value in settings.items()
    ]


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


def sampling_s(prompts: Path, samples: int) -> float:
    """Estimated seconds to sample and measure `samples` images for every prompt of a file."""
    return STARTUP_S + IMAGE_S * samples * len(prompts.read_text(encoding="utf-8").splitlines())


def finish_all(
    tasks: dict[str, Callable[[], str]], jobs: int, after_each: Callable[[], None] = lambda: None
) -> dict[str, str]:
    """Call all tasks in order, `jobs` in parallel, and print their lines; return the names of the
    failed ones with their errors. `after_each` is called after each of the others."""
    failed = {}
    with ThreadPoolExecutor(jobs) as pool:
        futures = {pool.submit(task): name for name, task in tasks.items()}
        try:
            for future in as_completed(futures):
                try:
                    print(future.result(), flush=True)
                    after_each()
                except UserError as error:
                    failed[futures[future]] = str(error)
                    print(f"{futures[future]}: {error}", file=sys.stderr, flush=True)
        except KeyboardInterrupt:  # the running commands received it too
            pool.shutdown(cancel_futures=True)
            raise
    return failed


def write_files(folder: Path, files: dict[str, str]) -> None:
    """Write texts by name into the folder of the runs."""
    for name, text in files.items():
        with atomic_write("runs", folder / name) as partial:
            partial.write_text(text, encoding="utf-8")


def resumable(program: str, command: Callable[[], int]) -> int:
    """The exit code of a command that, repeated, runs what is missing."""
    try:
        return command()
    except UserError as error:
        return report_error(program, error)
    except KeyboardInterrupt:
        print("interrupted; run the same command to resume", file=sys.stderr)
        return 130
