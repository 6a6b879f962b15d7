"""`python -m iris_fast` lists the commands; the console scripts start them."""

import functools
import runpy
import shlex
import sys

COMMANDS = {
    "train": "train a model with GRPO, with checkpoints, metrics and a report in a run folder",
    "generate": "generate images from prompts with a model",
    "export": "write a run's trained model to a folder",
    "env": "print the versions and hardware, for bug reports",
}


def start(command: str) -> None:
    """Run `python -m iris_fast.COMMAND`, which parses its arguments before it imports torch."""
    runpy.run_module(f"iris_fast.{command}", run_name="__main__", alter_sys=True)


train, generate, export, env = (functools.partial(start, command) for command in COMMANDS)


if __name__ == "__main__":
    if sys.argv[1:] not in ([], ["-h"], ["--help"]):
        arguments = shlex.join(sys.argv[1:])
        print(f"iris_fast: error: {arguments}: use python -m iris_fast.COMMAND", file=sys.stderr)
        sys.exit(2)
    for name, summary in COMMANDS.items():
        print(f"python -m iris_fast.{name:<9} {summary}")
    print("Add --help for the settings of a command. For several GPUs: torchrun -m iris_fast.train")
