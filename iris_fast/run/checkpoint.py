"""Training state on disk: written to a temporary folder, verified, renamed; resumed bitwise.

A checkpoint folder `checkpoints/step_NNNNN/` holds

    shard-*.safetensors   policy weights, or its adapters alone, and AdamW moments
                          (torch.distributed.checkpoint)
    rank_R.pt             random states of rank R, and the rollout it is in the middle of
    state.json            step, prompt cursor, number of ranks
    manifest.json         size and SHA-256 of every other file, written last

No file is a pickle that could run code: safetensors and JSON, and tensors and plain containers read
with `weights_only=True`.
"""

import contextlib
import dataclasses
import json
import pickle
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from iris_kernels import TokenStats
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

from iris_fast.distributed import Ranks
from iris_fast.errors import UserError, writing
from iris_fast.grpo import lora as adapters
from iris_fast.grpo.micro_batches import MicroBatch
from iris_fast.grpo.optimizer import plain_parts
from iris_fast.models.janus import Janus
from iris_fast.records import Prompt, Rollout, Scored, Trace
from iris_fast.run.best import Judge
from iris_fast.run.manifest import MANIFEST, find_fault, fsync, write_manifest
from iris_fast.run.random_state import random_state, set_random_state

OPTIONS = StateDictOptions(flatten_optimizer_state_dict=True)
STATE_FIELDS = ("step", "cursor", "prompts_sha256", "world_size", "inside_rollout", "lora")


@dataclass
class Progress:
    """The position of a run: its state besides weights and moments."""

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
    judge: Judge | None = None,
) -> Path:
    """Write `folder/step_NNNNN` and delete all but the `keep` newest checkpoints and those that the
    `judge` needs. A collective.

    A crash at any moment leaves the earlier checkpoints complete. UserError if the disk is full or
    not writable.
    """
    target = folder / f"step_{progress.step:05d}"
    partial = folder / f".partial-{target.name}"
    try:
        with ranks.on_first_rank() as mine:
            if mine:
                with writing("output_dir", target):
                    for leftover in folder.glob(".partial-*"):
                        shutil.rmtree(leftover)
                    partial.mkdir(parents=True)
        reason = ""
        try:
            _write_state(partial, _tensors(policy, optimizer), progress, ranks)
        except (OSError, RuntimeError, dcp.CheckpointException) as error:
            reason = _reason(error)
        if ranks.any(bool(reason)):
            raise UserError(
                f"output_dir: {target} could not be written ({reason or 'on another rank'}); free "
                "disk space and resume with --resume_from_checkpoint true"
            )
        with ranks.on_first_rank() as mine:
            if mine:
                with writing("output_dir", target):
                    write_manifest(partial, progress.step)
                    if target.exists():  # a damaged one, or resuming would have started from it
                        shutil.rmtree(target)
                    partial.rename(target)
                    fsync(folder)
                _delete_old(folder, progress.step, keep, judge)
    except UserError:
        if ranks.is_first:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    return target


