"""Render what was measured: bench/RESULTS.md, the README's table, and plots.

    python -m bench.report

Reads bench/results/*.json, as `bench.run` wrote them. The README's table is the part between
`<!-- benchmark table -->` and `<!-- end of benchmark table -->`; it shows the newest run on a GPU
where there is one, else on a CPU. Writes nothing else than these and bench/plots/*.svg.
"""

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bench._measure import CEILINGS

ROOT = Path(__file__).parent.parent
HOURS = "hours_for_800_steps"
BEGIN, END = "<!-- benchmark table -->", "<!-- end of benchmark table -->"
Row = dict[str, Any]
Run = dict[str, Any]


def load(folder: Path) -> dict[str, Run]:
    """File stem -> run, the newest first."""
    runs = {path.stem: json.loads(path.read_text("utf-8")) for path in folder.glob("*.json")}
    return dict(sorted(runs.items(), key=lambda item: item[1]["head"]["date"], reverse=True))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, default=ROOT, help="the repository")
    root = parser.parse_args().root
    runs = load(root / "bench" / "results")
    if not runs:
        print(f"no results in {root / 'bench' / 'results'}: run `python -m bench.run` first")
        return 1
    plots = {stem: _plots(stem, run, root / "bench" / "plots") for stem, run in runs.items()}
    (root / "bench" / "RESULTS.md").write_text(results_page(runs, plots), encoding="utf-8")
    readme = root / "README.md"
    readme.write_text(with_table(readme.read_text("utf-8"), summary(runs)), encoding="utf-8")
    print(f"rendered {len(runs)} runs")
    return 0


def _plots(stem: str, run: Run, folder: Path) -> list[str]:
    from bench import _plots

    return _plots.draw(stem, run, folder)


# --- Tables ---------------------------------------------------------------------------------------


def results_page(runs: dict[str, Run], plots: dict[str, list[str]]) -> str:
    """All runs, all rows."""
    parts = [
        "# Benchmark results",
        "Rendered by `python -m bench.report` from `bench/results/`; `python -m bench.run` makes "
        "such a file. Floor: the least bytes over the copy bandwidth, or the operations over the "
        "matmul rate, both measured in the same run; the larger. Memory: what a call needs beside "
        "its inputs. Times are medians; on a GPU those of the device, without the launch.",
    ]
    for stem, run in runs.items():
        parts += [f"## {run['head']['device']}, {run['head']['date'][:10]}", _head_line(run)]
        parts += [f"![{name}](plots/{name})" for name in plots.get(stem, [])]
        for suite in sorted({row["suite"] for row in run["rows"]} - {CEILINGS}):
            rows = [row for row in run["rows"] if row["suite"] == suite]
            parts += [f"### {suite}", table(rows)]
            for name, profile in run.get("profiles", {}).items():
                if name.startswith(f"{suite}/"):
                    parts += profile_parts(name.removeprefix(f"{suite}/"), profile)
        parts += _errors(run["rows"])
    return "\n\n".join(parts) + "\n"


