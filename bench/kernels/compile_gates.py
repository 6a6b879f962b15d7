"""Compile every kernel as its launcher would launch it, without a GPU, and inspect the result.

    python -m bench.kernels.compile_gates [--json FILE]

For sm_80, sm_90 and sm_100 and for real vocabularies: registers, shared memory, spills, and the
widths of global loads and stores. For sm_90 also the instructions per element and how long issuing
them takes, next to the memory time of the same launch: `bench.harness.sass` has the formula and its
constants, which are those of an H200. Each op's benchmark gives the cases (`gate_cases`). The
launchers themselves run, on tensors without storage; only the kernel launch is replaced by a
compilation.

The exit status is 1 if a kernel spills, has no 16-byte load, may start before the previous kernel
ends and accesses memory without waiting for it, or takes longer to issue than the share of its
memory time that its case allows: 0.8 for token_stats and for the ops of a training pass.
"""

import argparse
import importlib
import json
import math
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from bench import kernels
from bench.harness.gates import GateCase, Work
from bench.harness.sass import (
    THREADS_PER_WARP,
    Instructions,
    count,
    issue_seconds,
    memory_seconds,
)
from iris_fast.run.provenance import commit

ARCHITECTURES = (80, 90, 100)
VOCABULARIES = (16384, 102400, 151936)
MODELLED_ARCHITECTURE = 90
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Model:
    """Instructions of a launch and the times that `bench.harness.sass` derives."""

    in_loops: float  # per element
    outside_loops: int  # per warp
    per_element: float  # both, over the elements of the launch
    issue_us: float
    memory_us: float
    limit: float | None  # of issue_us / memory_us

    @property
    def ratio(self) -> float:
        return self.issue_us / self.memory_us


@dataclass(frozen=True)
class Gate:
    """The result of compiling one kernel for one architecture."""

    kernel: str
    case: str
    arch: int
    registers: int
    shared_bytes: int
    spill_bytes: int
    load_bits: dict[int, int]  # width in bits -> number of global load instructions
    store_bits: dict[int, int]
    overlaps: bool  # with the end of the previous kernel: programmatic dependent launch
    waits_first: bool  # for the previous kernel, before any load or store
    model: Model | None


class _CompileOnlyDriver:
    """The part of a driver that JITFunction.run needs before the launch.

    The device index is the architecture, so that each architecture compiles anew.
    """

    def __init__(self, arch: int):
        self.arch = arch

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)


@contextmanager
def captured(arch: int) -> Iterator[list]:
    """Kernel launches in the `with` block compile for `arch` instead; yields what they compile,
    each with the number of programs."""
    compiled: list = []
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        compiled.append((run(self, *args, grid=grid, warmup=True, **kwargs), math.prod(grid)))

    driver.set_active(_CompileOnlyDriver(arch))
    JITFunction.run = compile_only
    try:
        yield compiled
    finally:
        JITFunction.run = run