def _write_state(
    partial: Path, tensors: dict[str, Tensor], progress: Progress, ranks: Ranks
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        writer = dcp.HuggingFaceStorageWriter(str(partial), save_distributed=True)
        dcp.save(tensors, storage_writer=writer)
    rank_state = {
        "random": random_state(),
        "scored": progress.scored and _to_containers(progress.scored),
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


def _delete_old(folder: Path, step: int, keep: int, judge: Judge | None) -> None:
    """Delete all but the `keep` newest checkpoints up to `step` and those that the judge needs;
    later ones are damaged."""
    paths = step_folders(folder)
    complete = [path for path in paths if _step(path) <= step and (path / MANIFEST).is_file()]
    needed = judge.needed([_step(path) for path in complete]) if judge else []
    for path in paths:
        if path not in complete[:keep] and not (path in complete and _step(path) in needed):
            with contextlib.suppress(OSError):
                # First, so that what an interruption leaves of it is no checkpoint.
                (path / MANIFEST).unlink(missing_ok=True)
            shutil.rmtree(path, ignore_errors=True)


def ranked(folder: Path, judge: Judge) -> list[Path]:
    """The checkpoints that `judge` can compare, the best first, without verifying them."""
    complete = {_step(p): p for p in step_folders(folder) if (p / MANIFEST).is_file()}
    return [complete[step] for step in judge.ranked(list(complete))]


def describe_best(folder: Path, judge: Judge | None) -> str | None:
    """Name the best checkpoint and its score; None if there is none."""
    paths = ranked(folder, judge) if judge else []
    return judge.describe(paths[0], _step(paths[0])) if judge and paths else None


def step_folders(folder: Path) -> list[Path]:
    """List the folders named like checkpoints, newest first, without verifying them."""
    named = [path for path in folder.glob("step_*") if path.name[5:].isdecimal()]
    return sorted(named, key=_step, reverse=True)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def newest(folder: Path) -> tuple[Path | None, list[str]]:
    """Find the newest valid checkpoint; and one line for each newer one that is not valid."""
    faults = []
    for path in step_folders(folder):
        fault = find_fault(path)
        if fault is None:
            return path, faults
        faults.append(f"checkpoint {path} is skipped: {fault}")
    return None, faults


def load(path: Path, policy: nn.Module, optimizer: torch.optim.Optimizer, ranks: Ranks) -> Progress:
    """Load a valid checkpoint into `policy`, `optimizer` and the random generators.

    The number of ranks may differ from that of the run that saved it, except between the passes
    over one rollout: UserError then, and where tensors do not fit the model.
    """
    state = _read_state(path)
    same_ranks = state["world_size"] == ranks.world_size
    if state["inside_rollout"] and not same_ranks:
        raise UserError(
            f"resume_from_checkpoint: {path} was saved between two optimizer steps on one rollout "
            f"(num_iterations), shared by {state['world_size']} ranks; resume with "
            f"{state['world_size']} ranks, not {ranks.world_size}"
        )
    reader = dcp.HuggingFaceStorageReader(str(path))
    try:
        dcp.load(_tensors(policy, optimizer), storage_reader=reader)
    except (dcp.CheckpointException, RuntimeError, ValueError, KeyError) as error:
        raise UserError(
            f"resume_from_checkpoint: {path} does not fit the model ({_reason(error)}); use the "
            "--model of that run"
        ) from None
    progress = Progress(state["step"], state["cursor"], state["prompts_sha256"], lora=state["lora"])
    if same_ranks:
        rank_state = _read_rank_state(path / f"rank_{ranks.rank}.pt")
        set_random_state(rank_state["random"])
        if rank_state["scored"] is not None:
            progress.scored = _from_containers(rank_state["scored"])
            progress.old_logprobs = rank_state["old_logprobs"]
    return progress


def load_policy_weights(path: Path, policy: Janus) -> None:
    """Load the weights, adapters merged, into an unsharded model; UserError if they do not fit."""
    lora = _read_state(path)["lora"]
    if lora is not None:
        adapters.add(policy, lora)
    weights = _policy_tensors(policy.state_dict())
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that there is no process group
            dcp.load(weights, storage_reader=dcp.HuggingFaceStorageReader(str(path)), no_dist=True)
    except (RuntimeError, ValueError, KeyError, AssertionError) as error:
        raise UserError(
            f"run_folder: {path} does not fit the model of its config.yaml ({_reason(error)}); "
            "restore that model"
        ) from None
    adapters.merge(policy)


def _read_state(path: Path) -> dict[str, Any]:
    try:
        state = {"lora": None} | json.loads((path / "state.json").read_text())
        state["lora"] = state["lora"] and adapters.Lora(**state["lora"])
        return {name: state[name] for name in STATE_FIELDS}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"resume_from_checkpoint: {path / 'state.json'} is damaged ({_reason(error)}); "
            f"delete {path} to resume from the checkpoint before it"
        ) from None


def _read_rank_state(file: Path) -> dict[str, Any]:
    try:
        return torch.load(file, weights_only=True)
    except (pickle.UnpicklingError, OSError, RuntimeError, ValueError, KeyError, EOFError):
        raise UserError(
            f"resume_from_checkpoint: {file} is damaged, or holds more than tensors (a pickle can "
            f"run code), and was not opened; delete {file.parent} to resume from the checkpoint "
            "before it"
        ) from None


def _tensors(policy: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Weights and moments by name, not copied: loading writes into them."""
    model_state, optimizer_state = get_state_dict(policy, optimizer, options=OPTIONS)
    tensors = _policy_tensors(model_state)
    for name, value in optimizer_state.items():
        if name.startswith("state."):  # the rest, such as betas, are settings
            tensors |= plain_parts(f"optimizer.{name}", value)
    return tensors


def _policy_tensors(model_state: dict[str, Tensor]) -> dict[str, Tensor]:
    """All weights, or the adapters alone if there are any: the others do not change."""
    adapter = {name: value for name, value in model_state.items() if adapters.is_adapter(name)}
    return {f"policy.{name}": value for name, value in (adapter or model_state).items()}


def _to_containers(scored: Scored) -> dict[str, Any]:
    """Records as dicts and named tuples as lists, which `weights_only=True` can read.

    Tensors are not copied: those that share memory would be stored separately.
    """
    rollout = dict(vars(scored.rollout))
    # The other fields of a prompt are for the rewards, which are known.
    rollout["prompts"] = [{"text": prompt.text} for prompt in scored.rollout.prompts]
    for kind in ("text", "image"):
        trace = rollout[kind]
        conditional, guided = list(trace.conditional), list(trace.guided)
        rollout[kind] = {"conditional": conditional, "guided": guided, "mask": trace.mask}
    return {**vars(scored), "rollout": rollout}


def _from_containers(fields: dict[str, Any]) -> Scored:
    rollout = dict(fields["rollout"])
    rollout["prompts"] = [Prompt(**prompt) for prompt in rollout["prompts"]]
    for kind in ("text", "image"):
        trace = rollout[kind]
        conditional, guided = TokenStats(*trace["conditional"]), TokenStats(*trace["guided"])
        rollout[kind] = Trace(conditional, guided, trace["mask"])
    return Scored(**fields | {"rollout": Rollout(**rollout)})


def _reason(error: BaseException) -> str:
    """An exception in one line; of a collective one, the first rank's own."""
    if isinstance(error, dcp.CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    return " ".join(str(error).split())[:300] or type(error).__name__
