"""Weight files: safetensors and .bin, single and sharded, read lazily; safetensors written.

Nothing here can run code from a file: safetensors files hold none, and `.bin` files are read by
`torch.load(weights_only=True)`.
"""

import json
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from iris_fast.errors import UserError

SINGLE_FILES = ["model.safetensors", "pytorch_model.bin"]  # in order of preference
MAX_SHARD_SIZE = "5GB"
# What safetensors and torch.load raise for files that they cannot read.
_DAMAGED = (SafetensorError, RuntimeError, OSError, EOFError, ValueError, KeyError, TypeError)


def read_json(path: Path) -> dict:
    """The object in a JSON file. UserError if it cannot be read as one."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{path} cannot be read as JSON ({error}); download or export it again"
        ) from error
    if not isinstance(data, dict):
        raise UserError(f"{path} should hold a JSON object, found a {type(data).__name__}")
    return data


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a model folder by name, on the CPU, in their stored dtype.

    They are mapped from their files, so memory is used only when they are read. UserError names a
    missing, damaged or unsafe file.
    """
    for name in SINGLE_FILES:
        if (folder / name).is_file():
            return _read_file(folder / name)
        index = folder / f"{name}.index.json"
        if index.is_file():
            return _read_shards(folder, index)
    names = ", ".join(f"{name} or {name}.index.json" for name in SINGLE_FILES)
    raise UserError(f"no weights in {folder}: expected {names}")


def _read_shards(folder: Path, index: Path) -> dict[str, Tensor]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index} has no weight_map; download it again")
    tensors: dict[str, Tensor] = {}
    for shard in sorted(set(map(str, weight_map.values()))):
        if Path(shard).name != shard or Path(shard).suffix not in (".safetensors", ".bin"):
            wrong = f"{index} names {shard!r}, which is not a weight file in its folder"
            raise UserError(f"{wrong}; download it again")
        if not (folder / shard).is_file():
            raise UserError(f"{folder / shard} is missing, {index.name} lists it; download it")
        tensors |= _read_file(folder / shard)
    absent = [name for name in weight_map if name not in tensors]
    if absent:
        raise UserError(
            f"{folder / weight_map[absent[0]]} has no tensor {absent[0]!r}, which {index.name} "
            f"lists ({len(absent)} are missing); download it again"
        )
    return tensors


def _read_file(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".bin" and path.stat().st_size and not zipfile.is_zipfile(path):
        raise UserError(
            f"{path} is damaged, or a plain pickle from before torch 1.6, which can run code and "
            "is not opened; download it again, or convert it to safetensors on an isolated machine"
        )
    try:
        if path.suffix == ".safetensors":
            return dict(sorted(load_file(path).items()))  # shards are filled in this order
        data = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} holds more than tensors (a pickle can run code), so it was not opened; "
            "convert it to safetensors on an isolated machine"
        ) from error
    except _DAMAGED as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        kind = path.suffix.removeprefix(".")
        raise UserError(
            f"{path} is damaged or not a {kind} file ({reason}); download it again"
        ) from error
    if not isinstance(data, dict) or not all(isinstance(v, Tensor) for v in data.values()):
        raise UserError(f"{path} should hold a dict of tensors and nothing else")
    return data


def write_tensors(tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Write safetensors into `folder` (with an index if more than one), read back and compare.

    UserError if they cannot be written or are read back differently.
    """
    written: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage()
        # The library drops tensors that share memory (views, or weights tied by accident).
        if storage.nbytes() != tensor.nbytes or storage.data_ptr() in storages:
            tensor = tensor.clone()
        storages.add(tensor.untyped_storage().data_ptr())
        written[name] = tensor
    try:
        save_torch_state_dict(written, folder, max_shard_size=MAX_SHARD_SIZE)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write weights to {folder} ({error}); check disk space") from error
    back = read_tensors(folder)
    for name, tensor in written.items():
        if name not in back or not _same_bits(tensor, back[name]):
            cause = "the disk is full or faulty"
            raise UserError(
                f"{folder}: {name!r} is read back differently than it was written; {cause}"
            )


def _same_bits(left: Tensor, right: Tensor) -> bool:
    if left.shape != right.shape or left.dtype != right.dtype:
        return False
    # As bytes, because NaN differs from itself.
    return torch.equal(left.reshape(-1).view(torch.uint8), right.reshape(-1).view(torch.uint8))
