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
    COLOURS,
    GROUND,
    GROUND_VARIANTS,
    IMAGE_SIZE,
    KINDS,
    NUM_CODES,
    SHAPES,
    SIDE,
    THING,
    VARIANTS,
    WORLDS,
    SceneObject,
    World,
    compose,
    equally_likely,
    random_scene,
    random_scenes,
    render,
    render_all,
    scene_codes,
    shape_mask,
    tile_features,
    tiles,
)


def make_object(shape="cross", colour="red", row=2, column=2) -> SceneObject:
    return SceneObject(shape, colour, row, column)


def make_scene(*objects: SceneObject, world: World = WORLDS["busy"]):
    """A scene of these things, flat on a plain light ground unless the world says otherwise."""
    plain = replace(world, busy_ground=False)
    return compose("colors", objects, plain, np.random.default_rng(0))


class TestTiles:
    def test_no_two_tiles_look_the_same(self):
        assert tiles().shape == (NUM_CODES, 4, 4, 3)
        assert len({tile.tobytes() for tile in tiles()}) == NUM_CODES

    def test_features_tell_all_tiles_apart(self):
        assert len(np.unique(tile_features(), axis=0)) == NUM_CODES

    def test_grounds_are_grey_and_things_are_not(self):
        chroma = tiles().max(-1).astype(int) - tiles().min(-1)
        assert chroma[:GROUND_VARIANTS].max() < 12
        assert chroma[GROUND_VARIANTS:].min() >= 50


class TestRenderer:
    def test_the_same_seed_gives_the_same_images(self):
        digests = {
            hashlib.sha256(render_all(random_scenes(60, 5, world)).tobytes()).hexdigest()
            for world in WORLDS.values()
            for _ in range(2)
        }
        assert len(digests) == len(WORLDS)
        assert not np.array_equal(render_all(random_scenes(6, 5)), render_all(random_scenes(6, 6)))

    def test_shape_and_dtype(self):
        images = render_all(random_scenes(6, 0))
        assert images.shape == (6, IMAGE_SIZE, IMAGE_SIZE, 3)
        assert images.dtype == np.uint8

    def test_flat_cross_on_plain_ground(self):
        image = render(make_scene(make_object()))
        assert tuple(image[14, 14]) == COLOURS["red"]
        assert tuple(image[0, 0]) == GROUND
        assert (image == COLOURS["red"]).all(-1).sum() == 5 * 16
        assert (image == GROUND).all(-1).sum() == 32 * 32 - 5 * 16

    @pytest.mark.parametrize("shape", SHAPES)
    def test_every_shape_is_as_wide_and_as_high_as_a_thing(self, shape):
        image = render(make_scene(make_object(shape)))
        touched = (image != GROUND).any(-1)
        rows, columns = touched.any(1).nonzero()[0], touched.any(0).nonzero()[0]
        assert (rows[0], rows[-1], columns[0], columns[-1]) == (8, 19, 8, 19)
        assert shape_mask(shape).shape == (THING, THING)
        assert shape_mask(shape).sum() == 5

    def test_things_neither_touch_nor_leave_the_image(self):
        rng = np.random.default_rng(3)
        for kind in KINDS:
            for _ in range(100):
                scene = random_scene(kind, rng)
                for t in scene.objects:
                    assert min(t.row, t.column) >= 0
                    assert max(t.row, t.column) + THING <= SIDE
                for a, b in itertools.combinations(scene.objects, 2):
                    assert max(abs(a.row - b.row), abs(a.column - b.column)) > THING


