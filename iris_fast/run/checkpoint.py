"""Training state on disk: written aside, verified, renamed into place; resumed bit by bit.

A checkpoint folder `checkpoints/step_NNNNN/` holds

    shard-*.safetensors   policy weights, or its adapters alone, and AdamW moments
                          (torch.distributed.checkpoint)
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
import pickle
import shutil
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from iris_kernels import TokenStats
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
)

from iris_fast.distributed import Ranks
from iris_fast.errors import UserError, writing
from iris_fast.grpo import lora as adapters
from iris_fast.grpo.micro_batches import MicroBatch
from iris_fast.grpo.optimizer import plain_parts
from iris_fast.models.janus import Janus
from iris_fast.records import Prompt, Rollout, Scored, Trace
from iris_fast.run.random_state import random_state, set_random_state

OPTIONS = StateDictOptions(flatten_optimizer_state_dict=True)
MANIFEST = "manifest.json"
HASHED_AT_ONCE = 8
STATE_FIELDS = ("step", "cursor", "prompts_sha256", "world_size", "inside_rollout", "lora")


@dataclass
class Progress:
    """Where a run stands, besides weights and moments."""

    step: int = 0
    cursor: int = 0  # prompts taken by all ranks together
    prompts_sha256: str = ""  # of the prompts that `cursor` counts
    scored: Scored | None = None  # this rank's rollout, while num_iterations passes go over it
    old_logprobs: list[Tensor] | None = None
    lora: adapters.Lora | None = None

    def advance(
        self, cursor: int, scored: Scored, batches: list[MicroBatch], num_iterations: int
    ) -> None:
        """Count a finished step; its rollout is kept while further passes over it follow."""
        self.step += 1
        self.cursor = cursor
        self.scored = self.old_logprobs = None
        if self.step % num_iterations:
            self.scored = scored
            self.old_logprobs = [batch.old_logprob_M.cpu() for batch in batches]


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
    with ranks.on_first_rank() as mine:
        if mine:
            with writing("output_dir", target):
                for leftover in folder.glob(".partial-*"):
                    shutil.rmtree(leftover)
                partial.mkdir(parents=True)
    failure = ""
    try:
        _write(partial, policy, optimizer, progress, ranks)
    except (OSError, RuntimeError, dcp.CheckpointException) as error:
        failure = _reason(error)
    if ranks.any(bool(failure)):
        if ranks.is_first:
            shutil.rmtree(partial, ignore_errors=True)
        raise UserError(
            f"output_dir: {target} could not be written ({failure or 'on another rank'}); make "
            "room on the disk and go on with --resume_from_checkpoint true"
        )
    with ranks.on_first_rank() as mine:
        if mine:
            try:
                with writing("output_dir", target):
                    _seal(partial, progress.step)
                    if target.exists():  # only a broken one can stand here: resuming skips those
                        shutil.rmtree(target)
                    partial.rename(target)
                    _flush(folder)
            except UserError:
                shutil.rmtree(partial, ignore_errors=True)
                raise
            _retire(folder, progress.step, keep)
    return target


def _retire(folder: Path, step: int, keep: int) -> None:
    """Delete all but the `keep` newest checkpoints up to `step`. Later ones can only be broken:
    the run was resumed before them; they must not count."""
    kept = [
        path for path in step_folders(folder) if _step(path) <= step and (path / MANIFEST).is_file()
    ][:keep]
    for path in step_folders(folder):
        if path not in kept:
            shutil.rmtree(path, ignore_errors=True)


def _reason(error: BaseException) -> str:
    """An exception in one line; of a collective one, a rank's own, without its traceback."""
    if isinstance(error, dcp.CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    return " ".join(str(error).split())[:300] or type(error).__name__


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
        "random": random_state(),
        "scored": _plain(progress.scored),
        "old_logprobs": progress.old_logprobs,
    }
    torch.save(rank_state, partial / f"rank_{ranks.rank}.pt")
    if ranks.is_first:
        state = {
            "step": progress.step,
            "cursor": progress.cursor,
            "prompts_sha256": progress.prompts_sha256,
            "world_size": ranks.world_size,
            "inside_rollout": progress.scored is not None,
            "lora": progress.lora and dataclasses.asdict(progress.lora),
        }
        (partial / "state.json").write_text(json.dumps(state))


def _tensors(policy: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Weights and moments by name: the memory in use, not copies; what is read into it is set."""
    model_state, optimizer_state = get_state_dict(policy, optimizer, options=OPTIONS)
    tensors = {f"policy.{name}": value for name, value in _trained_weights(model_state).items()}
    for name, value in optimizer_state.items():
        if name.startswith("state."):  # the rest, such as betas, are settings
            tensors |= plain_parts(f"optimizer.{name}", value)
    return tensors


def _trained_weights(model_state: dict[str, Tensor]) -> dict[str, Tensor]:
    """All weights, or where there are adapters those alone: the rest is the model's, unchanged."""
    chosen = {name: value for name, value in model_state.items() if adapters.is_adapter(name)}
    return chosen or model_state


def _seal(partial: Path, step: int) -> None:
    """Re-read every file, note its size and hash, and put the manifest beside them."""
    paths = sorted(partial.iterdir())
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": digest}
        for path, digest in zip(paths, _sha256_of(paths), strict=True)
    }
    for path in paths:
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