def brief_table(rows: Iterable[Row]) -> str:
    """A narrow table: ours, and how many times as long each peer takes."""
    rows = list(rows)
    peers = list(dict.fromkeys(name for row in rows for name in row["peers"]))
    header = ["case", "shape", "time", "of floor", "MiB", *(f"{name} takes" for name in peers)]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for row in rows:
        cells = [
            f"{row['case']} {row['metric'] or ''}".strip(),
            f"{shape(row)} {row['dtype'] or ''}".strip(),
            _amount(row),
            percent(row["fraction_of_floor"]),
            mebibytes(row["peak_memory_bytes"]),
            *(_times(row, row["peers"].get(name)) for name in peers),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _times(row: Row, peer: Row | None) -> str:
    """The peer's time and memory as multiples of ours."""
    if peer is None or not peer["value"] or not row["value"]:
        return "" if peer is None else peer.get("error", "")[:40]
    text = f"{peer['value'] / row['value']:.2g}x"
    if row["peak_memory_bytes"] and peer["peak_memory_bytes"]:
        text += f" ({peer['peak_memory_bytes'] / row['peak_memory_bytes']:.2g}x MiB)"
    return text


def _head_line(run: Run) -> str:
    head = run["head"]
    facts = [f"torch {head['torch']}", f"triton {head['triton']}"]
    facts += [f"driver {head['driver']}"] if head["driver"] else []
    facts += [f"commit {head['commit']}"]
    facts += [f"{name} {version}" for name, version in head.get("peers", {}).items()]
    if head.get("absent"):
        facts.append("absent: " + ", ".join(head["absent"]))
    ceilings = {}  # an appended run measured them again
    for row in run["rows"]:
        if row["suite"] == CEILINGS:
            dtype = "" if row["case"] == "copy" else f" {row['dtype']}"
            ceilings[row["case"] + dtype] = f"{row['value']:g} {row['unit']}"
    facts += [f"{name} {amount}" for name, amount in ceilings.items()]
    return "; ".join(facts) + "."


def table(rows: Iterable[Row]) -> str:
    """A markdown table: ours, its floor, its memory, and each peer as time (ratio) and memory."""
    rows = list(rows)
    peers = list(dict.fromkeys(name for row in rows for name in row["peers"]))
    header = ["case", "shape", "ours", "floor", "of floor", "of copy", "MiB", *peers]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for row in rows:
        cells = [
            f"{row['case']} {row['metric'] or ''}".strip(),
            f"{shape(row)} {row['dtype'] or ''}".strip(),
            _amount(row),
            "" if row["floor"] is None else f"{row['floor']:g}",
            percent(row["fraction_of_floor"]),
            percent(row["fraction_of_copy"]),
            mebibytes(row["peak_memory_bytes"]),
            *(_peer(row, row["peers"].get(name)) for name in peers),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _peer(row: Row, peer: Row | None) -> str:
    if peer is None:
        return ""
    if peer.get("value") is None:
        return peer.get("error", "").splitlines()[0][:40] if peer.get("error") else ""
    ratio = f" ({peer['value'] / row['value']:.2g}x)" if row["value"] else ""
    return f"{_amount(peer)}{ratio}, {mebibytes(peer['peak_memory_bytes'])} MiB"


def _amount(measured: Row) -> str:
    if measured["value"] is None:
        return "failed" if "error" in measured else ""
    return f"{measured['value']:g} {measured['unit']}"


def shape(row: Row) -> str:
    return " ".join(f"{k}={v}" for k, v in row["shape"].items())


def percent(fraction: float | None) -> str:
    return "" if fraction is None else f"{fraction:.0%}"


def mebibytes(count: int | None) -> str:
    return "" if count is None else f"{count / 2**20:.0f}"


def profile_parts(name: str, profile: dict[str, Any]) -> list[str]:
    """A profile's heading, idle time and table."""
    wall = f"{profile['wall_ms']:.4g} ms under the profiler"
    idle = profile["idle_share"]
    waited = (
        f"The GPU was idle for {percent(idle)} of "
        if idle is not None
        else "Idle time: not applicable on a CPU. "
    )
    lines = ["| longest | ms | calls | share |", "|---|---|---|---|"]
    for each in profile["longest"]:
        kernel = each["name"].replace("|", "\\|")
        lines.append(f"| `{kernel}` | {each['ms']:.4g} | {each['calls']} | {each['share']:.1%} |")
    return [f"#### {name}", f"{waited}{wall}.", "\n".join(lines)]


def _errors(rows: Iterable[Row]) -> list[str]:
    lines = []
    for row in rows:
        failed = {"ours": row, **row["peers"]}
        lines += [
            f"- {row['case']} {row['metric'] or ''} {shape(row)}, {name}: "
            f"`{measured['error'].splitlines()[0][:200]}`"
            for name, measured in failed.items()
            if "error" in measured
        ]
    return ["### Errors", "\n".join(lines)] if lines else []


# --- README ---------------------------------------------------------------------------------------


def summary(runs: dict[str, Run]) -> str:
    """The newest run on a GPU, or on a CPU where there is none: head line and table."""
    on_gpu = {stem: run for stem, run in runs.items() if run["head"]["driver"]}
    run = next(iter((on_gpu or runs).values()))
    hidden = ("images", HOURS)
    rows = [r for r in run["rows"] if r["suite"] != CEILINGS and r["metric"] not in hidden]
    where = f"{run['head']['device']}, {run['head']['date'][:10]}. {_head_line(run)}"
    suites = dict.fromkeys(row["suite"] for row in rows)
    tables = [brief_table(row for row in rows if row["suite"] == suite) for suite in suites]
    return "\n\n".join([where, *tables, *hours_line(runs)])


def hours_line(runs: dict[str, Run]) -> list[str]:
    """What the paper's 800 steps take, by the newest step measured on a GPU; nothing without."""
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


def with_table(readme: str, text: str) -> str:
    """`readme` with `text` between the markers.

    Raises:
        ValueError: a marker is missing.
    """
    if BEGIN not in readme or END not in readme:
        raise ValueError(f"README.md needs the lines {BEGIN} and {END}")
    before, rest = readme.split(BEGIN, 1)
    return f"{before}{BEGIN}\n{text}\n{END}{rest.split(END, 1)[1]}"


if __name__ == "__main__":
    sys.exit(main())
