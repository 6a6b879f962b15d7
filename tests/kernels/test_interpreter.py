"""The Triton half of these tests, where this process cannot interpret."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import TRITON_RUNS

HERE = Path(__file__).parent


@pytest.mark.skipif(TRITON_RUNS, reason="the Triton tests run in this process")
def test_triton_backend_in_its_own_process():
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    for name in ("PYTEST_XDIST_WORKER", "PYTEST_CURRENT_TEST"):
        environment.pop(name, None)
    command = [sys.executable, "-m", "pytest", str(HERE), "-q", "-k", "triton", "-p", "no:xdist"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]
