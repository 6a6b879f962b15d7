"""Every kernel compiles for sm_80, sm_90 and sm_100 without spills and with 16-byte accesses, and
token_stats issues its instructions in 0.8 of the time that memory takes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.harness import sass

ROOT = Path(__file__).parents[2]


# From sm_90 on, these kernels of a decoding step start before the previous one ends.
OVERLAPPING = {
    "_add_rms_norm_kernel", "_decode_kernel", "_linear_kernel", "_merge_kernel",
    "_quantize_rows_kernel", "_silu_mul_kernel", "_uneven_linear_kernel",
}  # fmt: skip


def run_python(*arguments: str) -> str:
    """In a process of its own, where triton compiles instead of interpreting; what it prints."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def run_gates(path: Path, *arguments: str) -> list[dict]:
    run_python("-m", "bench.kernels.compile_gates", "--json", str(path), *arguments)
    return json.loads(path.read_text())["gates"]


# Two tests, which take about as long, so that two workers share the compilation.
@pytest.mark.parametrize(
    ("architectures", "vocabularies"), [((90,), (16384, 102400, 151936)), ((80, 100), (16384,))]
)
def test_compile_gates(architectures, vocabularies, tmp_path):
    words = ["--arch", *map(str, architectures), "--vocabulary", *map(str, vocabularies)]
    table = run_gates(tmp_path / "gates.json", *words)

    assert {row["arch"] for row in table} == set(architectures)
    kernels = {row["kernel"] for row in table}
    assert kernels >= {"_forward_kernel", "_backward_kernel", "_sample_kernel"}
    assert [row["case"] for row in table if row["spill_bytes"]] == []
    assert [row["case"] for row in table if "128" not in row["load_bits"]] == []
    overlapping = {row["kernel"] for row in table if row["overlaps"]}
    assert overlapping == OVERLAPPING
    assert all(
        row["overlaps"] == (row["arch"] >= 90) for row in table if row["kernel"] in overlapping
    )
    assert [row["case"] for row in table if row["overlaps"] and not row["waits_first"]] == []
    backward = [row for row in table if row["kernel"] == "_backward_kernel"]
    assert [row["case"] for row in backward if set(row["store_bits"]) != {"128"}] == []
    # At 80 registers 24 warps share a multiprocessor, each with four 16-byte loads a thread in
    # flight: what full bandwidth takes.
    forward = [r for r in table if r["kernel"] == "_forward_kernel" and "bfloat16" in r["case"]]
    assert [row["case"] for row in forward if row["registers"] > 80] == []
    if 90 in architectures:
        check_issue_times(table)


def check_issue_times(table: list[dict]) -> None:
    """Of sm_90, the only modelled architecture."""
    gated = [row for row in table if row["model"] and row["model"]["limit"]]
    assert {row["model"]["limit"] for row in gated} == {0.8}
    for kernel in ("forward", "backward"):
        for V in (16384, 102400):
            for dtype in ("bfloat16", "float32"):
                assert f"token_stats {kernel} V={V} {dtype}" in {row["case"] for row in gated}
    assert [
        row["case"] for row in gated if row["model"]["issue_us"] > 0.8 * row["model"]["memory_us"]
    ] == []


LISTING = """
.text.kernel:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/              @!P0 BRA `(.L_x_1) ;
.L_x_0:
        /*0020*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
.L_x_2:
        /*0030*/                   FADD R4, R4, R5 ;
        /*0040*/              @!P1 BRA `(.L_x_2) ;
        /*0050*/              @!P2 BRA `(.L_x_0) ;
.L_x_1:
        /*0060*/                   CALL.REL.NOINC `($__internal_0_$slow) ;
        /*0070*/                   EXIT ;
.L_x_3:
        /*0080*/                   BRA `(.L_x_3);
        /*0090*/                   NOP;
$__internal_0_$slow:
.L_x_4:
        /*00a0*/                   FADD R4, R4, R5 ;
        /*00b0*/              @!P1 BRA `(.L_x_4) ;
"""


def test_sizes_of_one():
    """Triton compiles an argument of 1 as a constant, which the interpreter does not."""
    script = """
import torch
from bench.harness.gates import meta
from bench.kernels.compile_gates import captured
from iris_kernels.decode_linear import linear_triton
with captured(90) as compiled:
    for rows, outputs, partial in ((1, 1, False), (3, 1, True)):
        tensors = (meta(n, 64, dtype=torch.bfloat16) for n in (rows, outputs))
        linear_triton(*tensors, None, False, partial)
print(len(compiled))
"""
    assert run_python("-c", script) == "2\n"


def test_instruction_count():
    """Nested loops, a skipped branch, the padding after the last instruction, a subroutine."""
    found = sass.count(LISTING)
    assert found == sass.Instructions(outside=4, loops=(2, 2))
    assert found.executed((3, 5)) == 4 + 3 * 2 + 5 * 2
    with pytest.raises(ValueError, match="2 loops but the gate case gives trips for 1"):
        found.executed((3,))


def test_times():
    """528 schedulers at 1.98 GHz; 4.3 TB/s."""
    assert sass.issue_seconds(528 * 1.98e9) == 1
    assert sass.memory_seconds(4_300_000) == pytest.approx(1e-6)
