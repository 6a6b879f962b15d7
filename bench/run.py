"""Run the benchmarks and write what they measured as JSON.

    python -m bench.run [--suite kernels] [--only token_stats ...] [--out FILE.json] [--append]

On a GPU where there is one, else on the CPU with smaller shapes. Every benchmark file runs in a
process of its own; rows are on disk as soon as they are measured, so a run that is cut short
leaves what it had; `--append` then adds to it, on the same device with the same code. What fails is
a row, or a peer, with "error"; the exit status is then 1. Beside the rows are "profiles" of whole
calls, by `SUITE/what`, unless `--profile false`.
"""

import argparse
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
from typing import Any

from bench._rows import Measured, make_row

FOLDER = Path(__file__).parent
BENCHMARK = re.compile(r"^def (cases|rows)\(", re.MULTILINE)
PROFILES = re.compile(r"^def profiles\(", re.MULTILINE)
SUITE = re.compile(r"^SUITE = (.+)$", re.MULTILINE)


def benchmarks(folder: Path = FOLDER) -> dict[str, str]:
    """File stem -> suite of every benchmark; the machine's ceilings first. Imports nothing."""
    found = {}
    for path in sorted(folder.glob("[!_]*.py")):
        text = path.read_text(encoding="utf-8")
        if BENCHMARK.search(text) and (suite := SUITE.search(text)):
            found[path.stem] = suite[1].strip("\"'")
    found.pop("ceilings", None)
    return {"ceilings": "ceilings", **found}


def has_profiles(stem: str) -> bool:
    return bool(PROFILES.search((FOLDER / f"{stem}.py").read_text(encoding="utf-8")))


