"""Benchmarks: each op against the machine's limits and against its peers.

    python -m bench.run [--suite kernels] [--only token_stats ...] [--out FILE.json] [--append]
                        [--profile false]
    pytest bench --benchmark-only            the same cases through pytest-benchmark
    python -m bench.trainer.scaling          one step on several ranks; modelled for 8 and 64 GPUs
    python -m bench.trainer.step_model       kernels and modelled time of a decoding step
    python -m bench.kernels.compile_gates    registers, spills, instructions, without a GPU
    python -m bench.report                   RESULTS.md, docs/benchmarks.md and plots from results/

A benchmark is a file in `kernels/` or `trainer/` with `SUITE = "name"` and one of

    def cases(device) -> Iterator[Case]      the harness checks, times and weighs each case
    def rows(bench) -> Iterator[dict]        finished rows, for a file that measures by itself;
                                             `bench` is a `bench.harness.measure.Bench`

and optionally, to profile whole calls,

    def profiles(bench)                      calls `bench.profile("SUITE/what", call)` for each

and, for an op with a Triton kernel, what `kernels/compile_gates.py` compiles:

    def gate_cases(vocabularies) -> Iterator[GateCase]

`run.py` finds these files by itself. `harness/` holds what they share.
"""

import importlib.util
import sys
from pathlib import Path

if importlib.util.find_spec("iris_kernels") is None:  # run from a checkout that is not installed
    sys.path.insert(0, str(Path(__file__).parent.parent / "kernels"))
