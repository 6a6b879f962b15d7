"""The verifier on fresh scenes and as a reward; diversity and richness."""

import itertools

import numpy as np
import pytest
import torch
from PIL import Image

from iris_fast.prompts import read_prompts
from iris_fast.records import Prompt
from iris_fast.rewards import external
from iris_fast.tiny import HELD_OUT_FILE
from iris_fast.tiny.captions import HELD_OUT_PER_KIND
from iris_fast.tiny.recipe.measure import accuracy_by_kind, verifier_rates
from iris_fast.tiny.verifier import (
    colour_entropy,
    detect_objects,
    diversity,
    diversity_reward,
    edge_energy,
    reward,
    richness,
)
from iris_fast.tiny.world import KINDS, Scene, SceneObject, random_scenes, render

FRESH_SCENES = 300


@pytest.fixture(scope="module")
def rates() -> dict[str, tuple[float, float]]:
    return verifier_rates(FRESH_SCENES, seed=int(np.random.default_rng().integers(2**31)))


@pytest.mark.parametrize("kind", KINDS)
def test_rates_on_fresh_scenes(rates, kind):
    accepted, rejected = rates[kind]
    assert accepted >= 0.995
    assert rejected >= 0.995


def pair(x: int = 46) -> np.ndarray:
    circle = SceneObject("circle", "red", 9, 14, 32, "shaded")
    square = SceneObject("square", "blue", 9, x, 32, "banded")
    return render(Scene("position", "checks", (1, 4), (circle, square)))


def test_detected_objects():
    detected = sorted(detect_objects(pair()), key=lambda obj: obj.x)
    assert [(obj.shape, obj.colour) for obj in detected] == [
        ("circle", "red"),
        ("square", "blue"),
    ]
    assert [(obj.x, obj.y) for obj in detected] == [(14, 32), (46, 32)]


def test_touching_objects_are_separated():
    assert {(t.shape, t.colour) for t in detect_objects(pair(x=32))} == {
        ("circle", "red"),
        ("square", "blue"),
    }


def test_blur_and_noise_are_tolerated():
    rng = np.random.default_rng(0)
    for scene in random_scenes(60, 21):
        image = Image.fromarray(render(scene)).resize((40, 40), Image.Resampling.BILINEAR)
        blurred = np.asarray(image.resize((64, 64), Image.Resampling.BILINEAR)).astype(int)
        noisy = np.clip(blurred + rng.integers(-8, 9, blurred.shape), 0, 255).astype(np.uint8)
        expected = sorted((t.shape, t.colour) for t in scene.objects)
        detected = sorted((t.shape, t.colour) for t in detect_objects(noisy))
        assert len(detected) == len(expected)
        assert [colour for _, colour in detected] == [colour for _, colour in expected]


@pytest.mark.parametrize("name", ["black", "grey", "noise", "red"])
def test_no_objects_without_shapes(name):
    rng = np.random.default_rng(0)
    images = {
        "black": np.zeros((64, 64, 3)),
        "grey": np.full((64, 64, 3), 128),
        "noise": rng.integers(100, 140, (64, 64, 3)),
        "red": np.full((64, 64, 3), (220, 40, 40)),
    }
    detected = detect_objects(images[name].astype(np.uint8))
    # The outline of an entirely red image is a square.
    assert [obj.shape for obj in detected] == (["square"] if name == "red" else [])


class TestReward:
    required = ([{"class": "circle", "count": 1}], [{"class": "cross", "count": 1}])

    def test_uses_the_fields_of_the_prompt_file(self):
        fields = [{"tag": "x", "include": required, "exclude": []} for required in self.required]
        prompts = [Prompt("an image", extra) for extra in fields]
        images = [Image.fromarray(pair())] * 2
        function = external.load("iris_fast.tiny.verifier:reward")
        given = external.call("verifier", function, prompts, images)
        assert torch.equal(given, torch.tensor([1.0, 0.0]))

    def test_a_prompt_without_requirements_is_an_error(self):
        with pytest.raises(ValueError, match="'a cat' has no field `include`"):
            reward(["a cat"], [Image.fromarray(pair())], [None], [None])


def test_accuracy_by_kind():
    prompts = read_prompts(str(HELD_OUT_FILE))
    shares = accuracy_by_kind(prompts, [[Image.fromarray(pair())]] * len(prompts))
    assert set(shares) == {*KINDS, "mean"}
    assert 0 < shares["mean"] < 1
    assert sum(prompt.extra["tag"] == "position" for prompt in prompts) == HELD_OUT_PER_KIND


class TestMeasures:
    def test_diversity(self):
        black, white = np.zeros((64, 64, 3), np.uint8), np.full((64, 64, 3), 255, np.uint8)
        assert diversity(black[None]) == 0
        assert diversity(np.stack([black, black])) == 0
        assert diversity(np.stack([black, white])) == 1
        assert diversity(np.stack([black, black, white])) == pytest.approx(2 / 3)

    def test_diversity_of_each_image(self):
        black, grey, white = (Image.new("RGB", (24, 24), (v,) * 3) for v in (0, 51, 255))
        prompts = ["a", "b", "a", "a", "c"]
        found = diversity_reward(prompts, [black, white, grey, white, black])
        assert found == pytest.approx([(0.2 + 1) / 2, 0, (0.2 + 0.8) / 2, (1 + 0.8) / 2, 0])
        group = np.stack([np.asarray(image) for image in (black, grey, white)])
        assert np.mean([found[i] for i in (0, 2, 3)]) == pytest.approx(diversity(group))

    def test_richness(self):
        plain = np.full((64, 64, 3), 90, np.uint8)
        assert colour_entropy(plain) == edge_energy(plain) == richness(plain) == 0
        halves = plain.copy()
        halves[:, 32:] = 200
        assert colour_entropy(halves) == pytest.approx(1)
        assert edge_energy(halves) == pytest.approx(110 / 255 / 63 / 2)

    def test_rich_scenes_are_richer_than_plain_ones(self):
        objects = tuple(SceneObject("circle", "red", 17, 32, 32, s) for s in ("flat", "glossy"))
        plain, rich = (
            render(Scene("colors", background, (1, 4), (obj,)))
            for background, obj in zip(("plain", "checks"), objects, strict=True)
        )
        for measure in itertools.chain((colour_entropy, edge_energy, richness)):
            assert measure(rich) > measure(plain)