def _sha256_of(paths: list[Path]) -> list[str]:
    """Hashes, several files at a time: hashlib lets other threads run, and the ranks wait."""
    with ThreadPoolExecutor(HASHED_AT_ONCE) as threads:
        return list(threads.map(_sha256, paths))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def step_folders(folder: Path) -> list[Path]:
    """Folders that are named as checkpoints, newest first; not verified."""
    named = [path for path in folder.glob("step_*") if path.name[5:].isdecimal()]
    return sorted(named, key=_step, reverse=True)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def find_fault(path: Path) -> str | None:
    """What is wrong with a checkpoint, judged by its manifest; None if nothing."""
    if not (path / MANIFEST).is_file():
        return f"{MANIFEST} is missing"
    try:
        files = json.loads((path / MANIFEST).read_text())["files"]
        expected = {name: (entry["bytes"], entry["sha256"]) for name, entry in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is damaged"
    for name, (size, _) in expected.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes instead of {size}"
    found = _sha256_of([path / name for name in expected])
    for (name, (_, digest)), now in zip(expected.items(), found, strict=True):
        if now != digest:
            return f"{name} has changed since it was written"
    return None


def newest(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that passes its manifest, and a line for each newer one that fails."""
    faults = []
    for path in step_folders(folder):
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
    state = _read_state(path)
    same_ranks = state["world_size"] == ranks.world_size
    if state["inside_rollout"] and not same_ranks:
        raise UserError(
            f"resume_from_checkpoint: {path} lies between two passes over one rollout "
            f"(num_iterations), shared out over {state['world_size']} ranks; resume with "
            f"{state['world_size']} ranks, not {ranks.world_size}"
        )
    try:
        dcp.load(
            _tensors(policy, optimizer), storage_reader=dcp.HuggingFaceStorageReader(str(path))
        )
    except (dcp.CheckpointException, RuntimeError, ValueError, KeyError) as error:
        raise UserError(
            f"resume_from_checkpoint: {path} does not fit the model ({_reason(error)}); name the "
            "--model of that run"
        ) from None
    progress = Progress(
        step=state["step"],
        cursor=state["cursor"],
        prompts_sha256=state["prompts_sha256"],
        lora=state["lora"] and adapters.Lora(**state["lora"]),
    )
    if same_ranks:
        mine = _read_rank_state(path / f"rank_{ranks.rank}.pt")
        set_random_state(mine["random"])
        if mine["scored"] is not None:
            progress.scored = _scored(mine["scored"])
            progress.old_logprobs = mine["old_logprobs"]
    return progress


def _read_state(path: Path) -> dict[str, Any]:
    try:
        state = {"lora": None} | json.loads((path / "state.json").read_text())
        return {name: state[name] for name in STATE_FIELDS}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"resume_from_checkpoint: {path / 'state.json'} is damaged ({_reason(error)}); "
            f"delete {path}, and the checkpoint before it is taken"
        ) from None


def _read_rank_state(file: Path) -> dict[str, Any]:
    try:
        return torch.load(file, weights_only=True)
    except (pickle.UnpicklingError, OSError, RuntimeError, ValueError, KeyError, EOFError):
        raise UserError(
            f"resume_from_checkpoint: {file} is damaged, or holds more than tensors (a pickle can "
            f"run code), and was not opened; delete {file.parent}, and the checkpoint before it is "
            "taken"
        ) from None


def load_policy_weights(path: Path, policy: Janus) -> None:
    """The weights alone, adapters merged, into a model that is not sharded, for export. UserError
    where they do not fit it."""
    lora = _read_state(path)["lora"]
    if lora is not None:
        adapters.add(policy, adapters.Lora(**lora))
    chosen = _trained_weights(policy.state_dict())
    weights = {f"policy.{name}": value for name, value in chosen.items()}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that no process group was started
            dcp.load(weights, storage_reader=dcp.HuggingFaceStorageReader(str(path)), no_dist=True)
    except (RuntimeError, ValueError, KeyError, AssertionError) as error:
        raise UserError(
            f"run_folder: {path} does not fit the model of its config.yaml ({_reason(error)}); "
            "put that model back"
        ) from None
    adapters.merge(policy)


def _plain(value: Any) -> Any:
    """Records as dicts and tuples as lists: what `weights_only=True` reads back."""
    if isinstance(value, Prompt):  # its other fields were for the rewards, which are known
        return {"text": value.text}
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
