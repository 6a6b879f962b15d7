"""Benchmarks: each op against the floor of what the machine can do, and against its peers.

    python -m bench.run [--suite kernels] [--only token_stats ...] [--out FILE.json] [--append]
                        [--profile false]
    pytest bench --benchmark-only            the same cases through pytest-benchmark
    python -m bench.scaling                  a step on several ranks; modelled: on 8 and 64 GPUs
    python -m bench.report                   RESULTS.md, the README's table and plots, from results/

A benchmark is a file here with `SUITE = "name"` and one of

    def cases(device) -> Iterator[Case]      what to run; _measure.py checks, times and weighs it
    def rows(bench) -> Iterator[dict]        finished rows, where the file measures by itself;
                                             `bench` is the `Bench` of _measure.py

and, if whole calls of it are worth looking into,

    def profiles(bench)                      `bench.profile("SUITE/what", call)` for each

`run.py` finds it by itself. Files with a leading underscore are the machinery.
"""

import importlib.util
import sys
from pathlib import Path

if importlib.util.find_spec("iris_kernels") is None:  # run from a copy that is not installed
    sys.path.insert(0, str(Path(__file__).parent.parent / "kernels"))
