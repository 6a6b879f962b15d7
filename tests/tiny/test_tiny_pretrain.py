"""The scenes of stage B, and resuming it."""

from collections import Counter

import numpy as np
import pytest
import torch

from iris_fast.tiny.recipe.pretrain_decoder import (
    KIND_SHARES,
    DecoderRecipe,
    build_untrained,
    expected_losses,
    make_batch,
    sample_scenes,
    train_decoder,
)
from iris_fast.tiny.recipe.training import StageProgress, load_state
from iris_fast.tiny.world import KINDS, NUM_CODES, WORLDS, scene_codes

RECIPE = DecoderRecipe(steps=4, batch_size=2, cot_sequences=1)


class Interrupted(StageProgress):
    """Raises after some steps, before the state of the last of them is saved."""

    def __init__(self, after: int) -> None:
        super().__init__(save_every_s=0)
        self.after = after

    def log(self, stage: str, step: int, total: int, **values: float) -> None:
        if step == self.after:
            raise KeyboardInterrupt


def test_scenes_are_of_all_kinds_in_their_shares():
    scenes = sample_scenes(2000, WORLDS["shipped"], np.random.default_rng(0))
    counts, total = Counter(scene.kind for scene in scenes), sum(KIND_SHARES.values())
    for kind in KINDS:
        assert counts[kind] / 2000 == pytest.approx(KIND_SHARES[kind] / total, abs=0.03)


def test_a_batch_has_the_codes_of_its_scenes():
    scenes = sample_scenes(3, WORLDS["shipped"], np.random.default_rng(1))
    loaded = build_untrained(RECIPE.seed)
    packed = make_batch(scenes, loaded.tokenizer, RECIPE, np.random.default_rng(2))
    assert packed.image_targets.tolist() == scene_codes(scenes).ravel().tolist()


def test_expected_losses():
    """Of the targets alone they are the model's own; over alternatives, the mean of these."""
    rng = np.random.default_rng(1)
    scenes = sample_scenes(3, WORLDS["shipped"], rng)
    loaded = build_untrained(RECIPE.seed)
    packed = make_batch(scenes, loaded.tokenizer, RECIPE, rng)
    alone = torch.arange(NUM_CODES)[:, None]
    others = (alone + 1) % NUM_CODES
    with torch.no_grad():
        text, image = loaded.model(packed)
        text_loss, image_loss = expected_losses(loaded.model, packed, alone)
        both = expected_losses(loaded.model, packed, torch.cat([alone, others], dim=1))[1]
        of_others = expected_losses(loaded.model, packed, others)[1]
    assert text_loss.item() == pytest.approx(-text.logprob.mean().item(), rel=1e-5)
    assert image_loss.item() == pytest.approx(-image.logprob.mean().item(), rel=1e-5)
    assert both.item() == pytest.approx((image_loss + of_others).item() / 2, rel=1e-5)


def test_a_resumed_stage_gives_the_same_bits(tmp_path):
    def train(name: str, progress: StageProgress):
        loaded = build_untrained(RECIPE.seed)
        train_decoder(loaded, tmp_path / name, RECIPE, WORLDS["shipped"], progress)
        return loaded.model.state_dict()

    whole = train("whole.pt", StageProgress(save_every_s=0))
    with pytest.raises(KeyboardInterrupt):
        train("parts.pt", Interrupted(after=3))
    assert load_state(tmp_path / "parts.pt")["step"] == 2
    parts = train("parts.pt", StageProgress(save_every_s=0))
    for name, tensor in whole.items():
        assert torch.equal(parts[name], tensor), name
