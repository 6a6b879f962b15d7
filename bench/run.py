"""Run the benchmarks and write the measurements as JSON.

    python -m bench.run [--suite kernels] [--only token_stats ...] [--model 1B] [--case TEXT]
                        [--out FILE.json] [--append] [--profile false] [--busy N]

Runs on a GPU if there is one, else on the CPU with smaller shapes. Every benchmark file runs in its
own process, and rows are on disk as soon as they are measured: an interrupted run keeps its rows,
and `--append` adds to them, on the same device with the same code. A failure is recorded as a row,
or as a peer, with "error"; the exit status is then 1. The file also holds "profiles" of whole
calls, by `SUITE/what`, unless `--profile false`.

A run in pieces writes one file per call, which `bench.report` merges: `--suite`, `--only` and
`--case` choose rows, `--model` one of the models of the suites that measure models.
"""

import argparse
import contextlib
import datetime
import importlib
import importlib.metadata
import json
import logging
import platform
import re
import shutil
import subprocess
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from bench.harness.results import add_profiles, append, check_same, read, write
from bench.harness.rows import CEILINGS, Row, failed_row
from bench.harness.tables import console_line

FOLDER = Path(__file__).parent
SUITE = re.compile(r'^SUITE = "(\w+)"$', re.MULTILINE)
MODELS = ("1B", "7B")
PROFILES = re.compile(r"^def profiles\(", re.MULTILINE)


class Benchmark(NamedTuple):
    """One benchmark file."""

    module: str  # such as bench.kernels.token_stats
    suite: str
    has_profiles: bool


def benchmarks(folder: Path = FOLDER) -> dict[str, Benchmark]:
    """File stem -> benchmark, the machine's ceilings first.

    Reads the sources instead of importing them, which would import torch.
    """
    found = {}
    paths = [*folder.glob("kernels/*.py"), *folder.glob("trainer/*.py")]
    for path in [folder / "harness" / "ceilings.py", *sorted(paths, key=lambda path: path.stem)]:
        text = path.read_text(encoding="utf-8")
        if suite := SUITE.search(text):
            module = f"bench.{path.parent.name}.{path.stem}"
            found[path.stem] = Benchmark(module, suite[1], bool(PROFILES.search(text)))
    return found


def head(commit_name: str | None) -> dict[str, Any]:
    """The machine and the software of this run."""
    import torch

    from bench.harness import peers
    from iris_fast.run.provenance import commit, cpu_name

    gpu = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if gpu else cpu_name(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "driver": _driver() if gpu else None,
        "commit": commit_name or commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "peers": peers.versions(),
        "absent": peers.absent(),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _driver() -> str | None:
    if not shutil.which("nvidia-smi"):
        return None
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True).stdout.split("\n")[0] or None


def run_one(
    stem: str, out: Path, profiling: bool, model: str | None = None, case: str | None = None
) -> int:
    """Add all rows, or all profiles, of one benchmark file to `out`; return the exit status.

    Rows and profiles run in separate processes: the state the profiler leaves behind would slow
    down the rows, and a crash of the profiler would lose them.
    """
    import torch

    from bench.harness.measure import Bench

    # transformers imports torchao, which warns about each of its parts that does not load here.
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    ceilings = [row for row in read(out)["rows"] if row["suite"] == CEILINGS]
    bench = Bench(device, ceilings, model, case)
    benchmark = benchmarks()[stem]
    try:
        if profiling:
            importlib.import_module(benchmark.module).profiles(bench)
        else:
            for row in _rows(benchmark, bench):
                append(out, row)
                print(console_line(row), flush=True)
    except Exception as error:  # becomes a row; the other benchmarks still run
        traceback.print_exc()
        bench.failures.append(stem)
        append(out, failed_row(benchmark.suite, stem, f"{type(error).__name__}: {error}"[:2000]))
    add_profiles(out, bench.profiles)
    for failure in bench.failures:
        print(f"FAILED {failure}", file=sys.stderr, flush=True)
    return int(bool(bench.failures))


def _rows(benchmark: Benchmark, bench: Any) -> Iterator[Row]:
    module = importlib.import_module(benchmark.module)
    if hasattr(module, "rows"):
        yield from module.rows(bench)
    else:
        for case in module.cases(bench.device):
            if bench.wants(case.name):
                yield bench.measure(benchmark.suite, case)


