"""Where a model is: a folder, or a Hugging Face hub id that the user named."""

from __future__ import annotations

import re
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from iris_fast.errors import UserError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def resolve_model(name_or_path: str | Path) -> Path:
    """The folder of a checkpoint: an existing one as it is, a hub id `org/name` downloaded.

    Only JSON files and weights are fetched; `.bin` weights only where there are no safetensors.
    UserError if it is neither, or the hub does not give it.
    """
    folder = Path(name_or_path).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise UserError(f"{folder} is a file: give the folder that holds the checkpoint")
    name = str(name_or_path)
    if not _HUB_ID.fullmatch(name):
        raise UserError(
            f"no folder {name}, and it is no hub id: give a checkpoint folder or org/name"
        )
    try:
        found = Path(
            huggingface_hub.snapshot_download(name, allow_patterns=["*.json", "*.safetensors"])
        )
        if not any(found.glob("*.safetensors")):
            found = Path(
                huggingface_hub.snapshot_download(name, allow_patterns=["*.json", "*.bin"])
            )
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"no folder {name}, and the Hugging Face hub does not give it ({reason}): "
            "check the name, the network, and your access"
        ) from error
    return found
