"""Prompt files -> prompts: read, checked line by line, shuffled, sharded by rank, resumable."""

import hashlib
import json
import unicodedata
from pathlib import Path
from typing import Any

from iris_fast.errors import UserError
from iris_fast.models.pretrained.hub import hub_is_reachable
from iris_fast.models.tokenizer import JanusTokenizer
from iris_fast.records import Prompt
from iris_fast.rollout.random_streams import generator

EXAMPLE = 'write one object per line, such as {"prompt": "a red cube"}'


def read_prompts(source: str, setting: str = "prompts") -> list[Prompt]:
    """The prompts of a `.txt` file (one per line), a `.jsonl` file (field `prompt`; the other
    fields become `extra`) or a Hugging Face `datasets` path (its `train` split, or the first one).

    Blank lines at the end of a file are ignored. Raises UserError with the `setting` that names the
    file, and the line number, for anything that is not a prompt.
    """
    path = Path(source)
    if path.suffix in (".txt", ".jsonl") and path.is_file():
        prompts = _read_file(path, setting)
    elif path.exists() and not path.is_dir():
        kind = "unknown kind of file" if path.is_file() else "not a regular file"
        raise UserError(f"{setting}: {source}: {kind}; give a .txt or .jsonl file")
    elif path.is_dir() or _may_be_hub_id(path):
        prompts = _read_dataset(source, setting)
    else:
        raise UserError(
            f"{setting}: {source}: no such file; give a .txt or .jsonl file that exists, or a "
            "Hugging Face dataset's folder or org/name"
        )
    if not prompts:
        raise UserError(f"{setting}: {source}: there is no prompt in it; write one per line")
    return prompts


def _may_be_hub_id(path: Path) -> bool:
    """Whether this may be org/name, rather than a mistyped file name."""
    is_file_name = path.suffix in (".txt", ".jsonl", ".json", ".csv") or path.parent.exists()
    return len(path.parts) == 2 and not path.is_absolute() and not is_file_name


def _read_file(path: Path, setting: str) -> list[Prompt]:
    try:
        lines = path.read_text(encoding="utf-8-sig").rstrip().split("\n")
    except UnicodeDecodeError as error:
        line_number = path.read_bytes()[: error.start].count(b"\n") + 1
        raise UserError(
            f"{setting}: {path} line {line_number}: not UTF-8 text ({error.reason}); save the "
            "file as UTF-8, or give another file"
        ) from None
    except OSError as error:
        raise UserError(
            f"{setting}: {path} cannot be read ({error.strerror}); check its permissions"
        ) from None
    if lines == [""]:
        return []
    prompts = []
    for number, line in enumerate(lines, start=1):
        where = f"{setting}: {path} line {number}"
        is_json = path.suffix == ".jsonl"
        prompts.append(_prompt_of(_json(line, where) if is_json else {"prompt": line}, where))
    # Every prompt has every field of the file, None where its line lacks it: the arguments of a
    # reward do not depend on which lines are in a batch.
    names = dict.fromkeys(name for prompt in prompts for name in prompt.extra)
    return [Prompt(p.text, {name: p.extra.get(name) for name in names}) for p in prompts]


def _json(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({error}); {EXAMPLE}") from None


def _read_dataset(source: str, setting: str) -> list[Prompt]:
    try:
        import datasets
        import huggingface_hub
    except ImportError:
        raise UserError(
            f"{setting}: {source} is not a .txt or .jsonl file, and reading it as a Hugging Face "
            "dataset needs `pip install datasets`"
        ) from None
    datasets.logging.set_verbosity_error()  # it logs every retry otherwise
    huggingface_hub.logging.set_verbosity_error()
    if not Path(source).is_dir() and not hub_is_reachable():
        datasets.config.HF_HUB_OFFLINE = True  # use its cache, and do not retry for minutes
    saved = any((Path(source) / n).is_file() for n in ("state.json", "dataset_dict.json"))
    try:
        loaded = datasets.load_from_disk(source) if saved else datasets.load_dataset(source)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise UserError(
            f"{setting}: {source} cannot be read as a Hugging Face dataset ({error}); give a .txt "
            "or .jsonl file, or a dataset's path"
        ) from None
    if isinstance(loaded, dict):
        loaded = loaded["train"] if "train" in loaded else next(iter(loaded.values()))
    if "prompt" not in loaded.column_names:
        raise UserError(
            f"{setting}: {source} has no column `prompt` (it has {', '.join(loaded.column_names)});"
            " rename the column"
        )
    where = f"{setting}: {source} row"
    return [_prompt_of(row, f"{where} {number}") for number, row in enumerate(loaded)]


def _prompt_of(fields: Any, where: str) -> Prompt:
    """The prompt of one line or row, stripped of white space; UserError if it has no valid one."""
    if not isinstance(fields, dict) or not isinstance(fields.get("prompt"), str):
        raise UserError(f"{where}: no text field `prompt`; {EXAMPLE}")
    text = fields["prompt"].strip()
    # Spaces of all kinds, joiners and direction marks alone are not a prompt.
    if all(unicodedata.category(character) in ("Cf", "Zs", "Zl", "Zp") for character in text):
        raise UserError(f"{where}: empty prompt; write one or delete the line")
    for character in text:
        if unicodedata.category(character) in ("Cc", "Cs") and character not in "\n\t":
            code = f"U+{ord(character):04X}"
            raise UserError(f"{where}: control character {code} in the prompt; delete it")
    return Prompt(text, {name: value for name, value in fields.items() if name != "prompt"})


def check_against(
    tokenizer: JanusTokenizer, prompts: list[Prompt], max_prompt_length: int, where: str
) -> Prompt:
    """The prompt with the most tokens; UserError for one that the model cannot use: longer than
    `max_prompt_length` tokens, or with a special token in it, which would end the prompt early.
    `where` is their setting and file."""
    lengths = []
    for number, prompt in enumerate(prompts, start=1):
        which = f"{where} prompt {number} ({prompt.text[:40]!r})"
        for special in tokenizer.special_strings:
            if special in prompt.text:
                raise UserError(f"{which}: contains the special token {special}; remove it")
        length = len(tokenizer.encode(prompt.text)) - 1  # without BOS
        if length > max_prompt_length:
            raise UserError(
                f"{which}: {length} tokens ({len(prompt.text)} characters) are more than "
                f"max_prompt_length {max_prompt_length}; shorten it or raise --max_prompt_length"
            )
        lengths.append(length)
    return prompts[lengths.index(max(lengths))]


class PromptSource:
    """An endless, reproducible stream of prompts: all of them in a new order in every epoch.

    The order depends on the seed and the epoch only, so `cursor`, the number of prompts that all
    ranks together have taken, is the whole state.
    """

    def __init__(self, prompts: list[Prompt], seed: int) -> None:
        self.prompts = prompts
        self.seed = seed
        self.cursor = 0

    def sha256(self) -> str:
        """Hash of all texts in their order, to detect that a cursor belongs to other prompts."""
        return hashlib.sha256(json.dumps([p.text for p in self.prompts]).encode()).hexdigest()

    def take(self, count: int, rank: int, world_size: int) -> tuple[list[Prompt], list[int]]:
        """This rank's next `count` prompts and their global numbers; advances the cursor."""
        first = self.cursor + rank * count
        numbers = list(range(first, first + count))
        self.cursor += count * world_size
        return [self._prompt(number) for number in numbers], numbers

    def _prompt(self, number: int) -> Prompt:
        epoch, place = divmod(number, len(self.prompts))
        order = generator(self.seed, "prompt order", epoch).permutation(len(self.prompts))
        return self.prompts[order[place]]
