"""What all tests share: which of them need a GPU or real inputs, and the small models they run."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.logger import _dcp_logger as dcp_logger

from iris_fast import distributed
from iris_fast.distributed import Ranks

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared"


def pytest_configure() -> None:
    torch.set_num_threads(1)  # two workers on two cores: more threads only get in each other's way
    # It notes every tensor of every checkpoint, at length: the report of any failing test.
    dcp_logger.setLevel(logging.WARNING)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        if "shared" in item.keywords and not SHARED.is_dir():
            item.add_marker(pytest.mark.skip(reason="needs ../shared, which is not here"))


@pytest.fixture
def shared() -> Path:
    """The folder of real prompt files and fixture checkpoints."""
    if not SHARED.is_dir():
        pytest.skip("needs ../shared, which is not here")
    return SHARED


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder that is the current one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> Iterator[Ranks]:
    """A process group of one, for tests without sharded models."""
    monkeypatch.setattr(distributed.gc, "collect", lambda: 0)  # for those, and slow
    with distributed.start("cpu", 60.0) as started:
        yield started
