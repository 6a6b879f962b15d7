"""Prompt files, and the stream of prompts that ranks take from."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from iris_fast.errors import UserError
from iris_fast.prompts import PromptSource, check_against, read_prompts
from iris_fast.records import Prompt
from iris_fast.tiny import build_random_tiny


@pytest.fixture
def write(tmp_path: Path):
    def write(name: str, content: str | bytes) -> str:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return write


def texts(source: str) -> list[str]:
    return [prompt.text for prompt in read_prompts(source)]


@pytest.mark.parametrize(
    "content",
    [
        "a cube\na ball\n",
        "a cube\na ball",
        "a cube\r\na ball\r\n",
        "\ufeffa cube\na ball\n",
        "a cube\na ball\n\n  \n\r\n",
        "  a cube \t\na ball  \n",
    ],
    ids=["plain", "no end", "CRLF", "BOM", "trailing blank lines", "spaces around"],
)
def test_txt_is_one_prompt_per_line(write, content):
    assert read_prompts(write("p.txt", content)) == [Prompt("a cube"), Prompt("a ball")]


def test_jsonl_carries_other_fields_and_fills_absent_ones_with_none(write):
    lines = [
        {"prompt": "a cube", "nouns": ["cube"], "n": 1},
        {"prompt": "two\nlines", "spatial": {"obj1": "x"}},
    ]
    source = write("p.jsonl", "".join(json.dumps(line) + "\r\n" for line in lines))
    assert read_prompts(source) == [
        Prompt("a cube", {"nouns": ["cube"], "n": 1, "spatial": None}),
        Prompt("two\nlines", {"nouns": None, "n": None, "spatial": {"obj1": "x"}}),
    ]


def test_emoji_and_other_scripts_are_accepted(write):
    lines = ["a 😀 cube", "👩‍👩‍👧 family", "ein Würfel", "一个红色的立方体", "مكعب أحمر"]
    assert texts(write("p.txt", "\n".join(lines))) == lines
    escaped = write("p.jsonl", json.dumps({"prompt": "a 😀 cube"}))  # \ud83d\ude00
    assert texts(escaped) == ["a 😀 cube"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", "a\n\nb\n", "p.txt line 2: empty prompt"),
        ("p.txt", "a\n   \t\nb\n", "p.txt line 2: empty prompt"),
        ("p.txt", "a\nb\nc \x07 d\n", r"p.txt line 3: control character U\+0007"),
        ("p.txt", "a\nb \x1b[31mred\n", r"p.txt line 2: control character U\+001B"),
        ("p.txt", "a\n\u200b\nb\n", "p.txt line 2: empty prompt"),
        ("p.txt", "a\n\u2060 \ufeff\u202e\n", "p.txt line 2: empty prompt"),
        ("p.txt", b"a\nb\n\xff\xfe\x00\n", "p.txt line 3: not UTF-8"),
        ("p.txt", "a cube\n".encode("utf-16"), "p.txt line 1: not UTF-8"),
        ("p.txt", b"\x89PNG\r\n\x1a\n\x00\x00", "p.txt line 1: not UTF-8"),
        ("p.txt", "", "p.txt: there is no prompt in it"),
        ("p.txt", "\n \n", "p.txt: there is no prompt in it"),
        ("p.jsonl", "", "p.jsonl: there is no prompt in it"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": "b"\n', "p.jsonl line 2: not JSON"),
        ("p.jsonl", '{"prompt": "a"}\na red cube\n', "p.jsonl line 2: not JSON"),
        ("p.jsonl", '{"prompt": "a"}\n\n{"prompt": "b"}\n', "p.jsonl line 2: not JSON"),
        ("p.jsonl", '{"prompt": "a"}\n{"text": "b"}\n', "p.jsonl line 2: no text field `prompt`"),
        ("p.jsonl", '["a"]\n', "p.jsonl line 1: no text field `prompt`"),
        ("p.jsonl", '{"prompt": 3}\n', "p.jsonl line 1: no text field `prompt`"),
        ("p.jsonl", '{"prompt": null}\n', "p.jsonl line 1: no text field `prompt`"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": "  "}\n', "p.jsonl line 2: empty prompt"),
        ("p.jsonl", '{"prompt": "a\\u0000b"}\n', r"p.jsonl line 1: control character U\+0000"),
        ("p.jsonl", '{"prompt": "a\\ud800b"}\n', r"p.jsonl line 1: control character U\+D800"),
        ("p.jsonl", f'{{"prompt": {"9" * 5000}}}\n', "p.jsonl line 1: not JSON"),
        ("p.jsonl", "[" * 100_000, "p.jsonl line 1: not JSON"),
        ("p.csv", "prompt\na\n", "p.csv: unknown kind of file; give a .txt or .jsonl"),
    ],
)
def test_invalid_prompts_are_refused_with_their_line(write, name, content, message):
    with pytest.raises(UserError, match=message) as refusal:
        read_prompts(write(name, content))
    assert len(str(refusal.value)) < 400


@pytest.mark.parametrize("name", ["absent.txt", "absent.jsonl", "absent", "/no/such/absent"])
def test_a_missing_file_is_refused(here, name):
    with pytest.raises(UserError, match=f"{name}: no such file"):
        read_prompts(name)


def test_a_pipe_is_refused(here):
    os.mkfifo(here / "p.txt")
    with pytest.raises(UserError, match=r"p\.txt: not a regular file; give a"):
        read_prompts("p.txt")


def test_a_mistyped_file_in_an_existing_folder_is_not_taken_for_a_hub_id(here):
    (here / "data").mkdir()
    with pytest.raises(UserError, match="data/prompts: no such file"):
        read_prompts("data/prompts")


class TestDatasets:
    @pytest.fixture(autouse=True)
    def _no_network(self, monkeypatch):
        datasets = pytest.importorskip("datasets", reason="needs the `datasets` library")
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)

        def connect(*_):
            raise AssertionError("tried to use the network")

        monkeypatch.setattr(socket.socket, "connect", connect)

    def test_a_saved_dataset_is_read_with_its_columns(self, tmp_path):
        import datasets

        rows = {"prompt": ["a cube", "a ball"], "level": [1, 2]}
        datasets.Dataset.from_dict(rows).save_to_disk(tmp_path / "saved")
        assert read_prompts(str(tmp_path / "saved")) == [
            Prompt("a cube", {"level": 1}),
            Prompt("a ball", {"level": 2}),
        ]

    def test_the_train_split_is_read(self, tmp_path):
        import datasets

        splits = {
            name: datasets.Dataset.from_dict({"prompt": [name]}) for name in ("test", "train")
        }
        datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
        assert texts(str(tmp_path / "saved")) == ["train"]

    @pytest.mark.parametrize(
        ("rows", "message"),
        [
            ({"text": ["a"]}, "no column `prompt`.*text"),
            ({"prompt": ["a", ""]}, "row 1: empty prompt"),
            ({"prompt": ["a", None]}, "row 1: no text field `prompt`"),
            ({"prompt": [1]}, "row 0: no text field `prompt`"),
        ],
    )
    def test_rows_are_checked(self, tmp_path, rows, message):
        import datasets

        datasets.Dataset.from_dict(rows).save_to_disk(tmp_path / "saved")
        with pytest.raises(UserError, match=message):
            read_prompts(str(tmp_path / "saved"))

    def test_a_folder_without_a_dataset_is_refused(self, tmp_path):
        (tmp_path / "empty").mkdir()
        with pytest.raises(UserError, match="empty cannot be read as a Hugging Face dataset"):
            read_prompts(str(tmp_path / "empty"))

    def test_a_hub_id_is_refused_without_a_try_where_the_hub_is_not_reachable(self, monkeypatch):
        monkeypatch.setattr("iris_fast.prompts.hub_is_reachable", lambda: False)
        with pytest.raises(UserError, match="no-org/no-data cannot be read as a Hugging Face data"):
            read_prompts("no-org/no-data")


class TestAgainstTheModel:
    tokenizer = build_random_tiny().tokenizer

    def check(self, *prompts: str, longest: int = 512) -> None:
        check_against(self.tokenizer, [*map(Prompt, prompts)], longest, "p.txt")

    def test_ten_thousand_characters_are_refused(self):
        with pytest.raises(
            UserError, match=r"p.txt prompt 2 .*10000 characters.*512.*--max_prompt"
        ):
            self.check("a cube", "a red cube" * 1000)

    def test_the_limit_counts_tokens_without_bos(self):
        ids = self.tokenizer.encode("a red cube")
        self.check("a red cube", longest=len(ids) - 1)
        with pytest.raises(UserError, match="max_prompt_length"):
            self.check("a red cube", longest=len(ids) - 2)

    def test_every_special_token_is_refused_inside_a_prompt(self):
        for special in self.tokenizer.special_strings:
            with pytest.raises(UserError, match="contains the special token"):
                self.check(f"a {special} cube")

    def test_emoji_and_braces_pass(self):
        self.check("a 😀 cube", "{prompt} <b>", "a < b | c >")


def stream(source: PromptSource, count: int, world_size: int, rounds: int) -> list[str]:
    """The prompts that all ranks together take, in global order."""
    taken = {}
    cursor = source.cursor
    for rank in range(world_size):
        source.cursor = cursor
        for _ in range(rounds):
            prompts, numbers = source.take(count, rank, world_size)
            taken |= {n: p.text for n, p in zip(numbers, prompts, strict=True)}
    return [taken[number] for number in sorted(taken)]


PROMPTS = [Prompt(f"p{i}") for i in range(5)]


def test_every_epoch_has_every_prompt_once_in_a_new_order():
    taken = stream(PromptSource(PROMPTS, seed=1), 1, 1, 50)
    epochs = [taken[i : i + 5] for i in range(0, 50, 5)]
    assert all(sorted(epoch) == [p.text for p in PROMPTS] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 5


def test_the_order_depends_on_the_seed_and_on_no_other_generator():
    torch.manual_seed(0)
    first = stream(PromptSource(PROMPTS, seed=1), 1, 1, 20)
    torch.manual_seed(1)
    assert stream(PromptSource(PROMPTS, seed=1), 1, 1, 20) == first
    assert stream(PromptSource(PROMPTS, seed=2), 1, 1, 20) != first


@pytest.mark.parametrize("seed", [0, -1, 2**62, 10**30])
def test_any_integer_is_a_seed(seed):
    assert len(stream(PromptSource(PROMPTS, seed=seed), 1, 1, 5)) == 5


@given(
    prompts=st.integers(1, 7),
    count=st.integers(1, 3),
    world_size=st.integers(1, 4),
    rounds=st.integers(1, 4),
)
def test_all_ranks_together_take_the_stream_of_one_rank(prompts, count, world_size, rounds):
    chosen = [Prompt(f"p{i}") for i in range(prompts)]
    seen = [
        number
        for rank in range(world_size)
        for number in PromptSource(chosen, seed=3).take(count, rank, world_size)[1]
    ]
    assert sorted(seen) == list(range(count * world_size))  # disjoint and complete
    alone = stream(PromptSource(chosen, seed=3), 1, 1, count * world_size * rounds)
    assert stream(PromptSource(chosen, seed=3), count, world_size, rounds) == alone


def test_the_cursor_alone_resumes_the_stream():
    whole = PromptSource(PROMPTS, seed=4)
    expected = stream(whole, 2, 2, 6)
    first = PromptSource(PROMPTS, seed=4)
    before = stream(first, 2, 2, 2)
    second = PromptSource(PROMPTS, seed=4)
    second.cursor = first.cursor
    assert before + stream(second, 2, 2, 4) == expected


@pytest.mark.shared
@pytest.mark.parametrize(
    ("name", "count", "fields"),
    [
        ("t2i_r1_train_prompts.jsonl", 7223, {"nouns", "spatial_info", "task_type"}),
        ("geneval/evaluation_metadata.jsonl", 553, {"tag", "include"}),
        ("t2i_compbench/color_val.txt", 300, set()),
    ],
)
def test_real_prompt_files_are_read_whole(shared, name, count, fields):
    prompts = read_prompts(str(shared / "data" / name))
    assert len(prompts) == count
    assert fields <= set(prompts[0].extra)
