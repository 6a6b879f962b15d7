"""Training state on disk: written aside, verified, renamed into place; resumed bit by bit.

A checkpoint folder `checkpoints/step_NNNNN/` holds

    shard-*.safetensors   policy weights and AdamW moments (torch.distributed.checkpoint)
    rank_R.pt             random states of rank R, and the rollout it is in the middle of
    state.json            step, prompt cursor, number of ranks
    manifest.json         size and SHA-256 of every other file, written last

Nothing in it is a pickle that could run code: safetensors and JSON, and tensors and plain
containers read with `weights_only=True`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import random
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from iris_kernels import TokenStats
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)

from iris_fast.batch import Prompt, Rollout, Scored, Trace
from iris_fast.distributed import Ranks
from iris_fast.errors import UserError

OPTIONS = StateDictOptions(flatten_optimizer_state_dict=True)
MANIFEST = "manifest.json"


@dataclass
class Progress:
    """Where a run stands, besides weights and moments."""

    step: int = 0
    cursor: int = 0  # prompts taken by all ranks together
    scored: Scored | None = None  # this rank's rollout, while num_iterations passes go over it
    old_logprobs: list[Tensor] | None = None


def save(
    folder: Path,
    policy: nn.Module,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    ranks: Ranks,
    keep: int,
) -> Path:
    """Write `folder/step_NNNNN` and delete all but the `keep` newest. Every rank calls this.

    A crash at any moment leaves the checkpoints before it untouched and complete. UserError if the
    disk is full or not writable.
    """
    target = folder / f"step_{progress.step:05d}"
    partial = folder / f".partial-{target.name}"
    with ranks.first_does() as mine:
        if mine:
            for leftover in folder.glob(".partial-*"):
                shutil.rmtree(leftover)
            partial.mkdir(parents=True)
    failure = ""
    try:
        _write(partial, policy, optimizer, progress, ranks)
    except (OSError, RuntimeError, dcp.CheckpointException) as mistake:
        failure = " ".join(str(mistake).split())[:300] or type(mistake).__name__
    if ranks.any(bool(failure)):
        if ranks.is_first:
            shutil.rmtree(partial, ignore_errors=True)
        raise UserError(
            f"checkpoint: {target} could not be written ({failure or 'on another rank'}); make "
            "room on the disk and go on with --resume_from_checkpoint true"
        )
    with ranks.first_does() as mine:
        if mine:
            _seal(partial, progress.step)
            if target.exists():  # only a broken one can stand here: resuming skips those
                shutil.rmtree(target)
            partial.rename(target)
            _flush(folder)
            for old in complete_names(folder)[keep:]:
                shutil.rmtree(old)
    return target


def _write(
    partial: Path,
    policy: nn.Module,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    ranks: Ranks,
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        dcp.save(
            _tensors(policy, optimizer),
            storage_writer=dcp.HuggingFaceStorageWriter(str(partial), save_distributed=True),
        )
    rank_state = {
        "random": _random_state(),
        "scored": _plain(progress.scored),
        "old_logprobs": progress.old_logprobs,
    }
    torch.save(rank_state, partial / f"rank_{ranks.rank}.pt")
    if ranks.is_first:
        state = {
            "step": progress.step,
            "cursor": progress.cursor,
            "world_size": ranks.world_size,
            "inside_rollout": progress.scored is not None,
        }
        (partial / "state.json").write_text(json.dumps(state))


def _tensors(policy: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    model_state, optimizer_state = get_state_dict(policy, optimizer, options=OPTIONS)
    tensors = {f"policy.{name}": value for name, value in model_state.items()}
    for name, value in optimizer_state.items():
        if isinstance(value, Tensor):  # the rest, such as betas, are settings
            tensors[f"optimizer.{name}"] = value
    return tensors


def _seal(partial: Path, step: int) -> None:
    """Re-read every file, note its size and hash, and put the manifest beside them."""
    files = {}
    for path in sorted(partial.iterdir()):
        files[path.name] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        _flush(path)
    (partial / MANIFEST).write_text(json.dumps({"step": step, "files": files}, indent=1))
    _flush(partial / MANIFEST)
    _flush(partial)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def complete_names(folder: Path) -> list[Path]:
    """Checkpoints that have a manifest, newest first; not verified."""
    return sorted(
        (path.parent for path in folder.glob(f"step_*/{MANIFEST}")),
        key=lambda path: int(path.name.removeprefix("step_")),
        reverse=True,
    )


def find_fault(path: Path) -> str | None:
    """What is wrong with a checkpoint, judged by its manifest; None if nothing."""
    try:
        files = json.loads((path / MANIFEST).read_text())["files"]
    except (ValueError, KeyError):
        return "its manifest is damaged"
    for name, expected in files.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != expected["bytes"]:
            return f"{name} has {file.stat().st_size} bytes instead of {expected['bytes']}"
        if _sha256(file) != expected["sha256"]:
            return f"{name} has changed since it was written"
    return None


def newest(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that passes its manifest, and a line for each newer one that fails."""
    faults = []
    for path in complete_names(folder):
        fault = find_fault(path)
        if fault is None:
            return path, faults
        faults.append(f"checkpoint {path} is left out: {fault}")
    return None, faults


