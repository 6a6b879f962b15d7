"""Render the measurements: bench/RESULTS.md, the table of docs/benchmarks.md, and plots.

    python -m bench.report

Reads bench/results/*.json, as `bench.run` wrote them; files of the same machine and the same code
are pieces of one run. The table of docs/benchmarks.md is the part
between `<!-- benchmark table -->` and `<!-- end of benchmark table -->`; it shows the newest run on
a GPU, or, if there is none, the newest of most threads on a CPU. The plots go to bench/plots/.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from bench.harness.plots import draw
from bench.harness.results import Run, load_all, merge, read
from bench.harness.rows import CEILINGS, Row
from bench.harness.tables import brief_table, gates_table, percent, profile_table, shape, table

ROOT = Path(__file__).parent.parent
GATES = "compile-gates.json"
HOURS = "hours_for_800_steps"
BEGIN, END = "<!-- benchmark table -->", "<!-- end of benchmark table -->"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, default=ROOT, help="root of the repository")
    root = parser.parse_args().root
    results = root / "bench" / "results"
    runs = merge(load_all(results))
    if not runs:
        print(f"no results in {results}: run `python -m bench.run` first")
        return 1
    plots = {stem: draw(stem, run, root / "bench" / "plots") for stem, run in runs.items()}
    text = results_page(runs, plots) + gates_section(results / GATES)
    (root / "bench" / "RESULTS.md").write_text(text, encoding="utf-8")
    page = root / "docs" / "benchmarks.md"
    page.write_text(with_table(page.read_text("utf-8"), summary(runs)), encoding="utf-8")
    print(f"rendered {len(runs)} runs")
    return 0


# --- RESULTS.md -----------------------------------------------------------------------------------


def results_page(runs: dict[str, Run], plots: dict[str, list[str]]) -> str:
    """All runs, all rows."""
    parts = [
        "# Benchmark results",
        "Rendered by `python -m bench.report` from `bench/results/`, where `python -m bench.run` "
        "writes its measurements. Floor: the larger of minimum bytes / copy bandwidth and "
        "operations / matmul rate, both measured in the same run. Memory: what a call needs in "
        "addition to its inputs. Times are medians; on a GPU they are device times, without the "
        "launch.",
    ]
    for stem, run in runs.items():
        parts += [f"## {run['head']['device']}, {run['head']['date'][:10]}", _head_line(run)]
        parts += [f"![{name}](plots/{name})" for name in plots.get(stem, [])]
        for suite in sorted({row["suite"] for row in run["rows"]} - {CEILINGS}):
            rows = [row for row in run["rows"] if row["suite"] == suite]
            parts += [f"### {suite}", table(rows)]
            for name, profile in run.get("profiles", {}).items():
                if name.startswith(f"{suite}/"):
                    parts += _profile(name.removeprefix(f"{suite}/"), profile)
        parts += _errors(run["rows"])
    return "\n\n".join(parts) + "\n"


def gates_section(path: Path) -> str:
    """What `bench.kernels.compile_gates --json` found for sm_90, if it was written."""
    if not path.is_file():
        return ""
    run = read(path)
    versions = "; ".join(f"{name} {value}" for name, value in run["head"].items())
    parts = [
        "## Compiled kernels",
        f"`python -m bench.kernels.compile_gates --json bench/results/{GATES}` for sm_90, without "
        f"a GPU ({versions}). Instructions per element in loops, per warp outside of them, and per "
        "element in all; the time to issue them on an H200 and the time to move the bytes, "
        "modelled as `bench/harness/sass.py` says. Not measured.",
        gates_table(run["gates"]),
    ]
    return "\n" + "\n\n".join(parts) + "\n"


def _head_line(run: Run) -> str:
    head = run["head"]
    facts = [f"torch {head['torch']}", f"triton {head['triton']}"]
    facts += [f"driver {head['driver']}" if head["driver"] else f"threads {head['threads']}"]
    facts += [f"beside {head['busy']} busy processes"] if head.get("busy") else []
    facts += [f"commit {head['commit']}"]
    facts += [f"{name} {version}" for name, version in head.get("peers", {}).items()]
    if head.get("absent"):
        facts.append("absent: " + ", ".join(head["absent"]))
    ceilings = {}  # the last of each: an appended run measured them again
    for row in run["rows"]:
        if row["suite"] == CEILINGS:
            dtype = "" if row["case"] == "copy" else f" {row['dtype']}"
            ceilings[row["case"] + dtype] = f"{row['value']:g} {row['unit']}"
    facts += [f"{name} {amount}" for name, amount in ceilings.items()]
    return "; ".join(facts) + "."


def _profile(name: str, profile: dict[str, Any]) -> list[str]:
    """A profile's heading, idle time and table."""
    wall = f"{profile['wall_ms']:.4g} ms under the profiler"
    if profile["idle_share"] is None:
        text = f"Idle time: not applicable on a CPU. {wall}."
    else:
        text = f"The GPU was idle for {percent(profile['idle_share'])} of {wall}."
    return [f"#### {name}", text, profile_table(profile)]


