"""How the model in `iris_fast/tiny/model` was made, from nothing, on one CPU core.

    python -m iris_fast.tiny.recipe.pretrain [--work_dir runs/tiny-pretrain] [--stage all]

Stage A trains the VQ on 20 000 scenes (`pretrain_vq`); `codes` encodes these and three more blocks
of as many; stage B trains the decoder on them (`pretrain_decoder`); `export` writes the model's
folder in the transformers layout. The stages save their state every minute and go on from it, and
`codes` may run beside `decoder`. On one core of a 2025 server CPU that has nothing else to do:
about a quarter of an hour for A, three minutes for a block's codes, an hour and ten minutes for the
18 600 steps of B.

The file that ships was made in this way, but not in one go: stages were stopped and gone on with
while the recipe was found. The decoder's first 3800 steps aimed at other totals (3000 to 4500),
and so had another course of the learning rate, some of them with two chains of thought a batch at
weight 0.2; the first 460 of the second phase were aimed at 4800 and more. The recipe as it stands
gives a model like it, not the same bits.
"""

from __future__ import annotations

import argparse
import shutil
import time
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from iris_fast.models.pretrained.load import LoadedJanus
from iris_fast.models.pretrained.save import save_janus
from iris_fast.models.vq import VQModel
from iris_fast.tiny.build import MODEL_FOLDER
from iris_fast.tiny.recipe.pretrain_decoder import Block, DecoderRecipe, start, train_decoder
from iris_fast.tiny.recipe.pretrain_vq import VQ_CONFIG, VQRecipe, encode_all, train_vq
from iris_fast.tiny.recipe.training import Course, load_state, save_state
from iris_fast.tiny.world import Scene, random_scenes, render_all

BLOCK_SCENES, FIRST_SEED = 20_000, 1
SAVE_EVERY_S = 60.0
VQ_RECIPE, DECODER_RECIPE = VQRecipe(), DecoderRecipe()


def block_scenes(block: int) -> list[Scene]:
    """The scenes of a block: every block has its own."""
    return random_scenes(BLOCK_SCENES, FIRST_SEED + block)


def stage_vq(folder: Path) -> None:
    """Stage A: `vq.pt`."""
    images = render_all(block_scenes(0))
    train_vq(images, folder / "vq.pt", VQ_RECIPE, Course(SAVE_EVERY_S))


def stage_codes(folder: Path) -> None:
    """The codes of every block that stage B will draw from, as far as they are not there yet."""
    vq = open_vq(folder)
    for phase in DECODER_RECIPE.phases:
        for step in range(0, phase.steps, phase.steps_per_block):
            block_codes(folder, vq, phase.block(step))


def stage_decoder(folder: Path) -> None:
    """Stage B: `decoder.pt`."""
    vq = open_vq(folder)

    @lru_cache(maxsize=1)
    def block(number: int) -> Block:
        return block_scenes(number), block_codes(folder, vq, number)

    train_decoder(block, vq, folder / "decoder.pt", DECODER_RECIPE, Course(SAVE_EVERY_S))


def export(folder: Path, target: Path = MODEL_FOLDER) -> None:
    """The model's folder from what both stages have saved so far."""
    opened = assemble(folder)
    if target.exists():
        shutil.rmtree(target)
    save_janus(opened, target, dtype=torch.bfloat16)


def assemble(folder: Path) -> LoadedJanus:
    """The model from the stages' saved states."""
    checkpoint = start(open_vq(folder), DECODER_RECIPE.seed)
    checkpoint.model.load_state_dict(load_state(folder / "decoder.pt")["model"])
    return checkpoint


def open_vq(folder: Path) -> VQModel:
    """The VQ that stage A has made, as soon as its codes are final."""
    while not _codes_are_final(folder / "vq.pt"):
        time.sleep(10)
    vq = VQModel(VQ_CONFIG)
    vq.load_state_dict(load_state(folder / "vq.pt")["model"])
    return vq.eval().requires_grad_(False)


def _codes_are_final(path: Path) -> bool:
    return path.is_file() and load_state(path)["step"] >= VQ_RECIPE.codes_final


def block_codes(folder: Path, vq: VQModel, block: int) -> Tensor:
    """The codes [N, 64] of a block's scenes, kept in `codes_BLOCK.pt`."""
    path = folder / f"codes_{block}.pt"
    if not path.is_file():
        codes = encode_all(vq, render_all(block_scenes(block)))
        save_state(path, codes=codes.short())
    return load_state(path)["codes"].long()


STAGES = {"vq": stage_vq, "codes": stage_codes, "decoder": stage_decoder}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="iris_fast.tiny.recipe.pretrain", description=__doc__)
    parser.add_argument("--work_dir", type=Path, default=Path("runs/tiny-pretrain"))
    parser.add_argument("--stage", choices=("all", *STAGES, "export"), default="all")
    parser.add_argument("--target", type=Path, default=MODEL_FOLDER, help="what export writes")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # what a run gives then does not depend on the machine's cores
    for name, stage in STAGES.items():
        if arguments.stage in ("all", name):
            stage(arguments.work_dir)
    if arguments.stage in ("all", "export"):
        export(arguments.work_dir, arguments.target)


if __name__ == "__main__":
    main()