def head(commit: str | None) -> dict[str, Any]:
    """Where and with what this run was made."""
    import torch

    from bench import _peers
    from iris_fast.run.provenance import cpu_name

    gpu = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if gpu else cpu_name(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "driver": _driver() if gpu else None,
        "commit": commit or _commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "peers": _peers.versions(),
        "absent": _peers.absent(),
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


def _commit() -> str | None:
    """The commit, with "-dirty" where tracked files differ from it; None outside a repository or
    without git."""
    if not shutil.which("git"):
        return None
    git = [
        "git",
        "-C",
        str(FOLDER),
        "describe",
        "--always",
        "--dirty",
        "--abbrev=12",
        "--exclude=*",
    ]
    done = subprocess.run(git, capture_output=True, text=True)
    return done.stdout.strip() or None


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def append(path: Path, row: dict[str, Any]) -> None:
    """Add a row to the file, in one step that cannot be seen half done."""
    document = read(path)
    document["rows"].append(row)
    write(path, document)


def add_profiles(path: Path, profiles: dict[str, Any]) -> None:
    document = read(path)
    document.setdefault("profiles", {}).update(profiles)
    write(path, document)


def write(path: Path, document: dict[str, Any]) -> None:
    text = json.dumps(document, indent=1, allow_nan=False)
    aside = path.with_suffix(".partial")
    aside.write_text(text + "\n", encoding="utf-8")
    aside.replace(path)


def check_same(before: dict[str, Any], now: dict[str, Any], out: Path) -> None:
    """Rows of one file are of one machine and one code: exits with a message where they are not."""
    for key in ("device", "torch", "triton", "driver", "commit"):
        if before[key] != now[key]:
            sys.exit(f"{out} was written with {key} {before[key]}, not {now[key]}: no --append")


def failed_row(suite: str, case: str, error: str) -> dict[str, Any]:
    return make_row(suite, case, {}, None, None, None, Measured(error=error))


def run_one(stem: str, out: Path, profiling: bool) -> int:
    """All rows, or all profiles, of one benchmark file, added to `out`. Runs in a process of its
    own: what the profiler leaves behind slows no row, and takes none with it where it crashes."""
    import torch

    from bench._measure import CEILINGS, Bench

    # transformers imports torchao, which tells of each of its parts that does not load here.
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    ceilings = [row for row in read(out)["rows"] if row["suite"] == CEILINGS]
    bench = Bench(device, ceilings)
    suite = benchmarks()[stem]
    try:
        if profiling:
            importlib.import_module(f"bench.{stem}").profiles(bench)
        else:
            for row in _rows(stem, suite, bench):
                append(out, row)
                print(one_line(row), flush=True)
    except Exception as error:  # becomes a row: the other benchmarks go on
        traceback.print_exc()
        bench.failures.append(stem)
        append(out, failed_row(suite, stem, f"{type(error).__name__}: {error}"[:2000]))
    add_profiles(out, bench.profiles)
    for failure in bench.failures:
        print(f"FAILED {failure}", file=sys.stderr, flush=True)
    return int(bool(bench.failures))


def _rows(stem: str, suite: str, bench: Any) -> Iterator[dict[str, Any]]:
    module = importlib.import_module(f"bench.{stem}")
    if hasattr(module, "rows"):
        yield from module.rows(bench)
    else:
        for case in module.cases(bench.device):
            yield bench.measure(suite, case)


def one_line(row: dict[str, Any]) -> str:
    """A row for the console."""
    shape = " ".join(f"{k}={v}" for k, v in row["shape"].items())
    line = f"{row['case']:20} {row['metric'] or '':16} {shape:28} {row['dtype'] or '':9}"
    line += f" {_amount(row)}"
    if row["fraction_of_floor"]:
        line += f"  {row['fraction_of_floor']:.0%} of floor {row['floor']}"
    if row["fraction_of_copy"] is not None:
        line += f", {row['fraction_of_copy']:.0%} of copy"
    if row["peak_memory_bytes"] is not None:
        line += f", {row['peak_memory_bytes'] / 2**20:.0f} MiB"
    peers = [f"{name} {_amount(peer)}" for name, peer in row["peers"].items()]
    return line + ("  | " + "; ".join(peers) if peers else "")


def _amount(measured: dict[str, Any]) -> str:
    if "error" in measured:
        return f"ERROR {measured['error'].splitlines()[0][:80]}"
    return f"{measured['value']} {measured['unit']}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    suites = sorted(set(benchmarks().values()) - {"ceilings"})
    parser.add_argument("--suite", choices=suites, help="only this suite")
    parser.add_argument("--only", nargs="+", choices=[*benchmarks()], help="only these files")
    parser.add_argument("--out", type=Path, help="default: bench/results/<device>.json")
    parser.add_argument("--append", action="store_true", help="keep the rows that FILE has")
    parser.add_argument(
        "--profile", choices=("true", "false"), default="true", help="also profile whole calls"
    )
    parser.add_argument("--commit", help="where the run is not in a git repository")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--profiling", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        from iris_fast.distributed import leave  # imports torch: not for what starts the children

        leave(run_one(arguments.child, arguments.out, arguments.profiling))

    document = {"head": head(arguments.commit), "rows": []}
    out = arguments.out or FOLDER / "results" / f"{_file_name(document['head'])}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    if arguments.append and out.exists():
        check_same(read(out)["head"], document["head"], out)
    else:
        write(out, document)
    print(json.dumps(document["head"], indent=1), flush=True)
    (ceilings, suite), *others = benchmarks().items()
    status = _run_in_process(ceilings, suite, out)
    if status:
        return status  # without them there is no floor to compare with
    for stem, suite in others:
        if arguments.suite in (None, suite) and stem in (arguments.only or [stem]):
            status |= _run_in_process(stem, suite, out)
            if arguments.profile == "true" and has_profiles(stem):
                status |= _run_in_process(stem, suite, out, "--profiling")
    print(f"wrote {out}")
    return status


def _run_in_process(stem: str, suite: str, out: Path, *flags: str) -> int:
    """A crash, not only an exception, of one benchmark leaves the others their turn."""
    command = [sys.executable, "-m", "bench.run", "--child", stem, "--out", str(out.absolute())]
    command += flags
    status = subprocess.run(command, cwd=FOLDER.parent).returncode
    if status not in (0, 1):
        append(out, failed_row(suite, stem, f"its process ended with status {status}"))
    return int(status != 0)


def _file_name(head: dict[str, Any]) -> str:
    kind = "gpu" if head["driver"] else "cpu"
    name = re.sub(r"[^a-z0-9]+", "-", head["device"].lower()).strip("-")
    return f"{kind}-{name}-{head['date'][:10]}"


if __name__ == "__main__":
    sys.exit(main())
