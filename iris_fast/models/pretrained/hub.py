"""Resolve a model name: a local folder, or a Hugging Face hub id."""

import http.client
import re
import ssl
import urllib.error
import urllib.request
from pathlib import Path

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from iris_fast.errors import UserError

REACHABLE_TIMEOUT_S = 5.0
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def hub_is_reachable() -> bool:
    """Whether the Hugging Face hub answers one request within `REACHABLE_TIMEOUT_S`.

    The hub's libraries retry for up to half a minute before they report that there is no network.
    Always False with HF_HUB_OFFLINE=1.
    """
    if constants.HF_HUB_OFFLINE:
        return False
    try:
        request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
        urllib.request.urlopen(request, timeout=REACHABLE_TIMEOUT_S).close()
    except urllib.error.HTTPError:
        return True  # it answered
    except OSError as error:
        # It answered, with a certificate that Python's own store may know less well than requests.
        return isinstance(getattr(error, "reason", None), ssl.SSLError)
    except (http.client.HTTPException, ValueError):
        return True  # left to the hub's library, which reports what is wrong
    return True


def resolve_model(name_or_path: str | Path) -> Path:
    """The folder of a model: a local one as it is, a hub id `org/name` downloaded.

    Only JSON files and weights are downloaded; `.bin` weights only if there are no safetensors.
    Without a connection to the hub, the local cache is used. UserError if the model is not found.
    """
    folder = Path(name_or_path).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise UserError(f"model: {folder} is a file; give the folder that holds the model")
    name = str(name_or_path)
    if not _HUB_ID.fullmatch(name):
        raise UserError(
            f"model: no folder {name}, and it is not a hub id; give a model folder or org/name"
        )
    reachable = hub_is_reachable()
    try:
        for weights in ("*.safetensors", "*.bin"):
            patterns = ["*.json", weights]
            found = huggingface_hub.snapshot_download(
                name, allow_patterns=patterns, local_files_only=not reachable
            )
            if any(Path(found).glob("*.safetensors")):
                break
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        if not reachable:
            cause = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "no connection"
            raise UserError(
                f"model: no folder {name}, it is not in the local Hugging Face cache, and "
                f"{constants.ENDPOINT} is not reachable ({cause}); check the name and the network"
            ) from None
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"model: no folder {name}, and the Hugging Face hub does not provide it ({reason}); "
            "check the name, the network, and your access"
        ) from error
    return Path(found)
