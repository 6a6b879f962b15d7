"""Tokenizer and templates."""

import json
import shutil

import pytest
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from iris_fast.errors import UserError
from iris_fast.models.templates import (
    TEMPLATES,
    fill_instruction,
    image_prompt_ids,
    join_prompt,
    load_instruction,
    unconditional_ids,
)
from iris_fast.models.tokenizer import JanusTokenizer

BOS = "<｜begin▁of▁sentence｜>"
FIXTURE_NAMES = ["janus_original_tiny", "janus_hf_tiny"]


@pytest.mark.shared
@pytest.mark.parametrize("name", FIXTURE_NAMES)
def test_fixture_ids(fixtures, name):
    tokenizer = JanusTokenizer.from_folder(fixtures / name)
    expected = json.loads((fixtures / "fixture_meta.json").read_text())["tokens"]
    assert tokenizer.bos_id == expected["bos"]
    assert tokenizer.eos_id == expected["eos"]
    assert tokenizer.pad_id == expected["pad"]
    assert tokenizer.image_start_id == expected["boi"]
    assert tokenizer.image_end_id == expected["eoi"]
    assert tokenizer.image_placeholder_id == expected["img"]
    assert len(tokenizer) == 314
    # One layout's tokenizer.json adds BOS by itself, the other's does not.
    assert tokenizer.encode("Hello a\n") == [300, 39, 68, 75, 75, 78, 256, 198]


@pytest.mark.parametrize("adds", [False, True], ids=["adds none", "adds BOS"])
@pytest.mark.parametrize("text", ["a fox", "", BOS + "a fox", BOS + BOS, "a " + BOS + " fox"])
def test_one_bos_and_it_is_first(tiny, adds, text):
    backend = Tokenizer.from_str(tiny.tokenizer.backend.to_str())
    if adds:
        pair = (BOS, tiny.tokenizer.bos_id)
        backend.post_processor = TemplateProcessing(single=f"{BOS} $A", special_tokens=[pair])
    ids = JanusTokenizer(backend, {}).encode(text)
    assert ids[0] == tiny.tokenizer.bos_id
    assert ids.count(tiny.tokenizer.bos_id) == 1


@pytest.mark.parametrize("text", ["a red fox", "  two  spaces\n\nlines ", "ñ 🦊 ≤ ｜", "don't"])
def test_text_survives(tiny, text):
    assert tiny.tokenizer.decode(tiny.tokenizer.encode(text)) == text


def test_decode_skips_specials_and_unknown_ids(tiny):
    tokenizer = tiny.tokenizer
    ids = tokenizer.encode("a fox")
    noise = [tokenizer.pad_id, len(tokenizer), 10**6, tokenizer.image_start_id, tokenizer.eos_id]
    assert tokenizer.decode([*noise, *ids, *noise]) == "a fox"
    assert tokenizer.decode([]) == ""


def test_special_strings(tiny):
    strings = tiny.tokenizer.special_strings
    assert {"<begin_of_image>", "<|User|>", BOS, "<image_placeholder>"} <= set(strings)
    assert "a" not in strings


def test_strip_special(tiny):
    strip = tiny.tokenizer.strip_special
    assert strip("a <begin_of_image>fox<|User|>") == "a fox"
    assert strip("<begin_<begin_of_image>of_image>fox") == "fox"
    assert strip("<|Us<|Us<|User|>er|>er|>x") == "x"
    assert strip("a < b, User: |>") == "a < b, User: |>"


def test_added_letters_are_not_special(tiny):
    """The real vocabulary has plain letters as added tokens, which are text."""
    backend = Tokenizer.from_str(tiny.tokenizer.backend.to_str())
    backend.add_tokens(["ø"])
    assert JanusTokenizer(backend, {}).strip_special("smørbrød") == "smørbrød"


@pytest.mark.parametrize("form", ["string", "added token"])
@pytest.mark.parametrize("file", ["special_tokens_map.json", "tokenizer_config.json"])
def test_strings_come_from_the_config_files(tiny_folders, tmp_path, file, form):
    folder = shutil.copytree(tiny_folders["original"], tmp_path / "model")
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        (folder / name).unlink()
    before = JanusTokenizer.from_folder(folder)  # the known strings do without
    assert before.specials == JanusTokenizer.from_folder(tiny_folders["original"]).specials
    pad = "<patch_placeholder>"
    value = pad if form == "string" else {"content": pad, "special": True}
    (folder / file).write_text(json.dumps({"pad_token": value, "eos_token": None}))
    after = JanusTokenizer.from_folder(folder)
    assert after.pad_id == before.backend.token_to_id(pad) != before.pad_id
    assert after.eos_id == before.eos_id


def test_template_strings():
    image = {name: template.image_prompt("  a fox ") for name, template in TEMPLATES.items()}
    assert image == {
        "janus-pro": "<|User|>: a fox\n\n<|Assistant|>:<begin_of_image>",
        "janus-1.3b": "User: a fox\n\nAssistant:<begin_of_image>",
        "t2i-r1": "User: a fox\n\nAssistant:<begin_of_image>",
    }
    cot = {name: template.cot_prompt("Describe a fox\n") for name, template in TEMPLATES.items()}
    assert cot["janus-pro"] == "<|User|>: Describe a fox\n\n<|Assistant|>:"
    assert cot["janus-1.3b"] == "User: Describe a fox\n\nAssistant:"
    system, _, rest = cot["t2i-r1"].partition("\n\n")
    assert system
    assert "User" not in system
    assert rest == "User: Describe a fox\n\nAssistant:"


def test_prompt_ids(tiny):
    tokenizer = tiny.tokenizer
    ids = image_prompt_ids(tokenizer, TEMPLATES["janus-pro"], "a red circle")
    assert ids[0] == tokenizer.bos_id
    assert ids[1] == tokenizer.backend.token_to_id("<|User|>")
    assert ids[-1] == tokenizer.image_start_id
    blank = unconditional_ids(ids, tokenizer)
    assert blank == [ids[0], *[tokenizer.pad_id] * (len(ids) - 2), ids[-1]]
    assert tokenizer.pad_id not in ids  # the argument is left alone


@pytest.mark.parametrize(
    ("prompt", "cot", "expected"),
    [
        ("a fox", "It is red.", "a fox. It is red."),
        ("a fox. ", " It is red. ", "a fox. It is red."),
        (" a fox ...", "It is red.", "a fox. It is red."),
        ("a fox!", "Red", "a fox!. Red"),
        ("a fox.", "", "a fox."),
        ("a fox.", " \n", "a fox."),
    ],
)
def test_join_prompt(prompt, cot, expected):
    assert join_prompt(prompt, cot) == expected


def test_default_instruction():
    text = load_instruction()
    assert text.count("{prompt}") == 1
    assert len(text) <= 250
    filled = fill_instruction(text, " a {fox} {prompt} {0} ")
    assert "a {fox} {prompt} {0}\n" in filled


def test_own_instruction(tmp_path):
    path = tmp_path / "own.txt"
    path.write_text("Draw {prompt}, {not a field}.\n", encoding="utf-8")
    assert fill_instruction(load_instruction(path), "a fox") == "Draw a fox, {not a field}."
    path.write_text("Draw it.")
    with pytest.raises(UserError, match=r"own\.txt has no \{prompt\}"):
        load_instruction(path)
    path.write_bytes(b"\xff{prompt}")
    with pytest.raises(UserError, match="cannot be read"):
        load_instruction(str(path))
    with pytest.raises(UserError, match=r"none\.txt cannot be read"):
        load_instruction(tmp_path / "none.txt")