def _errors(rows: list[Row]) -> list[str]:
    lines = []
    for row in rows:
        measurements = {"ours": row, **row["peers"]}
        lines += [
            f"- {row['case']} {row['metric'] or ''} {shape(row)}, {name}: "
            f"`{measured['error'].splitlines()[0][:200]}`"
            for name, measured in measurements.items()
            if "error" in measured
        ]
    return ["### Errors", "\n".join(lines)] if lines else []


# --- docs/benchmarks.md ---------------------------------------------------------------------------


def summary(runs: dict[str, Run]) -> str:
    """The newest run on a GPU, else of most threads on a CPU: head line and tables."""
    on_gpu = [run for run in runs.values() if run["head"]["driver"]]
    run = on_gpu[0] if on_gpu else max(runs.values(), key=_idle_threads)
    hidden = ("images", HOURS)
    rows = [r for r in run["rows"] if r["suite"] != CEILINGS and r["metric"] not in hidden]
    where = f"{run['head']['device']}, {run['head']['date'][:10]}. {_head_line(run)}"
    suites = dict.fromkeys(row["suite"] for row in rows)
    tables = [brief_table(row for row in rows if row["suite"] == suite) for suite in suites]
    return "\n\n".join([where, *tables, *_hours_line(runs)])


def _idle_threads(run: Run) -> int:
    """Threads of a run that had the machine to itself, else 0."""
    return 0 if run["head"].get("busy") else run["head"]["threads"]


def _hours_line(runs: dict[str, Run]) -> list[str]:
    """Duration of the paper's 800 steps, from the newest step measured on a GPU; else nothing."""
    for run in runs.values():
        found = [row for row in run["rows"] if row["metric"] == HOURS and row["value"]]
        if not (run["head"]["driver"] and found):
            continue
        row = found[-1]
        size = row["shape"]
        peers = [
            f"{peer['value']:.3g} with {name}"
            for name, peer in row["peers"].items()
            if peer["value"]
        ]
        where = f"one {run['head']['device']}"
        step = (
            f"{size['P']} prompts of {size['G']} images, {size['cot']} tokens of chain of thought"
        )
        text = f"The paper's 800 steps take {row['value']:.3g} hours on {where}"
        return [
            f"{', '.join([text, *peers])}: a measured step ({size['model']}, {step}) times 800."
        ]
    return []


def with_table(page: str, text: str) -> str:
    """`page` with `text` between the markers.

    Raises:
        ValueError: a marker is missing.
    """
    if BEGIN not in page or END not in page:
        raise ValueError(f"docs/benchmarks.md: no lines {BEGIN} and {END}; add both")
    before, rest = page.split(BEGIN, 1)
    return f"{before}{BEGIN}\n{text}\n{END}{rest.split(END, 1)[1]}"


if __name__ == "__main__":
    sys.exit(main())
