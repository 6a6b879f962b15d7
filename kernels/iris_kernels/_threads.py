"""How many threads torch's operations take, on a machine that other processes use as well.

torch splits every operation over its threads and waits for the last of them. A path of many small
operations waits as often; where other processes take a core for some milliseconds at a time, each
of these waits can take as long. Such a path is then faster on one thread.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

# Threads that want to run, per core: one of this process, and waiting threads of OpenMP add to it.
BUSY = 2.0


def is_busy() -> bool:
    """Whether other processes kept the cores busy in the last minute, by the load average."""
    return hasattr(os, "getloadavg") and os.getloadavg()[0] > BUSY * (os.cpu_count() or 1)


@contextmanager
def alone_if_busy(tensor: Tensor) -> Iterator[None]:
    """In the `with` block, operations of this Python thread run on one thread if the `tensor` is on
    a CPU that is busy."""
    threads = torch.get_num_threads()
    if threads == 1 or not tensor.is_cpu or not is_busy():
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