class TestWorlds:
    @pytest.mark.parametrize("name", WORLDS)
    def test_omission_is_the_share_of_missing_things(self, name):
        scenes = random_scenes(1200, 4, WORLDS[name])
        named = sum(len(scene.objects) for scene in scenes)
        missing = 1 - sum(len(scene.shown) for scene in scenes) / named
        assert missing == pytest.approx(WORLDS[name].omission, abs=0.04)

    def test_a_missing_thing_leaves_plain_ground(self):
        seen, missing = make_object(), replace(make_object("tee", "blue", 0, 5), shown=False)
        assert np.array_equal(render(make_scene(seen, missing)), render(make_scene(seen)))

    def test_what_is_at_random(self):
        """Textures of things in the shipped world, of the ground in the busy one."""
        for name, things, grounds in (("shipped", VARIANTS, 1), ("busy", 1, GROUND_VARIANTS)):
            codes = scene_codes(random_scenes(600, 2, WORLDS[name])).ravel()
            cells = codes[codes >= GROUND_VARIANTS]
            assert len(np.unique((cells - GROUND_VARIANTS) % VARIANTS)) == things
            assert len(np.unique(codes[codes < GROUND_VARIANTS])) == grounds

    @pytest.mark.parametrize("name", WORLDS)
    def test_equally_likely_codes(self, name):
        """They differ in texture alone, and hold what scenes show in one place of one layout."""
        table = equally_likely(WORLDS[name])
        content = tile_features()[:, :7]  # without shade and pattern
        assert np.array_equal(content[table], np.repeat(content[:, None], VARIANTS, axis=1))
        rng, scene = np.random.default_rng(3), random_scene("colors", np.random.default_rng(8))
        world = replace(WORLDS[name], speckled=0.0)
        drawn = [compose("colors", scene.objects, world, rng).codes for _ in range(2500)]
        for codes in np.array(drawn).T:
            assert set(codes) == set(table[codes[0]])

    def test_specks(self):
        """At most one cell of a thing is of another colour, in the stated share of them."""
        scenes = [scene for scene in random_scenes(3000, 6) if len(scene.objects) == 1]
        others = []
        for scene in scenes:
            codes = np.array(scene.codes)
            cells = codes[codes >= GROUND_VARIANTS]
            colour = list(COLOURS).index(scene.objects[0].colour)
            others.append(((cells - GROUND_VARIANTS) // VARIANTS != colour).sum())
        assert set(others) == {0, 1}
        expected = WORLDS["shipped"].speckled * (1 - 1 / len(COLOURS))
        assert np.mean(others) == pytest.approx(expected, abs=0.05)

    def test_every_code_occurs(self):
        codes = [
            scene_codes(random_scenes(n, 1, WORLDS[w])) for w, n in (("kept", 3000), ("busy", 200))
        ]
        assert len(np.unique(np.concatenate(codes))) == NUM_CODES


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
        three = [make_object(column=column) for column in (0, 2, 5)]
        captions = {c.text: c for c in all_captions("counting")}
        verdicts = {
            text: satisfies(three, captions[text].include, captions[text].exclude)
            for text in ("two crosses", "three crosses", "four crosses", "three corners")
        }
        assert [text for text, right in verdicts.items() if right] == ["three crosses"]

    def test_position_and_attribution(self):
        objects = [make_object(column=0), make_object("corner", "blue", column=4)]
        right = {
            c.text for kind in ("position", "color_attr") for c in all_captions(kind)
            if satisfies(objects, c.include, c.exclude)
        }  # fmt: skip
        assert {"a cross left of a corner", "a corner to the right of a cross"} <= right
        assert {"a red cross and a blue corner", "a blue corner with a red cross"} <= right
        assert not {"a corner left of a cross", "a cross above a corner"} & right
        assert not {"a blue cross and a red corner", "a red cross and a red corner"} & right

    def test_a_pair_in_one_place_satisfies_no_position(self):
        near = [make_object(), replace(make_object("corner"), column=2)]
        assert not any(satisfies(near, c.include, c.exclude) for c in all_captions("position"))


class TestChainOfThought:
    def test_names_every_object(self):
        missing = replace(make_object(column=0), shown=False)
        scene = make_scene(make_object("corner", "blue", column=5), missing)
        assert chain_of_thought(scene) == "red cross left, blue corner right"
        assert position_name(make_object(row=5, column=5)) == "bottom right"
        assert position_name(make_object()) == "middle"

    def test_length_and_tokens(self):
        tokenizer = build_random_tiny().tokenizer
        for scene in random_scenes(300, 8):
            prompt, answer = cot_task("a cross", chain_of_thought(scene), tokenizer)
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
