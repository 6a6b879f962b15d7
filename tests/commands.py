"""Run the project's commands as a shell would, without importing torch every time.

`start` forks a process from a server that has imported torch, and runs `python -m MODULE` in it
with its own working directory, environment, signal handlers, standard streams and exit code. With
`ranks` it starts several, in one process group, as torchrun would. `launch` starts a new
interpreter, or torchrun with its workers.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

TIMEOUT_S = 120.0

_context = multiprocessing.get_context("forkserver")
# Not iris_fast.train or .generate themselves: `-m` must import them anew. torch._dynamo is imported
# when a model is created, and takes longer than all else that a refused command does.
_context.set_forkserver_preload(
    [
        "torch._dynamo",
        "iris_fast.cli",
        "iris_fast.grpo.update",
        "iris_fast.preflight.inputs",
        "iris_fast.rewards",
        "iris_fast.run.checkpoint",
        "iris_fast.run.report",
    ]
)


@dataclass(frozen=True)
class Finished:
    """A finished command: exit code and output of rank 0, errors and codes of all ranks."""

    code: int
    out: str
    err: str
    codes: list[int]

    @property
    def error_line(self) -> str:
        """The one line on standard error; AssertionError if there is not exactly one."""
        lines = self.err.splitlines()
        assert len(lines) == 1, self.err
        return lines[0]


class Running:
    """A running command."""

    def __init__(
        self, module: str, arguments: list[str], ranks: int, cwd: Path, environment: dict[str, str]
    ) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._logs = Path(self._folder.name)
        self._store = None
        if ranks > 1:
            # Created here, as by torchrun's agent, with any free port.
            self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            environment = environment | {
                "WORLD_SIZE": str(ranks),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(self._store.port),
                "TORCHELASTIC_USE_AGENT_STORE": "True",
            }
        self.processes = []
        for rank in range(ranks):
            of_rank = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}
            process = _context.Process(
                target=_run,
                args=(module, arguments, str(cwd), environment | of_rank, str(self._logs), rank),
            )
            process.start()
            self.processes.append(process)

    def out(self, rank: int = 0) -> str:
        """Standard output so far."""
        path = self._logs / f"{rank}.out"
        return path.read_text() if path.exists() else ""

    def wait(self, timeout_s: float = TIMEOUT_S) -> Finished:
        """Wait until all ranks have ended; kill them after `timeout_s`."""
        try:
            for process in self.processes:
                process.join(timeout_s)
                assert not process.is_alive(), f"still running after {timeout_s} s: {self.out()}"
        finally:
            for process in self.processes:
                process.kill()
        codes = [process.exitcode for process in self.processes]
        err = "".join((self._logs / f"{rank}.err").read_text() for rank in range(len(codes)))
        done = Finished(codes[0], self.out(), err, codes)
        self._folder.cleanup()
        return done


def start(
    module: str, *arguments: object, cwd: Path, ranks: int = 1, **environment: str
) -> Running:
    """`python -m module arguments` in `cwd`, or `ranks` of it, without waiting for the end."""
    return Running(module, [str(argument) for argument in arguments], ranks, cwd, environment)


def run(module: str, *arguments: object, cwd: Path, ranks: int = 1, **environment: str) -> Finished:
    """Start a command and wait for its end."""
    return start(module, *arguments, cwd=cwd, ranks=ranks, **environment).wait()


def _run(
    module: str,
    arguments: list[str],
    cwd: str,
    environment: dict[str, str],
    logs: str,
    rank: int,
) -> None:
    for descriptor, name in ((1, "out"), (2, "err")):
        handle = os.open(f"{logs}/{rank}.{name}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(handle, descriptor)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    os.environ |= {"OMP_NUM_THREADS": "1"} | environment
    os.chdir(cwd)
    sys.path.insert(0, cwd)
    sys.argv = [module, *arguments]
    gc.freeze()  # see conftest.py
    # A shell starts its background jobs, perhaps the tests, with SIGINT ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    import torch

    torch.set_num_threads(1)
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def launch(
    *arguments: object,
    ranks: int = 0,
    cwd: Path,
    torchrun: tuple[str, ...] = (),
    **environment: str,
) -> subprocess.Popen[str]:
    """`python -m arguments`, or with `ranks` the same under torchrun, in a new interpreter."""
    launcher = [sys.executable, "-m"]
    if ranks:
        launcher += ["torch.distributed.run", "--nproc-per-node", str(ranks), "--standalone"]
        launcher += [*torchrun, "-m"]
    return subprocess.Popen(
        [*launcher, *map(str, arguments)],
        cwd=cwd,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for(holds: Callable[[], object], timeout_s: float = TIMEOUT_S) -> None:
    """Return as soon as `holds()` does; AssertionError after `timeout_s`."""
    until = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < until, f"not reached within {timeout_s} s"
        time.sleep(0.02)
