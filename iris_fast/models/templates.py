"""Chat templates: how a prompt becomes the text that the model was trained to continue.

A turn is `ROLE: text` and an empty line; the assistant's open turn is `ROLE:` without a space. The
templates of the Janus models differ in the role strings only; the wrong ones cost image quality
without any error.
"""

from dataclasses import dataclass
from pathlib import Path

from iris_fast.errors import UserError
from iris_fast.models.tokenizer import IMAGE_START, JanusTokenizer

PLACEHOLDER = "{prompt}"


@dataclass(frozen=True)
class Template:
    """Role strings, and the system sentence before the chain-of-thought turn, if any."""

    user: str
    assistant: str
    cot_system: str = ""

    def image_prompt(self, text: str) -> str:
        """The text that the image codes follow."""
        return self._turns(text) + IMAGE_START

    def cot_prompt(self, instruction_text: str) -> str:
        """The text that the chain of thought follows."""
        system = f"{self.cot_system}\n\n" if self.cot_system else ""
        return system + self._turns(instruction_text)

    def _turns(self, text: str) -> str:
        return f"{self.user}: {text.strip()}\n\n{self.assistant}:"


# The system sentence and the instruction are not T2I-R1's.
_COT_SYSTEM = "You help people to draw: you think about what a picture should show."
TEMPLATES = {
    "janus-pro": Template("<|User|>", "<|Assistant|>"),
    "janus-1.3b": Template("User", "Assistant"),
    # As T2I-R1 trained Janus-Pro: the older model's roles, and a system sentence before the CoT.
    "t2i-r1": Template("User", "Assistant", _COT_SYSTEM),
}


def load_instruction(path: str | Path | None = None) -> str:
    """The chain-of-thought instruction: a text with `{prompt}` where the prompt is inserted.

    None is the one in the package. UserError if the file is not UTF-8 text with a `{prompt}`.
    """
    file = Path(__file__).with_name("cot_instruction.txt") if path is None else Path(path)
    try:
        text = file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = f"cannot be read ({error}); give a UTF-8 text file"
        raise UserError(f"cot_instruction: {file} {reason}") from error
    if PLACEHOLDER not in text:
        remedy = "write it where the prompt belongs"
        raise UserError(f"cot_instruction: {file} has no {PLACEHOLDER}; {remedy}")
    return text


def fill_instruction(instruction: str, prompt: str) -> str:
    """The instruction with the prompt inserted; all other braces are plain text."""
    return instruction.replace(PLACEHOLDER, prompt.strip())


def join_prompt(prompt: str, cot: str) -> str:
    """`PROMPT. COT`: the text of the image prompt after a chain of thought.

    Spaces and full stops at the end of the prompt are replaced; an empty chain of thought leaves
    the prompt as it is.
    """
    cot = cot.strip()
    return f"{prompt.strip().rstrip(' .')}. {cot}" if cot else prompt


def image_prompt_ids(tokenizer: JanusTokenizer, template: Template, text: str) -> list[int]:
    """Ids of the image prompt: BOS first, image-start last."""
    return tokenizer.encode(template.image_prompt(text))


def unconditional_ids(ids: list[int], tokenizer: JanusTokenizer) -> list[int]:
    """The unconditional row of an image prompt: pad instead of all between BOS and image-start.

    It has the same length, hence the same positions, and its pads are attended, as in training.
    """
    return [ids[0], *[tokenizer.pad_id] * (len(ids) - 2), ids[-1]]