def load(path: Path, policy: nn.Module, optimizer: torch.optim.Optimizer, ranks: Ranks) -> Progress:
    """Put a verified checkpoint's state into `policy` and `optimizer`; where the run stood.

    The number of ranks may differ from the one that saved, except in the middle of the passes over
    one rollout: UserError then, and where tensors do not fit the model.
    """
    state = json.loads((path / "state.json").read_text())
    same_ranks = state["world_size"] == ranks.world_size
    if state["inside_rollout"] and not same_ranks:
        raise UserError(
            f"resume_from_checkpoint: {path} lies between two passes over one rollout "
            f"(num_iterations), shared out over {state['world_size']} ranks; resume with "
            f"{state['world_size']} ranks, not {ranks.world_size}"
        )
    tensors = _tensors(policy, optimizer)
    try:
        dcp.load(tensors, storage_reader=dcp.HuggingFaceStorageReader(str(path)))
    except (dcp.CheckpointException, RuntimeError, ValueError, KeyError) as mistake:
        raise UserError(
            f"resume_from_checkpoint: {path} does not fit the model "
            f"({' '.join(str(mistake).split())[:300]}); name the --model of that run"
        ) from None
    parts: dict[str, dict[str, Any]] = {"policy": {}, "optimizer": {}}
    for name, value in tensors.items():
        kind, _, key = name.partition(".")
        parts[kind][key] = value
    _, settings = get_state_dict(policy, optimizer, options=OPTIONS)
    set_state_dict(
        policy,
        optimizer,
        model_state_dict=parts["policy"],
        optim_state_dict=settings | parts["optimizer"],
        options=OPTIONS,
    )
    progress = Progress(step=state["step"], cursor=state["cursor"])
    if same_ranks:
        mine = torch.load(path / f"rank_{ranks.rank}.pt", weights_only=True)
        _set_random_state(mine["random"])
        if mine["scored"] is not None:
            progress.scored = _scored(mine["scored"])
            progress.old_logprobs = mine["old_logprobs"]
    return progress


def load_policy_weights(path: Path, policy: nn.Module) -> None:
    """The weights alone, into a module that is not sharded, for export."""
    weights = {f"policy.{name}": value for name, value in policy.state_dict().items()}
    dcp.load(weights, storage_reader=dcp.HuggingFaceStorageReader(str(path)), no_dist=True)


def _plain(value: Any) -> Any:
    """Records as dicts and tuples as lists: what `weights_only=True` reads back."""
    if dataclasses.is_dataclass(value):
        return {name: _plain(part) for name, part in vars(value).items()}
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return value


def _scored(fields: dict[str, Any]) -> Scored:
    rollout = dict(fields["rollout"])
    rollout["prompts"] = [Prompt(**prompt) for prompt in rollout["prompts"]]
    for name in ("text", "image"):
        trace = rollout[name]
        rollout[name] = Trace(
            conditional=TokenStats(*trace["conditional"]),
            guided=TokenStats(*trace["guided"]),
            mask=trace["mask"],
        )
    return Scored(**{**fields, "rollout": Rollout(**rollout)})


def _random_state() -> dict[str, Any]:
    """States of the global generators; iris-fast draws from none of them, rewards may."""
    kind, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (kind, keys.tolist(), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def _set_random_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
