"""What all tests share: where real inputs lie, how commands are run, which tests need a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared"


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


def run_command(
    *arguments: str, ranks: int = 0, cwd: Path | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """`python -m MODULE …`, or with `ranks` the same under torchrun; output captured."""
    launcher = [sys.executable, "-m"]
    if ranks:
        launcher += ["torch.distributed.run", "--nproc-per-node", str(ranks), "--master-port", "0"]
        launcher += ["-m"]
    return subprocess.run(
        [*launcher, *arguments],
        cwd=cwd,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
