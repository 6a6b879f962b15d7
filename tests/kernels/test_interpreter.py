"""The Triton half of these tests in separate processes, if this process cannot interpret."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from kernel_oracle import TRITON_RUNS

HERE = Path(__file__).parent
ON_BOTH_BACKENDS = sorted(
    path.name
    for path in HERE.glob("test_*.py")
    if path != Path(__file__) and "(backend, device" in path.read_text()
)


@pytest.mark.skipif(TRITON_RUNS, reason="the Triton tests run in this process")
@pytest.mark.parametrize("file", ON_BOTH_BACKENDS)
def test_triton_backend_in_its_own_process(file):
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    for name in ("PYTEST_XDIST_WORKER", "PYTEST_CURRENT_TEST"):
        environment.pop(name, None)
    options = ["-q", "-k", "triton or every_backend", "-p", "no:xdist", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", str(HERE / file), *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout.splitlines()[-1]
