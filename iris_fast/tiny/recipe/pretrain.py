"""Pretrain the tiny model of `iris_fast/tiny/model` from scratch, on one CPU core.

    python -m iris_fast.tiny.recipe.pretrain [--work_dir runs/tiny-pretrain] [--stage all]

Stage A (`vq`) trains the VQ model on 20 000 scenes; `codes` encodes these and three further blocks
of 20 000; stage B (`decoder`) trains the decoder on them; `export` writes the model folder in the
transformers layout. Stages save their state every minute and resume from it, and `codes` may run in
parallel with `decoder`. On one otherwise idle core of a 2025 server CPU, stage A takes about 15
minutes, the codes of a block 3 minutes, and the 18 600 steps of stage B 70 minutes.

The model in the package was trained with this recipe, but with interruptions during which the
recipe changed: the decoder's first 3800 steps used learning rate schedules for other totals (3000
to 4500 steps), some of them with two chains of thought per batch at weight 0.2, and the first 460
steps of the second phase used schedules for 4800 and more steps. The current recipe therefore gives
a similar model, not the same bits.
"""

from __future__ import annotations

import shutil
import sys
import time
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from iris_fast.cli import CommandParser
from iris_fast.errors import UserError, report_error
from iris_fast.models.pretrained.load import LoadedJanus
from iris_fast.models.pretrained.save import save_janus
from iris_fast.models.vq import VQModel
from iris_fast.tiny.build import MODEL_FOLDER
from iris_fast.tiny.recipe.pretrain_decoder import (
    Block,
    DecoderRecipe,
    build_untrained,
    train_decoder,
)
from iris_fast.tiny.recipe.pretrain_vq import VQ_CONFIG, VQRecipe, encode_all, train_vq
from iris_fast.tiny.recipe.training import StageProgress, load_state, save_state
from iris_fast.tiny.world import Scene, random_scenes, render_all

PROGRAM = "iris_fast.tiny.recipe.pretrain"
SCENES_PER_BLOCK, FIRST_SEED = 20_000, 1
SAVE_EVERY_S = 60.0
VQ_RECIPE, DECODER_RECIPE = VQRecipe(), DecoderRecipe()


def block_scenes(block: int) -> list[Scene]:
    """The scenes of a block; no two blocks share a seed."""
    return random_scenes(SCENES_PER_BLOCK, FIRST_SEED + block)


def stage_vq(folder: Path) -> None:
    """Stage A: train the VQ model and write `vq.pt`."""
    images = render_all(block_scenes(0))
    train_vq(images, folder / "vq.pt", VQ_RECIPE, StageProgress(SAVE_EVERY_S))


def stage_codes(folder: Path) -> None:
    """Encode every block that stage B uses, unless its codes exist already."""
    vq = open_vq(folder)
    for phase in DECODER_RECIPE.phases:
        for step in range(0, phase.steps, phase.steps_per_block):
            block_codes(folder, vq, phase.block(step))


def stage_decoder(folder: Path) -> None:
    """Stage B: train the decoder and write `decoder.pt`."""
    vq = open_vq(folder)

    @lru_cache(maxsize=1)
    def block(number: int) -> Block:
        return block_scenes(number), block_codes(folder, vq, number)

    train_decoder(block, vq, folder / "decoder.pt", DECODER_RECIPE, StageProgress(SAVE_EVERY_S))


def export(folder: Path, target: Path = MODEL_FOLDER) -> None:
    """Write the model folder from the states that both stages have saved."""
    loaded = assemble(folder)
    if target.exists():
        shutil.rmtree(target)
    save_janus(loaded, target, dtype=torch.bfloat16)


def assemble(folder: Path) -> LoadedJanus:
    """The model of the stages' saved states."""
    loaded = build_untrained(open_vq(folder), DECODER_RECIPE.seed)
    loaded.model.load_state_dict(load_state(folder / "decoder.pt")["model"])
    return loaded


def open_vq(folder: Path) -> VQModel:
    """The VQ model of stage A; waits until its codes are final."""
    while not _codes_are_final(folder / "vq.pt"):
        time.sleep(10)
    vq = VQModel(VQ_CONFIG)
    vq.load_state_dict(load_state(folder / "vq.pt")["model"])
    return vq.eval().requires_grad_(False)


def _codes_are_final(path: Path) -> bool:
    return path.is_file() and load_state(path)["step"] >= VQ_RECIPE.codes_final


def block_codes(folder: Path, vq: VQModel, block: int) -> Tensor:
    """The codes [N, 64] of a block's scenes, cached in `codes_BLOCK.pt`."""
    path = folder / f"codes_{block}.pt"
    if not path.is_file():
        codes = encode_all(vq, render_all(block_scenes(block)))
        save_state(path, codes=codes.short())
    return load_state(path)["codes"].long()


STAGES = {"vq": stage_vq, "codes": stage_codes, "decoder": stage_decoder}


def main() -> int:
    """Run the command and return its exit code."""
    parser = CommandParser(prog=PROGRAM, description=__doc__.splitlines()[0])
    parser.add_argument(
        "--work_dir",
        type=Path,
        default=Path("runs/tiny-pretrain"),
        help="folder of the stages' states; default: runs/tiny-pretrain",
    )
    parser.add_argument(
        "--stage",
        choices=("all", *STAGES, "export"),
        default="all",
        help="what to run; default: all, in this order",
    )
    parser.add_argument(
        "--target",
        type=Path,
        default=MODEL_FOLDER,
        help="folder that export replaces; default: the package's model",
    )
    try:
        arguments = parser.parse_args()
        torch.set_num_threads(1)  # so that results do not depend on the number of cores
        for name, stage in STAGES.items():
            if arguments.stage in ("all", name):
                stage(arguments.work_dir)
        if arguments.stage in ("all", "export"):
            export(arguments.work_dir, arguments.target)
    except UserError as error:
        return report_error(PROGRAM, error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
