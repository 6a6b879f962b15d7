"""Pretrain the tiny model of `iris_fast/tiny/model` from scratch, on one CPU core.

    python -m iris_fast.tiny.recipe.pretrain [--work_dir runs/tiny-pretrain] [--stage all]

Stage A constructs the VQ model (`construct_vq`: seconds, nothing is trained). Stage B (`decoder`)
trains the decoder on new scenes in every step; `export` writes the model folder in the transformers
layout. Stage B saves its state every minute and resumes from it; interrupted or not, it gives the
same bits.

The decoder of a control world starts from the package's model, in minutes:

    python -m iris_fast.tiny.recipe.pretrain --world kept --model tiny --target runs/tiny-kept
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import torch

from iris_fast.cli import CommandParser
from iris_fast.errors import UserError, report_error
from iris_fast.models.pretrained.load import LoadedJanus
from iris_fast.models.pretrained.save import save_janus
from iris_fast.preflight.inputs import open_model
from iris_fast.tiny.build import MODEL_FOLDER
from iris_fast.tiny.recipe.pretrain_decoder import DecoderRecipe, build_untrained, train_decoder
from iris_fast.tiny.recipe.training import StageProgress, load_state
from iris_fast.tiny.world import WORLDS, World

PROGRAM = "iris_fast.tiny.recipe.pretrain"
SAVE_EVERY_S = 60.0
DECODER_RECIPE = DecoderRecipe()
# From a trained model; its scenes are others than those of the first training.
FINE_TUNE_RECIPE = DecoderRecipe(steps=800, learning_rate=6e-4, seed=13)


def stage_decoder(folder: Path, world: World, start: str | None) -> None:
    """Stage B: train the decoder, from nothing or from the model `start`; write `decoder.pt`."""
    loaded = open_model(start, torch.float32) if start else build_untrained(DECODER_RECIPE.seed)
    recipe = FINE_TUNE_RECIPE if start else DECODER_RECIPE
    train_decoder(loaded, folder / "decoder.pt", recipe, world, StageProgress(SAVE_EVERY_S))


def export(folder: Path, target: Path = MODEL_FOLDER) -> None:
    """Write the model folder from the state that stage B has saved."""
    loaded = assemble(folder)
    if target.exists():
        shutil.rmtree(target)
    save_janus(loaded, target, dtype=torch.bfloat16)


def assemble(folder: Path) -> LoadedJanus:
    """The model of stage B's saved state."""
    loaded = build_untrained(DECODER_RECIPE.seed)
    loaded.model.load_state_dict(load_state(folder / "decoder.pt")["model"])
    return loaded


def main() -> int:
    """Run the command and return its exit code."""
    parser = CommandParser(prog=PROGRAM, description=__doc__.splitlines()[0])
    parser.add_argument(
        "--work_dir",
        type=Path,
        default=Path("runs/tiny-pretrain"),
        help="folder of the training state; default: runs/tiny-pretrain",
    )
    parser.add_argument(
        "--stage",
        choices=("all", "decoder", "export"),
        default="all",
        help="what to run; default: all, in this order",
    )
    parser.add_argument(
        "--world", choices=tuple(WORLDS), default="shipped", help="whose pictures; default: shipped"
    )
    parser.add_argument("--model", help="model to start from; default: an untrained one")
    parser.add_argument(
        "--target",
        type=Path,
        default=MODEL_FOLDER,
        help="folder that export replaces; default: the package's model",
    )
    try:
        arguments = parser.parse_args()
        torch.set_num_threads(1)  # so that results do not depend on the number of cores
        if arguments.stage in ("all", "decoder"):
            stage_decoder(arguments.work_dir, WORLDS[arguments.world], arguments.model)
        if arguments.stage in ("all", "export"):
            export(arguments.work_dir, arguments.target)
    except UserError as error:
        return report_error(PROGRAM, error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
