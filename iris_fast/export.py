"""Export a run's trained model: `python -m iris_fast.export RUN_FOLDER TARGET`.

`--layout transformers` (default) opens with `JanusForConditionalGeneration.from_pretrained`,
`--layout original` with the original Janus code; both open with `--model TARGET` here.
"""

import sys
from pathlib import Path

from iris_fast.cli import CommandParser
from iris_fast.errors import UserError, report_error

PROGRAM = "iris_fast.export"


def export(
    run_folder: Path, target: Path, layout: str, dtype_name: str, checkpoint: str = "newest"
) -> Path:
    """Write a complete checkpoint of `run_folder` to `target`; UserError if that fails.

    `checkpoint` as for `iris_fast.run.trained.open_trained`.
    """
    import torch

    from iris_fast.models.pretrained.save import save_janus
    from iris_fast.run.trained import open_trained

    trained, path = open_trained(run_folder, checkpoint)
    written = save_janus(trained, target, layout, dtype=getattr(torch, dtype_name))
    print(f"{path} written to {written} ({layout} layout, {dtype_name})")
    return written


def main() -> int:
    """The command; its exit code."""
    parser = CommandParser(prog=PROGRAM, description="Write a run's trained model to a folder.")
    parser.add_argument("run_folder", type=Path, help="the --output_dir of a training run")
    parser.add_argument("target", type=Path, help="folder to write; must not exist, or be empty")
    parser.add_argument(
        "--checkpoint",
        default="newest",
        help="newest (default), best (by the run's best_metric), "
        "or the name of a folder such as step_00050",
    )
    parser.add_argument("--layout", choices=("transformers", "original"), default="transformers")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="default: bfloat16"
    )
    try:
        asked = parser.parse_args()
        export(asked.run_folder, asked.target, asked.layout, asked.dtype, asked.checkpoint)
    except UserError as error:
        return report_error(PROGRAM, error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