def inspect(compiled, programs: int, work: Work | None, case: str, arch: int) -> Gate:
    """Registers, shared memory and spills from the cubin, the rest from its SASS."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _run("cuobjdump", "--dump-resource-usage", file.name)
        sass = _run("nvdisasm", "-c", file.name)
    registers = int(re.search(r"REG:(\d+)", usage)[1])
    stack = int(re.search(r"STACK:(\d+)", usage)[1])
    local = int(re.search(r"LOCAL:(\d+)", usage)[1])
    return Gate(
        kernel=compiled.metadata.name,
        case=case,
        arch=arch,
        registers=registers,
        shared_bytes=compiled.metadata.shared,
        spill_bytes=stack + local,
        load_bits=_widths(sass, "LDG(?:STS)?"),  # to registers or to shared memory
        store_bits=_widths(sass, "STG"),
        overlaps=bool(compiled.metadata.launch_pdl),
        waits_first=_waits_first(sass),
        model=model(count(sass), programs * compiled.metadata.num_warps, work)
        if work and arch == MODELLED_ARCHITECTURE
        else None,
    )


def model(instructions: Instructions, warps: int, work: Work) -> Model:
    """The model of a launch of `warps` warps in all."""
    executed = instructions.executed(work.trips)
    per_element = THREADS_PER_WARP * warps / work.elements
    return Model(
        in_loops=(executed - instructions.outside) * per_element,
        outside_loops=instructions.outside,
        per_element=executed * per_element,
        issue_us=issue_seconds(executed * warps) * 1e6,
        memory_us=memory_seconds(work.bytes) * 1e6,
        limit=work.issue_limit,
    )


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run(
        [TOOLS / tool, *arguments], check=True, capture_output=True, text=True
    ).stdout


def _widths(sass: str, instruction: str) -> dict[int, int]:
    widths: Counter[int] = Counter()
    for suffix in re.findall(rf"\b{instruction}\.E((?:\.\w+)*)", sass):
        found = re.search(r"\.(?:[US])?(8|16|64|128|256)\b", suffix)
        widths[int(found[1]) if found else 32] += 1
    return dict(sorted(widths.items()))


def _waits_first(sass: str) -> bool:
    """Whether griddepcontrol.wait, ACQBULK in SASS, comes before all loads and stores."""
    found = re.search(r"\b(ACQBULK|LDG(?:STS)?|STG|LD|ST|ATOMG?|REDG?)\b", sass)
    return found is not None and found[1] == "ACQBULK"


def cases(vocabularies: Sequence[int]) -> Iterator[GateCase]:
    """The cases of every op: `gate_cases(vocabularies)` of its benchmark."""
    for found in pkgutil.iter_modules(kernels.__path__):
        module = importlib.import_module(f"bench.kernels.{found.name}")
        if hasattr(module, "gate_cases"):
            yield from module.gate_cases(vocabularies)


def gates(architectures=ARCHITECTURES, vocabularies=VOCABULARIES) -> Iterator[Gate]:
    """Compile every case for every architecture."""
    for arch in architectures:
        for case in cases(vocabularies):
            if arch < case.min_architecture:
                continue
            with captured(arch) as compiled:
                case.launch()
            work = case.work or [None] * len(compiled)
            for (kernel, programs), one in zip(compiled, work, strict=True):
                yield inspect(kernel, programs, one, case.name, arch)


def failures(gate: Gate) -> list[str]:
    """What is wrong with this kernel, as text."""
    wrong = []
    if gate.spill_bytes:
        wrong.append(f"{gate.spill_bytes} bytes of local memory")
    if 128 not in gate.load_bits:
        wrong.append("no 16-byte load")
    if gate.overlaps and not gate.waits_first:
        wrong.append("accesses memory before it waits for the previous kernel")
    if gate.model and gate.model.limit and gate.model.ratio > gate.model.limit:
        wrong.append(f"issue time is {gate.model.ratio:.2f} of the memory time")
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="also write the table to this file")
    parser.add_argument("--arch", type=int, nargs="+", default=ARCHITECTURES)
    parser.add_argument("--vocabulary", type=int, nargs="+", default=VOCABULARIES)
    arguments = parser.parse_args()
    print(HEADER)
    table, failed = [], False
    for gate in gates(arguments.arch, arguments.vocabulary):
        table.append(gate)
        failed |= bool(failures(gate))
        print(line(gate), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(document(table), indent=1) + "\n")
    return int(failed)


HEADER = """\
| case | kernel | sm | registers | shared B | spill B | loads | stores | in loops, per element \
| outside, per warp | per element | issue us | memory us | ratio | |
|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|"""


def line(gate: Gate) -> str:
    """A row of the table."""
    modelled = [""] * 6
    if m := gate.model:
        times = (m.issue_us, m.memory_us)
        modelled = [f"{m.in_loops:.1f}", str(m.outside_loops), f"{m.per_element:.1f}"]
        modelled += [f"{t:.1f}" if t >= 10 else f"{t:.2f}" for t in times] + [f"{m.ratio:.2f}"]
    cells = [
        gate.case, gate.kernel, gate.arch, gate.registers, gate.shared_bytes, gate.spill_bytes,
        _format_widths(gate.load_bits), _format_widths(gate.store_bits), *modelled,
        "; ".join(failures(gate)) or "ok",
    ]  # fmt: skip
    return f"| {' | '.join(map(str, cells))} |"


def document(table: Sequence[Gate]) -> dict:
    """What --json writes: versions, and the gates."""
    head = {"torch": torch.__version__, "triton": triton.__version__, "commit": commit()}
    return {"head": head, "gates": [asdict(gate) for gate in table]}


def _format_widths(widths: dict[int, int]) -> str:
    return " ".join(f"{count}x{bits}" for bits, count in widths.items())


if __name__ == "__main__":
    sys.exit(main())
