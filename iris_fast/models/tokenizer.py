"""The model folder's own tokenizer.json, run by the `tokenizers` library, with BOS guaranteed.

Ids of special tokens differ between the Janus models (pad is 100002 or 100015), so they are looked
up by their strings.
"""

import json
from pathlib import Path
from typing import Self

import tokenizers
from tokenizers.processors import TemplateProcessing

from iris_fast.errors import UserError
from iris_fast.models.pretrained.weights import read_json

IMAGE_START = "<begin_of_image>"

# The strings that all Janus models use, by the name under which a config may override them.
KNOWN_SPECIALS = {
    "bos_token": "<｜begin▁of▁sentence｜>",
    "eos_token": "<｜end▁of▁sentence｜>",
    "pad_token": "<｜▁pad▁｜>",
    "boi_token": IMAGE_START,
    "eoi_token": "<end_of_image>",
    "image_token": "<image_placeholder>",
}


class JanusTokenizer:
    """Text to ids and back.

    Attributes: `bos_id`, `eos_id`, `pad_id`, `image_start_id`, `image_end_id`,
    `image_placeholder_id`; `specials`, the string of each by its name in the config files; and
    `special_strings`, all literal special tokens, longest first.

    The argument `specials` overrides KNOWN_SPECIALS; UserError, naming `source`, if `backend` lacks
    one of them.
    """

    def __init__(
        self, backend: tokenizers.Tokenizer, specials: dict[str, str], source: str = "tokenizer"
    ) -> None:
        self.backend = backend
        self.specials = KNOWN_SPECIALS | specials
        ids = {}
        for name, string in self.specials.items():
            token_id = backend.token_to_id(string)
            if token_id is None:
                remedy = "use the tokenizer of a Janus model"
                raise UserError(f"{source} has no special token {string!r} ({name}); {remedy}")
            ids[name] = token_id
        self.bos_id: int = ids["bos_token"]
        self.eos_id: int = ids["eos_token"]
        self.pad_id: int = ids["pad_token"]
        self.image_start_id: int = ids["boi_token"]
        self.image_end_id: int = ids["eoi_token"]
        self.image_placeholder_id: int = ids["image_token"]
        # Not every added token is special: the real vocabulary adds plain letters such as "ø".
        added = backend.get_added_tokens_decoder()
        strings = {token.content for token in added.values() if token.special}
        strings |= set(self.specials.values())
        self.special_strings = sorted(strings, key=lambda text: (-len(text), text))
        self._skipped = {backend.token_to_id(text) for text in strings}

    @classmethod
    def from_folder(cls, folder: Path) -> Self:
        """The tokenizer of a model folder, with the special strings that its config files state.

        UserError if tokenizer.json is missing or unreadable, or lacks a special token.
        """
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise UserError(f"no tokenizer.json in {folder}; copy it from the base model")
        specials = _special_strings(folder / "tokenizer_config.json")
        specials |= _special_strings(folder / "special_tokens_map.json")
        try:
            # Not from_file: it raises a bare Exception.
            backend = tokenizers.Tokenizer.from_buffer(path.read_bytes())
        except ValueError as error:
            raise UserError(
                f"{path} is not a readable tokenizer ({error}); download it again"
            ) from error
        return cls(backend, specials, str(path))

    @property
    def additional_specials(self) -> list[str]:
        """All special strings but BOS, EOS and pad, in order."""
        named = {self.specials[name] for name in ("bos_token", "eos_token", "pad_token")}
        return sorted(set(self.special_strings) - named)

    def __len__(self) -> int:
        """One more than the largest id: the embedding needs at least this many rows."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, in which special-token strings count, with BOS at position 0 only."""
        ids = self.backend.encode(text, add_special_tokens=False).ids
        return [self.bos_id, *(i for i in ids if i != self.bos_id)]

    def decode(self, ids: list[int]) -> str:
        """Text of `ids` without special tokens and ids that have no token.

        A model's vocabulary is larger than its tokenizer's, so such ids can be sampled.
        """
        known = [i for i in ids if self.backend.id_to_token(i) is not None]
        return self.backend.decode([i for i in known if i not in self._skipped])

    def strip_special(self, text: str) -> str:
        """`text` without literal special-token strings, including those that a removal creates."""
        before = None
        while before != text:
            before = text
            for special in self.special_strings:
                text = text.replace(special, "")
        return text

    def json_text(self, add_bos: bool = False) -> str:
        """The content of tokenizer.json; with `add_bos`, its post-processor prepends BOS."""
        backend = tokenizers.Tokenizer.from_str(self.backend.to_str())
        if add_bos:
            bos = self.specials["bos_token"]
            backend.post_processor = TemplateProcessing(
                single=[bos, "$A"], pair=[bos, "$A", bos, "$B"], special_tokens=[(bos, self.bos_id)]
            )
        return json.dumps(json.loads(backend.to_str()), ensure_ascii=False, indent=1)


def _special_strings(path: Path) -> dict[str, str]:
    """The special-token strings that a tokenizer config file states; {} without the file."""
    data = read_json(path) if path.is_file() else {}
    found = {}
    for name in KNOWN_SPECIALS:
        value = data.get(name)
        if isinstance(value, dict):  # an AddedToken with its settings
            value = value.get("content")
        if isinstance(value, str):
            found[name] = value
    return found
