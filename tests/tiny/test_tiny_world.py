"""Scenes, renders and captions of the synthetic world."""

import hashlib
import itertools
from dataclasses import replace

import numpy as np
import pytest

from iris_fast.prompts import read_prompts
from iris_fast.tiny import HELD_OUT_FILE, PROMPTS_FILE, build_random_tiny
from iris_fast.tiny.captions import (
    all_captions,
    chain_of_thought,
    position_name,
    prompt_sets,
    random_caption,
    satisfies,
    true_captions,
)
from iris_fast.tiny.recipe.pretrain_decoder import cot_task
from iris_fast.tiny.world import (
    BACKGROUNDS,
    COLOURS,
    IMAGE_SIZE,
    KINDS,
    SHADINGS,
    SHAPES,
    Scene,
    SceneObject,
    random_scene,
    random_scenes,
    render,
    render_all,
)


def make_object(shape="circle", colour="red", radius=12, x=32, y=32, shading="flat") -> SceneObject:
    return SceneObject(shape, colour, radius, x, y, shading)


class TestRenderer:
    def test_the_same_seed_gives_the_same_images(self):
        digests = {
            hashlib.sha256(render_all(random_scenes(60, 5)).tobytes()).hexdigest() for _ in range(2)
        }
        assert len(digests) == 1
        assert not np.array_equal(render_all(random_scenes(6, 5)), render_all(random_scenes(6, 6)))

    def test_shape_and_dtype(self):
        images = render_all(random_scenes(6, 0))
        assert images.shape == (6, IMAGE_SIZE, IMAGE_SIZE, 3)
        assert images.dtype == np.uint8

    def test_flat_circle_on_plain_background(self):
        image = render(Scene("colors", "plain", (0, 1), (make_object(),)))
        assert tuple(image[32, 32]) == COLOURS["red"]
        assert tuple(image[0, 0]) == (236, 234, 228)
        # Area of the disc, from each pixel's position between background and object colour.
        coverage = (234.0 - image[..., 1]) / (234 - 40)
        assert coverage.sum() == pytest.approx(np.pi * 12**2, rel=0.01)
        assert ((coverage > 0.05) & (coverage < 0.95)).any()  # the edge is anti-aliased

    @pytest.mark.parametrize("shape", SHAPES)
    def test_every_shape_is_as_wide_and_as_high_as_a_circle(self, shape):
        image = render(Scene("colors", "plain", (0, 1), (make_object(shape),)))
        filled = image[..., 1] < 150
        rows, columns = filled.any(1).nonzero()[0], filled.any(0).nonzero()[0]
        assert abs(rows[-1] - rows[0] + 1 - 24) <= 2
        assert abs(columns[-1] - columns[0] + 1 - 24) <= 2

    def test_styles_are_distinguishable(self):
        scenes = [
            Scene("colors", background, (1, 3), (make_object(shading=shading),))
            for background, shading in itertools.product(BACKGROUNDS, SHADINGS)
        ]
        images = render_all(scenes).astype(int)
        for first, second in itertools.combinations(images, 2):
            assert abs(first - second).max() > 25

    def test_objects_neither_touch_nor_leave_the_image(self):
        rng = np.random.default_rng(3)
        for kind in KINDS:
            for _ in range(100):
                scene = random_scene(kind, rng)
                for t in scene.objects:
                    assert t.radius <= min(t.x, t.y)
                    assert max(t.x, t.y) + t.radius <= IMAGE_SIZE
                for a, b in itertools.combinations(scene.objects, 2):
                    assert max(abs(a.x - b.x), abs(a.y - b.y)) >= a.radius + b.radius + 4


class TestCaptions:
    @pytest.mark.parametrize("kind", KINDS)
    def test_true_of_its_scene(self, kind):
        rng = np.random.default_rng(1)
        for _ in range(50):
            scene = random_scene(kind, rng)
            caption = random_caption(scene, rng)
            assert caption.tag == kind
            assert satisfies(scene.objects, caption.include, caption.exclude)

    @pytest.mark.parametrize("kind", KINDS)
    def test_several_distinct_phrasings(self, kind):
        scene = random_scene(kind, np.random.default_rng(2))
        assert len(true_captions(scene, kind, np.random.default_rng(0))) >= 6
        texts = [caption.text for caption in all_captions(kind)]
        assert len(set(texts)) == len(texts)

    def test_counting_is_exact(self):
        three = [make_object(x=x) for x in (10, 32, 54)]
        captions = {c.text: c for c in all_captions("counting")}
        verdicts = {
            text: satisfies(three, captions[text].include, captions[text].exclude)
            for text in ("two circles", "three circles", "four circles", "three squares")
        }
        assert [text for text, right in verdicts.items() if right] == ["three circles"]

    def test_position_and_attribution(self):
        objects = [make_object(x=16), make_object("square", "blue", x=48)]
        right = {
            c.text for kind in ("position", "color_attr") for c in all_captions(kind)
            if satisfies(objects, c.include, c.exclude)
        }  # fmt: skip
        assert {"a circle left of a square", "a square to the right of a circle"} <= right
        assert {"a red circle and a blue square", "a blue square with a red circle"} <= right
        assert not {"a square left of a circle", "a circle above a square"} & right
        assert not {"a blue circle and a red square", "a red circle and a red square"} & right

    def test_a_close_pair_satisfies_no_position(self):
        near = [make_object(x=30), replace(make_object("square"), x=34)]
        assert not any(satisfies(near, c.include, c.exclude) for c in all_captions("position"))


class TestChainOfThought:
    def test_names_every_object(self):
        scene = Scene(
            "two_object", "plain", (0, 1), (make_object("square", "blue", x=50), make_object(x=12))
        )
        assert chain_of_thought(scene) == "red circle left, blue square right"
        assert position_name(make_object(x=50, y=50)) == "bottom right"
        assert position_name(make_object()) == "middle"

    def test_length_and_tokens(self):
        tokenizer = build_random_tiny().tokenizer
        for scene in random_scenes(300, 8):
            prompt, answer = cot_task("a circle", chain_of_thought(scene), tokenizer)
            assert len(answer) <= 24
            assert answer[-1] == tokenizer.eos_id
            assert prompt[0] == tokenizer.bos_id
            assert tokenizer.bos_id not in answer
            assert tokenizer.decode(answer).strip() == chain_of_thought(scene)


class TestPromptFiles:
    def test_files_match_the_generator(self):
        for path, captions in zip((PROMPTS_FILE, HELD_OUT_FILE), prompt_sets(), strict=True):
            assert path.read_bytes().decode() == "".join(c.to_json() + "\n" for c in captions)

    def test_disjoint_and_of_every_kind(self):
        train, held_out = (read_prompts(str(path)) for path in (PROMPTS_FILE, HELD_OUT_FILE))
        texts = [prompt.text for prompt in (*train, *held_out)]
        assert len(set(texts)) == len(texts)
        for prompts in (train, held_out):
            tags = [prompt.extra["tag"] for prompt in prompts]
            assert set(tags) == set(KINDS)
            assert min(tags.count(kind) for kind in KINDS) >= 10

    def test_no_pretraining_caption_is_held_out(self):
        rng = np.random.default_rng(0)
        held_out = {caption.text for caption in prompt_sets()[1]}
        scenes = random_scenes(600, 1)
        assert not held_out & {random_caption(scene, rng).text for scene in scenes}

    def test_words_are_single_tokens(self):
        tokenizer = build_random_tiny().tokenizer
        texts = [caption.text for captions in prompt_sets() for caption in captions]
        assert all(len(tokenizer.encode(text)) == len(text.split()) + 1 for text in texts)
