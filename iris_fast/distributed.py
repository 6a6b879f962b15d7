"""Processes: the process group, the few collectives that the trainer needs, and how to exit.

The same code runs with one process, with or without torchrun, on gloo (CPU) and NCCL (GPU).
"""

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
# gloo's messages when the rank at the other end of a collective has exited.
PEER_EXITED = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")
PEER_REPORT_WAIT_S = 3.0  # time for that rank to report its error first


@dataclass(frozen=True)
class Ranks:
    """This process's rank and device, and the collectives."""

    rank: int
    world_size: int
    device: torch.device
    mesh: DeviceMesh

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which writes files and prints."""
        return self.rank == 0

    def gather(self, values: Tensor) -> Tensor:
        """Every rank's `values` (on the CPU, of equal shape on all ranks), joined along dim 0."""
        parts = [torch.empty_like(values) for _ in range(self.world_size)]
        dist.all_gather(parts, values.contiguous())
        return torch.cat(parts)

    def own_part(self, gathered: Tensor) -> Tensor:
        """This rank's rows of what `gather` joined."""
        return gathered.view(self.world_size, -1)[self.rank]

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true on any rank."""
        return self.total(float(flag)) > 0

    def total(self, value: float) -> float:
        """Sum over the ranks."""
        shared = torch.tensor([value], dtype=torch.float64)
        dist.all_reduce(shared)
        return shared.item()

    def broadcast(self, value: Any) -> Any:
        """Rank 0's `value`, on every rank."""
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    @contextlib.contextmanager
    def on_first_rank(self) -> Iterator[bool]:
        """Work for rank 0 that the others wait for: `with ranks.on_first_rank() as mine: if mine:`.

        A UserError, OSError or RuntimeError (such as out of memory) of rank 0 is raised on every
        rank, so that none waits forever.
        """
        failure: UserError | OSError | RuntimeError | None = None
        try:
            yield self.is_first
        except (UserError, OSError, RuntimeError) as error:
            failure = error
        failure = self.broadcast(failure)
        if failure is not None:
            raise failure


def choose_device(wanted: Literal["auto", "cpu", "cuda"]) -> torch.device:
    """The device for the setting `device`; UserError if it is not available."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError("device: cuda is not available to torch; use --device cpu")
    if wanted == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if local_rank >= torch.cuda.device_count():
        raise UserError(
            f"device: there is no GPU for local rank {local_rank}, only "
            f"{torch.cuda.device_count()}; lower torchrun's --nproc-per-node, or use --device cpu"
        )
    return torch.device("cuda", local_rank)


@contextlib.contextmanager
def start(wanted_device: Literal["auto", "cpu", "cuda"], timeout_s: float) -> Iterator[Ranks]:
    """The process group, for the duration of the `with` block."""
    device = choose_device(wanted_device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    rank, world_size = _rank_and_world_size()
    timeout = timedelta(seconds=timeout_s)
    dist.init_process_group(
        backend, store=_store(timeout), rank=rank, world_size=world_size, timeout=timeout
    )
    _end_with_parent()
    mesh = init_device_mesh(device.type, (world_size,))
    try:
        yield Ranks(rank, world_size, device, mesh)
    except RuntimeError as error:
        if not any(text in str(error) for text in PEER_EXITED):
            raise
        time.sleep(PEER_REPORT_WAIT_S)
        raise UserError(
            "another rank has ended during the run; see its error or torchrun's closing report"
        ) from None
    finally:
        # Destroying the group while sharded tensors are alive can abort the process.
        gc.collect()
        dist.destroy_process_group()


def leave(code: int) -> NoReturn:
    """Exit with `code`: run exit handlers and flush the output, but do not wait for threads or
    finalize the interpreter.

    torch's caches of sharded operations hold the mesh, so gloo's threads outlive
    `destroy_process_group`; finalizing the interpreter under them occasionally ended a finished
    rank with SIGABRT ("terminate called without an active exception").
    """
    try:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def _rank_and_world_size() -> tuple[int, int]:
    """As set by torchrun or a cluster's launcher; (0, 1) without one."""
    if not {"RANK", "WORLD_SIZE"} & os.environ.keys():
        return 0, 1
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        if name not in os.environ:
            raise UserError(
                f"environment: {name} is not set, while other variables of a launcher are; "
                "start with torchrun, or unset RANK and WORLD_SIZE"
            )
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def _store(timeout: timedelta) -> dist.Store:
    """A store for this attempt only: torchrun keeps one store over restarts, and ranks would find
    the addresses of processes of the previous attempt (pytorch#135712)."""
    if "RANK" not in os.environ:
        return dist.HashStore()
    store, _, _ = next(dist.rendezvous("env://", timeout=timeout))
    return dist.PrefixStore(f"try{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


def _end_with_parent() -> None:
    """Ask Linux for SIGTERM when torchrun is killed; its workers would keep running otherwise."""
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
