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
    broken_things,
    colour_entropy,
    detect_objects,
    diversity,
    diversity_reward,
    edge_energy,
    reward,
    richness,
)
from iris_fast.tiny.world import (
    FAITHFUL,
    KINDS,
    SHAPES,
    WORLDS,
    SceneObject,
    compose,
    random_scenes,
    render,
    render_all,
    render_codes,
)

FRESH_SCENES = 300


@pytest.fixture(scope="module")
def rates() -> dict[str, tuple[float, float]]:
    return verifier_rates(FRESH_SCENES, seed=int(np.random.default_rng().integers(2**31)))


@pytest.mark.parametrize("kind", KINDS)
def test_rates_on_fresh_scenes(rates, kind):
    assert rates[kind] == (1.0, 1.0)


@pytest.mark.parametrize("world", WORLDS)
def test_every_thing_is_read_exactly(world):
    scenes = random_scenes(300, 17, WORLDS[world])
    for scene, image in zip(scenes, render_all(scenes), strict=True):
        expected = sorted((t.x, t.y, t.shape, t.colour) for t in scene.shown)
        detected = [(t.x, t.y, t.shape, t.colour) for t in detect_objects(image)]
        assert sorted(detected) == expected
        assert broken_things(image) == 0


def pair(column: int = 4, world=FAITHFUL) -> np.ndarray:
    things = SceneObject("cross", "red", 2, 0), SceneObject("corner", "blue", 2, column)
    return render(compose("position", things, world, np.random.default_rng(0)))


def test_detected_objects():
    detected = sorted(detect_objects(pair()), key=lambda obj: obj.x)
    assert [(obj.shape, obj.colour) for obj in detected] == [
        ("cross", "red"),
        ("corner", "blue"),
    ]
    assert [(obj.x, obj.y) for obj in detected] == [(6, 14), (22, 14)]


def test_touching_objects_are_separated():
    assert {(t.shape, t.colour) for t in detect_objects(pair(column=3))} == {
        ("cross", "red"),
        ("corner", "blue"),
    }


@pytest.mark.parametrize("shape", SHAPES)
def test_broken_things(shape):
    """A thing that lacks any one of its cells, and a lone cell."""
    thing = SceneObject(shape, "blue", 2, 2)
    scene = compose("colors", (thing,), FAITHFUL, np.random.default_rng(0))
    for missing in np.flatnonzero(scene.codes):
        codes = np.array(scene.codes)
        codes[missing] = 0
        image = render_codes(codes[None])[0]
        assert not detect_objects(image)
        assert broken_things(image) >= 1
    alone = np.zeros((1, 64), np.int64)
    alone[0, 20] = scene.codes[missing]
    assert broken_things(render_codes(alone)[0]) == 1
    assert detect_objects(render_codes(alone)[0]) == []


def test_noise_is_tolerated():
    rng = np.random.default_rng(0)
    for scene in random_scenes(60, 21):
        image = render(scene).astype(int)
        noisy = np.clip(image + rng.integers(-6, 7, image.shape), 0, 255).astype(np.uint8)
        expected = sorted((t.shape, t.colour) for t in scene.objects)
        assert sorted((t.shape, t.colour) for t in detect_objects(noisy)) == expected


@pytest.mark.parametrize("name", ["black", "grey", "noise", "red"])
def test_no_objects_without_shapes(name):
    rng = np.random.default_rng(0)
    images = {
        "black": np.zeros((32, 32, 3)),
        "grey": np.full((32, 32, 3), 128),
        "noise": rng.integers(100, 140, (32, 32, 3)),
        "red": np.full((32, 32, 3), (220, 40, 40)),
    }
    detected = detect_objects(images[name].astype(np.uint8))
    assert detected == []
    assert broken_things(images[name].astype(np.uint8)) == (name == "red")


class TestReward:
    required = ([{"class": "cross", "count": 1}], [{"class": "tee", "count": 1}])

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
        black, white = np.zeros((32, 32, 3), np.uint8), np.full((32, 32, 3), 255, np.uint8)
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
        plain = np.full((32, 32, 3), 90, np.uint8)
        assert colour_entropy(plain) == edge_energy(plain) == richness(plain) == 0
        halves = plain.copy()
        halves[:, 16:] = 200
        assert colour_entropy(halves) == pytest.approx(1)
        assert edge_energy(halves) == pytest.approx(110 / 255 / 31 / 2)

    def test_textured_things_are_richer_than_flat_ones(self):
        rich, plain = pair(), pair(world=WORLDS["busy"])
        grounds = render_all(random_scenes(1, 0, WORLDS["busy"]))[0]
        for measure in itertools.chain((colour_entropy, edge_energy, richness)):
            assert measure(rich) > measure(grounds * 0)
        assert edge_energy(plain) > edge_energy(rich)  # a busy ground
