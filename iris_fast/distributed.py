"""Processes: start and end, the few collectives the loop needs, FSDP2, signals.

The same code runs with one process, with or without torchrun, on gloo (CPU) and NCCL (GPU).
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from iris_fast.errors import UserError

PR_SET_PDEATHSIG = 1
# How gloo says that a rank at the other end of a collective is no more. That rank, if it lives to
# say why, does so first.
PEER_IS_GONE = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")
GONE_RANK_SPEAKS_S = 3.0


@dataclass(frozen=True)
class Ranks:
    """Who this process is, where it computes, and how it talks to the others."""

    rank: int
    world_size: int
    device: torch.device
    mesh: DeviceMesh

    @property
    def is_first(self) -> bool:
        """Whether this rank writes files and speaks."""
        return self.rank == 0

    def gather(self, values: Tensor) -> Tensor:
        """Every rank's `values` (same shape on the CPU everywhere), joined along dim 0."""
        parts = [torch.empty_like(values) for _ in range(self.world_size)]
        dist.all_gather(parts, values.contiguous())
        return torch.cat(parts)

    def own_part(self, gathered: Tensor) -> Tensor:
        """This rank's rows of what `gather` joined."""
        return gathered.view(self.world_size, -1)[self.rank]

    def any(self, flag: bool) -> bool:
        """Whether `flag` holds on any rank."""
        shared = torch.tensor([float(flag)])
        dist.all_reduce(shared, op=dist.ReduceOp.MAX)
        return bool(shared.item())

    def total(self, value: float) -> float:
        """Sum over the ranks."""
        shared = torch.tensor([value], dtype=torch.float64)
        dist.all_reduce(shared)
        return shared.item()

    def from_first(self, value: Any) -> Any:
        """Rank 0's `value`, on every rank."""
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    @contextlib.contextmanager
    def first_does(self) -> Iterator[bool]:
        """`with ranks.first_does() as mine: if mine: ...`: work of rank 0 that the others wait for.

        What rank 0 raises of UserError, OSError or RuntimeError (out of memory is one) is raised on
        every rank: none is left waiting.
        """
        failure: UserError | OSError | RuntimeError | None = None
        try:
            yield self.is_first
        except (UserError, OSError, RuntimeError) as error:
            failure = error
        failure = self.from_first(failure)
        if failure is not None:
            raise failure

    def barrier(self) -> None:
        """Wait for every rank."""
        dist.barrier()


def choose_device(wanted: Literal["auto", "cpu", "cuda"]) -> torch.device:
    """The device that the setting `device` means here; UserError if it is not there."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError("device: cuda was asked for and torch sees no GPU; use --device cpu")
    if wanted == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if local_rank >= torch.cuda.device_count():
        raise UserError(
            f"device: local rank {local_rank} has no GPU of its own, there are "
            f"{torch.cuda.device_count()}; lower torchrun's --nproc-per-node, or use --device cpu"
        )
    return torch.device("cuda", local_rank)


@contextlib.contextmanager
def start(wanted_device: Literal["auto", "cpu", "cuda"], timeout_s: float) -> Iterator[Ranks]:
    """Join the process group for as long as the `with` block runs."""
    device = choose_device(wanted_device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    rank, world_size = _place()
    timeout = timedelta(seconds=timeout_s)
    dist.init_process_group(
        backend, store=_store(timeout), rank=rank, world_size=world_size, timeout=timeout
    )
    _die_with_parent()
    mesh = init_device_mesh(device.type, (world_size,))
    try:
        yield Ranks(rank, world_size, device, mesh)
    except RuntimeError as error:
        if not any(sign in str(error) for sign in PEER_IS_GONE):
            raise
        time.sleep(GONE_RANK_SPEAKS_S)
        raise UserError(
            "another rank has ended in the middle of the run; what it said, or torchrun's closing "
            "report, tells why"
        ) from None
    finally:
        # Anything that still holds a sharded tensor at destruction can abort the process.
        gc.collect()
        dist.destroy_process_group()


def leave(code: int) -> NoReturn:
    """End the process with `code`: exit handlers run and output is flushed, threads are not waited
    for and the interpreter is not taken down.

    torch's caches of sharded operations hold the mesh, so gloo's threads outlive
    `destroy_process_group`; taking the interpreter down under them ended a finished rank with
    SIGABRT now and then ("terminate called without an active exception").
    """
    try:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def _place() -> tuple[int, int]:
    """Rank and number of ranks, as torchrun or a cluster's launcher names them; (0, 1) alone."""
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    if not {"RANK", "WORLD_SIZE"} & os.environ.keys():
        return 0, 1
    missing = [name for name in names if name not in os.environ]
    if missing:
        raise UserError(
            f"environment: {missing[0]} is not set, while other variables of a launcher are; start "
            "with torchrun, or unset RANK and WORLD_SIZE"
        )
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def _store(timeout: timedelta) -> dist.Store:
    """A store of this attempt's own: torchrun keeps one store over restarts, and ranks that find
    the addresses of the attempt before dial the dead (pytorch#135712)."""
    if "RANK" not in os.environ:
        return dist.HashStore()
    store, _, _ = next(dist.rendezvous("env://", timeout=timeout))
    return dist.PrefixStore(f"try{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


def _die_with_parent() -> None:
    """Ask Linux for SIGTERM when torchrun is killed outright; its workers would stay as orphans."""
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
