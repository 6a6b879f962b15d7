"""Every kernel compiles for sm_80, sm_90 and sm_100 without spills and with 16-byte accesses."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_compile_gates(tmp_path):
    """In a process of its own, where triton compiles instead of interpreting."""
    path = tmp_path / "gates.json"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "bench.kernels.compile_gates",
        "--json",
        str(path),
    ]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    table = json.loads(path.read_text())

    assert {row["arch"] for row in table} == {80, 90, 100}
    kernels = {row["kernel"] for row in table}
    assert kernels >= {"_forward_kernel", "_backward_kernel", "_sample_kernel"}
    assert [row["case"] for row in table if row["spill_bytes"]] == []
    assert [row["case"] for row in table if "128" not in row["load_bits"]] == []
    # The kernels of a decoding step overlap from sm_90 on, and only read what is complete.
    overlapping = {row["kernel"] for row in table if row["overlaps"]}
    assert overlapping >= {"_linear_kernel", "_add_rms_norm_kernel"}
    assert all(
        row["overlaps"] == (row["arch"] >= 90) for row in table if row["kernel"] in overlapping
    )
    assert [row["case"] for row in table if row["overlaps"] and not row["waits_first"]] == []
    backward = [row for row in table if row["kernel"] == "_backward_kernel"]
    assert [row["case"] for row in backward if set(row["store_bits"]) != {"128"}] == []
    # At 80 registers three programs of 256 threads share a multiprocessor, each with four 16-byte
    # loads a thread in flight: what full bandwidth takes.
    forward = [r for r in table if r["kernel"] == "_forward_kernel" and "bfloat16" in r["case"]]
    assert [row["case"] for row in forward if row["registers"] > 80] == []
