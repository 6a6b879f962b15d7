"""Prompt files -> prompts: read, checked line by line, shuffled, sharded by rank, resumable."""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from iris_fast.errors import UserError
from iris_fast.records import Prompt
from iris_fast.rollout.random_streams import generator

if TYPE_CHECKING:
    from iris_fast.models.tokenizer import JanusTokenizer


def read_prompts(source: str) -> list[Prompt]:
    """Prompts of a `.txt` file (one a line), a `.jsonl` file (field `prompt`, the other fields kept
    in `extra`) or a Hugging Face `datasets` path (its `train` split, or the only one).

    Blank lines at the end of a file do not count. Raises UserError with the file and line number
    for anything that is not a prompt.
    """
    path = Path(source)
    if path.suffix in (".txt", ".jsonl") and path.is_file():
        prompts = _from_file(path)
    elif path.is_file():
        raise UserError(f"prompts: {source}: unknown kind of file; give a .txt or .jsonl file")
    elif path.exists() and not path.is_dir():
        raise UserError(f"prompts: {source}: not a regular file; give a .txt or .jsonl file")
    elif path.is_dir() or _may_be_hub_id(path):
        prompts = _from_dataset(source)
    else:
        raise UserError(
            f"prompts: {source}: no such file; give a .txt or .jsonl file that exists, or a "
            "Hugging Face dataset's folder or org/name"
        )
    if not prompts:
        raise UserError(f"prompts: {source}: there is no prompt in it; write one a line")
    return prompts


def _may_be_hub_id(path: Path) -> bool:
    """Whether org/name rather than a mistyped file: the hub is slow to say that it knows none."""
    named = path.suffix not in (".txt", ".jsonl", ".json", ".csv")
    return named and len(path.parts) == 2 and not path.is_absolute() and not path.parent.exists()


def _from_file(path: Path) -> list[Prompt]:
    try:
        lines = path.read_text(encoding="utf-8-sig").rstrip().split("\n")
    except UnicodeDecodeError as error:
        line_number = path.read_bytes()[: error.start].count(b"\n") + 1
        raise UserError(
            f"prompts: {path} line {line_number}: not UTF-8 text ({error.reason}); save the "
            "file as UTF-8, or name the right file"
        ) from None
    except OSError as error:
        raise UserError(
            f"prompts: {path} cannot be read ({error.strerror}); check its permissions"
        ) from None
    if lines == [""]:
        return []
    parse = _json_prompt if path.suffix == ".jsonl" else _plain_prompt
    return _with_all_fields(
        [parse(line, f"{path} line {number}") for number, line in enumerate(lines, start=1)]
    )


def _plain_prompt(line: str, where: str) -> Prompt:
    return Prompt(_checked(line, where))


def _with_all_fields(prompts: list[Prompt]) -> list[Prompt]:
    """Every prompt with every field of the file, None where its line lacks it: what a reward is
    given then does not depend on which lines meet in a batch."""
    names = dict.fromkeys(name for prompt in prompts for name in prompt.extra)
    return [Prompt(p.text, {name: p.extra.get(name) for name in names}) for p in prompts]


def _json_prompt(line: str, where: str) -> Prompt:
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"prompts: {where}: not JSON ({error}); write one object a line, such as "
            '{"prompt": "a red cube"}'
        ) from None
    return _prompt_of(fields, where)


def _prompt_of(fields: Any, where: str) -> Prompt:
    if not isinstance(fields, dict) or not isinstance(fields.get("prompt"), str):
        raise UserError(
            f"prompts: {where}: no text field `prompt`; write one object a line, such as "
            '{"prompt": "a red cube"}'
        )
    extra = {name: value for name, value in fields.items() if name != "prompt"}
    return Prompt(_checked(fields["prompt"], where), extra)


