"""A run's trained model as a checkpoint folder: `python -m iris_fast.export RUN_FOLDER TARGET`.

`--layout transformers` (default) opens with `JanusForConditionalGeneration.from_pretrained`,
`--layout original` with the original Janus code; both open with `--model TARGET` here.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from iris_fast.cli import CommandParser
from iris_fast.errors import UserError, report_error

PROGRAM = "iris_fast.export"


def arguments() -> argparse.Namespace:
    """What the command line says; UserError if it cannot be understood."""
    parser = CommandParser(
        prog=PROGRAM, description="Write a run's trained model as a checkpoint folder."
    )
    parser.add_argument("run_folder", type=Path, help="the --output_dir of a training run")
    parser.add_argument("target", type=Path, help="folder to write; must not exist or be empty")
    parser.add_argument("--layout", choices=("transformers", "original"), default="transformers")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="default: bfloat16"
    )
    return parser.parse_args()


def export(run_folder: Path, target: Path, layout: str, dtype_name: str) -> Path:
    """Write the newest complete checkpoint of `run_folder` to `target`; UserError if there is none
    or the target cannot be written."""
    import torch
    import yaml

    from iris_fast.models.pretrained.save import save_janus
    from iris_fast.preflight.inputs import open_model
    from iris_fast.run import checkpoint

    config_file = run_folder / "config.yaml"
    if not config_file.is_file():
        raise UserError(f"run_folder: {run_folder} holds no run (no config.yaml)")
    try:
        model = yaml.safe_load(config_file.read_text(encoding="utf-8"))["model"]
    except (yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError):
        raise UserError(f"run_folder: {config_file} is damaged; restore it") from None
    newest, faults = checkpoint.newest(run_folder / "checkpoints")
    for fault in faults:
        print(f"{PROGRAM}: warning: {fault}", file=sys.stderr)
    if newest is None:
        raise UserError(f"run_folder: {run_folder} holds no sound checkpoint; train first")
    opened = open_model(model, torch.float32)
    checkpoint.load_policy_weights(newest, opened.model)
    written = save_janus(opened, target, layout, dtype=getattr(torch, dtype_name))
    print(f"{newest} written to {written} ({layout} layout, {dtype_name})")
    return written


def main() -> int:
    """The command; its exit code."""
    try:
        asked = arguments()
        export(asked.run_folder, asked.target, asked.layout, asked.dtype)
    except UserError as error:
        return report_error(PROGRAM, error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
