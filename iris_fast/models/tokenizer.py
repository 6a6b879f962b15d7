"""The checkpoint's own tokenizer.json, run by the `tokenizers` library, with BOS guaranteed.

Ids of special tokens differ between the Janus checkpoints (pad is 100002 or 100015), so they are
looked up by their strings, never written down.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers

from iris_fast.errors import UserError

IMAGE_START = "<begin_of_image>"
IMAGE_END = "<end_of_image>"
IMAGE_PLACEHOLDER = "<image_placeholder>"

# The strings that all Janus checkpoints use, by the name under which a config may override them.
KNOWN_SPECIALS = {
    "bos_token": "<｜begin▁of▁sentence｜>",
    "eos_token": "<｜end▁of▁sentence｜>",
    "pad_token": "<｜▁pad▁｜>",
    "boi_token": IMAGE_START,
    "eoi_token": IMAGE_END,
    "image_token": IMAGE_PLACEHOLDER,
}


class JanusTokenizer:
    """Text to ids and back.

    Attributes: `bos_id`, `eos_id`, `pad_id`, `image_start_id`, `image_end_id`,
    `image_placeholder_id`; `specials`, the string of each by its name in the config files; and
    `special_strings`, all literal special tokens, longest first.
    """

    def __init__(
        self, backend: tokenizers.Tokenizer, specials: dict[str, str], source: str = "tokenizer"
    ) -> None:
        """`specials`: overrides of KNOWN_SPECIALS. UserError, naming `source`, if one is absent."""
        self.backend = backend
        self.specials = KNOWN_SPECIALS | specials
        ids = {}
        for name, string in self.specials.items():
            token_id = backend.token_to_id(string)
            if token_id is None:
                raise UserError(
                    f"{source} has no special token {string!r} ({name}): "
                    "this is not the tokenizer of a Janus checkpoint"
                )
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
    def from_folder(cls, folder: Path) -> JanusTokenizer:
        """Opens tokenizer.json with the strings of special_tokens_map.json, tokenizer_config.json.

        UserError if tokenizer.json is missing or unreadable, or a special token is not in it.
        """
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise UserError(
                f"no tokenizer.json in {folder}: copy it from the checkpoint this one came from"
            )
        specials = _special_strings(folder / "tokenizer_config.json")
        specials |= _special_strings(folder / "special_tokens_map.json")
        try:
            # Not from_file: it raises a bare Exception.
            backend = tokenizers.Tokenizer.from_buffer(path.read_bytes())
        except ValueError as error:
            raise UserError(
                f"{path} is not a readable tokenizer ({error}): download it again"
            ) from error
        return cls(backend, specials, str(path))

    @property
    def additional_specials(self) -> list[str]:
        """All special strings but BOS, EOS and pad, in order."""
        named = {self.specials[name] for name in ("bos_token", "eos_token", "pad_token")}
        return sorted(set(self.special_strings) - named)

    def __len__(self) -> int:
        """One more than the largest id: the embedding needs at least so many rows."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, special-token strings included, with BOS at position 0 and only there."""
        ids = self.backend.encode(text, add_special_tokens=False).ids
        return [self.bos_id, *(i for i in ids if i != self.bos_id)]

    def decode(self, ids: list[int]) -> str:
        """Text of `ids`; special tokens and ids without a token are left out.

        A model's vocabulary is larger than its tokenizer's, so it can sample such ids.
        """
        known = [
            i for i in ids if i not in self._skipped and self.backend.id_to_token(i) is not None
        ]
        return self.backend.decode(known)

    def strip_special(self, text: str) -> str:
        """`text` without literal special-token strings, also those that removing one creates."""
        before = None
        while before != text:
            before = text
            for special in self.special_strings:
                text = text.replace(special, "")
        return text

    def json_text(self, add_bos: bool = False) -> str:
        """The content of tokenizer.json; `add_bos` makes its post-processor put BOS in front."""
        data: dict[str, Any] = json.loads(self.backend.to_str())
        if add_bos:
            bos = self.specials["bos_token"]
            piece, first, second = (
                {"SpecialToken": {"id": bos, "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
                {"Sequence": {"id": "B", "type_id": 0}},
            )
            data["post_processor"] = {
                "type": "TemplateProcessing",
                "single": [piece, first],
                "pair": [piece, first, piece, second],
                "special_tokens": {bos: {"id": bos, "ids": [self.bos_id], "tokens": [bos]}},
            }
        return json.dumps(data, ensure_ascii=False, indent=1)


def _special_strings(path: Path) -> dict[str, str]:
    """The special-token strings that a tokenizer config file states; {} without the file."""
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}): download it again") from error
    found = {}
    for name in KNOWN_SPECIALS:
        value = data.get(name) if isinstance(data, dict) else None
        if isinstance(value, dict):  # an AddedToken written out
            value = value.get("content")
        if isinstance(value, str):
            found[name] = value
    return found
