"""The trained model of the package."""

import json

import numpy as np
import pytest
import torch

from iris_fast.config import PRESETS, GenerateConfig
from iris_fast.models.pretrained.load import LoadedJanus, load_janus
from iris_fast.models.pretrained.save import save_janus
from iris_fast.preflight.inputs import open_model
from iris_fast.prompts import read_prompts
from iris_fast.records import Prompt
from iris_fast.rollout.sampler import Sampler
from iris_fast.tiny import HELD_OUT_FILE, MODEL_FOLDER, build_tiny
from iris_fast.tiny.recipe.construct_vq import construct_vq
from iris_fast.tiny.recipe.measure import (
    MEASURED_FILE,
    accuracy_by_kind,
    generate_images,
    image_metrics,
)
from iris_fast.tiny.world import COLOURS, SHAPES


@pytest.fixture(scope="module")
def shipped() -> LoadedJanus:
    torch.set_num_threads(1)
    return build_tiny()


def test_at_most_ten_megabytes():
    assert sum(path.stat().st_size for path in MODEL_FOLDER.rglob("*")) <= 10e6


def test_tiny_is_the_shipped_model(shipped):
    opened = open_model("tiny", torch.float32)
    assert torch.equal(opened.model.lm_head.weight, shipped.model.lm_head.weight)
    assert opened.layout == "transformers"
    assert opened.config.image_tokens == 64


def test_opens_from_both_layouts(shipped, tmp_path):
    opened = load_janus(save_janus(shipped, tmp_path / "original", "original"))
    for name, tensor in shipped.model.state_dict().items():
        assert torch.equal(opened.model.state_dict()[name], tensor), name


def preset_config(**settings) -> GenerateConfig:
    """Sampling as in the preset."""
    names = ("cot", "cfg_weight", "max_completion_length")
    return GenerateConfig(**{name: PRESETS["tiny"][name] for name in names} | settings)


def test_accuracy_is_as_stated(shipped):
    """On every second held-out prompt; the tolerance is about three standard deviations."""
    stated = json.loads(MEASURED_FILE.read_text())
    config = preset_config()
    (of_preset,) = [
        found
        for settings, found in stated.items()
        if settings == f"cfg_weight {config.cfg_weight:g}, cot {str(config.cot).lower()}"
    ]
    assert 0.35 <= of_preset["mean"] <= 0.65
    prompts = read_prompts(str(HELD_OUT_FILE))[::2]
    rows, _ = generate_images(shipped, config, prompts, 1)
    assert accuracy_by_kind(prompts, rows)["mean"] == pytest.approx(of_preset["mean"], abs=0.2)


def test_the_vq_is_the_constructed_one(shipped):
    for name, tensor in construct_vq().state_dict().items():
        assert torch.equal(shipped.vq.state_dict()[name], tensor), name


def test_few_things_are_broken(shipped):
    prompts = read_prompts(str(HELD_OUT_FILE))[::4]
    rows, _ = generate_images(shipped, preset_config(seed=5), prompts, 2)
    assert image_metrics(prompts, rows)["broken"] <= 0.06


def test_chain_of_thought_is_written(shipped):
    config = GenerateConfig(cot=True, max_completion_length=24)
    sampler = Sampler(shipped.model, shipped.tokenizer, config, shipped.config.image_tokens)
    rollout = sampler.rollout([Prompt("a red cross and a blue corner")] * 8, list(range(8)))
    assert sum(rollout.truncated) <= 1
    pieces = [piece.split(" ", 2) for text in rollout.cot_texts for piece in text.split(", ")]
    well_formed = [
        len(piece) == 3 and piece[0] in COLOURS and piece[1] in SHAPES for piece in pieces
    ]
    assert np.mean(well_formed) >= 0.8
