"""Compile every kernel as its launcher would launch it, without a GPU, and inspect the result.

    python -m bench.kernels.compile_gates [--json FILE]

For sm_80, sm_90 and sm_100 and for real vocabularies: registers, shared memory, spills, and the
widths of global loads and stores. The launchers themselves run, on tensors without storage; only
the kernel launch is replaced by a compilation. The exit status is 1 if a kernel spills or has no
16-byte load.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import triton
from iris_kernels.add_rms_norm import add_rms_norm_triton
from iris_kernels.decode_attention import decode_triton
from iris_kernels.guided_sample import sample_triton
from iris_kernels.quantize_rows import quantize_rows_triton
from iris_kernels.rope_append import rope_append_triton
from iris_kernels.silu_mul import silu_mul_triton
from iris_kernels.token_stats import Columns, backward_triton, forward_triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

ARCHITECTURES = (80, 90, 100)
VOCABULARIES = (16384, 102400, 151936)
HEAD_WIDTHS = (64, 128)
WIDTHS = ((2048, 5632), (4096, 11008))  # hidden and intermediate, of Janus-Pro-1B and 7B
FP8 = torch.float8_e4m3fn
FIRST_FP8_ARCHITECTURE = 89  # older GPUs have no e4m3
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


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
    """Kernel launches in the `with` block compile for `arch` instead; yields what they compile."""
    compiled: list = []
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        compiled.append(run(self, *args, grid=grid, warmup=True, **kwargs))

    driver.set_active(_CompileOnlyDriver(arch))
    JITFunction.run = compile_only
    try:
        yield compiled
    finally:
        JITFunction.run = run


def inspect(compiled, case: str, arch: int) -> Gate:
    """Registers, shared memory and spills from the cubin, load and store widths from its SASS."""
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
        load_bits=_widths(sass, "LDG"),
        store_bits=_widths(sass, "STG"),
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


# --- Cases: each calls a launcher as the op does --------------------------------------------------


def _rows(count: int, rows: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return [torch.empty(rows, dtype=dtype, device="meta") for _ in range(count)]


def _logits(rows: int, vocab_size: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(rows, vocab_size, dtype=dtype, device="meta")


def _token_stats_forward(vocab_size: int, dtype: torch.dtype) -> None:
    (ids,) = _rows(1, 4608, torch.int64)
    forward_triton(
        _logits(4608, vocab_size, dtype), ids, None, 1.0, Columns(vocab_size), _rows(6, 4608)
    )


def _token_stats_backward(vocab_size: int, dtype: torch.dtype) -> None:
    (ids,) = _rows(1, 4608, torch.int64)
    logits, grad = (_logits(4608, vocab_size, dtype) for _ in range(2))
    backward_triton(
        logits, grad, ids, None, _rows(3, 4608), _rows(4, 4608), 1.0, Columns(vocab_size)
    )


def _guided_sample(vocab_size: int, dtype: torch.dtype) -> None:
    pair = (_logits(64, vocab_size, dtype) for _ in range(2))
    (uniform,) = _rows(1, 64)
    sample_triton(*pair, uniform, None, 5.0, 1.0, False, vocab_size)


def _linear_tile(vocab_size: int, dtype: torch.dtype) -> None:
    """A tile in the middle of a row, with a bias; fp32 logits, gradients in `dtype`."""
    (ids,) = _rows(1, 2048, torch.int64)
    (bias,) = _rows(1, 2048, dtype)
    state = torch.empty(5, 2048, device="meta")
    tile = Columns(2048, 2048, vocab_size, bias, state, is_first=False, is_last=False)
    logits, grad = _logits(2048, 2048, torch.float32), _logits(2048, 2048, dtype)
    forward_triton(logits, ids, None, 1.0, tile, _rows(6, 2048))
    backward_triton(logits, grad, ids, None, _rows(3, 2048), _rows(4, 2048), 1.0, tile)


CASES: dict[str, Callable[[int, torch.dtype], None]] = {
    "token_stats forward": _token_stats_forward,
    "token_stats backward": _token_stats_backward,
    "linear_token_stats tile": _linear_tile,
    "guided_sample": _guided_sample,
}


def _cache(rows: int, length: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(rows, 16, length, width, dtype=dtype, device="meta")


def _decode(width: int, dtype: torch.dtype, cache_dtype: torch.dtype) -> None:
    """64 sequences of 16 heads, with a shared prefix."""
    query = torch.empty(64, 16, width, dtype=dtype, device="meta")
    lengths, index = _rows(2, 64, torch.int32)
    own, shared = (
        [_cache(rows, n, width, cache_dtype) for _ in range(2)] for rows, n in ((64, 576), (9, 64))
    )
    decode_triton(query, *own, lengths, (*shared, lengths, index), width**-0.5)


def _append(width: int, dtype: torch.dtype, cache_dtype: torch.dtype) -> None:
    """Query, key and value of 64 sequences from one projection."""
    fused = torch.empty(64, 48, width, dtype=dtype, device="meta")
    tables = [torch.empty(64, width // 2, device="meta") for _ in range(2)]
    caches = [_cache(64, 576, width, cache_dtype) for _ in range(2)]
    rope_append_triton(*fused.split(16, dim=1), *tables, *caches, *_rows(1, 64, torch.int64))


def _between_matmuls(hidden: int, inner: int, dtype: torch.dtype) -> None:
    stream, delta = (torch.empty(64, hidden, dtype=dtype, device="meta") for _ in range(2))
    add_rms_norm_triton(stream, delta, *_rows(1, hidden, dtype), 1e-6)
    silu_mul_triton(torch.empty(64, 2 * inner, dtype=dtype, device="meta"))


def _quantize(hidden: int, inner: int) -> None:
    for width in (hidden, inner):
        quantize_rows_triton(torch.empty(64, width, dtype=torch.bfloat16, device="meta"))


def _cases(vocabularies) -> Iterator[tuple[str, Callable[[], None]]]:
    for dtype in (torch.bfloat16, torch.float32):
        type_name = str(dtype).removeprefix("torch.")
        for name, launch in CASES.items():
            for V in vocabularies:
                yield f"{name} V={V} {type_name}", partial(launch, V, dtype)
        for width in HEAD_WIDTHS:
            yield f"decode_attention Dh={width} {type_name}", partial(_decode, width, dtype, dtype)
            yield f"rope_append Dh={width} {type_name}", partial(_append, width, dtype, dtype)
        for sizes in WIDTHS:
            launch = partial(_between_matmuls, *sizes, dtype)
            yield f"add_rms_norm, silu_mul D={sizes[0]} {type_name}", launch


def _fp8_cases() -> Iterator[tuple[str, Callable[[], None]]]:
    dtype = torch.bfloat16
    for width in HEAD_WIDTHS:
        yield f"decode_attention Dh={width} fp8 cache", partial(_decode, width, dtype, FP8)
        yield f"rope_append Dh={width} fp8 cache", partial(_append, width, dtype, FP8)
    for sizes in WIDTHS:
        yield f"quantize_rows D={sizes[0]} and {sizes[1]}", partial(_quantize, *sizes)


def gates(architectures=ARCHITECTURES, vocabularies=VOCABULARIES) -> Iterator[Gate]:
    """Compile every case for every architecture."""
    for arch in architectures:
        fp8 = _fp8_cases() if arch >= FIRST_FP8_ARCHITECTURE else ()
        for case, launch in (*_cases(vocabularies), *fp8):
            with captured(arch) as compiled:
                launch()
            for kernel in compiled:
                yield inspect(kernel, case, arch)


def failures(gate: Gate) -> list[str]:
    """What is wrong with this kernel, as text."""
    wrong = []
    if gate.spill_bytes:
        wrong.append(f"{gate.spill_bytes} bytes of local memory")
    if 128 not in gate.load_bits:
        wrong.append("no 16-byte load")
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="also write the table to this file")
    parser.add_argument("--arch", type=int, nargs="+", default=ARCHITECTURES)
    parser.add_argument("--vocabulary", type=int, nargs="+", default=VOCABULARIES)
    arguments = parser.parse_args()
    print("| case | sm | registers | shared B | spill B | loads | stores | |")
    print("|---|---|---|---|---|---|---|---|")
    table, failed = [], False
    for gate in gates(arguments.arch, arguments.vocabulary):
        table.append(asdict(gate))
        wrong = failures(gate)
        failed |= bool(wrong)
        print(
            f"| {gate.case} | {gate.arch} | {gate.registers} | {gate.shared_bytes} "
            f"| {gate.spill_bytes} "
            f"| {_format_widths(gate.load_bits)} | {_format_widths(gate.store_bits)} "
            f"| {'; '.join(wrong) or 'ok'} |",
            flush=True,
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(table, indent=1) + "\n")
    return int(failed)


def _format_widths(widths: dict[int, int]) -> str:
    return " ".join(f"{count}x{bits}" for bits, count in widths.items())


if __name__ == "__main__":
    sys.exit(main())
