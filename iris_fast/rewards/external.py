"""Any callable as a reward: `module:function`.

    def redness(prompts: list[str], images: list[PIL.Image.Image]) -> list[float]: ...

`prompts` and `images` have one entry per sample, and the function returns one finite number for
each. A parameter named like a field of the prompt file (or **kwargs) receives the values of that
field as a list, with None for lines without it.
"""

import importlib
import inspect
import math
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from iris_fast.errors import UserError
from iris_fast.records import Prompt


def load(name: str, setting: str = "reward_funcs") -> Callable[..., Any]:
    """Import the callable that `module:function` names; the current folder is searched too.

    UserError if there is none, or if the import raises.
    """
    module_name, _, function_name = name.partition(":")
    if not all(part.isidentifier() for part in [*module_name.split("."), function_name]):
        raise UserError(
            f"{setting}: {name} is not of the form module:function (my_rewards:redness)"
        )
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except (ImportError, SyntaxError) as error:
        raise UserError(
            f"{setting}: {name}: {error}; write module:function, with the module importable "
            "from the current folder"
        ) from None
    except (Exception, SystemExit) as error:  # anything that the user's code raises
        raise UserError(
            f"{setting}: {name}: importing {module_name} raised {_describe(error)}; fix the module"
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise UserError(f"{setting}: {name}: {module_name} has no function {function_name!r}")
    return function


def call(
    name: str,
    function: Callable[..., Any],
    prompts: list[Prompt],
    images: list[Image],
    setting: str = "reward_funcs",
) -> Tensor:
    """Call the function; [N] float32. UserError unless it returns one finite number per sample."""
    fields = wanted_fields(name, function, prompts, setting)
    try:
        # Copies of the lists: a function that changes them does not affect the next one.
        returned = function([prompt.text for prompt in prompts], list(images), **fields)
    except (Exception, SystemExit) as error:  # anything that the user's code raises
        raise UserError(f"{setting}: {name} raised {_describe(error)}; fix the function") from error
    try:
        values = torch.tensor([float(value) for value in returned], dtype=torch.float32)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{setting}: {name} did not return a list of numbers ({error}); return one number per "
            "image"
        ) from None
    if len(values) != len(prompts):
        raise UserError(
            f"{setting}: {name} returned {len(values)} numbers for {len(prompts)} images; "
            "return one per image"
        )
    for value, prompt in zip(values.tolist(), prompts, strict=True):
        if not math.isfinite(value):
            raise UserError(
                f"{setting}: {name} returned {value} (in float32) for the prompt "
                f"{prompt.text[:60]!r}; return a finite number"
            )
    return values


def _describe(error: BaseException) -> str:
    """An exception of the user's code in one line: type, message, and where it was raised."""
    *_, frame = traceback.extract_tb(error.__traceback__)
    message = " ".join(str(error).split())
    return f"{type(error).__name__}: {message} ({frame.filename}:{frame.lineno})"


def wanted_fields(
    name: str,
    function: Callable[..., Any],
    prompts: list[Prompt],
    setting: str = "reward_funcs",
) -> dict[str, list[Any]]:
    """The fields of the prompt file that the function accepts; UserError if it needs others."""
    fields = sorted({field for prompt in prompts for field in prompt.extra})
    signature = inspect.signature(function)
    parameters = signature.parameters
    takes_all = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    first_two, named = list(parameters)[:2], list(parameters)[2:]
    wanted = [f for f in fields if f in named or (takes_all and f not in first_two)]
    chosen = {field: [prompt.extra.get(field) for prompt in prompts] for field in wanted}
    try:
        signature.bind([], [], **chosen)
    except TypeError as error:
        raise UserError(
            f"{setting}: {name} cannot be called with prompts, images and the prompt file's "
            f"fields {', '.join(fields) or '(none)'}: {error}; fix its parameters"
        ) from None
    return chosen
