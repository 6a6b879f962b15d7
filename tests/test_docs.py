"""What the documents say exists: links, files, modules, settings, commands; the examples run."""

from __future__ import annotations

import ast
import functools
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from commands import run, wait_for
from small_runs import flags, metrics
from torch.distributed.run import get_args_parser

import iris_fast.__main__
from iris_fast.__main__ import COMMANDS
from iris_fast.cli import parse
from iris_fast.config import GenerateConfig, TrainConfig, to_yaml

ROOT = Path(__file__).parent.parent
DOCUMENTS = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"]
DOCUMENTS += sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md"))
TEXTS = {name: (ROOT / name).read_text(encoding="utf-8") for name in DOCUMENTS}
TEXT = "\n".join(TEXTS.values())
SETUP = (ROOT / "setup.py").read_text(encoding="utf-8")
CONFIGS = {"iris_fast.train": TrainConfig, "iris_fast.generate": GenerateConfig}
MODULES = set(re.findall(r"-m ((?:iris_fast|bench)[\w.]*)", TEXT))  # run by `python -m`
FLAG = re.compile(r"(?<![\w-])--[a-z][\w-]*")
OTHER_FLAGS = {"--benchmark-only", "--name"}  # of pytest-benchmark; a placeholder

each_document = pytest.mark.parametrize("name", DOCUMENTS)


def shell_commands(text: str) -> list[list[str]]:
    """The words of every command in the ```bash blocks, without environment and redirections."""
    found = []
    for block in re.findall(r"^```bash\n(.*?)^```", text, re.M | re.S):
        for line in block.replace("\\\n", " ").splitlines():
            for part in re.split(r"&&|[|>]", line):
                words = shlex.split(part, comments=True)
                while words and re.fullmatch(r"\w+=.*", words[0]):
                    del words[0]
                if words:
                    found.append(words)
    return found


def module_calls() -> list[tuple[str, list[str], list[str]]]:
    """(module, its arguments, torchrun's) of every `python -m` and `torchrun` in the documents."""
    calls = []
    for words in shell_commands(TEXT):
        if words[0] in ("python", "torchrun") and "-m" in words:
            place = words.index("-m")
            calls.append((words[place + 1], words[place + 2 :], words[1:place]))
    return calls


def module_file(module: str) -> Path:
    path = ROOT / module.replace(".", "/")
    return path / "__main__.py" if path.is_dir() else path.with_suffix(".py")


def flags_of(words: list[str]) -> set[str]:
    return set(FLAG.findall(" ".join(words)))


def takes_flags(module: str) -> bool:
    source = module_file(module).read_text(encoding="utf-8")
    return bool(re.search(r"add_argument|parse_command_line", source))


@functools.cache
def help_texts() -> dict[str, str]:
    """The --help of every module that takes flags, or is given some in the documents."""
    modules = {module for module in MODULES if takes_flags(module)}
    modules |= {module for module, arguments, _ in module_calls() if flags_of(arguments)}
    finished = run("help_texts", *sorted(modules), cwd=ROOT)
    assert finished.code == 0, finished.err
    return json.loads(finished.out)


def heading_anchors(text: str) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    headings = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each_document
def test_links_resolve(name):
    for link in re.findall(r"\]\(([^)\s]+)\)", TEXTS[name]):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / name).parent / path if path else ROOT / name
        assert target.exists(), link
        assert not anchor or anchor in heading_anchors(target.read_text(encoding="utf-8")), link


@each_document
def test_files_that_are_named_exist(name):
    for path in re.findall(
        r"`((?:iris_fast|tests|docs|kernels|bench|examples)/[^`\s]*)`", TEXTS[name]
    ):
        if not re.search(r"[A-Z]{2}|[*<]", path):  # a placeholder such as NAME.py
            assert (ROOT / path).exists(), path


@each_document
def test_no_document_names_a_path_of_one_machine(name):
    assert not re.findall(r"(?<![\w.])/(?:work|tmp|home|root|mnt|data)\b", TEXTS[name])


def test_modules_that_are_run_exist():
    assert {"iris_fast.train", "iris_fast.generate", "iris_fast.export"} <= MODULES
    for module in MODULES:
        assert '__name__ == "__main__"' in module_file(module).read_text(encoding="utf-8"), module


def test_console_scripts_that_are_named_are_installed():
    assert set(re.findall(r"\biris-fast-(\w+)", TEXT)) <= COMMANDS.keys()
    for name in COMMANDS:
        assert f'"{name}"' in SETUP
        assert callable(getattr(iris_fast.__main__, name))


def test_extras_that_are_named_exist():
    named = set(re.findall(r"\.\[(\w+)\]", TEXT))
    extras = set(re.findall(r'^        "(\w+)": ', SETUP, re.M))
    assert {"train", "test"} <= named <= extras


def test_settings_that_are_named_exist():
    """In running text, anywhere: some command has the flag."""
    known, named = set(OTHER_FLAGS), set(FLAG.findall(TEXT))
    for action in get_args_parser()._actions:
        known |= set(action.option_strings)
    known |= flags_of(list(help_texts().values()))
    assert named <= known, named - known


def test_messages_that_are_quoted_exist():
    """docs/troubleshooting.md quotes messages in backticks; `...` and capitals stand for values."""
    literals = []
    for path in (ROOT / "iris_fast").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                literals.append(node.value)
    spans = re.findall(r"`([^`]+)`", TEXTS["docs/troubleshooting.md"])
    code = ("python ", "pip ", "pytest ", "import ", "--")
    quotes = [span for span in spans if " " in span and not span.startswith(code)]
    assert len(quotes) > 20
    for quote in quotes:
        for part in re.split(r"\.\.\.|\b(?:SETTING|[A-Z])\b", re.sub(r"\s+", " ", quote)):
            part = part.strip().removeprefix(": ")
            assert any(part in literal for literal in literals), (quote, part)


