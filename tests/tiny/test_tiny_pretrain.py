"""The pretraining phases, and resuming an interrupted stage."""

import pytest
import torch

from iris_fast.models.vq import VQModel
from iris_fast.tiny.recipe.pretrain import DECODER_RECIPE, block_scenes
from iris_fast.tiny.recipe.pretrain_decoder import DecoderRecipe, Phase, phase_at, train_decoder
from iris_fast.tiny.recipe.pretrain_vq import VQ_CONFIG
from iris_fast.tiny.recipe.training import StageProgress, load_state
from iris_fast.tiny.world import random_scenes

PHASES = (
    Phase(2, 1e-3, first_block=0, steps_per_block=2, cot_sequences=1),
    Phase(3, 1e-4, first_block=1, steps_per_block=1, cot_sequences=2),
)
RECIPE = DecoderRecipe(phases=PHASES, batch_size=2)


def test_phases_follow_each_other():
    assert [phase_at(RECIPE, step) for step in range(5)] == [
        (PHASES[0], 0), (PHASES[0], 1), (PHASES[1], 0), (PHASES[1], 1), (PHASES[1], 2)
    ]  # fmt: skip
    with pytest.raises(ValueError, match="fewer steps"):
        phase_at(RECIPE, 5)


def test_every_block_has_its_own_scenes():
    steps = sum(phase.steps for phase in DECODER_RECIPE.phases)
    positions = [phase_at(DECODER_RECIPE, step) for step in range(0, steps, 100)]
    blocks = [phase.block(phase_step) for phase, phase_step in positions]
    assert set(blocks) == set(range(max(blocks) + 1))
    assert block_scenes(0)[:3] == random_scenes(3, 1)
    assert block_scenes(0)[:3] != block_scenes(1)[:3]


def test_a_resumed_stage_gives_the_same_bits(tmp_path):
    torch.manual_seed(0)
    vq = VQModel(VQ_CONFIG)
    loaded = []

    def block(number: int):
        loaded.append(number)
        if stop_at and len(loaded) == stop_at:
            raise KeyboardInterrupt
        codes = torch.arange(20 * 64).view(20, 64) % VQ_CONFIG.codebook_size
        return random_scenes(20, 50 + number), codes

    stop_at = 0
    whole = train_decoder(block, vq, tmp_path / "whole.pt", RECIPE, StageProgress(save_every_s=0))
    assert loaded == [0, 0, 1, 2, 3]
    loaded, stop_at = [], 4
    with pytest.raises(KeyboardInterrupt):
        train_decoder(block, vq, tmp_path / "parts.pt", RECIPE, StageProgress(save_every_s=0))
    assert load_state(tmp_path / "parts.pt")["step"] == 3
    stop_at = 0
    parts = train_decoder(block, vq, tmp_path / "parts.pt", RECIPE, StageProgress(save_every_s=0))
    assert loaded == [0, 0, 1, 2, 2, 3]
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(parts.model.state_dict()[name], tensor), name