def main() -> int:
    found = benchmarks()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    suites = sorted({benchmark.suite for benchmark in found.values()} - {CEILINGS})
    parser.add_argument("--suite", choices=suites, help="run only this suite")
    parser.add_argument("--only", nargs="+", choices=[*found], help="run only these files")
    parser.add_argument("--model", choices=MODELS, help="measure only this model; needs a GPU")
    parser.add_argument("--case", help="measure only cases whose name contains this text")
    parser.add_argument("--out", type=Path, help="default: bench/results/<device>-<date>.json")
    parser.add_argument("--append", action="store_true", help="keep the rows already in --out")
    parser.add_argument(
        "--profile", choices=("true", "false"), default="true", help="also profile whole calls"
    )
    parser.add_argument(
        "--busy", type=int, default=0, metavar="N", help="keep N other processes busy meanwhile"
    )
    parser.add_argument("--commit", help="name of the code, for a copy without git")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--profiling", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        from iris_fast.distributed import leave  # imports torch, which the parent does without

        chosen = arguments.model, arguments.case
        leave(run_one(arguments.child, arguments.out, arguments.profiling, *chosen))

    run = {"head": head(arguments.commit), "rows": []}
    run["head"] |= {"busy": arguments.busy} if arguments.busy else {}
    if arguments.model and not run["head"]["driver"]:
        parser.error(
            "--model: there is no GPU, and on a CPU the model is a small one; leave it out"
        )
    chosen = [arguments.suite, *(arguments.only or []), arguments.model, arguments.case]
    out = arguments.out or FOLDER / "results" / f"{_file_name(run['head'], chosen)}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    if arguments.append and out.exists():
        check_same(read(out)["head"], run["head"], out)
    else:
        write(out, run)
    print(json.dumps(run["head"], indent=1), flush=True)
    with busy_processes(arguments.busy):
        status = measure_all(found, arguments, out)
    print(f"wrote {out}")
    return status


def measure_all(found: dict[str, Benchmark], arguments: argparse.Namespace, out: Path) -> int:
    """Run the chosen benchmarks, the ceilings first; return the exit status."""
    status = _run_in_process(CEILINGS, found.pop(CEILINGS).suite, out)
    if status:
        return status  # there is no floor to compare with
    flags = [f"--{name}={value}" for name, value in (
        ("model", arguments.model), ("case", arguments.case)
    ) if value]  # fmt: skip
    for stem, benchmark in found.items():
        if arguments.suite in (None, benchmark.suite) and stem in (arguments.only or [stem]):
            status |= _run_in_process(stem, benchmark.suite, out, *flags)
            if arguments.profile == "true" and benchmark.has_profiles:
                status |= _run_in_process(stem, benchmark.suite, out, "--profiling", *flags)
    return status


@contextlib.contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """Keep `count` processes busy: on a machine that others use, threads wait for one another."""
    command = [sys.executable, "-c", "while True: pass"]
    others = [subprocess.Popen(command) for _ in range(count)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def _run_in_process(stem: str, suite: str, out: Path, *flags: str) -> int:
    """Run one benchmark in a process of its own, so that its crash does not end the run."""
    command = [sys.executable, "-m", "bench.run", "--child", stem, "--out", str(out.absolute())]
    command += flags
    status = subprocess.run(command, cwd=FOLDER.parent).returncode
    if status not in (0, 1):
        append(out, failed_row(suite, stem, f"its process ended with status {status}"))
    return int(status != 0)


def _file_name(head: dict[str, Any], chosen: list[str | None]) -> str:
    """Device, threads, date and what was chosen, so that pieces do not overwrite each other."""
    kind = ["gpu"] if head["driver"] else ["cpu", f"{head['threads']} threads"]
    kind += [f"{head['busy']} busy"] if head.get("busy") else []
    words = [*kind, head["device"], head["date"][:10], *(word for word in chosen if word)]
    return re.sub(r"[^a-z0-9]+", "-", " ".join(words).lower()).strip("-")


if __name__ == "__main__":
    sys.exit(main())