def test_commands_are_understood(tmp_path, monkeypatch):
    """Every training and generate command of the documents gives valid settings; every other one
    has flags that its --help names. None of them is run."""
    monkeypatch.chdir(tmp_path)
    calls = module_calls()
    assert len(calls) > 10
    for module, arguments, launcher in calls:
        if launcher or module == "iris_fast.train":
            get_args_parser().parse_args([*launcher, "-m", module, *arguments])
        if module not in CONFIGS:
            if flags_of(arguments):
                assert flags_of(arguments) <= flags_of([help_texts()[module]]), (module, arguments)
            continue
        for flag, value in itertools.pairwise(arguments):
            if flag == "--config":
                Path(value).parent.mkdir(parents=True, exist_ok=True)
                Path(value).write_text(to_yaml(TrainConfig()))
        try:
            parse(CONFIGS[module], module, arguments)
        except SystemExit as ended:  # --print_config, --help
            assert not ended.code, arguments


def test_the_tree_is_that_of_the_package():
    """docs/architecture.md has a line for every module of iris_fast, and no other."""
    (tree,) = re.findall(r"<!-- tree -->\n```\n(.*?)```", TEXTS["docs/architecture.md"], re.S)
    folders, shown, whole = [], set(), set()
    for line in tree.splitlines():
        entry, _, about = line.strip().partition(" ")
        depth = (len(line) - len(line.lstrip())) // 2
        path = Path(*folders[:depth], entry)
        assert (ROOT / path).exists(), path
        assert about.strip() or not depth, f"{path}: no description"
        if entry.endswith("/"):
            folders = [*folders[:depth], entry]
            whole.add(path)
        else:
            whole -= set(path.parents)
            shown.add(path)
    # A folder without a line for any of its files counts as a whole.
    for module in (ROOT / "iris_fast").rglob("*.py"):
        path = module.relative_to(ROOT)
        if path.name not in ("__init__.py", "__main__.py"):
            assert path in shown or whole & set(path.parents), path


# --- The examples ---------------------------------------------------------------------------------


def test_the_example_rewards_train(here):
    shutil.copy(ROOT / "examples" / "my_reward.py", here)
    finished = run(
        "iris_fast.train",
        *flags(
            reward_funcs="[my_reward:saturation, my_reward:one_object]",
            reward_weights="[1, 0.5]",
            metric_funcs="[my_reward:saturation]",
            output_dir="run",
            max_steps=1,
        ),
        cwd=here,
    )
    assert (finished.code, finished.err) == (0, "")
    (row,) = metrics("run")
    saturation, one_object = (row[f"rewards/my_reward:{n}"] for n in ("saturation", "one_object"))
    assert 0 < saturation < 1
    assert 0 <= one_object <= saturation
    assert row["metrics/my_reward:saturation"] == saturation
    assert row["reward"] == pytest.approx(saturation + 0.5 * one_object)


# Stand-ins for SLURM's commands and for torchrun, which keeps "training" until it is told to stop.
STAND_INS = {
    "srun": 'echo $$ > srun.pid; exec "$@"',
    "scontrol": 'if [ "$1" = show ]; then echo node0; else echo "$@" > requeued; fi',
    "scancel": 'echo "$@" > cancelled; kill -TERM "$(cat srun.pid)"',
    "torchrun": """
        printf '%s\\n' "$@" > arguments.new
        while [ $# -gt 1 ]; do [ "$1" = --output_dir ] && run=$2; shift; done
        mkdir -p "$run"; echo > "$run/config.yaml"
        trap 'echo > saved; exit 1' TERM
        mv arguments.new arguments
        [ -f saved ] && exit 0
        while :; do sleep 0.05; done""",
}


def test_the_slurm_script_saves_requeues_and_resumes(here):
    for name, script in STAND_INS.items():
        (here / name).write_text(f"#!/bin/bash\n{script}\n")
        (here / name).chmod(0o755)
    environment = os.environ | {
        "PATH": f"{here}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NAME": "iris-fast",
        "SLURM_JOB_NODELIST": "node[0-1]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_GPUS_ON_NODE": "8",
    }
    script = ROOT / "examples" / "slurm.sh"
    started = subprocess.Popen([script, "--max_steps", "10"], cwd=here, env=environment)
    try:
        wait_for((here / "arguments").exists)
        started.send_signal(signal.SIGUSR1)
        started.wait(30)
    finally:
        started.kill()
    assert (here / "cancelled").read_text() == "--signal=TERM 7\n"
    assert (here / "saved").exists()
    assert (here / "requeued").read_text() == "requeue 7\n"
    first = (here / "arguments").read_text().splitlines()

    (here / "requeued").unlink()
    again = subprocess.run([script, "--max_steps", "10"], cwd=here, env=environment, check=False)
    assert again.returncode == 0
    assert not (here / "requeued").exists()
    second = (here / "arguments").read_text().splitlines()
    resume = ["--resume_from_checkpoint", "true"]
    place = second.index(resume[0])
    assert second[:place] + second[place + 2 :] == first

    launcher = get_args_parser().parse_args(second)
    assert launcher.nnodes == "2"
    assert launcher.nproc_per_node == "8"
    assert (launcher.rdzv_backend, launcher.rdzv_endpoint) == ("c10d", "node0:29500")
    assert launcher.training_script == "iris_fast.train"
    config = parse(TrainConfig, "iris_fast.train", launcher.training_script_args)
    assert config.output_dir == "runs/iris-fast-7"
    assert config.resume_from_checkpoint
    assert config.max_steps == 10
