"""The machine's ceilings: bandwidth of a large copy, rate of a large matmul.

All floors of the same run are computed from these. The data are random, since a matmul of zeros is
faster.
"""

from collections.abc import Iterator

import torch

from bench.harness.measure import Bench
from bench.harness.rows import Measured, Row, make_row

SUITE = "ceilings"


def rows(bench: Bench) -> Iterator[Row]:
    gpu = bench.device.type == "cuda"
    yield _copy(bench, 4 << 30 if gpu else 256 << 20)
    for dtype in (torch.bfloat16, torch.float32):
        yield _matmul(bench, dtype, 8192 if gpu else 1024)


def _copy(bench: Bench, size: int) -> Row:
    source = torch.randn(size // 4, device=bench.device)
    target = torch.empty_like(source)
    seconds = _time(bench, lambda: target.copy_(source))
    return _row(
        "copy", {"bytes": 2 * size}, torch.float32, "bandwidth", 2e-9 * size / seconds, "GB/s"
    )


def _matmul(bench: Bench, dtype: torch.dtype, n: int) -> Row:
    a, b = (torch.randn(n, n, device=bench.device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    seconds = _time(bench, lambda: torch.mm(a, b, out=out))
    rate = 2e-12 * n**3 / seconds
    return _row("matmul", {"M": n, "N": n, "K": n}, dtype, "rate", rate, "TFLOP/s")


def _time(bench: Bench, call) -> float:
    if bench.device.type == "cuda":
        return bench.clock.time([call], in_graph=False)
    return bench.clock.time_together({"": [call]})[""]


def _row(case: str, shape: dict, dtype: torch.dtype, metric: str, value: float, unit: str) -> Row:
    return make_row(SUITE, case, shape, dtype, metric, unit, Measured(value))