def _from_dataset(source: str) -> list[Prompt]:
    try:
        import datasets
        import huggingface_hub
    except ImportError:
        raise UserError(
            f"prompts: {source} is no .txt or .jsonl file, and reading it as a Hugging Face "
            "dataset needs `pip install datasets`"
        ) from None
    datasets.logging.set_verbosity_error()  # else every retry is a line
    huggingface_hub.logging.set_verbosity_error()
    saved = ("state.json", "dataset_dict.json")
    try:
        if any((Path(source) / name).is_file() for name in saved):
            loaded = datasets.load_from_disk(source)
        else:
            loaded = datasets.load_dataset(source)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise UserError(
            f"prompts: {source} cannot be read as a Hugging Face dataset "
            f"({' '.join(str(error).split())}); give a .txt or .jsonl file, or a dataset's path"
        ) from None
    if isinstance(loaded, dict):
        split = "train" if "train" in loaded else next(iter(loaded))
        loaded = loaded[split]
    if "prompt" not in loaded.column_names:
        raise UserError(
            f"prompts: {source} has no column `prompt` (it has {', '.join(loaded.column_names)}); "
            "rename the column"
        )
    return [_prompt_of(row, f"{source} row {number}") for number, row in enumerate(loaded)]


def _checked(text: str, where: str) -> str:
    """The prompt without surrounding white space; UserError if nothing or something odd is left."""
    text = text.strip()
    # Nothing to read is nothing: spaces of all kinds, joiners and marks of direction.
    if all(unicodedata.category(character) in ("Cf", "Zs", "Zl", "Zp") for character in text):
        raise UserError(f"prompts: {where}: empty prompt; write one or delete the line")
    for character in text:
        if unicodedata.category(character) in ("Cc", "Cs") and character not in "\n\t":
            raise UserError(
                f"prompts: {where}: control character U+{ord(character):04X} in the prompt; "
                "delete it"
            )
    return text


def check_against(
    tokenizer: JanusTokenizer, prompts: Iterable[Prompt], max_prompt_length: int, source: str
) -> Prompt:
    """The prompt of most tokens; UserError for one that the model cannot take: longer than
    `max_prompt_length` tokens, or spelling a special token, which would end the prompt early."""
    longest, most_tokens = None, -1
    for number, prompt in enumerate(prompts, start=1):
        where = f"prompts: {source} prompt {number} ({prompt.text[:40]!r})"
        for special in tokenizer.special_strings:
            if special in prompt.text:
                raise UserError(f"{where}: holds the special token {special}; take it out")
        length = len(tokenizer.encode(prompt.text)) - 1  # without BOS
        if length > max_prompt_length:
            raise UserError(
                f"{where}: {length} tokens ({len(prompt.text)} characters) are more than "
                f"max_prompt_length {max_prompt_length}; shorten it or raise --max_prompt_length"
            )
        if length > most_tokens:
            longest, most_tokens = prompt, length
    assert longest is not None, "read_prompts gives at least one"
    return longest


class PromptSource:
    """An endless, reproducible stream of prompts: every epoch all prompts in a new order.

    The order depends on the seed and the epoch alone, so `cursor`, the number of prompts that all
    ranks together have taken, is the whole state.
    """

    def __init__(self, prompts: list[Prompt], seed: int) -> None:
        """`prompts`: what `read_prompts` gave; `seed`: of the order."""
        self.prompts = prompts
        self.seed = seed
        self.cursor = 0

    def sha256(self) -> str:
        """Of all texts in their order: whether a cursor counts these prompts or others."""
        return hashlib.sha256(json.dumps([p.text for p in self.prompts]).encode()).hexdigest()

    def take(self, count: int, rank: int, world_size: int) -> tuple[list[Prompt], list[int]]:
        """This rank's `count` prompts and their global numbers; moves every rank's cursor on."""
        first = self.cursor + rank * count
        numbers = list(range(first, first + count))
        self.cursor += count * world_size
        return [self._prompt(number) for number in numbers], numbers

    def _prompt(self, number: int) -> Prompt:
        epoch, place = divmod(number, len(self.prompts))
        order = generator(self.seed, "prompt order", epoch).permutation(len(self.prompts))
        return self.prompts[order[place]]
