"""Scenes, renders and captions of the small world."""

import hashlib
import itertools
from dataclasses import replace

import numpy as np
import pytest

from iris_fast.prompts import read_prompts
from iris_fast.tiny import HELD_OUT_FILE, PROMPTS_FILE, build_random_tiny
from iris_fast.tiny.captions import (
    all_captions,
    caption_of,
    chain_of_thought,
    holds,
    place,
    prompt_sets,
    true_captions,
)
from iris_fast.tiny.recipe.pretrain_decoder import cot_task
from iris_fast.tiny.world import (
    BACKGROUNDS,
    COLOURS,
    KINDS,
    SHADINGS,
    SHAPES,
    SIDE,
    Scene,
    Thing,
    random_scene,
    random_scenes,
    render,
    render_all,
)


def thing(shape="circle", colour="red", radius=12, x=32, y=32, shading="flat") -> Thing:
    return Thing(shape, colour, radius, x, y, shading)


class TestRenderer:
    def test_the_same_seed_gives_the_same_pictures(self):
        digests = {
            hashlib.sha256(render_all(random_scenes(60, 5)).tobytes()).hexdigest() for _ in range(2)
        }
        assert len(digests) == 1
        assert not np.array_equal(render_all(random_scenes(6, 5)), render_all(random_scenes(6, 6)))

    def test_form(self):
        pictures = render_all(random_scenes(6, 0))
        assert pictures.shape == (6, SIDE, SIDE, 3)
        assert pictures.dtype == np.uint8

    def test_flat_circle_on_plain_ground(self):
        picture = render(Scene("colors", "plain", (0, 1), (thing(),)))
        assert tuple(picture[32, 32]) == COLOURS["red"]
        assert tuple(picture[0, 0]) == (236, 234, 228)
        # Area of the disc, from how far each pixel is from the ground to the thing's colour.
        cover = (234.0 - picture[..., 1]) / (234 - 40)
        assert cover.sum() == pytest.approx(np.pi * 12**2, rel=0.01)
        assert ((cover > 0.05) & (cover < 0.95)).any()  # the edge is anti-aliased

    @pytest.mark.parametrize("shape", SHAPES)
    def test_every_shape_is_as_wide_and_as_high_as_a_circle(self, shape):
        picture = render(Scene("colors", "plain", (0, 1), (thing(shape),)))
        filled = picture[..., 1] < 150
        rows, columns = filled.any(1).nonzero()[0], filled.any(0).nonzero()[0]
        assert abs(rows[-1] - rows[0] + 1 - 24) <= 2
        assert abs(columns[-1] - columns[0] + 1 - 24) <= 2

    def test_finish_is_visible(self):
        scenes = [
            Scene("colors", background, (1, 3), (thing(shading=shading),))
            for background, shading in itertools.product(BACKGROUNDS, SHADINGS)
        ]
        pictures = render_all(scenes).astype(int)
        for first, second in itertools.combinations(pictures, 2):
            assert abs(first - second).max() > 25

    def test_things_neither_touch_nor_leave_the_picture(self):
        rng = np.random.default_rng(3)
        for kind in KINDS:
            for _ in range(100):
                scene = random_scene(kind, rng)
                for t in scene.things:
                    assert t.radius <= min(t.x, t.y)
                    assert max(t.x, t.y) + t.radius <= SIDE
                for a, b in itertools.combinations(scene.things, 2):
                    assert max(abs(a.x - b.x), abs(a.y - b.y)) >= a.radius + b.radius + 4


class TestCaptions:
    @pytest.mark.parametrize("kind", KINDS)
    def test_true_of_its_scene(self, kind):
        rng = np.random.default_rng(1)
        for _ in range(50):
            scene = random_scene(kind, rng)
            caption = caption_of(scene, rng)
            assert caption.tag == kind
            assert holds(scene.things, caption.include, caption.exclude)

    @pytest.mark.parametrize("kind", KINDS)
    def test_several_phrasings_all_different(self, kind):
        scene = random_scene(kind, np.random.default_rng(2))
        assert len(true_captions(scene, kind, np.random.default_rng(0))) >= 6
        texts = [caption.text for caption in all_captions(kind)]
        assert len(set(texts)) == len(texts)

    def test_counting_is_exact(self):
        three = [thing(x=x) for x in (10, 32, 54)]
        promise = {c.text: c for c in all_captions("counting")}
        verdicts = {
            text: holds(three, promise[text].include, promise[text].exclude)
            for text in ("two circles", "three circles", "four circles", "three squares")
        }
        assert [text for text, right in verdicts.items() if right] == ["three circles"]

    def test_position_and_attribution(self):
        things = [thing(x=16), thing("square", "blue", x=48)]
        right = {
            c.text for kind in ("position", "color_attr") for c in all_captions(kind)
            if holds(things, c.include, c.exclude)
        }  # fmt: skip
        assert {"a circle left of a square", "a square to the right of a circle"} <= right
        assert {"a red circle and a blue square", "a blue square with a red circle"} <= right
        assert not {"a square left of a circle", "a circle above a square"} & right
        assert not {"a blue circle and a red square", "a red circle and a red square"} & right

    def test_a_diagonal_pair_is_neither_beside_nor_above_when_too_near(self):
        near = [thing(x=30), replace(thing("square"), x=34)]
        assert not any(holds(near, c.include, c.exclude) for c in all_captions("position"))


class TestChainOfThought:
    def test_names_every_thing(self):
        scene = Scene("two_object", "plain", (0, 1), (thing("square", "blue", x=50), thing(x=12)))
        assert chain_of_thought(scene) == "red circle left, blue square right"
        assert place(thing(x=50, y=50)) == "bottom right"
        assert place(thing()) == "middle"

    def test_short(self):
        tokenizer = build_random_tiny().tokenizer
        for scene in random_scenes(300, 8):
            prompt, answer = cot_task("a circle", chain_of_thought(scene), tokenizer)
            assert len(answer) <= 24
            assert answer[-1] == tokenizer.eos_id
            assert prompt[0] == tokenizer.bos_id
            assert tokenizer.bos_id not in answer
            assert tokenizer.decode(answer).strip() == chain_of_thought(scene)


class TestPromptFiles:
    def test_what_the_generator_gives(self):
        for path, captions in zip((PROMPTS_FILE, HELD_OUT_FILE), prompt_sets(), strict=True):
            assert path.read_bytes().decode() == "".join(c.line() + "\n" for c in captions)

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
        assert not held_out & {caption_of(scene, rng).text for scene in scenes}

    def test_words_are_single_tokens(self):
        tokenizer = build_random_tiny().tokenizer
        texts = [caption.text for captions in prompt_sets() for caption in captions]
        assert all(len(tokenizer.encode(text)) == len(text.split()) + 1 for text in texts)
