"""Rows shared out once among threads, each of which runs torch's operations alone.

torch splits every operation over its threads and waits for the last of them. A path of many small
operations waits as often; where other processes take a core for some milliseconds at a time, each
of these waits can take as long. One thread per share waits once per call, but the threads share
Python's lock, which costs more than the waits of an idle machine. So rows are shared out where more
threads want to run than there are cores.
"""

import functools
import itertools
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Result = TypeVar("Result")
SHARED_ELEMENTS = 1 << 19  # fewer are faster in the calling thread than handed to others
_lock = threading.Lock()
_pool: ThreadPoolExecutor | None = None


def share_rows(run: Callable[[slice], Result], rows: int, columns: int) -> list[Result]:
    """The results of `run(part)` for consecutive parts of `rows`, in their order.

    On a busy machine one part per torch thread, else one part. `run` must not need gradients.
    """
    threads = min(torch.get_num_threads(), rows)
    if threads < 2 or rows * columns < SHARED_ELEMENTS or not is_busy() or not _openmp():
        return [run(slice(0, rows))]
    bounds = [rows * i // threads for i in range(threads + 1)]
    parts = [slice(*pair) for pair in itertools.pairwise(bounds)]
    alone = functools.partial(_run, run, torch.is_inference_mode_enabled())
    return list(_threads(torch.get_num_threads()).map(alone, parts))


def is_busy() -> bool:
    """Whether more threads wanted to run in the last minute than there are cores."""
    return hasattr(os, "getloadavg") and os.getloadavg()[0] > (os.cpu_count() or 1)


def _run(run: Callable[[slice], Result], inference: bool, part: slice) -> Result:
    # Both modes belong to the calling thread.
    with torch.inference_mode() if inference else torch.no_grad():
        return run(part)


@functools.cache
def _openmp() -> bool:
    """Whether the number of torch's threads can be set per thread."""
    return torch.backends.openmp.is_available()


def _threads(count: int) -> ThreadPoolExecutor:
    """A pool of `count` threads in which torch's operations run alone; kept for later calls."""
    global _pool
    with _lock:
        if _pool is None or _pool._max_workers != count:
            started = threading.Barrier(count + 1)

            def start() -> None:
                torch.get_num_threads()  # a thread's first call takes the number of all others
                torch.set_num_threads(1)  # of this thread, and of threads that start from now on
                started.wait()

            _pool = ThreadPoolExecutor(count, "iris_kernels")
            for _ in range(count):
                _pool.submit(start)
            started.wait()
            torch.set_num_threads(count)  # again of threads that start from now on
        return _pool


def _forget_pool() -> None:
    global _pool, _lock
    _pool, _lock = None, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_pool)  # threads do not survive a fork
